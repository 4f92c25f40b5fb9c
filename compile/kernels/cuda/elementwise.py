"""All on NVIDIA GPUs that is no convolution: sums, maps, pools, means, vectors by matrices, changes of layout."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import tir as c
from .epilogue import add_halves, add_words
from .tir import Buffer, Expr, Grid, Parameter, Thread, ceil_div
from .window import WindowLayout, split

THREADS = 128


def each(symbol: str, parameters: list[Parameter], count: int, body: Callable[..., None]) -> tirx.PrimFunc:
    """``body(n, *buffers)`` for n in ``count``, one a thread."""

    def emit(thread: Thread, *buffers: Buffer) -> None:
        n = c.bind(thread.block * THREADS + thread.index)
        with c.when(True if count % THREADS == 0 else n < count):
            body(n, *buffers)

    return c.kernel(symbol, parameters, grid_of(count), emit)


def grid_of(count: int) -> Grid:
    """For ``count`` threads."""
    return Grid(ceil_div(count, THREADS), THREADS)


@dataclass(frozen=True)
class Add:
    """The contract's addition of two tensors of ``words``. Operands: a, b, and for int8 its six constants."""

    dtype: str
    words: int
    relu: bool  # float16 only; the clamp holds it for int8

    @property
    def symbol(self) -> str:
        return f"add_{self.dtype}_{self.words}" + "_relu" * self.relu

    @property
    def threads(self) -> int:
        return self.words // 4

    @property
    def grid(self) -> Grid:
        return grid_of(self.threads)

    @property
    def traffic_bytes(self) -> int:
        return self.words * 12

    def build(self) -> tirx.PrimFunc:
        constants = [Parameter("p", "int32", 6)] if self.dtype == "int8" else []
        parameters = [
            Parameter("a", "int32", self.words),
            Parameter("b", "int32", self.words),
            *constants,
            Parameter("y", "int32", self.words),
        ]

        def body(n: Expr, *buffers: Buffer) -> None:
            a, b = c.registers(4), c.registers(4)
            c.do("load16", c.at(a, 0), c.at(buffers[0], n * 4))
            c.do("load16", c.at(b, 0), c.at(buffers[1], n * 4))
            for i in range(4):
                c.put(a, i, add_words(a[i], b[i], buffers[2], 0) if constants else add_halves(a[i], b[i], self.relu))
            c.do("store16", c.at(buffers[-1], n * 4), c.at(a, 0))

        return each(self.symbol, parameters, self.threads, body)


@dataclass(frozen=True)
class Map:
    """The ReLU alone. int8: y = ((x k + bias) >> 8) + zero in [-128, 127] with k = 256. Operands: x, and for int8
    (k, bias, zero)."""

    dtype: str
    words: int

    @property
    def symbol(self) -> str:
        return f"map_{self.dtype}_{self.words}"

    @property
    def threads(self) -> int:
        return self.words // 4

    @property
    def grid(self) -> Grid:
        return grid_of(self.threads)

    @property
    def traffic_bytes(self) -> int:
        return self.words * 8

    def build(self) -> tirx.PrimFunc:
        constants = [Parameter("p", "int32", 3)] if self.dtype == "int8" else []
        parameters = [Parameter("x", "int32", self.words), *constants, Parameter("y", "int32", self.words)]

        def body(n: Expr, *buffers: Buffer) -> None:
            x = c.registers(4)
            c.do("load16", c.at(x, 0), c.at(buffers[0], n * 4))
            for i in range(4):
                if not constants:
                    c.put(x, i, c.call("relu2", x[i]))
                    continue
                k, bias, zero = (buffers[1][j] for j in range(3))
                values = [((c.call("byte", x[i], j) * k + bias) >> 8) + zero for j in range(4)]
                c.put(x, i, c.call("pack4_nearest", *values))
            c.do("store16", c.at(buffers[-1], n * 4), c.at(x, 0))

        return each(self.symbol, parameters, self.threads, body)


@dataclass(frozen=True)
class Lookup:
    """A function of each int8: y = table[x as an unsigned byte]. Operands: x, the table's 256 bytes."""

    words: int

    @property
    def symbol(self) -> str:
        return f"lookup_{self.words}"

    @property
    def threads(self) -> int:
        return self.words // 4

    @property
    def grid(self) -> Grid:
        return grid_of(self.threads)

    @property
    def traffic_bytes(self) -> int:
        return self.words * 8

    def build(self) -> tirx.PrimFunc:
        parameters = [
            Parameter("x", "int32", self.words),
            Parameter("t", "int32", 64),
            Parameter("y", "int32", self.words),
        ]

        def looked_up(table: Buffer, word: Expr, byte: int) -> Expr:
            index = c.bind(T.bitwise_and(T.shift_right(word, 8 * byte), 255))
            entry = T.shift_right(table[T.shift_right(index, 2)], T.bitwise_and(index, 3) * 8)
            return T.shift_left(T.bitwise_and(entry, 255), 8 * byte)

        def body(n: Expr, *buffers: Buffer) -> None:
            x = c.registers(4)
            c.do("load16", c.at(x, 0), c.at(buffers[0], n * 4))
            for i in range(4):
                a, b, d, e = (c.bind(looked_up(buffers[1], x[i], byte)) for byte in range(4))
                c.put(x, i, T.bitwise_or(T.bitwise_or(a, b), T.bitwise_or(d, e)))
            c.do("store16", c.at(buffers[-1], n * 4), c.at(x, 0))

        return each(self.symbol, parameters, self.threads, body)


@dataclass(frozen=True)
class MaxPool:
    """Operand: x. What lies outside stands for the nearest pixel: that is in the window too, and changes no maximum."""

    dtype: str
    window: WindowLayout

    @property
    def symbol(self) -> str:
        return f"maxpool_{self.dtype}_{self.window.name}"

    @property
    def threads(self) -> int:
        return self.window.pixels * self.window.pixel_words // 4

    @property
    def grid(self) -> Grid:
        return grid_of(self.threads)

    @property
    def traffic_bytes(self) -> int:
        return self.threads * 16 * (self.window.taps + 1)

    def build(self) -> tirx.PrimFunc:
        window = self.window
        largest = {"int8": "max4", "float16": "max2"}[self.dtype]

        def body(n: Expr, x: Buffer, y: Buffer) -> None:
            pixel, chunk = (c.bind(part) for part in split(n, window.pixel_words // 4))
            image, top, left = (c.bind(part) for part in window.origin(pixel))
            rows = [c.bind(window.nearest_row(top + i)) for i in range(window.kernel[0])]
            columns = [c.bind(window.nearest_column(left + i)) for i in range(window.kernel[1])]
            best, tap = c.registers(4), c.registers(4)
            for i, (row, column) in enumerate(itertools.product(rows, columns)):
                c.do("load16", c.at(tap if i else best, 0), c.at(x, window.word(image, row, column, chunk * 4)))
                for j in range(4 if i else 0):
                    c.put(best, j, c.call(largest, best[j], tap[j]))
            c.do("store16", c.at(y, n * 4), c.at(best, 0))

        words = self.window.pixels * self.window.pixel_words
        parameters = [Parameter("x", "int32", window.words), Parameter("y", "int32", words)]
        return each(self.symbol, parameters, self.threads, body)


@dataclass(frozen=True)
class Mean:
    """Over the ``pixels`` of each of ``batch`` images. Operands: x, and for int8 the multiplier and (sum of the zero
    points, low, high, zero). Eight warps share a block's 32 words of channels."""

    dtype: str
    batch: int
    pixels: int
    pixel_words: int

    PHASES = 8

    @property
    def symbol(self) -> str:
        return f"mean_{self.dtype}_{self.batch}x{self.pixels}x{self.pixel_words}"

    @property
    def grid(self) -> Grid:
        threads = 32 * self.PHASES
        shared_bytes = threads * 4 * c.WORD_LANES[self.dtype]
        return Grid(self.batch * ceil_div(self.pixel_words, 32), threads, shared_bytes)

    @property
    def traffic_bytes(self) -> int:
        return self.batch * (self.pixels + 1) * self.pixel_words * 4

    def build(self) -> tirx.PrimFunc:
        constants = [Parameter("m", "float32", 1), Parameter("p", "int32", 4)] if self.dtype == "int8" else []
        parameters = [
            Parameter("x", "int32", self.batch * self.pixels * self.pixel_words),
            *constants,
            Parameter("y", "int32", self.batch * self.pixel_words),
        ]
        return c.kernel(self.symbol, parameters, self.grid, self._body)

    def _body(self, thread: Thread, x: Buffer, *others: Buffer) -> None:
        lanes, kind = c.WORD_LANES[self.dtype], c.SUM[self.dtype]
        element = {"int8": "byte", "float16": "half"}[self.dtype]
        load = {"int8": "load4", "float16": "load_float"}[self.dtype]
        store = {"int8": "store4", "float16": "store_float"}[self.dtype]
        sums = c.registers(lanes, kind)
        for i in range(lanes):
            c.put(sums, i, T.cast(0, kind))
        phase = c.bind(thread.index // 32)
        image, part = (c.bind(n) for n in split(thread.block, ceil_div(self.pixel_words, 32)))
        word = c.bind(part * 32 + thread.index % 32)
        inside = True if self.pixel_words % 32 == 0 else word < self.pixel_words

        def accumulate(turn: Expr) -> None:
            pixel = turn * self.PHASES + phase
            with c.when(c.both(True if self.pixels % self.PHASES == 0 else pixel < self.pixels, inside)):
                loaded = c.bind(x[(image * self.pixels + pixel) * self.pixel_words + word])
                for i in range(lanes):
                    c.put(sums, i, sums[i] + c.call(element, loaded, i, dtype=kind))

        c.repeat(ceil_div(self.pixels, self.PHASES), 4, accumulate)
        for i in range(lanes):
            c.do(store, c.at(thread.shared, (thread.index * lanes + i) * 4), sums[i])
        c.do("sync")
        with c.when(c.both(phase == 0, inside)):
            for i in range(lanes):
                for other in range(1, self.PHASES):
                    at = c.at(thread.shared, ((thread.index + other * 32) * lanes + i) * 4)
                    c.put(sums, i, sums[i] + c.call(load, at, dtype=kind))
            c.put(others[-1], image * self.pixel_words + word, self._finish(sums, lanes, *others))

    def _finish(self, sums: Buffer, lanes: int, *others: Buffer) -> Expr:
        if self.dtype == "float16":
            return c.call("pack2", *(sums[i] * T.float32(1 / self.pixels) for i in range(lanes)))
        m, p = others[0], others[1]
        values = [c.call("scale", sums[i] - p[0], m[0], p[1], p[2], p[3]) for i in range(lanes)]
        return c.call("pack4", *values)


@dataclass(frozen=True)
class MatVec:
    """``rows`` vectors by a matrix, a warp for each output: for few rows, where every weight is read once a row.

    Operands: x, weights (channels, k), biases, for int8 multipliers and (low, high, zero).
    """

    dtype: str
    rows: int
    k_bytes: int
    channels: int
    relu: bool  # float16 only

    @property
    def symbol(self) -> str:
        return f"matvec_{self.dtype}_{self.rows}x{self.k_bytes}x{self.channels}" + "_relu" * self.relu

    @property
    def grid(self) -> Grid:
        return Grid(self.rows * ceil_div(self.channels, THREADS // 32), THREADS)

    @property
    def traffic_bytes(self) -> int:
        return self.rows * self.channels * self.k_bytes * 2

    def build(self) -> tirx.PrimFunc:
        constants = (
            [Parameter("m", "float32", self.channels), Parameter("p", "int32", 3)] if self.dtype == "int8" else []
        )
        outputs = "int8" if self.dtype == "int8" else "int16"
        parameters = [
            Parameter("x", "int32", self.rows * self.k_bytes // 4),
            Parameter("w", "int32", self.channels * self.k_bytes // 4),
            Parameter("bias", c.SUM[self.dtype], self.channels),
            *constants,
            Parameter("y", outputs, self.rows * self.channels),
        ]
        return c.kernel(self.symbol, parameters, self.grid, self._body)

    def _body(self, thread: Thread, x: Buffer, w: Buffer, bias: Buffer, *others: Buffer) -> None:
        kind = c.SUM[self.dtype]
        dot = {"int8": "dot4", "float16": "dot2_f16"}[self.dtype]
        lane = thread.index % 32
        row, part = (c.bind(n) for n in split(thread.block, ceil_div(self.channels, THREADS // 32)))
        channel = c.bind(part * (THREADS // 32) + thread.index // 32)
        chunks = self.k_bytes // 16
        total = c.registers(1, kind)
        a, b = c.registers(4), c.registers(4)
        c.put(total, 0, T.cast(0, kind))

        def accumulate(turn: Expr) -> None:
            chunk = turn * 32 + lane
            with c.when(True if chunks % 32 == 0 else chunk < chunks):
                c.do("load16", c.at(a, 0), c.at(x, row * (self.k_bytes // 4) + chunk * 4))
                c.do("load16", c.at(b, 0), c.at(w, channel * (self.k_bytes // 4) + chunk * 4))
                for i in range(4):
                    c.put(total, 0, c.call(dot, a[i], b[i], total[0], dtype=kind))

        c.repeat(ceil_div(chunks, 32), 4, accumulate)
        suffix = {"int8": "s32", "float16": "f32"}[self.dtype]
        value = c.bind(c.call(f"sum_warp_{suffix}", total[0], dtype=kind) + bias[channel])
        with c.when(lane == 0):
            at = row * self.channels + channel
            if self.dtype == "int8":
                m, p, y = others
                c.put(y, at, T.cast(c.call("scale", value, m[channel], p[0], p[1], p[2]), "int8"))
            else:
                value = T.max(value, T.float32(0)) if self.relu else value
                c.put(others[0], at, T.cast(c.call("float_to_half", value), "int16"))


def _either(condition: Expr | bool, value: Callable[[], Expr], other: Expr) -> Expr:
    """``value`` where the condition holds; one that is a Python bool is decided here."""
    if isinstance(condition, bool):
        return value() if condition else other
    return T.if_then_else(condition, value(), other)


@dataclass(frozen=True)
class Patches:
    """The pixels under every window side by side: [output pixel][tap][channel], in rows of ``row_bytes``; with a window
    of one pixel a plain tensor as it is stored. What lies outside, and beyond the last tap, is the input's zero.

    ``source`` is ``int8`` or ``float16``, or ``pixels``: int8 that are read as float16. ``channels`` are those that
    count, ``stride`` the elements from pixel to pixel. Operands: x, its zero point and, for ``pixels``, its scale.
    """

    dtype: str
    source: str
    window: WindowLayout
    channels: int
    stride: int
    row_bytes: int

    @property
    def symbol(self) -> str:
        layout = f"c{self.channels}of{self.stride}_row{self.row_bytes}"
        return f"patches_{self.source}_{self.dtype}_{self.window.name}_{layout}"

    @property
    def whole_rows(self) -> bool:
        """Whether a thread makes a row, and so knows every element's place in the window, or a word."""
        return self.row_bytes <= 64 and self.window.taps > 1

    @property
    def words(self) -> int:
        return self.row_bytes // 4 if self.whole_rows else 1

    @property
    def threads(self) -> int:
        return self.window.pixels * self.row_bytes // 4 // self.words

    @property
    def grid(self) -> Grid:
        return grid_of(self.threads)

    @property
    def traffic_bytes(self) -> int:
        return self.window.pixels * (self.row_bytes + self.window.taps * self.channels)

    def build(self) -> tirx.PrimFunc:
        window = self.window
        lanes = c.WORD_LANES[self.dtype]
        count = window.batch * window.in_height * window.in_width * self.stride

        def element(x: Buffer, p: Buffer, scale: Buffer | None, image: Expr, top: Expr, left: Expr, k: Expr) -> Expr:
            tap, channel = split(k, self.channels)
            row, column = split(tap, window.kernel[1])
            y, z = c.bind(top + row * window.dilation[0]), c.bind(left + column * window.dilation[1])
            inside = c.both(window.contains(y, z) if window.overlaps else True, k < window.taps * self.channels)
            at = ((image * window.in_height + y) * window.in_width + z) * self.stride + channel
            if self.source == "int8":
                return _either(inside, lambda: T.cast(x[at], "int32"), p[0])
            if scale is not None:
                return _either(
                    inside, lambda: T.cast(T.cast(x[at], "int32") - p[0], "float32") * scale[0], T.float32(0)
                )
            return _either(
                inside, lambda: c.call("half_to_float", T.cast(x[at], "int32"), dtype="float32"), T.float32(0)
            )

        def body(n: Expr, x: Buffer, p: Buffer, *others: Buffer) -> None:
            scale, y = others if len(others) == 2 else (None, others[0])
            pixel, word = (n, 0) if self.whole_rows else (c.bind(part) for part in split(n, self.row_bytes // 4))
            image, top, left = (c.bind(part) for part in window.origin(pixel))
            for first in range(0, self.words, 4):
                some = c.registers(min(self.words, 4))
                for w in range(min(self.words, 4)):
                    start = (word + first + w) * lanes
                    values = [element(x, p, scale, image, top, left, start + i) for i in range(lanes)]
                    c.put(some, w, c.call({"int8": "pack4", "float16": "pack2"}[self.dtype], *values))
                c.store_words(some, min(self.words, 4), y, n * self.words + first)

        parameters = [
            Parameter("x", "int16" if self.source == "float16" else "int8", count),
            Parameter("p", "int32", 1),
            *([Parameter("scale", "float32", 1)] if self.source == "pixels" else []),
            Parameter("y", "int32", self.threads),
        ]
        return each(self.symbol, parameters, self.threads, body)


@dataclass(frozen=True)
class Export:
    """A stored tensor as the network's output: plain NHWC, int8 or, from float16, float32. Operand: x."""

    dtype: str
    pixels: int
    channels: int
    stride: int

    @property
    def symbol(self) -> str:
        return f"export_{self.dtype}_{self.pixels}x{self.channels}of{self.stride}"

    @property
    def threads(self) -> int:
        return self.pixels * self.channels

    @property
    def grid(self) -> Grid:
        return grid_of(self.threads)

    @property
    def traffic_bytes(self) -> int:
        return self.threads * (2 if self.dtype == "int8" else 6)

    def build(self) -> tirx.PrimFunc:
        source, target = {"int8": ("int8", "int8"), "float16": ("int16", "float32")}[self.dtype]

        def body(n: Expr, x: Buffer, y: Buffer) -> None:
            pixel, channel = split(n, self.channels)
            value = x[pixel * self.stride + channel]
            if self.dtype == "float16":
                value = c.call("half_to_float", T.cast(value, "int32"), dtype="float32")
            c.put(y, n, value)

        parameters = [Parameter("x", source, self.pixels * self.stride), Parameter("y", target, self.threads)]
        return each(self.symbol, parameters, self.threads, body)
