"""State dicts of timm's other networks, whose layers timm itself says: ``--architecture timm/xception65``.

timm's own code builds the network, and the file gives its tensors; nothing else in the file is used.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .preprocess import InputSpec
from .provenance import provenance_of
from .pth_file import read_pth
from .timm_weights import COUNTERS, choose, flatten, refuse_layers, with_plain_weights
from .weights import CheckpointError, open_safetensors

PREFIX = "timm/"


class ArchitectureError(ValueError):
    """An architecture that nobody knows."""


def load_architecture(path: Path, architecture: str) -> tuple[torch.nn.Module, InputSpec, dict[str, str]]:
    """The network in evaluation mode, timm's preprocessing for it, and the provenance.

    The number of classes is that of the file's classifier. Raises ArchitectureError for a name that is not timm's,
    CheckpointError where the tensors are not its own, ModuleNotFoundError where timm is not installed.
    """
    import timm

    name = architecture.removeprefix(PREFIX)
    if not architecture.startswith(PREFIX) or not timm.is_model(name):
        near = ", ".join(f"{PREFIX}{known}" for known in timm.list_models("*xception*"))
        raise ArchitectureError(f"no such architecture {architecture!r}; known are all of timm's, such as {near}")
    tensors, places = flatten(open_safetensors(path)[0] if path.suffix == ".safetensors" else read_pth(path))
    tensors = with_plain_weights(tensors, places)
    with torch.device("meta"):
        outline: Any = timm.create_model(name, pretrained=False)
    expected = [each for each in outline.state_dict() if not each.endswith(COUNTERS)]
    prefix, told = _place(tensors, expected, name, path)
    if unused := _beside(tensors, places, prefix, expected, path):
        told["unused tensors"] = ", ".join(unused)
    classes = tensors[f"{prefix}{outline.pretrained_cfg['classifier']}.weight"].shape[0]
    module = timm.create_model(name, pretrained=False, num_classes=classes).eval()
    state = {each: tensors[prefix + each].to(torch.float32) for each in expected}
    for each, tensor in state.items():
        wanted = module.state_dict()[each].shape
        if tensor.shape != wanted:
            shapes = f"{list(tensor.shape)}, a {name} has {list(wanted)} there"
            raise CheckpointError(f"{prefix}{each} has shape {shapes}", path, prefix + each)
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{prefix}{each} holds NaN or infinity", path, prefix + each)
    module.load_state_dict(state, strict=False)  # the counters are left out
    return module, _input_spec(outline.pretrained_cfg), provenance_of(path, f"timm {name}") | told


def _place(tensors: Mapping[str, Tensor], expected: list[str], name: str, path: Path) -> tuple[str, dict[str, str]]:
    """The prefix under which all of the network lies. Raises CheckpointError."""
    first = expected[0]
    prefixes = [n.removesuffix(first) for n in tensors if n == first or n.endswith(f".{first}")]
    missing = {prefix: [each for each in expected if prefix + each not in tensors] for prefix in prefixes}
    complete = [prefix for prefix in prefixes if not missing[prefix]]
    if not complete:
        least = min(missing.values(), key=len, default=expected)
        raise CheckpointError(
            f"is no {name} of timm: {len(least)} of {len(expected)} tensors are missing, the first is {least[0]}; "
            "give --architecture of this network, or the network exported (.pt2, .onnx)",
            path,
            least[0],
        )
    found = {prefix: {each: (prefix + each, tensors[prefix + each]) for each in expected} for prefix in complete}
    return choose(found, path)


def _beside(
    tensors: Mapping[str, Tensor], places: Mapping[str, str], prefix: str, expected: list[str], path: Path
) -> list[str]:
    """What the network's state dict holds besides it. Raises CheckpointError for layers that timm does not have."""
    place, known = places[prefix + expected[0]], {prefix + each for each in expected}
    names = [n for n in tensors if places[n] == place and n not in known and not n.endswith(COUNTERS)]
    roots = tuple(f"{prefix}{each.split('.')[0]}." for each in expected)
    refuse_layers(tensors, names, path, within=[n for n in names if n.startswith(roots)])
    return names


def _input_spec(config: Mapping[str, Any]) -> InputSpec:
    """Source: timm/data/transforms_factory.py (``transforms_imagenet_eval``); all of it is assumed of a file."""
    _, height, width = config["input_size"]
    resize = math.floor(min(height, width) / config["crop_pct"])
    mean, std = tuple(map(float, config["mean"])), tuple(map(float, config["std"]))
    return InputSpec(height, width, mean, std, resize, config["interpolation"]).with_origin("assumed")
