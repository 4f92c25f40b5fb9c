"""The first layer at which an engine differs: found where a fault was planted, and truthful where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from needs import requires_hardware
from small_bundle import labelled, litert_bundle, quantized

from xceptile.compile import divergence
from xceptile.compile.backends import tflite
from xceptile.compile.divergence import first_difference, prefix
from xceptile.models import graph as ir
from xceptile.models import serialize
from xceptile.models.verify import verify
from xceptile.runtime import bundle as bundles
from xceptile.runtime import reference
from xceptile.runtime.bundle import Bundle, open_bundle, write_bundle


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("divergence") / "bundle")


def with_other_bias(graph: ir.Graph, layer: str, steps: int = 3000) -> ir.Graph:
    if layer not in {node.name for node in graph.nodes}:
        return graph
    name = graph.node(layer).inputs[2]
    bias = graph.constants[name]
    changed = ir.Constant(bias.type, bias.data + np.int32(steps))
    return graph.with_nodes(graph.nodes, {**graph.constants, name: changed})


def faulty_bundle(bundle: Bundle, folder: Path, layer: str) -> Bundle:
    """Its LiteRT artefact computes one layer with another bias."""
    files = {name: bundle.file(name).read_bytes() for name in bundle.manifest.files}
    graph = serialize.load(bundle.file(bundles.INT8_GRAPH))
    files[bundles.LITERT_INT8] = tflite.serialize(with_other_bias(graph, layer))
    write_bundle(folder / "faulty", bundle.manifest, files)
    return open_bundle(folder / "faulty")


@pytest.mark.parametrize("layer", ["stem.conv1", "blocks.1.sep0.pointwise", "classifier"])
def test_a_planted_fault_is_found(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    faulty = faulty_bundle(bundle, tmp_path, layer)
    real = tflite.serialize
    monkeypatch.setattr(divergence.tflite, "serialize", lambda graph: real(with_other_bias(graph, layer)))
    text = first_difference(faulty, "litert", labelled(2))
    assert f" {layer} ({layer}) is the first that differs, by up to " in text
    assert text.startswith("on val/0 ")


def test_an_artefact_that_is_not_the_network_s_is_said_to_be(bundle: Bundle, tmp_path: Path) -> None:
    text = first_difference(faulty_bundle(bundle, tmp_path, "stem.conv1"), "litert", labelled(1))
    assert "not those of the same network compiled anew" in text


def test_no_difference_is_none(bundle: Bundle) -> None:
    assert first_difference(bundle, "litert", labelled(2)) == "no image's outputs differ"


@requires_hardware(sys.version_info < (3, 12), "Python that tflite-runtime has wheels for")
def test_tflite_runtime_parts_at_a_layer_that_rounds_twice(bundle: Bundle) -> None:
    text = first_difference(bundle, "tflite-runtime", labelled(4))
    assert "is the first that differs, by up to 1 steps" in text


def test_a_prefix_computes_the_tensor_of_the_whole() -> None:
    graph = quantized().int8_graph
    x = (labelled(1)[0].pixels ^ np.uint8(0x80)).view(np.int8)[None]
    values = dict(reference.iterate(graph, {graph.inputs[0].name: x}))
    for name in ("blocks.0.shortcut.conv", "blocks.1.add", graph.outputs[0]):
        cut = prefix(graph, name)
        verify(cut)
        np.testing.assert_array_equal(reference.run(cut, x)[0], values[name])


@pytest.mark.slow
def test_the_native_engine_s_prefixes_are_compiled_and_equal(tmp_path: Path) -> None:
    from xceptile.targets import host

    graph = quantized().int8_graph
    x = (labelled(1)[0].pixels ^ np.uint8(0x80)).view(np.int8)[None]
    cut = prefix(graph, "blocks.0.add")
    seen = divergence._run(cut, host.detect(), "native", "local", x)
    np.testing.assert_array_equal(seen.reshape(-1), reference.run(cut, x)[0].reshape(-1))
