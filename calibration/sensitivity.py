"""Which layers quantization hurts: each one alone in int8, all others in float, its damage measured at the outputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models.preprocess import InputSpec
from ..runtime import reference
from .collect import OBSERVED, network_input
from .images import Pixels

Array = NDArray[Any]
CHUNK = 8  # images whose tensors are held at once


@dataclass(frozen=True)
class LayerSensitivity:
    """One layer. ``sqnr_db`` is of the network's outputs, signal power over the power of the error that this layer
    alone makes; ``flips`` counts the images whose top-1 class it alone changes, of ``images``; ``low`` and ``high``
    are what its int8 output can represent, and ``clipped`` the share of float values outside.
    """

    name: str
    path: str
    kind: str
    sqnr_db: float
    flips: int
    images: int
    low: float
    high: float
    clipped: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite SQNR is null."""
        return {**asdict(self), "sqnr_db": None if math.isinf(self.sqnr_db) else self.sqnr_db}


def measure_sensitivity(
    graph: ir.Graph,
    int8_graph: ir.Graph,
    images: Iterable[Pixels],
    spec: InputSpec | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[LayerSensitivity, ...]:
    """Every int8 layer with parameters of its own, worst first (least SQNR).

    Given: ``int8_graph`` from ``quantize(graph, ...)``; ``spec`` as for ``collect``. ``progress`` is told the number
    of images done. An int8 layer's weights, input and output are all quantized; everything before and after is float.
    """
    totals = {n.name: _Totals() for n in int8_graph.nodes if isinstance(n.op, OBSERVED) and n.type.dtype == "int8"}
    stream, done = iter(images), 0
    while chunk := list(islice(stream, CHUNK)):
        x = np.concatenate([network_input(image, spec) for image in chunk])
        values = _run_from(graph, {graph.inputs[0].name: x}, {})
        outputs = values[graph.outputs[0]]
        for name, total in totals.items():
            node = int8_graph.node(name)
            damaged = _int8_alone(graph, int8_graph, node, values)
            changed = _run_from(graph, {name: damaged}, values)
            total.add(outputs, changed.get(graph.outputs[0], outputs), values[name], _limits(node))
        done += len(chunk)
        if progress is not None:
            progress(done)
    rows = (_row(int8_graph.node(name), total, done) for name, total in totals.items())
    return tuple(sorted(rows, key=lambda row: row.sqnr_db))


def _run_from(graph: ir.Graph, given: Mapping[str, Array], known: Mapping[str, Array]) -> dict[str, Array]:
    """The values of ``given`` and of every node that depends on them; other inputs are taken from ``known``."""
    values = dict(given)
    for node in graph.nodes:
        if node.name not in values and any(name in values for name in node.inputs):
            args = [
                values[n] if n in values else known[n] if n in known else graph.constants[n].data for n in node.inputs
            ]
            values[node.name] = reference.run_node(graph, node, args)
    return values


def _int8_alone(graph: ir.Graph, int8_graph: ir.Graph, node: ir.Node, values: Mapping[str, Array]) -> Array:
    """The layer's output in float32, computed in int8 from quantized float inputs."""
    args: list[Array] = []
    for name, source in zip(node.inputs, graph.node(node.name).inputs, strict=True):
        args.append(
            int8_graph.constants[name].data
            if name in int8_graph.constants
            else _quantized(values[source], int8_graph.type_of(name).per_tensor)
        )
    q, params = reference.run_node(int8_graph, node, args), node.type.per_tensor
    return np.asarray((q.astype(np.float32) - params.zero_point) * np.float32(params.scale), np.float32)


def _quantized(x: Array, params: ir.PerTensor) -> Array:
    steps = np.rint(x.astype(np.float64) / params.scale) + params.zero_point
    return np.asarray(np.clip(steps, -128, 127), np.int8)


def _limits(node: ir.Node) -> tuple[float, float]:
    params = node.type.per_tensor
    return params.scale * (-128 - params.zero_point), params.scale * (127 - params.zero_point)


class _Totals:
    """Sums over images for one layer."""

    def __init__(self) -> None:
        self.signal = self.noise = 0.0
        self.flips = self.clipped = self.values = 0

    def add(self, outputs: Array, changed: Array, activation: Array, limits: tuple[float, float]) -> None:
        self.signal += float(np.sum(outputs.astype(np.float64) ** 2))
        self.noise += float(np.sum((changed.astype(np.float64) - outputs) ** 2))
        self.flips += int(np.sum(outputs.argmax(axis=1) != changed.argmax(axis=1)))
        # A value within half a step beyond the last one is rounded, not clipped.
        slack = (limits[1] - limits[0]) / 255 / 2
        self.clipped += int(np.sum((activation < limits[0] - slack) | (activation > limits[1] + slack)))
        self.values += activation.size


def _row(node: ir.Node, total: _Totals, images: int) -> LayerSensitivity:
    noise_free = total.noise == 0
    return LayerSensitivity(
        name=node.name,
        path=node.path,
        kind=type(node.op).__name__,
        sqnr_db=math.inf if noise_free else 10 * math.log10(max(total.signal, 1e-300) / total.noise),
        flips=total.flips,
        images=images,
        low=_limits(node)[0],
        high=_limits(node)[1],
        clipped=total.clipped / max(total.values, 1),
    )
