"""An estimated latency of a network on a GPU that is not at hand: the roofline model with a cost per launch.

latency = sum over the launches of launch_us + max(operations / peak rate, traffic / bandwidth).

Source: S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore
architectures", Communications of the ACM 52 (2009) 4. Rates, bandwidth and the cost of a launch are those of the
target's row (``GpuSpec``, each with its source). It is a lower bound, as good as the peaks are near: what it shows
reliably is that a change of the kernels moves more bytes or launches more often than before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from ..models.graph import GraphError
from ..runtime.obtained import ESTIMATED
from ..targets.spec import GpuSpec
from .kernels.kernel_call import KernelCall

MODEL = "roofline: launch_us + max(operations / peak, traffic / bandwidth) for each launch"
_RATES = {"int8": "int8_gops", "float16": "fp16_gflops"}


@dataclass(frozen=True)
class LaunchCost:
    """One launch: the node it completes, its kernel, and what the model says of it, in microseconds."""

    name: str
    path: str
    kernel: str
    macs: int
    traffic_bytes: int
    compute_us: float
    memory_us: float
    launch_us: float

    @property
    def latency_us(self) -> float:
        return self.launch_us + max(self.compute_us, self.memory_us)

    @property
    def bound(self) -> str:
        """What the launch waits for most: ``launch``, ``memory`` or ``compute``."""
        costs = {"launch": self.launch_us, "memory": self.memory_us, "compute": self.compute_us}
        return max(costs, key=lambda name: costs[name])


@dataclass(frozen=True)
class Estimate:
    """A network's launches in order, in ``dtype``, on the GPU ``arch``."""

    arch: str
    dtype: str
    launches: tuple[LaunchCost, ...]

    @property
    def latency_ms(self) -> float:
        return sum(launch.latency_us for launch in self.launches) / 1e3

    @property
    def traffic_bytes(self) -> int:
        return sum(launch.traffic_bytes for launch in self.launches)


def estimate(calls: Sequence[KernelCall], gpu: GpuSpec, dtype: str) -> Estimate:
    """The model of one network's launches, ``int8`` or ``float16``. Raises GraphError for no launches at all."""
    if not calls:
        raise GraphError("a network without a launch has no latency")
    rate_per_us = getattr(gpu, _RATES[dtype]) * 1e3
    bytes_per_us = gpu.bandwidth_gb_s * 1e3
    launches = tuple(
        LaunchCost(
            call.name,
            call.path,
            call.symbol,
            call.macs,
            call.traffic_bytes,
            2 * call.macs / rate_per_us,
            call.traffic_bytes / bytes_per_us,
            gpu.launch_us,
        )
        for call in calls
    )
    return Estimate(gpu.arch, dtype, launches)


def estimate_to_json(made: Estimate) -> bytes:
    """What a bundle holds of it; says that it is an estimate, and by which model."""
    rows = [asdict(launch) | {"latency_us": launch.latency_us, "bound": launch.bound} for launch in made.launches]
    whole = {
        "obtained": ESTIMATED,
        "model": MODEL,
        "gpu": made.arch,
        "dtype": made.dtype,
        "latency_ms": made.latency_ms,
        "traffic_bytes": made.traffic_bytes,
        "launch_count": len(made.launches),
        "launches": rows,
    }
    return (json.dumps(whole, indent=1, sort_keys=True) + "\n").encode()
