"""What every engine can do."""

from __future__ import annotations

import subprocess
from typing import Any, Protocol, TypeVar

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


def last_line(done: subprocess.CompletedProcess[Any]) -> str:
    """The last line that a program said, or else its status."""
    said = done.stderr or done.stdout or ""
    text = said.decode("utf-8", "replace") if isinstance(said, bytes) else str(said)
    lines = text.strip().splitlines()
    return lines[-1] if lines else f"it ended with status {done.returncode} and no message"


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
