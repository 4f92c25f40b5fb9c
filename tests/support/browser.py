"""A page in a real browser without a screen, at a given width: what it prints, fetches and how wide it gets."""

from __future__ import annotations

import html
import json
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

# Reports what matters, after the fonts and pictures are there. The page's own policy forbids scripts, so this runs in
# a copy without it; and no window is as narrow as a phone, so the copy is shown in a frame.
PROBE = """
<script>
window.addEventListener("load", () => {
  document.querySelectorAll("details").forEach(each => { each.open = true; });
  const wide = [...document.querySelectorAll("body *")].filter(
    each => each.getBoundingClientRect().right > innerWidth + 0.5 && !each.closest(".wide, nav, svg"));
  parent.document.getElementById("probe").textContent = JSON.stringify({
    inner_width: innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    too_wide: wide.map(each => each.outerHTML.slice(0, 100)),
    fetched: performance.getEntriesByType("resource").map(each => each.name).filter(each => !each.startsWith("data:")),
    broken_pictures: [...document.images].filter(each => !each.naturalWidth).map(each => each.alt),
    small_texts: [...document.querySelectorAll("svg text")].filter(
      each => each.getBoundingClientRect().height < 9).map(each => each.textContent),
  });
});
</script>
"""
POLICY = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')


@dataclass(frozen=True)
class Seen:
    """What the probe saw; ``console`` are the messages of the page as it is, its policy in force."""

    inner_width: int
    scroll_width: int
    too_wide: tuple[str, ...]
    fetched: tuple[str, ...]
    broken_pictures: tuple[str, ...]
    small_texts: tuple[str, ...]
    console: tuple[str, ...]


def chromium(page: Path, width: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Loads a page; nothing but the page makes requests."""
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
        "--disable-background-networking", "--disable-component-update", "--no-first-run", "--enable-logging=stderr",
        f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},900", *flags, page.as_uri(),
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)


def look(page: Path, width: int) -> Seen:
    """The page at this many CSS pixels."""
    printed = chromium(page, width, "--dump-dom").stderr
    console = tuple(line for line in printed.splitlines() if ":CONSOLE" in line)
    probed = page.with_name("probed.html")
    copy = POLICY.sub("", page.read_text("utf-8")).replace("</body>", PROBE + "</body>")
    frame = f'<iframe width="{width}" height="900" style="border: 0" srcdoc="{html.escape(copy)}"></iframe>'
    probed.write_text(f'<!doctype html><meta charset="utf-8"><pre id="probe"></pre>{frame}', "utf-8")
    shown = chromium(probed, width + 100, "--dump-dom").stdout
    found = re.search(r'<pre id="probe">(.*?)</pre>', shown, re.DOTALL)
    assert found is not None
    data = json.loads(html.unescape(found[1]))
    return Seen(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}, console=console
    )
