"""The kit for a borrowed GPU, as far as it goes without one: it says so, sees wrong outputs, has our net in torch."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks import make_gpu_kit
from support.cuda_emulator import compile_fakes, emulated, emulation
from support.int8_graphs import as_float, photo, random_xception
from support.needs import requires, requires_module

from xceptile.compile.gpu_kit import borrowed_gpu
from xceptile.compile.gpu_kit.borrowed_gpu import Part
from xceptile.compile.gpu_kit.make_kit import pack
from xceptile.compile.gpu_kit.torch_words import describe_for_torch
from xceptile.runtime import reference

pytestmark = [pytest.mark.slow, requires_module("nvidia.cuda_nvrtc", package="'xceptile[cuda]'")]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    make_gpu_kit.make(folder, size=75, width=0.125, batches=(2,), boards=("orin",))
    return folder


def test_without_a_gpu_one_line_says_so(kit: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(kit / "borrowed_gpu.py")],
        capture_output=True, text=True, check=False, env={**os.environ, "XCEPTILE_CUDA": "/no/such/library.so"},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no CUDA driver: /no/such/library.so: ")
    assert done.stderr.count("\n") == 1


def test_no_kit(tmp_path: Path) -> None:
    with pytest.raises(borrowed_gpu.Unusable, match=r"is no kit: it has no kit\.json"), borrowed_gpu.unpacked(tmp_path):
        pass


def test_a_packed_kit_is_the_kit(kit: Path, tmp_path: Path) -> None:
    packed = shutil.copytree(kit, tmp_path / "packed")
    pack(packed)
    assert not [each for each in packed.iterdir() if each.is_dir()]
    with borrowed_gpu.unpacked(packed) as folder:
        files = sorted(file.relative_to(kit) for file in kit.glob("**/*") if file.is_file())
        assert [(folder / file).read_bytes() for file in files] == [(kit / file).read_bytes() for file in files]
    assert not folder.exists()


@requires("clang", package="clang")
def test_wrong_outputs_are_seen(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake driver computes nothing: every tensor that is not zero differs. A missing driver is reported too."""
    compile_fakes(tmp_path, ("driver",), "clang")
    library = borrowed_gpu.load_runtime(kit / f"libxceptile-{platform.machine()}.so")
    entries = json.loads((kit / "kit.json").read_text())["networks"]
    assert [entry["name"] for entry in entries] == ["operators-orin", "int8-batch2", "float16"]
    monkeypatch.setenv("XCEPTILE_CUDA", str(tmp_path / "driver.so"))
    for entry in entries:
        checked = borrowed_gpu.check(library, kit, entry)
        assert checked["device"].startswith("Fake GPU")
        assert "kernels.cubin" in checked["device"]
        assert (checked["equal"], "error" in checked) == (False, False)
        assert len(checked["different"]) > 0.9 * len(entry["outputs"])
        assert all(re.search(r"the first is \d+: 0(\.0)?, expected ", said) for said in checked["different"].values())
    monkeypatch.setenv("XCEPTILE_CUDA", "/no/such/library.so")
    assert "no CUDA driver" in borrowed_gpu.check(library, kit, entries[0])["error"]


def test_the_first_difference() -> None:
    a = np.arange(20, dtype=np.int8)
    b = a.copy()
    b[[7, 11]] += np.array([1, -3], np.int8)
    said = "2 of 20 values, by at most 3; the first is 7: 8, expected 7; the last 11"
    assert (borrowed_gpu.difference(b, a, 0.05), borrowed_gpu.difference(a, a, 0.05)) == (said, "")
    x = np.array([10, -3, 2], np.float32)
    off = "0.1 of the largest logit; the first is 2: 3.0, expected 2.0"
    assert borrowed_gpu.difference(x + np.array([0.4, 0, 1], np.float32), x, 0.05) == off
    assert borrowed_gpu.difference(x * np.float32(np.nan), x, 0.05).startswith("nan of")


def script(monkeypatch: pytest.MonkeyPatch, file: Path, text: str) -> None:
    """Every part is this script from now on."""
    file.write_text(text)
    monkeypatch.setattr(borrowed_gpu, "__file__", str(file))


def test_a_part_that_crashes_or_hangs_costs_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"how": "rehearsed", "part": "roof"}
    script(monkeypatch, tmp_path / "part.py", "import os, sys; print('seen', file=sys.stderr, flush=True); os.abort()")
    crashed = {**line, "error": "ended by SIGABRT", "stderr": "seen\n"}
    assert borrowed_gpu.start_part(tmp_path, ("roof",), 20) == crashed
    script(monkeypatch, tmp_path / "part.py", "raise SystemExit(3)")
    assert borrowed_gpu.start_part(tmp_path, ("roof",), 20) == {**line, "error": "ended with status 3"}
    alive = tmp_path / "alive"
    sleeper = f"import subprocess; subprocess.run(['sh', '-c', 'sleep 3; touch {alive}'])"
    script(monkeypatch, tmp_path / "part.py", sleeper)
    assert borrowed_gpu.start_part(tmp_path, ("roof",), 0.5) == {**line, "error": "not done in 0 s"}
    script(monkeypatch, tmp_path / "part.py", 'print(\'{"part": "roof", "found": 1}\')')
    assert borrowed_gpu.start_part(tmp_path, ("roof",), 20) == {"part": "roof", "found": 1}
    time.sleep(3)
    assert not alive.exists(), "what a part started ends with it"


def test_the_plan_leaves_out_what_there_is_no_time_for(kit: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[float] = []

    def start_part(kit: Path, words: tuple[str, ...], limit_s: float) -> dict[str, object]:
        limits.append(limit_s)
        return {"part": " ".join(words), "equal": words != ("check", "int8-batch2")}

    monkeypatch.setattr(borrowed_gpu, "start_part", start_part)
    parts = [line["part"] for line in borrowed_gpu.run(kit, time.monotonic() + 100)]
    assert parts == [
        *("machine", "check operators-orin", "check int8-batch2", "walk int8-batch2", "check float16"),
        *("ours 2", "layers 2", "roof", "torch 2 graphs", "torch 2 reduce-overhead", "torch 2 max-autotune"),
    ]
    assert max(limits) <= 100
    lines = list(borrowed_gpu.run(kit, time.monotonic()))[1:]
    assert {line["error"] for line in lines} == {"left out: no time is left for it"}


def test_the_summary() -> None:
    graphs = {borrowed_gpu.GRAPH: 0.4, borrowed_gpu.COPYING: 0.3}
    lines = [
        {"part": "check a", "equal": True},
        {"part": "torch 8 graphs", "ours with copies, of theirs": graphs},
        {"part": "torch 8 reduce-overhead", "ours with copies, of theirs": {"compiled": 0.45}},
        {"part": "torch 8 max-autotune", "error": "not done in 9 s"},
    ]
    found = borrowed_gpu.summary(lines)
    assert (found["equal"], found["failed"]) == (True, ["torch 8 max-autotune"])
    assert found["batch 8"] == {
        "ours with copies, of torch's best without": 0.45,
        "best": "compiled",
        "ours with copies, of torch's CUDA graph with copies": 0.3,
    }
    assert not borrowed_gpu.summary([*lines, {"part": "check b", "error": "ended by SIGSEGV"}])["equal"]


def test_share_of_the_peak() -> None:
    seen = {"major": 9, "minor": 0, "multiprocessors": 132, "clock_khz": 1980000}
    peak = borrowed_gpu.peaks(seen | {"memory_clock_khz": 3201000, "memory_bus_bits": 6144})
    assert peak == {"int8_macs_per_s": pytest.approx(1.0705e15, rel=1e-3), "bytes_per_s": pytest.approx(4.917e12, 1e-3)}
    half = {"bound": "int8", "share_of_peak": 0.5}
    assert borrowed_gpu.share(10, 1, 2.0, {"int8_macs_per_s": 10.0, "bytes_per_s": 10.0}) == half
    assert borrowed_gpu.share(10, 1, 2.0, {}) == borrowed_gpu.share(10, 1, 0.0, peak) == {}


rehearsed = [requires("clang", package="clang"), *emulated]


@pytest.fixture(scope="module")
def driver(kit: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return emulation(tmp_path_factory.mktemp("driver"), *sorted(kit.glob("*/kernels.cu")))


class TestRehearsed:
    """The whole script on a driver whose kernels run on the processor."""

    pytestmark = rehearsed

    @pytest.mark.parametrize(
        "machine",
        [{}, {"FAKE_CAPABILITY": "90", "FAKE_INTEGRATED": "1", "FAKE_SEED": "7"}],
        ids=["board, copies", "newer GPU, shared memory"],
    )
    def test_every_network_equals_the_reference(
        self, kit: Path, driver: dict[str, str], machine: dict[str, str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (driver | machine).items():
            monkeypatch.setenv(name, value)
        parts = borrowed_gpu.plan(json.loads((kit / "kit.json").read_text())["networks"])
        checks = [part for part in parts if part.words[0] in ("check", "roof")]
        monkeypatch.setattr(borrowed_gpu, "plan", lambda _: checks)
        lines = list(borrowed_gpu.run(kit, time.monotonic() + 600))
        assert [line.get("equal") for line in lines] == [None, True, True, True, None], lines
        assert {line["how"] for line in lines} == {"rehearsed"}
        form = "kernels.ptx" if machine else "kernels.cubin"
        assert all(line["device"].endswith(f"{form}, one graph") for line in lines[1:-1])
        assert torch.cuda.is_available() or "finds no CUDA GPU here" in lines[-1]["error"]

    def test_times(self, kit: Path, driver: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        """Of a fake that computes nothing, so that a wrong network is walked through, too."""
        for name, value in driver.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("FAKE_KERNELS")
        parts = [Part(words, 1, 60) for words in (("check", "int8-batch2"), ("ours", "2"), ("layers", "2"))]
        monkeypatch.setattr(borrowed_gpu, "plan", lambda _: parts)
        _, checked, walked, ours, layers = borrowed_gpu.run(kit, time.monotonic() + 600)
        assert checked["equal"] is False
        assert walked["compared"] > 0.9 * walked["steps"]
        assert walked["wrong"][0]["step"] == 1, "of the first there is no tensor in the graph: it gathers patches"
        assert ours["times"]["xceptile int8"]["median_ms"] > 0
        assert {row["median_us"] for row in layers["layers"]} == {1500.0}
        assert layers["all layers, without copies, ms"] == 1.5 * len(layers["layers"])

    def test_a_walk_finds_the_step(
        self, kit: Path, driver: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """That has a wrong weight, or that fails: of a network that is right before it."""
        for name, value in driver.items():
            monkeypatch.setenv(name, value)
        broken = shutil.copytree(kit / "int8-batch2", tmp_path / "int8-batch2")
        (tmp_path / "kit.json").write_text((kit / "kit.json").read_text())

        def walked() -> dict[str, Any]:
            return borrowed_gpu.start_part(tmp_path, ("walk", "int8-batch2"), 60)

        assert (walked()["wrong"], "failed" in walked()) == ([], False)
        described = json.loads((broken / "steps.json").read_text())
        index = next(i for i, step in enumerate(described["steps"]) if i > 6 and "gemm" in step["kernel"])
        step = described["steps"][index]
        weights = bytearray((broken / "weights.bin").read_bytes())
        place = next(offset for space, offset in step["arguments"] if space == "weights")
        weights[place : place + 64] = bytes(64)
        (broken / "weights.bin").write_bytes(weights)
        assert (walked()["wrong"][0]["step"], walked()["wrong"][0]["kernel"]) == (index, step["kernel"])
        step["group_size"][0] *= 2
        (broken / "steps.json").write_text(json.dumps(described))
        found = walked()["failed"]
        assert (found["step"], found["kernel"]) == (index, step["kernel"])
        assert found["error"] == "cuLaunchKernel: CUDA_ERROR_INVALID_VALUE (1)"
        (broken / "kernels.cubin").write_bytes(b"rubbish")
        (broken / "kernels.ptx").write_bytes(b"rubbish")
        refused = r"kernels.ptx: cuModuleLoadDataEx: CUDA_ERROR_INVALID_PTX \(218\) ptxas fake: what is this"
        assert re.search(refused, walked()["error"])


def test_torch_computes_the_same_network() -> None:
    real = as_float(random_xception(75, 0.125, 10, same_padding=False))
    pixels = photo(75, 75).astype(np.float32) + 128
    (expected,) = reference.run(real, pixels)
    network = borrowed_gpu.torch_network(*describe_for_torch(real), "cpu")
    with torch.no_grad():
        got = network(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).half()).float().numpy()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_torch_compiles_it_whole() -> None:
    described, weights = describe_for_torch(as_float(random_xception(75, 0.125, 10, same_padding=False)))
    network = borrowed_gpu.torch_network(described, weights, "cpu")
    x = torch.zeros(1, 3, 75, 75, dtype=torch.float16)
    with torch.no_grad():
        assert torch.equal(torch.compile(network, backend="eager", fullgraph=True)(x), network(x))
