"""`xceptile run`: classify images."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .common import (
    BundleArgument,
    DeviceOption,
    JsonOption,
    PublicKeyOption,
    ThreadsOption,
    input_text,
    out,
    print_json,
)


def run(
    bundle: BundleArgument,
    image: Annotated[list[Path], typer.Argument(help="Image files.", metavar="IMAGE...")],
    engine: Annotated[
        str | None, typer.Option(help="native, litert, tflite-runtime or reference; by default native.")
    ] = None,
    device: DeviceOption = None,
    threads: ThreadsOption = None,
    top: Annotated[int, typer.Option(min=1, help="Classes to print.")] = 5,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Classify images with a bundle."""
    from ...models.preprocess import load_image
    from ...runtime.bundle import open_bundle
    from ...runtime.session import open_session

    opened = open_bundle(bundle, public_key)
    pixels = [load_image(path, opened.manifest.input_spec) for path in image]
    with open_session(opened, engine=engine, device=device, threads=threads) as session:
        results = [session.classify(each, top) for each in pixels]
        where = {"engine": session.engine.name, "device": session.placement.device}
    if as_json:
        rows = [
            {"image": str(path), "classes": [asdict(p) for p in found]}
            for path, found in zip(image, results, strict=True)
        ]
        print_json({**where, "input": opened.manifest.input_spec.to_json(), "results": rows})
        return
    out.print(f"input: {input_text(opened.manifest.input_spec)}", highlight=False, soft_wrap=True)
    for path, found in zip(image, results, strict=True):
        out.print(f"{path} ({where['engine']} on {where['device']})", highlight=False, soft_wrap=True)
        table = Table("class", "logit")
        for prediction in found:
            table.add_row(prediction.label, f"{prediction.logit:.3f}")
        out.print(table)
