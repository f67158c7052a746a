"""Normalizers of graph attention: against their definitions, and their gradients against differences."""

import numpy as np
import pytest
from cases import UNIT_ROUNDOFF, generator
from layouts import assert_same_bits
from test_graph import F32, F64, SHAPES, arrays, both_dtypes, check, check_gradients, drawn, many, softmax_along

import fastattn as fa
from fastattn import graph

sp = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
ALONE = ["sigmoid", ("sigmoid", 0.7), "relu", "sparsemax", "entmax15"]
every_normalizer = pytest.mark.parametrize("normalizer", ["softmax", "softmax1", *ALONE], ids=str)
every_new = pytest.mark.parametrize("normalizer", ALONE, ids=str)


def threshold(excess):
    """The root of a falling function in [-1, 0], by bisection."""
    low, high = -1.0, 0.0
    for _ in range(70):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return (low + high) / 2


def definition(normalizer, s):
    """(weights, tau or 0) of the scores of one target and head."""
    if normalizer == "relu":
        return np.maximum(s, 0) / len(s), 0
    if normalizer == "sigmoid" or isinstance(normalizer, tuple):
        b = -np.log(len(s)) if normalizer == "sigmoid" else normalizer[1]
        return np.exp(-np.logaddexp(0, -(s + b))), 0
    kappa, power = (1, 1) if normalizer == "sparsemax" else (0.5, 2)
    y = kappa * (s - s.max())
    t = threshold(lambda t: (np.maximum(y - t, 0) ** power).sum() - 1)
    return np.maximum(y - t, 0) ** power, kappa * s.max() + t


def weight_errors(normalizer, s, p, tau, d, u):
    """How far weights may be off whose scores are by d, in arithmetic of roundoff u.

    Sigmoid and relu: d times the slope, and a few operations. A threshold moves by no more than its scores do, so that
    y - t is off by 2 d kappa, and by the roundings of y and t, at most 1 where it counts, and of the sum of weights
    that t makes 1: 8 vectors, then 4 of halves, in all less than 24 u. Weights of 0 may be off that close to 0.
    """
    if normalizer == "relu":
        return (d + 4 * u * abs(s)) / len(s)
    if normalizer == "sigmoid" or isinstance(normalizer, tuple):
        b = np.log(len(s)) if normalizer == "sigmoid" else normalizer[1]
        return p * (d + 4 * u * (abs(s) + abs(b)) + 12 * u)
    kappa = 1 if normalizer == "sparsemax" else 0.5
    d = 2 * d * kappa + 24 * u
    x = kappa * s - tau
    if normalizer == "sparsemax":
        return np.where(x > -d, d, 0)
    return np.where(x > -d, (2 * np.maximum(x, 0) + d) * d + 3 * u * p, 0)


def check_alone(actual, normalizer, row, scores, values, products, D, dtype, kept=None):
    """Under the bound of `weight_errors`, for weights that are summed with values in blocks of 64 edges."""
    u = UNIT_ROUNDOFF[np.dtype(dtype)]
    out, lse = actual
    for i in range(len(out)):
        for h in range(out.shape[1]):
            at = np.flatnonzero((row == i) & (scores[:, h] > -np.inf))
            if not len(at):
                assert not out[i, h].any() and lse[i, h] == -np.inf
                continue
            s, v = scores[at, h], values[at, h]
            p, tau = definition(normalizer, s)
            d = (D + 4) * u * products[at, h].max() + 4 * u * abs(s).max()
            error = weight_errors(normalizer, s, p, tau, d, u)
            stay = np.ones(len(at)) if kept is None else kept[at, h]
            sums = (min(len(at), 64) + len(at) / 64 + 12) * u
            bound = (stay * (error * (1 + sums) + p * sums)) @ abs(v) + np.finfo(dtype).tiny
            worst = abs(out[i, h] - (stay * p) @ v)
            assert (worst <= bound).all(), (fa.isa(), normalizer, i, h, (worst / bound).max())
            allowed = 0
            if normalizer in ("sparsemax", "entmax15"):
                allowed = d + 24 * u + 4 * u * (abs(tau) + abs(s).max())
            assert abs(lse[i, h] - tau) <= allowed, (fa.isa(), normalizer, i, h)


@both_dtypes
@pytest.mark.parametrize("layout", ["csr", "coo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@every_normalizer
def test_definitions(normalizer, shape, layout, dtype, seed=0):
    targets, sources, H, Hkv, D, Dv, E = shape
    for number, option in enumerate(["plain", "bias", "softcap", "dropout", "large"]):
        rng = generator(seed, number, *shape)
        edges, row, col = drawn(rng, targets, sources, E, layout)
        q, k, v = arrays(rng, dtype, (targets, H, D), (sources, Hkv, D), (sources, Hkv, Dv))
        options, bias, kept = {"normalizer": normalizer}, np.zeros((E, H)), None
        scale = options["scale"] = 300.0 if option == "large" else D**-0.5
        if option == "bias":
            bias = rng.standard_normal((E, H)).astype(dtype)
            bias[rng.random((E, H)) < 0.2] = -np.inf
            options["edge_bias"] = bias
        if option == "dropout":
            options |= {"dropout_p": 0.4, "seed": 7}
            count = np.arange(E, dtype=np.uint64)[:, None]
            numbers = fa.reference.philox((count // 4, np.uint64(0), np.arange(H, dtype=np.uint64), np.uint64(0)), 7)
            kept = np.where(np.choose((count % 4).astype(int), numbers) >= round(0.4 * 2**32), 1 / 0.6, 0)
        inner, values = (np.repeat(x[col].astype(F64), H // Hkv, axis=1) for x in (k, v))
        scores = scale * (q[row] * inner).sum(axis=-1)
        if option == "softcap":
            options["softcap"] = 1.5
            scores = 1.5 * np.tanh(scores / 1.5)
        scores = scores + bias
        products = scale * (abs(q[row]) * abs(inner)).sum(axis=-1)
        for function in (fa.graph_attention, fa.reference.graph_attention):
            actual = function(q, k, v, edges, return_lse=True, **options)
            if normalizer in ("softmax", "softmax1"):
                sinks = np.zeros(H) if normalizer == "softmax1" else None
                expected = softmax_along(row, targets, scores, values, sinks, kept)
                check(actual, expected, expected[2], products, scores, row, dtype, D)
            else:
                check_alone(actual, normalizer, row, scores, values, products, D + 4, dtype, kept)


@both_dtypes
@every_new
def test_gat_and_gatv2(normalizer, dtype):
    targets, sources, H, D, Dv, E = 20, 30, 2, 9, 5, 300
    rng = generator(0, 21)
    edges, row, col = drawn(rng, targets, sources, E, "csr")
    of_source, of_target, v = arrays(rng, dtype, (sources, H), (targets, H), (sources, H, Dv))
    x = of_source[col].astype(F64) + of_target[row]
    scores = np.where(x < 0, 0.3 * x, x)
    for function in (fa.gat_attention, fa.reference.gat_attention):
        actual = function(of_source, of_target, v, edges, negative_slope=0.3, normalizer=normalizer, return_lse=True)
        check_alone(actual, normalizer, row, scores, v[col].astype(F64), abs(x), 3, dtype)
    source, target, weight = arrays(rng, dtype, (sources, H, D), (targets, H, D), (H, D))
    x = source[col].astype(F64) + target[row]
    scores = (weight * np.where(x < 0, 0.2 * x, x)).sum(axis=-1)
    products = (abs(weight) * (abs(source[col]) + abs(target[row]))).sum(axis=-1)
    for function in (fa.gatv2_attention, fa.reference.gatv2_attention):
        actual = function(source, target, weight, edges, normalizer=normalizer, return_lse=True)
        check_alone(actual, normalizer, row, scores, source[col].astype(F64), products, D + 3, dtype)


@every_new
def test_equal_scores(normalizer):
    """Each of n edges has the same weight; also where scores are large."""
    for n in (1, 2, 3, 64, 65, 1000):
        for score in (0.0, 3.0, -1e4, 1e30):
            q, k, v = np.ones((1, 1, 1), F32), np.full((1, 1, 1), score, F32), np.ones((1, 1, 1), F32)
            edges = sp.csr_array((np.ones(n), np.zeros(n, np.int32), [0, n]), shape=(1, 1))
            out = fa.graph_attention(q, k, v, edges, scale=1.0, normalizer=normalizer)
            expected = n * definition(normalizer, np.full(n, float(F32(score))))[0][0]
            # a sum of n equal terms, and of n weights that t makes 1
            bound = (n + 12 + 40 * (normalizer in ("sparsemax", "entmax15"))) * 2.0**-24 * expected
            assert abs(out.item() - expected) <= bound + n * 2.0**-149, (fa.isa(), n, score)


# --- bits ---

@both_dtypes
@every_normalizer
def test_long_rows(normalizer, dtype, monkeypatch):
    """Those that are done in parts: the reference's results, and the same bits for every number of threads."""
    monkeypatch.setattr(graph, "PART", 300)
    monkeypatch.setattr(graph, "TASK", 100)
    rng = generator(0, 22)
    edges = many(rng, 300)
    q, k, v, bias = arrays(rng, dtype, (7, 4, 16), (300, 2, 16), (300, 2, 20), (edges.nnz, 4))
    bias[rng.random(bias.shape) < 0.2] = -np.inf
    grad_out, = arrays(rng, dtype, (7, 4, 20))
    options = {"edge_bias": bias, "normalizer": normalizer}
    results = []
    for n in (1, 2, 3):
        forward = fa.graph_attention(q, k, v, edges, return_lse=True, num_threads=n, **options)
        of = fa.graph_attention_backward(grad_out, q, k, v, *forward, edges, num_threads=n, **options)
        results.append([*forward, *(x for x in of if x is not None)])
    for n, result in enumerate(results[1:]):
        for x, y in zip(result, results[0]):
            assert_same_bits(x, y, {"threads": n + 2})
    wide = [x.astype(F64) for x in (q, k, v)]
    options["edge_bias"] = bias.astype(F64)
    expected = fa.reference.graph_attention(*wide, edges, return_lse=True, **options)
    of = fa.reference.graph_attention_backward(grad_out.astype(F64), *wide, *expected, edges, **options)
    for x, y in zip(results[0], (*expected, *(x for x in of if x is not None))):
        seen = y > -np.inf
        assert ((x == -np.inf) == ~seen).all()
        assert abs(x[seen] - y[seen]).max() <= (2e-5 if dtype == F32 else 1e-13) * max(1, abs(y[seen]).max())


@every_new
def test_bits_of_rows(normalizer):
    """Those of a row alone, in other strides, and of a `Graph`; another order of its edges changes it by rounding."""
    rng = generator(0, 23)
    edges, row, col = drawn(rng, 60, 50, 5000, "csr")
    q, k, v = arrays(rng, F32, (60, 2, 16), (50, 2, 16), (50, 2, 16))
    out = fa.graph_attention(q, k, v, edges, normalizer=normalizer)
    assert_same_bits(fa.graph_attention(q[7:9], k, v, edges[7:9], normalizer=normalizer), out[7:9], {})
    assert_same_bits(fa.graph_attention(q, k, v, fa.Graph(edges), normalizer=normalizer), out, {})
    assert_same_bits(fa.graph_attention(q[::-1][::-1], k.copy(order="F"), v, edges, normalizer=normalizer), out, {})
    order = rng.permutation(5000)
    moved = sp.coo_array((np.ones(5000), (row[order], col[order])), shape=edges.shape)
    again = fa.graph_attention(q, k, v, moved, normalizer=normalizer, return_lse=True)
    scores, products = (0.25 * (f(q[row].astype(F64)) * f(k[col])).sum(axis=-1) for f in (np.asarray, abs))
    check_alone(again, normalizer, row, scores, v[col].astype(F64), products, 16, F32)


# --- gradients ---

@pytest.mark.parametrize("layout", ["csr", "csc"])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("normalizer", ["softmax1", *ALONE], ids=str)
def test_gradients(normalizer, seed, layout):
    """A step so short that hardly any score crosses its threshold."""
    rng = generator(seed, 24)
    T, N, E, D, Dv = (int(rng.integers(low, high)) for low, high in ((1, 12), (1, 12), (1, 300), (1, 20), (1, 20)))
    H, Hkv = 4, 2
    edges = fa.Graph(drawn(rng, T, N, E, layout)[0])
    bias = rng.standard_normal((E, H))
    bias[rng.random((E, H)) < 0.2] = -np.inf
    choices = [{}, {"edge_bias": bias}, {"dropout_p": 0.3, "seed": 5}, {"softcap": 1.2, "edge_bias": bias[:, 0]},
               {"edge_key": rng.standard_normal((E, Hkv, D)), "edge_value": rng.standard_normal((E, Dv))}]
    pairs = ((fa.graph_attention, fa.graph_attention_backward),
             (fa.reference.graph_attention, fa.reference.graph_attention_backward))
    for options in choices:
        q, k, v = arrays(rng, F64, (T, H, D), (N, Hkv, D), (N, Hkv, Dv))
        names = options.keys() & {"edge_bias", "edge_key", "edge_value"}
        for pair in pairs:
            check_gradients(rng, *pair, {"query": q, "key": k, "value": v}, options | {"normalizer": normalizer}, edges,
                            names, 1e-6)
    source, target, v, logits = arrays(rng, F64, (N, H), (T, H), (N, H, Dv), (E, H))
    check_gradients(rng, fa.gat_attention, fa.gat_attention_backward, {"source": source, "target": target, "value": v},
                    {"edge_logits": logits, "normalizer": normalizer}, edges, ["edge_logits"], 1e-6)
    source, target, weight, features = arrays(rng, F64, (N, H, D), (T, H, D), (H, D), (E, 1, D))
    inputs = {"source": source, "target": target, "weight": weight}
    check_gradients(rng, fa.gatv2_attention, fa.gatv2_attention_backward, inputs,
                    {"edge_features": features, "normalizer": normalizer}, edges, ["edge_features"], 1e-6)


# --- what must do no harm, and errors ---

@every_new
def test_nan(normalizer):
    """A score that is NaN makes its row NaN, in parts or not; one whose bias is -inf does nothing."""
    rng = generator(0, 25)
    edges, row, col = drawn(rng, 10, 12, 40, "csr")
    q, k, v = arrays(rng, F32, (10, 2, 8), (12, 2, 8), (12, 2, 8))
    bias = np.zeros(40, F32)
    bias[col == 3] = -np.inf
    options = {"edge_bias": bias, "normalizer": normalizer}
    expected = fa.graph_attention(q, k, v, edges, return_lse=True, **options)
    k[3] = v[3] = np.nan
    actual = fa.graph_attention(q, k, v, edges, return_lse=True, **options)
    for x, y in zip(actual, expected):
        assert_same_bits(x, y, {})
    of = fa.graph_attention_backward(np.ones_like(actual[0]), q, k, v, *actual, edges, **options)
    assert all(np.isfinite(x).all() for x in of if x is not None)
    v[3] = 0
    touched = np.isin(np.arange(10), row[col == 3])
    assert touched.any() and not touched.all()
    for part in (graph.PART, 2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(graph, "PART", part)
            out = fa.graph_attention(q, k, v, edges, normalizer=normalizer)
        assert (np.isnan(out).all(axis=(1, 2)) == touched).all()
        assert (np.isnan(out).any(axis=(1, 2)) == touched).all()


@every_new
def test_nothing(normalizer):
    """No edges at all, and none that count."""
    q, k, v = np.ones((2, 2, 4)), np.ones((3, 2, 4)), np.ones((3, 2, 5))
    for edges, bias in ((sp.csr_array((2, 3)), None), (sp.csr_array(np.ones((2, 3))), np.full(6, -np.inf))):
        options = {"edge_bias": bias, "normalizer": normalizer}
        out, lse = fa.graph_attention(q, k, v, edges, return_lse=True, **options)
        assert not out.any() and (lse == -np.inf).all()
        of = fa.graph_attention_backward(np.ones_like(out), q, k, v, out, lse, edges, **options)
        assert not any(x.any() for x in of if x is not None)


def test_errors():
    q, k, v = np.ones((2, 1, 4)), np.ones((3, 1, 4)), np.ones((3, 1, 4))
    edges, sinks = sp.csr_array([[1, 1, 0], [0, 0, 1]]), np.zeros(1)
    with pytest.raises(ValueError, match="sinks must be None with normalizer='softmax1', whose sink is 0"):
        fa.graph_attention(q, k, v, edges, sinks=sinks, normalizer="softmax1")
    for name in ("sigmoid", "relu", "sparsemax", "entmax15"):
        with pytest.raises(ValueError, match=f"sinks must be None with normalizer='{name}', got an array"):
            fa.graph_attention(q, k, v, edges, sinks=sinks, normalizer=name)
        with pytest.raises(ValueError, match="grad_lse must be None where the normalizer is no softmax"):
            fa.graph_attention_backward(q, q, k, v, q, sinks, edges, grad_lse=np.ones((2, 1)), normalizer=name)
    with pytest.raises(ValueError, match="normalizer must be one of .*, got 'sparse'"):
        fa.gat_attention(k[..., 0], q[..., 0], v, edges, normalizer="sparse")
    with pytest.raises(TypeError, match="normalizer must be a string"):
        fa.gatv2_attention(k, q, np.ones((1, 4)), edges, normalizer=3)
    with pytest.raises(ValueError, match="the shift of normalizer must be finite in float32, got inf"):
        fa.graph_attention(q, k, v, edges, normalizer=("sigmoid", np.inf))
    with pytest.raises(TypeError, match="normalizer must be a string"):
        fa.graph_attention(q, k, v, edges, normalizer=("relu", 1.0))
