"""How tensors lie between the AArch64 kernels, and the bands of their rows that kernels stage.

A tensor is NHWC int8 with its channels padded to a multiple of 16. A convolution first copies the rows that a band of
output rows reads, with their padding, into scratch.
"""

from __future__ import annotations

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


def staged_rows(geometry: Geometry, rows: int) -> int:
    """Input rows that ``rows`` output rows read."""
    return (rows - 1) * geometry.strides[0] + geometry.kernel[0]


def window_name(geometry: Geometry) -> str:
    """What a kernel's symbol says of a geometry; channels it says as they are stored."""
    g = geometry
    kernel, strides, padding = ("x".join(map(str, numbers)) for numbers in (g.kernel, g.strides, g.padding))
    return f"{g.in_height}x{g.in_width}_{g.out_height}x{g.out_width}_k{kernel}_s{strides}_p{padding}"
