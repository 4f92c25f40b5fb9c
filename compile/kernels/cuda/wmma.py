"""A slice's products by the tensor cores of sm_72, and the sums' way out through shared memory."""

from __future__ import annotations

from tvm.tirx.script.builder import ir as T

from . import tir as c
from .block import Block
from .epilogue import Scale
from .gemm import SLICE_BYTES
from .tir import Buffer, Expr


class Wmma:
    """wmma.m16n16k16. The sums go out through shared memory: which thread holds which is the hardware's secret."""

    def __init__(self, block: Block) -> None:
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
        scale, kind = Scale(block), c.SUM[gemm.dtype]
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
