"""Equal inputs give byte-identical bundles, wherever, whenever and by whichever process they are built."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.tree import ROOT, TESTS

BUILD = """
import sys
from pathlib import Path
from support.small_bundle import write_small_bundle
for name in sys.argv[2:]:
    write_small_bundle(Path(sys.argv[1]) / name, name)
"""


def build(output: Path, targets: list[str], **environment: str) -> dict[str, bytes]:
    """The files of the targets' bundles, built by a process of its own in a directory of its own."""
    work = output / "a folder of work"
    work.mkdir(parents=True)
    variables = {**os.environ, "PYTHONPATH": str(TESTS), "TMPDIR": str(work), **environment}
    command = [sys.executable, "-c", BUILD, str(output / "bundles"), *targets]
    subprocess.run(command, cwd=work, env=variables, check=True, timeout=300)
    files = sorted(path for path in (output / "bundles").rglob("*") if path.is_file())
    return {str(path.relative_to(output / "bundles")): path.read_bytes() for path in files}


OTHERS = ["raspberry-pi-5", "adreno-740", "jetson-orin-nano"]


@pytest.mark.parametrize("targets", [["host"], pytest.param(OTHERS, marks=pytest.mark.slow)], ids=" ".join)
def test_two_builds_are_byte_identical(tmp_path: Path, targets: list[str]) -> None:
    first = build(tmp_path / "a", targets, PYTHONHASHSEED="1", TZ="UTC", OMP_NUM_THREADS="1")
    other = {
        "PYTHONHASHSEED": "77",
        "TZ": "Asia/Tokyo",
        "LC_ALL": "C",
        "HOSTNAME": "elsewhere",
        "SOURCE_DATE_EPOCH": "1",
    }
    second = build(tmp_path / "deeper" / "down" / "b", targets, **other)
    assert len(first) > 10 * len(targets)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    ours = (str(tmp_path), str(ROOT), os.uname().nodename)
    told = [(name, word) for name, data in first.items() for word in ours if len(word) > 5 and word.encode() in data]
    assert told == []
