"""A kernel library as a device's loader sees it: it needs no other library, and nothing that only new loaders know."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.int8_graphs import random_operator_graph
from support.needs import requires
from support.small_bundle import compiled_model, quantize

from xceptile.calibration.recipe import QuantRecipe, Rule
from xceptile.compile.backends import cpu, native_runtime, roof
from xceptile.targets import catalog
from xceptile.targets.spec import TargetSpec

pytestmark = requires("readelf", package="binutils")

PAGE_BYTES = 16 * 1024  # of new Android devices: https://developer.android.com/guide/practices/page-sizes
TARGETS = [target for target in catalog.all_targets() if target.engine == "cpu"]
SMALL = QuantRecipe("small", equalize=False)
IN_FLOAT = QuantRecipe("float", (Rule("*", keep_float=True),), equalize=False)
ARCHITECTURES = [catalog.get(name) for name in ("avx2", "arm64", "riscv64")]


def readelf(data: bytes, folder: Path, *what: str) -> str:
    (folder / "library").write_bytes(data)
    command = ["readelf", "--wide", *what, folder / "library"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def check_pages(data: bytes, folder: Path) -> None:
    loaded = [line.split() for line in readelf(data, folder, "--segments").splitlines() if line.startswith("  LOAD")]
    assert len(loaded) > 1
    assert all(int(line[-1], 16) >= PAGE_BYTES for line in loaded), loaded


def check_kernels(data: bytes, folder: Path) -> None:
    check_pages(data, folder)
    assert not re.search(r"^  TLS", readelf(data, folder, "--segments"), re.MULTILINE)
    assert "NEEDED" not in readelf(data, folder, "--dynamic")
    symbols = readelf(data, folder, "--dyn-syms").splitlines()[3:]
    wanted = [line.split()[-1] for line in symbols if " UND " in line]
    assert wanted == ["UND"]  # the table begins with one that has no name
    assert any(line.endswith(" xct_take_kernel_error") for line in symbols)
    assert not re.search("TLS|DTPMOD|IRELATIV", readelf(data, folder, "--relocs"))


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.board)
def test_kernels_of_every_processor_load_anywhere(target: TargetSpec, tmp_path: Path) -> None:
    check_kernels(cpu.build_files(random_operator_graph("conv", (1, 5, 5, 8)), target)["kernels.so"], tmp_path)


@pytest.mark.parametrize("recipe", [SMALL, IN_FLOAT], ids=["int8", "float"])
@pytest.mark.parametrize("target", ARCHITECTURES, ids=lambda target: target.board)
def test_so_do_those_of_a_network_in_int8_and_in_float(target: TargetSpec, recipe: QuantRecipe, tmp_path: Path) -> None:
    graph = quantize(compiled_model(), recipe, images=2).int8_graph
    check_kernels(cpu.build_files(graph, target)["kernels.so"], tmp_path)


@pytest.mark.parametrize(
    "target", [each for each in ARCHITECTURES if roof.knows(each)], ids=lambda target: target.board
)
def test_so_do_those_that_measure_the_machine(target: TargetSpec, tmp_path: Path) -> None:
    check_kernels(roof.build_files(target)["kernels.so"], tmp_path)


@pytest.mark.parametrize("target", ARCHITECTURES, ids=lambda target: target.board)
def test_the_runtime_loads_with_large_pages(target: TargetSpec, tmp_path: Path) -> None:
    for data in native_runtime.build(target).values():
        check_pages(data, tmp_path)
