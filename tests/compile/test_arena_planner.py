"""The static arena: buffers that live together never overlap, and the arena is near the least possible."""

from __future__ import annotations

import numpy as np
import pytest
from support import int8_graphs

from xceptile.compile.arena_planner import Lifetime, plan_offsets
from xceptile.compile.backends import assembly
from xceptile.compile.backends import cpu as backend
from xceptile.targets import catalog

ALIGNMENT = 64


def overlapping(lifetimes: list[Lifetime], offsets: dict[str, int]) -> list[tuple[str, str]]:
    """Pairs of buffers that share a byte while both hold a value."""
    pairs = []
    for i, a in enumerate(lifetimes):
        for b in lifetimes[:i]:
            start, end = (
                max(offsets[a.name], offsets[b.name]),
                min(offsets[a.name] + a.size_bytes, offsets[b.name] + b.size_bytes),
            )
            if a.first <= b.last and b.first <= a.last and start < end:
                pairs.append((a.name, b.name))
    return pairs


def most_alive_bytes(lifetimes: list[Lifetime]) -> int:
    """Of buffers alive at one step: no arena can be smaller."""
    sizes = {item: -(-item.size_bytes // ALIGNMENT) * ALIGNMENT for item in lifetimes}
    return max(sum(sizes[i] for i in lifetimes if i.first <= step <= i.last) for step in {i.first for i in lifetimes})


def random_lifetimes(seed: int) -> list[Lifetime]:
    rng = np.random.default_rng(seed)
    result = []
    for index in range(int(rng.integers(1, 60))):
        first = int(rng.integers(0, 40))
        result.append(Lifetime(f"t{index}", int(rng.integers(1, 5000)), first, first + int(rng.integers(0, 8))))
    return result


@pytest.mark.parametrize("seed", range(50))
def test_nothing_alive_overlaps(seed: int) -> None:
    lifetimes = random_lifetimes(seed)
    offsets, total = plan_offsets(lifetimes, ALIGNMENT)
    assert overlapping(lifetimes, dict(offsets)) == []
    assert all(offset % ALIGNMENT == 0 for offset in offsets.values())
    assert max(offsets[item.name] + item.size_bytes for item in lifetimes) <= total
    assert most_alive_bytes(lifetimes) <= total


def test_an_overlap_is_seen() -> None:
    lifetimes = [Lifetime("a", 100, 0, 2), Lifetime("b", 100, 2, 3)]
    assert overlapping(lifetimes, {"a": 0, "b": 64}) == [("b", "a")]
    assert overlapping(lifetimes, {"a": 0, "b": 128}) == []


def test_a_chain_takes_no_more_than_its_largest_pair() -> None:
    lifetimes = [Lifetime(f"t{i}", size, i, i + 1) for i, size in enumerate((640, 1280, 64, 640, 128, 1280, 64))]
    _, total = plan_offsets(lifetimes, ALIGNMENT)
    assert total == 640 + 1280


def test_nothing_needs_no_arena() -> None:
    assert plan_offsets([], ALIGNMENT) == ({}, 0)


@pytest.mark.parametrize("target", ["avx2", "avx512vnni"])
def test_xception_is_near_the_bound(target: str) -> None:
    graph = int8_graphs.random_xception(96, 0.25, 10)
    lifetimes = assembly.lifetimes(graph, backend.lower(graph, catalog.get(target)))
    offsets, total = plan_offsets(lifetimes, ALIGNMENT)
    assert overlapping(lifetimes, dict(offsets)) == []
    assert total <= 1.05 * most_alive_bytes(lifetimes)
