"""Measured task sizes in place of the cost model's: how much of a convolution one task does, tried out on the device.

A size is looked up by the kernel's symbol without the size (``TaskSize.key``), so that a file of winners serves every
network that has the same layers. Each trial is a whole network whose convolutions all take their next candidate; it is
built and run in a process of its own, in turns with the network as the cost model has it, and counts only where its
outputs are the reference's bit for bit. A trial that crashes, hangs or computes something else is halved until the
candidates at fault stand alone. The file is written after every trial, and what it holds is not measured again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..calibration.recipe import QuantRecipe
from ..models import serialize
from ..models.datasets import open_dataset
from ..models.graph import Graph
from ..models.locked import locked
from ..models.zoo import Model
from ..runtime import reference
from ..runtime.session import LOCAL, QEMU, Placement, place, processors, runs_here
from ..runtime.user_cache import lock_for
from ..targets.spec import TargetSpec
from .pipeline import quantize_model
from .tuning import Trial, Tuning, TuningError, load, save

SAMPLE_IMAGES = 2
WORKER = (sys.executable, "-P", "-m", f"{__package__}.tune_worker")
BASELINE = "model"  # the folder of the network as the cost model has it

Progress = Callable[[str, float], None]


def check_device(target: TargetSpec, device: str | None) -> Placement:
    """Where the target's code is measured. Raises TuningError where that is an emulator, or the target a GPU."""
    if target.engine != "cpu":
        raise TuningError(f"{target.name} is a GPU, and task sizes are of processors: a tuning has nothing to measure")
    placement = place(target, device)
    if placement.device == QEMU:
        raise TuningError(
            f"{target.name} is only emulated here, and an emulator's time says nothing of the target's; "
            f"run `xceptile tune {target.board}` on the device"
        )
    if placement.device == LOCAL and not runs_here(target):
        raise TuningError(f"this machine cannot run code for {target.name} ({', '.join(target.features)})")
    return placement


def sample_network(model: Model, progress: Progress) -> tuple[Graph, NDArray[np.int8]]:
    """An int8 graph of the model and an image for it: a kernel's time depends on shapes, so few images will do."""
    data = open_dataset(f"drawn:calibration:{SAMPLE_IMAGES}")
    images = (data.load(item, model.input_spec) for item in data.items)
    recipe = QuantRecipe("tune", equalize=False)
    network = quantize_model(model, images, recipe, image_count=SAMPLE_IMAGES, progress=progress)
    return network.int8_graph, network.pixels.encode(network.golden[:1])


def tune(
    graph: Graph,
    images: NDArray[np.int8],
    target: TargetSpec,
    path: Path,
    *,
    device: str | None = None,
    threads: int | None = None,
    rounds: int = 30,
    progress: Progress = lambda what, share: None,
    candidates: int = 6,
    timeout_s: float = 600.0,
    worker: Sequence[str] = WORKER,
) -> Tuning:
    """Measures every candidate that ``path`` does not hold yet, and writes the file.

    Given: an int8 graph of batch 1 and ``images`` (B, H, W, C) for it. ``candidates`` are at most tried for each key,
    each in ``rounds`` turns; ``timeout_s`` is for building and running one trial. Raises TuningError where the device
    is an emulator, the file is another target's or being measured for, or the cost model's own network does not run.
    """
    placement = check_device(target, device)
    count = threads or processors(placement)
    tuning = Tuning(target.name, target.features, count, placement.obtained)
    with _alone(path):
        if path.is_file():
            tuning = load(path)
            tuning.check_target(target)
            if (tuning.threads, tuning.obtained) != (count, placement.obtained):
                raise TuningError(
                    f"{path}: measured with {tuning.threads} threads, not {count}; ask for those, or for another file"
                )
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            serialize.save(graph, folder / "graph.safetensors")
            np.save(folder / "input.npy", images)
            np.save(folder / "expected.npy", np.concatenate([reference.run(graph, x[np.newaxis])[0] for x in images]))
            bench = _Bench(folder, target, count, rounds, timeout_s, tuple(worker), placement.device)
            progress("build the cost model's network", 0.0)
            sizes = bench.run({})
            if isinstance(sizes, str):
                raise TuningError(f"{target.name}: the network as the cost model has it does not run: {sizes}")
            model = {key: size["value"] for key, size in sizes.items()}
            tuning = _with_model(tuning, model)
            wanted = {key: task_sizes(**size)[:candidates] for key, size in sizes.items()}
            return _search(tuning, wanted, bench, path, progress)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Raises TuningError where another process measures for the same file: it would write over this one's trials."""
    try:
        with locked(lock_for(os.path.realpath(path)), wait=False):
            yield
    except BlockingIOError:
        raise TuningError(f"{path}: is being measured by another run; wait for it, or write to another file") from None


def task_sizes(value: int, total: int, step: int) -> tuple[int, ...]:
    """Candidates around ``value`` of ``total``, nearest first: other numbers of tasks, in whole blocks of ``step``."""
    tasks = -(-total // value)
    found = []
    for share in (1.0, 1.5, 0.67, 2.0, 0.5, 1.25, 0.8, 3.0):
        even = -(-total // max(1, round(tasks * share)))
        found.append(min(total, -(-even // step) * step))
    return tuple(size for size in dict.fromkeys(found) if size != value)


def _with_model(tuning: Tuning, model: Mapping[str, int]) -> Tuning:
    """Trials were measured against the cost model's choice: where that has changed, they say nothing any more."""
    stale = {key for key, value in model.items() if tuning.model.get(key, value) != value}
    trials = {key: each for key, each in tuning.trials.items() if key not in stale}
    return replace(tuning, model={**tuning.model, **model}, trials=trials, latency_ratio=None)


def _search(
    tuning: Tuning, wanted: Mapping[str, Sequence[int]], bench: _Bench, path: Path, progress: Progress
) -> Tuning:
    total = sum(map(len, wanted.values()))
    while True:
        left = {key: _untried(tuning, key, values) for key, values in wanted.items()}
        remaining = sum(map(len, left.values()))
        progress("measure task sizes", 1 - remaining / max(total, 1))
        trial = {key: values[0] for key, values in left.items() if values}
        if not trial:
            break
        tuning = _measure(tuning, trial, bench, path)
    progress("measure the winners", 0.0)
    winners = {key: value for key, value in tuning.choices.items() if key in wanted and value != tuning.model[key]}
    ratio = 1.0
    if winners:
        times = bench.run(winners)
        if isinstance(times, str):
            raise TuningError(f"the winners, each of which ran well, fail together: {times}")
        ratio = times[""]["time_ms"] / times[""]["model_ms"]
    tuning = replace(tuning, latency_ratio=ratio)
    save(tuning, path)
    progress("measure the winners", 1.0)
    return tuning


def _untried(tuning: Tuning, key: str, values: Sequence[int]) -> list[int]:
    tried = {trial.value for trial in tuning.trials.get(key, ())}
    return [value for value in values if value not in tried]


def _measure(tuning: Tuning, choices: Mapping[str, int], bench: _Bench, path: Path) -> Tuning:
    """The tuning with the trial of ``choices``, written to ``path``; a failing one is halved."""
    times = bench.run(choices)
    if isinstance(times, str) and len(choices) > 1:
        items = list(choices.items())
        for half in (items[: len(items) // 2], items[len(items) // 2 :]):
            tuning = _measure(tuning, dict(half), bench, path)
        return tuning
    trials = dict(tuning.trials)
    for key, value in choices.items():
        trial = Trial(value, failure=times) if isinstance(times, str) else Trial(value, **times[key])
        trials[key] = (*trials.get(key, ()), trial)
    tuning = replace(tuning, trials=trials)
    save(tuning, path)
    return tuning


@dataclass(frozen=True)
class _Bench:
    """Runs trials, each in a process of its own. ``folder`` holds the graph, the inputs and the reference's outputs."""

    folder: Path
    target: TargetSpec
    threads: int
    rounds: int
    timeout_s: float
    worker: tuple[str, ...]
    device: str = LOCAL

    def run(self, choices: Mapping[str, int]) -> dict[str, Any] | str:
        """Without choices: builds the cost model's network, and returns its ``TaskSize`` by key. With: the medians by
        key, and for the whole network by the key "". Or why it failed."""
        job = {"target": self.target.name, "choices": choices, "threads": self.threads, "rounds": self.rounds}
        job["device"] = self.device
        (self.folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        result = self.folder / "result.json"
        result.unlink(missing_ok=True)
        with (self.folder / "stderr").open("w+b") as stderr:
            # A file, not a pipe: a compiler that a killed trial started would hold a pipe open.
            # A session of its own: all that the trial started ends with it.
            process = subprocess.Popen(
                [*self.worker, str(self.folder)], stdout=stderr, stderr=stderr, start_new_session=True
            )
            try:
                status = process.wait(self.timeout_s)
            except subprocess.TimeoutExpired:
                return f"not done after {self.timeout_s:g} s"
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if status != 0:
                stderr.seek(0)
                lines = stderr.read().decode("utf-8", "replace").strip().splitlines()
                how = f"signal {-status}" if status < 0 else f"status {status}"
                return f"ended with {how}: {lines[-1] if lines else 'no message'}"
        values: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))
        return values
