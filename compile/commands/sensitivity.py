"""`xceptile sensitivity`: which layers quantization hurts, worst first."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Column

from .common import (
    BundleArgument,
    DataOption,
    JsonOption,
    PublicKeyOption,
    bar,
    figure,
    labelled,
    out,
    print_json,
    table,
)

# Of the graph's operators, for 80 columns.
_SHORT = {"DepthwiseConv2d": "Depthwise", "FullyConnected": "Dense", "GlobalAveragePool": "Average"}


def sensitivity(
    bundle: BundleArgument,
    data: DataOption,
    images: Annotated[int, typer.Option("--images", min=1, help="Use only the first images.")] = 64,
    top: Annotated[int | None, typer.Option(min=1, help="Print only the worst layers.")] = None,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Each layer alone in int8, all others in float: what that does to the logits, worst first."""
    from ...calibration.sensitivity import measure_sensitivity
    from ...models import serialize
    from ...runtime import bundle as bundles

    opened = bundles.open_bundle(bundle, public_key)
    manifest = opened.manifest
    items, count = labelled(opened, data, images)
    with bar() as progress:
        rows = measure_sensitivity(
            serialize.load(opened.file(bundles.FLOAT_GRAPH)),
            serialize.load(opened.file(bundles.INT8_GRAPH)),
            (item.pixels for item in items),
            None if manifest.pixels.folded else manifest.input_spec,
            lambda done: progress("sensitivity", done / count),
        )[:top]
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    figures = (figure("SQNR", "dB"), figure("flips"), figure("range", "from"), figure("to"), figure("clipped"))
    shown = table(Column("layer", overflow="fold"), "kind", *figures)
    for row in rows:
        limits = (f"{row.low:.3g}", f"{row.high:.3g}")
        kind = _SHORT.get(row.kind, row.kind)
        flips = str(row.flips) if len(manifest.labels) > 1 else "-"  # of one output the largest never changes
        shown.add_row(row.path or row.name, kind, f"{row.sqnr_db:.1f}", flips, *limits, f"{row.clipped:.3%}")
    out.print(shown)
    out.print(
        f"SQNR at the logits and classes changed, of {count} images, by this layer's int8 weights, input and output "
        "alone; the range its output can hold, and the share of float values outside."
    )
