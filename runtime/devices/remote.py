"""A bundle on a device that a shell reaches: pushed once by content, run there, its outputs fetched.

The device needs a POSIX shell and ``sha256sum``, nothing of ours. Files lie under ``Link.root``: ``files/SHA256`` by
their contents, so that what two bundles share is sent once; ``KEY/`` with links to them for one artefact;
``run.XXXXXX`` for one session's inputs and outputs, removed when it ends (those of sessions that were killed, after a
day).

Whatever becomes part of a command for the device's shell goes through ``shlex.quote``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from ...targets import host
from ...targets.spec import TargetSpec
from ..bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, Artefact, Bundle
from ..engines.engine import EngineError
from ..engines.native_program import PROGRAM, NativeProgramEngine
from . import adb, ssh
from .board import MachineState, machine_state
from .qemu_root import cache_directory

_DIGEST = re.compile(r"[0-9a-f]{64}")
# What board.py reads, below the root.
_STATE_FILES = (
    "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor",
    "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",
    "/sys/class/thermal/thermal_zone[0-9]*/type",
    "/sys/class/thermal/thermal_zone[0-9]*/temp",
    "/sys/class/devfreq/*/cur_freq",
    "/sys/class/kgsl/kgsl-3d0/gpuclk",
    "/sys/kernel/debug/bpmp/debug/clk/emc/rate",
    "/sys/kernel/debug/clk/emc/clk_rate",
    "/var/lib/nvpmodel/status",
    "/etc/nvpmodel.conf",
)


class Link(Protocol):
    """A way to one device. ``name`` is what --device says; ``root`` is where files go there."""

    def __hash__(self) -> int: ...

    @property
    def name(self) -> str: ...

    @property
    def root(self) -> PurePosixPath: ...

    def shell(self, script: str) -> subprocess.CompletedProcess[bytes]:
        """Runs a POSIX shell's script there. Raises EngineError where the device cannot be reached."""

    def send(self, source: Path, target: PurePosixPath) -> None:
        """Makes ``target`` a copy of ``source``; one that was cut off may be completed. Raises EngineError."""

    def fetch(self, source: PurePosixPath, target: Path) -> None:
        """The other direction. Raises EngineError."""


def connect(device: str) -> Link | None:
    """The link to a device behind ssh or adb, None for one that is neither. Raises EngineError for a bad address."""
    if device.startswith(ssh.SCHEME):
        return ssh.connect(device)
    return adb.connect(device) if device.startswith(adb.SCHEME) else None


def quoted(words: Sequence[object]) -> str:
    """Words as a POSIX shell's command."""
    return shlex.join(str(word) for word in words)


def ask(link: Link, script: str) -> bytes:
    """What the script prints. Raises EngineError with the device's last line where it fails."""
    done = link.shell(script)
    if done.returncode:
        raise EngineError(f"{link.name}: {_last_line(done)}")
    return done.stdout


def _last_line(done: subprocess.CompletedProcess[bytes]) -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"a command ended with status {done.returncode} and no message"


# ---- what the device is ----


@dataclass(frozen=True)
class Facts:
    """What a device says of itself: ``uname -m``, its processors, /proc/cpuinfo, and the names its firmware or Android
    has for it (empty where there are none)."""

    architecture: str
    processors: int
    cpuinfo: str
    model: str
    system: str

    def detect(self) -> TargetSpec:
        """The device as a row of targets. Raises UnsupportedHost."""
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            file = Path(name) / "cpuinfo"
            file.write_text(self.cpuinfo, encoding="utf-8")
            return host.detect(file, self.architecture)


_FACTS = """
uname -m
nproc 2>/dev/null || grep -c '^processor' /proc/cpuinfo
uname -sr
{ tr -d '\\000' < /proc/device-tree/model; } 2>/dev/null
command -v getprop >/dev/null 2>&1 && printf ' %s %s' "$(getprop ro.product.model)" "$(getprop ro.soc.model)"
echo
cat /proc/cpuinfo
"""


@functools.cache
def facts(link: Link) -> Facts:
    """Asks the device, once. Raises EngineError."""
    lines = ask(link, _FACTS).decode("utf-8", "replace").split("\n", 4)
    if len(lines) != 5 or not lines[1].strip().isdigit():
        raise EngineError(
            f"{link.name}: its answer to `uname -m; nproc` is {lines[:2]}; does a login script of it print something?"
        )
    architecture, processors, system, model, cpuinfo = lines
    return Facts(architecture.strip(), int(processors), cpuinfo, model.strip(), system.strip())


def state(link: Link) -> MachineState:
    """The device's clocks, governors and temperatures now, by copying the files that ``board`` reads.

    Raises EngineError where the device cannot be reached.
    """
    script = 'for f in {}; do [ -r "$f" ] && v=$(cat "$f" 2>/dev/null) && printf "%s\\0%s\\0" "$f" "$v"; done; true'
    fields = ask(link, script.format(" ".join(_STATE_FILES))).decode("utf-8", "replace").split("\0")
    with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
        for path, text in zip(fields[::2], fields[1::2], strict=False):
            if ".." in path or not path.startswith(("/sys/", "/var/lib/nvpmodel/", "/etc/nvpmodel")):
                continue  # a device's answer must not choose where a file is written here
            file = Path(name + path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return machine_state(Path(name))


# ---- files ----


def native_files(bundle: Bundle, artefact: Artefact) -> dict[str, Path]:
    """What a device needs to run a native artefact and test itself: by their names in the bundle."""
    return {name: bundle.file(name) for name in (*artefact.files, GOLDEN_INPUT, GOLDEN_OUTPUT)}


def push(link: Link, files: Mapping[str, tuple[Path, str]]) -> PurePosixPath:
    """Brings files (name: where it lies here, its sha256) to the device; returns their folder there.

    What is there already is checked, not sent. A file is written aside, checked and renamed, so that one that was cut
    off is never taken for whole. Raises EngineError, also where a file changed on the way or its digest is wrong.
    """
    store = link.root / "files"
    digests = sorted({digest for _, digest in files.values()})
    if not all(_DIGEST.fullmatch(digest) for digest in digests):
        raise EngineError("a bundle's manifest holds what is no sha256; compile the bundle again")
    with _only_one_here(f"{link.name} {store}"):
        present = _present(link, store, digests)
        for source, digest in dict.fromkeys(files.values()):
            if digest not in present:
                _push_one(link, store, source, digest)
                present.add(digest)
    key = hashlib.sha256(repr(sorted((name, digest) for name, (_, digest) in files.items())).encode()).hexdigest()[:32]
    folder = link.root / key
    script = []
    for name, (_, digest) in sorted(files.items()):
        place = folder / name
        up = "/".join([".."] * (len(PurePosixPath(name).parts)))
        script.append(
            f"{quoted(['mkdir', '-p', place.parent])} && {quoted(['ln', '-sf', f'{up}/files/{digest}', place])}"
        )
    ask(link, " && ".join(script))
    return folder


def _present(link: Link, store: PurePosixPath, digests: Sequence[str]) -> set[str]:
    """Those of the digests whose file is there with just these contents."""
    script = f"{quoted(['mkdir', '-p', store])} && cd {quoted([store])} && for f in {quoted(digests)}; do "
    script += 'if [ -f "$f" ]; then sha256sum "$f"; fi; done'
    lines = ask(link, script).decode("utf-8", "replace").splitlines()
    pairs = (line.split() for line in lines)
    return {pair[0] for pair in pairs if len(pair) == 2 and pair[0] == pair[1].lstrip("*")}


def _push_one(link: Link, store: PurePosixPath, source: Path, digest: str) -> None:
    # Of this user on this machine, so that what another sends at the same time is never mixed in.
    part = store / f"{digest}.{_this_client()}.part"
    # From its standard input: sha256sum writes an odd file name in a form of its own. All are made executable: beside
    # the program and the libraries there is only data that nobody starts.
    keep = f"chmod 755 {quoted([part])} && {quoted(['mv', '-f', part, store / digest])}"
    script = f'set -- $(sha256sum < {quoted([part])}); if [ "$1" = {digest} ]; then {keep}; '
    script += f"else {quoted(['rm', '-f', part])}; echo differs; fi"
    for _ in range(2):  # what was there of an earlier try may have been spoilt
        link.send(source, part)
        if ask(link, script).strip() != b"differs":
            return
    raise EngineError(f"{link.name}: {source} arrived with other contents, twice; is the bundle whole?")


def _this_client() -> str:
    return hashlib.sha256(f"{platform.node()} {os.getuid()}".encode()).hexdigest()[:12]


@contextmanager
def _only_one_here(what: str) -> Iterator[None]:
    """Processes of this user wait for each other; the kernel ends the wait when one dies."""
    folder = cache_directory() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / hashlib.sha256(what.encode()).hexdigest()[:16], os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


# ---- running ----


class RemoteNativeEngine(NativeProgramEngine):
    """A bundle's native artefact on a device. Raises EngineError where it cannot be reached or the program fails."""

    def __init__(
        self, bundle: Bundle, artefact: Artefact, link: Link, threads: int | None = None, cores: str | None = None
    ) -> None:
        entries = bundle.manifest.files
        files = {name: (path, entries[name].sha256) for name, path in native_files(bundle, artefact).items()}
        folder = push(link, files)
        self._link = link
        self._scratch: PurePosixPath | None = _make_scratch(link)
        self._sent = b""
        program = next(name for name in sorted(artefact.files) if PurePosixPath(name).name == PROGRAM)
        try:
            directory = (folder / program).parent
            super().__init__((str(folder / program),), directory, threads, cores=cores, execute=self._there)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Removes this session's files from the device; what is kept by contents stays."""
        scratch, self._scratch = self._scratch, None
        if scratch is not None:
            self._link.shell(quoted(["rm", "-rf", scratch]))

    def _there(
        self, words: Sequence[str], images: bytes | None, result: bool
    ) -> tuple[subprocess.CompletedProcess[str], bytes]:
        if self._scratch is None:
            raise EngineError("native: the engine is closed")
        source, target = self._scratch / "input.bin", self._scratch / "output.bin"
        words = list(words)
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            if images is not None:
                words.append(str(source))
                digest = hashlib.sha256(images).digest()
                if digest != self._sent:  # the same image is timed many times
                    file = Path(name) / "input.bin"
                    file.write_bytes(images)
                    ask(self._link, quoted(["rm", "-f", source]))
                    self._sent = b""
                    self._link.send(file, source)
                    self._sent = digest
            if result:
                words.append(str(target))
            done = self._link.shell(quoted(words))
            text = [stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr)]
            data = b""
            if result and done.returncode == 0:
                fetched = Path(name) / "output.bin"
                self._link.fetch(target, fetched)
                data = fetched.read_bytes()
        return subprocess.CompletedProcess(done.args, done.returncode, *text), data


def _make_scratch(link: Link) -> PurePosixPath:
    old = f"find {quoted([link.root])} -maxdepth 1 -name 'run.*' -mtime +1 -exec rm -rf '{{}}' + 2>/dev/null"
    made = ask(link, f"{old}; {quoted(['mktemp', '-d', link.root / 'run.XXXXXX'])}").decode("utf-8", "replace")
    path = PurePosixPath(made.rstrip("\n"))
    if path.parent != link.root:
        raise EngineError(f"{link.name}: mktemp there made {str(path)!r}, not a folder in {link.root}")
    return path
