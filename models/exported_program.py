"""Reads an exported program (``.pt2``, PyTorch's PT2 archive) without executing anything that lies in it.

``torch.export.load`` trusts its file: it unpickles what the file says is pickled, evaluates the expressions of open
sizes as Python (``sympy.sympify``), finds operators by any dotted name below ``torch``, imports modules for the types
of inputs, and writes Python with the graph's names in it, which tracing executes. So only what a plain network needs
is handed to it: tensors, and a graph whose every string has been looked at.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from .weights import CheckpointError, first_line

_GRAPH, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_TENSORS = re.compile(r"data/(weights|constants)/(?!custom_obj|opaque_obj)[\w.]+")
# torch/_export/serde/schema.py, ExportedProgram. Left out: guards_code, which is Python.
_PARTS = ("graph_module", "opset_version", "range_constraints", "schema_version", "torch_version", "verifiers")
# A graph within the graph, a class, a function: none is part of a plain network.
_REFUSED = frozenset({"as_graph", "as_custom_obj", "as_operator"})
_RULES = {
    "target": re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.(getitem|add|sub|mul|floordiv|mod|eq|ne|lt|le|gt|ge)"),
    "name": re.compile(r"\w*"),
    "as_name": re.compile(r"\w*"),
}
# What sympy's srepr writes of sizes and of conditions on them.
_EXPRESSIONS = frozenset(
    {
        *("Symbol", "Integer", "Rational", "Add", "Mul", "Pow", "Max", "Min", "And", "Or", "Not"),
        *("FloorDiv", "CeilDiv", "CleanDiv", "Mod", "PythonMod", "ModularIndexing"),
        *("Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan"),
    }
)
_ASSUMPTIONS = frozenset({"positive", "nonnegative", "integer"})
_PLAIN = re.compile(r"[\w .:/+-]*")  # no quotes or brackets: it closes no string and calls nothing


class _Code(ValueError):
    """What is not handed on."""


def load_program(path: str | Path) -> ExportedProgram:
    """A file of ``torch.export.save``. Raises CheckpointError for another, a damaged one and one that holds code."""
    try:
        reader = PT2ArchiveReader(str(path))
        names = reader.get_file_names()
        if unsafe := [n for n in names if any(kind in n for kind in ("custom_obj", "opaque_obj", "aotinductor"))]:
            raise CheckpointError(f"holds {unsafe[0]}, which is code and is not executed; export a plain network", path)
        looked_through = io.BytesIO()
        with PT2ArchiveWriter(looked_through) as writer:
            for name in filter(_TENSORS.fullmatch, names):
                writer.write_bytes(name, reader.read_bytes(name))
            writer.write_string(_GRAPH, json.dumps(_plain_program(json.loads(reader.read_bytes(_GRAPH)))))
            writer.write_bytes(_SAMPLES, b"")
        looked_through.seek(0)
        with _weights_only(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(looked_through)
    except CheckpointError:
        raise
    except _Code as error:
        raise CheckpointError(f"{error}, which is not executed; export a plain network", path) from error
    except Exception as error:  # torch raises many kinds on files that are damaged or hold pickled code
        raise CheckpointError(
            f"is no exported program, or damaged, or holds code ({first_line(error)}); export it again", path
        ) from error


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """torch.export.load falls back to executing pickled code; this variable of torch's forbids it (torch.load)."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


def _plain_program(program: dict[str, Any]) -> dict[str, Any]:
    """The parts that say the network. Raises _Code where a string in them could become code."""
    return {part: _plain(program[part], part) for part in _PARTS if part in program} | {"guards_code": []}


def _plain(value: Any, key: str) -> Any:
    """What lies under ``key``. Of a node's metadata only its module's place is kept."""
    if key in _REFUSED:
        raise _Code(f"has {key.removeprefix('as_')!r} as an operand")
    if key in ("in_spec", "out_spec"):
        _check_structure(value)
    elif key == "metadata":
        return {name: str(value[name]) for name in value if name == "nn_module_stack"}
    elif isinstance(value, dict):
        for name in value:
            _check(name, "name" if key.endswith("_values") else "")
        return {name: _plain(item, name) for name, item in value.items()}
    elif isinstance(value, list):
        return [_plain(item, key) for item in value]
    elif isinstance(value, str) and key not in ("as_string", "as_strings"):  # operands, quoted wherever they go
        _check(value, key)
    return value


def _check(text: str, key: str) -> None:
    if key == "expr_str":
        _check_expression(text)
    elif not _RULES.get(key, _PLAIN).fullmatch(text):
        raise _Code(f"calls {text[:80]!r}" if key == "target" else f"has {text[:80]!r} where a name or a size must be")


def _check_expression(text: str) -> None:
    """Of an open size: nothing but sympy's constructors of arithmetic on integers and symbols."""
    for node in ast.walk(ast.parse(text, mode="eval")):
        match node:
            case ast.Expression() | ast.Call() | ast.Load() | ast.UnaryOp() | ast.USub():
                continue
            case ast.Name(name) if name in _EXPRESSIONS:
                continue
            case ast.keyword(name) if name in _ASSUMPTIONS:
                continue
            case ast.Constant(value) if isinstance(value, int) or (isinstance(value, str) and value.isidentifier()):
                continue
        raise _Code(f"has the size {text[:80]!r}")


def _check_structure(spec: str) -> None:
    """Of inputs or outputs (torch.utils._pytree): lists, tuples and dicts, named by strings. Others import modules."""

    def check(tree: dict[str, Any]) -> None:
        context = json.loads(tree["context"] or "null")
        plain = context is None or (isinstance(context, list) and all(isinstance(key, str) for key in context))
        if tree["type"] not in (None, "builtins.tuple", "builtins.list", "builtins.dict") or not plain:
            raise _Code(f"has inputs or outputs of type {str(tree['type'])[:80]!r}")
        for child in tree["children_spec"]:
            check(child)

    check(json.loads(spec)[1])
