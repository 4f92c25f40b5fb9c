"""Checkpoints: ours, and those of the real Keras and timm, saved by their own savers; and files that are none."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.foreign_xceptions import images, keras_outputs, keras_xception, settle_keras
from support.needs import requires_module

from xceptile.models import weights, zoo
from xceptile.models.exported_program import ProgramError
from xceptile.models.keras_config import input_spec_of
from xceptile.models.keras_weights import load_keras
from xceptile.models.preprocess import InputSpec, keras_input_spec, normalize
from xceptile.models.weights import CheckpointError, load_checkpoint, save_checkpoint
from xceptile.models.xception import Xception

needs_keras = requires_module("keras", package="keras")
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


# --- Keras. ---


@pytest.fixture(scope="module")
def keras_model() -> Any:
    return keras_xception()


@needs_keras
@pytest.mark.parametrize("suffix", ["h5", "weights.h5", "keras"])
@pytest.mark.filterwarnings("ignore")
def test_keras_xception(keras_model: Any, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"xception.{suffix}"
    (keras_model.save_weights if suffix == "weights.h5" else keras_model.save)(path)
    checkpoint = load_keras(path)
    assert difference(outputs(checkpoint.module), keras_outputs(keras_model, PHOTOS)) < TOLERANCE
    assert sum(p.numel() for p in checkpoint.module.parameters()) == 22_855_952
    assert checkpoint.input_spec == keras_input_spec(299 if suffix == "weights.h5" else 128)  # weights have no size
    assert len(checkpoint.labels) == 1000
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_keras(path)


@needs_keras
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_padding_or_epsilon_would_be_seen(keras_model: Any, tmp_path: Path) -> None:
    path = tmp_path / "xception.weights.h5"
    keras_model.save_weights(path)
    right = load_keras(path).module
    truth = keras_outputs(keras_model, PHOTOS)
    for fault in ({"same_padding": False}, {"epsilon": 1e-5}):
        wrong = Xception(1000, **fault).eval()
        wrong.load_state_dict(right.state_dict())
        assert difference(outputs(wrong), truth) > TOLERANCE


def fine_tuned(*, nested: bool) -> Any:
    """Transfer learning as Keras' guides have it: the base without its top, pooling, dropout and a dense layer."""
    import keras

    base = keras.applications.Xception(weights=None, include_top=False, input_shape=(SIZE, SIZE, 3))
    inputs = keras.Input((SIZE, SIZE, 3)) if nested else base.input
    x = keras.layers.GlobalAveragePooling2D()(base(inputs) if nested else base.output)
    model = keras.Model(inputs, keras.layers.Dense(5, name="pets")(keras.layers.Dropout(0.2)(x)))
    settle_keras(model, SIZE)
    return model


@needs_keras
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_keras_transfer_learning(nested: bool, tmp_path: Path) -> None:
    model = fine_tuned(nested=nested)
    truth = keras_outputs(model, PHOTOS)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)  # whole models are saved with the optimizer's moments
    for suffix in ("h5", "keras"):
        path = tmp_path / f"pets.{suffix}"
        model.save(path)
        checkpoint = load_keras(path)
        assert difference(outputs(checkpoint.module), truth) < TOLERANCE
        assert checkpoint.labels == ("0", "1", "2", "3", "4")
        assert checkpoint.input_spec == keras_input_spec(SIZE)
        path.unlink()


def scaled_model(scale: Callable[[Any], Any]) -> Any:
    """A model that begins with data augmentation and ``scale``. Too small to be Xception: only its config is read."""
    import keras

    x = inputs = keras.Input((96, 72, 3))
    x = keras.Sequential([keras.layers.RandomFlip()])(x)
    base_input = keras.Input((96, 72, 3))
    base = keras.Model(base_input, keras.layers.Conv2D(4, 3)(base_input))
    return keras.Model(inputs, base(scale(x)))


@needs_keras
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("layer", "low", "high"),
    [
        ("none", -1.0, 1.0),
        ("Rescaling(1 / 255)", 0.0, 1.0),
        ("Rescaling(1 / 127.5, offset=-1)", -1.0, 1.0),
        ("preprocess_input", -1.0, 1.0),
    ],
)
def test_a_keras_model_says_how_pixels_are_scaled(layer: str, low: float, high: float) -> None:
    import keras

    scales: dict[str, Callable[[Any], Any]] = {
        "none": lambda x: x,
        "Rescaling(1 / 255)": keras.layers.Rescaling(1 / 255),
        "Rescaling(1 / 127.5, offset=-1)": keras.layers.Rescaling(1 / 127.5, offset=-1),
        "preprocess_input": keras.applications.xception.preprocess_input,
    }
    spec = input_spec_of(json.loads(scaled_model(scales[layer]).to_json()))
    assert (spec.height, spec.width) == (96, 72)
    ends = normalize(np.array([[0] * 3, [255] * 3], np.uint8), spec)
    np.testing.assert_allclose(ends, [[low] * 3, [high] * 3], atol=1e-7)


def test_tensorflow_says_it_in_words_of_its_own() -> None:
    """As TensorFlow 2's Keras writes ``preprocess_input``, and ``Input`` without a size."""
    layers = [
        {"class_name": "InputLayer", "config": {"batch_input_shape": [None, None, None, 3]}, "inbound_nodes": []},
        {
            "class_name": "TFOpLambda",
            "config": {"name": "tf.math.truediv", "function": "math.truediv"},
            "inbound_nodes": [["input_1", 0, 0, {"y": 127.5, "name": None}]],
        },
        {
            "class_name": "TFOpLambda",
            "config": {"name": "tf.math.subtract", "function": "math.subtract"},
            "inbound_nodes": [["tf.math.truediv", 0, 0, {"y": 1.0, "name": None}]],
        },
        {"class_name": "Conv2D", "config": {"name": "block1_conv1"}, "inbound_nodes": []},
    ]
    assert input_spec_of({"class_name": "Functional", "config": {"layers": layers}}) == keras_input_spec()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: {"batch_shape": [None, 224, None, 3]}}, "its input is .* an image is needed"),
        ({0: {"batch_shape": [None, 3, 71, 71]}}, "its input is .* an image is needed"),
        ({0: {"batch_shape": [None, 10]}}, "its input is .* an image is needed"),
        ({1: {"class_name": "InputLayer", "name": "age"}}, r"takes 2 inputs \(image, age\)"),
        ({2: {"class_name": "GlobalMaxPooling2D", "name": "pool"}}, "it holds GlobalMaxPooling2D pool, which is no"),
        ({2: {"class_name": "Activation", "activation": "gelu"}}, "it holds Activation"),
    ],
)
def test_a_keras_model_that_is_no_xception_of_one_image_is_refused(changes: dict[int, Any], message: str) -> None:
    """The weights alone would fit: a pooling has none."""
    rows: list[dict[str, Any]] = [
        {"class_name": "InputLayer", "name": "image", "batch_shape": [None, 96, 72, 3]},
        {"class_name": "Conv2D"},
        {"class_name": "GlobalAveragePooling2D"},
    ]

    def config(changes: dict[int, Any]) -> dict[str, Any]:
        layers = [row | changes.get(i, {}) for i, row in enumerate(rows)]
        return {"config": {"layers": [{"class_name": row["class_name"], "config": row} for row in layers]}}

    assert (input_spec_of(config({})).height, input_spec_of(config({})).width) == (96, 72)
    with pytest.raises(ValueError, match=message):
        input_spec_of(config(changes))


@needs_keras
@pytest.mark.filterwarnings("ignore")
def test_what_a_keras_model_does_before_its_network_is_understood_or_refused(tmp_path: Path) -> None:
    import keras

    model = fine_tuned(nested=True)
    for layer, message in (
        (
            keras.layers.Resizing(SIZE, SIZE),
            "Resizing resizing before its first convolution is not understood; save its",
        ),
        (keras.layers.Rescaling([1.0, 2.0, 3.0]), "Rescaling rescaling"),
        (keras.layers.Rescaling(0.0), "it scales every pixel to the same value"),
        (keras.layers.RandomCrop(SIZE, SIZE), "RandomCrop random_crop"),
    ):
        path = tmp_path / "before.keras"
        inputs = keras.Input((SIZE, SIZE, 3))
        keras.Model(inputs, model(layer(inputs))).save(path)
        with pytest.raises(CheckpointError, match=message):
            load_keras(path)
    for config in ('{"config": 1}', "{"):
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr("config.json", config)
        with pytest.raises(CheckpointError, match="config that cannot be read"):
            load_keras(path)


@needs_keras
@pytest.mark.filterwarnings("ignore")
def test_keras_files_that_name_no_layers(keras_model: Any, tmp_path: Path) -> None:
    """Early files of Keras 3 number the layers of each class and have no names."""
    import h5py

    path = tmp_path / "xception.weights.h5"
    keras_model.save_weights(path)
    with h5py.File(path, "a") as file:
        file.visititems(lambda name, item: item.attrs.pop("name", None) and None)
    assert difference(outputs(load_keras(path).module), keras_outputs(keras_model, PHOTOS)) < TOLERANCE


@needs_keras
@pytest.mark.filterwarnings("ignore")
def test_keras_networks_that_are_not_xception(tmp_path: Path) -> None:
    import keras

    headless = tmp_path / "headless.weights.h5"
    keras.applications.Xception(weights=None, include_top=False, input_shape=(71, 71, 3)).save_weights(headless)
    with pytest.raises(CheckpointError, match="0 dense layers where one classifier is needed; save the model with"):
        load_keras(headless)
    other = tmp_path / "other.keras"
    keras.applications.MobileNet(weights=None, alpha=0.25, input_shape=(32, 32, 3)).save(other)
    with pytest.raises(CheckpointError, match=r"other\.keras: "):
        load_keras(other)


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
