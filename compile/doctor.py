"""What this machine can do, and what is missing for the rest: the answers of `xceptile doctor`."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
from dataclasses import dataclass

from .. import __version__
from ..runtime.devices import qemu
from ..targets import host
from .cuda_devices import cuda_devices
from .opencl_devices import find_library, opencl_devices


@dataclass(frozen=True)
class Finding:
    """One ability. ``detail`` is a version, or what to install."""

    what: str
    ok: bool
    detail: str


# Ability, distribution, extra of ours that brings it.
_PACKAGES = (
    ("compile through TVM", "apache-tvm", "compile"),
    ("cross-compile the runtime", "ziglang", "compile"),
    ("write TFLite files", "tflite", "compile"),
    ("compile for Jetson", "nvidia-cuda-nvrtc-cu12", "cuda"),
    ("compile for Jetson Thor", "nvidia-cuda-nvrtc", "cuda"),
    ("load torch networks", "torch", "compile"),
    ("load ONNX networks", "onnx", "compile"),
    ("load Keras checkpoints", "h5py", "compile"),
    ("run TFLite files", "ai-edge-litert", "litert"),
    ("read images", "pillow", "images"),
    ("sign bundles", "cryptography", "sign"),
    ("verify over a Ray cluster", "ray", "ray"),
)


def _package(what: str, name: str, extra: str) -> Finding:
    try:
        return Finding(what, True, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(what, False, f"{name} is not installed: pip install 'xceptile[{extra}]'")


def _host() -> Finding:
    try:
        spec = host.detect()
        return Finding("run native bundles here", True, f"{spec.description}: {', '.join(spec.features)}")
    except host.UnsupportedHost as error:
        return Finding("run native bundles here", False, str(error))


def _emulator(name: str, architecture: str) -> Finding:
    what = f"rehearse {name} bundles"
    try:
        program, root = qemu.emulator(architecture), qemu.sysroot(architecture)
    except RuntimeError as error:
        return Finding(what, False, str(error))
    return Finding(what, True, f"{program}, C library in {root}")


def _program(what: str, program: str, package: str) -> Finding:
    path = shutil.which(program)
    return Finding(what, path is not None, path or f"{program} is not installed: apt install {package}")


def _opencl() -> Finding:
    what = "run or rehearse OpenCL bundles"
    try:
        name, library = find_library()
    except OSError as error:
        return Finding(what, False, f"{error}; install a GPU's driver, or apt install pocl-opencl-icd")
    devices = opencl_devices(library)
    if not devices:
        return Finding(what, False, f"{name} has no device: apt install pocl-opencl-icd for the processor")
    return Finding(what, True, ", ".join(f"{each} ({kind})" for each, kind in devices.items()) + f", by {name}")


def _cuda() -> Finding:
    what = "run or rehearse CUDA bundles"
    try:
        devices = cuda_devices()
    except OSError:
        return Finding(what, False, "no NVIDIA driver here (libcuda.so.1); docs/nvidia.md: a borrowed GPU")
    if not devices:
        return Finding(what, False, "the NVIDIA driver finds no GPU")
    return Finding(what, True, ", ".join(f"{name} (compute capability {it})" for name, it in devices.items()))


def _versions() -> tuple[Finding, ...]:
    """What a report of a fault begins with."""
    try:
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        system = "a system without a name"
    library = " ".join(platform.libc_ver()).strip() or "a C library that does not say its name"
    return (
        Finding("Xceptile", True, __version__),
        Finding("Python", True, f"{platform.python_version()}, {platform.python_implementation()}"),
        Finding("system", True, f"{system}, {platform.system()} {platform.release()} {platform.machine()}, {library}"),
    )


def examine() -> tuple[Finding, ...]:
    """Versions, then every ability in a fixed order."""
    reached = (
        _program("run bundles on boards behind ssh", "ssh", "openssh-client"),
        _program("run bundles on Android phones", "adb", "adb"),
    )
    emulators = (_emulator("AArch64", "aarch64"), _emulator("RISC-V", "riscv64"))
    return (*_versions(), *(_package(*row) for row in _PACKAGES), _host(), *emulators, _opencl(), _cuda(), *reached)
