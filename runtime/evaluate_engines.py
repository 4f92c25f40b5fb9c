"""Runs a data set and the clock over a bundle's engines: what `verify`, `bench` and `check` share."""

from __future__ import annotations

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
from .accuracy import (
    Accuracy,
    ImageResult,
    Labelled,
    Seen,
    data_sha256,
    image_sha256,
    judge_image,
    likeliest,
    signal_power,
    summarize,
)
from .bundle import FOR_OTHERS, Artefact, Bundle
from .devices import remote
from .devices.link import connect
from .engines.engine import Array, Engine
from .engines.reference import ReferenceEngine
from .latency import Latency, interleave_ms
from .session import (
    LOCAL,
    QEMU,
    Placement,
    device_name,
    has_emulated_litert,
    open_engine,
    open_program,
    pinned,
    place,
    placement_of,
    processors,
)

BATCH = 256  # images held in memory at a time, a multiple of SUB_BATCH
SUB_BATCH = 8  # images that the numpy networks are given at once
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
    """What the bundle's float network takes for (B, H, W, C) pixels: their values, or the normalised image."""
    if bundle.manifest.pixels.folded:
        return pixels.astype(np.float32)
    return normalize(pixels, bundle.manifest.input_spec)


def _grouped(items: Iterable[Labelled], size: int) -> Iterator[list[Labelled]]:
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def runnable(bundle: Bundle, placement: Placement) -> list[Artefact]:
    """The artefacts that can be run where the placement says: LiteRT's on a device elsewhere where it is installed, on
    an emulator where there is one for the processor."""
    ours = [a for a in bundle.manifest.artefacts if a.engine not in FOR_OTHERS]
    if placement.device == QEMU and not has_emulated_litert(bundle.manifest.target):
        return [a for a in ours if a.engine == "native"]
    link = connect(placement.device)
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
    opened: list[Contender] = []
    try:
        for name in names:
            engine = open_engine(bundle, name, placement=placement, threads=threads)
            opened.append(Contender(bundle, name, engine, placement_of(name, placement), limit))
    except BaseException:
        for contender in opened:
            contender.engine.close()
        raise
    return opened


class Networks:
    """The two networks of a bundle that every engine is judged by: float, and the integer reference."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.real = ReferenceEngine(serialize.load(bundle.file(bundles.FLOAT_GRAPH)))
        self.truth = ReferenceEngine(serialize.load(bundle.file(bundles.INT8_GRAPH)))


def judge_group(
    networks: Networks, judged: Sequence[Contender], group: Sequence[Labelled], start: int
) -> list[ImageResult]:
    """The results of consecutive images, of which the first is number ``start`` of the data set.

    Groups that start at multiples of ``SUB_BATCH`` give the same floats however the set is cut into them.
    """
    bundle, output = networks.bundle, networks.bundle.manifest.output
    pixels = np.stack([item.pixels for item in group])
    parts = [pixels[offset : offset + SUB_BATCH] for offset in range(0, len(group), SUB_BATCH)]
    floats = np.concatenate([networks.real.run(float_input(bundle, part)) for part in parts]).astype(np.float32)
    expected = np.concatenate([networks.truth.run(bundle.quantize_pixels(part)) for part in parts]).astype(np.int8)
    engines: list[dict[str, Seen]] = [{} for _ in group]
    for key, contender in zip(keys(judged), judged, strict=True):
        wanted = len(group) if contender.images is None else max(0, min(len(group), contender.images - start))
        if not wanted:
            continue
        logits = contender.engine.run(bundle.quantize_pixels(pixels[:wanted])).astype(np.int8)
        for i in range(wanted):
            engines[i][key] = judge_image(
                floats[i],
                logits[i],
                expected[i],
                scale=output.scale,
                zero_point=output.zero_point,
                device=device_name(contender.placement, contender.engine),
                obtained=contender.placement.obtained,
            )
    return [
        ImageResult(
            index=start + i,
            name=item.name,
            label=item.label,
            sha256=image_sha256(item),
            float_top=likeliest(floats[i]),
            signal=signal_power(floats[i]),
            values=int(expected[i].size),
            engines=engines[i],
        )
        for i, item in enumerate(group)
    ]


def evaluate(
    judged: Sequence[Contender], items: Iterable[Labelled], *, progress: Callable[[int], None] = lambda done: None
) -> tuple[tuple[Accuracy, ...], str]:
    """Runs every image through float, the integer reference and each contender, in one pass over the data.

    Returns one Accuracy per contender and the data's sha256.
    """
    results = judge_images(judged, items, progress=progress)
    return accuracies(judged[0].bundle, keys(judged), results), data_sha256(results)


def judge_images(
    judged: Sequence[Contender], items: Iterable[Labelled], *, progress: Callable[[int], None] = lambda done: None
) -> list[ImageResult]:
    """The result of every image. The contenders' bundles hold the same networks; the first one's are the truth."""
    networks = Networks(judged[0].bundle)
    results: list[ImageResult] = []
    for group in _grouped(items, BATCH):
        results += judge_group(networks, judged, group, len(results))
        progress(len(results))
    if not results:
        raise ValueError("the data set holds no images")
    return results


def keys(judged: Sequence[Contender]) -> list[str]:
    """What each contender's results are kept under: its engine, numbered where several bundles have the same."""
    names = [contender.engine_name for contender in judged]
    return [name if names.count(name) == 1 else f"{name}#{i}" for i, name in enumerate(names)]


def accuracies(bundle: Bundle, engines: Sequence[str], results: Sequence[ImageResult]) -> tuple[Accuracy, ...]:
    """The figures of each engine."""
    manifest = bundle.manifest
    return tuple(summarize(results, name, manifest.labels, manifest.allowed_steps) for name in engines)


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
    batch = bundle.manifest.input.shape[0]
    return tuple(
        Latency(a.engine, a.dtype, where, placement.obtained, count, tuple(itertools.chain(*turns)), len(turns), batch)
        for a, where, turns in zip(timed, places, samples, strict=True)
    )


def golden_input(bundle: Bundle, artefact: Artefact) -> Array:
    """The bundle's first golden input in the form that an artefact takes."""
    golden, _ = bundle.golden()
    first = golden[: bundle.manifest.input.shape[0]]
    if artefact.dtype == "int8" or artefact.engine == "native":  # every plan takes the int8 pixels
        return first
    tensor = bundle.manifest.input
    return (first.astype(np.float32) - np.float32(tensor.zero_point)) * np.float32(tensor.scale)


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
    link = connect(device or LOCAL)
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
