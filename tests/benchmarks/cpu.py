"""Our int8 against LiteRT's on this machine: the full Xception at 299x299, one image, interleaved runs.

``PYTHONPATH=tests python tests/benchmarks/cpu.py [--threads 1 2] [--rounds 30] [--layers]``

Prints the median and quartiles of single inferences, and of the ratio of the two within a round, so that a machine
that slows down slows both. On one thread also processor time, which other programs disturb less than the clock on the
wall. No assertion: what is measured here is judged by ``xceptile check``, not by a test.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from benchmarks.interleaved import interleave
from support import int8_graphs

from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import native_runtime, tflite
from xceptile.runtime import reference
from xceptile.runtime.engines.litert import LiteRtEngine
from xceptile.runtime.engines.native import NativeEngine
from xceptile.targets import host


def processor() -> str:
    """The processor's name and what it says it can do, from /proc/cpuinfo."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{name}, {os.cpu_count()} processors, {platform.system()} {platform.release()}"


def quartiles(samples: list[float]) -> str:
    low, middle, high = statistics.quantiles(samples, n=4)
    return f"{middle:8.3f} [{low:.3f}, {high:.3f}]"


def report(title: str, ours: list[float], theirs: list[float]) -> None:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    print(f"{title}: xceptile ms {quartiles(ours)}   litert ms {quartiles(theirs)}   ratio {quartiles(ratios)}")


def print_layers(engine: NativeEngine, x: np.ndarray, rounds: int) -> None:
    """The best time of every step and the multiply-accumulates a second that it reached."""
    best = [float("inf")] * len(engine.steps())
    for _ in range(rounds):
        engine.run(x)
        best = [min(b, step.last_ms) for b, step in zip(best, engine.steps(), strict=True)]
    for step, time_ms in zip(engine.steps(), best, strict=True):
        print(
            f"{time_ms * 1e3:9.0f} us {step.macs / time_ms / 1e6:8.1f} GMAC/s  {step.path or step.name}  {step.kernel}"
        )
    print(f"{sum(best) * 1e3:9.0f} us in all")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--layers", action="store_true", help="the time of every kernel, on one thread")
    options = parser.parse_args()
    target = host.detect()
    peers = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ai-edge-litert", "apache-tvm"))
    print(f"{processor()}; {target.name} {target.cpu} {' '.join(target.features)}; {peers}")
    graph = int8_graphs.random_xception()
    (x,) = int8_graphs.random_input(graph)
    model = tflite.serialize(graph)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        start = time.perf_counter()
        files = backend.build_files(graph, target)
        print(f"compiled in {time.perf_counter() - start:.1f} s")
        for file, data in (files | native_runtime.build(target)).items():
            (folder / file).write_bytes(data)
        (expected,) = reference.run(graph, x)
        for threads in options.threads:
            theirs = LiteRtEngine(model, threads)
            with NativeEngine(folder, threads) as ours:
                if not np.array_equal(ours.run(x), expected) or not np.array_equal(theirs.run(x), expected):
                    raise SystemExit("the outputs differ from the reference: nothing is measured")
                runs = (partial(ours.run, x), partial(theirs.run, x))
                report(f"{threads} threads, wall", *interleave(*runs, options.rounds, time.perf_counter_ns))
                if threads == 1:
                    report("1 threads, processor", *interleave(*runs, options.rounds, time.process_time_ns))
        if options.layers:
            with NativeEngine(folder, 1, time_steps=True) as ours:
                print_layers(ours, x, options.rounds)


if __name__ == "__main__":
    main()
