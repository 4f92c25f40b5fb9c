"""One run for the gates: what `check`, `baseline` and the pytest plugin measure and judge."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..models.datasets import open_dataset
from .accuracy import Accuracy, Labelled
from .bundle import Bundle
from .evaluate_engines import contenders, evaluate, machine, peak_rss_bytes, time_bundle, versions
from .latency import Latency
from .session import place
from .verdict import Report

Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class Run:
    """Where and on what a bundle is measured; ``images`` None: all of ``data``. Each artefact is timed in ``rounds``
    turns that last ``min_duration_s`` together, both at least.
    """

    data: str
    device: str | None = None
    threads: int | None = None
    images: int | None = None
    rounds: int = 20
    min_duration_s: float = 1.0


def baseline_command(bundle: Path, run: Run, output: Path) -> str:
    """What makes the baseline that a run is compared with."""
    words = ["xceptile", "baseline", str(bundle), "--data", run.data, "--output", str(output)]
    for name in ("device", "threads", "images"):
        if (value := getattr(run, name)) is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


def measure_accuracy(bundle: Bundle, run: Run, progress: Progress) -> tuple[tuple[Accuracy, ...], str]:
    """Every int8 engine on the run's images, and the data's sha256."""
    dataset = open_dataset(run.data, labels=bundle.manifest.labels)
    items, spec = dataset.items[: run.images], bundle.manifest.input_spec
    labelled = (Labelled(item.name, item.label, dataset.load(item, spec)) for item in items)
    judged = contenders(bundle, device=run.device, threads=run.threads)
    try:
        return evaluate(judged, labelled, progress=lambda done: progress("verify", done / len(items)))
    finally:
        for contender in judged:
            contender.engine.close()


def measure_latency(bundle: Bundle, run: Run, progress: Progress) -> tuple[Latency, ...]:
    """Every artefact, int8 and float, in turns; nothing on an emulator."""
    return time_bundle(
        bundle,
        device=run.device,
        threads=run.threads,
        rounds=run.rounds,
        min_duration_s=run.min_duration_s,
        progress=lambda share: progress("bench", share),
    )


def measure(
    bundle: Bundle,
    run: Run,
    *,
    accuracy: bool = True,
    latency: bool = True,
    progress: Progress = lambda what, share: None,
) -> Report:
    """A run, or only its accuracy, or only its latency with sizes and memory."""
    accuracies, digest = measure_accuracy(bundle, run, progress) if accuracy else ((), hashlib.sha256().hexdigest())
    sizes = {f"{a.engine}/{a.dtype}": bundle.size_bytes(a) for a in bundle.manifest.artefacts}
    return Report(
        target=bundle.manifest.target.name,
        bundle_sha256=bundle.sha256(),
        data=run.data if run.images is None else f"{run.data}, the first {run.images}",
        data_sha256=digest,
        machine=machine(run.device),
        versions=versions(),
        sizes_bytes=sizes,
        accuracies=accuracies,
        latencies=measure_latency(bundle, run, progress) if latency else (),
        device=place(bundle.manifest.target, run.device).device,
        memory_bytes=peak_rss_bytes(bundle, device=run.device, threads=run.threads) if latency else {},
    )
