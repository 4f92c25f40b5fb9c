"""Nodes whose value no output needs are dropped.

Given: any graph.
Result: the same outputs; every remaining node but an ``Input`` is read on the way to one.
"""

from __future__ import annotations

from ...models import graph as ir


def remove_dead(graph: ir.Graph) -> ir.Graph:
    """See the module."""
    needed = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node.name in needed:
            needed.update(node.inputs)
    return graph.with_nodes(tuple(n for n in graph.nodes if n.name in needed or isinstance(n.op, ir.Input)))
