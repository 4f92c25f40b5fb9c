"""The bundle's own xceptile-run as a program: under an emulator here, through a shell on a device elsewhere."""

from __future__ import annotations

import json
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from .engine import Array, EngineError

PROGRAM = "xceptile-run"


class NativeProgramEngine:
    """Runs ``command`` (a path of xceptile-run, behind an emulator's or a shell's words) on a ``native`` folder.

    The whole batch goes through one process. Raises EngineError with the program's own message where it fails.
    """

    name = "native"

    def __init__(self, command: tuple[str, ...], directory: Path, threads: int) -> None:
        self._command = command
        self._directory = directory
        self._threads = threads
        description = json.loads(self._run("--describe"))
        self._input, self._output = _only(description["inputs"]), _only(description["outputs"])

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, one after the other -> (B, classes)."""
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            source, target = Path(name) / "input.bin", Path(name) / "output.bin"
            source.write_bytes(self._image_bytes(x))
            self._run(files=(source, target))
            shape = (len(x), *self._output["shape"][1:])
            result: Array = np.frombuffer(target.read_bytes(), np.dtype(self._output["dtype"])).reshape(shape)
            return result

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Wall time of single inferences on the image ``x`` (1, H, W, C), taken by the program itself, in ms.

        Under an emulator these are the emulator's times: to be called rehearsed.
        """
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            source = Path(name) / "input.bin"
            source.write_bytes(self._image_bytes(x))
            timing = (f"--repeat={repeats}", f"--warmup={warmup}")
            report = json.loads(self._run(*timing, files=(source,)))
        return [float(sample) for sample in report["samples_ms"]]

    def self_test(self) -> bool:
        """Whether the golden outputs beside the folder come out, byte for byte."""
        done = self._start("--self-test")
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
        shape, dtype = tuple(self._input["shape"]), self._input["dtype"]
        if x.shape[1:] != shape[1:] or str(x.dtype) != dtype:
            raise EngineError(f"native: the network takes {dtype} {shape}, not {x.dtype} {x.shape}")
        return x.tobytes()

    def _run(self, *options: str, files: tuple[Path, ...] = ()) -> str:
        done = self._start(*options, files=files)
        if done.returncode:
            raise EngineError(_reason(done))
        return done.stdout

    def _start(self, *options: str, files: tuple[Path, ...] = ()) -> subprocess.CompletedProcess[str]:
        words = (*self._command, f"--threads={self._threads}", *options, str(self._directory), *map(str, files))
        try:
            return subprocess.run(words, capture_output=True, text=True, check=False)
        except OSError as error:
            raise EngineError(f"native: cannot start {self._command[0]}: {error}") from error


def _only(tensors: list[dict[str, Any]]) -> dict[str, Any]:
    if len(tensors) != 1:
        raise EngineError(f"native: the network has {len(tensors)} inputs or outputs, not one")
    return tensors[0]


def _reason(done: subprocess.CompletedProcess[str]) -> str:
    lines = done.stderr.strip().splitlines()
    if lines:
        return f"native: {lines[-1]}"
    if done.returncode < 0:
        return f"native: {PROGRAM} was stopped by signal {-done.returncode}"
    return f"native: {PROGRAM} ended with status {done.returncode}"
