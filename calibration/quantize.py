"""From a float graph and observed ranges to the int8 graph: here scales and zero points are chosen, once and for all.

What this module promises about its result, beside the formulas of ``runtime/arithmetic.py``:

* No accumulator can leave int32 on any input and in any order of summation, nor with the zero point's part folded into
  the bias: sum |w| * 256 + |b| < 2**31 in every channel, from the actual weights. A channel that breaks it, as one
  with hardly any weights and a bias does, has its weight scale raised.
* Every ratio of scales lies in the domain that XNNPACK accepts (else LiteRT refuses the file or falls back).
* A global average has no sum whose rounding depends on how an engine adds the zero point.
"""

from __future__ import annotations

import math
from dataclasses import astuple, replace

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models.preprocess import InputSpec, PixelEncoding, normalize
from ..runtime import arithmetic
from .recipe import QuantRecipe, Setting
from .table import CalibrationError, CalibrationTable, TensorRange

LEVELS = 255  # steps between the least and the largest int8
ACCUMULATOR_LIMIT = 2**31
BIAS_LIMIT = 2**30
INPUT_SPAN = 256  # |x| + |z| of an int8 and its zero point, and above any |x - z|

# XNNPACK's domains: src/operators/convolution-nhwc.c, add-nc.c (2**-10 <= ratio < 2**8 for both inputs), reduce-nd.c.
LEAST_MULTIPLIER, MULTIPLIER_LIMIT = 2.0**-32, 2.0**8
LEAST_ADD_RATIO, ADD_RATIO_LIMIT = 2.0**-10, 2.0**8
LEAST_MEAN_RATIO, MEAN_RATIO_LIMIT = 2.0**-8, 2.0**7
LEAST_RATIO, RATIO_LIMIT = 2.0**-8, 2.0**7  # unary-elementwise-nc.c
LEAST_PRODUCT_RATIO, PRODUCT_RATIO_LIMIT = 2.0**-16, 2.0**8  # binary-elementwise-nd.c

Weighted = ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected


def f32(value: float) -> float:
    """The nearest float32, as the Python float that scales are kept as."""
    return float(np.float32(value))


def activation_params(low: float, high: float, scheme: str = "affine") -> ir.PerTensor:
    """Scale and zero point that cover [low, high] and represent zero exactly (padding and ReLU need it to be).

    affine: s = (high - low) / 255, z = rint(-128 - low / s). symmetric: s = max(|low|, |high|) / 127, z = 0.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme == "symmetric":
        return ir.PerTensor(f32(max(-low, high) / arithmetic.INT8_MAX), 0)
    scale = f32((high - low) / LEVELS)
    if scale == 0.0:
        raise CalibrationError(f"the range [{low:g}, {high:g}] is too narrow for a float32 scale")
    zero_point = round(arithmetic.INT8_MIN - low / scale)
    return ir.PerTensor(scale, min(max(zero_point, arithmetic.INT8_MIN), arithmetic.INT8_MAX))


def pixel_encoding(spec: InputSpec | None, params: ir.PerTensor) -> PixelEncoding:
    """The int8 input for every pixel value and channel; ``spec`` is None where preprocessing is folded."""
    if spec is None:
        return PixelEncoding(None)
    x = normalize(np.arange(256, dtype=np.uint8)[:, None].repeat(spec.channels, axis=1), spec).astype(np.float64)
    q = np.clip(np.rint(x / params.scale) + params.zero_point, arithmetic.INT8_MIN, arithmetic.INT8_MAX)
    return PixelEncoding(tuple(map(tuple, q.astype(int).tolist())))


def quantize_weights(
    weights: NDArray[np.float32], bias: NDArray[np.float32], axis: int, input_scale: float, output_scale: float
) -> tuple[ir.Constant, ir.Constant]:
    """int8 weights, symmetric, one scale per index of ``axis``, and the int32 bias of scale s_in * s_w.

    s_w = max |w| / 127, but never so small that the multiplier s_in * s_w / s_out leaves its domain, the bias exceeds
    2**30, or the accumulator's bound 2**31.
    """
    scales = _weight_scales(weights, bias, axis, input_scale, output_scale)
    while True:
        constants = round_weights(weights, bias, axis, input_scale, scales)
        too_large = accumulator_bound(*constants, axis) >= ACCUMULATOR_LIMIT
        if not too_large.any():
            return constants
        scales = np.where(too_large, scales * np.float32(2), scales).astype(np.float32)


def _weight_scales(
    weights: NDArray[np.float32], bias: NDArray[np.float32], axis: int, input_scale: float, output_scale: float
) -> NDArray[np.float32]:
    magnitude = np.abs(weights).max(axis=tuple(i for i in range(weights.ndim) if i != axis)).astype(np.float64)
    scales = magnitude / arithmetic.WEIGHT_MAX
    scales = np.maximum(scales, np.abs(bias.astype(np.float64)) / (input_scale * BIAS_LIMIT))
    # Twice the least multiplier, so that rounding cannot cross it. A channel of zeros may have any scale.
    scales = np.maximum(scales, 2 * LEAST_MULTIPLIER * output_scale / input_scale)
    return scales.astype(np.float32)


def round_weights(
    weights: NDArray[np.float32],
    bias: NDArray[np.float32],
    axis: int,
    input_scale: float,
    scales: NDArray[np.float32],
) -> tuple[ir.Constant, ir.Constant]:
    """Weights and bias rounded to the nearest step of given scales, in float64 throughout."""
    shape = [1] * weights.ndim
    shape[axis] = -1
    steps = weights.astype(np.float64) / scales.astype(np.float64).reshape(shape)
    q = np.clip(np.rint(steps), -arithmetic.WEIGHT_MAX, arithmetic.WEIGHT_MAX).astype(np.int8)
    bias_scales = arithmetic.f32_product(input_scale, scales)
    bias_q = np.rint(bias.astype(np.float64) / bias_scales.astype(np.float64))
    bias_q = np.clip(bias_q, -(2**31 - 1), 2**31 - 1).astype(np.int32)
    return (
        ir.Constant(ir.TensorType(q.shape, "int8", ir.PerAxis(tuple(map(float, scales)), axis)), q),
        ir.Constant(ir.TensorType(bias_q.shape, "int32", ir.PerAxis(tuple(map(float, bias_scales)), 0)), bias_q),
    )


def accumulator_bound(weights: ir.Constant, bias: ir.Constant, axis: int) -> NDArray[np.int64]:
    """sum |w| * 256 + |b| per channel: no input and no order of summation makes a larger partial sum."""
    others = tuple(i for i in range(weights.data.ndim) if i != axis)
    total = np.abs(weights.data.astype(np.int64)).sum(axis=others)
    bound: NDArray[np.int64] = total * INPUT_SPAN + np.abs(bias.data.astype(np.int64))
    return bound


def mean_variants_agree(source: ir.PerTensor, target: ir.PerTensor, pixels: int) -> bool:
    """Whether every attainable sum of ``pixels`` values averages to the same int8 on every engine.

    Three ways of rounding: the contract's, and XNNPACK's two. XNNPACK scales the sum as it is, zero points included,
    by m = f32(f32(s_in / s_out) * f32(1 / N)) and adds a float32 constant, z_out - N * z_in * m, before it rounds to
    an integer. On x86 each product is rounded first; on ARM both the constant and the sum are fused multiply-adds
    (found by trying every sum of 10x10, 7x7 and 3x3 maps on both, over some hundred pairs of parameters: no
    difference). The fused ones are computed in integers, exactly: a float32 is an integer times a power of two, and
    the constant is a multiple of that power.
    """
    raw = np.arange(arithmetic.INT8_MIN * pixels, arithmetic.INT8_MAX * pixels + 1, dtype=np.int32)
    m = arithmetic.average_multiplier(source.scale, target.scale, pixels)
    ours = arithmetic.scale_accumulator(raw - np.int32(pixels * source.zero_point), m, target.zero_point)
    m = arithmetic.f32_product(
        float(arithmetic.f32_quotient(source.scale, target.scale)), arithmetic.f32_quotient(1.0, float(pixels))
    )
    as_float, zeros = raw.astype(np.float32), pixels * source.zero_point
    constant = np.float32(target.zero_point) - np.float32(zeros) * m
    separate = np.multiply(as_float, m, dtype=np.float32) + constant
    mantissa, exponent = math.frexp(float(m))
    shift = 24 - exponent
    if not 0 <= shift < 54 or float(np.abs(as_float).max()) >= 2.0**31:
        return False  # out of the range that the integers below hold exactly
    multiplier = int(mantissa * 2**24)
    fused_constant = int(np.int64((target.zero_point << shift) - zeros * multiplier).astype(np.float32))
    exact = as_float.astype(np.int64) * multiplier + fused_constant
    fused = exact.astype(np.float32) * np.float32(2.0**-shift)
    return all(np.array_equal(ours, np.clip(np.rint(y), -128, 127).astype(np.int8)) for y in (separate, fused))


def tie_free_params(source: ir.PerTensor, wanted: ir.PerTensor, pixels: int, tries: int = 4096) -> ir.PerTensor:
    """``wanted`` with its scale moved up, a float32 at a time, until ``mean_variants_agree``.

    Raises CalibrationError after ``tries`` (about one scale in four needs a step, so this does not happen).
    """
    params = wanted
    for _ in range(tries):
        if mean_variants_agree(source, params, pixels):
            return params
        params = replace(params, scale=float(np.nextafter(np.float32(params.scale), np.float32(np.inf))))
    raise CalibrationError(f"no output scale near {wanted.scale:g} makes the mean of {pixels} pixels free of ties")


def within_ratios(params: ir.PerTensor, input_scales: list[float], least: float, limit: float) -> ir.PerTensor:
    """``params`` with the scale moved so that every input scale / output scale is in [least, limit).

    The largest input decides where both bounds cannot hold at once; the smaller input is then below resolution.
    """
    scale = min(params.scale, f32(min(input_scales) / (least * 1.001)))
    scale = max(scale, f32(max(input_scales) / (limit / 1.001)))
    return params if scale == params.scale else replace(params, scale=scale)


def without_multiplier_tie(input_scale: float, wanted: ir.PerTensor, alpha: float) -> ir.PerTensor:
    """``wanted`` with its scale moved up until neither multiplier of a leaky ReLU lies near a half: roundings that
    engines do differently then agree."""
    params = wanted
    while True:
        ratio = 256.0 * input_scale / params.scale
        if all(abs(r - math.floor(r) - 0.5) > 1e-3 for r in (ratio, ratio * alpha)):
            return params
        params = replace(params, scale=f32(params.scale * 1.00001))


# Operators whose int8 output may have any scale and zero point.
_FREE = (ir.Conv2d, ir.DepthwiseConv2d, ir.FullyConnected, ir.Add, ir.Multiply)


def joined_ranges(graph: ir.Graph, table: CalibrationTable) -> dict[str, TensorRange]:
    """For every tensor with free parameters that reaches a concatenation: the range of all that reach it, so that they
    share a scale and are joined without being requantized. What has no free parameters is requantized to theirs.
    """
    groups: list[tuple[set[str], list[TensorRange]]] = []
    for node in graph.nodes:
        if not isinstance(node.op, ir.Concatenate):
            continue
        names = {origin for name in node.inputs if (origin := _origin(graph, name)) is not None}
        ranges = [r for name in node.inputs if (r := _range(graph, table, name)) is not None]
        # A tensor of two groups makes one of them.
        for group in [group for group in groups if group[0] & names]:
            groups.remove(group)
            names, ranges = names | group[0], ranges + group[1]
        groups.append((names, ranges))
    found: dict[str, TensorRange] = {}
    for names, ranges in groups:
        if ranges:
            wide = TensorRange(
                min(r.low for r in ranges),
                max(r.high for r in ranges),
                min(r.minimum for r in ranges),
                max(r.maximum for r in ranges),
            )
            found |= dict.fromkeys(names, wide)
    return found


def _maker(graph: ir.Graph, name: str) -> ir.Node:
    """The node whose parameters a tensor has."""
    node = graph.node(name)
    while ir.FACTS[type(node.op)].keeps_quantization and not isinstance(node.op, ir.Concatenate):
        node = graph.node(node.inputs[0])
    return node


def _origin(graph: ir.Graph, name: str) -> str | None:
    """The tensor whose parameters a tensor has, where these are free."""
    node = _maker(graph, name)
    return node.name if isinstance(node.op, _FREE) else None


def _range(graph: ir.Graph, table: CalibrationTable, name: str) -> TensorRange | None:
    """What was observed of a tensor that reaches a concatenation."""
    node = _maker(graph, name)
    if isinstance(node.op, ir.Relu):
        seen = _range(graph, table, node.inputs[0])
        return None if seen is None else TensorRange(*(max(value, 0.0) for value in astuple(seen)))
    return table.ranges.get(node.name)


def quantize(graph: ir.Graph, table: CalibrationTable, recipe: QuantRecipe) -> ir.Graph:
    """The int8 graph, every tensor with its parameters; layers that the recipe keeps in float stand between
    ``Dequantize`` and ``Quantize`` nodes. Inputs and outputs are int8.

    Given: a float graph through the passes (no batch normalization) and the table collected on this very graph.
    Raises CalibrationError where the table is another graph's, GraphError for an operator that has no integer meaning.
    """
    quantizer = _Quantizer(graph, table, recipe)
    for node in graph.nodes:
        quantizer.visit(node)
    outputs = tuple(quantizer.as_int8(name) for name in graph.outputs)
    return ir.Graph(graph.name, tuple(quantizer.nodes), quantizer.constants, outputs)


class _Quantizer:
    """The graph being built. A tensor exists in int8, in float32, or, where readers want both, in both."""

    def __init__(self, graph: ir.Graph, table: CalibrationTable, recipe: QuantRecipe) -> None:
        self.graph, self.table, self.recipe = graph, table, recipe
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Constant] = {}
        self.params: dict[str, ir.PerTensor] = {}
        self.shared_ranges = joined_ranges(graph, table)
        self._int8: dict[str, str] = {}
        self._float: dict[str, str] = {}

    def as_int8(self, name: str) -> str:
        """The name of the int8 form of a tensor of the float graph; appends a ``Quantize`` where it has none."""
        if name not in self._int8:
            node = self.graph.node(name)
            made = ir.TensorType(node.type.shape, "int8", self.params[name])
            self._int8[name] = f"{name}.int8"
            self.nodes.append(ir.Node(self._int8[name], ir.Quantize(), (self._float[name],), made, node.path))
        return self._int8[name]

    def as_float(self, name: str) -> str:
        """Likewise of the float32 form."""
        if name not in self._float:
            node = self.graph.node(name)
            made = ir.TensorType(node.type.shape, "float32")
            self._float[name] = f"{name}.float"
            self.nodes.append(ir.Node(self._float[name], ir.Dequantize(), (self._int8[name],), made, node.path))
        return self._float[name]

    def visit(self, node: ir.Node) -> None:
        """Appends the quantized form of one node, its inputs having been visited."""
        setting = self.recipe.setting(node.path)
        self.params[node.name] = self._output_params(node, setting)
        if setting.keep_float and not isinstance(node.op, ir.Input):
            activations = tuple(self.as_float(n) if n in self.params else n for n in node.inputs)
            self.constants |= {n: self.graph.constants[n] for n in node.inputs if n not in self.params}
            self.nodes.append(replace(node, inputs=activations))
            self._float[node.name] = node.name
            return
        inputs = tuple(self.as_int8(n) if n in self.params else n for n in node.inputs)
        if isinstance(node.op, Weighted):
            inputs = (inputs[0], *self._weights(node))
        if isinstance(node.op, ir.Concatenate):
            inputs = tuple(self._with_params(name, node) for name in node.inputs)
        made = ir.TensorType(node.type.shape, "int8", self.params[node.name])
        self.nodes.append(replace(node, inputs=inputs, type=made))
        self._int8[node.name] = node.name

    def _with_params(self, name: str, reader: ir.Node) -> str:
        """The int8 form of an input of a concatenation with its parameters: a copy where its own differ."""
        source, wanted = self.as_int8(name), self.params[reader.name]
        if self.params[name] == wanted:
            return source
        ratio = self.params[name].scale / wanted.scale
        if not LEAST_RATIO <= ratio <= RATIO_LIMIT:
            raise CalibrationError(
                f"{reader.name} ({reader.path}) joins tensors whose ranges differ too much for int8: {name} has "
                f"{ratio:g} of the scale; keep the layer in float by a rule of the recipe",
                reader.name,
                reader.path,
            )
        made, shape = f"{reader.name}.{name}", self.graph.type_of(name).shape
        self.nodes.append(
            ir.Node(made, ir.Lookup("identity"), (source,), ir.TensorType(shape, "int8", wanted), reader.path)
        )
        return made

    def _weights(self, node: ir.Node) -> tuple[str, str]:
        """Quantizes a layer's weights and bias for its input's scale; returns the constants' names.

        A constant that two layers share is quantized for each, under the layer's own name.
        """
        weights, bias = (self.graph.constants[name].data.astype(np.float32) for name in node.inputs[1:])
        names = [n if n not in self.constants else f"{node.name}.{n}" for n in node.inputs[1:]]
        made = quantize_weights(
            weights,
            bias,
            ir.channel_axis(node.op),
            self.params[node.inputs[0]].scale,
            self.params[node.name].scale,
        )
        self.constants |= dict(zip(names, made, strict=True))
        return names[0], names[1]

    def _output_params(self, node: ir.Node, setting: Setting) -> ir.PerTensor:
        inputs = [self.params[name] for name in node.inputs if name in self.params]
        match node.op:
            case ir.Relu():
                return ir.PerTensor(inputs[0].scale, arithmetic.INT8_MIN)
            case ir.Concatenate():
                return self._joined_params(node, inputs, setting.scheme)
            case ir.Lookup(function, parameters):
                return self._lookup_params(node, function, parameters, inputs[0], setting.scheme)
            case ir.Multiply():
                params = self._observed_params(node, setting.scheme)
                product = float(arithmetic.f32_product(inputs[0].scale, inputs[1].scale))
                return within_ratios(params, [product], LEAST_PRODUCT_RATIO, PRODUCT_RATIO_LIMIT)
            case op if ir.FACTS[type(op)].keeps_quantization:
                return inputs[0]
            case ir.Input():
                return self._observed_params(node, "affine")
            case ir.Conv2d() | ir.DepthwiseConv2d() | ir.FullyConnected():
                largest = self._largest_weight(node) / arithmetic.WEIGHT_MAX * inputs[0].scale
                params = self._observed_params(node, setting.scheme)
                return replace(params, scale=max(params.scale, f32(largest / MULTIPLIER_LIMIT * 1.001)))
            case ir.Add():
                params = self._observed_params(node, setting.scheme)
                return within_ratios(params, [p.scale for p in inputs], LEAST_ADD_RATIO, ADD_RATIO_LIMIT)
            case ir.GlobalAveragePool():
                params = self._observed_params(node, setting.scheme)
                params = within_ratios(params, [inputs[0].scale], LEAST_MEAN_RATIO, MEAN_RATIO_LIMIT)
                shape = self.graph.type_of(node.inputs[0]).shape
                return tie_free_params(inputs[0], params, shape[1] * shape[2])
        raise ir.GraphError(
            f"{type(node.op).__name__} {node.name} ({node.path}) cannot be quantized: run the graph passes first",
            node.name,
            node.path,
        )

    def _joined_params(self, node: ir.Node, inputs: list[ir.PerTensor], scheme: str) -> ir.PerTensor:
        """Of a concatenation: those that its free inputs share, else what covers all."""
        free = [name for name in node.inputs if _origin(self.graph, name) is not None]
        if free:
            return self.params[free[0]]
        ends = [p.scale * (q - p.zero_point) for p in inputs for q in (arithmetic.INT8_MIN, arithmetic.INT8_MAX)]
        params = activation_params(min(ends), max(ends), scheme)
        return within_ratios(params, [p.scale for p in inputs], LEAST_RATIO, RATIO_LIMIT)

    def _lookup_params(
        self, node: ir.Node, function: str, parameters: tuple[float, ...], source: ir.PerTensor, scheme: str
    ) -> ir.PerTensor:
        if function in arithmetic.FIXED_OUTPUTS:
            return ir.PerTensor(*arithmetic.FIXED_OUTPUTS[function])
        if function == "clip":
            low, high = parameters
            ends = [source.scale * (q - source.zero_point) for q in (arithmetic.INT8_MIN, arithmetic.INT8_MAX)]
            params = activation_params(max(low, ends[0]), min(high, ends[1]))
        else:
            params = self._observed_params(node, scheme)
        params = within_ratios(params, [source.scale], LEAST_RATIO, RATIO_LIMIT)
        if function == "leaky_relu":
            return without_multiplier_tie(source.scale, params, parameters[0])
        return params

    def _largest_weight(self, node: ir.Node) -> float:
        weights, bias = (self.graph.constants[name].data for name in node.inputs[1:])
        if not (np.isfinite(weights).all() and np.isfinite(bias).all()):
            raise CalibrationError(
                f"the weights of {node.name} ({node.path}) hold NaN or infinity: check the checkpoint",
                node.name,
                node.path,
            )
        return float(np.abs(weights).max())

    def _observed_params(self, node: ir.Node, scheme: str) -> ir.PerTensor:
        seen = self.shared_ranges.get(node.name) or self.table.ranges.get(node.name)
        if seen is None:
            raise CalibrationError(
                f"the calibration table has no range for {node.name} ({node.path}): it was collected on another "
                "graph; calibrate again",
                node.name,
                node.path,
            )
        return activation_params(seen.low, seen.high, scheme)
