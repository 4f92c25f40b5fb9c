"""What the repository looks like: its top level, a sentence over every folder, and no word of where it was made."""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path

import pytest
from support.tree import ROOT, committed

FOLDERS = {"calibration", "compile", "docs", "models", "runtime", "targets", "tests"}
FILES = {"LICENSE", "MANIFEST.in", "Makefile", "README.md", "__init__.py", "pyproject.toml"}


def test_the_top_level_is_what_it_was_laid_out_to_be() -> None:
    tops = {path.parts[0]: len(path.parts) == 1 for path in committed() if not path.parts[0].startswith(".")}
    assert {name for name, is_file in tops.items() if is_file} <= FILES
    assert {name for name, is_file in tops.items() if not is_file} <= FOLDERS


def packages() -> list[Path]:
    return sorted(path for folder in ("", *sorted(FOLDERS - {"docs", "tests"})) for path in glob(folder))


def glob(folder: str) -> list[Path]:
    return list((ROOT / folder).rglob("__init__.py")) if folder else [ROOT / "__init__.py"]


@pytest.mark.parametrize("path", packages(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_package_begins_with_a_sentence(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    first = docstring.split("\n\n")[0]
    assert re.fullmatch(r"[A-Z].+[^.]\.", first, re.DOTALL), f"{path}: {first!r}"


# Absolute paths of a developer's machine have no place in a file that others read.
HOME = re.compile(r"(?<![\w.~/])/(?:root|home/\w+|Users/\w+|tmp/\w)[\w./-]*")
ALLOWED_HOME = {Path("tests/repository/test_names.py")}


def text_of(path: Path) -> str:
    try:
        return (ROOT / path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ""


def test_no_file_names_a_path_of_the_machine_it_was_written_on() -> None:
    found = {
        f"{path}: {match[0]}"
        for path in committed()
        if path not in ALLOWED_HOME
        for match in HOME.finditer(text_of(path))
    }
    assert not found


def test_no_file_names_the_directory_it_was_written_in() -> None:
    if len(ROOT.parts) < 3 or os.environ.get("CI") == "true":
        return  # a checkout at the root of a machine, or one whose path says nothing of where the file was written
    here = str(ROOT.parent)
    assert not [str(path) for path in committed() if re.search(rf"(?<![\w./]){re.escape(here)}/", text_of(path))]
