"""Exported programs as files: what torch saves is read, and nothing in them is executed, whatever they say."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.malicious_pickle import Malicious
from torch import nn
from torch.export.pt2_archive import PT2ArchiveReader, PT2ArchiveWriter

from xceptile.models import zoo
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.weights import CheckpointError
from xceptile.models.xception import Xception
from xceptile.runtime import reference

GRAPH, SAMPLES = "models/model.json", "data/sample_inputs/model.pt"


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()


def saved(path: Path, network: nn.Module, shape: tuple[int, ...], open_dimensions: tuple[int, ...] = ()) -> Path:
    open_sizes = (dict.fromkeys(open_dimensions, torch.export.Dim.AUTO),) if open_dimensions else None
    torch.export.save(torch.export.export(network, (torch.zeros(shape),), dynamic_shapes=open_sizes), path)
    return path


def records_of(path: Path) -> dict[str, bytes]:
    reader = PT2ArchiveReader(str(path))
    return {name: reader.read_bytes(name) for name in reader.get_file_names()}


def rewrite(path: Path, records: dict[str, bytes]) -> None:
    with PT2ArchiveWriter(str(path)) as writer:
        for name, contents in records.items():
            if name.startswith(("models/", "data/")):
                writer.write_bytes(name, contents)


def doctor(path: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Rewrites the file with its program changed."""
    records = records_of(path)
    program = json.loads(records[GRAPH])
    edit(program)
    rewrite(path, records | {GRAPH: json.dumps(program).encode()})


@pytest.mark.parametrize("name", ["net.pt2", "net.pt"])
def test_an_open_batch_is_one(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = Xception(5, width=0.1).eval()
    model = zoo.load(saved(tmp_path / name, network, (2, 3, 71, 75), (0,)))
    assert model.graph.inputs[0].type.shape == (1, 71, 75, 3)
    x = torch.randn(1, 3, 71, 75)
    with torch.no_grad():
        expected = network(x).numpy()
    assert np.allclose(reference.run(model.graph, x.numpy().transpose(0, 2, 3, 1))[0], expected, atol=1e-4)


def test_an_open_height_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayer, match="is open; export it with only the batch open, or nothing"):
        zoo.load(saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0, 2, 3)))


def test_pickled_code_is_never_executed(tmp_path: Path) -> None:
    path, marker = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8)), tmp_path / "executed"
    records = records_of(path)
    bomb = io.BytesIO()
    torch.save((Malicious(marker),), bomb)
    rewrite(path, records | {SAMPLES: bomb.getvalue()})
    assert zoo.load(path).labels == ("0", "1", "2", "3"), "sample inputs are not read"
    assert not marker.exists()
    config = json.loads(records["data/weights/model_weights_config.json"])
    config["config"]["0.weight"]["use_pickle"] = True
    pickled = {
        "data/weights/model_weights_config.json": json.dumps(config).encode(),
        f"data/weights/{config['config']['0.weight']['path_name']}": bomb.getvalue(),
    }
    rewrite(path, records | pickled)
    with pytest.raises(CheckpointError, match="or holds code"):
        zoo.load(path)
    assert not marker.exists()
    rewrite(path, records | {"data/constants/opaque_obj_0": b"x"})
    with pytest.raises(CheckpointError, match="opaque_obj_0, which is code and is not executed"):
        zoo.load(path)


def call(marker: Path) -> str:
    return f"__import__('os').makedirs({str(marker)!r}, exist_ok=True)"


def an_open_size(program: dict[str, Any], marker: Path) -> None:
    size = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]
    size["expr_str"] = f"{call(marker)} or {size['expr_str']}"


def an_input_name(program: dict[str, Any], marker: Path) -> None:
    """Of one more: the default value of the argument that FX's generated Python takes it by."""
    module, name = program["graph_module"], f"more={call(marker)}"
    module["graph"]["inputs"].append({"as_tensor": {"name": name}})
    module["graph"]["tensor_values"][name] = module["graph"]["tensor_values"]["input"]
    module["signature"]["input_specs"].append({"user_input": {"arg": {"as_tensor": {"name": name}}}})


def an_operator(program: dict[str, Any], marker: Path) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.os.mkdir"
    node["inputs"] = [{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}]


def an_operand(program: dict[str, Any], marker: Path) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["inputs"].append({"name": "", "arg": {"as_operator": "torch.os.mkdir"}, "kind": 1})


def a_type_of_inputs(program: dict[str, Any], marker: Path) -> None:
    """An enumeration's module is imported."""
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    protocol, tree = json.loads(signature["in_spec"])
    tree["context"] = json.dumps({"__enum__": True, "fqn": "antigravity:C", "name": "A"})
    signature["in_spec"] = json.dumps([protocol, tree])


def a_parameter_name(program: dict[str, Any], marker: Path) -> None:
    program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = f'x", {call(marker)}, "'


REFUSED = {
    an_open_size: "has the size",
    an_input_name: "where a name or a size must be",
    an_operator: "calls 'torch.os.mkdir'",
    an_operand: "has 'operator' as an operand",
    a_type_of_inputs: "has inputs or outputs of type",
    a_parameter_name: "where a name or a size must be",
}


@pytest.mark.parametrize("edit", REFUSED, ids=lambda edit: edit.__name__)
def test_code_in_the_graph_is_never_executed(edit: Callable[[dict[str, Any], Path], None], tmp_path: Path) -> None:
    path, marker = saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0,)), tmp_path / "executed"
    doctor(path, lambda program: edit(program, marker))
    with pytest.raises(CheckpointError, match=REFUSED[edit]) as caught:
        zoo.load(path)
    assert "not executed; export a plain network" in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("edit", [an_open_size, an_input_name], ids=lambda edit: edit.__name__)
def test_the_traps_work(edit: Callable[[dict[str, Any], Path], None], tmp_path: Path) -> None:
    """torch itself executes what they hold."""
    path, marker = saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0,)), tmp_path / "executed"
    doctor(path, lambda program: edit(program, marker))
    torch.export.load(path)
    assert marker.exists()


def test_guards_are_left_out(tmp_path: Path) -> None:
    """They are Python, and torch compiles them where a program is called."""
    path, marker = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8)), tmp_path / "executed"
    doctor(path, lambda program: program.update(guards_code=[f"{call(marker)} is None"]))
    assert zoo.load(path).labels == ("0", "1", "2", "3")
    assert not marker.exists()
