"""The operators of x86-64 that multiply no matrices: pooling, addition, ReLU, mean, and the network's ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from ..prim_func import Parameter
from . import vector as v
from .layout import stored_channels
from .vector import Buffer, Expr, Isa


@dataclass(frozen=True)
class MaxPool:
    """A task is a row of outputs. Padding is left out of the maximum by repeating a pixel inside the window."""

    isa: Isa
    height: int
    width: int
    channels: int
    kernel: tuple[int, int]
    strides: tuple[int, int]
    padding: tuple[int, int]  # top, left
    out_height: int
    out_width: int

    @property
    def symbol(self) -> str:
        (kh, kw), (sy, sx), (top, left) = self.kernel, self.strides, self.padding
        return (
            f"maxpool_{self.isa.name}_{self.height}x{self.width}x{self.channels}_k{kh}x{kw}_s{sy}x{sx}"
            f"_p{top}_{left}_to{self.out_height}x{self.out_width}"
        )

    def build(self) -> tirx.PrimFunc:
        """Operands: x, y."""
        isa, stride = self.isa, stored_channels(self.channels)

        def body(x: Buffer, y: Buffer) -> Callable[[Expr], None]:
            def task(t: Expr) -> None:
                rows = [
                    T.Bind(T.min(T.max(t * self.strides[0] - self.padding[0] + i, 0), self.height - 1) * self.width)
                    for i in range(self.kernel[0])
                ]
                with T.serial(0, self.out_width) as column:
                    pixels = [
                        T.Bind(
                            (row + T.min(T.max(column * self.strides[1] - self.padding[1] + j, 0), self.width - 1))
                            * stride
                        )
                        for row in rows
                        for j in range(self.kernel[1])
                    ]
                    with T.serial(0, -(-self.channels // isa.bytes)) as chunk:
                        u = v.load(x, pixels[0] + chunk * isa.bytes, isa.bytes)
                        for pixel in pixels[1:]:
                            u = T.Bind(T.max(u, v.load(x, pixel + chunk * isa.bytes, isa.bytes)))
                        v.store(y, (t * self.out_width + column) * stride + chunk * isa.bytes, u, isa.bytes)

            return task

        operands = [
            Parameter("x", "uint8", self.height * self.width * stride),
            Parameter("y", "uint8", self.out_height * self.out_width * stride),
        ]
        return v.kernel(self.symbol, operands, body)


def vectors_per_task(vectors: int) -> int:
    """Of ``vectors`` in all: enough to outweigh a task's cost, few enough to balance."""
    return max(1, min(256, vectors // 16))


@dataclass(frozen=True)
class Elementwise:
    """``add``, ``relu`` or ``requantize`` over whole vectors, ``vectors`` in all."""

    isa: Isa
    kind: str
    count: int  # bytes, a multiple of 64

    @property
    def symbol(self) -> str:
        return f"{self.kind}_{self.isa.name}_{self.count}"

    @property
    def vectors(self) -> int:
        return self.count // self.isa.bytes

    @property
    def tasks(self) -> int:
        return -(-self.vectors // vectors_per_task(self.vectors))

    def build(self) -> tirx.PrimFunc:
        """Operands: a, [b], parameters, y. Parameters: see ``lower.py``."""
        isa, per_task = self.isa, vectors_per_task(self.vectors)
        sources = ["a", "b"] if self.kind == "add" else ["a"]

        def body(*buffers: Buffer) -> Callable[[Expr], None]:
            inputs, parameters, y = buffers[:-2], buffers[-2], buffers[-1]
            compute = {"add": _add, "relu": _relu, "requantize": _requantize}[self.kind](isa, parameters)

            def task(t: Expr) -> None:
                # Bound first: TVM rebases the loop over tasks to zero and forgets the bounds of loops inside it.
                first = T.Bind(t * per_task)
                count = T.Bind(T.min(per_task, self.vectors - first))
                with T.serial(0, count) as i:
                    values = [T.Bind(v.load(x, (first + i) * isa.bytes, isa.bytes)) for x in inputs]
                    v.store(y, (first + i) * isa.bytes, compute(*values), isa.bytes)

            return task

        operands = [Parameter(name, "uint8", self.count) for name in sources]
        operands += [Parameter("parameters", "int32", 6), Parameter("y", "uint8", self.count)]
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


def _requantize(isa: Isa, parameters: Buffer) -> Callable[..., Expr]:
    """Parameters: z + 128, lower bound, multiplier, -, bias (rounding and input zero point, for unsigned inputs)."""
    clamp = v.load_clamp(isa, parameters, 0)
    multiplier, bias = _word(isa, parameters, 2), _word(isa, parameters, 4)

    def compute(u: Expr) -> Expr:
        words = [T.Bind((x * multiplier + bias) >> v.splat(8, "int32", isa.words)) for x in v.widen(isa, u)]
        return v.pack(isa, words, clamp)

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
