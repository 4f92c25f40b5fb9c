"""Tuning: measured task sizes change a plan's tasks and never its outputs; interruptions, crashes and bad files."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support import int8_graphs

from xceptile.compile import cli, tuning
from xceptile.compile import tune as tuner
from xceptile.compile.backends import cpu as backend
from xceptile.compile.backends import native_runtime
from xceptile.compile.tuning import Trial, Tuning, TuningError
from xceptile.models import graph as ir
from xceptile.models import serialize
from xceptile.models.locked import locked
from xceptile.runtime import reference
from xceptile.runtime.engines.native import NativeEngine
from xceptile.runtime.plan import unpack
from xceptile.runtime.user_cache import lock_for
from xceptile.targets import catalog

HOST = catalog.get("host")

# The real worker, except where a trial has a key that begins with KEY.
FAULTY = """
import json, os, pathlib, signal, sys, time
import numpy as np
from xceptile.compile import tune_worker
folder = pathlib.Path(sys.argv[1])
with (folder.parent / "LOG").open("a") as log:
    log.write("run\\n")
job = json.loads((folder / "job.json").read_text())
if any(key.startswith("KEY") for key in job["choices"]):
    ACTION
tune_worker.main(folder)
"""


def network() -> ir.Graph:
    build = int8_graphs.Int8Builder("small", 0)
    x = build.input(int8_graphs.photo(17, 15))
    x = build.conv(x, 16, (3, 3), (1, 1), relu=True)
    x = build.conv(build.depthwise(x), 24)
    return build.graph(build.fully_connected(build.average_pool(x), 5))


@pytest.fixture(scope="module")
def small() -> ir.Graph:
    return network()


@pytest.fixture(scope="module")
def images(small: ir.Graph) -> np.ndarray:
    return np.concatenate([int8_graphs.random_input(small, seed)[0] for seed in range(2)])


@pytest.fixture(scope="module")
def tuned(small: ir.Graph, images: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tuning, Path]:
    path = tmp_path_factory.mktemp("tuned") / "tuning.json"
    return tuner.tune(small, images, HOST, path, rounds=3, candidates=1, threads=1), path


def sizes(choices: dict[str, int]) -> dict[str, int]:
    return {call.size.key: call.size.value for call in backend.lower(network(), HOST, choices) if call.size}


def test_every_candidate_is_measured_and_read_back(tuned: tuple[Tuning, Path]) -> None:
    result, path = tuned
    assert result.model == sizes({})
    assert len(result.model) >= 2
    assert all(len(each) == 1 and not each[0].failure and each[0].time_ms for each in result.trials.values())
    assert set(result.trials) == set(result.model)
    assert result.latency_ratio is not None
    assert tuning.load(path) == result
    assert json.loads(path.read_text())["choices"] == result.choices
    assert not list(path.parent.glob(".*"))


def test_choices_change_the_tasks_and_not_the_outputs(
    small: ir.Graph, images: np.ndarray, tuned: tuple[Tuning, Path], tmp_path: Path
) -> None:
    choices = {key: max(1, value // 3) for key, value in tuned[0].model.items()}
    assert sizes(choices) == choices != sizes({})
    files = backend.build_files(small, HOST, choices) | native_runtime.build(HOST)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    modelled = [call.tasks for call in backend.lower(small, HOST)]
    assert [step.tasks for step in unpack(files["plan.bin"]).steps] != modelled
    with NativeEngine(tmp_path, 2) as engine:
        expected = np.concatenate([reference.run(small, x[np.newaxis])[0] for x in images])
        assert np.array_equal(engine.run(images), expected)


def test_arm_kernels_take_choices_too(small: ir.Graph) -> None:
    target = catalog.get("raspberry-pi-5")
    calls = [call for call in backend.lower(small, target) if call.size]
    choices = {call.size.key: call.size.total for call in calls if call.size}
    changed = [call for call in backend.lower(small, target, choices) if call.size]
    assert len(changed) == len(calls) >= 2
    assert all(call.tasks == 1 for call in changed)
    assert [call.tasks for call in calls] != [call.tasks for call in changed]


def test_a_choice_that_cannot_be_is_refused() -> None:
    key = next(iter(sizes({})))
    for value in (0, 10_000):
        with pytest.raises(ValueError, match="tune again"):
            sizes({key: value})


class Interrupted:
    """Raises KeyboardInterrupt at the second report of ``what``: after one trial."""

    def __init__(self) -> None:
        self.reports = 0

    def __call__(self, what: str, share: float) -> None:
        self.reports += what == "measure task sizes"
        if self.reports == 2:
            raise KeyboardInterrupt


def faulty(folder: Path, key: str, action: str) -> tuple[str, ...]:
    script = folder / "worker.py"
    text = FAULTY.replace('folder.parent / "LOG"', repr(folder / "log").replace("PosixPath", "pathlib.Path"))
    script.write_text(text.replace("KEY", key).replace("ACTION", action))
    return (sys.executable, str(script))


def test_an_interrupted_run_resumes_and_a_crash_is_skipped(small: ir.Graph, images: np.ndarray, tmp_path: Path) -> None:
    worker = faulty(tmp_path, "separable" if HOST.architecture == "x86_64" else "", "os.abort()")
    path, log = tmp_path / "tuning.json", tmp_path / "log"
    arguments = {"rounds": 1, "candidates": 1, "threads": 1, "worker": worker}
    with pytest.raises(KeyboardInterrupt):
        tuner.tune(small, images, HOST, path, progress=Interrupted(), **arguments)
    before = tuning.load(path)
    assert before.latency_ratio is None
    crashed = [trial for trials in before.trials.values() for trial in trials if trial.failure]
    assert len(crashed) == 1
    assert "signal 6" in crashed[0].failure
    assert sum(map(len, before.trials.values())) == len(before.model)  # the other one of the trial, alone, ran well
    runs = len(log.read_text().splitlines())
    after = tuner.tune(small, images, HOST, path, **arguments)
    assert after.trials == before.trials
    assert after.latency_ratio is not None
    # The cost model's network once more, and the winners where there are any: nothing was tried again.
    assert len(log.read_text().splitlines()) - runs <= 2
    failed = next(key for key, trials in after.trials.items() if trials[0].failure)
    assert after.choices[failed] == after.model[failed]


@pytest.mark.parametrize(
    ("action", "timeout_s", "reason"),
    [
        ('np.save(folder / "expected.npy", 1 - np.load(folder / "expected.npy"))', 600.0, "outputs differ"),
        ("time.sleep(600)", 0.5, "not done after 0.5 s"),
    ],
    ids=["wrong output", "hang"],
)
def test_what_hangs_or_is_wrong_does_not_count(
    action: str, timeout_s: float, reason: str, small: ir.Graph, images: np.ndarray, tmp_path: Path
) -> None:
    reference_outputs = np.concatenate([reference.run(small, x[np.newaxis])[0] for x in images])
    for name, values in (("input", images), ("expected", reference_outputs)):
        np.save(tmp_path / f"{name}.npy", values)
    serialize.save(small, tmp_path / "graph.safetensors")
    bench = tuner._Bench(tmp_path, HOST, 1, 1, 600.0, tuner.WORKER)
    assert not isinstance(bench.run({}), str)
    key, value = next(iter(sizes({}).items()))
    broken = replace(bench, timeout_s=timeout_s, worker=faulty(tmp_path, key, action))
    found = broken.run({key: value - 1})
    assert isinstance(found, str)
    assert reason in found


def test_candidates_are_other_numbers_of_tasks() -> None:
    found = tuner.task_sizes(67, 361, 6)
    assert 67 not in found
    assert len(set(found)) == len(found) >= 5
    assert all(1 <= size <= 361 and (size % 6 == 0 or size == 361) for size in found)
    assert tuner.task_sizes(1, 1, 6) == ()


def test_only_a_clear_gain_wins() -> None:
    trials = {"a": (Trial(3, 0.99, 1.0), Trial(2, failure="crashed")), "b": (Trial(8, 0.9, 1.0), Trial(9, 0.8, 1.0))}
    result = Tuning("x/y", (), 1, "measured", {"a": 4, "b": 7, "c": 1}, trials)
    assert result.choices == {"a": 4, "b": 9, "c": 1}
    assert replace(result, latency_ratio=0.9).choices == result.choices
    assert replace(result, latency_ratio=1.01).choices == result.model  # together no faster


def test_a_changed_cost_model_makes_old_trials_stale() -> None:
    trial = Trial(3, 1.0, 1.0)
    before = Tuning("x/y", (), 1, "measured", {"a": 4, "b": 7}, {"a": (trial,), "b": (trial,)})
    after = tuner._with_model(before, {"a": 5, "c": 1})
    assert after.model == {"a": 5, "b": 7, "c": 1}
    assert set(after.trials) == {"b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 1, the file says 2"),
        ({"model": {"a": 0}}, "no positive number"),
        ({"trials": {"a": [{"value": 1}]}}, "KeyError"),
        ({"trials": None}, "AttributeError"),
        ({"threads": "2"}, "no positive number"),
    ],
)
def test_a_bad_file_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    values = json.loads(tuning.to_json(Tuning(HOST.name, HOST.features, 1, "measured"))) | change
    path = tmp_path / "tuning.json"
    path.write_text(json.dumps(values))
    with pytest.raises(TuningError, match=message) as error:
        tuning.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    path.write_bytes(b"\xff{")
    with pytest.raises(TuningError, match=r"tuning\.json"):
        tuning.load(path)


def test_a_file_of_another_target_or_run_is_refused(small: ir.Graph, images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    tuning.save(Tuning("other/board", HOST.features, 1, "measured"), path)
    with pytest.raises(TuningError, match="other/board"):
        tuner.tune(small, images, HOST, path)
    tuning.save(Tuning(HOST.name, HOST.features, 7, "measured"), path)
    with pytest.raises(TuningError, match="7 threads, not 1"):
        tuner.tune(small, images, HOST, path, threads=1)


def test_two_do_not_measure_for_one_file(small: ir.Graph, images: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "tuning.json"
    with (
        locked(lock_for(str(path.resolve()))),
        pytest.raises(TuningError, match="is being measured by another run"),
    ):
        tuner.tune(small, images, HOST, path)
    assert not path.exists()


def test_an_emulator_is_no_device_to_tune_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "tuning.json"
    assert cli._invoke(cli.app, ["tune", "host", "--device", "qemu", "--output", str(output)]) == 2
    assert "an emulator's time says nothing" in " ".join(capsys.readouterr().err.split())
    assert not output.exists()


def test_a_gpu_has_no_task_sizes_and_that_is_said_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli._invoke(cli.app, ["tune", "jetson", "--output", str(tmp_path / "tuning.json")]) == 2
    assert "is a GPU" in " ".join(capsys.readouterr().err.split())


def test_the_command_line_refuses_a_tuning_of_another_target(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "tuning.json"
    tuning.save(Tuning("other/board", HOST.features, 1, "measured"), path)
    arguments = ["compile", "--target", "host", "--model", "xception", "--calibration", "drawn:calibration:1"]
    assert cli._invoke(cli.app, [*arguments, "--output", str(tmp_path / "b"), "--tuning", str(path)]) == 2
    assert "other/board" in capsys.readouterr().err
