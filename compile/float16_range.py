"""Whether a float network fits into float16: what calibration saw, and the constants."""

from __future__ import annotations

from ..calibration.table import CalibrationTable
from ..models.graph import Graph, GraphError

FLOAT16_MAX = 65504.0  # IEEE 754-2019, binary16


class Float16RangeError(GraphError):
    """Values past float16's range; ``tensors`` are their names, largest value first."""

    def __init__(self, largest: dict[str, float]) -> None:
        names = sorted(largest, key=lambda name: -largest[name])
        first = names[0]
        others = f" and {len(names) - 1} others" if len(names) > 1 else ""
        super().__init__(
            f"{first}{others}: values up to {largest[first]:g}, float16 ends at {FLOAT16_MAX:g}; the int8 build has no "
            "such limit",
            first,
        )
        self.tensors = tuple(names)


def check_float16_range(graph: Graph, table: CalibrationTable) -> None:
    """Given: a float graph and what calibration saw of it. Raises Float16RangeError where float16 would overflow."""
    largest = {name: max(abs(seen.minimum), abs(seen.maximum)) for name, seen in table.ranges.items()}
    largest |= {name: float(abs(constant.data).max()) for name, constant in graph.constants.items()}
    past = {name: value for name, value in largest.items() if value > FLOAT16_MAX}
    if past:
        raise Float16RangeError(past)
