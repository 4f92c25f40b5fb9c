"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

STANDARD_OUTPUTS = (1, 2)


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Puts ``data``, text as UTF-8, at ``path``, as ``written_whole`` does. Raises OSError."""
    with written_whole(path) as file:
        file.write(data.encode() if isinstance(data, str) else data)


@contextmanager
def written_whole(path: str | Path) -> Iterator[BinaryIO]:
    """A file to write what shall be at ``path``: written aside and renamed, so that a reader finds the old one or the
    new. Links are followed to their end; folders above it are made. What is no plain file (a device, a pipe) and what
    this process has as its standard output or error is written where it is: nothing else may take its place.

    Raises OSError; then a plain file that was there is as it was, and nothing is left behind.
    """
    path = Path(path)
    end = _end_of(path)
    if end is None:
        with _open_in_place(path) as file:
            yield file
        return
    end.parent.mkdir(parents=True, exist_ok=True)
    aside = end.with_name(f".{end.name}.{os.getpid()}.part")
    aside.unlink(missing_ok=True)  # of a process that was killed
    try:
        with aside.open("xb") as file:
            yield file
        try:
            os.replace(aside, end)
        except OSError as error:
            if error.errno != errno.EBUSY:  # a file that something is mounted on, as containers have them
                raise
            shutil.copyfile(aside, end)
    finally:
        aside.unlink(missing_ok=True)


def check_writable(path: Path) -> None:
    """Raises OSError, before the work, where ``written_whole`` would after it: for a folder, or no right to write."""
    end = _end_of(path)
    place = path if end is None else end.parent
    if not os.access(place, os.W_OK):
        code = errno.EACCES if place.exists() else errno.ENOENT
        raise OSError(code, os.strerror(code), str(place))


def _end_of(path: Path) -> Path | None:
    """The plain file that ``path`` leads to, or would be; None where it cannot be another one. Raises OSError."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(found.st_mode) or _standard_output(found) is not None:
        return None
    end = Path(os.path.realpath(path))
    # A file that has no name any more, but is open and has its place in /proc.
    return end if end.exists() and os.path.samestat(found, end.stat()) else None


def _standard_output(found: os.stat_result) -> int | None:
    for descriptor in STANDARD_OUTPUTS:
        try:
            if os.path.samestat(found, os.fstat(descriptor)):
                return descriptor
        except OSError:  # closed
            pass
    return None


def _open_in_place(path: Path) -> BinaryIO:
    descriptor = _standard_output(os.stat(path))
    if descriptor is None:
        return path.open("wb")
    sys.stdout.flush()
    return open(os.dup(descriptor), "wb")  # not opened anew: what was written to it before stays
