"""The integer contract: what every int8 operator computes, bit for bit, on every engine and target.

Quantized values: an activation is int8 with one scale s and zero point z, real = s * (q - z). Weights are int8 in
[-127, 127], symmetric, one scale per output channel. A bias is int32 with scale s_in * s_w[c]. Accumulators are int32
and proven at quantization time not to overflow. Padding contributes zero to an accumulator.

All scale arithmetic is in float32 and in exactly the order written here (a scale computed in float64 differs in a few
outputs in a million); ``rint`` rounds half to even. The zero point is added as an integer after rounding, so that a
fused multiply-add can change nothing. The formulas are those of XNNPACK's float ("fp32") requantization and of its
quantized add, as LiteRT executes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int8 = NDArray[np.int8]
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]

INT8_MIN, INT8_MAX = -128, 127
WEIGHT_MAX = 127


def f32_product(a: float, b: float | Float32) -> Float32:
    """float32(a) * float32(b), rounded once to float32; always an array, so that no NumPy version promotes."""
    return np.multiply(np.asarray(a, np.float32), np.asarray(b, np.float32), dtype=np.float32)


def f32_quotient(a: float | Float32, b: float) -> Float32:
    """float32(a) / float32(b), rounded once to float32."""
    return np.divide(np.asarray(a, np.float32), np.asarray(b, np.float32), dtype=np.float32)


def output_multipliers(input_scale: float, weight_scales: tuple[float, ...], output_scale: float) -> Float32:
    """m[c] = f32(f32(s_in * s_w[c]) / s_out), shape (C,): what an accumulator is multiplied by.

    Raises ValueError outside XNNPACK's domain, 2**-32 <= m < 2**8 (its src/operators/convolution-nhwc.c and
    src/params-init.c).
    """
    multipliers = f32_quotient(f32_product(input_scale, np.asarray(weight_scales, np.float32)), output_scale)
    inside = (multipliers >= 2.0**-32) & (multipliers < 2.0**8)
    if not inside.all():
        channel = int(np.argmin(inside))
        raise ValueError(f"channel {channel}: the multiplier {multipliers[channel]:g} is outside [2^-32, 2^8)")
    return multipliers


def lower_bound(zero_point: int, relu: bool) -> int:
    """The least output value: the zero point under a fused ReLU, else -128."""
    return zero_point if relu else INT8_MIN


def scale_accumulator(acc: Int32, multipliers: Float32, zero_point: int, relu: bool = False) -> Int8:
    """y = clamp(rint(f32(f32(acc) * m)) + z, lo, 127); channels last. ``acc`` (..., C), ``multipliers`` (C,) or ()."""
    if acc.dtype != np.int32:
        raise TypeError(f"accumulators are int32, got {acc.dtype}")
    scaled = np.multiply(acc.astype(np.float32), multipliers, dtype=np.float32)
    # Clamped as float first (both bounds are exact in float32): a value beyond int32 would not convert.
    low, high = lower_bound(zero_point, relu) - zero_point, INT8_MAX - zero_point
    rounded = np.clip(np.rint(scaled), np.float32(low), np.float32(high))
    return np.asarray(rounded.astype(np.int32) + np.int32(zero_point), np.int8)


def relu(x: Int8, input_zero_point: int) -> Int8:
    """A ReLU alone: same scale, output zero point -128; y = clamp(x - z_in, 0, 255) - 128. Exact."""
    return (np.clip(x.astype(np.int32) - input_zero_point, 0, 255) - 128).astype(np.int8)


class AddConstants(NamedTuple):
    """Integer constants of a quantized addition; ``bias`` includes the rounding half and both zero points."""

    a_multiplier: int
    b_multiplier: int
    bias: int
    shift: int


def add_constants(a_scale: float, a_zero: int, b_scale: float, b_zero: int, output_scale: float) -> AddConstants:
    """r = f32(s / s_out); shift = 20 - floor(log2 max(r)); m = rint(r * 2**shift).

    Raises ValueError outside XNNPACK's domain, 2**-10 <= r < 2**8 for both (its src/operators/add-nc.c).
    """
    a_ratio, b_ratio = float(f32_quotient(a_scale, output_scale)), float(f32_quotient(b_scale, output_scale))
    for ratio in (a_ratio, b_ratio):
        if not 2.0**-10 <= ratio < 2.0**8:
            raise ValueError(f"add: the ratio of input to output scale, {ratio:g}, is outside [2^-10, 2^8)")
    largest = max(a_ratio, b_ratio)
    shift = 20 - (int(np.frexp(largest)[1]) - 1)
    a_multiplier, b_multiplier = round(a_ratio * 2.0**shift), round(b_ratio * 2.0**shift)
    bias = (1 << (shift - 1)) - a_multiplier * a_zero - b_multiplier * b_zero
    return AddConstants(a_multiplier, b_multiplier, bias, shift)


def add(a: Int8, b: Int8, constants: AddConstants, zero_point: int, relu: bool = False) -> Int8:
    """y = clamp(((a*m_a + b*m_b + bias) >> shift) + z, lo, 127), the shift arithmetic. Fits int32 by construction."""
    acc = a.astype(np.int32) * np.int32(constants.a_multiplier) + b.astype(np.int32) * np.int32(constants.b_multiplier)
    y = ((acc + np.int32(constants.bias)) >> np.int32(constants.shift)) + np.int32(zero_point)
    return np.clip(y, lower_bound(zero_point, relu), INT8_MAX).astype(np.int8)


def requantize_multiplier(input_scale: float, output_scale: float) -> int:
    """k = rint(256 * f32(s_in / s_out)). Raises ValueError outside XNNPACK's domain, 2**-8 <= ratio <= 2**7."""
    ratio = float(f32_quotient(input_scale, output_scale))
    if not 2.0**-8 <= ratio <= 2.0**7:
        raise ValueError(f"requantize: the ratio of input to output scale, {ratio:g}, is outside [2^-8, 2^7]")
    return round(256.0 * ratio)


def requantize(x: Int8, input_zero_point: int, multiplier: int, zero_point: int) -> Int8:
    """y = clamp((((x - z_in) * k + 128) >> 8) + z, -128, 127)."""
    acc = (x.astype(np.int32) - np.int32(input_zero_point)) * np.int32(multiplier)
    return np.clip(((acc + np.int32(128)) >> np.int32(8)) + np.int32(zero_point), INT8_MIN, INT8_MAX).astype(np.int8)


def average_multiplier(input_scale: float, output_scale: float, pixels: int) -> Float32:
    """m = f32(f32(s_in / s_out) / N), for the sum of N pixels."""
    return f32_quotient(f32_quotient(input_scale, output_scale), float(pixels))


def multiply_multiplier(a_scale: float, b_scale: float, output_scale: float) -> Float32:
    """m = f32(f32(s_a * s_b) / s_out), for the product of two tensors. Raises ValueError outside XNNPACK's domain,
    2**-16 <= m < 2**8 (src/operators/binary-elementwise-nd.c)."""
    m = f32_quotient(f32_product(a_scale, b_scale), output_scale)
    if not 2.0**-16 <= float(m) < 2.0**8:
        raise ValueError(f"multiply: the multiplier {float(m):g} is outside [2^-16, 2^8)")
    return m


def multiply(a: Int8, b: Int8, a_zero: int, b_zero: int, multiplier: Float32, zero_point: int) -> Int8:
    """y = clamp(rint(f32((a - z_a)(b - z_b)) * m) + z, -128, 127). The product is exact in float32."""
    product = (a.astype(np.int32) - np.int32(a_zero)) * (b.astype(np.int32) - np.int32(b_zero))
    return scale_accumulator(product, multiplier, zero_point)


def _resize_scale(size: int, output_size: int, coordinates: str) -> Float32:
    """Input positions to an output position: f32(in - a) / f32(out - a), a = 1 for aligned corners of two or more."""
    aligned = int(coordinates == "align corners" and output_size > 1)
    return f32_quotient(float(size - aligned), float(output_size - aligned))


def resize_positions(size: int, output_size: int, coordinates: str) -> Float32:
    """The input position, in [0, size - 1], of each output position of a bilinear resize: all in float32, as XNNPACK
    computes it (src/indirection.c). See ``graph.Resize``."""
    scale = _resize_scale(size, output_size, coordinates)
    k = np.arange(output_size, dtype=np.float32)
    position = k * scale
    if coordinates == "half pixel":
        position = (k + np.float32(0.5)) * scale - np.float32(0.5)
    return np.asarray(np.clip(position, np.float32(0), np.float32(size - 1)), np.float32)


def nearest_positions(size: int, output_size: int, coordinates: str) -> NDArray[np.int32]:
    """The input pixel that each output pixel of a nearest resize copies (TFLite's resize_nearest_neighbor.h)."""
    scale = _resize_scale(size, output_size, coordinates)
    k = np.arange(output_size, dtype=np.float32)
    position = (k + np.float32(0.5 if coordinates == "half pixel" else 0.0)) * scale
    rounded = np.floor(position + np.float32(0.5)) if coordinates == "align corners" else np.floor(position)
    return np.asarray(np.minimum(rounded, size - 1), np.int32)


RESIZE_ONE = 2048  # the weight of a whole pixel


def resize_taps(size: int, output_size: int, coordinates: str) -> NDArray[np.int32]:
    """Of each output position of a bilinear resize: the input pixel before it, the one after it, and that one's weight
    in 1/2048, (output_size, 3)."""
    position = resize_positions(size, output_size, coordinates)
    before = np.floor(position)
    weight = np.rint((position - before) * np.float32(RESIZE_ONE))
    after = np.minimum(before + 1, size - 1)
    return np.asarray(np.stack([before, after, weight], axis=1), np.int32)


def resize_bilinear(x: Int8, rows: NDArray[np.int32], columns: NDArray[np.int32]) -> Int8:
    """``x`` (N, H, W, C) by the taps of its rows and columns; the zero point does not matter.

    top = (tl << 11) + (tr - tl) * wx, bottom likewise; y = ((top << 11) + (bottom - top) * wy + 2^21) >> 22.
    """
    wide = x.astype(np.int32)
    left, right = wide[:, :, columns[:, 0]], wide[:, :, columns[:, 1]]
    line = (left << 11) + (right - left) * columns[:, 2][:, None]
    top, bottom = line[:, rows[:, 0]], line[:, rows[:, 1]]
    y = ((top << 11) + (bottom - top) * rows[:, 2][:, None, None] + (1 << 21)) >> 22
    return np.asarray(y, np.int8)


def _identity(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x


def _sigmoid(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(1.0 / (1.0 + np.exp(-x)))


def _leaky_relu(x: NDArray[np.float64], alpha: float) -> NDArray[np.float64]:
    return np.where(x >= 0, x, x * alpha)


# The functions of ``Lookup`` on real numbers, of x and their parameters: leaky_relu's is alpha, clip's low and high.
FUNCTIONS: Mapping[str, Callable[..., NDArray[np.float64]]] = {
    "identity": _identity,
    "sigmoid": _sigmoid,
    "tanh": np.tanh,
    "leaky_relu": _leaky_relu,
    "clip": np.clip,
}

# Scale and zero point of the functions whose range is known, as TFLite demands them.
FIXED_OUTPUTS: Mapping[str, tuple[float, int]] = {"sigmoid": (2.0**-8, -128), "tanh": (2.0**-7, 0)}


def leaky_relu_multipliers(input_scale: float, output_scale: float, alpha: float) -> tuple[int, int]:
    """k = rint(256 * r) above zero and rint(256 * f32(r * alpha)) below, r = f32(s_in / s_out): XNNPACK's."""
    ratio = f32_quotient(input_scale, output_scale)
    return round(256.0 * float(ratio)), round(256.0 * float(f32_product(float(ratio), alpha)))


def lookup_table(
    function: str,
    parameters: tuple[float, ...],
    input_scale: float,
    input_zero_point: int,
    output_scale: float,
    output_zero_point: int,
) -> Int8:
    """The int8 results of a ``Lookup`` for the inputs -128 to 127, (256,).

    "identity" is a requantization, as ``requantize`` computes it, and so is "clip", whose bounds are the ends of the
    output's range; "leaky_relu" is one with another multiplier below zero. The other functions give the real value,
    correctly rounded. Raises KeyError for an unknown function, ValueError outside XNNPACK's domain.
    """
    inputs = np.arange(INT8_MIN, INT8_MAX + 1).astype(np.int8)
    if function in ("identity", "clip"):
        k = requantize_multiplier(input_scale, output_scale)
        return requantize(inputs, input_zero_point, k, output_zero_point)
    if function == "leaky_relu":
        above, below = leaky_relu_multipliers(input_scale, output_scale, *parameters)
        positive = inputs.astype(np.int32) >= input_zero_point
        high, low = (requantize(inputs, input_zero_point, k, output_zero_point) for k in (above, below))
        return np.asarray(np.where(positive, high, low), np.int8)
    real = FUNCTIONS[function]((inputs.astype(np.float64) - input_zero_point) * input_scale, *parameters)
    rounded = np.rint(real / output_scale) + output_zero_point
    return np.asarray(np.clip(rounded, INT8_MIN, INT8_MAX), np.int8)
