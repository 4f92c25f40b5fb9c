"""Valid int8 graphs with random weights, for the tests of every engine and backend.

A graph is quantized while it is built: every operator runs on a sample, in float and in integers, and its output's
scale and zero point are those that cover the sample, so that tensors use the whole int8 range and do not saturate.
After a convolution that a batch normalization would follow, channels have the mean and the spread that it gives them.

* ``random_operator_graph(kind, shape, ...)``: one operator, its inputs in full-range int8.
* ``random_xception(size, width, classes, seed)``: the structure of a quantized Xception.
* ``tie_graph(kind, shape, ...)``: one operator whose accumulators often land on an exact half.
* ``table_graph(shape, seed)``: a lookup in a random table.
* ``all_outputs(graph)``, ``differences(graph, inputs, outputs)``: every tensor against the reference.
* ``as_float(graph)``: the float graph of the same structure and (dequantized) weights.
* ``random_input(graph, seed)``, ``photo(height, width, seed)``: something to feed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xceptile.calibration.quantize import tie_free_params, without_multiplier_tie
from xceptile.models import graph as ir
from xceptile.runtime import arithmetic, reference

PIXELS = ir.PerTensor(1.0, -128)  # the network's input: real = pixel value


def f32(value: float) -> float:
    """The nearest float32, as the Python float that a scale is."""
    return float(np.float32(value))


INPUT_QUANT = ir.PerTensor(f32(0.023), 3)
OTHER_QUANT = ir.PerTensor(f32(0.037), -11)


def covering(values: np.ndarray) -> ir.PerTensor:
    """Scale and zero point that cover the values and zero."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = f32(max(high - low, 1e-6) / 255)
    return ir.PerTensor(scale, int(np.clip(round(-128 - low / scale), -128, 127)))


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Something like a photo, int8 pixels (1, H, W, 3): smooth shades with some noise, the whole range used."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (1, -(-height // 16), -(-width // 16), 3))
    smooth = coarse.repeat(16, axis=1).repeat(16, axis=2)[:, :height, :width]
    pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.int16)
    return (pixels - 128).astype(np.int8)


def random_input(graph: ir.Graph, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Uniform int8 for every int8 input of a graph, standard normal for every float one."""
    rng = np.random.default_rng(seed)
    return tuple(
        rng.integers(-128, 128, node.type.shape, np.int8)
        if node.type.dtype == "int8"
        else rng.standard_normal(node.type.shape, np.float32)
        for node in graph.inputs
    )


class Int8Builder:
    """Appends operators to a graph; each method returns the new tensor's name.

    ``normalize`` gives a convolution's channels random means and spreads of about one, as batch normalization does.
    """

    def __init__(self, name: str, seed: int = 0) -> None:
        self.name = name
        self.rng = np.random.default_rng(seed)
        self.nodes: list[ir.Node] = []
        self.constants: dict[str, ir.Constant] = {}
        self.values: dict[str, np.ndarray] = {}

    def quant(self, name: str) -> ir.PerTensor:
        return next(node for node in self.nodes if node.name == name).type.per_tensor

    def real(self, name: str) -> np.ndarray:
        """A tensor's sample in real values, float32."""
        q = self.quant(name)
        return ((self.values[name].astype(np.int32) - q.zero_point) * np.float32(q.scale)).astype(np.float32)

    def graph(self, *outputs: str) -> ir.Graph:
        return ir.Graph(self.name, tuple(self.nodes), self.constants, outputs or (self.nodes[-1].name,))

    def _name(self, base: str) -> str:
        return f"{base}_{sum(1 for node in self.nodes if node.name.rpartition('_')[0] == base)}"

    def input(self, sample: np.ndarray, quant: ir.PerTensor = PIXELS, name: str = "") -> str:
        name = name or self._name("input")
        self.nodes.append(ir.Node(name, ir.Input(), (), ir.TensorType(sample.shape, "int8", quant)))
        self.values[name] = sample
        return name

    def _append(
        self, base: str, op: ir.Op, inputs: tuple[str, ...], shape: tuple[int, ...], quant: ir.PerTensor, path: str
    ) -> str:
        name = self._name(base)
        node = ir.Node(name, op, inputs, ir.TensorType(shape, "int8", quant), path)
        self.nodes.append(node)
        args = [self.values[i] if i in self.values else self.constants[i].data for i in inputs]
        self.values[name] = reference.run_node(self.graph(), node, args)
        return name

    def _float(self, op: ir.Op, *args: np.ndarray) -> np.ndarray:
        names = tuple(str(i) for i in range(len(args)))
        inputs = [
            ir.Node(n, ir.Input(), (), ir.TensorType(a.shape, "float32")) for n, a in zip(names, args, strict=True)
        ]
        node = ir.Node("y", op, names, ir.TensorType((), "float32"))
        return reference.run_node(ir.Graph("", (*inputs, node), {}, ("y",)), node, list(args))

    def _weighted(
        self,
        base: str,
        op: ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected,
        x: str,
        weights: np.ndarray,
        axis: int,
        normalize: bool,
        quant: ir.PerTensor | None,
        path: str,
    ) -> str:
        """Given float weights; Result: int8 weights, a bias, and an output type that fits the sample."""
        channels = weights.shape[axis]
        y = self._float(replace(op, relu=False), self.real(x), weights, np.zeros(channels, np.float32))
        over_pixels = tuple(range(y.ndim - 1))
        if normalize:
            spread = np.abs(self.rng.normal(1.0, 0.25, channels)) + 0.05
            least = 0.1 * float(np.sqrt(np.mean(np.square(y)))) + 1e-6  # a channel of one pixel has no spread
            factor = spread / np.maximum(y.std(over_pixels), least)
            bias = self.rng.normal(0, 0.3, channels) - y.mean(over_pixels) * factor
        else:
            factor = np.ones(channels)
            bias = np.zeros(channels) if isinstance(op, ir.DepthwiseConv2d) else self.rng.normal(0, 0.1, channels)
        y = (y * factor + bias).astype(np.float32)
        others = tuple(i for i in range(weights.ndim) if i != axis)
        shape = [1] * weights.ndim
        shape[axis] = channels
        weights = weights * factor.reshape(shape)
        scales = np.maximum(np.abs(weights).max(axis=others) / 127, 1e-6).astype(np.float32)
        weights_q = np.clip(np.rint(weights / scales.reshape(shape)), -127, 127).astype(np.int8)
        bias_scales = arithmetic.f32_product(self.quant(x).scale, scales)
        bias_q = np.rint(bias / bias_scales.astype(np.float64)).astype(np.int32)
        quant = quant or covering(np.maximum(y, 0) if op.relu and (y > 0).any() else y)
        name = self._name(base)
        w_type = ir.TensorType(weights.shape, "int8", ir.PerAxis(tuple(map(float, scales)), axis))
        b_type = ir.TensorType((channels,), "int32", ir.PerAxis(tuple(map(float, bias_scales)), 0))
        self.constants[f"{name}.weight"] = ir.Constant(w_type, weights_q)
        self.constants[f"{name}.bias"] = ir.Constant(b_type, bias_q)
        return self._append(base, op, (x, f"{name}.weight", f"{name}.bias"), y.shape, quant, path)

    def conv(
        self,
        x: str,
        channels: int,
        kernel: tuple[int, int] = (1, 1),
        strides: tuple[int, int] = (1, 1),
        padding: ir.Pads = (0, 0, 0, 0),
        relu: bool = False,
        *,
        dilation: tuple[int, int] = (1, 1),
        normalize: bool = True,
        quant: ir.PerTensor | None = None,
        path: str = "",
    ) -> str:
        fan_in = kernel[0] * kernel[1] * self.values[x].shape[3]
        weights = self.rng.normal(0, fan_in**-0.5, (channels, *kernel, self.values[x].shape[3])).astype(np.float32)
        op = ir.Conv2d(strides, padding, relu, dilation)
        return self._weighted("conv", op, x, weights, 0, normalize, quant, path)

    def depthwise(
        self,
        x: str,
        kernel: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (1, 1),
        padding: ir.Pads = (1, 1, 1, 1),
        relu: bool = False,
        *,
        dilation: tuple[int, int] = (1, 1),
        normalize: bool = False,
        quant: ir.PerTensor | None = None,
        path: str = "",
    ) -> str:
        weights = self.rng.normal(0, 0.3, (*kernel, self.values[x].shape[3])).astype(np.float32)
        op = ir.DepthwiseConv2d(strides, padding, relu, dilation)
        return self._weighted("depthwise", op, x, weights, 2, normalize, quant, path)

    def fully_connected(
        self, x: str, classes: int, relu: bool = False, *, quant: ir.PerTensor | None = None, path: str = ""
    ) -> str:
        features = self.values[x].shape[1]
        weights = self.rng.normal(0, features**-0.5, (classes, features)).astype(np.float32)
        return self._weighted("linear", ir.FullyConnected(relu), x, weights, 0, False, quant, path)

    def relu(self, x: str, path: str = "") -> str:
        quant = ir.PerTensor(self.quant(x).scale, -128)
        return self._append("relu", ir.Relu(), (x,), self.values[x].shape, quant, path)

    def max_pool(
        self,
        x: str,
        kernel: tuple[int, int] = (3, 3),
        strides: tuple[int, int] = (2, 2),
        padding: ir.Pads | None = None,
        path: str = "",
    ) -> str:
        """``padding`` None is TensorFlow's SAME."""
        n, h, w, c = self.values[x].shape
        if padding is None:
            padding = (*ir.same_padding(h, kernel[0], strides[0]), *ir.same_padding(w, kernel[1], strides[1]))
        shape = (
            n,
            ir.conv_output_size(h, kernel[0], strides[0], *padding[:2]),
            ir.conv_output_size(w, kernel[1], strides[1], *padding[2:]),
            c,
        )
        return self._append("pool", ir.MaxPool2d(kernel, strides, padding), (x,), shape, self.quant(x), path)

    def add(self, a: str, b: str, relu: bool = False, *, quant: ir.PerTensor | None = None, path: str = "") -> str:
        y = self.real(a) + self.real(b)
        quant = quant or covering(np.maximum(y, 0) if relu else y)
        return self._append("add", ir.Add(relu), (a, b), y.shape, quant, path)

    def requantize(self, x: str, quant: ir.PerTensor, path: str = "") -> str:
        return self._append("requantize", ir.Lookup("identity"), (x,), self.values[x].shape, quant, path)

    def lookup(self, x: str, function: str, *parameters: float, quant: ir.PerTensor | None = None) -> str:
        """Quantized as the quantizer would."""
        y = self._float(ir.Lookup(function, parameters), self.real(x))
        fixed = arithmetic.FIXED_OUTPUTS.get(function)
        quant = quant or (ir.PerTensor(*fixed) if fixed else covering(y))
        if function == "leaky_relu":
            quant = without_multiplier_tie(self.quant(x).scale, quant, parameters[0])
        return self._append(function, ir.Lookup(function, parameters), (x,), y.shape, quant, "")

    def multiply(self, a: str, b: str, *, quant: ir.PerTensor | None = None) -> str:
        y = self._float(ir.Multiply(), self.real(a), self.real(b))
        return self._append("multiply", ir.Multiply(), (a, b), y.shape, quant or covering(y), "")

    def concatenate(self, *names: str) -> str:
        """Of tensors with equal parameters."""
        first = self.values[names[0]]
        shape = (*first.shape[:-1], sum(self.values[name].shape[-1] for name in names))
        return self._append("concatenate", ir.Concatenate(), names, shape, self.quant(names[0]), "")

    def resize(self, x: str, size: tuple[int, int], method: str, coordinates: str) -> str:
        n, _, _, c = self.values[x].shape
        op = ir.Resize(size, method, coordinates)
        return self._append("resize", op, (x,), (n, *size, c), self.quant(x), "")

    def reshape(self, x: str, shape: tuple[int, ...]) -> str:
        op = ir.Reshape(shape)
        return self._append("reshape", op, (x,), (self.values[x].shape[0], *shape), self.quant(x), "")

    def average_pool(self, x: str, *, quant: ir.PerTensor | None = None, path: str = "") -> str:
        """The output scale is nudged until every engine's mean agrees, as the quantizer guarantees."""
        y = self.real(x).mean(axis=(1, 2))
        quant = quant or covering(y)
        pixels = self.values[x].shape[1] * self.values[x].shape[2]
        quant = tie_free_params(self.quant(x), quant, pixels)
        return self._append("mean", ir.GlobalAveragePool(), (x,), y.shape, quant, path)


def random_operator_graph(
    kind: str,
    shape: tuple[int, ...],
    *,
    channels: int = 8,
    kernel: tuple[int, int] = (3, 3),
    strides: tuple[int, int] = (1, 1),
    padding: ir.Pads = (0, 0, 0, 0),
    relu: bool = False,
    dilation: tuple[int, int] = (1, 1),
    function: str = "identity",
    parameters: tuple[float, ...] = (),
    size: tuple[int, int] = (1, 1),
    method: str = "bilinear",
    coordinates: str = "half pixel",
    quant: ir.PerTensor | None = None,
    input_quant: ir.PerTensor = INPUT_QUANT,
    other_quant: ir.PerTensor = OTHER_QUANT,
    seed: int = 0,
) -> ir.Graph:
    """One operator on an int8 input of ``shape``: conv, depthwise, linear, relu, pool, add, requantize, mean, lookup,
    multiply, gate, concatenate, resize or reshape.

    ``channels`` are a convolution's or linear layer's outputs; ``quant`` is the output's where it is free (None: what
    fits); ``other_quant`` is the second summand's. Fields that do not matter to the kind are not looked at.
    """
    build = Int8Builder(kind, seed)
    rng = np.random.default_rng(seed + 1)
    x = build.input(rng.integers(-128, 128, shape, np.int8), input_quant)
    match kind:
        case "conv":
            build.conv(x, channels, kernel, strides, padding, relu, dilation=dilation, quant=quant)
        case "depthwise":
            build.depthwise(x, kernel, strides, padding, relu, dilation=dilation, normalize=True, quant=quant)
        case "linear":
            build.fully_connected(x, channels, relu, quant=quant)
        case "relu":
            build.relu(x)
        case "pool":
            build.max_pool(x, kernel, strides, padding)
        case "add":
            other = build.input(rng.integers(-128, 128, shape, np.int8), other_quant)
            build.add(x, other, relu, quant=quant)
        case "requantize":
            build.requantize(x, quant or other_quant)
        case "mean":
            build.average_pool(x, quant=quant)
        case "lookup":
            build.lookup(x, function, *parameters, quant=quant)
        case "multiply" | "gate":
            other_shape = shape if kind == "multiply" else (shape[0], shape[-1])
            build.multiply(x, build.input(rng.integers(-128, 128, other_shape, np.int8), other_quant), quant=quant)
        case "concatenate":
            more = [
                build.input(rng.integers(-128, 128, (*shape[:-1], count), np.int8), input_quant)
                for count in (channels, 5)
            ]
            build.concatenate(x, *more)
        case "resize":
            build.resize(x, size, method, coordinates)
        case "reshape":
            build.reshape(x, (int(np.prod(shape[1:])),))
        case _:
            raise ValueError(f"no such kind of operator: {kind}")
    return build.graph()


def tie_graph(kind: str, shape: tuple[int, ...], *, zero_point: int = 0, relu: bool = False, seed: int = 0) -> ir.Graph:
    """A conv (1x1), depthwise (3x3), linear, add or requantize whose scales are powers of two.

    Exact halves before rounding are then common: the multipliers of a convolution's channels are 2**-1 to 2**-6.
    """
    rng = np.random.default_rng(seed)
    target = ir.PerTensor(1.0, zero_point)
    source = ir.TensorType(shape, "int8", ir.PerTensor(0.5, 0))
    x = ir.Node("x", ir.Input(), (), source)
    if kind in ("add", "requantize"):
        others = (ir.Node("other", ir.Input(), (), source),) if kind == "add" else ()
        op: ir.Op = ir.Add(relu) if kind == "add" else ir.Lookup("identity")
        y = ir.Node("y", op, ("x", *(n.name for n in others)), ir.TensorType(shape, "int8", target))
        return ir.Graph(f"ties_{kind}", (x, *others, y), {}, ("y",))
    channels = shape[-1]
    op, weight_shape, axis = {
        "conv": (ir.Conv2d((1, 1), (0, 0, 0, 0), relu), (channels, 1, 1, channels), 0),
        "depthwise": (ir.DepthwiseConv2d((1, 1), (1, 1, 1, 1), relu), (3, 3, channels), 2),
        "linear": (ir.FullyConnected(relu), (channels, channels), 0),
    }[kind]
    scales = tuple(2.0 ** -int(e) for e in rng.integers(0, 6, channels))
    constants = {
        "w": ir.Constant(
            ir.TensorType(weight_shape, "int8", ir.PerAxis(scales, axis)), rng.integers(-3, 4, weight_shape, np.int8)
        ),
        "b": ir.Constant(
            ir.TensorType((channels,), "int32", ir.PerAxis(tuple(0.5 * s for s in scales), 0)),
            rng.integers(-100, 100, channels, np.int32),
        ),
    }
    y = ir.Node("y", op, ("x", "w", "b"), ir.TensorType(shape, "int8", target))
    return ir.Graph(f"ties_{kind}", (x, y), constants, ("y",))


def random_table(x: np.ndarray, seed: float) -> np.ndarray:
    """An int8 value, drawn by ``seed``, for each int8 value. ``table_graph`` wants it in ``arithmetic.FUNCTIONS``."""
    table = np.random.default_rng(int(seed)).integers(-128, 128, 256)
    return table[x.astype(np.int64) + 128].astype(np.float64)


def table_graph(shape: tuple[int, ...], seed: int) -> ir.Graph:
    """One ``Lookup`` whose table is random."""
    whole = ir.TensorType(shape, "int8", ir.PerTensor(1.0, 0))
    x = ir.Node("x", ir.Input(), (), whole)
    y = ir.Node("y", ir.Lookup("random_table", (float(seed),)), ("x",), whole)
    return ir.Graph("table", (x, y), {}, ("y",))


def all_outputs(graph: ir.Graph) -> ir.Graph:
    """The same graph with every computed tensor as an output, so that an engine shows them all."""
    return replace(graph, outputs=tuple(node.name for node in graph.nodes if node.inputs))


def differences(graph: ir.Graph, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> dict[str, int]:
    """How many elements of each of the graph's outputs differ from the reference; only tensors that differ."""
    got = dict(zip(graph.outputs, outputs, strict=True))
    feeds = {node.name: value for node, value in zip(graph.inputs, inputs, strict=True)}
    found = {}
    for name, value in reference.iterate(graph, feeds):
        if name in got:
            assert got[name].shape == value.shape, f"{name}: {got[name].shape} instead of {value.shape}"
            assert got[name].dtype == value.dtype, f"{name}: {got[name].dtype} instead of {value.dtype}"
            if count := int((got[name] != value).sum()):
                found[name] = count
    return found


def random_xception(
    size: int = 299, width: float = 1.0, classes: int = 1000, seed: int = 0, *, same_padding: bool = True
) -> ir.Graph:
    """A quantized Xception: normalizations folded, pixels in (scale 1, zero point -128), logits out.

    ``same_padding`` False pads the strided pools by one pixel on every side, as timm does. At 299x299 and width 1
    it takes several seconds; make it once per test session.
    """
    build = Int8Builder("xception", seed)

    def w(channels: int) -> int:
        return channels if width == 1.0 else max(8, round(channels * width / 8) * 8)

    def separable(x: str, channels: int, relu: bool, path: str) -> str:
        x = build.depthwise(x, path=f"{path}.depthwise")
        return build.conv(x, w(channels), relu=relu, path=f"{path}.pointwise")

    x = build.input(photo(size, size, seed), name="image")
    x = build.conv(x, w(32), (3, 3), (2, 2), relu=True, path="conv1")
    x = build.conv(x, w(64), (3, 3), relu=True, path="conv2")
    blocks = [(128, 128), (256, 256), (728, 728), *[(728, 728, 728)] * 8, (728, 1024)]
    for index, widths in enumerate(blocks):
        path = f"blocks.{index}"
        y = x if index == 0 else build.relu(x, path)
        for i, channels in enumerate(widths):
            y = separable(y, channels, i + 1 < len(widths), f"{path}.sepconvs.{i}")
        if len(widths) == 2:
            y = build.max_pool(y, padding=None if same_padding else (1, 1, 1, 1), path=f"{path}.pool")
            x = build.conv(x, w(widths[-1]), strides=(2, 2), path=f"{path}.shortcut")
        x = build.add(y, x, path=path)
    x = separable(x, 1536, True, "sepconv3")
    x = separable(x, 2048, True, "sepconv4")
    x = build.average_pool(x, path="mean")
    build.fully_connected(x, classes, path="classifier")
    return build.graph()


def as_float(graph: ir.Graph) -> ir.Graph:
    """Given an int8 graph; Result: the float32 graph of the same structure with the dequantized constants."""

    def real(constant: ir.Constant) -> ir.Constant:
        per_axis = constant.type.per_axis
        shape = [1] * constant.data.ndim
        shape[per_axis.axis] = -1
        data = (constant.data * np.asarray(per_axis.scales, np.float32).reshape(shape)).astype(np.float32)
        return ir.Constant(ir.TensorType(constant.type.shape, "float32"), data)

    nodes = tuple(replace(node, type=ir.TensorType(node.type.shape, "float32")) for node in graph.nodes)
    return replace(graph, nodes=nodes, constants={name: real(c) for name, c in graph.constants.items()})


def weights_at_the_bound(outputs: int, k: int) -> np.ndarray:
    """Every lane's four weights of one sign, their magnitudes 255 together, but for one lane in sixteen: 381."""
    rng = np.random.default_rng(0)
    lanes = rng.integers(0, 16, (outputs, -(-k // 32), 1, 8))
    links = np.where(lanes == 0, np.reshape([127, 127, 127, 0], (4, 1)), np.reshape([127, 1, 0, 127], (4, 1)))
    signs = rng.integers(0, 2, lanes.shape) * 2 - 1
    return (links * signs).reshape(outputs, -1)[:, :k].astype(np.int8)


def chained_graph() -> ir.Graph:
    """A pointwise convolution with such weights, whose output shows a lane that has overflowed."""
    graph = random_operator_graph("conv", (1, 13, 12, 352), channels=64, kernel=(1, 1), quant=ir.PerTensor(f32(0.3), 3))
    (name,) = (node.inputs[1] for node in graph.nodes if node.inputs)
    data = weights_at_the_bound(64, 352).reshape(64, 1, 1, 352)
    return replace(graph, name="chained", constants=graph.constants | {name: replace(graph.constants[name], data=data)})
