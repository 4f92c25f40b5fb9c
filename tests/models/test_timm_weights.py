"""timm's and Cadene's state dicts as people have them: each computes what the module that was saved does, or is
refused with what to do."""

from __future__ import annotations

import copy
import re
import shlex
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from support.float_graphs import drawn_images
from support.foreign_xceptions import images, timm_xception
from support.malicious_pickle import Malicious
from support.needs import requires_module
from support.timm_states import SIZE, narrow_xception, settle, small_timm_state, timm_names
from torch.nn.utils import parametrizations, prune, weight_norm

from xceptile.compile import cli
from xceptile.models import zoo
from xceptile.models.preprocess import load_image, normalize, timm_input_spec
from xceptile.models.timm_weights import load_timm
from xceptile.models.weights import CheckpointError
from xceptile.models.xception import Xception
from xceptile.runtime import reference

needs_timm = requires_module("timm", package="timm")
PHOTOS = images(2, SIZE)
TOLERANCE = 1e-4  # relative to the largest logit

State = dict[str, torch.Tensor]


def outputs(module: torch.nn.Module) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(PHOTOS).permute(0, 3, 1, 2)).numpy()


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Relative to the largest logit; the logits must depend on the image for the comparison to mean anything."""
    assert np.abs(theirs[0] - theirs[1]).max() > 0.1 * np.abs(theirs).max()
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.fixture(scope="module")
def narrow() -> torch.nn.Module:
    return narrow_xception()


@pytest.fixture
def state(narrow: torch.nn.Module) -> State:
    return timm_names(narrow.state_dict())


def saved(tmp_path: Path, value: Any, name: str = "net.pth") -> Path:
    torch.save(value, tmp_path / name)
    return tmp_path / name


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


# --- The real networks. ---


@pytest.fixture(scope="module")
def timm_model() -> torch.nn.Module:
    return timm_xception()


def cadene_state(state: State) -> State:
    """As in Cadene's files: pointwise weights without their 1x1, last_linear, no counters."""
    return {
        name.replace("fc.", "last_linear."): tensor[:, :, 0, 0] if name.endswith("pointwise.weight") else tensor
        for name, tensor in state.items()
        if not name.endswith("num_batches_tracked")
    }


@needs_timm
def test_timm_legacy_xception(timm_model: torch.nn.Module, tmp_path: Path) -> None:
    truth, state = outputs(timm_model), timm_model.state_dict()
    pth, cadene, tensors = tmp_path / "a.pth", tmp_path / "cadene.pth", tmp_path / "a.safetensors"
    torch.save(state, pth)
    parallel = prefixed("module.", cadene_state(state))
    torch.save({"epoch": 3, "state_dict": parallel}, cadene, _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(state, tensors)
    for path in (pth, cadene, tensors):
        checkpoint = load_timm(path)
        assert difference(outputs(checkpoint.module), truth) < TOLERANCE
        assert checkpoint.input_spec == timm_input_spec()
        assert checkpoint.input_spec.resize == 333
        assert sum(p.numel() for p in checkpoint.module.parameters()) == 22_855_952
    wrong = Xception(1000, same_padding=True, epsilon=1e-5).eval()
    wrong.load_state_dict(load_timm(pth).module.state_dict())
    assert difference(outputs(wrong), truth) > TOLERANCE


@needs_timm
def test_a_deepfake_detector_in_half_precision(timm_model: torch.nn.Module, tmp_path: Path) -> None:
    """DeepfakeBench's layout: a backbone in a detector, a dropout in its classifier of two, a channel adapter that is
    not used, a loss with weights."""
    detector = torch.nn.Module()
    detector.backbone = copy.deepcopy(timm_model)
    detector.backbone.fc = torch.nn.Sequential(torch.nn.Dropout(0.5), torch.nn.Linear(2048, 2))
    detector.backbone.adjust_channel = torch.nn.Sequential(
        torch.nn.Conv2d(2048, 512, 1, 1), torch.nn.BatchNorm2d(512), torch.nn.ReLU(inplace=False)
    )
    detector.loss_func = torch.nn.CrossEntropyLoss(weight=torch.tensor([4.0, 1.0]))
    half = detector.eval().half().state_dict()
    names = {name.replace("backbone.fc.", "backbone.last_linear."): tensor for name, tensor in half.items()}
    checkpoint = load_timm(saved(tmp_path, names))
    assert difference(outputs(checkpoint.module), outputs(detector.float().backbone)) < TOLERANCE
    told = checkpoint.provenance
    assert told["weights"] == "backbone"
    assert "backbone.adjust_channel.0.weight" in told["unused tensors"]
    assert "loss_func.weight" in told["unused tensors"]
    assert "num_batches_tracked" not in told["unused tensors"]
    assert "epsilon 1e-5" in told["assumed"]
    assert "backbone.last_linear.1 right behind the average pooling" in told["assumed"]


def test_from_the_image_to_the_answer(narrow: torch.nn.Module, state: State, tmp_path: Path) -> None:
    """As timm evaluates: the shorter side to 142 by Pillow's bicubic, the middle 128, [-1, 1]."""
    image = tmp_path / "photo.png"
    Image.fromarray(drawn_images(1, 200, seed=5)[0][:150]).save(image)
    model = zoo.load(saved(tmp_path, {"net": state}), size=SIZE)
    pixels = load_image(image, model.input_spec)[np.newaxis]
    (ours,) = reference.run(model.graph, normalize(pixels, model.input_spec))
    with Image.open(image) as opened:
        scaled = opened.resize((189, 142), Image.Resampling.BICUBIC).crop((30, 7, 30 + SIZE, 7 + SIZE))
    x = torch.from_numpy(np.asarray(scaled, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    with torch.no_grad():
        theirs = narrow(x).numpy()
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()
    assert model.input_spec.origins["size"] == "given"
    assert model.input_spec.origins["mean"] == "assumed"


def test_what_a_state_dict_does_not_say_is_told(
    state: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state["adjust_channel.0.weight"] = torch.zeros(51, 208, 1, 1)
    path = saved(tmp_path, {"net": state, "ema": state | {"bn1.bias": state["bn1.bias"] + 1}})
    words = (
        "--recipe",
        "min-max",
        "--target",
        "host",
        "--model",
        path,
        "--calibration",
        "drawn:calibration:2",
        "--output",
        tmp_path / "b",
    )
    assert cli._invoke(cli.app, list(map(str, ("compile", *words, "--engine", "litert", "--input-size", 71)))) == 0
    told = capsys.readouterr().out
    assert "  weights: ema, which are averaged, before net\n" in told
    assert "  unused tensors: ema.adjust_channel.0.weight\n" in told
    assert "  assumed: batch normalization with epsilon 1e-5; poolings padded by one pixel" in told


# --- Where a state dict lies. ---


def test_a_state_dict_may_lie_where_training_scripts_put_it(state: State, tmp_path: Path) -> None:
    """Wrapped, prefixed, counted, beside an optimizer; averaged weights come first, as timm's own loader has them."""
    counted = prefixed("module.", state) | {"n_averaged": torch.tensor(3)}
    averaged = {name: tensor * 2 for name, tensor in state.items()}
    plain: dict[str, tuple[str, Any]] = {
        "swa.pth": ("module", counted),
        "compiled.pt": ("_orig_mod", prefixed("_orig_mod.", state)),
        "lightning.ckpt": ("state_dict.net", {"epoch": 3, "state_dict": prefixed("net.", state)}),
        "model.bin": ("model", {"model": state}),
        "deep.pth": ("trainer.best.0.model", {"trainer": {"best": [{"model": state}]}}),
        "parallel and compiled.pth": (
            "net.module._orig_mod.model",
            {"net": prefixed("module._orig_mod.model.", state)},
        ),
        **{
            f"{key}.pth": (key, {"epoch": 3, key: state, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}})
            for key in (
                *("net", "network", "weights", "params", "model_state", "model_state_dict", "best_state", "ema"),
                *("module", "encoder", "backbone"),
            )
        },
    }
    for name, (place, value) in plain.items():
        checkpoint = zoo._read_checkpoint(saved(tmp_path, value, name))
        assert torch.equal(checkpoint.module.conv1.weight, state["conv1.weight"]), name
        assert checkpoint.provenance["weights"] == place
        assert "unused tensors" not in checkpoint.provenance
    assert "weights" not in load_timm(saved(tmp_path, state)).provenance
    both: list[dict[str, Any]] = [
        {"args": Namespace(lr=0.1), "state_dict": state, "state_dict_ema": averaged},
        {"state_dict": {**prefixed("model.", state), **prefixed("model_ema.module.", averaged)}},
        {"net": state, "ema": averaged},
    ]
    for value in both:
        checkpoint = load_timm(saved(tmp_path, value))
        assert torch.equal(checkpoint.module.conv1.weight, averaged["conv1.weight"])
        assert re.fullmatch(r".*ema.*, which are averaged, before \S+", checkpoint.provenance["weights"])


def test_one_module_under_two_names_is_one(state: State, tmp_path: Path) -> None:
    path = saved(tmp_path, {"state_dict": prefixed("model.", state) | prefixed("alias.", state)})
    assert load_timm(path).module.classifier.out_features == 3


def test_a_head_may_lie_beside_the_backbone(state: State, tmp_path: Path) -> None:
    """In the same state dict, or in one of its own."""
    head = {name: state.pop(name) for name in ("fc.weight", "fc.bias")}
    bare = {"classifier.weight": head["fc.weight"], "classifier.bias": head["fc.bias"]}
    own = {"backbone": state, "head": {"weight": head["fc.weight"], "bias": head["fc.bias"]}}
    for value in (prefixed("encoder.", state) | bare, own):
        module = load_timm(saved(tmp_path, value)).module
        assert torch.equal(module.classifier.weight, head["fc.weight"])
    bare.pop("classifier.bias")
    module = load_timm(saved(tmp_path, prefixed("encoder.", state) | bare)).module
    assert not module.classifier.bias.any()


def test_half_a_state_dict_in_safetensors(narrow: torch.nn.Module, state: State, tmp_path: Path) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        cast = {name: tensor.to(dtype) for name, tensor in state.items()}
        safetensors.torch.save_file(cast, tmp_path / "net.safetensors")
        module = load_timm(tmp_path / "net.safetensors").module
        assert torch.equal(module.conv1.weight, narrow.conv1.weight.to(dtype).float())


# --- What torch's utilities leave. ---


def pruned(network: torch.nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            prune.random_unstructured(module, "weight", 0.3)
    prune.random_unstructured(network.classifier, "bias", 0.5)


def normalized(network: torch.nn.Module) -> None:
    for number, module in enumerate(network.modules()):
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            weight_norm(module, dim=None if number % 5 == 0 else number % 2)


def parametrized(network: torch.nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            parametrizations.weight_norm(module)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of weight_norm, which files of old hold
@pytest.mark.parametrize("change", [pruned, normalized, parametrized])
def test_masks_and_norms_are_applied(change: Callable[[torch.nn.Module], None], tmp_path: Path) -> None:
    network = narrow_xception()
    change(network)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.endswith(("weight_g", "original0")):
                parameter.mul_(1.1)  # else g is the norm of v, and v alone would do
    settle(network)
    path = saved(tmp_path, {"net": timm_names(network.state_dict())})
    assert difference(outputs(load_timm(path).module), outputs(network)) < TOLERANCE


# --- What is refused. ---


def cut(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


MLP = {"fc.0.weight": torch.zeros(16, 208), "fc.0.bias": torch.zeros(16), "fc.3.weight": torch.zeros(2, 16)}
NORMED = {"fc.0.weight": torch.zeros(16, 208), "fc.1.running_mean": torch.zeros(16), "out.weight": torch.zeros(2, 16)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda s: s | {"last_linear.weight": s["fc.weight"]},
            r"holds 2 classifiers, fc \(3 outputs\), last_linear \(3",
        ),
        (
            lambda s: s | {"age.weight": torch.zeros(1, 208)},
            r"holds 2 classifiers, fc \(3 outputs\), age \(1 outputs\)",
        ),
        (
            lambda s: {"net": s, "best": {n: 2 * t for n, t in s.items()}},
            "holds 2 networks that fit, in net, best; save",
        ),
        (
            lambda s: {"ema": s, "swa": {n: 2 * t for n, t in s.items()}},
            "holds 2 networks that fit, in ema, swa; save",
        ),
        (
            lambda s: cut(s, "fc.weight", "fc.bias") | MLP,
            r"more layers than one \(fc\.0, fc\.3\), and a state dict does",
        ),
        (lambda s: cut(s, "fc.weight", "fc.bias") | NORMED, r"more layers than one \(fc\.0, fc\.1\)"),
        (
            lambda s: cut(s, "fc.weight", "fc.bias") | {"a.weight": torch.zeros(9, 208), "b.weight": torch.zeros(2, 9)},
            r"more layers than one \(a, b\)",
        ),
        (lambda s: cut(s, "fc.weight", "fc.bias"), "has no classifier: no linear layer takes the 208 features of the"),
        (
            lambda s: s | {"fc.weight": torch.zeros(3, 51)},
            "has no classifier: .*, fc takes 51; give the checkpoint with",
        ),
        (
            lambda s: s | {"block3.se.weight": torch.zeros(72, 72)},
            r"also holds the layer block3\.se, which this network does not",
        ),
        (
            lambda s: s | {"gate.weight": torch.zeros(1, 2, 7, 7)},
            "also holds the layer gate, which this network does not have; where the",
        ),
        (lambda s: cut(s, "bn3.bias"), r"1 of 2\d\d tensors are missing, the first is bn3\.bias; give a checkpoint of"),
        (
            lambda s: (
                cut(s, "conv1.weight") | {"conv1.weight_orig": s["conv1.weight"], "conv1.weight_u": torch.zeros(8)}
            ),
            r"the first is conv1\.weight, and conv1\.weight_orig is none of its own",
        ),
        (lambda s: s | {"bn3.weight": s["bn3.weight"].int()}, r"the first is bn3\.weight"),
        (lambda s: s | {"bn3.bias": torch.zeros(1).expand(160)}, r"the first is bn3\.bias"),
        (lambda s: s | {"bn3.bias": torch.zeros(160, device="meta")}, "holds pickled objects besides tensors"),
        (lambda s: s | {"bn3.bias": torch.zeros(160).to_sparse()}, "holds pickled objects besides tensors"),
        (lambda s: [1, 2], "holds no state dict; save module.state_dict"),
        (lambda s: {}, "holds no state dict"),
        (
            lambda s: torch.nn.Conv2d(3, 8, 3).state_dict(),
            "tensors are missing, the first is conv1.weight, and weight is",
        ),
    ],
)
def test_a_state_dict_that_does_not_say_the_network_is_refused(
    make: Callable[[State], Any], message: str, state: State, tmp_path: Path
) -> None:
    path = saved(tmp_path, make(state))
    with pytest.raises(CheckpointError, match=message) as caught:
        load_timm(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_cycles_and_depth_end(state: State, tmp_path: Path) -> None:
    """A dict in itself, and lists of lists of the same lists, 2^60 of them if one counts."""
    loop: dict[str, Any] = {"net": state}
    loop["again"] = loop
    many: list[Any] = []
    for _ in range(60):
        many = [many, many]
    assert load_timm(saved(tmp_path, loop)).provenance["weights"] == "net"
    assert load_timm(saved(tmp_path, {"a": many, "net": state})).provenance["weights"] == "net"


# --- Pickles. ---


def test_pickled_code_is_never_executed(tmp_path: Path) -> None:
    path, marker = tmp_path / "evil.pth", tmp_path / "executed"
    for zipped in (True, False):
        torch.save({**small_timm_state(), "x": Malicious(marker)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"pickled objects besides tensors .*, which are never executed"):
            zoo.load(path)
        assert not marker.exists()
    torch.load(path, weights_only=False)  # the trap works
    assert marker.exists()
    torch.save(small_timm_state(), path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match=r"besides tensors \(STACK_GLOBAL\)"):
        zoo.load(path)


class _Reduced:
    """Pickled, it names any function and its arguments."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    "call",
    [
        (bytearray, (1 << 40,)),
        (torch.FloatTensor, (1 << 40,)),
        (torch._utils._rebuild_sparse_tensor, (torch.sparse_coo, (torch.zeros(1, 0), torch.zeros(0), (1 << 40,)))),
        (eval, ("1",)),
        (getattr, ("text", "upper")),
    ],
)
def test_what_allocates_by_a_number_is_refused(call: Any, tmp_path: Path) -> None:
    """``weights_only`` itself allows the first three."""
    for zipped in (True, False):
        path = tmp_path / "big.pth"
        torch.save({"x": _Reduced(*call)}, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=r"besides tensors \([\w.]+\), which are never executed"):
            load_timm(path)


def test_a_file_that_unfolds_to_more_than_its_size_is_refused(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(1 << 20)}, tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "net.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    with pytest.raises(CheckpointError, match="holds compressed or overlapping parts"):
        load_timm(tmp_path / "net.pth")


def run_line(message: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Executes the line that a refusal gives."""
    words = shlex.split(message[message.index("python -c ") :])
    assert len(words) == 3, message
    monkeypatch.chdir(folder)
    exec(words[2], {})
    return folder / "weights.pth"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, of TorchScript
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_pickled_module_is_refused_with_the_line_that_helps(
    narrow: torch.nn.Module, state: State, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A module, a traced program, and a dict with an object beside the tensors."""
    path = tmp_path / 'it\'s a "$(touch module)".pth'
    torch.save(narrow, path)
    with pytest.raises(CheckpointError, match="is a pickled module, which only its own code") as caught:
        load_timm(path)
    assert torch.load(run_line(str(caught.value), tmp_path, monkeypatch)).keys() == narrow.state_dict().keys()
    torch.jit.save(torch.jit.script(narrow.conv1), str(path))
    with pytest.raises(CheckpointError, match="is a TorchScript program, which is code") as caught:
        load_timm(path)
    assert torch.load(run_line(str(caught.value), tmp_path, monkeypatch)).keys() == {"weight"}
    torch.save({"net": state, "best": np.float64(0.9)}, path)
    with pytest.raises(CheckpointError, match=r"besides tensors \(numpy.*scalar\)") as caught:
        load_timm(path)
    assert load_timm(run_line(str(caught.value), tmp_path, monkeypatch)).provenance["weights"] == "net"


def test_truncated_pth(state: State, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    for zipped in (True, False):
        torch.save(state, path, _use_new_zipfile_serialization=zipped)
        assert load_timm(path).module.classifier.out_features == 3
        path.write_bytes(path.read_bytes()[:-5000])
        with pytest.raises(CheckpointError, match="damaged"):
            load_timm(path)
