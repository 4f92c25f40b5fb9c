"""Lowers the units of an int8 graph to kernels for AArch64: i8mm, dot product or plain NEON, the widest that the target
has.

Between kernels a tensor is NHWC int8 with its channels padded to a multiple of 16; what the added channels hold is
undefined, and weights are zero there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ....models import graph as ir
from ....runtime import arithmetic
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
from ...fusion import RULES, units
from ..batch import JOINED
from ..kernel_call import Activation, KernelCall, TaskSize, Weights, check_one_image, pad_to, task_size, wrap_int32
from . import convolution, depthwise, depthwise_dot, elementwise, epilogue, int16_sums, resample
from .gemm import BLOCKS, ROW_STEP, Block, choose_block, pack_weights
from .layout import LANES, stored_channels, stored_size, tap_pitch

_BAND_BYTES = 96 << 10  # of packed pixels: they are read once for every panel of output channels
_MIN_TASKS = 4  # cores that share a layer

Kernel = (
    convolution.ConvolutionShape
    | convolution.DepthwiseAlone
    | elementwise.ShiftedSum
    | elementwise.LimbSum
    | elementwise.Relu
    | elementwise.Lookup
    | elementwise.MaxPool
    | elementwise.Average
    | resample.Multiply
    | resample.Interpolate
    | resample.Select
    | resample.Join
)


def lower(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> tuple[KernelCall, ...]:
    """The kernel calls of an int8 graph, with measured task sizes where ``choices`` has them.

    Raises ir.GraphError where an operator has no int8 kernel, or a batch is larger than one, ValueError for a choice
    that cannot be.
    """
    check_one_image(graph)
    lowering = _Lowering(graph, choose_block(target.features), choices)
    for unit in units(graph, RULES["arm"]):
        lowering.add(unit)
    return tuple(lowering.calls)


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: its activation, and the bytes from pixel to pixel."""

    activation: Activation
    stride: int


@dataclass(frozen=True)
class _Lowered:
    """A unit's kernel, and its operands between the tensors that the unit reads and the one that it makes."""

    kernel: Kernel
    constants: tuple[Weights, ...] = ()
    size: TaskSize | None = None


class _Lowering:
    """The calls so far, and where their tensors lie."""

    def __init__(self, graph: ir.Graph, block: Block, choices: Mapping[str, int] | None) -> None:
        self.graph, self.block, self.choices = graph, block, choices
        self.calls: list[KernelCall] = []
        self.stored: dict[str, _Stored] = {}
        for node in graph.inputs:
            plain = Activation(node.name, "int8", math.prod(node.type.shape))
            self.stored[node.name] = _Stored(plain, node.type.shape[-1])

    def add(self, unit: Unit) -> None:
        """Appends a unit's calls; a network output is brought to plain NHWC."""
        match unit.anchor:
            case Joining():
                self._join(unit, unit.anchor)
            case Flattening():
                self._flatten(unit, unit.anchor)
            case Convolution(geometry=geometry) if not unit.prologue and geometry.dilation[1] == 1:
                self._compute(unit, [self.stored[unit.inputs[0]]])
            case _:
                self._compute(unit, [self._padded(name) for name in unit.inputs])

    def _compute(self, unit: Unit, inputs: list[_Stored]) -> None:
        """A call that makes a unit's tensor of ``inputs``."""
        lowered, made = _lower_unit(unit, inputs[0].stride, self.block, self.choices), self._made(unit)
        self._call(unit, lowered, inputs, made)
        self._keep(unit, made)

    def _join(self, unit: Unit, stage: Joining) -> None:
        """Some tensors at a time, each time behind those that are together already."""
        parts = [(self._padded(name), n) for name, n in zip(unit.inputs, stage.channels, strict=True)]
        made = self._made(unit)
        while True:
            some, parts = parts[:JOINED], parts[JOINED:]
            join, inputs = _joined(stage.geometry.out_pixels, [n for _, n in some]), [x for x, _ in some]
            if not parts:
                break
            part = Activation(f"{unit.name}.{len(parts)}", "int8", join.pixels * join.stride)
            self._call(unit, _Lowered(join), inputs, part)
            parts.insert(0, (_Stored(part, join.stride), sum(n for _, n in some)))
        self._call(unit, _Lowered(join), inputs, made)
        self._keep(unit, made)

    def _flatten(self, unit: Unit, stage: Flattening) -> None:
        """The same bytes where every image is one pixel, or its pixels lie side by side."""
        g, x = stage.geometry, self.stored[unit.inputs[0]]
        if g.in_pixels > 1 and x.stride != g.in_channels:
            made = self._made(unit)
            part = resample.Part(g.in_channels, x.stride, 0)
            self._call(unit, _Lowered(resample.Join((part,), g.in_pixels, g.in_channels)), [x], made)
            self._keep(unit, made)
            return
        self.stored[unit.name] = _Stored(x.activation, x.stride if g.in_pixels == 1 else g.out_channels)
        if unit.name in self.graph.outputs:
            plain = Activation(unit.name, "int8", g.out_channels)
            self._copy(unit.name, x.activation, plain, g.out_channels)

    def _made(self, unit: Unit) -> Activation:
        """What a unit's kernel writes: the unit's tensor as it is stored, if that is not a network output's form."""
        geometry = unit.last.geometry
        exported = unit.name in self.graph.outputs and geometry.out_channels % LANES
        return Activation(f"{unit.name}.padded" if exported else unit.name, "int8", stored_size(geometry))

    def _keep(self, unit: Unit, made: Activation) -> None:
        """Where a unit's tensor lies from now on; a network output is brought to plain NHWC."""
        geometry = unit.last.geometry
        self.stored[unit.name] = _Stored(made, stored_channels(geometry.out_channels))
        if unit.name in self.graph.outputs and made.name != unit.name:
            plain = Activation(unit.name, "int8", geometry.out_pixels * geometry.out_channels)
            self._copy(unit.name, made, plain, geometry.out_channels)

    def _call(self, unit: Unit, lowered: _Lowered, inputs: list[_Stored], made: Activation) -> None:
        self.calls.append(
            KernelCall(
                lowered.kernel.symbol,
                lowered.kernel.build,
                (*(x.activation for x in inputs), *lowered.constants, made),
                made.name,
                unit.name,
                unit.kind,
                unit.path,
                macs=unit.macs,
                tasks=lowered.kernel.tasks,
                size=lowered.size,
            )
        )

    def _padded(self, name: str) -> _Stored:
        """A tensor with whole vectors of channels; a network input that has not is copied once."""
        stored = self.stored[name]
        if stored.stride % LANES:
            pixels = stored.activation.count // stored.stride
            stride = stored_channels(stored.stride)
            padded = Activation(f"{name}.padded", "int8", pixels * stride)
            self._copy(name, stored.activation, padded, stored.stride)
            self.stored[name] = stored = _Stored(padded, stride)
        return stored

    def _copy(self, name: str, source: Activation, target: Activation, channels: int) -> None:
        """From one pixel stride to another."""
        pixels = min(source.count, target.count) // channels
        kernel = elementwise.Restride(pixels, channels, source.count // pixels, target.count // pixels)
        path = self.graph.node(name).path
        self.calls.append(KernelCall(kernel.symbol, kernel.build, (source, target), target.name, name, path=path))


def _lower_unit(unit: Unit, in_stride: int, block: Block, choices: Mapping[str, int] | None) -> _Lowered:
    """``in_stride``: bytes from pixel to pixel of the input."""
    stage = unit.anchor
    match stage:
        case Convolution():
            return _convolution(unit, stage, in_stride, block, choices)
        case DepthwiseConvolution():
            rows = max(1, -(-stage.geometry.out_height // _MIN_TASKS))
            shape = _depthwise_shape(stage, unit.rectifier)
            constants = (*_depthwise_weights(stage, by_dot=False), _int32(*_zero_points(stage, unit.rectifier)))
            return _Lowered(convolution.DepthwiseAlone(shape, rows), constants)
        case Addition():
            return _addition(stage)
        case Rectifier():
            assert stage.zero_point is not None
            return _Lowered(elementwise.Relu(stored_size(stage.geometry)), (_int32(stage.zero_point),))
        case MaxPool():
            return _Lowered(elementwise.MaxPool(stage.geometry))
        case Mean():
            assert stage.integers is not None
            average = elementwise.Average(stage.geometry.in_pixels, stored_channels(stage.geometry.in_channels))
            multiplier = Weights(stage.integers.multiplier.reshape(1))
            return _Lowered(average, (multiplier, _int32(-stage.integers.start, stage.integers.zero_point)))
        case Table():
            assert stage.table is not None
            return _Lowered(elementwise.Lookup(stored_size(stage.geometry)), (Weights(np.roll(stage.table, 128)),))
        case Multiplication():
            assert stage.integers is not None
            i, gate = stage.integers, stored_channels(stage.geometry.in_channels) if stage.gate else 0
            constants = (Weights(i.multiplier.reshape(1)), _int32(i.a_zero, i.b_zero, i.zero_point))
            return _Lowered(resample.Multiply(stored_size(stage.geometry), gate), constants)
        case Interpolation() | Selection():
            resize = resample.Interpolate if isinstance(stage, Interpolation) else resample.Select
            taps = (Weights(stage.rows.reshape(-1)), Weights(stage.columns.reshape(-1)))
            return _Lowered(resize(stage.geometry), taps)
    raise ir.GraphError(f"{unit.name}: no ARM kernel for a {unit.kind}", unit.name, unit.path)


def _convolution(
    unit: Unit, stage: Convolution, in_stride: int, block: Block, choices: Mapping[str, int] | None
) -> _Lowered:
    integers, prologue = _integers(stage), unit.depthwise
    draft = convolution.ConvolutionShape(
        block.isa, stage.geometry, in_stride, _clamps(integers), _range(integers), 1,
        _depthwise_shape(prologue, unit.rectifier) if prologue else None,
    )  # fmt: skip
    shape, size = _with_tasks(draft), None
    if shape.splits == 1:
        key = replace(shape, rows_per_task=0).symbol
        size = task_size(choices, key, shape.rows_per_task, stage.geometry.out_height, 1)
        shape = replace(shape, rows_per_task=size.value)
    packed = _patch_weights(stage.weights, shape)
    width = -(-stage.geometry.out_channels // block.channels) * block.channels
    corrections: tuple[Weights, ...] = ()
    if block.isa == "neon" and shape.splits == 1:
        parts = int16_sums.split(packed)
        if int16_sums.pays(parts, max(convolution.band_pixels(shape))):
            shape, packed = replace(shape, chained=True), parts.chained
            corrections = _corrections(parts, width)
    by_dot = prologue is not None and depthwise_dot.applies(block.isa, prologue.geometry)
    constants = (
        *(_depthwise_weights(prologue, by_dot) if prologue else ()),
        Weights(pack_weights(block, packed)),
        *_scaling(integers, width),
        *corrections,
        _int32(integers.padding, integers.zero_point, 0, *(_zero_points(prologue, unit.rectifier) if prologue else ())),
    )
    return _Lowered(shape, constants, size)


def _depthwise_shape(stage: DepthwiseConvolution, rectifier: Rectifier | None) -> depthwise.DepthwiseShape:
    integers = _integers(stage)
    return depthwise.DepthwiseShape(stage.geometry, _clamps(integers), rectifier is not None, _range(integers))


def _depthwise_weights(stage: DepthwiseConvolution, by_dot: bool) -> tuple[Weights, ...]:
    """Weights, starts and multipliers; ``by_dot``: for ``depthwise_dot``."""
    channels = stored_channels(stage.geometry.in_channels)
    pack_taps = depthwise_dot.pack_weights if by_dot else depthwise.pack_weights
    packed = Weights(pack_taps(stage.weights.astype(np.int8, copy=False), channels))
    return (packed, *_scaling(_integers(stage), channels))


def _zero_points(stage: DepthwiseConvolution, rectifier: Rectifier | None) -> tuple[int, int, int]:
    """Of a depthwise convolution's input, of its output, and of the input before the prologue's ReLU."""
    integers = _integers(stage)
    before = integers.padding if rectifier is None or rectifier.zero_point is None else rectifier.zero_point
    return integers.padding, integers.zero_point, before


def _addition(stage: Addition) -> _Lowered:
    integers = stage.integers
    assert integers is not None
    c, count, relu = integers.constants, stored_size(stage.geometry), integers.low > arithmetic.INT8_MIN
    if limbs := elementwise.limbs(*c, integers.zero_point):
        return _Lowered(elementwise.LimbSum(count, c.shift, relu), (_int32(*limbs),))
    constants = _int32(c.a_multiplier, c.b_multiplier, c.bias, -c.shift, integers.zero_point)
    return _Lowered(elementwise.ShiftedSum(count, relu), (constants,))


def _int32(*values: int) -> Weights:
    return Weights(np.array(values, np.int32))


def _integers(stage: Convolution | DepthwiseConvolution) -> Scaling:
    assert stage.integers is not None
    return stage.integers


def _clamps(integers: Scaling) -> bool:
    """Whether a fused ReLU is an instruction: at a zero point of -128, saturation is the ReLU."""
    return integers.low > arithmetic.INT8_MIN


def _range(integers: Scaling) -> epilogue.Range:
    """With room for every rounding."""
    return epilogue.Range(bool(integers.largest.max() < 2**22), integers.largest_scaled < 32000)


def _scaling(integers: Scaling, width: int) -> tuple[Weights, Weights]:
    """What accumulators start at, and multipliers, zero beyond the output channels."""
    start = np.full(width, epilogue.MAGIC if _range(integers).fits23 else 0, np.int64)
    start[: integers.start.size] += integers.start
    return Weights(wrap_int32(start)), Weights(pad_to(integers.multipliers, width))


def _corrections(parts: int16_sums.Split, outputs: int) -> tuple[Weights, Weights]:
    """For ``outputs`` channels; one entry at least, so that there is something to point at."""
    starts = np.pad(parts.starts, (0, outputs + 1 - parts.starts.size), mode="edge")
    entries = parts.entries if parts.entries.size else np.zeros(1, np.int32)
    return Weights(starts), Weights(entries)


def _patch_weights(weights: NDArray[np.generic], shape: convolution.ConvolutionShape) -> NDArray[np.int8]:
    """(O, KH, KW, I) as (O, patch bytes), in the order in which a patch lies in a panel."""
    outputs, kh, kw, inputs = weights.shape
    if (kh, kw) == (1, 1):
        return weights.reshape(outputs, -1).astype(np.int8, copy=False)
    rows = np.zeros((outputs, kh, shape.patch_row_bytes), np.int8)
    pixels = np.zeros((outputs, kh, kw, shape.in_stride), np.int8)
    pixels[..., :inputs] = weights
    rows[:, :, : kw * shape.in_stride] = pixels.reshape(outputs, kh, -1)
    return rows.reshape(outputs, -1)


def _with_tasks(shape: convolution.ConvolutionShape) -> convolution.ConvolutionShape:
    """Bands of rows: few pixels wasted in a panel's last block, scratch that stays in the cache, work for four."""
    block, geometry = BLOCKS[shape.isa], shape.geometry
    height, width = geometry.out_height, geometry.out_width
    if height == 1 and shape.depthwise is None:
        return replace(shape, splits=min(2 * _MIN_TASKS, -(-geometry.out_channels // block.channels)))

    def cost(rows: int) -> float:
        full, last = divmod(height, rows)
        padded = sum(n * -(-r * width // ROW_STEP) * ROW_STEP for n, r in ((full, rows), (1, last)) if n and r)
        bands = full + (last > 0)
        idle = -(-bands // _MIN_TASKS) * _MIN_TASKS * rows / height  # the slowest core's share
        oversize = max(1.0, rows * width * shape.patch_bytes / _BAND_BYTES)
        halo = _halo(shape.depthwise.geometry, rows) if shape.depthwise else 0.0
        return padded / (height * width) + 0.1 * idle + 0.05 * oversize + 0.04 * halo + 0.01 * bands / height

    return replace(shape, rows_per_task=min(range(1, height + 1), key=cost))


def _joined(pixels: int, channels: Sequence[int]) -> resample.Join:
    """Of stored tensors of so many channels. Whole vectors are copied where a pixel has room for them: the next part's
    channels lie there."""
    stride, offset, parts = stored_channels(sum(channels)), 0, []
    for count in channels:
        parts.append(resample.Part(min(stored_channels(count), stride - offset), stored_channels(count), offset))
        offset += count
    return resample.Join(tuple(parts), pixels, stride)


def _halo(geometry: ir.Geometry, rows: int) -> float:
    """Rows staged for a band of ``rows`` output rows beyond those of one row of taps, to each of its rows."""
    return (geometry.kernel[0] - 1) * tap_pitch(geometry, rows) / rows
