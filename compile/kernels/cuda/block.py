"""Where a thread of a matrix product's block is, and the buffers it has."""

from __future__ import annotations

from dataclasses import dataclass

from .gemm import Gemm
from .tir import Buffer, Expr, Thread, ceil_div


@dataclass(frozen=True, eq=False)
class Block:
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
