"""Directories that are there whole or not at all, wherever their path leads."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_PART = ".part"  # how the name of a directory ends that is being written


def end_of(path: Path) -> Path:
    """Where ``path`` leads, links followed, whether it is there or not. Raises OSError for a loop of links."""
    end = Path(os.path.realpath(path))
    if end.is_symlink():
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return end


def is_filled_in_place(path: Path) -> bool:
    """Whether ``written_directory`` has to fill the directory that is there, because no other can be put in its place:
    it is a mount point or a lower layer of an overlay, its parent cannot be written, this process works in it.

    Raises OSError, before the work, where nothing can be written at all.
    """
    end = end_of(path)
    if not end.is_dir():
        end.parent.mkdir(parents=True, exist_ok=True)
        with _directory_aside(end, end.parent):
            return False
    if not _working_directory().is_relative_to(end):
        try:
            with _directory_aside(end, end.parent) as aside:
                (aside / "something").touch()
                # Fails in any case: for a place that is taken, if the system would move the directory at all.
                os.rename(end, aside)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                return False
    with _directory_aside(end, end):
        return True


def _working_directory() -> Path:
    try:
        return Path.cwd()
    except FileNotFoundError:  # it was removed
        return Path("nowhere")


@contextmanager
def written_directory(path: Path, last: str, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A new directory to write what shall be at ``path``, put in its place at the end in one step.

    What was there is then gone; where writing fails, or the process is killed, it is as it was. Where no other
    directory can be put in its place (``is_filled_in_place``), the new files are moved into it when all are written:
    the file ``last``, which says that the rest is whole, goes first and comes last, and those of the names ``stale``
    that are not written anew are removed. Raises OSError; nothing is left behind, but where the moving itself failed.
    """
    end = end_of(path)
    in_place = is_filled_in_place(end)
    _remove_leftovers(end, end.parent)
    with _directory_aside(end, end if in_place else end.parent) as aside:
        yield aside
        if not in_place:
            _put_in_place(aside, end)
            return
        _fill(end, aside, last, stale)
    _remove_leftovers(end, end)  # until now they said whose directory it is


def is_interrupted(path: Path, last: str) -> bool:
    """Whether a process was killed while it filled this directory in place."""
    return any((each / last).exists() for each in _leftovers(path, path))


def _fill(path: Path, aside: Path, last: str, stale: Iterable[str]) -> None:
    files = [file.relative_to(aside) for file in sorted(aside.rglob("*")) if not file.is_dir()]
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _lock(descriptor)  # one at a time: files of two would be mixed
        (path / last).unlink(missing_ok=True)
        for file in sorted(files, key=lambda file: file == Path(last)):
            _make_folder(path, file.parent)
            os.replace(aside / file, path / file)
        for name in sorted(set(stale) - {file.as_posix() for file in files}):
            _remove(path, Path(name))
    except BaseException:  # by it the next writer sees that the directory is ours
        os.rename(aside, _new_name(path, aside.parent))
        raise
    finally:
        os.close(descriptor)


def _make_folder(path: Path, folder: Path) -> None:
    """Within ``path``, and nowhere else: a link there is not followed."""
    for name in reversed([folder, *folder.parents]):
        place = path / name
        if place != path and (place.is_symlink() or not place.is_dir()):
            place.unlink(missing_ok=True)
            place.mkdir()


def _remove(path: Path, file: Path) -> None:
    """Within ``path``, with the folders that are empty then; what lies behind a link stays."""
    folders = [path / folder for folder in file.parents if folder != Path()]
    if not any(folder.is_symlink() for folder in folders):
        (path / file).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # not empty
            for folder in folders:
                folder.rmdir()


@contextmanager
def _directory_aside(path: Path, parent: Path) -> Iterator[Path]:
    """A new directory in ``parent``, locked while this process lives, and removed at the end."""
    aside, descriptor = _locked_directory(path, parent)
    try:
        yield aside
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        os.close(descriptor)


def _locked_directory(path: Path, parent: Path) -> tuple[Path, int]:
    while True:
        aside = _new_name(path, parent)
        aside.mkdir()
        try:
            descriptor = os.open(aside, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover before it was locked
            continue
        _lock(descriptor)
        if aside.exists():
            return aside, descriptor
        os.close(descriptor)


def _new_name(path: Path, parent: Path) -> Path:
    return parent / f".{path.name}.{secrets.token_hex(4)}{_PART}"


def _lock(descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file system without locks: then leftovers stay, too
        fcntl.flock(descriptor, fcntl.LOCK_EX)


def _leftovers(path: Path, parent: Path) -> Iterator[Path]:
    """What processes may have left in ``parent`` that were killed while they wrote ``path``."""
    with contextlib.suppress(OSError):  # a folder that may not be listed
        names = (name for name in os.listdir(parent) if name.startswith(f".{path.name}.") and name.endswith(_PART))
        yield from (parent / name for name in names)


def _remove_leftovers(path: Path, parent: Path) -> None:
    """But for directories that another process holds locked."""
    for aside in list(_leftovers(path, parent)):
        try:
            descriptor = os.open(aside, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError:  # another process is writing it
            pass
        finally:
            os.close(descriptor)


def _put_in_place(aside: Path, path: Path) -> None:
    """Makes ``aside`` the directory ``path``; another that was there is then ``aside``. Raises OSError."""
    while True:
        try:
            if path.exists():
                _exchange(aside, path)
            else:
                os.rename(aside, path)
            return
        except OSError as error:
            # Another process has put its own there, or taken it away, in between.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOENT) or not aside.exists():
                raise


def _exchange(a: Path, b: Path) -> None:
    """Exchanges the names of two directories in one step: renameat2(2), Linux 3.15. Raises OSError."""
    at_fdcwd, rename_exchange = -100, 2
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc from 2.28, musl from 1.2.4 on
    if renameat2 is not None:
        if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
            return
        code = ctypes.get_errno()
        if code not in (errno.EINVAL, errno.ENOSYS):  # what a file system says that cannot do it
            raise OSError(code, os.strerror(code))
    # Two steps: a reader, or a process killed just here, may find no bundle; the old one is then under the other name.
    old = a.with_name(a.name.removesuffix(_PART) + ".old")
    os.rename(b, old)
    os.rename(a, b)
    os.rename(old, a)
