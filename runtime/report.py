"""The report: one self-contained HTML file, nothing fetched from anywhere, no script."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..models.atomic_write import write_atomically
from . import bundle as bundles
from .accuracy import TOP, Accuracy, Flip
from .benchmark import Moment, Sustained
from .bundle import Bundle
from .charts import arena, curve, histograms, size_text
from .confusion import Confusion
from .latency import Latency
from .layers import LayerTime, Profile
from .plan import Plan, unpack
from .roofline import bars, roofline
from .signature import SIGNATURE
from .statistics import mcnemar_exact
from .verdict import Report, speedup_over_float

PICTURES = 60  # flipped images shown, the clearest first
PICTURE_PIXELS = 112
SLOWEST = 15  # layers shown at once


class LayerSensitivity(Protocol):
    """What quantizing one layer alone does, as calibration/sensitivity.py measures it."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def sqnr_db(self) -> float: ...
    @property
    def flips(self) -> int: ...
    @property
    def images(self) -> int: ...
    @property
    def low(self) -> float: ...
    @property
    def high(self) -> float: ...
    @property
    def clipped(self) -> float: ...


@dataclass(frozen=True)
class Run:
    """One bundle's part of the page; ``pictures`` are data URIs by image name."""

    bundle: Bundle
    report: Report
    moments: tuple[Moment, ...] = ()
    sustained: Sustained | None = None
    profile: Profile | None = None
    sensitivity: tuple[LayerSensitivity, ...] = ()
    confusion: Confusion | None = None
    pictures: Mapping[str, str] = field(default_factory=dict)


def picture_uri(pixels: NDArray[np.uint8]) -> str:
    """(H, W, 3), or grey (H, W, 1), -> a small JPEG as a data URI; needs pillow."""
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    image.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def clearest(flips: Iterable[Flip]) -> list[Flip]:
    """The flips to show: float was surest of its class."""
    return sorted(flips, key=lambda flip: (-flip.margin, flip.image))[:PICTURES]


def write_html(title: str, runs: Sequence[Run], path: Path) -> None:
    """Writes the page of at least one run to ``path``, aside and renamed. Raises OSError; needs jinja2."""
    import jinja2

    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    page = jinja2.Environment(
        loader=folder, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    page.globals |= {"INFINITY": math.inf, "TOP": TOP}
    page.filters |= {"bytes": size_text, "percent": _percent, "number": "{:.1f}".format}
    text = page.get_template("report.html.j2").render(title=title, runs=[_view(run) for run in runs])
    # A file's name that is not UTF-8 shows its bytes.
    write_atomically(path, text.encode("utf-8", "backslashreplace"))


def _percent(share: float, digits: int = 2) -> str:
    return "-" if math.isnan(share) else f"{share * 100:.{digits}f} %"


def _view(run: Run) -> dict[str, Any]:
    """What the template shows of a run, computed."""
    plan = _plan(run.bundle)
    profile = run.profile
    times = {layer.name: layer for layer in profile.layers} if profile else {}
    return {
        "run": run,
        "report": run.report,
        "manifest": run.bundle.manifest,
        "signed": run.bundle.file(SIGNATURE).exists(),
        "cards": _cards(run.report),
        "accuracies": [(a, wilson(a.int8_correct, a.labelled), _paired(a)) for a in run.report.accuracies],
        "latencies": [(x, _ratio(run.report, x)) for x in run.report.latencies],
        "histograms": histograms(run.report.latencies),
        "moments": [(m, *_clocks_and_heat(m)) for m in _told(run.moments)],
        "sustained": run.sustained,
        "curve": curve(run.sustained) if run.sustained else None,
        "estimates": _estimates(run.bundle),
        "profile": profile,
        "roofline": roofline(profile) if profile else None,
        "bars": bars(profile) if profile else (),
        "slowest": sorted(bars(profile), key=lambda bar: -bar.layer.median_ms)[:SLOWEST] if profile else (),
        "sensitivity": [(row, _of_total(times.get(row.name), profile)) for row in run.sensitivity],
        "arena": arena(plan) if plan else None,
        "flips": [(a, clearest(a.flips)) for a in _distinct(run.report.accuracies) if a.labelled],
        "calibration": _calibration(run.bundle.manifest.calibration),
    }


def _paired(a: Accuracy) -> float | None:
    """McNemar's p-value that int8 and float are equally often right."""
    return mcnemar_exact(a.int8_only_correct, a.float_only_correct) if a.labelled else None


def _told(moments: Sequence[Moment]) -> list[Moment]:
    """Before, the hottest during, and after: those that tell anything."""
    during = sorted(moments[1:-1], key=lambda m: -max(m.state.temperatures_c.values(), default=0.0))
    told = [*moments[:1], *during[:1], *moments[1:][-1:]]
    return [m for m in told if m.state.cpu_khz or m.state.governors or m.state.temperatures_c or m.state.gpu_hz]


def _clocks_and_heat(moment: Moment) -> tuple[str, str]:
    clocks = sorted({khz // 1000 for khz in moment.state.cpu_khz.values()})
    heat = max(moment.state.temperatures_c.items(), key=lambda item: item[1], default=None)
    span = "" if not clocks else f"{clocks[0]}" if len(clocks) == 1 else f"{clocks[0]} to {clocks[-1]}"
    return span, "" if heat is None else f"{heat[1]:.1f} °C ({heat[0]})"


def _plan(bundle: Bundle) -> Plan | None:
    name = f"{bundles.NATIVE}/plan.bin"
    return unpack(bundle.file(name).read_bytes()) if bundle.holds(name) else None


def _estimates(bundle: Bundle) -> list[Any]:
    """What the bundle's cost model says of each GPU artefact."""
    names = [name for name in bundle.manifest.files if name.endswith(f"/{bundles.ESTIMATE}")]
    return [json.loads(bundle.file(name).read_bytes()) for name in sorted(names)]


def _of_total(layer: LayerTime | None, profile: Profile | None) -> float | None:
    """A layer's share of the time."""
    return layer.median_ms / profile.total.median_ms if layer and profile and profile.total.median_ms else None


def _calibration(calibration: Mapping[str, Any]) -> str:
    images = calibration.get("images")
    if not isinstance(images, Mapping):
        return str(images)
    return f"{images.get('count')} images, sha256 {images.get('sha256')}"


def _distinct(accuracies: Sequence[Accuracy]) -> list[Accuracy]:
    """One of the engines that equal the reference, which flip the same images, the one that saw most; all others."""
    exact = sorted((a for a in accuracies if a.bit_exact), key=lambda a: -a.images)
    return [*exact[:1], *(a for a in accuracies if not a.bit_exact)]


def wilson(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """The 95 % score interval of a share.

    Source: E. B. Wilson, Journal of the American Statistical Association 22 (1927) 209.
    """
    if trials == 0:
        return math.nan, math.nan
    share, weight = successes / trials, z * z / trials
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / trials + weight / (4 * trials)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def _ratio(report: Report, latency: Latency) -> tuple[float, float, float] | None:
    return speedup_over_float(report, latency.engine) if latency.dtype == "int8" else None


def _cards(report: Report) -> list[tuple[str, str, str]]:
    """The run at a glance: (what, figure, remark)."""
    cards = []
    if report.accuracies:
        best = max(report.accuracies, key=lambda a: a.images)
        if best.labelled:
            drop = (best.top1 - best.float_top1) * 100
            cards.append(("top-1 int8", _percent(best.top1), f"float {_percent(best.float_top1)}, {drop:+.2f} points"))
            cards.append(("same class as float", _percent(best.agreement), f"{best.images} images"))
        else:
            cards.append(("SQNR", f"{best.sqnr_db:.1f} dB", f"{best.images} images; no classes compared"))
        exact = sum(a.bit_exact for a in report.accuracies)
        values = sum(a.compared_values for a in report.accuracies)
        cards.append(("bit-exact", f"{exact} of {len(report.accuracies)} engines", f"{values} values compared"))
    int8 = [latency for latency in report.latencies if latency.dtype == "int8"]
    if int8:
        fastest = min(int8, key=lambda latency: latency.median_ms)
        ratio = speedup_over_float(report, fastest.engine)
        remark = f"{fastest.engine}, {fastest.obtained}" + (f"; {ratio[0]:.3f} of float's time" if ratio else "")
        cards.append(("int8 latency, p50", f"{fastest.median_ms:.2f} ms", remark))
    sizes = {name: size for name, size in report.sizes_bytes.items() if name.endswith("/int8")}
    if sizes:
        name = min(sizes, key=lambda each: sizes[each])
        cards.append(("int8 size", size_text(sizes[name]), name))
    return cards
