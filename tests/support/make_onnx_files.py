"""Makes tests/models/onnx_files/: one small network as each exporter and converter writes it.

``python make_onnx_files.py FOLDER`` with torch 2.13.0, onnx 1.23.2, onnxscript 0.7.2, onnxslim 0.1.98, onnxsim 0.8.1
and onnxconverter-common 1.16.0 makes those from torch; with ``--keras`` and tensorflow 2.21.0, keras 3.15.1 and tf2onnx
1.17.0 those from Keras. No test runs it: these packages do not go together with the others of this repository.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

SIZE = 49


def from_torch(folder: Path) -> None:
    import onnx
    import onnxsim
    import onnxslim
    import torch
    from onnxconverter_common import float16
    from torch import nn

    def separable(a: int, b: int) -> nn.Module:
        depthwise = nn.Conv2d(a, a, 3, padding=1, groups=a, bias=False)
        return nn.Sequential(depthwise, nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b))

    class Small(nn.Module):
        """A stem, a block with its shortcut, a separable convolution, the head."""

        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU())
            self.sep1 = separable(8, 12)
            self.pool = nn.MaxPool2d(3, 2, 1)
            self.short = nn.Sequential(nn.Conv2d(8, 12, 1, 2, bias=False), nn.BatchNorm2d(12))
            self.sep2 = separable(12, 16)
            self.fc = nn.Linear(16, 5)

        def forward(self, x: Any) -> Any:
            x = self.stem(x)
            x = self.pool(self.sep1(x)) + self.short(x)
            x = torch.relu(self.sep2(torch.relu(x)))
            x = nn.functional.adaptive_avg_pool2d(x, 1)
            return self.fc(x.view(x.size(0), -1))

    class Scaled(nn.Module):
        """It takes pixels in [0, 1] and gives probabilities."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.network = network
            self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1))
            self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1))

        def forward(self, x: Any) -> Any:
            return torch.softmax(self.network((x - self.mean) / self.std), 1)

    torch.manual_seed(0)
    network = Small()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.3)
    with torch.no_grad():
        network(torch.rand(4, 3, SIZE, SIZE) * 2 - 1)
    scaled, x = Scaled(network.eval()).eval(), torch.randn(2, 3, SIZE, SIZE)
    dynamo = {"dynamo": True, "external_data": False}
    torch.onnx.export(scaled, (x,), folder / "torch-dynamo.onnx", **dynamo)
    torch.onnx.export(network, (x,), folder / "torch-dynamo-unoptimized.onnx", optimize=False, **dynamo)
    unfolded = folder / "torchscript-unfolded.onnx"
    options = {"do_constant_folding": False, "training": torch.onnx.TrainingMode.PRESERVE, "input_names": ["x"]}
    torch.onnx.export(network, (x,), unfolded, dynamo=False, dynamic_axes={"x": {0: "batch"}}, **options)
    torch.onnx.export(scaled, (x,), folder / "torchscript.onnx", dynamo=False)
    onnx.save(onnxslim.slim(str(unfolded)), folder / "onnxslim.onnx")
    onnx.save(onnxsim.simplify(str(folder / "torchscript.onnx"))[0], folder / "onnxsim.onnx")
    half = float16.convert_float_to_float16(onnx.load(folder / "torchscript.onnx"), keep_io_types=True)
    onnx.save(half, folder / "float16-converter.onnx")
    for path in folder.glob("*.onnx"):
        strip(path)


def strip(path: Path) -> None:
    """torch writes where its source lay."""
    import onnx

    model = onnx.load(path)
    graph = model.graph
    for item in (*graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer, graph, model):
        item.doc_string = ""
        del item.metadata_props[:]
    onnx.save(model, path)


def from_keras(folder: Path) -> None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
    import keras
    import numpy as np
    import tensorflow
    import tf2onnx
    from keras import layers as k

    def network() -> Any:
        keras.utils.set_random_seed(0)
        image = keras.Input((SIZE, SIZE, 3))
        x = k.Rescaling(1 / 127.5, offset=-1)(image)
        x = k.Activation("relu")(k.BatchNormalization()(k.Conv2D(8, 3, strides=2, use_bias=False)(x)))
        short = k.BatchNormalization()(k.Conv2D(12, 1, strides=2, padding="same", use_bias=False)(x))
        x = k.BatchNormalization()(k.SeparableConv2D(12, 3, padding="same", use_bias=False)(x))
        x = k.Activation("relu")(k.add([k.MaxPooling2D(3, strides=2, padding="same")(x), short]))
        x = k.BatchNormalization()(k.SeparableConv2D(16, 3, padding="same", use_bias=False)(x))
        x = k.Dropout(0.2)(k.GlobalAveragePooling2D()(k.Activation("relu")(x)))
        model = keras.Model(image, k.Dense(5, activation="softmax")(x))
        rng = np.random.default_rng(1)
        for layer in model.layers:
            if isinstance(layer, k.BatchNormalization):
                shape = layer.get_weights()[0].shape
                ranges = ((0.5, 1.5), (-0.5, 0.5), (-0.3, 0.3), (0.2, 0.8))  # gamma, beta, mean, variance
                layer.set_weights([rng.uniform(low, high, shape) for low, high in ranges])
        model(np.zeros((1, SIZE, SIZE, 3), np.float32))
        return model

    network().export(str(folder / "keras-export.onnx"), format="onnx")
    signature = (tensorflow.TensorSpec((None, SIZE, SIZE, 3), tensorflow.float32, name="input"),)
    options = {"opset": 15, "inputs_as_nchw": ["input"], "output_path": str(folder / "tf2onnx-nchw.onnx")}
    tf2onnx.convert.from_keras(network(), input_signature=signature, **options)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    (from_keras if "--keras" in sys.argv else from_torch)(target)
