"""For one instruction set the bits of a row depend on its query, on the keys and values it sees and on the options.

They do not depend on the number of threads, the batch, the heads, strides, masked padding, or the other rows. Few
rows go another path, with bits of their own (test_paths.py); `ONE_PATH` makes them agree with those of more rows.
"""

import functools
import zlib

import numpy as np
import pytest
from cases import inputs
from layouts import BROADCASTS, LAYOUTS, assert_same_bits

import fastattn as fa

pytestmark = pytest.mark.compiled  # NumPy's matrix product makes no such promise

NAN, INF = np.nan, np.inf
B, H, Hkv, L, S, D, Dv = 2, 4, 2, 150, 300, 12, 10
ONE_PATH = {"deterministic": "row"}

both_dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64], ids=["float32", "float64"])


def arrays_of(rng, dtype, B=B, H=H, Hkv=Hkv, L=L, S=S, D=D, Dv=Dv):
    """Ordinary queries among some whose scores are large: rows of a tile whose running maximum rises at other keys."""
    q, k, v = inputs(rng, (B,), H, Hkv, L, S, D, Dv, dtype)
    q[..., ::7, :] *= 30
    q[..., 3::11, :] *= 1e-3
    k[..., 200:, :] *= 2
    return q, k, v


def every_option(rng, dtype, B=B, H=H, L=L, S=S):
    """Options by name, those for single rows and batches to be cut out of: full shapes, a number for each batch."""
    mask = rng.random((B, H, L, S)) < 0.6
    mask[..., 96:192] |= rng.random((B, H, L, 1)) < 0.5  # some rows see a whole block
    bias = rng.standard_normal((B, H, L, S)).astype(dtype)
    bias[rng.random(bias.shape) < 0.2] = -INF
    offset = np.full(B, S - L) - np.arange(B) * 9
    lengths = np.array([S - S // 3 * b for b in range(B)])
    return {
        "none": {},
        "scale": {"scale": -0.3},
        "causal": {"causal": True, "query_offset": offset},
        "causal, empty rows": {"causal": True, "query_offset": np.full(B, -10)},
        "window": {"window": (100, 20), "query_offset": offset},
        "narrow window": {"window": (3, 2), "query_offset": offset},
        "left of window": {"window": (120, None), "query_offset": offset},
        "kv_lengths": {"kv_lengths": lengths},
        "mask": {"mask": mask},
        "bias": {"bias": bias},
        "softcap": {"softcap": 4.0},
        "sinks": {"sinks": rng.standard_normal(H).astype(dtype)},
        "all": {"mask": mask, "bias": bias, "causal": True, "window": 200, "query_offset": offset,
                "kv_lengths": lengths, "softcap": 20.0, "sinks": rng.standard_normal(H).astype(dtype), "scale": 0.4},
    }


OPTIONS = list(every_option(np.random.default_rng(0), np.float32))
each_option = pytest.mark.parametrize("name", OPTIONS)


@functools.cache
def make(name, dtype, seed):
    """arrays, options, out, lse: for all tests, so not to be written to."""
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    arrays, options = arrays_of(rng, dtype), every_option(rng, dtype)[name]
    out, lse = fa.attention(*arrays, return_lse=True, **options)
    assert np.isfinite(out).all()
    for array in (*arrays, *options.values(), out, lse):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return arrays, options, out, lse


@pytest.fixture
def case(name, dtype, seed):
    """(arrays, options, out, lse, context)"""
    return *make(name, dtype, seed), {"dtype": np.dtype(dtype), "options": name, "seed": seed}


def cut(options, batch=slice(None), heads=slice(None), rows=slice(None)):
    """The options of a part of the batches, heads and rows, given by slices."""
    part = dict(options)
    for name in "mask", "bias":
        if name in part:
            part[name] = part[name][batch, heads, rows]
    for name in "query_offset", "kv_lengths":
        if name in part:
            part[name] = part[name][batch]
    if "query_offset" in part:
        part["query_offset"] = part["query_offset"] + (rows.start or 0)
    if "sinks" in part:
        part["sinks"] = part["sinks"][heads]
    return part


def assert_same(result, out, lse, context):
    assert_same_bits(result[0], out, {**context, "result": "out"})
    assert_same_bits(result[1], lse, {**context, "result": "lse"})


@both_dtypes
@each_option
def test_number_of_threads(case):
    arrays, options, out, lse, context = case
    for n in 1, 2, 3, 5, 64:
        where = {**context, "threads": n}
        assert_same(fa.attention(*arrays, return_lse=True, num_threads=n, **options), out, lse, where)
        with fa.threads(n):
            assert_same(fa.attention(*arrays, return_lse=True, **options), out, lse, where)


@both_dtypes
@pytest.mark.parametrize("shape", [(1, 1, 1000, 1000), (1, 3, 500, 700), (5, 1, 129, 2000), (1, 1, 16, 30000)])
def test_number_of_threads_on_large_calls(shape, dtype, seed):
    """Enough work for every thread; the blocks of queries differ with their number."""
    B, H, L, S = shape
    arrays = arrays_of(np.random.default_rng(seed), dtype, B=B, H=H, Hkv=1, L=L, S=S)
    for options in {}, {"causal": True}:
        out = fa.attention(*arrays, num_threads=1, **options)
        for n in 2, 3, 5:
            assert_same_bits(fa.attention(*arrays, num_threads=n, **options), out,
                             {"dtype": out.dtype, "shape": shape, "options": options, "threads": n, "seed": seed})


@both_dtypes
@each_option
def test_repeated_calls(case):
    arrays, options, out, lse, context = case
    for i in range(20):
        assert_same(fa.attention(*arrays, return_lse=True, num_threads=1 + i % 3, **options), out, lse, context)


@both_dtypes
@each_option
def test_ways_to_ask(case):
    arrays, options, out, lse, context = case
    assert_same_bits(fa.attention(*arrays, **options), out, {**context, "asked": "without lse"})
    given = np.full_like(out, NAN)
    assert_same(fa.attention(*arrays, out=given, return_lse=True, **options), out, lse, {**context, "asked": "out="})
    assert_same_bits(given, out, {**context, "asked": "out="})
    for asked in False, True, "row":
        result = fa.attention(*arrays, deterministic=asked, return_lse=True, **options)
        assert_same(result, out, lse, {**context, "deterministic": asked})


@both_dtypes
@pytest.mark.parametrize("D", range(1, 130))
def test_default_scale(D, dtype, seed):
    """1 / sqrt(D) is the same number in a plain call, in one with options, and written out."""
    q, k, v = arrays_of(np.random.default_rng([seed, D]), dtype, 1, 1, 1, 5, 9, D, 3)
    plain = fa.attention(q, k, v)
    context = {"dtype": plain.dtype, "D": D, "seed": seed}
    assert_same_bits(fa.attention(q, k, v, return_lse=True)[0], plain, {**context, "asked": "with lse"})
    assert_same_bits(fa.attention(q, k, v, scale=1 / D**0.5), plain, {**context, "asked": "scale=1 / D**0.5"})


@both_dtypes
@each_option
def test_batch_and_heads(case):
    (q, k, v), options, out, lse, context = case
    for b in range(B):
        batch = slice(b, b + 1)
        for heads, kv_heads in [(slice(0, 4), slice(0, 2)), (slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2)),
                                *((slice(h, h + 1), slice(h // 2, h // 2 + 1)) for h in range(H))]:
            result = fa.attention(q[batch, heads], k[batch, kv_heads], v[batch, kv_heads], return_lse=True,
                                  **cut(options, batch, heads))
            assert_same(result, out[batch, heads], lse[batch, heads], {**context, "batch": b, "heads": heads})
    # A key head for each query head instead of groups.
    result = fa.attention(q, k.repeat(2, axis=1), v.repeat(2, axis=1), return_lse=True, **options)
    assert_same(result, out, lse, {**context, "heads": "repeated"})


@both_dtypes
@each_option
def test_rows_alone(case):
    (q, k, v), options, out, lse, context = case
    for i in range(L):
        rows = slice(i, i + 1)
        result = fa.attention(q[:, :, rows], k, v, return_lse=True, **ONE_PATH, **cut(options, rows=rows))
        assert_same(result, out[:, :, rows], lse[:, :, rows], {**context, "row": i})


@both_dtypes
@each_option
def test_rows_in_other_places(case, seed):
    (q, k, v), options, out, lse, context = case
    rng = np.random.default_rng(seed)
    for _ in range(30):
        first, last = sorted(int(i) for i in rng.integers(0, L + 1, 2))
        rows = slice(first, last)
        result = fa.attention(q[:, :, rows], k, v, return_lse=True, **ONE_PATH, **cut(options, rows=rows))
        assert_same(result, out[:, :, rows], lse[:, :, rows], {**context, "rows": rows})
    if "query_offset" in options:
        return
    for order in rng.permutation(L), rng.integers(0, L, 3 * L):  # shuffled; some often, some not at all
        shuffled = {name: option[:, :, order] if name in ("mask", "bias") else option
                    for name, option in options.items()}
        result = fa.attention(q[:, :, order], k, v, return_lse=True, **shuffled)
        assert_same(result, out[:, :, order], lse[:, :, order], {**context, "rows": "in another order"})


@both_dtypes
@pytest.mark.parametrize("D, Dv", [(129, 129), (200, 40), (257, 3), (1, 300), (0, 70)])
def test_rows_alone_with_large_heads(D, Dv, dtype, seed):
    rng = np.random.default_rng([seed, D])
    q, k, v = arrays_of(rng, dtype, B=1, H=1, Hkv=1, S=130, D=D, Dv=Dv)
    for name, options in every_option(rng, dtype, B=1, H=1, S=130).items():
        out, lse = fa.attention(q, k, v, return_lse=True, **options)
        context = {"dtype": out.dtype, "D": D, "Dv": Dv, "options": name, "seed": seed}
        for layout in "columns first", "rows first":
            moved = [LAYOUTS[layout](array) for array in (q, k, v)]
            assert_same(fa.attention(*moved, return_lse=True, **options), out, lse, {**context, "layout": layout})
        for i in 0, 1, 15, 16, 63, 64, 149:
            rows = slice(i, i + 1)
            result = fa.attention(q[:, :, rows], k, v, return_lse=True, **ONE_PATH, **cut(options, rows=rows))
            assert_same(result, out[:, :, rows], lse[:, :, rows], {**context, "row": i})


@both_dtypes
@each_option
@pytest.mark.parametrize("poison", [NAN, INF, 1e30, 0])
def test_neighbour_rows(poison, case):
    """Queries, bias and mask of all other rows change; every fifth row keeps its bits."""
    (q, k, v), options, out, lse, context = case
    kept = np.zeros(L, bool)
    kept[2::5] = True
    q = q.copy()
    q[:, :, ~kept] = poison
    options = dict(options)
    if "bias" in options:
        options["bias"] = options["bias"].copy()
        options["bias"][:, :, ~kept] = poison
    for every in [True, False, None]:
        if "mask" in options:
            if every is not None:
                options["mask"] = options["mask"].copy()
                options["mask"][:, :, ~kept] = every
        elif every is not None:
            continue
        result = fa.attention(q, k, v, return_lse=True, **options)
        assert_same((result[0][:, :, kept], result[1][:, :, kept]), out[:, :, kept], lse[:, :, kept],
                    {**context, "neighbours": poison, "their mask": every})


@both_dtypes
@each_option
@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout, case):
    arrays, options, out, lse, context = case
    named = dict(zip(("query", "key", "value"), arrays)) | {n: options[n] for n in ("mask", "bias") if n in options}
    context["layout"] = layout
    for chosen in [*([name] for name in named), list(named)]:
        moved = {name: LAYOUTS[layout](array) if name in chosen else array for name, array in named.items()}
        q, k, v = (moved.pop(name) for name in ("query", "key", "value"))
        result = fa.attention(q, k, v, return_lse=True, **{**options, **moved})
        assert_same(result, out, lse, {**context, "moved": chosen})
    if layout != "read-only":
        given = LAYOUTS[layout](np.full_like(out, NAN))
        assert_same_bits(fa.attention(*arrays, out=given, **options), out, {**context, "moved": "out"})


@both_dtypes
@pytest.mark.parametrize("broadcast", BROADCASTS)
def test_zero_strides(broadcast, dtype, seed):
    rng = np.random.default_rng(seed)
    arrays = arrays_of(rng, dtype)
    options = every_option(rng, dtype)["all"]
    for chosen in {}, {"mask": options["mask"]}, {"bias": options["bias"]}, options:
        views = [BROADCASTS[broadcast](array) for array in arrays]
        small = {n: BROADCASTS[broadcast](o) if n in ("mask", "bias") else o for n, o in chosen.items()}
        copied = {n: o.copy() if n in ("mask", "bias") else o for n, o in small.items()}
        out, lse = fa.attention(*(view.copy() for view in views), return_lse=True, **copied)
        assert_same(fa.attention(*views, return_lse=True, **small), out, lse,
                    {"dtype": out.dtype, "broadcast": broadcast, "options": list(chosen), "seed": seed})


# --- keys that nobody sees ---

def longer(array, n, filling):
    """`array` (..., S, columns) with n more keys."""
    return np.concatenate([array, np.full((*array.shape[:-2], n, array.shape[-1]), filling, array.dtype)], axis=-2)


def wider(array, n, filling):
    """A mask or bias (..., L, S) with n more keys."""
    return np.concatenate([array, np.full((*array.shape[:-1], n), filling, array.dtype)], axis=-1)


@both_dtypes
@each_option
@pytest.mark.parametrize("filling", [0, NAN])
@pytest.mark.parametrize("how", ["kv_lengths", "mask", "bias", "causal"])
def test_padding(how, filling, case):
    (q, k, v), options, _, _, context = case
    options = {**{"kv_lengths": {"kv_lengths": np.full(B, S)}, "mask": {"mask": np.ones((1, S), bool)},
                  "bias": {"bias": np.zeros((1, S), q.dtype)}, "causal": {"query_offset": np.full(B, S - L)}}[how],
               **options}
    if how == "causal":
        options["causal"] = True
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    for n in 1, 2, 15, 16, 95, 96, 97, 200:
        padded = dict(options)
        if "mask" in options:
            padded["mask"] = wider(options["mask"], n, how != "mask")
        if "bias" in options:
            padded["bias"] = wider(options["bias"], n, -INF if how == "bias" else filling)
        result = fa.attention(q, longer(k, n, filling), longer(v, n, filling), return_lse=True, **padded)
        assert_same(result, out, lse, {**context, "padded by": how, "n": n, "filling": filling})


@both_dtypes
@each_option
def test_kv_lengths_equal_shorter_arrays(case):
    (q, k, v), options, _, _, context = case
    for n in 1, 17, 95, 96, 97, 192, 200, S - 1:
        short = {name: option[..., :n] if name in ("mask", "bias") else option for name, option in options.items()}
        lengths = np.minimum(options.get("kv_lengths", S), n)
        if "kv_lengths" in options:
            short["kv_lengths"] = lengths
        out, lse = fa.attention(q, k[:, :, :n], v[:, :, :n], return_lse=True, **short)
        result = fa.attention(q, k, v, return_lse=True, **{**options, "kv_lengths": lengths})
        assert_same(result, out, lse, {**context, "kv_lengths": n})


# --- one restriction said in two ways ---

def allowed(L, S, **options):
    """The mask (B, 1, L, S) that causal, window and lengths stand for, from the definition."""
    masks = []
    for b in range(B):
        n = options.get("kv_lengths", [S] * B)[b]
        p = np.arange(L)[:, None] + options.get("query_offset", [n - L] * B)[b]
        j = np.arange(S)
        mask = (j < n) & (np.arange(L)[:, None] < options.get("query_lengths", [L] * B)[b])
        left, right = options.get("window", (None, None))
        if options.get("causal"):
            mask = mask & (j <= p)
        if left is not None:
            mask = mask & (j >= p - left)
        if right is not None:
            mask = mask & (j <= p + right)
        masks.append(mask)
    return np.array(masks)[:, None]


@both_dtypes
@pytest.mark.parametrize("extra", ["none", "scale", "bias", "softcap", "sinks"])
@pytest.mark.parametrize("flags", [
    {"causal": True}, {"causal": True, "query_offset": [0, -40]}, {"window": (50, 7)}, {"window": (None, 3)},
    {"window": (3, None), "query_offset": [170, 5]}, {"window": (0, 0)}, {"kv_lengths": [S, 0]},
    {"kv_lengths": [97, 1]}, {"query_lengths": [L, 0]}, {"query_lengths": [17, L - 1]},
    {"causal": True, "window": (60, 0), "kv_lengths": [S, 120], "query_lengths": [100, L]},
], ids=str)
def test_mask_or_flags(flags, extra, dtype, seed):
    rng = np.random.default_rng(seed)
    arrays, more = arrays_of(rng, dtype), every_option(rng, dtype)[extra]
    if "query_lengths" in flags:
        more = more | ONE_PATH  # a mask leaves the number of rows as it is
    mask = allowed(L, S, **flags)
    out, lse = fa.attention(*arrays, return_lse=True, mask=mask, **more)
    if "sinks" in more and "query_lengths" in flags:  # its rows have lse -inf, rows without a visible key their sink
        for b, n in enumerate(flags["query_lengths"]):
            lse[b, :, n:] = -INF
    context = {"dtype": out.dtype, "flags": flags, "options": extra, "seed": seed}
    assert_same(fa.attention(*arrays, return_lse=True, **flags, **more), out, lse, context)
    assert_same(fa.attention(*arrays, return_lse=True, mask=mask, **flags, **more), out, lse, {**context, "both": True})
    empty = ~mask.any(axis=-1).repeat(H, axis=1)
    assert (out[empty] == 0).all()


# --- infinities that are seen ---

@both_dtypes
@each_option
@pytest.mark.parametrize("layout", ["contiguous", "columns first"])
def test_rows_that_see_an_infinity(layout, case, seed):
    """An infinity in one column of a value: the other columns keep their bits, whoever else sees that key."""
    (q, k, v), options, _, _, context = case
    rng = np.random.default_rng(seed)
    v = LAYOUTS[layout](v)
    for b, h in np.ndindex(B, Hkv):
        v[b, h, rng.integers(0, S, 20), 5] = INF
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    for i in range(0, L, 3):
        rows = slice(i, i + 1)
        alone = fa.attention(q[:, :, rows], k, v, return_lse=True, **ONE_PATH, **cut(options, rows=rows))
        others = np.arange(Dv) != 5
        assert_same((alone[0][..., others], alone[1]), out[:, :, rows][..., others], lse[:, :, rows],
                    {**context, "layout": layout, "row": i})
        assert (np.isfinite(alone[0][..., 5]) == np.isfinite(out[:, :, i, 5][..., None])).all()


# --- the comparison must see one bit ---

def test_comparison_sees_one_bit():
    for dtype in np.float32, np.float64:
        a = np.ones((3, 4), dtype)
        assert_same_bits(a, a.copy(), {})
        for wrong in np.nextafter(dtype(1), dtype(2)), NAN:
            b = a.copy()
            b[1, 2] = wrong
            with pytest.raises(AssertionError, match=r"first at \(1, 2\)"):
                assert_same_bits(b, a, {})
        with pytest.raises(AssertionError, match="12 of 12"):
            assert_same_bits(0 * a, -0.0 * a, {})
        with pytest.raises(AssertionError, match="shape"):
            assert_same_bits(a[:2], a, {})
        with pytest.raises(AssertionError, match="dtype"):
            assert_same_bits(a.astype(np.float16), a, {})
