"""From all values of a tensor over all calibration images to the range [low, high] that int8 will cover.

Five ways of choosing it, as values (``Observer``), and one accumulator (``Observation``) whose memory does not grow
with the number of images. What needs a distribution reads it off a histogram of fixed size whose half-width is a power
of two: bins nest exactly when it doubles, so the counts do not depend on the order of the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LEVELS = 256  # of int8


@dataclass(frozen=True)
class MinMax:
    """Everything that was seen."""


@dataclass(frozen=True)
class MovingAverage:
    """Averages of each image's minimum and maximum: average += max(weight, 1 / images so far) * (new - average).

    0.01 is the constant of torch.ao.quantization.MovingAverageMinMaxObserver; unlike there, the first images do not
    count for more than the others. Depends on the images' order.
    """

    weight: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.weight <= 1:
            raise ValueError(f"moving-average: weight must be in (0, 1], got {self.weight}")


@dataclass(frozen=True)
class Percentile:
    """All but (100 - percent) % of the values, half of those beyond each end."""

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise ValueError(f"percentile: percent must be in (50, 100], got {self.percent}")


@dataclass(frozen=True)
class Entropy:
    """The clipping magnitude of least Kullback-Leibler divergence between the values and their quantized selves.

    Source: S. Migacz, "8-bit Inference with TensorRT", GTC 2017. Exact zeros, which quantize exactly, do not count.
    """


@dataclass(frozen=True)
class MeanSquaredError:
    """The range of least mean squared quantization error, rounding and clipping together."""


Observer = MinMax | MovingAverage | Percentile | Entropy | MeanSquaredError

Range = tuple[float, float]


class Histogram:
    """Counts of values in ``BINS`` equal bins over [-reach, reach), reach a power of two above every magnitude."""

    BINS = 8192

    def __init__(self) -> None:
        self.reach = 0.0
        self.counts = np.zeros(self.BINS, np.int64)
        self.zeros = 0  # of the counts, how many are exact zeros

    def add(self, x: NDArray[np.float32]) -> None:
        """Counts every value of ``x``."""
        largest = float(max(abs(float(x.max())), abs(float(x.min()))))
        if largest > 0:
            self._widen(float(np.ldexp(1.0, int(np.frexp(largest)[1]))))
        if self.reach == 0.0:
            self.counts[self.BINS // 2] += x.size
            self.zeros += x.size
            return
        # A product with a power of two is exact, so the same value falls into the same bin whatever the reach was.
        bins = np.floor(x.ravel() * np.float32(self.BINS / 2 / self.reach)).astype(np.int64) + self.BINS // 2
        self.counts += np.bincount(bins, minlength=self.BINS)
        self.zeros += int(x.size - np.count_nonzero(x))

    def _widen(self, reach: float) -> None:
        """Merges neighbouring bins until ``reach`` is covered."""
        if reach <= self.reach:
            return
        if self.reach > 0:
            doublings = min(round(np.log2(reach / self.reach)), 62)
            signed = np.arange(-self.BINS // 2, self.BINS // 2) >> doublings
            merged = np.zeros_like(self.counts)
            np.add.at(merged, signed + self.BINS // 2, self.counts)
            self.counts = merged
        self.reach = reach

    @property
    def edges(self) -> NDArray[np.float64]:
        """The bins' limits, (BINS + 1,)."""
        return np.linspace(-self.reach, self.reach, self.BINS + 1)


class Observation:
    """What one observer has seen of one tensor. ``add`` each image's values, then ask for the range."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.minimum = np.inf
        self.maximum = -np.inf
        self._averages: Range = (0.0, 0.0)
        self._images = 0
        self._histogram = Histogram() if isinstance(observer, Percentile | Entropy | MeanSquaredError) else None

    def add(self, x: NDArray[np.float32]) -> None:
        """Takes the tensor's values for one image. Raises FloatingPointError where one is not finite."""
        low, high = float(x.min()), float(x.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FloatingPointError("NaN" if np.isnan(x).any() else "infinity")
        self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
        if isinstance(self.observer, MovingAverage):
            self._images += 1
            a, b = self._averages
            w = max(self.observer.weight, 1 / self._images)
            self._averages = a + w * (low - a), b + w * (high - b)
        if self._histogram is not None:
            self._histogram.add(x)

    def range(self) -> Range:
        """(low, high) within the observed extremes. Only after ``add``."""
        seen = self.minimum, self.maximum
        match self.observer:
            case MinMax():
                return seen
            case MovingAverage():
                return self._averages
        assert self._histogram is not None
        low, high = _histogram_range(self.observer, self._histogram, seen)
        return max(low, seen[0]), min(high, seen[1])


def _histogram_range(observer: Observer, histogram: Histogram, seen: Range) -> Range:
    if histogram.reach == 0.0:
        return seen
    match observer:
        case Percentile(percent):
            return _percentile_range(histogram, percent)
        case Entropy():
            return _entropy_range(histogram, seen)
        case _:
            return _least_error_range(histogram, seen)


def _percentile_range(histogram: Histogram, percent: float) -> Range:
    """Quantiles of the histogram, linear within a bin."""
    tail = (100.0 - percent) / 200.0
    cumulative = np.concatenate([[0], np.cumsum(histogram.counts)]).astype(np.float64)
    low, high = np.interp([tail * cumulative[-1], (1 - tail) * cumulative[-1]], cumulative, histogram.edges)
    return float(low), float(high)


def _nonzero_counts(histogram: Histogram) -> NDArray[np.int64]:
    counts = histogram.counts.copy()
    counts[histogram.BINS // 2] -= histogram.zeros
    return counts


def _entropy_range(histogram: Histogram, seen: Range) -> Range:
    """Tries clipping magnitudes from 1/64 of the largest to all of it; the first of least divergence wins."""
    counts, edges = _nonzero_counts(histogram), histogram.edges
    largest = max(-seen[0], seen[1])
    best, best_range = np.inf, seen
    for part in range(1, 65):
        magnitude = largest * part / 64
        # The nearest bin edges: at least one bin on a side that has values.
        first, last = np.searchsorted(edges, [max(seen[0], -magnitude), min(seen[1], magnitude)])
        first, last = max(int(first) - 1, 0), min(int(last), histogram.BINS)
        if last - first < LEVELS // 2:
            continue
        divergence = _divergence(counts, first, last)
        if divergence < best:
            best, best_range = divergence, (float(edges[first]), float(edges[last]))
    return best_range


def _divergence(counts: NDArray[np.int64], first: int, last: int) -> float:
    """KL(P || Q): P the bins first..last with everything outside added to the end ones; Q what remains when each of 256
    levels spreads the values inside evenly over its bins that are not empty in P.
    """
    inside = counts[first:last].astype(np.float64)
    p = inside.copy()
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    level = np.arange(last - first) * LEVELS // (last - first)
    filled = p > 0
    mass = np.bincount(level, weights=inside, minlength=LEVELS)
    members = np.bincount(level, weights=filled.astype(np.float64), minlength=LEVELS)
    q = np.where(filled, mass[level] / np.maximum(members[level], 1), 0.0)
    if q.sum() == 0:
        return float("inf")
    p, q = p[filled] / p.sum(), q[filled] / q.sum()
    # A level with nothing but clipped values leaves Q zero where P is not: a floor keeps the divergence finite.
    return float(np.sum(p * np.log(p / np.maximum(q, 1e-9))))


def _least_error_range(histogram: Histogram, seen: Range) -> Range:
    """Shrinks both ends together first, then each end alone, twice: the first of least error wins."""
    filled = np.flatnonzero(_nonzero_counts(histogram))
    counts = _nonzero_counts(histogram)[filled].astype(np.float64)
    edges = histogram.edges
    centres = (edges[filled] + edges[filled + 1]) / 2

    def error(candidate: Range) -> float:
        return _squared_error(centres, counts, candidate)

    fractions = np.linspace(1.0, 0.02, 99)
    low, high = min(seen[0], 0.0), max(seen[1], 0.0)
    largest = max(-low, high)
    low, high = min(((max(low, -largest * f), min(high, largest * f)) for f in fractions), key=error)
    for _ in range(2):
        high = min(((low, high_) for high_ in _near(high, max(seen[1], 0.0))), key=error)[1]
        low = min(((low_, high) for low_ in _near(low, min(seen[0], 0.0))), key=error)[0]
    return low, high


def _near(value: float, limit: float) -> list[float]:
    """Candidates from half of a range's end to beyond it, not past what was seen."""
    beyond = [value * (1 + i / 40) for i in range(-20, 41) if abs(value * (1 + i / 40)) <= abs(limit)]
    return beyond or [limit]


def _squared_error(centres: NDArray[np.float64], counts: NDArray[np.float64], candidate: Range) -> float:
    low, high = candidate
    scale = (high - low) / (LEVELS - 1)
    if scale <= 0:
        return float("inf")
    zero = np.rint(-low / scale)
    levels = np.clip(np.rint(centres / scale) + zero, 0, LEVELS - 1)
    return float(np.sum(counts * ((levels - zero) * scale - centres) ** 2))
