"""Baselines and reports as files: they read back, and a damaged one is named with what makes a new one."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.reports import accuracy, report

from xceptile.runtime.baseline import BaselineError, load_baseline, report_to_json, save_baseline, save_report


def test_baselines_read_back_by_target_and_device(tmp_path: Path) -> None:
    path = tmp_path / "b.json"
    whole = report(accuracies=(accuracy(sqnr_db=math.inf),))
    there = report(12.0, device="ssh://pi@board")
    other = report(target="raspberrypi/raspberry-pi-5", device="qemu")
    for each in (report(99.0), whole, there, other):  # the first one is replaced by the second
        save_baseline(each, path)
    for each in (whole, there, other):
        assert load_baseline(path, each.target, each.device, "make") == each
    with pytest.raises(BaselineError, match="no baseline for local/host on qemu; make one with `xceptile baseline x`"):
        load_baseline(path, "local/host", "qemu", "xceptile baseline x")
    assert not list(tmp_path.glob(".*"))
    save_report(whole, tmp_path / "report.json")
    assert json.loads(report_to_json(whole))["format"] == 1
    with pytest.raises(BaselineError, match="remove it, or write to another file"):
        save_baseline(whole, tmp_path / "report.json")
    assert (tmp_path / "report.json").read_text() == report_to_json(whole)


WHERE = '{"format": 2, "baselines": {"local/host": {"local": %s}}}'


@pytest.mark.parametrize(
    "text",
    [None, "null", "", "{}", "[1]", '{"format": 99}', '{"format": 2}', '{"format": 2, "baselines": null}']
    + ['{"format": 2, "baselines": {"local/host": null}}']
    + [WHERE % value for value in ("null", "{}", "[]", "1", '{"accuracies": null, "latencies": []}')],
)
def test_a_missing_or_null_baseline_names_the_command(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    with pytest.raises(BaselineError, match="`xceptile baseline x`"):
        load_baseline(tmp_path / "b.json", "local/host", "local", "xceptile baseline x")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["latencies"][0].update(samples_ms=[]),
        lambda r: r["latencies"][0]["samples_ms"].__setitem__(3, "x"),
        lambda r: r["latencies"][0]["samples_ms"].__setitem__(3, 0.0),
        lambda r: r["latencies"][0]["samples_ms"].__setitem__(3, math.nan),
        lambda r: r["latencies"][0].update(turns="7"),
        lambda r: r["accuracies"][0].update(correct=5),
        lambda r: r["accuracies"].append(5),
        lambda r: r["sizes_bytes"].update({"native/int8": "big"}),
        lambda r: r.update(machine=None),
        lambda r: r.update(target=[]),
    ],
)
def test_a_damaged_baseline_is_one_line(tmp_path: Path, spoil: Callable[[Any], None]) -> None:
    path = tmp_path / "b.json"
    save_baseline(report(), path)
    data = json.loads(path.read_text())
    spoil(data["baselines"]["local/host"]["local"])
    path.write_text(json.dumps(data))
    with pytest.raises(BaselineError, match=r"is damaged .*; make one with `xceptile baseline x`"):
        load_baseline(path, "local/host", "local", "xceptile baseline x")
