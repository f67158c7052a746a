"""Dropout of weights: which ones is a function of (seed, batch, head, row, key), the same everywhere."""

import numpy as np
import pytest
from cases import assert_close, bound, exact, generator, inputs
from layouts import assert_same_bits

import fastattn as fa
from fastattn import checks

F32, F64 = np.dtype(np.float32), np.dtype(np.float64)
both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=str)


@pytest.mark.parametrize("counter, seed, expected", [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((2**32 - 1,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), 0x299F31D0A4093822,
     (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
])
def test_known_numbers(counter, seed, expected):
    """The known answers of Random123, the generator's own library."""
    assert tuple(int(x) for x in fa.reference.philox([np.uint64(c) for c in counter], seed)) == expected


def pattern(lead, H, L, S, dtype=F32, forward=fa.attention, **options):
    """Which weights stay: equal scores, and values that name their key."""
    query, key = np.zeros((*lead, H, L, 4), dtype), np.zeros((*lead, H, S, 4), dtype)
    value = np.broadcast_to(np.eye(S, dtype=dtype), (*lead, H, S, S))
    return forward(query, key, value, **options)


@both_dtypes
@pytest.mark.parametrize("L, S", [(1, 1), (5, 7), (64, 96), (65, 97), (70, 203), (200, 130)])
def test_which_weights_stay(L, S, dtype, seed):
    for share in (0.1, 0.5, 0.999):
        options = {"dropout_p": share, "seed": 2**40 + seed}
        out = pattern((2, 3), 2, L, S, dtype, **options)
        problem = checks.problem(*(np.zeros((2, 3, 2, n, 1)) for n in (L, S, S)), **options)
        for b in range(6):
            for h in range(2):
                factors = fa.reference.dropout(problem, b, (b // 3, b % 3, h))
                np.testing.assert_array_equal(out[b // 3, b % 3, h] != 0, factors != 0)
                np.testing.assert_allclose(out[b // 3, b % 3, h], factors / S, rtol=1e-5)


def test_share(seed):
    """Binomial: within 6 standard deviations, over all, each row and each key."""
    for share in (0.1, 0.5):
        stay = pattern((2,), 3, 256, 512, dropout_p=share, seed=seed) != 0
        for axes in ((0, 1, 2, 3), (0, 1, 2), (0, 1, 3)):
            n = np.prod([stay.shape[a] for a in axes])
            assert abs(stay.mean(axis=axes) - (1 - share)).max() < 6 * (share * (1 - share) / n) ** 0.5
    first, second = (pattern((1,), 1, 64, 64, dropout_p=0.5, seed=n) for n in (1, 2))
    assert (first != second).mean() > 0.4


@both_dtypes
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (20, 5)}, {"softcap": 2.0},
                                     {"kv_lengths": [50, 151]}], ids=str)
def test_within_the_bound(options, dtype, seed):
    rng = generator(seed)
    for L in (3, 130):
        arrays = inputs(rng, (2,), 4, 2, L, 201, 16, 9, dtype)
        more = options | {"dropout_p": 0.25, "seed": 99}
        out, lse = fa.attention(*arrays, return_lse=True, **more)
        true, allowed = exact(*arrays, **more), bound(*arrays, **more)
        assert_close(out, true[0], allowed.out, {"options": more, "seed": seed})
        assert_close(lse, true[1], allowed.lse, {"options": more, "seed": seed})
        assert_same_bits(lse, fa.attention(*arrays, return_lse=True, deterministic="row", **options)[1], {"seed": seed})


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_16_bits(kind, seed):
    if kind == "bfloat16":
        pytest.importorskip("ml_dtypes")
    rng = generator(seed)
    arrays = [x.astype(kind) for x in inputs(rng, (1,), 2, 2, 100, 150, 16, 16)]
    out = fa.attention(*arrays, dropout_p=0.2, seed=7)
    wide = fa.attention(*(x.astype(np.float32) for x in arrays), dropout_p=0.2, seed=7)
    assert_same_bits(out, wide.astype(kind), {"kind": kind, "seed": seed})


@pytest.mark.compiled
@both_dtypes
def test_threads_and_sequences(dtype, seed):
    """Neither threads nor packing change a bit: sequence b is batch b."""
    rng = generator(seed)
    q, k, v = inputs(rng, (3,), 4, 2, 70, 150, 8, 9, dtype)
    options = {"dropout_p": 0.4, "seed": 11, "deterministic": "row"}
    out = fa.attention(q, k, v, **options)
    for threads in (1, 2, 5):
        assert_same_bits(fa.attention(q, k, v, num_threads=threads, **options), out, {"threads": threads, "seed": seed})
    packed = [np.concatenate(list(x.swapaxes(1, 2))) for x in (q, k, v)]
    result = fa.varlen_attention(*packed, [0, 70, 140, 210], [0, 150, 300, 450], **options)
    assert_same_bits(result, np.concatenate(list(out.swapaxes(1, 2))), {"seed": seed})


def test_no_dropout(seed):
    rng = generator(seed)
    arrays = inputs(rng, (1,), 2, 2, 50, 60, 8, 8)
    assert_same_bits(fa.attention(*arrays, dropout_p=0.0, seed=3), fa.attention(*arrays), {"seed": seed})
    first, second = (fa.attention(*arrays, dropout_p=0.5) for _ in range(2))
    assert (first != second).any()  # without a seed, other numbers each time


def test_bad_seeds():
    arrays = inputs(np.random.default_rng(0), (1,), 1, 1, 2, 2, 2, 2)
    with pytest.raises(ValueError, match=r"seed must be less than 2\*\*64, got 18446744073709551616"):
        fa.attention(*arrays, dropout_p=0.1, seed=2**64)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        fa.attention(*arrays, dropout_p=0.1, seed=-1)
    with pytest.raises(TypeError, match="seed must be an integer, got float"):
        fa.attention(*arrays, dropout_p=0.1, seed=1.0)
