"""From an image file to the network's input, written once for calibration, accuracy and the device.

Geometry is torchvision's (``Resize`` of the shorter side, then ``CenterCrop``), so that timm's published accuracy is
reproduced; ``resize=None`` squashes the whole image to the input size, as ``keras.utils.load_img`` does. Rotation
flags in EXIF are ignored, as both do.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .read_file import check_file

if TYPE_CHECKING:
    from PIL.ImageFile import ImageFile

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
MAX_SCALING_BYTES = 1 << 30  # of memory while one image is scaled; Pillow opens none of more than 0.7 GB
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos")  # names of Pillow's filters, in lower case

ORIGINS = ("file", "given", "assumed")  # the model's file says it, the user does, or nobody
FACTS = ("size", "mean", "std", "resize", "interpolation")  # what has an origin

Channels = tuple[float, ...]  # a figure per channel: red, green, blue, or grey alone


class ImageError(ValueError):
    """An image that cannot be read. ``path`` is the file."""

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True)
class InputSpec:
    """How an image becomes the network's input.

    ``height`` and ``width`` are the network's, in pixels. ``mean`` and ``std`` are per channel (R, G, B; one number
    each where the network takes grey images) in units of pixel / 255. ``resize`` is the length in pixels to which the
    shorter side is scaled before the centre (height, width) is cut out, or None to scale the whole image to
    (height, width) whatever its proportions. ``origins`` says of each of ``FACTS``, where that is known, which of
    ``ORIGINS`` it has; two specs that make the same of an image are equal whatever their origins.
    Raises ValueError for values that mean nothing.
    """

    height: int
    width: int
    mean: Channels = (0.5, 0.5, 0.5)
    std: Channels = (0.5, 0.5, 0.5)
    resize: int | None = None
    interpolation: str = "bilinear"
    origins: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise ValueError(f"an input of {self.height}x{self.width} pixels is empty")
        if self.resize is not None and self.resize < max(self.height, self.width):
            raise ValueError(
                f"resize={self.resize} is smaller than the {self.height}x{self.width} that is cut out of the result"
            )
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is one of {', '.join(INTERPOLATIONS)}, got {self.interpolation!r}")
        if len(self.mean) not in (1, 3) or not all(map(math.isfinite, (*self.mean, *self.std))):
            raise ValueError(f"mean and std are three finite numbers each, or one, got {self.mean} and {self.std}")
        if len(self.mean) != len(self.std):
            raise ValueError(f"mean and std are of the same channels, got {self.mean} and {self.std}")
        if min(self.std) <= 0:
            raise ValueError(f"std must be positive, got {self.std}")
        if set(self.origins) - set(FACTS) or set(self.origins.values()) - set(ORIGINS):
            raise ValueError(f"origins say {', '.join(ORIGINS)} of {', '.join(FACTS)}, got {dict(self.origins)}")

    @property
    def channels(self) -> int:
        """3, or 1 where the network takes grey images."""
        return len(self.mean)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """The network's input for one image, NHWC."""
        return (1, self.height, self.width, self.channels)

    def with_origin(self, origin: str, *facts: str) -> InputSpec:
        """The spec with this origin of some of ``FACTS``; of all of them where none is named."""
        return replace(self, origins={**self.origins, **dict.fromkeys(facts or FACTS, origin)})

    def described(self) -> dict[str, str]:
        """Each of ``FACTS`` for people to read, with its origin."""
        values = {
            "size": f"{self.height}x{self.width} {'grey' if self.channels == 1 else 'RGB'}",
            "mean": _figures(self.mean),
            "std": _figures(self.std),
            "resize": "the whole image to that size" if self.resize is None else f"shorter side to {self.resize}, crop",
            "interpolation": self.interpolation,
        }
        phrases = {"file": "from the file", "given": "as given", "assumed": "assumed"}
        origins = {fact: f" ({phrases[origin]})" for fact, origin in self.origins.items()}
        if self.origins.get("size") == "assumed":
            origins["size"] = " (assumed; --input-size N gives another)"
        return {fact: value + origins.get(fact, "") for fact, value in values.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, the inverse of ``from_json``."""
        origins = {"origins": dict(self.origins)} if self.origins else {}
        return {
            "height": self.height,
            "width": self.width,
            "mean": list(self.mean),
            "std": list(self.std),
            "resize": self.resize,
            "interpolation": self.interpolation,
            **origins,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> InputSpec:
        """Raises ValueError for a missing or unknown key or a value of another type; ``origins`` may be missing."""
        known = [f.name for f in fields(cls)]
        if wrong := sorted((set(values) | {"origins"}) ^ set(known)):
            raise ValueError(f"not an input spec: {', '.join(wrong)} missing or unknown; it has {', '.join(known)}")
        return cls(
            height=_whole("height", values["height"]),
            width=_whole("width", values["width"]),
            mean=_per_channel("mean", values["mean"]),
            std=_per_channel("std", values["std"]),
            resize=None if values["resize"] is None else _whole("resize", values["resize"]),
            interpolation=values["interpolation"],
            origins=_texts("origins", values.get("origins", {})),
        )


def _whole(name: str, value: Any) -> int:
    if type(value) is not int:  # a bool is none
        raise ValueError(f"{name} is a whole number of pixels, got {value!r}")
    return value


def _per_channel(name: str, values: Any) -> Channels:
    if not isinstance(values, list) or len(values) not in (1, 3) or not all(type(v) in (int, float) for v in values):
        raise ValueError(f"{name} is a list of three numbers, or of one for grey images, got {values!r}")
    return tuple(map(float, values))


def _texts(name: str, values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(each, str) for item in values.items() for each in item):
        raise ValueError(f"{name} is an object of texts, got {values!r}")
    return values


def _figures(values: Channels) -> str:
    """Once where all channels have the same."""
    return ", ".join(f"{value:.6g}" for value in (values[:1] if len(set(values)) == 1 else values))


def timm_input_spec(size: int = 299) -> InputSpec:
    """timm's for ``legacy_xception``: bicubic, crop fraction 0.8975, [-1, 1].

    Source: https://github.com/huggingface/pytorch-image-models/blob/main/timm/models/xception.py (``default_cfgs``);
    the shorter side is floor(size / fraction), as in timm/data/transforms_factory.py. All of it is assumed of a file.
    """
    return InputSpec(size, size, resize=math.floor(size / 0.8975), interpolation="bicubic").with_origin("assumed")


def keras_input_spec(size: int = 299) -> InputSpec:
    """Keras': ``preprocess_input`` is x / 127.5 - 1, which is mean and std 0.5; ``load_img(target_size=...)`` squashes.

    Bilinear rather than ``load_img``'s nearest, which drops most pixels of a photograph. Assumed of a file, all of it.
    """
    return InputSpec(size, size).with_origin("assumed")


def load_image(path: str | Path, spec: InputSpec) -> NDArray[np.uint8]:
    """Pixels (height, width, channels), 0..255: RGB, or grey as Pillow weights the colours.

    Transparency is dropped, of an animation the first picture is taken, of colours with 16 bits the upper 8. What
    Pillow warns of is a warning with the file's name.

    Raises ImageError for a file that holds none of ``FORMATS``, is truncated or missing, so long and narrow that
    scaling it takes more than ``MAX_SCALING_BYTES``, or grey with more than 8 bits, alpha or not, which Pillow would
    clip: nothing says how such values become pixels.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        check_file(path)
        with _warnings_of(path), Image.open(path, formats=tuple(FORMATS)) as image:
            _refuse_deep_grey(image)
            size = (spec.width, spec.height) if spec.resize is None else _shorter_side_to(spec.resize, image.size)
            _refuse_to_scale_far(image.size, size)
            whole = image.convert("RGB" if spec.channels == 3 else "L")
    except UnidentifiedImageError as error:
        raise ImageError(
            f"{path}: cannot be read as an image (it holds none of {', '.join(FORMATS)}); replace or remove the file",
            str(path),
        ) from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageError(
            f"{path}: cannot be read as an image ({reason}); replace or remove the file", str(path)
        ) from error
    scaled = whole.resize(size, Image.Resampling[spec.interpolation.upper()])
    # torchvision's center_crop: the offset is half the difference, rounded half to even.
    left, top = round((scaled.width - spec.width) / 2), round((scaled.height - spec.height) / 2)
    cut = scaled.crop((left, top, left + spec.width, top + spec.height))
    return np.asarray(cut, np.uint8).reshape(spec.shape[1:])


@contextmanager
def _warnings_of(path: str | Path) -> Iterator[None]:
    said: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            yield
    finally:
        for each in said:
            warnings.warn(f"{path}: {each.message}", each.category, stacklevel=2)


def _refuse_deep_grey(image: ImageFile) -> None:
    # Grey with alpha becomes RGBA of 8 bits in Pillow: only its decoder's raw mode, such as LA;16B, tells.
    raw = [word for tile in image.tile for word in (tile[3] if isinstance(tile[3], tuple) else (tile[3],))]
    deep = image.mode == "F" or image.mode.startswith("I")
    if deep or any(isinstance(word, str) and word.startswith(("L;16", "LA;16")) for word in raw):
        raise ValueError(f"it is grey with more than 8 bits, mode {image.mode if deep else 'LA'}; convert it to 8")


def _refuse_to_scale_far(size: tuple[int, int], scaled: tuple[int, int]) -> None:
    """Pillow scales rows, then columns, in four bytes a pixel, by up to seven weights of eight bytes (src/libImaging/
    Resample.c) for each pixel of a side.
    """
    (width, height), (new_width, new_height) = size, scaled
    weights = max(width, new_width) + max(height, new_height)
    needed = 4 * new_width * max(height, new_height) + 7 * 8 * weights
    if needed > MAX_SCALING_BYTES:
        raise ValueError(
            f"it is {width}x{height} pixels, and scaling it to {new_width}x{new_height} takes {needed / 1e9:.1f} GB; "
            "crop it"
        )


def _shorter_side_to(length: int, size: tuple[int, int]) -> tuple[int, int]:
    """(width, height) with the shorter side at ``length`` and the longer one truncated, as torchvision's Resize."""
    width, height = size
    if width <= height:
        return length, int(length * height / width)
    return int(length * width / height), length


def grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(..., 3) RGB -> (..., 1) as Pillow makes "L" of it (Convert.c, L24): ITU-R 601 weights in 16 bits, rounded."""
    weighted = pixels.astype(np.uint32) @ np.array([19595, 38470, 7471], np.uint32)
    return ((weighted + 0x8000) >> 16).astype(np.uint8)[..., None]


@dataclass(frozen=True)
class PixelEncoding:
    """How 8-bit pixels enter an int8 network: p - 128, or by ``table``, (256, C), where preprocessing could not be
    folded into the network's first layer."""

    table: tuple[tuple[int, ...], ...] | None

    def __post_init__(self) -> None:
        rows = self.table or ()
        if self.table is not None and (len(rows) != 256 or not rows[0] or len({len(row) for row in rows}) != 1):
            raise ValueError("the table of pixels must have 256 rows of equal length")
        if not all(-128 <= value <= 127 for row in rows for value in row):
            raise ValueError("the table of pixels holds a value that is not an int8")

    @property
    def folded(self) -> bool:
        """Whether the network takes pixel values as they are, preprocessing being in its first layer."""
        return self.table is None

    def encode(self, pixels: NDArray[np.uint8]) -> NDArray[np.int8]:
        """uint8 pixels (..., C) -> the network's int8 input of the same shape.

        Raises TypeError for another element type, ValueError for other channels than the table's.
        """
        if pixels.dtype != np.uint8:
            raise TypeError(f"pixels are uint8, 0 to 255, as an image file has them, got {pixels.dtype}")
        if self.table is not None and pixels.shape[-1:] != (len(self.table[0]),):
            raise ValueError(f"the network takes pixels of {len(self.table[0])} channels, got {pixels.shape}")
        if self.table is None:
            return (pixels ^ np.uint8(0x80)).view(np.int8)
        columns = np.asarray(self.table, np.int8)
        encoded: NDArray[np.int8] = columns[pixels, np.arange(pixels.shape[-1])]
        return encoded

    def to_bytes(self) -> bytes:
        """The table as a plan holds it: 256 values for each channel; nothing where there is none."""
        return b"" if self.table is None else np.asarray(self.table, np.int8).T.tobytes()


def normalize(pixels: NDArray[np.uint8], spec: InputSpec) -> NDArray[np.float32]:
    """(pixels / 255 - mean) / std over the last axis: (..., channels) uint8 -> (..., channels) float32."""
    mean, std = np.asarray(spec.mean, np.float32), np.asarray(spec.std, np.float32)
    scaled = pixels.astype(np.float32) / np.float32(255)
    return np.asarray((scaled - mean) / std, np.float32)
