"""Units: what one kernel computes, exact in integers and the same for every family of kernels.

A unit is a straight line of stages: a prologue that is computed while the input is loaded, the anchor, and an epilogue
that is computed before the result is stored. Every stage holds its constants as kernels want them: zero points folded
into biases, multipliers, limits. ``compile/fusion.py`` makes units, ``reference.run_units`` runs them. In a float graph
the stages have no integer constants, and a kernel computes them in the float type of its family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..models.graph import Geometry, Node
from .arithmetic import AddConstants, Float32, Int8
from .plan import COPY

Array = NDArray[np.generic]


@dataclass(frozen=True, eq=False)
class Scaling:
    """The integers of a weighted stage: acc = sum of x * w + start; y = clamp(rint(f32(acc) * m) + z, low, 127).

    Padding is pixels of ``padding``, the input's zero point. ``least`` and ``greatest`` are what an accumulator of each
    channel can be for any input, ``start`` included.
    """

    padding: int
    start: NDArray[np.int64] = field(repr=False)  # (O,): bias - zero point * sum of weights
    weight_sums: NDArray[np.int64] = field(repr=False)  # (O,)
    multipliers: Float32 = field(repr=False)  # (O,)
    zero_point: int
    low: int
    least: NDArray[np.int64] = field(repr=False)  # (O,)
    greatest: NDArray[np.int64] = field(repr=False)  # (O,)

    @property
    def largest(self) -> NDArray[np.int64]:
        """The greatest magnitude of each channel's accumulator."""
        return np.maximum(np.abs(self.least), np.abs(self.greatest))

    @property
    def largest_scaled(self) -> float:
        """The greatest magnitude of any accumulator times its multiplier."""
        return float((self.largest * self.multipliers.astype(np.float64)).max())


@dataclass(frozen=True, eq=False)
class Convolution:
    """A dense convolution; a fully connected layer is one over an image of one pixel."""

    node: Node
    geometry: Geometry
    weights: Array = field(repr=False)  # (O, KH, KW, I)
    bias: Array = field(repr=False)  # (O,), as the graph has it
    relu: bool
    integers: Scaling | None


@dataclass(frozen=True, eq=False)
class DepthwiseConvolution:
    """One filter for each channel."""

    node: Node
    geometry: Geometry
    weights: Array = field(repr=False)  # (KH, KW, C)
    bias: Array = field(repr=False)  # (C,), as the graph has it
    relu: bool
    integers: Scaling | None


@dataclass(frozen=True, eq=False)
class Rectifier:
    """A ReLU alone. int8: y = clamp(x - z, 0, 255) - 128, ``zero_point`` being the input's."""

    node: Node
    geometry: Geometry
    zero_point: int | None


@dataclass(frozen=True, eq=False)
class MaxPool:
    """The maximum over windows; padding never wins."""

    node: Node
    geometry: Geometry


@dataclass(frozen=True)
class AddScaling:
    """The integers of an addition: y = clamp(((a*m_a + b*m_b + bias) >> shift) + z, low, 127)."""

    constants: AddConstants
    zero_point: int
    low: int


@dataclass(frozen=True, eq=False)
class Addition:
    """a + b: ``a`` is the stage before it, in an anchor the node's first input; ``other`` names the tensor ``b``."""

    node: Node
    geometry: Geometry
    other: str
    relu: bool
    integers: AddScaling | None


@dataclass(frozen=True, eq=False)
class MeanScaling:
    """The integers of a mean: acc = sum of x + start; y = clamp(rint(f32(acc) * m) + z, -128, 127)."""

    start: int
    multiplier: Float32  # a scalar
    zero_point: int


@dataclass(frozen=True, eq=False)
class Mean:
    """The mean over all pixels of an image."""

    node: Node
    geometry: Geometry
    integers: MeanScaling | None


@dataclass(frozen=True, eq=False)
class Table:
    """A function of each element: y = table[x + 128]. Of floats ``table`` is None, and the node says the function."""

    node: Node
    geometry: Geometry
    table: Int8 | None = field(repr=False)  # (256,)


@dataclass(frozen=True, eq=False)
class MultiplyScaling:
    """The integers of a product: y = clamp(rint(f32((a - z_a)(b - z_b)) * m) + z, -128, 127)."""

    a_zero: int
    b_zero: int
    multiplier: Float32  # a scalar
    zero_point: int


@dataclass(frozen=True, eq=False)
class Multiplication:
    """a * b: ``other`` names the tensor ``b``, of a's shape or, with ``gate``, (N, C) for every pixel."""

    node: Node
    geometry: Geometry
    other: str
    gate: bool
    integers: MultiplyScaling | None


@dataclass(frozen=True, eq=False)
class Interpolation:
    """A bilinear resize: of each output row and column the pixel before, the one after, and its weight in 1/2048."""

    node: Node
    geometry: Geometry
    rows: NDArray[np.int32] = field(repr=False)  # (OH, 3)
    columns: NDArray[np.int32] = field(repr=False)  # (OW, 3)


@dataclass(frozen=True, eq=False)
class Selection:
    """A nearest resize: y[i, j] = x[rows[i], columns[j]]."""

    node: Node
    geometry: Geometry
    rows: NDArray[np.int32] = field(repr=False)  # (OH,)
    columns: NDArray[np.int32] = field(repr=False)  # (OW,)


@dataclass(frozen=True, eq=False)
class Joining:
    """The inputs' channels one after the other; ``channels`` are how many each input has."""

    node: Node
    geometry: Geometry
    channels: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Flattening:
    """The same values in NHWC order as a tensor of another shape."""

    node: Node
    geometry: Geometry


Weighted = Convolution | DepthwiseConvolution
Stage = (
    Convolution
    | DepthwiseConvolution
    | Rectifier
    | MaxPool
    | Addition
    | Mean
    | Table
    | Multiplication
    | Interpolation
    | Selection
    | Joining
    | Flattening
)

_KINDS: Mapping[type[Stage], str] = {
    DepthwiseConvolution: "depthwise",
    Rectifier: "relu",
    MaxPool: "max pool",
    Addition: "addition",
    Mean: "mean",
    Table: "lookup",
    Multiplication: "multiplication",
    Interpolation: "resize",
    Selection: "resize",
    Joining: "concatenation",
    Flattening: COPY,
}


@dataclass(frozen=True, eq=False)
class Unit:
    """``anchor`` and the stages that join its kernel. ``macs`` are those of all stages and the whole batch."""

    prologue: tuple[Rectifier | DepthwiseConvolution, ...]
    anchor: Stage
    epilogue: tuple[Addition, ...]
    macs: int

    def __iter__(self) -> Iterator[Stage]:
        yield from (*self.prologue, self.anchor, *self.epilogue)

    @property
    def first(self) -> Stage:
        """The stage that reads ``inputs[0]``."""
        return self.prologue[0] if self.prologue else self.anchor

    @property
    def last(self) -> Stage:
        """The stage that makes the unit's tensor."""
        return self.epilogue[-1] if self.epilogue else self.anchor

    @property
    def name(self) -> str:
        """Of the tensor it makes."""
        return self.last.node.name

    @property
    def path(self) -> str:
        """The module of the trained network."""
        return self.last.node.path

    @property
    def kind(self) -> str:
        """What its kernel computes: one of ``plan.STEP_KINDS``."""
        if isinstance(self.anchor, Convolution):
            return "depthwise + pointwise" if self.depthwise else "convolution"
        return _KINDS[type(self.anchor)]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The tensors it reads: what is loaded first, then the other operands."""
        others = tuple(stage.other for stage in self if isinstance(stage, Addition | Multiplication))
        if isinstance(self.anchor, Joining):
            others = self.anchor.node.inputs[1:]
        return (self.first.node.inputs[0], *others)

    @property
    def depthwise(self) -> DepthwiseConvolution | None:
        """The depthwise convolution of the prologue."""
        return next((stage for stage in self.prologue if isinstance(stage, DepthwiseConvolution)), None)

    @property
    def rectifier(self) -> Rectifier | None:
        """The ReLU of the prologue."""
        return next((stage for stage in self.prologue if isinstance(stage, Rectifier)), None)

    @property
    def addition(self) -> Addition | None:
        """The addition of the epilogue."""
        return self.epilogue[0] if self.epilogue else None


def to_text(units: tuple[Unit, ...]) -> str:
    """One unit a line: the tensor it makes, its stages in order, the tensors it reads, its geometry and proofs."""
    return "".join(f"{_line(unit)}\n" for unit in units)


def _line(unit: Unit) -> str:
    stages = " > ".join(f"{_kind(stage)}({stage.node.name})" for stage in unit)
    text = f"{unit.name} = {stages} of {', '.join(unit.inputs)}; {_geometry(unit.anchor.geometry)}"
    for stage in unit:
        if isinstance(stage, Weighted) and stage.integers is not None:
            text += f"; |acc| of {stage.node.name} < 2^{int(stage.integers.largest.max()).bit_length()}"
    if unit.macs:
        text += f"; {unit.macs} macs"
    return f"{text} @{unit.path}" if unit.path not in ("", unit.name) else text


def _kind(stage: Stage) -> str:
    relu = "+relu" if isinstance(stage, Convolution | DepthwiseConvolution | Addition) and stage.relu else ""
    return ("convolution" if isinstance(stage, Convolution) else _KINDS[type(stage)]) + relu


def _geometry(g: Geometry) -> str:
    text = f"{g.batch}x{g.in_height}x{g.in_width}x{g.in_channels} -> {g.out_height}x{g.out_width}x{g.out_channels}"
    if not g.one_to_one:
        text += f" kernel {g.kernel} strides {g.strides} padding {g.padding}"
    return text if g.dilation == (1, 1) else f"{text} dilation {g.dilation}"
