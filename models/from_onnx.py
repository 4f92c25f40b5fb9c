"""Float ONNX networks as graphs.

ONNX computes in NCHW, the graph in NHWC, and exporters from frameworks of the other layout transpose between the two.
So each tensor here is a tensor of the graph together with what each axis of the ONNX tensor is (``axes``): a
transposition renames them and computes nothing. A factor and a shift a channel wait beside a tensor until something
else reads it: in front of the network they are the scaling of pixels, in a head they join the linear layer behind
them, anywhere else they are a batch normalization.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from . import graph as ir
from .graph_builder import END_AT_LOGITS, NO_PADS, GraphBuilder, Origin, UnsupportedLayer, Value
from .onnx_file import Array, read_onnx, to_array
from .onnx_fold import Folder, FoldError, shape_of
from .read_file import MODEL_BYTES

SUPPORTED = (
    "Conv (dense or depthwise), BatchNormalization, Relu, LeakyRelu, Clip, Sigmoid, Tanh, MaxPool, Pad before them, "
    "Add, Mul, Concat, Resize, AveragePool, GlobalAveragePool, ReduceMean over height and width, Gemm, MatMul, factors "
    "and shifts a channel (Mul, Div, Add, Sub), Flatten, Reshape, Squeeze, Unsqueeze, Transpose, Cast, Dropout and "
    "Identity"
)


@dataclass(frozen=True)
class Scaling:
    """What a network does to an image in front of all else: x * factor + shift, a number a channel each. ``whole``:
    the image enters as whole numbers, which are pixels from 0 to 255.
    """

    factor: tuple[float, ...]
    shift: tuple[float, ...]
    whole: bool

    def normalization(self) -> tuple[int, tuple[float, ...], tuple[float, ...]]:
        """What a pixel of 255 is to the file, 255 or 1, and the mean and std, in units of pixel / 255, that say the
        same. Where the image enters as floats, the unit is the one that makes numbers as networks take them.

        Raises ValueError where that is neither or both.
        """
        units = [unit for unit in (255, 1) if self.whole or all(map(_is_likely, self._spans(unit), self.shift))]
        if len(units) != 1 and not self.whole:
            said = f"pixels * {list(self.factor)} + {list(self.shift)}"
            raise ValueError(
                f"scales its image ({said}), and whether that is from 0 to 255 or from 0 to 1 is not to be seen; "
                "export it without the scaling and give --preprocessing"
            )
        spans = self._spans(units[0])
        if min(spans) <= 0:
            raise ValueError("turns its image's light into dark; export it without that and give --preprocessing")
        mean = tuple(_rounded(0.0 - shift / span) for shift, span in zip(self.shift, spans, strict=True))
        return units[0], mean, tuple(_rounded(1 / span) for span in spans)

    def _spans(self, unit: int) -> list[float]:
        """From black to white, in what the network gets."""
        return [factor * unit for factor in self.factor]


def _rounded(value: float) -> float:
    """Six digits where they are the same number to float32, as of 1 / 127.5, which lost some."""
    short = float(f"{value:.6g}")
    return short if abs(short - value) <= 2e-7 * abs(value) else value


def _is_likely(span: float, black: float) -> bool:
    """Whether a network takes numbers from ``black`` over ``span``: about as far as from -1 to 1, and around or from
    0; or bytes less their mean.
    """
    low, span = min(abs(black), abs(black + span)), abs(span)
    return (0.5 <= span <= 20 and low <= 1.5 * span) or (20 < span <= 300 and 0.2 * span <= low <= 0.8 * span)


@dataclass(frozen=True)
class OnnxNetwork:
    """A network as imported. ``scaling`` is what its graph expects to be done to an image beforehand, None where the
    file does nothing to it. ``softmax``: the file ends in one, the graph at its logits. ``files`` held tensors beside
    the model's own file.
    """

    graph: ir.Graph
    scaling: Scaling | None
    softmax: bool
    files: tuple[Path, ...] = ()


def load_onnx(path: str | Path, size: int | None = None) -> OnnxNetwork:
    """Reads a file; ``size`` as for ``from_onnx``.

    Raises OnnxError where it is no sound ONNX model, UnsupportedLayer for what a graph cannot say, OSError.
    """
    model, files = read_onnx(path)
    return replace(from_onnx(model, size), files=files)


def from_onnx(model: onnx.ModelProto, size: int | None = None) -> OnnxNetwork:
    """A float model of one image, channels first or last; an open height or width becomes ``size``, any batch 1.

    Raises UnsupportedLayer.
    """
    for function in model.functions:
        if function.domain in _STANDARD:
            raise Origin("", function.name, function.name).refuse("the file gives it a meaning of its own")
    if any(entry.domain in _STANDARD and entry.version < _OLDEST_OPSET for entry in model.opset_import):
        reason = f"its opset is older than {_OLDEST_OPSET}; convert it with onnx.version_converter"
        raise Origin("", "model", "model").refuse(reason)
    importer = _Importer(model, size)
    needed = {output.name for output in model.graph.output}
    nodes = []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            needed |= set(node.input)
            nodes.append(node)
    for node in reversed(nodes):
        importer.visit(node)
    return importer.network()


_Weight = tuple[str, Array]


@dataclass(frozen=True)
class _Affine:
    """x * factor + shift, (C,) float64 each."""

    factor: NDArray[np.float64]
    shift: NDArray[np.float64]
    origin: Origin


@dataclass(frozen=True)
class _Tensor:
    """What the network computes. ``axes`` has a letter for each axis of the ONNX tensor: N, C, and H and W, of which a
    pooled tensor may lack one or both. ``affine`` waits to be applied. ``softmax``: one was left out. ``whole``: its
    elements are uint8, with which nothing is computed before they become floats.
    """

    value: Value
    axes: str
    affine: _Affine | None = None
    softmax: bool = False
    whole: bool = False


_Operand = _Tensor | _Weight | None


class _Importer:
    """Walks the nodes, which ONNX keeps in topological order. ``env`` holds tensors and constants by name."""

    def __init__(self, model: onnx.ModelProto, size: int | None) -> None:
        self.model = model
        self.size = size
        self.builder = GraphBuilder(MODEL_BYTES)
        self.folder = Folder()
        self.batch = 1  # of the file; the graph's is 1
        self.image = ""  # the graph's name of the input
        self.whole = False  # whether its elements are whole numbers
        self.scaling: _Affine | None = None  # of the image, once something has read it
        self.applied: dict[int, tuple[_Affine, Value]] = {}  # each once, however many read it
        self.outputs = [output.name for output in model.graph.output]
        self.env: dict[str, _Operand] = {"": None}
        for tensor in model.graph.initializer:
            self.env[tensor.name] = (tensor.name, _array(tensor, Origin("", tensor.name, "initializer")))
        for value in model.graph.input:
            if value.name not in self.env:
                self.env[value.name] = self._input(value)

    def _input(self, value: onnx.ValueInfoProto) -> _Tensor:
        origin = Origin("", value.name, "input")
        tensor = value.type.tensor_type
        shape = [d.dim_value if d.HasField("dim_value") else 0 for d in tensor.shape.dim]
        if tensor.elem_type not in (*_FLOATS, TensorProto.UINT8):
            kind = TensorProto.DataType.Name(tensor.elem_type)
            raise origin.refuse(f"it is {kind}; a network takes images of float32, float16 or uint8")
        axes = "NC" if len(shape) == 2 else _layout(shape, origin)
        sizes = dict(zip(axes, shape, strict=True))
        self.batch = sizes["N"] or 1
        if self.size is not None:
            sizes |= {axis: sizes[axis] or self.size for axis in "HW" if axis in sizes}
        if 0 in (sizes[axis] for axis in axes[1:]):
            raise origin.refuse(f"its shape {shape} has open sizes; give --input-size, or export it with fixed ones")
        nchw = (1, *(sizes[axis] for axis in "CHW" if axis in sizes))
        self.whole = tensor.elem_type == TensorProto.UINT8
        result = self.builder.input(value.name, nchw, origin)
        self.image = result.name
        return _Tensor(result, axes, whole=self.whole)

    def network(self) -> OnnxNetwork:
        """What has been imported."""
        origin = Origin("", "output", "output")
        if len(self.outputs) != 1:
            raise origin.refuse(f"the outputs are {', '.join(self.outputs)}; export the network with one of them alone")
        result = _tensor(self.env.get(self.outputs[0]), origin)
        value = self.plain(replace(result, softmax=False), origin).value
        graph = self.builder.graph(self.model.graph.name or "onnx", (value,), origin)
        scaling = self.scaling
        if scaling is None or (_is_identity(scaling) and not self.whole):
            return OnnxNetwork(graph, None, result.softmax)
        factor, shift = map(tuple, (scaling.factor.tolist(), scaling.shift.tolist()))
        return OnnxNetwork(graph, Scaling(factor, shift, self.whole), result.softmax)

    def visit(self, node: onnx.NodeProto) -> None:
        """Adds what one node means."""
        origin = _origin(node)
        if node.domain not in _STANDARD:
            raise origin.refuse(f"it belongs to the domain {node.domain}; export with the standard's operators alone")
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise origin.refuse("it runs a graph of its own, as often as its data say; export the network without it")
        if node.op_type in _RANDOM:
            raise origin.refuse("it draws random numbers, so the network would be another at every load")
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        unknown = [name for name in node.input if name not in self.env]
        if unknown:
            raise origin.refuse(f"its operand {unknown[0]} is made by a part that is not used as the network's result")
        call = _Call(self, origin, [self.env[name] for name in node.input], attributes)
        try:
            result = self._result(node, call)
        except UnsupportedLayer:
            raise
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise origin.refuse(f"its operands and attributes do not go together ({error})") from error
        if node.output[0]:
            self.env[node.output[0]] = result

    def _result(self, node: onnx.NodeProto, call: _Call) -> _Operand:
        name = node.output[0]
        if node.op_type == "Constant":
            return name, _constant(call.attributes, call.origin)
        first = call.operands[0] if call.operands else None
        if node.op_type == "Shape" and isinstance(first, _Tensor):
            return name, shape_of(self.shape(first), call.attributes)
        if node.op_type == "Identity" and isinstance(first, tuple):  # keeps the name, which says the module
            return first
        if all(operand is None or isinstance(operand, tuple) for operand in call.operands):
            arrays = [operand[1] if isinstance(operand, tuple) else None for operand in call.operands]
            try:
                return name, self.folder.fold(node.op_type, arrays, call.attributes)
            except FoldError as error:
                raise call.origin.refuse(str(error)) from error
        handler = _HANDLERS.get(node.op_type)
        if handler is not None:
            return _Tensor(handler(self.builder, call), _tensor(first, call.origin).axes)
        general = _OF_ANY_LAYOUT.get(node.op_type)
        if general is not None:
            return general(self, call)
        if name in self.outputs:
            raise call.origin.refuse(
                f"the output {name} is made by it; export the network without it, ending in logits"
            )
        reason = _REASONS.get(node.op_type, f"there is no int8 form of it here; supported are {SUPPORTED}")
        raise call.origin.refuse(reason)

    def sizes(self, tensor: _Tensor) -> dict[str, int]:
        """Of each axis by its letter, the batch as the file has it."""
        _, channels, *window = self.builder.shape(tensor.value)
        height, width = window or (1, 1)
        return {"N": self.batch, "C": channels, "H": height, "W": width}

    def shape(self, tensor: _Tensor) -> tuple[int, ...]:
        """As ONNX has it."""
        sizes = self.sizes(tensor)
        return tuple(sizes[axis] for axis in tensor.axes)

    def plain(self, tensor: _Tensor, origin: Origin) -> _Tensor:
        """The tensor with its factor and shift applied, in the rank of its axes. The image keeps its values: its
        scaling becomes preprocessing."""
        self._check_real(tensor, origin)
        value, affine = tensor.value, tensor.affine
        if value.name == self.image:
            self._read_image(affine, origin)
        elif affine is not None:
            if id(affine) not in self.applied:
                ones, zeros = np.ones(affine.factor.size), np.zeros(affine.factor.size)
                parts = {"factor": affine.factor, "shift": affine.shift, "mean": zeros, "variance": ones}
                gamma, beta, mean, variance = ((f"{affine.origin.name}.{name}", each) for name, each in parts.items())
                normalized = self.builder.batch_norm(value, gamma, beta, mean, variance, 0.0, affine.origin)
                self.applied[id(affine)] = (affine, normalized)
            value = self.applied[id(affine)][1]
        if not set("HW") & set(tensor.axes) and len(self.builder.shape(value)) == 4:
            value = self.builder.reshape(value, self.builder.shape(value)[:2], origin)
        return _Tensor(value, tensor.axes)

    def _check_real(self, tensor: _Tensor, origin: Origin) -> None:
        """Raises UnsupportedLayer for what nothing may be computed with."""
        if tensor.softmax:
            raise origin.refuse(f"its operand is the result of a Softmax; {END_AT_LOGITS}")
        if tensor.whole:
            raise origin.refuse("it computes with the image's bytes; export the network with a Cast to float before it")

    def _read_image(self, affine: _Affine | None, origin: Origin) -> None:
        channels = self.builder.shape(Value(self.image))[1]
        found = affine or _Affine(np.ones(channels), np.zeros(channels), origin)
        known = self.scaling or found
        if not (np.array_equal(found.factor, known.factor) and np.array_equal(found.shift, known.shift)):
            raise origin.refuse(
                "it reads the image scaled otherwise than another part does; export the network with one"
            )
        self.scaling = known

    def affine(self, tensor: _Tensor, factor: Any, shift: Any, origin: Origin) -> _Tensor:
        """(what waits already) * factor + shift, numbers or (C,)."""
        self._check_real(tensor, origin)
        channels = self.sizes(tensor)["C"]
        before = tensor.affine or _Affine(np.ones(channels), np.zeros(channels), origin)
        after = _Affine(before.factor * factor, before.shift * factor + shift, origin)
        if not np.isfinite([after.factor, after.shift]).all():
            raise origin.refuse("by a factor or a shift that is not finite")
        return replace(tensor, affine=after)

    def per_channel(self, tensor: _Tensor, weight: _Weight, origin: Origin) -> NDArray[np.float64]:
        """A constant that broadcasts over all but the channels, (C,). Raises UnsupportedLayer for any other."""
        values, channels = weight[1], self.sizes(tensor)["C"]
        shape = values.shape
        while len(shape) > len(tensor.axes) and shape[0] == 1:
            shape = shape[1:]
        letters = tensor.axes[len(tensor.axes) - len(shape) :]
        if len(shape) > len(tensor.axes) or any(n != 1 and c != "C" for n, c in zip(shape, letters, strict=True)):
            reason = "one number a channel, or one for all, has a form here"
            if tensor.value.name == self.image:
                reason += "; if it scales pixels, export without it and give --preprocessing"
            raise origin.refuse(f"with a constant of shape {list(values.shape)}; {reason}")
        return np.broadcast_to(values.astype(np.float64).reshape(-1), (channels,))

    def linear(self, tensor: _Tensor, name: str, rows: Array, bias: _Weight | None, origin: Origin) -> _Tensor:
        """``rows`` (O, I). What waits beside the tensor joins the weights, in float64."""
        if tensor.axes != "NC":
            raise origin.refuse(f"on a tensor of shape {list(self.shape(tensor))}; pool it to (N, C) first")
        affine = tensor.affine
        if affine is not None and tensor.value.name != self.image and rows.shape[1] == affine.factor.size:
            wide = rows.astype(np.float64)
            shift = wide @ affine.shift + (0.0 if bias is None else bias[1].astype(np.float64))
            bias, rows = (f"{origin.name}.bias" if bias is None else bias[0], shift), wide * affine.factor
            tensor = replace(tensor, affine=None)
        value = self.plain(tensor, origin).value
        return _Tensor(self.builder.linear(value, (name, rows), bias, origin), "NC")


@dataclass(frozen=True)
class _Call:
    """One ONNX node with its operands and attributes read."""

    importer: _Importer
    origin: Origin
    operands: list[_Operand]
    attributes: dict[str, Any]

    def tensor(self, index: int) -> Value:
        """An operand that the network computes, in NCHW or (N, C)."""
        tensor = self.importer.plain(_tensor(self.operands[index], self.origin), self.origin)
        if tensor.axes not in ("NCHW", "NC"):
            raise self.origin.refuse(
                f"its operand has the axes {', '.join(tensor.axes)}, where it takes N, C, H, W; export the network "
                "with channels first (tf2onnx: --inputs-as-nchw)"
            )
        return tensor.value

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

    def whole(self, index: int, name: str) -> list[int] | None:
        """Whole numbers that are an operand in newer opsets and an attribute in older ones; None where left out."""
        given = self.optional(index)
        if given is not None:
            if given[1].size > _MOST_AXES:
                raise self.origin.refuse(f"its operand {index} has {given[1].size} numbers, for dimensions")
            return [int(value) for value in given[1].reshape(-1)]
        return self.ints(name, ()) if name in self.attributes else None


_STANDARD = ("", "ai.onnx")  # the domain of the operators that the specification defines
_OLDEST_OPSET = 7  # before it, operands were broadcast by attributes
_MOST_AXES = 64
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.DOUBLE)
_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")
_REASONS = {
    "QuantizeLinear": "only float networks are read; give the network before quantization",
    "DequantizeLinear": "only float networks are read; give the network before quantization",
}


def _layout(shape: Sequence[int], origin: Origin) -> str:
    """NCHW or NHWC, by where an image's one or three channels are."""
    if len(shape) != 4:
        raise origin.refuse(f"an input of shape {list(shape)}; images are (N, C, H, W) or (N, H, W, C)")
    return "NHWC" if shape[3] in (1, 3) and shape[1] not in (1, 3) else "NCHW"


def _is_identity(affine: _Affine) -> bool:
    return bool((affine.factor == 1).all() and (affine.shift == 0).all())


def _tensor(operand: _Operand, origin: Origin) -> _Tensor:
    if not isinstance(operand, _Tensor):
        what = "missing" if operand is None else f"the constant {operand[0]}"
        raise origin.refuse(f"an operand is {what}; it must be computed from the image")
    return operand


def _array(tensor: onnx.TensorProto, origin: Origin) -> Array:
    try:
        return to_array(tensor)
    except Exception as error:  # numpy and onnx raise many kinds on data that are not those of the shape
        raise origin.refuse(f"it cannot be read: {error}") from error


def _origin(node: onnx.NodeProto) -> Origin:
    """Module paths survive in torch's ONNX files: in a weight's name, or in the node's (/blocks.0/pool/MaxPool)."""
    weights = [name for name in node.input if name.endswith(".weight")]
    if weights:
        path = weights[0].removesuffix(".weight")
        return Origin(path, path, node.op_type)
    name = node.name or (node.output[0] if node.output else node.op_type)
    path = re.sub(rf"/{node.op_type}(_\d+)?$", "", name) if name.startswith("/") else name
    path = path.strip("/").replace("/", ".")
    return Origin(path, name.strip("/").replace("/", ".") or node.op_type, node.op_type)


def _constant(attributes: dict[str, Any], origin: Origin) -> Array:
    for name, value in attributes.items():
        if name == "value":
            return _array(value, origin)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    raise origin.refuse(f"it holds {', '.join(attributes)}")


def _padding(call: _Call, x: tuple[int, ...], kernel: Sequence[int], strides: Sequence[int]) -> ir.Pads:
    """Explicit padding of a window operator on an NCHW shape, from ``pads`` or ``auto_pad``."""
    mode = call.attributes.get("auto_pad", b"NOTSET").decode(errors="replace")
    if mode == "NOTSET":
        top, left, bottom, right = call.ints("pads", (0, 0, 0, 0))
        return top, bottom, left, right
    if mode == "VALID":
        return NO_PADS
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        raise call.origin.refuse(f"auto_pad {mode}, which the standard does not know")
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
    if call.ints("kernel_shape", kernel) != list(kernel):
        raise call.origin.refuse(f"a window of {call.ints('kernel_shape', ())} with weights for {list(kernel)}")
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


def _max_pool(builder: GraphBuilder, call: _Call) -> Value:
    x, kernel = call.tensor(0), _two(call.ints("kernel_shape", ()), call.origin)
    strides = _two(call.ints("strides", (1, 1)), call.origin)
    return builder.max_pool(
        x,
        kernel=kernel,
        strides=strides,
        padding=_padding(call, _full_shape(builder, x), kernel, strides),
        dilation=_two(call.ints("dilations", (1, 1)), call.origin),
        ceil_mode=bool(call.attributes.get("ceil_mode", 0)),
        origin=call.origin,
    )


def _average_pool(builder: GraphBuilder, call: _Call) -> Value:
    x, kernel = call.tensor(0), _two(call.ints("kernel_shape", ()), call.origin)
    strides = _two(call.ints("strides", (1, 1)), call.origin)
    if max(call.ints("dilations", (1,))) > 1:
        raise call.origin.refuse("with dilation; export the network without it")
    return builder.average_pool(
        x,
        kernel=kernel,
        strides=strides,
        padding=_padding(call, _full_shape(builder, x), kernel, strides),
        ceil_mode=bool(call.attributes.get("ceil_mode", 0)),
        count_padding=bool(call.attributes.get("count_include_pad", 0)),
        origin=call.origin,
    )


def _resize(builder: GraphBuilder, call: _Call) -> Value:
    """Of whole NCHW tensors. Source of the names: https://onnx.ai/onnx/operators/onnx__Resize.html."""
    x, origin = call.tensor(0), call.origin
    words = {name: call.attributes.get(name, default).decode(errors="replace") for name, default in _RESIZE.items()}
    positions, rounding = words["coordinate_transformation_mode"], words["nearest_mode"]
    method = {"linear": "bilinear", "nearest": "nearest"}.get(words["mode"])
    known = _COORDINATES.get((positions, rounding if method == "nearest" else ""))
    if method is None or known is None or words["keep_aspect_ratio_policy"] != "stretch":
        what = f"{words['mode']} at {positions}" + (f", {rounding}" if method == "nearest" else "")
        raise origin.refuse(
            f"it resizes {what}; linear at half_pixel, align_corners or asymmetric, and nearest at asymmetric with "
            "floor, half_pixel with round_prefer_ceil or align_corners with round_prefer_ceil are"
        )
    if "axes" in call.attributes or call.attributes.get("antialias", 0):
        raise origin.refuse("with axes or antialias; export the network without them")
    sizes, shape = call.optional(3), _full_shape(builder, x)
    numbers = call.weight(2) if sizes is None else sizes
    if numbers[1].shape != (4,):
        raise origin.refuse(f"with {numbers[1].size} numbers; one is needed for each of N, C, H, W")
    given = [float(number) for number in numbers[1]]
    kept = given[1] == (1 if sizes is None else shape[1])
    if not kept:
        raise origin.refuse(f"it resizes channels or images, by {given}; only height and width are resized")
    if sizes is None:
        if positions == "pytorch_half_pixel" and min(given[2:]) < 1:
            raise origin.refuse("it makes a map smaller at pytorch_half_pixel; export it with half_pixel")
        return builder.scaled_resize(x, given[2:], method, known, origin)
    size = int(given[2]), int(given[3])
    if positions == "pytorch_half_pixel" and 1 in size:
        raise origin.refuse(f"to {list(size)} at pytorch_half_pixel; export it with half_pixel")
    return builder.resize(x, size, method, known, origin)


_RESIZE = {
    "mode": b"nearest",
    "coordinate_transformation_mode": b"half_pixel",
    "nearest_mode": b"round_prefer_floor",
    "keep_aspect_ratio_policy": b"stretch",
}
_COORDINATES = {
    ("half_pixel", ""): "half pixel",
    ("pytorch_half_pixel", ""): "half pixel",  # where the result has more than one row and column
    ("align_corners", ""): "align corners",
    ("asymmetric", ""): "legacy",
    ("asymmetric", "floor"): "legacy",
    ("half_pixel", "round_prefer_ceil"): "half pixel",
    ("align_corners", "round_prefer_ceil"): "align corners",
}


def _concat(importer: _Importer, call: _Call) -> _Tensor:
    tensors = [importer.plain(_tensor(each, call.origin), call.origin) for each in call.operands]
    axes = tensors[0].axes
    if any(each.axes != axes for each in tensors) or axes[call.attributes.get("axis", 1)] != "C":
        raise call.origin.refuse("it joins other dimensions than channels, or layouts that differ")
    return _Tensor(importer.builder.concatenate([each.value for each in tensors], 1, call.origin), axes)


def _function(importer: _Importer, call: _Call) -> _Tensor:
    """Of each element by itself."""
    tensor = importer.plain(_tensor(call.operands[0], call.origin), call.origin)
    builder, origin = importer.builder, call.origin
    match origin.operator:
        case "Sigmoid":
            value = builder.sigmoid(tensor.value, origin)
        case "Tanh":
            value = builder.tanh(tensor.value, origin)
        case _:
            value = builder.leaky_relu(tensor.value, float(call.attributes.get("alpha", 0.01)), origin)
    return _Tensor(value, tensor.axes)


def _batch_norm(importer: _Importer, call: _Call) -> _Tensor:
    """Of a vector, a factor and a shift a channel."""
    if call.attributes.get("training_mode", 0):
        raise call.origin.refuse("it uses the statistics of a batch; export the network in evaluation mode")
    if not call.attributes.get("spatial", 1):
        raise call.origin.refuse("it normalizes each pixel by itself; only channels as a whole are")
    tensor = _tensor(call.operands[0], call.origin)
    gamma, beta, mean, variance = (call.weight(i) for i in range(1, 5))
    epsilon = float(np.float32(call.attributes.get("epsilon", 1e-5)))
    if tensor.axes == "NC" and tensor.value.name != importer.image:
        wide = [importer.per_channel(tensor, each, call.origin) for each in (gamma, beta, mean, variance)]
        factor = wide[0] / np.sqrt(wide[3] + epsilon)
        return importer.affine(tensor, factor, wide[1] - wide[2] * factor, call.origin)
    value = importer.builder.batch_norm(call.tensor(0), gamma, beta, mean, variance, epsilon, call.origin)
    return _Tensor(value, tensor.axes)


def _relu(importer: _Importer, call: _Call) -> _Tensor:
    tensor = importer.plain(_tensor(call.operands[0], call.origin), call.origin)
    return _Tensor(importer.builder.relu(tensor.value, call.origin), tensor.axes)


def _clip(importer: _Importer, call: _Call) -> _Tensor:
    limits = [call.attributes.get(name) for name in ("min", "max")]
    for index in (0, 1):
        given = call.optional(index + 1)
        limits[index] = limits[index] if given is None else given[1].item()
    low, high = limits
    tensor = importer.plain(_tensor(call.operands[0], call.origin), call.origin)
    return _Tensor(importer.builder.clip(tensor.value, low, high, call.origin), tensor.axes)


def _arithmetic(importer: _Importer, call: _Call) -> _Tensor:
    """Two tensors are added or multiplied; a constant gives a factor or a shift."""
    a, b = call.operands
    origin, operator = call.origin, call.origin.operator
    if isinstance(a, _Tensor) and isinstance(b, _Tensor):
        if operator not in ("Add", "Mul"):
            raise origin.refuse("of two tensors; there is no int8 form of it here")
        if a.axes != b.axes:
            raise origin.refuse(f"of axes {', '.join(a.axes)} and {', '.join(b.axes)}; export with channels first")
        x, y = importer.plain(a, origin), importer.plain(b, origin)
        combine = importer.builder.add if operator == "Add" else importer.builder.multiply
        return _Tensor(combine(x.value, y.value, origin), a.axes)
    tensor = _tensor(a if isinstance(a, _Tensor) else b, origin)
    number = importer.per_channel(tensor, call.weight(1 if tensor is a else 0), origin)
    with np.errstate(all="ignore"):  # what is not finite is refused
        match operator, tensor is a:
            case "Add", _:
                return importer.affine(tensor, 1.0, number, origin)
            case "Sub", True:
                return importer.affine(tensor, 1.0, -number, origin)
            case "Sub", False:
                return importer.affine(tensor, -1.0, number, origin)
            case "Mul", _:
                return importer.affine(tensor, number, 0.0, origin)
            case "Div", True:
                return importer.affine(tensor, 1.0 / number, 0.0, origin)
    raise origin.refuse("of a constant by a tensor; there is no int8 form of it here")


def _cast(importer: _Importer, call: _Call) -> _Tensor:
    """All that is computed is computed in float32."""
    if call.attributes.get("to") not in _FLOATS:
        raise call.origin.refuse("to another type than a float; export the network without it")
    return replace(_tensor(call.operands[0], call.origin), whole=False)


def _cast_like(importer: _Importer, call: _Call) -> _Operand:
    """To the type of something that is computed, which is float32 here."""
    first, like = call.operands
    if isinstance(first, _Tensor) and isinstance(like, _Tensor):
        return replace(first, whole=False)
    name, values = call.weight(0)
    return name, values.astype(np.float32)


def _transpose(importer: _Importer, call: _Call) -> _Tensor:
    tensor = _tensor(call.operands[0], call.origin)
    order = call.ints("perm", range(len(tensor.axes))[::-1])
    return replace(tensor, axes="".join(tensor.axes[axis] for axis in order))


def _reduce_mean(importer: _Importer, call: _Call) -> _Tensor:
    tensor = _tensor(call.operands[0], call.origin)
    axes = call.whole(1, "axes") or []
    if len(tensor.axes) != 4 or {tensor.axes[axis] for axis in axes} != {"H", "W"} or len(axes) != 2:
        raise call.origin.refuse(f"a mean over dimensions {axes}; only height and width together are")
    pooled = importer.builder.global_average_pool(importer.plain(tensor, call.origin).value, call.origin)
    keep = call.attributes.get("keepdims", 1)
    return _Tensor(pooled, tensor.axes if keep else tensor.axes.replace("H", "").replace("W", ""))


def _pad(importer: _Importer, call: _Call) -> _Tensor:
    tensor = importer.plain(_tensor(call.operands[0], call.origin), call.origin)
    mode = call.attributes.get("mode", b"constant").decode(errors="replace")
    if mode != "constant":
        raise call.origin.refuse(f"padding mode {mode}; only constant padding is")
    amounts, value, some = call.whole(1, "pads") or [], call.optional(2), call.whole(3, "axes")
    rank = len(tensor.axes)
    axes = [tensor.axes[axis] for axis in (range(rank) if some is None else some)]
    before, after = (dict(zip(axes, half, strict=False)) for half in (amounts[: len(axes)], amounts[len(axes) :]))
    others = [pads.get(axis, 0) for pads in (before, after) for axis in "NC"]
    if rank != 4 or len(amounts) != 2 * len(axes) or any(others):
        shape = list(importer.shape(tensor))
        raise call.origin.refuse(f"padding {amounts} of {shape}; only height and width are padded")
    pads = (before.get("H", 0), after.get("H", 0), before.get("W", 0), after.get("W", 0))
    filled = float(call.attributes.get("value", 0.0) if value is None else value[1].reshape(-1)[0])
    return _Tensor(importer.builder.pad(tensor.value, pads, filled, call.origin), tensor.axes)


def _gemm(importer: _Importer, call: _Call) -> _Tensor:
    alpha, beta = call.attributes.get("alpha", 1.0), call.attributes.get("beta", 1.0)
    if (alpha, beta) != (1.0, 1.0) or call.attributes.get("transA", 0):
        raise call.origin.refuse(f"alpha {alpha}, beta {beta} or a transposed input")
    (name, weights), bias = call.weight(1), call.optional(2)
    rows = weights if call.attributes.get("transB", 0) else weights.T
    if bias is not None:
        if any(size != 1 for size in bias[1].shape[:-1]):
            raise call.origin.refuse(f"a bias of shape {list(bias[1].shape)}; one number an output is")
        bias = (bias[0], np.broadcast_to(bias[1].reshape(-1), rows.shape[:1]))
    return importer.linear(_tensor(call.operands[0], call.origin), name, rows, bias, call.origin)


def _matmul(importer: _Importer, call: _Call) -> _Tensor:
    name, weights = call.weight(1)
    if weights.ndim != 2:
        raise call.origin.refuse(f"weights of shape {list(weights.shape)}; they are (channels, outputs)")
    return importer.linear(_tensor(call.operands[0], call.origin), name, weights.T, None, call.origin)


def _reshape(importer: _Importer, call: _Call) -> _Tensor:
    tensor, wanted = _tensor(call.operands[0], call.origin), call.whole(1, "shape") or []
    have = importer.shape(tensor)
    if not call.attributes.get("allowzero", 0):
        wanted = [have[i] if size == 0 and i < len(have) else size for i, size in enumerate(wanted)]
    known = math.prod(size for size in wanted if size != -1)
    shape = tuple(math.prod(have) // max(known, 1) if size == -1 else size for size in wanted)
    return _reshaped(importer, tensor, shape, call.origin)


def _flatten(importer: _Importer, call: _Call) -> _Tensor:
    tensor = _tensor(call.operands[0], call.origin)
    have, axis = importer.shape(tensor), call.attributes.get("axis", 1)
    axis += len(have) if axis < 0 else 0
    return _reshaped(importer, tensor, (math.prod(have[:axis]), math.prod(have[axis:])), call.origin)


def _reshaped(importer: _Importer, tensor: _Tensor, shape: tuple[int, ...], origin: Origin) -> _Tensor:
    """Axes of one pixel may come and go; the others stay in their order."""
    have = importer.shape(tensor)
    if shape == have:
        return tensor
    left = [(axis, size) for axis, size in zip(tensor.axes, have, strict=True) if axis in "NC" or size != 1]
    spare = [axis for axis in "HW" if axis not in dict(left)]
    axes = ""
    for size in shape:
        if left and left[0][1] == size:
            axes += left.pop(0)[0]
        elif size == 1 and spare:
            axes += spare.pop(0)
        else:
            break
    if tensor.axes in ("NCHW", "NHWC") and shape == (have[0], math.prod(have[1:])):
        value = importer.plain(tensor, origin).value
        if len(importer.builder.shape(value)) == 4 and left:
            return _Tensor(importer.builder.flatten(value, origin, channels_last=tensor.axes == "NHWC"), "NC")
    if left or len(axes) != len(shape):
        advice = "; pool the map to 1x1 (global average) first" if set("HW") & {axis for axis, _ in left} else ""
        raise origin.refuse(f"it takes {list(have)} to {list(shape)}{advice}")
    return replace(tensor, axes=axes)


def _squeeze(importer: _Importer, call: _Call) -> _Tensor:
    tensor, axes = _tensor(call.operands[0], call.origin), call.whole(1, "axes")
    sizes = importer.sizes(tensor)
    gone = [tensor.axes[axis] for axis in axes or ()]
    if axes is None or any(axis in "NC" or sizes[axis] != 1 for axis in gone):
        shape = list(importer.shape(tensor))
        raise call.origin.refuse(f"of dimensions {axes} of {shape}; only height and width of one pixel are")
    return replace(tensor, axes="".join(axis for axis in tensor.axes if axis not in gone))


def _unsqueeze(importer: _Importer, call: _Call) -> _Tensor:
    tensor, places = _tensor(call.operands[0], call.origin), call.whole(1, "axes") or []
    rank = len(tensor.axes) + len(places)
    spare = [axis for axis in "HW" if axis not in tensor.axes]
    if len(places) > len(spare):
        raise call.origin.refuse(f"of {list(importer.shape(tensor))} at {places}; images have four dimensions")
    axes = list(tensor.axes)
    for place, axis in zip(sorted(place % rank for place in places), spare, strict=False):
        axes.insert(place, axis)
    return replace(tensor, axes="".join(axes))


def _dropout(importer: _Importer, call: _Call) -> _Tensor:
    training = call.optional(2)
    if training is not None and bool(training[1]):
        raise call.origin.refuse("it is in training mode; export the network in evaluation mode")
    return _tensor(call.operands[0], call.origin)


def _softmax(importer: _Importer, call: _Call) -> _Tensor:
    """At the end it is left out, since it changes no order; anything else that reads it refuses it."""
    tensor = _tensor(call.operands[0], call.origin)
    if tensor.axes != "NC" or call.attributes.get("axis", -1) not in (1, -1):
        raise call.origin.refuse(f"of a tensor of shape {list(importer.shape(tensor))}; {END_AT_LOGITS}")
    return replace(tensor, softmax=True)


# Those that work on NCHW or (N, C) and keep the axes.
_HANDLERS: Mapping[str, Callable[[GraphBuilder, _Call], Value]] = {
    "Conv": _conv,
    "MaxPool": _max_pool,
    "GlobalAveragePool": lambda builder, call: builder.global_average_pool(call.tensor(0), call.origin),
    "AveragePool": _average_pool,
    "Resize": _resize,
}
_OF_ANY_LAYOUT: Mapping[str, Callable[[_Importer, _Call], _Operand]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _arithmetic),
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": _cast_like,
    "Clip": _clip,
    "Concat": _concat,
    **dict.fromkeys(("LeakyRelu", "Sigmoid", "Tanh"), _function),
    "Dropout": _dropout,
    "Flatten": _flatten,
    "Gemm": _gemm,
    "Identity": lambda importer, call: _tensor(call.operands[0], call.origin),
    "MatMul": _matmul,
    "Pad": _pad,
    "ReduceMean": _reduce_mean,
    "Relu": _relu,
    "Reshape": _reshape,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
