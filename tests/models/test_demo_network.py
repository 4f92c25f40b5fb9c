"""The committed trained network: small, the whole topology, and as accurate as its model card says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from xceptile.models import drawn
from xceptile.models.preprocess import normalize
from xceptile.models.weights import Checkpoint, load_checkpoint
from xceptile.models.xception import Xception
from xceptile.models.zoo import DEMO

IMAGES = 240  # ten of each class


@pytest.fixture(scope="module")
def demo() -> Checkpoint:
    return load_checkpoint(DEMO)


def stated_top1(demo: Checkpoint) -> float:
    return float(demo.provenance["val_top1"].split()[0])


def top1(module: Xception, size: int) -> float:
    images = [drawn.draw("val", index, size) for index in range(IMAGES)]
    hits = 0
    with torch.inference_mode():
        for start in range(0, IMAGES, 24):
            pixels = np.stack([image for image, _ in images[start : start + 24]])
            labels = np.array([label for _, label in images[start : start + 24]])
            x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
            hits += int((module(x).argmax(1).numpy() == labels).sum())
    return hits / IMAGES


def test_the_checkpoint_is_at_most_16_mb() -> None:
    assert DEMO.stat().st_size <= 16_000_000


def test_it_has_every_layer_of_the_paper(demo: Checkpoint) -> None:
    with torch.device("meta"):
        assert demo.module.state_dict().keys() == Xception().state_dict().keys()


def test_it_knows_the_drawn_classes(demo: Checkpoint) -> None:
    assert demo.labels == drawn.LABELS


def test_its_input_spec_is_the_normalization_it_was_trained_with(demo: Checkpoint) -> None:
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
    assert np.allclose(normalize(pixels, demo.input_spec), pixels / np.float32(127.5) - 1, atol=1e-6)


def test_it_is_as_accurate_as_stated(demo: Checkpoint) -> None:
    # Six points: three standard errors of a share of 0.9 seen on 240 images.
    assert abs(top1(demo.module, demo.input_spec.height) - stated_top1(demo)) < 0.06


def test_an_untrained_network_would_be_noticed(demo: Checkpoint) -> None:
    torch.manual_seed(0)
    untrained = Xception(len(drawn.LABELS), width=0.25).eval()
    assert abs(top1(untrained, demo.input_spec.height) - stated_top1(demo)) > 0.5


def test_damage_from_quantization_would_show(demo: Checkpoint) -> None:
    assert 0.80 <= stated_top1(demo) <= 0.95


def test_the_card_and_the_log_say_what_the_checkpoint_says(demo: Checkpoint) -> None:
    log = [json.loads(line) for line in Path(DEMO).with_name("training_log.jsonl").read_text().splitlines()]
    assert log[-1]["val_top1"] == pytest.approx(stated_top1(demo))
    assert f"{stated_top1(demo):.2%}" in Path(DEMO).with_name("MODEL_CARD.md").read_text()
