"""Rounding for processors of which nothing is known but IEEE 754 arithmetic."""

from __future__ import annotations

from tvm import tirx
from tvm.tirx.script.builder import ir as T

# 1.5 * 2^23: the float32 numbers near it are the integers, so that what is added to it is rounded to one of them, to
# the nearest, ties to even; the sum's low bits are that integer.
_MAGIC, _MAGIC_BITS = 12582912.0, 0x4B400000


def nearest(value: tirx.Expr, limit: float, lanes: int = 1) -> tirx.Expr:
    """The integers nearest to float32 numbers, ties to even, as int32; those beyond ``limit``, at most 2^22, become it.

    It needs no instruction for rounding, and on processors that have none no function of a library. The limits also
    stand between a product and the addition, which LLVM would otherwise fuse into one rounding.
    """

    def splat(number: tirx.Expr) -> tirx.Expr:
        return T.broadcast(number, lanes) if lanes > 1 else number

    within = T.max(T.min(value, splat(T.float32(limit))), splat(T.float32(-limit)))
    shifted = within + splat(T.float32(_MAGIC))
    return T.reinterpret(f"int32x{lanes}" if lanes > 1 else "int32", shifted) - splat(T.int32(_MAGIC_BITS))
