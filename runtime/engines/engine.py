"""What every engine can do."""

from __future__ import annotations

import math
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


def times_ms(samples: object, count: int, *, zero: bool = False) -> list[float]:
    """``count`` times that a program or a device answered with, in milliseconds; above 0, unless ``zero`` may be, too.

    Raises ValueError for anything else: whoever measures until enough time has passed would measure for ever.
    """
    if not isinstance(samples, list) or len(samples) != count:
        raise ValueError(f"not {count} times: {str(samples)[:80]}")
    for sample in samples:
        known = isinstance(sample, int | float) and not isinstance(sample, bool)
        if not known or not math.isfinite(sample) or sample < 0 or (sample == 0 and not zero):
            raise ValueError(f"{str(sample)[:80]!r} is no time in ms")
    return [float(sample) for sample in samples]


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
