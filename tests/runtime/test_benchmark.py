"""Benchmarks: the faster build, a sustained run, the machine beside: the bookkeeping is tested, no time."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import numpy as np
import pytest
from support.reports import sampled

from xceptile.compile import cli
from xceptile.compile.commands.bench import faster_line
from xceptile.runtime import benchmark as benches
from xceptile.runtime.benchmark import AFTER, BEFORE, DURING, Bench, bench, parse_duration_s, sustain
from xceptile.runtime.bundle import Bundle
from xceptile.runtime.devices.board import MachineState
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.evaluate_engines import peak_rss_bytes
from xceptile.runtime.session import LOCAL, Placement, parse_cores, pinned, processors

CORE = str(min(os.sched_getaffinity(0)))


@pytest.mark.parametrize(
    ("int8_ms", "expected"),
    [
        (1.0, "Faster, measured: native int8, in 0.500 [0.500, 0.500] of litert float32's time."),
        (3.0, "Faster, measured: litert float32; native int8 takes 1.500 [1.500, 1.500] of its time."),
    ],
)
def test_the_faster_build_is_named(int8_ms: float, expected: str) -> None:
    int8, slow = sampled(np.full(20, int8_ms), 10), sampled(np.full(20, 9.0), 10, "float32")
    base = replace(sampled(np.full(20, 2.0), 10, "float32"), engine="litert")
    seen = Bench((slow, int8, base), ())
    assert seen.faster is (int8 if int8_ms < 2 else base)
    assert faster_line(seen) == expected


def test_no_build_is_named_where_the_interval_holds_one() -> None:
    int8 = sampled(np.tile([1.0, 1.0, 3.0, 3.0], 5), 10)
    base = replace(sampled(np.full(20, 2.0), 10, "float32"), engine="litert")
    seen = Bench((int8, base), ())
    assert seen.faster is None
    assert faster_line(seen).startswith("Not decided: native int8 takes ")
    assert Bench((int8,), ()).faster is None  # no float build


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("30s", 30), ("10m", 600), ("1.5h", 5400), ("0.2 s", 0.2)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration_s(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "m", "-3s", "10x", "0s", "1e3", "nan"])
def test_durations_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration_s(text)


def test_cores() -> None:
    assert parse_cores("0,2,4-7") == {0, 2, 4, 5, 6, 7}
    for bad in ("", "a", "4-", "3-1", "64", "1,,2", "-1"):
        with pytest.raises(EngineError, match="processors"):
            parse_cores(bad)
    here, before = Placement(LOCAL, "measured"), os.sched_getaffinity(0)
    with pinned(here, CORE):
        assert os.sched_getaffinity(0) == {int(CORE)}
        assert processors(here) == 1
    assert os.sched_getaffinity(0) == before
    with pytest.raises(EngineError, match="cannot run on processors 63"), pinned(here, "63"):
        pass


def hot(at: int) -> MachineState:
    return MachineState({"cpu0": "schedutil"}, {"cpu0": 2_000_000 - at}, {"soc": 40.0 + at}, None, None, None)


def test_the_machine_is_watched_before_during_and_after(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(map(hot, range(1000)))
    monkeypatch.setattr(benches.board, "machine_state", lambda: next(states))
    monkeypatch.setattr(benches, "STATE_INTERVAL_S", 0.0)
    seen = bench(small_bundle, threads=1, cores=CORE, rounds=2, repeats=2, min_duration_s=0.0)
    whens = [moment.when for moment in seen.moments]
    assert (whens[0], whens[-1]) == (BEFORE, AFTER)
    assert set(whens[1:-1]) == {DURING}
    assert [moment.state.temperatures_c["soc"] for moment in seen.moments] == [40.0 + i for i in range(len(whens))]
    assert {(x.engine, x.dtype, len(x.samples_ms), x.turns) for x in seen.latencies} == {
        ("native", "int8", 4, 2),
        ("litert", "int8", 4, 2),
        ("litert", "float32", 4, 2),
    }
    assert seen.float_build is not None
    assert seen.of_float(seen.float_build) is None
    assert seen.of_float(seen.latencies[0]) is not None


def test_a_sustained_run_has_its_curve(small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    states = iter(map(hot, range(1000)))
    monkeypatch.setattr(benches.board, "machine_state", lambda: next(states))
    found = sustain(small_bundle, 0.5, threads=1)
    assert (found.engine, found.dtype, len(found.windows)) == ("native", "int8", benches.WINDOWS)
    assert all(window.samples_ms for window in found.windows)
    assert all(a.end_s <= b.start_s for a, b in zip(found.windows, found.windows[1:], strict=False))
    assert found.slowdown >= 1
    assert sustain(small_bundle, 0.1, engine="litert").engine == "litert"
    with pytest.raises(EngineError, match="no int8 artefact for engine abacus"):
        sustain(small_bundle, 0.1, engine="abacus")


def test_throttling_shows() -> None:
    state = hot(0)
    windows = tuple(benches.SustainedWindow(i, i + 1, (1.0 + i, 1.0 + i, 50.0), state) for i in range(3))
    found = benches.Sustained("native", "int8", LOCAL, "measured", 1, windows, ())
    assert found.slowdown == 3.0
    assert found.windows[2].percentile_ms(50) == 3.0  # the far-out sample is kept and does not move the median
    assert max(found.windows[2].samples_ms) == 50.0


def test_an_emulator_is_no_place_for_it(small_bundle: Bundle) -> None:
    for measure in (lambda: bench(small_bundle, device="qemu"), lambda: sustain(small_bundle, 1.0, device="qemu")):
        with pytest.raises(EngineError, match="on the device"):
            measure()


def test_the_memory_of_the_program(small_bundle: Bundle) -> None:
    found = peak_rss_bytes(small_bundle, threads=1)
    assert set(found) == {"native/int8"}
    assert 500_000 < (found["native/int8"] or 0) < 20_000_000
    assert peak_rss_bytes(small_bundle, device="qemu") == {}


def test_bench_prints_and_keeps_every_sample(small_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(small_bundle.path), "--duration", "0.001s", "--rounds", "3", "--repeats", "2"]
    assert cli._invoke(cli.app, arguments) == 0
    printed = capsys.readouterr().out
    assert "p99" in printed
    assert "before:" in printed or "shows no clocks" in printed
    assert printed.splitlines()[-1].startswith(("Faster, measured: ", "Not decided: "))
    assert cli._invoke(cli.app, [*arguments, "--cores", CORE, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert all(len(row["samples_ms"]) >= 6 and row["threads"] == 1 for row in data["latencies"])
    assert [moment["when"] for moment in data["moments"]][:: len(data["moments"]) - 1] == [BEFORE, AFTER]
    assert data["machine"]["architecture"]
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), "--sustained", "0.2s", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data["windows"]) == benches.WINDOWS
    assert data["slowdown"] >= 1
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), "--sustained", "0.2s"]) == 0
    assert "times the fastest" in capsys.readouterr().out
    assert cli._invoke(cli.app, ["bench", str(small_bundle.path), "--duration", "soon"]) == 2
    assert "no duration" in capsys.readouterr().err
