"""Tests of paired yes-or-no results."""

from __future__ import annotations

import math


def mcnemar_exact(b: int, c: int) -> float:
    """The two-sided p-value that ``b`` and ``c`` images that only one of two classifiers gets right are equally likely.

    Under that hypothesis b is binomial of b + c and a half; exact, for any counts, 1.0 where both are 0.
    Source: McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12 (1947), with the binomial distribution in place of its approximation.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of images cannot be negative: {b}, {c}")
    n, term, tail = b + c, 1, 0
    for k in range(min(b, c) + 1):
        tail += term  # of the integers n over k: no rounding, no overflow
        term = term * (n - k) // (k + 1)
    return min(1.0, _ratio(2 * tail, n))


def _ratio(count: int, n: int) -> float:
    """count / 2**n for integers beyond a float's range."""
    shift = max(0, count.bit_length() - 64)
    return math.ldexp(count >> shift, shift - n)
