"""The command line as a user meets it: the main job on a small network, and one clear line for every bad input."""

import json
import os
import platform
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import tvm
import typer
from PIL import Image
from support.needs import requires_hardware
from tvm import relax

from xceptile import __version__
from xceptile.compile import cli, pipeline
from xceptile.compile.backends import nvrtc
from xceptile.compile.commands.common import bar, out, table
from xceptile.models import drawn
from xceptile.models.preprocess import InputSpec
from xceptile.models.weights import save_checkpoint
from xceptile.models.xception import Xception
from xceptile.runtime import bundle as bundles
from xceptile.runtime.plan import unpack

LABELS = ("circle", "square", "star")
SIZE = 71


def xceptile(*arguments: object) -> int:
    return cli._invoke(cli.app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a narrow network and a folder of labelled photos."""
    folder = tmp_path_factory.mktemp("user")
    torch.manual_seed(0)
    network = Xception(len(LABELS), width=0.125)
    for module in network.modules():  # statistics of a network that has seen images
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train()
            module.momentum = None  # type: ignore[assignment]  # torch's cumulative average, which its stubs deny
    images = np.stack([drawn.draw("train", i, SIZE)[0] for i in range(8)])
    with torch.no_grad():
        network((torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5) - 1)
    network.eval()
    spec = InputSpec(SIZE, SIZE)
    save_checkpoint(network, folder / "net.safetensors", input_spec=spec, labels=LABELS, provenance={"made": "test"})
    for index in range(6):
        path = folder / "photos" / LABELS[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.draw("val", index, 80)[0]).save(path)
    return folder


@pytest.fixture(scope="session")
def compiled(home: Path) -> Path:
    """The bundle of the network for this machine."""
    arguments = ("--target", "host", "--model", home / "net.safetensors", "--calibration", home / "photos")
    assert xceptile("compile", *arguments, "--output", home / "bundle") == 0
    return home / "bundle"


def compile_error(capsys: pytest.CaptureFixture[str], home: Path, tmp_path: Path, **changes: object) -> str:
    """Compiles with changed options; asserts status 2, one line, nothing written; returns the line."""
    options = {
        "target": "host",
        "model": home / "net.safetensors",
        "calibration": home / "photos",
        "output": tmp_path / "out" / "bundle",
    } | changes
    before = sorted(tmp_path.rglob("*"))
    assert xceptile("compile", *(part for key, value in options.items() for part in (f"--{key}", value))) == 2
    left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path != tmp_path / "out"]
    assert left == []
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    return lines[0]


def test_run_names_the_likeliest_class(compiled: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = home / "photos" / "circle" / "0.png"
    answers = []
    for engine in ("native", "litert", "reference"):
        assert xceptile("run", compiled, image, "--engine", engine, "--json") == 0
        answer = json.loads(capsys.readouterr().out)
        assert answer["engine"] == engine
        assert {c["label"] for c in answer["results"][0]["classes"]} == set(LABELS)
        answers.append(answer["results"])
    assert answers[0] == answers[1] == answers[2]


def test_verify_finds_every_engine_bit_exact(compiled: Path, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("verify", compiled, "--data", home / "photos", "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["engine"], row["images"], row["labelled"], row["bit_exact"]) for row in rows] == [
        ("native", 6, 6, True),
        ("litert", 6, 6, True),
    ]


def test_verify_fails_on_a_network_that_is_not_the_reference(
    compiled: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The planted fault: the reference graph of the bundle loses one step of its last bias's scale."""
    from xceptile.models import serialize

    opened = bundles.open_bundle(compiled)
    graph = serialize.load(opened.file(bundles.INT8_GRAPH))
    last = graph.node(graph.outputs[0])
    bias = graph.constants[last.inputs[2]]
    other = type(bias)(bias.type, bias.data + np.int32(4000))
    changed = graph.with_nodes(graph.nodes, {**graph.constants, last.inputs[2]: other})
    files = {name: opened.file(name).read_bytes() for name in opened.manifest.files}
    files[bundles.INT8_GRAPH] = serialize.dump(changed)
    bundles.write_bundle(tmp_path / "planted", opened.manifest, files)
    assert xceptile("verify", tmp_path / "planted", "--data", home / "photos") == 1
    assert "NO" in capsys.readouterr().out


@requires_hardware(sys.version_info < (3, 12), "Python that tflite-runtime has wheels for")
def test_tflite_runtime_is_reported_as_not_bit_exact(
    compiled: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert xceptile("verify", compiled, "--data", home / "photos", "--engine", "tflite-runtime", "--json") == 1
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["engine"], row["bit_exact"]) == ("tflite-runtime", False)
    assert row["differing_values"] > 0


def test_relax_vm_travels_in_the_bundle(home: Path, tmp_path: Path) -> None:
    arguments = ("--target", "host", "--model", home / "net.safetensors", "--calibration", home / "photos")
    assert xceptile("compile", *arguments, "--output", tmp_path / "b", "--also", "relax-vm", "--engine", "native") == 0
    bundle = bundles.open_bundle(tmp_path / "b")
    (file,) = next(a for a in bundle.manifest.artefacts if a.engine == "relax-vm").files
    golden, expected = bundle.golden()
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(bundle.file(file))), tvm.cpu())
    for x, y in zip(golden, expected, strict=True):
        assert np.array_equal(machine["main"](tvm.runtime.tensor(x[np.newaxis])).numpy()[0], y)


def test_batches_and_onnx(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Six photos in batches of four: the second is filled up."""
    arguments = ("--target", "host", "--model", home / "net.safetensors", "--calibration", home / "photos")
    options = ("--batch", 4, "--engine", "litert", "--also", "onnx-qdq")
    assert xceptile("compile", *arguments, "--output", tmp_path / "b", *options) == 0
    manifest = bundles.open_bundle(tmp_path / "b").manifest
    assert (manifest.input.shape[0], manifest.output.shape[0], manifest.golden_count) == (4, 4, 1)
    assert "of 4 golden images keep the contract's class" in manifest.provenance["onnx/tensorrt.onnx"]
    capsys.readouterr()
    assert xceptile("verify", tmp_path / "b", "--data", home / "photos", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["engine"], row["images"], row["bit_exact"]) == ("litert", 6, True)
    assert xceptile("bench", tmp_path / "b", "--rounds", 1, "--repeats", 1, "--duration", "0.01s", "--json") == 0
    assert {row["batch"] for row in json.loads(capsys.readouterr().out)["latencies"]} == {4}


def test_bench_times_int8_and_float(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("bench", compiled, "--rounds", 2, "--repeats", 2, "--duration", "0.001s", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["latencies"]
    assert [(row["engine"], row["dtype"]) for row in rows] == [
        ("native", "int8"),
        ("litert", "int8"),
        ("litert", "float32"),
    ]
    assert all(len(row["samples_ms"]) >= 4 for row in rows)
    assert all(row["obtained"] == "measured" for row in rows)
    assert xceptile("bench", compiled, "--layers", "--json") == 0
    profile = json.loads(capsys.readouterr().out)
    assert all(row["median_ms"] >= 0 for row in profile["layers"])
    assert profile["roof"]["gmac_per_s"] > 0


def test_check_gates_on_a_baseline(
    compiled: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    baseline = tmp_path / "base line.json"
    arguments = ("--data", home / "photos", "--rounds", 6)
    assert xceptile("check", compiled, "--baseline", baseline, *arguments) == 2
    assert f"--output '{baseline}'" in " ".join(capsys.readouterr().err.split())
    assert xceptile("baseline", compiled, "--output", baseline, *arguments) == 0
    # Time is no part of this test: any latency is allowed, and whether int8 beats float on so small a network open.
    allowed = ("--max-latency", 1000, "--max-slowdown", 1000, "--max-memory", 2)
    capsys.readouterr()
    xceptile("check", compiled, "--baseline", baseline, *arguments, *allowed, "--json")
    findings = {f["what"]: f["outcome"] for f in json.loads(capsys.readouterr().out)["findings"]}
    for what in (
        "bit-exactness, native on local",
        "top-1, native on local",
        "size, native/int8",
        "memory, native/int8",
    ):
        assert findings[what] == "pass"
    assert "latency against the baseline's, native" in findings
    assert xceptile("check", compiled, "--baseline", baseline, *arguments, "--device", "qemu") == 2
    assert "has no baseline for local/host on qemu" in capsys.readouterr().err
    data = json.loads(baseline.read_text())
    data["baselines"]["local/host"]["local"]["sizes_bytes"]["native/int8"] //= 2  # the planted fault: it was smaller
    baseline.write_text(json.dumps(data))
    capsys.readouterr()
    assert xceptile("check", compiled, "--baseline", baseline, *arguments, *allowed) == 1
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("fail: size, native/int8: ") and line.endswith(" allowed") for line in lines) == 1


def test_targets_inspect_doctor(compiled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert xceptile("targets", "--json") == 0
    assert "raspberrypi/raspberry-pi-5" in {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert xceptile("inspect", compiled) == 0
    assert "sha256" in capsys.readouterr().out
    assert xceptile("inspect", compiled, "--json") == 0
    assert json.loads(capsys.readouterr().out)["labels"] == list(LABELS)
    assert xceptile("doctor", "--json") == 0
    found = {row["what"]: row["detail"] for row in json.loads(capsys.readouterr().out)}
    assert (found["Xceptile"], found["Python"].partition(",")[0]) == (__version__, platform.python_version())
    assert platform.release() in found["system"]


def test_unknown_target_says_did_you_mean(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = compile_error(capsys, home, tmp_path, target="rasberry-pi-5")
    assert "did you mean" in line
    assert "raspberry-pi-5" in line


def test_missing_truncated_and_foreign_checkpoints(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no such" in compile_error(capsys, home, tmp_path, model=tmp_path / "none.safetensors")
    whole = (home / "net.safetensors").read_bytes()
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(whole[: len(whole) // 2])
    assert "cut.safetensors" in compile_error(capsys, home, tmp_path, model=cut)
    foreign = tmp_path / "foreign.pth"
    torch.save({"layer1.weight": torch.zeros(3, 3)}, foreign)
    assert "foreign.pth" in compile_error(capsys, home, tmp_path, model=foreign)


def test_bad_calibration_data(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty" in compile_error(capsys, home, tmp_path, calibration=empty)
    broken = tmp_path / "broken"
    broken.mkdir()
    whole = (home / "photos" / "circle" / "0.png").read_bytes()
    (broken / "half.png").write_bytes(whole[: len(whole) // 2])
    assert "half.png" in compile_error(capsys, home, tmp_path, calibration=broken)


def test_nan_activations(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from xceptile.models.weights import load_checkpoint

    checkpoint = load_checkpoint(home / "net.safetensors")
    with torch.no_grad():
        checkpoint.module.conv2.weight[0] = float("nan")
    sick = tmp_path / "sick.safetensors"
    save_checkpoint(checkpoint.module, sick, input_spec=checkpoint.input_spec, labels=LABELS, provenance={})
    line = compile_error(capsys, home, tmp_path, model=sick)
    assert "NaN" in line or "nan" in line
    assert "conv2" in line


def test_an_output_that_cannot_be_written(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = tmp_path / "photos"
    full.mkdir()
    (full / "mine.txt").write_text("keep")
    assert "not empty" in compile_error(capsys, home, tmp_path, output=full)
    assert "/proc" in compile_error(capsys, home, tmp_path, output="/proc/bundle")


def test_what_is_missing_is_said_before_calibration(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def calibrate(*_: object, **__: object) -> None:
        raise AssertionError("calibrated first")

    monkeypatch.setattr(pipeline, "quantize_model", calibrate)
    changes = {"max-drop": "1%", "data": tmp_path / "nowhere"}
    assert "nowhere: no such folder" in compile_error(capsys, home, tmp_path, **changes)
    monkeypatch.setenv("XCEPTILE_ANDROID_RUNTIME", str(tmp_path / "ndk"))
    assert "XCEPTILE_ANDROID_RUNTIME" in compile_error(capsys, home, tmp_path, target="android-arm64")
    monkeypatch.setattr(nvrtc, "library_for", missing_nvrtc)
    assert "pip install" in compile_error(capsys, home, tmp_path, target="jetson")


def missing_nvrtc(_arch: str) -> None:
    raise nvrtc.NvrtcMissing("NVRTC 12 is not installed: pip install 'xceptile[cuda]'")


def test_a_bundle_for_another_architecture(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--model", home / "net.safetensors", "--calibration", home / "photos", "--engine", "native")
    assert xceptile("compile", "--target", "raspberry-pi-3", *arguments, "--output", tmp_path / "pi") == 0
    capsys.readouterr()
    assert xceptile("run", tmp_path / "pi", home / "photos" / "circle" / "0.png", "--device", "local") == 2
    assert "aarch64" in capsys.readouterr().err


def test_a_damaged_bundle_and_a_damaged_image(
    compiled: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert xceptile("run", tmp_path, home / "photos" / "circle" / "0.png") == 2
    assert bundles.MANIFEST in capsys.readouterr().err
    (tmp_path / "cat.jpg").write_bytes(b"no image")
    assert xceptile("run", compiled, tmp_path / "cat.jpg") == 2
    assert "cat.jpg" in capsys.readouterr().err


def test_interrupting_leaves_nothing(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("xceptile.compile.pipeline.build_bundle_files", interrupt)
    arguments = ("--target", "host", "--model", home / "net.safetensors", "--calibration", home / "photos")
    assert xceptile("compile", *arguments, "--output", tmp_path / "out") == 130
    assert os.listdir(tmp_path) == []
    assert "interrupted" in capsys.readouterr().err


def test_names_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    rows = table("image", title="local: [gpu]")
    rows.add_row("[/b][red].png")
    out.print(rows)
    printed = capsys.readouterr().out
    assert "[gpu]" in printed
    assert "[/b][red].png" in printed
    assert xceptile("inspect", tmp_path / "a\x1b[2J[/b]") == 2
    assert "a\\x1b[2J[/b]: no such bundle" in capsys.readouterr().err


def test_without_a_terminal_each_phase_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with bar() as progress:
        for what, share in (("load", 0.0), ("calibrate", 0.5), ("calibrate", 1.0), ("write [TFLite]", 0.0)):
            progress(what, share)
    assert capsys.readouterr().err == "load\ncalibrate\nwrite [TFLite]\n"


def test_debug_shows_the_traceback(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert xceptile("inspect", tmp_path, "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    assert xceptile("inspect", tmp_path) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow
def test_a_tuning_goes_into_the_bundle(
    compiled: Path, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tune`, then `compile --tuning`: other tasks than the cost model's, and the same outputs bit for bit."""
    tuning, bundle = tmp_path / "tuning.json", tmp_path / "bundle"
    options = ("--rounds", 1, "--candidates", 1, "--threads", 1)
    assert xceptile("tune", "host", "--model", home / "net.safetensors", "--output", tuning, *options) == 0
    values = json.loads(tuning.read_text())
    for trials in values["trials"].values():  # as if every candidate had won
        assert [trial.pop("failure") for trial in trials] == [""]
        trials[0] |= {"time_ms": 1.0, "model_ms": 2.0, "failure": ""}
    tuning.write_text(json.dumps(values | {"latency_ratio": 0.5}))
    arguments = ("--model", home / "net.safetensors", "--calibration", home / "photos", "--tuning", tuning)
    assert xceptile("compile", "--target", "host", *arguments, "--output", bundle) == 0
    tasks = [
        [step.tasks for step in unpack((folder / "native" / "plan.bin").read_bytes()).steps]
        for folder in (compiled, bundle)
    ]
    assert len(tasks[0]) == len(tasks[1])
    assert tasks[0] != tasks[1]
    assert "sha256 of the tuning" in json.loads((bundle / "manifest.json").read_text())["provenance"]
    capsys.readouterr()
    assert xceptile("verify", bundle, "--data", home / "photos", "--json") == 0
    assert all(row["bit_exact"] for row in json.loads(capsys.readouterr().out))
    assert xceptile("compile", "--target", "raspberry-pi-5", *arguments, "--output", tmp_path / "other") == 2
    assert "the tuning is of local/host" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("verb", ["report", "baseline"])
def test_where_nothing_can_be_written_is_said_before_anything_is_measured(
    verb: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "missing" / "out"
    assert cli._invoke(cli.app, [verb, str(tmp_path), "--data", "drawn:val:1", "--output", str(nowhere)]) == 2
    assert f"cannot write {nowhere}" in " ".join(capsys.readouterr().err.split())


def test_a_file_that_the_system_refuses_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "tuning.json"
    assert cli._invoke(cli.app, ["tune", "host", "--output", str(missing)]) == 2
    assert f"cannot write {missing}" in capsys.readouterr().err
    app = typer.Typer()
    app.command()(lambda: tmp_path.read_text())
    assert cli._invoke(app, []) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"
