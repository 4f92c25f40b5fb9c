"""The command line: `xceptile VERB` and `compile`.

Exit status: 0 done, 1 a check found a regression or a mismatch, 2 the input or this machine will not do (one line says
what, where and what to do), 130 interrupted.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from typer.exceptions import TyperException

from .. import __version__

INTERRUPTED = 130

out = Console()
err = Console(stderr=True)

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Ship a trained Xception as INT8."
)
compile_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

BundleArgument = Annotated[Path, typer.Argument(help="A bundle directory.", metavar="BUNDLE")]
DeviceOption = Annotated[
    str | None, typer.Option(help="local or qemu; by default local where the target's code runs here, else qemu.")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads; by default all processors.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
DataOption = Annotated[
    str,
    typer.Option(
        help="Labelled images: a folder with a directory per class, a list file, ImageNet's validation folder, or "
        "drawn:val[:COUNT]."
    ),
]
EnginesOption = Annotated[
    list[str] | None,
    typer.Option(
        "--engine", help="native, litert, tflite-runtime or reference; repeatable; by default native and litert."
    ),
]
ImagesOption = Annotated[int | None, typer.Option("--images", min=1, help="Use only the first images.")]


@contextlib.contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar on standard error; yields report(what, share)."""
    columns = (TextColumn("{task.description:<44}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=err, transient=not err.is_terminal) as progress:
        tasks: dict[str, Any] = {}

        def report(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[what] = progress.add_task(what, total=1.0)
            progress.update(tasks[what], completed=share)

        yield report
        for task in tasks.values():
            progress.update(task, completed=1.0)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1, sort_keys=True))


def _recipe(name: str) -> Any:
    from ..calibration.recipe import PRESETS, recipe_from_text

    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if not path.is_file():
        raise typer.BadParameter(f"no such recipe {name!r}: neither a file nor one of {', '.join(sorted(PRESETS))}")
    return recipe_from_text(path.read_text(encoding="utf-8"))


def compile_command(
    target: Annotated[str, typer.Option(help="The board to compile for; `xceptile targets` lists them.")],
    model: Annotated[
        str,
        typer.Option(
            help="A checkpoint (.safetensors, .pth, .h5, .weights.h5, .keras, .onnx, .pt2), or demo or xception."
        ),
    ],
    calibration: Annotated[
        str, typer.Option(help="Images to calibrate on: a folder, a list file, or drawn:calibration[:COUNT].")
    ],
    output: Annotated[Path, typer.Option(help="The bundle directory to write; a bundle there is replaced.")],
    images: Annotated[int, typer.Option(min=1, help="Use at most this many calibration images.")] = 512,
    recipe: Annotated[str, typer.Option(help="A preset's name or a recipe file.")] = "default",
    backend: Annotated[list[str] | None, typer.Option(help="tvm or tflite; repeatable; by default both.")] = None,
    also: Annotated[list[str] | None, typer.Option(help="relax-vm: a standard TVM library; repeatable.")] = None,
    input_size: Annotated[
        int | None, typer.Option(min=71, help="Input height and width, where the file has none.")
    ] = None,
    tuning: Annotated[Path | None, typer.Option(help="What `xceptile tune` measured for the target.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Calibrate, quantize and compile a trained Xception for one target into a bundle."""
    from ..models import zoo
    from ..models.datasets import open_dataset
    from ..runtime.bundle import check_output, write_bundle
    from ..targets import catalog
    from .pipeline import ALSO, BACKENDS, build_bundle_files, quantize_model
    from .tune import load as load_tuning

    for names, known in ((backend or (), BACKENDS), (also or (), ALSO)):
        for name in names:
            if name not in known:
                raise typer.BadParameter(f"no such choice {name!r}; known: {', '.join(known)}")
    spec = catalog.get(target)
    check_output(output)
    settings = _recipe(recipe)
    measured = None if tuning is None else load_tuning(tuning)
    if measured is not None:
        measured.check_target(spec)
    with _bar() as progress:
        progress("load", 0.0)
        loaded = zoo.load(model, size=input_size)
        dataset = open_dataset(calibration)
        count = min(images, len(dataset))
        stream = (dataset.load(item, loaded.input_spec) for item in dataset.items[:count])
        network = quantize_model(loaded, stream, settings, image_count=count, progress=progress)
        manifest, files = build_bundle_files(
            network, spec, tuple(backend or BACKENDS), tuple(also or ()), progress, measured
        )
        bundle = write_bundle(output, manifest, files)
    sizes = {f"{a.engine} {a.dtype}": bundle.size_bytes(a) for a in bundle.manifest.artefacts}
    if as_json:
        _print_json({"bundle": str(output), "sha256": bundle.sha256(), "target": spec.name, "size_bytes": sizes})
        return
    out.print(
        f"[bold]{output}[/]: {manifest.network} for {spec.name}, calibrated on {network.table.image_count} images"
    )
    for name, size in sizes.items():
        out.print(f"  {name}: {size / 1e6:.2f} MB")


app.command("compile")(compile_command)
compile_app.command()(compile_command)


@app.command()
def run(
    bundle: BundleArgument,
    image: Annotated[list[Path], typer.Argument(help="Image files.")],
    engine: Annotated[str | None, typer.Option(help="native, litert, tflite-runtime or reference.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Classify images with a bundle."""
    from ..models.preprocess import load_image
    from ..runtime.bundle import open_bundle
    from ..runtime.session import open_session

    opened = open_bundle(bundle)
    pixels = [load_image(path, opened.manifest.input_spec) for path in image]
    with open_session(opened, engine=engine, device=device, threads=threads) as session:
        results = [session.classify(each, top) for each in pixels]
        where = {"engine": session.engine.name, "device": session.placement.device}
    if as_json:
        rows = [
            {"image": str(path), "classes": [asdict(p) for p in found]}
            for path, found in zip(image, results, strict=True)
        ]
        _print_json({**where, "results": rows})
        return
    for path, found in zip(image, results, strict=True):
        table = Table("class", "logit", title=f"{path} ({where['engine']} on {where['device']})", title_justify="left")
        for prediction in found:
            table.add_row(prediction.label, f"{prediction.logit:.3f}")
        out.print(table)


def _labelled(bundle: Any, data: str, images: int | None) -> Any:
    """The labelled images of a data set as the bundle's network takes them, lazily, and how many there are."""
    from ..models.datasets import open_dataset
    from ..runtime.measure import Labelled

    dataset = open_dataset(data, labels=bundle.manifest.labels)
    items = dataset.items[:images]
    spec = bundle.manifest.input_spec
    return (Labelled(item.name, item.label, dataset.load(item, spec)) for item in items), len(items)


def _accuracy_table(accuracies: Any) -> Table:
    table = Table("engine", "device", "images", "top-1 int8", "top-1 float", "agreement", "SQNR dB", "bit-exact", "how")
    for a in accuracies:
        exact = "yes" if a.bit_exact else f"NO: {a.differing_values} of {a.compared_values}"
        tops = (f"{a.top1:.2%}", f"{a.float_top1:.2%}") if a.labelled else ("no labels", "no labels")
        table.add_row(
            a.engine, a.device, str(a.images), *tops, f"{a.agreement:.2%}", f"{a.sqnr_db:.1f}", exact, a.obtained
        )
    return table


@app.command()
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
    from ..runtime.bundle import open_bundle
    from ..runtime.evaluate import contenders, evaluate

    opened = open_bundle(bundle)
    items, count = _labelled(opened, data, images)
    judged = contenders(opened, device=device, threads=threads, engines=tuple(engine or ()), rehearsed_images=images)
    with _bar() as progress:
        accuracies, _ = evaluate(judged, items, progress=lambda done: progress("verify", done / count))
    if as_json:
        _print_json([asdict(a) | {"bit_exact": a.bit_exact} for a in accuracies])
    else:
        out.print(_accuracy_table(accuracies))
    if not all(a.bit_exact for a in accuracies):
        raise SystemExit(1)


@app.command()
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
    from ..runtime.bundle import open_bundle
    from ..runtime.engines.engine import EngineError
    from ..runtime.evaluate import machine, time_bundle
    from ..runtime.measure import MEASURED, median_ratio_interval

    opened = open_bundle(bundle)
    if layers:
        _layers(opened, device, threads, as_json)
        return
    turns = rounds * sum(a.engine != "relax-vm" for a in opened.manifest.artefacts)
    with _bar() as progress:
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
        _print_json({"machine": machine(), "latencies": [asdict(latency) for latency in latencies]})
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
    from ..runtime.layers import profile_to_json, time_layers

    profile = time_layers(bundle, device=device, threads=threads)
    if as_json:
        _print_json(profile_to_json(profile))
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


def _report(bundle: Any, data: str, images: int | None, device: str | None, threads: int | None, rounds: int) -> Any:
    """Everything `check` and `baseline` look at."""
    from ..runtime.evaluate import contenders, evaluate, machine, time_bundle, versions
    from ..runtime.judge import Report

    items, count = _labelled(bundle, data, images)
    judged = contenders(bundle, device=device, threads=threads)
    with _bar() as progress:
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


@app.command()
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
    from ..runtime.bundle import open_bundle
    from ..runtime.judge import save_report

    save_report(_report(open_bundle(bundle), data, images, device, threads, rounds), output)
    out.print(f"{output}: written")


@app.command()
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
    from ..runtime.bundle import open_bundle
    from ..runtime.judge import FAIL, Budget, judge, load_baseline

    opened = open_bundle(bundle)
    before = load_baseline(baseline, f"xceptile baseline {bundle} --data {data} --output {baseline}")
    report = _report(opened, data, images, device, threads, rounds)
    verdict = judge(report, before, Budget(max_drop, max_latency, max_size))
    if as_json:
        _print_json({"outcome": verdict.outcome, "findings": [asdict(finding) for finding in verdict.findings]})
    else:
        table = Table("outcome", "what", "reason", title=f"{verdict.outcome}: {bundle}", title_justify="left")
        for finding in verdict.findings:
            table.add_row(finding.outcome, finding.what, finding.reason)
        out.print(table)
    if verdict.outcome == FAIL:
        raise SystemExit(1)


@app.command()
def targets(as_json: JsonOption = False) -> None:
    """List the targets."""
    from ..targets import catalog

    rows = catalog.all_targets()
    if as_json:
        _print_json([asdict(row) for row in rows])
        return
    table = Table(Column("target", no_wrap=True), "also", "features", "what")
    for row in rows:
        table.add_row(row.board, ", ".join(row.aliases), " ".join(row.features), row.description)
    out.print(table)


@app.command()
def tune(
    target: Annotated[str, typer.Argument(help="The board this is; `xceptile targets` lists them.", metavar="TARGET")],
    output: Annotated[Path, typer.Option(help="The tuning file; what it holds already is not measured again.")],
    model: Annotated[str, typer.Option(help="A checkpoint, or demo or xception; only its layers' shapes matter.")] = (
        "xception"
    ),
    size: Annotated[int | None, typer.Option(min=71, help="Input height and width, where the file has none.")] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each candidate takes.")] = 30,
    candidates: Annotated[int, typer.Option(min=1, help="Task sizes to try for each kernel, at most.")] = 6,
    as_json: JsonOption = False,
) -> None:
    """Measure the kernels' task sizes on the device, for `compile --tuning`."""
    from ..models import zoo
    from ..targets import catalog
    from .tune import check_device, sample_network
    from .tune import tune as measure

    spec = catalog.get(target)
    check_device(spec, device)
    with _bar() as progress:
        progress("load", 0.0)
        graph, images = sample_network(zoo.load(model, size=size), progress)
        tuning = measure(
            graph,
            images,
            spec,
            output,
            device=device,
            threads=threads,
            rounds=rounds,
            candidates=candidates,
            progress=progress,
        )
    trials = [trial for each in tuning.trials.values() for trial in each]
    counts = {
        "kernels": len(tuning.model),
        "candidates": len(trials),
        "failed": sum(bool(trial.failure) for trial in trials),
        "changed": sum(tuning.choices[key] != value for key, value in tuning.model.items()),
    }
    if as_json:
        _print_json({"tuning": str(output), **counts, "latency_ratio": tuning.latency_ratio})
        return
    out.print(f"[bold]{output}[/]: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    out.print(f"  latency with the winners / with the cost model's choices: {tuning.latency_ratio:.3f}")
    out.print(f"  {tuning.obtained} on {tuning.threads} threads; compile with --tuning {output}")


@app.command()
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show what a bundle holds and where it comes from."""
    from ..runtime.bundle import manifest_to_json, open_bundle

    opened = open_bundle(bundle)
    manifest = opened.manifest
    if as_json:
        print(manifest_to_json(manifest), end="")
        return
    about = Table(show_header=False, title=str(bundle), title_justify="left")
    about.add_row("sha256", opened.sha256())
    about.add_row("network", f"{manifest.network}, {len(manifest.labels)} classes")
    about.add_row("target", f"{manifest.target.name} ({', '.join(manifest.target.features)})")
    about.add_row("input", f"{'x'.join(map(str, manifest.input.shape))} int8, pixel - 128")
    about.add_row("recipe", str(manifest.recipe.get("name")))
    about.add_row("calibration", f"{manifest.calibration.get('images')} images")
    for key, value in sorted(manifest.provenance.items()):
        about.add_row(key, value)
    out.print(about)
    files = Table("file", "bytes", "sha256")
    for name, entry in sorted(manifest.files.items()):
        files.add_row(name, str(entry.size_bytes), entry.sha256[:16])
    out.print(files)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can do and, for what it cannot, what is missing."""
    from .doctor import examine

    findings = examine()
    if as_json:
        _print_json([asdict(finding) for finding in findings])
        return
    table = Table("what", "state", "detail")
    for finding in findings:
        table.add_row(finding.what, "[green]ok[/]" if finding.ok else "[yellow]missing[/]", finding.detail)
    out.print(table)


def _invoke(command: typer.Typer, arguments: list[str]) -> int:
    """Runs a command line; what it raises becomes one line and an exit status."""
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if "--version" in arguments[:1]:
        print(__version__)
        return 0
    try:
        status = typer.main.get_command(command).main(args=arguments, standalone_mode=False)
        if status == INTERRUPTED:  # typer's answer to Ctrl-C
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except SystemExit as stop:
        return int(stop.code or 0)
    except (typer.Abort, KeyboardInterrupt):
        err.print("interrupted; nothing was left half-written")
        return INTERRUPTED
    except TyperException as error:
        err.print(f"Error: {error.format_message()}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except (ValueError, LookupError, RuntimeError, OSError, MemoryError) as error:
        if debug:
            traceback.print_exc()
        # Our errors carry whole sentences; a bare KeyError or an error of a library is named by its type.
        own = type(error).__module__.startswith(__package__.partition(".")[0])
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        line = " ".join((text if own else f"{type(error).__name__}: {text}").split())
        err.print("[bold red]error:[/] ", end="")
        err.print(line, markup=False, highlight=False, soft_wrap=True)
        if not own and not debug:
            err.print("(run again with --debug for the traceback)")
        return 2


def main() -> None:
    """Entry point of `xceptile`."""
    sys.exit(_invoke(app, sys.argv[1:]))


def compile_main() -> None:
    """Entry point of `compile`, the same as `xceptile compile`."""
    sys.exit(_invoke(compile_app, sys.argv[1:]))


if __name__ == "__main__":
    main()
