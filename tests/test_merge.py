"""merge_states against its definition and against attention over all keys, under a-priori bounds."""


import numpy as np
import pytest
from cases import UNIT_ROUNDOFF, assert_close, bound, exact, generator, inputs
from layouts import LAYOUTS, assert_same_bits

import fastattn as fa

F32, F64 = np.float32, np.float64
NAN, INF = np.nan, np.inf

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def definition(outs, lses):
    """(out, lse) in long double, and the weight of each part; it shares no code with the package."""
    outs, lses = np.array(outs, np.longdouble), np.array(lses, np.longdouble)
    with np.errstate(all="ignore"):
        top = lses.max(axis=0)
        base = np.where(np.isfinite(top), top, 0)
        lse = base + np.log(np.exp(lses - base).sum(axis=0))
        weights = np.where(lses == -INF, 0, np.exp(lses - lse))
        return np.where(lses[..., None] == -INF, 0, weights[..., None] * outs).sum(axis=0), lse, weights


def rounding(outs, lses, weights, dtype):
    """How far a merge may be from its definition: (out, lse).

    Each weight is exp(lse_n - m) / sum: a rounded difference, and a few operations more for the exponential, the sums
    and the quotient; then the products are summed and rounded. All but the last in float64.
    """
    u, wide = UNIT_ROUNDOFF[np.dtype(dtype)], UNIT_ROUNDOFF[np.dtype(F64)]
    outs, lses = abs(np.array(outs, F64)), np.array(lses, F64)
    weights = weights.astype(F64)
    with np.errstate(all="ignore"):
        spread = np.where(weights > 0, abs(lses - lses.max(axis=0)), 0)
        terms = weights * (wide * (8 + 2 * len(outs) + spread.max(axis=0)))
        magnitude = np.where(weights[..., None] > 0, weights[..., None] * outs, 0).sum(axis=0)
        out = np.where(terms[..., None] > 0, terms[..., None] * outs, 0).sum(axis=0) + u * magnitude
        lse = (wide * (8 + len(outs)) + (wide + u) * (abs(lses.max(axis=0)) + np.log(len(outs)) + 1))
    denormal = float(np.finfo(dtype).smallest_subnormal)
    return out + len(outs) * denormal * (1 + outs.max(axis=0, where=np.isfinite(outs), initial=0)), lse


def check(outs, lses, context):
    """Against the definition and the reference; the inputs are left alone. Returns the merge."""
    before = [np.array(x) for x in (*outs, *lses)]
    out, lse = fa.merge_states(outs, lses)
    for array, old in zip((*outs, *lses), before, strict=True):
        assert_same_bits(np.array(array), old, {**context, "input": "modified"})
    dtype = outs[0].dtype
    assert out.dtype == lse.dtype == dtype and out.ctypes.data % 64 == lse.ctypes.data % 64 == 0
    assert out.flags.c_contiguous and lse.flags.c_contiguous
    true, true_lse, weights = definition(outs, lses)
    allowed, allowed_lse = rounding(outs, lses, weights, dtype)
    assert_close(out, true, allowed, context)
    assert_close(lse, true_lse, allowed_lse, {**context, "result": "lse"})
    reference, reference_lse = fa.reference.merge_states(outs, lses)
    assert_close(reference, true, allowed, {**context, "in": "reference"})
    assert_close(reference_lse, true_lse, allowed_lse, {**context, "in": "reference", "result": "lse"})
    return out, lse


# --- the algebra itself ---

@both_dtypes
@pytest.mark.parametrize("spread", [0, 1, 30, 100, 1000, 1e4])
@pytest.mark.parametrize("n", [1, 2, 3, 7, 50])
def test_definition(n, spread, dtype, seed):
    for shape in [(1, 1), (5, 3), (2, 3, 17, 9), (2, 1, 2, 4, 64)]:
        rng = generator(seed, n, spread, shape)
        outs = [rng.standard_normal(shape).astype(dtype) for _ in range(n)]
        lses = [(spread * rng.standard_normal(shape[:-1])).astype(dtype) for _ in range(n)]
        for offset in (0, 1e4, -1e4):
            moved = [(lse + offset).astype(dtype) for lse in lses]
            for share in (0, 0.5, 1):  # of empty rows, whose out may be anything
                some_outs, some_lses = [out.copy() for out in outs], [lse.copy() for lse in moved]
                for out, lse in zip(some_outs, some_lses, strict=True):
                    empty = rng.random(lse.shape) < share
                    lse[empty] = -INF
                    out[empty] = rng.choice([0, NAN, INF, -INF, 1e30])
                context = {"parts": n, "shape": shape, "spread": spread, "offset": offset, "empty": share, "seed": seed}
                out, lse = check(some_outs, some_lses, context)
                none = (np.array(some_lses) == -INF).all(axis=0)
                assert_same_bits(out[none], np.zeros_like(out[none]), context)
                assert (lse[none] == -INF).all() and np.isfinite(out).all()


@both_dtypes
def test_one_part_keeps_its_bits(dtype, seed):
    """Alone, or among parts that are empty."""
    rng = generator(seed)
    out, lse = rng.standard_normal((3, 40, 5)).astype(dtype), (1e3 * rng.standard_normal((3, 40))).astype(dtype)
    out[0, 0] = [0.0, np.finfo(dtype).max, np.finfo(dtype).smallest_subnormal, NAN, -INF]
    nothing, never = np.full_like(out, NAN), np.full_like(lse, -INF)
    for outs, lses in [([out], [lse]), ([out, nothing], [lse, never]), ([nothing, nothing, out], [never, never, lse])]:
        result, result_lse = fa.merge_states(outs, lses)
        finite = ~np.isnan(out)
        assert np.isnan(result[~finite]).all()
        assert_same_bits(result[finite], out[finite], {"parts": len(outs)})
        assert_same_bits(result_lse, lse, {"parts": len(outs)})


@both_dtypes
def test_nan_and_inf(dtype):
    """exp(lse_n - lse) as IEEE arithmetic has it; only an lse of -inf is told apart."""
    for outs, lses, out, lse in [
        ([1, 2], [0, NAN], NAN, NAN),
        ([1, 2], [-INF, NAN], NAN, NAN),
        ([1, 2], [0, INF], NAN, INF),
        ([1, 2], [INF, INF], NAN, INF),
        ([1, 2], [-INF, INF], NAN, INF),
        ([NAN, 2], [0, 0], NAN, np.log(2)),
        ([INF, 2], [0, 0], INF, np.log(2)),
        ([INF, -INF], [0, 0], NAN, np.log(2)),
        ([NAN, 2], [-1e5, 0], NAN, 0),  # weighs 0, but is not empty
        ([NAN, 2], [-INF, 5], 2, 5),
        ([NAN, INF], [-INF, -INF], 0, -INF),
    ]:
        outs, lses = np.array(outs, dtype).reshape(2, 1, 1), np.array(lses, dtype).reshape(2, 1)
        for merge in fa.merge_states, fa.reference.merge_states:
            with np.errstate(all="raise"):
                result, result_lse = merge(outs, lses)
            np.testing.assert_array_equal(result, np.array([[out]], dtype), err_msg=str((outs, lses)))
            np.testing.assert_allclose(result_lse, np.array([lse], dtype), rtol=1e-7, err_msg=str((outs, lses)))


@both_dtypes
def test_a_row_does_not_depend_on_others(dtype, seed):
    rng = generator(seed)
    outs, lses = rng.standard_normal((3, 20, 4)).astype(dtype), (9 * rng.standard_normal((3, 20))).astype(dtype)
    whole, whole_lse = fa.merge_states(outs, lses)
    for i in range(20):
        spoiled, spoiled_lses = np.full_like(outs, NAN), np.full_like(lses, INF)
        spoiled[:, i], spoiled_lses[:, i] = outs[:, i], lses[:, i]
        out, lse = fa.merge_states(spoiled, spoiled_lses)
        assert_same_bits(out[i], whole[i], {"row": i})
        assert_same_bits(lse[i], whole_lse[i], {"row": i})


@both_dtypes
def test_order_and_nesting(dtype, seed):
    """Any order and any tree of merges agree within the rounding of out and lse, once a level."""
    u = UNIT_ROUNDOFF[np.dtype(dtype)]
    for spread in (0, 3, 100):
        rng = generator(seed, spread)
        outs = [rng.standard_normal((2, 30, 8)).astype(dtype) for _ in range(6)]
        lses = [(spread * rng.standard_normal((2, 30))).astype(dtype) for _ in range(6)]
        for lse in lses:
            lse[rng.random(lse.shape) < 0.3] = -INF
        true, true_lse, weights = definition(outs, lses)
        size = abs(np.array(lses, F64)).max(axis=0, where=np.isfinite(lses), initial=0) + 2
        magnitude = (weights[..., None] * abs(np.array(outs))).sum(axis=0).astype(F64)
        # A level rounds each lse, by up to 2 u |lse|, twice that in a quotient of weights, and each out once.
        level = magnitude * (4 * u * size + 10 * u)[..., None] + 10 * np.finfo(dtype).smallest_subnormal
        merge, context = fa.merge_states, {"spread": spread, "seed": seed}
        for _ in range(5):
            order = rng.permutation(6)
            o, z = [outs[n] for n in order], [lses[n] for n in order]
            out, lse = merge(o, z)
            assert_close(out, true, level, {**context, "order": order})
            assert_close(lse, true_lse, 4 * u * size, {**context, "order": order})
            state = o[0], z[0]
            for n in range(1, 6):
                state = merge([state[0], o[n]], [state[1], z[n]])
            pairs = [merge(o[n : n + 2], z[n : n + 2]) for n in (0, 2, 4)]
            right = merge(*zip(*pairs[1:], strict=True))
            tree = merge([pairs[0][0], right[0]], [pairs[0][1], right[1]])
            for name, levels, (out, lse) in (("left", 5, state), ("tree", 3, tree)):
                assert_close(out, true, levels * level, {**context, "nesting": name})
                assert_close(lse, true_lse, 4 * levels * u * size, {**context, "nesting": name})


# --- the identity: attention over parts, merged, is attention over all ---

def contiguous(rng, S, n):
    """Slices of the keys, some of them empty."""
    cuts = [0, *np.sort(rng.integers(0, S + 1, n - 1)).tolist(), S]
    return [slice(*cut) for cut in zip(cuts[:-1], cuts[1:], strict=True)]


def check_identity(arrays, whole, parts, context):
    """``whole``: options over all keys; ``parts``: (arrays, options) of each part.

    Errors of the parts, under their own bound, weighted; and what the errors of their lse do to the weights.
    """
    states = [fa.attention(*part, return_lse=True, **options) for part, options in parts]
    outs, lses = (list(x) for x in zip(*states, strict=True))
    out, lse = check(outs, lses, context)

    u = UNIT_ROUNDOFF[out.dtype]
    true, true_lse = exact(*arrays, **whole)
    bounds = [bound(*part, **options) for part, options in parts]
    part_lses = np.array([exact(*part, **options)[1] for part, options in parts], F64)
    with np.errstate(all="ignore"):
        weights = np.where(part_lses == -INF, 0, np.exp(part_lses - true_lse.astype(F64)))
        shift = np.where(weights > 0, np.array([b.lse for b in bounds]), 0).max(axis=0)
        error = sum(np.where(w[..., None] > 0, w[..., None] * b.out, 0) for w, b in zip(weights, bounds, strict=True))
        magnitude = sum(np.where(w[..., None] > 0, w[..., None] * b.magnitude, 0)
                        for w, b in zip(weights, bounds, strict=True))
        allowed = (error + magnitude * (2 * u + np.expm1(2 * shift) + 1e-14)[..., None]) * np.exp(2 * shift)[..., None]
        allowed_lse = shift + 4 * u * (abs(true_lse) + 1)
    allowed = allowed + len(parts) * np.finfo(out.dtype).smallest_subnormal
    assert_close(out, true, allowed, context)
    assert_close(lse, true_lse, allowed_lse.astype(F64), {**context, "result": "lse"})


@both_dtypes
@pytest.mark.parametrize("n", [1, 2, 3, 8])
@pytest.mark.parametrize("L, S", [(1, 7), (5, 100), (65, 193), (130, 40)])
def test_contiguous_parts(L, S, n, dtype, seed):
    """A part that begins at key k has k less as its offset; sinks go to one part; empty parts and rows are fine."""
    B, H = 2, 4
    for turn in range(3):
        rng = generator(seed, L, S, n, turn)
        arrays = inputs(rng, (B,), H, 2, L, S, 8, 9, dtype)
        q, k, v = arrays
        offsets = rng.integers(-L, S, B)
        bias = fa.ALiBi(fa.positions.alibi_slopes(H))
        mask, sinks = rng.random((B, H, L, S)) < 0.3, rng.standard_normal(H).astype(dtype)
        for name in "plain", "causal", "window", "offset", "mask", "sinks", "bias":
            cuts = contiguous(rng, S, n)
            holder = int(rng.integers(n))
            whole = {"plain": {}, "causal": {"causal": True}, "window": {"window": (30, 5), "query_offset": offsets},
                     "offset": {"causal": True, "query_offset": offsets}, "mask": {"mask": mask},
                     "sinks": {"sinks": sinks, "causal": True}, "bias": {"bias": bias, "causal": True}}[name]
            parts = []
            for number, cut in enumerate(cuts):
                options = dict(whole)
                if name not in ("plain", "mask"):
                    options["query_offset"] = options.get("query_offset", S - L) - cut.start
                if name == "mask":
                    options["mask"] = mask[..., cut]
                if name == "sinks" and number != holder:
                    del options["sinks"]
                parts.append(((q, k[:, :, cut], v[:, :, cut]), options))
            check_identity(arrays, whole, parts, {"L": L, "S": S, "parts": cuts, "options": name, "seed": seed})


@both_dtypes
@pytest.mark.parametrize("n", [2, 5])
@pytest.mark.parametrize("by", ["key", "head", "entry"])
def test_interleaved_parts(by, n, dtype, seed):
    """Each key, or each pair of a query and a key, belongs to one part by a mask."""
    B, H, L, S = 2, 2, 70, 130
    rng = generator(seed, by, n)
    arrays = inputs(rng, (B,), H, H, L, S, 8, 5, dtype)
    owner = rng.integers(0, n, {"key": (S,), "head": (H, 1, S), "entry": (B, H, L, S)}[by])
    owner[owner == 1] = 0  # an empty part
    for whole in {}, {"causal": True, "query_offset": -10}, {"kv_lengths": [S, 5], "query_lengths": [L, 0]}:
        parts = [(arrays, {**whole, "mask": owner == part}) for part in range(n)]
        check_identity(arrays, whole, parts, {"dtype": dtype.__name__, "by": by, "options": list(whole), "seed": seed})


@pytest.mark.parametrize("function", [fa.merge_states, fa.reference.merge_states], ids=["merge_states", "reference"])
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_halves(name, function, seed):
    """16-bit outs with float32 lses: the merge of the same numbers in float32, rounded once more."""
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)
    rng = generator(seed, name)
    outs, lses = rng.standard_normal((3, 5, 7)).astype(dtype), rng.standard_normal((3, 5)).astype(F32)
    lses[1, 2] = lses[:, 4] = -INF
    out, lse = function(outs, lses)
    wide, wide_lse = function(outs.astype(F64), lses.astype(F64))
    assert out.dtype == dtype and lse.dtype == F32
    ulp = {"float16": 2.0**-11, "bfloat16": 2.0**-8}[name]
    assert (abs(out.astype(F64) - wide) <= ulp * abs(wide) * (1 + 2.0**-11) + 2.0**-25).all()
    assert (lse == wide_lse.astype(F32)).all()


@both_dtypes
def test_large_logits(dtype, seed):
    rng = generator(seed)
    for size in (30, 300, 1e4):
        arrays = inputs(rng, (), 2, 2, 20, 100, 16, 5, dtype)
        q, k, v = arrays
        whole = {"scale": size / 4}
        parts = [((q, k[:, cut], v[:, cut]), whole) for cut in contiguous(rng, 100, 4)]
        check_identity(arrays, whole, parts, {"dtype": dtype.__name__, "size": size, "seed": seed})


# --- what is taken and what is refused ---

@both_dtypes
def test_forms(dtype, seed):
    """Lists, tuples, iterators, arrays of parts, nested lists; any layout; sizes of zero."""
    rng = generator(seed)
    outs, lses = rng.standard_normal((3, 2, 6, 4)).astype(dtype), rng.standard_normal((3, 2, 6)).astype(dtype)
    out, lse = check(list(outs), list(lses), {"seed": seed})
    for give in tuple, list, iter, lambda x: (part for part in x), np.asfortranarray, lambda x: x[::-1].copy()[::-1]:
        result, result_lse = fa.merge_states(give(outs), give(lses))
        assert_same_bits(result, out, {"form": give})
        assert_same_bits(result_lse, lse, {"form": give})
    for layout, change in LAYOUTS.items():
        result, result_lse = fa.merge_states([change(part) for part in outs], [change(part) for part in lses])
        assert_same_bits(result, out, {"layout": layout})
        assert_same_bits(result_lse, lse, {"layout": layout})
    result, result_lse = fa.merge_states([[[1.0]], [[3.0]]], [[0.0], [0.0]])
    assert result.dtype == F64 and result == 2 and result_lse == np.log(2)
    for shape in [(0, 3), (3, 0), (0, 3, 4), (2, 0, 4)]:
        result, result_lse = fa.merge_states(np.ones((2, *shape), dtype), np.zeros((2, *shape[:-1]), dtype))
        assert result.shape == shape and result_lse.shape == shape[:-1] and result.dtype == result_lse.dtype == dtype


def ones(*shape, dtype=F32):
    return np.ones(shape, dtype)


T, V = TypeError, ValueError
BAD = [
    ([], [], V, "outs must have at least one part, got none"),
    (ones(0, 2, 3), ones(0, 2), V, "outs must have at least one part, got none"),
    (ones(2, 4, 3), ones(3, 4), V, "lses must have one part for each of 2 outs, got 3"),
    (ones(2, 4, 3), [], V, "lses must have one part for each of 2 outs, got 0"),
    (ones(2, 4, 3, dtype=np.int64), ones(2, 4), T,
     "outs must be float32, float64, float16 or bfloat16 in native byte order, got int64"),
    (ones(2, 4, 3, dtype=np.float16), ones(2, 4, dtype=np.float16), T,
     "lses must have the dtype float32, got float16 in part 0"),
    ([ones(4, 3), ones(4, 3, dtype=F64)], ones(2, 4), T,
     "outs must have the first part's dtype float32, got float64 in part 1"),
    (ones(2, 4, 3), ones(2, 4, dtype=F64), T, "lses must have outs' dtype float32, got float64 in part 0"),
    ([ones(4, 3), ones(5, 3)], ones(2, 4), V, "outs must have the first part's shape (4, 3), got (5, 3) in part 1"),
    ([ones(4, 3), ones(1, 4, 3)], ones(2, 4), V,
     "outs must have the first part's shape (4, 3), got (1, 4, 3) in part 1"),
    (ones(2, 4, 3), ones(2, 3), V, "lses must have outs' shape (4,), got (3,) in part 0"),
    (ones(2, 4, 3), ones(2, 4, 1), V, "lses must have outs' shape (4,), got (4, 1) in part 0"),
    (ones(2, 4, 3), [ones(4), ones(4, 3)], V, "lses must have outs' shape (4,), got (4, 3) in part 1"),
    (ones(2, 4), ones(2), V, "outs must have axes (..., L, Dv), got shape (4,)"),
    (F32(1), ones(1), T, "outs must be a sequence of arrays or an array of parts, got float32"),
    (None, ones(1), T, "outs must be an array, got NoneType"),
    ([None], ones(1), T, "outs must be an array, got NoneType"),
    (np.ma.masked_array(ones(2, 4, 3), mask=False), ones(2, 4), T,
     "outs must be an array without a mask of its own, got a masked array"),
]


@pytest.mark.parametrize("function", [fa.merge_states, fa.reference.merge_states], ids=["merge_states", "reference"])
@pytest.mark.parametrize("number", range(len(BAD)))
def test_refused(number, function):
    outs, lses, error, message = BAD[number]
    with pytest.raises(error) as raised:
        function(outs, lses)
    assert type(raised.value) is error and str(raised.value) == message


def test_result_past_memory():
    huge = np.broadcast_to(F32(0), (1, 2**40, 2**10))
    with pytest.raises(MemoryError):
        fa.merge_states(huge, np.broadcast_to(F32(0), (1, 2**40)))
