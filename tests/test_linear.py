"""Linear attention: against the papers' definitions, the reference and softmax attention; gradients, states, bits."""

import numpy as np
import pytest
from cases import UNIT_ROUNDOFF, assert_close, generator, ulp
from layouts import BROADCASTS, LAYOUTS, assert_same_bits

import fastattn as fa
from fastattn.linear_attention import LinearState, orthogonal_features

F32, F64 = np.float32, np.float64
MAPS = ["elu", "relu", "favor+"]
CHUNK, SEGMENT = 64, 2048  # keys that are summed from zero, and the sums of which are
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
all_maps = pytest.mark.parametrize("feature_map", MAPS)
plain_or_causal = pytest.mark.parametrize("causal", [False, True], ids=["plain", "causal"])

# (lead, H, Hkv, L, S, D, Dv); causal takes S for L. Chunks and one more or less, whole vectors of v or not, primes
SHAPES = [((), 1, 1, 1, 1, 1, 1), ((2,), 2, 2, 3, 5, 2, 3), ((), 4, 2, 65, 64, 16, 16), ((3, 1), 6, 2, 31, 97, 17, 15),
          ((), 2, 1, 130, 127, 64, 64), ((2,), 1, 1, 20, 33, 5, 33), ((), 1, 1, 70, 2200, 8, 7)]


def drawn(rng, shape, dtype):
    lead, H, Hkv, L, S, D, Dv = shape
    return [rng.standard_normal(size).astype(dtype) for size in
            ((*lead, H, L, D), (*lead, Hkv, S, D), (*lead, Hkv, S, Dv))]


def features(x, feature_map, projection, wide):
    """(features, projection that they were made of): Katharopoulos et al. 2020, equation 7; Choromanski et al. 2021."""
    x = x.astype(wide)
    if feature_map == "elu":
        return np.where(x > 0, x + 1, np.exp(x))
    if feature_map == "relu":
        return np.maximum(x, 0)
    D = x.shape[-1]
    return np.exp(x @ projection.T.astype(wide) / wide(D) ** 0.25 - (x**2).sum(axis=-1, keepdims=True) / (2 * D**0.5))


def feature_error(x, feature_map, projection, u):
    """A bound of the relative error of features, or of what they are up to a factor of their row."""
    if feature_map == "relu":
        return 0.0
    if feature_map == "elu":  # x log2(e) is rounded, then the exponential
        return 2 * (abs(np.minimum(x, 0)).max(initial=0) + 2) * u
    D = x.shape[-1]
    square = (x.astype(F64) ** 2).sum(axis=-1) / (2 * D**0.5)
    exponent = (abs(x.astype(F64)) @ abs(projection.T) / D**0.25).max(initial=0) + square.max(initial=0)
    return ((D + 4) * exponent + 3 * (2 * exponent + 1) + 4) * u


class Exact:
    """The definition with all L x S weights, in wider arithmetic, and the sums of absolute values that bound errors."""

    def __init__(self, query, key, value, feature_map, causal, kv_lengths=None, wide=None, **options):
        u = UNIT_ROUNDOFF[np.dtype(F64 if query.dtype == F64 else F32)]
        wide = wide or (np.longdouble if query.dtype == F64 else F64)
        D, S, Dv = query.shape[-1], key.shape[-2], value.shape[-1]
        self.projection = None
        if feature_map == "favor+":
            n = options.get("num_features", max(1, D, int(D * np.log(D))))
            self.projection = orthogonal_features(n, D, options.get("seed", 0))
        group = query.shape[-3] // key.shape[-3]
        repeated = [np.repeat(x, group, axis=-3) for x in (key, value)]
        self.q = features(query, feature_map, self.projection, wide)
        self.k = features(repeated[0], feature_map, self.projection, wide)
        self.x = query.astype(wide), repeated[0].astype(wide)
        lead = np.broadcast_shapes(query.shape[:-3], key.shape[:-3])
        seen = np.tri(query.shape[-2], S, dtype=bool) if causal else np.ones((query.shape[-2], S), bool)
        if kv_lengths is not None:
            seen = seen & (np.arange(S) < np.reshape(kv_lengths, (*np.shape(kv_lengths), 1, 1, 1)))
        self.seen, self.map, self.group = seen, feature_map, group
        self.weights = np.where(seen, self.q @ self.k.swapaxes(-1, -2), 0)
        used = seen.any(axis=-2)[..., None]
        self.v = np.where(used, repeated[1].astype(wide), 0)
        self.z = self.weights.sum(axis=-1)
        z = np.where(self.z == 0, 1, self.z)[..., None]
        self.out = self.weights @ self.v / z
        F = self.q.shape[-1]
        self.depth = F + CHUNK + SEGMENT // 32 + -(-S // SEGMENT) + 6
        self.phi = sum(feature_error(x, feature_map, self.projection, u) for x in (query, np.where(
            used[..., :1], repeated[0], 0)))
        self.unit, self.F, self.Dv = u, F, Dv
        self.bound = self.weights @ abs(self.v) / z * (2 * self.phi + (2 * self.depth + 3) * u) * 1.01
        assert self.out.shape[:-3] == lead

    def gradients(self, g, absolute=False):
        """Of query, key and value; or, with absolute values of all terms, what errors are bounded by."""
        size = abs if absolute else (lambda x: x)
        z = np.where(self.z == 0, np.inf, self.z)[..., None]
        g, v = size(g.astype(self.z.dtype) / z), size(self.v)
        delta = (g * size(self.out)).sum(axis=-1, keepdims=True)
        of_weights = np.where(self.seen, g @ v.swapaxes(-1, -2) + (delta if absolute else -delta), 0)
        of_q, of_k = of_weights @ self.k, of_weights.swapaxes(-1, -2) @ self.q
        results = [self.through(of_q, self.q, self.x[0], size), self.through(of_k, self.k, self.x[1], size),
                   self.weights.swapaxes(-1, -2) @ g]
        grouped = (x.reshape(*x.shape[:-3], -1, self.group, *x.shape[-2:]).sum(axis=-3) for x in results[1:])
        return [results[0], *grouped]

    def through(self, of, phi, x, size):
        if self.map != "favor+":
            return of * (np.where(phi > 1, 1, phi) if self.map == "elu" else phi > 0)
        D, of = x.shape[-1], of * phi
        of_x = of @ size(self.projection.astype(x.dtype)) / x.dtype.type(D) ** 0.25
        own = size(x) * of.sum(axis=-1, keepdims=True) / D**0.5
        return of_x + own if size is abs else of_x - own

    def gradient_bounds(self, g):
        units = 2 * self.phi + (2 * self.depth + 2 * self.Dv + 2 * self.F + 20) * self.unit
        return [1.01 * units * x for x in self.gradients(g, absolute=True)]


def functions():
    return ((fa.linear_attention, fa.linear_attention_backward),
            (fa.reference.linear_attention, fa.reference.linear_attention_backward))


@both_dtypes
@all_maps
@plain_or_causal
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_definition(shape, causal, feature_map, dtype, seed):
    rng = generator(seed, *shape)
    shape = shape[:3] + (shape[4] if causal else shape[3],) + shape[4:]
    arrays = drawn(rng, shape, dtype)
    lengths = [None] if not shape[0] else [None, rng.integers(0, shape[4] + 1, shape[0])]
    for kv_lengths in lengths:
        exact = Exact(*arrays, feature_map, causal, kv_lengths)
        g = rng.standard_normal(exact.out.shape).astype(dtype)
        options = {"feature_map": feature_map, "causal": causal, "kv_lengths": kv_lengths}
        for forward, backward in functions():
            out, z = forward(*arrays, return_normalizer=True, **options)
            context = {"function": forward.__module__, "lengths": kv_lengths}
            assert out.dtype == z.dtype == dtype
            assert_close(out, exact.out, exact.bound, context)
            if feature_map != "favor+":
                bound = exact.z * (exact.phi + exact.depth * exact.unit) * 1.01
                assert_close(z, exact.z, bound, context)
            # The saved results count as they are; how far they are off is part of the bound, twice each.
            for x, of, right, bound in zip(arrays, backward(g, *arrays, out, z, **options), exact.gradients(g),
                                           exact.gradient_bounds(g)):
                assert of.shape == x.shape and of.dtype == dtype
                assert_close(of, right, 2 * bound + np.finfo(dtype).tiny, context)


def test_a_loop_over_the_rows():
    """Equations 16 to 20 of Katharopoulos et al.: a recurrent network."""
    rng = generator(0, 1)
    q, k, v = (rng.standard_normal((30, n)) for n in (8, 8, 5))
    s, z, rows = np.zeros((8, 5)), np.zeros(8), []
    for q_i, k_i, v_i in zip(q, k, v):
        phi_q, phi_k = (np.where(x > 0, x + 1, np.exp(x)) for x in (q_i, k_i))
        s, z = s + np.outer(phi_k, v_i), z + phi_k
        rows.append(phi_q @ s / (phi_q @ z))
    out, state = fa.linear_attention(q, k, v, causal=True, return_state=True)
    np.testing.assert_allclose(out, rows, rtol=0, atol=1e-14)
    np.testing.assert_allclose(state.sums, s, rtol=1e-13, atol=1e-14)
    np.testing.assert_allclose(state.normalizer, z, rtol=1e-13)


@plain_or_causal
@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_16_bits(name, causal):
    dtype = np.dtype(getattr(pytest.importorskip("ml_dtypes"), name) if name == "bfloat16" else name)
    rng = generator(0, 2)
    half = [x.astype(dtype) for x in drawn(rng, ((2,), 4, 2, 70, 70, 16, 20), F32)]
    wide = [x.astype(F32) for x in half]
    exact = Exact(*wide, "elu", causal)
    out, z = fa.linear_attention(*half, causal=causal, return_normalizer=True)
    assert out.dtype == dtype and z.dtype == F32
    assert_close(out, exact.out, exact.bound + ulp(abs(exact.out) + exact.bound, dtype) / 2, {})
    assert_close(fa.linear_attention(wide[0], *half[1:], causal=causal), exact.out, exact.bound, {})  # narrow keys
    g = rng.standard_normal(out.shape).astype(dtype)
    of = fa.linear_attention_backward(g, *half, out, z, causal=causal)
    right = fa.reference.linear_attention_backward(*(x.astype(F64) for x in (g, *half, out, z)), causal=causal)
    for x, y, bound in zip(of, right, exact.gradient_bounds(g.astype(F32))):
        assert x.dtype == dtype
        assert_close(x, y, 2 * bound + ulp(abs(y) + bound, dtype) / 2, {})


# --- bits ---

def everything(arrays, g, **options):
    """out, normalizer, the state's arrays and the gradients."""
    out, z, state = fa.linear_attention(*arrays, return_normalizer=True, return_state=True, **options)
    options.pop("state", None)
    return out, z, *state, *fa.linear_attention_backward(g, *arrays, out, z, **options)


@pytest.mark.compiled
@both_dtypes
@all_maps
@plain_or_causal
def test_bits_do_not_depend_on_threads_and_batch(causal, feature_map, dtype):
    """Three segments: one walk and sums made apart."""
    rng = generator(0, 3)
    arrays = drawn(rng, ((3,), 2, 1, 4500, 4500, 10, 16), dtype)
    g = rng.standard_normal((3, 2, 4500, 16)).astype(dtype)
    options = {"causal": causal, "feature_map": feature_map, "kv_lengths": [4500, 2100, 4000]}
    expected = everything(arrays, g, num_threads=1, **options)
    for n in (2, 3, 5):
        for x, y in zip(everything(arrays, g, num_threads=n, **options), expected):
            assert_same_bits(x, y, {"threads": n})
    for b, n in enumerate(options.pop("kv_lengths")):
        for threads in (1, 2):
            one = [x[b] for x in arrays]
            alone = everything(one, g[b], num_threads=threads, kv_lengths=n, **options)
            for x, y in zip(alone, expected):
                assert_same_bits(x, y[b], {"batch": b})


@all_maps
@pytest.mark.parametrize("layout", [*LAYOUTS, *BROADCASTS])
def test_bits_do_not_depend_on_strides(layout, feature_map):
    rng = generator(0, 4)
    arrays = [({**LAYOUTS, **BROADCASTS})[layout](x) for x in drawn(rng, ((2,), 4, 2, 70, 70, 20, 16), F32)]
    g = rng.standard_normal((2, 4, 70, 16)).astype(F32)
    for causal in (False, True):
        options = {"causal": causal, "feature_map": feature_map}
        expected = everything([x.copy(order="C") for x in arrays], g, **options)
        for x, y in zip(everything(arrays, g, **options), expected):
            assert_same_bits(x, y, {"layout": layout, "causal": causal})


@both_dtypes
@all_maps
def test_what_is_not_seen(feature_map, dtype):
    """Padding, and keys behind a causal row: the bits are those without them, even if they are NaN or Inf."""
    rng = generator(0, 5)
    arrays = drawn(rng, ((), 2, 1, 200, 200, 8, 16), dtype)
    g = rng.standard_normal((2, 200, 16)).astype(dtype)
    options = {"feature_map": feature_map, "causal": True}
    expected = everything(arrays, g, kv_lengths=150, **options)
    for bad in (np.nan, np.inf):
        for at in (1, 2):
            spoilt = [x.copy() for x in arrays]
            spoilt[at][:, 150:] = bad
            for x, y in zip(everything(spoilt, g, kv_lengths=150, **options), expected):
                assert_same_bits(x, y, {"padding": bad, "argument": at})
            for j in (0, 63, 64, 100, 199):
                spoilt[at] = arrays[at].copy()
                spoilt[at][:, j] = bad
                out = fa.linear_attention(*spoilt, **options)
                assert_same_bits(out[:, :j], fa.linear_attention(*arrays, **options)[:, :j], {"key": j, "is": bad})
                if np.isnan(bad):
                    assert np.isnan(out[:, j:]).all()
    out, z = fa.linear_attention(*arrays, return_normalizer=True, **options)
    right = fa.linear_attention_backward(g, *arrays, out, z, **options)
    for j in (0, 40, 100):  # what a row is given concerns the keys that it sees, and a key the rows that see it
        spoilt = g.copy()
        spoilt[:, j] = np.nan
        of = fa.linear_attention_backward(spoilt, *arrays, out, z, **options)
        assert_same_bits(of.key[:, j + 1 :], right.key[:, j + 1 :], {"row": j})
        assert_same_bits(of.value[:, j + 1 :], right.value[:, j + 1 :], {"row": j})
        assert np.isnan(of.value[:, : j + 1]).all()
        spoilt = arrays[1].copy()
        spoilt[:, j] = np.nan
        of = fa.linear_attention_backward(g, arrays[0], spoilt, arrays[2], out, z, **options)
        assert_same_bits(of.query[:, :j], right.query[:, :j], {"row": j})


def test_rows_do_not_depend_on_others():
    rng = generator(0, 6)
    q, k, v = drawn(rng, ((), 2, 2, 300, 300, 16, 16), F32)
    out = fa.linear_attention(q, k, v)
    assert_same_bits(fa.linear_attention(q[:, 77:78], k, v), out[:, 77:78], {})
    causal = fa.linear_attention(q, k, v, causal=True)
    assert_same_bits(fa.linear_attention(q[:, :77], k[:, :77], v[:, :77], causal=True), causal[:, :77], {})


# --- states ---

@pytest.mark.compiled
@both_dtypes
@all_maps
def test_pieces_of_segments_have_the_bits_of_one_call(feature_map, dtype):
    rng = generator(0, 7)
    arrays = drawn(rng, ((2,), 2, 1, 4300, 4300, 6, 9), dtype)
    options = {"feature_map": feature_map, "causal": True, "return_state": True}
    whole, end = fa.linear_attention(*arrays, **options)
    state, parts = None, []
    for begin, stop in ((0, 2048), (2048, 4096), (4096, 4300)):
        part, state = fa.linear_attention(*(x[:, :, begin:stop] for x in arrays), state=state, **options)
        parts.append(part)
    for x, y in zip((np.concatenate(parts, axis=-2), *state), (whole, *end)):
        assert_same_bits(x, y, {})


@both_dtypes
@all_maps
def test_streaming(feature_map, dtype):
    """Any pieces have the result of one call."""
    rng = generator(0, 13)
    arrays = drawn(rng, ((2,), 2, 1, 600, 600, 6, 9), dtype)
    options = {"feature_map": feature_map, "return_state": True}
    exact, cuts = Exact(*arrays, feature_map, True), [0, 1, 2, 64, 190, 600]
    for forward in (fa.linear_attention, fa.reference.linear_attention):
        state, parts = None, []
        for begin, stop in zip(cuts, cuts[1:]):
            piece = (x[:, :, begin:stop] for x in arrays)
            part, state = forward(*piece, state=state, causal=True, **options)
            parts.append(part)
        # a call more is an addition more
        assert_close(np.concatenate(parts, axis=-2), exact.out, exact.bound * (1 + len(cuts) / exact.depth), {})
        # the keys of a state are seen by all queries of a call that is not causal
        _, state = forward(*(x[:, :, :300] for x in arrays), **options)
        out, _ = forward(arrays[0], *(x[:, :, 300:] for x in arrays[1:]), state=state, **options)
        plain = Exact(*arrays, feature_map, False)
        assert_close(out, plain.out, plain.bound * (1 + 2 / plain.depth), {})


def test_a_state_of_one_token_at_a_time():
    rng = generator(0, 8)
    q, k, v = drawn(rng, ((), 4, 2, 40, 40, 16, 16), F32)
    whole = Exact(q, k, v, "elu", True)
    state, parts = None, []
    for i in range(40):
        one = slice(i, i + 1)
        part, state = fa.linear_attention(q[:, one], k[:, one], v[:, one], causal=True, state=state, return_state=True)
        assert isinstance(state, LinearState) and state.sums.shape == (2, 16, 16) and state.normalizer.shape == (2, 16)
        parts.append(part)
    assert_close(np.concatenate(parts, axis=1), whole.out, whole.bound * (1 + 40 / whole.depth), {})


# --- gradients ---

@all_maps
@plain_or_causal
@pytest.mark.parametrize("seed", range(3))
def test_gradients_are_differences(seed, causal, feature_map):
    rng = generator(seed, 9)
    L, S, D, Dv = (int(rng.integers(1, 100)) for _ in range(4))
    arrays = drawn(rng, ((2,), 2, 1, S if causal else L, S, min(D, 9), min(Dv, 9)), F64)
    arrays[1] = arrays[1][:1]  # broadcast: its gradient is a sum
    options = {"feature_map": feature_map, "causal": causal, "kv_lengths": [S, S // 2 + 1]}
    for forward, backward in functions():
        out, z = forward(*arrays, return_normalizer=True, **options)
        g = rng.standard_normal(out.shape)
        gradients = backward(g, *arrays, out, z, **options)
        for n, (x, of) in enumerate(zip(arrays, gradients)):
            assert of.shape == x.shape
            for i in rng.integers(0, x.size, 4):
                y = []
                for step in (2, 1, -1, -2):
                    moved = [a.copy() for a in arrays]
                    moved[n].flat[i] += step * 1e-4
                    y.append(float((g * forward(*moved, **options)).sum()))
                expected = (-y[0] + 8 * y[1] - 8 * y[2] + y[3]) / (12 * 1e-4)
                if feature_map != "relu" or abs(x.flat[i]) > 2e-4:  # no difference over the corner
                    assert abs(of.flat[i] - expected) <= 1e-7 * max(1, abs(expected)), (fa.isa(), n)


# --- random features ---

def test_orthogonal_features():
    x = orthogonal_features(10, 4, 3)
    assert x.shape == (10, 4) and not x.flags.writeable
    for begin in (0, 4, 8):
        block = x[begin : begin + 4] @ x[begin : begin + 4].T
        assert abs(block - np.diag(np.diag(block))).max() < 1e-12
    assert (x != orthogonal_features(10, 4, 4)).all()


def test_the_kernel_is_estimated_without_bias():
    """The mean over 2000 projections is within five of its own standard errors, and so is each direction's mean."""
    rng = generator(0, 10)
    q, k = rng.standard_normal((2, 8))
    exact = np.exp(q @ k / 8**0.5)
    drawn_features = [orthogonal_features(12, 8, n) for n in range(2000)]
    estimates = np.array([(features(q, "favor+", w, F64) * features(k, "favor+", w, F64)).mean()
                          for w in drawn_features])
    assert abs(estimates.mean() - exact) <= 5 * estimates.std() / 2000**0.5
    first = np.array([w[0] for w in drawn_features])
    assert (abs(first.mean(axis=0)) <= 5 / 2000**0.5).all()
    assert (abs((first**2).mean(axis=0) - 1) <= 5 * (2 / 2000) ** 0.5).all()
    independent = np.array([(features(q, "favor+", w, F64) * features(k, "favor+", w, F64)).mean()
                            for w in np.random.default_rng(0).standard_normal((2000, 12, 8))])
    assert estimates.var() < independent.var()  # the paper's theorem 2


@plain_or_causal
def test_favor_approximates_softmax(causal):
    rng = generator(0, 11)
    arrays = [0.5 * x for x in drawn(rng, ((), 2, 2, 100, 100, 16, 8), F64)]
    softmax = fa.attention(*arrays, causal=causal)
    errors = [np.mean([((fa.linear_attention(*arrays, feature_map="favor+", num_features=n, seed=seed, causal=causal)
                         - softmax) ** 2).mean() for seed in range(8)]) for n in (16, 64, 256, 1024, 4096)]
    assert all(b < a / 2 for a, b in zip(errors, errors[1:]))  # 4 times the features: a quarter of the variance
    assert errors[-1] < errors[0] / 32


@both_dtypes
def test_large_rows(dtype):
    """No exponential overflows, whatever the queries, and keys along a feature are bounded."""
    w = orthogonal_features(300, 64)
    q = np.concatenate([1e3 * w[:2], -1e3 * w[:2], w[5:6]]).astype(dtype)
    k = np.concatenate([w[:3] * 64**0.25, w[3:5], np.zeros((1, 64))]).astype(dtype)
    v = np.eye(6, dtype=dtype)
    out = fa.linear_attention(q, k, v, feature_map="favor+", num_features=300)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(out.sum(axis=1), 1, rtol=1e-5)
    assert out[0].argmax() == 0 and out[1].argmax() == 1
    drawn_twice = fa.linear_attention(q, k, v, feature_map="favor+", projection=w)
    assert_same_bits(drawn_twice, out, {})


# --- edges, errors ---

@all_maps
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (3, 3)], ids=str)
def test_nothing(shape, feature_map):
    L, S = shape
    D = 0 if shape == (3, 3) else 4
    q, k, v = np.ones((2, L, D)), np.ones((2, S, D)), np.arange(2.0 * S * 3).reshape(2, S, 3)
    out, z, state = fa.linear_attention(q, k, v, feature_map=feature_map, return_normalizer=True, return_state=True)
    reference = fa.reference.linear_attention(q, k, v, feature_map=feature_map)
    np.testing.assert_allclose(out, reference, rtol=1e-14)
    assert out.shape == (2, L, 3) and z.shape == (2, L)
    if S == 0:
        assert not out.any() and not z.any() and not state.sums.any()
    if D == 0 and feature_map == "favor+":  # e^0 for all: uniform weights
        np.testing.assert_allclose(out, np.broadcast_to(v.mean(axis=1, keepdims=True), out.shape), rtol=1e-14)
    of = fa.linear_attention_backward(out, q, k, v, out, z, feature_map=feature_map)
    assert [x.shape for x in of] == [q.shape, k.shape, v.shape]
    assert all(np.isfinite(x).all() for x in of)


def test_a_row_without_features_is_zero():
    q, k, v = np.full((2, 4), -1.0), np.ones((3, 4)), np.ones((3, 2))
    out, z = fa.linear_attention(q, k, v, feature_map="relu", return_normalizer=True)
    assert not out.any() and not z.any()
    assert not any(x.any() for x in fa.linear_attention_backward(out + 1, q, k, v, out, z, feature_map="relu"))


def test_out():
    rng = generator(0, 12)
    q, k, v = drawn(rng, ((), 2, 2, 9, 9, 4, 5), F32)
    out = np.full((2, 5, 9), np.nan, F32).swapaxes(1, 2)
    assert fa.linear_attention(q, k, v, out=out) is out
    assert_same_bits(out, fa.linear_attention(q, k, v), {})


def test_errors():
    q, k, v = np.ones((2, 3, 4)), np.ones((2, 5, 4)), np.ones((2, 5, 6))
    out, z, state = fa.linear_attention(q, k, v, return_normalizer=True, return_state=True)
    for message, options in (
        ("key must have query's length 3 where causal is True, got 5", {"causal": True}),
        (r"feature_map must be one of \('elu', 'relu', 'favor\+'\), got 'exp'", {"feature_map": "exp"}),
        ("num_features must be left out for feature_map 'elu', got int", {"num_features": 3}),
        ("num_features must be at least 1, got 0", {"feature_map": "favor+", "num_features": 0}),
        ("seed must be at least 0, got -1", {"feature_map": "favor+", "seed": -1}),
        (r"projection must have shape \(num_features, 4\), got \(4, 3\)",
         {"feature_map": "favor+", "projection": np.ones((4, 3))}),
        ("num_features must be left out where projection is given, got 4",
         {"feature_map": "favor+", "projection": np.ones((4, 4)), "num_features": 4}),
        (r"kv_lengths must lie in \[0, 5\], got 6", {"kv_lengths": 6}),
        (r"state.sums must have shape \(2, 4, 6\), got \(2, 4\)", {"state": state[::-1]}),
        ("out must not overlap the inputs", {"out": np.ones((2, 5, 6))[:, :3], "value": "out"}),
    ):
        values = v
        if options.pop("value", None):
            values = options["out"].base
        with pytest.raises(ValueError, match=message):
            fa.linear_attention(q, k, values, **options)
    for message, options in (
        ("feature_map must be a string, got NoneType", {"feature_map": None}),
        ("causal must be a bool, got int", {"causal": 1}),
        ("return_state must be a bool, got int", {"return_state": 1}),
        ("state must be a LinearState or a pair", {"state": 3}),
        ("state.sums must be float64, got float32", {"state": [x.astype(F32) for x in state]}),
        ("projection must be of real numbers, got int64",
         {"feature_map": "favor+", "projection": np.ones((4, 4), np.int64)}),
    ):
        with pytest.raises(TypeError, match=message):
            fa.linear_attention(q, k, v, **options)
    with pytest.raises(ValueError, match=r"grad_out must have shape \(2, 3, 6\), got \(2, 3, 5\)"):
        fa.linear_attention_backward(out[..., 1:], q, k, v, out, z)
    with pytest.raises(TypeError, match="normalizer must be float64, got float32"):
        fa.linear_attention_backward(out, q, k, v, out, z.astype(F32))
