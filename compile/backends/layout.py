"""Where a plan's tensors and weights lie: what the plans of processors and of GPUs share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ...models import graph as ir
from ...runtime.plan import ITEM_BYTES, Argument, PlanTensor
from ..arena_planner import Lifetime
from ..kernels.gpu_call import GpuCall
from ..kernels.kernel_call import Activation, KernelCall, Weights


def lifetimes(graph: ir.Graph, calls: Sequence[KernelCall | GpuCall]) -> list[Lifetime]:
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
    calls: Sequence[KernelCall | GpuCall], offsets: Mapping[str, int], alignment_bytes: int
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
