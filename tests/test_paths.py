"""Bits of the two paths: few rows of a sequence go one way, more another; with `deterministic="row"` all do.

Within each path the bits of a row depend on its query, on what it sees and on the options alone: not on threads, batch,
heads, strides, padding or other rows. float32 and float64 by the path of many rows are for test_bits.py.
"""

import functools
import itertools
import zlib

import numpy as np
import pytest
import test_bits
from cases import SPLIT, assert_close, bound, exact, few_rows, inputs
from layouts import BROADCASTS, LAYOUTS, assert_same_bits
from test_bits import ONE_PATH, OPTIONS, assert_same, cut, longer, wider

import fastattn as fa
from fastattn import masks

pytestmark = pytest.mark.compiled  # NumPy's matrix product makes no such promise

NAN, INF = np.nan, np.inf
B, H, Hkv, S, D, Dv = 2, 4, 2, 300, 64, 10

# dtype of the queries, and of keys and values
KINDS = {
    "float32": ("float32", "float32"),
    "float64": ("float64", "float64"),
    "float16": ("float16", "float16"),
    "bfloat16": ("bfloat16", "bfloat16"),
    "float32, float16 keys": ("float32", "float16"),
    "float32, bfloat16 keys": ("float32", "bfloat16"),
}
PATHS = [("few", kind) for kind in KINDS] + [("many", kind) for kind in KINDS if "16" in kind]
# Fewer rows are few where heads are short, and no more than a tile.
SHORT = [("few, short heads", "float32"), ("few, short heads", "bfloat16")]

each_path = pytest.mark.parametrize("path, kind", PATHS)
each_case = pytest.mark.parametrize("path, kind", PATHS + SHORT)
each_kind = pytest.mark.parametrize("kind", KINDS)
each_option = pytest.mark.parametrize("name", OPTIONS)
some_options = pytest.mark.parametrize("name", ["none", "causal", "mask", "bias", "all"])


def dtypes_of(kind):
    """(dtype of queries, dtype of keys and values); bfloat16 needs ml_dtypes."""
    if "bfloat16" in kind:
        pytest.importorskip("ml_dtypes")
    return tuple(np.dtype(name) for name in KINDS[kind])


def few_of(kind, D=D, scale=1.0):
    return few_rows(D, *dtypes_of(kind), scale=scale)


def arrays_of(rng, kind, **sizes):
    """As in test_bits: scores of many sizes. As many rows as are few, unless told."""
    of_query, of_key = dtypes_of(kind)
    sizes = {"B": B, "H": H, "Hkv": Hkv, "S": S, "D": D, "Dv": Dv} | sizes
    sizes = {"L": few_of(kind, sizes["D"])} | sizes
    q, k, v = test_bits.arrays_of(rng, np.float64 if kind == "float64" else np.float32, **sizes)
    return q.astype(of_query), k.astype(of_key), v.astype(of_key)


def every_option(rng, kind, **sizes):
    """As in test_bits. Bias and sinks of 16-bit queries are theirs or float32."""
    dtype = dtypes_of(kind)[0]
    options = test_bits.every_option(rng, np.float64 if kind == "float64" else np.float32, **sizes)
    for name, array in [("bias", "bias"), ("sinks", "sinks"), ("all", "bias")]:
        options[name][array] = options[name][array].astype(dtype)
    return options


@functools.cache
def make(path, kind, name, seed):
    """arrays, options, out, lse: for all tests, so not to be written to."""
    rng = np.random.default_rng([seed, zlib.crc32(f"{kind} {name}".encode())])
    D = 64 if path == "few" else 12
    L = 20 if path == "many" else few_of(kind, D)
    arrays, options = arrays_of(rng, kind, L=L, D=D), every_option(rng, kind, L=L)[name]
    if path == "many":
        options |= ONE_PATH
    out, lse = fa.attention(*arrays, return_lse=True, **options)
    assert np.isfinite(out).all()
    for array in (*arrays, *options.values(), out, lse):
        if isinstance(array, np.ndarray):
            array.flags.writeable = False
    return arrays, options, out, lse


@pytest.fixture
def case(path, kind, name, seed):
    """(arrays, options, out, lse, context)"""
    dtypes_of(kind)
    return *make(path, kind, name, seed), {"path": path, "kind": kind, "options": name, "seed": seed}


# --- within a path ---

@each_case
@each_option
def test_threads_and_ways_to_ask(case):
    arrays, options, out, lse, context = case
    for n in 1, 2, 3, 1, 2, 3, 17:
        result = fa.attention(*arrays, return_lse=True, num_threads=n, **options)
        assert_same(result, out, lse, {**context, "threads": n})
    assert_same_bits(fa.attention(*arrays, **options), out, {**context, "asked": "without lse"})
    given = np.full_like(out, NAN)
    assert_same(fa.attention(*arrays, out=given, return_lse=True, **options), out, lse, {**context, "asked": "out="})
    assert_same_bits(given, out, {**context, "asked": "out="})
    for asked in False, True:
        if "deterministic" not in options:
            result = fa.attention(*arrays, return_lse=True, deterministic=asked, **options)
            assert_same(result, out, lse, {**context, "deterministic": asked})


@each_case
@each_option
def test_within_the_bound(case):
    arrays, options, out, lse, context = case
    true, allowed = exact(*arrays, **options), bound(*arrays, **options)
    assert_close(out, true[0], allowed.out, context)
    assert_close(lse, true[1], allowed.lse, {**context, "result": "lse"})


@each_case
@each_option
def test_rows_alone_and_in_other_places(case, seed):
    (q, k, v), options, out, lse, context = case
    rng = np.random.default_rng(seed)
    L = q.shape[2]
    parts = [(i, i + 1) for i in range(L)] + [sorted(rng.integers(0, L + 1, 2).tolist()) for _ in range(10)]
    for first, last in parts:
        rows = slice(first, last)
        result = fa.attention(q[:, :, rows], k, v, return_lse=True, **cut(options, rows=rows))
        assert_same(result, out[:, :, rows], lse[:, :, rows], {**context, "rows": rows})
    if "query_offset" in options:
        return
    for order in rng.permutation(L), rng.integers(0, L, L), rng.integers(0, L, 3):
        shuffled = {name: option[:, :, order] if name in ("mask", "bias") else option
                    for name, option in options.items()}
        result = fa.attention(q[:, :, order], k, v, return_lse=True, **shuffled)
        assert_same(result, out[:, :, order], lse[:, :, order], {**context, "rows": order})


@each_case
@each_option
def test_batch_and_heads(case):
    (q, k, v), options, out, lse, context = case
    for b in range(B):
        batch = slice(b, b + 1)
        for heads, kv_heads in [(slice(0, 2), slice(0, 1)), (slice(2, 4), slice(1, 2)),
                                *((slice(h, h + 1), slice(h // 2, h // 2 + 1)) for h in range(H))]:
            result = fa.attention(q[batch, heads], k[batch, kv_heads], v[batch, kv_heads], return_lse=True,
                                  **cut(options, batch, heads))
            assert_same(result, out[batch, heads], lse[batch, heads], {**context, "batch": b, "heads": heads})
    result = fa.attention(q, k.repeat(2, axis=1), v.repeat(2, axis=1), return_lse=True, **options)
    assert_same(result, out, lse, {**context, "heads": "repeated"})


@each_case
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_groups_of_heads(group, path, kind, seed):
    """However many query heads share a key head, each has the bits that it has alone."""
    D = 64 if path == "few" else 12
    most = 32 if path == "many" else few_of(kind, D)
    for rows in sorted({min(n, most) for n in (1, 2, 3, 7, 8, 17, most)}):
        rng = np.random.default_rng([seed, group, rows])
        heads = 2 * group
        q, k, v = arrays_of(rng, kind, B=1, H=heads, L=rows, S=230, D=D)
        for name, options in every_option(rng, kind, B=1, H=heads, L=rows, S=230).items():
            if path == "many":
                options |= ONE_PATH
            out, lse = fa.attention(q, k, v, return_lse=True, **options)
            context = {"path": path, "kind": kind, "group": group, "L": rows, "options": name, "seed": seed}
            for h in range(heads):
                one, key = slice(h, h + 1), slice(h // group, h // group + 1)
                result = fa.attention(q[:, one], k[:, key], v[:, key], return_lse=True, **cut(options, heads=one))
                assert_same(result, out[:, one], lse[:, one], {**context, "head": h})


@each_case
@some_options
def test_strides(case):
    arrays, options, out, lse, context = case
    named = dict(zip(("query", "key", "value"), arrays)) | {n: options[n] for n in ("mask", "bias") if n in options}
    for layout, move in LAYOUTS.items():
        context["layout"] = layout
        for chosen in [*([name] for name in named), list(named)]:
            moved = {name: move(array) if name in chosen else array for name, array in named.items()}
            q, k, v = (moved.pop(name) for name in ("query", "key", "value"))
            result = fa.attention(q, k, v, return_lse=True, **{**options, **moved})
            assert_same(result, out, lse, {**context, "moved": chosen})
        if layout != "read-only":
            given = move(np.full_like(out, NAN))
            assert_same_bits(fa.attention(*arrays, out=given, **options), out, {**context, "moved": "out"})


@each_case
@some_options
def test_zero_strides(case):
    arrays, options, _, _, context = case
    for name, broadcast in BROADCASTS.items():
        views = [broadcast(array) for array in arrays]
        small = {n: broadcast(o) if n in ("mask", "bias") else o for n, o in options.items()}
        copied = {n: o.copy() if n in ("mask", "bias") else o for n, o in small.items()}
        out, lse = fa.attention(*(view.copy() for view in views), return_lse=True, **copied)
        assert_same(fa.attention(*views, return_lse=True, **small), out, lse, {**context, "broadcast": name})


@each_path
@pytest.mark.parametrize("sizes", [(64, 64), (128, 128), (129, 5), (1, 200), (0, 70), (70, 0), (257, 31), (8, 16),
                                   (40, 40)], ids=str)
@pytest.mark.parametrize("heads_last", [False, True])
def test_sizes_of_heads(heads_last, sizes, path, kind, seed):
    """Rows and heads alone at head sizes of all kinds; the packed (L, H, D) layout of projections as well."""
    D, Dv = sizes
    rng = np.random.default_rng([seed, D, Dv])
    L = 9 if path == "many" else min(9, few_of(kind, D))
    q, k, v = arrays_of(rng, kind, H=6, L=L, S=130, D=D, Dv=Dv)
    more = ONE_PATH if path == "many" else {}
    out, lse = fa.attention(q, k, v, return_lse=True, **more)
    context = {"path": path, "kind": kind, "D": D, "Dv": Dv, "seed": seed}
    if heads_last:
        q, k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v))
        given = np.empty((B, L, 6, Dv), q.dtype).swapaxes(1, 2)
        assert_same(fa.attention(q, k, v, return_lse=True, out=given, **more), out, lse, context)
    for i in range(L):
        for h in 0, 5:
            rows, head, key = slice(i, i + 1), slice(h, h + 1), slice(h // 3, h // 3 + 1)
            result = fa.attention(q[:, head, rows], k[:, key], v[:, key], return_lse=True, **more)
            assert_same(result, out[:, head, rows], lse[:, head, rows], {**context, "row": i, "head": h})


@each_kind
@pytest.mark.parametrize("S", [96, 97, 207, 208, 300])  # the last block ends with, and in, a step of the loops
@pytest.mark.parametrize("D", [64, 128, 12, 40, 96, 300])
def test_tiles_of_rows(D, S, kind, seed):
    """Tiles of rows of every size, behind each other and alone: within the bound, with the bits of one row."""
    most = few_of(kind, D)
    q, k, v = arrays_of(np.random.default_rng([seed, D, S]), kind, B=1, H=1, Hkv=1, L=most, S=S, D=D, Dv=D)
    alone = [fa.attention(q[:, :, i:i + 1], k, v, return_lse=True) for i in range(most)]
    out, lse = (np.concatenate([result[part] for result in alone], axis=2) for part in (0, 1))
    context = {"kind": kind, "S": S, "D": D, "seed": seed}
    true, allowed = exact(q, k, v), bound(q, k, v)
    assert_close(out, true[0], allowed.out, context)
    assert_close(lse, true[1], allowed.lse, {**context, "result": "lse"})
    for L in range(2, most + 1):
        result = fa.attention(q[:, :, :L], k, v, return_lse=True)
        assert_same(result, out[:, :, :L], lse[:, :, :L], {**context, "L": L})


@each_path
@pytest.mark.parametrize("H", [1, 5, 16, 128])
def test_latent_cache(H, path, kind, seed):
    """The value is a view of the key's first columns, one key head for all query heads: the bits of a copy."""
    rng = np.random.default_rng([seed, H])
    q, k, _ = arrays_of(rng, kind, H=H, Hkv=1, L=2, S=210, D=72, Dv=1)
    more = ONE_PATH if path == "many" else {}
    out, lse = fa.attention(q, k, k[..., :64].copy(), return_lse=True, **more)
    context = {"path": path, "kind": kind, "H": H, "seed": seed}
    assert_same(fa.attention(q, k, k[..., :64], return_lse=True, **more), out, lse, context)
    true, allowed = exact(q, k, k[..., :64]), bound(q, k, k[..., :64], **more)
    assert_close(out, true[0], allowed.out, context)


@each_case
@some_options
def test_neighbour_rows(case):
    """Queries, bias and mask of all other rows change; every fifth row keeps its bits."""
    (q, k, v), options, out, lse, context = case
    kept = np.zeros(q.shape[2], bool)
    kept[2::5] = True
    q, options = q.copy(), dict(options)
    for poison, every in itertools.product([NAN, INF, 6e4], [None, True, False] if "mask" in options else [None]):
        q[:, :, ~kept] = poison
        if "bias" in options:
            options["bias"] = options["bias"].copy()
            options["bias"][:, :, ~kept] = poison
        if every is not None:
            options["mask"] = options["mask"].copy()
            options["mask"][:, :, ~kept] = every
        result = fa.attention(q, k, v, return_lse=True, **options)
        assert_same((result[0][:, :, kept], result[1][:, :, kept]), out[:, :, kept], lse[:, :, kept],
                    {**context, "neighbours": poison, "their mask": every})


@each_case
@some_options
@pytest.mark.parametrize("how", ["kv_lengths", "mask", "bias", "causal"])
def test_padding(how, case):
    (q, k, v), options, _, _, context = case
    L = q.shape[2]
    options = {**{"kv_lengths": {"kv_lengths": np.full(B, S)}, "mask": {"mask": np.ones((1, S), bool)},
                  "bias": {"bias": np.zeros((1, S), q.dtype)}, "causal": {"query_offset": np.full(B, S - L)}}[how],
               **options}
    if how == "causal":
        options["causal"] = True
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    for n, filling in itertools.product([1, 16, 95, 97, 200], [0, NAN]):
        padded = dict(options)
        if "mask" in options:
            padded["mask"] = wider(options["mask"], n, how != "mask")
        if "bias" in options:
            padded["bias"] = wider(options["bias"], n, -INF if how == "bias" else filling)
        result = fa.attention(q, longer(k, n, filling), longer(v, n, filling), return_lse=True, **padded)
        assert_same(result, out, lse, {**context, "padded by": how, "n": n, "filling": filling})


@each_case
@some_options
@pytest.mark.parametrize("layout", ["contiguous", "columns first"])
def test_rows_that_see_an_infinity(layout, case, seed):
    """An infinity in one column of a value: the other columns keep their bits, whoever else sees that key."""
    (q, k, v), options, clean, clean_lse, context = case
    rng = np.random.default_rng(seed)
    v = LAYOUTS[layout](v)
    for b, h in np.ndindex(B, Hkv):
        v[b, h, rng.integers(0, S, 20), 5] = INF
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    others = np.arange(Dv) != 5
    assert_same((out[..., others], lse), clean[..., others], clean_lse, {**context, "layout": layout})
    for i in range(q.shape[2]):
        rows = slice(i, i + 1)
        alone = fa.attention(q[:, :, rows], k, v, return_lse=True, **cut(options, rows=rows))
        assert_same((alone[0][..., others], alone[1]), out[:, :, rows][..., others], lse[:, :, rows],
                    {**context, "layout": layout, "row": i})
        assert (np.isfinite(alone[0][..., 5]) == np.isfinite(out[:, :, rows, 5])).all()


# --- which rows are few ---

@each_kind
@pytest.mark.parametrize("D", [0, 1, 8, 12, 31, 32, 40, 63, 64, 65, 96, 127, 128, 129, 192, 256, 300])
def test_border(D, kind, seed):
    """Up to the border a row has the bits that it has alone, and past it those that it has among 100. They differ."""
    border = few_of(kind, D)
    rng = np.random.default_rng([seed, D])
    q, k, v = arrays_of(rng, kind, L=100, D=D, Dv=40)
    q *= (2.0 ** rng.integers(-6, 7, D)).astype(q.dtype)  # else some sums of 16-bit products are exact in any order
    of_many = fa.attention(q, k, v, return_lse=True)
    context = {"kind": kind, "D": D, "border": border, "seed": seed}
    out, lse = fa.attention(q[:, :, :border], k, v, return_lse=True)
    if D > 1:
        assert (lse != of_many[1][:, :, :border]).any() or (out != of_many[0][:, :, :border]).any(), context
    for i in range(border):
        row = slice(i, i + 1)
        result = fa.attention(q[:, :, row], k, v, return_lse=True)
        assert_same(result, out[:, :, row], lse[:, :, row], {**context, "row": i})
    result = fa.attention(q[:, :, :border + 1], k, v, return_lse=True)
    assert_same(result, of_many[0][:, :, :border + 1], of_many[1][:, :, :border + 1], context)


@each_kind
@each_option
@pytest.mark.parametrize("D", [64, 12])
def test_one_path_for_any_number_of_rows(D, name, kind, seed):
    """deterministic="row": any numbers of rows agree; without it any few do, and any many."""
    rng = np.random.default_rng([seed, D, zlib.crc32(name.encode())])
    n = 100
    q, k, v = arrays_of(rng, kind, L=n, D=D)
    options = every_option(rng, kind, L=n)[name]
    border = few_of(kind, D, options.get("scale", 1.0))
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    context = {"kind": kind, "D": D, "options": name, "seed": seed}
    rows = slice(34, 34 + border)
    few = fa.attention(q[:, :, rows], k, v, return_lse=True, **cut(options, rows=rows))
    for count in 1, border - 1, border, border + 1, 65, 100:
        for first in sorted({0, 34, n - count}):
            if first + count > n:
                continue
            rows = slice(first, first + count)
            where = {**context, "rows": rows}
            part = cut(options, rows=rows)
            result = fa.attention(q[:, :, rows], k, v, return_lse=True, **ONE_PATH, **part)
            assert_same(result, out[:, :, rows], lse[:, :, rows], {**where, **ONE_PATH})
            result = fa.attention(q[:, :, rows], k, v, return_lse=True, **part)
            if count > border:
                assert_same(result, out[:, :, rows], lse[:, :, rows], where)
            elif first == 34:
                assert_same(result, few[0][:, :, :count], few[1][:, :, :count], where)


@each_kind
@each_option
def test_batches_of_few_and_many_rows(name, kind, seed):
    """Each batch goes by its own query_lengths: its bits are those of that many rows alone."""
    few = few_of(kind)
    n, lengths = 70, np.array([0, 1, few // 2, few - 1, few, few + 1, 33, 64, 70, 2])
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    sizes = {"B": len(lengths), "H": 3, "L": n, "S": 130}
    q, k, v = arrays_of(rng, kind, Hkv=1, **sizes)
    options = every_option(rng, kind, **sizes)[name]
    if "kv_lengths" in options:
        options["kv_lengths"] = rng.integers(1, 131, len(lengths))
    for more in {}, ONE_PATH:
        out, lse = fa.attention(q, k, v, return_lse=True, query_lengths=lengths, **options, **more)
        for threads in 1, 3:
            result = fa.attention(q, k, v, return_lse=True, query_lengths=lengths, num_threads=threads, **options,
                                  **more)
            assert_same(result, out, lse, {"kind": kind, "options": name, "threads": threads, "seed": seed})
        for b, length in enumerate(lengths):
            batch, rows = slice(b, b + 1), slice(0, length)
            result = fa.attention(q[batch, :, rows], k[batch], v[batch], return_lse=True, **more,
                                  **cut(options, batch, rows=rows))
            assert_same(result, out[batch, :, rows], lse[batch, :, rows],
                        {"kind": kind, "options": name, "batch": b, "rows": length, **more, "seed": seed})
            assert (out[b, :, length:] == 0).all() and (lse[b, :, length:] == -INF).all()


@each_kind
@pytest.mark.parametrize("mask", [
    masks.causal(), masks.window(40, 7), masks.dilated(30, 2, dilation=3), ~masks.window(9),
    lambda L: masks.causal(offset=250) & masks.documents(np.arange(L) // 5, np.arange(S) // 110), masks.window(None),
    ~masks.window(None),
], ids=range(7))
def test_expressions(mask, kind, seed):
    """Few rows with a plan have the bits of the dense mask, for each number of heads that share a key head."""
    L = few_of(kind)
    mask = mask if isinstance(mask, masks.Mask) else mask(L)
    dense = mask.to_dense(L, S)
    for group in 1, 2, 3, 8:
        rng = np.random.default_rng([seed, group])
        arrays = arrays_of(rng, kind, H=2 * group)
        for more in {}, {"kv_lengths": [S, 150], "softcap": 5.0}, {"query_lengths": [L, L // 2]}, ONE_PATH:
            expected = fa.attention(*arrays, mask=dense, return_lse=True, **more)
            for n in 1, 2:
                result = fa.attention(*arrays, mask=mask, return_lse=True, num_threads=n, **more)
                context = {"kind": kind, "mask": mask, "group": group, "options": more, "seed": seed}
                assert_same(result, *expected, context)


@each_kind
def test_plans_of_each_head_and_batch(kind, seed):
    rng = np.random.default_rng(seed)
    arrays = arrays_of(rng, kind)
    L = few_of(kind)
    for lead in (H,), (B, 1), (B, H):
        mask = masks.blocks(rng.random((*lead, L, S)) < 0.3, 1)
        dense = np.broadcast_to(mask.to_dense(L, S), (B, H, L, S))
        for more in {}, {"causal": True}, ONE_PATH:
            expected = fa.attention(*arrays, mask=dense, return_lse=True, **more)
            result = fa.attention(*arrays, mask=mask, return_lse=True, **more)
            assert_same(result, *expected, {"kind": kind, "lead": lead, "options": more, "seed": seed})


# --- keys in several splits ---

SPLITS = [1, 2 * 96, SPLIT - 1, SPLIT, SPLIT + 1, 2 * SPLIT - 1, 2 * SPLIT, 2 * SPLIT + 1, 4400]


def split_options(rng, n_keys, rows):
    """By name: what makes a split whole, cut, or empty for some rows."""
    mask = rng.random((B, H, rows, n_keys)) < 0.5
    mask[:, :, ::3, :SPLIT] = False
    mask[:, :, 1::3, SPLIT:] = False
    return {
        "none": {},
        "causal": {"causal": True, "query_offset": np.array([n_keys - rows, min(n_keys, SPLIT) - rows // 2 - 1])},
        "window": {"window": (20, 10), "query_offset": np.array([n_keys // 2, min(n_keys, SPLIT) - rows // 2 - 1])},
        "left": {"window": (2000, None)},
        "kv_lengths": {"kv_lengths": np.array([n_keys, min(n_keys, SPLIT + 3)])},
        "mask": {"mask": mask},
        "bias": {"bias": np.where(mask, rng.standard_normal(mask.shape), -INF).astype(np.float32), "softcap": 3.0},
        "sinks": {"sinks": rng.standard_normal(H).astype(np.float32), "causal": True},
        "empty": {"kv_lengths": np.array([0, n_keys // 3]), "causal": True, "query_offset": np.array([0, -1])},
    }


SPLIT_OPTIONS = list(split_options(np.random.default_rng(0), 1, 1))


@each_kind
@pytest.mark.parametrize("name", SPLIT_OPTIONS)
@pytest.mark.parametrize("n_keys", SPLITS)
def test_splits(n_keys, name, kind, seed):
    """Right within the bound, and the bits depend on neither threads, heads, batch, padding nor strides."""
    rows = min(7, few_of(kind))
    rng = np.random.default_rng([seed, n_keys])
    q, k, v = arrays_of(rng, kind, L=rows, S=n_keys)
    options = split_options(rng, n_keys, rows)[name]
    if kind == "float64":
        options = {n: o.astype(np.float64) if n in ("bias", "sinks") else o for n, o in options.items()}
    context = {"kind": kind, "S": n_keys, "options": name, "seed": seed}
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    true, allowed = exact(q, k, v, **options), bound(q, k, v, **options)
    assert_close(out, true[0], allowed.out, context)
    assert_close(lse, true[1], allowed.lse, {**context, "result": "lse"})
    for threads in 1, 2, 3, 8:
        result = fa.attention(q, k, v, return_lse=True, num_threads=threads, **options)
        assert_same(result, out, lse, {**context, "threads": threads})
    for b, h, i in [(0, 0, 0), (1, 3, rows - 1), (0, 2, 1), (1, 1, 4)]:
        batch, head, key, row = (slice(n, n + 1) for n in (b, h, h // 2, i))
        part = cut(options, batch, head, row)
        if name in ("left", "sinks"):
            part["query_offset"] = n_keys - rows + i
        result = fa.attention(q[batch, head, row], k[batch, key], v[batch, key], return_lse=True, **part)
        assert_same(result, out[batch, head, row], lse[batch, head, row], {**context, "batch": b, "head": h, "row": i})
    for layout in "columns first", "rows first", "reversed all", "off by one":
        moved = [LAYOUTS[layout](array) for array in (q, k, v)]
        assert_same(fa.attention(*moved, return_lse=True, **options), out, lse, {**context, "layout": layout})
    longer_options = dict(options)
    for n in 1, 96, SPLIT:
        for array in "mask", "bias":
            if array in options:
                longer_options[array] = wider(options[array], n, array == "mask")
        longer_options["kv_lengths"] = options.get("kv_lengths", np.full(B, n_keys))
        result = fa.attention(q, longer(k, n, NAN), longer(v, n, NAN), return_lse=True, **longer_options)
        assert_same(result, out, lse, {**context, "padding": n})


@each_kind
@pytest.mark.parametrize("share", [0, 0.25, 0.5, 0.75, 1])
def test_splits_of_many_rows_and_heads(share, kind, seed):
    """Up to as many rows as are few."""
    rows = max(1, int(share * few_of(kind)))
    for group, n_keys in [(1, 4400), (3, 2113), (8, 4225)]:
        rng = np.random.default_rng([seed, group, rows])
        q, k, v = arrays_of(rng, kind, B=1, H=2 * group, L=rows, S=n_keys)
        for options in {"causal": True}, {"window": (2200, 0)}:
            context = {"kind": kind, "L": rows, "S": n_keys, "group": group, "options": options, "seed": seed}
            out, lse = fa.attention(q, k, v, return_lse=True, **options)
            true, allowed = exact(q, k, v, **options), bound(q, k, v, **options)
            assert_close(out, true[0], allowed.out, context)
            assert_close(lse, true[1], allowed.lse, {**context, "result": "lse"})
            for h in range(2 * group):
                head, key = slice(h, h + 1), slice(h // group, h // group + 1)
                result = fa.attention(q[:, head], k[:, key], v[:, key], num_threads=2, return_lse=True, **options)
                assert_same(result, out[:, head], lse[:, head], {**context, "head": h})


@each_kind
def test_batches_of_different_splits(kind, seed):
    """Batches of few and many rows whose keys fill from none to three splits."""
    n_keys, rows, few = 4400, 50, few_of(kind)
    q_lengths = np.array([1, 50, few, 7, few + 1, 2, 0])
    k_lengths = np.array([4400, 4400, SPLIT, 0, 100, SPLIT + 1, 4400])
    rng = np.random.default_rng(seed)
    q, k, v = arrays_of(rng, kind, B=7, H=2, Hkv=1, L=rows, S=n_keys)
    options = {"query_lengths": q_lengths, "kv_lengths": k_lengths}
    out, lse = fa.attention(q, k, v, return_lse=True, **options)
    for threads in 1, 2, 3:
        result = fa.attention(q, k, v, return_lse=True, num_threads=threads, **options)
        assert_same(result, out, lse, {"kind": kind, "threads": threads, "seed": seed})
    for b, (m, n) in enumerate(zip(q_lengths, k_lengths)):
        one = slice(b, b + 1)
        result = fa.attention(q[one, :, :m], k[one, :, :n], v[one, :, :n], return_lse=True)
        assert_same(result, out[one, :, :m], lse[one, :, :m], {"kind": kind, "batch": b, "seed": seed})


@each_kind
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_live_and_hidden_infinities_in_splits(bad, kind, seed):
    """In each split in turn, seen by all rows, by some, or by none."""
    n_keys, rows = 2 * SPLIT + 50, 3
    rng = np.random.default_rng(seed)
    of_query, of_key = dtypes_of(kind)
    q, k, v = inputs(rng, (1,), 2, 1, rows, n_keys, D, Dv)  # no weight is so small that it becomes 0
    q, k, v = q.astype(of_query), k.astype(of_key), v.astype(of_key)
    mask = np.ones((rows, n_keys), bool)
    mask[1, ::2] = False
    mask[2, SPLIT : 2 * SPLIT] = False
    for at in 0, 1, SPLIT - 1, SPLIT, SPLIT + 2, 2 * SPLIT - 1, 2 * SPLIT, n_keys - 2, n_keys - 1:
        for options in {}, {"mask": mask}, {"causal": True}, {"kv_lengths": at}, {"mask": mask, "kv_lengths": at + 1}:
            context = {"kind": kind, "at": at, "poison": bad, "options": list(options), "seed": seed}
            clean, clean_lse = fa.attention(q, k, v, return_lse=True, **options)
            seen = np.ones((rows, n_keys), bool) & options.get("mask", True)
            if "causal" in options:
                seen &= np.arange(n_keys) <= np.arange(rows)[:, None] + n_keys - rows
            seen = (seen & (np.arange(n_keys) < options.get("kv_lengths", n_keys)))[:, at]
            for where, array in ("value", v), ("key", k):
                saved = array[0, 0, at].copy()
                array[0, 0, at, 2] = bad
                out, lse = fa.attention(q, k, v, return_lse=True, num_threads=2, **options)
                if where == "value":
                    true, allowed = exact(q, k, v, **options), bound(q, k, v, **options)
                    assert_close(out, true[0], allowed.out, context)
                    assert_same_bits(lse, clean_lse, context)
                array[0, 0, at] = saved
                assert_same((out[:, :, ~seen], lse[:, :, ~seen]), clean[:, :, ~seen], clean_lse[:, :, ~seen],
                            {**context, "in": where})
                if where == "key" and np.isnan(bad):
                    assert np.isnan(out[:, :, seen]).all() and np.isnan(lse[:, :, seen]).all(), context


# --- heads whose keys lie side by side, which a task takes together ---

@each_kind
@pytest.mark.parametrize("layout", ["inside rows", "pages of 16", "pages of 40"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": (90, 0)}, {"window": (2000, 0)}], ids=str)
def test_heads_side_by_side(options, layout, kind, seed):
    """The bits of heads that lie apart, alone and on any number of threads."""
    rng = np.random.default_rng(seed)
    lengths = np.array([SPLIT + 150, 1, 300, 96, 0])
    most = lengths.max()
    for heads, rows in [(8, 1), (10, 6), (22, 3)]:
        q, k, v = arrays_of(rng, kind, B=5, H=heads, Hkv=heads // 2, L=rows, S=most, D=64, Dv=64)
        context = {"kind": kind, "heads": heads, "rows": rows, "seed": seed}
        more = options | {"kv_lengths": lengths, "query_offset": lengths - rows}
        out = fa.attention(q, k, v, **more)
        if layout == "inside rows":
            k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
            calls = {n: functools.partial(fa.attention, q, k, v, num_threads=n, **more) for n in (1, 2, 3)}
        elif kind == "float64":
            pytest.skip("caches hold float32 and less")
        else:
            page = int(layout.split()[-1])
            cache = fa.KVCache(-(-most // page) * 2, page, heads // 2, 64, dtype=k.dtype.name)
            cache._free[:] = rng.permutation(cache.num_pages)
            cache.append(range(5), k, v, lengths)
            calls = {n: functools.partial(cache.attend, q, range(5), num_threads=n, **options) for n in (1, 2, 3)}
        for threads, call in calls.items():
            assert_same_bits(call(), out, {**context, "threads": threads})
        for b, h in [(0, heads - 1), (2, 1)]:
            one = [x[b : b + 1, i : i + 1] for x, i in ((q, h), (k, h // 2), (v, h // 2))]
            alone = {"query_offset": int(lengths[b]) - rows, "kv_lengths": lengths[b : b + 1]} | options
            assert_same_bits(fa.attention(*one, **alone), out[b : b + 1, h : h + 1], {**context, "batch": b, "head": h})


@each_kind
def test_heads_side_by_side_do_not_share_a_nan(kind, seed):
    """A value of one head that is not finite stays with the rows of that head which see it."""
    rng = np.random.default_rng(seed)
    q, k, v = arrays_of(rng, kind, B=4, H=8, Hkv=8, L=3, S=400, D=64, Dv=64)
    clean = fa.attention(q, k, v, causal=True, query_offset=397)
    v[1, 2, 399], v[2, 5, 398, 7] = NAN, INF
    k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
    out = fa.attention(q, k, v, causal=True, query_offset=397)
    touched = np.zeros(out.shape, bool)
    touched[1, 2, 2] = touched[2, 5, 1:, 7] = True
    assert not np.isfinite(out[touched]).any()
    assert_same_bits(out[~touched], clean[~touched], {"kind": kind, "seed": seed})
