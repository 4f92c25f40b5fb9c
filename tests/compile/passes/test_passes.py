"""Graph passes: the graph before and after, node by node, and the function unchanged."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from support.float_graphs import FloatBuilder, drawn_images, random_xception

from xceptile.compile.passes.fold_batch_norm import fold_batch_norm
from xceptile.compile.passes.fold_input import fold_input, takes_pixels
from xceptile.compile.passes.fuse_relu import fuse_relu
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.compile.passes.remove_dead import remove_dead
from xceptile.compile.passes.take_int8_pixels import take_int8_pixels
from xceptile.models import graph as ir
from xceptile.models.preprocess import InputSpec, normalize
from xceptile.models.verify import verify
from xceptile.runtime import reference


def lines(graph: ir.Graph) -> list[str]:
    """The graph as text, a node a line: name = operator(tensors read)."""
    text = []
    for node in graph.nodes:
        tensors = ", ".join(name for name in node.inputs if name not in graph.constants)
        relu = "+relu" if getattr(node.op, "relu", False) else ""
        text.append(f"{node.name} = {type(node.op).__name__}{relu}({tensors})")
    return [*text, f"return {', '.join(graph.outputs)}"]


def assert_same_function(before: ir.Graph, after: ir.Graph, builder: FloatBuilder) -> None:
    verify(after)
    for expected, seen in zip(
        reference.run(before, builder.values["input"]), reference.run(after, builder.values["input"]), strict=True
    ):
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-5)


@pytest.fixture
def builder():
    return FloatBuilder(np.random.default_rng(1).normal(size=(2, 8, 9, 3)), seed=2)


def test_batch_norm_folds_into_every_kind_of_layer_before_it(builder):
    x = builder.norm("n1", builder.conv("conv", "input", 4, 3))
    x = builder.norm("n2", builder.depthwise("dw", x))
    x = builder.norm("n3", builder.linear("fc", builder.mean("gap", x), 5))
    graph = builder.graph()
    folded = fold_batch_norm(graph)
    assert lines(folded) == [
        "input = Input()",
        "conv = Conv2d(input)",
        "dw = DepthwiseConv2d(conv)",
        "gap = GlobalAveragePool(dw)",
        "fc = FullyConnected(gap)",
        "return fc",
    ]
    assert set(folded.constants) == {f"{n}.{k}" for n in ("conv", "dw", "fc") for k in ("weight", "bias")}
    assert_same_function(graph, folded, builder)


def test_two_normalizations_in_a_row_fold_both(builder):
    builder.norm("n2", builder.norm("n1", builder.conv("conv", "input", 4)))
    graph = builder.graph()
    folded = fold_batch_norm(graph)
    assert lines(folded) == ["input = Input()", "conv = Conv2d(input)", "return conv"]
    assert_same_function(graph, folded, builder)


def test_a_normalization_that_cannot_fold_becomes_a_depthwise_convolution(builder):
    conv = builder.conv("conv", "input", 4)
    norm = builder.norm("norm", conv)
    first = builder.norm("first", "input")
    builder.add("sum", conv, norm)
    graph = builder.graph("sum", first)
    folded = fold_batch_norm(graph)
    assert lines(folded) == [
        "input = Input()",
        "conv = Conv2d(input)",
        "norm = DepthwiseConv2d(conv)",
        "first = DepthwiseConv2d(input)",
        "sum = Add(conv, norm)",
        "return sum, first",
    ]
    assert_same_function(graph, folded, builder)


def test_a_normalization_after_an_output_or_a_relu_does_not_fold(builder):
    builder.norm("norm", builder.conv("conv", "input", 4))
    graph = builder.graph("conv", "norm")
    assert "norm = DepthwiseConv2d(conv)" in lines(fold_batch_norm(graph))
    assert_same_function(graph, fold_batch_norm(graph), builder)
    with_relu = replace(graph.node("conv"), op=ir.Conv2d((1, 1), (0, 0, 0, 0), relu=True))
    fused = graph.with_nodes(tuple(with_relu if n.name == "conv" else n for n in graph.nodes))
    fused = replace(fused, outputs=("norm",))
    assert "norm = DepthwiseConv2d(conv)" in lines(fold_batch_norm(fused))
    assert_same_function(fused, fold_batch_norm(fused), builder)


def test_a_normalization_of_a_vector_folds_into_the_layers_behind_it(builder):
    norm = builder.norm("norm", builder.mean("gap", "input"))
    first, second = builder.linear("first", norm, 5), builder.linear("second", norm, 2)
    graph = builder.graph(first, second)
    folded = fold_batch_norm(graph)
    assert lines(folded) == [
        "input = Input()",
        "gap = GlobalAveragePool(input)",
        "first = FullyConnected(gap)",
        "second = FullyConnected(gap)",
        "return first, second",
    ]
    assert_same_function(graph, folded, builder)


@pytest.mark.parametrize("ends", [True, False])
def test_a_normalization_of_a_mean_is_taken_of_the_map(builder, ends):
    norm = builder.norm("head.norm", builder.mean("gap", "input"))
    graph = builder.graph(norm if ends else builder.relu("relu", norm))
    folded = fold_batch_norm(graph)
    assert lines(folded) == [
        "input = Input()",
        "head.norm = DepthwiseConv2d(input)",
        "gap = GlobalAveragePool(head.norm)",
        *(["return gap"] if ends else ["relu = Relu(gap)", "return relu"]),
    ]
    assert folded.node("head.norm").path == "head.norm"
    assert_same_function(graph, folded, builder)


def test_a_normalization_of_a_vector_alone_is_refused_by_its_path(builder):
    builder.norm("head.norm", builder.relu("relu", builder.linear("fc", builder.mean("gap", "input"), 4)))
    with pytest.raises(ir.GraphError, match=r"head\.norm") as error:
        fold_batch_norm(builder.graph())
    assert error.value.path == "head.norm"


def test_weights_shared_by_two_layers_are_folded_for_each(builder):
    builder.conv("a", "input", 4)
    b = replace(builder.nodes[-1], name="b")  # reads a's weights and bias
    builder.nodes.append(b)
    builder.values["b"] = builder.values["a"]
    builder.add("sum", builder.norm("na", "a"), builder.norm("nb", "b"))
    graph = builder.graph()
    folded = fold_batch_norm(graph)
    assert lines(folded) == [
        "input = Input()",
        "a = Conv2d(input)",
        "b = Conv2d(input)",
        "sum = Add(a, b)",
        "return sum",
    ]
    assert_same_function(graph, folded, builder)


def test_relu_fuses_where_it_alone_reads_its_producer(builder):
    x = builder.relu("r1", builder.conv("conv", "input", 4))
    x = builder.relu("r2", builder.depthwise("dw", x))
    shortcut = builder.conv("shortcut", x, 4)
    y = builder.relu("before", shortcut)  # shortcut is read by the sum too: stays alone
    x = builder.relu("r3", builder.add("sum", y, shortcut))
    builder.relu("r4", builder.linear("fc", builder.mean("gap", x), 5))
    graph = builder.graph()
    fused = fuse_relu(graph)
    assert lines(fused) == [
        "input = Input()",
        "conv = Conv2d+relu(input)",
        "dw = DepthwiseConv2d+relu(conv)",
        "shortcut = Conv2d(dw)",
        "before = Relu(shortcut)",
        "sum = Add+relu(before, shortcut)",
        "gap = GlobalAveragePool(sum)",
        "fc = FullyConnected+relu(gap)",
        "return fc",
    ]
    assert_same_function(graph, fused, builder)


def test_relu_of_an_output_stays_and_of_a_relu_goes(builder):
    conv = builder.conv("conv", "input", 4)
    builder.relu("r3", builder.relu("r2", builder.relu("r1", conv)))
    graph = builder.graph("conv", "r3")
    fused = fuse_relu(graph)
    assert lines(fused) == ["input = Input()", "conv = Conv2d(input)", "r1 = Relu(conv)", "return conv, r1"]
    assert_same_function(graph, fused, builder)
    alone = builder.graph("r3")
    assert lines(fuse_relu(alone)) == ["input = Input()", "conv = Conv2d+relu(input)", "return conv"]


def test_dead_nodes_and_their_constants_go(builder):
    builder.conv("dead", "input", 4)
    builder.relu("deader", "dead")
    builder.conv("alive", "input", 2)
    graph = builder.graph("alive")
    pruned = remove_dead(graph)
    assert lines(pruned) == ["input = Input()", "alive = Conv2d(input)", "return alive"]
    assert set(pruned.constants) == {"alive.weight", "alive.bias"}


SPEC = InputSpec(32, 32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


def first_layer(padding: ir.Pads) -> FloatBuilder:
    builder = FloatBuilder(np.zeros((1, 32, 32, 3)), seed=3)
    builder.relu("relu", builder.norm("norm", builder.conv("conv", "input", 6, 3, 2, padding)))
    return builder


def test_preprocessing_folds_into_an_unpadded_first_convolution():
    graph = first_layer((0, 0, 0, 0)).graph()
    folded = fold_input(graph, SPEC)
    verify(folded)
    assert lines(folded) == lines(graph)
    assert takes_pixels(graph)
    for image in drawn_images(3, 32):
        expected = reference.run(graph, normalize(image, SPEC)[None])[0]
        seen = reference.run(folded, image.astype(np.float32)[None])[0]
        np.testing.assert_allclose(seen, expected, rtol=1e-4, atol=1e-4)


def test_preprocessing_stays_before_a_padded_first_convolution():
    graph = first_layer((0, 1, 0, 1)).graph()
    assert not takes_pixels(graph)
    assert fold_input(graph, SPEC) is graph


def test_preprocessing_folds_into_every_reader_of_the_input():
    builder = first_layer((0, 0, 0, 0))
    builder.conv("other", "input", 6, 3, 2)
    builder.add("sum", "relu", "other")
    graph = builder.graph()
    image = drawn_images(1, 32)[0]
    seen = reference.run(fold_input(graph, SPEC), image.astype(np.float32)[None])[0]
    np.testing.assert_allclose(seen, reference.run(graph, normalize(image, SPEC)[None])[0], rtol=1e-4, atol=1e-4)
    builder.relu("direct", "input")
    assert not takes_pixels(builder.graph("sum", "direct"))


def test_pixels_come_as_int8(builder):
    builder.add("sum", builder.conv("conv", "input", 3), "input")
    graph = builder.graph()
    after = take_int8_pixels(graph, ir.PerTensor(1.0, -128))
    verify(after)
    assert lines(after)[:4] == [
        "input = Input()",
        "input:real = Dequantize(input)",
        "conv = Conv2d(input:real)",
        "sum = Add(conv, input:real)",
    ]
    shape = graph.inputs[0].type.shape
    pixels = np.arange(np.prod(shape)).reshape(shape) % 256
    seen, expected = (
        reference.run(g, x)[0] for g, x in ((after, (pixels - 128).astype(np.int8)), (graph, pixels.astype(np.float32)))
    )
    np.testing.assert_array_equal(seen, expected)


def test_all_passes_keep_a_whole_network():
    graph = random_xception(48)
    after = run_passes(graph, FLOAT_PASSES, verify)
    kinds = [type(node.op).__name__ for node in after.nodes]
    assert "BatchNorm" not in kinds
    assert kinds.count("Relu") == 2  # before block 1 and block 2, whose input the shortcut reads too
    x = normalize(drawn_images(1, 48)[0], InputSpec(48, 48))[None]
    np.testing.assert_allclose(reference.run(after, x)[0], reference.run(graph, x)[0], rtol=1e-4, atol=1e-5)


def test_a_pass_that_breaks_the_graph_is_named(builder):
    builder.relu("relu", builder.conv("conv", "input", 4))

    def lose_a_node(graph: ir.Graph) -> ir.Graph:
        return graph.with_nodes(tuple(n for n in graph.nodes if n.name != "conv"))

    with pytest.raises(ir.GraphError) as error:
        run_passes(builder.graph(), (remove_dead, lose_a_node), verify)
    assert error.value.__notes__ == ["after the pass lose_a_node"]
