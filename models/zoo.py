"""A float network by name or from any file that is understood, ready to be quantized."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from .graph import Graph
from .graph_builder import UnsupportedLayer
from .preprocess import InputSpec, keras_input_spec
from .provenance import file_sha256, provenance_of
from .read_file import check_file, read_file
from .visible import CONTROLS

if TYPE_CHECKING:
    from .weights import Checkpoint

DEMO = Path(__file__).parent / "demo" / "xception_demo.safetensors"
PREPROCESSING = {"mean", "std", "resize", "interpolation"}  # of an InputSpec: what a file may give
STATE_DICTS = (".safetensors", ".pth", ".pt", ".tar", ".ckpt", ".bin")
SUFFIXES = (*STATE_DICTS, ".h5", ".hdf5", ".keras", ".pt2", ".onnx")


class ModelError(ValueError):
    """A source that names no network."""


@dataclass(frozen=True, eq=False)
class Model:
    """A float network as imported: input float32 NHWC, normalised as ``input_spec`` says; output logits (1, classes).

    ``labels[i]`` is the name of class i (its number where nobody named it); ``provenance`` says where it comes from.
    Raises ModelError for a name with a control character, which no class has by intention.
    """

    graph: Graph
    input_spec: InputSpec
    labels: tuple[str, ...]
    provenance: dict[str, str]

    def __post_init__(self) -> None:
        _check_names(self.labels, self.provenance.get("source", "the model"))


def _check_names(names: tuple[str, ...], where: object) -> None:
    for index, name in enumerate(names):
        if CONTROLS.search(name):
            raise ModelError(f"{where}: class {index} is named {name!r}, with a control character; name it anew")


def load(source: str | Path, *, size: int | None = None, architecture: str | None = None) -> Model:
    """``xception`` (the paper's network, random weights), ``demo`` (the trained one in this package) or a file.

    Files: checkpoints of ours and of timm's or Cadene's (.safetensors, .pth, .pt, .pth.tar, .ckpt, .bin), models of
    Keras (.keras, .h5, .hdf5) and weights of its Xception (.weights.h5), exported programs (.pt2) and float ONNX
    (.onnx). ``size`` replaces the input's height and width, in pixels; the last two kinds carry their own, unless ONNX
    leaves it open. ``architecture`` (timm/NAME) says the layers of a state dict. Raises ModelError, CheckpointError,
    UnsupportedLayer or ValueError, each with what is wrong, where, and what to do; OSError for what is no regular file,
    or larger than any network.
    """
    if architecture is not None and not str(source).endswith(STATE_DICTS):
        raise ModelError(
            f"{source}: says its layers itself; --architecture is for state dicts ({', '.join(STATE_DICTS)})"
        )
    if str(source) == "xception":
        return _random_xception(size)
    path = DEMO if str(source) == "demo" else Path(source)
    if path.suffix not in SUFFIXES:
        what = "its ending names no kind of model" if path.exists() else "no such model"
        raise ModelError(f"{source}: {what}; give xception, demo or a file ({', '.join(SUFFIXES)})")
    if not path.exists():
        raise ModelError(f"{path}: no such file")
    check_file(path)
    try:
        return _load_file(path, size) if architecture is None else _architecture(path, size, architecture)
    except UnsupportedLayer as error:
        raise UnsupportedLayer(error.path, error.operator, error.reason, path) from error


def _load_file(path: Path, size: int | None) -> Model:
    program = _is_program(path)
    if program or path.suffix == ".onnx":
        model = _program(path) if program else _onnx(path, size)
        if size is not None and (model.input_spec.height, model.input_spec.width) != (size, size):
            raise ModelError(f"{path}: carries its own input size; export it again for {size}x{size}")
        return model
    if path.suffix in (".h5", ".hdf5", ".keras"):
        return _keras(path, size)
    return _xception(_read_checkpoint(path), size, path.name.split(".")[0])


def with_labels(model: Model, path: Path) -> Model:
    """The model with its classes named by a text file: one a line, in the model's order.

    Raises ModelError where they are not as many as the model's, not distinct, or no text; OSError.
    """
    try:
        names = tuple(line.strip() for line in read_file(path).decode("utf-8-sig").splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise ModelError(f"{path}: is no text in UTF-8 ({error}); give one class a line") from error
    if len(names) != len(model.labels):
        raise ModelError(f"{path}: names {len(names)} classes, the model has {len(model.labels)}; give one a line")
    _check_names(names, path)
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ModelError(f"{path}: names {twice!r} twice; classes are told apart by their names")
    return replace(model, labels=names)


def with_preprocessing(model: Model, path: Path) -> Model:
    """The model with another way from an image to its input, by a JSON file: any of ``PREPROCESSING``, what it leaves
    out stays. Raises ModelError with the file and what is wrong; OSError.
    """
    own = model.input_spec.to_json()
    try:
        given = json.loads(read_file(path))
        if not isinstance(given, dict):
            raise ValueError("it is no object")
        if unknown := sorted(set(given) - PREPROCESSING):
            raise ValueError(f"it gives {unknown[0]}; {', '.join(sorted(PREPROCESSING))} can be given")
        spec = InputSpec.from_json(own | given).with_origin("given", *given) if given else model.input_spec
        if spec.channels != model.input_spec.channels:
            raise ValueError(f"the network takes images of {model.input_spec.channels} channels, not {spec.channels}")
        if max(spec.mean) > 1:
            raise ValueError(f"mean and std are in units of pixel / 255 (0.485, not 123.7), the mean is {spec.mean}")
        return replace(model, input_spec=spec)
    except (ValueError, OverflowError, RecursionError) as error:
        raise ModelError(f"{path}: is no preprocessing: {error}") from error


def _read_checkpoint(path: Path) -> Checkpoint:
    from .timm_weights import load_timm
    from .weights import is_own, load_checkpoint

    if path.suffix == ".safetensors" and is_own(path):
        return load_checkpoint(path)
    return load_timm(path)


def _xception(checkpoint: Checkpoint, size: int | None, name: str) -> Model:
    from .from_torch import from_torch
    from .xception import check_size

    spec = checkpoint.input_spec if size is None else resized(checkpoint.input_spec, size)
    check_size(spec.height, spec.width)
    graph = from_torch(checkpoint.module, spec, name=name)
    return Model(graph, spec, checkpoint.labels, checkpoint.provenance)


def _architecture(path: Path, size: int | None, architecture: str) -> Model:
    from .from_torch import from_torch
    from .timm_architecture import load_architecture

    module, spec, provenance = load_architecture(path, architecture)
    spec = spec if size is None else resized(spec, size)
    graph = from_torch(module, spec, name=path.name.split(".")[0])
    labels = tuple(str(i) for i in range(graph.type_of(graph.outputs[0]).shape[-1]))
    return Model(graph, spec, labels, provenance)


def _random_xception(size: int | None) -> Model:
    import torch

    from .weights import Checkpoint
    from .xception import Xception

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        module = Xception().eval()
    labels = tuple(str(i) for i in range(module.classifier.out_features))
    provenance = {"kind": "Xception", "weights": "random, seed 0"}
    return _xception(Checkpoint(module, keras_input_spec(), labels, provenance), size, "xception")


def resized(spec: InputSpec, size: int) -> InputSpec:
    """The spec for a square input of ``size`` pixels; a resize before cropping keeps its proportion to the input."""
    resize = spec.resize and max(size, spec.resize * size // min(spec.height, spec.width))
    return replace(spec, height=size, width=size, resize=resize).with_origin("given", "size")


def _keras(path: Path, size: int | None) -> Model:
    """A model by its config; weights alone as Keras' own Xception."""
    from .from_keras import from_keras
    from .keras_file import read_keras
    from .keras_weights import load_weights

    file, name = read_keras(path), path.name.split(".")[0]
    if file.config is None:
        return _xception(load_weights(file), size, name)
    imported = from_keras(file, size, name=name)
    model = _bare_model(imported.graph, path, "Keras model")
    return replace(model, input_spec=imported.input_spec, provenance=model.provenance | imported.notes)


def _is_program(path: Path) -> bool:
    """Whether it is what ``torch.export.save`` writes, under a name that says so or says no more than PyTorch."""
    from .exported_program import is_program

    return path.suffix == ".pt2" or (path.suffix in (".pt", ".pth") and is_program(path))


def _program(path: Path) -> Model:
    """An exported program; what it was trained on is unknown, so pixels are taken in [-1, 1] as Xception's are."""
    from .exported_program import load_graph

    return _bare_model(load_graph(path, path.stem), path, "exported program")


def _onnx(path: Path, size: int | None) -> Model:
    """Likewise of a float ONNX network."""
    from .from_onnx import load_onnx

    network = load_onnx(path, size)
    # Exporters call every graph main_graph.
    model = _bare_model(replace(network.graph, name=path.stem), path, "ONNX")
    told = {f"sha256 of {each.name}": file_sha256(each) for each in network.files}
    spec = model.input_spec if size is None else model.input_spec.with_origin("given", "size")
    if network.scaling is not None:
        try:
            unit, mean, std = network.scaling.normalization()
        except ValueError as error:
            raise ModelError(f"{path}: {error}") from error
        spec = replace(spec, mean=mean, std=std).with_origin("file", "mean", "std")
        if not network.scaling.whole:
            told["assumed"] = f"the file's own scaling takes pixels from 0 to {unit}"
    if network.softmax:
        told["left out"] = "the softmax at the end: outputs are logits"
    return replace(model, input_spec=spec, provenance=model.provenance | told)


def _bare_model(graph: Graph, path: Path, kind: str) -> Model:
    """A graph without a model card: an image in [-1, 1] goes in, (1, classes) comes out."""
    shape, out = graph.inputs[0].type.shape, graph.type_of(graph.outputs[0]).shape
    if len(graph.inputs) != 1 or len(shape) != 4 or shape[0] != 1 or shape[3] not in (1, 3):
        raise ModelError(
            f"{path}: takes {[list(n.type.shape) for n in graph.inputs]}; "
            "one image is needed, (1, H, W, 3) or (1, H, W, 1)"
        )
    if len(graph.outputs) != 1 or len(out) != 2:
        made = ", ".join(f"{name} {list(graph.type_of(name).shape)}" for name in graph.outputs)
        raise ModelError(
            f"{path}: has {len(graph.outputs)} outputs: {made}; export a network that returns one, (1, classes)"
        )
    labels = tuple(str(i) for i in range(out[1]))
    scaling = (0.5,) * shape[3]
    spec = InputSpec(shape[1], shape[2], scaling, scaling).with_origin("assumed").with_origin("file", "size")
    return Model(graph, spec, labels, provenance_of(path, kind))
