"""Images are decoded within this process and its memory: a closed list of formats, whatever a file is called."""

from __future__ import annotations

import ast
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import xceptile
from xceptile.compile import cli
from xceptile.models.preprocess import FORMATS, ImageError, InputSpec, keras_input_spec, load_image, timm_input_spec

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


# ---- what Pillow itself does not refuse ----

GREY, RGB, GREY_ALPHA = 0, 2, 4  # PNG's colour types


def png(width: int, height: int, bits: int, colour: int, row: bytes, chunks: bytes = b"") -> bytes:
    """A PNG file of equal rows (PNG specification, section 5)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress((b"\0" + row) * height, 1))
    return b"\x89PNG\r\n\x1a\n" + header + chunks + data + chunk(b"IEND", b"")


def test_grey_of_16_bits_is_refused_with_alpha_too_and_colour_loses_its_lower_byte(tmp_path: Path) -> None:
    for name, colour, row in (("a.png", GREY, b"\x12\x34"), ("b.png", GREY_ALPHA, b"\x12\x34\xff\xff")):
        (tmp_path / name).write_bytes(png(2, 2, 16, colour, row * 2))
        with pytest.raises(ImageError, match=rf"{name}: .*grey with more than 8 bits"):
            load_image(tmp_path / name, SPEC)
    (tmp_path / "c.png").write_bytes(png(2, 2, 16, RGB, b"\x12\xff\x34\x00\x56\x80" * 2))
    assert load_image(tmp_path / "c.png", SPEC)[0, 0].tolist() == [0x12, 0x34, 0x56]
    (tmp_path / "d.png").write_bytes(png(2, 2, 8, GREY_ALPHA, b"\x12\x00" * 2))
    assert load_image(tmp_path / "d.png", SPEC)[0, 0].tolist() == [0x12, 0x12, 0x12]


@pytest.mark.parametrize(
    ("width", "height", "spec", "gigabytes"),
    [
        (1, 60_000, timm_input_spec(), "27.7"),  # 333 x 19,980,000
        (60_000, 1, timm_input_spec(), "27.7"),
        (1, 20_000_000, keras_input_spec(), "25.0"),  # rows are scaled first: 299 x 20,000,000
        (20_000_000, 1, keras_input_spec(), "1.1"),  # the weights of that row
    ],
)
def test_an_image_is_scaled_within_a_gigabyte_or_not_at_all(
    width: int, height: int, spec: InputSpec, gigabytes: str, tmp_path: Path
) -> None:
    (tmp_path / "long.png").write_bytes(png(width, height, 8, GREY, b"\x55" * width))
    with pytest.raises(ImageError, match=rf"it is {width}x{height} pixels, .* takes {gigabytes} GB; crop it"):
        load_image(tmp_path / "long.png", spec)


@pytest.mark.parametrize(("width", "height"), [(1, 60_000), (60_000, 1), (40, 8_000)])
def test_a_long_image_is_scaled_all_the_same(width: int, height: int, tmp_path: Path) -> None:
    (tmp_path / "long.png").write_bytes(png(width, height, 8, GREY, b"\x55" * width))
    assert (load_image(tmp_path / "long.png", keras_input_spec()) == 0x55).all()


def test_a_warning_names_the_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An animation's chunk of no frames, of which Pillow says that it is invalid, and uses the picture."""
    frames = b"acTL" + struct.pack(">II", 0, 0)
    chunk = struct.pack(">I", 8) + frames + struct.pack(">I", zlib.crc32(frames))
    path = tmp_path / "odd\x1b.png"
    path.write_bytes(png(2, 2, 8, GREY, b"\x55\x55", chunk))
    with pytest.warns(UserWarning, match=r"odd\x1b\.png: Invalid APNG") as caught:
        load_image(path, SPEC)
    assert len(caught) == 1
    cli._show_warning(caught[0].message, caught[0].category, caught[0].filename, caught[0].lineno)
    assert (
        capsys.readouterr().err
        == f"warning: {tmp_path}/odd\\x1b.png: Invalid APNG, will use default PNG image if possible\n"
    )
