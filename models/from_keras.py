"""A float Graph from a Keras model: what its config says is what is built, or it is refused by the layer's name.

Models within the model are inlined, shared layers become nodes of the same weights. What scales pixels in front of the
network becomes preprocessing; augmentation and dropout, which do nothing at inference, disappear; a softmax that is the
output is left out, so that the outputs are logits, and that is told. Keras itself is not needed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from . import graph as ir
from .graph_builder import Origin, UnsupportedLayer
from .keras_config import ConfigError, Layer, Network, Ref, parse_config, refs_in
from .keras_file import KerasFile
from .keras_layers import HANDLERS, MOST_VALUES, REASONS, SUPPORTED, TRAINING_ONLY, Context, Operand, Pixels, Use, by
from .keras_tensors import tensors_of
from .preprocess import InputSpec, keras_input_spec
from .weights import CheckpointError

DEFAULT_SIZE = 299  # where the model leaves it open: Xception's own
_MOST_CALLS = 10_000  # of layers: models that call models twice, and so on, would grow without end


@dataclass(frozen=True)
class KerasImport:
    """``notes`` are for the model's provenance: what was left out or not used."""

    graph: ir.Graph
    input_spec: InputSpec
    notes: dict[str, str]


def from_keras(file: KerasFile, size: int | None = None, *, name: str) -> KerasImport:
    """The model of a file that has a config. ``size``, in pixels, replaces its input's height and width.

    Raises UnsupportedLayer for what the graph cannot say, with the layer's path; CheckpointError for a config that is
    none, and for weights that are not the config's.
    """
    if file.config is None:
        raise CheckpointError("holds weights alone, without the model's config", file.path)
    try:
        return _imported(file, parse_config(file.config), size, name)
    except ConfigError as error:
        raise CheckpointError(str(error), file.path) from error
    except (UnsupportedLayer, CheckpointError):
        raise
    except (KeyError, TypeError, IndexError, AttributeError, ValueError, OverflowError, RecursionError) as error:
        raise CheckpointError(
            f"has a model's config that cannot be read ({error!r}); save it again", file.path
        ) from error


def _imported(file: KerasFile, network: Network, size: int | None, name: str) -> KerasImport:
    origin = Origin("", "model", "Model")
    if len(network.inputs) != 1:
        names = ", ".join(ref.layer for ref in network.inputs)
        raise origin.refuse(f"it takes {len(network.inputs)} inputs ({names}); give a model of one image")
    if len(network.outputs) != 1:
        names = ", ".join(ref.layer for ref in network.outputs)
        raise origin.refuse(
            f"it makes {len(network.outputs)} outputs ({names}); give a model of one, as "
            f"keras.Model(model.input, model.get_layer({network.outputs[-1].layer!r}).output)"
        )
    source = network.layer(network.inputs[0].layer)
    if source is None:
        raise ConfigError(f"has no layer {network.inputs[0].layer}, its input")
    spec = _input_spec(source, size)
    walk = _Walk(Context(file, tensors_of(file, network), spec))
    (result,) = walk.run(network, [Pixels(spec.shape[1:], None)])
    output = walk.context.tensor(result, origin)
    if output.flat is not None:
        raise origin.refuse(f"its output is a map of {by(output.flat)}, flattened; pool it, or end in a Dense")
    notes = {}
    if output.softmax is not None:
        notes["left out"] = f"the softmax of {output.softmax.path}: the outputs are logits"
    if unused := sorted(set(file.arrays) - walk.context.used):
        notes["unused tensors"] = f"{len(unused)} tensors that are not the network's, the first is {unused[0]}"
    graph = walk.context.builder.graph(name, (output.value,), origin)
    return KerasImport(graph, walk.context.input_spec, notes)


def _input_spec(source: Layer, size: int | None) -> InputSpec:
    """Of a model's input, as long as nothing has scaled its pixels."""
    origin = Origin(source.path, source.path, source.kind)
    given = source.config.get("batch_shape") or source.config.get("batch_input_shape")
    if not isinstance(given, list) or len(given) != 4 or given[3] not in (1, 3):
        raise origin.refuse(f"its shape is {given}; an image is needed, [None, height, width, 3], or 1 for grey")
    for length in given[1:3]:
        if length is not None and (type(length) is not int or length < 1):
            raise origin.refuse(f"its shape is {given}")
    if (given[1] is None) != (given[2] is None):
        raise origin.refuse(f"its shape is {given}; fix both sides or none")
    if (given[1] or 1) * (given[2] or 1) > MOST_VALUES:
        raise origin.refuse(f"its shape is {given}, which no network here needs")
    if source.config.get("sparse") or source.config.get("ragged"):
        raise origin.refuse("it is sparse or ragged; give a model of plain images")
    height, width, fact = given[1], given[2], "file"
    if size is not None:
        height = width = size
        fact = "given"
    elif height is None:
        height = width = DEFAULT_SIZE
        fact = "assumed"
    half = (0.5,) * given[3]
    spec = replace(keras_input_spec(), height=height, width=width, mean=half, std=half)
    return spec.with_origin(fact, "size")


class _Walk:
    """Goes through the calls of networks in networks."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.calls = 0

    def run(self, network: Network, inputs: list[Operand]) -> list[Operand]:
        """The network's outputs for these inputs. Only what an output needs is built."""
        values: dict[tuple[str, int], list[Operand]] = {
            (ref.layer, 0): [given] for ref, given in zip(network.inputs, inputs, strict=True)
        }
        layers = {layer.name: layer for layer in network.layers}
        for layer, index in _in_order(network, layers, set(values)):
            self.calls += 1
            call = layer.calls[index]
            origin = Origin(layer.path, layer.path, layer.kind)
            if self.calls > _MOST_CALLS:
                raise origin.refuse(f"the model calls more than {_MOST_CALLS} layers")
            operands = [_resolved(each, values) for each in call.operands]
            options = {key: _resolved(each, values) for key, each in call.options.items()}
            values[layer.name, index] = self._call(layer, _flattened(operands), options, origin)
        return [_result(values, ref) for ref in network.outputs]

    def _call(
        self, layer: Layer, operands: list[Operand], options: dict[str, Operand], origin: Origin
    ) -> list[Operand]:
        # TensorFlow's functions take their second operand as a keyword.
        operands += [options.pop(key) for key in ("y", "bias") if layer.kind.startswith("tf.") and key in options]
        if options:
            key = sorted(options)[0]
            raise origin.refuse(
                f"it is called with {key}={options[key]!r:.80}; only inference is supported, without it"
            )
        if layer.network is not None:
            if len(operands) != len(layer.network.inputs):
                raise origin.refuse(f"a model of {len(layer.network.inputs)} inputs, called with {len(operands)}")
            return self.run(layer.network, operands)
        if layer.kind in TRAINING_ONLY:
            return operands[:1]
        handler = HANDLERS.get(layer.kind)
        if handler is None:
            reason = f"there is no int8 form of it here; supported are {SUPPORTED}"
            raise origin.refuse(REASONS.get(layer.kind, reason))
        return [handler(Use(self.context, layer, operands, origin, dict(layer.config)))]


def _in_order(
    network: Network, layers: Mapping[str, Layer], given: set[tuple[str, int]]
) -> Iterator[tuple[Layer, int]]:
    """The calls that the outputs need, each behind those that it needs."""
    done = set(given)
    begun: set[tuple[str, int]] = set()
    waiting = [(ref.layer, ref.call) for ref in reversed(network.outputs)]
    while waiting:
        key = waiting[-1]
        layer = layers.get(key[0])
        if key in done:
            waiting.pop()
            continue
        if layer is None or not 0 <= key[1] < len(layer.calls):
            raise ConfigError(f"has no layer {key[0]} called {key[1] + 1} times, though another reads its result")
        call = layer.calls[key[1]]
        needed = {(ref.layer, ref.call) for ref in refs_in((call.operands, call.options))} - done
        if not needed:
            done.add(key)
            waiting.pop()
            yield layer, key[1]
        elif key in begun:
            raise ConfigError(f"has layer {key[0]} read its own result")
        else:
            begun.add(key)
            waiting += sorted(needed, reverse=True)


def _resolved(operand: Any, values: Mapping[tuple[str, int], list[Operand]]) -> Operand:
    if isinstance(operand, Ref):
        return _result(values, operand)
    if isinstance(operand, list | tuple):
        return [_resolved(each, values) for each in operand]
    if isinstance(operand, dict):
        return {key: _resolved(each, values) for key, each in operand.items()}
    return operand


def _result(values: Mapping[tuple[str, int], list[Operand]], ref: Ref) -> Operand:
    return values[ref.layer, ref.call][ref.tensor]


def _flattened(operands: list[Operand]) -> list[Operand]:
    """A layer's tensors, which come as one, as several, or as a list or dict of these; a list of numbers is one."""
    if len(operands) == 1 and isinstance(operands[0], dict):
        operands = list(operands[0].values())
    if len(operands) == 1 and isinstance(operands[0], list):
        return list(operands[0])
    return operands
