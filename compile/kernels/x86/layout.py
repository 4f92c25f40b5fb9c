"""How tensors and kernels' scalars lie in memory on x86-64."""

from __future__ import annotations

from ....models import graph as ir

# Indices of the words of ``parameters``, a convolution's scalars.
OUT_ZERO, OUT_LOW, PADDING, ROW_ZERO, ROW_LOW, RELU_ZERO = range(6)
PARAMETERS = 6


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def stored_channels(channels: int) -> int:
    """Elements from one pixel to the next: whole cache lines, so that no vector has a tail. The rest is arbitrary."""
    return ceil_div(channels, 64) * 64


def row_stride(k: int) -> int:
    """Elements from row to row: whole cache lines, and not a multiple of a page."""
    return ceil_div(k, 64) * 64 + (64 if ceil_div(k, 64) % 16 == 0 else 0)


def window_symbol(geometry: ir.Geometry) -> str:
    """All that the code of a kernel over windows depends on."""
    g, (kh, kw), (sy, sx), (top, _, left, _) = geometry, geometry.kernel, geometry.strides, geometry.padding
    inside = f"{g.in_height}x{g.in_width}x{g.in_channels}"
    return f"{inside}_k{kh}x{kw}_s{sy}x{sx}_p{top}_{left}{dilation_symbol(g)}_to{g.out_height}x{g.out_width}"


def dilation_symbol(geometry: ir.Geometry) -> str:
    """Nothing where a window's taps are neighbours."""
    dy, dx = geometry.dilation
    return "" if (dy, dx) == (1, 1) else f"_d{dy}x{dx}"
