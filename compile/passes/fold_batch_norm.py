"""Batch normalization disappears into the convolution before it.

Given: a float graph with ``BatchNorm`` nodes.
Result: the same function without them. One that is the only reader of a convolution or fully connected layer (which
is not itself an output) scales its weights and bias: with f = gamma / sqrt(variance + epsilon), w' = w * f and
b' = (b - mean) * f + beta, computed in float64 and rounded once. Any other one on a map becomes a 1x1 depthwise
convolution with those factors. One on a vector that no fully connected layer feeds is refused.
"""

from __future__ import annotations

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
    if len(norm.type.shape) != 4:
        raise ir.GraphError(
            f"batch normalization {norm.name} ({norm.path}) of a vector follows no fully connected layer that it "
            "could be folded into",
            norm.name,
            norm.path,
        )
    names = f"{norm.name}.weights", f"{norm.name}.bias"
    made = {names[0]: float_constant(factor[None, None, :]), names[1]: float_constant(shift)}
    depthwise = replace(norm, op=ir.DepthwiseConv2d((1, 1), (0, 0, 0, 0)), inputs=(source, *names))
    nodes = tuple(depthwise if n.name == norm.name else n for n in graph.nodes)
    return graph.with_nodes(nodes, {**graph.constants, **made})


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
