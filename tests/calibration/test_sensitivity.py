"""The sensitivity report finds a planted culprit, and its figures are those of networks really run."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from support.float_graphs import drawn_images, random_xception

from xceptile.calibration.collect import OBSERVED, collect
from xceptile.calibration.quantize import quantize
from xceptile.calibration.recipe import PRESETS, QuantRecipe, Rule
from xceptile.calibration.sensitivity import measure_sensitivity
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models.preprocess import InputSpec
from xceptile.models.verify import verify
from xceptile.runtime import reference

SIZE = 40
RECIPE = PRESETS["min-max"]


@pytest.fixture(scope="module")
def graph():
    return fold_input(run_passes(random_xception(SIZE), FLOAT_PASSES, verify), InputSpec(SIZE, SIZE))


@pytest.fixture(scope="module")
def table(graph):
    return collect(graph, drawn_images(8, SIZE, 1), RECIPE)


@pytest.fixture(scope="module")
def rows(graph, table):
    return measure_sensitivity(graph, quantize(graph, table, RECIPE), drawn_images(10, SIZE, 2))


def test_every_layer_has_a_row_and_the_worst_comes_first(graph, rows):
    assert {row.name for row in rows} == {n.name for n in graph.nodes if isinstance(n.op, OBSERVED)}
    assert [row.sqnr_db for row in rows] == sorted(row.sqnr_db for row in rows)
    assert all(row.images == 10 for row in rows)
    assert all(row.path == row.name for row in rows)
    assert all(20 < row.sqnr_db < math.inf for row in rows)


def test_a_range_chosen_far_too_narrow_or_wide_comes_first(graph, table):
    for name, factor in (("blocks.1.sep0.pointwise", 0.05), ("blocks.0.add", 300.0)):
        seen = table.ranges[name]
        bad = replace(seen, low=seen.low * factor, high=seen.high * factor)
        if factor < 1:
            assert bad.low >= seen.minimum
        int8 = quantize(graph, replace(table, ranges={**table.ranges, name: bad}), RECIPE)
        rows = measure_sensitivity(graph, int8, drawn_images(6, SIZE, 2))
        # The tensor's maker and its readers, which share its parameters, are the worst.
        family = {name, *(n.name for n in graph.users(name)), "blocks.1.sep0.depthwise"}
        assert {row.name for row in rows[:2]} <= family
        (own,) = (row for row in rows if row.name == name)
        assert (own.clipped > 0.2) == (factor < 1)


def test_a_row_equals_the_mixed_network_with_that_layer_alone_in_int8(graph, table, rows):
    name = "blocks.2.sep1.pointwise"
    recipe = QuantRecipe("alone", (*RECIPE.rules, Rule("*", keep_float=True), Rule(name, keep_float=False)))
    mixed = quantize(graph, table, recipe)
    mixed = replace(mixed, outputs=("classifier",))  # the float logits, before their rounding
    # The float layers before see pixels, not the int8 input's real value: the same numbers here (scale 1).
    signal = noise = 0.0
    flips = 0
    for image in drawn_images(10, SIZE, 2):
        expected = reference.run(graph, image.astype(np.float32)[None])[0]
        seen = reference.run(mixed, (image ^ 0x80).view(np.int8)[None])[0]
        signal += float((expected.astype(np.float64) ** 2).sum())
        noise += float(((seen.astype(np.float64) - expected) ** 2).sum())
        flips += int(seen.argmax() != expected.argmax())
    row = next(r for r in rows if r.name == name)
    assert row.sqnr_db == pytest.approx(10 * math.log10(signal / noise), abs=0.05)
    assert row.flips == flips


def test_limits_and_clipped_share_are_those_of_the_output(graph, table):
    int8 = quantize(graph, table, RECIPE)
    images = drawn_images(3, SIZE, 9)
    done: list[int] = []
    row = next(
        r for r in measure_sensitivity(graph, int8, iter(images), progress=done.append) if r.name == "stem.conv1"
    )
    params = int8.type_of("stem.conv1").per_tensor
    assert (row.low, row.high) == (0.0, params.scale * 255)
    values = [
        dict(reference.iterate(graph, {"input": image.astype(np.float32)[None]}))["stem.conv1"] for image in images
    ]
    assert row.clipped == np.mean(np.stack(values) > row.high + params.scale / 2)
    assert done == [3]


def test_layers_kept_in_float_have_no_row(graph, table):
    recipe = QuantRecipe("mixed", (*RECIPE.rules, Rule("blocks.0.*", keep_float=True)))
    rows = measure_sensitivity(graph, quantize(graph, table, recipe), drawn_images(2, SIZE, 2))
    assert not any(row.name.startswith("blocks.0.") for row in rows)
