"""Depthwise convolutions on NVIDIA GPUs, alone or in front of a matrix product.

A thread makes the outputs of one word of channels. 3x3 windows at stride 1 go by dp4a: the words of four neighbouring
pixels are transposed, so that each holds four pixels of one channel, and a word of weights (w0, w1, w2, 0) makes one
output of it and (0, w0, w1, w2) the next. Every other window goes tap by tap.

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
from .tir import Buffer, Expr, Parameter, Thread, ceil_div
from .window import Window, split

# Words of the constants: the output's clamp and zero point, and the input's zero point four times.
LOW, HIGH, ZERO, PADDING = range(4)
CONSTANTS = 4
THREADS = 128
RUN = 4  # outputs of a thread


@dataclass(frozen=True, eq=False)
class RowTaps:
    """The weights of one word of channels, row by row, and what follows the sum; in registers."""

    word: Expr
    weights: Buffer
    bias: list[Expr]
    factors: list[Expr]
    clamp: list[Expr]
    padding: Expr


@dataclass(frozen=True)
class Front:
    """A 3x3 depthwise convolution at stride 1, of int8, whose results are the rows of a matrix product.

    Its items are the output pixels in rows made even, so that a pair of items is a pair of neighbours.
    """

    window: Window
    after_relu: bool

    @property
    def name(self) -> str:
        return f"front_{self.window.name}" + "_relu" * self.after_relu

    @property
    def row_items(self) -> int:
        return self.window.out_width + self.window.out_width % 2

    @property
    def items(self) -> int:
        return self.window.batch * self.window.out_height * self.row_items

    @property
    def traffic_bytes(self) -> int:
        """Each pair reads twelve pixels and the weights."""
        return self.items // 2 * self.window.pixel_words * (12 * 4 + 80)

    def parameters(self) -> list[Parameter]:
        return depthwise_parameters("int8", self.window.pixel_words, 12)

    def pixel(self, item: Expr) -> tuple[Expr, Expr]:
        """The output pixel of an item, and whether it is one."""
        row, x = split(item, self.row_items)
        exists = item < self.items
        return row * self.window.out_width + x, exists if self.row_items == self.window.out_width else T.And(
            exists, x < self.window.out_width
        )

    def taps(self, buffers: dict[str, Buffer], word: Expr) -> RowTaps:
        """What a word of channels is multiplied by; words past the end repeat the last."""
        return load_row_taps(buffers, c.bind(T.min(word, self.window.pixel_words - 1)))

    def emit(self, buffers: dict[str, Buffer], taps: RowTaps, item: Expr) -> list[Expr]:
        """Two items' words; those past the end repeat the last, and are multiplied by zeros or not stored."""
        inside = c.bind(T.min(item, self.items - 2))
        image, y, x = split(inside, self.window.out_height, self.row_items)
        return _run(self.window, self.after_relu, buffers["x"], taps, (image, y, x), 2)


@dataclass(frozen=True)
class Depthwise:
    """A depthwise convolution alone. ``dot``: by dp4a, where the window allows."""

    dtype: str
    window: Window
    after_relu: bool
    dot: bool
    relu: bool = False  # float16 only; the clamp holds it for int8

    @property
    def symbol(self) -> str:
        kind = "dot" if self.by_dot else "taps"
        return (
            f"depthwise_{kind}_{self.dtype}_{self.window.name}"
            + "_after_relu" * self.after_relu
            + ("_relu" * self.relu)
        )

    @property
    def by_dot(self) -> bool:
        return self.dot and self.dtype == "int8" and fits_dot(self.window)

    @property
    def runs(self) -> int:
        """Threads for one word of channels."""
        w = self.window
        return w.batch * w.out_height * ceil_div(w.out_width, RUN) if self.by_dot else w.pixels

    @property
    def blocks(self) -> int:
        return ceil_div(self.runs * self.window.pixel_words, THREADS)

    @property
    def traffic_bytes(self) -> int:
        reads = 18 if self.by_dot else self.window.taps
        return (self.runs * reads + self.window.pixels) * self.window.pixel_bytes

    def parameters(self) -> list[Parameter]:
        w = self.window
        return [
            Parameter("x", "int32", w.words),
            *depthwise_parameters(self.dtype, w.pixel_words, 12 if self.by_dot else w.taps),
            Parameter("y", "int32", w.pixels * w.pixel_words),
        ]

    def build(self) -> tirx.PrimFunc:
        def body(thread: Thread, *buffers: Buffer) -> None:
            named = dict(zip((p.name for p in self.parameters()), buffers, strict=True))
            n = c.bind(thread.block * THREADS + thread.index)
            w = self.window
            with c.when(True if self.runs * w.pixel_words % THREADS == 0 else n < self.runs * w.pixel_words):
                run, word = split(n, w.pixel_words)
                if self.by_dot:
                    image, y, step = split(run, w.out_height, ceil_div(w.out_width, RUN))
                    self._write_run(named, (image, y, step * RUN), c.bind(word))
                else:
                    c.put(named["y"], n, _taps(self, named, run, c.bind(word)))

        return c.kernel(self.symbol, self.parameters(), self.blocks, THREADS, 0, body)

    def _write_run(self, buffers: dict[str, Buffer], at: tuple[Expr, Expr, Expr], word: Expr) -> None:
        w = self.window
        image, y, x = (c.bind(value) for value in at)
        results = _run(w, self.after_relu, buffers["x"], load_row_taps(buffers, word), (image, y, x), RUN)
        pixel = c.bind((image * w.out_height + y) * w.out_width + x)
        for i, result in enumerate(results):
            with c.when(True if w.out_width % RUN == 0 or i == 0 else x + i < w.out_width):
                c.put(buffers["y"], (pixel + i) * w.pixel_words + word, result)


def fits_dot(window: Window) -> bool:
    """Whether a window's rows can be dot products of four neighbouring pixels."""
    return window.kernel == (3, 3) and window.strides == (1, 1)


def depthwise_parameters(dtype: str, pixel_words: int, words: int) -> list[Parameter]:
    channels = pixel_words * c.WORD_LANES[dtype]
    return [
        Parameter("dw", "int32", pixel_words * words),
        Parameter("db", c.SUM[dtype], channels),
        *([Parameter("dm", "float32", channels), Parameter("dp", "int32", CONSTANTS)] if dtype == "int8" else []),
    ]


def pack_taps(weights: NDArray[np.generic], dtype: str, channels: int) -> NDArray[np.int32]:
    """(KH, KW, C) -> [tap][channel] as words, for windows that go tap by tap."""
    padded = np.zeros((weights.shape[0] * weights.shape[1], channels), dtype)
    padded[:, : weights.shape[2]] = weights.reshape(-1, weights.shape[2])
    return padded.reshape(-1).view(np.int32)


def pack_rows(weights: NDArray[np.generic], channels: int) -> NDArray[np.int32]:
    """(3, 3, C) -> for each word of channels: [row][channel] words (w0, w1, w2, 0)."""
    padded = np.zeros((channels, 3, 4), np.int8)
    padded[: weights.shape[2], :, :3] = weights.transpose(2, 0, 1)
    rows = padded.reshape(channels // 4, 4, 3, 4).swapaxes(1, 2)
    return np.ascontiguousarray(rows).reshape(-1).view(np.int32)


def load_row_taps(buffers: dict[str, Buffer], word: Expr) -> RowTaps:
    weights = c.registers(12)
    for i in range(3):
        c.do("load16", c.at(weights, i * 4), c.at(buffers["dw"], word * 12 + i * 4))
    bias = [c.bind(buffers["db"][word * 4 + i]) for i in range(4)]
    factors = [c.bind(buffers["dm"][word * 4 + i]) for i in range(4)]
    *clamp, padding = (c.bind(buffers["dp"][i]) for i in (LOW, HIGH, ZERO, PADDING))
    return RowTaps(word, weights, bias, factors, clamp, padding)


def _run(
    window: Window, after_relu: bool, source: Buffer, taps: RowTaps, at: tuple[Expr, Expr, Expr], outputs: int
) -> list[Expr]:
    """The words of ``outputs`` neighbouring pixels from ``at`` (image, row, column) on, one word of channels each."""
    image, y, x = at
    sums = c.registers(4 * outputs)
    for i in range(4):
        for output in range(outputs):
            c.put(sums, output * 4 + i, taps.bias[i])
    for row in range(3):
        in_y = c.bind(y + (row - window.padding[0]))
        pixels = []
        for column in range(outputs + 2):
            in_x = x + (column - window.padding[1])
            loaded = source[window.word(image, in_y, in_x, taps.word)]
            loaded = T.if_then_else(window.contains(in_y, in_x), loaded, taps.padding)
            pixels.append(c.bind(c.call("max4", loaded, taps.padding) if after_relu else loaded))
        for pair in range(outputs // 2):
            for i, channel in enumerate(_transpose(pixels[2 * pair : 2 * pair + 4])):
                first = c.bind(taps.weights[row * 4 + i])
                for output, multipliers in ((2 * pair, first), (2 * pair + 1, first << 8)):
                    n = output * 4 + i
                    c.put(sums, n, c.call("dot4", channel, multipliers, sums[n]))
    return [
        c.bind(c.call("pack4", *(c.call("scale", sums[o * 4 + i], taps.factors[i], *taps.clamp) for i in range(4))))
        for o in range(outputs)
    ]


def _transpose(words: list[Expr]) -> list[Expr]:
    """Four words of four bytes, the i-th of the results with the i-th byte of each."""
    first, last = words[:2], words[2:]
    low, low2 = (c.bind(c.call("perm", *pair, 0x5140)) for pair in (first, last))
    high, high2 = (c.bind(c.call("perm", *pair, 0x7362)) for pair in (first, last))
    pairs = ((low, low2), (high, high2))
    return [c.bind(c.call("perm", a, b, selector)) for a, b in pairs for selector in (0x5410, 0x7632)]


def _taps(shape: Depthwise, buffers: dict[str, Buffer], pixel: Expr, word: Expr) -> Expr:
    """One word of one pixel, tap by tap."""
    window, dtype = shape.window, shape.dtype
    lanes, kind = c.WORD_LANES[dtype], c.SUM[dtype]
    element = {"int8": "byte", "float16": "half"}[dtype]
    padding = c.bind(buffers["dp"][PADDING]) if dtype == "int8" else 0
    sums = c.registers(lanes, kind)
    for i in range(lanes):
        c.put(sums, i, buffers["db"][word * lanes + i])
    image, top, left = (c.bind(value) for value in window.origin(pixel))
    for row in range(window.kernel[0]):
        for column in range(window.kernel[1]):
            y, x = top + row, left + column
            loaded = T.if_then_else(window.contains(y, x), buffers["x"][window.word(image, y, x, word)], padding)
            if shape.after_relu:
                loaded = c.call({"int8": "max4", "float16": "max2"}[dtype], loaded, padding)
            loaded = c.bind(loaded)
            taps = c.bind(buffers["dw"][(row * window.kernel[1] + column) * window.pixel_words + word])
            for i in range(lanes):
                product = c.call(element, loaded, i, dtype=kind) * c.call(element, taps, i, dtype=kind)
                c.put(sums, i, sums[i] + product)
    if dtype == "float16":
        return c.call("pack2", *(T.max(sums[i], T.float32(0)) if shape.relu else sums[i] for i in range(lanes)))
    clamp = [c.bind(buffers["dp"][i]) for i in (LOW, HIGH, ZERO)]
    return c.call("pack4", *(c.call("scale", sums[i], buffers["dm"][word * 4 + i], *clamp) for i in range(4)))
