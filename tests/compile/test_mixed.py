"""Mixed graphs: layers kept in float run on both engines, and what holds of them is what is said."""

from __future__ import annotations

import subprocess
from dataclasses import replace

import numpy as np
import pytest
from support.emulated_bundle import EmulatedBundle
from support.float_graphs import drawn_images, random_xception
from support.kernel_runner import KernelRunner
from support.needs import requires
from support.small_bundle import labelled, litert_files, quantized

from xceptile.calibration.collect import collect
from xceptile.calibration.quantize import quantize
from xceptile.calibration.recipe import PRESETS, QuantRecipe, Rule
from xceptile.compile.accuracy_control import return_to_float
from xceptile.compile.backends import tflite
from xceptile.compile.kernels.mixed import int8_part, is_mixed, lower_mixed
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.compile.pipeline import build_bundle_files
from xceptile.models import graph as ir
from xceptile.models.preprocess import InputSpec
from xceptile.models.verify import verify
from xceptile.runtime import bundle as bundles
from xceptile.runtime import reference
from xceptile.runtime.engines.litert import LiteRtEngine
from xceptile.runtime.evaluate_engines import contenders, evaluate
from xceptile.runtime.plan import unpack
from xceptile.targets import catalog, host

SIZE = 40
MIXED_STEPS = 2
RECIPE = PRESETS["min-max"]
PARTS = {
    "one layer": ("blocks.0.sep0.pointwise",),
    "a block": ("blocks.1.*",),
    "the ends": ("stem.*", "classifier"),
    "everything": ("*",),
}


@pytest.fixture(scope="module")
def graph():
    return fold_input(run_passes(random_xception(SIZE), FLOAT_PASSES, verify), InputSpec(SIZE, SIZE))


@pytest.fixture(scope="module")
def table(graph):
    return collect(graph, drawn_images(6, SIZE, 1), RECIPE)


def mixed(graph, table, patterns) -> ir.Graph:
    rules = (*RECIPE.rules, *(Rule(pattern, keep_float=True) for pattern in patterns))
    made = quantize(graph, table, QuantRecipe("mixed", rules))
    verify(made)
    return made


def pixels(count: int, seed: int = 7) -> np.ndarray:
    return np.stack([(image ^ 0x80).view(np.int8) for image in drawn_images(count, SIZE, seed)])


def reference_outputs(graph: ir.Graph, x: np.ndarray) -> np.ndarray:
    return np.concatenate([reference.run(graph, image[None])[0] for image in x])


@pytest.mark.parametrize("part", [pytest.param(part, marks=pytest.mark.slow) for part in PARTS if part != "a block"])
def test_tvm_runs_mixed_graphs_within_a_step_or_two(graph, table, part):
    made = mixed(graph, table, PARTS[part])
    assert is_mixed(made)
    runner = KernelRunner(made, host.detect())
    x = pixels(4)
    seen = np.concatenate([runner.run(image[None])[0] for image in x])
    difference = np.abs(seen.astype(int) - reference_outputs(made, x))
    assert difference.max() <= MIXED_STEPS


@pytest.mark.parametrize("part", PARTS)
def test_litert_runs_mixed_graphs_within_a_step_or_two(graph, table, part):
    made = mixed(graph, table, PARTS[part])
    engine = LiteRtEngine(tflite.serialize(made))
    x = pixels(8)
    difference = np.abs(engine.run(x).astype(int) - reference_outputs(made, x))
    assert difference.max() <= MIXED_STEPS
    engine.close()


def test_every_operator_of_a_mixed_file_is_delegated(graph, table):
    engine = LiteRtEngine(tflite.serialize(mixed(graph, table, PARTS["a block"])))
    assert all(
        placement.delegated for placement in engine.placements() if not placement.op.startswith(("PAD", "CONC", "SL"))
    )


def test_the_int8_parts_of_a_mixed_network_are_exact_given_the_same_inputs(graph, table):
    """The float layers' outputs as the kernels make them, put through the reference's int8 operators."""
    made = mixed(graph, table, PARTS["a block"])
    runner = KernelRunner(made, host.detect())
    stack = pixels(4)
    seen = np.concatenate([runner.run(image[None])[0] for image in stack])
    assert np.abs(seen.astype(int) - reference_outputs(made, stack)).max() <= MIXED_STEPS
    x, logits = stack[-1], seen[-1:]
    border = {n.name: n.type.shape for n in made.nodes if isinstance(n.op, ir.Quantize)}
    feeds = {name: runner.memory[name].numpy()[: int(np.prod(shape))].reshape(shape) for name, shape in border.items()}
    part = int8_part(made)
    feeds[made.inputs[0].name] = x[None]
    values = dict(reference.iterate(part, {node.name: feeds[node.name] for node in part.inputs}))
    np.testing.assert_array_equal(values[made.outputs[0]], logits)


TIES = np.concatenate([np.arange(-300, 300) + 0.5, np.linspace(-200, 200, 1401), [1e30, -1e30]]).astype(np.float32)


@pytest.mark.parametrize(("scale", "zero_point"), [(0.5, 0), (0.1, -128), (0.0123, 37)])
def test_conversions_are_exact_on_every_engine_ties_included(scale, zero_point):
    scale = float(np.float32(scale))
    x = np.concatenate([TIES * np.float32(scale), [0]]).astype(np.float32).reshape(1, 1, -1, 4)
    kind = ir.TensorType(x.shape, "float32")
    int8 = ir.TensorType(x.shape, "int8", ir.PerTensor(scale, zero_point))
    plain = ir.Node("x", ir.Input(), (), kind, "")
    quantize_ = ir.Graph("q", (plain, ir.Node("y", ir.Quantize(), ("x",), int8, "")), {}, ("y",))
    codes = np.resize(np.arange(-128, 128, dtype=np.int8), x.shape)
    plain8 = ir.Node("x", ir.Input(), (), int8, "")
    dequantize = ir.Graph("d", (plain8, ir.Node("y", ir.Dequantize(), ("x",), kind, "")), {}, ("y",))
    for graph, value in ((quantize_, x), (dequantize, codes)):
        expected = reference.run(graph, value)[0]
        np.testing.assert_array_equal(LiteRtEngine(tflite.serialize(graph)).run_once(value)[0], expected)
        np.testing.assert_array_equal(KernelRunner(graph, host.detect()).run(value)[0], expected)
    exact = np.clip(np.rint((x * (np.float32(1) / np.float32(scale))).astype(np.float64)) + zero_point, -128, 127)
    np.testing.assert_array_equal(reference.run(quantize_, x)[0], exact)


KERNELS = {
    "conv 3x3 stride 2, padded, 5 to 19": (ir.Conv2d((2, 2), (1, 1, 1, 1), True), (19, 3, 3, 5), (7, 9)),
    "pointwise stride 2, 24 to 40": (ir.Conv2d((2, 2), (0, 0, 0, 0)), (40, 1, 1, 24), (9, 11)),
    "pointwise, 728 to 17": (ir.Conv2d((1, 1), (0, 0, 0, 0)), (17, 1, 1, 728), (8, 8)),
    "depthwise 3x3, 21": (ir.DepthwiseConv2d((1, 1), (1, 1, 1, 1), True), (3, 3, 21), (5, 6)),
    "depthwise 3x3 stride 2, SAME, 16": (ir.DepthwiseConv2d((2, 2), (0, 1, 0, 1)), (3, 3, 16), (6, 8)),
}


def single(op: ir.Conv2d | ir.DepthwiseConv2d, shape: tuple[int, ...], size: tuple[int, int]) -> ir.Graph:
    """int8 -> one float layer -> int8."""
    rng = np.random.default_rng(3)
    dense = isinstance(op, ir.Conv2d)
    kernel, inputs, outputs = (shape[1:3], shape[3], shape[0]) if dense else (shape[:2], shape[2], shape[2])
    out = tuple(
        ir.conv_output_size(n, k, s, *pads)
        for n, k, s, pads in zip(size, kernel, op.strides, (op.padding[:2], op.padding[2:]), strict=True)
    )
    weights = rng.normal(0, 1 / np.sqrt(np.prod(kernel) * (inputs if dense else 1)), shape).astype(np.float32)
    constants = {
        "w": ir.Constant(ir.TensorType(shape, "float32"), weights),
        "b": ir.Constant(ir.TensorType((outputs,), "float32"), rng.normal(0, 1, outputs).astype(np.float32)),
    }
    x = ir.TensorType((1, *size, inputs), "int8", ir.PerTensor(2.0**-5, 3))
    middle = ir.TensorType((1, *out, outputs), "float32")
    y = ir.TensorType(middle.shape, "int8", ir.PerTensor(2.0**-5, -7))
    nodes = (
        ir.Node("x", ir.Input(), (), x, ""),
        ir.Node("x.float", ir.Dequantize(), ("x",), ir.TensorType(x.shape, "float32"), ""),
        ir.Node("layer", op, ("x.float", "w", "b"), middle, ""),
        ir.Node("y", ir.Quantize(), ("layer",), y, ""),
    )
    return ir.Graph("single", nodes, constants, ("y",))


@pytest.mark.parametrize("name", KERNELS)
def test_float_kernels_at_the_edges_of_their_blocks(name):
    graph = single(*KERNELS[name])
    verify(graph)
    runner = KernelRunner(graph, host.detect())
    x = np.random.default_rng(1).integers(-128, 128, graph.inputs[0].type.shape).astype(np.int8)
    values = dict(reference.iterate(graph, {"x": x}, keep=("layer",)))
    for order in (None, lambda tasks: reversed(range(tasks))):
        runner.run(x, order=order)
        made = runner.memory["layer"].numpy().reshape(values["layer"].shape)
        np.testing.assert_allclose(made, values["layer"], rtol=0, atol=2e-5)


def test_a_float_kernel_with_a_planted_fault_is_found(graph, table, monkeypatch):
    from xceptile.compile.kernels import float_kernels

    monkeypatch.setattr(float_kernels, "_reaches_out", lambda geometry: False)  # padding read as pixels
    with pytest.raises(AssertionError):
        test_float_kernels_at_the_edges_of_their_blocks("depthwise 3x3, 21")


def test_int8_calls_of_an_all_int8_graph_are_the_family_s_own(graph, table):
    from xceptile.compile.backends import cpu as backend

    pi5 = catalog.get("raspberry-pi-5")
    plain = mixed(graph, table, ())
    assert not is_mixed(plain)
    made = mixed(graph, table, PARTS["one layer"])
    for target in (pi5, host.detect()):
        calls = backend.lower(made, target)
        assert {call.symbol.split("_")[1] for call in calls if call.symbol.startswith("f32_")} == {
            "conv",
            "quantize",
            "dequantize",
        }
        written: set[str] = {node.name for node in made.inputs}
        for call in calls:  # nothing is read before it is written
            reads = [o.name for o in call.operands if hasattr(o, "name") and o.name != call.output]
            assert set(reads) <= written, call
            written.add(call.output)
    assert lower_mixed is not None


@requires("qemu-aarch64", package="qemu-user")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("board", "instruction"), [("raspberry-pi-4", "fmla"), ("raspberry-pi-5", "fmla"), ("riscv64", "fmadd.s")]
)
def test_mixed_graphs_run_on_other_processors(graph, table, board, instruction, tmp_path):
    from xceptile.compile.backends import cpu as backend

    made, target = mixed(graph, table, PARTS["a block"]), catalog.get(board)
    bundle = EmulatedBundle(made, backend.lower(made, target), target, tmp_path)
    assert f" {instruction}" in bundle.assembly.replace("\t", " ")
    assert "fmaf" not in bundle.assembly  # no call: every fused multiply-add is an instruction
    x = pixels(3)
    seen = np.concatenate([out[0].reshape(1, -1) for out in bundle.run([[image] for image in x])])
    assert np.abs(seen.astype(int) - reference_outputs(made, x)).max() <= MIXED_STEPS


def test_a_mixed_bundle_says_what_holds(tmp_path):
    network = return_to_float(quantized(), ["blocks.0.sep0.pointwise"])
    manifest, files = litert_files(network)
    assert manifest.float_layers == ("blocks.0.sep0.pointwise",)
    assert manifest.allowed_steps == MIXED_STEPS
    bundle = bundles.write_bundle(tmp_path / "bundle", manifest, files)
    assert bundles.open_bundle(bundle.path).manifest == bundle.manifest
    (accuracy,) = evaluate(contenders(bundle), labelled(8))[0]
    assert (accuracy.allowed_steps, accuracy.keeps_contract) == (MIXED_STEPS, True)
    off = replace(accuracy, differing_values=3, largest_difference_steps=2)
    assert off.keeps_contract
    assert not off.bit_exact
    assert not replace(off, largest_difference_steps=3).keeps_contract
    assert not replace(off, allowed_steps=0).keeps_contract


@pytest.mark.slow
def test_the_self_test_of_a_mixed_bundle_allows_its_steps_and_no_more(tmp_path):
    network = return_to_float(quantized(), ["blocks.0.sep0.pointwise", "classifier"])
    manifest, files = build_bundle_files(network, host.detect(), ("native",), (), lambda what, share: None)
    expected = np.frombuffer(files[bundles.GOLDEN_OUTPUT], np.int8)

    def self_test(shift: int) -> subprocess.CompletedProcess[str]:
        moved = np.where(expected > 0, expected.astype(int) - shift, expected.astype(int) + shift).astype(np.int8)
        changed = {**files, bundles.GOLDEN_OUTPUT: moved.tobytes()}
        bundle = bundles.write_bundle(tmp_path / "bundle", manifest, changed)
        command = [str(bundle.file("native/xceptile-run")), "--self-test", str(bundle.path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    passed = self_test(0)
    assert passed.returncode == 0, passed.stderr
    assert "within 2 steps: some layers are in float" in passed.stderr
    assert self_test(5).returncode == 1
    assert unpack(files["native/plan.bin"]).tolerance == MIXED_STEPS
