"""What follows a sum of products: requantization or ReLU, the addition of a residual, the way to memory."""

from __future__ import annotations

from collections.abc import Callable

from tvm.tirx.script.builder import ir as T

from . import tir as c
from .block import Block
from .tir import Buffer, Expr, ceil_div

# Words of the constants: the output's clamp and zero point; then those of a fused addition.
LOW, HIGH, ZERO, A_MULTIPLIER, B_MULTIPLIER, BIAS, SHIFT, SUM_LOW, SUM_ZERO = range(9)
CONSTANTS = 9


class Scale:
    """Sums to outputs: the contract's requantization, or a float's ReLU."""

    def __init__(self, block: Block) -> None:
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


def write_staged(block: Block, count: int, load_chunk: Callable[[Expr, Expr, Buffer], None]) -> None:
    """The tile in shared memory to global memory in chunks of ``count`` words, the residual added on the way;
    ``load_chunk(row, chunk, words)`` reads one as outputs."""
    gemm = block.gemm
    tile_words = gemm.tile.columns * gemm.item_bytes // 4
    per_row, threads = tile_words // count, gemm.tile.threads
    chunks = gemm.tile.rows * per_row
    with T.serial(0, ceil_div(chunks, threads)) as turn:
        n = c.bind(turn * threads + block.thread.index)
        row, chunk = c.bind(n // per_row), c.bind(n % per_row)
        item = c.bind(block.first_row + row)
        pixel, exists = gemm.prologue.pixel(item) if gemm.prologue else (item, item < gemm.items)
        first_word = c.bind(block.first_column * gemm.item_bytes // 4 + chunk * count)
        row_words = gemm.channels * gemm.item_bytes // 4
        inside = first_word < row_words if row_words % tile_words else True
        there = True if chunks % threads == 0 else n < chunks
        with c.when(c.both(there, c.both(exists, inside))):
            words = c.registers(count)
            load_chunk(row, chunk, words)
            where = c.bind(pixel * row_words + first_word)
            if gemm.addition:
                _add(block, words, count, where)
            c.store_words(words, count, block.buffers["y"], where)


def _add(block: Block, words: Buffer, count: int, where: Expr) -> None:
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
