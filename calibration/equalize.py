"""Exact equalization: channels of an activation are rescaled, and the weights around it take that back.

Where everything that makes a tensor and everything that reads it is linear in each channel, channel c may be divided
by any k[c] > 0 if the weights that make it are divided by k[c] and the weights that read it multiplied by it: an
identity in real numbers. Per-tensor activations then suit every channel, where trained networks have channels that
differ by orders of magnitude. (The idea: M. Nagel et al., https://arxiv.org/abs/1906.04721, section 4.1.)

* ``equalize(graph)`` takes the pairs that Xception is full of: a depthwise convolution and the pointwise one that alone
  reads it, with no activation between them.
* ``equalize(graph, ranges)`` goes further: ReLU, max pooling and averages pass a positive factor through, and an
  addition does if both its inputs and its output share it. So a whole residual stream, with all that writes and reads
  it, is equalized as one group.
* ``center(graph, ranges)`` shifts instead of scaling, where nothing but unpadded convolutions read a tensor: half the
  spread of what a depthwise convolution makes is that its channels lie to different sides of zero. Its bias takes each
  channel's middle away, the biases of the readers give it back. (The idea: X. Wei et al., "Outlier Suppression+",
  https://arxiv.org/abs/2304.09145, section 4.1.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..models import graph as ir
from ..models.preprocess import InputSpec
from ..models.rewrite import float_constant, replace_inputs
from ..runtime import reference
from .collect import network_input, observed_tensors
from .images import Pixels

Range = tuple[NDArray[np.float64], NDArray[np.float64]]  # least and largest value of each channel, (C,) both
Ranges = Mapping[str, Range]

_Weighted = ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected
_Transparent = ir.Relu | ir.MaxPool2d | ir.GlobalAveragePool | ir.Add

# How much of a channel's spread the weights take over. Weights, a scale per row and rounded with care, make a tenth of
# the noise that activations make: 0.7 diverges 2 % less than 0.5 on the held-out part of tests/benchmarks/ablation.py.
ALPHA = 0.7

# A channel is never enlarged beyond this against the largest: what calibration hardly saw may be larger elsewhere.
MOST_GAIN = 1024.0


@dataclass(frozen=True)
class Group:
    """Tensors whose channels share a factor (by name), the layers that make them and the layers that read them."""

    tensors: tuple[str, ...]
    producers: tuple[ir.Node, ...]
    readers: tuple[ir.Node, ...]


def equalize(graph: ir.Graph, ranges: Ranges | None = None) -> ir.Graph:
    """The same function with its channels equalized.

    Given: a float graph without batch normalization. ``ranges`` as ``channel_ranges`` measures them; without them only
    depthwise-pointwise pairs are taken, and the sum of a filter's absolute weights, which bounds its gain, stands for
    its channel's magnitude.
    """
    for group in equalizable_groups(graph) if ranges is not None else equalizable_pairs(graph):
        # Weights as the groups before left them.
        readers = [graph.node(node.name) for node in group.readers]
        known = _filter_sums(graph, group) if ranges is None else _relative_magnitudes(group, ranges)
        graph = rescale(graph, group, _factors(known, _column_magnitudes(graph, readers)))
    return graph


def center(graph: ir.Graph, ranges: Ranges) -> tuple[ir.Graph, Ranges]:
    """The same function, the channels of every tensor that can be shifted centred about zero, and its ranges.

    Given: as for ``equalize``. A reader must not pad: padding contributes zero, not the middle.
    """
    moved = dict(ranges)
    for group in equalizable_groups(graph):
        (low, high), producer = ranges[group.producers[0].name], graph.node(group.producers[0].name)
        if len(group.tensors) > 1 or getattr(producer.op, "relu", False) or not all(map(_reads_plainly, group.readers)):
            continue
        middle = (low + high) / 2
        graph = _with_constants(graph, producer.name, {2: _values(graph, producer, 2) - middle})
        for name in (node.name for node in group.readers):
            reader = graph.node(name)
            weights = _values(graph, reader, 1)
            given_back = weights.reshape(weights.shape[0], -1, weights.shape[-1]).sum(axis=1) @ middle
            graph = _with_constants(graph, name, {2: _values(graph, reader, 2) + given_back})
        moved[producer.name] = (low - middle, high - middle)
    return graph, moved


def _reads_plainly(node: ir.Node) -> bool:
    """Whether a layer sees a constant added to its input as a constant at every output."""
    return isinstance(node.op, ir.FullyConnected) or (isinstance(node.op, ir.Conv2d) and not any(node.op.padding))


def channel_ranges(graph: ir.Graph, images: Iterable[Pixels], spec: InputSpec | None = None) -> Ranges:
    """Of every activation with a scale of its own: each channel's least and largest value over all images.

    ``spec`` as for ``collect``.
    """
    ranges: dict[str, Range] = {}
    owner = observed_tensors(graph)
    for image in images:
        for name, value in reference.iterate(graph, {graph.inputs[0].name: network_input(image, spec)}):
            if name in owner:
                pixels = value.reshape(-1, value.shape[-1])
                low, high = pixels.min(axis=0).astype(np.float64), pixels.max(axis=0).astype(np.float64)
                before = ranges.get(owner[name], (low, high))
                ranges[owner[name]] = (np.minimum(before[0], low), np.maximum(before[1], high))
    return ranges


def equalizable_pairs(graph: ir.Graph) -> list[Group]:
    """Each depthwise convolution without a ReLU and the convolution that alone reads it."""
    return [
        group
        for group in equalizable_groups(graph)
        if len(group.tensors) == 1
        and isinstance(group.producers[0].op, ir.DepthwiseConv2d)
        and not group.producers[0].op.relu
        and isinstance(group.readers[0].op, ir.Conv2d)
        and len(group.readers) == 1
    ]


def equalizable_groups(graph: ir.Graph) -> list[Group]:
    """Every maximal set of tensors that must share a factor, and can: made and read by weighted layers alone."""
    leader = {node.name: node.name for node in graph.nodes}

    def find(name: str) -> str:
        while leader[name] != name:
            name = leader[name]
        return name

    for node in graph.nodes:
        if isinstance(node.op, _Transparent):
            for name in node.inputs:
                leader[find(name)] = find(node.name)
    members: dict[str, list[ir.Node]] = {}
    for node in graph.nodes:
        members.setdefault(find(node.name), []).append(node)
    groups = []
    for nodes in members.values():
        names = {node.name for node in nodes}
        readers = tuple(n for n in graph.nodes if not isinstance(n.op, _Transparent) and names & set(n.inputs))
        linear = all(isinstance(n.op, _Weighted | _Transparent) for n in nodes)
        if linear and readers and all(isinstance(n.op, _Weighted) for n in readers) and not names & set(graph.outputs):
            producers = tuple(n for n in nodes if isinstance(n.op, _Weighted))
            groups.append(Group(tuple(n.name for n in nodes), producers, readers))
    return groups


def _relative_magnitudes(group: Group, ranges: Ranges) -> NDArray[np.float64]:
    """Per channel, the largest share that it has of any of the group's tensors, (C,) in 0..1."""
    known = [np.maximum(-low, high) for low, high in (ranges[name] for name in group.tensors if name in ranges)]
    shares = np.max([values / max(float(values.max()), 1e-30) for values in known], axis=0)
    return np.where(shares > 0, np.maximum(shares, 1 / MOST_GAIN), 0.0)


def _filter_sums(graph: ir.Graph, group: Group) -> NDArray[np.float64]:
    weights = graph.constants[group.producers[0].inputs[1]].data.astype(np.float64)
    return np.asarray(np.abs(weights).sum(axis=(0, 1)))


def _column_magnitudes(graph: ir.Graph, readers: list[ir.Node]) -> NDArray[np.float64] | None:
    """Of the dense readers' weights: per input channel, the largest relative to its row's largest, (C,).

    None where all readers are depthwise: their weights have a scale per channel and pay nothing.
    """
    columns = []
    for reader in readers:
        if not isinstance(reader.op, ir.DepthwiseConv2d):
            weights = np.abs(graph.constants[reader.inputs[1]].data.astype(np.float64))
            weights = weights.reshape(weights.shape[0], -1, weights.shape[-1]).max(axis=1)
            rows = weights.max(axis=1, keepdims=True)
            columns.append(np.divide(weights, rows, out=np.zeros_like(weights), where=rows > 0).max(axis=0))
    return np.max(columns, axis=0) if columns else None


def _factors(activation: NDArray[np.float64], columns: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """k (C,), of geometric mean 1; 1 for a channel that is dead on either side.

    k = a where it is free; a^alpha / r^(1 - alpha) where dense weights of magnitude r pay for it (SmoothQuant,
    https://arxiv.org/abs/2211.10438, equation 4).
    """
    alive = activation > 0 if columns is None else (activation > 0) & (columns > 0)
    logarithm = np.zeros_like(activation)
    if alive.any():
        ratio = activation[alive]
        if columns is not None:
            ratio = ratio**ALPHA / columns[alive] ** (1 - ALPHA)
        logarithm[alive] = np.log(ratio) - np.log(ratio).mean()
    return np.exp(logarithm)


def rescale(graph: ir.Graph, group: Group, factors: NDArray[np.float64]) -> ir.Graph:
    """Divides what the producers make by ``factors`` and multiplies what the readers do with it by them."""
    for producer in group.producers:
        weights, bias = (_values(graph, graph.node(producer.name), i) for i in (1, 2))
        divisor = factors if isinstance(producer.op, ir.DepthwiseConv2d) else _along_rows(factors, weights.ndim)
        graph = _with_constants(graph, producer.name, {1: weights / divisor, 2: bias / factors})
    for reader in group.readers:
        weights = _values(graph, graph.node(reader.name), 1)
        graph = _with_constants(graph, reader.name, {1: weights * factors})  # input channels come last everywhere
    return graph


def _values(graph: ir.Graph, node: ir.Node, position: int) -> NDArray[np.float64]:
    return graph.constants[node.inputs[position]].data.astype(np.float64)


def _along_rows(factors: NDArray[np.float64], rank: int) -> NDArray[np.float64]:
    return factors.reshape(-1, *([1] * (rank - 1)))


def _with_constants(graph: ir.Graph, name: str, changed: Mapping[int, NDArray[np.float64]]) -> ir.Graph:
    constants = {position: float_constant(values) for position, values in changed.items()}
    node, made = replace_inputs(graph, graph.node(name), constants)
    nodes = tuple(node if n.name == name else n for n in graph.nodes)
    return graph.with_nodes(nodes, {**graph.constants, **made})
