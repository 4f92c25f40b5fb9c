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
gathered from the image (``WindowLayout``), or computed by a ``DepthwisePrologue``, but not with ``dot``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from . import tir as c
from .depthwise import DepthwisePrologue
from .tir import ceil_div
from .window import WindowLayout

SLICE_BYTES = 64  # of each row, in shared memory
# Bytes from row to row with wmma, whose instructions want a row to begin at a multiple of a thread's fragment (PTX ISA,
# "Matrix storage for WMMA"): 8 bytes of int8, 32 of float16. As many rows as can begin in different banks.
_WMMA_STRIDE = {"int8": SLICE_BYTES + 16, "float16": SLICE_BYTES + 32}
_STAGED_PAD = 16  # bytes after each row of a staged output tile
# Of a multiprocessor, for its blocks: CUDA C++ Programming Guide, "Compute Capabilities".
SHARED_BYTES = {"wmma": 96 << 10, "dot": 64 << 10}


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
    window: WindowLayout
    channels: int
    tile: Tile
    prologue: DepthwisePrologue | None = None
    addition: bool = False
    relu: bool = False
    relu_after_addition: bool = False

    @property
    def k_bytes(self) -> int:
        return self.window.pixel_bytes if self.prologue else self.window.taps * self.window.pixel_bytes

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
        """Rows of the product: pixels, with the prologue's pairs made whole."""
        return self.prologue.items if self.prologue else self.window.pixels

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
