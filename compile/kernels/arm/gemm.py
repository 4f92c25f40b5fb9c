"""The int8 matrix product of the AArch64 kernels: packed panels of pixels by packed panels of output channels.

A block of ``rows`` pixels by ``channels`` outputs stays in registers while ``depth`` input channels are consumed at a
time. x lies as [depth groups][pixels][depth] bytes, ``plane_bytes`` from group to group, written by ``pack``; weights
as [output panel][steps][channels][depth of a step], made by ``pack_weights``. Both are read front to back.

* dotprod: 12 x 8, sdot by element: 48 sdot for 3 loads of 10 vectors. In ``product``.
* i8mm: 12 x 8, smmla, 2x8 by 8x2: 24 smmla for 3 loads of 10 vectors. In ``product``.
* neon: 4 x 4, in steps of 32 input channels. Two int8 products summed in int16 (weights are at least -127, so |sum|
  <= 2 * 127 * 128 < 2^15), pairs of sums added to int32: 2 smull, 2 smlal2 and 2 sadalp for 32 products. ``chained``,
  four products are summed in int16: smull, smlal2, smlal, smlal2 and one sadalp. That wants weights that
  ``int16_sums.split`` has proven.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from . import neon
from .neon import Buffer, Expr, Register
from .vector_loads import Kept, Stream

_MOST_UNROLLED = 6  # steps: the loop's own instructions are near 1 %
ROW_STEP = 4  # rows that a panel is packed in


@dataclass(frozen=True)
class Block:
    """The register block of an instruction set. ``depth``: input channels that lie together in a panel of pixels;
    ``step``: those multiplied together."""

    isa: str
    rows: int
    channels: int
    depth: int
    step: int

    def padded(self, k: int) -> int:
        """k input bytes in whole depth groups."""
        return -(-k // self.depth) * self.depth


BLOCKS = {
    "i8mm": Block("i8mm", 12, 8, 8, 8),
    "dotprod": Block("dotprod", 12, 8, 4, 4),
    "neon": Block("neon", 4, 4, 16, 32),
}


def choose_block(features: tuple[str, ...]) -> Block:
    """The widest instruction that the processor has."""
    return next(block for isa, block in BLOCKS.items() if isa in features or isa == "neon")


def pack_weights(block: Block, weights: NDArray[np.int8]) -> NDArray[np.int8]:
    """(O, K) as [O / channels][K / step][channels][step], zero beyond O and K, a last step as short as can be; flat."""
    outputs, k = weights.shape
    panels, width = -(-outputs // block.channels), block.padded(k)
    padded = np.zeros((panels * block.channels, width), np.int8)
    padded[:outputs, :k] = weights
    by_panel = padded.reshape(panels, block.channels, width)
    steps = [by_panel[..., at : at + block.step].reshape(panels, -1) for at in range(0, width, block.step)]
    return np.ascontiguousarray(np.concatenate(steps, axis=1)).reshape(-1)


def plane_bytes(block: Block, pixels: int) -> int:
    """From one group of input channels of that many pixels to the next: whole vectors, and an odd number of cache
    lines, so that the groups of a few pixels do not compete for the same ones."""
    size = -(-pixels * block.depth // 16) * 16
    return size if size <= 64 else (-(-size // 64) | 1) * 64


def pack(block: Block, planes: Buffer, base: Expr, plane: int, vectors: list[Expr]) -> None:
    """Writes 16 channels of a pixel for each of ``vectors``, from ``base`` on: that is the first pixel's place in the
    channels' first group."""
    rows = len(vectors)
    depth = block.depth
    if depth == 16:
        for r, v in enumerate(vectors):
            neon.store(planes, base + r * 16, v, 16)
    elif depth == 8:
        for r in range(0, rows, 2):
            a, b = (neon.reinterpret("int64x2", v) for v in vectors[r : r + 2])
            for half in range(2):
                pair = neon.reinterpret("int8x16", neon.shuffle([a, b], [half, 2 + half]))
                neon.store(planes, base + half * plane + r * 8, pair, 16)
    else:
        for r in range(0, rows, 4):
            for i, v in enumerate(_transpose_words(vectors[r : r + 4])):
                neon.store(planes, base + i * plane + r * 4, v, 16)


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


def unroll(steps: int, most: int) -> int:
    """Steps a turn of the loop: many, and few left over. Two turns at least where there is something to multiply."""
    most = min(most, max(1, steps // 2))
    return min(range((most + 1) // 2, most + 1), key=lambda unrolled: (steps % unrolled, -unrolled))


class Accumulators:
    """The registers of one block of plain NEON; allocated once per kernel, outside its loops."""

    def __init__(self, block: Block, chained: bool = False) -> None:
        self.block, self.chained = block, chained
        self.registers = [Register("int32x4") for _ in range(16)]
        self.xs, self.ws = Stream(), Stream()

    def multiply(
        self,
        rows: int,
        pixels: tuple[Buffer, Expr],
        plane: Expr,
        weights: tuple[Buffer, Expr],
        k: int,
        start: Callable[[int], Sequence[Expr]],
    ) -> list[list[Expr]]:
        """start + x W for ``block.channels`` outputs of ``rows`` pixels: for every pixel its int32x4 vectors.

        ``pixels`` and ``weights``: where they begin, in bytes; ``plane``: bytes from one group of input channels to the
        next; ``k`` the input channels; ``start(n)`` the first values of n registers, as ``Bias`` or ``int16_sums`` have
        them.
        """
        block = self.block
        used = self.registers[: 4 * rows]
        for register, value in zip(used, start(len(used)), strict=True):
            register.set(value)
        self.xs.at(*pixels)
        self.ws.at(*weights)
        steps, last = divmod(block.padded(k), block.step)
        if steps:
            unrolled = unroll(steps, _MOST_UNROLLED)
            full, rest = divmod(steps, unrolled)
            self._steps(rows, plane, used, rest)
            if full > 1:
                with T.serial(0, full):
                    self._steps(rows, plane, used, unrolled)
            else:
                self._steps(rows, plane, used, unrolled)
        if last:
            self._sum_products(rows, plane, used, 1)
        values = [neon.bind(register.get()) for register in self.registers]
        return [[_sum_across(values[4 * r : 4 * r + 4])] for r in range(rows)]

    def _steps(self, rows: int, plane: Expr, used: list[Register], count: int) -> None:
        for _ in range(count):
            self._sum_products(rows, plane, used, self.block.step // self.block.depth)

    def _sum_products(self, rows: int, plane: Expr, used: list[Register], vectors: int) -> None:
        """A step of 16 or 32 input channels, 4 outputs of one channel at a time."""
        xs = [self.xs.load(rows, used if v == 0 else used[-1:], plane) for v in range(vectors)]
        for channel in range(4):
            ws = self.ws.load(vectors, used[(channel - 1) % 4 :: 4])
            for row, register in enumerate(used[channel::4]):
                products = [
                    neon.smull(half(xs[v][row], 16), half(ws[v], 16))
                    for v in range(vectors)
                    for half in (neon.low, neon.high)
                ]
                length = len(products) if self.chained else 2
                for first in range(0, len(products), length):
                    total = products[first]
                    for product in products[first + 1 : first + length]:
                        total = total + product
                    register.set(register.get() + neon.saddlp(total))


class Bias:
    """What ``Accumulators.multiply`` starts with: every output channel's bias."""

    def __init__(self, block: Block) -> None:
        self._block, self._count = block, 16 if block.depth == 16 else 4
        self.kept = Kept(self._count)

    def load(self, biases: Buffer, panel: Expr) -> None:
        """Those of a panel of output channels."""
        first = panel * self._block.channels
        if self._block.depth == 16:  # a register is summed across in the end
            vectors = [neon.load_first_lane(biases, first + i) for i in range(4)]
        else:
            vectors = [neon.load(biases, first + 4 * i, "int32x4") for i in range(2)]
        if self._block.depth == 8:
            vectors = [neon.bind(neon.shuffle([v], [i, i + 1] * 2)) for v in vectors for i in (0, 2)]
        self.kept.set(vectors * (self._count // len(vectors)))

    def start(self, count: int) -> list[Expr]:
        """The first values of ``count`` registers."""
        return self.kept.load(count)


def _sum_across(partial: list[Expr]) -> Expr:
    """The sums of the four lanes of four vectors."""
    a, b, c, d = partial
    return neon.addp(neon.addp(a, b), neon.addp(c, d))
