"""The numpy interpreters: the integer one is the truth every engine is compared with; the float one the yardstick.

Both walk the graph and free a tensor after its last reader. Integer matrix products run in floating point, because
BLAS has no integer product: in float32 where the weights prove that no partial sum reaches 2**24, else in float64
(2**53); within these, sums of integers are exact in any order. The result is asserted to fit int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from . import arithmetic
from .units import (
    Addition,
    Convolution,
    DepthwiseConvolution,
    Flattening,
    Interpolation,
    Joining,
    MaxPool,
    Mean,
    Multiplication,
    Rectifier,
    Selection,
    Stage,
    Table,
    Unit,
)

Array = NDArray[Any]


def pad_image(x: Array, padding: ir.Pads, value: float) -> Array:
    """(N, H, W, C) with a border of ``value``."""
    top, bottom, left, right = padding
    if not any(padding):
        return x
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=x.dtype.type(value))


Pair = tuple[int, int]


def tap(x: Array, i: int, j: int, kernel: Pair, strides: Pair, dilation: Pair = (1, 1)) -> Array:
    """The pixels of a padded image under position (i, j) of every window, (N, OH, OW, C), not copied."""
    oh, ow = (
        ir.conv_output_size(x.shape[1 + axis], kernel[axis], strides[axis], 0, 0, dilation[axis]) for axis in (0, 1)
    )
    top, left = i * dilation[0], j * dilation[1]
    rows = slice(top, top + (oh - 1) * strides[0] + 1, strides[0])
    columns = slice(left, left + (ow - 1) * strides[1] + 1, strides[1])
    return x[:, rows, columns]


def _convolve(x: Array, weights: Array, strides: Pair, padding: ir.Pads, dilation: Pair) -> Array:
    """Dense convolution in x's own float type. ``x`` (N, H, W, I), ``weights`` (O, KH, KW, I) -> (N, OH, OW, O)."""
    out_channels, kh, kw, in_channels = weights.shape
    x = pad_image(x, padding, 0.0)
    taps = [tap(x, i, j, (kh, kw), strides, dilation) for i in range(kh) for j in range(kw)]
    patches = np.stack(taps, axis=3)  # (N, OH, OW, KH * KW, I)
    n, oh, ow = patches.shape[:3]
    columns = patches.reshape(n * oh * ow, kh * kw * in_channels)
    product: Array = columns @ weights.reshape(out_channels, -1).T
    return product.reshape(n, oh, ow, out_channels)


def _convolve_depthwise(x: Array, weights: Array, strides: Pair, padding: ir.Pads, dilation: Pair) -> Array:
    """One filter per channel, in x's own type. ``x`` (N, H, W, C), ``weights`` (KH, KW, C) -> (N, OH, OW, C)."""
    kernel = weights.shape[0], weights.shape[1]
    x = pad_image(x, padding, 0.0)
    acc: Array = tap(x, 0, 0, kernel, strides, dilation) * weights[0, 0]
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            if (i, j) != (0, 0):
                acc += tap(x, i, j, kernel, strides, dilation) * weights[i, j]
    return acc


def _max_pool(x: Array, op: ir.MaxPool2d, lowest: float) -> Array:
    """Maximum over windows; a padded pixel holds ``lowest``."""
    padded = pad_image(x, op.padding, lowest)
    result: Array | None = None
    for i in range(op.kernel[0]):
        for j in range(op.kernel[1]):
            pixels = tap(padded, i, j, op.kernel, op.strides)
            result = pixels.copy() if result is None else np.maximum(result, pixels)
    assert result is not None
    return result


def _exact_dtype(weights: Array) -> type[np.float32] | type[np.float64]:
    """The smaller float type in which sums of (x - z) * w, |x - z| <= 255, are exact. Output channels first."""
    most = np.abs(weights.astype(np.int64)).reshape(weights.shape[0], -1).sum(axis=1).max()
    return np.float32 if most * 255 < 2**24 else np.float64


def _to_int32(acc: Array, bias: Array) -> arithmetic.Int32:
    """Adds the bias and asserts the domain: the accumulator, bias included, fits int32. ``acc`` holds integers."""
    total = acc.astype(np.int64) + bias.astype(np.int64)
    limit = 2**31
    if total.size and not (-limit <= total.min() and total.max() < limit):
        raise OverflowError("an accumulator left int32: the graph was not produced by a quantizer that proves bounds")
    return total.astype(np.int32)


def _run_int8(node: ir.Node, graph: ir.Graph, args: list[Array]) -> Array:
    """One int8 node. ``args`` are its inputs' values in order."""
    types = [graph.type_of(name) for name in node.inputs]
    op, out = node.op, node.type
    match op:
        case ir.Conv2d() | ir.DepthwiseConv2d() | ir.FullyConnected():
            z_in = types[0].per_tensor.zero_point
            if isinstance(op, ir.DepthwiseConv2d):
                centred = args[0].astype(np.int32) - np.int32(z_in)
                acc = _convolve_depthwise(centred, args[1].astype(np.int32), op.strides, op.padding, op.dilation)
            else:
                dtype = _exact_dtype(args[1])
                x, w = np.subtract(args[0], z_in, dtype=dtype), args[1].astype(dtype)
                acc = _convolve(x, w, op.strides, op.padding, op.dilation) if isinstance(op, ir.Conv2d) else x @ w.T
            m = arithmetic.output_multipliers(types[0].per_tensor.scale, types[1].per_axis.scales, out.per_tensor.scale)
            return arithmetic.scale_accumulator(_to_int32(acc, args[2]), m, out.per_tensor.zero_point, op.relu)
        case ir.Relu():
            return arithmetic.relu(args[0].astype(np.int8, copy=False), types[0].per_tensor.zero_point)
        case ir.MaxPool2d():
            return _max_pool(args[0], op, arithmetic.INT8_MIN)
        case ir.Add():
            a, b = types[0].per_tensor, types[1].per_tensor
            constants = arithmetic.add_constants(a.scale, a.zero_point, b.scale, b.zero_point, out.per_tensor.scale)
            return arithmetic.add(
                args[0].astype(np.int8, copy=False),
                args[1].astype(np.int8, copy=False),
                constants,
                out.per_tensor.zero_point,
                op.relu,
            )
        case ir.Lookup(function, parameters):
            q = types[0].per_tensor
            table = arithmetic.lookup_table(
                function, parameters, q.scale, q.zero_point, out.per_tensor.scale, out.per_tensor.zero_point
            )
            looked_up: Array = table[args[0].astype(np.int16) - arithmetic.INT8_MIN]
            return looked_up
        case ir.GlobalAveragePool():
            pixels = types[0].shape[1] * types[0].shape[2]
            total = args[0].astype(np.int64).sum(axis=(1, 2)) - pixels * types[0].per_tensor.zero_point
            m = arithmetic.average_multiplier(types[0].per_tensor.scale, out.per_tensor.scale, pixels)
            return arithmetic.scale_accumulator(_to_int32(total, np.zeros((), np.int32)), m, out.per_tensor.zero_point)
        case ir.Multiply():
            a, b = types[0].per_tensor, types[1].per_tensor
            multiplier = arithmetic.multiply_multiplier(a.scale, b.scale, out.per_tensor.scale)
            gate = _over_pixels(args[1], args[0])
            return arithmetic.multiply(args[0], gate, a.zero_point, b.zero_point, multiplier, out.per_tensor.zero_point)
        case ir.Resize() if op.method == "bilinear":
            return arithmetic.resize_bilinear(args[0], *_bilinear_taps(op, types[0].shape))
        case ir.Concatenate() | ir.Reshape() | ir.Resize():
            return _moved(node, args)
        case ir.Dequantize():
            q = types[0].per_tensor
            centred = (args[0].astype(np.int32) - q.zero_point).astype(np.float32)
            return np.multiply(centred, np.float32(q.scale), dtype=np.float32)
    raise ir.GraphError(f"no integer meaning for {type(op).__name__}", node.name, node.path)


def _over_pixels(gate: Array, x: Array) -> Array:
    """A gate (N, C) as it meets every pixel of ``x``; a tensor of x's shape as it is."""
    return gate if gate.ndim == x.ndim else gate[:, None, None, :]


def _bilinear_taps(op: ir.Resize, shape: tuple[int, ...]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Of rows and of columns."""
    rows = arithmetic.resize_taps(shape[1], op.size[0], op.coordinates)
    return rows, arithmetic.resize_taps(shape[2], op.size[1], op.coordinates)


def _moved(node: ir.Node, args: list[Array]) -> Array:
    """Values in other places, int8 or float."""
    match node.op:
        case ir.Concatenate():
            return np.concatenate(args, axis=-1)
        case ir.Reshape(shape):
            return args[0].reshape(args[0].shape[0], *shape)
        case ir.Resize(size, _, coordinates):
            rows = arithmetic.nearest_positions(args[0].shape[1], size[0], coordinates)
            columns = arithmetic.nearest_positions(args[0].shape[2], size[1], coordinates)
            return args[0][:, rows][:, :, columns]
    raise ir.GraphError(f"{node.name} moves nothing", node.name, node.path)


def _resize_float(op: ir.Resize, x: Array) -> Array:
    """Bilinear, in float32."""
    positions = [arithmetic.resize_positions(x.shape[1 + i], op.size[i], op.coordinates) for i in (0, 1)]
    for axis, position in enumerate(positions, start=1):
        before = np.floor(position).astype(np.int32)
        after = np.minimum(before + 1, x.shape[axis] - 1)
        weight = (position - before).astype(np.float32).reshape((-1,) + (1,) * (3 - axis))
        low, high = np.take(x, before, axis), np.take(x, after, axis)
        x = low + (high - low) * weight
    return x


def _run_float(node: ir.Node, graph: ir.Graph, args: list[Array]) -> Array:
    """One float node. ``args`` are its inputs' values in order, float32."""
    op = node.op
    match op:
        case ir.Conv2d():
            y: Array = _convolve(args[0], args[1], op.strides, op.padding, op.dilation) + args[2]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.DepthwiseConv2d():
            y = _convolve_depthwise(args[0], args[1], op.strides, op.padding, op.dilation) + args[2]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.FullyConnected():
            y = args[0] @ args[1].T + args[2]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.BatchNorm():
            x, gamma, beta, mean, variance = args
            factor = gamma / np.sqrt(variance + np.float32(op.epsilon))
            return np.asarray(x * factor + (beta - mean * factor), np.float32)
        case ir.Relu():
            return np.maximum(args[0], np.float32(0))
        case ir.MaxPool2d():
            return _max_pool(args[0], op, -np.inf)
        case ir.Add():
            y = args[0] + args[1]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.GlobalAveragePool():
            mean_: Array = args[0].mean(axis=(1, 2), dtype=np.float32)
            return mean_
        case ir.Lookup(function, parameters):
            return arithmetic.FUNCTIONS[function](args[0].astype(np.float64), *parameters).astype(np.float32)
        case ir.Multiply():
            return np.asarray(args[0] * _over_pixels(args[1], args[0]))
        case ir.Resize() if op.method == "bilinear":
            return _resize_float(op, args[0])
        case ir.Concatenate() | ir.Reshape() | ir.Resize():
            return _moved(node, args)
        case ir.Quantize():
            q = node.type.per_tensor
            # Times the reciprocal, as XNNPACK does: a quotient rounds some ties differently.
            scaled = np.rint(np.multiply(args[0], arithmetic.f32_quotient(1.0, q.scale), dtype=np.float32))
            limited: Array = np.clip(scaled + q.zero_point, arithmetic.INT8_MIN, arithmetic.INT8_MAX)
            return limited.astype(np.int8)
    raise ir.GraphError(f"no float meaning for {type(op).__name__}", node.name, node.path)


def run_node(graph: ir.Graph, node: ir.Node, args: list[Array]) -> Array:
    """Executes one node on its inputs' values; int8 and float32 nodes may be mixed in one graph."""
    integer = graph.type_of(node.inputs[0]).dtype == "int8"
    return (_run_int8 if integer else _run_float)(node, graph, args)


def iterate(graph: ir.Graph, feeds: Mapping[str, Array], keep: Iterable[str] = ()) -> Iterator[tuple[str, Array]]:
    """Yields every tensor (name, value) in graph order, inputs included; frees each after its last reader.

    ``feeds`` holds a value for every input. Raises GraphError where a fed value has another shape or element type.
    """
    last_use = {name: index for index, node in enumerate(graph.nodes) for name in node.inputs}
    kept = set(graph.outputs) | set(keep)
    values: dict[str, Array] = {}
    for index, node in enumerate(graph.nodes):
        if isinstance(node.op, ir.Input):
            value = np.asarray(feeds[node.name])
            if value.shape != node.type.shape or str(value.dtype) != node.type.dtype:
                raise ir.GraphError(
                    f"input {node.name} is {value.dtype}{list(value.shape)}, the network takes "
                    f"{node.type.dtype}{list(node.type.shape)}",
                    node.name,
                )
        else:
            args = [values[name] if name in values else graph.constants[name].data for name in node.inputs]
            value = run_node(graph, node, args)
            for name in set(node.inputs):
                if name in values and last_use[name] == index and name not in kept:
                    del values[name]
        values[node.name] = value
        yield node.name, value


def run(graph: ir.Graph, *inputs: Array) -> tuple[Array, ...]:
    """The outputs of a graph, in order. ``inputs`` in the order of ``graph.inputs``."""
    feeds = {node.name: value for node, value in zip(graph.inputs, inputs, strict=True)}
    wanted = set(graph.outputs)
    outputs = {name: value for name, value in iterate(graph, feeds) if name in wanted}
    return tuple(outputs[name] for name in graph.outputs)


def run_units(units: Iterable[Unit], feeds: Mapping[str, Array], outputs: Iterable[str]) -> dict[str, Array]:
    """The tensors ``outputs`` of an int8 network's units, computed with the constants that kernels use: the fused form.

    ``feeds`` holds a value for every input of the network.
    """
    values = dict(feeds)
    for unit in units:
        value = values[unit.inputs[0]]
        for stage in unit:
            value = _run_stage(stage, value, values)
        values[unit.name] = value
    return {name: values[name] for name in outputs}


def _run_stage(stage: Stage, x: Array, values: Mapping[str, Array]) -> Array:
    """One stage on int8 ``x``."""
    match stage:
        case Convolution() | DepthwiseConvolution():
            return _run_weighted(stage, x)
        case Rectifier():
            assert stage.zero_point is not None
            return arithmetic.relu(x, stage.zero_point)
        case MaxPool():
            assert isinstance(stage.node.op, ir.MaxPool2d)
            return _max_pool(x, stage.node.op, arithmetic.INT8_MIN)
        case Addition():
            assert stage.integers is not None
            constants, zero_point = stage.integers.constants, stage.integers.zero_point
            return arithmetic.add(x, values[stage.other], constants, zero_point, stage.relu)
        case Mean():
            assert stage.integers is not None
            total = x.astype(np.int64).sum(axis=(1, 2)) + stage.integers.start
            return arithmetic.scale_accumulator(
                total.astype(np.int32), stage.integers.multiplier, stage.integers.zero_point
            )
        case Multiplication():
            assert stage.integers is not None
            i, other = stage.integers, values[stage.other]
            gate = _over_pixels(other, x)
            return arithmetic.multiply(x, gate, i.a_zero, i.b_zero, i.multiplier, i.zero_point)
        case Interpolation():
            return arithmetic.resize_bilinear(x, stage.rows, stage.columns)
        case Selection():
            return x[:, stage.rows][:, :, stage.columns]
        case Joining():
            return _moved(stage.node, [values[name] for name in stage.node.inputs])
        case Flattening():
            return _moved(stage.node, [x])
        case Table():
            assert stage.table is not None
            looked_up: Array = stage.table[x.astype(np.int16) - arithmetic.INT8_MIN]
            return looked_up


def _run_weighted(stage: Convolution | DepthwiseConvolution, x: Array) -> Array:
    integers, geometry = stage.integers, stage.geometry
    assert integers is not None
    image = x.reshape(geometry.batch, geometry.in_height, geometry.in_width, geometry.in_channels)
    padded = pad_image(image, geometry.padding, integers.padding)
    if isinstance(stage, DepthwiseConvolution):
        weights = stage.weights.astype(np.int32)
        acc = _convolve_depthwise(padded.astype(np.int32), weights, geometry.strides, (0, 0, 0, 0), geometry.dilation)
    else:
        # |x| <= 128 here, within the bound that ``_exact_dtype`` assumes.
        dtype = _exact_dtype(stage.weights)
        weights = stage.weights.astype(dtype)
        acc = _convolve(padded.astype(dtype), weights, geometry.strides, (0, 0, 0, 0), geometry.dilation)
    total = _to_int32(acc, integers.start)
    if np.any(total < integers.least) or np.any(total > integers.greatest):
        raise OverflowError(f"{stage.node.name}: an accumulator leaves the bound that its weights prove")
    made = arithmetic.scale_accumulator(total, integers.multipliers, integers.zero_point, stage.relu)
    return made.reshape(stage.node.type.shape)
