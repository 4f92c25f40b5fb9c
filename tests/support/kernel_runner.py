"""Runs a lowered network's kernels in this process through TVM itself, task by task, without the native runtime."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import tvm

from xceptile.compile.backends import cpu as backend
from xceptile.compile.kernels.kernel_call import Activation, KernelCall
from xceptile.models import graph as ir
from xceptile.targets.spec import TargetSpec


class KernelRunner:
    """The kernels of a graph. Every tensor has memory of its own, filled with rubbish: padding must not matter."""

    def __init__(
        self, graph: ir.Graph, target: TargetSpec, lower: Callable[..., tuple[KernelCall, ...]] | None = None
    ) -> None:
        self.graph = graph
        self.calls = (lower or backend.lower)(graph, target)
        self.executable = backend.compile_kernels(self.calls, target)
        sizes: dict[str, tuple[str, int]] = {}
        for call in self.calls:
            for operand in call.operands:
                if isinstance(operand, Activation):
                    _, count = sizes.get(operand.name, ("", 0))
                    sizes[operand.name] = (operand.dtype, max(count, operand.count))
        rng = np.random.default_rng(0)
        self.memory = {
            name: tvm.runtime.tensor(rng.integers(0, 100, count).astype(dtype))
            for name, (dtype, count) in sizes.items()
        }
        self.arguments = [
            [
                self.memory[operand.name]._create_view((operand.count,))
                if isinstance(operand, Activation)
                else tvm.runtime.tensor(operand.data)
                for operand in call.operands
            ]
            for call in self.calls
        ]

    def assembly(self) -> str:
        text: str = self.executable.mod.inspect_source("asm")
        return text

    def run(self, *inputs: np.ndarray, order: Callable[[int], Iterable[int]] | None = None) -> tuple[np.ndarray, ...]:
        """The outputs. ``order`` maps a number of tasks to their numbers in the order to do them, one at a time."""
        for node, value in zip(self.graph.inputs, inputs, strict=True):
            self.memory[node.name].copyfrom(value.reshape(-1))
        for call, arguments in zip(self.calls, self.arguments, strict=True):
            function = self.executable.mod[call.symbol]
            if order is None:
                function(*arguments, 0, call.tasks)
                continue
            for task in order(call.tasks):
                function(*arguments, task, task + 1)
        types = [(name, self.graph.type_of(name)) for name in self.graph.outputs]
        return tuple(self.memory[name].numpy()[: kind.size_bytes].reshape(kind.shape) for name, kind in types)
