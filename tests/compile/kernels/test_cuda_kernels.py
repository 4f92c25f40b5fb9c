"""The CUDA kernels without a GPU. NVRTC compiles them for every Jetson; the same source runs on this machine's
processor, instructions of tensor cores included (``cuda_on_cpu.h``), and equals the reference bit for bit."""

from __future__ import annotations

import json
import platform
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from benchmarks import make_gpu_kit
from support import operator_cases
from support.cuda_emulator import EmulatedNetwork, Traffic, emulated
from support.emulated_bundle import merged
from support.int8_graphs import (
    PIXELS,
    Int8Builder,
    all_outputs,
    as_float,
    differences,
    photo,
    random_input,
    random_operator_graph,
    random_xception,
)
from support.needs import requires_hardware

from xceptile.compile.backends import cuda as backend
from xceptile.compile.backends import nvrtc
from xceptile.compile.cuda_devices import cuda_devices
from xceptile.compile.gpu_kit import borrowed_gpu
from xceptile.compile.kernels.cuda import cost as cuda_cost
from xceptile.compile.kernels.cuda import gemm as cuda_gemm
from xceptile.compile.kernels.cuda import lower as family
from xceptile.compile.kernels.cuda import slice_layout
from xceptile.compile.kernels.cuda.window import WindowLayout
from xceptile.compile.passes.take_int8_pixels import take_int8_pixels
from xceptile.models import graph as ir
from xceptile.runtime import reference
from xceptile.runtime.plan import unpack
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

TARGETS = {name: catalog.get(f"jetson-{name}") for name in ("nano", "tx2", "xavier", "orin")}
EXTREMES = (-128, 127)


def some_slow(*quick: str) -> list[object]:
    """Every board, those that are not ``quick`` marked as slow: they differ in little that other tests do not see."""
    return [board if board in quick else pytest.param(board, marks=pytest.mark.slow) for board in TARGETS]


@pytest.fixture(scope="module", params=TARGETS)
def target(request: pytest.FixtureRequest) -> TargetSpec:
    return TARGETS[request.param]


@pytest.fixture(scope="module")
def operators(target: TargetSpec, tmp_path_factory: pytest.TempPathFactory) -> EmulatedNetwork:
    graphs = operator_cases.all_cases()
    if target is not TARGETS["orin"]:  # the kernels without products are the same for every architecture
        weighted = [g for g in graphs if g.name in ("conv", "depthwise", "linear", "ties_conv")]
        graphs = [*weighted[::2], *operator_cases.fusion_cases()]
    return EmulatedNetwork(merged(graphs), target, tmp_path_factory.mktemp(target.board))


class TestEmulated:
    pytestmark = emulated

    def test_every_operator_equals_the_reference(self, operators: EmulatedNetwork) -> None:
        graph = operators.graph
        for seed, image in enumerate(operator_cases.images(graph, 1)):  # another order of the threads each time
            assert differences(graph, image, operators.run(*image, seed=seed, early=seed % 2 == 1)) == {}

    def test_a_changed_weight_is_seen(self, operators: EmulatedNetwork) -> None:
        graph = operators.graph
        image = random_input(graph, 0)
        name = next(node.inputs[1] for node in graph.nodes if isinstance(node.op, ir.Conv2d))
        data = graph.constants[name].data.copy()
        data.flat[0] = -data.flat[0] or 1
        changed = graph.with_nodes(graph.nodes, {**graph.constants, name: replace(graph.constants[name], data=data)})
        assert differences(changed, image, operators.run(*image)) != {}

    @pytest.mark.slow
    @pytest.mark.parametrize("board", TARGETS)
    def test_every_tile(self, board: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        mode = family.mode_of(gpu_arch(TARGETS[board]))
        for index, tile in enumerate(cuda_cost.tiles(mode)):
            monkeypatch.setitem(cuda_cost._TILES, mode, (tile,))
            monkeypatch.setattr(cuda_cost, "prologue_pays", lambda *_: True)
            graph = merged([tile_graph(100, 70), tile_graph(33, 300)])
            network = EmulatedNetwork(graph, TARGETS[board], tmp_path / str(index))
            assert f"tile{tile.rows}x{tile.columns}" in network.source
            image = random_input(graph, index)
            assert differences(graph, image, network.run(*image, seed=index)) == {}

    @pytest.mark.parametrize("board", some_slow("orin"))
    def test_a_small_network_of_two_images(self, board: str, tmp_path: Path) -> None:
        graph = batched(random_xception(75, 0.125, 10), 2)
        network = EmulatedNetwork(all_outputs(graph), TARGETS[board], tmp_path)
        image = np.concatenate([photo(75, 75, seed) for seed in (1, 2)])
        assert differences(all_outputs(graph), [image], network.run(image, seed=3)) == {}

    @pytest.mark.parametrize("board", some_slow("orin"))
    def test_the_float16_build_is_near_the_float_reference(self, board: str, tmp_path: Path) -> None:
        graph = take_int8_pixels(all_outputs(as_float(random_xception(75, 0.125, 10))), PIXELS)
        network = EmulatedNetwork(graph, TARGETS[board], tmp_path)
        image = photo(75, 75, 4)
        expected = reference.run(graph, image)
        for name, value, wanted in zip(graph.outputs, network.run(image), expected, strict=True):
            assert value.dtype == np.float32
            assert np.abs(value - wanted).max() <= 0.02 * np.abs(wanted).max(), name

    @pytest.mark.parametrize(
        ("board", "sound", "broken"),
        [
            ("orin", "xct_wait_2();", "xct_wait_3();"),  # reads a slice before it is there
            ("orin", "xct_sync();\n", ";\n"),
            pytest.param("xavier", "xct_sync();\n", ";\n", marks=pytest.mark.slow),
            pytest.param("nano", "xct_sync();\n", ";\n", marks=pytest.mark.slow),
            ("orin", "xct_perm(", "xct_perm(1 + "),
        ],
    )
    def test_a_planted_fault_is_seen(self, board: str, sound: str, broken: str, tmp_path: Path) -> None:
        graph = merged([tile_graph(100, 300)])
        network = EmulatedNetwork(graph, TARGETS[board], tmp_path)
        preamble, _, kernels = network.source.partition("extern")
        assert sound in kernels
        extra = "static void xct_wait_3() { wait_for_all_but(3); }\n"
        network.compile(extra + preamble + "extern" + kernels.replace(sound, broken), tmp_path)
        image = random_input(graph, 0)
        found = {}
        for seed in range(4):
            try:
                found |= differences(graph, image, network.run(*image, seed=seed))
            except RuntimeError:
                found["error"] = 1
        assert found != {}

    def test_a_barrier_that_some_threads_miss_is_an_error(self, tmp_path: Path) -> None:
        network = EmulatedNetwork(merged([tile_graph(33, 20)]), TARGETS["orin"], tmp_path)
        network.compile(network.source.replace("xct_sync();\n", "if (threadIdx.x) xct_sync();\n"), tmp_path)
        with pytest.raises(RuntimeError, match="some threads wait"):
            network.run(*random_input(network.graph, 0))

    def test_no_access_of_a_product_takes_more_than_it_must(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        build = Int8Builder("accesses", 128)
        x = build.conv(build.input(np.zeros((1, 7, 9, 128), np.int8)), 128)
        graph = build.graph(build.add(build.conv(x, 128), x))
        for board in ("orin", "xavier"):
            network = EmulatedNetwork(graph, TARGETS[board], tmp_path / board, counted=True)
            network.run(*random_input(graph, 0))
            for kernel, counted in products(network).items():
                shared, memory = counted["shared"], counted["global"]
                assert shared.cost == shared.least > 0, kernel
                # Biases and multipliers come 16 bytes a thread of 32: twice, but the second time from the cache.
                assert memory.cost < 1.15 * memory.least, kernel
            if board == "orin":  # chunks where they come
                preamble, _, kernels = network.source.partition("extern")
                assert "^" in kernels
                network.compile(preamble + "extern" + kernels.replace("^", "+ 0 *"), tmp_path / board)
            else:  # rows as they come
                monkeypatch.setattr(slice_layout, "_row_in_turn", lambda gemm, n: n)
                network = EmulatedNetwork(graph, TARGETS[board], tmp_path / board, counted=True)
            network.run(*random_input(graph, 0))
            for kernel, counted in products(network).items():
                assert counted["shared"].cost > 1.3 * counted["shared"].least, kernel

    @pytest.mark.parametrize("board", some_slow("orin"))
    def test_kernels_touch_their_operands_alone(self, board: str, tmp_path: Path) -> None:
        graph = merged([*operator_cases.fusion_cases(), *operator_cases.all_cases()[5::19]])
        network = EmulatedNetwork(graph, TARGETS[board], tmp_path, counted=True)
        image = random_input(graph, 0)
        assert differences(graph, image, network.run(*image)) == {}

    def test_a_row_beyond_the_image_is_an_error(self, tmp_path: Path) -> None:
        network = EmulatedNetwork(merged([tile_graph(33, 20)]), TARGETS["orin"], tmp_path, counted=True)
        preamble, _, kernels = network.source.partition("extern")
        assert "min(" in kernels
        network.compile(preamble + "#define min(a, b) (a)\nextern" + kernels, tmp_path)
        with pytest.raises(RuntimeError, match="beside the operands"):
            network.run(*random_input(network.graph, 0))

    def test_wmma_rows_that_are_not_aligned_are_an_error(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        """Float16 rows 80 bytes apart: what the hardware may do with them, the PTX ISA does not say."""
        monkeypatch.setitem(cuda_gemm._WMMA_STRIDE, "float16", 80)
        graph = merged([tile_graph(33, 20)])
        network = EmulatedNetwork(take_int8_pixels(as_float(graph), PIXELS), TARGETS["xavier"], tmp_path)
        with pytest.raises(RuntimeError, match="not aligned"):
            network.run(*random_input(graph, 0))


def products(network: EmulatedNetwork) -> dict[str, dict[str, Traffic]]:
    found = {kernel: counted for kernel, counted in network.traffic.items() if kernel.startswith("gemm")}
    assert found
    return found


def gpu_arch(target: TargetSpec) -> str:
    assert target.gpu is not None
    return target.gpu.arch


def tile_graph(channels: int, outputs: int) -> ir.Graph:
    """A depthwise and two pointwise convolutions and an addition, at sizes that fill no tile."""
    build = Int8Builder("tile", channels)
    x = build.input(np.random.default_rng(0).integers(-128, 128, (1, 9, 11, channels), np.int8))
    x = build.conv(x, channels)
    y = build.conv(build.depthwise(build.relu(x)), outputs, relu=True)
    build.add(build.conv(y, outputs), build.conv(x, outputs))
    return build.graph()


def batched(graph: ir.Graph, batch: int) -> ir.Graph:
    """The same network for ``batch`` images at a time."""
    nodes = tuple(replace(n, type=replace(n.type, shape=(batch, *n.type.shape[1:]))) for n in graph.nodes)
    return replace(graph, nodes=nodes)


PROMISED = {
    "nano": r"\bmad\.wide\.s16\b",
    "tx2": r"\bmad\.wide\.s16\b",
    "xavier": r"\bwmma\.mma\.sync\.aligned\.row\.col\.m16n16k16\.s32\.s8\.s8\.s32\b",
    "orin": r"\bmma\.sync\.aligned\.m16n8k32\.row\.col\.s32\.s8\.s8\.s32\b",
}


# By the PTX ISA: instructions on one number of 8 to 64 bits, older than 6.3; those that came later, or on whole words.
OLD_PTX = re.compile(
    r"(?:(?:abs|add|and|bfe|bfi|brev|clz|cvt|fma|mad|lop3|max|min|mov|mul|neg|not|or|popc|prmt|rcp|sad|selp|setp|shl|shr|sub|xor)"
    r"(?:\.(?:lo|hi|wide|rn|rz|rni|sat|lt|le|gt|ge|eq|ne|approx|ftz))*(?:\.(?:pred|[bsu](?:8|16|32|64)|f16|f32))+"
    r"|cvta(?:\.to)?\.(?:global|shared)\.u64|ld\.param\.u64|bra|bra\.uni|ret|bar\.sync|shfl\.sync\.bfly\.b32"
    r"|(?:ld|st)(?:\.volatile)?\.(?:global|shared)(?:\.nc)?(?:\.v[24])?\.[bsuf](?:8|16|32|64)|dp[24]a(?:\.lo|\.hi)?\.[su]32\.[su]32)"
)
_WMMA = {f"wmma.load.{operand}.sync.aligned.{order}.m16n16k16.shared.{item}"
         for operand, order in (("a", "row"), ("b", "col")) for item in ("s8", "f16")}  # fmt: skip
_WMMA |= {f"wmma.store.d.sync.aligned.row.m16n16k16.shared.{item}" for item in ("s32", "f32")}
_WMMA |= {f"wmma.mma.sync.aligned.row.col.m16n16k16.{items}" for items in ("s32.s8.s8.s32", "f32.f32")}
NEWER_PTX = {
    "6.3": _WMMA,
    "7.4": {
        "cp.async.cg.shared.global", "cp.async.commit_group", "cp.async.wait_group",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16", "cvt.pack.sat.s8.s32.b32",
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32", "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def compiled(target: TargetSpec) -> backend.Compiled:
    pool = random_operator_graph("pool", (1, 19, 19, 40), strides=(2, 2))
    return backend.build(merged([*operator_cases.fusion_cases(), pool]), target)


class TestCompiled:
    def test_the_ptx_holds_the_promised_instruction(self, compiled: backend.Compiled, target: TargetSpec) -> None:
        board = next(name for name, row in TARGETS.items() if row is target)
        ptx = compiled.ptx.decode()
        assert re.search(PROMISED[board], ptx)
        assert re.search(rf"\.target sm_{gpu_arch(target)[3:]}\b", ptx)
        assert ("cp.async" in ptx) == ("ldmatrix" in ptx) == (board == "orin")
        assert ("dp4a" in ptx) == (board not in ("nano", "tx2"))

    def test_the_ptx_is_no_newer_than_it_says(self, compiled: backend.Compiled, target: TargetSpec) -> None:
        """Its version is not NVRTC's own (``nvrtc.ptx_version``): all instructions must be in that version."""
        ptx = compiled.ptx.decode()
        version = {87: "7.4"}.get(int(gpu_arch(target)[3:]), "6.3")
        assert re.findall(r"^\.version (.*)$", ptx, re.MULTILINE) == [version]
        used = set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][a-z0-9_]*(?:[.:]+[a-z0-9_]+)*)\b(?!:)", ptx, re.MULTILINE))
        newer = {word for word in used if not OLD_PTX.fullmatch(word) and word not in NEWER_PTX[version]}
        assert not newer, "look up in the PTX ISA which version brings these"

    def test_no_kernel_spills_or_has_a_stack(self, compiled: backend.Compiled) -> None:
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.log)
        assert len(frames) == len({step.kernel for step in compiled.plan.steps})
        assert set(frames) == {("0", "0", "0")}

    def test_the_source_asks_for_no_header(self, compiled: backend.Compiled) -> None:
        assert "#include" not in compiled.source

    def test_the_source_is_no_newer_than_cpp14(self) -> None:
        """NVRTC 10.2 takes no later standard, and no hexadecimal floats; 11.7 was seen to compile all of it."""
        graph = take_int8_pixels(as_float(merged(list(operator_cases.fusion_cases()))), PIXELS)
        source = backend.kernel_source(family.lower(graph, TARGETS["nano"]), "sm_53")
        assert not re.search(r"0x[0-9a-f.]+p[+-]\d", source)

    def test_blocks_fit_every_device(self, compiled: backend.Compiled) -> None:
        for step in compiled.plan.steps:
            assert step.launch is not None
            assert step.launch.shared_bytes <= 48 << 10


def test_the_files_of_a_bundle() -> None:
    files = backend.build_files(tile_graph(3, 5), TARGETS["orin"])
    assert sorted(files) == ["kernels.cu", "kernels.cubin", "kernels.ptx", "plan.bin", "weights.bin"]
    assert files["kernels.cubin"].startswith(b"\x7fELF")
    plan = unpack(files["plan.bin"])
    assert plan.engine == "cuda"
    source = files["kernels.cu"].decode()
    for step in plan.steps:
        (parameters,) = re.findall(rf"__global__ void .*\b{step.kernel}\((.*)\) {{", source)
        assert len(parameters.split(",")) == len(step.arguments)
    assert files == backend.build_files(tile_graph(3, 5), TARGETS["orin"])


def test_requirements_name_versions() -> None:
    assert "CUDA 11.4 " in backend.requirements(TARGETS["orin"])["kernels.ptx"]
    assert "CUDA 10.0 " in backend.requirements(TARGETS["xavier"])["kernels.ptx"]
    assert "CUDA 13.0 " in backend.requirements(catalog.get("jetson-thor"))["kernels.ptx"]
    assert "10.2" in backend.requirements(TARGETS["nano"])["kernels.cu"]
    assert "sm_110 exactly" in backend.requirements(catalog.get("jetson-thor"))["kernels.cubin"]


def test_thor_compiles_with_the_newer_nvrtc() -> None:
    compiled = backend.build(tile_graph(40, 70), catalog.get("jetson-thor"))
    assert ".target sm_110" in compiled.ptx.decode()


def test_a_refused_source_is_reported_in_a_line() -> None:
    with pytest.raises(nvrtc.NvrtcError, match=r"cannot compile the kernels for sm_87: .*error") as caught:
        nvrtc.compile_source("nonsense", "sm_87")
    assert "\n" not in str(caught.value)
    assert "nonsense" in caught.value.log


def test_tiles_get_smaller_where_maps_are() -> None:
    target = TARGETS["orin"]
    rows = {}
    for size in (10, 74):
        graph = random_operator_graph("conv", (1, size, size, 64), channels=256, kernel=(1, 1))
        symbol = next(call.symbol for call in family.lower(graph, target) if call.symbol.startswith("gemm"))
        match = re.search(r"tile(\d+)x(\d+)", symbol)
        assert match is not None
        rows[size] = int(match[1]) * int(match[2])
    assert rows[10] < rows[74]


def test_packed_weights_are_all_there() -> None:
    weights = np.arange(1, 97, dtype=np.int8).reshape(2, 48)
    for board in TARGETS.values():
        mode = family.mode_of(gpu_arch(board))
        window = WindowLayout(1, 4, 4, 4, 4, (1, 1), (1, 1), (0, 0), 64)
        gemm = cuda_gemm.Gemm(mode, "int8", window, 32, cuda_cost.tiles(mode)[0])
        packed = slice_layout.pack_weights(gemm, weights).view(np.int8)
        assert sorted(packed[packed != 0]) == sorted(weights.reshape(-1))


def test_a_mixed_graph_is_refused() -> None:
    build = Int8Builder("mixed")
    x = build.conv(build.input(np.zeros((1, 2, 2, 4), np.int8)), 4)
    node = ir.Node("real", ir.Dequantize(), (x,), ir.TensorType((1, 2, 2, 4), "float32"))
    with pytest.raises(ir.GraphError, match="int8"):
        family.lower(replace(build.graph(), nodes=(*build.nodes, node), outputs=("real",)), TARGETS["orin"])


def gpu_capability() -> int:
    """87 and the like of the first GPU; 0 where there is no driver or no GPU."""
    try:
        capabilities = list(cuda_devices().values())
    except OSError:
        return 0
    return int(capabilities[0].replace(".", "")) if capabilities else 0


@pytest.mark.cuda
@requires_hardware(gpu_capability() >= 80, "NVIDIA GPU of compute capability 8.0 or later")
def test_a_real_gpu_equals_the_reference(tmp_path: Path) -> None:
    """The operators of every board and the whole network from their PTX, by the driver of this GPU: a rehearsal."""
    kit = tmp_path / "kit"
    make_gpu_kit.make(kit)
    library = borrowed_gpu.load_runtime(kit / f"libxceptile-{platform.machine()}.so")
    checked = [
        borrowed_gpu.check(library, kit, entry) for entry in json.loads((kit / "kit.json").read_text())["networks"]
    ]
    assert len(checked) >= 6
    assert [entry for entry in checked if not entry.get("equal")] == []


@pytest.mark.slow
class TestWholeNetwork:
    pytestmark = emulated

    def test_the_whole_network_equals_the_reference(self, tmp_path: Path) -> None:
        graph = random_xception()
        network = EmulatedNetwork(graph, TARGETS["orin"], tmp_path)
        image = photo(299, 299, 1)
        assert differences(graph, [image], network.run(image)) == {}
        log = nvrtc.compile_source(network.source, "sm_87").log
        assert "bytes spill" in log
        assert re.search(r"[1-9]\d* bytes spill", log) is None
