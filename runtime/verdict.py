"""Gates: a report against a baseline and a budget -> pass, fail or inconclusive, each with its reasons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .accuracy import Accuracy
from .latency import Latency, bootstrap_medians, fastest_float, interleaved_ratio
from .obtained import MEASURED
from .statistics import mcnemar_exact

PASS, FAIL, INCONCLUSIVE = "pass", "fail", "inconclusive"
SQNR_LOSS_DB = 1.0  # a quarter more noise
SIGNIFICANCE = 0.05  # p-values below count; the intervals are those of 95 %
_SAME_MACHINE = ("processor", "architecture", "cores", "board")


@dataclass(frozen=True)
class Report:
    """Everything seen in one run over a bundle on one device. ``machine`` and ``versions`` say on what.

    ``memory_bytes`` is the most that the native program held, None where it could not say.
    """

    target: str
    bundle_sha256: str
    data: str
    data_sha256: str
    machine: Mapping[str, str]
    versions: Mapping[str, str]
    sizes_bytes: Mapping[str, int]  # per engine/dtype
    accuracies: tuple[Accuracy, ...]
    latencies: tuple[Latency, ...]
    device: str = "local"
    memory_bytes: Mapping[str, int | None] = field(default_factory=dict)  # per engine/dtype


@dataclass(frozen=True)
class Budget:
    """What a change may cost. Accuracy in points (1.0 = one percent of the images), the rest as ratios to the baseline:
    of int8's share of float's latency, of int8's latency itself, of sizes and of memory.
    """

    top1_drop_points: float = 0.5
    latency_ratio: float = 1.05
    slowdown_ratio: float = 1.10
    size_ratio: float = 1.02
    memory_ratio: float = 1.05


@dataclass(frozen=True)
class Finding:
    """One judged figure."""

    outcome: str
    what: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The findings. ``outcome`` is the worst: a fail outweighs an inconclusive, which outweighs a pass; where nothing
    was judged, nothing is decided. As text: what did not pass, a line each.
    """

    findings: tuple[Finding, ...]

    @property
    def outcome(self) -> str:
        outcomes = {finding.outcome for finding in self.findings}
        return next((o for o in (FAIL, INCONCLUSIVE, PASS) if o in outcomes), INCONCLUSIVE)

    def __str__(self) -> str:
        lines = [f"{f.outcome}: {f.what}: {f.reason}" for f in self.findings if f.outcome != PASS]
        return "\n".join(lines or [f"{self.outcome}: {len(self.findings)} figures judged"])


def _int8(report: Report, engine: str) -> Latency | None:
    return next((x for x in report.latencies if x.engine == engine and x.dtype == "int8"), None)


def speedup_over_float(report: Report, engine: str) -> tuple[float, float, float] | None:
    """int8 latency of ``engine`` over the fastest float build's, with its interval; None where either is missing."""
    int8, best = _int8(report, engine), fastest_float(report.latencies)
    return None if int8 is None or best is None else interleaved_ratio(int8, best)


def _shares(report: Report, engine: str) -> NDArray[np.float64]:
    """int8's share of float's time, turn by turn; where there were no turns, its times over float's median."""
    int8, best = _int8(report, engine), fastest_float(report.latencies)
    assert int8 is not None
    assert best is not None
    if int8.turns == best.turns and len(int8.turn_medians_ms) == len(best.turn_medians_ms) == int8.turns:
        return int8.turn_medians_ms / best.turn_medians_ms
    return np.asarray(int8.samples_ms) / best.median_ms


def _times_interval(now: NDArray[np.float64], then: NDArray[np.float64]) -> tuple[float, float]:
    """Of how many times as large the median is as in another run, both of which are resampled: (low, high)."""
    rng = np.random.default_rng(0)
    ratios = bootstrap_medians(now, rng) / bootstrap_medians(then, rng)
    return float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))


def _against(low: float, high: float, budget: float, what: str, reason: str) -> Finding:
    """Of an interval: within the budget, beyond it, or about it."""
    if low > budget:
        return Finding(FAIL, what, reason)
    if high <= budget:
        return Finding(PASS, what, reason)
    return Finding(INCONCLUSIVE, what, f"{reason}: a quieter machine or more rounds would decide")


def _judge_exactness(now: Accuracy, where: str) -> Finding:
    what = f"bit-exactness, {where}"
    if now.bit_exact:
        return Finding(PASS, what, f"all {now.compared_values} outputs equal the reference")
    reason = (
        f"{now.differing_values} of {now.compared_values} outputs differ from the reference, by up to "
        f"{now.largest_difference_steps} steps"
    )
    if now.allowed_steps:
        reason += f"; {now.allowed_steps} are allowed, as some layers are in float"
    return Finding(PASS if now.keeps_contract else FAIL, what, reason)


def _judge_top1(now: Accuracy, then: Accuracy | None, where: str, budget: Budget) -> Finding:
    """Image by image: a drop beyond the budget that chance explains (McNemar's test) is inconclusive."""
    what = f"top-1, {where}"
    if not now.labelled:
        return _judge_distance(now, then, where)
    if then is None:
        return Finding(FAIL, what, "the baseline has no figure for this engine; make a new one")
    if len(now.correct) != len(then.correct) or len(now.correct) != now.labelled:
        reason = (
            f"{len(now.correct)} images here and {len(then.correct)} in the baseline cannot be paired; make a new one"
        )
        return Finding(FAIL, what, reason)
    lost = sum(a == "1" and b == "0" for a, b in zip(then.correct, now.correct, strict=True))
    won = sum(a == "0" and b == "1" for a, b in zip(then.correct, now.correct, strict=True))
    drop, p = 100 * (lost - won) / now.labelled, mcnemar_exact(lost, won)
    reason = (
        f"{now.top1:.2%}, baseline {then.top1:.2%}: a drop of {drop:+.2f} points, {budget.top1_drop_points} allowed; "
        f"{lost} images lost, {won} won, p = {p:.2g}"
    )
    if drop <= budget.top1_drop_points:
        return Finding(PASS, what, reason)
    if p < SIGNIFICANCE:
        return Finding(FAIL, what, reason)
    return Finding(INCONCLUSIVE, what, f"{reason}: so few may be chance; judge on more images")


def _judge_distance(now: Accuracy, then: Accuracy | None, where: str) -> Finding:
    """Of a network with one output, or images without labels: how far the outputs are from float's, against then."""
    what = f"distance from float, {where}"
    if then is None:
        return Finding(FAIL, what, "the baseline has no figure for this engine; make a new one")
    why = "the network has one output" if now.outputs == 1 else "the images bear no labels"
    reason = (
        f"SQNR {now.sqnr_db:.1f} dB, baseline {then.sqnr_db:.1f} dB, {SQNR_LOSS_DB:g} dB less allowed; no top-1: {why}"
    )
    return Finding(PASS if now.sqnr_db >= then.sqnr_db - SQNR_LOSS_DB else FAIL, what, reason)


def _judge_share_of_float(report: Report, baseline: Report, engine: str, budget: Budget) -> list[Finding]:
    """The ratio to float on the same machine, in the same run: it survives a slower or busier machine."""
    what = f"latency int8 / float, {engine}"
    now, then = speedup_over_float(report, engine), speedup_over_float(baseline, engine)
    if now is None and _int8(report, engine) is None:
        return [Finding(FAIL, what, "not measured: int8 did not run")]
    if fastest_float(report.latencies) is None and fastest_float(baseline.latencies) is None:
        return [Finding(PASS, what, "not judged: no float build ran, then as now")]
    if now is None:
        reason = "not measured: the float network did not run; a device's python3 needs ai_edge_litert for that"
        return [Finding(FAIL, what, reason)]
    if then is None:
        return [Finding(FAIL, what, "the baseline has no such figure; make a new one")]
    change, low, high = now[0] / then[0], *_times_interval(*(_shares(run, engine) for run in (report, baseline)))
    reason = (
        f"{now[0]:.3f} [{now[1]:.3f}, {now[2]:.3f}], baseline {then[0]:.3f}: {change:.3f} times "
        f"[{low:.3f}, {high:.3f}], {budget.latency_ratio} allowed"
    )
    text = f"int8 takes {now[0]:.3f} [{now[1]:.3f}, {now[2]:.3f}] of the best float build's time"
    return [
        _against(low, high, budget.latency_ratio, what, reason),
        _against(now[1], now[2], 1.0, f"faster than float, {engine}", text),
    ]


def _judge_slowdown(report: Report, baseline: Report, engine: str, budget: Budget) -> Finding:
    """Against the same machine's earlier time. Where float slowed as well, it is the machine that is slower."""
    what = f"latency against the baseline's, {engine}"
    now, then = _int8(report, engine), _int8(baseline, engine)
    if now is None:
        return Finding(FAIL, what, "not measured: int8 did not run")
    if then is None:
        return Finding(FAIL, what, "the baseline has no such figure; make a new one")
    unlike = [name for name in _SAME_MACHINE if report.machine.get(name) != baseline.machine.get(name)]
    if unlike or now.threads != then.threads:
        reasons = [f"{name} is {report.machine.get(name)}, was {baseline.machine.get(name)}" for name in unlike]
        reasons += [f"on {now.threads} threads, was on {then.threads}"] if now.threads != then.threads else []
        return Finding(INCONCLUSIVE, what, f"{'; '.join(reasons)}: make a baseline of its own for this machine")
    ratio, (low, high) = now.median_ms / then.median_ms, _times_interval(now.turn_medians_ms, then.turn_medians_ms)
    reason = (
        f"{now.median_ms:.4g} ms, baseline {then.median_ms:.4g} ms: {ratio:.3f} times [{low:.3f}, {high:.3f}], "
        f"{budget.slowdown_ratio} allowed"
    )
    found = _against(low, high, budget.slowdown_ratio, what, reason)
    float_now, float_then = fastest_float(report.latencies), fastest_float(baseline.latencies)
    if found.outcome != FAIL:
        return found
    if float_now is None or float_then is None:
        return Finding(FAIL, what, f"{reason}; without a float build in both runs, a slower machine looks the same")
    machine = float_now.median_ms / float_then.median_ms
    if low / machine <= budget.slowdown_ratio:
        return Finding(INCONCLUSIVE, what, f"{reason}; float takes {machine:.3f} times as long, too: a slower machine")
    return found


def _judge_bytes(
    what: str, now: Mapping[str, int | None], then: Mapping[str, int | None], allowed: float
) -> list[Finding]:
    findings = []
    for name in sorted({*now, *then}):
        size, before = now.get(name), then.get(name)
        if size is None:
            findings.append(Finding(FAIL, f"{what}, {name}", "is in the baseline and was not measured now"))
        elif not before:
            findings.append(Finding(FAIL, f"{what}, {name}", "the baseline has no such figure; make a new one"))
        else:
            reason = f"{size} bytes, baseline {before}: {size / before:.3f} times, {allowed} allowed"
            findings.append(Finding(PASS if size / before <= allowed else FAIL, f"{what}, {name}", reason))
    return findings


def judge_bytes(report: Report, baseline: Report, budget: Budget) -> list[Finding]:
    """Of every artefact: what a device stores, and the memory that the native ones hold."""
    findings = _judge_bytes("size", report.sizes_bytes, baseline.sizes_bytes, budget.size_ratio)
    return findings + _judge_bytes("memory", report.memory_bytes, baseline.memory_bytes, budget.memory_ratio)


def judge_accuracy(report: Report, baseline: Report, budget: Budget) -> list[Finding]:
    """Bit-exactness and top-1 of every int8 engine."""
    findings: list[Finding] = []
    if report.data_sha256 != baseline.data_sha256:
        reason = f"judged on {report.data}, whose images or labels are not those of the baseline's {baseline.data}"
        findings.append(Finding(FAIL, "data", reason))
    missing = {a.engine for a in baseline.accuracies} - {a.engine for a in report.accuracies}
    findings += [Finding(FAIL, f"engine {name}", "is in the baseline and did not run now") for name in sorted(missing)]
    for accuracy in report.accuracies:
        then = next((a for a in baseline.accuracies if a.engine == accuracy.engine), None)
        where = f"{accuracy.engine} on {accuracy.device}"
        findings += [_judge_exactness(accuracy, where), _judge_top1(accuracy, then, where, budget)]
    return findings


def judge_latency(report: Report, baseline: Report, budget: Budget) -> list[Finding]:
    """Of every int8 engine: against float in the same run, and against the baseline's own time."""
    findings: list[Finding] = []
    rehearsed = {each.engine for each in report.accuracies if each.obtained != MEASURED}
    rehearsed |= {each.engine for each in report.latencies if each.obtained != MEASURED}
    engines = {each.engine for each in report.accuracies}
    engines |= {x.engine for run in (report, baseline) for x in run.latencies if x.dtype == "int8"}
    for engine in sorted(engines):
        if engine in rehearsed:
            reason = "not judged: rehearsed on an emulator or another device, where time does not count"
            findings.append(Finding(PASS, f"latency int8 / float, {engine}", reason))
            continue
        findings += _judge_share_of_float(report, baseline, engine, budget)
        findings.append(_judge_slowdown(report, baseline, engine, budget))
    return findings


def judge(report: Report, baseline: Report, budget: Budget) -> Verdict:
    """Compares figure by figure. A figure the baseline lacks is a failure with its reason, never a silence."""
    findings: list[Finding] = []
    if (report.target, report.device) != (baseline.target, baseline.device):
        reason = (
            f"the baseline is for {baseline.target} on {baseline.device}, the run for {report.target} on "
            f"{report.device}"
        )
        findings.append(Finding(FAIL, "target", reason))
    findings += judge_accuracy(report, baseline, budget)
    findings += judge_latency(report, baseline, budget) + judge_bytes(report, baseline, budget)
    return Verdict(tuple(findings))
