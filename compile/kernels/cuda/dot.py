"""A slice's products without tensor cores, and the sums' way out through shared memory."""

from __future__ import annotations

from . import tir as c
from .block import Block
from .epilogue import Scale
from .gemm import SLICE_BYTES
from .tir import Buffer, Expr


class Dot:
    """Every thread eight rows by four columns, word by word of k."""

    ROWS, COLUMNS = 8, 4
    chunk_words = 4

    def __init__(self, block: Block) -> None:
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
        scale = Scale(block)
        factors = [scale.factor(block.first_column + self.column + j) for j in range(self.COLUMNS)]
        for i in range(self.ROWS):
            values = [scale.apply(self.sums[i * self.COLUMNS + j], f) for j, f in enumerate(factors)]
            at = (self.row + i) * gemm.staged_row_bytes + self.column * gemm.item_bytes
            for w, word in enumerate(_pack(gemm.dtype, values)):
                c.do("store4", c.at(block.thread.shared, at + w * 4), word)

    def load_chunk(self, row: Expr, chunk: Expr, words: Buffer) -> None:
        at = row * self.block.gemm.staged_row_bytes + chunk * 16
        c.do("load16", c.at(words, 0), c.at(self.block.thread.shared, at))


def _pack(dtype: str, values: list[Expr]) -> list[Expr]:
    """Values as words."""
    lanes, name = c.WORD_LANES[dtype], {"int8": "pack4", "float16": "pack2"}[dtype]
    return [c.call(name, *values[i : i + lanes]) for i in range(0, len(values), lanes)]
