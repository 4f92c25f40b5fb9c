"""Float graphs as an importer makes them, with random weights and the batch statistics that training would leave.

Each operator runs on a sample while the graph is built; a batch normalization takes its mean and variance from it.
"""

from __future__ import annotations

import numpy as np

from xceptile.models import graph as ir
from xceptile.models.rewrite import float_constant
from xceptile.runtime import reference

SAME = (1, 1, 1, 1)


def drawn_images(count: int, size: int, seed: int = 0) -> list[np.ndarray]:
    """Smooth random pictures with noise, uint8 (size, size, 3)."""
    rng = np.random.default_rng(seed)
    images = []
    for _ in range(count):
        coarse = rng.uniform(0, 255, (-(-size // 8), -(-size // 8), 3))
        smooth = coarse.repeat(8, axis=0).repeat(8, axis=1)[:size, :size]
        images.append(np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8))
    return images


class FloatBuilder:
    """Appends operators; each method returns the new tensor's name. ``values`` holds the sample's."""

    def __init__(self, sample: np.ndarray, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes = [ir.Node("input", ir.Input(), (), ir.TensorType(sample.shape, "float32"))]
        self.constants: dict[str, ir.Constant] = {}
        self.values = {"input": sample.astype(np.float32)}

    def graph(self, *outputs: str) -> ir.Graph:
        return ir.Graph("random", tuple(self.nodes), self.constants, outputs or (self.nodes[-1].name,))

    def append(self, name: str, op: ir.Op, inputs: tuple[str, ...], constants: dict[str, np.ndarray]) -> str:
        self.constants |= {f"{name}.{k}": float_constant(v) for k, v in constants.items()}
        names = (*inputs, *(f"{name}.{k}" for k in constants))
        args = [self.values[n] if n in self.values else self.constants[n].data for n in names]
        node = ir.Node(name, op, names, ir.TensorType((), "float32"), name)
        value = reference.run_node(ir.Graph("", (*self.nodes, node), self.constants, (name,)), node, args)
        self.nodes.append(ir.Node(name, op, names, ir.TensorType(value.shape, "float32"), name))
        self.values[name] = value
        return name

    def conv(self, name: str, x: str, channels: int, kernel: int = 1, stride: int = 1, pad: ir.Pads = (0,) * 4) -> str:
        fan_in = kernel * kernel * self.values[x].shape[3]
        weights = self.rng.normal(0, fan_in**-0.5, (channels, kernel, kernel, self.values[x].shape[3]))
        op = ir.Conv2d((stride, stride), pad)
        return self.append(name, op, (x,), {"weight": weights, "bias": np.zeros(channels)})

    def depthwise(self, name: str, x: str, stride: int = 1, pad: ir.Pads = SAME) -> str:
        channels = self.values[x].shape[3]
        constants = {"weight": self.rng.normal(0, 0.3, (3, 3, channels)), "bias": np.zeros(channels)}
        return self.append(name, ir.DepthwiseConv2d((stride, stride), pad), (x,), constants)

    def norm(self, name: str, x: str, epsilon: float = 1e-3) -> str:
        over, channels = tuple(range(self.values[x].ndim - 1)), self.values[x].shape[-1]
        constants = {
            "gamma": np.abs(self.rng.normal(1, 0.25, channels)) + 0.05,
            "beta": self.rng.normal(0, 0.3, channels),
            "mean": self.values[x].mean(over),
            "variance": self.values[x].var(over),
        }
        return self.append(name, ir.BatchNorm(epsilon), (x,), constants)

    def relu(self, name: str, x: str) -> str:
        return self.append(name, ir.Relu(), (x,), {})

    def max_pool(self, name: str, x: str, pad: ir.Pads = SAME) -> str:
        return self.append(name, ir.MaxPool2d((3, 3), (2, 2), pad), (x,), {})

    def add(self, name: str, a: str, b: str) -> str:
        return self.append(name, ir.Add(), (a, b), {})

    def mean(self, name: str, x: str) -> str:
        return self.append(name, ir.GlobalAveragePool(), (x,), {})

    def linear(self, name: str, x: str, classes: int) -> str:
        features = self.values[x].shape[1]
        weights = self.rng.normal(0, features**-0.5, (classes, features))
        bias = self.rng.normal(0, 0.1, classes)
        return self.append(name, ir.FullyConnected(), (x,), {"weight": weights, "bias": bias})

    def separable(self, name: str, x: str, channels: int) -> str:
        y = self.conv(f"{name}.pointwise", self.depthwise(f"{name}.depthwise", x), channels)
        return self.norm(f"{name}.norm", y)


def random_xception(
    size: int, widths: tuple[int, int, int, int] = (8, 16, 24, 32), middle: int = 1, classes: int = 10, seed: int = 0
) -> ir.Graph:
    """Xception's structure (stem, two downsampling blocks, ``middle`` identity blocks, exit), its input normalised."""
    sample = np.stack(drawn_images(2, size, seed)).astype(np.float32) / 127.5 - 1
    b = FloatBuilder(sample, seed)
    x = b.relu("stem.relu1", b.norm("stem.norm1", b.conv("stem.conv1", "input", widths[0], 3, 2)))
    x = b.relu("stem.relu2", b.norm("stem.norm2", b.conv("stem.conv2", x, widths[1], 3)))
    for block, width in enumerate(widths[1:3]):
        name = f"blocks.{block}"
        y = x if block == 0 else b.relu(f"{name}.relu0", x)
        y = b.relu(f"{name}.relu1", b.separable(f"{name}.sep0", y, width))
        y = b.max_pool(f"{name}.pool", b.separable(f"{name}.sep1", y, width))
        shortcut = b.norm(f"{name}.shortcut.norm", b.conv(f"{name}.shortcut.conv", x, width, 1, 2))
        x = b.add(f"{name}.add", y, shortcut)
    for block in range(2, 2 + middle):
        y = x
        for i in range(3):
            y = b.separable(f"blocks.{block}.sep{i}", b.relu(f"blocks.{block}.relu{i}", y), widths[2])
        x = b.add(f"blocks.{block}.add", y, x)
    x = b.relu("exit.relu", b.separable("exit.sep", x, widths[3]))
    b.linear("classifier", b.mean("exit.mean", x), classes)
    return single(b.graph())


def single(graph: ir.Graph) -> ir.Graph:
    """The same graph for one image at a time."""
    nodes = tuple(
        ir.Node(n.name, n.op, n.inputs, ir.TensorType((1, *n.type.shape[1:]), n.type.dtype), n.path)
        for n in graph.nodes
    )
    return ir.Graph(graph.name, nodes, graph.constants, graph.outputs)
