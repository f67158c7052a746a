"""Attention along edges: against the papers' definitions, the reference and dense attention, and its gradients."""

import doctest

import numpy as np
import pytest
from cases import UNIT_ROUNDOFF, generator
from layouts import assert_same_bits

import fastattn as fa
from fastattn import checks, graph

sp = pytest.importorskip("scipy.sparse", reason="scipy is not installed")
F32, F64 = np.float32, np.float64
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
BLOCK = 64      # edges that are summed from zero

# (targets, sources, H, Hkv, D, Dv, edges): tiny, one of a feature, many edges a target, blocks of edges and one more
SHAPES = [(1, 1, 1, 1, 1, 1, 1), (5, 7, 2, 1, 8, 5, 20), (40, 30, 4, 4, 32, 32, 300), (3, 50, 2, 2, 17, 9, 140),
          (2, 300, 4, 2, 64, 70, 129), (30, 3, 3, 1, 33, 16, 40), (6, 6, 2, 2, 1, 1, 30)]


def drawn(rng, targets, sources, edges, layout):
    """A graph with duplicates and, mostly, rows without edges; and the (targets, sources) of its edges, as in data."""
    row, col = rng.integers(0, targets, edges), rng.integers(0, sources, edges)
    if layout == "coo":
        return sp.coo_array((np.ones(edges), (row, col)), shape=(targets, sources)), row, col
    if layout == "csc":
        order = np.argsort(col, kind="stable")
        row, col = row[order], col[order]
        first = np.searchsorted(col, np.arange(sources + 1))
        return sp.csc_array((np.zeros(edges), row, first), shape=(targets, sources)), row, col
    order = np.argsort(row, kind="stable")
    row, col = row[order], col[order]
    first = np.searchsorted(row, np.arange(targets + 1))
    kind = np.int64 if layout == "csr, int64" else np.int32
    made = sp.csr_array((np.ones(edges), col.astype(kind), first.astype(kind)), shape=(targets, sources))
    made.indices, made.indptr = col.astype(kind), first.astype(kind)
    return made, row, col


def arrays(rng, dtype, *shapes):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def softmax_along(row, targets, scores, values, sinks=None, kept=None):
    """The definition, edge after edge: (out, lse, weights, |weights| |values| summed)."""
    H = scores.shape[1]
    out, lse = np.zeros((targets, H, values.shape[-1])), np.full((targets, H), -np.inf)
    size = np.zeros_like(out)
    for i in range(targets):
        for h in range(H):
            at = np.flatnonzero((row == i) & (scores[:, h] > -np.inf))
            logits = list(scores[at, h]) + ([] if sinks is None else [sinks[h]])
            if not logits:
                continue
            lse[i, h] = np.logaddexp.reduce(logits)
            p = np.exp(scores[at, h] - lse[i, h]) * (1 if kept is None else kept[at, h])
            out[i, h] = p @ values[at, h] if len(at) else 0
            size[i, h] = p @ abs(values[at, h]) if len(at) else 0
    return out, lse, size


def check(actual, expected, size, products, scores, row, dtype, extra=0):
    """Under the a-priori bound of docs/accuracy.md, whose sums are over blocks of BLOCK edges."""
    u, n = UNIT_ROUNDOFF[np.dtype(dtype)], max(1, np.bincount(row).max(initial=0))
    finite = scores[np.isfinite(scores)]
    spread = np.ptp(finite) if finite.size else 0
    delta = (extra + 4) * u * products.max(initial=0) + 2 * u * spread + 2 * u * abs(finite).max(initial=0)
    bound = size * (2 * delta + (min(n, BLOCK) + n / BLOCK + 12) * u) + np.finfo(dtype).tiny
    assert (abs(actual[0] - expected[0]) <= bound).all(), (fa.isa(), (abs(actual[0] - expected[0]) / bound).max())
    seen = expected[1] > -np.inf
    assert (actual[1][~seen] == -np.inf).all() and (actual[0][~seen] == 0).all()
    lse = delta + (n / BLOCK + 12) * u * (1 + abs(expected[1][seen]))
    assert (abs(actual[1][seen] - expected[1][seen]) <= lse).all()


OPTIONS = ["plain", "bias", "bias of one head", "features", "softcap and sinks", "dropout", "scale"]


@both_dtypes
@pytest.mark.parametrize("layout", ["csr", "csr, int64", "csc", "coo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dot_products(shape, layout, dtype, seed=0):
    targets, sources, H, Hkv, D, Dv, E = shape
    for number, option in enumerate(OPTIONS):
        rng = generator(seed, number, *shape)
        edges, row, col = drawn(rng, targets, sources, E, layout)
        q, k, v = arrays(rng, dtype, (targets, H, D), (sources, Hkv, D), (sources, Hkv, Dv))
        options, bias, kept = {}, np.zeros((E, H)), None
        inner, values = (np.repeat(x[col].astype(F64), H // Hkv, axis=1) for x in (k, v))
        if option.startswith("bias"):
            given = rng.standard_normal((E, H) if option == "bias" else E).astype(dtype)
            given[rng.random(given.shape) < 0.2] = -np.inf
            options["edge_bias"], bias = given, bias + (given if given.ndim == 2 else given[:, None])
        if option == "features":
            options["edge_key"], options["edge_value"] = arrays(rng, dtype, (E, Hkv, D), (E, Dv))
            inner = inner + np.repeat(options["edge_key"], H // Hkv, axis=1)
            values = values + options["edge_value"][:, None]
        if option == "dropout":
            options |= {"dropout_p": 0.4, "seed": 7}
            count = np.arange(E, dtype=np.uint64)[:, None]
            numbers = fa.reference.philox((count // 4, np.uint64(0), np.arange(H, dtype=np.uint64), np.uint64(0)), 7)
            kept = np.where(np.choose((count % 4).astype(int), numbers) >= round(0.4 * 2**32), 1 / 0.6, 0)
        if option == "softcap and sinks":
            options |= {"softcap": 1.5, "sinks": rng.standard_normal(H).astype(dtype)}
        scale = options["scale"] = 0.3 if option == "scale" else D**-0.5
        scores = scale * (q[row] * inner).sum(axis=-1)
        if "softcap" in options:
            scores = 1.5 * np.tanh(scores / 1.5)
        expected = softmax_along(row, targets, scores + bias, values, options.get("sinks"), kept)
        products = scale * (abs(q[row]) * abs(inner)).sum(axis=-1)
        for function in (fa.graph_attention, fa.reference.graph_attention):
            actual = function(q, k, v, edges, return_lse=True, **options)
            assert actual[0].dtype == dtype and actual[0].shape == (targets, H, Dv)
            check(actual, expected, expected[2], products, scores + bias, row, dtype, D)


@both_dtypes
@pytest.mark.parametrize("layout", ["csr", "coo"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gat_and_gatv2(shape, layout, dtype, seed=0):
    """Velickovic et al. 2018, equation 3; Brody et al. 2022, equation 7."""
    targets, sources, H, _, D, Dv, E = shape
    rng = generator(seed, *shape)
    edges, row, col = drawn(rng, targets, sources, E, layout)
    of_source, of_target, v, logits = arrays(rng, dtype, (sources, H), (targets, H), (sources, H, Dv), (E, H))
    x = of_source[col].astype(F64) + of_target[row] + logits
    scores = np.where(x < 0, 0.3 * x, x)
    expected = softmax_along(row, targets, scores, v[col])
    for function in (fa.gat_attention, fa.reference.gat_attention):
        actual = function(of_source, of_target, v, edges, negative_slope=0.3, edge_logits=logits, return_lse=True)
        check(actual, expected, expected[2], abs(x), scores, row, dtype, 3)

    source, target, weight, features = arrays(rng, dtype, (sources, H, D), (targets, H, D), (H, D), (E, 1, D))
    x = source[col].astype(F64) + target[row] + features
    terms = weight * np.where(x < 0, 0.2 * x, x)
    expected = softmax_along(row, targets, terms.sum(axis=-1), source[col])
    for function in (fa.gatv2_attention, fa.reference.gatv2_attention):
        actual = function(source, target, weight, edges, edge_features=features, return_lse=True)
        check(actual, expected, expected[2], (abs(weight) * (abs(source[col]) + abs(target[row]) + abs(features))).sum(
            axis=-1), terms.sum(axis=-1), row, dtype, D + 3)


def test_a_full_graph_is_dense_attention():
    rng = generator(0, 1)
    q, k, v = arrays(rng, F32, (130, 4, 32), (200, 2, 32), (200, 2, 24))
    out, lse = fa.graph_attention(q, k, v, sp.csr_array(np.ones((130, 200))), return_lse=True)
    dense, dense_lse = fa.attention(*(x.swapaxes(0, 1) for x in (q, k, v)), return_lse=True)
    np.testing.assert_allclose(out, dense.swapaxes(0, 1), rtol=0, atol=2e-6)
    np.testing.assert_allclose(lse, dense_lse.T, rtol=0, atol=2e-6)


def test_16_bits():
    rng = generator(0, 2)
    edges, _, _ = drawn(rng, 20, 30, 100, "csr")
    for dtype in (np.float16, pytest.importorskip("ml_dtypes").bfloat16):
        q, k, v = arrays(rng, F32, (20, 2, 16), (30, 2, 16), (30, 2, 8))
        half = [x.astype(dtype) for x in (q, k, v)]
        expected = fa.graph_attention(*(x.astype(F64) for x in half), edges)
        out = fa.graph_attention(*half, edges)
        ulp = np.abs(expected) * float(np.finfo(np.float16).eps if dtype == np.float16 else 2.0**-7) + 1e-4
        assert out.dtype == dtype and (abs(out.astype(F64) - expected) <= ulp).all()
        mixed = fa.graph_attention(half[0].astype(F32), *half[1:], edges)       # narrow keys, float32 queries
        assert mixed.dtype == F32
        np.testing.assert_allclose(mixed, expected, rtol=0, atol=1e-5)


# --- bits ---

def many(rng, part):
    """A graph with rows of more than `part` edges, and one of exactly as many."""
    counts = np.array([3, 0, 2 * part + 5, part, 1, part + 1, 40])
    first = np.concatenate([[0], np.cumsum(counts)])
    return sp.csr_array((np.ones(first[-1]), rng.integers(0, 300, first[-1]), first), shape=(len(counts), 300))


@both_dtypes
def test_long_rows(dtype, monkeypatch):
    """Those that are merged from parts: the reference's results, and the same bits for every number of threads."""
    monkeypatch.setattr(graph, "PART", 300)
    monkeypatch.setattr(graph, "TASK", 100)
    rng = generator(0, 3)
    edges = many(rng, 300)
    q, k, v, bias = arrays(rng, dtype, (7, 4, 16), (300, 2, 16), (300, 2, 20), (edges.nnz, 4))
    sinks, = arrays(rng, dtype, 4)
    options = {"edge_bias": bias, "sinks": sinks}
    results = [fa.graph_attention(q, k, v, edges, return_lse=True, num_threads=n, **options) for n in (1, 2, 3)]
    g, = arrays(rng, dtype, results[0][0].shape)
    results = [(*result, *(x for x in fa.graph_attention_backward(g, q, k, v, *result, edges, num_threads=n, **options)
                           if x is not None)) for n, result in zip((1, 2, 3), results)]
    for n, result in enumerate(results[1:]):
        for x, y in zip(result, results[0]):
            assert_same_bits(x, y, {"threads": n + 2})
    wide = [x.astype(F64) for x in (q, k, v)]
    options = {name: x.astype(F64) for name, x in options.items()}
    expected = fa.reference.graph_attention(*wide, edges, return_lse=True, **options)
    of = fa.reference.graph_attention_backward(g.astype(F64), *wide, *expected, edges, **options)
    for x, y in zip(results[0], (*expected, *(x for x in of if x is not None))):
        assert abs(x - y).max() <= (2e-5 if dtype == F32 else 1e-13) * max(1, abs(y).max())


@both_dtypes
@pytest.mark.parametrize("D, Dv", [(32, 32), (64, 64), (17, 70), (0, 1), (1, 3)], ids=str)
def test_targets_with_the_same_sources(D, Dv, dtype):
    """Cliques, whose targets share their loads: the bits of a row are those it has alone."""
    rng = generator(0, 8, D, Dv)
    sizes = [3, 8, 9, 65, 66, 2, 131, 13]
    n = sum(sizes)
    row = np.concatenate([np.repeat(np.arange(size), size) for size in sizes])
    start = np.repeat(np.cumsum(sizes) - sizes, np.square(sizes))
    col = np.concatenate([np.tile(rng.permutation(size), size) for size in sizes]) + start
    edges = sp.csr_array((np.ones(len(row)), col, np.searchsorted(row + start, np.arange(n + 1))), shape=(n, n))
    q, k, v = arrays(rng, dtype, (n, 4, D), (n, 2, D), (n, 2, Dv))
    sinks, = arrays(rng, dtype, 4)
    for options in ({}, {"sinks": sinks, "softcap": 1.5}, {"normalizer": "sigmoid"}, {"normalizer": "relu"}):
        results = fa.graph_attention(q, k, v, edges, return_lse=True, **options)
        for i in range(n):
            alone = fa.graph_attention(q[i : i + 1], k, v, edges[i : i + 1], return_lse=True, **options)
            for x, y in zip(results, alone):
                assert_same_bits(x[i : i + 1], y, {"options": options, "row": i})


def test_rows_do_not_depend_on_others():
    """Nor on the storage: the bits of a row are those it has alone."""
    rng = generator(0, 4)
    edges, row, col = drawn(rng, 60, 50, 900, "csr")
    q, k, v = arrays(rng, F32, (60, 2, 16), (50, 2, 16), (50, 2, 16))
    out = fa.graph_attention(q, k, v, edges)
    assert_same_bits(fa.graph_attention(q[7:9], k, v, edges[7:9]), out[7:9], {})
    assert_same_bits(fa.graph_attention(q, k, v, fa.Graph(edges)), out, {})
    order = np.argsort(col, kind="stable")
    same = sp.coo_array((np.ones(900), (row[order], col[order])), shape=edges.shape)
    again = fa.graph_attention(q, k, v, same)           # other order within rows: within rounding
    np.testing.assert_allclose(again, out, rtol=0, atol=1e-6)
    assert_same_bits(fa.graph_attention(q[::-1][::-1], k.copy(order="F"), v, edges), out, {})


# --- gradients ---

def differences(loss, x, i, step=1e-4):
    y = []
    for n in (2, 1, -1, -2):
        moved = x.copy()
        moved.flat[i] += n * step
        y.append(loss(moved))
    return (-y[0] + 8 * y[1] - 8 * y[2] + y[3]) / (12 * step)


def check_gradients(rng, forward, backward, inputs, options, edges, names, step=1e-4):
    """Every input's gradient, and those of the options in `names`, against fourth-order differences in float64."""
    out, lse = forward(**inputs, graph=edges, return_lse=True, **options)
    g, of_lse = rng.standard_normal(out.shape), None
    if options.get("normalizer", "softmax") in ("softmax", "softmax1"):
        of_lse = rng.standard_normal(lse.shape)
    gradients = backward(g, out=out, lse=lse, graph=edges, grad_lse=of_lse, **inputs, **options)

    def loss(name, x):
        out, lse = forward(graph=edges, return_lse=True, **inputs | options | {name: x})
        seen = lse > -np.inf
        return float((out * g).sum() + (0 if of_lse is None else lse[seen] @ of_lse[seen]))

    for name in (*inputs, *names):
        x, gradient = (inputs | options)[name], getattr(gradients, name)
        assert gradient.shape == x.shape and gradient.dtype == x.dtype
        for i in rng.integers(0, x.size, 3):
            if np.isfinite(x.flat[i]):
                expected = differences(lambda y, name=name: loss(name, y), x, i, step)
                assert abs(gradient.flat[i] - expected) <= 1e-7, (fa.isa(), name)
            else:
                assert gradient.flat[i] == 0


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("seed", range(6))
def test_gradients(seed, layout):
    rng = generator(seed, 5)
    T, N, E, D, Dv = (int(rng.integers(low, high)) for low, high in ((1, 12), (1, 12), (1, 90), (1, 20), (1, 20)))
    H, Hkv = 4, 2
    edges = fa.Graph(drawn(rng, T, N, E, layout)[0])
    bias = rng.standard_normal((E, H))
    bias[rng.random((E, H)) < 0.2] = -np.inf
    choices = [{}, {"edge_bias": bias, "sinks": rng.standard_normal(H)}, {"dropout_p": 0.3, "seed": 5},
               {"edge_key": rng.standard_normal((E, Hkv, D)), "edge_value": rng.standard_normal((E, Dv))},
               {"softcap": 1.2, "edge_bias": rng.standard_normal(E)}]
    pairs = ((fa.graph_attention, fa.graph_attention_backward),
             (fa.reference.graph_attention, fa.reference.graph_attention_backward))
    for options in choices:
        q, k, v = arrays(rng, F64, (T, H, D), (N, Hkv, D), (N, Hkv, Dv))
        names = options.keys() & {"edge_bias", "sinks", "edge_key", "edge_value"}
        for pair in pairs:
            check_gradients(rng, *pair, {"query": q, "key": k, "value": v}, options, edges, names)
    source, target, v, logits = arrays(rng, F64, (N, H), (T, H), (N, H, Dv), (E, H))
    check_gradients(rng, fa.gat_attention, fa.gat_attention_backward, {"source": source, "target": target, "value": v},
                    {"edge_logits": logits}, edges, ["edge_logits"])
    source, target, weight, features = arrays(rng, F64, (N, H, D), (T, H, D), (H, D), (E, 1, D))
    inputs = {"source": source, "target": target, "weight": weight}
    for options in ({}, {"edge_features": features}, {"value": v}):
        check_gradients(rng, fa.gatv2_attention, fa.gatv2_attention_backward, inputs, options, edges, list(options))


def test_slope_at_zero():
    """Where source + target is exactly 0, LeakyReLU has the slope below it."""
    source, target, value = np.array([[-2.0], [1.0]]), np.array([[2.0]]), np.array([[[1.0]], [[3.0]]])
    edges, grad_out = sp.csr_array([[1, 1]]), np.ones((1, 1, 1))
    for module in (fa, fa.reference):
        out, lse = module.gat_attention(source, target, value, edges, return_lse=True)
        of = module.gat_attention_backward(grad_out, source, target, value, out, lse, edges)
        p = 1 / (1 + np.exp(3.0))
        np.testing.assert_allclose(of.source[:, 0], 2 * p * (1 - p) * np.array([-0.2, 1]), rtol=1e-14)
        np.testing.assert_allclose(of.target[0, 0], 2 * p * (1 - p) * 0.8, rtol=1e-14)
        features = np.zeros((2, 1, 1))
        options = {"edge_features": features, "value": value}
        weight = np.ones((1, 1))
        rows = source[..., None], target[..., None]
        out, lse = module.gatv2_attention(*rows, weight, edges, return_lse=True, **options)
        of = module.gatv2_attention_backward(grad_out, *rows, weight, out, lse, edges, **options)
        np.testing.assert_allclose(of.edge_features[:, 0, 0], 2 * p * (1 - p) * np.array([-0.2, 1]), rtol=1e-14)


@both_dtypes
def test_gradients_on_a_full_graph_are_those_of_attention(dtype):
    rng = generator(0, 6)
    q, k, v, g = arrays(rng, dtype, (40, 4, 16), (50, 2, 16), (50, 2, 8), (40, 4, 8))
    full = sp.csr_array(np.ones((40, 50)))
    out, lse = fa.graph_attention(q, k, v, full, return_lse=True)
    gradients = fa.graph_attention_backward(g, q, k, v, out, lse, full)
    of = [np.ascontiguousarray(x.swapaxes(0, 1)) for x in (g, q, k, v)]
    dense = fa.attention_backward(*of, *fa.attention(*of[1:], return_lse=True))
    for name in ("query", "key", "value"):
        expected = getattr(dense, name).swapaxes(0, 1)
        np.testing.assert_allclose(getattr(gradients, name), expected, rtol=0, atol=1e-5 if dtype == F32 else 1e-13)


# --- what must do no harm, and errors ---

def test_nan_that_no_edge_reaches():
    rng = generator(0, 7)
    edges, _, col = drawn(rng, 10, 12, 40, "csr")
    q, k, v = arrays(rng, F32, (10, 2, 8), (12, 2, 8), (12, 2, 8))
    bias = np.zeros(40, F32)
    bias[col == 3] = -np.inf
    expected = fa.graph_attention(q, k, v, edges, edge_bias=bias, return_lse=True)
    k[3] = v[3] = np.nan
    actual = fa.graph_attention(q, k, v, edges, edge_bias=bias, return_lse=True)
    for x, y in zip(actual, expected):
        assert_same_bits(x, y, {})
    gradients = fa.graph_attention_backward(np.ones_like(actual[0]), q, k, v, *actual, edges, edge_bias=bias)
    assert all(np.isfinite(x).all() for x in gradients if x is not None)
    if (bias == 0).any():
        v[col[bias == 0][0]] = np.nan
        assert np.isnan(fa.graph_attention(q, k, v, edges, edge_bias=bias)).any()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (2, 3)], ids=str)
def test_nothing(shape):
    """No targets, no sources, no edges."""
    T, N = shape
    q, k, v = np.ones((T, 2, 4)), np.ones((N, 2, 4)), np.ones((N, 2, 5))
    empty = sp.csr_array(shape)
    out, lse = fa.graph_attention(q, k, v, empty, return_lse=True)
    assert out.shape == (T, 2, 5) and not out.any() and (lse == -np.inf).all()
    gradients = fa.graph_attention_backward(out, q, k, v, out, lse, empty)
    assert [x.shape for x in gradients[:3]] == [q.shape, k.shape, v.shape] and not any(x.any() for x in gradients[:3])
    features = {"edge_bias": np.ones((0, 2)), "edge_key": np.ones((0, 2, 4)), "edge_value": np.ones((0, 5))}
    gradients = fa.graph_attention_backward(out, q, k, v, out, lse, empty, **features)
    assert all(getattr(gradients, name).shape == x.shape for name, x in features.items())


def test_errors():
    q, k, v = np.ones((2, 1, 4)), np.ones((3, 1, 4)), np.ones((3, 1, 4))
    right = sp.csr_array([[1, 1, 0], [0, 0, 1]])
    with pytest.raises(TypeError, match="graph must be a scipy.sparse array, got ndarray"):
        fa.graph_attention(q, k, v, np.ones((2, 3)))
    with pytest.raises(ValueError, match=r"graph must have shape \(2, 3\), targets of query and sources of key"):
        fa.graph_attention(q, k, v, right.T)
    for wrong in (-1, 3):
        bad = right.copy()
        bad.indices[1] = wrong
        with pytest.raises(ValueError, match=r"graph must have indices in \[0, 3\)"):
            fa.graph_attention(q, k, v, bad)
    bad = right.copy()
    bad.indptr[1] = 9
    with pytest.raises(ValueError, match="graph must have an ascending indptr of 3 elements"):
        fa.graph_attention(q, k, v, bad)
    with pytest.raises(ValueError, match=r"edge_bias must have shape \(3, 1\)"):
        fa.graph_attention(q, k, v, right, edge_bias=np.ones(4))
    with pytest.raises(TypeError, match="edge_value must have query's dtype float64, got float32"):
        fa.graph_attention(q, k, v, right, edge_value=np.ones((3, 1, 4), F32))
    with pytest.raises(ValueError, match="weight must have shape"):
        fa.gatv2_attention(k, q, np.ones((1, 3)), right)
    with pytest.raises(ValueError, match="negative_slope must be finite and at least 0, got -1"):
        fa.gat_attention(k[..., 0], q[..., 0], v, right, negative_slope=-1)
    with pytest.raises(ValueError, match="seed must be that of the forward pass"):
        fa.graph_attention_backward(q, q, k, v, q, np.ones((2, 1)), right, dropout_p=0.5)
    with pytest.raises(ValueError, match="grad_out must have shape"):
        fa.graph_attention_backward(q[:1], q, k, v, q, np.ones((2, 1)), right)
    assert checks.FLOAT32 == F32


def test_docstrings():
    failed, attempted = doctest.testmod(graph)
    assert attempted and not failed
