"""linear and pack_weight: the definition in wider arithmetic, under an a-priori bound; bits, NaN, arguments."""

import copy
import doctest
import functools
import inspect
import itertools
import math
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import DIGITS, EXACT_IN, PAIRS_ISA, PAIRS_ROUNDOFF, PAIRS_TINY, UNIT_ROUNDOFF, assert_close, generator, ulp
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import BROADCASTS, LAYOUTS, assert_same_bits
from test_checks import Dlpack, bfloat16, masked, misaligned, torn, zeros
from test_functions import dense
from test_half import dtype_of
from test_process import script

import fastattn as fa
from fastattn import _runtime, checks, layer, reference

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # of ml_dtypes on signalling NaN

NAN, INF = np.nan, np.inf
F16, F32, F64 = np.float16, np.float32, np.float64

# dtype of x, and how the weight is kept
KINDS = [("float32", "float32"), ("float64", "float64"), ("float32", "bfloat16"), ("float16", "float32"),
         ("float16", "bfloat16"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")]
ACTIVATIONS = [None, "relu", "gelu", "gelu_tanh", "silu"]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=", ".join)
each_module = pytest.mark.parametrize("module", [fa, reference], ids=["kernel", "reference"])

INNER = 512  # products at most that are summed from zero; of pairs, 1024
ERFC_ULP = 5  # of the C library's, as glibc lists it
SLOPE = {None: 1, "relu": 1, "gelu": 1.13, "gelu_tanh": 1.13, "silu": 1.1}  # at most; the last three rounded up


# --- the definition, and how far a result may be from it ---

@functools.cache
def pi(dtype):
    return 4 * np.arctan(dtype(1))


def normal_tail(x):
    """The normal distribution function at x, in x's dtype, to ERFC_ULP: at x rounded to float64, and one term on."""
    a = -x / np.sqrt(x.dtype.type(2))
    at = a.astype(F64)
    erfc = np.vectorize(math.erfc, otypes=[F64])(at).astype(x.dtype)
    step = np.where(np.isfinite(at), a - at, 0)
    return (erfc - 2 / np.sqrt(pi(x.dtype.type)) * np.exp(-(at.astype(x.dtype) ** 2)) * step) / 2


def activated(activation, z):
    """By the formulas of `linear`'s docstring, in z's dtype."""
    number = z.dtype.type
    if activation == "relu":
        return np.where(z < 0, 0, z)
    if activation == "gelu":
        return z * normal_tail(z)
    if activation == "gelu_tanh":
        return z / 2 * (1 + np.tanh(np.sqrt(2 / pi(number)) * (z + number("0.044715") * z**3)))
    if activation == "silu":
        return z * np.where(z < 0, np.exp(np.minimum(z, 0)), 1) / (1 + np.exp(-abs(z)))
    return z


def activation_error(activation, z, y, dtype):
    """How far an activation may be off at z, in arithmetic of roundoff u = 2^-24 or 2^-53; y is exact.

    gelu, with a = |z| / sqrt 2 and T the normal distribution function at -|z|:  y = z T, or z (1 - T)

        a           2 u, of it and of the constant; so a^2 by 5 u, and its difference from p by 1 u more
        p           of degree 9 in t = 1 / (1 + a/2), by Horner's scheme: products and sums of at most 7.5 in all, and
                    coefficients of 6.8 in all, an u each; t is off by 3.3 u, which moves t exp(p(t)) 2.5 times as far
        exponent    (p - a^2) log2 e: two more; then the exponential 2 u, two products
        T           the formula 2 u; together (32 + 6 a^2) u T = (32 + 3 z^2) u T

    which holds for the C library's erfc of float64 as well: 2 u (2 a^2 + 1) and ERFC_ULP. For z > 0 that is
    relative to 1 - T; and what it is compared with is of another erfc.

    gelu_tanh: of e = 0.798 (z + 0.0447 z^3) seven roundings, times e / cosh(e)^2 <= 0.448; the tanh 2 ulp, 4 u; half of
    all that, for y = z/2 (1 + tanh e): 3.6 u |z|. 1 + tanh e and the product round once more.

    silu: of exp(z), 2 u |z| from the product with log2 e, and an ulp; that moves e / (1 + e) by 1 / (1 + e) times as
    much, and three operations follow.

    Where exponentials or results are denormal they are off by a few of the smallest numbers.
    """
    u = UNIT_ROUNDOFF[np.dtype(dtype)]
    z, y = z.astype(F64), y.astype(F64)
    tiny = 4 * float(np.finfo(dtype).smallest_subnormal)
    if activation in (None, "relu"):
        return 0 * abs(y)
    if activation == "gelu":
        of_erfc = 0 if dtype == F32 and fa.isa() != "reference" else 4 * ERFC_ULP
        tail = normal_tail(-np.minimum(abs(z), 1e100))
        error = (32 + 3 * z**2) * abs(z) * tail + (2 + of_erfc) * abs(y)
        error = np.where(tail > 0, error, (2 + of_erfc) * abs(y))
    elif activation == "gelu_tanh":
        error = 4 * abs(z) + 2 * abs(y)
    else:
        error = abs(y) * ((2 * abs(z) + 2) / (1 + np.exp(np.minimum(z, 700))) + 3)
    return u * error + tiny * (1 + abs(z))


def takes_pairs(packed):
    """Whether products are of pairs of bfloat16, for which x is rounded."""
    return fa.isa() == PAIRS_ISA and packed.dtype == "bfloat16" and packed.shape[1] > 0 and packed.shape[1] % 2 == 0


def expected(x, packed, bias=None, activation=None):
    """What linear is to return, and how far it may be off.

        |z - exact| <= g (sum |x||w| + |b|),    g = gamma_c,  c = min(K, 512) + ceil(K / 512) + 1

    because sums are of at most 512 products from zero, which are added, and the bias to them; a product rounds where
    there is no FMA. Of pairs they are of 1024, and what is denormal counts as 0. In the reference sums have any order:
    c = K + 2. Then |y - exact| <= slope |z - exact| + `activation_error`, slope the activation's largest, and half an
    ulp where 16 bits are written. Pairs of bfloat16 are of rounded x: compared with the result of x rounded here.
    """
    inside = checks.compute_dtype(x.dtype)
    wide = EXACT_IN[inside]
    N, K = packed.shape
    pairs = takes_pairs(packed)
    if pairs:
        x = x.astype(dtype_of("bfloat16"))
    rows, w = x.reshape(math.prod(x.shape[:-1]), K).astype(wide), packed.unpack().astype(wide)
    u = UNIT_ROUNDOFF[inside]
    inner = 2 * INNER if pairs else INNER
    c = K + 2 if fa.isa() == "reference" else min(K, inner) + -(-K // inner) + 1
    with np.errstate(all="ignore"):
        z = rows @ w.T
        size = abs(rows).astype(F64) @ abs(w).astype(F64).T
        lost = K * (PAIRS_TINY if pairs else float(np.finfo(inside).smallest_subnormal))
        if pairs:
            small = [np.where(abs(a) <= PAIRS_TINY, abs(a), 0).astype(F64) for a in (rows, w)]
            if small[0].any() or small[1].any():
                lost = lost + small[0] @ abs(w).T + abs(rows) @ small[1].T
        if bias is not None:
            z, size = z + bias.astype(wide), size + abs(bias).astype(F64)
        error = c * u / (1 - c * u) * size + lost
        y = activated(activation, z)
        allowed = SLOPE[activation] * error + activation_error(activation, z, y, inside)
    shape = (*x.shape[:-1], N)
    return y.reshape(shape), np.asarray(allowed, F64).reshape(shape)


def compare(y, x, packed, bias, activation, context):
    true, allowed = expected(x, packed, bias, activation)
    if y.dtype.name in DIGITS:
        with np.errstate(invalid="ignore"):
            allowed = allowed + ulp(np.where(np.isfinite(true), abs(true) + allowed, 0), y.dtype) / 2
    assert_close(y, true, allowed, context)


def check(x, weight, kept, bias=None, activation=None, seed=None, packed=None, **more):
    """The result of a call, under the bound; inputs not modified."""
    context = {"x": (x.shape, x.dtype.name), "weight": (weight.shape, kept), "bias": bias is not None,
               "activation": activation, "seed": seed, **more}
    arrays = [a for a in (x, weight, bias) if a is not None]
    before = [a.tobytes() for a in arrays]
    packed = fa.pack_weight(weight, kept) if packed is None else packed
    y = fa.linear(x, packed, bias, activation)
    assert y.shape == (*x.shape[:-1], len(weight)) and y.dtype == x.dtype, context
    assert y.ctypes.data % 64 == 0 and y.flags.c_contiguous, context
    assert [a.tobytes() for a in arrays] == before, f"{context}: an input was modified"
    compare(y, x, packed, bias, activation, context)
    return y


def drawn(rng, kind, lead, N, K):
    """x (*lead, K), weight (N, K) of about 1 / sqrt(K) and bias (N,), in the dtypes of the kind."""
    inside = F64 if kind[0] == "float64" else F32
    x = rng.standard_normal((*lead, K)).astype(inside).astype(dtype_of(kind[0]))
    weight = (rng.standard_normal((N, K)) / max(K, 1) ** 0.5).astype(inside)
    return x, weight, rng.standard_normal(N).astype(inside)


def lanes(kind):
    return _runtime.lanes(64 if kind[0] == "float64" else 32) if _runtime.lanes else 64


# --- results ---

@each_kind
@pytest.mark.parametrize("M", [0, 1, 2, 3, 5, 7, 31, 95, 96, 97, 193])
def test_sizes(M, kind, seed):
    of_n, of_activation = itertools.cycle([1, -1, 0, 1, 15, 16, 17, 200, 3]), itertools.cycle(ACTIVATIONS)
    for K in 0, 1, 2, 37, 257, 511, 512, 513, 1100:
        for _ in range(2):
            number = next(of_n)
            N = number + lanes(kind) if abs(number) <= 1 else number
            rng = generator(seed, M, N, K)
            x, weight, bias = drawn(rng, kind, (M,), N, K)
            check(x, weight, kind[1], bias if (N + K) % 3 else None, next(of_activation), seed)


@each_kind
def test_one_output_and_no_output(kind, seed):
    for M, K in itertools.product([1, 7, 97], [1, 6, 300]):
        for N in 1, 0:
            x, weight, bias = drawn(generator(seed, M, K), kind, (M,), N, K)
            assert check(x, weight, kind[1], bias, "gelu", seed).shape == (M, N)
            given = np.full((M, N), NAN, x.dtype)
            assert fa.linear(x, weight, out=given) is given


@each_kind
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_products(activation, kind, seed):
    x, weight, bias = drawn(generator(seed, kind, activation), kind, (97,), 130, 64)
    for factor in 1, 30, 1e-20, 1e-38:  # results of all sizes: where an activation is flat, and denormal ones
        scaled = (factor * bias).astype(bias.dtype)
        check(x, (factor * weight).astype(weight.dtype), kind[1], scaled, activation, seed, factor=factor)
        check(x, (factor * weight).astype(weight.dtype), kind[1], None, activation, seed, factor=factor)


@each_kind
def test_leading_axes(kind, seed):
    for lead in (), (1,), (2, 3), (2, 1, 5), (0, 4), (3, 0):
        x, weight, bias = drawn(generator(seed, lead), kind, lead, 9, 20)
        assert check(x, weight, kind[1], bias, "silu", seed).shape == (*lead, 9)


@each_kind
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCASTS])
def test_strided_inputs(layout, kind, seed):
    moved = {**LAYOUTS, **BROADCASTS}[layout]
    for M, N, K in (100, 70, 40), (5, 17, 301), (3, 64, 16):
        x, weight, bias = drawn(generator(seed, M, N, K), kind, (2, M), N, K)
        spread = np.stack([bias, bias], axis=1)[::-1][::-1, 1] if M > 5 else np.broadcast_to(bias[:1], bias.shape)
        check(moved(x), moved(weight), kind[1], spread, "relu", seed, layout=layout)
        check(moved(x)[0], moved(weight), kind[1], None, None, seed, layout=layout)


@each_kind
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"read-only"}))
def test_out(layout, kind, seed):
    for shape, N, K in ((2, 50), 70, 40), ((3, 1), 65, 7), ((97,), 17, 33):
        x, weight, bias = drawn(generator(seed, shape, N), kind, shape, N, K)
        packed = fa.pack_weight(weight, kind[1])
        right = fa.linear(x, packed, bias, "gelu")
        out = LAYOUTS[layout](np.full((*shape, N), NAN, x.dtype))
        assert fa.linear(x, packed, bias, "gelu", out=out) is out
        assert_same_bits(out, right, {"layout": layout, "kind": kind, "seed": seed})
        # what lies between the elements stays
        memory = np.full((*shape, 2 * N), 7, x.dtype)
        fa.linear(x, packed, bias, "gelu", out=memory[..., ::2])
        assert_same_bits(memory[..., ::2].copy(), right, {"kind": kind})
        assert (memory[..., 1::2] == 7).all()


@pytest.mark.parametrize("kept", ["float32", "bfloat16"])
@pytest.mark.parametrize("given_as", ["float32", "float16", "bfloat16"])
def test_weights_of_16_bits(given_as, kept, seed):
    x, weight, bias = drawn(generator(seed), ("float32", kept), (40,), 70, 34)
    weight = weight.astype(dtype_of(given_as))
    check(x, weight, kept, bias, None, seed)
    plain = fa.pack_weight(weight, kept)
    assert_same_bits(fa.linear(x, plain), fa.linear(x, fa.pack_weight(weight.astype(F32), kept)), {})
    if kept == "float32":  # the default, and what an array that is not packed is taken as
        assert fa.pack_weight(weight).dtype == "float32"
        assert_same_bits(fa.linear(x, weight, bias), fa.linear(x, plain, bias), {})


def test_bfloat16_weights_against_x_as_it_is(seed):
    """Where x is rounded too, an element moves by 2^-8 sum |x||w| at most; elsewhere by nothing."""
    rng = generator(seed)
    for K in 2, 37, 64, 600:
        x, weight, _ = drawn(rng, ("float32", "bfloat16"), (50,), 70, K)
        packed = fa.pack_weight(weight, "bfloat16")
        w = packed.unpack().astype(F64)
        sizes = abs(x).astype(F64) @ abs(w).T
        allowed = (K + 2) * 2.0**-24 * sizes
        if takes_pairs(packed):
            allowed = (PAIRS_ROUNDOFF * (1 + (K + 2) * 2.0**-24) + (K + 2) * 2.0**-24) * sizes
        y = fa.linear(x, packed)
        assert_close(y, x.astype(F64) @ w.T, allowed, {"K": K, "seed": seed})


@pytest.mark.parametrize("dtype", [F32, F64])
def test_long_sums(dtype):
    """Of equal numbers, whose roundings all go one way: in one chain of products they would pass the bound."""
    K = 30_000
    x, weight = np.full((3, K), 0.1, dtype), np.ones((2, K), dtype)
    packed = fa.pack_weight(weight)
    check(x, weight, None, packed=packed)
    if fa.isa() != "reference":
        true, allowed = expected(x, packed)
        assert abs(np.cumsum(x[0])[-1] - true[0, 0]) > allowed[0, 0]


@st.composite
def calls(draw):
    kind = draw(st.sampled_from(KINDS))
    lead = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 40, 100]), max_size=2)))
    N = draw(st.sampled_from([1, 2, 7, 16, 31, 33, 63, 65, 100, 130]))
    K = draw(st.sampled_from([0, 1, 2, 3, 8, 15, 16, 17, 64, 200, 257, 514]))
    layouts = [draw(st.sampled_from(sorted({**LAYOUTS, **BROADCASTS}))) for _ in range(2)]
    return kind, lead, N, K, layouts, draw(st.sampled_from(ACTIVATIONS)), draw(st.booleans()), draw(st.integers(1, 4))


@settings(max_examples=150)
@given(calls())
def test_drawn_calls(seed, call):
    kind, lead, N, K, layouts, activation, with_bias, n_threads = call
    x, weight, bias = drawn(generator(seed, call), kind, lead, N, K)
    moves = {**LAYOUTS, **BROADCASTS}
    x = moves[layouts[0]](x) if x.ndim > 1 else x
    weight, bias = moves[layouts[1]](weight), bias if with_bias else None
    packed = fa.pack_weight(weight, kind[1])
    y = check(x, weight, kind[1], bias, activation, seed, packed=packed, layouts=layouts)
    if fa.isa() != "reference":
        again = fa.linear(x, packed, bias, activation, num_threads=n_threads)
        assert_same_bits(again, y, {"call": call, "seed": seed})


# --- activations, of numbers that products and sums leave as they are ---

def values(rng, dtype):
    info = np.finfo(dtype)
    special = [0, info.smallest_subnormal, info.tiny, 88, 103.5, 710, 745, 1e4, 1e30, info.max, INF]
    x = [dense(rng, dtype, -low, high, 30_000) for low, high in [(45, 45), (3, 3), (1e4, 1e4), (120, 120)]]
    with np.errstate(over="ignore"):
        return np.concatenate([*x, np.array(special, dtype), -np.array(special, dtype), np.array([NAN], dtype)])


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, dtype, seed):
    z = values(np.random.default_rng(seed), dtype)
    for row in False, True:  # along outputs, and along rows
        x, weight = (np.ones((1, 1), dtype), z[:, None]) if row else (z[:, None], np.ones((1, 1), dtype))
        if not row:
            x = x[-20_000:]
        y = fa.linear(x, weight, activation=activation).ravel()
        wide = x.astype(EXACT_IN[np.dtype(dtype)]).ravel() * weight.ravel()
        with np.errstate(all="ignore"):
            true = activated(activation, wide)
            allowed = activation_error(activation, wide, true, dtype)
        assert_close(y, true, allowed, {"activation": activation, "dtype": dtype.__name__, "seed": seed})
        plain = fa.linear(x, weight).ravel()
        assert ((plain == wide) | np.isnan(wide)).all()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_activations_of_special_values(dtype):
    info = np.finfo(dtype)
    z = np.array([[INF], [-INF], [NAN], [info.max], [-info.max], [1e4], [-1e4], [0.0], [-0.0]], dtype)
    one = np.ones((1, 1), dtype)
    known = {  # an infinity below times a factor of 0 is NaN, as in torch; nothing above overflows or is lost
        None: [INF, -INF, NAN, info.max, -info.max, 1e4, -1e4, 0, 0],
        "relu": [INF, 0, NAN, info.max, 0, 1e4, 0, 0, 0],
        **dict.fromkeys(["gelu", "gelu_tanh", "silu"], [INF, NAN, NAN, info.max, 0, 1e4, 0, 0, 0]),
    }
    for activation, right in known.items():
        got = fa.linear(z, one, activation=activation).ravel()
        np.testing.assert_array_equal(got, np.array(right, dtype), err_msg=f"isa={fa.isa()}, {activation}")


def test_gelu_against_scipy(seed):
    """Of another library's normal distribution function; it is exact to 1e-13, relatively, in its tests."""
    special = pytest.importorskip("scipy.special", reason="scipy is not installed")
    z = dense(np.random.default_rng(seed), F32, -12, 12, 100_000)
    true = z.astype(F64) * special.ndtr(z.astype(F64))
    y = fa.linear(np.ones((1, 1), F32), z[:, None], activation="gelu").ravel()
    assert_close(y, true, activation_error("gelu", z, true, F32), {"seed": seed})


def test_slopes_are_at_most_what_the_bound_takes():
    z = np.linspace(-12, 12, 100_001)
    for activation, slope in SLOPE.items():
        y = activated(activation, z.astype(np.longdouble))
        steepest = float(abs(np.diff(y) / np.diff(z)).max())
        assert 0.99 * slope <= steepest <= slope, (activation, steepest)


# --- NaN and Inf ---

@each_kind
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_row_and_column(poison, kind, seed):
    for (M, N, K), activation in itertools.product([(97, 70, 40), (5, 17, 601), (3, 64, 16)], [None, "relu", "silu"]):
        rng = generator(seed, M, activation)
        x, weight, bias = drawn(rng, kind, (M,), N, K)
        right = fa.linear(x, fa.pack_weight(weight, kind[1]), bias, activation)
        for where in "x", "weight", "bias":
            a, w, b = x.copy(), weight.copy(), bias.copy()
            row, column, k = (int(rng.integers(n)) for n in (M, N, K))
            touched = np.zeros((M, N), bool)
            if where == "x":
                a[row, k] = poison
                touched[row] = True
            else:
                touched[:, column] = True
                if where == "weight":
                    w[column, k] = poison
                else:
                    b[column] = poison
            y = check(a, w, kind[1], b, activation, seed, poisoned=where)
            assert np.isnan(y[touched]).all() or poison == poison
            if fa.isa() != "reference":
                assert_same_bits(y[~touched], right[~touched], {"kind": kind, "where": where, "seed": seed})
        both = x.copy()
        both[0, :2] = poison, -poison
        check(both, weight, kind[1], bias, activation, seed, poisoned="both signs")


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_results_past_16_bits_are_infinite(name):
    dtype = dtype_of(name)
    x = np.array([[3.0, -3.0]], dtype)
    largest = 65504.0 if name == "float16" else 3.3895e38
    y = fa.linear(x, np.array([[largest, 0], [0, largest]], F32)).astype(F32)
    np.testing.assert_array_equal(y, [[INF, -INF]])


# --- packed weights ---

@pytest.mark.parametrize("kept", ["float32", "float64", "bfloat16"])
def test_unpack_and_copies(kept, seed):
    for N, K in [(1, 1), (63, 7), (64, 8), (65, 600), (0, 4), (4, 0), (0, 0), (200, 2)]:
        weight = generator(seed, N, K).standard_normal((N, K)).astype(F64 if kept == "float64" else F32)
        if weight.size > 3:
            weight.flat[:3] = NAN, INF, -0.0
        given = weight.copy()
        packed = fa.pack_weight(given, kept)
        given[...] = 5
        right = weight if kept != "bfloat16" else weight.astype(dtype_of("bfloat16")).astype(F32)
        assert packed.shape == (N, K) and packed.dtype == kept
        assert repr(packed) == f"PackedWeight(shape={(N, K)}, dtype={kept!r})"
        copies = [packed, pickle.loads(pickle.dumps(packed)), copy.copy(packed), copy.deepcopy(packed)]
        x = generator(seed).standard_normal((3, K)).astype(weight.dtype)
        for one in copies:
            assert (one.shape, one.dtype) == (packed.shape, packed.dtype)
            np.testing.assert_array_equal(one.unpack(), right)
            assert one.unpack().dtype == right.dtype
            assert_same_bits(fa.linear(x, one), fa.linear(x, packed), {"kept": kept, "shape": (N, K)})
        packed.unpack()[...] = 5
        np.testing.assert_array_equal(packed.unpack(), right)


@pytest.mark.parametrize("isa", _runtime.available)
def test_pickles_of_another_instruction_set(isa, tmp_path, seed):
    rng = generator(seed)
    weights = [rng.standard_normal((65, 12)).astype(dtype) for dtype in (F32, F64, F32)]
    packed = [fa.pack_weight(w, kept) for w, kept in zip(weights, ["float32", "float64", "bfloat16"])]
    (tmp_path / "weights").write_bytes(pickle.dumps(packed))
    code = """
import pickle, sys
import numpy as np
import fastattn as fa
for w in pickle.load(open(sys.argv[1], "rb")):
    y = fa.linear(np.ones((2, 12), w.unpack().dtype), w)    # of small integers and halves, so exact
    print(w.dtype, w.unpack().tobytes().hex(), y.shape)
"""
    lines = script(code, tmp_path / "weights", FASTATTN_ISA=isa).splitlines()
    assert lines == [f"{w.dtype} {w.unpack().tobytes().hex()} (2, 65)" for w in packed]


def test_rounding_to_bfloat16(seed):
    """Of all upper halves, and lower halves at, beside and between the ties, as ml_dtypes does."""
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    x = ((np.arange(2**16, dtype=np.uint32) << 16)[:, None] | low).view(F32)
    bits, right = layer.round_to_bfloat16(x), x.astype(dtype_of("bfloat16"))
    nan = np.isnan(x)
    np.testing.assert_array_equal(bits[~nan], right.view(np.uint16)[~nan])
    assert np.isnan(bits.view(right.dtype).astype(F32)[nan]).all()


# --- bits ---

@pytest.mark.compiled
@each_kind
def test_bits(kind, seed):
    """Of a row they depend on that row alone; of an element on that row and its outputs' weights."""
    for M, N, K in (193, 200, 300), (40, 70, 513), (5, 1000, 64):
        x, weight, bias = drawn(generator(seed, M), kind, (M,), N, K)
        for activation in ACTIVATIONS:
            packed = fa.pack_weight(weight, kind[1])
            context = {"kind": kind, "size": (M, N, K), "activation": activation, "seed": seed}
            whole = fa.linear(x, packed, bias, activation, num_threads=1)
            for n in 2, 3, 5:
                assert_same_bits(fa.linear(x, packed, bias, activation, num_threads=n), whole, {**context, "n": n})
            for rows in [slice(i, i + 1) for i in (0, 1, M // 2, M - 1)] + [slice(3), slice(2, M), slice(1, 39)]:
                got = fa.linear(x[rows], packed, bias, activation)
                assert_same_bits(got, whole[rows], {**context, "rows": rows})
            for outputs in slice(1), slice(3, 4), slice(N - 1, N), slice(2, 66), slice(1, N):
                got = fa.linear(x, fa.pack_weight(weight[outputs], kind[1]), bias[outputs], activation)
                assert_same_bits(got, whole[:, outputs].copy(), {**context, "outputs": outputs})
        for layout, moved in LAYOUTS.items():
            got = fa.linear(moved(x), fa.pack_weight(moved(weight), kind[1]), bias, activation)
            assert_same_bits(got, whole, {**context, "layout": layout})
        assert_same_bits(fa.linear(x[:, None], packed, bias, activation)[:, 0], whole, context)
        one = fa.linear(x[1], packed, bias, activation)
        assert_same_bits(one, whole[1], context)


@pytest.mark.compiled
def test_calls_from_many_threads_give_the_bits_of_serial_calls(seed):
    jobs = []
    for kind, M, n in itertools.product(KINDS, [1, 50, 200], [None, 1, 3]):
        x, weight, bias = drawn(generator(seed, kind, M), kind, (M,), 150, 64)
        packed = fa.pack_weight(weight, kind[1])
        jobs.append((x, weight, packed, bias, n, fa.linear(x, packed, bias, "gelu")))
    begin = threading.Barrier(4)

    def work(number):
        begin.wait()
        for x, weight, packed, bias, n, right in jobs[number:] + jobs[:number]:
            assert_same_bits(fa.linear(x, packed, bias, "gelu", num_threads=n), right, {"n": n})
            again = fa.pack_weight(weight, packed.dtype)
            assert_same_bits(fa.linear(x, again, bias, "gelu", num_threads=n), right, {"n": n, "packed": "here"})

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(work, 7 * i) for i in range(4)]:
            done.result()


# --- the reference ---

@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_reference_against_scalar_loops(activation, dtype, seed):
    rng = generator(seed, activation)
    for M, N, K in (3, 4, 5), (1, 1, 1), (2, 3, 0), (0, 2, 3):
        x, weight = rng.standard_normal((M, K)).astype(dtype), rng.standard_normal((N, K)).astype(dtype)
        bias = rng.standard_normal(N).astype(dtype)
        right = np.zeros((M, N))
        for i, n in np.ndindex(M, N):
            z = float(bias[n]) + math.fsum(float(x[i, k]) * float(weight[n, k]) for k in range(K))
            right[i, n] = {None: z, "relu": max(z, 0), "gelu": z / 2 * (1 + math.erf(z / math.sqrt(2))),
                           "gelu_tanh": z / 2 * (1 + math.tanh((2 / math.pi) ** 0.5 * (z + 0.044715 * z**3))),
                           "silu": z / (1 + math.exp(-z))}[activation]
        with np.errstate(all="raise"):
            y = reference.linear(x, reference.pack_weight(weight), bias, activation)
        assert y.dtype == dtype and y.ctypes.data % 64 == 0
        assert_close(y, right, 16 * np.finfo(dtype).eps * (K + 1), {"activation": activation, "seed": seed})


def test_reference_takes_the_kernels_weights_and_the_other_way_round(seed):
    for kind in KINDS:
        x, weight, bias = drawn(generator(seed), kind, (9,), 70, 20)
        ours, its = fa.pack_weight(weight, kind[1]), reference.pack_weight(weight, kind[1])
        np.testing.assert_array_equal(ours.unpack(), its.unpack())
        right = reference.linear(x, its, bias, "gelu")
        assert_same_bits(reference.linear(x, ours, bias, "gelu"), right, {"kind": kind})
        assert_same_bits(fa.linear(x, its, bias, "gelu"), right, {"kind": kind})
        out = np.full((9, 70), NAN, x.dtype)
        assert reference.linear(x, ours, bias, "gelu", out=out) is out
        assert_same_bits(out, right, {"kind": kind})
        assert not np.shares_memory(its.unpack(), weight)


@each_module
def test_nothing_is_reported(module):
    """NumPy's warnings of overflow, NaN and underflow stay inside."""
    x = np.array([[INF, 1e30], [NAN, 0], [1e-40, -1e-40], [-1e30, 1e30]], F32)
    with np.errstate(all="raise"):
        for activation in ACTIVATIONS:
            for kept in "float32", "bfloat16":
                module.linear(x, module.pack_weight(x, kept), x[:, 0].copy(), activation)
                module.linear(x.astype(dtype_of("bfloat16")), module.pack_weight(x, kept), None, activation)
                module.linear(np.ones((2, 2), F16), module.pack_weight(x, kept), None, activation)
            module.linear(x.astype(F64), x.astype(F64), None, activation)


def test_same_signatures():
    for name in "linear", "pack_weight":
        assert inspect.signature(getattr(fa, name)) == inspect.signature(getattr(reference, name))


def test_docstrings(monkeypatch):
    monkeypatch.undo()  # doctest leaves out what another module defines, and poisoned_results does
    failed, attempted = doctest.testmod(layer)
    assert attempted and not failed


# --- arguments ---

def good():
    return {"x": np.ones((2, 3, 8), F32), "weight": np.ones((5, 8), F32), "bias": np.ones(5, F32),
            "out": np.full((2, 3, 5), NAN, F32)}


def sharing(name):
    """out begins with the bytes of another argument."""
    def spoil(a):
        memory = np.zeros(max(a["out"].nbytes, a[name].nbytes), np.uint8)
        a[name] = memory[:a[name].nbytes].view(F32).reshape(a[name].shape)
        a["out"] = memory[:a["out"].nbytes].view(F32).reshape(a["out"].shape)
    return spoil


def strided_bias_in_out(a):
    a["bias"] = a["out"].reshape(-1)[::6]
    a["bias"][...] = 1


def repeated(a):
    a["out"] = np.lib.stride_tricks.as_strided(a["out"], strides=(0, 20, 4))


def read_only(a):
    a["out"].flags.writeable = False


T, V = TypeError, ValueError
REALS = "float32, float64, float16 or bfloat16 in native byte order"
LAYOUT = r"must have an address and strides that are multiples of its item size of 4 bytes, got address 0x\w+ and .*"

BAD = [
    ("no x", {"x": None}, T, "x must be an array, got NoneType"),
    ("ragged x", {"x": [[1.0], [1.0, 2.0]]}, T, r"x must be an array that NumPy can read, got list \(.*\)"),
    ("masked x", {"x": masked(zeros(3, 8))}, T, "x must be an array without a mask of its own, got a masked array"),
    ("int x", {"x": zeros(3, 8, dtype=np.int32)}, T, f"x must be {REALS}, got int32"),
    ("bool x", {"x": zeros(3, 8, dtype=bool)}, T, f"x must be {REALS}, got bool"),
    ("complex x", {"x": zeros(3, 8, dtype=np.complex64)}, T, f"x must be {REALS}, got complex64"),
    ("swapped x", {"x": zeros(3, 8).astype(np.dtype(F32).newbyteorder("S"))}, T, f"x must be {REALS}, got [<>]f4"),
    ("float64 x", {"x": zeros(3, 8, dtype=F64)}, T, "weight must be float64 with x of float64, got float32"),
    ("scalar x", {"x": F32(1)}, V, r"x must have shape \(..., 8\), as weight has 8 inputs, got \(\)"),
    ("shape of x", {"x": zeros(3, 7)}, V, r"x must have shape \(..., 8\), as weight has 8 inputs, got \(3, 7\)"),
    ("misaligned x", {"x": misaligned((2, 3, 8))}, V, f"x {LAYOUT}"),
    ("torn x", {"x": torn((2, 3, 8))}, V, f"x {LAYOUT}"),
    ("no weight", {"weight": None}, T, "weight must be an array, got NoneType"),
    ("int weight", {"weight": zeros(5, 8, dtype=np.int64)}, T, f"weight must be {REALS}, got int64"),
    ("float64 weight", {"weight": zeros(5, 8, dtype=F64)}, T,
     "weight must be float32 or bfloat16 with x of float32, got float64"),
    ("packed float64", {"weight": fa.pack_weight(zeros(5, 8, dtype=F64))}, T,
     "weight must be float32 or bfloat16 with x of float32, got float64"),
    ("axes of weight", {"weight": zeros(8)}, V, r"weight must have shape \(N, K\), got \(8,\)"),
    ("three axes", {"weight": zeros(1, 5, 8)}, V, r"weight must have shape \(N, K\), got \(1, 5, 8\)"),
    ("inputs", {"weight": zeros(5, 9)}, V, r"x must have shape \(..., 9\), as weight has 9 inputs, got \(2, 3, 8\)"),
    ("dtype of bias", {"bias": zeros(5, dtype=F64)}, T, "bias must be float32, got float64"),
    ("16-bit bias", {"bias": zeros(5, dtype=F16)}, T, "bias must be float32, got float16"),
    ("list", {"bias": [1.0] * 5}, T, "bias must be float32, got float64"),
    ("shape of bias", {"bias": zeros(6)}, V, r"bias must have shape \(5,\), got \(6,\)"),
    ("axes of bias", {"bias": zeros(1, 5)}, V, r"bias must have shape \(5,\), got \(1, 5\)"),
    ("scalar bias", {"bias": F32(1)}, V, r"bias must have shape \(5,\), got \(\)"),
    ("activation", {"activation": "tanh"}, V, r"activation must be one of \(None, 'relu', .*\), got 'tanh'"),
    ("case", {"activation": "GELU"}, V, "activation must be one of .*, got 'GELU'"),
    ("function", {"activation": max}, V, "activation must be one of .*, got <built-in function max>"),
    ("unhashable", {"activation": ["relu"]}, V, r"activation must be one of .*, got \['relu'\]"),
    ("number", {"activation": 1}, V, "activation must be one of .*, got 1"),
    ("threads", {"num_threads": 0}, V, "num_threads must be at least 1, got 0"),
    ("real threads", {"num_threads": 1.0}, T, "num_threads must be an integer, got float"),
    ("bool threads", {"num_threads": True}, T, "num_threads must be an integer, got bool"),
    ("list out", {"out": [[1.0]]}, T, "out must be a NumPy array, got list"),
    ("dtype of out", {"out": zeros(2, 3, 5, dtype=F64)}, V, "out must have x's dtype float32, got float64"),
    ("shape of out", {"out": zeros(6, 5)}, V, r"out must have shape \(2, 3, 5\), got \(6, 5\)"),
    ("read-only out", read_only, V, "out must be writeable, got a read-only array"),
    ("misaligned out", {"out": misaligned((2, 3, 5))}, V, f"out {LAYOUT}"),
    ("torn out", {"out": torn((2, 3, 5))}, V, f"out {LAYOUT}"),
    ("out on itself", repeated, V, r"out must not overlap itself, got strides \(0, 20, 4\) for shape \(2, 3, 5\)"),
    ("x in out", sharing("x"), V, "out must not overlap the inputs, got memory shared with x"),
    ("bias in out", sharing("bias"), V, "out must not overlap the inputs, got memory shared with bias"),
    ("strided bias in out", strided_bias_in_out, V, "out must not overlap the inputs, got memory shared with bias"),
]


@each_module
@pytest.mark.parametrize("spoil, error, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_argument(spoil, error, message, module):
    a = good()
    module.linear(**a)  # the spoilt argument is the reason
    a = good()
    spoil(a) if callable(spoil) else a.update(spoil)
    arrays = [value for value in a.values() if isinstance(value, np.ndarray)]
    before = [value.tobytes() for value in arrays]
    with pytest.raises(error) as caught:
        module.linear(**a)
    assert type(caught.value) is error and re.fullmatch(message, str(caught.value)), str(caught.value)
    assert [value.tobytes() for value in arrays] == before


PACKING = [
    ({"weight": object()}, T, "weight must be an array, got object"),
    ({"weight": masked(zeros(5, 8))}, T, "weight must be an array without a mask of its own, got a masked array"),
    ({"weight": zeros(5, 8, dtype=np.uint8)}, T, f"weight must be {REALS}, got uint8"),
    ({"weight": zeros(5, 8).astype(np.dtype(F32).newbyteorder("S"))}, T, f"weight must be {REALS}, got [<>]f4"),
    ({"weight": zeros()}, V, r"weight must have shape \(N, K\), got \(\)"),
    ({"weight": zeros(2, 2, 2)}, V, r"weight must have shape \(N, K\), got \(2, 2, 2\)"),
    ({"dtype": "float16"}, V, r"dtype must be one of \('float32', 'bfloat16'\) for a weight of float32, got 'float16'"),
    ({"dtype": "int8"}, V, "dtype must be one of .*, got 'int8'"),
    ({"dtype": "float64"}, V, "dtype must be one of .* for a weight of float32, got 'float64'"),
    ({"dtype": F32}, V, "dtype must be one of .*, got <class 'numpy.float32'>"),
    ({"weight": zeros(5, 8, dtype=F64), "dtype": "float32"}, V,
     r"dtype must be one of \('float64',\) for a weight of float64, got 'float32'"),
    ({"weight": zeros(5, 8, dtype=F64), "dtype": "bfloat16"}, V, "dtype must be one of .*, got 'bfloat16'"),
]


@each_module
@pytest.mark.parametrize("spoil, error, message", PACKING, ids=str)
def test_bad_weight(spoil, error, message, module):
    with pytest.raises(error) as caught:
        module.pack_weight(**({"weight": zeros(5, 8)} | spoil))
    assert type(caught.value) is error and re.fullmatch(message, str(caught.value)), str(caught.value)


@each_module
def test_result_past_memory(module):
    huge = np.broadcast_to(F32(0), (2**50, 1))
    with pytest.raises(MemoryError, match=r"no memory for a result of shape \(\d+, 1\) and dtype float32"):
        module.linear(huge, zeros(1, 1))


@each_module
def test_good_forms(module, seed):
    rng = generator(seed)
    x, weight, bias = drawn(rng, ("float32", "float32"), (6,), 5, 8)
    right = module.linear(x, weight, bias)
    packed = module.pack_weight(weight)
    for same in [(Dlpack(x), Dlpack(weight), Dlpack(bias)), (memoryview(x), memoryview(weight), memoryview(bias)),
                 (x.view(np.recarray), packed, bias), (x, module.pack_weight(weight, "float32"), bias)]:
        assert_same_bits(module.linear(*same), right, {})
    for options in {"num_threads": 1}, {"num_threads": np.int8(2)}, {"num_threads": 2**80}, {"activation": None}:
        assert_same_bits(module.linear(x, packed, bias, **options), right, {"options": options})
    for moved in misaligned, torn:  # the weight and the bias are copied, so they may lie anywhere
        w, b = moved(weight.shape), moved(bias.shape)
        w[...], b[...] = weight, bias
        assert_same_bits(module.linear(x, w, b), right, {"moved": moved.__name__})
    got = module.linear([[1.0, 2.0]], [[3.0, 4.0]], np.array([5.0]), "relu")
    assert got.dtype == F64 and got.tolist() == [[16.0]]
    with pytest.raises(TypeError, match="positional"):
        module.linear(x, packed, bias, None, np.empty((6, 5), F32))
    half = module.linear(bfloat16(2, 8), packed)
    assert half.dtype.name == "bfloat16"


@each_module
def test_out_beside_the_inputs(module):
    """Memory ranges that overlap without a shared element are fine."""
    memory = np.ones((6, 16), F32)
    weight = np.ones((8, 8), F32)
    out = memory[:, 1::2]
    assert module.linear(memory[:, ::2], weight, out=out) is out
    assert (out == 8).all() and (memory[:, ::2] == 1).all()


# --- the comparison must see wrong results ---

WRONG = {
    "one element": lambda y, true, allowed, a: np.copyto(y[3, 4:5], true[3, 4:5] + 3 * allowed[3, 4:5]),
    "NaN": lambda y, true, allowed, a: y.__setitem__((3, 4), NAN),
    "zeros": lambda y, true, allowed, a: y.fill(0),
    "rows": lambda y, true, allowed, a: np.copyto(y, np.roll(y, 1, axis=0)),
    "outputs": lambda y, true, allowed, a: np.copyto(y, np.roll(y, 1, axis=1)),
    "no bias": lambda y, true, allowed, a: np.copyto(y, fa.linear(*a[:2], None, a[3])),
    "no activation": lambda y, true, allowed, a: np.copyto(y, fa.linear(*a[:3])),
    "the other gelu": lambda y, true, allowed, a: np.copyto(y, fa.linear(*a[:3], "gelu_tanh")),
    "one product less": lambda y, true, allowed, a: np.copyto(y, without_last(*a)),
    "bfloat16": lambda y, true, allowed, a: np.copyto(y, fa.linear(a[0], fa.pack_weight(a[1], "bfloat16"), *a[2:])),
    "float16": lambda y, true, allowed, a: np.copyto(y, y.astype(F16)),
    "transposed": lambda y, true, allowed, a: np.copyto(y, fa.linear(a[0], a[1].T, *a[2:])),
}


def without_last(x, weight, bias, activation):
    x = x.copy()
    x[:, -1] = 0
    return fa.linear(x, weight, bias, activation)


@pytest.mark.parametrize("wrong", WRONG)
def test_comparison_rejects(wrong, seed):
    x, weight, bias = drawn(generator(seed), ("float32", "float32"), (40,), 96, 96)
    packed = fa.pack_weight(weight)
    arguments = x, weight, bias, "gelu"
    y = fa.linear(*arguments)
    true, allowed = expected(x, packed, bias, "gelu")
    compare(y, x, packed, bias, "gelu", {"case": "right"})
    assert (allowed > 0).all() and (allowed < 100 * 2.0**-23 * 6 * (1 + abs(true))).all()    # sum |x||w| is about 6
    WRONG[wrong](y, true, allowed, arguments)
    with pytest.raises(AssertionError, match="worst at"):
        compare(y, x, packed, bias, "gelu", {"case": wrong})


@pytest.mark.parametrize("activation", ["gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_comparison_of_activations_rejects(activation, dtype):
    z = np.linspace(-8, 8, 1001).astype(dtype).astype(EXACT_IN[np.dtype(dtype)])
    true = activated(activation, z)
    allowed = activation_error(activation, z, true, dtype)
    others = [activated(other, z) for other in ACTIVATIONS if other != activation]
    for wrong in [*others, true * (1 + 100 * np.finfo(dtype).eps), activated(activation, z * (1 + 2.0**-18))]:
        with pytest.raises(AssertionError, match="worst at"):
            assert_close(wrong.astype(dtype), true, allowed, {})
