"""One trial of ``tune``, in a process of its own: it may crash, hang or be killed. ``tune_worker FOLDER``.

Reads FOLDER's job.json, graph.safetensors, input.npy and expected.npy; writes result.json.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..models import serialize
from ..runtime.bundle import sha256
from ..runtime.devices.link import connect
from ..runtime.devices.remote import RemoteNativeEngine
from ..runtime.engines.engine import Array
from ..runtime.engines.native import LIBRARY, NativeEngine
from ..runtime.engines.native_program import PROGRAM
from ..runtime.session import LOCAL
from ..targets import catalog
from .backends import cpu, native_runtime
from .tune import BASELINE

WARM_UP = 3
TURNS_THERE = 6


def main(folder: Path) -> None:
    """Builds and measures what the job says. Raises RuntimeError where an output differs from the reference's."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    graph, target = serialize.load(folder / "graph.safetensors"), catalog.get(job["target"])
    choices: dict[str, int] = job["choices"]
    calls = cpu.lower(graph, target, choices)
    trial = folder / ("trial" if choices else BASELINE)
    trial.mkdir(exist_ok=True)
    for name, data in cpu.build_files(graph, target, choices).items():
        (trial / name).write_bytes(data)
    result: dict[str, Any]
    if choices:
        for name in (LIBRARY, PROGRAM):
            shutil.copy(folder / BASELINE / name, trial / name)
        keys = [call.size.key if call.size else None for call in calls]
        result = measure(folder, keys, choices, job["threads"], job["rounds"], job["device"])
    else:
        for name, data in native_runtime.build(target).items():
            (trial / name).write_bytes(data)
        sizes = [call.size for call in calls if call.size]
        result = {size.key: {"value": size.value, "total": size.total, "step": size.step} for size in sizes}
        with _open(trial, job["threads"], job["device"]) as engine:
            check(engine, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _open(trial: Path, threads: int, device: str) -> NativeEngine | RemoteNativeEngine:
    link = connect(device)
    if link is None:
        return NativeEngine(trial, threads, time_steps=True)
    files = {f"native/{path.name}": (path, sha256(path.read_bytes())) for path in sorted(trial.iterdir())}
    return RemoteNativeEngine(link, files, f"native/{PROGRAM}", "native/plan.bin", threads)


def _steps_ms(engine: NativeEngine | RemoteNativeEngine, x: Array, repeats: int) -> list[list[float]]:
    """The times of every step, once for each of the ``repeats``: (repeats, steps)."""
    if isinstance(engine, NativeEngine):
        found = []
        for _ in range(repeats):
            engine.run(x)
            found.append([step.last_ms for step in engine.steps()])
        return found
    steps = engine.profile(x, repeats, 1).steps
    return [list(row) for row in zip(*(step.samples_ms for step in steps), strict=True)]


def check(engine: NativeEngine | RemoteNativeEngine, folder: Path) -> Array:
    """The first image, after all came out as the reference has them."""
    images: Array = np.load(folder / "input.npy")
    expected = np.load(folder / "expected.npy")
    wrong = int((engine.run(images) != expected).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {expected.size} outputs differ from the reference's")
    return images[:1]


def measure(
    folder: Path, keys: list[str | None], choices: Mapping[str, int], threads: int, rounds: int, device: str = LOCAL
) -> dict[str, dict[str, float]]:
    """Medians over ``rounds`` turns of the trial and of the cost model's network: by key, and of all steps by "".

    On a device elsewhere a turn is a process, so there are few of them, of more inferences each.
    """
    samples: list[list[list[float]]] = [[], []]
    turn = 1 if device == LOCAL else math.ceil(rounds / TURNS_THERE)
    with ExitStack() as stack:
        engines: list[NativeEngine | RemoteNativeEngine] = []
        for name in ("trial", BASELINE):
            engines.append(_open(folder / name, threads, device))
            stack.callback(engines[-1].close)
        x, _ = (check(engine, folder) for engine in engines)
        for _ in range(math.ceil((WARM_UP + rounds) / turn)):
            for engine, kept in zip(engines, samples, strict=True):
                kept += _steps_ms(engine, x, turn)
    times = [np.asarray(kept[WARM_UP:]) for kept in samples]  # (rounds, steps)
    steps = {key: [i for i, each in enumerate(keys) if each == key] for key in choices}
    steps[""] = list(range(len(keys)))
    medians = {key: [float(np.median(each[:, at].sum(axis=1))) for each in times] for key, at in steps.items()}
    return {key: {"time_ms": trial, "model_ms": model} for key, (trial, model) in medians.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
