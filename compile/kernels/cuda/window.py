"""Which input pixels an output pixel is made of, as address arithmetic in words."""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from .tir import Expr


def split(index: Expr, *sizes: int) -> list[Expr]:
    """A flat index that is not negative as indices of which the last runs fastest; the first is not bounded."""
    parts: list[Expr] = []
    for size in reversed(sizes):
        if isinstance(index, int):
            index, part = divmod(index, size)
        else:
            part = T.truncmod(index, size) if size > 1 else 0
            index = T.truncdiv(index, size) if size > 1 else index
        parts.append(part)
    return [index, *reversed(parts)]


@dataclass(frozen=True)
class WindowLayout:
    """A window over ``batch`` images of stored pixels, ``pixel_bytes`` each, a multiple of 32."""

    batch: int
    in_height: int
    in_width: int
    out_height: int
    out_width: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]  # top, left
    pixel_bytes: int
    dilation: tuple[int, int] = (1, 1)

    @property
    def name(self) -> str:
        (kh, kw), (sh, sw), (top, left) = self.kernel, self.strides, self.padding
        sizes = f"{self.batch}x{self.in_height}x{self.in_width}x{self.pixel_bytes}"
        spread = "" if self.dilation == (1, 1) else "d{}x{}".format(*self.dilation)
        return f"{sizes}_to{self.out_height}x{self.out_width}_k{kh}x{kw}s{sh}x{sw}p{top}x{left}{spread}"

    @property
    def taps(self) -> int:
        return self.kernel[0] * self.kernel[1]

    @property
    def pixels(self) -> int:
        """Of the output."""
        return self.batch * self.out_height * self.out_width

    @property
    def pixel_words(self) -> int:
        return self.pixel_bytes // 4

    @property
    def words(self) -> int:
        """Of the input."""
        return self.batch * self.in_height * self.in_width * self.pixel_words

    @property
    def is_pointwise(self) -> bool:
        return self.taps == 1 and self.strides == (1, 1) and not any(self.padding)

    def base_word(self, pixel: Expr) -> Expr:
        """Where the window of an output pixel begins; without padding."""
        assert not any(self.padding)
        if self.is_pointwise:
            return pixel * self.pixel_words
        image, y, x = split(pixel, self.out_height, self.out_width)
        row = image * self.in_height + y * self.strides[0]
        return (row * self.in_width + x * self.strides[1]) * self.pixel_words

    def chunk_word(self, chunk: Expr) -> Expr:
        """From there to the chunk of 16 bytes of (tap, channels); without dilation."""
        assert self.dilation == (1, 1)
        if self.taps == 1:
            return chunk * 4
        tap, inner = split(chunk, self.pixel_bytes // 16)
        row, column = split(tap, self.kernel[1])
        return (row * self.in_width + column) * self.pixel_words + inner * 4

    def origin(self, pixel: Expr) -> tuple[Expr, Expr, Expr]:
        """(image, row, column) of the first tap of an output pixel; with padding, rows and columns may be outside."""
        image, y, x = split(pixel, self.out_height, self.out_width)
        return image, y * self.strides[0] - self.padding[0], x * self.strides[1] - self.padding[1]

    def _ends_outside(self, axis: int) -> bool:
        """Whether the last window ends beyond the image."""
        size, outputs = ((self.in_height, self.out_height), (self.in_width, self.out_width))[axis]
        extent = (self.kernel[axis] - 1) * self.dilation[axis] + 1
        return (outputs - 1) * self.strides[axis] - self.padding[axis] + extent > size

    @property
    def overlaps(self) -> bool:
        """Whether some of a window may lie outside."""
        return any(self.padding) or self._ends_outside(0) or self._ends_outside(1)

    def nearest_row(self, row: Expr) -> Expr:
        """The row itself, or the first or last of the image."""
        return self._nearest(row, 0, self.in_height)

    def nearest_column(self, column: Expr) -> Expr:
        return self._nearest(column, 1, self.in_width)

    def _nearest(self, at: Expr, axis: int, size: int) -> Expr:
        at = T.max(at, 0) if self.padding[axis] else at
        return T.min(at, size - 1) if self._ends_outside(axis) else at

    def contains(self, row: Expr, column: Expr) -> Expr:
        return T.And(
            T.And(row >= 0, row < self.in_height),
            T.And(column >= 0, column < self.in_width),
        )

    def word(self, image: Expr, row: Expr, column: Expr, word: Expr) -> Expr:
        return ((image * self.in_height + row) * self.in_width + column) * self.pixel_words + word
