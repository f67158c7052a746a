"""The reference against an independent definition in scalar loops, and the comparator against wrong results."""

import doctest
import inspect
import math
import sys

import numpy as np
import pytest
from cases import FLOAT64_STANDARD, assert_close, bound, exact, inputs

import fastattn as fa

INF, NAN = np.inf, np.nan


def definition(query, key, value, *, mask=None, bias=None, causal=False, window=None, query_offset=None,
               query_lengths=None, kv_lengths=None, scale=None, softcap=None, sinks=None):
    """semantics.md, a number at a time in long double: query (B, H, L, D), key (B, Hkv, S, D), value (B, Hkv, S, Dv).

    It takes window as a pair, and lengths and offsets as lists of B integers. It shares no code with the package.
    """
    B, H, L, D = query.shape
    _, Hkv, S, Dv = value.shape
    number = np.longdouble
    out, lse = np.full((B, H, L, Dv), NAN, number), np.full((B, H, L), NAN, number)
    for b, h, i in np.ndindex(B, H, L):
        g = h // (H // Hkv)
        n_keys = S if kv_lengths is None else kv_lengths[b]
        p = i + (n_keys - L if query_offset is None else query_offset[b])
        seen, scores = [], []
        for j in range(S):
            left, right = window or (None, None)
            hidden = (j >= n_keys or (causal and j > p) or (left is not None and j < p - left)
                      or (right is not None and j > p + right) or (mask is not None and not mask[b, h, i, j])
                      or (bias is not None and bias[b, h, i, j] == -INF)
                      or (query_lengths is not None and i >= query_lengths[b]))
            if hidden:
                continue
            s = number(0)
            for d in range(D):
                s += number(query[b, h, i, d]) * number(key[b, g, j, d])
            s *= number(1 / math.sqrt(D) if scale is None and D else 1 if scale is None else scale)
            if softcap is not None:
                s = softcap * np.tanh(s / softcap)
            if bias is not None:
                s += number(bias[b, h, i, j])
            seen.append(j)
            scores.append(s)
        past_end = query_lengths is not None and i >= query_lengths[b]
        logits = scores + ([] if sinks is None or past_end else [number(sinks[h])])
        if not seen:
            out[b, h, i] = 0
            lse[b, h, i] = logits[0] if logits else -INF
            continue
        m = NAN if any(np.isnan(s) for s in logits) else max(logits)
        total = number(0)
        for s in logits:
            total += np.exp(s - m)
        for d in range(Dv):
            o = number(0)
            for j, s in zip(seen, scores):
                o += np.exp(s - m) / total * number(value[b, g, j, d])
            out[b, h, i, d] = o
        lse[b, h, i] = m + np.log(total)
    return out, lse


def draw(rng):
    """Arrays (B, H, L, ...) of small random sizes and a random set of options, in the form `definition` takes."""
    B, Hkv, group, L, S, D, Dv = (int(rng.integers(low, high)) for low, high in
                                  [(1, 3), (1, 3), (1, 4), (0, 6), (0, 7), (0, 5), (0, 4)])
    H = Hkv * group
    arrays = inputs(rng, (B,), H, Hkv, L, S, D, Dv, rng.choice([np.float32, np.float64]))
    dtype = arrays[0].dtype
    bias = rng.standard_normal((B, H, L, S)).astype(dtype)
    bias[rng.random(bias.shape) < 0.2] = -INF
    options = {
        "mask": rng.random((B, H, L, S)) < 0.6,
        "bias": bias,
        "causal": True,
        "window": tuple(None if rng.random() < 0.2 else int(rng.integers(0, 4)) for _ in range(2)),
        "query_offset": rng.integers(-3, 5, B).tolist(),
        "query_lengths": rng.integers(0, L + 1, B).tolist(),
        "kv_lengths": rng.integers(0, S + 1, B).tolist(),
        "scale": float(rng.normal(0, 2)),
        "softcap": float(rng.uniform(0.1, 5)),
        "sinks": rng.standard_normal(H).astype(dtype),
    }
    chosen = rng.random(len(options)) < rng.choice([0.15, 0.4, 0.8])
    return arrays, {name: option for (name, option), take in zip(options.items(), chosen) if take}


def poison(rng, arrays, options):
    """NaN and Inf at random places of the arrays and the bias, visible or not."""
    for array in [*arrays, *(options[name] for name in ("bias", "sinks") if name in options)]:
        bad = rng.random(array.shape) < 0.1
        array[bad] = rng.choice([NAN, INF, -INF], int(bad.sum()))


@pytest.mark.parametrize("poisoned", [False, True], ids=["finite", "poisoned"])
@pytest.mark.parametrize("seed", range(150))
def test_against_scalar_loops(seed, poisoned):
    rng = np.random.default_rng(seed)
    arrays, options = draw(rng)
    if poisoned:
        poison(rng, arrays, options)
    with np.errstate(all="ignore"):
        out, lse = definition(*arrays, **options)
    context = {"case": [a.shape for a in arrays], "options": sorted(options), "seed": seed}
    allowed = bound(*arrays, **options)
    with np.errstate(all="raise"):  # nothing may leak from the reference
        result = fa.reference.attention(*arrays, return_lse=True, **options)
    assert result[0].dtype == result[1].dtype == arrays[0].dtype
    assert_close(result[0], out, allowed.out, context)
    assert_close(result[1], lse, allowed.lse, context)
    # Unrounded, both agree to the precision of the wider arithmetic.
    wide_out, wide_lse = exact(*arrays, **options)
    finer = 4 * np.finfo(wide_out.dtype).eps / np.finfo(arrays[0].dtype).eps
    assert_close(wide_out, out, finer * allowed.out, context)
    assert_close(wide_lse, lse, finer * allowed.lse, context)


def test_float64_on_standard_shapes():
    for B, H, S, D in [(1, 8, 64, 64), (2, 2, 197, 64), (1, 2, 128, 128)]:
        arrays = inputs(np.random.default_rng(0), (B,), H, H, S, S, D, D, np.float64)
        out, allowed = fa.reference.attention(*arrays), bound(*arrays)
        true, _ = exact(*arrays)
        assert_close(out, true, allowed.out, {"case": (B, H, S, D), "seed": 0})
        relative = (out - true) / allowed.magnitude
        assert np.sqrt(np.mean(relative**2)) <= FLOAT64_STANDARD


def test_missing_and_broadcast_axes():
    rng = np.random.default_rng(1)
    q, k, v = inputs(rng, (2, 3), 4, 2, 5, 6, 8, 7)
    sinks = rng.standard_normal(4).astype(np.float32)
    mask = rng.random((3, 1, 5, 6)) < 0.7
    whole = fa.reference.attention(q, k, v, mask=mask, sinks=sinks, kv_lengths=[4, 5, 6])
    for a, b in np.ndindex(2, 3):
        part = fa.reference.attention(q[a, b], k[a, b], v[a, b], mask=mask[b], sinks=sinks, kv_lengths=4 + b)
        np.testing.assert_array_equal(part, whole[a, b])
        for h in range(4):
            one = fa.reference.attention(q[a, b, h], k[a, b, h // 2], v[a, b, h // 2], mask=mask[b, 0],
                                         sinks=sinks[h:h + 1], kv_lengths=[4 + b])
            np.testing.assert_array_equal(one, whole[a, b, h])
    # One set of keys for every batch, and one batch of queries for several.
    out = fa.reference.attention(q[:, :1], k[:1], v[:1, :1])
    for a, b in np.ndindex(2, 3):
        np.testing.assert_array_equal(out[a, b], fa.reference.attention(q[a, 0], k[0, b], v[0, 0]))


def test_window_spellings():
    q, k, v = inputs(np.random.default_rng(2), (), 1, 1, 7, 9, 4, 4)
    for a, b in [({"window": 2}, {"window": (2, 2)}),
                 ({"window": 2, "causal": True}, {"window": (2, 0)}),
                 ({"window": (2, 3), "causal": True}, {"window": [2, 0]}),
                 ({"causal": True}, {"window": (None, 0)}),
                 ({"window": (np.int32(2**30), 2**90)}, {"window": (None, None)}),
                 ({}, {"query_offset": 5})]:
        np.testing.assert_array_equal(fa.reference.attention(q, k, v, **a), fa.reference.attention(q, k, v, **b))


def test_causal_alignment():
    """As drawn in the docstring, with identity values and equal scores."""
    def seen(L, S, **options):
        return fa.reference.attention(np.zeros((L, 1)), np.zeros((S, 1)), np.eye(S), causal=True, **options) > 0

    np.testing.assert_array_equal(seen(2, 4), [[1, 1, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(seen(4, 2), [[0, 0], [0, 0], [1, 0], [1, 1]])
    np.testing.assert_array_equal(seen(2, 4, query_offset=0), [[1, 0, 0, 0], [1, 1, 0, 0]])
    np.testing.assert_array_equal(seen(4, 2, query_offset=0), [[1, 0], [1, 1], [1, 1], [1, 1]])
    np.testing.assert_array_equal(seen(2, 4, kv_lengths=3), [[1, 1, 0, 0], [1, 1, 1, 0]])


@pytest.mark.parametrize("B, H, L, S, D, Dv", [(0, 2, 3, 4, 5, 6), (1, 0, 3, 4, 5, 6), (1, 2, 0, 4, 5, 6),
                                               (1, 2, 3, 0, 5, 6), (1, 2, 3, 4, 0, 6), (1, 2, 3, 4, 5, 0)])
def test_empty_sizes(B, H, L, S, D, Dv):
    q, k, v = inputs(np.random.default_rng(3), (B,), H, H, L, S, D, Dv)
    out, lse = fa.reference.attention(q, k, v, return_lse=True)
    assert out.shape == (B, H, L, Dv) and lse.shape == (B, H, L)
    if S == 0:
        assert (out == 0).all() and (lse == -INF).all()
    if D == 0:
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=2, keepdims=True), out.shape), rtol=1e-6)
        np.testing.assert_allclose(lse, np.log(S), rtol=1e-6)


def test_empty_rows():
    q, k, v = inputs(np.random.default_rng(4), (), 2, 2, 3, 4, 5, 6)
    sinks = np.array([0.5, -INF], np.float32)
    mask = np.ones((3, 4), bool)
    mask[1] = False
    out, lse = fa.reference.attention(q, k, v, mask=mask, return_lse=True)
    assert (out[:, 1] == 0).all() and (lse[:, 1] == -INF).all() and (out[:, ::2] != 0).all()
    out, lse = fa.reference.attention(q, k, v, mask=mask, sinks=sinks, query_lengths=2, return_lse=True)
    assert (out[:, 1:] == 0).all() and (lse[:, 1] == sinks).all() and (lse[:, 2] == -INF).all()


def test_live_minus_inf_is_not_empty():
    q, k, v = inputs(np.random.default_rng(5), (), 1, 1, 2, 3, 1, 2)
    q[:], k[:] = 1, -INF
    out, lse = fa.reference.attention(q, k, v, return_lse=True)
    assert np.isnan(out).all() and np.isnan(lse).all()
    out, lse = fa.reference.attention(q, k, v, return_lse=True, sinks=np.ones(1, np.float32))
    assert (out == 0).all() and (lse == 1).all()
    out, lse = fa.reference.attention(q, k, v, return_lse=True, bias=np.full((2, 3), -INF, np.float32))
    assert (out == 0).all() and (lse == -INF).all()


def test_out_and_result():
    q, k, v = inputs(np.random.default_rng(6), (2,), 4, 2, 5, 6, 7, 3)
    expected, lse = fa.reference.attention(q, k, v, return_lse=True)
    assert expected.ctypes.data % 64 == lse.ctypes.data % 64 == 0
    for out in [np.full((2, 4, 5, 3), NAN, np.float32), np.full((3, 5, 4, 2), NAN, np.float32).T,
                np.full((2, 4, 10, 6), NAN, np.float32)[:, :, ::-2, ::2]]:
        assert fa.reference.attention(q, k, v, out=out) is out
        np.testing.assert_array_equal(out, expected)
    out = np.full((5, 3), NAN, np.float32)
    assert fa.reference.attention(q[0, 0], k[0, 0], v[0, 0], out=out, return_lse=True)[0] is out
    np.testing.assert_array_equal(out, expected[0, 0])


def test_same_signature():
    assert inspect.signature(fa.reference.attention) == inspect.signature(fa.attention)


@pytest.mark.parametrize("module", ["fastattn.attention", "fastattn.checks", "fastattn.reference"])
def test_docstrings(module, monkeypatch):
    monkeypatch.undo()  # doctest leaves out what another module defines, and poisoned_results does
    failed, attempted = doctest.testmod(sys.modules[module])
    assert attempted and not failed


# --- the comparator must see wrong results ---

@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def right(request):
    """A correct out with its exact value and bound."""
    arrays = inputs(np.random.default_rng(7), (2,), 4, 2, 9, 33, 16, 8, request.param)
    return fa.reference.attention(*arrays), exact(*arrays)[0], bound(*arrays).out


CONTEXT = {"case": "comparator", "seed": 7}


def test_comparator_accepts(right):
    actual, true, allowed = right
    assert_close(actual, true, allowed, CONTEXT)
    assert (allowed > 0).all() and (allowed < 2e3 * np.finfo(actual.dtype).eps).all()


def test_comparator_prints_the_worst(right):
    actual, true, allowed = right
    at = (1, 2, 3, 4)
    actual[at] = true[at] + 30 * allowed[at]
    actual[0, 0, 0, 0] = true[0, 0, 0, 0] - 3 * allowed[0, 0, 0, 0]
    with pytest.raises(AssertionError) as failure:
        assert_close(actual, true, allowed, CONTEXT)
    for part in [f"isa={fa.isa()}", "case=comparator", "seed=7", "2 of 576", "worst at (1, 2, 3, 4)",
                 f"actual {actual[at]}", f"exact {true[at]}", "error/bound 30"]:
        assert part in str(failure.value)


@pytest.mark.parametrize("wrong", [
    lambda actual, allowed: np.copyto(actual[0, 1, 2, :1], actual[0, 1, 2, :1] + 3 * allowed[0, 1, 2, :1]),
    lambda actual, allowed: actual.__setitem__((0, 1, 2, 3), NAN),
    lambda actual, allowed: actual.__setitem__((0, 1, 2, 3), INF),
    lambda actual, allowed: actual.fill(0),
    lambda actual, allowed: actual.fill(NAN),
    lambda actual, allowed: np.copyto(actual, actual[:, ::-1].copy()),
    lambda actual, allowed: np.copyto(actual, actual[:, :, ::-1].copy()),
], ids=["3 x bound", "NaN", "Inf", "zeros", "all NaN", "heads swapped", "rows swapped"])
def test_comparator_rejects(right, wrong):
    actual, true, allowed = right
    wrong(actual, allowed)
    with pytest.raises(AssertionError, match="worst at"):
        assert_close(actual, true, allowed, CONTEXT)


@pytest.mark.parametrize("actual, true", [(0.0, NAN), (NAN, 0.0), (INF, -INF), (INF, NAN), (NAN, INF), (1e30, INF)])
def test_comparator_is_strict_with_nan_and_inf(actual, true):
    for allowed in (1.0, INF, NAN):
        with pytest.raises(AssertionError, match="worst at"):
            assert_close(np.array([actual]), np.array([true]), allowed, CONTEXT)
    assert_close(np.array([true]), np.array([true]), 0.0, CONTEXT)


def test_comparator_rejects_shapes_and_unbounded():
    with pytest.raises(AssertionError, match="shape"):
        assert_close(np.zeros((2, 1)), np.zeros((1, 2)), 1.0, CONTEXT)
    for allowed in (NAN, INF):
        with pytest.raises(AssertionError, match="worst at"):
            assert_close(np.ones(1), np.zeros(1), allowed, CONTEXT)
