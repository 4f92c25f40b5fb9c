"""The static arena: every tensor of a straight line of kernel calls gets an offset that is fixed at compile time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lifetime:
    """A buffer of ``size_bytes`` that holds a value from step ``first`` to step ``last``, both included."""

    name: str
    size_bytes: int
    first: int
    last: int

    def overlaps(self, other: Lifetime) -> bool:
        return self.first <= other.last and other.first <= self.last


def plan_offsets(lifetimes: Sequence[Lifetime], alignment_bytes: int) -> tuple[Mapping[str, int], int]:
    """Offsets by name, and the arena's size.

    Best fit, largest first: a buffer goes into the smallest gap between those placed before it that live at the same
    time (Pisarchyk and Lee, "Efficient Memory Management for Deep Neural Net Inference", 2020, greedy by size).
    """
    placed: list[tuple[int, Lifetime]] = []
    for lifetime in sorted(lifetimes, key=lambda item: (-item.size_bytes, item.first)):
        size = _aligned(lifetime.size_bytes, alignment_bytes)
        best, best_gap, end = None, None, 0
        for offset, other in sorted(((o, p) for o, p in placed if p.overlaps(lifetime)), key=lambda item: item[0]):
            gap = offset - end
            if gap >= size and (best_gap is None or gap < best_gap):
                best, best_gap = end, gap
            end = max(end, offset + _aligned(other.size_bytes, alignment_bytes))
        placed.append((end if best is None else best, lifetime))
    total = max((offset + _aligned(item.size_bytes, alignment_bytes) for offset, item in placed), default=0)
    return {item.name: offset for offset, item in placed}, total


def _aligned(size_bytes: int, alignment_bytes: int) -> int:
    return -(-size_bytes // alignment_bytes) * alignment_bytes
