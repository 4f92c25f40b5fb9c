"""What moves or mixes pixels without weights on x86-64: resizes, joined and flattened tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models import graph as ir
from ....runtime.arithmetic import RESIZE_ONE
from ..prim_func import Parameter
from . import vector as v
from .layout import ceil_div, stored_channels
from .vector import Buffer, Expr, Isa

RESIZE_BITS = RESIZE_ONE.bit_length() - 1


@dataclass(frozen=True)
class Resize:
    """A bilinear resize or a nearest one. A task is a row of outputs.

    The sums are those of ``arithmetic.resize_bilinear``, which the 128 of the stored form passes through unchanged: the
    weights of four pixels are 2^22 together. Of 255 * 2^22 the greatest is inside int32.
    """

    isa: Isa
    geometry: ir.Geometry
    bilinear: bool

    @property
    def symbol(self) -> str:
        g, method = self.geometry, "bilinear" if self.bilinear else "nearest"
        inside = f"{g.in_height}x{g.in_width}x{g.in_channels}"
        return f"resize_{method}_{self.isa.name}_{inside}_to{g.out_height}x{g.out_width}"

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Operands: x, the rows' taps, the columns', y. Taps: of a bilinear resize the pixel before, the one after and
        its weight for each position, of a nearest one the pixel."""
        isa, g = self.isa, self.geometry
        taps, stride = 3 if self.bilinear else 1, stored_channels(g.in_channels)
        zero = v.splat(0, "uint8", isa.bytes)

        def body(x: Buffer, rows: Buffer, columns: Buffer, y: Buffer) -> Callable[[Expr], None]:
            none = v.Clamp(v.splat(0, "int16", isa.bytes // 2), zero)

            def line(left: Expr, right: Expr, weights: Expr) -> list[Expr]:
                """Sums of two pixels' values by their weights, in ``lane_order``."""
                sums = []
                for high in (False, True):
                    pair = v.unpack(isa, left, right, 8, high)
                    for high_pair in (False, True):
                        wide = v.reinterpret(v.unpack(isa, pair, zero, 8, high_pair), f"int16x{isa.bytes // 2}")
                        sums.append(T.Bind(v.multiply_pairs(isa, wide, weights)))
                return sums

            def mixed(starts: list[Expr], chunk: Expr, right: Expr, down: Expr) -> Expr:
                corners = [T.Bind(v.load(x, start + chunk * isa.bytes, isa.bytes)) for start in starts]
                half = v.splat(1 << (2 * RESIZE_BITS - 1), "int32", isa.words)
                whole, rest = (v.splat(bits, "int32", isa.words) for bits in (RESIZE_BITS, 2 * RESIZE_BITS))
                lines = zip(line(corners[0], corners[1], right), line(corners[2], corners[3], right), strict=True)
                sums = [T.Bind(((top << whole) + (bottom - top) * down + half) >> rest) for top, bottom in lines]
                return v.pack(isa, sums, none)

            def task(row: Expr) -> None:
                at = [T.Bind(rows[row * taps + i]) for i in range(taps)]
                down = T.Bind(T.broadcast(at[2], isa.words)) if self.bilinear else None
                with T.serial(0, g.out_width) as column:
                    to = [T.Bind(columns[column * taps + i]) for i in range(taps)]
                    starts = [T.Bind((i * g.in_width + j) * stride) for i in at[:2] for j in to[:2]]
                    right = None
                    if self.bilinear:  # the two weights as a pair of int16
                        pair = T.Bind((to[2] << 16) + (RESIZE_ONE - to[2]))
                        right = T.Bind(v.reinterpret(T.broadcast(pair, isa.words), f"int16x{isa.bytes // 2}"))
                    with T.serial(0, ceil_div(g.in_channels, isa.bytes)) as chunk:
                        if self.bilinear:
                            u = mixed(starts, chunk, right, down)
                        else:
                            u = v.load(x, starts[0] + chunk * isa.bytes, isa.bytes)
                        v.store(y, (row * g.out_width + column) * stride + chunk * isa.bytes, u, isa.bytes)

            return task

        operands = [
            Parameter("x", "uint8", g.in_pixels * stride),
            Parameter("rows", "int32", g.out_height * taps),
            Parameter("columns", "int32", g.out_width * taps),
            Parameter("y", "uint8", g.out_pixels * stride),
        ]
        return v.kernel(self.symbol, operands, body)


@dataclass(frozen=True)
class Part:
    """``width`` bytes of every pixel of a tensor, whose pixels are ``stride`` bytes apart, and where they go to in a
    pixel: at ``offset``."""

    width: int
    stride: int
    offset: int


@dataclass(frozen=True)
class Join:
    """Copies ``parts`` of as many tensors into one of ``count`` bytes, whose pixels are ``stride`` bytes apart. What a
    later part overlaps is the later one's. A task is a run of pixels."""

    parts: tuple[Part, ...]
    pixels: int
    stride: int
    count: int

    @property
    def symbol(self) -> str:
        parts = "_".join(f"{part.width}of{part.stride}at{part.offset}" for part in self.parts)
        return f"join_{self.pixels}x{parts}_to{self.count}by{self.stride}"

    @property
    def pixels_per_task(self) -> int:
        return ceil_div(self.pixels, 16)

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    def build(self) -> tirx.PrimFunc:
        """Operands: the parts' tensors, y."""

        def body(*buffers: Buffer) -> Callable[[Expr], None]:
            *sources, y = buffers

            def copy(x: Buffer, part: Part, pixel: Expr) -> None:
                source = T.Bind(pixel * part.stride)
                target = T.Bind(pixel * self.stride + part.offset)

                def piece(at: Expr | int, size: int) -> None:
                    v.store(y, target + at, v.load(x, source + at, size), size)

                v.for_pieces(part.width, 32, piece)

            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                with T.serial(0, T.Bind(T.min(self.pixels_per_task, self.pixels - first))) as i:
                    pixel = T.Bind(first + i)
                    for x, part in zip(sources, self.parts, strict=True):
                        copy(x, part, pixel)

            return task

        operands = [Parameter(f"x{i}", "uint8", self.pixels * part.stride) for i, part in enumerate(self.parts)]
        return v.kernel(self.symbol, [*operands, Parameter("y", "uint8", self.count)], body)
