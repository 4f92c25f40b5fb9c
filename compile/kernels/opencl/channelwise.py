"""Depthwise convolutions and max pooling on a GPU: a work-group brings a tile of one block of channels, border and all,
into local memory; a work-item computes one word of it (four int8 channels or two float16) at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from . import element as element_words
from . import tir as g
from .element import Element
from .tir import VECTOR, VECTOR_BYTES, Buffer, Expr, Grid, Parameter

WORDS = VECTOR_BYTES // 4


@dataclass(frozen=True)
class Channelwise:
    """``kind`` is ``depthwise`` or ``maxpool``; ``relu``: the prologue is a ReLU.

    ``tile`` are the rows and columns of outputs of a group of ``items`` work-items.
    """

    kind: str
    element: Element
    geometry: Geometry
    relu: bool
    tile: tuple[int, int]
    items: int

    @property
    def symbol(self) -> str:
        at, (kh, kw), (sy, sx), (top, left) = self.geometry, self.geometry.kernel, self.geometry.strides, self.corner
        return (
            f"{'relu_' if self.relu else ''}{self.kind}_{self.element.name}_n{at.batch}"
            f"_{at.in_height}x{at.in_width}x{at.in_channels}_k{kh}x{kw}_s{sy}x{sx}_p{top}_{left}"
            f"_to{at.out_height}x{at.out_width}_t{self.tile[0]}x{self.tile[1]}i{self.items}"
        )

    @property
    def corner(self) -> tuple[int, int]:
        """Pixels of padding above and to the left of the first window."""
        return self.geometry.padding[0], self.geometry.padding[2]

    @property
    def depthwise(self) -> bool:
        return self.kind == "depthwise"

    @property
    def blocks(self) -> int:
        return self.element.blocks(self.geometry.in_channels)

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of input under a tile."""
        return patch(self.tile, self.geometry.kernel, self.geometry.strides)

    @property
    def patch_size(self) -> int:
        return self.patch[0] * self.patch[1]

    @property
    def local_bytes(self) -> int:
        """Local memory of a group."""
        return self.patch_size * VECTOR_BYTES

    @property
    def tiles(self) -> tuple[int, int]:
        return -(-self.geometry.out_height // self.tile[0]), -(-self.geometry.out_width // self.tile[1])

    @property
    def groups(self) -> tuple[int, int, int]:
        return self.tiles[0] * self.tiles[1], self.blocks, self.geometry.batch

    @property
    def group_size(self) -> tuple[int, int, int]:
        return self.items, 1, 1

    @property
    def _constants_bytes(self) -> int:
        """Weights, biases and multipliers."""
        e, taps = self.element, self.geometry.taps
        sums = e.lanes * (8 if e.integer else 4)
        return self.blocks * (taps * VECTOR_BYTES + sums) if self.depthwise else 0

    @property
    def requested_bytes(self) -> int:
        """Every group's loads and stores, as if there were no cache: borders of tiles are loaded by each."""
        rows = sum(_covered(self.geometry.in_height, self._span(t, 0)) for t in range(self.tiles[0]))
        columns = sum(_covered(self.geometry.in_width, self._span(t, 1)) for t in range(self.tiles[1]))
        loads = self.geometry.batch * self.blocks * rows * columns * VECTOR_BYTES
        constants = self.geometry.batch * self.tiles[0] * self.tiles[1] * self._constants_bytes
        return loads + constants + self._output_bytes

    def traffic_bytes(self, cache_bytes: int) -> int:
        """What passes between memory and a last-level cache. Even without any cache tiles load little twice, so that is
        what counts; only a block's weights stay in a cache while its tiles are done, one after the other."""
        del cache_bytes
        again = self.geometry.batch * (self.tiles[0] * self.tiles[1] - 1) * self._constants_bytes
        return self.requested_bytes - again

    @property
    def _output_bytes(self) -> int:
        return self.element.size_bytes(self.geometry.batch, self.geometry.out_pixels, self.geometry.in_channels)

    def _span(self, tile: int, axis: int) -> tuple[int, int]:
        """First position of the input under a tile, and one past the last."""
        first = tile * self.tile[axis] * self.geometry.strides[axis] - self.corner[axis]
        return first, first + self.patch[axis]

    @property
    def parameters(self) -> list[Parameter]:
        """x, [weights, biases: depthwise], [multipliers, parameters: int8; parameters: float16 depthwise], y."""
        e, at = self.element, self.geometry
        x = Parameter(VECTOR, e.count(at.batch, at.in_pixels, at.in_channels))
        y = Parameter("int32", e.count(at.batch, at.out_pixels, at.in_channels) * WORDS)
        if not self.depthwise:
            return [x, y]
        constants = [Parameter("int32", self.blocks * at.taps * WORDS), Parameter(e.word_type, self.blocks * WORDS)]
        if e.integer:
            constants.append(Parameter("float32x4", self.blocks * WORDS))
        return [x, *constants, Parameter(e.parameter_type, e.parameter_count), y]

    def build(self) -> tirx.PrimFunc:
        return g.kernel(self.symbol, self.parameters, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, *operands: Buffer) -> None:
        _Emitter(self, grid, operands).emit()


class _Emitter:
    """The code of one work-item."""

    def __init__(self, kernel: Channelwise, grid: Grid, operands: tuple[Buffer, ...]) -> None:
        self.k, self.at, self.e = kernel, kernel.geometry, kernel.element
        self.x, *constants, self.y = operands
        self.multipliers: Buffer | None = None
        if kernel.depthwise:
            self.weights, self.bias, *multipliers, self.constants = constants
            self.multipliers = multipliers[0] if self.e.integer else None
        self.item, self.block, image = grid.item[0], grid.group[1], grid.group[2]
        self.row = g.bind(T.truncdiv(grid.group[0], kernel.tiles[1]) * kernel.tile[0])
        self.column = g.bind(T.truncmod(grid.group[0], kernel.tiles[1]) * kernel.tile[1])
        self.plane = g.bind(image * kernel.blocks + self.block)
        self.staged = g.local_array(kernel.patch_size * WORDS, "int32")

    def emit(self) -> None:
        k = self.k
        g.spread(k.patch_size, k.items, self.item, self._stager())
        self.word = g.bind(T.truncmod(self.item, WORDS))
        self.place = g.bind(self.block * WORDS + self.word)
        compute = self._depthwise() if k.depthwise else self._maximum
        g.barrier()

        def output(index: Expr) -> None:
            r, c = g.bind(T.truncdiv(index, k.tile[1])), g.bind(T.truncmod(index, k.tile[1]))
            there = T.And(self.row + r < self.at.out_height, self.column + c < self.at.out_width)
            pixel = (self.plane * self.at.out_height + self.row + r) * self.at.out_width + self.column + c
            g.when(there, lambda: g.store(self.y, pixel * WORDS + self.word, compute(self._words(r, c))))

        g.spread(k.tile[0] * k.tile[1], k.items // WORDS, g.bind(T.truncdiv(self.item, WORDS)), output)

    def _stager(self) -> Callable[[Expr], None]:
        """What brings the vector of a position of the patch into local memory."""
        k, e = self.k, self.e
        padding: Expr = tirx.const(0 if k.depthwise else e.lowest_word, "int32")
        if k.depthwise and e.integer:
            padding = self.constants[element_words.PADDING]
        padding = g.bind(T.broadcast(padding, WORDS))

        def stage(index: Expr) -> None:
            iy = g.bind(self.row * self.at.strides[0] - k.corner[0] + T.truncdiv(index, k.patch[1]))
            ix = g.bind(self.column * self.at.strides[1] - k.corner[1] + T.truncmod(index, k.patch[1]))
            inside = T.And(T.And(iy >= 0, iy < self.at.in_height), T.And(ix >= 0, ix < self.at.in_width))
            value = g.choose(inside, self.x[(self.plane * self.at.in_height + iy) * self.at.in_width + ix], padding)
            if k.relu:
                # The padding word holds the zero point, and is 0 in float16: what a ReLU compares with.
                value = e.vector("max16" if e.integer else "max8", value, padding)
            T.buffer_store(self.staged, value, [T.ramp(index * WORDS, 1, WORDS)])

        return stage

    def _words(self, r: Expr, c: Expr) -> list[Expr]:
        """The input's words under the window of the tile's output (r, c)."""
        (sy, sx), width = self.at.strides, self.k.patch[1]
        first = g.bind((r * sy * width + c * sx) * WORDS + self.word)
        rows, columns = map(range, self.at.kernel)
        return [self.staged[first + (i * width + j) * WORDS] for i in rows for j in columns]

    def _maximum(self, inputs: list[Expr]) -> Expr:
        value = g.bind(inputs[0])
        for word in inputs[1:]:
            value = self.e.word("max4" if self.e.integer else "max2", value, word)
        return value

    def _depthwise(self) -> Callable[[list[Expr]], Expr]:
        """Loads the channels' weights and bias; what is returned makes an output of its inputs."""
        e, taps = self.e, self.at.taps
        weights = [g.bind(self.weights[(self.block * taps + t) * WORDS + self.word]) for t in range(taps)]
        bias = g.bind(self.bias[self.place])

        def compute(inputs: list[Expr]) -> Expr:
            sums = bias
            for x, weight in zip(inputs, weights, strict=True):
                sums = e.sums("mac4" if e.integer else "mac2", e.word_type, x, weight, sums)
            if self.multipliers is None:
                return e.word("finish2", sums, self.constants[element_words.REAL_LOW])
            ends = [self.constants[i] for i in (element_words.ZERO, element_words.LOW)]
            return e.word("finish4", sums, self.multipliers[self.place], *ends)

        return compute


def patch(tile: tuple[int, int], kernel: tuple[int, int], strides: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of input under a tile of outputs."""
    return (tile[0] - 1) * strides[0] + kernel[0], (tile[1] - 1) * strides[1] + kernel[1]


def _covered(size: int, span: tuple[int, int]) -> int:
    """How many of ``size`` positions lie in a span."""
    return max(0, min(size, span[1]) - max(0, span[0]))
