"""A small network on the hand-written kernels of ``fake_kernels.c``, as a bundle for the native runtime."""

from __future__ import annotations

import hashlib
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from support.tree import SOURCES, TEST_SOURCES

from xceptile.runtime.plan import Argument, Plan, PlanTensor, Step, pack

KERNEL_SOURCES = (str(TEST_SOURCES / "fake_kernels.c"), str(SOURCES / "kernel_stub.c"))

SHAPE, CLASSES = (1, 20, 30, 3), 10
COUNT = 20 * 30 * 3
WEIGHTS = (np.arange(7) * 5 - 11).astype(np.int8)


def plan() -> Plan:
    """input -> add_weights -> refuse -> add_weights -> fold -> logits, over two buffers of the arena."""
    x, y = Argument("arena", "int8", 0, COUNT), Argument("arena", "int8", 1856, COUNT)
    weights, logits = Argument("weights", "int8", 0, len(WEIGHTS)), Argument("arena", "int8", 3712, CLASSES)
    steps = (
        Step("add_weights", (x, weights, y), COUNT, "first", "stem.first", 1, "addition", 2),
        Step("refuse", (y, x), COUNT, "second", "stem.second", 2, "relu", 1),
        Step("add_weights", (x, weights, y), COUNT, "third", 'odd "name"', 3, "addition", 2),
        Step("fold", (y, logits), CLASSES, "last", "", 4, "mean", 1),
    )
    tensors = (
        PlanTensor("input", "input", "int8", SHAPE, 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, CLASSES), 0.25, 3, 3712),
    )
    return Plan("cpu", 3776, WEIGHTS.nbytes, tensors, steps)


def images(count: int, seed: int = 0) -> NDArray[np.int8]:
    """(count, 20, 30, 3), small enough that the ``refuse`` kernel is content."""
    return np.random.default_rng(seed).integers(-60, 60, (count, *SHAPE[1:])).astype(np.int8)


def expected(x: NDArray[np.int8]) -> NDArray[np.int8]:
    """What the network computes: (B, 20, 30, 3) -> (B, 10), in wrapping bytes."""
    added = x.reshape(len(x), COUNT) + 2 * np.resize(WEIGHTS, COUNT).astype(np.int64)
    return added.reshape(len(x), -1, CLASSES).sum(axis=1).astype(np.int8)


def compile_kernels(output: Path, compiler: tuple[str, ...] = ("clang",)) -> Path:
    """The kernel library."""
    subprocess.run([*compiler, "-std=c11", "-O1", "-g", "-fPIC", "-shared", *KERNEL_SOURCES, "-o", output], check=True)
    return output


def write_bundle(folder: Path, kernels: bytes, changed: Plan | None = None) -> Path:
    """A bundle's native/ and golden/ folders, without the runtime."""
    native, golden = folder / "native", folder / "golden"
    native.mkdir(parents=True)
    golden.mkdir()
    hashes = [hashlib.sha256(data).hexdigest() for data in (WEIGHTS.tobytes(), kernels)]
    (native / "plan.bin").write_bytes(pack(changed or plan(), *hashes))
    (native / "weights.bin").write_bytes(WEIGHTS.tobytes())
    (native / "kernels.so").write_bytes(kernels)
    x = images(5)
    (golden / "input.bin").write_bytes(x.tobytes())
    (golden / "output.bin").write_bytes(expected(x).tobytes())
    return folder


def with_kernel(name: str) -> Plan:
    """The network with another kernel as its first step."""
    whole = plan()
    return replace(whole, steps=(replace(whole.steps[0], kernel=name), *whole.steps[1:]))
