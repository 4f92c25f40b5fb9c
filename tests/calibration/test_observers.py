"""Observers: each against its definition on whole arrays; streaming forgets nothing and depends on no order."""

from __future__ import annotations

import numpy as np
import pytest

from xceptile.calibration.observers import (
    Entropy,
    Histogram,
    MeanSquaredError,
    MinMax,
    MovingAverage,
    Observation,
    Observer,
    Percentile,
)

HISTOGRAMMED = [Percentile(), Percentile(99.0), Entropy(), MeanSquaredError()]


def observe(observer: Observer, *parts: np.ndarray) -> tuple[float, float]:
    observation = Observation(observer)
    for part in parts:
        observation.add(part.astype(np.float32))
    return observation.range()


def squared_error(x: np.ndarray, low: float, high: float) -> float:
    """Of x quantized to int8 with a free zero point over [low, high], zero included."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / 255
    zero = np.rint(-low / scale)
    return float(np.mean(((np.clip(np.rint(x / scale) + zero, 0, 255) - zero) * scale - x) ** 2))


@pytest.fixture(scope="module")
def samples():
    rng = np.random.default_rng(0)
    normal = rng.normal(size=100_000)
    return {
        "normal": normal,
        "relu": np.maximum(normal, 0),
        "laplace": rng.laplace(size=100_000),
        "uniform": rng.uniform(-1, 3, 100_000),
        "outliers": np.concatenate([normal, [60.0, -80.0]]),
        "negative": -np.abs(normal) - 0.01,
    }


def test_min_max_is_everything():
    assert observe(MinMax(), np.array([1.0, 2.0]), np.array([-3.0, 0.5])) == (-3.0, 2.0)


def test_moving_average_follows_its_formula():
    parts = [np.array([-1.0, 2.0]), np.array([-3.0, 4.0]), np.array([0.0, 8.0])]
    low, high = observe(MovingAverage(0.5), *parts)
    assert (low, high) == (-1.0, 5.5)
    assert observe(MovingAverage(1.0), *parts) == (0.0, 8.0)
    low, high = observe(MovingAverage(0.01), *parts)  # so far a plain mean
    assert (low, high) == (pytest.approx(-4 / 3), pytest.approx(14 / 3))


@pytest.mark.parametrize("name", ["normal", "relu", "laplace", "uniform", "negative"])
@pytest.mark.parametrize("percent", [99.99, 99.0, 90.0])
def test_percentile_is_the_quantile_within_a_bin(samples, name, percent):
    x = samples[name]
    low, high = observe(Percentile(percent), *np.array_split(x, 9))
    tail = (100 - percent) / 200
    width = 2 * float(2 ** np.ceil(np.log2(np.abs(x).max()))) / Histogram.BINS
    ranks = np.sort(x.astype(np.float32))
    for seen, quantile in ((low, tail), (high, 1 - tail)):
        rank = quantile * x.size  # this many values lie below; between two values any point does
        below, above = ranks[int(rank) - 1], ranks[int(np.ceil(rank + 1e-6))]
        assert below - width <= seen <= above + width


@pytest.mark.parametrize("name", ["normal", "relu", "laplace", "uniform", "outliers", "negative"])
def test_least_error_beats_every_other_observer_and_a_fine_search(samples, name):
    x = samples[name].astype(np.float32).astype(np.float64)
    chosen = squared_error(x, *observe(MeanSquaredError(), x))
    for other in (MinMax(), Percentile(), Entropy()):
        assert chosen <= squared_error(x, *observe(other, x)) * 1.02
    low, high = min(x.min(), 0), max(x.max(), 0)
    fractions = np.linspace(0.1, 1, 19)
    searched = min(squared_error(x, low * a, high * b) for a in fractions for b in fractions)
    assert chosen <= searched * 1.05


def test_entropy_clips_a_long_tail_and_keeps_a_uniform_range(samples):
    low, high = observe(Entropy(), samples["outliers"])
    assert -10 < low < -3
    assert 3 < high < 10
    low, high = observe(Entropy(), samples["uniform"])
    assert low < -0.99
    assert high > 2.95


@pytest.mark.parametrize("observer", [MinMax(), *HISTOGRAMMED])
def test_the_order_and_grouping_of_images_do_not_matter(samples, observer):
    # Magnitudes that grow and shrink, so that the histogram widens at different moments.
    scales = [1, 90, 0.01, 7, 0, 3e-5, 2, 40]
    parts = [part * scale for part, scale in zip(np.array_split(samples["normal"], 8), scales, strict=True)]
    forward = observe(observer, *parts)
    assert observe(observer, *reversed(parts)) == forward
    assert observe(observer, np.concatenate(parts)) == forward


@pytest.mark.parametrize("observer", [MinMax(), MovingAverage(), *HISTOGRAMMED])
@pytest.mark.parametrize("name", ["normal", "relu", "outliers", "negative"])
def test_a_range_lies_within_what_was_seen(samples, observer, name):
    x = samples[name].astype(np.float32)
    low, high = observe(observer, x)
    assert x.min() <= low <= high <= x.max()


def test_the_histogram_counts_every_value_once_and_its_size_is_fixed():
    rng = np.random.default_rng(1)
    histogram, total = Histogram(), 0
    for exponent in [-30, 0, 5, -3, 20, 1]:
        x = (rng.normal(size=1000) * 2.0**exponent).astype(np.float32)
        x[:10] = 0
        histogram.add(x)
        total += x.size
        assert histogram.counts.sum() == total
        assert histogram.counts.shape == (Histogram.BINS,)
    assert histogram.zeros == 60
    assert histogram.reach == 2.0 ** np.ceil(np.log2(histogram.reach))


def test_a_value_at_a_power_of_two_has_a_bin():
    histogram = Histogram()
    histogram.add(np.array([1.0, -1.0, 0.5], np.float32))
    assert histogram.reach == 2.0
    assert histogram.counts[Histogram.BINS * 3 // 4] == 1
    assert histogram.counts[Histogram.BINS // 4] == 1


@pytest.mark.parametrize("observer", [MinMax(), *HISTOGRAMMED])
@pytest.mark.parametrize(("value", "name"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_values_that_are_not_finite_are_refused(observer, value, name):
    with pytest.raises(FloatingPointError, match=name):
        Observation(observer).add(np.array([0.0, value, 1.0], np.float32))


@pytest.mark.parametrize("make", [lambda: MovingAverage(0.0), lambda: Percentile(50.0), lambda: Percentile(101.0)])
def test_parameters_that_mean_nothing_are_refused(make):
    with pytest.raises(ValueError, match="must be in"):
        make()
