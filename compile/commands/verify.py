"""`xceptile verify`: accuracy against float, bit-exactness against the reference."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.table import Table

from .common import (
    BundleArgument,
    DataOption,
    DeviceOption,
    EnginesOption,
    ImagesOption,
    JsonOption,
    ThreadsOption,
    bar,
    labelled,
    out,
    print_json,
)


def _accuracy_table(accuracies: Any) -> Table:
    table = Table("engine", "device", "images", "top-1 int8", "top-1 float", "agreement", "SQNR dB", "bit-exact", "how")
    for a in accuracies:
        exact = "yes" if a.bit_exact else f"NO: {a.differing_values} of {a.compared_values}"
        tops = (f"{a.top1:.2%}", f"{a.float_top1:.2%}") if a.labelled else ("no labels", "no labels")
        table.add_row(
            a.engine, a.device, str(a.images), *tops, f"{a.agreement:.2%}", f"{a.sqnr_db:.1f}", exact, a.obtained
        )
    return table


def verify(
    bundle: BundleArgument,
    data: DataOption,
    engine: EnginesOption = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    as_json: JsonOption = False,
) -> None:
    """Accuracy against float and bit-exactness against the reference; exit status 1 where an output differs."""
    from ...runtime.bundle import open_bundle
    from ...runtime.evaluate import contenders, evaluate

    opened = open_bundle(bundle)
    items, count = labelled(opened, data, images)
    judged = contenders(opened, device=device, threads=threads, engines=tuple(engine or ()), rehearsed_images=images)
    with bar() as progress:
        accuracies, _ = evaluate(judged, items, progress=lambda done: progress("verify", done / count))
    if as_json:
        print_json([asdict(a) | {"bit_exact": a.bit_exact} for a in accuracies])
    else:
        out.print(_accuracy_table(accuracies))
    if not all(a.bit_exact for a in accuracies):
        raise SystemExit(1)
