"""A compiled int8 graph in a folder, run by the shipped runtime under qemu: any inputs and outputs, many images."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from xceptile.compile.backends import assembly, native_runtime
from xceptile.compile.backends import cpu as backend
from xceptile.compile.kernels.kernel_call import KernelCall
from xceptile.models import graph as ir
from xceptile.runtime.devices.qemu import emulator_command
from xceptile.runtime.plan import pack
from xceptile.targets.spec import TargetSpec


def merged(graphs: Sequence[ir.Graph]) -> ir.Graph:
    """Independent graphs as one, so that one process runs them all: the i-th one's names begin with ``i_name.``."""
    nodes: list[ir.Node] = []
    constants: dict[str, ir.Constant] = {}
    outputs: list[str] = []
    for index, graph in enumerate(graphs):
        prefix = f"{index}_{graph.name}."
        constants |= {prefix + name: constant for name, constant in graph.constants.items()}
        outputs += [prefix + name for name in graph.outputs]
        nodes += [
            replace(node, name=prefix + node.name, inputs=tuple(prefix + name for name in node.inputs))
            for node in graph.nodes
        ]
    nodes.sort(key=lambda node: not isinstance(node.op, ir.Input))
    return ir.Graph("merged", tuple(nodes), constants, tuple(outputs))


class EmulatedBundle:
    """A graph's ``calls``, compiled. ``assembly`` is what LLVM wrote, ``folder`` what the runtime opens."""

    def __init__(self, graph: ir.Graph, calls: Sequence[KernelCall], target: TargetSpec, folder: Path) -> None:
        self.graph, self.target, self.folder = graph, target, folder
        executable = backend.compile_kernels(calls, target)
        self.assembly: str = executable.mod.inspect_source("asm")
        self.program = folder / "xceptile-run"
        self.program.write_bytes(native_runtime.build(target)["xceptile-run"])
        self.program.chmod(0o755)
        (folder / "kernels.so").write_bytes(backend.link(executable, target))
        self.assemble(calls)

    def assemble(self, calls: Sequence[KernelCall]) -> None:
        """The plan and the weights of calls whose kernels are compiled."""
        plan, weights = assembly.assemble(self.graph, calls, "cpu", self.target.features)
        library = (self.folder / "kernels.so").read_bytes()
        digests = [hashlib.sha256(data).hexdigest() for data in (weights, library)]
        (self.folder / "weights.bin").write_bytes(weights)
        (self.folder / "plan.bin").write_bytes(pack(plan, *digests))

    def run(
        self, images: Sequence[Sequence[np.ndarray]], *, threads: int = 1, emulator_options: Sequence[str] = ()
    ) -> list[list[np.ndarray]]:
        """Each image's outputs, in the graph's order; an image is one array for every input. One process for all."""
        source, result = self.folder / "in.bin", self.folder / "out.bin"
        source.write_bytes(b"".join(x.tobytes() for image in images for x in image))
        emulator, *options = emulator_command(self.target)
        command = [emulator, *emulator_options, *options, str(self.program), f"--threads={threads}"]
        done = subprocess.run(
            [*command, str(self.folder), str(source), str(result)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{done.returncode}: {done.stderr}"
        data = np.frombuffer(result.read_bytes(), np.int8)
        shapes = [self.graph.type_of(name).shape for name in self.graph.outputs]
        ends = np.cumsum([np.prod(shape, dtype=np.int64) for shape in shapes])
        return [
            [part.reshape(shape) for part, shape in zip(np.split(one, ends[:-1]), shapes, strict=True)]
            for one in np.split(data, len(images))
        ]
