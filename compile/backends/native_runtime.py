"""The native runtime's sources (``runtime/native``) -> the program and the library that a bundle carries."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from ... import __version__
from ...runtime import native
from ...runtime.user_cache import user_cache
from ...targets.spec import TargetSpec
from . import zig

PROGRAM, LIBRARY = "xceptile-run", "libxceptile.so"
LIBRARY_SOURCES = (
    "plan.c", "session.c", "error.c", "file.c", "cache.c", "sha256.c", "pool.c", "cpu.c", "opencl.c", "cuda.c"
)  # fmt: skip
_SOURCES = {PROGRAM: (*LIBRARY_SOURCES, "main.c"), LIBRARY: LIBRARY_SOURCES}
_HEADERS = ("xceptile.h", "internal.h")
_WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wconversion", "-Wstrict-prototypes", "-Wmissing-prototypes")
_FLAGS = (
    "-std=c11", "-O2", "-s", *_WARNINGS, "-fvisibility=hidden", "-ffunction-sections", "-fdata-sections",
    "-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-Wl,--gc-sections", "-Wl,-z,relro", "-Wl,-z,now",
    "-Wl,--build-id=none", "-Wl,-z,max-page-size=65536", "-ldl", "-lpthread",
)  # fmt: skip
_KIND_FLAGS = {
    PROGRAM: ("-fPIE", "-pie"),
    LIBRARY: ("-fPIC", "-shared", "-DXCT_BUILD_SHARED", f"-Wl,-soname,{LIBRARY}"),
}


class NativeBuildError(RuntimeError):
    """The C compiler is missing or refused the runtime's sources; the message holds what it said."""


def build(target: TargetSpec) -> dict[str, bytes]:
    """``xceptile-run`` and ``libxceptile.so`` for the target's processor, stripped, the same bytes every time.

    They run on any GNU/Linux from glibc 2.17 (2012) on, on RISC-V from 2.27 (2018) on. zig has no Android C library:
    for an Android phone this is the build that rehearses under the emulator, unless XCEPTILE_ANDROID_RUNTIME names the
    folder of a build by the NDK (docs/android.md): then the bundle gets that one. Results are kept in the user's cache
    directory under a hash of all that goes in. Raises NativeBuildError.
    """
    made_by_ndk = os.environ.get("XCEPTILE_ANDROID_RUNTIME")
    if made_by_ndk and target.triple.endswith("-android"):
        return {name: _android_file(Path(made_by_ndk) / name) for name in _SOURCES}
    return _build(target.architecture)


def _android_file(path: Path) -> bytes:
    """Raises NativeBuildError for what cannot be an Android build for AArch64 of this version."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise NativeBuildError(f"XCEPTILE_ANDROID_RUNTIME: cannot read {path}: {error.strerror}") from error
    # ELF, 64 bits, little endian, machine 183 (EM_AARCH64); a program names its loader.
    is_arm = data[:6] == b"\x7fELF\x02\x01" and data[18:20] == b"\xb7\0"
    if not is_arm or (path.name == PROGRAM and b"/system/bin/linker64" not in data):
        raise NativeBuildError(f"XCEPTILE_ANDROID_RUNTIME: {path} is no build for arm64-v8a; see docs/android.md")
    if __version__.encode() + b"\0" not in data:
        raise NativeBuildError(f"XCEPTILE_ANDROID_RUNTIME: {path} was not built from this version, {__version__}")
    return data


def build_rehearsal() -> dict[str, bytes]:
    """The same for this machine: a bundle for a GPU takes it along, so that its plan can be run here on another device
    of the same API (OpenCL on a processor, CUDA on another NVIDIA GPU). Raises NativeBuildError."""
    return _build(platform.machine())


def _build(architecture: str) -> dict[str, bytes]:
    folder = Path(native.__file__).parent
    sources = {name: (folder / name).read_bytes() for name in sorted({*_HEADERS, *_SOURCES[PROGRAM]})}
    cached = user_cache("native-runtime") / _key(architecture, sources)
    if not all((cached / name).is_file() for name in _SOURCES):
        _fill(cached, architecture, sources)
    return {name: (cached / name).read_bytes() for name in _SOURCES}


def _key(architecture: str, sources: dict[str, bytes]) -> str:
    """Everything that the result depends on, hashed: sources, flags, version, target and compiler."""
    digest = hashlib.sha256()
    for part in (zig.triple(architecture), __version__, _zig_version(), repr((_SOURCES, _FLAGS, _KIND_FLAGS))):
        digest.update(part.encode() + b"\0")
    for name, data in sources.items():
        digest.update(f"{name} {len(data)}\0".encode() + data)
    return digest.hexdigest()[:32]


def _zig_version() -> str:
    return _run([sys.executable, "-m", "ziglang", "version"], Path.cwd()).strip()


def _fill(cached: Path, architecture: str, sources: dict[str, bytes]) -> None:
    """Compiles in a folder of its own with relative names, so that no path of this machine gets into the result, and
    renames: two builds at once both end with a whole folder."""
    with tempfile.TemporaryDirectory(dir=cached.parent, prefix="building-") as name:
        work = Path(name) / "work"
        work.mkdir()
        for source, data in sources.items():
            (work / source).write_bytes(data)
        result = Path(name) / "result"
        result.mkdir()
        for output, files in _SOURCES.items():
            command = [*zig.compiler(architecture), f'-DXCT_VERSION="{__version__}"']
            _run([*command, *_FLAGS, *_KIND_FLAGS[output], *files, "-o", f"../result/{output}"], work)
        if cached.exists():  # incomplete, or filled meanwhile by another process
            shutil.rmtree(cached, ignore_errors=True)
        try:
            result.rename(cached)
        except OSError:
            if not all((cached / output).is_file() for output in _SOURCES):
                raise


def _run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = done.stderr.strip() or f"exit status {done.returncode}"
        raise NativeBuildError(f"cannot build the native runtime (zig comes with xceptile[compile]): {reason}")
    return done.stdout
