"""KVCache against plain lists: what each sequence holds, what attention over it gives, and where its pages went."""

import doctest
import math
import re

import numpy as np
import pytest
from cases import assert_close, bound, exact, few_rows, generator
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from layouts import LAYOUTS, assert_same_bits

import fastattn as fa
from fastattn import cache as module
from fastattn import checks, masks
from fastattn.positions import Rotary, apply_rotary, rotary

F16, F32, F64 = np.float16, np.float32, np.float64
NAN, INF = np.nan, np.inf
H, Hkv, D, Dv = 4, 2, 6, 3
DTYPES = list(module.DTYPES)
INT8_ERROR = 0.5 + 2.0**-16  # of a scale

each_dtype = pytest.mark.parametrize("dtype", DTYPES)


def tokens(rng, B, L, dtype=F32):
    """key (B, Hkv, L, D) and value (B, Hkv, L, Dv)."""
    return tuple(rng.standard_normal((B, Hkv, L, n)).astype(dtype) for n in (D, Dv))


def as_stored(x, dtype):
    """float32 rows (..., D) after they were in a cache, by definition."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return x.astype(F16).astype(F32)
    if dtype == "bfloat16":
        return x.astype(pytest.importorskip("ml_dtypes").bfloat16).astype(F32)
    scale = np.maximum(abs(x).max(axis=-1, keepdims=True) / F32(127), F32(2.0**-126))
    return (np.rint(x / scale) + F32(0)) * scale  # codes have no -0


def held(cache, sequence_id):
    """key (Hkv, n, D) and value (Hkv, n, Dv) as float32, read a token at a time; NaN where a page was given back."""
    row, pools = cache._rows[sequence_id], cache._pools
    n = int(cache._length[row])
    arrays = []
    for pool, scales in (pools.key, pools.key_scale), (pools.value, pools.value_scale):
        array = np.full((cache.kv_heads, n, pool.shape[3]), NAN, F32)
        for p in range(n):
            page, place = int(cache._tables[row, p // cache.page_size]), p % cache.page_size
            if page >= 0:
                x = pool[page, :, place]
                if cache.dtype == "bfloat16":
                    x = (x.astype(np.uint32) << 16).view(F32)
                array[:, p] = x.astype(F32) if scales is None else x.astype(F32) * scales[page, :, place, None]
        arrays.append(array)
    return arrays


def state(cache):
    """All that a call may change, as a comparable value."""
    arrays = (*(pool for pool in cache._pools if pool is not None), cache._references,
              cache._free[: cache.num_free_pages], cache._length, cache._hole_begin, cache._hole_end, cache._tables)
    return [x.tobytes() for x in arrays], dict(cache._rows), list(cache._free_rows), cache.num_free_pages


def check_pages(cache):
    """The rules of the module: nothing leaks, nothing is counted twice, nothing is in two places."""
    used = list(cache._rows.values())
    size = cache.page_size
    assert sorted(used + cache._free_rows) == list(range(len(cache._length))), "rows"
    for row in cache._free_rows:
        assert cache._length[row] == cache._hole_begin[row] == cache._hole_end[row] == 0
        assert (cache._tables[row] == -1).all()
    for row in used:
        n, begin, end = (int(x[row]) for x in (cache._length, cache._hole_begin, cache._hole_end))
        assert 0 <= begin <= end <= n and (begin < end or end == 0), "hole"
        table = cache._tables[row].tolist()
        pages = [page for page in table if page >= 0]
        assert len(set(pages)) == len(pages), "a page twice in a table"
        for index, page in enumerate(table):
            first, last = index * size, min((index + 1) * size, n) - 1
            assert -1 <= page < cache.num_pages
            assert (page >= 0) <= (first < n), "a page past the end"
            assert page >= 0 or first >= n or begin <= first and last < end, "a token without a page"
            assert page < 0 or not begin <= first <= first + size <= end, "a page of dropped tokens"
    pages = cache._tables[used]
    counts = np.bincount(pages[pages >= 0], minlength=cache.num_pages + 1)
    assert counts.tolist() == cache._references.tolist(), "references"
    free = cache._free[: cache.num_free_pages].tolist()
    assert sorted(free) == np.flatnonzero(counts[:-1] == 0).tolist(), "free pages"


def poison(cache):
    """Spoil every place that no sequence may read."""
    seen = np.zeros((cache.num_pages, cache.page_size), bool)
    for row in cache._rows.values():
        for p in range(int(cache._length[row])):
            if not cache._hole_begin[row] <= p < cache._hole_end[row]:
                seen[cache._tables[row, p // cache.page_size], p % cache.page_size] = True
    unseen = ~np.broadcast_to(seen[:, None], cache._pools.key.shape[:3])
    for pool in cache._pools:
        if pool is not None:
            pool[unseen] = {"u": 0x7FC0, "i": 99}.get(pool.dtype.kind, NAN)


def check_attend(cache, query, ids, keys, values, hidden=None, cu_q=None, context=(), table=None, **options):
    """out and lse within the bound of attention over dense arrays.

    keys, values: for each id (Hkv, n, D) and (Hkv, n, Dv), as stored; hidden: for each id bool (n,).
    """
    given = dict(options, cu_seqlens_q=cu_q, rotary=table)
    out, lse = cache.attend(query, ids, return_lse=True, **{k: v for k, v in given.items() if v is not None})
    rows = [query.shape[2]] * len(ids) if cu_q is None else np.diff(cu_q).tolist()
    assert out.dtype == lse.dtype == F32 and out.shape == (*query.shape[:-1], cache.value_dim)
    assert out.ctypes.data % 64 == 0 and lse.shape == query.shape[:-1]
    counts = np.broadcast_to(options.pop("query_lengths", rows), len(ids)).tolist()
    L, S = max(rows, default=0), max((k.shape[1] for k in keys), default=0)
    wide = {name: np.broadcast_to(options.pop(name), (len(ids), H, L, S)) for name in ("mask", "bias")
            if isinstance(options.get(name), np.ndarray)}
    for b in range(len(ids)):
        n, part = keys[b].shape[1], slice(None) if cu_q is None else slice(cu_q[b], cu_q[b + 1])
        one, one_out, one_lse = (x[b] if cu_q is None else x[part].swapaxes(0, 1) for x in (query, out, lse))
        one, n_rows = np.array(one), rows[b]
        if table is not None:
            one[:, : counts[b]] = apply_rotary(one[:, : counts[b]], table, n - counts[b])
        its = {name: x[b, :, :n_rows, :n] for name, x in wide.items()}
        if hidden is not None and hidden[b].any():
            its["mask"] = its.get("mask", True) & np.broadcast_to(~hidden[b], (H, n_rows, n))
        key, value = keys[b].copy(), values[b].copy()
        if hidden is not None:
            key[:, hidden[b]] = value[:, hidden[b]] = 0
        arguments = {**options, **its, "query_offset": n - counts[b], "query_lengths": counts[b]}
        allowed = bound(one, key, value, **arguments)
        true, true_lse = exact(one, key, value, **arguments)
        where = {**dict(context), "ids": ids, "sequence": b, "length": n}
        assert_close(one_out, true, allowed.out, {**where, "result": "out"})
        assert_close(one_lse, true_lse, allowed.lse, {**where, "result": "lse"})
    return out


# --- any program against plain lists ---

class Token:
    def __init__(self, key, value):
        self.key, self.value, self.dropped = key, value, False


class Program(RuleBasedStateMachine):
    """Sequences are lists of tokens; their pages a dict from index to a number that stands for a page."""

    IDS = [0, 1, 2, 3, 2**70]

    def __init__(self):
        super().__init__()
        self.lists, self.pages, self.next_page = {}, {}, 0

    @initialize(dtype=st.sampled_from(DTYPES), num_pages=st.integers(8, 40), page_size=st.integers(1, 5),
                turns=st.booleans(), number=st.integers(0, 2**32 - 1), L=st.integers(1, 8))
    def start(self, dtype, num_pages, page_size, turns, number, L):
        self.cache = fa.KVCache(num_pages, page_size, Hkv, D, value_dim=Dv, dtype=dtype)
        self.table = rotary(200, 4, interleaved=True) if turns else None
        self.rng = np.random.default_rng(number)
        self.append_tokens([0, 1], L)

    def known(self, data, repeat=False):
        return data.draw(st.lists(st.sampled_from(sorted(self.lists)), min_size=1, max_size=4, unique=not repeat))

    def new_page(self):
        self.next_page += 1
        return self.next_page

    @rule(data=st.data(), ids=st.lists(st.sampled_from(IDS), min_size=1, unique=True), L=st.integers(0, 12),
          ragged=st.booleans())
    def append(self, data, ids, L, ragged):
        self.append_tokens(ids, L, [data.draw(st.integers(0, L)) for _ in ids] if ragged else None)

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def decode(self, data):
        self.append_tokens(self.known(data), 1)

    def append_tokens(self, ids, L, lengths=None):
        counts = [L] * len(ids) if lengths is None else lengths
        key, value = tokens(self.rng, len(ids), L)
        pages = {i: dict(table) for i, table in self.pages.items()}
        needed = 0
        for i, n in zip(ids, counts):
            table, length = pages.setdefault(i, {}), len(self.lists.get(i, ()))
            for index in sorted({p // self.cache.page_size for p in range(length, length + n)}):
                shared = sum(table.get(index) in other.values() for other in pages.values()) > 1
                if index not in table or shared:
                    table[index] = self.new_page()
                    needed += 1
        free, before = self.cache.num_free_pages, state(self.cache)
        arguments = ids, key, value, lengths
        if needed > free:
            with pytest.raises(MemoryError, match=f"no pages for the new tokens: {needed} needed, {free} free"):
                self.cache.append(*arguments, rotary=self.table)
            assert state(self.cache) == before
            return
        self.cache.append(*arguments, rotary=self.table)
        self.pages = pages
        for b, i in enumerate(ids):
            tokens_of = self.lists.setdefault(i, [])
            for j in range(counts[b]):
                k, v = key[b, :, j], value[b, :, j]
                if self.table is not None:
                    k = apply_rotary(k[:, None], self.table, len(tokens_of))[:, 0]
                tokens_of.append(Token(*(as_stored(x, self.cache.dtype) for x in (k, v))))

    @precondition(lambda self: self.lists and len(self.lists) < len(self.IDS))
    @rule(data=st.data())
    def fork(self, data):
        source = self.known(data)[0]
        unknown = [i for i in self.IDS if i not in self.lists]
        new = data.draw(st.lists(st.sampled_from(unknown), min_size=1, unique=True))
        self.cache.fork(source, new[0] if len(new) == 1 else new)
        for i in new:
            self.lists[i] = []
            for token in self.lists[source]:
                self.lists[i].append(Token(token.key, token.value))
                self.lists[i][-1].dropped = token.dropped
            self.pages[i] = dict(self.pages[source])

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def free(self, data):
        ids = self.known(data)[:2]
        self.cache.free(ids)
        for i in ids:
            del self.lists[i], self.pages[i]

    @precondition(lambda self: self.lists)
    @rule(data=st.data())
    def truncate(self, data):
        ids = self.known(data)
        new = [len(self.lists[i]) - data.draw(st.integers(0, len(self.lists[i]))) for i in ids]
        self.cache.truncate(ids, new)
        for i, n in zip(ids, new):
            del self.lists[i][n:]
            self.pages[i] = {index: page for index, page in self.pages[i].items() if index * self.cache.page_size < n}

    @precondition(lambda self: self.lists)
    @rule(data=st.data(), window=st.integers(0, 12), sinks=st.integers(0, 4) | st.integers(0, 15))
    def evict(self, data, window, sinks):
        ids = self.known(data)
        self.cache.evict(ids, window, sinks=sinks)
        size = self.cache.page_size
        for i in ids:
            dropped = [p for p in range(len(self.lists[i])) if sinks <= p < len(self.lists[i]) - window]
            if not dropped:
                continue
            dropped += [p for p, token in enumerate(self.lists[i]) if token.dropped]
            for p in range(min(dropped), max(dropped) + 1):
                self.lists[i][p].dropped = True
            whole = {p for p, token in enumerate(self.lists[i]) if token.dropped}
            self.pages[i] = {index: page for index, page in self.pages[i].items()
                             if not whole.issuperset(range(index * size, (index + 1) * size))}

    @precondition(lambda self: self.lists)
    @rule(data=st.data(), L=st.integers(0, 4), causal=st.booleans(), window=st.none() | st.integers(0, 6),
          packed=st.booleans(), ragged=st.booleans())
    def attend(self, data, L, causal, window, packed, ragged):
        ids = self.known(data, repeat=True)
        # A query before the first token has no position to turn to.
        most = [min(L, len(self.lists[i])) if self.table is not None else L for i in ids]
        rows = [data.draw(st.integers(0, n)) for n in most] if packed else [min(most)] * len(ids)
        options = {"causal": causal, "window": window}
        if ragged:
            options["query_lengths"] = np.array([data.draw(st.integers(0, n)) for n in rows], int)
        cu_q = np.cumsum([0, *rows]) if packed else None
        shape = (cu_q[-1], H, D) if packed else (len(ids), H, rows[0], D)
        dense = [self.dense(i) for i in ids]
        poison(self.cache)
        check_attend(self.cache, self.rng.standard_normal(shape).astype(F32), ids, *zip(*dense), cu_q=cu_q,
                     table=self.table, context=options, **options)

    def dense(self, i):
        """key (Hkv, n, D), value (Hkv, n, Dv), dropped (n,)."""
        key, value = np.zeros((Hkv, len(self.lists[i]), D), F32), np.zeros((Hkv, len(self.lists[i]), Dv), F32)
        for p, token in enumerate(self.lists[i]):
            key[:, p], value[:, p] = token.key, token.value
        return key, value, np.array([token.dropped for token in self.lists[i]], bool)

    @invariant()
    def pages_are_accounted_for(self):
        if not hasattr(self, "cache"):
            return
        check_pages(self.cache)
        pages = {page for table in self.pages.values() for page in table.values()}
        assert self.cache.num_free_pages == self.cache.num_pages - len(pages)
        for i, table in self.pages.items():
            entries = self.cache._tables[self.cache._rows[i]]
            assert np.flatnonzero(entries >= 0).tolist() == sorted(table), "entries"

    @invariant()
    def sequences_hold_their_tokens(self):
        if not hasattr(self, "cache"):
            return
        assert sorted(self.cache._rows) == sorted(self.lists) and len(self.cache) == len(self.lists)
        assert all((i in self.cache) == (i in self.lists) for i in self.IDS)
        ids = list(self.lists)
        assert self.cache.lengths(ids).tolist() == [len(self.lists[i]) for i in ids]
        for i in ids:
            key, value, dropped = self.dense(i)
            row = self.cache._rows[i]
            hole = np.arange(len(dropped))
            hole = (hole >= self.cache._hole_begin[row]) & (hole < self.cache._hole_end[row])
            assert hole.tolist() == dropped.tolist()
            for array, expected in zip(held(self.cache, i), (key, value)):
                assert_same_bits(array[:, ~dropped], expected[:, ~dropped], {"id": i, "dtype": self.cache.dtype})

    def teardown(self):
        if hasattr(self, "cache"):
            self.cache.free(list(self.lists))
            check_pages(self.cache)
            assert self.cache.num_free_pages == self.cache.num_pages and len(self.cache) == 0


def test_any_program():
    run_state_machine_as_test(Program, settings=settings(max_examples=250, stateful_step_count=40))


# --- what is stored ---

def special_floats(rng):
    """float32 of every kind: any bits, halfway between two 16-bit floats, denormal, Inf, NaN with any payload."""
    bits = rng.integers(0, 2**32, 100_000, np.uint32)
    half = rng.integers(0, 2**16, 20_000, np.uint32) << 16 | 0x8000
    sixteenth = rng.integers(0, 2**19, 20_000, np.uint32) << 13 | 0x1000
    some = [0, 0x80000000, 1, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFFFFFFF, 0x7F7FFFFF, 0x7FFFFFFF]
    x = np.concatenate([bits, half, half - 1, half + 1, sixteenth, np.array(some, np.uint32)]).view(F32)
    return x[: len(x) // (Hkv * D) * (Hkv * D)]


def test_bfloat16_rounds_to_nearest_even(seed):
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    x = special_floats(generator(seed)).reshape(1, Hkv, -1, D)
    cache = fa.KVCache(1, x.shape[2], Hkv, D, dtype="bfloat16")
    with np.errstate(all="raise"):
        cache.append(0, x, x)
    stored = cache._pools.key.view(bfloat16)
    with np.errstate(all="ignore"):
        expected = x.astype(bfloat16)
    nan = np.isnan(x)
    assert np.isnan(stored[nan].astype(F32)).all() and not np.isnan(stored[~nan].astype(F32)).any()
    assert_same_bits(cache._pools.key[~nan], expected[~nan].view(np.uint16), {"seed": seed})
    assert_same_bits(cache._pools.value, cache._pools.key, {})
    # Its own dtype comes in as it is.
    again = fa.KVCache(1, x.shape[2], Hkv, D, dtype="bfloat16")
    again.append(0, stored, stored)
    assert_same_bits(again._pools.key, cache._pools.key, {})


def test_float16_rounds_to_nearest_even(seed):
    x = special_floats(generator(seed)).reshape(1, Hkv, -1, D)
    cache = fa.KVCache(1, x.shape[2], Hkv, D, dtype="float16")
    with np.errstate(all="raise"):
        cache.append(0, x, x)
    stored = cache._pools.key
    nan = np.isnan(x)
    assert stored.dtype == F16 and np.isnan(stored[nan]).all()
    with np.errstate(all="ignore"):
        assert_same_bits(stored[~nan], x[~nan].astype(F16), {"seed": seed})
    again = fa.KVCache(1, x.shape[2], Hkv, D, dtype="float16")
    again.append(0, stored, stored)
    assert_same_bits(again._pools.key, stored, {})


def test_int8(seed):
    """One scale for each token and head; nothing is off by more than h of it."""
    x = generator(seed).standard_normal((1, Hkv, 400, D)).astype(F32)
    x *= np.exp2(generator(seed, 1).integers(-149, 125, (1, 1, 400, 1))).astype(F32)
    x[0, :, 7] = 0
    x[0, 0, 8], x[0, 1, 8] = np.finfo(F32).max, np.finfo(F32).smallest_subnormal
    cache = fa.KVCache(1, 400, Hkv, D, dtype="int8")
    with np.errstate(all="raise"):
        cache.append(0, x, x)
    codes, scales = cache._pools.key[0].astype(F64), cache._pools.key_scale[0].astype(F64)
    assert cache._pools.key.dtype == np.int8 and cache._pools.key_scale.dtype == F32
    assert scales.shape == (Hkv, 400) and abs(codes).max() == 127
    largest = abs(x[0].astype(F64)).max(axis=-1)
    normal = largest >= 127 * 2.0**-126
    np.testing.assert_allclose(scales[normal], largest[normal] / 127, rtol=2.0**-23)  # the largest is rounded down
    assert (scales[~normal] == 2.0**-126).all()
    assert (abs(codes).max(axis=-1)[normal] == 127).all()
    assert (codes[:, 7] == 0).all()
    key, value = held(cache, 0)
    assert (abs(key - x[0].astype(F64)) <= INT8_ERROR * scales[..., None]).all()
    assert_same_bits(key, value, {})


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_int8_does_not_hide_nan_and_inf(bad, seed):
    rng = generator(seed)
    key, value = tokens(rng, 1, 9)
    key[0, 1, 4, 2] = bad
    value[0, 0, 6, 0] = bad
    cache = fa.KVCache(4, 4, Hkv, D, value_dim=Dv, dtype="int8")
    with np.errstate(all="raise"):
        cache.append(0, key, value)
    (k, v) = held(cache, 0)
    assert np.isnan(k[1, 4]).all() and np.isnan(k).sum() == D
    assert np.isnan(v[0, 6]).all() and np.isnan(v).sum() == Dv
    query = rng.standard_normal((1, H, 9, D)).astype(F32)
    out = cache.attend(query, 0, causal=True)[0]
    wrong = np.isnan(out).all(axis=-1)
    assert np.isfinite(out[~wrong]).all()
    assert wrong.tolist() == [[i >= (6 if h < H // Hkv else 4) for i in range(9)] for h in range(H)]


@pytest.mark.parametrize("options", [
    {}, {"causal": True}, {"scale": -1.5}, {"softcap": 2.0}, {"window": 5}, {"sinks": True},
], ids=str)
@pytest.mark.parametrize("size", [0.1, 1, 5])
@pytest.mark.parametrize("path", ["few", "many"])
def test_int8_bound(path, size, options, seed):
    """|out - exact| <= (e^(2 d) - 1) sum p |v| + e^(2 d) h sum p vs, as documented; and d itself."""
    rng = generator(seed, path, size, str(options))
    head, n = 32, 150
    L = few_rows(head, F32) if path == "few" else 40
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = rng.standard_normal(H).astype(F32)
    key, value = rng.standard_normal((2, 1, Hkv, n, head)).astype(F32)
    key *= F32(size)
    key[0, :, ::13] *= 20  # a few large rows, and single large features, as in real keys
    key[0, :, :, 3] *= 6
    query = rng.standard_normal((1, H, L, head)).astype(F32)
    table = rotary(n, head)
    cache = fa.KVCache(20, 16, Hkv, head, dtype="int8")
    cache.append(0, key, value, rotary=table)
    out = cache.attend(query, 0, rotary=table, **options)[0].astype(F64)

    q, k = apply_rotary(query, table, n - L)[0], apply_rotary(key, table)[0]
    v = value[0]
    arguments = {"query_offset": n - L, **options}
    true = exact(q, k, v, **arguments)[0]
    scales = []
    for x in (k, v):
        scales.append(np.maximum(abs(x).max(axis=-1) / F32(127), F32(2.0**-126)).astype(F64))
    rounding = bound(q, *held(cache, 0), **arguments).out
    problem = checks.problem(q, k, v, **arguments)
    stored_problem = checks.problem(q, *held(cache, 0), **arguments)
    a = abs(options.get("scale", 1 / math.sqrt(head)))
    share = []
    for h in range(H):
        g = h // (H // Hkv)
        scores, visible = fa.reference.logits(problem, 0, (h,), (g,), F64)
        stored_scores, _ = fa.reference.logits(stored_problem, 0, (h,), (g,), F64)
        with np.errstate(over="ignore"):  # of scores that are not visible
            p = fa.reference.softmax(scores, visible, fa.reference.sink(problem, (h,), F64))[0]
        delta = a * abs(q[h].astype(F64)).sum(axis=1)[:, None] * INT8_ERROR * scales[0][g]
        assert (abs(stored_scores - scores) <= delta * (1 + 1e-9)).all()
        d = delta.max(axis=1, where=visible, initial=0)[:, None]
        with np.errstate(over="ignore"):
            of_values = INT8_ERROR * (p @ scales[1][g])[:, None]
            allowed = np.expm1(2 * d) * (p @ abs(v[g].astype(F64))) + np.exp(2 * d) * of_values
        error = abs(out[h] - true[h])
        assert (error <= allowed + rounding[h]).all(), f"head {h}: {(error / allowed).max()} of the bound, seed={seed}"
        share.append(error / allowed)
    assert np.max(share) > 1e-3 or size > 0.1, "a bound that says nothing"


# --- append ---

@each_dtype
def test_ragged_lengths(dtype, seed):
    """Only the tokens that count are read."""
    rng = generator(seed)
    counts = [0, 3, 7, 1, 5]
    key, value = tokens(rng, 5, 7)
    for b, n in enumerate(counts):
        key[b, :, n:] = value[b, :, n:] = NAN
    cache = fa.KVCache(16, 4, Hkv, D, value_dim=Dv, dtype=dtype)
    for lengths in (counts, np.array(counts, np.uint8)):
        cache.append(range(5), key, value, lengths)
    assert cache.lengths(range(5)).tolist() == [2 * n for n in counts]
    for b, n in enumerate(counts):
        for array, x in zip(held(cache, b), (key, value)):
            assert_same_bits(array, as_stored(np.concatenate([x[b, :, :n]] * 2, axis=1), dtype), {"sequence": b})
    check_pages(cache)


@each_dtype
def test_token_by_token_is_the_same(dtype, seed):
    """In any pieces, the same bits."""
    rng = generator(seed)
    key, value = tokens(rng, 3, 23)
    whole, pieces = (fa.KVCache(40, 3, Hkv, D, value_dim=Dv, dtype=dtype) for _ in range(2))
    table = rotary(23, D)
    whole.append([0, 1, 2], key, value, rotary=table)
    at = 0
    for n in (1, 1, 2, 0, 5, 1, 1, 1, 9, 2):
        pieces.append([0, 1, 2], key[:, :, at : at + n], value[:, :, at : at + n], rotary=table)
        at += n
    for b in range(3):
        for one, other in zip(held(whole, b), held(pieces, b)):
            assert_same_bits(one, other, {"sequence": b})


@each_dtype
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
@pytest.mark.parametrize("dim", [D, 2, 0])
def test_rotary(dim, interleaved, dtype, seed):
    """Turned on the way in: the same bits as apply_rotary before, for keys and for queries."""
    rng = generator(seed, dim)
    table = rotary(64, dim, interleaved=interleaved)
    fused, before = (fa.KVCache(32, 4, Hkv, D, value_dim=Dv, dtype=dtype) for _ in range(2))
    past, counts = [5, 0, 9], [3, 7, 0]
    for lengths in past, counts, [1, 1, 1], None:
        key, value = tokens(rng, 3, 1 if lengths in ([1, 1, 1], None) else 9)
        old = [int(fused.lengths(b)[0]) if b in fused else 0 for b in range(3)]
        fused.append(range(3), key, value, lengths, rotary=table)
        before.append(range(3), apply_rotary(key, table, np.array(old)[:, None]), value, lengths)
    n = before.lengths(range(3))
    assert n.tolist() == [10, 9, 11]
    for b in range(3):
        for one, other in zip(held(fused, b), held(before, b)):
            assert_same_bits(one, other, {"sequence": b})
    query = rng.standard_normal((3, H, 6, D)).astype(F32)
    turned = apply_rotary(query, table, n[:, None] - 6)
    assert_same_bits(fused.attend(query, range(3), rotary=table, causal=True),
                     before.attend(turned, range(3), causal=True), {})
    # Ragged rows end at the last token: query 0 of sequence 1 is at n - 2.
    lengths = [6, 2, 0]
    turned = apply_rotary(query, table, (n - lengths)[:, None])
    out = fused.attend(query, range(3), rotary=table, causal=True, query_lengths=lengths)
    assert_same_bits(out, before.attend(turned, range(3), causal=True, query_lengths=lengths), {})
    assert (out[1, :, 2:] == 0).all() and (out[2] == 0).all()
    # Rows that do not count may have positions past the table.
    shortest = Rotary(table.cos[: n.max()], table.sin[: n.max()], interleaved)
    assert_same_bits(fused.attend(query, range(3), rotary=shortest, causal=True, query_lengths=lengths), out, {})
    cu_q = np.cumsum([0, *lengths])
    packed = np.concatenate([x[:, :m].swapaxes(0, 1) for x, m in zip(query, lengths)])
    result = fused.attend(packed, range(3), rotary=table, causal=True, cu_seqlens_q=cu_q)
    for b, m in enumerate(lengths):
        np.testing.assert_allclose(result[cu_q[b] : cu_q[b + 1]].swapaxes(0, 1), out[b, :, :m], rtol=0, atol=1e-6)
    # 16-bit keys are turned in float32 and rounded once.
    if dtype == "float16":
        key, value = tokens(rng, 1, 5, F16)
        fused.append(7, key, value, rotary=table)
        assert_same_bits(held(fused, 7)[0], apply_rotary(key.astype(F32), table)[0].astype(F16).astype(F32), {})
    if dtype == "bfloat16":
        key, value = (x.astype(pytest.importorskip("ml_dtypes").bfloat16) for x in tokens(rng, 1, 5))
        fused.append(7, key, value, rotary=table)
        expected = apply_rotary(key.astype(F32), table)[0].astype(key.dtype).astype(F32)
        assert_same_bits(held(fused, 7)[0], expected, {})


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, seed):
    key, value = tokens(generator(seed), 2, 5)
    caches = [fa.KVCache(8, 2, Hkv, D, value_dim=Dv, dtype=dtype) for _ in range(2)]
    for cache, arrays in zip(caches, [(key, value), (LAYOUTS[layout](key), LAYOUTS[layout](value))]):
        before = [x.tobytes() for x in arrays]
        cache.append([4, 9], *arrays, [5, 3])
        assert [x.tobytes() for x in arrays] == before, "an input was modified"
    assert state(caches[0]) == state(caches[1])


def test_ids():
    key, value = tokens(generator(0), 1, 1)
    cache = fa.KVCache(16, 2, Hkv, D, value_dim=Dv)
    for ids in (3, np.int64(4), [5], (6,), np.array([7]), np.array([8], np.uint8), range(9, 10), [2**70],
                [np.int32(0)]):
        cache.append(ids, key, value)
    assert sorted(cache._rows) == [0, *range(3, 10), 2**70] and all(type(i) is int for i in cache._rows)
    assert 2**70 in cache and np.uint8(3) in cache and 1 not in cache and 3.0 not in cache and "a" not in cache
    assert None not in cache and True not in cache
    cache.append([], key[:0], value[:0])
    cache.append(np.array([]), key[:0], value[:0])
    assert len(cache) == 9
    assert cache.lengths([3, 3, 2**70]).tolist() == [1, 1, 1] and cache.lengths(3).shape == (1,)
    cache.free([])
    cache.free([3, 2**70])
    assert 3 not in cache and len(cache) == 7
    check_pages(cache)


def test_an_empty_sequence():
    cache = fa.KVCache(2, 2, Hkv, D, value_dim=Dv)
    key, value = tokens(generator(0), 1, 0)
    cache.append(5, key, value)
    assert 5 in cache and cache.lengths(5) == 0 and cache.num_free_pages == 2
    out, lse = cache.attend(np.ones((1, H, 2, D), F32), 5, return_lse=True)
    assert (out == 0).all() and (lse == -INF).all()
    assert cache.attend(np.ones((0, H, 2, D), F32), []).shape == (0, H, 2, Dv)
    assert cache.attend(np.ones((0, H, D), F32), [], cu_seqlens_q=[0]).shape == (0, H, Dv)
    cache.evict(5, 0)
    cache.truncate(5, 0)
    cache.fork(5, 6)
    cache.fork(5, [])
    cache.free([5, 6])
    check_pages(cache)


def test_state_grows(seed):
    """More sequences and longer tables than there is room for at first."""
    rng = generator(seed)
    cache = fa.KVCache(400, 2, Hkv, D, value_dim=Dv)
    expected = {}
    for i in range(5 * module.FIRST_ROWS):
        n = i % 7
        key, value = tokens(rng, 1, n)
        cache.append(i, key, value)
        expected[i] = [key[0], value[0]]
    ids = list(range(0, 5 * module.FIRST_ROWS, 3))
    key, value = tokens(rng, len(ids), 4 * module.FIRST_ENTRIES)
    cache.append(ids, key, value)
    for b, i in enumerate(ids):
        expected[i] = [np.concatenate((old, new[b]), axis=1) for old, new in zip(expected[i], (key, value))]
    new = list(range(100, 100 + 20 * module.FIRST_ROWS))
    cache.fork(ids[0], new)
    expected |= dict.fromkeys(new, expected[ids[0]])
    one = tokens(rng, 1, 1)
    cache.append(new[-1], *one)
    expected[new[-1]] = [np.concatenate((old, x[0]), axis=1) for old, x in zip(expected[new[-1]], one)]
    for i, arrays in expected.items():
        for array, x in zip(held(cache, i), arrays):
            assert_same_bits(array, x, {"id": i})
    check_pages(cache)
    cache.free(list(expected))
    check_pages(cache)
    assert cache.num_free_pages == 400


# --- pages ---

def test_copy_on_write(seed):
    rng = generator(seed)
    cache = fa.KVCache(8, 4, Hkv, D, value_dim=Dv)
    key, value = tokens(rng, 1, 6)
    cache.append(0, key, value)
    cache.fork(0, [1, 2])
    assert cache.num_free_pages == 6
    tables = cache._tables[[cache._rows[i] for i in (0, 1, 2)], :2]
    assert (tables == tables[0]).all() and cache._references[tables[0]].tolist() == [3, 3]
    # Three holders of the last page, two of them in one call: both copy it.
    more = tokens(rng, 2, 1)
    cache.append([1, 2], *more)
    assert cache.num_free_pages == 4
    # One is left, and keeps it.
    last = int(cache._tables[cache._rows[0], 1])
    cache.append(0, more[0][:1], more[1][:1])
    assert cache.num_free_pages == 4 and cache._tables[cache._rows[0], 1] == last and cache._references[last] == 1
    for i, b in (0, 0), (1, 0), (2, 1):
        assert_same_bits(held(cache, i)[0], np.concatenate((key[0], more[0][b]), axis=1), {"id": i})
    check_pages(cache)
    # All holders in one call: the last one keeps the page.
    cache.fork(0, 3)
    cache.append([3, 0], *tokens(rng, 2, 1))
    assert cache.num_free_pages == 3
    # A full page is not copied.
    cache.fork(0, 4)
    cache.append(4, *tokens(rng, 1, 1))
    assert cache.num_free_pages == 2
    check_pages(cache)


def test_copy_of_a_shortened_fork(seed):
    """The shorter one must not write over what the longer one sees."""
    rng = generator(seed)
    cache = fa.KVCache(4, 4, Hkv, D, value_dim=Dv)
    key, value = tokens(rng, 1, 4)
    cache.append(0, key, value)
    cache.fork(0, 1)
    cache.truncate(1, 1)
    new = tokens(rng, 1, 2)
    cache.append(1, *new)
    assert_same_bits(held(cache, 0)[0], key[0], {})
    assert_same_bits(held(cache, 1)[0], np.concatenate((key[0, :, :1], new[0][0]), axis=1), {})
    check_pages(cache)


@each_dtype
def test_exhaustion_changes_nothing(dtype, seed):
    rng = generator(seed)
    cache = fa.KVCache(6, 2, Hkv, D, value_dim=Dv, dtype=dtype)
    cache.append([0, 1], *tokens(rng, 2, 3))
    cache.fork(0, 2)
    before = state(cache)
    for ids, L, lengths, needed in [
        # 0 and 2 share a half full page, which one copies, or both if neither is the last holder.
        ([0], 6, None, 4), ([0, 2], 4, None, 5), ([0, 1, 2], 3, [3, 3, 3], 4), ([0, 2, 9], 4, [0, 3, 4], 4),
        ([7], 6, None, 3), ([7, 8, 9], 1, None, 3), ([1, 0, 7], 2, None, 4), ([0], 10_000, None, 5001),
    ]:
        with pytest.raises(MemoryError) as caught:
            cache.append(ids, *tokens(rng, len(ids), L), lengths)
        assert str(caught.value) == f"no pages for the new tokens: {needed} needed, 2 free"
        assert state(cache) == before, ids
    check_pages(cache)
    cache.append([0, 1, 2], *tokens(rng, 3, 1))  # one copy
    assert cache.num_free_pages == 1
    with pytest.raises(MemoryError):
        cache.append([0, 1], *tokens(rng, 2, 1))
    cache.free(2)
    cache.append([0, 1], *tokens(rng, 2, 1))
    check_pages(cache)


def test_a_failed_write_changes_nothing(monkeypatch, seed):
    """Whatever fails while tokens are written: no sequence has them, no page is lost."""
    rng = generator(seed)
    cache = fa.KVCache(16, 2, Hkv, D, value_dim=Dv)
    cache.append([0, 1], *tokens(rng, 2, 3))
    cache.fork(0, 2)
    kept = [held(cache, i) for i in range(3)]

    def fail(*arguments):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", fail)
        for ids, L in ([0, 1], 1), ([0, 7], 5), (range(50, 60), 1):
            with pytest.raises(MemoryError):
                cache.append(ids, *tokens(rng, len(ids), L))
            check_pages(cache)
            assert sorted(cache._rows) == [0, 1, 2] and cache.lengths([0, 1, 2]).tolist() == [3, 3, 3]
    for i in range(3):
        for array, expected in zip(held(cache, i), kept[i]):
            assert_same_bits(array, expected, {"id": i})
    cache.append([0, 7], *tokens(rng, 2, 5))
    check_pages(cache)


def test_freed_pages_are_used_again(seed):
    rng = generator(seed)
    cache = fa.KVCache(5, 3, Hkv, D, value_dim=Dv)
    for i in range(30):
        key, value = tokens(rng, 1, int(rng.integers(0, 16)))
        cache.append(i, key, value)
        for array, x in zip(held(cache, i), (key, value)):
            assert_same_bits(array, x[0], {"id": i})
        cache.free(i)
        check_pages(cache)
    assert cache.num_free_pages == 5 and len(cache._length) == module.FIRST_ROWS


def test_truncate(seed):
    rng = generator(seed)
    cache = fa.KVCache(8, 4, Hkv, D, value_dim=Dv)
    key, value = tokens(rng, 2, 14)
    cache.append([0, 1], key, value)
    cache.truncate([0, 1], [14, 9])
    assert cache.num_free_pages == 1 and cache.lengths([0, 1]).tolist() == [14, 9]
    cache.truncate([1, 0], 8)
    assert cache.num_free_pages == 4
    new = tokens(rng, 2, 3)
    cache.append([0, 1], *new)
    for b in range(2):
        assert_same_bits(held(cache, b)[0], np.concatenate((key[b, :, :8], new[0][b]), axis=1), {})
    # A fork that was truncated leaves the other one's pages alone.
    cache.fork(0, 5)
    cache.truncate(5, 2)
    assert cache.num_free_pages == 2
    cache.truncate(0, 0)
    assert cache.num_free_pages == 4 and cache.lengths(0) == 0 and 0 in cache
    assert_same_bits(held(cache, 5)[0], key[0, :, :2], {})
    check_pages(cache)


# --- evict ---

def test_evict_drawn():
    """n = 14, pages of 4, as in the module's drawing."""
    cache = fa.KVCache(4, 4, Hkv, D, value_dim=Dv)
    cache.append(0, *tokens(generator(0), 1, 14))
    row = cache._rows[0]
    cache.evict(0, 3, sinks=2)
    assert (cache._hole_begin[row], cache._hole_end[row]) == (2, 11)
    assert cache._tables[row, :4].tolist() == [0, -1, 2, 3] and cache.num_free_pages == 1
    for window, sinks, hole in [(3, 2, (2, 11)), (9, 0, (0, 11)), (50, 0, (0, 11)), (1, 6, (0, 13)), (14, 0, (0, 13))]:
        cache.evict([0], window, sinks=sinks)
        assert (cache._hole_begin[row], cache._hole_end[row]) == hole
        check_pages(cache)
    assert cache._tables[row, :4].tolist() == [-1, -1, -1, 3]
    cache.evict(0, 0)
    assert cache.num_free_pages == 3  # the last page has room for two more tokens
    assert (cache.attend(np.ones((1, H, 1, D), F32), 0) == 0).all()
    key, value = tokens(generator(1), 1, 1)
    cache.append(0, key, value)
    out = cache.attend(np.ones((1, H, 1, D), F32), 0)
    np.testing.assert_allclose(out[0, :, 0], np.repeat(value[0, :, 0], 2, axis=0), rtol=1e-6)
    check_pages(cache)


def test_evict_two_intervals():
    """Larger sinks later do not keep what lies between: the dropped tokens are one interval."""
    cache = fa.KVCache(10, 2, Hkv, D, value_dim=Dv)
    cache.append([0, 1], *tokens(generator(0), 2, 5))
    cache.evict([0, 1], [2, 4], sinks=[1, 0])
    holes = [(int(cache._hole_begin[row]), int(cache._hole_end[row])) for row in cache._rows.values()]
    assert holes == [(1, 3), (0, 1)]
    cache.append([0, 1], *tokens(generator(0), 2, 5))
    cache.evict([0, 1], 1, sinks=7)
    holes = [(int(cache._hole_begin[row]), int(cache._hole_end[row])) for row in cache._rows.values()]
    assert holes == [(1, 9), (0, 9)]
    check_pages(cache)


@each_dtype
def test_streaming(dtype, seed):
    """A window and sinks in a fixed number of pages, for ever: as attention with that mask over all tokens."""
    rng = generator(seed)
    window, sinks, size = 9, 3, 4
    cache = fa.KVCache(2 * (-(-sinks // size) + -(-window // size) + 1), size, Hkv, D, value_dim=Dv, dtype=dtype)
    table = rotary(120, D)
    keys, values = tokens(rng, 2, 120)
    for n in range(1, 121):
        cache.append([0, 1], keys[:, :, n - 1 : n], values[:, :, n - 1 : n], rotary=table)
        cache.evict([0, 1], window, sinks=sinks)
        if n % 17 == 0:
            poison(cache)
            check_pages(cache)
            stored = [as_stored(x, dtype) for x in (apply_rotary(keys[:, :, :n], table), values[:, :, :n])]
            j = np.arange(n)
            hidden = (j >= sinks) & (j < n - window)
            query = rng.standard_normal((2, H, 1, D)).astype(F32)
            check_attend(cache, query, [0, 1], *(list(x) for x in stored), hidden=[hidden] * 2, table=table,
                         causal=True, context={"n": n, "dtype": dtype})


def test_hidden_tokens_never_contribute(seed):
    rng = generator(seed)
    key, value = tokens(rng, 1, 10)
    key[0, :, 3:6], value[0, :, 3:6] = NAN, INF
    cache = fa.KVCache(4, 3, Hkv, D, value_dim=Dv)
    cache.append(0, key, value)
    query = rng.standard_normal((1, H, 2, D)).astype(F32)
    assert np.isnan(cache.attend(query, 0)).all()
    cache.evict(0, 4, sinks=2)
    mask = np.ones((2, 10), bool)
    mask[0, 8] = False
    for options in {}, {"mask": mask}, {"causal": True, "window": 6}, {"mask": mask[:1]}:
        hidden = [(np.arange(10) >= 2) & (np.arange(10) < 6)]
        check_attend(cache, query, [0], key, value, hidden=hidden, **options)


@each_dtype
def test_missing_pages_are_not_read(dtype):
    """-1 is also the number of the last page."""
    cache = fa.KVCache(3, 2, Hkv, D, value_dim=Dv, dtype=dtype)
    poison(cache)
    pools = cache._pools
    entries = np.array([[-1, 0, -1], [-1, -1, -1]], np.int32)
    for pool, scales in (pools.key, pools.key_scale), (pools.value, pools.value_scale):
        dense = module._gather(pool, scales, entries)
        assert dense.shape == (2, Hkv, 6, pool.shape[3]) and dense.dtype == F32
        assert np.isnan(dense[0, :, 2:4]).all()
        dense[0, :, 2:4] = 0
        assert not dense.any()


# --- attend ---

def options_of(rng, B, L, S):
    each = [[int(n) for n in rng.integers(0, L + 1, B)] for _ in range(2)]
    return {
        "none": {},
        "causal": {"causal": True},
        "window": {"window": (7, 2)},
        "causal window": {"causal": True, "window": 5},
        "scale": {"scale": -0.7},
        "softcap": {"softcap": 1.5, "causal": True},
        "sinks": {"sinks": rng.standard_normal(H).astype(F32)},
        "mask": {"mask": rng.random((B, H, L, S)) < 0.5},
        "mask of keys": {"mask": rng.random(S) < 0.5},
        "mask of sequences": {"mask": rng.random((B, 1, 1, S)) < 0.5, "causal": True},
        "bias": {"bias": rng.standard_normal((B, H, L, S)).astype(F32)},
        "bias of heads": {"bias": rng.standard_normal((H, 1, S)).astype(F32), "causal": True},
        "ALiBi": {"bias": fa.ALiBi(fa.positions.alibi_slopes(H))},
        "ALiBi causal": {"bias": fa.ALiBi(fa.positions.alibi_slopes(H)), "causal": True},
        "query_lengths": {"query_lengths": each[0], "causal": True},
        "query_lengths, ALiBi": {"query_lengths": each[1], "bias": fa.ALiBi(fa.positions.alibi_slopes(H))},
    }


@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
@pytest.mark.parametrize("name", options_of(np.random.default_rng(0), 1, 1, 1))
def test_every_option(name, holes, seed):
    rng = generator(seed, name)
    lengths = [11, 0, 5, 20]
    cache = fa.KVCache(24, 4, Hkv, D, value_dim=Dv)
    key, value = tokens(rng, 4, 20)
    cache.append([3, 1, 4, 5], key, value, lengths)
    hidden = [np.zeros(n, bool) for n in lengths]
    if holes:
        cache.evict([3, 5], [4, 2], sinks=1)
        hidden[0][1:7], hidden[3][1:18] = True, True
    poison(cache)
    ids = [3, 1, 4, 5, 3]
    index = [0, 1, 2, 3, 0]
    stored = [[x[b, :, : lengths[b]] for b in index] for x in (key, value)]
    hidden = [hidden[b] for b in index]
    for L in 1, 6:
        options = options_of(rng, 5, L, 20)[name]
        query = rng.standard_normal((5, H, L, D)).astype(F32)
        context = {"options": name, "L": L, "holes": holes, "seed": seed}
        out = check_attend(cache, query, ids, *stored, hidden=hidden, context=context, **options)
        for threads in 1, 2:
            into = np.full_like(out, NAN)
            result = cache.attend(query, ids, out=into, num_threads=threads, deterministic=True, **options)
            assert result is into
            assert_same_bits(into, out, context)
    rows = [2, 3, 0, 6, 1]
    options = options_of(rng, 5, 6, 20)[name]
    if "query_lengths" in options:
        options["query_lengths"] = [min(n, m) for n, m in zip(options["query_lengths"], rows)]
    query = rng.standard_normal((12, H, D)).astype(F32)
    check_attend(cache, query, ids, *stored, hidden=hidden, cu_q=np.cumsum([0, *rows]),
                 context={"options": name, "packed": rows}, **options)


@each_dtype
@pytest.mark.parametrize("size", [1, 5, 16, 64])
def test_prefill_and_decode(size, dtype, seed):
    """A prompt in chunks, then a token at a time, each row as in one causal call over all."""
    rng = generator(seed, size)
    n = 70
    key, value = tokens(rng, 1, n)
    query = rng.standard_normal((1, H, n, D)).astype(F32)
    stored = [as_stored(x, dtype)[0] for x in (key, value)]
    true, allowed = exact(query[0], *stored, causal=True)[0], bound(query[0], *stored, causal=True).out
    cache = fa.KVCache(-(-n // size), size, Hkv, D, value_dim=Dv, dtype=dtype)
    at = 0
    for m in (33, 20, *[1] * 17):
        rows = slice(at, at + m)
        cache.append(0, key[:, :, rows], value[:, :, rows])
        out = cache.attend(query[:, :, rows], 0, causal=True)[0]
        assert_close(out, true[:, rows], allowed[:, rows], {"dtype": dtype, "page_size": size, "at": at, "seed": seed})
        at += m


def test_inputs_of_attend_are_left_alone(seed):
    rng = generator(seed)
    cache = fa.KVCache(4, 4, Hkv, D, value_dim=Dv)
    cache.append(0, *tokens(rng, 1, 9))
    query, mask = rng.standard_normal((1, H, 3, D)).astype(F32), rng.random((3, 9)) < 0.5
    query.flags.writeable = mask.flags.writeable = False
    before = state(cache), query.tobytes(), mask.tobytes()
    expected = cache.attend(query, [0], mask=mask, rotary=rotary(9, 4))
    after = state(cache), query.tobytes(), mask.tobytes()
    assert after == before
    for layout in LAYOUTS.values():
        assert_same_bits(cache.attend(layout(query), [0], mask=mask, rotary=rotary(9, 4)), expected, {})


# --- memory ---

@pytest.mark.parametrize("dtype, size", [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int8", 1)])
def test_bytes(dtype, size):
    cache = fa.KVCache(7, 5, 3, 8, value_dim=2, dtype=dtype)
    assert cache.nbytes == 7 * 5 * 3 * ((8 + 2) * size + (8 if dtype == "int8" else 0))
    for pool in cache._pools:
        assert pool is None or pool.ctypes.data % 64 == 0 and pool.flags.c_contiguous and not pool.any()
    assert (cache._pools.key_scale is not None) == (cache._pools.value_scale is not None) == (dtype == "int8")
    assert fa.KVCache(1, 1, 1, 9).value_dim == 9
    assert repr(cache) == (f"KVCache(num_pages=7, page_size=5, kv_heads=3, head_dim=8, value_dim=2, dtype={dtype!r}): "
                           "0 sequences, 7 free pages")


# --- bad arguments ---

T, V = TypeError, ValueError


@pytest.mark.parametrize("arguments, error, message", [
    ((0, 1, 1, 1), V, "num_pages must be at least 1, got 0"),
    ((2**31, 1, 1, 1), V, "num_pages must be at most 2147483647, got 2147483648"),
    ((1.0, 1, 1, 1), T, "num_pages must be an integer, got float"),
    ((1, 0, 1, 1), V, "page_size must be at least 1, got 0"),
    ((1, True, 1, 1), T, "page_size must be an integer, got bool"),
    ((1, 1, -1, 1), V, "kv_heads must be at least 1, got -1"),
    ((1, 1, 1, 0), V, "head_dim must be at least 1, got 0"),
    ((1, 1, 1, 1, {"value_dim": 0}), V, "value_dim must be at least 1, got 0"),
    ((1, 1, 1, 1, {"dtype": "float64"}), V,
     r"dtype must be one of \('float32', 'float16', 'bfloat16', 'int8'\), got 'float64'"),
    ((1, 1, 1, 1, {"dtype": np.float32}), T, "dtype must be a string, got type"),
    ((2**31 - 1, 2**30, 64, 64), MemoryError, r"no memory for pages of shape \(.*\) and dtype float32"),
])
def test_bad_cache(arguments, error, message):
    options = arguments[-1] if isinstance(arguments[-1], dict) else {}
    with pytest.raises(error) as caught:
        fa.KVCache(*arguments[:4], **options)
    assert caught.type is error and re.fullmatch(message, str(caught.value)), str(caught.value)


K, W = tokens(np.random.default_rng(0), 2, 3)
Q = np.random.default_rng(0).standard_normal((2, H, 2, D)).astype(F32)
TABLE = rotary(20, 4)


def sparse(*shape):
    return pytest.importorskip("scipy.sparse").csr_array(shape, dtype=np.bool_)


# Of a cache with the sequences 3 of 5 tokens and 8 of 2 tokens.
BAD = [
    (lambda c: c.append([3, 3], K, W), V, "sequence_ids must be distinct, got 3 twice"),
    (lambda c: c.append([9, -1], K, W), V, "sequence_ids must be at least 0, got -1"),
    (lambda c: c.append([9, 1.0], K, W), T, "sequence_ids must be integers, got float"),
    (lambda c: c.append([True, 1], K, W), T, "sequence_ids must be integers, got bool"),
    (lambda c: c.append(["a", "b"], K, W), T, "sequence_ids must be integers, got str"),
    (lambda c: c.append(np.array([1.0, 2]), K, W), T, "sequence_ids must be integers, got float64"),
    (lambda c: c.append(np.array([[1, 2]]), K, W), V,
     r"sequence_ids must be an integer or have one axis, got shape \(1, 2\)"),
    (lambda c: c.append(None, K, W), T, "sequence_ids must be an array, got NoneType"),
    (lambda c: c.append([3], K, W), V, "key must have one batch for each of 1 sequence_ids, got 2"),
    (lambda c: c.append([3, 8], K.astype(F64), W), T, "key must be float32 in native byte order, got float64"),
    (lambda c: c.append([3, 8], K.astype(F16), W), T, "key must be float32 in native byte order, got float16"),
    (lambda c: c.append([3, 8], K.astype(">f4"), W), T, "key must be float32 in native byte order, got >f4"),
    (lambda c: c.append([3, 8], K, W.astype(F64)), T, "value must have key's dtype float32, got float64"),
    (lambda c: c.append([3, 8], K[0], W), V, r"key must have 4 axes \(B, Hkv, L, D\), got shape \(2, 3, 6\)"),
    (lambda c: c.append([3, 8], K[:, :1], W), V, "key must have the cache's 2 heads, got 1"),
    (lambda c: c.append([3, 8], K[..., 1:], W), V, "key must have the cache's head size 6, got 5"),
    (lambda c: c.append([3, 8], K, W[:, :, 1:]), V, r"value must have shape \(2, 2, 3, 3\), got \(2, 2, 2, 3\)"),
    (lambda c: c.append([3, 8], K, K), V, r"value must have shape \(2, 2, 3, 3\), got \(2, 2, 3, 6\)"),
    (lambda c: c.append([3, 8], None, W), T, "key must be an array, got NoneType"),
    (lambda c: c.append([3, 8], K, W, [1, 4]), V, r"lengths must lie in \[0, 3\], got 4 at index \(1,\)"),
    (lambda c: c.append([3, 8], K, W, [1, 1, 1]), V,
     r"lengths must broadcast to the leading axes \(2,\), got shape \(3,\)"),
    (lambda c: c.append([3, 8], K, W, 1.0), T, "lengths must be integers, got float64"),
    (lambda c: c.append([3, 8], K, W, rotary=(K, K)), T, "rotary must be a Rotary, got tuple"),
    (lambda c: c.append([3, 8], K, W, rotary=rotary(9, 8)), V,
     "rotary must turn at most the 6 features of a head, got 8"),
    (lambda c: c.append([3, 8], K, W, rotary=rotary(7, 4)), V,
     "rotary must have the positions 0 to 7, got a table of 7"),
    (lambda c: c.append([3, 8], K[:, :, :1], W[:, :, :1], rotary=rotary(5, 4)), V,
     "rotary must have the positions 0 to 5, got a table of 5"),
    (lambda c: c.append([3, 8], K, W, rotary=Rotary(TABLE.cos, TABLE.sin, 1)), T,
     "rotary.interleaved must be a bool, got int"),
    (lambda c: c.fork(4, 5), V, "source must be in the cache, got 4"),
    (lambda c: c.fork([3], 5), T, "source must be an integer, got list"),
    (lambda c: c.fork(3, [5, 8]), V, "destinations must be new ids, got 8, which is in the cache"),
    (lambda c: c.fork(3, 3), V, "destinations must be new ids, got 3, which is in the cache"),
    (lambda c: c.fork(3, [5, 5]), V, "destinations must be distinct, got 5 twice"),
    (lambda c: c.fork(3, [5, -5]), V, "destinations must be at least 0, got -5"),
    (lambda c: c.fork(3, [1.5]), T, "destinations must be integers, got float"),
    (lambda c: c.free([3, 4]), V, "sequence_ids must be in the cache, got 4"),
    (lambda c: c.free([3, 3]), V, "sequence_ids must be distinct, got 3 twice"),
    (lambda c: c.free([3, 8.0]), T, "sequence_ids must be integers, got float"),
    (lambda c: c.lengths([3, -4]), V, "sequence_ids must be in the cache, got -4"),
    (lambda c: c.truncate([3, 4], 0), V, "sequence_ids must be in the cache, got 4"),
    (lambda c: c.truncate([8, 3, 8], 0), V, "sequence_ids must be distinct, got 8 twice"),
    (lambda c: c.truncate([3, 8], [1, 3]), V, r"lengths must lie in \[0, 2\] for sequence 8, got 3"),
    (lambda c: c.truncate([3, 8], 6), V, r"lengths must lie in \[0, 5\], got 6"),
    (lambda c: c.truncate([3, 8], [0, -1]), V, r"lengths must lie in \[0, 5\], got -1 at index \(1,\)"),
    (lambda c: c.truncate([3, 8], [1, 1, 1]), V,
     r"lengths must broadcast to the leading axes \(2,\), got shape \(3,\)"),
    (lambda c: c.truncate([3, 8], 0.5), T, "lengths must be integers, got float64"),
    (lambda c: c.evict([3, 4], 0), V, "sequence_ids must be in the cache, got 4"),
    (lambda c: c.evict([3, 3], 0), V, "sequence_ids must be distinct, got 3 twice"),
    (lambda c: c.evict(3, -1), V, "window must be at least 0, got -1"),
    (lambda c: c.evict(3, None), T, "window must be an array, got NoneType"),
    (lambda c: c.evict(3, 1, sinks=-1), V, "sinks must be at least 0, got -1"),
    (lambda c: c.evict([3, 8], 1, sinks=[0, -1]), V, r"sinks must lie in \[0, \d+\], got -1 at index \(1,\)"),
    (lambda c: c.evict([3, 8], [1, 2, 3]), V, r"window must broadcast to the leading axes \(2,\), got shape \(3,\)"),
    (lambda c: c.attend(Q, [3, 4]), V, "sequence_ids must be in the cache, got 4"),
    (lambda c: c.attend(Q, [3]), V, "query must have one batch for each of 1 sequence_ids, got 2"),
    (lambda c: c.attend(Q[0], [3, 8]), V, r"query must have 4 axes \(B, H, L, D\), got shape \(4, 2, 6\)"),
    (lambda c: c.attend(Q, [3, 8], cu_seqlens_q=[0, 1, 2]), V,
     r"query must have 3 axes \(T, H, D\) with cu_seqlens_q, got shape \(2, 4, 2, 6\)"),
    (lambda c: c.attend(Q[:, 0], [3, 8], cu_seqlens_q=[0, 1]), V,
     "cu_seqlens_q must end at the 2 rows of query, got 1"),
    (lambda c: c.attend(Q[:, 0], [3, 8], cu_seqlens_q=[0, 2]), V,
     "cu_seqlens_q must have one sequence for each of 2 sequence_ids, got 1"),
    (lambda c: c.attend(Q.astype(F64), [3, 8]), T,
     "query must be float32, float16 or bfloat16 in native byte order, got float64"),
    (lambda c: c.attend(Q.astype(np.int64), [3, 8]), T,
     "query must be float32, float16 or bfloat16 in native byte order, got int64"),
    (lambda c: c.attend(Q[..., 1:], [3, 8]), V, "query must have the cache's head size 6, got 5"),
    (lambda c: c.attend(Q[:, :3], [3, 8]), V, "query must have a multiple of the cache's 2 heads, got 3"),
    (lambda c: c.attend(Q, [3, 8], query_lengths=[0, 3]), V,
     r"query_lengths must lie in \[0, 2\], got 3 at index \(1,\)"),
    (lambda c: c.attend(Q[:, 0], [3, 8], cu_seqlens_q=[0, 2, 2], query_lengths=[0, 1]), V,
     r"query_lengths must lie in \[0, 0\] for sequence 1, got 1"),
    (lambda c: c.attend(Q, [3, 8], rotary=rotary(4, 4)), V, "rotary must have the positions 0 to 4, got a table of 4"),
    (lambda c: c.attend(Q, [3, 8], rotary=rotary(9, 8)), V, "rotary must turn at most the 6 features of a head, got 8"),
    (lambda c: c.attend(Q, [3, 8], rotary=0), T, "rotary must be a Rotary, got int"),
    (lambda c: c.attend(np.concatenate((Q, Q), axis=2), [3, 8], rotary=TABLE), V,
     "query must have at most the 2 tokens of sequence 8 with rotary, got 4"),
    (lambda c: c.attend(Q, [3, 8], mask=masks.causal()), T, "mask must be a bool array for a cache, got .*"),
    (lambda c: c.attend(Q, [3, 8], mask=masks.causal().compile(2, 5)), T,
     "mask must be a bool array for a cache, got Plan"),
    (lambda c: c.attend(Q, [3, 8], mask=sparse(2, 5)), T, "mask must be a bool array for a cache, got csr_array"),
    (lambda c: c.attend(Q, [3, 8], mask=np.ones((2, 5), int)), T, r"mask must be boolean \(True = attend\), got int64"),
    (lambda c: c.attend(Q, [3, 8], mask=np.ones((2, 6), bool)), V,
     r"mask must broadcast to \(..., H, L, S\) = \(2, 4, 2, 5\), got shape \(2, 6\)"),
    (lambda c: c.attend(Q, [3, 8], mask=np.ones((3, 1, 1, 1, 1), bool)), V,
     r"mask must broadcast to \(..., H, L, S\) = \(2, 4, 2, 5\), got shape \(3, 1, 1, 1, 1\)"),
    (lambda c: c.attend(Q, [3, 8], bias=np.ones((2, 5))), T, "bias must have query's dtype float32, got float64"),
    (lambda c: c.attend(Q, [3, 8], causal=1), T, "causal must be a bool, got int"),
    (lambda c: c.attend(Q, [3, 8], window=-1), V, "window must be at least 0, got -1"),
    (lambda c: c.attend(Q, [3, 8], softcap=0.0), V, "softcap must be positive, normal and finite in float32, got 0.0"),
    (lambda c: c.attend(Q, [3, 8], num_threads=0), V, "num_threads must be at least 1, got 0"),
    (lambda c: c.attend(Q, [3, 8], out=np.zeros((2, H, 2, D), F32)), V,
     r"out must have shape \(2, 4, 2, 3\), got \(2, 4, 2, 6\)"),
    (lambda c: c.attend(Q, [3, 8], out=Q[..., :3]), V, "out must not overlap the inputs, got memory shared with query"),
    (lambda c: c.attend(Q, [3, 8], out=Q[..., :3], rotary=TABLE), V,
     "out must not overlap the inputs, got memory shared with query"),
]


@pytest.mark.parametrize("holes", [False, True], ids=["whole", "holes"])
def test_bad_arguments(holes):
    """The error, its whole message, and a cache as before."""
    cache = fa.KVCache(16, 2, Hkv, D, value_dim=Dv)
    key, value = tokens(np.random.default_rng(1), 2, 5)
    cache.append([3, 8], key, value, [5, 2])
    if holes:
        cache.evict(3, 1, sinks=1)
    before, query = state(cache), Q.copy()
    for number, (call, error, message) in enumerate(BAD):
        with pytest.raises(error) as caught:
            call(cache)
        assert caught.type is error and re.fullmatch(message, str(caught.value)), f"case {number}: {caught.value}"
        assert state(cache) == before and (query == Q).all(), f"case {number}"


def test_dtype_of_keys():
    for dtype in DTYPES:
        cache = fa.KVCache(16, 2, Hkv, D, value_dim=Dv, dtype=dtype)
        own = f" or {dtype}" if dtype in ("float16", "bfloat16") else ""
        for wrong in {"float16", "int8", "uint16", "float64"} - ({dtype} if own else set()):
            with pytest.raises(TypeError) as caught:
                cache.append(0, K[:1].astype(wrong), W[:1].astype(wrong))
            assert str(caught.value) == f"key must be float32{own} in native byte order, got {wrong}"
        if own == " or float16":
            with pytest.raises(TypeError, match="value must have key's dtype float16, got float32"):
                cache.append(0, K[:1].astype(F16), W[:1])
            with pytest.raises(TypeError, match="key must be float32 or float16 in native byte order, got >f2"):
                cache.append(0, K[:1].astype(">f2"), W[:1].astype(">f2"))
        assert len(cache) == 0


def test_docstrings():
    failed, attempted = doctest.testmod(module)
    assert attempted and not failed


# --- the checks above can fail ---

def test_the_page_accounts_see_a_leak():
    def spoiled(spoil):
        cache = fa.KVCache(8, 2, Hkv, D, value_dim=Dv)
        cache.append([0, 1], *tokens(generator(0), 2, 5))
        check_pages(cache)
        spoil(cache)
        with pytest.raises(AssertionError):
            check_pages(cache)

    def set_entry(cache, row, index, page):
        cache._tables[row, index] = page

    spoiled(lambda cache: set_entry(cache, 0, 1, -1))
    spoiled(lambda cache: set_entry(cache, 0, 3, 7))
    spoiled(lambda cache: set_entry(cache, 1, 2, cache._tables[0, 2]))
    spoiled(lambda cache: set_entry(cache, 7, 0, 0))
    spoiled(lambda cache: setattr(cache, "num_free_pages", 1))
    spoiled(lambda cache: cache._free_rows.pop())
    spoiled(lambda cache: cache._references.__setitem__(0, 2))
    spoiled(lambda cache: cache._hole_end.__setitem__(0, 3))


@pytest.mark.parametrize("spoil", ["a place on", "no copy", "hidden seen"])
def test_any_program_sees_a_wrong_cache(spoil, monkeypatch):
    write, plan, evict = module._write, fa.KVCache._plan, fa.KVCache.evict

    def shifted(pools, slots, *rest):
        write(pools, (slots + 1) % (len(pools.key) * pools.key.shape[2]), *rest)

    def careless(self, entries, references):
        return plan(self, entries, np.minimum(references, 1))

    def forgetful(self, ids, *arguments, **options):
        evict(self, ids, *arguments, **options)
        self._hole_begin[self._find(ids)] += 1

    if spoil == "a place on":
        monkeypatch.setattr(module, "_write", shifted)
    elif spoil == "no copy":
        monkeypatch.setattr(fa.KVCache, "_plan", careless)
    else:
        monkeypatch.setattr(fa.KVCache, "evict", forgetful)
    with pytest.raises((AssertionError, ExceptionGroup)):
        run_state_machine_as_test(Program, settings=settings(max_examples=60, stateful_step_count=40,
                                                             phases=[Phase.generate]))
