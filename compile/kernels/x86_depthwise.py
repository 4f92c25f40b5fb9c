"""Depthwise convolutions on x86-64 that no pointwise convolution takes in: the fast 3x3 one, and any other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import x86_vector as v
from .x86_conv import PARAMETERS, ROW_ZERO, Depthwise, ceil_div, depthwise_operands, input_operand, stored_channels
from .x86_vector import Buffer, Expr, Isa, Parameter


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
        return self.depthwise.height * self.depthwise.width

    @property
    def pixels_per_task(self) -> int:
        return ceil_div(self.pixels, 32)

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, weights, biases, multipliers, parameters, y."""
        isa, stride = self.isa, stored_channels(self.depthwise.channels)
        operands = [
            Parameter("x", *input_operand(self.depthwise)),
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
    """Any window, stride and padding. A task is a row of outputs. Multiplies in int32, tap after tap."""

    isa: Isa
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]  # top, left
    out_height: int
    out_width: int
    bounded: bool

    @property
    def symbol(self) -> str:
        (kh, kw), (sy, sx), (top, left) = self.kernel, self.strides, self.padding
        wide = "" if self.bounded else "_wide"
        return (
            f"depthwise_{self.isa.name}_{self.height}x{self.width}x{self.channels}_k{kh}x{kw}_s{sy}x{sx}"
            f"_p{top}_{left}_to{self.out_height}x{self.out_width}{wide}"
        )

    @property
    def chunks(self) -> int:
        return ceil_div(self.channels, self.isa.bytes)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, weights (tap, channel; int32), biases, multipliers, parameters (input's u of zero), y."""
        isa, stride, (kh, kw) = self.isa, stored_channels(self.channels), self.kernel
        total = self.chunks * isa.bytes
        operands = [
            Parameter("x", "uint8", self.height * self.width * stride),
            Parameter("w", "int32", kh * kw * total),
            Parameter("b", "int32", total),
            Parameter("m", "float32", total),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", "uint8", self.out_height * self.out_width * stride),
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
                    at_y = T.Bind(row * self.strides[0] - self.padding[0] + ky)
                    at_x = T.Bind(column * self.strides[1] - self.padding[1] + kx)
                    inside = tirx.all(at_y >= 0, at_y < self.height, at_x >= 0, at_x < self.width)
                    with T.If(inside), T.Then():
                        u = T.Bind(v.load(x, (at_y * self.width + at_x) * stride + base, isa.bytes))
                        for j, word in enumerate(v.widen(isa, u)):
                            tap = words(w, (ky * kw + kx) * total + base, j)
                            T.buffer_store(acc, acc[j] + (word - zero) * tap, [j])
                rounded = [v.round_scaled(isa, acc[j], words(m, base, j), self.bounded) for j in range(4)]
                v.store(y, (row * self.out_width + column) * stride + base, v.pack(isa, rounded, clamp), isa.bytes)

            def task(row: Expr) -> None:
                with T.serial(0, self.out_width) as column, T.serial(0, self.chunks) as chunk:
                    output(row, column, chunk)

            return task

        return v.kernel(self.symbol, operands, body)
