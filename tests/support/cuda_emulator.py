"""Runs a network lowered for CUDA on this machine's processor: its very source, after ``cuda_on_cpu.h``."""

from __future__ import annotations

import ctypes
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from support.needs import requires
from support.tree import TEST_SOURCES

from xceptile.compile.backends import cuda as backend
from xceptile.compile.backends.assembly import assemble
from xceptile.compile.kernels.cuda import lower as family
from xceptile.compile.kernels.kernel_call import Activation, Weights
from xceptile.models import graph as ir
from xceptile.runtime.plan import PlanTensor
from xceptile.targets.spec import TargetSpec

_HEADER = TEST_SOURCES / "cuda_on_cpu.h"
_MARGIN = 1 << 16  # bytes around the arena and the weights in which accesses are looked at
_FLAGS = ("-O0", "-g0", "-std=c++17", "-mf16c", "-mfma", "-ffp-contract=off", "-fwrapv", "-fPIC", "-shared", "-w")
# Of the emulator itself nothing is counted, so that its own use of the standard library need not be looked at.
_UNSEEN = TEST_SOURCES / "cuda_uncounted.txt"
_COUNTING = (
    "-fsanitize=thread",
    f"-fsanitize-ignorelist={_UNSEEN}",
    *("-mllvm", "-tsan-instrument-func-entry-exit=0", "-mllvm", "-tsan-instrument-memintrinsics=0"),
)


class Traffic(NamedTuple):
    """What accesses of one of the memories by the warps of a launch's first block cost, and at best would cost.

    Shared memory: wavefronts, in each of which every bank gives one word. Global memory: sectors of 32 bytes.
    """

    accesses: int
    cost: int
    least: int


def compile_kernels(source: str, library: Path, *flags: str) -> None:
    """CUDA C++ as a shared library whose ``emulate`` runs a launch; the C++ is kept beside it."""
    text = library.with_suffix(".cpp")
    text.write_text(f'#include "{_HEADER}"\n{source}')
    subprocess.run(["clang++", *_FLAGS, *flags, str(text), "-o", str(library)], check=True)


class EmulatedNetwork:
    """A graph's plan, on kernels compiled once."""

    def __init__(self, graph: ir.Graph, target: TargetSpec, folder: Path, *, counted: bool = False) -> None:
        self.graph, self.counted = graph, counted
        self.traffic: dict[str, dict[str, Traffic]] = {}  # by kernel, of the last run: "shared", "global"
        calls = family.lower(graph, target)
        assert target.gpu is not None
        self.plan, self.weights = assemble(graph, calls, "cuda")
        self._operand_bytes = [[_size_bytes(operand) for operand in call.operands] for call in calls]
        self.source = backend.kernel_source(calls, target.gpu.arch)
        self.compile(self.source, folder)

    def compile(self, source: str, folder: Path) -> None:
        """Replaces the kernels; tests plant faults in them this way."""
        folder.mkdir(parents=True, exist_ok=True)
        library = folder / f"kernels{len(list(folder.glob('*.so')))}.so"
        compile_kernels(source, library, *(_COUNTING if self.counted else ()))
        self._library = ctypes.CDLL(str(library))
        self._library.emulate.restype = ctypes.c_char_p

    def run(self, *inputs: np.ndarray, seed: int = 0, early: bool = False) -> tuple[np.ndarray, ...]:
        """The outputs. ``seed`` other than 0 runs the threads in some other order; ``early``: asynchronous copies
        arrive at once, not at the last moment. Raises RuntimeError where a launch breaks CUDA's rules, or where what
        counts accesses sees one beside the launch's operands."""
        arena = _aligned(np.random.default_rng(0).integers(0, 256, self.plan.arena_bytes, np.uint8))  # rubbish
        spaces = {"arena": arena, "weights": _aligned(np.frombuffer(self.weights, np.uint8))}
        given = dict(zip((node.name for node in self.graph.inputs), inputs, strict=True))
        results = {}
        if self.counted:
            ends = [end for x in spaces.values() for end in (x.ctypes.data - _MARGIN, x.ctypes.data + x.size + _MARGIN)]
            (ctypes.c_void_p * 4).in_dll(self._library, "global_memory")[:] = ends
        counters = (ctypes.c_ulonglong * 6).in_dll(self._library, "traffic")
        for tensor in self.plan.tensors:
            if tensor.kind == "input":
                self._slice(arena, tensor)[:] = given[tensor.name]
        for step, sizes in zip(self.plan.steps, self._operand_bytes, strict=True):
            assert step.launch is not None
            (ctypes.c_long * 16).in_dll(self._library, "operand_bytes")[: len(sizes)] = sizes
            addresses = [spaces[a.space].ctypes.data + a.offset_bytes for a in step.arguments]
            pointers = (ctypes.c_void_p * len(addresses))(*addresses)
            groups = (ctypes.c_uint * 3)(*step.launch.groups)
            function = ctypes.cast(getattr(self._library, step.kernel), ctypes.c_void_p)
            threads = step.launch.group_size[0]
            counters[:] = [0] * 6
            error = self._library.emulate(function, pointers, len(addresses), groups, threads, seed, int(early))
            if error:
                raise RuntimeError(f"{step.kernel}: {error.decode()}")
            self.traffic[step.kernel] = {"shared": Traffic(*counters[:3]), "global": Traffic(*counters[3:])}
        for tensor in self.plan.tensors:
            results[tensor.name] = self._slice(arena, tensor)
        return tuple(results[name] for name in self.graph.outputs)

    @staticmethod
    def _slice(arena: np.ndarray, tensor: PlanTensor) -> np.ndarray:
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        return arena[tensor.offset_bytes : tensor.offset_bytes + size].view(tensor.dtype).reshape(tensor.shape)


def _size_bytes(operand: Activation | Weights) -> int:
    return operand.count * np.dtype(operand.dtype).itemsize if isinstance(operand, Activation) else operand.data.nbytes


def _aligned(data: np.ndarray) -> np.ndarray:
    """A copy at a multiple of 64 bytes, with margins."""
    room = np.empty(data.size + 2 * _MARGIN + 64, np.uint8)
    start = _MARGIN + -room.ctypes.data % 64
    room[start : start + data.size] = data
    return room[start : start + data.size]


FAKES = {
    "driver": [],
    "nvrtc": ["-DNVRTC"],
    "old": ["-DOLD"],
    "old_nvrtc": ["-DNVRTC", "-DOLD"],
    "too_old": ["-DTOO_OLD"],
}


def compile_fakes(folder: Path, names: Iterable[str], *compiler: str) -> None:
    for name in names:
        source = str(TEST_SOURCES / "fake_cuda.c")
        options = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared", "-fvisibility=hidden", *FAKES[name]]
        subprocess.run([*compiler, *options, source, "-ldl", "-o", str(folder / f"{name}.so")], check=True)


def emulation(folder: Path, *sources: Path) -> dict[str, str]:
    """The environment in which the runtime finds a fake driver that runs the kernels of these ``kernels.cu`` here."""
    compile_fakes(folder, ("driver",), "clang", "-g")
    libraries = [folder / f"kernels{i}.so" for i in range(len(sources))]
    for source, library in zip(sources, libraries, strict=True):
        compile_kernels(source.read_text(), library)
    return {"XCEPTILE_CUDA": str(folder / "driver.so"), "FAKE_KERNELS": ":".join(map(str, libraries))}


emulated = [
    requires("clang++", package="clang"),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation of CUDA is written for x86-64"),
]
