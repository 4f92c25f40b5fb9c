"""The AArch64 kernels under qemu, each set of instructions on a processor that has no more than that: every operator
and whole networks, bit for bit as the reference. The operators of one instruction set run in one process."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import operator_cases
from support.emulated_bundle import EmulatedBundle, merged
from support.int8_graphs import (
    Int8Builder,
    all_outputs,
    chained_graph,
    differences,
    f32,
    photo,
    random_input,
    random_operator_graph,
    random_table,
    random_xception,
    table_graph,
)
from support.needs import requires

from xceptile.compile.kernels.arm import lower as arm
from xceptile.compile.kernels.arm.elementwise import Restride
from xceptile.compile.kernels.kernel_call import Weights
from xceptile.models import graph as ir
from xceptile.runtime import arithmetic
from xceptile.runtime.plan import COPY
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

pytestmark = requires("qemu-aarch64", package="qemu-user")

TARGETS = {
    "neon": catalog.get("raspberry-pi-4"),
    "dotprod": catalog.get("raspberry-pi-5"),
    "i8mm": catalog.get("generic/android-arm64-i8mm"),
}
BYTES = (np.indices((256, 256)) - 128).astype(np.int8).reshape(2, 1, 64, 64, 16)  # every pair


def sums() -> ir.Graph:
    """Additions whose scales and zero points lie at the ends of what they may be."""
    build = Int8Builder("sums", 0)
    scales = ((0.02, 0.031, 0.03), (1.0, 0.99999, 0.5), (0.02, 0.01, 0.2))
    for (*of_inputs, scale), (*zeros, zero) in itertools.product(
        scales, ((3, -7, -25), (-128, -128, 0), (127, 127, 9))
    ):
        a, b = (
            build.input(BYTES[i], ir.PerTensor(f32(of_input), at))
            for i, (of_input, at) in enumerate(zip(of_inputs, zeros, strict=True))
        )
        build.add(a, b, relu=zero == 9, quant=ir.PerTensor(f32(scale), zero))
    return build.graph(*(node.name for node in build.nodes if isinstance(node.op, ir.Add)))


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> TargetSpec:
    return TARGETS[request.param]


@pytest.fixture(scope="module")
def operators(target: TargetSpec, tmp_path_factory: pytest.TempPathFactory) -> EmulatedBundle:
    graph = merged([*operator_cases.all_cases(), chained_graph()])
    return EmulatedBundle(graph, arm.lower(graph, target), target, tmp_path_factory.mktemp(target.cpu))


def test_every_operator_equals_the_reference(operators: EmulatedBundle) -> None:
    graph = operators.graph
    images = list(operator_cases.images(graph))
    for image, outputs in zip(images, operators.run(images), strict=True):
        assert differences(graph, image, outputs) == {}


def test_the_sum_of_every_pair_of_bytes(tmp_path: Path) -> None:
    """Most scales by limbs of the multipliers; those whose sums leave int16, and could still be of use, otherwise."""
    graph, target = sums(), TARGETS["dotprod"]
    calls = arm.lower(graph, target)
    assert {call.symbol.split("_")[1].rstrip("0123456789") for call in calls} == {"limbs", "sum"}
    image = [*BYTES] * (len(graph.inputs) // 2)
    assert differences(graph, image, EmulatedBundle(graph, calls, target, tmp_path).run([image])[0]) == {}


def test_lookups_in_random_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every byte, and vectors with channels that are not there."""
    monkeypatch.setitem(arithmetic.FUNCTIONS, "random_table", random_table)
    shapes = [(1, 4, 5, 16), (1, 19, 16, 9), (1, 3)]
    graph = merged([table_graph(shape, seed) for seed, shape in enumerate(shapes)])
    image = [np.arange(np.prod(shape)).astype(np.int8).reshape(shape) for shape in shapes]
    bundle = EmulatedBundle(graph, arm.lower(graph, TARGETS["neon"]), TARGETS["neon"], tmp_path)
    assert differences(graph, image, bundle.run([image])[0]) == {}


def test_threads_share_the_tasks(operators: EmulatedBundle) -> None:
    image = random_input(operators.graph, 9)
    (outputs,) = operators.run([image], threads=3)
    assert differences(operators.graph, image, outputs) == {}


def test_the_assembly_holds_the_promised_instructions_and_no_others(operators: EmulatedBundle) -> None:
    found = {
        "sdot by element": r"\bsdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[\d\]",
        "smmla": r"\bsmmla\b",
        "any dot product": r"\b[su]?[su]dot\b|\b[su]?[su]mmla\b",
        "smlal2": r"\bsmlal2\b",
        "sadalp": r"\bsadalp\b",
    }
    counts = {name: len(re.findall(pattern, operators.assembly)) for name, pattern in found.items()}
    if "i8mm" in operators.target.features:
        assert counts["smmla"] > 0
    elif "dotprod" in operators.target.features:
        assert counts["sdot by element"] > 0
        assert counts["smmla"] == 0
    else:
        assert counts["any dot product"] == 0
        assert min(counts["smlal2"], counts["sadalp"]) > 0


def test_a_changed_weight_is_seen(operators: EmulatedBundle) -> None:
    """The comparison itself: one weight of one operator, moved by one."""
    calls = list(arm.lower(operators.graph, operators.target))
    index = next(i for i, call in enumerate(calls) if call.name.startswith("0_conv."))
    at = next(i for i, o in enumerate(calls[index].operands) if isinstance(o, Weights) and o.data.dtype == np.int8)
    weights = calls[index].operands[at]
    assert isinstance(weights, Weights)
    data = weights.data.copy()
    data[np.flatnonzero(data)[0]] -= np.sign(data[np.flatnonzero(data)[0]]) * 3
    changed = (*calls[index].operands[:at], Weights(data), *calls[index].operands[at + 1 :])
    calls[index] = replace(calls[index], operands=changed)
    image = random_input(operators.graph, 0)
    try:
        operators.assemble(calls)
        (outputs,) = operators.run([image])
    finally:
        operators.assemble(arm.lower(operators.graph, operators.target))
    assert {name.partition(".")[0] for name in differences(operators.graph, image, outputs)} == {"0_conv"}


def test_a_small_xception(target: TargetSpec, tmp_path: Path) -> None:
    graph = random_xception(75, 0.125, 10, same_padding=False)
    bundle = EmulatedBundle(graph, arm.lower(graph, target), target, tmp_path)
    images = [[photo(75, 75, seed)] for seed in range(3)]
    for image, outputs in zip(images, bundle.run(images), strict=True):
        assert differences(graph, image, outputs) == {}


def test_every_tensor_of_a_small_xception(tmp_path: Path) -> None:
    """With every tensor shown nothing is fused."""
    target = TARGETS["dotprod"]
    graph = all_outputs(random_xception(75, 0.125, 10))
    bundle = EmulatedBundle(graph, arm.lower(graph, target), target, tmp_path)
    image = [photo(75, 75, 3)]
    assert differences(graph, image, bundle.run([image])[0]) == {}


@pytest.fixture(scope="module")
def full_xception() -> ir.Graph:
    return random_xception()


@pytest.mark.parametrize(
    "features", ["dotprod", *(pytest.param(name, marks=pytest.mark.slow) for name in ("neon", "i8mm"))]
)
def test_the_whole_xception(features: str, full_xception: ir.Graph, tmp_path: Path) -> None:
    target = TARGETS[features]
    bundle = EmulatedBundle(full_xception, arm.lower(full_xception, target), target, tmp_path)
    image = [photo(299, 299, 1)]
    assert differences(full_xception, image, bundle.run([image])[0]) == {}


def test_equal_shapes_share_a_kernel() -> None:
    """The middle flow repeats: 24 separable convolutions, two kernels (behind a ReLU of its own and not)."""
    graph = random_xception(75, 0.125, 10)
    for target in TARGETS.values():
        calls = arm.lower(graph, target)
        middle = {call.symbol for call in calls if re.match(r"blocks\.(4|5|6|7|8|9|10)\.sepconvs", call.path)}
        assert len(middle) == 2  # with a lone ReLU before, and without
        symbols = {call.symbol for call in calls}
        assert len(symbols) < len(calls) / 2


def test_nothing_is_copied_between_the_operators_of_an_xception() -> None:
    """Channels are padded where a tensor is made, so only the logits are brought to another layout."""
    calls = arm.lower(random_xception(75, 0.125, 10), TARGETS["dotprod"])
    assert [call.name for call in calls if call.kind == COPY] == [calls[-1].name]
    assert Restride(1, 10, 16, 10).symbol == calls[-1].symbol


def test_a_joined_tensor_is_written_by_one_call(tmp_path: Path) -> None:
    """More tensors than a call takes: a machine that gives every call memory of its own to write runs them, too."""
    build = Int8Builder("joined")
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 3, 2, 7), np.int8))
    wide = build.concatenate(*[x] * 20)
    build.concatenate(wide, build.conv(x, 65, quant=build.quant(x)))
    graph, target = build.graph(), TARGETS["neon"]
    calls = arm.lower(graph, target)
    assert len({call.output for call in calls}) == len(calls)
    image = random_input(graph, 0)
    assert differences(graph, image, EmulatedBundle(graph, calls, target, tmp_path).run([image])[0]) == {}


def test_a_batch_of_two_is_refused() -> None:
    graph = random_operator_graph("relu", (2, 3, 3, 4))
    with pytest.raises(ir.GraphError, match="a batch of one"):
        arm.lower(graph, TARGETS["neon"])
