"""The one list of operator cases, which every engine runs: an operator adds its rows here and nowhere else.

A case is a graph of one operator, or of a few that a kernel may join. ``all_cases`` are small enough to be merged into
one graph, so that an engine compiles and runs them at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from support.int8_graphs import Int8Builder, f32, random_input, random_operator_graph, tie_graph

from xceptile.models import graph as ir

CHANNELS = (1, 2, 3, 7, 8, 15, 16, 728)  # primes and edges of lanes, and Xception's own
EXTREMES = (-128, 127)
ZERO_POINTS = (-128, 0, 7, 127)
FUNCTIONS: tuple[tuple[str, tuple[float, ...]], ...] = (
    ("identity", ()),
    ("sigmoid", ()),
    ("tanh", ()),
    ("leaky_relu", (0.2,)),
    ("clip", (0.0, 6.0)),
)
COORDINATES = ("align corners", "half pixel", "legacy")


@dataclass(frozen=True)
class Case:
    """``kind`` and ``options`` as ``random_operator_graph`` takes them; ``shape`` is the input's without the batch and
    channels."""

    kind: str
    shape: tuple[int, ...]
    channels: int
    options: dict[str, Any] = field(default_factory=dict)

    def graph(self, batch: int = 1, seed: int = 0) -> ir.Graph:
        return random_operator_graph(self.kind, (batch, *self.shape, self.channels), seed=seed, **self.options)


def _channel_cases() -> Iterator[Case]:
    """Every operator at the edges of vectors and blocks."""
    for index, channels in enumerate(CHANNELS):
        outputs, odd = CHANNELS[-1 - index], channels % 2 == 1
        kernel = (1, 1) if channels * outputs > 728 else (3, 3)
        yield Case("conv", (5, 7), channels, {"channels": outputs, "kernel": kernel, "relu": not odd})
        yield Case("depthwise", (5, 7), channels, {"padding": (1, 1, 1, 1), "relu": odd})
        yield Case("linear", (), channels, {"channels": outputs, "relu": not odd})
        yield Case("relu", (5, 3), channels)
        yield Case("pool", (7, 6), channels, {"strides": (2, 2), "padding": (0, 1, 1, 1)})
        yield Case("add", (5, 3), channels, {"relu": not odd})
        yield Case("mean", (5, 3), channels)
        function, parameters = FUNCTIONS[index % len(FUNCTIONS)]
        yield Case("lookup", (5, 3), channels, {"function": function, "parameters": parameters})
        yield Case("multiply", (4, 3), channels)
        yield Case("gate", (4, 3), channels)
        yield Case("concatenate", (3, 4), channels, {"channels": outputs})
        where = {"coordinates": COORDINATES[index % 3]}
        yield Case("resize", (4, 5), channels, {"size": (7, 11), "method": "bilinear", **where})
        yield Case("resize", (4, 5), channels, {"size": (7, 3), "method": "nearest", **where})
        yield Case("reshape", (2, 3), channels)


def _window_cases() -> Iterator[Case]:
    """Strides, paddings, kernels that are not square, dilation."""
    windows = (((1, 1), (1, 1, 1, 1)), ((2, 2), (0, 1, 0, 1)), ((1, 2), (0, 0, 0, 0)), ((3, 2), (2, 1, 0, 2)))
    for strides, padding in windows:
        for kind, kernel in (("conv", (3, 3)), ("depthwise", (3, 3)), ("conv", (2, 3)), ("depthwise", (5, 2))):
            options = {"channels": 5, "kernel": kernel, "strides": strides, "padding": padding}
            shape, channels = ((9, 8), 3) if kind == "conv" else ((10, 11), 20)
            yield Case(kind, shape, channels, options | {"relu": strides == (1, 1)})
    yield Case("conv", (9, 8), 5, {"channels": 5, "kernel": (1, 1), "strides": (2, 2)})
    yield Case("conv", (4, 3), 7, {"channels": 3, "kernel": (1, 1), "padding": (1, 0, 0, 2)})
    yield Case("conv", (1, 1), 100, {"channels": 100, "kernel": (1, 1)})
    for height, width in ((1, 5), (2, 1), (40, 2)):
        yield Case("depthwise", (height, width), 15, {"padding": (1, 1, 1, 1)})
    yield Case("pool", (6, 6), 9, {"kernel": (2, 2), "strides": (2, 2)})
    yield Case("depthwise", (13, 11), 17, {"padding": (2, 2, 2, 2), "dilation": (2, 2)})
    yield Case("depthwise", (9, 9), 16, {"padding": (6, 6, 6, 6), "dilation": (6, 6), "relu": True})
    yield Case("depthwise", (7, 8), 20, {"padding": (12, 12, 12, 12), "dilation": (12, 12)})  # the centre alone
    yield Case("depthwise", (12, 13), 9, {"strides": (2, 1), "padding": (0, 2, 3, 1), "dilation": (2, 3)})
    yield Case("conv", (9, 10), 9, {"channels": 12, "padding": (2, 2, 2, 2), "dilation": (2, 2)})
    yield Case("conv", (11, 9), 3, {"channels": 7, "kernel": (2, 3), "dilation": (3, 2), "strides": (1, 2)})
    yield Case("reshape", (1, 1), 15)
    yield Case("reshape", (2, 3), 64)
    yield Case("resize", (1, 1), 20, {"size": (5, 4), "method": "bilinear", "coordinates": "align corners"})
    for coordinates in COORDINATES:
        for method in ("bilinear", "nearest"):
            yield Case("resize", (5, 6), 17, {"size": (9, 2), "method": method, "coordinates": coordinates})
            yield Case("resize", (6, 3), 4, {"size": (12, 6), "method": method, "coordinates": coordinates})
    for function, parameters in FUNCTIONS:
        yield Case("lookup", (16, 16), 1, {"function": function, "parameters": parameters})


def _range_cases() -> Iterator[Case]:
    """Sums and scaled sums at the ends of what kernels may assume."""
    for pixels in (2, 361):  # more than an int16 sum would hold
        yield Case("mean", (pixels, 1), 17)
    for kind in ("conv", "depthwise", "linear"):  # scaled accumulators beyond int16
        shape = () if kind == "linear" else (6, 5)
        yield Case(kind, shape, 15, {"quant": ir.PerTensor(f32(2e-5), 3), "relu": kind == "conv"})


CASES = (*_channel_cases(), *_window_cases(), *_range_cases())


def tie_cases() -> Iterator[ir.Graph]:
    """Accumulators that often land on an exact half."""
    for kind in ("conv", "depthwise", "linear", "add", "requantize"):
        for zero_point in ZERO_POINTS:
            shape = (1, 15) if kind == "linear" else (1, 16, 16, 15)
            yield tie_graph(kind, shape, zero_point=zero_point, relu=zero_point == 7 and kind != "requantize")


def extreme_weights(kind: str, in_channels: int, **options: Any) -> ir.Graph:
    """Weights of -127 and 127 alone: with pixels of -128 two products are as near to the limit of int16 as can be."""
    shape = (1, in_channels) if kind == "linear" else (1, 6, 5, in_channels)
    graph = random_operator_graph(kind, shape, **options)
    constants = dict(graph.constants)
    for name in (node.inputs[1] for node in graph.nodes if node.inputs):
        signs = np.random.default_rng(0).integers(0, 2, constants[name].data.shape) * 254 - 127
        constants[name] = replace(constants[name], data=signs.astype(np.int8))
    return replace(graph, name="extreme_weights", constants=constants)


def extreme_cases() -> Iterator[ir.Graph]:
    """Weights at the ends of their range."""
    yield extreme_weights("depthwise", 16, padding=(1, 1, 1, 1))
    yield extreme_weights("conv", 40, kernel=(3, 3), padding=(1, 1, 1, 1), channels=40)
    for channels in (257, 259):  # accumulators within 2^22 and not
        yield extreme_weights("linear", channels)


def fusion_cases(batch: int = 1) -> Iterator[ir.Graph]:
    """What lowerings join, and what they must not join."""
    for index, (height, width, channels, outputs) in enumerate([(13, 13, 40, 24), (7, 9, 16, 9), (1, 30, 3, 50)]):
        build = Int8Builder(f"fused{index}", index)
        pixels = np.random.default_rng(index).integers(-128, 128, (batch, height, width, channels), np.int8)
        x = build.conv(build.input(pixels), channels)
        shared = build.relu(x)
        first = build.conv(build.depthwise(build.relu(build.conv(x, channels))), outputs, relu=True)
        second = build.conv(build.depthwise(shared), outputs)
        read_twice = build.depthwise(shared)
        third = build.conv(read_twice, outputs)
        build.conv(read_twice, outputs, strides=(2, 2))
        joined = build.add(first, second, relu=True)
        last = build.add(build.conv(shared, outputs, (3, 3), (1, 1), (1, 1, 1, 1)), build.add(third, joined))
        build.fully_connected(build.average_pool(last), 10)
        outputs_ = [node.name for node in build.nodes if node.name.startswith(("conv", "add"))]
        yield build.graph(*outputs_, build.nodes[-1].name)


def dilated_fusion_cases(batch: int = 1) -> Iterator[ir.Graph]:
    """Separable convolutions at the rates of an ASPP and of a network of output stride 8, behind a ReLU and not; the
    larger rates leave rows of padding alone, and bands of rows in it."""
    for index, (height, width, channels, rate) in enumerate(
        [(19, 17, 24, (2, 2)), (15, 9, 16, (6, 4)), (9, 10, 8, (12, 12))]
    ):
        build = Int8Builder(f"dilated{index}", index)
        pixels = np.random.default_rng(index).integers(-128, 128, (batch, height, width, channels), np.int8)
        x = build.conv(build.input(pixels), channels)
        padding = (rate[0], rate[0], rate[1], rate[1])
        behind_relu = build.depthwise(build.relu(build.conv(x, channels)), padding=padding, dilation=rate, relu=True)
        plain = build.depthwise(x, padding=padding, dilation=rate)
        yield build.graph(build.conv(behind_relu, 20), build.conv(plain, 9, relu=True))


def all_cases(batch: int = 1, *, lacking: tuple[str, ...] = ()) -> list[ir.Graph]:
    """Every case as a graph; ``lacking`` are kinds that an engine has not, "dilation" among them."""
    graphs = [
        case.graph(batch, seed)
        for seed, case in enumerate(CASES)
        if case.kind not in lacking and not ("dilation" in lacking and "dilation" in case.options)
    ]
    if batch == 1:
        graphs += [*tie_cases(), *extreme_cases()]
    dilated = () if "dilation" in lacking else dilated_fusion_cases(batch)
    return [*graphs, *fusion_cases(batch), *dilated]


def images(graph: ir.Graph, count: int = 3) -> Iterator[list[np.ndarray]]:
    """Random inputs, and inputs at the extremes."""
    shapes = [node.type.shape for node in graph.inputs]
    for seed in range(count):
        yield list(random_input(graph, seed))
    for value in EXTREMES:
        yield [np.full(shape, value, np.int8) for shape in shapes]
    yield [np.where(np.indices(shape).sum(axis=0) % 2, *EXTREMES).astype(np.int8) for shape in shapes]
