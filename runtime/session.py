"""A bundle opened on a device: which engines can run it there, how their figures are obtained, and running images."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ..models import serialize
from ..targets import host
from ..targets.spec import TargetSpec
from . import bundle as bundles
from .bundle import Artefact, Bundle
from .devices import remote
from .devices.link import Link, connect
from .engines.engine import Array, Engine, EngineError
from .engines.native import LIBRARY, MAX_THREADS, NativeEngine
from .engines.native_program import PROGRAM, NativeProgramEngine, startable
from .engines.reference import ReferenceEngine
from .obtained import MEASURED, REHEARSED

LOCAL, QEMU = "local", "qemu"
DEVICES = (LOCAL, QEMU, "ssh://[USER@]HOST[:PORT]", "adb:SERIAL")


@dataclass(frozen=True)
class Placement:
    """Where an engine runs and how figures from there are to be called."""

    device: str
    obtained: str


def is_hardware_of(target: TargetSpec, here: TargetSpec | None, model: str) -> bool:
    """Whether a machine is the target's own hardware: ``here`` was detected on it (None: a processor that no kernels
    are made for), its firmware calls it ``model``.
    """
    if here is not None and target.name == here.name:
        return set(target.features) <= set(here.features) and target.cpu == here.cpu
    return bool(target.device_tree_model) and str(target.device_tree_model) in model


def runs_here(target: TargetSpec) -> bool:
    """Whether this machine can execute the target's native code; that for a GPU rehearses on whatever is here."""
    if target.engine != "cpu":
        return True
    here = _detected(host.detect)
    return platform.machine() == target.architecture and here is not None and set(target.features) <= set(here.features)


def _detected(detect: Callable[[], TargetSpec]) -> TargetSpec | None:
    """A machine's own row; None where it has none: a processor without AVX2 still emulates an Arm."""
    try:
        return detect()
    except host.UnsupportedHost:
        return None


def place(target: TargetSpec, device: str | None) -> Placement:
    """Chooses ``local`` where the target's code runs here, else ``qemu``; a ``device`` asked for is kept.

    Raises EngineError for a device that is unknown, cannot be reached or cannot run the target's code.
    """
    chosen = device or (LOCAL if runs_here(target) else QEMU)
    if link := connect(chosen):
        return _place_there(target, link)
    if chosen == QEMU and target.engine != "cpu":
        raise EngineError(f"{target.name}: an emulator has no GPU; --device local rehearses")
    if chosen not in DEVICES[:2]:
        raise EngineError(f"no such device {chosen!r}; known devices: {', '.join(DEVICES)}")
    own = chosen == LOCAL and is_hardware_of(target, _detected(host.detect), remote.facts_here().model)
    return Placement(chosen, MEASURED if own else REHEARSED)


def _place_there(target: TargetSpec, link: Link) -> Placement:
    facts = remote.facts(link)
    if facts.architecture not in (target.architecture, {"aarch64": "arm64"}.get(target.architecture)):
        raise EngineError(
            f"{link.name} is {facts.architecture}, the bundle's code {target.architecture} for {target.name}; "
            "compile for a target of the device's kind"
        )
    own = is_hardware_of(target, _detected(facts.detect), facts.model)
    return Placement(link.name, MEASURED if own else REHEARSED)


def default_threads() -> int:
    """The processors this process may run on, or as many as the runtime takes."""
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def parse_cores(text: str) -> frozenset[int]:
    """``0,2,4-7`` -> {0, 2, 4, 5, 6, 7}, processors below 64, as xceptile-run has them. Raises EngineError."""
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise EngineError(f"{text!r} names no processors; give them as 4-7 or 0,2,3")
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
        if int(last or first) < int(first) or int(last or first) > 63:
            raise EngineError(f"{text!r}: {part} is no range of processors from 0 to 63")
    return frozenset(found)


def processors(placement: Placement, cores: str | None = None) -> int:
    """On how many an engine computes unless told otherwise: all of the machine where it runs, or those of ``cores``."""
    if cores:
        return len(parse_cores(cores))
    link = connect(placement.device)
    return default_threads() if link is None else min(remote.facts(link).processors, MAX_THREADS)


@contextmanager
def pinned(placement: Placement, cores: str | None) -> Iterator[None]:
    """Within it, engines opened here compute on ``cores`` only; those elsewhere are told so when they are opened.

    Raises EngineError where this machine has no such processor.
    """
    if cores is None or placement.device != LOCAL:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, parse_cores(cores))
    except OSError as error:
        raise EngineError(f"this machine cannot run on processors {cores}: {error.strerror}") from error
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def open_engine(
    bundle: Bundle,
    engine: str,
    *,
    dtype: str = "int8",
    placement: Placement,
    threads: int | None = None,
    cores: str | None = None,
) -> Engine:
    """Opens one artefact. ``cores`` are for a device elsewhere; for here, see ``pinned``.

    Raises EngineError where the bundle holds none, or the engine cannot be had there.
    """
    count = threads or processors(placement, cores)
    target = bundle.manifest.target
    if engine == "reference":
        name = bundles.INT8_GRAPH if dtype == "int8" else bundles.FLOAT_GRAPH
        return ReferenceEngine(serialize.load(bundle.file(name)))
    artefact = bundle.artefact("litert" if engine == "tflite-runtime" else engine, dtype)
    if artefact is None:
        held = ", ".join(
            f"{a.engine} {a.dtype}" for a in bundle.manifest.artefacts if a.engine not in bundles.FOR_OTHERS
        )
        raise EngineError(
            f"{bundle.path}: holds no {dtype} artefact for engine {engine}, only {held}; choose one of these, or "
            "compile it for that engine"
        )
    if engine in bundles.FOR_OTHERS:
        raise EngineError(f"{bundle.path}: its {engine} artefact is for other runtimes; nothing here runs it")
    if engine == "tflite-runtime" and placement.device != LOCAL:
        raise EngineError(f"tflite-runtime runs on this machine only, not on {placement.device}: give --device local")
    if link := connect(placement.device):
        if artefact.engine == "native":
            return _open_program_there(bundle, artefact, placement, link, count, cores)
        return remote.RemoteLiteRtEngine(bundle, artefact, link, count, cores)
    if engine == "native" and target.engine != "cpu":
        return open_native_here(bundle, artefact, placement, count)
    if engine == "native":
        if placement.device == LOCAL and platform.machine() != target.architecture:
            raise EngineError(
                f"{bundle.path}: its native code is {target.architecture} for {target.name}, this machine is "
                f"{platform.machine()}; compile for --target host, or rehearse with --device qemu"
            )
        directory = bundle.file(bundles.NATIVE)
        if placement.device == QEMU:
            from .devices.qemu import QemuNativeEngine

            return QemuNativeEngine(directory, target, count)
        return open_native_here(bundle, artefact, placement, count)
    file = bundle.file(artefact.files[0])
    if engine == "tflite-runtime":
        from .engines.litert import LiteRtEngine

        return LiteRtEngine(file, threads=count, library="tflite_runtime")
    if placement.device == QEMU:
        from .devices.qemu import emulated_cpu
        from .engines.litert_qemu import LiteRtQemuEngine

        if not has_emulated_litert(target):
            raise EngineError(f"{target.name}: no LiteRT for {target.architecture} under qemu; its native engine runs")
        return LiteRtQemuEngine(file, emulated_cpu(target), count)
    from .engines.litert import LiteRtEngine

    return LiteRtEngine(file, threads=count)


def has_emulated_litert(target: TargetSpec) -> bool:
    """Whether there is a LiteRT for the target's processor under qemu."""
    return target.architecture == "aarch64"


def _runtime_here(bundle: Bundle, artefact: Artefact) -> tuple[Path, Path]:
    """The folder of a native artefact's plan, and that of the runtime which this machine can start."""
    (plan,) = (name for name in artefact.files if PurePosixPath(name).parts[1:] == ("plan.bin",))
    directory, target = bundle.file(plan).parent, bundle.manifest.target
    own = target.engine == "cpu" or platform.machine() == target.architecture
    return directory, directory if own else bundle.file(bundles.REHEARSAL)


def open_native_here(
    bundle: Bundle, artefact: Artefact, placement: Placement, threads: int, *, time_steps: bool = False
) -> NativeEngine:
    """A native artefact in this process. Raises EngineError.

    For a GPU: on the target's own hardware its GPU and nothing else, elsewhere a rehearsal on any device of the same
    API.
    """
    directory, runtime = _runtime_here(bundle, artefact)
    required = _required_device(bundle, placement)
    return NativeEngine(
        directory, threads, time_steps=time_steps, library=runtime / LIBRARY, require_device=required or "default"
    )


def _required_device(bundle: Bundle, placement: Placement) -> str | None:
    if bundle.manifest.target.engine == "cpu":
        return None
    return "gpu" if placement.obtained == MEASURED else "any"


def placement_of(engine: str, placement: Placement) -> Placement:
    """Where an engine runs. The numpy reference is no artefact: it runs here, whatever the device, and never counts as
    measured on a target.
    """
    return Placement(LOCAL, REHEARSED) if engine == "reference" else placement


def device_name(placement: Placement, engine: Engine) -> str:
    """The device as a report names it: with the GPU, or what stands in for it, where there is one."""
    gpu = engine.device if isinstance(engine, (NativeEngine, NativeProgramEngine)) else "cpu"
    return placement.device if gpu == "cpu" else f"{placement.device}: {gpu}"


def _open_program_there(
    bundle: Bundle, artefact: Artefact, placement: Placement, link: Link, threads: int, cores: str | None
) -> remote.RemoteNativeEngine:
    required = _required_device(bundle, placement)
    options = (f"--require-device={required}",) if required else ()
    return remote.open_native(bundle, artefact, link, threads, cores, options)


def open_program(bundle: Bundle, artefact: Artefact, placement: Placement, threads: int) -> NativeProgramEngine:
    """A native artefact as the program that devices run, here too. Raises EngineError."""
    if link := connect(placement.device):
        return _open_program_there(bundle, artefact, placement, link, threads, None)
    directory, runtime = _runtime_here(bundle, artefact)
    if placement.device == QEMU:
        from .devices.qemu import QemuNativeEngine

        return QemuNativeEngine(directory, bundle.manifest.target, threads)
    required = _required_device(bundle, placement)
    options = (f"--require-device={required}",) if required else ()
    return NativeProgramEngine((str(startable(runtime / PROGRAM)), *options), directory, threads)


@dataclass(frozen=True)
class Prediction:
    """One class with its logit as a real number."""

    label: str
    logit: float


@dataclass(frozen=True)
class Session:
    """A bundle ready to run images through one engine. A context manager."""

    bundle: Bundle
    engine: Engine
    placement: Placement

    def logits(self, pixels: NDArray[np.uint8]) -> Array:
        """(B, H, W, C) pixels -> (B, classes) int8 logits."""
        return self.engine.run(self.bundle.quantize_pixels(pixels))

    def classify(self, pixels: NDArray[np.uint8], count: int = 5) -> list[Prediction]:
        """(H, W, C) pixels -> the ``count`` likeliest classes, best first."""
        output = self.bundle.manifest.output
        logits = self.logits(pixels[np.newaxis])[0]
        order = np.argsort(-logits.astype(np.int32), kind="stable")[:count]
        labels = self.bundle.manifest.labels
        return [Prediction(labels[i], (int(logits[i]) - output.zero_point) * output.scale) for i in order]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.engine.close()


def open_session(
    bundle: Bundle, *, engine: str | None = None, device: str | None = None, threads: int | None = None
) -> Session:
    """Opens the engine asked for, else native, else LiteRT, whichever the bundle holds first."""
    placement = place(bundle.manifest.target, device)
    ours = (a.engine for a in bundle.manifest.artefacts if a.dtype == "int8" and a.engine not in bundles.FOR_OTHERS)
    chosen = engine or next(ours)
    opened = open_engine(bundle, chosen, placement=placement, threads=threads)
    return Session(bundle, opened, placement_of(chosen, placement))
