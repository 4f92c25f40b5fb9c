"""Accuracy: what is counted of an engine's outputs, image by image."""

import math

import numpy as np
import pytest
from support.reports import accuracy, compare

from xceptile.runtime.accuracy import sqnr_db
from xceptile.runtime.obtained import MEASURED


def test_compare_counts() -> None:
    a = accuracy()
    assert (a.images, a.labelled, a.float_correct, a.int8_correct) == (4, 4, 4, 3)
    assert (a.agreeing, a.float_only_correct, a.int8_only_correct) == (3, 1, 0)
    assert a.bit_exact
    assert a.compared_values == 8
    assert [(f.image, f.label, f.float_class, f.int8_class, f.margin) for f in a.flips] == [
        ("3.png", "b", "b", "a", 2.0)
    ]


def test_one_step_off_is_seen() -> None:
    logits = np.zeros((1, 2), np.int8)
    expected = np.array([[0, 1]], np.int8)
    a = compare(
        ["x"], [None], ("a", "b"), logits.astype(np.float32), logits, expected,
        scale=1.0, zero_point=0, engine="e", device="local", obtained=MEASURED,
    )  # fmt: skip
    assert not a.bit_exact
    assert (a.differing_values, a.largest_difference_steps) == (1, 1)
    assert math.isnan(a.top1)


def test_sqnr() -> None:
    assert sqnr_db(np.array([10.0]), np.array([9.0])) == pytest.approx(20.0)
    assert sqnr_db(np.array([1.0]), np.array([1.0])) == math.inf
