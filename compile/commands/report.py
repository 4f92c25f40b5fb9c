"""`xceptile report`: everything about a bundle on a data set, as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import (
    BundleArgument,
    DataOption,
    DeviceOption,
    ImagesOption,
    PublicKeyOption,
    ThreadsOption,
    bar,
    check_folder_of,
    duration_s,
    out,
)


def report(
    bundle: BundleArgument,
    data: DataOption,
    output: Annotated[Path, typer.Option(help="The HTML file to write.")],
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    images: ImagesOption = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns each artefact takes, at least.")] = 20,
    sensitivity: Annotated[
        int, typer.Option(min=0, help="Measure what each layer alone does to so many of the images.", metavar="IMAGES")
    ] = 0,
    sustained: Annotated[
        str | None, typer.Option(help="Run int8 for so long, too, such as 10m: does it throttle?", metavar="TIME")
    ] = None,
    public_key: PublicKeyOption = None,
) -> None:
    """Accuracy, latency, layers, memory, confusion and flips of a bundle as one HTML file."""
    from ...runtime.bundle import open_bundle
    from ...runtime.gate_run import Run
    from ...runtime.report import write_html
    from ..report_run import measure

    check_folder_of(output)
    seconds = None if sustained is None else duration_s(sustained)
    opened = open_bundle(bundle, public_key)
    settings = Run(data, device, threads, images, rounds)
    with bar() as progress:
        run = measure(opened, settings, sensitivity_images=sensitivity, sustained_s=seconds, progress=progress)
    write_html(f"{opened.manifest.network} for {opened.manifest.target.name}", [run], output)
    out.print(f"{output}: written", soft_wrap=True)
