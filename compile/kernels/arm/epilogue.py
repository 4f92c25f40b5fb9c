"""From int32 accumulators to int8, as the contract says: clamp(rint(f32(f32(acc) * m)) + z, lo, 127).

The narrowing saturates twice, int32 to int16 and, once the zero point is added, int16 to int8. That equals one clamp:
a value beyond int16 stays beyond int8 whatever zero point in [-128, 127] is added to it. Where the weights prove that
no scaled accumulator leaves int16, the first narrowing drops the upper halves instead, in half the instructions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from . import neon
from .neon import Buffer, Expr


@dataclass(frozen=True)
class Output:
    """The output's zero point in every lane (int16x8) and, under a fused ReLU, as the least value (int8x16);
    ``fits16``: whether scaled accumulators are known to fit int16."""

    zero_point: Expr
    least: Expr | None
    fits16: bool


def load_output(constants: Buffer, index: int, relu: bool, fits16: bool = False) -> Output:
    """``constants[index]`` (int32) is the zero point."""
    zero = constants[index]
    least = neon.bind(neon.splat(T.cast(zero, "int8"), 16)) if relu else None
    return Output(neon.bind(neon.splat(T.cast(zero, "int16"), 8)), least, fits16)


def scale(acc: Expr, multiplier: Expr) -> Expr:
    """rint(f32(acc) * m), int32x4, saturating: scvtf, fmul, fcvtns."""
    return neon.fcvtns(T.cast(acc, "float32x4") * multiplier)


def _narrow_pair(a: Expr, b: Expr, output: Output) -> Expr:
    """Two int32x4 as one int16x8, zero point added: sqxtn, sqxtn2 or uzp1, then sqadd."""
    if output.fits16:
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
