"""A bundle's part of the report: what `xceptile report` and the demo share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..calibration.sensitivity import LayerSensitivity, measure_sensitivity
from ..models import serialize
from ..models.datasets import Dataset, Item, open_dataset
from ..runtime import bundle as bundles
from ..runtime.accuracy import Accuracy, ImageResult, Labelled, data_sha256
from ..runtime.benchmark import Bench, Sustained, bench, sustain
from ..runtime.bundle import Bundle
from ..runtime.confusion import Confusion, confusion
from ..runtime.evaluate_engines import (
    Contender,
    accuracies,
    contenders,
    judge_images,
    keys,
    machine,
    peak_rss_bytes,
    versions,
)
from ..runtime.gate_run import Run as Settings
from ..runtime.layers import Profile, time_layers
from ..runtime.obtained import MEASURED
from ..runtime.report import Run, clearest, picture_uri
from ..runtime.session import QEMU, place
from ..runtime.verdict import Report


def measure(
    bundle: Bundle, settings: Settings, *, sensitivity_images: int, sustained_s: float | None, progress: Any
) -> Run:
    """Runs the images through every int8 engine of a bundle, and the clock over all of its artefacts and layers."""
    device, threads = settings.device, settings.threads
    dataset = open_dataset(settings.data, labels=bundle.manifest.labels)
    items = dataset.items[: settings.images]
    spec = bundle.manifest.input_spec
    judged = contenders(bundle, device=device, threads=threads)
    stream = (Labelled(item.name, item.label, dataset.load(item, spec)) for item in items)
    try:
        results = judge_images(judged, stream, progress=lambda done: progress("verify", done / len(items)))
    finally:
        for contender in judged:
            contender.engine.close()
    timed = time_artefacts(bundle, settings, progress)
    sustained = None
    if sustained_s is not None:
        sustained = sustain(
            bundle, sustained_s, device=device, threads=threads, progress=lambda share: progress("sustained", share)
        )
    name = settings.data if settings.images is None else f"{settings.data}, the first {settings.images}"
    report = report_of(bundle, judged, results, name, timed, device)
    profile = time_layers(bundle, device=device, threads=threads) if has_layers(bundle, device) else None
    layers = _measure_layers(bundle, dataset, items[:sensitivity_images], progress)
    return assemble(bundle, report, judged, results, dataset, items, timed, profile, layers, sustained)


def time_artefacts(bundle: Bundle, settings: Settings, progress: Any) -> Bench:
    """Every artefact in turns, with the machine's state; nothing on an emulator."""
    if place(bundle.manifest.target, settings.device).device == QEMU:
        return Bench((), ())
    return bench(
        bundle,
        device=settings.device,
        threads=settings.threads,
        rounds=settings.rounds,
        min_duration_s=settings.min_duration_s,
        progress=lambda share: progress(f"time {bundle.manifest.target.name}", share),
    )


def report_of(
    bundle: Bundle,
    judged: Sequence[Contender],
    results: Sequence[ImageResult],
    data: str,
    timed: Bench,
    device: str | None = None,
) -> Report:
    """The figures of one bundle, of whose contenders and perhaps others' the ``results`` are."""
    all_keys = dict(zip(map(id, judged), keys(judged), strict=True))
    mine = [all_keys[id(contender)] for contender in judged if contender.bundle is bundle]
    return Report(
        target=bundle.manifest.target.name,
        bundle_sha256=bundle.sha256(),
        data=data,
        data_sha256=data_sha256(results),
        machine=machine(device),
        versions=versions(),
        sizes_bytes={f"{a.engine}/{a.dtype}": bundle.size_bytes(a) for a in bundle.manifest.artefacts},
        accuracies=accuracies(bundle, mine, results),
        latencies=timed.latencies,
        device=place(bundle.manifest.target, device).device,
        memory_bytes=peak_rss_bytes(bundle, device=device),
    )


def assemble(
    bundle: Bundle,
    report: Report,
    judged: Sequence[Contender],
    results: Sequence[ImageResult],
    dataset: Dataset,
    items: Sequence[Item],
    timed: Bench,
    profile: Profile | None,
    sensitivity: Sequence[LayerSensitivity] = (),
    sustained: Sustained | None = None,
) -> Run:
    """Everything of one bundle, with the confusion of the contender that saw most images and the flips' pictures."""
    mine = [key for key, contender in zip(keys(judged), judged, strict=True) if contender.bundle is bundle]
    return Run(
        bundle,
        report,
        moments=timed.moments,
        sustained=sustained,
        profile=profile,
        sensitivity=tuple(sensitivity),
        confusion=_confusion(bundle, report.accuracies, mine, results),
        pictures=_pictures(bundle, report.accuracies, dataset, items),
    )


def _confusion(
    bundle: Bundle, seen: Sequence[Accuracy], names: Sequence[str], results: Sequence[ImageResult]
) -> Confusion | None:
    if not seen:
        return None
    accuracy, key = max(zip(seen, names, strict=True), key=lambda pair: pair[0].images)
    return confusion(accuracy.engine, bundle.manifest.labels, results, key)


def _pictures(bundle: Bundle, seen: Sequence[Accuracy], dataset: Dataset, items: Sequence[Item]) -> dict[str, str]:
    """The images whose flips are shown, as the network sees them."""
    names = {flip.image for accuracy in seen for flip in clearest(accuracy.flips)}
    spec = bundle.manifest.input_spec
    return {item.name: picture_uri(dataset.load(item, spec)) for item in items if item.name in names}


def has_layers(bundle: Bundle, device: str | None = None) -> bool:
    """Whether time by layer can be taken: on the target's own hardware, by the native runtime."""
    return bundle.artefact("native") is not None and place(bundle.manifest.target, device).obtained == MEASURED


def _measure_layers(
    bundle: Bundle, dataset: Dataset, items: Sequence[Item], progress: Any
) -> tuple[LayerSensitivity, ...]:
    """What each int8 layer alone does to so many images, worst first."""
    if not items:
        return ()
    spec = bundle.manifest.input_spec
    folded = bundle.manifest.pixels.folded
    return measure_sensitivity(
        serialize.load(bundle.file(bundles.FLOAT_GRAPH)),
        serialize.load(bundle.file(bundles.INT8_GRAPH)),
        (dataset.load(item, spec) for item in items),
        None if folded else spec,
        lambda done: progress("sensitivity", done / len(items)),
    )
