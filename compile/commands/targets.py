"""`xceptile targets`: what can be compiled for."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Column

from .common import JsonOption, out, print_json, table


def targets(as_json: JsonOption = False) -> None:
    """List the targets."""
    from ...targets import catalog

    rows = catalog.all_targets()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    shown = table(Column("target", no_wrap=True), Column("features", no_wrap=True), "what")
    for row in rows:
        names = (*row.aliases, *(family for family, name in catalog.FAMILIES.items() if name == row.name))
        also = f"; also {', '.join(names)}" if names else ""
        shown.add_row(row.board, " ".join(row.features), row.description + also)
    out.print(shown)
