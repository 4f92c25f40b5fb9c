"""What every engine can do."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]


class EngineError(RuntimeError):
    """An engine that cannot be had here or failed to run. The message says what is missing or what happened."""


class Engine(Protocol):
    """A network ready to run. ``name`` is ``native``, ``litert`` or ``reference``."""

    name: str

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, one after the other -> (B, classes); int8, or float32 for a float network."""

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the image ``x`` (1, H, W, C), every sample kept, in milliseconds."""

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""
