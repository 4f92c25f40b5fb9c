"""Four int8 products summed in one int16, for AArch64 processors without dot products.

``gemm`` may chain smull, smlal2, smlal, smlal2 in a register: every int16 lane then holds four products, of input
channels 8 apart. A pixel is at least -128, so a lane cannot overflow where its four weights' magnitudes add up to at
most 255. Most do; of the others, the part of a weight that is too much is taken out and becomes a correction. The
corrections are few: a sparse matrix, whose products with the pixels are what the accumulators start from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from . import neon
from .gemm import BLOCKS
from .neon import Buffer, Expr

MOST = (2**15 - 1) // 128  # of a lane's weights, together
_LANES = 8  # of int16
_CHUNK = 16  # pixels corrected together
_ROWS = BLOCKS["neon"].rows
_CHANNELS = BLOCKS["neon"].channels


@dataclass(frozen=True)
class Split:
    """Weights (O, K) as ``chained`` plus corrections: those of output o are ``entries[starts[o]:starts[o + 1]]``, an
    input channel times 256 plus the weight, modulo 256, each."""

    chained: NDArray[np.int8]
    starts: NDArray[np.int32]
    entries: NDArray[np.int32]


def _by_lane(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """(O, K) as (O, steps, links of the chain, lanes), zero beyond K."""
    outputs, k = weights.shape
    step = BLOCKS["neon"].step
    padded = np.zeros((outputs, -(-k // step) * step), np.int64)
    padded[:, :k] = weights
    return padded.reshape(outputs, -1, step // _LANES, _LANES)


def split(weights: NDArray[np.int8]) -> Split:
    """Given (O, K); Result: chained + corrections == weights, and no lane of chained beyond ``MOST``."""
    kept = _by_lane(weights.astype(np.int64))
    while (excess := np.abs(kept).sum(axis=2, keepdims=True) - MOST).max() > 0:
        largest = np.abs(kept).argmax(axis=2, keepdims=True)
        value = np.take_along_axis(kept, largest, axis=2)
        cut = np.sign(value) * np.minimum(np.abs(value), np.maximum(excess, 0))
        np.put_along_axis(kept, largest, value - cut, axis=2)
    chained = kept.reshape(weights.shape[0], -1)[:, : weights.shape[1]].astype(np.int8)
    removed = weights.astype(np.int64) - chained
    outputs, channels = np.nonzero(removed)
    starts = np.searchsorted(outputs, np.arange(weights.shape[0] + 1)).astype(np.int32)
    entries = channels << 8 | removed[outputs, channels] & 255
    return Split(chained, starts, entries.astype(np.int32))


def pays(parts: Split, pixels: int) -> bool:
    """Whether chains save more instructions than the corrections of ``pixels`` pixels take."""
    outputs, k = parts.chained.shape
    chunks = -(-pixels // _CHUNK)
    saved = pixels * outputs * k / 32
    return chunks * (14 * len(parts.entries) + 96 * k / _CHUNK + 4 * outputs) + 20 * outputs < 0.8 * saved


def padded_pixels(pixels: int) -> int:
    """Pixels in whole chunks: so many have room."""
    return -(-pixels // _CHUNK) * _CHUNK


class Corrections:
    """Emits the corrections of a band of at most ``pixels`` pixels, whose patches have ``k`` bytes."""

    def __init__(self, starts: Buffer, entries: Buffer, pixels: int, k: int) -> None:
        self.starts, self.entries, self.k = starts, entries, k
        self.pixels = padded_pixels(pixels)
        self.columns = T.alloc_buffer((k * self.pixels,), "int8")
        self.sums = T.alloc_buffer((_CHANNELS * self.pixels,), "int32")

    def transpose(self, planes: Buffer, plane: int, chunks: Expr) -> None:
        """From 16 channels of every pixel to one row of all pixels for every channel."""
        with T.serial(0, chunks) as chunk:
            with T.serial(0, self.k // 16) as block:
                source = neon.bind(block * plane + chunk * (16 * _CHUNK))
                vectors = [neon.load(planes, source + i * 16) for i in range(_CHUNK)]
                for _ in range(4):  # each turn halves the distance of what belongs together
                    vectors = [
                        neon.bind(neon.shuffle([vectors[i // 2], vectors[i // 2 + 8]], _zipped(i % 2)))
                        for i in range(_CHUNK)
                    ]
                for i, v in enumerate(vectors):
                    neon.store(self.columns, (block * 16 + i) * self.pixels + chunk * _CHUNK, v, 16)

    def compute(self, biases: Buffer, output_panel: Expr, chunks: Expr) -> None:
        """Biases plus corrections of 4 output channels and all pixels."""
        with T.serial(0, _CHANNELS) as i:
            channel = neon.bind(output_panel * _CHANNELS + i)
            row = neon.bind(i * self.pixels)
            bias = neon.bind(neon.splat(biases[channel], 4))
            with T.serial(0, chunks) as chunk:
                for quarter in range(4):
                    neon.store(self.sums, row + chunk * _CHUNK + 4 * quarter, bias, 4)
            first = neon.bind(self.starts[channel])
            with T.serial(0, self.starts[channel + 1] - first) as at:
                entry = neon.bind(self.entries[first + at])
                weight = neon.bind(neon.splat(T.cast(entry, "int8"), _LANES))
                column = neon.bind(T.shift_right(entry, 8) * self.pixels)
                with T.serial(0, chunks) as chunk:
                    self._add_products(row + chunk * _CHUNK, column + chunk * _CHUNK, weight)

    def _add_products(self, target: Expr, source: Expr, weight: Expr) -> None:
        x = neon.load(self.columns, source)
        products = [neon.bind(neon.smull(half(x, 16), weight)) for half in (neon.low, neon.high)]
        for quarter in range(4):
            part = (neon.low, neon.high)[quarter % 2](products[quarter // 2], 8)
            at = target + 4 * quarter
            neon.store(self.sums, at, neon.load(self.sums, at, "int32x4") + neon.widen(part, "int32x4"), 4)

    def start(self, panel: Expr) -> Callable[[int], list[Expr]]:
        """For ``Accumulators.multiply``: the sums of a panel's pixels."""

        def one(index: int) -> Expr:
            row, channel = divmod(index, _CHANNELS)
            return neon.load_first_lane(self.sums, panel * _ROWS + (channel * self.pixels + row))

        return lambda count: [one(index) for index in range(count)]


def _zipped(half: int) -> list[int]:
    """zip1 or zip2 of bytes."""
    return [lane for i in range(8 * half, 8 * half + 8) for lane in (i, 16 + i)]
