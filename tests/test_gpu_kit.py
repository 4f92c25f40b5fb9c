"""The kit for a borrowed GPU, as far as it goes without one: it says so, sees wrong outputs, has our net in torch."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from int8_graphs import as_float, photo, random_xception
from needs import requires, requires_module
from test_cuda_driver import compile_fakes, emulation
from test_cuda_kernels import emulated

from xceptile.runtime import reference

sys.path.append(str(Path(__file__).parent / "benchmarks"))
import borrowed_gpu
import gpu_kit

pytestmark = [pytest.mark.slow, requires_module("nvidia.cuda_nvrtc", package="'xceptile[cuda]'")]


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "kit"
    gpu_kit.make(folder, size=75, width=0.125, batches=(2,), boards=("orin",))
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
    gpu_kit.pack(packed)
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
    monkeypatch.setenv("XCEPTILE_CUDA", "/no/such/library.so")
    assert "no CUDA driver" in borrowed_gpu.check(library, kit, entries[0])["error"]


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
        self, kit: Path, driver: dict[str, str], monkeypatch: pytest.MonkeyPatch, machine: dict[str, str]
    ) -> None:
        for name, value in (driver | machine).items():
            monkeypatch.setenv(name, value)
        report = borrowed_gpu.run(kit)
        assert [checked["equal"] for checked in report["checks"]] == [True] * 3
        form = "kernels.ptx" if machine else "kernels.cubin"
        assert all(checked["device"].endswith(f"{form}, one graph") for checked in report["checks"])
        assert torch.cuda.is_available() or "finds no CUDA GPU here" in report["error"]
        json.dumps(report)

    def test_layers(self, kit: Path, driver: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in driver.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("FAKE_KERNELS")  # the times are the fake's own
        library = borrowed_gpu.load_runtime(kit / f"libxceptile-{platform.machine()}.so")
        entry = json.loads((kit / "kit.json").read_text())["networks"][1]
        timed = borrowed_gpu.layers(library, kit, entry, {"gb_per_s": 1000.0})
        assert {row["median_us"] for row in timed["layers"]} == {1500.0}
        assert timed["all layers, without copies, ms"] == 1.5 * len(timed["layers"])
        assert all(0 < row["share_of_roof"] < 1 for row in timed["layers"])
        json.dumps(timed)


def test_torch_computes_the_same_network() -> None:
    real = as_float(random_xception(75, 0.125, 10, same_padding=False))
    pixels = photo(75, 75).astype(np.float32) + 128
    (expected,) = reference.run(real, pixels)
    network = borrowed_gpu.torch_network(*gpu_kit.describe_for_torch(real), "cpu")
    with torch.no_grad():
        got = network(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).half()).float().numpy()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()


def test_torch_has_no_more_than_its_time_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, mode: network)
    network, x = torch.nn.ReLU(), torch.zeros(1)
    borrowed_gpu.compiled(network, x, "reduce-overhead", lambda: None)()
    monkeypatch.setattr(borrowed_gpu, "COMPILING_S", 0.2)
    with pytest.raises(TimeoutError, match="not done in 0 s"):
        borrowed_gpu.compiled(network, x, "reduce-overhead", lambda: time.sleep(10))
