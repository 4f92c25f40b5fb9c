"""Convolutions for AArch64 as packed matrix products, optionally with a depthwise convolution as prologue.

A task is a band of output rows. Its pixels are packed as the matrix product wants them, 16 input channels at a time:
from the input map, or from a staged copy with padding. A depthwise prologue writes them so, or nearly so, itself; its
output never leaves the cache. Then every panel of output channels is multiplied with every few pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from ..prim_func import Parameter, prim_func
from . import depthwise_dot as dot
from . import epilogue, neon, vector_loads
from .depthwise import Depthwise, DepthwiseOperands, DepthwiseShape, stage_bytes
from .gemm import BLOCKS, ROW_STEP, Accumulators, Bias, Block, pack, plane_bytes
from .int16_sums import Corrections, padded_pixels
from .layout import LANES, staged_parts, staged_rows, staged_width, stored_channels, tap_pitch, window_name
from .neon import Buffer, Expr
from .product import Product, Products
from .vector_loads import Kept


@dataclass(frozen=True)
class ConvolutionShape:
    """A dense convolution. ``in_stride``: bytes from pixel to pixel of the input in memory. ``range``: of the
    accumulators. ``chained``: weights are split as ``int16_sums`` has it."""

    isa: str
    geometry: Geometry
    in_stride: int
    relu: bool
    range: epilogue.Range
    rows_per_task: int
    depthwise: DepthwiseShape | None = None
    splits: int = 1
    chained: bool = False

    @property
    def symbol(self) -> str:
        g, prologue = self.geometry, f"{self.depthwise}_" if self.depthwise else ""
        relu = ("_relu" if self.relu else "") + str(self.range)
        isa = f"{self.isa}_chained" if self.chained else self.isa
        return (
            f"{isa}_{prologue}conv{window_name(g)}_c{self.in_stride}d{g.in_channels}_o{g.out_channels}"
            f"s{self.out_stride}{relu}_r{self.rows_per_task}n{self.splits}"
        )

    @property
    def out_stride(self) -> int:
        """Bytes from pixel to pixel of the output."""
        return stored_channels(self.geometry.out_channels)

    @property
    def patch_row_bytes(self) -> int:
        """One kernel row of a pixel's patch, in whole vectors."""
        return -(-self.geometry.kernel[1] * self.in_stride // LANES) * LANES

    @property
    def patch_bytes(self) -> int:
        """A pixel's patch, packed."""
        return self.geometry.kernel[0] * self.patch_row_bytes

    @property
    def used_bytes(self) -> int:
        """Of a patch, what is multiplied."""
        return self.geometry.in_channels if self.geometry.taps == 1 else self.patch_bytes

    @property
    def staged(self) -> bool:
        """Whether the input is copied first: for padding, or where whole vectors would read beyond the input."""
        return self.depthwise is None and (any(self.geometry.padding) or self.in_stride % LANES != 0)

    @property
    def tasks(self) -> int:
        return -(-self.geometry.out_height // self.rows_per_task) * self.splits

    def build(self) -> tirx.PrimFunc:
        """Operands: see ``_parameters``."""
        functions = vector_loads.functions(product.definition() for product in _products(self))
        return prim_func(self.symbol, self._parameters, self._body, functions)

    @property
    def _parameters(self) -> list[Parameter]:
        """x, [depthwise weights, bias, multipliers,] weights, bias, multipliers, [starts and entries of corrections,]
        constants, y.

        ``constants`` (int32): the zero points of the padding and of the output, a zero, then the depthwise
        convolution's three.
        """
        block, g, depthwise = BLOCKS[self.isa], self.geometry, self.depthwise
        outputs = -(-g.out_channels // block.channels) * block.channels
        first = depthwise.geometry if depthwise else g
        return [
            Parameter("x", "int8", first.in_pixels * self.in_stride),
            *(_depthwise_parameters(depthwise, self.isa) if depthwise else []),
            Parameter("weights", "int8", outputs * block.padded(self.used_bytes)),
            Parameter("bias", "int32", outputs),
            Parameter("multipliers", "float32", outputs),
            *([Parameter("starts", "int32", outputs + 1), Parameter("entries", "int32", None)] if self.chained else []),
            Parameter("constants", "int32", 6 if depthwise else 3),
            Parameter("y", "int8", g.out_pixels * self.out_stride),
        ]

    def _body(self, x: Buffer, *operands: Buffer) -> Callable[[Expr], None]:
        *of_product, constants, y = operands
        block = BLOCKS[self.isa]
        most = max(band_pixels(self))
        # Vectors, and rows of pairs, reach beyond the last pixel.
        room = padded_pixels(most) if self.chained else most + ROW_STEP
        plane = plane_bytes(block, room)
        planes = T.alloc_buffer((self.patch_bytes // block.depth * plane,), "int8")
        prologue = None
        if self.depthwise:
            weights, bias, multipliers, *of_product = of_product
            prologue = DepthwiseOperands(weights, bias, multipliers, constants, 3)
        product = _Product(self, planes, plane, of_product, constants, y)
        pixels: _DepthwisePixels | _Patches
        if prologue:
            pixels = _DepthwisePixels(self, prologue, x, room, planes, plane)
        else:
            pixels = _Patches(self, x, constants, planes, plane)

        def task(number: Expr) -> None:
            number = neon.bind(number)
            band = neon.bind(number // self.splits)
            first_row = neon.bind(band * self.rows_per_task)
            rows = neon.bind(T.min(T.int32(self.rows_per_task), self.geometry.out_height - first_row))
            pixels.emit(first_row, rows)
            product.emit(first_row, rows, neon.bind(number % self.splits))

        return task


def _depthwise_parameters(depthwise: DepthwiseShape, isa: str) -> list[Parameter]:
    """Weights, biases and multipliers of the prologue."""
    by_dot = dot.applies(isa, depthwise.geometry)
    weight_bytes = dot.WEIGHT_BYTES if by_dot else depthwise.geometry.taps
    return [
        Parameter("dw_weights", "int8", weight_bytes * depthwise.channels),
        Parameter("dw_bias", "int32", depthwise.channels),
        Parameter("dw_multipliers", "float32", depthwise.channels),
    ]


def band_pixels(shape: ConvolutionShape) -> tuple[int, ...]:
    """The different numbers of pixels that bands have: a full band's and the last one's."""
    full, last = divmod(shape.geometry.out_height, shape.rows_per_task)
    sizes = ([shape.rows_per_task] if full else []) + ([last] if last else [])
    return tuple(rows * shape.geometry.out_width for rows in sizes)


def _products(shape: ConvolutionShape) -> list[Product]:
    """Those that a kernel calls."""
    block = BLOCKS[shape.isa]
    if block.depth == 16:
        return []
    valid = {block.rows if size >= block.rows else 0 for size in band_pixels(shape)}
    valid |= {size % block.rows for size in band_pixels(shape)}
    return [Product(block.depth, rows, block.padded(shape.used_bytes) // block.depth) for rows in sorted(valid - {0})]


def _for_each_panel(shape: ConvolutionShape, rows: Expr, emit: Any) -> None:
    """``emit(panel index, pixels)`` for the panels of a band, as many pixels as a block has, and for its last."""
    block = BLOCKS[shape.isa]
    count = neon.bind(rows * shape.geometry.out_width)
    full = neon.bind(count // block.rows)
    sizes = band_pixels(shape)
    if any(size >= block.rows for size in sizes):
        with T.serial(0, full) as panel:
            emit(panel, block.rows)
    for rest in sorted({size % block.rows for size in sizes} - {0}):
        if len({size % block.rows for size in sizes}) == 1:
            emit(full, rest)
        else:
            with T.If(count % block.rows == rest):
                with T.Then():
                    emit(full, rest)


class _DepthwisePixels:
    """Emits the depthwise prologue, whose pixels go into ``planes``, ``plane`` bytes apart, as the matrix product reads
    them. A band has ``room`` pixels at most, with those beyond its last."""

    def __init__(
        self, shape: ConvolutionShape, operands: DepthwiseOperands, x: Buffer, room: int, planes: Buffer, plane: int
    ) -> None:
        assert shape.depthwise is not None
        self.shape, self.block, self.planes, self.plane = shape, BLOCKS[shape.isa], planes, plane
        geometry, rows = shape.depthwise.geometry, shape.rows_per_task
        by_dot = dot.applies(shape.isa, geometry)
        stage = T.alloc_buffer((stage_bytes(geometry, rows + (rows % 2 if by_dot else 0)),), "int8")
        self.depthwise = Depthwise(shape.depthwise, operands, x, stage, rows)
        self.by_dot: dot.DotDepthwise | None = None
        if by_dot:
            windows = T.alloc_buffer((dot.windows_bytes(geometry, rows),), "int8")
            self.by_dot = dot.DotDepthwise(self.depthwise, windows)
        self.quads = plane_bytes(BLOCKS["dotprod"], room)
        if self.block.depth != (4 if by_dot else LANES):  # what is computed lies otherwise than the product wants it
            self.pixels = T.alloc_buffer((4 * self.quads,), "int8")

    def emit(self, first_row: Expr, rows: Expr) -> None:
        """All channels of the output rows [first_row, first_row + rows), 16 at a time."""
        self.depthwise.begin_band()
        with T.serial(0, self.depthwise.shape.channels // LANES) as channels:
            self.depthwise.stage_channels(first_row, rows, channels)
            first = neon.bind(channels * (LANES // self.block.depth * self.plane))
            if self.by_dot is None:
                self._emit_by_taps(self.depthwise, rows, channels, first)
            else:
                self._emit_by_dot(self.by_dot, rows, channels, first)

    def _emit_by_taps(self, depthwise: Depthwise, rows: Expr, channels: Expr, first: Expr) -> None:
        """Pixels side by side, 16 channels each: as plain NEON's product wants them."""
        packed = self.block.depth == LANES
        target, start = (self.planes, first) if packed else (self.pixels, T.int32(0))
        depthwise.compute(rows, channels, lambda pixel, value: neon.store(target, start + pixel * LANES, value, LANES))
        if not packed:
            self._pack_pixels(first, rows)

    def _emit_by_dot(self, by_dot: dot.DotDepthwise, rows: Expr, channels: Expr, first: Expr) -> None:
        """4 channels side by side: as the product by sdot wants them."""
        heights = [pixels // self.shape.geometry.out_width for pixels in band_pixels(self.shape)]
        by_dot.lay_out_windows(rows)
        if self.block.depth == 4:
            by_dot.compute(rows, heights, channels, (self.planes, first), self.plane)
        else:
            by_dot.compute(rows, heights, channels, (self.pixels, T.int32(0)), self.quads)
            self._pack_quads(first, rows)

    def _pack_pixels(self, first: Expr, rows: Expr) -> None:
        """From 16 channels side by side."""
        block = self.block

        def emit(panel: Expr, valid: int) -> None:
            source = neon.bind(panel * (block.rows * LANES))
            vectors = [neon.load(self.pixels, source + min(r, valid - 1) * LANES) for r in range(_packed(block, valid))]
            pack(block, self.planes, neon.bind(first + panel * (block.rows * block.depth)), self.plane, vectors)

        _for_each_panel(self.shape, rows, emit)

    def _pack_quads(self, first: Expr, rows: Expr) -> None:
        """From 4 channels side by side, as i8mm wants them: 8."""
        with T.serial(0, (rows * self.shape.geometry.out_width + 3) // 4) as quad:
            vectors = [neon.load(self.pixels, quad * LANES + g * self.quads) for g in range(4)]
            words = [neon.reinterpret("int32x4", v) for v in vectors]
            for half in range(2):
                for part in range(2):
                    lanes = [2 * part, 4 + 2 * part, 2 * part + 1, 5 + 2 * part]
                    v = neon.reinterpret("int8x16", neon.shuffle(words[2 * half : 2 * half + 2], lanes))
                    neon.store(self.planes, first + quad * (2 * LANES) + (half * self.plane + part * LANES), v, LANES)


def _packed(block: Block, pixels: int) -> int:
    """Vectors that ``pack`` wants for so many."""
    return pixels if block.depth == LANES else -(-pixels // ROW_STEP) * ROW_STEP


class _Patches:
    """Emits the copies of the input under each window into ``planes``, ``plane`` bytes apart, by way of an image with
    its padding around it where ``shape.staged``. ``constants[0]`` is what padding holds."""

    def __init__(self, shape: ConvolutionShape, x: Buffer, constants: Buffer, planes: Buffer, plane: int) -> None:
        self.shape, self.x, self.constants, self.planes, self.plane = shape, x, constants, planes, plane
        width = staged_width(shape.geometry) if shape.staged else shape.geometry.in_width
        self.row_bytes = width * shape.in_stride
        pitch = tap_pitch(shape.geometry, shape.rows_per_task) if shape.staged else shape.geometry.dilation[0]
        self.tap_row_bytes = pitch * self.row_bytes
        if shape.staged:
            # And room for the whole vectors that read beyond it.
            self.stage_bytes = staged_rows(shape.geometry, shape.rows_per_task) * self.row_bytes + 2 * LANES
            self.stage = T.alloc_buffer((self.stage_bytes,), "int8")

    def emit(self, first_row: Expr, rows: Expr) -> None:
        """The patches of the output rows [first_row, first_row + rows)."""
        if self.shape.staged:
            self._stage(first_row, rows)
            self._pack(self.stage, T.int32(0), rows)
        else:
            self._pack(self.x, neon.bind(first_row * (self.shape.geometry.strides[0] * self.row_bytes)), rows)

    def _pack(self, image: Buffer, origin: Expr, rows: Expr) -> None:
        """From an image; ``origin`` is the band's first window."""
        shape, block, g = self.shape, BLOCKS[self.shape.isa], self.shape.geometry

        def emit(panel: Expr, valid: int) -> None:
            corners = []
            for r in range(_packed(block, valid)):
                pixel = neon.bind(panel * block.rows + min(r, valid - 1))
                down, right = pixel // g.out_width, pixel % g.out_width
                step = (g.strides[0] * self.row_bytes, g.strides[1] * shape.in_stride)
                corners.append(neon.bind(origin + down * step[0] + right * step[1]))
            base = neon.bind(panel * (block.rows * block.depth))
            # Taps side by side lie together; those of a dilated window are whole vectors.
            count, tap_bytes = (1, 0) if g.dilation[1] == 1 else (g.kernel[1], g.dilation[1] * shape.in_stride)
            vectors_each = shape.patch_row_bytes // LANES // count
            for tap in range(g.kernel[0] * count):
                offset = tap // count * self.tap_row_bytes + tap % count * tap_bytes
                with T.serial(0, vectors_each) as i:
                    vectors = [neon.load(image, c + offset + i * LANES) for c in corners]
                    target = neon.bind(base + (tap * vectors_each + i) * (LANES // block.depth * self.plane))
                    pack(block, self.planes, target, self.plane, vectors)

        _for_each_panel(shape, rows, emit)

    def _stage(self, first_row: Expr, rows: Expr) -> None:
        """Copies a band's input rows, all channels."""
        g, channels = self.shape.geometry, self.shape.in_stride
        if any(g.padding):
            fill = neon.bind(neon.splat(T.cast(self.constants[0], "int8"), LANES))
            with T.serial(0, self.stage_bytes // LANES) as i:
                neon.store(self.stage, i * LANES, fill, LANES)
        length = g.in_width * channels
        for part in staged_parts(g, self.shape.rows_per_task):
            top = neon.bind(first_row * g.strides[0] - (g.padding[0] - part.source))
            first = T.max(T.int32(0), -top)
            last = T.min((rows - 1) * g.strides[0] + part.reach, g.in_height - top)
            with T.serial(first, last) as row:
                source = neon.bind((top + row) * length)
                target = neon.bind((row + part.target) * self.row_bytes + g.padding[2] * channels)
                self._copy_row(source, target, length)

    def _copy_row(self, source: Expr, target: Expr, length: int) -> None:
        if length < LANES:
            with T.serial(0, length) as i:
                T.buffer_store(self.stage, self.x[source + i], [target + i])
            return
        with T.serial(0, length // LANES) as i:
            neon.store(self.stage, target + i * LANES, neon.load(self.x, source + i * LANES), LANES)
        if length % LANES:  # the last whole vector of the row, overlapping
            rest = length - LANES
            neon.store(self.stage, target + rest, neon.load(self.x, source + rest), LANES)


class _Product:
    """Emits the matrix product of a band's packed pixels, ``plane`` bytes from one group of channels to the next, with
    the weights. ``operands``: weights, biases, multipliers and, of a chained one, starts and entries of corrections;
    ``constants``: see ``ConvolutionShape``."""

    def __init__(
        self,
        shape: ConvolutionShape,
        planes: Buffer,
        plane: int,
        operands: Sequence[Buffer],
        constants: Buffer,
        y: Buffer,
    ) -> None:
        self.shape, self.block, self.planes, self.plane, self.y = shape, BLOCKS[shape.isa], planes, plane, y
        self.weights, self.biases, self.multipliers, *split_off = operands
        self.k = self.block.padded(shape.used_bytes)
        self.vectors = self.block.channels // 4
        self.accumulators: Accumulators | Products = (
            Accumulators(self.block, shape.chained) if self.block.depth == 16 else Products(self.block.rows)
        )
        self.corrections: Corrections | None = None
        if split_off:
            starts, entries = split_off
            self.corrections = Corrections(starts, entries, max(band_pixels(shape)), self.k)
        self.output = epilogue.load_output(constants, 1, shape.relu, shape.range)
        self.zero = neon.bind(constants[2])

    def emit(self, first_row: Expr, rows: Expr, split: Expr) -> None:
        """Every panel of output channels of this split with every panel of pixels."""
        shape, block, vectors, corrections = self.shape, self.block, self.vectors, self.corrections
        total = -(-shape.geometry.out_channels // block.channels)
        each = -(-total // shape.splits)
        first_panel = neon.bind(split * each)
        y_base = neon.bind(first_row * (shape.geometry.out_width * shape.out_stride))
        # As a constant it would be no part of the instruction that loads, but an addition.
        step = neon.bind(T.cast(T.bitwise_xor(T.int32(self.plane), self.zero), "int64"))
        bias, kept = Bias(block), Kept(vectors + len(self.output.vectors()))
        kept.set(self.output.vectors(), vectors)
        if corrections:
            chunks = neon.bind((rows * shape.geometry.out_width + 15) // 16)
            corrections.transpose(self.planes, self.plane, chunks)
        with T.serial(first_panel, T.min(first_panel + each, T.int32(total))) as n:
            if corrections:
                corrections.compute(self.biases, n, chunks)
            else:
                bias.load(self.biases, n)
            scales = [neon.load(self.multipliers, n * block.channels + 4 * i, "float32x4") for i in range(vectors)]
            kept.set([neon.reinterpret("int32x4", v) for v in scales])
            # Were the base a plain function of n, LLVM would share one counter between this loop and the product's,
            # with offsets too large for the instruction that loads two vectors.
            base = neon.bind(T.bitwise_xor(n * (self.k * block.channels), self.zero))

            def panel_of_pixels(panel: Expr, valid: int) -> None:
                results = self._multiply(panel, valid, step, (self.weights, base), bias)
                target = y_base + panel * (block.rows * shape.out_stride) + n * block.channels
                self._store(results, kept, neon.bind(target))

            _for_each_panel(shape, rows, panel_of_pixels)

    def _multiply(
        self, panel: Expr, valid: int, step: Expr, weights: tuple[Buffer, Expr], bias: Bias
    ) -> list[list[Expr]]:
        """For each of ``valid`` pixels, its int32x4."""
        block = self.block
        first = (self.planes, neon.bind(panel * (block.rows * block.depth)))
        if isinstance(self.accumulators, Products):
            product = Product(block.depth, valid, self.k // block.depth)
            return self.accumulators.multiply(product, first, self.plane, weights, bias.kept.memory)
        start = self.corrections.start(panel) if self.corrections else bias.start
        return self.accumulators.multiply(valid, first, step, weights, self.k, start)

    def _store(self, results: list[list[Expr]], kept: Kept, target: Expr) -> None:
        """What follows the sums. ``kept``: multipliers, then the vectors of the output."""
        loaded = kept.load(self.vectors + len(self.output.vectors()), 4)
        scales = [neon.reinterpret("float32x4", v) for v in loaded[: self.vectors]]
        output = self.output.of_vectors(loaded[self.vectors :])
        scaled = [
            [neon.bind(epilogue.scale(a, m, output)) for a, m in zip(row, scales, strict=True)] for row in results
        ]
        stride = self.shape.out_stride
        if self.vectors == 2:
            for r, row in enumerate(scaled):
                neon.store(self.y, target + r * stride, epilogue.narrow8(row, output), 8)
            return
        quads = epilogue.narrow16([scaled[min(r, len(scaled) - 1)][0] for r in range(4)], output)
        for r in range(len(scaled)):
            neon.store_word(self.y, target + r * stride, quads, r)


@dataclass(frozen=True)
class DepthwiseAlone:
    """A depthwise convolution whose output is a tensor. ``constants`` (int32) as ``DepthwiseOperands`` has them."""

    shape: DepthwiseShape
    rows_per_task: int

    @property
    def symbol(self) -> str:
        return f"neon_{self.shape}_r{self.rows_per_task}"

    @property
    def tasks(self) -> int:
        return -(-self.shape.geometry.out_height // self.rows_per_task)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, weights, bias, multipliers, constants, y."""
        g, channels = self.shape.geometry, self.shape.channels
        parameters = [
            Parameter("x", "int8", g.in_pixels * channels),
            Parameter("weights", "int8", g.taps * channels),
            Parameter("bias", "int32", channels),
            Parameter("multipliers", "float32", channels),
            Parameter("constants", "int32", 3),
            Parameter("y", "int8", g.out_pixels * channels),
        ]
        return prim_func(self.symbol, parameters, self._body)

    def _body(self, x: Buffer, *operands: Buffer) -> Callable[[Expr], None]:
        *of_depthwise, y = operands
        g, channels = self.shape.geometry, self.shape.channels
        stage = T.alloc_buffer((stage_bytes(g, self.rows_per_task),), "int8")
        depthwise = Depthwise(self.shape, DepthwiseOperands(*of_depthwise), x, stage, self.rows_per_task)

        def task(number: Expr) -> None:
            first_row = neon.bind(neon.bind(number) * self.rows_per_task)
            rows = neon.bind(T.min(T.int32(self.rows_per_task), g.out_height - first_row))
            depthwise.begin_band()
            with T.serial(0, channels // LANES) as block:
                depthwise.stage_channels(first_row, rows, block)
                base = neon.bind(first_row * (g.out_width * channels) + block * LANES)
                depthwise.compute(
                    rows, block, lambda pixel, value: neon.store(y, base + pixel * channels, value, LANES)
                )

        return task
