"""Bias correction, rounding and the order of all stages: each does what it claims on data it has not seen."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.float_graphs import FloatBuilder, drawn_images, random_xception

from xceptile.calibration import rounding
from xceptile.calibration.calibrate import HELD_IMAGES, calibrate
from xceptile.calibration.collect import collect
from xceptile.calibration.correct_bias import shift_bias
from xceptile.calibration.equalize import center, channel_ranges, equalize
from xceptile.calibration.quantize import quantize, round_weights
from xceptile.calibration.recipe import PRESETS, QuantRecipe, Rule
from xceptile.calibration.refine import Layer, refine
from xceptile.calibration.rounding import round_layer
from xceptile.calibration.table import CalibrationError
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models.preprocess import InputSpec
from xceptile.models.verify import verify
from xceptile.runtime import reference

SIZE = 40
RECIPE = PRESETS["min-max"]
SPEC = InputSpec(SIZE, SIZE)


@pytest.fixture(scope="module")
def graph():
    return fold_input(run_passes(random_xception(SIZE), FLOAT_PASSES, verify), SPEC)


@pytest.fixture(scope="module")
def images():
    return drawn_images(12, SIZE, 1)


@pytest.fixture(scope="module")
def int8(graph, images):
    return quantize(graph, collect(graph, images, RECIPE), RECIPE)


def correct_bias(graph: ir.Graph, int8: ir.Graph, images: list[np.ndarray], spec: InputSpec | None = None) -> ir.Graph:
    return refine(graph, int8, images, [shift_bias], spec)


def optimize_rounding(graph: ir.Graph, int8: ir.Graph, images: list[np.ndarray]) -> ir.Graph:
    return refine(graph, int8, images, [round_layer])


def pixels(image: np.ndarray) -> np.ndarray:
    return (image ^ 0x80).view(np.int8)[None]


def layer_means(graph: ir.Graph, int8: ir.Graph, images: list[np.ndarray]) -> dict[str, np.ndarray]:
    """The largest difference of a channel's mean between the two networks, in int8 steps, by layer without ReLU."""
    names = [n.name for n in int8.nodes if isinstance(n.op, ir.Conv2d | ir.FullyConnected) and not n.op.relu]
    sums = dict.fromkeys(names, 0.0)
    for image in images:
        expected = dict(reference.iterate(graph, {"input": image.astype(np.float32)[None]}))
        seen = dict(reference.iterate(int8, {"input": pixels(image)}))
        for name in names:
            q = int8.type_of(name).per_tensor
            real = (seen[name].astype(np.float64) - q.zero_point) * q.scale
            sums[name] += ((real - expected[name]) / q.scale).reshape(-1, real.shape[-1]).mean(axis=0)
    return {name: total / len(images) for name, total in sums.items()}


def shifted(int8: ir.Graph, layer: str, steps: int) -> ir.Graph:
    """A layer's bias moved by so many output steps."""
    node = int8.node(layer)
    constant = int8.constants[node.inputs[2]]
    moved = constant.data + np.rint(steps * node.type.per_tensor.scale / np.array(constant.type.per_axis.scales))
    return int8.with_nodes(
        int8.nodes, {**int8.constants, node.inputs[2]: ir.Constant(constant.type, moved.astype(np.int32))}
    )


def test_bias_correction_takes_back_a_planted_shift(graph, int8, images):
    layer = "blocks.2.sep0.pointwise"
    damaged = shifted(int8, layer, 5)
    assert np.abs(layer_means(graph, damaged, images)["blocks.2.sep2.pointwise"]).max() > 0.5
    repaired = correct_bias(graph, damaged, images)
    verify(repaired)
    before, after = layer_means(graph, damaged, images), layer_means(graph, repaired, images)
    unclipped = [n for n in before if n not in ("blocks.0.sep1.pointwise", "blocks.1.sep1.pointwise")]
    assert all(np.abs(after[name]).max() < 0.25 for name in unclipped)
    a, b = (g.constants[g.node(layer).inputs[2]].data.astype(np.int64) for g in (int8, repaired))
    scale = int8.node(layer).type.per_tensor.scale / np.array(
        int8.constants[int8.node(layer).inputs[2]].type.per_axis.scales
    )
    assert np.abs(a - b).max() < np.max(scale)  # within one output step of the undamaged bias


def test_bias_correction_changes_biases_alone_and_is_deterministic(graph, int8, images):
    a, b = correct_bias(graph, int8, images[:4]), correct_bias(graph, int8, images[:4])
    assert a.nodes == int8.nodes
    for name, constant in int8.constants.items():
        assert np.array_equal(a.constants[name].data, b.constants[name].data)
        if constant.type.dtype == "int8":
            assert np.array_equal(a.constants[name].data, constant.data)


def output_error(graph: ir.Graph, weights: ir.Graph, layer: str, images: list[np.ndarray]) -> float:
    """The variance, over positions, of a layer's output error that its int8 weights make on the float inputs."""
    twin, node = graph.node(layer), weights.node(layer)
    constant = weights.constants[node.inputs[1]]
    shape = [1] * constant.data.ndim
    shape[constant.type.per_axis.axis] = -1
    real = (constant.data * np.array(constant.type.per_axis.scales).reshape(shape)).astype(np.float32)
    total = 0.0
    for image in images:
        x = dict(reference.iterate(graph, {"input": image.astype(np.float32)[None]}))[twin.inputs[0]]
        w, b = (graph.constants[n].data for n in twin.inputs[1:])
        difference = reference.run_node(graph, twin, [x, real - w, np.zeros_like(b)])
        total += float(difference.reshape(-1, difference.shape[-1]).var(axis=0).sum())
    return total


def coarse(int8: ir.Graph, graph: ir.Graph, layer: str, bits: int) -> ir.Graph:
    """One layer's weights at fewer bits: a larger scale, rounded to the nearest."""
    node, twin = int8.node(layer), graph.node(layer)
    constant, bias = (int8.constants[n] for n in node.inputs[1:])
    s_in = int8.type_of(node.inputs[0]).per_tensor.scale
    scales = np.array(constant.type.per_axis.scales, np.float32) * np.float32(2.0 ** (8 - bits))
    w, b = (graph.constants[n].data for n in twin.inputs[1:])
    made = round_weights(w, b, constant.type.per_axis.axis, s_in, scales)
    assert made[1].data.shape == bias.data.shape
    return int8.with_nodes(int8.nodes, {**int8.constants, **dict(zip(node.inputs[1:], made, strict=True))})


@pytest.mark.parametrize("layer", ["stem.conv2", "blocks.1.sep0.depthwise", "blocks.2.sep1.pointwise"])
def test_rounding_lowers_the_layer_s_output_error_on_unseen_images(graph, int8, images, layer, monkeypatch):
    # At 4 bits, where rounding matters; at 8 it is below the activations' noise.
    monkeypatch.setattr(rounding, "WEIGHT_MAX", 8)
    start = coarse(int8, graph, layer, 4)
    assert np.abs(start.constants[start.node(layer).inputs[1]].data).max() <= 8

    def round_it(each: Layer) -> tuple[ir.Constant, ir.Constant]:
        return round_layer(each) if each.node.name == layer else (each.int8_weights, each.int8_bias)

    refined = refine(graph, start, images, [round_it])
    unseen = drawn_images(4, SIZE, 3)
    nearest, optimized = (output_error(graph, g, layer, unseen) for g in (start, refined))
    assert optimized < 0.9 * nearest


def test_rounding_moves_most_weights_by_a_step_at_most_and_stays_symmetric(graph, int8, images):
    refined = optimize_rounding(graph, int8, images[:4])
    verify(refined)
    assert refined.nodes == int8.nodes
    moved = 0
    for name, constant in int8.constants.items():
        if constant.type.dtype == "int8":
            steps = np.abs(refined.constants[name].data.astype(int) - constant.data)
            moved += int((steps > 0).sum())
            assert np.mean(steps <= 1) > 0.95
    assert moved > 100


def test_error_feedback_solves_what_one_column_at_a_time_cannot():
    # Two perfectly correlated inputs and weights of half a step each: nearest gives 0 + 0 (or 1 + 1), the sum wants 1.
    moments = np.array([[[1.0, 0.999], [0.999, 1.0]]])
    steps = np.array([[[0.45, 0.45]]])
    assert sorted(rounding._solve(steps, moments)[0, 0]) == [0, 1]


def test_an_adjustment_that_breaks_the_accumulator_is_not_taken(graph, int8, images):
    def overflow(layer: Layer) -> tuple[ir.Constant, ir.Constant]:
        return layer.int8_weights, ir.Constant(layer.int8_bias.type, np.full_like(layer.int8_bias.data, 2**31 - 1))

    refined = refine(graph, int8, images[:1], [overflow])
    assert all(np.array_equal(refined.constants[n].data, c.data) for n, c in int8.constants.items())


@pytest.mark.parametrize("method", [correct_bias, optimize_rounding])
def test_mixed_graphs_are_refined_where_they_are_int8(graph, images, method):
    recipe = QuantRecipe(
        "mixed", (*RECIPE.rules, Rule("blocks.*", keep_float=True), Rule("blocks.1.*", keep_float=False))
    )
    mixed = quantize(graph, collect(graph, images, recipe), recipe)
    refined = method(graph, mixed, images[:3])
    verify(refined)
    for name, constant in mixed.constants.items():
        if constant.type.dtype == "float32":
            assert np.array_equal(refined.constants[name].data, constant.data)


def test_a_network_with_normalised_input_is_refined_through_its_table(images):
    builder = FloatBuilder(np.zeros((1, SIZE, SIZE, 3)), seed=3)
    builder.values["input"] = np.stack(images[:1]).astype(np.float32) / 127.5 - 1
    builder.linear(
        "fc", builder.mean("gap", builder.relu("relu", builder.conv("conv", "input", 6, 3, 2, (0, 1, 0, 1)))), 4
    )
    padded = run_passes(builder.graph(), FLOAT_PASSES, verify)
    int8 = quantize(padded, collect(padded, images, RECIPE, SPEC), RECIPE)
    refined = correct_bias(padded, int8, images, SPEC)
    a, b = (g.constants["conv.bias"] for g in (int8, refined))
    steps = np.abs(a.data - b.data) * np.array(a.type.per_axis.scales) / int8.type_of("conv").per_tensor.scale
    assert steps.max() < 2  # the wrong input would ask for a large correction


# --- the stages together ---


def test_the_stages_run_in_their_order(graph, images):
    recipe = replace(RECIPE, center=True, equalize_groups=True, optimize_rounding=True, correct_bias=True)
    seen: list[str] = []
    result = calibrate(graph, iter(images), recipe, image_count=12, progress=lambda stage, share: seen.append(stage))
    assert list(dict.fromkeys(seen)) == ["equalize", "calibrate", "quantize", "refine"]
    equalized = equalize(*center(graph, channel_ranges(graph, images)))
    table = collect(equalized, images, recipe)
    assert result.table == table
    expected = refine(equalized, quantize(equalized, table, recipe), images, [round_layer, shift_bias])
    assert result.int8_graph.nodes == expected.nodes
    for name, constant in expected.constants.items():
        assert np.array_equal(result.int8_graph.constants[name].data, constant.data)


def test_no_stage_is_plain_quantization(graph, images):
    recipe = replace(RECIPE, equalize=False)
    result = calibrate(graph, images, recipe)
    assert result.float_graph is graph
    assert result.int8_graph.nodes == quantize(graph, collect(graph, images, recipe), recipe).nodes


def test_more_images_than_are_held_are_all_observed(graph):
    count = HELD_IMAGES + 3
    result = calibrate(graph, iter(drawn_images(count, SIZE)), RECIPE)
    assert result.table.image_count == count


def test_an_empty_stream_is_refused_by_every_recipe(graph):
    for recipe in (RECIPE, replace(RECIPE, equalize_groups=True, correct_bias=True)):
        with pytest.raises(CalibrationError, match="no calibration images"):
            calibrate(graph, iter(()), recipe)
