"""The integer contract's numpy functions against the same formulas in exact rationals: ties, extremes, domains."""

from __future__ import annotations

import numpy as np
import pytest
from support import scalar_contract as scalar

from xceptile.models import verify
from xceptile.runtime import arithmetic

ALL_INT8 = np.arange(-128, 128).astype(np.int8)


def f32(value: float) -> float:
    return float(np.float32(value))


def random_scales(rng: np.random.Generator, low: float, high: float, count: int) -> list[float]:
    return [f32(2.0**e) for e in rng.uniform(np.log2(low), np.log2(high), count)]


def test_f32_of_the_scalar_contract_rounds_as_the_hardware_does():
    rng = np.random.default_rng(0)
    for a, b in zip(rng.normal(size=300), 2.0 ** rng.integers(-40, 40, 300), strict=True):
        assert float(scalar.f32(float(a * b))) == f32(float(a * b))
    assert scalar.f32(2**24 + 1) == 2**24
    assert scalar.f32(2**24 + 3) == 2**24 + 4


def test_multipliers_are_rounded_twice_to_float32_in_order():
    rng = np.random.default_rng(1)
    s_in, s_out = random_scales(rng, 1e-3, 1, 40), random_scales(rng, 1e-3, 1, 40)
    s_w = random_scales(rng, 1e-4, 1e-1, 50)
    differ = 0
    for a, c in zip(s_in, s_out, strict=True):
        seen = arithmetic.output_multipliers(a, tuple(s_w), c)
        assert seen.dtype == np.float32
        assert [float(m) for m in seen] == [float(scalar.multiplier(a, b, c)) for b in s_w]
        differ += sum(f32(a * b / c) != float(m) for b, m in zip(s_w, seen, strict=True))
    assert differ > 0  # a multiplier computed in double is another one: the comparison would see it


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("zero_point", [-128, -3, 0, 127])
def test_accumulators_scale_as_in_rationals(zero_point, relu):
    rng = np.random.default_rng(2)
    acc = np.concatenate(
        [
            rng.integers(-(2**31), 2**31, 150),
            rng.integers(-(2**18), 2**18, 150),
            [-(2**31), 2**31 - 1, 2**24 + 1, -(2**24) - 1, 0, 1, -1],
        ]
    ).astype(np.int32)
    for m in [*random_scales(rng, 2**-24, 2**-6, 6), 2.0**-32, f32(255.99)]:
        seen = arithmetic.scale_accumulator(acc[:, None], np.float32([m]), zero_point, relu)[:, 0]
        assert seen.tolist() == [scalar.convolution_output(int(a), scalar.f32(m), zero_point, relu) for a in acc]


def test_a_tie_goes_to_even_and_the_zero_point_comes_after_rounding():
    acc = np.array([[1], [3], [5], [-1], [-3], [-5]], np.int32)
    seen = arithmetic.scale_accumulator(acc, np.float32([0.5]), 0)[:, 0]
    assert seen.tolist() == [0, 2, 2, 0, -2, -2]
    # With an odd zero point: rounding the sum instead would give 1, 3, 3, 1, -1, -1 only for an even one.
    assert arithmetic.scale_accumulator(acc, np.float32([0.5]), 1)[:, 0].tolist() == [1, 3, 3, 1, -1, -1]
    rounded_after_adding = np.rint(acc[:, 0] * 0.5 + 1)
    assert rounded_after_adding.tolist() != [1, 3, 3, 1, -1, -1]


def test_accumulators_above_2_to_24_are_rounded_to_float32_first():
    m = f32(2.0**-18 * 1.0000001)
    acc = np.array([[2**24 + 1], [2**24 + 3], [2**30 + 63]], np.int32)
    seen = arithmetic.scale_accumulator(acc, np.float32([m]), -128)[:, 0]
    assert seen.tolist() == [scalar.convolution_output(int(a), scalar.f32(m), -128, False) for a in acc[:, 0]]


def test_a_wrong_accumulator_type_is_refused():
    with pytest.raises(TypeError, match="int64"):
        arithmetic.scale_accumulator(np.zeros((1, 1), np.int64), np.float32([1]), 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("multiplier", [2.0**-33, 2.0**8])
def test_a_multiplier_outside_the_domain_is_refused(multiplier):
    with pytest.raises(ValueError, match=r"channel 1: the multiplier .* outside \[2\^-32, 2\^8\)"):
        arithmetic.output_multipliers(1.0, (1.0, multiplier), 1.0)


@pytest.mark.parametrize("zero_point", [-128, -1, 0, 100, 127])
def test_relu_is_exact_on_every_value(zero_point):
    seen = arithmetic.relu(ALL_INT8, zero_point)
    assert seen.tolist() == [max(int(x) - zero_point, 0) - 128 if int(x) - zero_point <= 255 else 127 for x in ALL_INT8]


ADD_SCALES = [
    (0.05, 3, 0.04, -7, 0.07, 5),
    (1.0, -128, 1.0, 127, 1.0, 0),
    (0.5, 0, 0.25, 0, 1.0, 0),  # many exact ties
    (2.0**-10, 127, 255.0, -128, 1.0, -128),  # the ratios' extremes
    (2.0**-10, -128, 2.0**-10, -128, 1.0, 127),
    (f32(255.99998), 127, f32(255.99998), 127, 1.0, 127),
]


@pytest.mark.parametrize("scales", ADD_SCALES)
@pytest.mark.parametrize("relu", [False, True])
def test_addition_is_exact_on_all_pairs(scales, relu):
    s_a, z_a, s_b, z_b, s_out, z = (f32(v) if i % 2 == 0 else int(v) for i, v in enumerate(scales))
    a, b = (x.ravel() for x in np.meshgrid(ALL_INT8, ALL_INT8))
    constants = arithmetic.add_constants(s_a, z_a, s_b, z_b, s_out)
    seen = arithmetic.add(a, b, constants, z, relu)
    some = np.random.default_rng(3).choice(a.size, 3000, replace=False)
    some = np.concatenate([some, [0, 255, 65280, 65535]])
    expected = [scalar.add_output(int(a[i]), int(b[i]), s_a, z_a, s_b, z_b, s_out, z, relu) for i in some]
    assert seen[some].tolist() == expected


def test_addition_never_leaves_int32_at_the_corners_of_its_domain():
    rng = np.random.default_rng(4)
    for _ in range(200):
        r_a, r_b = random_scales(rng, 2**-10, 2**8 * 0.999, 2)
        for z_a in (-128, 127):
            for z_b in (-128, 127):
                c = arithmetic.add_constants(r_a, z_a, r_b, z_b, 1.0)
                for a in (-128, 127):
                    for b in (-128, 127):
                        partial = a * c.a_multiplier + b * c.b_multiplier
                        assert abs(partial) < 2**31
                        assert abs(partial + c.bias) < 2**31
                assert abs(c.bias) < 2**31


def test_the_shift_uses_the_floor_of_the_logarithm_at_powers_of_two():
    assert arithmetic.add_constants(1.0, 0, 0.5, 0, 1.0) == (1 << 20, 1 << 19, 1 << 19, 20)
    below_one = f32(np.nextafter(np.float32(1), np.float32(0)))
    assert arithmetic.add_constants(below_one, 0, 0.5, 0, 1.0).shift == 21


@pytest.mark.parametrize("ratios", [(2.0**-11, 1.0), (1.0, 2.0**-11), (2.0**8, 1.0), (1.0, 2.0**8)])
def test_an_addition_outside_the_domain_is_refused(ratios):
    with pytest.raises(ValueError, match=r"outside \[2\^-10, 2\^8\)"):
        arithmetic.add_constants(ratios[0], 0, ratios[1], 0, 1.0)


@pytest.mark.parametrize(("s_in", "s_out"), [(0.05, 0.07), (1.0, 1.0), (1.0, 2.0), (128.0, 1.0), (1.0, 256.0), (3, 7)])
@pytest.mark.parametrize("zero_points", [(-128, -128), (127, -128), (-5, 9)])
def test_requantize_is_exact_on_every_value(s_in, s_out, zero_points):
    s_in, s_out = f32(s_in), f32(s_out)
    z_in, z = zero_points
    seen = arithmetic.requantize(ALL_INT8, z_in, arithmetic.requantize_multiplier(s_in, s_out), z)
    assert seen.tolist() == [scalar.requantize_output(int(x), s_in, z_in, s_out, z) for x in ALL_INT8]


def test_requantize_rounds_its_ties_up():
    k = arithmetic.requantize_multiplier(1.0, 2.0)
    seen = arithmetic.requantize(np.array([-3, -1, 1, 3], np.int8), 0, k, 0)
    assert seen.tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("ratio", [2.0**-9, 2.0**7 * 1.01])
def test_a_requantization_outside_the_domain_is_refused(ratio):
    with pytest.raises(ValueError, match=r"outside \[2\^-8, 2\^7\]"):
        arithmetic.requantize_multiplier(ratio, 1.0)


@pytest.mark.parametrize("pixels", [1, 9, 49, 100])
def test_the_mean_multiplier_divides_twice_in_float32(pixels):
    rng = np.random.default_rng(5)
    for s_in, s_out in zip(random_scales(rng, 0.01, 1, 20), random_scales(rng, 0.01, 1, 20), strict=True):
        m = arithmetic.average_multiplier(s_in, s_out, pixels)
        totals = rng.integers(-128 * pixels, 255 * pixels, 20).astype(np.int32)
        seen = arithmetic.scale_accumulator(totals, m, 7)
        assert seen.tolist() == [scalar.mean_output(int(t), s_in, s_out, pixels, 7) for t in totals]


def test_every_function_of_a_lookup_is_known_to_both():
    assert set(verify.LOOKUPS) == set(arithmetic.FUNCTIONS)


def test_lookups_round_the_real_value():
    for function, scale, zero in (("sigmoid", 2.0**-8, -128), ("tanh", 2.0**-7, 0)):
        table = arithmetic.lookup_table(function, (), 0.05, 7, scale, zero)
        for q in ALL_INT8:
            real = arithmetic.FUNCTIONS[function](np.float64((int(q) - 7) * 0.05))
            exact = min(max(round(float(real) / scale) + zero, -128), 127)
            assert table[int(q) + 128] == exact


def test_a_bilinear_resize_by_hand():
    """Two pixels to four, half pixel: weights of a quarter and three quarters, rounded half up."""
    taps = arithmetic.resize_taps(2, 4, "half pixel")
    assert taps.tolist() == [[0, 1, 0], [0, 1, 512], [0, 1, 1536], [1, 1, 0]]
    x = np.array([0, 10], np.int8).reshape(1, 1, 2, 1)
    rows = arithmetic.resize_taps(1, 1, "half pixel")
    assert arithmetic.resize_bilinear(x, rows, taps).reshape(-1).tolist() == [0, 3, 8, 10]
