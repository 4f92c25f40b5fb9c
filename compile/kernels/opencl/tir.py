"""What OpenCL kernels are written with: a PrimFunc over flat buffers and a grid, and calls of a preamble's functions.

Activations and packed weights are buffers of 16-byte vectors, ``int32x4``: sixteen int8 or eight float16. Whatever
looks inside such a vector is a function ``xct_*`` that the preamble defines (``preamble.cl``), so the kernels
know few element types.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

Expr = Any  # a TIR expression; TVM ships no usable annotations
Buffer = Any
Size = tuple[int, int, int]

VECTOR = "int32x4"
VECTOR_BYTES = 16


@dataclass(frozen=True)
class Parameter:
    """A kernel's operand: a flat buffer of ``count`` elements, of which a kernel of the engine gets the address."""

    dtype: str
    count: int


@dataclass(frozen=True)
class Grid:
    """Where a work-item is: its group's number and its own number in the group, (x, y, z) each."""

    group: tuple[Expr, Expr, Expr]
    item: tuple[Expr, Expr, Expr]


def call(dtype: str, name: str, *args: Expr) -> Expr:
    """A call of a function of the preamble, evaluated here."""
    return T.Bind(T.call_extern(dtype, name, *args))


def bind(value: Expr) -> Expr:
    """Evaluates here, once."""
    return T.Bind(value)


def choose(condition: Expr, value: Expr, otherwise: Expr) -> Expr:
    """``value`` is evaluated only where ``condition`` holds, so it may be a load that would be out of bounds."""
    return T.Bind(T.if_then_else(condition, value, otherwise))


def store(buffer: Buffer, index: Expr | int, value: Expr) -> None:
    T.buffer_store(buffer, value, [index])


def barrier() -> None:
    """All work-items of the group get here, and see each other's writes to local memory."""
    T.evaluate(T.tvm_storage_sync("shared"))


def local_array(count: int, dtype: str = VECTOR) -> Buffer:
    """Memory that a work-group shares."""
    return T.alloc_buffer((count,), dtype, scope="shared")


def registers(count: int, dtype: str) -> Buffer:
    """Memory of one work-item."""
    return T.alloc_buffer((count,), dtype, scope="local")


def when(condition: Expr, emit: Callable[[], None]) -> None:
    with T.If(condition):
        with T.Then():
            emit()


def spread(count: int, items: int, item: Expr, emit: Callable[[Expr], None]) -> None:
    """Calls ``emit`` for every index below ``count``, spread over the ``items`` work-items of a group."""
    if count <= items:
        if count == items:
            emit(item)
        else:
            when(item < count, lambda: emit(item))
        return
    with T.serial(0, -(-count // items)) as turn:
        index = bind(turn * items + item)
        if count % items == 0:
            emit(index)
        else:
            when(index < count, lambda: emit(index))


def kernel(
    symbol: str,
    parameters: Sequence[Parameter],
    groups: Size,
    group_size: Size,
    body: Callable[..., None],
) -> tirx.PrimFunc:
    """A PrimFunc of one launch. ``body(grid, *buffers)`` emits what one work-item does.

    The code generator orders a kernel's parameters by name: their names are numbers.
    """
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(symbol)
            T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
            buffers = [T.arg(f"p{i:02d}", T.buffer((p.count,), p.dtype)) for i, p in enumerate(parameters)]
            with ExitStack() as stack:
                names = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z")
                sizes = (*groups, *group_size)
                at = [stack.enter_context(T.launch_thread(n, size)) for n, size in zip(names, sizes, strict=True)]
                body(Grid((at[0], at[1], at[2]), (at[3], at[4], at[5])), *buffers)
    return builder.get()
