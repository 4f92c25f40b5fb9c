"""LiteRT's own Arm code under qemu: bit for bit as the reference on every kind of core, or a reason it cannot run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.int8_graphs import (
    Int8Builder,
    all_outputs,
    differences,
    f32,
    photo,
    random_input,
    random_xception,
    tie_graph,
)
from support.tree import ROOT

from xceptile.calibration.quantize import tie_free_params
from xceptile.compile.backends.tflite import serialize
from xceptile.models import graph as ir
from xceptile.runtime.devices import qemu, qemu_root
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.engines.litert_qemu import LiteRtQemuEngine

CPUS = ("cortex-a53", "cortex-a72", "cortex-a76", "neoverse-n1", "max,sme=off")  # plain, plain, dotprod, dotprod, i8mm


@pytest.fixture(scope="module")
def root() -> Path:
    try:
        qemu.emulator("aarch64")
        return qemu_root.ensure()
    except EngineError as error:
        pytest.skip(str(error))


def every_operator() -> ir.Graph:
    """One graph with every operator, many widths, paddings and roundings, from one input of all kinds of bytes."""
    build = Int8Builder("every_operator")
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 9, 12, 15), np.int8), ir.PerTensor(f32(0.02), 5))
    for channels in (1, 2, 3, 7, 8, 15, 16, 728):
        y = build.conv(x, channels, relu=channels % 2 == 0)
        z = build.depthwise(y, strides=(1, 2), padding=(1, 0, 0, 2), relu=channels == 7)
        build.conv(z, 9, (3, 3), (2, 2), (1, 1, 1, 1))
        build.add(y, build.conv(x, channels), relu=channels == 16)
        build.max_pool(build.relu(y), padding=(1, 1, 1, 1))
        build.requantize(y, ir.PerTensor(f32(0.031), -9))
        build.fully_connected(build.average_pool(z), 11)
    return all_outputs(build.graph())


def every_mean() -> ir.Graph:
    """Means of a 3x3 map, over several parameters, whose channels hold every attainable sum."""
    source = ir.PerTensor(f32(0.0235), 17)
    x = ir.Node("x", ir.Input(), (), ir.TensorType((1, 3, 3, 2296), "int8", source))
    rng = np.random.default_rng(1)
    means = []
    for index in range(40):
        wanted = ir.PerTensor(f32(source.scale * np.exp(rng.uniform(-2, 0.5))), int(rng.integers(-128, 128)))
        quant = tie_free_params(source, wanted, 9)
        means.append(ir.Node(f"mean_{index}", ir.GlobalAveragePool(), ("x",), ir.TensorType((1, 2296), "int8", quant)))
    return ir.Graph("every_mean", (x, *means), {}, tuple(node.name for node in means))


@pytest.mark.parametrize("cpu", CPUS)
def test_operators(root: Path, cpu: str) -> None:
    graph = every_operator()
    x = np.concatenate([random_input(graph, seed)[0] for seed in range(3)])
    x[0], x[1, ::2] = -128, 127
    outputs = LiteRtQemuEngine(serialize(graph), cpu, threads=2).run_all(x)
    for i in range(3):
        assert differences(graph, (x[i : i + 1],), [y[i : i + 1] for y in outputs]) == {}


def exact_halves() -> ir.Graph:
    """Operators whose accumulators often land on an exact half, side by side on one input."""
    nodes: list[ir.Node] = []
    constants: dict[str, ir.Constant] = {}
    for kind in ("conv", "depthwise", "requantize"):
        graph = tie_graph(kind, (1, 16, 16, 15), zero_point=-3)
        nodes[:1] = graph.inputs
        (last,) = graph.outputs
        inputs = tuple(name if name == "x" else f"{kind}.{name}" for name in graph.node(last).inputs)
        nodes.append(replace(graph.node(last), name=kind, inputs=inputs))
        constants |= {f"{kind}.{name}": constant for name, constant in graph.constants.items()}
    return all_outputs(ir.Graph("exact_halves", tuple(nodes), constants, ()))


@pytest.mark.parametrize("cpu", ["cortex-a53", "max,sme=off"])
def test_exact_halves(root: Path, cpu: str) -> None:
    graph = exact_halves()
    (x,) = random_input(graph)
    assert differences(graph, (x,), LiteRtQemuEngine(serialize(graph), cpu).run_all(x)) == {}


@pytest.mark.parametrize("cpu", ["cortex-a53", "max,sme=off"])
def test_mean_of_every_attainable_sum(root: Path, cpu: str) -> None:
    sums = np.arange(2296)
    x = (np.clip(sums[None, :] - 255 * np.arange(9)[:, None], 0, 255) - 128).astype(np.int8).reshape(1, 3, 3, 2296)
    graph = every_mean()
    assert differences(graph, (x,), LiteRtQemuEngine(serialize(graph), cpu).run_all(x)) == {}


@pytest.mark.parametrize("cpu", ["cortex-a53", "cortex-a76"])
def test_every_tensor_of_a_small_xception(root: Path, cpu: str) -> None:
    graph = all_outputs(random_xception(96, 0.25, 20))
    x = np.concatenate([photo(96, 96, seed) for seed in range(2)])
    engine = LiteRtQemuEngine(serialize(graph), cpu)
    outputs = engine.run_all(x)
    for i in range(2):
        assert differences(graph, (x[i : i + 1],), [y[i : i + 1] for y in outputs]) == {}
    assert engine.name == "litert"


@pytest.mark.slow
def test_every_tensor_of_xception_at_full_size(root: Path) -> None:
    graph, x = all_outputs(random_xception(299)), photo(299, 299, seed=5)
    assert differences(graph, (x,), LiteRtQemuEngine(serialize(graph), "cortex-a76", 2).run_all(x)) == {}


def test_a_time_is_refused(root: Path) -> None:
    with pytest.raises(EngineError, match="a rehearsal: its outputs count, its time does not"):
        LiteRtQemuEngine(b"", "cortex-a53").time_ms(np.zeros((1, 2, 2, 3), np.int8), 1, 0)


def test_a_broken_file_is_refused(root: Path) -> None:
    with pytest.raises(EngineError, match=r"under qemu \(cortex-a53\) ended with status 1: .*"):
        LiteRtQemuEngine(b"not a model", "cortex-a53").run(np.zeros((1, 2, 2, 3), np.int8))


def test_the_root_folder_is_built_once(root: Path) -> None:
    before = root.stat().st_mtime_ns
    assert qemu_root.ensure() == root
    assert root.stat().st_mtime_ns == before
    assert qemu_root.python(root).name.startswith("python3.")


# What needs neither qemu nor a network


@pytest.mark.parametrize(("cpu", "part"), [("cortex-a53", "0xd03"), ("cortex-a76", "0xd0b"), ("max,sme=off", "0x051")])
def test_cpuinfo_has_arms_form(cpu: str, part: str) -> None:
    text = qemu_root.cpuinfo(cpu, 2)
    assert text.count("processor\t: ") == 2
    assert text.count(f"CPU part\t: {part}\n") == 2
    assert ("asimddp" in text) == (cpu != "cortex-a53")


def test_the_emulated_litert_is_the_pinned_one() -> None:
    constraints = ROOT / ".ci" / "constraints.txt"
    assert qemu_root.LITERT in constraints.read_text().splitlines()


def test_a_missing_emulator_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="qemu-aarch64 is not installed: apt install qemu-user"):
        LiteRtQemuEngine(b"", "cortex-a53")


def test_a_missing_apt_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="built with apt-get of Debian or Ubuntu: not found"):
        qemu_root.ensure(tmp_path / "cache")


def test_a_failing_fetch_is_told_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("apt-get", "dpkg-deb"):
        program = tmp_path / name
        program.write_text("#!/bin/sh\necho 'E: no route to host' >&2\nexit 100\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(EngineError, match="fetching the list of arm64 packages failed: E: no route to host"):
        qemu_root.ensure(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="cannot write its root folder"):
        qemu_root.ensure(tmp_path / "file")
