"""Weights that are no softmax: the reference against definitions of its own, the kernels under cases.py's bound."""

import itertools
import re

import numpy as np
import pytest
import test_attention
import test_backward
import test_half
from cases import assert_close, bound, exact, generator, inputs
from hypothesis import given, settings
from layouts import LAYOUTS, assert_same_bits
from test_attention import LENGTHS, both_dtypes, told

import fastattn as fa
from fastattn import checks, reference

NAN, INF = np.nan, np.inf
F32, F64 = np.float32, np.float64

NORMALIZERS = ["softmax1", "sigmoid", ("sigmoid", 1.5), "relu", "sparsemax", "entmax15"]
WITH_THRESHOLD = ["sparsemax", "entmax15"]
each_normalizer = pytest.mark.parametrize("normalizer", NORMALIZERS, ids=str)


def check(arrays, options, seed, **more):
    """out and lse under the bound, and with `out=` the same bits; inputs unmodified."""
    context = told(arrays, options, seed, **more)
    given_arrays = [*arrays, *(option for option in options.values() if isinstance(option, np.ndarray))]
    before = [array.tobytes() for array in given_arrays]
    result, lse = fa.attention(*arrays, return_lse=True, **options)
    assert result.dtype == arrays[0].dtype and lse.dtype == checks.compute_dtype(result.dtype)
    true, true_lse = exact(*arrays, **options)
    allowed = bound(*arrays, **options)
    assert_close(result, true, allowed.out, context)
    assert_close(lse, true_lse, allowed.lse, {**context, "result": "lse"})
    out = fa.attention(*arrays, **options)
    finite = np.isfinite(result)  # which NaN it is may differ
    assert_same_bits(out[finite], result[finite], {**context, "call": "without lse"})
    assert [array.tobytes() for array in given_arrays] == before, f"{context}: an input was modified"
    return result, lse


# --- the kernels against the reference ---

@both_dtypes
@each_normalizer
@pytest.mark.parametrize("L", [1, 2, 3, 7, 17, 63, 64, 65, 97, 130])
def test_lengths(L, normalizer, dtype, seed):
    for S in [0, *LENGTHS, 600]:
        rng = generator(seed, L, S)
        D, Dv = (int(n) for n in rng.integers(1, 24, 2))
        arrays = inputs(rng, (), 1, 1, L, S, D, Dv, dtype)
        for options in {}, {"causal": True}:
            check(arrays, {**options, "normalizer": normalizer}, seed)


# equal scores, scores of any size, and rows so flat that most keys are in the support
SIZES = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e-18, 1e-9, 1e-4, 1e-3, 0.01, 0.1, 1.0, -1.0, 10.0, 1e3, -1e4, 1e10, 1e20,
         1e30]


@both_dtypes
@each_normalizer
@pytest.mark.parametrize("S", [5, 97, 700, 3000])
def test_scores_of_any_size(S, normalizer, dtype, seed):
    for scale in SIZES:
        rng = generator(seed, S, scale)
        L = 70 if S < 1000 else 20
        arrays = inputs(rng, (), 1, 1, L, S, 6, 5, dtype)
        for options in {}, {"bias": rng.standard_normal((L, S)).astype(dtype)}, {"softcap": 4.0}:
            check(arrays, {**options, "scale": scale, "normalizer": normalizer}, seed)


@both_dtypes
@each_normalizer
@pytest.mark.parametrize("L, S", [(1, 100), (19, 7), (37, 130), (66, 130)])
def test_each_option_alone(L, S, normalizer, dtype, seed):
    rng = generator(seed, L, S)
    arrays = inputs(rng, (2,), 2, 1, L, S, 8, 9, dtype)
    for number, options in enumerate(test_attention.options_alone(rng, 2, 2, L, S, dtype)):
        if "sinks" not in options:
            check(arrays, {**options, "normalizer": normalizer}, seed, number=number)


@each_normalizer
@settings(max_examples=100)
@given(test_attention.calls())
def test_options_together(normalizer, seed, call):
    dtype, lead, batch, h, hkv, rows, keys, d, dv, number, choice = call
    rng = generator(seed, number)
    arrays = inputs(rng, lead, h, hkv, rows, keys, d, dv, dtype)
    options = test_attention.build(rng, choice, dtype, lead, batch, h, rows, keys)
    options.pop("sinks", None)
    arrays = tuple(LAYOUTS[choice["layout"]](array) for array in arrays)
    check(arrays, {**options, "normalizer": normalizer}, seed, number=number, layout=choice["layout"])


# --- gradients ---

def saved(rng, arrays, **options):
    """The arguments of the backward pass."""
    return test_backward.saved(rng, arrays, grad_lse=options["normalizer"] == "softmax1", **options)


@both_dtypes
@each_normalizer
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (64, 96, 16, 16), (65, 97, 17, 1), (63, 95, 1, 33), (200, 500, 40, 24),
                                   (3, 1300, 8, 8), (300, 2, 8, 136), (5, 7, 0, 3), (5, 7, 3, 0), (5, 0, 3, 3)],
                         ids=str)
def test_gradients_of_any_size(sizes, normalizer, dtype, seed):
    rows, keys, d, dv = sizes
    rng = generator(seed, sizes)
    for h, hkv in [(1, 1), (6, 2)]:
        arrays = inputs(rng, (2,), h, hkv, rows, keys, d, dv, dtype)
        for scale in None, 0.05, 20.0:
            arguments, options = saved(rng, arrays, normalizer=normalizer, scale=scale)
            test_backward.check(arguments, options, told(arrays, options, seed))


@both_dtypes
@each_normalizer
@pytest.mark.parametrize("rows, keys", [(19, 130), (66, 130)])
def test_gradients_with_each_option_alone(rows, keys, normalizer, dtype, seed):
    rng = generator(seed, rows, keys)
    arrays = inputs(rng, (2,), 2, 1, rows, keys, 8, 9, dtype)
    for number, options in enumerate(test_attention.options_alone(rng, 2, 2, rows, keys, dtype)):
        if "sinks" not in options:
            arguments, more = saved(rng, arrays, normalizer=normalizer, **options)
            test_backward.check(arguments, more, told(arrays, options, seed, number=number))


@both_dtypes
@each_normalizer
def test_gradients_with_dropout(normalizer, dtype, seed):
    rng = generator(seed)
    arrays = inputs(rng, (2,), 4, 2, 70, 200, 8, 9, dtype)
    for options in {}, {"causal": True, "scale": 0.1}, {"bias": rng.standard_normal((70, 200)).astype(dtype)}:
        options = {**options, "normalizer": normalizer, "dropout_p": 0.4, "seed": 5}
        check(arrays, options, seed)
        arguments, more = saved(rng, arrays, **options)
        test_backward.check(arguments, more, told(arrays, options, seed))


# --- the reference against definitions of its own ---

def weight_of(normalizer, scores, j):
    """Weight j of scores, which are Python floats or longdoubles; thresholds by bisection."""
    n, one = len(scores), np.longdouble(1)
    if normalizer == "softmax1":
        m = max(0 * one, max(scores))
        return np.exp(scores[j] - m) / (np.exp(-m) + sum(np.exp(s - m) for s in scores))
    if normalizer == "relu":
        return max(scores[j], 0 * one) / n
    if "sigmoid" in normalizer:
        shift = -np.log(one * n) if normalizer == "sigmoid" else one * normalizer[1]
        return 1 / (1 + np.exp(-(scores[j] + shift)))
    power, scores = (1, scores) if normalizer == "sparsemax" else (2, [s / 2 for s in scores])
    low, high = max(scores) - 1, max(scores)
    for _ in range(80):
        middle = (low + high) / 2
        if sum(max(s - middle, 0 * one) ** power for s in scores) >= 1:
            low = middle
        else:
            high = middle
    return max(scores[j] - low, 0 * one) ** power


@each_normalizer
def test_reference_against_scalar_loops(normalizer, seed):
    for number in range(60):
        rng = generator(seed, number)
        L, S, D = (int(n) for n in rng.integers(1, 9, 3))
        q, k = rng.standard_normal((L, D)), rng.standard_normal((S, D))
        mask, bias = rng.random((L, S)) < 0.7, rng.integers(-2, 3, (L, S)).astype(F64)  # ties
        scale = float(rng.choice([0.0, 0.1, 1.0, 5.0]))
        expected = np.zeros((L, S))
        for i in range(L):
            seen = np.flatnonzero(mask[i])
            scores = [np.longdouble(scale) * sum(np.longdouble(a) * b for a, b in zip(q[i], k[j])) + bias[i, j]
                      for j in seen]
            for at, j in enumerate(seen):
                # n counts the keys of the sequence, whether they are seen or not
                padding = [np.longdouble(-1e30)] * (S - len(seen)) if normalizer in ("relu", "sigmoid") else []
                expected[i, j] = weight_of(normalizer, scores + padding, at)
        got = reference.attention_weights(q, k, mask=mask, bias=bias, scale=scale, normalizer=normalizer)
        assert_close(got, expected, 1e-13, {"number": number, "normalizer": normalizer, "seed": seed})


@each_normalizer
def test_lse(normalizer, seed):
    """What takes its place: of sparsemax and entmax15 the threshold, from which the weights follow; else 0."""
    q, k, v = inputs(generator(seed), (), 1, 1, 30, 50, 8, 4, F64)
    mask = np.ones((30, 50), bool)
    mask[3] = False
    lse = reference.attention(q, k, v, mask=mask, normalizer=normalizer, return_lse=True)[1][0]
    s = (q @ k.swapaxes(1, 2))[0] / np.sqrt(8)
    p = reference.attention_weights(q, k, mask=mask, normalizer=normalizer)[0]
    assert lse[3] == (0 if normalizer == "softmax1" else -INF)  # its sink
    s, p, lse = (np.delete(x, 3, axis=0) for x in (s, p, lse))
    if normalizer == "softmax1":
        assert_close(lse, np.log(1 + np.exp(s).sum(axis=1)), 1e-13, {})
    elif normalizer == "sparsemax":
        assert_close(p, np.maximum(s - lse[:, None], 0), 1e-13, {})
    elif normalizer == "entmax15":
        assert_close(p, np.maximum(s / 2 - lse[:, None], 0) ** 2, 1e-13, {})
    else:
        assert (lse == 0).all()


def far_from_kinks(arrays, options, normalizer):
    """Whether no step of a difference moves a score across its threshold."""
    problem = checks.problem(*arrays, normalizer=normalizer, **options)
    scores, visible = reference.logits(problem, 0, (0, 0), (0, 0), F64)
    level = reference.normalise(problem, 0, (0, 0), scores, visible)[1]
    if normalizer not in ("relu", *WITH_THRESHOLD):
        return True
    distance = abs(scores / (2 if normalizer == "entmax15" else 1) - level[:, None])
    return (distance[visible] > 5e-3).all()


@each_normalizer
def test_gradients_against_differences(normalizer, seed):
    """Of the reference and of the kernel: the derivative along a direction, to 1e-7 of what its terms amount to."""
    tried = 0
    for number in itertools.count():
        if tried == 60:
            break
        rng = generator(seed, normalizer, number)
        L, S, D, Dv = (int(n) for n in rng.integers(1, 7, 4))
        arrays = [rng.standard_normal((1, 1, n, d)) for n, d in ((L, D), (S, D), (S, Dv))]
        options = {"scale": 0.8, "softcap": 3.0, "causal": True, "mask": rng.random((L, S)) < 0.7,
                   "bias": rng.standard_normal((L, S)), "kv_lengths": S - S // 3, "dropout_p": 0.4}
        options = {name: option for name, option in options.items() if rng.random() < 0.4} | {"seed": 7}
        if not far_from_kinks(arrays, options, normalizer):
            continue
        tried += 1
        options["normalizer"] = normalizer
        grad_out = rng.standard_normal((1, 1, L, Dv))
        for module in fa, reference:
            check_differences(rng, module, arrays, grad_out, options, number)


def check_differences(rng, module, arrays, grad_out, options, number):
    names = ["bias"] if "bias" in options else []
    at = [*arrays, *(options[name] for name in names)]
    step = [rng.standard_normal(x.shape) for x in at]

    def value(t):
        moved = [x + t * d for x, d in zip(at, step)]
        return (module.attention(*moved[:3], **options | dict(zip(names, moved[3:]))) * grad_out).sum()

    out, lse = module.attention(*arrays, return_lse=True, **options)
    got = module.attention_backward(grad_out, *arrays, out, lse, **options)
    parts = [(g * d).sum() for g, d in zip([got.query, got.key, got.value, got.bias], step)]
    numeric = test_backward.differences(value)
    assert abs(numeric - sum(parts)) <= 1e-7 * (1 + np.abs(parts).sum()), (number, module.__name__, options)


# --- the other ways in ---

@pytest.mark.parametrize("kind", [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16"),
                                  ("float32", "bfloat16")], ids=", ".join)
@each_normalizer
def test_16_bits(normalizer, kind, seed):
    of_query, of_key = (test_half.dtype_of(name) for name in kind)
    for L, S in [(3, 130), (70, 300)]:
        rng = generator(seed, kind, L)
        q, k, v = inputs(rng, (2,), 4, 2, L, S, 24, 17)
        arrays = q.astype(of_query), k.astype(of_key), v.astype(of_key)
        for options in {}, {"causal": True, "scale": 2.0}, {"softcap": 3.0}:
            options = {**options, "normalizer": normalizer}
            check(arrays, options, seed)
            arguments, more = saved(rng, arrays, **options)
            test_backward.check(arguments, more, told(arrays, options, seed))


@both_dtypes
@each_normalizer
def test_masks_and_biases_from_positions(normalizer, dtype, seed):
    rng = generator(seed)
    arrays = inputs(rng, (2,), 4, 2, 100, 300, 8, 9, dtype)
    for options in [{"mask": fa.masks.window(70, 3)}, {"mask": fa.masks.bigbird(4, random=2).compile(100, 300)},
                    {"bias": fa.ALiBi(rng.random(4))}]:
        options = {**options, "normalizer": normalizer}
        out, lse = fa.attention(*arrays, return_lse=True, **options)
        allowed = bound(*arrays, **options)
        true, true_lse = exact(*arrays, **options)
        assert_close(out, true, allowed.out, told(arrays, options, seed))
        assert_close(lse, true_lse, allowed.lse, told(arrays, options, seed))
        arguments, more = saved(rng, arrays, **options)
        test_backward.check(arguments, more, told(arrays, options, seed))


@pytest.mark.compiled
@both_dtypes
@each_normalizer
def test_packed_sequences(normalizer, dtype, seed):
    """The bits of each sequence alone; the n of relu and sigmoid is its own."""
    rng = generator(seed)
    lengths = [(3, 5), (0, 4), (70, 100), (5, 0), (64, 97), (1, 1)]
    cu_q, cu_k = (np.concatenate(([0], np.cumsum(n))) for n in zip(*lengths))
    q, k, v = (rng.standard_normal((n, h, d)).astype(dtype) for n, h, d in ((cu_q[-1], 4, 8), (cu_k[-1], 2, 8),
                                                                           (cu_k[-1], 2, 7)))
    grad_out = rng.standard_normal((cu_q[-1], 4, 7)).astype(dtype)
    for options in {}, {"causal": True}, {"scale": 0.01}:
        options = {**options, "normalizer": normalizer, "deterministic": "row"}
        out, lse = fa.varlen_attention(q, k, v, cu_q, cu_k, return_lse=True, **options)
        grads = fa.varlen_attention_backward(grad_out, q, k, v, out, lse, cu_q, cu_k, **options)
        for b in range(len(lengths)):
            rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
            one = [x.swapaxes(0, 1) for x in (q[rows], k[keys], v[keys])]
            alone, alone_lse = fa.attention(*one, return_lse=True, **options)
            grads_alone = fa.attention_backward(grad_out[rows].swapaxes(0, 1), *one, alone, alone_lse, **options)
            for got, expected in [(out[rows], alone), (lse[rows, :, None], alone_lse[..., None]),
                                  (grads.query[rows], grads_alone.query), (grads.key[keys], grads_alone.key),
                                  (grads.value[keys], grads_alone.value)]:
                assert_same_bits(got, expected.swapaxes(0, 1), {"sequence": b, "options": options, "seed": seed})


@each_normalizer
def test_cache(normalizer, seed):
    rng = generator(seed)
    cache = fa.KVCache(40, 16, 2, 8, value_dim=7)
    lengths = [1, 16, 130, 300]
    of = [inputs(rng, (1,), 4, 2, 5, n, 8, 7) for n in lengths]
    for i, (_, k, v) in enumerate(of):
        cache.append([i], k, v)
    query = np.concatenate([q for q, _, _ in of])
    for options in {}, {"causal": True}, {"scale": 0.01}:
        options = {**options, "normalizer": normalizer}
        out, lse = cache.attend(query, range(4), return_lse=True, **options)
        for i, (q, k, v) in enumerate(of):
            true, true_lse = exact(q, k, v, **options)
            allowed = bound(q, k, v, **options)
            assert_close(out[i], true[0], allowed.out[0], {"sequence": i, "options": options, "seed": seed})
            assert_close(lse[i], true_lse[0], allowed.lse[0], {"sequence": i, "options": options, "seed": seed})


@both_dtypes
def test_softmax1_is_a_sink_of_zero(dtype, seed):
    rng = generator(seed)
    arrays = inputs(rng, (2,), 4, 2, 70, 130, 8, 9, dtype)
    one, other = {"normalizer": "softmax1"}, {"sinks": np.zeros(4, dtype)}
    results = [fa.attention(*arrays, return_lse=True, deterministic="row", **options) for options in (one, other)]
    for a, b in zip(*results):
        assert_same_bits(a, b, {"dtype": dtype, "seed": seed})
    grad_out = rng.standard_normal(results[0][0].shape).astype(dtype)
    for a, b in zip(*(fa.attention_backward(grad_out, *arrays, *result, **options)[:3]
                      for result, options in zip(results, (one, other)))):
        assert_same_bits(a, b, {"dtype": dtype, "seed": seed})


# --- weights ---

def check_weights(query, key, options, seed):
    """attention_weights with every reduction: the errors of weights are those of attention to the rows of a unit
    matrix; of a sum the sum of them; of the maximum and the k-th largest the largest. p ln p moves by
    e (|ln p'| + 1) with p' between p - e and p + e, and by no more than e ln e where p is less than that.
    """
    context = told((query, key), options, seed)
    unit = np.broadcast_to(np.eye(key.shape[-2], dtype=key.dtype), (*key.shape[:-1], key.shape[-2]))
    p, e = exact(query, key, unit, **options)[0].astype(F64), bound(query, key, unit, **options).out
    u = np.finfo(key.dtype).eps / 2
    L, S = p.shape[-2:]
    full = fa.attention_weights(query, key, **options)
    assert_close(full, p, e, context)
    if options["normalizer"] in WITH_THRESHOLD:
        rows = p.sum(axis=-1) > 0
        assert_close(full.astype(F64).sum(axis=-1), rows.astype(F64), e.sum(axis=-1), {**context, "sum": "of a row"})
    got = fa.attention_weights(query, key, reduce="sum", **options)
    assert_close(got, p.sum(axis=-2), e.sum(axis=-2) + (L + 8) * u * (p + e).sum(axis=-2), {**context, "reduce": "sum"})
    got = fa.attention_weights(query, key, reduce="max", **options)
    assert_close(got, p.max(axis=-2), e.max(axis=-2), {**context, "reduce": "max"})
    with np.errstate(all="ignore"):
        term = np.where(p == 0, 0, p * np.log(p))
        logs = np.maximum(abs(np.log(p + e)), abs(np.log(p - e))) + 1
        off = np.where(p > 2 * e, e * logs, np.where(e > 0, 3 * e * (abs(np.log(e)) + 1), 0))
    size = abs(term) + off
    got = fa.attention_weights(query, key, reduce="entropy", **options)
    assert_close(got, -term.sum(axis=-1), off.sum(axis=-1) + (S + 8) * u * size.sum(axis=-1),
                 {**context, "reduce": "entropy"})
    n = min(5, S)
    values, at = fa.attention_weights(query, key, reduce=("top_k", n), **options)
    assert_close(values, -np.sort(-p, axis=-1)[..., :n], e.max(axis=-1, keepdims=True), {**context, "reduce": "top_k"})
    there = np.where(at < 0, 0, np.take_along_axis(p, np.maximum(at, 0), -1))
    assert_close(values, there, e.max(axis=-1, keepdims=True), {**context, "reduce": "indices of top_k"})
    rows = [0, L - 1, L // 2]
    assert_close(fa.attention_weights(query, key, rows=rows, **options), full[..., rows, :], 1e-12, context)


@both_dtypes
@each_normalizer
@pytest.mark.parametrize("L, S", [(5, 7), (70, 140), (64, 96), (66, 200)])
def test_weights(L, S, normalizer, dtype, seed):
    rng = generator(seed, L, S)
    query, key, _ = inputs(rng, (), 2, 1, L, S, 8, 1, dtype)
    mask = rng.random((L, S)) < 0.6
    mask[L // 2] = False
    for options in {}, {"causal": True}, {"scale": 0.01}, {"scale": 30.0}, {"mask": mask}, {"softcap": 2.0}:
        check_weights(query, key, {**options, "normalizer": normalizer}, seed)


# --- NaN and Inf ---

@both_dtypes
@each_normalizer
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["query", "key", "value", "bias"])
@pytest.mark.parametrize("L", [3, 70])
def test_live_nan_and_inf_propagate(L, where, poison, normalizer, dtype, seed):
    S = 200
    rng = generator(seed, L, where)
    q, k, v = inputs(rng, (), 1, 1, L, S, 4, 3, dtype)
    options = {"normalizer": normalizer, "bias": rng.standard_normal((L, S)).astype(dtype)}
    target = {"query": q[0], "key": k[0], "value": v[0], "bias": options["bias"]}[where]
    target[len(target) // 2, 0] = poison
    target[len(target) - 1, -1] = poison
    for more in {}, {"causal": True}, {"mask": rng.random((L, S)) < 0.5}:
        with np.errstate(all="ignore"):
            out, lse = check((q, k, v), {**options, **more}, seed)
            plain = {name: option for name, option in options.items() if name != "bias"}
            check((q, k, v), {**plain, **more}, seed)
    if where == "key" and poison != poison and normalizer in WITH_THRESHOLD:
        seen = fa.attention_weights(q, k, normalizer=normalizer)
        assert np.isnan(seen).all()


@both_dtypes
@each_normalizer
@pytest.mark.parametrize("poison", [NAN, INF, -INF])
@pytest.mark.parametrize("hidden_by", ["mask", "bias", "causal", "kv_lengths"])
def test_hidden_nan_and_inf_change_no_bit(hidden_by, poison, normalizer, dtype, seed):
    L, S = 70, 200
    rng = generator(seed, hidden_by)
    q, k, v = inputs(rng, (), 1, 1, L, S, 4, 3, dtype)
    mask = rng.random((L, S)) < 0.6
    mask[:, [5, 100, 199]] = False
    options = {"mask": {"mask": mask}, "bias": {"bias": np.where(mask, 0, -INF).astype(dtype)},
               "causal": {"causal": True, "query_offset": 0}, "kv_lengths": {"kv_lengths": 180}}[hidden_by]
    options["normalizer"] = normalizer
    gone = {"causal": slice(L, S), "kv_lengths": slice(180, S)}.get(hidden_by, [5, 100, 199])
    grad_out = rng.standard_normal((1, L, 3)).astype(dtype)
    results = []
    for filling in 0, poison:
        k[:, gone] = v[:, gone] = filling
        out, lse = fa.attention(q, k, v, return_lse=True, **options)
        grads = fa.attention_backward(grad_out, q, k, v, out, lse, **options)
        results.append([out, lse, grads.query, grads.key, grads.value, fa.attention_weights(q, k, **options)])
    for before, after in zip(*results):
        assert np.isfinite(before).all()
        # NumPy's matrix product makes no promise about bits: a rounding of one of 200 terms
        allowed = 0 if fa.isa() != "reference" else 200 * np.finfo(before.dtype).eps * (1 + abs(before))
        assert (abs(before - after) <= allowed).all(), (hidden_by, poison)


@both_dtypes
@pytest.mark.parametrize("normalizer", WITH_THRESHOLD)
def test_scores_of_minus_infinity_alone_are_nan(normalizer, dtype):
    q, k, v = np.ones((3, 2), dtype), np.full((5, 2), -INF, dtype), np.ones((5, 4), dtype)
    out, lse = fa.attention(q, k, v, normalizer=normalizer, return_lse=True)
    assert np.isnan(out).all() and np.isnan(lse).all()
    k[2] = 0
    assert (fa.attention(q, k, v, normalizer=normalizer) == 1).all()


@each_normalizer
def test_empty_rows(normalizer, seed):
    q, k, v = inputs(generator(seed), (2,), 2, 1, 70, 130, 8, 9)
    for options in {"mask": np.zeros((70, 130), bool)}, {"kv_lengths": 0}, {"query_lengths": 0}, {"causal": True,
                                                                                                "query_offset": -200}:
        out, lse = fa.attention(q, k, v, return_lse=True, normalizer=normalizer, **options)
        sink = 0 if normalizer == "softmax1" and "query_lengths" not in options else -INF
        assert (out == 0).all() and (lse == sink).all()
        for grad in fa.attention_backward(out + 1, q, k, v, out, lse, normalizer=normalizer, **options)[:3]:
            assert (grad == 0).all()


# --- bits ---

BITS = {"none": {}, "flat": {"scale": 1e-3}, "causal": {"causal": True}, "softcap": {"softcap": 2.0},
        "dropout": {"dropout_p": 0.3, "seed": 3}}


@pytest.mark.compiled  # NumPy's matrix product makes no such promise
@both_dtypes
@each_normalizer
@pytest.mark.parametrize("name", BITS)
def test_bits(name, normalizer, dtype, seed):
    """They depend on a row's query, its keys and the options: not on threads, the batch, strides or padding."""
    B, H, Hkv, L, S = 2, 4, 2, 150, 300
    rng = generator(seed, name)
    q, k, v = inputs(rng, (B,), H, Hkv, L, S, 12, 10, dtype)
    q[..., ::7, :] *= 30
    grad_out = rng.standard_normal((B, H, L, 10)).astype(dtype)
    options = {**BITS[name], "normalizer": normalizer}
    of_weights = {n: o for n, o in options.items() if n not in ("dropout_p", "seed")}

    def results(arrays, grad_out, **more):
        out, lse = fa.attention(*arrays, return_lse=True, **options, **more)
        return [out, lse, *fa.attention_backward(grad_out, *arrays, out, lse, **options, **more)[:3],
                fa.attention_weights(*arrays[:2], **of_weights, **more)]

    whole = results((q, k, v), grad_out)
    for n in 1, 2, 3, 5:
        for got, expected in zip(results((q, k, v), grad_out, num_threads=n), whole):
            assert_same_bits(got, expected, {"options": options, "threads": n})
    for layout in LAYOUTS:
        moved = [LAYOUTS[layout](x) for x in (q, k, v)]
        for got, expected in zip(results(moved, LAYOUTS[layout](grad_out)), whole):
            assert_same_bits(got, expected, {"options": options, "layout": layout})
    if name != "dropout":  # whose numbers are those of batch and head
        for b, h in itertools.product(range(B), range(Hkv)):
            at = slice(b, b + 1), slice(2 * h, 2 * h + 2)
            one = q[at], k[b : b + 1, h : h + 1], v[b : b + 1, h : h + 1]
            kv = slice(b, b + 1), slice(h, h + 1)
            for got, expected, where in zip(results(one, grad_out[at]), whole, [at, at, at, kv, kv, at]):
                assert_same_bits(got, expected[where], {"options": options, "batch": b, "head": h})
    if name == "causal":
        return
    for rows in slice(0, 1), slice(5, 8), slice(60, 66), slice(149, 150), slice(0, 64):
        if name != "dropout":
            got = fa.attention(q[:, :, rows], k, v, deterministic="row", return_lse=True, **options)
            assert_same_bits(got[0], whole[0][:, :, rows], {"options": options, "rows": rows})
            assert_same_bits(got[1], whole[1][:, :, rows], {"options": options, "rows": rows})
    # keys that nobody sees, behind the others
    longer = [np.concatenate([x, np.full((B, Hkv, 70, x.shape[-1]), NAN, dtype)], axis=-2) for x in (k, v)]
    out, lse = fa.attention(q, *longer, kv_lengths=S, return_lse=True, **options)
    assert_same_bits(out, whole[0], {"options": options, "padding": 70})
    assert_same_bits(lse, whole[1], {"options": options, "padding": 70})


# --- bad arguments ---

V, T = ValueError, TypeError
BAD = [
    ({"normalizer": "softmin"}, V, r"normalizer must be one of \('softmax', .*'entmax15'\), got 'softmin'"),
    ({"normalizer": 3}, T, r"normalizer must be a string or \('sigmoid', shift\), got int"),
    ({"normalizer": ("sigmoid",)}, T, r"normalizer must be a string or \('sigmoid', shift\), got tuple"),
    ({"normalizer": ("relu", 1.0)}, T, r"normalizer must be a string or \('sigmoid', shift\), got tuple"),
    ({"normalizer": ("sigmoid", NAN)}, V, "the shift of normalizer must be finite in float32, got nan"),
    ({"normalizer": ("sigmoid", INF)}, V, "the shift of normalizer must be finite in float32, got inf"),
    ({"normalizer": ("sigmoid", 1e39)}, V, r"the shift of normalizer must be finite in float32, got 1e\+39"),
    ({"normalizer": ("sigmoid", "1")}, T, "the shift of normalizer must be a real number, got str"),
    ({"normalizer": ("sigmoid", True)}, T, "the shift of normalizer must be a real number, got bool"),
    *(({"normalizer": name, "sinks": np.zeros(2, F32)}, V, f"sinks must be None with normalizer='{name}', got an array")
      for name in ("sigmoid", "relu", "sparsemax", "entmax15")),
    ({"normalizer": "softmax1", "sinks": np.zeros(2, F32)}, V,
     "sinks must be None with normalizer='softmax1', whose sink is 0, got an array"),
]


@pytest.mark.parametrize("module", [fa, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("options, error, message", BAD, ids=str)
def test_bad_argument(options, error, message, module):
    q = np.zeros((2, 3, 4), F32)
    for call in [lambda: module.attention(q, q, q, **options), lambda: module.attention_weights(q, q, **options),
                 lambda: module.attention_backward(q, q, q, q, q, q[..., 0], **options)]:
        with pytest.raises(error) as caught:
            call()
        assert re.fullmatch(message, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("module", [fa, reference], ids=["kernel", "reference"])
@pytest.mark.parametrize("normalizer", ["sigmoid", "relu", "sparsemax", "entmax15"])
def test_no_gradient_of_lse(normalizer, module):
    q = np.zeros((2, 3, 4), F32)
    with pytest.raises(ValueError, match="grad_lse must be None where the normalizer is no softmax, got an array"):
        module.attention_backward(q, q, q, q, q, q[..., 0], grad_lse=q[..., 0], normalizer=normalizer)


def test_forms_of_the_shift():
    q, k, v = inputs(generator(0), (), 1, 1, 5, 7, 4, 3)
    expected = fa.attention(q, k, v, normalizer=("sigmoid", 1.5))
    for form in ["sigmoid", F32(1.5)], ("sigmoid", np.float64(1.5)):
        assert (fa.attention(q, k, v, normalizer=form) == expected).all()
    assert (fa.attention(q, k, v, normalizer=("sigmoid", -np.log(7))) == fa.attention(q, k, v, normalizer="sigmoid")
            ).all()
