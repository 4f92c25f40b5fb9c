"""Lowers an int8 graph to x86-64 kernels: which operators share one, how tensors are stored, how weights are packed.

A tensor between kernels is stored as u = q + 128, NHWC, each pixel padded to whole cache lines (``stored_channels``).
The convolutions' zero-point correction, (128 + z_in) times the sum of a channel's weights, is in the biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ....models import graph as ir
from ....runtime import arithmetic
from ....targets.spec import TargetSpec
from ..kernel_call import Activation, KernelCall, Weights, pad_to, task_size, wrap_int32
from . import layout
from .conv import Convolution, Producer, Rows
from .depthwise import Depthwise, DepthwiseAlone, DepthwiseAny
from .elementwise import AveragePool, Convert, Elementwise, MaxPool
from .gather import Gather
from .product import LARGEST_BLOCK, Product, panel_starts
from .vector import AVX2, AVX512VNNI, Isa, lane_order

Array = NDArray[np.generic]

INT32_LIMIT = 2.0**31 - 2.0**8
PANEL_WEIGHTS = 3 << 18  # matrices larger than this are walked through once, by columns


def isa_of(target: TargetSpec) -> Isa:
    """Raises ValueError for a target without AVX2."""
    if "avx512vnni" in target.features:
        return AVX512VNNI
    if "avx2" in target.features:
        return AVX2
    raise ValueError(f"{target.name}: x86 kernels need avx2 or avx512vnni, the target has {target.features}")


def lower(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> tuple[KernelCall, ...]:
    """Given: an int8 graph of batch 1. Result: the straight line of kernel calls that computes it.

    ``choices`` are measured task sizes. Raises GraphError for an operator, or a shape of one, that there is no kernel
    for, ValueError for a choice that cannot be.
    """
    return _Lowering(graph, isa_of(target), choices).calls()


@dataclass(frozen=True)
class _LeftHandSide:
    """The left-hand matrix of a convolution: what makes its rows, of which tensor, with which constants and
    multiply-accumulates of its own."""

    producer: Producer
    x: Activation
    constants: tuple[Weights, ...]
    macs: int


class _Lowering:
    """One walk over the graph."""

    def __init__(self, graph: ir.Graph, isa: Isa, choices: Mapping[str, int] | None) -> None:
        self.graph = graph
        self.choices = choices
        self.isa = isa
        self.fused = {node.name for node in graph.nodes if self._in_next_convolution(node)}
        self.absorbed = {node.name for node in graph.nodes if self._in_depthwise(node)}

    def calls(self) -> tuple[KernelCall, ...]:
        result: list[KernelCall] = []
        for node in self.graph.nodes:
            if node.type.shape[0] != 1 or len(node.type.shape) not in (2, 4):
                raise ir.GraphError(f"{node.name}: kernels take one image, the shape is {node.type.shape}", node.name)
            if node.name not in self.fused and node.name not in self.absorbed:
                result += self._node(node)
            if node.name in self.graph.outputs:
                result.append(self._export(node))
        return tuple(result)

    def _node(self, node: ir.Node) -> list[KernelCall]:
        match node.op:
            case ir.Input():
                return self._input(node)
            case ir.Conv2d() | ir.FullyConnected():
                return self._convolution(node)
            case ir.DepthwiseConv2d():
                return self._depthwise(node)
            case ir.MaxPool2d():
                return [self._max_pool(node, node.op)]
            case ir.Add() | ir.Relu() | ir.Lookup():
                return [self._elementwise(node)]
            case ir.GlobalAveragePool():
                return [self._average_pool(node)]
        raise ir.GraphError(f"{node.name}: no x86 kernel for {type(node.op).__name__}", node.name, node.path)

    # What shares a kernel.

    def _is_banded(self, node: ir.Node) -> bool:
        """Whether a depthwise convolution is 3x3 at stride 1 with one pixel of padding."""
        op = node.op
        return (
            isinstance(op, ir.DepthwiseConv2d)
            and self.graph.constants[node.inputs[1]].type.shape[:2] == (3, 3)
            and op.strides == (1, 1)
            and op.padding == (1, 1, 1, 1)
        )

    def _in_next_convolution(self, node: ir.Node) -> bool:
        users = self.graph.users(node.name)
        if not self._is_banded(node) or len(users) != 1 or node.name in self.graph.outputs:
            return False
        user = users[0]
        return isinstance(user.op, ir.Conv2d) and _is_pointwise(self.graph, user)

    def _in_depthwise(self, node: ir.Node) -> bool:
        users = self.graph.users(node.name)
        return (
            isinstance(node.op, ir.Relu)
            and bool(users)
            and node.name not in self.graph.outputs
            and all(self._is_banded(user) for user in users)
        )

    # Where tensors lie.

    def _stored(self, name: str) -> str:
        """The name of a tensor's stored form; the plain name is the network's input's or output's plain form."""
        plain = isinstance(self.graph.node(name).op, ir.Input) or name in self.graph.outputs
        return f"{name}:stored" if plain else name

    def _activation(self, name: str) -> Activation:
        pixels, channels = _pixels(self.graph.type_of(name).shape)
        return Activation(self._stored(name), "uint8", pixels * layout.stored_channels(channels))

    def _reads_plain(self, user: ir.Node) -> bool:
        return isinstance(user.op, ir.Conv2d)

    def _input(self, node: ir.Node) -> list[KernelCall]:
        if all(self._reads_plain(user) for user in self.graph.users(node.name)) and node.name not in self.graph.outputs:
            return []
        pixels, channels = _pixels(node.type.shape)
        kernel = Convert("import", pixels, channels)
        source = Activation(node.name, "int8", pixels * channels)
        target = self._activation(node.name)
        return [KernelCall(kernel.symbol, kernel.build, (source, target), target.name, node.name, tasks=kernel.tasks)]

    def _export(self, node: ir.Node) -> KernelCall:
        pixels, channels = _pixels(node.type.shape)
        kernel = Convert("export", pixels, channels)
        target = Activation(node.name, "int8", pixels * channels)
        operands = (self._activation(node.name), target)
        return KernelCall(
            kernel.symbol, kernel.build, operands, node.name, node.name, path=node.path, tasks=kernel.tasks
        )

    # Operators that multiply matrices.

    def _convolution(self, node: ir.Node) -> list[KernelCall]:
        weights = self.graph.constants[node.inputs[1]].data
        if isinstance(node.op, ir.FullyConnected):
            op, weights = ir.Conv2d((1, 1), (0, 0, 0, 0), node.op.relu), weights[:, None, None, :]
        else:
            assert isinstance(node.op, ir.Conv2d)
            op = node.op
        pixels, channels = _pixels(node.type.shape)
        parameters = np.zeros(layout.PARAMETERS, np.int32)
        parameters[layout.OUT_ZERO] = node.type.per_tensor.zero_point + 128
        parameters[layout.OUT_LOW] = arithmetic.lower_bound(node.type.per_tensor.zero_point, op.relu) + 128
        left = self._left_hand_side(node, op, (weights.shape[1], weights.shape[2]), parameters)
        position = left.producer.k_position(self.isa)
        k = int(position.max()) + 1
        matrix = np.zeros((channels, k), np.int64)
        matrix[:, position.reshape(-1)] = weights.reshape(channels, -1)
        constants, bounded = self._product_constants(node, matrix)
        finish = partial(KernelCall, name=node.name, path=node.path, macs=pixels * weights.size + left.macs)
        target = self._activation(node.name)
        operands: tuple[Activation | Weights, ...]
        if matrix.size <= PANEL_WEIGHTS and pixels > 1:
            draft = Convolution(self.isa, left.producer, pixels, k, channels, 0, bounded)
            size = task_size(self.choices, draft.symbol, pixels_per_task(pixels, k), pixels, LARGEST_BLOCK)
            product = replace(draft, pixels_per_task=size.value)
            y = Activation(target.name, "uint8", product.output_count)
            operands = (left.x, *left.constants, *constants, Weights(parameters), y)
            return [finish(product.symbol, product.build, operands, y.name, tasks=product.tasks, size=size)]
        calls, a, stride = self._rows(node, left, k, parameters)
        columns = Product(self.isa, pixels, k, channels, bounded, stride)
        operands = (a, *constants, Weights(parameters), target)
        return [*calls, finish(columns.symbol, columns.build, operands, target.name, tasks=columns.tasks)]

    def _left_hand_side(
        self, node: ir.Node, op: ir.Conv2d, kernel: tuple[int, int], parameters: NDArray[np.int32]
    ) -> _LeftHandSide:
        """Of a convolution's product. Sets the ``parameters`` that making its rows takes."""
        source = self.graph.node(node.inputs[0])
        if source.name in self.fused:
            producer, constants, x, macs = self._depthwise_producer(source, parameters)
            return _LeftHandSide(producer, x, constants, macs)
        shape = source.type.shape
        height, width, channels = shape[1:] if len(shape) == 4 else (1, 1, shape[1])
        out_width = node.type.shape[2] if len(node.type.shape) == 4 else 1
        plain = isinstance(source.op, ir.Input) and self._input(source) == []
        gather = Gather(height, width, channels, kernel, op.strides, op.padding, out_width, plain)
        parameters[layout.PADDING] = source.type.per_tensor.zero_point + 128
        x = Activation(source.name, "int8", height * width * channels) if plain else self._activation(source.name)
        return _LeftHandSide(gather, x, (), 0)

    def _rows(
        self, node: ir.Node, left: _LeftHandSide, k: int, parameters: NDArray[np.int32]
    ) -> tuple[list[KernelCall], Activation, int]:
        """The left-hand matrix in memory, and elements from row to row: the input itself, or what a call makes."""
        if isinstance(left.producer, Gather) and self.isa.vnni and left.producer.copies_nothing:
            return [], left.x, layout.stored_channels(left.producer.channels)
        source = self.graph.node(node.inputs[0])
        rows = Rows(self.isa, left.producer, _pixels(node.type.shape)[0], k)
        a = Activation(f"{node.name}:rows", self.isa.operand, rows.count)
        operands: tuple[Activation | Weights, ...] = (left.x, *left.constants, Weights(parameters), a)
        call = KernelCall(rows.symbol, rows.build, operands, a.name, source.name, path=source.path, tasks=rows.tasks)
        return [call], a, layout.row_stride(k)

    def _product_constants(self, node: ir.Node, matrix: NDArray[np.int64]) -> tuple[tuple[Weights, ...], bool]:
        """Packed weights, biases and multipliers of ``matrix`` (N, K), and whether every product fits int32."""
        isa, channels = self.isa, matrix.shape[0]
        bias, multipliers, bounded = self._biases(node, matrix)
        starts = panel_starts(isa, channels)
        order = np.concatenate([first + lane_order(isa, vectors).reshape(-1) for first, vectors in starts])
        constants = (
            _pack_matrix(isa, matrix, order),
            Weights(pad_to(bias, order.size)[order]),
            Weights(pad_to(multipliers, order.size)[order]),
        )
        return constants, bounded

    def _biases(self, node: ir.Node, matrix: NDArray[np.int64]) -> tuple[NDArray[np.int32], NDArray[np.float32], bool]:
        """Biases with the zero-point correction (modulo 2^32), multipliers, and the bound."""
        source, weights = (self.graph.type_of(name) for name in node.inputs[:2])
        bias = self.graph.constants[node.inputs[2]].data.astype(np.int64)
        multipliers = arithmetic.output_multipliers(
            source.per_tensor.scale, weights.per_axis.scales, node.type.per_tensor.scale
        )
        corrected = bias - (128 + source.per_tensor.zero_point) * matrix.sum(axis=1)
        largest = (np.abs(matrix).sum(axis=1) * 255 + np.abs(bias)).astype(np.float64) * multipliers
        return wrap_int32(corrected), multipliers, bool(largest.max(initial=0) < INT32_LIMIT)

    def _depthwise_producer(
        self, node: ir.Node, parameters: NDArray[np.int32]
    ) -> tuple[Depthwise, tuple[Weights, ...], Activation, int]:
        """A banded depthwise convolution as a producer: what it reads, and its multiply-accumulates."""
        assert isinstance(node.op, ir.DepthwiseConv2d)
        isa = self.isa
        relu = node.inputs[0] in self.absorbed
        _, height, width, channels = node.type.shape
        source = self.graph.type_of(node.inputs[0])
        taps = self.graph.constants[node.inputs[1]].data.astype(np.int64)  # (3, 3, C)
        _, multipliers, bounded = self._biases(node, taps.reshape(9, channels).T)
        producer = Depthwise(height, width, channels, relu, bounded)
        total = producer.chunks(isa) * isa.bytes
        packed, biases = [], []
        for variant in range(producer.variants):
            rows = taps.copy()
            if variant == 1 or height == 1:
                rows[0] = 0
            if variant == 2 or height == 1:
                rows[2] = 0
            bias, _, _ = self._biases(node, rows.reshape(9, channels).T)
            packed.append(_pack_taps(isa, rows, total))
            biases.append(_in_lanes(isa, pad_to(bias, total)))
        zero = node.type.per_tensor.zero_point
        parameters[layout.ROW_ZERO] = zero + 128
        parameters[layout.ROW_LOW] = arithmetic.lower_bound(zero, node.op.relu) + 128
        parameters[layout.PADDING] = (source.per_tensor.zero_point + 128) * 0x00010101
        read = node.inputs[0]
        if relu:
            read = self.graph.node(read).inputs[0]
            parameters[layout.RELU_ZERO] = self.graph.type_of(read).per_tensor.zero_point + 128
        constants = (
            Weights(np.concatenate(packed)),
            Weights(np.concatenate(biases)),
            Weights(_in_lanes(isa, pad_to(multipliers, total))),
        )
        return producer, constants, self._activation(read), height * width * 9 * channels

    def _depthwise(self, node: ir.Node) -> list[KernelCall]:
        assert isinstance(node.op, ir.DepthwiseConv2d)
        isa, op, target = self.isa, node.op, self._activation(node.name)
        parameters = np.zeros(layout.PARAMETERS, np.int32)
        if self._is_banded(node):
            banded, constants, x, macs = self._depthwise_producer(node, parameters)
            alone = DepthwiseAlone(isa, banded)
            operands: tuple[Activation | Weights, ...] = (x, *constants, Weights(parameters), target)
            return [
                KernelCall(
                    alone.symbol,
                    alone.build,
                    operands,
                    target.name,
                    node.name,
                    path=node.path,
                    macs=macs,
                    tasks=alone.tasks,
                )
            ]
        source = self.graph.type_of(node.inputs[0])
        taps = self.graph.constants[node.inputs[1]].data.astype(np.int32)
        bias = self.graph.constants[node.inputs[2]].data
        (kh, kw, channels), (_, height, width, _) = taps.shape, source.shape
        _, out_height, out_width, _ = node.type.shape
        _, multipliers, bounded = self._biases(node, taps.reshape(kh * kw, channels).T.astype(np.int64))
        padding = (op.padding[0], op.padding[2])
        kernel = DepthwiseAny(
            isa, height, width, channels, (kh, kw), op.strides, padding, out_height, out_width, bounded
        )
        total = kernel.chunks * isa.bytes
        parameters[0] = source.per_tensor.zero_point + 128
        parameters[layout.ROW_ZERO] = node.type.per_tensor.zero_point + 128
        parameters[layout.ROW_LOW] = arithmetic.lower_bound(node.type.per_tensor.zero_point, op.relu) + 128
        in_lanes = [_in_lanes(isa, pad_to(tap, total)) for tap in taps.reshape(kh * kw, channels)]
        operands = (
            self._activation(node.inputs[0]),
            Weights(np.concatenate(in_lanes)),
            Weights(_in_lanes(isa, pad_to(bias, total))),
            Weights(_in_lanes(isa, pad_to(multipliers, total))),
            Weights(parameters),
            target,
        )
        macs = out_height * out_width * kh * kw * channels
        return [
            KernelCall(
                kernel.symbol,
                kernel.build,
                operands,
                target.name,
                node.name,
                path=node.path,
                macs=macs,
                tasks=out_height,
            )
        ]

    # The others.

    def _max_pool(self, node: ir.Node, op: ir.MaxPool2d) -> KernelCall:
        _, height, width, channels = self.graph.type_of(node.inputs[0]).shape
        _, out_height, out_width, _ = node.type.shape
        if any(pad >= size for pad, size in zip(op.padding, (op.kernel[0],) * 2 + (op.kernel[1],) * 2, strict=True)):
            raise ir.GraphError(f"{node.name}: a pooling window lies in the padding alone", node.name, node.path)
        kernel = MaxPool(
            self.isa,
            height,
            width,
            channels,
            op.kernel,
            op.strides,
            (op.padding[0], op.padding[2]),
            out_height,
            out_width,
        )
        target = self._activation(node.name)
        operands = (self._activation(node.inputs[0]), target)
        return KernelCall(
            kernel.symbol, kernel.build, operands, target.name, node.name, path=node.path, tasks=out_height
        )

    def _elementwise(self, node: ir.Node) -> KernelCall:
        sources = [self.graph.type_of(name).per_tensor for name in node.inputs]
        out = node.type.per_tensor
        parameters = np.zeros(6, np.int64)
        if isinstance(node.op, ir.Relu):
            kind = "relu"
            parameters[0] = sources[0].zero_point + 128
        else:
            relu = isinstance(node.op, ir.Add) and node.op.relu
            parameters[0] = out.zero_point + 128
            parameters[1] = arithmetic.lower_bound(out.zero_point, relu) + 128
            if isinstance(node.op, ir.Add):
                kind = "add"
                a, b = sources
                c = arithmetic.add_constants(a.scale, a.zero_point, b.scale, b.zero_point, out.scale)
                bias = c.bias - 128 * (c.a_multiplier + c.b_multiplier)
                parameters[2:] = c.a_multiplier, c.b_multiplier, bias, c.shift
            else:
                kind = "requantize"
                k = arithmetic.requantize_multiplier(sources[0].scale, out.scale)
                parameters[2], parameters[4] = k, 128 - (128 + sources[0].zero_point) * k
        target = self._activation(node.name)
        kernel = Elementwise(self.isa, kind, target.count)
        inputs = [self._activation(name) for name in node.inputs]
        operands: tuple[Activation | Weights, ...] = (*inputs, Weights(wrap_int32(parameters)), target)
        return KernelCall(
            kernel.symbol, kernel.build, operands, target.name, node.name, path=node.path, tasks=kernel.tasks
        )

    def _average_pool(self, node: ir.Node) -> KernelCall:
        source, out = self.graph.type_of(node.inputs[0]), node.type.per_tensor
        pixels, channels = _pixels(source.shape)
        m = arithmetic.average_multiplier(source.per_tensor.scale, out.scale, pixels)
        kernel = AveragePool(self.isa, pixels, channels, bool(float(m) * 255 * pixels < INT32_LIMIT))
        parameters = np.zeros(6, np.int64)
        parameters[:3] = out.zero_point + 128, 0, -(128 + source.per_tensor.zero_point) * pixels
        target = self._activation(node.name)
        operands = (
            self._activation(node.inputs[0]),
            Weights(wrap_int32(parameters)),
            Weights(m.reshape(1)),
            target,
        )
        return KernelCall(
            kernel.symbol, kernel.build, operands, target.name, node.name, path=node.path, tasks=kernel.tasks
        )


def _pixels(shape: tuple[int, ...]) -> tuple[int, int]:
    """Pixels and channels of (1, H, W, C) or (1, C)."""
    return (shape[1] * shape[2], shape[3]) if len(shape) == 4 else (1, shape[1])


def _is_pointwise(graph: ir.Graph, node: ir.Node) -> bool:
    op = node.op
    return (
        isinstance(op, ir.Conv2d)
        and graph.constants[node.inputs[1]].type.shape[1:3] == (1, 1)
        and op.strides == (1, 1)
        and not any(op.padding)
    )


def _pack_matrix(isa: Isa, matrix: NDArray[np.int64], order: NDArray[np.int64]) -> Weights:
    """(N, K) in panels of columns: panel, group of products, column in ``order``, product within the group."""
    channels, k = matrix.shape
    steps = layout.ceil_div(k, isa.group)
    padded = np.zeros((order.size, steps * isa.group), isa.weight)
    padded[:channels, :k] = matrix
    columns = padded[order].reshape(order.size, steps, isa.group)
    panels = [
        columns[first : first + vectors * isa.words].transpose(1, 0, 2).reshape(-1)
        for first, vectors in panel_starts(isa, channels)
    ]
    return Weights(np.concatenate(panels))


def _in_lanes(isa: Isa, values: Array) -> Array:
    """Per-channel constants in the order of unpacked vectors, chunk by chunk."""
    return values.reshape(-1, isa.bytes)[:, lane_order(isa).reshape(-1)].reshape(-1)


def _pack_taps(isa: Isa, taps: NDArray[np.int64], total: int) -> Array:
    """(3, 3, C) -> per chunk of channels, per column of taps, per vector: the words' (row 0, row 1, row 2, 0)."""
    padded = np.zeros((4, 3, total), isa.weight)
    padded[:3, :, : taps.shape[2]] = taps
    words = padded.reshape(4, 3, -1, isa.bytes)[..., lane_order(isa)]  # row, column, chunk, vector, word
    words = words.transpose(2, 1, 3, 4, 0)  # chunk, column, vector, word, row
    if isa.vnni:
        return words.reshape(-1)
    pairs = words[..., [[0, 2], [1, 3]]]  # chunk, column, vector, word, half, pair
    return pairs.transpose(0, 1, 2, 4, 3, 5).reshape(-1)


def pixels_per_task(pixels: int, k: int) -> int:
    """The run of pixels a task owns: even over 1, 2 and 4 threads, in full register blocks, in the nearer caches.

    A model of the waste, in shares of the whole: threads that wait, rows missing in register blocks, and per task the
    columns that two neighbours both interleave.
    """

    def waste(count: int) -> float:
        tasks = -(-pixels // count)
        alone, two, four = (min(-(-tasks // threads) * count, pixels) * threads / pixels for threads in (1, 2, 4))
        missing = -(-count // LARGEST_BLOCK) * LARGEST_BLOCK / count - 1
        return 0.4 * alone + 0.4 * two + 0.2 * four + 0.05 * missing + 0.15 / count

    largest = max(LARGEST_BLOCK, min(pixels, 72 * 1024 // k, 192))
    return min(range(min(LARGEST_BLOCK, pixels), largest + 1), key=waste)
