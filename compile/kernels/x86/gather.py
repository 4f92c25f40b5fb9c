"""The rows of a convolution's left-hand matrix on x86-64: the input's values under each window."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import vector as v
from .layout import PADDING, ceil_div, stored_channels
from .vector import Buffer, Expr, Isa


@dataclass(frozen=True)
class Gather:
    """Rows are the input's values under the window, tap after tap. ``plain``: the source is the network's input."""

    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int, int, int]
    out_width: int
    plain: bool

    @property
    def symbol(self) -> str:
        (kh, kw), (sy, sx), pads = self.kernel, self.strides, "_".join(map(str, self.padding))
        source = "plain" if self.plain else "in"
        return f"{source}{self.height}x{self.width}x{self.channels}_k{kh}x{kw}_s{sy}x{sx}_p{pads}"

    @property
    def pixel_stride(self) -> int:
        return self.channels if self.plain else stored_channels(self.channels)

    @property
    def copies_nothing(self) -> bool:
        """Whether the rows are the input's own pixels."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.padding) and not self.plain

    @property
    def whole_rows(self) -> bool:
        """Whether a window's row is contiguous in memory."""
        return self.plain and not any(self.padding)

    def k_position(self, isa: Isa) -> NDArray[np.int64]:
        """Shape (KH, KW, C): where each weight's activation stands in a row."""
        kh, kw = self.kernel
        y, x, c = np.meshgrid(np.arange(kh), np.arange(kw), np.arange(self.channels), indexing="ij")
        if self.whole_rows:
            return (y * kw + x) * self.channels + c
        return (y * kw + x) * self._unit(isa, self.channels) + c

    @staticmethod
    def _unit(isa: Isa, count: int) -> int:
        return ceil_div(count, isa.group) * isa.group

    def emit(
        self, isa: Isa, buffers: dict[str, Buffer], first: Expr, last: Expr, rows: Buffer, stride: int, origin: Expr
    ) -> None:
        """Fills rows[(p - first + origin) * stride ...] for the pixels first <= p < last."""
        (kh, kw), (sy, sx), (top, _, left, _) = self.kernel, self.strides, self.padding
        x, pixel = buffers["x"], self.pixel_stride
        position = self.k_position(isa)
        pad = None
        if any(self.padding):
            pad = T.Bind(T.cast(buffers["parameters"][PADDING], "uint8"))
        with T.serial(first, last) as p:
            y0 = T.Bind(tirx.truncdiv(p, T.int32(self.out_width)) * sy - top)
            x0 = T.Bind(tirx.truncmod(p, T.int32(self.out_width)) * sx - left)
            target = T.Bind((p - first + origin) * stride)
            for ky in range(kh):
                if self.whole_rows:
                    source = ((y0 + ky) * self.width + x0) * pixel
                    _copy(isa, self.plain, x, source, rows, target + int(position[ky, 0, 0]), kw * self.channels)
                    continue
                for kx in range(kw):
                    source = ((y0 + ky) * self.width + x0 + kx) * pixel
                    goal = target + int(position[ky, kx, 0])
                    if pad is None:
                        _copy(isa, self.plain, x, source, rows, goal, self.channels)
                        continue
                    inside = tirx.all(y0 + ky >= 0, y0 + ky < self.height, x0 + kx >= 0, x0 + kx < self.width)
                    with T.If(inside):
                        with T.Then():
                            _copy(isa, self.plain, x, source, rows, goal, self.channels)
                        with T.Else():
                            _fill(isa, pad, rows, goal, self.channels)


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
