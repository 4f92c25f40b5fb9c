"""Time by layer and the machine's roof, from the native runtime's own timers on the device itself."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..targets.spec import TargetSpec
from . import bundle as bundles
from .bundle import Artefact, Bundle
from .engines.engine import EngineError
from .engines.native import LIBRARY, NativeEngine, NativeStep
from .obtained import MEASURED
from .plan import unpack
from .session import LOCAL, QEMU, Placement, device_name, open_native_here, open_program, place, processors

ROOF_RUNS = 100
KINDS = (
    "depthwise + pointwise",
    "depthwise",
    "convolution",
)  # that multiply, in the order of the report's colours


@dataclass(frozen=True)
class LayerTime:
    """One step of the plan: the graph node it completes, its kernel and kind (one of ``plan.STEP_KINDS``), its median
    time over the repeats.

    ``bytes_moved`` is the compulsory traffic: the bytes of its distinct operands, each counted once.
    """

    name: str
    kernel: str
    kind: str
    path: str
    macs: int
    bytes_moved: int
    median_ms: float

    @property
    def gmac_per_s(self) -> float:
        return _rate(self.macs, self.median_ms)

    @property
    def gb_per_s(self) -> float:
        return _rate(self.bytes_moved, self.median_ms)

    @property
    def macs_per_byte(self) -> float:
        """The operational intensity."""
        return self.macs / self.bytes_moved


@dataclass(frozen=True)
class Roof:
    """What the machine can do with as many threads: multiply-accumulates in registers, bytes read from a buffer of
    30 MiB (compile/backends/roof.py); the fastest of a few runs. A GPU's is ``published``: the peaks of its target."""

    gmac_per_s: float
    gb_per_s: float
    published: bool = False

    def __str__(self) -> str:
        if self.published:
            return f"published peak: {self.gmac_per_s:.0f} GMAC/s, {self.gb_per_s:.1f} GB/s"
        return f"peak found there: {self.gmac_per_s:.0f} GMAC/s in registers, {self.gb_per_s:.1f} GB/s read from 30 MiB"


@dataclass(frozen=True)
class Profile:
    """All layers of a bundle's native artefact. ``roof`` is None where it is not known: no plan measures a GPU's, and
    the target's published peaks are not those of a device that rehearses.

    ``obtained``: measured or rehearsed.
    """

    target: str
    threads: int
    layers: tuple[LayerTime, ...]
    roof: Roof | None
    device: str
    obtained: str

    @property
    def total(self) -> LayerTime:
        """The whole network as one layer: sums of all figures."""
        rows = self.layers
        return LayerTime(
            "total",
            "",
            "",
            "",
            sum(row.macs for row in rows),
            sum(row.bytes_moved for row in rows),
            math.fsum(row.median_ms for row in rows),
        )

    def share_of_peak(self, layer: LayerTime) -> float | None:
        """The layer's multiply-accumulate rate as a share of the machine's."""
        return layer.gmac_per_s / self.roof.gmac_per_s if self.roof else None


def _published_roof(target: TargetSpec, placement: Placement) -> Roof | None:
    if target.gpu is None or placement.obtained != MEASURED:
        return None
    return Roof(target.gpu.int8_gops / 2, target.gpu.bandwidth_gb_s, published=True)


def _rate(count: int, time_ms: float) -> float:
    """Thousands of millions a second; 0 where the clock saw no time pass."""
    return count / time_ms / 1e6 if time_ms > 0 else 0.0


def time_layers(bundle: Bundle, *, device: str | None = None, threads: int | None = None, repeats: int = 50) -> Profile:
    """Runs the native artefact ``repeats`` times on its first golden input, then the plan that measures the roof.

    Raises EngineError on an emulator.
    """
    target = bundle.manifest.target
    placement = place(target, device)
    if placement.device == QEMU:
        raise EngineError("time by layer is taken on the device itself: an emulator's says nothing of the target's")
    count = threads or processors(placement)
    golden, _ = bundle.golden()
    if placement.device != LOCAL:
        return _time_there(bundle, placement, count, golden[: bundle.manifest.input.shape[0]], repeats)
    with open_native_here(bundle, _native(bundle), placement, count, time_steps=True) as engine:
        steps, samples = _samples_ms(engine, golden[: bundle.manifest.input.shape[0]], repeats)
        where = device_name(placement, engine)
    layers = tuple(
        LayerTime(step.name, step.kernel, kind, step.path, step.macs, step.bytes_moved, float(ms))
        for step, kind, ms in zip(steps, _kinds(bundle), np.median(samples, axis=0), strict=True)
    )
    roof = _measure_roof(bundle, count) or _published_roof(target, placement)
    return Profile(target.name, count, layers, roof, where, placement.obtained)


def _native(bundle: Bundle) -> Artefact:
    artefact = bundle.artefact("native")
    if artefact is None:
        raise EngineError(f"{bundle.path}: holds no native artefact; compile it with --engine native")
    return artefact


def _kinds(bundle: Bundle) -> list[str]:
    """Of the native plan's steps, in order."""
    return [step.kind for step in unpack((bundle.file(bundles.NATIVE) / "plan.bin").read_bytes()).steps]


def _time_there(bundle: Bundle, placement: Placement, threads: int, x: NDArray[np.int8], repeats: int) -> Profile:
    """On a device elsewhere, by xceptile-run."""
    with open_program(bundle, _native(bundle), placement, threads) as program:
        seen = program.profile(x, repeats, 5)
        where = device_name(placement, program)
    layers = (
        LayerTime(s.name, s.kernel, kind, s.path, s.macs, s.bytes_moved, float(np.median(s.samples_ms)))
        for s, kind in zip(seen.steps, _kinds(bundle), strict=True)
    )
    target, found = bundle.manifest.target, _published_roof(bundle.manifest.target, placement)
    if seen.gmac_per_s is not None and seen.gb_per_s is not None:
        found = Roof(seen.gmac_per_s, seen.gb_per_s)
    return Profile(target.name, threads, tuple(layers), found, where, placement.obtained)


def _samples_ms(
    engine: NativeEngine, x: NDArray[np.int8], repeats: int
) -> tuple[tuple[NativeStep, ...], NDArray[np.float64]]:
    """The steps, and their times: (repeats, steps)."""
    samples = []
    for _ in range(repeats):
        engine.run(x)
        samples.append([step.last_ms for step in engine.steps()])
    return engine.steps(), np.asarray(samples)


def _measure_roof(bundle: Bundle, threads: int) -> Roof | None:
    folder, library = bundle.file(bundles.ROOF), bundle.file(bundles.NATIVE) / LIBRARY
    if not bundle.holds(f"{bundles.ROOF}/plan.bin"):
        return None
    with NativeEngine(folder, threads=threads, time_steps=True, library=library) as engine:
        steps, samples = _samples_ms(engine, np.zeros(engine.input.shape, np.int8), ROOF_RUNS)
    fastest_ms = {step.name: (step, float(ms)) for step, ms in zip(steps, samples.min(axis=0), strict=True)}
    peak, peak_ms = fastest_ms["peak"]
    stream, stream_ms = fastest_ms["stream"]
    return Roof(_rate(peak.macs, peak_ms), _rate(stream.bytes_moved, stream_ms))


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """For scripts: units in the names."""

    def row(layer: LayerTime) -> dict[str, Any]:
        return {
            "macs": layer.macs,
            "bytes_moved": layer.bytes_moved,
            "median_ms": layer.median_ms,
            "gmac_per_s": layer.gmac_per_s,
            "gb_per_s": layer.gb_per_s,
            "share_of_peak": profile.share_of_peak(layer),
        }

    names = ({"name": x.name, "kind": x.kind, "kernel": x.kernel, "path": x.path} for x in profile.layers)
    return {
        "target": profile.target,
        "threads": profile.threads,
        "device": profile.device,
        "obtained": profile.obtained,
        "roof": asdict(profile.roof) if profile.roof else None,
        "layers": [name | row(layer) for name, layer in zip(names, profile.layers, strict=True)],
        "total": row(profile.total),
    }
