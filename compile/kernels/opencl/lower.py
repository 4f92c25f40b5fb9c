"""Lowers a graph to OpenCL kernels: which operators share one, how tensors are stored, how weights are packed.

An int8 graph becomes int8 kernels, bit for bit the integer contract. A float graph whose input is int8 pixels behind a
``Dequantize`` becomes float16 kernels: activations and weights in half, sums in float but for eight products at a time
where the device computes in half, outputs in float32.

A tensor between kernels is stored as ``element`` says. A convolution's bias holds the zero point's share, so
that padding is pixels of the zero point and nothing is subtracted in a loop. A ReLU that only depthwise convolutions
read is taken in as they load; an addition with a convolution that nothing else reads is that convolution's end.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ....models import graph as ir
from ....runtime import arithmetic
from ....runtime.plan import Launch
from ....targets.spec import GpuSpec, TargetSpec
from ..kernel_call import Activation, KernelCall, Weights, pad_to, wrap_int32
from . import element as words
from . import shapes
from .convolution import PLAIN_CHANNELS, Convolution, Tile
from .element import FLOAT16, INT8, Element
from .elementwise import Convert, Elementwise, Linear, Mean
from .tir import VECTOR_BYTES
from .window import Window

Array = NDArray[np.generic]
Kernel = Convolution | Window | Elementwise | Mean | Linear | Convert
_DRAFT = Tile(1, 1, 1, 1, False)  # before ``shapes`` has chosen


def lower(graph: ir.Graph, target: TargetSpec) -> tuple[KernelCall, ...]:
    """Given: an int8 graph, or a float one behind int8 pixels, of any batch size. Result: its launches in order.

    Raises GraphError for an operator, or a mixture of types, that there is no kernel for; ValueError for a target
    without a GPU.
    """
    if target.gpu is None:
        raise ValueError(f"{target.name}: OpenCL kernels are for GPUs, the target's engine is {target.engine}")
    return _Lowering(graph, target.gpu, _element(graph)).calls()


def _element(graph: ir.Graph) -> Element:
    """What the graph's kernels compute with. Raises GraphError for a mixed graph."""
    computed = [node for node in graph.nodes if not isinstance(node.op, ir.Input | ir.Dequantize)]
    if not any(node.type.dtype == "float32" for node in graph.nodes):
        return INT8
    for node in computed:
        if node.type.dtype != "float32":
            raise ir.GraphError(f"{node.name}: OpenCL kernels take no mixed graph", node.name, node.path)
    for node in graph.inputs:
        if node.type.dtype != "int8":
            raise ir.GraphError(f"{node.name}: a float network on a GPU takes int8 pixels", node.name, node.path)
    return FLOAT16


class _Lowering:
    """One walk over the graph."""

    def __init__(self, graph: ir.Graph, gpu: GpuSpec, element: Element) -> None:
        self.graph, self.gpu, self.e = graph, gpu, element
        self.absorbed = {node.name for node in graph.nodes if _only_depthwise_reads(graph, node)}
        ends = ((node.name, self._ended_by(node)) for node in graph.nodes)
        # Additions, and the convolutions they end.
        self.ended = {addition: convolution for addition, convolution in ends if convolution is not None}

    def calls(self) -> tuple[KernelCall, ...]:
        result: list[KernelCall] = []
        for node in self.graph.nodes:
            if len(node.type.shape) not in (2, 4):
                raise ir.GraphError(f"{node.name}: no kernel for shape {node.type.shape}", node.name, node.path)
            if node.name not in self.absorbed and node.name not in self.ended.values():
                result += self._node(node)
            if node.name in self.graph.outputs and not self._ends_plain(node):
                result.append(self._export(node))
        return tuple(result)

    def _node(self, node: ir.Node) -> list[KernelCall]:
        match node.op:
            case ir.Input():
                return self._input(node)
            case ir.Dequantize() if self.e is FLOAT16 and isinstance(self._source(node.inputs[0]).op, ir.Input):
                return []
            case ir.Conv2d():
                return [self._convolution(node, None)]
            case ir.DepthwiseConv2d() | ir.MaxPool2d():
                return [self._window(node, node.op)]
            case ir.Add() if node.name in self.ended:
                return [self._convolution(self.graph.node(self.ended[node.name]), node)]
            case ir.Add():
                return [self._elementwise(node, "add")]
            case ir.Relu():
                return [self._elementwise(node, "relu")]
            case ir.Lookup():
                return [self._elementwise(node, "requantize")]
            case ir.GlobalAveragePool():
                return [self._mean(node)]
            case ir.FullyConnected():
                return [self._linear(node)]
        raise ir.GraphError(f"{node.name}: no OpenCL kernel for {type(node.op).__name__}", node.name, node.path)

    # What shares a kernel.

    def _ended_by(self, node: ir.Node) -> str | None:
        """The convolution that ends with this addition: the one nearest before it."""
        if not isinstance(node.op, ir.Add) or node.inputs[0] == node.inputs[1]:
            return None
        order = {other.name: index for index, other in enumerate(self.graph.nodes)}
        for name in sorted(node.inputs, key=order.__getitem__, reverse=True):
            alone = len(self.graph.users(name)) == 1 and name not in self.graph.outputs
            if isinstance(self.graph.node(name).op, ir.Conv2d) and alone:
                return name
        return None

    # Where tensors lie.

    def _source(self, name: str) -> ir.Node:
        """The node whose value a tensor holds: ``Dequantize`` only says what the network's input means."""
        node = self.graph.node(name)
        return self.graph.node(node.inputs[0]) if isinstance(node.op, ir.Dequantize) else node

    def _readers(self, node: ir.Node) -> list[ir.Node]:
        """What reads a node's value, itself or as real numbers."""
        users = self.graph.users(node.name)
        return [r for user in users for r in (self._readers(user) if isinstance(user.op, ir.Dequantize) else [user])]

    def _read_plain(self, node: ir.Node) -> bool:
        """Whether nothing but convolutions that take plain NHWC read the network's input ``node``."""
        readers = self._readers(node)
        return (
            isinstance(node.op, ir.Input)
            and node.type.shape[-1] <= PLAIN_CHANNELS
            and node.name not in self.graph.outputs
            and all(isinstance(reader.op, ir.Conv2d) for reader in readers)
        )

    def _ends_plain(self, node: ir.Node) -> bool:
        """Whether a node is a network output and its own kernel writes it as one."""
        is_output = node.name in self.graph.outputs and not self.graph.users(node.name)
        return is_output and isinstance(node.op, ir.FullyConnected)

    def _activation(self, name: str) -> Activation:
        """A stored tensor. The plain name is that of a network input's or output's plain form."""
        node = self._source(name)
        batch, height, width, channels = _shape(node.type)
        stored = isinstance(node.op, ir.Input) or node.name in self.graph.outputs
        count = self.e.size_bytes(batch, height * width, channels)
        return Activation(f"{node.name}:stored" if stored else node.name, "int8", count)

    def _plain(self, node: ir.Node) -> Activation:
        return Activation(node.name, node.type.dtype, math.prod(node.type.shape))

    def _call(
        self, node: ir.Node, kernel: Kernel, operands: list[Activation | Weights], *, macs: int = 0
    ) -> KernelCall:
        output = operands[-1]
        assert isinstance(output, Activation)
        if isinstance(kernel, Convolution | Window):
            shapes.check_local_memory(self.gpu, self.e, kernel.local_bytes, node.name)
        traffic_bytes = kernel.requested_bytes  # those of the other kinds load nothing twice
        if isinstance(kernel, Convolution | Window | Linear):
            traffic_bytes = kernel.traffic_bytes(shapes.cache_bytes(self.gpu))
        return KernelCall(
            kernel.symbol,
            kernel.build,
            tuple(operands),
            output.name,
            node.name,
            path=node.path,
            macs=macs,
            launch=Launch(kernel.groups, kernel.group_size),
            traffic_bytes=traffic_bytes,
            requested_bytes=kernel.requested_bytes,
        )

    def _input(self, node: ir.Node) -> list[KernelCall]:
        if self._read_plain(node):
            return []
        batch, height, width, channels = _shape(node.type)
        operands: list[Activation | Weights] = [self._plain(node)]
        if not self.e.integer:
            operands.append(self._real_parameters(node))
        operands.append(self._activation(node.name))
        return [self._call(node, Convert("import", self.e, batch, height * width, channels), operands)]

    def _export(self, node: ir.Node) -> KernelCall:
        batch, height, width, channels = _shape(node.type)
        kernel = Convert("export", self.e, batch, height * width, channels)
        return self._call(node, kernel, [self._activation(node.name), self._plain(node)])

    # Constants.

    def _real_parameters(self, source: ir.Node, low: float = -np.inf, add_low: float = -np.inf) -> Weights:
        """float16's: lower bounds, and what the network's input means."""
        values = np.zeros(words.REAL_PARAMETERS, np.float32)
        values[words.REAL_LOW], values[words.REAL_ADD_LOW] = low, add_low
        if isinstance(source.op, ir.Input):
            quant = source.type.per_tensor
            values[words.REAL_SCALE], values[words.REAL_OFFSET] = quant.scale, quant.zero_point
        return Weights(values)

    def _parameters(self, node: ir.Node, relu: bool, read: str, add: ir.Node | None = None) -> Weights:
        """Of a node that reads ``read``, and of the addition that ends it."""
        if not self.e.integer:
            add_low = 0.0 if add is not None and isinstance(add.op, ir.Add) and add.op.relu else -np.inf
            return self._real_parameters(self._source(read), 0.0 if relu else -np.inf, add_low)
        zero = node.type.per_tensor.zero_point
        values = np.zeros(words.PARAMETERS, np.int64)
        values[words.ZERO], values[words.LOW] = zero, arithmetic.lower_bound(zero, relu)
        values[words.PADDING] = (self.graph.type_of(read).per_tensor.zero_point & 0xFF) * 0x01010101
        if add is not None:
            self._add_constants(values, node, add)
        return Weights(wrap_int32(values))

    def _add_constants(self, values: NDArray[np.int64], first: ir.Node, add: ir.Node) -> None:
        """``first`` is the summand that the kernel computes, or the addition's first."""
        assert isinstance(add.op, ir.Add)
        names = list(add.inputs)
        if first.name == names[1]:
            names.reverse()
        (a, b), out = (self.graph.type_of(name).per_tensor for name in names), add.type.per_tensor
        constants = arithmetic.add_constants(a.scale, a.zero_point, b.scale, b.zero_point, out.scale)
        values[words.ADD_A], values[words.ADD_B] = constants.a_multiplier, constants.b_multiplier
        values[words.ADD_BIAS], values[words.ADD_SHIFT] = constants.bias, constants.shift
        values[words.ADD_ZERO] = out.zero_point
        values[words.ADD_LOW] = arithmetic.lower_bound(out.zero_point, add.op.relu)

    def _sums(self, node: ir.Node, matrix: Array, read: str, count: int) -> list[Activation | Weights]:
        """Biases and, of int8, sums of weights and multipliers, ``count`` of each; ``matrix`` (channels, products)."""
        bias = self.graph.constants[node.inputs[2]].data
        if not self.e.integer:
            return [Weights(pad_to(bias.astype(np.float32), count))]
        source, weights = self.graph.type_of(read), self.graph.type_of(node.inputs[1])
        total = matrix.astype(np.int64).sum(axis=1)
        start = bias.astype(np.int64) - source.per_tensor.zero_point * total
        multipliers = arithmetic.output_multipliers(
            self.graph.type_of(node.inputs[0]).per_tensor.scale, weights.per_axis.scales, node.type.per_tensor.scale
        )
        return [Weights(pad_to(values, count)) for values in (wrap_int32(start), wrap_int32(total), multipliers)]

    # Operators.

    def _convolution(self, node: ir.Node, add: ir.Node | None) -> KernelCall:
        assert isinstance(node.op, ir.Conv2d)
        source = self._source(node.inputs[0])
        weights = self.graph.constants[node.inputs[1]].data
        batch, height, width, in_channels = _shape(source.type)
        _, out_height, out_width, channels = _shape(node.type)
        kernel = (weights.shape[1], weights.shape[2])
        if kernel == (1, 1) and node.op.strides == (1, 1) and not any(node.op.padding):
            height, width, out_height, out_width = 1, height * width, 1, out_height * out_width
        plain = self._read_plain(source)
        padding = (node.op.padding[0], node.op.padding[2])
        draft = Convolution(
            self.e, batch, height, width, in_channels, out_height, out_width, channels, kernel, node.op.strides,
            padding, plain, add is not None, _DRAFT,
        )  # fmt: skip
        made = shapes.tile_of(self.gpu, draft)
        x = self._plain(source) if plain else self._activation(source.name)
        operands: list[Activation | Weights] = [x, Weights(pack_weights(self.e, weights, made.weights_shape))]
        operands += self._sums(node, weights.reshape(channels, -1), source.name, made.out_quads * 4)
        operands.append(self._parameters(node, node.op.relu, source.name, add))
        if add is not None:
            other = next(name for name in add.inputs if name != node.name)
            operands.append(self._activation(other))
        last = add or node
        return self._call(last, made, [*operands, self._activation(last.name)], macs=made.macs)

    def _window(self, node: ir.Node, op: ir.DepthwiseConv2d | ir.MaxPool2d) -> KernelCall:
        read = node.inputs[0]
        relu = read in self.absorbed
        if relu:
            read = self.graph.node(read).inputs[0]
        batch, height, width, channels = _shape(self.graph.type_of(read))
        _, out_height, out_width, _ = _shape(node.type)
        if isinstance(op, ir.MaxPool2d):
            kind, kernel = "maxpool", op.kernel
        else:
            shape = self.graph.constants[node.inputs[1]].type.shape
            kind, kernel = "depthwise", (shape[0], shape[1])
        draft = Window(
            kind, self.e, batch, height, width, channels, out_height, out_width, kernel, op.strides,
            (op.padding[0], op.padding[2]), relu, (1, 1), 1,
        )  # fmt: skip
        made = shapes.window_tile(self.gpu, draft)
        operands: list[Activation | Weights] = [self._activation(read)]
        if isinstance(op, ir.DepthwiseConv2d):
            taps = self.graph.constants[node.inputs[1]].data.reshape(-1, channels)
            operands.append(Weights(pack_taps(self.e, taps)))
            count = made.blocks * self.e.lanes
            bias, *rest = self._sums(node, taps.T, read, count)
            operands += [bias, *rest[1:], self._parameters(node, op.relu, read)]  # without the sums of weights
        return self._call(node, made, [*operands, self._activation(node.name)], macs=made.macs)

    def _elementwise(self, node: ir.Node, kind: str) -> KernelCall:
        target = self._activation(node.name)
        inputs = [self._activation(name) for name in node.inputs]
        kernel = Elementwise(kind, self.e, target.count // VECTOR_BYTES)
        if not self.e.integer:
            low = 0.0 if kind == "relu" or (isinstance(node.op, ir.Add) and node.op.relu) else -np.inf
            constants = self._real_parameters(node, low, low)
        elif kind == "requantize":
            source, out = self.graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
            values = np.zeros(words.PARAMETERS, np.int64)
            k = arithmetic.requantize_multiplier(source.scale, out.scale)
            values[words.ADD_A], values[words.ADD_BIAS] = k, 128 - source.zero_point * k
            values[words.ZERO] = out.zero_point
            constants = Weights(wrap_int32(values))
        else:
            constants = self._parameters(node, False, node.inputs[0], node if kind == "add" else None)
        return self._call(node, kernel, [*inputs, constants, target])

    def _mean(self, node: ir.Node) -> KernelCall:
        source = self.graph.type_of(node.inputs[0])
        batch, height, width, channels = _shape(source)
        kernel = Mean(self.e, batch, height * width, channels)
        constants: list[Activation | Weights]
        if self.e.integer:
            out, pixels = node.type.per_tensor, height * width
            values = np.zeros(words.PARAMETERS, np.int64)
            values[words.ZERO], values[words.LOW] = out.zero_point, arithmetic.INT8_MIN
            values[words.ADD_BIAS] = -pixels * source.per_tensor.zero_point
            m = arithmetic.average_multiplier(source.per_tensor.scale, out.scale, pixels)
            constants = [Weights(wrap_int32(values)), Weights(np.repeat(m.reshape(1), 4))]
        else:
            real = np.zeros(words.REAL_PARAMETERS, np.float32)
            real[words.REAL_SCALE] = 1.0 / (height * width)
            constants = [Weights(real)]
        return self._call(node, kernel, [self._activation(node.inputs[0]), *constants, self._activation(node.name)])

    def _linear(self, node: ir.Node) -> KernelCall:
        assert isinstance(node.op, ir.FullyConnected)
        weights = self.graph.constants[node.inputs[1]].data
        outputs, inputs = weights.shape
        plain = self._ends_plain(node)
        kernel = Linear(self.e, node.type.shape[0], inputs, outputs, plain)
        packed = pack_weights(self.e, weights[:, None, None, :], kernel.weights_shape)
        operands: list[Activation | Weights] = [self._activation(node.inputs[0]), Weights(packed)]
        operands += self._sums(node, weights, self._source(node.inputs[0]).name, kernel.out_quads * 4)
        operands.append(self._parameters(node, node.op.relu, node.inputs[0]))
        operands.append(self._plain(node) if plain else self._activation(node.name))
        return self._call(node, kernel, operands, macs=kernel.macs)


def pack_weights(element: Element, weights: Array, shape: tuple[int, int, int, int]) -> Array:
    """(O, KH, KW, I) -> blocks, taps, words, fours of outputs, and in a vector: four outputs' words. Flat."""
    blocks, taps, word_count, quads = shape
    outputs, inputs = weights.shape[0], weights.shape[3]
    padded = np.zeros((quads * 4, taps, blocks * word_count * element.word_channels), np.float64)
    padded[:outputs, :, :inputs] = weights.reshape(outputs, taps, inputs)
    split = padded.reshape(quads, 4, taps, blocks, word_count, element.word_channels)
    return element.storage(split.transpose(3, 2, 4, 0, 1, 5).reshape(-1))


def pack_taps(element: Element, taps: Array) -> Array:
    """Depthwise weights (taps, C) -> blocks, taps, lanes. Flat."""
    padded = np.zeros((taps.shape[0], element.blocks(taps.shape[1]) * element.lanes), np.float64)
    padded[:, : taps.shape[1]] = taps
    return element.storage(padded.reshape(taps.shape[0], -1, element.lanes).transpose(1, 0, 2).reshape(-1))


def _shape(kind: ir.TensorType) -> tuple[int, int, int, int]:
    """(N, H, W, C) of (N, H, W, C) or (N, C)."""
    shape = kind.shape
    return (shape[0], 1, 1, shape[1]) if len(shape) == 2 else (shape[0], shape[1], shape[2], shape[3])


def _only_depthwise_reads(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether a node is a ReLU that depthwise convolutions alone read: they take it in as they load."""
    users = graph.users(node.name)
    return (
        isinstance(node.op, ir.Relu)
        and bool(users)
        and node.name not in graph.outputs
        and all(isinstance(user.op, ir.DepthwiseConv2d) for user in users)
    )
