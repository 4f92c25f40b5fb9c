"""The operators of x86-64 that multiply no matrices: pooling, addition, ReLU, mean, and the network's ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ....models import graph as ir
from ..prim_func import Parameter
from . import vector as v
from .layout import stored_channels, window_symbol
from .vector import Buffer, Expr, Isa


@dataclass(frozen=True)
class MaxPool:
    """A task is a row of outputs. Padding is left out of the maximum by repeating a pixel inside the window."""

    isa: Isa
    geometry: ir.Geometry

    @property
    def symbol(self) -> str:
        return f"maxpool_{self.isa.name}_{window_symbol(self.geometry)}"

    @property
    def tasks(self) -> int:
        return self.geometry.out_height

    def build(self) -> tirx.PrimFunc:
        """Operands: x, y."""
        isa, g = self.isa, self.geometry
        (kh, kw), (sy, sx), (top, _, left, _) = g.kernel, g.strides, g.padding
        stride = stored_channels(g.in_channels)

        def body(x: Buffer, y: Buffer) -> Callable[[Expr], None]:
            def task(t: Expr) -> None:
                rows = [T.Bind(T.min(T.max(t * sy - top + i, 0), g.in_height - 1) * g.in_width) for i in range(kh)]
                with T.serial(0, g.out_width) as column:
                    pixels = [
                        T.Bind((row + T.min(T.max(column * sx - left + j, 0), g.in_width - 1)) * stride)
                        for row in rows
                        for j in range(kw)
                    ]
                    with T.serial(0, -(-g.in_channels // isa.bytes)) as chunk:
                        u = v.load(x, pixels[0] + chunk * isa.bytes, isa.bytes)
                        for pixel in pixels[1:]:
                            u = T.Bind(T.max(u, v.load(x, pixel + chunk * isa.bytes, isa.bytes)))
                        v.store(y, (t * g.out_width + column) * stride + chunk * isa.bytes, u, isa.bytes)

            return task

        operands = [
            Parameter("x", "uint8", g.in_pixels * stride),
            Parameter("y", "uint8", g.out_pixels * stride),
        ]
        return v.kernel(self.symbol, operands, body)


def vectors_per_task(vectors: int) -> int:
    """Of ``vectors`` in all: enough to outweigh a task's cost, few enough to balance."""
    return max(1, min(256, vectors // 16))


@dataclass(frozen=True)
class Elementwise:
    """``add``, ``multiply``, ``relu`` or ``lookup`` over whole vectors, ``vectors`` in all. With ``gate`` the second
    tensor is one pixel of so many bytes, which meets every pixel of the first."""

    isa: Isa
    kind: str
    count: int  # bytes, a multiple of 64
    gate: int = 0

    @property
    def symbol(self) -> str:
        return f"{self.kind}_{self.isa.name}_{self.count}" + (f"_gate{self.gate}" if self.gate else "")

    @property
    def vectors(self) -> int:
        return self.count // self.isa.bytes

    @property
    def tasks(self) -> int:
        return -(-self.vectors // vectors_per_task(self.vectors))

    def build(self) -> tirx.PrimFunc:
        """Operands: a, [b], constants, y. Constants: see the function of the kind."""
        isa, per_task = self.isa, vectors_per_task(self.vectors)
        counts = {"a": self.count}
        if self.kind in ("add", "multiply"):
            counts["b"] = self.gate or self.count
        constants = Parameter("parameters", "int32", 6)
        if self.kind == "lookup":
            constants = Parameter("table", "uint8", _SUBTABLES * isa.bytes)

        def body(*buffers: Buffer) -> Callable[[Expr], None]:
            *inputs, given, y = buffers
            kinds = {"add": _add, "multiply": _multiply, "relu": _relu, "lookup": _lookup}
            compute = kinds[self.kind](isa, given)

            def place(x: Buffer, vector: Expr) -> Expr:
                gated = self.gate and x is not inputs[0]
                return tirx.truncmod(vector, T.int32(self.gate // isa.bytes)) if gated else vector

            def task(t: Expr) -> None:
                # Bound first: TVM rebases the loop over tasks to zero and forgets the bounds of loops inside it.
                first = T.Bind(t * per_task)
                count = T.Bind(T.min(per_task, self.vectors - first))
                with T.serial(0, count) as i:
                    values = [T.Bind(v.load(x, place(x, first + i) * isa.bytes, isa.bytes)) for x in inputs]
                    v.store(y, (first + i) * isa.bytes, compute(*values), isa.bytes)

            return task

        operands = [*(Parameter(name, "uint8", count) for name, count in counts.items()), constants]
        operands.append(Parameter("y", "uint8", self.count))
        return v.kernel(self.symbol, operands, body)


def _word(isa: Isa, parameters: Buffer, index: int) -> Expr:
    return T.Bind(T.broadcast(parameters[index], isa.words))


def _add(isa: Isa, parameters: Buffer) -> Callable[..., Expr]:
    """Parameters: z + 128, lower bound, multipliers of a and b, bias (for unsigned inputs), shift."""
    clamp = v.load_clamp(isa, parameters, 0)
    a_multiplier, b_multiplier, bias, shift = (_word(isa, parameters, i) for i in range(2, 6))

    def compute(a: Expr, b: Expr) -> Expr:
        pairs = zip(v.widen(isa, a), v.widen(isa, b), strict=True)
        return v.pack(isa, [T.Bind((x * a_multiplier + y * b_multiplier + bias) >> shift) for x, y in pairs], clamp)

    return compute


def _multiply(isa: Isa, parameters: Buffer) -> Callable[..., Expr]:
    """Parameters: z + 128, lower bound, u of a's and b's zero point, the multiplier's bits. A scaled product is below
    2^24: the multiplier is below 2^8."""
    clamp = v.load_clamp(isa, parameters, 0)
    a_zero, b_zero, bits = (_word(isa, parameters, i) for i in range(2, 5))
    multiplier = T.Bind(v.reinterpret(bits, f"float32x{isa.words}"))

    def compute(a: Expr, b: Expr) -> Expr:
        pairs = zip(v.widen(isa, a), v.widen(isa, b), strict=True)
        products = [T.Bind((x - a_zero) * (y - b_zero)) for x, y in pairs]
        return v.pack(isa, [v.round_scaled(isa, product, multiplier, True) for product in products], clamp)

    return compute


_SUBTABLES = 16  # of 16 entries: as many as the shuffle of bytes chooses from


def pack_table(isa: Isa, table: NDArray[np.int8]) -> NDArray[np.uint8]:
    """The table of the stored form, u to u, each sub-table in every lane of a vector of its own."""
    stored = table.view(np.uint8) ^ np.uint8(128)  # x = -128 comes first, and u = 0
    return np.tile(stored.reshape(_SUBTABLES, 1, 16), (1, isa.lanes, 1)).reshape(-1)


def _lookup(isa: Isa, table: Buffer) -> Callable[..., Expr]:
    """The table as ``pack_table`` has it. The shuffle of bytes gives zero where the index' highest bit is set: outside
    the sub-table, since adding 0x70 with saturation sets that bit of every index above 15."""
    dtype, name = f"uint8x{isa.bytes}", "avx512.pshuf.b.512" if isa.lanes == 4 else "avx2.pshuf.b"
    reach = v.splat(0x70, "uint8", isa.bytes)

    def compute(u: Expr) -> Expr:
        result = None
        for i in range(_SUBTABLES):
            index = v.intrinsic(dtype, "llvm.uadd.sat", u ^ v.splat(16 * i, "uint8", isa.bytes), reach)
            found = v.intrinsic(dtype, f"llvm.x86.{name}", v.load(table, i * isa.bytes, isa.bytes), index)
            result = T.Bind(found if result is None else result | found)
        return result

    return compute


def _relu(isa: Isa, parameters: Buffer) -> Callable[..., Expr]:
    """Parameters: u of the input's zero point. max(q - z, 0) is a saturating subtraction of unsigned bytes."""
    zero = T.Bind(v.splat(T.cast(parameters[0], "uint8"), "uint8", isa.bytes))
    return lambda u: v.intrinsic(f"uint8x{isa.bytes}", "llvm.usub.sat", u, zero)


@dataclass(frozen=True)
class AveragePool:
    """A task is one vector of channels over all pixels. ``bounded``: see ``round_scaled``."""

    isa: Isa
    pixels: int
    channels: int
    bounded: bool

    @property
    def symbol(self) -> str:
        return f"mean_{self.isa.name}_{self.pixels}x{self.channels}" + ("" if self.bounded else "_wide")

    @property
    def tasks(self) -> int:
        return -(-self.channels // self.isa.bytes)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, parameters (z + 128, lower bound, bias), multiplier (one float32), y."""
        isa, stride = self.isa, stored_channels(self.channels)

        def body(x: Buffer, parameters: Buffer, m: Buffer, y: Buffer) -> Callable[[Expr], None]:
            clamp = v.load_clamp(isa, parameters, 0)
            bias = _word(isa, parameters, 2)
            scale = T.Bind(T.broadcast(m[0], isa.words))
            acc = T.alloc_buffer((4,), f"int32x{isa.words}", scope="global")

            def task(t: Expr) -> None:
                for j in range(4):
                    T.buffer_store(acc, bias, [j])
                with T.serial(0, self.pixels) as p:
                    u = T.Bind(v.load(x, p * stride + t * isa.bytes, isa.bytes))
                    for j, word in enumerate(v.widen(isa, u)):
                        T.buffer_store(acc, acc[j] + word, [j])
                words = [v.round_scaled(isa, acc[j], scale, self.bounded) for j in range(4)]
                v.store(y, t * isa.bytes, v.pack(isa, words, clamp), isa.bytes)

            return task

        operands = [
            Parameter("x", "uint8", self.pixels * stride),
            Parameter("parameters", "int32", 6),
            Parameter("m", "float32", 1),
            Parameter("y", "uint8", stride),
        ]
        return v.kernel(self.symbol, operands, body)


@dataclass(frozen=True)
class Convert:
    """Between plain NHWC int8 and the stored form. ``kind``: ``import`` or ``export``. A task is a run of pixels."""

    kind: str
    pixels: int
    channels: int

    @property
    def symbol(self) -> str:
        return f"{self.kind}_{self.pixels}x{self.channels}"

    @property
    def pixels_per_task(self) -> int:
        return max(1, self.pixels // 16)

    @property
    def tasks(self) -> int:
        return -(-self.pixels // self.pixels_per_task)

    def build(self) -> tirx.PrimFunc:
        """Operands: x, y."""
        stride = stored_channels(self.channels)
        incoming = self.kind == "import"
        steps = (self.channels, stride) if incoming else (stride, self.channels)
        types = ("int8", "uint8") if incoming else ("uint8", "int8")
        flip = tirx.const(128, "uint8")

        def body(x: Buffer, y: Buffer) -> Callable[[Expr], None]:
            def task(t: Expr) -> None:
                first = T.Bind(t * self.pixels_per_task)
                with T.serial(0, T.Bind(T.min(self.pixels_per_task, self.pixels - first))) as i:
                    p = first + i

                    def piece(offset: Expr | int, size: int) -> None:
                        value = v.reinterpret(v.load(x, p * steps[0] + offset, size), v.lanes("uint8", size))
                        value = value ^ (T.broadcast(flip, size) if size > 1 else flip)
                        v.store(y, p * steps[1] + offset, v.reinterpret(value, v.lanes(types[1], size)), size)

                    v.for_pieces(self.channels, 32, piece)

            return task

        operands = [
            Parameter("x", types[0], self.pixels * steps[0]),
            Parameter("y", types[1], self.pixels * steps[1]),
        ]
        return v.kernel(self.symbol, operands, body)
