"""Matrix products on x86-64: register blocks over packed panels of weights, and all that follows a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ..prim_func import Parameter
from . import vector as v
from .layout import OUT_ZERO, PARAMETERS, ceil_div, stored_channels
from .vector import Buffer, Expr, Isa, lane_order

LARGEST_BLOCK = 6  # rows of a register block


def row_blocks(pixels: int, largest: int) -> list[tuple[int, int]]:
    """(count, rows): ``pixels`` rows in as few blocks as possible, as even as possible."""
    blocks = ceil_div(pixels, largest)
    small, more = divmod(pixels, blocks)
    return [(n, rows) for n, rows in ((more, small + 1), (blocks - more, small)) if n]


def panels(isa: Isa, channels: int) -> list[tuple[int, int]]:
    """(count, vectors): output channels in full panels, then the rest."""
    full, rest = divmod(ceil_div(channels, isa.words), isa.panel)
    return [(n, vectors) for n, vectors in ((full, isa.panel), (1, rest)) if n and vectors]


def panel_starts(isa: Isa, channels: int) -> list[tuple[int, int]]:
    """(first channel, vectors) of every panel."""
    starts, first = [], 0
    for count, vectors in panels(isa, channels):
        for _ in range(count):
            starts.append((first, vectors))
            first += vectors * isa.words
    return starts


def steps_per_turn(isa: Isa) -> int:
    """Steps of a product's inner loop that are written out. Sums of products by AVX2 are plain additions: LLVM changes
    the order of those of several steps, and needs more registers than there are."""
    return 4 if isa.vnni else 1


def product_operands(isa: Isa, k: int, channels: int) -> list[Parameter]:
    """Weights, biases and multipliers of a matrix product."""
    padded = sum(n * vectors for n, vectors in panels(isa, channels)) * isa.words
    return [
        Parameter("w", isa.weight, ceil_div(k, isa.group) * isa.group * padded),
        Parameter("b", "int32", padded),
        Parameter("m", "float32", padded),
    ]


def column_order(isa: Isa, channels: int) -> NDArray[np.int64]:
    """Which output channel each of the panels' columns holds; those from ``channels`` on do not exist."""
    return np.concatenate(
        [first + lane_order(isa, vectors).reshape(-1) for first, vectors in panel_starts(isa, channels)]
    )


def pack_matrix(isa: Isa, matrix: NDArray[np.int64]) -> NDArray[np.generic]:
    """(N, K) in panels of columns: panel, group of products, column, product within the group."""
    channels, k = matrix.shape
    order, steps = column_order(isa, channels), ceil_div(k, isa.group)
    padded = np.zeros((order.size, steps * isa.group), isa.weight)
    padded[:channels, :k] = matrix
    columns = padded[order].reshape(order.size, steps, isa.group)
    packed = [
        columns[first : first + vectors * isa.words].transpose(1, 0, 2).reshape(-1)
        for first, vectors in panel_starts(isa, channels)
    ]
    return np.concatenate(packed)


@dataclass(frozen=True, eq=False)
class Matrix:
    """The right-hand side of a product: ``steps`` groups of ``k`` deep, packed in panels, with what follows it."""

    weights: Buffer
    bias: Buffer
    multiplier: Buffer
    steps: int
    bounded: bool
    clamp: v.Clamp


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

    Meanwhile the weights of the next panel are fetched, a share with every block, or, where that is less than a cache
    line a turn, a panel with every block: they come from the outer caches or from memory, and in an order that the
    processor foresees only within a page.
    """
    panel = T.Bind(column * (matrix.steps * isa.group))
    elements = vectors * isa.operand_elements
    line = 64 // np.dtype(isa.weight).itemsize
    blocks = sum(count for count, _ in row_blocks(height, LARGEST_BLOCK))
    turn = steps_per_turn(isa)
    share = ceil_div(turn * elements, blocks * line) * line
    row, done = 0, 0
    for count, rows in row_blocks(height, LARGEST_BLOCK):
        with T.serial(0, count) as block:
            top = T.Bind(row + block * rows)
            ahead = T.Bind(panel + matrix.steps * elements + (done + block) * (matrix.steps // turn * share))
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
        start = panel + k * vectors * elements
        weights = [T.Bind(v.load(matrix.weights, start + j * elements, elements)) for j in range(vectors)]
        for sums, (row, _) in zip(acc, rows, strict=True):
            a = v.broadcast_group(isa, left, row + k * isa.group)
            for j, weight in enumerate(weights):
                T.buffer_store(sums, v.dot(isa, sums[j], a, weight), [j])

    turn = steps_per_turn(isa)
    turns, rest = divmod(matrix.steps, turn)
    with T.serial(0, turns) as t:
        for offset in range(0, share, line):
            v.prefetch(matrix.weights, ahead + t * share + offset)
        for k in range(turn):
            step(t * turn + k)
    for k in range(rest):
        step(turns * turn + k)
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
            matrix = Matrix(w, b, m, steps, self.bounded, clamp)

            def panel(t: Expr, vectors: int) -> None:
                at = T.Bind(t * (isa.panel * isa.words))
                output = Output(y, at, out_stride, vectors * isa.words)
                emit_panel(isa, matrix, a, self.stride, self.rows, at, vectors, output)

            def task(t: Expr) -> None:
                (full, vectors), *rest = panels(isa, self.channels)
                if not rest:
                    panel(t, vectors)
                    return
                with T.If(t < full):
                    with T.Then():
                        panel(t, vectors)
                    with T.Else():
                        panel(t, rest[0][1])

            return task

        return v.kernel(self.symbol, operands, body)
