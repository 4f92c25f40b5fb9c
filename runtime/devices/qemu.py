"""qemu's user-mode emulator: the target's own program runs here. Its outputs count, its time does not.

The emulated processor has just the target's features, so a kernel that uses more stops with an illegal instruction.
"""

from __future__ import annotations

import platform
import shutil
from pathlib import Path

from ...targets.spec import TargetSpec
from ..engines.engine import EngineError
from ..engines.native_program import PROGRAM, NativeProgramEngine, startable

# Where Debian, Ubuntu and Fedora put the C library of the cross compilers.
_SYSROOTS = ("/usr/{0}-linux-gnu", "/usr/{0}-redhat-linux/sys-root/fc*")
_LOADERS = {
    "aarch64": "lib/ld-linux-aarch64.so.1",
    "riscv64": "lib/ld-linux-riscv64-lp64d.so.1",
    "x86_64": "lib64/ld-linux-x86-64.so.2",
}
_PACKAGES = {"aarch64": "libc6-arm64-cross", "riscv64": "libc6-riscv64-cross", "x86_64": "libc6-amd64-cross"}


class QemuNativeEngine(NativeProgramEngine):
    """A bundle's ``native`` folder under qemu with the target's processor. Raises EngineError where qemu is missing."""

    def __init__(self, directory: Path, target: TargetSpec, threads: int = 1) -> None:
        super().__init__((*emulator_command(target), str(startable(directory / PROGRAM))), directory, threads)


def emulator_command(target: TargetSpec) -> tuple[str, ...]:
    """The words before a program of the target's. Raises EngineError where no emulator can play the target."""
    architecture = target.architecture
    return (emulator(architecture), "-cpu", emulated_cpu(target), "-L", str(sysroot(architecture)))


def emulated_cpu(target: TargetSpec) -> str:
    """The target's processor among qemu's. Raises EngineError where no emulator has it."""
    if target.qemu_cpu is None:
        raise EngineError(f"{target.name}: no emulator has this target's processor; run it on the device")
    return target.qemu_cpu


def emulator(architecture: str) -> str:
    """The path of qemu's user-mode emulator. Raises EngineError where it is not installed."""
    for name in (f"qemu-{architecture}", f"qemu-{architecture}-static"):
        if path := shutil.which(name):
            return path
    raise EngineError(f"qemu-{architecture} is not installed: apt install qemu-user")


def sysroot(architecture: str) -> Path:
    """A folder that holds the architecture's C library. Raises EngineError where there is none."""
    if architecture == platform.machine():
        return Path("/")
    for pattern in _SYSROOTS:
        for root in sorted(Path("/").glob(pattern.format(architecture).lstrip("/"))):
            if (root / _LOADERS[architecture]).exists():
                return root
    raise EngineError(f"no C library for {architecture} to emulate with: apt install {_PACKAGES[architecture]}")
