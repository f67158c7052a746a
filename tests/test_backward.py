"""attention_backward: within an a-priori bound of the reference, which agrees with differences of the forward pass."""

import doctest
import functools
import tracemalloc

import numpy as np
import pytest
import test_attention
from cases import assert_close, assert_gradients, exact_gradients, generator, gradient_bound, inputs
from hypothesis import given, settings
from layouts import LAYOUTS, assert_same_bits

import fastattn as fa
from fastattn import gradient, masks

NAN, INF = np.nan, np.inf
F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=str)
B, H, Hkv, L, S, D, Dv = 2, 4, 2, 130, 300, 12, 10


def saved(rng, arrays, backward=fa.attention_backward, forward=fa.attention, extra=(), grad_lse=True, **options):
    """(grad_out, query, key, value, out, lse, ...) and the options of the backward pass."""
    out, lse = forward(*arrays, *extra, return_lse=True, **options)
    grad_out = rng.standard_normal(out.shape).astype(out.dtype)
    if grad_lse:
        options = options | {"grad_lse": rng.standard_normal(lse.shape).astype(lse.dtype)}
    return (grad_out, *arrays, out, lse, *extra), options


def check(arguments, options, context):
    exact, allowed = exact_gradients(*arguments, **options), gradient_bound(*arguments, **options)
    assert_gradients(fa.attention_backward(*arguments, **options), exact, allowed, context)


# --- the reference against differences ---

def differences(value, t=1e-4):
    """The derivative of value(t) at 0, to the fourth order."""
    return (8 * (value(t) - value(-t)) - (value(2 * t) - value(-2 * t))) / (12 * t)


def directional(rng, arrays, options, forward, backward):
    """The derivative along one direction of all inputs together: by differences, and by the gradients."""
    (grad_out, *_, out, lse), more = saved(rng, arrays, forward=forward, **options)
    gradients = backward(grad_out, *arrays, out, lse, **more)
    seen = np.isfinite(lse)
    names = [n for n in ("bias", "sinks") if isinstance(options.get(n), np.ndarray)]
    at = [*arrays, *(options[n] for n in names)]
    step = [rng.standard_normal(x.shape) for x in at]

    def value(t):
        moved = [x + t * d for x, d in zip(at, step)]
        out, lse = forward(*moved[:3], return_lse=True, **options | dict(zip(names, moved[3:])))
        return (out * grad_out).sum() + np.where(seen, lse * more["grad_lse"], 0)[seen].sum()

    parts = [gradients.query, gradients.key, gradients.value, *(getattr(gradients, n) for n in names)]
    analytic = sum((g * d)[np.isfinite(d)].sum() for g, d in zip(parts, step))
    size = sum(abs(g * d).sum() for g, d in zip(parts, step)) + 1
    return differences(value), analytic, size


def drawn_options(rng, b, h, rows, keys):
    shapes = [(b, h, rows, keys), (h, rows, keys), (rows, keys), (1, keys), (rows, 1), (b, 1, 1, keys), (h, 1, 1),
              (1, 1, rows, 1)]
    options = {
        "causal": True, "window": tuple(int(n) for n in rng.integers(0, keys + 1, 2)),
        "query_offset": rng.integers(-rows, keys + 1, b), "scale": float(rng.choice([-0.7, 0.0, 1.3])),
        "softcap": float(rng.choice([0.7, 3.0])), "kv_lengths": rng.integers(0, keys + 1, b),
        "query_lengths": rng.integers(0, rows + 1, b), "mask": rng.random((b, 1, rows, keys)) < 0.7,
        "bias": rng.standard_normal(shapes[rng.integers(len(shapes))]), "sinks": rng.standard_normal(h),
        "dropout_p": float(rng.choice([0.1, 0.5, 0.9])),
    }
    options = {name: option for name, option in options.items() if rng.random() < 0.35}
    return options | {"seed": int(rng.integers(2**63))}


@pytest.mark.parametrize("part", range(10))
def test_differences(part, seed):
    """A thousand drawn calls of float64: the derivative along a direction, to 1e-7 of what its terms amount to."""
    for number in range(100 * part, 100 * part + 100):
        rng = generator(seed, number)
        b, hkv, group = (int(n) for n in rng.integers(1, 3, 3))
        h, rows, keys, d, dv = hkv * group, *(int(n) for n in rng.integers(1, 9, 4))
        arrays = [rng.standard_normal(n) for n in ((b, h, rows, d), (b, hkv, keys, d), (b, hkv, keys, dv))]
        options = drawn_options(rng, b, h, rows, keys)
        for module in (fa, fa.reference):
            numeric, analytic, size = directional(rng, arrays, options, module.attention, module.attention_backward)
            assert abs(numeric - analytic) <= 1e-7 * size, (number, module.__name__, options, numeric, analytic, size)


# --- the kernel against the reference ---

@both_dtypes
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (64, 96, 16, 16), (65, 97, 17, 1), (63, 95, 1, 33), (200, 500, 40, 24),
                                   (3, 1300, 8, 8), (300, 2, 8, 136), (70, 100, 200, 5), (5, 7, 0, 3), (5, 7, 3, 0)],
                         ids=str)
def test_sizes(sizes, dtype, seed):
    rows, keys, d, dv = sizes
    rng = generator(seed, sizes)
    for h, hkv in [(1, 1), (6, 2)]:
        arguments, options = saved(rng, inputs(rng, (2,), h, hkv, rows, keys, d, dv, dtype))
        check(arguments, options, {"sizes": sizes, "heads": h, "seed": seed})


@both_dtypes
@pytest.mark.parametrize("rows, keys", [(19, 130), (100, 200)])
def test_each_option_alone(rows, keys, dtype, seed):
    rng = generator(seed, rows, keys)
    arrays = inputs(rng, (2,), 2, 1, rows, keys, 8, 9, dtype)
    for number, options in enumerate(test_attention.options_alone(rng, 2, 2, rows, keys, dtype)):
        arguments, more = saved(rng, arrays, **options)
        check(arguments, more, {"number": number, "options": options, "seed": seed})


@settings(max_examples=150)
@given(test_attention.calls())
def test_options_together(seed, call):
    dtype, lead, batch, h, hkv, rows, keys, d, dv, number, choice = call
    rng = generator(seed, number)
    arrays = inputs(rng, lead, h, hkv, rows, keys, d, dv, dtype)
    options = test_attention.build(rng, choice, dtype, lead, batch, h, rows, keys)
    arguments, more = saved(rng, arrays, **options)
    if not all(np.isfinite(x).all() for x in arguments[4:5]):
        return
    grad_out = LAYOUTS[choice["layout"]](arguments[0]) if arguments[0].ndim > 1 else arguments[0]
    check((grad_out, *arguments[1:]), more, {"number": number, "options": options, "seed": seed})


KINDS = [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16"), ("float32", "bfloat16")]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_16_bits(kind, seed):
    """Inputs count as they are; sums are in float32; the results are rounded once."""
    if "bfloat16" in kind:
        pytest.importorskip("ml_dtypes")
    rng = generator(seed, kind)
    q, k, v = inputs(rng, (2,), 4, 2, 70, 130, 24, 17)
    q, k, v = q.astype(kind[0]), k.astype(kind[1]), v.astype(kind[1])
    bias = rng.standard_normal((4, 70, 130)).astype(kind[0])
    for options in ({}, {"causal": True, "bias": bias, "softcap": 4.0}):
        arguments, more = saved(rng, (q, k, v), **options)
        check(arguments, more, {"kind": kind, "seed": seed})
        result = fa.attention_backward(*arguments, **more)
        assert [x.dtype for x in result[:3]] == [x.dtype for x in (q, k, v)]
        assert result.bias is None or result.bias.dtype == bias.dtype


@both_dtypes
def test_packed_sequences(dtype, seed):
    """The bits of each sequence alone."""
    rng = generator(seed)
    cu_q, cu_k = np.array([0, 70, 70, 75, 200]), np.array([0, 10, 50, 250, 400])
    q, k, v = (rng.standard_normal(n).astype(dtype) for n in ((200, 4, 12), (400, 2, 12), (400, 2, 9)))
    sinks = rng.standard_normal(4).astype(dtype)
    for options in ({}, {"causal": True, "softcap": 3.0}, {"mask": masks.window(20)},
                    {"bias": fa.ALiBi([0.1, 0.2, 0.3, 0.4])}):
        arguments, more = saved(rng, (q, k, v), forward=fa.varlen_attention, extra=(cu_q, cu_k), sinks=sinks, **options)
        together = fa.varlen_attention_backward(*arguments, **more)
        of_sinks, of_bias = np.zeros(4), np.zeros(4)
        for b in range(4):
            rows, keys = slice(*cu_q[b : b + 2]), slice(*cu_k[b : b + 2])
            one = [np.moveaxis(x[part], 0, 1) for x, part in zip(arguments[:6], (rows, rows, keys, keys, rows, rows))]
            alone = fa.attention_backward(*one, **more | {"grad_lse": more["grad_lse"][rows].T})
            for name, part in (("query", rows), ("key", keys), ("value", keys)):
                assert_same_bits(np.moveaxis(getattr(together, name)[part], 0, 1), getattr(alone, name),
                                 {"sequence": b, "options": options, "seed": seed})
            of_sinks += alone.sinks
            of_bias += alone.bias if alone.bias is not None else 0
        tight = {"rtol": 1e-5 if dtype == F32 else 1e-12, "atol": 1e-4 if dtype == F32 else 1e-11}
        np.testing.assert_allclose(together.sinks, of_sinks, **tight)
        if together.bias is not None:
            np.testing.assert_allclose(together.bias, of_bias, rtol=1e-4 if dtype == F32 else 1e-11)


def test_broadcast_axes(seed):
    """The sum of the gradients of copies."""
    rng = generator(seed)
    q, k, v = (rng.standard_normal(n) for n in ((1, 3, 2, 20, 8), (2, 1, 1, 30, 8), (2, 3, 1, 30, 5)))
    arguments, more = saved(rng, (q, k, v))
    copies = [np.broadcast_to(x, (2, 3, *x.shape[2:])).copy() for x in (q, k, v)]
    each = fa.attention_backward(arguments[0], *copies, *arguments[4:], **more)
    result = fa.attention_backward(*arguments, **more)
    np.testing.assert_allclose(result.query, each.query.sum(axis=0, keepdims=True), rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(result.key, each.key.sum(axis=1, keepdims=True), rtol=1e-13, atol=1e-13)
    assert_same_bits(result.value, each.value, {"seed": seed})


# --- objects ---

GRID = {"shape": (7, 10)}
OBJECTS = {  # what they are made of, and how
    "alibi": ([(4,)], fa.ALiBi),
    "symmetric alibi": ([(4,)], functools.partial(fa.ALiBi, symmetric=True)),
    "relative": ([(4, 31)], fa.RelativeBias),
    "shared": ([(7,)], functools.partial(fa.RelativeBias, first=-5)),
    "t5": ([(32, 4)], fa.RelativeBias.t5),
    "t5 decoder": ([(8, 4)], functools.partial(fa.RelativeBias.t5, bidirectional=False, max_distance=20)),
    "grid": ([(13 * 19, 4)], functools.partial(fa.RelativeBias.grid, **GRID)),
    "decomposed": ([(4, 13), (4, 19)], functools.partial(fa.RelativeBias.decomposed, **GRID)),
}


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"query_offset": np.array([3, -5]), "window": (60, 60)}],
                         ids=str)
@pytest.mark.parametrize("name", OBJECTS)
def test_bias_objects(name, options, seed):
    """The gradient of what they are made of, by differences along a direction."""
    rng = generator(seed, name)
    keys = 70 if "shape" in getattr(OBJECTS[name][1], "keywords", {}) else 330
    arrays = inputs(rng, (2,), 4, 2, 70, keys, 6, 5, F64)
    shapes, make = OBJECTS[name]
    parts, step = ([rng.standard_normal(shape) for shape in shapes] for _ in range(2))
    arguments, more = saved(rng, arrays, bias=make(*parts), **options)
    results = fa.attention_backward(*arguments, **more).bias
    results = results if isinstance(results, tuple) else (results,)
    assert [x.shape for x in results] == shapes

    def value(t):
        bias = make(*(x + t * d for x, d in zip(parts, step)))
        out, lse = fa.attention(*arrays, return_lse=True, bias=bias, **options)
        return (out * arguments[0]).sum() + (lse * more["grad_lse"])[np.isfinite(lse)].sum()

    size = sum(abs(g * d).sum() for g, d in zip(results, step)) + 1
    assert abs(differences(value) - sum((g * d).sum() for g, d in zip(results, step))) <= 1e-7 * size
    reference = fa.reference.attention_backward(*arguments, **more).bias
    for x, y in zip(results, reference if isinstance(reference, tuple) else (reference,)):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-9)


# --- what must not matter ---

@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
def test_threads(heads, dtype, seed):
    """The same bits for every number of threads: chunks of the keys are theirs, sums are not."""
    rng = generator(seed, heads)
    arrays = inputs(rng, (1,), *heads, 200, 2500, 12, 10, dtype)
    for options in ({}, {"causal": True}, {"window": (100, 30)}, {"bias": fa.ALiBi(rng.random(heads[0]))},
                    {"bias": rng.standard_normal((200, 2500)).astype(dtype)},
                    {"bias": rng.standard_normal((heads[0], 200, 1)).astype(dtype)},
                    {"mask": masks.documents(np.arange(2500) // 700) & masks.causal()}):
        if "mask" in options:
            arrays = inputs(rng, (1,), *heads, 2500, 2500, 12, 10, dtype)
        arguments, more = saved(rng, arrays, **options)
        one = fa.attention_backward(*arguments, num_threads=1, **more)
        for threads in (2, 3, 8):
            many = fa.attention_backward(*arguments, num_threads=threads, **more)
            for name, x, y in zip(one._fields, one, many):
                if x is not None:
                    assert_same_bits(y, x, {"threads": threads, "gradient": name, "options": options, "seed": seed})


@pytest.mark.compiled
@both_dtypes
def test_strides(dtype, seed):
    rng = generator(seed)
    arguments, more = saved(rng, inputs(rng, (B,), H, Hkv, L, S, D, Dv, dtype), causal=True)
    right = fa.attention_backward(*arguments, **more)
    for name, layout in LAYOUTS.items():
        moved = [layout(x) for x in arguments[:5]]
        result = fa.attention_backward(*moved, layout(arguments[5]), **more)
        for x, y in zip(result[:3], right[:3]):
            assert_same_bits(x, y, {"layout": name, "seed": seed})
    one = np.broadcast_to(arguments[0][..., :1, :1], arguments[0].shape)
    result = fa.attention_backward(one, *arguments[1:], **more)
    for x, y in zip(result[:3], fa.attention_backward(one.copy(), *arguments[1:], **more)[:3]):
        assert_same_bits(x, y, {"layout": "one element", "seed": seed})


@both_dtypes
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_masked_values_never_contribute(bad, dtype, seed):
    """Padding and hidden positions may hold anything, in both directions: the bits of the others stay."""
    rng = generator(seed)
    q, k, v = inputs(rng, (2,), 2, 1, 90, 200, 8, 9, dtype)
    bias = rng.standard_normal((90, 200)).astype(dtype)
    bias[:, 150:160] = -INF
    mask = np.ones((90, 200), bool)
    mask[20:40, 100:120] = False
    mask[70, :] = False
    for options in ({"kv_lengths": [150, 150]}, {"mask": mask}, {"bias": bias}, {"causal": True, "query_offset": -30},
                    {"mask": mask, "bias": bias, "softcap": 5.0}, {"query_lengths": [60, 60]}):
        (g, *arrays, out, lse), more = saved(rng, (q, k, v), grad_lse=False, **options)
        clean = fa.attention_backward(g, *arrays, out, lse, **more)
        _, visible = fa.reference.logits(fa.checks.problem(q, k, v, **options), 0, (0, 0), (0, 0), np.float64)
        keys = ~visible.any(axis=0)
        rows = ~visible.any(axis=1)
        spoilt = [x.copy() for x in (g, *arrays)]
        spoilt[0][:, :, rows] = spoilt[1][:, :, rows] = bad
        spoilt[2][:, :, keys] = spoilt[3][:, :, keys] = bad
        assert keys.any() or rows.any()
        part = fa.attention_backward(*spoilt[:4], out, lse, **more)
        for name, x, y in zip(clean._fields, part, clean):
            if x is not None:
                assert_same_bits(x, y, {"gradient": name, "options": list(options), "bad": bad, "seed": seed})


@both_dtypes
def test_a_row_that_is_not_finite_stays_with_the_keys_it_sees(dtype, seed):
    rng = generator(seed)
    arrays = inputs(rng, (1,), 1, 1, 80, 80, 8, 9, dtype)
    (g, q, k, v, out, lse), _ = saved(rng, arrays, grad_lse=False, causal=True)
    clean = fa.attention_backward(g, q, k, v, out, lse, causal=True)
    g[0, 0, 30] = NAN
    result = fa.attention_backward(g, q, k, v, out, lse, causal=True)
    assert np.isnan(result.value[0, 0, :31]).all() and np.isnan(result.key[0, 0, :31]).all()
    for x, y in ((result.value, clean.value), (result.key, clean.key)):
        assert_same_bits(x[0, 0, 31:], y[0, 0, 31:], {"seed": seed})
    rest = np.arange(80) != 30
    assert_same_bits(result.query[0, 0, rest], clean.query[0, 0, rest], {"seed": seed})
    assert np.isnan(result.query[0, 0, 30]).all()


def test_empty_rows_have_no_gradient(seed):
    rng = generator(seed)
    arrays = inputs(rng, (1,), 2, 1, 20, 10, 8, 9, F64)
    sinks = rng.standard_normal(2)
    arguments, more = saved(rng, arrays, causal=True, query_offset=-5, sinks=sinks)
    result = fa.attention_backward(*arguments, **more)
    assert not result.query[:, :, :5].any() and result.query[:, :, 5:].any()
    # their lse is the sink itself
    empty = more["grad_lse"][0, :, :5].sum(axis=1)
    rest = fa.attention_backward(*arguments, **more | {"grad_lse": np.where(np.arange(20) < 5, 0, more["grad_lse"])})
    np.testing.assert_allclose(result.sinks - rest.sinks, empty, rtol=1e-12)


@pytest.mark.parametrize("sizes", [(0, 2, 1, 3, 4, 5, 6), (2, 0, 0, 3, 4, 5, 6), (1, 2, 1, 0, 4, 5, 6),
                                   (1, 2, 1, 3, 0, 5, 6), (1, 2, 1, 3, 4, 0, 6), (1, 2, 1, 3, 4, 5, 0)], ids=str)
@both_dtypes
def test_nothing(sizes, dtype, seed):
    b, h, hkv, rows, keys, d, dv = sizes
    rng = generator(seed, sizes)
    for bias in (None, np.zeros((rows, 1), dtype), fa.ALiBi(np.ones(h))):
        arguments, more = saved(rng, inputs(rng, (b,), h, hkv, rows, keys, d, dv, dtype), bias=bias)
        result = fa.attention_backward(*arguments, **more)
        assert [x.shape for x in result[:3]] == [x.shape for x in arguments[1:4]]
        assert all(np.isfinite(x).all() for x in result[:3])
    flat = [x[0, 0] for x in inputs(rng, (1,), 1, 1, 3, 4, 5, 6, dtype)]
    arguments, more = saved(rng, flat)
    assert [x.shape for x in fa.attention_backward(*arguments, **more)[:3]] == [x.shape for x in flat]


# --- memory, errors, docs ---

@pytest.mark.compiled
def test_memory_does_not_grow_with_the_product(seed):
    rng = generator(seed)
    arrays = inputs(rng, (1,), 1, 1, 4096, 4096, 32, 32)
    arguments, more = saved(rng, arrays)
    tracemalloc.start()
    fa.attention_backward(*arguments, **more)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 3 * arrays[0].nbytes + 2**18


def good():
    rng = np.random.default_rng(0)
    q, k, v = inputs(rng, (2,), 2, 1, 5, 7, 4, 3)
    out, lse = fa.attention(q, k, v, return_lse=True)
    return {"grad_out": out, "query": q, "key": k, "value": v, "out": out, "lse": lse}


@pytest.mark.parametrize("name, change, error, message", [
    ("grad_out", lambda x: x[..., :2], ValueError, r"grad_out must have shape \(2, 2, 5, 3\), got \(2, 2, 5, 2\)"),
    ("grad_out", lambda x: x.astype(F64), TypeError, "grad_out must be float32, got float64"),
    ("out", lambda x: x[:, :1], ValueError, r"out must have shape \(2, 2, 5, 3\), got \(2, 1, 5, 3\)"),
    ("lse", lambda x: x[..., None], ValueError, r"lse must have shape \(2, 2, 5\), got \(2, 2, 5, 1\)"),
    ("lse", lambda x: None, TypeError, "lse must be"),
    ("lse", lambda x: x.astype(np.float16), TypeError, "lse must be float32, got float16"),
    ("key", lambda x: x[..., :3], ValueError, "key must have query's head size 4, got 3"),
])
def test_bad_arguments(name, change, error, message):
    arguments = good()
    arguments[name] = change(arguments[name])
    for module in (fa, fa.reference):
        with pytest.raises(error, match=message):
            module.attention_backward(**arguments)
    with pytest.raises(ValueError, match="grad_lse must have shape"):
        fa.attention_backward(**good(), grad_lse=np.zeros(5, np.float32))


def test_docstrings():
    failed, attempted = doctest.testmod(gradient)
    assert attempted and not failed


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (33, 5)},
                                     {"softcap": 3.0, "kv_lengths": [150, 3]}], ids=str)
def test_dropout(options, dtype, seed):
    rng = generator(seed)
    for rows, keys in [(70, 200), (3, 97), (129, 301)]:
        options = options | ({"kv_lengths": [keys - 5, 3]} if "kv_lengths" in options else {})
        arguments, more = saved(rng, inputs(rng, (2,), 4, 2, rows, keys, 8, 9, dtype), dropout_p=0.3, seed=5, **options)
        check(arguments, more, {"rows": rows, "keys": keys, "options": options, "seed": seed})
        for threads in (1, 3):
            for x, y in zip(fa.attention_backward(*arguments, num_threads=threads, **more)[:3],
                            fa.attention_backward(*arguments, **more)[:3]):
                if fa.isa() != "reference":
                    assert_same_bits(x, y, {"threads": threads, "seed": seed})
        with pytest.raises(ValueError, match="seed must be that of the forward pass where there is a dropout"):
            fa.attention_backward(*arguments, **more | {"seed": None})


def test_the_bound_sees_wrong_gradients(seed):
    rng = generator(seed)
    arguments, more = saved(rng, inputs(rng, (1,), 1, 1, 20, 30, 8, 9), causal=True)
    exact, allowed = exact_gradients(*arguments, **more), gradient_bound(*arguments, **more)
    right = fa.attention_backward(*arguments, **more)
    assert_gradients(right, exact, allowed, {})
    for name in ("query", "key", "value"):
        wrong = getattr(right, name).copy()
        wrong[0, 0, 3] *= 1 + 1e-3
        with pytest.raises(AssertionError, match="elements are wrong"):
            assert_gradients(right._replace(**{name: wrong}), exact, allowed, {})
    with pytest.raises(AssertionError):
        assert_close(right.query, exact.query, allowed.query * 0, {})
