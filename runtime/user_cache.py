"""Where what was built or compiled here is kept: a folder of the user's that nobody else can put programs into."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path


class CacheError(RuntimeError):
    """No folder can be had. The message names XDG_CACHE_HOME, which chooses one."""


def user_cache(name: str = "") -> Path:
    """``$XDG_CACHE_HOME/xceptile/NAME``, or ``~/.cache/xceptile/NAME``; it is made where it is missing.

    Without a home folder that can be written to (a container's user often has none), or where others could put
    something into it, a folder in the one for temporary files. Raises CacheError where XDG_CACHE_HOME is set to what
    will not do, or there is nothing else.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    if chosen.startswith("/"):
        return _made(Path(chosen) / "xceptile" / name)
    try:
        return _made(Path.home() / ".cache/xceptile" / name)
    except (CacheError, RuntimeError):  # Path.home's where the user has none
        return _made(Path(tempfile.gettempdir()) / f"xceptile-{os.geteuid()}" / name)


def lock_for(what: str) -> Path:
    """A folder of the user's that stands for ``what``, for ``locked``."""
    folder = user_cache("locks") / hashlib.sha256(what.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    folder.mkdir(exist_ok=True)
    return folder


def _made(folder: Path) -> Path:
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        for each in reversed(missing):
            each.mkdir(mode=0o700, exist_ok=True)
        folder = folder.resolve(strict=True)
        problem = who_else_writes(folder)
    except OSError as error:
        problem = f"cannot be used: {error.strerror}"
    if problem:
        raise CacheError(f"{folder}: {problem}; set XDG_CACHE_HOME to a folder of your own")
    return folder


def who_else_writes(folder: Path) -> str:
    """Why others than this user and root could exchange what lies in a folder, of a path without links; "" where they
    cannot. The folder itself is to be this user's. Raises OSError.
    """
    trusted = (os.geteuid(), 0, Path("/").stat().st_uid)  # who stands for root in a container owns the root folder
    if folder.stat().st_uid != trusted[0]:
        return f"belongs to account {folder.stat().st_uid}, not to this one ({trusted[0]})"
    for each in (folder, *folder.parents):
        found = each.stat()
        if found.st_uid not in trusted:
            return f"{each} belongs to account {found.st_uid}, which could exchange what lies below"
        writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        sticky = found.st_mode & stat.S_ISVTX and each != folder  # names there are their owners', as in /tmp
        if writable and not sticky:
            return f"other accounts can write to {each} (chmod go-w {each})"
    return ""
