"""The numpy interpreters: the integer one is the truth every engine is compared with; the float one the yardstick.

Both walk the graph and free a tensor after its last reader. Integer matrix products run in float64, where sums of
int8 products are exact (below 2**53), because BLAS has no integer product; the result is asserted to fit int32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from . import arithmetic

Array = NDArray[np.generic]


def window_view(x: Array, kernel: tuple[int, int], strides: tuple[int, int]) -> Array:
    """All windows of a padded image, without copying: (N, H, W, C) -> (N, OH, OW, C, KH, KW)."""
    view = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))
    return view[:, :: strides[0], :: strides[1]]


def pad_image(x: Array, padding: ir.Pads, value: float) -> Array:
    """(N, H, W, C) with a border of ``value``."""
    top, bottom, left, right = padding
    if not any(padding):
        return x
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)), constant_values=x.dtype.type(value))


def _convolve(x: Array, weights: Array, strides: tuple[int, int], padding: ir.Pads) -> Array:
    """Dense convolution in x's own float type. ``x`` (N, H, W, I), ``weights`` (O, KH, KW, I) -> (N, OH, OW, O)."""
    out_channels, kh, kw, in_channels = weights.shape
    x = pad_image(x, padding, 0.0)
    if (kh, kw) == (1, 1):
        patches = x[:, :: strides[0], :: strides[1]]
    else:
        patches = window_view(x, (kh, kw), strides).transpose(0, 1, 2, 4, 5, 3)
    n, oh, ow = patches.shape[:3]
    columns = patches.reshape(n * oh * ow, kh * kw * in_channels)
    product = columns @ weights.reshape(out_channels, -1).T
    return product.reshape(n, oh, ow, out_channels)


def _convolve_depthwise(x: Array, weights: Array, strides: tuple[int, int], padding: ir.Pads) -> Array:
    """One filter per channel, in x's own type. ``x`` (N, H, W, C), ``weights`` (KH, KW, C) -> (N, OH, OW, C)."""
    kh, kw, _ = weights.shape
    x = pad_image(x, padding, 0.0)
    oh, ow = (x.shape[1] - kh) // strides[0] + 1, (x.shape[2] - kw) // strides[1] + 1
    acc = np.zeros((x.shape[0], oh, ow, x.shape[3]), x.dtype)
    for i in range(kh):
        for j in range(kw):
            tap = x[:, i : i + (oh - 1) * strides[0] + 1 : strides[0], j : j + (ow - 1) * strides[1] + 1 : strides[1]]
            acc += tap * weights[i, j]
    return acc


def _max_pool(x: Array, op: ir.MaxPool2d, lowest: float) -> Array:
    """Maximum over windows; a padded pixel holds ``lowest``."""
    padded = pad_image(x, op.padding, lowest)
    result: Array = window_view(padded, op.kernel, op.strides).max(axis=(-2, -1))
    return result


def _to_int32(acc: NDArray[np.float64] | NDArray[np.int64], bias: Array) -> arithmetic.Int32:
    """Adds the bias and asserts the domain: the accumulator, bias included, fits int32."""
    total = acc + bias.astype(acc.dtype)
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
                acc = _convolve_depthwise(
                    args[0].astype(np.int32) - np.int32(z_in), args[1].astype(np.int32), op.strides, op.padding
                ).astype(np.int64)
            elif isinstance(op, ir.Conv2d):
                acc = _convolve(args[0].astype(np.float64) - z_in, args[1].astype(np.float64), op.strides, op.padding)
            else:
                acc = (args[0].astype(np.float64) - z_in) @ args[1].astype(np.float64).T
            m = arithmetic.output_multipliers(
                types[0].per_tensor.scale, types[1].per_axis.scales, out.per_tensor.scale
            )
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
        case ir.Requantize():
            k = arithmetic.requantize_multiplier(types[0].per_tensor.scale, out.per_tensor.scale)
            return arithmetic.requantize(
                args[0].astype(np.int8, copy=False), types[0].per_tensor.zero_point, k, out.per_tensor.zero_point
            )
        case ir.GlobalAveragePool():
            pixels = types[0].shape[1] * types[0].shape[2]
            total = args[0].astype(np.int64).sum(axis=(1, 2)) - pixels * types[0].per_tensor.zero_point
            m = arithmetic.average_multiplier(types[0].per_tensor.scale, out.per_tensor.scale, pixels)
            return arithmetic.scale_accumulator(total.astype(np.int32), m, out.per_tensor.zero_point)
        case ir.Dequantize():
            q = types[0].per_tensor
            centred = (args[0].astype(np.int32) - q.zero_point).astype(np.float32)
            return np.multiply(centred, np.float32(q.scale), dtype=np.float32)
    raise ir.GraphError(f"no integer meaning for {type(op).__name__}", node.name, node.path)


def _run_float(node: ir.Node, graph: ir.Graph, args: list[Array]) -> Array:
    """One float node. ``args`` are its inputs' values in order, float32."""
    op = node.op
    match op:
        case ir.Conv2d():
            y: Array = _convolve(args[0], args[1], op.strides, op.padding) + args[2]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.DepthwiseConv2d():
            y = _convolve_depthwise(args[0], args[1], op.strides, op.padding) + args[2]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.FullyConnected():
            y = args[0] @ args[1].T + args[2]
            return np.maximum(y, np.float32(0)) if op.relu else y
        case ir.BatchNorm():
            x, gamma, beta, mean, variance = args
            factor = gamma / np.sqrt(variance + np.float32(op.epsilon))
            return x * factor + (beta - mean * factor)
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
        case ir.Quantize():
            q = node.type.per_tensor
            scaled = np.rint(arithmetic.f32_quotient(args[0].astype(np.float32, copy=False), q.scale))
            return np.clip(scaled + q.zero_point, arithmetic.INT8_MIN, arithmetic.INT8_MAX).astype(np.int8)
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


