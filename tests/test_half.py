"""float16 and bfloat16: exact widening, float32 inside, one rounding of the result; with float32 queries as well.

The bits within each path are for test_paths.py, the errors for test_checks.py.
"""

import math

import numpy as np
import pytest
import test_varlen
from cases import DIGITS, PAIRS_ISA, assert_close, bound, exact, few_rows, generator, inputs, ulp
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import LAYOUTS, assert_same_bits
from test_attention import (
    LENGTHS,
    build,
    check,
    choices,
    options_alone,
    restrictions,
    told,
)

import fastattn as fa
from fastattn import checks, masks, reference

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered")  # of ml_dtypes on signalling NaN

NAN, INF = np.nan, np.inf
F32 = np.float32

# dtype of the queries, and of keys and values
KINDS = [("float16", "float16"), ("bfloat16", "bfloat16"), ("float32", "float16"), ("float32", "bfloat16")]

each_kind = pytest.mark.parametrize("kind", KINDS, ids=", ".join)
each_half = pytest.mark.parametrize("name", ["float16", "bfloat16"])


def dtype_of(name):
    """bfloat16 needs ml_dtypes."""
    if name == "bfloat16":
        return np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
    return np.dtype(name)


def arrays_of(rng, kind, lead, H, Hkv, L, S, D, Dv):
    of_query, of_key = (dtype_of(name) for name in kind)
    q, k, v = inputs(rng, lead, H, Hkv, L, S, D, Dv)
    return q.astype(of_query), k.astype(of_key), v.astype(of_key)


def narrowed(options, dtype):
    """The options with a bias and sinks of this dtype; what is finite stays so."""
    if dtype == F32:
        return options
    digits, smallest = DIGITS[dtype.name]
    largest = math.ldexp(2 - 2.0 ** (1 - digits), 1 - smallest)
    options = dict(options)
    for name in "bias", "sinks":
        if isinstance(options.get(name), np.ndarray):
            array = options[name]
            options[name] = np.where(np.isinf(array), array, np.clip(array, -largest, largest)).astype(dtype)
    return options


def every_number(dtype):
    """All 65536 values of a 16-bit dtype."""
    return np.arange(2**16, dtype=np.uint16).view(dtype)


# --- shapes and options ---

@each_kind
@pytest.mark.parametrize("L", [1, 2, 4, 5, 8, 9, 17, 32, 33, 64, 65, 97, 130])
def test_lengths(L, kind, seed):
    for S in LENGTHS:
        rng = generator(seed, kind, L, S)
        D, Dv = (int(n) for n in rng.integers(1, 24, 2))
        arrays = arrays_of(rng, kind, (), 1, 1, L, S, D, Dv)
        for options in {}, {"causal": True}:
            check(arrays, options, told(arrays, options, seed))


@each_kind
@pytest.mark.parametrize("D", [*range(19), 31, 32, 33, 40, 63, 64, 65, 96, 127, 128, 130, 256, 257, 300])
def test_head_sizes(D, kind, seed):
    few = few_rows(D, *map(dtype_of, kind))
    for L, S, Dv in [(5, 7, D), (1, 130, D), (few, 103, D), (few + 1, 95, D), (3, 97, 300 - D), (67, 100, 300 - D)]:
        arrays = arrays_of(generator(seed, kind, D, L), kind, (), 2, 1, L, S, D, Dv)
        check(arrays, {}, told(arrays, {}, seed))


@each_kind
@pytest.mark.parametrize("wide", [False, True], ids=["bias of its dtype", "float32 bias"])
@pytest.mark.parametrize("D, S", [(64, 100), (8, 130)])
def test_each_option_alone(D, S, wide, kind, seed):
    B, H, L = 2, 2, few_rows(D, *map(dtype_of, kind)) if D == 64 else 47
    rng = generator(seed, kind, D, S)
    arrays = arrays_of(rng, kind, (B,), H, 1, L, S, D, 9)
    for number, options in enumerate(options_alone(rng, B, H, L, S, F32)):
        if wide and not {"bias", "sinks"} & set(options):
            continue
        options = narrowed(options, np.dtype(F32) if wide else arrays[0].dtype)
        check(arrays, options, told(arrays, options, seed, number=number))


EXPRESSIONS = {
    "causal": masks.causal(),
    "window": masks.window(20, 5),
    "both": masks.causal() & masks.window(9),
    "dilated": masks.dilated(9, 4, dilation=3) | masks.causal(offset=-2),
    "not": ~masks.window(3),
}


@st.composite
def calls(draw):
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 1)]))
    Hkv, group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 1, 2, 3, 8]))
    L = draw(st.sampled_from([1, 1, 2, 3, 4, 8, 9, 12, 24, 33, 64, 65, 100, 0]))
    S = draw(st.sampled_from([0, *LENGTHS, 300]))
    D, Dv = (draw(st.sampled_from([1, 8, 0, 2, 3, 16, 17, 33, 64, 40])) for _ in range(2))
    choice = draw(choices(Hkv * group, L, S, lead))
    choice["expression"] = draw(st.none() | st.sampled_from(list(EXPRESSIONS)))
    choice["object"] = draw(st.none() | st.sampled_from(["ALiBi", "RelativeBias"]))
    choice["layouts"] = [draw(st.sampled_from(list(LAYOUTS))) for _ in range(4)]
    choice["wide"] = draw(st.booleans())
    return lead, Hkv * group, Hkv, L, S, D, Dv, draw(st.integers(0, 2**32 - 1)), choice


@each_kind
@settings(max_examples=120)
@given(calls())
def test_options_together(seed, kind, call):
    lead, H, Hkv, L, S, D, Dv, number, choice = call
    rng = generator(seed, kind, number)
    arrays = arrays_of(rng, kind, lead, H, Hkv, L, S, D, Dv)
    options = build(rng, choice, F32, lead, math.prod(lead), H, L, S)
    if choice["expression"] and "mask" not in options:
        options["mask"] = EXPRESSIONS[choice["expression"]]
    if choice["object"] and "bias" not in options:
        options["bias"] = (fa.ALiBi(rng.random(H)) if choice["object"] == "ALiBi"
                           else fa.RelativeBias(rng.standard_normal((H, 9))))
    options = narrowed(options, np.dtype(F32) if choice["wide"] else arrays[0].dtype)
    *arrays, out = (LAYOUTS[layout](array) for layout, array in zip(
        choice["layouts"], [*arrays, np.empty((*lead, H, L, Dv), arrays[0].dtype)]))
    context = told(arrays, options, seed, number=number, layouts=choice["layouts"])
    result, lse = check(arrays, options, context, out if out.flags.writeable else None)
    again = fa.attention(*arrays, return_lse=True, num_threads=1, **options)
    for name, now, before in zip(("out", "lse"), again, (result, lse)):
        known = ~np.isnan(before)
        if fa.isa() != "reference":
            assert_same_bits(now[known], before[known], {**context, "call": "again", "result": name})


VARLEN = list(test_varlen.every_option(np.random.default_rng(0), test_varlen.MIXED, F32))


@each_kind
@pytest.mark.parametrize("name", VARLEN)
def test_packed_sequences(name, kind, seed):
    """Of few and of many rows, side by side: the bits of each alone, and the right ones."""
    lengths = test_varlen.MIXED
    rng = generator(seed, kind, name)
    of_query, of_key = (dtype_of(n) for n in kind)
    query, key, value, *cu = test_varlen.packed(rng, lengths, F32)
    arguments = query.astype(of_query), key.astype(of_key), value.astype(of_key), *cu
    options = narrowed(test_varlen.every_option(rng, lengths, F32)[name], of_query)
    context = test_varlen.told(arguments, options, seed)
    test_varlen.check_bound(arguments, options, context)
    if fa.isa() != "reference":
        for n in 1, 2:
            out, lse = test_varlen.check_bits(arguments, options, context, num_threads=n)
            assert out.dtype == of_query and lse.dtype == F32


@each_kind
@pytest.mark.parametrize("n", [1, 30, 33, 100])
def test_weights_are_float32(n, kind, seed):
    """attention_weights widens 16-bit arrays, and has the bits of the same call in float32."""
    rng = generator(seed, kind, n)
    q, k, _ = arrays_of(rng, kind, (2,), 4, 2, n, 130, 16, 1)
    bias = rng.standard_normal((n, 130)).astype(q.dtype)
    for reduce in None, "sum", "max", "entropy", ("top_k", 3):
        for options in {}, {"causal": True, "softcap": 5.0}, {"bias": bias, "sinks": np.ones(4, q.dtype)}:
            widened = {name: o.astype(F32) if isinstance(o, np.ndarray) else o for name, o in options.items()}
            result = fa.attention_weights(q, k, reduce=reduce, **options)
            expected = fa.attention_weights(q.astype(F32), k.astype(F32), reduce=reduce, **widened)
            context = {"kind": kind, "L": n, "reduce": reduce, "options": list(options), "seed": seed}
            for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (result, expected))):
                assert one.dtype == other.dtype and one.dtype in (F32, np.int64)
                assert_same_bits(one, other, context)


# --- accuracy ---

@each_kind
def test_bound_is_about_an_ulp(kind, seed):
    """What the bound of cases.py allows on ordinary inputs: an ulp of the output at sum p|v|. Weights that are rounded
    to bfloat16 make it two, as in any implementation that feeds them to such instructions."""
    for D, S in [(8, 5), (64, 64), (64, 300), (128, 1000)]:
        for L in few_rows(D, *map(dtype_of, kind)), 70:
            arrays = arrays_of(generator(seed, kind, L, D, S), kind, (), 2, 2, L, S, D, D)
            for options in {}, {"causal": True}:
                allowed = bound(*arrays, **options)
                size = np.maximum(allowed.magnitude, 2.0**-14)
                if kind[0] == "float32":
                    assert (allowed.out <= 2.0**-12 * size).all()
                    continue
                pairs = fa.isa() == PAIRS_ISA and kind[0] == "bfloat16" and L == 70
                assert (allowed.out <= (2 + 2.0**-5 if pairs else 1) * ulp(size, kind[0])).all()


@each_kind
def test_rounds_to_nearest(kind, seed):
    """A result in 16 bits is the nearest number, ties to even, of what the same call in float32 gives."""
    for L in few_rows(15, *map(dtype_of, kind)), 50:
        arrays = arrays_of(generator(seed, kind, L), kind, (), 2, 1, L, 150, 15, 33)  # 15: no pairs
        out, lse = fa.attention(*arrays, return_lse=True)
        wide, wide_lse = fa.attention(*(x.astype(F32) for x in arrays), return_lse=True)
        context = told(arrays, {}, seed)
        if fa.isa() == "reference":
            assert (abs(out.astype(F32) - wide) <= ulp(wide, kind[1])).all()
            continue
        assert_same_bits(out, wide.astype(out.dtype), context)
        assert_same_bits(lse, wide_lse, context)


# --- every number ---

@each_kind
@pytest.mark.parametrize("L", [1, 4, 41])
@pytest.mark.parametrize("layout", ["contiguous", "columns first", "step 2"])
def test_every_number_as_value(layout, L, kind):
    """With one key to see, out is its value, bit for bit; NaN stays NaN. Rows are of several widths."""
    of_query, of_key = (dtype_of(name) for name in kind)
    numbers = every_number(of_key)
    for D, Dv, hidden in [(3, 2**10, 0), (3, 2**16 // 77, 5), (4, 2**16 // 31, 0), (4, 2**9, 5)]:
        pairs = fa.isa() == PAIRS_ISA and kind[0] == "bfloat16" and D % 2 == 0 and few_rows(D, *kind) < L
        value = np.resize(numbers, (-(-(2**16) // Dv), 1, Dv))
        B, S = len(value), 1 + hidden
        padded = np.full((B, S, Dv), NAN).astype(of_key)
        padded[:, :1] = value
        q, k = np.ones((B, L, D), of_query), np.ones((B, S, D), of_key)
        mask = np.arange(S) < 1
        for options in {"kv_lengths": 1}, {"mask": mask}:
            if options.get("kv_lengths"):
                out = np.stack([fa.attention(q[b], k[b], LAYOUTS[layout](padded[b]), **options)
                                for b in range(0, B, 7)])
                expected = np.broadcast_to(value[::7], out.shape)
            else:
                out = fa.attention(q[:, None], k[:, None], LAYOUTS[layout](padded[:, None]), **options)[:, 0]
                expected = np.broadcast_to(value, out.shape)
            context = {"kind": kind, "L": L, "layout": layout, "D": D, "Dv": Dv, "options": list(options)}
            lost = np.isnan(expected)
            if pairs:  # a denormal number counts as 0
                small = abs(expected.astype(F32)) < 2.0**-126
                assert (out[small] == 0).all(), context
                lost |= small
            else:
                # -0 comes back as 0 + 1 (-0) = 0.
                lost |= expected == 0
                assert (out[expected == 0] == 0).all(), context
            assert np.isnan(out[np.isnan(expected)]).all(), context
            assert_same_bits(out[~lost], expected[~lost].astype(out.dtype), context)


@each_kind
@pytest.mark.parametrize("L", [1, 8, 41])
def test_every_number_as_key_and_query(L, kind):
    """A one-hot query picks one element of the key: lse is it, exactly."""
    of_query, of_key = (dtype_of(name) for name in kind)
    for D in 9, 64:
        for dtype, role in (of_key, "key"), (of_query, "query"):
            if dtype == F32:
                continue
            numbers = np.resize(every_number(dtype), (-(-(2**16) // D), D))
            numbers[~np.isfinite(numbers)] = 0  # 0 times these is NaN
            hot = np.eye(D)
            for d in range(0, D, 5):
                if role == "key":
                    q = np.broadcast_to(hot[d], (len(numbers), L, D)).astype(of_query)
                    k = numbers[:, None]
                else:
                    q = np.broadcast_to(numbers[:, None], (len(numbers), L, D))
                    k = np.broadcast_to(hot[d], (len(numbers), 1, D)).astype(of_key)
                v = np.ones((len(numbers), 1, 1), of_key)
                out, lse = fa.attention(q[:, None], k[:, None], v[:, None], scale=1.0, return_lse=True)
                expected = numbers[:, d].astype(F32)
                if fa.isa() == PAIRS_ISA and kind[0] == "bfloat16" and D % 2 == 0 and few_rows(D, *kind) < L:
                    expected = np.where(abs(expected) < 2.0**-126, 0, expected)
                context = {"kind": kind, "L": L, "D": D, "d": d, "role": role}
                exact_lse = np.broadcast_to(expected[:, None, None], lse.shape)
                assert_close(lse, exact_lse, 2.0**-23 * abs(exact_lse) + 2.0**-149, context)
                assert (out == 1).all(), context


@each_half
@pytest.mark.parametrize("L", [3, 50])
def test_every_number_as_bias(name, L):
    """Added to a score of 0, lse is it; -inf hides the key, NaN stays NaN."""
    dtype = dtype_of(name)
    bias = every_number(dtype).reshape(-1, 1, 1, 1)
    q, k, v = (np.zeros((len(bias), 1, n, 4), dtype) for n in (L, 1, 1))
    for layout in "contiguous", "step 2":
        given_bias = np.broadcast_to(LAYOUTS[layout](bias), (len(bias), 1, L, 1))
        lse = fa.attention(q, k, v, bias=given_bias, return_lse=True)[1]
        expected = np.broadcast_to(bias[..., 0], lse.shape).astype(F32)
        expected[expected == INF] = NAN
        assert_close(lse, expected, 2.0**-23 * abs(expected) + 2.0**-149, {"dtype": name, "L": L, "layout": layout})


@each_half
@pytest.mark.parametrize("L", [1, 41])
def test_results_round_as_numpy_does(name, L):
    """Means of pairs of neighbours, near ties and at the border of the denormal numbers: nearest, ties to even."""
    dtype = dtype_of(name)
    numbers = every_number(dtype)[: 2**15]
    numbers = numbers[np.isfinite(numbers)].astype(F32)
    if name == "bfloat16":
        numbers = numbers[(numbers > 1e-30) & (numbers < 1e30)]
    # 0.5 a + 0.5 b is exact in float32; out is its nearest 16-bit number.
    a, b = numbers[:-1], numbers[1:]
    value = np.stack([a, b]).astype(dtype)
    q, k = np.zeros((L, 3), dtype), np.zeros((2, 3), dtype)
    expected = ((a.astype(F32) + b) / 2).astype(dtype)
    for sign in 1, -1:
        out = fa.attention(q, k, (sign * value).astype(dtype))
        assert_same_bits(out, np.broadcast_to((sign * expected).astype(dtype), out.shape), {"dtype": name, "L": L})


# --- the ends of the range ---

@each_kind
@pytest.mark.parametrize("L", [1, 4, 12, 70])
def test_denormal_numbers(L, kind, seed):
    """Queries, keys and values among which many are denormal, and scales that bring the scores back."""
    rng = generator(seed, kind, L)
    of_query, of_key = (dtype_of(name) for name in kind)
    smallest = 2.0 ** DIGITS[kind[1]][1]
    for D in 8, 9, 64:
        q, k, v = inputs(rng, (), 2, 1, L, 130, D, 10)
        for size in (q, smallest * k, smallest * v), (smallest * q, k, v), (q, k, smallest * v * 2.0**-4):
            arrays = size[0].astype(of_query), size[1].astype(of_key), size[2].astype(of_key)
            for scale in None, (1 / smallest if smallest > 1e-30 else 1e29):
                options = {} if scale is None else {"scale": scale}
                check(arrays, options, told(arrays, options, seed, D=D))


@each_kind
@pytest.mark.parametrize("L", [1, 50])
def test_largest_numbers(L, kind, seed):
    """Values at the end of float16's range do not overflow on the way; those of bfloat16 stop short of float32's."""
    rng = generator(seed, kind, L)
    of_query, of_key = (dtype_of(name) for name in kind)
    digits, smallest = DIGITS[kind[1]]
    largest = math.ldexp(2 - 2.0 ** (1 - digits), 1 - smallest)
    q, k, v = inputs(rng, (), 2, 1, L, 130, 8, 9)
    v = np.where(rng.random(v.shape) < 0.5, largest, -largest) if kind[1] == "float16" else v * 1e34
    for options in {}, {"causal": True}:
        arrays = q.astype(of_query), k.astype(of_key), v.astype(of_key)
        result, _ = check(arrays, options, told(arrays, options, seed))
        assert not np.isnan(result).any()
    if kind[0] == "float16":
        arrays = arrays[0], arrays[1], np.full_like(arrays[2], largest)
        assert (fa.attention(*arrays).astype(np.float64) == largest).all()


@each_kind
@pytest.mark.parametrize("form", ["plain", "causal", "mask", "bias", "columns first"])
def test_live_nan_and_inf_propagate(form, kind, seed):
    """One poisoned element a batch, for few rows and for many."""
    D, Dv = 2, 3
    for L, S in [(3, 1), (3, 2), (3, 97), (3, 100), (50, 5), (50, 96), (50, 101), (45, 193)]:
        rng = generator(seed, kind, form, L, S)
        targets = ["query", "key", "value"] + ["bias"] * (form == "bias")
        cases = [(place, target) for place in sorted({0, S // 2, S - 1}) for target in targets]
        q, k, v = arrays_of(rng, kind, (len(cases),), 1, 1, L, S, D, Dv)
        options = {}
        if form == "causal":
            options["causal"] = True
        if form == "mask":
            options["mask"] = rng.random((L, S)) < 0.7
        if form == "bias":
            options["bias"] = rng.standard_normal((len(cases), 1, L, S)).astype(q.dtype)
        arrays = {"query": q, "key": k, "value": v, "bias": options.get("bias")}
        for b, (place, target) in enumerate(cases):
            row = place % L if target in ("query", "bias") else place
            arrays[target][b, 0, row, place if target == "bias" else place % 2] = [NAN, INF, -INF][(place + S) % 3]
        if form == "columns first":
            q, k, v = (LAYOUTS[form](array) for array in (q, k, v))
        check((q, k, v), options, told((q, k, v), options, seed, form=form, poisoned=cases))


@pytest.mark.compiled
@each_kind
@pytest.mark.parametrize("layout", ["contiguous", "columns first"])
@pytest.mark.parametrize("hide", restrictions(np.random.default_rng(0), 2, 1, 1, 200, F32))
def test_hidden_nan_and_inf_change_no_bit(hide, layout, kind, seed):
    """At every ninth key and value, and at the one beside it: rows that see neither keep their bits."""
    B, H, S, D, Dv = 2, 1, 200, 64, 4
    for L in few_rows(D, *map(dtype_of, kind)), 50:
        rng = generator(seed, hide, layout, L)
        q, k, v = arrays_of(rng, kind, (B,), H, H, L, S, D, Dv)
        options = narrowed(restrictions(rng, B, H, L, S, F32)[hide], q.dtype)
        k, v = LAYOUTS[layout](k), LAYOUTS[layout](v)
        clean = fa.attention(q, k, v, return_lse=True, **options)
        problem = checks.problem(q, k, v, **options)
        visible = np.stack([[reference.logits(problem, b, (b, h), (b, h), np.float64)[1] for h in range(H)]
                            for b in range(B)])
        for j in range(0, S - 1, 9):
            hidden = ~visible[..., j : j + 2].any(axis=-1)
            for name, array, bad in [("key", k, NAN), ("key", k, INF), ("value", v, NAN), ("value", v, -INF)]:
                saved = array[:, :, j : j + 2].copy()
                array[:, :, j : j + 2] = bad
                result = fa.attention(q, k, v, return_lse=True, **options)
                array[:, :, j : j + 2] = saved
                context = told((q, k, v), options, seed, hide=hide, layout=layout, position=j, poison=bad, name=name)
                for now, before in zip(result, clean):
                    assert_same_bits(now[hidden], before[hidden], context)


# --- the reference ---

@each_kind
def test_reference(kind, seed):
    """Computed in float64 and rounded once: half an ulp (bfloat16 comes by way of float32)."""
    for L in 3, 50:
        arrays = arrays_of(generator(seed, kind, L), kind, (2,), 2, 1, L, 50, 8, 9)
        out, lse = reference.attention(*arrays, return_lse=True, causal=True)
        true = exact(*arrays, causal=True)
        assert out.dtype == arrays[0].dtype and lse.dtype == F32
        spacing = 2.0**-23 * abs(true[0]) if kind[0] == "float32" else ulp(true[0], kind[0])
        assert_close(out, true[0], 0.5001 * spacing, told(arrays, {}, seed))


@each_half
def test_ulp(name):
    """The spacing is the distance to the next number, from every number."""
    dtype = dtype_of(name)
    numbers = every_number(dtype)[: 2**15]
    numbers = numbers[np.isfinite(numbers)].astype(np.float64)
    assert (ulp(numbers[:-1], dtype) == np.diff(numbers)).all()
    assert (ulp(-numbers[:-1], dtype) == np.diff(numbers)).all()
