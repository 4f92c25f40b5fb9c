"""A batch of images on kernels that take one: the network is run for one image after the other.

An image's activations then stay in the caches that one image's fit into, the arena hardly grows, and every image costs
what it costs alone. Each image is copied out of the network's inputs before and its results into the outputs after: an
image's bytes are seldom a multiple of the 64 at which a kernel's operands begin. Works for every processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ...models import graph as ir
from .kernel_call import Activation, KernelCall
from .prim_func import Parameter, prim_func

JOINED = 14  # tensors that one call puts together; a step of a plan has 16 operands at most


@dataclass(frozen=True)
class Copy:
    """Sources of ``counts`` elements one behind the other, all that lies from ``start`` on for ``size`` elements."""

    dtype: str
    counts: tuple[int, ...]
    start: int
    size: int

    @property
    def symbol(self) -> str:
        counts = "_".join(map(str, self.counts))
        return f"copy_{self.dtype}_{counts}_from{self.start}_size{self.size}"

    def build(self) -> tirx.PrimFunc:
        """Operands: the sources, y. It has one task."""
        sources = [Parameter(f"x{i}", self.dtype, n) for i, n in enumerate(self.counts)]

        def body(*buffers: tirx.Buffer) -> Callable[[tirx.Expr], None]:
            *xs, y = buffers

            def task(_: tirx.Expr) -> None:
                done = 0
                for x, count in zip(xs, self.counts, strict=True):
                    length = min(count, self.size)
                    with T.serial(0, length) as i:
                        T.buffer_store(y, x[i + self.start], [i + done])
                    done += length

            return task

        return prim_func(self.symbol, [*sources, Parameter("y", self.dtype, self.size)], body)


def repeat(graph: ir.Graph, calls: Sequence[KernelCall]) -> tuple[KernelCall, ...]:
    """Given: a graph whose first dimension is the batch, and the calls of the same graph with one image.
    Result: the calls of the whole batch. Image i's tensors are named ``NAME[i]``.
    """
    batch = graph.inputs[0].type.shape[0]
    repeated = []
    for image in range(batch):
        repeated += [_take(node.name, node.type, image) for node in graph.inputs]
        repeated += [_of_image(call, image) for call in calls]
    for name in graph.outputs:
        repeated += _join(name, graph.type_of(name))
    return tuple(repeated)


def _of_image(call: KernelCall, image: int) -> KernelCall:
    operands = tuple(replace(o, name=f"{o.name}[{image}]") if isinstance(o, Activation) else o for o in call.operands)
    return replace(call, operands=operands, output=f"{call.output}[{image}]", name=f"{call.name}[{image}]")


def _take(name: str, kind: ir.TensorType, image: int) -> KernelCall:
    """One image of an input."""
    count = int(np.prod(kind.shape[1:]))
    copy = Copy(kind.dtype, (kind.shape[0] * count,), image * count, count)
    operands = Activation(name, kind.dtype, copy.counts[0]), Activation(f"{name}[{image}]", kind.dtype, count)
    return KernelCall(copy.symbol, copy.build, operands, f"{name}[{image}]", f"{name}[{image}]")


def _join(name: str, kind: ir.TensorType) -> list[KernelCall]:
    """All images of an output, some at a time, each behind those that are together already."""
    batch, count = kind.shape[0], int(np.prod(kind.shape[1:]))
    calls: list[KernelCall] = []
    together: list[Activation] = []
    for first in range(0, batch, JOINED):
        last = min(first + JOINED, batch)
        sources = [*together, *(Activation(f"{name}[{i}]", kind.dtype, count) for i in range(first, last))]
        copy = Copy(kind.dtype, tuple(source.count for source in sources), 0, last * count)
        target = Activation(name if last == batch else f"{name}[..{last}]", kind.dtype, last * count)
        calls.append(KernelCall(copy.symbol, copy.build, (*sources, target), target.name, target.name))
        together = [target]
    return calls
