"""Chains of four products in int16 on plain NEON: the split of the weights, and that its bound is the right one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.emulated_bundle import EmulatedBundle
from support.int8_graphs import chained_graph, differences, weights_at_the_bound
from support.needs import requires

from xceptile.compile.kernels.arm import int16_sums
from xceptile.compile.kernels.arm import lower as arm
from xceptile.targets import catalog

TARGET = catalog.get("raspberry-pi-4")


def lane_sums(weights: np.ndarray) -> np.ndarray:
    """(O, K) -> (O, chains of 32 channels, 8): the magnitudes that meet in an int16 lane, added."""
    outputs, k = weights.shape
    padded = np.pad(np.abs(weights.astype(np.int64)), ((0, 0), (0, -k % 32)))
    return padded.reshape(outputs, -1, 4, 8).sum(axis=2)


def whole(parts: int16_sums.Split) -> np.ndarray:
    """Chained weights and corrections, added."""
    total = parts.chained.astype(np.int64)
    for output, (first, end) in enumerate(zip(parts.starts[:-1], parts.starts[1:], strict=True)):
        for entry in parts.entries[first:end]:
            total[output, entry >> 8] += np.int64(entry & 255) - 256 * (entry >> 7 & 1)
    return total


@pytest.mark.parametrize("k", [1, 16, 31, 32, 48, 100, 728])
def test_a_split_is_exact_and_within_the_bound(k: int) -> None:
    rng = np.random.default_rng(k)
    normal = np.clip(np.rint(rng.normal(0, 45, (40, k))), -127, 127).astype(np.int8)
    for weights in (normal, np.full((3, k), 127, np.int8), np.full((3, k), -127, np.int8), weights_at_the_bound(5, k)):
        parts = int16_sums.split(weights)
        assert np.array_equal(whole(parts), weights)
        assert lane_sums(parts.chained).max() <= int16_sums.MOST
        assert np.abs(parts.chained.astype(int)).max() <= 127


def test_weights_within_the_bound_are_left_alone() -> None:
    weights = weights_at_the_bound(8, 64)
    weights[lane_sums(weights).max(axis=(1, 2)) > int16_sums.MOST] = 63
    parts = int16_sums.split(weights)
    assert np.array_equal(parts.chained, weights)
    assert parts.entries.size == 0


def test_the_bound_is_the_greatest_that_holds() -> None:
    """Against the least pixel: 128 times the bound is an int16, 128 times the next is not."""
    assert -128 * -int16_sums.MOST <= np.iinfo(np.int16).max < -128 * -(int16_sums.MOST + 1)


def test_chains_are_for_weights_that_are_seldom_too_much() -> None:
    rng = np.random.default_rng(1)
    normal = np.clip(np.rint(rng.normal(0, 40, (728, 728))), -127, 127).astype(np.int8)
    assert int16_sums.pays(int16_sums.split(normal), 95)
    assert not int16_sums.pays(int16_sums.split(normal), 1)
    assert not int16_sums.pays(int16_sums.split(np.full((728, 728), 127, np.int8)), 95)


@requires("qemu-aarch64", package="qemu-user")
def test_a_wrong_bound_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights at the bound are right on pixels at their extremes; with a bound too high, they are not."""
    graph = chained_graph()
    images = [[np.full((1, 13, 12, 352), value, np.int8)] for value in (-128, 127)]
    for most, wrong in ((int16_sums.MOST, False), (384, True)):
        monkeypatch.setattr(int16_sums, "MOST", most)
        calls = arm.lower(graph, TARGET)
        assert "_chained_" in calls[0].symbol
        bundle = EmulatedBundle(graph, calls, TARGET, tmp_path)
        outputs = bundle.run(images)
        assert any(differences(graph, image, output) for image, output in zip(images, outputs, strict=True)) == wrong
