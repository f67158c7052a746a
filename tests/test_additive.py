"""Additive attention: the reference against scalar loops and differences, the kernels under the bound of cases.py."""

import itertools
import re

import numpy as np
import pytest
import test_attention
import test_backward
import test_half
from cases import DIGITS, EXACT_IN, additive_gradient_bound, assert_close, bound, generator, inputs, ulp, widened
from hypothesis import given, settings
from layouts import LAYOUTS, assert_same_bits
from test_attention import both_dtypes, told

import fastattn as fa
from fastattn import checks, reference

NAN, INF = np.nan, np.inf
F32, F64 = np.float32, np.float64
NORMALIZERS = ["softmax", "softmax1", "sigmoid", "relu", "sparsemax", "entmax15"]
PARTS = ("query", "key", "value", "weight", "bias", "sinks")


def arrays_of(rng, lead, H, Hkv, L, S, D, Dv, dtype=F32, heads=False):
    """query, key, value, weight and bias; weights of about 1 / sqrt(D), for scores as those of products."""
    arrays = inputs(rng, lead, H, Hkv, L, S, D, Dv, dtype)
    shape = (H, D) if heads else (D,)
    weight = rng.standard_normal(shape) / max(D, 1) ** 0.5
    return (*arrays, weight.astype(dtype), rng.standard_normal(shape).astype(dtype))


def exact(arrays, bias, options):
    """(out, lse) by the reference in wider arithmetic."""
    problem = checks.problem(*arrays[:3], scale=1.0, additive=(arrays[3], bias), return_lse=True, **options)
    wide = EXACT_IN[checks.compute_dtype(problem.query.dtype)]
    shape = problem.returned.shape
    problem.out, problem.lse = (np.full(x.shape, NAN, wide) for x in (problem.out, problem.lse))
    reference.forward(problem, wide)
    return problem.out.reshape(shape), problem.lse.reshape(shape[:-1])


def check(arrays, options, seed, bias=None, **more):
    """out and lse under the bound; inputs not modified."""
    context = told(arrays, options, seed, bias=bias is not None, **more)
    before = [x.tobytes() for x in arrays]
    result, lse = fa.additive_attention(*arrays, bias=bias, return_lse=True, **options)
    assert result.dtype == arrays[0].dtype and lse.dtype == checks.compute_dtype(result.dtype)
    true, true_lse = exact(arrays, bias, options)
    allowed = bound(*arrays[:3], scale=1.0, additive=(arrays[3], bias), **options)
    assert_close(result, true, allowed.out, context)
    assert_close(lse, true_lse, allowed.lse, {**context, "result": "lse"})
    assert [x.tobytes() for x in arrays] == before, f"{context}: an input was modified"
    return result, lse


def saved(rng, arrays, bias, options):
    """The arguments of the backward pass, and its options."""
    out, lse = fa.additive_attention(*arrays, bias=bias, return_lse=True, **options)
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    if options.get("normalizer", "softmax") in ("softmax", "softmax1"):
        options = {**options, "grad_lse": rng.standard_normal(lse.shape).astype(lse.dtype)}
    return (grad_out, *arrays, out, lse), {**options, "bias": bias}


def check_gradients(arguments, options, seed):
    grad_out, query, key, value, weight, out, lse = arguments
    options = dict(options)
    bias = options.pop("bias")
    got = fa.additive_attention_backward(*arguments, bias=bias, **options)
    (*wide, wide_weight), wide_options = widened(grad_out, query, key, value, out, lse, weight, **options)
    wide_bias = None if bias is None else bias.astype(F64)
    true = reference.additive_attention_backward(*wide[:4], wide_weight, *wide[4:], bias=wide_bias, **wide_options)
    allowed = additive_gradient_bound(grad_out, query, key, value, out, lse, weight=weight, bias=bias, **options)
    for name in PARTS[:5]:
        part, right, error = (getattr(x, name) for x in (got, true, allowed))
        if part is None:
            assert name == "bias" and bias is None
            continue
        if name in ("weight", "bias"):  # a sum in float64 that is rounded once more
            error = error + abs(right) * np.finfo(checks.compute_dtype(part.dtype)).eps
        if part.dtype.name in DIGITS:
            error = error + ulp(abs(right) + error, part.dtype) / 2
        assert_close(part, right, error, {**told((query, key, value), options, seed), "gradient": name})


# --- the reference ---

def test_reference_against_scalar_loops(seed):
    for number in range(60):
        rng = generator(seed, number)
        Hkv, L, S, D, Dv = (int(n) for n in rng.integers(1, 6, 5))
        H = Hkv * int(rng.integers(1, 3))
        q, k, v, w, b = arrays_of(rng, (), H, Hkv, L, S, D, Dv, F64, heads=number % 2)
        mask = rng.random((L, S)) < 0.8
        full_w, full_b = np.broadcast_to(w, (H, D)), np.broadcast_to(b, (H, D))
        expected = np.zeros((H, L, Dv))
        for h, i in itertools.product(range(H), range(L)):
            seen = np.flatnonzero(mask[i])
            s = [sum(full_w[h, d] * np.tanh(np.longdouble(q[h, i, d]) + k[h * Hkv // H, j, d] + full_b[h, d])
                     for d in range(D)) for j in seen]
            e = np.exp(np.array(s, np.longdouble))
            expected[h, i] = sum(x * v[h * Hkv // H, j] for x, j in zip(e / e.sum(), seen)) if len(seen) else 0
        got = reference.additive_attention(q, k, v, w, bias=b, mask=mask)
        assert_close(got, expected, 1e-13, {"number": number, "seed": seed})


@pytest.mark.parametrize("normalizer", ["softmax", "softmax1", "sigmoid"])  # without kinks
def test_gradients_against_differences(normalizer, seed):
    for number in range(60):
        rng = generator(seed, normalizer, number)
        Hkv, L, S, D, Dv = (int(n) for n in rng.integers(1, 6, 5))
        H = 2 * Hkv
        *arrays, b = arrays_of(rng, (2,), H, Hkv, L, S, D, Dv, F64, heads=number % 2)
        options = {"softcap": 1.5, "causal": True, "mask": rng.random((L, S)) < 0.7, "dropout_p": 0.4}
        options = {name: option for name, option in options.items() if rng.random() < 0.4}
        options |= {"seed": 7, "normalizer": normalizer}
        at = [*arrays, b]
        if normalizer == "softmax" and number % 3 == 0:
            options["sinks"] = rng.standard_normal(H)
            at.append(options["sinks"])
        for module in fa, reference:
            check_differences(rng, module, at, options, number)


def check_differences(rng, module, at, options, number):
    step = [rng.standard_normal(x.shape) for x in at]
    out, lse = module.additive_attention(*at[:4], bias=at[4], return_lse=True, **options)
    grad_out = rng.standard_normal(out.shape)

    def value(t):
        q, k, v, w, b, *sinks = (x + t * d for x, d in zip(at, step))
        moved = {**options, "sinks": sinks[0]} if sinks else options
        return (module.additive_attention(q, k, v, w, bias=b, **moved) * grad_out).sum()

    got = module.additive_attention_backward(grad_out, *at[:4], out, lse, bias=at[4], **options)
    parts = [(g * d).sum() for g, d in zip(got, step)]
    numeric = test_backward.differences(value)
    assert abs(numeric - sum(parts)) <= 1e-7 * (1 + np.abs(parts).sum()), (number, module.__name__, options)


# --- the kernels against the reference ---

@both_dtypes
@pytest.mark.parametrize("L", [1, 2, 7, 17, 63, 64, 65, 97])
def test_lengths(L, dtype, seed):
    for S in [0, 1, 2, 7, 16, 33, 95, 96, 97, 200]:
        rng = generator(seed, L, S)
        D, Dv = (int(n) for n in rng.integers(1, 20, 2))
        *arrays, b = arrays_of(rng, (), 1, 1, L, S, D, Dv, dtype)
        for bias, options in (None, {}), (b, {"causal": True}):
            check(arrays, options, seed, bias)
            check_gradients(*saved(rng, arrays, bias, options), seed)


@both_dtypes
@pytest.mark.parametrize("D, Dv", [(1, 1), (0, 3), (3, 0), (16, 16), (17, 33), (130, 5), (1030, 3)])
def test_head_sizes(D, Dv, dtype, seed):
    rng = generator(seed, D, Dv)
    *arrays, b = arrays_of(rng, (2,), 2, 1, 20, 40, D, Dv, dtype, heads=True)
    for bias in None, b:
        check(arrays, {}, seed, bias)
        check_gradients(*saved(rng, arrays, bias, {}), seed)


@both_dtypes
@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("H, Hkv, heads", [(1, 1, False), (6, 2, True), (4, 4, True), (4, 1, False)])
def test_heads(H, Hkv, heads, normalizer, dtype, seed):
    rng = generator(seed, H, Hkv)
    *arrays, b = arrays_of(rng, (2,), H, Hkv, 70, 130, 8, 9, dtype, heads=heads)
    options = {"normalizer": normalizer}
    check(arrays, options, seed, b)
    check_gradients(*saved(rng, arrays, b, options), seed)


@both_dtypes
@pytest.mark.parametrize("L, S", [(1, 100), (19, 7), (65, 98)])
def test_each_option_alone(L, S, dtype, seed):
    rng = generator(seed, L, S)
    *arrays, b = arrays_of(rng, (2,), 2, 1, L, S, 5, 4, dtype)
    for number, options in enumerate(test_attention.options_alone(rng, 2, 2, L, S, dtype)):
        if options.keys() & {"bias", "scale"}:
            continue
        check(arrays, options, seed, b, number=number)
        if number % 4 == 0:
            check_gradients(*saved(rng, arrays, b, options), seed)


@settings(max_examples=100)
@given(test_attention.calls())
def test_options_together(seed, call):
    dtype, lead, batch, h, hkv, rows, keys, d, dv, number, choice = call
    rng = generator(seed, number)
    *arrays, b = arrays_of(rng, lead, h, hkv, rows, keys, d, dv, dtype)
    options = test_attention.build(rng, choice, dtype, lead, batch, h, rows, keys)
    options = {name: option for name, option in options.items() if name not in ("bias", "scale")}
    arrays = [LAYOUTS[choice["layout"]](x) for x in arrays[:3]] + [arrays[3]]
    check(arrays, options, seed, b, number=number)
    check_gradients(*saved(rng, arrays, b, options), seed)


@pytest.mark.parametrize("kind", test_half.KINDS, ids=", ".join)
@pytest.mark.parametrize("wide", [False, True])
def test_16_bits(wide, kind, seed):
    rng = generator(seed, kind)
    q, k, v = test_half.arrays_of(rng, kind, (2,), 4, 2, 70, 130, 8, 9)
    w, b = (rng.standard_normal(8).astype(F32 if wide else q.dtype) for _ in range(2))
    check((q, k, v, w), {}, seed, b)
    check_gradients(*saved(rng, (q, k, v, w), b, {}), seed)


@both_dtypes
def test_saturated_tanh(dtype, seed):
    """Sums that tanh makes +-1 of, and sums that cancel; denormal ones."""
    rng = generator(seed)
    for size in 1e-40, 1e-20, 1e-3, 30.0, 1e4, 1e20, 1e38 if dtype == F32 else 1e300:
        q, k, v, w, b = arrays_of(rng, (), 1, 1, 20, 100, 6, 3, dtype)
        q, k = (dtype(size) * np.sign(x) for x in (q, k))
        check((q, k, v, w), {}, seed, b, size=size)
        check_gradients(*saved(rng, (q, k, v, w), None, {}), seed)


def test_two_axes_and_broadcast_batches(seed):
    rng = generator(seed)
    q, k, v, w, b = arrays_of(rng, (), 1, 1, 9, 12, 8, 6)
    arrays = q[0], k[0], v[0], w
    out, _ = check(arrays, {}, seed, b)
    assert out.shape == (9, 6)
    check_gradients(*saved(rng, arrays, b, {}), seed)
    q, k, v, w, b = arrays_of(rng, (3,), 2, 1, 9, 12, 8, 6)
    arrays = q[:1], k, v, w
    out, _ = check(arrays, {}, seed, b)
    assert out.shape == (3, 2, 9, 6)
    arguments, options = saved(rng, arrays, b, {})
    got = fa.additive_attention_backward(*arguments, **options)
    full = (arguments[0], q[:1].repeat(3, axis=0), *arguments[2:])
    whole = fa.additive_attention_backward(*full, **options)
    assert got.query.shape == q[:1].shape
    assert_close(got.query, whole.query.astype(F64).sum(axis=0, keepdims=True), 1e-5 * abs(whole.query).max(), {})
    for name in ("key", "value", "weight", "bias"):
        assert_close(getattr(got, name), getattr(whole, name), 1e-5 * abs(getattr(whole, name)).max(), {"part": name})


# --- NaN and Inf ---

@both_dtypes
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("hidden_by", ["mask", "causal", "kv_lengths"])
def test_hidden_nan_and_inf_are_harmless(hidden_by, poison, dtype, seed):
    rng = generator(seed, hidden_by)
    *arrays, b = arrays_of(rng, (), 2, 1, 70, 200, 5, 4, dtype)
    mask = rng.random((70, 200)) < 0.6
    mask[:, [5, 100, 199]] = False
    options = {"mask": {"mask": mask}, "causal": {"causal": True, "query_offset": 0},
               "kv_lengths": {"kv_lengths": 180}}[hidden_by]
    gone = {"causal": slice(70, 200), "kv_lengths": slice(180, 200)}.get(hidden_by, [5, 100, 199])
    grad_out = rng.standard_normal((2, 70, 4)).astype(dtype)
    results = []
    for filling in 0, poison:
        arrays[1][:, gone] = arrays[2][:, gone] = filling
        out, lse = fa.additive_attention(*arrays, bias=b, return_lse=True, **options)
        results.append([out, lse, *fa.additive_attention_backward(grad_out, *arrays, out, lse, bias=b, **options)[:5]])
    for before, after in zip(*results):
        assert np.isfinite(before).all()
        allowed = 0 if fa.isa() != "reference" else 200 * np.finfo(before.dtype).eps * (1 + abs(before))
        assert (abs(before - after) <= allowed).all(), (hidden_by, poison)


@both_dtypes
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [0, 1, 2])
def test_live_nan_and_inf_propagate(where, poison, dtype, seed):
    *arrays, _ = arrays_of(generator(seed, where), (), 1, 1, 70, 200, 5, 4, dtype)
    arrays[where][0, 60, 1] = poison
    for options in {}, {"causal": True, "query_offset": 0}:
        out, _ = check(arrays, options, seed)
        assert np.isnan(out).any() == (poison != poison)  # tanh of Inf is 1
        assert np.isinf(out).any() == (poison == poison and where == 2)


# --- bits ---

@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("normalizer", ["softmax", "entmax15"])
def test_bits(normalizer, dtype, seed):
    rng = generator(seed)
    *arrays, b = arrays_of(rng, (2,), 4, 2, 150, 300, 12, 10, dtype, heads=True)
    grad_out = rng.standard_normal((2, 4, 150, 10)).astype(dtype)

    def results(arrays, grad_out, bias, **more):
        more["normalizer"] = normalizer
        out, lse = fa.additive_attention(*arrays, bias=bias, return_lse=True, **more)
        return [out, lse, *fa.additive_attention_backward(grad_out, *arrays, out, lse, bias=bias, **more)[:5]]

    whole = results(arrays, grad_out, b)
    for n in 1, 2, 3, 5:
        for got, expected in zip(results(arrays, grad_out, b, num_threads=n), whole):
            assert_same_bits(got, expected, {"threads": n})
    for layout in LAYOUTS:
        moved = [LAYOUTS[layout](x) for x in arrays]
        for got, expected in zip(results(moved, LAYOUTS[layout](grad_out), b), whole):
            assert_same_bits(got, expected, {"layout": layout})
    for i, h in itertools.product(range(2), range(2)):
        batch, heads = slice(i, i + 1), slice(2 * h, 2 * h + 2)
        at, kv = (batch, heads), (batch, slice(h, h + 1))
        one = arrays[0][at], arrays[1][kv], arrays[2][kv], arrays[3][heads]
        for got, expected in zip(results(one, grad_out[at], b[heads]), [*(whole[n][at] for n in range(3)),
                                                                       whole[3][kv], whole[4][kv]]):
            assert_same_bits(got, expected, {"batch": i, "head": h})
    for rows in slice(0, 1), slice(60, 66), slice(0, 64):
        got = fa.additive_attention(arrays[0][:, :, rows], *arrays[1:], bias=b, normalizer=normalizer)
        assert_same_bits(got, whole[0][:, :, rows], {"rows": rows})


# --- bad arguments ---

def good():
    return {"query": np.zeros((2, 4, 5, 8), F32), "key": np.zeros((2, 2, 7, 8), F32),
            "value": np.zeros((2, 2, 7, 6), F32), "weight": np.zeros(8, F32)}


V, T = ValueError, TypeError
BAD = [
    ({"weight": None}, T, "weight must be an array, got NoneType"),
    ({"weight": np.zeros(8)}, T, "weight must have query's dtype float32, got float64"),
    ({"weight": np.zeros(8, np.float16)}, T, "weight must have query's dtype float32, got float16"),
    ({"weight": np.zeros(7, F32)}, V, r"weight must have shape \(8,\) or \(4, 8\), got \(7,\)"),
    ({"weight": np.zeros((2, 8), F32)}, V, r"weight must have shape \(8,\) or \(4, 8\), got \(2, 8\)"),
    ({"bias": np.zeros(8)}, T, "bias must have query's dtype float32, got float64"),
    ({"bias": np.zeros((4, 1), F32)}, V, r"bias must have shape \(8,\) or \(4, 8\), got \(4, 1\)"),
    ({"bias": fa.ALiBi(np.ones(4))}, T, "bias must be .*, got ALiBi"),
    ({"key": np.zeros((2, 2, 7, 9), F32)}, V, "key must have query's head size 8, got 9"),
    ({"normalizer": "softmin"}, V, "normalizer must be one of .*, got 'softmin'"),
]


@pytest.mark.parametrize("module", [fa, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("spoil, error, message", BAD, ids=str)
def test_bad_argument(spoil, error, message, module):
    arguments = good()
    out, lse = module.additive_attention(**arguments, return_lse=True)
    module.additive_attention_backward(out, **arguments, out=out, lse=lse)  # the spoilt argument is the reason
    arguments |= spoil
    for call in (lambda: module.additive_attention(**arguments),
                 lambda: module.additive_attention_backward(out, **arguments, out=out, lse=lse)):
        with pytest.raises(error) as caught:
            call()
        assert re.fullmatch(message, str(caught.value)), str(caught.value)
