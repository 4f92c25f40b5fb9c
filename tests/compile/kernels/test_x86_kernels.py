"""The x86-64 kernels, run in this process: every operator and whole networks, bit for bit as the reference."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from support import int8_graphs, operator_cases
from support.emulated_bundle import merged
from support.int8_graphs import differences
from support.kernel_runner import KernelRunner
from support.needs import requires_hardware

from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import native_runtime, relax_vm
from xceptile.compile.kernels.x86 import lower as x86
from xceptile.models import graph as ir
from xceptile.runtime import arithmetic, reference
from xceptile.runtime.engines.native import NativeEngine
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

FLAGS = Path("/proc/cpuinfo").read_text(encoding="utf-8").split()
TARGETS = [
    pytest.param(catalog.get("avx2"), id="avx2", marks=requires_hardware("avx2" in FLAGS, "AVX2")),
    pytest.param(
        catalog.get("avx512vnni"), id="avx512vnni", marks=requires_hardware("avx512_vnni" in FLAGS, "AVX512-VNNI")
    ),
]
on_every_isa = pytest.mark.parametrize("target", TARGETS)


def runs_as_reference(graph: ir.Graph, target: TargetSpec, *inputs: np.ndarray) -> KernelRunner:
    inputs = inputs or int8_graphs.random_input(graph, 3)
    runner = KernelRunner(graph, target)
    for got, expected in zip(runner.run(*inputs), reference.run(graph, *inputs), strict=True):
        np.testing.assert_array_equal(got, expected)
    return runner


def with_multiplier(graph: ir.Graph, multiplier: float) -> ir.Graph:
    """The same convolution with scales that make every output multiplier just this, a power of two."""
    node = graph.nodes[-1]
    weights, bias = (graph.constants[name] for name in node.inputs[1:])
    count = bias.data.size
    axis = weights.type.per_axis.axis
    constants = {
        node.inputs[1]: replace(weights, type=replace(weights.type, quant=ir.PerAxis((multiplier,) * count, axis))),
        node.inputs[2]: replace(bias, type=replace(bias.type, quant=ir.PerAxis((multiplier,) * count, 0))),
    }
    source = graph.nodes[0]
    source = replace(source, type=replace(source.type, quant=ir.PerTensor(1.0, source.type.per_tensor.zero_point)))
    node = replace(node, type=replace(node.type, quant=ir.PerTensor(1.0, node.type.per_tensor.zero_point)))
    return replace(graph, nodes=(source, node), constants=constants)


@on_every_isa
def test_every_operator(target: TargetSpec) -> None:
    graph = merged(operator_cases.all_cases())
    runner = KernelRunner(graph, target)
    for image in operator_cases.images(graph, 1):
        assert differences(graph, image, runner.run(*image)) == {}
    image = int8_graphs.random_input(graph, 1)
    assert differences(graph, image, runner.run(*image, order=lambda count: reversed(range(count)))) == {}


@on_every_isa
def test_the_middle_flow_shapes(target: TargetSpec) -> None:
    build = int8_graphs.Int8Builder("middle")
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 19, 19, 728), np.int8), ir.PerTensor(0.03125, 5))
    y = build.conv(build.depthwise(build.relu(x)), 728)
    graph = build.graph(build.add(x, y))
    runs_as_reference(graph, target)


@on_every_isa
def test_products_beyond_int32(target: TargetSpec) -> None:
    """All weights and pixels at the ends of their ranges, the greatest multiplier: each saturates to the right side."""
    graph = int8_graphs.random_operator_graph("conv", (1, 6, 5, 80), kernel=(3, 3), padding=(1, 1, 1, 1), channels=40)
    graph = with_multiplier(graph, 255.0)
    name = graph.nodes[-1].inputs[1]
    weights = np.full(graph.constants[name].data.shape, 127, np.int8)
    weights[::2] = -127
    graph = replace(graph, constants={**graph.constants, name: replace(graph.constants[name], data=weights)})
    runner = KernelRunner(graph, target)
    assert any(call.symbol.endswith("_wide") for call in runner.calls)
    for image in operator_cases.images(graph):
        assert differences(graph, image, runner.run(*image)) == {}


@on_every_isa
def test_flattening_copies_nothing_where_no_pixel_is_padded(target: TargetSpec) -> None:
    build = int8_graphs.Int8Builder("flattened")
    x = build.conv(build.input(np.random.default_rng(0).integers(-128, 128, (1, 2, 3, 7), np.int8)), 64)
    rows = build.fully_connected(build.reshape(x, (384,)), 9)
    pixel = build.reshape(rows, (1, 1, 9))
    graph = build.graph(x, pixel, build.conv(pixel, 5))
    runner = runs_as_reference(graph, target)
    assert not any("join" in call.symbol for call in runner.calls)


@on_every_isa
def test_add_on_all_pairs(target: TargetSpec) -> None:
    values = np.arange(-128, 128, dtype=np.int8)
    a, b = (np.ascontiguousarray(m)[None, :, :, None] for m in np.meshgrid(values, values))
    for out in (ir.PerTensor(int8_graphs.f32(0.05), 7), ir.PerTensor(int8_graphs.f32(0.31), -128)):
        graph = int8_graphs.random_operator_graph("add", a.shape, quant=out)
        runs_as_reference(graph, target, a, b)


@on_every_isa
def test_lookups_in_random_tables(target: TargetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(arithmetic.FUNCTIONS, "random_table", int8_graphs.random_table)
    for seed, shape in enumerate([(1, 2, 2, 64), (1, 19, 16, 9), (1, 700)]):
        every_value = np.arange(np.prod(shape)).astype(np.int8).reshape(shape)
        runs_as_reference(int8_graphs.table_graph(shape, seed), target, every_value)


@on_every_isa
def test_small_xception_in_any_order_of_tasks(target: TargetSpec) -> None:
    graph = int8_graphs.random_xception(71, 0.25, 10)
    inputs = int8_graphs.random_input(graph, 3)
    runner = runs_as_reference(graph, target, *inputs)
    (expected,) = reference.run(graph, *inputs)
    rng = np.random.default_rng(0)
    for order in (lambda count: reversed(range(count)), lambda count: rng.permutation(count).tolist()):
        (got,) = runner.run(*inputs, order=order)
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("target", "instruction", "absent"),
    [("avx2", "vpmaddwd", "zmm"), ("avx512vnni", "vpdpbusd", "vpmaddwd")],
)
def test_disassembly_holds_the_promised_instruction(target: str, instruction: str, absent: str) -> None:
    spec = catalog.get(target)
    graph = int8_graphs.random_operator_graph("conv", (1, 19, 19, 728), channels=728, kernel=(1, 1))
    calls = backend.lower(graph, spec)
    assembly = backend.compile_kernels(calls, spec).mod.inspect_source("asm")
    assert assembly.count(instruction) >= 12
    assert absent not in assembly


def test_equal_shapes_share_a_kernel() -> None:
    shallow, deep = (
        {call.symbol for call in backend.lower(_middle_flow(blocks), catalog.get("avx512vnni"))} for blocks in (2, 6)
    )
    assert shallow == deep


def _middle_flow(blocks: int) -> ir.Graph:
    build = int8_graphs.Int8Builder("deep")
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 5, 5, 32), np.int8), ir.PerTensor(0.03125, 5))
    x = build.requantize(x, ir.PerTensor(0.03125, -3))
    for _ in range(blocks):
        x = build.add(x, build.conv(build.depthwise(build.relu(x)), 32))
    return build.graph()


@on_every_isa
def test_a_fault_in_the_weights_is_seen(target: TargetSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is able to fail: one weight that is off by one changes an output."""
    graph = int8_graphs.random_operator_graph("conv", (1, 4, 4, 16), channels=16, kernel=(1, 1))
    honest = x86.pack_matrix

    def faulty(*args: Any) -> Any:
        packed = honest(*args)
        packed[0] += -1 if packed[0] > 0 else 1
        return packed

    monkeypatch.setattr(x86, "pack_matrix", faulty)
    with pytest.raises(AssertionError):
        runs_as_reference(graph, target)


def test_unsupported_is_refused_by_name() -> None:
    spec = replace(catalog.get("avx2"), features=("sse2",))
    with pytest.raises(ValueError, match="avx2"):
        backend.lower(int8_graphs.random_operator_graph("relu", (1, 3, 3, 8)), spec)


def _joined_tensors() -> ir.Graph:
    """More tensors than one call takes, joined where TVM's machine has several blocks of memory to choose from."""
    build = int8_graphs.Int8Builder("joined")
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 3, 2, 7), np.int8))
    first = build.relu(build.concatenate(*[x] * 20))
    kept = build.add(first, build.relu(first))
    build.add(build.concatenate(*[x] * 20), kept)
    return build.graph()


@on_every_isa
@pytest.mark.parametrize(
    "graph", [int8_graphs.random_xception(71, 0.25, 10), _joined_tensors()], ids=lambda graph: graph.name
)
def test_relax_vm_gives_the_same_outputs(target: TargetSpec, graph: ir.Graph, tmp_path: Path) -> None:
    path = tmp_path / "network.so"
    path.write_bytes(relax_vm.build(graph, target))
    machine = tvm.relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    inputs = int8_graphs.random_input(graph, 3)
    got = machine["main"](*map(tvm.runtime.tensor, inputs)).numpy()
    np.testing.assert_array_equal(got, reference.run(graph, *inputs)[0])


@on_every_isa
def test_the_whole_network_in_the_native_runtime(target: TargetSpec, tmp_path: Path) -> None:
    graph = int8_graphs.random_xception()
    for name, data in (backend.build_files(graph, target) | native_runtime.build(target)).items():
        (tmp_path / name).write_bytes(data)
    (x,) = int8_graphs.random_input(graph, 3)
    with NativeEngine(tmp_path, 2) as engine:
        np.testing.assert_array_equal(engine.run(x), reference.run(graph, x)[0])
