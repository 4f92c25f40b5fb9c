"""The file of ``xceptile tune``: which task sizes were tried on a device, what they took, and which won."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..models.atomic_write import write_atomically
from ..models.read_file import read_file
from ..runtime.bundle import sha256
from ..targets.spec import TargetSpec

SCHEMA = 1
TUNED = "sha256 of the tuning"  # in a manifest's provenance
LEAST_GAIN = 0.02  # of a step's time: less than that is within the noise of a median


class TuningError(ValueError):
    """A tuning file that cannot be read or does not fit, or a device that nothing can be measured on."""


@dataclass(frozen=True)
class Trial:
    """One candidate: the time of its steps, and of the cost model's choice in the same rounds, medians; or why none."""

    value: int
    time_ms: float | None = None
    model_ms: float | None = None
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Its time in that of the cost model's choice; infinite where it failed."""
        return self.time_ms / self.model_ms if self.time_ms is not None and self.model_ms else float("inf")


@dataclass(frozen=True)
class Tuning:
    """What was measured for one target, with its ``features``, on ``threads``; ``obtained`` as in ``Placement``.

    ``model`` has the cost model's choice for each key, ``trials`` every other candidate that was tried.
    ``latency_ratio`` is that of the whole network with the winners to the cost model's, None until all was tried.
    """

    target: str
    features: tuple[str, ...]
    threads: int
    obtained: str
    model: Mapping[str, int] = field(default_factory=dict)
    trials: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)
    latency_ratio: float | None = None

    @property
    def choices(self) -> dict[str, int]:
        """The winner for each key: the cost model's, unless another was faster by more than noise; the cost model's
        for all where the winners together were no faster."""
        if self.latency_ratio is not None and self.latency_ratio >= 1:
            return dict(self.model)
        result = {}
        for key, value in self.model.items():
            best = min(self.trials.get(key, ()), key=lambda trial: trial.ratio, default=None)
            result[key] = best.value if best is not None and best.ratio < 1 - LEAST_GAIN else value
        return result

    def sha256(self) -> str:
        """Of the file that holds it."""
        return sha256(to_json(self).encode())

    def check_target(self, target: TargetSpec) -> None:
        """Raises TuningError where the times are another processor's."""
        if (self.target, self.features) != (target.name, target.features):
            raise TuningError(
                f"the tuning is of {self.target} ({', '.join(self.features)}), not of {target.name} "
                f"({', '.join(target.features)}); run `xceptile tune {target.board}` on the device"
            )


def to_json(tuning: Tuning) -> str:
    """With the winners written out for whoever reads the file; reading derives them again."""
    return json.dumps({"schema": SCHEMA, **asdict(tuning), "choices": tuning.choices}, indent=1, sort_keys=True) + "\n"


def from_json(text: str) -> Tuning:
    """The inverse. Raises TuningError for another schema or a file that is no tuning."""
    try:
        values = json.loads(text)
        schema = values["schema"]
        if schema != SCHEMA:
            raise TuningError(f"this version reads tunings of schema {SCHEMA}, the file says {schema!r}; tune again")
        trials = {key: tuple(_trial(trial) for trial in each) for key, each in values["trials"].items()}
        model = {str(key): _positive(value) for key, value in values["model"].items()}
        ratio = values["latency_ratio"]
        return Tuning(
            str(values["target"]),
            tuple(map(str, values["features"])),
            _positive(values["threads"]),
            str(values["obtained"]),
            model,
            trials,
            None if ratio is None else float(ratio),
        )
    except TuningError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise TuningError(f"no tuning that `xceptile tune` wrote: {type(error).__name__} {error}") from error


def _trial(values: Mapping[str, Any]) -> Trial:
    time_ms, model_ms = (None if values[name] is None else float(values[name]) for name in ("time_ms", "model_ms"))
    if any(time is not None and not 0 < time < float("inf") for time in (time_ms, model_ms)):
        raise ValueError(f"times {time_ms}, {model_ms}")
    return Trial(_positive(values["value"]), time_ms, model_ms, str(values["failure"]))


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{value!r} is no positive number")
    return value


def load(path: Path) -> Tuning:
    """Raises TuningError with the path, OSError."""
    try:
        return from_json(read_file(path).decode())
    except ValueError as error:
        raise TuningError(f"{path}: {error}") from error


def save(tuning: Tuning, path: Path) -> None:
    """Written aside and renamed. Raises OSError."""
    write_atomically(path, to_json(tuning))
