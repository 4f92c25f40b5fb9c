"""What moves or mixes int8 pixels without weights on AArch64: products, resizes, joined and flattened tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models.graph import Geometry
from ..prim_func import Parameter, prim_func
from . import epilogue, neon
from .elementwise import VECTORS_PER_TASK, quarters, tasks_over
from .layout import LANES, stored_channels
from .neon import Buffer, Expr

RESIZE_BITS = 11  # of a weight: ``arithmetic.RESIZE_ONE``
_HALVES = (neon.low, neon.high)


@dataclass(frozen=True)
class Multiply:
    """y = clamp(rint(f32((a - z_a)(b - z_b)) * m) + z, -128, 127), over ``count`` elements as stored.

    ``gate``: elements of b, with which a's are multiplied in turn; 0 where there are as many. ``constants`` (int32):
    z_a, z_b, z; ``multiplier`` (float32).
    """

    count: int
    gate: int

    @property
    def symbol(self) -> str:
        return f"neon_multiply_n{self.count}" + (f"_gate{self.gate}" if self.gate else "")

    @property
    def tasks(self) -> int:
        return tasks_over(self.count)

    def build(self) -> tirx.PrimFunc:
        """Parameters: a, b, multiplier, constants, y."""
        parameters = [
            Parameter("a", "int8", self.count),
            Parameter("b", "int8", self.gate or self.count),
            Parameter("multiplier", "float32", 1),
            Parameter("constants", "int32", 3),
            Parameter("y", "int8", self.count),
        ]

        def body(a: Buffer, b: Buffer, multiplier: Buffer, constants: Buffer, y: Buffer) -> Callable[[Expr], None]:
            zeros = [neon.bind(neon.splat(T.cast(constants[i], "int16"), 8)) for i in range(2)]
            scale = neon.load_splat(multiplier, 0, "float32x4")
            output = epilogue.load_output(constants, 2, relu=False)

            def differences(v: Expr, zero: Expr) -> list[Expr]:
                return [neon.bind(neon.widen(part(v, LANES), "int16x8") - zero) for part in _HALVES]

            def product(x: Expr, w: Expr, part: Callable[[Expr, int], Expr]) -> Expr:
                wide = neon.widen(part(x, 8), "int32x4") * neon.widen(part(w, 8), "int32x4")
                return neon.bind(epilogue.scale(wide, scale, output))

            def task(number: Expr) -> None:
                first = neon.bind(number * VECTORS_PER_TASK)
                with T.serial(0, T.min(T.int32(VECTORS_PER_TASK), self.count // LANES - first)) as i:
                    at = neon.bind((first + i) * LANES)
                    left = differences(neon.load(a, at), zeros[0])
                    right = differences(neon.load(b, at % self.gate if self.gate else at), zeros[1])
                    scaled = [product(*pair, part) for pair in zip(left, right, strict=True) for part in _HALVES]
                    neon.store(y, at, epilogue.narrow16(scaled, output), LANES)

            return task

        return prim_func(self.symbol, parameters, body)


@dataclass(frozen=True)
class Interpolate:
    """A bilinear resize; a task is an output row. For every 16 channels the two input rows are mixed first, then the
    columns: nothing is rounded before the end, so the order does not matter.

    ``rows`` and ``columns``: ``Interpolation``'s taps, flat.
    """

    geometry: Geometry

    @property
    def symbol(self) -> str:
        return f"neon_bilinear_{_sizes(self.geometry)}"

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Parameters: x, rows, columns, y."""
        g, channels = self.geometry, stored_channels(self.geometry.in_channels)

        def body(x: Buffer, rows: Buffer, columns: Buffer, y: Buffer) -> Callable[[Expr], None]:
            line = T.alloc_buffer((g.in_width * LANES,), "int32")
            one, half = (neon.bind(neon.splat(T.int32(n), 4)) for n in (RESIZE_BITS, 1 << (RESIZE_BITS - 1)))

            def mix(a: Expr, b: Expr, weight: Expr) -> Expr:
                return T.shift_left(a, one) + (b - a) * weight

            def mix_rows(sources: list[Expr], weight: Expr) -> None:
                """``half`` in 2^11 is, once the columns are mixed, the half in 2^22 that rounding adds."""
                with T.serial(0, g.in_width) as j:
                    seen = [quarters(neon.load(x, source + j * channels)) for source in sources]
                    for quarter, (a, b) in enumerate(zip(*seen, strict=True)):
                        neon.store(line, j * LANES + 4 * quarter, mix(a, b, weight) + half, 4)

            def mix_columns(target: Expr) -> None:
                with T.serial(0, g.out_width) as j:
                    before, after = (neon.bind(columns[3 * j + i] * LANES) for i in range(2))
                    weight = neon.bind(neon.splat(columns[3 * j + 2], 4))
                    mixed = []
                    for i in range(4):
                        a, b = (neon.load(line, at + 4 * i, "int32x4") for at in (before, after))
                        mixed.append(neon.bind(mix(a, b, weight)))
                    neon.store(y, target + j * channels, _drop_fraction(mixed), LANES)

            def task(number: Expr) -> None:
                row = neon.bind(number)
                pixels = [neon.bind(rows[3 * row + i] * (g.in_width * channels)) for i in range(2)]
                weight = neon.bind(neon.splat(rows[3 * row + 2], 4))
                target = neon.bind(row * (g.out_width * channels))
                with T.serial(0, channels // LANES) as block:
                    mix_rows([neon.bind(pixel + block * LANES) for pixel in pixels], weight)
                    mix_columns(neon.bind(target + block * LANES))

            return task

        return prim_func(self.symbol, _resize_parameters(g, taps=3), body)


def _drop_fraction(values: list[Expr]) -> Expr:
    """Four int32x4, shifted right by 22, as one int8x16, which they fit: uzp2, then shrn."""
    words = [neon.reinterpret("int16x8", v) for v in values]
    pairs = [neon.bind(neon.shuffle(words[i : i + 2], range(1, 16, 2))) for i in (0, 2)]
    low, high = (neon.sqshrn8(pair, 2 * RESIZE_BITS - 16) for pair in pairs)
    return neon.join(low, high, 8)


@dataclass(frozen=True)
class Select:
    """A nearest resize; a task is an output row. ``rows`` and ``columns``: ``Selection``'s."""

    geometry: Geometry

    @property
    def symbol(self) -> str:
        return f"neon_nearest_{_sizes(self.geometry)}"

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Parameters: x, rows, columns, y."""
        g, channels = self.geometry, stored_channels(self.geometry.in_channels)

        def body(x: Buffer, rows: Buffer, columns: Buffer, y: Buffer) -> Callable[[Expr], None]:
            def task(number: Expr) -> None:
                row = neon.bind(number)
                line = neon.bind(rows[row] * g.in_width)
                with T.serial(0, g.out_width) as j:
                    source = neon.bind((line + columns[j]) * channels)
                    target = neon.bind((row * g.out_width + j) * channels)
                    with T.serial(0, channels // LANES) as block:
                        neon.store(y, target + block * LANES, neon.load(x, source + block * LANES), LANES)

            return task

        return prim_func(self.symbol, _resize_parameters(g, taps=1), body)


def _sizes(geometry: Geometry) -> str:
    g = geometry
    return f"{g.in_height}x{g.in_width}_{g.out_height}x{g.out_width}_c{stored_channels(g.in_channels)}"


def _resize_parameters(geometry: Geometry, taps: int) -> list[Parameter]:
    channels = stored_channels(geometry.in_channels)
    return [
        Parameter("x", "int8", geometry.in_pixels * channels),
        Parameter("rows", "int32", geometry.out_height * taps),
        Parameter("columns", "int32", geometry.out_width * taps),
        Parameter("y", "int8", geometry.out_pixels * channels),
    ]


@dataclass(frozen=True)
class Part:
    """The first ``width`` bytes of every pixel of a tensor whose pixels are ``stride`` bytes apart, and where they go
    in a pixel: to ``offset``."""

    width: int
    stride: int
    offset: int


@dataclass(frozen=True)
class Join:
    """Copies ``parts`` of as many tensors into one whose pixels are ``stride`` bytes apart. What two parts overlap is
    the later one's."""

    parts: tuple[Part, ...]
    pixels: int
    stride: int

    @property
    def symbol(self) -> str:
        parts = "_".join(f"{part.width}of{part.stride}at{part.offset}" for part in self.parts)
        return f"neon_join_n{self.pixels}_{parts}_to{self.stride}"

    @property
    def pixels_per_task(self) -> int:
        return max(1, LANES * VECTORS_PER_TASK // self.stride)

    @property
    def tasks(self) -> int:
        return -(-self.pixels // self.pixels_per_task)

    def build(self) -> tirx.PrimFunc:
        """Parameters: the parts' tensors, y."""
        sources = [Parameter(f"x{i}", "int8", self.pixels * part.stride) for i, part in enumerate(self.parts)]

        def body(*buffers: Buffer) -> Callable[[Expr], None]:
            *xs, y = buffers

            def task(number: Expr) -> None:
                first = neon.bind(number * self.pixels_per_task)
                with T.serial(0, T.min(T.int32(self.pixels_per_task), self.pixels - first)) as i:
                    pixel = neon.bind(first + i)
                    for x, part in zip(xs, self.parts, strict=True):
                        source = neon.bind(pixel * part.stride)
                        _copy(x, source, y, neon.bind(pixel * self.stride + part.offset), part.width)

            return task

        return prim_func(self.symbol, [*sources, Parameter("y", "int8", self.pixels * self.stride)], body)


def _copy(x: Buffer, source: Expr, y: Buffer, target: Expr, width: int) -> None:
    if width < LANES:
        with T.serial(0, width) as i:
            T.buffer_store(y, x[source + i], [target + i])
        return
    with T.serial(0, width // LANES) as i:
        neon.store(y, target + i * LANES, neon.load(x, source + i * LANES), LANES)
    if width % LANES:  # the last whole vector, overlapping
        rest = width - LANES
        neon.store(y, target + rest, neon.load(x, source + rest), LANES)
