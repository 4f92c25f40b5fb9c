"""A float network that takes pixels as int8, as its int8 graph does.

Given: a float graph, and what int8 values of its inputs mean. For a network that takes pixels that is scale 1 and zero
point -128, as its int8 graph's input has it.
Result: the same function of int8 values. Inputs keep their names; a ``Dequantize`` behind each, named ``NAME:real``,
makes the real numbers that their readers read.
"""

from __future__ import annotations

from dataclasses import replace

from ...models import graph as ir


def take_int8_pixels(graph: ir.Graph, quant: ir.PerTensor) -> ir.Graph:
    """See the module. All inputs mean what ``quant`` says."""
    real = {source.name: f"{source.name}:real" for source in graph.inputs}
    nodes = [replace(n, type=ir.TensorType(n.type.shape, "int8", quant)) for n in graph.inputs]
    nodes += [ir.Node(real[n.name], ir.Dequantize(), (n.name,), n.type, n.path) for n in graph.inputs]
    for node in graph.nodes:
        if node.name not in real:
            nodes.append(replace(node, inputs=tuple(real.get(name, name) for name in node.inputs)))
    return graph.with_nodes(tuple(nodes))
