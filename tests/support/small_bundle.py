"""Small random networks as bundles: one for LiteRT alone, no kernels compiled, and one that compiles in seconds."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
from support.float_graphs import FloatBuilder, random_xception, single

from xceptile.calibration.recipe import PRESETS, QuantRecipe
from xceptile.compile.pipeline import Quantized, build_bundle_files, quantize_model
from xceptile.models import drawn
from xceptile.models.preprocess import InputSpec
from xceptile.models.zoo import Model
from xceptile.runtime.accuracy import Labelled
from xceptile.runtime.bundle import Bundle, Manifest, write_bundle
from xceptile.targets import catalog, host

SIZE = 40
PLAIN = replace(PRESETS["min-max"], equalize=False)


def model(classes: int = len(drawn.LABELS)) -> Model:
    """Of another number of classes than the drawn data sets have, they bear numbers."""
    labels = tuple(drawn.LABELS) if classes == len(drawn.LABELS) else tuple(map(str, range(classes)))
    return Model(random_xception(SIZE, classes=classes), InputSpec(SIZE, SIZE), labels, {"made": "test"})


def quantize(network: Model, recipe: QuantRecipe = PLAIN, images: int = 8) -> Quantized:
    size = network.input_spec.height
    stream = (drawn.draw("calibration", i, size)[0] for i in range(images))
    return quantize_model(network, stream, recipe, image_count=images, progress=lambda what, share: None)


@cache
def quantized() -> Quantized:
    return quantize(model())


def litert_files(network: Quantized) -> tuple[Manifest, dict[str, bytes]]:
    return build_bundle_files(network, host.detect(), ("litert",), (), lambda what, share: None)


def litert_bundle(path: Path, network: Quantized | None = None) -> Bundle:
    return write_bundle(path, *litert_files(network or quantized()))


def labelled(count: int, size: int = SIZE, first: int = 0) -> list[Labelled]:
    images = ((i, drawn.draw("val", i, size)) for i in range(first, first + count))
    return [Labelled(f"val/{i}", label, pixels) for i, (pixels, label) in images]


COMPILED_SIZE = 24


def compiled_model() -> Model:
    """A convolution, a separable one, a classifier: random weights, the classes of the drawn data sets."""
    images = np.stack([drawn.draw("train", i, COMPILED_SIZE)[0] for i in range(4)])
    build = FloatBuilder(images / 127.5 - 1)
    x = build.relu("relu1", build.norm("norm1", build.conv("conv1", "input", 8, 3, 2)))
    x = build.relu("relu2", build.separable("sep", x, 16))
    build.linear("classifier", build.mean("mean", x), len(drawn.LABELS))
    return Model(
        single(build.graph()), InputSpec(COMPILED_SIZE, COMPILED_SIZE), tuple(drawn.LABELS), {"weights": "random"}
    )


def write_small_bundle(folder: Path, target: str = "host", engines: tuple[str, ...] = ("native", "litert")) -> Bundle:
    network = quantize(compiled_model(), QuantRecipe("small", equalize=False), 4)
    manifest, files = build_bundle_files(network, catalog.get(target), engines, (), lambda what, share: None)
    return write_bundle(folder, manifest, files)
