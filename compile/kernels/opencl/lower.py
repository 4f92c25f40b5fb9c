"""Lowers the units of a graph to OpenCL kernels: how tensors are stored, which tile a kernel has, how weights lie.

An int8 graph becomes int8 kernels, bit for bit the integer contract. A float graph whose input is int8 pixels behind a
``Dequantize`` becomes float16 kernels: activations and weights in half, sums in float but for eight products at a time
where the device computes in half, outputs in float32.

A tensor between kernels is stored as ``element`` says. Padding is pixels of the input's zero point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ....models import graph as ir
from ....runtime import arithmetic
from ....runtime.plan import COPY, Launch
from ....runtime.units import (
    Addition,
    Convolution,
    DepthwiseConvolution,
    MaxPool,
    Mean,
    Rectifier,
    Table,
    Unit,
    Weighted,
)
from ....targets.spec import GpuSpec, TargetSpec
from ...fusion import RULES, units
from ..kernel_call import Activation, KernelCall, Weights, pad_to, wrap_int32
from . import convolution, elementwise, shapes
from . import element as words
from .channelwise import Channelwise
from .convolution import PLAIN_CHANNELS, Tile
from .element import FLOAT16, INT8, Element
from .elementwise import Convert, Elementwise, Linear, Lookup
from .tir import VECTOR_BYTES

Array = NDArray[np.generic]
Kernel = convolution.Convolution | Channelwise | Elementwise | Lookup | elementwise.Mean | Linear | Convert
Operands = tuple[Activation | Weights, ...]
_DRAFT = Tile(1, 1, 1, 1, False)  # before ``shapes`` has chosen


def lower(graph: ir.Graph, target: TargetSpec) -> tuple[KernelCall, ...]:
    """Given: an int8 graph, or a float one behind int8 pixels, of any batch size. Result: its launches in order.

    Raises GraphError for an operator, or a mixture of types, that there is no kernel for; ValueError for a target
    without a GPU.
    """
    if target.gpu is None:
        raise ValueError(f"{target.name}: OpenCL kernels are for GPUs, the target's engine is {target.engine}")
    for node in graph.nodes:
        if len(node.type.shape) not in (2, 4):
            raise ir.GraphError(f"{node.name}: no kernel for shape {node.type.shape}", node.name, node.path)
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
    """One walk over the units."""

    def __init__(self, graph: ir.Graph, gpu: GpuSpec, element: Element) -> None:
        self.graph, self.gpu, self.e = graph, gpu, element

    def calls(self) -> tuple[KernelCall, ...]:
        result: list[KernelCall] = []
        for node in self.graph.nodes:
            if isinstance(node.op, ir.Input) and not self._read_plain(node):
                result.append(self._import(node))
            if isinstance(node.op, ir.Input | ir.Dequantize) and node.name in self.graph.outputs:
                result.append(self._export(node))
        for unit in units(self.graph, RULES["opencl"]):
            result.append(self._unit(unit))
            node = unit.last.node
            if node.name in self.graph.outputs and not self._ends_plain(node):
                result.append(self._export(node))
        return tuple(result)

    def _unit(self, unit: Unit) -> KernelCall:
        kernel, operands = self._kernel(unit)
        node = unit.last.node
        target = self._plain(node) if self._ends_plain(node) else self._stored(node.name)
        return self._call(kernel, (*operands, target), node, unit.kind, unit.macs)

    def _kernel(self, unit: Unit) -> tuple[Kernel, Operands]:
        """A unit's kernel, and its operands but the tensor that it makes."""
        match unit.anchor:
            case Convolution(ir.Node(op=ir.FullyConnected())) as stage:
                return self._linear(unit, stage)
            case Convolution() as stage:
                return self._convolution(unit, stage)
            case DepthwiseConvolution() | MaxPool() as stage:
                return self._channelwise(unit, stage)
            case Addition() as stage:
                return self._addition(unit, stage)
            case Rectifier() as stage:
                return self._rectifier(unit, stage)
            case Mean() as stage:
                return self._mean(unit, stage)
            case Table() as stage:
                return self._table(unit, stage)
        raise ir.GraphError(f"{unit.name}: no OpenCL kernel for a {unit.kind}", unit.name, unit.path)

    def _call(self, kernel: Kernel, operands: Operands, node: ir.Node, kind: str, macs: int = 0) -> KernelCall:
        """``operands``: the last one is written."""
        output = operands[-1]
        assert isinstance(output, Activation)
        if isinstance(kernel, convolution.Convolution | Channelwise):
            shapes.check_local_memory(self.gpu, self.e, kernel.local_bytes, node.name)
        traffic_bytes = kernel.requested_bytes  # those of the other kinds load nothing twice
        if isinstance(kernel, convolution.Convolution | Channelwise | Linear | Lookup):
            traffic_bytes = kernel.traffic_bytes(shapes.cache_bytes(self.gpu))
        return KernelCall(
            kernel.symbol,
            kernel.build,
            operands,
            output.name,
            node.name,
            kind,
            node.path,
            macs,
            launch=Launch(kernel.groups, kernel.group_size),
            traffic_bytes=traffic_bytes,
            requested_bytes=kernel.requested_bytes,
        )

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

    def _stored(self, name: str) -> Activation:
        """A stored tensor. The plain name is that of a network input's or output's plain form."""
        node = self._source(name)
        batch, height, width, channels = ir.image_shape(node.type.shape)
        at_the_edge = isinstance(node.op, ir.Input) or node.name in self.graph.outputs
        count = self.e.size_bytes(batch, height * width, channels)
        return Activation(f"{node.name}:stored" if at_the_edge else node.name, "int8", count)

    def _plain(self, node: ir.Node) -> Activation:
        return Activation(node.name, node.type.dtype, math.prod(node.type.shape))

    def _import(self, node: ir.Node) -> KernelCall:
        batch, height, width, channels = ir.image_shape(node.type.shape)
        kernel = Convert("import", self.e, batch, height * width, channels)
        constants = () if self.e.integer else (_parameters(FLOAT16, self._meaning(node.name)),)
        return self._call(kernel, (self._plain(node), *constants, self._stored(node.name)), node, COPY)

    def _export(self, node: ir.Node) -> KernelCall:
        batch, height, width, channels = ir.image_shape(node.type.shape)
        kernel = Convert("export", self.e, batch, height * width, channels)
        return self._call(kernel, (self._stored(node.name), self._plain(node)), node, COPY)

    # Constants.

    def _meaning(self, name: str) -> dict[int, float]:
        """float16's parameters that make real values of the network's input, where ``name`` is that."""
        source = self._source(name)
        if not isinstance(source.op, ir.Input):
            return {}
        quant = source.type.per_tensor
        return {words.REAL_SCALE: quant.scale, words.REAL_OFFSET: quant.zero_point}

    def _ends(self, unit: Unit, stage: Weighted) -> Weights:
        """The parameters of a sum of products: of its pixels, of what follows it, the addition included."""
        integers = stage.integers
        values: dict[int, float]
        if integers is None:
            values = {words.REAL_LOW: 0.0 if stage.relu else -np.inf, **self._meaning(unit.inputs[0])}
        else:
            padding = _bytes(_padding(unit, stage))
            values = {words.ZERO: integers.zero_point, words.LOW: integers.low, words.PADDING: padding}
        return _parameters(self.e, values | (_of_addition(unit.addition) if unit.addition else {}))

    # Operators.

    def _convolution(self, unit: Unit, stage: Convolution) -> tuple[Kernel, Operands]:
        geometry, source = stage.geometry, self._source(unit.inputs[0])
        if geometry.one_to_one:
            in_pixels, out_pixels = geometry.in_pixels, geometry.out_pixels
            geometry = replace(geometry, in_height=1, in_width=in_pixels, out_height=1, out_width=out_pixels)
        plain = self._read_plain(source)
        draft = convolution.Convolution(self.e, geometry, plain, unit.addition is not None, _DRAFT)
        kernel = shapes.tile_of(self.gpu, draft)
        return kernel, (
            self._plain(source) if plain else self._stored(source.name),
            Weights(pack_weights(self.e, stage.weights, kernel.weights_shape)),
            *_sums(unit, stage, kernel.out_quads * 4),
            self._ends(unit, stage),
            *(self._stored(name) for name in unit.inputs[1:]),
        )

    def _linear(self, unit: Unit, stage: Convolution) -> tuple[Kernel, Operands]:
        geometry, plain = stage.geometry, self._ends_plain(stage.node)
        kernel = Linear(self.e, geometry.batch, geometry.in_channels, geometry.out_channels, plain)
        return kernel, (
            self._stored(unit.inputs[0]),
            Weights(pack_weights(self.e, stage.weights, kernel.weights_shape)),
            *_sums(unit, stage, kernel.out_quads * 4),
            self._ends(unit, stage),
        )

    def _channelwise(self, unit: Unit, stage: DepthwiseConvolution | MaxPool) -> tuple[Kernel, Operands]:
        kind = "depthwise" if isinstance(stage, DepthwiseConvolution) else "maxpool"
        draft = Channelwise(kind, self.e, stage.geometry, unit.rectifier is not None, (1, 1), 1)
        kernel, x = shapes.channelwise_tile(self.gpu, draft), self._stored(unit.inputs[0])
        if isinstance(stage, MaxPool):
            return kernel, (x,)
        taps = stage.weights.reshape(-1, stage.geometry.in_channels)
        start, *rest = _sums(unit, stage, kernel.blocks * self.e.lanes)
        multipliers = rest[1:]  # without the sums of weights
        return kernel, (x, Weights(pack_taps(self.e, taps)), start, *multipliers, self._ends(unit, stage))

    def _addition(self, unit: Unit, stage: Addition) -> tuple[Kernel, Operands]:
        inputs = [self._stored(name) for name in unit.inputs]
        constants = _parameters(self.e, _of_addition(stage))
        return Elementwise("add", self.e, inputs[0].count // VECTOR_BYTES), (*inputs, constants)

    def _rectifier(self, unit: Unit, stage: Rectifier) -> tuple[Kernel, Operands]:
        x = self._stored(unit.inputs[0])
        least = {words.REAL_LOW: 0.0} if stage.zero_point is None else {words.PADDING: _bytes(stage.zero_point)}
        return Elementwise("relu", self.e, x.count // VECTOR_BYTES), (x, _parameters(self.e, least))

    def _table(self, unit: Unit, stage: Table) -> tuple[Kernel, Operands]:
        x, node = self._stored(unit.inputs[0]), stage.node
        if stage.table is None:
            raise ir.GraphError(f"{node.name}: no float16 kernel for {type(node.op).__name__}", node.name, node.path)
        return Lookup(x.count // VECTOR_BYTES), (x, Weights(stage.table))

    def _mean(self, unit: Unit, stage: Mean) -> tuple[Kernel, Operands]:
        geometry, integers, x = stage.geometry, stage.integers, self._stored(unit.inputs[0])
        kernel = elementwise.Mean(self.e, geometry.batch, geometry.in_pixels, geometry.in_channels)
        if integers is None:
            return kernel, (x, _parameters(FLOAT16, {words.REAL_SCALE: 1.0 / geometry.in_pixels}))
        ends = {words.ZERO: integers.zero_point, words.LOW: arithmetic.INT8_MIN, words.ADD_BIAS: integers.start}
        return kernel, (x, _parameters(INT8, ends), Weights(np.repeat(integers.multiplier.reshape(1), 4)))


def _parameters(element: Element, values: Mapping[int, float]) -> Weights:
    """``values`` by the numbers that ``element`` gives them, 0 elsewhere."""
    ordered = [values.get(index, 0) for index in range(element.parameter_count)]
    return Weights(wrap_int32(np.array(ordered, np.int64)) if element.integer else np.array(ordered, np.float32))


def _of_addition(stage: Addition) -> dict[int, float]:
    """An addition's parameters, whether a kernel's own or its epilogue's."""
    if stage.integers is None:
        return {words.REAL_ADD_LOW: 0.0 if stage.relu else -np.inf}
    a, b, bias, shift = stage.integers.constants
    return {
        words.ADD_A: a, words.ADD_B: b, words.ADD_BIAS: bias, words.ADD_SHIFT: shift,
        words.ADD_ZERO: stage.integers.zero_point, words.ADD_LOW: stage.integers.low,
    }  # fmt: skip


def _bytes(value: int) -> int:
    """The word of four equal bytes."""
    return (value & 0xFF) * 0x01010101


def _padding(unit: Unit, stage: Weighted) -> int:
    """The zero point of what is multiplied: a prologue's ReLU is max(x, z), and leaves its input's."""
    assert stage.integers is not None
    rectifier = unit.rectifier
    return stage.integers.padding if rectifier is None or rectifier.zero_point is None else rectifier.zero_point


def _sums(unit: Unit, stage: Weighted, count: int) -> list[Weights]:
    """Biases and, of int8, sums of weights and multipliers, ``count`` of each."""
    integers = stage.integers
    if integers is None:
        return [Weights(pad_to(stage.bias.astype(np.float32), count))]
    start = integers.start + (integers.padding - _padding(unit, stage)) * integers.weight_sums
    sums = (wrap_int32(start), wrap_int32(integers.weight_sums), integers.multipliers)
    return [Weights(pad_to(values, count)) for values in sums]


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
