"""`xceptile tune`: measure task sizes on the device."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import DeviceOption, JsonOption, ThreadsOption, bar, check_folder_of, out, print_json


def tune(
    target: Annotated[str, typer.Argument(help="The board this is; `xceptile targets` lists them.", metavar="TARGET")],
    output: Annotated[Path, typer.Option(help="The tuning file; what it holds already is not measured again.")],
    model: Annotated[str, typer.Option(help="A checkpoint, or demo or xception; only its layers' shapes matter.")] = (
        "xception"
    ),
    input_size: Annotated[
        int | None, typer.Option(min=1, help="Input height and width, where the file has none.")
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each candidate takes.")] = 30,
    candidates: Annotated[int, typer.Option(min=1, help="Task sizes to try for each kernel, at most.")] = 6,
    as_json: JsonOption = False,
) -> None:
    """Measure the kernels' task sizes on the device, for `compile --tuning`."""
    from ...models import zoo
    from ...targets import catalog
    from ..tune import check_device, sample_network
    from ..tune import tune as measure

    check_folder_of(output)
    spec = catalog.get(target)
    check_device(spec, device)
    with bar() as progress:
        progress("load", 0.0)
        graph, images = sample_network(zoo.load(model, size=input_size), progress)
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
        print_json({"tuning": str(output), **counts, "latency_ratio": tuning.latency_ratio})
        return
    out.print(f"{output}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))
    stay = "" if (tuning.latency_ratio or 1) < 1 else ", no faster: the cost model's stay"
    out.print(f"  latency with the winners / with the cost model's choices: {tuning.latency_ratio:.3f}{stay}")
    out.print(f"  {tuning.obtained} on {tuning.threads} threads; compile with --tuning {output}")
