"""`xceptile report`: everything about a bundle on a data set, as one HTML page."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from .common import BundleArgument, DataOption, DeviceOption, ImagesOption, PublicKeyOption, ThreadsOption, bar, out


def report(
    bundle: BundleArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each artefact takes.")] = 20,
    sensitivity: Annotated[Path | None, typer.Option(help="Layers' sensitivities, in JSON.")] = None,
    public_key: PublicKeyOption = None,
) -> None:
    """Accuracy, latency, layers, memory, confusion and flips of a bundle as one HTML file."""
    from ...runtime.bundle import open_bundle
    from ...runtime.report import load_sensitivity, write_html
    from ..report_run import measure

    opened = open_bundle(bundle, public_key)
    layers = () if sensitivity is None else load_sensitivity(sensitivity)
    with bar() as progress:
        run = measure(opened, data, device=device, threads=threads, images=images, rounds=rounds, progress=progress)
    title = f"{opened.manifest.network} for {opened.manifest.target.name}"
    write_html(title, [dataclasses.replace(run, sensitivity=layers)], output)
    out.print(f"{output}: written")
