"""Latency: turns, samples, intervals of ratios: the bookkeeping is tested, no time."""

from __future__ import annotations

import numpy as np
import pytest
from support.reports import sampled

from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.latency import PILOT, bootstrap_medians, interleave_ms, interleaved_ratio, median_ratio_interval


class FakeEngine:
    """An engine whose every inference takes ``ms`` on a clock of its own; ``log`` gets its calls."""

    def __init__(self, name: str, ms: float, log: list[tuple[str, int, int]]) -> None:
        self.name, self.ms, self.log = name, ms, log

    def run(self, x: np.ndarray) -> np.ndarray:
        return x

    def time_ms(self, x: np.ndarray, repeats: int, warmup: int) -> list[float]:
        self.log.append((self.name, repeats, warmup))
        return [self.ms] * repeats

    def close(self) -> None: ...


def test_engines_take_turns() -> None:
    log: list[tuple[str, int, int]] = []
    x = np.zeros(1)
    shares: list[float] = []
    turns = interleave_ms(
        [(FakeEngine("a", 2.0, log), x), (FakeEngine("b", 5.0, log), x)],
        rounds=3,
        repeats=4,
        warmup=7,
        progress=shares.append,
    )
    assert log == [("a", PILOT, 7), ("b", PILOT, 7), *[("a", 4, 1), ("b", 4, 1)] * 3]
    assert turns == [[[2.0] * 4] * 3, [[5.0] * 4] * 3]
    assert shares[-1] == 1.0
    assert shares == sorted(shares)


def test_times_that_come_to_nothing_have_an_end() -> None:
    """A device whose first answer was an honest one, and whose others are next to nothing."""

    class Liar(FakeEngine):
        def time_ms(self, x: np.ndarray, repeats: int, warmup: int) -> list[float]:
            return [10.0 if repeats == PILOT else 1e-9] * repeats

    with pytest.raises(EngineError, match="do not add up"):
        interleave_ms([(Liar("a", 1.0, []), np.zeros(1))], rounds=2, repeats=1, min_duration_s=1.0)


def test_the_least_duration_makes_turns_longer_not_more() -> None:
    log: list[tuple[str, int, int]] = []
    fast, slow = FakeEngine("fast", 0.01, log), FakeEngine("slow", 10.0, log)
    turns = interleave_ms([(fast, np.zeros(1)), (slow, np.zeros(1))], rounds=10, repeats=5, min_duration_s=1.0)
    assert [len(each) for each in turns] in ([10, 10], [11, 11])  # the sum of 100,000 hundredths is not quite a second
    for each in turns:
        assert sum(map(sum, each)) >= 1000


@pytest.mark.parametrize("n", [1, 2, 5, 20, 31])
def test_bootstrap_medians_are_those_of_resamples(n: int) -> None:
    rng = np.random.default_rng(n)
    values = rng.exponential(1.0, n)
    direct = np.median(rng.choice(values, (20_000, n)), axis=1)
    ours = bootstrap_medians(values, np.random.default_rng(0), 20_000)
    for percent in (2.5, 25, 50, 75, 97.5):
        near = np.percentile(direct, [percent - 1.5, percent + 1.5])
        assert near[0] <= np.percentile(ours, percent) <= near[1]


def test_a_drift_that_touches_both_leaves_their_ratio() -> None:
    """The machine slows to a third while the two take turns; the ratio of the medians alone could not know."""
    rng = np.random.default_rng(0)
    drift = np.linspace(1, 3, 20)[:, np.newaxis]
    a = sampled(drift * rng.normal(1.0, 0.002, (20, 10)), 20)
    b = sampled(drift * rng.normal(2.0, 0.004, (20, 10)), 20, "float32")
    _, low, high = interleaved_ratio(a, b)
    assert low <= 0.5 <= high
    assert high - low < 0.01
    _, low, high = median_ratio_interval(a.samples_ms, b.samples_ms)
    assert high - low > 0.05


def test_samples_of_a_turn_do_not_count_as_independent() -> None:
    """Turns of 1000 equal samples: as many samples, no more certainty."""
    rng = np.random.default_rng(0)
    turns = rng.normal(1.0, 0.1, 20)[:, np.newaxis]
    a, b = sampled(np.repeat(turns, 1000, 1), 20), sampled(np.ones((20, 1000)), 20, "float32")
    _, low, high = interleaved_ratio(a, b)
    assert high - low > 0.02
    _, low, high = interleaved_ratio(sampled(a.turn_medians_ms), sampled(b.turn_medians_ms))
    assert high - low > 0.02


def test_turns_that_do_not_fit_are_not_used() -> None:
    a = sampled(np.arange(1.0, 8.0), 3)
    assert len(a.turn_medians_ms) == 7
    assert interleaved_ratio(a, a)[0] == 1.0


def test_the_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(10, 1, 300), rng.normal(20, 1, 300)
    ratio, low, high = median_ratio_interval(a.tolist(), b.tolist())
    assert low < 0.5 < high
    assert low < ratio < high
    assert high - low < 0.03
