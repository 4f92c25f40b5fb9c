"""`xceptile doctor`: what this machine can do."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table
from rich.text import Text

from .common import JsonOption, out, print_json


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine can do and, for what it cannot, what is missing."""
    from ..doctor import examine

    findings = examine()
    if as_json:
        print_json([asdict(finding) for finding in findings])
        return
    table = Table("what", "state", "detail")
    for finding in findings:
        table.add_row(finding.what, Text("ok", "green") if finding.ok else Text("missing", "yellow"), finding.detail)
    out.print(table)
