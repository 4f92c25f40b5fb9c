"""The drawn image set: 24 classes of shapes, drawn from (split, index) alone, so nobody downloads or licenses anything.

Every pixel comes from additions, multiplications, divisions, square roots, minima and roundings, which IEEE 754 fixes
to the bit, and from numpy's PCG64; sines, whose last bit differs between libraries, are rounded to 2**-16 first. The
images are therefore the same bytes under every numpy and on every processor (tests/models/test_drawn.py pins their
hashes).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

SPLITS = ("train", "calibration", "val")
COUNTS = {"train": 30000, "calibration": 512, "val": 2000}  # images of a split where nobody says how many
LABELS = (
    "triangle",
    "square",
    "pentagon",
    "hexagon",
    "disk",
    "four-pointed star",
    "five-pointed star",
    "six-pointed star",
    "gear",
    "cross",
    "arrow",
    "heart",
    "crescent",
    "horseshoe",
    "lightning bolt",
    "house",
    "letter E",
    "letter F",
    "letter H",
    "tetromino S",
    "tetromino Z",
    "tetromino L",
    "tetromino J",
    "tetromino T",
)

Floats = NDArray[np.float32]
Point = tuple[float, float]
Colour = tuple[float, float, float]

# Outlines in a square of about [-1, 1]; x to the right, y down. The tetrominoes come in mirrored pairs.
_FIXED: dict[str, tuple[Point, ...]] = {
    "square": ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)),
    "cross": (
        *((-0.3, -1.0), (0.3, -1.0), (0.3, -0.3), (1.0, -0.3), (1.0, 0.3), (0.3, 0.3)),
        *((0.3, 1.0), (-0.3, 1.0), (-0.3, 0.3), (-1.0, 0.3), (-1.0, -0.3), (-0.3, -0.3)),
    ),
    "arrow": ((-1.0, -0.27), (0.1, -0.27), (0.1, -0.75), (1.0, 0.0), (0.1, 0.75), (0.1, 0.27), (-1.0, 0.27)),
    "lightning bolt": (
        (0.15, -1.0),
        (-0.6, 0.15),
        (-0.05, 0.15),
        (-0.25, 1.0),
        (0.6, -0.25),
        (0.05, -0.25),
        (0.6, -1.0),
    ),
    "house": ((0.0, -1.0), (0.9, -0.2), (0.6, -0.2), (0.6, 0.9), (-0.6, 0.9), (-0.6, -0.2), (-0.9, -0.2)),
    "letter E": (
        *((-0.7, -1.0), (0.7, -1.0), (0.7, -0.6), (-0.25, -0.6), (-0.25, -0.2), (0.5, -0.2)),
        *((0.5, 0.2), (-0.25, 0.2), (-0.25, 0.6), (0.7, 0.6), (0.7, 1.0), (-0.7, 1.0)),
    ),
    "letter F": (
        *((-0.6, -1.0), (0.75, -1.0), (0.75, -0.6), (-0.15, -0.6), (-0.15, -0.15)),
        *((0.55, -0.15), (0.55, 0.25), (-0.15, 0.25), (-0.15, 1.0), (-0.6, 1.0)),
    ),
    "letter H": (
        *((-0.75, -1.0), (-0.3, -1.0), (-0.3, -0.22), (0.3, -0.22), (0.3, -1.0), (0.75, -1.0)),
        *((0.75, 1.0), (0.3, 1.0), (0.3, 0.22), (-0.3, 0.22), (-0.3, 1.0), (-0.75, 1.0)),
    ),
    "tetromino S": (
        *((-0.33, -0.67), (1.0, -0.67), (1.0, 0.0), (0.33, 0.0)),
        *((0.33, 0.67), (-1.0, 0.67), (-1.0, 0.0), (-0.33, 0.0)),
    ),
    "tetromino L": ((-0.67, -1.0), (0.0, -1.0), (0.0, 0.33), (0.67, 0.33), (0.67, 1.0), (-0.67, 1.0)),
    "tetromino T": (
        *((-1.0, -0.67), (1.0, -0.67), (1.0, 0.0), (0.33, 0.0)),
        *((0.33, 0.67), (-0.33, 0.67), (-0.33, 0.0), (-1.0, 0.0)),
    ),
}


def draw(split: str, index: int, size: int = 80) -> tuple[NDArray[np.uint8], int]:
    """Image ``index`` of a split: pixels (size, size, 3) uint8 RGB, and its label, an index into ``LABELS``.

    Labels take turns, so any run of 24 images holds each class once. Raises ValueError on an unknown split, a negative
    index or a size below 16.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r} in the drawn set; it has {', '.join(SPLITS)}")
    if index < 0 or size < 16:
        raise ValueError(f"an index of at least 0 and a size of at least 16 are wanted, got {index} and {size}")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((SPLITS.index(split), index))))
    label = index % len(LABELS)
    x, y = _grid(size)
    image, base = _background(rng, x, y)
    ink = _ink(rng, base)
    for _ in range(_integer(rng, 2, 7)):
        _scrap(rng, image, x, y, _ink(rng, base) if rng.random() < 0.7 else ink, radius=(0.04, 0.2))
    _shape(rng, image, x, y, LABELS[label], ink)
    for _ in range(_integer(rng, 0, 3)):
        _scrap(rng, image, x, y, _ink(rng, base), radius=(0.08, 0.26), spread=0.7)
    return _camera(rng, image, x, y), label


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return low + (high - low) * float(rng.random())


def _integer(rng: np.random.Generator, low: int, high: int) -> int:
    """A whole number in [low, high)."""
    return low + int(float(rng.random()) * (high - low))


def _turn(angle: float) -> Point:
    """Cosine and sine of an angle in radians, rounded to 2**-16."""
    return round(math.cos(angle) * 65536) / 65536, round(math.sin(angle) * 65536) / 65536


def _grid(size: int) -> tuple[Floats, Floats]:
    """Pixel centres, x and y (size, size), over [-1, 1]."""
    axis = (np.arange(size, dtype=np.float32) * 2.0 + (1.0 - size)) / np.float32(size)
    return np.broadcast_to(axis, (size, size)), np.broadcast_to(axis[:, None], (size, size))


def _ring(points: int, radius: float, phase: float = 0.0) -> list[Point]:
    corners = (_turn(2 * math.pi * (k + phase) / points) for k in range(points))
    return [(c * radius, s * radius) for c, s in corners]


def _interleave(outer: list[Point], inner: list[Point]) -> list[Point]:
    return [point for pair in zip(outer, inner, strict=True) for point in pair]


def _heart() -> list[Point]:
    """x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t, the usual heart curve."""
    points = []
    for k in range(22):
        t = 2 * math.pi * k / 22
        up = 13 * _turn(t)[0] - 5 * _turn(2 * t)[0] - 2 * _turn(3 * t)[0] - _turn(4 * t)[0]
        points.append((_turn(t)[1] * _turn(t)[1] * _turn(t)[1], -(up + 2.5) / 15))
    return points


def _arc(radius: float, start: float, stop: float, points: int, centre: float = 0.0) -> list[Point]:
    turns = (_turn(start + (stop - start) * k / (points - 1)) for k in range(points))
    return [(centre + c * radius, s * radius) for c, s in turns]


def _outline(rng: np.random.Generator, name: str) -> list[Point]:
    """The corners of one example of a class; proportions vary from example to example."""
    vary = _uniform(rng, 0.0, 1.0)
    if name in ("tetromino Z", "tetromino J"):
        points = [(-x, y) for x, y in _FIXED["tetromino S" if name == "tetromino Z" else "tetromino L"]]
    elif name in _FIXED:
        points = list(_FIXED[name])
    elif name in ("triangle", "pentagon", "hexagon", "disk"):
        points = _ring({"triangle": 3, "pentagon": 5, "hexagon": 6, "disk": 24}[name], 0.95)
    elif name.endswith("pointed star"):
        count = {"four": 4, "five": 5, "six": 6}[name.split("-")[0]]
        points = _interleave(_ring(count, 1.0), _ring(count, 0.42 + 0.16 * vary, 0.5))
    elif name == "gear":
        inner = 0.7 + 0.1 * vary
        tips, feet = (_ring(8, 1.0, -0.2), _ring(8, 1.0, 0.2)), (_ring(8, inner, 0.3), _ring(8, inner, 0.7))
        points = [point for four in zip(*tips, *feet, strict=True) for point in four]
    elif name == "heart":
        points = _heart()
    elif name == "crescent":
        bite = 0.35 + 0.15 * vary
        points = _arc(0.95, 0.9, 2 * math.pi - 0.9, 12, -0.1) + _arc(0.8, 2 * math.pi - 1.15, 1.15, 10, bite - 0.1)
    else:
        gap = 0.55 + 0.2 * vary
        points = _arc(0.95, gap, 2 * math.pi - gap, 13) + _arc(0.5, 2 * math.pi - gap, gap, 11)
    return [(x + _uniform(rng, -0.03, 0.03), y + _uniform(rng, -0.03, 0.03)) for x, y in points]


def _distance(points: list[Point], u: Floats, v: Floats) -> Floats:
    """Signed distance to a polygon, negative inside: https://iquilezles.org/articles/distfunctions2d (Polygon)."""
    square = np.full(u.shape, 1e9, np.float32)
    inside = np.zeros(u.shape, np.bool_)
    for (ax, ay), (bx, by) in zip(points, points[-1:] + points[:-1], strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = u - ax, v - ay
        along = np.clip((wx * ex + wy * ey) * (1.0 / (ex * ex + ey * ey)), 0.0, 1.0)
        dx, dy = wx - along * ex, wy - along * ey
        np.minimum(square, dx * dx + dy * dy, out=square)
        above = wy >= 0
        crosses = (above != (wy >= ey)) & (above == (wy * ex > wx * ey))
        inside ^= crosses
    distance = np.sqrt(square)
    return np.where(inside, -distance, distance)


def _paint(image: Floats, cover: Floats, colour: Colour) -> None:
    """Blend a colour into planes (3, size, size) where ``cover`` (size, size) says, 0 to 1."""
    for plane, value in zip(image, colour, strict=True):
        plane += cover * (value - plane)


def _texture(rng: np.random.Generator, x: Floats, y: Floats) -> Floats:
    """A pattern in 0..1: stripes, checks or smooth noise."""
    kind = _integer(rng, 0, 4)
    c, s = _turn(_uniform(rng, 0.0, 2 * math.pi))
    pitch = _uniform(rng, 1.5, 7.0)
    u, v = (x * c + y * s) * pitch, (y * c - x * s) * pitch
    if kind == 0:
        return np.asarray(np.abs(u - np.floor(u) - 0.5) * 2.0, np.float32)
    if kind == 1:
        half = (np.floor(u) + np.floor(v)) * 0.5
        return np.asarray((half - np.floor(half)) * 2.0, np.float32)
    cells = _integer(rng, 3, 12)
    lattice = rng.random((cells + 1, cells + 1), dtype=np.float32)
    position = (x[0] * 0.5 + 0.5) * float(cells)
    low = np.minimum(np.floor(position), cells - 1).astype(np.intp)
    part = position - low.astype(np.float32)
    rows = lattice[low] + part[:, None] * (lattice[low + 1] - lattice[low])
    return np.asarray(rows[:, low] + part * (rows[:, low + 1] - rows[:, low]), np.float32)


def _background(rng: np.random.Generator, x: Floats, y: Floats) -> tuple[Floats, Colour]:
    """Planes (3, size, size) of a textured ground in two near colours, and their mean."""
    base = (_uniform(rng, 0.15, 0.85), _uniform(rng, 0.15, 0.85), _uniform(rng, 0.15, 0.85))
    texture = _texture(rng, x, y) - 0.5
    planes = [value + texture * _uniform(rng, -0.17, 0.17) for value in base]
    return np.stack(planes).astype(np.float32), base


def _ink(rng: np.random.Generator, base: Colour) -> Colour:
    """A colour at some distance from ``base``, from barely visible to plain."""
    contrast = _uniform(rng, 0.2, 0.6)
    steps = [contrast * _uniform(rng, -1.0, 1.0) for _ in range(3)]
    strongest = _integer(rng, 0, 3)
    steps[strongest] = contrast if steps[strongest] >= 0 else -contrast
    r, g, b = (
        value + step if 0.0 <= value + step <= 1.0 else value - step for value, step in zip(base, steps, strict=True)
    )
    return r, g, b


def _pose(
    rng: np.random.Generator, x: Floats, y: Floats, radius: float, spread: float, tilt: float
) -> tuple[Floats, Floats]:
    """Object coordinates of every pixel under a random turn, aspect, shear and perspective."""
    c, s = _turn(_uniform(rng, 0.0, 2 * math.pi))
    aspect, shear = _uniform(rng, 1.0 - tilt, 1.0 + tilt), _uniform(rng, -tilt, tilt)
    px, py = x - _uniform(rng, -spread, spread), y - _uniform(rng, -spread, spread)
    depth = px * _uniform(rng, -tilt, tilt) + py * _uniform(rng, -tilt, tilt) + 1.0
    u, v = (px * c + py * s) / depth, (py * c - px * s) / depth
    return (u + v * shear) * (aspect / radius), v * (1.0 / (aspect * radius))


def _scrap(
    rng: np.random.Generator,
    image: Floats,
    x: Floats,
    y: Floats,
    colour: Colour,
    radius: tuple[float, float],
    spread: float = 1.0,
) -> None:
    """A small disk, bar or triangle: clutter when drawn before the shape, an occlusion when drawn after it."""
    size = _uniform(rng, *radius)
    u, v = _pose(rng, x, y, size, spread, 0.2)
    kind = _integer(rng, 0, 3)
    if kind == 0:
        distance = np.sqrt(u * u + v * v) - 1.0
    elif kind == 1:
        distance = np.maximum(np.abs(u) - 2.0, np.abs(v) - 0.3)
    else:
        distance = np.maximum(np.abs(u) * 0.866 + v * 0.5, -v) - 0.5
    _paint(image, _cover(distance, size, x.shape[0]), colour)


def _cover(distance: Floats, radius: float, size: int) -> Floats:
    """The share of each pixel that lies inside: a ramp one pixel wide about distance 0."""
    return np.clip(0.5 - distance * (0.5 * radius * size), 0.0, 1.0)


def _shape(rng: np.random.Generator, image: Floats, x: Floats, y: Floats, name: str, ink: Colour) -> None:
    """The shape that gives the image its label: filled, hollow or patterned."""
    radius = _uniform(rng, 0.5, 0.8)
    u, v = _pose(rng, x, y, radius, 0.9 - radius, 0.18)
    distance = _distance(_outline(rng, name), u, v)
    style = float(rng.random())
    if style < 0.2:
        width = _uniform(rng, 0.07, 0.13)
        distance = np.abs(distance + width) - width
    cover = _cover(distance, radius, x.shape[0])
    if style > 0.8:
        cover = cover * (0.55 + 0.45 * _texture(rng, x, y))
    _paint(image, cover, ink)


def _blur(image: Floats) -> Floats:
    """One pass of (1 2 1) / 4 along both axes, edges repeated."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)), mode="edge")
    rows = padded[:, :-2] + padded[:, 2:] + padded[:, 1:-1] * 2.0
    return np.asarray((rows[:, :, :-2] + rows[:, :, 2:] + rows[:, :, 1:-1] * 2.0) * 0.0625, np.float32)


def _camera(rng: np.random.Generator, image: Floats, x: Floats, y: Floats) -> NDArray[np.uint8]:
    """Uneven light, lack of focus and noise; planes (3, size, size) in 0..1 -> pixels (size, size, 3)."""
    c, s = _turn(_uniform(rng, 0.0, 2 * math.pi))
    light = (x * c + y * s) * _uniform(rng, 0.0, 0.4) + _uniform(rng, 0.7, 1.1)
    image = image * light
    for _ in range(_integer(rng, 0, 2)):
        image = _blur(image)
    grain = rng.random(image.shape, dtype=np.float32) + rng.random(image.shape, dtype=np.float32) - 1.0
    image = image + grain * _uniform(rng, 0.0, 0.12)
    pixels = np.floor(np.clip(image, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    return np.ascontiguousarray(pixels.transpose(1, 2, 0))
