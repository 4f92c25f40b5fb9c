"""The config of a Keras model (``config.json``, ``model_config``) as a graph of layers and calls, in one form.

Keras 2 and 3 write it differently, and a Sequential differently from a Functional; models nest. Here a network is
layers, each with the calls that are made of it, and what goes in and comes out. Nothing is looked up or imported by
what a config says: words are compared with those that are known, the rest is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from .graph_builder import UnsupportedLayer
from .visible import CONTROLS

MODELS = ("Functional", "Model", "Sequential")  # Model: what Keras called Functional up to 2.3
_PACKAGES = ("keras", "tf_keras", "tensorflow")
_NAME_LENGTH = 200


class ConfigError(ValueError):
    """A config that cannot be read. The message is a clause without the file's name."""


@dataclass(frozen=True)
class Ref:
    """A tensor of a network: the result ``tensor`` of a layer's call number ``call``."""

    layer: str
    call: int = 0
    tensor: int = 0


@dataclass(frozen=True)
class Call:
    """One use of a layer. ``operands`` are Refs, numbers, or nested lists of these; ``options`` the keywords that are
    neither None nor False."""

    operands: tuple[Any, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class Layer:
    """``kind`` is Keras' class, or ``tf.`` and the function's name of a TFOpLambda. ``path`` is the names of the models
    that it lies in and its own, with slashes."""

    name: str
    path: str
    kind: str
    config: Mapping[str, Any]
    calls: tuple[Call, ...]
    network: Network | None = None  # of a layer that is a model


@dataclass(frozen=True)
class Network:
    """A model. ``layers`` in the config's order, by which the files number them."""

    name: str
    sequential: bool
    layers: tuple[Layer, ...]
    inputs: tuple[Ref, ...]
    outputs: tuple[Ref, ...]

    def layer(self, name: str) -> Layer | None:
        return next((layer for layer in self.layers if layer.name == name), None)


def parse_config(text: str) -> Network:
    """The network of a model's JSON.

    Raises ConfigError where it is no config of a model, UnsupportedLayer for a layer that no Keras has.
    """
    unreadable = (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, RecursionError)
    try:
        model = json.loads(text)
        if model["class_name"] not in MODELS:
            raise ConfigError(f"is a {model['class_name']}, not a Functional or Sequential model; build it as one")
        return _network(model, "")
    except (ConfigError, UnsupportedLayer):
        raise
    except unreadable as error:
        raise ConfigError(f"has a model's config that cannot be read ({error!r}); save it again") from error


def _network(model: Mapping[str, Any], path: str) -> Network:
    config = model["config"]
    sequential = model["class_name"] == "Sequential"
    if isinstance(config, list):  # Sequential before Keras 2.2.3
        config = {"name": "sequential", "layers": config}
    if "layers" not in config:
        raise UnsupportedLayer(path, model["class_name"], "a model of a class of its own; build it as a Functional one")
    name = str(config.get("name") or "model")
    layers = tuple(_layer(each, path) for each in config["layers"])
    if len({layer.name for layer in layers}) != len(layers):
        raise ConfigError(f"has two layers of one name in {path or name}; save it again")
    if sequential:
        return _chain(name, layers, config.get("build_input_shape"))
    network = Network(name, False, layers, _refs(config["input_layers"]), _refs(config["output_layers"]))
    return _renumbered(network)


def _layer(entry: Mapping[str, Any], path: str) -> Layer:
    config, kind = entry["config"], str(entry["class_name"])
    name = config["name"] if isinstance(config, dict) and "name" in config else entry.get("name", kind)
    if not isinstance(name, str) or CONTROLS.search(name) or not 0 < len(name) <= _NAME_LENGTH:
        raise ConfigError(f"has a layer of the name {str(name)[:80]!r}; give it a plain one")
    place = f"{path}/{name}" if path else name
    _refuse_custom(entry, place, kind)
    calls = tuple(_call(node) for node in entry.get("inbound_nodes", ()))
    if kind in MODELS:
        return Layer(name, place, kind, {}, calls, _network(entry, place))
    if kind == "TFOpLambda":
        kind = f"tf.{config['function']}"
        config = {key: value for key, value in config.items() if key != "function"}
    return Layer(name, place, kind, config, calls)


def _refuse_custom(entry: Mapping[str, Any], place: str, kind: str) -> None:
    """Whose code is not in the file. ``registered_name`` is PACKAGE>CLASS of what users register."""
    module, registered = entry.get("module"), entry.get("registered_name")
    foreign = module is not None and str(module).split(".")[0] not in _PACKAGES
    if foreign or (registered is not None and registered != kind):
        owner = registered if isinstance(registered, str) and registered != kind else module
        reason = f"it is a layer of {str(owner)[:80]}, whose code is not executed; build it from Keras' own layers"
        raise UnsupportedLayer(place, kind, reason)


def _chain(name: str, layers: tuple[Layer, ...], built_for: Any) -> Network:
    """A Sequential: each layer called with the one before. Without an input of its own, its first layer says the shape,
    the model that is its first layer, or what it was built for."""
    first = layers[0]
    if first.kind != "InputLayer":
        shape = first.config.get("batch_shape") or first.config.get("batch_input_shape") or built_for
        if first.network is not None:
            shape = _input_shape(first.network)
        source = f"{name} input"
        layers = (Layer(source, source, "InputLayer", {"name": source, "batch_shape": shape}, ()), *layers)
    linked = [layers[0]]
    for layer in layers[1:]:
        linked.append(replace(layer, calls=(Call((Ref(linked[-1].name),), {}),)))
    return Network(name, True, tuple(linked), (Ref(linked[0].name),), (Ref(linked[-1].name),))


def _input_shape(network: Network) -> Any:
    source = network.layer(network.inputs[0].layer)
    config = {} if source is None else source.config
    return config.get("batch_shape") or config.get("batch_input_shape")


# --- Calls. ---


def _call(node: Any) -> Call:
    """Keras 3 writes {args, kwargs}; Keras 2 [tensor, ...], and of a function its one tensor without the list. A tensor
    of Keras 2 is [layer, call, result], of a layer's call with the keywords as a fourth."""
    if isinstance(node, dict):
        operands, options = node["args"], dict(node.get("kwargs", {}))
        options.pop("training", None)  # a default that was written down: predict() says False to every layer
    else:
        tensors = [node] if node and isinstance(node[0], str) else node
        refs = [tensor[:3] for tensor in tensors]
        operands = refs if len(refs) == 1 else [refs]
        options = {key: value for tensor in tensors for key, value in (tensor[3] if len(tensor) > 3 else {}).items()}
    given = {key: _operand(value) for key, value in options.items() if value is not None and value is not False}
    given.pop("name", None)  # of TensorFlow's functions
    return Call(tuple(_operand(each) for each in operands), given)


def _operand(value: Any) -> Any:
    if isinstance(value, list):
        if len(value) == 3 and value[0] == "_CONSTANT_VALUE":  # TensorFlow's, of an operand that is no tensor
            return value[2]
        is_ref = len(value) == 3 and isinstance(value[0], str) and all(type(each) is int for each in value[1:])
        return Ref(*value) if is_ref else [_operand(each) for each in value]
    if isinstance(value, dict) and value.get("class_name") == "__keras_tensor__":
        return Ref(*value["config"]["keras_history"])
    if isinstance(value, dict) and value.get("class_name") in ("__tensor__", "__numpy__"):
        return value["config"]["value"]
    if isinstance(value, dict) and "class_name" not in value:
        return {key: _operand(each) for key, each in value.items()}
    return value


def _refs(value: Any) -> tuple[Ref, ...]:
    """Inputs or outputs: one tensor, or lists and dicts of them."""
    return tuple(refs_in(_operand(value)))


def refs_in(operand: Any) -> Iterator[Ref]:
    """The tensors of an operand, in order."""
    if isinstance(operand, Ref):
        yield operand
    elif isinstance(operand, list | tuple):
        for each in operand:
            yield from refs_in(each)
    elif isinstance(operand, dict):
        for each in operand.values():
            yield from refs_in(each)


def _renumbered(network: Network) -> Network:
    """Calls counted from 0. A model's own are counted from 1 where it had made a tensor by itself before (all models of
    Keras 2, the Functional ones of Keras 3); a config keeps only calls that are used, so the largest number says it."""
    used = [*network.inputs, *network.outputs]
    used += [ref for layer in network.layers for call in layer.calls for ref in refs_in((call.operands, call.options))]
    most: dict[str, int] = {}
    for ref in used:
        most[ref.layer] = max(most.get(ref.layer, 0), ref.call)
    first = {x.name: max(most.get(x.name, 0) - len(x.calls) + 1, 0) for x in network.layers if x.network is not None}

    def counted(operand: Any) -> Any:
        if isinstance(operand, Ref):
            return replace(operand, call=operand.call - first.get(operand.layer, 0))
        if isinstance(operand, list | tuple):
            return type(operand)(counted(each) for each in operand)
        if isinstance(operand, dict):
            return {key: counted(each) for key, each in operand.items()}
        return operand

    layers = tuple(
        replace(x, calls=tuple(Call(counted(c.operands), counted(c.options)) for c in x.calls)) for x in network.layers
    )
    return replace(network, layers=layers, inputs=counted(network.inputs), outputs=counted(network.outputs))
