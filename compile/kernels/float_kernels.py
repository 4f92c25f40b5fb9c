"""Float32 kernels for the layers of a mixed graph that stay in float: plain NHWC, any processor that LLVM knows.

One set serves x86-64 and AArch64: vectors of 16 floats, which LLVM splits into what the processor has, and fused
multiply-adds. A block of 6 pixels by 16 channels fills the registers of AVX2 (12 of 16) and of NEON (24 of 32).
They are meant for the few layers that accuracy control returns to float, not as a float network's fastest build.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ...models import graph as ir
from .prim_func import Parameter, prim_func
from .rounding import nearest

Expr: TypeAlias = tirx.Expr
Buffer: TypeAlias = tirx.Buffer

LANES = 16
BLOCK = 6  # pixels multiplied at once
PIXELS_PER_TASK = 8 * BLOCK
VECTORS_PER_TASK = 512


def lanes_of(channels: int) -> int:
    """Channels treated at once: 16, or the largest power of two that there are."""
    return min(LANES, 1 << (channels.bit_length() - 1))


def chunk_starts(channels: int) -> NDArray[np.int64]:
    """Where each vector of channels begins; the last one overlaps its neighbour where 16 do not divide them."""
    lanes = lanes_of(channels)
    return np.minimum(np.arange(-(-channels // lanes)) * lanes, channels - lanes)


def _start(chunk: Expr, channels: int) -> Expr:
    lanes = lanes_of(channels)
    return T.Bind(T.min(chunk * lanes, T.int32(channels - lanes)))


def _type(dtype: str, lanes: int) -> str:
    return f"{dtype}x{lanes}" if lanes > 1 else dtype


def _load(buffer: Buffer, offset: Expr | int, lanes: int) -> Expr:
    return buffer.vload([offset], _type(str(buffer.dtype), lanes))


def _store(buffer: Buffer, offset: Expr | int, value: Expr, lanes: int) -> None:
    T.buffer_store(buffer, value, [T.ramp(offset, 1, lanes) if lanes > 1 else offset])


def _splat(value: Expr | float, lanes: int) -> Expr:
    scalar = tirx.const(value, "float32") if isinstance(value, float) else value
    return T.broadcast(scalar, lanes) if lanes > 1 else scalar


def _fused(a: Expr, b: Expr, c: Expr, lanes: int) -> Expr:
    return T.call_llvm_pure_intrin(_type("float32", lanes), "llvm.fma", a, b, c)


def window_symbol(geometry: ir.Geometry) -> str:
    """All of a geometry that the code of a kernel over windows depends on."""
    g, (kh, kw), (sy, sx), (top, _, left, _) = geometry, geometry.kernel, geometry.strides, geometry.padding
    size = f"{g.in_height}x{g.in_width}x{g.in_channels}_to{g.out_height}x{g.out_width}"
    return f"{size}_k{kh}x{kw}_s{sy}x{sx}_p{top}_{left}"


def _reaches_out(g: ir.Geometry) -> bool:
    """Whether any window holds padding."""
    bottom = (g.out_height - 1) * g.strides[0] + g.kernel[0] - g.padding[0]
    right = (g.out_width - 1) * g.strides[1] + g.kernel[1] - g.padding[2]
    return g.padding[0] > 0 or g.padding[2] > 0 or bottom > g.in_height or right > g.in_width


def _row(g: ir.Geometry, at: Expr, i: Expr | int) -> tuple[Expr, Expr]:
    """The input row under position ``i`` of the windows of output row ``at``, moved into the map, and 1.0 where it did
    not have to be, else 0.0."""
    return _inside(at * g.strides[0] + (i - g.padding[0]), g.in_height)


def _column(g: ir.Geometry, at: Expr, j: Expr | int) -> tuple[Expr, Expr]:
    """Likewise of a column."""
    return _inside(at * g.strides[1] + (j - g.padding[2]), g.in_width)


def _inside(index: Expr, size: int) -> tuple[Expr, Expr]:
    bound = T.Bind(index)
    moved = T.Bind(T.max(T.min(bound, T.int32(size - 1)), T.int32(0)))
    one, zero = tirx.const(1.0, "float32"), tirx.const(0.0, "float32")
    return moved, T.Bind(tirx.Select(tirx.EQ(bound, moved), one, zero))


@dataclass(frozen=True)
class FloatConv:
    """A dense convolution; a fully connected layer is one on a single pixel."""

    geometry: ir.Geometry
    relu: bool

    @property
    def symbol(self) -> str:
        return f"f32_conv_{window_symbol(self.geometry)}_n{self.geometry.out_channels}{'_relu' if self.relu else ''}"

    @property
    def _chunks(self) -> int:
        return int(chunk_starts(self.geometry.out_channels).size)

    @property
    def _chunks_per_task(self) -> int:
        return self._chunks if self.geometry.out_pixels > PIXELS_PER_TASK else -(-self._chunks // 8)

    @property
    def _chunk_tasks(self) -> int:
        return -(-self._chunks // self._chunks_per_task)

    @property
    def tasks(self) -> int:
        return -(-self.geometry.out_pixels // PIXELS_PER_TASK) * self._chunk_tasks

    def pack(self, weights: NDArray[np.float32]) -> NDArray[np.float32]:
        """(O, KH, KW, I) -> vectors of outputs, each (KH * KW * I, lanes), flat."""
        outputs = self.geometry.out_channels
        rows, lanes = weights.reshape(outputs, -1), lanes_of(outputs)
        panels = [rows[start : start + lanes].T for start in chunk_starts(outputs)]
        return np.ascontiguousarray(np.stack(panels)).reshape(-1).astype(np.float32)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, packed weights, bias, y."""
        g, outputs = self.geometry, self.geometry.out_channels
        lanes, pixels = lanes_of(outputs), g.out_pixels
        depth, block = g.taps * g.in_channels, min(BLOCK, pixels)

        def body(x: Buffer, weights: Buffer, bias: Buffer, y: Buffer) -> Callable[[Expr], None]:
            acc = T.alloc_buffer((block,), _type("float32", lanes), scope="global")

            def multiply(first: Expr, chunk: Expr) -> None:
                """``block`` pixels from ``first`` by one vector of outputs; pixels past the end repeat the last."""
                start = _start(chunk, outputs)
                numbers = [T.Bind(T.min(first + i, T.int32(pixels - 1))) for i in range(block)]
                for i in range(block):
                    T.buffer_store(acc, _load(bias, start, lanes), [i])
                with T.serial(0, g.kernel[0]) as ky:
                    with T.serial(0, g.kernel[1]) as kx:
                        places = []
                        for number in numbers:
                            row, row_in = _row(g, tirx.truncdiv(number, T.int32(g.out_width)), ky)
                            column, column_in = _column(g, tirx.truncmod(number, T.int32(g.out_width)), kx)
                            places.append(
                                (T.Bind((row * g.in_width + column) * g.in_channels), T.Bind(row_in * column_in))
                            )
                        panel = T.Bind((chunk * depth + (ky * g.kernel[1] + kx) * g.in_channels) * lanes)
                        with T.serial(0, g.in_channels) as k:
                            row_of_weights = T.Bind(_load(weights, panel + k * lanes, lanes))
                            for i, (offset, inside) in enumerate(places):
                                value = x[offset + k] * inside if _reaches_out(g) else x[offset + k]
                                T.buffer_store(acc, _fused(row_of_weights, _splat(value, lanes), acc[i], lanes), [i])
                for i in range(block):
                    value = T.max(acc[i], _splat(0.0, lanes)) if self.relu else acc[i]
                    with T.If(first + i < pixels):
                        with T.Then():
                            _store(y, (first + i) * outputs + start, value, lanes)

            def task(t: Expr) -> None:
                first_chunk = T.Bind(tirx.truncmod(t, T.int32(self._chunk_tasks)) * self._chunks_per_task)
                chunks = T.Bind(T.min(self._chunks_per_task, self._chunks - first_chunk))
                first = T.Bind(tirx.truncdiv(t, T.int32(self._chunk_tasks)) * PIXELS_PER_TASK)
                blocks = T.Bind(tirx.truncdiv(T.min(PIXELS_PER_TASK, pixels - first) + (block - 1), T.int32(block)))
                with T.serial(0, chunks) as chunk:
                    with T.serial(0, blocks) as b:
                        multiply(T.Bind(first + b * block), T.Bind(first_chunk + chunk))

            return task

        operands = [
            Parameter("x", "float32", g.in_pixels * g.in_channels),
            Parameter("w", "float32", self._chunks * depth * lanes),
            Parameter("b", "float32", outputs),
            Parameter("y", "float32", pixels * outputs),
        ]
        return prim_func(self.symbol, operands, body)


@dataclass(frozen=True)
class FloatDepthwise:
    """One filter per channel. A task is a row of outputs."""

    geometry: ir.Geometry
    relu: bool

    @property
    def symbol(self) -> str:
        return f"f32_depthwise_{window_symbol(self.geometry)}{'_relu' if self.relu else ''}"

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Operands: x, weights (KH, KW, C) as they are, bias, y."""
        g, (kh, kw), channels = self.geometry, self.geometry.kernel, self.geometry.in_channels
        lanes = lanes_of(channels)

        def body(x: Buffer, weights: Buffer, bias: Buffer, y: Buffer) -> Callable[[Expr], None]:
            def task(t: Expr) -> None:
                rows = [_row(g, t, i) for i in range(kh)]
                with T.serial(0, g.out_width) as at:
                    columns = [_column(g, at, j) for j in range(kw)]
                    taps = [
                        (T.Bind((row * g.in_width + column) * channels), T.Bind(row_in * column_in))
                        for row, row_in in rows
                        for column, column_in in columns
                    ]
                    with T.serial(0, -(-channels // lanes)) as chunk:
                        start = _start(chunk, channels)
                        acc = T.Bind(_load(bias, start, lanes))
                        for index, (offset, inside) in enumerate(taps):
                            value = _load(x, offset + start, lanes)
                            if _reaches_out(g):
                                value = value * _splat(inside, lanes)
                            acc = T.Bind(_fused(_load(weights, index * channels + start, lanes), value, acc, lanes))
                        value = T.max(acc, _splat(0.0, lanes)) if self.relu else acc
                        _store(y, (t * g.out_width + at) * channels + start, value, lanes)

            return task

        operands = [
            Parameter("x", "float32", g.in_pixels * g.in_channels),
            Parameter("w", "float32", kh * kw * channels),
            Parameter("b", "float32", channels),
            Parameter("y", "float32", g.out_pixels * channels),
        ]
        return prim_func(self.symbol, operands, body)


@dataclass(frozen=True)
class FloatMaxPool:
    """A task is a row of outputs. A position in the padding is moved to a pixel that its window holds anyway."""

    geometry: ir.Geometry

    @property
    def symbol(self) -> str:
        return f"f32_maxpool_{window_symbol(self.geometry)}"

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Operands: x, y."""
        g, channels = self.geometry, self.geometry.in_channels
        lanes = lanes_of(channels)

        def body(x: Buffer, y: Buffer) -> Callable[[Expr], None]:
            def task(t: Expr) -> None:
                rows = [_row(g, t, i)[0] for i in range(g.kernel[0])]
                with T.serial(0, g.out_width) as at:
                    columns = [_column(g, at, j)[0] for j in range(g.kernel[1])]
                    taps = [T.Bind((row * g.in_width + column) * channels) for row in rows for column in columns]
                    with T.serial(0, -(-channels // lanes)) as chunk:
                        start = _start(chunk, channels)
                        best = T.Bind(_load(x, taps[0] + start, lanes))
                        for tap in taps[1:]:
                            best = T.Bind(T.max(best, _load(x, tap + start, lanes)))
                        _store(y, (t * g.out_width + at) * channels + start, best, lanes)

            return task

        operands = [
            Parameter("x", "float32", g.in_pixels * g.in_channels),
            Parameter("y", "float32", g.out_pixels * channels),
        ]
        return prim_func(self.symbol, operands, body)


@dataclass(frozen=True)
class FloatAverage:
    """The mean over all pixels, in one task."""

    pixels: int
    channels: int

    @property
    def symbol(self) -> str:
        return f"f32_average_{self.pixels}x{self.channels}"

    @property
    def tasks(self) -> int:
        return 1

    def build(self) -> tirx.PrimFunc:
        """Operands: x, y."""
        lanes = lanes_of(self.channels)

        def body(x: Buffer, y: Buffer) -> Callable[[Expr], None]:
            acc = T.alloc_buffer((1,), _type("float32", lanes), scope="global")

            def task(t: Expr) -> None:
                with T.serial(0, -(-self.channels // lanes)) as chunk:
                    start = _start(chunk, self.channels)
                    T.buffer_store(acc, _splat(0.0, lanes), [0])
                    with T.serial(0, self.pixels) as pixel:
                        T.buffer_store(acc, acc[0] + _load(x, pixel * self.channels + start, lanes), [0])
                    _store(y, start, acc[0] * _splat(1.0 / self.pixels, lanes), lanes)

            return task

        operands = [Parameter("x", "float32", self.pixels * self.channels), Parameter("y", "float32", self.channels)]
        return prim_func(self.symbol, operands, body)


@dataclass(frozen=True)
class FloatElementwise:
    """``add``, ``add_relu``, ``relu``, ``quantize`` or ``dequantize`` over ``count`` elements.

    The last two take two float32 after x: 1 / scale (``dequantize``: the scale) and the zero point.
    """

    kind: str
    count: int

    @property
    def symbol(self) -> str:
        return f"f32_{self.kind}_{self.count}"

    @property
    def tasks(self) -> int:
        return max(1, -(-(self.count // LANES) // VECTORS_PER_TASK))

    def build(self) -> tirx.PrimFunc:
        """Operands: x, [b or parameters], y."""
        converts = self.kind in ("quantize", "dequantize")
        source, target = {"quantize": ("float32", "int8"), "dequantize": ("int8", "float32")}.get(
            self.kind, ("float32", "float32")
        )

        def body(*buffers: Buffer) -> Callable[[Expr], None]:
            y = buffers[-1]

            def at(offset: Expr | int, lanes: int) -> None:
                _store(y, offset, self._value(buffers, offset, lanes), lanes)

            def task(t: Expr) -> None:
                first = T.Bind(t * VECTORS_PER_TASK)
                with T.serial(0, T.Bind(T.min(VECTORS_PER_TASK, self.count // LANES - first))) as i:
                    at(T.Bind((first + i) * LANES), LANES)
                if self.count % LANES:
                    with T.If(tirx.EQ(t, T.int32(self.tasks - 1))):
                        with T.Then():
                            with T.serial(0, self.count % LANES) as i:
                                at(T.Bind(self.count // LANES * LANES + i), 1)

            return task

        operands = [Parameter("x", source, self.count), Parameter("y", target, self.count)]
        if converts:
            operands.insert(1, Parameter("parameters", "float32", 2))
        elif self.kind.startswith("add"):
            operands.insert(1, Parameter("b", "float32", self.count))
        return prim_func(self.symbol, operands, body)

    def _value(self, buffers: Sequence[Buffer], offset: Expr | int, lanes: int) -> Expr:
        x = _load(buffers[0], offset, lanes)
        match self.kind:
            case "quantize":
                steps = nearest(x * _splat(buffers[1][0], lanes), 256.0, lanes)
                steps = steps + T.cast(_splat(buffers[1][1], lanes), _type("int32", lanes))
                ends = [T.broadcast(T.int32(end), lanes) if lanes > 1 else T.int32(end) for end in (-128, 127)]
                return T.cast(T.max(T.min(steps, ends[1]), ends[0]), _type("int8", lanes))
            case "dequantize":
                zero, scale = _splat(buffers[1][1], lanes), _splat(buffers[1][0], lanes)
                return (T.cast(T.cast(x, _type("int32", lanes)), _type("float32", lanes)) - zero) * scale
            case "relu":
                return T.max(x, _splat(0.0, lanes))
        total = x + _load(buffers[1], offset, lanes)
        return T.max(total, _splat(0.0, lanes)) if self.kind == "add_relu" else total
