"""The table by layer and the machine's roof: what is counted, what the roof's kernels compute, the picture."""

from __future__ import annotations

import json
import math
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import fake_network
from support.bundle_files import FILES, manifest

from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import native_runtime, roof
from xceptile.runtime import layers
from xceptile.runtime.bundle import write_bundle
from xceptile.runtime.devices.qemu import emulator_command
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.layers import LayerTime, Profile, Roof, profile_to_json
from xceptile.runtime.plan import unpack
from xceptile.runtime.report import Run, write_html
from xceptile.runtime.roofline import bars, roofline
from xceptile.runtime.session import Placement
from xceptile.runtime.verdict import Report
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

TARGETS = ["x86-64-avx512vnni", "x86-64-avx2", "android-arm64-i8mm", "raspberry-pi-5", "raspberry-pi-4"]
EMULATED = [name for name in TARGETS if catalog.get(name).qemu_cpu is not None]


def layer(**changes: object) -> LayerTime:
    fields = {"name": "a", "kernel": "conv_3x3", "kind": "convolution", "path": "p", "macs": 3_000_000}
    fields |= {"bytes_moved": 6000, "median_ms": 0.5}
    return LayerTime(**(fields | changes))  # type: ignore[arg-type]  # the keys are the caller's


ROOF = Roof(100.0, 10.0)
REPORT = Report("vendor/board", "0", "data", "0", {"cores": "2"}, {"numpy": "2"}, {"native/int8": 1}, (), ())


def profile(roof_: Roof | None = ROOF) -> Profile:
    layers = (
        layer(),
        layer(name="b<&", kind="depthwise + pointwise", macs=500_000, bytes_moved=100_000, median_ms=0.25),
        layer(name="c", kind="depthwise", macs=90_000, bytes_moved=90_000, median_ms=0.125),
        layer(name="d", kind="max pool", macs=0, bytes_moved=1000, median_ms=0.125),
    )
    return Profile("vendor/board", 2, layers, roof_, "local", "measured")


# ---- what is counted ----


@pytest.fixture(scope="module")
def fake_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fake network with the runtime and the roof of this machine."""
    home = tmp_path_factory.mktemp("roof")
    kernels = fake_network.compile_kernels(home / "kernels.so").read_bytes()
    folder = fake_network.write_bundle(home / "bundle", kernels)
    host = catalog.get("host")
    files = native_runtime.build(host) | {f"roof/{name}": data for name, data in roof.build_files(host).items()}
    for name, data in files.items():
        path = folder / "native" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        path.chmod(0o755)
    return folder


def test_bytes_moved_are_those_of_the_distinct_operands(fake_bundle: Path) -> None:
    with NativeEngine(fake_bundle / "native", threads=1) as engine:
        moved = {step.name: step.bytes_moved for step in engine.steps()}
    # Two images of 20 x 30 x 3, seven weights; ten classes.
    assert moved == {"first": 3607, "second": 3600, "third": 3607, "last": 1810}


def test_an_operand_handed_over_twice_is_counted_once(tmp_path: Path, fake_bundle: Path) -> None:
    native = fake_bundle / "native"
    whole = fake_network.plan()
    first = whole.steps[0]
    x, weights, _ = first.arguments
    aliased = replace(first, arguments=(x, weights, x))
    changed = type(whole)(
        whole.engine, whole.arena_bytes, whole.weights_bytes, whole.tensors, (aliased, *whole.steps[1:])
    )
    folder = fake_network.write_bundle(tmp_path / "b", (native / "kernels.so").read_bytes(), changed)
    with NativeEngine(folder / "native", threads=1, library=native / "libxceptile.so") as engine:
        assert engine.steps()[0].bytes_moved == 1807


def test_the_program_prints_bytes_and_the_roof(fake_bundle: Path) -> None:
    command = [fake_bundle / "native" / "xceptile-run", fake_bundle, "--repeat=2", "--warmup=0", "--layers"]
    printed = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert [step["bytes"] for step in printed["steps"]] == [3607, 3600, 3607, 1810]
    assert list(printed["roof"]) == ["fill", "stream", "peak"]
    assert all(math.isfinite(printed["roof"][step]["gb_per_s"]) for step in ("fill", "stream"))
    assert math.isfinite(printed["roof"]["peak"]["gmac_per_s"])


def test_shares_rates_and_totals() -> None:
    seen = profile()
    first = seen.layers[0]
    assert (first.gmac_per_s, first.gb_per_s, first.macs_per_byte) == (6.0, 0.012, 500.0)
    assert seen.share_of_peak(first) == pytest.approx(0.06)
    assert [each.kind for each in seen.layers] == ["convolution", "depthwise + pointwise", "depthwise", "max pool"]
    total = seen.total
    assert (total.macs, total.bytes_moved, total.median_ms) == (3_590_000, 197_000, 1.0)
    assert seen.share_of_peak(total) == pytest.approx(0.0359)
    printed = json.loads(json.dumps(profile_to_json(seen), allow_nan=False))
    assert printed["total"]["share_of_peak"] == pytest.approx(0.0359)
    assert [row["name"] for row in printed["layers"]] == ["a", "b<&", "c", "d"]


def test_a_clock_that_saw_no_time_pass_and_a_bundle_without_a_roof() -> None:
    assert layer(median_ms=0.0).gmac_per_s == 0.0
    assert profile(None).share_of_peak(layer()) is None
    assert json.loads(json.dumps(profile_to_json(profile(None))))["roof"] is None


def test_a_gpu_has_its_published_roof_where_it_is_the_target() -> None:
    target = catalog.get("jetson-orin")
    assert target.gpu is not None
    roof_ = layers._published_roof(target, Placement("local", "measured"))
    assert roof_ == Roof(target.gpu.int8_gops / 2, target.gpu.bandwidth_gb_s, published=True)
    assert str(roof_).startswith("published peak: ")
    assert layers._published_roof(target, Placement("local", "rehearsed")) is None
    assert layers._published_roof(catalog.get("avx2"), Placement("local", "measured")) is None


# ---- what the roof's kernels do ----


def expected_sums(words: int) -> np.ndarray:
    """What ``stream`` writes: (BLOCKS, LANES), block t's words being t."""
    sums = np.zeros((roof.BLOCKS, roof.LANES), np.int32)
    sums[:, :words] = np.arange(roof.BLOCKS)[:, np.newaxis] * (roof.BLOCK_WORDS // words)
    return sums


def expected_products(instruction: roof.MultiplyAccumulate) -> np.ndarray:
    """What ``peak`` writes, (PEAK_TASKS, LANES), by the definition of the instruction, in wrapping integers."""
    *start, x = roof.operands(instruction)
    acc = np.stack(start)[np.newaxis] + np.arange(roof.PEAK_TASKS, dtype=np.int32)[:, np.newaxis, np.newaxis]
    as_bytes = x.view(np.int8).astype(np.int64).reshape(-1, 4)
    rounds = roof.PEAK_ROUNDS
    if instruction.name in ("vpdpbusd", "sdot"):
        left = x.view(np.uint8).astype(np.int64).reshape(-1, 4) if instruction.name == "vpdpbusd" else as_bytes
        acc = acc + rounds * (left * as_bytes).sum(axis=1)
    elif instruction.name == "smmla":
        rows = as_bytes.reshape(2, 8)
        acc = acc + rounds * (rows @ rows.T).reshape(-1)
    elif instruction.name == "vpmaddwd":
        factor = x.view(np.int16).astype(np.int32)
        for _ in range(rounds):
            products = np.ascontiguousarray(acc).view(np.int16).astype(np.int32) * factor
            acc = acc + products.reshape(*acc.shape, 2).sum(axis=-1, dtype=np.int32)
    else:
        factor = x.view(np.int8)[:8].astype(np.int16)
        halves = np.ascontiguousarray(acc).view(np.int16)
        for _ in range(rounds):
            halves = halves + np.ascontiguousarray(halves).view(np.int8)[..., :8].astype(np.int16) * factor
        acc = np.ascontiguousarray(halves).view(np.int32)
    products = np.zeros((roof.PEAK_TASKS, roof.LANES), np.int32)
    products[:, : instruction.words] = acc.astype(np.int64).sum(axis=1).astype(np.int32)
    return products


@pytest.mark.parametrize("name", EMULATED)
def test_the_roof_computes_what_it_says(name: str, tmp_path: Path) -> None:
    """Every multiply-accumulate that is counted is done: the emulated target's sums are those of all of them."""
    target = catalog.get(name)
    files = roof.build_files(target) | {"xceptile-run": native_runtime.build(target)["xceptile-run"]}
    assert all(len(data) < 50_000 for name, data in files.items() if name != "xceptile-run")
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    (tmp_path / "xceptile-run").chmod(0o755)
    (tmp_path / "in").write_bytes(bytes(64))
    command = [*emulator_command(target), str(tmp_path / "xceptile-run"), "--threads=2", tmp_path]
    done = subprocess.run([*command, tmp_path / "in", tmp_path / "out"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    check_results(target, np.fromfile(tmp_path / "out", np.int32))


def check_results(target: TargetSpec, results: np.ndarray) -> None:
    instruction = roof.best_instruction(target)
    sums, products = np.split(results, [roof.BLOCKS * roof.LANES])
    columns = slice(None, instruction.words)  # the others are never written
    np.testing.assert_array_equal(
        sums.reshape(-1, roof.LANES)[:, columns], expected_sums(instruction.words)[:, columns]
    )
    np.testing.assert_array_equal(
        products.reshape(-1, roof.LANES)[:, columns], expected_products(instruction)[:, columns]
    )


def test_the_roof_of_this_machine_computes_what_it_says(fake_bundle: Path) -> None:
    native = fake_bundle / "native"
    with NativeEngine(native / "roof", threads=2, library=native / "libxceptile.so") as engine:
        check_results(catalog.get("host"), engine.run(np.zeros((1, 64), np.int8))[0])


def loops(assembly: str) -> list[list[str]]:
    """The mnemonics of every loop of one basic block: from a label to the branch back to it."""
    found: list[list[str]] = []
    label, block = "", []
    for line in assembly.splitlines():
        line = line.split("//")[0].split("#")[0].rstrip()
        if re.match(r"\.LBB\w+:", line):
            label, block = line.rstrip(":"), []
        elif line.startswith("\t") and not line.startswith("\t."):
            block.append(line.split()[0])
            if label and line.split()[-1] == label:
                found.append(block)
                label, block = "", []
    return found


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_is_optimized_away(name: str) -> None:
    """One loop has the instruction as often as there are accumulators, and neither loads nor stores."""
    target = catalog.get(name)
    instruction = roof.best_instruction(target)
    assembly = backend.compile_kernels(roof.lower(target), target).mod.inspect_source("asm")
    (loop,) = [each for each in loops(assembly) if instruction.name in each]
    assert loop.count(instruction.name) == instruction.accumulators
    assert not [each for each in loop if re.match(r"v?mov[ua]|ld|st|sub?p", each) and each != "subs"]


@pytest.mark.parametrize("name", TARGETS)
def test_the_plan_counts_what_the_loops_do(name: str) -> None:
    target = catalog.get(name)
    plan, weights = roof.assemble(target)
    assert plan.features == target.features
    assert plan.arena_bytes <= 32 << 20
    assert len(weights) == plan.weights_bytes < 4096
    _, stream, peak = plan.steps
    instruction = roof.best_instruction(target)
    assert peak.macs == peak.tasks * roof.PEAK_ROUNDS * instruction.accumulators * instruction.macs
    assert stream.arguments[0].count * 4 == stream.tasks * roof.BLOCK_BYTES == 30 << 20
    assert unpack(roof.build_files(target)["plan.bin"]) == plan


# ---- the picture ----


def svgs(text: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(each) for each in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def page(folder: Path, profile_: Profile) -> str:
    bundle = write_bundle(folder / "b", manifest(), FILES)
    write_html("t", [Run(bundle, REPORT, profile=profile_)], folder / "report.html")
    return (folder / "report.html").read_text()


def test_the_picture_is_well_formed_and_fetches_nothing(tmp_path: Path) -> None:
    text = page(tmp_path, profile())
    (picture,) = svgs(text)
    dots = [each for each in picture.iter("circle") if each.get("class")]
    assert sorted(str(each.get("class")) for each in dots) == ["kind0", "kind1", "kind2"]
    assert "b<&: 0.250 ms" in "".join(picture.itertext())
    assert "operational intensity, MAC/byte" in "".join(picture.itertext())
    assert text.count('<i class="kind') == 4


def test_dots_lie_below_the_roof_where_rates_do() -> None:
    picture = roofline(profile())
    assert picture is not None
    (left, low), (ridge_x, ridge_y), (right, flat) = picture.roof
    assert left < ridge_x < right
    assert (ridge_x, ridge_y) == pytest.approx(picture.ridge)
    assert flat == pytest.approx(ridge_y)
    assert low > ridge_y  # y grows downwards
    first, second, third = picture.dots
    assert first.y > ridge_y
    assert first.x > ridge_x > second.x > third.x  # 500, 5 and 1 MAC/byte; the ridge at 10
    for tick in (*picture.x_ticks, *picture.y_ticks):
        assert math.isfinite(tick.at)


def test_no_picture_without_a_roof(tmp_path: Path) -> None:
    assert roofline(profile(None)) is None
    assert [bar.share for bar in bars(profile(None))] == [1.0, 0.5, 0.25, 0.25]
    assert not svgs(page(tmp_path, profile(None)))
