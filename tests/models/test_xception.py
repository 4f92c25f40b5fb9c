"""Xception is the paper's network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from xceptile.models.xception import Xception, check_size


def meta(**options: object) -> Xception:
    with torch.device("meta"):
        return Xception(**options)


def test_the_papers_parameter_count() -> None:
    """Table 3 of https://arxiv.org/abs/1610.02357."""
    assert sum(p.numel() for p in meta().parameters()) == 22_855_952


def test_the_papers_structure() -> None:
    """Figure 5: 36 convolutional layers, a separable one counted once, and 4 strided shortcuts."""
    network = meta()
    depthwise = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    dense = [m for m in network.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert len(depthwise) == 34
    assert len(dense) == 34 + 2 + 4
    assert len([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]) == 40
    assert len(network.blocks) == 12
    assert [b.shortcut is not None for b in network.blocks] == [True] * 3 + [False] * 8 + [True]
    assert [b.first_relu for b in network.blocks] == [False] + [True] * 11
    assert all(m.bias is None for m in network.modules() if isinstance(m, nn.Conv2d))


def test_the_multiply_adds() -> None:
    """8.4 G at 299x299, and the maps of figure 5: 19x19x728 in the middle flow, 10x10x2048 at the end."""
    network, macs, maps = meta().eval(), [], {}

    def count(name: str) -> object:
        def hook(module: nn.Module, _: object, y: torch.Tensor) -> None:
            maps[name] = tuple(y.shape[1:])
            macs.append(y[0].numel() * module.weight[0].numel())

        return hook

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count(name))
    network(torch.zeros(1, 3, 299, 299, device="meta"))
    assert maps["conv1"] == (32, 149, 149)
    assert maps["conv2"] == (64, 147, 147)
    assert maps["blocks.7.sepconvs.1.pointwise"] == (728, 19, 19)
    assert maps["sepconv4.pointwise"] == (2048, 10, 10)
    assert 8.3e9 < sum(macs) < 8.5e9


@pytest.mark.parametrize("same_padding", [True, False])
@pytest.mark.parametrize("size", [71, 72, 73, 74, 96, 299])
def test_every_size_from_71(size: int, same_padding: bool) -> None:
    network = meta(classes=7, width=0.25, same_padding=same_padding).eval()
    assert network(torch.zeros(2, 3, size, size + 1, device="meta")).shape == (2, 7)


def test_sizes_below_are_refused() -> None:
    check_size(71, 71)
    for size in ((70, 71), (299, 70)):
        with pytest.raises(ValueError, match="at least 71x71 pixels"):
            check_size(*size)


def test_width_scales_every_layer_to_multiples_of_8() -> None:
    channels = {m.out_channels for m in meta(width=0.4).modules() if isinstance(m, nn.Conv2d)}
    assert channels == {16, 24, 48, 104, 288, 408, 616, 816}


def test_classes_must_be_positive() -> None:
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        Xception(0)
