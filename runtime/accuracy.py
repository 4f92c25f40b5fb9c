"""Accuracy of a bundle's engines, image by image: against labels, the float network and the integer reference.

An image's result does not depend on the images beside it, and what is summed over images is summed exactly
(``math.fsum``) in the images' order: whoever computes which images, and in what order, the figures are the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engines.engine import Array

TOP = 5


@dataclass(frozen=True)
class Labelled:
    """One image ready for the network: where it came from, its class index where known, its pixels (H, W, C)."""

    name: str
    label: int | None
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Flip:
    """An image whose predicted class int8 changed; ``margin`` is float's lead of its own choice, in logits."""

    image: str
    label: str | None
    float_class: str
    int8_class: str
    margin: float


@dataclass(frozen=True)
class Accuracy:
    """One engine's predictions on a set of images.

    The counts are of images; ``top1``-like shares are properties so that nothing is rounded away in a report.
    ``labelled`` is 0 where the images bear no labels, or the network has one output: then nothing is said of classes
    (no flips, no agreement, no ``correct``), and ``sqnr_db``, the distance of the outputs, is all there is. Which of
    several numbers is the largest need not mean anything, and of one it always is. ``differing_values`` counts outputs
    unlike the reference's, of ``compared_values``. ``correct`` has a character for each labelled image, in order: 1
    where int8 was right, else 0; with it two runs over the same images are compared image by image. ``allowed_steps``
    is 0 where every output must equal the reference's; a mixed network's, some of whose layers compute in float, may
    differ by so many steps.
    """

    engine: str
    device: str
    obtained: str
    images: int
    labelled: int
    int8_correct: int
    float_correct: int
    int8_correct_top5: int
    float_correct_top5: int
    int8_only_correct: int
    float_only_correct: int
    agreeing: int
    compared_values: int
    differing_values: int
    largest_difference_steps: int
    sqnr_db: float
    flips: tuple[Flip, ...]
    correct: str = ""
    allowed_steps: int = 0

    @property
    def keeps_contract(self) -> bool:
        """Whether the outputs are as near the reference's as they have to be."""
        return self.compared_values > 0 and self.largest_difference_steps <= self.allowed_steps

    @property
    def bit_exact(self) -> bool:
        return self.compared_values > 0 and self.differing_values == 0

    @property
    def top1(self) -> float:
        return self.int8_correct / self.labelled if self.labelled else math.nan

    @property
    def float_top1(self) -> float:
        return self.float_correct / self.labelled if self.labelled else math.nan

    @property
    def agreement(self) -> float:
        return self.agreeing / self.labelled if self.labelled else math.nan

    @property
    def outputs(self) -> int:
        """How many numbers the network gives for an image."""
        return self.compared_values // self.images if self.images else 0


@dataclass(frozen=True)
class Seen:
    """What one engine made of one image.

    ``top`` are its likeliest classes, best first (ties: the lower index first); ``margin`` is float's lead of its own
    choice over the engine's, in logits; ``noise`` the sum of squared errors of the logits; ``differing`` counts outputs
    unlike the reference's, ``largest`` the largest difference in steps.
    """

    device: str
    obtained: str
    top: tuple[int, ...]
    margin: float
    noise: float
    differing: int
    largest: int


@dataclass(frozen=True)
class ImageResult:
    """One image: its place in the data set, the float network's likeliest classes and sum of squared logits, and the
    engines that ran it by name. ``sha256`` is of its label and pixels; ``values`` is the number of outputs.
    """

    index: int
    name: str
    label: int | None
    sha256: str
    float_top: tuple[int, ...]
    signal: float
    values: int
    engines: Mapping[str, Seen]


def image_sha256(image: Labelled) -> str:
    """Of an image's label and pixels."""
    digest = hashlib.sha256(f"{image.label}\0".encode())
    digest.update(np.ascontiguousarray(image.pixels).tobytes())
    return digest.hexdigest()


def data_sha256(results: Iterable[ImageResult]) -> str:
    """Of a whole data set, in order."""
    return _sha256_of(result.sha256 for result in results)


def images_sha256(images: Iterable[Labelled]) -> str:
    """The same, before anything was run on them."""
    return _sha256_of(map(image_sha256, images))


def _sha256_of(digests: Iterable[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def sqnr_db(signal: Array, approximation: Array) -> float:
    """Signal to quantization noise ratio, 10 log10(sum s^2 / sum (s - a)^2); infinite where they are equal."""
    s, a = signal.astype(np.float64), approximation.astype(np.float64)
    noise = float(((s - a) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(float((s**2).sum()), 1e-300) / noise)


def likeliest(logits: NDArray[Any]) -> tuple[int, ...]:
    """Of (classes,) logits, the ``TOP`` largest, best first; ties go to the lower index."""
    return tuple(int(i) for i in np.argsort(-logits.astype(np.float64), kind="stable")[:TOP])


def judge_image(
    float_logits: NDArray[np.float32],
    logits: NDArray[np.int8],
    expected: NDArray[np.int8],
    *,
    scale: float,
    zero_point: int,
    device: str,
    obtained: str,
) -> Seen:
    """One engine's int8 ``logits`` (classes,) for one image, against float's and the integer reference's."""
    top, best = likeliest(logits), int(float_logits.argmax())
    real = (logits.astype(np.float64) - zero_point) * scale
    difference = np.abs(logits.astype(np.int32) - expected.astype(np.int32))
    return Seen(
        device=device,
        obtained=obtained,
        top=top,
        margin=float(float_logits[best] - float_logits[top[0]]),
        noise=math.fsum(((float_logits.astype(np.float64) - real) ** 2).tolist()),
        differing=int((difference != 0).sum()),
        largest=int(difference.max(initial=0)),
    )


def signal_power(logits: NDArray[np.float32]) -> float:
    """The sum of squares of (classes,) logits."""
    return math.fsum((logits.astype(np.float64) ** 2).tolist())


def summarize(results: Sequence[ImageResult], engine: str, classes: Sequence[str], allowed_steps: int = 0) -> Accuracy:
    """The figures of one engine (``ImageResult.engines``' key) over those images that it ran, in the images' order."""
    ran = [(r, r.engines[engine]) for r in sorted(results, key=lambda r: r.index) if engine in r.engines]
    labelled = [(r, s) for r, s in ran if r.label is not None and r.values > 1]
    int8_right = [s.top[0] == r.label for r, s in labelled]
    float_right = [r.float_top[0] == r.label for r, _ in labelled]
    flips = tuple(
        Flip(
            r.name,
            None if r.label is None else classes[r.label],
            classes[r.float_top[0]],
            classes[s.top[0]],
            s.margin,
        )
        for r, s in labelled
        if s.top[0] != r.float_top[0]
    )
    signal, noise = math.fsum(r.signal for r, _ in ran), math.fsum(s.noise for _, s in ran)
    return Accuracy(
        engine=engine.partition("#")[0],
        device=ran[0][1].device if ran else "",
        obtained=ran[0][1].obtained if ran else "",
        images=len(ran),
        labelled=len(labelled),
        int8_correct=sum(int8_right),
        float_correct=sum(float_right),
        int8_correct_top5=sum(r.label in s.top for r, s in labelled),
        float_correct_top5=sum(r.label in r.float_top for r, _ in labelled),
        int8_only_correct=sum(a and not b for a, b in zip(int8_right, float_right, strict=True)),
        float_only_correct=sum(b and not a for a, b in zip(int8_right, float_right, strict=True)),
        agreeing=len(labelled) - len(flips),
        compared_values=sum(r.values for r, _ in ran),
        differing_values=sum(s.differing for _, s in ran),
        largest_difference_steps=max((s.largest for _, s in ran), default=0),
        sqnr_db=math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise),
        flips=flips,
        correct="".join("1" if right else "0" for right in int8_right),
        allowed_steps=allowed_steps,
    )


def result_to_json(result: ImageResult) -> dict[str, Any]:
    """Plain JSON values, the inverse of ``result_from_json``; floats survive exactly."""
    return asdict(result)


def result_from_json(values: Mapping[str, Any]) -> ImageResult:
    """Raises KeyError or TypeError for anything but ``result_to_json``'s values."""
    engines = {
        str(name): Seen(**{**seen, "top": tuple(map(int, seen["top"]))}) for name, seen in values["engines"].items()
    }
    return ImageResult(**{**values, "float_top": tuple(map(int, values["float_top"])), "engines": engines})
