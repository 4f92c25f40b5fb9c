"""Float ONNX: read as onnx's own reference evaluates it, written so that it reads back, refused with the place."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from support.float_graphs import FloatBuilder

from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.onnx_io import OnnxError, from_onnx, load_onnx, to_onnx
from xceptile.models.verify import verify
from xceptile.models.xception import Xception
from xceptile.runtime import reference

RNG = np.random.default_rng(0)


def array(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.5, shape).astype(np.float32)


WEIGHTS = {
    "w": array(4, 3, 3, 3),
    "b": array(4),
    "dw": array(3, 1, 3, 3),
    "gamma": array(3),
    "beta": array(3),
    "mean": array(3),
    "var": np.abs(array(3)) + 0.5,
    "fc": array(5, 3),
    "fc_t": array(3, 5),
    "fb": array(5),
    "axes": np.array([2, 3]),
    "rows": np.array([0, -1]),
    "pads": np.array([0, 0, 1, 0, 0, 0, 2, 1]),
    "some_pads": np.array([1, 0, 0, 2]),
    "inf": np.array(-np.inf, np.float32),
    "two": np.array(2.0, np.float32),
}


def model(*steps: tuple[str, str, str, dict[str, Any]], shape: tuple[Any, ...] = (1, 3, 8, 9)) -> onnx.ModelProto:
    """A chain of nodes: (operator, inputs, output, attributes)."""
    nodes = [
        helper.make_node(op, inputs.split(), [output], name=f"/block/{op}", **attributes)
        for op, inputs, output, attributes in steps
    ]
    used = {name for _, inputs, _, _ in steps for name in inputs.split()}
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(steps[-1][2], TensorProto.FLOAT, ())],  # nobody looks at the shape
        [numpy_helper.from_array(data, name) for name, data in WEIGHTS.items() if name in used],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1)) if x.ndim == 4 else x


def compare(proto: onnx.ModelProto) -> ir.Graph:
    """The graph, after comparing its outputs with onnx's own."""
    onnx.checker.check_model(proto)
    graph = from_onnx(proto)
    verify(graph)
    x = array(1, 3, 8, 9)
    for ours, theirs in zip(reference.run(graph, nhwc(x)), ReferenceEvaluator(proto).run(None, {"x": x}), strict=True):
        if theirs.ndim == 4 and ours.ndim == 2:
            theirs = theirs[:, :, 0, 0]
        assert np.allclose(ours, nhwc(theirs), rtol=1e-5, atol=1e-5)
    return graph


HEAD = [("GlobalAveragePool", "x", "p", {}), ("Flatten", "p", "f", {})]
POOL = ("GlobalAveragePool", "x", "p", {})
CHAINS: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {
    "conv": [("Conv", "x w b", "y", {"strides": [2, 1], "pads": [1, 0, 0, 2]})],
    "conv same upper": [("Conv", "x w", "y", {"strides": [2, 2], "auto_pad": "SAME_UPPER"})],
    "conv same lower": [("Conv", "x w", "y", {"strides": [2, 2], "auto_pad": "SAME_LOWER"})],
    "conv valid": [("Conv", "x w", "y", {"auto_pad": "VALID"})],
    "depthwise": [("Conv", "x dw", "y", {"group": 3, "pads": [1, 1, 1, 1]})],
    "norm": [("BatchNormalization", "x gamma beta mean var", "y", {"epsilon": 0.01})],
    "relu": [("Relu", "x", "y", {})],
    "max pool": [("MaxPool", "x", "y", {"kernel_shape": [3, 2], "strides": [2, 2], "pads": [0, 0, 1, 1]})],
    "max pool ceil": [("MaxPool", "x", "y", {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1})],
    "max pool same": [("MaxPool", "x", "y", {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"})],
    "pad and conv": [("Pad", "x pads", "p", {}), ("Conv", "p w", "y", {})],
    "pad axes and conv": [("Pad", "x some_pads  axes", "p", {}), ("Conv", "p w", "y", {"pads": [0, 1, 0, 1]})],
    "pad and max pool": [("Pad", "x pads inf", "p", {}), ("MaxPool", "p", "y", {"kernel_shape": [3, 3]})],
    "add": [("Relu", "x", "r", {}), ("Add", "x r", "y", {})],
    "gemm": [POOL, ("Flatten", "p", "f", {}), ("Gemm", "f fc fb", "y", {"transB": 1})],
    "gemm not transposed": [POOL, ("Flatten", "p", "f", {}), ("Gemm", "f fc_t", "y", {})],
    "matmul": [("ReduceMean", "x axes", "f", {"keepdims": 0}), ("MatMul", "f fc_t", "y", {})],
    "matmul and bias": [
        ("ReduceMean", "x axes", "f", {"keepdims": 0}),
        ("MatMul", "f fc_t", "m", {}),
        ("Add", "fb m", "y", {}),
    ],
    "mean kept": [("ReduceMean", "x axes", "p", {}), ("Reshape", "p rows", "f", {}), ("Gemm", "f fc_t fb", "y", {})],
    "squeeze": [POOL, ("Squeeze", "p axes", "y", {})],
    "whole-map average": [("AveragePool", "x", "p", {"kernel_shape": [8, 9]}), ("Flatten", "p", "y", {})],
    "identities": [("Identity", "x", "i", {}), ("Dropout", "i", "d", {}), ("Relu", "d", "y", {})],
    "computed from constants": [("Transpose", "fc", "v", {}), ("Neg", "v", "n", {}), *HEAD, ("Gemm", "f n", "y", {})],
    "identity of weights": [("Identity", "w", "v", {}), ("Conv", "x v", "y", {})],
}
CHAINS["pad axes and conv"][0] = ("Pad", "x some_pads EMPTY axes", "p", {})


def built(name: str) -> onnx.ModelProto:
    proto = model(*CHAINS[name])
    for node in proto.graph.node:  # an input that is left out has an empty name
        for index, each in enumerate(node.input):
            if each == "EMPTY":
                node.input[index] = ""
    return proto


@pytest.mark.parametrize("name", CHAINS)
def test_supported_operators(name: str) -> None:
    compare(built(name))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("same_padding", [True, False])
def test_torchs_own_exporter(same_padding: bool, tmp_path: Path) -> None:
    """The whole network, whose explicit padding the exporter computes with a dozen nodes."""
    torch.manual_seed(0)
    network, path = Xception(5, width=0.1, same_padding=same_padding), tmp_path / "net.onnx"
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(2, 3, 96, 96))
    network.eval()
    x = torch.randn(1, 3, 96, 96)
    torch.onnx.export(network, (x,), path, dynamo=False)
    graph = load_onnx(path)
    verify(graph)
    with torch.no_grad():
        expected = network(x).numpy()
    assert np.abs(reference.run(graph, nhwc(x.numpy()))[0] - expected).max() < 1e-4 * np.abs(expected).max()
    assert {node.path for node in graph.nodes} >= {"classifier", "blocks.0.sepconvs.0.depthwise"}


def test_a_bias_that_others_read_too_stays_an_addition() -> None:
    """The product is also an output, so the addition may not disappear into it; adding a constant is then refused."""
    proto = built("matmul and bias")
    proto.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, None))
    with pytest.raises(UnsupportedLayer, match="the constant fb"):
        from_onnx(proto)


def test_paths() -> None:
    proto = model(("Conv", "x w b", "c", {}), ("Relu", "c", "y", {}))
    assert [n.path for n in from_onnx(proto).nodes] == ["", "block", "block"]
    for node in proto.graph.node:
        node.input[:] = ["stem.conv.weight" if name == "w" else name for name in node.input]
    proto.graph.initializer[0].name = "stem.conv.weight"
    graph = from_onnx(proto)
    assert [(n.name, n.path) for n in graph.nodes[1:]] == [("stem.conv", "stem.conv"), ("block.Relu", "block")]


REFUSED: dict[str, tuple[list[tuple[str, str, str, dict[str, Any]]], str, str]] = {
    "sigmoid": ([("Sigmoid", "x", "y", {})], "Sigmoid", "there is no int8 form of it here; supported are Conv"),
    "softmax": ([("Softmax", "x", "y", {})], "Softmax", "end the network at its logits"),
    "transpose": ([("Transpose", "x", "y", {"perm": [0, 2, 3, 1]})], "Transpose", "(N, C, H, W)"),
    "dilation": ([("Conv", "x w", "y", {"dilations": [2, 2]})], "Conv", "dilation [2, 2]"),
    "computed weights": ([("Relu", "x", "v", {}), ("Conv", "x v", "y", {})], "Conv", "operand 1 is computed while"),
    "a shape": ([("Shape", "x", "y", {})], "Shape", "export the network with fixed sizes"),
    "reflected": (
        [("Pad", "x pads", "p", {"mode": "reflect"}), ("Conv", "p w", "y", {})],
        "Pad",
        "padding mode reflect",
    ),
    "padding value": ([("Pad", "x pads two", "p", {}), ("Conv", "p w", "y", {})], "Pad", "padding with 2"),
    "factors": ([POOL, ("Flatten", "p", "f", {}), ("Gemm", "f fc_t", "y", {"alpha": 2.0})], "Gemm", "alpha 2.0"),
    "flatten a map": ([("Flatten", "x", "y", {})], "Flatten", "pool the map to 1x1"),
    "average": ([("AveragePool", "x", "y", {"kernel_shape": [2, 2]})], "AveragePool", "only the whole map is"),
    "mean of rows": ([("ReduceMean", "x rows", "y", {})], "ReduceMean", "only height and width together"),
    "training": (
        [("BatchNormalization", "x gamma beta mean var", "y", {"training_mode": 1})],
        "BatchNormalization",
        "ev",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_operators_are_refused_with_their_place(name: str) -> None:
    steps, operator, reason = REFUSED[name]
    with pytest.raises(UnsupportedLayer) as caught:
        from_onnx(model(*steps))
    assert (caught.value.operator, caught.value.path) == (operator, "block")
    assert reason in caught.value.reason


def test_open_sizes() -> None:
    assert from_onnx(model(("Relu", "x", "y", {}), shape=("batch", 3, 8, 9))).inputs[0].type.shape == (1, 8, 9, 3)
    proto = model(("Relu", "x", "y", {}), shape=(1, 3, "height", "width"))
    assert from_onnx(proto, 96).inputs[0].type.shape == (1, 96, 96, 3)
    with pytest.raises(UnsupportedLayer, match="open sizes; give --input-size, or export it with fixed ones"):
        from_onnx(proto)


def small_network() -> ir.Graph:
    """Every float operator."""
    builder = FloatBuilder(nhwc(array(1, 3, 8, 9)))
    builder.conv("conv", "input", 4, kernel=3, stride=2, pad=(0, 1, 1, 0))
    shape = builder.values["conv"].shape[-1:]
    statistics = {"g": array(*shape), "be": array(*shape), "m": array(*shape), "v": np.abs(array(*shape)) + 1}
    builder.append("norm", ir.BatchNorm(1e-3), ("conv",), statistics)
    builder.append("relu", ir.Relu(), ("norm",), {})
    builder.depthwise("depthwise", "relu")
    builder.append("add", ir.Add(relu=True), ("depthwise", "conv"), {})
    builder.append("pool", ir.MaxPool2d((3, 2), (2, 1), (0, 1, 1, 0)), ("add",), {})
    builder.append("mean", ir.GlobalAveragePool(), ("pool",), {})
    builder.append("linear", ir.FullyConnected(relu=True), ("mean",), {"w": array(5, 4), "b": array(5)})
    return builder.graph()


def test_writing() -> None:
    graph = small_network()
    proto = to_onnx(graph)
    onnx.checker.check_model(proto, full_check=True)
    x = array(1, 3, 8, 9)
    (ours,) = reference.run(graph, nhwc(x))
    (theirs,) = ReferenceEvaluator(proto).run(None, {"input": x})
    assert np.abs(ours).max() > 0
    assert np.allclose(ours, theirs, atol=1e-5)
    again = from_onnx(proto)
    verify(again)
    assert np.array_equal(reference.run(again, nhwc(x))[0], ours)


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(to_onnx(small_network()), path)
    zoo_model = zoo.load(path)
    assert zoo_model.graph.name == path.stem
    assert zoo_model.graph.type_of(zoo_model.graph.outputs[0]).shape == (1, 5)
    assert zoo_model.input_spec.height == 8
    assert zoo_model.labels == ("0", "1", "2", "3", "4")
    with pytest.raises(zoo.ModelError, match="carries its own input size"):
        zoo.load(path, size=100)
    whole = path.read_bytes()
    for contents in (b"", whole[: len(whole) // 2], b"\xff" * 100):
        path.write_bytes(contents)
        with pytest.raises(OnnxError, match=r"net\.onnx: is no sound ONNX model \(.*\); export it again"):
            load_onnx(path)


def test_tensors_in_a_file_beside_count_for_provenance(tmp_path: Path) -> None:
    path, data = tmp_path / "net.onnx", tmp_path / "net.onnx.data"
    onnx.save(to_onnx(small_network()), path, save_as_external_data=True, location=data.name, size_threshold=0)
    before = zoo.load(path).provenance
    assert before["sha256 of net.onnx.data"] == hashlib.sha256(data.read_bytes()).hexdigest()
    data.write_bytes(bytes([data.read_bytes()[0] ^ 1]) + data.read_bytes()[1:])
    after = zoo.load(path).provenance
    assert after["sha256"] == before["sha256"]
    assert after != before
