"""`xceptile inspect` says what holds of the bundle at hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.bundle_files import FILES, manifest

from xceptile.compile import cli
from xceptile.models.preprocess import PixelEncoding
from xceptile.runtime.bundle import write_bundle


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (PixelEncoding(None), "1x2x2x3 int8, pixel - 128"),
        (PixelEncoding(tuple((v % 7, v % 5, 0) for v in range(256))), "1x2x2x3 int8, pixels through a table"),
    ],
    ids=["folded", "table"],
)
def test_how_pixels_enter(pixels: PixelEncoding, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_bundle(tmp_path / "b", manifest(pixels=pixels), FILES)
    assert cli._invoke(cli.app, ["inspect", str(tmp_path / "b")]) == 0
    assert said in capsys.readouterr().out


def test_a_file_is_told_that_it_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.pth").write_bytes(b"data")
    assert cli._invoke(cli.app, ["inspect", str(tmp_path / "net.pth")]) == 2
    assert "net.pth: is a file, and a bundle is a directory" in capsys.readouterr().err
