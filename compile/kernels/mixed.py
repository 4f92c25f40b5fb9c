"""Lowers a mixed graph: its int8 part with the processor's own kernels, what stays in float with those of
``float_kernels``.

A ``Quantize`` node is an input of the int8 part and a tensor that a ``Dequantize`` reads is an output of it: both then
lie plain in the arena, as a network's ends do. The float part works on plain NHWC throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from ...models import graph as ir
from ...runtime import arithmetic
from ...targets.spec import TargetSpec
from .float_kernels import FloatAverage, FloatConv, FloatDepthwise, FloatElementwise, FloatMaxPool, FloatWindow
from .kernel_call import Activation, KernelCall, Weights

Family = Callable[..., tuple[KernelCall, ...]]


def is_mixed(graph: ir.Graph) -> bool:
    """Whether any tensor of the graph is float32."""
    return any(node.type.dtype == "float32" for node in graph.nodes)


def lower_mixed(
    graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None, family: Family
) -> tuple[KernelCall, ...]:
    """The whole graph's calls; ``family`` lowers the int8 part. Raises GraphError for what has no kernel."""
    order = {node.name: index for index, node in enumerate(graph.nodes)}
    calls = [_lower_float(graph, node) for node in graph.nodes if _is_float(graph, node)]
    # A call of the int8 part has the name of a node whose inputs are all made by nodes before it; sorting is stable.
    calls += family(int8_part(graph), target, choices)
    return tuple(sorted(calls, key=lambda call: order[call.name]))


def _is_float(graph: ir.Graph, node: ir.Node) -> bool:
    return isinstance(node.op, ir.Quantize) or node.type.dtype == "float32"


def int8_part(graph: ir.Graph) -> ir.Graph:
    """The int8 nodes of a mixed graph as a graph of their own, what crosses the border as its inputs and outputs."""
    nodes = [
        replace(node, op=ir.Input(), inputs=()) if isinstance(node.op, ir.Quantize) else node
        for node in graph.nodes
        if node.type.dtype == "int8"
    ]
    inputs = {node.name for node in nodes if isinstance(node.op, ir.Input)}
    read = {node.inputs[0] for node in graph.nodes if isinstance(node.op, ir.Dequantize)}
    outputs = tuple(node.name for node in nodes if node.name in read | set(graph.outputs) and node.name not in inputs)
    return ir.Graph(graph.name, (), graph.constants, outputs).with_nodes(tuple(nodes))


def _lower_float(graph: ir.Graph, node: ir.Node) -> KernelCall:
    if node.type.shape[0] != 1:
        raise ir.GraphError(f"{node.name}: kernels take one image, the shape is {node.type.shape}", node.name)
    kernel, operands = _kernel(graph, node)
    macs = 0
    if isinstance(kernel, FloatConv):
        macs = int(np.prod(node.type.shape)) * int(np.prod(graph.type_of(node.inputs[1]).shape[1:]))
    elif isinstance(kernel, FloatDepthwise):
        macs = int(np.prod(node.type.shape)) * kernel.window.kernel[0] * kernel.window.kernel[1]
    output = _activation(graph, node.name)
    return KernelCall(
        kernel.symbol,
        kernel.build,
        (*operands, output),
        node.name,
        node.name,
        path=node.path,
        macs=macs,
        tasks=kernel.tasks,
    )


Kernel = FloatConv | FloatDepthwise | FloatMaxPool | FloatAverage | FloatElementwise


def _kernel(graph: ir.Graph, node: ir.Node) -> tuple[Kernel, tuple[Activation | Weights, ...]]:
    """A node's kernel and all its operands but the output."""
    op, count = node.op, int(np.prod(node.type.shape))
    x = _activation(graph, node.inputs[0])
    constants = [graph.constants[name].data for name in node.inputs if name in graph.constants]
    match op:
        case ir.Conv2d() | ir.FullyConnected():
            weights = constants[0].astype(np.float32, copy=False)
            if isinstance(op, ir.FullyConnected):
                window = FloatWindow(1, 1, weights.shape[1], (1, 1), (1, 1), (0, 0), 1, 1)
            else:
                window = _window(graph, node, (weights.shape[1], weights.shape[2]), op.strides, op.padding)
            conv = FloatConv(window, weights.shape[0], op.relu)
            return conv, (x, Weights(conv.pack(weights)), Weights(constants[1].reshape(-1)))
        case ir.DepthwiseConv2d():
            kernel = constants[0].shape[0], constants[0].shape[1]
            depthwise = FloatDepthwise(_window(graph, node, kernel, op.strides, op.padding), op.relu)
            return depthwise, (x, Weights(constants[0].reshape(-1)), Weights(constants[1].reshape(-1)))
        case ir.MaxPool2d():
            return FloatMaxPool(_window(graph, node, op.kernel, op.strides, op.padding)), (x,)
        case ir.GlobalAveragePool():
            _, height, width, channels = graph.type_of(node.inputs[0]).shape
            return FloatAverage(height * width, channels), (x,)
        case ir.Add():
            kind = "add_relu" if op.relu else "add"
            return FloatElementwise(kind, count), (x, _activation(graph, node.inputs[1]))
        case ir.Relu():
            return FloatElementwise("relu", count), (x,)
        case ir.Quantize():
            q = node.type.per_tensor
            inverse = float(arithmetic.f32_quotient(1.0, q.scale))
            return FloatElementwise("quantize", count), (x, _float32(inverse, q.zero_point))
        case ir.Dequantize():
            q = graph.type_of(node.inputs[0]).per_tensor
            return FloatElementwise("dequantize", count), (x, _float32(q.scale, q.zero_point))
    raise ir.GraphError(f"no float kernel for {type(op).__name__}", node.name, node.path)


def _activation(graph: ir.Graph, name: str) -> Activation:
    kind = graph.type_of(name)
    return Activation(name, kind.dtype, int(np.prod(kind.shape)))


def _float32(*values: float) -> Weights:
    return Weights(np.array(values, np.float32))


def _window(
    graph: ir.Graph, node: ir.Node, kernel: tuple[int, int], strides: tuple[int, int], padding: ir.Pads
) -> FloatWindow:
    _, height, width, channels = graph.type_of(node.inputs[0]).shape
    _, out_height, out_width, _ = node.type.shape
    return FloatWindow(height, width, channels, kernel, strides, (padding[0], padding[2]), out_height, out_width)
