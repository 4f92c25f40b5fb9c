"""Walks the float and the int8 network side by side and lets a method adjust each int8 layer in turn.

A layer is adjusted on what really reaches it: the int8 activations of the layers before it, already adjusted. So the
errors of earlier layers are seen, and partly made up for, by later ones. All images' tensors are held for as long as
a later layer reads them: give few images (some tens).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models.preprocess import InputSpec
from ..runtime import reference
from .collect import network_input
from .images import Pixels
from .quantize import ACCUMULATOR_LIMIT, BIAS_LIMIT, Weighted, accumulator_bound, pixel_encoding

Array = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Layer:
    """One weighted layer in both networks.

    ``weights`` and ``bias`` are the float network's, ``int8_weights`` and ``int8_bias`` those to be adjusted;
    ``inputs`` and ``int8_inputs`` hold, image by image, what reaches it: float32, and int8 with ``input_params``.
    """

    node: ir.Node
    weights: Array
    bias: Array
    int8_weights: ir.Constant
    int8_bias: ir.Constant
    input_params: ir.PerTensor
    inputs: Sequence[Array]
    int8_inputs: Sequence[Array]

    def real_inputs(self, image: int) -> Array:
        """The int8 inputs' real values for one image, float32."""
        centred = self.int8_inputs[image].astype(np.float32) - np.float32(self.input_params.zero_point)
        return np.asarray(centred * np.float32(self.input_params.scale), np.float32)


Adjust = Callable[[Layer], tuple[ir.Constant, ir.Constant]]  # new int8 weights and bias, of the same types


def refine(
    graph: ir.Graph,
    int8_graph: ir.Graph,
    images: Sequence[Pixels],
    steps: Sequence[Adjust],
    spec: InputSpec | None = None,
    progress: Callable[[float], None] | None = None,
) -> ir.Graph:
    """The int8 graph with every int8 layer's weights and bias as the ``steps`` make them one after the other, in one
    walk from the first layer to the last.

    Given: ``int8_graph`` from ``quantize(graph, ...)``; ``spec`` as for ``collect``. ``progress`` is told the share
    of layers done. An adjustment that would break the accumulator's bound is not taken.
    """
    walk = _Walk(graph, int8_graph, images, spec)
    for index, node in enumerate(int8_graph.nodes):
        walk.visit_float(node)
        layer = walk.layer(node)
        if layer is not None:
            walk.adjust(layer, steps)
        walk.visit_int8(node, index)
        if progress is not None:
            progress((index + 1) / len(int8_graph.nodes))
    return int8_graph.with_nodes(int8_graph.nodes, walk.constants)


class _Walk:
    """The values of both networks' live tensors, per image."""

    def __init__(self, graph: ir.Graph, int8_graph: ir.Graph, images: Sequence[Pixels], spec: InputSpec | None) -> None:
        self.graph, self.int8_graph = graph, int8_graph
        self.float_nodes = {node.name: node for node in graph.nodes}
        self.constants = dict(int8_graph.constants)
        source = int8_graph.inputs[0]
        pixels = pixel_encoding(spec, source.type.per_tensor)
        self.floats: dict[str, list[Array]] = {source.name: [network_input(image, spec) for image in images]}
        self.ints: dict[str, list[Array]] = {source.name: [pixels.encode(image)[None] for image in images]}
        self.last_int8 = {name: i for i, node in enumerate(int8_graph.nodes) for name in node.inputs}
        self.last_float = {name: node.name for node in graph.nodes for name in node.inputs}

    def visit_float(self, node: ir.Node) -> None:
        """Runs the float network's node of that name, where it has one that was not run."""
        twin = self.float_nodes.get(node.name)
        if twin is not None and not isinstance(twin.op, ir.Input):
            self.floats[node.name] = self._run(self.graph, twin, self.floats, self.graph.constants)

    def layer(self, node: ir.Node) -> Layer | None:
        """Both sides of an int8 weighted layer; None for any other node."""
        if not isinstance(node.op, Weighted) or node.type.dtype != "int8":
            return None
        twin = self.float_nodes[node.name]
        return Layer(
            node,
            self.graph.constants[twin.inputs[1]].data,
            self.graph.constants[twin.inputs[2]].data,
            self.constants[node.inputs[1]],
            self.constants[node.inputs[2]],
            self.int8_graph.type_of(node.inputs[0]).per_tensor,
            self.floats[twin.inputs[0]],
            self.ints[node.inputs[0]],
        )

    def adjust(self, layer: Layer, steps: Sequence[Adjust]) -> None:
        """Takes each step's weights and bias, unless they break the accumulator's bound."""
        for step in steps:
            weights, bias = step(layer)
            if accumulator_bound(weights, bias, ir.channel_axis(layer.node.op)).max() < ACCUMULATOR_LIMIT:
                self.constants |= {layer.node.inputs[1]: weights, layer.node.inputs[2]: bias}
                layer = replace(layer, int8_weights=weights, int8_bias=bias)

    def visit_int8(self, node: ir.Node, index: int) -> None:
        """Runs the int8 network's node and frees what neither network reads any more."""
        if not isinstance(node.op, ir.Input):
            self.ints[node.name] = self._run(self.int8_graph, node, self.ints, self.constants)
        for name in node.inputs:
            if self.last_int8[name] == index:
                self.ints.pop(name, None)
        for name in self.float_nodes[node.name].inputs if node.name in self.float_nodes else ():
            if self.last_float[name] == node.name:
                self.floats.pop(name, None)

    def _run(
        self,
        graph: ir.Graph,
        node: ir.Node,
        values: Mapping[str, list[Array]],
        constants: Mapping[str, ir.Constant],
    ) -> list[Array]:
        count = len(next(iter(values.values())))
        return [
            reference.run_node(
                graph, node, [values[n][image] if n in values else constants[n].data for n in node.inputs]
            )
            for image in range(count)
        ]


def taps(op: ir.Op, weights: Array, x: Array) -> list[Array]:
    """What each position of a layer's window sees: a list over KH * KW positions of (OH * OW, C_in) float32.

    A fully connected layer has one position and sees the whole vector. ``x`` is one image's input, float32.
    """
    if isinstance(op, ir.FullyConnected):
        return [x]
    assert isinstance(op, ir.Conv2d | ir.DepthwiseConv2d)
    shape = weights.shape[1:3] if isinstance(op, ir.Conv2d) else weights.shape[:2]
    kernel = int(shape[0]), int(shape[1])
    padded = reference.pad_image(x, op.padding, 0.0)
    views = (
        reference.tap(padded, i, j, kernel, op.strides, op.dilation) for i in range(kernel[0]) for j in range(kernel[1])
    )
    return [view.reshape(-1, x.shape[-1]) for view in views]


def as_matrix(op: ir.Op, weights: Array) -> Array:
    """Weights with the window's positions made one axis: (O, KH * KW, I), or (C, KH * KW) for a depthwise layer."""
    if isinstance(op, ir.DepthwiseConv2d):
        return weights.reshape(-1, weights.shape[-1]).T
    return weights.reshape(weights.shape[0], -1, weights.shape[-1])


def real_weights(weights: ir.Constant) -> Array:
    """int8 weights as the float64 they stand for."""
    per_axis = weights.type.per_axis
    shape = [1] * weights.data.ndim
    shape[per_axis.axis] = -1
    return np.asarray(weights.data.astype(np.float64) * np.asarray(per_axis.scales, np.float64).reshape(shape))


def rounded_bias(bias: Array, like: ir.Constant) -> ir.Constant:
    """A real bias (C,) in the int32 steps of ``like``."""
    steps = np.rint(bias / np.asarray(like.type.per_axis.scales, np.float64))
    return ir.Constant(like.type, np.clip(steps, -BIAS_LIMIT, BIAS_LIMIT).astype(np.int32))
