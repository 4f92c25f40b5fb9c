"""Writes a graph as a TFLite flatbuffer, for LiteRT with XNNPACK (and any other TFLite runtime).

No converter stands between: scales, zero points, shapes and weights are the graph's own, layouts are already
TFLite's (NHWC), and every operator has the form that XNNPACK takes over (``ai-edge-litert`` 2.3). What is not obvious:

* A ReLU alone becomes a QUANTIZE with the same scale and the zero point -128: the same function, and XNNPACK takes it,
  where it leaves an int8 RELU to the slow kernels.
* A convolution whose padding is neither SAME nor VALID gets a PAD before it. A max pool gets its edge rows and columns
  repeated (SLICE and CONCATENATION): no padded pixel can win then, as with a PADV2 of the least value, which XNNPACK
  does not take (0.62 ms against 0.10 ms on a 74x74x256 map).
* A global average pool is a MEAN over height and width.

The GPU delegate wants other forms (``for_gpu``): operators of its published list only, so a RELU alone, an
AVERAGE_POOL_2D with a RESHAPE, STRIDED_SLICE for SLICE; and float16 constants, each behind a DEQUANTIZE, which the
delegate reads as they are (``half``).

Schema: https://github.com/tensorflow/tensorflow/blob/v2.18.0/tensorflow/compiler/mlir/lite/schema/schema.fbs
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import flatbuffers  # type: ignore[import-untyped]  # the library ships no types
import numpy as np
import tflite
from numpy.typing import NDArray

from ...models import graph as ir
from ...runtime import arithmetic

SCHEMA_VERSION = 3
FILE_IDENTIFIER = b"TFL3"
BUFFER_ALIGNMENT = 16  # bytes; XNNPACK reads weights in place only where they are so aligned

_DTYPES = {
    "float16": tflite.TensorType.FLOAT16,
    "float32": tflite.TensorType.FLOAT32,
    "int8": tflite.TensorType.INT8,
    "int32": tflite.TensorType.INT32,
}


@dataclass(frozen=True)
class _Tensor:
    """``scales`` and ``zero_points`` empty: not quantized. ``data`` None: computed while the network runs."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    scales: tuple[float, ...] = ()
    zero_points: tuple[int, ...] = ()
    axis: int = 0
    data: NDArray[np.generic] | None = field(default=None, repr=False, compare=False)


_FUNCTIONS = {"sigmoid": "LOGISTIC", "tanh": "TANH"}  # of Lookup
_RESIZE = {
    "bilinear": ("RESIZE_BILINEAR", "ResizeBilinearOptions"),
    "nearest": ("RESIZE_NEAREST_NEIGHBOR", "ResizeNearestNeighborOptions"),
}


@dataclass(frozen=True)
class _Operator:
    """``options`` is a table of the schema, by name, with its fields; tensors are indices."""

    code: str
    version: int
    inputs: tuple[int, ...]
    output: int
    options: str
    fields: dict[str, Any] = field(default_factory=dict)


class _Program:
    """The tensors and operators of one graph, in the order in which they are written."""

    def __init__(self, graph: ir.Graph, for_gpu: bool, half: bool) -> None:
        self.graph = graph
        self.for_gpu = for_gpu
        self.half = half
        self.tensors: list[_Tensor] = []
        self.operators: list[_Operator] = []
        self.index: dict[str, int] = {}
        for node in graph.nodes:
            self._lower(node)

    def _add_tensor(self, tensor: _Tensor) -> int:
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _activation(self, name: str, tensor_type: ir.TensorType) -> int:
        if tensor_type.dtype != "int8":
            return self._add_tensor(_Tensor(name, tensor_type.shape, tensor_type.dtype))
        q = tensor_type.per_tensor
        return self._add_tensor(_Tensor(name, tensor_type.shape, "int8", (q.scale,), (q.zero_point,)))

    def _constant(self, name: str, data: NDArray[np.generic], scales: tuple[float, ...] = (), axis: int = 0) -> int:
        zeros = (0,) * len(scales)
        return self._add_tensor(_Tensor(name, tuple(data.shape), str(data.dtype), scales, zeros, axis, data))

    def _float_constant(self, name: str, data: NDArray[np.generic]) -> int:
        """A float32 tensor: the constant itself, or float16 behind a DEQUANTIZE. Raises GraphError past float16."""
        if not self.half:
            return self._constant(name, data)
        with np.errstate(over="ignore"):  # told of below
            narrow = data.astype(np.float16)
        if not np.isfinite(narrow).all():
            raise ir.GraphError(f"{name}: a value of {np.abs(data).max():g} does not fit float16", name)
        output = self._add_tensor(_Tensor(f"{name}/float32", tuple(data.shape), "float32"))
        inputs = (self._constant(name, narrow),)
        self.operators.append(_Operator("DEQUANTIZE", 3, inputs, output, "DequantizeOptions"))
        return output

    def _weights_and_bias(self, node: ir.Node) -> tuple[int, int]:
        """The constants of a convolution or a fully connected layer.

        A bias' scale is recomputed as f32(s_in * s_w[c]), which is what the runtimes take it to be.
        """
        source, w_name, b_name = node.inputs
        weights, bias = self.graph.constants[w_name], self.graph.constants[b_name]
        data = weights.data
        depthwise = isinstance(node.op, ir.DepthwiseConv2d)
        if depthwise:
            data = data[np.newaxis]  # (KH, KW, C) -> (1, KH, KW, C)
        if node.type.dtype != "int8":
            return self._float_constant(w_name, data), self._float_constant(b_name, bias.data)
        scales = weights.type.per_axis.scales
        bias_scales = arithmetic.f32_product(
            self.graph.type_of(source).per_tensor.scale, np.asarray(scales, np.float32)
        )
        return (
            self._constant(w_name, data, scales, data.ndim - 1 if depthwise else 0),
            self._constant(b_name, bias.data, tuple(map(float, bias_scales))),
        )

    def _padding(self, node: ir.Node, kernel: tuple[int, int]) -> tuple[ir.Pads, int]:
        """The padding that needs operators of its own, and TFLite's word for what the node itself is told."""
        op = node.op
        assert isinstance(op, ir.Conv2d | ir.DepthwiseConv2d | ir.MaxPool2d)
        _, h, w, _ = self.graph.type_of(node.inputs[0]).shape
        _, out_h, out_w, _ = node.type.shape
        top, bottom, left, right = op.padding
        # Padding that no window reaches would only cost time, and hide that the rest is VALID or SAME.
        bottom = min(bottom, max((out_h - 1) * op.strides[0] + kernel[0] - top - h, 0))
        right = min(right, max((out_w - 1) * op.strides[1] + kernel[1] - left - w, 0))
        pads = (top, bottom, left, right)
        if not any(pads):
            return pads, tflite.Padding.VALID
        if pads == (*ir.same_padding(h, kernel[0], op.strides[0]), *ir.same_padding(w, kernel[1], op.strides[1])):
            return (0, 0, 0, 0), tflite.Padding.SAME
        return pads, tflite.Padding.VALID

    def _zero_padded(self, node: ir.Node, pads: ir.Pads) -> int:
        """The index of a node's input, with a border of (real) zeros."""
        source = node.inputs[0]
        if not any(pads):
            return self.index[source]
        x = self.graph.type_of(source)
        n, h, w, c = x.shape
        top, bottom, left, right = pads
        amounts = np.array([[0, 0], [top, bottom], [left, right], [0, 0]], np.int32)
        padded = ir.TensorType((n, h + top + bottom, w + left + right, c), x.dtype, x.quant)
        output = self._activation(f"{node.name}/padded", padded)
        inputs = (self.index[source], self._constant(f"{node.name}/padding", amounts))
        self.operators.append(_Operator("PAD", 2 if x.dtype == "int8" else 1, inputs, output, "PadOptions"))
        return output

    def _edge_padded(self, node: ir.Node, kernel: tuple[int, int], pads: ir.Pads) -> int:
        """The index of a max pool's input, with its edge rows and columns repeated.

        A window that reaches into padding narrower than itself holds the edge too, so the repetition never wins.
        """
        index, x = self.index[node.inputs[0]], self.graph.type_of(node.inputs[0])
        for axis, before, after in ((1, *pads[:2]), (2, *pads[2:])):
            if max(before, after) >= kernel[axis - 1]:
                raise ir.GraphError(
                    f"{node.name}: padding {pads} leaves windows of {kernel} without a pixel", node.name, node.path
                )
            if not (before or after):
                continue
            size, version = x.shape[axis], 2 if x.dtype == "int8" else 1
            first = (self._edge(node, index, x, axis, 0),) if before else ()
            last = (self._edge(node, index, x, axis, size - 1),) if after else ()
            parts = (*first * before, index, *last * after)
            shape = (*x.shape[:axis], before + size + after, *x.shape[axis + 1 :])
            x = ir.TensorType(shape, x.dtype, x.quant)
            index = self._activation(f"{node.name}/padded{axis}", x)
            fields = {"Axis": axis}
            self.operators.append(_Operator("CONCATENATION", version, parts, index, "ConcatenationOptions", fields))
        return index

    def _edge(self, node: ir.Node, index: int, x: ir.TensorType, axis: int, position: int) -> int:
        """The index of one row (axis 1) or column (axis 2) of tensor ``index``, whose type is ``x``."""
        name = f"{node.name}/edge{axis}.{position}"
        size = (*x.shape[:axis], 1, *x.shape[axis + 1 :])
        begin = tuple(position if i == axis else 0 for i in range(len(size)))
        output = self._activation(name, ir.TensorType(size, x.dtype, x.quant))
        version = 2 if x.dtype == "int8" else 1
        bounds = [self._constant(f"{name}/begin", np.array(begin, np.int32))]
        if self.for_gpu:
            end = tuple(b + s for b, s in zip(begin, size, strict=True))
            steps = np.ones(len(size), np.int32)
            bounds.append(self._constant(f"{name}/end", np.array(end, np.int32)))
            bounds.append(self._constant(f"{name}/strides", steps))
            form = ("STRIDED_SLICE", "StridedSliceOptions")
        else:
            bounds.append(self._constant(f"{name}/size", np.array(size, np.int32)))
            form = ("SLICE", "SliceOptions")
        self.operators.append(_Operator(form[0], version, (index, *bounds), output, form[1]))
        return output

    def _average_pooled(self, node: ir.Node, index: int) -> int:
        """The mean over all pixels, (N, 1, 1, C): an AVERAGE_POOL_2D, or in int8 a depthwise convolution with ones.

        An int8 AVERAGE_POOL_2D must keep its input's scale, which the graph's mean does not.
        """
        x = self.graph.type_of(node.inputs[0])
        n, h, w, c = x.shape
        output = self._activation(f"{node.name}/pooled", ir.TensorType((n, 1, 1, c), x.dtype, node.type.quant))
        fields = {"Padding": tflite.Padding.VALID, "StrideH": 1, "StrideW": 1}
        if x.dtype != "int8":
            fields |= {"FilterHeight": h, "FilterWidth": w}
            self.operators.append(_Operator("AVERAGE_POOL_2D", 1, (index,), output, "Pool2DOptions", fields))
            return output
        scale = float(np.float32(1) / np.float32(h * w))
        bias_scale = float(np.float32(x.per_tensor.scale) * np.float32(scale))
        inputs = (
            index,
            self._constant(f"{node.name}/ones", np.ones((1, h, w, c), np.int8), (scale,) * c, 3),
            self._constant(f"{node.name}/no bias", np.zeros(c, np.int32), (bias_scale,) * c),
        )
        fields["DepthMultiplier"] = 1
        self.operators.append(_Operator("DEPTHWISE_CONV_2D", 3, inputs, output, "DepthwiseConv2DOptions", fields))
        return output

    def _lower(self, node: ir.Node) -> None:
        """Appends one node's operators and its tensor. Raises GraphError for what has no TFLite form."""
        op = node.op
        if isinstance(op, ir.Input):
            self.index[node.name] = self._activation(node.name, node.type)
            return
        int8 = self.graph.type_of(node.inputs[0]).dtype == "int8"
        relu = {"FusedActivationFunction": tflite.ActivationFunctionType.RELU} if getattr(op, "relu", False) else {}
        inputs = tuple(self.index[name] for name in node.inputs if name in self.index)
        match op:
            case ir.Conv2d() | ir.DepthwiseConv2d():
                extent = ir.geometry(self.graph, node).extent
                pads, padding = self._padding(node, extent)
                fields = {"Padding": padding, "StrideH": op.strides[0], "StrideW": op.strides[1], **relu}
                if op.dilation != (1, 1):
                    fields |= {"DilationHFactor": op.dilation[0], "DilationWFactor": op.dilation[1]}
                inputs = (self._zero_padded(node, pads), *self._weights_and_bias(node))
                if isinstance(op, ir.DepthwiseConv2d):
                    form = ("DEPTHWISE_CONV_2D", 3 if int8 else 1, "DepthwiseConv2DOptions")
                    fields["DepthMultiplier"] = 1
                else:
                    form = ("CONV_2D", 3 if int8 else 1, "Conv2DOptions")
            case ir.FullyConnected():
                inputs = (inputs[0], *self._weights_and_bias(node))
                form, fields = ("FULLY_CONNECTED", 4 if int8 else 1, "FullyConnectedOptions"), relu
            case ir.MaxPool2d():
                pads, padding = self._padding(node, op.kernel)
                inputs = (self._edge_padded(node, op.kernel, pads),)
                form = ("MAX_POOL_2D", 2 if int8 else 1, "Pool2DOptions")
                fields = {
                    "Padding": padding,
                    "StrideH": op.strides[0],
                    "StrideW": op.strides[1],
                    "FilterHeight": op.kernel[0],
                    "FilterWidth": op.kernel[1],
                }
            case ir.Add():
                form, fields = ("ADD", 2 if int8 else 1, "AddOptions"), relu
            case ir.GlobalAveragePool() if self.for_gpu:
                flat = self._constant(f"{node.name}/shape", np.array(node.type.shape, np.int32))
                inputs = (self._average_pooled(node, inputs[0]), flat)
                form, fields = ("RESHAPE", 1, ""), {}
            case ir.GlobalAveragePool():
                inputs = (inputs[0], self._constant(f"{node.name}/axes", np.array([1, 2], np.int32)))
                form, fields = ("MEAN", 2 if int8 else 1, "ReducerOptions"), {"KeepDims": False}
            case ir.Relu() if int8 and not self.for_gpu:
                self._check_relu(node)
                form, fields = ("QUANTIZE", 1, "QuantizeOptions"), {}
            case ir.Relu():
                form, fields = ("RELU", 2 if int8 else 1, ""), {}
            case ir.Lookup("identity" | "clip") if int8:
                form, fields = ("QUANTIZE", 1, "QuantizeOptions"), {}
            case ir.Lookup(function, parameters):
                inputs, form, fields = self._lookup(node, inputs, function, parameters, int8)
            case ir.Multiply():
                inputs = (inputs[0], self._gate(node, inputs[1]))
                form, fields = ("MUL", 2 if int8 else 1, "MulOptions"), {}
            case ir.Concatenate():
                axis = len(node.type.shape) - 1
                form, fields = ("CONCATENATION", 2 if int8 else 1, "ConcatenationOptions"), {"Axis": axis}
            case ir.Resize(size, method, coordinates):
                inputs = (inputs[0], self._constant(f"{node.name}/size", np.array(size, np.int32)))
                name, options = _RESIZE[method]
                form = (name, 3, options)
                aligned, half = coordinates == "align corners", coordinates == "half pixel"
                fields = {"AlignCorners": aligned, "HalfPixelCenters": half}
            case ir.Reshape():
                inputs = (inputs[0], self._constant(f"{node.name}/shape", np.array(node.type.shape, np.int32)))
                form, fields = ("RESHAPE", 1, ""), {}
            case ir.Quantize():
                form, fields = ("QUANTIZE", 1, "QuantizeOptions"), {}
            case ir.Dequantize():
                form, fields = ("DEQUANTIZE", 2, "DequantizeOptions"), {}
            case ir.BatchNorm():
                raise ir.GraphError(
                    f"{node.name}: fold the batch normalization into its convolution before writing TFLite",
                    node.name,
                    node.path,
                )
        self.index[node.name] = self._activation(node.name, node.type)
        code, version, options = form
        self.operators.append(_Operator(code, version, inputs, self.index[node.name], options, fields))

    def _lookup(
        self, node: ir.Node, inputs: tuple[int, ...], function: str, parameters: tuple[float, ...], int8: bool
    ) -> tuple[tuple[int, ...], tuple[str, int, str], dict[str, Any]]:
        """A function's inputs, operator and options; int8 clips are requantizations, and handled before."""
        if function == "leaky_relu":
            return inputs, ("LEAKY_RELU", 2 if int8 else 1, "LeakyReluOptions"), {"Alpha": parameters[0]}
        if function in _FUNCTIONS:
            return inputs, (_FUNCTIONS[function], 2 if int8 else 1, ""), {}
        if function == "clip" and parameters == (0.0, 6.0):
            return inputs, ("RELU6", 1, ""), {}
        if function == "clip":
            ends = (np.array([value], np.float32) for value in parameters)
            low, high = (self._constant(f"{node.name}/end{i}", end) for i, end in enumerate(ends))
            raised = self._activation(f"{node.name}/raised", node.type)
            self.operators.append(_Operator("MAXIMUM", 1, (*inputs, low), raised, "MaximumMinimumOptions", {}))
            return (raised, high), ("MINIMUM", 1, "MaximumMinimumOptions"), {}
        raise ir.GraphError(f"{node.name}: no TFLite form for the function {function}", node.name, node.path)

    def _gate(self, node: ir.Node, index: int) -> int:
        """A gate (N, C) as (N, 1, 1, C), which TFLite spreads over the pixels; another tensor as it is."""
        kind = self.graph.type_of(node.inputs[1])
        if len(kind.shape) == len(node.type.shape):
            return index
        shape = (kind.shape[0], 1, 1, kind.shape[1])
        output = self._activation(f"{node.name}/gate", replace(kind, shape=shape))
        inputs = (index, self._constant(f"{node.name}/gate shape", np.array(shape, np.int32)))
        self.operators.append(_Operator("RESHAPE", 1, inputs, output, "", {}))
        return output

    def _check_relu(self, node: ir.Node) -> None:
        x, y = self.graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
        if (y.scale, y.zero_point) != (x.scale, arithmetic.INT8_MIN):
            raise ir.GraphError(
                f"{node.name}: an int8 ReLU keeps its input's scale and has the zero point -128, got {y} from {x}",
                node.name,
                node.path,
            )


def _table(builder: Any, kind: str, fields: dict[str, Any]) -> int:
    """Writes a table of the schema; fields that are tables or vectors are given by their offsets."""
    getattr(tflite, f"{kind}Start")(builder)
    for name, value in fields.items():
        getattr(tflite, f"{kind}Add{name}")(builder, value)
    return int(getattr(tflite, f"{kind}End")(builder))


def _offsets(builder: Any, offsets: Sequence[int]) -> int:
    """Writes a vector of tables or strings."""
    builder.StartVector(4, len(offsets), 4)
    for offset in reversed(offsets):
        builder.PrependUOffsetTRelative(offset)
    return int(builder.EndVector())


def _numbers(builder: Any, values: Sequence[float], dtype: str = "int32") -> int:
    return int(builder.CreateNumpyVector(np.asarray(values, dtype)))


def _buffer(builder: Any, data: NDArray[np.generic] | None) -> int:
    """Writes a constant's bytes, aligned; None writes the empty buffer of what is computed."""
    if data is None:
        return _table(builder, "Buffer", {})
    raw = np.ascontiguousarray(data).tobytes()
    # CreateByteVector would align to 4 bytes only.
    builder.StartVector(1, len(raw), BUFFER_ALIGNMENT)
    builder.head -= len(raw)
    builder.Bytes[builder.head : builder.head + len(raw)] = raw
    return _table(builder, "Buffer", {"Data": builder.EndVector()})


def _tensor(builder: Any, tensor: _Tensor, buffer: int) -> int:
    fields = {
        "Name": builder.CreateString(tensor.name),
        "Shape": _numbers(builder, tensor.shape),
        "Type": _DTYPES[tensor.dtype],
        "Buffer": buffer,
    }
    if tensor.scales:
        quantization = {
            "Scale": _numbers(builder, tensor.scales, "float32"),
            "ZeroPoint": _numbers(builder, tensor.zero_points, "int64"),
            "QuantizedDimension": tensor.axis,
        }
        fields["Quantization"] = _table(builder, "QuantizationParameters", quantization)
    return _table(builder, "Tensor", fields)


def _operator(builder: Any, operator: _Operator, code_index: int) -> int:
    fields = {
        "OpcodeIndex": code_index,
        "Inputs": _numbers(builder, operator.inputs),
        "Outputs": _numbers(builder, (operator.output,)),
    }
    if operator.options:
        fields["BuiltinOptionsType"] = getattr(tflite.BuiltinOptions, operator.options)
        fields["BuiltinOptions"] = _table(builder, operator.options, operator.fields)
    return _table(builder, "Operator", fields)


def _operator_code(builder: Any, code: str, version: int) -> int:
    builtin = getattr(tflite.BuiltinOperator, code)
    # Readers take the greater of the two fields; the older one is a byte.
    fields = {"DeprecatedBuiltinCode": min(builtin, 127), "BuiltinCode": builtin, "Version": version}
    return _table(builder, "OperatorCode", fields)


# What the GPU delegate computes, as published: https://www.tensorflow.org/lite/performance/gpu ("GPU ML operations
# support"). QUANTIZE, DEQUANTIZE, MEAN and SLICE are not on the list.
# Of that list, what this file writes:
GPU_OPERATORS = frozenset(
    {
        "ADD",
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "FULLY_CONNECTED",
        "MAX_POOL_2D",
        "PAD",
        "RELU",
        "RESHAPE",
        "STRIDED_SLICE",
    }
)


def gpu_statement(graph: ir.Graph, *, for_gpu: bool = True, half: bool = False) -> dict[str, str]:
    """What the GPU delegate does with each kind of operator in the file: ``gpu`` or ``falls back to the CPU``."""
    program = _Program(graph, for_gpu, half)
    constants = {i for i, tensor in enumerate(program.tensors) if tensor.data is not None}
    told = {}
    for operator in program.operators:
        if operator.code in GPU_OPERATORS:
            told[operator.code] = "gpu"
        elif operator.code == "DEQUANTIZE" and operator.inputs[0] in constants:
            told["DEQUANTIZE of a constant"] = "gpu: the float16 constant is read as it is"
        else:
            told[operator.code] = "falls back to the CPU"
    return dict(sorted(told.items()))


def serialize(graph: ir.Graph, *, for_gpu: bool = False, half: bool = False) -> bytes:
    """Given a float32, int8 or mixed graph without batch normalizations; Result: the bytes of its ``.tflite`` file.

    Equal graphs give equal bytes. Tensors bear the names of the graph's nodes. ``for_gpu`` writes the forms that the
    GPU delegate takes, ``half`` float constants as float16. Raises GraphError for a node that has no TFLite form (an
    unfolded BatchNorm, an int8 ReLU with parameters of its own), or a constant past float16.
    """
    program = _Program(graph, for_gpu, half)
    weight_bytes = sum(t.data.nbytes for t in program.tensors if t.data is not None)
    builder = flatbuffers.Builder(weight_bytes + (1 << 20))
    # Buffer 0 is the empty one by convention; every constant has its own.
    constants = [t.data for t in program.tensors if t.data is not None]
    buffers = [_buffer(builder, data) for data in (None, *constants)]
    buffer_of = iter(range(1, len(buffers)))
    tensors = [_tensor(builder, t, 0 if t.data is None else next(buffer_of)) for t in program.tensors]
    codes = sorted({(operator.code, operator.version) for operator in program.operators})
    operators = [_operator(builder, o, codes.index((o.code, o.version))) for o in program.operators]
    subgraph = {
        "Name": builder.CreateString("main"),
        "Tensors": _offsets(builder, tensors),
        "Inputs": _numbers(builder, [program.index[node.name] for node in graph.inputs]),
        "Outputs": _numbers(builder, [program.index[name] for name in graph.outputs]),
        "Operators": _offsets(builder, operators),
    }
    model = {
        "Version": SCHEMA_VERSION,
        "Description": builder.CreateString(graph.name),
        "OperatorCodes": _offsets(builder, [_operator_code(builder, *code) for code in codes]),
        "Subgraphs": _offsets(builder, [_table(builder, "SubGraph", subgraph)]),
        "Buffers": _offsets(builder, buffers),
    }
    builder.Finish(_table(builder, "Model", model), FILE_IDENTIFIER)
    return bytes(builder.Output())
