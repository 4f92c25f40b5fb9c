"""torch networks become graphs that compute the same; what a graph cannot say is refused with its place."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.pt2_files import exported
from torch import Tensor, nn
from torch.nn import functional as F

from xceptile.models import aten
from xceptile.models import graph as ir
from xceptile.models.exported_program import load_graph
from xceptile.models.from_torch import from_torch
from xceptile.models.graph_builder import UnsupportedLayer
from xceptile.models.preprocess import InputSpec
from xceptile.models.verify import verify
from xceptile.models.xception import Xception
from xceptile.runtime import reference

SHAPE = (1, 3, 13, 14)


class Function(nn.Module):
    """A network of one Python function, with layers by name."""

    def __init__(self, function: Callable[..., Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, *inputs: Any) -> Tensor:
        return self.function(self, *inputs)


def randomize(module: nn.Module) -> nn.Module:
    """Random batch statistics and affine parameters."""
    torch.manual_seed(0)
    for each in module.modules():
        if isinstance(each, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(each.running_mean, 0, 0.3)
            nn.init.uniform_(each.running_var, 0.5, 2)
            if each.affine:
                nn.init.uniform_(each.weight, 0.5, 1.5)
                nn.init.normal_(each.bias, 0, 0.3)
    return module.eval()


def nhwc(x: Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy() if x.ndim == 4 else x.numpy()


def compare(module: nn.Module, shape: tuple[int, ...] = SHAPE, tolerance: float = 1e-5) -> ir.Graph:
    """The graph, after comparing its outputs with torch's."""
    module = randomize(module)
    graph = from_torch(module, shape)
    verify(graph)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = module(x)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for ours, theirs in zip(reference.run(graph, nhwc(x)), expected, strict=True):
        theirs = nhwc(theirs[:, :, 0, 0] if theirs.shape[2:] == (1, 1) and ours.ndim == 2 else theirs)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= tolerance * np.abs(theirs).max()
    return graph


def head(channels: int, classes: int = 4) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(channels, classes)


NETWORKS: dict[str, nn.Module] = {
    "dense with bias": nn.Conv2d(3, 8, 3, stride=2, padding=1),
    "rectangular": nn.Conv2d(3, 8, (3, 5), stride=(1, 2), padding=(0, 2)),
    "same, even kernel": nn.Conv2d(3, 8, (4, 2), padding="same"),
    "valid": nn.Conv2d(3, 8, 3, padding="valid"),
    "strided 1x1": nn.Conv2d(3, 8, 1, stride=2, bias=False),
    "depthwise": nn.Conv2d(3, 3, 3, padding=1, groups=3),
    "depthwise 5x5 strided": nn.Conv2d(3, 3, 5, stride=2, padding=2, groups=3, bias=False),
    "one channel": nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 3, groups=1)),
    "norms": nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3, eps=0.1)),
    "max pool": nn.MaxPool2d(3, 2, padding=1),
    "max pool, ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max pool, padded and ceil": nn.MaxPool2d((2, 3), (3, 2), padding=1, ceil_mode=True),
    "zero padding": nn.Sequential(nn.ZeroPad2d((0, 1, 2, 3)), nn.Conv2d(3, 8, 3, stride=2, padding=1)),
    "padding twice": nn.Sequential(nn.ZeroPad2d(1), nn.ZeroPad2d((1, 0, 0, 0)), nn.Conv2d(3, 8, 3)),
    "head": nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), *head(8)),
    "linear head with norm": nn.Sequential(*head(3)[:2], nn.Linear(3, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Identity()),
    "1x1 convolution as head": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(3, 5, 1), nn.Flatten()),
    "map of one pixel": nn.Sequential(nn.Conv2d(3, 8, (13, 14)), nn.Flatten(), nn.Linear(8, 4, bias=False)),
    "whole-map average": nn.Sequential(nn.AvgPool2d((13, 14)), nn.Flatten()),
    "mean": Function(lambda _, x: x.mean((2, 3))),
    "mean kept": Function(lambda _, x: x.mean((-1, -2), keepdim=True)),
    "squeeze": Function(lambda _, x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1)),
    "view": Function(lambda _, x: F.adaptive_avg_pool2d(x, 1).view(x.size(0), -1)),
    "reshape": Function(lambda _, x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], -1)),
    "squeeze both": Function(lambda _, x: F.adaptive_avg_pool2d(x, 1).squeeze((2, 3)).unsqueeze(2).unsqueeze(3)),
    "flat view": Function(
        lambda _, x: torch.ops.aten._unsafe_view(torch.ops.aten._adaptive_avg_pool2d(x, [1, 1]), [1, 3])
    ),
    "nothing": nn.Sequential(
        Function(lambda _, x: torch.ops.aten.alias(torch.ops.aten.contiguous(x).detach()).clone()),
        nn.Dropout2d(),
        nn.ReLU(),
    ),
    "functional": Function(lambda m, x: F.relu(m.a(x)) + m.a(x), a=nn.Conv2d(3, 4, 3)),
    "shared weights": Function(lambda m, x: m.a(m.a(x)), a=nn.Conv2d(3, 3, 3, padding=1)),
    "a padding with two readers": Function(
        lambda m, x: (lambda p: m.a(p) + m.b(p))(F.pad(x, (0, 1, 0, 1))), a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(3, 4, 3)
    ),
    "in place": Function(
        lambda m, x: m.b(m.a(x).relu_().add_(m.c(x))), a=nn.Conv2d(3, 3, 1), b=nn.BatchNorm2d(3), c=nn.Conv2d(3, 3, 1)
    ),
    "two outputs": Function(lambda m, x: (m.a(x), x.mean((2, 3))), a=nn.Conv2d(3, 4, 3)),
    "minus infinity": Function(lambda _, x: F.max_pool2d(F.pad(x, (0, 1, 1, 0), value=-math.inf), 3, 2)),
    "dilated": nn.Sequential(nn.Conv2d(3, 4, 3, dilation=(2, 1), padding="same"), nn.Conv2d(4, 4, 3, 2, 3, 3, 4)),
    "dilation of one pixel": nn.Conv2d(3, 4, 1, dilation=2),
    "relu6": nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(inplace=True), nn.Hardtanh(-0.5, 2)),
    "clamps": Function(lambda _, x: F.relu6(torch.clamp_min(x.clamp(-1, 2), 0) + x.clamp(min=0))),
    "leaky relu": nn.Sequential(nn.LeakyReLU(0.2), nn.LeakyReLU(inplace=True), nn.LeakyReLU(0.0)),
    "sigmoid and tanh": Function(lambda m, x: m.a(x.sigmoid() + x.tanh()), a=nn.Conv2d(3, 3, 1)),
    "products": Function(lambda m, x: x * m.a(x).mul_(x) * x, a=nn.Conv2d(3, 3, 1)),
    "gates": Function(lambda _, x: x.mean((2, 3), keepdim=True).sigmoid() * (x * F.max_pool2d(x, (13, 14)))),
    "joined": Function(lambda m, x: torch.cat([m.a(x), x, x], 1), a=nn.Conv2d(3, 5, 1)),
    "joined vectors": Function(lambda m, x: m.a(torch.cat([x.mean((2, 3)), x.mean((2, 3))], -1)), a=nn.Linear(6, 4)),
    "joined pixels": Function(
        lambda _, x: torch.cat([x.mean((2, 3), keepdim=True), F.max_pool2d(x, (13, 14))], dim=-3)
    ),
    "twice as large": Function(lambda _, x: F.interpolate(F.interpolate(x, scale_factor=2.0), scale_factor=(2, 0.5))),
    "bilinear": Function(lambda _, x: F.interpolate(x, scale_factor=2, mode="bilinear")),
    "bilinear to a size": Function(lambda _, x: F.interpolate(x, size=(7, 31), mode="bilinear")),
    "bilinear, aligned": Function(lambda _, x: F.interpolate(x, (21, 5), mode="bilinear", align_corners=True)),
    "nearest to a size": Function(lambda _, x: F.interpolate(x, size=(5, 33))),
    "of the same size": Function(lambda _, x: F.interpolate(x, size=(13, 14), mode="bilinear").relu()),
    "image pooling": Function(
        lambda m, x: F.interpolate(F.relu(m.a(x.mean((2, 3), keepdim=True))), size=(13, 14), mode="bilinear") + x,
        a=nn.Conv2d(3, 3, 1),
    ),
    "average windows": nn.Sequential(nn.AvgPool2d(3, 2, padding=1), nn.AvgPool2d((2, 3), (1, 2))),
    "average windows, ceil": nn.AvgPool2d((3, 2), (2, 3), ceil_mode=True),
    "average of parts": nn.Sequential(nn.Conv2d(3, 4, 2, padding=(1, 0)), nn.AdaptiveAvgPool2d((7, 1))),
    "flattened": nn.Sequential(nn.MaxPool2d(3), nn.Flatten(), nn.ReLU(), nn.Dropout(), nn.Linear(48, 5)),
}
# Lowered, they are arithmetic on positions, which is refused.
UNLOWERED: dict[str, nn.Module] = {
    "nearest exact": Function(lambda _, x: F.interpolate(x, size=(7, 9), mode="nearest-exact")),
    "nearest exact, twice": Function(lambda _, x: torch.ops.aten._upsample_nearest_exact2d(x, [26, 28], 2.0, 2.0)),
    "nearest": Function(lambda _, x: torch.ops.aten.upsample_nearest2d(x, [26, 7], 2.0, 0.5)),
    "bilinear": Function(lambda _, x: torch.ops.aten.upsample_bilinear2d(x, [9, 9], True)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_supported_layers(name: str) -> None:
    compare(NETWORKS[name])


@functools.cache
def programs(name: str) -> tuple[torch.export.ExportedProgram, ...]:
    """As torch exports it, and lowered to the core operators."""
    program = exported(randomize(NETWORKS[name]), SHAPE)
    return program, program.run_decompositions()


def loaded(program: torch.export.ExportedProgram, path: Path) -> ir.Graph:
    """By way of a file."""
    torch.export.save(program, path)
    return load_graph(path, "net")


@pytest.mark.parametrize("name", NETWORKS)
def test_supported_layers_from_a_file(name: str, tmp_path: Path) -> None:
    """What torch saves before anything is lowered, operators in place included, and what it saves after."""
    x = torch.randn(SHAPE)
    truth = randomize(NETWORKS[name])(x.clone())
    for program in programs(name):
        graph = loaded(program, tmp_path / "net.pt2")
        verify(graph)
        for ours, theirs in zip(
            reference.run(graph, nhwc(x)), truth if isinstance(truth, tuple) else (truth,), strict=True
        ):
            theirs = nhwc(theirs.detach())
            assert np.abs(ours.reshape(theirs.shape) - theirs).max() <= 1e-5 * np.abs(theirs).max()


@pytest.mark.parametrize("name", UNLOWERED)
def test_supported_layers_that_lowering_takes_apart(name: str, tmp_path: Path) -> None:
    x, network = torch.randn(SHAPE), UNLOWERED[name].eval()
    (ours,) = reference.run(loaded(exported(network, SHAPE), tmp_path / "net.pt2"), nhwc(x))
    assert np.allclose(ours, nhwc(network(x)), atol=1e-5)


def test_operands_are_as_torchs_schemas_have_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each layer reads or ignores every operand of each operator that it stands for; defaults are torch's own."""
    seen: dict[str, set[str]] = {}
    get, ignore, compute = aten.Call.get, aten.Call.ignore, aten._Importer._compute
    current: list[str] = []

    def recording_get(call: aten.Call, name: str, default: Any = None) -> Any:
        seen[current[-1]].add(name)
        declared = {each.name: each for each in schema(current[-1]).arguments}
        if name in declared and declared[name].has_default_value():
            theirs = {"valid": 0}.get(str(declared[name].default_value), declared[name].default_value)
            ours = theirs if default is None and theirs in ([], 0) else default  # the layer tells None what it is
            assert set(np.ravel(theirs)) == set(np.ravel(ours)), (current[-1], name)
        return get(call, name, default)

    def recording_ignore(call: aten.Call, *names: str) -> None:
        seen[current[-1]].update(names)
        ignore(call, *names)

    def recording_compute(importer: Any, target: str, in_place: bool, call: aten.Call) -> Any:
        current.append(target)
        seen.setdefault(target, set())
        return compute(importer, target, in_place, call)

    def schema(target: str) -> Any:
        _, name, overload = target.split(".")
        return getattr(getattr(torch.ops.aten, name), overload)._schema

    monkeypatch.setattr(aten.Call, "get", recording_get)
    monkeypatch.setattr(aten.Call, "ignore", recording_ignore)
    monkeypatch.setattr(aten._Importer, "_compute", recording_compute)
    for name in NETWORKS:
        for program in programs(name):
            loaded(program, tmp_path / "net.pt2")
    for network in UNLOWERED.values():
        loaded(exported(network.eval(), SHAPE), tmp_path / "net.pt2")
    unread = {
        target: missing
        for target, names in seen.items()
        if target in aten._LAYERS and (missing := {each.name for each in schema(target).arguments} - names)
    }
    assert not unread
    for target in {*aten._LAYERS, *aten._WEIGHTS}:
        assert schema(target)
    assert set(aten._LAYERS) - set(seen) == {"aten.squeeze.default"}, "of an image it would take the batch away, too"


@pytest.mark.parametrize(("size", "same_padding"), [((71, 72), True), ((96, 96), True), ((96, 101), False)])
def test_xception(size: tuple[int, int], same_padding: bool) -> None:
    """Both paddings, on odd and even maps."""
    network = Xception(5, width=0.1, same_padding=same_padding)
    network.train()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network(torch.randn(2, 3, *size))
    network.eval()
    graph = from_torch(network, InputSpec(*size))
    verify(graph)
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        expected = network(x).numpy()
    assert np.abs(reference.run(graph, nhwc(x))[0] - expected).max() < 1e-4 * np.abs(expected).max()
    pools = [node.op.padding for node in graph.nodes if isinstance(node.op, ir.MaxPool2d)]
    if same_padding and size == (96, 96):  # maps of 45, 23, 12, 6
        assert pools == [(1, 1, 1, 1), (1, 1, 1, 1), (0, 1, 0, 1), (0, 1, 0, 1)]
    assert same_padding or set(pools) == {(1, 1, 1, 1)}
    assert {node.path for node in graph.nodes} >= {"conv1", "blocks.2.shortcut.0", "sepconv4.pointwise", "classifier"}
    assert graph.node("blocks.4.sepconvs.2.depthwise").path == "blocks.4.sepconvs.2.depthwise"


def test_paths_and_names() -> None:
    inner = Function(lambda m, x: F.relu(m.conv(x)) + x, conv=nn.Conv2d(3, 3, 1))
    graph = compare(nn.Sequential(nn.Sequential(inner, nn.ReLU()), inner))
    assert [(n.name, n.path) for n in graph.nodes[1:]] == [
        ("0.0.conv", "0.0.conv"),
        ("0.0.relu", "0.0"),
        ("0.0.add", "0.0"),
        ("0.1", "0.1"),
        ("1.conv", "1.conv"),
        ("1.relu", "1"),
        ("1.add", "1"),
    ]
    assert set(graph.constants) == {"1.conv.weight", "1.conv.bias"}, "shared weights are kept once"


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("core", [False, True])
def test_exported_programs(strict: bool, core: bool) -> None:
    """As torch.export makes them, strict or not, lowered to the core operators or not, saved and loaded."""
    network = randomize(
        nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), *head(8))
    )
    program = torch.export.export(network, (torch.zeros(SHAPE),), strict=strict)
    if core:
        program = program.run_decompositions()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    graph = from_torch(torch.export.load(file))
    verify(graph)
    x = torch.randn(SHAPE)
    with torch.no_grad():
        expected = network(x).numpy()
    assert np.allclose(reference.run(graph, nhwc(x))[0], expected, atol=1e-5)
    assert [n.path for n in graph.nodes if isinstance(n.op, ir.Conv2d | ir.FullyConnected)] == ["0", "7"]
    with pytest.raises(ValueError, match=r"takes \[1, 3, 13, 14\], \[1, 3, 9, 9\] was asked for"):
        from_torch(program, (1, 3, 9, 9))


REFUSED: dict[str, tuple[nn.Module, str, str, str]] = {
    "prelu": (nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU()), "1", "aten.prelu", "there is no int8 form of it here"),
    "a range without zero": (nn.Sequential(nn.Hardtanh(1, 2)), "0", "aten.hardtanh", "that holds zero, as ReLU6's, is"),
    "a steep slope": (
        nn.Sequential(nn.LeakyReLU(2.0)),
        "0",
        "aten.leaky_relu",
        "with a slope of 2; slopes from 0 to 1",
    ),
    "sigmoid at the end": (nn.Sequential(nn.Sigmoid()), "0", "aten.sigmoid", "end the network at its logits"),
    "tanh, then moved": (
        nn.Sequential(nn.Conv2d(3, 4, (13, 14)), nn.Tanh(), nn.Flatten()),
        "1",
        "aten.tanh",
        "end the network at its logits",
    ),
    "a sigmoid that is enlarged": (
        nn.Sequential(nn.Sigmoid(), nn.UpsamplingBilinear2d(scale_factor=2)),
        "0",
        "aten.sigmoid",
        "end the network at its logits",
    ),
    "bicubic": (nn.Sequential(nn.Upsample(scale_factor=2, mode="bicubic")), "0", "aten.upsample_bicubic2d", "no int8"),
    "an odd factor": (
        nn.Sequential(nn.Upsample(scale_factor=1.5, mode="bilinear")),
        "0",
        "aten.upsample_bilinear2d",
        "by [1.5, 1.5] a [13, 14] map becomes [19.5, 21.0]; give the size in place of a factor",
    ),
    "rows joined": (
        Function(lambda _, x: torch.cat([x, x], 2)),
        "",
        "aten.cat",
        "it joins dimension 2 of 4; only chan",
    ),
    "a gate for each pixel": (
        Function(lambda m, x: x * m.a(x), a=nn.Conv2d(3, 1, 1)),
        "",
        "aten.mul",
        "or a map and one number for each of its channels, are",
    ),
    "silu": (nn.Sequential(nn.Sequential(nn.SiLU())), "0.0", "aten.silu", "supported are Conv2d"),
    "softmax": (nn.Sequential(*head(3), nn.Softmax(1)), "4", "aten.softmax", "end the network at its logits"),
    "groups": (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1, groups=2)),
        "1",
        "aten.conv2d",
        "2 groups from 4 to 8",
    ),
    "depth multiplier": (nn.Conv2d(3, 6, 1, groups=3), "", "aten.conv2d", "3 groups from 3 to 6"),
    "transposed": (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "0", "aten.conv_transpose2d", "no int8 form"),
    "padding mode": (nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(3, 4, 3)), "0", "aten.pad", "padding mode reflect"),
    "other padding value": (
        nn.Sequential(nn.ConstantPad2d(1, 2.0), nn.Conv2d(3, 4, 3)),
        "0",
        "aten.pad",
        "padding with 2",
    ),
    "zeros before a maximum": (
        nn.Sequential(nn.ZeroPad2d(1), nn.MaxPool2d(3)),
        "0",
        "aten.pad",
        "which pads with -inf",
    ),
    "padding alone": (nn.Sequential(nn.ZeroPad2d(1), nn.ReLU()), "0", "aten.pad", "followed by 1 (aten.relu)"),
    "cropping": (nn.Sequential(nn.ZeroPad2d(-1), nn.Conv2d(3, 4, 1)), "0", "aten.pad", "negative padding"),
    "average pool": (
        nn.Sequential(nn.AvgPool2d(2, padding=1, count_include_pad=False)),
        "0",
        "aten.avg_pool2d",
        "its padding does not count, so that windows differ",
    ),
    "average pool, ceil": (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), "0", "aten.avg_pool2d", "window is partial"),
    "adaptive pool": (nn.Sequential(nn.AdaptiveAvgPool2d(2)), "0", "aten.adaptive_avg_pool2d", "only to 1x1"),
    "flatten a map": (nn.Sequential(nn.Flatten(), nn.Sigmoid()), "", "output", "a Linear layer takes one, or pool"),
    "flatten a part": (nn.Sequential(nn.Flatten(2)), "0", "aten.view", "pool the map to 1x1"),
    "mean of rows": (Function(lambda _, x: x.mean(3)), "", "aten.mean", "only height and width together"),
    "a number": (Function(lambda _, x: x.relu() + 1), "", "aten.add", "its operand is 1"),
    "a factor": (Function(lambda _, x: torch.add(x, x, alpha=2)), "", "aten.add", "with a factor of 2"),
    "broadcast": (Function(lambda _, x: x + x.mean((2, 3), keepdim=True)), "", "aten.add", "they must be equal"),
    "multiplication": (Function(lambda _, x: x.relu() * 2), "", "aten.mul", "no int8 form"),
    "batch statistics": (nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "0", "aten.batch_norm", "batch"),
    "computed weights": (
        Function(lambda m, x: F.conv2d(x, m.a.weight * 2), a=nn.Conv2d(3, 4, 1)),
        "",
        "aten.mul",
        "a.weight is computed from while the network runs",
    ),
    "small image": (
        nn.Sequential(nn.Conv2d(3, 4, 3, 8), nn.MaxPool2d(3)),
        "",
        "torch.export",
        "",
    ),
    "data-dependent": (Function(lambda _, x: x if x.sum() > 0 else -x), "", "torch.export", "cannot be exported"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unsupported_layers_are_refused_with_their_place(name: str) -> None:
    module, path, operator, reason = REFUSED[name]
    with pytest.raises(UnsupportedLayer) as caught:
        from_torch(module.eval(), SHAPE)
    assert (caught.value.path, caught.value.operator) == (path, operator)
    assert reason in caught.value.reason
    assert "\n" not in str(caught.value)


def test_open_sizes() -> None:
    """Of the batch they become what is asked for; others are refused."""
    batch, height = torch.export.Dim("batch"), torch.export.Dim("height")
    program = torch.export.export(nn.ReLU(), (torch.zeros(2, 3, 4, 4),), dynamic_shapes=({0: batch},))
    assert from_torch(program).inputs[0].type.shape == (1, 4, 4, 3)
    assert from_torch(program, (5, 3, 4, 4)).inputs[0].type.shape == (5, 4, 4, 3)
    program = torch.export.export(nn.ReLU(), (torch.zeros(1, 3, 4, 4),), dynamic_shapes=({2: height},))
    with pytest.raises(UnsupportedLayer, match="export it with only the batch open, or nothing"):
        from_torch(program)


@pytest.mark.parametrize(("more", "reason"), [(2, "an input that is no tensor"), (torch.tensor(2.0), "of shape []")])
def test_inputs_that_are_no_images(more: Any, reason: str) -> None:
    program = torch.export.export(Function(lambda _, x, more: x.relu()), (torch.zeros(SHAPE), more))
    with pytest.raises(UnsupportedLayer) as caught:
        from_torch(program)
    assert reason in caught.value.reason


def test_the_module_is_left_as_it_was() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    network[1].eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    graph = from_torch(network, SHAPE)
    assert [m.training for m in network] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())
    with torch.no_grad():
        network[0].weight.zero_()
    assert graph.constants["0.weight"].data.any(), "the graph owns its weights"


def test_a_shape_is_needed() -> None:
    with pytest.raises(ValueError, match="needs the input's shape"):
        from_torch(nn.ReLU())
