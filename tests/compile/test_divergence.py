"""The first layer at which an engine differs: found where a fault was planted, and truthful where there is none."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from support.faulty_bundle import faulty_bundle, plant_fault
from support.needs import requires_hardware, requires_module, requires_pocl
from support.small_bundle import COMPILED_SIZE, labelled, litert_bundle, quantized

from xceptile.compile import cli, divergence
from xceptile.compile.divergence import first_difference, prefix
from xceptile.compile.pipeline import build_bundle_files
from xceptile.models.verify import verify
from xceptile.runtime import bundle as bundles
from xceptile.runtime import reference
from xceptile.runtime.bundle import Bundle, write_bundle
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.obtained import MEASURED
from xceptile.runtime.session import Placement
from xceptile.targets import catalog, host


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("divergence") / "bundle")


@pytest.mark.parametrize("layer", ["stem.conv1", "blocks.1.sep0.pointwise", "classifier"])
def test_a_planted_fault_is_found(bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layer: str) -> None:
    faulty = faulty_bundle(bundle, tmp_path / "faulty", layer, "litert")
    plant_fault(monkeypatch, layer)
    text = first_difference(faulty, "litert", labelled(2))
    assert f" {layer} ({layer}) is the first that differs, by up to " in text
    assert text.startswith("on val/0 ")


def test_an_artefact_that_is_not_the_network_s_is_said_to_be(bundle: Bundle, tmp_path: Path) -> None:
    text = first_difference(faulty_bundle(bundle, tmp_path / "faulty", "stem.conv1", "litert"), "litert", labelled(1))
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

    bundle = litert_bundle(tmp_path / "bundle")
    x = bundle.quantize_pixels(labelled(1)[0].pixels[None])
    cut = prefix(quantized().int8_graph, "blocks.0.add")
    seen = divergence._run(cut, bundle, "native", Placement("local", MEASURED), x)
    np.testing.assert_array_equal(seen, reference.run(cut, x)[0])


def test_of_a_batch_the_image_that_differs_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest, files = build_bundle_files(quantized(), host.detect(), ("litert",), (), lambda what, share: None, batch=3)
    whole = write_bundle(tmp_path / "bundle", manifest, files)
    assert first_difference(whole, "litert", labelled(4)) == "no image's outputs differ"
    faulty = faulty_bundle(whole, tmp_path / "faulty", "classifier", "litert")
    plant_fault(monkeypatch, "classifier")
    assert " classifier (classifier) is the first that differs" in first_difference(faulty, "litert", labelled(2))


@pytest.mark.slow
@requires_pocl()
@requires_module("ziglang", package="ziglang")
def test_a_fault_of_a_gpu_s_kernels_is_found_in_rehearsal(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCL_CACHE_DIR", str(tmp_path / "pocl"))
    faulty = faulty_bundle(small_bundle, tmp_path / "faulty", "conv1", "native", catalog.get("adreno-740"))
    plant_fault(monkeypatch, "conv1")
    text = first_difference(faulty, "native", labelled(1, COMPILED_SIZE))
    assert "Conv2d conv1 (conv1) is the first that differs" in text


@pytest.mark.parametrize(
    ("why", "said"),
    [
        (EngineError("no room for a shorter network"), "no room for a shorter network"),
        (OSError("no space left"), "no space left"),
        (ModuleNotFoundError(name="tvm"), "that needs the package tvm: pip install 'xceptile[compile]'"),
    ],
    ids=["engine", "system", "package"],
)
def test_figures_are_shown_where_the_layer_cannot_be_found(
    bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    why: Exception,
    said: str,
) -> None:
    def refuse(*_: object) -> object:
        raise why

    faulty = faulty_bundle(bundle, tmp_path / "faulty", "stem.conv1", "litert")
    files = {name: faulty.file(name).read_bytes() for name in faulty.manifest.files}
    files[bundles.FLOAT_GRAPH] = bundle.file(bundles.FLOAT_GRAPH).read_bytes()
    write_bundle(faulty.path, faulty.manifest, files)
    monkeypatch.setattr(divergence, "_compile", refuse)
    arguments = ["verify", str(faulty.path), "--data", "drawn:val:2", "--first-difference", "--json"]
    assert cli._invoke(cli.app, arguments) == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert row["first_difference"] == f"the first layer that differs was not found: {said}"
