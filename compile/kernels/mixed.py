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
from ...runtime.units import Addition, Convolution, DepthwiseConvolution, MaxPool, Mean, Rectifier, Unit
from ...targets.spec import TargetSpec
from ..fusion import Rules, units
from .float_kernels import FloatAverage, FloatConv, FloatDepthwise, FloatElementwise, FloatMaxPool
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
    calls = [_convert(graph, node) for node in graph.nodes if isinstance(node.op, ir.Quantize | ir.Dequantize)]
    calls += [_lower_float(unit) for unit in units(float_part(graph), Rules())]
    # A call of the int8 part has the name of a node whose inputs are all made by nodes before it; sorting is stable.
    calls += family(int8_part(graph), target, choices)
    return tuple(sorted(calls, key=lambda call: order[call.name]))


def float_part(graph: ir.Graph) -> ir.Graph:
    """The float32 nodes of a mixed graph as a graph of their own, what crosses the border as its inputs."""
    nodes = [
        replace(node, op=ir.Input(), inputs=()) if isinstance(node.op, ir.Dequantize) else node
        for node in graph.nodes
        if node.type.dtype == "float32"
    ]
    return ir.Graph(graph.name, (), graph.constants, ()).with_nodes(tuple(nodes))


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


Kernel = FloatConv | FloatDepthwise | FloatMaxPool | FloatAverage | FloatElementwise


def _convert(graph: ir.Graph, node: ir.Node) -> KernelCall:
    """A ``Quantize`` or a ``Dequantize``."""
    source = graph.node(node.inputs[0])
    if isinstance(node.op, ir.Quantize):
        q, kind = node.type.per_tensor, "quantize"
        factor = float(arithmetic.f32_quotient(1.0, q.scale))
    else:
        q, kind = source.type.per_tensor, "dequantize"
        factor = q.scale
    x, y = _activation(source), _activation(node)
    kernel = FloatElementwise(kind, y.count)
    parameters = Weights(np.array([factor, q.zero_point], np.float32))
    return KernelCall(
        kernel.symbol, kernel.build, (x, parameters, y), y.name, node.name, kind, node.path, tasks=kernel.tasks
    )


def _lower_float(unit: Unit) -> KernelCall:
    geometry, node = unit.anchor.geometry, unit.anchor.node
    if geometry.batch != 1:
        raise ir.GraphError(f"{unit.name}: kernels take one image, the shape is {node.type.shape}", unit.name)
    kernel, constants = _kernel(unit)
    y = _activation(node)
    count = geometry.in_pixels * geometry.in_channels
    inputs = [Activation(name, "float32", count) for name in unit.inputs]
    return KernelCall(
        kernel.symbol, kernel.build, (*inputs, *constants, y), y.name, unit.name, unit.kind, unit.path, unit.macs,
        kernel.tasks,
    )  # fmt: skip


def _kernel(unit: Unit) -> tuple[Kernel, tuple[Weights, ...]]:
    """A unit's kernel and its constants, which stand between the tensors that it reads and the one that it makes."""
    stage = unit.anchor
    match stage:
        case Convolution():
            conv = FloatConv(stage.geometry, stage.relu)
            packed = conv.pack(stage.weights.astype(np.float32, copy=False))
            return conv, (Weights(packed), Weights(stage.bias))
        case DepthwiseConvolution():
            return FloatDepthwise(stage.geometry, stage.relu), (Weights(stage.weights.reshape(-1)), Weights(stage.bias))
        case MaxPool():
            return FloatMaxPool(stage.geometry), ()
        case Mean():
            return FloatAverage(stage.geometry.in_pixels, stage.geometry.in_channels), ()
        case Addition():
            return FloatElementwise("add_relu" if stage.relu else "add", _activation(stage.node).count), ()
        case Rectifier():
            return FloatElementwise("relu", _activation(stage.node).count), ()
    operator = type(stage.node.op).__name__
    raise ir.GraphError(f"{unit.name}: no float kernel for {operator}", unit.name, unit.path)


def _activation(node: ir.Node) -> Activation:
    return Activation(node.name, node.type.dtype, int(np.prod(node.type.shape)))
