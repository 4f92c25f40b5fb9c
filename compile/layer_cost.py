"""What a layer costs in int8 and in float on a target's processor: estimated, from multiply-accumulates and bytes.

A core is modelled by what its vector units do in a cycle. The clock cancels out where layers are compared with each
other, and is assumed where milliseconds are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..models import graph as ir
from ..targets.spec import TargetSpec

CLOCK_GHZ = 2.0  # assumed: the rows of targets do not name one
MODEL = "multiply-accumulates and bytes of a core at 2 GHz"


@dataclass(frozen=True)
class Rates:
    """Of one core, in a cycle: multiply-accumulates of dense int8 and float32 layers, and bytes to and from caches."""

    int8: float
    float32: float
    bytes: float


# Instruction throughputs of the vendors' optimization guides, by the widest dot product that a target has: Cortex-A72
# (one FMLA of 4, SMLAL of 8 every other cycle), Cortex-A76 (two of 4; two SDOT of 16), Neoverse N2 (two SMMLA of 32),
# Haswell (two FMA of 8; VPMADDWD of 16), Zen 4 (two FMA of 8; two VPDPBUSD of 32).
RATES = {
    "avx512vnni": Rates(64, 16, 32),
    "avx2": Rates(16, 16, 32),
    "i8mm": Rates(64, 8, 16),
    "dotprod": Rates(32, 8, 16),
    "neon": Rates(6, 4, 8),
}


def rates(target: TargetSpec) -> Rates:
    """Raises ValueError for a target whose features name none of ``RATES``."""
    for feature, found in RATES.items():
        if feature in target.features:
            return found
    raise ValueError(f"{target.name}: no rates for a processor with {', '.join(target.features) or 'no features'}")


def lost_ms(graph: ir.Graph, node: ir.Node, target: TargetSpec) -> float:
    """Milliseconds on one core, by the model, that computing ``node`` of a float graph in float costs beyond int8.

    Its inputs and output count as converted: a neighbour in float as well would save that.
    """
    core = rates(target)
    elements = int(np.prod(node.type.shape)) + sum(
        int(np.prod(graph.type_of(name).shape)) for name in node.inputs if name not in graph.constants
    )
    # A depthwise layer and what has no weights is bound by its elements, 1 byte against 4; conversions move 5.
    macs = 0 if isinstance(node.op, ir.DepthwiseConv2d) else ir.multiply_accumulates(graph, node)
    cycles = macs / core.float32 - macs / core.int8 + elements * (4 - 1 + 5) / core.bytes
    return cycles / (CLOCK_GHZ * 1e6)
