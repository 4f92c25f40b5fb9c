"""The plan: a compiled network as a straight line of kernel calls on slices of one arena, as a flat binary file."""

from __future__ import annotations

from dataclasses import dataclass

ALIGNMENT_BYTES = 64  # of every offset into the arena and the weights


@dataclass(frozen=True)
class PlanTensor:
    """A network input or output: plain NHWC, at ``offset_bytes`` of the arena."""

    name: str
    kind: str  # "input" or "output"
    dtype: str
    shape: tuple[int, ...]
    scale: float
    zero_point: int
    offset_bytes: int


@dataclass(frozen=True)
class Argument:
    """A flat buffer handed to a kernel: ``count`` elements of ``dtype`` in the ``arena`` or in the ``weights``."""

    space: str
    dtype: str
    offset_bytes: int
    count: int


@dataclass(frozen=True)
class Step:
    """One kernel call over ``tasks`` independent tasks; ``name``, ``path``, ``macs`` are for per-layer tables."""

    kernel: str
    arguments: tuple[Argument, ...]
    tasks: int
    name: str
    path: str
    macs: int


@dataclass(frozen=True)
class Plan:
    """The whole network. ``engine`` is the driver that runs it: ``cpu``."""

    engine: str
    arena_bytes: int
    weights_bytes: int
    tensors: tuple[PlanTensor, ...]
    steps: tuple[Step, ...]
