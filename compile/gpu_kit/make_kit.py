"""Makes the kit that ``borrowed_gpu.py`` runs on a machine with an NVIDIA GPU.

The kit is one folder to be copied: compiled operators for every Jetson architecture, a whole network for Jetson Orin in
int8, in several batch sizes, and a narrow one in float16, each with an input and the reference's outputs; the runtime
for x86-64 and AArch64; the network for torch; the script itself.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...models import graph as ir
from ...runtime import reference
from ...runtime.atomic_directory import written_directory
from ...runtime.plan import ITEM_BYTES, Plan, unpack
from ...targets import catalog
from ...targets.spec import TargetSpec
from ..backends import cuda, native_runtime
from ..kernels.cuda import lower as family
from ..kernels.kernel_call import KernelCall
from ..passes.set_batch import set_batch
from ..passes.take_int8_pixels import take_int8_pixels
from .torch_words import describe_for_torch

BOARDS = ("orin", "xavier", "tx2", "nano")
ORIN = catalog.get("jetson-orin")
FLOAT16_TOLERANCE = 0.05  # of the largest logit
SCRIPT = Path(__file__).with_name("borrowed_gpu.py")
Array = NDArray[Any]
Rows = dict[str, tuple[list[int], int, int]]  # of tensors, by name: each row's CRC-32, pixels, channels


@dataclass(frozen=True)
class Contents:
    """What a kit is to try. ``operators`` with ``inputs``: every operator, and the chains that kernels are joined over,
    as one int8 graph. ``network`` and ``narrow``: whole int8 networks of one input, ``real`` and ``narrow_real`` the
    same in float32. ``photos``: int8 pixels (N, H, W, 3), at least as many as the largest batch and two.
    """

    operators: ir.Graph
    inputs: Sequence[Array]
    network: ir.Graph
    real: ir.Graph
    narrow: ir.Graph
    narrow_real: ir.Graph
    photos: Array


def write(
    kit: Path,
    name: str,
    graph: ir.Graph,
    target: TargetSpec,
    x: list[Array],
    expected: list[Array],
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


def trace(graph: ir.Graph, x: list[Array]) -> tuple[list[Array], Rows]:
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


def operators(kit: Path, contents: Contents, board: str) -> dict[str, Any]:
    """Every operator, for one board."""
    x = list(contents.inputs)
    expected, rows = trace(contents.operators, x)
    return write(kit, f"operators-{board}", contents.operators, catalog.get(f"jetson-{board}"), x, expected, 0, rows)


def networks(kit: Path, contents: Contents, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    """The whole network in int8 for Jetson Orin."""
    graph, images = contents.network, contents.photos[: max(batches)]
    traced = [trace(graph, [image[None]]) for image in images]
    expected = np.concatenate([y for (y,), _ in traced])

    def rows(batch: int) -> Rows:
        each = [rows for _, rows in traced[:batch]]
        return {n: ([crc for r in each for crc in r[n][0]], batch * each[0][n][1], each[0][n][2]) for n in each[0]}

    return [
        write(kit, f"int8-batch{n}", set_batch(graph, n), ORIN, [images[:n]], [expected[:n]], n, rows(n))
        for n in batches
    ]


def float16(kit: Path, contents: Contents) -> dict[str, Any]:
    """The narrow network as the float16 build computes it, of two images: not to be timed."""
    real, x = contents.narrow_real, contents.photos[:2]
    half = set_batch(take_int8_pixels(real, contents.narrow.inputs[0].type.per_tensor), 2)
    expected = np.concatenate([reference.run(real, each[None].astype(np.float32) + 128)[0] for each in x])
    return write(kit, "float16", half, ORIN, [x], [expected], 0)


def make_kit(kit: Path, contents: Contents, batches: tuple[int, ...], boards: tuple[str, ...] = BOARDS) -> None:
    """The whole kit, in the place of one that was there. Raises OSError."""
    with written_directory(kit, "kit.json") as aside:
        _fill_kit(aside, contents, batches, boards)


def _fill_kit(aside: Path, contents: Contents, batches: tuple[int, ...], boards: tuple[str, ...]) -> None:
    entries = [operators(aside, contents, board) for board in boards]
    entries += [*networks(aside, contents, batches), float16(aside, contents)]
    (aside / "torch.json").write_text(json.dumps(describe_for_torch(contents.real)[0]))
    for architecture, target in (("x86_64", "avx2"), ("aarch64", "jetson-orin")):
        library = native_runtime.build(catalog.get(target))["libxceptile.so"]
        (aside / f"libxceptile-{architecture}.so").write_bytes(library)
    shutil.copy(SCRIPT, aside)
    (aside / "kit.json").write_text(json.dumps({"networks": entries}))


def pack(kit: Path) -> None:
    """Every network's folder becomes a file, of less than nine tenths its size."""
    for folder in [each for each in kit.iterdir() if each.is_dir()]:
        shutil.make_archive(str(folder), "zip", folder)
        shutil.rmtree(folder)
