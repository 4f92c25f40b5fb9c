"""Concatenations: inputs share a scale where their parameters are free, and are requantized where they are not."""

from __future__ import annotations

import numpy as np
import pytest

from xceptile.calibration.collect import collect
from xceptile.calibration.quantize import quantize
from xceptile.calibration.recipe import PRESETS
from xceptile.calibration.table import CalibrationError
from xceptile.models import graph as ir
from xceptile.models.verify import verify
from xceptile.runtime import reference

SHAPE = (1, 6, 6, 3)


def network(*branches: str) -> ir.Graph:
    """Convolutions of different spread, each behind what its branch says, joined; then a convolution."""
    rng = np.random.default_rng(0)
    constants: dict[str, ir.Constant] = {}
    nodes = [ir.Node("x", ir.Input(), (), ir.TensorType(SHAPE, "float32"))]

    def append(name: str, op: ir.Op, inputs: tuple[str, ...], channels: int) -> str:
        nodes.append(ir.Node(name, op, inputs, ir.TensorType((1, 6, 6, channels), "float32"), name))
        return name

    def conv(name: str, source: str, inputs: int, channels: int, spread: float, relu: bool = False) -> str:
        weights = rng.normal(0, spread, (channels, 1, 1, inputs)).astype(np.float32)
        bias = np.zeros(channels, np.float32)
        for key, data in ((f"{name}.w", weights), (f"{name}.b", bias)):
            constants[key] = ir.Constant(ir.TensorType(data.shape, "float32"), data)
        return append(name, ir.Conv2d((1, 1), (0, 0, 0, 0), relu), (source, f"{name}.w", f"{name}.b"), channels)

    joined = []
    for index, branch in enumerate(branches):
        made = conv(f"conv{index}", "x", 3, 4, 0.01 * 3**index, relu=branch == "fused relu")
        if branch == "pool":
            made = append(f"pool{index}", ir.MaxPool2d((3, 3), (1, 1), (1, 1, 1, 1)), (made,), 4)
        if branch == "relu":
            conv(f"reader{index}", made, 4, 2, 0.1)
            made = append(f"relu{index}", ir.Relu(), (made,), 4)
        if branch == "sigmoid":
            made = append(f"sigmoid{index}", ir.Lookup("sigmoid"), (made,), 4)
        joined.append(made)
    whole = append("joined", ir.Concatenate(), tuple(joined), 4 * len(joined))
    last = conv("last", whole, 4 * len(joined), 5, 0.2)
    outputs = (last, *(node.name for node in nodes if node.name.startswith("reader")))
    return ir.Graph("joined", tuple(nodes), constants, outputs)


def test_ranges_too_far_apart_are_refused_by_name() -> None:
    graph = network("sigmoid", *["plain"] * 6)
    images = [np.random.default_rng(0).integers(0, 256, SHAPE[1:]).astype(np.uint8)]
    with pytest.raises(CalibrationError, match="joins tensors whose ranges differ too much"):
        quantize(graph, collect(graph, images, PRESETS["min-max"]), PRESETS["min-max"])


@pytest.mark.parametrize(
    ("branches", "copies"),
    [
        (("plain", "plain"), 0),
        (("plain", "fused relu", "pool"), 0),
        (("plain", "relu"), 1),
        (("sigmoid", "plain", "pool"), 1),
    ],
)
def test_inputs_of_a_concatenation(branches: tuple[str, ...], copies: int) -> None:
    graph = network(*branches)
    verify(graph)
    images = [np.random.default_rng(seed).integers(0, 256, SHAPE[1:]).astype(np.uint8) for seed in range(4)]
    table = collect(graph, images, PRESETS["min-max"])
    int8 = quantize(graph, table, PRESETS["min-max"])
    verify(int8)
    assert sum(node.op == ir.Lookup("identity") for node in int8.nodes) == copies
    x = images[0][None]
    (expected, *_) = reference.run(graph, x.astype(np.float32))
    (got, *_) = reference.run(int8, (x ^ 0x80).view(np.int8))
    quant = int8.type_of(int8.outputs[0]).per_tensor
    real = (got.astype(np.float64) - quant.zero_point) * quant.scale
    assert np.abs(real - expected).max() < 0.05 * np.abs(expected).max()
