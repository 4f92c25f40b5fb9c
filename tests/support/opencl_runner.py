"""Runs a lowered network's OpenCL kernels through pyopencl, launch by launch, without the native runtime."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from xceptile.compile.backends import opencl as backend
from xceptile.compile.kernels.kernel_call import Activation
from xceptile.compile.kernels.opencl import lower as opencl
from xceptile.models import graph as ir
from xceptile.runtime.plan import ITEM_BYTES
from xceptile.targets.spec import TargetSpec


@cache
def queue() -> Any:
    """On the first device there is; None without OpenCL."""
    try:
        import pyopencl as cl

        devices = [device for platform in cl.get_platforms() for device in platform.get_devices()]
    except Exception:  # no package, no loader or no platform
        return None
    return cl.CommandQueue(cl.Context(devices[:1])) if devices else None


class OpenclRunner:
    """The kernels of a graph. Every tensor has memory of its own, filled with rubbish: padding must not matter.

    ``options`` are build options; ``prelude`` is OpenCL C that comes before the preamble.
    """

    def __init__(self, graph: ir.Graph, target: TargetSpec, options: tuple[str, ...] = (), prelude: str = "") -> None:
        import pyopencl as cl

        self.graph = graph
        self.calls = opencl.lower(graph, target)
        self.queue = queue()
        self.source = prelude + backend.generate(self.calls)
        program = cl.Program(self.queue.context, self.source).build(options=list(options))
        self.kernels = {call.symbol: cl.Kernel(program, call.symbol) for call in self.calls}
        sizes: dict[str, int] = {}
        for call in self.calls:
            for operand in call.operands:
                if isinstance(operand, Activation):
                    sizes[operand.name] = max(sizes.get(operand.name, 0), operand.count * ITEM_BYTES[operand.dtype])
        rng = np.random.default_rng(0)
        rubbish = {name: rng.integers(0, 100, size).astype(np.int8) for name, size in sizes.items()}
        self.memory = {name: self._buffer(data) for name, data in rubbish.items()}
        self.arguments = [
            [self.memory[o.name] if isinstance(o, Activation) else self._buffer(o.data) for o in call.operands]
            for call in self.calls
        ]

    def _buffer(self, data: np.ndarray) -> Any:
        import pyopencl as cl

        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        return cl.Buffer(self.queue.context, flags, hostbuf=np.ascontiguousarray(data))

    def run(self, *inputs: np.ndarray) -> tuple[np.ndarray, ...]:
        """The outputs."""
        import pyopencl as cl

        for node, value in zip(self.graph.inputs, inputs, strict=True):
            cl.enqueue_copy(self.queue, self.memory[node.name], np.ascontiguousarray(value))
        for call, arguments in zip(self.calls, self.arguments, strict=True):
            total = tuple(a * b for a, b in zip(call.launch.groups, call.launch.group_size, strict=True))
            self.kernels[call.symbol](self.queue, total, call.launch.group_size, *arguments)
        results = []
        for name in self.graph.outputs:
            kind = self.graph.type_of(name)
            result = np.empty(kind.shape, kind.dtype)
            cl.enqueue_copy(self.queue, result, self.memory[name])
            results.append(result)
        self.queue.finish()
        return tuple(results)
