"""Bias objects: their numbers against scalar loops, attention with them against attention with the same dense array."""

import math
import re
import tracemalloc

import numpy as np
import pytest
from cases import assert_close, bound, exact, generator, inputs
from layouts import assert_same_bits

import fastattn as fa

F32, F64 = np.float32, np.float64
NAN, INF = np.nan, np.inf

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


# --- the forms: an object, and its number for head h, a query at position p and key j, one at a time ---

def t5_bucket(distance, num_buckets, bidirectional, max_distance):
    """Raffel et al., 2020, as their code has it."""
    bucket = 0
    if bidirectional:
        num_buckets //= 2
        if distance > 0:
            bucket += num_buckets
        n = abs(distance)
    else:
        n = max(0, -distance)
    each = num_buckets // 2
    if n < each:
        return bucket + n
    share = F32(math.log(F32(n) / F32(each))) / F32(math.log(max_distance / each))
    return bucket + min(num_buckets - 1, each + int(share * F32(num_buckets - each)))


def alibi(rng, H, dtype):
    slopes = fa.positions.alibi_slopes(H)
    return fa.ALiBi(slopes), lambda h, p, j: slopes[h] * (j - p)


def alibi_symmetric(rng, H, dtype):
    slopes = rng.standard_normal(H).astype(dtype)
    return fa.ALiBi(slopes, symmetric=True), lambda h, p, j: -float(slopes[h]) * abs(j - p)


def table_of_heads(rng, H, dtype):
    table = rng.standard_normal((H, 20)).astype(dtype)
    return fa.RelativeBias(table, first=-15), lambda h, p, j: table[h, min(max(j - p + 15, 0), 19)]


def table_for_all(rng, H, dtype):
    table = rng.standard_normal(41).astype(F32)
    table[30] = -INF
    return fa.RelativeBias(table), lambda h, p, j: table[min(max(j - p, -20), 20) + 20]


def t5_encoder(rng, H, dtype):
    table = rng.standard_normal((32, H)).astype(dtype)
    return fa.RelativeBias.t5(table), lambda h, p, j: table[t5_bucket(j - p, 32, True, 128), h]


def t5_decoder(rng, H, dtype):
    table = rng.standard_normal((20, H)).astype(F64)
    return (fa.RelativeBias.t5(table, bidirectional=False, max_distance=50),
            lambda h, p, j: table[t5_bucket(j - p, 20, False, 50), h])


FORMS = {f.__name__: f for f in (alibi, alibi_symmetric, table_of_heads, table_for_all, t5_encoder, t5_decoder)}


def swin(rng, H, dtype, h, w):
    table = rng.standard_normal(((2 * h - 1) * (2 * w - 1), H)).astype(dtype)
    return (fa.RelativeBias.grid(table, shape=(h, w)),
            lambda n, i, j: table[(i // w - j // w + h - 1) * (2 * w - 1) + i % w - j % w + w - 1, n])


def decomposed(rng, H, dtype, h, w):
    rows, columns = rng.standard_normal((H, 2 * h - 1)).astype(dtype), rng.standard_normal((H, 2 * w - 1)).astype(dtype)
    return (fa.RelativeBias.decomposed(rows, columns, shape=[h, w]),
            lambda n, i, j: float(rows[n, i // w - j // w + h - 1]) + float(columns[n, i % w - j % w + w - 1]))


def loops(number, H, L, S, offset):
    """float64 (H, L, S)"""
    return np.array([[[number(h, i + offset, j) for j in range(S)] for i in range(L)] for h in range(H)],
                    F64).reshape(H, L, S)


def dense(bias, offsets, H, L, S, dtype):
    """(B, H, L, S), from the definition."""
    return np.stack([fa.reference.bias(bias, H, L, S, int(n)) for n in offsets]).astype(dtype)


@both_dtypes
@pytest.mark.parametrize("form", FORMS)
def test_numbers(form, dtype, seed):
    H = 3
    for L, S in [(1, 1), (1, 9), (9, 1), (7, 40), (40, 7), (33, 33), (2, 300), (0, 3), (3, 0)]:
        rng = generator(seed, form, L, S)
        bias, number = FORMS[form](rng, H, dtype)
        for offset in (None, 0, 1, -1, S, -L, 1000, -1000, 2**59, -(2**59)):
            expected = loops(number, H, L, S, S - L if offset is None else offset)
            context = {"form": form, "L": L, "S": S, "offset": offset, "seed": seed}
            assert_same_bits(np.array(fa.reference.bias(bias, H, L, S, offset)), expected, context)
            view = bias.view((2,), H, L, S, dtype, None if offset is None else np.full(2, offset))
            assert not view.flags.writeable
            assert_same_bits(np.broadcast_to(view, (2, H, L, S))[1], expected.astype(dtype), context)
        offsets = rng.integers(-50, 50, 6)
        view = np.broadcast_to(bias.view((2, 3), H, L, S, dtype, offsets), (2, 3, H, L, S))
        for b, offset in enumerate(offsets):
            expected = loops(number, H, L, S, offset).astype(dtype)
            assert_same_bits(view[b // 3, b % 3], expected, {**context, "offset": offset})


def seen(bias, lead, H, n, dtype, offset=None):
    """The numbers (H, n, n) of a view and its index."""
    view, index = bias.view(lead, H, n, n, dtype, offset), bias.index()
    return view if index is None else view[:, 0, index[0][:, None] + index[1]]


@both_dtypes
@pytest.mark.parametrize("form", [swin, decomposed])
def test_numbers_of_grids(form, dtype, seed):
    for h, w in [(1, 1), (1, 5), (5, 1), (2, 3), (4, 3), (7, 7)]:
        H, n = 3, h * w
        bias, number = form(generator(seed, h, w), H, dtype, h, w)
        expected = loops(number, H, n, n, 0)
        context = {"form": form.__name__, "grid": (h, w), "seed": seed}
        assert_same_bits(fa.reference.bias(bias, H, n, n), expected, context)
        assert_same_bits(seen(bias, (2,), H, n, dtype, np.array([3, -3])), expected.astype(dtype), context)


def test_one_table_for_batches_that_agree():
    """Memory is for each different offset along an axis."""
    bias = fa.ALiBi(np.ones(2))
    for offsets, shape in [([[1, 1, 1], [1, 1, 1]], (1, 1)), ([[1, 1, 1], [2, 2, 2]], (2, 1)),
                           ([[1, 2, 3], [1, 2, 3]], (1, 3)), ([[1, 2, 3], [1, 2, 4]], (2, 3))]:
        view = bias.view((2, 3), 2, 4, 5, F32, np.ravel(offsets))
        assert view.shape == (*shape, 2, 4, 5) and view.strides[-2:] == (4, -4)
        expected = np.array([loops(lambda h, p, j: j - p, 2, 4, 5, n) for n in np.ravel(offsets)], F32)
        assert_same_bits(np.broadcast_to(view, (2, 3, 2, 4, 5)).reshape(6, 2, 4, 5), expected, {"offsets": offsets})


# --- in attention ---

def choices(rng, B, L, S):
    """Options, and for each its offsets (B,)."""
    lengths = rng.integers(0, S + 1, B)
    offsets = rng.integers(-L, S + 1, B)
    bottom_right = np.full(B, S - L)
    return [
        ({}, bottom_right),
        ({"causal": True}, bottom_right),
        ({"causal": True, "query_offset": 0}, np.zeros(B, int)),
        ({"query_offset": -3}, np.full(B, -3)),
        ({"window": (20, 7), "query_offset": offsets}, offsets),
        ({"query_offset": offsets, "softcap": 2.0}, offsets),
        ({"kv_lengths": lengths, "softcap": 5.0}, lengths - L),
        ({"kv_lengths": lengths, "causal": True, "window": 40, "scale": 0.3}, lengths - L),
        ({"kv_lengths": lengths, "query_offset": offsets, "causal": True, "query_lengths": rng.integers(0, L + 1, B),
          "mask": rng.random((L, S)) < 0.8}, offsets),
    ]


def compare(arrays, bias, array, options, context, bits_only=False):
    """The same bits with the object and with the array, and both under the bound; out and lse."""
    result, lse = fa.attention(*arrays, bias=bias, return_lse=True, **options)
    expected, expected_lse = fa.attention(*arrays, bias=array, return_lse=True, **options)
    assert_same_bits(result, expected, context)
    assert_same_bits(lse, expected_lse, {**context, "result": "lse"})
    if bits_only:
        return
    true, true_lse = exact(*arrays, bias=array, **options)
    allowed = bound(*arrays, bias=array, **options)
    assert_close(result, true, allowed.out, context)
    assert_close(lse, true_lse, allowed.lse, {**context, "result": "lse"})
    reference = fa.reference.attention(*arrays, bias=bias, **options)
    assert_same_bits(reference, fa.reference.attention(*arrays, bias=array, **options), {**context, "in": "reference"})


@both_dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("L", [1, 5, 63, 64, 65, 95, 96, 97, 130])
def test_same_bits_as_a_dense_array(form, L, dtype, seed):
    B, H, Hkv = 3, 4, 2
    for S in (1, 63, 64, 65, 95, 96, 97, 200):
        rng = generator(seed, form, L, S)
        D, Dv = (int(n) for n in rng.choice([1, 3, 8, 64, 65, 200], 2))
        arrays = inputs(rng, (B,), H, Hkv, L, S, D, Dv, dtype)
        bias, _ = FORMS[form](rng, H, dtype)
        every = choices(rng, B, L, S)
        for turn, n in enumerate(rng.choice(len(every), 2, replace=False)):
            options, offsets = every[n]
            context = {"form": form, "sizes": (L, S, D, Dv), "options": n, "seed": seed}
            # Exact results take most of the time, in long double for float64.
            compare(arrays, bias, dense(bias, offsets, H, L, S, dtype), options, context, turn > 0 or max(D, Dv) > 65)


@both_dtypes
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("number", range(len(choices(np.random.default_rng(0), 1, 1, 1))))
def test_every_option(number, form, dtype, seed):
    B, H, L, S = 3, 6, 70, 150
    rng = generator(seed, number, form)
    arrays = inputs(rng, (B,), H, 3, L, S, 200 if number % 2 else 16, 9, dtype)
    bias, _ = FORMS[form](rng, H, dtype)
    options, offsets = choices(rng, B, L, S)[number]
    compare(arrays, bias, dense(bias, offsets, H, L, S, dtype), options,
            {"form": form, "dtype": dtype.__name__, "number": number, "seed": seed})


@both_dtypes
@pytest.mark.parametrize("form", [swin, decomposed])
@pytest.mark.parametrize("shape", [(1, 1), (7, 7), (8, 8), (8, 12), (12, 12), (5, 13)], ids=str)
def test_same_bits_for_grids(shape, form, dtype, seed):
    B, H, n = 2, 4, math.prod(shape)
    rng = generator(seed, shape, form.__name__)
    bias, _ = form(rng, H, dtype, *shape)
    array = fa.reference.bias(bias, H, n, n).astype(dtype)
    for D in 32, 200:
        arrays = inputs(rng, (B,), H, 2, n, n, D, 8, dtype)
        for options in {}, {"mask": rng.random((B, 1, n, n)) < 0.7}, {"softcap": 2.0, "kv_lengths": [n, n // 2]}:
            compare(arrays, bias, array, options,
                    {"form": form.__name__, "grid": shape, "D": D, "options": list(options), "seed": seed})


@both_dtypes
def test_axes(dtype, seed):
    """No batch, no head, and several leading axes with offsets that broadcast along some."""
    rng = generator(seed)
    for lead, H in [((), 2), ((2, 3), 2), ((2, 1, 2), 1)]:
        arrays = inputs(rng, lead, H, 1, 33, 40, 8, 8, dtype)
        bias = fa.ALiBi(rng.standard_normal(H))
        for offsets in [5, *([rng.integers(-5, 9, (lead[0], *[1] * (len(lead) - 1)))] if lead else [])]:
            each = np.broadcast_to(offsets, lead).ravel()
            array = dense(bias, each, H, 33, 40, dtype).reshape(*lead, H, 33, 40)
            compare(arrays, bias, array, {"causal": True, "query_offset": offsets}, {"lead": lead, "seed": seed})
    arrays = tuple(a[0] for a in inputs(rng, (), 1, 1, 33, 40, 8, 8, dtype))
    bias = fa.RelativeBias(rng.standard_normal(9).astype(dtype))
    compare(arrays, bias, dense(bias, [7], 1, 33, 40, dtype)[0, 0], {}, {"axes": 2, "seed": seed})


@both_dtypes
def test_sizes_of_zero(dtype, seed):
    for B, H, L, S, D in [(0, 2, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0), (2, 0, 3, 4, 5)]:
        arrays = inputs(generator(seed), (B,), H, H, L, S, D, 6, dtype)
        for bias in fa.ALiBi(np.ones(H)), fa.RelativeBias(np.ones(5)):
            for options in {}, {"causal": True}:
                result = fa.attention(*arrays, bias=bias, **options)
                assert_same_bits(result, fa.attention(*arrays, bias=np.zeros((L, S), dtype) + dense(
                    bias, [S - L], H, L, S, dtype)[0], **options), {"sizes": (B, H, L, S, D)})


@both_dtypes
def test_packed_sequences(dtype, seed):
    """Each sequence has its own offset; a grid wants all sequences of its size."""
    rng = generator(seed)
    H, queries, keys = 2, [3, 70, 0, 33], [9, 70, 5, 100]
    starts, ends = ([0, *np.cumsum(n)] for n in (queries, keys))
    q, k, v = (rng.standard_normal((n[-1], H, 8)).astype(dtype) for n in (starts, ends, ends))
    for name, form in FORMS.items():
        bias, _ = form(rng, H, dtype)
        for options in {}, {"causal": True}, {"query_offset": [0, 4, 2, -3]}:
            result = fa.varlen_attention(q, k, v, starts, ends, bias=bias, **options)
            for b in range(len(queries)):
                rows, part = slice(*starts[b : b + 2]), slice(*ends[b : b + 2])
                own = {key: value[b] if isinstance(value, list) else value for key, value in options.items()}
                alone = fa.attention(*(x.swapaxes(0, 1) for x in (q[rows], k[part], v[part])), bias=bias, **own)
                assert_same_bits(result[rows].swapaxes(0, 1), alone, {"form": name, "sequence": b, "seed": seed})
    bias, _ = swin(rng, H, dtype, 2, 3)
    message = "bias over a grid of 2 x 3 must have L = S = 6, got L = 4 and S = 4"
    with pytest.raises(ValueError, match=re.escape(message)):
        fa.varlen_attention(q[:10], k[:10], v[:10], [0, 6, 10], [0, 6, 10], bias=bias)


@both_dtypes
def test_nan_and_inf_in_a_table(dtype, seed):
    """A NaN is seen by the rows that see its distance, and by no other; -inf masks; +inf outweighs all to NaN."""
    L, S = 70, 130
    arrays = inputs(generator(seed), (), 1, 1, L, S, 8, 5, dtype)
    distance = np.arange(S) - (np.arange(L)[:, None] + S - L)
    for causal in False, True:
        visible = (distance <= 0) | (not causal)
        clean = fa.attention(*arrays, bias=fa.RelativeBias(np.zeros(201, dtype)), causal=causal)
        for at, value in [(-60, NAN), (-60, INF), (3, NAN), (0, NAN), (50, NAN), (69, INF)]:
            table = np.zeros(201, dtype)
            table[at + 100] = value
            result = fa.attention(*arrays, bias=fa.RelativeBias(table), causal=causal)
            hit = ((distance == at) & visible).any(axis=1)
            assert np.isnan(result[:, hit]).all(), (causal, at)
            context = {"causal": causal, "at": at, "value": value, "seed": seed}
            assert_same_bits(result[:, ~hit], clean[:, ~hit], context)
        table = np.zeros(201, dtype)
        table[:100] = -INF
        result = fa.attention(*arrays, bias=fa.RelativeBias(table), causal=causal)
        masked = fa.attention(*arrays, bias=np.zeros(1, dtype), mask=distance >= 0, causal=causal)
        assert_close(result, masked, 2 * bound(*arrays, mask=distance >= 0, causal=causal).out, {"seed": seed})


def test_rounded_once_to_querys_dtype(seed):
    """A table of another float dtype is taken; its numbers are rounded to query's dtype, past the range to infinity."""
    rng = generator(seed)
    for given in np.float16, F32, F64, np.dtype(F64).newbyteorder("S"):
        table = rng.standard_normal(11).astype(given)
        for dtype in F32, F64:
            expected = dense(fa.RelativeBias(table.astype(F64)), [2], 1, 5, 7, dtype)[0]
            view = fa.RelativeBias(table).view((), 1, 5, 7, dtype)
            assert_same_bits(view, expected, {"given": given, "dtype": dtype})
    with np.errstate(all="raise"):
        assert (fa.ALiBi([1e300]).view((), 1, 1, 3, F32) == [[[-INF, -INF, 0]]]).all()
        grid = fa.RelativeBias.grid([[1e300]], shape=(1, 1))
        assert (grid.view((), 1, 1, 1, F32) == INF).all()


def test_objects_do_not_change_with_their_arrays():
    slopes, table = np.ones(2), np.ones((9, 2))
    objects = {"alibi": fa.ALiBi(slopes), "table": fa.RelativeBias(table.T),
               "grid": fa.RelativeBias.grid(table, shape=(2, 2)), "t5": fa.RelativeBias.t5(table, max_distance=9),
               "decomposed": fa.RelativeBias.decomposed(table[:3].T, table[3:6].T, shape=(2, 2))}
    before = {name: fa.reference.bias(bias, 2, 4, 4) for name, bias in objects.items()}
    slopes[:], table[:] = NAN, NAN
    for name, bias in objects.items():
        assert_same_bits(fa.reference.bias(bias, 2, 4, 4), before[name], {"object": name})
        assert_same_bits(seen(bias, (), 2, 4, F64), before[name], {"object": name})
    assert repr(objects["alibi"]) == "<ALiBi: 2 heads>"
    assert repr(fa.ALiBi([1.0], symmetric=True)) == "<ALiBi: 1 heads, symmetric>"
    assert repr(objects["table"]) == "<RelativeBias: 2 heads, distances -4 to 4>"
    assert repr(objects["grid"]) == "<RelativeBias: 2 heads, grid of 2 x 2>"
    assert repr(fa.RelativeBias([1.0, 2.0], first=3)) == "<RelativeBias: all heads, distances 3 to 4>"


def peak_of(function):
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("form", [alibi, t5_encoder, t5_decoder])
def test_memory_of_a_view(form, seed):
    H, n = 4, 20_000
    bias, _ = form(generator(seed), H, F32)
    peak = peak_of(lambda: bias.view((1,), H, n, n, F32, np.zeros(1, int)))
    assert peak < 8 * H * 2 * n * 8 < n * n / 20, f"{form.__name__}: {peak} bytes"


@pytest.mark.compiled
@pytest.mark.parametrize("form", [alibi, t5_encoder])
def test_memory_of_attention(form, seed):
    H, n = 1, 20_000
    rng = generator(seed)
    q, k, v = inputs(rng, (), H, H, n, n, 4, 4, F32)
    bias, _ = form(rng, H, F32)
    peak = peak_of(lambda: fa.attention(q, k, v, bias=bias, causal=True))
    assert peak < 8 * H * 2 * n * 8 + 2 * q.nbytes < n * n / 20, f"{form.__name__}: {peak} bytes"


# --- what is refused ---

def attend(bias, H=2, L=4, S=4, lead=()):
    return fa.attention(*inputs(np.random.default_rng(0), lead, H, H, L, S, 3, 3), bias=bias)


grid = fa.RelativeBias.grid
T, V = TypeError, ValueError
BAD = [
    (lambda: fa.ALiBi([1, 2]), T, "slopes must be float16, float32 or float64, got int64"),
    (lambda: fa.ALiBi(None), T, "slopes must be an array, got NoneType"),
    (lambda: fa.ALiBi(1.0), V, "slopes must have shape (H,), got ()"),
    (lambda: fa.ALiBi([[1.0]]), V, "slopes must have shape (H,), got (1, 1)"),
    (lambda: fa.ALiBi([1.0], symmetric=1), T, "symmetric must be a bool, got int"),
    (lambda: fa.ALiBi(np.ma.masked_array([1.0], mask=[True])), T,
     "slopes must be an array without a mask of its own, got a masked array"),
    (lambda: fa.RelativeBias([1, 2, 3]), T, "table must be float16, float32 or float64, got int64"),
    (lambda: fa.RelativeBias([True]), T, "table must be float16, float32 or float64, got bool"),
    (lambda: fa.RelativeBias([1j]), T, "table must be float16, float32 or float64, got complex128"),
    (lambda: fa.RelativeBias(np.longdouble([1])), T,
     f"table must be float16, float32 or float64, got {np.dtype(np.longdouble)}"),
    (lambda: fa.RelativeBias(1.0), V, "table must have shape (H, n) or (n,) with n >= 1, got ()"),
    (lambda: fa.RelativeBias(np.ones((3, 0))), V, "table must have shape (H, n) or (n,) with n >= 1, got (3, 0)"),
    (lambda: fa.RelativeBias(np.ones((1, 2, 3))), V, "table must have shape (H, n) or (n,) with n >= 1, got (1, 2, 3)"),
    (lambda: fa.RelativeBias([1.0, 2.0]), V,
     "first must be given for a table of an even number of distances, got a table of 2"),
    (lambda: fa.RelativeBias([1.0], first=0.0), T, "first must be an integer, got float"),
    (lambda: fa.RelativeBias([1.0], first=2**60), V, f"first must be less than 2**60, got {2**60}"),
    (lambda: fa.RelativeBias([1.0], first=-(2**60)), V, f"first must be at least {1 - 2**60}, got {-(2**60)}"),
    (lambda: fa.RelativeBias.t5(np.ones(32)), V, "table must have shape (num_buckets, H), got (32,)"),
    (lambda: fa.RelativeBias.t5(np.ones((3, 2))), V, "num_buckets must be at least 4, got 3"),
    (lambda: fa.RelativeBias.t5(np.ones((32, 2)), bidirectional=None), T, "bidirectional must be a bool, got NoneType"),
    (lambda: fa.RelativeBias.t5(np.ones((32, 2)), max_distance=8), V,
     "max_distance must lie above the 8 distances with a bucket each and below 2**31, got 8"),
    (lambda: fa.RelativeBias.t5(np.ones((32, 2)), max_distance=2**31), V,
     f"max_distance must lie above the 8 distances with a bucket each and below 2**31, got {2**31}"),
    (lambda: fa.RelativeBias.t5(np.ones((32, 2)), max_distance=1e3), T, "max_distance must be an integer, got float"),
    (lambda: grid(np.ones((9, 2)), shape=4), V, "shape must be a pair (h, w), got 4"),
    (lambda: grid(np.ones((9, 2)), shape=(2, 2, 2)), V, "shape must be a pair (h, w), got (2, 2, 2)"),
    (lambda: grid(np.ones((9, 2)), shape=(2, 2.0)), T, "shape must be an integer, got float"),
    (lambda: grid(np.ones((9, 2)), shape=(0, 5)), V, "shape must be at least 1, got 0"),
    (lambda: grid(np.ones((2, 9)), shape=(2, 2)), V, "table must have shape (9, H) for a grid of 2 x 2, got (2, 9)"),
    (lambda: fa.RelativeBias.decomposed(np.ones((2, 3)), np.ones((2, 4)), shape=(2, 2)), V,
     "columns must have shape (H, 3) for a grid of 2 x 2, got (2, 4)"),
    (lambda: fa.RelativeBias.decomposed(np.ones((2, 5)), np.ones((2, 3)), shape=(2, 2)), V,
     "rows must have shape (H, 3) for a grid of 2 x 2, got (2, 5)"),
    (lambda: fa.RelativeBias.decomposed(np.ones((2, 3)), np.ones((3, 3)), shape=(2, 2)), V,
     "columns must have the 2 heads of rows, got 3"),
    (lambda: attend(fa.ALiBi(np.ones(3))), V, "bias must be for query's 2 heads, got <ALiBi: 3 heads>"),
    (lambda: attend(fa.ALiBi(np.ones(1))), V, "bias must be for query's 2 heads, got <ALiBi: 1 heads>"),
    (lambda: attend(fa.RelativeBias(np.ones((4, 5)))), V,
     "bias must be for query's 2 heads, got <RelativeBias: 4 heads, distances -2 to 2>"),
    (lambda: attend(grid(np.ones((9, 2)), shape=(2, 2)), L=5), V,
     "bias over a grid of 2 x 2 must have L = S = 4, got L = 5 and S = 4"),
    (lambda: attend(grid(np.ones((9, 2)), shape=(2, 2)), S=3), V,
     "bias over a grid of 2 x 2 must have L = S = 4, got L = 4 and S = 3"),
    (lambda: attend(grid(np.ones((9, 3)), shape=(2, 2))), V,
     "bias must be for query's 2 heads, got <RelativeBias: 3 heads, grid of 2 x 2>"),
    (lambda: attend(fa.ALiBi), T, None),
]


@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused(number):
    call, error, message = BAD[number]
    with pytest.raises(error) as raised:
        call()
    assert type(raised.value) is error
    assert message is None or str(raised.value) == message


# --- positions ---

def test_alibi_slopes():
    """The recursion of the paper's code, and the values it gives for 8 and 12 heads."""
    def geometric(n):
        start = 2 ** -(2 ** -(math.log2(n) - 3))
        return [start * start**i for i in range(n)]

    def slopes(n):
        below = 2 ** math.floor(math.log2(n))
        return geometric(n) if below == n else geometric(below) + slopes(2 * below)[0::2][: n - below]

    for H in [*range(1, 130), 1000, 1024]:
        ours = fa.positions.alibi_slopes(H)
        assert ours.dtype == F64 and ours.shape == (H,)
        np.testing.assert_allclose(ours, slopes(H), rtol=1e-12)
    assert fa.positions.alibi_slopes(8).tolist() == [2.0**-n for n in range(1, 9)]
    assert fa.positions.alibi_slopes(12).tolist() == [2.0**-n for n in (*range(1, 9), 0.5, 1.5, 2.5, 3.5)]
    with pytest.raises(ValueError, match="H must be at least 1, got 0"):
        fa.positions.alibi_slopes(0)
    with pytest.raises(TypeError, match="H must be an integer, got float"):
        fa.positions.alibi_slopes(8.0)


def buckets_by_formula(distance, num_buckets, bidirectional, max_distance):
    """The formula of T5 in float32, for arrays; `t5_bucket` is the same a number at a time."""
    side = num_buckets // 2 if bidirectional else num_buckets
    each = side // 2
    n = abs(distance) if bidirectional else np.maximum(-distance, 0)
    with np.errstate(divide="ignore"):
        share = np.log(n.astype(F32) / F32(each)) / F32(math.log(max_distance / each))
    far = np.minimum(each + (np.maximum(share, 0) * F32(side - each)).astype(np.int64), side - 1)
    return np.where(n < each, n, far) + (side * (distance > 0) if bidirectional else 0)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets", [2, 4, 5, 8, 16, 31, 32, 33, 64, 128, 320])
def test_relative_buckets(num_buckets, bidirectional):
    for max_distance in (3, 5, 16, 20, 32, 64, 100, 127, 128, 129, 256, 512, 800, 1024):
        side = num_buckets // 2 if bidirectional else num_buckets
        if side < 2 or max_distance <= side // 2:
            continue
        distance = np.arange(-2 * max_distance - 5, 2 * max_distance + 6)
        ours = fa.positions.relative_buckets(distance, num_buckets, bidirectional=bidirectional,
                                             max_distance=max_distance)
        assert ours.dtype == np.int64 and ours.min() >= 0 and ours.max() < num_buckets
        np.testing.assert_array_equal(ours, buckets_by_formula(distance, num_buckets, bidirectional, max_distance),
                                      err_msg=f"max_distance={max_distance}")
        one_by_one = [t5_bucket(int(d), num_buckets, bidirectional, max_distance) for d in distance[::7]]
        np.testing.assert_array_equal(ours[::7], one_by_one, err_msg=f"max_distance={max_distance}")


def test_relative_buckets_of_any_shape():
    distance = np.arange(-9, 9).reshape(2, 3, 3)
    assert fa.positions.relative_buckets(distance).shape == (2, 3, 3)
    assert fa.positions.relative_buckets(5) == 21 and fa.positions.relative_buckets([]).shape == (0,)
    assert fa.positions.relative_buckets([2**62, -(2**62)]).tolist() == [31, 15]
    with pytest.raises(TypeError, match="distance must be integers, got float64"):
        fa.positions.relative_buckets([1.5])
    with pytest.raises(ValueError, match="num_buckets must be at least 2, got 1"):
        fa.positions.relative_buckets([1], 1, bidirectional=False)


@pytest.mark.compiled
def test_memory_of_a_grid():
    """SAM's 64 x 64 tokens: 16 M pairs a head."""
    n = 64
    bias, q = fa.RelativeBias.grid(np.zeros(((2*n - 1)**2, 2)), shape=(n, n)), np.zeros((2, n * n, 4), F32)
    assert peak_of(lambda: fa.attention(q, q, q, bias=bias)) < 4 * 2**20
