"""`xceptile bench`: latency of int8 against float, or of every layer."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.table import Column, Table

from .common import (
    NO_FLOAT,
    BundleArgument,
    DeviceOption,
    JsonOption,
    PublicKeyOption,
    ThreadsOption,
    bar,
    duration_s,
    figure,
    out,
    print_json,
    table,
)

_SHORT = {"depthwise + pointwise": "dw + pw"}  # of plan.STEP_KINDS, for 80 columns


def bench(
    bundle: BundleArgument,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    cores: Annotated[str | None, typer.Option(help="Processors to run on, such as 4-7 or 0,2.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each artefact takes, at least.")] = 20,
    repeats: Annotated[int, typer.Option(min=1, help="Inferences a turn, at least.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Inferences before the first turn.")] = 5,
    duration: Annotated[
        str, typer.Option(help="How long each artefact runs at least, such as 3s.", metavar="TIME")
    ] = "3s",
    sustained: Annotated[
        str | None, typer.Option(help="Run int8 alone for so long, such as 10m: does it throttle?", metavar="TIME")
    ] = None,
    engine: Annotated[str | None, typer.Option(help="With --sustained: native or litert.")] = None,
    layers: Annotated[bool, typer.Option("--layers", help="Time per layer, from the native runtime's timers.")] = False,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Latency of int8 against float on the same device, in turns; over minutes; or layer by layer."""
    from ...runtime.benchmark import bench as measure
    from ...runtime.benchmark import sustain
    from ...runtime.bundle import open_bundle

    if layers and (sustained or cores):
        raise typer.BadParameter("--layers goes without --sustained and --cores")
    if engine and not sustained:
        raise typer.BadParameter("--engine goes with --sustained; in turns every artefact is timed")
    opened = open_bundle(bundle, public_key)
    if layers:
        _layers(opened, device, threads, as_json)
        return
    if sustained:
        with bar() as progress:
            found = sustain(
                opened,
                duration_s(sustained),
                engine=engine,
                device=device,
                threads=threads,
                cores=cores,
                warmup=warmup,
                progress=lambda share: progress("bench", share),
            )
        _print_sustained(found, device, as_json)
        return
    with bar() as progress:
        seen = measure(
            opened,
            device=device,
            threads=threads,
            cores=cores,
            rounds=rounds,
            repeats=repeats,
            warmup=warmup,
            min_duration_s=duration_s(duration),
            progress=lambda share: progress("bench", share),
        )
    _print_bench(seen, device, as_json)


def _print_bench(seen: Any, device: str | None, as_json: bool) -> None:
    from ...runtime.evaluate_engines import machine
    from ...runtime.obtained import MEASURED

    if as_json:
        rows = [asdict(x) | {"of_float": seen.of_float(x)} for x in seen.latencies]
        moments, faster = [asdict(m) for m in seen.moments], seen.faster
        winner = None if faster is None else f"{faster.engine} {faster.dtype}"
        print_json({"machine": machine(device), "latencies": rows, "moments": moments, "faster": winner})
        return
    first = seen.latencies[0]
    batched = first.batch > 1
    title = f"{first.device}, {first.threads} threads, {first.obtained}"
    title += f", batches of {first.batch}" if batched else ""
    columns = ("artefact", "p50 ms", "p90 ms", "p99 ms", *(["p50 ms an image"] if batched else []), "samples")
    shown = Table(*columns, "of float's time", title=title, title_justify="left")
    for x in seen.latencies:
        ratio = seen.of_float(x)
        share = "-" if ratio is None else f"{ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}]"
        times = [f"{x.percentile_ms(p):.4g}" for p in (50, 90, 99)]
        times += [f"{x.image_ms:.4g}"] if batched else []
        shown.add_row(f"{x.engine} {x.dtype}", *times, str(len(x.samples_ms)), share)
    out.print(shown)
    for x in seen.latencies:
        if x.device != first.device:
            out.print(f"{x.engine} {x.dtype} on {x.device}", soft_wrap=True)
    if seen.float_build is None:
        out.print(NO_FLOAT)
    _print_moments(seen.moments)
    if any(latency.obtained != MEASURED for latency in seen.latencies):
        out.print("rehearsed: another device's time, which says nothing of the target's.")
    if seen.float_build is not None:
        out.print(faster_line(seen), soft_wrap=True)


def faster_line(seen: Any) -> str:
    """Which of the fastest int8 and the fastest float build is faster, or that the samples do not decide."""
    int8, base = seen.int8_build, seen.float_build
    ratio, low, high = seen.of_float(int8)
    first, second = f"{int8.engine} {int8.dtype}", f"{base.engine} {base.dtype}"
    share = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
    if seen.faster is None:
        return (
            f"Not decided: {first} takes {share} of {second}'s time, and the interval holds 1; a longer --duration "
            "narrows it."
        )
    if seen.faster is base:
        return f"Faster, {base.obtained}: {second}; {first} takes {share} of its time."
    return f"Faster, {int8.obtained}: {first}, in {share} of {second}'s time."


def _print_sustained(found: Any, device: str | None, as_json: bool) -> None:
    from ...runtime.evaluate_engines import machine

    if as_json:
        print_json({"machine": machine(device), **asdict(found), "slowdown": found.slowdown})
        return
    title = f"{found.engine} {found.dtype} on {found.device}, {found.threads} threads, {found.obtained}"
    shown = Table(
        "from s", "samples", "p50 ms", "p90 ms", "p99 ms", "clocks MHz", "hottest C", title=title, title_justify="left"
    )
    for window in found.windows:
        times = (f"{window.percentile_ms(p):.4g}" for p in (50, 90, 99))
        shown.add_row(f"{window.start_s:.1f}", str(len(window.samples_ms)), *times, *_clocks_and_heat(window.state))
    out.print(shown)
    out.print(f"The last median is {found.slowdown:.3f} times the fastest.")
    _print_moments(found.moments)


def _clocks_and_heat(state: Any) -> tuple[str, str]:
    clocks = sorted({khz // 1000 for khz in state.cpu_khz.values()})
    heat = max(state.temperatures_c.values(), default=None)
    span = "-" if not clocks else str(clocks[0]) if len(clocks) == 1 else f"{clocks[0]}-{clocks[-1]}"
    return span, "-" if heat is None else f"{heat:.1f}"


def _print_moments(moments: Any) -> None:
    """The machine before and after: governors, clocks, heat, power mode, as far as it shows them."""
    seen = {}
    for moment in (moments[0], moments[-1]):
        state = moment.state
        clocks, heat = _clocks_and_heat(state)
        parts = [f"governor {' '.join(sorted(set(state.governors.values())))}"] if state.governors else []
        parts += [f"clocks {clocks} MHz"] if state.cpu_khz else []
        parts += [f"GPU {state.gpu_hz / 1e6:.0f} MHz"] if state.gpu_hz else []
        parts += [f"hottest {heat} C"] if state.temperatures_c else []
        parts += [f"power mode {state.power_mode}"] if state.power_mode else []
        seen[moment.when] = ", ".join(parts)
    if not any(seen.values()):
        out.print("The machine shows no clocks, governors or temperatures.")
        return
    for when, text in seen.items():
        out.print(f"{when}: {text or 'no clocks, governors or temperatures to be read'}")


def _layers(bundle: Any, device: str | None, threads: int | None, as_json: bool) -> None:
    """The per-layer table of the native artefact."""
    from ...runtime.layers import profile_to_json, time_layers

    profile = time_layers(bundle, device=device, threads=threads)
    if as_json:
        print_json(profile_to_json(profile))
        return
    title = f"native int8 on {profile.device}, {profile.threads} threads, {profile.obtained}"
    titles = (("ms",), ("share",), ("GMAC/s",), ("of", "peak"), ("MB",), ("GB/s",))
    rows = table(Column("layer", overflow="fold"), "kind", *(figure(*lines) for lines in titles), title=title)
    total = profile.total
    for row in (*profile.layers, total):
        share = profile.share_of_peak(row)
        rows.add_row(
            row.name,
            "" if row is total else _SHORT.get(row.kind, row.kind),
            f"{row.median_ms:.4f}",
            f"{row.median_ms / total.median_ms:.1%}",
            f"{row.gmac_per_s:.1f}" if row.macs else "-",
            f"{share:.0%}" if row.macs and share is not None else "-",
            f"{row.bytes_moved / 1e6:.3f}",
            f"{row.gb_per_s:.1f}",
            end_section=row is profile.layers[-1],
        )
    out.print(rows)
    if profile.roof is not None:
        out.print(f"Of the {profile.roof}.")
    out.print(
        "dw + pw: a depthwise and a pointwise convolution in one step. MB: the step's operands, each once; what moves "
        "at least. --json names each kernel."
    )
