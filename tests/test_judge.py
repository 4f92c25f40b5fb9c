"""Verdicts: every figure judged against the baseline, nothing passed over in silence."""

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest

from xceptile.runtime.judge import (
    FAIL,
    INCONCLUSIVE,
    PASS,
    BaselineError,
    Budget,
    Report,
    judge,
    load_baseline,
    report_to_json,
    save_report,
)
from xceptile.runtime.measure import MEASURED, REHEARSED, Accuracy, Latency, compare, median_ratio_interval, sqnr_db

NAMES = [f"{i}.png" for i in range(4)]


def accuracy(**changes: object) -> Accuracy:
    float_logits = np.array([[3, 1], [3, 1], [1, 3], [1, 3]], np.float32)
    int8_logits = np.array([[30, 10], [30, 10], [10, 30], [31, 30]], np.int8)
    whole = compare(
        NAMES, [0, 0, 1, 1], ("a", "b"), float_logits, int8_logits, int8_logits,
        scale=0.1, zero_point=0, engine="native", device="local", obtained=MEASURED,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # the keys are the caller's


def latency(dtype: str, median: float, spread: float = 0.01, obtained: str = MEASURED) -> Latency:
    samples = tuple(median * (1 + spread * math.sin(i)) for i in range(200))
    return Latency("native" if dtype == "int8" else "litert", dtype, "local", obtained, 2, samples)


def report(int8_ms: float = 10.0, spread: float = 0.01, **changes: object) -> Report:
    whole = Report(
        target="local/host",
        bundle_sha256="0",
        data="drawn",
        data_sha256="1",
        machine={},
        versions={},
        sizes_bytes={"native/int8": 1000},
        accuracies=(accuracy(),),
        latencies=(latency("int8", int8_ms, spread), latency("float32", 40.0)),
    )
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # the keys are the caller's


def outcome(now: Report, then: Report, what: str) -> str:
    return next(f.outcome for f in judge(now, then, Budget()).findings if f.what.startswith(what))


def test_compare_counts() -> None:
    a = accuracy()
    assert (a.images, a.labelled, a.float_correct, a.int8_correct) == (4, 4, 4, 3)
    assert (a.agreeing, a.float_only_correct, a.int8_only_correct) == (3, 1, 0)
    assert a.bit_exact
    assert a.compared_values == 8
    assert [(f.image, f.label, f.float_class, f.int8_class, f.margin) for f in a.flips] == [
        ("3.png", "b", "b", "a", 2.0)
    ]


def test_one_step_off_is_seen() -> None:
    logits = np.zeros((1, 2), np.int8)
    expected = np.array([[0, 1]], np.int8)
    a = compare(
        ["x"], [None], ("a", "b"), logits.astype(np.float32), logits, expected,
        scale=1.0, zero_point=0, engine="e", device="local", obtained=MEASURED,
    )  # fmt: skip
    assert not a.bit_exact
    assert (a.differing_values, a.largest_difference_steps) == (1, 1)
    assert math.isnan(a.top1)


def test_an_unchanged_report_passes() -> None:
    assert judge(report(), report(), Budget()).outcome == PASS


def test_slower_fails_faster_passes_noisy_is_inconclusive() -> None:
    what = "latency int8 / float, native"
    assert outcome(report(12.0), report(10.0), what) == FAIL
    assert outcome(report(9.0), report(10.0), what) == PASS
    assert outcome(report(10.5, spread=0.5), report(10.0), what) == INCONCLUSIVE


def test_a_slower_machine_is_no_regression() -> None:
    slow = report(20.0, latencies=(latency("int8", 20.0), latency("float32", 80.0)))
    assert outcome(slow, report(10.0), "latency") == PASS


def test_int8_slower_than_float_fails() -> None:
    assert outcome(report(41.0), report(41.0), "faster than float") == FAIL


def test_rehearsed_time_is_not_judged() -> None:
    slow = report(400.0, accuracies=(accuracy(obtained=REHEARSED),))
    assert outcome(slow, report(), "latency") == PASS
    assert not any(f.what.startswith("faster") for f in judge(slow, report(), Budget()).findings)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"accuracies": (accuracy(int8_correct=2),)}, "top-1"),
        ({"accuracies": (accuracy(differing_values=1),)}, "bit-exactness"),
        ({"accuracies": ()}, "engine native"),
        ({"sizes_bytes": {"native/int8": 1100}}, "size"),
        ({"data_sha256": "2"}, "data"),
        ({"target": "other/board"}, "target"),
        ({"latencies": (latency("int8", 10.0),)}, "latency"),
    ],
)
def test_each_regression_fails_with_its_reason(changes: dict[str, object], what: str) -> None:
    assert outcome(report(**changes), report(), what) == FAIL  # type: ignore[arg-type]  # a mapping of fields


def test_a_baseline_reads_back(tmp_path: Path) -> None:
    whole = report(accuracies=(accuracy(sqnr_db=math.inf),))
    save_report(whole, tmp_path / "b.json")
    assert load_baseline(tmp_path / "b.json", "make") == whole
    assert json.loads(report_to_json(whole))["format"] == 1


@pytest.mark.parametrize("text", [None, "null", "", "{}", '{"format": 99}', '{"format": 1}', "[1]"])
def test_a_missing_or_null_baseline_names_the_command(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "b.json").write_text(text)
    with pytest.raises(BaselineError, match="`xceptile baseline x`"):
        load_baseline(tmp_path / "b.json", "xceptile baseline x")


def test_the_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.normal(10, 1, 300), rng.normal(20, 1, 300)
    ratio, low, high = median_ratio_interval(a.tolist(), b.tolist())
    assert low < 0.5 < high
    assert low < ratio < high
    assert high - low < 0.03


def test_sqnr() -> None:
    assert sqnr_db(np.array([10.0]), np.array([9.0])) == pytest.approx(20.0)
    assert sqnr_db(np.array([1.0]), np.array([1.0])) == math.inf
