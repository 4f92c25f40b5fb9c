"""The archive that an exported program lies in: a zip with JSON, and the weights as raw numbers.

Sizes are looked at before contents: members are stored as they are and together no larger than the file, so that
nothing unfolds, and a weight is a view of its member in which no two elements lie in the same place.

Three layouts, by the torch that wrote them: members of raw bytes and a JSON that says what lies where (2.9 and later;
torch/export/pt2_archive/_package.py); the same archive with state dicts of ``torch.save`` (2.8); a plain zip of those
(2.5 to 2.7; torch/export/__init__.py).
"""

from __future__ import annotations

import io
import json
import math
import re
import zipfile
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided

from .graph_builder import Array
from .pickled_tensors import PickleError, Place, places

JSON_LIMIT_BYTES = 1 << 25  # a node takes about 2 KB
OLD_PROGRAM = "serialized_exported_program.json"
RENEW = "load it in the torch that wrote it and save it with torch 2.9 or later: torch.export.save(program, path)"

# torch/_export/serde/schema.py, ScalarType, as numpy has it.
_KINDS = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f2", 7: "<f4", 8: "<f8", 12: "|b1", 13: "bfloat16"}
_CODE = ("custom_obj", "opaque_obj", "aotinductor")  # parts of members' names


class Unsound(ValueError):
    """Not what torch writes, or not read. The message says what, and what to do."""


class Archive:
    """The members of a zip by name, without the folder that they may all lie in. Raises Unsound, BadZipFile."""

    def __init__(self, archive: zipfile.ZipFile, size_bytes: int) -> None:
        self.archive = archive
        infos = archive.infolist()
        roots = {info.filename.partition("/")[:2] for info in infos}
        folder = "".join(next(iter(roots))) if len(roots) == 1 and next(iter(roots))[1] else ""
        self.members = {info.filename.removeprefix(folder): info for info in infos}
        if len(self.members) != len(infos):
            raise Unsound("holds two parts of one name, which torch does not write; export it again")
        if sum(info.file_size for info in infos) > size_bytes:
            raise Unsound("its parts are larger than the file, which torch does not write; export it again")

    def read(self, name: str, limit_bytes: int | None = None) -> bytes:
        """A member, which must be stored as it is: torch compresses nothing."""
        info = self.members.get(name)
        if info is None:
            raise Unsound(f"lacks {shown(name)}; export it again")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise Unsound(f"holds {shown(name)} compressed or encrypted, which torch does not write; export it again")
        if limit_bytes is not None and info.file_size > limit_bytes:
            raise Unsound(f"holds {shown(name)} of {info.file_size} bytes; {limit_bytes} are read at most")
        return self.archive.read(info)

    def json(self, name: str) -> Any:
        """A member of JSON."""
        return json.loads(self.read(name, JSON_LIMIT_BYTES))

    def check_byte_order(self) -> None:
        """Raises Unsound where its numbers are not little-endian."""
        if "byteorder" in self.members and self.read("byteorder", 16) != b"little":
            raise Unsound("was saved on a big-endian machine; export it on another")


class SavedProgram:
    """The archive's one program: its JSON, and its weights by name."""

    def __init__(self, archive: Archive) -> None:
        for name in archive.members:
            if any(kind in name for kind in _CODE):
                raise Unsound(f"holds {shown(name)}, which is code and is not executed; export a plain network")
        archive.check_byte_order()
        self._archive = archive
        self._payloads: dict[tuple[int, str], bytes] = {}  # members that several weights share are read once
        self._raw: dict[str, tuple[str, Any]] = {}
        self._pickled: dict[str, tuple[Archive, Place]] = {}
        if OLD_PROGRAM in archive.members:
            self.program = archive.json(OLD_PROGRAM)
            self._unfold("serialized_constants.pt", "serialized_state_dict.pt")
            return
        if "archive_format" not in archive.members or archive.read("archive_format", 16) != b"pt2":
            raise Unsound("is no exported program; save one with torch.export.save(program, path)")
        models = [match for name in archive.members if (match := re.fullmatch(r"models/(\w+)\.json", name))]
        if len(models) != 1:
            raise Unsound(f"holds {len(models)} programs; save one with torch.export.save(program, path)")
        self.program, model = archive.json(models[0][0]), models[0][1]
        if f"data/weights/{model}.pt" in archive.members:
            self._unfold(f"data/constants/{model}.pt", f"data/weights/{model}.pt")
            return
        for folder in ("constants", "weights"):
            config = get(archive.json(f"data/{folder}/{model}_{folder}_config.json"), "config", dict)
            self._raw |= {name: (f"data/{folder}/", entry) for name, entry in config.items()}

    def weight(self, name: str) -> Array:
        """A view of the file's bytes, or a float32 copy of bfloat16."""
        if name in self._pickled:
            archive, place = self._pickled[name]
            return self._values(archive, place, name)
        if name not in self._raw:
            raise Unsound(f"lacks the values of {shown(name)}; export it again")
        folder, entry = self._raw[name]
        if get(entry, "use_pickle", bool):
            raise Unsound(f"holds {name} pickled, a tensor of a class of its own; export a plain network")
        meta, member = get(entry, "tensor_meta", dict), folder + get(entry, "path_name", str)
        kind = _KINDS.get(get(meta, "dtype", int), "")
        sizes, strides = ([_fixed(size) for size in get(meta, key, list)] for key in ("sizes", "strides"))
        return self._values(
            self._archive, Place(member, kind, _fixed(get(meta, "storage_offset", dict)), sizes, strides), name
        )

    def _unfold(self, *names: str) -> None:
        """State dicts of ``torch.save``, each an archive within the archive; an empty one holds nothing."""
        for name in names:
            payload = self._archive.read(name)
            if not payload:
                continue
            inner = Archive(zipfile.ZipFile(io.BytesIO(payload)), len(payload))
            inner.check_byte_order()
            try:
                found = places(inner.read("data.pkl", JSON_LIMIT_BYTES))
            except PickleError as error:
                raise Unsound(f"holds {name}, which is not read: {error}; {RENEW}") from error
            self._pickled |= {weight: (inner, place) for weight, place in found.items()}

    def _values(self, archive: Archive, place: Place, name: str) -> Array:
        member = place.storage if archive is self._archive else f"data/{place.storage}"
        key = (id(archive), member)
        if key not in self._payloads:
            self._payloads[key] = archive.read(member)
        return _view(self._payloads[key], place, name)


def _view(payload: bytes, place: Place, name: str) -> Array:
    if not place.kind:
        raise Unsound(f"holds {name} in a number format that is not read; export a float network")
    item = np.dtype("<u2" if place.kind == "bfloat16" else place.kind)
    sizes, strides = _numbers(place.sizes, name), _numbers(place.strides, name)
    (offset,) = _numbers([place.offset], name)
    if len(sizes) != len(strides) or len(sizes) > 8 or min(sizes, default=1) < 1:
        raise Unsound(f"holds {name} of shape {sizes[:8]} with strides {strides[:8]}; export it again")
    held, count = len(payload) // item.itemsize, math.prod(sizes)
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    if count > held or last >= held:
        raise Unsound(
            f"says that {name} has shape {sizes} and strides {strides}, and holds {held} values of it; make it "
            "contiguous before you export"
        )
    flat = np.frombuffer(payload, item, held)
    if place.kind == "bfloat16":  # the upper half of a float32
        flat = (flat.astype(np.uint32) << 16).view(np.float32)
    return as_strided(flat[offset:], sizes, [stride * flat.itemsize for stride in strides], writeable=False)


def _numbers(values: Any, name: str) -> list[int]:
    if not isinstance(values, Sequence) or not all(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values
    ):
        raise Unsound(f"holds {name} with a size that is no number; export it again")
    return list(values)


def _fixed(size: Any) -> Any:
    """Of weights, whose sizes are never open."""
    return variant(size, "size")[1]


# --- Reading JSON: what is not of its kind is refused by name. ---

T = TypeVar("T")


def expect(value: Any, kind: type[T] | tuple[type, ...], what: str) -> T:
    """``value``, which must be of the kind; a truth value is no number."""
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise Unsound(f"is damaged: {shown(what)} is {shown(repr(value))}; export it again")
    return value  # type: ignore[return-value]  # of a tuple of kinds the caller takes any


def get(mapping: Any, key: str, kind: type[T]) -> T:
    """What lies under ``key`` of an object."""
    return expect(expect(mapping, dict, f"what holds {key}").get(key), kind, key)


def variant(union: Any, what: str) -> tuple[str, Any]:
    """The schema's unions: an object of one key, which says the kind."""
    if not isinstance(union, dict) or len(union) != 1:
        raise Unsound(f"is damaged: {shown(what)} is {shown(repr(union))}; export it again")
    return next(iter(union.items()))


def shown(text: str) -> str:
    """For a message: short, and with nothing that a terminal would obey."""
    return "".join(c if c.isprintable() else "?" for c in text[:80])
