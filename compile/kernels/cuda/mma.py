"""A slice's products by the tensor cores of sm_80 and later, and the sums' way out from registers."""

from __future__ import annotations

from . import tir as c
from .block import Block
from .epilogue import Scale
from .gemm import SLICE_BYTES
from .slice_layout import column_groups
from .tir import Buffer, Expr


class Mma:
    """mma.m16n8k32 or m16n8k16: 32 bytes of k at a time."""

    def __init__(self, block: Block) -> None:
        self.block = block
        tile = block.gemm.tile
        self.tiles_m = tile.rows // tile.warps_m // 16
        self.tiles_n = tile.columns // tile.warps_n // 8
        self.groups = column_groups(tile)
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
        scale = Scale(block)
        row = c.bind(block.first_row + block.warp_row + block.lane // 4)
        factors = c.registers(2 * self.tiles_n, "float32")
        if gemm.dtype == "int8":
            for first, count in self.groups:
                self._load_columns(factors, 2 * first, block.buffers["m"], first, count)
        for m in range(self.tiles_m):
            for half in range(2):
                item = c.bind(row + (m * 16 + half * 8))
                pixel, exists = gemm.prologue.pixel(item) if gemm.prologue else (item, item < gemm.items)
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

    def _write_outputs(self, scale: Scale, sums: list[Expr], multipliers: list[Expr], at: Expr) -> None:
        gemm, lanes = self.block.gemm, c.WORD_LANES[self.block.gemm.dtype]
        count = len(sums) // lanes
        words = c.registers(count)
        residual: Buffer = [None] * count
        if gemm.addition:
            residual = c.registers(count)
            c.load_words(residual, count, self.block.buffers["r"], at)
        for w in range(count):
            part = slice(w * lanes, (w + 1) * lanes)
            c.put(words, w, scale.word(sums[part], multipliers[part], residual[w]))
        c.store_words(words, count, self.block.buffers["y"], at)
