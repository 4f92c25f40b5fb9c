"""From a float graph and a stream of images to the int8 graph: the stages of a recipe in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain, islice

from ..models import graph as ir
from ..models.preprocess import InputSpec
from .collect import collect
from .correct_bias import shift_bias
from .equalize import center, channel_ranges, equalize
from .images import Pixels
from .quantize import quantize
from .recipe import QuantRecipe
from .refine import refine
from .rounding import round_layer
from .table import CalibrationTable

HELD_IMAGES = 64  # the first ones, kept in memory for the stages that look at images more than once

Progress = Callable[[str, float], None]  # the stage, and how much of it is done, 0..1
Keep = Callable[[str, ir.Graph], None]  # the stage, and the graph after it


@dataclass(frozen=True, eq=False)
class Calibrated:
    """``float_graph`` is what ``table`` and ``int8_graph`` belong to: the given graph, equalized."""

    float_graph: ir.Graph
    int8_graph: ir.Graph
    table: CalibrationTable


def calibrate(
    graph: ir.Graph,
    images: Iterable[Pixels],
    recipe: QuantRecipe,
    spec: InputSpec | None = None,
    *,
    image_count: int = 0,
    progress: Progress = lambda stage, share: None,
    keep: Keep = lambda stage, graph: None,
) -> Calibrated:
    """Equalizes, observes, quantizes and refines as ``recipe`` says.

    Given: a float graph through the passes; ``images``, uint8 (H, W, C), are read once as a stream, ``image_count``
    of them as far as it is known; ``spec`` as for ``collect``; ``keep`` is shown the graph after each stage. Raises
    what the stages raise.
    """
    stream = iter(images)
    held = list(islice(stream, HELD_IMAGES))
    if held and (recipe.center or recipe.equalize_groups):
        progress("equalize", 0.0)
        ranges = channel_ranges(graph, held, spec)
        if recipe.center:
            graph, ranges = center(graph, ranges)
        if recipe.equalize_groups:
            graph = equalize(graph, ranges)
    if recipe.equalize and not recipe.equalize_groups:
        graph = equalize(graph)
    keep("equalize", graph)
    total = max(image_count, len(held), 1)
    table = collect(
        graph, chain(held, stream), recipe, spec, lambda done: progress("calibrate", min(done / total, 1.0))
    )
    progress("quantize", 0.0)
    int8_graph = quantize(graph, table, recipe)
    keep("quantize", int8_graph)
    steps = [
        step for step, wanted in ((round_layer, recipe.optimize_rounding), (shift_bias, recipe.correct_bias)) if wanted
    ]
    if steps:
        int8_graph = refine(graph, int8_graph, held, steps, spec, lambda share: progress("refine", share))
        keep("refine", int8_graph)
    return Calibrated(graph, int8_graph, table)
