"""Reads an HDF5 file from a stranger: a program of its own, within limits, which ``hdf5_file.py`` starts.

The file is standard input. On standard output comes a line of JSON, {"arrays": [[path, shape], ...], "texts": [[path of
the object, attribute, text], ...]} or {"error": clause}, then the arrays' values as float32, one behind the other.

HDF5 can name other files: external storage (raw bytes of any path), external links and virtual datasets. It can also
promise more than it holds: chunks that unpack to gigabytes, arrays that were never written and read as zeros, many
arrays over the same bytes. Keras writes none of these, so each is refused before anything is read.

Source: HDF5 File Format Specification 3.0, https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html
"""

from __future__ import annotations

import json
import os
import resource
import sys
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

TEXT_BYTES = 16 << 20  # of one attribute's text; the config of a network of a thousand layers has about one MB
OBJECTS = 100_000  # groups and datasets; an Xception has about a thousand, optimizer included


class Refused(ValueError):
    """A file that is not read, with a clause that says what is wrong and what to do."""


def read(stream: BinaryIO, skipped: list[str]) -> tuple[dict[str, NDArray[np.float32]], list[tuple[str, str, str]]]:
    """Arrays of real numbers by their path, as float32, but those in the ``skipped`` groups of the file's top; and the
    attributes ``model_config`` and ``name`` that are texts. Raises Refused."""
    size_bytes = stream.seek(0, os.SEEK_END)
    try:
        file = h5py.File(stream, "r")
    except Exception as error:  # h5py raises OSError, RuntimeError, KeyError and ValueError on damaged files
        raise Refused(f"is not an HDF5 file, or truncated or damaged ({error}); copy it again") from error
    try:
        paths = _plain_paths(file)
        datasets = {path: item for path in paths if isinstance(item := file[path], h5py.Dataset)}
        for path, dataset in datasets.items():
            _refuse_unplain(path, dataset)
        datasets = {path: each for path, each in datasets.items() if path.split("/")[0] not in skipped}
        datasets = {path: each for path, each in datasets.items() if each.dtype.kind == "f"}
        _refuse_more_than_held(datasets, size_bytes)
        arrays = {path: np.asarray(each[()], np.float32) for path, each in datasets.items()}
        found = ((path, name, _text(file[path or "/"], name)) for path in ("", *paths) for name in _TEXTS)
        return arrays, [(path, name, text) for path, name, text in found if text is not None]
    except Refused:
        raise
    except Exception as error:  # likewise, wherever a damaged part is first touched
        raise Refused(f"is truncated or damaged ({error}); copy it again") from error


_TEXTS = ("model_config", "name")


def _plain_paths(file: h5py.File) -> list[str]:
    """Every object's path, each object once, no link followed but those that are the objects' own names."""
    paths: list[str] = []

    def visit(name: str, link: h5py.HardLink | h5py.SoftLink | h5py.ExternalLink) -> str | None:
        if not isinstance(link, h5py.HardLink):
            where = getattr(link, "filename", None) or "another object"
            return f"holds the link {name} to {where}, which is not followed; save the model with Keras again"
        if len(paths) >= OBJECTS:
            return f"holds more than {OBJECTS} objects; give a file that Keras saved"
        paths.append(name)
        return None

    if refusal := file.visititems_links(visit):
        raise Refused(refusal)
    return paths


def _refuse_unplain(path: str, dataset: h5py.Dataset) -> None:
    """Before its shape is asked for: a virtual dataset opens other files to know it."""
    stored = dataset.id.get_create_plist()
    if stored.get_layout() == h5py.h5d.VIRTUAL:
        raise Refused(f"has {path} as a view of other files, which are not read; save the model with Keras again")
    if stored.get_external_count():
        raise Refused(f"has {path} in another file, which is not read; save the model with Keras again")
    if stored.get_nfilters():
        raise Refused(f"has {path} compressed, which is not unpacked; `h5repack -f NONE` writes the same file without")


def _refuse_more_than_held(datasets: dict[str, h5py.Dataset], size_bytes: int) -> None:
    """What is not compressed takes as many bytes in the file as in memory, in its own element type."""
    total = 0
    for path, dataset in datasets.items():
        claimed = dataset.size * dataset.dtype.itemsize
        total += claimed
        if dataset.id.get_storage_size() < claimed or total > size_bytes:
            raise Refused(
                f"holds less than {path} claims ({dataset.size} numbers): truncated or damaged; copy it again"
            )


def _text(item: h5py.Group | h5py.Dataset, name: str) -> str | None:
    """A text of an object, or None where it has no such attribute or one of another kind."""
    if name not in item.attrs:
        return None
    attribute = item.attrs.get_id(name)
    if h5py.check_string_dtype(attribute.dtype) is None or attribute.shape != ():
        return None
    value: Any = item.attrs[name]
    text = value.decode("utf-8") if isinstance(value, bytes) else value
    if len(text) > TEXT_BYTES:
        raise Refused(f"holds a {name} of {len(text) >> 20} MB; give a file that Keras saved")
    return str(text)


def main() -> None:
    """The program. Its arguments: seconds of processor time, bytes of addresses, a JSON list of the groups to skip."""
    seconds, memory_bytes, skipped = json.loads(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        arrays, texts = read(sys.stdin.buffer, skipped)
        told: dict[str, Any] = {"arrays": [[path, each.shape] for path, each in arrays.items()], "texts": texts}
    except Refused as error:
        arrays, told = {}, {"error": " ".join(str(error).split())}
    except MemoryError:
        arrays, told = {}, {"error": "needs more memory than its size allows: damaged; copy it again"}
    sys.stdout.buffer.write(json.dumps(told).encode() + b"\n")
    for each in arrays.values():
        sys.stdout.buffer.write(np.ascontiguousarray(each).data)


if __name__ == "__main__":
    main()
