"""A float graph in torch's words, in NCHW: what ``borrowed_gpu.py`` makes a torch module of."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ...models import graph as ir

AXES = {ir.Conv2d: (0, 3, 1, 2), ir.DepthwiseConv2d: (2, 0, 1)}  # of our weights, in torch's order


def symmetric(padding: ir.Pads) -> tuple[int, int]:
    """Rows and columns on each side. Raises NotImplementedError where they differ, for which torch has no word."""
    top, bottom, left, right = padding
    if top != bottom or left != right:
        raise NotImplementedError(f"padding {padding}")
    return top, left


def describe_for_torch(real: ir.Graph) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """The float network in torch's words, with the weights' shapes; and the weights, in torch's layout."""
    nodes: list[dict[str, Any]] = []
    weights: dict[str, NDArray[Any]] = {}
    for node in real.nodes:
        op = node.op
        row: dict[str, Any] = {"name": node.name, "weights": [], "relu": getattr(op, "relu", False)}
        row["inputs"] = [name for name in node.inputs if name not in real.constants]
        if len(node.inputs) == 3:
            weight, bias = (real.constants[name].data for name in node.inputs[1:])
            weight = weight.transpose(AXES.get(type(op), tuple(range(weight.ndim))))
            weights[node.inputs[1]] = weight[:, None] if isinstance(op, ir.DepthwiseConv2d) else weight
            weights[node.inputs[2]] = bias
            row["weights"] = list(node.inputs[1:])
        match op:
            case ir.Input():
                continue
            case ir.Conv2d() | ir.DepthwiseConv2d():
                groups = node.type.shape[3] if isinstance(op, ir.DepthwiseConv2d) else 1
                row |= {"op": "conv", "strides": op.strides, "padding": symmetric(op.padding), "groups": groups}
            case ir.MaxPool2d():
                row |= {"op": "max_pool", "kernel": op.kernel, "strides": op.strides, "padding": symmetric(op.padding)}
            case ir.FullyConnected():
                row["op"] = "linear"
            case ir.Relu():
                row["op"] = "relu"
            case ir.Add():
                row["op"] = "add"
            case ir.GlobalAveragePool():
                row["op"] = "mean"
            case _:
                raise NotImplementedError(f"{op}")
        nodes.append(row)
    _, height, width, channels = real.inputs[0].type.shape
    described = {
        "input": real.inputs[0].name, "output": real.outputs[0], "shape": [channels, height, width], "nodes": nodes,
        "weights": {name: value.shape for name, value in weights.items()},
    }  # fmt: skip
    return described, weights
