"""timm's ``legacy_xception`` and Cadene's port, from which it comes, as training scripts leave them.

A file holds dicts in dicts: the network's state dict, an optimizer's, averaged weights, a loss's tensors. Here they are
one mapping from dotted names to tensors (``state_dict.model.conv1.weight``), in which the network is wherever all of an
Xception's convolutions and normalizations lie under one prefix. Found twice, it is not guessed which is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .preprocess import timm_input_spec
from .pth_file import read_pth
from .weights import (
    SUFFIXES,
    Checkpoint,
    CheckpointError,
    assemble,
    open_safetensors,
    with_default_card,
    xception_layers,
)

_TIMM_SUFFIXES = {"depthwise.weight": "conv1.weight"}
_OURS = {  # timm's name -> ours, the classifier apart
    f"{layer.timm}.{_TIMM_SUFFIXES.get(suffix, suffix)}": f"{layer.ours}.{suffix}"
    for layer in xception_layers()
    for suffix in SUFFIXES[layer.kind]
    if layer.kind != "dense"
}
_MODULES = frozenset(name.split(".")[0] for name in _OURS)  # conv1, bn1, block1, ...
_DEPTH = 8  # of dicts in dicts
COUNTERS = ("num_batches_tracked", "n_averaged", "total_ops", "total_params")  # of torch, and of profilers
_AVERAGED = re.compile(r"(^|[._])(ema|swa|averaged?|avg)([._]|$)")
# Layers that a training keeps beside its network: losses and metrics, and the channel adapter that FaceForensics'
# Xceptions carry along (what it makes, 512 channels, a classifier of 2048 cannot take).
_BESIDE = re.compile(r"(^|[._])(loss|criterion|metrics?|normali[sz]er?|adjust_channel)([._\d]|$)|_(loss|criterion)\b")
ASSUMED = "batch normalization with epsilon 1e-5; poolings padded by one pixel on each side, a stem without padding"


_Tensors = dict[str, Tensor]  # by dotted name, in the file's order


def load_timm(path: str | Path) -> Checkpoint:
    """A state dict, wherever it lies in a file of safetensors or of torch.save, pruned or weight-normalized or not.

    Averaged weights are taken before the last ones, as timm.models.load_checkpoint prefers them. Older files hold
    pointwise weights without their two 1x1 dimensions and call the classifier ``last_linear``. What the file cannot say
    is in the provenance as assumed, tensors that the network does not use are named there. Raises CheckpointError for
    any other file, and for one in which two networks or two classifiers fit.
    """
    path = Path(path)
    values = open_safetensors(path)[0] if path.suffix == ".safetensors" else read_pth(path)
    tensors, places = flatten(values)
    if not tensors:
        raise CheckpointError("holds no state dict; save module.state_dict() alone", path)
    tensors = with_plain_weights(tensors, places)
    stems = (n for n, tensor in tensors.items() if n.endswith("conv1.weight") and tensor.shape[1:2] == (3,))
    candidates = {prefix: _backbone(tensors, prefix) for prefix in (n.removesuffix("conv1.weight") for n in stems)}
    complete = {prefix: found for prefix, found in candidates.items() if len(found) == len(_OURS)}
    if not complete:
        raise _incomplete(tensors, max(candidates, key=lambda prefix: len(candidates[prefix]), default=""), path)
    prefix, told = choose(complete, path)
    found = complete[prefix]
    rest = [n for n in tensors if not any(n.startswith(p) and n[len(p) :] in _OURS for p in complete)]
    head = _head(tensors, places, prefix, rest, path)
    zero_bias = torch.zeros(tensors[f"{head}.weight"].shape[0])  # of Linear(bias=False)
    found["classifier.weight"] = (f"{head}.weight", tensors[f"{head}.weight"])
    found["classifier.bias"] = (f"{head}.bias", tensors.get(f"{head}.bias", zero_bias))
    others = tuple(other for other in complete if other and not prefix.startswith(other))
    beside = [n for n in rest if places[n] == places[f"{prefix}conv1.weight"] and not n.startswith(others)]
    inner, outer = _parted([n for n in beside if n not in (f"{head}.weight", f"{head}.bias")], prefix)
    refuse_layers(tensors, outer, path, within=inner)
    module = assemble(found, path, "timm", same_padding=False, epsilon=1e-5)
    checkpoint = with_default_card(module, timm_input_spec(), path, "timm legacy_xception")
    if outer:
        told["unused tensors"] = ", ".join(outer)
    told["assumed"] = f"{ASSUMED}; {head} right behind the average pooling, its outputs as they are"
    return replace(checkpoint, provenance=checkpoint.provenance | told)


def flatten(values: Any) -> tuple[_Tensors, dict[str, str]]:
    """The plain tensors of dicts and lists in each other, and the dict that each lies in. Cycles are walked once."""
    tensors: _Tensors = {}
    places: dict[str, str] = {}
    seen: set[int] = set()

    def walk(value: Any, name: str, place: str, depth: int) -> None:
        if isinstance(value, Tensor):
            if _is_plain(value):
                tensors[name], places[name] = value.detach(), place
        elif isinstance(value, dict | list | tuple) and id(value) not in seen and depth < _DEPTH:
            seen.add(id(value))
            for key, item in value.items() if isinstance(value, dict) else enumerate(value):
                walk(item, f"{name}.{key}" if name else str(key), name, depth + 1)

    walk(values, "", "", 0)
    return tensors, places


def _is_plain(tensor: Tensor) -> bool:
    """Floats that lie in the file as they are: no view that makes many of few."""
    return (
        tensor.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


def with_plain_weights(tensors: _Tensors, places: dict[str, str]) -> _Tensors:
    """With what pruning and weight normalization make of their parameters in place of these; ``places`` gets them, too.

    Sources: torch/nn/utils/prune.py (orig * mask), weight_norm.py and parametrizations.py (v * g / the norm of v over
    the dimensions that g has not).
    """
    plain: _Tensors = {}
    for name, tensor in tensors.items():
        made = _made_of(name)
        if made is None or not all(other in tensors for other in made[1:]):
            plain[name] = tensor
        elif name == made[1]:  # the first of the two stands where the weight does
            base, first, second = made
            product = _product(tensors[first], tensors[second], normalized=not first.endswith("_orig"))
            plain |= {first: tensors[first], second: tensors[second]} if product is None else {base: product}
            places[base] = places[first]
    return plain


def _made_of(name: str) -> tuple[str, str, str] | None:
    """A weight and the two tensors that it is made of, of which ``name`` is one."""
    for pattern, base, first, second in _MADE:
        if match := pattern.fullmatch(name):
            return base.format(*match.groups()), first.format(*match.groups()), second.format(*match.groups())
    return None


_MADE = (
    (re.compile(r"(.*)_(?:orig|mask)"), "{0}", "{0}_orig", "{0}_mask"),
    (re.compile(r"(.*)_[gv]"), "{0}", "{0}_g", "{0}_v"),
    (
        re.compile(r"(.*)parametrizations\.(\w+)\.original[01]"),
        "{0}{1}",
        "{0}parametrizations.{1}.original0",
        "{0}parametrizations.{1}.original1",
    ),
)


def _product(first: Tensor, second: Tensor, *, normalized: bool) -> Tensor | None:
    """None where the shapes are not those of a weight and its mask, or of a norm and its direction."""
    a, b = first.to(torch.float32), second.to(torch.float32)
    if not normalized:
        return a * b if a.shape == b.shape else None
    if a.ndim not in (0, b.ndim) or any(size not in (1, of) for size, of in zip(a.shape, b.shape, strict=False)):
        return None
    over = [d for d in range(b.ndim) if a.ndim == 0 or a.shape[d] == 1]
    weight: Tensor = b * (a / torch.linalg.vector_norm(b, dim=over, keepdim=True))
    return weight


def _backbone(tensors: _Tensors, prefix: str) -> dict[str, tuple[str, Tensor]]:
    """What lies under a prefix of all but the classifier, by our names."""
    found = {}
    for theirs, ours in _OURS.items():
        tensor = tensors.get(prefix + theirs)
        if tensor is not None:
            if theirs.endswith("pointwise.weight") and tensor.ndim == 2:
                tensor = tensor[:, :, None, None]
            found[ours] = (prefix + theirs, tensor)
    return found


def _incomplete(tensors: _Tensors, prefix: str, path: Path) -> CheckpointError:
    missing = [prefix + theirs for theirs in _OURS if prefix + theirs not in tensors]
    unknown = [n for n in _parted(list(tensors), prefix)[0] if n.removeprefix(prefix) not in _OURS]
    if len(missing) == len(_OURS):
        unknown = list(tensors)
    besides = f", and {unknown[0]} is none of its own" if unknown else ""
    return CheckpointError(
        f"is no Xception of timm: {len(missing)} of {len(_OURS)} tensors are missing, the first is "
        f"{missing[0]}{besides}; give a checkpoint of this network, --architecture timm/NAME of another one of timm's, "
        "or the network exported (.pt2, .onnx)",
        path,
        missing[0],
    )


def choose(complete: Mapping[str, Mapping[str, tuple[str, Tensor]]], path: Path) -> tuple[str, dict[str, str]]:
    """The prefix of the network that is meant, and what is to be told of it. Raises CheckpointError."""
    distinct: list[str] = []
    for prefix, found in complete.items():
        if not any(_equal(found, complete[other]) for other in distinct):
            distinct.append(prefix)
    averaged = [prefix for prefix in distinct if _AVERAGED.search(prefix)]
    last = [prefix for prefix in distinct if prefix not in averaged]
    if len(distinct) == 1:
        return distinct[0], {"weights": _shown(distinct[0])} if distinct[0] else {}
    if len(averaged) == len(last) == 1:
        return averaged[0], {"weights": f"{_shown(averaged[0])}, which are averaged, before {_shown(last[0])}"}
    raise CheckpointError(
        f"holds {len(distinct)} networks that fit, in {', '.join(map(_shown, distinct))}; "
        "save the state dict of the one that is meant alone",
        path,
    )


def _equal(a: Mapping[str, tuple[str, Tensor]], b: Mapping[str, tuple[str, Tensor]]) -> bool:
    """Whether all values are; a script may keep one module under two names."""
    return all(torch.equal(tensor, b[name][1]) for name, (_, tensor) in a.items())


def _shown(prefix: str) -> str:
    return prefix.rstrip(".") or "the file itself"


def _head(tensors: _Tensors, places: Mapping[str, str], prefix: str, rest: list[str], path: Path) -> str:
    """The module of the one linear layer that takes the network's features: below the prefix, else in the same state
    dict, else elsewhere in the file. Raises CheckpointError where there is none or two, or where others follow it.
    """
    features = tensors[f"{prefix}bn4.weight"].shape[0]
    place = places[f"{prefix}conv1.weight"]
    layers = [n for n in rest if n.endswith(".weight") and tensors[n].ndim == 2 and not _BESIDE.search(n)]
    scopes = (lambda n: n.startswith(prefix), lambda n: places[n] == place, lambda n: True)
    for within in scopes:
        heads = [n.removesuffix(".weight") for n in layers if within(n) and tensors[n].shape[1] == features]
        if len(heads) > 1:
            classes = [f"{head} ({tensors[f'{head}.weight'].shape[0]} outputs)" for head in heads]
            raise CheckpointError(
                f"holds {len(heads)} classifiers, {', '.join(classes)}; remove all but the one that is meant",
                path,
                f"{heads[1]}.weight",
            )
        if heads:
            own = heads[0].removeprefix(prefix)
            root = heads[0].removesuffix(own) + own.split(".")[0] + "."
            outputs = tensors[f"{heads[0]}.weight"].shape[0]
            more = [n for n in rest if n.startswith(root) and not n.startswith(f"{heads[0]}.")]
            more += [n for n in layers if within(n) and tensors[n].shape[1] == outputs and n not in more]
            if more := [n for n in more if not n.endswith(COUNTERS) and n != f"{heads[0]}.weight"]:
                raise CheckpointError(
                    f"its head has more layers than one ({heads[0]}, {more[0].rpartition('.')[0]}), and a state dict "
                    "does not say what lies between them; give the network exported (.pt2, .onnx)",
                    path,
                    more[0],
                )
            return heads[0]
    linear = [f"{n.removesuffix('.weight')} takes {tensors[n].shape[1]}" for n in layers]
    besides = f", {' and '.join(linear[:2])}" if linear else ""
    raise CheckpointError(
        f"has no classifier: no linear layer takes the {features} features of {_shown(prefix)}{besides}; give the "
        "checkpoint with its classifier, or the network exported (.pt2, .onnx)",
        path,
    )


def _parted(names: list[str], prefix: str) -> tuple[list[str], list[str]]:
    """Those within the network's own modules, and the others; counters are neither."""
    names = [name for name in names if not name.endswith(COUNTERS)]
    inner = [n for n in names if n.startswith(prefix) and n.removeprefix(prefix).split(".")[0] in _MODULES]
    return inner, [name for name in names if name not in inner]


def refuse_layers(tensors: Mapping[str, Tensor], names: list[str], path: Path, within: Iterable[str] = ()) -> None:
    """A layer whose place nobody knows may be part of the network, as is whatever lies ``within`` its own modules.

    Raises CheckpointError for the first of them.
    """
    layers = [n for n in names if n.endswith("weight") and tensors[n].ndim > 1 and not _BESIDE.search(n)]
    for name in (*within, *layers):
        raise CheckpointError(
            f"also holds the layer {name.rpartition('.')[0]}, which this network does not have; where the network does "
            "not use it, save the state dict without it, else give the network exported (.pt2, .onnx)",
            path,
            name,
        )
