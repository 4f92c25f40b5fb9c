"""The drawn image set: the same bytes everywhere, every class in turn, and a demo network that can tell them apart."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from xceptile.models import drawn

HASHES = {
    ("train", 0, 80): "46b75bbb31387cf2",
    ("train", 13, 80): "0a60cd9ac797317f",
    ("calibration", 8, 80): "3647bab02aa6768a",
    ("val", 4, 80): "037969382e6a38a8",
    ("val", 11, 80): "f931af6542b9891b",
    ("val", 12, 80): "f3758e729683b8f3",
    ("val", 20, 80): "07fb9f7c3878d638",
    ("val", 27, 299): "ab273b5bcd40894f",
    ("train", 29999, 71): "85150e14b68e667f",
}


@pytest.mark.parametrize("image", HASHES, ids=str)
def test_images_are_the_same_bytes_everywhere(image: tuple[str, int, int]) -> None:
    pixels, _ = drawn.draw(*image)
    assert hashlib.sha256(pixels.tobytes()).hexdigest()[:16] == HASHES[image]


def test_an_image_depends_on_nothing_drawn_before_it() -> None:
    first = drawn.draw("val", 3)[0]
    drawn.draw("val", 4)
    assert np.array_equal(first, drawn.draw("val", 3)[0])


def test_splits_and_indices_differ() -> None:
    images = [drawn.draw(split, index)[0].tobytes() for split in drawn.SPLITS for index in range(48)]
    assert len(set(images)) == len(images)


def test_an_image_is_rgb_bytes_of_the_asked_size() -> None:
    pixels, label = drawn.draw("calibration", 30, 71)
    assert (pixels.shape, pixels.dtype, pixels.flags.c_contiguous, label) == ((71, 71, 3), np.uint8, True, 6)


def test_classes_take_turns() -> None:
    labels = [drawn.draw("val", index, 16)[1] for index in range(2 * len(drawn.LABELS))]
    assert labels == [*range(len(drawn.LABELS))] * 2


def test_class_names_are_distinct_and_each_has_an_outline() -> None:
    assert len(set(drawn.LABELS)) == 24


@pytest.mark.parametrize("arguments", [("test", 0, 96), ("val", -1, 96), ("val", 0, 15)])
def test_bad_arguments_are_refused(arguments: tuple[str, int, int]) -> None:
    with pytest.raises(ValueError, match=r"drawn set|at least"):
        drawn.draw(*arguments)
