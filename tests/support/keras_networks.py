"""Small networks of Xception's kind built with the real Keras, and what they say to compare our import with."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from xceptile.models.from_keras import KerasImport, from_keras
from xceptile.models.keras_file import read_keras
from xceptile.models.preprocess import normalize
from xceptile.models.verify import verify
from xceptile.runtime import reference

os.environ.setdefault("KERAS_BACKEND", "torch")

HEIGHT, WIDTH = 26, 21


@dataclass(frozen=True)
class Body:
    """What may differ between two networks of this kind."""

    stem_padding: str = "valid"
    epsilon: float = 1e-3
    strides: int = 2
    dilation: int = 1
    axis: int = -1
    scale: bool = True
    center: bool = True
    bias: bool = False
    pool_padding: str = "same"


def body(x: Any, kind: Body | None = None) -> Any:
    """A stem and a block with its shortcut, then a last separable convolution; (H, W, C) -> a map of 16 channels."""
    from keras import layers

    kind = kind or Body()

    def norm(x: Any) -> Any:
        return layers.BatchNormalization(axis=kind.axis, epsilon=kind.epsilon, scale=kind.scale, center=kind.center)(x)

    x = layers.Conv2D(8, 3, strides=2, use_bias=kind.bias, padding=kind.stem_padding, name="block1_conv1")(x)
    x = layers.Activation("relu")(norm(x))
    y = norm(layers.SeparableConv2D(12, 3, padding="same", use_bias=kind.bias)(x))
    if kind.strides == 2:
        y = layers.MaxPooling2D(3, strides=2, padding=kind.pool_padding)(y)
    shortcut = layers.Conv2D(12, 1, strides=kind.strides, padding="same", use_bias=kind.bias)(x)
    x = layers.Add()([y, norm(shortcut)])
    x = layers.SeparableConv2D(16, 3, padding="same", dilation_rate=kind.dilation, use_bias=kind.bias)(x)
    return layers.ReLU()(norm(x))


def network(
    head: Callable[[Any], Any], kind: Body | None = None, shape: tuple[int | None, ...] = (HEIGHT, WIDTH, 3)
) -> Any:
    """A Functional model of one body and a head."""
    import keras

    inputs = keras.Input(shape)
    return keras.Model(inputs, head(body(inputs, kind)))


def classifier(x: Any) -> Any:
    from keras import layers

    return layers.Dense(5, name="predictions")(layers.GlobalAveragePooling2D()(x))


def settle(model: Any, images: np.ndarray) -> Any:
    """The model with random batch normalizations, which fit the images unless they are frozen, and random biases."""
    from keras import layers

    rng = np.random.default_rng(1)
    for layer in model._flatten_layers():
        for weight in layer.weights if not hasattr(layer, "layers") else ():
            if weight.name in ("gamma", "moving_variance"):
                weight.assign(rng.uniform(0.5, 1.5, weight.shape))
            elif weight.name in ("beta", "bias", "moving_mean"):
                weight.assign(rng.normal(0, 0.3, weight.shape))
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    with torch.no_grad():
        model(images, training=True)
    return model


def pixels(count: int = 3, shape: tuple[int, int, int] = (HEIGHT, WIDTH, 3)) -> np.ndarray:
    """Random images, uint8."""
    return np.random.default_rng(2).integers(0, 256, (count, *shape), np.uint8)


def says(model: Any, x: np.ndarray) -> np.ndarray:
    """What Keras makes of a batch."""
    with torch.no_grad():
        return np.asarray(model(x.astype(np.float32), training=False).detach())


def imported(path: Path, size: int | None = None) -> KerasImport:
    result = from_keras(read_keras(path), size, name="network")
    verify(result.graph)
    return result


def ours(result: KerasImport, images: np.ndarray) -> np.ndarray:
    """What the imported network makes of images, preprocessing included."""
    x = normalize(images, result.input_spec)
    return np.concatenate([reference.run(result.graph, image[np.newaxis])[0] for image in x])


def distance(result: np.ndarray, truth: np.ndarray) -> float:
    """Relative to the largest value. The outputs must depend on the image, else the comparison means nothing."""
    assert np.abs(truth[0] - truth[1]).max() > 0.02 * np.abs(truth).max()
    return float(np.abs(result - truth).max() / np.abs(truth).max())
