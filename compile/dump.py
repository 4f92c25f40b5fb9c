"""What a network is between two stages, as text: for `compile --dump` and `inspect --graph | --units | --plan`."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count
from pathlib import Path

from ..calibration.calibrate import Keep
from ..models import graph_text
from ..models.graph import Graph
from ..runtime import plan_text, units
from ..runtime.bundle import NATIVE
from ..runtime.plan import unpack
from ..targets.spec import TargetSpec
from . import fusion
from .kernels.mixed import int8_part, is_mixed
from .passes.set_batch import set_batch


def keep_graphs(folder: Path) -> Keep:
    """Writes each graph that it is shown into ``folder``, numbered in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = count()

    def keep(stage: str, graph: Graph) -> None:
        name = f"{next(numbers):02}-{stage.replace(' ', '-')}.txt"
        (folder / name).write_text(graph_text.to_text(graph), encoding="utf-8")

    return keep


def units_text(int8_graph: Graph, target: TargetSpec) -> str:
    """The units that the target's kernels are made of; of a mixed network those of its int8 part."""
    graph = int8_part(int8_graph) if is_mixed(int8_graph) else int8_graph
    return units.to_text(fusion.units(graph, _rules(graph, target)))


def _rules(graph: Graph, target: TargetSpec) -> fusion.Rules:
    if target.engine == "cuda":
        from .kernels.cuda import lower as cuda

        return cuda.rules(graph, target)
    return fusion.RULES[fusion.family_of(target)]


def keep_artefacts(folder: Path, files: Mapping[str, bytes], graph: Graph, target: TargetSpec, batch: int) -> None:
    """Writes the units, the native plan and each kernel's source into ``folder``.

    ``files`` are the bundle's. A processor's kernels are written as TVMScript and as assembly, a GPU's as the source
    that is compiled for it.
    """
    (folder / "units.txt").write_text(units_text(set_batch(graph, batch), target), encoding="utf-8")
    plan = files.get(f"{NATIVE}/plan.bin")
    if plan is None:
        return
    (folder / "plan.txt").write_text(plan_text.to_text(unpack(plan)), encoding="utf-8")
    for name in ("kernels.cl", "kernels.cu", "kernels.ptx"):
        if (source := files.get(f"{NATIVE}/{name}")) is not None:
            (folder / name).write_bytes(source)
    if target.engine == "cpu":
        _keep_cpu_kernels(folder / "kernels", set_batch(graph, batch), target)


def _keep_cpu_kernels(folder: Path, graph: Graph, target: TargetSpec) -> None:
    from .backends import cpu

    folder.mkdir(exist_ok=True)
    calls = {call.symbol: call for call in cpu.lower(graph, target)}
    for symbol, call in calls.items():
        (folder / f"{symbol}.py").write_text(call.build().script(), encoding="utf-8")
    assembly = cpu.compile_kernels(tuple(calls.values()), target).mod.inspect_source("asm")
    (folder.parent / "kernels.s").write_text(assembly, encoding="utf-8")
