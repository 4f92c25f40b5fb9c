"""The specification of graphs: sound ones pass, and every rule is seen to bite on a graph that breaks it alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from support.sound_graphs import X, Y, constant, float_graph, int8_graph

from xceptile.models import graph as ir
from xceptile.models.verify import verify


def test_sound_graphs_pass() -> None:
    verify(float_graph())
    verify(int8_graph())


Change = Callable[[ir.Graph], ir.Graph]


def nodes(change: Callable[[list[ir.Node]], object]) -> Change:
    def apply(graph: ir.Graph) -> ir.Graph:
        listed = list(graph.nodes)
        change(listed)
        return replace(graph, nodes=tuple(listed))

    return apply


def node(where: str, /, **fields: object) -> Change:
    """One node with other fields; ``shape``, ``dtype`` and ``quant`` are its type's."""

    def apply(graph: ir.Graph) -> ir.Graph:
        types = {k: fields.pop(k) for k in ("shape", "dtype", "quant") if k in fields}
        changed = [replace(n, **fields, type=replace(n.type, **types)) if n.name == where else n for n in graph.nodes]
        return replace(graph, nodes=tuple(changed))

    return apply


def op(name: str, **fields: object) -> Change:
    return lambda graph: node(name, op=replace(graph.node(name).op, **fields))(graph)


def data(name: str, value: np.ndarray, quant: ir.QuantParams | None = None) -> Change:
    return lambda graph: replace(graph, constants={**graph.constants, name: constant(value, quant)})


def quant(name: str, value: ir.QuantParams) -> Change:
    return lambda graph: data(name, graph.constants[name].data, value)(graph)


NAN = np.array([0, 1, np.nan, 0], np.float32)
STRUCTURE: list[tuple[Change, str, str]] = [
    (nodes(lambda n: n.insert(2, n[1])), "conv", "no name of its own"),
    (node("conv", name="w"), "w", "no name of its own"),
    (node("x", name=""), "", "no name of its own"),
    (nodes(lambda n: n.insert(3, n.pop(2))), "relu", "input norm is not made before it"),
    (node("relu", inputs=("nothing",)), "relu", "input nothing is not made before it"),
    (node("relu", inputs=("w",)), "relu", "input w is a constant, not a tensor"),
    (node("relu", inputs=("norm", "norm")), "relu", "has 2 inputs, it takes 1"),
    (node("conv", inputs=("x", "x", "b")), "conv", "input x must be a constant"),
    (nodes(lambda n: n.append(replace(n[0], name="late"))), "late", "inputs come first"),
    (nodes(lambda n: n.pop(0)), "", "has no input"),
    (lambda graph: replace(graph, outputs=()), "", "has no output"),
    (lambda graph: replace(graph, outputs=("w",)), "w", "output w is no node"),
]
SHAPES: list[tuple[Change, str, str]] = [
    (node("conv", shape=(1, 4, 6, 4)), "conv", "has shape [1, 4, 6, 4], its inputs make [1, 4, 7, 4]"),
    (node("x", shape=(1, 8, 0, 3)), "x", "has shape [1, 8, 0, 3]"),
    (node("x", shape=(1, 8, 7, 2)), "conv", "input channels: 2 and 3 differ"),
    (node("x", shape=(8, 7, 3)), "conv", "its rank must be 4"),
    (node("mean", inputs=("pool",), op=ir.Relu(), shape=(1, 2, 3, 4)), "linear", "its rank must be 2"),
    (op("conv", padding=(0, 0, 0, 0)), "conv", "its inputs make [1, 3, 5, 4]"),
    (op("conv", padding=(0, -1, 0, 0)), "conv", "padding (0, -1, 0, 0)"),
    (op("conv", strides=(0, 1)), "conv", "strides (0, 1)"),
    (op("pool", kernel=(9, 9)), "pool", "does not fit the 4x7 map"),
    (op("pool", padding=(3, 0, 0, 0)), "pool", "as wide as the window"),
    (node("add", inputs=("depthwise", "x")), "add", "shapes: (1, 4, 7, 4) and (1, 8, 7, 3) differ"),
    (data("b", np.ones(3, np.float32)), "conv", "bias: (3,) and (4,) differ"),
    (data("dw", np.ones((3, 3, 5), np.float32)), "depthwise", "channels: 4 and 5 differ"),
    (data("fw", np.ones((2, 5), np.float32)), "linear", "input channels: 4 and 5 differ"),
]
FLOAT: list[tuple[Change, str, str]] = [
    (node("relu", dtype="float64"), "relu", "its tensor is float64"),
    (node("relu", dtype="int8"), "relu", "is int8 and has quantization None"),
    (node("relu", quant=X), "relu", "is float32 and has quantization"),
    (data("b", NAN), "conv", "constant b holds NaN or infinity"),
    (op("norm", epsilon=-1.0), "norm", "variance + epsilon is 0"),
    (node("relu", dtype="int8", quant=X), "relu", "works on float32, int8; it takes float32, float32"),
    (data("w", np.ones((4, 3, 3, 3), np.int8), ir.PerAxis((1.0,) * 4, 0)), "conv", "constant w is int8 in a float"),
]
W, DW = np.ones((4, 3, 3, 3), np.int8), np.ones((3, 3, 4), np.int8)
INT8: list[tuple[Change, str, str]] = [
    (node("x", quant=ir.PerTensor(0.1, 3)), "x", "a scale that is not a positive float32"),
    (node("x", quant=ir.PerTensor(0.0, 3)), "x", "a scale that is not a positive float32"),
    (node("x", quant=ir.PerTensor(float("inf"), 3)), "x", "a scale that is not a positive float32"),
    (node("x", quant=ir.PerTensor(0.5, 128)), "x", "zero point 128"),
    (node("x", quant=ir.PerTensor(0.5, 3.0)), "x", "zero point 3.0"),
    (node("x", quant=ir.PerAxis((1.0, 1.0, 1.0), 3)), "x", "an activation is float32, or int8 per tensor"),
    (node("x", dtype="int32"), "x", "an activation is float32, or int8 per tensor"),
    (node("relu", quant=Y), "relu", "a ReLU keeps the scale, with zero point -128"),
    (node("relu", quant=ir.PerTensor(4.0, -128)), "relu", "a ReLU keeps the scale, with zero point -128"),
    (node("pool", quant=ir.PerTensor(0.5, 4)), "pool", "keeps its input's parameters"),
    (node("real", dtype="int8", quant=X), "real", "works on int8, int8; it takes int8, float32"),
    (node("mean", dtype="float32", quant=None), "mean", "works on int8, float32; it takes int8, int8"),
    (
        node("add", inputs=("depthwise", "relu"), op=ir.Add(), dtype="float32", quant=None),
        "add",
        "works on int8, int8, fl",
    ),
    (data("w", W.astype(np.float32)), "conv", "weights are float32 NoneType"),
    (data("w", W, ir.PerTensor(0.25, 0)), "conv", "weights are int8 PerTensor"),
    (data("w", W, ir.PerAxis((0.25,) * 3, 0)), "conv", "constant w has 3 scales on axis 0"),
    (data("w", W, ir.PerAxis((0.25,) * 3, 3)), "conv", "scaled along axis 3; it is 0"),
    (data("w", W, ir.PerAxis((0.25,) * 4, 4)), "conv", "4 scales on axis 4"),
    (data("dw", DW, ir.PerAxis((0.25,) * 3, 0)), "depthwise", "scaled along axis 0; it is 2"),
    (data("w", -128 * W, ir.PerAxis((0.25,) * 4, 0)), "conv", "weights hold -128"),
    (quant("b", ir.PerTensor(0.125, 0)), "conv", "bias is int32 PerTensor"),
    (data("b", np.ones(4, np.float32)), "conv", "bias is float32 NoneType"),
    (quant("b", ir.PerAxis((0.125, 0.125, 0.125, 0.25), 0)), "conv", "scale of the input times that of the weights"),
    (
        data("b", np.array([0, 0, 0, -(2**31) + 27 * 127 * 255 - 1], np.int32), ir.PerAxis((0.125,) * 4, 0)),
        "conv",
        "its accumulator may leave int32",
    ),
]


@pytest.mark.parametrize(("change", "name", "message"), STRUCTURE + SHAPES + FLOAT)
def test_broken_float_graphs(change: Change, name: str, message: str) -> None:
    broken(change(float_graph()), name, message)


@pytest.mark.parametrize(("change", "name", "message"), INT8)
def test_broken_int8_graphs(change: Change, name: str, message: str) -> None:
    broken(change(int8_graph()), name, message)


def broken(graph: ir.Graph, name: str, message: str) -> None:
    with pytest.raises(ir.GraphError) as caught:
        verify(graph)
    assert message in str(caught.value)
    assert caught.value.node == name
    if name and name in [n.name for n in graph.nodes]:
        assert caught.value.path == graph.node(name).path
        assert f"({caught.value.path})" in str(caught.value)


def test_the_largest_accumulator_is_allowed() -> None:
    largest = np.array([0, 0, 0, 2**31 - 1 - 27 * 127 * 255], np.int32)
    verify(data("b", largest, ir.PerAxis((0.125,) * 4, 0))(int8_graph()))
