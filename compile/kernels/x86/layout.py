"""How tensors and kernels' scalars lie in memory on x86-64."""

from __future__ import annotations

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
