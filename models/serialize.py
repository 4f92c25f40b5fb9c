"""A graph as one safetensors file: constants are its tensors, the structure is JSON in its metadata."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from . import graph as ir
from .atomic_write import write_atomically
from .read_file import MODEL_BYTES, read_file
from .verify import verify

FORMAT = "xceptile.graph"
FORMAT_VERSION = 1
OPS: dict[str, type] = {op.__name__: op for op in get_args(ir.Op)}


class GraphFileError(ValueError):
    """A file that holds no graph, or a damaged or newer one."""


def save(graph: ir.Graph, path: str | Path) -> None:
    """Written aside and renamed. Raises OSError."""
    write_atomically(path, dump(graph))


def load(path: str | Path) -> ir.Graph:
    """Reads and verifies. Raises GraphFileError for what is no graph or damaged, OSError for an unreadable file."""
    try:
        return parse(read_file(path, MODEL_BYTES))
    except GraphFileError as error:
        raise GraphFileError(f"{path}: {error}") from error


def dump(graph: ir.Graph) -> bytes:
    """The file's bytes; equal graphs give equal bytes."""
    import safetensors.numpy

    tensors = {name: np.ascontiguousarray(constant.data) for name, constant in sorted(graph.constants.items())}
    structure = {
        "name": graph.name,
        "outputs": list(graph.outputs),
        "nodes": [_node_to_json(node) for node in graph.nodes],
        "constants": {name: _quant_to_json(constant.type.quant) for name, constant in sorted(graph.constants.items())},
    }
    text = json.dumps(structure)
    metadata = {
        "format": FORMAT,
        "version": str(FORMAT_VERSION),
        "graph": text,
        "sha256": _sha256(text, tensors),
    }
    return in_order(safetensors.numpy.save(tensors, metadata))


def parse(data: bytes) -> ir.Graph:
    """The inverse of ``dump``. Raises GraphFileError."""
    import safetensors
    import safetensors.numpy

    try:
        tensors = safetensors.numpy.load(data)
        metadata = _metadata(data)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise GraphFileError(f"is no safetensors file, or truncated ({error}); copy it again") from error
    if metadata.get("format") != FORMAT:
        raise GraphFileError("is a safetensors file, but holds no graph")
    if metadata.get("version") != str(FORMAT_VERSION):
        raise GraphFileError(
            f"has graph format {metadata.get('version')}, this xceptile reads {FORMAT_VERSION}; update xceptile"
        )
    if metadata.get("sha256") != _sha256(metadata.get("graph", ""), tensors):
        raise GraphFileError("is damaged: its contents do not have the hash they were saved with; copy it again")
    try:
        graph = _graph_from_json(json.loads(metadata["graph"]), tensors)
        verify(graph)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise GraphFileError(f"holds a graph that breaks the rules ({error}); build it again") from error
    return graph


def op_fields(op: ir.Op) -> dict[str, Any]:
    """An operator's attributes, by name. A dilation of one is left out: it is what a file without it means."""
    values = {field.name: getattr(op, field.name) for field in dataclasses.fields(op)}
    if values.get("dilation") == (1, 1):
        del values["dilation"]
    return values


def make_op(name: str, fields: Mapping[str, Any]) -> ir.Op:
    """The operator with these attributes. Raises GraphError for an unknown one, TypeError for other attributes."""
    if name not in OPS:
        raise ir.GraphError(f"no such operator: {name}; known are {', '.join(OPS)}")
    op: ir.Op = OPS[name](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    for field in dataclasses.fields(op):
        value = getattr(op, field.name)
        kinds = {"bool": bool, "float": float, "str": str}
        known = kinds.get(str(field.type), tuple)
        if known is tuple and str(field.type) != "tuple[float, ...]":
            whole = len(value) == {"tuple[int, int]": 2, "Pads": 4}[str(field.type)]
            whole = whole and all(type(item) is int for item in value)
        else:
            whole = known is not tuple or all(type(item) is float for item in value)
        if not isinstance(value, known) or not whole:
            raise TypeError(f"{name}.{field.name} is {value!r}, not {field.type}")
    return op


def _node_to_json(node: ir.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "op": type(node.op).__name__,
        "attributes": op_fields(node.op),
        "inputs": list(node.inputs),
        "shape": list(node.type.shape),
        "dtype": node.type.dtype,
        "quant": _quant_to_json(node.type.quant),
        "path": node.path,
    }


def _quant_to_json(quant: ir.QuantParams | None) -> dict[str, Any] | None:
    return None if quant is None else dataclasses.asdict(quant)


def _quant_from_json(values: Mapping[str, Any] | None) -> ir.QuantParams | None:
    if values is None:
        return None
    if "axis" in values:
        return ir.PerAxis(tuple(float(scale) for scale in values["scales"]), int(values["axis"]))
    return ir.PerTensor(float(values["scale"]), int(values["zero_point"]))


def _graph_from_json(values: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> ir.Graph:
    if set(values["constants"]) != set(tensors):
        raise ValueError("its tensors are not those of its structure")
    constants = {}
    for name, data in tensors.items():
        type_ = ir.TensorType(data.shape, str(data.dtype), _quant_from_json(values["constants"][name]))
        constants[name] = ir.Constant(type_, data)
    nodes = tuple(
        ir.Node(
            str(node["name"]),
            make_op(node["op"], node["attributes"]),
            tuple(str(name) for name in node["inputs"]),
            ir.TensorType(
                tuple(int(size) for size in node["shape"]), str(node["dtype"]), _quant_from_json(node["quant"])
            ),
            str(node["path"]),
        )
        for node in values["nodes"]
    )
    return ir.Graph(str(values["name"]), nodes, constants, tuple(str(name) for name in values["outputs"]))


def _sha256(text: str, tensors: Mapping[str, np.ndarray[Any, Any]]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def _header(data: bytes) -> tuple[int, dict[str, Any]]:
    """Length and contents of a safetensors header: eight bytes of little-endian length, then JSON.

    Source: https://github.com/huggingface/safetensors#format
    """
    length = int.from_bytes(data[:8], "little")
    header: dict[str, Any] = json.loads(data[8 : 8 + length])
    return length, header


def _metadata(data: bytes) -> dict[str, str]:
    metadata: dict[str, str] = _header(data)[1].get("__metadata__", {})
    return metadata


def in_order(data: bytes) -> bytes:
    """The same file with its header's keys sorted: safetensors writes the metadata in the order of a hash table."""
    length, header = _header(data)
    text = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
