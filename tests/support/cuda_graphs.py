"""Graphs that try every CUDA kernel: on the emulation, in NVRTC, and on a borrowed GPU."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from support.int8_graphs import Int8Builder, f32, random_operator_graph, tie_graph

from xceptile.models import graph as ir

CHANNELS = (1, 3, 8, 17, 33, 128)


def operator_graphs() -> Iterator[ir.Graph]:
    """Every operator at the edges of words, chunks and tiles, at odd sizes, and with accumulators on exact halves."""
    for index, channels in enumerate(CHANNELS):
        outputs = CHANNELS[-1 - index]
        relu = channels % 2 == 0
        yield random_operator_graph("conv", (1, 5, 7, channels), channels=outputs, kernel=(1, 1), relu=relu)
        yield random_operator_graph("depthwise", (1, 5, 7, channels), padding=(1, 1, 1, 1), relu=not relu)
        yield random_operator_graph("linear", (1, channels), channels=outputs, relu=relu)
        yield random_operator_graph("relu", (1, 5, 3, channels))
        yield random_operator_graph("pool", (1, 7, 6, channels), strides=(2, 2), padding=(0, 1, 1, 1))
        yield random_operator_graph("add", (1, 5, 3, channels), relu=relu)
        yield random_operator_graph("requantize", (1, 5, 3, channels))
        yield random_operator_graph("mean", (1, 5, 3, channels))
    windows = (((1, 1), (1, 1, 1, 1)), ((2, 2), (0, 1, 0, 1)), ((1, 2), (0, 0, 0, 0)), ((3, 2), (2, 1, 0, 2)))
    for strides, padding in windows:
        for kind, kernel in (("conv", (3, 3)), ("depthwise", (3, 3)), ("depthwise", (5, 2))):
            shape = (1, 9, 8, 3) if kind == "conv" else (1, 10, 11, 20)
            yield random_operator_graph(
                kind, shape, channels=5, kernel=kernel, strides=strides, padding=padding, relu=strides == (1, 1)
            )
    yield random_operator_graph("linear", (9, 70), channels=40)  # more rows than the vectors' kernel takes
    for kind in ("conv", "depthwise", "linear", "add", "requantize"):
        for zero_point in (-128, 0, 7, 127):
            shape = (1, 15) if kind == "linear" else (1, 8, 8, 15)
            yield tie_graph(kind, shape, zero_point=zero_point, relu=zero_point == 7 and kind != "requantize")
    for kind in ("conv", "depthwise", "linear"):  # scaled accumulators far beyond int8
        shape = (1, 15) if kind == "linear" else (1, 6, 5, 15)
        yield random_operator_graph(kind, shape, quant=ir.PerTensor(f32(2e-5), 3), relu=kind == "conv")


def chains(batch: int = 1) -> Iterator[ir.Graph]:
    """What the lowering joins, and what it must not join."""
    for index, (height, width, channels, outputs) in enumerate([(13, 13, 40, 24), (7, 9, 64, 136)]):
        build = Int8Builder(f"chain{index}", index)
        shape = (batch, height, width, channels)
        x = build.conv(build.input(np.random.default_rng(index).integers(-128, 128, shape, np.int8)), channels)
        shared = build.relu(x)
        first = build.conv(build.depthwise(shared), outputs, relu=True)
        second = build.conv(build.depthwise(build.conv(shared, channels)), outputs)
        joined = build.add(first, second, relu=True)
        third = build.conv(build.depthwise(shared), outputs)
        last = build.add(build.conv(shared, outputs, (3, 3), (1, 1), (1, 1, 1, 1)), build.add(third, joined))
        build.fully_connected(build.average_pool(last), 10)
        yield build.graph(joined, last, build.nodes[-1].name)
