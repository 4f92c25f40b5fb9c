"""A graph as text, one node a line, and back: for dumps between passes and for tests of passes.

    graph example
    input: float32[1,8,8,3] = Input()
    conv: float32[1,4,4,2] = Conv2d(input, conv.weight, conv.bias) strides=(2, 2) padding=(0, 1, 0, 1) relu=True @stem
    output conv
    constant conv.bias: float32[2] = [0.5, -1.0]
    constant conv.weight: float32[2,3,3,3] = #60303ae2

After ``@`` stands the module path, where it is not the node's name. Constants of at most 16 elements are written out;
of a larger one only a hash is, by which two dumps can be compared, and it is parsed as zeros. Quantization follows
the shape: ``int8[1,4]{scale=0.5 zero_point=-3}`` or ``int8[2,3]{axis=0 scales=(0.5, 0.25)}``.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from typing import Any

import numpy as np

from . import graph as ir
from .serialize import make_op, op_fields

INLINE = 16  # elements of a constant, and scales of a type, that are written out

_NAME = r'"(?:[^"\\]|\\.)*"|[^\s,()="@:\[\]{}]+'
_TYPE = r"(?P<dtype>\w+)\[(?P<shape>[\d,]*)\](?:\{(?P<quant>[^}]*)\})?"
_FIELD = r"\w+=(?:\([^)]*\)|[^\s()]+)"
_NODE = re.compile(
    rf"(?P<name>{_NAME}): {_TYPE} = (?P<op>\w+)\((?P<inputs>(?:(?:{_NAME})(?:, (?:{_NAME}))*)?)\)"
    rf"(?P<fields>(?: {_FIELD})*)(?: @(?P<path>{_NAME}))?"
)
_CONSTANT = re.compile(rf"constant (?P<name>{_NAME}): {_TYPE} = (?P<value>.*)")


def to_text(graph: ir.Graph) -> str:
    """The whole graph; constants in alphabetical order."""
    lines = [f"graph {_quote(graph.name)}"]
    lines += [_node_line(node) for node in graph.nodes]
    lines += [f"output {_quote(name)}" for name in graph.outputs]
    lines += [_constant_line(name, constant) for name, constant in sorted(graph.constants.items())]
    return "\n".join(lines) + "\n"


def parse_text(text: str) -> ir.Graph:
    """The inverse of ``to_text``, but for large constants. Raises GraphError with the line at fault."""
    name, nodes, outputs, constants = "", [], [], {}
    for number, line in enumerate(text.splitlines(), start=1):
        line = line.strip()
        try:
            if not line:
                continue
            if line.startswith("graph "):
                name = _unquote(line.removeprefix("graph "))
            elif line.startswith("output "):
                outputs.append(_unquote(line.removeprefix("output ")))
            elif match := _CONSTANT.fullmatch(line):
                constants[_unquote(match["name"])] = _parse_constant(match)
            elif match := _NODE.fullmatch(line):
                nodes.append(_parse_node(match))
            else:
                raise ValueError("neither a node, a constant, an output nor a graph's name")
        except (ValueError, TypeError, SyntaxError, KeyError) as error:
            raise ir.GraphError(f"line {number}: {line!r}: {error}") from error
    return ir.Graph(name, tuple(nodes), constants, tuple(outputs))


def _quote(name: str) -> str:
    return name if re.fullmatch(_NAME, name) and not name.startswith('"') else json.dumps(name)


def _unquote(text: str) -> str:
    return str(json.loads(text)) if text.startswith('"') else text


def _node_line(node: ir.Node) -> str:
    inputs = ", ".join(_quote(name) for name in node.inputs)
    fields = "".join(f" {name}={value!r}" for name, value in op_fields(node.op).items())
    path = "" if node.path == node.name else f" @{_quote(node.path)}"
    return f"{_quote(node.name)}: {_type_text(node.type)} = {type(node.op).__name__}({inputs}){fields}{path}"


def _parse_node(match: re.Match[str]) -> ir.Node:
    fields = {}
    for item in re.findall(_FIELD, match["fields"]):
        key, _, value = item.partition("=")
        fields[key] = ast.literal_eval(value)
    name = _unquote(match["name"])
    inputs = tuple(_unquote(item) for item in re.findall(_NAME, match["inputs"]))
    path = name if match["path"] is None else _unquote(match["path"])
    return ir.Node(name, make_op(match["op"], fields), inputs, _parse_type(match), path)


def _type_text(type_: ir.TensorType) -> str:
    text = f"{type_.dtype}[{','.join(map(str, type_.shape))}]"
    match type_.quant:
        case ir.PerTensor(scale, zero_point):
            return f"{text}{{scale={scale!r} zero_point={zero_point}}}"
        case ir.PerAxis(scales, axis) if len(scales) <= INLINE:
            return f"{text}{{axis={axis} scales={scales!r}}}"
        case ir.PerAxis(scales, axis):
            return f"{text}{{axis={axis} scales={_hash(np.asarray(scales, np.float32))}}}"
        case None:
            return text


def _parse_type(match: re.Match[str]) -> ir.TensorType:
    """Scales that were not written out are all 1."""
    shape = tuple(int(size) for size in match["shape"].split(",") if size)
    if match["quant"] is None:
        return ir.TensorType(shape, match["dtype"])
    values: dict[str, Any] = dict(item.split("=", 1) for item in re.findall(_FIELD, match["quant"]))
    if "axis" not in values:
        quant: ir.QuantParams = ir.PerTensor(float(values["scale"]), int(values["zero_point"]))
    elif values["scales"].startswith("#"):
        quant = ir.PerAxis((1.0,) * shape[int(values["axis"])], int(values["axis"]))
    else:
        quant = ir.PerAxis(tuple(ast.literal_eval(values["scales"])), int(values["axis"]))
    return ir.TensorType(shape, match["dtype"], quant)


def _constant_line(name: str, constant: ir.Constant) -> str:
    data = constant.data
    value = repr(data.tolist()) if data.size <= INLINE and np.isfinite(data).all() else _hash(data)
    return f"constant {_quote(name)}: {_type_text(constant.type)} = {value}"


def _parse_constant(match: re.Match[str]) -> ir.Constant:
    type_ = _parse_type(match)
    if match["value"].startswith("#"):
        return ir.Constant(type_, np.zeros(type_.shape, type_.dtype))
    return ir.Constant(type_, np.array(ast.literal_eval(match["value"]), type_.dtype))


def _hash(data: np.ndarray[Any, Any]) -> str:
    return "#" + hashlib.sha256(np.ascontiguousarray(data).tobytes()).hexdigest()[:8]
