"""An Android device behind adb, as far as that goes without a phone: ``fake_adb.sh`` plays one on this machine."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
from support.faulty_bundle import faulty_bundle, plant_fault
from support.small_bundle import COMPILED_SIZE, labelled
from support.tree import TESTS

from xceptile.compile import cli
from xceptile.compile.divergence import first_difference
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.devices import adb, remote
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.session import open_session, place

FAKE = TESTS / "runtime" / "devices" / "fake_adb.sh"


@pytest.fixture
def link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[adb.AdbLink]:
    """The fake device; its /data/local/tmp/xceptile is a folder with a hostile name."""
    (tmp_path / "programs").mkdir()
    shutil.copy(FAKE, tmp_path / "programs" / "adb")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}{os.environ['PATH']}")
    root = PurePosixPath(tmp_path / "tmp $(touch pwned) 'x'\n;" / "xceptile")
    fake = dataclasses.replace(adb.connect("adb:FAKE"), root=root)
    monkeypatch.setattr(adb, "connect", lambda name: fake if name == fake.name else adb.AdbLink(name, name[4:], root))
    remote.facts.cache_clear()
    yield fake
    assert list(tmp_path.rglob("pwned")) == []
    assert not Path("pwned").exists()


def test_a_session_there_is_bit_exact(link: adb.AdbLink, small_bundle: Bundle) -> None:
    x, expected = small_bundle.golden()
    with open_session(small_bundle, device="adb:FAKE") as session:
        np.testing.assert_array_equal(session.engine.run(x), expected)
        assert len(session.engine.time_ms(x[:1], 3, 1)) == 3
        assert session.engine.self_test()
    assert not list(Path(link.root).glob("run.*"))
    assert not list(Path(link.root).rglob("*.part"))
    assert place(small_bundle.manifest.target, "adb:FAKE").device == "adb:FAKE"


def test_the_first_layer_that_differs_there_is_found(
    link: adb.AdbLink, small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty = faulty_bundle(small_bundle, tmp_path / "faulty", "conv1", "native")
    assert first_difference(small_bundle, "native", labelled(3, COMPILED_SIZE), device="adb:FAKE").startswith("no ")
    plant_fault(monkeypatch, "conv1")
    text = first_difference(faulty, "native", labelled(1, COMPILED_SIZE), device="adb:FAKE")
    assert "Conv2d conv1 (conv1) is the first that differs" in text
    assert not list(Path(link.root).glob("run.*"))


def test_a_push_that_breaks_off_fails_clean(
    link: adb.AdbLink, small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_ADB_CUT", "100")
    monkeypatch.setenv("FAKE_ADB_CUT_DONE", str(tmp_path / "cut"))
    with pytest.raises(EngineError, match="device offline"):
        open_session(small_bundle, device="adb:FAKE")
    files = [path.name for path in Path(link.root).rglob("*") if path.is_file()]
    assert all(name.endswith(".part") for name in files)
    x, expected = small_bundle.golden()
    with open_session(small_bundle, device="adb:FAKE") as session:
        np.testing.assert_array_equal(session.engine.run(x), expected)
    assert not list(Path(link.root).rglob("*.part"))


def test_a_device_that_is_not_there(link: adb.AdbLink, small_bundle: Bundle) -> None:
    with pytest.raises(EngineError, match=r"adb:OTHER: cannot be reached: .*device 'OTHER' not found"):
        open_session(small_bundle, device="adb:OTHER")


def test_a_serial_number_is_printed_as_it_is(
    link: adb.AdbLink, small_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), "--device", "adb:X"]) == 2
    assert "error: adb:X: cannot be reached: " in capsys.readouterr().err


def test_a_device_that_hangs_does_not_hold_for_ever(link: adb.AdbLink) -> None:
    with pytest.raises(EngineError, match="adb:FAKE: no answer after 1 s; the device hangs"):
        link.shell("sleep 5", 1.0)
    assert link.shell("echo here").stdout == b"here\n"


@pytest.mark.parametrize(
    "said",
    [
        "* daemon not running; starting now at tcp:5037\n* daemon started successfully\nadb: device 'R5' not found",
        "error: device unauthorized.\nThis adb server's $ADB_VENDOR_KEYS is not set",
        "error: closed",
    ],
)
def test_what_adb_itself_says_is_no_program_s(said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = subprocess.CompletedProcess(["adb"], 1, b"", said.encode())
    monkeypatch.setattr(adb.AdbLink, "_run", lambda self, *words, **limits: done)
    with pytest.raises(EngineError, match="adb:R5: cannot be reached: "):
        adb.connect("adb:R5").shell("true")


def test_without_adb_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="apt install adb"):
        adb.connect("adb:ANY").shell("true")


@pytest.mark.parametrize("name", ["adb:", "adb:-s", "adb:a b", "adb:$(touch pwned)", "adb:x;y", "adb:x\n"])
def test_serial_numbers_that_are_none(name: str) -> None:
    with pytest.raises(EngineError, match="is adb:SERIAL"):
        adb.connect(name)


@pytest.mark.parametrize("name", ["adb:R58M123ABC", "adb:192.168.1.7:5555", "adb:[fe80::1]:5555", "adb:emulator-5554"])
def test_serial_numbers(name: str) -> None:
    assert adb.connect(name).serial == name[4:]
