"""Lowers a graph to launches on an NVIDIA GPU: an int8 graph bit for bit by the contract, a float graph in float16.

Between kernels a pixel's channels are padded to a multiple of 32 bytes; the weights there are zero. The input zero
point is folded into the bias: sum (x - z) w + b = sum x w + (b - z sum w), exact modulo 2^32. What
shares a kernel is the row "cuda" of ``fusion.RULES``; where a depthwise convolution joins the pointwise one that reads
it, the cost model decides.

A float graph takes the same int8 input as the int8 graph, behind a ``Dequantize`` (``passes.take_int8_pixels``), and
gives float32. It is the rival the int8 build is compared with, not bound by the contract.
"""

from __future__ import annotations

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
    Flattening,
    Interpolation,
    Joining,
    MaxPool,
    Mean,
    Multiplication,
    Rectifier,
    Selection,
    Table,
    Unit,
    Weighted,
)
from ....targets.spec import GpuSpec, TargetSpec
from ...fusion import RULES, Prologue, Rules, units
from ..kernel_call import Activation, KernelCall, Weights, wrap_int32
from . import cost, elementwise, resample
from .depthwise import Depthwise, DepthwisePrologue, fits_dot, pack_rows, pack_taps
from .elementwise import Export, Lookup, Map, MatVec, Patches
from .epilogue import CONSTANTS
from .gemm import Gemm
from .gemm_kernel import GemmKernel
from .slice_layout import pack_weights
from .tir import ITEM_BYTES, WORD_LANES, Kernel
from .window import WindowLayout

PIXEL_BYTES = 32  # what a stored pixel's channels are padded to a multiple of
_VECTOR_ROWS = 8  # up to so many rows a product is a matrix by vectors
# Kernels number a tensor's values by int32, less what idle threads and rows of padding name beyond its end.
_MOST_VALUES = 2**31 - 2**20

Array = NDArray[np.generic]
Operands = tuple[Activation | Weights, ...]


def lower(graph: ir.Graph, target: TargetSpec) -> tuple[KernelCall, ...]:
    """The launches of a graph of any batch size, all int8 or all float32.

    Raises ir.GraphError where there is no kernel, ValueError for a target without a GPU.
    """
    if target.gpu is None:
        raise ValueError(f"{target.name} has no GPU")
    return _Lowering(graph, target.gpu).run()


def rules(graph: ir.Graph, target: TargetSpec) -> Rules:
    """What shares a kernel on the target's GPU: the family's row, and where a prologue pays there."""
    assert target.gpu is not None
    return _Lowering(graph, target.gpu).rules


def mode_of(arch: str) -> str:
    """How an architecture multiplies matrices: see ``gemm``. ``arch`` is sm_87 or the like."""
    number = int(arch.removeprefix("sm_"))
    return "mma" if number >= 80 else "wmma" if number >= 72 else "dot"


class _Lowering:
    """One pass over the units, appending launches."""

    def __init__(self, graph: ir.Graph, gpu: GpuSpec) -> None:
        self.graph, self.gpu = graph, gpu
        self.mode = mode_of(gpu.arch)
        self.dtype = "float16" if any(node.type.dtype == "float32" for node in graph.nodes) else "int8"
        # Tensors that are the network's input as it comes: plain int8 pixels.
        self.plain = {node.name: node for node in graph.nodes if self._check_kind(node)}
        self.calls: list[KernelCall] = []
        self.stored: dict[str, Activation] = {}
        self.rules = replace(RULES["cuda"], depthwise=self._prologue_pays)

    def run(self) -> tuple[KernelCall, ...]:
        for unit in units(self.graph, self.rules):
            self._lower(unit)
        return tuple(self.calls)

    def _lower(self, unit: Unit) -> None:
        match unit.anchor:
            case Convolution(ir.Node(op=ir.FullyConnected())):
                self._fully_connected(unit, unit.anchor)
            case Convolution():
                self._convolution(unit, unit.anchor)
            case DepthwiseConvolution():
                kernel = self._depthwise_kernel((*unit.prologue, unit.anchor))
                self._finish(unit, kernel, self._depthwise_operands(unit, unit.anchor, kernel))
            case Addition():
                self._addition(unit, unit.anchor)
            case Rectifier():
                self._rectifier(unit, unit.anchor)
            case Table():
                self._table(unit, unit.anchor)
            case MaxPool():
                pool = elementwise.MaxPool(self.dtype, self._window(unit.anchor.geometry))
                self._finish(unit, pool, (self._padded(unit.inputs[0]),))
            case Mean():
                self._mean(unit, unit.anchor)
            case Multiplication() if self.dtype == "int8":
                self._multiplication(unit, unit.anchor)
            case Interpolation() | Selection() if self.dtype == "int8":
                self._resize(unit, unit.anchor)
            case Joining() if self.dtype == "int8":
                self._joining(unit, unit.anchor)
            case Flattening() if self.dtype == "int8":
                self._flattening(unit, unit.anchor)
            case _:
                raise ir.GraphError(f"{unit.name}: no {self.dtype} CUDA kernel for a {unit.kind}", unit.name, unit.path)

    def _check_kind(self, node: ir.Node) -> bool:
        """Whether a tensor is the network's input. Raises GraphError for what kernels of this dtype cannot take."""
        if isinstance(node.op, ir.Input | ir.Dequantize) and node.name in self.graph.outputs:
            raise ir.GraphError(f"{node.name}: an input that is an output", node.name, node.path)
        if self.dtype == "int8":
            return isinstance(node.op, ir.Input)
        if isinstance(node.op, ir.Input):
            readers = self.graph.users(node.name)
            sound = node.type.dtype == "int8" and all(isinstance(reader.op, ir.Dequantize) for reader in readers)
        else:
            sound = node.type.dtype == "float32"
        if not sound:
            raise ir.GraphError(
                f"{node.name} is {node.type.dtype}; CUDA kernels take int8 graphs, or float32 ones of int8 inputs",
                node.name,
                node.path,
            )
        return isinstance(node.op, ir.Dequantize)

    def _check_size(self, name: str, operand: Activation | Weights) -> None:
        """Raises GraphError for a tensor whose values are too many to be numbered."""
        if isinstance(operand, Activation) and operand.count > _MOST_VALUES:
            batch = self.graph.inputs[0].type.shape[0]
            fitting = _MOST_VALUES // (operand.count // batch)
            raise ir.GraphError(
                f"{name}: a batch of {batch} images makes a tensor of {operand.count} values, more than CUDA "
                f"kernels can address ({_MOST_VALUES}): compile for a batch of {fitting} at most",
                name,
                self.graph.node(name).path,
            )

    # Where tensors lie.

    def _stored_channels(self, channels: int) -> int:
        lanes = PIXEL_BYTES // ITEM_BYTES[self.dtype]
        return -(-channels // lanes) * lanes

    def _padded(self, name: str) -> Activation:
        """A tensor as kernels store it; a network input is brought to that form once."""
        if name not in self.stored:
            shape = self.graph.type_of(name).shape
            pixels, channels = int(np.prod(shape[:-1])), shape[-1]
            row_bytes = self._stored_channels(channels) * ITEM_BYTES[self.dtype]
            window = WindowLayout(1, 1, pixels, 1, pixels, (1, 1), (1, 1), (0, 0), 0)
            activation = Activation(f"{name}.stored", self.dtype, pixels * self._stored_channels(channels))
            self._patches(name, name, window, row_bytes, activation)
            self.stored[name] = activation
        return self.stored[name]

    def _patches(self, of: str, name: str, window: WindowLayout, row_bytes: int, target: Activation) -> None:
        """Copies what ``window`` sees of the tensor ``name``, for the node ``of``."""
        kind = self.graph.type_of(name)
        channels = kind.shape[-1]
        zero: tuple[Weights, ...]
        if name in self.stored:
            source, x, stride = self.dtype, self.stored[name], self._stored_channels(channels)
            zero = (_int32(kind.per_tensor.zero_point if self.dtype == "int8" else 0),)
        else:
            pixels = self.plain[name]
            pixels = pixels if isinstance(pixels.op, ir.Input) else self.graph.node(pixels.inputs[0])
            source, stride = ("int8" if self.dtype == "int8" else "pixels"), channels
            x = Activation(pixels.name, "int8", int(np.prod(kind.shape)))
            zero = (_int32(pixels.type.per_tensor.zero_point),)
            if self.dtype == "float16":
                zero += (Weights(np.array([pixels.type.per_tensor.scale], np.float32)),)
        patches = Patches(self.dtype, source, window, channels, stride, row_bytes)
        self._append(patches, (x, *zero), target, of, COPY, self.graph.node(of).path)

    def _append(
        self, kernel: Kernel, operands: Operands, target: Activation, name: str, kind: str, path: str, macs: int = 0
    ) -> None:
        for operand in (*operands, target):
            self._check_size(name, operand)
        grid = kernel.grid
        self.calls.append(
            KernelCall(
                kernel.symbol, kernel.build, (*operands, target), target.name, name, kind, path, macs,
                launch=Launch((grid.blocks, 1, 1), (grid.threads, 1, 1), grid.shared_bytes),
                traffic_bytes=kernel.traffic_bytes,
            )
        )  # fmt: skip

    def _finish(self, unit: Unit, kernel: Kernel, operands: Operands) -> None:
        """Appends the launch that makes a unit's tensor; an output of the network is brought to plain NHWC."""
        target = self._target(unit)
        self._append(kernel, operands, target, unit.name, unit.kind, unit.path, unit.macs)
        self._keep(unit, target)

    def _target(self, unit: Unit) -> Activation:
        """Where a unit's tensor is made."""
        *pixels, channels = unit.last.node.type.shape
        stored = self._stored_channels(channels)
        plain = unit.name not in self.graph.outputs or (self.dtype == "int8" and stored == channels)
        return Activation(unit.name if plain else f"{unit.name}.stored", self.dtype, int(np.prod(pixels)) * stored)

    def _keep(self, unit: Unit, made: Activation) -> None:
        """A unit's tensor; an output of the network is brought to plain NHWC, where it is not made there."""
        self.stored[unit.name] = made
        if unit.name not in self.graph.outputs or made.name == unit.name:
            return
        *pixels, channels = unit.last.node.type.shape
        count = int(np.prod(pixels))
        export = Export(self.dtype, count, channels, self._stored_channels(channels))
        plain = Activation(unit.name, "int8" if self.dtype == "int8" else "float32", count * channels)
        self._append(export, (made,), plain, unit.name, COPY, unit.path)

    # Tiles.

    def _window(self, geometry: ir.Geometry) -> WindowLayout:
        pixel_bytes = self._stored_channels(geometry.in_channels) * ITEM_BYTES[self.dtype]
        before = (geometry.padding[0], geometry.padding[2])
        return WindowLayout(
            geometry.batch, geometry.in_height, geometry.in_width, geometry.out_height, geometry.out_width,
            geometry.kernel, geometry.strides, before, pixel_bytes, geometry.dilation,
        )  # fmt: skip

    def _depthwise_kernel(self, stages: Prologue) -> Depthwise:
        """Of a depthwise convolution, the last of ``stages``, behind the ReLU that it takes in."""
        depthwise = stages[-1]
        assert isinstance(depthwise, DepthwiseConvolution)
        window = self._window(depthwise.geometry)
        by_dot = self.gpu.dot_product and self.dtype == "int8" and fits_dot(window)
        return Depthwise(self.dtype, window, len(stages) > 1, by_dot, depthwise.relu and self.dtype == "float16")

    def _draft(self, stage: Convolution, window: WindowLayout, *, addition: bool = False) -> Gemm:
        """A product with the tile that the cost model prefers, over the rows of ``window``."""
        channels = self._stored_channels(stage.geometry.out_channels)
        relu = stage.relu and self.dtype == "float16"
        draft = Gemm(self.mode, self.dtype, window, channels, cost.tiles(self.mode)[0], None, addition, relu)
        return cost.with_best_tile(draft, self.gpu)

    def _prologue_pays(self, prologue: Prologue, pointwise: Convolution) -> bool:
        kernel = self._depthwise_kernel(prologue)
        if self.mode == "dot" or not fits_dot(kernel.window):
            return False
        alone = replace(pointwise, relu=False)
        draft = self._draft(alone, self._window(pointwise.geometry))
        return cost.prologue_pays(draft, DepthwisePrologue(kernel), self.gpu)

    # Units.

    def _convolution(self, unit: Unit, stage: Convolution) -> None:
        source, addition = stage.node.inputs[0], unit.addition
        window = self._window(stage.geometry)
        before: Operands
        if unit.depthwise is not None:
            kernel = self._depthwise_kernel(unit.prologue)
            draft = self._draft(stage, window, addition=addition is not None)
            gemm = cost.with_prologue(draft, DepthwisePrologue(kernel), self.gpu)
            before = self._depthwise_operands(unit, unit.depthwise, kernel)
            rows = _rows(stage.weights, kernel.window.pixel_bytes // ITEM_BYTES[self.dtype])
        else:
            gathered = any(stage.geometry.padding) or stage.geometry.dilation != (1, 1)
            if (source in self.plain and source not in self.stored) or gathered:
                window = self._gather(stage.node, window)
                before = (self.stored[f"{stage.node.name}.patches"],)
                rows = stage.weights.reshape(stage.weights.shape[0], -1)
            else:
                before = (self._padded(source),)
                rows = _rows(stage.weights, window.pixel_bytes // ITEM_BYTES[self.dtype])
            gemm = self._draft(stage, window, addition=addition is not None)
        if addition is not None and self.dtype == "float16":
            gemm = replace(gemm, relu_after_addition=addition.relu)
        constants = [*self._clamp(stage), *(self._addition_constants(addition) if addition is not None else [])]
        residual: Operands = (self._padded(addition.other),) if addition is not None else ()
        operands: Operands = (
            *before,
            Weights(pack_weights(gemm, rows)),
            *self._scaling(stage, gemm.columns),
            *(_padded_constants(constants) if self.dtype == "int8" else ()),
            *residual,
        )
        self._finish(unit, GemmKernel(gemm), operands)

    def _gather(self, node: ir.Node, window: WindowLayout) -> WindowLayout:
        """Launches what puts a convolution's patches side by side; the window over these."""
        channels = self.graph.type_of(node.inputs[0]).shape[-1]
        row_bytes = -(-window.taps * channels * ITEM_BYTES[self.dtype] // PIXEL_BYTES) * PIXEL_BYTES
        count = window.pixels * row_bytes // ITEM_BYTES[self.dtype]
        target = Activation(f"{node.name}.patches", self.dtype, count)
        self._patches(node.name, node.inputs[0], replace(window, pixel_bytes=0), row_bytes, target)
        self.stored[target.name] = target
        out = (window.out_height, window.out_width)
        return WindowLayout(window.batch, *out, *out, (1, 1), (1, 1), (0, 0), row_bytes)

    def _fully_connected(self, unit: Unit, stage: Convolution) -> None:
        weights, geometry = stage.weights.reshape(stage.weights.shape[0], -1), stage.geometry
        x = self._padded(unit.inputs[0])
        channels, depth = (self._stored_channels(count) for count in weights.shape)
        rows = np.zeros((channels, depth), self.dtype)
        rows[: weights.shape[0], : weights.shape[1]] = weights
        constants = self._clamp(stage)
        if geometry.batch <= _VECTOR_ROWS:
            relu = stage.relu and self.dtype == "float16"
            vector = MatVec(self.dtype, geometry.batch, depth * ITEM_BYTES[self.dtype], channels, relu)
            operands: Operands = (
                x,
                Weights(rows.reshape(-1).view(np.int32)),
                *self._scaling(stage, channels),
                *([_int32(*constants)] if constants else []),
            )
            self._finish(unit, vector, operands)
            return
        gemm = self._draft(stage, self._window(geometry))
        operands = (
            x,
            Weights(pack_weights(gemm, rows)),
            *self._scaling(stage, gemm.columns),
            *(_padded_constants(constants) if constants else ()),
        )
        self._finish(unit, GemmKernel(gemm), operands)

    def _depthwise_operands(self, unit: Unit, stage: DepthwiseConvolution, kernel: Depthwise) -> Operands:
        """The input, weights, and what follows the sum. The kernel's ReLU is max(x, zero point), so that it sums pixels
        of the ReLU's input."""
        x = self._padded(unit.inputs[0])
        channels = kernel.window.pixel_bytes // ITEM_BYTES[self.dtype]
        pack = pack_rows(stage.weights, channels) if kernel.by_dot else pack_taps(stage.weights, self.dtype, channels)
        if stage.integers is None:
            return (x, Weights(pack), *self._scaling(stage, channels))
        zero = stage.integers.padding
        if unit.rectifier is not None and unit.rectifier.zero_point is not None:
            zero = unit.rectifier.zero_point
        constants = _int32(*self._clamp(stage), int(np.int32(np.uint32((zero & 0xFF) * 0x01010101))))
        return (x, Weights(pack), *self._scaling(stage, channels, zero), constants)

    def _addition(self, unit: Unit, stage: Addition) -> None:
        a, b = (self._padded(name) for name in unit.inputs)
        kernel = elementwise.Add(self.dtype, a.count // WORD_LANES[self.dtype], stage.relu and self.dtype == "float16")
        constants = self._addition_constants(stage)
        self._finish(unit, kernel, (a, b, *([_int32(*constants)] if constants else [])))

    def _rectifier(self, unit: Unit, stage: Rectifier) -> None:
        x = self._padded(unit.inputs[0])
        operands: Operands = (x,)
        if stage.zero_point is not None:  # a requantization by 256 / 256, to the zero point -128
            operands = (x, _int32(256, 128 - stage.zero_point * 256, arithmetic.INT8_MIN))
        self._finish(unit, Map(self.dtype, x.count // WORD_LANES[self.dtype]), operands)

    def _table(self, unit: Unit, stage: Table) -> None:
        if stage.table is None:
            raise ir.GraphError(f"no float16 kernel for {stage.node.op}", stage.node.name, stage.node.path)
        x = self._padded(unit.inputs[0])
        # The table's first entry is that of the word's byte 0, which is x = 0.
        table = Weights(np.roll(stage.table, -128).view(np.int32))
        self._finish(unit, Lookup(x.count // WORD_LANES[self.dtype]), (x, table))

    def _mean(self, unit: Unit, stage: Mean) -> None:
        x, geometry = self._padded(unit.inputs[0]), stage.geometry
        words = self._stored_channels(geometry.in_channels) // WORD_LANES[self.dtype]
        kernel = elementwise.Mean(self.dtype, geometry.batch, geometry.in_pixels, words)
        operands: Operands = (x,)
        if stage.integers is not None:
            zero = stage.integers.zero_point
            clamp = (arithmetic.INT8_MIN - zero, arithmetic.INT8_MAX - zero, zero)
            operands = (x, Weights(stage.integers.multiplier.reshape(1)), _int32(-stage.integers.start, *clamp))
        self._finish(unit, kernel, operands)

    def _multiplication(self, unit: Unit, stage: Multiplication) -> None:
        i, geometry = stage.integers, stage.geometry
        assert i is not None
        words = self._stored_channels(geometry.in_channels) // WORD_LANES[self.dtype]
        kernel = resample.Multiply(geometry.batch, geometry.in_pixels, words, stage.gate)
        clamp = (arithmetic.INT8_MIN - i.zero_point, arithmetic.INT8_MAX - i.zero_point, i.zero_point)
        a, b = (self._padded(name) for name in unit.inputs)
        operands = (a, b, Weights(i.multiplier.reshape(1)), _int32(i.a_zero, i.b_zero, *clamp))
        self._finish(unit, kernel, operands)

    def _resize(self, unit: Unit, stage: Interpolation | Selection) -> None:
        g = stage.geometry
        words = self._stored_channels(g.in_channels) // WORD_LANES[self.dtype]
        bilinear = isinstance(stage, Interpolation)
        kernel = resample.Resize(bilinear, g.batch, g.in_height, g.in_width, g.out_height, g.out_width, words)
        taps = (Weights(stage.rows.reshape(-1)), Weights(stage.columns.reshape(-1)))
        self._finish(unit, kernel, (self._padded(unit.inputs[0]), *taps))

    def _joining(self, unit: Unit, stage: Joining) -> None:
        """A launch for each input."""
        g, offset = stage.geometry, 0
        stride = self._stored_channels(sum(stage.channels))
        target = self._target(unit)
        for name, channels in zip(unit.inputs, stage.channels, strict=True):
            x = self._padded(name)
            in_stride = self._stored_channels(channels)
            place = resample.Place(g.batch, g.in_pixels, channels, in_stride, g.in_pixels * stride, stride, offset)
            self._append(place, (x,), target, unit.name, unit.kind, unit.path)
            offset += channels
        self._keep(unit, target)

    def _flattening(self, unit: Unit, stage: Flattening) -> None:
        """The same bytes where every image is one pixel; else the pixels' channels are brought side by side."""
        g, x = stage.geometry, self._padded(unit.inputs[0])
        if g.in_pixels == 1:
            self._keep(unit, x)
            return
        stride = self._stored_channels(g.out_channels)
        in_stride = self._stored_channels(g.in_channels)
        place = resample.Place(g.batch, g.in_pixels, g.in_channels, in_stride, stride, g.in_channels, 0)
        self._finish(unit, place, (x,))

    # Constants.

    def _clamp(self, stage: Weighted) -> list[int]:
        """Least and greatest output less the zero point, and the zero point; nothing for floats."""
        if stage.integers is None:
            return []
        zero = stage.integers.zero_point
        return [stage.integers.low - zero, arithmetic.INT8_MAX - zero, zero]

    def _addition_constants(self, stage: Addition) -> list[int]:
        """Multipliers, bias, shift, least value and zero point; nothing for floats."""
        if stage.integers is None:
            return []
        return [*stage.integers.constants, stage.integers.low, stage.integers.zero_point]

    def _scaling(self, stage: Weighted, width: int, zero: int | None = None) -> tuple[Weights, ...]:
        """Biases, with the input's ``zero`` point (its own unless given) folded in, and multipliers; zero beyond the
        output channels. Floats have no multipliers."""
        channels = stage.bias.shape[0]
        if stage.integers is None:
            padded = np.zeros(width, np.float32)
            padded[:channels] = stage.bias
            return (Weights(padded),)
        integers = stage.integers
        zero = integers.padding if zero is None else zero
        folded = integers.start + (integers.padding - zero) * integers.weight_sums
        biases, multipliers = np.zeros(width, np.int32), np.zeros(width, np.float32)
        biases[:channels] = wrap_int32(folded)
        multipliers[:channels] = integers.multipliers
        return Weights(biases), Weights(multipliers)


def _int32(*values: int) -> Weights:
    return Weights(np.array(values, np.int32))


def _padded_constants(values: list[int]) -> tuple[Weights]:
    """As many as every product takes."""
    return (_int32(*values, *[0] * (CONSTANTS - len(values))),)


def _rows(weights: Array, stored_channels: int) -> Array:
    """(O, KH, KW, I) -> (O, KH * KW * stored channels), zero beyond I."""
    outputs, kh, kw, inputs = weights.shape
    rows = np.zeros((outputs, kh, kw, stored_channels), weights.dtype)
    rows[..., :inputs] = weights
    return rows.reshape(outputs, -1)
