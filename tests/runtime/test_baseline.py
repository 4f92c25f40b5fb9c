"""Baselines and reports as files: they read back, and a damaged one is named with what makes a new one."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.reports import accuracy, report
from support.tree import TESTS

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
        lambda r: r["latencies"][0]["samples_ms"].__setitem__(3, 1e999),
        lambda r: r["latencies"][0].update(turns="7"),
        lambda r: r["latencies"][0].update(turns=7),
        lambda r: r["latencies"][0].update(turns=-1),
        lambda r: r["latencies"][0].update(threads=0),
        lambda r: r["latencies"][0].update(batch=0),
        lambda r: r["accuracies"][0].update(sqnr_db=1e999),
        lambda r: r["accuracies"][0].update(sqnr_db=math.nan),
        lambda r: r["accuracies"][0].update(correct="xxx1"),
        lambda r: r["accuracies"][0].update(correct="1111"),
        lambda r: r["accuracies"][0].update(correct="0"),
        lambda r: r["accuracies"][0].update(labelled=-4),
        lambda r: r["accuracies"][0].update(labelled=5),
        lambda r: r["accuracies"][0].update(images=3),
        lambda r: r["accuracies"][0].update(int8_correct=-1),
        lambda r: r["accuracies"][0].update(int8_correct_top5=0),
        lambda r: r["accuracies"][0].update(float_correct=5),
        lambda r: r["accuracies"][0].update(int8_only_correct=1),
        lambda r: r["accuracies"][0].update(agreeing=5),
        lambda r: r["accuracies"][0].update(differing_values=-1),
        lambda r: r["accuracies"][0].update(largest_difference_steps=1),
        lambda r: r["accuracies"][0].update(allowed_steps=-1),
        lambda r: r["sizes_bytes"].update({"native/int8": -1}),
        lambda r: r["sizes_bytes"].update({"native/int8": 1e400}),
        lambda r: r["memory_bytes"].update({"native/int8": -1}),
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


SAVE = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[4]]
from support.reports import report
from xceptile.runtime.baseline import save_baseline
path, start = Path(sys.argv[1]), Path(sys.argv[2])
while not start.exists():
    time.sleep(0.001)
for number in range(10):
    save_baseline(report(device=f"{sys.argv[3]}.{number}"), path)
"""


def test_two_that_save_at_once_keep_each_other_s(tmp_path: Path) -> None:
    """Several boards of a farm write into one file."""
    path = tmp_path / "b.json"
    words = [sys.executable, "-c", SAVE, str(path), str(tmp_path / "start")]
    started = [subprocess.Popen([*words, str(process), str(TESTS)]) for process in range(3)]
    (tmp_path / "start").touch()
    assert [process.wait(120) for process in started] == [0, 0, 0]
    kept = json.loads(path.read_text())["baselines"]["local/host"]
    assert sorted(kept) == sorted(f"{process}.{number}" for process in range(3) for number in range(10))
    assert sorted(each.name for each in tmp_path.iterdir()) == ["b.json", "start"]
