"""``keras.applications.Xception`` from ``.h5``, ``.weights.h5`` and ``.keras`` files, read with h5py alone."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .keras_config import input_spec_of
from .preprocess import InputSpec, keras_input_spec
from .weights import SUFFIXES, Checkpoint, CheckpointError, Layer, assemble, with_default_card, xception_layers

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
_MAX_ELEMENTS = 2**28  # of one tensor: far above any of Xception's; a damaged header may promise anything

_Arrays = dict[str, dict[str, NDArray[np.float32]]]  # layer -> tensor, or its number -> values


def load_keras(path: str | Path) -> Checkpoint:
    """An Xception of Keras with its classifier.

    The base network may lie inside another model, as transfer learning has it, provided that global average pooling
    and one dense layer follow. TensorFlow's SAME padding, epsilon 1e-3. A saved model (not weights alone) says the
    input's size and how pixels are scaled (``keras_config``). Raises CheckpointError for anything else.
    """
    path = Path(path)
    arrays, numbered, config = _read(path)
    names = _names_by_number(arrays) if numbered else _names(arrays, path)
    found: dict[str, tuple[str, Tensor]] = {}
    for layer in xception_layers():
        if layer.ours in names:
            name = names.pop(layer.ours)
            found |= _torch_tensors(layer, name, arrays.pop(name), path)
    if arrays:
        unknown = sorted(arrays)[0]
        raise CheckpointError(f"is no Xception of Keras: it also holds layer {unknown}", path, unknown)
    module = assemble(found, path, "Keras", same_padding=True, epsilon=1e-3)
    return with_default_card(module, _input_spec(config, path), path, "keras.applications.Xception")


def _input_spec(config: str | bytes | None, path: Path) -> InputSpec:
    if config is None:
        return keras_input_spec()
    unreadable = (json.JSONDecodeError, UnicodeDecodeError, OverflowError, RecursionError)
    try:
        return input_spec_of(json.loads(config))
    except (KeyError, TypeError, IndexError, AttributeError, *unreadable) as error:
        raise CheckpointError(f"has a model's config that cannot be read ({error!r}); save it again", path) from error
    except ValueError as error:
        raise CheckpointError(str(error), path) from error


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
                f"is no Xception of Keras: it has {len(numbers)} layers like {numbers[0][1]}, Xception has 4", path
            )
        names |= {ours[kind, f"shortcut {i}"]: name for i, (_, name) in enumerate(numbers)}
    dense = [name for name in rest if any(array.ndim == 2 for array in arrays[name].values())]
    if "classifier" not in names:
        if len(dense) != 1:
            raise CheckpointError(
                f"has {len(dense)} dense layers where one classifier is needed; "
                "save the model with its classifier (include_top=True, or pooling and one Dense of your own)",
                path,
            )
        names["classifier"] = dense[0]
    return names


def _names_by_number(arrays: _Arrays) -> dict[str, str]:
    """The same for files that number the layers of each class in the network's order and name none."""
    names = {}
    for kind, class_name in _CLASS_NAMES.items():
        layers = [layer.ours for layer in xception_layers() if layer.kind == kind]
        for number, ours in enumerate(layers):
            name = f"{class_name}_{number}" if number else class_name
            if name in arrays:
                names[ours] = name
    return names


def _read(path: Path) -> tuple[_Arrays, bool, str | bytes | None]:
    """All arrays of floats but the optimizer's, whether the layers bear numbers instead of their names, and the model's
    config as JSON, where there is one."""
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                source, config = io.BytesIO(archive.read("model.weights.h5")), archive.read("config.json")
            with h5py.File(source, "r") as file:
                return *_read_group(file, path), config
        with h5py.File(path, "r") as file:
            return *_read_group(file, path), file.attrs.get("model_config")
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path) from error
    except (OSError, KeyError, ValueError, RuntimeError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, CheckpointError):
            raise
        kind = "Keras archive" if path.suffix == ".keras" else "HDF5 file"
        raise CheckpointError(f"is no {kind}, or truncated or damaged ({error}); copy it again", path) from error


def _read_group(file: h5py.File, path: Path) -> tuple[_Arrays, bool]:
    arrays: _Arrays = {}
    named = numbered = False

    def visit(name: str, item: h5py.Group | h5py.Dataset) -> None:
        nonlocal named, numbered
        parts = name.split("/")
        if not isinstance(item, h5py.Dataset) or item.dtype.kind != "f" or parts[0].startswith("optimizer"):
            return  # groups; the state of random generators; the optimizer's moments
        if item.size > _MAX_ELEMENTS:
            raise CheckpointError(f"{name} claims {item.size} elements: damaged, or another network's", path, name)
        if len(parts) > 2 and parts[-2] == "vars":  # Keras 3
            own_name = item.parent.attrs.get("name")
            layer, tensor = str(own_name or parts[-3]), parts[-1]
            named, numbered = named or own_name is not None, numbered or own_name is None
        else:
            layer, tensor = _legacy_names(parts)
        if tensor in arrays.setdefault(layer, {}):
            raise CheckpointError(f"holds two layers named {layer}", path, layer)
        arrays[layer][tensor] = np.asarray(item, np.float32)

    file.visititems(visit)
    if not arrays:
        raise CheckpointError("holds no weights; save the model or its weights with Keras", path)
    return arrays, numbered and not named


def _legacy_names(parts: list[str]) -> tuple[str, str]:
    """Layer and tensor of ``[model_weights/][outer/]block1_conv1/[block1_conv1/]kernel:0``, and of Keras 1's forms."""
    known = {layer.keras for layer in xception_layers()}
    groups = [part for part in parts[:-1] if part != "model_weights"] or ["?"]
    layer = next(
        (part for part in groups if part in known or any(p.fullmatch(part) for p in _SHORTCUTS.values())), groups[-1]
    )
    tensor = parts[-1].removesuffix(":0").removeprefix(f"{layer}_")
    return layer, _KERAS1_TENSORS.get(tensor, tensor)
