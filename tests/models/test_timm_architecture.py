"""``--architecture timm/NAME``: timm builds the network, the file gives its tensors, and both compute the same."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from support.float_graphs import drawn_images
from support.foreign_xceptions import images, stand_in_for_torchvision
from support.needs import requires_module
from torch import nn

from xceptile.compile import cli
from xceptile.models import zoo
from xceptile.models.preprocess import load_image, normalize
from xceptile.models.timm_architecture import ArchitectureError, load_architecture
from xceptile.models.weights import CheckpointError
from xceptile.runtime import reference

pytestmark = requires_module("timm", package="timm")
TOLERANCE = 1e-4  # relative to the largest logit
SMALL = "test_resnet"  # timm's own, of half a million parameters


def settled(name: str, size: int, classes: int = 3) -> nn.Module:
    """With random norms and the statistics of images."""
    stand_in_for_torchvision()
    import timm

    torch.manual_seed(0)
    network: nn.Module = timm.create_model(name, pretrained=False, num_classes=classes)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0.0, 0.1)
    with torch.no_grad():
        network.train()(torch.from_numpy(images(4, size, seed=1)).permute(0, 3, 1, 2))
    return network.eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return settled(SMALL, 96)


def saved(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def difference(model: zoo.Model, network: nn.Module, folder: Path) -> float:
    """From the image file to the answer; relative to the largest logit."""
    spec, image = model.input_spec, folder / "photo.png"
    Image.fromarray(drawn_images(1, 200, seed=5)[0][:150]).save(image)
    (ours,) = reference.run(model.graph, normalize(load_image(image, spec)[np.newaxis], spec))
    assert spec.resize is not None
    with Image.open(image) as opened:
        wide = int(spec.resize * 200 / 150)
        left, top = round((wide - spec.width) / 2), round((spec.resize - spec.height) / 2)
        resized = opened.resize((wide, spec.resize), Image.Resampling[spec.interpolation.upper()])
        cut = resized.crop((left, top, left + spec.width, top + spec.height))
    x = (np.asarray(cut, np.float32) / 255 - np.array(spec.mean, np.float32)) / np.array(spec.std, np.float32)
    with torch.no_grad():
        theirs = network(torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None]).numpy()
    assert np.abs(theirs).max() > 0.01
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def test_the_file_gives_the_tensors_of_timms_network(tmp_path: Path) -> None:
    network = settled("resnet18", 96)  # the smallest whose operators are all there
    state = {f"module.{name}": tensor for name, tensor in network.state_dict().items()}
    path = saved(tmp_path / "net.pth", {"model": state | {"criterion.weight": torch.ones(3)}, "epoch": 3})
    model = zoo.load(path, size=96, architecture="timm/resnet18")
    assert difference(model, network, tmp_path) < TOLERANCE
    assert model.labels == ("0", "1", "2")
    assert model.provenance["kind"] == "timm resnet18"
    assert model.provenance["weights"] == "model.module"
    assert model.provenance["unused tensors"] == "model.criterion.weight"
    spec = model.input_spec
    assert (spec.mean, spec.interpolation, spec.resize) == ((0.485, 0.456, 0.406), "bicubic", 100)  # of 235 for 224
    assert spec.origins["mean"] == "assumed"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xception65", "xception41p"])
def test_timms_aligned_xceptions(name: str, tmp_path: Path) -> None:
    network = settled(name, 96)
    safetensors.torch.save_file(network.state_dict(), tmp_path / "net.safetensors")
    model = zoo.load(tmp_path / "net.safetensors", size=96, architecture=f"timm/{name}")
    assert difference(model, network, tmp_path) < TOLERANCE


def test_what_is_not_the_architectures_is_refused(small: nn.Module, tmp_path: Path) -> None:
    state = small.state_dict()
    path = tmp_path / "net.pth"
    for value, message in (
        ({n: t for n, t in state.items() if n != "fc.bias"}, r"1 of \d+ tensors are missing, the first is fc\.bias"),
        ({"x": torch.zeros(1)}, "tensors are missing, the first is conv1"),
        (state | {"layer1.0.se.weight": torch.zeros(1)}, r"also holds the layer layer1\.0\.se, which this network"),
        (state | {"gate.weight": torch.zeros(2, 2)}, "also holds the layer gate"),
        (state | {"bn1.weight": torch.zeros(3)}, r"bn1\.weight has shape \[3\], a test_resnet has"),
        (state | {"bn1.weight": state["bn1.weight"] * torch.nan}, r"bn1\.weight holds NaN or infinity"),
        ({"a": state, "b": {n: 2 * t for n, t in state.items()}}, "holds 2 networks that fit, in a, b"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_architecture(saved(path, value), f"timm/{SMALL}")
    for name in ("timm/xception66", "xception65", "os.system"):
        with pytest.raises(
            ArchitectureError, match=rf"no such architecture '{name}'; known are all of timm's, such as"
        ):
            load_architecture(path, name)
    for source in ("demo", "net.onnx", "net.keras"):
        with pytest.raises(zoo.ModelError, match="says its layers itself; --architecture is for state dicts"):
            zoo.load(source, architecture="timm/xception65")


def test_timm_is_an_extra(
    small: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = saved(tmp_path / "net.pth", small.state_dict())
    monkeypatch.setitem(sys.modules, "timm", None)
    words = ("--target", "host", "--calibration", "drawn:calibration:2", "--output", str(tmp_path / "b"))
    assert cli._invoke(cli.app, ["compile", *words, "--model", str(path), "--architecture", f"timm/{SMALL}"]) == 2
    assert "error: this needs the package timm: pip install 'xceptile[timm]'" in capsys.readouterr().err
