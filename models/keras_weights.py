"""``keras.applications.Xception`` from weights without the model's config (``.weights.h5``, ``.h5`` of save_weights).

Such a file says which numbers there are, not what is computed with them: the layers are told by their names or numbers,
and the rest is taken to be Keras' own Xception. What is assumed so is told (``ASSUMED``). ``from_keras.py`` reads files
that hold a config.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .keras_file import KerasFile
from .preprocess import keras_input_spec
from .weights import SUFFIXES, Checkpoint, CheckpointError, Layer, assemble, with_default_card, xception_layers

ASSUMED = (
    "weights alone do not say what is computed with them: taken for keras.applications.Xception, with its strides, "
    "padding and poolings, epsilon 1e-3, global average pooling, no activation but a softmax behind the classifier"
)
_TENSORS: dict[
    str, dict[str, tuple[int, ...]]
] = {  # in the order in which Keras saves them, with the permutation into torch's layout
    "conv": {"kernel": (3, 2, 0, 1)},
    "separable": {"depthwise_kernel": (2, 3, 0, 1), "pointwise_kernel": (3, 2, 0, 1)},
    "norm": {"gamma": (0,), "beta": (0,), "moving_mean": (0,), "moving_variance": (0,)},
    "dense": {"kernel": (1, 0), "bias": (0,)},
}
_KERAS1_TENSORS = {"W": "kernel", "b": "bias", "running_mean": "moving_mean", "running_std": "moving_variance"}
_SHORTCUTS = {  # the layers that Keras names by itself; the group is the running number
    "conv": re.compile(r"(?:conv2d|convolution2d)(?:_(\d+))?"),
    "norm": re.compile(r"(?:batch_normalization|batchnormalization)(?:_(\d+))?"),
}
_CLASS_NAMES = {"conv": "conv2d", "separable": "separable_conv2d", "norm": "batch_normalization", "dense": "dense"}

_Arrays = dict[str, dict[str, NDArray[np.float32]]]  # layer -> tensor, or its number -> values


def load_weights(file: KerasFile) -> Checkpoint:
    """An Xception of Keras with its classifier, one dense layer. The base network may lie inside another model, as
    transfer learning has it.

    Raises CheckpointError for anything else.
    """
    arrays, numbered = _by_layer(file)
    names = _names_by_number(arrays) if numbered else _names(arrays, file.path)
    found: dict[str, tuple[str, Tensor]] = {}
    for layer in xception_layers():
        if layer.ours in names:
            name = names.pop(layer.ours)
            found |= _torch_tensors(layer, name, arrays.pop(name), file.path)
    if arrays:
        unknown = sorted(arrays)[0]
        raise CheckpointError(
            f"is not an Xception of Keras: it also holds layer {unknown}; save the whole model (model.save), whose "
            "config says what it computes",
            file.path,
            unknown,
        )
    module = assemble(found, file.path, "Keras", same_padding=True, epsilon=1e-3)
    checkpoint = with_default_card(module, keras_input_spec(), file.path, "keras.applications.Xception")
    return replace(checkpoint, provenance=checkpoint.provenance | {"assumed": ASSUMED})


def _torch_tensors(
    layer: Layer, name: str, arrays: dict[str, NDArray[np.float32]], path: Path
) -> dict[str, tuple[str, Tensor]]:
    """One layer's tensors in torch's layout, by our names; those that the file lacks are left out."""
    found = {}
    for number, (suffix, (tensor, axes)) in enumerate(
        zip(SUFFIXES[layer.kind], _TENSORS[layer.kind].items(), strict=True)
    ):
        data = arrays.pop(tensor, None)
        if data is None:
            data = arrays.pop(str(number), None)  # Keras 3 numbers a layer's tensors
        if data is None:
            continue
        if data.ndim != len(axes):
            raise CheckpointError(f"{name}/{tensor} has shape {list(data.shape)}: another network's", path, name)
        found[f"{layer.ours}.{suffix}"] = (f"{name}/{tensor}", torch.from_numpy(data.transpose(axes).copy()))
    if arrays:
        raise CheckpointError(f"layer {name} also holds {sorted(arrays)[0]}: another network's", path, name)
    return found


def _names(arrays: _Arrays, path: Path) -> dict[str, str]:
    """Our layer names -> the file's. Shortcuts are told by their order, the classifier by being the one dense layer."""
    ours = {(layer.kind, layer.keras): layer.ours for layer in xception_layers()}
    by_keras = {layer.keras: layer.ours for layer in xception_layers()}
    names = {by_keras[name]: name for name in arrays if name in by_keras}
    rest = [name for name in arrays if name not in by_keras]
    for kind, pattern in _SHORTCUTS.items():
        numbers = sorted((int(match[1] or 0), name) for name in rest if (match := pattern.fullmatch(name)))
        if len(numbers) > 4:
            raise CheckpointError(
                f"is not an Xception of Keras: it has {len(numbers)} layers like {numbers[0][1]}, Xception has 4", path
            )
        names |= {ours[kind, f"shortcut {i}"]: name for i, (_, name) in enumerate(numbers)}
    dense = [name for name in rest if any(array.ndim == 2 for array in arrays[name].values())]
    if "classifier" not in names:
        if len(dense) != 1:
            raise CheckpointError(
                f"has {len(dense)} dense layers where one classifier is needed; save the whole model (model.save), "
                "whose config says what it computes",
                path,
            )
        names["classifier"] = dense[0]
    return names


def _names_by_number(arrays: _Arrays) -> dict[str, str]:
    """The same for files that number the layers of each class in the network's order and name none."""
    names: dict[str, str] = {}
    for kind, class_name in _CLASS_NAMES.items():
        layers = [layer.ours for layer in xception_layers() if layer.kind == kind]
        pattern = re.compile(rf"{class_name}(?:_(\d+))?")
        # Keras 2.12 leaves out every second number.
        numbers = sorted((int(match[1] or 0), name) for name in arrays if (match := pattern.fullmatch(name)))
        names |= {ours: name for ours, (_, name) in zip(layers, numbers, strict=False)}
    return names


def _by_layer(file: KerasFile) -> tuple[_Arrays, bool]:
    """The arrays of each layer, and whether the layers bear numbers instead of their names."""
    arrays: _Arrays = {}
    numbered = bool(file.arrays)
    for path, array in file.arrays.items():
        parts = path.split("/")
        if len(parts) > 2 and parts[-2] == "vars":  # Keras' own format
            own_name = file.names.get("/".join(parts[:-1]))
            layer, tensor = own_name or parts[-3], parts[-1]
            numbered = numbered and own_name is None
        else:
            layer, tensor = _legacy_names(parts)
            numbered = False
        if tensor in arrays.setdefault(layer, {}):
            raise CheckpointError(f"holds two layers named {layer}", file.path, layer)
        arrays[layer][tensor] = array
    if not arrays:
        raise CheckpointError("holds no weights; save the model or its weights with Keras", file.path)
    return arrays, numbered


def _legacy_names(parts: list[str]) -> tuple[str, str]:
    """Layer and tensor of ``[model_weights/][outer/]block1_conv1/[block1_conv1/]kernel:0``, and of Keras 1's forms."""
    known = {layer.keras for layer in xception_layers()}
    groups = [part for part in parts[:-1] if part != "model_weights"] or ["?"]
    layer = next(
        (part for part in groups if part in known or any(p.fullmatch(part) for p in _SHORTCUTS.values())), groups[-1]
    )
    tensor = parts[-1].removesuffix(":0").removeprefix(f"{layer}_")
    return layer, _KERAS1_TENSORS.get(tensor, tensor)
