"""The main job: a float model, calibration images and a recipe -> an int8 graph -> bundles for targets."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from .. import __version__
from ..calibration.calibrate import Keep, calibrate
from ..calibration.quantize import pixel_encoding
from ..calibration.recipe import QuantRecipe
from ..calibration.table import CalibrationTable
from ..models import serialize
from ..models.graph import Dequantize, Graph
from ..models.preprocess import PixelEncoding
from ..models.verify import verify
from ..models.zoo import Model
from ..runtime import bundle as bundles
from ..runtime import reference
from ..runtime.bundle import Manifest, NetworkTensor
from ..runtime.engines.engine import fill_batches
from ..runtime.plan import restate
from ..targets.spec import TargetSpec
from . import artefacts
from .artefacts import Made, Progress
from .passes.fold_input import fold_input, takes_pixels
from .passes.pipeline import FLOAT_PASSES, run_passes
from .passes.set_batch import set_batch
from .tuning import TUNED, Tuning

ENGINES = ("native", "litert")
ALSO = ("relax-vm", "onnx-qdq")
GOLDEN_COUNT = 4

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Quantized:
    """A network before and after quantization, and what that was decided on.

    ``float_graph`` takes pixel values as float32, or the normalised image where ``pixels`` has a table.
    ``golden`` are a few of the calibration images, (count, H, W, C).
    """

    model: Model
    float_graph: Graph
    int8_graph: Graph
    recipe: QuantRecipe
    table: CalibrationTable
    golden: Pixels
    pixels: PixelEncoding


def _keep_first(images: Iterable[Pixels], count: int, kept: list[Pixels]) -> Iterator[Pixels]:
    """Passes images through and keeps the first few."""
    for image in images:
        if len(kept) < count:
            kept.append(image)
        yield image


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Within it numpy's products are summed by one thread: how OpenBLAS shares a sum among threads decides its last
    bits, and with them weights, so that the number of processors would decide bytes of a bundle.
    """
    with threadpool_limits(1, "blas"):
        yield


@one_blas_thread()
def quantize_model(
    model: Model,
    images: Iterable[Pixels],
    recipe: QuantRecipe,
    *,
    image_count: int,
    progress: Progress,
    keep: Keep = lambda stage, graph: None,
) -> Quantized:
    """Folds, equalizes, observes and quantizes. ``images`` (H, W, C) are read once, as a stream."""
    progress("fold", 0.0)
    keep("import", model.graph)
    graph = run_passes(model.graph, FLOAT_PASSES, verify, keep)
    folded = takes_pixels(graph)
    graph = fold_input(graph, model.input_spec)
    keep("fold input", graph)
    first: list[Pixels] = []
    calibrated = calibrate(
        graph,
        _keep_first(images, GOLDEN_COUNT, first),
        recipe,
        None if folded else model.input_spec,
        image_count=image_count,
        progress=progress,
        keep=keep,
    )
    int8_graph = calibrated.int8_graph
    verify(calibrated.float_graph)
    verify(int8_graph)
    quantum = int8_graph.inputs[0].type.per_tensor
    pixels = pixel_encoding(None if folded else model.input_spec, quantum)
    return Quantized(model, calibrated.float_graph, int8_graph, recipe, calibrated.table, np.stack(first), pixels)


def _tensor(graph: Graph, name: str) -> NetworkTensor:
    kind = graph.type_of(name)
    return NetworkTensor(name, kind.shape, kind.per_tensor.scale, kind.per_tensor.zero_point)


def float_layers(graph: Graph) -> tuple[str, ...]:
    """The module paths of a quantized graph's layers that compute in float, in graph order."""
    floats = (n for n in graph.nodes if n.type.dtype == "float32" and not isinstance(n.op, Dequantize))
    return tuple(dict.fromkeys(node.path or node.name for node in floats))


def _of_tuning(tuning: Tuning | None) -> dict[str, str]:
    return {} if tuning is None else {TUNED: tuning.sha256()}


def _versions(packages: Sequence[str]) -> dict[str, str]:
    return {f"version of {name}": importlib.metadata.version(name) for name in packages}


def _artefacts(
    network: Quantized,
    target: TargetSpec,
    engines: Sequence[str],
    also: Sequence[str],
    progress: Progress,
    tuning: Tuning | None,
    batch: int,
) -> Iterator[Made]:
    """What the bundle's engines run, in the order in which a session prefers them."""
    int8, real = set_batch(network.int8_graph, batch), set_batch(network.float_graph, batch)
    if "native" in engines:
        if target.engine == "cpu":
            yield artefacts.native_cpu(int8, target, tuning.choices if tuning else None, progress)
        else:
            yield artefacts.native_gpu(int8, real, target, network.table, progress)
        if "relax-vm" in also:
            yield artefacts.relax_vm(int8, target, progress)
    if "litert" in engines:
        yield artefacts.litert(int8, real, progress)
        if target.engine == "opencl":
            yield artefacts.litert_gpu(int8, real)


def _stated(name: str, data: bytes, manifest: Manifest) -> bytes:
    """A file of an artefact; a network's plan says how pixels enter and how exact its outputs are."""
    if PurePosixPath(name).name != "plan.bin" or name.startswith(f"{bundles.ROOF}/"):
        return data
    return restate(data, manifest.allowed_steps, manifest.pixels.to_bytes())


def build_bundle_files(
    network: Quantized,
    target: TargetSpec,
    engines: Sequence[str],
    also: Sequence[str],
    progress: Progress,
    tuning: Tuning | None = None,
    batch: int = 1,
    notes: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Manifest, dict[str, bytes]]:
    """Every file of a bundle and its manifest, in memory; ``bundles.write_bundle`` puts them on disk.

    ``batch`` is how many images an inference takes; the graphs of the reference take one all the same. ``notes`` join
    the provenance.

    Raises TuningError where ``tuning`` is another target's.
    """
    if tuning is not None:
        tuning.check_target(target)
    int8, real = network.int8_graph, network.float_graph
    batched = set_batch(int8, batch)
    made = list(_artefacts(network, target, engines, also, progress, tuning, batch))
    pixels = fill_batches(network.golden, batch)
    manifest = Manifest(
        format=bundles.FORMAT_VERSION,
        xceptile=__version__,
        network=network.model.graph.name,
        target=target,
        input=_tensor(batched, batched.inputs[0].name),
        output=_tensor(batched, batched.outputs[0]),
        input_spec=network.model.input_spec,
        labels=network.model.labels,
        recipe=network.recipe.to_json(),
        calibration=network.table.to_json(),
        provenance=dict(network.model.provenance),
        golden_count=len(pixels) // batch,
        artefacts=(),
        files={},
        pixels=network.pixels,
        float_layers=float_layers(int8),
    )
    shell = bundles.Bundle(Path(), manifest)
    progress("record the reference's outputs", 0.9)
    golden = shell.quantize_pixels(pixels)
    outputs = np.concatenate([reference.run(int8, image[np.newaxis])[0] for image in golden])
    if "onnx-qdq" in also:
        progress("write ONNX", 0.95)
        made.append(artefacts.onnx_qdq(batched, golden, outputs))
    files = {
        bundles.INT8_GRAPH: serialize.dump(int8),
        bundles.FLOAT_GRAPH: serialize.dump(real),
        bundles.GOLDEN_INPUT: golden.tobytes(),
        bundles.GOLDEN_OUTPUT: outputs.tobytes(),
    }
    provenance = dict(manifest.provenance) | _versions(["numpy", *(name for each in made for name in each.packages)])
    provenance |= _of_tuning(tuning) | dict(notes)
    for each in made:
        files |= {name: _stated(name, data, manifest) for name, data in each.files.items()}
        provenance |= each.told
    manifest = replace(manifest, artefacts=tuple(a for each in made for a in each.artefacts), provenance=provenance)
    return manifest, files
