"""From an image file to the network's input, as torchvision and Keras do it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from xceptile.models.preprocess import (
    ImageError,
    InputSpec,
    keras_input_spec,
    load_image,
    normalize,
    timm_input_spec,
)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 61, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_the_published_specs() -> None:
    """timm: crop fraction 0.8975 of 299, which its model's source gives as a resize of 333."""
    spec = timm_input_spec()
    assert (spec.resize, spec.height, spec.width, spec.interpolation) == (333, 299, 299, "bicubic")
    assert keras_input_spec().shape == (1, 299, 299, 3)


def test_normalize_is_keras_preprocess_input() -> None:
    pixels = np.arange(256, dtype=np.uint8)[:, None].repeat(3, axis=1)
    for spec in (keras_input_spec(), timm_input_spec()):
        x = normalize(pixels, spec)
        assert x.dtype == np.float32
        assert np.allclose(x, pixels / 127.5 - 1, atol=1e-6)
        assert (x[0, 0], x[255, 2]) == (-1.0, 1.0)


def test_normalize_is_per_channel() -> None:
    spec = InputSpec(1, 1, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    pixels = np.array([[[10, 20, 30]]], np.uint8)
    expected = [(10 / 255 - 0.485) / 0.229, (20 / 255 - 0.456) / 0.224, (30 / 255 - 0.406) / 0.225]
    assert np.allclose(normalize(pixels, spec), [[expected]], atol=1e-6)


def test_squash(photo: Path) -> None:
    with Image.open(photo) as image:
        expected = np.asarray(image.resize((16, 24), Image.Resampling.BILINEAR))
    assert np.array_equal(load_image(photo, InputSpec(24, 16)), expected)


@pytest.mark.parametrize("transposed", [False, True])
def test_resize_of_the_shorter_side_and_centre_crop(photo: Path, transposed: bool) -> None:
    """40x61 with the shorter side at 30 is 30x45 (45.75 truncated); 24 columns of 45 begin at round(10.5) = 10."""
    with Image.open(photo) as image:
        source = image.transpose(Image.Transpose.TRANSPOSE) if transposed else image.copy()
    source.save(photo)
    box = (3, 10, 27, 34) if transposed else (10, 3, 34, 27)
    expected = source.resize((30, 45) if transposed else (45, 30), Image.Resampling.BICUBIC).crop(box)
    spec = InputSpec(24, 24, resize=30, interpolation="bicubic")
    assert np.array_equal(load_image(photo, spec), np.asarray(expected))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_mode_becomes_rgb(mode: str, photo: Path, tmp_path: Path) -> None:
    path = tmp_path / f"other.{'tiff' if mode == 'CMYK' else 'png'}"
    with Image.open(photo) as image:
        (image.convert("L") if mode == "LA" else image).convert(mode).save(path)
    pixels = load_image(path, InputSpec(20, 20))
    assert (pixels.shape, pixels.dtype) == ((20, 20, 3), np.uint8)


@pytest.mark.parametrize(("name", "type_"), [("a.png", np.uint16), ("a.tiff", np.uint16), ("b.tiff", np.float32)])
def test_more_than_8_bits_are_refused_not_clipped(name: str, type_: type, tmp_path: Path) -> None:
    Image.fromarray(np.full((20, 20), 500, type_)).save(tmp_path / name)
    with pytest.raises(ImageError, match="grey with more than 8 bits"):
        load_image(tmp_path / name, InputSpec(20, 20))


def test_files_that_are_no_images(photo: Path, tmp_path: Path) -> None:
    whole = photo.read_bytes()
    for name, contents in {"empty.png": b"", "cut.png": whole[: len(whole) // 2], "text.jpg": b"hello"}.items():
        (tmp_path / name).write_bytes(contents)
    for name in ("empty.png", "cut.png", "text.jpg", "missing.jpg"):
        with pytest.raises(
            ImageError, match=rf"{name}: cannot be read as an image .*; replace or remove the file"
        ) as caught:
            load_image(tmp_path / name, InputSpec(20, 20))
        assert caught.value.path == str(tmp_path / name)


def test_json() -> None:
    for spec in (
        timm_input_spec(),
        keras_input_spec(71),
        InputSpec(3, 4, (0.1, 0.2, 0.3), (1.0, 2.0, 3.0), 9, "nearest"),
    ):
        assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


@pytest.mark.parametrize(
    "changes",
    [{"height": None}, {"mean": [1, 2]}, {"std": "abc"}, {"resize": "x"}, {"extra": 1}, {"interpolation": "cubic"}],
)
def test_json_that_is_no_spec(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011  # each kind has its own message
        InputSpec.from_json(keras_input_spec().to_json() | changes)
    values = keras_input_spec().to_json()
    del values["std"]
    with pytest.raises(ValueError, match="not an input spec: std missing"):
        InputSpec.from_json(values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"height": 0}, "0x10 pixels is empty"),
        ({"resize": 9}, "resize=9 is smaller than the 10x10"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"mean": (float("nan"), 0.0, 0.0)}, "three finite numbers"),
    ],
)
def test_specs_that_mean_nothing(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InputSpec(**{"height": 10, "width": 10} | changes)
