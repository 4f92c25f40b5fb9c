"""The bundle's own xceptile-run as a program: under an emulator here, through a shell on a device elsewhere."""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any, Self

import numpy as np

from .engine import Array, EngineError, fill_batches, times_ms

PROGRAM = "xceptile-run"

# Runs the words, with a file of ``images`` as one more word where there are any and, where a result of so many bytes is
# asked for, one for the file to write; returns how it ended and what that file holds. The last is how many images are
# computed.
Execute = Callable[[Sequence[str], bytes | None, int, int], tuple[subprocess.CompletedProcess[str], bytes]]
MOST_IMAGE_BYTES = 1 << 28  # of a tensor for one image: a description of more is none


def execute_here(
    words: Sequence[str], images: bytes | None, result_bytes: int, inferences: int
) -> tuple[subprocess.CompletedProcess[str], bytes]:
    """``Execute`` on this machine. Raises EngineError where the program cannot be started."""
    with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
        source, target = Path(name) / "input.bin", Path(name) / "output.bin"
        words = list(words)
        if images is not None:
            source.write_bytes(images)
            words.append(str(source))
        if result_bytes:
            words.append(str(target))
        try:
            done = subprocess.run(words, capture_output=True, text=True, errors="replace", check=False)
        except OSError as error:
            raise EngineError(f"native: cannot start {words[0]}: {error}") from error
        return done, target.read_bytes() if result_bytes and done.returncode == 0 else b""


def startable(program: Path) -> Path:
    """Raises EngineError where a program may not be started: an emulator would only end with status 1."""
    if not os.access(program, os.X_OK):
        raise EngineError(
            f"{program}: is not executable, which archives and CI's artefacts lose; give it back, unless its file "
            f"system is mounted noexec: {shlex.join(['chmod', '+x', str(program)])}"
        )
    return program


class NativeProgramEngine:
    """Runs ``command`` (a path of xceptile-run, behind an emulator's words) on a ``native`` folder.

    ``execute`` starts it: here, or on a device, whose paths ``command`` and ``directory`` then are. ``threads`` None:
    one for each processor there; ``cores`` are those to run on, as ``4-7`` or ``0,2``. The whole batch goes through one
    process. Raises EngineError with the program's own message where it fails.
    """

    name = "native"

    def __init__(
        self,
        command: tuple[str, ...],
        directory: PurePath,
        threads: int | None,
        *,
        cores: str | None = None,
        execute: Execute = execute_here,
    ) -> None:
        self._command = (*command, *((f"--threads={threads}",) if threads else ()))
        self._command += (f"--cores={cores}",) if cores else ()
        self._directory = directory
        self._execute = execute
        description = self._json(self._run("--describe")[0])
        self._input, self._output = _only(description, "inputs"), _only(description, "outputs")
        self._device = _printable(description.get("device", "cpu"))  # runtimes of old bundles know no other

    @property
    def device(self) -> str:
        """What computes: ``cpu``, or the GPU's name and the version of its driver."""
        return self._device

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        filled = fill_batches(x, self._input.shape[0])
        dtype, shape = self._output.dtype, (len(filled), *self._output.shape[1:])
        result_bytes = dtype.itemsize * math.prod(shape)
        images = self._image_bytes(filled)
        _, data = self._run(images=images, result_bytes=result_bytes, inferences=len(filled))
        if len(data) != result_bytes:
            raise EngineError(f"native: {PROGRAM} gave {len(data)} bytes, not those of {shape} {dtype}")
        result: Array = np.frombuffer(data, dtype).reshape(shape)
        return result[: len(x)]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the batch ``x`` (N, H, W, C), taken by the program itself, in ms.

        Under an emulator these are the emulator's times: to be called rehearsed.
        """
        report = self._timed(x, repeats, warmup)
        try:
            return times_ms(report.get("samples_ms"), repeats)
        except ValueError as error:
            raise EngineError(f"native: {PROGRAM} gave no times: {error}") from error

    def profile(self, x: Array, repeats: int, warmup: int) -> ProgramProfile:
        """What ``--layers`` prints of the batch ``x``: the samples of every step, and the roof."""
        report = self._timed(x, repeats, warmup, "--layers")
        try:
            return _profile(report, repeats)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise EngineError(f"native: {PROGRAM} gave no times of its steps: {error!r}") from error

    def peak_rss_bytes(self) -> int | None:
        """The most memory the program held for one inference; None where it cannot say."""
        held = self._json(self._run("--repeat=1", "--warmup=1")[0]).get("peak_rss_bytes", 0)
        if not isinstance(held, int) or not 0 <= held < 1 << 63:
            raise EngineError(f"native: {PROGRAM} says that it held {str(held)[:80]!r} bytes")
        return held or None

    def self_test(self) -> bool:
        """Whether the golden outputs beside the folder come out, byte for byte."""
        done, _ = self._start("--self-test")
        if done.returncode not in (0, 1):
            raise EngineError(_reason(done))
        return done.returncode == 0

    def close(self) -> None:
        """Holds nothing between runs."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _image_bytes(self, x: Array) -> bytes:
        shape, dtype = self._input.shape, self._input.dtype
        if x.shape[1:] != shape[1:] or x.dtype != dtype:
            raise EngineError(f"native: the network takes {dtype} {shape}, not {x.dtype} {x.shape}")
        return x.tobytes()

    def _timed(self, x: Array, repeats: int, warmup: int, *options: str) -> dict[str, Any]:
        timing = (f"--repeat={repeats}", f"--warmup={warmup}", *options)
        count = (repeats + warmup) * self._input.shape[0]
        return self._json(self._run(*timing, images=self._image_bytes(x), inferences=count)[0])

    def _run(
        self, *options: str, images: bytes | None = None, result_bytes: int = 0, inferences: int = 0
    ) -> tuple[str, bytes]:
        done, data = self._start(*options, images=images, result_bytes=result_bytes, inferences=inferences)
        if done.returncode:
            raise EngineError(_reason(done))
        return done.stdout, data

    def _start(
        self, *options: str, images: bytes | None = None, result_bytes: int = 0, inferences: int = 0
    ) -> tuple[subprocess.CompletedProcess[str], bytes]:
        return self._execute((*self._command, *options, str(self._directory)), images, result_bytes, inferences)

    def _json(self, text: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EngineError(f"native: {self._command[0]} did not answer in JSON ({error}): {text[:80]!r}") from error
        if not isinstance(value, dict):
            raise EngineError(f"native: {self._command[0]} answered {text[:80]!r}")
        return value


@dataclass(frozen=True)
class StepTimes:
    """A step of the plan and its times, one for each repeat; 0 where the device's clock saw none pass."""

    name: str
    kernel: str
    path: str
    macs: int
    bytes_moved: int
    samples_ms: tuple[float, ...]


@dataclass(frozen=True)
class ProgramProfile:
    """The steps in order; the machine's roof (multiply-accumulates and bytes in a nanosecond), where it was taken."""

    steps: tuple[StepTimes, ...]
    gmac_per_s: float | None
    gb_per_s: float | None


def _profile(report: dict[str, Any], repeats: int) -> ProgramProfile:
    """Raises KeyError, TypeError, ValueError, OverflowError: a device may answer anything."""
    steps = []
    for step in report["steps"]:
        name, kernel, path = (_printable(step[key]) for key in ("name", "kernel", "path"))
        macs, size = (int(step[key]) for key in ("macs", "bytes"))
        if macs < 0 or size < 1:
            raise ValueError(f"{macs} multiply-accumulates, {size} bytes")
        samples = tuple(times_ms(step["samples_ms"], repeats, zero=True))
        steps.append(StepTimes(name, kernel, path, macs, size, samples))
    if not steps:
        raise ValueError("no steps")
    roof = report.get("roof")
    if roof is None:
        return ProgramProfile(tuple(steps), None, None)
    rates = times_ms([roof["peak"]["gmac_per_s"], roof["stream"]["gb_per_s"]], 2)  # numbers above 0, as times are
    return ProgramProfile(tuple(steps), *rates)


def _printable(text: object) -> str:
    return re.sub(r"[^ -~]", "?", str(text))


@dataclass(frozen=True)
class _Tensor:
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]


def _only(description: dict[str, Any], what: str) -> _Tensor:
    """The one of the ``inputs`` or ``outputs``. Raises EngineError: a device may answer anything."""
    try:
        (tensor,) = description[what]
        shape, dtype = tuple(map(int, tensor["shape"])), str(tensor["dtype"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise EngineError(f"native: {PROGRAM} describes no network with one of {what}: {error!r}") from error
    if not shape or min(shape) < 1 or dtype not in ("int8", "float32") or math.prod(shape) > MOST_IMAGE_BYTES:
        raise EngineError(f"native: {PROGRAM} describes {what} of {str(shape)[:80]} {dtype[:80]}")
    return _Tensor(shape, np.dtype(dtype))


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    own = [index for index, line in enumerate(lines) if line.startswith(f"{PROGRAM}: ")]
    if own:  # what follows is a GPU compiler's log
        return "native: " + "\n".join(lines[own[-1] :])
    if lines:
        return f"native: {lines[-1]}"
    if done.returncode < 0:
        return f"native: {PROGRAM} was stopped by signal {-done.returncode}"
    return f"native: {PROGRAM} ended with status {done.returncode}"
