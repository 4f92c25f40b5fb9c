"""Depthwise 3x3 at stride 1 by dot products, 4 channels of 4 pixels at a time, as the prologue of a matrix product.

Of the staged rows, windows of 4 that start at each even one are laid out, for every column, as [4 channels][4 rows]: a
vector. A window holds a column of taps of two outputs, one below the other, so it is multiplied with [w0, w1, w2, 0]
and with [0, w0, w1, w2]: three sdot for 4 outputs. The results, 4 pixels by 4 channels, are what the matrix product by
dot products reads. Of a dilated convolution, two outputs one below the other share no rows: each has a window of its
own, whose fourth row does not matter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from . import epilogue, neon
from .depthwise import Depthwise
from .layout import LANES, staged_width
from .neon import Buffer, Expr
from .vector_loads import Kept

_QUAD = 4  # output pixels, and channels, of a result
_VECTORS = 6  # of weights, for 4 channels
WEIGHT_BYTES = _VECTORS * LANES // _QUAD  # for one channel
_MOST_UNROLLED = 5  # quads
_COLUMN = 4 * LANES  # bytes of the windows of a column, 16 channels


def applies(isa: str, geometry: Geometry) -> bool:
    """Whether there are dot products and the window is Xception's."""
    return (
        isa in ("dotprod", "i8mm")
        and geometry.kernel == (3, 3)
        and geometry.strides == (1, 1)
        and geometry.out_width >= _QUAD
    )


def pack_weights(weights: NDArray[np.int8], channels: int) -> NDArray[np.int8]:
    """(3, 3, C) as [channels / 4][column][upper, lower output][4 channels][4 taps], zero beyond C; flat."""
    taps = np.zeros((2, 3, channels, 4), np.int8)
    for lower in range(2):
        taps[lower, :, : weights.shape[2], lower : lower + 3] = weights.transpose(1, 2, 0)
    blocked = taps.reshape(2, 3, channels // _QUAD, _QUAD, 4).transpose(2, 1, 0, 3, 4)
    return np.ascontiguousarray(blocked).reshape(-1)


def lines_per_window(geometry: Geometry) -> int:
    """Output rows, one below the other, that a window serves."""
    return 2 if geometry.dilation[0] == 1 else 1


def windows_bytes(geometry: Geometry, rows: int) -> int:
    """Scratch for the windows of the input of ``rows`` output rows, 16 channels."""
    return -(-rows // lines_per_window(geometry)) * staged_width(geometry) * _COLUMN


class DotDepthwise:
    """Takes a band from where ``Depthwise`` has staged it. ``windows`` is scratch."""

    def __init__(self, staged: Depthwise, windows: Buffer) -> None:
        self.staged, self.windows = staged, windows
        self.width = staged_width(staged.shape.geometry)
        self.dilation = staged.shape.geometry.dilation[1]
        self.lines = lines_per_window(staged.shape.geometry)
        self.out_width = staged.shape.geometry.out_width
        self.row_bytes = self.width * _COLUMN
        self.full = self.out_width // _QUAD
        self.unroll = max(n for n in range(1, _MOST_UNROLLED + 1) if self.full % n == 0)
        self.bias = Kept(_QUAD)

    def lay_out_windows(self, rows: Expr) -> None:
        """Interleaves the bytes of every 4 staged rows; the last window of an odd number of rows has but 3."""
        staged_row, tap_row = self.width * LANES, self.staged.tap_row_bytes
        with T.serial(0, (rows + (self.lines - 1)) // self.lines) as window:
            source = neon.bind(window * (self.lines * staged_row))
            target = neon.bind(window * self.row_bytes)
            with T.serial(0, self.width) as column:
                corner = neon.bind(source + column * LANES)
                seen = [neon.load(self.staged.stage, corner + min(y, self.lines + 1) * tap_row) for y in range(4)]
                neon.st4(self.windows, target + column * _COLUMN, seen)

    def compute(
        self, rows: Expr, heights: Sequence[int], block: Expr, results: tuple[Buffer, Expr], plane: int
    ) -> None:
        """16 channels of ``rows`` output rows; there can be ``heights`` of them. ``results``: where they go, [4][pixel]
        [4 channels], ``plane`` bytes from 4 channels to the next."""
        operands = self.staged.operands
        with T.serial(0, 4) as g:
            first = neon.bind(block * 4 + g)
            weights = [neon.load(operands.weights, (first * _VECTORS + i) * LANES) for i in range(_VECTORS)]
            self.bias.set([neon.load(operands.bias, first * _QUAD, "int32x4")] * _QUAD)
            multiplier = neon.load(operands.multipliers, first * _QUAD, "float32x4")
            begin = neon.bind(results[1] + g * plane)

            def emit(window: Expr, lines: int) -> None:
                base = neon.bind(g * LANES + window * self.row_bytes)
                target = begin + window * (self.lines * self.out_width * _QUAD)
                self._row(base, weights, multiplier, lines, results[0], target)

            windows = neon.bind(rows // self.lines)
            with T.serial(0, windows) as window:
                emit(window, self.lines)
            if all(height % self.lines for height in heights):
                emit(windows, 1)
            elif any(height % self.lines for height in heights):
                with T.If(rows % self.lines == 1):
                    with T.Then():
                        emit(windows, 1)

    def _row(
        self, base: Expr, weights: list[Expr], multiplier: Expr, lines: int, results: Buffer, target: Expr
    ) -> None:
        """A row of outputs, or two: ``lines``."""
        width = self.out_width

        def quads(first: Expr, count: int) -> None:
            source = neon.bind(base + first * _COLUMN)
            reached = _QUAD * count + 2 * self.dilation
            columns = [neon.load(self.windows, source + x * _COLUMN) for x in range(reached)]
            for u in range(count):
                for line in range(lines):
                    scaled = []
                    for pixel, acc in enumerate(self.bias.load(_QUAD, _QUAD)):
                        for x in range(3):
                            column = columns[_QUAD * u + pixel + x * self.dilation]
                            acc = neon.bind(neon.sdot(acc, column, weights[2 * x + line]))
                        scaled.append(neon.bind(epilogue.scale(acc, multiplier, self.staged.output)))
                    value = epilogue.narrow16(scaled, self.staged.output)
                    offset = (first + (_QUAD * u + line * width)) * _QUAD
                    neon.store(results, target + offset, value, LANES)

        with T.serial(0, self.full // self.unroll) as i:
            quads(neon.bind(i * (self.unroll * _QUAD)), self.unroll)
        if width % _QUAD:  # the last 4, some of them anew
            quads(T.int32(width - _QUAD), 1)
