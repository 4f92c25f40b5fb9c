"""The loop over the slices of k: how they come into shared memory while those before them are multiplied."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tvm.tirx.script.builder import ir as T

from . import tir as c
from .block import Block
from .dot import Dot
from .gemm import SLICE_BYTES, Gemm
from .mma import Mma
from .slice_layout import a_chunk, a_word, swizzled
from .tir import Expr, ceil_div
from .wmma import Wmma


def run_async(block: Block, multiply: Mma) -> None:
    """By cp.async, ``stages`` - 1 slices ahead. Behind a barrier a slice is there for all threads, and none reads the
    one before it any more, whose place is then filled anew."""
    gemm = block.gemm
    stages, slices = gemm.tile.stages, gemm.slices
    base = multiply.shared
    copy_a = None if gemm.prologue else _a_copies(block, base)

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
        if gemm.prologue:
            _compute_a(block, k, k % stages)
        c.do(f"wait_{stages - 2}")
        c.do("sync")
        with c.when(k + (stages - 1) < slices):
            load(k + (stages - 1), (k + (stages - 1)) % stages)
        c.do("commit")
        multiply.slice(k % stages)


def run_sync(block: Block, multiply: Wmma | Dot) -> None:
    """Through registers, one slice ahead. Behind the last barrier nothing in shared memory is read any more."""
    gemm = block.gemm
    chunks = gemm.slice_bytes // 16  # of each row
    a_chunks = [] if gemm.prologue else block.each(gemm.tile.rows * chunks)
    b_chunks = block.each(gemm.tile.columns * chunks)
    fetched = c.registers(4 * (len(a_chunks) + len(b_chunks)))
    address = None if gemm.prologue else _a_addresses(block, a_chunks)

    def fetch(k: Expr) -> None:
        for turn, n, there in a_chunks:
            assert address is not None
            pointer, valid = address(turn, k * chunks + a_chunk(gemm, n)[1])
            valid = c.both(there, valid)
            c.do("load16_if", c.at(fetched, turn * 4), pointer, 1 if valid is True else valid)
        for turn, n, there in b_chunks:
            target = c.at(fetched, (len(a_chunks) + turn) * 4)
            c.do("load16_if", target, _w_chunk(block, k, n), 1 if there is True else there)

    def keep(k: Expr, slot: Expr) -> None:
        base = c.bind(slot * gemm.stage_bytes)
        if gemm.prologue:
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


def _keep_a(block: Block, base: Expr, n: Expr, words: list[Expr]) -> None:
    """A slice's n-th chunk of ``a`` into the stage at ``base``; with ``dot`` one word below the other."""
    gemm = block.gemm
    row, chunk = a_chunk(gemm, n)
    if gemm.mode == "wmma":
        _store16(block, base + row * gemm.row_bytes + chunk * 16, words)
        return
    pairs = [pair for word in words for pair in _pairs(gemm, word)]
    for i, pair in enumerate(pairs):
        at = ((chunk * len(pairs) + i) * gemm.tile.rows + row) * 4
        c.do("store4", c.at(block.thread.shared, base + at), pair)


def _keep_w(block: Block, base: Expr, n: Expr, words: list[Expr]) -> None:
    """A slice's n-th chunk of weights; with ``dot`` it is a word of each of four columns."""
    gemm = block.gemm
    start = base + gemm.tile.rows * gemm.row_bytes
    if gemm.mode == "wmma":
        row, chunk = a_chunk(gemm, n)
        _store16(block, start + row * gemm.row_bytes + chunk * 16, words)
        return
    fours = gemm.tile.columns // 4
    rows = list(zip(*(_pairs(gemm, word) for word in words), strict=True))
    for i, row in enumerate(rows):
        _store16(block, start + ((n // fours * len(rows) + i) * fours + n % fours) * 16, row)


def _pairs(gemm: Gemm, word: Expr) -> list[Expr]:
    """A word as words of two lanes of 16 bits."""
    return [c.call("pair", word, i) for i in range(2)] if gemm.widens else [word]


def _store16(block: Block, at: Expr, words: Sequence[Expr]) -> None:
    chunk = c.registers(4)
    for i, word in enumerate(words):
        c.put(chunk, i, word)
    c.do("store16", c.at(block.thread.shared, at), c.at(chunk, 0))


def _a_addresses(
    block: Block, chunks: list[tuple[int, Expr, Expr | bool]]
) -> Callable[[int, Expr], tuple[Expr, Expr | bool]]:
    """For each turn's row: the address of a chunk of its k, and whether it is part of k."""
    gemm = block.gemm
    window = gemm.window
    bases = c.registers(len(chunks))
    for turn, n, _ in chunks:
        row = T.min(block.first_row + a_chunk(gemm, n)[0], gemm.items - 1)
        c.put(bases, turn, window.base_word(row))

    def address(turn: int, chunk: Expr) -> tuple[Expr, Expr | bool]:
        valid = True if gemm.k_bytes % gemm.slice_bytes == 0 else chunk < gemm.k_bytes // 16
        inside = chunk if valid is True else T.min(chunk, gemm.k_bytes // 16 - 1)
        return c.at(block.buffers["x"], bases[turn] + window.chunk_word(inside)), valid

    return address


def _a_copies(block: Block, base: Expr) -> Callable[[Expr, Expr], None]:
    """``copy(k, slot)``: a slice of ``a`` from the image."""
    gemm = block.gemm
    chunks = block.each(gemm.tile.rows * 4)
    address = _a_addresses(block, chunks)

    def copy(k: Expr, slot: Expr) -> None:
        for turn, n, there in chunks:
            row, chunk = a_chunk(gemm, n)
            pointer, valid = address(turn, k * 4 + chunk)
            target = slot * gemm.stage_bytes + row * SLICE_BYTES + swizzled(row, chunk) * 16
            with c.when(there):
                c.do("copy16", base + target, pointer, 1 if valid is True else valid)

    return copy


def _w_chunk(block: Block, k: Expr, n: Expr) -> Expr:
    """The address of a slice's n-th chunk of weights."""
    gemm = block.gemm
    slice_words = gemm.tile.columns * gemm.slice_bytes // 4
    return c.at(block.buffers["w"], (block.column_tile * gemm.slices + k) * slice_words + n * 4)


def _compute_a(block: Block, k: Expr, slot: Expr) -> None:
    """A slice of ``a`` from the prologue: pairs of pixels by words of four channels."""
    gemm, prologue = block.gemm, block.gemm.prologue
    assert prologue is not None
    words = SLICE_BYTES // 4
    pairs, at_once = gemm.tile.rows // 2, gemm.tile.threads // words
    word = c.bind(block.thread.index % words)
    taps = prologue.taps(block.buffers, k * words + word)
    with T.serial(0, ceil_div(pairs, at_once)) as turn:
        pair = c.bind(turn * at_once + block.thread.index // words)
        with c.when(True if pairs % at_once == 0 else pair < pairs):
            results = prologue.emit(block.buffers, taps, block.first_row + pair * 2)
            for i, result in enumerate(results):
                where = slot * gemm.stage_bytes + a_word(gemm, pair * 2 + i, word)
                c.do("store4", c.at(block.thread.shared, where), result)
