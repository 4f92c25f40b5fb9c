"""Time by layer, from the native runtime's own timers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from . import bundle as bundles
from .bundle import Bundle
from .engines.engine import EngineError
from .session import LOCAL, default_threads, place


@dataclass(frozen=True)
class LayerTime:
    """One step of the plan: the graph node it completes, its kernel, its median time over the repeats."""

    name: str
    kernel: str
    path: str
    macs: int
    median_ms: float


def time_layers(
    bundle: Bundle, *, device: str | None = None, threads: int | None = None, repeats: int = 50
) -> tuple[LayerTime, ...]:
    """Runs the native artefact ``repeats`` times on its first golden input. Raises EngineError off this machine."""
    from .engines.native import NativeEngine

    if place(bundle.manifest.target, device).device != LOCAL:
        raise EngineError("time by layer is taken on the device itself: an emulator's says nothing of the target's")
    golden, _ = bundle.golden()
    x = golden[: bundle.manifest.input.shape[0]]
    engine = NativeEngine(bundle.file(bundles.NATIVE), threads=threads or default_threads(), time_steps=True)
    try:
        samples = []
        for _ in range(repeats):
            engine.run(x)
            samples.append([step.last_ms for step in engine.steps()])
        steps = engine.steps()
    finally:
        engine.close()
    medians = np.median(np.asarray(samples), axis=0)
    return tuple(
        LayerTime(step.name, step.kernel, step.path, step.macs, float(ms))
        for step, ms in zip(steps, medians, strict=True)
    )
