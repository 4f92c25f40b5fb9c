"""The form every family of kernels lowers a network into: a straight line of calls on flat buffers.

A family (``x86/``, ``arm/``, ``generic/``, ``opencl/``, ``cuda/``) has a module ``lower`` with one function::

    lower(graph: Graph, target: TargetSpec, choices: Mapping[str, int] | None) -> tuple[KernelCall, ...]

What shares a kernel, and what it computes, is decided by ``compile/fusion.py``. The family decides how a tensor lies in
memory between its kernels (channel padding, sign bit flipped), which tile a kernel has, and how weights are packed. The
network's inputs and outputs are plain NHWC. ``choices`` are measured task sizes by ``TaskSize.key``; where there is
none, a cost model chooses (GPU families take none).

A processor's kernel is a TIR PrimFunc over flat, one-dimensional buffers followed by two int32 scalars, ``begin`` and
``end``: it does the tasks numbered begin <= t < end of ``tasks``. Tasks of one call are independent and may run on any
thread. A GPU's kernel has the buffers alone, and a ``launch``. Calls run in order; every call sees all writes of the
calls before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import tvm
from numpy.typing import NDArray

from ...models import graph as ir
from ...runtime.plan import COPY, Launch


@dataclass(frozen=True)
class Activation:
    """A tensor of the arena, by the graph node whose value it holds: ``count`` elements of ``dtype``."""

    name: str
    dtype: str
    count: int


@dataclass(frozen=True, eq=False)
class Weights:
    """A constant as this kernel wants it, packed and flat (1-D); equal contents are stored once."""

    data: NDArray[np.generic] = field(repr=False)


def check_one_image(graph: ir.Graph) -> None:
    """Raises GraphError where a tensor is not int8, or is of several images."""
    for node in graph.nodes:
        if node.type.dtype != "int8" or node.type.shape[0] != 1:
            kind = f"{node.type.dtype}{list(node.type.shape)}"
            raise ir.GraphError(f"{node.name} is {kind}; kernels take int8 and a batch of one", node.name, node.path)


def wrap_int32(values: NDArray[np.int64]) -> NDArray[np.int32]:
    """Modulo 2^32: sums of accumulators are exact where the final one fits."""
    return (values & 0xFFFFFFFF).astype(np.uint32).view(np.int32)


def pad_to(values: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """``values`` (1-D), then zeros: ``size`` in all."""
    return np.concatenate([values, np.zeros(size - values.size, values.dtype)])


@dataclass(frozen=True)
class TaskSize:
    """How much of a convolution one task does: ``value`` of ``total`` pixels or rows, in whole blocks of ``step`` where
    that can be. ``key`` is the kernel's symbol without the size.
    """

    key: str
    value: int
    total: int
    step: int


def task_size(choices: Mapping[str, int] | None, key: str, modelled: int, total: int, step: int) -> TaskSize:
    """The measured choice where there is one, else the cost model's. Raises ValueError for one that cannot be."""
    value = (choices or {}).get(key, modelled)
    if not 1 <= value <= total:
        raise ValueError(f"{key}: a task of {value} where there are {total}; tune again")
    return TaskSize(key, value, total, step)


@dataclass(frozen=True)
class KernelCall:
    """One call. ``symbol`` decodes to everything the generated code depends on, so equal symbols share one kernel;
    ``build`` makes its PrimFunc and is called once per symbol. ``operands`` are in the order of its parameters.
    ``output`` is the operand written (the others are only read).

    For per-layer tables: ``name`` is the graph node it completes, ``kind`` one of ``plan.STEP_KINDS``, ``path`` the
    module path, ``macs`` the multiply-accumulates. A processor's call has ``tasks``, and ``size`` is what tuning may
    change of it; a GPU's has a ``launch``. ``traffic_bytes`` is what a launch moves to and from global memory, counted
    from its tiling; each kernel says what it takes a cache to serve. ``requested_bytes`` are all loads and stores of
    all work-groups that local memory or registers do not serve, as if there were no cache (0: not counted).
    """

    symbol: str
    build: Callable[[], tvm.tirx.PrimFunc] = field(repr=False, compare=False)
    operands: tuple[Activation | Weights, ...] = field(repr=False)
    output: str
    name: str
    kind: str = COPY
    path: str = ""
    macs: int = 0
    tasks: int = 1
    size: TaskSize | None = None
    launch: Launch | None = None
    traffic_bytes: int = 0
    requested_bytes: int = 0
