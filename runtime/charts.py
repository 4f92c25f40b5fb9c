"""The report's pictures beside the roofline: where every mark lies, in the drawing's units. The template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .arena import Resident, live_bytes, residents
from .benchmark import Sustained
from .latency import Latency
from .plan import Plan
from .roofline import Tick

WIDTH = 420.0  # about CSS pixels on a phone, where text of 12 is still readable
BINS = 84
ROW, BARS = 48.0, 26.0  # height of a row of histograms, and of its highest bar
ARENA_HEIGHT = 260.0


@dataclass(frozen=True)
class Histogram:
    """One artefact's samples: ``path`` outlines the bars; percentiles 50, 90 and 99 at ``marks``."""

    latency: Latency
    base: float
    path: str
    marks: tuple[float, float, float]


@dataclass(frozen=True)
class Histograms:
    """Rows over one logarithmic axis of milliseconds."""

    ticks: tuple[Tick, ...]
    rows: tuple[Histogram, ...]
    height: float


def histograms(latencies: Sequence[Latency]) -> Histograms | None:
    """The distributions, or None without samples; a bar's height is its share of its row's highest."""
    rows = [each for each in latencies if each.samples_ms and min(each.samples_ms) > 0]
    if not rows:
        return None
    low = min(min(each.samples_ms) for each in rows) / 1.1
    high = max(max(each.samples_ms) for each in rows) * 1.1
    scale = (WIDTH - 20) / math.log(high / low)

    def place(ms: float) -> float:
        return 10 + math.log(ms / low) * scale

    edges = np.geomspace(low, high, BINS + 1)
    drawn = []
    for index, latency in enumerate(rows):
        counts, _ = np.histogram(latency.samples_ms, edges)
        base = ROW * (index + 1) - 2
        marks = (latency.percentile_ms(50), latency.percentile_ms(90), latency.percentile_ms(99))
        drawn.append(
            Histogram(latency, base, _outline(counts, [place(e) for e in edges], base), _three(map(place, marks)))
        )
    ticks = tuple(Tick(place(ms), f"{ms:g}") for ms in round_numbers(low, high))
    return Histograms(ticks, tuple(drawn), ROW * len(rows) + 34)


def _three(values: map[float]) -> tuple[float, float, float]:
    first, second, third = values
    return first, second, third


def _outline(counts: NDArray[np.int64], edges: Sequence[float], base: float) -> str:
    highest = max(int(counts.max()), 1)
    parts = []
    for index in np.flatnonzero(counts):
        top = base - max(1.0, BARS * int(counts[index]) / highest)
        parts.append(f"M{edges[index]:.1f} {base:.1f}V{top:.1f}H{edges[index + 1]:.1f}V{base:.1f}")
    return "".join(parts)


def round_numbers(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between two positive numbers; at least two, thinned to seven or fewer."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [m * 10.0**d for d in decades for m in (1, 2, 5) if low <= m * 10.0**d <= high]
    if len(found) < 2:
        step = 10.0 ** math.floor(math.log10(high - low))
        found = [round(n * step, 12) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return found[:: 1 + (len(found) - 1) // 7]


@dataclass(frozen=True)
class Curve:
    """A sustained run: p50 and p99 of its windows over time, and the hottest temperature where it is known."""

    p50: tuple[tuple[float, float], ...]
    p99: tuple[tuple[float, float], ...]
    heat: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    heat_ticks: tuple[Tick, ...]


def curve(sustained: Sustained) -> Curve:
    """Milliseconds from 0 at the bottom; temperatures on an axis of their own, from the coolest to the hottest."""
    left, right, top, bottom = 40.0, WIDTH - 44, 10.0, 180.0
    end_s = sustained.windows[-1].end_s
    highest = max(window.percentile_ms(99) for window in sustained.windows) * 1.1

    def x(seconds: float) -> float:
        return left + (right - left) * seconds / end_s

    def y(ms: float) -> float:
        return bottom - (bottom - top) * ms / highest

    middles = [x((window.start_s + window.end_s) / 2) for window in sustained.windows]
    hottest = [max(window.state.temperatures_c.values(), default=math.nan) for window in sustained.windows]
    known = [each for each in hottest if not math.isnan(each)]
    heat: tuple[tuple[float, float], ...] = ()
    heat_ticks: tuple[Tick, ...] = ()
    if known:
        low, high = math.floor(min(known)) - 1, math.ceil(max(known)) + 1

        def place(degrees: float) -> float:
            return bottom - (bottom - top) * (degrees - low) / (high - low)

        heat = tuple((at, place(each)) for at, each in zip(middles, hottest, strict=True) if not math.isnan(each))
        heat_ticks = tuple(Tick(place(each), f"{each:g} °C") for each in (low, high))
    seconds = [end_s * part / 4 for part in range(5)]
    return Curve(
        tuple((at, y(w.percentile_ms(50))) for at, w in zip(middles, sustained.windows, strict=True)),
        tuple((at, y(w.percentile_ms(99))) for at, w in zip(middles, sustained.windows, strict=True)),
        heat,
        tuple(Tick(x(each), f"{each:.3g} s" if end_s < 600 else f"{each / 60:.3g} min") for each in seconds),
        tuple(Tick(y(highest * part / 4), f"{highest * part / 4:.3g}") for part in range(5)),
        heat_ticks,
    )


@dataclass(frozen=True)
class Box:
    """One tensor: a rectangle over its steps and its place in the arena."""

    x: float
    y: float
    width: float
    height: float
    shade: int
    title: str


@dataclass(frozen=True)
class Arena:
    """The arena over the steps. ``alive`` is the line of the bytes that tensors need at each step."""

    boxes: tuple[Box, ...]
    alive: tuple[tuple[float, float], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    arena_bytes: int
    peak_bytes: int
    peak_step: str
    sum_bytes: int


def arena(plan: Plan) -> Arena:
    """The picture of a plan's memory."""
    left, right, top, bottom = 52.0, WIDTH - 8, 8.0, ARENA_HEIGHT - 36
    count = len(plan.steps)

    def x(step: float) -> float:
        return left + (right - left) * step / count

    def y(offset_bytes: float) -> float:
        return bottom - (bottom - top) * offset_bytes / plan.arena_bytes

    tensors = residents(plan)
    alive = live_bytes(plan)
    boxes = tuple(
        Box(
            x(each.first),
            y(each.offset_bytes + each.size_bytes),
            x(each.last + 1) - x(each.first),
            y(each.offset_bytes) - y(each.offset_bytes + each.size_bytes),
            index % 3,
            _resident_title(each),
        )
        for index, each in enumerate(tensors)
    )
    line = [point for step, size in enumerate(alive) for point in ((x(step), y(size)), (x(step + 1), y(size)))]
    peak = max(range(count), key=lambda step: alive[step])
    step_ticks = sorted({0, count // 4, count // 2, 3 * count // 4, count})
    return Arena(
        boxes,
        tuple(line),
        tuple(Tick(x(step), str(step)) for step in step_ticks),
        tuple(Tick(y(plan.arena_bytes * part / 4), size_text(plan.arena_bytes * part / 4)) for part in range(5)),
        plan.arena_bytes,
        alive[peak],
        plan.steps[peak].name,
        sum(each.size_bytes for each in tensors),
    )


def _resident_title(tensor: Resident) -> str:
    steps = f"step {tensor.first}" if tensor.first == tensor.last else f"steps {tensor.first} to {tensor.last}"
    return f"{tensor.name}: {size_text(tensor.size_bytes)} at {size_text(tensor.offset_bytes)}, {steps}"


def size_text(size_bytes: float) -> str:
    """Bytes in decimal units, three digits."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.3g} {unit}"
    return f"{size_bytes:.0f} B"
