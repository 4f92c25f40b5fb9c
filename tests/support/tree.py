"""The files of this repository: where its root is, and what lies where below it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SOURCES = ROOT / "runtime" / "native"  # of the runtime, in C
TEST_SOURCES = TESTS / "runtime" / "native"  # in C, of the runtime's tests


def committed() -> list[Path]:
    """Every file in git, relative to the root; skips the test where this is no git checkout."""
    if not (ROOT / ".git").exists():
        pytest.skip(f"needs a git checkout, and {ROOT} is none")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(name) for name in listing.split("\0") if name and (ROOT / name).is_file()]
