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


def _identity(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return x


# The functions of ``Lookup`` on real numbers, each of x and its parameters.
FUNCTIONS: Mapping[str, Callable[..., NDArray[np.float64]]] = {"identity": _identity}


def lookup_table(
    function: str,
    parameters: tuple[float, ...],
    input_scale: float,
    input_zero_point: int,
    output_scale: float,
    output_zero_point: int,
) -> Int8:
    """The int8 results of a ``Lookup`` for the inputs -128 to 127, (256,).

    "identity" is a requantization, as ``requantize`` computes it. Raises KeyError for an unknown function, ValueError
    outside XNNPACK's domain.
    """
    inputs = np.arange(INT8_MIN, INT8_MAX + 1).astype(np.int8)
    if function == "identity":
        k = requantize_multiplier(input_scale, output_scale)
        return requantize(inputs, input_zero_point, k, output_zero_point)
    real = FUNCTIONS[function]((inputs.astype(np.float64) - input_zero_point) * input_scale, *parameters)
    rounded = np.rint(real / output_scale) + output_zero_point
    return np.asarray(np.clip(rounded, INT8_MIN, INT8_MAX), np.int8)
