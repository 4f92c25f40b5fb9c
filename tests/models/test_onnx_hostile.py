"""ONNX files from strangers: they compute nothing without end, name no file elsewhere, ask for no memory they lack."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from xceptile.models import zoo
from xceptile.models.from_onnx import from_onnx, load_onnx
from xceptile.models.graph_builder import MAX_NODES, UnsupportedLayer
from xceptile.models.onnx_file import OnnxError, read_onnx

Steps = list[tuple[str, str, str, dict[str, Any]]]
NUMBERS = {
    "nine": np.array(9),
    "nines": np.array([9.0, 9.0], np.float32),
    "zero": np.array(0),
    "one": np.array(1),
    "huge": np.array(1 << 40),
    "shape": np.array([1 << 20, 1 << 20, 1 << 20]),
    "minus": np.array([4, -1]),
    "times": np.array([1 << 40, 1]),
    "matrix": np.ones((2, 3), np.float32),
    "many": np.zeros(1000, np.int64),
    "whole": np.array([1 << 61, 3]),
    "t": np.array([1 << 27]),
    "w": np.ones((4, 3, 3, 3), np.float32),
}


def model(*steps: tuple[str, str, str, dict[str, Any]], **changes: Any) -> onnx.ModelProto:
    """Constants computed by ``steps``, the last of which are a convolution's weights."""
    nodes = [helper.make_node(op, names.split(), [to], name=f"/part/{op}", **more) for op, names, to, more in steps]
    nodes.append(helper.make_node("Conv", ["x", steps[-1][2] if steps else "w"], ["y"], name="/conv"))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, (1, 3, 8, 8))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ("n", "c", "h", "w"))],
        [numpy_helper.from_array(data, name) for name, data in NUMBERS.items()],
    )
    opset = changes.pop("opset", 18)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8, **changes)


def loop() -> Steps:
    """A billion turns."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["c"], ["c2"]), helper.make_node("Identity", ["v"], ["v2"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, ()),
            helper.make_tensor_value_info("c", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("v", TensorProto.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("c2", TensorProto.BOOL, ()),
            helper.make_tensor_value_info("v2", TensorProto.FLOAT, None),
        ],
    )
    return [("Cast", "one", "yes", {"to": TensorProto.BOOL}), ("Loop", "huge yes w", "v", {"body": body})]


WITHOUT_END: dict[str, tuple[Steps, str]] = {
    "a power of a power": ([("Pow", "nine nine", "p", {}), ("Pow", "nine p", "v", {})], "which is not computed before"),
    "a loop": (loop(), "it runs a graph of its own"),
    "a range": ([("Range", "zero huge one", "v", {})], "makes more than 268435456 elements"),
    "a range in steps of nothing": ([("Range", "zero huge zero", "v", {})], "in steps of 0"),
    "zeros": ([("ConstantOfShape", "shape", "v", {})], "makes more than 268435456 elements"),
    "a shape below zero": ([("ConstantOfShape", "minus", "v", {})], r"makes a constant of shape \[4, -1\]"),
    "copies": ([("Expand", "nine shape", "v", {})], "makes more than 268435456 elements"),
    "tiles": ([("Tile", "matrix times", "v", {})], "makes more than 268435456 elements"),
    "a gathering": (
        [("Expand", "zero t", "i", {}), ("Gather", "matrix i", "v", {})],
        "makes more than 268435456 elements",
    ),
    "whole numbers that go round": ([("Mul", "whole whole", "v", {})], r"makes whole numbers of 2\^62 or more"),
    "a division by zero": ([("Div", "nine zero", "v", {})], "divides whole numbers by zero"),
    "a number that no type holds": (
        [("Mul", "nines nines", "m", {}), ("Exp", "m", "v", {})],
        "of constants, which is not computed beforehand; Add, Cast",
    ),
    "shapes that do not go together": ([("Add", "matrix nines", "v", {})], "that do not go together"),
    "dimensions without end": ([("Reshape", "w many", "v", {})], "that do not go together"),
    "noise": ([("RandomNormal", "", "v", {"shape": [4, 3, 3, 3]})], "it draws random numbers"),
    "zeros, little by little": (
        [("ConstantOfShape", "s", f"z{i}", {}) for i in range(300)] + [("Concat", "z0 z1", "v", {"axis": 0})],
        "makes more than 268435456 elements",
    ),
}


@pytest.mark.parametrize("name", WITHOUT_END)
def test_what_is_computed_beforehand_is_a_closed_list_with_an_end(name: str) -> None:
    steps, message = WITHOUT_END[name]
    proto = model(*steps)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20]), "s"))
    if name == "zeros, little by little":  # all of them needed
        proto.graph.node[-2].input[:] = [f"z{i}" for i in range(300)]
    with pytest.raises(UnsupportedLayer, match=message):
        from_onnx(proto)


def test_weights_take_no_more_than_a_file_could_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same quarter of a megabyte under forty names, where four megabytes are allowed."""
    monkeypatch.setattr("xceptile.models.from_onnx.MODEL_BYTES", 4 << 20)
    proto = model()
    del proto.graph.node[:]
    big = np.random.default_rng(0).normal(size=(256, 256, 1, 1)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(big[:, :3], "first"))
    proto.graph.initializer.append(numpy_helper.from_array(big, "big"))
    proto.graph.node.append(helper.make_node("Conv", ["x", "first"], ["t0"]))
    for i in range(40):
        proto.graph.node.append(helper.make_node("Transpose", ["big"], [f"w{i}"], perm=[i % 2, 1 - i % 2, 2, 3]))
        proto.graph.node.append(helper.make_node("Conv", [f"t{i}", f"w{i}"], [f"t{i + 1}"]))
    proto.graph.output[0].name = "t40"
    with pytest.raises(UnsupportedLayer, match="the weights take many times the bytes of their file"):
        from_onnx(proto)


def test_layers_without_end_are_refused() -> None:
    proto = model()
    del proto.graph.node[:]
    proto.graph.node.extend(
        helper.make_node("Relu", [f"t{i}" if i else "x"], [f"t{i + 1}"]) for i in range(MAX_NODES + 1)
    )
    proto.graph.output[0].name = f"t{MAX_NODES + 1}"
    with pytest.raises(UnsupportedLayer, match=rf"as layer {MAX_NODES + 1}; at most"):
        from_onnx(proto)


# --- Meanings of its own. ---


def test_a_function_of_the_files_own_stands_for_no_operator() -> None:
    ours = [helper.make_opsetid("", 18)]
    function = helper.make_function("", "Conv", ["x", "w"], ["y"], [helper.make_node("Relu", ["x"], ["y"])], ours)
    with pytest.raises(
        UnsupportedLayer, match="operator Conv, is not supported: the file gives it a meaning of its own"
    ):
        from_onnx(model(functions=[function]))


def test_old_opsets_and_other_domains_are_refused() -> None:
    with pytest.raises(UnsupportedLayer, match=r"its opset is older than 7; convert it with onnx\.version_converter"):
        from_onnx(model(opset=6))
    proto = model()
    proto.graph.node[0].domain = "com.microsoft"
    with pytest.raises(UnsupportedLayer, match=r"it belongs to the domain com\.microsoft"):
        from_onnx(proto)


@pytest.mark.parametrize("kind", [TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.INT4, 99])
def test_tensors_of_other_types_are_refused(kind: int) -> None:
    proto = model()
    proto.graph.initializer[-1].data_type = kind
    with pytest.raises(UnsupportedLayer, match="its elements are"):
        from_onnx(proto)


def test_a_shape_that_the_data_do_not_fill_is_refused() -> None:
    proto = model()
    proto.graph.initializer[-1].dims[0] = 1 << 50
    with pytest.raises(UnsupportedLayer, match="it cannot be read"):
        from_onnx(proto)


# --- Tensors in other files. ---

Change = Callable[[dict[str, str]], None]


def beside(folder: Path, **entries: str) -> Path:
    """A model whose weights are said to lie in another file."""
    folder.mkdir(parents=True, exist_ok=True)
    proto = model()
    weights = next(tensor for tensor in proto.graph.initializer if tensor.name == "w")
    (folder / "weights.bin").write_bytes(b"pad!" + weights.raw_data)
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    said = {"location": "weights.bin", "offset": "4", "length": str(4 * 108)} | entries
    for key, value in said.items():
        weights.external_data.add(key=key, value=value)
    (folder / "net.onnx").write_bytes(proto.SerializeToString())
    return folder / "net.onnx"


def test_tensors_in_a_file_beside_are_read(tmp_path: Path) -> None:
    path = beside(tmp_path / "model")
    network = load_onnx(path)
    assert network.graph.constants["w"].data.sum() == 108
    assert [file.name for file in network.files] == ["weights.bin"]
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "net.onnx").symlink_to(path)
    (linked / "weights.bin").symlink_to("other.bin")  # a link that stays in the folder
    (linked / "other.bin").write_bytes((tmp_path / "model/weights.bin").read_bytes())
    assert load_onnx(linked / "net.onnx").graph.constants["w"].data.sum() == 108


@pytest.mark.parametrize(
    "location",
    ["/etc/passwd", "../secret", "inner/../../secret", "link", "folder/secret", "hop", "", ".", "none", "a\0b", "pipe"],
)
def test_no_file_outside_of_the_models_folder_is_read(location: str, tmp_path: Path) -> None:
    """By an absolute name, a name with dots, a link to a file or to a folder; nor a folder, nor what is no file."""
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(1000))
    path = beside(tmp_path / "model", location=location)
    (path.parent / "inner").mkdir()
    (path.parent / "link").symlink_to(secret)
    (path.parent / "hop").symlink_to("link")
    (path.parent / "folder").symlink_to(tmp_path)
    os.mkfifo(path.parent / "pipe")
    with pytest.raises(
        OnnxError, match=r"net\.onnx: (names the file .* lies outside|its tensors in .* cannot be read)"
    ):
        read_onnx(path)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "5"}, "takes 432 bytes, 432 at 5 of"),
        ({"offset": "-4"}, "takes 432 bytes, 432 at -4 of"),
        ({"length": "0"}, "takes 432 bytes, 0 at 4 of"),
        ({"length": "999999999999999999999"}, "takes 432 bytes, 999999999999999999999 at 4"),
        ({"offset": "four"}, "the place of its tensor w is no number"),
    ],
)
def test_a_place_outside_of_the_file_is_refused(entries: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(OnnxError, match=message):
        read_onnx(beside(tmp_path, **entries))


@pytest.mark.parametrize("dims", [[1 << 40], [-1], [1 << 20, 1 << 20, 1 << 20, 1 << 20]])
def test_tensors_beside_without_end_are_refused(dims: list[int], tmp_path: Path) -> None:
    path = beside(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.initializer[-1].dims[:] = dims
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(OnnxError, match=r"its tensors? (take more than 2048 MiB|w is FLOAT \[-1\])"):
        read_onnx(path)


def test_a_tensor_beside_may_hide_in_a_nodes_attributes(tmp_path: Path) -> None:
    """In a constant, in a graph within a node, in a function: none is read from elsewhere."""
    (tmp_path / "secret").write_bytes(bytes(1000))
    hidden = helper.make_tensor("t", TensorProto.FLOAT, [1], [0.0])
    hidden.ClearField("float_data")
    hidden.data_location = TensorProto.EXTERNAL
    hidden.external_data.add(key="location", value="../secret")
    constant = helper.make_node("Constant", [], ["c"], value=hidden)
    inner = helper.make_graph([constant], "inner", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, None)])
    branch = helper.make_node("If", ["one"], ["i"], then_branch=inner, else_branch=inner)
    function = helper.make_function("own", "F", [], ["c"], [constant], [helper.make_opsetid("", 18)])
    (tmp_path / "model").mkdir()
    for change in (
        lambda proto: proto.graph.node.insert(0, constant),
        lambda proto: proto.graph.node.insert(0, branch),
        lambda proto: proto.functions.append(function),
    ):
        proto = model()
        change(proto)
        path = tmp_path / "model" / "net.onnx"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(OnnxError, match="lies outside the model's folder and is not read"):
            read_onnx(path)


def test_provenance_hashes_what_was_read(tmp_path: Path) -> None:
    head: Steps = [("GlobalAveragePool", "y", "p", {}), ("Flatten", "p", "z", {})]
    path = beside(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    proto.graph.node.extend(helper.make_node(op, [a], [b]) for op, a, b, _ in head)
    proto.graph.output[0].name = "z"
    path.write_bytes(proto.SerializeToString())
    data = (tmp_path / "weights.bin").read_bytes()
    assert zoo.load(path).provenance["sha256 of weights.bin"] == hashlib.sha256(data).hexdigest()
