"""The one intermediate representation: a static, single-assignment graph over NHWC tensors, float32 or int8.

A graph is a tuple of nodes in topological order and a mapping of constants. Every node makes exactly one tensor,
which bears the node's name. The quantized network is the same structure with int8 tensor types; what its nodes then
mean, bit for bit, is written in ``runtime/arithmetic.py``.

Layouts: activations (N, H, W, C) or (N, C); convolution weights (O, KH, KW, I); depthwise weights (KH, KW, C);
fully connected weights (O, I); biases (O,).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


class GraphError(ValueError):
    """A graph that breaks its own rules. ``node`` is the offending node's name, ``path`` its module path."""

    def __init__(self, message: str, node: str = "", path: str = "") -> None:
        super().__init__(message)
        self.node = node
        self.path = path


@dataclass(frozen=True)
class PerTensor:
    """real = scale * (q - zero_point). ``scale`` is a Python float that holds a float32 exactly."""

    scale: float
    zero_point: int


@dataclass(frozen=True)
class PerAxis:
    """Symmetric, one scale per index of ``axis``: real = scales[i] * q. Each scale holds a float32 exactly."""

    scales: tuple[float, ...]
    axis: int


QuantParams = PerTensor | PerAxis


@dataclass(frozen=True)
class TensorType:
    """Shape, element type (``float32``, ``int8`` or ``int32``) and, where quantized, the parameters."""

    shape: tuple[int, ...]
    dtype: str
    quant: QuantParams | None = None

    @property
    def size_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize

    @property
    def per_tensor(self) -> PerTensor:
        """The quantization of an activation; raises GraphError where there is none."""
        if not isinstance(self.quant, PerTensor):
            raise GraphError(f"expected a per-tensor quantized type, got {self}")
        return self.quant

    @property
    def per_axis(self) -> PerAxis:
        """The quantization of a weight; raises GraphError where there is none."""
        if not isinstance(self.quant, PerAxis):
            raise GraphError(f"expected a per-axis quantized type, got {self}")
        return self.quant


@dataclass(frozen=True, eq=False)
class Constant:
    """A weight or a bias: its type and its values (read-only)."""

    type: TensorType
    data: NDArray[np.generic]

    def __post_init__(self) -> None:
        if tuple(self.data.shape) != self.type.shape or str(self.data.dtype) != self.type.dtype:
            raise GraphError(f"constant holds {self.data.dtype}{self.data.shape}, its type says {self.type}")
        self.data.flags.writeable = False


Pads = tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class Input:
    """The network's input. In a quantized graph: pixels, int8."""


@dataclass(frozen=True)
class Conv2d:
    """Inputs: x (N, H, W, I), weights (O, KH, KW, I), bias (O,). Padding contributes zero."""

    strides: tuple[int, int]
    padding: Pads
    relu: bool = False
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class DepthwiseConv2d:
    """Inputs: x (N, H, W, C), weights (KH, KW, C), bias (C,). Padding contributes zero."""

    strides: tuple[int, int]
    padding: Pads
    relu: bool = False
    dilation: tuple[int, int] = (1, 1)


@dataclass(frozen=True)
class FullyConnected:
    """Inputs: x (N, I), weights (O, I), bias (O,)."""

    relu: bool = False


@dataclass(frozen=True)
class BatchNorm:
    """Inputs: x, gamma (C,), beta (C,), mean (C,), variance (C,). Float graphs only."""

    epsilon: float


@dataclass(frozen=True)
class Relu:
    """max(x, 0)."""


@dataclass(frozen=True)
class MaxPool2d:
    """Padding never wins (minus infinity; -128 in int8)."""

    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: Pads


@dataclass(frozen=True)
class Add:
    """Inputs of equal shape."""

    relu: bool = False


@dataclass(frozen=True)
class GlobalAveragePool:
    """(N, H, W, C) -> (N, C)."""


@dataclass(frozen=True)
class Lookup:
    """A function of each element by itself: in int8 a table of 256 entries, ``arithmetic.lookup_table``.

    ``function`` is a key of ``arithmetic.FUNCTIONS``; "identity" gives int8 other parameters (a requantization).
    ``parameters`` are the function's own, in its order.
    """

    function: str
    parameters: tuple[float, ...] = ()


@dataclass(frozen=True)
class Multiply:
    """Inputs: x, and a tensor of its shape or, for (N, H, W, C), a gate (N, C) for each channel."""


@dataclass(frozen=True)
class Concatenate:
    """Two or more inputs, joined along their channels; in int8 all of one scale and zero point."""


@dataclass(frozen=True)
class Resize:
    """(N, H, W, C) -> (N, *size, C).

    ``method`` is "bilinear" or "nearest". ``coordinates`` says which input position output position k is made of:
    "align corners" k * (in - 1) / (out - 1), "half pixel" (k + 0.5) * in / out - 0.5, "legacy" k * in / out.
    """

    size: tuple[int, int]
    method: str
    coordinates: str


@dataclass(frozen=True)
class Reshape:
    """(N, C) <-> (N, 1, 1, C), or (N, H, W, C) -> (N, H * W * C). ``shape`` is the output's without N."""

    shape: tuple[int, ...]


@dataclass(frozen=True)
class Quantize:
    """float32 -> int8; only in mixed graphs."""


@dataclass(frozen=True)
class Dequantize:
    """int8 -> float32; only in mixed graphs."""


Op = (
    Input
    | Conv2d
    | DepthwiseConv2d
    | FullyConnected
    | BatchNorm
    | Relu
    | MaxPool2d
    | Add
    | GlobalAveragePool
    | Lookup
    | Multiply
    | Concatenate
    | Resize
    | Reshape
    | Quantize
    | Dequantize
)


@dataclass(frozen=True)
class Facts:
    """What is the same of every node of an operator.

    ``ranks`` are its inputs' (None: 2 or 4); the last ``constants`` of them are weights and the like, the others
    tensors. ``channel_axis`` is the weights' axis of output channels, where it has weights. ``keeps_quantization``:
    its int8 output has its inputs' scale and zero point. ``variadic``: it takes more inputs of the last rank, too.
    """

    ranks: tuple[int | None, ...]
    constants: int = 0
    channel_axis: int | None = None
    keeps_quantization: bool = False
    variadic: bool = False

    def ranks_of(self, count: int) -> tuple[int | None, ...]:
        """For ``count`` inputs."""
        more = count - len(self.ranks) if self.variadic else 0
        return (*self.ranks, *self.ranks[-1:] * max(more, 0))


FACTS: Mapping[type[Op], Facts] = {
    Input: Facts(()),
    Conv2d: Facts((4, 4, 1), constants=2, channel_axis=0),
    DepthwiseConv2d: Facts((4, 3, 1), constants=2, channel_axis=2),
    FullyConnected: Facts((2, 2, 1), constants=2, channel_axis=0),
    BatchNorm: Facts((None, 1, 1, 1, 1), constants=4),
    Relu: Facts((None,)),
    MaxPool2d: Facts((4,), keeps_quantization=True),
    Add: Facts((None, None)),
    GlobalAveragePool: Facts((4,)),
    Lookup: Facts((None,)),
    Multiply: Facts((None, None)),
    Concatenate: Facts((None, None), keeps_quantization=True, variadic=True),
    Resize: Facts((4,), keeps_quantization=True),
    Reshape: Facts((None,), keeps_quantization=True),
    Quantize: Facts((None,)),
    Dequantize: Facts((None,)),
}


@dataclass(frozen=True)
class Node:
    """One operation. ``inputs`` name nodes or constants; ``path`` is the module of the trained network it came from."""

    name: str
    op: Op
    inputs: tuple[str, ...]
    type: TensorType
    path: str = ""


@dataclass(frozen=True, eq=False)
class Graph:
    """Nodes in topological order, ``Input`` nodes first."""

    name: str
    nodes: tuple[Node, ...]
    constants: Mapping[str, Constant] = field(repr=False)
    outputs: tuple[str, ...]

    @cached_property
    def _by_name(self) -> dict[str, Node]:
        return {node.name: node for node in self.nodes}

    @property
    def inputs(self) -> tuple[Node, ...]:
        return tuple(node for node in self.nodes if isinstance(node.op, Input))

    def node(self, name: str) -> Node:
        return self._by_name[name]

    def type_of(self, name: str) -> TensorType:
        """The type of a node's tensor or of a constant. Raises KeyError for an unknown name."""
        node = self._by_name.get(name)
        return node.type if node is not None else self.constants[name].type

    def users(self, name: str) -> tuple[Node, ...]:
        """The nodes that read a tensor or constant, in graph order."""
        return tuple(node for node in self.nodes if name in node.inputs)

    def with_nodes(self, nodes: tuple[Node, ...], constants: Mapping[str, Constant] | None = None) -> Graph:
        """The same graph with other nodes (and constants); constants that no node reads are dropped."""
        pool = self.constants if constants is None else constants
        read = {name for node in nodes for name in node.inputs}
        return replace(self, nodes=nodes, constants={k: v for k, v in pool.items() if k in read})


@dataclass(frozen=True)
class Geometry:
    """A node's window over a batch of images; of an operator without one, a window of one pixel.

    Sizes are in pixels; a tensor (N, C) is an image of one pixel.
    """

    batch: int
    in_height: int
    in_width: int
    in_channels: int
    out_height: int
    out_width: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    padding: Pads = (0, 0, 0, 0)
    dilation: tuple[int, int] = (1, 1)

    @property
    def in_pixels(self) -> int:
        """Of one image."""
        return self.in_height * self.in_width

    @property
    def out_pixels(self) -> int:
        """Of one image."""
        return self.out_height * self.out_width

    @property
    def taps(self) -> int:
        """Positions of the window."""
        return self.kernel[0] * self.kernel[1]

    @property
    def extent(self) -> tuple[int, int]:
        """Height and width of the input that a window reaches over."""
        return (self.kernel[0] - 1) * self.dilation[0] + 1, (self.kernel[1] - 1) * self.dilation[1] + 1

    @property
    def one_to_one(self) -> bool:
        """Whether every output pixel is made of the input pixel in its place, and of no other."""
        return self.kernel == (1, 1) and self.strides == (1, 1) and not any(self.padding)


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """(N, H, W, C) of (N, H, W, C) or (N, C)."""
    if len(shape) == 2:
        return shape[0], 1, 1, shape[1]
    n, h, w, c = shape
    return n, h, w, c


def geometry(graph: Graph, node: Node) -> Geometry:
    """Of a node with at least one input. ``GlobalAveragePool``'s window is its whole input."""
    batch, in_height, in_width, in_channels = image_shape(graph.type_of(node.inputs[0]).shape)
    _, out_height, out_width, out_channels = image_shape(node.type.shape)
    sizes = (batch, in_height, in_width, in_channels, out_height, out_width, out_channels)
    match node.op:
        case Conv2d(strides, padding, _, dilation):
            _, kh, kw, _ = graph.type_of(node.inputs[1]).shape
            return Geometry(*sizes, (kh, kw), strides, padding, dilation)
        case DepthwiseConv2d(strides, padding, _, dilation):
            kh, kw, _ = graph.type_of(node.inputs[1]).shape
            return Geometry(*sizes, (kh, kw), strides, padding, dilation)
        case MaxPool2d(kernel, strides, padding):
            return Geometry(*sizes, kernel, strides, padding)
        case GlobalAveragePool():
            return Geometry(*sizes, (in_height, in_width))
    return Geometry(*sizes)


def channel_axis(op: Op) -> int:
    """The axis of an operator's weights that numbers its output channels. Raises GraphError for one without weights."""
    axis = FACTS[type(op)].channel_axis
    if axis is None:
        raise GraphError(f"{type(op).__name__} has no weights")
    return axis


def multiply_accumulates(graph: Graph, node: Node) -> int:
    """Of the whole batch; 0 for an operator without weights. Padding counts as pixels."""
    axis = FACTS[type(node.op)].channel_axis
    if axis is None:
        return 0
    weights = graph.type_of(node.inputs[1]).shape
    return math.prod(node.type.shape) * math.prod(weights) // weights[axis]


def conv_output_size(size: int, kernel: int, stride: int, before: int, after: int, dilation: int = 1) -> int:
    """Output positions of a window of ``kernel`` at ``stride`` over ``size`` positions and padding on both sides."""
    return (size + before + after - (kernel - 1) * dilation - 1) // stride + 1


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(size / stride); the odd pixel of padding goes after (before, after).

    Source: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
