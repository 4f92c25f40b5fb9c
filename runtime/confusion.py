"""Which classes are taken for which, by int8 and by float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .engines.engine import Array, Engine
from .measure import Flip

DRAWN_CLASSES = 40  # a matrix of more is not readable


class RecordingEngine:
    """An engine that keeps the class of every output it gives: ``predicted``, in order."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.name = engine.name
        self.predicted: list[int] = []

    def run(self, x: Array) -> Array:
        outputs = self.engine.run(x)
        self.predicted += outputs.argmax(1).tolist()
        return outputs

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        return self.engine.time_ms(x, repeats, warmup)

    def close(self) -> None:
        self.engine.close()


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
    engine: str,
    classes: Sequence[str],
    names: Sequence[str],
    labels: Sequence[int | None],
    predicted: Sequence[int],
    flips: Sequence[Flip],
    top: int = 20,
) -> Confusion | None:
    """From int8's class of every image and the images where float's is another; None where no image has a label."""
    real = dict(zip(names, predicted, strict=True))
    real.update({flip.image: classes.index(flip.float_class) for flip in flips})
    int8_counts: NDArray[np.int64] = np.zeros((len(classes), len(classes)), np.int64)
    float_counts = np.zeros_like(int8_counts)
    for name, label, found in zip(names, labels, predicted, strict=True):
        if label is not None:
            int8_counts[label, found] += 1
            float_counts[label, real[name]] += 1
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
