"""Writes an int8 graph as explicit-QDQ ONNX, for TensorRT and whoever else reads QuantizeLinear and DequantizeLinear.

Two forms of one network, both float32 in (the real values of the int8 input: pixels 0..255 where preprocessing is
folded, NCHW) and float32 out:

* ``serialize``: the graph's own scales and zero points at every tensor, weights int8, biases int32.
* ``serialize_symmetric``: what TensorRT demands: zero point 0 at every tensor and float32 biases. Weights and their
  scales stay. A tensor's scale grows until its whole range fits, to twice where it came out of a ReLU: this is another
  network, and ``departure`` says how far it is from the contract. The input loses nothing where only unpadded
  convolutions read it: it is shifted by a constant that their biases take back.

Neither is the contract: what an engine makes of floating-point operators between two roundings is its own affair.
Source: https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ...models import graph as ir
from ...models.rewrite import float_constant
from ...models.to_onnx import to_onnx
from ...runtime import arithmetic, reference


@dataclass(frozen=True, eq=False)
class _Form:
    """``real`` is the network in float32. ``weights`` are its int8 constants, by name; ``quants`` the parameters that
    each int8 tensor is rounded with; ``offsets`` what is added to an input before that."""

    real: ir.Graph
    weights: Mapping[str, ir.Constant]
    quants: Mapping[str, ir.PerTensor]
    offsets: Mapping[str, float] = field(default_factory=dict)


def serialize(graph: ir.Graph) -> bytes:
    """Given an int8 (or mixed) graph; Result: the bytes of a checked ``.onnx`` file, with the same scales and zero
    points. Equal graphs give equal bytes."""
    return _serialize(_explicit(graph))


def serialize_symmetric(graph: ir.Graph) -> bytes:
    """Given an int8 (or mixed) graph; Result: as ``serialize``, in the form that TensorRT takes (see the module)."""
    return _serialize(_symmetric(graph))


@dataclass(frozen=True)
class Departure:
    """How far a file's outputs are from the contract's: images whose largest logit stays, and the largest difference
    of a logit in steps of the contract's output."""

    images: int
    agreeing: int
    largest_difference_steps: int

    def __str__(self) -> str:
        steps = self.largest_difference_steps
        return (
            f"{self.agreeing} of {self.images} golden images keep the contract's class, no logit is more than "
            f"{steps} {'step' if steps == 1 else 'steps'} off (ONNX's operators in float32, computed with numpy)"
        )


def departure(
    graph: ir.Graph, images: NDArray[np.int8], expected: NDArray[np.int8], *, symmetric: bool = False
) -> Departure:
    """Computes what either file means for int8 ``images``, the stacked inputs of an int8 graph with one input, and
    compares with the reference's stacked outputs."""
    form = _symmetric(graph) if symmetric else _explicit(graph)
    source, out = graph.inputs[0].type, graph.type_of(graph.outputs[0]).per_tensor
    logits = []
    for group in images.reshape(-1, *source.shape):
        centred = group.astype(np.float32) - np.float32(source.per_tensor.zero_point)
        real = _evaluate(form, np.multiply(centred, np.float32(source.per_tensor.scale), dtype=np.float32))
        logits.append(_round(real, out))
    got = np.concatenate(logits)
    steps = np.abs(got.astype(np.int32) - expected.astype(np.int32))
    agreeing = int((got.argmax(axis=1) == expected.argmax(axis=1)).sum())
    return Departure(len(got), agreeing, int(steps.max(initial=0)))


# --- The two forms. ---


def _explicit(graph: ir.Graph) -> _Form:
    quants = {node.name: node.type.per_tensor for node in graph.nodes if node.type.dtype == "int8"}
    weights = {n: c for n, c in graph.constants.items() if c.type.dtype in ("int8", "int32")}
    return _Form(_real(graph), weights, quants)


def _symmetric(graph: ir.Graph) -> _Form:
    explicit = _explicit(graph)
    real, offsets = explicit.real, {}
    quants = {name: _centred(quant) for name, quant in explicit.quants.items()}
    for node in graph.inputs:
        readers = graph.users(node.name)
        unpadded = all(isinstance(reader.op, ir.Conv2d) and not any(reader.op.padding) for reader in readers)
        if node.type.dtype == "int8" and unpadded and node.name not in graph.outputs:
            quant = node.type.per_tensor
            offsets[node.name] = float(np.float32(quant.scale * quant.zero_point))
            quants[node.name] = replace(quant, zero_point=0)
            real = _with_shifted_bias(real, readers, offsets[node.name])
    weights = {name: c for name, c in explicit.weights.items() if c.type.dtype == "int8"}
    return _Form(real, weights, quants, offsets)


def _centred(quant: ir.PerTensor) -> ir.PerTensor:
    """Zero point 0 and the smallest scale that covers the same range of real values."""
    low, high = -128 - quant.zero_point, 127 - quant.zero_point
    return ir.PerTensor(float(np.float32(quant.scale * max(-low / 128, high / 127))), 0)


def _with_shifted_bias(real: ir.Graph, readers: tuple[ir.Node, ...], offset: float) -> ir.Graph:
    """Convolutions of x as convolutions of x + offset: b' = b - offset * sum(w)."""
    nodes, constants = {node.name: node for node in real.nodes}, dict(real.constants)
    for reader in readers:
        weights, bias = (real.constants[name].data.astype(np.float64) for name in reader.inputs[1:])
        name = f"{reader.name}/shifted_bias"
        constants[name] = float_constant(bias - offset * weights.sum(axis=(1, 2, 3)))
        nodes[reader.name] = replace(nodes[reader.name], inputs=(*reader.inputs[:2], name))
    return real.with_nodes(tuple(nodes.values()), constants)


def _real(graph: ir.Graph) -> ir.Graph:
    """The float32 graph of the same structure whose constants are the real values of the int8 one's."""
    nodes = tuple(replace(node, type=ir.TensorType(node.type.shape, "float32")) for node in graph.nodes)
    return replace(graph, nodes=nodes, constants={name: _dequantized(c) for name, c in graph.constants.items()})


def _dequantized(constant: ir.Constant) -> ir.Constant:
    if constant.type.dtype == "float32":
        return constant
    per_axis = constant.type.per_axis
    shape = [1] * constant.data.ndim
    shape[per_axis.axis] = -1
    scales = np.asarray(per_axis.scales, np.float32).reshape(shape)
    return float_constant(np.multiply(constant.data.astype(np.float32), scales, dtype=np.float32))


# --- What a file means. ---


def _evaluate(form: _Form, x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first output for a network of one input, by the definition of ONNX's operators in float32."""
    graph = form.real
    values: dict[str, NDArray[np.float32]] = {}
    for node in graph.nodes:
        if isinstance(node.op, ir.Input):
            value = x + np.float32(form.offsets.get(node.name, 0.0))
        elif isinstance(node.op, ir.Lookup | ir.Quantize | ir.Dequantize):
            value = values[node.inputs[0]]
        else:
            args = [values[name] if name in values else graph.constants[name].data for name in node.inputs]
            value = reference.run_node(graph, node, args)
        if quant := form.quants.get(node.name):
            centred = _round(value, quant).astype(np.float32) - np.float32(quant.zero_point)
            value = np.multiply(centred, np.float32(quant.scale), dtype=np.float32)
        values[node.name] = value
    result: NDArray[np.float32] = values[graph.outputs[0]]
    return result


def _round(value: NDArray[np.float32], quant: ir.PerTensor) -> NDArray[np.int8]:
    """QuantizeLinear: saturate(rint(x / scale) + zero point)."""
    steps = np.rint(arithmetic.f32_quotient(value, quant.scale)) + np.float32(quant.zero_point)
    return np.clip(steps, -128, 127).astype(np.int8)


# --- Writing. ---


def _serialize(form: _Form) -> bytes:
    """The float model with a QuantizeLinear and a DequantizeLinear behind every int8 tensor, and a DequantizeLinear
    behind every integer constant."""
    model = to_onnx(form.real)
    writer = _Writer()
    for tensor in model.graph.initializer:
        if tensor.name in form.weights:
            writer.weight(tensor.name, form.weights[tensor.name])
        else:
            writer.constants[tensor.name] = numpy_helper.to_array(tensor)
    rounded = {}  # what is read in an input's place
    for value in model.graph.input:
        if value.name in form.quants:
            rounded[value.name] = writer.input(value.name, form.quants[value.name], form.offsets.get(value.name, 0.0))
    for node in model.graph.node:
        name = node.output[0]
        quant = form.quants.get(name)
        copy = helper.make_node(node.op_type, [], [name if quant is None else f"{name}/real"], name=name)
        copy.input.extend(rounded.get(read, read) for read in node.input)
        copy.attribute.extend(node.attribute)
        writer.nodes.append(copy)
        if quant is not None:
            writer.round_trip(f"{name}/real", name, quant)
    tensors = [numpy_helper.from_array(np.asarray(data, order="C"), name) for name, data in writer.constants.items()]
    ends = list(model.graph.input), list(model.graph.output)
    graph = helper.make_graph(writer.nodes, model.graph.name, *ends, tensors)
    result = helper.make_model(
        graph, opset_imports=list(model.opset_import), ir_version=model.ir_version, producer_name=model.producer_name
    )
    onnx.checker.check_model(result, full_check=True)
    return bytes(result.SerializeToString(deterministic=True))


@dataclass(frozen=True)
class _Writer:
    """The nodes and constants written so far."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, NDArray[np.generic]] = field(default_factory=dict)

    def weight(self, name: str, constant: ir.Constant) -> None:
        """An integer constant in ONNX' layout, where output channels come first, and the node that makes it real."""
        data = constant.data
        if data.ndim == 4:  # (O, KH, KW, I) -> (O, I, KH, KW)
            data = data.transpose(0, 3, 1, 2)
        elif data.ndim == 3:  # depthwise, (KH, KW, C) -> (C, 1, KH, KW)
            data = data.transpose(2, 0, 1)[:, np.newaxis]
        self.constants[f"{name}/q"] = data
        self.constants[f"{name}/scale"] = np.asarray(constant.type.per_axis.scales, np.float32)
        # ONNX may leave zeros out; ONNX Runtime 1.32 then fails on what its own optimizer made.
        self.constants[f"{name}/zero_point"] = np.zeros(len(data), data.dtype)
        inputs = [f"{name}/q", f"{name}/scale", f"{name}/zero_point"]
        self.nodes.append(helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}/dequantize", axis=0))

    def input(self, name: str, quant: ir.PerTensor, offset: float) -> str:
        """Rounds an input, ``offset`` added; returns the name of the result."""
        source = name
        if offset:
            source = f"{name}/shifted"
            self.constants[f"{name}/offset"] = np.asarray(offset, np.float32)
            self.nodes.append(helper.make_node("Add", [name, f"{name}/offset"], [source], name=source))
        self.round_trip(source, f"{name}/rounded", quant)
        return f"{name}/rounded"

    def round_trip(self, source: str, target: str, quant: ir.PerTensor) -> None:
        """source -> int8 -> target."""
        integers, parameters = f"{target}/q", [f"{target}/scale", f"{target}/zero_point"]
        self.constants[parameters[0]] = np.asarray(quant.scale, np.float32)
        self.constants[parameters[1]] = np.asarray(quant.zero_point, np.int8)
        for kind, value, result in (("Quantize", source, integers), ("Dequantize", integers, target)):
            name = f"{target}/{kind.lower()}"
            self.nodes.append(helper.make_node(f"{kind}Linear", [value, *parameters], [result], name=name))
