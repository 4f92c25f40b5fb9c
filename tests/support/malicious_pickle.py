"""A pickle that does harm where it is loaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Malicious:
    """Unpickled, it would make a directory."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)
