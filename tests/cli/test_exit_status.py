"""Whatever happens, 1 is a regression and nothing else: any exception is one line and status 2."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from xceptile.compile import cli, doctor
from xceptile.models.graph import GraphError
from xceptile.runtime.said import said


class Panic(BaseException):
    """As a library in Rust raises it."""


NO_LIBRARY = "libx.so.1: cannot open shared object file"
STATIC_TLS = "/usr/lib/libgomp.so.1: cannot allocate memory in static TLS block"
OUR_OWN = ModuleNotFoundError("No module named 'xceptile.gone'", name="xceptile.gone")

CASES = [
    (
        ImportError("libcublas.so.12: cannot open shared object file", name="torch"),
        "the package torch is installed, but",
    ),
    (ImportError("cannot import name 'x'"), "a package is installed, but importing it fails: cannot import name 'x'"),
    (ImportError(STATIC_TLS, name="torch"), "start again with LD_PRELOAD=/usr/lib/libgomp.so.1"),
    (ModuleNotFoundError("No module named 'PIL'", name="PIL.Image"), "pip install 'xceptile[device]'"),
    (ModuleNotFoundError("No module named 'safetensors'", name="safetensors"), "pip install 'xceptile[gate]'"),
    (ModuleNotFoundError("No module named 'tvm'", name="tvm"), "pip install 'xceptile[compile]'"),
    (OUR_OWN, "xceptile.gone"),
    (GraphError("a whole sentence"), "error: a whole sentence"),
    (FileNotFoundError(2, "No such file or directory", "x.png"), "x.png: No such file or directory"),
    (AssertionError("odd"), "AssertionError: odd"),
    (TypeError("odd"), "TypeError: odd"),
    (StopIteration(), "StopIteration"),
    (KeyError("a key"), "KeyError: a key"),
    (ZeroDivisionError("by\nzero"), "ZeroDivisionError: by zero"),
    (UnicodeEncodeError("utf-8", "\udcff", 0, 1, "surrogates not allowed"), "surrogates not allowed"),
    (RecursionError("deep"), "RecursionError: deep"),
    (MemoryError(), "MemoryError"),
    (SystemExit(1), "SystemExit: 1"),
    (SystemExit("a library's last word"), "a library's last word"),
    (Panic("index out of bounds"), "Panic: index out of bounds"),
]


def app_that_raises(error: BaseException) -> typer.Typer:
    app = typer.Typer()

    @app.command()
    def verb() -> None:
        raise error

    return app


@pytest.mark.parametrize(
    ("error", "line"), CASES, ids=[type(error).__name__ + str(i) for i, (error, _) in enumerate(CASES)]
)
def test_any_exception_is_one_line_and_status_2(
    error: BaseException, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli._invoke(app_that_raises(error), []) == 2
    first, *more = capsys.readouterr().err.splitlines()
    assert first.startswith("error: ")
    assert line in first
    assert more in ([], ["(run again with --debug for the traceback)"])
    assert bool(more) == (not said(error).whole)
    assert cli._invoke(app_that_raises(error), ["--debug"]) == 2
    assert "Traceback (most recent call last)" in capsys.readouterr().err


def test_a_verb_s_own_status_is_kept() -> None:
    for status in (0, 1, 3):
        assert cli._invoke(app_that_raises(typer.Exit(status)), []) == status
    assert cli._invoke(app_that_raises(KeyboardInterrupt()), []) == cli.INTERRUPTED


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_package_that_cannot_be_imported_at_the_start(tmp_path: Path, package: str) -> None:
    (tmp_path / f"{package}.py").write_text(
        "raise ImportError('libx.so.1: cannot open shared object file', name=__name__)"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "xceptile.compile.cli", "targets"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    line = f"error: the package {package} is installed, but importing it fails: {NO_LIBRARY}\n"
    assert done.stderr == line


def test_doctor_imports_what_it_calls_ok(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "safetensors.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    (tmp_path / "h5py.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    names = ("pillow", "safetensors", "h5py")
    rows = {row[1]: row for row in doctor._PACKAGES}
    good = doctor._package(*rows["pillow"])
    assert (good.ok, good.detail.partition(" ")[0]) == (True, "pillow")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    broken, crashed = (doctor._package(*rows[name]) for name in names[1:])
    assert not broken.ok
    assert "importing it fails: ImportError: libgomp.so.1: cannot open shared object file" in broken.detail
    assert not crashed.ok
    assert "importing it fails: it was ended by signal 11" in crashed.detail
    missing = doctor._package("do", "no-such-package", "import x", "gate")
    assert missing.detail == "no-such-package is not installed: pip install 'xceptile[gate]'"


def test_every_row_of_doctor_imports_something() -> None:
    for _, name, start, extra in doctor._PACKAGES:
        assert start.startswith(("import ", "from ")), name
        assert extra in ("compile", "cuda", "device", "gate", "sign", "ray")
