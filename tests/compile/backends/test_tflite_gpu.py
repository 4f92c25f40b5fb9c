"""The TFLite files for the GPU delegate: only operators of its published list, and the same network."""

from __future__ import annotations

import numpy as np
import pytest
import tflite
from support.int8_graphs import as_float, random_input, random_xception

from xceptile.compile.backends.tflite import GPU_OPERATORS, gpu_statement, serialize
from xceptile.models import graph as ir
from xceptile.runtime import reference
from xceptile.runtime.engines.litert import LiteRtEngine


def operators(file: bytes) -> set[str]:
    names = {code: name for name, code in vars(tflite.BuiltinOperator).items() if name.isupper()}
    model = tflite.Model.GetRootAs(file)
    return {names[model.OperatorCodes(i).BuiltinCode()] for i in range(model.OperatorCodesLength())}


@pytest.fixture(scope="module", params=[True, False], ids=["same", "torch padding"])
def graph(request: pytest.FixtureRequest) -> ir.Graph:
    return random_xception(75, 0.125, 10, same_padding=request.param)


def test_only_published_operators(graph: ir.Graph) -> None:
    assert operators(serialize(graph, for_gpu=True)) <= GPU_OPERATORS
    assert operators(serialize(as_float(graph), for_gpu=True, half=True)) <= GPU_OPERATORS | {"DEQUANTIZE"}
    assert all(told.startswith("gpu") for told in gpu_statement(graph).values())
    assert all(told.startswith("gpu") for told in gpu_statement(as_float(graph), half=True).values())


def test_the_files_for_xnnpack_would_fall_back_and_the_statement_says_so(graph: ir.Graph) -> None:
    told = gpu_statement(graph, for_gpu=False)
    assert told["MEAN"] == told["QUANTIZE"] == "falls back to the CPU"


def test_float16_constants_halve_the_file(graph: ir.Graph) -> None:
    network = as_float(graph)
    assert len(serialize(network, for_gpu=True, half=True)) < 0.6 * len(serialize(network))


def test_float16_is_the_same_network(graph: ir.Graph) -> None:
    network = as_float(graph)
    (x,) = random_input(network, 3)
    engine = LiteRtEngine(serialize(network, for_gpu=True, half=True), 1)
    (expected,), (got,) = reference.run(network, x), engine.run_once(x)
    noise = np.sum((expected - got) ** 2)
    assert 10 * np.log10(np.sum(expected**2) / noise) > 40  # constants have 11 bits, 66 dB each


def test_int8_for_the_gpu_is_the_same_network_but_for_the_means_rounding(graph: ir.Graph) -> None:
    (x,) = random_input(graph, 3)
    engine = LiteRtEngine(serialize(graph, for_gpu=True), 1)
    (expected,), (got,) = reference.run(graph, x), engine.run_once(x)
    assert np.abs(expected.astype(int) - got.astype(int)).max() <= 1


def test_a_constant_past_float16_is_refused() -> None:
    graph = as_float(random_xception(75, 0.125, 10))
    name = next(name for name, constant in graph.constants.items() if constant.data.ndim == 1)
    large = ir.Constant(graph.constants[name].type, np.full_like(graph.constants[name].data, 1e5))
    network = graph.with_nodes(graph.nodes, {**graph.constants, name: large})
    with pytest.raises(ir.GraphError, match=f"{name}: a value of 100000 does not fit float16"):
        serialize(network, for_gpu=True, half=True)
