"""Training as a user runs it: a small run, stopped and resumed, and the shape of the learning rate."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from xceptile.models import zoo
from xceptile.models.drawn import LABELS, draw
from xceptile.models.preprocess import InputSpec
from xceptile.models.train import LOG, Recipe, batches, learning_rate


def run(folder: Path, epochs: int) -> list[dict[str, float]]:
    """The log after a run of tiny epochs; in a process of its own, because training forks."""
    command = [sys.executable, "-m", "xceptile.models.train", "--output", str(folder), "--processes", "2"]
    options = f"--epochs {epochs} --images 16 --val-images 8 --batch 8 --size 71 --width 0.125".split()
    subprocess.run(command + options, check=True, cwd=folder.parent, capture_output=True)
    return [json.loads(line) for line in (folder / LOG).read_text().splitlines()]


def test_a_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = run(tmp_path / "out", 1)
    both = run(tmp_path / "out", 2)
    assert [entry["epoch"] for entry in both] == [1, 2]
    assert both[:1] == first
    model = zoo.load(tmp_path / "out" / "xception.safetensors")
    assert (model.labels, model.input_spec) == (LABELS, InputSpec(71, 71))


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    recipe = Recipe(learning_rate=1.0, warmup_steps=10, decay=0.5)
    rates = [learning_rate(step, 100, recipe) for step in (0, 9, 50, 75, 100)]
    assert rates == pytest.approx([0.1, 1.0, 1.0, 0.5, 0.0])


def test_the_processes_parts_make_the_batches_and_turn_a_quarter_each() -> None:
    images = np.stack([draw("train", index, 16)[0] for index in range(8)])
    parts = [list(batches(images, np.arange(8), 8, np.random.default_rng(0), slice(rank, None, 2))) for rank in (0, 1)]
    assert sorted(int(label) for ((_, labels),) in parts for label in labels) == list(range(8))
    for ((x, labels),) in parts:
        for turns, (pixels, label) in enumerate(zip(x, labels, strict=True)):
            expected = np.rot90(images[label], turns) / np.float32(127.5) - 1
            assert np.allclose(pixels.permute(1, 2, 0), expected, atol=1e-6)
