"""Runs a network lowered for CUDA on this machine's processor: its very source, after ``native/cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import numpy as np

from xceptile.compile.backends import cuda as backend
from xceptile.compile.kernels import cuda as family
from xceptile.compile.kernels.call import Activation
from xceptile.models import graph as ir
from xceptile.targets.spec import TargetSpec

_HEADER = Path(__file__).parent / "native" / "cuda_on_cpu.h"
_FLAGS = ("-O0", "-g0", "-std=c++17", "-mf16c", "-mfma", "-ffp-contract=off", "-fwrapv", "-fPIC", "-shared", "-w")


class EmulatedNetwork:
    """A graph's launches, compiled once. Every tensor has memory of its own, filled with rubbish."""

    def __init__(self, graph: ir.Graph, target: TargetSpec, folder: Path) -> None:
        self.graph = graph
        self.calls = family.lower(graph, target)
        assert target.gpu is not None
        self.source = backend.kernel_source(self.calls, target.gpu.arch)
        self.compile(self.source, folder)

    def compile(self, source: str, folder: Path) -> None:
        """Replaces the kernels; tests plant faults in them this way."""
        folder.mkdir(parents=True, exist_ok=True)
        count = len(list(folder.glob("*.so")))
        text, library = folder / f"kernels{count}.cpp", folder / f"kernels{count}.so"
        text.write_text(f'#include "{_HEADER}"\n{source}')
        subprocess.run(["clang++", *_FLAGS, str(text), "-o", str(library)], check=True)
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = ctypes.c_char_p

    def run(self, *inputs: np.ndarray, seed: int = 0, early: bool = False) -> tuple[np.ndarray, ...]:
        """The outputs. ``seed`` other than 0 runs the threads in some other order; ``early``: asynchronous copies
        arrive at once, not at the last moment. Raises RuntimeError where a launch breaks CUDA's rules."""
        rng = np.random.default_rng(0)
        sizes: dict[str, int] = {}
        for call in self.calls:
            for operand in call.operands:
                if isinstance(operand, Activation):
                    size = operand.count * np.dtype(operand.dtype).itemsize
                    sizes[operand.name] = max(size, sizes.get(operand.name, 0))
        memory = {name: _aligned(rng.integers(0, 256, size, np.uint8)) for name, size in sizes.items()}
        for node, value in zip(self.graph.inputs, inputs, strict=True):
            memory[node.name][:] = np.ascontiguousarray(value).view(np.uint8).reshape(-1)
        for call in self.calls:
            arrays = [
                memory[operand.name] if isinstance(operand, Activation) else _aligned(operand.data.view(np.uint8))
                for operand in call.operands
            ]
            pointers = (ctypes.c_void_p * len(arrays))(*(array.ctypes.data for array in arrays))
            groups = (ctypes.c_uint * 3)(*call.groups)
            function = ctypes.cast(getattr(self._library, call.symbol), ctypes.c_void_p)
            error = self._library.emulate(function, pointers, len(arrays), groups, call.group_size[0], seed, int(early))
            if error:
                raise RuntimeError(f"{call.symbol}: {error.decode()}")
        results = []
        for name in self.graph.outputs:
            kind = self.graph.type_of(name)
            results.append(memory[name][: kind.size_bytes].view(kind.dtype).reshape(kind.shape))
        return tuple(results)


def _aligned(data: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes."""
    room = np.empty(data.size + 64, np.uint8)
    start = -room.ctypes.data % 64
    room[start : start + data.size] = data
    return room[start : start + data.size]
