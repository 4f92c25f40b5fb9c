"""The AArch64 kernels without weights: addition, lookup, ReLU, max pooling, averaging, and changes of layout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from ..prim_func import Parameter, prim_func
from . import epilogue, neon
from .layout import LANES, stored_channels, window_name
from .neon import Buffer, Expr, Register

VECTORS_PER_TASK = 512


def tasks_over(count: int) -> int:
    """Of a kernel over ``count`` elements, a multiple of 16."""
    return -(-count // (LANES * VECTORS_PER_TASK))


def _over_vectors(
    symbol: str, count: int, inputs: int, constants: Parameter, prepare: Callable[[Buffer], Callable[..., Expr]]
) -> tirx.PrimFunc:
    """A kernel of operands x0, [x1,] constants, y. ``prepare(constants)`` is emitted once; what it returns makes a
    vector of the inputs' vectors."""

    def body(*operands: Buffer) -> Callable[[Expr], None]:
        *xs, values, y = operands
        compute = prepare(values)

        def task(number: Expr) -> None:
            first = neon.bind(number * VECTORS_PER_TASK)
            with T.serial(0, T.min(T.int32(VECTORS_PER_TASK), count // LANES - first)) as i:
                offset = neon.bind((first + i) * LANES)
                neon.store(y, offset, compute(*(neon.load(x, offset) for x in xs)), LANES)

        return task

    vectors = [Parameter(f"x{i}", "int8", count) for i in range(inputs)]
    return prim_func(symbol, [*vectors, constants, Parameter("y", "int8", count)], body)


def quarters(v: Expr) -> list[Expr]:
    """int8x16 as four int32x4."""
    halves = [neon.bind(neon.widen(part(v, LANES), "int16x8")) for part in (neon.low, neon.high)]
    return [neon.widen(part(half, 8), "int32x4") for half in halves for part in (neon.low, neon.high)]


@dataclass(frozen=True)
class ShiftedSum:
    """y = clamp(((a * m_a + b * m_b + bias) >> shift) + z, lo, 127).

    ``constants`` (int32): m_a, m_b, bias, minus the shift, output zero point.
    """

    count: int
    relu: bool

    @property
    def symbol(self) -> str:
        return f"neon_sum2_n{self.count}{'_relu' if self.relu else ''}"

    @property
    def tasks(self) -> int:
        return tasks_over(self.count)

    def build(self) -> tirx.PrimFunc:
        constants = Parameter("constants", "int32", 5)
        return _over_vectors(self.symbol, self.count, 2, constants, self._prepare)

    def _prepare(self, constants: Buffer) -> Callable[..., Expr]:
        multipliers = [neon.load_splat(constants, i, "int32x4") for i in range(2)]
        bias = neon.load_splat(constants, 2, "int32x4")
        shift = neon.load_splat(constants, 3, "int32x4")
        output = epilogue.load_output(constants, 4, self.relu)

        def compute(*xs: Expr) -> Expr:
            acc = [bias] * 4
            for x, m in zip(xs, multipliers, strict=True):
                acc = [neon.bind(a + q * m) for a, q in zip(acc, quarters(x), strict=True)]
            return epilogue.narrow16([neon.bind(neon.sshl32(a, shift)) for a in acc], output)

        return compute


@dataclass(frozen=True)
class LimbSum:
    """``ShiftedSum`` in int16: y = max((a * m_a + b * m_b + bias) >> shift, lo), saturating.

    Multipliers are three limbs of 7 bits, whose products with both inputs lie in [-32512, 32258]: int16 has room for
    what is carried from the sum below, and for a limb of the bias. The uppermost limb of the bias, which includes the
    output's zero point, is what is left, and added with saturation: beyond int16 the output is saturated whatever the
    shift, at most 22. ``constants`` (int32): three times the limbs of m_a, m_b and the bias, then the zero point.
    """

    count: int
    shift: int
    relu: bool

    @property
    def symbol(self) -> str:
        return f"neon_limbs{self.shift}_n{self.count}{'_relu' if self.relu else ''}"

    @property
    def tasks(self) -> int:
        return tasks_over(self.count)

    def build(self) -> tirx.PrimFunc:
        constants = Parameter("constants", "int32", 10)
        return _over_vectors(self.symbol, self.count, 2, constants, self._prepare)

    def _prepare(self, constants: Buffer) -> Callable[..., Expr]:
        def splat(index: int, dtype: str, lanes: int) -> Expr:
            return neon.bind(neon.splat(T.cast(constants[index], dtype), lanes))

        limbs = [(splat(3 * i, "int8", 16), splat(3 * i + 1, "int8", 16)) for i in range(3)]
        biases = [splat(3 * i + 2, "int16", 8) for i in range(3)]
        least = splat(9, "int8", 16) if self.relu else None

        def half(part: Any, a: Expr, b: Expr) -> Expr:
            carried = None
            for (m_a, m_b), bias in zip(limbs, biases, strict=True):
                total = neon.smull(part(a, 16), part(m_a, 16)) + neon.smull(part(b, 16), part(m_b, 16))
                if carried is not None:
                    total = total + T.shift_right(carried, neon.splat(T.int16(_LIMB), 8))
                carried = neon.bind(neon.sqadd16(total, bias) if bias is biases[-1] else total + bias)
            return neon.sqshrn8(carried, self.shift - 2 * _LIMB)

        def compute(a: Expr, b: Expr) -> Expr:
            value = neon.bind(neon.join(half(neon.low, a, b), half(neon.high, a, b), 8))
            return value if least is None else neon.smax(value, least)

        return compute


_LIMB = 7  # bits


def limbs(a_multiplier: int, b_multiplier: int, bias: int, shift: int, zero_point: int) -> tuple[int, ...] | None:
    """The ``constants`` of ``LimbSum``; none where the sum wants ``ShiftedSum``. Multipliers are in [0, 2^21)."""
    bias += zero_point << shift
    top = bias >> 2 * _LIMB
    if not 2 * _LIMB < shift <= 2 * _LIMB + 8 or not -(2**15) <= top < 2**15 or max(a_multiplier, b_multiplier) >> 21:
        return None
    mask = (1 << _LIMB) - 1
    numbers = (a_multiplier, b_multiplier, bias)
    lower = [number >> shift & mask for shift in (0, _LIMB) for number in numbers]
    return (*lower, a_multiplier >> 2 * _LIMB, b_multiplier >> 2 * _LIMB, top, zero_point)


@dataclass(frozen=True)
class Relu:
    """clamp(x - z, 0, 255) - 128. ``constants`` (int32): the input's zero point."""

    count: int

    @property
    def symbol(self) -> str:
        return f"neon_relu_n{self.count}"

    @property
    def tasks(self) -> int:
        return tasks_over(self.count)

    def build(self) -> tirx.PrimFunc:
        constants = Parameter("constants", "int32", 1)
        return _over_vectors(self.symbol, self.count, 1, constants, self._prepare)

    def _prepare(self, constants: Buffer) -> Callable[..., Expr]:
        zero = neon.bind(constants[0])
        least = neon.bind(neon.splat(T.cast(zero, "int8"), LANES))
        offset_by = neon.bind(neon.splat(T.cast(-128 - zero, "int8"), LANES))
        return lambda x: neon.add_wrapping(neon.smax(x, least), offset_by)


@dataclass(frozen=True)
class Lookup:
    """y = table[x + 128]. ``table`` (int8): 256 entries, beginning with that of x = 0: a byte read as unsigned is its
    entry's number."""

    count: int

    @property
    def symbol(self) -> str:
        return f"neon_lookup_n{self.count}"

    @property
    def tasks(self) -> int:
        return tasks_over(self.count)

    def build(self) -> tirx.PrimFunc:
        table = Parameter("table", "int8", 256)
        return _over_vectors(self.symbol, self.count, 1, table, self._prepare)

    def _prepare(self, table: Buffer) -> Callable[..., Expr]:
        parts = [[neon.load(table, (4 * i + j) * LANES) for j in range(4)] for i in range(4)]

        def compute(index: Expr) -> Expr:
            value = neon.tbl4(parts[0], index)
            for part in parts[1:]:  # an index beyond a part leaves what is there
                index = neon.bind(neon.add_wrapping(index, neon.splat(T.int8(-4 * LANES), LANES)))
                value = neon.bind(neon.tbx4(value, part, index))
            return value

        return compute


@dataclass(frozen=True)
class MaxPool:
    """A task is an output row. A coordinate in the padding is moved to the nearest in the map: that pixel is in the
    window already, so the maximum does not change."""

    geometry: Geometry

    @property
    def symbol(self) -> str:
        return f"neon_maxpool{window_name(self.geometry)}_c{self.channels}"

    @property
    def channels(self) -> int:
        """As stored."""
        return stored_channels(self.geometry.in_channels)

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        parameters = [
            Parameter("x", "int8", self.geometry.in_pixels * self.channels),
            Parameter("y", "int8", self.geometry.out_pixels * self.channels),
        ]
        return prim_func(self.symbol, parameters, self._body)

    def _body(self, x: Buffer, y: Buffer) -> Callable[[Expr], None]:
        g, channels = self.geometry, self.channels

        def task(row: Expr) -> None:
            row = neon.bind(row)
            lines = [
                neon.bind(_clamp(row * g.strides[0] + (i - g.padding[0]), g.in_height) * (g.in_width * channels))
                for i in range(g.kernel[0])
            ]
            with T.serial(0, g.out_width) as column:
                columns = [
                    neon.bind(_clamp(column * g.strides[1] + (i - g.padding[2]), g.in_width) * channels)
                    for i in range(g.kernel[1])
                ]
                corners = [neon.bind(line + c) for line in lines for c in columns]
                target = neon.bind((row * g.out_width + column) * channels)
                with T.serial(0, channels // LANES) as block:
                    best = neon.load(x, corners[0] + block * LANES)
                    for corner in corners[1:]:
                        best = neon.bind(neon.smax(best, neon.load(x, corner + block * LANES)))
                    neon.store(y, target + block * LANES, best, LANES)

        return task


def _clamp(index: Expr, size: int) -> Expr:
    return T.max(T.min(index, T.int32(size - 1)), T.int32(0))


@dataclass(frozen=True)
class Average:
    """The mean over all pixels; a task is 16 channels. ``constants`` (int32): pixels times the input's zero point,
    subtracted from the sum, and the output's zero point; ``multiplier`` (float32)."""

    pixels: int
    channels: int

    @property
    def symbol(self) -> str:
        return f"neon_average_n{self.pixels}_c{self.channels}"

    @property
    def tasks(self) -> int:
        return self.channels // LANES

    def build(self) -> tirx.PrimFunc:
        parameters = [
            Parameter("x", "int8", self.pixels * self.channels),
            Parameter("multiplier", "float32", 1),
            Parameter("constants", "int32", 2),
            Parameter("y", "int8", self.channels),
        ]
        return prim_func(self.symbol, parameters, self._body)

    def _body(self, x: Buffer, multiplier: Buffer, constants: Buffer, y: Buffer) -> Callable[[Expr], None]:
        scale = neon.load_splat(multiplier, 0, "float32x4")
        output = epilogue.load_output(constants, 1, relu=False)
        sums = [Register("int32x4") for _ in range(4)]

        def task(block: Expr) -> None:
            block = neon.bind(block)
            for register in sums:
                register.set(neon.splat(-constants[0], 4))
            with T.serial(0, self.pixels) as pixel:
                seen = quarters(neon.load(x, pixel * self.channels + block * LANES))
                for register, quarter in zip(sums, seen, strict=True):
                    register.set(register.get() + quarter)
            scaled = [neon.bind(epilogue.scale(register.get(), scale, output)) for register in sums]
            neon.store(y, block * LANES, epilogue.narrow16(scaled, output), LANES)

        return task


@dataclass(frozen=True)
class Restride:
    """Copies pixels of ``channels`` bytes, ``from_stride`` apart, to ``to_stride`` apart. One task: it serves small
    tensors, at the network's edge."""

    pixels: int
    channels: int
    from_stride: int
    to_stride: int

    @property
    def symbol(self) -> str:
        return f"neon_restride_n{self.pixels}_c{self.channels}_{self.from_stride}to{self.to_stride}"

    @property
    def tasks(self) -> int:
        return 1

    def build(self) -> tirx.PrimFunc:
        parameters = [
            Parameter("x", "int8", self.pixels * self.from_stride),
            Parameter("y", "int8", self.pixels * self.to_stride),
        ]
        return prim_func(self.symbol, parameters, self._body)

    def _body(self, x: Buffer, y: Buffer) -> Callable[[Expr], None]:
        def task(_: Expr) -> None:
            with T.serial(0, self.pixels) as pixel:
                with T.serial(0, self.channels) as channel:
                    T.buffer_store(y, x[pixel * self.from_stride + channel], [pixel * self.to_stride + channel])

        return task
