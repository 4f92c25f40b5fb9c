"""Exported programs from strangers: whatever their strings say, reading them runs nothing."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.malicious_pickle import Malicious
from support.planted_code import Witness, call, mutants
from support.pt2_files import (
    GRAPH,
    SAMPLES,
    WEIGHTS,
    as_torch_2_7,
    as_torch_2_8,
    doctor,
    exported,
    records_of,
    rewrite,
    saved,
    small,
)
from torch import nn

from xceptile.models import zoo
from xceptile.models.exported_program import ProgramError, load_graph
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.pickled_tensors import PickleError, Place, places

TORCH_LOAD = torch.export.load
REFUSALS = (ProgramError, UnsupportedLayer, zoo.ModelError)


@pytest.fixture(scope="module")
def witness() -> Witness:
    b"x".decode("cp437")  # the codec of zip's names is imported when first needed
    return Witness()


@pytest.fixture(autouse=True)
def no_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.export.load is not for files."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.export.load was called")

    monkeypatch.setattr(torch.export, "load", load)


def rich() -> nn.Module:
    """Something of everything that a file holds: parameters, buffers, a constant, an open batch, operators in place."""

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
            self.head = nn.Sequential(nn.Dropout(), nn.Linear(4, 2))
            self.register_buffer("unused", torch.ones(2), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.body(x).mean((2, 3))
            return self.head(x.view(x.size(0), -1))

    return Network().eval()


@pytest.mark.parametrize(("record", "least"), [(GRAPH, 800), (WEIGHTS, 100)])
def test_code_in_any_string_is_never_run(record: str, least: int, witness: Witness, tmp_path: Path) -> None:
    path, marker = saved(tmp_path / "net.pt2", rich(), (2, 3, 8, 8), (0,)), tmp_path / "executed"
    records = records_of(path)
    rewrite(path, records)
    zoo.load(path)  # imports whatever is imported when first needed
    loaded = tried = 0
    for mutant in mutants(json.loads(records[record]), marker):
        rewrite(path, records | {record: json.dumps(mutant).encode()})
        tried += 1
        witness.begin()
        try:
            load_graph(path, "net")
            loaded += 1
        except REFUSALS:
            pass
        finally:
            seen = witness.end()
        assert not seen
        assert not marker.exists()
    assert tried > least
    assert 0 < loaded < tried, "strings that are not read are ignored, others are refused"


def test_the_witness_sees(witness: Witness, tmp_path: Path) -> None:
    """Whatever a payload would do."""
    for deed in (
        lambda: eval("1 + 1"),
        lambda: exec("x = 1"),
        lambda: __import__("wave"),
        lambda: pickle.loads(pickle.dumps(Path)),
        lambda: (tmp_path / "executed").mkdir(),
        lambda: (tmp_path / "written").write_text("x"),
        lambda: subprocess.run(["true"], check=True),
    ):
        witness.begin()
        deed()
        assert witness.end(), deed


# --- Doors that torch.export.load has, or had. ---


def an_open_size(program: dict[str, Any], marker: Path) -> None:
    size = program["graph_module"]["graph"]["tensor_values"]["input"]["sizes"][0]["as_expr"]
    size["expr_str"] = f"{call(marker)} or {size['expr_str']}"


def an_input_name(program: dict[str, Any], marker: Path) -> None:
    """Of one more: the default value of the argument that FX's generated Python takes it by."""
    module, name = program["graph_module"], f"more={call(marker)}"
    module["graph"]["inputs"].append({"as_tensor": {"name": name}})
    module["graph"]["tensor_values"][name] = module["graph"]["tensor_values"]["input"]
    module["signature"]["input_specs"].append({"user_input": {"arg": {"as_tensor": {"name": name}}}})


def an_argument_name(program: dict[str, Any], marker: Path) -> None:
    """The same, by the names that the module's forward had."""
    entry = program["graph_module"]["module_call_graph"][0]["signature"]
    entry["forward_arg_names"] = [f"input={call(marker)}"]


def a_keyword(program: dict[str, Any], marker: Path) -> None:
    """In the context of the inputs' structure: it ends the generated function, goes on, and begins another."""
    entry = program["graph_module"]["module_call_graph"][0]["signature"]
    protocol, tree = json.loads(entry["in_spec"])
    positional, keywords = tree["children_spec"]
    keywords["children_spec"].append(positional["children_spec"].pop())
    keywords["context"] = json.dumps([f"x':0}}), self._in_spec)\n{call(marker)}\ndef unused(self, input):\n    pass #"])
    entry["in_spec"] = json.dumps([protocol, tree])


def a_type_of_inputs(program: dict[str, Any], marker: Path) -> None:
    """An enumeration's module is imported."""
    signature = program["graph_module"]["module_call_graph"][0]["signature"]
    protocol, tree = json.loads(signature["in_spec"])
    tree["context"] = json.dumps({"__enum__": True, "fqn": "antigravity:C", "name": "A"})
    signature["in_spec"] = json.dumps([protocol, tree])


def a_guard(program: dict[str, Any], marker: Path) -> None:
    program["guards_code"] = [f"{call(marker)} is None"]


def an_operator(program: dict[str, Any], marker: Path) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["target"] = "torch.os.mkdir"
    node["inputs"] = [{"name": "", "arg": {"as_string": str(marker)}, "kind": 1}]


def an_operand(program: dict[str, Any], marker: Path) -> None:
    node = program["graph_module"]["graph"]["nodes"][0]
    node["inputs"].append({"name": "more", "arg": {"as_operator": "torch.os.mkdir"}, "kind": 1})


def a_parameter_name(program: dict[str, Any], marker: Path) -> None:
    program["graph_module"]["signature"]["input_specs"][0]["parameter"]["parameter_name"] = f'x", {call(marker)}, "'


Door = Callable[[dict[str, Any], Path], None]
REFUSED: dict[Door, str] = {
    an_open_size: "is open; export it with only the batch open",
    an_input_name: "takes .* one image",
    an_operator: "operator torch.os.mkdir, is not supported",
    an_operand: "its operand more has no meaning here",
    a_parameter_name: "lacks the values of",
}
IGNORED: tuple[Door, ...] = (an_argument_name, a_keyword, a_type_of_inputs, a_guard)


@pytest.mark.parametrize("door", [*REFUSED, *IGNORED], ids=lambda door: door.__name__)
def test_doors_are_shut(door: Door, witness: Witness, tmp_path: Path) -> None:
    path, marker = saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0,)), tmp_path / "executed"
    zoo.load(path)
    doctor(path, lambda program: door(program, marker))
    witness.begin()
    try:
        if door in REFUSED:
            with pytest.raises(REFUSALS, match=REFUSED[door]):
                zoo.load(path)
        else:
            assert zoo.load(path).labels == ("0", "1", "2", "3")
    finally:
        seen = witness.end()
    assert not seen
    assert not marker.exists()


@pytest.mark.parametrize("door", [an_open_size, an_input_name, a_keyword], ids=lambda door: door.__name__)
def test_the_doors_are_open_in_torch(door: Door, tmp_path: Path) -> None:
    """So the tests above are about something."""
    path, marker = saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0,)), tmp_path / "executed"
    doctor(path, lambda program: door(program, marker))
    with contextlib.suppress(SyntaxError):  # of what is left, when it has run
        TORCH_LOAD(path).module()
    assert marker.exists()


def test_pickled_code_is_never_executed(witness: Witness, tmp_path: Path) -> None:
    path, marker = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8)), tmp_path / "executed"
    records = records_of(path)
    bomb = io.BytesIO()
    torch.save((Malicious(marker),), bomb)
    rewrite(path, records | {SAMPLES: bomb.getvalue()})
    assert zoo.load(path).labels == ("0", "1", "2", "3"), "sample inputs are not read"
    assert not marker.exists()
    config = json.loads(records[WEIGHTS])
    config["config"]["0.weight"]["use_pickle"] = True
    pickled = {
        WEIGHTS: json.dumps(config).encode(),
        f"data/weights/{config['config']['0.weight']['path_name']}": bomb.getvalue(),
    }
    rewrite(path, records | pickled)
    witness.begin()
    with pytest.raises(ProgramError, match=r"holds 0\.weight pickled"):
        zoo.load(path)
    assert not witness.end()
    for name in ("data/constants/opaque_obj_0", "data/aotinductor/model/code.so"):
        rewrite(path, records | {name: b"x"})
        with pytest.raises(ProgramError, match=f"{name}, which is code and is not executed"):
            zoo.load(path)


@pytest.mark.parametrize("layout", [as_torch_2_7, as_torch_2_8], ids=lambda layout: layout.__name__)
def test_pickled_state_dicts_are_not_unpickled(layout: Any, witness: Witness, tmp_path: Path) -> None:
    """Of older torch: they are read, and code in one of them is refused."""
    path, marker = tmp_path / "net.pt2", tmp_path / "executed"
    path.write_bytes(layout(exported(small(), (1, 3, 8, 8))))
    witness.begin()
    assert load_graph(path, "net").constants.keys() == {"0.weight", "0.bias"}
    assert not witness.end()
    bomb = io.BytesIO()
    torch.save({"0.weight": Malicious(marker)}, bomb)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    (state,) = (name for name in members if name.endswith(("state_dict.pt", "weights/model.pt")))
    with zipfile.ZipFile(path, "w") as archive:
        for name, contents in (members | {state: bomb.getvalue()}).items():
            archive.writestr(name, contents)
    witness.begin()
    with pytest.raises(ProgramError, match=r"which is not read: it calls (posix|nt) mkdir; load it in the torch"):
        load_graph(path, "net")
    assert not witness.end()
    assert not marker.exists()


def test_any_byte_of_a_pickle_may_be_wrong(witness: Witness) -> None:
    file = io.BytesIO()
    torch.save({"a": nn.Parameter(torch.zeros(2, 3)), "b": torch.zeros(2, dtype=torch.int64)}, file)
    with zipfile.ZipFile(file) as archive:
        pickle_bytes = archive.read("archive/data.pkl")
    assert places(pickle_bytes)["a"] == Place("0", "<f4", 0, (2, 3), (3, 1))
    witness.begin()
    refused = 0
    for index in range(len(pickle_bytes)):
        for value in range(0, 256, 5):
            try:
                places(pickle_bytes[:index] + bytes([value]) + pickle_bytes[index + 1 :])
            except PickleError:
                refused += 1
    assert not witness.end()
    assert refused > len(pickle_bytes)


def test_torch_is_not_even_imported(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8))
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from xceptile.models import zoo\n"
        f"print(zoo.load({str(path)!r}).labels)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() == "('0', '1', '2', '3')", result.stderr
