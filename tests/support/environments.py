"""Python environments that hold just what is asked for, made of links to what is installed here: no network."""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from support.tree import ROOT


def build_wheel(work: Path) -> Path:
    """The wheel of this tree, built from a copy in ``work / "source"``, so that nothing left over gets into it."""
    hidden = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "docs")
    shutil.copytree(ROOT, work / "source", ignore=hidden)
    if not (work / "source" / "README.md").exists():
        (work / "source" / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", work, work / "source"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    (built,) = work.glob("*.whl")
    return built


def make_environment(folder: Path, wheel: Path, extras: Iterable[str] = ()) -> Path:
    """The Python of a new environment with the wheel and what it requires with ``extras``, and nothing else."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    python = folder / "bin" / "python"
    install = [python, "-m", "pip", "install", "--no-index", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True, text=True)
    (ours,) = importlib.metadata.distributions(name="xceptile", path=[str(site_packages(python))])
    link_requirements(ours.requires or (), ("", *extras), site_packages(python), set(), own=ours)
    return python


def site_packages(python: Path) -> Path:
    return next(python.parents[1].glob("lib/python*/site-packages"))


def link_requirements(
    requirements: Iterable[str],
    extras: Iterable[str],
    site: Path,
    done: set[tuple[str, str]],
    own: importlib.metadata.Distribution | None = None,
) -> None:
    """Makes what the requirements ask for, with ``extras``, importable in another environment, and what that needs.

    ``own`` is the distribution that is there already, whose extras may name each other.
    """
    for requirement in map(Requirement, requirements):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        wanted = [extra for extra in ("", *sorted(requirement.extras)) if (name, extra) not in done]
        done |= {(name, extra) for extra in wanted}
        if not wanted:
            continue
        if own is not None and name == own.name:
            link_requirements(own.requires or (), wanted, site, done, own)
            continue
        distribution = importlib.metadata.distribution(requirement.name)
        assert distribution.version in requirement.specifier, f"{requirement}, and {distribution.version} is installed"
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
        link_requirements(distribution.requires or (), wanted, site, done, own)
