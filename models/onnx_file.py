"""An ONNX file and the files beside it that hold its larger tensors, read without following it elsewhere.

No code can come of it: the file is protocol buffers, of which names, numbers and a list of operators by name are read;
whatever computes with them is in ``from_onnx.py`` and ``onnx_fold.py``. A tensor's data may lie in another file, whose
name is a stranger's text: only plain files in the model's own folder are opened, or a model could carry any file of
whoever loads it into the network, and so into a bundle.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from .read_file import MODEL_BYTES, check_file

Array = NDArray[np.generic]
_KNOWN = (
    *("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "BOOL"),
    *("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"),
)
_TYPES = {TensorProto.DataType.Value(name) for name in _KNOWN}


class OnnxError(ValueError):
    """A file that holds no ONNX network, or a damaged one. ``path`` is the file."""

    def __init__(self, message: str, path: str | Path) -> None:
        super().__init__(f"{path}: {message}")
        self.path = str(path)


def read_onnx(path: str | Path) -> tuple[onnx.ModelProto, tuple[Path, ...]]:
    """A checked model with all its tensors in it, and the files beside it that held some, in order of name.

    Raises OnnxError, and OSError for what is no regular file.
    """
    path = Path(path)
    check_file(path)
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's errors have no common one
        raise OnnxError(f"is no sound ONNX model ({_reason(error)}); export it again", path) from error
    files = _read_tensors_beside(model, path)
    try:
        onnx.checker.check_model(model)
    except Exception as error:  # nor have the checker's
        raise OnnxError(f"is no sound ONNX model ({_reason(error)}); export it again", path) from error
    return model, files


def _reason(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def to_array(tensor: onnx.TensorProto) -> Array:
    """Raises ValueError for a type that no network here has, and where the data are not those of the shape."""
    if tensor.data_type not in _TYPES:
        raise ValueError(f"its elements are {_type_name(tensor)}; known are {', '.join(_KNOWN)}")
    array = numpy_helper.to_array(tensor)
    return array if np.issubdtype(array.dtype, np.number) or array.dtype == np.bool_ else array.astype(np.float32)


def _type_name(tensor: onnx.TensorProto) -> str:
    try:
        return str(TensorProto.DataType.Name(tensor.data_type))
    except ValueError:
        return f"of the unknown type {tensor.data_type}"


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a graph and of the graphs in its nodes."""
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for sparse in (attribute.sparse_tensor, *attribute.sparse_tensors):
            yield from (sparse.values, sparse.indices)
        for inner in (attribute.g, *attribute.graphs):
            yield from _tensors(inner)


def _read_tensors_beside(model: onnx.ModelProto, path: Path) -> tuple[Path, ...]:
    """Puts the data of tensors that lie in other files into the model."""
    files: set[Path] = set()
    left = MODEL_BYTES
    inner = (tensor for function in model.functions for node in function.node for tensor in _of_node(node))
    for tensor in (*_tensors(model.graph), *inner):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        said = {entry.key: entry.value for entry in tensor.external_data}
        file = _beside(said.get("location", ""), path)
        size = _size_bytes(tensor, path)
        left -= size
        if left < 0:
            raise OnnxError(f"its tensors take more than {MODEL_BYTES >> 20} MiB", path)
        tensor.raw_data = _slice(file, said, size, tensor.name, path)
        tensor.data_location = TensorProto.DEFAULT
        del tensor.external_data[:]
        files.add(file)
    return tuple(sorted(files))


def _beside(location: str, path: Path) -> Path:
    """A plain file in the model's folder, whatever links there are on the way. Raises OnnxError."""
    folder = path.parent.resolve()
    outside = Path(location).is_absolute() or ".." in Path(location).parts
    try:
        file = (path.parent / location).resolve(strict=True)
        outside = outside or not file.is_relative_to(folder)
        if not outside:
            check_file(file)
            return path.parent / location
    except (OSError, ValueError) as error:  # a name with a null byte is a ValueError
        if not outside:
            reason = getattr(error, "strerror", None) or error
            raise OnnxError(f"its tensors in {location[:80]!r} cannot be read: {reason}", path) from error
    raise OnnxError(
        f"names the file {location[:80]!r} for its tensors, which lies outside the model's folder and is not read; "
        "copy it beside the model and export with that name",
        path,
    )


def _size_bytes(tensor: onnx.TensorProto, path: Path) -> int:
    if tensor.data_type not in _TYPES or any(size < 0 for size in tensor.dims):
        raise OnnxError(f"its tensor {tensor.name[:80]} is {_type_name(tensor)} {list(tensor.dims)[:8]}", path)
    return int(math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)


def _slice(file: Path, said: dict[str, str], size: int, name: str, path: Path) -> bytes:
    """Source of the keys: ``external_data`` in onnx.proto."""
    try:
        offset, length = int(said.get("offset", "0")), int(said.get("length", str(size)))
    except ValueError as error:
        raise OnnxError(f"the place of its tensor {name[:80]} is no number ({error})", path) from error
    whole = file.stat().st_size
    if length != size or offset < 0 or offset + length > whole:
        raise OnnxError(
            f"its tensor {name[:80]} takes {size} bytes, {length} at {offset} of {file.name}'s {whole} are said to be "
            "it; export it again",
            path,
        )
    with file.open("rb") as stream:
        stream.seek(offset)
        return stream.read(length)
