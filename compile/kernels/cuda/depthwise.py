"""Depthwise convolutions on NVIDIA GPUs, alone or as the prologue of a matrix product.

A thread makes one word of channels of a run of neighbouring pixels. With dp4a, 3x3 windows of int8 at stride 1: the
words of four neighbouring pixels are transposed, so that each holds four pixels of one channel, and a word of weights
(w0, w1, w2, 0) makes one output of it and (0, w0, w1, w2) the next. All others go tap by tap, int8 widened to int16.

Padding is the input's zero point, whose share in the sum the bias takes back. A ReLU between the input and the
convolution is max(x, zero point): the contract's ReLU shifts the zero point, and the bias takes that back too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import tir as c
from .tir import Buffer, Expr, Grid, Parameter, Thread, ceil_div
from .window import WindowLayout, split

# Words of the constants: the output's clamp and zero point, and the input's zero point four times.
LOW, HIGH, ZERO, PADDING = range(4)
CONSTANTS = 4
THREADS = 128
RUN = 4  # pixels of a thread


@dataclass(frozen=True, eq=False)
class Taps:
    """What a word of channels is multiplied by, and what follows the sum; in registers."""

    word: Expr
    weights: Buffer
    bias: list[Expr]
    factors: list[Expr]  # of int8 only, as the clamp
    clamp: list[Expr]
    padding: Expr


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution. ``by_dot``: by dp4a, for what ``fits_dot``. ``after_relu``: of the input's ReLU."""

    dtype: str
    window: WindowLayout
    after_relu: bool
    by_dot: bool
    relu: bool = False  # float16 only; the clamp holds it for int8

    @property
    def name(self) -> str:
        kind = "dot" if self.by_dot else "taps"
        return f"{kind}_{self.dtype}_{self.window.name}" + "_after_relu" * self.after_relu + "_relu" * self.relu

    @property
    def symbol(self) -> str:
        return f"depthwise_{self.name}"

    @property
    def weight_words(self) -> int:
        """For a word of channels."""
        return 12 if self.by_dot else self.window.taps

    @property
    def runs(self) -> int:
        """Threads for one word of channels."""
        return self.window.batch * self.window.out_height * ceil_div(self.window.out_width, RUN)

    @property
    def grid(self) -> Grid:
        return Grid(ceil_div(self.runs * self.window.pixel_words, THREADS), THREADS)

    @property
    def traffic_bytes(self) -> int:
        return (self.runs * self.pixels_read(RUN) + self.window.pixels) * self.window.pixel_bytes

    def pixels_read(self, outputs: int) -> int:
        """For a run of ``outputs`` pixels."""
        return self.window.kernel[0] * len(self._columns(outputs))

    def _columns(self, outputs: int) -> list[int]:
        """The columns, from the first window's first on, that ``outputs`` windows see."""
        w = self.window
        seen = {o * w.strides[1] + k * w.dilation[1] for o in range(outputs) for k in range(w.kernel[1])}
        return sorted(seen | set(range(w.strides[1] * (outputs - 1) + w.kernel[1] if w.dilation[1] == 1 else 0)))

    def operands(self) -> list[Parameter]:
        """Weights, biases and, of int8, multipliers and constants."""
        words = self.window.pixel_words
        channels = words * c.WORD_LANES[self.dtype]
        scaling = [Parameter("dm", "float32", channels), Parameter("dp", "int32", CONSTANTS)]
        return [
            Parameter("dw", "int32", words * self.weight_words),
            Parameter("db", c.SUM[self.dtype], channels),
            *(scaling if self.dtype == "int8" else []),
        ]

    def parameters(self) -> list[Parameter]:
        w = self.window
        outputs = Parameter("y", "int32", w.pixels * w.pixel_words)
        return [Parameter("x", "int32", w.words), *self.operands(), outputs]

    def build(self) -> tirx.PrimFunc:
        """The convolution alone."""
        w = self.window

        def body(thread: Thread, *buffers: Buffer) -> None:
            named = dict(zip((p.name for p in self.parameters()), buffers, strict=True))
            n = c.bind(thread.block * THREADS + thread.index)
            with c.when(True if self.runs * w.pixel_words % THREADS == 0 else n < self.runs * w.pixel_words):
                run, word = split(n, w.pixel_words)
                image, y, step = split(run, w.out_height, ceil_div(w.out_width, RUN))
                image, y, x, word = (c.bind(value) for value in (image, y, step * RUN, word))
                results = self.run(named["x"], self.load_taps(named, word), (image, y, x), RUN)
                pixel = c.bind((image * w.out_height + y) * w.out_width + x)
                for i, result in enumerate(results):
                    with c.when(True if w.out_width % RUN == 0 or i == 0 else x + i < w.out_width):
                        c.put(named["y"], (pixel + i) * w.pixel_words + word, result)

        return c.kernel(self.symbol, self.parameters(), self.grid, body)

    def load_taps(self, buffers: dict[str, Buffer], word: Expr) -> Taps:
        weights = c.registers(self.weight_words)
        if self.by_dot:
            for i in range(3):
                c.do("load16", c.at(weights, i * 4), c.at(buffers["dw"], (i * self.window.pixel_words + word) * 4))
        else:
            for i in range(self.weight_words):
                c.put(weights, i, buffers["dw"][i * self.window.pixel_words + word])
        lanes = c.WORD_LANES[self.dtype]
        if self.dtype == "float16":
            bias = [c.bind(buffers["db"][word * lanes + i]) for i in range(lanes)]
            return Taps(word, weights, bias, [], [], 0)
        biases, multipliers = c.registers(lanes), c.registers(lanes, "float32")
        c.do("load16", c.at(biases, 0), c.at(buffers["db"], word * lanes))
        c.do("load16_f32", c.at(multipliers, 0), c.at(buffers["dm"], word * lanes))
        bias, factors = ([array[i] for i in range(lanes)] for array in (biases, multipliers))
        *clamp, padding = (c.bind(buffers["dp"][i]) for i in (LOW, HIGH, ZERO, PADDING))
        return Taps(word, weights, bias, factors, clamp, padding)

    def run(self, source: Buffer, taps: Taps, at: tuple[Expr, Expr, Expr], outputs: int) -> list[Expr]:
        """The words of ``outputs`` neighbouring pixels from ``at`` (image, row, column) on, one word of channels."""
        lanes = c.WORD_LANES[self.dtype]
        sums = c.registers(lanes * outputs, c.SUM[self.dtype])
        for i in range(lanes):
            for output in range(outputs):
                c.put(sums, output * lanes + i, taps.bias[i])
        image, y, x = at
        w = self.window
        for row in range(w.kernel[0]):
            in_y = c.bind(y * w.strides[0] + (row * w.dilation[0] - w.padding[0]))
            first_x = x * w.strides[1] - w.padding[1]
            words = {i: self._load(source, taps, (image, in_y, first_x + i)) for i in self._columns(outputs)}
            if self.by_dot:
                _dot_row(list(words.values()), taps, row, sums)
            else:
                _tap_row(self, words, taps, row, sums, outputs)
        return [self._finish(taps, [sums[output * lanes + i] for i in range(lanes)]) for output in range(outputs)]

    def _load(self, source: Buffer, taps: Taps, at: tuple[Expr, Expr, Expr]) -> Expr:
        image, y, x = at
        word = source[self.window.word(image, y, x, taps.word)]
        word = T.if_then_else(self.window.contains(y, x), word, taps.padding)
        if self.after_relu:
            word = c.call("max4", word, taps.padding) if self.dtype == "int8" else c.call("relu2", word)
        return c.bind(word)

    def _finish(self, taps: Taps, sums: list[Expr]) -> Expr:
        if self.dtype == "float16":
            return c.bind(c.call("pack2", *(T.max(total, T.float32(0)) if self.relu else total for total in sums)))
        return c.bind(c.call("scale4", *sums, *taps.factors, *taps.clamp))


@dataclass(frozen=True)
class DepthwisePrologue:
    """A depthwise convolution whose results are the rows of a matrix product.

    Its items are the output pixels in rows made even, so that a pair of items is a pair of neighbours.
    """

    depthwise: Depthwise

    @property
    def window(self) -> WindowLayout:
        return self.depthwise.window

    @property
    def name(self) -> str:
        return f"front_{self.depthwise.name}"

    @property
    def row_items(self) -> int:
        return self.window.out_width + self.window.out_width % 2

    @property
    def items(self) -> int:
        return self.window.batch * self.window.out_height * self.row_items

    def traffic_bytes(self, column_tiles: int, blocks: int) -> int:
        """Every block reads the operands, and of every row of its windows what the one before it did not: the cache
        serves that."""
        pixels = self.items * self.window.kernel[0] * self.window.strides[1]
        operands = 4 * sum(p.count for p in self.depthwise.operands())
        return pixels * self.window.pixel_bytes * column_tiles + operands * blocks

    def pixel(self, item: Expr) -> tuple[Expr, Expr]:
        """The output pixel of an item, and whether it is one."""
        row, x = split(item, self.row_items)
        exists = item < self.items
        return row * self.window.out_width + x, exists if self.row_items == self.window.out_width else T.And(
            exists, x < self.window.out_width
        )

    def taps(self, buffers: dict[str, Buffer], word: Expr) -> Taps:
        """Words past the end repeat the last."""
        return self.depthwise.load_taps(buffers, c.bind(T.min(word, self.window.pixel_words - 1)))

    def emit(self, buffers: dict[str, Buffer], taps: Taps, item: Expr) -> list[Expr]:
        """Two items' words; those past the end repeat the last, and are multiplied by zeros or not stored."""
        inside = c.bind(T.min(item, self.items - 2))
        image, y, x = split(inside, self.window.out_height, self.row_items)
        return self.depthwise.run(buffers["x"], taps, (image, y, x), 2)


def fits_dot(window: WindowLayout) -> bool:
    """Whether a window's rows can be dot products of four neighbouring pixels."""
    return window.kernel == (3, 3) and window.strides == (1, 1) and window.dilation == (1, 1)


def pack_taps(weights: NDArray[np.generic], dtype: str, channels: int) -> NDArray[np.int32]:
    """(KH, KW, C) -> [tap][channel] as words, for windows that go tap by tap."""
    padded = np.zeros((weights.shape[0] * weights.shape[1], channels), dtype)
    padded[:, : weights.shape[2]] = weights.reshape(-1, weights.shape[2])
    return padded.reshape(-1).view(np.int32)


def pack_rows(weights: NDArray[np.generic], channels: int) -> NDArray[np.int32]:
    """(3, 3, C) -> [row][channel] as words (w0, w1, w2, 0)."""
    rows = np.zeros((3, channels, 4), np.int8)
    rows[:, : weights.shape[2], :3] = weights.transpose(0, 2, 1)
    return rows.reshape(-1).view(np.int32)


def _tap_row(shape: Depthwise, words: dict[int, Expr], taps: Taps, row: int, sums: Buffer, outputs: int) -> None:
    """Adds one row of a window; ``words`` are its pixels by column."""
    multiply = {"int8": "mad_s16", "float16": "mad_f16"}[shape.dtype]
    pixels = {column: _pairs(shape.dtype, word) for column, word in words.items()}
    for column in range(shape.window.kernel[1]):
        weights = _pairs(shape.dtype, taps.weights[row * shape.window.kernel[1] + column])
        for output in range(outputs):
            pixel = pixels[output * shape.window.strides[1] + column * shape.window.dilation[1]]
            for p, (a, b) in enumerate(zip(pixel, weights, strict=True)):
                for half in range(2):
                    n = (output * len(pixel) + p) * 2 + half
                    c.put(sums, n, c.call(multiply, a, b, half, sums[n], dtype=c.SUM[shape.dtype]))


def _pairs(dtype: str, word: Expr) -> list[Expr]:
    """A word as words of two lanes of 16 bits."""
    return [c.bind(c.call("pair", word, i)) for i in range(2)] if dtype == "int8" else [word]


def _dot_row(words: list[Expr], taps: Taps, row: int, sums: Buffer) -> None:
    """``_tap_row`` of a 3x3 window at stride 1 by dp4a."""
    for pair in range((len(words) - 2) // 2):
        for i, channel in enumerate(_transpose(words[2 * pair : 2 * pair + 4])):
            first = c.bind(taps.weights[row * 4 + i])
            for output, multipliers in ((2 * pair, first), (2 * pair + 1, first << 8)):
                n = output * 4 + i
                c.put(sums, n, c.call("dot4", channel, multipliers, sums[n]))


def _transpose(words: list[Expr]) -> list[Expr]:
    """Four words of four bytes, the i-th of the results with the i-th byte of each."""
    first, last = words[:2], words[2:]
    low, low2 = (c.bind(c.call("perm", *pair, 0x5140)) for pair in (first, last))
    high, high2 = (c.bind(c.call("perm", *pair, 0x7362)) for pair in (first, last))
    pairs = ((low, low2), (high, high2))
    return [c.bind(c.call("perm", a, b, selector)) for a, b in pairs for selector in (0x5410, 0x7632)]
