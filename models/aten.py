"""PyTorch's operators as exported programs hold them, and what they are in a Graph.

``from_torch.py`` makes a Program of one that lives in this process, ``exported_program.py`` of a file; what the
operators mean is said here, once. To add one, write a function from a Call to a Value and name it in ``_LAYERS`` under
each overload that it stands for. It reads its operands by their names in the operator's schema, each with the schema's
default (``torch.ops.aten.conv2d.default._schema`` prints them). What it neither reads nor ignores is refused, so that
no operand is ever dropped unseen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .graph import Graph, Pads
from .graph_builder import END_AT_LOGITS, NO_PADS, Array, GraphBuilder, Origin, Value

SUPPORTED = (
    "Conv2d (dense or depthwise, dilated or not), BatchNorm2d, ReLU, ReLU6, LeakyReLU, clamp, sigmoid, tanh, "
    "MaxPool2d, zero padding before a convolution and minus infinity before a max pooling, addition, multiplication "
    "by a tensor or a gate, concatenation of channels, bilinear and nearest upsampling, average pooling, flattening, "
    "Linear, Dropout, Identity"
)
EVAL = "call model.eval() before torch.export.export"

Size = int | str  # a number, or the expression of a size that the program leaves open
Weight = tuple[str, Array]  # its name in the module, its values in torch's layout


@dataclass(frozen=True)
class Ref:
    """A tensor or a size that the program computes, by its name."""

    name: str


@dataclass(frozen=True)
class Unreadable:
    """Something that no layer takes. Whoever reads it is refused, with the reason."""

    reason: str


# Ref, None, bool, int, float, str, Unreadable or a list of them; once looked up, Value and Weight in place of Ref.
Argument = Any


@dataclass(frozen=True)
class Operation:
    """One call of a program. ``target`` is namespace, operator and overload, such as ``aten.conv2d.default``."""

    target: str
    arguments: Mapping[str, Argument]  # by the schema's names; one that is left out has its default
    results: tuple[str, ...]
    shape: tuple[Size, ...] | None  # of the first result; None where that is a number, or there is none
    path: str  # of its module, as named_modules has it
    is_layer: bool  # whether that module is one of torch.nn's own


@dataclass(frozen=True)
class Program:
    """An exported program without anything of torch's in it. Shapes are torch's, (N, C, H, W)."""

    inputs: tuple[tuple[str, tuple[Size, ...] | None], ...]  # name and shape; None: not a tensor
    weights: Mapping[str, Weight]  # parameters, buffers and constants by the program's own names for them
    operations: tuple[Operation, ...]
    outputs: tuple[str | None, ...]  # None: not a tensor
    changed: tuple[str, ...] = ()  # the parameters and buffers that a run changes


def import_program(
    program: Program, shape: tuple[int, ...] | None, name: str, constants_limit_bytes: int | None = None
) -> Graph:
    """The program as a graph. ``shape``, (N, C, H, W), is what its input must have; an open batch becomes N, or 1.

    ``constants_limit_bytes`` bounds the memory of the graph's constants. Raises UnsupportedLayer for what the graph
    cannot say, ValueError where the shape differs.
    """
    importer = _Importer(program, shape, constants_limit_bytes)
    for operation in program.operations:
        importer.visit(operation)
    return importer.graph(name)


_Known = Value | Weight | Unreadable
_SIZE = Unreadable("one of its operands is a size that is computed while the network runs; export it with fixed sizes")


@dataclass(eq=False)
class _Cell:
    """What one or more names stand for. Operators in place put another value there.

    ``views`` are the cells that may lie in the same memory, this one among them.
    """

    value: _Known
    views: list[_Cell] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.views.append(self)

    def change(self, value: _Known, by: str) -> None:
        """It becomes ``value`` by an operator that works in place; what the others then hold is not followed."""
        for cell in self.views:
            cell.value = Unreadable(f"it reads a tensor after {by} changed another view of it in place")
        self.value = value


class Call:
    """One operation at work: its operands by name, each of its kind or refused with the layer's place."""

    def __init__(
        self,
        builder: GraphBuilder,
        origin: Origin,
        shape: tuple[int, ...] | None,
        operands: dict[str, Argument],
        *,
        on_input: bool = False,
        at_end: bool = False,
    ) -> None:
        self.builder = builder
        self.origin = origin
        self.shape = shape  # of the result
        self.on_input = on_input  # the image itself is its first operand
        self.at_end = at_end  # its result is the network's
        self._operands = operands
        self._unread = set(operands)

    def get(self, name: str, default: Argument = None) -> Argument:
        """As it is."""
        self._unread.discard(name)
        value = self._operands.get(name, default)
        if isinstance(value, Unreadable):
            raise self.origin.refuse(value.reason)
        return value

    def ignore(self, *names: str) -> None:
        """Operands that do not matter to the result."""
        self._unread.difference_update(names)

    def finish(self) -> None:
        """Raises UnsupportedLayer where something has not been read."""
        for name in sorted(self._unread):
            raise self.origin.refuse(f"its operand {name or 'without a name'} has no meaning here")

    def tensor(self, name: str) -> Value:
        """What the network computed."""
        value = self.get(name)
        if not isinstance(value, Value):
            raise self.origin.refuse(f"its operand is {_describe(value)}, not a tensor that the network computed")
        return value

    def weight(self, name: str, rank: int) -> Weight:
        """A parameter, buffer or constant with ``rank`` dimensions."""
        value = self.get(name)
        if not isinstance(value, tuple):
            raise self.origin.refuse("its weights are computed while the network runs")
        if value[1].ndim != rank:
            raise self.origin.refuse(f"{value[0]} has {value[1].ndim} dimensions; {rank} are needed")
        return value

    def optional_weight(self, name: str, rank: int) -> Weight | None:
        """The same, or None where there is none."""
        return None if self.get(name) is None else self.weight(name, rank)

    def integers(self, name: str, default: Sequence[int] | None = None) -> list[int]:
        """One or more whole numbers."""
        value = self.get(name, default)
        values = list(value) if isinstance(value, list | tuple) else [value]
        if not all(isinstance(each, int) and not isinstance(each, bool) for each in values):
            raise self._wrong(name, value)
        return values

    def pair(self, name: str, default: int | None = None) -> tuple[int, int]:
        """Of height and width; torch writes one number for both, or two."""
        values = self.integers(name, None if default is None else (default,))
        if not 1 <= len(values) <= 2:
            raise self._wrong(name, values)
        return values[0], values[-1]

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        values = self.integers(name, None if default is None else (default,))
        if len(values) != 1:
            raise self._wrong(name, values)
        return values[0]

    def number(self, name: str, default: float | None = None) -> float:
        """A number."""
        value = self.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._wrong(name, value)
        return float(value)

    def flag(self, name: str, default: bool | None = None) -> bool:
        """True or False."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, value)
        return value

    def _wrong(self, name: str, value: Argument) -> Exception:
        return self.origin.refuse(f"its operand {name} is {_describe(value)}")


def _describe(value: Argument) -> str:
    if isinstance(value, Value):
        return "a tensor that the network computed"
    return f"the parameter {value[0]}" if isinstance(value, tuple) else repr(value)[:80]


class _Importer:
    """Walks a program's operations in order. ``env`` says what its names stand for."""

    def __init__(self, program: Program, shape: tuple[int, ...] | None, constants_limit_bytes: int | None) -> None:
        self.program = program
        self.builder = GraphBuilder(constants_limit_bytes)
        self.env: dict[str, _Cell] = {}
        self.images: list[Value] = []  # the inputs
        self.open_batch: dict[Size, int] = {}  # what the program leaves open, and what it becomes
        if program.changed:
            raise Origin("", program.changed[0], "output").refuse(
                f"the network changes {program.changed[0]} while it runs, as training does; {EVAL}"
            )
        for weight_name, weight in program.weights.items():
            self._define(weight_name, _Cell(weight))
        for input_name, sizes in program.inputs:
            self._input(input_name, sizes, shape)

    def graph(self, name: str) -> Graph:
        """What has been visited."""
        origin = Origin("", "output", "output")
        outputs = []
        for output in self.program.outputs:
            value = self.env[output].value if output in self.env else None
            if isinstance(value, Unreadable):
                raise origin.refuse(value.reason)
            if not isinstance(value, Value):
                raise origin.refuse("an output is a constant; return computed tensors only")
            outputs.append(value)
        return self.builder.graph(name, tuple(outputs), origin)

    def visit(self, operation: Operation) -> None:
        """Adds what one operation means."""
        origin = _origin(operation)
        if operation.target in _CHECKS:
            return
        if operation.results and operation.shape is None:
            for name in operation.results:  # parts of a shape, which the tensor that gets it has, too
                self._define(name, _Cell(_SIZE))
            return
        plain, in_place = _functional(operation.target)
        operands = {name: self._resolve(value, origin) for name, value in operation.arguments.items()}
        call = Call(
            self.builder,
            origin,
            self._static(operation.shape, origin, plain),
            operands,
            on_input=operands.get("self") in self.images,
            at_end=not {*operation.results}.isdisjoint(self.program.outputs),
        )
        value = self._compute(plain, in_place, call)
        if not operation.results:
            raise origin.refuse("it makes no tensor")
        cell, first = _Cell(value), self._first(operation)
        if first is not None and (in_place or plain in _SAME_TENSOR):
            if in_place:
                first.change(value, origin.operator)
            cell = first
        elif first is not None and plain in _VIEWS:
            first.views.append(cell)
            cell.views = first.views
        self._define(operation.results[0], cell)
        for name in operation.results[1:]:
            self._define(name, _Cell(Unreadable("only the first result of an operator can be used")))

    def _compute(self, target: str, in_place: bool, call: Call) -> Value | Weight:
        origin, first = call.origin, call.get("self")
        if isinstance(first, tuple) and target != "aten.addmm.default":
            if in_place and target not in _WEIGHTS:
                raise origin.refuse(f"it changes {first[0]} while the network runs, as training does; {EVAL}")
            if target not in _WEIGHTS:
                raise origin.refuse(f"{first[0]} is computed from while the network runs; fold it before exporting")
            value: Value | Weight = (first[0], _WEIGHTS[target](call, first[1]))
        elif target in _LAYERS:
            value = _LAYERS[target](call)
        else:
            raise origin.refuse(_reason(target, call))
        call.finish()
        return value

    def _define(self, name: str, cell: _Cell) -> None:
        if name in self.env:
            raise Origin("", name, "output").refuse("two results have this name; export the network again")
        self.env[name] = cell

    def _input(self, name: str, sizes: tuple[Size, ...] | None, wanted: tuple[int, ...] | None) -> None:
        origin = Origin("", name, "input")
        if sizes is None:
            raise origin.refuse("an input that is no tensor; export a network of one image")
        if sizes and isinstance(sizes[0], str):
            self.open_batch = {sizes[0]: 1 if wanted is None else wanted[0]}
        shape = self._fixed(sizes, origin)
        if wanted is not None and shape != wanted:
            raise ValueError(f"the program takes {list(shape)}, {list(wanted)} was asked for")
        self.images.append(self.builder.input(name, shape, origin))
        self._define(name, _Cell(self.images[-1]))

    def _static(self, sizes: tuple[Size, ...] | None, origin: Origin, target: str) -> tuple[int, ...] | None:
        """The result's shape where the operator is told by it alone."""
        return self._fixed(sizes, origin) if sizes is not None and target in _RESHAPES else None

    def _fixed(self, sizes: Iterable[Size], origin: Origin) -> tuple[int, ...]:
        shape = tuple(self.open_batch.get(size, size) for size in sizes)
        fixed = tuple(size for size in shape if isinstance(size, int))
        if len(fixed) != len(shape):
            raise origin.refuse(
                f"its shape [{', '.join(str(size)[:80] for size in shape)}] is open; "
                "export it with only the batch open, or nothing"
            )
        return fixed

    def _resolve(self, argument: Argument, origin: Origin) -> Argument:
        if isinstance(argument, Ref):
            if argument.name not in self.env:
                raise origin.refuse(f"nothing makes its operand {argument.name}; export the network again")
            return self.env[argument.name].value
        if isinstance(argument, list | tuple):
            items = [self._resolve(item, origin) for item in argument]
            # A list of which a size is open: whoever reads it is refused.
            return next((item for item in items if isinstance(item, Unreadable)), items)
        return argument

    def _first(self, operation: Operation) -> _Cell | None:
        """Where the operator's own tensor lies."""
        for name in ("self", "input"):
            first = operation.arguments.get(name)
            if isinstance(first, Ref):
                return self.env[first.name]
        return None


def module_path(place: str) -> str:
    """Of a module, as ``named_modules`` has it, by what an exported program calls it."""
    # Strict export writes L['self'].features._modules['0']; getattr(L['self'].features, '0') in older versions.
    path = re.sub(r"\._modules\['([^']*)'\]", r".\1", place)
    path = re.sub(r"getattr\(([^(),]*), '([^']*)'\)", r"\1.\2", path)
    return re.sub(r"^L\['\w+'\]", "", path).lstrip(".")


def is_torch_layer(kind: str) -> bool:
    """Whether a class is a layer of torch.nn, and no container of layers."""
    return re.fullmatch(r"torch\.nn\.modules\.(?!container\b)\w+\.\w+", kind) is not None


def _functional(target: str) -> tuple[str, bool]:
    """``aten.relu_.default`` is ``aten.relu.default`` in place."""
    plain = re.sub(r"(?<=[a-z0-9])_(?=\.\w+$)", "", target)
    return plain, plain != target


def _origin(operation: Operation) -> Origin:
    """A node is named after its module where that is one of torch's own layers, else after module and operator."""
    plain, _ = _functional(operation.target)
    if not (match := _ATEN.fullmatch(plain)):
        return Origin(operation.path, operation.target, operation.target)
    operator = _PLAIN_NAMES.get(match[1], match[1])
    layer = operation.is_layer and operation.path
    name = operation.path if layer else ".".join(filter(None, (operation.path, operator)))
    return Origin(operation.path, name, f"aten.{operator}")


_ATEN = re.compile(r"aten\.(\w+)\.\w+")


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
_BATCH_STATISTICS = f"it uses the statistics of a batch; {EVAL}"
_REASONS = {
    **dict.fromkeys(("softmax", "_softmax", "log_softmax", "_log_softmax", "argmax"), END_AT_LOGITS),
    "_native_batch_norm_legit": _BATCH_STATISTICS,
    "_native_batch_norm_legit_functional": _BATCH_STATISTICS,
}


# On the network's input they prepare pixels; behind its last layer they turn logits into something else.
_IN_FRONT = frozenset({"sub", "rsub", "div", "mul", "add", "to", "_to_copy"})
_PREPARED = (
    "it prepares pixels; export the network without it and give --preprocessing FILE, "
    "which says mean and std in units of pixel / 255"
)
_AT_THE_END = frozenset({"gt", "ge"})


def _reason(target: str, call: Call) -> str:
    """Why there is no layer for it, and what to do."""
    if "higher_order" in target:
        return "it calls another graph; save program.run_decompositions({}) instead of the program"
    name = match[1] if (match := _ATEN.fullmatch(target)) else ""
    if name in _IN_FRONT and _prepares(call):
        return _PREPARED
    if call.at_end and name in _AT_THE_END:
        return "end the network at its logits, and apply this to what it gives"
    return _REASONS.get(name, f"there is no int8 form of it here; supported are {SUPPORTED}")


def _prepares(call: Call) -> bool:
    """Whether it takes the image and a constant."""
    return call.on_input and not isinstance(call.get("other"), Value)


def _conv2d(call: Call) -> Value:
    weight, dilation = call.weight("weight", 4), call.pair("dilation", 1)
    padding = call.get("padding", 0)
    return call.builder.conv2d(
        call.tensor("input"),
        weight,
        call.optional_weight("bias", 1),
        strides=call.pair("stride", 1),
        padding=(
            _string_padding(padding, weight[1].shape[2:], dilation, call.origin)
            if isinstance(padding, str)
            else _symmetric(call.pair("padding", 0))
        ),
        dilation=dilation,
        groups=call.integer("groups", 1),
        origin=call.origin,
    )


def _symmetric(pads: tuple[int, int]) -> Pads:
    height, width = pads
    return height, height, width, width


def _string_padding(padding: str, kernel: Sequence[int], dilation: tuple[int, int], origin: Origin) -> Pads:
    """``same`` (stride 1 only, torch sees to it) puts the odd pixel after."""
    if padding == "valid":
        return NO_PADS
    if padding != "same":
        raise origin.refuse(f"its padding is {padding[:80]!r}")
    rows, columns = (d * (k - 1) for d, k in zip(dilation, kernel, strict=True))
    return rows // 2, rows - rows // 2, columns // 2, columns - columns // 2


def _convolution(call: Call) -> Value:
    if call.flag("transposed") or any(call.integers("output_padding")):
        raise call.origin.refuse("only ordinary two-dimensional convolutions are")
    return _conv2d(call)


def _batch_norm(call: Call) -> Value:
    statistics = [call.optional_weight(name, 1) for name in ("running_mean", "running_var")]
    mean, variance = statistics
    if mean is None or variance is None:
        raise call.origin.refuse("it keeps no running statistics, so that each batch would have its own")
    if call.flag("training", False):
        raise call.origin.refuse(_BATCH_STATISTICS)
    call.ignore("momentum", "cudnn_enabled")
    gamma, beta = call.optional_weight("weight", 1), call.optional_weight("bias", 1)
    return call.builder.batch_norm(call.tensor("input"), gamma, beta, mean, variance, call.number("eps"), call.origin)


def _relu(call: Call) -> Value:
    return call.builder.relu(call.tensor("self"), call.origin)


def _max_pool(call: Call) -> Value:
    kernel = call.pair("kernel_size")
    strides = kernel if call.get("stride") in (None, []) else call.pair("stride")
    return call.builder.max_pool(
        call.tensor("self"),
        kernel=kernel,
        strides=strides,
        padding=_symmetric(call.pair("padding", 0)),
        dilation=call.pair("dilation", 1),
        ceil_mode=call.flag("ceil_mode", False),
        origin=call.origin,
    )


def _pad(call: Call) -> Value:
    """torch lists pairs from the last dimension backwards: left, right, top, bottom, then channels and batch."""
    amounts, mode = call.integers("pad"), call.get("mode", "constant")
    if mode != "constant":
        raise call.origin.refuse(f"padding mode {str(mode)[:80]}; only constant padding is")
    if any(amounts[4:]):
        raise call.origin.refuse("padding of channels or of the batch")
    left, right, top, bottom = (*amounts[:4], 0, 0, 0, 0)[:4]
    value = 0.0 if call.get("value") is None else call.number("value")
    return call.builder.pad(call.tensor("self"), (top, bottom, left, right), value, call.origin)


def _add(call: Call) -> Value:
    if _prepares(call):
        raise call.origin.refuse(_PREPARED)
    if (alpha := call.number("alpha", 1)) != 1:
        raise call.origin.refuse(f"with a factor of {alpha:g}")
    return call.builder.add(call.tensor("self"), call.tensor("other"), call.origin)


def _mean(call: Call) -> Value:
    x, axes = call.tensor("self"), call.get("dim") and call.integers("dim")
    if len(call.builder.shape(x)) != 4 or sorted(axis % 4 for axis in axes or ()) != [2, 3]:
        raise call.origin.refuse(f"a mean over dimensions {axes}; only height and width together are")
    if call.get("dtype") is not None:
        raise call.origin.refuse("in a number format of its own")
    call.ignore("keepdim")  # (N, C, 1, 1) and (N, C) are one
    return call.builder.global_average_pool(x, call.origin)


def _adaptive_pool(call: Call) -> Value:
    """To one pixel, or in windows of one size."""
    x, size = call.tensor("self"), call.pair("output_size")
    if size == (1, 1):
        return call.builder.global_average_pool(x, call.origin)
    height, width = (*call.builder.shape(x)[2:], 1, 1)[:2]
    if min(size) < 1 or height % size[0] or width % size[1]:
        raise call.origin.refuse(f"to {list(size)}; only to 1x1, or to whole parts of its {height}x{width} map")
    window = height // size[0], width // size[1]
    return call.builder.average_pool(
        x, kernel=window, strides=window, padding=NO_PADS, ceil_mode=False, count_padding=True, origin=call.origin
    )


def _average_pool(call: Call) -> Value:
    kernel = call.pair("kernel_size")
    strides = kernel if call.get("stride") in (None, []) else call.pair("stride")
    if call.get("divisor_override") is not None:
        raise call.origin.refuse("with a divisor of its own")
    return call.builder.average_pool(
        call.tensor("self"),
        kernel=kernel,
        strides=strides,
        padding=_symmetric(call.pair("padding", 0)),
        ceil_mode=call.flag("ceil_mode", False),
        count_padding=call.flag("count_include_pad", True),
        origin=call.origin,
    )


def _cat(call: Call) -> Value:
    tensors = call.get("tensors")
    if not isinstance(tensors, list) or not all(isinstance(each, Value) for each in tensors):
        raise call.origin.refuse("it joins something that the network does not compute")
    return call.builder.concatenate(tensors, call.integer("dim", 0), call.origin)


def _multiply(call: Call) -> Value:
    x, other = call.tensor("self"), call.get("other")
    if not isinstance(other, Value):
        raise call.origin.refuse(_reason("aten.mul.Tensor", call))
    return call.builder.multiply(x, other, call.origin)


def _sigmoid(call: Call) -> Value:
    return call.builder.sigmoid(call.tensor("self"), call.origin)


def _tanh(call: Call) -> Value:
    return call.builder.tanh(call.tensor("self"), call.origin)


def _leaky_relu(call: Call) -> Value:
    return call.builder.leaky_relu(call.tensor("self"), call.number("negative_slope", 0.01), call.origin)


def _hardtanh(call: Call) -> Value:
    limits = call.number("min_val", -1), call.number("max_val", 1)
    return call.builder.clip(call.tensor("self"), *limits, call.origin)


def _relu6(call: Call) -> Value:
    return call.builder.clip(call.tensor("self"), 0.0, 6.0, call.origin)


def _clamp(call: Call) -> Value:
    low, high = (None if call.get(name) is None else call.number(name) for name in ("min", "max"))
    return call.builder.clip(call.tensor("self"), low, high, call.origin)


def _bilinear(call: Call) -> Value:
    return _upsampled(call, "bilinear", "align corners" if call.flag("align_corners") else "half pixel")


def _nearest(call: Call) -> Value:
    """Source of the positions: ``nearest_idx`` in aten/src/ATen/native/UpSample.h."""
    return _upsampled(call, "nearest", "legacy")


def _nearest_exact(call: Call) -> Value:
    return _upsampled(call, "nearest", "half pixel")


def _upsampled(call: Call, method: str, coordinates: str) -> Value:
    """To a size. torch computes positions by its factors where they are given: they must be those of the sizes."""
    x = call.tensor("input" if call.get("input") is not None else "self")
    factors = call.get("scale_factors")
    if factors is None:
        each = [call.get("scales_h"), call.get("scales_w")]
        factors = None if each == [None, None] else each
    size = None if call.get("output_size") is None else call.pair("output_size")
    if factors is None:
        if size is None:
            raise call.origin.refuse("neither a size nor a factor is given; export it with one")
        return call.builder.resize(x, size, method, coordinates, call.origin)
    if not all(isinstance(f, int | float) for f in factors) or len(factors) != 2:
        raise call.origin.refuse(f"by factors {str(factors)[:80]}; height and width have one each")
    result = call.builder.scaled_resize(x, factors, method, coordinates, call.origin)
    if size is not None and (*call.builder.shape(result)[2:], 1, 1)[:2] != size:
        raise call.origin.refuse(f"its factors {list(factors)} do not give its size {list(size)}; export it with one")
    return result


def _linear(call: Call) -> Value:
    weight, bias = call.weight("weight", 2), call.optional_weight("bias", 1)
    return call.builder.linear(call.tensor("input"), weight, bias, call.origin)


def _addmm(call: Call) -> Value:
    if factors := [f for f in (call.number("beta", 1), call.number("alpha", 1)) if f != 1]:
        raise call.origin.refuse(f"with factors {factors}")
    name, transposed = call.weight("mat2", 2)
    return call.builder.linear(call.tensor("mat1"), (name, transposed.T), call.weight("self", 1), call.origin)


def _mm(call: Call) -> Value:
    name, transposed = call.weight("mat2", 2)
    return call.builder.linear(call.tensor("self"), (name, transposed.T), None, call.origin)


def _reshape(call: Call) -> Value:
    """The result's shape says all of what it does."""
    return call.builder.reshape(call.tensor("self"), _result_shape(call), call.origin)


def _result_shape(call: Call) -> tuple[int, ...]:
    call.ignore("size", "shape", "dim", "start_dim", "end_dim")
    if call.shape is None:
        raise call.origin.refuse("the program does not say the shape of its result; export it again")
    return call.shape


def _same(call: Call) -> Value:
    call.ignore("memory_format")
    return call.tensor("self")


def _dropout(call: Call) -> Value:
    if call.flag("train"):
        raise call.origin.refuse(f"it is in training mode; {EVAL}")
    call.ignore("p")
    return call.tensor("input")


_RESHAPES = frozenset(
    {
        *("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.flatten.using_ints"),
        *("aten.squeeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.unsqueeze.default"),
    }
)
_LAYERS: dict[str, Callable[[Call], Value]] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    "aten.conv2d.default": _conv2d,
    "aten.conv2d.padding": _conv2d,
    "aten.convolution.default": _convolution,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.relu.default": _relu,
    "aten.relu6.default": _relu6,
    "aten.hardtanh.default": _hardtanh,
    "aten.clamp.default": _clamp,
    "aten.clamp_min.default": _clamp,
    "aten.leaky_relu.default": _leaky_relu,
    "aten.sigmoid.default": _sigmoid,
    "aten.tanh.default": _tanh,
    "aten.mul.Tensor": _multiply,
    "aten.cat.default": _cat,
    "aten.upsample_bilinear2d.vec": _bilinear,
    "aten.upsample_bilinear2d.default": _bilinear,
    "aten.upsample_nearest2d.vec": _nearest,
    "aten.upsample_nearest2d.default": _nearest,
    "aten._upsample_nearest_exact2d.vec": _nearest_exact,
    "aten._upsample_nearest_exact2d.default": _nearest_exact,
    "aten.max_pool2d.default": _max_pool,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.pad.default": _pad,
    "aten.constant_pad_nd.default": _pad,
    "aten.add.Tensor": _add,
    "aten.mean.dim": _mean,
    "aten.adaptive_avg_pool2d.default": _adaptive_pool,
    "aten._adaptive_avg_pool2d.default": _adaptive_pool,
    "aten.avg_pool2d.default": _average_pool,
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.mm.default": _mm,
    "aten.dropout.default": _dropout,
    "aten.feature_dropout.default": _dropout,
    "aten.clone.default": _same,
    "aten.detach.default": _same,
    "aten.alias.default": _same,
    "aten.contiguous.default": _same,
}
# Whose result is the tensor they were given, and whose result may lie in its memory.
_SAME_TENSOR = frozenset(
    {"aten.detach.default", "aten.alias.default", "aten.dropout.default", "aten.feature_dropout.default"}
)
_VIEWS = _RESHAPES | {"aten.contiguous.default"}
# They look at what a program's input is, and compute nothing.
_CHECKS = frozenset({"aten._assert_tensor_metadata.default", "aten._assert_scalar.default"})


def _permuted(call: Call, values: Array) -> Array:
    dims = call.integers("dims")
    if sorted(dim % max(values.ndim, 1) for dim in dims) != list(range(values.ndim)):
        raise call.origin.refuse(f"it permutes {values.ndim} dimensions by {dims[:8]}")
    return values.transpose(dims)


def _swapped(call: Call, values: Array) -> Array:
    dims = call.integer("dim0"), call.integer("dim1")
    if not all(-values.ndim <= dim < values.ndim for dim in dims):
        raise call.origin.refuse(f"it swaps dimensions {list(dims)} of {values.ndim}")
    return values.swapaxes(*dims)


def _transposed(call: Call, values: Array) -> Array:
    if values.ndim > 2:
        raise call.origin.refuse(f"it transposes a weight of {values.ndim} dimensions")
    return values.T


def _reshaped(call: Call, values: Array) -> Array:
    shape = _result_shape(call)
    if math.prod(shape) != values.size or min(shape, default=1) < 0:
        raise call.origin.refuse(f"it reshapes {list(values.shape)} to {list(shape)}")
    return values.reshape(shape)


def _kept(call: Call, values: Array) -> Array:
    call.ignore("memory_format")
    return values


# A weight on its way to an operator: it may be laid out otherwise, no more.
_WEIGHTS: dict[str, Callable[[Call, Array], Array]] = {
    **dict.fromkeys(_RESHAPES, _reshaped),
    "aten.permute.default": _permuted,
    "aten.t.default": _transposed,
    "aten.transpose.int": _swapped,
    "aten.clone.default": _kept,
    "aten.detach.default": _kept,
    "aten.alias.default": _kept,
    "aten.contiguous.default": _kept,
    "aten.lift_fresh.default": _kept,
    "aten.lift_fresh_copy.default": _kept,
}
