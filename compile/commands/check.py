"""`xceptile check` and `xceptile baseline`: the gate, and what it compares with."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import (
    NO_FLOAT,
    BundleArgument,
    DataOption,
    DeviceOption,
    ImagesOption,
    JsonOption,
    PublicKeyOption,
    ThreadsOption,
    bar,
    check_folder_of,
    out,
    print_json,
)

UNDECIDED = 3  # exit status
# Of fewer, the least and the most are no interval of 95 %: chance puts 2 / 2^n of medians outside.
RoundsOption = Annotated[int, typer.Option(min=6, help="Turns each artefact takes, at least.")]


def baseline(
    bundle: BundleArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The baseline file: gets this target's and device's beside others.")],
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    rounds: RoundsOption = 20,
    public_key: PublicKeyOption = None,
) -> None:
    """Record a bundle's accuracy, latency, size and memory as the baseline that `check` compares with."""
    from ...runtime.baseline import save_baseline
    from ...runtime.bundle import open_bundle
    from ...runtime.gate_run import Run, measure

    check_folder_of(output)
    opened = open_bundle(bundle, public_key)
    with bar() as progress:
        report = measure(opened, Run(data, device, threads, images, rounds), progress=progress)
    save_baseline(report, output)
    out.print(f"{output}: holds {report.target} on {report.device}", soft_wrap=True)
    if report.latencies and not any(latency.is_float for latency in report.latencies):
        out.print(f"{NO_FLOAT} Without it `check` judges int8's own time only.", soft_wrap=True)


def check(
    bundle: BundleArgument,
    baseline: Annotated[Path, typer.Option(help="A file that `xceptile baseline` wrote.")],
    data: DataOption,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    rounds: RoundsOption = 20,
    max_drop: Annotated[
        float, typer.Option(min=0, help="Allowed loss of top-1, in points: 1 is one percent of the images.")
    ] = 0.5,
    max_latency: Annotated[
        float, typer.Option(min=0, help="Allowed growth of int8 / float latency, as a ratio.")
    ] = 1.05,
    max_slowdown: Annotated[
        float, typer.Option(min=0, help="Allowed growth of int8 latency on the baseline's machine, as a ratio.")
    ] = 1.10,
    max_size: Annotated[float, typer.Option(min=0, help="Allowed growth of an artefact, as a ratio.")] = 1.02,
    max_memory: Annotated[float, typer.Option(min=0, help="Allowed growth of the memory held, as a ratio.")] = 1.05,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Gate: compares with the baseline. Exit status 0 pass, 1 fail, 3 where the figures do not decide."""
    from ...runtime.baseline import load_baseline
    from ...runtime.bundle import open_bundle
    from ...runtime.gate_run import Run, baseline_command, measure
    from ...runtime.session import place
    from ...runtime.verdict import FAIL, INCONCLUSIVE, Budget, judge

    opened = open_bundle(bundle, public_key)
    run = Run(data, device, threads, images, rounds)
    target = opened.manifest.target
    before = load_baseline(baseline, target.name, place(target, device).device, baseline_command(bundle, run, baseline))
    with bar() as progress:
        report = measure(opened, run, progress=progress)
    budget = Budget(max_drop, max_latency, max_slowdown, max_size, max_memory)
    verdict = judge(report, before, budget)
    if as_json:
        print_json({"outcome": verdict.outcome, "findings": [asdict(finding) for finding in verdict.findings]})
    else:
        table = Table("outcome", "what", "reason", title=f"{verdict.outcome}: {bundle}", title_justify="left")
        for finding in verdict.findings:
            table.add_row(finding.outcome, finding.what, finding.reason)
        out.print(table)
        out.print(str(verdict), soft_wrap=True)
    if verdict.outcome in (FAIL, INCONCLUSIVE):
        raise typer.Exit(1 if verdict.outcome == FAIL else UNDECIDED)
