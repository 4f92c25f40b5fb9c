"""The vocabulary of the CUDA kernels: a PrimFunc over thread blocks, and calls of what ``preamble.cuh`` defines.

Tensors are buffers of 32-bit words: four int8 or two float16 each, the first in the low bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Expr = Any  # a TIR expression; TVM ships no usable annotations
Buffer = Any

ITEM_BYTES = {"int8": 1, "float16": 2}
WORD_LANES = {"int8": 4, "float16": 2}
# What a sum of products is kept in.
SUM = {"int8": "int32", "float16": "float32"}


@dataclass(frozen=True)
class Parameter:
    """A pointer of the kernel: ``count`` elements of ``int32`` (also packed words) or ``float32``."""

    name: str
    dtype: str
    count: int


@dataclass(frozen=True)
class Grid:
    """A launch: blocks in one row (x alone may pass 65,535), threads of each, and a block's shared memory."""

    blocks: int
    threads: int
    shared_bytes: int = 0


class Kernel(Protocol):
    """What the lowering launches. ``symbol`` decodes to everything that ``build`` depends on; ``traffic_bytes`` is what
    a launch moves to and from global memory."""

    @property
    def symbol(self) -> str: ...

    @property
    def grid(self) -> Grid: ...

    @property
    def traffic_bytes(self) -> int: ...

    def build(self) -> tirx.PrimFunc: ...


@dataclass(frozen=True, eq=False)
class Thread:
    """Where a thread is: its number in the block, the block's number, and the block's shared memory, in bytes."""

    index: Expr
    block: Expr
    shared: Buffer


def kernel(
    symbol: str,
    parameters: Sequence[Parameter],
    grid: Grid,
    body: Callable[..., None],
    resident_blocks: int = 0,
) -> tirx.PrimFunc:
    """``body(thread, *buffers)`` emits what one thread does. ``resident_blocks``: so many share a multiprocessor, and
    their registers; 0 leaves that to ptxas."""
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(symbol)
            buffers = [T.arg(p.name, T.buffer((p.count,), p.dtype)) for p in parameters]
            T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
            with (
                T.launch_thread("blockIdx.x", grid.blocks) as block,
                T.launch_thread("threadIdx.x", grid.threads) as index,
                T.attr(0, "tirx.launch_bounds_min_blocks_per_sm", resident_blocks)
                if resident_blocks
                else nullcontext(),
            ):
                shared = T.alloc_buffer((grid.shared_bytes,), "int8", scope="shared.dyn") if grid.shared_bytes else None
                body(Thread(index, block, shared), *buffers)
    return builder.get()


def call(function: str, *arguments: Expr, dtype: str = "int32") -> Expr:
    """The value of ``xct_FUNCTION``."""
    return T.call_pure_extern(dtype, f"xct_{function}", *arguments)


def do(function: str, *arguments: Expr) -> None:
    """Calls ``xct_FUNCTION`` for what it does."""
    T.evaluate(T.call_extern("void", f"xct_{function}", *arguments))


def at(buffer: Buffer, index: Expr) -> Expr:
    """The address of an element."""
    return T.address_of(buffer[index])


def registers(count: int, dtype: str = "int32") -> Buffer:
    """An array of the thread's own; in registers where every index is a constant."""
    return T.alloc_buffer((count,), dtype, scope="local")


def put(array: Buffer, index: Expr, value: Expr) -> None:
    T.buffer_store(array, value, [index])


def load_words(target: Buffer, count: int, source: Buffer, index: Expr) -> None:
    """One, two or four words of a tensor from a multiple of that many on, in one access."""
    if count == 1:
        put(target, 0, source[index])
    else:
        do(f"load{count * 4}", at(target, 0), at(source, index))


def store_words(source: Buffer, count: int, target: Buffer, index: Expr) -> None:
    """The reverse."""
    if count == 1:
        put(target, index, source[0])
    else:
        do(f"store{count * 4}", at(target, index), at(source, 0))


def bind(value: Expr) -> Expr:
    """Evaluates here, once."""
    return T.Bind(value)


def when(condition: Expr | bool) -> Any:
    """``with when(c): ...``; a condition that is a Python bool must be True and emits nothing."""
    return _When(condition)


class _When:
    def __init__(self, condition: Expr | bool) -> None:
        self.frames = [] if condition is True else [T.If(condition), T.Then()]

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)


def repeat(count: int, at_once: int, body: Callable[[Expr], None]) -> None:
    """``body(n)`` for n in ``count``, ``at_once`` of them written out in each turn of a loop, so that their loads are
    under way together. Loops themselves are not unrolled by the compiler (``backends/cuda.py``)."""
    turns = count // at_once
    if turns > 1:
        with T.serial(0, turns) as turn:
            first = bind(turn * at_once)
            for i in range(at_once):
                body(first + i)
    for i in range(turns * at_once if turns > 1 else 0, count):
        body(i)


def both(a: Expr | bool, b: Expr | bool) -> Expr | bool:
    """Both conditions; True and False stand for one that always or never holds."""
    if a is True or b is False:
        return b
    return a if b is True or a is False else T.And(a, b)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
