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
from xceptile.models.from_onnx import Scaling, from_onnx, load_onnx
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.onnx_file import OnnxError
from xceptile.models.to_onnx import to_onnx
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
    "sizes": np.array([1, 1, 2, 2], np.float32),
    "zero": np.array(0.0, np.float32),
    "large": np.array(np.finfo(np.float32).max),
    "gamma_map": array(3, 1, 1),
    "map": array(8, 9),
    "fours": array(4, 1, 1),
    "w9": array(4, 8, 3, 3),
    "column": array(1, 1).repeat(2, 0),
    "pads_last": np.array([0, 1, 2, 0, 0, 0, 1, 0]),
    "rows_and_columns": np.array([1, 2]),
    "four_five": array(4, 5),
    "first": np.array([0]),
    "first_row": np.array([1]),
    "zero_index": np.array(0),
    "minus": np.array([-1]),
    "fc_map": np.random.default_rng(1).normal(0, 0.5, (216, 5)).astype(np.float32),
    "six": np.array(0.6, np.float32),
    "larger": np.array([1, 3, 13, 21]),
}


def model(*steps: tuple[str, str, str, dict[str, Any]], shape: tuple[Any, ...] = (1, 3, 8, 9)) -> onnx.ModelProto:
    """A chain of nodes: (operator, inputs, output, attributes)."""
    nodes = [
        helper.make_node(op, inputs.split(" ") if inputs else [], [output], name=f"/block/{op}", **attributes)
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


def compare(proto: onnx.ModelProto, x: np.ndarray | None = None) -> ir.Graph:
    """The graph, after comparing its output with onnx's own; the image is scaled as the import says."""
    onnx.checker.check_model(proto)
    network = from_onnx(proto)
    verify(network.graph)
    x = array(1, 3, 8, 9).astype(np.float16).astype(np.float32) if x is None else x  # as float16 has it, too
    image = nhwc(x[:1] if x.shape[1] == 3 else x[:1].transpose(0, 3, 1, 2)).astype(np.float32)
    if network.scaling is not None:
        image = (image * np.array(network.scaling.factor) + np.array(network.scaling.shift)).astype(np.float32)
    (ours,) = reference.run(network.graph, image)
    theirs = ReferenceEvaluator(proto).run(None, {"x": x})[0][:1]
    if network.softmax:
        ours = np.exp(ours) / np.exp(ours).sum()
    if ours.ndim == 4 and theirs.shape != ours.shape:
        theirs = nhwc(theirs)
    assert np.allclose(ours, theirs.reshape(ours.shape), rtol=1e-5, atol=1e-5 * max(1, np.abs(theirs).max()))
    return network.graph


HEAD = [("GlobalAveragePool", "x", "p", {}), ("Flatten", "p", "f", {})]
POOL = ("GlobalAveragePool", "x", "p", {})
FLOOR = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
ALIGNED = {"coordinate_transformation_mode": "align_corners"}
CHAINS: dict[str, list[tuple[str, str, str, dict[str, Any]]]] = {
    "conv": [("Conv", "x w b", "y", {"strides": [2, 1], "pads": [1, 0, 0, 2]})],
    "conv same upper": [("Conv", "x w", "y", {"strides": [2, 2], "auto_pad": "SAME_UPPER"})],
    "conv same lower": [("Conv", "x w", "y", {"strides": [2, 2], "auto_pad": "SAME_LOWER"})],
    "conv valid": [("Conv", "x w", "y", {"auto_pad": "VALID"})],
    "depthwise": [("Conv", "x dw", "y", {"group": 3, "pads": [1, 1, 1, 1]})],
    "resized by factors": [("Resize", "x  sizes", "y", {**FLOOR, "mode": "nearest"})],
    "resized": [("Resize", "x   larger", "y", {"mode": "linear"})],
    "resized as torch does": [
        ("Resize", "x   larger", "y", {"mode": "linear", "coordinate_transformation_mode": "pytorch_half_pixel"})
    ],
    "resized, aligned": [("Resize", "x   larger", "y", {"mode": "linear", **ALIGNED})],
    "resized, nearest": [("Resize", "x   larger", "y", {"nearest_mode": "round_prefer_ceil"})],
    "joined": [("Relu", "x", "r", {}), ("Concat", "r x r", "y", {"axis": -3})],
    "gate": [POOL, ("Sigmoid", "p", "s", {}), ("Mul", "s x", "y", {})],
    "a product of tensors": [("Relu", "x", "r", {}), ("Mul", "r x", "y", {})],
    "functions": [("Tanh", "x", "t", {}), ("LeakyRelu", "t", "l", {"alpha": 0.2}), ("Clip", "l zero six", "y", {})],
    "average windows": [("AveragePool", "x", "y", {"kernel_shape": [3, 2], "strides": [2, 1]})],
    "average windows, padded": [
        ("AveragePool", "x", "y", {"kernel_shape": [3, 3], "pads": [1, 0, 1, 1], "count_include_pad": 1})
    ],
    "flattened": [("Flatten", "x", "f", {}), ("MatMul", "f fc_map", "y", {})],
    "flattened, channels last": [
        ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
        ("Flatten", "t", "f", {}),
        ("MatMul", "f fc_map", "y", {}),
    ],
    "dilated": [("Conv", "x w b", "y", {"dilations": [2, 3], "pads": [2, 2, 3, 3]})],
    "dilated depthwise": [("Conv", "x dw", "y", {"group": 3, "dilations": [3, 2]})],
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
    "clip as ReLU": [("Clip", "x zero", "y", {})],
    "clip with a last number": [("Clip", "x zero large", "y", {})],
    "softmax at the end": [
        *HEAD,
        ("Gemm", "f fc_t fb", "g", {}),
        ("Softmax", "g", "s", {}),
        ("Identity", "s", "y", {}),
    ],
    "scaled": [("Sub", "x gamma_map", "d", {}), ("Div", "d two", "q", {}), ("Conv", "q w", "y", {})],
    "scaled the other way": [("Sub", "two x", "d", {}), ("Mul", "two d", "q", {}), ("Relu", "q", "y", {})],
    "factors behind a layer": [
        ("Conv", "x w b", "c", {}),
        ("Mul", "c fours", "m", {}),
        ("Add", "m fours", "n", {}),
        ("Relu", "n", "r", {}),
        ("Add", "n r", "y", {}),  # two read it: it is one normalization
    ],
    "factors in a head": [
        *HEAD,
        ("Mul", "f gamma", "m", {}),
        ("Add", "m beta", "a", {}),
        ("Gemm", "a fc_t fb", "y", {}),
    ],
    "norm in a head": [
        *HEAD,
        ("BatchNormalization", "f gamma beta mean var", "n", {}),
        ("MatMul", "n fc_t", "m", {}),
        ("Add", "m fb", "a", {}),
        ("Mul", "a two", "y", {}),
    ],
    "channels last": [
        ("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}),
        ("Mul", "t gamma", "m", {}),
        ("Relu", "m", "r", {}),
        ("Pad", "r pads_last", "p", {}),
        ("Transpose", "p", "u", {"perm": [0, 3, 1, 2]}),
        ("Conv", "u w", "c", {}),
        ("Transpose", "c", "v", {"perm": [0, 2, 3, 1]}),
        ("ReduceMean", "v rows_and_columns", "f", {"keepdims": 0}),
        ("MatMul", "f four_five", "y", {}),
    ],
    "dimensions come and go": [
        POOL,
        ("Transpose", "p", "t", {"perm": [0, 2, 3, 1]}),
        ("Squeeze", "t first_row", "s", {}),
        ("Unsqueeze", "s first_row", "u", {}),
        ("Reshape", "u rows", "f", {}),
        ("Unsqueeze", "f axes", "w4", {}),
        ("Flatten", "w4", "g", {}),
        ("Gemm", "g fc_t", "y", {}),
    ],
    "shapes computed": [
        POOL,
        ("Shape", "p", "shape", {}),
        ("Gather", "shape zero_index", "n", {}),
        ("Unsqueeze", "n zero_index", "n1", {}),
        ("Concat", "n1 minus", "to", {"axis": 0}),
        ("Reshape", "p to", "f", {}),
        ("Gemm", "f fc_t fb", "y", {}),
    ],
    "half precision": [
        ("Cast", "x", "h", {"to": TensorProto.FLOAT16}),
        ("Cast", "h", "k", {"to": TensorProto.FLOAT}),
        ("Conv", "k w", "y", {}),
    ],
    "like another": [("Relu", "x", "r", {}), ("CastLike", "b r", "c", {}), ("Conv", "r w c", "y", {})],
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
    graph = load_onnx(path).graph
    verify(graph)
    with torch.no_grad():
        expected = network(x).numpy()
    assert np.abs(reference.run(graph, nhwc(x.numpy()))[0] - expected).max() < 1e-4 * np.abs(expected).max()
    assert {node.path for node in graph.nodes} >= {"classifier", "blocks.0.sepconvs.0.depthwise"}


def test_paths() -> None:
    proto = model(("Conv", "x w b", "c", {}), ("Relu", "c", "y", {}))
    assert [n.path for n in from_onnx(proto).graph.nodes] == ["", "block", "block"]
    for node in proto.graph.node:
        node.input[:] = ["stem.conv.weight" if name == "w" else name for name in node.input]
    proto.graph.initializer[0].name = "stem.conv.weight"
    graph = from_onnx(proto).graph
    assert [(n.name, n.path) for n in graph.nodes[1:]] == [("stem.conv", "stem.conv"), ("block.Relu", "block")]


REFUSED: dict[str, tuple[list[tuple[str, str, str, dict[str, Any]]], str, str]] = {
    "nearest between pixels": (
        [("Resize", "x  sizes", "y", {})],
        "Resize",
        "half_pixel, round_prefer_floor; linear at",
    ),
    "rows joined": ([("Concat", "x x", "y", {"axis": 2})], "Concat", "other dimensions than channels"),
    "elu": (
        [("Elu", "x", "e", {}), ("Relu", "e", "y", {})],
        "Elu",
        "there is no int8 form of it here; supported are Conv",
    ),
    "sigmoid": ([("Sigmoid", "x", "y", {})], "Sigmoid", "end the network at its logits, and apply this"),
    "argmax": ([*HEAD, ("ArgMax", "f", "y", {})], "ArgMax", "the output y is made by it"),
    "softmax of a map": ([("Softmax", "x", "y", {})], "Softmax", "end the network at its logits"),
    "softmax inside": ([*HEAD, ("Softmax", "f", "s", {}), ("Relu", "s", "y", {})], "Relu", "the result of a Softmax"),
    "softmax scaled": ([*HEAD, ("Softmax", "f", "s", {}), ("Mul", "s two", "y", {})], "Mul", "the result of a Softmax"),
    "other layout": (
        [("Transpose", "x", "t", {"perm": [0, 2, 3, 1]}), ("Conv", "t w9", "y", {})],
        "Conv",
        "where it takes N, C, H, W; export the network with channels first (tf2onnx: --inputs-as-nchw)",
    ),
    "layouts added": (
        [("Relu", "x", "r", {}), ("Transpose", "r", "t", {"perm": [0, 1, 3, 2]}), ("Add", "r t", "y", {})],
        "Add",
        "of axes N, C, H, W and N, C, W, H",
    ),
    "dilation": ([("Conv", "x w", "y", {"dilations": [2, 2], "auto_pad": "SAME_UPPER"})], "Conv", "dilation [2, 2]"),
    "computed weights": ([("Relu", "x", "v", {}), ("Conv", "x v", "y", {})], "Conv", "operand 1 is computed while"),
    "steps of nothing": ([("Conv", "x w", "y", {"strides": [0, 1]})], "Conv", "in steps of [0, 1]"),
    "steps of nothing, padded": ([("Conv", "x w", "y", {"strides": [0, 0], "auto_pad": "SAME_UPPER"})], "Conv", "zero"),
    "pooling in steps of nothing": (
        [("MaxPool", "x", "y", {"kernel_shape": [2, 2], "strides": [0, 1]})],
        "MaxPool",
        "in steps of [0, 1]",
    ),
    "a window of nothing": ([("MaxPool", "x", "y", {"kernel_shape": [0, 2]})], "MaxPool", "window [0, 2]"),
    "another window": ([("Conv", "x w", "y", {"kernel_shape": [2, 2]})], "Conv", "a window of [2, 2] with weights for"),
    "unknown padding": ([("Conv", "x w", "y", {"auto_pad": "MIRROR"})], "Conv", "auto_pad MIRROR, which the standard"),
    "padding without end": (
        [("Conv", "x w", "y", {"pads": [1 << 40] * 4})],
        "Conv",
        "it makes a tensor of shape [1, 2",
    ),
    "average, padded": (
        [("AveragePool", "x", "y", {"kernel_shape": [8, 9], "auto_pad": "SAME_UPPER"})],
        "AveragePool",
        "its padding does not count",
    ),
    "clip": ([("Clip", "x two", "y", {})], "Clip", "to 2 and inf; a finite range that holds zero"),
    "a map of factors": (
        [("Relu", "x", "r", {}), ("Mul", "r map", "y", {})],
        "Mul",
        "one number a channel, or one for all",
    ),
    "a map of factors on the image": ([("Mul", "x map", "y", {})], "Mul", "if it scales pixels, export without it and"),
    "a difference of tensors": (
        [("Relu", "x", "r", {}), ("Sub", "r x", "y", {})],
        "Sub",
        "of two tensors; there is no",
    ),
    "a number by a tensor": ([("Div", "two x", "y", {})], "Div", "of a constant by a tensor"),
    "a factor without end": ([("Div", "x zero", "y", {})], "Div", "that is not finite"),
    "the image in two ways": (
        [("Mul", "x two", "m", {}), ("Add", "x m", "y", {})],
        "Add",
        "scaled otherwise than another",
    ),
    "a bias for each image": ([*HEAD, ("Gemm", "f fc_t column", "y", {})], "Gemm", "one number an output"),
    "normalized pixels": (
        [("BatchNormalization", "x gamma beta mean var", "y", {"spatial": 0})],
        "BatchNormalization",
        "each pixel by itself",
    ),
    "a map without a batch": ([("Squeeze", "x first", "y", {})], "Squeeze", "only height and width of one pixel are"),
    "random": ([("RandomNormalLike", "x", "r", {}), ("Add", "x r", "y", {})], "RandomNormalLike", "random numbers"),
    "random weights": (
        [("RandomUniform", "", "r", {"shape": [4, 3, 3, 3]}), ("Conv", "x r", "y", {})],
        "RandomUniform",
        "another at every load",
    ),
    "no dimensions": ([("Transpose", "x", "t", {"perm": [0, 9, 1, 2]}), ("Relu", "t", "y", {})], "Transpose", "not go"),
    "reflected": (
        [("Pad", "x pads", "p", {"mode": "reflect"}), ("Conv", "p w", "y", {})],
        "Pad",
        "padding mode reflect",
    ),
    "padding value": ([("Pad", "x pads two", "p", {}), ("Conv", "p w", "y", {})], "Pad", "padding with 2"),
    "factors": ([POOL, ("Flatten", "p", "f", {}), ("Gemm", "f fc_t", "y", {"alpha": 2.0})], "Gemm", "alpha 2.0"),
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


def test_several_outputs_are_refused_by_name() -> None:
    proto = built("matmul and bias")
    proto.graph.output.append(helper.make_tensor_value_info("m", TensorProto.FLOAT, None))
    with pytest.raises(UnsupportedLayer, match=r"the outputs are y, m; export the network with one of them alone"):
        from_onnx(proto)


def test_a_part_that_no_output_needs_is_not_looked_at() -> None:
    proto = model(("Elu", "x", "e", {}), ("Relu", "x", "y", {}))
    assert len(compare(proto).nodes) == 2


@pytest.mark.parametrize("name", ["gemm", "mean kept", "shapes computed", "dimensions come and go", "scaled"])
def test_a_fixed_batch_becomes_one(name: str) -> None:
    proto = model(*CHAINS[name], shape=(4, 3, 8, 9))
    assert compare(proto, array(4, 3, 8, 9)).inputs[0].type.shape == (1, 8, 9, 3)


def test_an_image_with_channels_last() -> None:
    steps = [("Transpose", "x", "t", {"perm": [0, 3, 1, 2]}), ("Conv", "t w b", "y", {})]
    graph = compare(model(*steps, shape=(2, 8, 9, 3)), array(2, 8, 9, 3))
    assert graph.inputs[0].type.shape == (1, 8, 9, 3)
    assert from_onnx(model(*steps, shape=("n", "h", "w", 3)), 40).graph.inputs[0].type.shape == (1, 40, 40, 3)
    with pytest.raises(UnsupportedLayer, match=r"channels first \(tf2onnx: --inputs-as-nchw\)"):
        from_onnx(model(("Conv", "x w b", "y", {}), shape=(1, 8, 9, 3)))


def test_bytes_are_pixels() -> None:
    steps = [("Cast", "x", "f", {"to": TensorProto.FLOAT}), ("Mul", "f two", "m", {}), ("Conv", "m w", "y", {})]
    proto = model(*steps)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    compare(proto, RNG.integers(0, 256, (1, 3, 8, 9)).astype(np.uint8))
    assert from_onnx(proto).scaling == Scaling((2.0,) * 3, (0.0,) * 3, whole=True)
    for bare in ([("Conv", "x w", "y", {})], [("Mul", "x two", "y", {})]):
        proto = model(*bare)
        proto.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
        with pytest.raises(
            UnsupportedLayer, match="it computes with the image's bytes; export the network with a Cast"
        ):
            from_onnx(proto)
    proto.graph.input[0].type.tensor_type.elem_type = TensorProto.INT32
    with pytest.raises(UnsupportedLayer, match="it is INT32; a network takes images of float32, float16 or uint8"):
        from_onnx(proto)


@pytest.mark.parametrize(
    ("factor", "shift", "unit", "mean", "std"),
    [
        ([np.float32(1 / 127.5)] * 3, [-1] * 3, 255, [0.5] * 3, [0.5] * 3),
        ([np.float32(1 / 255)] * 3, [0] * 3, 255, [0] * 3, [1] * 3),
        ([2] * 3, [-1] * 3, 1, [0.5] * 3, [0.5] * 3),
        (
            [1 / 0.229, 1 / 0.224, 1 / 0.225],
            [-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225],
            *(1, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ),
        (
            [1 / 58.395, 1 / 57.12, 1 / 57.375],
            [-123.675 / 58.395, -116.28 / 57.12, -103.53 / 57.375],
            *(255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ),
        ([1] * 3, [-123.68, -116.78, -103.94], 255, [123.68 / 255, 116.78 / 255, 103.94 / 255], [1 / 255] * 3),
        ([1] * 3, [-0.5] * 3, 1, [0.5] * 3, [1] * 3),
    ],
)
def test_the_unit_of_pixels_is_the_one_that_networks_take(
    factor: list[float], shift: list[float], unit: int, mean: list[float], std: list[float]
) -> None:
    found = Scaling(tuple(map(float, factor)), tuple(map(float, shift)), whole=False).normalization()
    assert found[0] == unit
    assert found[1:] == (pytest.approx(tuple(mean), 2e-7), pytest.approx(tuple(std), 2e-7))
    assert found[2][0] in (0.5, 1.0, 0.229, 1 / 255)  # the number that was meant


@pytest.mark.parametrize(
    ("factor", "shift", "whole", "message"),
    [
        (0.2, 0.0, False, "from 0 to 255 or from 0 to 1 is not to be seen"),
        (1e-6, 0.0, False, "not to be seen"),
        (0.0, 0.0, False, "not to be seen"),
        (-2.0, 1.0, False, "turns its image's light into dark"),
        (0.0, 0.0, True, "turns its image's light into dark"),
    ],
)
def test_a_scaling_that_says_no_unit_is_refused(factor: float, shift: float, whole: bool, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Scaling((factor,) * 3, (shift,) * 3, whole).normalization()


def test_open_sizes() -> None:
    assert from_onnx(model(("Relu", "x", "y", {}), shape=("batch", 3, 8, 9))).graph.inputs[0].type.shape == (1, 8, 9, 3)
    proto = model(("Relu", "x", "y", {}), shape=(1, 3, "height", "width"))
    assert from_onnx(proto, 96).graph.inputs[0].type.shape == (1, 96, 96, 3)
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
    again = from_onnx(proto).graph
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
