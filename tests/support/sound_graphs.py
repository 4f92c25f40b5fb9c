"""Small sound graphs that hold every operator."""

from __future__ import annotations

import numpy as np

from xceptile.models import graph as ir


def constant(data: np.ndarray, quant: ir.QuantParams | None = None) -> ir.Constant:
    """A constant with the type of its values."""
    return ir.Constant(ir.TensorType(data.shape, str(data.dtype), quant), data)


def float_graph() -> ir.Graph:
    """Every float operator once."""

    def node(name: str, op: ir.Op, inputs: str, *shape: int) -> ir.Node:
        return ir.Node(name, op, tuple(inputs.split()), ir.TensorType(shape, "float32"), f"net.{name}")

    ones = {"w": (4, 3, 3, 3), "b": (4,), "dw": (3, 3, 4), "fw": (2, 4), "fb": (2,)}
    return ir.Graph(
        "float",
        (
            node("x", ir.Input(), "", 1, 8, 7, 3),
            node("conv", ir.Conv2d((2, 1), (0, 1, 1, 1)), "x w b", 1, 4, 7, 4),
            node("norm", ir.BatchNorm(1e-3), "conv b b b b", 1, 4, 7, 4),
            node("relu", ir.Relu(), "norm", 1, 4, 7, 4),
            node("depthwise", ir.DepthwiseConv2d((1, 1), (1, 1, 1, 1)), "relu dw b", 1, 4, 7, 4),
            node("add", ir.Add(), "depthwise relu", 1, 4, 7, 4),
            node("pool", ir.MaxPool2d((3, 3), (2, 2), (0, 1, 0, 0)), "add", 1, 2, 3, 4),
            node("mean", ir.GlobalAveragePool(), "pool", 1, 4),
            node("linear", ir.FullyConnected(), "mean fw fb", 1, 2),
        ),
        {name: constant(np.ones(shape, np.float32)) for name, shape in ones.items()},
        ("linear",),
    )


X, Y = ir.PerTensor(0.5, 3), ir.PerTensor(2.0, -5)


def int8_graph() -> ir.Graph:
    """Every integer operator once, and a stretch in float."""

    def node(name: str, op: ir.Op, inputs: str, quant: ir.PerTensor | None, *shape: int) -> ir.Node:
        type_ = ir.TensorType(shape, "int8" if quant else "float32", quant)
        return ir.Node(name, op, tuple(inputs.split()), type_, f"net.{name}")

    def weights(shape: tuple[int, ...], axis: int) -> ir.Constant:
        return constant(np.full(shape, -127, np.int8), ir.PerAxis((0.25,) * shape[axis], axis))

    def bias(channels: int, scale: float) -> ir.Constant:
        return constant(np.full(channels, 2**30, np.int32), ir.PerAxis((scale,) * channels, 0))

    return ir.Graph(
        "int8",
        (
            node("x", ir.Input(), "", X, 1, 8, 7, 3),
            node("conv", ir.Conv2d((2, 1), (0, 1, 1, 1)), "x w b", Y, 1, 4, 7, 4),
            node("relu", ir.Relu(), "conv", ir.PerTensor(2.0, -128), 1, 4, 7, 4),
            node("depthwise", ir.DepthwiseConv2d((1, 1), (1, 1, 1, 1), True), "relu dw db", Y, 1, 4, 7, 4),
            node("add", ir.Add(), "depthwise relu", X, 1, 4, 7, 4),
            node("pool", ir.MaxPool2d((3, 3), (2, 2), (0, 1, 0, 0)), "add", X, 1, 2, 3, 4),
            node("other", ir.Lookup("identity"), "pool", Y, 1, 2, 3, 4),
            node("real", ir.Dequantize(), "other", None, 1, 2, 3, 4),
            node("positive", ir.Relu(), "real", None, 1, 2, 3, 4),
            node("again", ir.Quantize(), "positive", X, 1, 2, 3, 4),
            node("mean", ir.GlobalAveragePool(), "again", X, 1, 4),
            node("linear", ir.FullyConnected(), "mean fw fb", Y, 1, 2),
        ),
        {
            "w": weights((4, 3, 3, 3), 0),
            "b": bias(4, 0.125),
            "dw": weights((3, 3, 4), 2),
            "db": bias(4, 0.5),
            "fw": weights((2, 4), 0),
            "fb": bias(2, 0.125),
        },
        ("linear",),
    )
