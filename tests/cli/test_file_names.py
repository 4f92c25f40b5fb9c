"""File names that are not UTF-8, and output that has not every letter: every verb goes on."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_bundle import SIZE, labelled, litert_bundle, model, quantize
from support.tree import ROOT

from xceptile.models import drawn
from xceptile.models.datasets import DatasetError, open_dataset
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.evaluate_engines import contenders, evaluate

LATIN = os.fsdecode(b"caf\xe9.png")  # as a disk of 1999 has it
CLASSES = ("Café", "Löwe")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("names") / "bundle", quantize(replace(model(2), labels=CLASSES)))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(CLASSES):
        (folder / name).mkdir()
        with (folder / name / LATIN).open("wb") as file:
            Image.fromarray(drawn.draw("val", number, SIZE)[0]).save(file, "PNG")
    return folder


def xceptile(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "xceptile.compile.cli", *map(str, words)]
    changed = os.environ | environment
    return subprocess.run(command, env=changed, capture_output=True, text=True, errors="replace", check=False)


ASCII = {"PYTHONIOENCODING": "ascii"}


@pytest.mark.parametrize("environment", [{}, ASCII], ids=["UTF-8", "ASCII"])
def test_run_and_verify_take_any_name(
    bundle: Bundle, photos: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    data = ("--data", photos)
    runs = (
        ("run", bundle.path, photos / CLASSES[0] / LATIN),
        ("verify", bundle.path, *data, "--flips"),
        ("verify", bundle.path, *data, "--results", tmp_path / "r.jsonl", "--json"),
        ("verify", bundle.path, *data, "--results", tmp_path / "r.jsonl", "--json"),  # from the file
    )
    said = [xceptile(*words, **environment) for words in runs]
    assert [(done.returncode, "Error" in done.stderr) for done in said] == [(0, False)] * 4, said
    assert r"caf\xe9.png" in said[0].stdout
    assert ("Café" in said[0].stdout) == (not environment)
    assert (r"Caf\xe9" in said[0].stdout) == bool(environment)
    assert json.loads(said[2].stdout) == json.loads(said[3].stdout)


def test_a_report_shows_the_bytes_of_a_name(bundle: Bundle, tmp_path: Path) -> None:
    """Of images whose class changed, which a report names."""
    pool = [replace(image, label=0) for image in labelled(400)]
    ((truth,), _) = evaluate(contenders(bundle, engines=("reference",)), pool)
    flipped = next(image for image in pool if image.name == truth.flips[0].image)
    (tmp_path / "photos" / CLASSES[0]).mkdir(parents=True)
    with (tmp_path / "photos" / CLASSES[0] / LATIN).open("wb") as file:
        Image.fromarray(flipped.pixels).save(file, "PNG")
    page = tmp_path / "r.html"
    done = xceptile("report", bundle.path, "--data", tmp_path / "photos", "--output", page, "--rounds", 1)
    assert done.returncode == 0, done.stderr
    assert r"caf\udce9.png" in page.read_text("utf-8")


def test_a_checkpoint_whose_library_takes_no_such_name_is_one_line(tmp_path: Path) -> None:
    shutil.copy(ROOT / "models/demo/xception_demo.safetensors", tmp_path / os.fsdecode(b"caf\xe9.safetensors"))
    words = ("--target", "host", "--calibration", "drawn:calibration:2", "--output", tmp_path / "b")
    done = xceptile("compile", "--model", tmp_path / os.fsdecode(b"caf\xe9.safetensors"), *words)
    assert done.returncode == 2
    assert "is not valid UTF-8" in done.stderr
    assert "Traceback" not in done.stderr


# ---- list files ----


def image(path: Path) -> Path:
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(path, "PNG")
    return path


LISTS = {
    "tab": "a.png\tcat\n",
    "space": "a.png cat\n",
    "byte order mark": "\ufeffa.png cat\n",
    "comma": "a.png,cat\n",
    "comma and space": "a.png, cat\n",
    "quoted": '"a.png","cat"\n',
    "a comma in the name": "b, c.png,cat\n",
    "a comma and a tab": "b, c.png\tcat\n",
    "Windows": "a.png,cat\r\n\r\n",
}


@pytest.mark.parametrize("kind", LISTS)
def test_a_list_as_editors_and_spreadsheets_write_it(tmp_path: Path, kind: str) -> None:
    for name in ("a.png", "b, c.png"):
        image(tmp_path / name)
    (tmp_path / "list.txt").write_bytes(LISTS[kind].encode())
    (item,) = open_dataset(tmp_path / "list.txt", labels=("dog", "cat")).items
    assert (item.label, item.name) == (1, "b, c.png" if "b, c" in LISTS[kind] else "a.png")


def test_a_list_without_labels_may_have_commas_in_names(tmp_path: Path) -> None:
    image(tmp_path / "b,c.png")
    (tmp_path / "list.txt").write_text("b,c.png\n")
    (item,) = open_dataset(tmp_path / "list.txt", labels=("dog", "cat")).items
    assert (item.label, item.name) == (None, "b,c.png")


def test_a_list_names_files_as_the_disk_has_them(tmp_path: Path) -> None:
    with (tmp_path / LATIN).open("wb") as file:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(file, "PNG")
    (tmp_path / "list.txt").write_bytes(b"caf\xe9.png\tL\xc3\xb6we\n")
    dataset = open_dataset(tmp_path / "list.txt", labels=CLASSES)
    assert (dataset.items[0].label, dataset.items[0].name) == (1, LATIN)
    assert len(dataset.sha256()) == 64


@pytest.mark.parametrize("text", ['{"a.png": "cat"}', '[["a.png", "cat"]]', '\n\n  {\n "a.png": "cat"\n}'])
def test_json_is_no_list_and_said_to_be_json(tmp_path: Path, text: str) -> None:
    image(tmp_path / "a.png")
    (tmp_path / "list.json").write_text(text)
    with pytest.raises(DatasetError, match="is JSON, not a list of images; write a line for each, `path label`"):
        open_dataset(tmp_path / "list.json", labels=("dog", "cat"))


@pytest.mark.parametrize("data", [b"\x89PNG\r\n\x1a\n\0\0", "a.png\tcat\n".encode("utf-16")])
def test_what_is_no_text_is_said_to_be_none(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "list.txt").write_bytes(data)
    with pytest.raises(DatasetError, match="is no text file"):
        open_dataset(tmp_path / "list.txt", labels=("dog", "cat"))
