"""Compiled networks through the native runtime's OpenCL driver on PoCL: a rehearsal, bit for bit the contract."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import int8_graphs, opencl_runner
from support.needs import requires_module, requires_pocl
from support.small_bundle import write_small_bundle

from xceptile.compile.backends import native_runtime
from xceptile.compile.backends import opencl as backend
from xceptile.compile.commands.bench import _print_bench
from xceptile.models import serialize
from xceptile.runtime import bundle as bundles
from xceptile.runtime import reference
from xceptile.runtime.benchmark import bench
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.engines.native_program import NativeProgramEngine
from xceptile.runtime.engines.reference import ReferenceEngine
from xceptile.runtime.layers import time_layers
from xceptile.runtime.obtained import REHEARSED
from xceptile.runtime.report import Run, write_html
from xceptile.runtime.session import (
    Placement,
    device_name,
    is_hardware_of,
    open_engine,
    open_program,
    open_session,
    place,
)
from xceptile.runtime.verdict import Report
from xceptile.targets import catalog

pytestmark = [requires_pocl(), requires_module("ziglang", package="ziglang")]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("opencl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POCL_CACHE_DIR", str(folder / "pocl"))
        return write_small_bundle(folder / "bundle", "adreno-740", ("native",))


@pytest.fixture(autouse=True)
def own_cache(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCL_CACHE_DIR", str(bundle.path.parent / "pocl"))
    for name in ("XCEPTILE_CACHE", "XCEPTILE_OPENCL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(bundle.path.parent / "user cache"))


def test_a_session_rehearses_and_names_what_computes(bundle: Bundle) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, *bundle.manifest.input.shape[1:]), np.uint8)
    with open_session(bundle) as session:
        assert session.placement == Placement("local", REHEARSED)
        assert device_name(session.placement, session.engine).startswith("local: ")
        assert "Portable Computing Language" in device_name(session.placement, session.engine)
        x = bundle.quantize_pixels(pixels)
        expected = ReferenceEngine(serialize.load(bundle.file(bundles.INT8_GRAPH))).run(x)
        np.testing.assert_array_equal(session.logits(pixels), expected)
    assert list((bundle.path.parent / "user cache/xceptile").iterdir())  # compiled, and kept for the next start
    bundles.open_bundle(bundle.path)


def test_the_float16_artefact_takes_the_same_images(bundle: Bundle) -> None:
    golden, _ = bundle.golden()
    engine = open_engine(bundle, "native", dtype="float16", placement=place(bundle.manifest.target, None))
    logits = engine.run(golden[:2])
    engine.close()
    real = serialize.load(bundle.file(bundles.FLOAT_GRAPH))
    pixels = (golden[:2].view(np.uint8) ^ np.uint8(0x80)).astype(np.float32)
    expected = ReferenceEngine(real).run(pixels)
    assert logits.dtype == np.float32
    # 40 dB: PoCL without cl_khr_fp16 stores halves and computes in float; the kernels' own tests state the bound.
    assert np.sum((logits - expected) ** 2) * 1e4 < np.sum(expected**2)


@requires_module("pyopencl", package="pyopencl")
def test_bench_and_report_say_where_float32_stands_in_for_float16(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stands_in = "cl_khr_fp16" not in opencl_runner.queue().device.extensions.split()
    words = "float32 stands in for float16"
    seen = bench(bundle, rounds=2, repeats=1, warmup=1)
    assert {x.dtype: x.device.endswith(f", {words}") for x in seen.latencies} == {"int8": False, "float16": stands_in}
    for as_json in (True, False):
        _print_bench(seen, None, as_json)
        assert capsys.readouterr().out.count(words) == stands_in
    report = Report(
        bundle.manifest.target.name, bundle.sha256(), "", "", {}, {}, {}, accuracies=(), latencies=seen.latencies
    )
    write_html("a rehearsal", [Run(bundle, report)], tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count(words) == stands_in


def test_the_program_that_rehearses(bundle: Bundle) -> None:
    program = bundle.file(f"{bundles.REHEARSAL}/xceptile-run")
    program.chmod(0o755)
    with NativeProgramEngine((str(program), "--require-device=any"), bundle.file(bundles.NATIVE), None) as engine:
        assert engine.self_test()
        assert "Portable Computing Language" in device_name(Placement("local", REHEARSED), engine)
    with pytest.raises(EngineError, match="has no GPU here, only a processor"):
        NativeProgramEngine((str(program),), bundle.file(bundles.NATIVE), None)


def test_time_by_layer_and_the_program_here(bundle: Bundle) -> None:
    profile = time_layers(bundle, repeats=2)
    assert [layer.median_ms > 0 for layer in profile.layers] == [True] * len(profile.layers)
    assert profile.roof is None  # PoCL is not the GPU whose peaks are published
    artefact, placement = bundle.artefact("native"), place(bundle.manifest.target, None)
    assert artefact is not None
    with open_program(bundle, artefact, placement, 1) as program:
        assert program.self_test()


def test_a_phone_is_known_by_its_chip() -> None:
    here = catalog.get("generic/arm64")
    assert is_hardware_of(catalog.get("adreno-740"), here, "SM-S911B SM8550")
    assert not is_hardware_of(catalog.get("adreno-740"), here, "Pixel 7 GS201")
    assert not is_hardware_of(catalog.get("opencl"), here, "SM-S911B SM8550")


def test_an_emulator_is_no_gpu(bundle: Bundle) -> None:
    with pytest.raises(EngineError, match="an emulator has no GPU"):
        place(bundle.manifest.target, "qemu")


def test_a_bundle_whose_runtime_is_for_another_machine(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: bundle.manifest.target.architecture)
    with pytest.raises(EngineError, match="cannot load the bundle's runtime"):
        open_engine(bundle, "native", placement=Placement("local", REHEARSED))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["adreno-740", "mali-g710"])
def test_a_whole_network_in_the_native_runtime(target: str, tmp_path: Path) -> None:
    graph = int8_graphs.random_xception(71, 0.25, 10)
    for name, data in (backend.build_files(graph, catalog.get(target)) | native_runtime.build_rehearsal()).items():
        (tmp_path / name).write_bytes(data)
    (x,) = int8_graphs.random_input(graph, 3)
    (expected,) = reference.run(graph, x)
    for _ in range(2):  # compiled, and from the cache
        with NativeEngine(tmp_path, require_device="any", time_steps=True) as engine:
            np.testing.assert_array_equal(engine.run(x), expected)
            assert all(step.last_ms > 0 for step in engine.steps())
    (tmp_path / "weights.bin").write_bytes(bytes(1) + (tmp_path / "weights.bin").read_bytes()[1:])
    with pytest.raises(EngineError, match="SHA-256"):
        NativeEngine(tmp_path, require_device="any")
