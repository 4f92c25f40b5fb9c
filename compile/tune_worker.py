"""One trial of ``tune``, in a process of its own: it may crash, hang or be killed. ``tune_worker FOLDER``.

Reads FOLDER's job.json, graph.safetensors, input.npy and expected.npy; writes result.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from ..models import serialize
from ..runtime.engines.engine import Array
from ..runtime.engines.native import LIBRARY, NativeEngine
from ..targets import catalog
from .backends import native_runtime, tvm
from .tune import BASELINE

WARM_UP = 3


def main(folder: Path) -> None:
    """Builds and measures what the job says. Raises RuntimeError where an output differs from the reference's."""
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    graph, target = serialize.load(folder / "graph.safetensors"), catalog.get(job["target"])
    choices: dict[str, int] = job["choices"]
    calls = tvm.lower(graph, target, choices)
    trial = folder / ("trial" if choices else BASELINE)
    trial.mkdir(exist_ok=True)
    for name, data in tvm.build_files(graph, target, choices).items():
        (trial / name).write_bytes(data)
    result: dict[str, Any]
    if choices:
        shutil.copy(folder / BASELINE / LIBRARY, trial / LIBRARY)
        keys = [call.size.key if call.size else None for call in calls]
        result = measure(folder, keys, choices, job["threads"], job["rounds"])
    else:
        (trial / LIBRARY).write_bytes(native_runtime.build(target)[LIBRARY])
        sizes = [call.size for call in calls if call.size]
        result = {size.key: {"value": size.value, "total": size.total, "step": size.step} for size in sizes}
        with NativeEngine(trial, job["threads"]) as engine:
            check(engine, folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def check(engine: NativeEngine, folder: Path) -> Array:
    """The first image, after all came out as the reference has them."""
    images: Array = np.load(folder / "input.npy")
    expected = np.load(folder / "expected.npy")
    wrong = int((engine.run(images) != expected).sum())
    if wrong:
        raise RuntimeError(f"{wrong} of {expected.size} outputs differ from the reference's")
    return images[:1]


def measure(
    folder: Path, keys: list[str | None], choices: Mapping[str, int], threads: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians over ``rounds`` turns of the trial and of the cost model's network: by key, and of all steps by ""."""
    samples: list[list[list[float]]] = [[], []]
    with ExitStack() as stack:
        engines = [
            stack.enter_context(NativeEngine(folder / name, threads, time_steps=True)) for name in ("trial", BASELINE)
        ]
        x, _ = (check(engine, folder) for engine in engines)
        for _ in range(WARM_UP + rounds):
            for engine, kept in zip(engines, samples, strict=True):
                engine.run(x)
                kept.append([step.last_ms for step in engine.steps()])
    times = [np.asarray(kept[WARM_UP:]) for kept in samples]  # (rounds, steps)
    steps = {key: [i for i, each in enumerate(keys) if each == key] for key in choices}
    steps[""] = list(range(len(keys)))
    medians = {key: [float(np.median(each[:, at].sum(axis=1))) for each in times] for key, at in steps.items()}
    return {key: {"time_ms": trial, "model_ms": model} for key, (trial, model) in medians.items()}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
