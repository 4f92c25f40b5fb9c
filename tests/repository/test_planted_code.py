"""Code in every string of every kind of file that somebody else may have made: reading it runs none.

Exported programs and Keras' files have tests of their own in ``tests/models``.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.torch
import torch
from google.protobuf.message import Message
from support.bundle_files import FILES, manifest
from support.float_graphs import FloatBuilder, random_xception
from support.malicious_pickle import Malicious
from support.planted_code import Witness, call, mutants, payloads
from support.reports import report
from support.timm_states import small_timm_state

from xceptile.calibration.recipe import PRESETS, recipe_from_text
from xceptile.compile import tuning
from xceptile.models import serialize, zoo
from xceptile.models.datasets import open_dataset
from xceptile.models.preprocess import InputSpec
from xceptile.models.timm_weights import load_timm
from xceptile.models.weights import CheckpointError, save_checkpoint
from xceptile.models.xception import Xception
from xceptile.runtime import bundle as bundles
from xceptile.runtime import shards
from xceptile.runtime.baseline import load_baseline, save_baseline
from xceptile.runtime.bundle import MANIFEST, open_bundle, write_bundle

ONNX_FILE = Path(__file__).parents[1] / "models" / "onnx_files" / "keras-export.onnx"
REFUSALS = (ValueError, LookupError, OSError)  # ours are ValueErrors; catalog.get's is a KeyError


@pytest.fixture(scope="module")
def witness() -> Witness:
    return Witness()


def told(seen: list[str], marker: Path) -> list[str]:
    """What was done with a payload. Annotations of our own are compiled, too, where JSON becomes dataclasses."""
    return [deed for deed in seen if any(part in deed for part in (str(marker), "abort", "this"))]


class Trial:
    """Reads one file after another, and counts those that are taken."""

    def __init__(self, witness: Witness, read: Callable[[], Any], marker: Path) -> None:
        self.witness, self.read, self.marker = witness, read, marker
        self.tried = self.taken = 0
        read()  # what is imported when it is first needed

    def __call__(self) -> None:
        self.tried += 1
        self.witness.begin()
        try:
            self.read()
            self.taken += 1
        except REFUSALS:
            pass
        finally:
            seen = self.witness.end()
        assert not told(seen, self.marker)
        assert not self.marker.exists()


def test_the_payloads_run_where_they_can(witness: Witness, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    witness.begin()
    eval(payloads(marker)[0])
    assert told(witness.end(), marker)
    assert marker.exists()


# --- JSON. ---


def a_manifest(folder: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], Any]]:
    bundle = folder / "b"
    write_bundle(bundle, manifest(), FILES)
    data = json.loads((bundle / MANIFEST).read_text())

    def write(changed: dict[str, Any]) -> None:
        """With the right hash, as an attacker can make it."""
        rest = {key: value for key, value in changed.items() if key != "sha256"}
        (bundle / MANIFEST).write_text(json.dumps({**rest, "sha256": bundles._contents_sha256(rest)}))

    return data, write, lambda: open_bundle(bundle)


def a_baseline(folder: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], Any]]:
    path, whole = folder / "baselines.json", report()
    save_baseline(whole, path)
    data = json.loads(path.read_text())
    return data, lambda changed: _write(path, changed), lambda: load_baseline(path, whole.target, whole.device, "make")


def a_recipe(folder: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], Any]]:
    path = folder / "recipe.json"
    data = json.loads(json.dumps(PRESETS["default"].to_json()))
    data["rules"].append({"pattern": "conv1", "scheme": "symmetric", "observer": {"kind": "percentile", "percent": 99}})
    _write(path, data)
    return data, lambda changed: _write(path, changed), lambda: recipe_from_text(path.read_text())


def a_tuning(folder: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], Any]]:
    path = folder / "tuning.json"
    trial = tuning.Trial(4, 1.0, 1.1, "")
    tuning.save(tuning.Tuning("local/host", ("sse2",), 1, "measured", {"conv": 2}, {"conv": (trial,)}, 0.9), path)
    return json.loads(path.read_text()), lambda changed: _write(path, changed), lambda: tuning.load(path)


def a_preprocessing(folder: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], Any]]:
    path = folder / "own.json"
    model = zoo.Model(random_xception(40), InputSpec(40, 40), ("a",), {})
    data = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "resize": 60, "interpolation": "bicubic"}
    _write(path, data)
    return data, lambda changed: _write(path, changed), lambda: zoo.with_preprocessing(model, path)


def a_graph(folder: Path) -> tuple[dict[str, Any], Callable[[dict[str, Any]], None], Callable[[], Any]]:
    """The structure in a bundle's graphs, with the right hash."""
    path = folder / "float.safetensors"
    builder = FloatBuilder(np.ones((1, 4, 4, 3), np.float32))
    builder.linear("linear", builder.mean("mean", builder.relu("relu", builder.conv("conv", "input", 4))), 2)
    serialize.save(builder.graph(), path)
    length, header = serialize._header(path.read_bytes())
    tensors = path.read_bytes()[8 + length :]
    loaded = safetensors.numpy.load(path.read_bytes())
    data = json.loads(header["__metadata__"]["graph"])

    def write(changed: dict[str, Any]) -> None:
        text = json.dumps(changed)
        metadata = header["__metadata__"] | {"graph": text, "sha256": serialize._sha256(text, loaded)}
        _write_safetensors(path, header | {"__metadata__": metadata}, tensors)

    return data, write, lambda: serialize.load(path)


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _write_safetensors(path: Path, header: dict[str, Any], tensors: bytes) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + tensors)


@pytest.mark.parametrize("kind", [a_manifest, a_baseline, a_recipe, a_tuning, a_preprocessing, a_graph])
def test_code_in_any_string_of_json_is_never_run(kind: Callable[..., Any], witness: Witness, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data, write, read = kind(tmp_path)
    trial = Trial(witness, read, marker)
    for mutant in mutants(data, marker):
        write(mutant)
        trial()
    assert trial.tried > 8
    write(data)
    read()  # the last of it is whole again: what was refused was refused for the code


# --- Checkpoints. ---


def test_code_in_any_string_of_safetensors_is_never_run(witness: Witness, tmp_path: Path) -> None:
    """In names, types, keys and texts of the header, and in our model card within."""
    path, marker = tmp_path / "own.safetensors", tmp_path / "executed"
    labels = ("ant", "bee")
    save_checkpoint(Xception(2, width=0.1), path, input_spec=InputSpec(96, 96), labels=labels, provenance={"by": "me"})
    length, header = serialize._header(path.read_bytes())
    tensors = path.read_bytes()[8 + length :]
    trial = Trial(witness, lambda: zoo._read_checkpoint(path), marker)
    few = ("__metadata__", "conv1.weight", "norm1.bias")
    for mutant in mutants({name: header[name] for name in few}, marker):
        _write_safetensors(path, {n: v for n, v in header.items() if n not in few} | mutant, tensors)
        trial()
    for card in mutants(json.loads(header["__metadata__"]["card"]), marker):
        metadata = header["__metadata__"] | {"card": json.dumps(card)}
        _write_safetensors(path, header | {"__metadata__": metadata}, tensors)
        trial()
    assert 0 < trial.taken < trial.tried


def test_code_in_any_string_of_a_pickle_is_never_run(witness: Witness, tmp_path: Path) -> None:
    path, marker = tmp_path / "net.pth", tmp_path / "executed"
    state = small_timm_state()
    torch.save(state, path)
    trial = Trial(witness, lambda: load_timm(path), marker)
    few = dict(list(state.items())[:3])
    for mutant in mutants({"epoch": "3", "args": ["a", {"b": "c"}], "net": few, "best": "x"}, marker):
        for zipped in (True, False):
            torch.save(mutant, path, _use_new_zipfile_serialization=zipped)
            trial()
    assert trial.taken == 0  # there are three tensors of 234
    for payload in payloads(marker):
        torch.save({payload: {f"{payload}.{name}": tensor for name, tensor in state.items()}}, path)
        trial()
        assert load_timm(path).provenance["weights"] == f"{payload}.{payload}"


# What a pickle could call, with a payload as its argument; the first would do harm in any unpickler.
FUNCTIONS = (
    *("os system", "posix system", "builtins eval", "builtins exec", "__builtin__ eval", "builtins getattr"),
    *(
        "subprocess Popen",
        "runpy run_path",
        "importlib import_module",
        "pickle loads",
        "_pickle loads",
        "marshal loads",
    ),
    *("torch load", "torch.hub load", "torch.storage _load_from_bytes", "torch.serialization load", "numpy load"),
    *("torch._utils _rebuild_wrapper_subclass", "torch.jit load", "torch._dynamo.utils import_submodule"),
    *("torch.nn.modules.conv Conv2d", "xceptile.compile.cli main", "collections OrderedDict.__init__"),
)


def calling(function: str, payload: str) -> Iterator[bytes]:
    """Pickles that call it, in the instructions that there are for it."""
    name, text = "\n".join(function.split(" ")), payload.encode()
    string = b"X" + len(text).to_bytes(4, "little") + text
    parts = [b"\x8c" + len(part).to_bytes(1, "little") + part.encode() for part in function.split(" ")]
    yield b"\x80\x02c" + name.encode() + b"\n" + string + b"\x85R."  # GLOBAL, REDUCE
    yield b"\x80\x02c" + name.encode() + b"\n" + string + b"\x85\x81."  # NEWOBJ
    yield b"\x80\x02(" + string + b"i" + name.encode() + b"\n."  # INST
    yield b"\x80\x02(c" + name.encode() + b"\n" + string + b"o."  # OBJ
    yield b"\x80\x04" + b"".join(parts) + b"\x93" + string + b"\x85R."  # STACK_GLOBAL


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_function_that_a_pickle_names_is_called(function: str, witness: Witness, tmp_path: Path) -> None:
    path, marker = tmp_path / "net.pth", tmp_path / "executed"
    torch.save({"x": torch.zeros(1)}, path)
    reader = torch._C.PyTorchFileReader(str(path))
    records = {name: reader.get_record(name) for name in reader.get_all_records()}
    torch.save({"x": torch.zeros(1)}, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    second = legacy.index(b".", legacy.index(b".") + 1) + 1  # behind the magic number and the protocol
    for pickled in calling(function, call(marker)):
        writer = torch._C.PyTorchFileWriter(str(path))
        for name, data in (records | {"data.pkl": pickled}).items():
            if name not in (".data/serialization_id", "version"):
                writer.write_record(name, data, len(data))
        writer.write_end_of_file()
        zipped = path.read_bytes()
        for contents in (zipped, legacy[:second] + pickled + legacy[second:], pickled):
            path.write_bytes(contents)
            witness.begin()
            with pytest.raises(CheckpointError):
                load_timm(path)
            assert not told(witness.end(), marker)
            assert not marker.exists()


def test_such_pickles_do_harm_elsewhere(tmp_path: Path) -> None:
    """So the test above is about something."""
    marker = tmp_path / "executed"
    for index, pickled in enumerate(calling("builtins eval", call(marker))):
        if index != 1:  # eval is no class
            pickle.loads(pickled)
            assert marker.exists()
            marker.rmdir()
    pickle.loads(pickle.dumps(Malicious(marker)))
    assert marker.exists()


# --- ONNX. ---


def texts(message: Message) -> Iterator[Callable[[str], None]]:
    """For each string of a message and of those in it, what replaces it; called with "" it puts back what was there."""
    for field, value in message.ListFields():
        many = field.is_repeated
        if field.message_type is not None:
            for each in value if many else (value,):
                yield from texts(each)
        elif isinstance(value[0] if many else value, str | bytes) and field.name != "raw_data":
            for index in range(len(value) if many else 1):
                yield _replacer(message, field.name, index if many else None)


def _replacer(message: Message, name: str, index: int | None) -> Callable[[str], None]:
    before = getattr(message, name) if index is None else getattr(message, name)[index]

    def replace(payload: str) -> None:
        value = before if not payload else payload.encode() if isinstance(before, bytes) else payload
        if index is None:
            setattr(message, name, value)
        else:
            getattr(message, name)[index] = value

    return replace


def test_code_in_any_string_of_onnx_is_never_run(witness: Witness, tmp_path: Path) -> None:
    path, marker = tmp_path / "net.onnx", tmp_path / "executed"
    path.write_bytes(ONNX_FILE.read_bytes())
    trial = Trial(witness, lambda: zoo.load(path), marker)
    model, codes = onnx.load(path), payloads(marker)
    for number, replace in enumerate(texts(model)):
        replace(codes[number % len(codes)])
        path.write_bytes(model.SerializeToString())
        trial()
        replace("")
    assert trial.tried > 100
    assert 0 < trial.taken < trial.tried
    for code in codes:
        for replace in texts(model):
            replace(code)
        path.write_bytes(model.SerializeToString())
        trial()


# --- Lines of text. ---


def test_code_in_labels_lists_and_results_is_never_run(witness: Witness, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    labels, images, results = tmp_path / "labels.txt", tmp_path / "list.txt", tmp_path / "results.jsonl"
    model = zoo.Model(random_xception(24), InputSpec(24, 24), ("a", "b"), {})
    (tmp_path / "a.png").write_bytes(b"")
    header = {"bundle": "x"}

    def read() -> None:
        zoo.with_labels(model, labels)
        open_dataset(images, ("a", "b"))
        with shards._kept(results, header):
            pass

    labels.write_text("a\nb\n")
    images.write_text("a.png a\n")
    results.write_text(json.dumps(header) + "\n")
    trial = Trial(witness, read, marker)
    for code in payloads(marker):
        line = code.replace("\n", " ")
        for path, lines in (
            (labels, f"a\n{line}\n"),
            (images, f"a.png {line}\n"),
            (images, f"{line} a\n"),
            (results, json.dumps(header) + "\n" + json.dumps({"index": code, code: [code]}) + "\n"),
            (results, line + "\n"),
        ):
            before = path.read_text()
            path.write_text(lines)
            trial()
            path.write_text(before)
    assert 0 < trial.taken < trial.tried
    assert np.all([path.exists() for path in (labels, images, results)])
