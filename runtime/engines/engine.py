"""What every engine can do."""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.generic]
Item = TypeVar("Item", bound=np.generic)


class EngineError(RuntimeError):
    """An engine that cannot be had here or failed to run. The message says what is missing or what happened."""


def fill_batches(x: NDArray[Item], batch: int) -> NDArray[Item]:
    """(B, ...) images as whole batches, (B rounded up to a multiple of ``batch``, ...): the last is repeated."""
    missing = -len(x) % batch
    return np.concatenate([x, np.repeat(x[-1:], missing, axis=0)]) if missing else x


class Engine(Protocol):
    """A network ready to run. ``name`` is ``native``, ``litert`` or ``reference``.

    A network that was compiled for batches of N runs N images at once.
    """

    name: str

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes); int8, or float32 for a float network.

        B is any number: what is missing in the last batch is filled up, and left out of the result.
        """

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the batch ``x`` (N, H, W, C), every sample kept, in milliseconds."""

    def close(self) -> None:
        """Frees what the engine holds; it cannot be used afterwards."""
