"""Trained Xceptions from files: our own checkpoints, and what the loaders of others' share (``timm_weights.py``,
``keras_weights.py``).

Class count and width come from the tensors' shapes. No code can come of a file of safetensors: behind a header of JSON,
in which names, types, shapes and offsets are checked, there are only numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .atomic_write import write_atomically
from .preprocess import InputSpec
from .provenance import provenance_of
from .read_file import check_file
from .serialize import in_order
from .xception import Xception, scaled_channels

FORMAT = "xceptile.checkpoint"
FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A file that is no checkpoint of an Xception. ``path`` is the file, ``tensor`` the one at fault, if any."""

    def __init__(self, message: str, path: str | Path, tensor: str = "") -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)
        self.tensor = tensor


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A trained network in evaluation mode and its model card. ``labels[i]`` is the name of class i."""

    module: Xception
    input_spec: InputSpec
    labels: tuple[str, ...]
    provenance: dict[str, str]


# --- Our own checkpoints: one .safetensors file, the model card in its metadata. ---


def save_checkpoint(
    module: Xception,
    path: str | Path,
    *,
    input_spec: InputSpec,
    labels: tuple[str, ...],
    provenance: Mapping[str, str],
) -> None:
    """Writes the network, its preprocessing, its class names and where it comes from; aside first, then renamed.

    Raises ValueError where the labels are not as many as the classes.
    """
    classes = module.classifier.out_features
    if len(labels) != classes:
        raise ValueError(f"the network has {classes} classes, {len(labels)} labels were given")
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in module.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    card = {
        "classes": classes,
        "width": _infer_width(_channels(module.state_dict())),
        "same_padding": isinstance(module.blocks[0].pool, torch.nn.Sequential),  # SAME is a pad and a pool
        "epsilon": module.norm1.eps,
        "input_spec": input_spec.to_json(),
        "labels": list(labels),
        "provenance": dict(provenance),
    }
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "card": json.dumps(card),
        "sha256": _sha256(tensors),
    }
    write_atomically(path, in_order(safetensors.torch.save(tensors, metadata)))


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Reads what ``save_checkpoint`` wrote. Raises CheckpointError for any other, damaged or newer file."""
    tensors, metadata = open_safetensors(path)
    if metadata.get("format") != FORMAT:
        raise CheckpointError("is no checkpoint of ours; give it to zoo.load, which knows the other kinds", path)
    if metadata.get("version") != str(FORMAT_VERSION):
        raise CheckpointError(
            f"has checkpoint version {metadata.get('version')}, this xceptile reads {FORMAT_VERSION}; update xceptile",
            path,
        )
    if _sha256(tensors) != metadata.get("sha256"):
        raise CheckpointError("is damaged: its tensors do not have the hash they were saved with; copy it again", path)
    try:
        card = json.loads(metadata["card"])
        labels = tuple(str(label) for label in card["labels"])
        input_spec = InputSpec.from_json(card["input_spec"])
        if not input_spec.origins:  # of a card that was written when the network was trained
            input_spec = input_spec.with_origin("file")
        provenance = {str(k): str(v) for k, v in card["provenance"].items()}
        same_padding, epsilon = bool(card["same_padding"]), float(card["epsilon"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"has a model card that cannot be read ({error}); save it again", path) from error
    module = assemble({k: (k, v) for k, v in tensors.items()}, path, "ours", same_padding, epsilon)
    if len(labels) != module.classifier.out_features:
        raise CheckpointError(
            f"names {len(labels)} labels for {module.classifier.out_features} classes; save it again", path
        )
    return Checkpoint(module, input_spec, labels, provenance)


def is_own(path: str | Path) -> bool:
    """Whether a safetensors file says that ``save_checkpoint`` wrote it. Raises CheckpointError where it is damaged."""
    return open_safetensors(path, tensors=False)[1].get("format") == FORMAT


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()


def open_safetensors(path: str | Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, if wanted, and the metadata. Raises CheckpointError."""
    try:
        check_file(path)
        with safetensors.safe_open(str(path), framework="pt") as file:
            names = file.keys() if tensors else ()
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except FileNotFoundError as error:
        raise CheckpointError("no such file", path) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path) from error
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"is no safetensors file, or truncated ({error}); copy it again", path) from error


# --- One table of layers, walked by the loaders. ---


@dataclass(frozen=True)
class Layer:
    """One layer under its name here, in Keras and in timm. ``kind``: conv, separable, norm or dense.

    Keras numbers the layers of the four shortcuts as it makes them, so ``keras`` is then ``shortcut 0`` to ``3``.
    """

    kind: str
    ours: str
    keras: str
    timm: str


def xception_layers() -> Iterator[Layer]:
    """Every layer with weights, in the network's order."""
    for i in (1, 2):
        yield Layer("conv", f"conv{i}", f"block1_conv{i}", f"conv{i}")
        yield Layer("norm", f"norm{i}", f"block1_conv{i}_bn", f"bn{i}")
    shortcuts = 0
    for block in range(12):
        strided = block in (0, 1, 2, 11)
        for i in range(2 if strided else 3):
            keras = f"block{block + 2}_sepconv{i + 1}"
            at = 3 * i + (1 if block else 0)  # timm's Sequential begins with a ReLU except in the first block
            yield Layer("separable", f"blocks.{block}.sepconvs.{i}", keras, f"block{block + 1}.rep.{at}")
            yield Layer("norm", f"blocks.{block}.norms.{i}", f"{keras}_bn", f"block{block + 1}.rep.{at + 1}")
        if strided:
            ours, keras, timm = f"blocks.{block}.shortcut", f"shortcut {shortcuts}", f"block{block + 1}"
            yield Layer("conv", f"{ours}.0", keras, f"{timm}.skip")
            yield Layer("norm", f"{ours}.1", keras, f"{timm}.skipbn")
            shortcuts += 1
    for i in (1, 2):
        yield Layer("separable", f"sepconv{i + 2}", f"block14_sepconv{i}", f"conv{i + 2}")
        yield Layer("norm", f"norm{i + 2}", f"block14_sepconv{i}_bn", f"bn{i + 2}")
    yield Layer("dense", "classifier", "predictions", "fc")


SUFFIXES = {  # tensors of a layer of each kind, in torch's names
    "conv": ("weight",),
    "separable": ("depthwise.weight", "pointwise.weight"),
    "norm": ("weight", "bias", "running_mean", "running_var"),
    "dense": ("weight", "bias"),
}

Found = Mapping[str, tuple[str, Tensor]]  # our name -> the file's name, the tensor in torch's layout


def _channels(state: Mapping[str, Tensor]) -> dict[int, int]:
    """The channel count of the layers that have 32, 64, ... 2048 at width 1."""
    norms = {
        32: "norm1",
        64: "norm2",
        128: "blocks.0.norms.0",
        256: "blocks.1.norms.0",
        728: "blocks.2.norms.0",
        1024: "blocks.11.norms.1",
        1536: "norm3",
        2048: "norm4",
    }
    return {base: state[f"{name}.weight"].shape[0] for base, name in norms.items()}


def _infer_width(channels: Mapping[int, int]) -> float:
    """The shortest decimal multiplier that gives these channel counts (width 1 gives the paper's).

    The inverse of ``xception.scaled_channels``, whose channels = max(8, 8 * round(base * width / 8)). Raises ValueError
    where there is none.
    """
    low = max((8 * (n / 8 - 0.5) / base if n > 8 else 0.0) for base, n in channels.items())
    high = min(8 * (n / 8 + 0.5) / base for base, n in channels.items())
    for digits in range(1, 9):
        step = 10**digits
        for numerator in range(int(low * step), int(high * step) + 2):
            width: float = numerator / step
            if width > 0 and all(scaled_channels(base, width) == n for base, n in channels.items()):
                return width
    raise ValueError(f"the channel counts {list(channels.values())} are no multiple of the paper's {list(channels)}")


def assemble(found: Found, path: str | Path, source: str, same_padding: bool, epsilon: float) -> Xception:
    """The network with these tensors, in evaluation mode. Raises CheckpointError where they are not an Xception's."""
    wanted = [f"{layer.ours}.{suffix}" for layer in xception_layers() for suffix in SUFFIXES[layer.kind]]
    unknown = sorted(found[name][0] for name in set(found) - set(wanted))
    if missing := [name for name in wanted if name not in found]:
        besides = f", and {unknown[0]} is none of its own" if unknown else ""
        raise CheckpointError(
            f"is no Xception of {source}: {len(missing)} of {len(wanted)} tensors are missing, the first is "
            f"{missing[0]}{besides}; give a checkpoint of this network with its classifier, which is one linear layer, "
            "or the network exported (.pt2, .onnx)",
            path,
            missing[0],
        )
    if unknown:
        raise CheckpointError(
            f"is no Xception of {source}: it also holds {unknown[0]} ({len(unknown)} unknown tensors)", path, unknown[0]
        )
    state = {name: tensor for name, (_, tensor) in found.items()}
    for name in ("classifier.weight", *(f"{layer.ours}.weight" for layer in xception_layers() if layer.kind == "norm")):
        if not state[name].shape:
            raise CheckpointError(f"{found[name][0]} is a single number", path, found[name][0])
    try:
        width = _infer_width(_channels(state))
    except ValueError as error:
        raise CheckpointError(f"is no Xception of {source}: {error}", path) from error
    with torch.device("meta"):
        module = Xception(state["classifier.weight"].shape[0], width=width, same_padding=same_padding, epsilon=epsilon)
    expected = module.state_dict()
    for name in wanted:
        theirs, tensor = found[name]
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{theirs} has shape {list(tensor.shape)}, an Xception of width {width:g} has "
                f"{list(expected[name].shape)} there; give a checkpoint of this network",
                path,
                theirs,
            )
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{theirs} holds NaN or infinity; the training diverged or the file is damaged", path, theirs
            )
    state = {name: tensor.to(torch.float32).contiguous() for name, tensor in state.items()}
    for name in expected:
        if name.endswith("num_batches_tracked"):
            state[name] = torch.zeros((), dtype=torch.int64)
    module.load_state_dict(state, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module.eval()


# --- What the kinds of file without a model card share. ---


def with_default_card(module: Xception, input_spec: InputSpec, path: Path, kind: str) -> Checkpoint:
    """The kinds of file without a model card: classes are named by their numbers."""
    labels = tuple(str(i) for i in range(module.classifier.out_features))
    return Checkpoint(module, input_spec, labels, provenance_of(path, kind))


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
