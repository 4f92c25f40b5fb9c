"""The report: what it shows, and how it looks in a real browser on a desk and on a phone."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support import fake_network, int8_graphs
from support.browser import look
from support.bundle_files import FILES, manifest
from support.needs import requires

from xceptile.calibration.sensitivity import LayerSensitivity
from xceptile.compile import cli
from xceptile.compile.backends import assembly, cpu
from xceptile.compile.kernels.cuda import lower as cuda
from xceptile.compile.kernels.opencl import lower as opencl
from xceptile.runtime import arena as memory
from xceptile.runtime import plan as plans
from xceptile.runtime.accuracy import Accuracy, Flip, ImageResult, Seen
from xceptile.runtime.benchmark import Moment, Sustained, SustainedWindow
from xceptile.runtime.bundle import Bundle, write_bundle
from xceptile.runtime.charts import arena, histograms, round_numbers
from xceptile.runtime.confusion import confusion
from xceptile.runtime.devices.board import MachineState
from xceptile.runtime.latency import Latency
from xceptile.runtime.layers import LayerTime, Profile, Roof
from xceptile.runtime.obtained import MEASURED, REHEARSED
from xceptile.runtime.report import PICTURES, Run, picture_uri, wilson, write_html
from xceptile.runtime.verdict import Report
from xceptile.targets import catalog

CLASSES = tuple(f"class number {i} with_a_long_name<&>" for i in range(30))
PHONE, DESK = 360, 1280
ESTIMATE = b'{"latency_ms": 1.25, "dtype": "int8", "gpu": "adreno-1", "launch_count": 9, "model": "a roofline"}'


def accuracy(**changes: object) -> Accuracy:
    flips = tuple(
        Flip(f"folder/with/a/long/path/of/photos/image_{i:08}.JPEG", CLASSES[i % 30], CLASSES[0], CLASSES[1], i / 7)
        for i in range(70)
    )
    whole = Accuracy(
        engine="native", device="local", obtained=MEASURED, images=1000, labelled=1000, int8_correct=899,
        float_correct=901, int8_correct_top5=990, float_correct_top5=991, int8_only_correct=4, float_only_correct=6,
        agreeing=930, compared_values=30000, differing_values=0, largest_difference_steps=0, sqnr_db=31.4, flips=flips,
    )  # fmt: skip
    return replace(whole, **changes)  # type: ignore[arg-type]  # the keys are the caller's


def latency(dtype: str, ms: float, seed: int) -> Latency:
    samples = np.random.default_rng(seed).gamma(20, ms / 20, 300)
    return Latency("native", dtype, "local", MEASURED, 2, tuple(samples.tolist()))


def report(**changes: object) -> Report:
    whole = Report(
        "vendor/a-board-with-quite-a-long-name", "0" * 64, "a/folder/of/images", "1" * 64,
        {"processor": "A Processor of 16 Cores @ 2.4 GHz", "cores": "16"}, {"numpy": "2.3.5"},
        {"native/int8": 23_000_000, "litert/float32": 91_000_000},
        (accuracy(), accuracy(engine="tflite-runtime", differing_values=7, largest_difference_steps=2, labelled=0)),
        (latency("int8", 4.0, 0), latency("float32", 20.0, 1)),
    )  # fmt: skip
    return replace(whole, **changes)  # type: ignore[arg-type]  # the keys are the caller's


def bundle(folder: Path) -> Bundle:
    packed = plans.pack(fake_network.plan(), "0" * 64, "0" * 64)
    return write_bundle(
        folder,
        manifest(provenance={"source": "https://example.org/" + "x" * 200}),
        FILES | {"native/plan.bin": packed, "native/estimate.json": ESTIMATE},
    )


def sensitivity() -> tuple[LayerSensitivity, ...]:
    rows = [
        LayerSensitivity(f"blocks.{i}.pointwise", "p", "Conv2d", 20.0 + i, 9 - i % 9, 64, -3.5, 4.5, 0.001)
        for i in range(40)
    ]
    return (*rows, LayerSensitivity("exact", "p", "Relu", math.inf, 0, 64, 0.0, 1.0, 0.0))


def full_run(folder: Path) -> Run:
    layers = tuple(
        LayerTime(
            f"blocks.{i}.sepconvs.1.pointwise",
            "separable_dw",
            "depthwise + pointwise",
            "p",
            10**6 * (i + 1),
            10**4 * (40 - i),
            0.01 * (i + 1),
        )
        for i in range(40)
    )
    windows = tuple(
        SustainedWindow(60.0 * i, 60.0 * i + 60, tuple(latency("int8", 4.0 + i / 10, i).samples_ms), state(60.0 + i))
        for i in range(10)
    )
    dice = np.random.default_rng(0)
    labels = [i % 30 for i in range(1000)]
    predicted = [label if dice.random() < 0.9 else int(dice.integers(30)) for label in labels]
    pixels = dice.integers(0, 256, (80, 80, 3), np.uint8)
    return Run(
        bundle(folder),
        report(),
        tuple(Moment(when, at, state(60.0 + at)) for when, at in (("before", 0.0), ("during", 2.0), ("after", 9.0))),
        Sustained("native", "int8", "local", MEASURED, 2, windows, ()),
        Profile("vendor/board", 2, layers, Roof(900.0, 60.0), "local", "measured"),
        sensitivity(),
        confusion("native", CLASSES, [result(*each) for each in zip(labels, predicted, labels, strict=True)], "native"),
        {flip.image: picture_uri(pixels) for flip in accuracy().flips},
    )


def result(label: int | None, int8: int, float32: int) -> ImageResult:
    seen = Seen("local", MEASURED, (int8,), 0.1, 0.1, 0, 0)
    return ImageResult(0, "image", label, "", (float32,), 1.0, 30, {"native": seen})


def state(degrees: float) -> MachineState:
    return MachineState(
        {"cpu0": "schedutil", "cpu1": "schedutil"}, {"cpu0": 2_400_000, "cpu1": 1_100_000},
        {"cpu-thermal": degrees, "gpu-thermal": degrees - 7}, 1_300_000_000, None, "MAXN (0)",
    )  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with everything on it, and a second run with nearly nothing."""
    folder = tmp_path_factory.mktemp("report")
    bare = Run(
        bundle(folder / "c"), report(target="other/board", accuracies=(accuracy(obtained=REHEARSED),), latencies=())
    )
    write_html("A title", [full_run(folder / "b"), bare], folder / "report.html")
    return folder / "report.html"


def test_nothing_is_fetched_and_nothing_runs(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search(r"""(?:src|href)=["'](?!data:|\#)|@import|url\(|<script|<iframe|<object|\son\w+=""", text)
    assert "default-src 'none'" in text
    assert sorted(p.name for p in page.parent.iterdir() if p.is_file()) == ["report.html"]


def test_names_are_text_not_markup(page: Path) -> None:
    text = page.read_text("utf-8")
    assert "with_a_long_name<&>" not in text
    assert "with_a_long_name&lt;&amp;&gt;" in text


def test_every_section_is_there(page: Path) -> None:
    text = page.read_text("utf-8")
    parts = (
        "89.90 %", "90.10 %", "-0.20", "NO: 7 of 30000 differ, by up to 2", "rehearsed",
        "no time taken", "1.25 ms for int8 on adreno-1", "0.200", "∞",
        "One arena of 3.78 kB", "every sample", "roofline", "by int8", "70 of 1000", "not signed", "0" * 64,
        "0.754", "sustained", "schedutil", "62.0 °C (cpu-thermal)", "MAXN (0)", "1300", "held at most", "23 MB",
    )  # fmt: skip
    assert [part for part in parts if part not in text] == []
    assert text.count("data:image/jpeg") == PICTURES  # none of what bears no labels
    assert [text.count(f'id="{name}"') for name in re.findall(r'<a href="#(\w+)"', text)] == [1] * 8


@requires("chromium", package="chromium")
@pytest.mark.parametrize("width", [PHONE, DESK])
def test_a_browser_shows_it_without_overflow_errors_or_requests(page: Path, width: int) -> None:
    seen = look(page, width)
    assert seen.inner_width == width
    assert seen.scroll_width <= width
    assert seen.too_wide == ()
    assert seen.fetched == ()
    assert seen.console == ()
    assert seen.broken_pictures == ()
    assert seen.small_texts == ()


@requires("chromium", package="chromium")
def test_the_browser_finds_planted_faults(tmp_path: Path) -> None:
    (tmp_path / "fault.html").write_text(
        '<!doctype html><meta http-equiv="Content-Security-Policy" content="default-src \'none\'"><body>'
        '<div style="width: 2000px">x</div><img src="missing.png" alt="gone"></body>'
    )
    seen = look(tmp_path / "fault.html", PHONE)
    assert seen.scroll_width == 2008
    assert len(seen.too_wide) == 1
    assert seen.console
    assert seen.broken_pictures == ("gone",)


# ---- the figures ----


def test_wilson() -> None:
    assert wilson(0, 0) == pytest.approx((math.nan, math.nan), nan_ok=True)
    assert wilson(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_confusion_counts_both_networks() -> None:
    results = [result(*each) for each in ((0, 0, 0), (0, 1, 0), (1, 1, 1), (None, 2, 2), (2, 2, 1))]
    found = confusion("native", ("x", "y", "z"), results, "native")
    assert found is not None
    assert found.matrix == ((1, 1, 0), (0, 1, 0), (0, 0, 1))
    assert [(m.label, m.predicted, m.int8, m.float32) for m in found.mistakes] == [("x", "y", 1, 0), ("z", "y", 0, 1)]
    assert confusion("native", ("x",), [result(None, 0, 0)], "native") is None
    assert confusion("native", ("x",), [result(0, 0, 0)], "litert") is None
    many = confusion("native", tuple(map(str, range(41))), [result(3, 40, 3)], "native")
    assert many is not None
    assert many.matrix == ()
    assert [(m.predicted, m.int8, m.float32) for m in many.mistakes] == [("40", 1, 0)]


def test_residents_of_the_fake_network() -> None:
    """x -> first -> second (back into x's place) -> third -> last; every tensor dies where it is read last."""
    count = fake_network.COUNT
    found = [(r.name, r.offset_bytes, r.size_bytes, r.first, r.last) for r in memory.residents(fake_network.plan())]
    assert found == [
        ("input", 0, count, 0, 0), ("first", 1856, count, 0, 1), ("second", 0, count, 1, 2),
        ("third", 1856, count, 2, 3), ("last", 3712, 10, 3, 3),
    ]  # fmt: skip
    assert memory.live_bytes(fake_network.plan()) == (2 * count, 2 * count, 2 * count, count + 10)
    picture = arena(fake_network.plan())
    assert (picture.peak_bytes, picture.sum_bytes) == (2 * count, 4 * count + 10)


def test_no_two_residents_share_a_byte() -> None:
    tensors = memory.residents(fake_network.plan())
    for a in tensors:
        for b in tensors:
            together = a.first <= b.last and b.first <= a.last and a is not b
            # A step may write over what it reads last.
            assert not (together and a.overlaps(b.offset_bytes, b.size_bytes)) or a.last == b.first or b.last == a.first


@pytest.mark.parametrize("name", ["x86-64-avx2", "raspberry-pi-5"])
def test_residents_are_the_tensors_that_the_compiler_placed(name: str) -> None:
    """A plan does not say which operand a step writes; the report takes it to be the last."""
    graph = int8_graphs.random_xception(96, 0.125, 10)
    target = catalog.get(name)
    calls = cpu.lower(graph, target)
    plan, _ = assembly.assemble(graph, calls, "cpu", target.features)
    last = len(calls) - 1
    placed = sorted((x.size_bytes, max(x.first, 0), min(x.last, last)) for x in assembly.lifetimes(graph, calls))
    assert sorted((x.size_bytes, x.first, x.last) for x in memory.residents(plan)) == placed


@pytest.mark.parametrize(("name", "family"), [("adreno-740", opencl), ("jetson-orin-nano", cuda)])
def test_residents_are_the_tensors_that_the_compiler_placed_for_a_gpu(name: str, family: ModuleType) -> None:
    graph = int8_graphs.random_xception(96, 0.125, 10)
    target = catalog.get(name)
    calls = family.lower(graph, target)
    plan, _ = assembly.assemble(graph, calls, target.engine)
    last = len(calls) - 1
    placed = sorted((x.size_bytes, max(x.first, 0), min(x.last, last)) for x in assembly.lifetimes(graph, calls))
    assert sorted((x.size_bytes, x.first, x.last) for x in memory.residents(plan)) == placed


def test_histograms_hold_every_sample() -> None:
    picture = histograms([latency("int8", 4.0, 0), latency("float32", 20.0, 1)])
    assert picture is not None
    assert all(10 <= mark <= 410 for row in picture.rows for mark in row.marks)
    assert len(picture.ticks) >= 2
    assert histograms([replace(latency("int8", 4.0, 0), samples_ms=())]) is None
    same = histograms([replace(latency("int8", 4.0, 0), samples_ms=(4.0, 4.0))])
    assert same is not None
    assert same.rows[0].marks[0] == pytest.approx(210)


@pytest.mark.parametrize(("low", "high"), [(1.0, 1.02), (0.3, 700.0), (4.1, 4.9), (1e-4, 1e4), (0.99, 1.01)])
def test_round_numbers(low: float, high: float) -> None:
    found = round_numbers(low, high)
    assert 1 <= len(found) <= 8
    assert all(low <= each <= high for each in found)


def test_the_command_line_reports_on_a_bundle(
    small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["report", str(small_bundle.path), "--data", "drawn:val:24", "--output", str(tmp_path / "r.html")]
    quick = ["--rounds", "1", "--sensitivity", "2", "--sustained", "1s"]
    assert cli._invoke(cli.app, words + quick) == 0, capsys.readouterr().err
    text = (tmp_path / "r.html").read_text("utf-8")
    for part in ("2 of 2 engines", "time by layer", "worst first", "sustained", "24 labelled images", "memory over"):
        assert part in text, part
    assert text.count("<figure>") == text.count("data:image/jpeg")
    assert small_bundle.sha256() in text
    assert cli._invoke(cli.app, [*words, "--sustained", "soon"]) == 2
    assert "no duration" in capsys.readouterr().err
