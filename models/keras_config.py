"""What a Keras model says of its input: the image's size, and how pixels are scaled before Xception's first layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from .preprocess import InputSpec, keras_input_spec

_CONTAINERS = ("Functional", "Model", "Sequential")
_FIRST = ("Conv2D", "Convolution2D")  # the network itself
_XCEPTION = {
    *(*_FIRST, "SeparableConv2D", "SeparableConvolution2D", "BatchNormalization", "Activation", "ReLU"),
    *("MaxPooling2D", "Add", "GlobalAveragePooling2D", "Flatten", "Dense", "Softmax"),
}
_ACTIVATIONS = ("relu", "softmax", "sigmoid", "linear")
_TRAINING_ONLY = ("Dropout", "GaussianNoise")  # and layers called Random*, which augment data; RandomCrop always cuts
_ELSE = "; save its weights alone (.weights.h5) and give --preprocessing and --input-size"

# Operators on layers in Keras 3 and in TensorFlow's Keras 2: (a, b) of x -> a x + b, from their constant.
_SCALINGS: Mapping[str, Callable[[float], tuple[float, float]]] = {
    "TrueDivide": lambda c: (1 / c, 0.0),
    "math.truediv": lambda c: (1 / c, 0.0),
    "Multiply": lambda c: (c, 0.0),
    "math.multiply": lambda c: (c, 0.0),
    "Subtract": lambda c: (1.0, -c),
    "math.subtract": lambda c: (1.0, -c),
    "Add": lambda c: (1.0, c),
    "math.add": lambda c: (1.0, c),
}


def input_spec_of(config: Mapping[str, Any]) -> InputSpec:
    """Of a model's ``config.json`` or ``model_config``. Where nothing scales the pixels, they are taken in [-1, 1], as
    ``preprocess_input`` makes them outside of the model; where no size is fixed, it is 299.

    Raises ValueError, with what to do, for any other layer before the first convolution, for one behind it that
    Xception has not, and for an input that is not one image; KeyError, TypeError, IndexError, AttributeError or
    OverflowError for what is no such config.
    """
    spec = keras_input_spec()
    a, b, scaled, entered = 1.0, 0.0, False, False
    for layer in _layers(config):
        kind = layer["class_name"]
        entered = entered or kind in _FIRST
        if kind in _TRAINING_ONLY or (kind.startswith("Random") and kind != "RandomCrop"):
            continue
        if entered:
            _check_known(kind, layer)
        elif kind == "InputLayer":
            height, width = _size(layer)
            if height is not None and width is not None:
                spec = replace(spec, height=height, width=width).with_origin("file", "size")
        else:
            factor, offset = _scaling(kind, layer)
            a, b, scaled = a * factor, b * factor + offset, True
    if not scaled:
        return spec
    if a == 0:
        raise ValueError(f"it scales every pixel to the same value before its first convolution{_ELSE}")
    # a * 255 * x + b over x = pixel / 255 is (x - mean) / std; the digits that 1 / 127.5 lost are given back.
    std, mean = round(1 / (255 * a), 12), round(-b / (255 * a), 12)
    return replace(spec, mean=(mean,) * 3, std=(std,) * 3).with_origin("file", "mean", "std")


def _layers(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The layers of a model and of the models in it, in order. Raises ValueError for a model of several inputs."""
    inner = config["config"]
    layers = inner if isinstance(inner, list) else inner["layers"]  # early Sequentials are a list
    inputs = [str(layer["config"].get("name")) for layer in layers if layer["class_name"] == "InputLayer"]
    if len(inputs) > 1:
        raise ValueError(f"it takes {len(inputs)} inputs ({', '.join(inputs)}); Xception takes one image")
    for layer in layers:
        if layer["class_name"] in _CONTAINERS:
            yield from _layers(layer)
        else:
            yield layer


def _size(layer: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Height and width of an input, both fixed or both None."""
    shape = layer["config"].get("batch_shape") or layer["config"]["batch_input_shape"]
    if len(shape) != 4 or shape[3] not in (3, None) or (shape[1] is None) != (shape[2] is None):
        raise ValueError(f"its input is {shape}; an image is needed, [None, height, width, 3]{_ELSE}")
    return shape[1], shape[2]


def _check_known(kind: str, layer: Mapping[str, Any]) -> None:
    what = layer["config"]["activation"] if kind == "Activation" else "relu"
    if kind not in _XCEPTION or what not in _ACTIVATIONS:
        name = layer["config"].get("name", "")
        raise ValueError(f"it holds {kind} {name}, which is no layer of Xception; give a network without it")


def _scaling(kind: str, layer: Mapping[str, Any]) -> tuple[float, float]:
    if kind == "Rescaling":
        scale, offset = layer["config"]["scale"], layer["config"]["offset"]
        if isinstance(scale, int | float) and isinstance(offset, int | float):
            return float(scale), float(offset)
    name = layer["config"].get("function") if kind == "TFOpLambda" else kind
    if name in _SCALINGS:
        call = layer["inbound_nodes"][0]
        constant = call[3]["y"] if kind == "TFOpLambda" else call["args"][1]
        if isinstance(constant, int | float) and constant:
            return _SCALINGS[name](float(constant))
    raise ValueError(f"{kind} {layer['config'].get('name', '')} before its first convolution is not understood{_ELSE}")
