"""NVIDIA's compiler as a library from PyPI: CUDA C++ to a cubin or to PTX, without a CUDA toolkit or a GPU.

Two of them are installed by the extra ``cuda``: version 12.9 for sm_50 to sm_90, and version 13.0 for Jetson Thor,
which 12.9 knows by another name and which ends what 13 knows (nothing under sm_75).
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Contraction would round a multiplication and the addition after it once instead of twice. The report is ptxas's, on
# each kernel's registers and spills.
_OPTIONS = ("--fmad=false", "--std=c++14", "--ptxas-options=-v")

# NVRTC marks its PTX with its own version, which no older driver reads, though the kernels use nothing new. Marked as
# follows, the driver of the first CUDA that serves reads it: 10.0 (wmma on int8), 11.4 (sm_87). By first architecture.
_PTX_VERSIONS = {0: "6.3", 87: "7.4"}


class NvrtcMissing(RuntimeError):
    """NVRTC is not installed."""


class NvrtcError(RuntimeError):
    """NVRTC refused the source; ``log`` is what it said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Version:
    """A version of CUDA."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True)
class Binary:
    """What NVRTC made: machine code for one architecture, the PTX it was made from, and the log, which names each
    kernel's registers, stack frame and spills."""

    cubin: bytes
    ptx: bytes
    log: str


def library_for(arch: str) -> tuple[ctypes.CDLL, Version]:
    """The NVRTC that compiles for ``sm_87`` or the like, and its version. Raises NvrtcMissing."""
    major = 13 if _number(arch) > 90 else 12
    return _load(major)


def compile_source(source: str, arch: str) -> Binary:
    """CUDA C++ compiled for ``sm_87`` or the like.

    Raises NvrtcMissing, or NvrtcError with the compiler's log.
    """
    library, _ = library_for(arch)
    options = [*_OPTIONS, f"--gpu-architecture={arch}"]
    program = ctypes.c_void_p()
    _check(library, library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None))
    try:
        array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.nvrtcCompileProgram(program, len(options), array)
        log = _fetch(library, "ProgramLog", program).rstrip(b"\0").decode("utf-8", "replace").strip()
        if status:
            first = next((line for line in log.splitlines() if "error" in line), log.partition("\n")[0])
            raise NvrtcError(f"NVRTC cannot compile the kernels for {arch}: {first}", log)
        ptx = _fetch(library, "PTX", program).rstrip(b"\0")
        if (version := ptx_version(arch)) is not None:
            ptx = re.sub(rb"^\.version .*$", f".version {version}".encode(), ptx, count=1, flags=re.MULTILINE)
        return Binary(_fetch(library, "CUBIN", program), ptx, log)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def ptx_version(arch: str) -> str | None:
    """The version of the PTX ISA that kernels for ``sm_87`` or the like are marked with; None: NVRTC's own."""
    number = _number(arch)
    return None if number > 90 else _PTX_VERSIONS[max(first for first in _PTX_VERSIONS if first <= number)]


def _number(arch: str) -> int:
    match = re.fullmatch(r"sm_(\d+)", arch)
    if match is None:
        raise ValueError(f"{arch!r} is no GPU architecture such as sm_87")
    return int(match[1])


@cache
def _load(major: int) -> tuple[ctypes.CDLL, Version]:
    found = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in found.submodule_search_locations or ()] if found else []
    folder = {12: "cuda_nvrtc", 13: "cu13"}[major]
    for path in (root / folder / "lib" / f"libnvrtc.so.{major}" for root in roots):
        if path.exists():
            for builtins in path.parent.glob(f"libnvrtc-builtins.so.{major}.*"):  # looked for by its bare name
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            library = ctypes.CDLL(str(path))
            library.nvrtcGetErrorString.restype = ctypes.c_char_p
            numbers = ctypes.c_int(), ctypes.c_int()
            _check(library, library.nvrtcVersion(ctypes.byref(numbers[0]), ctypes.byref(numbers[1])))
            return library, Version(numbers[0].value, numbers[1].value)
    raise NvrtcMissing(f"NVRTC {major} is not installed; it compiles the CUDA kernels: pip install 'xceptile[cuda]'")


def _fetch(library: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, status: int) -> None:
    if status:
        raise NvrtcError(f"NVRTC: {library.nvrtcGetErrorString(status).decode()}")
