"""A compiled bundle through the native runtime's CUDA driver and a driver library whose kernels run on the processor
(fake_cuda.c): what ships, from the command line down to cuLaunchKernel, bit for bit the contract. A rehearsal.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.cuda_emulator import emulated, emulation
from support.needs import requires, requires_module
from support.small_bundle import write_small_bundle

from xceptile.compile import cli
from xceptile.models import serialize
from xceptile.runtime import bundle as bundles
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.engines.engine import Array, EngineError
from xceptile.runtime.engines.native import LIBRARY, NativeEngine
from xceptile.runtime.engines.native_program import NativeProgramEngine
from xceptile.runtime.engines.reference import ReferenceEngine
from xceptile.runtime.layers import time_layers
from xceptile.runtime.obtained import REHEARSED
from xceptile.runtime.plan import Step, pack, unpack
from xceptile.runtime.session import Placement, device_name, open_engine, open_session, place

pytestmark = [
    *emulated,
    requires("clang", package="clang"),
    requires_module("nvidia.cuda_nvrtc", package="'xceptile[cuda]'"),
    requires_module("ziglang", package="ziglang"),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_small_bundle(tmp_path_factory.mktemp("jetson") / "bundle", "jetson", ("native",))


@pytest.fixture(scope="module")
def driver(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    native = (bundle.file(a.files[0]).parent for a in bundle.manifest.artefacts if a.engine == "native")
    return emulation(tmp_path_factory.mktemp("driver"), *(folder / "kernels.cu" for folder in native))


@pytest.fixture(autouse=True)
def emulate(driver: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in driver.items():
        monkeypatch.setenv(name, value)


def expected(bundle: Bundle, x: Array) -> Array:
    return ReferenceEngine(serialize.load(bundle.file(bundles.INT8_GRAPH))).run(x)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        ({}, "capability 8.7, driver for CUDA 12.6, kernels.cubin, one graph"),
        ({"FAKE_INTEGRATED": "1", "FAKE_SEED": "5"}, "kernels.cubin, one graph"),
        (
            {"FAKE_INTEGRATED": "1", "FAKE_NO_CAPTURE": "1", "FAKE_SEED": "2"},
            "kernels.cubin, kernel by kernel (no capture begins: CUDA_ERROR_FAKE (801): says the fake)",
        ),
        ({"FAKE_CAPABILITY": "90"}, "capability 9.0, driver for CUDA 12.6, kernels.ptx, one graph"),
    ],
    ids=["card", "shared memory", "no graphs", "newer"],
)
def test_a_session_rehearses_bit_for_bit(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, machine: dict[str, str], said: str
) -> None:
    for name, value in machine.items():
        monkeypatch.setenv(name, value)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *bundle.manifest.input.shape[1:]), np.uint8)
    with open_session(bundle) as session:
        assert session.placement == Placement("local", REHEARSED)
        assert device_name(session.placement, session.engine).endswith(said)
        np.testing.assert_array_equal(session.logits(pixels), expected(bundle, bundle.quantize_pixels(pixels)))


def test_the_float16_artefact_takes_the_same_images(bundle: Bundle) -> None:
    golden, _ = bundle.golden()
    engine = open_engine(bundle, "native", dtype="float16", placement=place(bundle.manifest.target, None))
    logits = engine.run(golden[:2])
    engine.close()
    pixels = (golden[:2].view(np.uint8) ^ np.uint8(0x80)).astype(np.float32)
    wanted = ReferenceEngine(serialize.load(bundle.file(bundles.FLOAT_GRAPH))).run(pixels)
    assert np.abs(logits - wanted).max() <= 0.02 * np.abs(wanted).max()


def test_the_command_line(bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the same bundle where kernels compute nothing."""
    arguments = ["verify", str(bundle.path), "--data", "drawn:val:4", "--json"]
    assert cli._invoke(cli.app, arguments) == 0
    (seen,) = (each for each in json.loads(capsys.readouterr().out) if each["engine"] == "native")
    assert (seen["obtained"], seen["bit_exact"], seen["images"]) == (REHEARSED, True, 4)
    assert "Fake GPU" in seen["device"]
    monkeypatch.delenv("FAKE_KERNELS")
    assert cli._invoke(cli.app, arguments) == 1


def test_the_program(bundle: Bundle) -> None:
    program = bundle.file(f"{bundles.REHEARSAL}/xceptile-run")
    program.chmod(0o755)
    with NativeProgramEngine((str(program),), bundle.file(bundles.NATIVE), None) as engine:
        assert engine.self_test()


def test_time_by_layer(bundle: Bundle) -> None:
    profile = time_layers(bundle, repeats=2)
    assert profile.layers
    assert {layer.median_ms for layer in profile.layers} == {1.5}  # the fake driver's


def first_product(steps: tuple[Step, ...]) -> int:
    return next(i for i, step in enumerate(steps) if step.kernel.startswith("gemm"))


FAULTS: dict[str, Callable[[Step], Step]] = {
    "fewer blocks": lambda s: replace(s, launch=replace(s.launch, groups=(1, 1, 1))),
    "fewer threads": lambda s: replace(s, launch=replace(s.launch, group_size=(s.launch.group_size[0] // 2, 1, 1))),
    "more threads": lambda s: replace(s, launch=replace(s.launch, group_size=(s.launch.group_size[0] * 2, 1, 1))),
    "less shared memory": lambda s: replace(s, launch=replace(s.launch, shared_bytes=16)),
    "another place": lambda s: replace(
        s, arguments=(replace(s.arguments[0], offset_bytes=s.arguments[-1].offset_bytes), *s.arguments[1:])
    ),
    "exchanged": lambda s: replace(s, arguments=(s.arguments[1], s.arguments[0], *s.arguments[2:])),
    "one argument too few": lambda s: replace(s, arguments=s.arguments[:-1], output=0),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_plan_is_seen(bundle: Bundle, tmp_path: Path, fault: str) -> None:
    native = tmp_path / "native"
    shutil.copytree(bundle.file(bundles.NATIVE), native)
    plan = unpack((native / "plan.bin").read_bytes())
    index = first_product(plan.steps)
    steps = (*plan.steps[:index], FAULTS[fault](plan.steps[index]), *plan.steps[index + 1 :])
    kernels = b"".join((native / name).read_bytes() for name in ("kernels.cubin", "kernels.ptx", "kernels.cu"))
    digests = (hashlib.sha256(data).hexdigest() for data in ((native / "weights.bin").read_bytes(), kernels))
    (native / "plan.bin").write_bytes(pack(replace(plan, steps=steps), *digests))
    x = bundle.golden()[0][:1]
    library = bundle.file(bundles.REHEARSAL) / LIBRARY
    try:
        with NativeEngine(native, 1, library=library, require_device="any") as engine:
            right = np.array_equal(engine.run(x), expected(bundle, x))
    except EngineError as error:
        right = False
        print(error)
    assert not right
