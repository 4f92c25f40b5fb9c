"""Where each fact of a network's preprocessing comes from, and images of one channel."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from xceptile.models import drawn, zoo
from xceptile.models.datasets import open_dataset
from xceptile.models.preprocess import FACTS, InputSpec, grey, keras_input_spec, load_image, normalize
from xceptile.models.weights import load_checkpoint, save_checkpoint
from xceptile.models.xception import Xception

GREY = InputSpec(24, 16, mean=(0.5,), std=(0.5,))


def test_origins_are_said_kept_and_do_not_make_specs_differ() -> None:
    spec = keras_input_spec(96).with_origin("file", "size")
    assert spec == InputSpec(96, 96)
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))).origins == spec.origins
    assert spec.described() == {
        "size": "96x96 RGB (from the file)",
        "mean": "0.5 (assumed)",
        "std": "0.5 (assumed)",
        "resize": "the whole image to that size (assumed)",
        "interpolation": "bilinear (assumed)",
    }
    assert InputSpec(3, 2, mean=(0.1, 0.2, 0.3)).described()["mean"] == "0.1, 0.2, 0.3"  # nothing known, nothing said
    for origins in ({"crop": "file"}, {"size": "guessed"}):
        with pytest.raises(ValueError, match="origins say file, given, assumed of size"):
            replace(spec, origins=origins)


def test_a_loader_says_what_it_assumed(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, preprocessing = tmp_path / "own.safetensors", tmp_path / "own.json"
    save_checkpoint(
        Xception(3, width=0.1), own, input_spec=InputSpec(96, 96), labels=("a", "b", "c"), provenance={"data": "drawn"}
    )
    model = zoo.load(own)
    assert model.input_spec.origins == dict.fromkeys(FACTS, "file")
    assert zoo.load(own, size=120).input_spec.origins["size"] == "given"
    preprocessing.write_text('{"mean": [0.4, 0.4, 0.4], "interpolation": "bicubic"}')
    given = zoo.with_preprocessing(model, preprocessing).input_spec.origins
    assert given == {**dict.fromkeys(FACTS, "file"), "mean": "given", "interpolation": "given"}
    exported = tmp_path / "net.pt2"
    program = torch.export.export(Xception(3, width=0.1).eval(), (torch.zeros(1, 3, 96, 96),))
    torch.export.save(program, exported)
    assert zoo.load(exported).input_spec.origins == {**dict.fromkeys(FACTS, "assumed"), "size": "file"}


def test_a_checkpoint_saved_again_keeps_what_was_assumed(tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    spec = keras_input_spec(96)
    save_checkpoint(Xception(2, width=0.1), path, input_spec=spec, labels=("a", "b"), provenance={})
    assert load_checkpoint(path).input_spec.origins == spec.origins


def test_grey_networks_get_grey_images(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    with Image.open(path) as image:
        expected = np.asarray(image.convert("L").resize((16, 24), Image.Resampling.BILINEAR))
        assert np.array_equal(grey(pixels)[..., 0], np.asarray(image.convert("L")))
    loaded = load_image(path, GREY)
    assert np.array_equal(loaded, expected[..., None])
    assert np.allclose(normalize(loaded, GREY), loaded / 127.5 - 1, atol=1e-6)
    assert GREY.shape == (1, 24, 16, 1)
    square = replace(GREY, height=64, width=64)
    dataset = open_dataset("drawn:val:1")
    assert np.array_equal(dataset.load(dataset.items[0], square), grey(drawn.draw("val", 0, 64)[0]))


def test_figures_of_other_channels_are_refused(tmp_path: Path) -> None:
    for mean, std, message in (
        ((0.5, 0.5), (0.5, 0.5), "three finite numbers each, or one"),
        ((0.5,), (0.5, 0.5, 0.5), "of the same channels"),
    ):
        with pytest.raises(ValueError, match=message):
            InputSpec(3, 3, mean=mean, std=std)
    file = tmp_path / "own.json"
    file.write_text('{"mean": [0.5], "std": [0.5]}')
    with pytest.raises(zoo.ModelError, match="takes images of 3 channels, not 1"):
        zoo.with_preprocessing(zoo.load("demo"), file)
