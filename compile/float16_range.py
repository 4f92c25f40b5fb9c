"""Whether a float network fits into float16: what calibration saw, and the constants."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..calibration.table import CalibrationTable
from ..models.graph import Conv2d, FullyConnected, Graph, GraphError

FLOAT16_MAX = 65504.0  # IEEE 754-2019, binary16
HALF_PRODUCTS = 8  # of neighbouring channels, which the OpenCL kernels sum in half before they go on in float


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
    """Given: a float graph and what calibration saw of it. Raises Float16RangeError where float16 would overflow: in a
    tensor, in a constant, or in a sum of eight products of any signs."""
    largest = {name: max(abs(seen.minimum), abs(seen.maximum)) for name, seen in table.ranges.items()}
    largest |= {name: float(abs(constant.data).max()) for name, constant in graph.constants.items()}
    for node in graph.nodes:
        if isinstance(node.op, Conv2d | FullyConnected) and node.inputs[0] in table.ranges:
            weights = graph.constants[node.inputs[1]].data.astype(np.float64)
            bound = _largest_sum(weights) * largest[node.inputs[0]]
            largest[node.name] = max(largest.get(node.name, 0.0), bound)
    past = {name: value for name, value in largest.items() if value > FLOAT16_MAX}
    if past:
        raise Float16RangeError(past)


def _largest_sum(weights: NDArray[np.float64]) -> float:
    """The most that the sizes of eight neighbouring input channels' weights (O, ..., I) add up to."""
    channels = weights.shape[-1]
    padded = np.zeros((*weights.shape[:-1], -(-channels // HALF_PRODUCTS) * HALF_PRODUCTS))
    padded[..., :channels] = np.abs(weights)
    return float(padded.reshape(*weights.shape[:-1], -1, HALF_PRODUCTS).sum(axis=-1).max())
