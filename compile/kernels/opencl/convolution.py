"""Dense convolutions on a GPU, pointwise ones above all: a work-group computes a tile of pixels by blocks of channels,
a work-item a few pixels of one block, and each step walks a few blocks of input channels under all taps.

Where ``Tile.staged``, the group brings a step's pixels and weights into local memory once, together; else every
work-item loads for itself, which is right on GPUs whose local memory is ordinary memory (Mali).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from . import element as element_words
from . import tir as g
from .element import Element
from .tir import VECTOR, VECTOR_BYTES, Buffer, Expr, Grid, Parameter

PLAIN_CHANNELS = 4  # at most, of an input that is read as the network's plain NHWC


@dataclass(frozen=True)
class Tile:
    """``across`` by ``down`` work-items: neighbours across have neighbouring pixels, neighbours down have neighbouring
    blocks of output channels. A work-item computes ``pixels`` pixels; the group's form ``rows`` rows of the image
    where the window is larger than a pixel."""

    across: int
    down: int
    pixels: int
    rows: int
    staged: bool

    @property
    def items(self) -> int:
        return self.across * self.down

    @property
    def size(self) -> int:
        """Pixels of the whole group."""
        return self.across * self.pixels

    @property
    def name(self) -> str:
        return f"t{self.across}x{self.down}x{self.pixels}r{self.rows}{'s' if self.staged else ''}"


@dataclass(frozen=True)
class Convolution:
    """Operands: x, weights, start, [sums or nothing], ..., see ``parameters``.

    ``plain``: x is the network's input, NHWC int8 of at most four channels. ``residual``: a tensor is added at the
    end. Groups run in chunks of ``chunk`` tiles of channels: for each chunk, for each tile of pixels, its tiles of
    channels. So a chunk's weights stay in a cache while all pixels pass.
    """

    element: Element
    geometry: Geometry
    plain: bool
    residual: bool
    tile: Tile
    chunk: int = 1

    @property
    def symbol(self) -> str:
        at, (kh, kw), (sy, sx), (top, left) = self.geometry, self.geometry.kernel, self.geometry.strides, self.corner
        return (
            f"conv{'_plain' if self.plain else ''}{'_add' if self.residual else ''}_{self.element.name}_n{at.batch}"
            f"_{at.in_height}x{at.in_width}x{at.in_channels}_k{kh}x{kw}_s{sy}x{sx}_p{top}_{left}"
            f"_to{at.out_height}x{at.out_width}x{at.out_channels}_{self.tile.name}"
            f"_c{self.chunk}"
        )

    # Sizes.

    @property
    def taps(self) -> int:
        return self.geometry.taps

    @property
    def corner(self) -> tuple[int, int]:
        """Pixels of padding above and to the left of the first window."""
        return self.geometry.padding[0], self.geometry.padding[2]

    @property
    def in_blocks(self) -> int:
        return 1 if self.plain else self.element.blocks(self.geometry.in_channels)

    @property
    def out_blocks(self) -> int:
        return self.element.blocks(self.geometry.out_channels)

    @property
    def words(self) -> int:
        """Words of one pixel of one block."""
        return self.element.words_of_four if self.plain else VECTOR_BYTES // 4

    @property
    def step_blocks(self) -> int:
        """Blocks of input channels between two barriers."""
        if self.plain or not self.tile.staged or self.taps > 1:
            return 1
        return next(count for count in (4, 2, 1) if self.in_blocks % count == 0)

    @property
    def flat(self) -> bool:
        """Whether the pixels of a group are just consecutive ones."""
        return self.taps == 1

    @property
    def inside(self) -> bool:
        """Whether every pixel that is asked for is in the image: a window of one pixel, and no padding."""
        at = self.geometry
        ends = ((at.out_height - 1) * at.strides[0], (at.out_width - 1) * at.strides[1])
        return self.flat and not any(self.corner) and ends[0] < at.in_height and ends[1] < at.in_width

    @property
    def tile_width(self) -> int:
        return self.tile.size // self.tile.rows

    @property
    def tiles_across(self) -> int:
        return -(-self.geometry.out_width // self.tile_width)

    @property
    def pixel_tiles(self) -> int:
        if self.flat:
            return -(-self.geometry.out_pixels // self.tile.size)
        return -(-self.geometry.out_height // self.tile.rows) * self.tiles_across

    @property
    def channel_tiles(self) -> int:
        return -(-self.out_blocks // self.tile.down)

    @property
    def patch(self) -> tuple[int, int]:
        """Rows and columns of input that a group's pixels need."""
        if self.flat:
            return 1, self.tile.size
        (sy, sx), (kh, kw) = self.geometry.strides, self.geometry.kernel
        return (self.tile.rows - 1) * sy + kh, (self.tile_width - 1) * sx + kw

    @property
    def patch_size(self) -> int:
        return math.prod(self.patch)

    @property
    def tile_quads(self) -> int:
        """Fours of output channels of a group."""
        return self.tile.down * self.element.quads

    @property
    def out_quads(self) -> int:
        return self.out_blocks * self.element.quads

    @property
    def local_bytes(self) -> int:
        """Local memory of a group."""
        weights = self.step_blocks * self.taps * self.words * self.tile_quads * VECTOR_BYTES
        return self.step_blocks * self.patch_size * self.words * 4 + weights if self.tile.staged else 0

    @property
    def groups(self) -> tuple[int, int, int]:
        return self.pixel_tiles * self.chunk, -(-self.channel_tiles // self.chunk), self.geometry.batch

    @property
    def group_size(self) -> tuple[int, int, int]:
        return self.tile.across, self.tile.down, 1

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """Of vectors, each four channels' words: blocks, taps, words, fours of output channels."""
        return self.in_blocks, self.taps, self.words, self.out_quads

    # Memory traffic.

    @property
    def _image_bytes(self) -> int:
        """Of the input that is read, one image."""
        if self.plain:
            return self.geometry.in_pixels * self.geometry.in_channels
        # Rows between those of a strided pointwise convolution are not touched; in a row, every cache line is.
        rows = self.geometry.out_height if self.flat else self.geometry.in_height
        return self.in_blocks * rows * self.geometry.in_width * VECTOR_BYTES

    @property
    def _weights_bytes(self) -> int:
        return math.prod(self.weights_shape) * VECTOR_BYTES

    @property
    def _constants_bytes(self) -> int:
        vectors = 3 if self.element.integer else 1  # biases, sums of weights and multipliers; or biases
        return self.out_quads * VECTOR_BYTES * vectors

    @property
    def _output_bytes(self) -> int:
        """What is written, and what is added to it."""
        at = self.geometry
        return self.element.size_bytes(at.batch, at.out_pixels, at.out_channels) * (1 + self.residual)

    @property
    def requested_bytes(self) -> int:
        """Every group's loads and stores, as if there were no cache: a tile of pixels for each tile of channels, and a
        tile of weights for each tile of pixels. What work-items of one group load alike counts once."""
        pixel = self.geometry.in_channels if self.plain else self.in_blocks * VECTOR_BYTES
        patches = self.geometry.out_pixels if self.flat else self.pixel_tiles * self.patch_size
        x = self.geometry.batch * patches * pixel * self.channel_tiles
        weights = self.geometry.batch * self.pixel_tiles * (self._weights_bytes + self._constants_bytes)
        return x + weights + self._output_bytes

    def traffic_bytes(self, cache_bytes: int) -> int:
        """What passes between memory and a last-level cache of ``cache_bytes`` if groups run in order.

        A chunk's weights are loaded once where they fit the cache beside a tile of pixels, else for each tile of
        pixels. Pixels are loaded once where all of them fit beside a chunk's weights, else for each chunk. Borders of
        patches are shared by groups that run within a row of tiles of each other, and count once.
        """
        x, w = self._image_bytes, self._weights_bytes + self._constants_bytes
        chunks = self.groups[1]
        chunk_bytes, tile_bytes = w * self.chunk // self.channel_tiles, x // self.pixel_tiles
        weights = w * (1 if chunk_bytes + tile_bytes <= cache_bytes else self.pixel_tiles)
        if weights + x > cache_bytes:
            weights *= self.geometry.batch
        pixels = x * (1 if x + chunk_bytes <= cache_bytes else chunks)
        return self.geometry.batch * pixels + weights + self._output_bytes

    # Code.

    @property
    def parameters(self) -> list[Parameter]:
        """x, weights, biases, [sums of weights, multipliers: int8], parameters, [residual], y."""
        e, at = self.element, self.geometry
        x = Parameter(VECTOR, e.count(at.batch, at.in_pixels, at.in_channels))
        if self.plain:
            x = Parameter("int8", at.batch * at.in_pixels * at.in_channels)
        operands = [x, Parameter(VECTOR, math.prod(self.weights_shape)), Parameter(e.quad_type, self.out_quads)]
        if e.integer:
            operands += [Parameter(VECTOR, self.out_quads), Parameter("float32x4", self.out_quads)]
        operands.append(Parameter(e.parameter_type, e.parameter_count))
        y = Parameter(VECTOR, e.count(at.batch, at.out_pixels, at.out_channels))
        return [*operands, *([y] if self.residual else []), y]

    def build(self) -> tirx.PrimFunc:
        return g.kernel(self.symbol, self.parameters, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, *operands: Buffer) -> None:
        _Emitter(self, grid, operands).emit()


class _Emitter:
    """The code of one work-item."""

    def __init__(self, shape: Convolution, grid: Grid, operands: tuple[Buffer, ...]) -> None:
        self.c, self.at, self.e, self.tile = shape, shape.geometry, shape.element, shape.tile
        self.across, self.down, _ = grid.item
        self.item = g.bind(self.down * self.tile.across + self.across)
        x, y, self.image = grid.group
        self.pixel_tile = g.bind(T.truncdiv(x, shape.chunk))
        self.channel_tile = g.bind(y * shape.chunk + T.truncmod(x, shape.chunk))
        self.x, self.weights, self.bias, *rest = operands
        self.weight_sums = self.multipliers = None
        if self.e.integer:
            self.weight_sums, self.multipliers, *rest = rest
        self.constants, *residual, self.y = rest
        self.residual = residual[0] if shape.residual else None
        if not shape.flat:
            self.first_row = g.bind(T.truncdiv(self.pixel_tile, shape.tiles_across) * self.tile.rows)
            self.first_column = g.bind(T.truncmod(self.pixel_tile, shape.tiles_across) * shape.tile_width)
        self.block = g.bind(self.channel_tile * self.tile.down + self.down)
        self.padding = self._padding()
        self.corners = [] if self.tile.staged else [self._corner(r) for r in range(self.tile.pixels)]

    def emit(self) -> None:
        c, e = self.c, self.e
        sums = g.registers(self.tile.pixels * e.quads, e.quad_type)
        self._start(sums)
        if self.tile.staged:
            words, dtype = (c.words, "int32") if c.plain else (1, VECTOR)
            self.staged_x = g.local_array(c.step_blocks * c.patch_size * words, dtype)
            self.staged_weights = g.local_array(c.step_blocks * c.taps * c.words * c.tile_quads)
        with T.serial(0, c.in_blocks // c.step_blocks) as step:
            first = g.bind(step * c.step_blocks)
            if self.tile.staged:
                g.barrier()
                self._stage_pixels(first)
                self._stage_weights(first)
                g.barrier()
            with T.serial(0, c.step_blocks * c.taps) as turn:
                self._accumulate(sums, first, g.bind(turn))
        for r in range(self.tile.pixels):
            self._finish(sums, r)

    def _padding(self) -> Expr:
        """A vector of pixels that contribute nothing, once the biases hold their share; or a word of one."""
        word = self.constants[element_words.PADDING] if self.e.integer else tirx.const(0, "int32")
        return g.bind(word if self.c.plain else T.broadcast(word, 4))

    def _start(self, sums: Buffer) -> None:
        last = g.bind(T.min(self.block, self.c.out_blocks - 1))
        for q in range(self.e.quads):
            index = g.bind(last * self.e.quads + q)
            start = self.bias[index]
            if self.weight_sums is not None:
                start = self.e.sums("start", self.e.quad_type, start, self.weight_sums[index])
            start = g.bind(start)
            for r in range(self.tile.pixels):
                g.store(sums, r * self.e.quads + q, start)

    # Where pixels are.

    def _output(self, r: Expr | int, across: Expr) -> tuple[Expr, Expr, Expr]:
        """Row, column and whether there is such an output, of the group's pixel ``r * across's size + across``."""
        index = r * self.tile.across + across
        if self.c.flat:
            pixel = g.bind(self.pixel_tile * self.tile.size + index)
            row, column = T.truncdiv(pixel, self.at.out_width), T.truncmod(pixel, self.at.out_width)
            return g.bind(row), g.bind(column), pixel < self.at.out_pixels
        row = g.bind(self.first_row + T.truncdiv(index, self.c.tile_width))
        column = g.bind(self.first_column + T.truncmod(index, self.c.tile_width))
        return row, column, T.And(row < self.at.out_height, column < self.at.out_width)

    def _load(self, block: Expr, row: Expr, column: Expr) -> Expr:
        """The input's pixel in one block, or padding; a row or column past the image may be asked for."""
        c = self.c
        index = ((self.image * c.in_blocks + block) * self.at.in_height + row) * self.at.in_width + column
        if c.inside:
            return g.bind(self.x[index])
        inside = T.And(T.And(row >= 0, row < self.at.in_height), T.And(column >= 0, column < self.at.in_width))
        return g.choose(inside, self.x[index], self.padding)

    def _load_plain(self, row: Expr, column: Expr, word: int) -> Expr:
        """A word of the network's input: four int8, or two float16 of its real value."""
        e = self.e
        inside = T.And(T.And(row >= 0, row < self.at.in_height), T.And(column >= 0, column < self.at.in_width))
        index = ((self.image * self.at.in_height + row) * self.at.in_width + column) * self.at.in_channels
        channels = range(word * e.word_channels, (word + 1) * e.word_channels)
        zero = tirx.const(0, "int8")
        values = [self.x[index + i] if i < self.at.in_channels else zero for i in channels]
        if e.integer:
            return g.choose(inside, T.call_extern("int32", "xct_pack", *values), self.padding)
        scale, offset = (self.constants[i] for i in (element_words.REAL_SCALE, element_words.REAL_OFFSET))
        return g.choose(inside, T.call_extern("int32", "xct_packh", *values, scale, offset), self.padding)

    def _patch_position(self, position: Expr) -> tuple[Expr, Expr]:
        """Row and column of the input at a position of the group's patch."""
        c = self.c
        (sy, sx), (top, left) = self.at.strides, c.corner
        if c.flat:
            pixel = g.bind(T.min(self.pixel_tile * self.tile.size + position, self.at.out_pixels - 1))
            row, column = T.truncdiv(pixel, self.at.out_width), T.truncmod(pixel, self.at.out_width)
            return g.bind(row * sy - top), g.bind(column * sx - left)
        row, column = T.truncdiv(position, c.patch[1]), T.truncmod(position, c.patch[1])
        return g.bind(self.first_row * sy - top + row), g.bind(self.first_column * sx - left + column)

    def _corner(self, r: int) -> tuple[Expr, Expr]:
        """Row and column of the input under the first tap of the work-item's pixel ``r``."""
        if self.c.flat:
            return self._patch_position(r * self.tile.across + self.across)
        row, column, _ = self._output(r, self.across)
        (sy, sx), (top, left) = self.at.strides, self.c.corner
        return g.bind(row * sy - top), g.bind(column * sx - left)

    # Local memory.

    def _stage_pixels(self, first: Expr) -> None:
        c = self.c

        def stage(index: Expr) -> None:
            if c.plain:
                row, column = self._patch_position(index)
                for word in range(c.words):
                    g.store(self.staged_x, index * c.words + word, self._load_plain(row, column, word))
                return
            row, column = self._patch_position(g.bind(T.truncmod(index, c.patch_size)))
            block = g.bind(first + T.truncdiv(index, c.patch_size))
            g.store(self.staged_x, index, self._load(block, row, column))

        g.spread(c.step_blocks * c.patch_size, self.tile.items, self.item, stage)

    def _stage_weights(self, first: Expr) -> None:
        c = self.c

        def stage(index: Expr) -> None:
            row, quad = T.truncdiv(index, c.tile_quads), T.truncmod(index, c.tile_quads)
            quad = g.bind(T.min(self.channel_tile * c.tile_quads + quad, c.out_quads - 1))
            source = (first * (c.taps * c.words) + row) * c.out_quads + quad
            g.store(self.staged_weights, index, self.weights[source])

        g.spread(c.step_blocks * c.taps * c.words * c.tile_quads, self.tile.items, self.item, stage)

    # Products.

    def _accumulate(self, sums: Buffer, first: Expr, turn: Expr) -> None:
        """One tap of one block. ``turn`` is its number in the step."""
        c, e = self.c, self.e
        block, tap = g.bind(T.truncdiv(turn, c.taps)), g.bind(T.truncmod(turn, c.taps))
        rows = range(self.tile.pixels)
        pixels = [self._pixel(r, first, block, tap) for r in rows]
        for q in range(e.quads):
            weights = [self._weight(first, turn, word, q) for word in range(c.words)]
            for r in rows:
                index = r * e.quads + q
                if c.plain:
                    for x, w in zip(pixels[r], weights, strict=True):
                        g.store(sums, index, e.sums("dot4x4", e.quad_type, x, w, sums[index]))
                else:
                    g.store(sums, index, e.sums("dot16", e.quad_type, *pixels[r], *weights, sums[index]))

    def _pixel(self, r: int, first: Expr, block: Expr, tap: Expr) -> list[Expr]:
        """What the work-item's pixel ``r`` multiplies: one vector, or a plain input's words."""
        c = self.c
        dy, dx = T.truncdiv(tap, self.at.kernel[1]), T.truncmod(tap, self.at.kernel[1])
        if not self.tile.staged:
            row, column = g.bind(self.corners[r][0] + dy), g.bind(self.corners[r][1] + dx)
            if c.plain:
                return [self._load_plain(row, column, word) for word in range(c.words)]
            return [self._load(g.bind(first + block), row, column)]
        position = r * self.tile.across + self.across
        if not c.flat:
            row, column = T.truncdiv(position, c.tile_width), T.truncmod(position, c.tile_width)
            position = (row * self.at.strides[0] + dy) * c.patch[1] + column * self.at.strides[1] + dx
        position = g.bind(block * c.patch_size + position)
        if c.plain:
            return [g.bind(self.staged_x[position * c.words + word]) for word in range(c.words)]
        return [g.bind(self.staged_x[position])]

    def _weight(self, first: Expr, turn: Expr, word: int, q: int) -> Expr:
        c = self.c
        if self.tile.staged:
            return g.bind(self.staged_weights[(turn * c.words + word) * c.tile_quads + self.down * self.e.quads + q])
        quad = T.min(self.block, c.out_blocks - 1) * self.e.quads + q
        return g.bind(self.weights[((first * c.taps + turn) * c.words + word) * c.out_quads + quad])

    # Results.

    def _finish(self, sums: Buffer, r: int) -> None:
        c, e = self.c, self.e
        row, column, there = self._output(r, self.across)
        index = ((self.image * c.out_blocks + self.block) * self.at.out_height + row) * self.at.out_width + column

        def emit() -> None:
            quads = range(e.quads)
            totals = [sums[r * e.quads + q] for q in quads]
            if self.multipliers is None:
                value = e.vector("finish8", *totals, self.constants[element_words.REAL_LOW])
            else:
                multipliers = [self.multipliers[self.block * e.quads + q] for q in quads]
                ends = [self.constants[i] for i in (element_words.ZERO, element_words.LOW)]
                value = e.vector("finish16", *totals, *multipliers, *ends)
            if self.residual is not None:
                value = add(e, value, self.residual[index], self.constants)
            g.store(self.y, index, value)

        g.when(T.And(there, self.block < c.out_blocks), emit)


def add(e: Element, a: Expr, b: Expr, constants: Buffer) -> Expr:
    """The sum of two vectors, by the parameters of a convolution or an addition."""
    w = element_words
    words = (w.ADD_A, w.ADD_B, w.ADD_BIAS, w.ADD_SHIFT, w.ADD_ZERO, w.ADD_LOW) if e.integer else (w.REAL_ADD_LOW,)
    return e.vector("add", a, b, *(constants[i] for i in words))
