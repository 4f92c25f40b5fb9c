"""State dicts under timm's names: of a narrow Xception, as training scripts and torch's utilities leave them."""

from __future__ import annotations

import torch
from support.foreign_xceptions import images

from xceptile.models.weights import xception_layers
from xceptile.models.xception import Xception

SIZE = 128  # its maps before the four poolings are odd, odd, even and even


def narrow_xception(classes: int = 3) -> torch.nn.Module:
    """timm's padding and epsilon, random weights and the statistics of real activations."""
    torch.manual_seed(0)
    network = Xception(classes, width=0.1, same_padding=False, epsilon=1e-5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0.0, 0.3)
    settle(network)
    return network


def settle(network: torch.nn.Module) -> None:
    """Batch normalizations get the statistics of images, so that the logits depend on the image."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        network.train()(torch.from_numpy(images(2, SIZE, seed=1)).permute(0, 3, 1, 2))
    network.eval()


def timm_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of our module under timm's names; what torch's utilities append to a name stays."""
    renamed = {}
    layers = sorted(xception_layers(), key=lambda layer: -len(layer.ours))
    for name, tensor in state.items():
        layer = next(layer for layer in layers if name.startswith(f"{layer.ours}."))
        suffix = name.removeprefix(f"{layer.ours}.").replace("depthwise.", "conv1.")
        renamed[f"{layer.timm}.{suffix}"] = tensor
    return renamed


def small_timm_state(classes: int = 3) -> dict[str, torch.Tensor]:
    """Of ``narrow_xception``."""
    return timm_names(narrow_xception(classes).state_dict())
