"""Reads an exported program (``.pt2``, a file of ``torch.export.save``), as data and no more.

``torch.export.load`` trusts its file: it unpickles, evaluates the expressions of open sizes, finds operators by any
dotted name below ``torch``, imports modules, and compiles Python that it puts together from the file's strings. So
torch takes no part in this. The archive is a zip whose members are read as they lie there; its JSON says the network
(nodes, operators, operands) and where in a member of raw bytes each weight lies. What is read of the JSON is compared
with names that are known here, or copied; nothing in this file evaluates, compiles, imports or unpickles.

Sources: torch 2.13, torch/_export/serde/schema.py (the JSON), torch/export/pt2_archive/_package.py (the archive).
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .aten import (
    Argument,
    Operation,
    Program,
    Ref,
    Size,
    Unreadable,
    Weight,
    import_program,
    is_torch_layer,
    module_path,
)
from .graph import Graph
from .graph_builder import Array
from .read_file import check_file

RENEW = "load it in the torch that wrote it and save it with torch 2.9 or later: torch.export.save(program, path)"
NODES_LIMIT = 10_000  # of the largest networks of images that are known a tenth
JSON_LIMIT_BYTES = 1 << 25  # a node takes about 2 KB
NAME_LIMIT = 1_000
# A weight becomes float32: eight times is two names for each of two bytes.
CONSTANTS_LIMIT = 8  # times the file

_KINDS = {1: "u1", 2: "i1", 3: "i2", 4: "i4", 5: "i8", 6: "f2", 7: "f4", 8: "f8", 12: "?"}  # schema.ScalarType
_BFLOAT16 = 13
_CODE = ("custom_obj", "opaque_obj", "aotinductor")  # parts of members' names


class ProgramError(ValueError):
    """A file that is no exported program, a damaged one, or one with parts that are not read. ``path`` is the file."""

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


class _Unsound(ValueError):
    """Not what torch writes. The message says what, and what to do where that is not to export it again."""


def is_program(path: str | Path) -> bool:
    """Whether it is a zip as ``torch.export.save`` writes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(
                _inner(name) in ("archive_format", "serialized_exported_program.json") for name in _names(archive)
            )
    except (OSError, zipfile.BadZipFile, _Unsound):
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
            return _Reader(archive, Path(path).stat().st_size).program()
    except _Unsound as error:
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


def _inner(name: str) -> str:
    """A member's name without the folder that all members of an archive lie in."""
    return name.partition("/")[2]


def _names(archive: zipfile.ZipFile) -> list[str]:
    return [info.filename for info in archive.infolist()]


class _Reader:
    """One archive. Sizes are looked at before anything is read: together the members are no larger than the file."""

    def __init__(self, archive: zipfile.ZipFile, size_bytes: int) -> None:
        self.archive = archive
        self.members: dict[str, zipfile.ZipInfo] = {}
        for info in archive.infolist():
            name = _inner(info.filename)
            if info.filename == "serialized_exported_program.json":
                raise _Unsound(f"was saved by torch 2.7 or older; {RENEW}")
            if any(kind in name for kind in _CODE):
                raise _Unsound(f"holds {_shown(name)}, which is code and is not executed; export a plain network")
            if name in self.members:
                raise _Unsound(f"holds {_shown(name)} twice; export it again")
            self.members[name] = info
        if sum(info.file_size for info in self.members.values()) > size_bytes:
            raise _Unsound("its parts are larger than the file, which torch does not write; export it again")
        if "archive_format" not in self.members or self.read("archive_format", 16) != b"pt2":
            raise _Unsound("is no exported program; save one with torch.export.save(program, path)")
        if "byteorder" in self.members and self.read("byteorder", 16) != b"little":
            raise _Unsound("was saved on a big-endian machine; export it on another")

    def read(self, name: str, limit_bytes: int | None = None) -> bytes:
        """A member, which must be stored as it is: torch compresses nothing."""
        info = self.members.get(name)
        if info is None:
            raise _Unsound(f"lacks {_shown(name)}; export it again")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise _Unsound(f"holds {_shown(name)} compressed or encrypted, which torch does not write; export it again")
        if limit_bytes is not None and info.file_size > limit_bytes:
            raise _Unsound(f"holds {_shown(name)} of {info.file_size} bytes; {limit_bytes} are read at most")
        return self.archive.read(info)

    def json(self, name: str) -> dict[str, Any]:
        """A member's object."""
        return _expect(json.loads(self.read(name, JSON_LIMIT_BYTES)), dict, name)

    def program(self) -> Program:
        """The archive's one program."""
        models = [match for name in self.members if (match := re.fullmatch(r"models/(\w+)\.json", name))]
        if len(models) != 1:
            raise _Unsound(f"holds {len(models)} programs; save one with torch.export.save(program, path)")
        module = _get(self.json(models[0][0]), "graph_module", dict)
        graph, signature = _get(module, "graph", dict), _get(module, "signature", dict)
        nodes = _get(graph, "nodes", list)
        if len(nodes) > NODES_LIMIT:
            raise _Unsound(f"holds {len(nodes)} nodes; {NODES_LIMIT} are read at most")
        values = _get(graph, "tensor_values", dict)
        stored = _Weights(self, models[0][1])
        inputs, weights = [], {}
        for spec in _get(signature, "input_specs", list):
            kind, body = _variant(spec, "input")
            if kind == "user_input":
                inputs.append(_input(_get(body, "arg", dict), values))
            elif kind in _STORED:
                name = _name(_get(body, "arg", dict))
                weights[name] = stored.weight(_text(_get(body, _STORED[kind], str)))
            else:
                inputs.append((kind, None))
        outputs, changed = [], []
        for spec in _get(signature, "output_specs", list):
            kind, body = _variant(spec, "output")
            if kind == "user_output":
                what, value = _variant(_get(body, "arg", dict), "output")
                outputs.append(_name(value) if what == "as_tensor" else None)
            elif kind in _CHANGED:
                changed.append(_text(_get(body, _CHANGED[kind], str)))
            elif kind != "user_input_mutation":
                raise _Unsound(f"has the output {_shown(kind)}; export a network for inference")
        operations = tuple(_operation(node, values) for node in nodes)
        return Program(tuple(inputs), weights, operations, tuple(outputs), tuple(changed))


_STORED = {"parameter": "parameter_name", "buffer": "buffer_name", "tensor_constant": "tensor_constant_name"}
_CHANGED = {"buffer_mutation": "buffer_name", "parameter_mutation": "parameter_name"}


class _Weights:
    """Where each weight lies. A member that several of them share is read once."""

    def __init__(self, reader: _Reader, model: str) -> None:
        self.reader = reader
        self.payloads: dict[str, bytes] = {}
        self.places = {
            name: (folder, _expect(place, dict, name))
            for folder, config in (("constants", "constants"), ("weights", "weights"))
            for name, place in _get(reader.json(f"data/{folder}/{model}_{config}_config.json"), "config", dict).items()
        }

    def weight(self, name: str) -> Weight:
        """By the name that the module has for it: a view of the member's bytes, or a float32 copy of bfloat16."""
        if name not in self.places:
            raise _Unsound(f"lacks the values of {name}; export it again")
        folder, place = self.places[name]
        if place.get("use_pickle") is not False:
            raise _Unsound(f"holds {name} pickled, a tensor of a class of its own; export a plain network")
        member = f"data/{folder}/{_get(place, 'path_name', str)}"
        if member not in self.payloads:
            self.payloads[member] = self.reader.read(member)
        return name, _values(self.payloads[member], _get(place, "tensor_meta", dict), name)


def _values(payload: bytes, meta: Any, name: str) -> Array:
    """The tensor that ``meta`` says lies in ``payload``. No two of its elements may lie in the same place."""
    kind = _get(meta, "dtype", int)
    if kind != _BFLOAT16 and kind not in _KINDS:
        raise _Unsound(f"holds {name} in a number format ({kind}) that is not read; export a float network")
    sizes, strides = (_integers(_get(meta, key, list), name) for key in ("sizes", "strides"))
    offset = _integers([_get(meta, "storage_offset", dict)], name)[0]
    item = np.dtype("u2" if kind == _BFLOAT16 else f"<{_KINDS[kind]}" if kind != 12 else "?")
    held, count = len(payload) // item.itemsize, math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=False))
    if len(sizes) != len(strides) or len(sizes) > 8 or min(sizes, default=1) < 1:
        raise _Unsound(f"holds {name} of shape {sizes[:8]} with strides {strides[:8]}; export it again")
    if count > held or last >= held:
        raise _Unsound(
            f"says that {name} has shape {sizes} and strides {strides}, and holds {held} values of it; make it "
            "contiguous before you export"
        )
    flat = np.frombuffer(payload, item, held)
    if kind == _BFLOAT16:  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return as_strided(flat[offset:], sizes, [stride * flat.itemsize for stride in strides], writeable=False)


def _integers(sizes: Sequence[Any], name: str) -> list[int]:
    """Of weights, whose sizes are never open."""
    numbers = [_variant(size, name)[1] for size in sizes]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number >= 0 for number in numbers):
        raise _Unsound(f"holds {name} with a size that is no number; export it again")
    return numbers


def _input(argument: Any, values: Mapping[str, Any]) -> tuple[str, tuple[Size, ...] | None]:
    kind, value = _variant(argument, "input")
    return (_name(value), _shape(_name(value), values)) if kind == "as_tensor" else (kind, None)


def _shape(name: str, values: Mapping[str, Any]) -> tuple[Size, ...] | None:
    """Of a tensor; None where the file does not say it."""
    meta = values.get(name)
    return None if meta is None else tuple(_size(size) for size in _get(meta, "sizes", list))


def _size(size: Any) -> Size:
    """A number or a symbol. An expression stays text, which nobody reads but for an error."""
    kind, value = _variant(size, "size")
    if kind == "as_int":
        return _expect(value, int, "size")
    text = _get(value, "expr_str", str)
    if number := re.fullmatch(r"(?:Integer\()?(\d{1,18})\)?", text):
        return int(number[1])
    symbol = re.fullmatch(r"Symbol\('(\w{1,80})'(?:, \w+=True)*\)", text)
    return symbol[1] if symbol else text


def _operation(node: Any, values: Mapping[str, Any]) -> Operation:
    target = _text(_get(node, "target", str)).removeprefix("torch.ops.")
    results: list[str] = []
    shape = None
    for output in _get(node, "outputs", list):
        kind, value = _variant(output, "output")
        if kind in _NAMED_SIZES:
            results.append(_text(_get(value, "as_name", str)))
        elif kind in ("as_tensor", "as_tensors"):
            names = [_name(each) for each in (value if isinstance(value, list) else [value])]
            shape = _shape(names[0], values) if names and not results else shape
            results += names
    arguments = {}
    for index, entry in enumerate(_get(node, "inputs", list)):
        name = _text(_get(entry, "name", str)) or str(index)
        if name in arguments:
            raise _Unsound(f"gives the operand {name} of {target} twice; export it again")
        arguments[name] = _argument(_get(entry, "arg", dict))
    path, kind = _stack(_get(node, "metadata", dict).get("nn_module_stack", ""))
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
    kind, value = _variant(argument, "operand")
    if kind == "as_none":
        return None
    if kind in _PLAIN:
        return _plain(value, kind)
    if kind in _LISTS:
        return [_plain(item, _LISTS[kind]) for item in _expect(value, list, kind)]
    if kind == "as_tensor":
        return Ref(_name(value))
    if kind in ("as_tensors", "as_optional_tensors"):
        return [
            _argument(item if kind == "as_optional_tensors" else {"as_tensor": item})
            for item in _expect(value, list, kind)
        ]
    if kind == "as_optional_tensor":
        return _argument(value)
    if kind in _NAMED_SIZES:
        return _size_argument(value)
    if kind in ("as_sym_ints", "as_sym_floats", "as_sym_bools"):
        return [_size_argument(item) for item in _expect(value, list, kind)]
    return Unreadable(f"one of its operands is of the kind {_shown(kind.removeprefix('as_'))}")


def _plain(value: Any, kind: str) -> Argument:
    if kind == "as_float" and value in ("Infinity", "-Infinity", "NaN"):  # which JSON has no numbers for
        return float(value)
    return _expect(value, _PLAIN[kind], kind)


def _size_argument(size: Any) -> Argument:
    kind, value = _variant(size, "operand")
    return Ref(_text(_expect(value, str, "operand"))) if kind == "as_name" else _expect(value, (int, float), "operand")


def _stack(stack: Any) -> tuple[str, str]:
    """The innermost of ``key,path,class;key,path,class``: where it is, and its class."""
    place, _, kind = _text(_expect(stack, str, "nn_module_stack")[-NAME_LIMIT:].rpartition(";")[2]).rpartition(",")
    path = place.partition(",")[2]
    return ("" if path.startswith("_empty_nn_module_stack") else module_path(path)), kind


T = TypeVar("T")


def _expect(value: Any, kind: type[T] | tuple[type, ...], what: str) -> T:
    """``value``, which must be of the kind; a truth value is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise _Unsound(f"is damaged: {_shown(what)} is {_shown(repr(value))}; export it again")
    return value  # type: ignore[return-value]  # of a tuple of kinds the caller takes any


def _get(mapping: Any, key: str, kind: type[T]) -> T:
    """What lies under ``key`` of an object."""
    return _expect(_expect(mapping, dict, f"what holds {key}").get(key), kind, key)


def _variant(union: Any, what: str) -> tuple[str, Any]:
    """The schema's unions: an object of one key, which says the kind."""
    if not isinstance(union, dict) or len(union) != 1:
        raise _Unsound(f"is damaged: {_shown(what)} is {_shown(repr(union))}; export it again")
    return next(iter(union.items()))


def _name(value: Any) -> str:
    return _text(_get(value, "name", str))


def _text(text: str) -> str:
    """A name, which reports and terminals will show."""
    if len(text) > NAME_LIMIT or not text.isprintable():
        raise _Unsound(f"has the name {_shown(text)}; names are at most {NAME_LIMIT} characters that can be printed")
    return text


def _shown(text: str) -> str:
    """For a message: short, and with nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:80])
