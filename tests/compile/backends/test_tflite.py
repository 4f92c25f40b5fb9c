"""The TFLite files we write: their form, and every operator under LiteRT bit for bit as the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import tflite
from support import operator_cases
from support.int8_graphs import (
    Int8Builder,
    all_outputs,
    as_float,
    differences,
    f32,
    random_input,
    random_operator_graph,
    random_xception,
    tie_graph,
)

from xceptile.compile.backends.tflite import serialize
from xceptile.models import graph as ir
from xceptile.runtime import reference
from xceptile.runtime.engines.litert import LiteRtEngine

CHANNELS = (1, 2, 3, 7, 8, 15, 16, 728)
EVERY_INT8 = np.arange(-128, 128).astype(np.int8)


def check(graph: ir.Graph, *inputs: np.ndarray) -> None:
    """Every tensor of the graph under LiteRT equals the reference's, on all threads counts, all by XNNPACK."""
    graph = all_outputs(graph)
    for threads in (1, 2):
        engine = LiteRtEngine(serialize(graph), threads)
        assert [p for p in engine.placements() if not p.delegated] == []
        assert differences(graph, inputs, engine.run_once(*inputs)) == {}


def check_at_random_and_extremes(graph: ir.Graph) -> None:
    """``check`` on random inputs, on the least and on the largest values, and on a chessboard of both."""
    shapes = [node.type.shape for node in graph.inputs]
    check(graph, *random_input(graph, 1))
    check(graph, *(np.full(shape, -128, np.int8) for shape in shapes))
    check(graph, *(np.full(shape, 127, np.int8) for shape in shapes))
    check(graph, *(np.where(np.indices(shape).sum(axis=0) % 2, 127, -128).astype(np.int8) for shape in shapes))


# The form of the file


def parsed(graph: ir.Graph) -> tuple[tflite.Model, tflite.SubGraph, list[str]]:
    """The file as the schema's own reader sees it, and its operators by name."""
    names = {code: name for name, code in vars(tflite.BuiltinOperator).items() if name.isupper()}
    model = tflite.Model.GetRootAs(serialize(graph))
    main = model.Subgraphs(0)
    codes = [model.OperatorCodes(main.Operators(i).OpcodeIndex()) for i in range(main.OperatorsLength())]
    return model, main, [names[code.BuiltinCode()] for code in codes]


@pytest.fixture(scope="module")
def small() -> ir.Graph:
    return random_xception(71, 0.125, 10)


def test_equal_graphs_give_equal_bytes(small: ir.Graph) -> None:
    assert serialize(small) == serialize(random_xception(71, 0.125, 10))


@pytest.mark.parametrize("same_padding", [True, False])
def test_xception_has_no_transpose_and_no_operator_but_its_own(same_padding: bool) -> None:
    graph = random_xception(75, 0.125, 10, same_padding=same_padding)
    own = {"CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED", "ADD", "MAX_POOL_2D", "MEAN"}
    edges = set() if same_padding else {"SLICE", "CONCATENATION"}
    names = parsed(graph)[2]
    assert "TRANSPOSE" not in names
    assert set(names) == own | {"QUANTIZE"} | edges
    assert set(parsed(as_float(graph))[2]) == own | {"RELU"} | edges
    # A QUANTIZE stands for each lone ReLU and for nothing else.
    assert names.count("QUANTIZE") == sum(isinstance(node.op, ir.Relu) for node in graph.nodes)


def test_keras_padding_needs_no_operator_beside_the_graphs_own(small: ir.Graph) -> None:
    assert len(parsed(small)[2]) == len(small.nodes) - 1


def test_constants_are_aligned_and_scales_exact(small: ir.Graph) -> None:
    blob = serialize(small)
    model = tflite.Model.GetRootAs(blob)
    main = model.Subgraphs(0)
    tensors = {main.Tensors(i).Name().decode(): main.Tensors(i) for i in range(main.TensorsLength())}
    for node in small.nodes:
        quantization = tensors[node.name].Quantization()
        assert quantization.ScaleAsNumpy().tolist() == [node.type.per_tensor.scale]
        assert quantization.ZeroPointAsNumpy().tolist() == [node.type.per_tensor.zero_point]
    for name, constant in small.constants.items():
        data = model.Buffers(tensors[name].Buffer()).DataAsNumpy()
        assert data.tobytes() == constant.data.tobytes()
        address = data.ctypes.data - np.frombuffer(blob, np.uint8).ctypes.data
        assert address % 16 == 0
        if constant.type.dtype == "int8":
            assert tuple(tensors[name].Quantization().ScaleAsNumpy().tolist()) == constant.type.per_axis.scales


def test_a_batch_normalization_is_refused_by_name() -> None:
    x = ir.TensorType((1, 2, 2, 3), "float32")
    vector = ir.Constant(ir.TensorType((3,), "float32"), np.ones(3, np.float32))
    nodes = (
        ir.Node("x", ir.Input(), (), x),
        ir.Node("norm", ir.BatchNorm(1e-3), ("x", "g", "b", "m", "v"), x, "stem.norm"),
    )
    with pytest.raises(ir.GraphError, match="norm: fold the batch normalization") as caught:
        serialize(ir.Graph("", nodes, dict.fromkeys("gbmv", vector), ("norm",)))
    assert caught.value.path == "stem.norm"


def test_a_relu_with_parameters_of_its_own_is_refused() -> None:
    graph = random_operator_graph("relu", (1, 3, 3, 2))
    relu = graph.nodes[-1]
    wrong = replace(relu, type=replace(relu.type, quant=ir.PerTensor(1.0, -128)))
    with pytest.raises(ir.GraphError, match="keeps its input's scale"):
        serialize(replace(graph, nodes=(*graph.nodes[:-1], wrong)))


def test_a_pool_over_padding_alone_is_refused() -> None:
    graph = random_operator_graph("pool", (1, 5, 5, 2), kernel=(2, 2), strides=(1, 1), padding=(2, 0, 0, 0))
    with pytest.raises(ir.GraphError, match="without a pixel"):
        serialize(graph)


def test_a_difference_is_seen_where_it_is() -> None:
    """The comparison itself: a bias moved by one step of the output shows in that tensor and in those after it."""
    build = Int8Builder("two")
    x = build.input(random_input(random_operator_graph("relu", (1, 6, 6, 4)))[0], ir.PerTensor(f32(0.02), 5))
    first = build.conv(x, 8)
    build.conv(first, 8)
    graph = all_outputs(build.graph())
    constant = graph.constants[f"{first}.bias"]
    step = int(build.quant(first).scale / min(constant.type.per_axis.scales)) + 1
    moved = ir.Constant(constant.type, constant.data + np.int32(step))
    engine = LiteRtEngine(serialize(replace(graph, constants={**graph.constants, f"{first}.bias": moved})))
    inputs = random_input(graph)
    assert set(differences(graph, inputs, engine.run_once(*inputs))) == set(graph.outputs)


# Convolutions


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_channels(kind: str, channels: int) -> None:
    shape = (1, channels) if kind == "linear" else (1, 5, 7, channels)
    outputs = CHANNELS[-1 - CHANNELS.index(channels)]
    kernel = (1, 1) if channels * outputs > 728 else (3, 3)
    for relu in (False, True):
        check_at_random_and_extremes(random_operator_graph(kind, shape, channels=outputs, kernel=kernel, relu=relu))


PADDINGS = ((0, 0, 0, 0), (1, 1, 1, 1), (0, 1, 0, 1), (1, 0, 1, 0), (2, 1, 0, 2), (0, 0, 1, 1))


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("strides", [(1, 1), (2, 2), (1, 2), (3, 2)])
@pytest.mark.parametrize("kind", ["conv", "depthwise"])
def test_windows(kind: str, strides: tuple[int, int], padding: ir.Pads) -> None:
    for size in ((9, 8), (10, 11), (3, 3)):
        for kernel in ((3, 3), (1, 1), (2, 3)):
            graph = random_operator_graph(
                kind, (1, *size, 3), channels=5, kernel=kernel, strides=strides, padding=padding, relu=size[0] == 9
            )
            check(graph, *random_input(graph))


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 7, 127])
@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_exact_halves(kind: str, zero_point: int) -> None:
    for relu in (False, True):
        shape = (1, 15) if kind == "linear" else (1, 16, 16, 15)
        graph = tie_graph(kind, shape, zero_point=zero_point, relu=relu)
        for seed in range(4):
            check(graph, *random_input(graph, seed))


def test_exact_halves_do_occur() -> None:
    """What the test above is for: a rounding other than to even changes the result."""
    graph = tie_graph("conv", (1, 16, 16, 15))
    (x,) = random_input(graph)
    weights, bias = graph.constants["w"], graph.constants["b"]
    acc = x.reshape(-1, 15).astype(np.float64) @ weights.data.reshape(15, 15).T.astype(np.float64) + bias.data
    scaled = acc * 0.5 * np.asarray(weights.type.per_axis.scales)
    away = np.clip(np.floor(np.abs(scaled) + 0.5) * np.sign(scaled), -128, 127)
    (y,) = reference.run(graph, x)
    assert (away != y.reshape(-1, 15)).mean() > 0.03


@pytest.mark.parametrize("kind", ["conv", "depthwise", "linear"])
def test_weights_at_the_extremes(kind: str) -> None:
    """Every weight is -127 or 127, zero points are at the ends: the largest accumulators there are."""
    shape = (1, 728) if kind == "linear" else (1, 4, 4, 728)
    for zero_point in (-128, 127):
        graph = random_operator_graph(
            kind, shape, channels=4, kernel=(3, 3), padding=(1, 1, 1, 1), input_quant=ir.PerTensor(f32(0.1), zero_point)
        )
        name, weights = next((n, c) for n, c in graph.constants.items() if c.type.dtype == "int8")
        extreme = ir.Constant(weights.type, np.where(weights.data < 0, -127, 127).astype(np.int8))
        check_at_random_and_extremes(replace(graph, constants={**graph.constants, name: extreme}))


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 0.9999999, 30.0, 1e3])
def test_output_scales_far_from_the_range(scale: float) -> None:
    """Outputs that all saturate, and outputs that all round to the zero point."""
    for kind, shape in (("conv", (1, 5, 5, 8)), ("depthwise", (1, 5, 5, 8)), ("linear", (1, 40))):
        check_at_random_and_extremes(random_operator_graph(kind, shape, quant=ir.PerTensor(f32(0.05 * scale), -3)))


# The other operators


def scale_sets() -> list[tuple[ir.PerTensor, ir.PerTensor, ir.PerTensor]]:
    """Two inputs' and the output's parameters: powers of two (exact halves), unequal, at the ends of the domain."""
    rng = np.random.default_rng(7)
    chosen = [
        ((0.5, 0), (0.5, 0), (1.0, 0)),
        ((0.25, -128), (0.5, 127), (1.0, -128)),
        ((0.05, 3), (0.0004, -7), (0.06, 11)),
        ((1.0, -128), (1.0, -128), (0.02, 0)),
        ((0.001, 0), (0.0011, 0), (0.9, 0)),
    ]
    drawn = [
        tuple((float(np.exp(rng.uniform(-5, -2))), int(rng.integers(-128, 128))) for _ in range(3)) for _ in range(8)
    ]
    return [tuple(ir.PerTensor(f32(s), z) for s, z in row) for row in [*chosen, *drawn]]  # type: ignore[misc]


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("quants", scale_sets(), ids=str)
def test_add_on_all_pairs(quants: tuple[ir.PerTensor, ir.PerTensor, ir.PerTensor], relu: bool) -> None:
    a, b, y = quants
    graph = random_operator_graph("add", (1, 256, 256, 1), input_quant=a, other_quant=b, quant=y, relu=relu)
    left, right = np.meshgrid(EVERY_INT8, EVERY_INT8)
    check(graph, left.reshape(1, 256, 256, 1), right.reshape(1, 256, 256, 1))


def undelegated(graph: ir.Graph) -> set[str]:
    """The operators that XNNPACK does not take in int8, and LiteRT's own kernels compute."""
    nearest = any(isinstance(node.op, ir.Resize) and node.op.method == "nearest" for node in graph.nodes)
    return {"RESIZE_NEAREST_NEIGHBOR"} if nearest else set()


@pytest.mark.parametrize("batch", [1, 2])
def test_every_operator_case(batch: int) -> None:
    for graph in map(all_outputs, operator_cases.all_cases(batch)):
        engine = LiteRtEngine(serialize(graph), 1)
        assert {p.op for p in engine.placements() if not p.delegated} == undelegated(graph)
        for inputs in operator_cases.images(graph, 2):
            assert differences(graph, inputs, engine.run_once(*inputs)) == {}, graph.name


@pytest.mark.parametrize("quants", scale_sets(), ids=str)
def test_requantize_all_values(quants: tuple[ir.PerTensor, ...]) -> None:
    for source, target in ((quants[0], quants[1]), (quants[1], quants[2]), (quants[2], quants[0])):
        if 2**-8 <= source.scale / target.scale < 2**7:
            graph = random_operator_graph("requantize", (1, 16, 16, 1), input_quant=source, quant=target)
            check(graph, EVERY_INT8.reshape(1, 16, 16, 1))


@pytest.mark.parametrize("zero_point", [-128, -127, -1, 0, 1, 64, 127])
def test_relu_all_values(zero_point: int) -> None:
    graph = random_operator_graph("relu", (1, 16, 16, 1), input_quant=ir.PerTensor(f32(0.031), zero_point))
    check(graph, EVERY_INT8.reshape(1, 16, 16, 1))


@pytest.mark.parametrize("padding", [p for p in PADDINGS if max(p) < 2] + [(2, 2, 2, 2), (2, 1, 0, 2)])
@pytest.mark.parametrize("kernel", [(2, 2), (3, 3), (3, 2)])
def test_max_pool(kernel: tuple[int, int], padding: ir.Pads) -> None:
    if max(padding[:2]) >= kernel[0] or max(padding[2:]) >= kernel[1]:
        return
    for strides in ((1, 1), (2, 2), (2, 1)):  # XNNPACK takes no stride beyond the window
        for size in ((8, 9), (5, 4), (3, 3)):
            graph = random_operator_graph("pool", (1, *size, 3), kernel=kernel, strides=strides, padding=padding)
            check(graph, *random_input(graph))
            check(graph, np.full((1, *size, 3), -128, np.int8))


@pytest.mark.parametrize("channels", CHANNELS)
def test_max_pool_channels(channels: int) -> None:
    for padding in ((1, 1, 1, 1), (0, 1, 0, 1)):
        check_at_random_and_extremes(
            random_operator_graph("pool", (1, 6, 6, channels), strides=(2, 2), padding=padding)
        )


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("size", [(10, 10), (1, 1), (3, 7)])
def test_mean(size: tuple[int, int], channels: int) -> None:
    for source in (ir.PerTensor(f32(0.0235), -128), ir.PerTensor(f32(0.071), 13)):
        check_at_random_and_extremes(random_operator_graph("mean", (1, *size, channels), input_quant=source))


def every_sum(height: int, width: int) -> np.ndarray:
    """A map whose channels hold each attainable sum of its pixels once, int8 (1, H, W, 255 * H * W + 1)."""
    pixels = height * width
    sums = np.arange(255 * pixels + 1)
    x = np.clip(sums[None, :] - 255 * np.arange(pixels)[:, None], 0, 255) - 128
    return x.astype(np.int8).reshape(1, height, width, -1)


def mean_params(seed: int) -> tuple[ir.PerTensor, ir.PerTensor]:
    rng = np.random.default_rng(seed)
    source = ir.PerTensor(f32(np.exp(rng.uniform(-5, -2))), -128 if seed % 2 else int(rng.integers(-128, 128)))
    return source, ir.PerTensor(f32(source.scale * np.exp(rng.uniform(-2, 0.5))), int(rng.integers(-128, 128)))


@pytest.mark.parametrize("size", [(10, 10), (3, 3), (5, 4)])
def test_mean_of_every_attainable_sum(size: tuple[int, int]) -> None:
    """The quantizer's guarantee: it moves the output scale until no sum depends on how an engine rounds."""
    x = every_sum(*size)
    for seed in range(12):
        source, wanted = mean_params(seed)
        check(random_operator_graph("mean", x.shape, input_quant=source, quant=wanted), x)


def test_a_mean_without_the_guarantee_differs() -> None:
    """What the guarantee is for: with this scale, found by trying, one sum in 25,501 rounds differently in XNNPACK."""
    source, target = ir.PerTensor(f32(0.0235), -128), ir.PerTensor(0.004600001499056816, -128)
    graph = random_operator_graph("mean", (1, 10, 10, 25501), input_quant=source, quant=target)
    assert graph.nodes[-1].type.per_tensor != target
    plain = replace(graph.nodes[-1], type=replace(graph.nodes[-1].type, quant=target))
    graph = replace(graph, nodes=(*graph.nodes[:-1], plain))
    x = every_sum(10, 10)
    assert differences(graph, (x,), LiteRtEngine(serialize(graph)).run_once(x)) == {"mean_0": 1}


# Float and mixed graphs


@pytest.mark.parametrize("kind", ["conv", "depthwise", "relu", "pool", "add", "mean", "linear"])
def test_float_operators(kind: str) -> None:
    for padding in ((0, 0, 0, 0), (1, 1, 1, 1), (1, 0, 1, 0)):
        shape = (1, 20) if kind == "linear" else (1, 8, 9, 7)
        graph = as_float(random_operator_graph(kind, shape, padding=padding, strides=(2, 2), relu=True))
        engine = LiteRtEngine(serialize(graph))
        inputs = random_input(graph)
        (want,) = reference.run(graph, *inputs)
        np.testing.assert_allclose(engine.run_once(*inputs)[0], want, rtol=1e-4, atol=1e-5)
        assert all(p.delegated for p in engine.placements())


def test_a_mixed_graph() -> None:
    """int8, a float layer between Dequantize and Quantize, int8 again."""
    build = Int8Builder("mixed")
    x = build.input(random_input(random_operator_graph("relu", (1, 6, 6, 4)))[0], ir.PerTensor(f32(0.02), 5))
    before = build.conv(x, 8)
    after = build.relu(before)
    graph = build.graph()
    shape = graph.type_of(before).shape
    real = ir.TensorType(shape, "float32")
    middle = (
        ir.Node("float", ir.Dequantize(), (before,), real),
        ir.Node("float_relu", ir.Relu(), ("float",), real),
        ir.Node("int8", ir.Quantize(), ("float_relu",), graph.type_of(before)),
    )
    last = replace(graph.node(after), inputs=("int8",))
    mixed = all_outputs(replace(graph, nodes=(*graph.nodes[:-1], *middle, last)))
    inputs = random_input(mixed)
    engine = LiteRtEngine(serialize(mixed))
    assert differences(mixed, inputs, engine.run_once(*inputs)) == {}
