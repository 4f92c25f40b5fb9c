"""Every target by name."""

from __future__ import annotations

import difflib

from . import arm_cpu, host, jetson, mobile_gpu, riscv_cpu
from .spec import TargetSpec

_FIXED = (*arm_cpu.TARGETS, *mobile_gpu.TARGETS, *jetson.TARGETS, *host.TARGETS, *riscv_cpu.TARGETS)

# What a family's bare name means: the row whose bundles run on every member of the family; of the Jetsons, whose
# kernels are each for one architecture, on every Orin.
FAMILIES = {
    "arm-cpu": "generic/arm64",
    "jetson": "nvidia/jetson-agx-orin",
    "mobile-gpu": "generic/opencl-gpu",
    "riscv-cpu": "generic/riscv64",
    "x86-cpu": "generic/x86-64-avx2",
}


class UnknownTarget(LookupError):
    """There is no target ``name``; ``suggestions`` are the names nearest to it, best first."""

    def __init__(self, name: str, suggestions: tuple[str, ...]) -> None:
        hint = f"did you mean {' or '.join(suggestions)}?" if suggestions else "xceptile targets lists them all"
        super().__init__(f"no target named {name!r}: {hint}")
        self.name = name
        self.suggestions = suggestions


def get(name: str) -> TargetSpec:
    """The target called ``name``: ``vendor/board``, the bare board, an alias, a family (``arm-cpu``) or ``host``.

    Upper case, underscores and surrounding spaces do not matter. Raises UnknownTarget, or UnsupportedHost where
    ``host`` is asked for on a machine that no kernels are made for.
    """
    wanted = name.strip().lower().replace("_", "-")
    if wanted in ("host", "local/host"):
        return host.detect()
    names = _names()
    if wanted not in names:
        raise UnknownTarget(name, _nearest(wanted, [*names, "host"]))
    return names[wanted]


def all_targets() -> tuple[TargetSpec, ...]:
    """This machine, where kernels can be made for it, then every row of the catalog."""
    try:
        return (host.detect(), *_FIXED)
    except host.UnsupportedHost:
        return _FIXED


def _nearest(wanted: str, names: list[str]) -> tuple[str, ...]:
    """At most three names: those that hold all of ``wanted`` (``pi-5``), else those spelt much like it."""
    holding = [name for name in names if wanted and wanted in name]
    return tuple(holding[:3] or difflib.get_close_matches(wanted, names, n=3, cutoff=0.6))


def _names() -> dict[str, TargetSpec]:
    names = {name: row for row in _FIXED for name in (row.board, *row.aliases, row.name)}
    return names | {family: names[default] for family, default in FAMILIES.items()}
