"""The range check of the float16 build."""

from __future__ import annotations

import numpy as np
import pytest
from support.int8_graphs import as_float, random_xception

from xceptile.calibration.table import CalibrationTable, TensorRange
from xceptile.compile.float16_range import FLOAT16_MAX, Float16RangeError, check_float16_range
from xceptile.models.graph import Constant


def table(**largest: float) -> CalibrationTable:
    return CalibrationTable({name: TensorRange(0.0, 1.0, -x, x) for name, x in largest.items()}, 1, "")


def test_the_largest_float16_fits_and_its_successor_does_not() -> None:
    graph = as_float(random_xception(71, 0.125, 10))
    check_float16_range(graph, table(a=FLOAT16_MAX))
    with pytest.raises(Float16RangeError, match="b and 1 others: values up to 70000") as caught:
        check_float16_range(graph, table(a=FLOAT16_MAX * 1.0001, b=70000.0, c=1.0))
    assert caught.value.tensors == ("b", "a")


def test_constants_count_too() -> None:
    graph = as_float(random_xception(71, 0.125, 10))
    name, constant = next(iter(graph.constants.items()))
    large = Constant(constant.type, np.full_like(constant.data, -1e6))
    with pytest.raises(Float16RangeError, match=name):
        check_float16_range(graph.with_nodes(graph.nodes, {**graph.constants, name: large}), table(a=1.0))


def test_sums_of_eight_products_count_too() -> None:
    """Each of them fits; the node is named in whose sums they would not."""
    graph = as_float(random_xception(71, 0.125, 10))
    node = next(n for n in graph.nodes if n.inputs and n.inputs[0] == "depthwise_0")
    weights = graph.constants[node.inputs[1]]
    quarter = Constant(weights.type, np.full_like(weights.data, 0.25))
    graph = graph.with_nodes(graph.nodes, {**graph.constants, node.inputs[1]: quarter})
    check_float16_range(graph, table(depthwise_0=FLOAT16_MAX / 2))
    with pytest.raises(Float16RangeError, match=node.name):
        check_float16_range(graph, table(depthwise_0=FLOAT16_MAX * 0.51))
