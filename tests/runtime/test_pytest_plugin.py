"""The pytest plugin in a user's repository: five lines of test, a bundle, a baseline; planted regressions are seen."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from xceptile.runtime.baseline import save_baseline
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.gate_run import Run, measure

pytest_plugins = ["pytester"]

FIVE_LINES = """
import pytest

@pytest.mark.accuracy
def test_accuracy(xceptile_verdict):
    assert xceptile_verdict.outcome == "pass", str(xceptile_verdict)
"""
# No test of ours depends on time: any will do, and whether int8 beats float on so small a network is left open.
LATENCY = """
import pytest

@pytest.mark.latency(max_ratio=1000, max_slowdown=1000, max_memory=2)
def test_latency(xceptile_verdict):
    failed = [f for f in xceptile_verdict.findings if f.outcome != "pass" and "faster than float" not in f.what]
    assert not failed, str(xceptile_verdict)
    assert {"latency", "size", "memory"} <= {f.what.split(",")[0].split()[0] for f in xceptile_verdict.findings}
"""
SETTINGS = """
[pytest]
addopts = -p no:cacheprovider
xceptile_bundle = bundles/{target}
xceptile_data = drawn:val:40
xceptile_baseline = baseline.json
"""


# What a test times is not looked at, so little will do.
BRIEF = """
import pytest
from xceptile.runtime.gate_run import Run

@pytest.fixture(scope="session")
def _xceptile_run(pytestconfig, xceptile_data):
    return Run(xceptile_data, pytestconfig.getoption("xceptile_device"), rounds=2, min_duration_s=0.0)
"""


@pytest.fixture(scope="module")
def baseline(small_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("baseline") / "baseline.json"
    save_baseline(measure(small_bundle, Run("drawn:val:40", rounds=2, min_duration_s=0.0)), path)
    return path


@pytest.fixture
def repository(pytester: pytest.Pytester, small_bundle: Bundle, baseline: Path) -> pytest.Pytester:
    """A user's repository: settings, the bundle, its baseline; the tests are the test's."""
    pytester.makefile(".ini", pytest=SETTINGS)
    (pytester.path / "bundles").mkdir()
    shutil.copytree(small_bundle.path, pytester.path / "bundles" / "host")
    shutil.copy(baseline, pytester.path / "baseline.json")
    pytester.makeconftest(BRIEF)
    return pytester


def run(repository: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    return repository.runpytest_subprocess("--strict-markers", *arguments)


def plant(repository: pytest.Pytester, change: Any) -> None:
    """Changes the baseline of this machine."""
    path = repository.path / "baseline.json"
    data = json.loads(path.read_text())
    change(data["baselines"]["local/host"]["local"])
    path.write_text(json.dumps(data))


def test_five_lines_pass(repository: pytest.Pytester) -> None:
    repository.makepyfile(FIVE_LINES)
    run(repository).assert_outcomes(passed=1)
    assert len(FIVE_LINES.replace("\n\n", "\n").strip().splitlines()) <= 5


def test_latency_size_and_memory(repository: pytest.Pytester) -> None:
    repository.makepyfile(LATENCY)
    run(repository).assert_outcomes(passed=1)
    plant(repository, lambda report: report["sizes_bytes"].update({"native/int8": 1000}))
    result = run(repository)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*fail: size, native/int8: * allowed*"])


def right_on(accuracy: dict[str, Any], marks: str) -> dict[str, Any]:
    """The counts of an int8 engine that was right on these images; of those it gains, float was right on none."""
    right = marks.count("1")
    only = accuracy["int8_only_correct"] + right - accuracy["int8_correct"]
    top5 = max(accuracy["int8_correct_top5"], right)
    return {"correct": marks, "int8_correct": right, "int8_only_correct": only, "int8_correct_top5": top5}


def test_a_lost_accuracy_fails(repository: pytest.Pytester) -> None:
    """The planted regression: the baseline was right on every image."""

    def better(report: dict[str, Any]) -> None:
        for accuracy in report["accuracies"]:
            accuracy |= right_on(accuracy, "1" * accuracy["labelled"])

    plant(repository, better)
    repository.makepyfile(FIVE_LINES)
    result = run(repository)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*fail: top-1, native on local: *images lost*"])
    repository.makepyfile(FIVE_LINES.replace("mark.accuracy", "mark.accuracy(max_drop=100)"))
    run(repository).assert_outcomes(passed=1)


def test_a_drop_that_may_be_chance_does_not_pass(repository: pytest.Pytester) -> None:
    def two_better(report: dict[str, Any]) -> None:
        for accuracy in report["accuracies"]:
            accuracy |= right_on(accuracy, accuracy["correct"].replace("0", "1", 2))

    plant(repository, two_better)
    repository.makepyfile(FIVE_LINES)
    result = run(repository)
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(["*inconclusive: top-1, native on local: *may be chance*"])


def test_without_a_baseline_the_command_is_named(repository: pytest.Pytester) -> None:
    repository.makepyfile(FIVE_LINES)
    (repository.path / "baseline.json").write_text("null")
    result = run(repository)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(
        ["*is null; make one with `xceptile baseline */bundles/host --data drawn:val:40 --output*"]
    )
    (repository.path / "baseline.json").unlink()
    result = run(repository)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*no such baseline file; make one with `xceptile baseline*"])
    said = [line for line in result.outlines if "no such baseline file" in line and not line.startswith("ERROR")]
    assert len(said) == 1


def test_a_missing_or_foreign_bundle_is_said_in_a_line(repository: pytest.Pytester) -> None:
    repository.makepyfile(FIVE_LINES)
    (repository.path / "bundles" / "host").rename(repository.path / "bundles" / "raspberry-pi-5")
    result = run(repository)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*bundles/host: no such bundle directory*"])
    result = run(repository, "--xceptile-target", "raspberry-pi-5")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*is a bundle for local/host, not for raspberrypi/raspberry-pi-5*"])
    result = run(repository, "--xceptile-target", "rasberry-pi-5")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*did you mean*"])


def test_fixtures_can_be_used_and_replaced(repository: pytest.Pytester) -> None:
    repository.makepyfile(
        """
        import numpy as np
        import pytest

        @pytest.fixture(scope="session")
        def xceptile_data():
            return "drawn:val:3"

        def test_session(xceptile_session, xceptile_bundle, xceptile_baseline):
            x, expected = xceptile_bundle.golden()
            assert np.array_equal(xceptile_session.engine.run(x), expected)
            assert xceptile_baseline.target == "local/host"

        @pytest.mark.accuracy
        def test_other_images(xceptile_verdict):
            assert any(f.what == "data" and f.outcome == "fail" for f in xceptile_verdict.findings)
        """
    )
    run(repository).assert_outcomes(passed=2)


def test_misuse_is_said_in_a_line(repository: pytest.Pytester) -> None:
    repository.makepyfile(
        """
        import pytest

        def test_no_marker(xceptile_verdict): ...

        @pytest.mark.accuracy(max_dorp=1)
        def test_misspelt(xceptile_verdict): ...
        """
    )
    result = run(repository)
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(
        ["*mark the test with pytest.mark.accuracy or*", "*the marker accuracy takes max_drop=*"]
    )


def test_rehearsed_latency_is_skipped_with_its_reason(repository: pytest.Pytester) -> None:
    def on_qemu(data: dict[str, Any]) -> None:
        data["baselines"]["local/host"]["qemu"] = data["baselines"]["local/host"]["local"] | {"device": "qemu"}

    path = repository.path / "baseline.json"
    data = json.loads(path.read_text())
    on_qemu(data)
    path.write_text(json.dumps(data))
    repository.makepyfile(LATENCY)
    result = run(repository, "--xceptile-device", "qemu", "-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*latency is judged on the target's own hardware*"])


def test_the_plugin_weighs_nothing_where_it_is_not_used() -> None:
    heavy = "sorted({'numpy', 'torch', 'tvm', 'typer'} & set(sys.modules))"
    script = f"import sys, pytest; import xceptile.runtime.pytest_plugin; sys.exit(str({heavy}) if {heavy} else 0)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
