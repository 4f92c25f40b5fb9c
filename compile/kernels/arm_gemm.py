"""The int8 matrix product of the AArch64 kernels: packed panels of pixels by packed panels of output channels.

A block of ``rows`` pixels by ``channels`` outputs stays in registers while ``depth`` input channels are consumed at a
time. Panels: x as [depth groups][rows][depth] bytes, written by ``pack``; weights as [output panel][depth groups]
[channels][depth], made by ``pack_weights``.

* dotprod: 12 x 8, sdot by element: 24 sdot for 5 vectors loaded.
* i8mm: 12 x 8, smmla, 2x8 by 8x2: 24 smmla for 10 vectors loaded.
* neon: 4 x 4, two int8 products summed in int16 (weights are at least -127, so |sum| <= 2 * 127 * 128 < 2^15), pairs
  of sums added to int32: smull, smlal2 and sadalp for 16 products.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from . import arm_neon as neon
from .arm_neon import Buffer, Expr, Register

_MOST_UNROLLED = {4: 20, 8: 10, 16: 12}  # depth groups, by depth: so many loads are within the reach of ldp, and the
# loop's own instructions are near 1 %


@dataclass(frozen=True)
class Block:
    """The register block of an instruction set."""

    isa: str
    rows: int
    channels: int
    depth: int

    @property
    def row_step(self) -> int:
        """Rows come in multiples of this."""
        return 1 if self.depth == 16 else 4

    def groups(self, k: int) -> int:
        """Depth groups that cover k input bytes."""
        return -(-k // self.depth)


BLOCKS = {
    "i8mm": Block("i8mm", 12, 8, 8),
    "dotprod": Block("dotprod", 12, 8, 4),
    "neon": Block("neon", 4, 4, 16),
}


def choose_block(features: tuple[str, ...]) -> Block:
    """The widest instruction that the processor has."""
    return next(block for isa, block in BLOCKS.items() if isa in features or isa == "neon")


def pack_weights(block: Block, weights: NDArray[np.int8]) -> NDArray[np.int8]:
    """(O, K) as [O / channels][K / depth][channels][depth], zero beyond O and K; flat."""
    outputs, k = weights.shape
    panels, groups = -(-outputs // block.channels), block.groups(k)
    padded = np.zeros((panels * block.channels, groups * block.depth), np.int8)
    padded[:outputs, :k] = weights
    blocked = padded.reshape(panels, block.channels, groups, block.depth).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(blocked).reshape(-1)


def pack(block: Block, panel: Buffer, base: Expr, rows: int, vectors: list[Expr]) -> None:
    """Writes 16 channels of ``rows`` pixels into a panel; ``base`` is the offset of the channels' first group."""
    depth = block.depth
    if depth == 16:
        for r, v in enumerate(vectors):
            neon.store(panel, base + r * 16, v, 16)
    elif depth == 8:
        for r in range(0, rows, 2):
            a, b = (neon.reinterpret("int64x2", v) for v in vectors[r : r + 2])
            for half in range(2):
                pair = neon.reinterpret("int8x16", neon.shuffle([a, b], [half, 2 + half]))
                neon.store(panel, base + half * rows * 8 + r * 8, pair, 16)
    else:
        for r in range(0, rows, 4):
            for i, v in enumerate(_transpose_words(vectors[r : r + 4])):
                neon.store(panel, base + i * rows * 4 + r * 4, v, 16)


def _transpose_words(vectors: list[Expr]) -> list[Expr]:
    """4 vectors of 4 words, transposed: zip1, zip2 twice."""
    a, b, c, d = (neon.reinterpret("int32x4", v) for v in vectors)
    ac_low, ac_high = (neon.bind(neon.shuffle([a, c], i)) for i in ([0, 4, 1, 5], [2, 6, 3, 7]))
    bd_low, bd_high = (neon.bind(neon.shuffle([b, d], i)) for i in ([0, 4, 1, 5], [2, 6, 3, 7]))
    return [
        neon.reinterpret("int8x16", neon.shuffle(pair, i))
        for pair in ([ac_low, bd_low], [ac_high, bd_high])
        for i in ([0, 4, 1, 5], [2, 6, 3, 7])
    ]


def _unroll(block: Block, k: int) -> int:
    """Depth groups a turn of the loop: many, and few left over. Two turns at least where there is something to
    multiply: LLVM reorders a product that is one straight line until its registers no longer suffice."""
    groups = block.groups(k)
    most = min(_MOST_UNROLLED[block.depth], max(1, groups // 2))
    return min(range((most + 1) // 2, most + 1), key=lambda unroll: (groups % unroll, -unroll))


class Accumulators:
    """The registers of one block; allocated once per kernel, outside its loops."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.registers = [Register("int32x4") for _ in range(24 if block.depth < 16 else 16)]

    def multiply(
        self, rows: int, panel: Buffer, panel_base: Expr, weights: Buffer, weights_base: Expr, bias: list[Expr], k: int
    ) -> list[list[Expr]]:
        """bias + x W for ``rows`` pixels and ``block.channels`` outputs: for every row its int32x4 vectors.

        ``bias``: the channels' biases, int32x4 each; offsets in bytes; ``k`` the input channels.
        """
        block = self.block
        for index, register in enumerate(self.registers[: self._used(rows)]):
            register.set(self._initial(index, bias))
        groups, unroll = block.groups(k), _unroll(block, k)
        x_step, w_step = rows * block.depth, block.channels * block.depth
        full, rest = divmod(groups, unroll)

        def step(count: int, first: Expr) -> None:
            x_base = neon.bind(panel_base + first * x_step)
            w_base = neon.bind(weights_base + first * w_step)
            for u in range(count):
                self._group(rows, panel, x_base + u * x_step, weights, w_base + u * w_step)

        if rest:  # first, where its offsets fit the instruction that loads two vectors
            step(rest, T.int32(0))
        if full > 1:
            with T.serial(0, full) as i:
                step(unroll, i * unroll + rest)
        elif full == 1:
            step(unroll, T.int32(rest))
        return self._results(rows, bias)

    def _used(self, rows: int) -> int:
        return rows * (2 if self.block.depth < 16 else 4)

    def _initial(self, index: int, bias: list[Expr]) -> Expr:
        match self.block.depth:
            case 4:
                return bias[index % 2]
            case 8:
                first = index % 4 % 2 * 2
                return neon.shuffle([bias[index % 4 // 2]], [first, first + 1] * 2)
            case _:
                return neon.splat(T.int32(0), 4)

    def _group(self, rows: int, panel: Buffer, x_base: Expr, weights: Buffer, w_base: Expr) -> None:
        """One depth group of every row and channel."""
        depth, channels = self.block.depth, self.block.channels
        xs = [neon.load(panel, x_base + i * 16) for i in range(rows * depth // 16)]
        ws = [neon.load(weights, w_base + i * 16) for i in range(channels * depth // 16)]
        match depth:
            case 4:
                for i, register in enumerate(self.registers[: rows * 2]):
                    register.set(neon.sdot(register.get(), ws[i % 2], xs[i // 8], i // 2 % 4))
            case 8:
                for i, register in enumerate(self.registers[: rows * 2]):
                    register.set(neon.smmla(register.get(), xs[i // 4], ws[i % 4]))
            case _:
                for i, register in enumerate(self.registers[: rows * 4]):
                    x, w = xs[i // 4], ws[i % 4]
                    products = neon.smull(neon.low(x, 16), neon.low(w, 16))
                    products = products + neon.smull(neon.high(x, 16), neon.high(w, 16))
                    register.set(register.get() + neon.saddlp(products))

    def _results(self, rows: int, bias: list[Expr]) -> list[list[Expr]]:
        values = [neon.bind(register.get()) for register in self.registers[: self._used(rows)]]
        match self.block.depth:
            case 4:
                return [values[2 * r : 2 * r + 2] for r in range(rows)]
            case 8:
                return [_row_of_pairs(values[r // 2 * 4 : r // 2 * 4 + 4], r % 2) for r in range(rows)]
            case _:
                return [[_sum_across(values[4 * r : 4 * r + 4]) + bias[0]] for r in range(rows)]


def _row_of_pairs(pairs: list[Expr], row: int) -> list[Expr]:
    """Four 2x2 results side by side: one row's 8 channels."""
    halves = [neon.reinterpret("int64x2", v) for v in pairs]
    return [neon.reinterpret("int32x4", neon.shuffle([halves[i], halves[i + 1]], [row, 2 + row])) for i in (0, 2)]


def _sum_across(partial: list[Expr]) -> Expr:
    """The sums of the four lanes of four vectors."""
    a, b, c, d = partial
    return neon.addp(neon.addp(a, b), neon.addp(c, d))
