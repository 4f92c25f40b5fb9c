"""Keras' and timm's own Xceptions with random weights and the batch statistics of real activations."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import os
import sys
import types
from typing import Any

import numpy as np
import torch

os.environ.setdefault("KERAS_BACKEND", "torch")


def images(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Smooth shades with noise in [-1, 1], float32 (count, size, size, 3)."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(-1, 1, (count, -(-size // 8), -(-size // 8), 3))
    smooth = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :size, :size]
    return np.clip(smooth + rng.normal(0, 0.1, smooth.shape), -1, 1).astype(np.float32)


def settle_keras(model: Any, size: int) -> None:
    """Batch normalizations of a Keras model get random gammas and betas, and the statistics of a batch."""
    import keras

    rng = np.random.default_rng(1)
    norms = [x for x in model._flatten_layers() if isinstance(x, keras.layers.BatchNormalization)]
    for norm in norms:
        gamma, beta, mean, variance = norm.get_weights()
        norm.set_weights([rng.uniform(0.5, 1.5, gamma.shape), rng.normal(0, 0.3, beta.shape), mean, variance])
        norm.momentum = 0.0
    with torch.no_grad():
        model(images(2, size, seed=1), training=True)


def keras_xception(classes: int = 1000, size: int = 128) -> Any:
    """``keras.applications.Xception`` with logits."""
    import keras

    keras.utils.set_random_seed(0)
    model = keras.applications.Xception(
        weights=None, classes=classes, input_shape=(size, size, 3), classifier_activation=None
    )
    settle_keras(model, size)
    return model


def keras_outputs(model: Any, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(x, training=False).detach())


class _StandIn(types.ModuleType):
    """A module in which every name is an empty class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = type(
            name, (torch.nn.Module,), {"BILINEAR": 0, "NEAREST": 1, "BICUBIC": 2, "BOX": 3, "HAMMING": 4, "LANCZOS": 5}
        )
        setattr(self, name, value)
        return value


class _StandInFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name.split(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stand_in_for_torchvision() -> None:
    """For timm, where it has not been imported yet."""
    if "timm" not in sys.modules:
        sys.meta_path.insert(0, _StandInFinder())


def timm_xception(classes: int = 1000) -> torch.nn.Module:
    """timm's ``legacy_xception``, which is Cadene's. torchvision, which timm imports and this network does not use,
    does not load beside the CPU build of torch; a stand-in takes its place.
    """
    stand_in_for_torchvision()
    import timm

    torch.manual_seed(0)
    model: torch.nn.Module = timm.create_model("legacy_xception", pretrained=False, num_classes=classes)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    with torch.no_grad():
        model.train()(torch.from_numpy(images(2, 128, seed=1)).permute(0, 3, 1, 2))
    return model.eval()
