"""`xceptile estimate`: a GPU's latency by a model, where the GPU is not at hand."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Column, Table

from .common import BundleArgument, JsonOption, PublicKeyOption, out, print_json


def estimate(
    bundle: BundleArgument,
    layers: Annotated[bool, typer.Option("--layers", help="Every launch, too.")] = False,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate a GPU bundle's latency from a model of the GPU; `xceptile bench` measures it on the device."""
    from ...runtime.bundle import ESTIMATE, BundleError, open_bundle

    opened = open_bundle(bundle, public_key)
    names = [name for a in opened.manifest.artefacts for name in a.files if name.endswith(f"/{ESTIMATE}")]
    if not names:
        raise BundleError(
            f"was compiled for {opened.manifest.target.name}, a processor, and holds no estimate; `xceptile bench` "
            "measures it",
            bundle,
        )
    made = [json.loads(opened.file(name).read_text(encoding="utf-8")) for name in names]
    if as_json:
        print_json(made)
        return
    table = Table("build", "ms", "launches", "MB moved", title=f"{made[0]['gpu']}, estimated")
    for each in made:
        moved = f"{each['traffic_bytes'] / 1e6:.1f}"
        table.add_row(f"native {each['dtype']}", f"{each['latency_ms']:.3f}", str(each["launch_count"]), moved)
    out.print(table)
    best = min(made, key=lambda each: float(each["latency_ms"]))
    out.print(f"The faster by the model is {best['dtype']}. The model: {best['model']}.")
    for each in made if layers else ():
        columns = (Column("launch", overflow="fold"), "us", "bound by", "kB moved", "MMAC")
        rows = Table(*columns, title=f"native {each['dtype']}, estimated")
        for row in each["launches"]:
            moved, macs = f"{row['traffic_bytes'] / 1e3:.1f}", f"{row['macs'] / 1e6:.2f}"
            rows.add_row(row["name"], f"{row['latency_us']:.1f}", row["bound"], moved, macs)
        out.print(rows)
