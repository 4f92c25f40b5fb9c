"""Preprocessing disappears into the first convolution, so that a device feeds it pixels.

Given: a float graph whose input x is normalised, x = (p / 255 - mean) / std per channel, and an InputSpec with them.
Result: the same function of the pixels p = 0..255 (as float32), where every reader of the input is a convolution
without padding: w' = w / (255 * std), b' = b - sum(w * mean / std), in float64, rounded once. This is an identity
because a convolution is linear and each of its windows lies wholly inside the image, so each pixel under it was
normalised. Where a reader pads, the border would need the pixel value 255 * mean, which is no whole number in general
(127.5 for Keras): the graph is returned as it is, its input stays normalised, and pixels enter through
``calibration.quantize.pixel_encoding``.
"""

from __future__ import annotations

import numpy as np

from ...models import graph as ir
from ...models.preprocess import InputSpec
from ...models.rewrite import float_constant, replace_inputs


def takes_pixels(graph: ir.Graph) -> bool:
    """Whether ``fold_input`` can fold: one input, read by unpadded convolutions only, and not an output."""
    if len(graph.inputs) != 1 or graph.inputs[0].name in graph.outputs:
        return False
    readers = graph.users(graph.inputs[0].name)
    return bool(readers) and all(isinstance(n.op, ir.Conv2d) and not any(n.op.padding) for n in readers)


def fold_input(graph: ir.Graph, spec: InputSpec) -> ir.Graph:
    """See the module. Applying it twice is wrong, as with any change of units."""
    if not takes_pixels(graph):
        return graph
    mean, std = np.array(spec.mean, np.float64), np.array(spec.std, np.float64)
    for reader in graph.users(graph.inputs[0].name):
        weights, bias = (graph.constants[name].data.astype(np.float64) for name in reader.inputs[1:])
        shift = np.sum(weights * (mean / std), axis=(1, 2, 3))
        changed = {1: float_constant(weights / (255.0 * std)), 2: float_constant(bias - shift)}
        node, made = replace_inputs(graph, reader, changed)
        nodes = tuple(node if n.name == reader.name else n for n in graph.nodes)
        graph = graph.with_nodes(nodes, {**graph.constants, **made})
    return graph
