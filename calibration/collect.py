"""Runs the float network over the calibration images and records the range of every activation."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models.preprocess import InputSpec, normalize
from ..runtime import reference
from .images import HashedImages, Pixels
from .observers import Observation
from .recipe import QuantRecipe
from .table import CalibrationError, CalibrationTable, TensorRange

# Operators whose output has quantization parameters of its own; ReLU and max pooling take their input's.
OBSERVED = (
    ir.Conv2d,
    ir.DepthwiseConv2d,
    ir.FullyConnected,
    ir.Add,
    ir.GlobalAveragePool,
    ir.Multiply,
    ir.Lookup,
)


def observed_tensors(graph: ir.Graph) -> dict[str, str]:
    """Where to observe each tensor that has parameters of its own: {observed tensor: the tensor it speaks for}.

    A tensor that only a max pooling or a ReLU reads is observed behind it, because both share its parameters and what
    they drop need not be represented: a value below every window's maximum may be clipped to the least of these.
    """
    observed = {}
    for node in graph.nodes:
        if isinstance(node.op, OBSERVED):
            last = node
            while (reader := _only_reader(graph, last)) and isinstance(reader.op, ir.MaxPool2d | ir.Relu):
                last = reader
            observed[last.name] = node.name
    return observed


def _only_reader(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    readers = graph.users(node.name)
    return readers[0] if len(readers) == 1 and node.name not in graph.outputs else None


def network_input(image: Pixels, spec: InputSpec | None) -> NDArray[np.float32]:
    """One image as the float graph takes it, (1, H, W, C): pixel values as they are, or normalised by ``spec``."""
    pixels = image.astype(np.float32) if spec is None else normalize(image, spec)
    return pixels[None]


def input_range(spec: InputSpec | None) -> TensorRange:
    """Of the network's input: known, not observed. 0..255, or what ``spec`` makes of these."""
    if spec is None:
        return TensorRange(0.0, 255.0, 0.0, 255.0)
    ends = normalize(np.array([[0] * spec.channels, [255] * spec.channels], np.uint8), spec)
    low, high = float(ends.min()), float(ends.max())
    return TensorRange(low, high, low, high)


def collect(
    graph: ir.Graph,
    images: Iterable[Pixels],
    recipe: QuantRecipe,
    spec: InputSpec | None = None,
    progress: Callable[[int], None] | None = None,
) -> CalibrationTable:
    """Ranges of a float graph's activations over ``images``, each uint8 (H, W, C), with the recipe's observers.

    ``spec`` is None where the graph takes pixel values (after ``fold_input``), else the preprocessing that it still
    needs. ``progress`` is told the number of images done. Raises CalibrationError for no image, an image of another
    size, and an activation that is NaN, infinite or the same everywhere.
    """
    source = graph.inputs[0]
    stream = HashedImages(images, source.type.shape[1:])
    owner = observed_tensors(graph)
    observed = {name: Observation(recipe.setting(graph.node(name).path).observer) for name in owner.values()}
    for image in stream:
        for name, value in reference.iterate(graph, {source.name: network_input(image, spec)}):
            if name in owner:
                node = graph.node(owner[name])
                _observe(node, observed[node.name], value.astype(np.float32, copy=False), stream.count)
        if progress is not None:
            progress(stream.count)
    ranges = {source.name: input_range(spec)}
    ranges |= {name: _checked_range(graph.node(name), observation) for name, observation in observed.items()}
    return CalibrationTable(ranges, stream.count, stream.sha256)


def _observe(node: ir.Node, observation: Observation, value: NDArray[np.float32], image: int) -> None:
    try:
        observation.add(value)
    except FloatingPointError as error:
        raise CalibrationError(
            f"activation {node.name} ({node.path or 'no module'}) holds {error} for calibration image {image - 1}: "
            "check the checkpoint and the preprocessing",
            node.name,
            node.path,
        ) from error


def _checked_range(node: ir.Node, observation: Observation) -> TensorRange:
    if observation.minimum == observation.maximum:
        raise CalibrationError(
            f"activation {node.name} ({node.path or 'no module'}) is {observation.minimum:g} everywhere, on every "
            "calibration image: check the checkpoint and the images",
            node.name,
            node.path,
        )
    low, high = observation.range()
    return TensorRange(float(low), float(high), float(observation.minimum), float(observation.maximum))
