"""Convolutions for AArch64 as packed matrix products, optionally with a depthwise convolution in front.

A task is a band of output rows. Its pixels are packed as the matrix product wants them, 16 input channels at a time:
from the input map, or from a staged copy with padding. A depthwise convolution in front writes them so, or nearly so,
itself; its output never leaves the cache. Then every panel of output channels is multiplied with every few pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from . import depthwise_dot as dot
from . import epilogue, neon, stream
from .chain import Corrections, padded_pixels
from .depthwise import LANES, Depthwise, DepthwiseOperands, DepthwiseShape, Window, stage_bytes
from .gemm import BLOCKS, ROW_STEP, Accumulators, Bias, Block, pack, plane_bytes
from .neon import Buffer, Expr
from .product import Product, Products
from .stream import Kept


@dataclass(frozen=True)
class ConvolutionShape:
    """A dense convolution. ``in_channels`` is the stride of a pixel in memory; ``depth`` the input channels that
    matter of them (1x1 only); ``out_channels`` the computed ones, ``out_stride`` those stored. ``range``: of the
    accumulators. ``chained``: weights are split as ``chain`` has it."""

    isa: str
    window: Window
    in_channels: int
    depth: int
    out_channels: int
    out_stride: int
    relu: bool
    range: epilogue.Range
    rows_per_task: int
    depthwise: DepthwiseShape | None = None
    splits: int = 1
    chained: bool = False

    @property
    def symbol(self) -> str:
        front = f"{self.depthwise}_" if self.depthwise else ""
        relu = ("_relu" if self.relu else "") + str(self.range)
        isa = f"{self.isa}_chained" if self.chained else self.isa
        return (
            f"{isa}_{front}conv{self.window}_c{self.in_channels}d{self.depth}_o{self.out_channels}"
            f"s{self.out_stride}{relu}_r{self.rows_per_task}n{self.splits}"
        )

    @property
    def patch_row_bytes(self) -> int:
        """One kernel row of a pixel's patch, in whole vectors."""
        return -(-self.window.kernel[1] * self.in_channels // LANES) * LANES

    @property
    def patch_bytes(self) -> int:
        """A pixel's patch, packed."""
        return self.window.kernel[0] * self.patch_row_bytes

    @property
    def used_bytes(self) -> int:
        """Of a patch, what is multiplied."""
        return self.depth if self.window.kernel == (1, 1) else self.patch_bytes

    @property
    def staged(self) -> bool:
        """Whether the input is copied first: for padding, or where whole vectors would read beyond the input."""
        return self.depthwise is None and (self.window.padded or self.in_channels % LANES != 0)

    @property
    def tasks(self) -> int:
        return -(-self.window.out_height // self.rows_per_task) * self.splits


def band_pixels(shape: ConvolutionShape) -> tuple[int, ...]:
    """The different numbers of pixels that bands have: a full band's and the last one's."""
    full, last = divmod(shape.window.out_height, shape.rows_per_task)
    sizes = ([shape.rows_per_task] if full else []) + ([last] if last else [])
    return tuple(rows * shape.window.out_width for rows in sizes)


def build(shape: ConvolutionShape) -> Any:
    """The PrimFunc. Parameters: x, [depthwise weights, bias, multipliers,] weights, bias, multipliers, [starts and
    entries of corrections,] constants, y.

    ``constants`` (int32): the zero points of the padding and of the output, a zero, then the depthwise convolution's
    three.
    """
    block, window, front = BLOCKS[shape.isa], shape.window, shape.depthwise
    outputs = -(-shape.out_channels // block.channels) * block.channels
    k = block.padded(shape.used_bytes)
    by_dot = front is not None and dot.applies(shape.isa, front.window)
    with IRBuilder() as builder:
        with T.prim_func():
            T.func_name(shape.symbol)
            source = front.window if front else window
            x = T.arg("x", T.buffer((source.in_height * source.in_width * shape.in_channels,), "int8"))
            if front:
                taps = front.window.kernel[0] * front.window.kernel[1]
                weight_bytes = dot.WEIGHT_BYTES if by_dot else taps
                dw_weights = T.arg("dw_weights", T.buffer((weight_bytes * front.channels,), "int8"))
                dw_bias = T.arg("dw_bias", T.buffer((front.channels,), "int32"))
                dw_multipliers = T.arg("dw_multipliers", T.buffer((front.channels,), "float32"))
            weights = T.arg("weights", T.buffer((outputs * k,), "int8"))
            bias = T.arg("bias", T.buffer((outputs,), "int32"))
            multipliers = T.arg("multipliers", T.buffer((outputs,), "float32"))
            if shape.chained:
                starts = T.arg("starts", T.buffer((outputs + 1,), "int32"))
                entries = T.arg("entries", T.buffer((T.int32(),), "int32"))  # as many as the weights have
            constants = T.arg("constants", T.buffer((6 if front else 3,), "int32"))
            y = T.arg("y", T.buffer((window.out_height * window.out_width * shape.out_stride,), "int8"))
            begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())

            with stream.functions(product.definition() for product in _products(shape)):
                most = max(band_pixels(shape))
                room = (
                    padded_pixels(most) if shape.chained else most + ROW_STEP
                )  # vectors, and rows of pairs, reach beyond
                plane = plane_bytes(block, room)
                planes = T.alloc_buffer((shape.patch_bytes // block.depth * plane,), "int8")
                accumulators = Accumulators(block, shape.chained) if block.depth == 16 else Products(block.rows)
                corrections = Corrections(starts, entries, most, k) if shape.chained else None
                output = epilogue.load_output(constants, 1, shape.relu, shape.range)
                zero = neon.bind(constants[2])
                if front:
                    staged = shape.rows_per_task + (shape.rows_per_task % 2 if by_dot else 0)
                    stage = T.alloc_buffer((stage_bytes(front.window, staged),), "int8")
                    operands = DepthwiseOperands(dw_weights, dw_bias, dw_multipliers, constants, 3)
                    depthwise = Depthwise(front, operands, x, stage)
                    if by_dot:
                        windows = T.alloc_buffer((dot.windows_bytes(front.window, shape.rows_per_task),), "int8")
                        by_dots = dot.DotDepthwise(depthwise, windows)
                        quads = plane_bytes(BLOCKS["dotprod"], room)
                        heights = [pixels // window.out_width for pixels in band_pixels(shape)]
                    if block.depth != (4 if by_dot else LANES):
                        pixels = T.alloc_buffer((4 * plane_bytes(BLOCKS["dotprod"], room),), "int8")
                elif shape.staged:
                    stage = T.alloc_buffer((_dense_stage_bytes(shape),), "int8")
                with T.serial(0, end - begin) as at:  # from zero: TVM 0.27 loses the start of a nested loop
                    task = neon.bind(begin + at)
                    band = neon.bind(task // shape.splits)
                    first_row = neon.bind(band * shape.rows_per_task)
                    rows = neon.bind(T.min(T.int32(shape.rows_per_task), window.out_height - first_row))
                    if front:
                        depthwise.begin_band(shape.rows_per_task)
                        with T.serial(0, front.channels // LANES) as channel_block:
                            depthwise.stage_channels(first_row, rows, channel_block)
                            first = neon.bind(channel_block * (LANES // block.depth * plane))
                            if by_dot and block.depth == 4:
                                by_dots.lay_out_windows(rows)
                                by_dots.compute(rows, heights, channel_block, (planes, first), plane)
                            elif by_dot:
                                by_dots.lay_out_windows(rows)
                                by_dots.compute(rows, heights, channel_block, (pixels, T.int32(0)), quads)
                                _pack_quads(shape, pixels, quads, (planes, first), plane, rows)
                            else:
                                target = (planes, first) if block.depth == LANES else (pixels, T.int32(0))
                                _compute_pixels(depthwise, rows, channel_block, target)
                                if block.depth != LANES:
                                    _pack_pixels(shape, pixels, (planes, first), plane, rows)
                    elif shape.staged:
                        _stage_dense(shape, x, stage, constants, first_row, rows)
                        _pack_patches(shape, stage, _dense_row_bytes(shape), T.int32(0), planes, plane, rows)
                    else:
                        row_bytes = window.in_width * shape.in_channels
                        origin = neon.bind(first_row * (window.strides[0] * row_bytes))
                        _pack_patches(shape, x, row_bytes, origin, planes, plane, rows)
                    split = neon.bind(task % shape.splits)
                    _multiply(
                        shape,
                        accumulators,
                        corrections,
                        (planes, plane),
                        (weights, bias, multipliers),
                        output,
                        y,
                        first_row,
                        rows,
                        split,
                        k,
                        zero,
                    )
    return builder.get()


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
    count = neon.bind(rows * shape.window.out_width)
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


def _compute_pixels(depthwise: Depthwise, rows: Expr, channel_block: Expr, target: tuple[Buffer, Expr]) -> None:
    """16 channels of a band's pixels, side by side."""
    buffer, first = target
    depthwise.compute(rows, channel_block, lambda pixel, value: neon.store(buffer, first + pixel * LANES, value, LANES))


def _pack_pixels(shape: ConvolutionShape, pixels: Buffer, target: tuple[Buffer, Expr], plane: int, rows: Expr) -> None:
    """What ``_compute_pixels`` has computed, as the matrix product wants it."""
    block = BLOCKS[shape.isa]

    def emit(panel: Expr, valid: int) -> None:
        source = neon.bind(panel * (block.rows * LANES))
        vectors = [neon.load(pixels, source + min(r, valid - 1) * LANES) for r in range(_packed(block, valid))]
        pack(block, target[0], neon.bind(target[1] + panel * (block.rows * block.depth)), plane, vectors)

    _for_each_panel(shape, rows, emit)


def _pack_quads(
    shape: ConvolutionShape, quads: Buffer, quads_plane: int, target: tuple[Buffer, Expr], plane: int, rows: Expr
) -> None:
    """16 channels, 4 side by side, as i8mm wants them: 8."""
    planes, first = target
    with T.serial(0, (rows * shape.window.out_width + 3) // 4) as quad:
        words = [neon.reinterpret("int32x4", neon.load(quads, quad * LANES + g * quads_plane)) for g in range(4)]
        for half in range(2):
            for part in range(2):
                lanes = [2 * part, 4 + 2 * part, 2 * part + 1, 5 + 2 * part]
                v = neon.reinterpret("int8x16", neon.shuffle(words[2 * half : 2 * half + 2], lanes))
                neon.store(planes, first + quad * (2 * LANES) + (half * plane + part * LANES), v, LANES)


def _packed(block: Block, pixels: int) -> int:
    """Vectors that ``pack`` wants for so many."""
    return pixels if block.depth == LANES else -(-pixels // ROW_STEP) * ROW_STEP


def _pack_patches(
    shape: ConvolutionShape, image: Buffer, row_bytes: int, origin: Expr, planes: Buffer, plane: int, rows: Expr
) -> None:
    """The patches, from an image of rows ``row_bytes`` apart; ``origin`` is the band's first window."""
    block, window = BLOCKS[shape.isa], shape.window

    def emit(panel: Expr, valid: int) -> None:
        corners = []
        for r in range(_packed(block, valid)):
            pixel = neon.bind(panel * block.rows + min(r, valid - 1))
            down, right = pixel // window.out_width, pixel % window.out_width
            step = (window.strides[0] * row_bytes, window.strides[1] * shape.in_channels)
            corners.append(neon.bind(origin + down * step[0] + right * step[1]))
        base = neon.bind(panel * (block.rows * block.depth))
        vectors_per_row = shape.patch_row_bytes // LANES
        for ky in range(window.kernel[0]):
            with T.serial(0, vectors_per_row) as i:
                vectors = [neon.load(image, c + (ky * row_bytes) + i * LANES) for c in corners]
                target = neon.bind(base + (ky * vectors_per_row + i) * (LANES // block.depth * plane))
                pack(block, planes, target, plane, vectors)

    _for_each_panel(shape, rows, emit)


def _dense_row_bytes(shape: ConvolutionShape) -> int:
    return shape.window.staged_width * shape.in_channels


def _dense_stage_bytes(shape: ConvolutionShape) -> int:
    """A band's input with its padding, and room for the whole vectors that read beyond it."""
    return shape.window.staged_rows(shape.rows_per_task) * _dense_row_bytes(shape) + 2 * LANES


def _stage_dense(
    shape: ConvolutionShape, x: Buffer, stage: Buffer, constants: Buffer, first_row: Expr, rows: Expr
) -> None:
    """Copies a band's input rows, all channels, into an image with its padding around it."""
    window, channels = shape.window, shape.in_channels
    if window.padded:
        fill = neon.bind(neon.splat(T.cast(constants[0], "int8"), LANES))
        with T.serial(0, _dense_stage_bytes(shape) // LANES) as i:
            neon.store(stage, i * LANES, fill, LANES)
    top = neon.bind(first_row * window.strides[0] - window.padding[0])
    first = T.max(T.int32(0), -top)
    last = T.min((rows - 1) * window.strides[0] + window.kernel[0], window.in_height - top)
    length = window.in_width * channels
    with T.serial(first, last) as row:
        source = neon.bind((top + row) * length)
        target = neon.bind(row * _dense_row_bytes(shape) + window.padding[2] * channels)
        if length < LANES:
            with T.serial(0, length) as i:
                T.buffer_store(stage, x[source + i], [target + i])
        else:
            with T.serial(0, length // LANES) as i:
                neon.store(stage, target + i * LANES, neon.load(x, source + i * LANES), LANES)
            if length % LANES:  # the last whole vector of the row, overlapping
                rest = length - LANES
                neon.store(stage, target + rest, neon.load(x, source + rest), LANES)


def _multiply(
    shape: ConvolutionShape,
    accumulators: Accumulators | Products,
    corrections: Corrections | None,
    pixels: tuple[Buffer, int],
    operands: tuple[Buffer, Buffer, Buffer],
    output: epilogue.Output,
    y: Buffer,
    first_row: Expr,
    rows: Expr,
    split: Expr,
    k: int,
    zero: Expr,
) -> None:
    """Every panel of output channels of this split with every panel of pixels."""
    block = BLOCKS[shape.isa]
    (planes, plane), (weights, biases, multipliers) = pixels, operands
    total = -(-shape.out_channels // block.channels)
    each = -(-total // shape.splits)
    first_panel = neon.bind(split * each)
    y_base = neon.bind(first_row * (shape.window.out_width * shape.out_stride))
    # As a constant it would be no part of the instruction that loads, but an addition.
    step = neon.bind(T.cast(T.bitwise_xor(T.int32(plane), zero), "int64"))
    bias, vectors = Bias(block), block.channels // 4
    kept = Kept(vectors + len(output.vectors()))
    kept.set(output.vectors(), vectors)
    if corrections:
        chunks = neon.bind((rows * shape.window.out_width + 15) // 16)
        corrections.transpose(planes, plane, chunks)
    with T.serial(first_panel, T.min(first_panel + each, T.int32(total))) as n:
        if corrections:
            corrections.compute(biases, n, chunks)
        else:
            bias.load(biases, n)
        scales = [neon.load(multipliers, n * block.channels + 4 * i, "float32x4") for i in range(vectors)]
        kept.set([neon.reinterpret("int32x4", v) for v in scales])
        # Were the base a plain function of n, LLVM would share one counter between this loop and the product's, with
        # offsets too large for the instruction that loads two vectors.
        weights_base = neon.bind(T.bitwise_xor(n * (k * block.channels), zero))

        def emit(panel: Expr, valid: int) -> None:
            first = (planes, neon.bind(panel * (block.rows * block.depth)))
            if isinstance(accumulators, Products):
                product = Product(block.depth, valid, k // block.depth)
                results = accumulators.multiply(product, first, plane, (weights, weights_base), bias.kept.memory)
            else:
                start = corrections.start(panel) if corrections else bias.start
                results = accumulators.multiply(valid, first, step, (weights, weights_base), k, start)
            target = neon.bind(y_base + panel * (block.rows * shape.out_stride) + n * block.channels)
            loaded = kept.load(vectors + len(output.vectors()), 4)
            scales, now = (
                [neon.reinterpret("float32x4", v) for v in loaded[:vectors]],
                output.of_vectors(loaded[vectors:]),
            )
            scaled = [
                [neon.bind(epilogue.scale(a, m, now)) for a, m in zip(row, scales, strict=True)] for row in results
            ]
            if vectors == 2:
                for r in range(valid):
                    neon.store(y, target + r * shape.out_stride, epilogue.narrow8(scaled[r], now), 8)
                return
            quads = epilogue.narrow16([scaled[min(r, valid - 1)][0] for r in range(4)], now)
            for r in range(valid):
                neon.store_word(y, target + r * shape.out_stride, quads, r)

        _for_each_panel(shape, rows, emit)


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
        return -(-self.shape.window.out_height // self.rows_per_task)

    def build(self) -> Any:
        """The PrimFunc. Parameters: x, weights, bias, multipliers, constants, y."""
        window, channels = self.shape.window, self.shape.channels
        taps = window.kernel[0] * window.kernel[1]
        with IRBuilder() as builder:
            with T.prim_func():
                T.func_name(self.symbol)
                x = T.arg("x", T.buffer((window.in_height * window.in_width * channels,), "int8"))
                weights = T.arg("weights", T.buffer((taps * channels,), "int8"))
                bias = T.arg("bias", T.buffer((channels,), "int32"))
                multipliers = T.arg("multipliers", T.buffer((channels,), "float32"))
                constants = T.arg("constants", T.buffer((3,), "int32"))
                y = T.arg("y", T.buffer((window.out_height * window.out_width * channels,), "int8"))
                begin, end = T.arg("begin", T.int32()), T.arg("end", T.int32())
                stage = T.alloc_buffer((stage_bytes(window, self.rows_per_task),), "int8")
                depthwise = Depthwise(self.shape, DepthwiseOperands(weights, bias, multipliers, constants), x, stage)
                with T.serial(0, end - begin) as at:  # from zero: TVM 0.27 loses the start of a nested loop
                    task = neon.bind(begin + at)
                    first_row = neon.bind(task * self.rows_per_task)
                    rows = neon.bind(T.min(T.int32(self.rows_per_task), window.out_height - first_row))
                    depthwise.begin_band(self.rows_per_task)
                    with T.serial(0, channels // LANES) as block:
                        depthwise.stage_channels(first_row, rows, block)
                        base = neon.bind(first_row * (window.out_width * channels) + block * LANES)
                        depthwise.compute(
                            rows, block, lambda pixel, value: neon.store(y, base + pixel * channels, value, LANES)
                        )
        return builder.get()
