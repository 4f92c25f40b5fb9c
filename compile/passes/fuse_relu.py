"""A ReLU joins the operator before it.

Given: a float graph with stand-alone ``Relu`` nodes.
Result: the same function; each one that alone reads a convolution, a fully connected layer or an addition (which is
not itself an output) is gone and its producer has ``relu=True``. A ReLU of a ReLU is gone too. What stays alone: one
whose input others read as well, as before each block of Xception.
"""

from __future__ import annotations

from dataclasses import replace

from ...models import graph as ir
from ...models.rewrite import bypass

_Fusable = ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected | ir.Add


def fuse_relu(graph: ir.Graph) -> ir.Graph:
    """See the module."""
    fused: dict[str, ir.Node] = {}
    removed: dict[str, str] = {}
    by_name = {node.name: node for node in graph.nodes}
    for node in graph.nodes:
        producer = by_name.get(node.inputs[0]) if isinstance(node.op, ir.Relu) else None
        if producer is None:
            continue
        alone = len(graph.users(producer.name)) == 1 and producer.name not in graph.outputs
        if isinstance(producer.op, ir.Relu):
            removed[node.name] = producer.name
        elif isinstance(producer.op, _Fusable) and (alone or producer.op.relu):
            removed[node.name] = producer.name
            fused[producer.name] = replace(producer, op=replace(producer.op, relu=True))
    return bypass(graph.with_nodes(tuple(fused.get(node.name, node) for node in graph.nodes)), removed)
