"""Lowers a graph to launches on an NVIDIA GPU: an int8 graph bit for bit by the contract, a float graph in float16.

Between kernels a pixel's channels are padded to a multiple of 32 bytes; the weights there are zero. The input zero
point is folded into the bias: sum (x - z) w + b = sum x w + (b - z sum w), exact modulo 2^32. A stand-alone ReLU is
computed by the depthwise convolutions that read it; an addition by the convolution before it; a depthwise convolution
by the pointwise one behind it where the cost model says that this pays.

A float graph takes the same int8 input as the int8 graph, behind a ``Dequantize`` (``passes.take_int8_pixels``), and
gives float32. It is the rival the int8 build is compared with, not bound by the contract.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from ....models import graph as ir
from ....runtime import arithmetic
from ....runtime.plan import Launch
from ....targets.spec import GpuSpec, TargetSpec
from ..kernel_call import Activation, KernelCall, Weights
from . import cost
from .depthwise import Depthwise, Front, fits_dot, pack_rows, pack_taps
from .elementwise import Add, Export, Map, MatVec, MaxPool, Mean, Patches
from .epilogue import CONSTANTS
from .gemm import Gemm
from .gemm_kernel import GemmKernel
from .slice_layout import pack_weights
from .tir import ITEM_BYTES, WORD_LANES, Kernel
from .window import Window

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


def mode_of(arch: str) -> str:
    """How an architecture multiplies matrices: see ``gemm``. ``arch`` is sm_87 or the like."""
    number = int(arch.removeprefix("sm_"))
    return "mma" if number >= 80 else "wmma" if number >= 72 else "dot"


class _Lowering:
    """One pass over the graph, appending launches."""

    def __init__(self, graph: ir.Graph, gpu: GpuSpec) -> None:
        self.graph, self.gpu = graph, gpu
        self.mode = mode_of(gpu.arch)
        self.dtype = "float16" if any(node.type.dtype == "float32" for node in graph.nodes) else "int8"
        # Tensors that are the network's input as it comes: plain int8 pixels.
        self.plain = {node.name: node for node in graph.nodes if self._check_kind(node)}
        self.calls: list[KernelCall] = []
        self.stored: dict[str, Activation] = {}
        self.relus = {node.name for node in graph.nodes if _only_depthwise_reads(graph, node)}
        self.fronts: set[str] = set()
        for node in graph.nodes:
            if self._front_pays(node):
                self.fronts.add(node.name)
        self.additions = {add.name: node.name for node in graph.nodes if (add := self._addition(node))}

    def run(self) -> tuple[KernelCall, ...]:
        for node in self.graph.nodes:
            if node.name not in self.relus and node.name not in self.fronts and node.name not in self.additions:
                self._lower_node(node)
        return tuple(self.calls)

    def _lower_node(self, node: ir.Node) -> None:
        match node.op:
            case ir.Input() | ir.Dequantize():
                pass
            case ir.Conv2d():
                self._convolution(node, node.op)
            case ir.FullyConnected():
                self._fully_connected(node, node.op)
            case ir.DepthwiseConv2d():
                self._depthwise(node, node.op)
            case ir.Add():
                self._add(node, node.op)
            case ir.Relu() | ir.Lookup():
                self._map(node)
            case ir.MaxPool2d():
                if max(node.op.padding[:2]) >= node.op.kernel[0] or max(node.op.padding[2:]) >= node.op.kernel[1]:
                    raise ir.GraphError("no CUDA kernel for a window outside of the image", node.name, node.path)
                window = self._window(node, node.op.kernel, node.op.strides, node.op.padding)
                self._finish(node, MaxPool(self.dtype, window), (self._padded(node.inputs[0]),))
            case ir.GlobalAveragePool():
                self._mean(node)
            case _:
                raise ir.GraphError(f"no CUDA kernel for {type(node.op).__name__}", node.name, node.path)

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

    def _check_size(self, node: ir.Node, operand: Activation | Weights) -> None:
        """Raises GraphError for a tensor whose values are too many to be numbered."""
        if isinstance(operand, Activation) and operand.count > _MOST_VALUES:
            batch = self.graph.inputs[0].type.shape[0]
            fitting = _MOST_VALUES // (operand.count // batch)
            raise ir.GraphError(
                f"{node.name}: a batch of {batch} images makes a tensor of {operand.count} values, more than CUDA "
                f"kernels can address ({_MOST_VALUES}): compile for a batch of {fitting} at most",
                node.name,
                node.path,
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
            window = Window(1, 1, pixels, 1, pixels, (1, 1), (1, 1), (0, 0), 0)
            activation = Activation(f"{name}.stored", self.dtype, pixels * self._stored_channels(channels))
            self._patches(self.graph.node(name), name, window, row_bytes, activation)
            self.stored[name] = activation
        return self.stored[name]

    def _patches(self, node: ir.Node, name: str, window: Window, row_bytes: int, target: Activation) -> None:
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
        self._append(node, patches, (x, *zero), target)

    def _append(self, node: ir.Node, kernel: Kernel, operands: Operands, target: Activation, macs: int = 0) -> None:
        for operand in (*operands, target):
            self._check_size(node, operand)
        grid = kernel.grid
        self.calls.append(
            KernelCall(
                kernel.symbol, kernel.build, (*operands, target), target.name, node.name, path=node.path, macs=macs,
                launch=Launch((grid.blocks, 1, 1), (grid.threads, 1, 1), grid.shared_bytes),
                traffic_bytes=kernel.traffic_bytes,
            )
        )  # fmt: skip

    def _finish(self, node: ir.Node, kernel: Kernel, operands: Operands, macs: int = 0) -> None:
        """Appends the launch that makes a node's tensor; an output of the network is brought to plain NHWC."""
        channels = node.type.shape[-1]
        pixels, stored = int(np.prod(node.type.shape[:-1])), self._stored_channels(channels)
        output = node.name in self.graph.outputs
        plain = output and self.dtype == "int8" and stored == channels
        target = Activation(node.name if plain or not output else f"{node.name}.stored", self.dtype, pixels * stored)
        self._append(node, kernel, operands, target, macs)
        self.stored[node.name] = target
        if output and not plain:
            dtype = "int8" if self.dtype == "int8" else "float32"
            export = Export(self.dtype, pixels, channels, stored)
            self._append(node, export, (target,), Activation(node.name, dtype, pixels * channels))

    # What shares a kernel.

    def _only_reader(self, node: ir.Node) -> ir.Node | None:
        users = self.graph.users(node.name)
        return users[0] if len(users) == 1 and node.name not in self.graph.outputs else None

    def _front_pays(self, node: ir.Node) -> bool:
        reader = self._only_reader(node)
        if self.mode == "dot" or reader is None:
            return False
        if not isinstance(node.op, ir.DepthwiseConv2d) or not isinstance(reader.op, ir.Conv2d):
            return False
        kernel = self._depthwise_kernel(node, node.op)
        if not fits_dot(kernel.window) or not self._is_pointwise(reader, reader.op):
            return False
        pointwise = self._window(reader, (1, 1), (1, 1), (0, 0, 0, 0))
        return cost.front_pays(self._draft(reader, pointwise), Front(kernel), self.gpu)

    def _is_pointwise(self, node: ir.Node, op: ir.Conv2d) -> bool:
        kernel = self.graph.type_of(node.inputs[1]).shape[1:3]
        return kernel == (1, 1) and op.strides == (1, 1) and not any(op.padding)

    def _addition(self, node: ir.Node) -> ir.Node | None:
        """The addition that a convolution's kernel does: its only reader, whose other operand is there before it."""
        reader = self._only_reader(node)
        if not isinstance(node.op, ir.Conv2d) or reader is None or not isinstance(reader.op, ir.Add):
            return None
        other = next((name for name in reader.inputs if name != node.name), node.name)
        order = {n.name: i for i, n in enumerate(self.graph.nodes)}
        return reader if order[other] < order[node.name] else None

    # Operators.

    def _window(self, node: ir.Node, kernel: tuple[int, int], strides: tuple[int, int], padding: ir.Pads) -> Window:
        batch, in_height, in_width, channels = self.graph.type_of(node.inputs[0]).shape
        _, out_height, out_width, _ = node.type.shape
        pixel_bytes = self._stored_channels(channels) * ITEM_BYTES[self.dtype]
        before = (padding[0], padding[2])
        return Window(batch, in_height, in_width, out_height, out_width, kernel, strides, before, pixel_bytes)

    def _depthwise_kernel(self, node: ir.Node, op: ir.DepthwiseConv2d) -> Depthwise:
        kh, kw, _ = self.graph.type_of(node.inputs[1]).shape
        window = self._window(node, (kh, kw), op.strides, op.padding)
        by_dot = self.gpu.dot_product and self.dtype == "int8" and fits_dot(window)
        relu = op.relu and self.dtype == "float16"
        return Depthwise(self.dtype, window, node.inputs[0] in self.relus, by_dot, relu)

    def _draft(self, node: ir.Node, window: Window, *, addition: bool = False, relu: bool = False) -> Gemm:
        """A product with the tile that the cost model prefers, over the rows of ``window``."""
        channels = self._stored_channels(node.type.shape[-1])
        draft = Gemm(self.mode, self.dtype, window, channels, cost.tiles(self.mode)[0], None, addition, relu)
        return cost.with_best_tile(draft, self.gpu)

    def _convolution(self, node: ir.Node, op: ir.Conv2d) -> None:
        graph = self.graph
        weights = graph.constants[node.inputs[1]].data
        source = node.inputs[0]
        add = next((graph.node(name) for name, conv in self.additions.items() if conv == node.name), None)
        flags = {"addition": add is not None, "relu": op.relu and self.dtype == "float16"}
        macs = int(np.prod(node.type.shape[:-1])) * int(weights.size)
        before: Operands
        if source in self.fronts:
            front = graph.node(source)
            assert isinstance(front.op, ir.DepthwiseConv2d)
            kernel = self._depthwise_kernel(front, front.op)
            pointwise = self._window(node, (1, 1), (1, 1), (0, 0, 0, 0))
            gemm = cost.with_front(self._draft(node, pointwise, **flags), Front(kernel), self.gpu)
            before = self._depthwise_operands(front, kernel)
            rows = _rows(weights, kernel.window.pixel_bytes // ITEM_BYTES[self.dtype])
            macs += int(np.prod(front.type.shape)) * kernel.window.taps
        else:
            window = self._window(node, (weights.shape[1], weights.shape[2]), op.strides, op.padding)
            if (source in self.plain and source not in self.stored) or any(op.padding):
                window = self._gather(node, window)
                before = (self.stored[f"{node.name}.patches"],)
                rows = weights.reshape(weights.shape[0], -1)
            else:
                before = (self._padded(source),)
                rows = _rows(weights, window.pixel_bytes // ITEM_BYTES[self.dtype])
            gemm = self._draft(node, window, **flags)
        if add is not None and isinstance(add.op, ir.Add) and self.dtype == "float16":
            gemm = replace(gemm, relu_after_addition=add.op.relu)
        constants = self._clamp(node)
        residual: Operands = ()
        if add is not None:
            residual, constants = self._residual(node, add, constants)
        operands: Operands = (
            *before,
            Weights(pack_weights(gemm, rows)),
            *self._scaling(node, gemm.columns),
            *(_padded_constants(constants) if self.dtype == "int8" else ()),
            *residual,
        )
        self._finish(add or node, GemmKernel(gemm), operands, macs)

    def _gather(self, node: ir.Node, window: Window) -> Window:
        """Launches what puts a convolution's patches side by side; the window over these."""
        channels = self.graph.type_of(node.inputs[0]).shape[-1]
        row_bytes = -(-window.taps * channels * ITEM_BYTES[self.dtype] // PIXEL_BYTES) * PIXEL_BYTES
        count = window.pixels * row_bytes // ITEM_BYTES[self.dtype]
        target = Activation(f"{node.name}.patches", self.dtype, count)
        self._patches(node, node.inputs[0], replace(window, pixel_bytes=0), row_bytes, target)
        self.stored[target.name] = target
        out = (window.out_height, window.out_width)
        return Window(window.batch, *out, *out, (1, 1), (1, 1), (0, 0), row_bytes)

    def _residual(self, node: ir.Node, add: ir.Node, clamp: list[int]) -> tuple[Operands, list[int]]:
        other = next(name for name in add.inputs if name != node.name)
        assert isinstance(add.op, ir.Add)
        constants = self._addition_constants(add, (node.name, other)) if self.dtype == "int8" else []
        return (self._padded(other),), [*clamp, *constants]

    def _fully_connected(self, node: ir.Node, op: ir.FullyConnected) -> None:
        weights = self.graph.constants[node.inputs[1]].data
        x = self._padded(node.inputs[0])
        batch, inputs = self.graph.type_of(node.inputs[0]).shape
        channels, depth = self._stored_channels(weights.shape[0]), self._stored_channels(inputs)
        relu = op.relu and self.dtype == "float16"
        rows = np.zeros((channels, depth), self.dtype)
        rows[: weights.shape[0], :inputs] = weights
        constants = [_int32(*self._clamp(node))] if self.dtype == "int8" else []
        if batch <= _VECTOR_ROWS:
            vector = MatVec(self.dtype, batch, depth * ITEM_BYTES[self.dtype], channels, relu)
            operands: Operands = (
                x,
                Weights(rows.reshape(-1).view(np.int32)),
                *self._scaling(node, channels),
                *constants,
            )
            self._finish(node, vector, operands, batch * weights.size)
            return
        window = Window(batch, 1, 1, 1, 1, (1, 1), (1, 1), (0, 0), depth * ITEM_BYTES[self.dtype])
        gemm = self._draft(node, window, relu=relu)
        operands = (
            x,
            Weights(pack_weights(gemm, rows)),
            *self._scaling(node, gemm.columns),
            *(_padded_constants(self._clamp(node)) if self.dtype == "int8" else ()),
        )
        self._finish(node, GemmKernel(gemm), operands, batch * weights.size)

    def _without_relu(self, depthwise: ir.Node) -> str:
        source = depthwise.inputs[0]
        return self.graph.node(source).inputs[0] if source in self.relus else source

    def _depthwise_operands(self, node: ir.Node, kernel: Depthwise) -> Operands:
        """The input, weights, and what follows the sum."""
        x = self._padded(self._without_relu(node))
        weights = self.graph.constants[node.inputs[1]].data
        channels = kernel.window.pixel_bytes // ITEM_BYTES[self.dtype]
        packed = Weights(pack_rows(weights, channels) if kernel.by_dot else pack_taps(weights, self.dtype, channels))
        if self.dtype == "float16":
            return (x, packed, *self._scaling(node, channels))
        zero = self.graph.type_of(self._without_relu(node)).per_tensor.zero_point
        constants = _int32(*self._clamp(node), int(np.int32(np.uint32((zero & 0xFF) * 0x01010101))))
        return (x, packed, *self._scaling(node, channels, zero), constants)

    def _depthwise(self, node: ir.Node, op: ir.DepthwiseConv2d) -> None:
        kernel = self._depthwise_kernel(node, op)
        macs = int(np.prod(node.type.shape)) * kernel.window.taps
        self._finish(node, kernel, self._depthwise_operands(node, kernel), macs)

    def _add(self, node: ir.Node, op: ir.Add) -> None:
        a, b = (self._padded(name) for name in node.inputs)
        kernel = Add(self.dtype, a.count // WORD_LANES[self.dtype], op.relu and self.dtype == "float16")
        constants = [_int32(*self._addition_constants(node, node.inputs))] if self.dtype == "int8" else []
        self._finish(node, kernel, (a, b, *constants))

    def _addition_constants(self, add: ir.Node, inputs: tuple[str, ...]) -> list[int]:
        """Multipliers, bias, shift, least value and zero point of the addition of ``inputs`` in this order."""
        a, b = (self.graph.type_of(name).per_tensor for name in inputs)
        out = add.type.per_tensor
        values = arithmetic.add_constants(a.scale, a.zero_point, b.scale, b.zero_point, out.scale)
        relu = isinstance(add.op, ir.Add) and add.op.relu
        return [*values, arithmetic.lower_bound(out.zero_point, relu), out.zero_point]

    def _map(self, node: ir.Node) -> None:
        x = self._padded(node.inputs[0])
        operands: Operands = (x,)
        if self.dtype == "int8":
            source, out = self.graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
            relu = isinstance(node.op, ir.Relu)
            k = 256 if relu else arithmetic.requantize_multiplier(source.scale, out.scale)
            zero = arithmetic.INT8_MIN if relu else out.zero_point
            operands = (x, _int32(k, 128 - source.zero_point * k, zero))
        elif not isinstance(node.op, ir.Relu):
            raise ir.GraphError(f"no float16 kernel for {type(node.op).__name__}", node.name, node.path)
        self._finish(node, Map(self.dtype, x.count // WORD_LANES[self.dtype]), operands)

    def _mean(self, node: ir.Node) -> None:
        x = self._padded(node.inputs[0])
        batch, height, width, channels = self.graph.type_of(node.inputs[0]).shape
        pixels, words = height * width, self._stored_channels(channels) // WORD_LANES[self.dtype]
        kernel = Mean(self.dtype, batch, pixels, words)
        operands: Operands = (x,)
        if self.dtype == "int8":
            source, out = self.graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
            multiplier = arithmetic.average_multiplier(source.scale, out.scale, pixels).reshape(1)
            constants = _int32(pixels * source.zero_point, *self._clamp(node))
            operands = (x, Weights(multiplier), constants)
        self._finish(node, kernel, operands)

    # Constants.

    def _clamp(self, node: ir.Node) -> list[int]:
        """Least and greatest output less the zero point, and the zero point; nothing for floats."""
        if self.dtype == "float16":
            return []
        zero = node.type.per_tensor.zero_point
        relu = isinstance(node.op, ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected) and node.op.relu
        return [arithmetic.lower_bound(zero, relu) - zero, arithmetic.INT8_MAX - zero, zero]

    def _scaling(self, node: ir.Node, width: int, zero: int | None = None) -> tuple[Weights, ...]:
        """Biases, with the input's ``zero`` point (its own unless given) folded in, and multipliers; zero beyond the
        output channels. Floats have no multipliers."""
        weights, bias = (self.graph.constants[name] for name in node.inputs[1:3])
        channels = bias.data.shape[0]
        if self.dtype == "float16":
            padded = np.zeros(width, np.float32)
            padded[:channels] = bias.data
            return (Weights(padded),)
        source = self.graph.type_of(node.inputs[0]).per_tensor
        zero = source.zero_point if zero is None else zero
        axes = tuple(axis for axis in range(weights.data.ndim) if axis != weights.type.per_axis.axis)
        folded = bias.data.astype(np.int64) - zero * weights.data.astype(np.int64).sum(axis=axes)
        biases, multipliers = np.zeros(width, np.int32), np.zeros(width, np.float32)
        biases[:channels] = folded.astype(np.int32)
        multipliers[:channels] = arithmetic.output_multipliers(
            source.scale, weights.type.per_axis.scales, node.type.per_tensor.scale
        )
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


def _only_depthwise_reads(graph: ir.Graph, node: ir.Node) -> bool:
    """Whether a node is a ReLU that depthwise convolutions alone read: they take it in as they load."""
    users = graph.users(node.name)
    return (
        isinstance(node.op, ir.Relu)
        and bool(users)
        and node.name not in graph.outputs
        and all(isinstance(user.op, ir.DepthwiseConv2d) for user in users)
    )
