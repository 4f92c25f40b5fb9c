"""What every processor's kernel is, whatever it computes: flat operands, the tasks to do, and what TVM must know."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T


@dataclass(frozen=True)
class Parameter:
    """A kernel's operand: a flat buffer of ``count`` elements; None: of as many as a call's operand has."""

    name: str
    dtype: str
    count: int | None


def prim_func(
    symbol: str,
    parameters: Sequence[Parameter],
    body: Callable[..., Callable[[tirx.Expr], None]],
    around: AbstractContextManager[object] | None = None,
) -> tirx.PrimFunc:
    """A kernel over flat buffers, none of which overlap, and the scalars ``begin`` and ``end``: the tasks to do.

    ``body(*buffers)`` emits what is common to all tasks and returns a function that emits one task, given its number.
    All of it is emitted within ``around``, where there is one.
    """
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(symbol)
            counts = [T.int32() if p.count is None else p.count for p in parameters]
            buffers = [T.arg(p.name, T.buffer((n,), p.dtype)) for p, n in zip(parameters, counts, strict=True)]
            begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
            T.func_attr({"global_symbol": symbol, "tirx.noalias": True})
            with around or nullcontext():
                task = body(*buffers)
                # From zero: TVM 0.27 loses the start of a loop inside a loop that itself starts elsewhere.
                with T.serial(0, end - begin) as t:
                    task(begin + t)
    return builder.get()
