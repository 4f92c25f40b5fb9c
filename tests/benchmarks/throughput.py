"""The inner loops of the matrix products on llvm-mca's models of the cores: the share of the multipliers' peak.

    PYTHONPATH=tests python tests/benchmarks/throughput.py

An estimate, by LLVM's scheduling models and without a memory hierarchy. Needs llvm-mca (apt install llvm-19; models of
older versions know fewer cores). Ends with status 1 where a share is below 85 %.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support.int8_graphs import random_operator_graph

from xceptile.compile.backends import cpu as backend
from xceptile.targets import catalog

LEAST = 0.85


@dataclass(frozen=True)
class Loop:
    """``multiply`` matches the instructions that multiply; the core starts ``peak`` of them a cycle. Sources: Arm's
    software optimization guides of the Cortex-A72 (ASIMD multiply long: 1, on F0) and of the Cortex-A76 (ASIMD dot
    product: 2, on V); matrix products: Neoverse N2, 2."""

    target: str
    cpu: str
    multiply: str
    peak: float


LOOPS = (
    Loop("raspberrypi/raspberry-pi-4", "cortex-a72", r"\bsml?al2?\b|\bsmull2?\b", 1.0),
    Loop("raspberrypi/raspberry-pi-5", "cortex-a76", r"\bsdot\b", 2.0),
    Loop("generic/android-arm64-i8mm", "neoverse-n2", r"\bsmmla\b", 2.0),
)


def basic_blocks(assembly: str) -> list[list[str]]:
    """Straight runs of instructions: they end at a label or a branch."""
    blocks: list[list[str]] = [[]]
    for line in (line.split("//")[0].rstrip() for line in assembly.splitlines()):
        if re.match(r"\.LBB|\d+:", line):  # LLVM's, and those of assembly in it
            blocks.append([])
        elif line.startswith("\t") and not line.lstrip().startswith("."):
            blocks[-1].append(line)
            if re.match(r"\t(b|b\.\w+|cbn?z|tbn?z|ret)\b", line):
                blocks.append([])
    return blocks


def share_of_peak(loop: Loop, mca: str) -> float:
    """The middle flow's pointwise convolution, 361 x 728 x 728."""
    target = catalog.get(loop.target)
    graph = random_operator_graph("conv", (1, 19, 19, 728), channels=728, kernel=(1, 1))
    calls = [call for call in backend.lower(graph, target) if call.macs]
    assembly = backend.compile_kernels(calls, target).mod.inspect_source("asm")

    def multiplies(block: list[str]) -> int:
        return sum(bool(re.search(loop.multiply, line)) for line in block)

    inner = max(basic_blocks(assembly), key=multiplies)
    code = "\n".join([*inner[:-1], "\tb.ne\t0", ""])  # the label is not in the block
    command = [mca, "-mtriple=aarch64", "-mattr=+dotprod,+i8mm", f"-mcpu={loop.cpu}", "-iterations=100"]
    report = subprocess.run(command, input=code, capture_output=True, text=True, check=True).stdout
    cycles = re.search(r"Total Cycles:\s+(\d+)", report)
    assert cycles is not None
    return multiplies(inner) * 100 / int(cycles[1]) / loop.peak


def main() -> int:
    mca = next((path for name in ("llvm-mca-19", "llvm-mca") if (path := shutil.which(name))), None)
    if mca is None:
        print("llvm-mca is not installed: apt install llvm-19", file=sys.stderr)
        return 2
    shares = {loop: share_of_peak(loop, mca) for loop in LOOPS}
    for loop, share in shares.items():
        print(f"{loop.cpu:12} {share:6.1%} of the multiply-accumulate peak (estimated by {Path(mca).name})")
    return int(min(shares.values()) < LEAST)


if __name__ == "__main__":
    sys.exit(main())
