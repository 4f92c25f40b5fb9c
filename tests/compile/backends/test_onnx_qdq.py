"""Explicit-QDQ ONNX: the checker takes it, ONNX Runtime runs it, and its distance from the contract is as stated."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from support.int8_graphs import all_outputs, photo, random_input, random_operator_graph, random_xception
from support.needs import requires_module

from xceptile.compile.backends import onnx_qdq
from xceptile.models import graph as ir
from xceptile.runtime import reference

FORMS = [onnx_qdq.serialize, onnx_qdq.serialize_symmetric]
onnx_runtime = requires_module("onnxruntime", package="onnxruntime")


def run(graph: ir.Graph, data: bytes, inputs: list[np.ndarray], *, optimize: bool = True) -> list[np.ndarray]:
    """The file under ONNX Runtime: int8 inputs in the graph's layout -> int8 outputs in it."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    # Without it, x86 without VNNI saturates sums of two products in 16 bits: another function altogether.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    feeds = {}
    for node, x in zip(graph.inputs, inputs, strict=True):
        quant = node.type.per_tensor
        real = (x.astype(np.float32) - quant.zero_point) * np.float32(quant.scale)
        feeds[node.name] = real.transpose(0, 3, 1, 2) if real.ndim == 4 else real
    outputs = []
    for name, y in zip(graph.outputs, session.run(None, feeds), strict=True):
        quant = graph.type_of(name).per_tensor
        q = np.clip(np.rint(y / np.float32(quant.scale)) + quant.zero_point, -128, 127).astype(np.int8)
        outputs.append(q.transpose(0, 2, 3, 1) if q.ndim == 4 else q)
    return outputs


def steps(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(np.int32) - b).max())


OPERATORS = {  # and how many steps ONNX' own definition of the operator is off
    "conv": 0, "depthwise": 0, "linear": 0, "relu": 0, "pool": 0, "add": 1, "requantize": 1, "mean": 0,
}  # fmt: skip


@onnx_runtime
@pytest.mark.parametrize("optimize", [True, False], ids=["optimized", "as written"])
@pytest.mark.parametrize("kind", OPERATORS)
def test_every_operator_under_onnx_runtime(kind, optimize):
    shape = (2, 16) if kind == "linear" else (2, 9, 11, 16)
    graph = random_operator_graph(kind, shape, padding=(1, 0, 1, 1), strides=(2, 1), relu=kind in ("conv", "add"))
    inputs = list(random_input(graph, seed=1))
    (expected,) = reference.run(graph, *inputs)
    (got,) = run(graph, onnx_qdq.serialize(graph), inputs, optimize=optimize)
    assert got.shape == expected.shape
    assert steps(got, expected) <= OPERATORS[kind]
    (symmetric,) = run(graph, onnx_qdq.serialize_symmetric(graph), inputs, optimize=optimize)
    assert steps(symmetric, expected) <= 3  # scales are up to twice as wide


@pytest.fixture(scope="module")
def network() -> ir.Graph:
    return random_xception(71, 0.125, 10)


@onnx_runtime
@pytest.mark.parametrize("serialize", FORMS)
def test_the_stated_departure_is_what_onnx_runtime_shows(network, serialize):
    images = np.concatenate([photo(71, 71, seed) for seed in range(3)])
    expected = np.concatenate([reference.run(network, image[None])[0] for image in images])
    data = serialize(network)
    got = np.concatenate([run(network, data, [image[None]], optimize=False)[0] for image in images])
    stated = onnx_qdq.departure(network, images, expected, symmetric=serialize is onnx_qdq.serialize_symmetric)
    assert stated.images == 3
    assert abs(stated.largest_difference_steps - steps(got, expected)) <= 2  # sums in another order
    agreeing = int((got.argmax(axis=1) == expected.argmax(axis=1)).sum())
    assert abs(stated.agreeing - agreeing) <= 1
    assert str(stated).startswith(f"{stated.agreeing} of 3 golden images keep the contract's class, no logit is more")


def test_departure_sees_another_network(network):
    images = photo(71, 71)
    (expected,) = reference.run(network, images)
    other = expected[:, ::-1].copy()
    assert onnx_qdq.departure(network, images, other).largest_difference_steps > 20


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_scales_zero_points_and_integers_are_the_graphs(network):
    values = initializers(onnx.load_from_string(onnx_qdq.serialize(network)))
    for node in network.nodes:
        name = f"{node.name}/rounded" if isinstance(node.op, ir.Input) else node.name
        assert values[f"{name}/scale"] == np.float32(node.type.per_tensor.scale)
        assert values[f"{name}/zero_point"] == node.type.per_tensor.zero_point
        assert values[f"{name}/zero_point"].dtype == np.int8
        assert values[f"{name}/scale"].shape == values[f"{name}/zero_point"].shape == ()
    for name, constant in network.constants.items():
        assert values[f"{name}/q"].dtype == constant.data.dtype
        assert sorted(values[f"{name}/q"].ravel()) == sorted(constant.data.ravel())
        np.testing.assert_array_equal(values[f"{name}/scale"], np.float32(constant.type.per_axis.scales))


def test_what_tensorrt_demands(network):
    model = onnx.load_from_string(onnx_qdq.serialize_symmetric(network))
    values = initializers(model)
    assert not any(value.any() for name, value in values.items() if name.endswith("/zero_point"))
    quantized = {node.input[0]: values.get(node.input[0]) for node in model.graph.node if "Dequantize" in node.op_type}
    assert all(value is None or value.dtype == np.int8 for value in quantized.values())
    assert values["image/rounded/scale"] == 1.0  # pixels lose nothing: they are shifted
    assert values["image/offset"] == -128.0


def test_a_padded_reader_keeps_the_input_unshifted():
    graph = random_operator_graph("conv", (1, 8, 8, 3), padding=(1, 1, 1, 1))
    values = initializers(onnx.load_from_string(onnx_qdq.serialize_symmetric(graph)))
    assert not any(name.endswith("/offset") for name in values)


@onnx_runtime
def test_a_mixed_graph_and_every_tensor():
    graph = all_outputs(random_operator_graph("conv", (1, 8, 8, 16), relu=True))
    out = graph.node(graph.outputs[0])
    real = ir.Node("real", ir.Dequantize(), (out.name,), ir.TensorType(out.type.shape, "float32"))
    relu = ir.Node("relu", ir.Relu(), ("real",), real.type)
    back = ir.Node("back", ir.Quantize(), ("relu",), out.type)
    mixed = replace(graph, nodes=(*graph.nodes, real, relu, back), outputs=(out.name, "back"))
    inputs = list(random_input(mixed, seed=2))
    for got, expected in zip(run(mixed, onnx_qdq.serialize(mixed), inputs), reference.run(mixed, *inputs), strict=True):
        np.testing.assert_array_equal(got, expected)


def test_equal_graphs_give_equal_bytes(network):
    assert onnx_qdq.serialize(network) == onnx_qdq.serialize(random_xception(71, 0.125, 10))
