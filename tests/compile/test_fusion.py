"""Units: every family's fused form equals the graph, without a compiler; what joins a kernel, and what must not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from support.int8_graphs import Int8Builder, as_float, photo, random_input, random_xception
from support.operator_cases import all_cases

from xceptile.compile.fusion import RULES, Rules, units
from xceptile.models import graph as ir
from xceptile.runtime import reference
from xceptile.runtime.units import Convolution, Scaling, Unit, to_text

EVERYTHING = Rules(lambda _: True, True, lambda *_: True, True, True)


def graphs() -> Iterator[ir.Graph]:
    yield from all_cases()
    yield from all_cases(2)
    yield random_xception(71, 0.25, 10)
    yield random_xception(75, 0.25, 10, same_padding=False)


def run_fused(fused: tuple[Unit, ...], graph: ir.Graph, *inputs: np.ndarray) -> list[np.ndarray]:
    feeds = {node.name: value for node, value in zip(graph.inputs, inputs, strict=True)}
    made = reference.run_units(fused, feeds, graph.outputs)
    return [made[name] for name in graph.outputs]


@pytest.mark.parametrize("rules", [*RULES.values(), EVERYTHING], ids=[*RULES, "everything"])
def test_units_compute_the_graph(rules: Rules) -> None:
    rules = replace(rules, dilation=True)
    for graph in graphs():
        inputs = random_input(graph, 1)
        expected = reference.run(graph, *inputs)
        for got, value in zip(run_fused(units(graph, rules), graph, *inputs), expected, strict=True):
            np.testing.assert_array_equal(got, value)


def block() -> ir.Graph:
    """A ReLU with two depthwise readers, separable convolutions, and an addition of two convolutions."""
    build = Int8Builder("block")
    x = build.conv(build.input(photo(9, 9), name="image"), 8, (3, 3))
    shared = build.relu(x)
    left = build.conv(build.depthwise(shared), 8)
    right = build.conv(build.depthwise(shared, (3, 3), (1, 1), (1, 1, 1, 1)), 8)
    build.average_pool(build.add(left, right, relu=True))
    return build.graph()


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("generic", "conv_0 | relu_0 | depthwise_0 | conv_1 | depthwise_1 | conv_2 | conv_1,conv_2>add_0 | mean_0"),
        ("x86", "conv_0 | relu_0>depthwise_0>conv_1 | relu_0>depthwise_1>conv_2 | add_0 | mean_0"),
        ("arm", "conv_0 | relu_0 | depthwise_0>conv_1 | depthwise_1>conv_2 | add_0 | mean_0"),
        ("opencl", "conv_0 | relu_0>depthwise_0 | conv_1 | relu_0>depthwise_1 | conv_2>add_0 | mean_0"),
    ],
)
def test_what_shares_a_kernel(family: str, expected: str) -> None:
    lines = [">".join(stage.node.name for stage in unit) for unit in units(block(), RULES[family])]
    assert lines == [line.replace("conv_1,conv_2>add_0", "add_0") for line in expected.split(" | ")]


def test_an_output_of_the_network_joins_no_other_kernel() -> None:
    graph = block()
    kept = replace(graph, outputs=("relu_0", "depthwise_0", "conv_2", *graph.outputs))
    made = [unit.name for unit in units(kept, EVERYTHING)]
    assert made == ["conv_0", "relu_0", "depthwise_0", "conv_2", "add_0", "mean_0"]
    fused = next(unit for unit in units(kept, EVERYTHING) if unit.name == "add_0")
    assert fused.anchor.node.name == "conv_1"  # conv_2, nearer, is an output


def test_the_cost_model_decides_where_it_is_the_rule() -> None:
    pays = replace(EVERYTHING, depthwise=lambda prologue, _: prologue[-1].node.name == "depthwise_1")
    fused = [unit.name for unit in units(block(), pays)]
    assert "depthwise_0" in fused
    assert "depthwise_1" not in fused


def test_a_wrong_folded_constant_is_seen() -> None:
    """The planted fault: what ``run_units`` computes depends on the constants that kernels use."""
    graph = block()
    (x,) = random_input(graph, 1)
    fused = units(graph, RULES["opencl"])

    def broken(unit: Unit) -> Unit:
        if not (isinstance(unit.anchor, Convolution) and unit.name == "conv_1"):
            return unit
        assert isinstance(unit.anchor.integers, Scaling)
        integers = replace(unit.anchor.integers, start=unit.anchor.integers.start + 40)
        return replace(unit, anchor=replace(unit.anchor, integers=integers))

    (expected,) = reference.run(graph, x)
    assert not np.array_equal(run_fused(tuple(map(broken, fused)), graph, x)[0], expected)


def test_accumulators_reach_their_bounds_and_no_further() -> None:
    """The bound is exact: the worst image of a channel reaches it, and ``run_units`` refuses what is beyond it."""
    build = Int8Builder("one")
    x = build.input(np.zeros((1, 1, 1, 6), np.int8), ir.PerTensor(0.5, 3))
    build.conv(x, 2, normalize=False)
    graph = build.graph()
    (unit,) = units(graph, RULES["generic"])
    assert isinstance(unit.anchor, Convolution)
    integers = unit.anchor.integers
    assert integers is not None
    weights = unit.anchor.weights[0].reshape(-1).astype(np.int64)
    worst = np.where(weights > 0, 127, -128).astype(np.int8)
    assert worst.astype(np.int64) @ weights + integers.start[0] == integers.greatest[0]
    tight = replace(unit, anchor=replace(unit.anchor, integers=replace(integers, greatest=integers.greatest - 1)))
    with pytest.raises(OverflowError, match="bound"):
        run_fused((tight,), graph, worst.reshape(1, 1, 1, 6))


def test_a_float_graph_has_units_without_integers() -> None:
    for unit in units(as_float(block()), RULES["cuda"]):
        assert all(getattr(stage, "integers", None) is None for stage in unit)


def test_units_as_text() -> None:
    line = to_text(units(block(), RULES["x86"])).splitlines()[1]
    assert line.startswith("conv_1 = relu(relu_0) > depthwise(depthwise_0) > convolution(conv_1) of conv_0; 1x7x7x8 ")
