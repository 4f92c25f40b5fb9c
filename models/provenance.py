"""Where a network that was read from a file comes from, as its model card says it."""

from __future__ import annotations

import hashlib
from pathlib import Path


def provenance_of(path: Path, kind: str) -> dict[str, str]:
    """Of a file that brings no model card of its own."""
    return {"source": path.name, "kind": kind, "sha256": file_sha256(path)}


def file_sha256(path: Path) -> str:
    """As hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
