"""Graphs as text and as files: both come back as they were, and damage is named."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from support.int8_graphs import random_input, random_xception
from support.sound_graphs import float_graph, int8_graph

from xceptile.models import graph as ir
from xceptile.models import serialize
from xceptile.models.graph_text import parse_text, to_text
from xceptile.models.verify import verify
from xceptile.runtime import reference

SMALL = """\
graph small
x: int8[1,4,4,2]{scale=0.5 zero_point=3} = Input() @""
conv: int8[1,2,2,1]{scale=0.25 zero_point=-128} = Conv2d(x, w, b) strides=(2, 2) padding=(0, 1, 0, 1) relu=True @net.0
"a name": float32[1,2,2,1] = Dequantize(conv) @net.1
pool: float32[1,1,1,1] = MaxPool2d("a name") kernel=(2, 2) strides=(1, 1) padding=(0, 0, 0, 0)
output pool
constant b: int32[1]{axis=0 scales=(0.5,)} = [-7]
constant w: int8[1,2,2,2]{axis=0 scales=(1.0,)} = [[[[1, 2], [3, 4]], [[5, 6], [7, -8]]]]
"""


def same(a: ir.Graph, b: ir.Graph) -> bool:
    return (
        (a.name, a.nodes, a.outputs) == (b.name, b.nodes, b.outputs)
        and set(a.constants) == set(b.constants)
        and all(
            c.type == b.constants[k].type and np.array_equal(c.data, b.constants[k].data)
            for k, c in a.constants.items()
        )
    )


def test_a_dilation_comes_back() -> None:
    text = SMALL.replace("padding=(0, 1, 0, 1) relu=True", "padding=(0, 2, 0, 2) relu=True dilation=(2, 2)")
    graph = parse_text(text)
    verify(graph)
    assert to_text(graph) == text


def test_text_comes_back() -> None:
    graph = parse_text(SMALL)
    verify(graph)
    assert to_text(graph) == SMALL
    assert graph.node("conv").op == ir.Conv2d((2, 2), (0, 1, 0, 1), relu=True)
    assert graph.node("pool").path == "pool"


@pytest.mark.parametrize("graph", [float_graph(), int8_graph()], ids=lambda g: g.name)
def test_every_operator_as_text(graph: ir.Graph) -> None:
    """Structure and types come back; large constants do as zeros, which their hashes show."""
    again = parse_text(to_text(graph))
    assert again.nodes == graph.nodes
    assert {k: c.type for k, c in again.constants.items()} == {k: c.type for k, c in graph.constants.items()}
    assert np.array_equal(again.constants["b"].data, graph.constants["b"].data)
    assert to_text(replace(graph, constants=again.constants)) != to_text(graph)
    verify(again)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("Conv2d", "Conv3d", "line 3: .*no such operator: Conv3d"),
        (" relu=True", " relu=3", r"line 3: .*Conv2d.relu is 3, not bool"),
        (" relu=True", " relus=True", "line 3: .*unexpected keyword"),
        ("padding=(0, 1, 0, 1)", "padding=(0, 1, 0)", r"line 3: .*Conv2d.padding is \(0, 1, 0\), not Pads"),
        ("strides=(2, 2)", "strides=(2, 2.0)", "line 3: .*not tuple"),
        ("output pool", "outputs pool", "line 6: .*neither a node"),
        ("= [-7]", "= [-7, 8]", "line 7: .*constant holds"),
        ("int8[1,4,4,2]", "int8(1,4,4,2)", "line 2: .*neither a node"),
    ],
)
def test_text_with_faults(old: str, new: str, message: str) -> None:
    with pytest.raises(ir.GraphError, match=message):
        parse_text(SMALL.replace(old, new))


def test_files_come_back_bit_for_bit(tmp_path: Path) -> None:
    graph, path = random_xception(71, 0.05, 5, seed=1), tmp_path / "graph.safetensors"
    serialize.save(graph, path)
    again = serialize.load(path)
    assert same(again, graph)
    assert serialize.dump(again) == path.read_bytes() == serialize.dump(graph)
    assert os.listdir(tmp_path) == ["graph.safetensors"]
    x = random_input(graph, seed=2)
    for ours, theirs in zip(reference.run(again, *x), reference.run(graph, *x), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("graph", [float_graph(), int8_graph(), parse_text(SMALL)], ids=lambda g: g.name)
def test_every_operator_as_a_file(graph: ir.Graph) -> None:
    assert same(serialize.parse(serialize.dump(graph)), graph)


def test_damaged_files(tmp_path: Path) -> None:
    path, whole = tmp_path / "graph.safetensors", serialize.dump(int8_graph())
    for length in (0, 7, 8, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(serialize.GraphFileError, match=r"graph\.safetensors: is no safetensors file, or truncated"):
            serialize.load(path)
    header = int.from_bytes(whole[:8], "little")
    for position in range(8, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 4]) + whole[position + 1 :])
        if position >= 8 + header:
            with pytest.raises(serialize.GraphFileError, match="is damaged"):
                serialize.load(path)
        else:
            with contextlib.suppress(serialize.GraphFileError):  # no error: in the padding of the header, say
                assert same(serialize.load(path), int8_graph())


def resigned(graph: ir.Graph, change: object) -> bytes:
    """The file of a graph whose structure was changed, with a hash that fits."""
    import safetensors.numpy

    whole = serialize.dump(graph)
    tensors, metadata = safetensors.numpy.load(whole), serialize._metadata(whole)
    structure = json.loads(metadata["graph"])
    change(structure, metadata)
    metadata["graph"] = json.dumps(structure)
    metadata["sha256"] = serialize._sha256(metadata["graph"], tensors)
    return safetensors.numpy.save(tensors, metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s, _: s["nodes"][1].update(op="Softmax"), "no such operator: Softmax"),
        (lambda s, _: s["nodes"][1].update(shape=[1, 1, 1, 1]), "has shape"),
        (lambda s, _: s["nodes"][1]["attributes"].update(strides=2), "breaks the rules"),
        (lambda s, _: s["nodes"].pop(2), "input relu is not made before it"),
        (lambda s, _: s["constants"].pop("w"), "its tensors are not those of its structure"),
        (lambda s, _: s.pop("outputs"), "breaks the rules"),
        (lambda _, m: m.update(version="2"), "has graph format 2, this xceptile reads 1; update xceptile"),
        (lambda _, m: m.update(format="other"), "holds no graph"),
    ],
)
def test_files_that_break_the_rules(change: object, message: str) -> None:
    with pytest.raises(serialize.GraphFileError, match=message):
        serialize.parse(resigned(int8_graph(), change))
