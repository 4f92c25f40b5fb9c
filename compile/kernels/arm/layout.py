"""How tensors lie between the AArch64 kernels, and the bands of their rows that kernels stage.

A tensor is NHWC int8 with its channels padded to a multiple of 16. A convolution first copies the rows that a band of
output rows reads, with their padding, into scratch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ....models.graph import Geometry

LANES = 16


def stored_channels(channels: int) -> int:
    """Channels as stored between kernels."""
    return -(-channels // LANES) * LANES


def stored_size(geometry: Geometry) -> int:
    """Bytes of the tensor that a node makes, as stored between kernels."""
    return geometry.out_pixels * stored_channels(geometry.out_channels)


def staged_width(geometry: Geometry) -> int:
    """Pixels of an input row with its padding."""
    return geometry.in_width + geometry.padding[2] + geometry.padding[3]


def tap_pitch(geometry: Geometry, rows: int) -> int:
    """Staged rows from one row of taps to the next, for a band of ``rows`` output rows. What lies between the rows that
    the taps of a dilated window read is left out where the band is low enough."""
    return min(geometry.dilation[0], _span(geometry, rows))


def staged_rows(geometry: Geometry, rows: int) -> int:
    """Rows of the scratch that holds what ``rows`` output rows read."""
    return (geometry.kernel[0] - 1) * tap_pitch(geometry, rows) + _span(geometry, rows)


def _span(geometry: Geometry, rows: int) -> int:
    """Input rows from the first to the last that one row of taps reads."""
    return (rows - 1) * geometry.strides[0] + 1


@dataclass(frozen=True)
class StagedPart:
    """Rows of the input that lie side by side in scratch as well: in it from ``target`` on, in the input from
    ``source`` on, counted from the window of the band's first row. They reach ``reach`` beyond what the first row of
    taps steps over: the strides of all output rows but one."""

    target: int
    source: int
    reach: int


def staged_parts(geometry: Geometry, rows: int) -> tuple[StagedPart, ...]:
    """One part, or one for each row of taps; ``rows`` are those of a full band."""
    pitch, dilation = tap_pitch(geometry, rows), geometry.dilation[0]
    if pitch == dilation:
        return (StagedPart(0, 0, geometry.extent[0]),)
    return tuple(StagedPart(y * pitch, y * dilation, 1) for y in range(geometry.kernel[0]))


def window_name(geometry: Geometry) -> str:
    """What a kernel's symbol says of a geometry; channels it says as they are stored."""
    g = geometry
    kernel, strides, padding = ("x".join(map(str, numbers)) for numbers in (g.kernel, g.strides, g.padding))
    dilation = "" if g.dilation == (1, 1) else f"_d{g.dilation[0]}x{g.dilation[1]}"
    return f"{g.in_height}x{g.in_width}_{g.out_height}x{g.out_width}_k{kernel}_s{strides}_p{padding}{dilation}"
