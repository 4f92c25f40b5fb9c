"""Reports and baselines as files: a baseline file has a report for each target and device."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..models.atomic_write import write_atomically
from ..models.locked import locked
from ..models.read_file import BASELINE_BYTES, read_file
from .accuracy import Accuracy
from .latency import Latency
from .typed_json import decode
from .verdict import Report

REPORT_FORMAT, BASELINE_FORMAT = 1, 2


class BaselineError(ValueError):
    """A baseline that is missing or cannot be used."""


def _plain(report: Report) -> dict[str, Any]:
    """NaN and infinities do not occur in counts, and an infinite SQNR is written as null."""
    data = asdict(report)
    for accuracy in data["accuracies"]:
        if math.isinf(accuracy["sqnr_db"]):
            accuracy["sqnr_db"] = None
    return data


def report_to_json(report: Report) -> str:
    """With raw samples."""
    return _dump({"format": REPORT_FORMAT, **_plain(report)})


def _dump(value: Any) -> str:
    return json.dumps(value, indent=1, sort_keys=True) + "\n"


def _report_from(data: dict[str, Any]) -> Report:
    """Raises ValueError, KeyError, TypeError, AttributeError for what no run can have seen."""
    exact = [a["sqnr_db"] is None for a in data["accuracies"]]
    written = [{**a, "sqnr_db": a["sqnr_db"] or 0.0} for a in data["accuracies"]]
    report: Report = decode(Report, {**data, "accuracies": written})
    accuracies = (replace(a, sqnr_db=math.inf) if e else a for a, e in zip(report.accuracies, exact, strict=True))
    report = replace(report, accuracies=tuple(accuracies))
    for accuracy in report.accuracies:
        _check_accuracy(accuracy)
    for latency in report.latencies:
        _check_latency(latency)
    for name, size in (*report.sizes_bytes.items(), *report.memory_bytes.items()):
        if size is not None and size < 1:
            raise ValueError(f"{name} is of {size} bytes")
    return report


def _check_accuracy(a: Accuracy) -> None:
    """Raises ValueError for counts that no images have."""
    never_more = (
        (0, a.int8_correct, a.int8_correct_top5, a.labelled, a.images),
        (0, a.float_correct, a.float_correct_top5, a.labelled),
        (0, a.int8_only_correct, a.int8_correct),
        (0, a.float_only_correct, a.float_correct),
        (0, a.agreeing, a.images),
        (0, a.differing_values, a.compared_values),
        (0, a.largest_difference_steps, 255),
        (0, a.allowed_steps, 255),
    )
    sound = all(list(counts) == sorted(counts) for counts in never_more)
    sound &= a.int8_correct - a.int8_only_correct == a.float_correct - a.float_only_correct
    sound &= (a.differing_values == 0) == (a.largest_difference_steps == 0)
    # Empty in baselines of before it was kept.
    sound &= a.correct == "" or (len(a.correct) == a.labelled and a.correct.count("1") == a.int8_correct)
    if not sound or a.correct.strip("01"):
        raise ValueError(f"its counts of images of {a.engine} cannot be")


def _check_latency(x: Latency) -> None:
    """Raises ValueError for samples that no clock takes."""
    if not x.samples_ms or min(x.samples_ms) <= 0:
        raise ValueError(f"samples_ms of {x.engine} {x.dtype} are no times")
    if x.threads < 1 or x.batch < 1 or x.turns < 0 or (x.turns and len(x.samples_ms) % x.turns):
        raise ValueError(f"{x.engine} {x.dtype} was not timed in {x.turns} turns on {x.threads} threads")


def _read_baselines(path: Path) -> dict[str, dict[str, Any]]:
    """By target, by device. Raises BaselineError, FileNotFoundError."""
    try:
        data = json.loads(read_file(path, BASELINE_BYTES))
        if data is None:
            raise BaselineError(f"{path}: the baseline is null")
        if data["format"] != BASELINE_FORMAT:
            raise BaselineError(f"{path}: has baseline format {data['format']}, not {BASELINE_FORMAT}")
        return {target: dict(devices) for target, devices in data["baselines"].items()}
    except FileNotFoundError:
        raise
    except BaselineError:
        raise
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BaselineError(f"{path}: is no baseline file ({error})") from error


def load_baseline(path: Path, target: str, device: str, command: str) -> Report:
    """The baseline for a target on a device. ``command`` is what makes one, for the message. Raises BaselineError."""
    try:
        data = _read_baselines(path).get(target, {}).get(device)
        if data is None:
            raise BaselineError(f"{path}: has no baseline for {target} on {device}")
        return _report_from(data)
    except FileNotFoundError:
        raise BaselineError(f"{path}: no such baseline file; make one with `{command}`") from None
    except BaselineError as error:
        raise BaselineError(f"{error}; make one with `{command}`") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"its baseline for {target} on {device} is damaged ({error})"
        raise BaselineError(f"{path}: {reason}; make one with `{command}`") from error


def save_baseline(report: Report, path: Path) -> None:
    """Puts the report in its place of the file, beside those of other targets and devices.

    Two that save at once wait for each other. Raises BaselineError where the path holds something else, OSError.
    """
    with locked(Path(os.path.realpath(path)).parent):
        try:
            baselines = _read_baselines(path) if path.is_file() else {}
        except BaselineError as error:
            raise BaselineError(f"{error}; remove it, or write to another file") from error
        baselines.setdefault(report.target, {})[report.device] = _plain(report)
        write_atomically(path, _dump({"format": BASELINE_FORMAT, "baselines": baselines}))


def save_report(report: Report, path: Path) -> None:
    """Written aside and renamed. Raises OSError."""
    write_atomically(path, report_to_json(report))
