"""A float Graph from a torch module or an exported program, through ``torch.export``."""

from __future__ import annotations

import copy
import operator
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind

from .aten import (
    Argument,
    Operation,
    Program,
    Ref,
    Size,
    Unreadable,
    Weight,
    import_program,
    is_torch_layer,
    module_path,
)
from .graph import Graph
from .graph_builder import UnsupportedLayer
from .preprocess import InputSpec


def from_torch(
    network: nn.Module | ExportedProgram,
    inputs: InputSpec | tuple[int, int, int, int] | None = None,
    *,
    name: str = "",
) -> Graph:
    """Captures a network in evaluation mode; weights become NHWC float32 constants, nodes keep their module's path.

    ``inputs`` gives the shape of the one image input: an InputSpec, or (N, C, H, W) as torch has it. An exported
    program carries its own shape and needs none; a batch that it leaves open is 1 then. The module itself is left
    unchanged.
    Raises UnsupportedLayer for what the graph cannot say, ValueError where the shape is missing or differs.
    """
    shape = _nchw_shape(inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its internals
        if isinstance(network, ExportedProgram):
            program = network
        elif shape is None:
            raise ValueError("from_torch needs the input's shape to export a module")
        else:
            program = _export(network, shape)
        # No operator is broken up; in-place operators are made functional.
        program = program.run_decompositions({})
    return import_program(_program(program), shape, name or type(network).__name__)


def _nchw_shape(inputs: InputSpec | tuple[int, int, int, int] | None) -> tuple[int, ...] | None:
    if isinstance(inputs, InputSpec):
        n, h, w, c = inputs.shape
        return (n, c, h, w)
    return inputs


def _export(module: nn.Module, shape: tuple[int, ...]) -> ExportedProgram:
    parameter = next(module.parameters(), None)
    example = torch.zeros(shape, dtype=torch.float32 if parameter is None else parameter.dtype)
    module = copy.deepcopy(module).cpu().eval()
    try:
        return torch.export.export(module, (example,))
    except Exception as error:  # torch.export raises whatever the user's forward and its own tracer raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UnsupportedLayer("", "torch.export", f"the network cannot be exported: {reason}") from error


def _program(program: ExportedProgram) -> Program:
    """Without anything of torch's in it."""
    signature = program.graph_signature
    specs = {spec.arg.name: spec for spec in signature.input_specs}
    inputs, weights, operations = [], {}, []
    for node in program.graph.nodes:
        if node.op == "placeholder":
            spec = specs[node.name]
            if spec.kind == InputKind.USER_INPUT:
                inputs.append((node.name, _sizes(node.meta.get("val"))))
            elif (weight := _weight(program, spec.target)) is not None:
                weights[node.name] = weight
        elif node.op == "call_function" and node.target is not operator.getitem:
            operations.append(_operation(node))
        elif node.op not in ("call_function", "get_attr", "output"):
            raise UnsupportedLayer(_stack(node)[0], str(node.op), "it is no plain operator")
    results = signature.output_specs
    return Program(
        inputs=tuple(inputs),
        weights=weights,
        operations=tuple(operations),
        outputs=tuple(getattr(s.arg, "name", None) for s in results if s.kind == OutputKind.USER_OUTPUT),
        changed=tuple(str(s.target) for s in results if s.kind in _CHANGES),
    )


_CHANGES = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)


def _sizes(value: Any) -> tuple[Size, ...] | None:
    """Of a tensor; None of anything else."""
    if not isinstance(value, Tensor):
        return None
    return tuple(size if isinstance(size, int) else _number(size.node.expr) for size in value.shape)


def _number(expression: Any) -> Size:
    return int(expression) if expression.is_Integer else str(expression)


def _weight(program: ExportedProgram, name: str) -> Weight | None:
    tensor = program.state_dict.get(name, program.constants.get(name))
    if not isinstance(tensor, Tensor):
        return None
    values = tensor.detach().cpu()
    return name, (values.float() if values.is_floating_point() else values).numpy()


def _operation(node: torch.fx.Node) -> Operation:
    value = node.meta.get("val")
    results: tuple[str, ...] = (node.name,)
    first = value
    if isinstance(value, list | tuple):
        taken = {user.args[1]: user.name for user in node.users if user.target is operator.getitem}
        results = tuple(taken.get(index, f"{node.name}_unused_{index}") for index in range(len(value)))
        first = value[0] if value else None
    path, layer = _stack(node)
    return Operation(_target(node.target), _arguments(node), results, _sizes(first), path, is_torch_layer(layer))


def _target(target: Any) -> str:
    return str(target) if isinstance(target, torch._ops.OpOverload) else f"{target.__module__}.{target.__name__}"


def _arguments(node: torch.fx.Node) -> dict[str, Argument]:
    """By the names in the operator's schema."""
    schema = getattr(node.target, "_schema", None)
    names = [argument.name for argument in schema.arguments] if schema else [str(i) for i in range(len(node.args))]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {name: _argument(value) for name, value in given.items()}


def _argument(value: Any) -> Argument:
    if isinstance(value, torch.fx.Node):
        return Ref(value.name)
    if isinstance(value, list | tuple):
        return [_argument(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return Unreadable(f"one of its operands is {str(value)[:80]}")


def _stack(node: torch.fx.Node) -> tuple[str, str]:
    """The innermost module: where it is, as ``named_modules`` calls it, and its class."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return (module_path(str(stack[-1][0])), str(stack[-1][1])) if stack else ("", "")
