"""attention_weights against its definition in wider arithmetic, under an a-priori bound; what its bits may depend on.

The bound of a weight follows from that of attention's rows in cases.py, those of the reductions from it. u is the unit
roundoff of query's dtype; Delta the largest delta of the row, as in `cases.bound`, with the subtraction of a reference
that may lie HEADROOM ln 2 below the maximum m; c the depth of a sum over S keys.

    weight    |p' - p| <= p (exp(r) - 1) + tiny,       r = 2 Delta + (2 E + 2 + c) u
    max       the largest of these over the rows: a maximum moves no further than its arguments do
    sum       their sum over the rows, and depth u sum p: the rows of a chunk in order, then the chunks
    entropy   A (exp(r + (c + 6) u) - 1) + tiny,       A = sum p (|ln p| + |s - m| + HEADROOM ln 2 + 1)
              It is ln l - sum w x / l, where x = s - reference and w = exp(x). A relative error of r in each w moves
              -sum p ln p by at most r sum p (|ln p| + 1). Both terms are at most A: their own rounding is that of a sum
              of depth c and of a few operations.
    top k     as the weights: the n-th largest of a row moves no further than its arguments do.
"""

import os
import re
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
from cases import EXACT_IN, EXP_ULP, KEY_BLOCK, UNIT_ROUNDOFF, assert_close, bound, generator
from hypothesis import given
from hypothesis import strategies as st
from layouts import BROADCASTS, LAYOUTS, assert_same_bits
from test_memory import assert_survives, needs_mprotect, needs_proc

import fastattn as fa
from fastattn import masks

NAN, INF = np.nan, np.inf
F32, F64 = np.float32, np.float64
HEADROOM = 10  # a weight may exceed that of the reference by this power of two
CHUNKS = 8  # of rows that are summed apart
B, H, Hkv, L, S, D = 2, 4, 2, 70, 140, 12

REDUCTIONS = [None, "sum", "max", "entropy", ("top_k", 5)]
FOR_EACH_ROW = [None, "entropy", ("top_k", 5)]

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def arrays_of(rng, dtype, lead=(B,), H=H, Hkv=Hkv, L=L, S=S, D=D):
    """query and key; some queries have large scores: their weights fall to zero and their maximum rises late."""
    query, key = (rng.standard_normal((*lead, *shape)).astype(dtype) for shape in ((H, L, D), (Hkv, S, D)))
    query[..., ::7, :] *= 30
    return query, key


# --- the definition ---

class Exact(NamedTuple):
    """(..., H, L, S): the weight, how far off it may be, whether the key is seen. (..., H, L): entropy and bound."""

    weights: np.ndarray
    error: np.ndarray
    seen: np.ndarray
    entropy: np.ndarray
    entropy_error: np.ndarray

    def take(self, rows=slice(None), heads=slice(None)):
        """What is exact for chosen rows and heads."""
        if self.weights.ndim == 2:
            return Exact(*(x[rows] for x in self))
        return Exact(*(x[..., heads, :, :][..., rows, :] for x in self[:3]),
                     *(x[..., heads, :][..., rows] for x in self[3:]))


def dense(mask, L, S):
    """A mask of any kind as a boolean array."""
    if isinstance(mask, masks.Mask):
        return mask.to_dense(L, S)
    if isinstance(mask, masks.Plan):
        return mask.to_dense()
    return mask.toarray() != 0 if hasattr(mask, "toarray") else np.asarray(mask)


def of_batch(numbers, lead):
    """Integers that broadcast to the leading axes, with three axes more."""
    return np.broadcast_to(numbers, lead)[..., None, None, None]


def definition(query, key, *, mask=None, bias=None, causal=False, window=None,
               query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None, sinks=None):
    dtype = query.dtype
    wide, u = EXACT_IN[dtype], UNIT_ROUNDOFF[dtype]
    q, k = (x.astype(wide).reshape((1,) * (x.ndim == 2) + x.shape) for x in (query, key))
    H, L, D = q.shape[-3:]
    S = k.shape[-2]
    lead = np.broadcast_shapes(q.shape[:-3], k.shape[:-3])
    k = k.repeat(H // max(1, k.shape[-3]), axis=-3).swapaxes(-1, -2)
    scale = 1 / np.sqrt(wide(max(D, 1))) if scale is None else wide(scale)

    with np.errstate(all="ignore"):
        s = np.broadcast_to(scale * (q @ k), (*lead, H, L, S))
        products = abs(scale) * (abs(q) @ abs(k))
        capped = wide(0)
        if softcap is not None:
            products[np.isinf(products)] = 0  # a score of exactly +-softcap
            s = capped = softcap * np.tanh(s / softcap)
        if bias is not None:
            s = s + bias.astype(wide)

        visible = np.ones(s.shape, bool)
        i, j = np.arange(L)[:, None], np.arange(S)
        n_keys = of_batch(S if kv_lengths is None else kv_lengths, lead)
        visible &= (j < n_keys) & (i < of_batch(L if query_lengths is None else query_lengths, lead))
        left, right = window if isinstance(window, tuple) else (window, window)
        position = i + (n_keys - L if query_offset is None else of_batch(query_offset, lead))
        if causal:
            visible &= j <= position
        if left is not None:
            visible &= j >= position - left
        if right is not None:
            visible &= j <= position + right
        if mask is not None:
            visible &= dense(mask, L, S)
        if bias is not None:
            visible &= bias != -INF

        m = s.max(axis=-1, initial=-INF, where=visible, keepdims=True)
        sink = None if sinks is None else sinks.astype(wide)[:, None, None]
        if sinks is not None:
            m = np.maximum(m, sink)
        p = np.where(visible, np.exp(s - m), 0)
        total = p.sum(axis=-1, keepdims=True)
        if sinks is not None:
            total += np.exp(sink - m)
        p = np.where(visible, p / total, 0)

        depth = KEY_BLOCK + -(-S // KEY_BLOCK)
        below = HEADROOM * np.log(2)
        gamma = (D + 2) * u / (1 - (D + 2) * u)
        delta = gamma * (products + (0 if bias is None else abs(bias))) + u * (abs(s - m) + below) + 4 * u * abs(capped)
        counts = visible & (s != -INF)  # a score of -inf weighs exactly 0
        worst = delta.max(axis=-1, initial=0, where=counts, keepdims=True)
        if sinks is not None:
            worst = np.maximum(worst, u * abs(np.where(sink == -INF, 0, sink - m)))
        relative = 2 * worst + (2 * EXP_ULP + 2 + depth) * u
        # The weight and its product with a factor may be denormal; next to a large sink that factor, of up to 2^10.
        tiny = float(np.finfo(dtype).smallest_subnormal) * (3 if sinks is None else 2**HEADROOM)
        error = np.where(visible, p * np.expm1(relative) + tiny, 0)
        error = np.where(np.isfinite(error), np.minimum(error, 1), 1)  # weights are at most 1, whatever the scores are

        entropy = -np.where(p == 0, 0, p * np.log(p)).sum(axis=-1)
        spread = np.where(p == 0, 0, p * (abs(np.log(p)) + abs(s - m) + below + 1)).sum(axis=-1)
        relative = relative[..., 0] + (depth + 6) * u
        entropy_error = spread * np.expm1(relative) + 1000 * tiny * visible.sum(axis=-1)
        most = np.log(wide(S + 1)) + 1
        entropy_error = np.where(np.isfinite(entropy_error), np.minimum(entropy_error, most), most)

    exact = Exact(p, error, visible & (s > -INF), entropy, entropy_error)
    return Exact(*(x[0] for x in exact)) if query.ndim == 2 else exact


def told(arrays, options, seed, **more):
    """The context of a failure: shapes and options, the arrays among them by shape."""
    options = {name: f"array{option.shape}" if isinstance(option, np.ndarray) else option if np.isscalar(option) else
               repr(option)[:80] for name, option in options.items()}
    return {"dtype": arrays[0].dtype, "shapes": [a.shape for a in arrays], "options": options, **more, "seed": seed}


def check_top_k(values, indices, exact, k, context):
    """Values of the right size, descending, and at keys that have them; behind the seen keys 0 and -1."""
    shape = (*exact.weights.shape[:-1], k)
    assert values.shape == indices.shape == shape and indices.dtype == np.int64, context
    p, error, seen, values, indices = (x.reshape(-1, x.shape[-1]) for x in (*exact[:3], values, indices))
    lost = np.isnan(p).any(axis=1)
    assert np.isnan(values[lost]).all() and (indices[lost] == -1).all(), f"{context}: NaN rows"
    p, error, seen, values, indices = (x[~lost] for x in (p, error, seen, values, indices))
    there = np.arange(k) < seen.sum(axis=1, keepdims=True)
    assert ((indices >= 0) == there).all() and (indices >= -1).all(), f"{context}: number of keys"
    assert (values[~there] == 0).all(), f"{context}: weights of no key"
    row = np.arange(len(p))[:, None]
    taken = np.zeros_like(seen)
    taken[np.broadcast_to(row, indices.shape)[there], indices[there]] = True
    assert (taken <= seen).all() and (taken.sum(axis=1) == there.sum(axis=1)).all(), f"{context}: keys"
    assert (np.diff(values) <= 0).all(), f"{context}: ascends"
    largest = -np.sort(-p)[:, :k]
    assert_close(values, largest, error.max(axis=1, initial=0, keepdims=True), {**context, "top k": "values"})
    at = np.where(there, indices, 0)
    assert_close(values[there], p[row, at][there], error[row, at][there], {**context, "top k": "at their keys"})


def check_one(result, reduce, exact, dtype, context):
    """One result of attention_weights against the definition."""
    context = {**context, "reduce": reduce}
    if isinstance(reduce, tuple):
        assert result[0].dtype == dtype
        check_top_k(*result, exact, reduce[1], context)
        return
    assert result.dtype == dtype
    p, error = exact.weights, exact.error
    n_rows = p.shape[-2]
    if reduce is None:
        assert_close(result, p, error, context)
    elif reduce == "sum":
        depth = CHUNKS + -(-n_rows // CHUNKS) + 64
        total = p.sum(axis=-2)
        assert_close(result, total, error.sum(axis=-2) + depth * UNIT_ROUNDOFF[np.dtype(dtype)] * total, context)
    elif reduce == "max":
        assert_close(result, p.max(axis=-2, initial=0), error.max(axis=-2, initial=0), context)
    else:
        assert_close(result, exact.entropy, exact.entropy_error, context)
        assert not (result < 0).any(), f"{context}: negative"


def check(arrays, options, context, reductions=REDUCTIONS, function=None):
    """All reductions of all rows and heads, or of chosen ones, against the definition; inputs are not modified."""
    function = function or fa.attention_weights
    given_arrays = [x for x in (*arrays, *options.values()) if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in given_arrays]
    chosen = {name: options[name] for name in ("rows", "heads") if name in options}
    exact = definition(*arrays, **{name: o for name, o in options.items() if name not in chosen}).take(**chosen)
    for reduce in reductions:
        if isinstance(reduce, tuple):
            reduce = "top_k", min(reduce[1], arrays[1].shape[-2])
            if reduce[1] == 0:
                continue
        result = function(*arrays, reduce=reduce, **options)
        check_one(result, reduce, exact, arrays[0].dtype, context)
    assert [x.tobytes() for x in given_arrays] == before, f"{context}: an input was modified"
    return exact


def pair(result):
    """Results as a tuple: one array, or the two of top k."""
    return result if isinstance(result, tuple) else (result,)


def assert_same(actual, expected, context):
    for n, (x, y) in enumerate(zip(pair(actual), pair(expected), strict=True)):
        assert_same_bits(x, y, {**context, "result": n})


# --- options ---

def every_option(rng, dtype, H=H, L=L, S=S):
    """Options by name."""
    mask, bias = rng.random((B, H, L, S)) < 0.6, (3 * rng.standard_normal((B, H, L, S))).astype(dtype)
    mask[:, :, 5] = False
    bias[rng.random(bias.shape) < 0.2] = -INF
    sinks = (2 * rng.standard_normal(H)).astype(dtype)
    lengths = {"kv_lengths": np.array([S - 3, S // 2]), "query_lengths": np.array([L, L // 3])}
    return {
        "none": {},
        "scale": {"scale": 1.0},
        "negative scale": {"scale": -0.7},
        "scale of 0": {"scale": 0.0},
        "large scale": {"scale": 40.0},
        "softcap": {"softcap": 2.0},
        "sinks": {"sinks": sinks},
        "large sinks": {"sinks": np.array([50, 85, 95, 700], dtype)},
        "sinks of -inf": {"sinks": np.array([-INF, 0, -INF, 3], dtype), "causal": True, "query_offset": -9},
        "causal": {"causal": True},
        "causal, empty rows": {"causal": True, "query_offset": np.array([-9, 4])},
        "causal, empty rows, sinks": {"causal": True, "query_offset": np.array([-9, 4]), "sinks": sinks},
        "window": {"window": (30, 5)},
        "narrow window": {"window": (1, 0), "query_offset": 100},
        "left of window": {"window": (40, None), "query_offset": np.array([0, 100])},
        "right of window": {"window": (None, 2)},
        "lengths": lengths,
        "lengths, causal": {**lengths, "causal": True},
        "no keys": {"kv_lengths": np.array([0, S])},
        "mask": {"mask": mask},
        "mask of keys": {"mask": mask[:, :1, :1]},
        "mask of rows": {"mask": mask[:1, :, :, :1]},
        "mask of heads": {"mask": mask[0, :, :1]},
        "nothing": {"mask": np.zeros((1, S), bool)},
        "bias": {"bias": bias},
        "bias of keys": {"bias": bias[0, 0, 0]},
        "bias of rows": {"bias": bias[:, :1, :, :1]},
        "bias, softcap, negative scale": {"bias": bias[0, 0], "softcap": 3.0, "scale": -1.0},
        "bias, sinks": {"bias": bias, "sinks": sinks, "window": 50},
        "expression": {"mask": masks.causal(offset=20) & masks.window(70, 30)},
        "expression of steps": {"mask": masks.dilated(9, 4, dilation=3) | masks.global_tokens(2)},
        "expression of batches": {"mask": masks.lengths(np.array([120, 20])) & ~masks.window(2)},
        "expression of heads": {"mask": masks.blocks(rng.random((H, L // 10, S // 10)) < 0.5, 10)},
        "expression, lengths": {"mask": masks.causal() | masks.prefix(9), **lengths},
        "plan": {"mask": (masks.window(20) & ~masks.causal(offset=3)).compile(L, S)},
        "all": {"mask": mask, "bias": bias, "causal": True, "window": 90, "query_offset": np.array([S - L, 5]),
                **lengths, "softcap": 20.0, "sinks": sinks, "scale": 0.4},
    }


OPTIONS = list(every_option(np.random.default_rng(0), F32))
each_option = pytest.mark.parametrize("name", OPTIONS)


def check_sums(weights, entropy, exact, sinks, context):
    """Hidden keys weigh nothing; rows sum to 1 and have an entropy of at most ln S; next to a sink they sum to less."""
    some = exact.seen.any(axis=-1)
    assert (weights[~exact.seen] == 0).all() and (entropy[~some] == 0).all(), f"{context}: a hidden key has weight"
    total, slack = weights.astype(EXACT_IN[weights.dtype]).sum(axis=-1), exact.error.sum(axis=-1)
    if sinks:
        assert (total <= 1 + slack).all(), f"{context}: a row sums to more than 1"
    else:
        assert_close(total, some.astype(float), slack, context)
        assert (entropy <= np.log(weights.shape[-1]) + exact.entropy_error).all(), f"{context}: entropy past ln S"


def check_product(query, key, value, weights, exact, options, context):
    """weights @ value is attention."""
    wide = EXACT_IN[weights.dtype]
    each = value.repeat(query.shape[-3] // value.shape[-3], axis=-3)
    out = fa.attention(query, key, value, **options)
    allowed = bound(query, key, value, **options).out + exact.error @ abs(each)
    assert_close(out, weights.astype(wide) @ each.astype(wide), allowed, {**context, "compared with": "attention"})


@both_dtypes
@each_option
def test_every_option(name, dtype, seed):
    rng = generator(seed, name)
    arrays = arrays_of(rng, dtype)
    options = every_option(rng, dtype)[name]
    context = told(arrays, options, seed)
    exact = check(arrays, options, context, [*REDUCTIONS, ("top_k", S)])
    weights, entropy = (fa.attention_weights(*arrays, reduce=reduce, **options) for reduce in (None, "entropy"))
    check_sums(weights, entropy, exact, "sinks" in options, context)
    value = rng.standard_normal((B, Hkv, S, 9)).astype(dtype)
    check_product(*arrays, value, weights, exact, options, context)


@both_dtypes
@pytest.mark.parametrize("name", ["none", "all", "expression, lengths", "causal, empty rows"])
def test_the_reference(name, dtype, seed):
    rng = generator(seed, name)
    arrays = arrays_of(rng, dtype)
    options = every_option(rng, dtype)[name]
    for chosen in {}, {"rows": [3, -1, 3], "heads": slice(1, None)}:
        options = {**options, **chosen}
        check(arrays, options, told(arrays, options, seed), function=fa.reference.attention_weights)


@both_dtypes
def test_sparse_masks(dtype, seed):
    sparse = pytest.importorskip("scipy.sparse")
    rng = generator(seed)
    arrays = arrays_of(rng, dtype)
    for form, density in [(sparse.csr_array, 0.03), (sparse.coo_array, 0.5), (sparse.csc_array, 0),
                          (sparse.csr_array, 1)]:
        options = {"mask": form(rng.random((L, S)) < density)}
        exact = definition(*arrays, **options)
        for chosen in {}, {"rows": [69, 0, 3, 3], "heads": [1]}:
            for reduce in REDUCTIONS:
                result = fa.attention_weights(*arrays, reduce=reduce, **options, **chosen)
                check_one(result, reduce, exact.take(**chosen), dtype, told(arrays, options, seed, density=density))


def biases(dtype):
    """Biases computed from positions, and the arrays that they stand for where L = S = 30; four heads."""
    i, j = np.arange(30)[:, None], np.arange(30)
    slopes = np.array([0.5, -0.25, 0.1, 0.0])
    table = np.random.default_rng(0).standard_normal((4, 99)).astype(dtype)
    return [
        (fa.ALiBi(slopes), (slopes[:, None, None] * (j - i)).astype(dtype)),
        (fa.RelativeBias(table[:, :11]), table[:, np.clip(j - i, -5, 5) + 5]),
        (fa.RelativeBias.grid(table.T, shape=(5, 6)), table[:, (i // 6 - j // 6 + 4) * 11 + i % 6 - j % 6 + 5]),
    ]


@both_dtypes
@pytest.mark.parametrize("which", range(3), ids=["ALiBi", "RelativeBias", "grid"])
def test_biases_from_positions(which, dtype, seed):
    """They keep the positions of chosen rows and the numbers of chosen heads."""
    bias, array = biases(dtype)[which]
    arrays = arrays_of(generator(seed), dtype, L=30, S=30)
    exact = definition(*arrays, bias=array)
    scattered = [0, *range(29, 15, -1), 10]  # 16 rows that end where 16 neighbours of the grid's table would
    for chosen in [{}, {"rows": [29, 3, 3, 17]}, {"heads": [2, 0]}, {"rows": slice(None, None, -1), "heads": [3]},
                   {"rows": scattered}, {"rows": slice(1, 30, 2)}]:
        for reduce in REDUCTIONS:
            result = fa.attention_weights(*arrays, bias=bias, reduce=reduce, **chosen)
            check_one(result, reduce, exact.take(**chosen), dtype, told(arrays, chosen, seed, bias=bias))


# --- shapes ---

LENGTHS = [0, 1, 2, 17, 63, 64, 65, 95, 96, 97, 200]


@both_dtypes
@pytest.mark.parametrize("L", LENGTHS)
def test_every_pair_of_lengths(L, dtype, seed):
    for S in LENGTHS:
        rng = generator(seed, L, S)
        arrays = arrays_of(rng, dtype, (), 1, 1, L, S, int(rng.integers(1, 24)))
        for options in {}, {"causal": True}:
            check(arrays, options, told(arrays, options, seed))


@pytest.mark.parametrize("L, S, dtype", [(1000, 1000, F32), (1, 1000, F32), (1, 1000, F64), (1000, 1, F64),
                                         (513, 300, F64)])
def test_long_sequences(L, S, dtype, seed):
    arrays = arrays_of(generator(seed, L, S), dtype, (), 1, 1, L, S, 8)
    for options in {}, {"causal": True, "query_offset": -3}, {"window": 100}:
        check(arrays, options, told(arrays, options, seed), [*REDUCTIONS, ("top_k", 300)])


@both_dtypes
@pytest.mark.parametrize("D", [*range(18), 31, 32, 33, 63, 64, 65, 96, 127, 128, 129, 130])
def test_head_sizes(D, dtype, seed):
    for L, S in (5, 7), (67, 101):
        rng = generator(seed, D, L)
        arrays = arrays_of(rng, dtype, (), 2, 1, L, S, D)
        for options in {}, {"bias": rng.standard_normal((L, S)).astype(dtype), "causal": True}:
            check(arrays, options, told(arrays, options, seed))


@both_dtypes
@pytest.mark.parametrize("H, Hkv", [(1, 1), (2, 1), (3, 3), (6, 2), (12, 4)])
def test_grouped_heads(H, Hkv, dtype, seed):
    rng = generator(seed, H, Hkv)
    arrays = arrays_of(rng, dtype, (2,), H, Hkv, 35, 99, 8)
    for chosen in {}, {"heads": [H - 1, 0]}, {"heads": slice(None, None, 2)}:
        options = {**chosen, "sinks": rng.standard_normal(H).astype(dtype)}
        check(arrays, options, told(arrays, options, seed))


@both_dtypes
@pytest.mark.parametrize("leads", [
    [(), ()], [(1,), (1,)], [(3,), (1,)], [(1,), (3,)], [(2, 3), (2, 3)], [(2, 1), (1, 3)], [(2, 1, 3), (1, 2, 1)],
    [(1, 2) * 4, (1,) * 8]], ids=str)
def test_leading_axes(leads, dtype, seed):
    rng = generator(seed, leads)
    lead, L, S = np.broadcast_shapes(*leads), 5, 19
    arrays = tuple(rng.standard_normal((*own, heads, n, 8)).astype(dtype)
                   for own, heads, n in zip(leads, (2, 1), (L, S)))
    for options in [
        {},
        {"causal": True, "kv_lengths": rng.integers(0, S + 1, lead), "query_lengths": rng.integers(0, L + 1, lead)},
        {"window": (3, 2), "query_offset": rng.integers(-L, S, lead), "rows": [4, 1]},
        {"mask": rng.random((*lead, 1, 1, S)) < 0.7, "bias": rng.standard_normal((*lead[1:], 2, L, 1)).astype(dtype),
         "rows": [2], "heads": [1, 1, 0]},
    ]:
        exact = check(arrays, options, told(arrays, options, seed))
        assert exact.weights.shape[:-3] == lead


@both_dtypes
def test_two_axes(dtype, seed):
    rng = generator(seed)
    arrays = tuple(x[0] for x in arrays_of(rng, dtype, (), 1, 1, 9, 100))
    for options in [{}, {"causal": True, "rows": [8, 0]}, {"mask": rng.random((9, 100)) < 0.5, "kv_lengths": 50},
                    {"sinks": np.ones(1, dtype)}]:
        exact = check(arrays, options, told(arrays, options, seed))
        assert exact.weights.ndim == 2 and exact.entropy.ndim == 1


@both_dtypes
@pytest.mark.parametrize("B, H, L, S, D", [
    (0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 2, 0, 4, 5), (2, 2, 3, 0, 5), (2, 2, 3, 4, 0), (2, 2, 70, 0, 5),
    (2, 2, 0, 0, 5), (0, 0, 0, 0, 0)])
def test_sizes_of_zero(B, H, L, S, D, dtype, seed):
    arrays = arrays_of(generator(seed), dtype, (B,), H, H, L, S, D)
    nothing = np.zeros(0, int)
    for options in [{}, {"causal": True}, {"window": 2, "softcap": 3.0}, {"mask": masks.causal()},
                    {"mask": np.ones((L, S), bool), "bias": np.zeros((1, S), dtype), "sinks": np.ones(H, dtype)},
                    {"kv_lengths": 0, "query_lengths": 0}, {"rows": nothing, "heads": nothing}]:
        check(arrays, options, told(arrays, options, seed), [None, "sum", "max", "entropy", ("top_k", 1)])


@both_dtypes
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCASTS])
def test_layouts(layout, dtype, seed):
    rng = generator(seed, layout)
    change = (LAYOUTS | BROADCASTS)[layout]
    options = every_option(rng, dtype)["all"]
    moved = {name: change(option) if name in ("mask", "bias") else option for name, option in options.items()}
    arrays = tuple(change(x) for x in arrays_of(rng, dtype))
    copies = tuple(x.copy() for x in arrays)
    for given_options in {}, moved, {**moved, "rows": slice(None, None, -3), "heads": [3, 1]}:
        context = told(arrays, given_options, seed, layout=layout)
        if fa.isa() == "reference":  # its bits depend on strides
            if "rows" in given_options:
                check(arrays, given_options, context)
            continue
        plain = {name: x.copy() if name in ("mask", "bias") else x for name, x in given_options.items()}
        for reduce in REDUCTIONS:
            assert_same(fa.attention_weights(*arrays, reduce=reduce, **given_options),
                        fa.attention_weights(*copies, reduce=reduce, **plain), {**context, "reduce": reduce})


# --- rows and heads ---

# What is asked for, and the indices that it stands for of 70 rows and 4 heads.
ROWS = [
    (0, [0]), (-1, [69]), (np.int16(7), [7]), (slice(None), range(70)), (slice(3, 40, 2), range(3, 40, 2)),
    (slice(None, None, -1), range(69, -1, -1)), (slice(5, 5), []), ([3, 3, 3], [3, 3, 3]), ([-1, 0, -70], [69, 0, 0]),
    ((64, 2, 63), [64, 2, 63]), (np.arange(65), range(65)), (np.array([9, 8], np.uint8), [9, 8]), ([], []),
    (range(60, 70), range(60, 70)), (np.tile([5, 69, 66], 50), [5, 69, 66] * 50),
    (np.arange(70)[::-7], range(69, -1, -7)),
]
HEADS = [
    (0, [0]), (-1, [3]), (slice(1, 3), [1, 2]), ([2, 0], [2, 0]), ([1, 1, 1, 1, 1], [1] * 5), ([], []),
    (slice(None, None, -1), [3, 2, 1, 0]), (np.uint64(2), [2]),
]


@both_dtypes
@pytest.mark.parametrize("name", [
    "none", "causal, empty rows", "window", "lengths, causal", "mask", "mask of rows", "bias of keys",
    "expression of steps", "expression of batches", "expression of heads", "expression, lengths", "plan", "all"])
def test_chosen_rows_and_heads(name, dtype, seed):
    """Equal to slices of the full answer: the same bits of what belongs to a row, the bound for what does not."""
    rng = generator(seed, name)
    arrays = arrays_of(rng, dtype)
    options = every_option(rng, dtype)[name]
    exact = definition(*arrays, **options)
    full = {reduce: pair(fa.attention_weights(*arrays, reduce=reduce, **options)) for reduce in FOR_EACH_ROW}
    every = (None, slice(None))
    choices = [*((rows, every) for rows in ROWS), *((every, heads) for heads in HEADS), *zip(ROWS, HEADS)]
    for (rows, rows_at), (heads, heads_at) in choices if fa.isa() != "reference" else choices[::3]:
        asked = {n: o for n, o in (("rows", rows), ("heads", heads)) if o is not None}
        rows_at, heads_at = (at if isinstance(at, slice) else np.array(at, int) for at in (rows_at, heads_at))
        part = exact.take(rows_at, heads_at)
        for reduce in REDUCTIONS:
            result = fa.attention_weights(*arrays, reduce=reduce, **asked, **options)
            context = told(arrays, options, seed, asked=asked, reduce=reduce)
            if fa.isa() != "reference" and reduce in full:
                assert_same(result, tuple(x[:, heads_at][:, :, rows_at] for x in full[reduce]), context)
            else:
                check_one(result, reduce, part, dtype, context)


# --- large scores ---

@both_dtypes
@pytest.mark.parametrize("step", [-300, -30, -7, -1, 1, 5, 6.5, 7, 10, 60, 89, 300, 2000])
def test_maximum_moves_between_blocks(step, dtype, seed):
    """Scores rise or fall from block to block of keys: the weights of earlier ones are those of the last reference."""
    for L, keys in (1, "all"), (70, "all"), (70, "one"):
        query, key = arrays_of(generator(seed, step), dtype, (), 1, 1, L, 500, 2)
        block = np.arange(500) // 96
        query[..., 0] = 1
        key[..., 0] = np.where((np.arange(500) % 96 == 41) | (keys == "all"), step * block, 0)
        options = {"scale": 1.0}
        context = told((query, key), options, seed, step=step, keys=keys)
        check((query, key), options, context, [*REDUCTIONS, ("top_k", 150)])


@both_dtypes
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e3, 1e10, 1e30])
def test_scores_of_any_size(size, dtype, seed):
    rng = generator(seed, size)
    arrays = arrays_of(rng, dtype, (), 2, 1, 70, 150, 5)
    bias = (size * rng.standard_normal((70, 150))).astype(dtype)
    for options in [{"scale": size}, {"scale": -size}, {"bias": bias}, {"bias": bias, "softcap": 5.0},
                    {"scale": size, "softcap": size}]:
        check(arrays, options, told(arrays, options, seed))


def test_entropy_of_one_key_is_positive_zero(seed):
    arrays = arrays_of(generator(seed), F32, (), 1, 1, 1, 5)
    for options in [{"kv_lengths": 1}, {"causal": True, "query_offset": 0}, {"mask": np.arange(5) == 3},
                    {"kv_lengths": 0}]:
        entropy = fa.attention_weights(*arrays, reduce="entropy", **options)
        assert entropy == 0 and not np.signbit(entropy), f"isa={fa.isa()}, {options}: {entropy}"


# --- top k ---

@both_dtypes
@pytest.mark.parametrize("name", ["none", "causal", "narrow window", "mask", "bias", "expression", "sinks", "lengths"])
def test_top_k_of_any_size(name, dtype, seed):
    """k = 1, one less than all, all; more than some rows see. Smaller k are the beginning of larger ones."""
    rng = generator(seed, name)
    arrays = arrays_of(rng, dtype, L=37, S=130)
    options = every_option(rng, dtype, L=37, S=130)[name] if name not in ("expression", "narrow window") else {
        "expression": {"mask": masks.causal(offset=3)}, "narrow window": {"window": (2, 1), "query_offset": 60}}[name]
    exact = definition(*arrays, **options)
    most = fa.attention_weights(*arrays, reduce=("top_k", 130), **options)
    for k in 1, 2, 16, 64, 96, 97, 129, 130:
        context = told(arrays, options, seed, k=k)
        result = fa.attention_weights(*arrays, reduce=["top_k", np.int32(k)], **options)
        check_one(result, ("top_k", k), exact, dtype, context)
        if fa.isa() != "reference":
            assert_same(result, tuple(x[..., :k] for x in most), context)


@both_dtypes
@pytest.mark.parametrize("scale", [1.0, -1.0, 0.5, 0.0])
@pytest.mark.parametrize("S", [5, 96, 97, 300])
def test_earlier_keys_first_among_equal_ones(S, scale, dtype, seed):
    """Scores of small integers are exact, and many are equal."""
    rng = generator(seed, S, scale)
    query, key = (rng.integers(-2, 3, (2, n, 3)).astype(dtype) for n in (70, S))
    mask = rng.random((70, S)) < 0.7
    scores = scale * (query @ key.swapaxes(1, 2))
    every = np.ones((70, S), bool)
    bias = rng.integers(-2, 3, (70, S)).astype(dtype)
    for options, visible in [({}, every), ({"mask": mask}, mask), ({"bias": bias}, every),
                             ({"causal": True, "query_offset": 2}, np.tri(70, S, 2, bool))]:
        order = np.where(visible, -(scores + options.get("bias", 0)), INF).argsort(axis=-1, kind="stable")
        for k in {1, 3, min(S, 40), S}:
            _, indices = fa.attention_weights(query, key, reduce=("top_k", k), scale=scale, **options)
            expected = np.where(np.take_along_axis(np.broadcast_to(visible, order.shape), order, 2), order, -1)[..., :k]
            np.testing.assert_array_equal(indices, expected, f"isa={fa.isa()}, k={k}, {list(options)}, seed={seed}")


@both_dtypes
def test_keys_in_any_order_give_the_same_largest(dtype, seed):
    """Ascending scores move the whole list at every key, descending ones nothing."""
    rng = generator(seed)
    query = np.ones((1, 3, 1), dtype)
    for S in 65, 200, 1000:
        for order in np.arange(S), np.arange(S)[::-1], rng.permutation(S):
            key = (order[:, None] / dtype(64)).astype(dtype)[None]
            for k in 1, 7, S:
                _, indices = fa.attention_weights(query, key, reduce=("top_k", k), scale=1.0)
                np.testing.assert_array_equal(indices[0, 1], np.argsort(-order)[:k], f"isa={fa.isa()}, S={S}, k={k}")


# --- NaN and infinities ---

HIDDEN = {
    "kv_lengths": {"kv_lengths": 60},
    "causal": {"causal": True, "query_offset": -10},
    "causal window": {"causal": True, "window": 20, "query_offset": -10},
    "mask": {"mask": np.arange(100) < 60},
    "mask of rows": {"mask": (np.arange(70)[:, None] + np.arange(100) < 120) & (np.arange(100) < 60)},
    "bias": {"bias": np.where(np.arange(100) < 60, 0, -INF)},
    "bias of rows": {"bias": np.where(np.arange(100) < 60, np.linspace(0, 1, 70)[:, None], -INF)},
    "bias, softcap": {"bias": np.where(np.arange(100) < 60, 0, -INF), "softcap": 3.0},
    "expression": {"mask": masks.causal(offset=-10)},
    # Rows past 30 see what those before do not.
    "expression, lengths": {"mask": masks.causal(offset=30), "query_lengths": 30},
    "mask, lengths": {"mask": np.tri(70, 100, 30, bool), "query_lengths": 30},
    "sparse lengths": {"mask": masks.dilated(2, dilation=9) & masks.lengths(60), "query_lengths": 65},
}


@both_dtypes
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("how", HIDDEN)
def test_hidden_keys_are_harmless(how, poison, dtype, seed):
    """No bit depends on what keys from 60 on hold, nor on queries past their lengths."""
    options = {n: o.astype(dtype) if n == "bias" else o for n, o in HIDDEN[how].items()}
    for lead, n_heads in ((), 1), ((2,), 3):
        query, key = arrays_of(generator(seed, how), dtype, lead, n_heads, 1, 70, 100, 8)
        spoiled_query, spoiled_key = query.copy(), key.copy()
        spoiled_key[..., 60:, :] = poison
        if "query_lengths" in options:
            spoiled_query[..., options["query_lengths"] :, :] = poison
        for reduce in [*REDUCTIONS, ("top_k", 80)]:
            context = told((query, key), options, seed, reduce=reduce, poison=poison)
            expected = fa.attention_weights(query, key, reduce=reduce, **options)
            assert all(np.isfinite(x).all() for x in pair(expected))
            assert_same(fa.attention_weights(spoiled_query, spoiled_key, reduce=reduce, **options), expected, context)


@both_dtypes
@pytest.mark.parametrize("n_rows", [1, 3, 70])
@pytest.mark.parametrize("where", ["key", "query", "bias"])
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
def test_live_nan_and_infinities(poison, where, n_rows, dtype, seed):
    """Rows with a NaN score are NaN for all keys they see, 0 for others; a score of -inf only weighs nothing."""
    rng = generator(seed, n_rows)
    query, key = arrays_of(rng, dtype, (), 2, 1, n_rows, 130, 4)
    bias = np.zeros((n_rows, 130), dtype)
    query[..., 0] = abs(query[..., 0])
    if where == "key":
        key[0, 97, 0] = poison
    elif where == "query":
        query[1, n_rows // 2, 1] = poison
    else:
        bias[n_rows // 2, 40] = poison
    for options in [{}, {"causal": True}, {"mask": rng.random((2, n_rows, 130)) < 0.5}, {"kv_lengths": 97},
                    {"mask": masks.causal(offset=60)}, {"sinks": np.zeros(2, dtype)}, {"softcap": 4.0},
                    {"query_lengths": n_rows - 1}]:
        if where == "bias":
            options["bias"] = bias
        check((query, key), options, told((query, key), options, seed, where=where, poison=poison))


@both_dtypes
def test_infinite_key_that_weighs_nothing(dtype, seed):
    """All rows have the score -inf there: weight 0, also where the last vector of rows is not full."""
    for n_rows in 1, 3, 16, 33, 70:
        query, key = arrays_of(generator(seed, n_rows), dtype, (), 1, 1, n_rows, 50, 4)
        query[..., 0] = -abs(query[..., 0]) - 1
        key[0, 7, 0] = INF
        for options in {}, {"causal": True, "query_offset": 49 - n_rows}, {"rows": slice(0, 1)}:
            exact = check((query, key), options, told((query, key), options, seed, n_rows=n_rows))
            assert (exact.weights[..., 7] == 0).all()


@both_dtypes
def test_rows_of_minus_infinity_are_nan(dtype):
    """All visible scores -inf: NaN, not empty; with a sink 0."""
    query, key = np.ones((1, 3, 2), dtype), np.full((1, 20, 2), -INF, dtype)
    for options in {}, {"causal": True}, {"kv_lengths": 5}, {"sinks": np.zeros(1, dtype)}, {"kv_lengths": 0}:
        check((query, key), options, told((query, key), options, None))


# --- what bits depend on ---

@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("reduce", REDUCTIONS, ids=str)
def test_number_of_threads(reduce, dtype, seed):
    rng = generator(seed)
    for heads, n_rows, n_keys in (4, 300, 300), (1, 1000, 300), (1, 70, 3000):
        arrays = arrays_of(rng, dtype, (1,), heads, 1, n_rows, n_keys, 32)
        for options in {}, {"causal": True}:
            expected = fa.attention_weights(*arrays, reduce=reduce, num_threads=1, **options)
            for n in 2, 3, 16:
                context = told(arrays, options, seed, threads=n, reduce=reduce)
                assert_same(fa.attention_weights(*arrays, reduce=reduce, num_threads=n, **options), expected, context)
            with fa.threads(2):
                assert_same(fa.attention_weights(*arrays, reduce=reduce, **options), expected, context)


def cut(options, batch, heads):
    """The options of a part of the batches and heads."""
    part = dict(options)
    for name in "mask", "bias":
        if isinstance(part.get(name), np.ndarray) and part[name].ndim == 4:
            part[name] = np.broadcast_to(part[name], (B, H, L, S))[batch, heads]
        elif isinstance(part.get(name), np.ndarray) and part[name].ndim == 3:
            part[name] = np.broadcast_to(part[name], (H, L, S))[heads]
    for name in "query_offset", "kv_lengths", "query_lengths":
        if np.ndim(part.get(name)) == 1:
            part[name] = part[name][batch]
    if "sinks" in part:
        part["sinks"] = part["sinks"][heads]
    return part


@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("expression of batches", "expression of heads")])
def test_batch_and_heads(name, dtype, seed):
    rng = generator(seed, name)
    query, key = arrays_of(rng, dtype)
    options = every_option(rng, dtype)[name]
    for reduce in REDUCTIONS:
        full = pair(fa.attention_weights(query, key, reduce=reduce, **options))
        for b, heads in [(0, slice(0, 4)), (1, slice(2, 4)), (1, slice(1, 2))]:
            batch, kv_heads = slice(b, b + 1), slice(heads.start // 2, -(-heads.stop // 2))
            result = fa.attention_weights(query[batch, heads], key[batch, kv_heads], reduce=reduce,
                                          **cut(options, batch, heads))
            assert_same(result, tuple(x[batch, heads] for x in full),
                        told((query, key), options, seed, batch=b, heads=heads, reduce=reduce))


@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("filling", [0, NAN])
@pytest.mark.parametrize("how", ["kv_lengths", "mask", "bias", "expression", "causal"])
def test_padding(how, filling, dtype, seed):
    """More keys that nobody sees change nothing; more rows that are past their length change no other row."""
    query, key = arrays_of(generator(seed, how), dtype, (), 2, 1)
    same = {"kv_lengths": {}, "mask": {}, "bias": {"bias": np.zeros((1, S), dtype)}, "expression": {},
            "causal": {"causal": True, "query_offset": S - L}}[how]
    for n in 1, 16, 95, 97, 200:
        longer = np.concatenate([key, np.full((1, n, D), filling, dtype)], axis=1)
        hidden = np.arange(S + n) >= S
        options = {"kv_lengths": {"kv_lengths": S}, "mask": {"mask": ~hidden}, "expression": {"mask": masks.lengths(S)},
                   "bias": {"bias": np.where(hidden, dtype(-INF), dtype(0))}, "causal": same}[how]
        for reduce in REDUCTIONS:
            expected = pair(fa.attention_weights(query, key, reduce=reduce, **same))
            context = told((query, key), options, seed, n=n, filling=filling, reduce=reduce)
            if reduce in (None, "sum", "max"):
                padded = fa.attention_weights(query, longer, reduce=reduce, **options)
                assert (padded[..., S:] == 0).all(), context
                assert_same(padded[..., :S], expected, context)
            else:
                assert_same(fa.attention_weights(query, longer, reduce=reduce, **options), expected, context)
            if reduce in FOR_EACH_ROW:
                taller = np.concatenate([query, np.full((2, n, D), filling, dtype)], axis=1)
                result = pair(fa.attention_weights(taller, key, reduce=reduce, query_lengths=L, **same))
                assert_same(tuple(x[:, :L] for x in result), expected, {**context, "padded": "rows"})
                rest = [x[:, L:] for x in result]
                assert (rest[0] == 0).all() and all((x == -1).all() for x in rest[1:]), context


@pytest.mark.compiled
@both_dtypes
def test_other_rows(dtype, seed):
    """NaN in a row is its own affair."""
    query, key = arrays_of(generator(seed), dtype)
    spoiled = query.copy()
    spoiled[:, :, 1::2] = NAN
    for options in {}, {"causal": True}, {"mask": masks.window(60)}:
        for reduce in FOR_EACH_ROW:
            expected = pair(fa.attention_weights(query, key, reduce=reduce, **options))
            result = pair(fa.attention_weights(spoiled, key, reduce=reduce, **options))
            assert_same(tuple(x[:, :, ::2] for x in result), tuple(x[:, :, ::2] for x in expected),
                        told((query, key), options, seed, reduce=reduce))


# --- any sizes, any options ---

@st.composite
def calls(draw):
    """What to build a call from; the values come from `number`."""
    L = draw(st.sampled_from([0, 1, 2, 5, 16, 17, 31, 33, 63, 64, 65, 100, 129]))
    S = draw(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 64, 95, 96, 97, 192, 200]))
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 1)]))
    Hkv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    H = Hkv * group

    def maybe(strategy):
        return draw(st.none() | strategy)

    def selection(n):
        index = st.integers(-n, n - 1)
        part = st.none() | st.integers(-n - 1, n + 1)
        slices = st.builds(slice, part, part, st.sampled_from([None, 1, -1, 2, -3]))
        return slices if n == 0 else index | st.lists(index, max_size=n + 3) | slices

    side = st.none() | st.integers(0, S + 3)
    left, right = draw(side), draw(side)
    expression = maybe(st.sampled_from([masks.causal(), masks.causal(3), ~masks.causal(), masks.window(9, 2),
                                        masks.dilated(3), masks.window(None, 5) & ~masks.window(1)]))
    form = st.tuples(*(st.sampled_from([1, n]) for n in ((lead or (1,))[-1], H, L, S)))
    return {
        "lead": lead, "H": H, "Hkv": Hkv, "L": L, "S": S, "D": draw(st.sampled_from([0, 1, 3, 8, 17])),
        "dtype": draw(st.sampled_from([F32, F64])), "number": draw(st.integers(0, 2**32 - 1)),
        "rows": maybe(selection(L)), "heads": maybe(selection(H)), "k": draw(st.integers(1, S + 1)),
        "mask": draw(form) if expression is None and draw(st.booleans()) else expression,
        "bias": maybe(form), "sinks": draw(st.booleans()), "layout": draw(st.sampled_from(list(LAYOUTS))),
        "options": {"causal": draw(st.booleans()), "window": maybe(st.just((left, right))),
                    "query_offset": maybe(st.integers(-L - 3, S + 3)), "query_lengths": maybe(st.integers(0, L)),
                    "kv_lengths": maybe(st.integers(0, S)), "softcap": maybe(st.just(5.0)),
                    "scale": maybe(st.sampled_from([-0.5, 3.0, 0.0]))},
    }


@given(calls())
def test_any_sizes_and_options(seed, call):
    rng = generator(seed, call["number"])
    dtype, H, L, S = call["dtype"], call["H"], call["L"], call["S"]
    arrays = arrays_of(rng, dtype, call["lead"], H, call["Hkv"], L, S, call["D"])
    arrays = tuple(LAYOUTS[call["layout"]](x) for x in arrays)
    options = {name: option for name, option in call["options"].items() if option is not None}
    for name, form in (("mask", call["mask"]), ("bias", call["bias"])):
        if isinstance(form, tuple):
            form = form if call["lead"] else form[1:]
            options[name] = rng.random(form) < 0.6 if name == "mask" else rng.standard_normal(form).astype(dtype)
        elif form is not None:
            options[name] = form
    if call["sinks"]:
        options["sinks"] = rng.standard_normal(H).astype(dtype)
    asked = {name: call[name] for name in ("rows", "heads") if call[name] is not None}
    at = {name: index if isinstance(index, slice) else np.array(index, int).ravel() for name, index in asked.items()}
    context = told(arrays, options, seed, number=call["number"], layout=call["layout"], asked=asked)
    exact = definition(*arrays, **options).take(**at)
    for reduce in [None, "sum", "max", "entropy", *([("top_k", min(call["k"], S))] if S else [])]:
        check_one(fa.attention_weights(*arrays, reduce=reduce, **asked, **options), reduce, exact, dtype, context)


# --- bad arguments ---

def good():
    """The arguments that each case below spoils one of."""
    query, key = arrays_of(np.random.default_rng(0), F32, (2,), 4, 2, 5, 7, 8)
    return {"query": query, "key": key}


T, V = TypeError, ValueError
REDUCE = r"reduce must be None, 'sum', 'max', 'entropy' or \('top_k', k\), got "

BAD = [
    ("mean", {"reduce": "mean"}, V, REDUCE + "'mean'"),
    ("top_k alone", {"reduce": "top_k"}, V, REDUCE + "'top_k'"),
    ("top_k of one", {"reduce": ("top_k",)}, V, REDUCE + r"\('top_k',\)"),
    ("another pair", {"reduce": ("sum", 3)}, V, REDUCE + r"\('sum', 3\)"),
    ("number", {"reduce": 3}, V, REDUCE + "3"),
    ("False", {"reduce": False}, V, REDUCE + "False"),
    ("array", {"reduce": np.zeros(3)}, V, REDUCE + r"array\(.*\)"),
    ("pair of arrays", {"reduce": (np.zeros(3), 2)}, V, REDUCE + r"\(array\(.*\), 2\)"),
    ("k of 0", {"reduce": ("top_k", 0)}, V, "k must be at least 1, got 0"),
    ("negative k", {"reduce": ("top_k", -3)}, V, "k must be at least 1, got -3"),
    ("k past the keys", {"reduce": ("top_k", 8)}, V, "k must be at most the 7 keys, got 8"),
    ("k huge", {"reduce": ("top_k", 2**70)}, V, f"k must be at most the 7 keys, got {2**70}"),
    ("float k", {"reduce": ("top_k", 2.0)}, T, "k must be an integer, got float"),
    ("bool k", {"reduce": ("top_k", True)}, T, "k must be an integer, got bool"),
    ("rows past the end", {"rows": [0, 5]}, V, r"rows must lie in \[-5, 4\], got 5"),
    ("row past the end", {"rows": 5}, V, r"rows must lie in \[-5, 4\], got 5"),
    ("rows before the start", {"rows": [-1, -6]}, V, r"rows must lie in \[-5, 4\], got -6"),
    ("rows past 63 bits", {"rows": np.array([2**63], np.uint64)}, V, rf"rows must lie in \[-5, 4\], got {2**63}"),
    ("row past 64 bits", {"rows": 2**70}, T, "rows must be integers or a slice, got object"),
    ("float rows", {"rows": [0.0, 1.0]}, T, "rows must be integers or a slice, got float64"),
    ("float row", {"rows": 1.0}, T, "rows must be integers or a slice, got float64"),
    ("bool rows", {"rows": [True] * 5}, T, "rows must be integers or a slice, got bool"),
    ("named rows", {"rows": "all"}, T, "rows must be integers or a slice, got <U3"),
    ("rows of two axes", {"rows": [[0, 1]]}, V, r"rows must have one axis, got shape \(1, 2\)"),
    ("masked rows", {"rows": np.ma.masked_array([0, 1], mask=False)}, T,
     "rows must be an array without a mask of its own, got a masked array"),
    ("heads past the end", {"heads": 4}, V, r"heads must lie in \[-4, 3\], got 4"),
    ("heads before the start", {"heads": [0, -5]}, V, r"heads must lie in \[-4, 3\], got -5"),
    ("float heads", {"heads": 0.5}, T, "heads must be integers or a slice, got float64"),
    ("heads of two axes", {"heads": np.zeros((2, 1), int)}, V, r"heads must have one axis, got shape \(2, 1\)"),
    ("query", {"query": None}, T, "query must be an array, got NoneType"),
    ("key", {"key": None}, T, "key must be an array, got NoneType"),
    ("key is a number", {"key": F32(1)}, V,
     r"key must have as many axes as query of shape \(2, 4, 5, 8\), got shape \(\)"),
    ("axes of key", {"key": np.zeros((2, 7, 8), F32)}, V,
     r"key must have as many axes as query of shape \(2, 4, 5, 8\), got shape \(2, 7, 8\)"),
    ("query of one axis", {"query": np.zeros(8, F32), "key": np.zeros(8, F32)}, V,
     r"query must have 2 to 11 axes \(..., H, L, D\), got shape \(8,\)"),
    ("dtype of key", {"key": np.zeros((2, 2, 7, 8))}, T,
     "key must have query's dtype float32, float16 or bfloat16, got float64"),
    ("head size", {"key": np.zeros((2, 2, 7, 9), F32)}, V, "key must have query's head size 8, got 9"),
    ("heads of key", {"key": np.zeros((2, 3, 7, 8), F32)}, V, "query must have a multiple of key's 3 heads, got 4"),
    ("batch of key", {"key": np.zeros((3, 2, 7, 8), F32)}, V,
     r"key must have query's leading axes \(2,\) or 1 in their place, got \(3,\)"),
    ("mask of the rows", {"rows": [0, 1], "mask": np.ones((2, 7), bool)}, V,
     r"mask must broadcast to \(..., H, L, S\) = \(2, 4, 5, 7\), got shape \(2, 7\)"),
    ("sinks of the heads", {"heads": [0, 1], "sinks": np.ones(2, F32)}, V,
     r"sinks must have shape \(4,\), one for each head of query, got \(2,\)"),
    ("plan of the rows", lambda a: a.update(rows=[0, 1], mask=masks.causal().compile(2, 7)), V,
     "mask must be a plan for L = 5 and S = 7, got one for L = 2 and S = 7"),
    ("lengths", {"kv_lengths": 8}, V, r"kv_lengths must lie in \[0, 7\], got 8"),
    ("float16", {"query": np.zeros((2, 4, 5, 8), np.float16)}, T, "key must have query's dtype float16, got float32"),
    ("sinks of relu", {"normalizer": "relu", "sinks": np.ones(4, F32)}, V,
     "sinks must be None with normalizer='relu', got an array"),
    ("threads", {"num_threads": 0}, V, "num_threads must be at least 1, got 0"),
]


@pytest.mark.parametrize("function", [fa.attention_weights, fa.reference.attention_weights],
                         ids=["kernel", "reference"])
@pytest.mark.parametrize("spoil, error, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_argument(function, spoil, error, message):
    arguments = good()
    function(**arguments)  # the spoilt argument is the reason
    if callable(spoil):
        spoil(arguments)
    else:
        arguments |= spoil
    with pytest.raises(error) as caught:
        function(**arguments)
    assert caught.type is error and re.fullmatch(message, str(caught.value), re.DOTALL), str(caught.value)


def test_forms_of_the_arguments():
    query, key = good().values()
    expected = fa.attention_weights(query, key, reduce="sum", causal=True)
    for options in [{"deterministic": True}, {"normalizer": "".join(["soft", "max"])}, {"num_threads": np.int8(1)},
                    {"reduce": np.str_("sum")}, {"causal": np.True_}, {"rows": None, "heads": None}]:
        result = fa.attention_weights(query, key, **{"reduce": "sum", "causal": True, **options})
        np.testing.assert_array_equal(result, expected)
    assert fa.attention_weights(query[0, 0].tolist(), key[0, 0].tolist()).dtype == F64
    assert type(fa.attention_weights(memoryview(query), memoryview(key))) is np.ndarray


# --- memory ---

GUARDED = """
from fastattn import masks

class Flush:
    # NumPy to checks.py, but that new arrays come from the arenas: the results of attention_weights.
    @staticmethod
    def zeros(shape, dtype):
        return Flush.full(shape, 0, dtype)

    @staticmethod
    def full(shape, value, dtype):
        if np.ndim(shape) == 0 or len(shape) < 2:
            return np.full(shape, value, dtype)
        array = place(("weights", np.dtype(dtype)), shape, dtype)
        array[...] = value
        return array

    def __getattr__(self, name):
        return getattr(np, name)

checks.np = Flush()

POOL, BOOLS = (np.tile(pool, 2) for pool in (POOL, BOOLS))
for L, S in itertools.product([1, 15, 17, 33, 66, 130], [1, 5, 16, 17, 97, 200]):
    for D, order in [(1, "C"), (3, "F"), (16, "C"), (19, "F"), (19, "C")]:
        q = flush("query", some(2, L, D), order)
        k = flush("key", some(1, S, D), order)
        mask = flush("mask", some(2, L, S, pool=BOOLS), order)
        bias = flush("bias", some(L, S), order)
        rows = rng.integers(0, L, 1 + L // 2)
        for reduce in None, "sum", "max", "entropy", ("top_k", 1 + S // 3), ("top_k", S):
            case(L=L, S=S, D=D, order=order, reduce=reduce)
            fa.attention_weights(q, k, reduce=reduce)
            fa.attention_weights(q, k, reduce=reduce, causal=True, query_lengths=L - L // 3, mask=masks.window(70, 40))
            fa.attention_weights(q, k, reduce=reduce, bias=bias, mask=mask, kv_lengths=S - S // 4)
            fa.attention_weights(q, k, reduce=reduce, bias=bias, softcap=4.0, rows=rows, heads=1, window=(9, 3))
        k[0, S // 2, 0] = np.nan
        case(L=L, S=S, D=D, order=order, reduce="NaN")
        fa.attention_weights(q, k, mask=mask, bias=bias)
"""


@needs_mprotect
@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", ["begin", "end"])
def test_nothing_outside_the_arrays_is_touched(side, dtype, tmp_path, seed):
    assert_survives(tmp_path, GUARDED, seed, side, dtype)


# The kernel is told of one row, key or result too many.
STRAY = {
    "key": ("end", None, "p.key = over(p.key)"),
    "query": ("end", None, "p.query = over(p.query); p.L += 1; p.weights = np.zeros((1, 6, 7), dtype)"),
    "weights": ("end", None, "p.query = np.zeros((1, 6, 3), dtype); p.L += 1"),
    "sums": ("end", "sum", "p.key = np.zeros((1, 80, 3), dtype); p.value = p.key[..., :0]"),
    "entropy": ("end", "entropy", "p.query = np.zeros((1, 6, 3), dtype); p.L += 1"),
    "indices": ("end", ("top_k", 2), "p.query = np.zeros((1, 6, 3), dtype); p.L += 1; "
                                     "p.weights = np.zeros((1, 6, 2), dtype)"),
}


@needs_mprotect
@pytest.mark.compiled
@pytest.mark.parametrize("what", STRAY)
def test_guards_see_one_row_too_many(what, tmp_path, seed):
    side, reduce, spoil = STRAY[what]
    stray = GUARDED.partition("POOL, BOOLS")[0] + f"""
from numpy.lib.stride_tricks import as_strided
over = lambda a: as_strided(a, (1, a.shape[1] + 1, a.shape[2]), a.strides)
q, k = flush("query", some(1, 5, 3)), flush("key", some(1, 7, 3))
p = checks.weights_problem(q, k, reduce={reduce!r})
{spoil}
case(here="before")
_runtime.forward(p)
case(here="after")
"""
    with pytest.raises(AssertionError, match="touched memory outside an array at {'here': 'before'}"):
        assert_survives(tmp_path, stray, seed, side, "float32")


PEAK = """
import sys
import numpy as np
import fastattn as fa

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM:")) * 1024

rng = np.random.default_rng(0)
q, k = (rng.standard_normal((1, 8192, 16), np.float32) for _ in range(2))
fa.attention_weights(q[:, :100], k[:, :100])
before = peak()
fa.attention_weights(q, k, {options})
print(peak() - before)
"""


@needs_proc
@pytest.mark.compiled
@pytest.mark.parametrize("options", ["reduce='sum'", "reduce='entropy', window=(500, 0)", "rows=slice(4096)",
                                     "reduce=('top_k', 4), mask=fa.masks.causal() & fa.masks.window(300)"])
def test_peak_memory(options, tmp_path):
    child = subprocess.run([sys.executable, "-c", PEAK.format(options=options)], cwd=tmp_path, capture_output=True,
                           text=True, timeout=300, env={**os.environ, "FASTATTN_ISA": fa.isa()})
    assert child.returncode == 0, child.stderr
    grown, scores = int(child.stdout), 8192 * 8192 * 4
    if options == "rows=slice(4096)":
        assert grown >= scores / 2, f"the measure misses memory: {grown} bytes"
    else:
        assert grown <= scores / 16, f"isa={fa.isa()}: {options} takes {grown} bytes; L x S weights are {scores}"


# --- the checks above can fail ---

def test_the_comparison_sees_wrong_results(seed):
    arrays = arrays_of(generator(seed), F32)
    exact = definition(*arrays)
    for reduce in [None, "sum", "max", "entropy"]:
        result = fa.attention_weights(*arrays, reduce=reduce)
        check_one(result, reduce, exact, F32, {})
        at = np.unravel_index(result.argmax(), result.shape)
        for change in 1.001, 0.999, NAN, 0:
            wrong = result.copy()
            wrong[at] *= change
            with pytest.raises(AssertionError, match="wrong"):
                check_one(wrong, reduce, exact, F32, {})
        with pytest.raises(AssertionError, match="shape"):
            check_one(result[..., 1:], reduce, exact, F32, {})

    exact = definition(*arrays, causal=True, query_offset=0)
    values, indices = fa.attention_weights(*arrays, reduce=("top_k", 5), causal=True, query_offset=0)
    for message, change in [
        ("ascends", lambda v, i: v[0, 0, 9].sort()),
        ("wrong", lambda v, i: np.multiply(v[0, 0, 9, 0], 1.01, out=v[0, 0, 9, :1])),
        ("wrong", lambda v, i: np.put(i[0, 0, 9], range(5), i[0, 0, 9, ::-1])),
        ("keys", lambda v, i: np.put(i[0, 0, 9], 1, i[0, 0, 9, 0])),
        ("keys", lambda v, i: np.put(i[0, 0, 9], 4, 10)),
        ("number of keys", lambda v, i: np.put(i[0, 0, 9], 4, -1)),
        ("number of keys", lambda v, i: np.put(i[0, 0, 2], 4, 3)),
        ("weights of no key", lambda v, i: np.put(v[0, 0, 2], 4, 1e-9)),
    ]:
        wrong = values.copy(), indices.copy()
        check_top_k(*wrong, exact, 5, {})
        change(*wrong)
        with pytest.raises(AssertionError, match=message):
            check_top_k(*wrong, exact, 5, {})
