"""Reads an exported program (``.pt2``, a file of ``torch.export.save``), as data and no more.

``torch.export.load`` trusts its file: it unpickles, evaluates the expressions of open sizes, finds operators by any
dotted name below ``torch``, imports modules, and compiles Python that it puts together from the file's strings. So
torch takes no part in this. The archive (``pt2_archive.py``) holds JSON that says the network: nodes, operators,
operands. What is read of it is compared with names that are known here, or copied; nothing evaluates, compiles, imports
or unpickles. Source: torch 2.13, torch/_export/serde/schema.py.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .aten import (
    Argument,
    Operation,
    Program,
    Ref,
    Size,
    Unreadable,
    import_program,
    is_torch_layer,
    module_path,
)
from .graph import Graph
from .pt2_archive import OLD_PROGRAM, RENEW, Archive, SavedProgram, Unsound, expect, get, shown, variant
from .read_file import check_file

SCHEMAS = (7, 8)  # of torch 2.5, and of 2.6 to 2.13
NODES_LIMIT = 10_000  # of the largest networks of images that are known a tenth
NAME_LIMIT = 1_000
# A weight becomes float32: eight times is two names for each of two bytes.
CONSTANTS_LIMIT = 8  # times the file


class ProgramError(ValueError):
    """A file that is no exported program, a damaged one, or one with parts that are not read. ``path`` is the file."""

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


def is_program(path: str | Path) -> bool:
    """Whether it is a zip as ``torch.export.save`` writes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return not {"archive_format", OLD_PROGRAM}.isdisjoint(Archive(archive, Path(path).stat().st_size).members)
    except (OSError, zipfile.BadZipFile, Unsound):
        return False


def load_graph(path: str | Path, name: str) -> Graph:
    """The network in a file of ``torch.export.save``; an open batch becomes 1.

    Raises ProgramError for a file that is no program, damaged, or asks for more memory than its size allows;
    UnsupportedLayer for what a graph cannot say.
    """
    return import_program(load_program(path), None, name, CONSTANTS_LIMIT * Path(path).stat().st_size)


def load_program(path: str | Path) -> Program:
    """The program in a file, before any of its operators is looked at. Raises ProgramError; OSError for no file."""
    check_file(path)
    try:
        with zipfile.ZipFile(path) as archive:
            return _program(SavedProgram(Archive(archive, Path(path).stat().st_size)))
    except Unsound as error:
        raise ProgramError(str(error), path) from error
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        EOFError,
        RecursionError,
        UnicodeError,
        json.JSONDecodeError,
    ) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise ProgramError(f"is no exported program, or damaged ({reason}); export it again", path) from e


def _program(saved: SavedProgram) -> Program:
    schema = get(get(saved.program, "schema_version", dict), "major", int)
    if schema not in SCHEMAS:
        raise Unsound(f"has the schema {schema}; {' and '.join(map(str, SCHEMAS))} are read; {RENEW}")
    module = get(saved.program, "graph_module", dict)
    graph, signature = get(module, "graph", dict), get(module, "signature", dict)
    nodes, values = get(graph, "nodes", list), get(graph, "tensor_values", dict)
    if len(nodes) > NODES_LIMIT:
        raise Unsound(f"holds {len(nodes)} nodes; {NODES_LIMIT} are read at most")
    inputs, weights = [], {}
    for spec in get(signature, "input_specs", list):
        kind, body = variant(spec, "input")
        if kind == "user_input":
            inputs.append(_input(get(body, "arg", dict), values))
        elif kind in _STORED:
            name = _text(get(body, _STORED[kind], str))
            weights[_name(get(body, "arg", dict))] = (name, saved.weight(name))
        else:
            inputs.append((kind, None))
    outputs, changed = [], []
    for spec in get(signature, "output_specs", list):
        kind, body = variant(spec, "output")
        if kind == "user_output":
            what, value = variant(get(body, "arg", dict), "output")
            outputs.append(_name(value) if what == "as_tensor" else None)
        elif kind in _CHANGED:
            changed.append(_text(get(body, _CHANGED[kind], str)))
        elif kind != "user_input_mutation":
            raise Unsound(f"has the output {shown(kind)}; export a network for inference")
    operations = tuple(_operation(node, values) for node in nodes)
    return Program(tuple(inputs), weights, operations, tuple(outputs), tuple(changed))


_STORED = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_CHANGED = {"buffer_mutation": "buffer_name", "parameter_mutation": "parameter_name"}


def _input(argument: Any, values: Mapping[str, Any]) -> tuple[str, tuple[Size, ...] | None]:
    kind, value = variant(argument, "input")
    return (_name(value), _shape(_name(value), values)) if kind == "as_tensor" else (kind, None)


def _shape(name: str, values: Mapping[str, Any]) -> tuple[Size, ...] | None:
    """Of a tensor; None where the file does not say it."""
    meta = values.get(name)
    return None if meta is None else tuple(_size(size) for size in get(meta, "sizes", list))


def _size(size: Any) -> Size:
    """A number or a symbol. An expression stays text, which nobody reads but for an error."""
    kind, value = variant(size, "size")
    if kind == "as_int":
        return expect(value, int, "size")
    text = get(value, "expr_str", str)
    if number := re.fullmatch(r"(?:Integer\()?(\d{1,18})\)?", text):
        return int(number[1])
    symbol = re.fullmatch(r"Symbol\('(\w{1,80})'(?:, \w+=True)*\)", text)
    return symbol[1] if symbol else text


def _operation(node: Any, values: Mapping[str, Any]) -> Operation:
    target = _text(get(node, "target", str)).removeprefix("torch.ops.")
    results: list[str] = []
    shape = None
    for output in get(node, "outputs", list):
        kind, value = variant(output, "output")
        if kind in _NAMED_SIZES:
            results.append(_text(get(value, "as_name", str)))
        elif kind in ("as_tensor", "as_tensors"):
            names = [_name(each) for each in (value if isinstance(value, list) else [value])]
            shape = _shape(names[0], values) if names and not results else shape
            results += names
    arguments = {}
    for index, entry in enumerate(get(node, "inputs", list)):
        name = _text(get(entry, "name", str)) or str(index)
        if name in arguments:
            raise Unsound(f"gives the operand {name} of {target} twice; export it again")
        arguments[name] = _argument(get(entry, "arg", dict))
    path, kind = _stack(get(node, "metadata", dict).get("nn_module_stack", ""))
    return Operation(target, arguments, tuple(results), shape, path, is_torch_layer(kind))


_NAMED_SIZES = ("as_sym_int", "as_sym_bool", "as_sym_float")
_PLAIN: dict[str, type | tuple[type, ...]] = {
    "as_int": int,
    "as_float": (int, float),
    "as_bool": bool,
    "as_string": str,
}
_LISTS = {"as_ints": "as_int", "as_floats": "as_float", "as_bools": "as_bool", "as_strings": "as_string"}


def _argument(argument: Any) -> Argument:
    """An operand. Of the kinds that no layer takes (a graph, an operator, an object ...) nothing is read."""
    kind, value = variant(argument, "operand")
    if kind == "as_none":
        return None
    if kind in _PLAIN:
        return _plain(value, kind)
    if kind in _LISTS:
        return [_plain(item, _LISTS[kind]) for item in expect(value, list, kind)]
    if kind == "as_tensor":
        return Ref(_name(value))
    if kind in ("as_tensors", "as_optional_tensors"):
        return [
            _argument(item if kind == "as_optional_tensors" else {"as_tensor": item})
            for item in expect(value, list, kind)
        ]
    if kind == "as_optional_tensor":
        return _argument(value)
    if kind in _NAMED_SIZES:
        return _size_argument(value)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_size_argument(item) for item in expect(value, list, kind)]
    return Unreadable(f"one of its operands is of the kind {shown(kind.removeprefix('as_'))}")


def _plain(value: Any, kind: str) -> Argument:
    if kind == "as_float" and value in ("Infinity", "-Infinity", "NaN"):  # which JSON has no numbers for
        return float(value)
    return expect(value, _PLAIN[kind], kind)


def _size_argument(size: Any) -> Argument:
    kind, value = variant(size, "operand")
    return Ref(_text(expect(value, str, "operand"))) if kind == "as_name" else expect(value, (int, float), "operand")


def _stack(stack: Any) -> tuple[str, str]:
    """The innermost of ``key,path,class;key,path,class``: where it is, and its class."""
    place, _, kind = _text(expect(stack, str, "nn_module_stack")[-NAME_LIMIT:].rpartition(";")[2]).rpartition(",")
    path = place.partition(",")[2]
    return ("" if path.startswith("_empty_nn_module_stack") else module_path(path)), kind


def _name(value: Any) -> str:
    return _text(get(value, "name", str))


def _text(text: str) -> str:
    """A name, which reports and terminals will show."""
    if len(text) > NAME_LIMIT or not text.isprintable():
        raise Unsound(f"has the name {shown(text)}; names are at most {NAME_LIMIT} characters that can be printed")
    return text
