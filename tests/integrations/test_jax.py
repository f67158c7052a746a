"""fastattn.integrations.jax: jax.nn's own meanings, under jit, vmap and grad."""

import functools

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")
jnp = jax.numpy

from fastattn.integrations import jax as ours  # noqa: E402

B, T, S, N, K, H = 2, 20, 30, 4, 2, 8
MASK = np.random.default_rng(5).random((B, 1, T, S)) < 0.7
MASK[..., 0] = True
BIAS = np.random.default_rng(6).standard_normal((1, N, 1, S))
CASES = {
    "plain": {}, "causal": {"is_causal": True}, "scale": {"scale": 0.3}, "mask": {"mask": MASK},
    "window": {"local_window_size": (3, 2)}, "causal window": {"local_window_size": 4, "is_causal": True},
    "lengths": {"query_seq_lengths": np.array([20, 11]), "key_value_seq_lengths": np.array([17, 30])},
    "bias": {"bias": BIAS}, "bias and mask": {"bias": BIAS, "mask": MASK[0]},
}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def inputs(dtype="float64"):
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((B, T, N, H), (B, S, K, H), (B, S, K, H))]


def both(options):
    """Ours and jax's, with the bias among what is differentiated."""
    options = dict(options)
    bias = options.pop("bias", None)
    if "query_seq_lengths" in options:
        options |= {name: jnp.asarray(options[name], jnp.int32) for name in options}
    mine, theirs = (functools.partial(f, **options) for f in (ours.dot_product_attention,
                                                             jax.nn.dot_product_attention))
    return mine, theirs, () if bias is None else (jnp.asarray(bias),)


def close(actual, expected, tight):
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    np.testing.assert_allclose(actual, expected, rtol=tight, atol=tight * max(1, np.abs(expected).max()))


@pytest.mark.parametrize("dtype, tight", [("float64", 1e-7), ("float32", 2e-5), ("float16", 1e-2), ("bfloat16", 8e-2)])
@pytest.mark.parametrize("name", CASES)
def test_as_jax_has_it(name, dtype, tight):
    """Both ways, compiled and not. jax's softmax is in float32 even of float64."""
    mine, theirs, more = both(CASES[name])
    arrays = [*inputs(dtype), *(x.astype(dtype) for x in more)]
    expected = theirs(*arrays)
    for call in (mine, jax.jit(mine)):
        out = call(*arrays)
        assert out.shape == expected.shape and out.dtype == expected.dtype
        close(out, expected, tight)
    weights = jnp.cos(jnp.arange(out.size)).reshape(out.shape).astype(dtype)
    of, expected = (jax.grad(lambda *arrays, f=f: (f(*arrays) * weights).astype(float).sum(), range(len(arrays)))
                    for f in (mine, theirs))
    expected = expected(*arrays)
    for gradients in (of(*arrays), jax.jit(of)(*arrays)):
        for x, y in zip(gradients, expected):
            assert x.shape == y.shape and x.dtype == y.dtype
            close(x, y, 5 * tight)


@pytest.mark.parametrize("axes", [(0, 0, 0), (0, None, None), (None, 0, 0), (None, None, 1)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
def test_vmap(axes, with_bias):
    """Of results and of gradients, over any of the arguments; and twice."""
    rng = np.random.default_rng(1)

    def batched(shape, axis):
        return jnp.asarray(rng.standard_normal(shape if axis is None else (*shape[:axis], 3, *shape[axis:])))

    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H)
    arrays = [batched(shape, axis) for shape, axis in zip(shapes, axes)]
    if with_bias:
        axes, arrays = (*axes, 0), [*arrays, batched(BIAS.shape, 0)]

    def gradients(f):
        return jax.grad(lambda *arrays: (f(*arrays, is_causal=True) ** 2).sum(), range(len(arrays)))

    for f, g in ((ours.dot_product_attention, jax.nn.dot_product_attention),
                 *[map(gradients, (ours.dot_product_attention, jax.nn.dot_product_attention))]):
        of, expected = (jax.vmap(x, axes)(*arrays) for x in (f, g))
        jax.tree.map(functools.partial(close, tight=1e-6), of, expected)
    again = [jnp.stack([x, 2 * x]) for x in arrays]
    of, expected = (jax.jit(jax.vmap(jax.vmap(f, axes)))(*again)
                    for f in (ours.dot_product_attention, jax.nn.dot_product_attention))
    close(of, expected, 1e-6)


def test_gradients_by_differences():
    from jax.test_util import check_grads
    mine, _, more = both(CASES["bias and mask"])
    check_grads(mine, (*inputs(), *more), order=2, modes=["rev"], atol=1e-6, rtol=1e-6)


def test_residual():
    query, key, value = inputs()
    mine, theirs = (f(query, key, value, is_causal=True, return_residual=True)
                    for f in (ours.dot_product_attention, jax.nn.dot_product_attention))
    for x, y in zip(mine, theirs):
        assert x.shape == y.shape and x.dtype == y.dtype
        close(x, y, 1e-6)
    gradient = jax.grad(lambda x: ours.dot_product_attention(x, key, value, return_residual=True)[1].sum())(query)
    assert not gradient.any()


def test_without_batch_and_with_other_sizes():
    query, key, value = (x[0] for x in inputs())
    close(ours.dot_product_attention(query, key, value), jax.nn.dot_product_attention(query, key, value), 1e-6)
    out = ours.dot_product_attention(query, key, value[..., :3])
    close(out, jax.nn.dot_product_attention(query, key, value)[..., :3], 1e-6)
    gradient = jax.grad(lambda v: ours.dot_product_attention(query, key, v).sum())(value[..., :3])
    assert gradient.shape == (S, K, 3)
    assert ours.dot_product_attention(query[:0], key, value).shape == (0, N, H)
    assert not ours.dot_product_attention(query, key[:0], value[:0]).any()


def test_rows_that_see_nothing():
    """Zero, and so are their gradients; a NaN that is not seen does no harm."""
    query, key, value = inputs()
    mask = jnp.ones((1, 1, T, S), bool).at[:, :, 3].set(False).at[..., 7].set(False)
    value = value.at[:, 7].set(jnp.nan)
    out, gradients = jax.value_and_grad(
        lambda *arrays: ours.dot_product_attention(*arrays, mask=mask).sum(), (0, 1, 2))(query, key, value)
    assert jnp.isfinite(out) and all(jnp.isfinite(x).all() for x in gradients)
    assert not gradients[0][:, 3].any() and not gradients[2][:, 7].any()
    assert not ours.dot_product_attention(query, key, value, mask=mask)[:, 3].any()


def test_errors():
    """At the call, traced or not; of the lengths' values, those beyond the arrays mean all."""
    query, key, value = inputs()
    with pytest.raises(ValueError, match="value must have"):
        ours.dot_product_attention(query, key, value[:, :5])
    with pytest.raises(TypeError, match="key must have query's dtype"):
        jax.jit(ours.dot_product_attention)(query, key.astype("int32"), value)
    with pytest.raises(ValueError, match="implementation must be None, got 'cudnn'"):
        ours.dot_product_attention(query, key, value, implementation="cudnn")
    with pytest.raises(TypeError, match="mask"):
        ours.dot_product_attention(query, key, value, mask=BIAS)
    out = ours.dot_product_attention(query, key, value, key_value_seq_lengths=np.array([99, 99]))
    close(out, ours.dot_product_attention(query, key, value), 0)


def test_error_of_a_call(monkeypatch):
    """What is raised while XLA runs comes out as its error, and the next call is well."""
    def broken(*args, **options):
        raise MemoryError("no room")

    query, key, value = inputs()
    with monkeypatch.context() as patch:
        patch.setattr(ours, "attention", broken)
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="EXHAUSTED: fastattn_attention: no room"):
            ours.dot_product_attention(query, key, value).block_until_ready()
    close(ours.dot_product_attention(query, key, value), jax.nn.dot_product_attention(query, key, value), 1e-6)


def test_in_a_loop():
    """Asynchronous calls of one program, many at once."""
    query, key, value = inputs("float32")

    @jax.jit
    def steps(x):
        return jax.lax.scan(lambda x, _: (ours.dot_product_attention(x, key, value), None), x, None, length=20)[0]

    results = [steps(query + i) for i in range(8)]
    for i, result in enumerate(results):
        expected = query + i
        for _ in range(20):
            expected = jax.nn.dot_product_attention(expected, key, value)
        close(result, expected, 1e-5)
