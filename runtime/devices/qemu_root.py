"""An AArch64 root folder with Python and LiteRT, so that LiteRT's own Arm code can be rehearsed under qemu-user.

The folder holds the arm64 packages of this very distribution (its Python and what that needs), fetched by apt into a
state of its own and unpacked without installing anything, and LiteRT's aarch64 wheels. No rights of root are needed
and the system's packages are left alone. About 200 MB on disk, in the user's cache directory; built once.

``python -m xceptile.runtime.devices.qemu_root`` builds it and prints where it is: for a machine's set-up.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..engines.engine import EngineError, last_line
from ..user_cache import user_cache
from .qemu import emulator

LITERT = "ai-edge-litert==2.3.0"
_PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "zlib1g")
# LiteRT's wheels and those of what it needs carry different ages of the C library in their names.
_PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in range(28, 16, -1))
_LAYOUT = 1  # of the folder; raised when what is written below changes

# Ubuntu keeps arm64 on servers of their own; Debian's mirrors hold every architecture.
# Source: https://wiki.ubuntu.com/UbuntuDevelopment/PackageArchive
_UBUNTU_SOURCES = (
    "deb [signed-by=/usr/share/keyrings/ubuntu-archive-keyring.gpg] "
    "http://ports.ubuntu.com/ubuntu-ports {suite} main universe\n"
)

# "CPU part" of the cores that QEMU emulates, all of implementer 0x41 (Arm), from their technical reference manuals.
_CPU_PARTS = {
    "cortex-a53": 0xD03,
    "cortex-a55": 0xD05,
    "cortex-a57": 0xD07,
    "cortex-a72": 0xD08,
    "cortex-a76": 0xD0B,
    "neoverse-n1": 0xD0C,
    "neoverse-v1": 0xD40,
}
_CPU_FEATURES = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOTPROD_FEATURES = "atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"


def cpuinfo(cpu: str, cores: int) -> str:
    """The /proc/cpuinfo of an Arm machine of ``cores`` cores of QEMU's model ``cpu`` (options after a comma count not).

    LiteRT reads it to know the core and stops at one of another architecture's form. What instructions there are it
    asks the (emulated) kernel. A model without a known number is presented as one of no make.
    """
    model = cpu.split(",", maxsplit=1)[0]
    part = _CPU_PARTS.get(model)
    newer = model not in ("cortex-a53", "cortex-a57", "cortex-a72")
    features = f"{_CPU_FEATURES} {_DOTPROD_FEATURES}" if newer else _CPU_FEATURES
    lines = (
        "BogoMIPS\t: 100.00",
        f"Features\t: {features}",
        f"CPU implementer\t: 0x{0x41 if part else 0:02x}",
        "CPU architecture: 8",
        "CPU variant\t: 0x0",
        f"CPU part\t: 0x{part or 0x51:03x}",
        "CPU revision\t: 0",
    )
    return "".join(f"processor\t: {core}\n" + "\n".join(lines) + "\n\n" for core in range(cores))


def _distribution() -> tuple[str, str]:
    """(identifier, code name) of this Linux, such as ("debian", "bookworm")."""
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return "unknown", ""
    return release.get("ID", "unknown"), release.get("VERSION_CODENAME", "")


def _run(what: str, command: Sequence[str]) -> None:
    """Runs a step. Raises EngineError with the step's last line where it fails."""
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise EngineError(f"LiteRT under qemu: {what} failed: {last_line(done)}")


def _fetch_packages(work: Path) -> list[Path]:
    """The arm64 packages, fetched under ``work`` with an apt state that knows of no installed package."""
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (work / folder).mkdir(parents=True)
    (work / "status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "root",  # the sandbox's user could not read a folder in a home directory
        "Dir::State": work / "state",
        "Dir::State::status": work / "status",
        "Dir::Cache": work / "cache",
    }
    identifier, suite = _distribution()
    if identifier == "ubuntu":
        sources = work / "sources.list"
        sources.write_text("".join(_UBUNTU_SOURCES.format(suite=suite + pocket) for pocket in ("", "-updates")))
        options["Dir::Etc::sourcelist"] = sources
        options["Dir::Etc::sourceparts"] = "-"
    apt = ["apt-get", "-q", "-y", *(f"-o{name}={value}" for name, value in options.items())]
    _run("fetching the list of arm64 packages", [*apt, "update"])
    install = [*apt, "--no-install-recommends", "--download-only", "install", *_PACKAGES]
    _run("fetching arm64 packages", install)
    return sorted((work / "cache/archives").glob("*.deb"))


def python(root: Path) -> Path:
    """The emulated Python of a root folder, ``usr/bin/python3.N``."""
    found = [p for p in sorted((root / "usr/bin").glob("python3.*")) if p.name.removeprefix("python3.").isdigit()]
    if not found:
        raise EngineError(f"LiteRT under qemu: no Python in {root}: remove the folder to have it built again")
    return found[0]


def _build(root: Path) -> None:
    """Fills the empty folder ``root``."""
    with tempfile.TemporaryDirectory(dir=root.parent) as work:
        packages = _fetch_packages(Path(work))
        for package in packages:
            _run(f"unpacking {package.name}", ["dpkg-deb", "--extract", str(package), str(root)])
    if not (root / "lib").exists():
        (root / "lib").symlink_to("usr/lib")  # a merged /usr: the link is made by a package's script elsewhere
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--only-binary=:all:", "--implementation=cp"]
    version = python(root).name.removeprefix("python")
    platforms = [f"--platform={name}" for name in _PLATFORMS]
    target = [f"--target={root / 'opt/litert'}", f"--python-version={version}"]
    _run("fetching LiteRT's aarch64 wheels", [*pip, *platforms, *target, "--no-compile", LITERT])


def ensure(cache: Path | None = None) -> Path:
    """The root folder of this distribution, built if it is not there yet (under a minute, on a fast line).

    ``cache`` is the folder that holds it, by default ``user_cache()``. It is written aside and renamed, so that a
    folder that exists is complete. Raises EngineError, with the reason, where it cannot be built: no apt-get or dpkg,
    no network, no pip.
    """
    cache = cache or user_cache()
    key = hashlib.sha256(repr((_LAYOUT, _distribution(), _PACKAGES, LITERT)).encode()).hexdigest()[:12]
    root = cache / f"aarch64-{key}"
    if root.is_dir():
        return root
    for tool in ("apt-get", "dpkg-deb"):
        if not shutil.which(tool):
            raise EngineError(
                f"LiteRT under qemu needs a folder of arm64 packages, built with {tool} of Debian or Ubuntu: not found"
            )
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as aside:
            built = Path(aside) / "root"
            built.mkdir(mode=0o755)
            _build(built)
            try:
                built.rename(root)
            except OSError:
                if not root.is_dir():  # else another process was first
                    raise
    except OSError as error:
        raise EngineError(f"LiteRT under qemu: cannot write its root folder: {error}") from error
    return root


def view(root: Path, folder: Path, cpu: str) -> None:
    """Makes ``folder`` a root for qemu's ``-L``: links to everything in ``root``, and the /proc/cpuinfo of ``cpu``."""
    for entry in root.iterdir():
        (folder / entry.name).symlink_to(entry)
    (folder / "proc").mkdir()
    (folder / "proc/cpuinfo").write_text(cpuinfo(cpu, os.cpu_count() or 1))


if __name__ == "__main__":
    try:
        emulator("aarch64")
        print(ensure())
    except EngineError as error:
        sys.exit(str(error))
