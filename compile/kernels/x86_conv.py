"""Convolutions on x86-64: a register-blocked matrix product fed by a small buffer of rows made on the spot.

A task owns a run of output pixels. It first fills its rows of the left-hand matrix (``Gather``: the input values under
each window; ``Depthwise``: a whole 3x3 depthwise convolution, which in Xception always precedes a pointwise one), then
multiplies them with all weights. The rows stay in the nearest caches and are never written to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import x86_vector as v
from .x86_vector import Buffer, Expr, Isa, Parameter

# Indices of the words of ``parameters``, a kernel's scalars.
OUT_ZERO, OUT_LOW, PADDING, ROW_ZERO, ROW_LOW, RELU_ZERO, ALWAYS_ZERO = range(7)
PARAMETERS = 10  # from ALWAYS_ZERO on all are 0

TURN = 4  # steps of a product's inner loop that are written out


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def stored_channels(channels: int) -> int:
    """Elements from one pixel to the next: whole cache lines, so that no vector has a tail. The rest is arbitrary."""
    return ceil_div(channels, 64) * 64


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


@dataclass(frozen=True)
class Depthwise:
    """Rows are the outputs of a 3x3 depthwise convolution at stride 1 with a padding of one pixel.

    ``relu``: a ReLU is applied to what is read. ``bounded``: see ``round_scaled``.

    A padded column is one constant vector. A padded row is read from inside the image and multiplied by zero: the
    weights come in variants (0: inner rows, 1: first, 2: last; one if there is only one row), each with its bias.
    """

    height: int
    width: int
    channels: int
    relu: bool
    bounded: bool

    @property
    def symbol(self) -> str:
        flags = ("_relu" if self.relu else "") + ("" if self.bounded else "_wide")
        return f"dw3x3_{self.height}x{self.width}x{self.channels}{flags}"

    @property
    def variants(self) -> int:
        return 3 if self.height > 1 else 1

    def chunks(self, isa: Isa) -> int:
        return ceil_div(self.channels, isa.bytes)

    def k_position(self, isa: Isa) -> NDArray[np.int64]:
        """Shape (1, 1, C): where each channel stands in a row."""
        c = np.arange(self.channels)
        if isa.vnni:
            return c.reshape(1, 1, -1)
        chunk, lane, half, rest = c // isa.bytes, c % isa.bytes // 16, c % 16 // 8, c % 8
        return (chunk * isa.bytes + half * (isa.bytes // 2) + lane * 8 + rest).reshape(1, 1, -1)

    def emit(
        self, isa: Isa, buffers: dict[str, Buffer], first: Expr, last: Expr, rows: Buffer, stride: int, origin: Expr
    ) -> None:
        """Fills rows[(p - first + origin) * stride ...] for the pixels first <= p < last."""

        def write(pixel: Expr, chunk: Expr, u: Expr) -> None:
            offset = (pixel - first + origin) * stride + chunk * isa.bytes
            if isa.vnni:
                v.store(rows, offset, u, isa.bytes)
                return
            half, zero = isa.bytes // 2, v.splat(0, "uint8", isa.bytes)
            for i in range(2):
                wide = v.reinterpret(v.unpack(isa, u, zero, 8, bool(i)), f"int16x{half}")
                v.store(rows, offset + half * i, wide, half)

        self.emit_pixels(isa, buffers, first, last, write)

    def emit_pixels(
        self,
        isa: Isa,
        buffers: dict[str, Buffer],
        first: Expr,
        last: Expr,
        write: Callable[[Expr, Expr, Expr], None],
    ) -> None:
        """``write(pixel, chunk, u)`` receives every vector of outputs."""
        height, width, pixel = self.height, self.width, stored_channels(self.channels)
        x, parameters = buffers["x"], buffers["parameters"]
        clamp = v.load_clamp(isa, parameters, ROW_ZERO)
        outside = T.Bind(v.reinterpret(T.broadcast(parameters[PADDING], isa.words), f"uint8x{isa.bytes}"))
        below = T.Bind(v.splat(T.cast(parameters[RELU_ZERO], "uint8"), "uint8", isa.bytes)) if self.relu else None
        row_width = T.int32(width)
        y_first, y_last = tirx.truncdiv(first, row_width), tirx.truncdiv(last - 1, row_width)
        with T.serial(y_first, y_last + 1) as y:
            begin = T.Bind(T.max(first - y * width, 0))
            end = T.Bind(T.min(last - y * width, width))
            base = [
                T.Bind(T.max(y - 1, 0) * (width * pixel)),
                T.Bind(y * (width * pixel)),
                T.Bind(T.min(y + 1, height - 1) * (width * pixel)),
            ]
            variant: Expr | int = 0
            if height > 1:
                variant = T.Bind(tirx.Select(y == 0, 1, tirx.Select(y == height - 1, 2, 0)))
            with T.serial(0, self.chunks(isa)) as chunk:

                def column(at: Expr) -> list[Expr]:
                    vectors = []
                    for row in base:
                        u = v.load(x, row + at * pixel + chunk * isa.bytes, isa.bytes)
                        if below is not None:
                            u = v.intrinsic(f"uint8x{isa.bytes}", "llvm.usub.sat", u, below)
                        vectors.append(T.Bind(u))
                    return _operands(isa, v.interleave(isa, vectors))

                def write_pixel(at: Expr, acc: Buffer) -> None:
                    scales = [v.load(buffers["row_m"], (chunk * 4 + j) * isa.words, isa.words) for j in range(4)]
                    words = [v.round_scaled(isa, acc[j], scales[j], self.bounded) for j in range(4)]
                    write(y * width + at, chunk, v.pack(isa, words, clamp))

                self._slide(isa, buffers, variant, chunk, begin, end, outside, column, write_pixel)

    def _slide(
        self,
        isa: Isa,
        buffers: dict[str, Buffer],
        variant: Expr | int,
        chunk: Expr,
        begin: Expr,
        end: Expr,
        outside: Expr,
        column: Callable[[Expr], list[Expr]],
        write_pixel: Callable[[Expr, Buffer], None],
    ) -> None:
        """Walks over the columns; each is interleaved once and enters the three outputs it lies under."""
        chunks = self.chunks(isa)
        weight_base = (variant * chunks + chunk) * (12 * isa.bytes)
        bias_base = (variant * chunks + chunk) * isa.bytes
        words = f"int32x{isa.words}"
        elements, per_word = isa.operand_elements, isa.bytes // isa.operand_elements

        def weight(i: int, j: int, h: int) -> Expr:
            return T.Bind(v.load(buffers["row_w"], weight_base + ((i * 4 + j) * per_word + h) * elements, elements))

        taps = [[[weight(i, j, h) for h in range(per_word)] for j in range(4)] for i in range(3)]
        bias = [v.load(buffers["row_b"], bias_base + j * isa.words, isa.words) for j in range(4)]
        # Sums of the pixel before the column at hand, of the one at it and of the one after it.
        sums = [T.alloc_buffer((4,), words, scope="global") for _ in range(3)]
        edge = T.alloc_buffer((4 * per_word,), f"{isa.operand}x{elements}", scope="global")

        def tap(acc: Expr, operands: list[Expr], i: int, j: int) -> Expr:
            for h in range(per_word):
                acc = v.dot(isa, acc, operands[j * per_word + h], taps[i][j][h])
            return acc

        def at_edge(condition: Expr, at: Expr) -> list[Expr]:
            with T.If(condition):
                with T.Then():
                    for i, operand in enumerate(column(at)):
                        T.buffer_store(edge, operand, [i])
                with T.Else():
                    for i, operand in enumerate(_operands(isa, [outside] * 4)):
                        T.buffer_store(edge, operand, [i])
            return [T.Bind(edge[i]) for i in range(4 * per_word)]

        def step(at: Expr, before: Buffer, here: Buffer, after: Buffer) -> None:
            operands = column(at)
            for j in range(4):
                T.buffer_store(before, tap(before[j], operands, 2, j), [j])
            write_pixel(at - 1, before)
            for j in range(4):
                T.buffer_store(here, tap(here[j], operands, 1, j), [j])
                T.buffer_store(after, tap(bias[j], operands, 0, j), [j])

        first = at_edge(begin > 0, begin - 1)
        second = column(begin)
        for j in range(4):
            T.buffer_store(sums[0], tap(tap(bias[j], first, 0, j), second, 1, j), [j])
            T.buffer_store(sums[1], tap(bias[j], second, 0, j), [j])
        # Three columns a turn, so that the roles of the sums change without a copy.
        turns = T.Bind(tirx.truncdiv(end - begin - 1, T.int32(3)))
        with T.serial(0, turns) as turn:
            for i in range(3):
                step(begin + 1 + turn * 3 + i, sums[i], sums[(i + 1) % 3], sums[(i + 2) % 3])
        with T.serial(begin + 1 + turns * 3, end) as at:
            step(at, sums[0], sums[1], sums[2])
            for j in range(4):
                T.buffer_store(sums[0], sums[1][j], [j])
                T.buffer_store(sums[1], sums[2][j], [j])
        final = at_edge(end < self.width, end)
        for j in range(4):
            T.buffer_store(sums[0], tap(sums[0][j], final, 2, j), [j])
        write_pixel(end - 1, sums[0])


def _operands(isa: Isa, words: list[Expr]) -> list[Expr]:
    """Vectors of (row 0, row 1, row 2, 0) bytes as the dot product takes them; for int16 (row 0, row 2), (row 1, 0)."""
    if isa.vnni:
        return words
    half = isa.bytes // 2
    result = []
    for word in words:
        pairs = v.reinterpret(word, f"uint16x{half}")
        for value in (pairs & v.splat(0xFF, "uint16", half), pairs >> v.splat(8, "uint16", half)):
            result.append(T.Bind(v.reinterpret(value, f"int16x{half}")))
    return result


Producer = Gather | Depthwise


@dataclass(frozen=True)
class Convolution:
    """``pixels`` outputs of ``channels`` from rows of ``k`` values, ``pixels_per_task`` at a time."""

    isa: Isa
    producer: Producer
    pixels: int
    k: int
    channels: int
    pixels_per_task: int
    bounded: bool

    @property
    def symbol(self) -> str:
        wide = "" if self.bounded else "_wide"
        name = "conv" if isinstance(self.producer, Gather) else "separable"
        return f"{name}_{self.isa.name}_{self.producer.symbol}_to{self.channels}_b{self.pixels_per_task}{wide}"

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    @property
    def output_count(self) -> int:
        return self.pixels * stored_channels(self.channels)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, [depthwise weights, biases, multipliers], weights, biases, multipliers, parameters, y."""
        isa, producer = self.isa, self.producer
        steps, stride = ceil_div(self.k, isa.group), row_stride(self.k)
        out_stride = stored_channels(self.channels)
        operands = [
            Parameter("x", *input_operand(producer)),
            *depthwise_operands(isa, producer),
            *product_operands(isa, self.k, self.channels),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", "uint8", self.output_count),
        ]

        def body(*values: Buffer) -> Callable[[Expr], None]:
            buffers = {p.name: value for p, value in zip(operands, values, strict=True)}
            clamp = v.load_clamp(isa, buffers["parameters"], OUT_ZERO)
            rows = T.alloc_buffer((self.pixels_per_task * stride,), isa.operand, scope="global", align=64)

            aliases = load_aliases(isa, buffers["parameters"])
            matrix = Matrix(buffers["w"], buffers["b"], buffers["m"], steps, self.bounded, clamp, aliases)

            def multiply(first: Expr, height: int) -> None:
                column = 0
                for count, vectors in panels(isa, self.channels):
                    width = vectors * isa.words
                    with T.serial(0, count) as p:
                        at = T.Bind(column + p * width)
                        output = Output(buffers["y"], first * out_stride + at, out_stride, width)
                        emit_panel(isa, matrix, rows, stride, height, at, vectors, output)
                    column += count * width

            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                last = T.Bind(T.min(first + self.pixels_per_task, self.pixels))
                producer.emit(isa, buffers, first, last, rows, stride, T.int32(0))
                rest = self.pixels % self.pixels_per_task
                if not rest:
                    multiply(first, self.pixels_per_task)
                    return
                with T.If(t < self.tasks - 1):
                    with T.Then():
                        multiply(first, self.pixels_per_task)
                    with T.Else():
                        multiply(first, rest)

            return task

        return v.kernel(self.symbol, operands, body)


def row_blocks(pixels: int, largest: int) -> list[tuple[int, int]]:
    """(count, rows): ``pixels`` rows in as few blocks as possible, as even as possible."""
    blocks = ceil_div(pixels, largest)
    small, more = divmod(pixels, blocks)
    return [(n, rows) for n, rows in ((more, small + 1), (blocks - more, small)) if n]


def panels(isa: Isa, channels: int) -> list[tuple[int, int]]:
    """(count, vectors): output channels in panels of four vectors, then the rest."""
    full, rest = divmod(ceil_div(channels, isa.words), 4)
    return [(n, vectors) for n, vectors in ((full, 4), (1, rest)) if n and vectors]


def panel_starts(isa: Isa, channels: int) -> list[tuple[int, int]]:
    """(first channel, vectors) of every panel."""
    starts, first = [], 0
    for count, vectors in panels(isa, channels):
        for _ in range(count):
            starts.append((first, vectors))
            first += vectors * isa.words
    return starts


def largest_block(isa: Isa) -> int:
    """Rows of a register block that is four vectors wide."""
    return 6 if isa.lanes == 4 else 3


@dataclass(frozen=True, eq=False)
class Matrix:
    """The right-hand side of a product: ``steps`` groups of ``k`` deep, packed in panels, with what follows it.

    ``aliases`` are offsets, all zero but unknown to the compiler, one for each row of a block where the rows shall
    read the weights from memory one by one: an instruction's operand in memory costs nothing, where one kept in a
    register for all rows costs a load, and with AVX2's 16 registers a spill.
    """

    weights: Buffer
    bias: Buffer
    multiplier: Buffer
    steps: int
    bounded: bool
    clamp: v.Clamp
    aliases: tuple[Expr, ...]


@dataclass(frozen=True, eq=False)
class Output:
    """Where a panel's outputs go: row i's ``width`` elements at ``start + i * stride`` of ``buffer``."""

    buffer: Buffer
    start: Expr
    stride: int
    width: int

    def expect(self, row: Expr) -> None:
        """Fetches a row's cache line for writing: a store that misses the caches would hold up those behind it."""
        v.prefetch(self.buffer, self.start + row * self.stride, write=True)

    def write(self, row: Expr, u: Expr) -> None:
        v.store(self.buffer, self.start + row * self.stride, u, self.width)


def load_aliases(isa: Isa, parameters: Buffer) -> tuple[Expr, ...]:
    """See ``Matrix``."""
    return () if isa.vnni else tuple(T.Bind(parameters[ALWAYS_ZERO + i]) for i in range(largest_block(isa)))


def emit_panel(
    isa: Isa,
    matrix: Matrix,
    left: Buffer,
    left_stride: int,
    height: int,
    column: Expr,
    vectors: int,
    output: Output,
) -> None:
    """All ``height`` rows of ``left`` by one panel of columns.

    Meanwhile the weights of the next panel are fetched, a share with every block: they come from the outer caches or
    from memory, and in an order that the processor foresees only within a page.
    """
    panel = T.Bind(column * (matrix.steps * isa.group))
    elements = vectors * isa.operand_elements
    line = 64 // np.dtype(isa.weight).itemsize
    blocks = sum(count for count, _ in row_blocks(height, largest_block(isa)))
    share = ceil_div(TURN * elements, blocks * line) * line
    row, done = 0, 0
    for count, rows in row_blocks(height, largest_block(isa)):
        with T.serial(0, count) as block:
            top = T.Bind(row + block * rows)
            ahead = T.Bind(panel + matrix.steps * elements + (done + block) * (matrix.steps // TURN * share))
            emit_block(
                isa,
                matrix,
                left,
                [((top + i) * left_stride, top + i) for i in range(rows)],
                panel,
                column,
                vectors,
                (ahead, share, line),
                output,
            )
        row += count * rows
        done += count


def emit_block(
    isa: Isa,
    matrix: Matrix,
    left: Buffer,
    rows: list[tuple[Expr, Expr]],
    panel: Expr,
    column: Expr,
    vectors: int,
    fetch: tuple[Expr, int, int],
    output: Output,
) -> None:
    """A register block: len(rows) x vectors accumulators, started from the bias.

    ``rows`` are offsets into ``left`` and numbers of the output's rows; ``fetch`` is where to fetch ahead, elements a
    turn and elements a cache line.
    """
    elements = isa.operand_elements
    acc = [T.alloc_buffer((vectors,), f"int32x{isa.words}", scope="global") for _ in rows]
    for j in range(vectors):
        start = T.Bind(v.load(matrix.bias, column + j * isa.words, isa.words))
        for sums in acc:
            T.buffer_store(sums, start, [j])
    for _, number in rows:
        output.expect(number)
    ahead, share, line = fetch

    def step(k: Expr | int) -> None:
        loaded: dict[int, Expr] = {}

        def weight(i: int, j: int) -> Expr:
            offset = panel + (k * vectors + j) * elements
            if matrix.aliases:
                return v.load(matrix.weights, offset + matrix.aliases[i], elements)
            if j not in loaded:
                loaded[j] = T.Bind(v.load(matrix.weights, offset, elements))
            return loaded[j]

        for i, (sums, (row, _)) in enumerate(zip(acc, rows, strict=True)):
            a = v.broadcast_group(isa, left, row + k * isa.group)
            for j in range(vectors):
                T.buffer_store(sums, v.dot(isa, sums[j], a, weight(i, j)), [j])

    turns, rest = divmod(matrix.steps, TURN)
    with T.serial(0, turns) as turn:
        for offset in range(0, share, line):
            v.prefetch(matrix.weights, ahead + turn * share + offset)
        for k in range(TURN):
            step(turn * TURN + k)
    for k in range(rest):
        step(turns * TURN + k)
    for sums, (_, number) in zip(acc, rows, strict=True):
        scales = [v.load(matrix.multiplier, column + j * isa.words, isa.words) for j in range(vectors)]
        words = [v.round_scaled(isa, sums[j], scales[j], matrix.bounded) for j in range(vectors)]
        output.write(number, v.pack(isa, words, matrix.clamp))


def input_operand(producer: Producer) -> tuple[str, int]:
    """Element type and count of what a producer reads."""
    pixels = producer.height * producer.width
    if isinstance(producer, Gather) and producer.plain:
        return "int8", pixels * producer.channels
    return "uint8", pixels * stored_channels(producer.channels)


def depthwise_operands(isa: Isa, producer: Producer) -> list[Parameter]:
    """Weights, biases and multipliers of a depthwise producer; none for another."""
    if not isinstance(producer, Depthwise):
        return []
    channels = producer.chunks(isa) * isa.bytes
    return [
        Parameter("row_w", isa.weight, producer.variants * channels * 12),
        Parameter("row_b", "int32", producer.variants * channels),
        Parameter("row_m", "float32", channels),
    ]


def product_operands(isa: Isa, k: int, channels: int) -> list[Parameter]:
    """Weights, biases and multipliers of a matrix product."""
    padded = sum(n * vectors for n, vectors in panels(isa, channels)) * isa.words
    return [
        Parameter("w", isa.weight, ceil_div(k, isa.group) * isa.group * padded),
        Parameter("b", "int32", padded),
        Parameter("m", "float32", padded),
    ]


def row_stride(k: int) -> int:
    """Elements from row to row: whole cache lines, and not a multiple of a page."""
    return ceil_div(k, 64) * 64 + (64 if ceil_div(k, 64) % 16 == 0 else 0)


@dataclass(frozen=True)
class Rows:
    """The rows of a left-hand matrix alone, into the arena: for a product whose tasks are columns."""

    isa: Isa
    producer: Producer
    pixels: int
    k: int

    @property
    def symbol(self) -> str:
        return f"rows_{self.isa.name}_{self.producer.symbol}"

    @property
    def pixels_per_task(self) -> int:
        """Whole rows, whatever their number: a row cut in two is begun twice."""
        height, width = self.out_size
        return ceil_div(height, 16) * width

    @property
    def out_size(self) -> tuple[int, int]:
        if isinstance(self.producer, Depthwise):
            return self.producer.height, self.producer.width
        return self.pixels // self.producer.out_width, self.producer.out_width

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    @property
    def count(self) -> int:
        return self.pixels * row_stride(self.k)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, [depthwise weights, biases, multipliers], parameters, y."""
        operands = [
            Parameter("x", *input_operand(self.producer)),
            *depthwise_operands(self.isa, self.producer),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", self.isa.operand, self.count),
        ]

        def body(*values: Buffer) -> Callable[[Expr], None]:
            buffers = {p.name: value for p, value in zip(operands, values, strict=True)}

            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                last = T.Bind(T.min(first + self.pixels_per_task, self.pixels))
                self.producer.emit(self.isa, buffers, first, last, buffers["y"], row_stride(self.k), first)

            return task

        return v.kernel(self.symbol, operands, body)


@dataclass(frozen=True)
class Product:
    """A matrix product of all ``rows`` by one panel of columns a task, for weights too large for the nearer caches."""

    isa: Isa
    rows: int
    k: int
    channels: int
    bounded: bool
    stride: int

    @property
    def symbol(self) -> str:
        wide = "" if self.bounded else "_wide"
        return f"product_{self.isa.name}_{self.rows}x{self.k}x{self.channels}_stride{self.stride}{wide}"

    @property
    def tasks(self) -> int:
        return sum(n for n, _ in panels(self.isa, self.channels))

    @property
    def output_count(self) -> int:
        return self.rows * stored_channels(self.channels)

    def build(self) -> tirx.PrimFunc:
        """Operands: a, weights, biases, multipliers, parameters, y."""
        isa, out_stride = self.isa, stored_channels(self.channels)
        steps = ceil_div(self.k, isa.group)
        operands = [
            Parameter("a", isa.operand, self.rows * self.stride),
            *product_operands(isa, self.k, self.channels),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", "uint8", self.output_count),
        ]

        def body(a: Buffer, w: Buffer, b: Buffer, m: Buffer, parameters: Buffer, y: Buffer) -> Callable[[Expr], None]:
            clamp = v.load_clamp(isa, parameters, OUT_ZERO)
            full = self.channels_in_full_panels // (4 * isa.words)

            matrix = Matrix(w, b, m, steps, self.bounded, clamp, load_aliases(isa, parameters))

            def panel(t: Expr, vectors: int) -> None:
                at = T.Bind(t * (4 * isa.words))

                output = Output(y, at, out_stride, vectors * isa.words)
                emit_panel(isa, matrix, a, self.stride, self.rows, at, vectors, output)

            def task(t: Expr) -> None:
                shapes = panels(isa, self.channels)
                if len(shapes) == 1:
                    panel(t, shapes[0][1])
                    return
                with T.If(t < full):
                    with T.Then():
                        panel(t, 4)
                    with T.Else():
                        panel(t, shapes[1][1])

            return task

        return v.kernel(self.symbol, operands, body)

    @property
    def channels_in_full_panels(self) -> int:
        return sum(n * 4 * self.isa.words for n, vectors in panels(self.isa, self.channels) if vectors == 4)
