"""Calibration: ranges of the float network over a stream of images, the images' hash, and clear refusals."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from support.float_graphs import FloatBuilder, drawn_images, random_xception

from xceptile.calibration.collect import OBSERVED, collect, observed_tensors
from xceptile.calibration.observers import MovingAverage
from xceptile.calibration.quantize import quantize
from xceptile.calibration.recipe import PRESETS, QuantRecipe, Rule
from xceptile.calibration.table import CalibrationError, CalibrationTable, TensorRange, table_from_json
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models.preprocess import InputSpec, normalize
from xceptile.models.verify import verify
from xceptile.runtime import reference

SPEC = InputSpec(32, 32)
RECIPE = PRESETS["min-max"]


@pytest.fixture(scope="module")
def graph():
    return run_passes(random_xception(32), FLOAT_PASSES, verify)


@pytest.fixture(scope="module")
def images():
    return drawn_images(6, 32)


def test_ranges_are_those_of_the_float_interpreter(graph, images):
    table = collect(graph, images, RECIPE, SPEC)
    seen: dict[str, list[np.ndarray]] = {}
    for image in images:
        for name, value in reference.iterate(graph, {"input": normalize(image, SPEC)[None]}):
            seen.setdefault(name, []).append(value)
    observed = [node.name for node in graph.nodes if isinstance(node.op, OBSERVED)]
    assert set(table.ranges) == {"input", *observed}
    pooled = {"blocks.0.sep1.pointwise": "blocks.0.pool", "blocks.1.sep1.pointwise": "blocks.1.pool"}
    for name in observed:
        where = pooled.get(name, name)
        low, high = float(np.min(seen[where])), float(np.max(seen[where]))
        assert table.ranges[name] == TensorRange(low, high, low, high)


def test_a_tensor_is_observed_behind_the_pooling_or_relu_that_alone_reads_it():
    builder = FloatBuilder(np.random.default_rng(0).normal(size=(1, 8, 8, 3)))
    builder.max_pool("pool", builder.relu("relu", builder.conv("both", "input", 4)))
    builder.max_pool("another pool", builder.conv("read twice", "input", 4))
    builder.add("sum", "pool", "another pool")
    builder.append("tail", ir.MaxPool2d((8, 8), (8, 8), (0,) * 4), ("read twice",), {})
    graph = builder.graph("sum", "tail")
    assert observed_tensors(graph) == {"pool": "both", "read twice": "read twice", "sum": "sum"}
    assert observed_tensors(builder.graph("sum", "tail", "relu")) == {
        "relu": "both",
        "read twice": "read twice",
        "sum": "sum",
    }


def test_what_a_pooling_drops_is_clipped_without_harm(graph, images):
    table = collect(graph, images, RECIPE, SPEC)
    int8 = quantize(graph, table, RECIPE)
    name = "blocks.0.sep1.pointwise"
    lowest = min(
        float(dict(reference.iterate(graph, {"input": normalize(image, SPEC)[None]}))[name].min()) for image in images
    )
    params = int8.type_of(name).per_tensor
    assert lowest < params.scale * (-128 - params.zero_point) - params.scale  # is clipped
    assert int8.type_of("blocks.0.pool").per_tensor == params


def test_the_input_range_is_known_and_not_observed(graph, images):
    assert collect(graph, images[:1], RECIPE, SPEC).ranges["input"] == TensorRange(-1, 1, -1, 1)
    assert collect(graph, images[:1], RECIPE).ranges["input"] == TensorRange(0, 255, 0, 255)


def test_a_stream_is_read_once_counted_hashed_and_reported(graph, images):
    done: list[int] = []
    table = collect(graph, iter(images), RECIPE, SPEC, done.append)
    assert done == [1, 2, 3, 4, 5, 6]
    assert table.image_count == 6
    assert table.images_sha256 == hashlib.sha256(b"".join(i.tobytes() for i in images)).hexdigest()
    assert collect(graph, images[::-1], RECIPE, SPEC).images_sha256 != table.images_sha256


def test_the_rules_choose_each_layer_s_observer(graph, images):
    recipe = QuantRecipe("mixed", (*RECIPE.rules, Rule("stem.*", observer=MovingAverage(1.0))))
    mixed, plain = collect(graph, images, recipe, SPEC), collect(graph, images, RECIPE, SPEC)
    last = collect(graph, images[-1:], RECIPE, SPEC)  # a moving average of weight 1 forgets all but the last
    for name, seen in mixed.ranges.items():
        expected = (last if name.startswith("stem.") else plain).ranges[name]
        assert (seen.low, seen.high) == (expected.low, expected.high)
        assert (seen.minimum, seen.maximum) == (plain.ranges[name].minimum, plain.ranges[name].maximum)


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_is_deterministic(graph, images, name):
    assert collect(graph, images, PRESETS[name], SPEC) == collect(graph, list(images), PRESETS[name], SPEC)


def test_the_table_survives_json_exactly(graph, images):
    table = collect(graph, images, PRESETS["mse"], SPEC)
    assert table_from_json(json.loads(json.dumps(table.to_json()))) == table


@pytest.mark.parametrize(
    "damage",
    [
        lambda v: v.pop("schema"),
        lambda v: v.pop("images"),
        lambda v: v["ranges"].update(x={"low": 1.0}),
        lambda v: v["ranges"].update(x={"low": 1, "high": 0, "minimum": 0, "maximum": 1}),
        lambda v: v["ranges"].update(x={"low": 0, "high": float("nan"), "minimum": 0, "maximum": 1}),
        lambda v: v["ranges"].update(x=None),
    ],
)
def test_a_damaged_table_is_refused(damage):
    values = CalibrationTable({"x": TensorRange(0, 1, 0, 1)}, 1, "00").to_json()
    damage(values)
    with pytest.raises(CalibrationError):
        table_from_json(values)


def test_no_image_is_refused(graph):
    with pytest.raises(CalibrationError, match="there are no calibration images"):
        collect(graph, iter(()), RECIPE, SPEC)


@pytest.mark.parametrize("image", [np.zeros((31, 32, 3), np.uint8), np.zeros((32, 32, 3), np.float32)])
def test_an_image_of_another_form_is_refused_by_its_number(graph, images, image):
    with pytest.raises(CalibrationError, match=r"calibration image 2 is .*, the network takes uint8\[32, 32, 3\]"):
        collect(graph, [*images[:2], image], RECIPE, SPEC)


def broken(value: float) -> ir.Graph:
    """A network whose second layer's bias is ``value`` and whose weights are zero."""
    builder = FloatBuilder(np.zeros((1, 8, 8, 3)))
    builder.relu("relu", builder.conv("features.first", "input", 4))
    node = builder.nodes[1]
    builder.append(
        "features.second",
        ir.Conv2d((1, 1), (0,) * 4),
        ("relu",),
        {"weight": np.zeros((2, 1, 1, 4)), "bias": [value] * 2},
    )
    assert node.path == "features.first"
    return builder.graph()


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "infinity"), (-np.inf, "infinity")])
def test_an_activation_that_is_not_finite_is_refused_by_its_path(value, what):
    with pytest.raises(
        CalibrationError, match=rf"features\.second \(features\.second\) holds {what} .* image 0"
    ) as error:
        collect(broken(value), drawn_images(2, 8), RECIPE)
    assert (error.value.tensor, error.value.path) == ("features.second", "features.second")


def test_a_constant_activation_is_refused_by_its_path():
    with pytest.raises(CalibrationError, match=r"features\.second .* is 0\.5 everywhere") as error:
        collect(broken(0.5), drawn_images(2, 8), RECIPE)
    assert error.value.path == "features.second"
