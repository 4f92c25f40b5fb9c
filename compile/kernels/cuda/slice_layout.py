"""How a product's slices lie in shared memory, so that what is read at once lies in different banks; and its weights in
global memory, in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from .gemm import SLICE_BYTES, Gemm, Tile
from .tir import Expr


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
        rows = rows[:, :, _order_of_columns(tile)[:, None], swizzled(row, np.arange(4))]
    if gemm.mode == "wmma":
        rows = rows[:, :, _row_in_turn(gemm, np.arange(tile.columns))]
    packed = np.ascontiguousarray(rows).view(np.int32)  # (tile, slice, row, chunk, word)
    if gemm.mode == "dot":
        packed = packed.reshape(*packed.shape[:2], tile.columns, gemm.slice_bytes // 4).swapaxes(2, 3)
    return np.ascontiguousarray(packed).reshape(-1)


def column_groups(tile: Tile) -> list[tuple[int, int]]:
    """(first, count) of the mma's tiles of eight columns that a thread's outputs lie side by side in: four to eight."""
    tiles = tile.columns // tile.warps_n // 8
    return [(first, min(4, tiles - first)) for first in range(0, tiles, 4)]


def _order_of_columns(tile: Tile) -> NDArray[np.int64]:
    """Which column of a tile lies where, so that each thread's outputs are neighbours in memory: mma gives thread t of
    four columns 2 t and 2 t + 1 of each tile of eight; in a group of g of these it gets 2 g t and on."""
    order = []
    for first, count in column_groups(tile):
        column = np.arange(count * 8)
        order.append(first * 8 + column % 8 // 2 * (2 * count) + column // 8 * 2 + column % 2)
    warp = np.concatenate(order)
    return (np.arange(tile.warps_n)[:, None] * len(warp) + warp).reshape(-1)


def a_chunk(gemm: Gemm, n: Expr) -> tuple[Expr, Expr]:
    """(row, chunk of 16 bytes) of a slice's n-th chunk: along rows for memory, with ``dot`` down for the banks."""
    if gemm.mode == "dot":
        return n % gemm.tile.rows, n // gemm.tile.rows
    return (_row_in_turn(gemm, n // 4) if gemm.mode == "wmma" else n // 4), n % 4


def _row_in_turn(gemm: Gemm, n: Any) -> Any:
    """Which row of a slice for wmma is stored as the n-th: of two that are stored at once, one begins half of the banks
    after the other."""
    apart = next(rows for rows in (1, 2, 4) if rows * gemm.row_bytes % 128 == 64)
    return n // (2 * apart) * (2 * apart) + n % 2 * apart + n % (2 * apart) // 2


def a_word(gemm: Gemm, row: Expr, word: Expr) -> Expr:
    """The byte of a stage where a word of a row of ``a`` lies."""
    if gemm.mode == "mma":
        return row * SLICE_BYTES + swizzled(row, word // 4) * 16 + word % 4 * 4
    return row * gemm.row_bytes + word * 4


def swizzled(row: Any, chunk: Any) -> Any:
    """Where in its row a chunk lies for ldmatrix: eight rows' chunks of one number fill all banks."""
    return chunk ^ (row // 2 % 4)
