"""The CMake file of the native runtime, built for this machine, and Android builds that a bundle takes along."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from support.fake_network import compile_kernels, write_bundle
from support.needs import requires
from support.tree import SOURCES

from xceptile import __version__
from xceptile.compile.backends import native_runtime
from xceptile.compile.backends.native_runtime import NativeBuildError
from xceptile.targets import catalog

ANDROID = catalog.get("adreno-740")


def test_cmake_builds_the_same_sources() -> None:
    text = (SOURCES / "CMakeLists.txt").read_text()
    (listed,) = re.findall(r"set\(sources (.*)\)", text)
    assert sorted(listed.split()) == sorted(native_runtime.LIBRARY_SOURCES)


@requires("cmake", package="cmake")
@requires("clang", package="clang")
def test_cmake_builds_the_runtime_for_this_machine(tmp_path: Path) -> None:
    build = tmp_path / "build"
    subprocess.run(["cmake", "-S", SOURCES, "-B", build], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", build], check=True, stdout=subprocess.DEVNULL)
    version = subprocess.run([build / "xceptile-run", "--version"], check=True, capture_output=True, text=True).stdout
    assert version == f"xceptile-run {__version__}\n"
    bundle = write_bundle(tmp_path / "bundle", compile_kernels(tmp_path / "kernels.so").read_bytes())
    subprocess.run([build / "xceptile-run", "--self-test", bundle], check=True)
    listing = subprocess.run(
        ["nm", "-D", "--defined-only", build / "libxceptile.so"], check=True, capture_output=True, text=True
    ).stdout
    assert all(line.split()[-1].startswith("xct_") for line in listing.splitlines())


@requires("clang", package="clang")
def test_this_systems_clang_compiles_it_for_arm() -> None:
    """Debian 12's is as old as that of the NDK r25, which does not declare the intrinsics for SHA-256 by itself."""
    zig = pytest.importorskip("ziglang", reason="needs ziglang (pip install ziglang)")  # for the C library's headers
    headers = Path(zig.__file__).parent / "lib/libc/include"
    folders = ("aarch64-linux-gnu", "generic-glibc", "aarch64-linux-any", "any-linux-any")
    flags = ["--target=aarch64-linux-gnu", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    includes = [word for folder in folders for word in ("-isystem", headers / folder)]
    sources = [SOURCES / name for name in (*native_runtime.LIBRARY_SOURCES, "main.c")]
    subprocess.run(["clang", *flags, *includes, *sources], check=True)


def android_files(folder: Path, version: str = __version__) -> Path:
    """What passes for the NDK's results, as far as they are looked at."""
    elf = b"\x7fELF\x02\x01" + bytes(12) + b"\xb7\0" + version.encode() + b"\0"
    folder.mkdir()
    (folder / "xceptile-run").write_bytes(elf + b"/system/bin/linker64\0")
    (folder / "libxceptile.so").write_bytes(elf)
    return folder


def test_a_bundle_takes_the_ndks_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = android_files(tmp_path / "android")
    monkeypatch.setenv("XCEPTILE_ANDROID_RUNTIME", str(folder))
    expected = {name: (folder / name).read_bytes() for name in ("xceptile-run", "libxceptile.so")}
    assert native_runtime.build(ANDROID) == expected
    monkeypatch.setattr(native_runtime, "_build", lambda architecture: {"built for": architecture.encode()})
    assert native_runtime.build(catalog.get("generic/arm64")) == {"built for": b"aarch64"}


@pytest.mark.parametrize("fault", ["missing", "x86", "GNU/Linux", "other version"])
def test_what_is_no_android_build_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    folder = android_files(tmp_path / "android", "0.0.0" if fault == "other version" else __version__)
    program = folder / "xceptile-run"
    data = program.read_bytes()
    if fault == "missing":
        program.unlink()
    elif fault == "x86":
        program.write_bytes(data.replace(b"\xb7\0", b"\x3e\0"))
    elif fault == "GNU/Linux":
        program.write_bytes(data.replace(b"/system/bin/linker64", b"/lib/ld-linux-aarch64.so.1"))
    monkeypatch.setenv("XCEPTILE_ANDROID_RUNTIME", str(folder))
    with pytest.raises(NativeBuildError, match=r"XCEPTILE_ANDROID_RUNTIME: .*xceptile-run"):
        native_runtime.build(ANDROID)
