"""What a board's clocks, governors, temperatures and power mode are right now, read from Linux' own files.

A latency means little without them. Everything is read, nothing is set and no program is started; what a board does not
have, or shows to root alone, is left out. Where each is documented: cpufreq, devfreq and thermal zones in the kernel's
Documentation/ABI/testing/sysfs-devices-system-cpu, sysfs-class-devfreq and sysfs-class-thermal; Jetson's power modes in
the Jetson Linux Developer Guide, "Platform Power and Performance"; an Adreno's clock in its driver, msm-kgsl.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_CPUS = "sys/devices/system/cpu"
# How GPUs are called in /sys/class/devfreq: "gpu", Tegra's by chip (Nano, TX2, Xavier, Orin), Arm's, Qualcomm's.
_GPU_NAME = re.compile(r"gpu|gm20b|gp10b|gv11b|ga10b|mali|kgsl")
_KGSL_CLOCK = "sys/class/kgsl/kgsl-3d0/gpuclk"
# The external memory's clock, for root: Jetson TX2 and later, then Nano.
_MEMORY_CLOCKS = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/kernel/debug/clk/emc/clk_rate")
_POWER_MODE = "var/lib/nvpmodel/status"
_POWER_MODES = "etc/nvpmodel.conf"


@dataclass(frozen=True)
class MachineState:
    """One moment. Processors and governors by ``cpu0``...; temperatures by the zone's type, in degrees Celsius.

    ``gpu_hz``, ``memory_hz`` and ``power_mode`` (Jetson's, such as ``MAXN (0)``) are None where they cannot be read.
    """

    governors: Mapping[str, str]
    cpu_khz: Mapping[str, int]
    temperatures_c: Mapping[str, float]
    gpu_hz: int | None
    memory_hz: int | None
    power_mode: str | None


def machine_state(root: Path = Path("/")) -> MachineState:
    """This machine's state, or that of the files below ``root``. Never raises: what cannot be read is left out."""
    cpus = sorted(root.glob(f"{_CPUS}/cpu[0-9]*/cpufreq"), key=_by_number)
    return MachineState(
        governors={f.parent.name: text for f in cpus if (text := _text(f / "scaling_governor"))},
        cpu_khz={f.parent.name: khz for f in cpus if (khz := _number(f / "scaling_cur_freq")) is not None},
        temperatures_c=_temperatures_c(root),
        gpu_hz=_first_number((*_gpu_clocks(root), root / _KGSL_CLOCK)),
        memory_hz=_first_number(root / path for path in _MEMORY_CLOCKS),
        power_mode=_power_mode(root),
    )


def _temperatures_c(root: Path) -> dict[str, float]:
    """Every thermal zone; a type that several zones share is told apart by the zone's number."""
    found: dict[str, float] = {}
    zones = root.glob("sys/class/thermal/thermal_zone[0-9]*")
    for zone in sorted(zones, key=_by_number):
        millidegrees = _number(zone / "temp")  # a zone that is switched off refuses to be read
        if millidegrees is not None:
            name = _text(zone / "type") or zone.name
            found[f"{name} {zone.name[12:]}" if name in found else name] = millidegrees / 1000
    return found


def _by_number(path: Path) -> tuple[int, str]:
    """Orders names that end in numbers: cpu2 before cpu10. A device's answer may hold any name."""
    return len(str(path)), str(path)


def _gpu_clocks(root: Path) -> list[Path]:
    folders = sorted(root.glob("sys/class/devfreq/*"))
    return [folder / "cur_freq" for folder in folders if _GPU_NAME.search(folder.name)]


def _power_mode(root: Path) -> str | None:
    """What ``nvpmodel -q`` prints, without starting it: ``pmode:0002`` and the names in its settings."""
    match = re.search(r"pmode:\s*(\d+)", _text(root / _POWER_MODE) or "")
    if match is None:
        return None
    number = int(match[1])
    settings = _text(root / _POWER_MODES) or ""
    named = re.search(rf"<\s*POWER_MODEL\s+ID=0*{number}\s+NAME=(\S+)\s*>", settings)
    return f"{named[1]} ({number})" if named else str(number)


def _first_number(paths: Iterable[Path]) -> int | None:
    return next((number for path in paths if (number := _number(path)) is not None), None)


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text is not None and re.fullmatch(r"-?[0-9]{1,18}", text) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
