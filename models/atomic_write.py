"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Puts ``data``, text as UTF-8, at ``path``: written aside and renamed, so that a reader finds the old file or the
    new one. Folders above it are made. Raises OSError; then what was there is as it was, and nothing is left behind.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        aside.write_bytes(data.encode() if isinstance(data, str) else data)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
