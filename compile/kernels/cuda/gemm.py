"""Convolutions as matrix products on NVIDIA GPUs: y[p, n] = epilogue(sum over k of a[p, k] * w[n, k]).

A thread block makes a tile of ``rows`` output pixels by ``columns`` channels, walking through k in slices of 64 bytes
that lie in shared memory. How a slice is multiplied is the architecture's ``mode``:

* ``mma`` (sm_80 and later): tensor cores by mma.m16n8k32 (int8) or m16n8k16 (float16). Slices arrive by cp.async,
  ``stages`` of them, and are read by ldmatrix; 16-byte chunks of a slice's row are permuted so that eight rows of
  one column of chunks lie in different banks.
* ``wmma`` (sm_72): tensor cores by wmma.m16n16k16. Rows are padded to 80 bytes, of float16 to 96.
* ``dot``: multiplications of two int16 (or float16) lanes of a word, for GPUs without tensor cores and dp4a: Jetson's
  before sm_72. Slices are stored word by word, so that a thread reads four rows' words at once; int8 become int16 as
  they are stored, so that nothing is left to do for a product but to multiply and to add.

In the latter two a slice is fetched into registers while the one before it is multiplied. A pixel's row of ``a`` is
gathered from the image (``Window``), or computed: a depthwise convolution in front (``Front``), but not with ``dot``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import tir as c
from .depthwise import Front
from .tir import Buffer, Expr, Grid, Parameter, Thread, ceil_div
from .window import Window, split

SLICE_BYTES = 64  # of each row, in shared memory
# Bytes from row to row with wmma, whose instructions want a row to begin at a multiple of a thread's fragment (PTX ISA,
# "Matrix storage for WMMA"): 8 bytes of int8, 32 of float16. As many rows as can begin in different banks.
_WMMA_STRIDE = {"int8": SLICE_BYTES + 16, "float16": SLICE_BYTES + 32}
_STAGED_PAD = 16  # bytes after each row of a staged output tile
# Of a multiprocessor, for its blocks: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_BYTES = {"wmma": 96 << 10, "dot": 64 << 10}
# Words of the constants: the output's clamp and zero point; then those of a fused addition.
LOW, HIGH, ZERO, A_MULTIPLIER, B_MULTIPLIER, BIAS, SHIFT, SUM_LOW, SUM_ZERO = range(9)
CONSTANTS = 9


class Tile(NamedTuple):
    """A block's tile; ``warps_m`` by ``warps_n`` warps share it."""

    rows: int
    columns: int
    warps_m: int
    warps_n: int
    stages: int = 2

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n


@dataclass(frozen=True)
class Gemm:
    """A matrix product. ``channels`` are the stored output channels; a pixel of the input has ``window.pixel_bytes``.

    ``addition``: the residual is added to the requantized output, by the contract's addition. ``relu`` matters for
    float16 only (the clamp holds it for int8), of the product or, where there is one, of the addition.
    """

    mode: str
    dtype: str
    window: Window
    channels: int
    tile: Tile
    front: Front | None = None
    addition: bool = False
    relu: bool = False
    relu_after_addition: bool = False

    @property
    def symbol(self) -> str:
        t = self.tile
        parts = [
            "gemm", self.mode, self.dtype, self.front.name if self.front else self.window.name, f"n{self.channels}",
            f"tile{t.rows}x{t.columns}w{t.warps_m}x{t.warps_n}s{t.stages}",
        ]  # fmt: skip
        parts += ["relu"] * self.relu + ["add"] * self.addition + ["sumrelu"] * self.relu_after_addition
        return "_".join(parts)

    @property
    def k_bytes(self) -> int:
        return self.window.pixel_bytes if self.front else self.window.taps * self.window.pixel_bytes

    @property
    def slice_bytes(self) -> int:
        """Of each row in global memory."""
        return SLICE_BYTES // 2 if self.widens else SLICE_BYTES

    @property
    def widens(self) -> bool:
        """Whether int8 lie in shared memory as int16."""
        return self.mode == "dot" and self.dtype == "int8"

    @property
    def slices(self) -> int:
        return ceil_div(self.k_bytes, self.slice_bytes)

    @property
    def items(self) -> int:
        """Rows of the product: pixels, with the front's pairs made whole."""
        return self.front.items if self.front else self.window.pixels

    @property
    def columns(self) -> int:
        """Channels, with the last tile made whole."""
        return ceil_div(self.channels, self.tile.columns) * self.tile.columns

    @property
    def blocks(self) -> int:
        """One for each tile; those of the same rows are neighbours, and find them in the cache."""
        return self.columns // self.tile.columns * ceil_div(self.items, self.tile.rows)

    @property
    def item_bytes(self) -> int:
        return c.ITEM_BYTES[self.dtype]

    @property
    def row_bytes(self) -> int:
        """Of a slice in shared memory."""
        return _WMMA_STRIDE[self.dtype] if self.mode == "wmma" else SLICE_BYTES

    @property
    def stage_bytes(self) -> int:
        return (self.tile.rows + self.tile.columns) * self.row_bytes

    @property
    def staged_row_bytes(self) -> int:
        """Of a row of the finished tile in shared memory: outputs, or with wmma sums."""
        if self.mode == "wmma":
            return 4 * (self.tile.columns + 8)  # a fragment of sums is 32 bytes
        return self.tile.columns * self.item_bytes + _STAGED_PAD

    @property
    def shared_bytes(self) -> int:
        stages = self.tile.stages * self.stage_bytes
        return stages if self.mode == "mma" else max(stages, self.tile.rows * self.staged_row_bytes)

    @property
    def grid(self) -> Grid:
        return Grid(self.blocks, self.tile.threads, self.shared_bytes)

    @property
    def traffic_bytes(self) -> int:
        """Global memory: every block reads its rows and its columns once; outputs (and the residual) once."""
        slices = self.slices * self.slice_bytes * self.blocks
        reads = slices * self.tile.columns
        column_tiles = self.columns // self.tile.columns
        reads += self.front.traffic_bytes(column_tiles, self.blocks) if self.front else slices * self.tile.rows
        return reads + self.window.pixels * self.channels * self.item_bytes * (2 if self.addition else 1)

    def parameters(self) -> list[Parameter]:
        y_words = self.window.pixels * self.channels * self.item_bytes // 4
        front = self.front.depthwise.operands() if self.front else []
        return [
            Parameter("x", "int32", self.window.words),
            *front,
            Parameter("w", "int32", self.columns * self.slices * self.slice_bytes // 4),
            Parameter("bias", c.SUM[self.dtype], self.columns),
            *(
                [Parameter("m", "float32", self.columns), Parameter("p", "int32", CONSTANTS)]
                if self.dtype == "int8"
                else []
            ),
            *([Parameter("r", "int32", y_words)] if self.addition else []),
            Parameter("y", "int32", y_words),
        ]

    def build(self) -> tirx.PrimFunc:
        # Before sm_80 ptxas spills registers to make room for one more block, for which there is no shared memory.
        resident_blocks = SHARED_BYTES[self.mode] // self.shared_bytes if self.mode != "mma" else 0
        return c.kernel(
            self.symbol, self.parameters(), self.grid, lambda thread, *buffers: _emit(self, thread, buffers),
            resident_blocks,
        )  # fmt: skip


def pack_weights(gemm: Gemm, weights: NDArray[np.generic]) -> NDArray[np.int32]:
    """(channels, k) of the product's dtype -> the slices as they lie in shared memory, tile by tile, as words; what is
    widened there is not yet."""
    tile = gemm.tile
    padded = np.zeros((gemm.columns, gemm.slices * gemm.slice_bytes // gemm.item_bytes), gemm.dtype)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    rows = (
        padded.view(np.int8).reshape(-1, tile.columns, gemm.slices, gemm.slice_bytes // 16, 16).transpose(0, 2, 1, 3, 4)
    )
    if gemm.mode == "mma":
        row = np.arange(tile.columns)[:, None]
        rows = rows[:, :, _order_of_columns(tile)[:, None], np.arange(4) ^ ((row >> 1) & 3)]
    if gemm.mode == "wmma":
        rows = rows[:, :, _row_in_turn(gemm, np.arange(tile.columns))]
    packed = np.ascontiguousarray(rows).view(np.int32)  # (tile, slice, row, chunk, word)
    if gemm.mode == "dot":
        packed = packed.reshape(*packed.shape[:2], tile.columns, gemm.slice_bytes // 4).swapaxes(2, 3)
    return np.ascontiguousarray(packed).reshape(-1)


def _column_groups(tile: Tile) -> list[tuple[int, int]]:
    """(first, count) of the mma's tiles of eight columns that a thread's outputs lie side by side in: four to eight."""
    tiles = tile.columns // tile.warps_n // 8
    return [(first, min(4, tiles - first)) for first in range(0, tiles, 4)]


def _order_of_columns(tile: Tile) -> NDArray[np.int64]:
    """Which column of a tile lies where, so that each thread's outputs are neighbours in memory: mma gives thread t of
    four columns 2 t and 2 t + 1 of each tile of eight; in a group of g of these it gets 2 g t and on."""
    order = []
    for first, count in _column_groups(tile):
        column = np.arange(count * 8)
        order.append(first * 8 + column % 8 // 2 * (2 * count) + column // 8 * 2 + column % 2)
    warp = np.concatenate(order)
    return (np.arange(tile.warps_n)[:, None] * len(warp) + warp).reshape(-1)


@dataclass(frozen=True, eq=False)
class _Block:
    """What the parts of a kernel have in common: buffers, and where the thread is."""

    gemm: Gemm
    thread: Thread
    buffers: dict[str, Buffer]
    first_row: Expr
    column_tile: Expr
    first_column: Expr

    @property
    def lane(self) -> Expr:
        return self.thread.index % 32

    @property
    def warp_row(self) -> Expr:
        """The first row of the warp's part of the tile."""
        tile = self.gemm.tile
        return self.thread.index // 32 // tile.warps_n * (tile.rows // tile.warps_m)

    @property
    def warp_column(self) -> Expr:
        tile = self.gemm.tile
        return self.thread.index // 32 % tile.warps_n * (tile.columns // tile.warps_n)

    def each(self, count: int) -> list[tuple[int, Expr, Expr | bool]]:
        """(turn, number, whether there is such a number) of this thread's share of ``count`` things."""
        threads = self.gemm.tile.threads
        turns = [(turn, self.thread.index + turn * threads) for turn in range(ceil_div(count, threads))]
        return [(turn, n, True if (turn + 1) * threads <= count else n < count) for turn, n in turns]


def _emit(gemm: Gemm, thread: Thread, buffers: tuple[Buffer, ...]) -> None:
    named = dict(zip((p.name for p in gemm.parameters()), buffers, strict=True))
    row_tile, column_tile = (c.bind(part) for part in split(thread.block, gemm.columns // gemm.tile.columns))
    first_row, first_column = c.bind(row_tile * gemm.tile.rows), c.bind(column_tile * gemm.tile.columns)
    block = _Block(gemm, thread, named, first_row, column_tile, first_column)
    if gemm.mode == "mma":
        products = _Mma(block)
        _run_async(block, products)
        products.write()
        return
    multiply = _Wmma(block) if gemm.mode == "wmma" else _Dot(block)
    _run_sync(block, multiply)
    c.do("sync")
    multiply.stage()
    c.do("sync")
    _write(block, multiply)


# How slices come into shared memory.


def _run_async(block: _Block, multiply: _Mma) -> None:
    gemm = block.gemm
    stages, slices = gemm.tile.stages, gemm.slices
    base = multiply.shared
    copy_a = None if gemm.front else _a_copies(block, base)

    def load(k: Expr, slot: Expr) -> None:
        if copy_a:
            copy_a(k, slot)
        for _, n, there in block.each(gemm.tile.columns * 4):
            target = slot * gemm.stage_bytes + (gemm.tile.rows * SLICE_BYTES) + n * 16
            with c.when(there):
                c.do("copy16", base + target, _w_chunk(block, k, n), 1)

    for stage in range(stages - 1):
        if stage < slices:
            load(stage, stage)
        c.do("commit")
    with T.serial(0, slices) as k:
        if gemm.front:
            _compute_a(block, k, k % stages)
        c.do(f"wait_{stages - 2}")
        c.do("sync")
        with c.when(k + (stages - 1) < slices):
            load(k + (stages - 1), (k + (stages - 1)) % stages)
        c.do("commit")
        multiply.slice(k % stages)


def _run_sync(block: _Block, multiply: _Wmma | _Dot) -> None:
    gemm = block.gemm
    chunks = gemm.slice_bytes // 16  # of each row
    a_chunks = [] if gemm.front else block.each(gemm.tile.rows * chunks)
    b_chunks = block.each(gemm.tile.columns * chunks)
    fetched = c.registers(4 * (len(a_chunks) + len(b_chunks)))
    address = None if gemm.front else _a_addresses(block, a_chunks)

    def fetch(k: Expr) -> None:
        for turn, n, there in a_chunks:
            assert address is not None
            pointer, valid = address(turn, k * chunks + _a_chunk(gemm, n)[1])
            valid = c.both(there, valid)
            c.do("load16_if", c.at(fetched, turn * 4), pointer, 1 if valid is True else valid)
        for turn, n, there in b_chunks:
            target = c.at(fetched, (len(a_chunks) + turn) * 4)
            c.do("load16_if", target, _w_chunk(block, k, n), 1 if there is True else there)

    def keep(k: Expr, slot: Expr) -> None:
        base = c.bind(slot * gemm.stage_bytes)
        if gemm.front:
            _compute_a(block, k, slot)
        for turn, n, there in a_chunks:
            with c.when(there):
                _keep_a(block, base, n, [fetched[turn * 4 + i] for i in range(4)])
        for turn, n, there in b_chunks:
            with c.when(there):
                _keep_w(block, base, n, [fetched[(len(a_chunks) + turn) * 4 + i] for i in range(4)])

    fetch(0)
    keep(0, 0)
    c.do("sync")
    with T.serial(0, gemm.slices) as k:
        with c.when(k + 1 < gemm.slices):
            fetch(k + 1)
        multiply.slice(k % 2)
        with c.when(k + 1 < gemm.slices):
            keep(k + 1, (k + 1) % 2)
        c.do("sync")


def _keep_a(block: _Block, base: Expr, n: Expr, words: list[Expr]) -> None:
    """A slice's n-th chunk of ``a`` into the stage at ``base``; with ``dot`` one word below the other."""
    gemm = block.gemm
    row, chunk = _a_chunk(gemm, n)
    if gemm.mode == "wmma":
        _store16(block, base + row * gemm.row_bytes + chunk * 16, words)
        return
    pairs = [pair for word in words for pair in _pairs(gemm, word)]
    for i, pair in enumerate(pairs):
        at = ((chunk * len(pairs) + i) * gemm.tile.rows + row) * 4
        c.do("store4", c.at(block.thread.shared, base + at), pair)


def _keep_w(block: _Block, base: Expr, n: Expr, words: list[Expr]) -> None:
    """A slice's n-th chunk of weights; with ``dot`` it is a word of each of four columns."""
    gemm = block.gemm
    start = base + gemm.tile.rows * gemm.row_bytes
    if gemm.mode == "wmma":
        row, chunk = _a_chunk(gemm, n)
        _store16(block, start + row * gemm.row_bytes + chunk * 16, words)
        return
    fours = gemm.tile.columns // 4
    rows = list(zip(*(_pairs(gemm, word) for word in words), strict=True))
    for i, row in enumerate(rows):
        _store16(block, start + ((n // fours * len(rows) + i) * fours + n % fours) * 16, row)


def _pairs(gemm: Gemm, word: Expr) -> list[Expr]:
    """A word as words of two lanes of 16 bits."""
    return [c.call("pair", word, i) for i in range(2)] if gemm.widens else [word]


def _store16(block: _Block, at: Expr, words: Sequence[Expr]) -> None:
    chunk = c.registers(4)
    for i, word in enumerate(words):
        c.put(chunk, i, word)
    c.do("store16", c.at(block.thread.shared, at), c.at(chunk, 0))


def _a_chunk(gemm: Gemm, n: Expr) -> tuple[Expr, Expr]:
    """(row, chunk of 16 bytes) of a slice's n-th chunk: along rows for memory, with ``dot`` down for the banks."""
    if gemm.mode == "dot":
        return n % gemm.tile.rows, n // gemm.tile.rows
    return (_row_in_turn(gemm, n // 4) if gemm.mode == "wmma" else n // 4), n % 4


def _row_in_turn(gemm: Gemm, n: Any) -> Any:
    """Which row of a slice for wmma is stored as the n-th: of two that are stored at once, one begins half of the banks
    after the other."""
    apart = next(rows for rows in (1, 2, 4) if rows * gemm.row_bytes % 128 == 64)
    return n // (2 * apart) * (2 * apart) + n % 2 * apart + n % (2 * apart) // 2


def _a_word(gemm: Gemm, row: Expr, word: Expr) -> Expr:
    """The byte of a stage where a word of a row of ``a`` lies."""
    if gemm.mode == "mma":
        return row * SLICE_BYTES + ((word // 4) ^ (row // 2 % 4)) * 16 + word % 4 * 4
    return row * gemm.row_bytes + word * 4


def _a_addresses(
    block: _Block, chunks: list[tuple[int, Expr, Expr | bool]]
) -> Callable[[int, Expr], tuple[Expr, Expr | bool]]:
    """For each turn's row: the address of a chunk of its k, and whether it is part of k."""
    gemm = block.gemm
    window = gemm.window
    bases = c.registers(len(chunks))
    for turn, n, _ in chunks:
        row = T.min(block.first_row + _a_chunk(gemm, n)[0], gemm.items - 1)
        c.put(bases, turn, window.base_word(row))

    def address(turn: int, chunk: Expr) -> tuple[Expr, Expr | bool]:
        valid = True if gemm.k_bytes % gemm.slice_bytes == 0 else chunk < gemm.k_bytes // 16
        inside = chunk if valid is True else T.min(chunk, gemm.k_bytes // 16 - 1)
        return c.at(block.buffers["x"], bases[turn] + window.chunk_word(inside)), valid

    return address


def _a_copies(block: _Block, base: Expr) -> Callable[[Expr, Expr], None]:
    gemm = block.gemm
    chunks = block.each(gemm.tile.rows * 4)
    address = _a_addresses(block, chunks)

    def copy(k: Expr, slot: Expr) -> None:
        for turn, n, there in chunks:
            row, chunk = _a_chunk(gemm, n)
            pointer, valid = address(turn, k * 4 + chunk)
            target = slot * gemm.stage_bytes + row * SLICE_BYTES + (chunk ^ (row // 2 % 4)) * 16
            with c.when(there):
                c.do("copy16", base + target, pointer, 1 if valid is True else valid)

    return copy


def _w_chunk(block: _Block, k: Expr, n: Expr) -> Expr:
    gemm = block.gemm
    slice_words = gemm.tile.columns * gemm.slice_bytes // 4
    return c.at(block.buffers["w"], (block.column_tile * gemm.slices + k) * slice_words + n * 4)


def _compute_a(block: _Block, k: Expr, slot: Expr) -> None:
    """A slice of ``a`` from the depthwise convolution in front: pairs of pixels by words of four channels."""
    gemm, front = block.gemm, block.gemm.front
    assert front is not None
    words = SLICE_BYTES // 4
    pairs, at_once = gemm.tile.rows // 2, gemm.tile.threads // words
    word = c.bind(block.thread.index % words)
    taps = front.taps(block.buffers, k * words + word)
    with T.serial(0, ceil_div(pairs, at_once)) as turn:
        pair = c.bind(turn * at_once + block.thread.index // words)
        with c.when(True if pairs % at_once == 0 else pair < pairs):
            results = front.emit(block.buffers, taps, block.first_row + pair * 2)
            for i, result in enumerate(results):
                where = slot * gemm.stage_bytes + _a_word(gemm, pair * 2 + i, word)
                c.do("store4", c.at(block.thread.shared, where), result)


# How a slice is multiplied, and the sums' way out.


class _Mma:
    """mma.m16n8k32 or m16n8k16: 32 bytes of k at a time."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        tile = block.gemm.tile
        self.tiles_m = tile.rows // tile.warps_m // 16
        self.tiles_n = tile.columns // tile.warps_n // 8
        self.groups = _column_groups(tile)
        self.sums = c.registers(4 * self.tiles_m * self.tiles_n, c.SUM[block.gemm.dtype])
        # Addresses of shared memory as its instructions want them: 32 bits, to which constants cost nothing.
        self.shared = c.bind(c.call("shared_address", c.at(block.thread.shared, 0)))
        for first, count in self.groups:
            bias = c.registers(2 * count, c.SUM[block.gemm.dtype])
            self._load_columns(bias, 0, block.buffers["bias"], first, count)
            for n in range(2 * count):
                for m in range(self.tiles_m):
                    for half in range(2):
                        c.put(self.sums, self._sum(m, first + n // 2, half * 2 + n % 2), bias[n])

    def _column(self, first: int, count: int) -> Expr:
        """The first of this thread's columns of a group, in the tensor."""
        block = self.block
        return block.first_column + block.warp_column + first * 8 + block.lane % 4 * (2 * count)

    def _load_columns(self, target: Buffer, at: int, source: Buffer, first: int, count: int) -> None:
        for i in range(0, 2 * count, 4):
            c.do(
                "load16_f32" if source.dtype == "float32" else "load16",
                c.at(target, at + i),
                c.at(source, self._column(first, count) + i),
            )

    def _sum(self, m: int, j: int, i: int) -> int:
        return (m * self.tiles_n + j) * 4 + i

    def slice(self, slot: Expr) -> None:
        block, gemm = self.block, self.block.gemm
        lane = block.lane
        name = {"int8": "mma_s8", "float16": "mma_f16"}[gemm.dtype]
        base = c.bind(self.shared + slot * gemm.stage_bytes)
        a_row = block.warp_row + lane % 16
        b_row = block.warp_column + lane % 8 + lane // 16 * 8
        # Rows of a warp's part begin at multiples of 16, so that a lane's permutation of chunks is its own.
        permutation = lane // 2 % 4
        for step in range(2):
            a = c.registers(4 * self.tiles_m)
            b = c.registers(2 * self.tiles_n)
            a_chunk = (step * 2 + lane // 16) ^ permutation
            b_chunk = (step * 2 + lane // 8 % 2) ^ permutation
            a_at = c.bind(base + a_row * SLICE_BYTES + a_chunk * 16)
            b_at = c.bind(base + (gemm.tile.rows + b_row) * SLICE_BYTES + b_chunk * 16)
            for m in range(self.tiles_m):
                c.do("ldmatrix", c.at(a, m * 4), a_at + m * 16 * SLICE_BYTES)
            for j in range(0, self.tiles_n, 2):
                c.do("ldmatrix", c.at(b, j * 2), b_at + j * 8 * SLICE_BYTES)
            for m in range(self.tiles_m):
                for j in range(self.tiles_n):
                    c.do(name, c.at(self.sums, self._sum(m, j, 0)), c.at(a, m * 4), c.at(b, j * 2))

    def write(self) -> None:
        """The outputs, from registers: each thread 4, 8 or 16 bytes of a pixel's at a time, and the four beside it."""
        block, gemm = self.block, self.block.gemm
        scale = _Scale(block)
        row = c.bind(block.first_row + block.warp_row + block.lane // 4)
        factors = c.registers(2 * self.tiles_n, "float32")
        if gemm.dtype == "int8":
            for first, count in self.groups:
                self._load_columns(factors, 2 * first, block.buffers["m"], first, count)
        for m in range(self.tiles_m):
            for half in range(2):
                item = c.bind(row + (m * 16 + half * 8))
                pixel, exists = gemm.front.pixel(item) if gemm.front else (item, item < gemm.items)
                with c.when(exists):
                    start = c.bind(pixel * (gemm.channels * gemm.item_bytes // 4))
                    for first, count in self.groups:
                        column = c.bind(self._column(first, count))
                        with c.when(True if gemm.channels % gemm.tile.columns == 0 else column < gemm.channels):
                            n = [self._sum(m, first + i // 2, half * 2 + i % 2) for i in range(2 * count)]
                            sums = [self.sums[i] for i in n]
                            multipliers = [factors[2 * first + i] for i in range(2 * count)]
                            at = start + column // c.WORD_LANES[gemm.dtype]
                            self._write_outputs(scale, sums, multipliers, at)

    def _write_outputs(self, scale: _Scale, sums: list[Expr], multipliers: list[Expr], at: Expr) -> None:
        gemm, lanes = self.block.gemm, c.WORD_LANES[self.block.gemm.dtype]
        count = len(sums) // lanes
        words, other = c.registers(count), c.registers(count)
        if gemm.addition:
            c.load_words(other, count, self.block.buffers["r"], at)
        for w in range(count):
            part = slice(w * lanes, (w + 1) * lanes)
            c.put(words, w, scale.word(sums[part], multipliers[part], other[w] if gemm.addition else None))
        c.store_words(words, count, self.block.buffers["y"], at)


class _Dot:
    """Every thread eight rows by four columns, word by word of k."""

    ROWS, COLUMNS = 8, 4
    chunk_words = 4

    def __init__(self, block: _Block) -> None:
        self.block = block
        tile = block.gemm.tile
        across = tile.columns // self.COLUMNS
        assert tile.threads * self.ROWS * self.COLUMNS == tile.rows * tile.columns
        self.row = c.bind(block.thread.index // across * self.ROWS)
        self.column = c.bind(block.thread.index % across * self.COLUMNS)
        self.sums = c.registers(self.ROWS * self.COLUMNS, c.SUM[block.gemm.dtype])
        for j in range(self.COLUMNS):
            start = c.bind(block.buffers["bias"][block.first_column + self.column + j])
            for i in range(self.ROWS):
                c.put(self.sums, i * self.COLUMNS + j, start)

    def slice(self, slot: Expr) -> None:
        block, gemm = self.block, self.block.gemm
        shared, tile = block.thread.shared, gemm.tile
        function = {"int8": "dot2_s16", "float16": "dot2_f16"}[gemm.dtype]
        base = c.bind(slot * gemm.stage_bytes)

        def multiply(k: Expr) -> None:
            a, b = c.registers(self.ROWS), c.registers(self.COLUMNS)
            for i in range(0, self.ROWS, 4):
                c.do("load16", c.at(a, i), c.at(shared, base + (k * tile.rows + self.row + i) * 4))
            c.do("load16", c.at(b, 0), c.at(shared, base + tile.rows * 64 + (k * tile.columns + self.column) * 4))
            for i in range(self.ROWS):
                for j in range(self.COLUMNS):
                    n = i * self.COLUMNS + j
                    c.put(self.sums, n, c.call(function, a[i], b[j], self.sums[n], dtype=c.SUM[gemm.dtype]))

        c.repeat(SLICE_BYTES // 4, 4, multiply)

    def stage(self) -> None:
        block, gemm = self.block, self.block.gemm
        scale = _Scale(block)
        factors = [scale.factor(block.first_column + self.column + j) for j in range(self.COLUMNS)]
        for i in range(self.ROWS):
            values = [scale.apply(self.sums[i * self.COLUMNS + j], f) for j, f in enumerate(factors)]
            at = (self.row + i) * gemm.staged_row_bytes + self.column * gemm.item_bytes
            for w, word in enumerate(_pack(gemm.dtype, values)):
                c.do("store4", c.at(block.thread.shared, at + w * 4), word)

    def load_chunk(self, row: Expr, chunk: Expr, words: Buffer) -> None:
        at = row * self.block.gemm.staged_row_bytes + chunk * 16
        c.do("load16", c.at(words, 0), c.at(self.block.thread.shared, at))


class _Wmma:
    """wmma.m16n16k16. The sums go out through shared memory: which thread holds which is the hardware's secret."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        gemm, tile = block.gemm, block.gemm.tile
        self.tiles_m = tile.rows // tile.warps_m // 16
        self.tiles_n = tile.columns // tile.warps_n // 16
        self.sums = c.registers(8 * self.tiles_m * self.tiles_n, c.SUM[gemm.dtype])
        self.suffix = {"int8": "s8", "float16": "f16"}[gemm.dtype]
        with T.unroll(0, 8 * self.tiles_m * self.tiles_n) as i:
            c.put(self.sums, i, T.cast(0, c.SUM[gemm.dtype]))

    def slice(self, slot: Expr) -> None:
        block, gemm = self.block, self.block.gemm
        shared = block.thread.shared
        step_bytes = 16 * gemm.item_bytes
        fragment = 2 if gemm.dtype == "int8" else 8
        stride = gemm.row_bytes // gemm.item_bytes
        a_at = c.bind(slot * gemm.stage_bytes + block.warp_row * gemm.row_bytes)
        b_at = c.bind(slot * gemm.stage_bytes + (gemm.tile.rows + block.warp_column) * gemm.row_bytes)
        for step in range(SLICE_BYTES // step_bytes):
            a = c.registers(fragment * self.tiles_m)
            b = c.registers(fragment * self.tiles_n)
            for m in range(self.tiles_m):
                at = c.at(shared, a_at + m * 16 * gemm.row_bytes + step * step_bytes)
                c.do(f"wmma_load_a_{self.suffix}", c.at(a, m * fragment), at, stride)
            for j in range(self.tiles_n):
                at = c.at(shared, b_at + j * 16 * gemm.row_bytes + step * step_bytes)
                c.do(f"wmma_load_b_{self.suffix}", c.at(b, j * fragment), at, stride)
            for m in range(self.tiles_m):
                for j in range(self.tiles_n):
                    sums = c.at(self.sums, (m * self.tiles_n + j) * 8)
                    c.do(f"wmma_{self.suffix}", sums, c.at(a, m * fragment), c.at(b, j * fragment))

    def stage(self) -> None:
        block, gemm = self.block, self.block.gemm
        kind = {"int8": "s32", "float16": "f32"}[gemm.dtype]
        for m in range(self.tiles_m):
            for j in range(self.tiles_n):
                at = (block.warp_row + m * 16) * gemm.staged_row_bytes + (block.warp_column + j * 16) * 4
                sums = c.at(self.sums, (m * self.tiles_n + j) * 8)
                c.do(f"wmma_store_{kind}", c.at(block.thread.shared, at), sums, gemm.staged_row_bytes // 4)

    @property
    def chunk_words(self) -> int:
        """Of outputs: four, so that threads read sums side by side."""
        return self.block.gemm.item_bytes

    def load_chunk(self, row: Expr, chunk: Expr, words: Buffer) -> None:
        block, gemm = self.block, self.block.gemm
        scale, kind = _Scale(block), c.SUM[gemm.dtype]
        load = {"int8": "load16", "float16": "load16_f32"}[gemm.dtype]
        sums, bias, factors = c.registers(4, kind), c.registers(4, kind), c.registers(4, "float32")
        channel = c.bind(block.first_column + chunk * 4)
        c.do(load, c.at(sums, 0), c.at(block.thread.shared, row * gemm.staged_row_bytes + chunk * 16))
        c.do(load, c.at(bias, 0), c.at(block.buffers["bias"], channel))
        if gemm.dtype == "int8":
            c.do("load16_f32", c.at(factors, 0), c.at(block.buffers["m"], channel))
        totals, lanes = [sums[i] + bias[i] for i in range(4)], c.WORD_LANES[gemm.dtype]
        for w in range(self.chunk_words):
            part = slice(w * lanes, (w + 1) * lanes)
            c.put(words, w, scale.word(totals[part], [factors[i] for i in range(4)][part], None))


class _Scale:
    """Sums to outputs: the contract's requantization, or a float's ReLU."""

    def __init__(self, block: _Block) -> None:
        self.gemm, self.buffers = block.gemm, block.buffers
        self.clamp = [c.bind(block.buffers["p"][i]) for i in (LOW, HIGH, ZERO)] if self.gemm.dtype == "int8" else []
        if self.clamp and self.gemm.addition:
            # Of the bits of a rounded output: their 0x4b400000 and the zero point are multiplied once, for all.
            a_multiplier, bias = (c.bind(block.buffers["p"][i]) for i in (A_MULTIPLIER, BIAS))
            self.addition = a_multiplier, c.bind(c.call("mad", self.clamp[2] - 0x4B400000, a_multiplier, bias))

    def factor(self, channel: Expr) -> Expr:
        return c.bind(self.buffers["m"][channel]) if self.clamp else None

    def apply(self, total: Expr, factor: Expr) -> Expr:
        if self.clamp:
            return c.call("scale", total, factor, *self.clamp)
        return T.max(total, T.float32(0)) if self.gemm.relu else total

    def word(self, sums: list[Expr], factors: list[Expr], other: Expr | None) -> Expr:
        """Outputs as a word; ``other``: the word of the residual that is added."""
        if self.gemm.dtype == "float16":
            word = c.call("pack2", *(self.apply(total, None) for total in sums))
            return word if other is None else add_halves(word, other, self.gemm.relu_after_addition)
        if other is None:
            return c.call("scale4", *sums, *factors, *self.clamp)
        a_multiplier, bias = self.addition
        values = [c.call("scale_bits", s, f, *self.clamp[:2]) for s, f in zip(sums, factors, strict=True)]
        return _sum_word([c.call("mad", v, a_multiplier, bias) for v in values], other, self.buffers["p"], A_MULTIPLIER)


def _pack(dtype: str, values: list[Expr]) -> list[Expr]:
    """Values as words."""
    lanes, name = c.WORD_LANES[dtype], {"int8": "pack4", "float16": "pack2"}[dtype]
    return [c.call(name, *values[i : i + lanes]) for i in range(0, len(values), lanes)]


def _write(block: _Block, multiply: _Dot | _Wmma) -> None:
    """The staged tile to global memory in chunks of words, the residual added on the way."""
    gemm, count = block.gemm, multiply.chunk_words
    tile_words = gemm.tile.columns * gemm.item_bytes // 4
    per_row, threads = tile_words // count, gemm.tile.threads
    chunks = gemm.tile.rows * per_row
    with T.serial(0, ceil_div(chunks, threads)) as turn:
        n = c.bind(turn * threads + block.thread.index)
        row, chunk = c.bind(n // per_row), c.bind(n % per_row)
        item = c.bind(block.first_row + row)
        pixel, exists = gemm.front.pixel(item) if gemm.front else (item, item < gemm.items)
        first_word = c.bind(block.first_column * gemm.item_bytes // 4 + chunk * count)
        row_words = gemm.channels * gemm.item_bytes // 4
        inside = first_word < row_words if row_words % tile_words else True
        there = True if chunks % threads == 0 else n < chunks
        with c.when(c.both(there, c.both(exists, inside))):
            words = c.registers(count)
            multiply.load_chunk(row, chunk, words)
            where = c.bind(pixel * row_words + first_word)
            if gemm.addition:
                _add(block, words, count, where)
            c.store_words(words, count, block.buffers["y"], where)


def _add(block: _Block, words: Buffer, count: int, where: Expr) -> None:
    gemm = block.gemm
    other = c.registers(count)
    c.load_words(other, count, block.buffers["r"], where)
    for w in range(count):
        if gemm.dtype == "int8":
            p = block.buffers["p"]
            c.put(words, w, add_words(words[w], other[w], p, A_MULTIPLIER))
        else:
            c.put(words, w, add_halves(words[w], other[w], gemm.relu_after_addition))


def add_words(a: Expr, b: Expr, p: Buffer, first: int) -> Expr:
    """The contract's addition of four int8 each; its constants are words ``first`` and on of ``p``."""
    return _sum_word([c.call("byte", a, i) * p[first] + p[first + 2] for i in range(4)], b, p, first)


def _sum_word(totals: list[Expr], b: Expr, p: Buffer, first: int) -> Expr:
    """The rest of it, from products of a and the bias."""
    b_multiplier, shift, low, zero = (p[first + i] for i in (1, 3, 4, 5))
    values = []
    for i, total in enumerate(totals):
        total = (total + c.call("byte", b, i) * b_multiplier) >> shift
        values.append(T.max(total + zero, low))
    return c.call("pack4_nearest", *values)


def add_halves(a: Expr, b: Expr, relu: bool) -> Expr:
    """Two float16 each."""
    values = [c.call("half", a, i, dtype="float32") + c.call("half", b, i, dtype="float32") for i in range(2)]
    return c.call("pack2", *(T.max(v, T.float32(0)) if relu else v for v in values))
