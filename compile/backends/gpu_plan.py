"""The plan and the weights of a network lowered to GPU launches: what OpenCL and CUDA bundles share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...models import graph as ir
from ...runtime.plan import GPU_ALIGNMENT_BYTES, Launch, Plan, Step
from ..arena_planner import plan_offsets
from ..kernels.gpu_call import GpuCall
from .layout import ends_of, lifetimes, place_operands


def assemble(graph: ir.Graph, calls: Sequence[GpuCall], engine: str) -> tuple[Plan, bytes]:
    """The plan for the driver ``engine`` and the weights' bytes. Equal weights are stored once.

    Every offset is a multiple of 512 bytes, so that each operand can be an OpenCL buffer of its own inside the arena.
    The network's inputs and outputs share their place with nothing: on memory that processor and GPU share, the CUDA
    driver puts them where both reach them.
    """
    ends = {node.name for node in graph.inputs} | set(graph.outputs)
    lives = (replace(x, first=-1, last=len(calls)) if x.name in ends else x for x in lifetimes(graph, calls))
    offsets, arena_bytes = plan_offsets(tuple(lives), GPU_ALIGNMENT_BYTES)
    arguments, weights = place_operands(calls, offsets, GPU_ALIGNMENT_BYTES)
    steps = tuple(
        Step(
            call.symbol,
            operands,
            1,
            call.name,
            call.path,
            call.macs,
            Launch(call.groups, call.group_size, call.shared_bytes),
        )
        for call, operands in zip(calls, arguments, strict=True)
    )
    return Plan(engine, arena_bytes, len(weights), ends_of(graph, offsets), steps), weights
