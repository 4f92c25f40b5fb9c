"""`xceptile inspect`: what a bundle holds and where it comes from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column, Table

from .common import BundleArgument, JsonOption, PublicKeyOption, out, print_json

if TYPE_CHECKING:
    from ...runtime.bundle import Bundle


def inspect(
    bundle: BundleArgument,
    public_key: PublicKeyOption = None,
    graph: Annotated[bool, typer.Option("--graph", help="Print the int8 graph, one node a line.")] = False,
    units: Annotated[bool, typer.Option("--units", help="Print what each kernel computes, one kernel a line.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print the native plan, one step a line.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a bundle holds and where it comes from."""
    from ...runtime.bundle import manifest_to_json, open_bundle

    opened = open_bundle(bundle, public_key)
    if graph or units or plan:
        for text in _as_text(opened, graph, units, plan):
            out.print(text, end="", highlight=False, soft_wrap=True)
        return
    manifest = opened.manifest
    if as_json:
        print_json(json.loads(manifest_to_json(manifest)))
        return
    about = Table(Column(), Column(overflow="fold"), show_header=False, title=str(bundle), title_justify="left")
    about.add_row("sha256", opened.sha256())
    if public_key is not None:
        about.add_row("signed", f"yes, by the private half of {public_key}")
    about.add_row("network", f"{manifest.network}, {len(manifest.labels)} classes")
    about.add_row("target", f"{manifest.target.name} ({', '.join(manifest.target.features)})")
    entered = "pixel - 128" if manifest.pixels.folded else "pixels through a table"
    about.add_row("input", f"{'x'.join(map(str, manifest.input.shape))} int8, {entered}")
    for fact, said in manifest.input_spec.described().items():
        about.add_row(f"input {fact}", said)
    about.add_row("recipe", str(manifest.recipe.get("name")))
    about.add_row("calibration", _calibration(manifest.calibration.get("images")))
    for key, value in sorted(manifest.provenance.items()):
        about.add_row(key, value)
    out.print(about)
    files = Table("file", "bytes", "sha256")
    for name, entry in sorted(manifest.files.items()):
        files.add_row(name, str(entry.size_bytes), entry.sha256[:16])
    out.print(files)


def _as_text(bundle: Bundle, graph: bool, units: bool, plan: bool) -> Iterator[str]:
    from ...models import graph_text, serialize
    from ...runtime import plan_text
    from ...runtime.bundle import INT8_GRAPH, NATIVE, BundleError
    from ...runtime.plan import unpack
    from ..dump import units_text

    if graph:
        yield graph_text.to_text(serialize.load(bundle.file(INT8_GRAPH)))
    if units:
        yield units_text(serialize.load(bundle.file(INT8_GRAPH)), bundle.manifest.target)
    if plan:
        path = bundle.file(f"{NATIVE}/plan.bin")
        if not path.is_file():
            raise BundleError("has no native artefact, and so no plan; compile it with that engine", bundle.path)
        yield plan_text.to_text(unpack(path.read_bytes()))


def _calibration(images: Any) -> str:
    return f"{images['count']} images" if isinstance(images, dict) and "count" in images else "-"
