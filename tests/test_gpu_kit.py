"""The kit for a borrowed GPU, as far as it goes without one: it says so, sees wrong outputs, has our net in torch."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from int8_graphs import as_float, photo, random_xception
from needs import requires, requires_module
from test_cuda_driver import compile_fakes

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
    if torch.cuda.is_available():
        pytest.skip("this machine has no lack of GPUs")
    done = subprocess.run([sys.executable, str(kit / "borrowed_gpu.py")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: torch finds no CUDA GPU here")
    assert done.stderr.count("\n") == 1


def test_no_kit(tmp_path: Path) -> None:
    with pytest.raises(borrowed_gpu.Unusable, match=r"is no kit: it has no kit\.json"):
        borrowed_gpu.run(tmp_path)


@requires("clang", package="clang")
def test_wrong_outputs_are_seen(kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake driver computes nothing: every tensor that is not zero differs. A missing driver is reported too."""
    compile_fakes(tmp_path, ("driver",), "clang")
    library = borrowed_gpu.load_runtime(kit / f"libxceptile-{platform.machine()}.so")
    entries = json.loads((kit / "kit.json").read_text())["networks"]
    assert [entry["name"] for entry in entries] == ["operators-orin", "int8-batch2", "float16-batch2"]
    monkeypatch.setenv("XCEPTILE_CUDA", str(tmp_path / "driver.so"))
    for entry in entries:
        checked = borrowed_gpu.check(library, kit, entry)
        assert checked["device"].startswith("Fake GPU")
        assert "kernels.ptx" in checked["device"]
        assert (checked["equal"], "error" in checked) == (False, False)
        assert len(checked["different"]) > 0.9 * len(entry["outputs"])
    monkeypatch.setenv("XCEPTILE_CUDA", "/no/such/library.so")
    assert "no CUDA driver" in borrowed_gpu.check(library, kit, entries[0])["error"]


def test_torch_computes_the_same_network(kit: Path) -> None:
    real = as_float(random_xception(75, 0.125, 10, same_padding=False))
    pixels = photo(75, 75).astype(np.float32) + 128
    (expected,) = reference.run(real, pixels)
    forward = borrowed_gpu.torch_network(kit, "cpu")
    got = forward(torch.from_numpy(pixels.transpose(0, 3, 1, 2)).half()).float().numpy()
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max()
