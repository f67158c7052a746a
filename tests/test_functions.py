"""The kernel's own 2^x and tanh, each measured in ulp of the exact result; every float32 is for bench/exhaustive.py."""

import numpy as np
import pytest
from cases import EXP_ULP

import fastattn as fa
from fastattn import _runtime

pytestmark = pytest.mark.compiled

TANH_ULP = 2
WIDER = {np.float32: np.float64, np.float64: np.longdouble}
FLOOR = {np.float32: -150.5, np.float64: -1075.5}  # 2^x rounds to zero below
SATURATED = {np.float32: 12, np.float64: 22}  # tanh is 1 past it
DTYPES = [np.float32, pytest.param(np.float64, marks=pytest.mark.skipif(
    np.finfo(np.longdouble).nmant <= 52, reason="long double is no wider than double"))]


def evaluate(function, x):
    return _runtime._dispatch.evaluate(function, x)


def ulps(y, exact):
    """Error of y in units of the spacing of y's dtype at `exact`, denormals included."""
    info = np.finfo(y.dtype)
    _, exponent = np.frexp(np.maximum(abs(exact), info.tiny))
    return abs(y - exact) / np.ldexp(exact.dtype.type(1), exponent - 1 - info.nmant)


def dense(rng, dtype, low, high, n=500_000):
    """Values of [low, high], low < 0: as many from each piece of the range, and from each binade of either sign."""
    bits = np.int32 if dtype is np.float32 else np.int64
    x = [rng.uniform(low, high, n)]
    for end in filter(None, (low, high)):
        last = int(np.abs(np.array(end, dtype)).view(bits))
        x.append(np.copysign(rng.integers(0, last, n, bits, endpoint=True).view(dtype), end))
    return np.clip(np.concatenate([*x, [low, high]]), low, high).astype(dtype)


def assert_ulps(function, x, y, exact, limit, seed):
    error = ulps(y, exact)
    assert not np.isnan(error).any()
    at = error.argmax()
    assert error[at] <= limit, (
        f"isa={fa.isa()}, {function}, {x.dtype}, seed={seed}: {error[at]:.3f} ulp at {x[at]!r}, got {y[at]!r}, "
        f"exact {exact[at]!r}; {(error > limit).sum()} of {x.size} past {limit} ulp")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("high", [0.0, 63.0])
def test_exp2_is_within_an_ulp(dtype, high, seed):
    x = dense(np.random.default_rng(seed), dtype, FLOOR[dtype], high)
    assert_ulps("exp2", x, evaluate("exp2", x), np.exp2(x.astype(WIDER[dtype])), EXP_ULP, seed)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_of_integers_is_exact(dtype):
    smallest = -149 if dtype is np.float32 else -1074
    n = np.arange(smallest, 64)
    y = evaluate("exp2", n.astype(dtype))
    wrong = n[y != np.ldexp(dtype(1), n)]
    assert not wrong.size, f"isa={fa.isa()}: 2^{wrong} is not exact"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_of_special_values(dtype):
    info = np.finfo(dtype)
    below = np.array([-np.inf, -info.max, -1e30, 2 * FLOOR[dtype], np.floor(FLOOR[dtype]) - 1], dtype)
    y = evaluate("exp2", below)
    assert (y == 0).all() and not np.signbit(y).any(), f"isa={fa.isa()}: {y}"
    near = np.array([0.0, -0.0, info.smallest_subnormal, -info.smallest_subnormal, -info.tiny, -info.epsneg / 2], dtype)
    assert (evaluate("exp2", near) == 1).all(), f"isa={fa.isa()}"
    assert np.isnan(evaluate("exp2", np.array([np.nan, -np.nan], dtype))).all(), f"isa={fa.isa()}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_exp2_is_monotone_near_zero(dtype):
    # In steps of half an epsilon, which change 2^x by a third of its spacing; rounding may then repeat a value, never
    # turn back. Nothing above 1 for x <= 0: no weight is larger than that of the maximum.
    step = np.finfo(dtype).epsneg / 4
    y = evaluate("exp2", (np.arange(-(2**16), 1) * step).astype(dtype))
    assert (np.diff(y) >= 0).all(), f"isa={fa.isa()}: turns back {(np.diff(y) < 0).sum()} times"
    assert y[-1] == 1 and y[0] < 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_tanh_is_within_two_ulp(dtype, seed):
    x = dense(np.random.default_rng(seed), dtype, -SATURATED[dtype], SATURATED[dtype])
    y = evaluate("tanh", x)
    assert_ulps("tanh", x, y, np.tanh(x.astype(WIDER[dtype])), TANH_ULP, seed)
    assert (abs(y) <= 1).all(), f"isa={fa.isa()}, seed={seed}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_is_odd(dtype, seed):
    x = dense(np.random.default_rng(seed), dtype, -SATURATED[dtype], SATURATED[dtype])
    y, mirrored = evaluate("tanh", x), evaluate("tanh", -x)
    at = np.flatnonzero(y != -mirrored)
    assert not at.size, (
        f"isa={fa.isa()}, seed={seed}: {at.size} of {x.size}, first tanh({x[at[0]]!r}) = {y[at[0]]!r}, "
        f"tanh({-x[at[0]]!r}) = {mirrored[at[0]]!r}")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tanh_of_special_values(dtype):
    info = np.finfo(dtype)
    big = np.array([np.inf, info.max, 1e30, SATURATED[dtype]], dtype)
    assert (evaluate("tanh", big) == 1).all() and (evaluate("tanh", -big) == -1).all(), f"isa={fa.isa()}"
    assert np.isnan(evaluate("tanh", np.array([np.nan, -np.nan], dtype))).all(), f"isa={fa.isa()}"
    tiny = np.array([0.0, info.smallest_subnormal, info.tiny, info.tiny * 1e3], dtype)
    assert np.abs(evaluate("tanh", tiny) - tiny).max() <= TANH_ULP * np.spacing(tiny[-1]), f"isa={fa.isa()}"
    assert (evaluate("tanh", np.array([0.0, -0.0], dtype)) == 0).all(), f"isa={fa.isa()}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("function", ["exp2", "tanh"])
def test_a_value_does_not_depend_on_its_place(function, dtype, seed):
    x = np.random.default_rng(seed).uniform(-9, 0, 70).astype(dtype)
    y = np.concatenate([evaluate(function, x[i : i + 1]) for i in range(x.size)])
    for n in range(1, x.size + 1):
        assert (evaluate(function, x[:n]) == y[:n]).all(), f"isa={fa.isa()}, {n} values"
    for i in range(x.size):  # beside a NaN and an infinity
        spoiled = x.copy()
        spoiled[i], spoiled[i - 1] = np.nan, -np.inf
        keep = np.arange(x.size)[(np.arange(x.size) != i) & (np.arange(x.size) != (i - 1) % x.size)]
        assert (evaluate(function, spoiled)[keep] == y[keep]).all(), f"isa={fa.isa()}, NaN at {i}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_measure(dtype):
    one = np.ones(1, dtype)
    smallest = np.finfo(dtype).smallest_subnormal
    exact = one.astype(WIDER[dtype])
    assert ulps(one, exact) == 0 and ulps(one + np.finfo(dtype).eps, exact) == 1 and ulps(-one, exact) > 1e6
    assert ulps(np.array([3], dtype) * smallest, exact * smallest) == 2
    assert ulps(np.zeros(1, dtype), exact * np.finfo(dtype).tiny / 4) > 1e5, "flushed to zero"
    with pytest.raises(AssertionError, match="1.000 ulp at"):
        assert_ulps("exp2", one, one + np.finfo(dtype).eps, exact, 0.9, None)
