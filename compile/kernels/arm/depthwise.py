"""Depthwise convolution for AArch64, 16 channels at a time over a staged band of rows.

The band's input is first copied, 16 channels wide, into a scratch image with its padding around it (and the
preceding ReLU applied), so that the arithmetic sees neither borders nor the full map's stride. Two int8 products are
summed in int16 (weights are at least -127, so |sum| <= 2 * 127 * 128 < 2^15), the sums in int32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from . import epilogue, neon
from .layout import LANES, staged_parts, staged_rows, staged_width, stored_channels, tap_pitch, window_name
from .neon import Buffer, Expr

_PIXELS = 2  # output pixels whose windows share loads


@dataclass(frozen=True)
class DepthwiseShape:
    """A depthwise convolution. ``input_relu``: its prologue is a ReLU. ``range``: of its accumulators."""

    geometry: Geometry
    relu: bool
    input_relu: bool
    range: epilogue.Range

    @property
    def channels(self) -> int:
        """As stored."""
        return stored_channels(self.geometry.in_channels)

    def __str__(self) -> str:
        flags = ("_relu" if self.relu else "") + ("_after_relu" if self.input_relu else "") + str(self.range)
        return f"dw{window_name(self.geometry)}_c{self.channels}{flags}"


@dataclass(frozen=True)
class DepthwiseOperands:
    """Weights [channels / 16][taps][16] int8, biases int32 and multipliers float32, [channels] each; the int32
    ``constants`` from ``first_constant``: input zero point, output zero point, zero point before ``input_relu``."""

    weights: Buffer
    bias: Buffer
    multipliers: Buffer
    constants: Buffer
    first_constant: int = 0


def pack_weights(weights: NDArray[np.int8], channels: int) -> NDArray[np.int8]:
    """(KH, KW, C) as [channels / 16][KH * KW][16], zero beyond C; flat."""
    taps = weights.shape[0] * weights.shape[1]
    padded = np.zeros((taps, channels), np.int8)
    padded[:, : weights.shape[2]] = weights.reshape(taps, -1)
    blocked = padded.reshape(taps, channels // LANES, LANES).transpose(1, 0, 2)
    return np.ascontiguousarray(blocked).reshape(-1)


def stage_bytes(geometry: Geometry, rows: int) -> int:
    """Scratch for the input of ``rows`` output rows, and the pixels beyond that the last outputs together may read."""
    return (staged_rows(geometry, rows) * staged_width(geometry) + 4 * geometry.strides[1]) * LANES


class Depthwise:
    """Emits one depthwise convolution, band by band: of ``rows`` output rows, but for the last. ``stage`` is scratch of
    ``stage_bytes``."""

    def __init__(self, shape: DepthwiseShape, operands: DepthwiseOperands, x: Buffer, stage: Buffer, rows: int) -> None:
        self.shape, self.operands, self.x, self.stage, self.rows = shape, operands, x, stage, rows
        first, constants = operands.first_constant, operands.constants
        self.fill = neon.bind(neon.splat(T.cast(constants[first], "int8"), LANES))
        self.output = epilogue.load_output(constants, first + 1, shape.relu, shape.range)
        if shape.input_relu:
            zero = neon.bind(constants[first + 2])
            self.relu_least = neon.bind(neon.splat(T.cast(zero, "int8"), LANES))
            self.relu_offset = neon.bind(neon.splat(T.cast(-128 - zero, "int8"), LANES))

    @property
    def tap_row_bytes(self) -> int:
        """Of scratch, from one row of taps to the next."""
        geometry = self.shape.geometry
        return tap_pitch(geometry, self.rows) * staged_width(geometry) * LANES

    def begin_band(self) -> None:
        """Once per band, before its channel blocks: the padding."""
        geometry = self.shape.geometry
        if any(geometry.padding):
            count = staged_rows(geometry, self.rows) * staged_width(geometry)
            with T.serial(0, count) as i:
                neon.store(self.stage, i * LANES, self.fill, LANES)

    def stage_channels(self, first_row: Expr, rows: Expr, block: Expr) -> None:
        """Copies what output rows [first_row, first_row + rows) read of 16 channels."""
        g, channels = self.shape.geometry, self.shape.channels
        for part in staged_parts(g, self.rows):
            top = neon.bind(first_row * g.strides[0] - (g.padding[0] - part.source))
            first = T.max(T.int32(0), -top)
            last = T.min((rows - 1) * g.strides[0] + part.reach, g.in_height - top)
            with T.serial(first, last) as row:
                source = neon.bind((top + row) * (g.in_width * channels) + block * LANES)
                target = neon.bind(((row + part.target) * staged_width(g) + g.padding[2]) * LANES)
                self._copy_row(source, target)

    def _copy_row(self, source: Expr, target: Expr) -> None:
        width, channels = self.shape.geometry.in_width, self.shape.channels
        unroll = 8
        full, rest = divmod(width, unroll)

        def copy(first: Expr, count: int) -> None:
            base = neon.bind(source + first * channels)
            values = [neon.load(self.x, base + i * channels) for i in range(count)]
            for i, v in enumerate(values):
                neon.store(self.stage, target + (first + i) * LANES, self._relu(v), LANES)

        if full:
            with T.serial(0, full) as i:
                copy(i * unroll, unroll)
        if rest:
            copy(T.int32(full * unroll), rest)

    def _relu(self, v: Expr) -> Expr:
        """clamp(x - z, 0, 255) - 128 = max(x, z) + (-128 - z), modulo 256."""
        if not self.shape.input_relu:
            return v
        return neon.add_wrapping(neon.smax(v, self.relu_least), self.relu_offset)

    def compute(self, rows: Expr, block: Expr, store: Callable[[Expr, Expr], None]) -> None:
        """16 channels of ``rows`` output rows; ``store(pixel, value)`` gets each int8x16 and its index in the band.

        Where the width is odd, one pixel beyond each row is stored before the next row's first: leave room for one.
        """
        g, operands, taps = self.shape.geometry, self.operands, self.shape.geometry.taps
        weights = [neon.load(operands.weights, (block * taps + i) * LANES) for i in range(taps)]
        bias = [neon.load(operands.bias, block * LANES + 4 * i, "int32x4") for i in range(4)]
        multipliers = [neon.load(operands.multipliers, block * LANES + 4 * i, "float32x4") for i in range(4)]
        row_bytes = staged_width(g) * LANES
        with T.serial(0, rows) as row:
            base = neon.bind(row * (g.strides[0] * row_bytes))
            pixel = neon.bind(row * g.out_width)

            def step(first: Expr, count: int) -> None:
                corner = neon.bind(base + first * (g.strides[1] * LANES))
                columns = (count - 1) * g.strides[1] + g.extent[1]  # LLVM drops what no tap reads
                image = [
                    [neon.load(self.stage, corner + y * self.tap_row_bytes + x * LANES) for x in range(columns)]
                    for y in range(g.kernel[0])
                ]
                for i in range(count):
                    seen = [v for line in image for v in line[i * g.strides[1] :][: g.extent[1] : g.dilation[1]]]
                    acc = _accumulate(seen, weights, bias)
                    scaled = [
                        neon.bind(epilogue.scale(a, m, self.output)) for a, m in zip(acc, multipliers, strict=True)
                    ]
                    store(pixel + first + i, epilogue.narrow16(scaled, self.output))

            full, rest = divmod(g.out_width, _PIXELS)
            if full:
                with T.serial(0, full) as i:
                    step(i * _PIXELS, _PIXELS)
            if rest:
                step(T.int32(full * _PIXELS), rest)


def _accumulate(xs: list[Expr], ws: list[Expr], bias: list[Expr]) -> list[Expr]:
    """bias + sum of x * w: smull, smlal into int16 for two taps, saddw into int32."""
    acc = list(bias)
    for first in range(0, len(xs), 2):
        pair = list(zip(xs[first : first + 2], ws[first : first + 2], strict=True))
        for half, part in enumerate((neon.low, neon.high)):
            products = [neon.smull(part(x, LANES), part(w, LANES)) for x, w in pair]
            total = neon.bind(products[0] if len(products) == 1 else products[0] + products[1])
            for quarter, quarter_of in enumerate((neon.low, neon.high)):
                index = 2 * half + quarter
                acc[index] = neon.bind(acc[index] + neon.widen(quarter_of(total, 8), "int32x4"))
    return acc
