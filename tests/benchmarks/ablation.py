"""What each stage of calibration is worth, on the demo network and on an ill-conditioned copy of it.

The copy is the same function: a few channels of every activation are blown up by random factors, as batch-norm scales
can be, and the weights that read them are shrunk by the same. Plain min-max loses it.

    python tests/benchmarks/ablation.py [--part test] [--images 10000] [--calibration 256] [--json FILE]

Recipes were chosen by ``--part held-out``: images of the calibration split that no recipe calibrates on. The figures
that are published are of ``--part test``, which nothing was chosen by. LiteRT runs the networks: bit for bit the
reference, and fast enough for ten thousand images, which the differences between recipes need.
"""

from __future__ import annotations

import argparse
import json
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xceptile.calibration.calibrate import calibrate
from xceptile.calibration.equalize import equalizable_groups, rescale
from xceptile.calibration.recipe import PRESETS, QuantRecipe
from xceptile.compile.backends import tflite
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.drawn import draw
from xceptile.models.verify import verify
from xceptile.runtime.engines.litert import LiteRtEngine

CHUNK = 200  # images held as float32 at once
PARTS = {"test": ("val", 0), "held-out": ("calibration", 512)}  # split and first index
NONE = {"equalize": False, "center": False, "equalize_groups": False, "optimize_rounding": False, "correct_bias": False}
GROUPS = {**NONE, "equalize_groups": True}
CENTRED = {**GROUPS, "center": True}
STAGES: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("min-max", "min-max", NONE),
    ("percentile", "percentile", NONE),
    ("entropy", "entropy", NONE),
    ("least squared error", "mse", NONE),
    ("min-max, all equalized", "min-max", GROUPS),
    ("squared error, pairs equalized", "mse", {**NONE, "equalize": True}),
    ("squared error, all equalized", "mse", GROUPS),
    ("the same, centred (`fast`)", "mse", CENTRED),
    ("the same, biases corrected", "mse", {**CENTRED, "correct_bias": True}),
    ("the same, rounding optimized instead", "mse", {**CENTRED, "optimize_rounding": True}),
    ("all stages (`default`)", "mse", {**CENTRED, "optimize_rounding": True, "correct_bias": True}),
)


@dataclass(frozen=True)
class Row:
    """One recipe on one network: shares of images, decibels at the logits, the mean Kullback-Leibler divergence of the
    classes' probabilities from float's, seconds of calibration. ``lost`` were right in float alone, ``won`` in int8.
    """

    network: str
    recipe: str
    top1_float: float
    top1: float
    agreement: float
    lost: int
    won: int
    sqnr_db: float
    divergence: float
    seconds: float


def ill_conditioned(graph: ir.Graph, share: float = 0.05, factor: float = 64.0, seed: int = 0) -> ir.Graph:
    """The same function with a ``share`` of every activation's channels enlarged, by up to ``factor``."""
    rng = np.random.default_rng(seed)
    for group in equalizable_groups(graph):
        channels = group.producers[0].type.shape[-1]
        blown = rng.random(channels) < share
        factors = np.where(blown, factor ** rng.uniform(0.5, 1.0, channels), 1.0)
        graph = rescale(graph, group, 1 / factors)
    return graph


def logits(graph: ir.Graph, images: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Real-valued outputs for pixels (count, H, W, 3), float or int8 network."""
    engine = LiteRtEngine(tflite.serialize(graph))
    int8 = graph.inputs[0].type.dtype == "int8"
    outputs = []
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        outputs.append(engine.run((part ^ np.uint8(0x80)).view(np.int8) if int8 else part.astype(np.float32)))
    engine.close()
    y = np.concatenate(outputs).astype(np.float64)
    if int8:
        params = graph.type_of(graph.outputs[0]).per_tensor
        y = (y - params.zero_point) * params.scale
    return y


def log_probabilities(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))


def measure(
    network: str,
    name: str,
    expected: NDArray[np.float64],
    seen: NDArray[np.float64],
    labels: NDArray[np.int64],
    seconds: float,
) -> Row:
    noise = float(((seen - expected) ** 2).sum())
    p, q = log_probabilities(expected), log_probabilities(seen)
    right_float, right = expected.argmax(1) == labels, seen.argmax(1) == labels
    return Row(
        network=network,
        recipe=name,
        top1_float=float(right_float.mean()),
        top1=float(right.mean()),
        agreement=float((seen.argmax(1) == expected.argmax(1)).mean()),
        lost=int((right_float & ~right).sum()),
        won=int((right & ~right_float).sum()),
        sqnr_db=10 * float(np.log10((expected**2).sum() / noise)),
        divergence=float((np.exp(p) * (p - q)).sum(axis=1).mean()),
        seconds=seconds,
    )


def _draw(split: str, size: int, index: int) -> NDArray[np.uint8]:
    return draw(split, index, size)[0]


def drawn(split: str, first: int, count: int, size: int) -> NDArray[np.uint8]:
    with ProcessPoolExecutor() as pool:
        return np.stack(list(pool.map(partial(_draw, split, size), range(first, first + count), chunksize=64)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, default="test")
    parser.add_argument("--images", type=int, default=10000)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = zoo.load(arguments.model)
    size = model.input_spec.height
    healthy = fold_input(run_passes(model.graph, FLOAT_PASSES, verify), model.input_spec)
    calibration = drawn("calibration", 0, arguments.calibration, size)
    split, first = PARTS[arguments.part]
    judged = drawn(split, first, arguments.images, size)
    expected = logits(healthy, judged)
    labels = (np.arange(arguments.images) + first) % expected.shape[1]
    rows = []
    print(f"{arguments.images} images, {arguments.part}; {arguments.calibration} calibration images")
    print(
        "| network | recipe | top-1 float | top-1 int8 | of float's | lost, won | agreement | SQNR, dB "
        "| divergence | s |\n|---|---|---|---|---|---|---|---|---|---|"
    )
    for network, graph in (("demo", healthy), ("ill-conditioned", ill_conditioned(healthy))):
        for name, preset, stages in STAGES:
            began = time.perf_counter()
            recipe: QuantRecipe = replace(PRESETS[preset], **stages)
            result = calibrate(graph, iter(calibration), recipe)
            seconds = time.perf_counter() - began
            row = measure(network, name, expected, logits(result.int8_graph, judged), labels, seconds)
            rows.append(row)
            print(
                f"| {row.network} | {row.recipe} | {row.top1_float:.2%} | {row.top1:.2%} "
                f"| {row.top1 / row.top1_float:.2%} | {row.lost}, {row.won} | {row.agreement:.2%} "
                f"| {row.sqnr_db:.1f} | {row.divergence:.2e} | {row.seconds:.0f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
