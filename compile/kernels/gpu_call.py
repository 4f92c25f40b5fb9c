"""The form every GPU family lowers a graph into: a straight line of kernel launches on flat buffers.

A family (``opencl/``, ``cuda/``) has a module ``lower`` with one function::

    lower(graph: Graph, target: TargetSpec) -> tuple[GpuCall, ...]

Like the CPU's (``call.py``), it decides alone how a tensor lies in memory between its kernels, which operators share a
kernel, and how weights are packed; the network's inputs and outputs are plain NHWC. Launches run in order, and every
launch sees all writes of the launches before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import tvm

from ...models.graph import DepthwiseConv2d, Graph, Node, Relu
from .kernel_call import Activation, Weights


@dataclass(frozen=True)
class GpuCall:
    """One launch of ``groups`` (x, y, z) work-groups of ``group_size`` (x, y, z) work-items each.

    ``symbol`` decodes to everything the generated code depends on, so equal symbols share one kernel; ``build`` makes
    its PrimFunc and is called once per symbol. Its parameters are the flat buffers ``operands``, in this order.
    ``output`` is the operand written (the others are only read); ``name`` is the graph node it completes; ``path`` the
    module path and ``macs`` the multiply-accumulates, for per-layer tables. ``traffic_bytes`` is what the launch moves
    to and from global memory, counted from its tiling; each kernel says what it takes a cache to serve.
    ``requested_bytes`` are all loads and stores of all work-groups that local memory or registers do not serve, as if
    there were no cache (0: not counted).
    """

    symbol: str
    build: Callable[[], tvm.tirx.PrimFunc] = field(repr=False, compare=False)
    operands: tuple[Activation | Weights, ...] = field(repr=False)
    output: str
    groups: tuple[int, int, int]
    group_size: tuple[int, int, int]
    name: str
    traffic_bytes: int
    path: str = ""
    macs: int = 0
    shared_bytes: int = 0
    requested_bytes: int = 0


def only_depthwise_reads(graph: Graph, node: Node) -> bool:
    """Whether a node is a ReLU that depthwise convolutions alone read: they take it in as they load."""
    users = graph.users(node.name)
    return (
        isinstance(node.op, Relu)
        and bool(users)
        and node.name not in graph.outputs
        and all(isinstance(user.op, DepthwiseConv2d) for user in users)
    )
