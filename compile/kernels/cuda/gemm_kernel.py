"""The kernel of a matrix product."""

from __future__ import annotations

from dataclasses import dataclass

from tvm import tirx

from . import tir as c
from .block import Block
from .dot import Dot
from .epilogue import CONSTANTS, write_staged
from .gemm import SHARED_BYTES, Gemm
from .mainloop import run_async, run_sync
from .mma import Mma
from .tir import Buffer, Grid, Parameter, Thread
from .window import split
from .wmma import Wmma


@dataclass(frozen=True)
class GemmKernel:
    """Operands: x, of a prologue its own, weights, biases, for int8 multipliers and constants, the residual."""

    gemm: Gemm

    @property
    def symbol(self) -> str:
        gemm, t = self.gemm, self.gemm.tile
        parts = [
            "gemm", gemm.mode, gemm.dtype, (gemm.prologue or gemm.window).name, f"n{gemm.channels}",
            f"tile{t.rows}x{t.columns}w{t.warps_m}x{t.warps_n}s{t.stages}",
        ]  # fmt: skip
        parts += ["relu"] * gemm.relu + ["add"] * gemm.addition + ["sumrelu"] * gemm.relu_after_addition
        return "_".join(parts)

    @property
    def grid(self) -> Grid:
        return Grid(self.gemm.blocks, self.gemm.tile.threads, self.gemm.shared_bytes)

    @property
    def traffic_bytes(self) -> int:
        """Every block reads its rows and its columns once; outputs (and the residual) once."""
        gemm = self.gemm
        slices = gemm.slices * gemm.slice_bytes * gemm.blocks
        reads = slices * gemm.tile.columns
        column_tiles = gemm.columns // gemm.tile.columns
        reads += gemm.prologue.traffic_bytes(column_tiles, gemm.blocks) if gemm.prologue else slices * gemm.tile.rows
        return reads + gemm.window.pixels * gemm.channels * gemm.item_bytes * (2 if gemm.addition else 1)

    def parameters(self) -> list[Parameter]:
        gemm = self.gemm
        y_words = gemm.window.pixels * gemm.channels * gemm.item_bytes // 4
        prologue = gemm.prologue.depthwise.operands() if gemm.prologue else []
        scaling = [Parameter("m", "float32", gemm.columns), Parameter("p", "int32", CONSTANTS)]
        return [
            Parameter("x", "int32", gemm.window.words),
            *prologue,
            Parameter("w", "int32", gemm.columns * gemm.slices * gemm.slice_bytes // 4),
            Parameter("bias", c.SUM[gemm.dtype], gemm.columns),
            *(scaling if gemm.dtype == "int8" else []),
            *([Parameter("r", "int32", y_words)] if gemm.addition else []),
            Parameter("y", "int32", y_words),
        ]

    def build(self) -> tirx.PrimFunc:
        def body(thread: Thread, *buffers: Buffer) -> None:
            _emit(self.gemm, thread, dict(zip((p.name for p in self.parameters()), buffers, strict=True)))

        # Before sm_80 ptxas spills registers to make room for one more block, for which there is no shared memory.
        resident_blocks = SHARED_BYTES[self.gemm.mode] // self.gemm.shared_bytes if self.gemm.mode != "mma" else 0
        return c.kernel(self.symbol, self.parameters(), self.grid, body, resident_blocks)


def _emit(gemm: Gemm, thread: Thread, buffers: dict[str, Buffer]) -> None:
    row_tile, column_tile = (c.bind(part) for part in split(thread.block, gemm.columns // gemm.tile.columns))
    first_row, first_column = c.bind(row_tile * gemm.tile.rows), c.bind(column_tile * gemm.tile.columns)
    block = Block(gemm, thread, buffers, first_row, column_tile, first_column)
    if gemm.mode == "mma":
        products = Mma(block)
        run_async(block, products)
        products.write()
        return
    multiply = Wmma(block) if gemm.mode == "wmma" else Dot(block)
    run_sync(block, multiply)
    multiply.stage()
    c.do("sync")
    write_staged(block, multiply.chunk_words, multiply.load_chunk)
