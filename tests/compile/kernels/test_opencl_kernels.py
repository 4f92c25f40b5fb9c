"""The OpenCL kernels on whatever OpenCL device there is, PoCL as a rule: every operator and whole networks, int8 bit
for bit as the reference. Without cl_khr_fp16 the float16 kernels multiply in float: there, float stands in for half."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import int8_graphs, operator_cases
from support.emulated_bundle import merged
from support.int8_graphs import (
    Int8Builder,
    f32,
    photo,
    random_input,
    random_operator_graph,
    random_table,
    random_xception,
    table_graph,
)
from support.needs import requires, requires_module, requires_pocl
from support.opencl_runner import OpenclRunner
from support.tree import TEST_SOURCES

from xceptile.compile.backends import native_runtime
from xceptile.compile.backends import opencl as backend
from xceptile.compile.kernels.kernel_call import KernelCall, Weights
from xceptile.compile.kernels.opencl import lower as opencl
from xceptile.compile.kernels.opencl import shapes as opencl_shapes
from xceptile.compile.kernels.opencl.element import INT8
from xceptile.compile.passes.take_int8_pixels import take_int8_pixels
from xceptile.models import graph as ir
from xceptile.runtime import arithmetic, reference
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.plan import ITEM_BYTES, unpack
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

ADRENO, MALI, POWERVR = (catalog.get(name) for name in ("adreno-740", "mali-g710", "powervr-ge8320"))
pocl = requires_pocl()
pyopencl = requires_module("pyopencl", package="pyopencl")

LEAST_SQNR_DB = 50.0  # of the float16 networks to the float reference; 58 is what the whole Xception has
LACKING = ("multiply", "gate", "concatenate", "resize", "reshape", "dilation")  # no OpenCL kernels yet


def assert_as_reference(runner: OpenclRunner, *inputs: np.ndarray) -> None:
    assert int8_graphs.differences(runner.graph, inputs, runner.run(*inputs)) == {}


def runs_as_reference(graph: ir.Graph, target: TargetSpec, *options: str, prelude: str = "") -> None:
    assert_as_reference(OpenclRunner(graph, target, options, prelude), *random_input(graph, 3))


def sqnr_db(graph: ir.Graph, inputs: tuple[np.ndarray, ...], outputs: tuple[np.ndarray, ...]) -> list[float]:
    """Of every output to the float reference's."""
    pairs = zip(reference.run(graph, *inputs), outputs, strict=True)
    powers = [(np.square(e, dtype=np.float64).sum(), np.square(e - o, dtype=np.float64).sum()) for e, o in pairs]
    return [10 * float(np.log10(signal / max(noise, 1e-30))) for signal, noise in powers]


# Operators.


@pocl
@pyopencl
@pytest.mark.parametrize(
    ("target", "batch"),
    [
        pytest.param(ADRENO, 1, id="adreno"),
        pytest.param(MALI, 2, id="mali", marks=pytest.mark.slow),
        pytest.param(POWERVR, 1, id="powervr", marks=pytest.mark.slow),
    ],
)
def test_every_operator_case(target: TargetSpec, batch: int) -> None:
    graph = merged(operator_cases.all_cases(batch, lacking=LACKING))
    runner = OpenclRunner(graph, target)
    for inputs in operator_cases.images(graph, 1):
        assert_as_reference(runner, *inputs)


@pytest.mark.parametrize("kind", [*LACKING[:-1], "depthwise"])
def test_what_is_lacking_is_refused_by_name(kind: str) -> None:
    dilated = {"dilation": (2, 2)} if kind == "depthwise" else {}
    graph = random_operator_graph(kind, (1, 6, 5, 8), size=(3, 3), **dilated)
    with pytest.raises(ir.GraphError, match=graph.nodes[-1].name):
        opencl.lower(graph, ADRENO)


@pocl
@pyopencl
def test_every_operator_in_float16() -> None:
    """Inputs, weights and outputs are rounded to half once: some 70 dB."""
    cases = [c for c in operator_cases.CASES if c.kind not in (*LACKING, "lookup") and "dilation" not in c.options]
    int8 = merged([c.graph(seed=seed) for seed, c in enumerate(cases) if "quant" not in c.options][::5])
    graph = take_int8_pixels(int8_graphs.as_float(int8), int8_graphs.INPUT_QUANT)
    inputs = random_input(graph, 3)
    found = sqnr_db(graph, inputs, OpenclRunner(graph, MALI).run(*inputs))
    assert min(found) > 60, dict(zip(graph.outputs, found, strict=True))


@pocl
@pyopencl
def test_ties_round_to_even() -> None:
    runs_as_reference(merged(list(operator_cases.tie_cases())), ADRENO)


@pocl
@pyopencl
def test_a_rounding_away_from_zero_is_seen() -> None:
    """The comparison is able to fail."""
    with pytest.raises(AssertionError):
        runs_as_reference(next(operator_cases.tie_cases()), ADRENO, prelude="#define rint round\n")


@pocl
@pyopencl
def test_extremes() -> None:
    """All weights and pixels at the ends of their ranges; products beyond int32 saturate to the right side."""

    def extreme(kind: str, multiplier: float) -> ir.Graph:
        graph = random_operator_graph(kind, (1, 4, 5, 17), kernel=(3, 3), padding=(1, 1, 1, 1), channels=17)
        node = graph.nodes[-1]
        weights, bias = (graph.constants[name] for name in node.inputs[1:])
        scales = ir.PerAxis((multiplier,) * 17, weights.type.per_axis.axis)
        signs = np.where(weights.data > 0, 127, -127).astype(np.int8)
        constants = {
            node.inputs[1]: ir.Constant(replace(weights.type, quant=scales), signs),
            node.inputs[2]: ir.Constant(replace(bias.type, quant=ir.PerAxis((multiplier,) * 17, 0)), bias.data),
        }
        source = graph.nodes[0]
        source = replace(source, type=replace(source.type, quant=ir.PerTensor(1.0, source.type.per_tensor.zero_point)))
        node = replace(node, type=replace(node.type, quant=ir.PerTensor(1.0, node.type.per_tensor.zero_point)))
        return replace(graph, nodes=(source, node), constants=constants)

    graph = merged([extreme(kind, m) for kind in ("conv", "depthwise") for m in (2.0**-20, 1.0, 255.0)])
    runner = OpenclRunner(graph, ADRENO)
    shapes = [node.type.shape for node in graph.inputs]
    for value in (-128, 127):
        assert_as_reference(runner, *(np.full(shape, value, np.int8) for shape in shapes))
    rng = np.random.default_rng(0)
    assert_as_reference(runner, *(rng.choice(np.array([-128, 127], np.int8), shape) for shape in shapes))


@pocl
@pyopencl
def test_add_on_all_pairs() -> None:
    values = np.arange(-128, 128, dtype=np.int8)
    a, b = (np.ascontiguousarray(m)[None, :, :, None] for m in np.meshgrid(values, values))
    outs = (ir.PerTensor(f32(0.05), 7), ir.PerTensor(f32(0.31), -128))
    graph = merged([random_operator_graph("add", a.shape, quant=out) for out in outs])
    assert_as_reference(OpenclRunner(graph, ADRENO), a, b, a, b)


@pocl
@pyopencl
def test_lookups_in_random_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every byte, and vectors with channels that are not there."""
    monkeypatch.setitem(arithmetic.FUNCTIONS, "random_table", random_table)
    shapes = [(1, 4, 5, 16), (2, 19, 16, 9), (1, 3)]
    graph = merged([table_graph(shape, seed) for seed, shape in enumerate(shapes)])
    assert_as_reference(
        OpenclRunner(graph, ADRENO), *(np.arange(np.prod(s)).astype(np.int8).reshape(s) for s in shapes)
    )


# What shares a kernel.


def block(batch: int = 1) -> ir.Graph:
    """A stem, a residual block that halves the map, one that keeps it, and a classifier."""
    build = Int8Builder("block")
    x = build.input(np.concatenate([photo(23, 21, seed) for seed in range(batch)]), name="image")
    x = build.conv(x, 24, (3, 3), (2, 2), relu=True)
    y = build.conv(build.depthwise(build.relu(x)), 40, relu=True)
    y = build.max_pool(build.conv(build.depthwise(y), 40))
    x = build.add(y, build.conv(x, 40, strides=(2, 2)))
    x = build.add(x, build.conv(build.depthwise(build.relu(x)), 40), relu=True)
    build.fully_connected(build.average_pool(x), 10)
    return build.graph()


def test_fusions() -> None:
    kinds = [re.split("_int8", call.symbol)[0] for call in opencl.lower(block(), ADRENO)]
    assert kinds == [
        *("conv_plain", "relu_depthwise", "conv", "depthwise", "conv", "maxpool", "conv_add"),
        *("relu_depthwise", "conv_add", "mean", "linear_plain"),
    ]


@pocl
@pyopencl
def test_what_is_read_twice_is_not_fused_away() -> None:
    """A ReLU for a convolution and a depthwise one; a sum of two convolutions; a convolution that is also an output."""
    build = Int8Builder("shared")
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 5, 6, 9), np.int8))
    y = build.relu(x)
    a, b = build.conv(y, 20), build.conv(build.depthwise(y), 20)
    c = build.add(a, b)
    d = build.add(build.conv(c, 20), c)
    e = build.add(d, d)
    runs_as_reference(build.graph(b, c, d, e, y), ADRENO)


@pocl
@pyopencl
@pytest.mark.parametrize("dot", range(4))
def test_every_dot_product_gives_the_same(dot: int) -> None:
    """Two images. What PoCL lacks is defined as its extension's specification does: Qualcomm's multiplies signed by
    unsigned bytes and saturates (Adreno OpenCL SDK, example qcom_dot_product8)."""
    builtins = {
        1: "int dot_4x8packed_ss_int(uint a, uint b) { SUM(char, char); return s; }",
        2: "int arm_dot_acc(char4 p, char4 q, int acc) { uint a = as_uint(p), b = as_uint(q); SUM(char, char); "
        "return acc + s; }",
        3: "int qcom_dot8_acc(uint a, uint b, int acc) { SUM(char, uchar); return add_sat(acc, s); }",
    }
    loop = "for (int i = 0; i < 32; i += 8) s += (int)(A)(a >> i) * (int)(B)(b >> i)"
    prelude = f"#define SUM(A, B) int s = 0; {loop}\n{builtins[dot]}\n" if dot else ""
    build = Int8Builder("products")
    x = build.input(np.concatenate([photo(9, 8, seed) for seed in range(2)]))
    x = build.conv(build.conv(x, 24, (3, 3), (2, 2), relu=True), 20)
    build.fully_connected(build.average_pool(x), 10)
    runs_as_reference(build.graph(), POWERVR, f"-DXCT_DOT={dot}", prelude=prelude)


@pocl
@pyopencl
def test_channels_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache that holds two of three tiles of weights: the fourth tile is not there, and its groups do nothing."""
    monkeypatch.setitem(opencl_shapes.CACHE_BYTES, "powervr", 7000)
    graph = random_operator_graph("conv", (1, 12, 13, 40), kernel=(1, 1), channels=96)
    (call,) = (call for call in opencl.lower(graph, POWERVR) if call.symbol.startswith("conv"))
    assert call.symbol.endswith("_c2")
    assert call.launch.groups == (3 * 2, 2, 1)
    runs_as_reference(graph, POWERVR)


@requires("clang", package="clang")
@pytest.mark.parametrize(
    ("standard", "options", "extensions", "prelude"),
    [
        ("CL1.2", "", "+cl_khr_fp16", ""),
        ("CL3.0", "-DXCT_DOT=1", "+cl_khr_integer_dot_product,+__opencl_c_integer_dot_product_input_4x8bit_packed", ""),
        ("CL1.2", "-DXCT_DOT=2", "+cl_arm_integer_dot_product_accumulate_int8", ""),
        ("CL2.0", "-DXCT_DOT=3", "+cl_khr_fp16", "int qcom_dot8_acc(uint p0, uint p1, int acc);\n"),
        ("CL1.2", "-DXCT_FP16=1", "+cl_khr_fp16", ""),
    ],
    ids=["plain", "khr", "arm", "qcom", "fp16"],
)
def test_the_source_compiles_with_the_real_extensions(
    standard: str, options: str, extensions: str, prelude: str
) -> None:
    """Clang knows Khronos's and Arm's functions and half arithmetic, which no device here has; not Qualcomm's. Clang
    14 declares vload_half only beside cl_khr_fp16, against OpenCL C 1.2, 6.12.7."""
    float_graph = take_int8_pixels(int8_graphs.as_float(block()), int8_graphs.PIXELS)
    calls = [*opencl.lower(block(), ADRENO), *opencl.lower(float_graph, MALI)]
    command = ["clang", "-x", "cl", f"-cl-std={standard}", "-target", "spir64", "-Xclang", "-finclude-default-header"]
    command += ["-Xclang", f"-cl-ext={extensions}", "-Werror", "-Wno-ignored-pragmas", "-fsyntax-only", "-"]
    source = prelude + backend.generate(calls)
    done = subprocess.run([*command, *options.split()], input=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:2000]


@requires("clang", package="clang")
@requires("qemu-aarch64", package="qemu-user")
def test_half_arithmetic_bit_for_bit(tmp_path: Path) -> None:
    """What no OpenCL device here has: the preamble with -DXCT_FP16=1, as code of an Arm processor with half arithmetic.

    A product is rounded to half once, every further one is fused into the sum, and sums of eight go on in float.
    """
    (tmp_path / "probe.cl").write_text(backend.PREAMBLE.read_text() + (TEST_SOURCES / "half_probe.cl").read_text())
    clang = ["clang", "-x", "cl", "-cl-std=CL3.0", "-target", "aarch64-linux-gnu", "-march=armv8.2-a+fp16", "-O1"]
    clang += ["-Xclang", "-finclude-default-header", "-Xclang"]
    clang += ["-cl-ext=+cl_khr_fp16,+__opencl_c_generic_address_space", "-DXCT_FP16=1", "-c", "-o", "probe.o"]
    subprocess.run([*clang, "probe.cl"], cwd=tmp_path, check=True, capture_output=True)
    link = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.17", "-o", "probe"]
    subprocess.run([*link, str(TEST_SOURCES / "half_probe.c"), "probe.o"], cwd=tmp_path, check=True)
    rng = np.random.default_rng(0)
    x = rng.normal(0, 4, (64, 8)).astype(np.float16)
    w = rng.normal(0, 1, (64, 4, 4, 2)).astype(np.float16)  # word, channel, half
    command = ["qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu", str(tmp_path / "probe")]
    out = subprocess.run(command, input=x.tobytes() + w.tobytes(), check=True, capture_output=True).stdout
    sums, plain = np.frombuffer(out[: 2 * 64 * 16], np.float32).reshape(2, 64, 4)
    tripled = np.frombuffer(out[2 * 64 * 16 :], np.float16).reshape(64, 8)
    a, b = x.astype(np.float64), w.transpose(0, 1, 3, 2).reshape(64, 8, 4).astype(np.float64)
    total = np.zeros((64, 4))
    for i in range(8):
        total = (total + a[:, i, None] * b[:, i]).astype(np.float16).astype(np.float64)
    np.testing.assert_array_equal(sums, np.float32(0.5) + total.astype(np.float32))
    pair = (a[:, :2, None] * b[:, :2]).astype(np.float16)
    np.testing.assert_array_equal(plain, np.float32(0.5) + (pair[:, 0] + pair[:, 1]).astype(np.float32))
    np.testing.assert_array_equal(tripled, (x.astype(np.float32) * np.float32(3)).astype(np.float16))


@pocl
@pyopencl
def test_a_fault_in_the_weights_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison is able to fail: one weight that is off by one changes an output."""
    honest = opencl.pack_weights

    def faulty(*args: Any) -> Any:
        packed = honest(*args).copy()
        packed[0] += -1 if packed[0] > 0 else 1
        return packed

    monkeypatch.setattr(opencl, "pack_weights", faulty)
    with pytest.raises(AssertionError):
        runs_as_reference(random_operator_graph("conv", (1, 4, 4, 16), channels=16, kernel=(1, 1)), ADRENO)


# Whole networks.


def run_natively(graph: ir.Graph, target: TargetSpec, folder: Path, x: np.ndarray) -> np.ndarray:
    """In the native runtime, on a processor if need be."""
    for name, data in (backend.build_files(graph, target) | native_runtime.build_rehearsal()).items():
        (folder / name).write_bytes(data)
    with NativeEngine(folder, require_device="any") as engine:
        return engine.run(x)


@pocl
def test_a_small_xception_in_the_native_runtime(tmp_path: Path) -> None:
    graph = random_xception(71, 0.125, 10)
    x = photo(71, 71, 1)
    np.testing.assert_array_equal(run_natively(graph, MALI, tmp_path, x), reference.run(graph, x)[0])


@pocl
def test_a_float16_build_in_the_native_runtime(tmp_path: Path) -> None:
    graph = take_int8_pixels(int8_graphs.as_float(block()), int8_graphs.PIXELS)
    x = photo(23, 21, 1)
    assert sqnr_db(graph, (x,), (run_natively(graph, ADRENO, tmp_path, x),))[0] > LEAST_SQNR_DB


@pocl
@pytest.mark.slow
def test_both_builds_of_the_whole_network_in_the_native_runtime(tmp_path: Path) -> None:
    graph = random_xception()
    real = take_int8_pixels(int8_graphs.as_float(graph), int8_graphs.PIXELS)
    x = photo(299, 299, 1)
    for name in ("int8", "float16"):
        (tmp_path / name).mkdir()
    np.testing.assert_array_equal(run_natively(graph, ADRENO, tmp_path / "int8", x), reference.run(graph, x)[0])
    assert sqnr_db(real, (x,), (run_natively(real, ADRENO, tmp_path / "float16", x),))[0] > LEAST_SQNR_DB


class _ShapesOnly(Int8Builder):
    """Makes the graph without computing its tensors; weights are zero."""

    def _append(
        self, base: str, op: ir.Op, inputs: tuple[str, ...], shape: tuple[int, ...], quant: ir.PerTensor, path: str
    ) -> str:
        name = self._name(base)
        self.nodes.append(ir.Node(name, op, inputs, ir.TensorType(shape, "int8", quant), path))
        self.values[name] = np.broadcast_to(np.int8(0), shape)
        return name

    def real(self, name: str) -> np.ndarray:
        return np.broadcast_to(np.float32(0), self.values[name].shape)

    def _weighted(
        self,
        base: str,
        op: ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected,
        x: str,
        weights: np.ndarray,
        axis: int,
        *_: object,
    ) -> str:
        channels, name, shape = weights.shape[axis], self._name(base), self.values[x].shape
        if not isinstance(op, ir.FullyConnected):
            kernel = weights.shape[1:3] if axis == 0 else weights.shape[:2]
            sizes = zip(shape[1:3], kernel, op.strides, (op.padding[:2], op.padding[2:]), strict=True)
            shape = (1, *(ir.conv_output_size(size, k, s, *pads) for size, k, s, pads in sizes), 0)
        for key, dims, dtype, along in (("weight", weights.shape, "int8", axis), ("bias", (channels,), "int32", 0)):
            kind = ir.TensorType(dims, dtype, ir.PerAxis((2.0**-7,) * channels, along))
            self.constants[f"{name}.{key}"] = ir.Constant(kind, np.zeros(dims, dtype))
        inputs = (x, f"{name}.weight", f"{name}.bias")
        return self._append(base, op, inputs, (*shape[:-1], channels), ir.PerTensor(2.0**-5, 0), "")


@pytest.fixture(scope="module")
def xception() -> ir.Graph:
    """The 299x299 network's shapes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8_graphs, "Int8Builder", _ShapesOnly)
        patch.setattr(int8_graphs, "covering", lambda values: ir.PerTensor(2.0**-5, 0))
        return int8_graphs.random_xception()


def distinct_bytes(call: KernelCall) -> int:
    """Of a launch's inputs, weights and outputs, each counted once."""
    return sum(o.data.nbytes if isinstance(o, Weights) else o.count * ITEM_BYTES[o.dtype] for o in call.operands)


def over_goal(calls: tuple[KernelCall, ...]) -> dict[str, float]:
    """The launches that move more than 1.15 times their distinct bytes, and how often they do."""
    ratios = {call.name: call.traffic_bytes / distinct_bytes(call) for call in calls}
    return {name: round(ratio, 2) for name, ratio in ratios.items() if ratio > 1.15}


@pytest.mark.parametrize("target", [ADRENO, MALI], ids=["adreno", "mali"])
def test_launches(xception: ir.Graph, target: TargetSpec) -> None:
    calls = opencl.lower(xception, target)
    assert len(calls) == 80
    assert len({call.symbol for call in calls}) == 33


def test_memory_traffic(xception: ir.Graph) -> None:
    assert over_goal(opencl.lower(xception, ADRENO)) == {}


def test_memory_traffic_with_half_a_megabyte_of_cache(xception: ir.Graph) -> None:
    """On the 37x37 map the weights of 728 channels and the pixels are each larger, so the pixels pass twice."""
    calls = opencl.lower(xception, MALI)
    assert sum(call.traffic_bytes for call in calls) == 104_325_555
    assert over_goal(calls) == {"conv_9": 1.39}


def test_traffic_without_a_cache(xception: ir.Graph) -> None:
    """What groups ask of the caches is more: products load each operand once for each tile of the other."""
    calls = opencl.lower(xception, ADRENO)
    asked, distinct = sum(call.requested_bytes for call in calls), sum(map(distinct_bytes, calls))
    assert round(asked / distinct, 2) == 3.26
    others = [call for call in calls if not call.symbol.startswith("conv")]
    assert all(call.requested_bytes <= 1.15 * distinct_bytes(call) for call in others)


@pytest.mark.parametrize("target", [ADRENO, MALI, POWERVR], ids=["adreno", "mali", "powervr"])
def test_shapes_fit_the_gpu(xception: ir.Graph, target: TargetSpec) -> None:
    assert target.gpu is not None
    for call in opencl.lower(xception, target):
        kernel = call.build.__self__  # type: ignore[attr-defined]  # a kernel's bound method
        assert getattr(kernel, "local_bytes", 0) <= target.gpu.local_memory_bytes // 2
        x, y, z = call.launch.group_size
        assert x * y * z <= 256
        assert re.fullmatch("[a-z0-9_]{1,120}", call.symbol)
    if target is MALI:
        products = [call for call in opencl.lower(xception, target) if call.symbol.startswith("conv_int8")]
        assert all(call.build.__self__.local_bytes == 0 for call in products)  # type: ignore[attr-defined]


def test_too_little_local_memory_is_refused() -> None:
    assert ADRENO.gpu is not None
    with pytest.raises(ValueError, match="local memory"):
        opencl_shapes.check_local_memory(replace(ADRENO.gpu, local_memory_bytes=64), INT8, 65, "conv_0")


# Files and refusals.


def test_files_of_both_builds() -> None:
    int8 = block()
    plan = unpack(backend.build_files(int8, ADRENO)["plan.bin"])
    assert plan.engine == "opencl"
    assert [t.dtype for t in plan.tensors] == ["int8", "int8"]
    real = take_int8_pixels(int8_graphs.as_float(int8), int8_graphs.PIXELS)
    files = backend.build_files(real, ADRENO)
    plan = unpack(files["plan.bin"])
    image, logits = plan.tensors
    assert (image.name, image.dtype, image.scale, image.zero_point) == ("image", "int8", 1.0, -128)
    assert (logits.dtype, logits.scale) == ("float32", 0.0)
    for step in plan.steps:
        assert step.launch is not None
        size = "{}, {}, {}".format(*step.launch.group_size)
        head = f"__kernel __attribute__((reqd_work_group_size({size}))) void {step.kernel}("
        assert head.encode() in files["kernels.cl"]


def test_unsupported_is_refused_by_name() -> None:
    graph = random_operator_graph("relu", (1, 3, 3, 8))
    with pytest.raises(ValueError, match="engine is cpu"):
        opencl.lower(graph, catalog.get("avx2"))
    real = int8_graphs.as_float(graph)
    with pytest.raises(ir.GraphError, match="int8 pixels"):
        opencl.lower(real, ADRENO)
    mixed = replace(graph, nodes=(graph.nodes[0], replace(real.nodes[1], op=ir.Dequantize())))
    mixed = replace(mixed, nodes=(*mixed.nodes, replace(graph.nodes[1], name="again", inputs=("relu_0",))))
    with pytest.raises(ir.GraphError, match="mixed"):
        opencl.lower(replace(mixed, outputs=("again",)), ADRENO)
