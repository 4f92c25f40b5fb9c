"""How many processors there are decides no byte of a network."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.needs import requires_hardware

from xceptile.compile.pipeline import one_blas_thread

PROCESSORS = sorted(os.sched_getaffinity(0))
# AVX-512's kernels happen to sum alike on one thread and on two, those of AVX2 do not; other processors have no choice.
KIND = {"OPENBLAS_CORETYPE": "Haswell"} if os.uname().machine == "x86_64" else {}

QUANTIZE = """
import os, sys
os.sched_setaffinity(0, map(int, sys.argv[2:]))
from xceptile.calibration.recipe import PRESETS
from xceptile.compile.pipeline import quantize_model
from xceptile.models import serialize, zoo
from xceptile.models.datasets import open_dataset
model, data = zoo.load("demo"), open_dataset("drawn:calibration:24")
images = [data.load(item, model.input_spec) for item in data.items]
made = quantize_model(model, images, PRESETS["fast"], image_count=len(images), progress=lambda *_: None)
open(sys.argv[1], "wb").write(serialize.dump(made.int8_graph))
"""


@pytest.mark.slow
@requires_hardware(len(PROCESSORS) > 1, "second processor")
def test_one_processor_and_two_quantize_alike(tmp_path: Path) -> None:
    """As `taskset -c 0 compile` and `taskset -c 0,1 compile` do, before the network is lowered."""
    made = []
    for count in (1, 2):
        file = tmp_path / f"{count}.safetensors"
        words = [sys.executable, "-c", QUANTIZE, str(file), *map(str, PROCESSORS[:count])]
        subprocess.run(words, check=True, env=os.environ | KIND, cwd=tmp_path)
        made.append(file.read_bytes())
    assert made[0] == made[1]


def test_the_one_thread_is_blas_and_only_meanwhile() -> None:
    from threadpoolctl import threadpool_info

    def threads() -> set[int]:
        return {each["num_threads"] for each in threadpool_info() if each["user_api"] == "blas"}

    before = threads()
    with one_blas_thread():
        assert threads() == {1}
    assert threads() == before
