"""Lowers an int8 graph to kernels for AArch64: i8mm, dot product or plain NEON, the widest that the target has.

Between kernels a tensor is NHWC int8 with its channels padded to a multiple of 16; what the added channels hold is
undefined, and weights are zero there. The input zero point is folded into the bias: sum (x - z) w + b =
sum x w + (b - z sum w), exact modulo 2^32. A stand-alone ReLU is computed while a depthwise convolution stages its
input, and a depthwise convolution in front of the pointwise convolution that follows it, where nothing else reads
what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from tvm.tirx import PrimFunc

from ....models import graph as ir
from ....runtime import arithmetic
from ....targets.spec import TargetSpec
from ..kernel_call import Activation, KernelCall, TaskSize, Weights, task_size
from . import convolution, depthwise, depthwise_dot, elementwise, epilogue, int16_sums
from .depthwise import LANES, DepthwiseShape, Window
from .gemm import BLOCKS, ROW_STEP, Block, choose_block, pack_weights

_BAND_BYTES = 96 << 10  # of packed pixels: they are read once for every panel of output channels
_MIN_TASKS = 4  # cores that share a layer


def lower(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> tuple[KernelCall, ...]:
    """The kernel calls of an int8 graph, with measured task sizes where ``choices`` has them.

    Raises ir.GraphError where an operator has no int8 kernel, or a batch is larger than one, ValueError for a choice
    that cannot be.
    """
    return _Lowering(graph, choose_block(target.features), choices).run()


def stored_channels(channels: int) -> int:
    """Channels as stored between kernels."""
    return -(-channels // LANES) * LANES


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies: its activation, and the bytes from pixel to pixel."""

    activation: Activation
    stride: int


class _Lowering:
    """One pass over the graph, appending calls."""

    def __init__(self, graph: ir.Graph, block: Block, choices: Mapping[str, int] | None) -> None:
        self.graph, self.block, self.choices = graph, block, choices
        self.calls: list[KernelCall] = []
        self.stored: dict[str, _Stored] = {}
        self.fused = _fused_nodes(graph)

    def run(self) -> tuple[KernelCall, ...]:
        for node in self.graph.nodes:
            if node.type.dtype != "int8" or node.type.shape[0] != 1:
                raise ir.GraphError(
                    f"{node.name} is {node.type.dtype}{list(node.type.shape)}; kernels take int8 and a batch of one",
                    node.name,
                    node.path,
                )
            if node.name not in self.fused:
                self._lower_node(node)
        return tuple(self.calls)

    def _lower_node(self, node: ir.Node) -> None:
        match node.op:
            case ir.Input():
                size = int(np.prod(node.type.shape))
                self.stored[node.name] = _Stored(Activation(node.name, "int8", size), node.type.shape[-1])
                return
            case ir.Conv2d() | ir.FullyConnected():
                self._convolution(node)
            case ir.DepthwiseConv2d():
                self._depthwise(node)
            case ir.Add():
                self._add(node)
            case ir.Lookup():
                self._requantize(node)
            case ir.Relu():
                x = self._padded(node.inputs[0])
                shape = elementwise.Relu(x.activation.count)
                constants = _int32(self.graph.type_of(node.inputs[0]).per_tensor.zero_point)
                tasks = elementwise.elementwise_tasks(shape.count)
                self._call(node, shape.symbol, shape.build, (x.activation, constants), tasks)
            case ir.MaxPool2d():
                window = _window(self.graph, node, node.op.kernel, node.op.strides, node.op.padding)
                if any(pad >= size for pad, size in zip(node.op.padding, np.repeat(node.op.kernel, 2), strict=True)):
                    raise ir.GraphError(
                        f"{node.name}: a window of the pooling lies in the padding", node.name, node.path
                    )
                x = self._padded(node.inputs[0])
                pool = elementwise.MaxPool(window, x.stride)
                self._call(node, pool.symbol, pool.build, (x.activation,), window.out_height)
            case ir.GlobalAveragePool():
                self._average(node)
            case _:
                raise ir.GraphError(f"no int8 kernel for {type(node.op).__name__}", node.name, node.path)

    def _call(
        self,
        node: ir.Node,
        symbol: str,
        build: Callable[[], PrimFunc],
        operands: tuple[Activation | Weights, ...],
        tasks: int,
        macs: int = 0,
        size: TaskSize | None = None,
    ) -> None:
        """Appends a call whose last operand is the node's tensor; a network output is brought to plain NHWC."""
        channels = node.type.shape[-1]
        pixels = int(np.prod(node.type.shape[:-1]))
        stride = stored_channels(channels)
        output = node.name in self.graph.outputs
        name = f"{node.name}.padded" if output and stride != channels else node.name
        stored = _Stored(Activation(name, "int8", pixels * stride), stride)
        self.calls.append(
            KernelCall(
                symbol,
                build,
                (*operands, stored.activation),
                name,
                node.name,
                path=node.path,
                macs=macs,
                tasks=tasks,
                size=size,
            )
        )
        self.stored[node.name] = stored
        if name != node.name:
            self._restride(node.name, stored.activation, Activation(node.name, "int8", pixels * channels), channels)

    def _restride(self, name: str, source: Activation, target: Activation, channels: int) -> None:
        """Copies a tensor from one pixel stride to another."""
        pixels = min(source.count, target.count) // channels
        shape = elementwise.Restride(pixels, channels, source.count // pixels, target.count // pixels)
        path = self.graph.node(name).path
        self.calls.append(KernelCall(shape.symbol, shape.build, (source, target), target.name, name, path=path))

    def _padded(self, name: str) -> _Stored:
        """A tensor with whole vectors of channels; a network input that has not is copied once."""
        stored = self.stored[name]
        if stored.stride % LANES:
            pixels = stored.activation.count // stored.stride
            stride = stored_channels(stored.stride)
            padded = Activation(f"{name}.padded", "int8", pixels * stride)
            self._restride(name, stored.activation, padded, stored.stride)
            self.stored[name] = stored = _Stored(padded, stride)
        return stored

    def _convolution(self, node: ir.Node) -> None:
        graph, op = self.graph, node.op
        source, front = node.inputs[0], None
        if source in self.fused:
            front = graph.node(source)
            shape_of_front, front_operands, front_constants = self._front(front, in_front=True)
            x, in_channels = (
                self._padded(_without_relu(graph, front, self.fused)),
                stored_channels(front.type.shape[-1]),
            )
        else:
            x = self.stored[source]
            in_channels = x.stride
        weights = graph.constants[node.inputs[1]].data
        outputs, inputs = weights.shape[0], weights.shape[-1]
        if isinstance(op, ir.Conv2d):
            window = _window(graph, node, (weights.shape[1], weights.shape[2]), op.strides, op.padding)
        else:
            window = Window(1, 1, 1, 1, (1, 1), (1, 1), (0, 0, 0, 0))
        relu = _clamps(node)
        draft = convolution.ConvolutionShape(
            self.block.isa, window, in_channels, inputs, outputs, stored_channels(outputs), relu,
            _range(graph, node), 1,
            shape_of_front if front else None,
        )  # fmt: skip
        shape, size = _with_tasks(draft), None
        if shape.splits == 1:
            size = task_size(
                self.choices, replace(shape, rows_per_task=0).symbol, shape.rows_per_task, window.out_height, 1
            )
            shape = replace(shape, rows_per_task=size.value)
        packed = _patch_weights(weights, in_channels, shape)
        width = -(-outputs // self.block.channels) * self.block.channels
        corrections: tuple[Weights, ...] = ()
        if self.block.isa == "neon" and shape.splits == 1:
            parts = int16_sums.split(packed)
            if int16_sums.pays(parts, max(convolution.band_pixels(shape))):
                shape, packed = replace(shape, chained=True), parts.chained
                corrections = _corrections(parts, width)
        bias, multipliers = _scaling(graph, node, width)
        zero_points = (graph.type_of(source).per_tensor.zero_point, node.type.per_tensor.zero_point)
        operands: tuple[Activation | Weights, ...] = (
            x.activation,
            *(front_operands if front else ()),
            Weights(pack_weights(self.block, packed)),
            bias,
            multipliers,
            *corrections,
            _int32(*zero_points, 0, *(front_constants if front else ())),
        )
        macs = window.out_height * window.out_width * int(weights.size)
        if front:
            macs += int(np.prod(front.type.shape)) * int(np.prod(graph.type_of(front.inputs[1]).shape[:2]))
        self._call(node, shape.symbol, partial(convolution.build, shape), operands, shape.tasks, macs, size)

    def _front(
        self, node: ir.Node, *, in_front: bool
    ) -> tuple[DepthwiseShape, tuple[Weights, ...], tuple[int, int, int]]:
        """A depthwise convolution's shape, its weights, and its three zero points."""
        graph, op = self.graph, node.op
        assert isinstance(op, ir.DepthwiseConv2d)
        weights = graph.constants[node.inputs[1]].data
        channels = stored_channels(weights.shape[2])
        window = _window(graph, node, (weights.shape[0], weights.shape[1]), op.strides, op.padding)
        after_relu = node.inputs[0] in self.fused
        shape = DepthwiseShape(window, channels, _clamps(node), after_relu, _range(graph, node))
        zeros = tuple(
            graph.type_of(name).per_tensor.zero_point
            for name in (node.inputs[0], node.name, _without_relu(graph, node, self.fused))
        )
        by_dot = in_front and depthwise_dot.applies(self.block.isa, window)
        pack_taps = depthwise_dot.pack_weights if by_dot else depthwise.pack_weights
        packed = Weights(pack_taps(weights.astype(np.int8, copy=False), channels))
        return shape, (packed, *_scaling(graph, node, channels)), (zeros[0], zeros[1], zeros[2])

    def _depthwise(self, node: ir.Node) -> None:
        shape, weights, constants = self._front(node, in_front=False)
        x = self._padded(_without_relu(self.graph, node, self.fused))
        rows = max(1, -(-shape.window.out_height // _MIN_TASKS))
        call = convolution.DepthwiseAlone(shape, rows)
        macs = int(np.prod(node.type.shape)) * shape.window.kernel[0] * shape.window.kernel[1]
        self._call(node, call.symbol, call.build, (x.activation, *weights, _int32(*constants)), call.tasks, macs)

    def _add(self, node: ir.Node) -> None:
        op = node.op
        assert isinstance(op, ir.Add)
        a, b = (self._padded(name) for name in node.inputs)
        qa, qb = (self.graph.type_of(name).per_tensor for name in node.inputs)
        out = node.type.per_tensor
        c = arithmetic.add_constants(qa.scale, qa.zero_point, qb.scale, qb.zero_point, out.scale)
        limbs = elementwise.limbs(*c, out.zero_point)
        shape: elementwise.LimbSum | elementwise.ShiftedSum
        if limbs:
            constants, shape = _int32(*limbs), elementwise.LimbSum(a.activation.count, c.shift, _clamps(node))
        else:
            constants = _int32(c.a_multiplier, c.b_multiplier, c.bias, -c.shift, out.zero_point)
            shape = elementwise.ShiftedSum(2, a.activation.count, _clamps(node))
        tasks = elementwise.elementwise_tasks(shape.count)
        self._call(node, shape.symbol, shape.build, (a.activation, b.activation, constants), tasks)

    def _requantize(self, node: ir.Node) -> None:
        x, q, out = self._padded(node.inputs[0]), self.graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
        k = arithmetic.requantize_multiplier(q.scale, out.scale)
        constants = _int32(k, 128 - q.zero_point * k, -8, out.zero_point)
        shape = elementwise.ShiftedSum(1, x.activation.count, False)
        tasks = elementwise.elementwise_tasks(shape.count)
        self._call(node, shape.symbol, shape.build, (x.activation, constants), tasks)

    def _average(self, node: ir.Node) -> None:
        x, q, out = self._padded(node.inputs[0]), self.graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
        pixels = x.activation.count // x.stride
        multiplier = Weights(arithmetic.average_multiplier(q.scale, out.scale, pixels).reshape(1))
        shape = elementwise.Average(pixels, x.stride)
        constants = _int32(pixels * q.zero_point, out.zero_point)
        self._call(node, shape.symbol, shape.build, (x.activation, multiplier, constants), x.stride // LANES)


def _int32(*values: int) -> Weights:
    return Weights(np.array(values, np.int32))


def _clamps(node: ir.Node) -> bool:
    """Whether a fused ReLU is an instruction: at a zero point of -128, saturation is the ReLU."""
    return bool(getattr(node.op, "relu", False)) and node.type.per_tensor.zero_point != arithmetic.INT8_MIN


def _corrections(parts: int16_sums.Split, outputs: int) -> tuple[Weights, Weights]:
    """For ``outputs`` channels; one entry at least, so that there is something to point at."""
    starts = np.pad(parts.starts, (0, outputs + 1 - parts.starts.size), mode="edge")
    entries = parts.entries if parts.entries.size else np.zeros(1, np.int32)
    return Weights(starts), Weights(entries)


def _only_reader(graph: ir.Graph, name: str) -> ir.Node | None:
    """The one node that reads a tensor, if it is one and the tensor is no output of the network."""
    users = graph.users(name)
    return users[0] if len(users) == 1 and name not in graph.outputs else None


def _is_pointwise(graph: ir.Graph, node: ir.Node) -> bool:
    return (
        isinstance(node.op, ir.Conv2d)
        and graph.type_of(node.inputs[1]).shape[1:3] == (1, 1)
        and node.op.strides == (1, 1)
        and not any(node.op.padding)
    )


def _fused_nodes(graph: ir.Graph) -> frozenset[str]:
    """Depthwise convolutions computed by the pointwise that reads them, and ReLUs by the depthwise."""
    fused = set()
    for node in graph.nodes:
        reader = _only_reader(graph, node.name)
        if reader is None:
            continue
        if isinstance(node.op, ir.DepthwiseConv2d) and _is_pointwise(graph, reader):
            fused.add(node.name)
        if isinstance(node.op, ir.Relu) and isinstance(reader.op, ir.DepthwiseConv2d):
            fused.add(node.name)
    return frozenset(fused)


def _without_relu(graph: ir.Graph, depthwise: ir.Node, fused: frozenset[str]) -> str:
    """What a depthwise convolution's kernel reads: its input, or its fused ReLU's."""
    source = depthwise.inputs[0]
    return graph.node(source).inputs[0] if source in fused else source


def _window(
    graph: ir.Graph, node: ir.Node, kernel: tuple[int, int], strides: tuple[int, int], padding: ir.Pads
) -> Window:
    _, in_height, in_width, _ = graph.type_of(node.inputs[0]).shape
    _, out_height, out_width, _ = node.type.shape
    return Window(in_height, in_width, out_height, out_width, kernel, strides, padding)


def _scaling(graph: ir.Graph, node: ir.Node, width: int) -> tuple[Weights, Weights]:
    """What accumulators start at, biases with the input zero point folded in, and multipliers, zero beyond the output
    channels."""
    weights = graph.constants[node.inputs[1]]
    source, target = graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
    axes = (0, 1) if isinstance(node.op, ir.DepthwiseConv2d) else tuple(range(1, weights.data.ndim))
    sums = weights.data.astype(np.int64).sum(axis=axes)
    folded = graph.constants[node.inputs[2]].data.astype(np.int64) - source.zero_point * sums
    start = np.zeros(width, np.int64)
    start[: folded.size] = folded
    if _range(graph, node).fits23:
        start += epilogue.MAGIC
    multipliers = np.zeros(width, np.float32)
    multipliers[: folded.size] = arithmetic.output_multipliers(source.scale, weights.type.per_axis.scales, target.scale)
    # Modulo 2^32: so is the accumulator that it is added to.
    return Weights(start.astype(np.int32)), Weights(multipliers)


def _range(graph: ir.Graph, node: ir.Node) -> epilogue.Range:
    """What no input can leave: the sum of each weight's worse end, and that scaled."""
    weights = graph.constants[node.inputs[1]]
    source, target = graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
    axes = (0, 1) if isinstance(node.op, ir.DepthwiseConv2d) else tuple(range(1, weights.data.ndim))
    values = weights.data.astype(np.int64)
    ends = np.stack([values * (end - source.zero_point) for end in (arithmetic.INT8_MIN, arithmetic.INT8_MAX)])
    bias = graph.constants[node.inputs[2]].data.astype(np.int64)
    multipliers = arithmetic.output_multipliers(source.scale, weights.type.per_axis.scales, target.scale)
    worst = np.maximum(abs(ends.min(axis=0).sum(axis=axes) + bias), abs(ends.max(axis=0).sum(axis=axes) + bias))
    scaled = worst * multipliers.astype(np.float64)
    return epilogue.Range(bool(worst.max() < 2**22), bool(scaled.max() < 32000))  # with room for every rounding


def _patch_weights(
    weights: NDArray[np.generic], in_channels: int, shape: convolution.ConvolutionShape
) -> NDArray[np.int8]:
    """(O, KH, KW, I) or (O, I) as (O, patch bytes), in the order in which a patch lies in a panel."""
    if shape.window.kernel == (1, 1):
        return weights.reshape(weights.shape[0], -1).astype(np.int8, copy=False)
    outputs, kh, kw, inputs = weights.shape
    rows = np.zeros((outputs, kh, shape.patch_row_bytes), np.int8)
    pixels = np.zeros((outputs, kh, kw, in_channels), np.int8)
    pixels[..., :inputs] = weights
    rows[:, :, : kw * in_channels] = pixels.reshape(outputs, kh, -1)
    return rows.reshape(outputs, -1)


def _with_tasks(shape: convolution.ConvolutionShape) -> convolution.ConvolutionShape:
    """Bands of rows: few pixels wasted in a panel's last block, scratch that stays in the cache, work for four."""
    block, window = BLOCKS[shape.isa], shape.window
    height, width = window.out_height, window.out_width
    if height == 1 and shape.depthwise is None:
        return replace(shape, splits=min(2 * _MIN_TASKS, -(-shape.out_channels // block.channels)))

    def cost(rows: int) -> float:
        full, last = divmod(height, rows)
        padded = sum(n * -(-r * width // ROW_STEP) * ROW_STEP for n, r in ((full, rows), (1, last)) if n and r)
        bands = full + (last > 0)
        idle = -(-bands // _MIN_TASKS) * _MIN_TASKS * rows / height  # the slowest core's share
        oversize = max(1.0, rows * width * shape.patch_bytes / _BAND_BYTES)
        halo = (shape.depthwise.window.kernel[0] - 1) / rows if shape.depthwise else 0.0  # rows staged twice
        return padded / (height * width) + 0.1 * idle + 0.05 * oversize + 0.04 * halo + 0.01 * bands / height

    return replace(shape, rows_per_task=min(range(1, height + 1), key=cost))
