"""A bundle's part of the report: what `xceptile report` and the demo share."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..models.datasets import Dataset, Item, open_dataset
from ..runtime.bundle import Bundle
from ..runtime.confusion import Confusion, RecordingEngine, confusion
from ..runtime.evaluate import Contender, contenders, evaluate, machine, time_bundle, versions
from ..runtime.judge import Report
from ..runtime.layers import Profile, time_layers
from ..runtime.measure import MEASURED, Accuracy, Labelled
from ..runtime.report import Run, clearest, picture_uri
from ..runtime.session import place


def recorded(judged: Sequence[Contender]) -> list[Contender]:
    """The same contenders, whose engines keep the classes of their outputs for ``assemble``."""
    return [dataclasses.replace(each, engine=RecordingEngine(each.engine)) for each in judged]


def measure(
    bundle: Bundle,
    data: str,
    *,
    device: str | None,
    threads: int | None,
    images: int | None,
    rounds: int,
    progress: Any,
) -> Run:
    """Runs the images through every int8 engine of a bundle, and the clock over all of its artefacts."""
    dataset = open_dataset(data, labels=bundle.manifest.labels)
    items = dataset.items[:images]
    spec = bundle.manifest.input_spec
    judged = recorded(contenders(bundle, device=device, threads=threads))
    stream = (Labelled(item.name, item.label, dataset.load(item, spec)) for item in items)
    accuracies, digest = evaluate(judged, stream, progress=lambda done: progress("verify", done / len(items)))
    for contender in judged:
        contender.engine.close()
    progress("bench", 0.0)
    report = Report(
        target=bundle.manifest.target.name,
        bundle_sha256=bundle.sha256(),
        data=data if images is None else f"{data}, the first {images}",
        data_sha256=digest,
        machine=machine(),
        versions=versions(),
        sizes_bytes={f"{a.engine}/{a.dtype}": bundle.size_bytes(a) for a in bundle.manifest.artefacts},
        accuracies=accuracies,
        latencies=time_bundle(bundle, device=device, threads=threads, rounds=rounds),
    )
    return assemble(bundle, report, judged, dataset, items, _profile(bundle, device, threads))


def assemble(
    bundle: Bundle,
    report: Report,
    judged: Sequence[Contender],
    dataset: Dataset,
    items: Sequence[Item],
    profile: Profile | None,
) -> Run:
    """``judged`` are the bundle's contenders, from ``recorded``, in the order of the report's accuracies; ``items`` the
    images that they were given."""
    pairs = list(zip(judged, report.accuracies, strict=True))
    return Run(
        bundle,
        report,
        profile,
        confusion=_confusion(*max(pairs, key=lambda pair: pair[1].images), items) if pairs else None,
        pictures=_pictures(bundle, report.accuracies, dataset, items),
    )


def _confusion(contender: Contender, accuracy: Accuracy, items: Sequence[Item]) -> Confusion | None:
    assert isinstance(contender.engine, RecordingEngine)
    seen = items[: accuracy.images]
    return confusion(
        accuracy.engine,
        contender.bundle.manifest.labels,
        [item.name for item in seen],
        [item.label for item in seen],
        contender.engine.predicted,
        accuracy.flips,
    )


def _pictures(
    bundle: Bundle, accuracies: Sequence[Accuracy], dataset: Dataset, items: Sequence[Item]
) -> dict[str, str]:
    """The images whose flips are shown, as the network sees them."""
    names = {flip.image for accuracy in accuracies for flip in clearest(accuracy.flips)}
    spec = bundle.manifest.input_spec
    return {item.name: picture_uri(dataset.load(item, spec)) for item in items if item.name in names}


def _profile(bundle: Bundle, device: str | None, threads: int | None) -> Profile | None:
    """Time by layer, where the bundle's target is this machine."""
    if bundle.artefact("native") is None or place(bundle.manifest.target, device).obtained != MEASURED:
        return None
    return time_layers(bundle, device=device, threads=threads)
