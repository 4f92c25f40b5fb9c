"""The matrix products of AArch64's dot product and i8mm, a block of pixels by 8 output channels, in assembly.

24 accumulators, 3 vectors of pixels and 4 of weights are all but one of the processor's registers. LLVM, left to find
them, moves and spills inside the loop as soon as anything lives across it. The registers are fixed here instead: v0 to
v2 pixels, v3 to v6 weights, v8 and on accumulators. TVM links the functions into a kernel and inlines them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm.tirx.script.builder import ir as T

from . import neon
from .gemm import unroll
from .neon import Buffer, Expr

_MOST_UNROLLED = {4: 20, 8: 10}  # steps, by depth: the loop's own instructions are near 1 %
_ACCUMULATOR, _WEIGHT = 8, 3  # first registers
_PIXELS = 3  # registers
_QUAD = 4


@dataclass(frozen=True)
class Product:
    """``valid`` pixels by 8 outputs over ``steps`` groups of ``depth`` input channels: 4 by sdot, 8 by smmla."""

    depth: int
    valid: int
    steps: int

    @property
    def symbol(self) -> str:
        return f"xct_product{self.depth}_{self.valid}_{self.steps}"

    @property
    def accumulators(self) -> int:
        """Vectors: 2 a pixel, or 4 a pair of pixels."""
        return 2 * self.valid if self.depth == 4 else 4 * -(-self.valid // 2)

    @property
    def advance(self) -> int:
        """Bytes that a step's loads of pixels before its last have moved on."""
        return 16 * _PIXELS if self.depth == 8 and self.accumulators > 4 * _PIXELS else 0

    def definition(self) -> str:
        """LLVM IR of ``void symbol(results, pixels, stride, weights, starts)``. From one group of input channels to the
        next it is ``stride`` + ``advance`` bytes; ``starts``: 4 vectors, for every 4 accumulators."""
        count = self.accumulators
        kind = "{ " + ", ".join(["<4 x i32>"] * count + ["ptr", "ptr", "i64"]) + " }"
        outputs = [f"={{v{_ACCUMULATOR + i}}}" for i in range(count)] + ["=&r"] * 3
        inputs = [str(count), str(count + 1), "r", "r"]  # pixels and weights are moved on
        clobbers = [f"~{{v{i}}}" for i in range(_ACCUMULATOR)] + ["~{cc}", "~{memory}"]
        constraints = ",".join([*outputs, *inputs, *clobbers])
        arguments = "ptr %pixels, ptr %weights, i64 %stride, ptr %starts"
        body = "\\0A".join(self._assembly(*(f"${count + i}" for i in (0, 1, 2, 5, 6))))
        lines = [
            f"define void @{self.symbol}(ptr %results, ptr %pixels, i64 %stride, ptr %weights, ptr %starts) {{",
            f'  %all = call {kind} asm sideeffect "{body}", "{constraints}"({arguments})',
        ]
        for i in range(count):
            lines.append(f"  %value{i} = extractvalue {kind} %all, {i}")
            lines.append(f"  %at{i} = getelementptr <4 x i32>, ptr %results, i64 {i}")
            lines.append(f"  store <4 x i32> %value{i}, ptr %at{i}, align 4")
        return "\n".join([*lines, "  ret void", "}", ""])

    def _assembly(self, pixels: str, weights: str, counter: str, stride: str, starts: str) -> list[str]:
        lines = []
        for i in range(0, self.accumulators, _QUAD):
            lines.append(f"ld1 {_list(_ACCUMULATOR + i, min(_QUAD, self.accumulators - i), '4s')}, [{starts}]")
        step = self._dot_steps if self.depth == 4 else self._matrix_steps
        unrolled = unroll(self.steps, _MOST_UNROLLED[self.depth])
        full, rest = divmod(self.steps, unrolled)
        lines += step(rest, pixels, weights, stride)
        if full == 1:
            return lines + step(unrolled, pixels, weights, stride)
        return [
            *lines,
            f"mov {counter}, #{full}",
            "1:",
            *step(unrolled, pixels, weights, stride),
            f"subs {counter}, {counter}, #1",
            "b.ne 1b",
        ]

    def _dot_steps(self, count: int, pixels: str, weights: str, stride: str) -> list[str]:
        """``count`` groups of 4 input channels, whose weights are loaded for two at a time."""
        lines = []
        for step in range(count):
            lines.append(f"ld1 {_list(0, -(-self.valid // _QUAD), '16b')}, [{pixels}], {stride}")
            if step % 2 == 0:
                vectors = min(4, 2 * (count - step))
                lines.append(f"ld1 {_list(_WEIGHT, vectors, '16b')}, [{weights}], #{16 * vectors}")
            first = _WEIGHT + step % 2 * 2
            for i in range(self.accumulators):
                accumulator, weight = _ACCUMULATOR + i, first + i % 2
                lines.append(f"sdot v{accumulator}.4s, v{weight}.16b, v{i // 8}.4b[{i // 2 % _QUAD}]")
        return lines

    def _matrix_steps(self, count: int, pixels: str, weights: str, stride: str) -> list[str]:
        """``count`` groups of 8 input channels, of 6 pixels at a time."""
        lines = []
        pairs = self.accumulators // 4
        for _ in range(count):
            lines.append(f"ld1 {_list(_WEIGHT, 4, '16b')}, [{weights}], #64")
            for first in range(0, pairs, _PIXELS):
                last = first + _PIXELS >= pairs
                vectors = _list(0, min(_PIXELS, pairs - first), "16b")
                lines.append(f"ld1 {vectors}, [{pixels}], {stride if last else f'#{16 * _PIXELS}'}")
                for i in range(4 * first, 4 * min(first + _PIXELS, pairs)):
                    accumulator, weight = _ACCUMULATOR + i, _WEIGHT + i % 4
                    lines.append(f"smmla v{accumulator}.4s, v{i // 4 - first}.16b, v{weight}.16b")
        return lines


def _list(first: int, count: int, arrangement: str) -> str:
    """Adjacent registers."""
    return "{" + ", ".join(f"v{first + i}.{arrangement}" for i in range(count)) + "}"


class Products:
    """Emits calls of products of at most ``most`` pixels."""

    def __init__(self, most: int) -> None:
        self._results = T.alloc_buffer((8 * most,), "int32", scope="global")  # LLVM keeps them in registers

    def multiply(
        self, product: Product, pixels: tuple[Buffer, Expr], stride: int, weights: tuple[Buffer, Expr], starts: Buffer
    ) -> list[list[Expr]]:
        """For every pixel its two int32x4. ``pixels`` and ``weights``: where they begin; ``stride``: bytes from one
        group of input channels to the next."""
        T.evaluate(
            T.call_extern(
                "void",
                product.symbol,
                T.address_of(self._results[0]),
                T.address_of(pixels[0][pixels[1]]),
                T.int64(stride - product.advance),
                T.address_of(weights[0][weights[1]]),
                T.address_of(starts[0]),
            )
        )
        vectors = [neon.load(self._results, 4 * i, "int32x4") for i in range(product.accumulators)]
        if product.depth == 4:
            return [vectors[2 * r : 2 * r + 2] for r in range(product.valid)]
        return [_row_of_pairs(vectors[r // 2 * 4 : r // 2 * 4 + 4], r % 2) for r in range(product.valid)]


def _row_of_pairs(pairs: list[Expr], row: int) -> list[Expr]:
    """Four 2x2 results side by side: one row's 8 channels."""
    halves = [neon.reinterpret("int64x2", v) for v in pairs]
    return [neon.reinterpret("int32x4", neon.shuffle([halves[i], halves[i + 1]], [row, 2 + row])) for i in (0, 2)]
