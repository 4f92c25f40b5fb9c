"""A float Graph as a torch module in NCHW, in the forms that XNNPACK's delegate takes over."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from xceptile.compile.gpu_kit.torch_words import AXES, symmetric
from xceptile.models import graph as ir


class TorchNetwork(nn.Module):
    """The graph's one output of its one input. Raises NotImplementedError for paddings that are not symmetric."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self.graph = graph
        for index, node in enumerate(graph.nodes):
            if len(node.inputs) == 3:  # data, weights, bias
                weight, bias = (graph.constants[name].data for name in node.inputs[1:])
                weight = weight.transpose(AXES.get(type(node.op), (0, 1)))
                if isinstance(node.op, ir.DepthwiseConv2d):
                    weight = weight[:, None]
                self.register_buffer(f"weight_{index}", torch.from_numpy(np.ascontiguousarray(weight)))
                self.register_buffer(f"bias_{index}", torch.from_numpy(bias.copy()))

    def forward(self, x: Tensor) -> Tensor:
        values = {self.graph.inputs[0].name: x}
        for index, node in enumerate(self.graph.nodes):
            if not isinstance(node.op, ir.Input):
                y = self.run(index, node.op, [values[name] for name in node.inputs if name in values])
                values[node.name] = F.relu(y) if getattr(node.op, "relu", False) else y
        return values[self.graph.outputs[0]]

    def run(self, index: int, op: ir.Op, x: list[Tensor]) -> Tensor:
        def weights() -> tuple[Tensor, Tensor]:
            return self.get_buffer(f"weight_{index}"), self.get_buffer(f"bias_{index}")

        match op:
            case ir.Conv2d():
                return F.conv2d(x[0], *weights(), op.strides, symmetric(op.padding))
            case ir.DepthwiseConv2d():
                return F.conv2d(x[0], *weights(), op.strides, symmetric(op.padding), groups=x[0].shape[1])
            case ir.FullyConnected():
                return F.linear(x[0], *weights())
            case ir.MaxPool2d():
                return F.max_pool2d(x[0], op.kernel, op.strides, symmetric(op.padding))
            case ir.Relu():
                return F.relu(x[0])
            case ir.Add():
                return x[0] + x[1]
            case ir.GlobalAveragePool():
                return F.adaptive_avg_pool2d(x[0], 1).flatten(1)
            case _:
                raise NotImplementedError(f"{op}")
