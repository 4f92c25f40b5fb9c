"""LiteRT's Arm code, executed under qemu-user: what a ``.tflite`` file computes on an Arm core is rehearsed here.

The whole stack of inputs runs in one emulated process. Outputs count, time does not.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

import numpy as np

from ..devices import qemu_root
from ..devices.qemu import emulator
from .engine import Array, EngineError, last_line

# Runs in the emulated Python: argv is model, inputs, outputs, threads.
_PROGRAM = """
import sys
import numpy as np
from ai_edge_litert.interpreter import Interpreter
model, inputs, outputs, threads = sys.argv[1:]
interpreter = Interpreter(model_path=model, num_threads=int(threads))
interpreter.allocate_tensors()
source, target = interpreter.get_input_details()[0], interpreter.get_output_details()
stack = np.load(inputs)
count = len(stack)
stack = np.concatenate([stack, np.repeat(stack[-1:], -count % source["shape"][0], axis=0)])
results = [[] for _ in target]
for group in stack.reshape(-1, *source["shape"]):
    interpreter.set_tensor(source["index"], group)
    interpreter.invoke()
    for result, detail in zip(results, target):
        result.append(interpreter.get_tensor(detail["index"]))
np.savez(outputs, *[np.concatenate(result)[:count] for result in results])
"""


class LiteRtQemuEngine:
    """A ``.tflite`` file, as a path or as its bytes, under LiteRT on an emulated Arm core.

    ``cpu`` is qemu's model: ``cortex-a53``, ``cortex-a72``, ``cortex-a76``, ``neoverse-n1`` or ``max,sme=off`` (its
    SME gives wrong results). The first engine on a machine builds the root folder (see ``qemu_root``).
    Raises EngineError where qemu is missing or the folder cannot be built, with the reason.
    """

    name = "litert"

    def __init__(self, model: Path | bytes, cpu: str, threads: int = 1) -> None:
        self._emulator, self._root = emulator("aarch64"), qemu_root.ensure()
        self._cpu, self._threads = cpu, threads
        self._model = model if isinstance(model, bytes) else model.read_bytes()

    def run_all(self, x: Array) -> tuple[Array, ...]:
        """(B, H, W, C) images, batch after batch -> every output of the file, stacked likewise."""
        with tempfile.TemporaryDirectory(prefix="xceptile-") as name:
            work = Path(name)
            (work / "root").mkdir()
            qemu_root.view(self._root, work / "root", self._cpu)
            (work / "model.tflite").write_bytes(self._model)
            np.save(work / "inputs.npy", x)
            command = [self._emulator, "-cpu", self._cpu, "-L", str(work / "root")]
            command += [str(qemu_root.python(self._root)), "-s", "-c", _PROGRAM]
            files = [str(work / file) for file in ("model.tflite", "inputs.npy", "outputs.npz")]
            # Nothing of this process' environment, which is another machine's. Compiled modules are kept: most of a
            # first run's time is spent on compiling them.
            environment = {"PYTHONPATH": "/opt/litert", "PYTHONPYCACHEPREFIX": str(self._root / "pycache")}
            command += [*files, str(self._threads)]
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            if done.returncode:
                raise EngineError(
                    f"LiteRT under qemu ({self._cpu}) ended with status {done.returncode}: {last_line(done)}"
                )
            with np.load(files[2]) as outputs:
                return tuple(outputs[key] for key in outputs.files)

    def run(self, x: Array) -> Array:
        """(B, H, W, C) images, batch after batch -> (B, classes)."""
        return self.run_all(x)[0]

    def time_ms(self, x: Array, repeats: int, warmup: int) -> list[float]:
        """Always raises EngineError: an emulator's time says nothing of the core."""
        raise EngineError(f"LiteRT under qemu ({self._cpu}) is a rehearsal: its outputs count, its time does not")

    def close(self) -> None:
        """Holds nothing between runs."""
