"""The plan and the weights of a network lowered to GPU launches: what OpenCL and CUDA bundles share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ...models import graph as ir
from ...runtime.plan import GPU_ALIGNMENT_BYTES, Argument, Launch, Plan, PlanTensor, Step
from ..kernels.call import Activation
from ..kernels.gpu_call import GpuCall
from ..memory import plan_offsets
from .tvm import lifetimes


def assemble(graph: ir.Graph, calls: Sequence[GpuCall], engine: str) -> tuple[Plan, bytes]:
    """The plan for the driver ``engine`` and the weights' bytes. Equal weights are stored once.

    Every offset is a multiple of 512 bytes, so that each operand can be an OpenCL buffer of its own inside the arena.
    The network's inputs and outputs share their place with nothing: on memory that processor and GPU share, the CUDA
    driver puts them where both reach them.
    """
    ends = {node.name for node in graph.inputs} | set(graph.outputs)
    lives = (replace(x, first=-1, last=len(calls)) if x.name in ends else x for x in lifetimes(graph, calls))
    offsets, arena_bytes = plan_offsets(tuple(lives), GPU_ALIGNMENT_BYTES)
    weights = bytearray()
    stored: dict[bytes, int] = {}
    steps = []
    for call in calls:
        arguments = []
        for operand in call.operands:
            if isinstance(operand, Activation):
                arguments.append(Argument("arena", operand.dtype, offsets[operand.name], operand.count))
                continue
            data = operand.data.tobytes()
            if data not in stored:
                stored[data] = len(weights)
                weights += data + bytes(-len(data) % GPU_ALIGNMENT_BYTES)
            arguments.append(Argument("weights", str(operand.data.dtype), stored[data], operand.data.size))
        launch = Launch(call.groups, call.group_size, call.shared_bytes)
        steps.append(Step(call.symbol, tuple(arguments), 1, call.name, call.path, call.macs, launch))
    tensors = tuple(_tensor(node, "input", offsets[node.name]) for node in graph.inputs)
    tensors += tuple(_tensor(graph.node(name), "output", offsets[name]) for name in graph.outputs)
    return Plan(engine, arena_bytes, len(weights), tensors, tuple(steps)), bytes(weights)


def _tensor(node: ir.Node, kind: str, offset_bytes: int) -> PlanTensor:
    quant = node.type.quant
    scale, zero_point = (quant.scale, quant.zero_point) if isinstance(quant, ir.PerTensor) else (0.0, 0)
    return PlanTensor(node.name, kind, node.type.dtype, node.type.shape, scale, zero_point, offset_bytes)
