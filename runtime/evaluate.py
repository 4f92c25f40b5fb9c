"""Runs a data set and the clock over a bundle's engines: what `verify`, `bench` and `check` share."""

from __future__ import annotations

import hashlib
import importlib.metadata
import itertools
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models import serialize
from ..models.preprocess import normalize
from . import bundle as bundles
from .bundle import FOR_OTHERS, Artefact, Bundle
from .devices import remote
from .engines.engine import Array, Engine
from .engines.reference import ReferenceEngine
from .measure import Accuracy, Labelled, Latency, compare, interleave_ms
from .session import LOCAL, QEMU, Placement, device_name, open_engine, open_program, pinned, place, processors

BATCH = 256  # images held in memory at a time
REHEARSED_IMAGES = 64  # an emulator takes seconds an image at full size


@dataclass(frozen=True)
class Contender:
    """An engine to be judged. ``images`` bounds how many it is given, None for all."""

    bundle: Bundle
    engine_name: str
    engine: Engine
    placement: Placement
    images: int | None


def float_input(bundle: Bundle, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What the bundle's float network takes for (B, H, W, 3) pixels: their values, or the normalised image."""
    if bundle.manifest.pixel_table is None:
        return pixels.astype(np.float32)
    return normalize(pixels, bundle.manifest.input_spec)


def _grouped(items: Iterable[Labelled], size: int) -> Iterator[list[Labelled]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def runnable(bundle: Bundle, placement: Placement) -> list[Artefact]:
    """The artefacts that can be run where the placement says: on a device elsewhere, LiteRT's where it is installed."""
    ours = [a for a in bundle.manifest.artefacts if a.engine not in FOR_OTHERS]
    link = remote.connect(placement.device)
    if link is None or all(a.engine == "native" for a in ours) or remote.has_litert(link):
        return ours
    return [a for a in ours if a.engine == "native"]


def contenders(
    bundle: Bundle,
    *,
    device: str | None = None,
    threads: int | None = None,
    engines: Sequence[str] = (),
    rehearsed_images: int | None = REHEARSED_IMAGES,
) -> list[Contender]:
    """Opens the bundle's int8 engines (all, or those named) on a device. Raises EngineError for one that cannot run."""
    placement = place(bundle.manifest.target, device)
    names = engines or [a.engine for a in runnable(bundle, placement) if a.dtype == "int8"]
    limit = rehearsed_images if placement.device == QEMU else None
    opened = []
    for name in names:
        engine = open_engine(bundle, name, placement=placement, threads=threads)
        opened.append(Contender(bundle, name, engine, placement, limit))
    return opened


def evaluate(
    judged: Sequence[Contender], items: Iterable[Labelled], *, progress: Callable[[int], None] = lambda done: None
) -> tuple[tuple[Accuracy, ...], str]:
    """Runs every image through float, the integer reference and each contender, in one pass over the data.

    The contenders' bundles hold the same networks (compared by hash); the first one's are run as the truth. Returns
    one Accuracy per contender and the data's sha256.
    """
    bundle = judged[0].bundle
    truth = ReferenceEngine(serialize.load(bundle.file(bundles.INT8_GRAPH)))
    real = ReferenceEngine(serialize.load(bundle.file(bundles.FLOAT_GRAPH)))
    names: list[str] = []
    labels: list[int | None] = []
    digest = hashlib.sha256()
    expected: list[Array] = []
    floats: list[Array] = []
    outputs: list[list[Array]] = [[] for _ in judged]
    for group in _grouped(items, BATCH):
        start = len(names)
        names += [item.name for item in group]
        labels += [item.label for item in group]
        for item in group:
            digest.update(f"{item.label}\0".encode())
            digest.update(item.pixels.tobytes())
        pixels = np.stack([item.pixels for item in group])
        for offset in range(0, len(group), 8):
            part = pixels[offset : offset + 8]
            floats.append(real.run(float_input(bundle, part)))
            expected.append(truth.run(bundle.quantize_pixels(part)))
            progress(start + offset + len(part))
        for contender, seen in zip(judged, outputs, strict=True):
            wanted = len(group) if contender.images is None else max(0, min(len(group), contender.images - start))
            if wanted:
                seen.append(contender.engine.run(bundle.quantize_pixels(pixels[:wanted])))
    if not names:
        raise ValueError("the data set holds no images")
    float_logits, int8_expected = np.concatenate(floats).astype(np.float32), np.concatenate(expected).astype(np.int8)
    output, classes = bundle.manifest.output, bundle.manifest.labels
    accuracies = []
    for contender, seen in zip(judged, outputs, strict=True):
        logits = np.concatenate(seen).astype(np.int8)
        count = len(logits)
        accuracies.append(
            compare(
                names[:count],
                labels[:count],
                classes,
                float_logits[:count],
                logits,
                int8_expected[:count],
                scale=output.scale,
                zero_point=output.zero_point,
                engine=contender.engine_name,
                device=device_name(contender.placement, contender.engine),
                obtained=contender.placement.obtained,
            )
        )
    return tuple(accuracies), digest.hexdigest()


def time_bundle(
    bundle: Bundle,
    *,
    device: str | None = None,
    threads: int | None = None,
    cores: str | None = None,
    rounds: int = 10,
    repeats: int = 10,
    warmup: int = 5,
    min_duration_s: float = 0.0,
    progress: Callable[[float], None] = lambda share: None,
) -> tuple[Latency, ...]:
    """Times every artefact of the bundle in turns, int8 and float, on its first golden input (``interleave_ms``).

    ``cores`` are the processors to run on, as ``4-7`` or ``0,2``; ``threads`` is by default one for each of them. Empty
    on an emulator: its outputs count, its time says nothing of the target's.
    """
    placement = place(bundle.manifest.target, device)
    if placement.device == QEMU:
        return ()
    with pinned(placement, cores):
        count = threads or processors(placement, cores)
        timed = runnable(bundle, placement)
        opened: list[Engine] = []
        try:
            for a in timed:
                opened.append(
                    open_engine(bundle, a.engine, dtype=a.dtype, placement=placement, threads=count, cores=cores)
                )
            samples = interleave_ms(
                [(engine, golden_input(bundle, a)) for engine, a in zip(opened, timed, strict=True)],
                rounds=rounds,
                repeats=repeats,
                warmup=warmup,
                min_duration_s=min_duration_s,
                progress=progress,
            )
            places = [device_name(placement, engine) for engine in opened]
        finally:
            for engine in opened:
                engine.close()
    return tuple(
        Latency(a.engine, a.dtype, where, placement.obtained, count, tuple(itertools.chain(*turns)), len(turns))
        for a, where, turns in zip(timed, places, samples, strict=True)
    )


def golden_input(bundle: Bundle, artefact: Artefact) -> Array:
    """The bundle's first golden input in the form that an artefact takes."""
    golden, _ = bundle.golden()
    first = golden[: bundle.manifest.input.shape[0]]
    if artefact.dtype == "int8" or artefact.engine == "native":  # every plan takes the int8 pixels
        return first
    return float_input(bundle, first.view(np.uint8) ^ np.uint8(0x80))


def peak_rss_bytes(bundle: Bundle, *, device: str | None = None, threads: int | None = None) -> dict[str, int | None]:
    """The most memory that xceptile-run held for one inference, by engine/dtype of the native artefacts.

    None where it does not say: a runtime older than this version. Empty where there is no native artefact, and on an
    emulator, whose memory is not the target's.
    """
    placement = place(bundle.manifest.target, device)
    foreign = placement.device == LOCAL and bundle.manifest.target.architecture != platform.machine()
    found = {}
    for a in () if placement.device == QEMU or foreign else bundle.manifest.artefacts:
        if a.engine == "native":
            with open_program(bundle, a, placement, threads or processors(placement)) as program:
                found[f"{a.engine}/{a.dtype}"] = program.peak_rss_bytes()
    return found


def machine(device: str | None = None) -> dict[str, str]:
    """What a figure was obtained on: processor, cores, kernel; where the firmware names it, the board."""
    link = remote.connect(device or LOCAL)
    facts = remote.facts_here() if link is None else remote.facts(link)
    models = (line.partition(":")[2].strip() for line in facts.cpuinfo.splitlines() if line.startswith("model name"))
    about = {
        "processor": next(models, platform.processor() if link is None else "") or facts.architecture,
        "architecture": facts.architecture,
        "cores": str(facts.processors),
        "system": facts.system,
    }
    return about | ({"board": facts.model} if facts.model else {}) | {"python": platform.python_version()}


def versions() -> dict[str, str]:
    """The installed engines' and libraries' versions, where present."""
    found = {}
    for name in ("xceptile", "numpy", "ai-edge-litert", "apache-tvm", "torch"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
