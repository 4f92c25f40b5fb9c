"""Builds a Graph from a network written in NCHW: what the torch and the ONNX front ends share.

The front ends read their formats; this file knows which layers the graph can say, moves weights into its layouts,
merges padding into the operator that follows, and refuses the rest with the layer's place and the reason.
"""

from __future__ import annotations

import math
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
SCALE_OUTSIDE = "it has no int8 form here; if it scales pixels, export without it and give --preprocessing"


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

    def graph(self, name: str, outputs: tuple[Value, ...], origin: Origin) -> ir.Graph:
        """The finished graph."""
        names = tuple(self._plain(value, origin).name for value in outputs)
        inputs = [node for node in self._nodes if isinstance(node.op, ir.Input)]
        rest = [node for node in self._nodes if not isinstance(node.op, ir.Input)]
        return ir.Graph(name, (), self._constants, names).with_nodes((*inputs, *rest))

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
        if dilation != (1, 1) and (kh, kw) != (1, 1):
            raise origin.refuse(f"dilation {list(dilation)}; only 1 is")
        shape = self._types[x.name].shape
        if len(shape) == 2:
            return self._conv_of_pooled(x, weights, bias, padding, groups, origin)
        channels = shape[3]
        if channels != per_group * groups:
            raise origin.refuse(f"weights for {per_group * groups} channels on an input of {channels}")
        pads = self._take_padding(x, padding, 0.0, origin)
        size = self._window_output(shape, (kh, kw), strides, pads, origin)
        op: ir.Op
        if groups == 1:
            op, data = ir.Conv2d(strides, pads), w.transpose(0, 2, 3, 1)
        elif groups == channels == out_channels:
            op, data = ir.DepthwiseConv2d(strides, pads), w[:, 0].transpose(1, 2, 0)
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
        return self._add(ir.Relu(), (self._plain(x, origin).name,), self._types[x.name].shape, origin)

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
        if len(have) == 4 and have[2:] != (1, 1):
            raise origin.refuse(f"it takes {list(have)} to {list(shape)}; pool the map to 1x1 (global average) first")
        raise origin.refuse(f"it takes {list(have)} to {list(shape)}")

    def _map_shape(self, x: Value, origin: Origin) -> tuple[int, int, int, int]:
        """(N, H, W, C) without pending padding."""
        shape = self._types[x.name].shape
        if len(shape) != 4:
            raise origin.refuse(f"on a tensor of shape {list(shape)}; it needs (N, C, H, W)")
        n, h, w, c = shape
        return n, h, w, c

    def _plain(self, x: Value, origin: Origin) -> Value:
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
        self, shape: tuple[int, ...], kernel: tuple[int, int], strides: tuple[int, int], pads: ir.Pads, origin: Origin
    ) -> tuple[int, int]:
        if min(*kernel, *strides) < 1:
            raise origin.refuse(f"window {list(kernel)} in steps of {list(strides)}; both must be at least 1")
        height = ir.conv_output_size(shape[1], kernel[0], strides[0], *pads[:2])
        width = ir.conv_output_size(shape[2], kernel[1], strides[1], *pads[2:])
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
