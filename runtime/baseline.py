"""Reports and baselines as files: a baseline file has a report for each target and device."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..models.atomic_write import write_atomically
from ..models.read_file import read_file
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
    accuracies = [{**a, "sqnr_db": math.inf if a["sqnr_db"] is None else a["sqnr_db"]} for a in data["accuracies"]]
    report: Report = decode(Report, {**data, "accuracies": accuracies})
    for latency in report.latencies:
        if not latency.samples_ms or not all(0 < sample < math.inf for sample in latency.samples_ms):
            raise ValueError(f"samples_ms of {latency.engine} {latency.dtype} are no times")
    return report


def _read_baselines(path: Path) -> dict[str, dict[str, Any]]:
    """By target, by device. Raises BaselineError, FileNotFoundError."""
    try:
        data = json.loads(read_file(path))
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

    Raises BaselineError where the path holds something else, OSError.
    """
    try:
        baselines = _read_baselines(path) if path.is_file() else {}
    except BaselineError as error:
        raise BaselineError(f"{error}; remove it, or write to another file") from error
    baselines.setdefault(report.target, {})[report.device] = _plain(report)
    write_atomically(path, _dump({"format": BASELINE_FORMAT, "baselines": baselines}))


def save_report(report: Report, path: Path) -> None:
    """Written aside and renamed. Raises OSError."""
    write_atomically(path, report_to_json(report))
