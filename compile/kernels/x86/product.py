"""Matrix products on x86-64: register blocks over packed panels of weights, and all that follows a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import vector as v
from .layout import ALWAYS_ZERO, OUT_ZERO, PARAMETERS, ceil_div, stored_channels
from .vector import Buffer, Expr, Isa, Parameter

TURN = 4  # steps of a product's inner loop that are written out


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


def product_operands(isa: Isa, k: int, channels: int) -> list[Parameter]:
    """Weights, biases and multipliers of a matrix product."""
    padded = sum(n * vectors for n, vectors in panels(isa, channels)) * isa.words
    return [
        Parameter("w", isa.weight, ceil_div(k, isa.group) * isa.group * padded),
        Parameter("b", "int32", padded),
        Parameter("m", "float32", padded),
    ]


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
