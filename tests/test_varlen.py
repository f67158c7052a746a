"""varlen_attention: each packed sequence has the bits of attention on it alone, whatever lies beside it.

A case is a list of (L, S), the queries and keys of each sequence.
"""

import re

import numpy as np
import pytest
from cases import assert_close, bound, exact, generator
from hypothesis import given
from hypothesis import strategies as st
from layouts import LAYOUTS, assert_same_bits
from test_memory import assert_survives, needs_mprotect

import fastattn as fa
from fastattn import checks, masks

NAN, INF = np.nan, np.inf
F32, F64 = np.float32, np.float64
H, Hkv, D, Dv = 4, 2, 12, 10

# Around the 64 rows and 96 keys of a tile; L < S, L > S, without rows, without keys, without both. 1 and 2 rows are few
# with every vector, 3 to 5 with some.
MIXED = [(5, 7), (0, 3), (1, 1), (64, 97), (3, 0), (65, 65), (0, 0), (130, 33), (33, 200), (2, 150), (4, 2)]

both_dtypes = pytest.mark.parametrize("dtype", [F32, F64], ids=["float32", "float64"])


def starts(lengths):
    """cu_seqlens_q and cu_seqlens_k."""
    sizes = np.array(lengths, np.int64).reshape(-1, 2)
    return (np.concatenate(([0], np.cumsum(sizes[:, axis]))) for axis in (0, 1))


def packed(rng, lengths, dtype, H=H, Hkv=Hkv, D=D, Dv=Dv):
    """query, key, value, cu_seqlens_q, cu_seqlens_k; among ordinary queries some with large scores."""
    cu_q, cu_k = starts(lengths)
    shapes = (cu_q[-1], H, D), (cu_k[-1], Hkv, D), (cu_k[-1], Hkv, Dv)
    query, key, value = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
    query[::7] *= 30
    return query, key, value, cu_q, cu_k


def longest(lengths):
    return tuple(max((n[axis] for n in lengths), default=0) for axis in (0, 1))


def alone(arguments, options, b):
    """The arguments of attention for sequence b: (query, key, value), options."""
    query, key, value, cu_q, cu_k = arguments
    rows, keys = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
    L, S = rows.stop - rows.start, keys.stop - keys.start
    part = dict(options)
    for name in "mask", "bias":
        if isinstance(part.get(name), np.ndarray):
            full = (len(cu_q) - 1, query.shape[1], np.diff(cu_q).max(), np.diff(cu_k).max())
            part[name] = np.broadcast_to(part[name], full)[b, :, :L, :S]
    for name in "query_offset", "query_lengths", "kv_lengths":
        if np.ndim(part.get(name)) == 1:
            part[name] = int(np.broadcast_to(part[name], len(cu_q) - 1)[b])
    return tuple(x.swapaxes(0, 1) for x in (query[rows], key[keys], value[keys])), part


def every_option(rng, lengths, dtype):
    """Options by name."""
    B, (L, S) = len(lengths), longest(lengths)
    each = [np.array([rng.integers(0, n[axis] + 1) for n in lengths], np.int64) for axis in (0, 1)]
    offset = rng.integers(-9, 60, B)
    mask, bias = rng.random((B, H, L, S)) < 0.6, rng.standard_normal((B, H, L, S)).astype(dtype)
    bias[rng.random(bias.shape) < 0.2] = -INF
    sinks = rng.standard_normal(H).astype(dtype)
    return {
        "none": {},
        "scale": {"scale": -0.3},
        "softcap": {"softcap": 4.0},
        "sinks": {"sinks": sinks},
        "causal": {"causal": True},
        "causal, one offset": {"causal": True, "query_offset": 2},
        "causal, top left": {"causal": True, "query_offset": 0},
        "causal, offsets": {"causal": True, "query_offset": offset},
        "window": {"window": (20, 3)},
        "left of window": {"window": (100, None), "query_offset": offset},
        "right of window": {"window": (None, 5)},
        "causal window": {"causal": True, "window": 30},
        "kv_lengths": {"kv_lengths": each[1]},
        "kv_lengths of 0": {"kv_lengths": 0, "sinks": sinks},
        "query_lengths": {"query_lengths": each[0]},
        "lengths, causal": {"query_lengths": each[0], "kv_lengths": each[1], "causal": True},
        "mask": {"mask": mask},
        "mask of keys": {"mask": mask[:, :1, :1]},
        "mask of rows": {"mask": mask[:1, :, :, :1]},
        "mask of two axes": {"mask": mask[0, 0], "causal": True},
        "bias": {"bias": bias},
        "bias of keys": {"bias": bias[0, 0, 0]},
        "bias of heads": {"bias": bias[0, :, :1], "window": (9, 9)},
        "expression": {"mask": masks.causal() & masks.window(40, 7)},
        "expression of steps": {"mask": masks.dilated(9, 4, dilation=3) | masks.causal(offset=-2)},
        "expression, lengths": {"mask": ~masks.window(3), "kv_lengths": each[1], "query_lengths": each[0]},
        "expression, window": {"mask": masks.causal(), "window": (64, 64), "bias": bias[:, :1]},
        "ALiBi": {"bias": fa.ALiBi(np.linspace(0.5, -0.1, H))},
        "ALiBi, causal": {"bias": fa.ALiBi(np.linspace(0.5, -0.1, H)), "causal": True, "kv_lengths": each[1]},
        "relative bias": {"bias": fa.RelativeBias(np.linspace(-2, 3, H * 9).reshape(H, 9)), "query_offset": offset},
        "all": {"mask": mask, "bias": bias, "causal": True, "window": 50, "query_offset": offset, "scale": 0.4,
                "kv_lengths": each[1], "query_lengths": each[0], "softcap": 20.0, "sinks": sinks},
    }


OPTIONS = list(every_option(np.random.default_rng(0), MIXED, F32))
each_option = pytest.mark.parametrize("name", OPTIONS)


def told(arguments, options, seed, **more):
    """The context of a failure: shapes, lengths and options, the arrays among them by shape."""
    options = {name: f"array{option.shape}" if isinstance(option, np.ndarray) and option.ndim > 1 else option
               for name, option in options.items()}
    lengths = list(zip(*(np.diff(cu).tolist() for cu in arguments[3:])))
    if len(lengths) > 20:
        lengths = f"{len(lengths)} sequences"
    return {"dtype": arguments[0].dtype, "shapes": [x.shape for x in arguments[:3]], "lengths": lengths,
            "options": options, **more, "seed": seed}


def check_bits(arguments, options, context, sequences=None, **more):
    """out and lse of each sequence have the bits of attention on it alone; inputs are not modified."""
    given_arrays = [x for x in (*arguments, *options.values()) if isinstance(x, np.ndarray)]
    before = [x.tobytes() for x in given_arrays]
    out, lse = fa.varlen_attention(*arguments, return_lse=True, **options, **more)
    assert [x.tobytes() for x in given_arrays] == before, f"{context}: an input was modified"
    query, value, cu_q = arguments[0], arguments[2], arguments[3]
    assert out.shape == (*query.shape[:2], value.shape[2]) and lse.shape == query.shape[:2], context
    for b in range(len(cu_q) - 1) if sequences is None else sequences:
        arrays, part = alone(arguments, options, b)
        for of, result, expected in zip(("out", "lse"), (out, lse), fa.attention(*arrays, return_lse=True, **part)):
            assert_same_bits(result[cu_q[b] : cu_q[b + 1]].swapaxes(0, 1), expected,
                             {**context, **more, "sequence": b, "result": of})
    return out, lse


def check_bound(arguments, options, context):
    """out and lse, of the kernel and of the reference, within the a-priori bound of each sequence."""
    results = {function: function(*arguments, return_lse=True, **options)
               for function in (fa.varlen_attention, fa.reference.varlen_attention)}
    cu_q = arguments[3]
    for b in range(len(cu_q) - 1):
        arrays, part = alone(arguments, options, b)
        true, allowed = exact(*arrays, **part), bound(*arrays, **part)
        for function, (out, lse) in results.items():
            rows = slice(cu_q[b], cu_q[b + 1])
            where = {**context, "sequence": b, "function": function.__module__}
            assert_close(out[rows].swapaxes(0, 1), true[0], allowed.out, {**where, "result": "out"})
            assert_close(lse[rows].swapaxes(0, 1), true[1], allowed.lse, {**where, "result": "lse"})


# --- the same bits as alone, and the right ones ---

@pytest.mark.compiled
@both_dtypes
@each_option
def test_bits_of_each_sequence_alone(name, dtype, seed):
    rng = generator(seed, name)
    arguments = packed(rng, MIXED, dtype)
    options = every_option(rng, MIXED, dtype)[name]
    for n in 1, 2:
        check_bits(arguments, options, told(arguments, options, seed), num_threads=n)


@both_dtypes
@each_option
def test_every_option_within_the_bound(name, dtype, seed):
    rng = generator(seed, name)
    arguments = packed(rng, MIXED, dtype)
    options = every_option(rng, MIXED, dtype)[name]
    check_bound(arguments, options, told(arguments, options, seed))


CASES = {
    "no sequences": [],
    "one": [(70, 100)],
    "one row": [(1, 1)],
    "one that is empty": [(0, 0)],
    "all empty": [(0, 0)] * 5,
    "no rows": [(0, 7), (0, 200)],
    "no keys": [(7, 0), (200, 0)],
    "first empty": [(0, 0), (0, 0), (70, 100), (3, 4)],
    "in the middle empty": [(70, 100), (0, 0), (0, 5), (5, 0), (3, 4)],
    "last empty": [(70, 100), (3, 4), (0, 5), (0, 0)],
    "first without keys": [(70, 0), (5, 5)],
    "last without keys": [(5, 5), (70, 0)],
    "many of one": [(1, 1)] * 300,
    "one row each": [(1, n) for n in range(0, 200, 7)],
    "one key each": [(n, 1) for n in range(0, 200, 7)],
    "all the same": [(64, 96)] * 4,
    "around a tile": [*zip([31, 32, 33, 63, 64, 65, 95, 96, 97], [191, 192, 193, 97, 96, 95, 1, 2, 3])],
    "one much longer": [(2, 3), (700, 650), (1, 5)],
}


@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_lengths(case, dtype, seed):
    rng = generator(seed, case)
    lengths = CASES[case]
    arguments = packed(rng, lengths, dtype)
    expression = masks.causal() & masks.window(100, 0)
    mask = rng.random((len(lengths), 1, *longest(lengths))) < 0.5
    for options in {}, {"causal": True}, {"mask": expression}, {"mask": mask, "window": (50, 10)}:
        for n in 1, 2, 3:
            check_bits(arguments, options, told(arguments, options, seed, case=case), num_threads=n)


@both_dtypes
@pytest.mark.parametrize("case", CASES)
def test_lengths_within_the_bound(case, dtype, seed):
    rng = generator(seed, case)
    lengths = [(min(L, 150), min(S, 150)) for L, S in CASES[case][:40]]  # the reference takes its time
    arguments = packed(rng, lengths, dtype)
    for options in {}, {"causal": True, "sinks": rng.standard_normal(H).astype(dtype)}:
        check_bound(arguments, options, told(arguments, options, seed, case=case))


@pytest.mark.compiled
@both_dtypes
def test_lognormal_lengths(dtype, seed):
    """As documents come: few are long. Enough work for every thread."""
    rng = generator(seed)
    lengths = [(n, n) for n in np.minimum(rng.lognormal(4, 1, 60), 1500).astype(int).tolist()]
    arguments = packed(rng, lengths, dtype, H=2, Hkv=1, D=32, Dv=32)
    for options in {}, {"causal": True}, {"mask": masks.causal() & masks.window(200, 0)}:
        for n in 1, 2, 5:
            check_bits(arguments, options, told(arguments, options, seed), num_threads=n)


@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("lengths", [[(700, 700)], [(300, 900), (500, 10)], [(129, 2000), (64, 2000), (1, 2000)]],
                         ids=str)
def test_blocks_of_few_sequences(lengths, dtype, seed):
    """One head: the blocks of rows become narrower, so that all threads have some."""
    arguments = packed(generator(seed, lengths), lengths, dtype, H=1, Hkv=1, D=40, Dv=40)
    for options in {}, {"causal": True}, {"window": (90, 30)}, {"mask": masks.causal()}:
        for n in 1, 2, 3, 5, 16:
            check_bits(arguments, options, told(arguments, options, seed), num_threads=n)


@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 3), (6, 2), (0, 0), (0, 1)], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1), (8, 17), (33, 0), (0, 5), (130, 16)], ids=str)
def test_heads_and_head_sizes(sizes, heads, dtype, seed):
    lengths = [(7, 9), (70, 100), (0, 4), (33, 97)]
    rng = generator(seed, sizes, heads)
    arguments = packed(rng, lengths, dtype, *heads, *sizes)
    for options in {}, {"causal": True, "sinks": rng.standard_normal(heads[0]).astype(dtype)}:
        check_bits(arguments, options, told(arguments, options, seed))


# --- layouts and results ---

@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, seed):
    rng = generator(seed)
    arguments = packed(rng, MIXED, dtype)
    for name in "none", "all", "expression":
        options = every_option(rng, MIXED, dtype)[name]
        out, lse = fa.varlen_attention(*arguments, return_lse=True, **options)
        context = told(arguments, options, seed, layout=layout)
        moved = {n: LAYOUTS[layout](o) if n in ("mask", "bias") and isinstance(o, np.ndarray) else o
                 for n, o in options.items()}
        arrays = [LAYOUTS[layout](x) for x in arguments[:3]]
        result = fa.varlen_attention(*arrays, *arguments[3:], return_lse=True, **moved)
        for actual, expected in zip(result, (out, lse)):
            assert_same_bits(actual, expected, context)
        if layout != "read-only":
            given_out = LAYOUTS[layout](np.full_like(out, NAN))
            assert fa.varlen_attention(*arguments, out=given_out, **options) is given_out
            assert_same_bits(given_out, out, {**context, "moved": "out"})


@pytest.mark.compiled
@both_dtypes
def test_slices_of_a_projection(dtype, seed):
    """query, key and value from one (T, 3, H, D), out in a slice of another array; what lies between is left alone."""
    rng = generator(seed)
    lengths = [(n, n) for n in (5, 70, 0, 1, 130)]
    cu = next(starts(lengths))
    projection = rng.standard_normal((cu[-1], 3, H, D)).astype(dtype)
    query, key, value = projection.swapaxes(0, 1)
    for options in {}, {"causal": True}, {"mask": masks.window(9)}:
        arguments = query, key, value, cu, cu
        expected, _ = check_bits(arguments, options, told(arguments, options, seed))
        memory = np.full((cu[-1] + 2, 2, H, D + 3), 7, dtype)
        out = memory[1:-1, 1, :, 1:-2]
        assert fa.varlen_attention(*arguments, out=out, **options) is out
        assert_same_bits(out, expected, told(arguments, options, seed, moved="out"))
        outside = np.ones(memory.shape, bool)
        outside[1:-1, 1, :, 1:-2] = False
        assert (memory[outside] == 7).all(), f"isa={fa.isa()}: written beside out"


def test_forms_of_the_arguments(seed):
    rng = generator(seed)
    lengths = [(3, 5), (0, 2), (70, 40)]
    arguments = packed(rng, lengths, F32)
    cu_q, cu_k = arguments[3:]
    out, lse = fa.varlen_attention(*arguments, return_lse=True, causal=True, kv_lengths=[5, 2, 40])
    assert out.ctypes.data % 64 == 0 and out.flags.c_contiguous and type(out) is np.ndarray
    options = {"causal": np.True_, "deterministic": True, "normalizer": "softmax", "dropout_p": 0, "seed": 3,
               "num_threads": np.int8(1)}
    for convert in [list, tuple, np.int32, np.uint8, np.uint64, memoryview, lambda cu: cu.astype(">i2"),
                    lambda cu: cu.repeat(2)[::2]]:
        result = fa.varlen_attention(*arguments[:3], convert(cu_q), convert(cu_k), return_lse=True, **options)
        np.testing.assert_array_equal(result[0], out)
        np.testing.assert_array_equal(result[1], lse)
    assert fa.varlen_attention(*(x.tolist() for x in arguments)).dtype == F64


def test_cumulative_lengths_are_copied():
    x = np.zeros((5, 1, 2), F32)
    cu = np.array([0, 2, 5])
    problem = checks.problem(x, x, x, packed=(cu, cu))
    cu[:] = 2**40
    assert problem.cu_q.tolist() == problem.cu_k.tolist() == [0, 2, 5]


# --- nothing of a neighbour counts ---

@pytest.mark.compiled
@both_dtypes
@pytest.mark.parametrize("poison", [NAN, INF])
@pytest.mark.parametrize("name", ["none", "causal", "window", "lengths, causal", "mask", "bias", "expression", "all"])
def test_neighbours_change_no_bit(name, poison, dtype, seed):
    """All rows and keys of the others, and what mask and bias hold for others or past a sequence's end."""
    rng = generator(seed, name)
    arguments = packed(rng, MIXED, dtype)
    options = every_option(rng, MIXED, dtype)[name]
    out, lse = fa.varlen_attention(*arguments, return_lse=True, **options)
    query, key, value, cu_q, cu_k = arguments
    for b, (L, S) in enumerate(MIXED):
        others = [np.ones(len(x), bool) for x in (query, key, value)]
        for other, cu in zip(others, (cu_q, cu_k, cu_k)):
            other[cu[b] : cu[b + 1]] = False
        spoiled = [np.where(other[:, None, None], dtype(poison), x) for other, x in zip(others, arguments)]
        changed = dict(options)
        inside = np.zeros((len(MIXED), 1, *longest(MIXED)), bool)
        inside[b, :, :L, :S] = True
        if isinstance(options.get("mask"), np.ndarray):
            changed["mask"] = options["mask"] | ~inside
        if "bias" in options:
            changed["bias"] = np.where(inside, options["bias"], dtype(poison))
        result = fa.varlen_attention(*spoiled, cu_q, cu_k, return_lse=True, **changed)
        for of, actual, expected in zip(("out", "lse"), result, (out, lse)):
            assert_same_bits(actual[cu_q[b] : cu_q[b + 1]], expected[cu_q[b] : cu_q[b + 1]],
                             told(arguments, options, seed, sequence=b, result=of, neighbours=poison))


@both_dtypes
def test_live_nan_stays_in_its_sequence(dtype, seed):
    rng = generator(seed)
    lengths = [(20, 30), (70, 100), (20, 30)]
    arguments = packed(rng, lengths, dtype)
    query, key, value, cu_q, cu_k = arguments
    value[cu_k[1] + 40, 0, 3] = NAN
    out = fa.varlen_attention(*arguments, causal=True)
    sees = np.zeros(len(query), bool)
    sees[cu_q[1] + 10 : cu_q[2]] = True  # row i of 70 sees key i + 30
    np.testing.assert_array_equal(np.isnan(out[..., 3]), sees[:, None] & (np.arange(H) < 2))
    assert not np.isnan(np.delete(out, 3, axis=2)).any()
    key[cu_k[1] + 40, 1, 0] = NAN
    out, lse = fa.varlen_attention(*arguments, causal=True, return_lse=True)
    np.testing.assert_array_equal(np.isnan(lse), sees[:, None] & (np.arange(H) >= 2))
    assert np.isnan(out[sees][:, 2:]).all()


# --- any sequences, any options ---

@st.composite
def calls(draw):
    """What to build a call from; the values come from `number`."""
    rows = st.sampled_from([0, 1, 2, 5, 15, 16, 17, 31, 33, 63, 64, 65, 100, 129])
    keys = st.sampled_from([0, 1, 2, 3, 7, 16, 33, 64, 95, 96, 97, 192, 200])
    lengths = draw(st.lists(st.tuples(rows, keys), max_size=6))
    B, (L, S) = len(lengths), longest(lengths)

    def maybe(strategy):
        return draw(st.none() | strategy)

    def each(strategies):
        return st.tuples(*strategies).map(list)

    offset = st.integers(-L - 3, S + 3)
    side = st.none() | st.integers(0, S + 3)
    left, right = draw(side), draw(side)
    expression = maybe(st.sampled_from([masks.causal(), masks.causal(3), ~masks.causal(), masks.window(9, 2),
                                        masks.dilated(3), masks.window(None, 5) & ~masks.window(1)]))
    form = st.tuples(st.sampled_from([1, B]), st.sampled_from([1, 2]), st.sampled_from([1, L]), st.sampled_from([1, S]))
    return {
        "lengths": lengths, "dtype": draw(st.sampled_from([F32, F64])), "number": draw(st.integers(0, 2**32 - 1)),
        "Hkv": draw(st.integers(1, 2)), "D": draw(st.sampled_from([1, 3, 8, 17])),
        "Dv": draw(st.sampled_from([0, 5, 16])),
        "mask": draw(form) if expression is None and draw(st.booleans()) else expression, "bias": maybe(form),
        "sinks": draw(st.booleans()), "layout": draw(st.sampled_from(list(LAYOUTS))),
        "threads": draw(st.integers(1, 3)),
        "options": {
            "causal": draw(st.booleans()), "window": maybe(st.just((left, right))),
            "query_offset": maybe(offset | st.lists(offset, min_size=B, max_size=B)),
            "query_lengths": maybe(each(st.integers(0, n) for n, _ in lengths)),
            "kv_lengths": maybe(each(st.integers(0, n) for _, n in lengths)),
            "softcap": maybe(st.just(5.0)), "scale": maybe(st.sampled_from([-0.5, 3.0, 0.0])),
        },
    }


@given(calls())
def test_any_sequences_and_options(seed, call):
    rng = generator(seed, call["number"])
    dtype, lengths = call["dtype"], call["lengths"]
    arguments = packed(rng, lengths, dtype, 2, call["Hkv"], call["D"], call["Dv"])
    options = {name: np.array(o, np.int64) if isinstance(o, list) else o
               for name, o in call["options"].items() if o is not None}
    for name, form in (("mask", call["mask"]), ("bias", call["bias"])):
        if isinstance(form, tuple):
            options[name] = rng.random(form) < 0.6 if name == "mask" else rng.standard_normal(form).astype(dtype)
        elif form is not None:
            options[name] = form
    if call["sinks"]:
        options["sinks"] = rng.standard_normal(2).astype(dtype)
    arguments = (*(LAYOUTS[call["layout"]](x) for x in arguments[:3]), *arguments[3:])
    context = told(arguments, options, seed, number=call["number"], layout=call["layout"])
    if fa.isa() != "reference":
        check_bits(arguments, options, context, num_threads=call["threads"])
    if call["number"] % 4 == 0 or fa.isa() == "reference":
        check_bound(arguments, options, context)


# --- bad arguments ---

def good():
    """The arguments that each case below spoils one of: sequences of (2, 4), (0, 1), (5, 3)."""
    rng = np.random.default_rng(0)
    query, key, value, cu_q, cu_k = packed(rng, [(2, 4), (0, 1), (5, 3)], F32)
    return {"query": query, "key": key, "value": value, "cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k,
            "out": np.full((7, H, Dv), NAN, F32)}


def sparse(*shape):
    return pytest.importorskip("scipy.sparse").csr_array(shape, dtype=np.bool_)


def share_memory(a):
    memory = np.zeros(a["value"].size + a["out"].size - 4, F32)
    a["value"] = memory[: a["value"].size].reshape(a["value"].shape)
    a["out"] = memory[-a["out"].size :].reshape(a["out"].shape)


T, V = TypeError, ValueError

# name of the case, what is wrong (options, or a function that spoils them), error, its whole message
BAD = [
    ("start", {"cu_seqlens_q": [1, 2, 2, 7]}, V, "cu_seqlens_q must start at 0, got 1"),
    ("negative start", {"cu_seqlens_k": [-1, 4, 5, 8]}, V, "cu_seqlens_k must start at 0, got -1"),
    ("decreasing", {"cu_seqlens_q": [0, 5, 2, 7]}, V,
     "cu_seqlens_q must not decrease, got 5 and then 2 at index 2"),
    ("decreasing at the end", {"cu_seqlens_k": [0, 4, 9, 8]}, V,
     "cu_seqlens_k must not decrease, got 9 and then 8 at index 3"),
    ("past 63 bits", {"cu_seqlens_k": np.array([0, 4, 2**64 - 2, 8], np.uint64)}, V,
     f"cu_seqlens_k must not decrease, got {2**64 - 2} and then 8 at index 3"),
    ("end of queries", {"cu_seqlens_q": [0, 2, 2, 6]}, V, "cu_seqlens_q must end at the 7 rows of query, got 6"),
    ("past the queries", {"cu_seqlens_q": [0, 2, 2, 8]}, V, "cu_seqlens_q must end at the 7 rows of query, got 8"),
    ("end of keys", {"cu_seqlens_k": [0, 4, 5, 9]}, V, "cu_seqlens_k must end at the 8 rows of key, got 9"),
    ("no sequence, but rows", {"cu_seqlens_q": [0], "cu_seqlens_k": [0]}, V,
     "cu_seqlens_q must end at the 7 rows of query, got 0"),
    ("float", {"cu_seqlens_q": np.array([0.0, 2, 2, 7])}, T, "cu_seqlens_q must be integers, got float64"),
    ("bool", {"cu_seqlens_q": np.array([False, True])}, T, "cu_seqlens_q must be integers, got bool"),
    ("objects", {"cu_seqlens_q": [0, 2, None, 7]}, T, "cu_seqlens_q must be integers, got object"),
    ("none", {"cu_seqlens_k": None}, T, "cu_seqlens_k must be an array, got NoneType"),
    ("masked", {"cu_seqlens_k": np.ma.masked_array([0, 4, 5, 8], mask=False)}, T,
     "cu_seqlens_k must be an array without a mask of its own, got a masked array"),
    ("scalar", {"cu_seqlens_q": 7}, V, r"cu_seqlens_q must have one axis of at least 1 value, got shape \(\)"),
    ("two axes", {"cu_seqlens_q": [[0, 2], [2, 7]]}, V,
     r"cu_seqlens_q must have one axis of at least 1 value, got shape \(2, 2\)"),
    ("empty", {"cu_seqlens_k": []}, V, r"cu_seqlens_k must have one axis of at least 1 value, got shape \(0,\)"),
    ("empty integers", {"cu_seqlens_k": np.zeros(0, int)}, V,
     r"cu_seqlens_k must have one axis of at least 1 value, got shape \(0,\)"),
    ("fewer sequences", {"cu_seqlens_k": [0, 4, 8]}, V,
     "cu_seqlens_k must have as many sequences as cu_seqlens_q with 3, got 2"),
    ("more sequences", {"cu_seqlens_k": [0, 4, 5, 8, 8]}, V,
     "cu_seqlens_k must have as many sequences as cu_seqlens_q with 3, got 4"),
    ("two axes of query", {"query": np.zeros((7, D), F32)}, V,
     r"query must have 3 axes \(T, H, D\), got shape \(7, 12\)"),
    ("four axes", {name: np.zeros((1, n, 1, D), F32) for name, n in (("query", 7), ("key", 8), ("value", 8))}, V,
     r"query must have 3 axes \(T, H, D\), got shape \(1, 7, 1, 12\)"),
    ("axes of key", {"key": np.zeros((1, 8, 2, D), F32)}, V,
     r"key must have as many axes as query of shape \(7, 4, 12\), got shape \(1, 8, 2, 12\)"),
    ("heads", {"query": np.zeros((7, 5, D), F32)}, V, "query must have a multiple of key's 2 heads, got 5"),
    ("heads of value", {"value": np.zeros((8, 1, Dv), F32)}, V, "value must have key's number of heads 2, got 1"),
    ("length of value", {"value": np.zeros((7, 2, Dv), F32)}, V, "value must have key's length 8, got 7"),
    ("head size", {"key": np.zeros((8, 2, 9), F32)}, V, "key must have query's head size 12, got 9"),
    ("dtype", {"key": np.zeros((8, 2, D))}, T,
     "key must have query's dtype float32, float16 or bfloat16, got float64"),
    ("plan", lambda a: a.update(mask=masks.causal().compile(5, 4)), T,
     "mask must be an expression or an array for packed sequences, got Plan"),
    ("sparse mask", lambda a: a.update(mask=sparse(5, 4)), T,
     "mask must be an expression or an array for packed sequences, got csr_array"),
    ("expression of one length", {"mask": masks.documents([0, 0, 1, 1, 1])}, V,
     "ids of documents must have one id for each of 2 positions, got 5"),
    ("expression of a batch", {"mask": masks.lengths([0, 1, 0])}, V,
     r"mask must have no leading axes for packed sequences, got \(3, 1\)"),
    ("mask of packed rows", {"mask": np.ones((7, 8), bool)}, V,
     r"mask must broadcast to \(..., H, L, S\) = \(3, 4, 5, 4\), got shape \(7, 8\)"),
    ("mask of fewer sequences", {"mask": np.ones((2, 1, 5, 4), bool)}, V,
     r"mask must broadcast to \(..., H, L, S\) = \(3, 4, 5, 4\), got shape \(2, 1, 5, 4\)"),
    ("bias", {"bias": np.ones((4, 4, 4), F32)}, V,
     r"bias must broadcast to \(..., H, L, S\) = \(3, 4, 5, 4\), got shape \(4, 4, 4\)"),
    ("kv_lengths", {"kv_lengths": [4, 0, 4]}, V, r"kv_lengths must lie in \[0, 3\] for sequence 2, got 4"),
    ("one kv_lengths", {"kv_lengths": 2}, V, r"kv_lengths must lie in \[0, 1\] for sequence 1, got 2"),
    ("kv_lengths past all", {"kv_lengths": [5, 0, 0]}, V, r"kv_lengths must lie in \[0, 4\], got 5 at index \(0,\)"),
    ("query_lengths", {"query_lengths": [2, 1, 5]}, V, r"query_lengths must lie in \[0, 0\] for sequence 1, got 1"),
    ("negative lengths", {"query_lengths": [2, 0, -1]}, V,
     r"query_lengths must lie in \[0, 5\], got -1 at index \(2,\)"),
    ("number of lengths", {"kv_lengths": [4, 1]}, V,
     r"kv_lengths must broadcast to the leading axes \(3,\), got shape \(2,\)"),
    ("number of offsets", {"query_offset": [0] * 7, "causal": True}, V,
     r"query_offset must broadcast to the leading axes \(3,\), got shape \(7,\)"),
    ("sinks", {"sinks": np.zeros(7, F32)}, V, r"sinks must have shape \(4,\), one for each head of query, got \(7,\)"),
    ("out with heads first", {"out": np.zeros((H, 7, Dv), F32)}, V,
     r"out must have shape \(7, 4, 10\), got \(4, 7, 10\)"),
    ("out of another dtype", {"out": np.zeros((7, H, Dv))}, V, "out must have query's dtype float32, got float64"),
    ("out repeats itself", {"out": np.lib.stride_tricks.as_strided(np.zeros((7, H, Dv), F32), strides=(0, 40, 4))}, V,
     r"out must not overlap itself, got strides \(0, 40, 4\) for shape \(7, 4, 10\)"),
    ("out on value", share_memory, V, "out must not overlap the inputs, got memory shared with value"),
    ("dropout", {"dropout_p": 1.0}, V, r"dropout_p must lie in \[0, 1\), got 1.0"),
]


@pytest.mark.parametrize("function", [fa.varlen_attention, fa.reference.varlen_attention], ids=["kernel", "reference"])
@pytest.mark.parametrize("spoil, error, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_argument(function, spoil, error, message):
    arguments = good()
    function(**arguments)  # the spoilt argument is the reason
    arguments["out"][...] = NAN
    if callable(spoil):
        spoil(arguments)
    else:
        arguments |= spoil
    before = {name: np.array(value, copy=True) for name, value in arguments.items() if isinstance(value, np.ndarray)}
    with pytest.raises(error) as caught:
        function(**arguments)
    assert caught.type is error and re.fullmatch(message, str(caught.value)), str(caught.value)
    for name, value in before.items():
        np.testing.assert_array_equal(arguments[name], value, err_msg=f"{name} was modified")


# --- memory ---

GUARDED = """
from fastattn import masks

def sizes():
    rows = rng.choice([0, 1, 2, 15, 16, 17, 31, 33, 64, 65, 100, 130], 3)
    keys = rng.choice([0, 1, 2, 7, 16, 33, 95, 96, 97, 150, 200], 3)
    return rows.tolist(), keys.tolist()

POOL, BOOLS = (np.tile(pool, 2) for pool in (POOL, BOOLS))
for D, Dv in itertools.product([1, 3, 16, 19, 33], [1, 8, 17]):
    for order in "CF":
        for _ in range(20):
            rows, keys = sizes()
            cu_q, cu_k = np.cumsum([0, *rows]), np.cumsum([0, *keys])
            L, S = max(rows), max(keys)
            case(rows=rows, keys=keys, D=D, Dv=Dv, order=order)
            q = flush("query", some(cu_q[-1], 2, D), order)
            k = flush("key", some(cu_k[-1], 1, D), order)
            v = flush("value", some(cu_k[-1], 1, Dv), order)
            out = place("out", (cu_q[-1], 2, Dv), dtype, order)
            form = [(3, 1, L, S), (2, L, S), (3, 2, 1, S), (L, 1)][rng.integers(4)]
            mask = flush("mask", some(*form, pool=BOOLS), order)
            bias = flush("bias", some(*[(2, 1, S), (2, L, S)][rng.integers(2)]), order)
            fa.varlen_attention(q, k, v, cu_q, cu_k, out=out)
            fa.varlen_attention(q, k, v, cu_q, cu_k, out=out, causal=True, return_lse=True)
            fa.varlen_attention(q, k, v, cu_q, cu_k, out=out, mask=mask, return_lse=True, sinks=flush("sinks", some(2)))
            fa.varlen_attention(q, k, v, cu_q, cu_k, bias=bias, window=(9, 3), softcap=4.0, return_lse=True)
            fa.varlen_attention(q, k, v, cu_q, cu_k, out=out, mask=masks.causal() & masks.window(70), return_lse=True,
                                kv_lengths=[n - n // 3 for n in keys], query_lengths=[n - n // 4 for n in rows])
            if len(v):
                v[len(v) // 2, 0, 0] = np.nan
                fa.varlen_attention(q, k, v, cu_q, cu_k, out=out, mask=mask, bias=bias)
"""


@needs_mprotect
@pytest.mark.compiled
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("side", ["begin", "end"])
def test_nothing_outside_the_arrays_is_touched(side, dtype, tmp_path, seed):
    assert_survives(tmp_path, GUARDED, seed, side, dtype)


@needs_mprotect
@pytest.mark.compiled
def test_guards_see_a_row_too_many(tmp_path, seed):
    stray = """
q = flush("query", some(5, 1, 3))
p = checks.problem(q, q, q, packed=([0, 2, 5], [0, 2, 5]))
p.cu_k[-1] = 70
p.S = 68
case(here="before")
_runtime.forward(p)
case(here="after")
"""
    with pytest.raises(AssertionError, match="touched memory outside an array at {'here': 'before'}"):
        assert_survives(tmp_path, stray, seed, "end", "float32")


# --- the checks above can fail ---

def test_the_comparison_sees_a_wrong_sequence(monkeypatch, seed):
    """A sequence that reads its neighbour's key, or writes one row too few."""
    lengths = [(5, 7), (70, 100), (3, 4)]
    arguments = packed(generator(seed), lengths, F32)
    right = fa.varlen_attention

    def shifted(query, key, value, cu_q, cu_k, **options):
        return right(query, key, value, cu_q, cu_k + np.array([0, 1, 0, 0]), **options)

    def short(*arguments, **options):
        out, lse = right(*arguments, **options)
        out[74] = 0
        return out, lse

    for wrong in shifted, short:
        monkeypatch.setattr(fa, "varlen_attention", wrong)
        with pytest.raises(AssertionError, match="sequence"):
            check_bits(arguments, {}, {})
        with pytest.raises(AssertionError, match="sequence"):
            check_bound(arguments, {}, {})
