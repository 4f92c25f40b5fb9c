"""The rows that a convolution multiplies on x86-64: the input's values under each window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models import graph as ir
from . import vector as v
from .layout import PADDING, ceil_div, dilation_symbol, stored_channels
from .vector import Buffer, Expr, Isa


@dataclass(frozen=True)
class Gather:
    """Rows are the input's values under the window, tap after tap. ``plain``: the source is the network's input."""

    geometry: ir.Geometry
    plain: bool

    @property
    def symbol(self) -> str:
        g, source = self.geometry, "plain" if self.plain else "in"
        (kh, kw), (sy, sx), pads = g.kernel, g.strides, "_".join(map(str, g.padding))
        inside, dilated = f"{g.in_height}x{g.in_width}x{g.in_channels}", dilation_symbol(g)
        return f"{source}{inside}_k{kh}x{kw}_s{sy}x{sx}_p{pads}{dilated}"

    @property
    def pixel_stride(self) -> int:
        return self.geometry.in_channels if self.plain else stored_channels(self.geometry.in_channels)

    @property
    def copies_nothing(self) -> bool:
        """Whether the rows are the input's own pixels."""
        return self.geometry.one_to_one and not self.plain

    @property
    def whole_rows(self) -> bool:
        """Whether a window's row is contiguous in memory."""
        return self.plain and not any(self.geometry.padding) and self.geometry.dilation[1] == 1

    def k_position(self, isa: Isa) -> NDArray[np.int64]:
        """Shape (KH, KW, C): where each weight's activation stands in a row."""
        (kh, kw), channels = self.geometry.kernel, self.geometry.in_channels
        y, x, c = np.meshgrid(np.arange(kh), np.arange(kw), np.arange(channels), indexing="ij")
        return (y * kw + x) * (channels if self.whole_rows else ceil_div(channels, isa.group) * isa.group) + c

    def emit(
        self, isa: Isa, buffers: dict[str, Buffer], first: Expr, last: Expr, rows: Buffer, stride: int, origin: Expr
    ) -> None:
        """Fills rows[(p - first + origin) * stride ...] for the pixels first <= p < last."""
        g = self.geometry
        (kh, kw), (sy, sx), (dy, dx), (top, _, left, _) = g.kernel, g.strides, g.dilation, g.padding
        x, pixel = buffers["x"], self.pixel_stride
        position = self.k_position(isa)
        pad = None
        if any(g.padding):
            pad = T.Bind(T.cast(buffers["parameters"][PADDING], "uint8"))
        with T.serial(first, last) as p:
            y0 = T.Bind(tirx.truncdiv(p, T.int32(g.out_width)) * sy - top)
            x0 = T.Bind(tirx.truncmod(p, T.int32(g.out_width)) * sx - left)
            target = T.Bind((p - first + origin) * stride)
            for ky in range(kh):
                if self.whole_rows:
                    source = ((y0 + ky * dy) * g.in_width + x0) * pixel
                    _copy(isa, self.plain, x, source, rows, target + int(position[ky, 0, 0]), kw * g.in_channels)
                    continue
                for kx in range(kw):
                    at_y, at_x = y0 + ky * dy, x0 + kx * dx
                    source = (at_y * g.in_width + x0 + kx * dx) * pixel
                    goal = target + int(position[ky, kx, 0])
                    if pad is None:
                        _copy(isa, self.plain, x, source, rows, goal, g.in_channels)
                        continue
                    inside = tirx.all(at_y >= 0, at_y < g.in_height, at_x >= 0, at_x < g.in_width)
                    with T.If(inside):
                        with T.Then():
                            _copy(isa, self.plain, x, source, rows, goal, g.in_channels)
                        with T.Else():
                            _fill(isa, pad, rows, goal, g.in_channels)


def _copy(isa: Isa, plain: bool, x: Buffer, source: Expr, rows: Buffer, target: Expr, count: int) -> None:
    """Copies ``count`` elements, as the operand type of the matrix product."""
    vector = 16 * isa.lanes if isa.vnni else 16

    def piece(offset: Expr | int, size: int) -> None:
        value = v.load(x, source + offset, size)
        if plain:
            flip = tirx.const(128, "uint8")
            value = v.reinterpret(value, v.lanes("uint8", size)) ^ (T.broadcast(flip, size) if size > 1 else flip)
        v.store(rows, target + offset, T.cast(value, v.lanes(isa.operand, size)), size)

    v.for_pieces(count, vector, piece)


def _fill(isa: Isa, value: Expr, rows: Buffer, target: Expr, count: int) -> None:
    def piece(offset: Expr | int, size: int) -> None:
        wide = T.cast(value, isa.operand)
        v.store(rows, target + offset, T.broadcast(wide, size) if size > 1 else wide, size)

    v.for_pieces(count, 16 * isa.lanes if isa.vnni else 16, piece)
