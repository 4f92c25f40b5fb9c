"""Images are decoded within this process: a closed list of formats, whatever a file is called."""

from __future__ import annotations

import ast
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xceptile
from xceptile.models.preprocess import FORMATS, ImageError, InputSpec, load_image

SPEC = InputSpec(20, 20)
STUBS = {"BUFR", "GRIB", "HDF5", "WMF"}  # that Pillow names and cannot write
MODES = {"BLP": "P", "MSP": "1", "PALM": "P", "XBM": "1"}  # of the others that take no RGB
Image.init()


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24, 3), np.uint8))


def test_no_program_is_started_on_what_a_file_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, picture: Image.Image
) -> None:
    """PostScript under the name of a JPEG, with a Ghostscript at hand: Pillow would run it."""
    started = tmp_path / "started"
    for program in ("gs", "djpeg"):
        (tmp_path / program).write_text(f"#!/bin/sh\necho {program} >> {started}\nexit 1\n")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    picture.save(tmp_path / "photo.jpg", "EPS")
    with pytest.raises(ImageError, match=r"photo\.jpg: cannot be read as an image \(it holds none of BMP, GIF, JPEG"):
        load_image(tmp_path / "photo.jpg", SPEC)
    assert not started.exists()


@pytest.mark.parametrize("format_", sorted(set(Image.SAVE) - STUBS))
def test_what_is_not_in_the_list_is_refused_and_the_list_is_read(
    format_: str, tmp_path: Path, picture: Image.Image
) -> None:
    """Every format that Pillow can write, under a name that promises another."""
    made, path = (
        tmp_path / "made.by_pillow",
        tmp_path / "photo.png",
    )  # the SPIDER writer takes over the ending it is given
    picture.convert(MODES.get(format_, "RGB")).save(made, format_)
    made.rename(path)
    if format_ in FORMATS or format_ == "MPO":  # MPO: JPEGs one after the other, the first of which is read
        assert load_image(path, SPEC).shape == (20, 20, 3)
    else:
        with pytest.raises(ImageError, match="it holds none of"):
            load_image(path, SPEC)


def test_images_are_opened_in_one_place_with_the_list() -> None:
    root = Path(xceptile.__file__).parent
    calls = {}
    for folder in ("models", "runtime", "calibration", "compile"):
        for path in (root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) == "Image.open":
                    calls[path.relative_to(root).as_posix()] = [word.arg for word in node.keywords]
    assert calls == {"models/preprocess.py": ["formats"]}
