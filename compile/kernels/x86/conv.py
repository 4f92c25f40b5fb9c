"""Convolutions on x86-64: a register-blocked matrix product fed by a small buffer of rows made on the spot.

A task owns a run of output pixels. It first fills its rows of what is multiplied (``Gather``: the input values under
each window; ``Depthwise``: a whole 3x3 depthwise convolution, which in Xception always precedes a pointwise one), then
multiplies them with all weights. The rows stay in the nearest caches and are never written to memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ..prim_func import Parameter
from . import vector as v
from .depthwise import Depthwise, depthwise_operands
from .gather import Gather
from .layout import OUT_ZERO, PARAMETERS, ceil_div, row_stride, stored_channels
from .product import Matrix, Output, emit_panel, panels, product_operands
from .vector import Buffer, Expr, Isa

Producer = Gather | Depthwise  # what makes a product's rows; the latter is a prologue


def input_operand(producer: Producer) -> tuple[str, int]:
    """Element type and count of what a producer reads."""
    geometry = producer.geometry
    if isinstance(producer, Gather) and producer.plain:
        return "int8", geometry.in_pixels * geometry.in_channels
    return "uint8", geometry.in_pixels * stored_channels(geometry.in_channels)


@dataclass(frozen=True)
class Convolution:
    """``pixels`` outputs of ``channels`` from rows of ``k`` values, ``pixels_per_task`` at a time."""

    isa: Isa
    producer: Producer
    pixels: int
    k: int
    channels: int
    pixels_per_task: int
    bounded: bool

    @property
    def symbol(self) -> str:
        wide = "" if self.bounded else "_wide"
        name = "conv" if isinstance(self.producer, Gather) else "separable"
        return f"{name}_{self.isa.name}_{self.producer.symbol}_to{self.channels}_b{self.pixels_per_task}{wide}"

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    @property
    def output_count(self) -> int:
        return self.pixels * stored_channels(self.channels)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, [depthwise weights, biases, multipliers], weights, biases, multipliers, parameters, y."""
        isa, producer = self.isa, self.producer
        steps, stride = ceil_div(self.k, isa.group), row_stride(self.k)
        out_stride = stored_channels(self.channels)
        operands = [
            Parameter("x", *input_operand(producer)),
            *depthwise_operands(isa, producer),
            *product_operands(isa, self.k, self.channels),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", "uint8", self.output_count),
        ]

        def body(*values: Buffer) -> Callable[[Expr], None]:
            buffers = {p.name: value for p, value in zip(operands, values, strict=True)}
            clamp = v.load_clamp(isa, buffers["parameters"], OUT_ZERO)
            rows = T.alloc_buffer((self.pixels_per_task * stride,), isa.operand, scope="global", align=64)

            matrix = Matrix(buffers["w"], buffers["b"], buffers["m"], steps, self.bounded, clamp)

            def multiply(first: Expr, height: int) -> None:
                column = 0
                for count, vectors in panels(isa, self.channels):
                    width = vectors * isa.words
                    with T.serial(0, count) as p:
                        at = T.Bind(column + p * width)
                        output = Output(buffers["y"], first * out_stride + at, out_stride, width)
                        emit_panel(isa, matrix, rows, stride, height, at, vectors, output)
                    column += count * width

            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                last = T.Bind(T.min(first + self.pixels_per_task, self.pixels))
                producer.emit(isa, buffers, first, last, rows, stride, T.int32(0))
                rest = self.pixels % self.pixels_per_task
                if not rest:
                    multiply(first, self.pixels_per_task)
                    return
                with T.If(t < self.tasks - 1):
                    with T.Then():
                        multiply(first, self.pixels_per_task)
                    with T.Else():
                        multiply(first, rest)

            return task

        return v.kernel(self.symbol, operands, body)


@dataclass(frozen=True)
class Rows:
    """The rows of a product alone, into the arena: for one whose tasks are columns."""

    isa: Isa
    producer: Producer
    pixels: int
    k: int

    @property
    def symbol(self) -> str:
        return f"rows_{self.isa.name}_{self.producer.symbol}"

    @property
    def pixels_per_task(self) -> int:
        """Whole rows, whatever their number: a row cut in two is begun twice."""
        return ceil_div(self.producer.geometry.out_height, 16) * self.producer.geometry.out_width

    @property
    def tasks(self) -> int:
        return ceil_div(self.pixels, self.pixels_per_task)

    @property
    def count(self) -> int:
        return self.pixels * row_stride(self.k)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, [depthwise weights, biases, multipliers], parameters, y."""
        operands = [
            Parameter("x", *input_operand(self.producer)),
            *depthwise_operands(self.isa, self.producer),
            Parameter("parameters", "int32", PARAMETERS),
            Parameter("y", self.isa.operand, self.count),
        ]

        def body(*values: Buffer) -> Callable[[Expr], None]:
            buffers = {p.name: value for p, value in zip(operands, values, strict=True)}

            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                last = T.Bind(T.min(first + self.pixels_per_task, self.pixels))
                self.producer.emit(self.isa, buffers, first, last, buffers["y"], row_stride(self.k), first)

            return task

        return v.kernel(self.symbol, operands, body)
