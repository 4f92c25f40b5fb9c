"""Two programs timed in turns, so that a machine that slows down slows both. The standard library only."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

Samples = tuple[list[float], list[float]]


def interleave(
    ours: Callable[[], object],
    theirs: Callable[[], object],
    rounds: int,
    clock_ns: Callable[[], int],
    pause_s: float = 0.0,
) -> Samples:
    """Milliseconds of each, taken in turns; the first two rounds are warm-up. In the pause the threads of the last
    one, which may spin for a while, come to rest."""
    samples: Samples = ([], [])
    for _ in range(rounds + 2):
        for run, kept in zip((ours, theirs), samples, strict=True):
            time.sleep(pause_s)
            start = clock_ns()
            run()
            kept.append((clock_ns() - start) / 1e6)
    return samples[0][2:], samples[1][2:]


def ratio(samples: Samples) -> float:
    """The median of ours / theirs within a round."""
    return statistics.median(a / b for a, b in zip(*samples, strict=True))
