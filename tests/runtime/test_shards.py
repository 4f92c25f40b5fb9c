"""verify over large sets: any number of workers, any interruption, the same figures."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.small_bundle import litert_bundle

from xceptile.models.datasets import open_dataset
from xceptile.runtime import shards
from xceptile.runtime.accuracy import Labelled, result_from_json, result_to_json
from xceptile.runtime.bundle import Bundle, BundleError, write_bundle
from xceptile.runtime.engines.engine import EngineError
from xceptile.runtime.evaluate_engines import contenders, evaluate
from xceptile.runtime.shards import SHARD, Job, ResultsError, verify_shards

COUNT = 2 * SHARD + 7
DATA = f"drawn:val:{COUNT}"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return litert_bundle(tmp_path_factory.mktemp("shards") / "bundle")


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Shards run in this process; the list says which."""
    ran: list[int] = []

    def run(job: Job, starts: list[int], workers: int) -> object:
        for start in starts:
            ran.append(start)
            yield shards.run_shard(job, start)

    monkeypatch.setattr(shards, "_in_processes", run)
    return ran


def job(bundle: Bundle, **changes: object) -> Job:
    whole = {"bundle": str(bundle.path), "bundle_sha256": bundle.sha256(), "data": DATA}
    return Job(**whole | {"engines": ("litert", "reference")} | changes)


def test_the_figures_are_those_of_one_pass(bundle: Bundle, here: list[int]) -> None:
    dataset = open_dataset(DATA, labels=bundle.manifest.labels)
    spec = bundle.manifest.input_spec
    items = [Labelled(item.name, item.label, dataset.load(item, spec)) for item in dataset.items]
    whole = evaluate(contenders(bundle, engines=("litert", "reference")), items)
    assert verify_shards(job(bundle)) == whole
    assert here == [0, SHARD, 2 * SHARD]
    litert, reference = whole[0]
    assert litert.bit_exact
    assert (litert.images, litert.labelled, len(litert.correct)) == (COUNT, COUNT, COUNT)
    assert (litert.flips, litert.sqnr_db) == (reference.flips, reference.sqnr_db)
    assert litert.agreeing == COUNT - len(litert.flips)


def test_results_survive_being_written(bundle: Bundle) -> None:
    results = shards.run_shard(job(bundle), 2 * SHARD)
    assert len(results) == 7
    assert [result_from_json(json.loads(json.dumps(result_to_json(r)))) for r in results] == results


def test_an_interrupted_run_is_taken_up(bundle: Bundle, here: list[int], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    whole = verify_shards(job(bundle), results=file)
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + COUNT
    # Killed while the second shard's lines were written: one whole shard, part of another, and a torn line.
    file.write_text("".join(lines[: 1 + SHARD + 3]) + lines[SHARD + 5][:40])
    here.clear()
    assert verify_shards(job(bundle), results=file) == whole
    assert here == [SHARD, 2 * SHARD]
    here.clear()
    assert verify_shards(job(bundle), results=file) == whole
    assert here == []


def test_a_file_of_something_else_is_refused(bundle: Bundle, here: list[int], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    small = f"drawn:val:{SHARD}"
    verify_shards(job(bundle, data=small), results=file)
    with pytest.raises(ResultsError, match="begun with another data, images"):
        verify_shards(job(bundle, data="drawn:val:5"), results=file)
    with pytest.raises(ResultsError, match="begun with another engines"):
        verify_shards(job(bundle, data=small, engines=("reference",)), results=file)
    file.write_text("not one\n")
    with pytest.raises(ResultsError, match="damaged"):
        verify_shards(job(bundle, data=small), results=file)


def test_a_process_opens_the_bundle_that_was_checked_or_none(bundle: Bundle, tmp_path: Path) -> None:
    """The key was looked at once, by the process that shares out the work."""
    copy = tmp_path / "bundle"
    shutil.copytree(bundle.path, copy)
    there = dataclasses.replace(job(bundle), bundle=str(copy), data="drawn:val:2")
    assert len(shards.run_shard(there, 0)) == 2
    shards._opened.cache_clear()
    (copy / "native").mkdir()
    (copy / "native/kernels.so").write_bytes(b"code that nobody signed")
    shards.run_shard(there, 0)
    shards._opened.cache_clear()
    with pytest.raises(BundleError, match="not signed, 'native/kernels"):
        shards.run_shard(dataclasses.replace(there, signed=True), 0)
    shutil.rmtree(copy / "native")
    shards.run_shard(dataclasses.replace(there, signed=True), 0)
    shards._opened.cache_clear()
    files = {name: copy.joinpath(name).read_bytes() for name in bundle.manifest.files}
    write_bundle(copy, dataclasses.replace(bundle.manifest, network="another"), files)
    for signed, reason in ((True, "not the bundle whose signature was checked"), (False, "was exchanged while")):
        with pytest.raises(BundleError, match=reason):
            shards.run_shard(dataclasses.replace(there, signed=signed), 0)


def test_two_runs_do_not_write_one_file(bundle: Bundle, here: list[int], tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    small = job(bundle, data="drawn:val:5")
    with shards._kept(file, {"format": 0}), pytest.raises(ResultsError, match="being written by another run"):
        verify_shards(small, results=file)
    file.write_text("")  # as a run leaves it that was killed at once
    whole = verify_shards(small, results=file)
    assert verify_shards(small, results=file) == whole


def test_files_are_known_by_their_contents(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("a", "b"):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png")
    dataset = open_dataset(tmp_path)
    before = shards.items_sha256(dataset, dataset.items)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    assert shards.items_sha256(dataset, dataset.items) != before


def test_an_address_without_ray_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(EngineError, match=f"'{address}' .*timed out"):  # it says nothing
            shards._check_ray_answers(address, timeout_s=0.2)
        answering = threading.Thread(target=lambda: server.accept()[0].sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n"))
        server.accept()
        answering.start()
        with pytest.raises(EngineError, match=f"'ray://{address}' is no Ray cluster"):
            shards._check_ray_answers(f"ray://{address}")
        answering.join()
    for dead in (address, "no-port", "127.0.0.1:x", "[::1", ""):
        with pytest.raises(EngineError, match=f"no Ray cluster answers at {re.escape(repr(dead))} "):
            shards._check_ray_answers(dead)
    shards._check_ray_answers("local")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_processes(bundle: Bundle, workers: int) -> None:
    dataset = open_dataset(DATA, labels=bundle.manifest.labels)
    spec = bundle.manifest.input_spec
    items = [Labelled(item.name, item.label, dataset.load(item, spec)) for item in dataset.items]
    assert verify_shards(job(bundle), workers=workers) == evaluate(
        contenders(bundle, engines=("litert", "reference")), items
    )


@pytest.mark.slow
def test_a_killed_run_is_taken_up(bundle: Bundle, tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    data = "drawn:val:192"
    command = [sys.executable, "-m", "xceptile.compile.cli", "verify", str(bundle.path), "--data", data]
    command += ["--engine", "litert", "--results", str(file), "--json"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    while not file.exists() or len(file.read_bytes().splitlines()) < 1 + SHARD:
        assert killed.poll() is None
        time.sleep(0.02)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert len(file.read_bytes().splitlines()) < 1 + 192
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    file.unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == json.loads(again.stdout)


@pytest.mark.slow
def test_a_ray_cluster_gives_the_same_figures(bundle: Bundle, here: list[int]) -> None:
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    whole = verify_shards(job(bundle))
    here.clear()
    assert verify_shards(job(bundle), ray_address="local") == whole
    ray.init(address="local", include_dashboard=False, num_cpus=1)
    try:
        shards._check_ray_answers(ray.get_runtime_context().gcs_address)
    finally:
        ray.shutdown()
    assert here == []
