"""`xceptile inspect`: what a bundle holds and where it comes from."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Column, Table

from .common import BundleArgument, JsonOption, PublicKeyOption, out, print_json


def inspect(bundle: BundleArgument, public_key: PublicKeyOption = None, as_json: JsonOption = False) -> None:
    """Show what a bundle holds and where it comes from."""
    from ...runtime.bundle import manifest_to_json, open_bundle

    opened = open_bundle(bundle, public_key)
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


def _calibration(images: Any) -> str:
    return f"{images['count']} images" if isinstance(images, dict) and "count" in images else "-"
