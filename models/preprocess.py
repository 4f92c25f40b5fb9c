"""From an image file to the network's input, written once for calibration, accuracy and the device.

Geometry is torchvision's (``Resize`` of the shorter side, then ``CenterCrop``), so that timm's published accuracy is
reproduced; ``resize=None`` squashes the whole image to the input size, as ``keras.utils.load_img`` does. Rotation
flags in EXIF are ignored, as both do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

# What Pillow decodes within this process, by its names, and the endings of such files. Nothing else is opened: Pillow
# goes by what a file holds, not by its name, and starts Ghostscript on EPS.
FORMATS = {
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "PPM": (".ppm", ".pgm"),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
}
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")  # names of Pillow's filters, in lower case

RGB = tuple[float, float, float]


class ImageError(ValueError):
    """An image that cannot be read. ``path`` is the file."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the network's input.

    ``height`` and ``width`` are the network's, in pixels. ``mean`` and ``std`` are per channel (R, G, B) in units of
    pixel / 255. ``resize`` is the length in pixels to which the shorter side is scaled before the centre
    (height, width) is cut out, or None to scale the whole image to (height, width) whatever its proportions.
    Raises ValueError for values that mean nothing.
    """

    height: int
    width: int
    mean: RGB = (0.5, 0.5, 0.5)
    std: RGB = (0.5, 0.5, 0.5)
    resize: int | None = None
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an input of {self.height}x{self.width} pixels is empty")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ValueError(
                f"resize={self.resize} is smaller than the {self.height}x{self.width} that is cut out of the result"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if len(self.mean) != 3 or len(self.std) != 3 or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError(f"mean and std are three finite numbers each, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The network's input for one image, NHWC."""
        return (1, self.height, self.width, 3)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of ``from_json``."""
        return {
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputSpec:
        """Raises ValueError for a missing or unknown key or a value of another type."""
        known = [f.name for f in fields(cls)]
        if wrong := sorted(set(values) ^ set(known)):
            raise ValueError(f"not an input spec: {', '.join(wrong)} missing or unknown; it has {', '.join(known)}")
        return cls(
            height=_whole("height", values["height"]),
            width=_whole("width", values["width"]),
            mean=_rgb("mean", values["mean"]),
            std=_rgb("std", values["std"]),
            resize=None if values["resize"] is None else _whole("resize", values["resize"]),
            interpolation=values["interpolation"],
        )


def _whole(name: str, value: Any) -> int:
    if type(value) is not int:  # a bool is none
        raise ValueError(f"{name} is a whole number of pixels, got {value!r}")
    return value


def _rgb(name: str, values: Any) -> RGB:
    if not isinstance(values, list) or len(values) != 3 or not all(type(v) in (int, float) for v in values):
        raise ValueError(f"{name} is a list of three numbers, got {values!r}")
    red, green, blue = map(float, values)
    return red, green, blue


def timm_input_spec(size: int = 299) -> InputSpec:
    """timm's for ``legacy_xception``: bicubic, crop fraction 0.8975, [-1, 1].

    Source: https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/xception.py (``default_cfgs``);
    the shorter side is floor(size / fraction), as in timm/data/transforms_factory.py.
    """
    return InputSpec(size, size, resize=math.floor(size / 0.8975), interpolation="bicubic")


def keras_input_spec(size: int = 299) -> InputSpec:
    """Keras': ``preprocess_input`` is x / 127.5 - 1, which is mean and std 0.5; ``load_img(target_size=...)`` squashes.

    Bilinear rather than ``load_img``'s nearest, which drops most pixels of a photograph.
    """
    return InputSpec(size, size)


def load_image(path: str | Path, spec: InputSpec) -> NDArray[np.uint8]:
    """Pixels (height, width, 3), RGB, 0..255; transparency is dropped, of an animation the first picture is taken.

    Raises ImageError for a file that holds none of ``FORMATS``, is truncated or missing, or grey with more than 8 bits,
    which Pillow would clip: nothing says how such values become pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            if image.mode == "F" or image.mode.startswith("I"):
                raise ValueError(f"it is grey with more than 8 bits, mode {image.mode}; convert it to 8")
            rgb = image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path}: cannot be read as an image (it holds none of {', '.join(FORMATS)}); replace or remove the file",
            str(path),
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageError(
            f"{path}: cannot be read as an image ({error}); replace or remove the file", str(path)
        ) from error
    filter_ = Image.Resampling[spec.interpolation.upper()]
    if spec.resize is None:
        resized = rgb.resize((spec.width, spec.height), filter_)
        return np.asarray(resized, np.uint8)
    scaled = rgb.resize(_shorter_side_to(spec.resize, rgb.size), filter_)
    # torchvision's center_crop: the offset is half the difference, rounded half to even.
    left, top = round((scaled.width - spec.width) / 2), round((scaled.height - spec.height) / 2)
    return np.asarray(scaled.crop((left, top, left + spec.width, top + spec.height)), np.uint8)


def _shorter_side_to(length: int, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the shorter side at ``length`` and the longer one truncated, as torchvision's Resize."""
    width, height = size
    if width <= height:
        return length, int(length * height / width)
    return int(length * width / height), length


def normalize(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """(pixels / 255 - mean) / std over the last axis: (..., 3) uint8 -> (..., 3) float32."""
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    scaled = pixels.astype(np.float32) / np.float32(255)
    return np.asarray((scaled - mean) / std, np.float32)
