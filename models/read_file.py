"""A file's kind and size are looked at before its contents: what is named may be a pipe that never ends, or a device.

Whatever reads a file that somebody else may have made goes through here: networks, manifests, signatures, keys,
baselines, recipes, label files and lists.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

MODEL_BYTES = 2 << 30  # of a network: protobuf's own limit, and twenty Xceptions in float32
TEXT_BYTES = 16 << 20  # of JSON, keys and names; Python's objects take about twenty times the space of their text
LIST_BYTES = 256 << 20  # of a list of files, a line each
BASELINE_BYTES = 128 << 20  # of every latency sample of several targets; a small network's take 16 MB each

_KINDS = (
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def check_file(path: str | Path, limit_bytes: int = MODEL_BYTES) -> None:
    """For libraries that open a file by its name. Raises OSError unless it is a regular file of at most that size."""
    _check(os.stat(path), path, limit_bytes)


def read_file(path: str | Path, limit_bytes: int = TEXT_BYTES) -> bytes:
    """The contents of a regular file. Raises OSError for any other kind, and for more than ``limit_bytes``."""
    check_file(path, limit_bytes)
    # Another file may have taken its place: a pipe must not block here.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _check(os.fstat(descriptor), path, limit_bytes)
        data = file.read(limit_bytes + 1)  # files of /proc say 0 and go on
    _check_size(len(data), path, limit_bytes)
    return data


def _check(found: os.stat_result, path: str | Path, limit_bytes: int) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a directory; give a file", str(path))
    for is_kind, kind in _KINDS:
        if is_kind(found.st_mode):
            raise OSError(errno.EINVAL, f"it is {kind}; give a regular file", str(path))
    _check_size(found.st_size, path, limit_bytes)


def _check_size(size_bytes: int, path: str | Path, limit_bytes: int) -> None:
    if size_bytes > limit_bytes:
        reason = f"it holds more than {limit_bytes >> 20} MiB, which no such file needs; give another"
        raise OSError(errno.EFBIG, reason, str(path))
