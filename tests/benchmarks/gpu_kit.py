"""Makes the kit that ``borrowed_gpu.py`` runs on a machine with an NVIDIA GPU: ``make gpu-kit``.

The kit (build/gpu_kit) is one folder to be copied, of less than 60 MiB: compiled operators for every Jetson
architecture, the whole Xception at 299x299 for Jetson Orin in int8, batch 1 and 8, and a narrow one in float16, each
with an input and the reference's outputs; the runtime for x86-64 and AArch64; the network for torch; the script itself.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.torch_network import AXES, symmetric
from support.cuda_graphs import chains, operator_graphs
from support.emulated_bundle import merged
from support.int8_graphs import as_float, photo, random_input, random_xception

from xceptile.compile.backends import cuda, native_runtime
from xceptile.compile.kernels.cuda import lower as family
from xceptile.compile.kernels.kernel_call import KernelCall
from xceptile.compile.passes.set_batch import set_batch
from xceptile.compile.passes.take_int8_pixels import take_int8_pixels
from xceptile.models import graph as ir
from xceptile.runtime import reference
from xceptile.runtime.plan import ITEM_BYTES, Plan, unpack
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

BOARDS = ("orin", "xavier", "tx2", "nano")
ORIN = catalog.get("jetson-orin")
FLOAT16_TOLERANCE = 0.05  # of the largest logit
HERE = Path(__file__).resolve()
Rows = dict[str, tuple[list[int], int, int]]  # of tensors, by name: each row's CRC-32, pixels, channels


def write(
    kit: Path,
    name: str,
    graph: ir.Graph,
    target: TargetSpec,
    x: list[np.ndarray],
    expected: list[np.ndarray],
    batch: int,
    rows: Rows | None = None,
) -> dict[str, Any]:
    """One network's folder; returns its entry in kit.json. ``batch`` 0: not to be timed. With the ``rows`` of its
    tensors each step can be checked."""
    folder = kit / name
    folder.mkdir(parents=True)
    assert target.gpu is not None
    calls = family.lower(graph, target)
    files = cuda.files_of(graph, calls, target.gpu.arch)
    for file, data in files.items():
        (folder / file).write_bytes(data)
    if rows is not None:
        (folder / "steps.json").write_text(json.dumps(describe_steps(unpack(files["plan.bin"]), calls, rows)))
    (folder / "input.bin").write_bytes(b"".join(each.tobytes() for each in x))
    (folder / "expected.bin").write_bytes(b"".join(each.tobytes() for each in expected))
    outputs = [{"name": n, "bytes": y.nbytes} for n, y in zip(graph.outputs, expected, strict=True)]
    dtype = str(expected[0].dtype)
    return {
        "name": name, "target": target.name, "dtype": dtype, "outputs": outputs, "batch": batch,
        "tolerance": FLOAT16_TOLERANCE,
    }  # fmt: skip


def trace(graph: ir.Graph, x: list[np.ndarray]) -> tuple[list[np.ndarray], Rows]:
    """The reference's outputs, and of every int8 tensor the CRC-32 of each row (of one position in height)."""
    feeds = {node.name: value for node, value in zip(graph.inputs, x, strict=True)}
    rows: Rows = {}
    outputs = {}
    for name, value in reference.iterate(graph, feeds):
        flat = value.reshape(value.shape[0] * (value.shape[1] if value.ndim == 4 else 1), -1)
        channels = value.shape[-1]
        rows[name] = [zlib.crc32(row.tobytes()) for row in flat], value.size // channels, channels
        if name in graph.outputs:
            outputs[name] = value
    return [outputs[name] for name in graph.outputs], rows


def describe_steps(plan: Plan, calls: Sequence[KernelCall], rows: Rows) -> dict[str, Any]:
    """What ``borrowed_gpu.walk`` launches. A step whose output is no tensor of the graph has no rows; in memory a
    pixel's channels are padded."""
    steps = []
    for step, call in zip(plan.steps, calls, strict=True):
        assert step.launch is not None
        output = step.arguments[
            next(i for i, each in enumerate(call.operands) if getattr(each, "name", "") == call.output)
        ]
        size = output.count * ITEM_BYTES[output.dtype]
        crcs, pixels, channels = rows.get(call.output.removesuffix(".stored"), (None, 1, 0))
        steps.append({
            "name": step.name, "kernel": step.kernel, "groups": step.launch.groups,
            "group_size": step.launch.group_size, "shared_bytes": step.launch.shared_bytes,
            "arguments": [(each.space, each.offset_bytes) for each in step.arguments],
            "output": (output.offset_bytes, size), "rows": crcs, "channels": channels, "stored": size // pixels,
        })  # fmt: skip
    inputs = [t for t in plan.tensors if t.kind == "input"]
    sizes = [math.prod(t.shape) * ITEM_BYTES[t.dtype] for t in inputs]
    places = [(t.offset_bytes, size) for t, size in zip(inputs, sizes, strict=True)]
    return {"arena_bytes": plan.arena_bytes, "inputs": places, "steps": steps}


def operators(kit: Path, board: str) -> dict[str, Any]:
    """Every operator and the chains that kernels are joined over, as one network."""
    graph = merged([*operator_graphs(), *chains()])
    x = list(random_input(graph, 0))
    expected, rows = trace(graph, x)
    return write(kit, f"operators-{board}", graph, catalog.get(f"jetson-{board}"), x, expected, 0, rows)


def networks(kit: Path, graph: ir.Graph, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """The whole network in int8 for Jetson Orin."""
    _, height, width, _ = graph.inputs[0].type.shape
    images = np.concatenate([photo(height, width, seed) for seed in range(max(batches))])
    traced = [trace(graph, [image[None]]) for image in images]
    expected = np.concatenate([y for (y,), _ in traced])

    def rows(batch: int) -> Rows:
        each = [rows for _, rows in traced[:batch]]
        return {n: ([crc for r in each for crc in r[n][0]], batch * each[0][n][1], each[0][n][2]) for n in each[0]}

    return [
        write(kit, f"int8-batch{n}", set_batch(graph, n), ORIN, [images[:n]], [expected[:n]], n, rows(n))
        for n in batches
    ]


def float16(kit: Path, graph: ir.Graph) -> dict[str, Any]:
    """Its float network as the float16 build computes it, of two images: not to be timed."""
    real, image = as_float(graph), graph.inputs[0]
    half = set_batch(take_int8_pixels(real, image.type.per_tensor), 2)
    _, height, width, _ = image.type.shape
    x = np.concatenate([photo(height, width, seed) for seed in range(2)])
    expected = np.concatenate([reference.run(real, each[None].astype(np.float32) + 128)[0] for each in x])
    return write(kit, "float16", half, ORIN, [x], [expected], 0)


def describe_for_torch(real: ir.Graph) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The float network in torch's words, with the weights' shapes; and the weights, in torch's layout."""
    nodes: list[dict[str, Any]] = []
    weights: dict[str, np.ndarray] = {}
    for node in real.nodes:
        op, row = node.op, {"name": node.name, "weights": [], "relu": getattr(node.op, "relu", False)}
        row["inputs"] = [name for name in node.inputs if name not in real.constants]
        if len(node.inputs) == 3:
            weight, bias = (real.constants[name].data for name in node.inputs[1:])
            weight = weight.transpose(AXES.get(type(op), tuple(range(weight.ndim))))
            weights[node.inputs[1]] = weight[:, None] if isinstance(op, ir.DepthwiseConv2d) else weight
            weights[node.inputs[2]] = bias
            row["weights"] = list(node.inputs[1:])
        match op:
            case ir.Input():
                continue
            case ir.Conv2d() | ir.DepthwiseConv2d():
                groups = node.type.shape[3] if isinstance(op, ir.DepthwiseConv2d) else 1
                row |= {"op": "conv", "strides": op.strides, "padding": symmetric(op.padding), "groups": groups}
            case ir.MaxPool2d():
                row |= {"op": "max_pool", "kernel": op.kernel, "strides": op.strides, "padding": symmetric(op.padding)}
            case ir.FullyConnected():
                row["op"] = "linear"
            case ir.Relu():
                row["op"] = "relu"
            case ir.Add():
                row["op"] = "add"
            case ir.GlobalAveragePool():
                row["op"] = "mean"
            case _:
                raise NotImplementedError(f"{op}")
        nodes.append(row)
    _, height, width, channels = real.inputs[0].type.shape
    described = {
        "input": real.inputs[0].name, "output": real.outputs[0], "shape": [channels, height, width], "nodes": nodes,
        "weights": {name: value.shape for name, value in weights.items()},
    }  # fmt: skip
    return described, weights


def make(kit: Path, *, size: int = 299, width: float = 1.0, batches: tuple[int, ...] = (1, 8),
         boards: tuple[str, ...] = BOARDS) -> None:  # fmt: skip
    """The whole kit, made beside its place and renamed."""
    aside = kit.with_name(kit.name + ".part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    graph = random_xception(size, width, 1000 if width == 1.0 else 10, same_padding=False)
    narrow = random_xception(size, min(width, 0.25), 10, same_padding=False)
    entries = [operators(aside, board) for board in boards]
    entries += [*networks(aside, graph, batches), float16(aside, narrow)]
    (aside / "torch.json").write_text(json.dumps(describe_for_torch(as_float(graph))[0]))
    for architecture, target in (("x86_64", "avx2"), ("aarch64", "jetson-orin")):
        library = native_runtime.build(catalog.get(target))["libxceptile.so"]
        (aside / f"libxceptile-{architecture}.so").write_bytes(library)
    shutil.copy(HERE.with_name("borrowed_gpu.py"), aside)
    (aside / "kit.json").write_text(json.dumps({"networks": entries}))
    shutil.rmtree(kit, ignore_errors=True)
    aside.rename(kit)


def pack(kit: Path) -> None:
    """Every network's folder becomes a file, of less than nine tenths its size."""
    for folder in [each for each in kit.iterdir() if each.is_dir()]:
        shutil.make_archive(str(folder), "zip", folder)
        shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("build/gpu_kit"))
    parser.add_argument("--quick", action="store_true", help="a small network for one board: to try the kit itself")
    options = parser.parse_args()
    if options.quick:
        make(options.output, size=75, width=0.125, batches=(1, 2), boards=("orin",))
    else:
        make(options.output)
    pack(options.output)
    print(f"{options.output}: copy it to the machine with the GPU and run `python borrowed_gpu.py` in it")
