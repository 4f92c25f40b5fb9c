"""Vectors read one after another for the AArch64 kernels: ld1 of up to four, which moves the address on by itself.

TIR cannot say that: the intrinsic returns a structure. So its functions stand here in LLVM's language; TVM links them
into a kernel that is emitted within ``functions()``, and inlines them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from tvm.tirx.script.builder import ir as T

from .neon import Buffer, Expr, Register

_MOST = 4  # vectors of one ld1

_MOVES = """
; Assembly of no instruction: what lies at the address is loaded anew each time.
define void @xct_stream_at(ptr %stream, ptr %address) {
  %anew = call ptr asm sideeffect "", "=r,0"(ptr %address)
  store ptr %anew, ptr %stream
  ret void
}
; Assembly of no instruction, on which the address depends, and that depends on the value.
define void @xct_stream_after(ptr %stream, <4 x i32> %value) {
  %address = load ptr, ptr %stream
  %later = call ptr asm "", "=r,0,w"(ptr %address, <4 x i32> %value)
  store ptr %later, ptr %stream
  ret void
}
define <16 x i8> @xct_stream_load1(ptr %stream, i64 %step) {
  %address = load ptr, ptr %stream
  %next = getelementptr i8, ptr %address, i64 %step
  store ptr %next, ptr %stream
  %loaded = load <16 x i8>, ptr %address, align 1
  ret <16 x i8> %loaded
}
"""


def _load(count: int) -> str:
    """LLVM IR of a load of ``count`` vectors, which returns them side by side."""
    wide, parts = f"<{16 * count} x i8>", f"{{ {', '.join(['<16 x i8>'] * count)} }}"
    insert = f"@llvm.vector.insert.v{16 * count}i8.v16i8"
    lines = [
        f"declare {parts} @llvm.aarch64.neon.ld1x{count}.v16i8.p0(ptr)",
        f"declare {wide} {insert}({wide}, <16 x i8>, i64)",
        f"define {wide} @xct_stream_load{count}(ptr %stream, i64 %step) {{",
        "  %address = load ptr, ptr %stream",
        "  %next = getelementptr i8, ptr %address, i64 %step",
        "  store ptr %next, ptr %stream",
        f"  %loaded = call {parts} @llvm.aarch64.neon.ld1x{count}.v16i8.p0(ptr %address)",
    ]
    joined = "poison"
    for i in range(count):
        lines.append(f"  %part{i} = extractvalue {parts} %loaded, {i}")
        lines.append(f"  %joined{i} = call {wide} {insert}({wide} {joined}, <16 x i8> %part{i}, i64 {16 * i})")
        joined = f"%joined{i}"
    return "\n".join([*lines, f"  ret {wide} {joined}", "}", ""])


_FUNCTIONS = _MOVES + "".join(_load(count) for count in range(2, _MOST + 1))


def functions(others: Iterable[str] = ()) -> Any:
    """The frame within which a kernel may have streams, and call ``others`` in LLVM's language."""
    return T.attr(T.int32(0), "pragma_import_llvm", "".join([_FUNCTIONS, *others]))


class Stream:
    """An address, kept in a register of the processor."""

    def __init__(self) -> None:
        self._address = T.alloc_buffer((1,), "int64", scope="global")

    def _call(self, dtype: str, name: str, *args: Expr) -> Expr:
        return T.call_extern(dtype, f"xct_stream_{name}", T.address_of(self._address[0]), *args)

    def at(self, buffer: Buffer, offset: Expr) -> None:
        """Where the next vector lies, in bytes."""
        T.evaluate(self._call("void", "at", T.address_of(buffer[offset])))

    def load(self, count: int, after: Sequence[Register], step: Expr | None = None) -> list[Expr]:
        """The next ``count`` int8x16, not loaded before the values that ``after`` (int32x4) now have are computed: left
        alone, LLVM loads as early as it can, and runs out of registers. ``step``: bytes to what is loaded next, if that
        does not lie behind; of 4 vectors at most."""
        for register in after:
            T.evaluate(self._call("void", "after", register.get()))
        loaded: list[Expr] = []
        while len(loaded) < count:
            n = min(_MOST, count - len(loaded))
            wide = T.Bind(self._call(f"int8x{16 * n}", f"load{n}", T.int64(16 * n) if step is None else step))
            loaded += [T.Bind(T.Shuffle([wide], list(range(16 * i, 16 * i + 16)))) for i in range(n)]
        return loaded


class Kept:
    """Vectors (int32x4) that lie in memory until they are wanted, ``count`` in all, so that LLVM need not find
    registers for them in between."""

    def __init__(self, count: int) -> None:
        self.memory = T.alloc_buffer((4 * count,), "int32", scope="global")
        self._stream = Stream()

    def set(self, vectors: Sequence[Expr], first: int = 0) -> None:
        """``vectors``, from the ``first`` on."""
        for i, v in enumerate(vectors, first):
            T.buffer_store(self.memory, v, [T.Ramp(4 * i, 1, 4)])

    def load(self, count: int, together: int = 1) -> list[Expr]:
        """The first ``count``, so many ``together`` by one instruction, and in adjacent registers; of single ones, ldp
        loads two."""
        self._stream.at(self.memory, T.int32(0))
        loaded: list[Expr] = []
        while len(loaded) < count:
            loaded += self._stream.load(min(together, count - len(loaded)), [])
        return [T.reinterpret("int32x4", v) for v in loaded]
