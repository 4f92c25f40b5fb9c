"""Batch normalization disappears into the convolution before it, or into the fully connected layer behind it.

Given: a float graph with ``BatchNorm`` nodes.
Result: the same function without them. One that is the only reader of a convolution or fully connected layer (which
is not itself an output) scales its weights and bias: with f = gamma / sqrt(variance + epsilon), w' = w * f and
b' = (b - mean) * f + beta, computed in float64 and rounded once. Any other one on a map becomes a 1x1 depthwise
convolution with those factors. One on a vector that only fully connected layers read goes into these, with g = beta -
mean * f: w' = w * f, b' = b + w g. One on a global average is taken of the map, before the mean, which is the same. Any
other one on a vector is refused.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ...models import graph as ir
from ...models.rewrite import bypass, float_constant, replace_inputs


def fold_batch_norm(graph: ir.Graph) -> ir.Graph:
    """See the module. Raises GraphError for a normalization of a vector that no fully connected layer makes."""
    for node in graph.nodes:
        if isinstance(node.op, ir.BatchNorm):
            graph = _fold_one(graph, node)
    return graph


def _fold_one(graph: ir.Graph, norm: ir.Node) -> ir.Graph:
    # Read again: the producer may have been rewritten by an earlier normalization.
    norm = graph.node(norm.name)
    factor, shift = _factor_and_shift(graph, norm)
    source = norm.inputs[0]
    layer = next((n for n in graph.nodes if n.name == source), None)
    foldable = (
        layer is not None
        and ir.FACTS[type(layer.op)].channel_axis is not None
        and not getattr(layer.op, "relu", False)
        and len(graph.users(source)) == 1
        and source not in graph.outputs
    )
    if layer is not None and foldable:
        folded, made = _scale_layer(graph, layer, factor, shift)
        nodes = tuple(folded if n.name == layer.name else n for n in graph.nodes)
        return bypass(graph.with_nodes(nodes, {**graph.constants, **made}), {norm.name: layer.name})
    if len(norm.type.shape) == 4:
        depthwise, made = _as_depthwise(norm, source, norm.type, factor, shift)
        nodes = tuple(depthwise if n.name == norm.name else n for n in graph.nodes)
        return graph.with_nodes(nodes, {**graph.constants, **made})
    readers = graph.users(norm.name)
    if norm.name not in graph.outputs and all(isinstance(reader.op, ir.FullyConnected) for reader in readers):
        return _fold_into_readers(graph, norm, readers, factor, shift)
    pooled = isinstance(layer, ir.Node) and isinstance(layer.op, ir.GlobalAveragePool)
    if layer is not None and pooled and len(graph.users(source)) == 1 and source not in graph.outputs:
        return _before_mean(graph, norm, layer, factor, shift)
    raise ir.GraphError(
        f"batch normalization {norm.name} ({norm.path}) of a vector lies between no fully connected layers or global "
        "averages that it could be folded into",
        norm.name,
        norm.path,
    )


def _as_depthwise(
    norm: ir.Node, source: str, type_: ir.TensorType, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> tuple[ir.Node, dict[str, ir.Constant]]:
    """The normalization of a map as a convolution of one pixel."""
    names = f"{norm.name}.weights", f"{norm.name}.bias"
    made = {names[0]: float_constant(factor[None, None, :]), names[1]: float_constant(shift)}
    op = ir.DepthwiseConv2d((1, 1), (0, 0, 0, 0))
    return replace(norm, op=op, inputs=(source, *names), type=type_), made


def _fold_into_readers(
    graph: ir.Graph,
    norm: ir.Node,
    readers: tuple[ir.Node, ...],
    factor: NDArray[np.float64],
    shift: NDArray[np.float64],
) -> ir.Graph:
    for reader in readers:
        weights, bias = (graph.constants[name].data.astype(np.float64) for name in reader.inputs[1:])
        # Not by BLAS: a bundle's bytes must not depend on its order of summation.
        moved = np.array([math.fsum(row) for row in weights * shift])
        changed = {1: float_constant(weights * factor), 2: float_constant(bias + moved)}
        node, made = replace_inputs(graph, reader, changed)
        nodes = tuple(node if n.name == reader.name else n for n in graph.nodes)
        graph = graph.with_nodes(nodes, {**graph.constants, **made})
    return bypass(graph, {norm.name: norm.inputs[0]})


def _before_mean(
    graph: ir.Graph, norm: ir.Node, mean: ir.Node, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> ir.Graph:
    """The mean of a normalized map instead of the normalized mean."""
    depthwise, made = _as_depthwise(norm, mean.inputs[0], graph.type_of(mean.inputs[0]), factor, shift)
    pooled = replace(mean, inputs=(norm.name,))
    swapped = {norm.name: pooled, mean.name: depthwise}  # each stands where the other stood
    nodes = tuple(swapped.get(node.name, node) for node in graph.nodes)
    nodes = tuple(
        node if node.name == mean.name else replace(node, inputs=_renamed(node.inputs, norm.name, mean.name))
        for node in nodes
    )
    outputs = _renamed(graph.outputs, norm.name, mean.name)
    return replace(graph.with_nodes(nodes, {**graph.constants, **made}), outputs=outputs)


def _renamed(names: tuple[str, ...], old: str, new: str) -> tuple[str, ...]:
    return tuple(new if name == old else name for name in names)


def _factor_and_shift(graph: ir.Graph, norm: ir.Node) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """y = x * factor + shift, both (C,)."""
    assert isinstance(norm.op, ir.BatchNorm)
    gamma, beta, mean, variance = (graph.constants[name].data.astype(np.float64) for name in norm.inputs[1:])
    factor = gamma / np.sqrt(variance + norm.op.epsilon)
    return factor, beta - mean * factor


def _scale_layer(
    graph: ir.Graph, layer: ir.Node, factor: NDArray[np.float64], shift: NDArray[np.float64]
) -> tuple[ir.Node, dict[str, ir.Constant]]:
    weights, bias = (graph.constants[name].data.astype(np.float64) for name in layer.inputs[1:])
    shape = [1] * weights.ndim
    shape[ir.channel_axis(layer.op)] = -1
    changed = {1: float_constant(weights * factor.reshape(shape)), 2: float_constant(bias * factor + shift)}
    return replace_inputs(graph, layer, changed)
