"""What the lowering to CUDA launches: grids and tensors within what the hardware and the kernels can number."""

from __future__ import annotations

import pytest
from int8_graphs import PIXELS, as_float, random_xception

from xceptile.compile.kernels.cuda.lower import lower
from xceptile.compile.passes.set_batch import set_batch
from xceptile.compile.passes.with_pixels import with_pixels
from xceptile.models import graph as ir
from xceptile.runtime.plan import MAX_GROUPS
from xceptile.targets import catalog


@pytest.fixture(scope="module")
def xception() -> ir.Graph:
    return random_xception()


@pytest.mark.parametrize("board", ["nano", "xavier", "orin"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_every_grid_of_a_large_batch_is_lawful(xception: ir.Graph, board: str, dtype: str) -> None:
    graph = xception if dtype == "int8" else with_pixels(as_float(xception), PIXELS)
    calls = lower(set_batch(graph, 512), catalog.get(f"jetson-{board}"))
    assert max(max(call.groups) for call in calls) > MAX_GROUPS[1]  # so that a grid's second dimension would not do
    for call in calls:
        assert all(1 <= groups <= most for groups, most in zip(call.groups, MAX_GROUPS, strict=True)), call


def test_a_batch_whose_tensors_cannot_be_addressed_is_refused(xception: ir.Graph) -> None:
    orin = catalog.get("jetson-orin")
    with pytest.raises(ir.GraphError, match=r"a batch of 1024 images .* values.* a batch of 776 at most"):
        lower(set_batch(xception, 1024), orin)
    lower(set_batch(xception, 776), orin)
