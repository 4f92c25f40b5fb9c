"""The quantizer keeps what it promises: parameters, bounds, domains, means without ties, mixed graphs, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support import scalar_contract as scalar
from support.float_graphs import FloatBuilder, drawn_images, random_xception

from xceptile.calibration import quantize as q
from xceptile.calibration.collect import collect
from xceptile.calibration.recipe import PRESETS, QuantRecipe, Rule
from xceptile.calibration.table import CalibrationError, CalibrationTable, TensorRange
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models.preprocess import InputSpec, normalize
from xceptile.models.verify import verify
from xceptile.runtime import reference

SIZE = 48
RECIPE = PRESETS["min-max"]


@pytest.fixture(scope="module")
def graph():
    network = run_passes(random_xception(SIZE), FLOAT_PASSES, verify)
    return fold_input(network, InputSpec(SIZE, SIZE))


@pytest.fixture(scope="module")
def table(graph):
    return collect(graph, drawn_images(8, SIZE, 1), RECIPE)


def pixels(image: np.ndarray) -> np.ndarray:
    return (image ^ 0x80).view(np.int8)[None]


def real(graph: ir.Graph, name: str, value: np.ndarray) -> np.ndarray:
    kind = graph.type_of(name).per_tensor
    return (value.astype(np.float64) - kind.zero_point) * kind.scale


# --- the whole network ---


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_logits_stay_close_to_float(graph, preset):
    recipe = PRESETS[preset]
    int8 = q.quantize(graph, collect(graph, drawn_images(8, SIZE, 1), recipe), recipe)
    verify(int8)
    for image in drawn_images(4, SIZE, 2):
        expected = reference.run(graph, image.astype(np.float32)[None])[0]
        seen = real(int8, int8.outputs[0], reference.run(int8, pixels(image))[0])
        clipped = 0.25 if preset == "moving-average" else 0.15  # which does not cover the extremes
        assert np.abs(seen - expected).max() < clipped * np.abs(expected).max()


def test_every_tensor_has_the_parameters_that_the_contract_asks_for(graph, table):
    int8 = q.quantize(graph, table, RECIPE)
    assert [n.name for n in int8.nodes] == [n.name for n in graph.nodes]
    assert [(n.op, n.path) for n in int8.nodes] == [(n.op, n.path) for n in graph.nodes]
    for node in int8.nodes:
        params = node.type.per_tensor
        assert params.scale == float(np.float32(params.scale))
        sources = [int8.type_of(n).per_tensor for n in node.inputs if n not in int8.constants]
        match node.op:
            case ir.Input():
                assert params == ir.PerTensor(1.0, -128)  # q = p - 128
            case ir.Relu():
                assert params == ir.PerTensor(sources[0].scale, -128)
            case ir.MaxPool2d():
                assert params == sources[0]
            case ir.Conv2d(relu=True) | ir.DepthwiseConv2d(relu=True):
                assert params.zero_point == -128
            case ir.GlobalAveragePool():
                assert q.mean_variants_agree(sources[0], params, 9)
        if node.name in table.ranges and not isinstance(node.op, ir.GlobalAveragePool):
            seen = table.ranges[node.name]
            assert real(int8, node.name, np.array(-128)) <= seen.low + params.scale
            assert real(int8, node.name, np.array(127)) >= seen.high - params.scale
    weights = [int8.constants[n.inputs[1]] for n in int8.nodes if isinstance(n.op, q.Weighted)]
    assert all(np.abs(w.data.astype(int)).max() == 127 for w in weights)


def test_quantization_is_deterministic(graph, table):
    a, b = q.quantize(graph, table, RECIPE), q.quantize(graph, table, RECIPE)
    assert a.nodes == b.nodes
    assert all(
        np.array_equal(a.constants[n].data, c.data) and a.constants[n].type == c.type for n, c in b.constants.items()
    )


def test_a_table_of_another_graph_is_refused(graph, table):
    ranges = {name: r for name, r in table.ranges.items() if name != "exit.mean"}
    with pytest.raises(CalibrationError, match=r"no range for exit\.mean") as error:
        q.quantize(graph, replace(table, ranges=ranges), RECIPE)
    assert error.value.tensor == "exit.mean"


def test_an_unfolded_graph_is_refused(table):
    with pytest.raises(ir.GraphError, match="run the graph passes first"):
        q.quantize(random_xception(SIZE), table, RECIPE)


def test_weights_that_are_not_finite_are_refused(graph, table):
    data = graph.constants["stem.conv2.weight"].data.copy()
    data[3, 1, 1, 2] = np.nan
    damaged = ir.Constant(graph.constants["stem.conv2.weight"].type, data)
    broken = graph.with_nodes(graph.nodes, {**graph.constants, "stem.conv2.weight": damaged})
    with pytest.raises(CalibrationError, match=r"weights of stem\.conv2") as error:
        q.quantize(broken, table, RECIPE)
    assert error.value.path == "stem.conv2"


# --- activations ---


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 255.0, ir.PerTensor(1.0, -128)),
        (3.0, 255.0, ir.PerTensor(1.0, -128)),  # zero is always within
        (-255.0, -3.0, ir.PerTensor(1.0, 127)),
        (-127.5, 127.5, ir.PerTensor(1.0, 0)),
        (-1.0, 254.0, ir.PerTensor(1.0, -127)),
    ],
)
def test_affine_parameters_cover_the_range_and_zero(low, high, expected):
    assert q.activation_params(low, high) == expected


def test_symmetric_parameters_have_zero_point_zero():
    assert q.activation_params(-3.0, 254.0, "symmetric") == ir.PerTensor(2.0, 0)


def test_a_range_below_float32_is_refused():
    with pytest.raises(CalibrationError, match="too narrow"):
        q.activation_params(0.0, 1e-44)


def test_symmetric_rules_reach_the_layers_they_name(graph, table):
    recipe = QuantRecipe("s", (*RECIPE.rules, Rule("blocks.0.*", scheme="symmetric")))
    int8 = q.quantize(graph, table, recipe)
    verify(int8)
    for node in int8.nodes:
        own = isinstance(node.op, ir.Conv2d | ir.DepthwiseConv2d | ir.Add)
        if node.path.startswith("blocks.0.") and own:
            assert node.type.per_tensor.zero_point == 0


def test_the_pixel_table_is_the_rounded_preprocessing():
    spec = InputSpec(8, 8, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    ends = normalize(np.array([[[0] * 3, [255] * 3]], np.uint8), spec)
    params = q.activation_params(float(ends.min()), float(ends.max()))
    table = np.asarray(q.pixel_encoding(spec, params).table, np.int8)
    assert table.shape == (256, 3)
    for channel in range(3):
        back = (table[:, channel].astype(np.float64) - params.zero_point) * params.scale
        exact = (np.arange(256) / 255 - spec.mean[channel]) / spec.std[channel]
        assert np.abs(back - exact).max() <= params.scale / 2 * 1.001


# --- weights, bias and the accumulator ---


def layer(weights: np.ndarray, bias: np.ndarray, s_in: float = 0.1, s_out: float = 0.1):
    return q.quantize_weights(weights.astype(np.float32), bias.astype(np.float32), 0, s_in, s_out)


def test_weights_and_bias_round_to_the_nearest_step():
    rng = np.random.default_rng(0)
    weights, bias = rng.normal(size=(5, 40)), rng.normal(size=5)
    w, b = layer(weights, bias)
    scales = np.array(w.type.per_axis.scales)
    assert np.abs(w.data).max(axis=1).tolist() == [127] * 5
    assert np.abs(w.data * scales[:, None] - weights).max(axis=1) == pytest.approx(scales / 2, rel=0.2)
    assert np.abs(b.data * np.array(b.type.per_axis.scales) - bias).max() <= max(b.type.per_axis.scales) / 2 * 1.001
    assert b.type.per_axis.scales == tuple(float(np.float32(np.float32(0.1) * np.float32(s))) for s in scales)


@pytest.mark.parametrize("magnitude", [0.0, 1e-30, 1e-12, 1e-7])
def test_a_dead_channel_s_bias_is_kept_and_not_saturated(magnitude):
    weights = np.ones((2, 9))
    weights[1] *= magnitude
    bias = np.array([0.5, 3.75])
    _, b = layer(weights, bias)
    back = b.data * np.array(b.type.per_axis.scales, np.float64)
    np.testing.assert_allclose(back, bias, rtol=1e-3)
    assert (np.abs(b.data.astype(np.int64)) <= q.BIAS_LIMIT).all()
    saturated = np.clip(bias[1] / (0.1 * max(magnitude, 1e-30) / 127), -(2**31), 2**31) * 0.1 * magnitude / 127
    assert magnitude == 1e-7 or abs(saturated - bias[1]) > 0.1  # what a quantizer without the guard would make of it


def test_a_channel_of_zeros_without_bias_is_representable():
    w, b = layer(np.zeros((1, 4)), np.zeros(1))
    assert w.type.per_axis.scales[0] > 0
    assert not w.data.any()
    assert not b.data.any()


def test_the_accumulator_bound_holds_for_the_worst_input_and_is_restored_where_broken():
    weights = np.ones((2, 70_000), np.float32)  # 70,000 * 127 * 256 > 2**31
    w, b = layer(weights, np.zeros(2))
    assert q.accumulator_bound(w, b, 0).max() < 2**31
    assert w.data.max() == 64  # the scale was doubled once
    broken = q.round_weights(weights, np.zeros(2, np.float32), 0, 0.1, np.float32([1 / 127] * 2))
    assert q.accumulator_bound(*broken, 0).max() >= 2**31


def test_a_quantized_layer_never_leaves_int32_on_the_worst_inputs(graph, table):
    int8 = q.quantize(graph, table, RECIPE)
    for node in int8.nodes:
        if isinstance(node.op, q.Weighted):
            w, b = (int8.constants[n] for n in node.inputs[1:])
            z = int8.type_of(node.inputs[0]).per_tensor.zero_point
            axis = ir.channel_axis(node.op)
            flat = np.moveaxis(w.data.astype(np.int64), axis, 0).reshape(w.data.shape[axis], -1)
            worst = np.where(flat > 0, 127 - z, -128 - z)
            assert (np.abs((flat * worst).sum(1) + b.data) <= q.accumulator_bound(w, b, axis)).all()


# --- domains of ratios ---


def test_an_addition_that_nearly_cancels_stays_in_the_domain():
    builder = FloatBuilder(np.random.default_rng(0).normal(size=(1, 4, 4, 3)))
    builder.add("sum", builder.conv("a", "input", 3), builder.conv("b", "input", 3))
    graph = builder.graph()
    for ratio, of_b in ((1e-5, 1.0), (1e5, 1.0), (1.0, 1e-5), (1e-5, 1e-5)):
        ranges = {
            "input": TensorRange(-1, 1, -1, 1),
            "a": TensorRange(-1, 1, -1, 1),
            "b": TensorRange(-of_b, of_b, -of_b, of_b),
            "sum": TensorRange(-ratio, ratio, -ratio, ratio),
        }
        int8 = q.quantize(graph, CalibrationTable(ranges, 1, ""), RECIPE)
        verify(int8)
        reference.run(int8, np.zeros((1, 4, 4, 3), np.int8))  # asserts the domain


def test_a_layer_that_shrinks_or_grows_enormously_stays_in_the_domain():
    builder = FloatBuilder(np.random.default_rng(0).normal(size=(1, 4, 4, 3)))
    builder.conv("y", "input", 3)
    for magnitude in (1e-20, 1e-6, 1e6, 1e20):
        wide = TensorRange(-magnitude, magnitude, -magnitude, magnitude)
        ranges = {"input": TensorRange(-1, 1, -1, 1), "y": wide}
        int8 = q.quantize(builder.graph(), CalibrationTable(ranges, 1, ""), RECIPE)
        reference.run(int8, np.zeros((1, 4, 4, 3), np.int8))


# --- means without ties ---


def agree_one_by_one(source: ir.PerTensor, target: ir.PerTensor, pixel_count: int) -> bool:
    """``mean_variants_agree`` in exact rationals, sum by sum."""
    arguments = source.scale, target.scale, pixel_count, target.zero_point
    sums = range((-128 - source.zero_point) * pixel_count, (127 - source.zero_point) * pixel_count + 1)
    return all(
        scalar.mean_output(total, *arguments)
        == scalar.mean_output_separate(total, *arguments)
        == scalar.mean_output_fused(total, *arguments)
        for total in sums
    )


@pytest.mark.parametrize("pixel_count", [1, 4])
def test_the_search_for_ties_equals_exact_rationals(pixel_count):
    rng, found = np.random.default_rng(3), set()
    for _ in range(12):
        source = ir.PerTensor(q.f32(rng.uniform(0.02, 0.1)), int(rng.choice([-128, -7, 0])))
        ratio = rng.choice([1.0, 0.5, 2.0, rng.uniform(0.3, 2)])
        target = ir.PerTensor(q.f32(source.scale * ratio), int(rng.choice([-128, -31, 5])))
        expected = agree_one_by_one(source, target, pixel_count)
        assert q.mean_variants_agree(source, target, pixel_count) == expected
        found.add(expected)
    assert found == {True, False} or pixel_count == 1


def test_a_scale_with_ties_is_nudged_as_little_as_needed():
    # Half steps everywhere: sums of 4 pixels at equal scales, odd zero point.
    source, wanted = ir.PerTensor(0.05000000074505806, -128), ir.PerTensor(0.05000000074505806, -127)
    assert not q.mean_variants_agree(source, wanted, 4)
    found = q.tie_free_params(source, wanted, 4)
    assert q.mean_variants_agree(source, found, 4)
    assert agree_one_by_one(source, found, 4)
    assert found.zero_point == wanted.zero_point
    assert wanted.scale < found.scale < wanted.scale * 1.0001


def test_a_10x10_mean_after_relu_is_free_of_ties_for_any_scales():
    rng = np.random.default_rng(4)
    at_once = 0
    for _ in range(30):
        source = ir.PerTensor(q.f32(rng.uniform(0.01, 0.1)), -128)
        wanted = ir.PerTensor(q.f32(source.scale * rng.uniform(0.1, 1)), -128)
        at_once += q.mean_variants_agree(source, wanted, 100)
        assert q.mean_variants_agree(source, q.tie_free_params(source, wanted, 100), 100)
    assert 10 < at_once < 30


def test_the_search_gives_up_with_a_reason():
    source = ir.PerTensor(0.05000000074505806, -128)
    with pytest.raises(CalibrationError, match="free of ties"):
        q.tie_free_params(source, replace(source, zero_point=-127), 4, tries=1)


# --- mixed graphs ---


def test_layers_kept_in_float_stand_between_conversions(graph, table):
    recipe = QuantRecipe("mixed", (*RECIPE.rules, Rule("blocks.0.sep0.*", keep_float=True)))
    mixed = q.quantize(graph, table, recipe)
    verify(mixed)
    floats = {n.name for n in mixed.nodes if n.type.dtype == "float32"}
    assert floats == {"stem.conv2.float", "blocks.0.sep0.depthwise", "blocks.0.sep0.pointwise"}
    assert mixed.node("blocks.0.sep0.pointwise.int8").op == ir.Quantize()
    image = drawn_images(1, SIZE, 2)[0]
    expected = reference.run(graph, image.astype(np.float32)[None])[0]
    seen = real(mixed, mixed.outputs[0], reference.run(mixed, pixels(image))[0])
    assert np.abs(seen - expected).max() < 0.15 * np.abs(expected).max()


def test_everything_in_float_is_the_float_network_up_to_its_last_rounding(graph, table):
    recipe = QuantRecipe("float", (*RECIPE.rules, Rule("*", keep_float=True)))
    mixed = q.quantize(graph, table, recipe)
    verify(mixed)
    (output,) = mixed.outputs
    assert output == "classifier.int8"
    for image in drawn_images(3, SIZE, 1):
        expected = reference.run(graph, image.astype(np.float32)[None])[0]
        seen = real(mixed, output, reference.run(mixed, pixels(image))[0])
        assert np.abs(seen - expected).max() <= mixed.type_of(output).per_tensor.scale * 0.51


def test_a_tensor_read_by_both_kinds_is_converted_once(graph, table):
    recipe = QuantRecipe("mixed", (*RECIPE.rules, Rule("blocks.1.shortcut.*", keep_float=True), Rule("blocks.1.relu0")))
    mixed = q.quantize(graph, table, recipe)
    verify(mixed)
    conversions = [n.name for n in mixed.nodes if isinstance(n.op, ir.Quantize | ir.Dequantize)]
    assert conversions == ["blocks.0.add.float", "blocks.1.shortcut.conv.int8"]
