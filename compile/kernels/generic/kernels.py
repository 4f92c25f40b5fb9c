"""What each stage of a unit computes, as plain loops over scalars of int8, int32 and float32.

No vectors, no intrinsics, nothing packed: what LLVM makes of it runs on any processor with IEEE 754 float32. Tensors
are NHWC and weights as the graph has them. Every function takes a geometry and its kernel's operands, constants after
the tensors that are read and before ``y``; it emits what all tasks share and returns what emits one task: a row of
outputs.

Zero points are subtracted from what is read, rather than folded into the bias. A product of a convolution then lies on
both sides of zero whatever the pixel, so that every partial sum lies within the bounds of the whole one, which fits
int32: nothing wraps around, and padding is what is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeAlias

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from ....runtime.arithmetic import INT8_MAX, INT8_MIN
from ..rounding import nearest

Expr: TypeAlias = tirx.Expr
Buffer: TypeAlias = tirx.Buffer
Task: TypeAlias = Callable[[Expr], None]

# Scaled sums further from zero than this saturate, whatever the zero point.
_FAR = 256.0


def convolution(
    g: Geometry, x: Buffer, weights: Buffer, bias: Buffer, multipliers: Buffer, constants: Buffer, y: Buffer
) -> Task:
    """Weights (O, KH, KW, I). Constants: the input's zero point, the output's, the least output."""
    zero, out_zero, low = _words(constants, 3)
    acc = T.alloc_buffer((1,), "int32")

    def task(row: Expr) -> None:
        with T.serial(0, g.out_width) as column, T.serial(0, g.out_channels) as o:
            _set(acc, bias[o])
            with _window(g, row, column) as (tap, pixel), T.serial(0, g.in_channels) as i:
                w = _wide(weights[(o * g.taps + tap) * g.in_channels + i])
                _set(acc, acc[0] + (_wide(x[pixel + i]) - zero) * w)
            value = _scaled(acc[0], multipliers[o], out_zero, low)
            T.buffer_store(y, value, [(row * g.out_width + column) * g.out_channels + o])

    return task


def depthwise(
    g: Geometry, x: Buffer, weights: Buffer, bias: Buffer, multipliers: Buffer, constants: Buffer, y: Buffer
) -> Task:
    """Weights (KH, KW, C). Constants: the input's zero point, the output's, the least output."""
    zero, out_zero, low = _words(constants, 3)
    acc = T.alloc_buffer((1,), "int32")

    def task(row: Expr) -> None:
        with T.serial(0, g.out_width) as column, T.serial(0, g.out_channels) as c:
            _set(acc, bias[c])
            with _window(g, row, column) as (tap, pixel):
                _set(acc, acc[0] + (_wide(x[pixel + c]) - zero) * _wide(weights[tap * g.in_channels + c]))
            value = _scaled(acc[0], multipliers[c], out_zero, low)
            T.buffer_store(y, value, [(row * g.out_width + column) * g.out_channels + c])

    return task


def max_pool(g: Geometry, x: Buffer, y: Buffer) -> Task:
    acc = T.alloc_buffer((1,), "int8")

    def task(row: Expr) -> None:
        with T.serial(0, g.out_width) as column, T.serial(0, g.out_channels) as c:
            _set(acc, T.int8(INT8_MIN))
            with _window(g, row, column) as (_, pixel):
                _set(acc, T.max(acc[0], x[pixel + c]))
            T.buffer_store(y, acc[0], [(row * g.out_width + column) * g.out_channels + c])

    return task


def mean(g: Geometry, x: Buffer, multiplier: Buffer, constants: Buffer, y: Buffer) -> Task:
    """Constants: what the sum starts from, the output's zero point."""
    start, out_zero = _words(constants, 2)
    acc = T.alloc_buffer((1,), "int32")

    def task(_: Expr) -> None:
        with T.serial(0, g.out_channels) as c:
            _set(acc, start)
            with T.serial(0, g.in_pixels) as pixel:
                _set(acc, acc[0] + _wide(x[pixel * g.in_channels + c]))
            T.buffer_store(y, _scaled(acc[0], multiplier[0], out_zero, T.int32(INT8_MIN)), [c])

    return task


def addition(g: Geometry, a: Buffer, b: Buffer, constants: Buffer, y: Buffer) -> Task:
    """Constants: multipliers of a and b, bias, shift, the output's zero point, the least output."""
    a_multiplier, b_multiplier, bias, shift, zero, low = _words(constants, 6)

    def task(row: Expr) -> None:
        with _elements(g, row) as at:
            total = _wide(a[at]) * a_multiplier + _wide(b[at]) * b_multiplier + bias
            T.buffer_store(y, _clamped(T.shift_right(total, shift) + zero, low), [at])

    return task


def multiplication(
    g: Geometry, a: Buffer, b: Buffer, multiplier: Buffer, constants: Buffer, y: Buffer, *, gate: bool
) -> Task:
    """With ``gate``, b has one value a channel. Constants: the zero points of a, b and the output."""
    a_zero, b_zero, out_zero = _words(constants, 3)

    def task(row: Expr) -> None:
        with T.serial(0, g.out_width) as column, T.serial(0, g.out_channels) as c:
            at = (row * g.out_width + column) * g.out_channels + c
            product = (_wide(a[at]) - a_zero) * (_wide(b[c if gate else at]) - b_zero)
            T.buffer_store(y, _scaled(product, multiplier[0], out_zero, T.int32(INT8_MIN)), [at])

    return task


def rectifier(g: Geometry, x: Buffer, constants: Buffer, y: Buffer) -> Task:
    """Constants: the input's zero point."""
    (zero,) = _words(constants, 1)

    def task(row: Expr) -> None:
        with _elements(g, row) as at:
            above = T.max(T.min(_wide(x[at]) - zero, T.int32(255)), T.int32(0))
            T.buffer_store(y, T.cast(above + INT8_MIN, "int8"), [at])

    return task


def table(g: Geometry, x: Buffer, entries: Buffer, y: Buffer) -> Task:
    """Entries of the inputs -128 to 127."""

    def task(row: Expr) -> None:
        with _elements(g, row) as at:
            T.buffer_store(y, entries[_wide(x[at]) - INT8_MIN], [at])

    return task


def interpolation(g: Geometry, x: Buffer, rows: Buffer, columns: Buffer, y: Buffer) -> Task:
    """Rows (OH, 3) and columns (OW, 3): the position before, the one after, and its weight in 1/2048."""

    def task(row: Expr) -> None:
        above, below, row_weight = (rows[row * 3 + i] for i in range(3))
        with T.serial(0, g.out_width) as column, T.serial(0, g.out_channels) as c:
            before, after, weight = (columns[column * 3 + i] for i in range(3))

            def line(of: Expr) -> Expr:
                left, right = (_wide(x[(of * g.in_width + at) * g.in_channels + c]) for at in (before, after))
                return T.Bind(left * 2048 + (right - left) * weight)

            top, bottom = line(above), line(below)
            value = T.shift_right(top * 2048 + (bottom - top) * row_weight + (1 << 21), T.int32(22))
            T.buffer_store(y, T.cast(value, "int8"), [(row * g.out_width + column) * g.out_channels + c])

    return task


def selection(g: Geometry, x: Buffer, rows: Buffer, columns: Buffer, y: Buffer) -> Task:
    """Rows (OH,) and columns (OW,): the input's that are copied."""

    def task(row: Expr) -> None:
        with T.serial(0, g.out_width) as column, T.serial(0, g.out_channels) as c:
            pixel = rows[row] * g.in_width + columns[column]
            T.buffer_store(y, x[pixel * g.in_channels + c], [(row * g.out_width + column) * g.out_channels + c])

    return task


def joining(g: Geometry, a: Buffer, b: Buffer, y: Buffer, *, first: int, second: int) -> Task:
    """a's channels, ``first`` of them, then b's, ``second``."""

    def task(row: Expr) -> None:
        with T.serial(0, g.out_width) as column:
            pixel = T.Bind(row * g.out_width + column)
            with T.serial(0, first) as c:
                T.buffer_store(y, a[pixel * first + c], [pixel * (first + second) + c])
            with T.serial(0, second) as c:
                T.buffer_store(y, b[pixel * second + c], [pixel * (first + second) + first + c])

    return task


def flattening(g: Geometry, x: Buffer, y: Buffer) -> Task:
    def task(row: Expr) -> None:
        with _elements(g, row) as at:
            T.buffer_store(y, x[at], [at])

    return task


def _words(constants: Buffer, count: int) -> list[Expr]:
    return [T.Bind(constants[i]) for i in range(count)]


def _wide(value: Expr) -> Expr:
    return T.cast(value, "int32")


def _set(local: Buffer, value: Expr) -> None:
    T.buffer_store(local, value, [0])


@contextmanager
def _elements(g: Geometry, row: Expr) -> Iterator[Expr]:
    """Every element of a row of outputs: its index."""
    count = g.out_width * g.out_channels
    with T.serial(0, count) as i:
        yield T.Bind(row * count + i)


@contextmanager
def _window(g: Geometry, row: Expr, column: Expr) -> Iterator[tuple[Expr, Expr]]:
    """Every position of an output's window that lies in the image: its number, and the index of its pixel."""
    (kh, kw), (top, _, left, _) = g.kernel, g.padding
    with T.serial(0, kh) as ky, T.serial(0, kw) as kx:
        i = T.Bind(row * g.strides[0] - top + ky * g.dilation[0])
        j = T.Bind(column * g.strides[1] - left + kx * g.dilation[1])
        with T.If(tirx.all(i >= 0, i < g.in_height, j >= 0, j < g.in_width)), T.Then():
            yield ky * kw + kx, T.Bind((i * g.in_width + j) * g.in_channels)


def _scaled(acc: Expr, multiplier: Expr, zero_point: Expr, low: Expr) -> Expr:
    """clamp(rint(f32(acc) * m) + z, low, 127)."""
    return _clamped(nearest(T.cast(acc, "float32") * multiplier, _FAR) + zero_point, low)


def _clamped(value: Expr, low: Expr) -> Expr:
    return T.cast(T.max(T.min(value, T.int32(INT8_MAX)), low), "int8")
