"""A float Graph as an ONNX network in NCHW."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from . import graph as ir
from .onnx_file import Array

OPSET = 17
IR_VERSION = 8  # of the file format; what opset 17 came with


@dataclass(frozen=True)
class _Writer:
    """The ONNX nodes and constants written so far."""

    graph: ir.Graph
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, Array] = field(default_factory=dict)

    def node(self, op_type: str, inputs: Sequence[str], output: str, **attributes: Any) -> None:
        """Appends one node, named after its output."""
        self.nodes.append(helper.make_node(op_type, list(inputs), [output], name=output, **attributes))

    def constant(self, name: str, axes: Sequence[int] | None = None) -> str:
        """A constant with its axes permuted into ONNX' layout."""
        data = self.graph.constants[name].data
        self.constants[name] = data if axes is None else data.transpose(axes)
        return name


def to_onnx(graph: ir.Graph) -> onnx.ModelProto:
    """The same function in NCHW, at opset 17; nodes keep their names. Raises GraphError for int8 nodes."""
    writer = _Writer(graph)
    for node in graph.nodes:
        if node.type.dtype != "float32":
            raise ir.GraphError(
                f"{node.name} is {node.type.dtype}; only float graphs are written", node.name, node.path
            )
        if not isinstance(node.op, ir.Input):
            _write(writer, node)
    proto = helper.make_graph(
        writer.nodes,
        graph.name,
        [_value_info(node.name, node.type) for node in graph.inputs],
        [_value_info(name, graph.type_of(name)) for name in graph.outputs],
        [numpy_helper.from_array(np.ascontiguousarray(data), name) for name, data in writer.constants.items()],
    )
    return helper.make_model(
        proto, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="xceptile"
    )


def _value_info(name: str, type_: ir.TensorType) -> onnx.ValueInfoProto:
    shape = type_.shape
    nchw = shape if len(shape) == 2 else (shape[0], shape[3], shape[1], shape[2])
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, nchw)


def _window_attributes(op: ir.Conv2d | ir.DepthwiseConv2d | ir.MaxPool2d) -> dict[str, Any]:
    top, bottom, left, right = op.padding
    attributes = {"strides": list(op.strides), "pads": [top, left, bottom, right]}
    if not isinstance(op, ir.MaxPool2d) and op.dilation != (1, 1):
        attributes["dilations"] = list(op.dilation)
    return attributes


def _write(writer: _Writer, node: ir.Node) -> None:
    op, name, inputs = node.op, node.name, node.inputs
    relu = getattr(op, "relu", False)
    output = f"{name}/before_relu" if relu else name
    match op:
        case ir.Conv2d():
            weights, bias = writer.constant(inputs[1], (0, 3, 1, 2)), writer.constant(inputs[2])
            writer.node("Conv", (inputs[0], weights, bias), output, **_window_attributes(op))
        case ir.DepthwiseConv2d():
            constant = writer.graph.constants[inputs[1]]
            writer.constants[inputs[1]] = constant.data.transpose(2, 0, 1)[:, np.newaxis]
            attributes = {"group": constant.type.shape[2], **_window_attributes(op)}
            writer.node("Conv", (*inputs[:2], writer.constant(inputs[2])), output, **attributes)
        case ir.FullyConnected():
            constants = [writer.constant(n) for n in inputs[1:]]
            writer.node("Gemm", (inputs[0], *constants), output, transB=1)
        case ir.BatchNorm():
            constants = [writer.constant(n) for n in inputs[1:]]
            writer.node("BatchNormalization", (inputs[0], *constants), output, epsilon=op.epsilon)
        case ir.Relu():
            writer.node("Relu", inputs, output)
        case ir.MaxPool2d():
            writer.node("MaxPool", inputs, output, kernel_shape=list(op.kernel), **_window_attributes(op))
        case ir.Add():
            writer.node("Add", inputs, output)
        case ir.GlobalAveragePool():
            writer.node("GlobalAveragePool", inputs, f"{name}/map")
            writer.node("Flatten", (f"{name}/map",), output)
        case ir.Lookup("identity") | ir.Quantize() | ir.Dequantize():  # changes of form alone, written in real values
            writer.node("Identity", inputs, output)
        case _:
            raise ir.GraphError(f"{type(op).__name__} {name} has no float ONNX form", name, node.path)
    if relu:
        writer.node("Relu", (output,), name)
