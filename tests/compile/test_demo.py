"""`make demo` from end to end, on fewer images than it takes by itself."""

import json
from pathlib import Path

import pytest
from support.needs import requires

from xceptile.compile import demo
from xceptile.runtime.bundle import open_bundle


@pytest.mark.slow
@requires("qemu-aarch64", package="qemu-user")
def test_the_demo_runs_every_artefact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "CALIBRATION", "drawn:calibration:64")
    monkeypatch.setattr(demo, "HELD_OUT", "drawn:val:300")
    monkeypatch.setattr(demo, "REHEARSED_IMAGES", 8)
    demo.main(tmp_path)
    printed = capsys.readouterr().out
    assert printed.count(" yes ") == 4
    assert "NO" not in printed
    for name in demo.TARGETS:
        assert open_bundle(tmp_path / name).manifest.target.board == name
    host = json.loads((tmp_path / "local-host.json").read_text())
    assert [(a["engine"], a["images"], a["differing_values"]) for a in host["accuracies"]] == [
        ("native", 300, 0),
        ("litert", 300, 0),
    ]
    assert all(a["float_correct"] - a["int8_correct"] <= 6 for a in host["accuracies"])  # 2 points of 300 images
    assert all(a["float_correct"] > 240 for a in host["accuracies"])
    pi = json.loads((tmp_path / "raspberrypi-raspberry-pi-5.json").read_text())
    assert {a["obtained"] for a in pi["accuracies"]} == {"rehearsed"}
    assert pi["latencies"] == []
    assert "<svg" in (tmp_path / "report.html").read_text()
