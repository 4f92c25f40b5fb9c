"""The rule about skips on CI, tried on a suite of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.tree import TESTS

SUITE = """
import pytest
from support.needs import requires, requires_hardware, requires_module

@requires("no-such-program", package="no-such-package")
def test_program(): ...

@requires_module("no_such_module", package="no-such-package")
def test_module(): ...

@requires_hardware(False, "GPU")
def test_hardware(): ...

def test_import(): pytest.importorskip("no_such_module")

@pytest.mark.xfail(strict=True, reason="planted")
def test_known_failure(): assert False

def test_runs(): ...
"""


@pytest.mark.parametrize(
    ("ci", "expected"),
    [
        ("", {"passed": 1, "skipped": 4, "xfailed": 1}),
        ("true", {"failed": 1, "errors": 2, "passed": 1, "skipped": 1, "xfailed": 1}),
    ],
)
def test_only_hardware_may_be_missing_on_ci(tmp_path: Path, ci: str, expected: dict[str, int]) -> None:
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    (tmp_path / "support").mkdir()
    (tmp_path / "support" / "needs.py").write_text((TESTS / "support" / "needs.py").read_text())
    (tmp_path / "test_suite.py").write_text(SUITE)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), "-q", str(tmp_path)],
        cwd=tmp_path,
        env={**os.environ, "CI": ci, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    summary = result.stdout.splitlines()[-1]
    assert {word: int(count) for count, word in re.findall(r"(\d+) (\w+)", summary)} == expected, result.stdout
