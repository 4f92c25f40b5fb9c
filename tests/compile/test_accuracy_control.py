"""Accuracy control: the bound is met with few layers in float, by the exported artefact, or the reason is given."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.needs import requires
from support.small_bundle import (
    COMPILED_SIZE,
    PLAIN,
    SIZE,
    compiled_model,
    labelled,
    litert_bundle,
    litert_files,
    model,
    quantize,
    quantized,
)

from xceptile.calibration.equalize import equalizable_pairs, rescale
from xceptile.compile import accuracy_control
from xceptile.compile.accuracy_control import (
    CANDIDATE,
    Control,
    ControlError,
    check_artefacts,
    control,
    parse_drop,
    return_to_float,
)
from xceptile.compile.layer_cost import lost_ms
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.compile.pipeline import Quantized, build_bundle_files, float_layers
from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.verify import verify
from xceptile.models.zoo import Model
from xceptile.runtime.accuracy import Accuracy, Labelled
from xceptile.runtime.bundle import Manifest, write_bundle
from xceptile.runtime.evaluate_engines import REHEARSED_IMAGES, Networks, contenders, evaluate, float_input
from xceptile.targets import catalog, host

BAD = ("blocks.0.sep1", "blocks.2.sep1")


def blown_up(network: Model, groups: Sequence[str], factor: float = 400.0) -> Model:
    """The same function, one channel in eight of some depthwise outputs enlarged beyond all others."""
    graph = run_passes(network.graph, FLOAT_PASSES, verify)
    rng = np.random.default_rng(0)
    for group in equalizable_pairs(graph):
        if any(group.producers[0].name.startswith(name) for name in groups):
            channels = group.producers[0].type.shape[-1]
            factors = np.where(np.arange(channels) % 8 == 0, factor * rng.uniform(0.5, 1, channels), 1.0)
            graph = rescale(graph, group, 1 / factors)
    return replace(network, graph=graph)


@pytest.fixture(scope="module")
def ill() -> Quantized:
    return quantize(blown_up(model(), BAD))


def recheck(images: Sequence[Labelled]):
    return check_artefacts(litert_files, images)


def called(count: int, network: Quantized, size: int = SIZE) -> list[Labelled]:
    """Images that bear the label which the float network gives them: its weights are random."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = litert_bundle(Path(folder) / "b", network)
        real = Networks(bundle).real
        images = labelled(count, size)
        return [
            replace(image, label=int(real.run(float_input(bundle, image.pixels[None]))[0].argmax())) for image in images
        ]


def test_the_bound_is_met_with_the_layers_that_hurt(ill: Quantized) -> None:
    images = called(48, ill)
    chosen, found = control(ill, host.detect(), images, 0.1, recheck(images))
    assert found.metric == "top-1"
    assert next(t for t in found.trials if not t.float_layers).drop > 0.1  # more than ten points without
    assert found.met
    assert found.drop <= 0.1
    # A bad tensor between a depthwise and a pointwise layer costs these two.
    pairs = {f"{name}.{part}" for name in BAD for part in ("depthwise", "pointwise")}
    assert set(found.float_layers) <= pairs
    assert float_layers(chosen.int8_graph) == tuple(n for n in ill.float_graph._by_name if n in found.float_layers)
    assert found.trials[-1].how != CANDIDATE  # the last word is the artefact's
    assert chosen.recipe.setting(found.float_layers[0]).keep_float
    assert found.lost_ms > 0


def test_a_network_within_the_bound_stays_as_it_is() -> None:
    network, images = quantized(), called(16, quantized())
    chosen, found = control(network, host.detect(), images, 0.9, recheck(images))
    assert chosen is network
    assert (found.met, found.float_layers, found.lost_ms) == (True, (), 0.0)


def test_an_artefact_that_loses_more_than_the_contract_is_found_out(ill: Quantized) -> None:
    """A planted fault: artefacts lose what candidates do not."""
    images = called(24, ill)
    real = recheck(images)

    def faulty(network: Quantized) -> Sequence[Accuracy]:
        return [replace(accuracy, int8_correct=accuracy.images // 2) for accuracy in real(network)]

    _, found = control(ill, host.detect(), images, 0.05, faulty)
    assert not found.met
    assert found.drop == 0.5
    assert "is lost at best" in found.reason


def test_a_bound_that_the_images_cannot_show_is_said_to_be(ill: Quantized) -> None:
    images = called(10, ill)

    def lossy(network: Quantized) -> Sequence[Accuracy]:
        return [replace(a, int8_correct=a.images - 1) for a in recheck(images)(network)]

    _, found = control(ill, host.detect(), images, 0.001, lossy)
    assert not found.met
    assert "10 images cannot show a drop of 0.100%" in found.reason


def test_what_cannot_be_controlled_is_refused() -> None:
    for images in ([], [replace(image, label=None) for image in labelled(2)]):
        with pytest.raises(ControlError, match="whose images bear labels"):
            control(quantized(), host.detect(), images, 0.1, recheck(images))
    with pytest.raises(ControlError, match="this network has one output"):
        control(quantize(model(1)), host.detect(), labelled(2), 0.1, recheck([]))
    with pytest.raises(ControlError, match="only processors run mixed networks"):
        control(quantized(), replace(host.detect(), engine="opencl"), labelled(1), 0.1, recheck([]))


@requires("qemu-aarch64", package="qemu-user")
def test_the_figure_is_what_verify_counts_of_the_bundle_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One figure, from the artefact, on all images, also where an emulator runs it; a candidate's is none."""
    network, target = quantize(compiled_model(), PLAIN), catalog.get("raspberry-pi-5")

    def build(chosen: Quantized) -> tuple[Manifest, dict[str, bytes]]:
        return build_bundle_files(chosen, target, ("native",), (), lambda *_: None)

    bundle = write_bundle(tmp_path / "b", *build(network))
    pool = called(600, network, COMPILED_SIZE)
    ((truth,), _) = evaluate(contenders(bundle, engines=("reference",)), pool)
    lost = {flip.image for flip in truth.flips}
    assert lost
    # Those that int8 loses come last, where an emulator is spared them elsewhere.
    kept = [image for image in pool if image.name not in lost][:REHEARSED_IMAGES]
    images = [*kept, *(image for image in pool if image.name in lost)]
    judged = contenders(bundle, rehearsed_images=None)
    ((accuracy,), _) = evaluate(judged, images)
    monkeypatch.setattr(accuracy_control._Judge, "candidate", lambda self, layers: 0.0)
    _, found = control(network, target, images, 0.9, check_artefacts(build, images))
    assert found.drop == accuracy.float_top1 - accuracy.top1 > 0
    assert found.images == accuracy.images == len(images)


def test_layers_around_keep_their_refined_weights() -> None:
    network = quantize(model(), replace(PLAIN, correct_bias=True, optimize_rounding=True))
    mixed = return_to_float(network, ["blocks.0.sep0.pointwise"])
    floats = {
        n.name for n in mixed.int8_graph.nodes if n.type.dtype == "float32" and not isinstance(n.op, ir.Dequantize)
    }
    assert floats == {"blocks.0.sep0.pointwise"}
    for name, constant in mixed.int8_graph.constants.items():
        if constant.type.dtype != "float32":
            assert np.array_equal(constant.data, network.int8_graph.constants[name].data)


def test_what_lies_between_float_layers_is_not_converted() -> None:
    network = quantized()
    whole = [n.path for n in network.float_graph.nodes if n.name.startswith("blocks.1.") and "relu" not in n.name]
    mixed = return_to_float(network, whole).int8_graph
    assert {n.type.dtype for n in mixed.nodes if n.name in ("blocks.1.relu1", "blocks.1.pool")} <= {"float32"}


@pytest.mark.parametrize(("text", "share"), [("0.1%", 0.001), ("0%", 0.0), ("2%", 0.02)])
def test_drops_are_read(text: str, share: float) -> None:
    assert parse_drop(text) == pytest.approx(share)


@pytest.mark.parametrize("text", ["", "%", "-1%", "100%", "a lot", "nan", "0.5"])
def test_drops_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ControlError, match="give a share"):
        parse_drop(text)


def test_dense_layers_lose_more_where_int8_is_faster() -> None:
    graph = quantized().float_graph
    dense = graph.node("blocks.2.sep0.pointwise")
    a53, a76, i8mm = (catalog.get(n) for n in ("raspberry-pi-3", "raspberry-pi-5", "generic/android-arm64-i8mm"))
    assert lost_ms(graph, dense, i8mm) > lost_ms(graph, dense, a76) > 0
    assert lost_ms(graph, dense, a53) > 0
    with pytest.raises(ValueError, match="no rates"):
        lost_ms(graph, dense, replace(a53, features=()))


@pytest.mark.slow
def test_the_trained_network_with_bad_scales_is_brought_within_half_a_point() -> None:
    names = ("blocks.1.sepconvs.0", "blocks.6.sepconvs.1", "blocks.11.sepconvs.0")
    network = quantize(blown_up(zoo.load("demo"), names, 1000.0), PLAIN, 32)
    images = labelled(400, network.model.input_spec.height)
    _, found = control(network, host.detect(), images, 0.005, recheck(images))
    assert found.metric == "top-1"
    assert next(t for t in found.trials if not t.float_layers).drop > 0.1
    assert found.met, found.reason
    assert len(found.float_layers) <= 8
    assert isinstance(found, Control)
