"""Which classes are taken for which, by int8 and by float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .accuracy import ImageResult

DRAWN_CLASSES = 40  # a matrix of more is not readable


@dataclass(frozen=True)
class Mistake:
    """Images of the class ``label`` that were taken for ``predicted``."""

    label: str
    predicted: str
    int8: int
    float32: int


@dataclass(frozen=True)
class Confusion:
    """Counts of labelled images of one engine; ``matrix[i][j]``: of class i, taken for class j by int8.

    ``matrix`` is empty for more than DRAWN_CLASSES classes. ``mistakes`` are the most frequent of either network.
    """

    engine: str
    images: int
    classes: tuple[str, ...]
    matrix: tuple[tuple[int, ...], ...]
    mistakes: tuple[Mistake, ...]


def confusion(
    engine: str, classes: Sequence[str], results: Sequence[ImageResult], key: str, top: int = 20
) -> Confusion | None:
    """Of the images that the engine under ``key`` ran; None where none of them has a label, or there is one class."""
    if len(classes) == 1:
        return None
    int8_counts: NDArray[np.int64] = np.zeros((len(classes), len(classes)), np.int64)
    float_counts = np.zeros_like(int8_counts)
    for result in results:
        if result.label is not None and key in result.engines:
            int8_counts[result.label, result.engines[key].top[0]] += 1
            float_counts[result.label, result.float_top[0]] += 1
    images = int(int8_counts.sum())
    if images == 0:
        return None
    wrong = int8_counts + float_counts
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[:top]
    pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[i, j]]
    mistakes = tuple(Mistake(classes[i], classes[j], int(int8_counts[i, j]), int(float_counts[i, j])) for i, j in pairs)
    drawn = len(classes) <= DRAWN_CLASSES
    matrix = tuple(tuple(row) for row in int8_counts.tolist()) if drawn else ()
    return Confusion(engine, images, tuple(classes), matrix, mistakes)
