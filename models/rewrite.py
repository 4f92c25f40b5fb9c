"""Small edits that graph passes and the calibration stages share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from .graph import Constant, Graph, Node, TensorType


def float_constant(data: ArrayLike) -> Constant:
    """A float32 constant, rounded once from whatever precision ``data`` was computed in."""
    values = np.array(data, np.float32, order="C")
    return Constant(TensorType(values.shape, "float32"), values)


def replace_inputs(graph: Graph, node: Node, changed: Mapping[int, Constant]) -> tuple[Node, dict[str, Constant]]:
    """The node with new values for the constants at the input positions of ``changed``, and those constants by name.

    A constant that other nodes read too keeps its value for them: this node gets one of its own.
    """
    inputs, made = list(node.inputs), {}
    for position, constant in changed.items():
        name = node.inputs[position]
        if len(graph.users(name)) > 1 or node.inputs.count(name) > 1:
            name = _unused_name(graph, f"{node.name}.{name}")
        inputs[position] = name
        made[name] = constant
    return replace(node, inputs=tuple(inputs)), made


def _unused_name(graph: Graph, wanted: str) -> str:
    taken = {node.name for node in graph.nodes} | set(graph.constants)
    while wanted in taken:
        wanted += "'"
    return wanted


def bypass(graph: Graph, removed: Mapping[str, str]) -> Graph:
    """The graph without the nodes in ``removed``; whoever read a removed node reads what it maps to instead.

    Constants that nobody reads any more are dropped.
    """

    def target(name: str) -> str:
        while name in removed:
            name = removed[name]
        return name

    nodes = tuple(
        replace(node, inputs=tuple(target(name) for name in node.inputs))
        for node in graph.nodes
        if node.name not in removed
    )
    return replace(graph.with_nodes(nodes), outputs=tuple(target(name) for name in graph.outputs))
