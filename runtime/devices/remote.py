"""A bundle on a device that a shell reaches: what the device is, and the engines that run there."""

from __future__ import annotations

import functools
import json
import math
import os
import platform
import re
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from ...targets import host
from ...targets.spec import TargetSpec
from ..bundle import GOLDEN_INPUT, GOLDEN_OUTPUT, NATIVE, REHEARSAL, Artefact, Bundle
from ..engines.engine import Array, EngineError, fill_batches, last_line, times_ms
from ..engines.native_program import PROGRAM, NativeProgramEngine
from .board import MachineState, machine_state
from .link import Link, ask, quoted
from .store import Scratch

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


# ---- engines ----


# In one command: a device that hangs is noticed after a few, and little lies there.
IMAGES_AT_ONCE = 32


def _in_pieces(run: Callable[[Array], Array], x: Array, batch: int) -> Array:
    """What ``run`` makes of (B, H, W, C) images, some whole batches at a time."""
    size = max(1, IMAGES_AT_ONCE // batch) * batch
    return np.concatenate([run(x[start : start + size]) for start in range(0, len(x), size)])


class RemoteNativeEngine(NativeProgramEngine):
    """xceptile-run on a device with ``files`` (as for ``Scratch``), of which ``program`` and ``plan`` name two.

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
        self._there, self._program = link, files[program][0]
        self._scratch = Scratch(link, files)
        try:
            command = (str(self._scratch.folder / program), *options)
            directory = self._scratch.folder / PurePosixPath(plan).parent
            super().__init__(command, directory, threads, cores=cores, execute=self._execute)
        except BaseException:
            self.close()
            raise

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        return _in_pieces(super().run, x, self._input.shape[0])

    def close(self) -> None:
        """Removes this session's files from the device."""
        self._scratch.close()

    def _execute(
        self, words: Sequence[str], images: bytes | None, result_bytes: int, inferences: int
    ) -> tuple[subprocess.CompletedProcess[str], bytes]:
        done, data = self._scratch.execute(words, images, result_bytes, inferences)
        if done.returncode in (_NOT_STARTED, _NOT_FOUND):
            raise EngineError(f"{self._there.name}: {PROGRAM} cannot be started there: {self._why_not(done)}")
        return done, data

    def _why_not(self, done: subprocess.CompletedProcess[str]) -> str:
        """A shell says "not found" of a file that is there, where its loader is not."""
        loader = elf_loader(self._program.read_bytes())
        if loader and self._there.shell(f"[ -e {quoted([loader])} ]").returncode:
            return (
                f"the device has no {loader}; its system is a 32-bit one, or not GNU (Alpine, Android), and the "
                "bundle's runtime is a 64-bit GNU/Linux build"
            )
        if done.returncode == _NOT_STARTED:
            root = self._there.root
            return (
                f"{last_line(done)}; where its file system is mounted noexec, make {root} a link to a folder on another"
            )
        return last_line(done)


# A POSIX shell's statuses of a command that was found but could not be started, and of one that was not found.
_NOT_STARTED, _NOT_FOUND = 126, 127


def elf_loader(program: bytes) -> str | None:
    """The loader that a 64-bit little-endian ELF program names, such as /lib/ld-linux-aarch64.so.1, or None.

    Source: System V ABI, chapter 5, "Program Header": PT_INTERP.
    """
    if program[:6] != b"\x7fELF\x02\x01" or len(program) < 64:
        return None
    table, (size, count) = int.from_bytes(program[32:40], "little"), struct.unpack_from("<HH", program, 54)
    for at in range(table, table + size * count, max(size, 1)):
        header = program[at : at + 56]
        if len(header) == 56 and header[:4] == b"\3\0\0\0":
            offset, length = (int.from_bytes(header[i : i + 8], "little") for i in (8, 32))
            return program[offset : offset + length].rstrip(b"\0").decode("utf-8", "replace")
    return None


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
    golden = (GOLDEN_INPUT, GOLDEN_OUTPUT)
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
        self._start = ("taskset", "-c", cores, "python3") if cores else ("python3",)
        self._threads, self._link = threads, link
        self._dtype, self._batch = np.dtype(artefact.dtype), bundle.manifest.input.shape[0]
        self._output = bundle.manifest.output.shape
        self._scratch = Scratch(link, _with_digests(bundle, artefact.files))
        self._model = self._scratch.folder / artefact.files[0]

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        return _in_pieces(self._run_piece, x, self._batch)

    def _run_piece(self, x: Array) -> Array:
        filled = fill_batches(x, self._batch)
        shape = (len(filled), *self._output[1:])
        result_bytes = self._dtype.itemsize * math.prod(shape)
        _, data = self._run(filled, 0, 0, result_bytes)
        if len(data) != result_bytes:
            raise EngineError(f"{self._link.name}: LiteRT gave {len(data)} bytes, not those of {shape} {self._dtype}")
        result: Array = np.frombuffer(data, self._dtype).reshape(shape)
        return result[: len(x)]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the batch ``x`` (N, H, W, C), taken on the device, in milliseconds."""
        text, _ = self._run(x, repeats, warmup, 0)
        try:
            return times_ms(json.loads(text), repeats)
        except (ValueError, RecursionError) as error:
            raise EngineError(
                f"{self._link.name}: LiteRT did not answer with times ({error}): {text[:80]!r}"
            ) from error

    def close(self) -> None:
        """Removes this session's files from the device."""
        self._scratch.close()

    def _run(self, x: Array, repeats: int, warmup: int, result_bytes: int) -> tuple[str, bytes]:
        numbers = (str(self._threads), str(repeats), str(warmup))
        words = (*self._start, "-c", _LITERT, str(self._model), *numbers)
        inferences = (repeats + warmup) * self._batch if repeats else len(x)
        done, data = self._scratch.execute(words, x.tobytes(), result_bytes, inferences)
        if done.returncode:
            raise EngineError(f"{self._link.name}: LiteRT: {last_line(done)}")
        return done.stdout, data


def _with_digests(bundle: Bundle, names: Iterable[str]) -> dict[str, tuple[Path, str]]:
    """Files of a bundle for ``Scratch``."""
    return {name: (bundle.file(name), bundle.manifest.files[name].sha256) for name in names}
