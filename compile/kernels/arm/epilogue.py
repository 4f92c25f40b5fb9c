"""From int32 accumulators to int8, as the contract says: clamp(rint(f32(f32(acc) * m)) + z, lo, 127).

The narrowing saturates twice, int32 to int16 and, once the zero point is added, int16 to int8. That equals one clamp:
a value beyond int16 stays beyond int8 whatever zero point in [-128, 127] is added to it.

Where the weights prove more (``Range``), additions stand for conversions, which take four times as long on a
Cortex-A76. The float of the bits of MAGIC + n is 1.5 * 2^23 + n for n in [-2^22, 2^22), and its neighbours are one
apart there: accumulators that start at MAGIC need but a subtraction to become floats, and adding 1.5 * 2^23 rounds to
nearest, ties to even, leaving the integer in the lower bits. Its upper half is then dropped instead of saturated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from . import neon
from .neon import Buffer, Expr

MAGIC = 0x4B400000  # the bits of _MAGIC
_MAGIC = 1.5 * 2.0**23


@dataclass(frozen=True)
class Range:
    """What the weights prove. ``fits23``: accumulators lie in [-2^22, 2^22), and start at MAGIC; ``fits16``: scaled
    ones fit int16."""

    fits23: bool
    fits16: bool

    def __str__(self) -> str:
        return ("" if self.fits23 else "_long") + ("" if self.fits16 else "_wide")


ANY = Range(False, False)


@dataclass(frozen=True)
class Output:
    """What is known of the accumulators, and vectors: the output's zero point (int16x8), 1.5 * 2^23 (float32x4) where
    that is made use of, and, under a fused ReLU, the zero point as the least value (int8x16)."""

    range: Range
    zero_point: Expr
    magic: Expr | None
    least: Expr | None

    def vectors(self) -> list[Expr]:
        """All of them, as int32x4."""
        return [neon.reinterpret("int32x4", v) for v in (self.zero_point, self.magic, self.least) if v is not None]

    def of_vectors(self, vectors: Sequence[Expr]) -> Output:
        """The same with other ``vectors()``."""
        rest = iter(vectors)
        zero_point = neon.reinterpret("int16x8", next(rest))
        magic = None if self.magic is None else neon.reinterpret("float32x4", next(rest))
        least = None if self.least is None else neon.reinterpret("int8x16", next(rest))
        return Output(self.range, zero_point, magic, least)


def load_output(constants: Buffer, index: int, relu: bool, known: Range = ANY) -> Output:
    """``constants[index]`` (int32) is the zero point."""
    zero = constants[index]
    zero_point = neon.bind(neon.splat(T.cast(zero, "int16"), 8))
    magic = neon.bind(neon.splat(T.float32(_MAGIC), 4)) if known.fits23 or known.fits16 else None
    least = neon.bind(neon.splat(T.cast(zero, "int8"), 16)) if relu else None
    return Output(known, zero_point, magic, least)


def scale(acc: Expr, multiplier: Expr, output: Output) -> Expr:
    """rint(f32(acc) * m), int32x4; with ``fits16``, modulo 2^16. Otherwise it saturates."""
    known = output.range
    value = neon.reinterpret("float32x4", acc) - output.magic if known.fits23 else T.cast(acc, "float32x4")
    product = neon.fmulx(value, multiplier)  # a plain product could be contracted with the sum, and not be rounded
    return neon.reinterpret("int32x4", product + output.magic) if known.fits16 else neon.fcvtns(product)


def _narrow_pair(a: Expr, b: Expr, output: Output) -> Expr:
    """Two int32x4 as one int16x8, zero point added: sqxtn, sqxtn2 or uzp1, then sqadd."""
    if output.range.fits16:
        pair = neon.shuffle([neon.reinterpret("int16x8", v) for v in (a, b)], range(0, 16, 2))
    else:
        pair = neon.join(neon.sqxtn16(a), neon.sqxtn16(b), 4)
    return neon.sqadd16(pair, output.zero_point)


def narrow8(values: Sequence[Expr], output: Output) -> Expr:
    """Two int32x4 as one int8x8, zero point added."""
    y = neon.sqxtn8(_narrow_pair(values[0], values[1], output))
    if output.least is not None:
        y = neon.smax(neon.bind(y), neon.low(output.least, 16))
    return neon.bind(y)


def narrow16(values: Sequence[Expr], output: Output) -> Expr:
    """Four int32x4 as one int8x16, zero point added."""
    halves = [_narrow_pair(values[i], values[i + 1], output) for i in (0, 2)]
    y = neon.join(neon.sqxtn8(halves[0]), neon.sqxtn8(halves[1]), 8)
    if output.least is not None:
        y = neon.smax(neon.bind(y), output.least)
    return neon.bind(y)
