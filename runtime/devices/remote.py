"""A bundle on a device that a shell reaches: pushed once by content, run there, its outputs fetched.

The device needs a POSIX shell and ``sha256sum``, nothing of ours. Files lie under ``Link.root``: ``files/SHA256`` by
their contents, so that what two bundles share is sent once; ``KEY/`` with links to them for one artefact;
``run.XXXXXX`` for one session's inputs and outputs, removed when it ends (those of sessions that were killed, after a
day). What nobody used for 30 days is removed.

Whatever becomes part of a command for the device's shell goes through ``shlex.quote``.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import math
import os
import platform
import re
import shlex
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

import numpy as np

from ...targets import host
from ...targets.spec import TargetSpec
from ..bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, GOLDEN_TOLERANCE, NATIVE, REHEARSAL, Artefact, Bundle
from ..engines.engine import Array, EngineError, fill_batches, last_line
from ..engines.native_program import PROGRAM, NativeProgramEngine
from . import adb, ssh, time_limit
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

    def shell(self, script: str, limit_s: float = time_limit.COMMAND_S) -> subprocess.CompletedProcess[bytes]:
        """Runs a POSIX shell's script there. Raises EngineError where the device cannot be reached or does not answer
        in time.
        """

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
        raise EngineError(f"{link.name}: {last_line(done)}")
    return done.stdout


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
def has_litert(link: Link) -> bool:
    """Whether the device's Python can run LiteRT files. Raises EngineError where it cannot be reached."""
    return link.shell("python3 -c 'import numpy, ai_edge_litert.interpreter'").returncode == 0


@functools.cache
def facts(link: Link) -> Facts:
    """Asks the device, once. Raises EngineError."""
    text = re.sub(r"[^\n\t -~]", "?", ask(link, _FACTS).decode("utf-8", "replace"))  # it is printed in reports
    lines = text.split("\n", 4)
    if len(lines) != 5 or not re.fullmatch(r"[0-9]{1,4}", lines[1].strip()):
        raise EngineError(
            f"{link.name}: its answer to `uname -m; nproc` is {lines[:2]}; does a login script of it print something?"
        )
    architecture, processors, system, model, cpuinfo = lines
    return Facts(architecture.strip(), int(processors), cpuinfo, model.strip(), system.strip())


def facts_here() -> Facts:
    """This machine's."""
    model, cpuinfo = (
        path.read_text(encoding="utf-8", errors="replace").strip("\0\n") if path.exists() else ""
        for path in (Path("/proc/device-tree/model"), Path("/proc/cpuinfo"))
    )
    system = f"{platform.system()} {platform.release()}"
    return Facts(platform.machine(), len(os.sched_getaffinity(0)), cpuinfo, model, system)


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
            with suppress(OSError):  # no name of a file
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(text, encoding="utf-8")
        return machine_state(Path(name))


# ---- files ----


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
    script = [f"{quoted(['mkdir', '-p', folder])} && {quoted(['touch', folder])}"]
    for name, (_, digest) in sorted(files.items()):
        place = folder / name
        up = "/".join([".."] * (len(PurePosixPath(name).parts)))
        script.append(
            f"{quoted(['mkdir', '-p', place.parent])} && {quoted(['ln', '-sf', f'{up}/files/{digest}', place])}"
        )
    ask(link, " && ".join(script))
    return folder


def _present(link: Link, store: PurePosixPath, digests: Sequence[str]) -> set[str]:
    """Those of the digests whose file is there with just these contents; they are used from now on."""
    script = f"{quoted(['mkdir', '-p', store])} && cd {quoted([store])} && for f in {quoted(digests)}; do "
    script += 'if [ -f "$f" ]; then touch "$f"; sha256sum "$f"; fi; done'
    lines = ask(link, script).decode("utf-8", "replace").splitlines()
    pairs = (line.split() for line in lines)
    return {pair[0] for pair in pairs if len(pair) == 2 and pair[0] == pair[1].lstrip("*")}


def _push_one(link: Link, store: PurePosixPath, source: Path, digest: str) -> None:
    # Of this user on this machine, so that what another sends at the same time is never mixed in.
    part = store / f"{digest}.{_this_client()}.part"
    # From its standard input: sha256sum writes an odd file name in a form of its own. All are made executable: beside
    # the program and the libraries there is only data that nobody starts.
    keep = f"chmod 755 {quoted([part])} && {quoted(['mv', '-f', part, store / digest])}"
    script = f'sum=$(sha256sum < {quoted([part])}) && if [ "${{sum%% *}}" = {digest} ]; then {keep}; '
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


class Scratch:
    """A folder on the device for one session's inputs and outputs, and programs run on them."""

    def __init__(self, link: Link) -> None:
        top = f"find {quoted([link.root])} -mindepth 1 -maxdepth 1"
        remove = "-exec rm -rf '{}' + 2>/dev/null"
        old = f"{top} -name 'run.*' -mtime +1 {remove}; {top} ! -name files -mtime +30 {remove}; "
        old += f"find {quoted([link.root / 'files'])} -type f -mtime +30 {remove}"
        made = ask(link, f"{old}; {quoted(['mktemp', '-d', link.root / 'run.XXXXXX'])}").decode("utf-8", "replace")
        self.folder = PurePosixPath(made.rstrip("\n"))
        if self.folder.parent != link.root or not self.folder.name.startswith("run."):
            raise EngineError(f"{link.name}: mktemp there made {str(self.folder)!r}, not a folder in {link.root}")
        self._link = link
        self._sent = b""
        self._closed = False
        self._inference_s = time_limit.SLOWEST_INFERENCE_S

    def execute(
        self, words: Sequence[str], images: bytes | None, result: bool, inferences: int
    ) -> tuple[subprocess.CompletedProcess[str], bytes]:
        """``Execute`` on the device. Raises EngineError where it cannot be reached or does not answer in time."""
        if self._closed:
            raise EngineError(f"{self._link.name}: the engine is closed")
        source, target = self.folder / "input.bin", self.folder / "output.bin"
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            if images is not None:
                self._send(images, source, Path(name) / "input.bin")
            command = [*words, *([source] if images is not None else []), *([target] if result else [])]
            began = time.monotonic()
            done = self._link.shell(quoted(command), time_limit.COMMAND_S + inferences * self._inference_s)
            if inferences and done.returncode == 0:
                self._inference_s = time_limit.SLOWDOWN * (time.monotonic() - began) / inferences
            text = [stream.decode("utf-8", "replace") for stream in (done.stdout, done.stderr)]
            data = b""
            if result and done.returncode == 0:
                fetched = Path(name) / "output.bin"
                self._link.fetch(target, fetched)
                data = fetched.read_bytes()
        return subprocess.CompletedProcess(done.args, done.returncode, *text), data

    def _send(self, images: bytes, source: PurePosixPath, file: Path) -> None:
        digest = hashlib.sha256(images).digest()
        if digest == self._sent:  # the same image is timed many times
            return
        file.write_bytes(images)
        self._sent = b""
        ask(self._link, quoted(["rm", "-f", source]))
        self._link.send(file, source)
        self._sent = digest

    def close(self) -> None:
        """Removes the folder from the device; what is kept by contents stays. Where the device is gone, it is left."""
        if not self._closed:
            self._closed = True
            with suppress(EngineError):
                self._link.shell(quoted(["rm", "-rf", self.folder]), time_limit.LAST_COMMAND_S)


# In one command: a device that hangs is noticed after a few, and little lies there.
IMAGES_AT_ONCE = 32


def _in_pieces(run: Callable[[Array], Array], x: Array, batch: int) -> Array:
    """What ``run`` makes of (B, H, W, C) images, some whole batches at a time."""
    size = max(1, IMAGES_AT_ONCE // batch) * batch
    return np.concatenate([run(x[start : start + size]) for start in range(0, len(x), size)])


class RemoteNativeEngine(NativeProgramEngine):
    """xceptile-run on a device with ``files`` (as for ``push``), of which ``program`` and ``plan`` name two.

    Raises EngineError where the device cannot be reached or the program fails.
    """

    def __init__(
        self,
        link: Link,
        files: Mapping[str, tuple[Path, str]],
        program: str,
        plan: str,
        threads: int | None = None,
        cores: str | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        folder = push(link, files)
        directory = folder / PurePosixPath(plan).parent
        self._scratch = Scratch(link)
        try:
            command = (str(folder / program), *options)
            super().__init__(command, directory, threads, cores=cores, execute=self._scratch.execute)
        except BaseException:
            self.close()
            raise

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        return _in_pieces(super().run, x, self._input.shape[0])

    def close(self) -> None:
        """Removes this session's files from the device."""
        self._scratch.close()


def open_native(
    bundle: Bundle,
    artefact: Artefact,
    link: Link,
    threads: int | None = None,
    cores: str | None = None,
    options: tuple[str, ...] = (),
) -> RemoteNativeEngine:
    """A bundle's native artefact on a device: only what that needs goes there. Raises EngineError."""
    # Of several artefacts, those after the first may leave the program to it.
    names = (*artefact.files, *(name for name in bundle.manifest.files if name.startswith(f"{NATIVE}/")))
    program = next(name for name in names if PurePosixPath(name).name == PROGRAM)
    plan = min((name for name in artefact.files if PurePosixPath(name).name == "plan.bin"), key=len)
    golden = (GOLDEN_INPUT, GOLDEN_OUTPUT, GOLDEN_TOLERANCE)
    # A GPU's artefact has the runtime for the machine that compiled it, too.
    needed = {program, *(name for name in artefact.files if not name.startswith(f"{REHEARSAL}/"))}
    files = _with_digests(bundle, needed | {name for name in golden if name in bundle.manifest.files})
    return RemoteNativeEngine(link, files, program, plan, threads, cores, options)


# argv: model, threads, repeats, warmup, the file of images, the file to write; repeats 0: no timing.
_LITERT = """
import json, sys, time
import numpy as np
from ai_edge_litert.interpreter import Interpreter
model, threads, repeats, warmup, source = sys.argv[1:6]
interpreter = Interpreter(model_path=model, num_threads=int(threads))
interpreter.allocate_tensors()
detail, out = interpreter.get_input_details()[0], interpreter.get_output_details()[0]["index"]
images = np.fromfile(source, detail["dtype"]).reshape(-1, *detail["shape"])
if int(repeats):
    interpreter.set_tensor(detail["index"], images[0])
    samples_ms = []
    for _ in range(int(warmup) + int(repeats)):
        start = time.perf_counter()
        interpreter.invoke()
        samples_ms.append((time.perf_counter() - start) * 1e3)
    print(json.dumps(samples_ms[int(warmup):]))
else:
    results = []
    for image in images:
        interpreter.set_tensor(detail["index"], image)
        interpreter.invoke()
        results.append(interpreter.get_tensor(out))
    np.concatenate(results).tofile(sys.argv[6])
"""


class RemoteLiteRtEngine:
    """A bundle's LiteRT file on a device whose python3 has numpy and ai-edge-litert. Raises EngineError otherwise."""

    name = "litert"

    def __init__(self, bundle: Bundle, artefact: Artefact, link: Link, threads: int, cores: str | None = None) -> None:
        if not has_litert(link):
            raise EngineError(
                f"{link.name}: its python3 cannot import numpy and ai_edge_litert; install them there "
                "(pip install ai-edge-litert), or run the native artefacts only"
            )
        self._model = push(link, _with_digests(bundle, artefact.files)) / artefact.files[0]
        self._start = ("taskset", "-c", cores, "python3") if cores else ("python3",)
        self._threads, self._link = threads, link
        self._dtype, self._batch = np.dtype(artefact.dtype), bundle.manifest.input.shape[0]
        self._output = bundle.manifest.output.shape
        self._scratch = Scratch(link)

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        return _in_pieces(self._run_piece, x, self._batch)

    def _run_piece(self, x: Array) -> Array:
        filled = fill_batches(x, self._batch)
        _, data = self._run(filled, 0, 0)
        shape = (len(filled), *self._output[1:])
        if len(data) != self._dtype.itemsize * math.prod(shape):
            raise EngineError(f"{self._link.name}: LiteRT gave {len(data)} bytes, not those of {shape} {self._dtype}")
        result: Array = np.frombuffer(data, self._dtype).reshape(shape)
        return result[: len(x)]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the batch ``x`` (N, H, W, C), taken on the device, in milliseconds."""
        text, _ = self._run(x, repeats, warmup)
        try:
            return [float(sample) for sample in json.loads(text)]
        except (ValueError, TypeError) as error:
            raise EngineError(
                f"{self._link.name}: LiteRT did not answer with times ({error}): {text[:80]!r}"
            ) from error

    def close(self) -> None:
        """Removes this session's files from the device."""
        self._scratch.close()

    def _run(self, x: Array, repeats: int, warmup: int) -> tuple[str, bytes]:
        numbers = (str(self._threads), str(repeats), str(warmup))
        words = (*self._start, "-c", _LITERT, str(self._model), *numbers)
        inferences = (repeats + warmup) * self._batch if repeats else len(x)
        done, data = self._scratch.execute(words, x.tobytes(), repeats == 0, inferences)
        if done.returncode:
            raise EngineError(f"{self._link.name}: LiteRT: {last_line(done)}")
        return done.stdout, data


def _with_digests(bundle: Bundle, names: Iterable[str]) -> dict[str, tuple[Path, str]]:
    """Files of a bundle for ``push``."""
    return {name: (bundle.file(name), bundle.manifest.files[name].sha256) for name in names}
