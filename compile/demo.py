"""The main job on the trained demo network, from images to a table: what `make demo` runs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..calibration.recipe import PRESETS
from ..models import zoo
from ..models.datasets import Dataset, open_dataset
from ..runtime.accuracy import Accuracy, Labelled
from ..runtime.baseline import save_report
from ..runtime.bundle import Bundle, write_bundle
from ..runtime.evaluate_engines import contenders, judge_images
from ..runtime.gate_run import Run as Settings
from ..runtime.latency import Latency
from ..runtime.layers import time_layers
from ..runtime.report import Run, write_html
from ..targets import catalog
from .commands.common import bar, out
from .pipeline import ENGINES, build_bundle_files, quantize_model
from .report_run import assemble, has_layers, report_of, time_artefacts

TARGETS = ("host", "raspberry-pi-5")
CALIBRATION = "drawn:calibration:256"
HELD_OUT = "drawn:val:2000"
REHEARSED_IMAGES = 32  # of the held-out ones: an emulated core takes a good part of a second for each


@dataclass(frozen=True)
class Row:
    """One line of the demo's table: a target, an engine, what was seen."""

    target: str
    accuracy: Accuracy
    int8: Latency | None
    real: Latency | None
    size_bytes: int


def _compile(output: Path, progress: Any) -> list[Bundle]:
    """Quantizes the demo network once and compiles it for every target."""
    model = zoo.load("demo")
    data = open_dataset(CALIBRATION)
    images = (data.load(item, model.input_spec) for item in data.items)
    network = quantize_model(model, images, PRESETS["default"], image_count=len(data.items), progress=progress)
    bundles = []
    for name in TARGETS:
        manifest, files = build_bundle_files(network, catalog.get(name), ENGINES, (), progress)
        bundles.append(write_bundle(output / name, manifest, files))
    return bundles


def _held_out(bundle: Bundle) -> tuple[Dataset, Any]:
    data = open_dataset(HELD_OUT, labels=bundle.manifest.labels)
    spec = bundle.manifest.input_spec
    return data, (Labelled(item.name, item.label, data.load(item, spec)) for item in data.items)


def _latency(latencies: tuple[Latency, ...], engine: str, dtype: str) -> Latency | None:
    return next((each for each in latencies if (each.engine, each.dtype) == (engine, dtype)), None)


def _milliseconds(latency: Latency | None) -> str:
    return f"{latency.median_ms:.2f}" if latency else "-"


def _rows(bundles: list[Bundle], progress: Any) -> tuple[list[Row], list[Run]]:
    """Runs every artefact; one pass over the held-out images serves all bundles, which hold the same network."""
    judged = [c for bundle in bundles for c in contenders(bundle, rehearsed_images=REHEARSED_IMAGES)]
    data, images = _held_out(bundles[0])
    results = judge_images(
        judged, images, progress=lambda done: progress(f"run {len(data):,} held-out images", done / len(data))
    )
    for contender in judged:
        contender.engine.close()
    rows, runs = [], []
    for bundle in bundles:
        timed = time_artefacts(bundle, Settings(HELD_OUT), progress)
        report = report_of(bundle, judged, results, HELD_OUT, timed)
        real = _latency(timed.latencies, "litert", "float32")
        for accuracy in report.accuracies:
            int8 = _latency(timed.latencies, accuracy.engine, "int8")
            size = report.sizes_bytes[f"{accuracy.engine}/int8"]
            rows.append(Row(bundle.manifest.target.name, accuracy, int8, real, size))
        profile = time_layers(bundle) if has_layers(bundle) else None
        runs.append(assemble(bundle, report, judged, results, data, data.items, timed, profile))
    return rows, runs


def _table(rows: list[Row]) -> Table:
    table = Table(
        "target", "engine", "images", "top-1\nint8", "top-1\nfloat", "agree", "bit-\nexact", "int8\nms",
        "float\nms", "how", "int8\nMB", box=None, padding=(0, 1, 0, 0), pad_edge=False,
    )  # fmt: skip
    for row in rows:
        a = row.accuracy
        table.add_row(
            row.target.rpartition("/")[2],
            a.engine,
            str(a.images),
            f"{a.top1:.1%}",
            f"{a.float_top1:.1%}",
            f"{a.agreement:.1%}",
            "yes" if a.bit_exact else "NO",
            _milliseconds(row.int8),
            _milliseconds(row.real),
            a.obtained,
            f"{row.size_bytes / 1e6:.2f}",
        )
    return table


def main(
    output: Annotated[Path, typer.Option(help="Where the bundles and the report go.")] = Path("build/demo"),
) -> None:
    """Calibrate, quantize and compile the trained demo network for two targets; run, compare and time everything."""
    with bar() as progress:
        bundles = _compile(output, progress)
        rows, runs = _rows(bundles, progress)
    for run in runs:
        save_report(run.report, output / f"{run.report.target.replace('/', '-')}.json")
    write_html("Xceptile demo", runs, output / "report.html")
    out.print(_table(rows))
    out.print("int8 and float ms: medians of single inferences, interleaved, on all processors; float is LiteRT's.")
    out.print("rehearsed: on an emulator, on fewer images; its outputs count, its time does not and is not taken.")
    out.print(f"Bundles and report: {output}/  (open {output}/report.html)")
    if not all(row.accuracy.bit_exact for row in rows):
        raise typer.Exit(1)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(main)
    app()
