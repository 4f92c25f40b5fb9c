"""The one intermediate representation: a static, single-assignment graph over NHWC tensors, float32 or int8.

A graph is a tuple of nodes in topological order and a mapping of constants. Every node makes exactly one tensor,
which bears the node's name. The quantized network is the same structure with int8 tensor types; what its nodes then
mean, bit for bit, is written in ``runtime/arithmetic.py``.

Layouts: activations (N, H, W, C) or (N, C); convolution weights (O, KH, KW, I); depthwise weights (KH, KW, C);
fully connected weights (O, I); biases (O,).
"""

from __future__ import annotations

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


@dataclass(frozen=True)
class DepthwiseConv2d:
    """Inputs: x (N, H, W, C), weights (KH, KW, C), bias (C,). Padding contributes zero."""

    strides: tuple[int, int]
    padding: Pads
    relu: bool = False


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
class Requantize:
    """int8 -> int8 with other parameters."""


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
    | Requantize
    | Quantize
    | Dequantize
)


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


def conv_output_size(size: int, kernel: int, stride: int, before: int, after: int) -> int:
    """Output positions of a window of ``kernel`` at ``stride`` over ``size`` positions and padding on both sides."""
    return (size + before + after - kernel) // stride + 1


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """TensorFlow's SAME: output ceil(size / stride); the odd pixel of padding goes after (before, after).

    Source: https://www.tensorflow.org/api_docs/python/tf/nn#notes_on_padding_2
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2
