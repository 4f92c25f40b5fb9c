"""Lowers an int8 graph to x86-64 kernels: how tensors are stored, how weights are packed, what a task does.

What shares a kernel is the row "x86" of ``fusion.RULES``. A tensor between kernels is stored as u = q + 128, NHWC, each
pixel padded to whole cache lines (``stored_channels``); the biases hold what that adds to a sum, 128 times the sum of a
channel's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....models import graph as ir
from ....runtime.plan import COPY
from ....runtime.units import (
    Addition,
    Convolution,
    DepthwiseConvolution,
    Flattening,
    Interpolation,
    Joining,
    MaxPool,
    Mean,
    Multiplication,
    Rectifier,
    Scaling,
    Selection,
    Table,
    Unit,
)
from ....targets.spec import TargetSpec
from ...fusion import RULES, is_banded, units
from ..batch import JOINED
from ..kernel_call import Activation, KernelCall, TaskSize, Weights, check_one_image, pad_to, task_size, wrap_int32
from . import conv, depthwise, elementwise, layout, resample
from .gather import Gather
from .layout import ceil_div, row_stride, stored_channels
from .product import LARGEST_BLOCK, Product, column_order, pack_matrix
from .vector import AVX2, AVX512VNNI, Isa, in_lanes

INT32_LIMIT = 2.0**31 - 2.0**8
PANEL_WEIGHTS = 3 << 18  # matrices larger than this are walked through once, by columns

Operands = tuple[Activation | Weights, ...]
Kernel = (
    conv.Convolution
    | Product
    | depthwise.DepthwiseAlone
    | depthwise.DepthwiseAny
    | elementwise.Elementwise
    | elementwise.MaxPool
    | elementwise.AveragePool
    | resample.Resize
    | resample.Join
)


def isa_of(target: TargetSpec) -> Isa:
    """Raises ValueError for a target without AVX2."""
    if "avx512vnni" in target.features:
        return AVX512VNNI
    if "avx2" in target.features:
        return AVX2
    raise ValueError(f"{target.name}: x86 kernels need avx2 or avx512vnni, the target has {target.features}")


def lower(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> tuple[KernelCall, ...]:
    """Given: an int8 graph of batch 1. Result: the straight line of kernel calls that computes it.

    ``choices`` are measured task sizes. Raises GraphError for what there is no kernel for, ValueError for a choice that
    cannot be.
    """
    check_one_image(graph)
    made = units(graph, RULES["x86"])
    stored = {name for unit in made for name in unit.inputs if not _reads_plain(unit)} | set(graph.outputs)
    lowering = _Lowering(graph, isa_of(target), choices, {node.name for node in graph.inputs} - stored)
    calls: list[KernelCall] = []
    for node in graph.inputs:
        if node.name in stored:
            calls.append(lowering.convert("import", node))
        if node.name in graph.outputs:
            calls.append(lowering.convert("export", node))
    for unit in made:
        calls += lowering.calls(unit)
        if unit.name in graph.outputs:
            calls.append(lowering.convert("export", unit.last.node))
    return tuple(calls)


def _reads_plain(unit: Unit) -> bool:
    """Whether a unit can read the network's input as it comes."""
    return isinstance(unit.first, Convolution) and isinstance(unit.first.node.op, ir.Conv2d)


@dataclass(frozen=True)
class _Rows:
    """What makes the rows of a convolution's product, with its operands and its words of parameters."""

    producer: conv.Producer
    operands: Operands
    parameters: Mapping[int, int]


@dataclass(frozen=True)
class _Lowering:
    """What decides how a unit becomes calls. ``plain`` are the inputs that stay as they come."""

    graph: ir.Graph
    isa: Isa
    choices: Mapping[str, int] | None
    plain: set[str]

    def calls(self, unit: Unit) -> list[KernelCall]:
        match unit.anchor:
            case Convolution():
                return self._convolution(unit, unit.anchor)
            case DepthwiseConvolution():
                return [self._depthwise(unit, unit.anchor)]
            case MaxPool():
                kernel = elementwise.MaxPool(self.isa, unit.anchor.geometry)
                return [self._call(unit, kernel, (self._activation(unit.inputs[0]),))]
            case Addition():
                return [self._addition(unit, unit.anchor)]
            case Rectifier():
                return [self._rectifier(unit, unit.anchor)]
            case Table():
                return [self._table(unit, unit.anchor)]
            case Mean():
                return [self._mean(unit, unit.anchor)]
            case Multiplication():
                return [self._multiplication(unit, unit.anchor)]
            case Interpolation() | Selection():
                return [self._resize(unit, unit.anchor)]
            case Joining():
                return self._joining(unit, unit.anchor)
            case Flattening():
                return self._flattening(unit, unit.anchor)
        raise ir.GraphError(f"{unit.name}: no x86 kernel for a {unit.kind}", unit.name, unit.path)

    # Where tensors lie.

    def _activation(self, name: str) -> Activation:
        """A tensor as kernels store it. The plain name is a network's input's or output's plain form."""
        while _is_alias(node := self.graph.node(name), self.graph):
            name = node.inputs[0]
        _, height, width, channels = ir.image_shape(self.graph.type_of(name).shape)
        if name in self.plain:
            return Activation(name, "int8", height * width * channels)
        end = isinstance(self.graph.node(name).op, ir.Input) or name in self.graph.outputs
        count = height * width * stored_channels(channels)
        return Activation(f"{name}:stored" if end else name, "uint8", count)

    def convert(self, kind: str, node: ir.Node) -> KernelCall:
        """``import``s an input of the network, or ``export``s an output."""
        _, height, width, channels = ir.image_shape(node.type.shape)
        kernel = elementwise.Convert(kind, height * width, channels)
        plain = Activation(node.name, "int8", height * width * channels)
        stored = self._activation(node.name)
        x, y = (plain, stored) if kind == "import" else (stored, plain)
        return KernelCall(kernel.symbol, kernel.build, (x, y), y.name, node.name, COPY, node.path, tasks=kernel.tasks)

    def _call(self, unit: Unit, kernel: Kernel, operands: Operands, size: TaskSize | None = None) -> KernelCall:
        y = self._activation(unit.name)
        return KernelCall(
            kernel.symbol, kernel.build, (*operands, y), y.name, unit.name, unit.kind, unit.path, unit.macs,
            kernel.tasks, size,
        )  # fmt: skip

    # Operators that multiply matrices.

    def _convolution(self, unit: Unit, stage: Convolution) -> list[KernelCall]:
        isa, integers = self.isa, _integers(stage)
        pixels, channels = stage.geometry.out_pixels, stage.geometry.out_channels
        rows = self._prologue(unit, unit.depthwise) if unit.depthwise else self._gather(stage)
        position = rows.producer.k_position(isa).reshape(-1)
        k = int(position.max()) + 1
        matrix = np.zeros((channels, k), np.int64)
        matrix[:, position] = stage.weights.reshape(channels, -1)
        order, bounded = column_order(isa, channels), _is_bounded(integers)
        out = {layout.OUT_ZERO: integers.zero_point + 128, layout.OUT_LOW: integers.low + 128}
        operands = (
            Weights(pack_matrix(isa, matrix)),
            Weights(pad_to(wrap_int32(integers.start - 128 * integers.weight_sums), order.size)[order]),
            Weights(pad_to(integers.multipliers, order.size)[order]),
            _parameters({**rows.parameters, **out}),
        )
        if matrix.size <= PANEL_WEIGHTS and pixels > 1:
            draft = conv.Convolution(isa, rows.producer, pixels, k, channels, 0, bounded)
            size = task_size(self.choices, draft.symbol, pixels_per_task(pixels, k), pixels, LARGEST_BLOCK)
            kernel = replace(draft, pixels_per_task=size.value)
            return [self._call(unit, kernel, (*rows.operands, *operands), size)]
        if isinstance(rows.producer, Gather) and isa.vnni and rows.producer.copies_nothing:
            product = Product(isa, pixels, k, channels, bounded, rows.producer.pixel_stride)
            return [self._call(unit, product, (*rows.operands, *operands))]
        first = self._rows_call(unit, rows, operands[-1], k)
        product = Product(isa, pixels, k, channels, bounded, row_stride(k))
        return [first, self._call(unit, product, (first.operands[-1], *operands))]

    def _rows_call(self, unit: Unit, rows: _Rows, parameters: Weights, k: int) -> KernelCall:
        """Writes the rows to memory."""
        source = self.graph.node(unit.anchor.node.inputs[0])
        kernel = conv.Rows(self.isa, rows.producer, unit.anchor.geometry.out_pixels, k)
        y = Activation(f"{unit.name}:rows", self.isa.operand, kernel.count)
        kind = "depthwise" if unit.depthwise else COPY
        operands = (*rows.operands, parameters, y)
        return KernelCall(
            kernel.symbol, kernel.build, operands, y.name, source.name, kind, source.path, tasks=kernel.tasks
        )

    def _gather(self, stage: Convolution) -> _Rows:
        """Rows of what the windows see."""
        x = self._activation(stage.node.inputs[0])
        producer = Gather(stage.geometry, plain=x.dtype == "int8")
        return _Rows(producer, (x,), {layout.PADDING: _integers(stage).padding + 128})

    def _prologue(self, unit: Unit, stage: DepthwiseConvolution) -> _Rows:
        """Rows of what a banded depthwise convolution makes."""
        isa, integers, taps = self.isa, _integers(stage), stage.weights.astype(np.int64)  # (3, 3, C)
        producer = depthwise.Depthwise(stage.geometry, unit.rectifier is not None, _is_bounded(integers))
        total = producer.chunks(isa) * isa.bytes
        packed, biases = [], []
        for variant in range(producer.variants):
            used = taps.copy()
            if variant == 1 or producer.variants == 1:
                used[0] = 0
            if variant == 2 or producer.variants == 1:
                used[2] = 0
            bias = stage.bias.astype(np.int64) - (128 + integers.padding) * used.sum(axis=(0, 1))
            packed.append(depthwise.pack_taps(isa, used, total))
            biases.append(in_lanes(isa, pad_to(wrap_int32(bias), total)))
        constants = (
            Weights(np.concatenate(packed)),
            Weights(np.concatenate(biases)),
            Weights(in_lanes(isa, pad_to(integers.multipliers, total))),
        )
        parameters = {
            layout.ROW_ZERO: integers.zero_point + 128,
            layout.ROW_LOW: integers.low + 128,
            layout.PADDING: (integers.padding + 128) * 0x00010101,
        }
        if unit.rectifier is not None:
            assert unit.rectifier.zero_point is not None
            parameters[layout.RELU_ZERO] = unit.rectifier.zero_point + 128
        return _Rows(producer, (self._activation(unit.inputs[0]), *constants), parameters)

    def _depthwise(self, unit: Unit, stage: DepthwiseConvolution) -> KernelCall:
        isa, integers = self.isa, _integers(stage)
        if is_banded(stage.geometry):
            rows = self._prologue(unit, stage)
            assert isinstance(rows.producer, depthwise.Depthwise)
            alone = depthwise.DepthwiseAlone(isa, rows.producer)
            return self._call(unit, alone, (*rows.operands, _parameters(rows.parameters)))
        kernel = depthwise.DepthwiseAny(isa, stage.geometry, _is_bounded(integers))
        total = kernel.chunks * isa.bytes
        taps = stage.weights.astype(np.int32).reshape(stage.geometry.taps, -1)
        operands = (
            self._activation(unit.inputs[0]),
            Weights(np.concatenate([in_lanes(isa, pad_to(tap, total)) for tap in taps])),
            Weights(in_lanes(isa, pad_to(stage.bias, total))),
            Weights(in_lanes(isa, pad_to(integers.multipliers, total))),
            _parameters(
                {
                    0: integers.padding + 128,
                    layout.ROW_ZERO: integers.zero_point + 128,
                    layout.ROW_LOW: integers.low + 128,
                }
            ),
        )
        return self._call(unit, kernel, operands)

    # The others.

    def _elementwise(self, unit: Unit, kind: str, constants: Weights, *, gate: bool = False) -> KernelCall:
        inputs = [self._activation(name) for name in unit.inputs]
        kernel = elementwise.Elementwise(self.isa, kind, inputs[0].count, inputs[1].count if gate else 0)
        return self._call(unit, kernel, (*inputs, constants))

    def _addition(self, unit: Unit, stage: Addition) -> KernelCall:
        assert stage.integers is not None
        c = stage.integers.constants
        bias = c.bias - 128 * (c.a_multiplier + c.b_multiplier)
        words = stage.integers.zero_point + 128, stage.integers.low + 128, c.a_multiplier, c.b_multiplier, bias, c.shift
        return self._elementwise(unit, "add", _parameters(dict(enumerate(words))))

    def _rectifier(self, unit: Unit, stage: Rectifier) -> KernelCall:
        assert stage.zero_point is not None
        return self._elementwise(unit, "relu", _parameters({0: stage.zero_point + 128}))

    def _table(self, unit: Unit, stage: Table) -> KernelCall:
        assert stage.table is not None
        return self._elementwise(unit, "lookup", Weights(elementwise.pack_table(self.isa, stage.table)))

    def _mean(self, unit: Unit, stage: Mean) -> KernelCall:
        assert stage.integers is not None
        pixels, multiplier = stage.geometry.in_pixels, stage.integers.multiplier
        bounded = bool(float(multiplier) * 255 * pixels < INT32_LIMIT)
        kernel = elementwise.AveragePool(self.isa, pixels, stage.geometry.in_channels, bounded)
        constants = (
            _parameters({0: stage.integers.zero_point + 128, 2: stage.integers.start - 128 * pixels}),
            Weights(multiplier.reshape(1)),
        )
        return self._call(unit, kernel, (self._activation(unit.inputs[0]), *constants))

    def _multiplication(self, unit: Unit, stage: Multiplication) -> KernelCall:
        i = stage.integers
        assert i is not None
        bits = int(i.multiplier.reshape(1).view(np.int32)[0])
        words = i.zero_point + 128, 0, i.a_zero + 128, i.b_zero + 128, bits
        return self._elementwise(unit, "multiply", _parameters(dict(enumerate(words))), gate=stage.gate)

    def _resize(self, unit: Unit, stage: Interpolation | Selection) -> KernelCall:
        kernel = resample.Resize(self.isa, stage.geometry, isinstance(stage, Interpolation))
        taps = Weights(stage.rows.reshape(-1)), Weights(stage.columns.reshape(-1))
        return self._call(unit, kernel, (self._activation(unit.inputs[0]), *taps))

    def _joining(self, unit: Unit, stage: Joining) -> list[KernelCall]:
        """Some tensors at a time, each time behind those that are together already."""
        pixels = stage.geometry.out_pixels
        calls: list[KernelCall] = []
        parts = [(self._activation(name), n) for name, n in zip(unit.inputs, stage.channels, strict=True)]
        while True:
            some, parts = parts[:JOINED], parts[JOINED:]
            kernel = _join(pixels, [channels for _, channels in some])
            call = self._call(unit, kernel, tuple(x for x, _ in some))
            if not parts:
                return [*calls, call]
            y = Activation(f"{unit.name}:{len(calls)}", "uint8", kernel.count)
            calls.append(replace(call, operands=(*call.operands[:-1], y), output=y.name))
            parts.insert(0, (y, sum(channels for _, channels in some)))

    def _flattening(self, unit: Unit, stage: Flattening) -> list[KernelCall]:
        if _is_alias(stage.node, self.graph):
            return []
        pixels, channels = stage.geometry.in_pixels, stage.geometry.in_channels
        part = resample.Part(channels, stored_channels(channels), 0)
        kernel = resample.Join((part,), pixels, channels, stored_channels(pixels * channels))
        return [self._call(unit, kernel, (self._activation(unit.inputs[0]),))]


def _join(pixels: int, channels: Sequence[int]) -> resample.Join:
    """Joins stored tensors of so many channels. Whole vectors are copied where a pixel has room for them: the next
    part's channels lie there."""
    stride, offset, parts = stored_channels(sum(channels)), 0, []
    for count in channels:
        own = stored_channels(count)
        parts.append(resample.Part(min(own, stride - offset), own, offset))
        offset += count
    return resample.Join(tuple(parts), pixels, stride, pixels * stride)


def _is_alias(node: ir.Node, graph: ir.Graph) -> bool:
    """Whether a flattened tensor is stored as the tensor that it flattens."""
    if not isinstance(node.op, ir.Reshape):
        return False
    _, height, width, channels = ir.image_shape(graph.type_of(node.inputs[0]).shape)
    return height * width == 1 or channels == stored_channels(channels)


def _integers(stage: Convolution | DepthwiseConvolution) -> Scaling:
    assert stage.integers is not None
    return stage.integers


def _is_bounded(integers: Scaling) -> bool:
    """Whether every accumulator times its multiplier fits int32, however it is rounded."""
    return integers.largest_scaled < INT32_LIMIT


def _parameters(words: Mapping[int, int]) -> Weights:
    """A kernel's scalars: a word at each index, modulo 2^32, and zero elsewhere."""
    values = np.zeros(layout.PARAMETERS, np.int64)
    values[list(words)] = list(words.values())
    return Weights(wrap_int32(values))


def pixels_per_task(pixels: int, k: int) -> int:
    """The run of pixels a task owns: even over 1, 2 and 4 threads, in full register blocks, in the nearer caches.

    A model of the waste, in shares of the whole: threads that wait, rows missing in register blocks, and per task the
    columns that two neighbours both interleave.
    """

    def waste(count: int) -> float:
        tasks = ceil_div(pixels, count)
        alone, two, four = (min(ceil_div(tasks, threads) * count, pixels) * threads / pixels for threads in (1, 2, 4))
        missing = ceil_div(count, LARGEST_BLOCK) * LARGEST_BLOCK / count - 1
        return 0.4 * alone + 0.4 * two + 0.2 * four + 0.05 * missing + 0.15 / count

    largest = max(LARGEST_BLOCK, min(pixels, 72 * 1024 // k, 192))
    return min(range(min(LARGEST_BLOCK, pixels), largest + 1), key=waste)
