"""The files of Keras: ``.keras`` archives, and HDF5 (``.h5``, ``.hdf5``, ``.weights.h5``), weights alone or a model.

What a file is, is told by its contents: Keras 2.12 writes HDF5 under the name ``.keras``. No code can come of one: of
the archive only JSON and arrays are read, and of the JSON only words that are known (``keras_config.py``).
"""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .hdf5_file import Hdf5Error, Hdf5File, read_hdf5
from .read_file import TEXT_BYTES, check_file
from .weights import CheckpointError

_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"
_UNPACKED = 16  # times its size, at most: weights hardly pack, and those of a pruned network to a quarter or so
# What a compiled and trained model keeps beside its layers, in groups of their own.
_BESIDE = ("optimizer", "optimizer_weights", "metrics", "loss_tracker", "compile_metrics", "_loss_tracker", "_metrics")


@dataclass(frozen=True)
class KerasFile:
    """``config``: the model's JSON, or None of weights alone. ``arrays``: float32, by their path in the HDF5 file.
    ``names``: what Keras 3 says beside a layer's numbered arrays, by the path of the group that holds them."""

    path: Path
    config: str | None
    arrays: dict[str, NDArray[np.float32]]
    names: dict[str, str]


def read_keras(path: Path) -> KerasFile:
    """Raises CheckpointError for another kind of file, one that is damaged, and one that means other files or claims
    more than it holds."""
    try:
        check_file(path)
        with path.open("rb") as stream:
            if stream.read(2) == b"PK":
                return _read_archive(path)
            file = read_hdf5(stream, _BESIDE)
        return KerasFile(path, file.texts.get(("", "model_config")), file.arrays, _names(file))
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path) from error
    except Hdf5Error as error:
        raise CheckpointError(str(error), path) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path) from error


def _read_archive(path: Path) -> KerasFile:
    with tempfile.TemporaryFile() as weights:
        try:
            with zipfile.ZipFile(path) as archive:
                config = _member(archive, path, _CONFIG, TEXT_BYTES).decode("utf-8")
                weights.write(_member(archive, path, _WEIGHTS, _UNPACKED * path.stat().st_size))
        except KeyError as error:
            raise CheckpointError(
                f"is not a Keras model: {error.args[0]}; save it again with model.save", path
            ) from error
        except (CheckpointError, OSError):
            raise
        except Exception as error:  # zipfile raises many kinds on archives that are damaged
            raise CheckpointError(f"is a truncated or damaged archive ({error}); copy it again", path) from error
        file = read_hdf5(weights, _BESIDE)
    return KerasFile(path, config, file.arrays, _names(file))


def _member(archive: zipfile.ZipFile, path: Path, name: str, limit_bytes: int) -> bytes:
    """One file of the archive, of at most so many bytes unpacked."""
    member = archive.getinfo(name)
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f"has {name} packed in a way that is not unpacked here; save it again", path)
    if member.file_size > limit_bytes:
        raise CheckpointError(
            f"has {name} of {member.file_size >> 20} MB packed into {member.compress_size >> 10} kB; give a file that "
            "Keras saved",
            path,
        )
    with archive.open(member) as stream:
        return stream.read(member.file_size)


def _names(file: Hdf5File) -> dict[str, str]:
    return {path: text for (path, name), text in file.texts.items() if name == "name"}
