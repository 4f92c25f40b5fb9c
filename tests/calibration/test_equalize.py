"""Equalization: an identity in float, and worth it in int8 where channels differ by orders of magnitude."""

from __future__ import annotations

import numpy as np
import pytest
from support.float_graphs import FloatBuilder, drawn_images, random_xception

from xceptile.calibration.collect import collect
from xceptile.calibration.equalize import (
    center,
    channel_ranges,
    equalizable_groups,
    equalizable_pairs,
    equalize,
    rescale,
)
from xceptile.calibration.quantize import quantize
from xceptile.calibration.recipe import PRESETS
from xceptile.compile.passes.fold_input import fold_input
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models.preprocess import InputSpec
from xceptile.models.rewrite import float_constant
from xceptile.models.verify import verify
from xceptile.runtime import reference

SIZE = 40


@pytest.fixture(scope="module")
def graph():
    network = run_passes(random_xception(SIZE), FLOAT_PASSES, verify)
    return fold_input(network, InputSpec(SIZE, SIZE))


def ill_conditioned(graph: ir.Graph, spread: float = 2.0) -> ir.Graph:
    """The same function, depthwise channels scaled by random factors and pointwise weights by their inverses."""
    rng, constants = np.random.default_rng(5), dict(graph.constants)
    for group in equalizable_pairs(graph):
        (depthwise,), (reader,) = group.producers, group.readers
        factors = np.exp(rng.normal(0, spread, depthwise.type.shape[-1]))
        for name in depthwise.inputs[1:]:
            constants[name] = float_constant(constants[name].data * factors)
        constants[reader.inputs[1]] = float_constant(constants[reader.inputs[1]].data / factors)
    return graph.with_nodes(graph.nodes, constants)


def signal_to_noise_db(graph: ir.Graph) -> float:
    """Of the int8 network's logits over the float network's."""
    recipe = PRESETS["min-max"]
    int8 = quantize(graph, collect(graph, drawn_images(8, SIZE, 1), recipe), recipe)
    q = int8.type_of(int8.outputs[0]).per_tensor
    signal = noise = 0.0
    for image in drawn_images(8, SIZE, 2):
        expected = reference.run(graph, image.astype(np.float32)[None])[0]
        seen = reference.run(int8, (image ^ 0x80).view(np.int8)[None])[0]
        signal += float((expected**2).sum())
        noise += float((((seen.astype(np.float64) - q.zero_point) * q.scale - expected) ** 2).sum())
    return 10 * np.log10(signal / noise)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_equalization_is_an_identity_in_float(graph, spread):
    before = ill_conditioned(graph, spread)
    after = equalize(before)
    verify(after)
    assert [node.op for node in after.nodes] == [node.op for node in before.nodes]
    for image in drawn_images(3, SIZE):
        x = image.astype(np.float32)[None]
        np.testing.assert_allclose(reference.run(after, x)[0], reference.run(before, x)[0], rtol=1e-4, atol=1e-5)


def test_equalization_undoes_most_of_what_scaling_did(graph):
    bad = ill_conditioned(graph, spread=2.0)
    repaired, good = equalize(bad), equalize(graph)
    for group in equalizable_pairs(graph):
        a, b, c = (
            np.abs(g.constants[group.producers[0].inputs[1]].data).max(axis=(0, 1)) for g in (good, bad, repaired)
        )
        assert np.std(np.log(b / a)) > 1.2
        assert np.std(np.log(c / a)) < 0.6


def test_an_ill_conditioned_network_is_ruined_without_and_saved_with(graph):
    healthy, bad = signal_to_noise_db(graph), ill_conditioned(graph)
    assert signal_to_noise_db(bad) < healthy - 10
    assert signal_to_noise_db(equalize(bad)) > healthy - 3


def badly_normalized(graph: ir.Graph) -> ir.Graph:
    """The same function, the channels of every activation that can be rescaled spread over orders of magnitude."""
    rng = np.random.default_rng(6)
    for group in equalizable_groups(graph):
        channels = group.producers[0].type.shape[-1]
        graph = rescale(graph, group, np.exp(rng.normal(0, 1.5, channels)))
    return graph


@pytest.fixture(scope="module")
def measured(graph):
    bad = badly_normalized(graph)
    return bad, channel_ranges(bad, drawn_images(4, SIZE, 1))


def test_ranges_are_channel_extremes_over_images(measured):
    bad, ranges = measured
    seen = np.concatenate(
        [
            dict(reference.iterate(bad, {"input": image.astype(np.float32)[None]}))["blocks.1.add"]
            for image in drawn_images(4, SIZE, 1)
        ]
    )
    np.testing.assert_array_equal(ranges["blocks.1.add"], (seen.min(axis=(0, 1, 2)), seen.max(axis=(0, 1, 2))))
    assert "blocks.1.relu0" not in ranges  # has its input's scale


def test_centring_is_an_identity_that_halves_lopsided_ranges(graph):
    images = drawn_images(4, SIZE, 1)
    ranges = channel_ranges(graph, images)
    centred, moved = center(graph, ranges)
    verify(centred)
    for image in drawn_images(3, SIZE):
        x = image.astype(np.float32)[None]
        np.testing.assert_allclose(reference.run(centred, x)[0], reference.run(graph, x)[0], rtol=1e-4, atol=1e-5)
    shifted = [name for name in ranges if not np.array_equal(ranges[name][0], moved[name][0])]
    assert set(shifted) == {group.tensors[0] for group in equalizable_pairs(graph)}
    seen = channel_ranges(centred, images)
    for name in shifted:
        np.testing.assert_allclose(seen[name][0], moved[name][0], atol=1e-3)
        np.testing.assert_allclose(moved[name][0], -moved[name][1], atol=1e-6)


def test_what_a_padded_convolution_reads_is_not_shifted():
    builder = FloatBuilder(np.random.default_rng(0).normal(size=(1, 6, 6, 4)))
    builder.conv("plain", builder.depthwise("a", "input"), 3)
    builder.conv("padded", builder.depthwise("b", "input"), 3, kernel=3, pad=(1, 1, 1, 1))
    graph = builder.graph("plain", "padded")
    x = builder.values["input"].astype(np.float32)
    values = {name: np.asarray(v) for name, v in reference.iterate(graph, {"input": x})}
    ranges = {n: (values[n].min(axis=(0, 1, 2)), values[n].max(axis=(0, 1, 2))) for n in ("a", "b")}
    _, moved = center(graph, ranges)
    assert not np.array_equal(moved["a"][0], ranges["a"][0])
    assert np.array_equal(moved["b"][0], ranges["b"][0])


def test_whole_residual_streams_are_equalized_as_groups(measured, graph):
    bad, ranges = measured
    after = equalize(bad, ranges)
    verify(after)
    assert [node.op for node in after.nodes] == [node.op for node in bad.nodes]
    for image in drawn_images(3, SIZE):
        x = image.astype(np.float32)[None]
        np.testing.assert_allclose(reference.run(after, x)[0], reference.run(graph, x)[0], rtol=1e-3, atol=1e-4)
    healthy = signal_to_noise_db(graph)
    assert signal_to_noise_db(equalize(bad)) < healthy - 6  # pairs alone do not reach the residual stream
    assert signal_to_noise_db(after) > healthy - 3


def test_groups_hold_what_must_share_a_factor(graph):
    groups = {group.tensors[0]: group for group in equalizable_groups(graph)}
    stream = next(g for g in groups.values() if "blocks.2.add" in g.tensors)
    assert set(stream.tensors) == {
        "blocks.1.sep1.pointwise",
        "blocks.1.pool",
        "blocks.1.shortcut.conv",
        "blocks.1.add",
        "blocks.2.relu0",
        "blocks.2.sep2.pointwise",
        "blocks.2.add",
    }
    assert {n.name for n in stream.producers} == {
        "blocks.1.sep1.pointwise",
        "blocks.1.shortcut.conv",
        "blocks.2.sep2.pointwise",
    }
    assert {n.name for n in stream.readers} == {"blocks.2.sep0.depthwise", "exit.sep.depthwise"}
    assert not any("classifier" in g.tensors or "input" in g.tensors for g in groups.values())
    assert any(set(g.tensors) == {"exit.sep.pointwise", "exit.mean"} for g in groups.values())


def test_only_pairs_without_an_activation_and_with_one_reader_are_touched():
    builder = FloatBuilder(np.random.default_rng(0).normal(size=(1, 6, 6, 4)))
    read_twice = builder.depthwise("read twice", "input")
    builder.add("sum", builder.conv("a", read_twice, 3), builder.conv("b", read_twice, 3))
    active = builder.append(
        "active",
        ir.DepthwiseConv2d((1, 1), (0,) * 4, relu=True),
        ("input",),
        {"w": np.ones((1, 1, 4)), "b": np.zeros(4)},
    )
    builder.conv("c", active, 3)
    builder.conv("d", builder.depthwise("good", "input"), 3)
    graph = builder.graph("sum", "c", "d")
    assert [(g.tensors, g.readers[0].name) for g in equalizable_pairs(graph)] == [(("good",), "d")]
    assert {g.tensors for g in equalizable_groups(graph)} == {("good",), ("active",), ("read twice",)}
    output_too = builder.graph("sum", "c", "d", "good")
    assert equalizable_pairs(output_too) == []


def test_dead_channels_are_left_alone():
    builder = FloatBuilder(np.random.default_rng(0).normal(size=(1, 6, 6, 4)))
    builder.conv("reader", builder.depthwise("dw", "input"), 3)
    graph = builder.graph()
    dw, reader = graph.constants["dw.weight"].data.copy(), graph.constants["reader.weight"].data.copy()
    dw[:, :, 1] = 0  # makes nothing
    reader[:, :, :, 2] = 0  # is read by nobody
    constants = {"dw.weight": float_constant(dw), "reader.weight": float_constant(reader)}
    graph = graph.with_nodes(graph.nodes, {**graph.constants, **constants})
    x = builder.values["input"]
    after = equalize(graph)
    verify(after)
    assert np.array_equal(after.constants["dw.weight"].data[:, :, 1:3], dw[:, :, 1:3])
    np.testing.assert_allclose(reference.run(after, x)[0], reference.run(graph, x)[0], rtol=1e-4, atol=1e-5)
