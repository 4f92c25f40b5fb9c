"""`xceptile check` and `xceptile baseline`: the gate, and what it compares with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .common import (
    BundleArgument,
    DataOption,
    DeviceOption,
    ImagesOption,
    JsonOption,
    ThreadsOption,
    bar,
    labelled,
    out,
    print_json,
)


def _report(bundle: Any, data: str, images: int | None, device: str | None, threads: int | None, rounds: int) -> Any:
    """Everything `check` and `baseline` look at."""
    from ...runtime.evaluate import contenders, evaluate, machine, time_bundle, versions
    from ...runtime.judge import Report

    items, count = labelled(bundle, data, images)
    judged = contenders(bundle, device=device, threads=threads)
    with bar() as progress:
        accuracies, digest = evaluate(judged, items, progress=lambda done: progress("verify", done / count))
        progress("bench", 0.0)
        latencies = time_bundle(bundle, device=device, threads=threads, rounds=rounds)
    return Report(
        target=bundle.manifest.target.name,
        bundle_sha256=bundle.sha256(),
        data=data if images is None else f"{data}, the first {images}",
        data_sha256=digest,
        machine=machine(),
        versions=versions(),
        sizes_bytes={f"{a.engine}/{a.dtype}": bundle.size_bytes(a) for a in bundle.manifest.artefacts},
        accuracies=accuracies,
        latencies=latencies,
    )


def baseline(
    bundle: BundleArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The baseline file to write.")],
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each artefact takes.")] = 20,
) -> None:
    """Record a bundle's accuracy, latency and size as the baseline that `check` compares with."""
    from ...runtime.bundle import open_bundle
    from ...runtime.judge import save_report

    save_report(_report(open_bundle(bundle), data, images, device, threads, rounds), output)
    out.print(f"{output}: written")


def check(
    bundle: BundleArgument,
    baseline: Annotated[Path, typer.Option(help="A file that `xceptile baseline` wrote.")],
    data: DataOption,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each artefact takes.")] = 20,
    max_drop: Annotated[float, typer.Option(min=0, help="Allowed loss of top-1, in points.")] = 0.5,
    max_latency: Annotated[
        float, typer.Option(min=0, help="Allowed growth of int8 / float latency, as a ratio.")
    ] = 1.05,
    max_size: Annotated[float, typer.Option(min=0, help="Allowed growth of an artefact, as a ratio.")] = 1.02,
    as_json: JsonOption = False,
) -> None:
    """Gate: exit status 1 where accuracy, latency, size or bit-exactness regressed against the baseline."""
    from ...runtime.bundle import open_bundle
    from ...runtime.judge import FAIL, Budget, judge, load_baseline

    opened = open_bundle(bundle)
    before = load_baseline(baseline, f"xceptile baseline {bundle} --data {data} --output {baseline}")
    report = _report(opened, data, images, device, threads, rounds)
    verdict = judge(report, before, Budget(max_drop, max_latency, max_size))
    if as_json:
        print_json({"outcome": verdict.outcome, "findings": [asdict(finding) for finding in verdict.findings]})
    else:
        table = Table("outcome", "what", "reason", title=f"{verdict.outcome}: {bundle}", title_justify="left")
        for finding in verdict.findings:
            table.add_row(finding.outcome, finding.what, finding.reason)
        out.print(table)
    if verdict.outcome == FAIL:
        raise SystemExit(1)
