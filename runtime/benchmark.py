"""Latency with what it depends on: int8 and float in turns, or one artefact for minutes, beside clocks and heat.

What a machine does under load (a governor that wakes up late, a chip that throttles after three minutes) is half of a
latency, so the machine's state is kept from before, during and after.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .bundle import Bundle
from .devices import board, remote
from .devices.board import MachineState
from .devices.link import connect
from .engines.engine import EngineError
from .evaluate_engines import golden_input, runnable, time_bundle
from .latency import PILOT, Latency, fastest_float, interleaved_ratio
from .session import QEMU, Placement, device_name, open_engine, pinned, place, processors

BEFORE, DURING, AFTER = "before", "during", "after"
STATE_INTERVAL_S = 2.0  # between two looks at the machine while it computes
WINDOWS = 10  # the least there are of a sustained run
_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Moment:
    """The machine's state ``at_s`` seconds after the start."""

    when: str
    at_s: float
    state: MachineState


@dataclass(frozen=True)
class Bench:
    """Every artefact's samples and the machine's moments."""

    latencies: tuple[Latency, ...]
    moments: tuple[Moment, ...]

    @property
    def float_build(self) -> Latency | None:
        """The fastest float build: what int8 is held against."""
        return fastest_float(self.latencies)

    @property
    def int8_build(self) -> Latency:
        """The fastest int8 build."""
        return min((x for x in self.latencies if not x.is_float), key=lambda latency: latency.median_ms)

    @property
    def faster(self) -> Latency | None:
        """The faster of the fastest int8 and the fastest float build; None where the interval of their ratio holds 1,
        or there is no float build."""
        ratio = self.of_float(self.int8_build)
        if ratio is None or ratio[1] <= 1 <= ratio[2]:
            return None
        return self.int8_build if ratio[2] < 1 else self.float_build

    def of_float(self, latency: Latency) -> tuple[float, float, float] | None:
        """The latency as a share of the float build's, with its 95 % interval: (ratio, low, high)."""
        base = self.float_build
        return None if base is None or base is latency else interleaved_ratio(latency, base)


@dataclass(frozen=True)
class SustainedWindow:
    """A window of time in a sustained run: its samples, and the machine's state at its end."""

    start_s: float
    end_s: float
    samples_ms: tuple[float, ...]
    state: MachineState

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.samples_ms, percent))


@dataclass(frozen=True)
class Sustained:
    """One artefact without a pause. A window is a minute, or a tenth of a run of under ten minutes."""

    engine: str
    dtype: str
    device: str
    obtained: str
    threads: int
    windows: tuple[SustainedWindow, ...]
    moments: tuple[Moment, ...]

    @property
    def slowdown(self) -> float:
        """The last window's median over the fastest window's: 1 where nothing throttles."""
        medians = [window.percentile_ms(50) for window in self.windows]
        return medians[-1] / min(medians)


def parse_duration_s(text: str) -> float:
    """``90``, ``30s``, ``10m`` or ``1.5h`` in seconds. Raises ValueError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if match is None or float(match[1]) == 0:
        raise ValueError(f"{text!r} is no duration; write 30s, 10m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def _watch(placement: Placement) -> tuple[list[Moment], Callable[[str], None]]:
    """The moments seen so far, and what adds one: always before and after, in between at most every few seconds."""
    link = connect(placement.device)
    start, moments = time.monotonic(), list[Moment]()

    def look(when: str) -> None:
        now = time.monotonic() - start
        if when != DURING or now - moments[-1].at_s >= STATE_INTERVAL_S:
            moments.append(Moment(when, now, board.machine_state() if link is None else remote.state(link)))

    return moments, look


def _refuse_emulator(bundle: Bundle, placement: Placement) -> None:
    if placement.device == QEMU:
        raise EngineError(
            f"{bundle.manifest.target.name} is only emulated here, and an emulator's time says nothing of the "
            "target's; run `xceptile bench` on the device"
        )


def bench(
    bundle: Bundle,
    *,
    device: str | None = None,
    threads: int | None = None,
    cores: str | None = None,
    rounds: int = 20,
    repeats: int = 10,
    warmup: int = 5,
    min_duration_s: float = 3.0,
    progress: Callable[[float], None] = lambda share: None,
) -> Bench:
    """Times every artefact in turns (``time_bundle``) and watches the machine. Raises EngineError on an emulator."""
    placement = place(bundle.manifest.target, device)
    _refuse_emulator(bundle, placement)
    moments, look = _watch(placement)
    look(BEFORE)

    def step(share: float) -> None:
        look(DURING)
        progress(share)

    latencies = time_bundle(
        bundle,
        device=device,
        threads=threads,
        cores=cores,
        rounds=rounds,
        repeats=repeats,
        warmup=warmup,
        min_duration_s=min_duration_s,
        progress=step,
    )
    look(AFTER)
    return Bench(latencies, tuple(moments))


def sustain(
    bundle: Bundle,
    duration_s: float,
    *,
    engine: str | None = None,
    device: str | None = None,
    threads: int | None = None,
    cores: str | None = None,
    warmup: int = 5,
    progress: Callable[[float], None] = lambda share: None,
) -> Sustained:
    """Runs one int8 artefact (the first, or that of ``engine``) for ``duration_s``, every sample kept by window.

    Raises EngineError on an emulator, or where the bundle holds no such artefact.
    """
    placement = place(bundle.manifest.target, device)
    _refuse_emulator(bundle, placement)
    found = [a for a in runnable(bundle, placement) if a.dtype == "int8" and engine in (None, a.engine)]
    if not found:
        raise EngineError(f"{bundle.path}: holds no int8 artefact for engine {engine} that runs on {placement.device}")
    artefact, x = found[0], golden_input(bundle, found[0])
    moments, look = _watch(placement)
    look(BEFORE)
    with pinned(placement, cores):
        count = threads or processors(placement, cores)
        timed = open_engine(bundle, artefact.engine, placement=placement, threads=count, cores=cores)
        try:
            windows = _windows(timed.time_ms, x, duration_s, warmup, moments, look, progress)
            where = device_name(placement, timed)
        finally:
            timed.close()
    look(AFTER)
    return Sustained(artefact.engine, artefact.dtype, where, placement.obtained, count, windows, tuple(moments))


def _windows(
    time_ms: Callable[..., list[float]],
    x: object,
    duration_s: float,
    warmup: int,
    moments: list[Moment],
    look: Callable[[str], None],
    progress: Callable[[float], None],
) -> tuple[SustainedWindow, ...]:
    window_s = min(60.0, duration_s / WINDOWS)
    # A turn is a small part of a window, and on a device elsewhere one process: long, so that the chip stays busy.
    turn = max(1, math.ceil(window_s / 5 * 1e3 / max(float(np.median(time_ms(x, PILOT, warmup))), 1e-4)))
    start, windows = time.monotonic(), list[SustainedWindow]()
    for number in range(math.ceil(duration_s / window_s - 1e-9)):
        samples: list[float] = []
        began = time.monotonic() - start
        while not samples or time.monotonic() - start < (number + 1) * window_s:
            samples += time_ms(x, turn, 1)
            progress(min(1.0, (time.monotonic() - start) / duration_s))
        look(DURING)
        windows.append(SustainedWindow(began, time.monotonic() - start, tuple(samples), moments[-1].state))
    return tuple(windows)
