"""What calibration observed: the range of every activation and the identity of the images. Never a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

SCHEMA = 1


class CalibrationError(ValueError):
    """Calibration that cannot be used. ``tensor`` is the graph's name of it, ``path`` the module it came from."""

    def __init__(self, message: str, tensor: str = "", path: str = "") -> None:
        super().__init__(message)
        self.tensor = tensor
        self.path = path


@dataclass(frozen=True)
class TensorRange:
    """``low`` and ``high`` as the observer chose them, within ``minimum`` and ``maximum`` as they were seen."""

    low: float
    high: float
    minimum: float
    maximum: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.low, self.high, self.minimum, self.maximum))) or self.low > self.high:
            raise CalibrationError(f"not a range: {self}")


@dataclass(frozen=True)
class CalibrationTable:
    """``ranges`` by tensor name; ``images_sha256`` as ``images.HashedImages`` computes it over ``image_count``."""

    ranges: Mapping[str, TensorRange]
    image_count: int
    images_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of ``table_from_json``; floats survive exactly."""
        return {
            "schema": SCHEMA,
            "images": {"count": self.image_count, "sha256": self.images_sha256},
            "ranges": {name: asdict(value) for name, value in self.ranges.items()},
        }


def table_from_json(values: Mapping[str, Any]) -> CalibrationTable:
    """A table from parsed JSON. Raises CalibrationError for another schema or a damaged table."""
    if values.get("schema") != SCHEMA:
        raise CalibrationError(f"calibration table: this version reads schema {SCHEMA}, got {values.get('schema')!r}")
    try:
        ranges = {str(name): TensorRange(**{k: float(v) for k, v in r.items()}) for name, r in values["ranges"].items()}
        return CalibrationTable(ranges, int(values["images"]["count"]), str(values["images"]["sha256"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"calibration table: damaged: {error!r}") from error
