"""The portable kernels: every operator in this process and under qemu-riscv64, bit for bit as the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import operator_cases
from support.emulated_bundle import EmulatedBundle, merged
from support.int8_graphs import (
    INPUT_QUANT,
    Int8Builder,
    differences,
    random_input,
    random_operator_graph,
    random_xception,
)
from support.kernel_runner import KernelRunner
from support.needs import requires
from support.small_bundle import write_small_bundle

from xceptile.compile.backends import cpu as backend
from xceptile.compile.fusion import family_of
from xceptile.compile.kernels.generic import kernels
from xceptile.compile.kernels.generic import lower as generic
from xceptile.models import graph as ir
from xceptile.runtime.bundle import ROOF
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.evaluate_engines import contenders
from xceptile.runtime.session import QEMU, open_session
from xceptile.targets import catalog, host
from xceptile.targets.spec import TargetSpec

RISCV = catalog.get("generic-riscv64")
SHARES = {"a fifth": 5, "all": 1}


def runs_as_reference(graph: ir.Graph) -> KernelRunner:
    runner = KernelRunner(graph, host.detect(), generic.lower)
    for image in operator_cases.images(graph, 2):
        assert differences(graph, image, runner.run(*image)) == {}
    return runner


@pytest.mark.parametrize("share", ["a fifth", pytest.param("all", marks=pytest.mark.slow)])
def test_every_operator(share: str) -> None:
    graphs = operator_cases.all_cases()[:: SHARES[share]]
    assert {type(op) for op in _operators(graphs)} == {type(op) for op in _operators(operator_cases.all_cases())}
    runs_as_reference(merged(graphs))


def _operators(graphs: list[ir.Graph]) -> list[ir.Op]:
    return [node.op for graph in graphs for node in graph.nodes]


def test_tasks_in_any_order() -> None:
    graph = merged(list(operator_cases.fusion_cases())[1:])
    runner = runs_as_reference(graph)
    image = random_input(graph, 3)
    rng = np.random.default_rng(0)
    for order in (lambda count: reversed(range(count)), lambda count: rng.permutation(count).tolist()):
        assert differences(graph, image, runner.run(*image, order=order)) == {}


def test_many_tensors_are_joined() -> None:
    """Two at a time, each time into a tensor of its own: of what several calls write, TVM's machine keeps the last."""
    build = Int8Builder("joined")
    sample = np.random.default_rng(0).integers(-128, 128, (1, 4, 3, 18), np.int8)
    inputs = [build.input(sample[..., :n], INPUT_QUANT) for n in range(1, 19)]
    build.concatenate(*inputs)
    graph = build.graph()
    runs_as_reference(graph)
    outputs = [call.output for call in generic.lower(graph, RISCV)]
    assert len(set(outputs)) == len(outputs) == 17


def test_kernels_are_plain() -> None:
    """Scalars and loops; neither an intrinsic of LLVM's nor a vector."""
    calls = generic.lower(merged(operator_cases.all_cases()[:20]), RISCV)
    for call in {call.symbol: call for call in calls}.values():
        text = call.build().script()
        assert "llvm" not in text
        assert not any(f"{dtype}x" in text for dtype in ("int8", "int32", "float32"))


@pytest.mark.parametrize(("target", "fused"), [(RISCV, "fmadd"), (catalog.get("avx2"), "vfmadd")], ids=["riscv", "x86"])
def test_a_scaled_sum_is_rounded_before_it_is_made_whole(target: TargetSpec, fused: str) -> None:
    """A fused multiply-add would round once where the contract rounds twice."""
    calls = generic.lower(random_operator_graph("conv", (1, 5, 7, 8), channels=4), RISCV)
    assembly = backend.compile_kernels(calls, target).mod.inspect_source("asm")
    assert "mul" in assembly
    assert fused not in assembly


def test_a_planted_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_FAR", 16.0)  # so that larger sums saturate
    with pytest.raises(AssertionError):
        runs_as_reference(random_operator_graph("conv", (1, 5, 7, 8), channels=4))


def test_processors_without_kernels_of_their_own_run_these() -> None:
    assert family_of(RISCV) == "generic"
    graph = random_operator_graph("conv", (1, 5, 7, 8))
    assert [call.symbol for call in backend.lower(graph, RISCV)] == ["convolution_5x7x8_3x5x8_k3x3_s1x1_d1x1_p0_0"]


@requires("qemu-riscv64", package="qemu-user")
def test_a_bundle_for_risc_v_is_rehearsed_here(tmp_path: Path) -> None:
    """Compiled like any other target's, for both engines; there is no LiteRT for the emulated processor."""
    bundle = write_small_bundle(tmp_path / "bundle", "generic-riscv64")
    assert not bundle.holds(f"{ROOF}/plan.bin")
    inputs, outputs = bundle.golden()
    with open_session(bundle) as session:
        assert session.placement.device == QEMU
        np.testing.assert_array_equal(session.engine.run(inputs), outputs)
    assert [contender.engine_name for contender in contenders(bundle)] == ["native"]
    with pytest.raises(EngineError, match="no LiteRT for riscv64"):
        open_session(bundle, engine="litert")


@requires("qemu-riscv64", package="qemu-user")
@pytest.mark.slow
@pytest.mark.parametrize("padding", ["keras", "timm"])
def test_small_networks_on_risc_v(padding: str, tmp_path: Path) -> None:
    same = padding == "keras"
    graph = random_xception(71 if same else 75, 0.25, 10, same_padding=same)
    emulated = EmulatedBundle(graph, backend.lower(graph, RISCV), RISCV, tmp_path)
    images = [list(random_input(graph, seed)) for seed in range(2)]
    for threads in (1, 3):
        for image, outputs in zip(images, emulated.run(images, threads=threads), strict=True):
            assert differences(graph, image, outputs) == {}


@requires("qemu-riscv64", package="qemu-user")
@pytest.mark.slow
def test_every_operator_on_risc_v(tmp_path: Path) -> None:
    graph = merged(operator_cases.all_cases())
    emulated = EmulatedBundle(graph, backend.lower(graph, RISCV), RISCV, tmp_path)
    images = list(operator_cases.images(graph))
    for image, outputs in zip(images, emulated.run(images), strict=True):
        assert differences(graph, image, outputs) == {}
