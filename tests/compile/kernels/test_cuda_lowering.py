"""What the lowering to CUDA launches: grids and tensors within what the hardware and the kernels can number."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest
from support.cuda_emulator import EmulatedNetwork
from support.int8_graphs import PIXELS, Int8Builder, as_float, random_xception
from support.needs import requires

from xceptile.compile.kernels.cuda import cost
from xceptile.compile.kernels.cuda.lower import lower
from xceptile.compile.passes.set_batch import set_batch
from xceptile.compile.passes.take_int8_pixels import take_int8_pixels
from xceptile.models import graph as ir
from xceptile.runtime.plan import MAX_GROUPS
from xceptile.targets import catalog


@pytest.fixture(scope="module")
def xception() -> ir.Graph:
    return random_xception()


@pytest.mark.parametrize("board", ["nano", "xavier", "orin"])
@pytest.mark.parametrize("dtype", ["int8", "float16"])
def test_every_grid_of_a_large_batch_is_lawful(xception: ir.Graph, board: str, dtype: str) -> None:
    graph = xception if dtype == "int8" else take_int8_pixels(as_float(xception), PIXELS)
    calls = lower(set_batch(graph, 512), catalog.get(f"jetson-{board}"))
    assert (
        max(max(call.launch.groups) for call in calls) > MAX_GROUPS[1]
    )  # so that a grid's second dimension would not do
    for call in calls:
        assert all(1 <= groups <= most for groups, most in zip(call.launch.groups, MAX_GROUPS, strict=True)), call


def test_a_batch_whose_tensors_cannot_be_addressed_is_refused(xception: ir.Graph) -> None:
    orin = catalog.get("jetson-orin")
    with pytest.raises(ir.GraphError, match=r"a batch of 1024 images .* values.* a batch of 776 at most"):
        lower(set_batch(xception, 1024), orin)
    lower(set_batch(xception, 776), orin)


@requires("clang++", package="clang")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulation of CUDA is written for x86-64")
@pytest.mark.parametrize("board", ["orin", pytest.param("xavier", marks=pytest.mark.slow)])
def test_float16_is_the_same_with_a_depthwise_convolution_inside_the_product(
    board: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same sums in the same order, rounded to float16 at the same places: equal bit for bit."""
    build = Int8Builder("fronts", 1)
    image = np.random.default_rng(1).integers(-128, 128, (2, 9, 11, 40), np.int8)
    x = build.conv(build.input(image), 72)
    x = build.conv(build.depthwise(build.relu(x)), 40, relu=True)
    build.conv(build.depthwise(x), 24)
    graph = take_int8_pixels(as_float(build.graph()), PIXELS)
    outputs = []
    for inside in (True, False):
        monkeypatch.setattr(cost, "prologue_pays", lambda *_, inside=inside: inside)
        network = EmulatedNetwork(graph, catalog.get(f"jetson-{board}"), tmp_path / str(inside))
        assert ("front" in network.source) == inside
        outputs.append(network.run(image, seed=1)[0])
    assert np.abs(outputs[0]).max() > 0
    assert np.array_equal(*outputs)
