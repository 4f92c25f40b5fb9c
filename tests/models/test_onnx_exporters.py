"""One network as each exporter and converter writes it, from the image file to the answer: what ONNX Runtime says.

The files are those that ``support/make_onnx_files.py`` made with the packages themselves.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image
from support.float_graphs import drawn_images
from support.make_onnx_files import SIZE
from support.needs import requires_module

from xceptile.compile.passes.pipeline import FLOAT_PASSES, run_passes
from xceptile.models import graph as ir
from xceptile.models import zoo
from xceptile.models.preprocess import load_image, normalize
from xceptile.models.verify import verify
from xceptile.runtime import reference

needs_onnxruntime = requires_module("onnxruntime", package="onnxruntime")
FILES = Path(__file__).parent / "onnx_files"
TOLERANCE = 1e-4  # relative to the largest output
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIGNED = ((0.5,) * 3, (0.5,) * 3)

# Of each file: the pixels' range as it takes them, and the preprocessing that the import makes of what it says.
KINDS: dict[str, tuple[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "torchscript": ("0 to 1", IMAGENET),
    "torchscript-unfolded": ("-1 to 1", SIGNED),
    "torch-dynamo": ("0 to 1", IMAGENET),
    "torch-dynamo-unoptimized": ("-1 to 1", SIGNED),
    "keras-export": ("0 to 255", SIGNED),
    "tf2onnx-nchw": ("0 to 255", SIGNED),
    "onnxsim": ("0 to 1", IMAGENET),
    "onnxslim": ("-1 to 1", SIGNED),
    "float16-converter": ("0 to 1", IMAGENET),
}


def test_every_file_is_tried() -> None:
    assert {path.stem for path in FILES.iterdir()} == KINDS.keys()


def answer(path: Path, image: Path, pixels: str) -> np.ndarray:
    """Of ONNX Runtime, for an image that Pillow squashes to the network's size."""
    import onnxruntime

    with Image.open(image) as opened:
        squashed = opened.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    x = np.asarray(squashed, np.float32)
    x = {"0 to 255": x, "0 to 1": x / 255, "-1 to 1": x / np.float32(127.5) - 1}[pixels][np.newaxis]
    session = onnxruntime.InferenceSession(path)
    (taken,) = session.get_inputs()
    x = x if taken.shape[3] == 3 else x.transpose(0, 3, 1, 2)
    batch = taken.shape[0] if isinstance(taken.shape[0], int) else 1
    result: np.ndarray = session.run(None, {taken.name: x.repeat(batch, 0)})[0][:1]
    return result


@needs_onnxruntime
@pytest.mark.parametrize("name", KINDS)
def test_what_an_exporter_writes_is_what_it_computes(name: str, tmp_path: Path) -> None:
    pixels, (mean, std) = KINDS[name]
    network = zoo.load(FILES / f"{name}.onnx")
    verify(network.graph)
    spec = network.input_spec
    assert np.allclose(spec.mean, mean, atol=1e-3 if name == "float16-converter" else 0)
    assert np.allclose(spec.std, std, atol=1e-3 if name == "float16-converter" else 0)
    assert spec.origins["mean"] == ("assumed" if pixels == "-1 to 1" else "file")
    assert network.provenance.get("assumed", "") == (
        "" if pixels == "-1 to 1" else f"the file's own scaling takes pixels from {pixels}"
    )
    assert network.graph.inputs[0].type.shape == (1, SIZE, SIZE, 3)
    image = tmp_path / "image.png"
    Image.fromarray(drawn_images(1, 150, seed=3)[0]).save(image)
    (ours,) = reference.run(network.graph, normalize(load_image(image, spec)[np.newaxis], spec))
    if "left out" in network.provenance:
        ours = np.exp(ours) / np.exp(ours).sum()
    theirs = answer(FILES / f"{name}.onnx", image, pixels)
    assert np.abs(theirs).max() > 0.1
    assert np.abs(ours - theirs).max() < TOLERANCE * np.abs(theirs).max()


@pytest.mark.parametrize("name", KINDS)
def test_what_was_not_folded_folds(name: str) -> None:
    """Neither a transposition nor a normalization is left over."""
    graph = run_passes(zoo.load(FILES / f"{name}.onnx").graph, FLOAT_PASSES, verify)
    counts = {kind: sum(isinstance(node.op, kind) for node in graph.nodes) for kind in (ir.Conv2d, ir.DepthwiseConv2d)}
    assert counts == {ir.Conv2d: 4, ir.DepthwiseConv2d: 2}
    assert len(graph.nodes) == 11  # with input, pooling, ReLU, addition, mean, linear layer


def test_a_scaling_that_is_not_understood_names_the_file(tmp_path: Path) -> None:
    model = onnx.load(FILES / "keras-export.onnx")
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and np.allclose(onnx.numpy_helper.to_array(tensor), 1 / 127.5):
            tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.FLOAT, tensor.dims, [1e-9]))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(zoo.ModelError, match=r"net\.onnx: scales its image .* is not to be seen; export it without"):
        zoo.load(tmp_path / "net.onnx")
