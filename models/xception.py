"""Xception as Chollet's paper has it, in torch: https://arxiv.org/abs/1610.02357, figure 5.

The paper's network at width 1 and 1000 classes holds 22,855,952 trainable parameters. Depthwise first, no activation
between the depthwise and the pointwise step, batch normalization after every convolution.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

MIN_SIZE = 71  # keras.applications.Xception has the same limit; the middle flow then works on 5x5 maps


def check_size(height: int, width: int) -> None:
    """Raises ValueError for an input that is too small for Xception, in pixels."""
    if min(height, width) < MIN_SIZE:
        raise ValueError(f"Xception needs images of at least {MIN_SIZE}x{MIN_SIZE} pixels, got {height}x{width}")


def scaled_channels(channels: int, multiplier: float) -> int:
    """Channels at a width multiplier, kept a multiple of 8 (full vectors on every processor)."""
    return channels if multiplier == 1.0 else max(8, round(channels * multiplier / 8) * 8)


class SamePad2d(nn.Module):
    """TensorFlow's SAME for a 3x3 window at stride 2: nothing before and one after on even sizes, one each on odd."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        left, top = int(x.shape[3]) % 2, int(x.shape[2]) % 2
        return nn.functional.pad(x, (left, 1, top, 1), value=self.value)


class SeparableConv2d(nn.Module):
    """Depthwise 3x3, then pointwise 1x1; (N, C_in, H, W) -> (N, C_out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False)
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.depthwise(x))
        return y


class Block(nn.Module):
    """A residual block: [ReLU] SeparableConv BN, repeated; then max pooling and a strided shortcut, or an identity.

    ``channels`` are the widths in and after each separable convolution. ``same_padding`` says how the strided pooling
    is padded: TensorFlow's SAME (Keras) or one pixel on each side (timm and Cadene's port). The two agree on odd maps.
    """

    def __init__(self, channels: tuple[int, ...], *, stride: int, first_relu: bool, same_padding: bool) -> None:
        super().__init__()
        self.first_relu = first_relu
        pairs = list(pairwise(channels))
        self.sepconvs = nn.ModuleList(SeparableConv2d(a, b) for a, b in pairs)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b, eps=1e-3, momentum=0.01) for _, b in pairs)
        self.pool: nn.Module | None = None
        self.shortcut: nn.Module | None = None
        if stride == 2:
            self.pool = (
                nn.Sequential(SamePad2d(float("-inf")), nn.MaxPool2d(3, 2))
                if same_padding
                else nn.MaxPool2d(3, 2, padding=1)
            )
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels[0], channels[-1], 1, stride=2, bias=False),
                nn.BatchNorm2d(channels[-1], eps=1e-3, momentum=0.01),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for index, (sepconv, norm) in enumerate(zip(self.sepconvs, self.norms, strict=True)):
            if index or self.first_relu:
                y = nn.functional.relu(y)
            y = norm(sepconv(y))
        if self.pool is not None and self.shortcut is not None:
            return self.pool(y) + self.shortcut(x)  # type: ignore[no-any-return]  # nn.Module calls are untyped
        return y + x


class Xception(nn.Module):
    """(N, 3, H, W) float32 -> logits (N, classes). ``width`` scales every channel count; ``epsilon`` is the batch
    normalizations' (1e-3 in Keras, 1e-5 in timm); ``same_padding`` as in ``Block``.
    """

    def __init__(
        self, classes: int = 1000, *, width: float = 1.0, same_padding: bool = True, epsilon: float = 1e-3
    ) -> None:
        super().__init__()
        if classes < 1:
            raise ValueError(f"classes must be at least 1, got {classes}")

        def w(channels: int) -> int:
            return scaled_channels(channels, width)

        def block(*channels: int, stride: int = 2, first_relu: bool = True) -> Block:
            return Block(tuple(map(w, channels)), stride=stride, first_relu=first_relu, same_padding=same_padding)

        # Entry flow, the stem: "Conv 32, 3x3, stride=2x2", "Conv 64, 3x3", neither padded.
        self.conv1 = nn.Conv2d(3, w(32), 3, stride=2, bias=False)
        self.norm1 = nn.BatchNorm2d(w(32), momentum=0.01)
        self.conv2 = nn.Conv2d(w(32), w(64), 3, bias=False)
        self.norm2 = nn.BatchNorm2d(w(64), momentum=0.01)
        self.blocks = nn.ModuleList(
            [
                # Entry flow: 128, 256 and 728 channels; the first block has no leading ReLU.
                block(64, 128, 128, first_relu=False),
                block(128, 256, 256),
                block(256, 728, 728),
                # Middle flow, repeated 8 times.
                *(block(728, 728, 728, 728, stride=1) for _ in range(8)),
                # Exit flow.
                block(728, 728, 1024),
            ]
        )
        self.sepconv3 = SeparableConv2d(w(1024), w(1536))
        self.norm3 = nn.BatchNorm2d(w(1536), momentum=0.01)
        self.sepconv4 = SeparableConv2d(w(1536), w(2048))
        self.norm4 = nn.BatchNorm2d(w(2048), momentum=0.01)
        self.classifier = nn.Linear(w(2048), classes)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = epsilon

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.relu(self.norm1(self.conv1(x)))
        x = nn.functional.relu(self.norm2(self.conv2(x)))
        for block in self.blocks:
            x = block(x)
        x = nn.functional.relu(self.norm3(self.sepconv3(x)))
        x = nn.functional.relu(self.norm4(self.sepconv4(x)))
        x = x.mean((2, 3))
        logits: Tensor = self.classifier(x)
        return logits
