"""Bundles for GPUs: what they hold, what they say of themselves, and their estimates."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.int8_graphs import Int8Builder, as_float, photo
from support.small_bundle import litert_bundle, write_small_bundle

from xceptile.calibration.table import CalibrationTable
from xceptile.compile import artefacts, cli
from xceptile.compile.gpu_cost import MODEL
from xceptile.runtime.bundle import Bundle, open_bundle
from xceptile.targets import catalog


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_small_bundle(tmp_path_factory.mktemp("gpu") / "adreno", "adreno-740")


def test_it_holds_int8_and_its_rival_and_the_files_for_the_delegate(bundle: Bundle) -> None:
    held = [(a.engine, a.dtype) for a in open_bundle(bundle.path).manifest.artefacts]
    assert held == [
        ("native", "int8"),
        ("native", "float16"),
        ("litert", "int8"),
        ("litert", "float32"),
        ("gpu-delegate", "float16"),
        ("gpu-delegate", "int8"),
    ]


def test_the_manifest_says_what_the_delegate_does_with_each_operator(bundle: Bundle) -> None:
    told = bundle.manifest.provenance["GPU delegate, litert/gpu_float16.tflite"]
    assert "CONV_2D: gpu" in told
    assert "falls back" not in told


def test_estimate_says_estimated_and_names_the_faster(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._invoke(cli.app, ["estimate", str(bundle.path), "--json"]) == 0
    builds = json.loads(capsys.readouterr().out)
    assert [each["dtype"] for each in builds] == ["int8", "float16"]
    assert all(each["obtained"] == "estimated" and each["model"] == MODEL for each in builds)
    assert cli._invoke(cli.app, ["estimate", str(bundle.path), "--layers"]) == 0
    faster = min(builds, key=lambda each: each["latency_ms"])["dtype"]
    shown = " ".join(capsys.readouterr().out.split())
    assert f"The faster by the model is {faster}." in shown
    assert "estimated" in shown


def test_a_processors_bundle_has_no_estimate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    litert_bundle(tmp_path / "host")
    assert cli._invoke(cli.app, ["estimate", str(tmp_path / "host")]) == 2
    assert "xceptile bench" in capsys.readouterr().err


@pytest.mark.slow
def test_without_a_float16_kernel_there_is_no_rival_and_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resize has an int8 kernel on CUDA and none in float16."""
    build = Int8Builder("resized")
    x = build.conv(build.input(photo(9, 9)), 8, (3, 3))
    int8 = build.graph(build.resize(x, (14, 14), "bilinear", "half pixel"))
    monkeypatch.setattr(artefacts, "check_float16_range", lambda graph, table: None)
    made = artefacts.native_gpu(
        int8, as_float(int8), catalog.get("jetson-agx-orin"), CalibrationTable({}, 0, ""), lambda what, share: None
    )
    assert [(a.engine, a.dtype) for a in made.artefacts] == [("native", "int8")]
    assert "resize_0" in made.told["no float16 build"]
