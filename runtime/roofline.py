"""The roofline picture: where a profile's layers lie on logarithmic axes, and the lines they cannot pass.

S. Williams, A. Waterman, D. Patterson, "Roofline: an insightful visual performance model for multicore architectures",
Communications of the ACM 52 (2009) 4.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .layers import KINDS, LayerTime, Profile, Roof

# The drawing's units, about CSS pixels on a phone, where text of 12 is still readable.
WIDTH, HEIGHT = 420.0, 330.0
LEFT, RIGHT, TOP, BOTTOM = 48.0, 10.0, 12.0, 44.0


@dataclass(frozen=True)
class Tick:
    """A labelled grid line at ``at`` along its axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Dot:
    """A layer at x, y; ``kind`` is its number in KINDS, ``title`` what a pointer over it shows."""

    x: float
    y: float
    kind: int
    title: str


@dataclass(frozen=True)
class Roofline:
    """``roof`` is the polyline of the attainable rate: memory's slope, then the flat peak; ``ridge`` their meeting."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    roof: tuple[tuple[float, float], ...]
    ridge: tuple[float, float]
    dots: tuple[Dot, ...]
    total: Dot
    kinds: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class _Axis:
    """Logarithmic: ``low`` and ``high`` are decades, drawn at ``start`` and ``end``."""

    low: int
    high: int
    start: float
    end: float

    def place(self, value: float) -> float:
        share = (math.log10(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> tuple[Tick, ...]:
        decades = range(self.low, self.high + 1)
        return tuple(Tick(self.place(10.0**decade), f"{10.0**decade:g}") for decade in decades)


def _axis(values: Sequence[float], start: float, end: float) -> _Axis:
    low = math.floor(math.log10(min(values)))
    return _Axis(low, max(low + 1, math.ceil(math.log10(max(values)))), start, end)


def roofline(profile: Profile) -> Roofline | None:
    """The picture, or None without a roof or a layer that multiplies."""
    roof = profile.roof
    layers = [layer for layer in profile.layers if layer.macs > 0 and layer.median_ms > 0]
    if roof is None or not layers or min(roof.gmac_per_s, roof.gb_per_s) <= 0:
        return None
    balance = roof.gmac_per_s / roof.gb_per_s
    x = _axis([balance, *(layer.macs_per_byte for layer in layers)], LEFT, WIDTH - RIGHT)
    y = _axis([roof.gmac_per_s, *(layer.gmac_per_s for layer in layers)], HEIGHT - BOTTOM, TOP)

    def dot(layer: LayerTime) -> Dot:
        kind = KINDS.index(layer.kind) if layer.kind in KINDS else 0
        return Dot(x.place(layer.macs_per_byte), y.place(layer.gmac_per_s), kind, _title(layer, profile))

    dots = tuple(dot(layer) for layer in layers)
    seen = sorted({each.kind for each in dots})
    return Roofline(
        x.ticks(),
        y.ticks(),
        tuple((x.place(at), y.place(rate)) for at, rate in _corners(roof, x, y)),
        (x.place(balance), y.place(roof.gmac_per_s)),
        dots,
        dot(profile.total),
        tuple((kind, KINDS[kind]) for kind in seen),
    )


def _corners(roof: Roof, x: _Axis, y: _Axis) -> list[tuple[float, float]]:
    """(MAC/byte, GMAC/s) of the roof, from the left or lower edge of the picture to the right one."""
    first = max(10.0**x.low, 10.0**y.low / roof.gb_per_s)
    balance = roof.gmac_per_s / roof.gb_per_s
    return [(first, first * roof.gb_per_s), (balance, roof.gmac_per_s), (10.0**x.high, roof.gmac_per_s)]


def _title(layer: LayerTime, profile: Profile) -> str:
    share = profile.share_of_peak(layer)
    peak = f", {share:.0%} of peak" if share is not None else ""
    return (
        f"{layer.name}: {layer.median_ms:.3f} ms, {layer.gmac_per_s:.1f} GMAC/s{peak}, "
        f"{layer.macs_per_byte:.0f} MAC/byte"
    )


@dataclass(frozen=True)
class Bar:
    """One layer of the list: its ``share`` of the longest one's time, ``kind`` numbered as in KINDS, or one more."""

    layer: LayerTime
    kind: int
    share: float
    of_peak: float | None


def bars(profile: Profile) -> tuple[Bar, ...]:
    """The layers in the order in which they run."""
    longest = max(layer.median_ms for layer in profile.layers) or 1.0
    return tuple(
        Bar(
            layer,
            KINDS.index(layer.kind) if layer.kind in KINDS else len(KINDS),
            layer.median_ms / longest,
            profile.share_of_peak(layer) if layer.macs else None,
        )
        for layer in profile.layers
    )
