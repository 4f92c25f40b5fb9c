"""What this machine can do, and what is missing for the rest: the answers of `xceptile doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..runtime.devices import qemu
from ..runtime.engines.engine import last_line
from ..runtime.user_cache import CacheError, user_cache
from ..targets import host
from .cuda_devices import cuda_devices
from .opencl_devices import find_library, opencl_devices


@dataclass(frozen=True)
class Finding:
    """One ability. ``detail`` is a version, or what to install."""

    what: str
    ok: bool
    detail: str


# Ability, distribution, what a program that uses it begins with, extra of ours that brings it.
_NVRTC = "from xceptile.compile.backends.nvrtc import library_for as f; f({!r})"
_PACKAGES = (
    ("compile through TVM", "apache-tvm", "import tvm", "compile"),
    ("cross-compile the runtime", "ziglang", "import ziglang", "compile"),
    ("write TFLite files", "tflite", "import tflite, flatbuffers", "compile"),
    ("compile for Jetson", "nvidia-cuda-nvrtc-cu12", _NVRTC.format("sm_87"), "cuda"),
    ("compile for Jetson Thor", "nvidia-cuda-nvrtc", _NVRTC.format("sm_110"), "cuda"),
    ("load torch networks", "torch", "import torch", "compile"),
    ("load ONNX networks", "onnx", "import onnx", "compile"),
    ("load Keras checkpoints", "h5py", "import h5py", "compile"),
    ("run TFLite files", "ai-edge-litert", "import ai_edge_litert.interpreter", "device"),
    ("read images", "pillow", "import PIL.Image", "device"),
    ("verify bundles", "safetensors", "import safetensors.numpy", "gate"),
    ("sign bundles", "cryptography", "import cryptography.hazmat.primitives.asymmetric.ed25519", "sign"),
    ("verify over a Ray cluster", "ray", "import ray", "ray"),
)
_IMPORT_S = 120.0  # a cold disk takes a minute for TVM


def _package(what: str, name: str, start: str, extra: str) -> Finding:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(what, False, f"{name} is not installed: pip install 'xceptile[{extra}]'")
    failure = _failure_of(start)
    return Finding(what, not failure, f"{name} {version}" + failure)


def _failure_of(start: str) -> str:
    """Why a program that begins so does not go on, "" where it does: each in a process of its own, which may crash."""
    command = [sys.executable, "-P", "-c", start]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_IMPORT_S, check=False)
    except subprocess.TimeoutExpired:
        return f" is installed, but importing it takes longer than {_IMPORT_S:.0f} s"
    if done.returncode == 0:
        return ""
    reason = f"it was ended by signal {-done.returncode}" if done.returncode < 0 else last_line(done)
    return f" is installed, but importing it fails: {reason}"


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


def _cache() -> Finding:
    """Where what is built here is kept: in the folder for temporary files it is gone after a restart."""
    what = "keep what was built here"
    try:
        folder = user_cache()
    except CacheError as error:
        return Finding(what, False, str(error))
    kept = not folder.is_relative_to(Path(tempfile.gettempdir()).resolve()) or bool(os.environ.get("XDG_CACHE_HOME"))
    return Finding(what, kept, str(folder) if kept else f"{folder} only; set XDG_CACHE_HOME to a folder of your own")


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
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # each waits for a process
        packages = tuple(pool.map(_package, *zip(*_PACKAGES, strict=True)))
    emulators = (_emulator("AArch64", "aarch64"), _emulator("RISC-V", "riscv64"))
    return (*_versions(), *packages, _cache(), _host(), *emulators, _opencl(), _cuda(), *reached)
