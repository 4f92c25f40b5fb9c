"""The report: one self-contained HTML file, nothing fetched from anywhere."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .judge import Report
from .layers import Profile
from .roofline import bars, roofline


def write_html(title: str, reports: Sequence[Report], path: Path, profiles: Sequence[Profile] = ()) -> None:
    """Writes the reports' figures, and ``profiles`` of measured targets, to ``path``, aside and renamed.

    Raises OSError; needs jinja2.
    """
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined)
    pictures = [(profile, roofline(profile), bars(profile)) for profile in profiles]
    text = page.get_template("report.html.j2").render(title=title, reports=reports, pictures=pictures)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
