"""Gates: a report against a baseline and a budget -> pass, fail or inconclusive, each with its reasons."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .measure import MEASURED, Accuracy, Flip, Latency, median_ratio_interval

BASELINE_FORMAT = 1
PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"


class BaselineError(ValueError):
    """A baseline that is missing or cannot be used."""


@dataclass(frozen=True)
class Report:
    """Everything seen in one run over a bundle on one device. ``machine`` and ``versions`` say on what."""

    target: str
    bundle_sha256: str
    data: str
    data_sha256: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    sizes_bytes: Mapping[str, int]  # per engine/dtype
    accuracies: tuple[Accuracy, ...]
    latencies: tuple[Latency, ...]


@dataclass(frozen=True)
class Budget:
    """What a change may cost. Accuracy in points (1.0 = one percent of the images); latency and size as ratios."""

    top1_drop_points: float = 0.5
    latency_ratio: float = 1.05
    size_ratio: float = 1.02


@dataclass(frozen=True)
class Finding:
    """One judged figure."""

    outcome: str
    what: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The findings, worst outcome first in ``outcome``: a fail outweighs an inconclusive, which outweighs a pass."""

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> str:
        outcomes = {finding.outcome for finding in self.findings}
        return next(o for o in (FAIL, INCONCLUSIVE, PASS) if o in outcomes or o == PASS)


def speedup_over_float(report: Report, engine: str) -> tuple[float, float, float] | None:
    """int8 latency of ``engine`` over the fastest float engine's, with its interval; None where either is missing."""
    int8 = [each for each in report.latencies if each.engine == engine and each.dtype == "int8"]
    floats = [each for each in report.latencies if each.dtype == "float32"]
    if not int8 or not floats:
        return None
    best = min(floats, key=lambda latency: latency.median_ms)
    return median_ratio_interval(int8[0].samples_ms, best.samples_ms)


def _judge_accuracy(now: Accuracy, then: Accuracy | None, budget: Budget) -> list[Finding]:
    where = f"{now.engine} on {now.device}"
    findings = []
    if now.bit_exact:
        findings.append(
            Finding(PASS, f"bit-exactness, {where}", f"all {now.compared_values} outputs equal the reference")
        )
    else:
        reason = (
            f"{now.differing_values} of {now.compared_values} outputs differ from the reference, by up to "
            f"{now.largest_difference_steps} steps"
        )
        findings.append(Finding(FAIL, f"bit-exactness, {where}", reason))
    if not now.labelled:
        findings.append(Finding(INCONCLUSIVE, f"top-1, {where}", "the images bear no labels"))
        return findings
    if then is None:
        findings.append(Finding(FAIL, f"top-1, {where}", "the baseline has no figure for this engine; make a new one"))
        return findings
    drop = (then.top1 - now.top1) * 100
    outcome = PASS if drop <= budget.top1_drop_points else FAIL
    reason = (
        f"{now.top1:.2%}, baseline {then.top1:.2%}: a drop of {drop:+.2f} points, {budget.top1_drop_points} allowed"
    )
    findings.append(Finding(outcome, f"top-1, {where}", reason))
    return findings


def _judge_latency(report: Report, baseline: Report, engine: str, budget: Budget) -> Finding:
    what = f"latency int8 / float, {engine}"
    now, then = speedup_over_float(report, engine), speedup_over_float(baseline, engine)
    if any(each.obtained != MEASURED for each in report.accuracies if each.engine == engine):
        return Finding(PASS, what, "not judged: rehearsed on an emulator or another device, where time does not count")
    if now is None:
        return Finding(FAIL, what, "not measured: int8 or the float network did not run")
    if then is None:
        return Finding(FAIL, what, "the baseline has no such figure; make a new one")
    # The ratio to float on the same machine, in the same run: it survives a slower or busier machine.
    change, low, high = now[0] / then[0], now[1] / then[0], now[2] / then[0]
    reason = (
        f"{now[0]:.3f} [{now[1]:.3f}, {now[2]:.3f}], baseline {then[0]:.3f}: {change:.3f} times, "
        f"{budget.latency_ratio} allowed"
    )
    if low > budget.latency_ratio:
        return Finding(FAIL, what, reason)
    return Finding(PASS if high <= budget.latency_ratio else INCONCLUSIVE, what, reason)


def _judge_slower_than_float(report: Report, engine: str) -> Finding | None:
    ratio = speedup_over_float(report, engine)
    if ratio is None or any(each.obtained != MEASURED for each in report.accuracies if each.engine == engine):
        return None
    faster = ratio[2] < 1.0
    text = f"int8 takes {ratio[0]:.3f} [{ratio[1]:.3f}, {ratio[2]:.3f}] of the best float build's time"
    return Finding(PASS if faster else FAIL, f"faster than float, {engine}", text)


def _judge_sizes(report: Report, baseline: Report, budget: Budget) -> list[Finding]:
    findings = []
    for name, size in sorted(report.sizes_bytes.items()):
        before = baseline.sizes_bytes.get(name)
        if before:
            outcome = PASS if size / before <= budget.size_ratio else FAIL
            reason = f"{size} bytes, baseline {before}: {size / before:.3f} times, {budget.size_ratio} allowed"
            findings.append(Finding(outcome, f"size, {name}", reason))
    return findings


def judge(report: Report, baseline: Report, budget: Budget) -> Verdict:
    """Compares figure by figure. A figure the baseline lacks is a failure with its reason, never a silence."""
    findings: list[Finding] = []
    if report.target != baseline.target:
        findings.append(
            Finding(FAIL, "target", f"the baseline is for {baseline.target}, the bundle for {report.target}")
        )
    if report.data_sha256 != baseline.data_sha256:
        reason = f"judged on {report.data}, whose contents are not those of the baseline's {baseline.data}"
        findings.append(Finding(FAIL, "data", reason))
    missing = {a.engine for a in baseline.accuracies} - {a.engine for a in report.accuracies}
    findings += [Finding(FAIL, f"engine {name}", "is in the baseline and did not run now") for name in sorted(missing)]
    for accuracy in report.accuracies:
        then = next((a for a in baseline.accuracies if a.engine == accuracy.engine), None)
        findings += _judge_accuracy(accuracy, then, budget)
    for engine in sorted({each.engine for each in report.accuracies}):
        findings.append(_judge_latency(report, baseline, engine, budget))
        slower = _judge_slower_than_float(report, engine)
        findings += [slower] if slower else []
    findings += _judge_sizes(report, baseline, budget)
    return Verdict(tuple(findings))


def report_to_json(report: Report) -> str:
    """With raw samples; NaN and infinities do not occur in counts, and an infinite SQNR is written as null."""
    data = asdict(report)
    for accuracy in data["accuracies"]:
        if math.isinf(accuracy["sqnr_db"]):
            accuracy["sqnr_db"] = None
    return json.dumps({"format": BASELINE_FORMAT, **data}, indent=1, sort_keys=True) + "\n"


def _report_from(data: dict[str, Any]) -> Report:
    accuracies = []
    for item in data["accuracies"]:
        flips = tuple(Flip(**flip) for flip in item["flips"])
        sqnr = math.inf if item["sqnr_db"] is None else item["sqnr_db"]
        accuracies.append(Accuracy(**{**item, "flips": flips, "sqnr_db": sqnr}))
    latencies = [Latency(**{**item, "samples_ms": tuple(item["samples_ms"])}) for item in data["latencies"]]
    rest = {k: v for k, v in data.items() if k not in ("format", "accuracies", "latencies")}
    return Report(accuracies=tuple(accuracies), latencies=tuple(latencies), **rest)


def load_baseline(path: Path, command: str) -> Report:
    """Reads a baseline. ``command`` is what makes one, for the message. Raises BaselineError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data is None:
            raise BaselineError(f"{path}: the baseline is null; make one with `{command}`")
        if data["format"] != BASELINE_FORMAT:
            raise BaselineError(f"{path}: has baseline format {data['format']}; make a new one with `{command}`")
        return _report_from(data)
    except FileNotFoundError:
        raise BaselineError(f"{path}: no such baseline; make one with `{command}`") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, BaselineError):
            raise
        raise BaselineError(f"{path}: is no baseline ({error}); make one with `{command}`") from error


def save_report(report: Report, path: Path) -> None:
    """Written aside and renamed. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(report_to_json(report), encoding="utf-8")
    os.replace(aside, path)
