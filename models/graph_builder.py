"""Builds a Graph from a network written in NCHW: what the torch and the ONNX front ends share.

The front ends read their formats; this file knows which layers the graph can say, moves weights into its layouts,
merges padding into the operator that follows, and refuses the rest with the layer's place and the reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import graph as ir

Array = NDArray[np.generic]
NO_PADS: ir.Pads = (0, 0, 0, 0)
MAX_ELEMENTS, MAX_NODES = 1 << 28, 1 << 14  # no network of images has more; a small file can ask for any
# Of operators that the graph has not, in either framework: what to do.
END_AT_LOGITS = "end the network at its logits: the class of the largest is the same"


class UnsupportedLayer(ValueError):
    """A layer that the graph cannot say. ``path`` is its place in the network, ``operator`` what it computes; ``file``
    is named where the network was read from one.
    """

    def __init__(self, path: str, operator: str, reason: str, file: str | Path = "") -> None:
        where = f"{file and f'{file}: '}layer {path or '(the network itself)'}"
        super().__init__(f"{where}, operator {operator}, is not supported: {reason}")
        self.path = path
        self.operator = operator
        self.reason = reason
        self.file = file


@dataclass(frozen=True)
class Origin:
    """Where a node comes from: its module path, the name it should bear, the operator as its own framework calls it."""

    path: str
    name: str
    operator: str

    def refuse(self, reason: str) -> UnsupportedLayer:
        """The error to raise."""
        return UnsupportedLayer(self.path, self.operator, reason)


@dataclass(frozen=True)
class Value:
    """A tensor of the graph, with a border of ``pad_value`` that no operator has taken up yet."""

    name: str
    pads: ir.Pads = NO_PADS
    pad_value: float = 0.0
    pad_origin: Origin | None = None
    flat: tuple[int, int, int] | None = None  # the map (C, H, W) that it flattens, where that is not the graph's order


class GraphBuilder:
    """Collects nodes and constants. Shapes in and out are NCHW; a pooled (N, C, 1, 1) and (N, C) are one tensor.

    Constants of more than ``constants_limit_bytes`` together are refused: a small file can ask for many large ones.
    """

    def __init__(self, constants_limit_bytes: int | None = None) -> None:
        self._bytes_left = constants_limit_bytes
        self._numbers: dict[str, int] = {}  # the last that was put behind a name
        self._nodes: list[ir.Node] = []
        self._types: dict[str, ir.TensorType] = {}
        self._constants: dict[str, ir.Constant] = {}
        self._squashed: dict[str, Origin] = {}  # where sigmoids and tanhs come from

    def graph(self, name: str, outputs: tuple[Value, ...], origin: Origin) -> ir.Graph:
        """The finished graph."""
        names = tuple(self._plain(value, origin).name for value in outputs)
        for output in names:
            self._check_end(output)
        inputs = [node for node in self._nodes if isinstance(node.op, ir.Input)]
        rest = [node for node in self._nodes if not isinstance(node.op, ir.Input)]
        return ir.Graph(name, (), self._constants, names).with_nodes((*inputs, *rest))

    def _check_end(self, name: str) -> None:
        """Raises UnsupportedLayer where an output is a sigmoid's or tanh's, whatever moves its values afterwards."""
        nodes = {node.name: node for node in self._nodes}
        while isinstance(nodes[name].op, _MOVES) or self._is_mean_of_one(nodes[name]):
            name = nodes[name].inputs[0]
        if name in self._squashed:
            raise self._squashed[name].refuse("end the network at its logits, and apply this to what it gives")

    def _is_mean_of_one(self, node: ir.Node) -> bool:
        return isinstance(node.op, ir.GlobalAveragePool) and self._types[node.inputs[0]].shape[1:3] == (1, 1)

    def input(self, name: str, shape: tuple[int, ...], origin: Origin) -> Value:
        """``shape`` (N, C, H, W) or (N, C)."""
        if len(shape) not in (2, 4) or min(shape) < 1:
            raise origin.refuse(f"an input of shape {list(shape)}; images are (N, C, H, W)")
        return self._add(ir.Input(), (), _nhwc(shape), replace(origin, name=name))

    def shape(self, value: Value) -> tuple[int, ...]:
        """NCHW or (N, C), pending padding included."""
        shape = self._types[value.name].shape
        if len(shape) != 4:
            return shape
        n, h, w, c = shape
        top, bottom, left, right = value.pads
        return (n, c, h + top + bottom, w + left + right)

    def conv2d(
        self,
        x: Value,
        weights: tuple[str, Array],
        bias: tuple[str, Array] | None,
        *,
        strides: tuple[int, int],
        padding: ir.Pads,
        dilation: tuple[int, int],
        groups: int,
        origin: Origin,
    ) -> Value:
        """``weights`` (O, I / groups, KH, KW) and ``bias`` (O,) with their names."""
        name, w = weights
        out_channels, per_group, kh, kw = w.shape
        if min(dilation) < 1:
            raise origin.refuse(f"dilation {list(dilation)}; it must be at least 1")
        dilation = (dilation[0] if kh > 1 else 1, dilation[1] if kw > 1 else 1)
        shape = self._types[x.name].shape
        if len(shape) == 2:
            return self._conv_of_pooled(x, weights, bias, padding, groups, origin)
        channels = shape[3]
        if channels != per_group * groups:
            raise origin.refuse(f"weights for {per_group * groups} channels on an input of {channels}")
        pads = self._take_padding(x, padding, 0.0, origin)
        size = self._window_output(shape, (kh, kw), strides, pads, origin, dilation)
        op: ir.Op
        if groups == 1:
            op, data = ir.Conv2d(strides, pads, dilation=dilation), w.transpose(0, 2, 3, 1)
        elif groups == channels == out_channels:
            op, data = ir.DepthwiseConv2d(strides, pads, dilation=dilation), w[:, 0].transpose(1, 2, 0)
        else:
            raise origin.refuse(
                f"{groups} groups from {channels} to {out_channels} channels; groups must be 1 (dense) "
                "or equal the input's and the output's channels (depthwise)"
            )
        constants = (self._constant(name, data, origin), self._bias(bias, out_channels, origin))
        return self._add(op, (x.name, *constants), (shape[0], *size, out_channels), origin)

    def _conv_of_pooled(
        self,
        x: Value,
        weights: tuple[str, Array],
        bias: tuple[str, Array] | None,
        padding: ir.Pads,
        groups: int,
        origin: Origin,
    ) -> Value:
        """A 1x1 convolution of a pooled (N, C, 1, 1) is a fully connected layer."""
        name, w = weights
        if groups != 1 or w.shape[2:] != (1, 1) or any(padding):
            raise origin.refuse("on a 1x1 map only dense, unpadded 1x1 convolutions are")
        return self.linear(x, (name, w[:, :, 0, 0]), bias, origin)

    def linear(self, x: Value, weights: tuple[str, Array], bias: tuple[str, Array] | None, origin: Origin) -> Value:
        """``weights`` (O, I)."""
        name, w = weights
        if x.flat is not None and w.shape[1] == math.prod(x.flat):
            w = w.reshape(-1, *x.flat).transpose(0, 2, 3, 1).reshape(w.shape)
            x = replace(x, flat=None)
        shape = self._types[self._plain(x, origin).name].shape
        if len(shape) != 2:
            raise origin.refuse(f"on a tensor of shape {list(self.shape(x))}; pool it to (N, C) first")
        if shape[1] != w.shape[1]:
            raise origin.refuse(f"weights for {w.shape[1]} channels on an input of {shape[1]}")
        constants = (self._constant(name, w, origin), self._bias(bias, w.shape[0], origin))
        return self._add(ir.FullyConnected(), (x.name, *constants), (shape[0], w.shape[0]), origin)

    def batch_norm(
        self,
        x: Value,
        gamma: tuple[str, Array] | None,
        beta: tuple[str, Array] | None,
        mean: tuple[str, Array],
        variance: tuple[str, Array],
        epsilon: float,
        origin: Origin,
    ) -> Value:
        """Over the channels, with the stored statistics."""
        shape = self._types[self._plain(x, origin).name].shape
        ones, zeros = np.ones(shape[-1], np.float32), np.zeros(shape[-1], np.float32)
        named = (gamma or (f"{origin.name}.gamma", ones), beta or (f"{origin.name}.beta", zeros), mean, variance)
        if any(data.shape != ones.shape for _, data in named):
            raise origin.refuse(f"parameters of shape {list(mean[1].shape)} on an input of {shape[-1]} channels")
        constants = tuple(self._constant(*pair, origin) for pair in named)
        return self._add(ir.BatchNorm(epsilon), (x.name, *constants), shape, origin)

    def relu(self, x: Value, origin: Origin) -> Value:
        """max(x, 0)."""
        return self._elementwise(ir.Relu(), x, origin)

    def sigmoid(self, x: Value, origin: Origin) -> Value:
        """Inside a network; ``graph`` refuses one at its end."""
        return self._squash("sigmoid", x, origin)

    def tanh(self, x: Value, origin: Origin) -> Value:
        """Likewise."""
        return self._squash("tanh", x, origin)

    def leaky_relu(self, x: Value, slope: float, origin: Origin) -> Value:
        """x, or below zero slope * x."""
        if slope == 0:
            return self.relu(x, origin)
        if not 0 < slope < 1:
            raise origin.refuse(f"with a slope of {slope:g}; slopes from 0 to 1 are: train it with one, or with a ReLU")
        return self._elementwise(ir.Lookup("leaky_relu", (slope,)), x, origin)

    def clip(self, x: Value, low: float | None, high: float | None, origin: Origin) -> Value:
        """min(max(x, low), high); None and infinity: no end. The range must hold zero."""
        low, high = (-math.inf if low is None else low), (math.inf if high is None else high)
        if low == 0 and high >= np.finfo(np.float32).max:
            return self.relu(x, origin)
        if not (-math.inf < low <= 0 <= high < math.inf and low < high):
            raise origin.refuse(
                f"to {low:g} and {high:g}; a finite range that holds zero, as ReLU6's, is, or a ReLU from 0 without end"
            )
        return self._elementwise(ir.Lookup("clip", (low, high)), x, origin)

    def _squash(self, function: str, x: Value, origin: Origin) -> Value:
        result = self._elementwise(ir.Lookup(function), x, origin)
        self._squashed[result.name] = origin
        return result

    def _elementwise(self, op: ir.Op, x: Value, origin: Origin) -> Value:
        """The order of a flattened map does not matter to it."""
        name = self._plain(replace(x, flat=None), origin).name
        return replace(self._add(op, (name,), self._types[name].shape, origin), flat=x.flat)

    def multiply(self, a: Value, b: Value, origin: Origin) -> Value:
        """Of equal shapes, or of a map and a gate for each of its channels, (N, C) or (N, C, 1, 1), in either order."""
        shapes = [self.shape(self._plain(x, origin)) for x in (a, b)]
        if shapes[0] != shapes[1]:
            x, gate = (a, b) if math.prod(shapes[0]) >= math.prod(shapes[1]) else (b, a)
            wanted = self.shape(x)[:2]
            have = self.shape(gate)
            if len(self.shape(x)) != 4 or have[:2] != wanted or have[2:] not in ((), (1, 1)):
                raise origin.refuse(
                    f"of shapes {list(shapes[0])} and {list(shapes[1])}; "
                    "tensors of equal shape, or a map and one number for each of its channels, are"
                )
            a, b = x, self._reshaped(gate, wanted[1:], origin)
        shape = self._types[a.name].shape
        return self._add(ir.Multiply(), (a.name, b.name), shape, origin)

    def concatenate(self, values: Sequence[Value], axis: int, origin: Origin) -> Value:
        """Along the channels: ``axis`` of NCHW must be 1, or count back to it."""
        shapes = [self.shape(self._plain(x, origin)) for x in values]
        rank = max(map(len, shapes), default=0)
        if rank == 4:
            values = [self._as_map(x, origin) for x in values]
            shapes = [self.shape(x) for x in values]
        if not shapes or axis not in (1, 1 - rank):
            raise origin.refuse(f"it joins dimension {axis} of {rank}; only channels, dimension 1, are joined")
        if len(values) == 1:
            return values[0]
        if any((*shape[:1], *shape[2:]) != (*shapes[0][:1], *shapes[0][2:]) for shape in shapes):
            shown = ", ".join(str(list(shape)) for shape in shapes)
            raise origin.refuse(f"of shapes {shown}; all but the channels must be equal")
        joined = (*self._types[values[0].name].shape[:-1], sum(shape[1] for shape in shapes))
        return self._add(ir.Concatenate(), tuple(x.name for x in values), joined, origin)

    def resize(self, x: Value, size: tuple[int, int], method: str, coordinates: str, origin: Origin) -> Value:
        """To (height, width); ``method`` and ``coordinates`` as ``graph.Resize`` has them. A pooled (N, C) is a map of
        one pixel."""
        if min(size) < 1:
            raise origin.refuse(f"to {list(size)}; height and width must be at least 1")
        x = self._as_map(self._plain(x, origin), origin)
        n, h, w, c = self._map_shape(x, origin)
        if size == (h, w):
            return x
        return self._add(ir.Resize(size, method, coordinates), (x.name,), (n, *size, c), origin)

    def scaled_resize(self, x: Value, factors: Sequence[float], method: str, coordinates: str, origin: Origin) -> Value:
        """By factors of height and width, which must give whole sizes."""
        sizes = _full(self.shape(x))[2:]
        exact = [size * factor for size, factor in zip(sizes, factors, strict=True)]
        if any(value != round(value) for value in exact):
            raise origin.refuse(
                f"by {list(factors)} a {list(sizes)} map becomes {exact}; give the size in place of a factor"
            )
        return self.resize(x, (round(exact[0]), round(exact[1])), method, coordinates, origin)

    def average_pool(
        self,
        x: Value,
        *,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        padding: ir.Pads,
        ceil_mode: bool,
        count_padding: bool,
        origin: Origin,
    ) -> Value:
        """Over the whole map the global one, else a depthwise convolution, where every window has the same divisor."""
        shape = _full(self.shape(x))
        if shape[2:] == kernel and not any(padding):
            return self.global_average_pool(x, origin)
        if any(padding) and not count_padding:
            raise origin.refuse("its padding does not count, so that windows differ; export it with count_include_pad")
        spans = (shape[2] + sum(padding[:2]) - kernel[0], shape[3] + sum(padding[2:]) - kernel[1])
        if ceil_mode and any(span % stride for span, stride in zip(spans, strides, strict=True)):
            raise origin.refuse("in ceil mode its last window is partial; export it without ceil_mode")
        weights = np.full((shape[1], 1, *kernel), 1 / math.prod(kernel), np.float32)
        return self.conv2d(
            x,
            (f"{origin.name}.window", weights),
            None,
            strides=strides,
            padding=padding,
            dilation=(1, 1),
            groups=shape[1],
            origin=origin,
        )

    def flatten(self, x: Value, origin: Origin, *, channels_last: bool = False) -> Value:
        """(N, C, H, W) -> (N, C * H * W), in NCHW's order unless ``channels_last``; a linear layer takes either."""
        _, h, w, c = self._map_shape(self._plain(x, origin), origin)
        result = self._reshaped(x, (h * w * c,), origin)
        return result if channels_last or c == 1 or h * w == 1 else replace(result, flat=(c, h, w))

    def _as_map(self, x: Value, origin: Origin) -> Value:
        shape = self._types[x.name].shape
        return x if len(shape) == 4 else self._reshaped(x, (1, 1, shape[1]), origin)

    def _reshaped(self, x: Value, shape: tuple[int, ...], origin: Origin) -> Value:
        """``shape`` in NHWC, without N."""
        have = self._types[x.name].shape
        if have[1:] == shape:
            return x
        origin = replace(origin, name=f"{origin.name}.reshape")
        return self._add(ir.Reshape(shape), (x.name,), (have[0], *shape), origin)

    def add(self, a: Value, b: Value, origin: Origin) -> Value:
        """Of equal shapes."""
        shapes = [self._types[self._plain(x, origin).name].shape for x in (a, b)]
        if shapes[0] != shapes[1]:
            raise origin.refuse(f"of shapes {list(self.shape(a))} and {list(self.shape(b))}; they must be equal")
        return self._add(ir.Add(), (a.name, b.name), shapes[0], origin)

    def max_pool(
        self,
        x: Value,
        *,
        kernel: tuple[int, int],
        strides: tuple[int, int],
        padding: ir.Pads,
        dilation: tuple[int, int],
        ceil_mode: bool,
        origin: Origin,
    ) -> Value:
        """Padding with minus infinity. In ``ceil_mode`` a last, partial window counts if it begins inside."""
        if dilation != (1, 1):
            raise origin.refuse(f"dilation {list(dilation)}; only 1 is")
        shape = self._map_shape(x, origin)
        if ceil_mode:
            _, _, height, width = self.shape(x)
            rows = _ceil_padding(height, kernel[0], strides[0], *padding[:2])
            columns = _ceil_padding(width, kernel[1], strides[1], *padding[2:])
            padding = (padding[0], rows, padding[2], columns)
        pads = self._take_padding(x, padding, -np.inf, origin)
        if max(pads[:2]) >= kernel[0] or max(pads[2:]) >= kernel[1]:
            raise origin.refuse(f"padding {list(pads)} as wide as the window {list(kernel)}")
        size = self._window_output(shape, kernel, strides, pads, origin)
        return self._add(ir.MaxPool2d(kernel, strides, pads), (x.name,), (shape[0], *size, shape[3]), origin)

    def global_average_pool(self, x: Value, origin: Origin) -> Value:
        """Mean over height and width; (N, C, 1, 1) and (N, C) are one."""
        n, _, _, c = self._map_shape(self._plain(x, origin), origin)
        return self._add(ir.GlobalAveragePool(), (x.name,), (n, c), origin)

    def pad(self, x: Value, padding: ir.Pads, value: float, origin: Origin) -> Value:
        """Kept beside the tensor until a convolution (zero) or a max pooling (minus infinity) takes it up."""
        self._map_shape(x, origin)
        if min(padding) < 0:
            raise origin.refuse(f"negative padding {list(padding)} cuts pixels off")
        if any(x.pads) and x.pad_value != value:
            raise origin.refuse("a padding of a padding with another value")
        top, bottom, left, right = (a + b for a, b in zip(x.pads, padding, strict=True))
        return Value(x.name, (top, bottom, left, right), value, origin)

    def reshape(self, x: Value, shape: tuple[int, ...], origin: Origin) -> Value:
        """(N, C, 1, 1) <-> (N, C), and reshapes that change nothing; ``shape`` without -1."""
        have = self.shape(self._plain(x, origin))
        if shape == have:
            return x
        if have[2:] in ((), (1, 1)) and shape[:2] == have[:2] and set(shape[2:]) <= {1}:
            # The mean of one pixel is the identity, and the graph's way from a map to (N, C).
            return x if len(have) == 2 else self.global_average_pool(x, origin)
        if len(have) == 4 and shape == (have[0], math.prod(have[1:])):
            return self.flatten(x, origin)
        if len(have) == 4 and have[2:] != (1, 1):
            raise origin.refuse(
                f"it takes {list(have)} to {list(shape)}; pool the map to 1x1 (global average) first, or flatten all"
            )
        raise origin.refuse(f"it takes {list(have)} to {list(shape)}")

    def _map_shape(self, x: Value, origin: Origin) -> tuple[int, int, int, int]:
        """(N, H, W, C) without pending padding."""
        shape = self._types[x.name].shape
        if len(shape) != 4:
            raise origin.refuse(f"on a tensor of shape {list(shape)}; it needs (N, C, H, W)")
        n, h, w, c = shape
        return n, h, w, c

    def _plain(self, x: Value, origin: Origin) -> Value:
        if x.flat is not None:
            raise origin.refuse(
                f"on a flattened map of {list(x.flat)}; a Linear layer takes one, or pool the map to 1x1 (global "
                "average) first"
            )
        if any(x.pads):
            where = x.pad_origin or origin
            raise where.refuse(
                f"its padding is followed by {origin.path or origin.name} ({origin.operator}); "
                "only a convolution or a max pooling can take a padding up"
            )
        return x

    def _take_padding(self, x: Value, padding: ir.Pads, value: float, origin: Origin) -> ir.Pads:
        """The operator's own padding and the pending one, which must have the operator's value."""
        if min(padding) < 0:
            raise origin.refuse(f"negative padding {list(padding)}")
        if any(x.pads) and x.pad_value != value:
            where = x.pad_origin or origin
            raise where.refuse(
                f"padding with {x.pad_value:g} before {origin.path or origin.name} ({origin.operator}), "
                f"which pads with {value:g}"
            )
        top, bottom, left, right = (a + b for a, b in zip(x.pads, padding, strict=True))
        return top, bottom, left, right

    def _window_output(
        self,
        shape: tuple[int, ...],
        kernel: tuple[int, int],
        strides: tuple[int, int],
        pads: ir.Pads,
        origin: Origin,
        dilation: tuple[int, int] = (1, 1),
    ) -> tuple[int, int]:
        if min(*kernel, *strides) < 1:
            raise origin.refuse(f"window {list(kernel)} in steps of {list(strides)}; both must be at least 1")
        height = ir.conv_output_size(shape[1], kernel[0], strides[0], *pads[:2], dilation[0])
        width = ir.conv_output_size(shape[2], kernel[1], strides[1], *pads[2:], dilation[1])
        if height < 1 or width < 1:
            raise origin.refuse(
                f"its window {list(kernel)} does not fit the {shape[1]}x{shape[2]} map; use larger images"
            )
        return height, width

    def _bias(self, bias: tuple[str, Array] | None, channels: int, origin: Origin) -> str:
        name, values = bias or (f"{origin.name}.bias", np.zeros(channels, np.float32))
        if values.shape != (channels,):
            raise origin.refuse(f"a bias of shape {list(values.shape)} for {channels} channels")
        return self._constant(name, values, origin)

    def _constant(self, name: str, data: Array, origin: Origin) -> str:
        """The name under which the values are kept; equal values under an equal name are kept once."""
        known = self._constants.get(name)
        if known is not None and np.array_equal(known.data, np.asarray(data, np.float32)):
            return name
        if self._bytes_left is not None:
            self._bytes_left -= 4 * data.size
            if self._bytes_left < 0:
                raise origin.refuse("with it the weights take many times the bytes of their file; export it again")
        values = np.array(data, np.float32, order="C")
        unique = self._unique(name)
        self._constants[unique] = ir.Constant(ir.TensorType(values.shape, "float32"), values)
        return unique

    def _add(self, op: ir.Op, inputs: tuple[str, ...], shape: tuple[int, ...], origin: Origin) -> Value:
        if math.prod(shape) > MAX_ELEMENTS or len(self._nodes) >= MAX_NODES:
            raise origin.refuse(
                f"it makes a tensor of shape {list(shape)} as layer {len(self._nodes) + 1}; at most {MAX_ELEMENTS} "
                f"elements and {MAX_NODES} layers are"
            )
        name = self._unique(origin.name)
        type_ = ir.TensorType(shape, "float32")
        self._nodes.append(ir.Node(name, op, inputs, type_, origin.path))
        self._types[name] = type_
        return Value(name)

    def _unique(self, wanted: str) -> str:
        name = wanted
        while name in self._types or name in self._constants:
            self._numbers[wanted] = self._numbers.get(wanted, 0) + 1
            name = f"{wanted}_{self._numbers[wanted]}"
        return name


_MOVES = (ir.Reshape, ir.Resize, ir.Concatenate, ir.MaxPool2d)  # their values are those they were given


def _full(shape: tuple[int, ...]) -> tuple[int, ...]:
    """(N, C, H, W) of a pooled (N, C), too."""
    return shape if len(shape) == 4 else (*shape, 1, 1)


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape if len(shape) == 2 else (shape[0], shape[2], shape[3], shape[1])


def _ceil_padding(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Padding after, so that the floor rule counts what torch's and ONNX' ceil mode counts.

    Source: ``pooling_output_shape`` in aten/src/ATen/native/Pool.h: a window must begin inside the input or the
    padding before it.
    """
    count = -(-(size + before + after - kernel) // stride) + 1
    if (count - 1) * stride >= size + before:
        count -= 1
    return max((count - 1) * stride + kernel - size - before, 0)
