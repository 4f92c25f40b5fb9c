"""The LiteRT engine: the whole of Xception bit for bit, where each operator runs, and what it says when it cannot."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from support.int8_graphs import all_outputs, as_float, differences, photo, random_operator_graph, random_xception
from support.needs import requires_hardware, requires_module

from xceptile.compile.backends.tflite import serialize
from xceptile.models import graph as ir
from xceptile.runtime import reference
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.engines.litert import LiteRtEngine

pytestmark = requires_module("ai_edge_litert", package="ai-edge-litert")


@pytest.fixture(scope="module")
def small() -> ir.Graph:
    return random_xception(75, 0.25, 20)


@pytest.fixture(scope="module")
def whole() -> ir.Graph:
    return random_xception(299)


def stack(count: int, size: int) -> np.ndarray:
    return np.concatenate([photo(size, size, seed) for seed in range(count)])


def test_every_tensor_of_xception_at_full_size_is_the_references(whole: ir.Graph) -> None:
    graph, x = all_outputs(whole), photo(299, 299, seed=5)
    engine = LiteRtEngine(serialize(graph), threads=2)
    assert len(graph.outputs) == 103
    assert all(p.delegated for p in engine.placements())
    assert differences(graph, (x,), engine.run_once(x)) == {}


def test_float_xception_at_full_size_is_the_float_reference_and_all_of_it_delegated(whole: ir.Graph) -> None:
    graph = as_float(whole)
    x = photo(299, 299, seed=5).astype(np.float32) + 128
    engine = LiteRtEngine(serialize(graph), threads=2)
    assert all(p.delegated for p in engine.placements())
    (want,) = reference.run(graph, x)
    np.testing.assert_allclose(engine.run(x), want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("same_padding", [True, False])
@pytest.mark.parametrize("size", [71, 76, 96])
def test_other_sizes_and_paddings(size: int, same_padding: bool) -> None:
    graph = all_outputs(random_xception(size, 0.125, 7, same_padding=same_padding))
    x = photo(size, size, seed=3)
    engine = LiteRtEngine(serialize(graph))
    assert all(p.delegated for p in engine.placements())
    assert differences(graph, (x,), engine.run_once(x)) == {}


def test_a_stack_of_images_from_a_file(small: ir.Graph, tmp_path: Path) -> None:
    path = tmp_path / "int8.tflite"
    path.write_bytes(serialize(small))
    x = stack(3, 75)
    engine = LiteRtEngine(path, threads=2)
    assert engine.name == "litert"
    want = np.concatenate([reference.run(small, image[None])[0] for image in x])
    np.testing.assert_array_equal(engine.run(x), want)
    samples = engine.time_ms(x[:1], repeats=3, warmup=1)
    assert len(samples) == 3
    assert min(samples) > 0
    engine.close()


def test_what_xnnpack_does_not_take_is_told(small: ir.Graph) -> None:
    """Without XNNPACK no operator is delegated, and the outputs are not the contract's."""
    engine = LiteRtEngine(serialize(small), xnnpack=False)
    placements = engine.placements()
    assert [p.tensor for p in placements] == [node.name for node in small.nodes[1:]]
    assert not any(p.delegated for p in placements)
    x = stack(4, 75)
    want = np.concatenate([reference.run(small, image[None])[0] for image in x])
    assert (engine.run(x) != want).any()


def test_one_operator_left_out_is_told() -> None:
    """A pool with a stride beyond its window is one that XNNPACK leaves to LiteRT: still exact."""
    graph = random_operator_graph("pool", (1, 9, 9, 4), kernel=(2, 2), strides=(3, 3))
    engine = LiteRtEngine(serialize(graph))
    assert [(p.tensor, p.op, p.delegated) for p in engine.placements()] == [("pool_0", "MAX_POOL_2D", False)]
    x = np.random.default_rng(0).integers(-128, 128, (1, 9, 9, 4), np.int8)
    assert differences(graph, (x,), engine.run_once(x)) == {}


@requires_hardware(sys.version_info < (3, 12), "Python 3.11 or older")
@requires_module("tflite_runtime", package="tflite-runtime")
def test_tflite_runtime_opens_the_same_file_and_is_not_bit_exact(small: ir.Graph) -> None:
    x = stack(4, 75)
    engine = LiteRtEngine(serialize(small), library="tflite_runtime")
    assert engine.name == "tflite-runtime"
    assert not any(p.delegated for p in engine.placements())
    want = np.concatenate([reference.run(small, image[None])[0] for image in x])
    steps = np.abs(engine.run(x).astype(np.int32) - want)
    assert 0 < steps.max() < 40
    assert steps.mean() < 8


def test_a_missing_library_names_the_extra(small: ir.Graph, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    with pytest.raises(EngineError, match=r"litert needs the package ai-edge-litert: pip install 'xceptile\[litert\]'"):
        LiteRtEngine(serialize(small))


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x1c\0\0\0TFL3" + bytes(64)])
def test_a_broken_file_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.tflite"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"litert refuses .*broken\.tflite"):
        LiteRtEngine(path)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"litert refuses .*absent\.tflite"):
        LiteRtEngine(tmp_path / "absent.tflite")


@pytest.mark.parametrize("wrong", [np.zeros((1, 80, 75, 3), np.int8), np.zeros((1, 75, 75, 3), np.float32)])
def test_an_input_that_does_not_fit_is_refused(small: ir.Graph, wrong: np.ndarray) -> None:
    with pytest.raises(EngineError, match="litert: "):
        LiteRtEngine(serialize(small)).run(wrong)
