"""Lowers an int8 graph to portable kernels: one call a unit, tensors plain NHWC, nothing packed.

It is what a processor without a family of its own runs, the starting point of a family for one
(docs/portable-kernels.md), and a second form of the arithmetic that is meant to be read.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ....models import graph as ir
from ....runtime.units import (
    Addition,
    Convolution,
    DepthwiseConvolution,
    Flattening,
    Interpolation,
    Joining,
    MaxPool,
    Mean,
    Multiplication,
    Rectifier,
    Selection,
    Table,
    Unit,
)
from ....targets.spec import TargetSpec
from ...fusion import RULES, units
from ..kernel_call import Activation, KernelCall, Weights, check_one_image
from ..prim_func import Parameter, prim_func
from . import kernels


def lower(graph: ir.Graph, target: TargetSpec, choices: Mapping[str, int] | None = None) -> tuple[KernelCall, ...]:
    """Given: an int8 graph of batch 1. Result: the straight line of kernel calls that computes it.

    The kernels are the same for every ``target``, and a task is a row whatever the ``choices``. Raises GraphError for
    what there is no kernel for.
    """
    check_one_image(graph)
    tensors = {node.name: Activation(node.name, "int8", math.prod(node.type.shape)) for node in graph.nodes}
    calls: list[KernelCall] = []
    for unit in units(graph, RULES["generic"]):
        calls += _calls(unit, tuple(tensors[name] for name in unit.inputs), tensors[unit.name])
    return tuple(calls)


def _calls(unit: Unit, inputs: tuple[Activation, ...], y: Activation) -> list[KernelCall]:
    """What makes the tensor ``y`` of the unit's inputs: one call, unless many tensors are joined."""
    stage, call = unit.anchor, partial(_call, unit, inputs, y)
    match stage:
        case Convolution() | DepthwiseConvolution():
            assert stage.integers is not None
            words = _int32(stage.integers.padding, stage.integers.zero_point, stage.integers.low)
            emit = kernels.convolution if isinstance(stage, Convolution) else kernels.depthwise
            return [call(emit, stage.weights, stage.bias, stage.integers.multipliers, words)]
        case MaxPool():
            return [call(kernels.max_pool)]
        case Mean():
            assert stage.integers is not None
            words = _int32(stage.integers.start, stage.integers.zero_point)
            return [call(kernels.mean, stage.integers.multiplier, words)]
        case Addition():
            assert stage.integers is not None
            words = _int32(*stage.integers.constants, stage.integers.zero_point, stage.integers.low)
            return [call(kernels.addition, words)]
        case Multiplication():
            assert stage.integers is not None
            words = _int32(stage.integers.a_zero, stage.integers.b_zero, stage.integers.zero_point)
            return [call(kernels.multiplication, stage.integers.multiplier, words, gate=stage.gate)]
        case Rectifier():
            assert stage.zero_point is not None
            return [call(kernels.rectifier, _int32(stage.zero_point))]
        case Table():
            assert stage.table is not None
            return [call(kernels.table, stage.table)]
        case Interpolation():
            return [call(kernels.interpolation, stage.rows, stage.columns)]
        case Selection():
            return [call(kernels.selection, stage.rows, stage.columns)]
        case Joining():
            return _join(unit, inputs, y, stage.channels)
        case Flattening():
            return [call(kernels.flattening)]


def _join(unit: Unit, inputs: tuple[Activation, ...], y: Activation, channels: tuple[int, ...]) -> list[KernelCall]:
    """Two tensors at a time: what is together already, and the next one."""
    calls: list[KernelCall] = []
    together, first = inputs[0], channels[0]
    for index, (x, second) in enumerate(zip(inputs[1:], channels[1:], strict=True), start=2):
        made = y if index == len(inputs) else Activation(f"{y.name}:{index}", "int8", together.count + x.count)
        calls.append(_call(unit, (together, x), made, kernels.joining, first=first, second=second))
        together, first = made, first + second
    return calls


def _call(
    unit: Unit,
    inputs: tuple[Activation, ...],
    y: Activation,
    emit: Callable[..., kernels.Task],
    *constants: NDArray[np.generic],
    **options: int,
) -> KernelCall:
    """``emit``'s kernel on these tensors and constants."""
    geometry = unit.anchor.geometry
    flat = (Weights(np.ascontiguousarray(values).reshape(-1)) for values in constants)
    operands: tuple[Activation | Weights, ...] = (*inputs, *flat, y)
    symbol = "_".join((emit.__name__, _text(geometry), *(f"{name}{int(value)}" for name, value in options.items())))
    names = list(inspect.signature(emit).parameters)[1:]  # the options' come last
    parameters = [Parameter(name, *_kind(operand)) for name, operand in zip(names, operands, strict=False)]
    build = partial(prim_func, symbol, parameters, partial(emit, geometry, **options))
    tasks = geometry.out_height
    return KernelCall(symbol, build, operands, y.name, unit.name, unit.kind, unit.path, unit.macs, tasks)


def _kind(operand: Activation | Weights) -> tuple[str, int]:
    """Element type and number of elements."""
    if isinstance(operand, Activation):
        return operand.dtype, operand.count
    return str(operand.data.dtype), operand.data.size


def _text(g: ir.Geometry) -> str:
    sizes = f"{g.in_height}x{g.in_width}x{g.in_channels}_{g.out_height}x{g.out_width}x{g.out_channels}"
    window = ("k{}x{}".format(*g.kernel), "s{}x{}".format(*g.strides), "d{}x{}".format(*g.dilation))
    return "_".join((sizes, *window, f"p{g.padding[0]}_{g.padding[2]}"))


def _int32(*values: int) -> NDArray[np.int32]:
    return np.array(values, np.int32)
