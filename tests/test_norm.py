"""LayerNorm and RMSNorm: the definition in wider arithmetic, under an a-priori bound; bits, NaN, arguments."""

import itertools
import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from cases import EXACT_IN, UNIT_ROUNDOFF, assert_close, generator, ulp
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import BROADCASTS, LAYOUTS, assert_same_bits
from test_checks import misaligned, torn
from test_half import dtype_of

import fastattn as fa
from fastattn import _runtime, checks, nn, reference
from fastattn.layer import normalise

NAN, INF = np.nan, np.inf
F16, F32, F64 = np.float16, np.float32, np.float64

DTYPES = ["float32", "float64", "float16", "bfloat16"]
each_dtype = pytest.mark.parametrize("name", DTYPES)
each_norm = pytest.mark.parametrize("centre", [True, False], ids=["LayerNorm", "RMSNorm"])
OPTIONS = list(itertools.product(*[[True, False]] * 3))  # weight, bias, add

SUMMED = 32  # vectors that are summed from zero
VECTOR = {"avx512_bf16": 64, "avx512": 64, "avx2": 32}  # bytes; 16 of others


# --- the definition, and how far a result may be from it ---

def depth(N, inside):
    """Additions that a term of a sum goes through: of a lane's part, of parts, of lanes; in the reference any."""
    if fa.isa() == "reference":
        return N
    lanes = VECTOR.get(fa.isa(), 16) // inside.itemsize
    return min(-(-N // lanes), SUMMED) + -(-N // (SUMMED * lanes)) + int(math.log2(lanes))


def expected(x, add, weight, bias, eps, centre):
    """Rows of s = x + add normalised; how far a result may be off; and s, rounded as it is before anything else.

    In arithmetic of roundoff u, with g_k = k u / (1 - k u) and c the `depth` of a sum, N terms s with mean m,
    z = s - m and v = mean z^2, or for RMSNorm z = s and v = mean s^2:

        mean       is off by r <= g_{c+1} mean |s|;  d = s - (m + r) then has mean r and mean square Q^2 = v + r^2
        mean d     is off by e <= g_{c+2} Q: of a sum of d, each rounded, and mean |d| <= Q
        variance   mean d^2 by g_{c+4} Q^2: d twice, its square, the sum, the division; (mean d)^2 by 2 r e + e^2; the
                   difference of both and its rounding by 3 u (Q^2 + (r + e)^2)
        z          |z' - z| <= u (|z| + r) + e: of d, and of mean d. No r: what is left of the mean is subtracted
        factor     f = 1 / sqrt(v + eps) by (1 - E / (v + eps))^(-1/2) - 1, E the error of the variance
        out        z f w + b: seven roundings of z f w, of f (four at most), z', and the products; one of the sum

    So a mean that is large beside the deviation costs nothing to first order. The reference, in float64, does not
    subtract what is left: z is off by r more, the variance by r^2; and its results are rounded. RMSNorm has r = e = 0,
    and z exact. What is denormal adds a few of the smallest numbers.
    """
    inside = checks.compute_dtype(x.dtype)
    of_reference = fa.isa() == "reference"
    within = np.dtype(F64) if of_reference else inside
    wide = EXACT_IN[within]
    u, c = UNIT_ROUNDOFF[within], depth(x.shape[-1], within)
    tiny = float(np.finfo(within).smallest_subnormal)

    def g(k):
        return k * u / (1 - k * u)

    with np.errstate(all="ignore"):
        s = x.astype(within) if add is None else x.astype(within) + add.astype(within)
        z = s.astype(wide)
        mean = z.mean(axis=-1, keepdims=True)
        z = z - mean if centre else z
        v = np.square(z).mean(axis=-1, keepdims=True)
        f = 1 / np.sqrt(v + wide(eps))
        w = wide(1) if weight is None else weight.astype(wide)
        y = z * f * w
        y = y if bias is None else y + bias.astype(wide)

        size, v, f, w = abs(z).astype(F64), v.astype(F64), f.astype(F64), abs(w)
        if centre:
            r = g(c + 1) * abs(s).astype(F64).mean(axis=-1, keepdims=True) + tiny
            square = v + r**2
            e = 0 if of_reference else g(c + 2) * np.sqrt(square) + tiny
            of_v = g(c + 4) * square + (r**2 if of_reference else 2 * r * e + e**2 + 3 * u * (square + (r + e) ** 2))
            of_z = u * (size + r) + (r if of_reference else e)
        else:
            of_v, of_z = g(c + 2) * v, 0
        lost = np.where(np.isinf(v), 0, (of_v + 2 * tiny) / (v + eps))  # a factor of 0 is exact
        of_f = np.expm1(-0.5 * np.log1p(-np.where(lost < 1, lost, NAN)) + 7 * np.log1p(u))
        w = w.astype(F64)
        off = f * of_z
        allowed = w * ((f * size + off) * of_f + off) + 2 * tiny * (1 + w)
        if bias is not None:
            allowed = allowed + u * (abs(y).astype(F64) + allowed)
        if of_reference:
            allowed = allowed + UNIT_ROUNDOFF[inside] * (abs(y).astype(F64) + allowed)
            allowed += float(np.finfo(inside).smallest_subnormal)
    return y, np.broadcast_to(np.asarray(allowed, F64), y.shape), s


def compare(out, y, allowed, context):
    if out.dtype.itemsize == 2:
        with np.errstate(all="ignore"):
            allowed = allowed + ulp(np.where(np.isfinite(y), abs(y) + allowed, 0), out.dtype) / 2
    assert_close(out, y, allowed, context)


def check(x, add, weight, bias, eps, centre, **context):
    """`normalise` under the bound; x + add to the bit; inputs not modified."""
    context = {"x": (x.shape, x.dtype.name), "add": add is not None, "weight": weight is not None,
               "bias": bias is not None, "eps": eps, "centre": centre, **context}
    arrays = [a for a in (x, add, weight, bias) if a is not None]
    before = [a.tobytes() for a in arrays]
    out, total = normalise(x, weight, bias, eps, centre, add)
    assert out.shape == total.shape == x.shape and out.dtype == total.dtype == x.dtype, context
    assert out.flags.c_contiguous and not any(np.may_share_memory(out, a) for a in arrays), context
    assert [a.tobytes() for a in arrays] == before, f"{context}: an input was modified"
    y, allowed, s = expected(x, add, weight, bias, eps, centre)
    compare(out, y, allowed, context)
    if add is None:
        assert total is x
    else:
        assert not np.may_share_memory(total, out)
        with np.errstate(over="ignore"):
            right = s.astype(x.dtype)
        np.testing.assert_array_equal(total.astype(F64), right.astype(F64), err_msg=str(context))
    return out


def drawn(rng, name, shape, options=(True, True, True)):
    """x, add, weight and bias, those of `options`; x of the dtype and the others of the dtype it is computed in."""
    inside = F64 if name == "float64" else F32
    N = shape[-1]
    x, add = (rng.standard_normal(shape).astype(inside).astype(dtype_of(name)) for _ in range(2))
    weight, bias = (rng.standard_normal(N).astype(inside) for _ in range(2))
    weight, bias, add = (a if is_given else None for a, is_given in zip((weight, bias, add), options))
    return x, add, weight, bias


# --- results ---

@each_dtype
@each_norm
@pytest.mark.parametrize("N", [1, 2, 15, 16, 17, 31, 33, 384, 511, 512, 513, 5000, 70_000])
def test_sizes(N, centre, name, seed):
    options = itertools.cycle(OPTIONS)
    for M in [0, 1, 15, 16, 17, 63, 64, 65, 200] if N < 5000 else [1, 17] if N == 5000 else [2]:
        for _ in range(3):
            chosen = next(options)
            x, add, weight, bias = drawn(generator(seed, M, N, chosen), name, (M, N), chosen)
            check(x, add, weight, bias, 1e-5, centre, seed=seed)


@pytest.mark.parametrize("dtype", [F32, F64])
def test_sums_are_short(dtype):
    """Of equal numbers, whose roundings all go one way: one chain of squares would pass the bound."""
    x = np.full((3, 70_000), 0.1, dtype)
    check(x, None, None, None, 0.0, False)
    if fa.isa() != "reference":
        y, allowed, _ = expected(x, None, None, None, 0.0, False)
        chain = x[0] / np.sqrt(np.cumsum(np.square(x[0]))[-1] / dtype(x.shape[1]))
        assert (abs(chain - y[0]) > allowed[0]).all()


@each_dtype
@pytest.mark.parametrize("N", [16, 33, 512, 5000])
def test_a_mean_that_is_large_beside_the_deviation(N, name, seed):
    for mean, eps in itertools.product([1e4, -1e4, 1e2], [1e-5, 0.0]):
        x, add, weight, bias = drawn(generator(seed, N), name, (20, N))
        x = (x.astype(F64) + mean).astype(x.dtype)
        if not eps and x.dtype.itemsize == 2:
            continue  # nothing but the mean may be left
        check(x, None, weight, bias, eps, True, mean=mean, seed=seed)
        check(x, add, weight, bias, eps, True, mean=mean, seed=seed)
        check(x, None, weight, None, eps, False, mean=mean, seed=seed)


def test_bound_sees_what_a_large_mean_costs(seed):
    """The variance as a difference of two means, or deviations from the rounded mean, would pass the bound."""
    if fa.isa() == "reference":
        pytest.skip("it has float64, whose roundings do not show")
    x = (generator(seed).standard_normal((50, 512)) + 1e4).astype(F32)
    y, allowed, _ = expected(x, None, None, None, 1e-5, True)
    mean = np.cumsum(x, axis=1, dtype=F32)[:, -1:] / F32(512)
    one_pass = np.square(x).mean(axis=1, keepdims=True) - mean**2
    for var in one_pass, np.square(x - mean).mean(axis=1, keepdims=True):
        with np.errstate(invalid="ignore"):
            other = (x - mean) / np.sqrt(np.maximum(var, 0) + F32(1e-5))
        assert not (abs(other - y) <= allowed).all()


@pytest.mark.parametrize("name", ["float32", "float64", "bfloat16"])
@each_norm
def test_huge_tiny_and_constant_rows(centre, name, seed):
    inside = checks.compute_dtype(dtype_of(name))
    info = np.finfo(inside)
    x, _, weight, bias = drawn(generator(seed), name, (20, 300))
    # 20 squares of the square root of the largest number over 600, and their sum, are in range.
    for factor in (float(info.max) / 600) ** 0.5 / 6, 1e-3, float(info.tiny) ** 0.5, float(info.tiny), 1e-20, 0:
        scaled = (x.astype(inside) * inside.type(factor)).astype(x.dtype)
        for eps in 1e-5, 1e-12:
            check(scaled, None, weight, bias, eps, centre, factor=factor, seed=seed)
            check(scaled, scaled, None, None, eps, centre, factor=factor, seed=seed)
    for constant in 0.0, 3.0, -0.1, 1e4 / 3, float(info.smallest_subnormal):
        same = np.full((17, 300), constant, inside).astype(x.dtype)
        check(same, None, weight, bias, 1e-5, centre, constant=constant)


@pytest.mark.compiled
@each_norm
def test_rows_whose_squares_overflow_become_zeros(centre, seed):
    """An infinite variance, so a factor of 0: as in torch. The reference has float64."""
    for dtype, factor in (F32, 1e19), (F64, 1e154):
        x, add, weight, bias = drawn(generator(seed), np.dtype(dtype).name, (40, 512))
        right = normalise(x, weight, bias, 1e-5, centre)[0]
        x[7] *= dtype(factor)
        for w, b in (None, None), (weight, None), (weight, bias):
            out = normalise(x, w, b, 1e-5, centre)[0]
            np.testing.assert_array_equal(out[7], 0 if b is None else bias)
        assert_same_bits(np.delete(out, 7, 0), np.delete(right, 7, 0), {"dtype": dtype})


@each_norm
def test_no_eps(centre):
    """Where the variance is 0, eps decides: with none 0 / 0 is NaN, as in torch."""
    for dtype, value in itertools.product([F32, F64], [0.0, 3.0, -1.5]):
        x = np.full((3, 100), value, dtype)
        x[1, 3] += 1
        out = normalise(x, None, None, 0.0, centre)[0]
        no_variance = [centre or value == 0, False, centre or value == 0]
        np.testing.assert_array_equal(np.isnan(out), np.broadcast_to(np.array(no_variance)[:, None], x.shape))
        np.testing.assert_array_equal(normalise(x, None, None, 1e-5, True)[0][0], 0)


@each_dtype
@each_norm
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_nan_and_inf_stay_in_their_row(poison, centre, name, seed):
    for M, N in (65, 33), (3, 600), (17, 1):
        rng = generator(seed, M)
        x, add, weight, bias = drawn(rng, name, (M, N))
        right = check(x, add, weight, bias, 1e-5, centre)
        for where in "x", "add":
            a, b = x.copy(), add.copy()
            row, column = int(rng.integers(M)), int(rng.integers(N))
            (a if where == "x" else b)[row, column] = poison
            out = check(a, b, weight, bias, 1e-5, centre, poisoned=where, seed=seed)
            if centre or poison != poison:
                assert np.isnan(out[row].astype(F32)).all()
            else:  # an infinite mean square makes 0 of all other numbers
                assert np.isnan(out[row, column].astype(F32))
            assert_same_bits(np.delete(out, row, 0), np.delete(right, row, 0), {"where": where, "seed": seed})
        for which in "weight", "bias":
            w, b = weight.copy(), bias.copy()
            column = int(rng.integers(N))
            (w if which == "weight" else b)[column] = poison
            out = normalise(x, w, b, 1e-5, centre, add)[0]
            assert not np.isfinite(out[:, column].astype(F32)).any() or (which == "weight" and N == 1 and centre)
            assert_same_bits(np.delete(out, column, 1), np.delete(right, column, 1), {"where": which, "seed": seed})


@each_dtype
@each_norm
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCASTS])
def test_strided_inputs(layout, centre, name, seed):
    moved = {**LAYOUTS, **BROADCASTS}[layout]
    for shape in (2, 33, 70), (1, 3, 513), (4, 5, 16):
        x, add, weight, bias = drawn(generator(seed, shape), name, shape)
        spread = np.stack([bias, bias], axis=1)[::-1][::-1, 1]
        check(moved(x), add, weight, spread, 1e-5, centre, layout=layout, seed=seed)
        check(moved(x)[0], moved(add)[0], weight[::-1], None, 1e-5, centre, layout=layout, seed=seed)
        check(x[0], moved(add)[0], None, None, 1e-5, centre, layout=layout, seed=seed)


@st.composite
def calls(draw):
    name, centre = draw(st.sampled_from(DTYPES)), draw(st.booleans())
    lead = tuple(draw(st.lists(st.sampled_from([1, 2, 3, 5, 8, 40, 70]), min_size=1, max_size=2)))
    N = draw(st.sampled_from([1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 64, 100, 129, 513, 1030]))
    layouts = [draw(st.sampled_from(sorted({**LAYOUTS, **BROADCASTS}))) for _ in range(2)]
    eps, mean = draw(st.sampled_from([1e-5, 1e-12, 1.0])), draw(st.sampled_from([0, 0, 1, 30]))
    return name, centre, (*lead, N), layouts, tuple(draw(st.booleans()) for _ in range(3)), eps, mean


@settings(max_examples=150)
@given(calls())
def test_drawn_calls(seed, call):
    name, centre, shape, layouts, options, eps, mean = call
    x, add, weight, bias = drawn(generator(seed, call), name, shape, options)
    x = (x.astype(F64) + mean).astype(x.dtype)
    x, add = (a if a is None or a.ndim < 2 else {**LAYOUTS, **BROADCASTS}[layout](a)
              for a, layout in zip((x, add), layouts))
    check(x, add, weight, bias, eps, centre, call=call, seed=seed)


# --- bits, and what is written ---

@pytest.mark.compiled
@each_dtype
@each_norm
def test_bits(centre, name, seed):
    """Of a row they depend on that row alone."""
    for (M, N), options in zip([(200, 77), (65, 512), (17, 5000), (130, 3)], [OPTIONS[0], OPTIONS[4], *OPTIONS[-2:]]):
        x, add, weight, bias = drawn(generator(seed, M), name, (M, N), options)
        context = {"size": (M, N), "centre": centre, "seed": seed}
        whole, total = normalise(x, weight, bias, 1e-5, centre, add)
        for n in 1, 2, 3, 5:
            out, of_sum = np.full_like(x, NAN), None if add is None else np.full_like(x, NAN)
            _runtime.norm(x, add, of_sum, weight, bias, 1e-5, centre, out, n)
            assert_same_bits(out, whole, {**context, "threads": n})
            assert add is None or (of_sum == total).all()
        for rows in [slice(i, i + 1) for i in (0, 1, 15, M // 2, M - 1)] + [slice(3), slice(2, M), slice(1, 16)]:
            some = normalise(x[rows], weight, bias, 1e-5, centre, None if add is None else add[rows])
            assert_same_bits(some[0], whole[rows], {**context, "rows": rows})
            assert_same_bits(some[1], total[rows], {**context, "rows": rows})
        for layout, moved in LAYOUTS.items():
            out = normalise(moved(x), weight, bias, 1e-5, centre, None if add is None else moved(add))[0]
            assert_same_bits(out, whole, {**context, "layout": layout})
        apart = normalise(x[:, None], weight, bias, 1e-5, centre, None if add is None else add[:, None])[0]
        assert_same_bits(apart[:, 0], whole, context)
        # A sum that was made before is the same sum, where it is not rounded to 16 bits.
        if x.dtype.itemsize > 2:
            assert_same_bits(normalise(total, weight, bias, 1e-5, centre)[0], whole, context)


@pytest.mark.compiled
@each_dtype
@each_norm
@pytest.mark.parametrize("layout", sorted(LAYOUTS.keys() - {"read-only"}))
def test_what_lies_between_results_stays(layout, centre, name, seed):
    for M, N in (20, 33), (3, 513), (65, 16), (1, 1):
        x, add, weight, bias = drawn(generator(seed, M), name, (M, N))
        right, total = normalise(x, weight, bias, 1e-5, centre, add)
        out, of_sum = (LAYOUTS[layout](np.full((M, N), NAN, x.dtype)) for _ in range(2))
        _runtime.norm(x, add, of_sum, weight, bias, 1e-5, centre, out, 0)
        assert_same_bits(out, right, {"layout": layout, "seed": seed})
        assert_same_bits(of_sum, total, {"layout": layout, "seed": seed})
        memory = np.full((2 * M, 2 * N), 7, x.dtype)
        _runtime.norm(x, add, memory[1::2, ::2], weight, bias, 1e-5, centre, memory[::2, 1::2], 0)
        assert_same_bits(memory[::2, 1::2].copy(), right, {"seed": seed})
        assert_same_bits(memory[1::2, ::2].copy(), total, {"seed": seed})
        assert (memory[::2, ::2] == 7).all() and (memory[1::2, 1::2] == 7).all()


@pytest.mark.compiled
def test_calls_from_many_threads_give_the_bits_of_serial_calls(seed):
    jobs = []
    for name, M, centre in itertools.product(DTYPES, [1, 50, 300], [True, False]):
        x, add, weight, bias = drawn(generator(seed, name, M), name, (M, 150))
        jobs.append(((x, weight, bias, 1e-5, centre, add), normalise(x, weight, bias, 1e-5, centre, add)[0]))

    def work(number):
        for arguments, right in jobs[number:] + jobs[:number]:
            assert_same_bits(normalise(*arguments)[0], right, {"job": number})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(0, 24, 6)))


# --- the layers ---

@each_dtype
def test_layers(name, seed):
    """Over one and more axes, with weights of another dtype; what they return is `normalise`'s."""
    x, add, weight, bias = drawn(generator(seed), name, (4, 5, 6, 8))
    weight, bias = (np.tile(a, (6, 1)) + np.arange(6)[:, None] for a in (weight, bias))
    flat, more = x.reshape(4, 5, 48), add.reshape(4, 5, 48)
    for layer, eps in (nn.LayerNorm((6, 8)), 1e-5), (nn.LayerNorm((6, 8), 1e-3, bias=False), 1e-3):
        layer.weight, layer.bias = weight, None if layer.bias is None else bias
        w, b = weight.reshape(-1), None if layer.bias is None else bias.reshape(-1)
        assert_same_bits(layer(x).reshape(flat.shape), normalise(flat, w, b, eps, True)[0], {})
        both = layer.of_sum(x, add)
        for mine, right in zip(both, normalise(flat, w, b, eps, True, more)):
            assert_same_bits(mine.reshape(flat.shape), right, {})
    plain = nn.LayerNorm((6, 8), elementwise_affine=False)
    assert_same_bits(plain(x).reshape(flat.shape), normalise(flat, None, None, 1e-5, True)[0], {})
    inside = checks.compute_dtype(x.dtype)
    for layer, eps in (nn.RMSNorm(8), float(np.finfo(inside).eps)), (nn.RMSNorm(8, 1e-3), 1e-3):
        layer.weight = weight[1]
        assert_same_bits(layer.of_sum(x, add)[0], normalise(x, weight[1], None, eps, False, add)[0], {})
        assert layer.of_sum(x, None)[1] is not None and (layer.of_sum(x, None)[1] == x).all()
    one = nn.RMSNorm(8)(x[0, 0, 0])
    assert_same_bits(one, nn.RMSNorm(8)(x)[0, 0, 0], {})


def test_what_layers_refuse():
    layer = nn.LayerNorm(8)
    for x, error, message in [
            (np.zeros((2, 7), F32), ValueError, "x must have shape (..., 8), got (2, 7)"),
            (np.zeros((), F32), ValueError, "x must have shape (..., 8), got ()"),
            (np.zeros((2, 8), np.int32), TypeError, "x must be float32, float64, float16 or bfloat16, got int32"),
            (np.zeros((2, 8), ">f4"), TypeError, "x must be float32, float64, float16 or bfloat16, got >f4"),
            (torn((2, 8)), ValueError, "x must have an address and strides that are multiples of its item size"),
            (misaligned((2, 8)), ValueError, "x must have an address and strides that are multiples of its item size")]:
        with pytest.raises(error, match=re.escape(message)):
            layer(x)
    x = np.zeros((2, 8), F32)
    with pytest.raises(ValueError, match=re.escape("add must have x's shape (2, 8), got (1, 8)")):
        layer.of_sum(x, np.zeros((1, 8), F32))
    for dtype in "float64", "float16":
        with pytest.raises(TypeError, match=f"add must have x's dtype float32, got {dtype}"):
            layer.of_sum(x, np.zeros((2, 8), dtype))
    for add in torn((2, 8)), misaligned((2, 8)):
        with pytest.raises(ValueError, match="add must have an address and strides"):
            layer.of_sum(x, add)


# --- the reference ---

@each_dtype
@each_norm
def test_reference_against_scalar_loops(centre, name, seed):
    for M, N in (3, 7), (1, 1), (2, 130):
        x, add, weight, bias = drawn(generator(seed, N), name, (M, N))
        right = np.zeros((M, N))
        for i, row in enumerate(x.astype(F64) + add.astype(F64)):
            mean = math.fsum(row) / N if centre else 0.0
            factor = 1 / math.sqrt(math.fsum((s - mean) ** 2 for s in row) / N + 1e-3)
            right[i] = [(s - mean) * factor * float(w) + float(b) for s, w, b in zip(row, weight, bias)]
        out, total = (np.full((M, N), NAN) for _ in range(2))
        reference.run_norm(x, add, total, weight, bias, 1e-3, centre, out)
        assert_close(out, right, 64 * 2.0**-53 * (1 + abs(right)), {"seed": seed})
        np.testing.assert_array_equal(total, x.astype(F64) + add.astype(F64))
