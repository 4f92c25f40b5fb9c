"""Bundles: one directory holding a compiled network, everything needed to run and to check it, and its history.

``manifest.json`` names every file with its size and sha256, and its own contents' too; opening a bundle checks them. A
bundle is written aside and renamed, so that a directory with a manifest is always whole. Nothing in it depends on the
time or the place of the build: equal inputs give equal bytes. ``manifest.sig``, where it is there, signs the manifest.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..models.atomic_write import write_atomically
from ..models.preprocess import InputSpec, PixelEncoding
from ..models.read_file import read_file
from ..targets.spec import TargetSpec
from .atomic_directory import end_of, is_filled_in_place, is_interrupted, written_directory
from .signature import SIGNATURE, SignatureError, check_signature
from .typed_json import decode

FORMAT_VERSION = 3  # 2 had plans of version 1, which do not say how pixels enter
MANIFEST = "manifest.json"

INT8_GRAPH = "int8.safetensors"
FLOAT_GRAPH = "float.safetensors"
GOLDEN_INPUT = "golden/input.bin"
GOLDEN_OUTPUT = "golden/output.bin"
LITERT_INT8 = "litert/int8.tflite"
LITERT_FLOAT = "litert/float.tflite"
GPU_DELEGATE_FLOAT16 = "litert/gpu_float16.tflite"
GPU_DELEGATE_INT8 = "litert/gpu_int8.tflite"
NATIVE = "native"
ESTIMATE = "estimate.json"  # beside a GPU's kernels: the latency by a model
NATIVE_FLOAT16 = "native-float16"  # a GPU's float16 build, the rival of its int8
ROOF = "native/roof"
MIXED_STEPS = 2  # what float layers may move a mixed network's int8 outputs by (docs/accuracy.md)
REHEARSAL = "rehearsal"  # the runtime for the machine that compiled a bundle for a GPU
# Engines of artefacts that other runtimes open; nothing here runs them.
FOR_OTHERS = ("relax-vm", "onnx-qdq", "gpu-delegate")
MOST_VALUES = 1 << 31  # of a tensor: the C runtime counts no further


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

    engine: str  # "native", "litert", or one of FOR_OTHERS
    dtype: str  # "int8", "float16" or "float32"
    files: tuple[str, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file of the bundle as it was written."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle says of itself. ``pixels`` is how an 8-bit image enters the network. ``float_layers`` are the
    module paths of what accuracy control, or the recipe, left in float.
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
    pixels: PixelEncoding = PixelEncoding(None)  # noqa: RUF009  frozen
    float_layers: tuple[str, ...] = ()

    @property
    def allowed_steps(self) -> int:
        """By how much an engine's outputs may differ from the reference's: 0, or ``MIXED_STEPS`` of a mixed network."""
        return MIXED_STEPS if self.float_layers else 0


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``manifest_sha256`` is of the manifest's bytes as they were checked."""

    path: Path
    manifest: Manifest
    manifest_sha256: str = ""

    def file(self, name: str) -> Path:
        return self.path / name

    def holds(self, name: str) -> bool:
        """Whether a file is part of the bundle: what merely lies there is not."""
        return name in self.manifest.files

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
        """uint8 pixels (..., C) -> the network's int8 input of the same shape."""
        return self.manifest.pixels.encode(pixels)

    def sha256(self) -> str:
        """The identity of the bundle: the hash of its manifest, which holds every other file's."""
        return self.manifest_sha256


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def manifest_to_json(manifest: Manifest) -> str:
    """Sorted keys, so that equal manifests are equal bytes; ``sha256`` is of all the rest."""
    data = dataclasses.asdict(manifest)
    return json.dumps({**data, "sha256": _contents_sha256(data)}, indent=1, sort_keys=True) + "\n"


def _contents_sha256(data: Mapping[str, Any]) -> str:
    """Of a manifest's values, however they are laid out as text."""
    return sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode())


def manifest_from_json(text: str, path: Path) -> Manifest:
    """Raises BundleError where the text is no manifest of this format, or damaged."""
    try:
        data = json.loads(text)
        version = data["format"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"is no bundle manifest ({error}); compile the bundle again", path) from error
    if version != FORMAT_VERSION:
        advice = "upgrade xceptile" if isinstance(version, int) and version > FORMAT_VERSION else "compile it again"
        raise BundleError(f"has bundle format {version}, this xceptile reads format {FORMAT_VERSION}; {advice}", path)
    if data.pop("sha256", None) != _contents_sha256(data):
        raise BundleError("is damaged, its contents do not have its sha256; copy or compile the bundle again", path)
    try:
        manifest: Manifest = decode(Manifest, data)
        _check_files(manifest)
        _check_network(manifest)
    except (TypeError, ValueError, RecursionError) as error:
        raise BundleError(f"is a damaged manifest ({error}); compile the bundle again", path) from error
    return manifest


def _check_files(manifest: Manifest) -> None:
    """Raises ValueError for files that cannot be, or artefacts that nothing here runs."""
    for name, entry in manifest.files.items():
        parts = PurePosixPath(name).parts
        if not parts or "/".join(parts) != name or ".." in parts or not name.isprintable():
            raise ValueError(f"it names a file outside the bundle, {name!r}")
        if entry.size_bytes < 0 or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
            raise ValueError(f"it says that {name!r} is {entry.size_bytes} bytes of sha256 {entry.sha256!r}")
    for artefact in manifest.artefacts:
        unlisted = [name for name in artefact.files if name not in manifest.files]
        if unlisted or not artefact.files:
            raise ValueError(f"it has an artefact of a file that it does not list, {(unlisted or [''])[0]!r}")
    if not any(a.dtype == "int8" and a.engine not in FOR_OTHERS for a in manifest.artefacts):
        raise ValueError("it has no int8 artefact that an engine here runs")


def _check_network(manifest: Manifest) -> None:
    """Raises ValueError for a network's ends that cannot be, and for golden files that are not of their size."""
    for tensor in (manifest.input, manifest.output):
        count = math.prod(tensor.shape)
        if len(tensor.shape) < 2 or min(tensor.shape) < 1 or count > MOST_VALUES:
            raise ValueError(f"its tensor {tensor.name!r} is of shape {tensor.shape}")
        if not 0 < tensor.scale < math.inf or not -128 <= tensor.zero_point <= 127:
            raise ValueError(f"its tensor {tensor.name!r} has scale {tensor.scale} and zero point {tensor.zero_point}")
    if manifest.golden_count < 1:
        raise ValueError(f"it has {manifest.golden_count} golden inputs")
    for name, tensor in ((GOLDEN_INPUT, manifest.input), (GOLDEN_OUTPUT, manifest.output)):
        entry = manifest.files.get(name)
        if entry is None or entry.size_bytes != manifest.golden_count * math.prod(tensor.shape):
            raise ValueError(f"{name} is missing, or not {manifest.golden_count} tensors of shape {tensor.shape}")


def open_bundle(path: Path, public_key: Path | None = None, *, vouched: str | None = None) -> Bundle:
    """Opens a bundle and checks every file's size and hash; with a ``public_key`` (PEM), first of all its signature.

    ``vouched`` stands for the key in other processes: the sha256 of a manifest whose signature was checked. A bundle
    that must be signed may hold no file beyond those that are, and plain files only: a link's target could be exchanged
    after it was checked. Raises BundleError.
    """
    signed = public_key is not None or vouched is not None
    while True:
        data = _read_manifest(path)
        try:
            if public_key is not None:
                _check_signature(path, data, public_key)
            if vouched not in (None, sha256(data)):
                raise BundleError("is not the bundle whose signature was checked: it was exchanged since", path)
            return _open_checked(path.resolve(strict=True) if signed else path, data, signed)
        except BundleError:
            if _read_manifest(path) == data:
                raise
            # Another process replaced the bundle while its files were read.


def _read_manifest(path: Path) -> bytes:
    if not path.is_dir():
        what = "is a file, and a bundle is a directory" if path.exists() else "no such bundle directory"
        raise BundleError(f"{what}; `xceptile compile ... --output DIR` makes one", path)
    try:
        return read_file(path / MANIFEST)
    except FileNotFoundError:
        raise BundleError(f"holds no {MANIFEST}, so it is no bundle", path) from None
    except OSError as error:
        raise BundleError(f"its {MANIFEST} cannot be read: {error.strerror}", path) from error


def _open_checked(path: Path, data: bytes, signed: bool) -> Bundle:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"its {MANIFEST} is no text: {error}", path) from error
    manifest = manifest_from_json(text, path / MANIFEST)
    if signed:
        _refuse_unsigned(path, manifest)
    for name, entry in manifest.files.items():
        file = path / name
        if not file.is_file():
            raise BundleError("is missing from the bundle; copy or compile it again", file)
        try:
            with file.open("rb") as stream:
                size_bytes = os.fstat(stream.fileno()).st_size
                if size_bytes != entry.size_bytes:
                    raise BundleError(f"is {size_bytes} bytes, the manifest says {entry.size_bytes}", file)
                if hashlib.file_digest(stream, "sha256").hexdigest() != entry.sha256:
                    raise BundleError("its contents do not match the manifest's sha256; copy or compile it again", file)
        except OSError as error:
            raise BundleError(f"cannot be read: {error.strerror}", file) from error
    return Bundle(path, manifest, sha256(data))


def _check_signature(path: Path, manifest: bytes, public_key: Path) -> None:
    try:
        signature = read_file(path / SIGNATURE)
    except FileNotFoundError:
        raise BundleError("is not signed, and a signature is wanted; `xceptile sign` makes one", path) from None
    except OSError as error:
        raise BundleError(f"its {SIGNATURE} cannot be read: {error.strerror}", path) from error
    try:
        check_signature(manifest, signature, public_key)
    except SignatureError as error:
        raise BundleError(str(error), path) from error


def _refuse_unsigned(path: Path, manifest: Manifest) -> None:
    """Nothing unsigned may lie where an engine looks for an optional file, nor hide from the look."""
    known = {*manifest.files, MANIFEST, SIGNATURE}
    pending = [path]
    while pending:
        folder = pending.pop()
        try:
            with os.scandir(folder) as entries:
                found = {Path(each.path): each.stat(follow_symlinks=False).st_mode for each in entries}
        except OSError as error:
            raise BundleError(f"cannot be looked through for what is not signed: {error.strerror}", folder) from error
        pending += (each for each, mode in found.items() if stat.S_ISDIR(mode))
        for each, mode in sorted(found.items()):
            name = each.relative_to(path).as_posix()
            if stat.S_ISDIR(mode):
                continue
            if name not in known:
                raise BundleError(f"holds a file that is not signed, {name!r}; remove it", path)
            if not stat.S_ISREG(mode):
                raise BundleError(f"a signed bundle holds plain files only, and {name!r} is a link or a device", path)


def sign_bundle(path: Path, sign: Callable[[bytes], bytes]) -> None:
    """Checks a bundle and writes its signature, by ``signature.load_signer``, into it; it is to hold nothing that would
    not be signed, and plain files only. Raises BundleError.
    """
    data = _read_manifest(path)
    try:
        for part in path.glob(f".{SIGNATURE}.*.part"):  # of a process that was killed while it signed
            part.unlink()
        bundle = _open_checked(path, data, True)
        write_atomically(bundle.file(SIGNATURE), sign(data))
    except OSError as error:
        raise BundleError(f"its signature could not be written: {error.strerror}", path) from error


def check_output(path: Path) -> None:
    """Refuses an output directory that could not be replaced by a bundle. Raises BundleError.

    Called before hours of work, not after.
    """
    if path.exists() and not path.is_dir():
        raise BundleError("exists and is no directory; choose another --output", path)
    try:
        end = end_of(path)
        taken = end.is_dir() and any(end.iterdir()) and not (end / MANIFEST).exists()
        if taken and not is_interrupted(end, MANIFEST):
            raise BundleError("is not empty and holds no bundle; choose another --output or empty it", path)
        is_filled_in_place(end)
    except OSError as error:
        raise BundleError(f"cannot be written: {error.strerror}; choose another --output", path) from error


def write_bundle(
    path: Path, manifest: Manifest, files: Mapping[str, bytes], sign: Callable[[bytes], bytes] | None = None
) -> Bundle:
    """Writes ``files`` and the manifest (its ``files`` filled in) to ``path``, replacing a bundle that was there.

    See ``atomic_directory``: links are followed, and what was there stays as it was until all is written. Who may read,
    write and enter what is written, the process's umask says. ``sign`` makes its signature. Raises BundleError; nothing
    is left behind.
    """
    check_output(path)
    entries = {name: FileEntry(len(data), sha256(data)) for name, data in sorted(files.items())}
    complete = dataclasses.replace(manifest, files=entries)
    text = manifest_to_json(complete).encode()
    written = {**files, MANIFEST: text} | ({} if sign is None else {SIGNATURE: sign(text)})
    try:
        with written_directory(path, MANIFEST, _listed(path)) as aside:
            for name, data in written.items():
                _write_file(aside / name, data)
    except OSError as error:
        raise BundleError(f"could not be written: {error.strerror}", path) from error
    return Bundle(path, complete, sha256(text))


def _listed(path: Path) -> tuple[str, ...]:
    """The files of the bundle that is there, as far as its manifest can be read."""
    try:
        old = manifest_from_json((path / MANIFEST).read_text(encoding="utf-8"), path)
    except (OSError, ValueError):
        return ()
    return (*old.files, SIGNATURE)


def _write_file(file: Path, data: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    mode = 0o777 if data[:4] == b"\x7fELF" else 0o666
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as stream:
        stream.write(data)
