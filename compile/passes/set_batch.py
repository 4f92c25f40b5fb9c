"""A network for another number of images at a time.

Given: a graph and a batch size.
Result: the same function of each image, on that many at once: the first dimension of every tensor is the batch.
"""

from __future__ import annotations

from dataclasses import replace

from ...models import graph as ir


def set_batch(graph: ir.Graph, batch: int) -> ir.Graph:
    """See the module. Raises ValueError for a batch below 1."""
    if batch < 1:
        raise ValueError(f"a batch of {batch} images; it is 1 at least")
    nodes = tuple(replace(node, type=replace(node.type, shape=(batch, *node.type.shape[1:]))) for node in graph.nodes)
    return graph.with_nodes(nodes)
