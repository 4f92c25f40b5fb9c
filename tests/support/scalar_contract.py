"""The integer contract once more, one number at a time in exact rational arithmetic, sharing no code with the package.

Floats are rounded to float32 by hand; Python's ``round`` of a Fraction is half to even.
"""

from __future__ import annotations

from fractions import Fraction


def f32(x: Fraction | float | int) -> Fraction:
    """The nearest float32 (half to even), as an exact fraction. No overflow, no underflow below 2**-126."""
    x = Fraction(x)
    if x == 0:
        return x
    exponent = 0
    magnitude = abs(x)
    while magnitude >= 2:
        magnitude, exponent = magnitude / 2, exponent + 1
    while magnitude < 1:
        magnitude, exponent = magnitude * 2, exponent - 1
    quantum = Fraction(2) ** (exponent - 23)
    return round(x / quantum) * quantum


def clamp(value: int, low: int, high: int) -> int:
    return max(low, min(high, value))


def multiplier(s_in: float, s_w: float, s_out: float) -> Fraction:
    return f32(f32(Fraction(s_in) * Fraction(s_w)) / Fraction(s_out))


def convolution_output(acc: int, m: Fraction, z: int, relu: bool) -> int:
    return clamp(round(f32(f32(acc) * m)) + z, z if relu else -128, 127)


def add_output(a: int, b: int, s_a: float, z_a: int, s_b: float, z_b: int, s_out: float, z: int, relu: bool) -> int:
    r_a, r_b = f32(Fraction(s_a) / Fraction(s_out)), f32(Fraction(s_b) / Fraction(s_out))
    floor_log2 = 0
    while Fraction(2) ** (floor_log2 + 1) <= max(r_a, r_b):
        floor_log2 += 1
    while Fraction(2) ** floor_log2 > max(r_a, r_b):
        floor_log2 -= 1
    shift = 20 - floor_log2
    m_a, m_b = round(r_a * 2**shift), round(r_b * 2**shift)
    total = a * m_a + b * m_b + 2 ** (shift - 1) - m_a * z_a - m_b * z_b
    assert -(2**31) <= total < 2**31
    return clamp(total // 2**shift + z, z if relu else -128, 127)


def requantize_output(x: int, s_in: float, z_in: int, s_out: float, z: int) -> int:
    k = round(256 * f32(Fraction(s_in) / Fraction(s_out)))
    return clamp(((x - z_in) * k + 128) // 256 + z, -128, 127)


def mean_output(total: int, s_in: float, s_out: float, pixels: int, z: int) -> int:
    """``total`` is the sum of x - z_in."""
    m = f32(f32(Fraction(s_in) / Fraction(s_out)) / pixels)
    return clamp(round(f32(total * m)) + z, -128, 127)


def mean_output_separate(total: int, s_in: float, s_out: float, pixels: int, z: int) -> int:
    """As XNNPACK on x86: the zero point is added in float32 before rounding."""
    m = f32(f32(Fraction(s_in) / Fraction(s_out)) / pixels)
    return clamp(round(f32(f32(total * m) + z)), -128, 127)


def mean_output_fused(total: int, s_in: float, s_out: float, pixels: int, z: int) -> int:
    """As XNNPACK on ARM: likewise, but product and sum are rounded once."""
    m = f32(f32(Fraction(s_in) / Fraction(s_out)) / pixels)
    return clamp(round(f32(total * m + z)), -128, 127)
