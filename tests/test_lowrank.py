"""Linformer and Nystrom attention against the formulas of their papers."""

import numpy as np
import pytest
from cases import generator

import fastattn as fa
from fastattn.lowrank import pseudo_inverse

F32, F64 = np.float32, np.float64


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


def drawn(rng, dtype, *shapes):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


@pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), None], ids=str)
def test_linformer(heads, dtype):
    """Wang et al. 2020, equation 7."""
    rng = generator(0, 1)
    shapes = [(50, 8), (70, 8), (70, 5)]
    if heads:
        shapes = [(3, heads[0], 50, 8), (3, heads[1], 70, 8), (1, heads[1], 70, 5)]
    q, k, v = drawn(rng, dtype, *shapes)
    e, f, each = drawn(rng, dtype, (9, 70), (9, 70), (heads[1] if heads else 1, 9, 70))
    u = 2.0**-24 if dtype == F32 else 2.0**-53
    for of_key, of_value in ((e, None), (e, f), (each, f)):
        out = fa.linformer_attention(q, k, v, of_key, of_value)
        of_value = of_key if of_value is None else of_value
        wide = [x.astype(F64) for x in (q, k, v, of_key, of_value)]
        group = heads[0] // heads[1] if heads else 1
        keys, values = wide[3] @ wide[1], wide[4] @ wide[2]
        size, of_values = abs(wide[3]) @ abs(wide[1]), abs(wide[4]) @ abs(wide[2])
        if heads:
            keys, values, size, of_values = (np.repeat(x, group, axis=-3) for x in (keys, values, size, of_values))
        else:
            keys, values, size, of_values = (x.reshape(-1, x.shape[-1]) for x in (keys, values, size, of_values))
        weights = softmax(wide[0] @ keys.swapaxes(-1, -2) / 8**0.5)
        expected = weights @ values
        # a sum of 70 terms for each combined row, of 8 for each score, of 9 for each result
        delta = (70 + 8 + 6) * u * (abs(wide[0]) @ size.swapaxes(-1, -2) / 8**0.5).max(axis=-1, keepdims=True)
        bound = (weights @ of_values) * (2 * delta + (70 + 9 + 16) * u) * 1.01
        assert out.dtype == dtype and out.shape == expected.shape
        assert (abs(out - expected) <= bound).all(), (abs(out - expected) / bound).max()


def nystrom(q, k, v, m, iterations, scale):
    """Xiong et al. 2021: equations 11 and 14, and the landmarks and iterations of section 3.2."""
    n, s = q.shape[-2], k.shape[-2]
    of_q = np.stack([q[..., i * n // m : (i + 1) * n // m, :].mean(axis=-2) for i in range(m)], axis=-2)
    of_k = np.stack([k[..., i * s // m : (i + 1) * s // m, :].mean(axis=-2) for i in range(m)], axis=-2)
    f, a, b = (softmax(scale * x @ y.swapaxes(-1, -2)) for x, y in ((q, of_k), (of_q, of_k), (of_q, k)))
    z = a.swapaxes(-1, -2) / (np.linalg.norm(a, 1, (-2, -1)) * np.linalg.norm(a, np.inf, (-2, -1)))[..., None, None]
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * np.eye(m) - az @ (15 * np.eye(m) - az @ (7 * np.eye(m) - az))) / 4
    return f @ z @ (b @ v)


@pytest.mark.parametrize("shape", [(2, 4, 4, 64, 64, 8), (1, 4, 2, 50, 37, 5), (2, 1, 1, 9, 9, 9)], ids=str)
def test_nystrom(shape):
    B, H, Hkv, L, S, m = shape
    rng = generator(0, 2)
    q, k, v = drawn(rng, F64, (B, H, L, 6), (B, Hkv, S, 6), (B, Hkv, S, 7))
    for iterations in (0, 1, 6):
        out = fa.nystrom_attention(q, k, v, m, iterations=iterations, scale=0.3)
        repeated = (np.repeat(x, H // Hkv, axis=1) for x in (k, v))
        expected = nystrom(q, *repeated, m, iterations, 0.3)
        # The iterations square errors' factors at most 4 times each; all else is sums of less than 100 terms.
        assert abs(out - expected).max() <= 1e-10 * max(1, abs(expected).max())
    single = fa.nystrom_attention(q.astype(F32), k.astype(F32), v.astype(F32), m, scale=0.3)
    assert single.dtype == F32


def test_as_many_landmarks_as_rows_are_softmax_attention():
    """Then all three matrices are the weights, and A A^+ A = A."""
    rng = generator(0, 3)
    q, k, v = (x * 2 for x in drawn(rng, F64, (2, 12, 16), (2, 12, 16), (2, 12, 4)))
    out = fa.nystrom_attention(q, k, v, 12, iterations=30)
    np.testing.assert_allclose(out, fa.attention(q, k, v), rtol=0, atol=1e-8)
    errors = [abs(fa.nystrom_attention(q, k, v, 12, iterations=n) - fa.attention(q, k, v)).max() for n in (1, 6, 12)]
    assert errors[0] > errors[1] > errors[2]


def test_pseudo_inverse():
    rng = generator(0, 4)
    a = softmax(3 * rng.standard_normal((3, 7, 7)))
    np.testing.assert_allclose(pseudo_inverse(a, 40), np.linalg.pinv(a), rtol=1e-6, atol=1e-6)


def test_two_axes_and_errors():
    rng = generator(0, 5)
    q, k, v = drawn(rng, F32, (20, 4), (30, 4), (30, 3))
    assert fa.nystrom_attention(q, k, v, 5).shape == (20, 3)
    with pytest.raises(ValueError, match="num_landmarks must be at most the 20 queries and 30 keys, got 21"):
        fa.nystrom_attention(q, k, v, 21)
    with pytest.raises(ValueError, match="num_landmarks must be at least 1, got 0"):
        fa.nystrom_attention(q, k, v, 0)
    with pytest.raises(TypeError, match="query must be float32 or float64, got float16"):
        fa.nystrom_attention(*(x.astype(np.float16) for x in (q, k, v)), 5)
    with pytest.raises(ValueError, match=r"key_projection must have shape \(k, 30\) or \(1, k, 30\), got \(9, 20\)"):
        fa.linformer_attention(q, k, v, np.ones((9, 20), F32))
    with pytest.raises(TypeError, match="value_projection must be float32, got float64"):
        fa.linformer_attention(q, k, v, np.ones((9, 30), F32), np.ones((9, 30)))
