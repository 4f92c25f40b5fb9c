"""Exported programs as files: what torch saves is read as torch means it, and no file costs more than its size."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.foreign_xceptions import images, timm_xception
from support.needs import requires_module
from support.pt2_files import (
    GRAPH,
    WEIGHTS,
    archive_of,
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

from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.exported_program import ProgramError, load_graph
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.verify import verify
from xceptile.models.weights import load_checkpoint
from xceptile.models.xception import Xception
from xceptile.runtime import reference

needs_timm = requires_module("timm", package="timm")


def compare(model: zoo.Model, network: nn.Module, size: int) -> None:
    """Outputs, within 1e-4 of the largest."""
    verify(model.graph)
    assert model.graph.inputs[0].type.shape == (1, size, size, 3)
    x = images(1, size)
    with torch.no_grad():
        expected = network(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
    found = reference.run(model.graph, x)[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("open_dimensions", [(), (0,)], ids=["fixed", "open batch"])
def test_the_demo_network(open_dimensions: tuple[int, ...], tmp_path: Path) -> None:
    checkpoint = load_checkpoint(zoo.DEMO)
    size = checkpoint.input_spec.height
    batch = 2 if open_dimensions else 1
    path = saved(tmp_path / "net.pt2", checkpoint.module, (batch, 3, size, size), open_dimensions)
    model = zoo.load(path)
    compare(model, checkpoint.module, size)
    paths = {node.path for node in model.graph.nodes}
    assert paths >= {"conv1", "blocks.2.shortcut.0", "sepconv4.pointwise", "classifier"}
    assert model.provenance["kind"] == "exported program"


@needs_timm
@pytest.mark.slow
@pytest.mark.parametrize("open_dimensions", [(), (0,)], ids=["fixed", "open batch"])
def test_timm_xception(open_dimensions: tuple[int, ...], tmp_path: Path) -> None:
    """As published, at full size; its ReLUs work in place."""
    network = timm_xception()
    path = saved(tmp_path / "net.pt2", network, (2 if open_dimensions else 1, 3, 299, 299), open_dimensions)
    nodes = json.loads(records_of(path)[GRAPH])["graph_module"]["graph"]["nodes"]
    assert "torch.ops.aten.relu_.default" in {node["target"] for node in nodes}
    compare(zoo.load(path), network, 299)


def test_a_program_under_another_name(tmp_path: Path) -> None:
    assert zoo.load(saved(tmp_path / "net.pt", small(), (1, 3, 8, 8))).graph.name == "net"


def test_half_precision(tmp_path: Path) -> None:
    network = Xception(5, width=0.1).eval()
    for kind, tolerance in ((torch.float16, 0.02), (torch.bfloat16, 0.1), (torch.float64, 1e-4)):
        half = Xception(5, width=0.1).eval()
        half.load_state_dict(network.state_dict())
        half = half.to(kind)
        path = tmp_path / "net.pt2"
        torch.export.save(torch.export.export(half, (torch.zeros(1, 3, 71, 71, dtype=kind),)), path)
        x = images(1, 71)
        with torch.no_grad():
            expected = network(torch.from_numpy(x).permute(0, 3, 1, 2)).numpy()
        assert np.abs(reference.run(zoo.load(path).graph, x)[0] - expected).max() < tolerance * np.abs(expected).max()


class Views(nn.Module):
    """Two weights that are views of one storage: rows of it, and columns of it transposed."""

    def __init__(self) -> None:
        super().__init__()
        both = torch.randn(11, 4)
        self.a = nn.Parameter(both[1:6])
        self.b = nn.Parameter(both.t()[:, 2:7])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(nn.functional.linear(x.mean((2, 3)), self.a), self.b)


def test_weights_may_be_views_of_one_storage(tmp_path: Path) -> None:
    network = Views().eval()
    path = saved(tmp_path / "net.pt2", network, (1, 4, 3, 3))
    places = json.loads(records_of(path)[WEIGHTS])["config"].values()
    assert len({place["path_name"] for place in places}) == 1
    assert [place["tensor_meta"]["strides"][0]["as_int"] for place in places] == [4, 1]
    x = torch.randn(1, 4, 3, 3)
    with torch.no_grad():
        expected = network(x).numpy()
    graph = load_graph(path, "net")
    assert np.allclose(reference.run(graph, x.permute(0, 2, 3, 1).numpy())[0], expected, atol=1e-6)


@pytest.mark.parametrize("layout", [as_torch_2_7, as_torch_2_8], ids=lambda layout: layout.__name__)
def test_layouts_of_older_torch(layout: Callable[[torch.export.ExportedProgram], bytes], tmp_path: Path) -> None:
    """With parameters, buffers and views in pickled state dicts."""
    path = tmp_path / "net.pt"
    for network, shape in ((Views().eval(), (1, 4, 3, 3)), (Xception(5, width=0.1).eval(), (1, 3, 71, 71))):
        path.write_bytes(layout(exported(network, shape)))
        model = zoo.load(path) if shape[1] == 3 else None
        graph = model.graph if model else load_graph(path, "net")
        x = torch.randn(shape)
        with torch.no_grad():
            expected = network(x).numpy()
        assert np.allclose(reference.run(graph, x.permute(0, 2, 3, 1).numpy())[0], expected, atol=1e-5)


def test_a_schema_that_is_not_known_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8))
    doctor(path, lambda program: program["schema_version"].update(major=9))
    with pytest.raises(ProgramError, match=r"has the schema 9; 7 and 8 are read; .* save it with torch 2.9 or later"):
        load_graph(path, "net")


# --- Operators in place. ---


class Function(nn.Module):
    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def used_after(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x)
    z = nn.functional.relu(y, inplace=True)
    return m.conv(y) + z


def twice(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x).detach()
    z = y.relu_()
    z.add_(m.conv(x))
    return m.conv(y)


def the_input(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    x.relu_()
    return m.conv(x)


def through_dropout(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """In evaluation mode its result is what it was given."""
    y = m.conv(x)
    nn.functional.dropout(y, training=False).relu_()
    return m.conv(y)


def another_view(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    y = m.conv(x).mean((2, 3), keepdim=True)
    y.view(1, 3).relu_()
    return m.conv(y)


@pytest.mark.parametrize("function", [used_after, twice, the_input, through_dropout], ids=lambda f: f.__name__)
def test_operators_in_place(function: Any, tmp_path: Path) -> None:
    network = Function(function).eval()
    path = saved(tmp_path / "net.pt2", network, (1, 3, 5, 6))
    targets = [node["target"] for node in json.loads(records_of(path)[GRAPH])["graph_module"]["graph"]["nodes"]]
    assert "torch.ops.aten.relu_.default" in targets
    graph = load_graph(path, "net")
    x = torch.randn(1, 3, 5, 6)
    before = x.permute(0, 2, 3, 1).numpy().copy()
    with torch.no_grad():
        expected = network(x).permute(0, 2, 3, 1).numpy()
    assert np.allclose(reference.run(graph, before)[0], expected, atol=1e-5)


def test_a_change_through_another_view_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2", Function(another_view).eval(), (1, 3, 5, 6))
    with pytest.raises(UnsupportedLayer, match=r"layer conv, .* after aten.relu changed another view of it in place"):
        load_graph(path, "net")


# --- What is refused, and what to do. ---


class NoGradient(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return x.relu()


def norm() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).train()


def test_training_mode_is_refused(tmp_path: Path) -> None:
    """As it is exported, and when the changes have become outputs; dropout alone, too."""
    path, program = tmp_path / "net.pt2", exported(norm(), (2, 3, 8, 8))
    for each in (program, program.run_decompositions({})):
        torch.export.save(each, path)
        with pytest.raises(UnsupportedLayer, match=r"call model.eval\(\) before torch.export.export"):
            load_graph(path, "net")
    torch.export.save(exported(nn.Sequential(nn.Dropout()).train(), (2, 3, 8, 8)), path)
    with pytest.raises(UnsupportedLayer, match=r"training mode; call model.eval\(\) before torch.export.export"):
        load_graph(path, "net")
    torch.export.save(exported(norm().eval(), (2, 3, 8, 8)), path)
    assert [type(node.op) for node in load_graph(path, "net").nodes] == [ir.Input, ir.Conv2d, ir.BatchNorm]


def test_open_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedLayer, match="is open; export it with only the batch open, or nothing"):
        zoo.load(saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0, 2, 3)))


def test_a_graph_within_the_graph_is_refused(tmp_path: Path) -> None:
    program = exported(NoGradient(), (1, 3, 8, 8))
    torch.export.save(program, tmp_path / "net.pt2")
    with pytest.raises(UnsupportedLayer, match=r"save program.run_decompositions\(\{\}\) instead"):
        load_graph(tmp_path / "net.pt2", "net")
    torch.export.save(program.run_decompositions({}), tmp_path / "net.pt2")
    assert [type(node.op) for node in load_graph(tmp_path / "net.pt2", "net").nodes] == [ir.Input, ir.Relu]


MEAN = torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)
LOGITS, PIXELS = "end the network at its logits", "it prepares pixels; export the network without it and give --prep"
ABOUT: dict[str, tuple[nn.Module, str, str]] = {
    "softmax": (nn.Sequential(small(), nn.Softmax(1)), "layer 1, operator aten.softmax,", LOGITS),
    "sigmoid": (nn.Sequential(small(), nn.Sigmoid()), "layer 1, operator aten.sigmoid,", LOGITS),
    "argmax": (Function(lambda m, x: m.conv(x).mean((2, 3)).argmax(1)), "operator aten.argmax,", LOGITS),
    "softmax, argmax": (Function(lambda m, x: m.conv(x).mean((2, 3)).softmax(1).argmax(1)), "aten.softmax,", LOGITS),
    "sigmoid, moved": (
        Function(lambda m, x: m.conv(x).mean((2, 3), True).sigmoid().flatten(1)),
        "aten.sigmoid,",
        LOGITS,
    ),
    "minus a mean": (Function(lambda m, x: m.conv((x - MEAN) / 0.2)), "operator aten.sub,", PIXELS),
    "255": (Function(lambda m, x: m.conv(x / 255)), "operator aten.div,", PIXELS),
    "from -1": (Function(lambda m, x: m.conv(x * 2 - 1)), "operator aten.mul,", PIXELS),
    "plus": (Function(lambda m, x: m.conv(x + 1)), "operator aten.add,", PIXELS),
    "a head's factor": (Function(lambda m, x: m.conv(x).mean((2, 3)) * 0.5), "aten.mul,", "no int8 form of it here"),
}


@pytest.mark.parametrize("name", ABOUT)
def test_what_stands_in_front_and_at_the_end(name: str, tmp_path: Path) -> None:
    """One line, with the file, the layer and what to do."""
    network, layer, what = ABOUT[name]
    path = saved(tmp_path / "net.pt2", network.eval(), (1, 3, 8, 8))
    with pytest.raises(UnsupportedLayer) as caught:
        zoo.load(path)
    assert str(caught.value).startswith(f"{path}: layer ")
    assert layer in str(caught.value)
    assert what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_two_outputs_are_refused(tmp_path: Path) -> None:
    network = Function(lambda m, x: (m.conv(x).mean((2, 3)), m.conv(x)))
    path = saved(tmp_path / "net.pt2", network.eval(), (1, 3, 8, 8))
    with pytest.raises(zoo.ModelError) as caught:
        zoo.load(path)
    assert str(caught.value) == (
        f"{path}: has 2 outputs: mean [1, 3], conv_1 [1, 8, 8, 3]; export a network that returns one, (1, classes)"
    )


def test_an_operand_that_is_not_known_is_refused(tmp_path: Path) -> None:
    """So that no operand is dropped unseen."""
    path = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8))

    def more(program: dict[str, Any]) -> None:
        node = program["graph_module"]["graph"]["nodes"][0]
        node["inputs"].append({"name": "negative_slope", "arg": {"as_float": 0.2}, "kind": 1})

    doctor(path, more)
    with pytest.raises(UnsupportedLayer, match="its operand negative_slope has no meaning here"):
        load_graph(path, "net")


def test_names_that_cannot_be_printed_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8))
    text = records_of(path)[GRAPH].decode().replace("L__self__0,0,", "L__self__0,\\u001b]0;title\\u0007,")
    rewrite(path, records_of(path) | {GRAPH: text.encode()})
    with pytest.raises(ProgramError, match="characters that can be printed") as caught:
        load_graph(path, "net")
    assert str(caught.value).isprintable()


# Any value of the file by any other: never another error than these, each in one line.
STRANGE: tuple[Any, ...] = (None, -1, 10**30, "x", [], {}, True, float("nan"), {"as_int": 3}, {"as_ints": [-1, 0]})


def values(value: Any) -> list[tuple[Any, Any]]:
    """What holds each value, and the key or index under which it does. Of metadata only what is read."""
    found: list[tuple[Any, Any]] = []
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        if key in ("stack_trace", "torch_fn", "module_call_graph", "device"):
            continue
        found += [(value, key), *values(value[key])]
    return found


@pytest.mark.parametrize("record", [GRAPH, WEIGHTS])
def test_any_value_may_be_wrong(record: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "net.pt2", small(), (2, 3, 8, 8), (0,))
    records = records_of(path)
    contents = json.loads(records[record])
    messages = []
    for index, (holder, key) in enumerate(values(contents)):
        for strange in (STRANGE[index % len(STRANGE)], STRANGE[(index + 3) % len(STRANGE)]):
            before, holder[key] = holder[key], strange
            rewrite(path, records | {record: json.dumps(contents).encode()})
            holder[key] = before
            try:
                load_graph(path, "net")
            except (ProgramError, UnsupportedLayer) as error:
                messages.append(str(error))
    assert len(messages) > 70
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize("contents", [b"", b"PK", b"\x80\x02.", b"PK\x05\x06" + bytes(18)])
def test_no_program(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "net.pt2").write_bytes(contents)
    with pytest.raises(ProgramError, match="no exported program"):
        zoo.load(tmp_path / "net.pt2")


def test_damage_is_found(tmp_path: Path) -> None:
    """A changed byte of a weight, and a file cut off."""
    path = saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8))
    whole, weight = path.read_bytes(), records_of(path)["data/weights/weight_0"]
    at = whole.index(weight)
    for damaged in (whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ProgramError, match="damaged"):
            load_graph(path, "net")


# --- Small files of great cost. ---

MORE_BYTES = 160 << 20  # than the process has when it begins to read


def claims_more_than_it_holds(records: dict[str, bytes]) -> bytes:
    """A weight of 3.6 GB: one number, repeated by strides of 0."""
    config = json.loads(records[WEIGHTS])
    meta = config["config"]["0.weight"]["tensor_meta"]
    meta["sizes"] = [{"as_int": size} for size in (30_000, 30_000, 1, 1)]
    meta["strides"] = [{"as_int": 0}] * 4
    return archive_of(records | {WEIGHTS: json.dumps(config).encode()})


def with_member(records: dict[str, bytes], write: Callable[[zipfile.ZipFile, str], None]) -> bytes:
    """The archive with its first weight written by ``write``."""
    file, name = io.BytesIO(), "data/weights/weight_0"
    with zipfile.ZipFile(file, "w") as archive:
        for each, contents in records.items():
            if each != name:
                archive.writestr(f"archive/{each}", contents)
        write(archive, f"archive/{name}")
    return file.getvalue()


def compressed(records: dict[str, bytes]) -> bytes:
    """512 MB of zeros in half of one."""

    def write(archive: zipfile.ZipFile, name: str) -> None:
        info = zipfile.ZipInfo(name)
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, "w") as member:
            for _ in range(512):
                member.write(bytes(1 << 20))

    return with_member(records, write)


def overlapping(records: dict[str, bytes]) -> bytes:
    """A thousand names for one member of a megabyte."""

    def write(archive: zipfile.ZipFile, name: str) -> None:
        archive.writestr(name, bytes(1 << 20))
        for index in range(1, 1_000):
            info = zipfile.ZipInfo(f"archive/data/weights/more_{index}")
            info.header_offset, info.file_size = archive.filelist[-1].header_offset, 1 << 20
            info.compress_size, info.CRC = 1 << 20, archive.filelist[-1].CRC
            archive.filelist.append(info)

    return with_member(records, write)


def a_size_that_lies(records: dict[str, bytes]) -> bytes:
    """The directory of the archive says 3 GB."""

    def write(archive: zipfile.ZipFile, name: str) -> None:
        archive.writestr(name, bytes(432))
        archive.filelist[-1].file_size = archive.filelist[-1].compress_size = 3 << 30

    return with_member(records, write)


def many_wide_nodes(records: dict[str, bytes]) -> bytes:
    """A convolution to 100,000 channels and 2,000 normalizations without parameters, each with 800 KB of its own."""
    program, config = json.loads(records[GRAPH]), json.loads(records[WEIGHTS])
    channels = 100_000
    for name, shape in (("0.weight", [channels, 3, 1, 1]), ("0.bias", [channels])):
        meta = config["config"][name]["tensor_meta"]
        meta["sizes"] = [{"as_int": size} for size in shape]
        meta["strides"] = [{"as_int": stride} for stride in ([3, 1, 1, 1] if len(shape) == 4 else [1])]
    nodes = program["graph_module"]["graph"]["nodes"]
    bias = {"as_tensor": {"name": "p_0_bias"}}
    chain = ["conv2d", *(f"norm{index}" for index in range(2_000))]
    norms = [
        {
            "target": "torch.ops.aten.batch_norm.default",
            "inputs": [
                {"name": "input", "arg": {"as_tensor": {"name": before}}},
                {"name": "running_mean", "arg": bias},
                {"name": "running_var", "arg": bias},
                {"name": "training", "arg": {"as_bool": False}},
                {"name": "eps", "arg": {"as_float": 1e-5}},
            ],
            "outputs": [{"as_tensor": {"name": name}}],
            "metadata": {"nn_module_stack": f"L__self__{name},{name},torch.nn.modules.batchnorm.BatchNorm2d"},
        }
        for before, name in itertools.pairwise(chain)
    ]
    program["graph_module"]["graph"]["nodes"] = [nodes[0], *norms, *nodes[1:]]
    for name in chain[1:]:
        program["graph_module"]["graph"]["tensor_values"][name] = {"sizes": []}
    weights = {"data/weights/weight_0": bytes(12 * channels), "data/weights/weight_1": bytes(4 * channels)}
    return archive_of(records | weights | {GRAPH: json.dumps(program).encode(), WEIGHTS: json.dumps(config).encode()})


def too_many_nodes(records: dict[str, bytes]) -> bytes:
    program = json.loads(records[GRAPH])
    program["graph_module"]["graph"]["nodes"] *= 5_000
    return archive_of(records | {GRAPH: json.dumps(program).encode()})


def deep(records: dict[str, bytes]) -> bytes:
    return archive_of(records | {GRAPH: b"[" * 3_000_000})


def a_large_text(records: dict[str, bytes]) -> bytes:
    return archive_of(records | {GRAPH: b" " * (33 << 20)})


def pickled(state: dict[str, torch.Tensor], program: torch.export.ExportedProgram) -> bytes:
    """In the layout of torch 2.8, with another state dict."""
    file = io.BytesIO()
    torch.save(state, file)
    whole = zipfile.ZipFile(io.BytesIO(as_torch_2_8(program)))
    records = {name.removeprefix("archive/"): whole.read(name) for name in whole.namelist()}
    return archive_of(records | {"data/weights/model.pt": file.getvalue()})


def a_pickled_view(records: dict[str, bytes]) -> bytes:
    """One number as a weight of 3.6 GB."""
    program = exported(small(), (1, 3, 8, 8))
    return pickled({"0.weight": torch.zeros(1).expand(30_000, 30_000, 1, 1), "0.bias": torch.zeros(1)}, program)


BOMBS = {
    a_pickled_view: "says that 0.weight has shape",
    claims_more_than_it_holds: "says that 0.weight has shape",
    compressed: "its parts are larger than the file",
    overlapping: "its parts are larger than the file",
    a_size_that_lies: "its parts are larger than the file",
    many_wide_nodes: "with it the weights take many times the bytes of their file",
    too_many_nodes: "nodes; 10000 are read at most",
    deep: "is no exported program, or damaged",
    a_large_text: "bytes; 33554432 are read at most",
}

READ_EACH = f"""
import resource, sys
from pathlib import Path
from xceptile.models import exported_program, graph_builder
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + {MORE_BYTES}
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for path in sys.argv[1:]:
    try:
        exported_program.load_graph(path, "net")
        print("loaded")
    except (exported_program.ProgramError, graph_builder.UnsupportedLayer) as error:
        print(error)
"""


def test_what_a_file_costs_is_bound_by_its_size(tmp_path: Path) -> None:
    records = records_of(saved(tmp_path / "net.pt2", small(), (1, 3, 8, 8)))
    paths = []
    for bomb in BOMBS:
        paths.append(tmp_path / f"{bomb.__name__}.pt2")
        paths[-1].write_bytes(bomb(records))
        assert paths[-1].stat().st_size < 40 << 20
    result = subprocess.run([sys.executable, "-c", READ_EACH, *paths], capture_output=True, text=True, cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert len(lines) == len(BOMBS), result.stderr
    for bomb, line in zip(BOMBS, lines, strict=True):
        assert BOMBS[bomb] in line, bomb.__name__


def test_memory_of_an_import(tmp_path: Path) -> None:
    """Less than three times the weights, at its highest."""
    path = saved(
        tmp_path / "net.pt2",
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4_096, 4_096)).eval(),
        (1, 4_096, 3, 3),
    )
    program = (
        "from pathlib import Path\n"
        "from xceptile.models.exported_program import load_graph\n"
        "peak = lambda: int(Path('/proc/self/status').read_text().split('VmHWM:')[1].split()[0]) << 10\n"
        f"before = peak(); graph = load_graph({str(path)!r}, 'net'); print(peak() - before)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert 1 << 26 < int(result.stdout) < 3 * (4_096 * 4_096 * 4), result.stderr
