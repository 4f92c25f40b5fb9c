"""The calibration images as a stream: checked, counted and hashed as they pass, never held."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

from .table import CalibrationError

Pixels = NDArray[np.uint8]


class HashedImages:
    """Iterates over ``images``, each uint8 (height, width, channels); then ``count`` and ``sha256`` say which.

    The hash is over each image's bytes in order. Raises CalibrationError for an image of another form, and at the end
    where there was none.
    """

    def __init__(self, images: Iterable[Pixels], shape: tuple[int, ...]) -> None:
        self._images = images
        self._shape = shape
        self._hash = hashlib.sha256()
        self.count = 0

    def __iter__(self) -> Iterator[Pixels]:
        for image in self._images:
            if image.dtype != np.uint8 or image.shape != self._shape:
                raise CalibrationError(
                    f"calibration image {self.count} is {image.dtype}{list(image.shape)}, "
                    f"the network takes uint8{list(self._shape)}"
                )
            self._hash.update(image.tobytes())
            self.count += 1
            yield image
        if self.count == 0:
            raise CalibrationError("there are no calibration images: give at least one, a few hundred are usual")

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()
