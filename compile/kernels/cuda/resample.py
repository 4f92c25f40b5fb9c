"""What moves or mixes int8 pixels without weights on NVIDIA GPUs: products, resizes, joined and flattened tensors."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import tir as c
from .elementwise import each, grid_of
from .tir import Buffer, Expr, Grid, Parameter
from .window import split

RESIZE_BITS = 11  # of a weight: ``arithmetic.RESIZE_ONE``


@dataclass(frozen=True)
class Multiply:
    """The contract's product of two tensors of ``pixels`` pixels in each of ``batch`` images, or with ``gate`` of one
    by a pixel of the other for each image. Operands: a, b, the multiplier, (z_a, z_b, low, high, zero)."""

    batch: int
    pixels: int
    pixel_words: int
    gate: bool

    @property
    def symbol(self) -> str:
        return f"multiply_{self.batch}x{self.pixels}x{self.pixel_words}" + "_gate" * self.gate

    @property
    def words(self) -> int:
        return self.batch * self.pixels * self.pixel_words

    @property
    def grid(self) -> Grid:
        return grid_of(self.words)

    @property
    def traffic_bytes(self) -> int:
        return self.words * (8 if self.gate else 12)

    def build(self) -> tirx.PrimFunc:
        second = self.batch * self.pixel_words if self.gate else self.words
        parameters = [
            Parameter("a", "int32", self.words),
            Parameter("b", "int32", second),
            Parameter("m", "float32", 1),
            Parameter("p", "int32", 5),
            Parameter("y", "int32", self.words),
        ]

        def body(n: Expr, a: Buffer, b: Buffer, m: Buffer, p: Buffer, y: Buffer) -> None:
            at = n
            if self.gate:
                image, _, word = split(n, self.pixels, self.pixel_words)
                at = c.bind(image * self.pixel_words + word)
            left, right = c.bind(a[n]), c.bind(b[at])
            products = [c.bind((c.call("byte", left, i) - p[0]) * (c.call("byte", right, i) - p[1])) for i in range(4)]
            factor = c.bind(m[0])
            c.put(y, n, c.call("scale4", *products, *[factor] * 4, p[2], p[3], p[4]))

        return each(self.symbol, parameters, self.words, body)


@dataclass(frozen=True)
class Resize:
    """(batch, in_height, in_width) -> (batch, out_height, out_width) pixels, bilinear or nearest.

    Operands: x, the rows' taps, the columns': of a bilinear resize the pixel before, the one after and its weight for
    each position, of a nearest one the pixel.
    """

    bilinear: bool
    batch: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    pixel_words: int

    @property
    def symbol(self) -> str:
        sizes = f"{self.batch}x{self.in_height}x{self.in_width}x{self.pixel_words}_to{self.out_height}x{self.out_width}"
        return f"resize_{'bilinear' if self.bilinear else 'nearest'}_{sizes}"

    @property
    def words(self) -> int:
        return self.batch * self.out_height * self.out_width * self.pixel_words

    @property
    def grid(self) -> Grid:
        return grid_of(self.words)

    @property
    def traffic_bytes(self) -> int:
        return self.words * (20 if self.bilinear else 8)

    def build(self) -> tirx.PrimFunc:
        taps = 3 if self.bilinear else 1
        parameters = [
            Parameter("x", "int32", self.batch * self.in_height * self.in_width * self.pixel_words),
            Parameter("r", "int32", self.out_height * taps),
            Parameter("s", "int32", self.out_width * taps),
            Parameter("y", "int32", self.words),
        ]

        def body(n: Expr, x: Buffer, rows: Buffer, columns: Buffer, y: Buffer) -> None:
            image, i, j, word = (c.bind(part) for part in split(n, self.out_height, self.out_width, self.pixel_words))

            def load(row: Expr, column: Expr) -> Expr:
                pixel = (image * self.in_height + row) * self.in_width + column
                return c.bind(x[pixel * self.pixel_words + word])

            if not self.bilinear:
                c.put(y, n, load(rows[i], columns[j]))
                return
            above, below, down = (c.bind(rows[i * 3 + k]) for k in range(3))
            before, after, right = (c.bind(columns[j * 3 + k]) for k in range(3))
            corners = [load(row, column) for row in (above, below) for column in (before, after)]
            values = []
            for lane in range(4):
                tl, tr, bl, br = (c.call("byte", corner, lane) for corner in corners)
                top, bottom = (
                    c.bind((a << RESIZE_BITS) + (b - a) * right) for a, b in ((c.bind(tl), tr), (c.bind(bl), br))
                )
                whole = (top << RESIZE_BITS) + (bottom - top) * down
                values.append(c.bind((whole + (1 << (2 * RESIZE_BITS - 1))) >> (2 * RESIZE_BITS)))
            c.put(y, n, c.call("pack4", *values))

        return each(self.symbol, parameters, self.words, body)


@dataclass(frozen=True)
class Place:
    """Copies ``channels`` of each of ``pixels`` pixels of ``batch`` images to where they lie in another tensor.

    Element (image, pixel, channel) of x lies at (image * pixels + pixel) * in_stride + channel, and in y at image *
    out_image + pixel * out_stride + offset + channel, in bytes. Operand: x.
    """

    batch: int
    pixels: int
    channels: int
    in_stride: int
    out_image: int
    out_stride: int
    offset: int

    @property
    def symbol(self) -> str:
        source = f"{self.batch}x{self.pixels}x{self.channels}of{self.in_stride}"
        return f"place_{source}_to{self.out_image}s{self.out_stride}at{self.offset}"

    @property
    def count(self) -> int:
        return self.batch * self.pixels * self.channels

    @property
    def grid(self) -> Grid:
        return grid_of(self.count)

    @property
    def traffic_bytes(self) -> int:
        return self.count * 2

    def build(self) -> tirx.PrimFunc:
        parameters = [
            Parameter("x", "int8", self.batch * self.pixels * self.in_stride),
            Parameter("y", "int8", self.batch * self.out_image),
        ]

        def body(n: Expr, x: Buffer, y: Buffer) -> None:
            image, pixel, channel = (c.bind(part) for part in split(n, self.pixels, self.channels))
            value = x[(image * self.pixels + pixel) * self.in_stride + channel]
            T.buffer_store(y, value, [image * self.out_image + pixel * self.out_stride + self.offset + channel])

        return each(self.symbol, parameters, self.count, body)
