"""The package as it is shipped: complete, importable with numpy alone, and its commands run from anywhere."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.environments import build_wheel, link_requirements, make_environment, site_packages
from support.tree import ROOT, committed

FOLDERS = ("calibration", "compile", "models", "runtime", "targets")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def packages_on_disk() -> list[Path]:
    """Every folder of the package, relative to the root."""
    return sorted(path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("__init__.py"))


def test_every_folder_is_listed() -> None:
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    assert listed == {"xceptile", *(".".join(("xceptile", *path.parts)) for path in packages_on_disk())}


def test_every_folder_with_python_is_a_package() -> None:
    holding = {path.parent.relative_to(ROOT) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")}
    assert holding == set(packages_on_disk())


def test_set_up_brings_every_package_that_a_test_is_skipped_without() -> None:
    """On CI a skipped test is a failed one."""
    brought = set(re.findall(r'^ {4}"([\w-]+):', (ROOT / ".ci/setup").read_text(), re.MULTILINE))
    for path in (ROOT / "tests").rglob("*.py"):
        wanted = re.findall(
            r'requires\([^)]*package="([\w-]+)"|needs [\w ]+ \(apt install ([\w -]+)\)', path.read_text()
        )
        if path.name != "test_conftest.py":
            assert {name for names in wanted for name in " ".join(names).split()} <= brought, path


def test_the_tests_are_no_package() -> None:
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The Python of an environment with this wheel and numpy, and nothing else."""
    environment = tmp_path_factory.mktemp("device")
    yield make_environment(environment, wheel)
    shutil.rmtree(environment)


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_wheel_holds_every_file(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    assert not {f"xceptile/{path}" for path in committed() if path.parts[0] in FOLDERS} - held


def test_the_wheel_holds_nothing_else(wheel: Path) -> None:
    allowed = re.compile(r"xceptile/(__init__\.py|(" + "|".join(FOLDERS) + r")/)|xceptile-[^/]+\.dist-info/")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if not allowed.match(name)]


def test_the_source_distribution_holds_what_the_wheel_holds(wheel: Path, tmp_path: Path) -> None:
    source = wheel.parent / "source"
    (source / "tests").mkdir()
    (source / "tests" / "test_a.py").touch()  # which setuptools would take along, without what it needs
    program = "import sys; from setuptools import build_meta; print(build_meta.build_sdist(sys.argv[1]))"
    name = run(sys.executable, "-c", program, tmp_path, cwd=source).split()[-1]
    with tarfile.open(tmp_path / name) as archive:
        held = {Path(*Path(member.name).parts[1:]).as_posix() for member in archive if member.isfile()}
    of_wheel = {n.removeprefix("xceptile/") for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    made = {"PKG-INFO", "setup.cfg"}
    extra = {n for n in held - of_wheel - made if not n.startswith("xceptile.egg-info/")}
    assert of_wheel <= held
    assert extra == {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}


def test_a_device_needs_numpy_alone(device: Path, tmp_path: Path) -> None:
    names = [path.relative_to(ROOT) for path in (ROOT / "runtime").rglob("*.py")]
    names.remove(Path("runtime/pytest_plugin.py"))  # which pytest alone imports
    modules = [".".join(("xceptile", *name.with_suffix("").parts)).removesuffix(".__init__") for name in names]
    program = f"import importlib\nfor name in {['xceptile', *modules]}: print(importlib.import_module(name).__name__)"
    assert run(device, "-c", program, cwd=tmp_path).split() == ["xceptile", *modules]


def test_the_command_line_names_the_extra_that_is_missing(device: Path, tmp_path: Path) -> None:
    result = subprocess.run([device.parent / "xceptile"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr == "error: this needs the package typer: pip install 'xceptile[device]'\n"


def test_the_commands_run_from_another_directory(device: Path, tmp_path: Path) -> None:
    link_requirements(PYPROJECT["project"]["optional-dependencies"]["cli"], ("",), site_packages(device), set())
    assert "--target" in run(device.parent / "compile", "--help", cwd=tmp_path)
    assert "compile" in run(device.parent / "xceptile", "--help", cwd=tmp_path)
    assert "raspberry-pi-5" in run(device.parent / "xceptile", "targets", cwd=tmp_path)
    (tmp_path / "a.png").touch()
    options = ("--target", "arm64", "--model", "demo", "--calibration", tmp_path, "--output", tmp_path / "bundle")
    result = subprocess.run([device.parent / "compile", *options], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 2
    assert re.fullmatch(r"error: this needs the package \w+: pip install 'xceptile\[compile\]'\n", result.stderr)


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    program = "import sys, xceptile; print(sorted({'torch', 'tvm', 'ai_edge_litert', 'numpy'} & set(sys.modules)))"
    assert run(sys.executable, "-c", program, cwd=tmp_path).strip() == "[]"
