"""What a graph must satisfy, as a specification that runs: after every import, pass and quantization.

Structure (names, order, arity), the shape and element type of every operator, and, for int8 nodes, the rules of the
integer contract that can be read off the graph.
"""

from __future__ import annotations

import math

import numpy as np

from . import graph as ir

METHODS = ("bilinear", "nearest")
COORDINATES = ("align corners", "half pixel", "legacy")
LOOKUPS = {"identity": 0, "sigmoid": 0, "tanh": 0, "leaky_relu": 1, "clip": 2}  # functions, and their parameters
WEIGHT_MAX = 127
ACCUMULATOR_LIMIT = 2**31
LARGEST_DIFFERENCE = 255  # |x - zero point| of two int8 values


def verify(graph: ir.Graph) -> None:
    """Raises GraphError, with the node's name and module path, at the first rule that is broken."""
    seen: dict[str, ir.TensorType] = {}
    if not any(isinstance(node.op, ir.Input) for node in graph.nodes):
        raise ir.GraphError(f"graph {graph.name}: has no input")
    for index, node in enumerate(graph.nodes):
        _check_place(graph, node, index, seen)
        _check_type(node, node.type, "its tensor")
        expected = _infer(graph, node)
        if node.type.shape != expected:
            raise _error(node, f"has shape {list(node.type.shape)}, its inputs make {list(expected)}")
        _check_dtypes(graph, node)
        seen[node.name] = node.type
    if not graph.outputs:
        raise ir.GraphError(f"graph {graph.name}: has no output")
    for name in graph.outputs:
        if name not in seen:
            raise ir.GraphError(f"graph {graph.name}: output {name} is no node", name)


def _error(node: ir.Node, message: str) -> ir.GraphError:
    where = f" ({node.path})" if node.path and node.path != node.name else ""
    return ir.GraphError(f"{type(node.op).__name__} {node.name}{where}: {message}", node.name, node.path)


def _check_place(graph: ir.Graph, node: ir.Node, index: int, seen: dict[str, ir.TensorType]) -> None:
    """Names are unique, inputs first, every input made before it is read, constants where constants belong."""
    if not node.name or node.name in seen or node.name in graph.constants:
        raise _error(node, "has no name of its own: every node and constant needs one")
    if isinstance(node.op, ir.Input) and any(not isinstance(n.op, ir.Input) for n in graph.nodes[:index]):
        raise _error(node, "comes after other nodes: inputs come first")
    facts = ir.FACTS[type(node.op)]
    ranks = facts.ranks_of(len(node.inputs))
    if len(node.inputs) != len(ranks):
        more = " or more" if facts.variadic else ""
        raise _error(node, f"has {len(node.inputs)} inputs, it takes {len(ranks)}{more}")
    tensors = len(ranks) - facts.constants
    for name in node.inputs[:tensors]:
        if name not in seen:
            fault = "is a constant, not a tensor" if name in graph.constants else "is not made before it"
            raise _error(node, f"input {name} {fault}")
    for name in node.inputs[tensors:]:
        if name not in graph.constants:
            raise _error(node, f"input {name} must be a constant")
        _check_type(node, graph.constants[name].type, f"constant {name}")


def _check_type(node: ir.Node, type_: ir.TensorType, what: str) -> None:
    """Known element type, positive sizes, parameters that mean something."""
    if type_.dtype not in ("float32", "int8", "int32"):
        raise _error(node, f"{what} is {type_.dtype}; float32, int8 and int32 are known")
    if not type_.shape or min(type_.shape) < 1:
        raise _error(node, f"{what} has shape {list(type_.shape)}")
    if (type_.quant is None) != (type_.dtype == "float32"):
        raise _error(node, f"{what} is {type_.dtype} and has quantization {type_.quant}")
    scales: tuple[float, ...] = ()
    match type_.quant:
        case ir.PerTensor(scale, zero_point):
            scales = (scale,)
            if not -128 <= zero_point <= 127 or type(zero_point) is not int:
                raise _error(node, f"{what} has zero point {zero_point!r}; it is an int in [-128, 127]")
        case ir.PerAxis(scales, axis):
            if not 0 <= axis < len(type_.shape) or len(scales) != type_.shape[axis]:
                raise _error(node, f"{what} has {len(scales)} scales on axis {axis} of shape {list(type_.shape)}")
    array = np.asarray(scales, np.float64)
    if not (np.isfinite(array).all() and (array > 0).all() and np.array_equal(array, array.astype(np.float32))):
        raise _error(node, f"{what} has a scale that is not a positive float32")


def _window(node: ir.Node, x: tuple[int, ...], kernel: tuple[int, int]) -> tuple[int, int]:
    """Output height and width of a window operator."""
    assert isinstance(node.op, ir.Conv2d | ir.DepthwiseConv2d | ir.MaxPool2d)
    strides, pads, dilation = node.op.strides, node.op.padding, getattr(node.op, "dilation", (1, 1))
    if min(kernel) < 1 or min(strides) < 1 or min(pads) < 0 or min(dilation) < 1:
        raise _error(node, f"window {kernel}, strides {strides}, padding {pads}, dilation {dilation}")
    height = ir.conv_output_size(x[1], kernel[0], strides[0], *pads[:2], dilation[0])
    width = ir.conv_output_size(x[2], kernel[1], strides[1], *pads[2:], dilation[1])
    if height < 1 or width < 1:
        raise _error(node, f"window {list(kernel)} does not fit the {x[1]}x{x[2]} map")
    return height, width


def _infer(graph: ir.Graph, node: ir.Node) -> tuple[int, ...]:
    """The output's shape from the inputs' shapes."""
    op = node.op
    shapes = [graph.type_of(name).shape for name in node.inputs]
    _check_ranks(node, shapes)
    match op:
        case ir.Input():
            return node.type.shape
        case ir.Conv2d():
            x, w, bias = shapes
            _check_equal(node, "input channels", x[3], w[3])
            _check_equal(node, "bias", bias, (w[0],))
            return (x[0], *_window(node, x, (w[1], w[2])), w[0])
        case ir.DepthwiseConv2d():
            x, w, bias = shapes
            _check_equal(node, "channels", x[3], w[2])
            _check_equal(node, "bias", bias, (w[2],))
            return (x[0], *_window(node, x, (w[0], w[1])), w[2])
        case ir.FullyConnected():
            x, w, bias = shapes
            _check_equal(node, "input channels", x[1], w[1])
            _check_equal(node, "bias", bias, (w[0],))
            return (x[0], w[0])
        case ir.BatchNorm():
            for name, shape in zip(node.inputs[1:], shapes[1:], strict=True):
                _check_equal(node, name, shape, (shapes[0][-1],))
            return shapes[0]
        case ir.MaxPool2d():
            if max(op.padding[:2]) >= op.kernel[0] or max(op.padding[2:]) >= op.kernel[1]:
                raise _error(node, f"padding {op.padding} as wide as the window {op.kernel}: a maximum over nothing")
            return (shapes[0][0], *_window(node, shapes[0], op.kernel), shapes[0][3])
        case ir.Add():
            _check_equal(node, "shapes", shapes[0], shapes[1])
            return shapes[0]
        case ir.GlobalAveragePool():
            return (shapes[0][0], shapes[0][3])
        case ir.Multiply():
            x, gate = shapes
            if gate != x and gate != (x[0], x[-1]):
                raise _error(node, f"shapes: {x} and {gate} differ, and the second is not a gate {(x[0], x[-1])}")
            return x
        case ir.Concatenate():
            for name, shape in zip(node.inputs, shapes, strict=True):
                _check_equal(node, f"{name}: sizes but channels", shape[:-1], shapes[0][:-1])
            return (*shapes[0][:-1], sum(shape[-1] for shape in shapes))
        case ir.Resize():
            if min(op.size) < 1 or op.method not in METHODS or op.coordinates not in COORDINATES:
                raise _error(node, f"size {op.size}, method {op.method!r}, coordinates {op.coordinates!r}")
            return (shapes[0][0], *op.size, shapes[0][3])
        case ir.Reshape():
            flat = (math.prod(shapes[0][1:]),)
            if op.shape != flat and op.shape != (1, 1, *flat):
                raise _error(node, f"makes {op.shape} of {shapes[0][1:]}; it makes {flat} or {(1, 1, *flat)}")
            return (shapes[0][0], *op.shape)
        case ir.Lookup(function, parameters):
            if LOOKUPS.get(function) != len(parameters) or not all(map(math.isfinite, parameters)):
                known = ", ".join(LOOKUPS)
                raise _error(node, f"function {function!r} with parameters {parameters}; known are {known}")
            return shapes[0]
        case ir.Relu() | ir.Quantize() | ir.Dequantize():
            return shapes[0]


def _check_ranks(node: ir.Node, shapes: list[tuple[int, ...]]) -> None:
    for name, shape, rank in zip(node.inputs, shapes, ir.FACTS[type(node.op)].ranks_of(len(shapes)), strict=True):
        if len(shape) != rank and not (rank is None and len(shape) in (2, 4)):
            raise _error(node, f"input {name} has shape {list(shape)}; its rank must be {rank or '2 or 4'}")


def _check_equal(node: ir.Node, what: str, a: object, b: object) -> None:
    if a != b:
        raise _error(node, f"{what}: {a} and {b} differ")


def _check_dtypes(graph: ir.Graph, node: ir.Node) -> None:
    """Element types and, for int8, the contract."""
    if isinstance(node.op, ir.Input):
        _per_tensor_or_float(node, node.type, "its tensor")
        return
    types = [graph.type_of(name) for name in node.inputs]
    activations = types[: len(types) - ir.FACTS[type(node.op)].constants]
    dtypes = tuple(type_.dtype for type_ in (*activations, node.type))
    for name, type_ in zip((*node.inputs[: len(activations)], node.name), (*activations, node.type), strict=True):
        _per_tensor_or_float(node, type_, f"tensor {name}")
    wanted: tuple[str, ...]
    match node.op:
        case ir.Quantize():
            wanted = ("float32", "int8")
        case ir.Dequantize():
            wanted = ("int8", "float32")
        case ir.BatchNorm():
            wanted = ("float32", "float32")
        case _:
            wanted = (dtypes[0],) * len(dtypes)
    if dtypes != wanted:
        raise _error(node, f"works on {', '.join(dtypes)}; it takes {', '.join(wanted)}")
    if dtypes[0] == "int8":
        _check_contract(graph, node, types)
    elif ir.FACTS[type(node.op)].constants:
        _check_float_constants(graph, node)


def _per_tensor_or_float(node: ir.Node, type_: ir.TensorType, what: str) -> None:
    if type_.dtype != "float32" and not (type_.dtype == "int8" and isinstance(type_.quant, ir.PerTensor)):
        raise _error(node, f"{what} is {type_.dtype} {type_.quant}; an activation is float32, or int8 per tensor")


def _check_float_constants(graph: ir.Graph, node: ir.Node) -> None:
    for name in node.inputs[1:]:
        constant = graph.constants[name]
        if constant.type.dtype != "float32":
            raise _error(node, f"constant {name} is {constant.type.dtype} in a float operator")
        if not np.isfinite(constant.data).all():
            raise _error(node, f"constant {name} holds NaN or infinity: check the checkpoint")
    if isinstance(node.op, ir.BatchNorm):
        least = float(graph.constants[node.inputs[4]].data.min()) + node.op.epsilon
        if not (math.isfinite(node.op.epsilon) and least > 0):
            raise _error(node, f"variance + epsilon is {least:g}; it must be positive")


def _check_contract(graph: ir.Graph, node: ir.Node, types: list[ir.TensorType]) -> None:
    """The integer contract of one int8 node."""
    match node.op:
        case ir.Relu():
            if node.type.per_tensor != ir.PerTensor(types[0].per_tensor.scale, -128):
                raise _error(
                    node, f"maps {types[0].quant} to {node.type.quant}; a ReLU keeps the scale, with zero point -128"
                )
        case op if ir.FACTS[type(op)].keeps_quantization:
            for type_ in types:
                if node.type.quant != type_.quant:
                    raise _error(node, f"maps {type_.quant} to {node.type.quant}; it keeps its input's parameters")
        case op if (axis := ir.FACTS[type(op)].channel_axis) is not None:
            _check_weights(graph, node, types[0].per_tensor, axis)


def _check_weights(graph: ir.Graph, node: ir.Node, x: ir.PerTensor, axis: int) -> None:
    """Weights int8 in [-127, 127], a scale per output channel; bias int32 of scale s_in * s_w; no overflow."""
    weights, bias = (graph.constants[name] for name in node.inputs[1:])
    if weights.type.dtype != "int8" or not isinstance(weights.type.quant, ir.PerAxis):
        kind = f"{weights.type.dtype} {type(weights.type.quant).__name__}"
        raise _error(node, f"weights are {kind}; they must be int8, one scale per output channel")
    if weights.type.quant.axis != axis:
        raise _error(
            node, f"weights are scaled along axis {weights.type.quant.axis}; it is {axis}, the output channels"
        )
    if int(weights.data.min()) < -WEIGHT_MAX:
        raise _error(node, "weights hold -128; they are symmetric, in [-127, 127]")
    if bias.type.dtype != "int32" or not isinstance(bias.type.quant, ir.PerAxis):
        kind = f"{bias.type.dtype} {type(bias.type.quant).__name__}"
        raise _error(node, f"bias is {kind}; it must be int32, one scale per output channel")
    scales = np.multiply(np.float32(x.scale), np.asarray(weights.type.quant.scales, np.float32), dtype=np.float32)
    if not np.array_equal(scales, np.asarray(bias.type.quant.scales, np.float32)):
        raise _error(node, "bias does not have the scale of the input times that of the weights")
    others = tuple(i for i in range(weights.data.ndim) if i != axis)
    # dtype=int64 sums without a wide copy of the weights; abs of -127..127 stays in int8.
    total = np.abs(weights.data).sum(axis=others, dtype=np.int64) * LARGEST_DIFFERENCE
    if int((total + np.abs(bias.data.astype(np.int64))).max()) >= ACCUMULATOR_LIMIT:
        raise _error(node, "its accumulator may leave int32: quantize it with larger weight scales")
