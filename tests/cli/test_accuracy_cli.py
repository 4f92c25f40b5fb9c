"""The accuracy verbs as a user meets them: compile --max-drop, sensitivity, recipe, verify's options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from support.small_bundle import litert_bundle

from xceptile.compile import cli
from xceptile.models import drawn
from xceptile.runtime.bundle import Bundle, open_bundle

DATA = "drawn:val:12"


def xceptile(*arguments: object) -> int:
    return cli._invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("cli") / "bundle")


def test_verify_prints_what_holds(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("verify", bundle.path, "--data", DATA, "--flips", "--first-difference", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["engine"], row["images"], row["bit_exact"], row["first_difference"]) == ("litert", 12, True, None)
    assert 0 < row["mcnemar_p"] <= 1
    assert xceptile("verify", bundle.path, "--data", DATA, "--flips") == 0
    assert "McNemar" in capsys.readouterr().out


@pytest.mark.slow
def test_verify_by_several_processes_equals_verify_in_one(
    bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert xceptile("verify", bundle.path, "--data", DATA, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    shared = ("--workers", 2, "--results", tmp_path / "results.jsonl", "--json")
    for _ in range(2):
        assert xceptile("verify", bundle.path, "--data", DATA, *shared) == 0
        assert json.loads(capsys.readouterr().out) == alone
    assert xceptile("verify", bundle.path, "--data", "drawn:val:13", *shared) == 2
    assert "was begun with another data, images" in " ".join(capsys.readouterr().err.split())


def test_sensitivity_lists_the_worst_first(bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("sensitivity", bundle.path, "--data", DATA, "--images", 4, "--top", 5, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert len(rows) == 5
    assert [row["sqnr_db"] for row in rows] == sorted(row["sqnr_db"] for row in rows)
    assert set(rows[0]) == {"name", "path", "kind", "sqnr_db", "flips", "images", "low", "high", "clipped"}
    assert xceptile("sensitivity", bundle.path, "--data", DATA, "--images", 4, "--top", 2) == 0
    text = capsys.readouterr().out
    assert rows[0]["path"] in text
    assert rows[4]["path"] not in text


def test_recipe_prints_presets_and_the_schema(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("recipe", "fast") == 0
    text = capsys.readouterr().out
    (tmp_path / "mine.json").write_text(text)
    assert xceptile("recipe", tmp_path / "mine.json") == 0
    assert capsys.readouterr().out == text
    assert xceptile("recipe", "--schema") == 0
    assert json.loads(capsys.readouterr().out)["title"] == "Xceptile's quantization recipe"
    (tmp_path / "bad.json").write_text('{"schema": 1, "rules": [{"pattern": "*", "bits": 4}]}')
    assert xceptile("recipe", tmp_path / "bad.json") == 2
    assert "rule 0 ('*'): no such field 'bits'" in capsys.readouterr().err


def compile_demo(output: Path, *more: object) -> int:
    arguments = ("--target", "host", "--model", "demo", "--engine", "litert", "--recipe", "min-max", "--images", 4)
    return xceptile("compile", *arguments, "--calibration", "drawn:calibration", "--output", output, *more)


@pytest.mark.slow
def test_compile_within_a_bound_writes_what_was_decided(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bundle"
    assert compile_demo(out, "--max-drop", "10%", "--data", DATA, "--json") == 0
    found = json.loads(capsys.readouterr().out)["accuracy_control"]
    assert (found["met"], found["metric"], found["images"], found["float_layers"]) == (True, "top-1", 12, [])
    manifest = open_bundle(out).manifest
    said = manifest.provenance["accuracy control"]
    assert re.match("top-1 on 12 images of sha256 [0-9a-f]{64}: ", said)  # where they lie is nobody's business
    assert manifest.labels == drawn.LABELS


def test_a_bound_and_its_images_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in (("--max-drop", "1%"), ("--data", DATA)):
        assert compile_demo(tmp_path / "bundle", *more) == 2
        assert "go together" in " ".join(capsys.readouterr().err.split())
    assert compile_demo(tmp_path / "bundle", "--max-drop", "much", "--data", DATA) == 2
    assert "give a share of the images" in " ".join(capsys.readouterr().err.split())
