"""Accuracies, latencies and reports for tests of what is made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from xceptile.runtime.accuracy import Accuracy, ImageResult, judge_image, likeliest, signal_power, summarize
from xceptile.runtime.latency import Latency
from xceptile.runtime.obtained import MEASURED
from xceptile.runtime.session import LOCAL
from xceptile.runtime.verdict import Report

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


def sampled(samples: np.ndarray, turns: int = 0, dtype: str = "int8") -> Latency:
    return Latency("native", dtype, LOCAL, "measured", 1, tuple(samples.ravel().tolist()), turns)
