"""The demo network against what it did when its baseline was committed, by the plugin that users' repositories have.

After a change that is meant to change accuracy, `PYTHONPATH=tests python tests/repository/test_regression.py` writes
the baseline anew.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.tree import TESTS

from xceptile.calibration.recipe import PRESETS
from xceptile.compile.pipeline import build_bundle_files, quantize_model
from xceptile.models import zoo
from xceptile.models.datasets import open_dataset
from xceptile.runtime.baseline import load_baseline, save_baseline
from xceptile.runtime.bundle import Bundle, write_bundle
from xceptile.runtime.gate_run import Run, measure
from xceptile.runtime.verdict import Report, Verdict
from xceptile.targets import catalog

BASELINE = TESTS / "repository" / "demo-baseline.json"
DATA, CALIBRATION = "drawn:val:200", 64


def build(folder: Path) -> Bundle:
    """The demo network for this machine, quantized on a few images."""
    model, data = zoo.load("demo"), open_dataset(f"drawn:calibration:{CALIBRATION}")
    images = (data.load(item, model.input_spec) for item in data.items)
    network = quantize_model(
        model, images, PRESETS["default"], image_count=CALIBRATION, progress=lambda what, share: None
    )
    manifest, files = build_bundle_files(
        network, catalog.get("host"), ("native", "litert"), (), lambda what, share: None
    )
    return write_bundle(folder, manifest, files)


@pytest.fixture(scope="session")
def xceptile_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return build(tmp_path_factory.mktemp("demo") / "bundle")


@pytest.fixture(scope="session")
def xceptile_data() -> str:
    return DATA


@pytest.fixture(scope="session")
def xceptile_baseline() -> Report:
    return load_baseline(BASELINE, "local/host", "local", "PYTHONPATH=tests python tests/repository/test_regression.py")


@pytest.mark.slow
@pytest.mark.accuracy(max_drop=1.0)
def test_accuracy(xceptile_verdict: Verdict) -> None:
    assert xceptile_verdict.outcome == "pass", str(xceptile_verdict)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        report = measure(build(Path(name) / "bundle"), Run(DATA, device="local"), latency=False)
    # What a contract's accuracy does not depend on is left out.
    save_baseline(replace(report, machine={}, versions={}, sizes_bytes={}, bundle_sha256=""), BASELINE)
