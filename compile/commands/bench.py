"""`xceptile bench`: latency of int8 against float, or of every layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .common import BundleArgument, DeviceOption, JsonOption, ThreadsOption, bar, out, print_json


def bench(
    bundle: BundleArgument,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each artefact takes.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Inferences a turn.")] = 10,
    layers: Annotated[bool, typer.Option("--layers", help="Time per layer, from the native runtime's timers.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Latency of int8 against float on the same device, interleaved."""
    from ...runtime.bundle import FOR_OTHERS, open_bundle
    from ...runtime.engines.engine import EngineError
    from ...runtime.evaluate import machine, time_bundle
    from ...runtime.measure import MEASURED, median_ratio_interval

    opened = open_bundle(bundle)
    if layers:
        _layers(opened, device, threads, as_json)
        return
    turns = rounds * sum(a.engine not in FOR_OTHERS for a in opened.manifest.artefacts)
    with bar() as progress:
        done = [0]

        def step() -> None:
            done[0] += 1
            progress("bench", done[0] / turns)

        latencies = time_bundle(opened, device=device, threads=threads, rounds=rounds, repeats=repeats, progress=step)
    if not latencies:
        raise EngineError(
            f"{opened.manifest.target.name} is only emulated here, and an emulator's time says nothing of the "
            "target's; run `xceptile bench` on the device"
        )
    if as_json:
        print_json({"machine": machine(), "latencies": [asdict(latency) for latency in latencies]})
        return
    floats = [latency for latency in latencies if latency.dtype == "float32"]
    best = min(floats, key=lambda latency: latency.median_ms) if floats else None
    table = Table("engine", "type", "p50 ms", "p90 ms", "p99 ms", "of float's time", "threads", "device", "how")
    for x in latencies:
        share = "-"
        if best is not None and x is not best:
            ratio, low, high = median_ratio_interval(x.samples_ms, best.samples_ms)
            share = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
        times = (f"{x.percentile_ms(p):.2f}" for p in (50, 90, 99))
        table.add_row(x.engine, x.dtype, *times, share, str(x.threads), x.device, x.obtained)
    out.print(table)
    if any(latency.obtained != MEASURED for latency in latencies):
        out.print("rehearsed: an emulator's or another device's time, which says nothing of the target's.")


def _layers(bundle: Any, device: str | None, threads: int | None, as_json: bool) -> None:
    """The per-layer table of the native artefact."""
    from ...runtime.layers import profile_to_json, time_layers

    profile = time_layers(bundle, device=device, threads=threads)
    if as_json:
        print_json(profile_to_json(profile))
        return
    table = Table(Column("layer", overflow="fold"), "kind", box=None, padding=(0, 1, 0, 0), pad_edge=False)
    for title in ("ms", "share", "GMAC/s", "of\npeak", "MB", "GB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    total = profile.total
    for row in (*profile.layers, total):
        share = profile.share_of_peak(row)
        table.add_row(
            row.name,
            "" if row is total else row.kind,
            f"{row.median_ms:.4f}",
            f"{row.median_ms / total.median_ms:.1%}",
            f"{row.gmac_per_s:.1f}" if row.macs else "-",
            f"{share:.0%}" if row.macs and share is not None else "-",
            f"{row.bytes_moved / 1e6:.3f}",
            f"{row.gb_per_s:.1f}",
            end_section=row is profile.layers[-1],
        )
    out.print(table)
    if profile.roof is not None:
        out.print(
            f"This machine's peak with {profile.threads} threads: {profile.roof.gmac_per_s:.0f} GMAC/s in registers, "
            f"{profile.roof.gb_per_s:.1f} GB/s read from 30 MiB."
        )
    out.print("MB: the step's operands, each once; what moves at least. --json names each kernel.")
