"""Tests of paired yes-or-no results, against scipy's."""

import pytest
from scipy import stats

from xceptile.runtime.statistics import mcnemar_exact


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (55, 45), (10, 0), (3, 17), (800, 700), (0, 5000)])
def test_mcnemar_is_the_exact_binomial(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_refuses_what_is_no_count() -> None:
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)
