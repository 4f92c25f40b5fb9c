"""Depthwise convolutions on x86-64: the 3x3 one that feeds a pointwise convolution or stands alone, and any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models import graph as ir
from ..prim_func import Parameter
from . import vector as v
from .layout import PADDING, PARAMETERS, RELU_ZERO, ROW_ZERO, ceil_div, stored_channels, window_symbol
from .vector import Buffer, Expr, Isa


@dataclass(frozen=True)
class Depthwise:
    """Rows are the outputs of a 3x3 depthwise convolution at stride 1 with a padding of one pixel.

    ``relu``: a ReLU is applied to what is read. ``bounded``: see ``round_scaled``.

    A padded column is one constant vector. A padded row is read from inside the image and multiplied by zero: the
    weights come in variants (0: inner rows, 1: first, 2: last; one if there is only one row), each with its bias.
    """

    geometry: ir.Geometry
    relu: bool
    bounded: bool

    @property
    def symbol(self) -> str:
        g, flags = self.geometry, ("_relu" if self.relu else "") + ("" if self.bounded else "_wide")
        return f"dw3x3_{g.in_height}x{g.in_width}x{g.in_channels}{flags}"

    @property
    def variants(self) -> int:
        return 3 if self.geometry.in_height > 1 else 1

    def chunks(self, isa: Isa) -> int:
        return ceil_div(self.geometry.in_channels, isa.bytes)

    def k_position(self, isa: Isa) -> NDArray[np.int64]:
        """Shape (1, 1, C): where each channel stands in a row."""
        c = np.arange(self.geometry.in_channels)
        if isa.vnni:
            return c.reshape(1, 1, -1)
        chunk, lane, half, rest = c // isa.bytes, c % isa.bytes // 16, c % 16 // 8, c % 8
        return (chunk * isa.bytes + half * (isa.bytes // 2) + lane * 8 + rest).reshape(1, 1, -1)

    def emit(
        self, isa: Isa, buffers: dict[str, Buffer], first: Expr, last: Expr, rows: Buffer, stride: int, origin: Expr
    ) -> None:
        """Fills rows[(p - first + origin) * stride ...] for the pixels first <= p < last."""

        def write(pixel: Expr, chunk: Expr, u: Expr) -> None:
            offset = (pixel - first + origin) * stride + chunk * isa.bytes
            if isa.vnni:
                v.store(rows, offset, u, isa.bytes)
                return
            half, zero = isa.bytes // 2, v.splat(0, "uint8", isa.bytes)
            for i in range(2):
                wide = v.reinterpret(v.unpack(isa, u, zero, 8, bool(i)), f"int16x{half}")
                v.store(rows, offset + half * i, wide, half)

        self.emit_pixels(isa, buffers, first, last, write)

    def emit_pixels(
        self,
        isa: Isa,
        buffers: dict[str, Buffer],
        first: Expr,
        last: Expr,
        write: Callable[[Expr, Expr, Expr], None],
    ) -> None:
        """``write(pixel, chunk, u)`` receives every vector of outputs."""
        height, width = self.geometry.in_height, self.geometry.in_width
        pixel = stored_channels(self.geometry.in_channels)
        x, parameters = buffers["x"], buffers["parameters"]
        clamp = v.load_clamp(isa, parameters, ROW_ZERO)
        outside = T.Bind(v.reinterpret(T.broadcast(parameters[PADDING], isa.words), f"uint8x{isa.bytes}"))
        below = T.Bind(v.splat(T.cast(parameters[RELU_ZERO], "uint8"), "uint8", isa.bytes)) if self.relu else None
        row_width = T.int32(width)
        y_first, y_last = tirx.truncdiv(first, row_width), tirx.truncdiv(last - 1, row_width)
        with T.serial(y_first, y_last + 1) as y:
            begin = T.Bind(T.max(first - y * width, 0))
            end = T.Bind(T.min(last - y * width, width))
            base = [
                T.Bind(T.max(y - 1, 0) * (width * pixel)),
                T.Bind(y * (width * pixel)),
                T.Bind(T.min(y + 1, height - 1) * (width * pixel)),
            ]
            variant: Expr | int = 0
            if height > 1:
                variant = T.Bind(tirx.Select(y == 0, 1, tirx.Select(y == height - 1, 2, 0)))
            with T.serial(0, self.chunks(isa)) as chunk:

                def column(at: Expr) -> list[Expr]:
                    vectors = []
                    for row in base:
                        u = v.load(x, row + at * pixel + chunk * isa.bytes, isa.bytes)
                        if below is not None:
                            u = v.intrinsic(f"uint8x{isa.bytes}", "llvm.usub.sat", u, below)
                        vectors.append(T.Bind(u))
                    return _operands(isa, v.interleave(isa, vectors))

                def write_pixel(at: Expr, acc: Buffer) -> None:
                    scales = [v.load(buffers["row_m"], (chunk * 4 + j) * isa.words, isa.words) for j in range(4)]
                    words = [v.round_scaled(isa, acc[j], scales[j], self.bounded) for j in range(4)]
                    write(y * width + at, chunk, v.pack(isa, words, clamp))

                self._slide(isa, buffers, variant, chunk, begin, end, outside, column, write_pixel)

    def _slide(
        self,
        isa: Isa,
        buffers: dict[str, Buffer],
        variant: Expr | int,
        chunk: Expr,
        begin: Expr,
        end: Expr,
        outside: Expr,
        column: Callable[[Expr], list[Expr]],
        write_pixel: Callable[[Expr, Buffer], None],
    ) -> None:
        """Walks over the columns; each is interleaved once and enters the three outputs it lies under."""
        chunks = self.chunks(isa)
        weight_base = (variant * chunks + chunk) * (12 * isa.bytes)
        bias_base = (variant * chunks + chunk) * isa.bytes
        words = f"int32x{isa.words}"
        elements, per_word = isa.operand_elements, isa.bytes // isa.operand_elements

        def weight(i: int, j: int, h: int) -> Expr:
            return T.Bind(v.load(buffers["row_w"], weight_base + ((i * 4 + j) * per_word + h) * elements, elements))

        taps = [[[weight(i, j, h) for h in range(per_word)] for j in range(4)] for i in range(3)]
        bias = [v.load(buffers["row_b"], bias_base + j * isa.words, isa.words) for j in range(4)]
        # Sums of the pixel before the column at hand, of the one at it and of the one after it.
        sums = [T.alloc_buffer((4,), words, scope="global") for _ in range(3)]
        edge = T.alloc_buffer((4 * per_word,), f"{isa.operand}x{elements}", scope="global")

        def tap(acc: Expr, operands: list[Expr], i: int, j: int) -> Expr:
            for h in range(per_word):
                acc = v.dot(isa, acc, operands[j * per_word + h], taps[i][j][h])
            return acc

        def at_edge(condition: Expr, at: Expr) -> list[Expr]:
            with T.If(condition):
                with T.Then():
                    for i, operand in enumerate(column(at)):
                        T.buffer_store(edge, operand, [i])
                with T.Else():
                    for i, operand in enumerate(_operands(isa, [outside] * 4)):
                        T.buffer_store(edge, operand, [i])
            return [T.Bind(edge[i]) for i in range(4 * per_word)]

        def step(at: Expr, before: Buffer, here: Buffer, after: Buffer) -> None:
            operands = column(at)
            for j in range(4):
                T.buffer_store(before, tap(before[j], operands, 2, j), [j])
            write_pixel(at - 1, before)
            for j in range(4):
                T.buffer_store(here, tap(here[j], operands, 1, j), [j])
                T.buffer_store(after, tap(bias[j], operands, 0, j), [j])

        first = at_edge(begin > 0, begin - 1)
        second = column(begin)
        for j in range(4):
            T.buffer_store(sums[0], tap(tap(bias[j], first, 0, j), second, 1, j), [j])
            T.buffer_store(sums[1], tap(bias[j], second, 0, j), [j])
        # Three columns a turn, so that the roles of the sums change without a copy.
        turns = T.Bind(tirx.truncdiv(end - begin - 1, T.int32(3)))
        with T.serial(0, turns) as turn:
            for i in range(3):
                step(begin + 1 + turn * 3 + i, sums[i], sums[(i + 1) % 3], sums[(i + 2) % 3])
        with T.serial(begin + 1 + turns * 3, end) as at:
            step(at, sums[0], sums[1], sums[2])
            for j in range(4):
                T.buffer_store(sums[0], sums[1][j], [j])
                T.buffer_store(sums[1], sums[2][j], [j])
        final = at_edge(end < self.geometry.in_width, end)
        for j in range(4):
            T.buffer_store(sums[0], tap(sums[0][j], final, 2, j), [j])
        write_pixel(end - 1, sums[0])


def _operands(isa: Isa, words: list[Expr]) -> list[Expr]:
    """Vectors of (row 0, row 1, row 2, 0) bytes as the dot product takes them; for int16 (row 0, row 2), (row 1, 0)."""
    if isa.vnni:
        return words
    half = isa.bytes // 2
    result = []
    for word in words:
        pairs = v.reinterpret(word, f"uint16x{half}")
        for value in (pairs & v.splat(0xFF, "uint16", half), pairs >> v.splat(8, "uint16", half)):
            result.append(T.Bind(v.reinterpret(value, f"int16x{half}")))
    return result


def pack_taps(isa: Isa, taps: NDArray[np.int64], total: int) -> NDArray[np.generic]:
    """(3, 3, C) -> per chunk of channels, per column of taps, per vector: the words' (row 0, row 1, row 2, 0)."""
    padded = np.zeros((4, 3, total), isa.weight)
    padded[:3, :, : taps.shape[2]] = taps
    words = padded.reshape(4, 3, -1, isa.bytes)[..., v.lane_order(isa)]  # row, column, chunk, vector, word
    words = words.transpose(2, 1, 3, 4, 0)  # chunk, column, vector, word, row
    if isa.vnni:
        return words.reshape(-1)
    pairs = words[..., [[0, 2], [1, 3]]]  # chunk, column, vector, word, half, pair
    return pairs.transpose(0, 1, 2, 4, 3, 5).reshape(-1)


def depthwise_operands(isa: Isa, producer: object) -> list[Parameter]:
    """Weights, biases and multipliers of a depthwise prologue; none for another producer."""
    if not isinstance(producer, Depthwise):
        return []
    channels = producer.chunks(isa) * isa.bytes
    return [
        Parameter("row_w", isa.weight, producer.variants * channels * 12),
        Parameter("row_b", "int32", producer.variants * channels),
        Parameter("row_m", "float32", channels),
    ]


@dataclass(frozen=True)
class DepthwiseAlone:
    """``Depthwise`` into a stored tensor. A task is a run of pixels."""

    isa: Isa
    depthwise: Depthwise

    @property
    def symbol(self) -> str:
        return f"alone_{self.isa.name}_{self.depthwise.symbol}"

    @property
    def pixels(self) -> int:
        return self.depthwise.geometry.in_pixels

    @property
    def pixels_per_task(self) -> int:
        return ceil_div(self.pixels, 32)

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, weights, biases, multipliers, parameters, y."""
        isa, stride = self.isa, stored_channels(self.depthwise.geometry.in_channels)
        operands = [
            Parameter("x", "uint8", self.pixels * stride),
            *depthwise_operands(isa, self.depthwise),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", "uint8", self.pixels * stride),
        ]

        def body(*values: Buffer) -> Callable[[Expr], None]:
            buffers = {p.name: value for p, value in zip(operands, values, strict=True)}

            def write(pixel: Expr, chunk: Expr, u: Expr) -> None:
                v.store(buffers["y"], pixel * stride + chunk * isa.bytes, u, isa.bytes)

            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                last = T.Bind(T.min(first + self.pixels_per_task, self.pixels))
                self.depthwise.emit_pixels(isa, buffers, first, last, write)

            return task

        return v.kernel(self.symbol, operands, body)


@dataclass(frozen=True)
class DepthwiseAny:
    """Any window, stride, dilation and padding. A task is a row of outputs. Multiplies in int32, tap after tap."""

    isa: Isa
    geometry: ir.Geometry
    bounded: bool

    @property
    def symbol(self) -> str:
        return f"depthwise_{self.isa.name}_{window_symbol(self.geometry)}{'' if self.bounded else '_wide'}"

    @property
    def chunks(self) -> int:
        return ceil_div(self.geometry.in_channels, self.isa.bytes)

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Operands: x, weights (tap, channel; int32), biases, multipliers, parameters (input's u of zero), y."""
        isa, g = self.isa, self.geometry
        (kh, kw), (sy, sx), (dy, dx), (top, _, left, _) = g.kernel, g.strides, g.dilation, g.padding
        stride = stored_channels(g.in_channels)
        total = self.chunks * isa.bytes
        operands = [
            Parameter("x", "uint8", g.in_pixels * stride),
            Parameter("w", "int32", kh * kw * total),
            Parameter("b", "int32", total),
            Parameter("m", "float32", total),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", "uint8", g.out_pixels * stride),
        ]

        def body(x: Buffer, w: Buffer, b: Buffer, m: Buffer, parameters: Buffer, y: Buffer) -> Callable[[Expr], None]:
            clamp = v.load_clamp(isa, parameters, ROW_ZERO)
            zero = T.Bind(T.broadcast(parameters[0], isa.words))
            acc = T.alloc_buffer((4,), f"int32x{isa.words}", scope="global")

            def words(buffer: Buffer, base: Expr, j: int) -> Expr:
                return v.load(buffer, base + j * isa.words, isa.words)

            def output(row: Expr, column: Expr, chunk: Expr) -> None:
                base = T.Bind(chunk * isa.bytes)
                for j in range(4):
                    T.buffer_store(acc, words(b, base, j), [j])
                with T.serial(0, kh) as ky, T.serial(0, kw) as kx:
                    at_y = T.Bind(row * sy - top + ky * dy)
                    at_x = T.Bind(column * sx - left + kx * dx)
                    inside = tirx.all(at_y >= 0, at_y < g.in_height, at_x >= 0, at_x < g.in_width)
                    with T.If(inside), T.Then():
                        u = T.Bind(v.load(x, (at_y * g.in_width + at_x) * stride + base, isa.bytes))
                        for j, word in enumerate(v.widen(isa, u)):
                            tap = words(w, (ky * kw + kx) * total + base, j)
                            T.buffer_store(acc, acc[j] + (word - zero) * tap, [j])
                rounded = [v.round_scaled(isa, acc[j], words(m, base, j), self.bounded) for j in range(4)]
                v.store(y, (row * g.out_width + column) * stride + base, v.pack(isa, rounded, clamp), isa.bytes)

            def task(row: Expr) -> None:
                with T.serial(0, g.out_width) as column, T.serial(0, self.chunks) as chunk:
                    output(row, column, chunk)

            return task

        return v.kernel(self.symbol, operands, body)
