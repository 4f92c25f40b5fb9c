"""AArch64 vector instructions as TIR expressions, and mutable vector registers, for the kernels beside it.

Each function names the instruction that LLVM selects for it. Code is emitted into the TVM IRBuilder's current frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

Expr = Any  # a TIR expression; TVM ships no usable annotations
Buffer = Any


class Register:
    """A vector that is written more than once. Lives in a CPU register: LLVM promotes the one-element buffer.

    TVM turns a ``local`` allocation on a CPU, and any above 1 KB, into a call for heap memory; a small ``global`` one
    stays on the stack, where LLVM can see it.
    """

    def __init__(self, dtype: str) -> None:
        self._buffer = T.alloc_buffer((1,), dtype, scope="global")

    def get(self) -> Expr:
        return self._buffer[0]

    def set(self, value: Expr) -> None:
        T.buffer_store(self._buffer, value, [0])


def bind(value: Expr) -> Expr:
    """Evaluates here, once."""
    return T.Bind(value)


def load(buffer: Buffer, offset: Expr, dtype: str = "int8x16") -> Expr:
    """ldr, at ``offset`` elements, evaluated here."""
    return T.Bind(buffer.vload([offset], dtype))


def store(buffer: Buffer, offset: Expr, value: Expr, lanes: int) -> None:
    """str, at ``offset`` elements."""
    T.buffer_store(buffer, value, [T.Ramp(offset, 1, lanes)])


def store_word(buffer: Buffer, offset: Expr, v: Expr, word: int) -> None:
    """st1 of a lane: 4 bytes of an int8x16."""
    value = T.reinterpret("int8x4", T.Shuffle([T.reinterpret("int32x4", v)], [word]))
    T.buffer_store(buffer, value, [T.Ramp(offset, 1, 4)])


def load_splat(buffer: Buffer, index: int, dtype: str) -> Expr:
    """ld1r: one element in every lane."""
    return T.Bind(T.Broadcast(buffer[index], int(dtype.rpartition("x")[2])))


def load_first_lane(buffer: Buffer, index: Expr) -> Expr:
    """ldr of a word: an int32x4 of it and three zeros."""
    return T.Bind(T.Shuffle([T.Broadcast(buffer[index], 4), T.Broadcast(T.int32(0), 4)], [0, 4, 4, 4]))


def splat(value: Expr, lanes: int) -> Expr:
    """dup."""
    return T.Broadcast(value, lanes)


def low(v: Expr, lanes: int) -> Expr:
    """The first half of a vector of ``lanes``."""
    return T.Shuffle([v], list(range(lanes // 2)))


def high(v: Expr, lanes: int) -> Expr:
    """The second half of a vector of ``lanes``; folds into the second form of an instruction (smull2)."""
    return T.Shuffle([v], list(range(lanes // 2, lanes)))


def join(a: Expr, b: Expr, lanes: int) -> Expr:
    """Two vectors of ``lanes`` as one of twice as many; folds into sqxtn2 and the like."""
    return T.Shuffle([a, b], list(range(2 * lanes)))


def shuffle(parts: Sequence[Expr], indices: Sequence[int]) -> Expr:
    """Lanes of the concatenated ``parts``: zip, trn, ext, dup."""
    return T.Shuffle(list(parts), list(indices))


def reinterpret(dtype: str, v: Expr) -> Expr:
    """The same bits."""
    return T.reinterpret(dtype, v)


def _call(dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, f"llvm.aarch64.neon.{name}", *args)


def sdot(acc: Expr, a: Expr, b: Expr) -> Expr:
    """acc[i] += sum of a[4i + j] * b[4i + j]: int32x4 += int8x16 times int8x16."""
    return _call("int32x4", "sdot.v4i32.v16i8", acc, a, b)


def smmla(acc: Expr, a: Expr, b: Expr) -> Expr:
    """2x2 += (2x8) x (2x8) transposed: acc[2r + c] += sum of a[8r + j] * b[8c + j]."""
    return _call("int32x4", "smmla.v4i32.v16i8", acc, a, b)


def smull(a: Expr, b: Expr) -> Expr:
    """int8x8 times int8x8: int16x8. Added to an int16x8: smlal."""
    return _call("int16x8", "smull.v8i16", a, b)


def saddlp(v: Expr) -> Expr:
    """int16x8 added in pairs: int32x4. Added to an int32x4: sadalp."""
    return _call("int32x4", "saddlp.v4i32.v8i16", v)


def addp(a: Expr, b: Expr) -> Expr:
    """Adjacent lanes of a, then of b, added: int32x4."""
    return _call("int32x4", "addp.v4i32", a, b)


def fmulx(a: Expr, b: Expr) -> Expr:
    """float32x4 times float32x4; fmul, but for zero times infinity."""
    return _call("float32x4", "fmulx.v4f32", a, b)


def fcvtns(v: Expr) -> Expr:
    """float32x4 to int32x4, to the nearest, ties to even, saturating."""
    return _call("int32x4", "fcvtns.v4i32.v4f32", v)


def sqxtn16(v: Expr) -> Expr:
    """int32x4 to int16x4, saturating."""
    return _call("int16x4", "sqxtn.v4i16", v)


def sqxtn8(v: Expr) -> Expr:
    """int16x8 to int8x8, saturating."""
    return _call("int8x8", "sqxtn.v8i8", v)


def sqadd16(a: Expr, b: Expr) -> Expr:
    """int16x8 plus int16x8, saturating."""
    return _call("int16x8", "sqadd.v8i16", a, b)


def sqshrn8(v: Expr, shift: int) -> Expr:
    """int16x8 shifted right, to int8x8, saturating; by 1 to 8."""
    return _call("int8x8", "sqshrn.v8i8", v, T.int32(shift))


def sshl32(v: Expr, shift: Expr) -> Expr:
    """int32x4 shifted left by each lane of ``shift``; arithmetically to the right where negative."""
    return _call("int32x4", "sshl.v4i32", v, shift)


def smax(a: Expr, b: Expr) -> Expr:
    """The greater of each lane."""
    return T.max(a, b)


def add_wrapping(a: Expr, b: Expr) -> Expr:
    """int8x16 plus int8x16 modulo 256."""
    return T.reinterpret("int8x16", T.reinterpret("uint8x16", a) + T.reinterpret("uint8x16", b))


def tbl4(table: Sequence[Expr], index: Expr) -> Expr:
    """Of each byte of ``index``, unsigned, the entry of four int8x16; 0 beyond."""
    return _call("int8x16", "tbl4.v16i8", *table, index)


def tbx4(otherwise: Expr, table: Sequence[Expr], index: Expr) -> Expr:
    """``tbl4``, but beyond the table the byte of ``otherwise``."""
    return _call("int8x16", "tbx4.v16i8", otherwise, *table, index)


def widen(v: Expr, dtype: str) -> Expr:
    """sxtl; folds into saddw and the like."""
    return T.cast(v, dtype)


def st4(buffer: Buffer, offset: Expr, vectors: Sequence[Expr]) -> None:
    """Four int8x16, byte by byte in turn; 64 bytes."""
    T.evaluate(T.call_llvm_intrin("void", "llvm.aarch64.neon.st4.v16i8.p0", *vectors, T.address_of(buffer[offset])))
