"""The GPU kernels that multiply no matrices: addition, ReLU, lookup, mean, and the network's plain ends; and
the fully connected layer, which reads every weight once."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tvm import tirx
from tvm.tirx.script.builder import ir as T

from . import element as element_words
from . import tir as g
from .convolution import add
from .element import Element
from .tir import VECTOR, VECTOR_BYTES, Buffer, Expr, Grid, Parameter

WORDS = VECTOR_BYTES // 4
TABLE_BYTES = 256
ITEMS = 64  # work-items of a group, where nothing depends on how many
MEAN_LANES = 16  # work-items that sum one word's pixels
LINEAR_LANES = 16  # work-items that sum one product
LINEAR_QUADS = 4  # fours of outputs of a group


@dataclass(frozen=True)
class Elementwise:
    """``add`` or ``relu`` over ``count`` vectors. Operands: a, [b], parameters, y."""

    kind: str
    element: Element
    count: int

    @property
    def symbol(self) -> str:
        return f"{self.kind}_{self.element.name}_{self.count}"

    @property
    def groups(self) -> tuple[int, int, int]:
        return -(-self.count // ITEMS), 1, 1

    @property
    def group_size(self) -> tuple[int, int, int]:
        return ITEMS, 1, 1

    @property
    def requested_bytes(self) -> int:
        return self.count * VECTOR_BYTES * (3 if self.kind == "add" else 2)

    def build(self) -> tirx.PrimFunc:
        e = self.element
        vectors = Parameter(VECTOR, self.count)
        constants = Parameter(e.parameter_type, e.parameter_count)
        parameters = [vectors, *([vectors] if self.kind == "add" else []), constants, vectors]
        return g.kernel(self.symbol, parameters, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, *operands: Buffer) -> None:
        *inputs, constants, y = operands
        index = g.bind(grid.group[0] * ITEMS + grid.item[0])
        g.when(index < self.count, lambda: g.store(y, index, self._value([x[index] for x in inputs], constants)))

    def _value(self, inputs: list[Expr], constants: Buffer) -> Expr:
        e, w = self.element, element_words
        if self.kind == "add":
            return add(e, inputs[0], inputs[1], constants)
        # Padding is the input's zero point in every byte: what a ReLU compares with.
        return e.vector("relu", inputs[0], constants[w.PADDING if e.integer else w.REAL_LOW])


@dataclass(frozen=True)
class Lookup:
    """y = table[x + 128] of ``count`` int8 vectors; a work-item treats one word. Operands: x, table, y."""

    count: int

    @property
    def symbol(self) -> str:
        return f"lookup_int8_{self.count}"

    @property
    def groups(self) -> tuple[int, int, int]:
        return -(-self.count * WORDS // ITEMS), 1, 1

    @property
    def group_size(self) -> tuple[int, int, int]:
        return ITEMS, 1, 1

    @property
    def requested_bytes(self) -> int:
        """An entry of the table for every byte."""
        return self.count * VECTOR_BYTES * 3

    def traffic_bytes(self, cache_bytes: int) -> int:
        """The table stays in any cache."""
        del cache_bytes
        return self.count * VECTOR_BYTES * 2 + TABLE_BYTES

    def build(self) -> tirx.PrimFunc:
        words = Parameter("int32", self.count * WORDS)
        parameters = [words, Parameter("int8", TABLE_BYTES), words]
        return g.kernel(self.symbol, parameters, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, x: Buffer, table: Buffer, y: Buffer) -> None:
        index = g.bind(grid.group[0] * ITEMS + grid.item[0])

        def emit() -> None:
            word = g.bind(x[index])
            numbers = [T.cast(g.call("int8", "xct_byte", word, tirx.const(i, "int32")), "int32") for i in range(4)]
            g.store(y, index, g.call("int32", "xct_pack", *(table[number + 128] for number in numbers)))

        g.when(index < self.count * WORDS, emit)


@dataclass(frozen=True)
class Mean:
    """The mean of every channel. Operands: x, constants, y; constants are the start (int8: the sum's, an int32) and
    multiplier, see ``lower.py``."""

    element: Element
    batch: int
    pixels: int
    channels: int

    @property
    def symbol(self) -> str:
        return f"mean_{self.element.name}_n{self.batch}_{self.pixels}x{self.channels}"

    @property
    def blocks(self) -> int:
        return self.element.blocks(self.channels)

    @property
    def groups(self) -> tuple[int, int, int]:
        return self.blocks, 1, self.batch

    @property
    def group_size(self) -> tuple[int, int, int]:
        return WORDS * MEAN_LANES, 1, 1

    @property
    def requested_bytes(self) -> int:
        return self.batch * self.blocks * (self.pixels + 1) * VECTOR_BYTES

    def build(self) -> tirx.PrimFunc:
        e = self.element
        x = Parameter("int32", e.count(self.batch, self.pixels, self.channels) * WORDS)
        y = Parameter("int32", e.count(self.batch, 1, self.channels) * WORDS)
        constants = Parameter(e.parameter_type, e.parameter_count)
        multiplier = [Parameter("float32x4", 1)] if e.integer else []
        parameters = [x, constants, *multiplier, y]
        return g.kernel(self.symbol, parameters, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, x: Buffer, constants: Buffer, *rest: Buffer) -> None:
        e = self.element
        *multiplier, y = rest
        item, plane = grid.item[0], g.bind(grid.group[2] * self.blocks + grid.group[0])
        word, lane = g.bind(T.truncmod(item, WORDS)), g.bind(T.truncdiv(item, WORDS))
        sums = g.registers(1, e.word_type)
        g.store(sums, 0, T.broadcast(tirx.const(0, e.accumulator), e.word_channels))
        ones = tirx.const(0x01010101 if e.integer else 0x3C003C00, "int32")  # 1 in every channel of a word
        mac, finish = ("mac4", "finish4") if e.integer else ("mac2", "mean2")

        def accumulate(pixel: Expr) -> None:
            value = x[(plane * self.pixels + pixel) * WORDS + word]
            g.store(sums, 0, e.sums(mac, e.word_type, value, ones, sums[0]))

        g.spread(self.pixels, MEAN_LANES, lane, accumulate)
        shared = g.local_array(WORDS * MEAN_LANES, e.word_type)
        g.store(shared, item, sums[0])
        g.barrier()

        def reduce() -> None:
            total = g.bind(shared[item])
            for other in range(1, MEAN_LANES):
                total = g.bind(total + shared[other * WORDS + item])
            if e.integer:
                total = g.bind(total + T.broadcast(constants[element_words.ADD_BIAS], 4))
                ends = [constants[i] for i in (element_words.ZERO, element_words.LOW)]
                value = e.word(finish, total, multiplier[0][0], *ends)
            else:
                value = e.word(finish, total, constants[element_words.REAL_SCALE])
            g.store(y, plane * WORDS + item, value)

        g.when(item < WORDS, reduce)


@dataclass(frozen=True)
class Linear:
    """A fully connected layer. ``plain``: y is a network output, int8 or float32 (batch, outputs); else it is stored as
    between kernels. Operands: x, weights, biases, [multipliers: int8], parameters, y."""

    element: Element
    batch: int
    inputs: int
    outputs: int
    plain: bool

    @property
    def symbol(self) -> str:
        plain = "_plain" if self.plain else ""
        return f"linear{plain}_{self.element.name}_n{self.batch}_{self.inputs}to{self.outputs}"

    @property
    def in_blocks(self) -> int:
        return self.element.blocks(self.inputs)

    @property
    def out_quads(self) -> int:
        return self.element.blocks(self.outputs) * self.element.quads

    @property
    def groups(self) -> tuple[int, int, int]:
        return -(-self.out_quads // LINEAR_QUADS), 1, self.batch

    @property
    def group_size(self) -> tuple[int, int, int]:
        return LINEAR_QUADS, LINEAR_LANES, 1

    @property
    def weights_shape(self) -> tuple[int, int, int, int]:
        """As a convolution's."""
        return self.in_blocks, 1, WORDS, self.out_quads

    @property
    def _weights_bytes(self) -> int:
        """With the biases and, of int8, sums of weights and multipliers."""
        constants = 3 if self.element.integer else 1
        return (math.prod(self.weights_shape) + constants * self.out_quads) * VECTOR_BYTES

    @property
    def _output_bytes(self) -> int:
        if self.plain:
            return self.batch * self.outputs * (1 if self.element.integer else 4)
        return self.element.size_bytes(self.batch, 1, self.outputs)

    @property
    def requested_bytes(self) -> int:
        """Every group loads its image's inputs."""
        x = self.element.size_bytes(self.batch, 1, self.inputs) * self.groups[0]
        return x + self.batch * self._weights_bytes + self._output_bytes

    def traffic_bytes(self, cache_bytes: int) -> int:
        """The inputs of one image, some kilobytes, stay in any cache; weights are loaded again for each image."""
        again = self._weights_bytes if self._weights_bytes > cache_bytes else 0
        weights = self._weights_bytes + (self.batch - 1) * again
        return self.element.size_bytes(self.batch, 1, self.inputs) + weights + self._output_bytes

    def build(self) -> tirx.PrimFunc:
        e = self.element
        operands = [
            Parameter(VECTOR, e.count(self.batch, 1, self.inputs)),
            Parameter(VECTOR, math.prod(self.weights_shape)),
            Parameter(e.quad_type, self.out_quads),
        ]
        if e.integer:
            operands += [Parameter(VECTOR, self.out_quads), Parameter("float32x4", self.out_quads)]
        operands.append(Parameter(e.parameter_type, e.parameter_count))
        plain = Parameter("int8" if e.integer else "float32", self.batch * self.outputs)
        operands.append(plain if self.plain else Parameter("int32", self.batch * self.out_quads * e.words_of_four))
        return g.kernel(self.symbol, operands, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, *operands: Buffer) -> None:
        e = self.element
        x, weights, bias, *rest = operands
        weight_sums = multipliers = None
        if e.integer:
            weight_sums, multipliers, *rest = rest
        constants, y = rest
        column, lane = grid.item[0], grid.item[1]
        wanted = g.bind(grid.group[0] * LINEAR_QUADS + column)
        quad = g.bind(T.min(wanted, self.out_quads - 1))
        sums = g.registers(1, e.quad_type)
        g.store(sums, 0, T.broadcast(tirx.const(0, e.accumulator), 4))

        def accumulate(block: Expr) -> None:
            words = [g.bind(weights[(block * WORDS + i) * self.out_quads + quad]) for i in range(WORDS)]
            vector = x[grid.group[2] * self.in_blocks + block]
            g.store(sums, 0, e.sums("dot16", e.quad_type, vector, *words, sums[0]))

        g.spread(self.in_blocks, LINEAR_LANES, lane, accumulate)
        shared = g.local_array(LINEAR_QUADS * LINEAR_LANES, e.quad_type)
        g.store(shared, lane * LINEAR_QUADS + column, sums[0])
        g.barrier()

        def finish() -> None:
            total = g.bind(bias[quad])
            if weight_sums is not None:
                total = e.sums("start", e.quad_type, total, weight_sums[quad])
            for other in range(LINEAR_LANES):
                total = g.bind(total + shared[other * LINEAR_QUADS + column])
            if multipliers is not None:
                ends = [constants[i] for i in (element_words.ZERO, element_words.LOW)]
                value = e.word("finish4", total, multipliers[quad], *ends)
            else:
                value = e.sums("relu4", "float32x4", total, constants[element_words.REAL_LOW])
            self._store(value, quad, grid.group[2], y)

        g.when(T.And(lane == 0, wanted < self.out_quads), finish)

    def _store(self, value: Expr, quad: Expr, image: Expr, y: Buffer) -> None:
        """``value``: four outputs' bytes, or float32."""
        e = self.element
        if self.plain:
            dtype, name = ("int8", "xct_byte") if e.integer else ("float32", "xct_lane")
            for i in range(min(4, self.outputs)):
                output = g.bind(quad * 4 + i)

                def emit(i: int = i, output: Expr = output) -> None:
                    lane = T.call_extern(dtype, name, value, tirx.const(i, "int32"))
                    g.store(y, image * self.outputs + output, lane)

                g.when(output < self.outputs, emit)
        elif e.integer:
            g.store(y, image * self.out_quads + quad, value)
        else:
            for i in range(e.words_of_four):
                word = T.call_extern("int32", "xct_pack_halves", value, tirx.const(i, "int32"))
                g.store(y, (image * self.out_quads + quad) * e.words_of_four + i, word)


@dataclass(frozen=True)
class Convert:
    """``import``: from the network's plain NHWC int8 to how tensors are stored; ``export``: back to plain int8, or to
    float32. A work-item treats one word. Operands: x, [parameters: float16 import], y."""

    kind: str
    element: Element
    batch: int
    pixels: int
    channels: int

    @property
    def symbol(self) -> str:
        return f"{self.kind}_{self.element.name}_n{self.batch}_{self.pixels}x{self.channels}"

    @property
    def words(self) -> int:
        """Of a stored tensor."""
        return self.element.count(self.batch, self.pixels, self.channels) * WORDS

    @property
    def groups(self) -> tuple[int, int, int]:
        return -(-self.words // ITEMS), 1, 1

    @property
    def group_size(self) -> tuple[int, int, int]:
        return ITEMS, 1, 1

    @property
    def requested_bytes(self) -> int:
        item = 1 if self.kind == "import" or self.element.integer else 4
        return self.words * 4 + self.batch * self.pixels * self.channels * item

    def build(self) -> tirx.PrimFunc:
        e, count = self.element, self.batch * self.pixels * self.channels
        stored = Parameter("int32", self.words)
        if self.kind == "import":
            constants = [] if e.integer else [Parameter(e.parameter_type, e.parameter_count)]
            operands = [Parameter("int8", count), *constants, stored]
        else:
            operands = [stored, Parameter("int8" if e.integer else "float32", count)]
        return g.kernel(self.symbol, operands, self.groups, self.group_size, self._body)

    def _body(self, grid: Grid, x: Buffer, *rest: Buffer) -> None:
        e, blocks = self.element, self.element.blocks(self.channels)
        *constants, y = rest
        index = g.bind(grid.group[0] * ITEMS + grid.item[0])
        word, pixel = g.bind(T.truncmod(index, WORDS)), g.bind(T.truncmod(T.truncdiv(index, WORDS), self.pixels))
        plane = g.bind(T.truncdiv(index, WORDS * self.pixels))
        image, block = g.bind(T.truncdiv(plane, blocks)), g.bind(T.truncmod(plane, blocks))
        channel = g.bind(block * e.lanes + word * e.word_channels)
        plain = g.bind((image * self.pixels + pixel) * self.channels + channel)

        def load() -> None:
            zero = tirx.const(0, "int8")
            there = [channel + i < self.channels for i in range(e.word_channels)]
            values = [g.choose(inside, x[plain + i], zero) for i, inside in enumerate(there)]
            real = [constants[0][i] for i in (element_words.REAL_SCALE, element_words.REAL_OFFSET)] if constants else []
            g.store(y, index, e.word("pack", *values, *real))

        def unload() -> None:
            dtype, name = ("int8", "xct_byte") if e.integer else ("float32", "xct_half")
            value = g.bind(x[index])
            for i in range(e.word_channels):

                def emit(i: int = i) -> None:
                    g.store(y, plain + i, T.call_extern(dtype, name, value, tirx.const(i, "int32")))

                g.when(channel + i < self.channels, emit)

        g.when(index < self.words, load if self.kind == "import" else unload)
