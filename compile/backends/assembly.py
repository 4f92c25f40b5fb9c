"""The plan and the weights of a network that was lowered to kernel calls, for processors and for GPUs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...models import graph as ir
from ...runtime.plan import ALIGNMENT_BYTES, GPU_ALIGNMENT_BYTES, ITEM_BYTES, Argument, Plan, PlanTensor, Step
from ..arena_planner import Lifetime, plan_offsets
from ..kernels.kernel_call import Activation, KernelCall, Weights


def assemble(
    graph: ir.Graph, calls: Sequence[KernelCall], engine: str, features: tuple[str, ...] = ()
) -> tuple[Plan, bytes]:
    """The plan for the driver ``engine`` and the weights' bytes. Equal weights are stored once.

    Every offset is a multiple of 64 bytes, on a GPU of 512, so that each operand can be an OpenCL buffer of its own
    inside the arena. There the network's inputs and outputs share their place with nothing: on memory that processor
    and GPU share, the CUDA driver puts them where both reach them.
    """
    alignment_bytes, lives = ALIGNMENT_BYTES, lifetimes(graph, calls)
    if engine != "cpu":
        alignment_bytes = GPU_ALIGNMENT_BYTES
        ends = {node.name for node in graph.inputs} | set(graph.outputs)
        lives = [replace(x, first=-1, last=len(calls)) if x.name in ends else x for x in lives]
    offsets, arena_bytes = plan_offsets(lives, alignment_bytes)
    arguments, weights = place_operands(calls, offsets, alignment_bytes)
    steps = tuple(
        Step(
            call.symbol,
            operands,
            call.tasks,
            call.name,
            call.path,
            call.macs,
            call.kind,
            output_index(call),
            call.launch,
        )
        for call, operands in zip(calls, arguments, strict=True)
    )
    return Plan(engine, arena_bytes, len(weights), ends_of(graph, offsets), steps, features), weights


def output_index(call: KernelCall) -> int:
    """Which operand a call writes. Raises ValueError where none bears the name of its output."""
    for index, operand in enumerate(call.operands):
        if isinstance(operand, Activation) and operand.name == call.output:
            return index
    raise ValueError(f"{call.symbol}: no operand bears the name of its output, {call.output}")


def lifetimes(graph: ir.Graph, calls: Sequence[KernelCall]) -> list[Lifetime]:
    """From the step that first writes a tensor (inputs: before all) to the last that reads it (outputs: after all)."""
    sizes: dict[str, int] = {}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    ends = [(node, -1) for node in graph.inputs] + [(graph.node(name), len(calls)) for name in graph.outputs]
    for node, step in ends:
        sizes[node.name] = node.type.size_bytes
        first[node.name] = last[node.name] = step
    for step, call in enumerate(calls):
        for operand in call.operands:
            if isinstance(operand, Weights):
                continue
            size = operand.count * ITEM_BYTES[operand.dtype]
            sizes[operand.name] = max(sizes.get(operand.name, 0), size)
            first[operand.name] = min(first.get(operand.name, step), step)
            last[operand.name] = max(last.get(operand.name, step), step)
    return [Lifetime(name, size, first[name], last[name]) for name, size in sizes.items()]


def place_operands(
    calls: Sequence[KernelCall], offsets: Mapping[str, int], alignment_bytes: int
) -> tuple[list[tuple[Argument, ...]], bytes]:
    """Each call's arguments, and the weights' bytes. Equal weights are stored once, each at a multiple of the
    alignment; ``offsets`` are the activations' in the arena."""
    weights = bytearray()
    stored: dict[bytes, int] = {}
    arguments = []
    for call in calls:
        placed = []
        for operand in call.operands:
            if isinstance(operand, Activation):
                placed.append(Argument("arena", operand.dtype, offsets[operand.name], operand.count))
                continue
            data = operand.data.tobytes()
            if data not in stored:
                stored[data] = len(weights)
                weights += data + bytes(-len(data) % alignment_bytes)
            placed.append(Argument("weights", str(operand.data.dtype), stored[data], operand.data.size))
        arguments.append(tuple(placed))
    return arguments, bytes(weights)


def ends_of(graph: ir.Graph, offsets: Mapping[str, int]) -> tuple[PlanTensor, ...]:
    """The network's inputs, then its outputs."""
    inputs = tuple(_plan_tensor(node, "input", offsets[node.name]) for node in graph.inputs)
    return inputs + tuple(_plan_tensor(graph.node(name), "output", offsets[name]) for name in graph.outputs)


def _plan_tensor(node: ir.Node, kind: str, offset_bytes: int) -> PlanTensor:
    quant = node.type.quant
    scale, zero_point = (quant.scale, quant.zero_point) if isinstance(quant, ir.PerTensor) else (0.0, 0)
    return PlanTensor(node.name, kind, node.type.dtype, node.type.shape, scale, zero_point, offset_bytes)
