"""A network with one output, or images without labels: no verb gives a verdict that cannot fail."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image
from support.small_bundle import SIZE, litert_bundle, model, quantize

from xceptile.compile import cli
from xceptile.models import drawn
from xceptile.runtime.bundle import Bundle

COUNT = 6


def xceptile(*arguments: object) -> int:
    return cli._invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("one") / "bundle", quantize(model(1)))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("several") / "bundle")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images without labels."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(COUNT):
        Image.fromarray(drawn.draw("val", i, SIZE)[0]).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def labelled(photos: Path) -> Path:
    """The same, in a list in which each bears the label 0."""
    path = photos.parent / "list.txt"
    path.write_text("".join(f"{photos / f'{i}.png'}\t0\n" for i in range(COUNT)))
    return path


@pytest.mark.parametrize("case", ["one output", "one output, labels", "no labels"])
def test_verify_says_how_far_and_nothing_of_classes(
    one: Bundle, several: Bundle, photos: Path, labelled: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, data = (
        (several if case == "no labels" else one),
        (labelled if "labels" in case[3:] and "one" in case else photos),
    )
    arguments = ("verify", bundle.path, "--data", data, "--flips")
    assert xceptile(*arguments) == 0
    text = capsys.readouterr().out
    assert "%" not in text
    assert "class changed" not in text
    assert "McNemar" not in text
    assert ("one output" in text) == case.startswith("one")
    assert ("bear no labels" in text) == (case == "no labels")
    assert xceptile(*arguments, "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["images"], row["labelled"], row["flips"], row["correct"], row["mcnemar_p"]) == (COUNT, 0, [], "", None)
    assert 0 < row["sqnr_db"] < 200


def test_classes_are_compared_where_images_bear_labels(several: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("verify", several.path, "--data", "drawn:val:6") == 0
    assert capsys.readouterr().out.count("%") >= 3


@pytest.mark.parametrize("case", ["one output", "no labels"])
def test_a_gate_is_by_distance_and_can_fail(
    one: Bundle, several: Bundle, photos: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, path = (one if case == "one output" else several), tmp_path / "b.json"
    where = ("--data", photos, "--rounds", 6)
    assert xceptile("baseline", bundle.path, *where, "--output", path) == 0
    generous = ("--max-latency", 1000, "--max-slowdown", 1000, "--json")
    for lost, outcome in ((0.0, "pass"), (1.5, "fail")):
        data = json.loads(path.read_text())
        for devices in data["baselines"].values():
            for report in devices.values():
                for accuracy in report["accuracies"]:
                    accuracy["sqnr_db"] += lost
        path.write_text(json.dumps(data))
        capsys.readouterr()
        xceptile("check", bundle.path, *where, "--baseline", path, *generous)
        findings = {f["what"]: f for f in json.loads(capsys.readouterr().out)["findings"]}
        assert not any(what.startswith("top-1") for what in findings)
        found = findings["distance from float, litert on local"]
        assert found["outcome"] == outcome
        assert re.match(r"SQNR \d+\.\d dB, baseline \d+\.\d dB, 1 dB less allowed; no top-1: ", found["reason"])


def test_no_bound_of_top1_is_promised(
    one: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused before calibration, in one line."""
    monkeypatch.setattr("xceptile.compile.pipeline.quantize_model", None)
    common = ("--target", "host", "--calibration", "drawn:calibration:4", "--engine", "litert", "--max-drop", "1%")
    output = ("--output", tmp_path / "b")
    assert xceptile("compile", "--model", "demo", *common, *output, "--data", photos) == 2
    assert "whose images bear labels" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_the_report_and_sensitivity_show_no_classes(
    one: Bundle, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "r.html"
    assert xceptile("report", one.path, "--data", photos, "--output", page, "--rounds", 1, "--sensitivity", 2) == 0
    text = page.read_text()
    assert "same class as float" not in text
    assert "No classes were compared" in text
    assert "100.00 %" not in text
    assert "0 of 2" not in text
    assert xceptile("sensitivity", one.path, "--data", photos, "--images", 2, "--top", 1) == 0
    assert re.search(r" - +-?\d", capsys.readouterr().out)
