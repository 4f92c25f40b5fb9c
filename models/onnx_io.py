"""Float ONNX networks in NCHW: reading them into a Graph, and writing a float Graph as one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from . import graph as ir
from .graph_builder import END_AT_LOGITS, NO_PADS, SCALE_OUTSIDE, Array, GraphBuilder, Origin, Value
from .read_file import check_file

SUPPORTED = (
    "Conv (dense or depthwise), BatchNormalization, Relu, MaxPool, Pad before them, Add, GlobalAveragePool, ReduceMean "
    "over height and width, Gemm, MatMul, Flatten, Reshape, Dropout and Identity"
)
OPSET = 17
IR_VERSION = 8  # of the file format; what opset 17 came with


class OnnxError(ValueError):
    """A file that is no ONNX network, or a damaged one."""


def load_onnx(path: str | Path, size: int | None = None) -> ir.Graph:
    """Reads a file; ``size`` as for ``from_onnx``.

    Raises OnnxError where it is no sound ONNX model, UnsupportedLayer for what a graph cannot say.
    """
    check_file(path)
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # protobuf and the checker have no common error
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OnnxError(f"{path}: is no sound ONNX model ({reason}); export it again") from error
    return from_onnx(model, size)


def data_files(path: Path) -> tuple[Path, ...]:
    """The files beside a sound model that hold its larger tensors, in order of name; large exports have some."""
    model = onnx.load(str(path), load_external_data=False)
    stored = (entry for tensor in model.graph.initializer for entry in tensor.external_data)
    return tuple(path.parent / name for name in sorted({entry.value for entry in stored if entry.key == "location"}))


def from_onnx(model: onnx.ModelProto, size: int | None = None) -> ir.Graph:
    """A float model with images in NCHW; an open height or width becomes ``size``, an open batch 1.

    Raises UnsupportedLayer.
    """
    importer = _Importer(model, size)
    for node in model.graph.node:
        importer.visit(node)
    origin = Origin("", "output", "output")
    outputs = tuple(_tensor(importer.env.get(output.name), origin) for output in model.graph.output)
    return importer.builder.graph(model.graph.name or "onnx", outputs, origin)


_Weight = tuple[str, Array]
_Operand = Value | _Weight | None


@dataclass(frozen=True)
class _Call:
    """One ONNX node with its operands and attributes read."""

    origin: Origin
    operands: list[_Operand]
    attributes: dict[str, Any]

    def tensor(self, index: int) -> Value:
        """An operand that the network computes."""
        return _tensor(self.operands[index], self.origin)

    def weight(self, index: int) -> _Weight:
        """An operand that is a constant."""
        operand = self.operands[index]
        if not isinstance(operand, tuple):
            raise self.origin.refuse(f"its operand {index} is computed while the network runs; it must be a constant")
        return operand

    def optional(self, index: int) -> _Weight | None:
        """A constant, or None where it is left out."""
        return self.weight(index) if index < len(self.operands) and self.operands[index] is not None else None

    def ints(self, name: str, default: Sequence[int]) -> list[int]:
        """An attribute of whole numbers."""
        return [int(value) for value in self.attributes.get(name, default)]


class _Importer:
    """Walks the nodes, which ONNX keeps in topological order. ``env`` holds tensors and constants by name."""

    def __init__(self, model: onnx.ModelProto, size: int | None) -> None:
        self.size = size
        self.builder = GraphBuilder()
        self.opsets = list(model.opset_import)
        self.env: dict[str, _Operand] = {"": None}
        self.reads = Counter(name for node in model.graph.node for name in node.input)
        self.reads.update(output.name for output in model.graph.output)
        self.adds = {name: node for node in model.graph.node if node.op_type == "Add" for name in node.input}
        self.merged: set[str] = set()  # outputs of additions that became a bias
        for tensor in model.graph.initializer:
            self.env[tensor.name] = (tensor.name, numpy_helper.to_array(tensor))
        for value in model.graph.input:
            if value.name not in self.env:
                self.env[value.name] = self._input(value)

    def _input(self, value: onnx.ValueInfoProto) -> Value:
        origin = Origin("", value.name, "input")
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
        if tensor.elem_type != TensorProto.FLOAT:
            raise origin.refuse(f"it is {TensorProto.DataType.Name(tensor.elem_type)}; only float32 networks are read")
        if shape and shape[0] == 0:
            shape[0] = 1
        if len(shape) == 4 and self.size is not None:
            shape[2:] = [length or self.size for length in shape[2:]]
        if 0 in shape:
            raise origin.refuse(f"its shape {shape} has open sizes; give --input-size, or export it with fixed ones")
        return self.builder.input(value.name, tuple(shape), origin)

    def visit(self, node: onnx.NodeProto) -> None:
        """Adds what one node means."""
        if node.output[0] in self.merged:
            return
        origin = _origin(node)
        if node.domain not in ("", "ai.onnx"):
            raise origin.refuse(f"it belongs to the domain {node.domain}")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Constant":
            self.env[node.output[0]] = (node.output[0], _constant(attributes, origin))
            return
        unknown = [name for name in node.input if name not in self.env]
        if unknown:
            raise origin.refuse(f"its operand {unknown[0]} is made by a part that is not used as the network's result")
        call = _Call(origin, [self.env[name] for name in node.input], attributes)
        if all(operand is None or isinstance(operand, tuple) for operand in call.operands):
            self._fold(node, call)
            return
        if node.op_type == "MatMul":
            self._matmul(node, call)
            return
        handler = _HANDLERS.get(node.op_type)
        if handler is None:
            raise origin.refuse(
                _REASONS.get(node.op_type, f"there is no int8 form of it here; supported are {SUPPORTED}")
            )
        self.env[node.output[0]] = handler(self.builder, call)

    def _fold(self, node: onnx.NodeProto, call: _Call) -> None:
        """What is computed from constants alone: torch's exporter works out paddings and shapes so."""
        if node.op_type == "Identity":  # keeps the name, which says the module
            self.env[node.output[0]] = call.operands[0]
            return
        weights = zip(node.input, call.operands, strict=True)
        feeds = {name: operand[1] for name, operand in weights if isinstance(operand, tuple)}
        inputs = [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
            for n, v in feeds.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output]
        proto = helper.make_model(helper.make_graph([node], "constants", inputs, outputs), opset_imports=self.opsets)
        try:
            results = ReferenceEvaluator(proto).run(None, feeds)
        except Exception as error:  # the evaluator raises whatever its numpy code raises
            raise call.origin.refuse(f"its value cannot be computed beforehand ({error})") from error
        self.env |= {name: (name, np.asarray(result)) for name, result in zip(node.output, results, strict=True)}

    def _matmul(self, node: onnx.NodeProto, call: _Call) -> None:
        """A fully connected layer; an addition of a constant that alone reads it is its bias."""
        name, weights = call.weight(1)
        output, bias = node.output[0], None
        add = self.adds.get(output)
        if add is not None and self.reads[output] == 1:
            other = self.env.get(add.input[1] if add.input[0] == output else add.input[0])
            if isinstance(other, tuple) and other[1].size == weights.shape[-1]:
                bias, output = (other[0], other[1].reshape(-1)), add.output[0]
                self.merged.add(output)
        self.env[output] = self.builder.linear(call.tensor(0), (name, weights.T), bias, call.origin)


_REASONS = {
    "Softmax": END_AT_LOGITS,
    **dict.fromkeys(("Sub", "Div", "Mul"), SCALE_OUTSIDE),
    "Shape": "export the network with fixed sizes, the batch included",
    "Transpose": "images must enter as (N, C, H, W) and stay so",
    "QuantizeLinear": "only float networks are read; give the network before quantization",
    "DequantizeLinear": "only float networks are read; give the network before quantization",
}


def _tensor(operand: _Operand, origin: Origin) -> Value:
    if not isinstance(operand, Value):
        what = "missing" if operand is None else f"the constant {operand[0]}"
        raise origin.refuse(f"an operand is {what}; it must be computed from the image")
    return operand


def _origin(node: onnx.NodeProto) -> Origin:
    """Module paths survive in torch's ONNX files: in a weight's name, or in the node's (/blocks.0/pool/MaxPool)."""
    weights = [name for name in node.input if name.endswith(".weight")]
    if weights:
        path = weights[0].removesuffix(".weight")
        return Origin(path, path, node.op_type)
    name = node.name or node.output[0]
    path = re.sub(rf"/{node.op_type}(_\d+)?$", "", name) if name.startswith("/") else name
    path = path.strip("/").replace("/", ".")
    return Origin(path, name.strip("/").replace("/", ".") or node.op_type, node.op_type)


def _constant(attributes: dict[str, Any], origin: Origin) -> Array:
    for name, value in attributes.items():
        if name == "value":
            return numpy_helper.to_array(value)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    raise origin.refuse(f"it holds {', '.join(attributes)}")


def _padding(call: _Call, x: tuple[int, ...], kernel: Sequence[int], strides: Sequence[int]) -> ir.Pads:
    """Explicit padding of a window operator on an NCHW shape, from ``pads`` or ``auto_pad``."""
    mode = call.attributes.get("auto_pad", b"NOTSET").decode()
    if mode == "NOTSET":
        top, left, bottom, right = call.ints("pads", (0, 0, 0, 0))
        return top, bottom, left, right
    if mode == "VALID":
        return NO_PADS
    rows, columns = (ir.same_padding(s, k, d) for s, k, d in zip(x[2:], kernel, strides, strict=True))
    if mode == "SAME_LOWER":
        rows, columns = rows[::-1], columns[::-1]
    return (*rows, *columns)


def _two(values: Sequence[int], origin: Origin) -> tuple[int, int]:
    if len(values) != 2:
        raise origin.refuse(f"over {len(values)} dimensions; only two are")
    return values[0], values[1]


def _conv(builder: GraphBuilder, call: _Call) -> Value:
    x, weight = call.tensor(0), call.weight(1)
    kernel = _two(weight[1].shape[2:], call.origin)
    strides = _two(call.ints("strides", (1, 1)), call.origin)
    dilation = _two(call.ints("dilations", (1, 1)), call.origin)
    if call.attributes.get("auto_pad", b"NOTSET") != b"NOTSET" and dilation != (1, 1):
        raise call.origin.refuse(f"dilation {list(dilation)}; only 1 is")
    return builder.conv2d(
        x,
        weight,
        call.optional(2),
        strides=strides,
        padding=_padding(call, _full_shape(builder, x), kernel, strides),
        dilation=dilation,
        groups=call.attributes.get("group", 1),
        origin=call.origin,
    )


def _full_shape(builder: GraphBuilder, x: Value) -> tuple[int, ...]:
    """(N, C, H, W), of a pooled tensor too."""
    shape = builder.shape(x)
    return shape if len(shape) == 4 else (*shape, 1, 1)


def _batch_norm(builder: GraphBuilder, call: _Call) -> Value:
    if call.attributes.get("training_mode", 0):
        raise call.origin.refuse("it uses the statistics of a batch; export the network in evaluation mode")
    gamma, beta, mean, variance = (call.weight(i) for i in range(1, 5))
    epsilon = float(np.float32(call.attributes.get("epsilon", 1e-5)))
    return builder.batch_norm(call.tensor(0), gamma, beta, mean, variance, epsilon, call.origin)


def _max_pool(builder: GraphBuilder, call: _Call) -> Value:
    x, kernel = call.tensor(0), _two(call.ints("kernel_shape", ()), call.origin)
    strides = _two(call.ints("strides", (1, 1)), call.origin)
    return builder.max_pool(
        x,
        kernel=kernel,
        strides=strides,
        padding=_padding(call, builder.shape(x), kernel, strides),
        dilation=_two(call.ints("dilations", (1, 1)), call.origin),
        ceil_mode=bool(call.attributes.get("ceil_mode", 0)),
        origin=call.origin,
    )


def _average_pool(builder: GraphBuilder, call: _Call) -> Value:
    """Over the whole map only, where it is the global one."""
    x, kernel = call.tensor(0), tuple(call.ints("kernel_shape", ()))
    if builder.shape(x)[2:] != kernel or any(call.ints("pads", ())):
        raise call.origin.refuse(f"window {list(kernel)} on {list(builder.shape(x))}; only the whole map is")
    return builder.global_average_pool(x, call.origin)


def _reduce_mean(builder: GraphBuilder, call: _Call) -> Value:
    x, given = call.tensor(0), call.optional(1)  # the axes are an attribute up to opset 17, then an operand
    axes = call.ints("axes", ()) if given is None else [int(axis) for axis in given[1]]
    if len(builder.shape(x)) != 4 or sorted(axis % 4 for axis in axes) != [2, 3]:
        raise call.origin.refuse(f"a mean over dimensions {axes}; only height and width together are")
    return builder.global_average_pool(x, call.origin)


def _pad(builder: GraphBuilder, call: _Call) -> Value:
    x = call.tensor(0)
    mode = call.attributes.get("mode", b"constant").decode()
    if mode != "constant":
        raise call.origin.refuse(f"padding mode {mode}; only constant padding is")
    pads, value, axes = call.optional(1), call.optional(2), call.optional(3)
    amounts = call.ints("pads", ()) if pads is None else [int(amount) for amount in pads[1]]
    rank = len(builder.shape(x))
    if axes is not None:
        amounts = _spread(amounts, [int(axis) % rank for axis in axes[1]], rank)
    if rank != 4 or len(amounts) != 8 or any(amounts[i] for i in (0, 1, 4, 5)):
        raise call.origin.refuse(f"padding {amounts} of {list(builder.shape(x))}; only height and width are padded")
    filled = call.attributes.get("value", 0.0) if value is None else value[1].reshape(-1)[0]
    return builder.pad(x, (amounts[2], amounts[6], amounts[3], amounts[7]), float(filled), call.origin)


def _spread(amounts: list[int], axes: list[int], rank: int) -> list[int]:
    """Amounts for some axes -> for all."""
    spread = [0] * (2 * rank)
    for index, axis in enumerate(axes):
        spread[axis], spread[rank + axis] = amounts[index], amounts[len(axes) + index]
    return spread


def _gemm(builder: GraphBuilder, call: _Call) -> Value:
    alpha, beta = call.attributes.get("alpha", 1.0), call.attributes.get("beta", 1.0)
    if (alpha, beta) != (1.0, 1.0) or call.attributes.get("transA", 0):
        raise call.origin.refuse(f"alpha {alpha}, beta {beta} or a transposed input")
    (name, weights), bias = call.weight(1), call.optional(2)
    rows = weights if call.attributes.get("transB", 0) else weights.T
    if bias is not None:
        bias = (bias[0], np.broadcast_to(bias[1].reshape(-1), rows.shape[:1]))
    return builder.linear(call.tensor(0), (name, rows), bias, call.origin)


def _reshape(builder: GraphBuilder, call: _Call) -> Value:
    x, wanted = call.tensor(0), [int(size) for size in call.weight(1)[1]]
    have = _full_shape(builder, x) if len(wanted) == 4 else builder.shape(x)
    if not call.attributes.get("allowzero", 0):
        wanted = [have[i] if size == 0 and i < len(have) else size for i, size in enumerate(wanted)]
    total = int(np.prod(builder.shape(x)))
    known = int(np.prod([size for size in wanted if size != -1]))
    return builder.reshape(x, tuple(total // max(known, 1) if s == -1 else s for s in wanted), call.origin)


def _flatten(builder: GraphBuilder, call: _Call) -> Value:
    x = call.tensor(0)
    shape, axis = builder.shape(x), call.attributes.get("axis", 1)
    rows = int(np.prod(shape[: axis % len(shape)]))
    return builder.reshape(x, (rows, int(np.prod(shape)) // rows), call.origin)


def _squeeze(builder: GraphBuilder, call: _Call) -> Value:
    """(N, C, 1, 1) -> (N, C)."""
    x, given = call.tensor(0), call.optional(1)
    axes = call.ints("axes", ()) if given is None else [int(axis) for axis in given[1]]
    if sorted(axis % 4 for axis in axes) != [2, 3]:
        raise call.origin.refuse(f"of dimensions {axes}; only height and width together are")
    return builder.reshape(x, builder.shape(x)[:2], call.origin)


def _dropout(builder: GraphBuilder, call: _Call) -> Value:
    training = call.optional(2)
    if training is not None and bool(training[1]):
        raise call.origin.refuse("it is in training mode; export the network in evaluation mode")
    return call.tensor(0)


_HANDLERS: dict[str, Callable[[GraphBuilder, _Call], Value]] = {
    "Conv": _conv,
    "BatchNormalization": _batch_norm,
    "Relu": lambda builder, call: builder.relu(call.tensor(0), call.origin),
    "MaxPool": _max_pool,
    "Add": lambda builder, call: builder.add(call.tensor(0), call.tensor(1), call.origin),
    "GlobalAveragePool": lambda builder, call: builder.global_average_pool(call.tensor(0), call.origin),
    "AveragePool": _average_pool,
    "ReduceMean": _reduce_mean,
    "Pad": _pad,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Dropout": _dropout,
    "Identity": lambda builder, call: call.tensor(0),
}


# --- Writing. ---


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
    return {"strides": list(op.strides), "pads": [top, left, bottom, right]}


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
