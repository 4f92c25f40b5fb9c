"""Weights of Keras' Xception without a config: the real Keras' files, and what is assumed of them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from support.foreign_xceptions import images, keras_outputs, keras_xception
from support.needs import requires_module

from xceptile.models import zoo
from xceptile.models.keras_file import read_keras
from xceptile.models.keras_weights import load_weights
from xceptile.models.preprocess import keras_input_spec
from xceptile.models.weights import Checkpoint, CheckpointError
from xceptile.models.xception import Xception

pytestmark = [requires_module("keras", package="keras"), pytest.mark.filterwarnings("ignore")]
SIZE = 80  # its maps before the four poolings are odd, odd, even and odd
PHOTOS = images(2, SIZE)
TOLERANCE = 1e-4  # relative to the largest logit


def load(path: Path) -> Checkpoint:
    return load_weights(read_keras(path))


def distance(module: torch.nn.Module, truth: np.ndarray) -> float:
    """Relative to the largest logit; the logits must depend on the image for the comparison to mean anything."""
    assert np.abs(truth[0] - truth[1]).max() > 0.1 * np.abs(truth).max()
    with torch.no_grad():
        ours = module(torch.from_numpy(PHOTOS).permute(0, 3, 1, 2)).numpy()
    return float(np.abs(ours - truth).max() / np.abs(truth).max())


@pytest.fixture(scope="module")
def keras_model() -> Any:
    return keras_xception(10, SIZE)


@pytest.fixture(scope="module")
def saved(keras_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its weights as Keras 3 saves them."""
    path = tmp_path_factory.mktemp("keras") / "xception.weights.h5"
    keras_model.save_weights(path)
    return path


@pytest.fixture(scope="module")
def checkpoint(saved: Path) -> Checkpoint:
    return load(saved)


def assert_same(path: Path, checkpoint: Checkpoint) -> None:
    state = load(path).module.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in checkpoint.module.state_dict().items())


def test_weights_alone(keras_model: Any, checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    truth = keras_outputs(keras_model, PHOTOS)
    assert distance(checkpoint.module, truth) < TOLERANCE
    assert len(checkpoint.labels) == 10
    for fault in ({"same_padding": False}, {"epsilon": 1e-5}):  # either would be seen
        wrong = Xception(10, **fault).eval()
        wrong.load_state_dict(checkpoint.module.state_dict())
        assert distance(wrong, truth) > TOLERANCE
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(saved.read_bytes())
    os.truncate(damaged, damaged.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load(damaged)


def test_what_weights_do_not_say_is_told(checkpoint: Checkpoint, saved: Path) -> None:
    """Trained at 80 pixels, which the file does not hold: 299 is assumed, and said to be."""
    assert checkpoint.input_spec == keras_input_spec(299)
    assert checkpoint.input_spec.described()["size"] == "299x299 RGB (assumed; --input-size N gives another)"
    assert set(checkpoint.input_spec.origins.values()) == {"assumed"}
    model = zoo.load(saved, size=SIZE)
    assert "epsilon 1e-3, global average pooling" in model.provenance["assumed"]
    assert (model.input_spec.shape, model.input_spec.origins["size"]) == ((1, SIZE, SIZE, 3), "given")


def test_weights_by_name(keras_model: Any, checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The older format: names of layers and tensors, in ``save_weights`` of Keras 2."""
    from keras.src.legacy.saving.legacy_h5_format import save_weights_to_hdf5_group

    with h5py.File(tmp_path / "xception.h5", "w") as file:
        save_weights_to_hdf5_group(file, keras_model)
    assert_same(tmp_path / "xception.h5", checkpoint)


def test_weights_by_number(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    """Keras 2.13 to 3.0 number the layers of each class and name none; 2.12 leaves out every second number."""
    numbered, doubled = tmp_path / "numbered.weights.h5", tmp_path / "doubled.weights.h5"
    numbered.write_bytes(saved.read_bytes())
    with h5py.File(numbered, "a") as file:
        file.visititems(lambda name, item: item.attrs.pop("name", None) and None)
    assert_same(numbered, checkpoint)
    with h5py.File(numbered, "r") as source, h5py.File(doubled, "w") as target:
        for name, group in source["layers"].items():
            kind, _, number = name.rpartition("_")
            twice = f"{kind}_{2 * int(number)}" if number.isdecimal() else name
            source.copy(group, target, f"_layer_checkpoint_dependencies/{twice}")
    assert_same(doubled, checkpoint)


def test_transfer_learning_with_its_optimizer_and_metrics(checkpoint: Checkpoint, saved: Path, tmp_path: Path) -> None:
    """The base network within a model that was trained: the groups of Keras 2.13 and later, by real files."""
    path = tmp_path / "pets.weights.h5"
    with h5py.File(saved, "r") as source, h5py.File(path, "w") as target:
        for name, group in source["layers"].items():
            source.copy(group, target, f"layers/{'' if name == 'dense' else 'functional/layers/'}{name}")
        target["metrics/mean/vars/0"] = np.zeros((), np.float32)
        target["metrics/mean_metric_wrapper/vars/0"] = np.zeros((), np.float32)
        target["optimizer/vars/1"] = np.zeros((3, 3, 3, 32), np.float32)
    assert_same(path, checkpoint)


def test_networks_that_are_not_xception(tmp_path: Path) -> None:
    import keras

    headless = tmp_path / "headless.weights.h5"
    keras.applications.Xception(weights=None, include_top=False, input_shape=(71, 71, 3)).save_weights(headless)
    with pytest.raises(CheckpointError, match="0 dense layers where one classifier is needed; save the whole model"):
        load(headless)
    other = tmp_path / "other.weights.h5"
    keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3)).save_weights(other)
    with pytest.raises(CheckpointError, match=r"other\.weights\.h5: "):
        load(other)


def test_a_layer_that_xception_has_not_is_refused(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.weights.h5"
    path.write_bytes(saved.read_bytes())
    with h5py.File(path, "a") as file:
        file["layers/dense_9/vars/0"] = np.zeros((10, 3), np.float32)
        file["layers/dense_9/vars"].attrs["name"] = "head"
    with pytest.raises(CheckpointError, match=r"also holds layer head; save the whole model \(model.save\)"):
        load(path)
