"""Depthwise 3x3 at stride 1 by dot products, 4 channels of 4 pixels at a time, in front of a packed matrix product.

Of every staged row, windows of 4 adjacent pixels starting at each even one are laid out as [4 channels][4 pixels]: one
vector. A window holds a row of taps of two outputs, so it is multiplied with [w0, w1, w2, 0] and [0, w0, w1, w2]: three
sdot for 4 outputs. The results, 4 pixels by 4 channels, are what a panel of the matrix product is made of.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from tvm.tirx.script.builder import ir as T

from . import epilogue, neon
from .depthwise import LANES, Depthwise, Window
from .gemm import Block
from .neon import Buffer, Expr, Register
from .stream import Repeated

_QUAD = 4  # output pixels, and channels, of a result
_VECTORS = 6  # of weights, for 4 channels
WEIGHT_BYTES = _VECTORS * LANES // _QUAD  # for one channel
_MOST_UNROLLED = 5  # quads


def applies(isa: str, window: Window) -> bool:
    """Whether there are dot products and the window is Xception's."""
    return (
        isa in ("dotprod", "i8mm")
        and window.kernel == (3, 3)
        and window.strides == (1, 1)
        and window.out_width >= _QUAD
    )


def pack_weights(weights: NDArray[np.int8], channels: int) -> NDArray[np.int8]:
    """(3, 3, C) as [channels / 4][row][even, odd output][4 channels][4 taps], zero beyond C; flat."""
    taps = np.zeros((2, 3, channels, 4), np.int8)
    for odd in range(2):
        taps[odd, :, : weights.shape[2], odd : odd + 3] = weights.transpose(0, 2, 1)
    blocked = taps.reshape(2, 3, channels // _QUAD, _QUAD, 4).transpose(2, 1, 0, 3, 4)
    return np.ascontiguousarray(blocked).reshape(-1)


def quads(window: Window) -> int:
    """Groups of 4 outputs that cover a row."""
    return -(-window.out_width // _QUAD)


def windows_bytes(window: Window, rows: int) -> int:
    """Scratch for the windows of the input of ``rows`` output rows, 16 channels."""
    return 4 * _plane_bytes(window, rows)


def _plane_bytes(window: Window, rows: int) -> int:
    return window.staged_rows(rows) * quads(window) * 2 * LANES


def results_plane_bytes(pixels: int) -> int:
    """4 channels of a band's outputs, and room for the pixels that a quad has beyond its row or its panel."""
    return -(-(pixels + 3 * _QUAD) * _QUAD // LANES) * LANES


class DotDepthwise:
    """Takes a band from where ``Depthwise`` has staged it. ``windows`` and ``results`` are scratch."""

    def __init__(self, staged: Depthwise, rows_per_task: int, windows: Buffer, results: Buffer) -> None:
        self.staged, self.windows, self.results = staged, windows, results
        self.rows_per_task = rows_per_task
        self.window = staged.shape.window
        self.plane = _plane_bytes(self.window, rows_per_task)
        self.results_plane = results_plane_bytes(rows_per_task * self.window.out_width)
        self.left = [Register("int8x16") for _ in range(2)]
        self.unroll = max(n for n in range(1, _MOST_UNROLLED + 1) if quads(self.window) % n == 0)
        self.bias = Repeated(_QUAD * self.unroll)

    def lay_out_windows(self, rows: Expr) -> None:
        """Zips pixels, then pairs of pixels, of every staged row."""
        count = quads(self.window)
        with T.serial(0, rows + (self.window.kernel[0] - 1)) as row:
            source = neon.bind(row * (self.window.staged_width * LANES))
            target = neon.bind(row * (count * 2 * LANES))
            for register, v in zip(self.left, self._pair(source), strict=True):
                register.set(v)
            with T.serial(0, count) as i:
                corner = neon.bind(source + i * (_QUAD * LANES))
                pairs = [
                    [neon.bind(register.get()) for register in self.left],
                    self._pair(corner + 2 * LANES),
                    self._pair(corner + 4 * LANES),
                ]
                for register, v in zip(self.left, pairs[2], strict=True):
                    register.set(v)
                for g in range(4):
                    for w in range(2):
                        vector = _zip16(pairs[w][g // 2], pairs[w + 1][g // 2], g % 2)
                        neon.store(self.windows, target + i * (2 * LANES) + (g * self.plane + w * LANES), vector, LANES)

    def _pair(self, offset: Expr) -> list[Expr]:
        """Two adjacent pixels zipped: channels 0 to 7, and 8 to 15."""
        a, b = (neon.load(self.staged.stage, offset + i * LANES) for i in range(2))
        return [neon.bind(neon.shuffle([a, b], [i // 2 + i % 2 * LANES for i in range(f, f + 16)])) for f in (0, 16)]

    def compute(self, rows: Expr, block: Expr) -> None:
        """16 channels of ``rows`` output rows into ``results``: [4][pixel][4 channels]."""
        operands, window = self.staged.operands, self.window
        row_bytes = quads(window) * 2 * LANES
        unroll = self.unroll
        with T.serial(0, 4) as g:
            first = neon.bind(block * 4 + g)
            weights = [neon.load(operands.weights, (first * _VECTORS + i) * LANES) for i in range(_VECTORS)]
            self.bias.set([neon.load(operands.bias, first * _QUAD, "int32x4")])
            multiplier = neon.load(operands.multipliers, first * _QUAD, "float32x4")
            with T.serial(0, rows) as row:
                base = neon.bind(g * self.plane + row * row_bytes)
                target = neon.bind(g * self.results_plane + row * (window.out_width * _QUAD))

                def quad(i: Expr, starts: list[Expr]) -> None:
                    seen = [
                        [
                            neon.load(self.windows, base + i * (2 * LANES) + (y * row_bytes + w * LANES))
                            for w in range(2)
                        ]
                        for y in range(3)
                    ]
                    scaled = []
                    for pixel, acc in enumerate(starts):
                        for y in range(3):
                            acc = neon.bind(neon.sdot_vector(acc, seen[y][pixel // 2], weights[2 * y + pixel % 2]))
                        scaled.append(neon.bind(epilogue.scale(acc, multiplier)))
                    value = epilogue.narrow16(scaled, self.staged.output)
                    neon.store(self.results, target + i * LANES, value, LANES)

                with T.serial(0, quads(window) // unroll) as i:
                    starts = self.bias.load(_QUAD * unroll)
                    for u in range(unroll):
                        quad(i * unroll + u, starts[_QUAD * u : _QUAD * (u + 1)])

    def pack(self, block: Block, panel_index: Expr, packed: int, panels: Buffer, base: Expr) -> None:
        """``packed`` pixels of 16 channels into a panel; ``base`` as ``gemm.pack`` has it."""
        for r in range(0, packed, _QUAD):
            source = neon.bind(panel_index * (block.rows * _QUAD))
            planes = [neon.load(self.results, source + (g * self.results_plane + r * _QUAD)) for g in range(4)]
            if block.depth == 4:
                for g, v in enumerate(planes):
                    neon.store(panels, base + (g * packed * 4 + r * 4), v, LANES)
                continue
            words = [neon.reinterpret("int32x4", v) for v in planes]
            for half in range(2):
                for part in range(2):
                    lanes = [2 * part, 4 + 2 * part, 2 * part + 1, 5 + 2 * part]
                    v = neon.reinterpret("int8x16", neon.shuffle(words[2 * half : 2 * half + 2], lanes))
                    neon.store(panels, base + (half * packed * 8 + (r + 2 * part) * 8), v, LANES)


def _zip16(ab: Expr, cd: Expr, half: int) -> Expr:
    """Pairs of bytes of two vectors, interleaved: the first or the second 4 channels of 4 pixels."""
    order = [lane for i in range(4 * half, 4 * half + 4) for lane in (i, 8 + i)]
    halfwords = neon.shuffle([neon.reinterpret("int16x8", v) for v in (ab, cd)], order)
    return neon.reinterpret("int8x16", halfwords)
