"""A full folder for temporary files is one line and status 2, though LLVM would end the whole process with status 1."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.needs import requires_hardware, requires_module
from support.tree import TESTS

MOUNT = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o "size=$1" tmpfs "$2" && shift 2 && exec "$@"', "sh"]


def may_mount() -> bool:
    command = [*MOUNT, "64k", "/mnt", "true"]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


BUILD = """
import sys
from pathlib import Path
from support import int8_graphs
from support.small_bundle import compiled_model, quantize
from xceptile.calibration.recipe import QuantRecipe
from xceptile.compile import cli
from xceptile.compile.backends import cpu, native_runtime, relax_vm
from xceptile.targets import catalog

def verb() -> None:
    graph = quantize(compiled_model(), QuantRecipe("small", equalize=False), 2).int8_graph
    {"native": cpu.build_files, "relax-vm": relax_vm.build}[sys.argv[1]](graph, catalog.get("host"))

app = cli.typer.Typer()
app.command()(verb)
sys.exit(cli._invoke(app, []))
"""

pytestmark = [
    requires_hardware(may_mount(), "right to mount a small file system"),
    requires_module("tvm", package="apache-tvm"),
]


@pytest.mark.parametrize("size", ["16k", "64k"])
@pytest.mark.parametrize("backend", ["native", "relax-vm"])
def test_a_full_temporary_folder_is_one_line(tmp_path: Path, size: str, backend: str) -> None:
    folder = tmp_path / "full"
    folder.mkdir()
    environment = os.environ | {"PYTHONPATH": str(TESTS), "TMPDIR": str(folder)}
    command = [*MOUNT, size, str(folder), sys.executable, "-c", BUILD, backend]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "LLVM ERROR" not in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("error: ")
