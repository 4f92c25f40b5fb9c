"""Latency: samples of single inferences that engines take in turns, and ratios with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .engines.engine import Array, Engine, EngineError

PILOT = 3  # inferences that say how fast an engine is
MOST_TURNS = 1000  # for each that was planned by the pilot: a device that answers with next to nothing never gets there


@dataclass(frozen=True)
class Latency:
    """Raw wall times of single inferences, in order.

    They were taken in ``turns`` of equally many (0: not in turns). What disturbs a machine lasts longer than an
    inference, so it is turns that are independent of each other, not samples.
    """

    engine: str
    dtype: str
    device: str
    obtained: str
    threads: int
    samples_ms: tuple[float, ...]
    turns: int = 0
    batch: int = 1  # images that one inference takes at once

    @property
    def image_ms(self) -> float:
        """The median time for one image of the batch."""
        return self.median_ms / self.batch

    @property
    def turn_medians_ms(self) -> NDArray[np.float64]:
        """The median of each turn, in order; the samples themselves where there were no turns."""
        samples = np.asarray(self.samples_ms)
        if self.turns < 1 or len(samples) % self.turns:
            return samples
        medians: NDArray[np.float64] = np.median(samples.reshape(self.turns, -1), axis=1)
        return medians

    @property
    def is_float(self) -> bool:
        """Whether it is of a float build, which int8 is held against."""
        return self.dtype.startswith("float")

    @property
    def median_ms(self) -> float:
        return float(np.median(self.samples_ms))

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.samples_ms, percent))


def interleave_ms(
    engines: Sequence[tuple[Engine, Array]],
    *,
    rounds: int,
    repeats: int,
    warmup: int = 3,
    min_duration_s: float = 0.0,
    progress: Callable[[float], None] = lambda share: None,
) -> list[list[list[float]]]:
    """Times engines in turns (A B A B ...), so that a drift of the machine's speed touches all alike.

    Each engine first runs ``warmup`` inferences and a few that say how fast it is; none of these count. Then come at
    least ``rounds`` turns of each of at least ``repeats`` inferences, of more where that takes for the samples of each
    engine to last ``min_duration_s`` together. Returns for each engine the samples of each of its turns, in
    milliseconds, in order, all of them: what lies far out is what a user would have met. Raises EngineError where they
    never come to last so long.
    """
    counts = []
    for engine, x in engines:
        pilot_ms = float(np.median(engine.time_ms(x, PILOT, warmup)))
        counts.append(max(repeats, math.ceil(min_duration_s * 1e3 / rounds / max(pilot_ms, 1e-4))))
    turns: list[list[list[float]]] = [[] for _ in engines]
    lasted_ms = [0.0] * len(engines)
    share, number = 0.0, 0
    while share < 1 and engines:
        for index, (engine, x) in enumerate(engines):
            turns[index].append(engine.time_ms(x, counts[index], 1))
            lasted_ms[index] += sum(turns[index][-1])
            progress(share)
        number += 1
        if number > MOST_TURNS * rounds:
            raise EngineError(f"its times do not add up: {min(lasted_ms):.3g} ms together in {number} turns")
        share = min(1.0, number / rounds, min(lasted_ms) / 1e3 / min_duration_s if min_duration_s > 0 else 1.0)
        progress(share)
    return turns


def fastest_float(latencies: Sequence[Latency]) -> Latency | None:
    """The float build that int8 is held against; None where there is none."""
    return min((x for x in latencies if x.is_float), key=lambda latency: latency.median_ms, default=None)


def interleaved_ratio(a: Latency, b: Latency) -> tuple[float, float, float]:
    """The ratio a / b of two latencies that were taken in turns in one run, with its 95 % interval: (ratio, low, high).

    The median over the rounds of the ratio of the two turns' medians; its interval by resampling rounds. Where they
    were not taken in the same number of turns: the ratio of the medians.
    """
    if a.turns != b.turns or len(a.turn_medians_ms) != a.turns:
        return median_ratio_interval(a.samples_ms, b.samples_ms)
    return _median_interval(a.turn_medians_ms / b.turn_medians_ms)


def _median_interval(values: NDArray[np.float64]) -> tuple[float, float, float]:
    medians = bootstrap_medians(values, np.random.default_rng(0))
    return float(np.median(values)), float(np.percentile(medians, 2.5)), float(np.percentile(medians, 97.5))


def median_ratio_interval(
    a_ms: Sequence[float], b_ms: Sequence[float], *, confidence: float = 0.95
) -> tuple[float, float, float]:
    """The ratio of medians a / b and its percentile bootstrap interval: (ratio, low, high).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap (1993), chapter 13. Seeded, so repeatable.
    """
    a, b = np.asarray(a_ms), np.asarray(b_ms)
    rng = np.random.default_rng(0)
    ratios = bootstrap_medians(a, rng) / bootstrap_medians(b, rng)
    tail = (1 - confidence) / 2 * 100
    return (
        float(np.median(a) / np.median(b)),
        float(np.percentile(ratios, tail)),
        float(np.percentile(ratios, 100 - tail)),
    )


def bootstrap_medians(values: NDArray[np.float64], rng: np.random.Generator, count: int = 2000) -> NDArray[np.float64]:
    """The medians of ``count`` resamples of ``values`` (n,), with replacement, without drawing each of n values.

    The k-th smallest of a resample is the value of rank floor(n U), U the k-th smallest of n uniform numbers, which is
    of the distribution Beta(k, n + 1 - k); given it, the next one is U + (1 - U) V, V of Beta(1, n - k).
    Source: David and Nagaraja, Order Statistics (2003), sections 2.1 and 2.5.
    """
    ordered, n = np.sort(np.asarray(values, np.float64)), len(values)
    k = (n + 1) // 2
    low = rng.beta(k, n + 1 - k, count)
    high = low if n % 2 else low + (1 - low) * rng.beta(1, n - k, count)
    ranks = np.minimum((np.stack([low, high]) * n).astype(np.int64), n - 1)
    medians: NDArray[np.float64] = ordered[ranks].mean(axis=0)
    return medians
