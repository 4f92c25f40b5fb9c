"""x86-64 CPUs by instruction set, and the machine this program runs on."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from . import riscv_cpu
from .spec import TargetSpec

_GIB = 1 << 30
_PSABI_LEVELS = "https://gitlab.com/x86-psABIs/x86-64-ABI"  # x86-64-v3, x86-64-v4
_LLVM_X86 = "https://github.com/llvm/llvm-project/blob/main/llvm/lib/Target/X86/X86.td"
_CPUINFO_X86 = "https://docs.kernel.org/arch/x86/cpuinfo.html"
_HWCAPS_ARM = "https://docs.kernel.org/arch/arm64/elf_hwcaps.html"

# The kernel's names of what x86-64-v3 and v4 add, Table 3.1 of the psABI (abm is LZCNT).
_X86_V3_FLAGS = frozenset({"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"})
_X86_VNNI_FLAGS = _X86_V3_FLAGS | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"}

TARGETS = (
    TargetSpec(
        name="generic/x86-64-avx2",
        family="x86-cpu",
        engine="cpu",
        triple="x86_64-linux-gnu",
        cpu="x86-64-v3",
        features=("avx2",),
        llvm_features=(),
        cores=2,
        memory_bytes=4 * _GIB,
        l1d_bytes=32 << 10,
        l2_bytes=256 << 10,
        qemu_cpu="Haswell",
        aliases=("avx2",),
        description="Any x86-64 Linux machine with AVX2 (Intel Haswell, AMD Zen and later)",
        sources=(_PSABI_LEVELS, _LLVM_X86),
    ),
    TargetSpec(
        name="generic/x86-64-avx512vnni",
        family="x86-cpu",
        engine="cpu",
        triple="x86_64-linux-gnu",
        cpu="x86-64-v4",
        features=("avx2", "avx512vnni"),
        # x86-64-v4 is tuned for processors whose clock drops under 512-bit instructions; none with VNNI still does.
        llvm_features=("+avx512vnni", "-prefer-256-bit"),
        cores=2,
        memory_bytes=4 * _GIB,
        l1d_bytes=32 << 10,
        l2_bytes=1 << 20,
        aliases=("avx512vnni",),
        description="Any x86-64 Linux machine with AVX512-VNNI (Intel Cascade Lake, AMD Zen 4 and later)",
        sources=(_PSABI_LEVELS, _LLVM_X86),
    ),
)


class UnsupportedHost(RuntimeError):
    """This machine's processor is none that kernels are made for; ``reason`` says which and why."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"no target for this machine: {reason}; name the target you compile for (xceptile targets)")
        self.reason = reason


def detect(cpuinfo: Path = Path("/proc/cpuinfo"), machine: str | None = None) -> TargetSpec:
    """The row of the machine this program runs on, ``local/host``.

    ``cpuinfo`` is in the form of Linux's /proc/cpuinfo; ``machine`` overrides ``platform.machine()``. Raises
    UnsupportedHost for a processor that is not 64-bit Arm, x86-64 with AVX2 or RV64GC, or where ``cpuinfo`` is missing.
    """
    machine = machine or platform.machine()
    try:
        text = cpuinfo.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UnsupportedHost(f"{cpuinfo} cannot be read ({error.strerror}), and only Linux hosts are known") from error
    if machine in ("x86_64", "AMD64"):
        return _x86_host(text)
    if machine in ("aarch64", "arm64"):
        return _arm_host(text)
    if machine == "riscv64":
        return _riscv_host(text)
    raise UnsupportedHost(f"its architecture is {machine}, not x86_64, aarch64 or riscv64")


def _x86_host(cpuinfo: str) -> TargetSpec:
    flags = _common_flags(cpuinfo, "flags")
    if not flags >= _X86_V3_FLAGS:
        raise UnsupportedHost(f"its x86-64 processor lacks {', '.join(sorted(_X86_V3_FLAGS - flags))}")
    row = TARGETS[1] if flags >= _X86_VNNI_FLAGS else TARGETS[0]
    model = _first_value(cpuinfo, "model name")
    return _host_row(
        row.triple, row.cpu, row.features, row.llvm_features, row.l2_bytes, "x86-cpu", model, (_CPUINFO_X86,)
    )


def _arm_host(cpuinfo: str) -> TargetSpec:
    flags = _common_flags(cpuinfo, "Features")
    if "asimd" not in flags:
        raise UnsupportedHost("its Arm processor lacks asimd (NEON)")
    features = ["neon"]
    if "asimddp" in flags:
        features.append("dotprod")
        if "i8mm" in flags:
            features.append("i8mm")
    llvm_features = tuple(f"+{feature}" for feature in features)
    model = f"Arm core {_first_value(cpuinfo, 'CPU implementer')}:{_first_value(cpuinfo, 'CPU part')}"
    return _host_row(
        "aarch64-linux-gnu", "generic", tuple(features), llvm_features, 256 << 10, "arm-cpu", model, (_HWCAPS_ARM,)
    )


def _riscv_host(cpuinfo: str) -> TargetSpec:
    (row,) = riscv_cpu.TARGETS
    names = [value.partition("_")[0] for name, value in _pairs(cpuinfo) if name == "isa"]
    for name in names or [""]:
        if not name.startswith("rv64") or not set("imafdc") <= set(name.removeprefix("rv64").replace("g", "imafd")):
            raise UnsupportedHost(f"its RISC-V processor is {name or 'not named'}, not RV64GC")
    model = f"RISC-V core {_first_value(cpuinfo, 'uarch')}"
    sources = (riscv_cpu.RISCV_LINUX,)
    return _host_row(row.triple, row.cpu, row.features, row.llvm_features, row.l2_bytes, row.family, model, sources)


def _host_row(
    triple: str,
    cpu: str,
    features: tuple[str, ...],
    llvm_features: tuple[str, ...],
    l2_bytes: int,
    family: str,
    model: str,
    sources: tuple[str, ...],
) -> TargetSpec:
    return TargetSpec(
        name="local/host",
        family=family,
        engine="cpu",
        triple=triple,
        cpu=cpu,
        features=features,
        llvm_features=llvm_features,
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        l1d_bytes=32 << 10,
        l2_bytes=l2_bytes,
        description=f"This machine: {model}",
        sources=("/proc/cpuinfo", *sources),
    )


def _common_flags(cpuinfo: str, key: str) -> frozenset[str]:
    """The flags that every listed core has: a phone's small cores may lack what its large ones have."""
    lines = [value.split() for name, value in _pairs(cpuinfo) if name == key]
    return frozenset.intersection(*map(frozenset, lines)) if lines else frozenset()


def _first_value(cpuinfo: str, key: str) -> str:
    return next((value for name, value in _pairs(cpuinfo) if name == key), "unknown")


def _pairs(cpuinfo: str) -> list[tuple[str, str]]:
    parts = (line.partition(":") for line in cpuinfo.splitlines())
    return [(name.strip(), value.strip()) for name, colon, value in parts if colon]
