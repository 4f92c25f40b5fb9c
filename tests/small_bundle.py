"""A bundle of a network so small that it compiles in seconds: a convolution, a separable one, a classifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from float_graphs import FloatBuilder, single

from xceptile.calibration.recipe import QuantRecipe
from xceptile.compile.pipeline import build_bundle_files, quantize_model
from xceptile.models import drawn
from xceptile.models.preprocess import InputSpec
from xceptile.models.zoo import Model
from xceptile.runtime.bundle import Bundle, write_bundle
from xceptile.targets import catalog

SIZE = 24


def small_model() -> Model:
    """Random weights; the classes of the drawn data sets."""
    images = np.stack([drawn.draw("train", i, SIZE)[0] for i in range(4)])
    build = FloatBuilder(images / 127.5 - 1)
    x = build.relu("relu1", build.norm("norm1", build.conv("conv1", "input", 8, 3, 2)))
    x = build.relu("relu2", build.separable("sep", x, 16))
    build.linear("classifier", build.mean("mean", x), len(drawn.LABELS))
    return Model(single(build.graph()), InputSpec(SIZE, SIZE), tuple(drawn.LABELS), {"weights": "random"})


def write_small_bundle(folder: Path, target: str = "host", backends: tuple[str, ...] = ("tvm", "tflite")) -> Bundle:
    images = (drawn.draw("calibration", i, SIZE)[0] for i in range(4))
    recipe = QuantRecipe("small", equalize=False)
    network = quantize_model(small_model(), images, recipe, image_count=4, progress=lambda what, share: None)
    manifest, files = build_bundle_files(network, catalog.get(target), backends, (), lambda what, share: None)
    return write_bundle(folder, manifest, files)
