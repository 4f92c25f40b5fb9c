"""What each stage of calibration is worth, on the demo network and on an ill-conditioned copy of it.

The copy is the same function: a few channels of every activation are blown up by random factors, as batch-norm scales
can be, and the weights that read them are shrunk by the same. Plain min-max loses it.

    python tests/benchmarks/ablation.py [--images 2000] [--calibration 256] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from xceptile.calibration.calibrate import Calibrated, calibrate
from xceptile.calibration.equalize import equalizable_groups, rescale
from xceptile.calibration.recipe import PRESETS, QuantRecipe
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.drawn import draw
from xceptile.models.verify import verify
from xceptile.runtime import reference

BATCH = 100
NONE = {"equalize": False}
GROUPS = {"equalize": False, "equalize_groups": True}
STAGES: tuple[tuple[str, str, dict[str, bool]], ...] = (
    ("min-max", "min-max", NONE),
    ("moving average", "moving-average", NONE),
    ("percentile", "percentile", NONE),
    ("entropy", "entropy", NONE),
    ("least squared error", "mse", NONE),
    ("min-max, pairs equalized", "min-max", {}),
    ("min-max, all equalized", "min-max", GROUPS),
    ("min-max, all equalized, biases corrected", "min-max", {**GROUPS, "correct_bias": True}),
    ("min-max, all equalized, rounding optimized", "min-max", {**GROUPS, "optimize_rounding": True}),
    ("squared error, pairs equalized", "mse", {}),
    ("squared error, all equalized", "mse", GROUPS),
    ("squared error, all equalized, biases corrected", "mse", {**GROUPS, "correct_bias": True}),
    ("squared error, all equalized, rounding optimized", "mse", {**GROUPS, "optimize_rounding": True}),
    ("all stages", "mse", {**GROUPS, "optimize_rounding": True, "correct_bias": True}),
)


@dataclass(frozen=True)
class Row:
    """One recipe on one network: shares of images, decibels at the logits, seconds of calibration."""

    network: str
    recipe: str
    top1_float: float
    top1: float
    agreement: float
    sqnr_db: float
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
    """Real-valued outputs for pixels (count, H, W, 3), by the reference, in batches."""
    outputs = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        nodes = tuple(replace(n, type=replace(n.type, shape=(len(part), *n.type.shape[1:]))) for n in graph.nodes)
        int8 = graph.inputs[0].type.dtype == "int8"
        x = (part ^ np.uint8(0x80)).view(np.int8) if int8 else part.astype(np.float32)
        y = reference.run(graph.with_nodes(nodes), x)[0].astype(np.float64)
        if int8:
            params = graph.type_of(graph.outputs[0]).per_tensor
            y = (y - params.zero_point) * params.scale
        outputs.append(y)
    return np.concatenate(outputs)


def measure(
    network: str,
    name: str,
    result: Calibrated,
    expected: NDArray[np.float64],
    images: NDArray[np.uint8],
    seconds: float,
) -> Row:
    labels = np.arange(len(images)) % expected.shape[1]
    seen = logits(result.int8_graph, images)
    noise = float(((seen - expected) ** 2).sum())
    return Row(
        network=network,
        recipe=name,
        top1_float=float((expected.argmax(1) == labels).mean()),
        top1=float((seen.argmax(1) == labels).mean()),
        agreement=float((seen.argmax(1) == expected.argmax(1)).mean()),
        sqnr_db=10 * float(np.log10((expected**2).sum() / noise)),
        seconds=seconds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=256)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    model = zoo.load(arguments.model)
    size = model.input_spec.height
    healthy = fold_input(run_passes(model.graph, FLOAT_PASSES, verify), model.input_spec)
    calibration = [draw("calibration", i, size)[0] for i in range(arguments.calibration)]
    held_out = np.stack([draw("val", i, size)[0] for i in range(arguments.images)])
    expected = logits(healthy, held_out)
    rows = []
    print(
        "| network | calibration | top-1 float | top-1 int8 | agreement | SQNR, dB | s |\n|---|---|---|---|---|---|---|"
    )
    for network, graph in (("demo", healthy), ("ill-conditioned", ill_conditioned(healthy))):
        for name, preset, stages in STAGES:
            began = time.perf_counter()
            recipe: QuantRecipe = replace(PRESETS[preset], **stages)
            result = calibrate(graph, iter(calibration), recipe)
            row = measure(network, name, result, expected, held_out, time.perf_counter() - began)
            rows.append(row)
            print(
                f"| {row.network} | {row.recipe} | {row.top1_float:.2%} | {row.top1:.2%} | {row.agreement:.2%} "
                f"| {row.sqnr_db:.1f} | {row.seconds:.0f} |",
                flush=True,
            )
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
