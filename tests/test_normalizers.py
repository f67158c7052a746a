"""Weights that are no softmax: the reference against definitions of its own, the kernels under the bound of cases.py."""

import itertools
import re

import numpy as np
import pytest
import test_attention
import test_backward
from cases import assert_close, assert_gradients, bound, exact, exact_gradients, generator, gradient_bound, inputs
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
SIZES = [0.0, -0.0, 1e-45, 1e-38, 1e-30, 1e-18, 1e-9, 1e-4, 1e-3, 0.01, 0.1, 1.0, -1.0, 10.0, 1e3, -1e4, 1e10, 1e20, 1e30]


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
@pytest.mark.parametrize("L, S", [(1, 100), (19, 7), (37, 130), (100, 200)])
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
                                   (3, 1300, 8, 8), (300, 2, 8, 136), (5, 7, 0, 3), (5, 7, 3, 0), (5, 0, 3, 3)], ids=str)
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
@pytest.mark.parametrize("rows, keys", [(19, 130), (100, 200)])
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
