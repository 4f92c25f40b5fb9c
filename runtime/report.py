"""The report: one self-contained HTML file, nothing fetched from anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .judge import Report


def write_html(title: str, reports: Sequence[Report], path: Path) -> None:
    """Writes the reports' figures to ``path``, aside and renamed. Raises OSError; needs jinja2."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    text = page.get_template("report.html.j2").render(title=title, reports=reports)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
