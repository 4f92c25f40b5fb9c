"""Checkpoints: ours, and those of the real timm, saved by their own savers; and files that are none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.foreign_xceptions import images

from xceptile.models import weights, zoo
from xceptile.models.exported_program import ProgramError
from xceptile.models.preprocess import InputSpec
from xceptile.models.weights import CheckpointError, load_checkpoint, save_checkpoint
from xceptile.models.xception import Xception

SIZE = 128  # its maps before the four poolings are odd, odd, even and even
PHOTOS = images(2, SIZE)
TOLERANCE = 1e-4  # relative to the largest logit


def outputs(module: torch.nn.Module, x: np.ndarray = PHOTOS) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the largest logit; the logits must depend on the image for the comparison to mean anything."""
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1 * np.abs(theirs).max()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


# --- Ours. ---


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A small checkpoint of ours."""
    torch.manual_seed(0)
    path = tmp_path / "own.safetensors"
    save_checkpoint(
        Xception(3, width=0.1),
        path,
        input_spec=InputSpec(96, 96, resize=110, interpolation="bicubic"),
        labels=("ant", "bee", "çat"),
        provenance={"data": "drawn"},
    )
    return path


@pytest.mark.parametrize(("width", "same_padding", "epsilon"), [(0.1, True, 1e-3), (0.25, False, 1e-5)])
def test_own_checkpoints_keep_everything(width: float, same_padding: bool, epsilon: float, tmp_path: Path) -> None:
    module = Xception(2, width=width, same_padding=same_padding, epsilon=epsilon)
    outputs(module)  # in training mode: the running statistics move
    path, spec = tmp_path / "own.safetensors", InputSpec(80, 90, mean=(0.1, 0.2, 0.3), std=(1.0, 2.0, 3.0))
    save_checkpoint(module, path, input_spec=spec, labels=("a", "b"), provenance={"curve": "steep"})
    checkpoint = load_checkpoint(path)
    assert (checkpoint.input_spec, checkpoint.labels, checkpoint.provenance) == (spec, ("a", "b"), {"curve": "steep"})
    assert np.array_equal(outputs(checkpoint.module), outputs(module.eval()))
    assert os.listdir(tmp_path) == ["own.safetensors"]


@pytest.mark.parametrize("width", [0.1, 0.25, 0.35, 0.375, 0.4, 0.5, 0.75, 1.0, 1.25])
def test_the_width_is_inferred_from_the_shapes(width: float) -> None:
    with torch.device("meta"):
        state = Xception(2, width=width).state_dict()
    inferred = weights._infer_width(weights._channels(state))
    with torch.device("meta"):
        again = Xception(2, width=inferred).state_dict()
    assert {k: v.shape for k, v in again.items()} == {k: v.shape for k, v in state.items()}


def test_equal_networks_are_equal_bytes(own: Path, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(own)
    for name in ("a", "b"):
        save_checkpoint(
            checkpoint.module,
            tmp_path / name,
            input_spec=checkpoint.input_spec,
            labels=checkpoint.labels,
            provenance=checkpoint.provenance,
        )
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_labels_must_be_as_many_as_classes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 classes, 1 labels"):
        save_checkpoint(
            Xception(2, width=0.1), tmp_path / "x", input_spec=InputSpec(71, 71), labels=("a",), provenance={}
        )
    assert not list(tmp_path.iterdir())


# --- Files that are none. ---


def rewritten(own: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Path:
    """The checkpoint with tensors and metadata changed, its hash made right again."""
    with safetensors.safe_open(str(own), framework="pt") as file:
        tensors, metadata = {k: file.get_tensor(k) for k in list(file.keys())}, file.metadata()
    change(tensors, metadata)
    metadata["sha256"] = weights._sha256(tensors)
    safetensors.torch.save_file(tensors, own, metadata)
    return own


def drop(name: str) -> Callable[[dict[str, torch.Tensor], dict[str, str]], None]:
    return lambda tensors, _: tensors.__delitem__(name)


def put(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor], dict[str, str]], None]:
    return lambda tensors, _: tensors.update({name: value})


def card(**changes: object) -> Callable[[dict[str, torch.Tensor], dict[str, str]], None]:
    return lambda _, metadata: metadata.update(card=json.dumps(json.loads(metadata["card"]) | changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("blocks.3.norms.1.bias"),
            "is no Xception of ours: 1 of .* tensors are missing, .* blocks.3.norms.1.b",
        ),
        (put("extra.weight", torch.zeros(3)), r"also holds extra.weight"),
        (
            put("conv1.weight", torch.zeros(8, 1, 3, 3)),
            r"conv1.weight has shape \[8, 1, 3, 3\].* has \[8, 3, 3, 3\] there",
        ),
        (put("norm2.weight", torch.full((8,), torch.nan)), "norm2.weight holds NaN or infinity"),
        (put("norm4.weight", torch.zeros(96)), "channel counts"),
        (put("norm4.weight", torch.zeros(())), "norm4.weight is a single number"),
        (card(labels=["a"]), "names 1 labels for 3 classes"),
        (card(input_spec={"height": 3}), "model card that cannot be read"),
        (card(provenance=3), "model card that cannot be read"),
        (lambda _, metadata: metadata.__delitem__("card"), "model card that cannot be read"),
        (lambda _, metadata: metadata.update(version="2"), "version 2, this xceptile reads 1; update xceptile"),
    ],
)
def test_own_checkpoints_that_are_wrong(own: Path, change: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(rewritten(own, change))
    assert str(caught.value).startswith(f"{own}: ")
    assert "\n" not in str(caught.value)


def test_damage_is_seen(own: Path) -> None:
    whole = own.read_bytes()
    own.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged: its tensors do not have the hash"):
        load_checkpoint(own)
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        own.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match="truncated"):
            zoo.load(own)


@pytest.mark.parametrize("name", ["a.pth", "a.safetensors", "a.h5", "a.weights.h5", "a.keras", "a.pt2"])
def test_empty_truncated_and_foreign_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    for contents in (b"", b"PK\x03\x04 not a zip", b"\x89HDF\r\n\x1a\n" + bytes(200), os.urandom(1000)):
        path.write_bytes(contents)
        with pytest.raises((CheckpointError, ProgramError)) as caught:
            zoo.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


def test_the_zoo(own: Path, tmp_path: Path) -> None:
    model = zoo.load(own)
    assert model.graph.inputs[0].type.shape == (1, 96, 96, 3)
    assert model.labels == ("ant", "bee", "çat")
    larger = zoo.load(own, size=120)
    assert (larger.input_spec.height, larger.input_spec.resize) == (120, 137)
    with pytest.raises(ValueError, match="at least 71x71 pixels, got 70x70"):
        zoo.load(own, size=70)
    with pytest.raises(zoo.ModelError, match="no such model; give xception, demo or a file"):
        zoo.load("resnet")
    with pytest.raises(zoo.ModelError, match="its ending names no kind of model"):
        zoo.load(tmp_path)
    with pytest.raises(zoo.ModelError, match="no such file"):
        zoo.load(tmp_path / "none.pth")


def test_classes_are_named_by_a_file(own: Path, tmp_path: Path) -> None:
    model, file = zoo.load(own), tmp_path / "labels.txt"
    names = [f"class {i}" for i in range(len(model.labels))]
    file.write_text("\n".join(names) + "\n\n")
    assert zoo.with_labels(model, file).labels == tuple(names)
    file.write_text("\n".join(names), encoding="utf-8-sig")  # as some editors begin a file
    assert zoo.with_labels(model, file).labels == tuple(names)
    for lines, message in (
        (names[1:], "names 2 classes, the model has 3"),
        ([*names[1:], names[1]], "names 'class 1' twice"),
    ):
        file.write_text("\n".join(lines))
        with pytest.raises(zoo.ModelError, match=rf"labels\.txt: {message}"):
            zoo.with_labels(model, file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(zoo.ModelError, match=r"labels\.txt: is no text"):
        zoo.with_labels(model, file)


def test_preprocessing_is_given_by_a_file(own: Path, tmp_path: Path) -> None:
    model, file = zoo.load(own), tmp_path / "own.json"
    file.write_text('{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "resize": 342}')
    spec = zoo.with_preprocessing(model, file).input_spec
    assert spec == replace(model.input_spec, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=342)
    for text, message in (
        ('{"height": 299}', "it gives height"),
        ('{"std": [0, 1, 1]}', "std must be positive"),
        ('{"mean": 0.5}', "mean is a list of three numbers, or of one for grey images, got 0.5"),
        ('{"mean": [0.5, 0.5]}', "mean is a list of three numbers"),
        ('{"mean": "123"}', "mean is a list of three numbers"),
        ('{"mean": [123.7, 116.3, 103.5]}', "in units of pixel / 255"),
        ('{"std": [0.5, -0.5, 0.5]}', "std must be positive"),
        ('{"resize": 342.7}', "resize is a whole number of pixels, got 342.7"),
        ('{"resize": true}', "resize is a whole number"),
        ('{"interpolation": "area"}', "interpolation is one of nearest"),
        ('{"interpolation": 3}', "interpolation is one of nearest"),
        ("[]", "no object"),
        ("{", "own.json: is no preprocessing: Expecting"),
        ('{"resize": 1e999}', "resize is a whole number of pixels, got inf"),
    ):
        file.write_text(text)
        with pytest.raises(zoo.ModelError, match=message):
            zoo.with_preprocessing(model, file)
