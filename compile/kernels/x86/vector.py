"""The vector vocabulary of the x86-64 kernels: one set of words for AVX2 and for AVX512-VNNI.

Between kernels an activation is unsigned, u = q + 128, because the dot-product instruction multiplies unsigned by
signed bytes; with AVX2, which has no exact byte dot product, the operands of a matrix product are widened to int16.

Pack and unpack instructions work inside 128-bit lanes. Every unpacking of a vector of bytes into four vectors of
32-bit words, and every packing back, uses the same order: byte 16*i + 4*j + l of the bytes is word 4*i + l of the
j-th vector. ``lane_order`` is that permutation; constants are stored in it at compile time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ..prim_func import Parameter, prim_func

Expr: TypeAlias = tirx.Expr
Buffer: TypeAlias = tirx.Buffer


@dataclass(frozen=True)
class Isa:
    """An instruction set: ``lanes`` 128-bit lanes a vector (2: AVX2, 4: AVX-512) and whether bytes are multiplied."""

    name: str
    lanes: int
    vnni: bool

    @property
    def bytes(self) -> int:
        """Bytes of a vector; also the channels that an elementwise step treats at once."""
        return 16 * self.lanes

    @property
    def words(self) -> int:
        """32-bit words of a vector."""
        return 4 * self.lanes

    @property
    def group(self) -> int:
        """Products summed into one 32-bit word by a dot-product instruction."""
        return 4 if self.vnni else 2

    @property
    def operand_elements(self) -> int:
        """Elements of a vector operand of a dot-product instruction."""
        return self.group * self.words

    @property
    def panel(self) -> int:
        """Vectors of a matrix product's register block, which has ``product.LARGEST_BLOCK`` rows: 24 sums in AVX-512's
        32 registers, 12 in AVX2's 16. A block of as many sums that is wider than high executes fewer instructions with
        AVX2, but loads more bytes of weights, and takes a sixth more time."""
        return 4 if self.lanes == 4 else 2

    @property
    def operand(self) -> str:
        """Element type of a matrix product's activations."""
        return "uint8" if self.vnni else "int16"

    @property
    def weight(self) -> str:
        """Element type of weights."""
        return "int8" if self.vnni else "int16"


AVX2 = Isa("avx2", 2, False)
AVX512VNNI = Isa("avx512vnni", 4, True)


def lane_order(isa: Isa, vectors: int = 4) -> NDArray[np.int64]:
    """Shape (vectors, words): which byte each word of unpacked vectors holds.

    With fewer than four vectors, the order in which ``pack`` leaves ``vectors * words`` bytes contiguous.
    """
    j, i, word = np.meshgrid(np.arange(vectors), np.arange(isa.lanes), np.arange(4), indexing="ij")
    return (4 * (i * vectors + j) + word).reshape(vectors, isa.words)


def in_lanes(isa: Isa, values: NDArray[np.generic]) -> NDArray[np.generic]:
    """Constants of channels, a multiple of ``isa.bytes``, in the order of unpacked vectors, chunk by chunk."""
    return values.reshape(-1, isa.bytes)[:, lane_order(isa).reshape(-1)].reshape(-1)


@cache
def _indices(pattern: tuple[int, ...]) -> list[Expr]:
    return [tirx.const(i, "int32") for i in pattern]


def shuffle(vectors: Sequence[Expr], pattern: tuple[int, ...]) -> Expr:
    """Elements of the concatenated vectors, by index."""
    return tirx.Shuffle(list(vectors), _indices(pattern))


@cache
def _unpack_pattern(lanes: int, per_lane: int, high: bool) -> tuple[int, ...]:
    total, half = lanes * per_lane, per_lane // 2
    first = half if high else 0
    return tuple(
        source * total + lane * per_lane + first + e for lane in range(lanes) for e in range(half) for source in (0, 1)
    )


def unpack(isa: Isa, a: Expr, b: Expr, bits: int, high: bool) -> Expr:
    """punpckl/h: interleaves the lower or upper elements of every lane of two vectors."""
    return T.Bind(shuffle((a, b), _unpack_pattern(isa.lanes, 128 // bits, high)))


def reinterpret(value: Expr, dtype: str) -> Expr:
    return tirx.op.reinterpret(dtype, value)


def load(buffer: Buffer, offset: Expr | int, count: int) -> Expr:
    """``count`` contiguous elements."""
    return buffer.vload([offset], f"{buffer.dtype}x{count}" if count > 1 else str(buffer.dtype))


def store(buffer: Buffer, offset: Expr | int, value: Expr, count: int) -> None:
    T.buffer_store(buffer, value, [T.ramp(offset, 1, count) if count > 1 else offset])


def splat(value: Expr | int, dtype: str, count: int) -> Expr:
    if isinstance(value, int):
        value = tirx.const(value, dtype)
    return T.broadcast(value, count)


def intrinsic(dtype: str, name: str, *args: Expr) -> Expr:
    return T.call_llvm_pure_intrin(dtype, name, *args)


def zero_words(isa: Isa) -> Expr:
    return splat(0, "int32", isa.words)


def broadcast_group(isa: Isa, buffer: Buffer, offset: Expr) -> Expr:
    """One group of products' activations (4 bytes), in every word of a vector."""
    word = reinterpret(load(buffer, offset, isa.group), "int32")
    return T.Bind(reinterpret(T.broadcast(word, isa.words), f"{isa.operand}x{isa.group * isa.words}"))


def dot(isa: Isa, acc: Expr, a: Expr, w: Expr) -> Expr:
    """acc + the sums of groups of products, exact: 4 of unsigned by signed bytes, or 2 of int16."""
    words = f"int32x{isa.words}"
    if isa.vnni:
        return intrinsic(words, "llvm.x86.avx512.vpdpbusd.512", acc, a, w)
    return acc + intrinsic(words, "llvm.x86.avx2.pmadd.wd", a, w)


def multiply_pairs(isa: Isa, a: Expr, w: Expr) -> Expr:
    """The sums of two products of int16 each, in words."""
    name = "avx512.pmaddw.d.512" if isa.lanes == 4 else "avx2.pmadd.wd"
    return intrinsic(f"int32x{isa.words}", f"llvm.x86.{name}", a, w)


def round_scaled(isa: Isa, acc: Expr, multiplier: Expr, bounded: bool) -> Expr:
    """rint(f32(acc) * multiplier) as int32, in words. ``bounded``: the product is known to fit int32.

    The conversion turns what does not fit into INT32_MIN: right below the range, so only the upper end is clamped.
    """
    product = T.cast(acc, f"float32x{isa.words}") * multiplier
    if not bounded:
        product = T.min(product, T.broadcast(tirx.const(2147483520.0, "float32"), isa.words))
    extra: tuple[Expr, ...] = ()
    if isa.lanes == 4:
        name, extra = "llvm.x86.avx512.mask.cvtps2dq.512", (zero_words(isa), tirx.const(-1, "int16"), T.int32(4))
    else:
        name = "llvm.x86.avx.cvt.ps2dq.256"
    return T.Bind(intrinsic(f"int32x{isa.words}", name, product, *extra))


@dataclass(frozen=True)
class Clamp:
    """What follows rounding, in every lane: ``zero`` is z + 128 as int16, ``low`` the least u as uint8."""

    zero: Expr
    low: Expr


def load_clamp(isa: Isa, parameters: Buffer, index: int) -> Clamp:
    """The two words at ``index`` of a kernel's parameters: z + 128 and the lower bound of u."""
    zero = T.Bind(splat(T.cast(parameters[index], "int16"), "int16", isa.bytes // 2))
    return Clamp(zero, T.Bind(splat(T.cast(parameters[index + 1], "uint8"), "uint8", isa.bytes)))


def pack(isa: Isa, words: Sequence[Expr], clamp: Clamp) -> Expr:
    """u = clamp(r + zero, low, 255) of one to four vectors of words; ``len(words) * isa.words`` bytes in order."""
    if isa.lanes == 4:
        packs, packus = "llvm.x86.avx512.packssdw.512", "llvm.x86.avx512.packuswb.512"
    else:
        packs, packus = "llvm.x86.avx2.packssdw", "llvm.x86.avx2.packuswb"
    halves = f"int16x{isa.bytes // 2}"
    count = len(words)
    full = [*words, *[zero_words(isa)] * (4 - count)]
    pairs = [
        T.Bind(intrinsic(halves, "llvm.sadd.sat", intrinsic(halves, packs, full[i], full[i + 1]), clamp.zero))
        for i in (0, 2)
    ]
    u = T.max(T.Bind(intrinsic(f"uint8x{isa.bytes}", packus, *pairs)), clamp.low)
    if count == 4:
        return u
    chosen = tuple(4 * (g // count) + g % count for g in range(isa.lanes * count))
    kept = shuffle((reinterpret(u, f"int32x{isa.words}"),), chosen)
    return reinterpret(kept, f"uint8x{isa.words * count}")


def interleave(isa: Isa, rows: Sequence[Expr]) -> list[Expr]:
    """Three vectors of bytes into four of words: word = (row 0, row 1, row 2, 0), channels in ``lane_order``."""
    zero = splat(0, "uint8", isa.bytes)
    halves = f"int16x{isa.bytes // 2}"
    result = []
    for high in (False, True):
        first = reinterpret(unpack(isa, rows[0], rows[1], 8, high), halves)
        second = reinterpret(unpack(isa, rows[2], zero, 8, high), halves)
        for high_pair in (False, True):
            result.append(T.Bind(reinterpret(unpack(isa, first, second, 16, high_pair), f"uint8x{isa.bytes}")))
    return result


def widen(isa: Isa, u: Expr) -> list[Expr]:
    """A vector of unsigned bytes into four of int32, in ``lane_order``."""
    zero = splat(0, "uint8", isa.bytes)
    words = []
    for high in (False, True):
        half = reinterpret(unpack(isa, u, zero, 8, high), f"int16x{isa.bytes // 2}")
        for high_pair in (False, True):
            word = unpack(isa, half, splat(0, "int16", isa.bytes // 2), 16, high_pair)
            words.append(T.Bind(reinterpret(word, f"int32x{isa.words}")))
    return words


def _pieces(count: int, largest: int) -> list[tuple[int, int]]:
    """Offsets and sizes (powers of two) that make up ``count`` elements after all whole pieces of ``largest``."""
    offset, pieces = count // largest * largest, []
    size = largest
    while offset < count:
        size //= 2
        if count - offset >= size:
            pieces.append((offset, size))
            offset += size
    return pieces


def for_pieces(count: int, largest: int, emit: Callable[[Expr | int, int], None]) -> None:
    """Calls ``emit(offset, size)`` so that all of ``count`` elements are covered, most in a loop of ``largest``."""
    if count >= largest:
        with T.serial(0, count // largest) as i:
            emit(i * largest, largest)
    for offset, size in _pieces(count, largest):
        emit(offset, size)


def lanes(dtype: str, count: int) -> str:
    """The type of ``count`` elements: a vector, or a scalar where there is one."""
    return f"{dtype}x{count}" if count > 1 else dtype


def prefetch(buffer: Buffer, offset: Expr | int, *, write: bool = False) -> None:
    """Asks for a cache line; any address is allowed."""
    intent, near, data = T.int32(int(write)), T.int32(3), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", "llvm.prefetch", T.address_of(buffer[offset]), intent, near, data))


def kernel(symbol: str, parameters: Sequence[Parameter], body: Callable[..., Callable[[Expr], None]]) -> tirx.PrimFunc:
    """``prim_func`` with its frame aligned."""
    return prim_func(symbol, parameters, body, _aligned_frame())


@contextmanager
def _aligned_frame() -> Iterator[None]:
    """A local of 64 bytes that lives throughout and whose address is taken: LLVM then aligns the frame, and with it the
    vectors it spills. Without one it learns of them too late: each straddles two cache lines."""
    anchor = T.alloc_buffer((1,), "int32x16", scope="global")
    prefetch(anchor, 0)
    yield
    prefetch(anchor, 0)
