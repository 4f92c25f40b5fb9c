"""Keras' layers as operators of the graph: what each entry of a layer's config means, and which are refused.

Every entry that means something at inference is read, the others must be idle: an activation, a dilation or an option
of a later Keras is never dropped. Weights are read under their names and must have the shapes that the config means.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import graph as ir
from .graph_builder import END_AT_LOGITS, NO_PADS, Array, GraphBuilder, Origin, Value
from .keras_config import Layer
from .keras_file import KerasFile
from .keras_tensors import LayerTensors
from .preprocess import InputSpec
from .weights import CheckpointError

SUPPORTED = (
    "Conv2D, SeparableConv2D, DepthwiseConv2D, BatchNormalization, ReLU, MaxPooling2D, Add, ZeroPadding2D before a "
    "convolution, global pooling, Flatten, Dense, Softmax at the end, Rescaling, Normalization, Dropout, augmentation"
)
MOST_VALUES = 2**28  # of one tensor: far above any of Xception's; a few digits of a config may mean any size
_BACKEND_EPSILON = 1e-7  # keras.config.epsilon(), in Normalization

# Layers that hand on what they get, at inference (keras/src/layers/regularization, preprocessing/image_preprocessing).
# RandomCrop cuts and CenterCrop, Resizing, Equalization and others compute at inference, too.
TRAINING_ONLY = frozenset(
    {
        *("Dropout", "SpatialDropout2D", "AlphaDropout", "GaussianDropout", "GaussianNoise", "ActivityRegularization"),
        *("AugMix", "CutMix", "MixUp", "RandAugment", "RandomBrightness", "RandomColorDegeneration"),
        *("RandomColorJitter", "RandomContrast", "RandomElasticTransform", "RandomErasing", "RandomFlip"),
        *("RandomGaussianBlur", "RandomGrayscale", "RandomHeight", "RandomHue", "RandomInvert", "RandomPerspective"),
        *("RandomPosterization", "RandomRotation", "RandomSaturation", "RandomSharpness", "RandomShear"),
        *("RandomTranslation", "RandomWidth", "RandomZoom"),
    }
)

# Entries of a layer's config that change nothing at inference. So does any entry that is None, False or empty.
_IDLE = frozenset(
    {
        *("name", "trainable", "dtype", "batch_input_shape", "batch_shape", "input_dtype", "momentum", "fused"),
        *("synchronized", "renorm_momentum", "lora_alpha"),
    }
)
_IDLE_ENDINGS = ("_initializer", "_regularizer", "_constraint")
_FLOATS = frozenset({"float16", "bfloat16", "float32", "float64", "mixed_float16", "mixed_bfloat16"})

REASONS = {
    "Lambda": "it holds code, which is not executed; build the model without it, or with a layer that does the same",
    **dict.fromkeys(
        ("Resizing", "CenterCrop", "RandomCrop", "Cropping2D"),
        "it cuts or resizes images within the network; build the model from the layer behind it, and images are "
        "resized to its input",
    ),
    **dict.fromkeys(
        ("sigmoid", "tanh", "softplus", "exponential", "log_softmax", "softsign", "hard_sigmoid", "Sigmoid"),
        "only linear outputs and softmax at the end are; " + END_AT_LOGITS.replace("the network", "the model"),
    ),
}

Scale = NDArray[np.float64]  # a factor or an offset per channel


@dataclass(frozen=True)
class Pixels:
    """The image before the network: ``scale * pixel + offset``, or None while nothing has scaled it."""

    shape: tuple[int, ...]
    scaling: tuple[Scale, Scale] | None


@dataclass(frozen=True)
class Tensor:
    """``shape`` is Keras', without the batch: (H, W, C) or (C,). ``flat`` is the map that a Flatten has made (C,) of,
    whose ``value`` is the map still. ``softmax`` is the layer whose softmax was left out."""

    value: Value
    shape: tuple[int, ...]
    flat: tuple[int, ...] | None = None
    softmax: Origin | None = None


Operand = Any  # a Pixels, a Tensor, a number, a list of these


@dataclass
class Context:
    """What the layers of one import share. ``image`` is the graph's input, once a layer has read it, and ``input_spec``
    then says how its pixels are scaled; ``used`` are the paths of the arrays that were read."""

    file: KerasFile
    tensors: LayerTensors
    input_spec: InputSpec
    builder: GraphBuilder = field(default_factory=GraphBuilder)
    image: tuple[Pixels, Tensor] | None = None
    used: set[str] = field(default_factory=set)

    def tensor(self, operand: Operand, origin: Origin) -> Tensor:
        """An operand that is computed from the image; pixels become the graph's input."""
        if isinstance(operand, Pixels):
            return self._materialized(operand, origin)
        if not isinstance(operand, Tensor):
            raise origin.refuse(f"its operand is {operand!r:.80}, not a tensor that the network computed")
        return operand

    def _materialized(self, pixels: Pixels, origin: Origin) -> Tensor:
        """The graph's input: the image scaled as the layers in front say, and the input spec from now on."""
        if self.image is not None:
            if not _equal(self.image[0], pixels):
                raise origin.refuse("the image enters the network twice, scaled in two ways; scale it in one")
            return self.image[1]
        if pixels.scaling is not None:
            scale, offset = pixels.scaling
            if not (scale > 0).all() or not np.isfinite(scale).all() or not np.isfinite(offset).all():
                raise origin.refuse(
                    f"the layers before it scale pixels by {_figures(scale)}; a positive factor per channel is needed"
                )
            # scale * pixel + offset is (pixel / 255 - mean) / std; the digits that 1 / 127.5 lost are given back.
            std = tuple(round(1 / (255 * float(each)), 12) for each in scale)
            mean = tuple(round(-float(b) / (255 * float(a)), 12) + 0.0 for a, b in zip(scale, offset, strict=True))
            self.input_spec = replace(self.input_spec, mean=mean, std=std).with_origin("file", "mean", "std")
        height, width, channels = pixels.shape
        value = self.builder.input("image", (1, channels, height, width), Origin("", "image", "InputLayer"))
        tensor = Tensor(value, pixels.shape)
        self.image = (pixels, tensor)
        return tensor


def _equal(a: Pixels, b: Pixels) -> bool:
    if a.scaling is None or b.scaling is None:
        return a.scaling is b.scaling
    return all(np.array_equal(x, y) for x, y in zip(a.scaling, b.scaling, strict=True))


def by(shape: tuple[int, ...]) -> str:
    """A shape for people."""
    return "x".join(map(str, shape))


def _figures(values: Scale) -> str:
    return ", ".join(f"{value:.6g}" for value in values)


@dataclass
class Use:
    """One call of a layer, and what of its config has not been read yet: what is left at the end must mean nothing."""

    context: Context
    layer: Layer
    operands: list[Operand]
    origin: Origin
    unread: dict[str, Any] = field(default_factory=dict)

    @property
    def builder(self) -> GraphBuilder:
        return self.context.builder

    def take(self, key: str, default: Any = None) -> Any:
        """An entry of the config; None counts as left out."""
        value = self.unread.pop(key, None)
        return default if value is None else value

    def pair(self, key: str, default: Any) -> tuple[int, int]:
        """Two positive whole numbers, or one for both."""
        value = self.take(key, default)
        both = [value, value] if type(value) is int else value
        if not isinstance(both, list | tuple) or len(both) != 2 or not all(type(n) is int and n > 0 for n in both):
            raise self.origin.refuse(f"its {key} is {value!r:.80}; two whole numbers are needed")
        return both[0], both[1]

    def want(self, key: str, *values: Any) -> None:
        """Refuses the layer unless this entry is left out or one of ``values``."""
        value = self.take(key, values[0])
        if not any(type(value) is type(each) and value == each for each in values):
            raise self.origin.refuse(f"its {key} is {value!r:.80}; only {values[0]!r} is supported")

    def finish(self) -> None:
        """Refuses the layer where an entry of its config was not understood."""
        dtype = self.take("dtype", "float32")
        policy = dtype["config"]["name"] if isinstance(dtype, dict) else dtype
        if policy not in _FLOATS:
            raise self.origin.refuse(f"it computes in {policy!r:.80}; give the model before it was quantized")
        for key, value in self.unread.items():
            idle = key in _IDLE or key.endswith(_IDLE_ENDINGS)
            if not idle and value not in (None, False, "", [], {}):
                raise self.origin.refuse(f"its {key} is {value!r:.80}, which is not understood here; save it without")

    def source(self) -> Tensor:
        """The layer's one operand, a tensor that is no probability and no flattened map."""
        tensor = self.any_source()
        if tensor.flat is not None:
            raise self.origin.refuse(
                f"it follows a flattened map of {by(tensor.flat)}; only dropout, ReLU and Dense can, or pool the map"
            )
        return tensor

    def any_source(self) -> Tensor:
        if len(self.operands) != 1:
            raise self.origin.refuse(f"it is called with {len(self.operands)} tensors; one is needed")
        return self.plain(self.operands[0])

    def plain(self, operand: Operand) -> Tensor:
        tensor = self.context.tensor(operand, self.origin)
        if tensor.softmax is not None:
            raise tensor.softmax.refuse(
                f"{self.origin.path} ({self.layer.kind}) follows it; only the output can be one"
            )
        return tensor

    def a_map(self) -> Tensor:
        """The one operand, (H, W, C)."""
        self.want("data_format", "channels_last")
        tensor = self.source()
        if len(tensor.shape) != 3:
            raise self.origin.refuse(f"on a tensor of shape {list(tensor.shape)}; it needs (height, width, channels)")
        return tensor

    def made(self, value: Value, rank: int = 3) -> Tensor:
        """What the builder made, as Keras shapes it: of ``rank`` 3, a pooled tensor is a map of 1x1."""
        _, channels, *size = self.builder.shape(value)
        if math.prod((channels, *size)) > MOST_VALUES:
            raise self.origin.refuse(f"it makes a map of {by((*size, channels))}, which no network here needs")
        return Tensor(value, (*(size or (1, 1)), channels) if rank == 3 else (channels,))

    def weights(self, *names: str) -> list[tuple[str, Array]]:
        """The layer's tensors of these names, in Keras' order of them. Raises CheckpointError for others."""
        file, tensors = self.context.file, self.context.tensors
        found = dict(tensors.by_layer.get(self.layer.path, {}))
        keys = {name: str(number) if tensors.numbered else name for number, name in enumerate(names)}
        if not tensors.numbered and "depthwise_kernel" in found and "kernel" in keys:
            found["kernel"] = found.pop("depthwise_kernel")  # Keras 2's name in a DepthwiseConv2D
        if missing := [name for name, key in keys.items() if key not in found]:
            raise CheckpointError(
                f"lacks {missing[0]} of layer {self.layer.path} ({self.layer.kind}), which its config has; save the "
                "model again",
                file.path,
                self.layer.path,
            )
        if extra := sorted(set(found) - set(keys.values())):
            raise CheckpointError(
                f"has {found[extra[0]][0]}, which layer {self.layer.path} ({self.layer.kind}) of its config has not; "
                "save the model again",
                file.path,
                self.layer.path,
            )
        self.context.used |= {path for path, _ in found.values()}
        return [(f"{self.layer.path}/{name}", found[key][1]) for name, key in keys.items()]

    def shaped(self, weight: tuple[str, Array], *shape: int) -> tuple[str, Array]:
        """A tensor of the shape that the config means. Raises CheckpointError for another."""
        if weight[1].shape != shape:
            raise CheckpointError(
                f"has {weight[0]} of shape {list(weight[1].shape)}, its config means {list(shape)}; with --input-size, "
                "give the size that the model was made for",
                self.context.file.path,
                self.layer.path,
            )
        return weight

    def activated(self, tensor: Tensor) -> Tensor:
        """With the layer's own activation."""
        return self.activation(tensor, self.take("activation", "linear"), f"{self.layer.path}/activation")

    def activation(self, tensor: Tensor, name: Any, node: str) -> Tensor:
        if isinstance(name, dict) and name.get("registered_name") in (None, "function", name.get("config")):
            name = name.get("config") if name.get("module") in (None, "keras.activations") else name
        origin = replace(self.origin, name=node)
        match name:
            case "linear":
                return tensor
            case "relu":
                return replace(tensor, value=self.builder.relu(tensor.value, origin))
            case "softmax":
                return replace(tensor, softmax=self.origin)
        reason = REASONS.get(name) if isinstance(name, str) else None
        shown = name if isinstance(name, str) else f"{name!r:.80}"
        raise self.origin.refuse(f"its activation is {shown}; {reason or 'relu, linear and softmax at the end are'}")


def _convolved(
    use: Use,
    tensor: Tensor,
    kernel: tuple[str, Array],
    bias: tuple[str, Array] | None,
    strides: tuple[int, int],
    padding: ir.Pads,
    groups: int,
    name: str,
) -> Tensor:
    """``kernel`` as Keras has it, (KH, KW, I / groups, O)."""
    weights = (kernel[0], kernel[1].transpose(3, 2, 0, 1))
    origin = replace(use.origin, name=name, path=name)
    value = use.builder.conv2d(
        tensor.value, weights, bias, strides=strides, padding=padding, dilation=(1, 1), groups=groups, origin=origin
    )
    return use.made(value)


def _window(use: Use, tensor: Tensor, kernel: tuple[int, int], strides: tuple[int, int]) -> ir.Pads:
    """The padding that the config names."""
    mode = use.take("padding", "valid")
    if mode not in ("valid", "same"):
        raise use.origin.refuse(f"its padding is {mode!r:.80}; valid and same are supported")
    if mode == "valid":
        return NO_PADS
    rows, columns = (ir.same_padding(s, k, d) for s, k, d in zip(tensor.shape[:2], kernel, strides, strict=True))
    return (*rows, *columns)


def _conv2d(use: Use) -> Tensor:
    tensor, filters = use.a_map(), use.take("filters")
    size, strides = use.pair("kernel_size", None), use.pair("strides", 1)
    groups, with_bias = use.take("groups", 1), use.take("use_bias", True)
    _refuse_dilation(use)
    kernel, *bias = use.weights("kernel", *(["bias"] if with_bias else []))
    if type(groups) is not int or not 0 < groups <= tensor.shape[2]:
        raise use.origin.refuse(f"it has {groups!r:.80} groups of {tensor.shape[2]} channels")
    use.shaped(kernel, *size, tensor.shape[2] // groups, filters)
    padding = _window(use, tensor, size, strides)
    made = _convolved(use, tensor, kernel, _bias(use, bias, filters), strides, padding, groups, use.layer.path)
    return _finished(use, made)


def _bias(use: Use, bias: list[tuple[str, Array]], channels: int) -> tuple[str, Array] | None:
    return use.shaped(bias[0], channels) if bias else None


def _refuse_dilation(use: Use) -> None:
    rate = use.pair("dilation_rate", 1)
    if rate != (1, 1):
        raise use.origin.refuse(f"its dilation_rate is {list(rate)}; only 1 is supported")


def _finished(use: Use, tensor: Tensor) -> Tensor:
    tensor = use.activated(tensor)
    use.finish()
    return tensor


def _depthwise_part(use: Use, tensor: Tensor, kernel: tuple[str, Array], bias: Any, name: str) -> Tensor:
    size, strides = use.pair("kernel_size", None), use.pair("strides", 1)
    _refuse_dilation(use)
    use.want("depth_multiplier", 1)
    channels = tensor.shape[2]
    use.shaped(kernel, *size, channels, 1)
    padding = _window(use, tensor, size, strides)
    as_grouped = (kernel[0], kernel[1].transpose(0, 1, 3, 2))
    return _convolved(use, tensor, as_grouped, bias, strides, padding, channels, name)


def _depthwise_conv2d(use: Use) -> Tensor:
    tensor = use.a_map()
    use.want("depth_multiplier", 1)
    kernel, *bias = use.weights("kernel", *(["bias"] if use.take("use_bias", True) else []))
    for key in ("filters", "groups"):  # Keras 2 writes those of the convolution that it is made from
        use.take(key)
    bias_ = _bias(use, bias, tensor.shape[2])
    return _finished(use, _depthwise_part(use, tensor, kernel, bias_, use.layer.path))


def _separable_conv2d(use: Use) -> Tensor:
    """Depthwise with the strides and the padding, then pointwise with the bias; nothing in between."""
    tensor, filters = use.a_map(), use.take("filters")
    names = ["bias"] if use.take("use_bias", True) else []
    depthwise, pointwise, *bias = use.weights("depthwise_kernel", "pointwise_kernel", *names)
    use.want("groups", 1)
    middle = _depthwise_part(use, tensor, depthwise, None, f"{use.layer.path}/depthwise")
    use.shaped(pointwise, 1, 1, middle.shape[2], filters)
    name = f"{use.layer.path}/pointwise"
    made = _convolved(use, middle, pointwise, _bias(use, bias, filters), (1, 1), NO_PADS, 1, name)
    return _finished(use, made)


def _dense(use: Use) -> Tensor:
    """Over the last axis: of a map, a 1x1 convolution; of a flattened map, a convolution over all of it."""
    tensor, units = use.any_source(), use.take("units")
    kernel, *bias = use.weights("kernel", *(["bias"] if use.take("use_bias", True) else []))
    use.shaped(kernel, tensor.shape[-1], units)
    bias_ = _bias(use, bias, units)
    if tensor.flat is not None or len(tensor.shape) == 3:
        window = tensor.flat or (1, 1, tensor.shape[2])
        as_window = (kernel[0], kernel[1].reshape(*window, units))
        made = _convolved(use, tensor, as_window, bias_, (1, 1), NO_PADS, 1, use.layer.path)
        if tensor.flat is not None:
            value = use.builder.reshape(made.value, (1, units), _named(use, "vector"))
            made = use.made(value, rank=1)
    else:
        weights = (kernel[0], kernel[1].T)
        made = use.made(use.builder.linear(tensor.value, weights, bias_, use.origin), rank=1)
    return _finished(use, made)


def _named(use: Use, part: str) -> Origin:
    return replace(use.origin, name=f"{use.layer.path}/{part}")


def _batch_normalization(use: Use) -> Tensor:
    tensor = use.source()
    axis = use.take("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(tensor.shape)):
        raise use.origin.refuse(f"its axis is {axis!r:.80}; only the last, the channels, is supported")
    scaled, centred = use.take("scale", True), use.take("center", True)
    names = [*(["gamma"] if scaled else []), *(["beta"] if centred else []), "moving_mean", "moving_variance"]
    channels = tensor.shape[-1]
    found = dict(zip(names, (use.shaped(each, channels) for each in use.weights(*names)), strict=True))
    mean, variance = found["moving_mean"], found["moving_variance"]
    epsilon = float(use.take("epsilon", 1e-3))
    gamma, beta = found.get("gamma"), found.get("beta")
    value = use.builder.batch_norm(tensor.value, gamma, beta, mean, variance, epsilon, use.origin)
    use.finish()
    return replace(tensor, value=value)


def _relu(use: Use) -> Tensor:
    """Of the layer, or of a function."""
    tensor = use.any_source()
    use.want("max_value", None)
    for key in ("negative_slope", "threshold"):
        use.want(key, 0.0, 0)
    use.finish()
    return replace(tensor, value=use.builder.relu(tensor.value, use.origin))


def _activation(use: Use) -> Tensor:
    tensor = use.activation(use.any_source(), use.take("activation", "linear"), use.layer.path)
    use.finish()
    return tensor


def _softmax(use: Use) -> Tensor:
    use.want("axis", -1)
    use.finish()
    return replace(use.any_source(), softmax=use.origin)


def _max_pooling(use: Use) -> Tensor:
    tensor = use.a_map()
    window = use.pair("pool_size", 2)
    return _finished_pooling(use, tensor, window, use.pair("strides", list(window)))


def _finished_pooling(use: Use, tensor: Tensor, window: tuple[int, int], strides: tuple[int, int]) -> Tensor:
    padding = _window(use, tensor, window, strides)
    use.finish()
    value = use.builder.max_pool(
        tensor.value,
        kernel=window,
        strides=strides,
        padding=padding,
        dilation=(1, 1),
        ceil_mode=False,
        origin=use.origin,
    )
    return use.made(value)


def _average_pooling(use: Use) -> Tensor:
    """Over the whole map only, where it is the global one."""
    tensor = use.a_map()
    window = use.pair("pool_size", 2)
    use.pair("strides", list(window))
    use.want("padding", "valid")
    use.finish()
    if tensor.shape[:2] != window:
        raise use.origin.refuse(f"its window is {by(window)} on a map of {by(tensor.shape[:2])}; only all of it is")
    return use.made(use.builder.global_average_pool(tensor.value, use.origin))


def _global_average_pooling(use: Use) -> Tensor:
    tensor, keep = use.a_map(), use.take("keepdims", False)
    use.finish()
    value = tensor.value
    if len(use.builder.shape(value)) == 4:
        value = use.builder.global_average_pool(value, use.origin)
    return use.made(value, rank=3 if keep else 1)


def _global_max_pooling(use: Use) -> Tensor:
    """A max pooling of one window, and the mean of its one pixel."""
    tensor, keep = use.a_map(), use.take("keepdims", False)
    use.finish()
    value = tensor.value
    if len(use.builder.shape(value)) == 4:
        window = tensor.shape[0], tensor.shape[1]
        value = use.builder.max_pool(
            value,
            kernel=window,
            strides=window,
            padding=NO_PADS,
            dilation=(1, 1),
            ceil_mode=False,
            origin=use.origin,
        )
        value = use.builder.global_average_pool(value, _named(use, "vector"))
    return use.made(value, rank=3 if keep else 1)


def _zero_padding(use: Use) -> Tensor:
    """Of one number, of two (height, width), or of two pairs (before, after)."""
    tensor, given = use.a_map(), use.take("padding", 1)
    use.finish()
    sides: Any = [given, given] if type(given) is int else given
    pairs = [[side, side] if type(side) is int else side for side in sides]
    amounts = [each for pair in pairs for each in pair]
    if [len(pair) for pair in pairs] != [2, 2] or not all(type(each) is int and each >= 0 for each in amounts):
        raise use.origin.refuse(f"its padding is {given!r:.80}; two whole numbers, or two pairs, are needed")
    top, bottom, left, right = amounts
    return use.made(use.builder.pad(tensor.value, (top, bottom, left, right), 0.0, use.origin))


def _flatten(use: Use) -> Tensor:
    tensor = use.a_map() if len(use.source().shape) == 3 else use.source()
    use.want("data_format", "channels_last")
    use.finish()
    if len(tensor.shape) == 1:
        return tensor
    count = int(np.prod(tensor.shape))
    if tensor.shape[:2] == (1, 1):
        return use.made(use.builder.reshape(tensor.value, (1, count), use.origin), rank=1)
    return replace(tensor, shape=(count,), flat=tensor.shape)


# --- Arithmetic, on pixels and within the network. ---


def _sum(use: Use) -> Operand:
    """Of tensors of one shape, or of a tensor and a number per channel."""
    if sum(isinstance(each, Tensor | Pixels) for each in use.operands) != len(use.operands):
        return _affine(use)
    tensors = [use.plain(each) for each in use.operands]
    use.finish()
    if len({tensor.shape for tensor in tensors}) != 1 or any(tensor.flat for tensor in tensors):
        shapes = ", ".join(by(tensor.shape) for tensor in tensors)
        raise use.origin.refuse(f"on shapes {shapes}; they must be equal")
    total = tensors[0]
    for index, other in enumerate(tensors[1:]):
        origin = _named(use, f"part {index}") if index < len(tensors) - 2 else use.origin
        total = replace(total, value=use.builder.add(total.value, other.value, origin))
    return total


def _affine(use: Use) -> Operand:
    """x + c, x - c, c - x, x * c, x / c with a constant c, one number or one per channel."""
    use.finish()
    tensors = [index for index, each in enumerate(use.operands) if isinstance(each, Tensor | Pixels)]
    if len(use.operands) != 2 or len(tensors) != 1:
        raise use.origin.refuse("only a tensor with a constant is supported, and addition of tensors")
    first = tensors[0] == 0
    x = use.operands[tensors[0]]
    c = _per_channel(use, use.operands[1 if first else 0], x.shape[-1])
    one, zero = np.ones_like(c), np.zeros_like(c)
    operator = use.layer.kind.rpartition(".")[2]
    if operator in ("Add", "add", "bias_add"):
        return _scaled(use, x, one, c)
    if operator in ("Subtract", "subtract", "sub"):
        return _scaled(use, x, one, -c) if first else _scaled(use, x, -one, c)
    if operator in ("Multiply", "multiply", "mul"):
        return _scaled(use, x, c, zero)
    if not first or not c.all():
        raise use.origin.refuse("a division by a tensor, or by zero")
    return _scaled(use, x, 1 / c, zero)


def _per_channel(use: Use, value: Any, channels: int) -> Scale:
    """One number, or one per channel, as a factor or offset for each."""
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.zeros((0,))
    while array.ndim > 1 and array.shape[0] == 1:
        array = array[0]
    if isinstance(value, bool) or array.shape not in ((), (1,), (channels,)) or not np.isfinite(array).all():
        raise use.origin.refuse(f"its constant is {value!r:.80}; one number is needed, or one per channel")
    return np.broadcast_to(array, (channels,)).copy()


def _scaled(use: Use, operand: Operand, factor: Scale, offset: Scale) -> Operand:
    """factor * x + offset: of pixels, preprocessing; within the network a normalization of variance 1."""
    if isinstance(operand, Pixels):
        scale, shift = operand.scaling or (np.ones_like(factor), np.zeros_like(factor))
        return replace(operand, scaling=(scale * factor, shift * factor + offset))
    tensor = use.plain(operand)
    if tensor.flat is not None:
        raise use.origin.refuse(f"it follows a flattened map of {by(tensor.flat)}; pool the map instead")
    one, zero = np.ones(tensor.shape[-1], np.float32), np.zeros(tensor.shape[-1], np.float32)
    gamma, beta = (f"{use.layer.path}/factor", factor), (f"{use.layer.path}/offset", offset)
    mean, variance = (f"{use.layer.path}/mean", zero), (f"{use.layer.path}/variance", one)
    value = use.builder.batch_norm(tensor.value, gamma, beta, mean, variance, 0.0, use.origin)
    return replace(tensor, value=value)


def _only(use: Use) -> Operand:
    if len(use.operands) != 1 or not isinstance(use.operands[0], Tensor | Pixels):
        raise use.origin.refuse(f"it is called with {len(use.operands)} tensors; one is needed")
    return use.operands[0]


def _rescaling(use: Use) -> Operand:
    x = _only(use)
    scale, offset = use.take("scale"), use.take("offset", 0.0)
    use.finish()
    channels = x.shape[-1]
    return _scaled(use, x, _per_channel(use, scale, channels), _per_channel(use, offset, channels))


def _normalization(use: Use) -> Operand:
    """(x - mean) / max(sqrt(variance), 1e-7) per channel; keras/src/layers/preprocessing/normalization.py."""
    x = _only(use)
    axis = use.take("axis", -1)
    axis = axis[0] if isinstance(axis, list) and len(axis) == 1 else axis
    if axis not in (-1, len(x.shape), None, []):
        raise use.origin.refuse(f"its axis is {axis!r:.80}; only the last, the channels, is supported, or none")
    use.want("invert", False)
    mean, variance = use.take("mean"), use.take("variance")
    if mean is None or variance is None:
        (_, mean), (_, variance), *_ = use.weights("mean", "variance", *_count(use))
    use.finish()
    channels = x.shape[-1]
    deviation = np.maximum(np.sqrt(_per_channel(use, variance, channels)), _BACKEND_EPSILON)
    return _scaled(use, x, 1 / deviation, -_per_channel(use, mean, channels) / deviation)


def _count(use: Use) -> list[str]:
    """A third tensor, how many images were seen: of integers in most files, which are not read."""
    found = use.context.tensors.by_layer.get(use.layer.path, {})
    return ["count"] if {"2", "count"} & set(found) else []


HANDLERS: dict[str, Callable[[Use], Operand]] = {
    "Conv2D": _conv2d,
    "SeparableConv2D": _separable_conv2d,
    "DepthwiseConv2D": _depthwise_conv2d,
    "Dense": _dense,
    "BatchNormalization": _batch_normalization,
    "ReLU": _relu,
    **dict.fromkeys(("Relu", "tf.nn.relu"), _relu),
    "Activation": _activation,
    "Softmax": _softmax,
    "MaxPooling2D": _max_pooling,
    "AveragePooling2D": _average_pooling,
    "GlobalAveragePooling2D": _global_average_pooling,
    "GlobalMaxPooling2D": _global_max_pooling,
    "ZeroPadding2D": _zero_padding,
    "Flatten": _flatten,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    **dict.fromkeys(("Add", "tf.math.add", "tf.__operators__.add"), _sum),
    **dict.fromkeys(("Subtract", "tf.math.subtract", "Multiply", "tf.math.multiply"), _affine),
    **dict.fromkeys(("TrueDivide", "Divide", "tf.math.truediv", "tf.math.divide", "tf.nn.bias_add"), _affine),
}
