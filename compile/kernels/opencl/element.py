"""What int8 and float16 kernels differ in: how much a 16-byte vector holds, and which functions of the preamble work
on it.

A tensor between kernels is stored in blocks of channels that fill one vector: (N, blocks, H * W) vectors, so that
neighbouring work-items, which are neighbouring pixels, load neighbouring vectors. The channels that a last block lacks
hold some finite value, and all weights for them are zero.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .tir import VECTOR, VECTOR_BYTES, Expr, call

# int8: words of a convolution's, addition's or other kernel's int32 parameters.
ZERO, LOW, PADDING = 0, 1, 2
ADD_A, ADD_B, ADD_BIAS, ADD_SHIFT, ADD_ZERO, ADD_LOW = 3, 4, 5, 6, 7, 8
PARAMETERS = 9
# float16: the same of float32 parameters; SCALE and OFFSET turn the network's int8 input into real values.
REAL_LOW, REAL_ADD_LOW, REAL_SCALE, REAL_OFFSET = 0, 1, 2, 3
REAL_PARAMETERS = 4


@dataclass(frozen=True)
class Element:
    """``lanes`` channels fill a vector, ``lanes / 4`` a word of it. Sums are kept in ``accumulator``, by fours of
    channels in convolutions and by words elsewhere. ``suffix`` ends the names of the preamble's functions."""

    name: str
    lanes: int
    accumulator: str
    suffix: str

    @property
    def integer(self) -> bool:
        return self.name == "int8"

    @property
    def quads(self) -> int:
        """Fours of channels in a block."""
        return self.lanes // 4

    @property
    def quad_type(self) -> str:
        """Four channels' sums."""
        return f"{self.accumulator}x4"

    @property
    def word_channels(self) -> int:
        """Channels in four bytes."""
        return self.lanes // 4

    @property
    def word_type(self) -> str:
        """The sums of a word's channels."""
        return f"{self.accumulator}x{self.word_channels}"

    @property
    def words_of_four(self) -> int:
        """Words that four channels fill."""
        return 4 // self.word_channels

    @property
    def parameter_type(self) -> str:
        return "int32" if self.integer else "float32"

    @property
    def parameter_count(self) -> int:
        return PARAMETERS if self.integer else REAL_PARAMETERS

    @property
    def lowest_word(self) -> int:
        """A word of the least values: what padding is to a maximum. -128, or -65504, the least finite float16."""
        return -0x7F7F7F80 if self.integer else -0x04000401

    def blocks(self, channels: int) -> int:
        return -(-channels // self.lanes)

    def count(self, batch: int, pixels: int, channels: int) -> int:
        """Vectors of a stored tensor."""
        return batch * self.blocks(channels) * pixels

    def size_bytes(self, batch: int, pixels: int, channels: int) -> int:
        """Bytes of a stored tensor."""
        return self.count(batch, pixels, channels) * VECTOR_BYTES

    def vector(self, name: str, *args: Expr) -> Expr:
        """A function of the preamble that makes a vector."""
        return call(VECTOR, f"xct_{name}{self.suffix}", *args)

    def word(self, name: str, *args: Expr) -> Expr:
        """One that makes a word."""
        return call("int32", f"xct_{name}{self.suffix}", *args)

    def sums(self, name: str, dtype: str, *args: Expr) -> Expr:
        """One that makes sums of ``dtype``."""
        return call(dtype, f"xct_{name}{self.suffix}", *args)

    def storage(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        """Weights as they are stored: bytes, or halves as the code units that they are."""
        return values.astype(np.int8) if self.integer else values.astype(np.float16)


INT8 = Element("int8", 16, "int32", "")
FLOAT16 = Element("float16", 8, "float32", "h")
