"""Verdicts: every figure judged against the baseline, nothing passed over in silence."""

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from xceptile.runtime.accuracy import ImageResult, judge_image, likeliest, signal_power, summarize
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
    save_baseline,
    save_report,
)
from xceptile.runtime.measure import MEASURED, REHEARSED, Accuracy, Latency, median_ratio_interval, sqnr_db
from xceptile.runtime.statistics import mcnemar_exact

NAMES = [f"{i}.png" for i in range(4)]


def compare(
    names: Sequence[str],
    labels: Sequence[int | None],
    classes: Sequence[str],
    float_logits: NDArray[np.float32],
    int8_logits: NDArray[np.int8],
    expected: NDArray[np.int8],
    *,
    scale: float,
    zero_point: int,
    engine: str,
    device: str,
    obtained: str,
) -> Accuracy:
    """Judges one engine's outputs (B, classes) against labels, the float network and the integer reference."""
    results = []
    for i, name in enumerate(names):
        seen = judge_image(
            float_logits[i],
            int8_logits[i],
            expected[i],
            scale=scale,
            zero_point=zero_point,
            device=device,
            obtained=obtained,
        )
        power, top = signal_power(float_logits[i]), likeliest(float_logits[i])
        results.append(ImageResult(i, name, labels[i], "", top, power, expected[i].size, {engine: seen}))
    return summarize(results, engine, classes)


def accuracy(**changes: object) -> Accuracy:
    float_logits = np.array([[3, 1], [3, 1], [1, 3], [1, 3]], np.float32)
    int8_logits = np.array([[30, 10], [30, 10], [10, 30], [31, 30]], np.int8)
    whole = compare(
        NAMES, [0, 0, 1, 1], ("a", "b"), float_logits, int8_logits, int8_logits,
        scale=0.1, zero_point=0, engine="native", device="local", obtained=MEASURED,
    )  # fmt: skip
    return dataclasses.replace(whole, **changes)  # type: ignore[arg-type]  # the keys are the caller's


def over_images(correct: int, images: int = 1000, of: str = "") -> Accuracy:
    """Right on the first ``correct`` images, or on those of the string."""
    marks = of or "1" * correct + "0" * (images - correct)
    return accuracy(correct=marks, int8_correct=marks.count("1"), labelled=len(marks), images=len(marks))


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
        memory_bytes={"native/int8": 1_000_000},
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
    assert outcome(slow, report(10.0), "latency int8 / float") == PASS
    assert outcome(slow, report(10.0), "latency against") == INCONCLUSIVE  # float, too, takes twice as long


def test_a_slower_int8_fails_against_its_own_time() -> None:
    what = "latency against the baseline's, native"
    assert outcome(report(12.0), report(10.0), what) == FAIL
    assert outcome(report(10.5), report(10.0), what) == PASS
    alone = (latency("int8", 12.0),)
    assert outcome(report(latencies=alone), report(), what) == FAIL  # without float there is nothing to excuse it
    assert outcome(report(latencies=(latency("float32", 40.0),)), report(), what) == FAIL


@pytest.mark.parametrize(
    "changes",
    [{"machine": {"processor": "another"}}, {"latencies": (dataclasses.replace(latency("int8", 10.0), threads=1),)}],
)
def test_times_of_another_machine_decide_nothing(changes: dict[str, object]) -> None:
    now = report(**changes)  # type: ignore[arg-type]  # a mapping of fields
    finding = next(f for f in judge(now, report(), Budget()).findings if f.what.startswith("latency against"))
    assert finding.outcome == INCONCLUSIVE
    assert "was" in finding.reason


def test_where_no_float_build_ever_ran_int8_s_own_time_is_judged() -> None:
    then = report(latencies=(latency("int8", 10.0),))
    assert judge(then, then, Budget()).outcome == PASS
    assert outcome(then, then, "latency int8 / float") == PASS
    assert judge(report(latencies=(latency("int8", 12.0),)), then, Budget()).outcome == FAIL
    assert outcome(report(), then, "latency int8 / float") == FAIL
    none = report(latencies=())
    assert outcome(none, then, "latency int8 / float") == FAIL
    assert outcome(then, none, "latency against") == FAIL


def test_int8_slower_than_float_fails() -> None:
    assert outcome(report(41.0), report(41.0), "faster than float") == FAIL


def test_rehearsed_time_is_not_judged() -> None:
    slow = report(400.0, accuracies=(accuracy(obtained=REHEARSED),))
    assert outcome(slow, report(), "latency") == PASS
    assert not any(f.what.startswith("faster") for f in judge(slow, report(), Budget()).findings)


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"accuracies": (accuracy(correct=""),)}, "top-1"),
        ({"accuracies": (accuracy(differing_values=1, largest_difference_steps=1),)}, "bit-exactness"),
        ({"accuracies": ()}, "engine native"),
        ({"sizes_bytes": {"native/int8": 1100}}, "size"),
        ({"sizes_bytes": {}}, "size"),
        ({"memory_bytes": {"native/int8": 1_100_000}}, "memory"),
        ({"memory_bytes": {"native/int8": None}}, "memory"),
        ({"memory_bytes": {}}, "memory"),
        ({"device": "ssh://other"}, "target"),
        ({"data_sha256": "2"}, "data"),
        ({"target": "other/board"}, "target"),
        ({"latencies": (latency("int8", 10.0),)}, "latency int8 / float"),
    ],
)
def test_each_regression_fails_with_its_reason(changes: dict[str, object], what: str) -> None:
    assert outcome(report(**changes), report(), what) == FAIL  # type: ignore[arg-type]  # a mapping of fields


@pytest.mark.parametrize("field", ["sizes_bytes", "memory_bytes", "accuracies", "latencies"])
def test_a_figure_the_baseline_lacks_fails(field: str) -> None:
    then = report(**{field: () if field in ("accuracies", "latencies") else {}})  # type: ignore[arg-type]  # by name
    verdict = judge(report(), then, Budget())
    assert verdict.outcome == FAIL
    assert any(f.outcome == FAIL and "make a new one" in f.reason for f in verdict.findings)


def judged_top1(now: Accuracy, then: Accuracy) -> str:
    return outcome(report(accuracies=(now,)), report(accuracies=(then,)), "top-1")


def test_a_drop_beyond_chance_fails() -> None:
    assert judged_top1(over_images(900), over_images(920)) == FAIL  # 20 lost, none won
    assert judged_top1(over_images(915), over_images(920)) == PASS  # half a point is allowed
    assert judged_top1(over_images(930), over_images(920)) == PASS


def test_a_drop_that_chance_explains_is_inconclusive() -> None:
    """One point of a thousand images: 55 lost and 45 won may be chance, 10 lost and none won is none."""
    then = "1" * 500 + "0" * 500
    lost_and_won = "0" * 55 + "1" * 445 + "1" * 45 + "0" * 455
    assert judged_top1(over_images(0, of=lost_and_won), over_images(0, of=then)) == INCONCLUSIVE
    only_lost = "0" * 10 + "1" * 490 + "0" * 500
    assert judged_top1(over_images(0, of=only_lost), over_images(0, of=then)) == FAIL
    assert judged_top1(accuracy(correct="1100", int8_correct=2), accuracy()) == INCONCLUSIVE  # one of four images


def test_images_without_labels_decide_nothing() -> None:
    assert judged_top1(accuracy(labelled=0, correct=""), accuracy()) == INCONCLUSIVE


@pytest.mark.parametrize(("b", "c"), [(0, 0), (1, 0), (5, 5), (55, 45), (10, 0), (3, 17), (800, 700), (0, 5000)])
def test_mcnemar_is_the_exact_binomial(b: int, c: int) -> None:
    expected = stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar_exact(b, c) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_mcnemar_refuses_what_is_no_count() -> None:
    with pytest.raises(ValueError, match="negative"):
        mcnemar_exact(-1, 2)


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
