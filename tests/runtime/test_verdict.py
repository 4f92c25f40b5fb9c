"""Verdicts: every figure judged against the baseline, nothing passed over in silence."""

import dataclasses
import math

import pytest
from support.reports import accuracy, latency, report

from xceptile.runtime.accuracy import Accuracy
from xceptile.runtime.obtained import REHEARSED
from xceptile.runtime.verdict import FAIL, INCONCLUSIVE, PASS, Budget, Report, judge


def over_images(correct: int, images: int = 1000, of: str = "") -> Accuracy:
    """Right on the first ``correct`` images, or on those of the string."""
    marks = of or "1" * correct + "0" * (images - correct)
    return accuracy(correct=marks, int8_correct=marks.count("1"), labelled=len(marks), images=len(marks))


def outcome(now: Report, then: Report, what: str) -> str:
    return next(f.outcome for f in judge(now, then, Budget()).findings if f.what.startswith(what))


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


@pytest.mark.parametrize(
    ("lost_db", "expected"), [(-2.0, PASS), (0.0, PASS), (0.9, PASS), (1.1, FAIL), (math.inf, FAIL)]
)
def test_without_classes_the_distance_from_float_is_judged(lost_db: float, expected: str) -> None:
    now, then = accuracy(labelled=0, correct="", sqnr_db=30.0), accuracy(sqnr_db=30.0 + lost_db)
    both = report(accuracies=(now,)), report(accuracies=(then,))
    assert outcome(*both, "distance from float") == expected
    assert not any(f.what.startswith("top-1") for f in judge(*both, Budget()).findings)
