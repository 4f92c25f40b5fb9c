"""A changed bit in weights or plan that no image shows is found by packing the network anew."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from support.needs import requires_module
from support.small_bundle import compiled_model, quantize, write_small_bundle

from xceptile import __version__
from xceptile.calibration.recipe import QuantRecipe
from xceptile.compile import cli, repack
from xceptile.compile.backends import cpu
from xceptile.compile.pipeline import build_bundle_files
from xceptile.compile.repack import Repacked
from xceptile.compile.tuning import TUNED, Trial, Tuning
from xceptile.runtime import bundle as bundles
from xceptile.runtime.bundle import Bundle, write_bundle
from xceptile.runtime.plan import pack, unpack
from xceptile.targets import catalog

NATIVE = ("native/plan.bin", "native/weights.bin")
LITERT = (bundles.LITERT_INT8, bundles.LITERT_FLOAT)

pytestmark = requires_module("tvm", package="apache-tvm")


def changed(bundle: Bundle, folder: Path, name: str, change: Callable[[bytes], bytes]) -> Bundle:
    """The bundle with one file changed and every hash made right, as whoever can write to it would."""
    files = {each: bundle.file(each).read_bytes() for each in bundle.manifest.files}
    files[name] = change(files[name])
    plan = "native/plan.bin"
    if name != plan:
        digests = (hashlib.sha256(files[f"native/{each}"]).hexdigest() for each in ("weights.bin", "kernels.so"))
        files[plan] = pack(unpack(files[plan]), *digests)
    return write_bundle(folder, bundle.manifest, files)


def flipped(data: bytes, position: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]


def test_a_bundle_as_it_was_compiled_equals_itself(small_bundle: Bundle) -> None:
    assert repack.repack(small_bundle) == Repacked((*NATIVE, *LITERT))


def test_one_changed_bit_in_the_weights_is_named_though_no_image_shows_it(
    small_bundle: Bundle, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = small_bundle.file("native/weights.bin").read_bytes()
    unseen = 0
    for position in np.linspace(0, len(weights) - 1, 8).astype(int):
        spoilt = changed(small_bundle, tmp_path / "b", "native/weights.bin", partial(flipped, position=position))
        found = repack.repack(spoilt)
        assert found.differing == NATIVE, position  # the plan holds their hash
        capsys.readouterr()
        assert cli._invoke(cli.app, ["verify", str(spoilt.path), "--data", "drawn:val:2", "--json"]) == 1
        native, _ = json.loads(capsys.readouterr().out)
        assert native["packed_anew"]["differing"] == list(NATIVE)
        unseen += native["bit_exact"]
    assert unseen, "a bit that no image shows is what this is for"
    assert cli._invoke(cli.app, ["verify", str(spoilt.path), "--data", "drawn:val:2"]) == 1
    assert "native/plan.bin, native/weights.bin DIFFER from it" in capsys.readouterr().out


def test_a_changed_plan_or_tflite_file_is_named(small_bundle: Bundle, tmp_path: Path) -> None:
    def other_macs(data: bytes) -> bytes:
        plan = unpack(data)
        steps = (dataclasses.replace(plan.steps[0], macs=plan.steps[0].macs + 1), *plan.steps[1:])
        digests = (
            hashlib.sha256(small_bundle.file(f"native/{each}").read_bytes()).hexdigest()
            for each in ("weights.bin", "kernels.so")
        )
        return pack(dataclasses.replace(plan, steps=steps), *digests)

    assert repack.repack(changed(small_bundle, tmp_path / "a", NATIVE[0], other_macs)).differing == NATIVE[:1]
    model = small_bundle.file(LITERT[0]).read_bytes()
    tail = changed(small_bundle, tmp_path / "b", LITERT[0], lambda d: flipped(d, len(model) - 40))
    assert repack.repack(tail).differing == LITERT[:1]


@pytest.mark.parametrize(
    "target", ["adreno-740", "raspberry-pi-5", pytest.param("jetson-orin-nano", marks=pytest.mark.slow)]
)
def test_other_targets(target: str, tmp_path: Path) -> None:
    found = repack.repack(write_small_bundle(tmp_path / "b", target, ("native",)))
    assert not found.differing
    assert found.reason == ""
    more = ("native-float16/plan.bin", "native-float16/weights.bin") if target != "raspberry-pi-5" else ()
    assert found.equal == (*NATIVE, *more)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_tuned_bundle_and_one_for_batches(tmp_path: Path, batch: int) -> None:
    """Task sizes that were measured stand in the kernels' names."""
    network, host = quantize(compiled_model(), QuantRecipe("small", equalize=False), 4), catalog.get("host")
    model = {call.size.key: call.size for call in cpu.lower(network.int8_graph, host) if call.size}
    trials = {key: (Trial(max(1, size.value // 3), 1.0, 2.0),) for key, size in model.items()}
    sizes = {key: size.value for key, size in model.items()}
    tuning = Tuning(host.name, host.features, 1, "measured", sizes, trials)
    assert tuning.choices != sizes
    files = build_bundle_files(network, host, ("native",), (), lambda *_: None, tuning, batch)
    bundle = write_bundle(tmp_path / "b", *files)
    assert TUNED in bundle.manifest.provenance
    assert repack.repack(bundle) == Repacked(NATIVE)


def test_what_cannot_be_made_here_is_said(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(small_bundle, manifest=dataclasses.replace(small_bundle.manifest, xceptile="99"))
    assert repack.repack(other) == Repacked(reason=f"made by xceptile 99, this is {__version__}")
    for name in [each for each in sys.modules if each.startswith("xceptile.compile.backends")]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("tvm", "tflite"):
        monkeypatch.setitem(sys.modules, name, None)
    found = repack.repack(small_bundle)
    assert (found.equal, found.differing) == ((), ())
    assert "pip install 'xceptile[compile]'" in found.reason
    assert cli._invoke(cli.app, ["verify", str(small_bundle.path), "--data", "drawn:val:1"]) == 0
    assert "Packed anew: not compared: that needs the package" in capsys.readouterr().out
