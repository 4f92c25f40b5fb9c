"""Where a network that was read from a file comes from, as its model card says it."""

from __future__ import annotations

import hashlib
from pathlib import Path

# What a loader had to choose, to leave aside or to suppose, which whoever compiles the network is told.
NOTES = ("weights", "unused tensors", "left out", "assumed")


def provenance_of(path: Path, kind: str) -> dict[str, str]:
    """Of a file that brings no model card of its own."""
    return {"source": path.name, "kind": kind, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """As hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
