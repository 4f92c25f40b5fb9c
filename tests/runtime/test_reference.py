"""The interpreters: the integer one against loops over single numbers, the float one against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support import int8_graphs as int8
from support import scalar_contract as scalar
from support.float_graphs import FloatBuilder

from xceptile.models import graph as ir
from xceptile.runtime import reference


def naive(graph: ir.Graph, *inputs: np.ndarray) -> np.ndarray:
    """The last node of a graph of one operator, by loops over Python integers; batch 1."""
    node = graph.nodes[-1]
    q_in = graph.type_of(node.inputs[0]).per_tensor
    q_out, op = node.type.per_tensor, node.op
    x = inputs[0][0].astype(object)
    out = np.zeros(node.type.shape[1:], np.int8)
    constants = [graph.constants[n].data for n in node.inputs if n in graph.constants]
    if constants:
        scales = graph.constants[node.inputs[1]].type.per_axis.scales
        m = [scalar.multiplier(q_in.scale, s, q_out.scale) for s in scales]

    def pixel(row: int, column: int, channel: int) -> int:
        inside = 0 <= row < x.shape[0] and 0 <= column < x.shape[1]
        return int(x[row, column, channel]) - q_in.zero_point if inside else 0

    for index in np.ndindex(out.shape):
        match op:
            case ir.Conv2d() | ir.DepthwiseConv2d():
                weights, bias = constants
                acc = int(bias[index[2]])
                depthwise = isinstance(op, ir.DepthwiseConv2d)
                kernel = weights.shape[:2] if depthwise else weights.shape[1:3]
                for i, j in np.ndindex(kernel):
                    row = index[0] * op.strides[0] - op.padding[0] + i
                    column = index[1] * op.strides[1] - op.padding[2] + j
                    if depthwise:
                        acc += pixel(row, column, index[2]) * int(weights[i, j, index[2]])
                    else:
                        for c in range(weights.shape[3]):
                            acc += pixel(row, column, c) * int(weights[index[2], i, j, c])
                out[index] = scalar.convolution_output(acc, m[index[2]], q_out.zero_point, op.relu)
            case ir.FullyConnected():
                weights, bias = constants
                acc = int(bias[index[0]]) + sum(
                    (int(v) - q_in.zero_point) * int(w) for v, w in zip(x, weights[index[0]], strict=True)
                )
                out[index] = scalar.convolution_output(acc, m[index[0]], q_out.zero_point, op.relu)
            case ir.MaxPool2d():
                best = -128
                for i, j in np.ndindex(op.kernel):
                    row = index[0] * op.strides[0] - op.padding[0] + i
                    column = index[1] * op.strides[1] - op.padding[2] + j
                    if 0 <= row < x.shape[0] and 0 <= column < x.shape[1]:
                        best = max(best, int(x[row, column, index[2]]))
                out[index] = best
            case ir.Relu():
                out[index] = scalar.clamp(int(x[index]) - q_in.zero_point, 0, 255) - 128
            case ir.Add():
                q_b = graph.type_of(node.inputs[1]).per_tensor
                out[index] = scalar.add_output(
                    int(x[index]),
                    int(inputs[1][0][index]),
                    q_in.scale,
                    q_in.zero_point,
                    q_b.scale,
                    q_b.zero_point,
                    q_out.scale,
                    q_out.zero_point,
                    op.relu,
                )
            case ir.Lookup("identity"):
                out[index] = scalar.requantize_output(
                    int(x[index]), q_in.scale, q_in.zero_point, q_out.scale, q_out.zero_point
                )
            case ir.GlobalAveragePool():
                pixels = x.shape[0] * x.shape[1]
                total = int(x[:, :, index[0]].sum()) - pixels * q_in.zero_point
                out[index] = scalar.mean_output(total, q_in.scale, q_out.scale, pixels, q_out.zero_point)
    return out[None]


CASES = [
    ("conv", (1, 5, 7, 3), {"kernel": (3, 3), "strides": (2, 2), "channels": 7}),
    ("conv", (1, 6, 5, 2), {"kernel": (3, 2), "padding": (1, 0, 0, 1), "channels": 3, "relu": True}),
    ("conv", (1, 4, 5, 15), {"kernel": (1, 1), "strides": (2, 2), "channels": 8}),
    ("depthwise", (1, 6, 7, 7), {"padding": (1, 1, 1, 1)}),
    ("depthwise", (1, 7, 6, 3), {"padding": (0, 1, 0, 1), "strides": (2, 2), "relu": True}),
    ("linear", (1, 33), {"channels": 5}),
    ("linear", (1, 8), {"channels": 16, "relu": True}),
    ("relu", (1, 3, 5, 7), {}),
    ("pool", (1, 7, 6, 3), {"strides": (2, 2), "padding": (0, 1, 1, 1)}),
    ("add", (1, 4, 5, 3), {}),
    ("add", (1, 4, 5, 3), {"relu": True}),
    ("requantize", (1, 4, 5, 3), {}),
    ("mean", (1, 10, 10, 3), {}),
    ("mean", (1, 3, 3, 5), {}),
]


@pytest.mark.parametrize(("kind", "shape", "options"), CASES)
def test_int8_operators_equal_naive_loops(kind, shape, options):
    graph = int8.random_operator_graph(kind, shape, **options)
    for seed in range(2):
        inputs = int8.random_input(graph, seed)
        assert np.array_equal(reference.run(graph, *inputs)[0], naive(graph, *inputs))


def test_the_comparison_sees_a_convolution_that_pads_with_quantized_zeros():
    graph = int8.random_operator_graph("depthwise", (1, 6, 7, 7), padding=(1, 1, 1, 1))
    x = int8.random_input(graph)[0]
    wrong = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # q = 0 is not the real zero unless z = 0
    unpadded = int8.replace(graph.nodes[-1], op=ir.DepthwiseConv2d((1, 1), (0, 0, 0, 0)))
    seen = reference.run_node(graph, unpadded, [wrong, *(graph.constants[n].data for n in unpadded.inputs[1:])])
    assert not np.array_equal(seen, naive(graph, x))


def test_products_are_exact_where_float32_would_not_be():
    channels = 2000  # 2000 * 255 * 127 is beyond 2**24
    weights = np.full((1, channels), 127, np.int8)
    weights[0, -1] = 1
    quant, scales = ir.PerTensor(1.0, -128), ir.PerAxis((1.0,), 0)
    constants = {
        "w": ir.Constant(ir.TensorType((1, channels), "int8", scales), weights),
        "b": ir.Constant(ir.TensorType((1,), "int32", scales), np.array([-(255 * 127 * 1999 + 200)], np.int32)),
    }
    nodes = (
        ir.Node("x", ir.Input(), (), ir.TensorType((1, channels), "int8", quant)),
        ir.Node("y", ir.FullyConnected(), ("x", "w", "b"), ir.TensorType((1, 1), "int8", ir.PerTensor(1.0, 0))),
    )
    graph = ir.Graph("exact", nodes, constants, ("y",))
    assert reference.run(graph, np.full((1, channels), 127, np.int8))[0].item() == 255 - 200


def test_an_accumulator_beyond_int32_is_an_error_and_not_a_wrong_number():
    scales = ir.PerAxis((1.0,), 0)
    constants = {
        "w": ir.Constant(ir.TensorType((1, 1), "int8", scales), np.array([[127]], np.int8)),
        "b": ir.Constant(ir.TensorType((1,), "int32", scales), np.array([2**31 - 1], np.int32)),
    }
    kind = ir.TensorType((1, 1), "int8", ir.PerTensor(1.0, -128))
    nodes = (ir.Node("x", ir.Input(), (), kind), ir.Node("y", ir.FullyConnected(), ("x", "w", "b"), kind))
    with pytest.raises(OverflowError, match="int32"):
        reference.run(ir.Graph("overflow", nodes, constants, ("y",)), np.array([[127]], np.int8))


def test_tensors_are_freed_after_their_last_reader_and_outputs_kept():
    graph = int8.random_xception(71, 0.125, 4)
    x = int8.photo(71, 71, 1)
    values = dict(reference.iterate(graph, {graph.inputs[0].name: x}))
    assert list(values) == [node.name for node in graph.nodes]
    assert np.array_equal(reference.run(graph, x)[0], values[graph.outputs[0]])


def test_a_wrong_input_is_refused():
    graph = int8.random_operator_graph("relu", (1, 3, 5, 7))
    with pytest.raises(ir.GraphError, match=r"is float32\[1, 3, 5, 7\], the network takes int8\[1, 3, 5, 7\]"):
        reference.run(graph, np.zeros((1, 3, 5, 7), np.float32))
    with pytest.raises(ir.GraphError, match=r"int8\[3, 5, 7\]"):
        reference.run(graph, np.zeros((3, 5, 7), np.int8))


def test_an_operator_without_meaning_names_its_module():
    builder = FloatBuilder(np.ones((1, 4, 4, 2)))
    builder.norm("some.norm", "input")
    graph = builder.graph()
    x = ir.Node("input", ir.Input(), (), ir.TensorType((1, 4, 4, 2), "int8", ir.PerTensor(1.0, 0)))
    with pytest.raises(ir.GraphError, match="no integer meaning for BatchNorm") as error:
        reference.run(graph.with_nodes((x, *graph.nodes[1:])), np.ones((1, 4, 4, 2), np.int8))
    assert error.value.path == "some.norm"


# --- float ---


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.transpose(0, 3, 1, 2).copy())


def nhwc(x: torch.Tensor) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


def torch_padding(padding: ir.Pads) -> tuple[int, int, int, int]:
    top, bottom, left, right = padding
    return left, right, top, bottom


@pytest.fixture
def builder():
    return FloatBuilder(np.random.default_rng(7).normal(size=(2, 9, 8, 5)), seed=8)


def constants_of(builder: FloatBuilder, name: str) -> list[np.ndarray]:
    node = next(n for n in builder.nodes if n.name == name)
    return [builder.constants[n].data for n in node.inputs if n in builder.constants]


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, (0,) * 4), (3, 2, (0, 1, 0, 1)), (3, 1, (1, 0, 2, 1))]
)
def test_float_convolution_equals_torch(builder, kernel, stride, padding):
    x = builder.values["input"]
    y = builder.values[builder.conv("y", "input", 6, kernel, stride, padding)]
    weights, _ = constants_of(builder, "y")
    expected = F.conv2d(F.pad(nchw(x), torch_padding(padding)), nchw(weights), stride=stride)
    np.testing.assert_allclose(y, nhwc(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1, 1, 1)), (2, (0, 1, 0, 1))])
def test_float_depthwise_convolution_equals_torch(builder, stride, padding):
    x = builder.values["input"]
    y = builder.values[builder.depthwise("y", "input", stride, padding)]
    weights = torch.from_numpy(constants_of(builder, "y")[0].transpose(2, 0, 1)[:, None].copy())
    expected = F.conv2d(F.pad(nchw(x), torch_padding(padding)), weights, stride=stride, groups=5)
    np.testing.assert_allclose(y, nhwc(expected), rtol=1e-5, atol=1e-5)


def test_float_batch_norm_equals_torch(builder):
    x = builder.values["input"]
    y = builder.values[builder.norm("y", "input", 1e-3)]
    gamma, beta, mean, variance = (torch.from_numpy(c.copy()) for c in constants_of(builder, "y"))
    expected = F.batch_norm(nchw(x), mean, variance, gamma, beta, eps=1e-3)
    np.testing.assert_allclose(y, nhwc(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", [(0, 1, 0, 1), (1, 1, 1, 1), (0, 0, 0, 0)])
def test_float_max_pool_equals_torch_and_padding_never_wins(builder, padding):
    x = builder.values["input"] - np.float32(100)  # all negative: a padded zero would win
    builder.values["input"] = x
    y = builder.values[builder.max_pool("y", "input", padding)]
    expected = F.max_pool2d(F.pad(nchw(x), torch_padding(padding), value=-np.inf), 3, 2)
    assert np.array_equal(y, nhwc(expected))


def test_float_mean_linear_relu_and_add_equal_torch(builder):
    x = torch.from_numpy(builder.values["input"])
    doubled = builder.add("sum", builder.relu("relu", "input"), "input")
    np.testing.assert_allclose(builder.values[doubled], (F.relu(x) + x).numpy(), rtol=1e-6)
    mean = builder.mean("mean", "input")
    np.testing.assert_allclose(builder.values[mean], x.mean((1, 2)).numpy(), rtol=1e-5, atol=1e-6)
    logits = builder.linear("logits", mean, 4)
    weights, bias = (torch.from_numpy(c.copy()) for c in constants_of(builder, "logits"))
    np.testing.assert_allclose(builder.values[logits], F.linear(x.mean((1, 2)), weights, bias).numpy(), atol=1e-5)


def test_a_fused_relu_equals_a_relu_after(builder):
    for make in ("conv", "depthwise", "linear", "add"):
        match make:
            case "conv":
                name = builder.conv("conv", "input", 6, 3)
            case "depthwise":
                name = builder.depthwise("depthwise", "input")
            case "linear":
                name = builder.linear("linear", builder.mean("mean", "input"), 4)
            case _:
                name = builder.add("add", "input", "input")
        graph = builder.graph()
        node = graph.node(name)
        args = [builder.values.get(n, None) for n in node.inputs]
        args = [graph.constants[n].data if a is None else a for a, n in zip(args, node.inputs, strict=True)]
        fused = ir.Node(name, type(node.op)(**{**vars(node.op), "relu": True}), node.inputs, node.type)
        assert np.array_equal(reference.run_node(graph, fused, args), np.maximum(builder.values[name], 0))


def test_a_mixed_graph_quantizes_and_dequantizes():
    quant = ir.PerTensor(0.5, 3)
    nodes = (
        ir.Node("x", ir.Input(), (), ir.TensorType((1, 6), "float32")),
        ir.Node("q", ir.Quantize(), ("x",), ir.TensorType((1, 6), "int8", quant)),
        ir.Node("y", ir.Dequantize(), ("q",), ir.TensorType((1, 6), "float32")),
    )
    graph = ir.Graph("mixed", nodes, {}, ("q", "y"))
    x = np.array([[0.25, 0.75, -0.25, 1e9, -1e9, 0.26]], np.float32)  # .5, 1.5 and -.5 steps are ties
    q, y = reference.run(graph, x)
    assert q.tolist() == [[3, 5, 3, 127, -128, 4]]
    assert y.tolist() == [[0.0, 1.0, 0.0, 62.0, -65.5, 0.5]]
