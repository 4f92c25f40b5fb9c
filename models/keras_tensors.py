"""Which arrays of a Keras file belong to which layer of its config.

Keras' own format (``.keras``, ``.weights.h5``) numbers the layers of each class within their model, in the config's
order, and the arrays of a layer: ``layers/functional/layers/conv2d_1/vars/0``. The older one names them:
``model_weights/xception/block1_conv1/kernel:0``, with the layer of the outermost model first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .keras_config import Layer, Network
from .keras_file import KerasFile
from .weights import CheckpointError

Arrays = Mapping[str, tuple[str, NDArray[np.float32]]]  # a tensor's name or number -> its path in the file, values

_CONTAINERS = ("layers", "_layer_checkpoint_dependencies")  # of Keras 2.13 and later; of 2.12
_WEIGHTED = frozenset({"Conv2D", "SeparableConv2D", "DepthwiseConv2D", "BatchNormalization", "Dense", "Normalization"})


@dataclass(frozen=True)
class LayerTensors:
    """The arrays of each layer by its path. ``numbered``: a layer's arrays are known by their numbers, not by names."""

    by_layer: Mapping[str, Arrays]
    numbered: bool


def tensors_of(file: KerasFile, network: Network) -> LayerTensors:
    """Raises CheckpointError where one layer has two arrays of one name."""
    container = next((each for each in _CONTAINERS if any(path.startswith(f"{each}/") for path in file.arrays)), None)
    if container is None:
        return LayerTensors(dict(_by_name(file, network)), numbered=False)
    groups: dict[str, dict[str, tuple[str, NDArray[np.float32]]]] = {}
    for path, array in file.arrays.items():
        group, _, number = path.rpartition("/")
        groups.setdefault(group, {})[number] = (path, array)
    return LayerTensors(dict(_by_number(network, container, groups)), numbered=True)


# --- Keras' own format. ---


def _by_number(network: Network, folder: str, groups: Mapping[str, Arrays]) -> Iterator[tuple[str, Arrays]]:
    """``folder``: the group that holds the network's layers, each in one of its own."""
    container, seen = folder.rpartition("/")[2], Counter[str]()
    for layer in network.layers:
        kind = _snake_case(_class_of(layer))
        group = f"{folder}/{kind}" + (f"_{seen[kind]}" if seen[kind] else "")
        found = dict(
            _by_number(layer.network, f"{group}/{container}", groups)
            if layer.network is not None
            else [(layer.path, groups.get(f"{group}/vars", {}))]
        )
        # Keras 2.12 lists a layer that has weights twice, and counts it twice.
        seen[kind] += 2 if container == _CONTAINERS[1] and any(found.values()) else 1
        yield from found.items()


def _class_of(layer: Layer) -> str:
    if layer.network is None:
        return layer.kind
    return "Sequential" if layer.network.sequential else "Functional"


def _snake_case(name: str) -> str:
    """As keras/src/utils/naming.py has it."""
    name = re.sub(r"\W+", "", name)
    name = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", name)
    return re.sub("([a-z])([A-Z])", r"\1_\2", name).lower()


# --- The format with names. ---


def _by_name(file: KerasFile, network: Network) -> Iterator[tuple[str, Arrays]]:
    prefix = "model_weights/" if any(path.startswith("model_weights/") for path in file.arrays) else ""
    tops = {layer.name: layer for layer in network.layers}
    members: dict[str, list[str]] = {name: [] for name in tops}
    for path in file.arrays:
        # A name may hold slashes, so that conv1/bn lies in the group of conv1.
        parts = path.removeprefix(prefix).split("/")
        names = ("/".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
        if (top := next((name for name in names if name in tops), None)) is not None:
            members[top].append(path)
    for name, layer in tops.items():
        paths = {path: path[len(prefix) + len(name) + 1 :].rpartition("/")[0] for path in members[name]}
        if layer.network is None:
            yield layer.path, _named(file, layer, list(paths))
            continue
        leaves = [leaf for leaf in _leaves(layer.network) if leaf.kind in _WEIGHTED]
        folders = _folders(leaves, set(paths.values()))
        for leaf in leaves:
            yield leaf.path, _named(file, leaf, [p for p, folder in paths.items() if folder == folders.get(leaf.path)])


def _named(file: KerasFile, layer: Layer, paths: list[str]) -> Arrays:
    """``.../kernel:0`` -> kernel."""
    arrays: dict[str, tuple[str, NDArray[np.float32]]] = {}
    for path in paths:
        tensor = path.rpartition("/")[2].removesuffix(":0")
        if tensor in arrays:
            raise CheckpointError(f"holds {tensor} of layer {layer.path} twice", file.path, layer.path)
        arrays[tensor] = (path, file.arrays[path])
    return arrays


def _leaves(network: Network) -> Iterator[Layer]:
    for layer in network.layers:
        if layer.network is None:
            yield layer
        else:
            yield from _leaves(layer.network)


def _folders(leaves: list[Layer], folders: set[str]) -> dict[str, str]:
    """Each layer's folder within its outermost model's group: its name, with or without the models around it.

    A model that TensorFlow 1 built a second time in a session has ``_1`` behind all of its names.
    """
    best: dict[str, str] = {}
    for suffix in ("", *(f"_{number}" for number in range(1, 10))):
        found = {leaf.path: folder for leaf in leaves if (folder := _folder(leaf, suffix, folders)) is not None}
        if len(found) == len(leaves) and len(set(found.values())) == len(found):
            return found
        best = best or found
    twice = {folder for folder, count in Counter(best.values()).items() if count > 1}
    return {path: folder for path, folder in best.items() if folder not in twice}


def _folder(leaf: Layer, suffix: str, folders: set[str]) -> str | None:
    """The one folder that ends in the layer's name, or where several do, in its model's and its own."""
    parent = leaf.path.removesuffix(f"/{leaf.name}").rpartition("/")[2]
    for wanted in (f"{leaf.name}{suffix}", f"{parent}/{leaf.name}{suffix}"):
        fitting = [folder for folder in folders if folder == wanted or folder.endswith(f"/{wanted}")]
        if len(fitting) == 1:
            return fitting[0]
    return None
