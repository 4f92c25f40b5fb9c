"""Which operators share a kernel: a graph becomes units, by one row of rules a family.

A depthwise convolution takes in the ReLU that it reads; a pointwise convolution takes in the depthwise convolution
that it reads; a convolution ends with the addition that reads it. ``RULES`` says which family does which. A family adds
nothing to what a unit means: it chooses tiles, packs constants and emits code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ..models import graph as ir
from ..runtime import arithmetic
from ..runtime.units import (
    Addition,
    AddScaling,
    Convolution,
    DepthwiseConvolution,
    Flattening,
    Interpolation,
    Joining,
    MaxPool,
    Mean,
    MeanScaling,
    Multiplication,
    MultiplyScaling,
    Rectifier,
    Scaling,
    Selection,
    Stage,
    Table,
    Unit,
)
from ..targets.spec import TargetSpec

Prologue = tuple[Rectifier | DepthwiseConvolution, ...]


def _never(*_: object) -> bool:
    return False


def _always(*_: object) -> bool:
    return True


def is_banded(geometry: ir.Geometry) -> bool:
    """Whether a window is 3x3 at stride 1 with one pixel of padding: rows can be computed in bands."""
    return (
        geometry.kernel == (3, 3)
        and geometry.strides == (1, 1)
        and geometry.padding == (1, 1, 1, 1)
        and geometry.dilation == (1, 1)
    )


@dataclass(frozen=True)
class Rules:
    """What a family computes in one kernel.

    ``relu``: whether a depthwise convolution of this geometry takes in the ReLU that it reads; all readers of the ReLU
    must. ``shared_relu``: whether a ReLU of several readers may join each of them. ``depthwise``: whether a pointwise
    convolution, its only reader, takes in a depthwise convolution (the prologue as it would be, the convolution).
    ``addition``: whether a convolution ends with the addition that is its only reader. ``dilation``: whether there are
    kernels for dilated windows.
    """

    relu: Callable[[ir.Geometry], bool] = _never
    shared_relu: bool = False
    depthwise: Callable[[Prologue, Convolution], bool] = _never
    addition: bool = False
    dilation: bool = False


def _banded_depthwise(prologue: Prologue, _: Convolution) -> bool:
    return is_banded(prologue[-1].geometry)


# CUDA's ``depthwise`` is its cost model's answer for the GPU at hand: ``kernels/cuda/lower.py`` puts it in.
RULES: Mapping[str, Rules] = {
    "generic": Rules(dilation=True),
    "x86": Rules(relu=is_banded, shared_relu=True, depthwise=_banded_depthwise, dilation=True),
    "arm": Rules(relu=_always, depthwise=_always, dilation=True),
    "opencl": Rules(relu=_always, shared_relu=True, addition=True),
    "cuda": Rules(relu=_always, shared_relu=True, addition=True, dilation=True),
}


def family_of(target: TargetSpec) -> str:
    """The family of kernels, a key of ``RULES``, that a target's native artefact is made of."""
    if target.engine != "cpu":
        return target.engine
    return {"x86_64": "x86", "aarch64": "arm"}.get(target.architecture, "generic")


def units(graph: ir.Graph, rules: Rules) -> tuple[Unit, ...]:
    """Given: an int8 or a float graph. Result: its units in an order in which each one's inputs are made before it.

    ``Input`` makes no unit, nor does a ``Dequantize`` that says what an int8 input means. Raises GraphError for an
    operator that is not one of kernels.
    """
    joined = _joined(graph, rules)
    taken = joined.taken
    made: list[Unit] = []
    for node in graph.nodes:
        if isinstance(node.op, ir.Input | ir.Dequantize) or node.name in taken:
            continue
        anchor, epilogue = node, None
        if node.name in joined.additions:
            anchor, epilogue = graph.node(joined.additions[node.name]), node
        made.append(_unit(graph, anchor, epilogue, joined))
        if not rules.dilation and any(stage.geometry.dilation != (1, 1) for stage in made[-1]):
            raise ir.GraphError(f"{node.name}: no kernel for a dilated convolution yet", node.name, node.path)
    return tuple(made)


@dataclass(frozen=True)
class _Joined:
    """``relus`` and ``depthwise`` join their readers; ``additions`` maps an addition to the convolution it ends;
    ``taken`` are all nodes that are not the last of a unit."""

    relus: frozenset[str]
    depthwise: frozenset[str]
    additions: Mapping[str, str]

    @property
    def taken(self) -> frozenset[str]:
        return self.relus | self.depthwise | frozenset(self.additions.values())


def _joined(graph: ir.Graph, rules: Rules) -> _Joined:
    relus = frozenset(node.name for node in graph.nodes if _joins_depthwise(graph, node, rules))
    depthwise: set[str] = set()
    for node in graph.nodes:
        reader = _only_reader(graph, node)
        if isinstance(node.op, ir.DepthwiseConv2d) and reader is not None and isinstance(reader.op, ir.Conv2d):
            convolution = _convolution(graph, reader)
            if convolution.geometry.one_to_one and rules.depthwise(_prologue(graph, node, relus), convolution):
                depthwise.add(node.name)
    additions = {}
    if rules.addition:
        order = {node.name: index for index, node in enumerate(graph.nodes)}
        for node in graph.nodes:
            if (ended := _ended_by(graph, node, order)) is not None:
                additions[node.name] = ended
    return _Joined(relus, frozenset(depthwise), additions)


def _joins_depthwise(graph: ir.Graph, node: ir.Node, rules: Rules) -> bool:
    readers = graph.users(node.name)
    return (
        isinstance(node.op, ir.Relu)
        and (len(readers) == 1 or (rules.shared_relu and bool(readers)))
        and node.name not in graph.outputs
        and all(isinstance(r.op, ir.DepthwiseConv2d) and rules.relu(ir.geometry(graph, r)) for r in readers)
    )


def _only_reader(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """The one node that reads a tensor, if it is one and the tensor is not an output of the network."""
    readers = graph.users(node.name)
    return readers[0] if len(readers) == 1 and node.name not in graph.outputs else None


def _ended_by(graph: ir.Graph, node: ir.Node, order: Mapping[str, int]) -> str | None:
    """The convolution that ends with this addition: of those that nothing else reads the nearest before it."""
    if not isinstance(node.op, ir.Add) or node.inputs[0] == node.inputs[1]:
        return None
    for name in sorted(node.inputs, key=order.__getitem__, reverse=True):
        source = graph.node(name)
        if isinstance(source.op, ir.Conv2d) and _only_reader(graph, source) is not None:
            return name
    return None


def _unit(graph: ir.Graph, anchor: ir.Node, addition: ir.Node | None, joined: _Joined) -> Unit:
    prologue: Prologue = ()
    if isinstance(anchor.op, ir.Conv2d) and anchor.inputs[0] in joined.depthwise:
        prologue = _prologue(graph, graph.node(anchor.inputs[0]), joined.relus)
    elif isinstance(anchor.op, ir.DepthwiseConv2d) and anchor.inputs[0] in joined.relus:
        prologue = (_rectifier(graph, graph.node(anchor.inputs[0])),)
    stage = _stage(graph, anchor)
    epilogue = () if addition is None else (_addition(graph, addition, anchor.name),)
    macs = sum(ir.multiply_accumulates(graph, each.node) for each in (*prologue, stage, *epilogue))
    return Unit(prologue, stage, epilogue, macs)


def _prologue(graph: ir.Graph, depthwise: ir.Node, relus: frozenset[str]) -> Prologue:
    """A depthwise convolution behind its ReLU, where that joins it."""
    stage = _depthwise(graph, depthwise)
    source = depthwise.inputs[0]
    return (_rectifier(graph, graph.node(source)), stage) if source in relus else (stage,)


def _stage(graph: ir.Graph, node: ir.Node) -> Stage:
    match node.op:
        case ir.Conv2d() | ir.FullyConnected():
            return _convolution(graph, node)
        case ir.DepthwiseConv2d():
            return _depthwise(graph, node)
        case ir.Relu():
            return _rectifier(graph, node)
        case ir.MaxPool2d():
            return MaxPool(node, ir.geometry(graph, node))
        case ir.Add():
            return _addition(graph, node, node.inputs[0])
        case ir.GlobalAveragePool():
            return _mean(graph, node)
        case ir.Lookup(function, parameters):
            table = None
            if node.type.dtype == "int8":
                source = graph.type_of(node.inputs[0]).per_tensor
                table = arithmetic.lookup_table(
                    function, parameters, source.scale, source.zero_point, node.type.per_tensor.scale,
                    node.type.per_tensor.zero_point,
                )  # fmt: skip
            return Table(node, ir.geometry(graph, node), table)
        case ir.Multiply():
            return _multiplication(graph, node)
        case ir.Resize(size, method, coordinates):
            geometry = ir.geometry(graph, node)
            make = arithmetic.resize_taps if method == "bilinear" else arithmetic.nearest_positions
            rows = make(geometry.in_height, size[0], coordinates)
            columns = make(geometry.in_width, size[1], coordinates)
            return (Interpolation if method == "bilinear" else Selection)(node, geometry, rows, columns)
        case ir.Concatenate():
            channels = tuple(graph.type_of(name).shape[-1] for name in node.inputs)
            return Joining(node, ir.geometry(graph, node), channels)
        case ir.Reshape():
            return Flattening(node, ir.geometry(graph, node))
    raise ir.GraphError(f"{node.name}: no kernel for {type(node.op).__name__}", node.name, node.path)


def _convolution(graph: ir.Graph, node: ir.Node) -> Convolution:
    assert isinstance(node.op, ir.Conv2d | ir.FullyConnected)
    weights = graph.constants[node.inputs[1]].data
    if isinstance(node.op, ir.FullyConnected):
        weights = weights[:, None, None, :]
    bias = graph.constants[node.inputs[2]].data
    return Convolution(node, ir.geometry(graph, node), weights, bias, node.op.relu, _scaling(graph, node))


def _depthwise(graph: ir.Graph, node: ir.Node) -> DepthwiseConvolution:
    assert isinstance(node.op, ir.DepthwiseConv2d)
    weights, bias = (graph.constants[name].data for name in node.inputs[1:])
    return DepthwiseConvolution(node, ir.geometry(graph, node), weights, bias, node.op.relu, _scaling(graph, node))


def _scaling(graph: ir.Graph, node: ir.Node) -> Scaling | None:
    """What a layer's weights prove and fold to; None in a float graph."""
    assert isinstance(node.op, ir.Conv2d | ir.DepthwiseConv2d | ir.FullyConnected)
    if node.type.dtype != "int8":
        return None
    source, weights = (graph.type_of(name) for name in node.inputs[:2])
    zero, out, axis = source.per_tensor.zero_point, node.type.per_tensor, weights.per_axis.axis
    rows = np.moveaxis(graph.constants[node.inputs[1]].data, axis, 0).reshape(weights.shape[axis], -1)
    sums = rows.sum(axis=1, dtype=np.int64)
    positive = np.maximum(rows, 0).sum(axis=1, dtype=np.int64)
    negative = sums - positive
    start = graph.constants[node.inputs[2]].data.astype(np.int64) - zero * sums
    multipliers = arithmetic.output_multipliers(source.per_tensor.scale, weights.per_axis.scales, out.scale)
    least = start + positive * arithmetic.INT8_MIN + negative * arithmetic.INT8_MAX
    greatest = start + positive * arithmetic.INT8_MAX + negative * arithmetic.INT8_MIN
    low = arithmetic.lower_bound(out.zero_point, node.op.relu)
    return Scaling(zero, start, sums, multipliers, out.zero_point, low, least, greatest)


def _rectifier(graph: ir.Graph, node: ir.Node) -> Rectifier:
    source = graph.type_of(node.inputs[0])
    return Rectifier(node, ir.geometry(graph, node), source.per_tensor.zero_point if source.dtype == "int8" else None)


def _addition(graph: ir.Graph, node: ir.Node, own: str) -> Addition:
    """``own`` names the summand that the unit computes, or the addition's first."""
    assert isinstance(node.op, ir.Add)
    other = node.inputs[1] if own == node.inputs[0] else node.inputs[0]
    integers = None
    if node.type.dtype == "int8":
        a, b, out = graph.type_of(own).per_tensor, graph.type_of(other).per_tensor, node.type.per_tensor
        constants = arithmetic.add_constants(a.scale, a.zero_point, b.scale, b.zero_point, out.scale)
        integers = AddScaling(constants, out.zero_point, arithmetic.lower_bound(out.zero_point, node.op.relu))
    return Addition(node, ir.geometry(graph, node), other, node.op.relu, integers)


def _multiplication(graph: ir.Graph, node: ir.Node) -> Multiplication:
    (a, b), integers = (graph.type_of(name) for name in node.inputs), None
    if node.type.dtype == "int8":
        out = node.type.per_tensor
        m = arithmetic.multiply_multiplier(a.per_tensor.scale, b.per_tensor.scale, out.scale)
        integers = MultiplyScaling(a.per_tensor.zero_point, b.per_tensor.zero_point, m, out.zero_point)
    gate = len(a.shape) != len(b.shape)
    return Multiplication(node, ir.geometry(graph, node), node.inputs[1], gate, integers)


def _mean(graph: ir.Graph, node: ir.Node) -> Mean:
    geometry, integers = ir.geometry(graph, node), None
    if node.type.dtype == "int8":
        source, out = graph.type_of(node.inputs[0]).per_tensor, node.type.per_tensor
        multiplier = arithmetic.average_multiplier(source.scale, out.scale, geometry.in_pixels)
        integers = MeanScaling(-geometry.in_pixels * source.zero_point, multiplier, out.zero_point)
    return Mean(node, geometry, integers)
