"""`compile --dump` and `inspect --graph | --units | --plan`: the network as text between two stages."""

from __future__ import annotations

from pathlib import Path

import pytest
from support import small_bundle
from support.plan_files import small_plan
from typer.testing import CliRunner

from xceptile.calibration.recipe import QuantRecipe
from xceptile.compile.cli import app
from xceptile.compile.dump import keep_artefacts, keep_graphs, units_text
from xceptile.compile.pipeline import build_bundle_files, quantize_model
from xceptile.models import drawn, graph_text, serialize
from xceptile.runtime import plan_text
from xceptile.runtime.bundle import INT8_GRAPH, write_bundle
from xceptile.runtime.plan import unpack
from xceptile.targets import catalog


def test_a_plan_as_text() -> None:
    assert plan_text.to_text(small_plan()) == (
        "plan cpu: arena 256 bytes, weights 80 bytes\n"
        "needs neon, dotprod\n"
        "tolerance 2 steps\n"
        "pixels by a table\n"
        "input input: int8[1,2,2,3] scale=1.0 zero_point=-128 at arena+0\n"
        "output logits: int8[1,4] scale=0.25 zero_point=3 at arena+128\n"
        "output extra: float32[1] at arena+192\n"
        "0: conv = convolution: first_3x3(weights+64 int32[4]) -> arena+0 int8[12]; 3 tasks; 100 macs @a.b\n"
        "1: fc = copy: second(arena+64 uint8[16]) -> arena+128 int8[4]; 16777215 tasks\n"
        "2: conv = convolution: first_3x3() -> arena+0 float32[1]; 1 tasks; 1099511627776 macs @a.b\n"
    )


@pytest.mark.slow
def test_every_stage_is_dumped_and_a_bundle_says_the_same(tmp_path: Path) -> None:
    model, target, dump = small_bundle.compiled_model(), catalog.get("host"), tmp_path / "dump"
    images = (drawn.draw("calibration", i, model.input_spec.height)[0] for i in range(4))
    network = quantize_model(
        model, images, QuantRecipe("small", equalize=False), image_count=4, progress=lambda what, share: None,
        keep=keep_graphs(dump),
    )  # fmt: skip
    manifest, files = build_bundle_files(network, target, ("native",), (), lambda what, share: None)
    keep_artefacts(dump, files, network.int8_graph, target, 1)
    bundle = write_bundle(tmp_path / "bundle", manifest, files)

    graphs = sorted(path.name for path in dump.glob("[0-9]*.txt"))
    assert [name.partition("-")[2] for name in graphs] == [
        "import.txt", "remove_dead.txt", "fold_batch_norm.txt", "fuse_relu.txt", "fold-input.txt", "equalize.txt",
        "quantize.txt",
    ]  # fmt: skip
    assert "BatchNorm" in (dump / graphs[0]).read_text()
    assert "BatchNorm" not in (dump / graphs[-1]).read_text()
    int8 = serialize.load(bundle.file(INT8_GRAPH))
    assert (dump / graphs[-1]).read_text() == graph_text.to_text(int8)
    plan = unpack(bundle.file("native/plan.bin").read_bytes())
    assert {path.stem for path in (dump / "kernels").iterdir()} == {step.kernel for step in plan.steps}
    assert all(step.kernel in (dump / "kernels.s").read_text() for step in plan.steps)

    for flag, expected in (
        ("--graph", graph_text.to_text(int8)),
        ("--units", units_text(int8, target)),
        ("--plan", plan_text.to_text(plan)),
    ):
        shown = CliRunner().invoke(app, ["inspect", str(bundle.path), flag])
        assert shown.exit_code == 0, shown.output
        assert shown.output == expected
    assert (dump / "units.txt").read_text() == units_text(int8, target)
    assert (dump / "plan.txt").read_text() == plan_text.to_text(plan)


def test_a_bundle_without_a_native_artefact_has_no_plan(tmp_path: Path) -> None:
    bundle = small_bundle.litert_bundle(tmp_path / "bundle")
    shown = CliRunner().invoke(app, ["inspect", str(bundle.path), "--plan"])
    assert shown.exit_code != 0
    assert "no native artefact" in str(shown.exception)
