"""fastattn.attention against the exact result, under the a-priori bound of cases.py."""

import copy
import itertools
import math

import numpy as np
import pytest
from cases import PAIRS_ISA, UNIT_ROUNDOFF, assert_close, bound, exact, few_rows, generator, inputs
from hypothesis import given
from hypothesis import strategies as st
from layouts import BROADCASTS, LAYOUTS, assert_same_bits

import fastattn as fa
from fastattn import checks, reference

NAN, INF = np.nan, np.inf
F32, F64 = np.float32, np.float64

# 1, primes, and the neighbours of every size a kernel may work in: vectors of 2 to 16, 64 queries, 96 keys.
LENGTHS = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 127, 129, 192, 193, 200]
HEAD_SIZES = [*range(71), 80, 96, 127, 128, 129, 192, 256, 257, 300]
BORDERS = [0, 1, 7, 8, 15, 16, 63, 64, 94, 95, 96, 97, 191, 192, 193]

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def told(arrays, options, seed, **more):
    """The context of a failure: shapes and options, the arrays among them by shape."""
    options = {name: f"array{option.shape}" if isinstance(option, np.ndarray) else option
               for name, option in options.items()}
    return {"dtype": arrays[0].dtype, "shapes": [a.shape for a in arrays], "options": options, **more, "seed": seed}


def check(arrays, options, context, out=None):
    """out and lse under the bound, by either path; without lse, into `out` or as a plain call the same bits; inputs not
    modified."""
    given_arrays = [*arrays, *(option for option in options.values() if isinstance(option, np.ndarray))]
    before = [array.tobytes() for array in given_arrays]

    result, lse = fa.attention(*arrays, return_lse=True, **options)
    assert result.dtype == arrays[0].dtype and lse.dtype == checks.compute_dtype(result.dtype)
    true, true_lse = exact(*arrays, **options)
    allowed = bound(*arrays, **options)
    assert_close(result, true, allowed.out, context)
    assert_close(lse, true_lse, allowed.lse, {**context, "result": "lse"})

    if out is None:
        out = np.empty_like(result)
    out[...] = NAN
    assert fa.attention(*arrays, out=out, **options) is out
    finite = np.isfinite(result)  # which NaN it is may differ
    assert_same_bits(out[finite], result[finite], {**context, "call": "out="})
    plain = fa.attention(*arrays, **options)
    assert_same_bits(plain[finite], result[finite], {**context, "call": "without lse"})

    # Few rows go their own way; here the way of many.
    few = few_rows(arrays[0].shape[-1], *(array.dtype for array in arrays), scale=options.get("scale", 1.0))
    if result.shape[-2] <= few or "query_lengths" in options:
        options = {**options, "deterministic": "row"}
        context = {**context, "call": "by the path of many rows"}
        result_of_many, lse_of_many = fa.attention(*arrays, return_lse=True, **options)
        if fa.isa() == PAIRS_ISA and result.dtype.name == "bfloat16":
            allowed = bound(*arrays, **options)
        assert_close(result_of_many, true, allowed.out, context)
        assert_close(lse_of_many, true_lse, allowed.lse, {**context, "result": "lse"})
    assert [array.tobytes() for array in given_arrays] == before, f"{context}: an input was modified"
    return result, lse


# --- shapes ---

@both_dtypes
@pytest.mark.parametrize("L", LENGTHS)
def test_every_pair_of_lengths(L, dtype, seed):
    for S in LENGTHS:
        rng = generator(seed, L, S)
        D, Dv = (int(n) for n in rng.integers(1, 24, 2))
        arrays = inputs(rng, (), 1, 1, L, S, D, Dv, dtype)
        for options in {}, {"causal": True}, {"causal": True, "query_offset": 0}:
            check(arrays, options, told(arrays, options, seed))


@both_dtypes
@pytest.mark.parametrize("Dv_is", ["D", "other"])
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_every_head_size(D, Dv_is, dtype, seed):
    rng = generator(seed, D, Dv_is)
    Dv = D if Dv_is == "D" else HEAD_SIZES[-1 - HEAD_SIZES.index(D)]
    # as many as go the way of few; more than a tile, which holds half as many float64
    for L, S in [(few_rows(D, dtype), 103), (67, 197) if dtype == F32 else (35, 101)]:
        arrays = inputs(rng, (), 1, 1, L, S, D, Dv, dtype)
        for options in {}, {"causal": True}:
            check(arrays, options, told(arrays, options, seed))


@both_dtypes
@pytest.mark.parametrize("H, Hkv", [(1, 1), (2, 1), (2, 2), (3, 1), (6, 2), (8, 1), (12, 4), (16, 16)])
def test_grouped_heads(H, Hkv, dtype, seed):
    for B, L, S in [(1, 17, 33), (3, 1, 100), (2, 65, 7)]:
        rng = generator(seed, H, Hkv, B, L, S)
        arrays = inputs(rng, (B,), H, Hkv, L, S, 8, 9, dtype)
        for options in {}, {"sinks": rng.standard_normal(H).astype(dtype), "causal": True}:
            check(arrays, options, told(arrays, options, seed))


@both_dtypes
@pytest.mark.parametrize("leads", [
    [(), (), ()], [(1,), (1,), (1,)], [(3,), (3,), (3,)], [(2, 3), (2, 3), (2, 3)], [(2, 1, 3), (2, 1, 3), (2, 1, 3)],
    [(3,), (1,), (1,)], [(1,), (3,), (3,)], [(1,), (1,), (3,)], [(3,), (1,), (3,)], [(2, 1), (1, 3), (2, 3)],
    [(1, 3), (2, 1), (1, 1)], [(2, 1, 3), (1, 2, 1), (1, 1, 3)], [(1, 2) * 4, (1, 2) * 4, (1, 2) * 4],
    [(1,) * 8, (2,) + (1,) * 7, (1,) * 7 + (3,)],
], ids=str)
def test_leading_axes(leads, dtype, seed):
    rng = generator(seed, leads)
    lead = np.broadcast_shapes(*leads)
    B, H, L, S = math.prod(lead), 2, 5, 19
    arrays = tuple(rng.standard_normal((*own, heads, *size)).astype(dtype)
                   for own, heads, size in zip(leads, (H, 1, 1), ((L, 8), (S, 8), (S, 6))))
    for options in [
        {},
        {"causal": True, "kv_lengths": rng.integers(0, S + 1, lead), "query_lengths": rng.integers(0, L + 1, lead)},
        {"window": (3, 2), "query_offset": rng.integers(-L, S, lead)},
        {"mask": rng.random((*lead, 1, 1, S)) < 0.7, "bias": rng.standard_normal((*lead[1:], H, L, 1)).astype(dtype)},
    ]:
        result, lse = check(arrays, options, told(arrays, options, seed, B=B))
        assert result.shape == (*lead, H, L, 6) and lse.shape == (*lead, H, L)


@both_dtypes
def test_two_axes(dtype, seed):
    rng = generator(seed)
    arrays = tuple(a[0] for a in inputs(rng, (), 1, 1, 9, 100, 8, 6, dtype))
    for options in [{}, {"causal": True}, {"mask": rng.random((9, 100)) < 0.5, "kv_lengths": 50}]:
        result, lse = check(arrays, options, told(arrays, options, seed))
        assert result.shape == (9, 6) and lse.shape == (9,)


@both_dtypes
@pytest.mark.parametrize("B, H, L, S, D, Dv", [
    (0, 2, 3, 4, 5, 6), (2, 0, 3, 4, 5, 6), (2, 2, 0, 4, 5, 6), (2, 2, 3, 0, 5, 6), (2, 2, 3, 4, 0, 6),
    (2, 2, 3, 4, 5, 0), (2, 2, 70, 0, 5, 6), (2, 2, 70, 200, 0, 70), (2, 2, 70, 200, 5, 0), (2, 2, 3, 0, 0, 0),
    (2, 2, 0, 0, 5, 6), (0, 0, 0, 0, 0, 0)])
def test_sizes_of_zero(B, H, L, S, D, Dv, dtype, seed):
    rng = generator(seed)
    arrays = inputs(rng, (B,), H, H, L, S, D, Dv, dtype)
    for options in [{}, {"causal": True}, {"window": 2, "softcap": 3.0, "scale": -2.0},
                    {"mask": np.ones((L, S), bool), "bias": np.zeros((1, S), dtype), "sinks": np.ones(H, dtype)},
                    {"kv_lengths": 0, "query_lengths": 0}]:
        result, lse = check(arrays, options, told(arrays, options, seed))
        assert result.shape == (B, H, L, Dv) and lse.shape == (B, H, L)
        if S == 0:
            assert (result == 0).all()


# --- memory layouts ---

def everything(rng, dtype, L=37, S=130):
    """Arguments with every array there is, by name; the sizes are no multiples of a tile."""
    q, k, v = inputs(rng, (2,), 4, 2, L, S, 19, 21, dtype)
    bias = rng.standard_normal((2, 4, L, S)).astype(dtype)
    bias[rng.random(bias.shape) < 0.1] = -INF
    return {"query": q, "key": k, "value": v, "bias": bias, "mask": rng.random((2, 4, L, S)) < 0.7,
            "sinks": rng.standard_normal(4).astype(dtype)}


def split(arguments):
    """(query, key, value), options"""
    options = dict(arguments)
    return tuple(options.pop(name) for name in ("query", "key", "value")), options


def few_of(arrays, options, out=None):
    """The last rows of all, as many as go the way of few: views in the same layout."""
    q, k, v = arrays
    rows = slice(q.shape[-2] - few_rows(q.shape[-1], q.dtype), None)
    options = {name: x[..., rows, :] if name in ("mask", "bias") else x for name, x in options.items()}
    return (q[..., rows, :], k, v), options, None if out is None else out[..., rows, :]


@both_dtypes
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "mask", "out", "all"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, name, dtype, seed):
    rng = generator(seed, layout, name)
    arguments = everything(rng, dtype)
    out = np.empty((2, 4, 37, 21), dtype)
    for argument in arguments:
        if name in (argument, "all") and argument != "sinks":
            arguments[argument] = LAYOUTS[layout](arguments[argument])
    if name in ("out", "all") and layout != "read-only":
        out = LAYOUTS[layout](out)
    arguments["sinks"] = arguments["sinks"].repeat(2)[::2]
    arrays, options = split(arguments)
    for chosen in [options] if name in ("bias", "mask") else [options, {}, {"causal": True}]:
        check(arrays, chosen, told(arrays, chosen, seed, layout=layout, argument=name), out)
    arrays, options, out = few_of(arrays, options, out)
    check(arrays, options, told(arrays, options, seed, layout=layout, argument=name), out)


@both_dtypes
@pytest.mark.parametrize("name", ["query", "key", "value", "bias", "mask", "all"])
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_zero_strides(broadcast, name, dtype, seed):
    rng = generator(seed, broadcast, name)
    arguments = everything(rng, dtype)
    for argument in arguments:
        if name in (argument, "all") and argument != "sinks":
            arguments[argument] = BROADCASTS[broadcast](arguments[argument])
    arrays, options = split(arguments)
    for chosen in [options] if name in ("bias", "mask") else [options, {}, {"causal": True}]:
        check(arrays, chosen, told(arrays, chosen, seed, broadcast=broadcast, argument=name))
    arrays, options, _ = few_of(arrays, options)
    check(arrays, options, told(arrays, options, seed, broadcast=broadcast, argument=name))


@both_dtypes
def test_rest_of_a_strided_out_is_left_alone(dtype, seed):
    arrays = inputs(generator(seed), (2,), 2, 2, 70, 30, 8, 9, dtype)
    memory = np.full((2, 2, 142, 20), 7, dtype)
    out = memory[:, :, 1:-1:2, 1:-1:2]
    fa.attention(*arrays, out=out)
    outside = np.ones(memory.shape, bool)
    outside[:, :, 1:-1:2, 1:-1:2] = False
    assert (memory[outside] == 7).all() and np.isfinite(out).all()
    assert_same_bits(out, fa.attention(*arrays), told(arrays, {}, seed))


# --- options, each alone ---

def mask_forms(B, H, L, S):
    return [(S,), (1, 1), (L, 1), (1, S), (L, S), (H, 1, S), (1, L, S), (H, L, S), (H, 1, 1), (B, 1, 1, S),
            (B, 1, L, S), (B, H, 1, 1), (B, H, L, S)]


def options_alone(rng, B, H, L, S, dtype):
    for form in mask_forms(B, H, L, S):
        for density in (0, 0.02, 0.6, 1):
            yield {"mask": rng.random(form) < density}
        yield {"bias": rng.standard_normal(form).astype(dtype)}
        bias = (30 * rng.standard_normal(form)).astype(dtype)
        bias[rng.random(form) < 0.5] = -INF
        yield {"bias": bias}
        yield {"bias": np.full(form, -INF, dtype)}
    yield {"mask": blocks(rng, B, H, L, S)}
    for offset in (None, 0, 1, -1, S - L, -L, 1 - L, S, S + 5, 10**9, -(10**9), 2**60 - 1, 1 - 2**60,
                   rng.integers(-L, S, B), rng.integers(-(2**59), 2**59, B).tolist()):
        yield {"causal": True, "query_offset": offset}
        for window in (0, 1, 40, 10**6, (0, None), (None, 0), (None, 17), (33, None), (100, 2), (2, 100),
                       (2**70, 2**70)):
            yield {"window": window, "query_offset": offset}
        yield {"causal": True, "window": 5, "query_offset": offset}
        yield {"query_offset": offset}
    for lengths in (0, 1, S // 2, S - 1, S, [0] + [S] * (B - 1), rng.integers(0, S + 1, B)):
        yield {"kv_lengths": lengths}
        yield {"kv_lengths": lengths, "causal": True}
    for lengths in (0, 1, L // 2, L - 1, L, [L] * (B - 1) + [0], rng.integers(0, L + 1, B)):
        yield {"query_lengths": lengths}
        yield {"query_lengths": lengths, "causal": True}
    for scale in (0.0, -0.0, 1.0, -0.5, 3.0, -8.0, 1e-3, 1e-30, 1e-45, 1e-320, 1e4, -1e4, np.float32(0.3), 2):
        yield {"scale": scale}
        yield {"scale": scale, "softcap": 2.0}
        yield {"scale": scale, "bias": rng.standard_normal((L, S)).astype(dtype)}
    for softcap in (1e-30, 0.01, 1, 5.0, 50.0, 1e4, 1e30):
        yield {"softcap": softcap}
    for sinks in (0, 5, -5, 200, -200, -INF):
        yield {"sinks": np.full(H, sinks, dtype)}
        yield {"sinks": np.full(H, sinks, dtype), "mask": rng.random((L, S)) < 0.02}
    yield {"sinks": rng.standard_normal(2 * H).astype(dtype)[::-2]}


def blocks(rng, B, H, L, S):
    """A mask of whole tiles: all, nothing or some of each."""
    coarse = rng.choice([0.0, 0.5, 1.0], (B, H, -(-L // 8), -(-S // 96)))
    density = coarse.repeat(8, axis=2).repeat(96, axis=3)[:, :, :L, :S]
    return rng.random((B, H, L, S)) < density


@both_dtypes
@pytest.mark.parametrize("L, S, D", [(1, 100, 8), (19, 7, 8), ("few", 130, 64), (100, 200, 8)])
def test_each_option_alone(L, S, D, dtype, seed):
    B, H = 2, 2
    if L == "few":
        L = few_rows(D, dtype)
    elif dtype == F64 and L > 50:
        L //= 2  # a tile holds half as many
    rng = generator(seed, L, S)
    arrays = inputs(rng, (B,), H, 1, L, S, D, 9, dtype)
    for number, options in enumerate(options_alone(rng, B, H, L, S, dtype)):
        check(arrays, options, told(arrays, options, seed, number=number))


# --- options together ---

@st.composite
def calls(draw):
    """(arrays, options, number): any sizes, any options; `number` is what the values were drawn from."""
    dtype = draw(st.sampled_from([F32, F64]))
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 1)]))
    B, Hkv, group = math.prod(lead), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    H = Hkv * group
    L, S = (draw(st.sampled_from([0, *more, *LENGTHS])) for more in ([1, 2, 3, 4, 6, 12], []))
    D, Dv = (draw(st.sampled_from([1, 8, 0, 3, 16, 17, 33, 64])) for _ in range(2))
    number = draw(st.integers(0, 2**32 - 1))
    return dtype, lead, B, H, Hkv, L, S, D, Dv, number, draw(choices(H, L, S, lead))


@st.composite
def choices(draw, H, L, S, lead):
    """What to build the options from, without random arrays: those are drawn from the number."""
    def maybe(strategy):
        return draw(st.none() | strategy)

    offsets = st.integers(-L - 3, S + 3) | st.sampled_from([10**6, -(10**6), 2**60 - 1, 1 - 2**60])
    bounds = st.none() | st.integers(0, S + 3) | st.just(2**62)
    lengths = {"kv_lengths": S, "query_lengths": L, "query_offset": S}
    return {
        "mask": maybe(st.tuples(st.integers(0, 12), st.sampled_from([0.5, 0, 0.02, 0.98, 1, "blocks"]))),
        "bias": maybe(st.tuples(st.integers(0, 12), st.sampled_from([1, 100, 1e4]), st.sampled_from([0, 0.1, 0.9, 1]),
                                st.sampled_from([-INF, -INF, "lowest"]))),
        "causal": draw(st.booleans()),
        "window": maybe(bounds.filter(lambda n: n is not None) | st.tuples(bounds, bounds)),
        "query_offset": maybe(offsets | st.lists(offsets, min_size=math.prod(lead), max_size=math.prod(lead))),
        **{name: maybe(st.sampled_from([0, n // 3, n]) | st.just("each"))
           for name, n in lengths.items() if name != "query_offset"},
        "scale": maybe(st.sampled_from([1.0, -0.5, 0.0, 1e-30, 3.0, 300.0])),
        "softcap": maybe(st.sampled_from([5.0, 0.1, 50.0, 1e4])),
        "sinks": maybe(st.sampled_from([1.0, 100.0, -INF])),
        "layout": draw(st.sampled_from(list(LAYOUTS))),
    }


def build(rng, choice, dtype, lead, B, H, L, S):
    forms = mask_forms(B, H, L, S)
    forms = [(*lead, *form[-3:]) if len(form) == 4 else form for form in forms]
    options = {name: choice[name] for name in ("causal", "window", "scale", "softcap") if choice[name] is not None}
    if choice["mask"] is not None:
        form, density = choice["mask"]
        options["mask"] = (blocks(rng, B, H, L, S).reshape(*lead, H, L, S) if density == "blocks"
                           else rng.random(forms[form]) < density)
    if choice["bias"] is not None:
        form, size, share, hidden = choice["bias"]
        bias = (size * rng.standard_normal(forms[form])).astype(dtype)
        bias[rng.random(bias.shape) < share] = np.finfo(dtype).min if hidden == "lowest" else hidden
        options["bias"] = bias
    for name, n in [("kv_lengths", S), ("query_lengths", L)]:
        if choice[name] is not None:
            options[name] = rng.integers(0, n + 1, lead) if choice[name] == "each" else choice[name]
    if choice["query_offset"] is not None:
        offset = choice["query_offset"]
        options["query_offset"] = np.reshape(offset, lead) if isinstance(offset, list) else offset
    if choice["sinks"] is not None:
        sinks = choice["sinks"] * rng.random(H)
        options["sinks"] = np.where(rng.random(H) < 0.3, choice["sinks"], sinks).astype(dtype)
    return options


@given(calls())
def test_options_together(seed, call):
    dtype, lead, B, H, Hkv, L, S, D, Dv, number, choice = call
    rng = generator(seed, number)
    arrays = inputs(rng, lead, H, Hkv, L, S, D, Dv, dtype)
    options = build(rng, choice, dtype, lead, B, H, L, S)
    arrays = tuple(LAYOUTS[choice["layout"]](array) for array in arrays)
    check(arrays, options, told(arrays, options, seed, number=number, layout=choice["layout"]))


# --- large logits ---

def check_hull(result, value, context):
    """Without sinks a row is a mean of values: it still says something where the bound does not, for large logits."""
    sums = 2 * (96 + value.shape[-2] // 96 + 8) * UNIT_ROUNDOFF[result.dtype]
    low, high = value.min(axis=-2, keepdims=True), value.max(axis=-2, keepdims=True)
    slack = sums * abs(value).max(axis=-2, keepdims=True)
    inside = (low - slack <= result) & (result <= high + slack)
    assert inside.all(), f"isa={fa.isa()}, {context}: {int((~inside).sum())} elements are no mean of values"


@both_dtypes
@pytest.mark.parametrize("size", [30, 300, 1e4, 1e10, 1e30])
@pytest.mark.parametrize("L", [1, 70])
def test_scores_of_any_size(L, size, dtype, seed):
    arrays = inputs(generator(seed, L, size), (), 1, 1, L, 300, 16, 5, dtype)
    for sign in 1, -1:
        options = {"scale": sign * size / 4}
        context = told(arrays, options, seed)
        result, _ = check(arrays, options, context)
        check_hull(result, arrays[2], context)
    bias = (size * generator(seed, size).standard_normal((L, 300))).astype(dtype)
    for options in {"bias": bias}, {"bias": bias, "softcap": 5.0}, {"scale": size, "softcap": size}:
        context = told(arrays, options, seed)
        result, _ = check(arrays, options, context)
        check_hull(result, arrays[2], context)


# Logits (nats) of the blocks of 96 keys. A kernel that weighs a block by an older maximum must notice each of these.
STEPS = [5, 6.5, 6.7, 6.8, 6.9, 7, 7.1, 7.5, 10, 20, 30, 44, 45, 50, 60, 88, 89, 100, 130, 180, 222, 223, 250, 300, 350,
         400, 440, 500, 700, 710, 750, 1000, 1400, 2000, 2840, 5000, 20000]
PROFILES = {
    "rising": lambda block: block,
    "falling": lambda block: -block,
    "alternating": lambda block: block % 2,
    "one block": lambda block: block == 2,
}


@both_dtypes
@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("step", STEPS)
def test_maximum_jumps_between_blocks(step, profile, dtype, seed):
    rng = generator(seed, step, profile)
    S = 500
    for L, lanes, keys in itertools.product([1, 70], ["all", "one"], ["all", "one"]):
        q, k, v = inputs(rng, (), 1, 1, L, S, 2, 3, dtype)
        # logit = query[0] * key[0] + a little: rises for all queries or one of them, at all keys of a block or one.
        q[..., 0] = 1 if lanes == "all" else 0
        q[:, L // 2, 0] = 1
        block = np.arange(S) // 96
        at = slice(None) if keys == "all" else np.arange(S) % 96 == 41
        k[..., 0] = 0
        k[:, at, 0] = (step * PROFILES[profile](block))[at]
        context = told((q, k, v), {"scale": 1.0}, seed, step=step, profile=profile, lanes=lanes, keys=keys)
        result, _ = check((q, k, v), {"scale": 1.0}, context)
        check_hull(result, v, context)


@both_dtypes
@pytest.mark.parametrize("step", [104, 746, 3000, 1e5])
def test_one_key_outweighs_all(step, dtype, seed):
    """Scores are exact integers, further apart than exp can hold: out is one value, but for its three roundings
    (weight times value, 1 / sum, their product)."""
    rng = generator(seed, step)
    u = UNIT_ROUNDOFF[np.dtype(dtype)]
    if dtype == F64:
        step = max(step, 746)
    for S, L in [(1, 1), (97, 1), (300, 70), (300, 130)]:
        k = step * rng.permutation(S)[:, None].astype(dtype)
        q = rng.choice([-1, 1], (L, 1)).astype(dtype)
        v = rng.standard_normal((S, 4)).astype(dtype)
        expected = v[(q @ k.T).argmax(axis=1)]
        result, lse = fa.attention(q, k, v, scale=1.0, return_lse=True)
        context = told((q, k, v), {"scale": 1.0}, seed, step=step)
        assert_close(result, expected, 4 * u * abs(expected), context)
        top = (q @ k.T).max(axis=1)
        assert_close(lse, top, 4 * u * abs(top), {**context, "result": "lse"})


@both_dtypes
@pytest.mark.parametrize("share", [1, 0.8, 0.6, 1e-3])
@pytest.mark.parametrize("sign", [-1, 1])
def test_bias_at_the_ends_of_the_range(sign, share, dtype, seed):
    """The lowest number is what many libraries mask with. It is a number: a row of it alone has uniform weights."""
    L, S = 70, 200
    rng = generator(seed, sign, share)
    arrays = inputs(rng, (), 1, 1, L, S, 8, 5, dtype)
    extreme = dtype(sign * share * float(np.finfo(dtype).max))
    whole = np.full((L, S), extreme)
    rows = np.zeros((L, S), dtype)
    rows[::7] = extreme
    places = np.where(rng.random((L, S)) < 0.5, extreme, dtype(0))
    for bias, more in itertools.product([whole, whole[:1], rows, places], [{}, {"causal": True}, {"softcap": 3.0}]):
        options = {"bias": bias, **more}
        context = told(arrays, options, seed, extreme=extreme)
        result, _ = check(arrays, options, context)
        check_hull(result, arrays[2], context)
    if sign < 0:  # scores vanish beside it, so the mean of the values is due
        result = fa.attention(*arrays, bias=whole)
        mean = np.broadcast_to(arrays[2].astype(F64).mean(axis=1, keepdims=True), result.shape)
        slack = (96 + S // 96 + 8) * UNIT_ROUNDOFF[np.dtype(dtype)] * abs(arrays[2]).mean()
        assert_close(result, mean, slack, told(arrays, {"bias": "extreme"}, seed, extreme=extreme))


@both_dtypes
@pytest.mark.parametrize("lowest", [-1e4, -1e8, -1e9, -1e10, -1e12, -1e30, 1e9, 1e12])
def test_rows_that_a_large_bias_hides_by_habit(lowest, dtype, seed):
    """-1e9 and the like are no -inf: a row of them alone is a mean of its values."""
    for L, S in [(1, 5), (70, 200)]:
        rng = generator(seed, lowest, L)
        arrays = inputs(rng, (), 1, 1, L, S, 8, 5, dtype)
        bias = np.where(rng.random((L, S)) < 0.5, lowest, 0).astype(dtype)
        bias[::2] = lowest
        for options in {"bias": bias}, {"bias": bias[:1]}, {"bias": bias, "causal": True}:
            context = told(arrays, options, seed, lowest=lowest)
            result, _ = check(arrays, options, context)
            check_hull(result, arrays[2], context)


@both_dtypes
@pytest.mark.parametrize("share", [1, 0.8, 0.6])
def test_scale_at_the_end_of_the_range(share, dtype, seed):
    """Tiny queries and keys, whose products are exact, and a scale that brings them back to moderate scores."""
    largest = float(np.finfo(dtype).max)
    half = dtype(2.0 ** (-math.log2(largest) / 2))
    q, k, v = inputs(generator(seed, share), (), 1, 1, 70, 200, 4, 5, dtype)
    arrays = (2 * q).round() * half, (2 * k).round() * half, v
    for sign in 1, -1:
        options = {"scale": sign * share * largest}
        check(arrays, options, told(arrays, options, seed))


# --- NaN and infinities ---

def restrictions(rng, B, H, L, S, dtype):
    """Every way to hide keys, by name. Some keys are seen by all queries, by some, and by none."""
    bias = rng.standard_normal((B, H, L, S)).astype(dtype)
    bias[rng.random(bias.shape) < 0.5] = -INF
    bias[..., 100:110] = -INF
    column = rng.random((1, S)) < 0.5
    return {
        "mask": {"mask": rng.random((B, H, L, S)) < 0.5},
        "mask of columns": {"mask": column},
        "mask of tiles": {"mask": blocks(rng, B, H, L, S)},
        "bias": {"bias": bias},
        "bias of columns": {"bias": np.where(column, 0, -INF).astype(dtype)},
        "bias and softcap": {"bias": bias, "softcap": 5.0},
        "causal": {"causal": True},
        "causal, top left": {"causal": True, "query_offset": 0},
        "window": {"window": (20, 3), "query_offset": rng.integers(0, S, B)},
        "left of window": {"window": (20, None)},
        "kv_lengths": {"kv_lengths": [S - 50, S // 2]},
        "all": {"mask": rng.random((L, S)) < 0.8, "bias": bias, "causal": True, "window": 100,
                "kv_lengths": [S, S - 50], "query_lengths": [L, max(L - 20, L // 2)], "sinks": np.ones(H, dtype)},
    }


def visibility(arrays, options):
    """visible[B, H, L, S] by the reference."""
    problem = checks.problem(*arrays, **options)
    visible = np.empty(problem.query.shape[:-1] + problem.key.shape[-2:-1], bool)
    with np.errstate(all="ignore"):
        for batch, head, kv_head in reference.heads(problem):
            visible[head] = reference.logits(problem, batch, head, kv_head, F64)[1]
    return visible


@both_dtypes
@pytest.mark.parametrize("layout", ["contiguous", "columns first"])
@pytest.mark.parametrize("kind", restrictions(np.random.default_rng(0), 2, 1, 1, 200, F32))
def test_hidden_nan_and_inf_change_no_bit(kind, layout, dtype, seed):
    """NaN and Inf at every key and value in turn: rows that do not see it keep their bits, the others show it."""
    B, H, L, S, D, Dv = 2, 1, 50, 200, 3, 4
    rng = generator(seed, kind, layout)
    q, k, v = inputs(rng, (B,), H, H, L, S, D, Dv, dtype)
    options = restrictions(rng, B, H, L, S, dtype)[kind]
    k, v = LAYOUTS[layout](k), LAYOUTS[layout](v)
    clean, clean_lse = fa.attention(q, k, v, return_lse=True, **options)
    visible = visibility((q, k, v), options)
    allowed = bound(q, k, v, **options).out
    assert not visible.all()
    for j in range(S):
        seen, hidden = visible[..., j], ~visible[..., j]
        context = told((q, k, v), options, seed, layout=layout, position=j)
        infinity = INF if j % 2 else -INF
        for name, array, columns, bad in [("key", k, slice(None), NAN), ("key", k, j % D, infinity),
                                          ("value", v, slice(None), NAN), ("value", v, j % Dv, NAN),
                                          ("value", v, j % Dv, infinity)]:
            where = {**context, "in": name, "columns": columns, "poison": bad}
            saved = array[:, :, j].copy()
            array[:, :, j, columns] = bad
            result, lse = fa.attention(q, k, v, return_lse=True, **options)
            array[:, :, j] = saved
            assert_same_bits(result[hidden], clean[hidden], where)
            assert_same_bits(lse[hidden], clean_lse[hidden], {**where, "result": "lse"})
            if name == "value":
                expected = clean.astype(F64)
                shown = expected[..., columns]
                shown[seen] = bad
                assert_close(result, expected, 2 * allowed, where)
                assert_same_bits(lse, clean_lse, {**where, "result": "lse"})
            elif np.isnan(bad):
                assert np.isnan(result[seen]).all() and np.isnan(lse[seen]).all(), where


@both_dtypes
@pytest.mark.parametrize("kind", ["mask", "mask of columns", "mask of tiles", "causal", "causal, top left", "window",
                                  "left of window", "kv_lengths", "all"])
def test_hidden_nan_and_inf_in_bias_and_query_change_no_bit(kind, dtype, seed):
    B, H, L, S = 2, 2, 70, 200
    rng = generator(seed, kind)
    q, k, v = inputs(rng, (B,), H, H, L, S, 5, 4, dtype)
    options = restrictions(rng, B, H, L, S, dtype)[kind]
    options = {"bias": rng.standard_normal((B, H, L, S)).astype(dtype), **options}
    hidden = ~visibility((q, k, v), {**options, "bias": np.zeros_like(options["bias"])})
    clean = fa.attention(q, k, v, return_lse=True, **options)
    for bad in NAN, INF, -INF:
        for layout in "contiguous", "columns first":
            bias = options["bias"].copy()
            bias[hidden] = bad
            poisoned = q.copy()
            poisoned[hidden.all(axis=-1)] = bad
            poisoned, bias = LAYOUTS[layout](poisoned), LAYOUTS[layout](bias)
            result = fa.attention(poisoned, k, v, return_lse=True, **{**options, "bias": bias})
            context = told((q, k, v), options, seed, kind=kind, layout=layout, poison=bad)
            assert_same_bits(result[0], clean[0], context)
            assert_same_bits(result[1], clean[1], {**context, "result": "lse"})


@both_dtypes
@pytest.mark.parametrize("form", ["plain", "causal", "mask", "bias", "columns first"])
def test_live_nan_and_inf_propagate(form, dtype, seed):
    """At every length, on both sides of every tile border: one poisoned element a batch."""
    L, D, Dv = min(3, few_rows(2, dtype)), 2, 3
    bad_values = [NAN, INF, -INF]
    for S in range(1, 201):
        rng = generator(seed, form, S)
        places = sorted({p for p in [0, S // 2, S - 1, *(BORDERS if S % 7 == 4 else [])] if p < S})
        targets = ["query", "key", "value"] + ["bias"] * (form == "bias")
        cases = [(place, target) for place in places for target in targets]
        B = len(cases)
        q, k, v = inputs(rng, (B,), 1, 1, L, S, D, Dv, dtype)
        options = {}
        if form == "causal":
            options["causal"] = True
        if form == "mask":
            options["mask"] = rng.random((L, S)) < 0.7
        if form == "bias":
            options["bias"] = rng.standard_normal((B, 1, L, S)).astype(dtype)
        arrays = {"query": q, "key": k, "value": v, "bias": options.get("bias")}
        for b, (place, target) in enumerate(cases):
            row = place % L if target in ("query", "bias") else place
            column = place if target == "bias" else place % 2
            arrays[target][b, 0, row, column] = bad_values[(place + S) % 3]
        if form == "columns first":
            q, k, v = (LAYOUTS[form](array) for array in (q, k, v))
        check((q, k, v), options, told((q, k, v), options, seed, form=form, poisoned=cases))


@both_dtypes
def test_scores_of_minus_infinity_alone_are_nan(dtype, seed):
    """They come from infinite inputs that are seen: NaN by IEEE rules, not an empty row."""
    for L, S in [(1, 1), (3, 5), (70, 200)]:
        q, k, v = inputs(generator(seed, L, S), (), 1, 1, L, S, 1, 3, dtype)
        q[...] = 1
        k[...] = -INF
        for options in [{}, {"causal": True, "query_offset": 0}, {"mask": np.ones((L, S), bool)},
                        {"bias": np.zeros((L, S), dtype)}, {"sinks": np.ones(1, dtype)},
                        {"bias": np.full((L, S), -INF, dtype)}]:
            check((q, k, v), options, told((q, k, v), options, seed))


@both_dtypes
@pytest.mark.parametrize("sink", [NAN, INF, -INF])
def test_infinite_and_nan_sinks(sink, dtype, seed):
    """A row that sees no key is zero even so."""
    for L, S in [(5, 20), (70, 200)]:
        arrays = inputs(generator(seed, L, S), (), 2, 2, L, S, 4, 3, dtype)
        mask = np.ones((L, S), bool)
        mask[1::3] = False
        for more in {}, {"kv_lengths": 0}, {"causal": True, "query_offset": -3}, {"mask": mask}, {"query_lengths": 2}:
            options = {"sinks": np.array([sink, 0.5], dtype), **more}
            check(arrays, options, told(arrays, options, seed))


# --- empty rows ---

EMPTY_ROWS = [[0], [7], [8], [15], [16], [31, 32], [63], [64], [127], [128], [149], [0, 75, 149], range(16),
              range(16, 32), range(60, 70), range(64), range(64, 128), range(128, 150), range(1, 149), range(150)]


def check_empty(arrays, options, empty, context):
    """The rows `empty` are zero with lse -inf (the sink), and so are no others."""
    result, lse = check(arrays, options, context)
    rows = np.zeros(result.shape[-2], bool)
    rows[list(empty)] = True
    assert (result[..., rows, :] == 0).all(), context
    if "sinks" not in options:
        assert (lse[..., rows] == -INF).all(), context
    assert (result[..., ~rows, :] != 0).all() and np.isfinite(lse[..., ~rows]).all(), context


@both_dtypes
@pytest.mark.parametrize("empty", EMPTY_ROWS, ids=lambda rows: f"{rows[0]}-{rows[-1]}")
def test_empty_rows_of_mask_and_bias(empty, dtype, seed):
    L, S = 150, 110
    rng = generator(seed, str(empty))
    q, k, v = inputs(rng, (), 2, 1, L, S, 5, 4, dtype)
    rows = list(empty)
    q[:, rows] = NAN
    mask = rng.random((L, S)) < 0.5
    mask[:, 0] = True
    every = np.ones((L, S), bool)
    mask[rows] = every[rows] = False
    column = every[:, :1]
    low, high = np.arange(S) < 50, np.arange(S) >= 50  # each leaves the row something, both together nothing
    for options in [
        {"mask": mask}, {"mask": every}, {"mask": column}, {"mask": mask, "sinks": np.array([1, -2], dtype)},
        {"bias": np.where(mask, 0, -INF).astype(dtype)}, {"bias": np.where(column, 0, -INF).astype(dtype)},
        {"mask": every | low, "bias": np.where(every | high, 0, -INF).astype(dtype)},
        {"mask": every | high, "kv_lengths": 50} if rows == list(range(L)) else {"mask": every, "softcap": 3.0},
    ]:
        check_empty((q, k, v), options, empty, told((q, k, v), options, seed))


@both_dtypes
@pytest.mark.parametrize("n", [1, 7, 8, 15, 16, 17, 31, 33, 48, 63, 64, 65, 127, 128, 149, 150])
def test_empty_rows_of_positions_and_lengths(n, dtype, seed):
    L, S = 150, 110
    q, k, v = inputs(generator(seed, n), (2,), 2, 1, L, S, 5, 4, dtype)
    first, last = range(n), range(L - n, L)
    for empty, options in [
        (first, {"causal": True, "query_offset": -n}),
        (first, {"window": (None, 3), "query_offset": -n - 3}),
        (first, {"window": (S + L, 0), "query_offset": -n}),
        (first, {"causal": True, "query_offset": -n, "sinks": np.array([1, -2], dtype)}),
        (last, {"window": (3, None), "query_offset": S - L + n + 3}),
        (last, {"window": (3, L), "query_offset": [S - L + n + 3] * 2}),
        (last, {"query_lengths": L - n}),
        (last, {"query_lengths": [L - n] * 2, "causal": True, "query_offset": 0}),
        (range(L), {"kv_lengths": 0}),
        (range(L), {"kv_lengths": 0, "causal": True}),
        (range(L), {"query_lengths": 0}),
        (range(L), {"causal": True, "query_offset": -L - n}),
        (range(L), {"window": (n, n), "query_offset": S + n}),
    ]:
        poisoned = q.copy()
        poisoned[:, :, list(empty)] = NAN
        check_empty((poisoned, k, v), options, empty, told((q, k, v), options, seed))


@both_dtypes
def test_empty_batches_among_full_ones(dtype, seed):
    q, k, v = inputs(generator(seed), (4,), 2, 1, 70, 110, 5, 4, dtype)
    for options in [{"kv_lengths": [0, 110, 0, 55]}, {"query_lengths": [70, 0, 0, 1]},
                    {"kv_lengths": [0, 1, 110, 0], "query_lengths": [70, 0, 70, 70], "causal": True}]:
        check((q, k, v), options, told((q, k, v), options, seed))


# --- the checks above must see wrong results ---

@pytest.mark.parametrize("damage", [
    lambda out, lse, problem: out.__setitem__((0, 1, 2), out[0, 1, 2] + 1e-4),
    lambda out, lse, problem: out.__setitem__((0, 1, 2), NAN),
    lambda out, lse, problem: lse.__setitem__((0, 1), lse[0, 1] + 1e-3),
    lambda out, lse, problem: problem.query.__setitem__((0, 0, 0), 0),
    lambda out, lse, problem: problem.bias.__setitem__((0, 0, 0), 0),
], ids=["out", "NaN", "lse", "query modified", "bias modified"])
def test_check_sees(damage, monkeypatch, seed):
    from fastattn import _runtime

    rng = generator(seed)
    arrays = inputs(rng, (), 1, 1, 5, 9, 4, 3, F32)
    options = {"bias": rng.standard_normal((1, 5, 9)).astype(F32)}
    check(arrays, options, {})
    right = _runtime.forward

    def wrong(problem):
        right(problem)
        lse = problem.lse if problem.lse is not None else np.zeros((1, 5))
        damage(problem.out, lse, copy.copy(problem))

    monkeypatch.setattr(_runtime, "forward", wrong)
    with pytest.raises(AssertionError, match="wrong|modified"):
        check(arrays, options, {})
