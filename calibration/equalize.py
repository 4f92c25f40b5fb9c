"""Exact equalization of a depthwise convolution's channels with the pointwise convolution that reads them.

Xception has no activation between the two, so channel c of the depthwise output may be divided by any k[c] > 0 if the
pointwise weights of that channel are multiplied by it: an identity in real numbers. Per-tensor activations then suit
every channel, where trained networks have channels that differ by orders of magnitude.

With a[c] the magnitude of the channel and r[c] that of its pointwise weights, relative to each output channel's
largest, k[c] = sqrt(a[c] / r[c]) shares the spread evenly between activations and weights, as SmoothQuant does at
alpha = 0.5 (https://arxiv.org/abs/2211.10438, equation 4). The depthwise weights pay nothing: they have a scale per
channel.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models.rewrite import float_constant, replace_inputs

Magnitudes = Mapping[str, NDArray[np.float64]]


def equalize(graph: ir.Graph, magnitudes: Magnitudes | None = None) -> ir.Graph:
    """The same function, its depthwise outputs equalized wherever one convolution alone reads them.

    Given: a float graph without batch normalization. ``magnitudes`` holds, by node name, what is known of each
    channel's largest value (C,); where it does not, the sum of the filter's absolute weights stands for it, which
    bounds the gain.
    """
    for depthwise, reader in equalizable_pairs(graph):
        known = None if magnitudes is None else magnitudes.get(depthwise.name)
        weights = graph.constants[depthwise.inputs[1]].data.astype(np.float64)
        activation = np.abs(weights).sum(axis=(0, 1)) if known is None else known
        graph = _rescale(graph, depthwise.name, reader.name, _factors(graph, reader, activation))
    return graph


def equalizable_pairs(graph: ir.Graph) -> list[tuple[ir.Node, ir.Node]]:
    """Each depthwise convolution without a ReLU, and the convolution that alone reads it."""
    pairs = []
    for node in graph.nodes:
        readers = graph.users(node.name)
        if (
            isinstance(node.op, ir.DepthwiseConv2d)
            and not node.op.relu
            and node.name not in graph.outputs
            and len(readers) == 1
            and isinstance(readers[0].op, ir.Conv2d)
        ):
            pairs.append((node, readers[0]))
    return pairs


def _factors(graph: ir.Graph, reader: ir.Node, activation: NDArray[np.float64]) -> NDArray[np.float64]:
    """k (C,), of geometric mean 1; 1 for a channel that is dead on either side."""
    weights = np.abs(graph.constants[reader.inputs[1]].data.astype(np.float64))
    rows = weights.max(axis=(1, 2, 3), keepdims=True)
    relative = np.divide(weights, rows, out=np.zeros_like(weights), where=rows > 0).max(axis=(0, 1, 2))
    alive = (activation > 0) & (relative > 0)
    logarithm = np.zeros_like(activation)
    logarithm[alive] = 0.5 * np.log(activation[alive] / relative[alive])
    if alive.any():
        logarithm[alive] -= logarithm[alive].mean()
    return np.exp(logarithm)


def _rescale(graph: ir.Graph, depthwise: str, reader: str, factors: NDArray[np.float64]) -> ir.Graph:
    """Divides the depthwise layer's channels by ``factors`` and multiplies the reader's input channels by them."""
    first, second = graph.node(depthwise), graph.node(reader)
    w, b, v = (graph.constants[n].data.astype(np.float64) for n in (*first.inputs[1:], second.inputs[1]))
    new_first, made = replace_inputs(graph, first, {1: float_constant(w / factors), 2: float_constant(b / factors)})
    new_second, also = replace_inputs(graph, second, {1: float_constant(v * factors)})
    nodes = tuple({depthwise: new_first, reader: new_second}.get(n.name, n) for n in graph.nodes)
    return graph.with_nodes(nodes, {**graph.constants, **made, **also})
