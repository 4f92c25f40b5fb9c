"""Bundles: one directory holding a compiled network, everything needed to run and to check it, and its history.

``manifest.json`` names every file with its size and sha256; opening a bundle checks them. A bundle is written aside
and renamed, so that a directory with a manifest is always whole. Nothing in it depends on the time or the place of
the build: equal inputs give equal bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.preprocess import InputSpec
from ..targets.spec import GpuSpec, TargetSpec

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

INT8_GRAPH = "int8.safetensors"
FLOAT_GRAPH = "float.safetensors"
GOLDEN_INPUT = "golden/input.bin"
GOLDEN_OUTPUT = "golden/output.bin"
LITERT_INT8 = "litert/int8.tflite"
LITERT_FLOAT = "litert/float.tflite"
NATIVE = "native"
ROOF = "native/roof"


class BundleError(ValueError):
    """A bundle that cannot be opened or written. ``path`` is the file or directory at fault."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = path


@dataclass(frozen=True)
class NetworkTensor:
    """The network's input or output as a device sees it: plain NHWC int8."""

    name: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int


@dataclass(frozen=True)
class Artefact:
    """One executable form of the network: the engine that runs it, its element type, its files in the bundle."""

    engine: str  # "native" or "litert"
    dtype: str  # "int8" or "float32"
    files: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle as it was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. ``pixel_table`` maps pixel values to int8 per channel, (256, 3), where
    preprocessing could not be folded into the network; else pixels enter as p - 128.
    """

    format: int
    xceptile: str
    network: str
    target: TargetSpec
    input: NetworkTensor
    output: NetworkTensor
    input_spec: InputSpec
    labels: tuple[str, ...]
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any]
    provenance: Mapping[str, str]
    golden_count: int
    artefacts: tuple[Artefact, ...]
    files: Mapping[str, FileEntry]
    pixel_table: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Bundle:
    """An opened bundle."""

    path: Path
    manifest: Manifest

    def file(self, name: str) -> Path:
        return self.path / name

    def artefact(self, engine: str, dtype: str = "int8") -> Artefact | None:
        """The artefact for an engine, or None where the bundle holds none."""
        found = (a for a in self.manifest.artefacts if (a.engine, a.dtype) == (engine, dtype))
        return next(found, None)

    def size_bytes(self, artefact: Artefact) -> int:
        """What a device stores for one artefact."""
        return sum(self.manifest.files[name].size_bytes for name in artefact.files)

    def golden(self) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
        """Recorded inputs (count, H, W, C) and the reference's outputs (count, classes)."""
        count, m = self.manifest.golden_count, self.manifest
        inputs = np.fromfile(self.file(GOLDEN_INPUT), np.int8).reshape(count * m.input.shape[0], *m.input.shape[1:])
        outputs = np.fromfile(self.file(GOLDEN_OUTPUT), np.int8).reshape(count * m.output.shape[0], *m.output.shape[1:])
        return inputs, outputs

    def quantize_pixels(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        """uint8 pixels (..., 3) -> the network's int8 input of the same shape."""
        table = self.manifest.pixel_table
        if table is None:
            return (pixels ^ np.uint8(0x80)).view(np.int8)
        columns = np.asarray(table, np.int8)
        quantized: NDArray[np.int8] = columns[pixels, np.arange(pixels.shape[-1])]
        return quantized

    def sha256(self) -> str:
        """The identity of the bundle: the hash of its manifest, which holds every other file's."""
        return sha256(self.file(MANIFEST).read_bytes())


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_to_json(manifest: Manifest) -> str:
    """Sorted keys, so that equal manifests are equal bytes."""
    return json.dumps(dataclasses.asdict(manifest), indent=1, sort_keys=True) + "\n"


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, so that a manifest read back equals the one written."""
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def _fields(kind: Any, data: Mapping[str, Any]) -> Any:
    return kind(**{key: _tuples(value) for key, value in data.items()})


def manifest_from_json(text: str, path: Path) -> Manifest:
    """Raises BundleError where the text is no manifest of this format."""
    try:
        data = json.loads(text)
        version = data["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise BundleError(f"is no bundle manifest ({error}); compile the bundle again", path) from error
    if version != FORMAT_VERSION:
        advice = "upgrade xceptile" if isinstance(version, int) and version > FORMAT_VERSION else "compile it again"
        raise BundleError(f"has bundle format {version}, this xceptile reads format {FORMAT_VERSION}; {advice}", path)
    try:
        gpu = data["target"]["gpu"]
        data["target"] = _fields(TargetSpec, data["target"] | {"gpu": gpu and _fields(GpuSpec, gpu)})
        data["input"] = _fields(NetworkTensor, data["input"])
        data["output"] = _fields(NetworkTensor, data["output"])
        data["input_spec"] = _fields(InputSpec, data["input_spec"])
        data["artefacts"] = tuple(_fields(Artefact, item) for item in data["artefacts"])
        data["files"] = {name: FileEntry(**entry) for name, entry in data["files"].items()}
        data["labels"] = tuple(data["labels"])
        data["pixel_table"] = _tuples(data["pixel_table"])
        manifest = Manifest(**data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BundleError(f"is a damaged manifest ({error}); compile the bundle again", path) from error
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise BundleError(f"names a file outside the bundle, {name!r}", path)
    return manifest


def open_bundle(path: Path) -> Bundle:
    """Opens a bundle and checks every file's size and hash. Raises BundleError."""
    if not path.is_dir():
        raise BundleError("no such bundle directory; `xceptile compile ... --output DIR` makes one", path)
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BundleError(f"holds no {MANIFEST}, so it is no bundle", path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"its {MANIFEST} cannot be read: {error}", path) from error
    manifest = manifest_from_json(text, path / MANIFEST)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise BundleError("is missing from the bundle; copy or compile it again", file)
        if file.stat().st_size != entry.size_bytes:
            raise BundleError(f"is {file.stat().st_size} bytes, the manifest says {entry.size_bytes}", file)
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                raise BundleError("its contents do not match the manifest's sha256; copy or compile it again", file)
    return Bundle(path, manifest)


def check_output(path: Path) -> None:
    """Refuses an output directory that could not be replaced by a bundle. Raises BundleError.

    Called before hours of work, not after.
    """
    if path.exists() and not path.is_dir():
        raise BundleError("exists and is no directory; choose another --output", path)
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).exists():
        raise BundleError("is not empty and holds no bundle; choose another --output or empty it", path)
    parent = path.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise BundleError(f"cannot be written: {error.strerror}; choose another --output", path) from error


def write_bundle(path: Path, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Writes ``files`` and the manifest (its ``files`` filled in) to ``path``, replacing a bundle that was there.

    Written to a sibling directory first and renamed. Raises BundleError where that fails; nothing is left behind.
    """
    check_output(path)
    entries = {name: FileEntry(len(data), sha256(data)) for name, data in sorted(files.items())}
    complete = dataclasses.replace(manifest, files=entries)
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        aside.chmod(0o755)
        for name, data in files.items():
            file = aside / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            if data[:4] == b"\x7fELF":
                file.chmod(0o755)
        (aside / MANIFEST).write_text(manifest_to_json(complete), encoding="utf-8")
        if path.exists():
            old = aside.with_name(aside.name + ".old")
            os.rename(path, old)
            os.rename(aside, path)
            shutil.rmtree(old)
        else:
            os.rename(aside, path)
    except OSError as error:
        raise BundleError(f"could not be written: {error.strerror}", path) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Bundle(path, complete)
