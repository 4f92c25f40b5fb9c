"""A float Graph from a torch module or an exported program, through ``torch.export``."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .graph import Graph, Pads
from .graph_builder import END_AT_LOGITS, NO_PADS, SCALE_OUTSIDE, Array, GraphBuilder, Origin, UnsupportedLayer, Value
from .preprocess import InputSpec

SUPPORTED = (
    "Conv2d (dense or depthwise), BatchNorm2d, ReLU, MaxPool2d, zero padding before a convolution and minus infinity "
    "before a max pooling, addition, global average pooling, flattening of a 1x1 map, Linear, Dropout, Identity"
)
_REASONS = {
    **dict.fromkeys(("sub", "div", "mul"), SCALE_OUTSIDE),
    **dict.fromkeys(("softmax", "log_softmax"), END_AT_LOGITS),
    "_native_batch_norm_legit": "it uses the statistics of a batch; call eval() before exporting",
    "_native_batch_norm_legit_functional": "it uses the statistics of a batch; call eval() before exporting",
}


def from_torch(
    network: nn.Module | ExportedProgram,
    inputs: InputSpec | tuple[int, int, int, int] | None = None,
    *,
    name: str = "",
) -> Graph:
    """Captures a network in evaluation mode; weights become NHWC float32 constants, nodes keep their module's path.

    ``inputs`` gives the shape of the one image input: an InputSpec, or (N, C, H, W) as torch has it. An exported
    program carries its own shape and needs none; a batch that it leaves open is 1 then. The module itself is left
    unchanged.
    Raises UnsupportedLayer for what the graph cannot say, ValueError where the shape is missing or differs.
    """
    shape = _nchw_shape(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its internals
        if isinstance(network, ExportedProgram):
            program = network
        elif shape is None:
            raise ValueError("from_torch needs the input's shape to export a module")
        else:
            program = _export(network, shape)
        # No operator is broken up; in-place operators are made functional.
        program = program.run_decompositions({})
    return _Importer(program, shape).graph(name or type(network).__name__)


def _nchw_shape(inputs: InputSpec | tuple[int, int, int, int] | None) -> tuple[int, ...] | None:
    if isinstance(inputs, InputSpec):
        n, h, w, c = inputs.shape
        return (n, c, h, w)
    return inputs


def _export(module: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    parameter = next(module.parameters(), None)
    example = torch.zeros(shape, dtype=torch.float32 if parameter is None else parameter.dtype)
    module = copy.deepcopy(module).cpu().eval()
    try:
        return torch.export.export(module, (example,))
    except Exception as error:  # torch.export raises whatever the user's forward and its own tracer raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedLayer("", "torch.export", f"the network cannot be exported: {reason}") from error


_Argument = Any  # of an fx node: a Value, a weight as (name, values), a number, a list of numbers, a string, None
_Weight = tuple[str, Array]


class _Importer:
    """Walks an exported program's nodes in order. ``env`` maps their names to graph tensors and to weights."""

    def __init__(self, program: ExportedProgram, shape: tuple[int, ...] | None) -> None:
        self.program = program
        self.shape = shape
        self.builder = GraphBuilder()
        self.env: dict[str, Value | _Weight | None] = {}
        self.open_batch: dict[Any, int] = {}  # the sympy.Symbol of what the program leaves open, and what it becomes

    def graph(self, name: str) -> Graph:
        """The whole program as a graph."""
        signature = self.program.graph_signature
        specs = {spec.arg.name: spec for spec in signature.input_specs}
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.env[node.name] = self._placeholder(node, specs[node.name])
            elif node.op == "call_function":
                self.env[node.name] = self._call(node)
            elif node.op != "output":
                raise UnsupportedLayer(_module_path(node), str(node.op), "it is no plain operator")
        origin = Origin("", "output", "output")
        outputs = []
        for spec in signature.output_specs:
            if spec.kind == OutputKind.USER_OUTPUT:
                value = self.env.get(getattr(spec.arg, "name", ""))
                if not isinstance(value, Value):
                    raise origin.refuse("an output is a constant; return computed tensors only")
                outputs.append(value)
        return self.builder.graph(name, tuple(outputs), origin)

    def _placeholder(self, node: torch.fx.Node, spec: Any) -> Value | _Weight | None:
        if spec.kind == InputKind.USER_INPUT:
            origin = Origin("", node.name, "input")
            if not isinstance(node.meta.get("val"), Tensor):
                raise origin.refuse("an input that is no tensor; export a network of one image")
            for batch in node.meta["val"].shape[:1]:
                if isinstance(batch, torch.SymInt):
                    self.open_batch = {batch.node.expr: 1 if self.shape is None else self.shape[0]}
            shape = self._static_shape(node, origin)
            if self.shape is not None and shape != self.shape:
                raise ValueError(f"the program takes {list(shape)}, {list(self.shape)} was asked for")
            return self.builder.input(node.name, shape, origin)
        tensor = self.program.state_dict.get(spec.target, self.program.constants.get(spec.target))
        if not isinstance(tensor, Tensor):
            return None
        values = tensor.detach().cpu()
        return spec.target, (values.float() if values.is_floating_point() else values).numpy()

    def _static_shape(self, node: torch.fx.Node, origin: Origin) -> tuple[int, ...]:
        shape = node.meta["val"].shape
        fixed = [size if isinstance(size, int) else size.node.expr.xreplace(self.open_batch) for size in shape]
        if not all(isinstance(size, int) or size.is_Integer for size in fixed):
            raise origin.refuse(f"its shape {list(shape)} is open; export it with only the batch open, or nothing")
        return tuple(int(size) for size in fixed)

    def _call(self, node: torch.fx.Node) -> Value | _Weight | None:
        operator = getattr(node.target, "__name__", str(node.target)).split(".")[0]
        origin = _origin(node, operator)
        if isinstance(node.meta.get("val"), torch.SymInt):
            return None  # part of a shape, which the tensor it becomes has, too
        arguments = [_resolve(argument, self.env) for argument in _arguments(node)]
        first = arguments[0] if arguments else None
        if operator == "getitem":
            if arguments[1] != 0:
                raise origin.refuse("only the first result of an operator can be used")
            return _tensor(first, origin)
        if isinstance(first, tuple) and operator != "addmm":
            return _weight(operator, first, arguments, origin)
        if operator in _RESHAPES:
            return self.builder.reshape(_tensor(first, origin), self._static_shape(node, origin), origin)
        handler = _HANDLERS.get(operator)
        if handler is None:
            raise origin.refuse(_REASONS.get(operator, f"there is no int8 form of it here; supported are {SUPPORTED}"))
        return handler(self.builder, origin, node, arguments)


def _resolve(argument: Any, env: dict[str, Value | _Weight | None]) -> _Argument:
    if isinstance(argument, torch.fx.Node):
        return env[argument.name]
    if isinstance(argument, list | tuple) and any(isinstance(item, torch.fx.Node) for item in argument):
        return [_resolve(item, env) for item in argument]
    return argument


def _arguments(node: torch.fx.Node) -> list[Any]:
    """Positional arguments by the operator's schema, keywords and defaults filled in."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return list(node.args)
    given = list(node.args)
    rest = schema.arguments[len(given) :]
    return given + [node.kwargs.get(argument.name, argument.default_value) for argument in rest]


def _module_path(node: torch.fx.Node) -> str:
    """The innermost module, as ``named_modules`` calls it."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    # Strict export writes L['self'].features._modules['0']; getattr(x, '0') in older versions.
    path = re.sub(r"^L\['self'\]\.?", "", path)
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", path)
    path = re.sub(r"getattr\((.*?), '([^']*)'\)", r"\1.\2", path)
    return path.removeprefix("L['self'].").lstrip(".")


def _origin(node: torch.fx.Node, operator: str) -> Origin:
    """A node is named after its module where that is one of torch's own layers, else after module and operator."""
    path = _module_path(node)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    kind = str(stack[-1][1]) if stack else ""
    layer = re.fullmatch(r"torch\.nn\.modules\.(?!container\b)\w+\.\w+", kind) is not None
    operator = _PLAIN_NAMES.get(operator, operator)
    name = path if layer and path else ".".join(filter(None, (path, operator)))
    return Origin(path, name, f"aten.{operator}")


_PLAIN_NAMES = {
    "_native_batch_norm_legit": "batch_norm",
    "_native_batch_norm_legit_functional": "batch_norm",
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d",
    "max_pool2d_with_indices": "max_pool2d",
    "constant_pad_nd": "pad",
    "convolution": "conv2d",
    "addmm": "linear",
}


def _weight(operator: str, weight: _Weight, arguments: list[_Argument], origin: Origin) -> _Weight:
    """A weight on its way to an operator: it may be transposed, no more."""
    name, values = weight
    if operator == "permute":
        return name, values.transpose(arguments[1])
    if operator in ("t", "transpose") and values.ndim == 2:
        return name, values.T
    if operator in ("clone", "detach", "alias", "contiguous"):
        return weight
    raise origin.refuse(f"{name} is computed from while the network runs; fold it before exporting")


def _pair(value: Any) -> tuple[int, int]:
    """torch's one number for both, or two."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _symmetric(value: Any) -> Pads:
    height, width = _pair(value)
    return height, height, width, width


def _tensor(argument: _Argument, origin: Origin) -> Value:
    if not isinstance(argument, Value):
        raise origin.refuse(f"its operand is {_describe(argument)}, not a tensor that the network computed")
    return argument


def _describe(argument: _Argument) -> str:
    return f"the parameter {argument[0]}" if isinstance(argument, tuple) else repr(argument)


def _as_weight(argument: _Argument, origin: Origin) -> _Weight:
    if not isinstance(argument, tuple):
        raise origin.refuse("its weights are computed while the network runs")
    return argument


def _conv2d(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    x, weight, bias, stride, padding, dilation, groups = arguments
    weight = _as_weight(weight, origin)
    if isinstance(padding, str):
        padding = _string_padding(padding, weight[1].shape[2:], _pair(dilation))
    else:
        padding = _symmetric(padding)
    return builder.conv2d(
        _tensor(x, origin),
        weight,
        None if bias is None else _as_weight(bias, origin),
        strides=_pair(stride),
        padding=padding,
        dilation=_pair(dilation),
        groups=groups,
        origin=origin,
    )


def _string_padding(padding: str, kernel: Sequence[int], dilation: tuple[int, int]) -> Pads:
    """``same`` (stride 1 only, torch sees to it) puts the odd pixel after."""
    if padding == "valid":
        return NO_PADS
    rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2


def _convolution(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    *conv, transposed, _, groups = arguments
    if transposed or len(_as_weight(conv[1], origin)[1].shape) != 4:
        raise origin.refuse("only ordinary two-dimensional convolutions are")
    return _conv2d(builder, origin, node, [*conv, groups])


def _batch_norm(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    x, gamma, beta, mean, variance, *rest = arguments
    if len(rest) == 4 and rest[0]:  # aten.batch_norm: training, momentum, epsilon, cudnn
        raise origin.refuse(_REASONS["_native_batch_norm_legit"])
    if mean is None or variance is None:
        raise origin.refuse("it keeps no running statistics")
    return builder.batch_norm(
        _tensor(x, origin),
        None if gamma is None else _as_weight(gamma, origin),
        None if beta is None else _as_weight(beta, origin),
        _as_weight(mean, origin),
        _as_weight(variance, origin),
        float(rest[2] if len(rest) == 4 else rest[1]),
        origin,
    )


def _relu(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    return builder.relu(_tensor(arguments[0], origin), origin)


def _max_pool(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    x, kernel, stride, padding, dilation, ceil_mode = arguments
    return builder.max_pool(
        _tensor(x, origin),
        kernel=_pair(kernel),
        strides=_pair(stride or kernel),
        padding=_symmetric(padding),
        dilation=_pair(dilation),
        ceil_mode=ceil_mode,
        origin=origin,
    )


def _pad(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    """torch lists pairs from the last dimension backwards: left, right, top, bottom, then channels and batch."""
    x, amounts, *rest = arguments
    mode, value = rest if len(rest) == 2 else ("constant", rest[0])
    if mode != "constant":
        raise origin.refuse(f"padding mode {mode}; only constant padding is")
    if any(amounts[4:]):
        raise origin.refuse("padding of channels or of the batch")
    left, right, top, bottom = (*amounts[:4], 0, 0)[:4]
    return builder.pad(_tensor(x, origin), (top, bottom, left, right), float(value or 0.0), origin)


def _add(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    a, b, alpha = arguments
    if alpha != 1:
        raise origin.refuse(f"with a factor of {alpha}")
    return builder.add(_tensor(a, origin), _tensor(b, origin), origin)


def _mean(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    x, axes = _tensor(arguments[0], origin), arguments[1]
    if len(builder.shape(x)) != 4 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise origin.refuse(f"a mean over dimensions {axes}; only height and width together are")
    return builder.global_average_pool(x, origin)


def _adaptive_pool(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    if _pair(arguments[1]) != (1, 1):
        raise origin.refuse(f"to {list(arguments[1])}; only to 1x1")
    return builder.global_average_pool(_tensor(arguments[0], origin), origin)


def _average_pool(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    """Over the whole map only, where it is the global one."""
    x, kernel, padding = _tensor(arguments[0], origin), _pair(arguments[1]), arguments[3]
    if builder.shape(x)[2:] != kernel or any(_pair(padding)):
        raise origin.refuse(f"window {list(kernel)} on a {builder.shape(x)[2:]} map; only the whole map is")
    return builder.global_average_pool(x, origin)


def _linear(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    x, weight, bias = arguments
    bias = None if bias is None else _as_weight(bias, origin)
    return builder.linear(_tensor(x, origin), _as_weight(weight, origin), bias, origin)


def _addmm(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    bias, x, (name, transposed), *factors = arguments
    if any(factor != 1 for factor in factors):
        raise origin.refuse(f"with factors {factors}")
    return _linear(builder, origin, node, [x, (name, transposed.T), bias])


def _same(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    return _tensor(arguments[0], origin)


def _dropout(builder: GraphBuilder, origin: Origin, node: torch.fx.Node, arguments: list[_Argument]) -> Value:
    if arguments[2]:
        raise origin.refuse("it is in training mode; call eval() before exporting")
    return _tensor(arguments[0], origin)


# The result's shape says all of what they do.
_RESHAPES = frozenset({"view", "_unsafe_view", "reshape", "flatten", "squeeze", "unsqueeze"})
_HANDLERS: dict[str, Callable[[GraphBuilder, Origin, torch.fx.Node, list[_Argument]], Value]] = {
    "conv2d": _conv2d,
    "convolution": _convolution,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _batch_norm,
    "relu": _relu,
    "max_pool2d": _max_pool,
    "max_pool2d_with_indices": _max_pool,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "add": _add,
    "mean": _mean,
    "adaptive_avg_pool2d": _adaptive_pool,
    "_adaptive_avg_pool2d": _adaptive_pool,
    "avg_pool2d": _average_pool,
    "linear": _linear,
    "addmm": _addmm,
    "dropout": _dropout,
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "contiguous": _same,
    "identity": _same,
}
