"""The estimate of a GPU's latency: the model's own arithmetic, by hand."""

from __future__ import annotations

import json
from typing import Any

import pytest

from xceptile.compile.gpu_cost import estimate, estimate_to_json
from xceptile.compile.kernels.kernel_call import KernelCall
from xceptile.models.graph import GraphError
from xceptile.runtime.plan import Launch
from xceptile.targets.spec import GpuSpec

GPU = GpuSpec("toy", 1, 1000.0, 500.0, 10.0, 5.0, 1 << 15, 32, True, ())


def never() -> Any:
    raise AssertionError("an estimate needs no kernel")


def launch(macs: int, traffic_bytes: int) -> KernelCall:
    return KernelCall(
        "k", never, (), "y", "y", macs=macs, launch=Launch((1, 1, 1), (1, 1, 1)), traffic_bytes=traffic_bytes
    )


@pytest.mark.parametrize(
    ("macs", "traffic_bytes", "latency_us", "bound"),
    [
        (0, 0, 5.0, "launch"),
        (10_000_000, 1, 5.0 + 20.0, "compute"),  # 20 M operations at 1,000 a nanosecond
        (1, 1_000_000, 5.0 + 100.0, "memory"),  # 1 MB at 10 bytes a nanosecond
    ],
)
def test_a_launch_by_hand(macs: int, traffic_bytes: int, latency_us: float, bound: str) -> None:
    (cost,) = estimate([launch(macs, traffic_bytes)], GPU, "int8").launches
    assert cost.latency_us == pytest.approx(latency_us)
    assert cost.bound == bound


def test_float16_has_its_own_rate() -> None:
    (cost,) = estimate([launch(10_000_000, 1)], GPU, "float16").launches
    assert cost.compute_us == pytest.approx(40.0)


def test_more_traffic_or_another_launch_shows() -> None:
    before = estimate([launch(1, 1_000_000)] * 2, GPU, "int8").latency_ms
    assert estimate([launch(1, 1_000_000), launch(1, 1_200_000)], GPU, "int8").latency_ms > before
    assert estimate([launch(1, 1_000_000)] * 2 + [launch(0, 0)], GPU, "int8").latency_ms == pytest.approx(
        before + 0.005
    )


def test_what_is_written_says_that_it_is_estimated_and_how() -> None:
    whole = json.loads(estimate_to_json(estimate([launch(1, 2)], GPU, "int8")))
    assert whole["obtained"] == "estimated"
    assert whole["model"].startswith("roofline")
    assert whole["launch_count"] == 1


def test_a_network_without_a_launch_is_refused() -> None:
    with pytest.raises(GraphError, match="without a launch"):
        estimate([], GPU, "int8")
