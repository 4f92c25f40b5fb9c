"""Networks with dilation, gates and decoders: as torch computes them, and in int8 as LiteRT does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xceptile.calibration.calibrate import calibrate
from xceptile.calibration.recipe import PRESETS
from xceptile.compile.backends.tflite import serialize
from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models.from_torch import from_torch
from xceptile.models.verify import verify
from xceptile.runtime import reference
from xceptile.runtime.engines.litert import LiteRtEngine

SHAPE = (1, 3, 33, 40)


def conv(inputs: int, outputs: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    layers = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    return nn.Sequential(*layers)


def separable(inputs: int, outputs: int, rate: int) -> nn.Sequential:
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=rate, dilation=rate, groups=inputs, bias=False)
    return nn.Sequential(depthwise, nn.BatchNorm2d(inputs), nn.ReLU(), *conv(inputs, outputs))


class DeepLab(nn.Module):
    """DeepLabv3+ (arXiv:1802.02611) in small: a low-level branch, pooling at several rates, a decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.low, self.high = conv(3, 8, 3, 2), nn.Sequential(conv(8, 12, 3, 2), separable(12, 12, 2))
        self.rates = nn.ModuleList([conv(12, 6), *(separable(12, 6, rate) for rate in (2, 4, 12))])
        self.pool, self.project, self.reduce = conv(12, 6), conv(30, 8), conv(8, 4)
        self.last = nn.Sequential(separable(12, 8, 1), nn.Dropout(0.1), nn.Conv2d(8, 5, 1))

    def forward(self, x: Tensor) -> Tensor:
        low = self.low(x)
        high = self.high(low)
        pooled = self.pool(F.adaptive_avg_pool2d(high, 1))
        pooled = F.interpolate(pooled, size=high.shape[2:], mode="bilinear", align_corners=True)
        joined = self.project(torch.cat([*(rate(high) for rate in self.rates), pooled], 1))
        joined = F.interpolate(joined, size=low.shape[2:], mode="bilinear", align_corners=False)
        out = self.last(torch.cat([joined, self.reduce(low)], 1))
        return F.interpolate(out, size=x.shape[2:], mode="bilinear", align_corners=False)


class UNet(nn.Module):
    """Nearest upsampling and concatenation, squeeze-and-excite gates, ReLU6 and leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = conv(3, 6, 3), conv(6, 8, 3, 2), nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU6())
        self.squeeze, self.excite = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.up_b, self.up_a = nn.Sequential(nn.Conv2d(16, 6, 3, padding=1), nn.LeakyReLU(0.1)), conv(12, 6, 3)
        self.last = nn.Conv2d(6, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(a)
        c = self.c(b)
        c = c * torch.sigmoid(self.excite(F.relu(self.squeeze(c.mean((2, 3), keepdim=True)))))
        b = self.up_b(torch.cat([F.interpolate(c, scale_factor=2), b], 1))
        return self.last(self.up_a(torch.cat([F.interpolate(b, scale_factor=2), a], 1)))


def imported(network: nn.Module, shape: tuple[int, ...]) -> ir.Graph:
    """The network's graph, after comparing its float reference with torch's output."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 2)
    graph = from_torch(network.eval(), shape)
    verify(graph)
    x = torch.randn(shape)
    expected = network(x).detach().permute(0, 2, 3, 1).numpy()
    (got,) = reference.run(graph, x.permute(0, 2, 3, 1).contiguous().numpy())
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()
    return graph


def check_int8(graph: ir.Graph) -> None:
    """Quantized, it is near the float graph, and LiteRT's output is the reference's bit for bit."""
    graph = run_passes(graph, FLOAT_PASSES, verify)
    height, width = graph.inputs[0].type.shape[1:3]
    images = [np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8) for seed in range(3)]
    made = calibrate(graph, images, PRESETS["min-max"])
    verify(made.int8_graph)
    source = made.int8_graph.inputs[0].type.per_tensor
    target = made.int8_graph.type_of(made.int8_graph.outputs[0]).per_tensor
    engine = LiteRtEngine(serialize(made.int8_graph), 1)
    for image in images:
        real = image[None].astype(np.float32)
        x = np.clip(np.rint(real / source.scale) + source.zero_point, -128, 127).astype(np.int8)
        (expected,) = reference.run(made.int8_graph, x)
        np.testing.assert_array_equal(engine.run_once(x)[0], expected)
        (wanted,) = reference.run(made.float_graph, real)
        error = (expected.astype(np.float64) - target.zero_point) * target.scale - wanted
        assert np.sqrt(np.mean(error**2)) < 0.1 * np.std(wanted)


def test_deeplab() -> None:
    graph = imported(DeepLab(), SHAPE)
    dilations = [node.op.dilation for node in graph.nodes if isinstance(node.op, ir.DepthwiseConv2d)]
    assert dilations == [(2, 2), (2, 2), (4, 4), (12, 12), (1, 1)]
    check_int8(graph)


def test_decoder_with_gates() -> None:
    check_int8(imported(UNet(), (1, 3, 24, 32)))
