"""Where an engine's outputs part from the reference's: the first layer, found by compiling ever shorter networks.

Engines show no tensors but the network's outputs, and an engine that was made to show them all would run other code
(nothing could be fused). So the network is cut behind a layer, compiled anew for the same engine, run, and compared;
bisection finds two neighbours of which the first is equal and the second is not.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models import serialize
from ..runtime import bundle as bundles
from ..runtime import reference
from ..runtime.bundle import Bundle
from ..runtime.engines.engine import EngineError
from ..runtime.measure import Labelled
from ..runtime.session import LOCAL, QEMU, open_engine, place
from ..targets.spec import TargetSpec
from .backends import tflite


def first_difference(bundle: Bundle, engine: str, images: Iterable[Labelled], *, device: str | None = None) -> str:
    """In words: the layer at which ``engine`` first differs, on the first image on which it does at all.

    Raises EngineError where the engine cannot run here, or shorter networks cannot be compiled for where it runs.
    """
    graph = serialize.load(bundle.file(bundles.INT8_GRAPH))
    allowed = bundle.manifest.allowed_steps
    placement = place(bundle.manifest.target, device)
    opened = open_engine(bundle, engine, placement=placement)
    try:
        for image in images:
            x = bundle.quantize_pixels(image.pixels[None])
            if _steps(opened.run(x), reference.run(graph, x)[0]) > allowed:
                break
        else:
            return "no image's outputs differ"
    finally:
        opened.close()
    if placement.device not in (LOCAL, QEMU):
        raise EngineError(
            f"{placement.device}: the first layer that differs is looked for on this machine or under qemu"
        )
    values = dict(reference.iterate(graph, {graph.inputs[0].name: x}, keep=[n.name for n in graph.nodes]))
    layers = [n for n in graph.nodes if n.type.dtype == "int8" and not isinstance(n.op, ir.Input)]

    def steps(layer: ir.Node) -> int:
        cut = prefix(graph, layer.name)
        seen = _run(cut, bundle.manifest.target, engine, placement.device, x)
        return _steps(seen.reshape(-1), values[layer.name].reshape(-1))

    last = steps(layers[-1])
    if last <= allowed:
        return (
            f"on {image.name} the outputs differ, but not those of the same network compiled anew: this artefact is "
            "damaged, or of another version"
        )
    low, high = -1, len(layers) - 1  # equal behind low (-1: the input), different behind high
    while high - low > 1:
        middle = (low + high) // 2
        found = steps(layers[middle])
        low, high, last = (low, middle, found) if found > allowed else (middle, high, last)
    layer = layers[high]
    before = layers[low].name if low >= 0 else "the input"
    return (
        f"on {image.name} {type(layer.op).__name__} {layer.name} ({layer.path or 'no module'}) is the first that "
        f"differs, by up to {last} steps; {before} is equal"
    )


def prefix(graph: ir.Graph, name: str) -> ir.Graph:
    """What of a graph computes one tensor, as a graph with that output."""
    needed = {name}
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed |= set(node.inputs)
    nodes = tuple(n for n in graph.nodes if n.name in needed)
    return ir.Graph(graph.name, (), graph.constants, (name,)).with_nodes(nodes)


def _steps(seen: NDArray[np.generic], expected: NDArray[np.generic]) -> int:
    return int(np.abs(seen.astype(np.int32) - expected.astype(np.int32)).max(initial=0))


def _run(graph: ir.Graph, target: TargetSpec, engine: str, device: str, x: NDArray[np.int8]) -> NDArray[np.generic]:
    """One image through a graph compiled for an engine."""
    if engine in ("litert", "tflite-runtime"):
        from ..runtime.engines.litert import LiteRtEngine
        from ..runtime.engines.litert_qemu import LiteRtQemuEngine

        data = tflite.serialize(graph)
        if engine == "litert" and device == QEMU:
            return LiteRtQemuEngine(data, target.qemu_cpu or "").run(x)
        library = "ai_edge_litert" if engine == "litert" else "tflite_runtime"
        return LiteRtEngine(data, library=library).run_once(x)[0]  # type: ignore[arg-type]  # one of the two words
    if engine != "native" or target.engine != "cpu":
        raise EngineError(f"{engine} on {target.name}: shorter networks are compiled for processors and LiteRT only")
    from ..runtime.devices.qemu import QemuNativeEngine
    from ..runtime.engines.native import NativeEngine
    from .backends import native_runtime, tvm

    with tempfile.TemporaryDirectory(prefix="xceptile-") as folder:
        for name, data in (tvm.build_files(graph, target) | native_runtime.build(target)).items():
            file = Path(folder) / name
            file.write_bytes(data)
            file.chmod(0o755)
        if device == QEMU:
            return QemuNativeEngine(Path(folder), target, 1).run(x)
        native = NativeEngine(Path(folder), threads=1)
        try:
            return native.run(x)
        finally:
            native.close()
