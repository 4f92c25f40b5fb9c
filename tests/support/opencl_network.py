"""A small network on hand-written OpenCL kernels, as a bundle for the native runtime.

It computes what ``fake_network`` computes: input -> add_weights -> add_weights -> fold -> logits.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from support.fake_network import CLASSES, COUNT, SHAPE, WEIGHTS, expected, images

from xceptile.runtime.plan import Argument, Launch, Plan, PlanTensor, Step, pack

KERNELS = b"""
#ifndef XCT_DOT
#error "the runtime names the dot product"
#endif

__kernel void add_weights(__global const char *x, __global const char *weights, __global char *y)
{
    size_t i = (get_global_id(2) * get_global_size(1) + get_global_id(1)) * get_global_size(0) + get_global_id(0);
    y[i] = x[i] + weights[i % 7];
}

/* One group for each class; its items add up what they can reach and then each other's. */
__kernel void fold(__global const char *x, __global char *logits)
{
    __local int sums[32];
    int item = get_local_id(0), total = 0;
    for (int i = item; i < 180; i += 32)
        total += x[i * 10 + get_group_id(0)];
    sums[item] = total;
    barrier(CLK_LOCAL_MEM_FENCE);
    for (int others = 16; others > 0; others /= 2) {
        if (item < others)
            sums[item] += sums[item + others];
        barrier(CLK_LOCAL_MEM_FENCE);
    }
    if (item == 0)
        logits[get_group_id(0)] = (char)sums[0];
}
"""


def plan() -> Plan:
    """The launches of ``add_weights`` have three dimensions, so that their order matters."""
    x, y = Argument("arena", "int8", 0, COUNT), Argument("arena", "int8", 2048, COUNT)
    weights, logits = Argument("weights", "int8", 0, len(WEIGHTS)), Argument("arena", "int8", 4096, CLASSES)
    add = Launch((3, 5, 3), (10, 4, 1))
    steps = (
        Step("add_weights", (x, weights, y), 1, "first", "stem.first", 1, "addition", 2, add),
        Step("add_weights", (y, weights, x), 1, "second", "stem.second", 2, "addition", 2, add),
        Step("fold", (x, logits), 1, "last", "", 4, "mean", 1, Launch((CLASSES, 1, 1), (32, 1, 1))),
    )
    tensors = (
        PlanTensor("input", "input", "int8", SHAPE, 1.0, -128, 0),
        PlanTensor("logits", "output", "int8", (1, CLASSES), 0.25, 3, 4096),
    )
    return Plan("opencl", 4608, WEIGHTS.nbytes, tensors, steps)


def write_bundle(folder: Path, kernels: bytes = KERNELS, changed: Plan | None = None) -> Path:
    """A bundle's native/ and golden/ folders, without the runtime."""
    native, golden = folder / "native", folder / "golden"
    native.mkdir(parents=True)
    golden.mkdir()
    hashes = [hashlib.sha256(data).hexdigest() for data in (WEIGHTS.tobytes(), kernels)]
    (folder / "manifest.json").write_text("{}")
    (native / "plan.bin").write_bytes(pack(changed or plan(), *hashes))
    (native / "weights.bin").write_bytes(WEIGHTS.tobytes())
    (native / "kernels.cl").write_bytes(kernels)
    x = images(5)
    (golden / "input.bin").write_bytes(x.tobytes())
    (golden / "output.bin").write_bytes(expected(x).tobytes())
    return folder
