"""Where an engine's outputs part from the reference's: the first layer, found by compiling ever shorter networks.

Engines show no tensors but the network's outputs, and an engine that was made to show them all would run other code
(nothing could be fused). So the network is cut behind a layer, compiled anew for the same engine, run, and compared;
bisection finds two neighbours of which the first is equal and the second is not.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Iterable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models import serialize
from ..runtime import bundle as bundles
from ..runtime import reference
from ..runtime.accuracy import Labelled
from ..runtime.bundle import Artefact, Bundle, NetworkTensor
from ..runtime.engines.engine import Engine
from ..runtime.session import Placement, open_engine, place
from ..targets.spec import TargetSpec
from .backends import tflite
from .passes.set_batch import set_batch

IMAGES_AT_ONCE = 16  # on a device elsewhere, a run takes several commands


def first_difference(bundle: Bundle, engine: str, images: Iterable[Labelled], *, device: str | None = None) -> str:
    """In words: the layer at which ``engine`` first differs, on the first image on which it does at all.

    Raises EngineError where the engine cannot run there.
    """
    graph = serialize.load(bundle.file(bundles.INT8_GRAPH))
    allowed = bundle.manifest.allowed_steps
    placement = place(bundle.manifest.target, device)
    with closing(open_engine(bundle, engine, placement=placement)) as opened:
        image = _first_image(bundle, graph, opened, images)
    if image is None:
        return "no image's outputs differ"
    x = bundle.quantize_pixels(image.pixels[None])
    values = dict(reference.iterate(graph, {graph.inputs[0].name: x}, keep=[n.name for n in graph.nodes]))
    layers = [n for n in graph.nodes if n.type.dtype == "int8" and not isinstance(n.op, ir.Input)]

    def steps(layer: ir.Node) -> int:
        seen = _run(prefix(graph, layer.name), bundle, engine, placement, x)
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


def _first_image(bundle: Bundle, graph: ir.Graph, engine: Engine, images: Iterable[Labelled]) -> Labelled | None:
    """The first image on which an engine differs by more than is allowed."""
    iterator = iter(images)
    while group := list(itertools.islice(iterator, IMAGES_AT_ONCE)):
        x = bundle.quantize_pixels(np.stack([image.pixels for image in group]))
        for image, one, seen in zip(group, x, engine.run(x), strict=True):
            if _steps(seen, reference.run(graph, one[None])[0][0]) > bundle.manifest.allowed_steps:
                return image
    return None


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


def _run(
    graph: ir.Graph, bundle: Bundle, engine: str, placement: Placement, x: NDArray[np.int8]
) -> NDArray[np.generic]:
    """Images through a graph compiled as the bundle's was, for where its engine runs: as a bundle of its own."""
    artefact, files = _compile(set_batch(graph, bundle.manifest.input.shape[0]), bundle.manifest.target, engine)
    kind = graph.type_of(graph.outputs[0])
    shape = (bundle.manifest.input.shape[0], *kind.shape[1:])
    output = NetworkTensor(graph.outputs[0], shape, kind.per_tensor.scale, kind.per_tensor.zero_point)
    manifest = replace(bundle.manifest, output=output, artefacts=(artefact,))
    with tempfile.TemporaryDirectory(prefix="xceptile-") as folder:
        cut = bundles.write_bundle(Path(folder) / "bundle", manifest, files)
        with closing(open_engine(cut, engine, placement=placement)) as opened:
            return opened.run(x)


def _compile(graph: ir.Graph, target: TargetSpec, engine: str) -> tuple[Artefact, dict[str, bytes]]:
    if engine != "native":
        return Artefact("litert", "int8", (bundles.LITERT_INT8,)), {bundles.LITERT_INT8: tflite.serialize(graph)}
    from .backends import cpu, cuda, native_runtime, opencl

    built = {"cpu": cpu, "opencl": opencl, "cuda": cuda}[target.engine].build_files(graph, target)
    files = {f"{bundles.NATIVE}/{name}": data for name, data in (built | native_runtime.build(target)).items()}
    if target.engine != "cpu":
        rehearsal = native_runtime.build_rehearsal()
        files |= {f"{bundles.REHEARSAL}/{name}": data for name, data in rehearsal.items()}
    return Artefact("native", "int8", tuple(sorted(files))), files
