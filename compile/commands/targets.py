"""`xceptile targets`: what can be compiled for."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Column, Table

from .common import JsonOption, out, print_json


def targets(as_json: JsonOption = False) -> None:
    """List the targets."""
    from ...targets import catalog

    rows = catalog.all_targets()
    if as_json:
        print_json([asdict(row) for row in rows])
        return
    table = Table(Column("target", no_wrap=True), "also", "features", "what")
    for row in rows:
        table.add_row(row.board, ", ".join(row.aliases), " ".join(row.features), row.description)
    out.print(table)
