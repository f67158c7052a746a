"""Keys and values of growing sequences, in pages that many sequences share.

A pool holds `num_pages` pages of `page_size` tokens. A sequence is a row of state: its length, its hole and its table,
which says for every `page_size` positions what page they are in. Here for pages of 4 tokens::

    row   length   hole        table
     0      10     [0, 0)      5  2  9 -1        token 6 of sequence 0 is in page 2, at place 6 % 4 = 2
     1       9     [0, 0)      5  2  7 -1        a fork: pages 5 and 2 belong to both, so references[5] == 2
     2      14     [2, 11)     3 -1  8  1        evicted: tokens 4 to 7 gave their page back, the others are hidden

Three rules hold between calls:

- An entry of a table is a page, or -1: past the last token, or wholly inside the hole at the time it was dropped.
- references[page] is the number of entries that name the page; those with none are in the list of free pages.
- A page is written to only where no other row sees it: a shared page is copied before a token is added to it.

A change is planned, then written to pages that nobody sees yet, then entered: an error on the way leaves all as it was.
"""

import copy
import math
from typing import NamedTuple

import numpy as np

from . import _runtime, checks, masks, positions

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int8": np.int8}  # as stored
LARGEST_CODE = 127  # of int8; -128 is not used, so that a key and its negative have opposite codes
SMALLEST_SCALE = np.float32(2.0**-126)  # the smallest normal number: no code passes 127 by the rounding of a denormal
LARGEST_SCALE = np.nextafter(np.finfo(np.float32).max / np.float32(LARGEST_CODE), np.float32(0))  # 127 of it are finite
FIRST_ROWS = 8  # of state; doubled when they are taken
FIRST_ENTRIES = 8  # of a table; doubled when a sequence needs more
MOST_PAGES = 2**31 - 1  # tables are int32


class Pools(NamedTuple):
    """The memory of all pages. The scales are None but for int8."""

    key: np.ndarray  # (num_pages, kv_heads, page_size, head_dim)
    value: np.ndarray  # (num_pages, kv_heads, page_size, value_dim)
    key_scale: np.ndarray | None  # (num_pages, kv_heads, page_size)
    value_scale: np.ndarray | None


class KVCache:
    """Keys and values of growing sequences, and attention over them.

    Memory is allocated once, in pages of ``page_size`` tokens. Sequences take pages as they grow, share those that they
    have in common after a `fork`, and give them back; there is no other limit to their number or length.

    Parameters
    ----------
    num_pages, page_size : int
        At least 1.
    kv_heads, head_dim : int
        Hkv and D of the keys; at least 1.
    value_dim : int, optional
        Dv of the values; at least 1. Default head_dim.
    dtype : "float32", "float16", "bfloat16" or "int8"
        How keys and values are stored. 16-bit floats are rounded to nearest, ties to even. int8 has one float32 scale
        for each token and head, for keys and values apart: scale = max|x| / 127 (at least 2^-126) and codes
        rint(x / scale). A row with NaN or Inf gets the scale NaN, so that it is not hidden.

    Attributes
    ----------
    num_pages, page_size, kv_heads, head_dim, value_dim : int
    dtype : str
    num_free_pages : int
    nbytes : int
        Of the pages.

    Raises
    ------
    TypeError, ValueError
        Numbers that are not integers or too small, more than 2^31 - 1 pages, an unknown dtype.
    MemoryError
        No memory for the pages.

    Notes
    -----
    The pages take num_pages page_size kv_heads (head_dim + value_dim) items of 4, 2 or 1 bytes, and for int8 8 bytes
    more for each token and head. The state is 8 bytes a page, 24 bytes a sequence, and for every sequence 4 bytes for
    each page of the longest one, evicted ones included; doubled as it grows.

    A sequence is known by an id, any integer from 0 on, with no limit. `attend` counts evicted tokens as the others:
    the position of a token never changes. ``id in cache`` and ``len(cache)`` are about the sequences.

    **Error of int8.** Let s_j be the exact scores, p_j the exact weights, v_j the exact values, ks_j and vs_j the
    scales of keys and values, a the factor ``scale`` of the scores and q the query after `rotary`. What is stored is
    off by at most h = 1/2 + 2^-16 scales: 1/2 of the codes, the rest of the roundings of quotient and product. So, but
    for the rounding of the arithmetic on what is stored::

        |delta s_j|   <= |a| ||q||_1 h ks_j                         softcap, whose derivative is at most 1, included
        |out - exact| <= (e^(2 d) - 1) sum p_j |v_j| + e^(2 d) h sum p_j vs_j         d = max |delta s_j|

    since each weight changes by a factor between e^(-2 d) and e^(2 d).

    Calls on one cache from several Python threads need a lock of their own.

    References
    ----------
    Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", 2023.

    Examples
    --------
    Two sequences of 5 and 3 tokens; then the second one goes on:

    >>> import numpy as np
    >>> import fastattn as fa
    >>> rng = np.random.default_rng(0)
    >>> cache = fa.KVCache(num_pages=16, page_size=4, kv_heads=2, head_dim=8)
    >>> key, value = rng.standard_normal((2, 2, 2, 5, 8), np.float32)
    >>> cache.append([0, 1], key, value, lengths=[5, 3])
    >>> cache.append(1, key[:1, :, :1], value[:1, :, :1])
    >>> cache.lengths([0, 1])
    array([5, 4])
    >>> query = rng.standard_normal((1, 4, 1, 8), np.float32)
    >>> cache.attend(query, [1], causal=True).shape
    (1, 4, 1, 8)

    Two continuations of the first one, which share its pages:

    >>> cache.fork(0, [2, 3])
    >>> cache.append([2, 3], key[:, :, :1], value[:, :, :1])
    >>> cache.free([0, 1])
    >>> cache.num_free_pages
    13
    """

    def __init__(self, num_pages, page_size, kv_heads, head_dim, *, value_dim=None, dtype="float32"):
        self.num_pages = checks._integer("num_pages", num_pages, 1)
        if self.num_pages > MOST_PAGES:
            raise ValueError(f"num_pages must be at most {MOST_PAGES}, got {num_pages}")
        self.page_size = checks._integer("page_size", page_size, 1)
        self.kv_heads = checks._integer("kv_heads", kv_heads, 1)
        self.head_dim = checks._integer("head_dim", head_dim, 1)
        self.value_dim = self.head_dim if value_dim is None else checks._integer("value_dim", value_dim, 1)
        if not isinstance(dtype, str):
            raise TypeError(f"dtype must be a string, got {type(dtype).__name__}")
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {tuple(DTYPES)}, got {dtype!r}")
        self.dtype = dtype

        rows = self.num_pages, self.kv_heads, self.page_size
        scales = dtype == "int8"
        self._pools = Pools(_aligned_zeros((*rows, self.head_dim), DTYPES[dtype]),
                            _aligned_zeros((*rows, self.value_dim), DTYPES[dtype]),
                            _aligned_zeros(rows, np.float32) if scales else None,
                            _aligned_zeros(rows, np.float32) if scales else None)

        # One reference more than pages, always 0: what the entry -1 reads.
        self._references = np.zeros(self.num_pages + 1, np.int32)
        self._free = np.arange(self.num_pages - 1, -1, -1, dtype=np.int32)  # [num_free_pages - 1] is next
        self.num_free_pages = self.num_pages

        self._rows = {}
        self._free_rows = list(range(FIRST_ROWS - 1, -1, -1))
        self._length, self._hole_begin, self._hole_end = (np.zeros(FIRST_ROWS, np.int64) for _ in range(3))
        self._tables = np.full((FIRST_ROWS, FIRST_ENTRIES), -1, np.int32)

    @property
    def nbytes(self):
        return sum(pool.nbytes for pool in self._pools if pool is not None)

    def __len__(self):
        return len(self._rows)

    def __contains__(self, sequence_id):
        return checks._is_integer(sequence_id) and sequence_id in self._rows

    def __repr__(self):
        return (f"KVCache(num_pages={self.num_pages}, page_size={self.page_size}, kv_heads={self.kv_heads}, "
                f"head_dim={self.head_dim}, value_dim={self.value_dim}, dtype={self.dtype!r}): {len(self)} sequences, "
                f"{self.num_free_pages} free pages")

    # --- sequences grow ---

    def append(self, sequence_ids, key, value, lengths=None, *, rotary=None):
        """Add tokens at the ends of sequences. An unknown id starts a sequence.

        Parameters
        ----------
        sequence_ids : int or integers (B,)
            Distinct, at least 0.
        key : array (B, Hkv, L, D), float32; or float16 or bfloat16 if that is the cache's dtype
        value : array (B, Hkv, L, Dv), key's dtype
        lengths : int or integers (B,), optional
            How many of the L tokens count, for each sequence; the others are not read. Default L.
        rotary : positions.Rotary, optional
            Turn the keys as `positions.apply_rotary` does, in float32, each at its own position: the tokens that the
            sequence had before and i.

        Raises
        ------
        TypeError
            Ids or lengths that are not integers, something else than arrays, a dtype that is none of the above, a
            rotary of another kind.
        ValueError
            Ids that are negative or not distinct, wrong shapes, lengths outside [0, L], a rotary that turns more than D
            features or has fewer positions than a sequence.
        MemoryError
            Fewer free pages than needed; both numbers are in the message.

        After any error the cache is as before.

        Notes
        -----
        The last page of a sequence, if it is shared and not full, is copied first, and counts as needed. The last
        sequence that holds such a page keeps it.
        """
        ids = _ids(sequence_ids)
        rows, unknown = self._rows_to_append(ids)
        B = len(ids)
        key, value = checks._array("key", key), checks._array("value", value)
        L = self._check_tokens(key, value, B)
        counts = None
        if lengths is not None:
            counts = checks._integers("lengths", lengths, (B,), 0, L)
        if rotary is not None:
            self._check_rotary(rotary)
        begin = self._length[rows]

        # The entries of the tables that get tokens, sequence by sequence: what they are (row, index).
        if L == 1 and counts is None:
            index, place = np.divmod(begin, self.page_size)
            row, end = rows, begin + 1
        else:
            if counts is None:
                counts = np.full(B, L, np.int64)
            end = begin + counts
            first = begin // self.page_size
            n_entries = np.where(counts > 0, -(-end // self.page_size) - first, 0)
            start = np.cumsum(n_entries) - n_entries - first  # entry `index` of sequence b is number start[b] + index
            row, index = np.repeat(rows, n_entries), np.arange(n_entries.sum()) - np.repeat(start, n_entries)
        if rotary is not None:
            _check_positions(rotary, int(end.max(initial=0)))
        try:
            entries = self._tables[row, index]
        except IndexError:  # past the end of the tables
            entries = np.full(len(index), -1, np.int32)
            inside = index < self._tables.shape[1]
            entries[inside] = self._tables[row[inside], index[inside]]

        plan = None
        references = self._references[entries]
        if np.count_nonzero(references != 1):
            plan = self._plan(entries, references)
            entries = plan.entries
            self._grow_tables(int(index.max()) + 1)
        if L == 1 and lengths is None:
            slots = entries * np.int64(self.page_size) + place
        else:
            position = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts - begin, counts)
            entry = np.repeat(start, counts) + position // self.page_size
            slots = entries[entry] * np.int64(self.page_size) + position % self.page_size
        _write(self._pools, slots, counts, begin, key, value, rotary)

        # Nothing below can fail.
        if plan is not None:
            self._tables[row[plan.changed], index[plan.changed]] = plan.pages
            self._references[plan.pages] = 1
            np.subtract.at(self._references, plan.left, 1)
            self.num_free_pages -= len(plan.pages)
        self._length[rows] = end
        for i in unknown:
            self._rows[i] = self._free_rows.pop()

    def _rows_to_append(self, ids):
        """The row of each id, and the unknown ids, whose rows are what `_free_rows.pop()` will give, one by one.

        Free rows are of length 0 and have no pages.
        """
        if len(set(ids)) != len(ids):
            raise ValueError(f"sequence_ids must be distinct, got {_first_repeated(ids)} twice")
        try:
            return np.array([self._rows[i] for i in ids], np.int64), ()
        except KeyError:
            unknown = [i for i in ids if i not in self._rows]
        if min(unknown) < 0:
            raise ValueError(f"sequence_ids must be at least 0, got {min(unknown)}")
        if len(unknown) > len(self._free_rows):
            self._grow_rows(len(self._rows) + len(unknown))
        fresh = dict(zip(unknown, reversed(self._free_rows)))
        return np.array([self._rows[i] if i in self._rows else fresh[i] for i in ids], np.int64), unknown

    def _check_tokens(self, key, value, B):
        """Raise unless key and value are tokens of B sequences; the number of tokens."""
        dtype = key.dtype
        if dtype != checks.FLOAT32 and not (dtype.itemsize == 2 and dtype.name == self.dtype and dtype.isnative):
            own = f" or {self.dtype}" if self.dtype in ("float16", "bfloat16") else ""
            raise TypeError(f"key must be float32{own} in native byte order, got {key.dtype}")
        if value.dtype != key.dtype:
            raise TypeError(f"value must have key's dtype {key.dtype}, got {value.dtype}")
        if key.ndim != 4:
            raise ValueError(f"key must have 4 axes (B, Hkv, L, D), got shape {key.shape}")
        n, heads, L, size = key.shape
        if n != B:
            raise ValueError(f"key must have one batch for each of {B} sequence_ids, got {n}")
        if heads != self.kv_heads:
            raise ValueError(f"key must have the cache's {self.kv_heads} heads, got {heads}")
        if size != self.head_dim:
            raise ValueError(f"key must have the cache's head size {self.head_dim}, got {size}")
        expected = B, heads, L, self.value_dim
        if value.shape != expected:
            raise ValueError(f"value must have shape {expected}, got {value.shape}")
        checks._check_layout("key", key)
        checks._check_layout("value", value)
        return L

    def _check_rotary(self, rotary):
        positions.check_table("rotary", rotary)
        n = 2 * rotary.cos.shape[1]
        if n > self.head_dim:
            raise ValueError(f"rotary must turn at most the {self.head_dim} features of a head, got {n}")

    def _plan(self, entries, references):
        """The `_Plan` for entries without a page of their own: missing or shared. Shared pages are copied here."""
        new = references == 0
        shared = np.flatnonzero(references > 1)
        if shared.size:
            # Of several in one call that hold the same page, each but the last holder leaves it.
            shared = shared[np.argsort(entries[shared], kind="stable")]
            page = entries[shared]
            before = np.arange(len(page)) - np.searchsorted(page, page)
            shared = shared[references[shared] - before > 1]
            new[shared] = True
        changed = np.flatnonzero(new)
        needed, free = len(changed), self.num_free_pages
        if needed > free:
            raise MemoryError(f"no pages for the new tokens: {needed} needed, {free} free")
        pages = self._free[free - needed : free][::-1].copy()
        left = entries[shared]
        entries[changed] = pages
        for pool in self._pools:
            if pool is not None and shared.size:
                pool[entries[shared]] = pool[left]
        return _Plan(entries, changed, pages, left)

    def fork(self, source, destinations):
        """Start sequences that are equal to another one, without a copy: they share its pages.

        Parameters
        ----------
        source : int
            Id of the sequence.
        destinations : int or integers (N,)
            New ids, distinct and at least 0.

        Raises
        ------
        TypeError
            Ids that are not integers.
        ValueError
            A source that is not in the cache; destinations that are negative, repeated or in the cache.
        """
        ids = _ids(destinations, "destinations")
        if not checks._is_integer(source):
            raise TypeError(f"source must be an integer, got {type(source).__name__}")
        if source not in self._rows:
            raise ValueError(f"source must be in the cache, got {source}")
        if len(set(ids)) != len(ids):
            raise ValueError(f"destinations must be distinct, got {_first_repeated(ids)} twice")
        for i in ids:
            if i < 0:
                raise ValueError(f"destinations must be at least 0, got {i}")
            if i in self._rows:
                raise ValueError(f"destinations must be new ids, got {i}, which is in the cache")
        if len(ids) > len(self._free_rows):
            self._grow_rows(len(self._rows) + len(ids))
        row = self._rows[source]
        rows = np.array(self._free_rows[len(self._free_rows) - len(ids) :][::-1], np.int64)
        table = self._tables[row]
        self._tables[rows] = table
        self._references[table[table >= 0]] += len(ids)  # a page is in a table once
        for state in (self._length, self._hole_begin, self._hole_end):
            state[rows] = state[row]
        for i in ids:
            self._rows[i] = self._free_rows.pop()

    # --- sequences shrink ---

    def free(self, sequence_ids):
        """Forget sequences; pages that no other one holds become free.

        Parameters
        ----------
        sequence_ids : int or integers (B,)
            Distinct.

        Raises
        ------
        TypeError, ValueError
            Ids that are not integers, not in the cache or not distinct. Then nothing is freed.
        """
        ids = _ids(sequence_ids)
        rows = self._find(ids, distinct=True)
        used = -(-int(self._length[rows].max(initial=0)) // self.page_size)
        pages = self._tables[rows, :used]
        self._release(pages[pages >= 0])
        self._tables[rows, :used] = -1
        for state in (self._length, self._hole_begin, self._hole_end):
            state[rows] = 0
        for i in ids:
            self._free_rows.append(self._rows.pop(i))

    def truncate(self, sequence_ids, lengths):
        """Shorten sequences to their first tokens, as after speculative tokens that were rejected.

        Parameters
        ----------
        sequence_ids : int or integers (B,)
            Distinct.
        lengths : int or integers (B,)
            New numbers of tokens, evicted ones included, at most the present ones. Evicted tokens stay so, while their
            positions are below the new length.

        Raises
        ------
        TypeError, ValueError
            Ids that are not integers, not in the cache or not distinct; lengths that are not integers, negative or more
            than the sequence has. Then nothing is changed.
        """
        ids = _ids(sequence_ids)
        rows = self._find(ids, distinct=True)
        old = self._length[rows]
        new = checks._integers("lengths", lengths, (len(ids),), 0, int(old.max(initial=0)))
        if (new > old).any():
            at = int((new > old).argmax())
            raise ValueError(f"lengths must lie in [0, {old[at]}] for sequence {ids[at]}, got {new[at]}")
        keep, used = -(-new // self.page_size), -(-old // self.page_size)
        self._drop(rows, keep, used, int(keep.min(initial=0)))
        self._length[rows] = new
        begin, end = np.minimum(self._hole_begin[rows], new), np.minimum(self._hole_end[rows], new)
        some = begin < end
        self._hole_begin[rows], self._hole_end[rows] = np.where(some, begin, 0), np.where(some, end, 0)

    def evict(self, sequence_ids, window, *, sinks=0):
        """Drop all but the first ``sinks`` and the last ``window`` tokens of sequences.

        The positions of what remains do not change. Pages that lie wholly among the dropped tokens become free, if no
        other sequence holds them; the other dropped tokens are hidden from `attend`.

        Parameters
        ----------
        sequence_ids : int or integers (B,)
            Distinct.
        window, sinks : int or integers (B,)
            At least 0.

        Raises
        ------
        TypeError, ValueError
            Ids that are not integers, not in the cache or not distinct; numbers that are not integers or negative. Then
            nothing is changed.

        Notes
        -----
        What a sequence of n tokens lacks is one interval. A call that drops anything makes it the smallest one that
        holds the old one and [sinks, n - window): smaller sinks than in earlier calls widen it to the left, larger ones
        do not bring back tokens, nor keep those between the two intervals.

        References
        ----------
        Xiao et al., "Efficient Streaming Language Models with Attention Sinks", 2024.

        Examples
        --------
        >>> import numpy as np
        >>> import fastattn as fa
        >>> cache = fa.KVCache(num_pages=8, page_size=4, kv_heads=1, head_dim=2)
        >>> cache.append(0, np.ones((1, 1, 30, 2), np.float32), np.ones((1, 1, 30, 2), np.float32))
        >>> cache.evict(0, 8, sinks=2)
        >>> cache.lengths(0), cache.num_free_pages
        (array([30]), 4)
        """
        ids = _ids(sequence_ids)
        rows = self._find(ids, distinct=True)
        window, sinks = (_at_least_0(name, n, len(ids)) for name, n in (("window", window), ("sinks", sinks)))
        old_begin, old_end = self._hole_begin[rows], self._hole_end[rows]
        limit = self._length[rows] - window
        had, drops = old_begin < old_end, sinks < limit
        begin = np.where(drops, np.where(had, np.minimum(old_begin, sinks), sinks), old_begin)
        end = np.where(drops, np.maximum(old_end, limit), old_end)
        first, last = -(-begin // self.page_size), end // self.page_size
        # Where the interval only grew to the right, what is before its old end is dropped already.
        start = np.where(had & (begin == old_begin), np.maximum(first, old_end // self.page_size), first)
        self._drop(rows, first, last, int(start.min(initial=checks.UNBOUNDED, where=drops)))
        self._hole_begin[rows], self._hole_end[rows] = begin, end

    def lengths(self, sequence_ids):
        """Numbers of tokens, evicted ones included.

        Parameters
        ----------
        sequence_ids : int or integers (B,)
            They may repeat.

        Returns
        -------
        ndarray (B,), int64

        Raises
        ------
        TypeError, ValueError
            Ids that are not integers or not in the cache.
        """
        return self._length[self._find(_ids(sequence_ids))]

    def _find(self, ids, distinct=False):
        """The row of each id."""
        if distinct and len(set(ids)) != len(ids):
            raise ValueError(f"sequence_ids must be distinct, got {_first_repeated(ids)} twice")
        try:
            return np.array([self._rows[i] for i in ids], np.int64)
        except KeyError as error:
            raise ValueError(f"sequence_ids must be in the cache, got {error.args[0]}") from None

    def _drop(self, rows, first, last, start):
        """Clear entries first[b] <= index < last[b] of the tables of rows; start <= index for all that have a page."""
        stop = int(last.max(initial=0))
        if start >= stop:
            return
        index = np.arange(start, stop)
        entries = self._tables[rows, start:stop]
        gone = (index >= first[:, None]) & (index < last[:, None]) & (entries >= 0)
        if gone.any():
            pages = entries[gone]
            entries[gone] = -1
            self._tables[rows, start:stop] = entries
            self._release(pages)

    def _release(self, pages):
        """Take one reference off each page, as often as it is named."""
        np.subtract.at(self._references, pages, 1)
        free = np.unique(pages[self._references[pages] == 0])
        n = self.num_free_pages
        self._free[n : n + len(free)] = free[::-1]
        self.num_free_pages = n + len(free)

    def _grow_rows(self, n):
        """State for at least n sequences."""
        old = len(self._length)
        size = max(n, 2 * old)
        tables = np.full((size, self._tables.shape[1]), -1, np.int32)
        tables[:old] = self._tables
        length, begin, end = (np.zeros(size, np.int64) for _ in range(3))
        for new, state in (length, self._length), (begin, self._hole_begin), (end, self._hole_end):
            new[:old] = state
        self._free_rows[:0] = range(size - 1, old - 1, -1)
        self._length, self._hole_begin, self._hole_end, self._tables = length, begin, end, tables

    def _grow_tables(self, n):
        """Tables of at least n entries."""
        rows, old = self._tables.shape
        if n <= old:
            return
        tables = np.full((rows, max(n, 2 * old)), -1, np.int32)
        tables[:, :old] = self._tables
        self._tables = tables

    # --- attention ---

    def attend(self, query, sequence_ids, *, cu_seqlens_q=None, query_lengths=None, rotary=None, mask=None, bias=None,
               causal=False, window=None, scale=None, softcap=None, sinks=None, normalizer="softmax", out=None,
               return_lse=False, deterministic=None, num_threads=None):
        """Attention of queries over the tokens of their sequences, as `fastattn.attention`.

        Query i of the l queries of a sequence of n tokens stands at position n - l + i: new tokens are appended first,
        and the last query is that of the last token. causal and window are in these positions, in which evicted tokens
        count; they are not seen.

        Parameters
        ----------
        query : array (B, H, L, D), float32, float16 or bfloat16; or (T, H, D) with cu_seqlens_q
            H is a multiple of the cache's heads.
        sequence_ids : int or integers (B,)
            They may repeat.
        cu_seqlens_q : integers (B + 1,), optional
            Rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` of a packed query are those of sequence b. Starts at
            0, does not decrease, ends at T.
        query_lengths : int or integers (B,), optional
            l for each sequence, by default all of its rows. Rows at and past it have out 0 and lse -inf.
        rotary : positions.Rotary, optional
            Turn the queries as `positions.apply_rotary` does, each at its own position.
        mask : bool array that broadcasts to (B, H, L, S), optional
            S is the length of the longest of the sequences; with cu_seqlens_q, L is the most rows of one.
        bias : array of query's dtype that broadcasts to (B, H, L, S), `ALiBi` or `RelativeBias`, optional
        causal, window, scale, softcap, sinks, normalizer, deterministic, num_threads : optional
            As in `attention`. The n of a normalizer counts evicted tokens.
        out : ndarray of the result's shape and query's dtype, optional
            Filled and returned. It must not overlap an input.
        return_lse : bool
            Return (out, lse).

        Returns
        -------
        out : ndarray (B, H, L, Dv) or (T, H, Dv), query's dtype, 64-byte aligned
        lse : ndarray (B, H, L) or (T, H), float32
            Only with ``return_lse``, in nats.

        Raises
        ------
        TypeError, ValueError, MemoryError
            As `attention`; ValueError for ids that are not in the cache, another number of them than of queries or of
            packed sequences, a query whose heads or size are not those of the cache, a rotary that turns more than D
            features or lacks a position; TypeError for masks other than arrays.

        Notes
        -----
        Keys and values are read in their pages, once for all query heads that share them where the queries of a
        sequence are few. Sums and softmax are in float32, whatever the cache's dtype is.
        """
        ids = _ids(sequence_ids)
        rows = self._find(ids)
        B = len(ids)

        # --- query ---
        query = checks._array("query", query)
        if query.dtype != checks.FLOAT32 and not checks.is_half(query.dtype):
            raise TypeError(f"query must be float32, float16 or bfloat16 in native byte order, got {query.dtype}")
        packed = cu_seqlens_q is not None
        if query.ndim != (3 if packed else 4):
            axes = "3 axes (T, H, D) with cu_seqlens_q" if packed else "4 axes (B, H, L, D)"
            raise ValueError(f"query must have {axes}, got shape {query.shape}")
        H, size = query.shape[-2 if packed else -3], query.shape[-1]
        if size != self.head_dim:
            raise ValueError(f"query must have the cache's head size {self.head_dim}, got {size}")
        if H % self.kv_heads:
            raise ValueError(f"query must have a multiple of the cache's {self.kv_heads} heads, got {H}")
        if packed:
            cu_q = checks._cumulative("cu_seqlens_q", cu_seqlens_q, len(query), "query")
            if len(cu_q) - 1 != B:
                raise ValueError(f"cu_seqlens_q must have one sequence for each of {B} sequence_ids, "
                                 f"got {len(cu_q) - 1}")
            most = np.diff(cu_q)
        else:
            cu_q = None
            if len(query) != B:
                raise ValueError(f"query must have one batch for each of {B} sequence_ids, got {len(query)}")
            most = np.full(B, query.shape[2], np.int64)

        # --- positions ---
        counts = most
        if query_lengths is not None:
            counts = checks._integers("query_lengths", query_lengths, (B,), 0, int(most.max(initial=0)))
            if packed:
                checks._check_each("query_lengths", counts, most)
        offset = self._length[rows] - counts
        turned = None
        if rotary is not None:
            self._check_rotary(rotary)
            turned = self._turn(query, rotary, ids, offset, counts, cu_q)

        if isinstance(mask, (masks.Mask, masks.Plan)) or hasattr(mask, "tocsr"):
            raise TypeError(f"mask must be a bool array for a cache, got {type(mask).__name__}")
        return self._attend(rows, query, turned, cu_q, offset, None if query_lengths is None else counts, mask, {
            "bias": bias, "causal": causal, "window": window, "scale": scale, "softcap": softcap, "sinks": sinks,
            "normalizer": normalizer, "out": out, "return_lse": return_lse, "deterministic": deterministic,
            "num_threads": num_threads})

    def _turn(self, query, rotary, ids, offset, counts, cu_q):
        """The queries at their positions, in float32; rows that do not count turn anyhow."""
        some = counts > 0
        if not some.any():
            return None
        if (offset[some] < 0).any():
            at = int((some & (offset < 0)).argmax())
            raise ValueError(f"query must have at most the {offset[at] + counts[at]} tokens of sequence {ids[at]} with "
                             f"rotary, got {counts[at]}")
        _check_positions(rotary, int((offset + counts)[some].max()))
        if cu_q is None:
            position = offset[:, None, None] + np.arange(query.shape[2])  # (B, 1, L)
        else:
            position = (np.arange(len(query)) - np.repeat(cu_q[:-1] - offset, np.diff(cu_q)))[:, None]  # (T, 1)
        position = np.clip(position, 0, len(rotary.cos) - 1)
        turned = checks.aligned_empty(query.shape, np.float32)
        positions.rotate(_widen(query), rotary.cos[position], rotary.sin[position], rotary.interleaved, turned)
        return turned

    def _attend(self, rows, query, turned, cu_q, offset, query_lengths, mask, options):
        """Attention of checked queries (B, H, L, D) or, with cu_q, (T, H, D) over the tokens of rows (B,).

        offset (B,) is the position of query 0 of each sequence; mask is None or what the caller gave; turned is None or
        float32 queries to take instead.
        """
        lengths = self._length[rows]
        B, S = len(rows), int(lengths.max(initial=0))
        pages = Pages(self._pools, self._tables, rows, self._hole_begin[rows], self._hole_end[rows])
        nothing = np.zeros((), query.dtype)  # the keys and values of the checks, which look at shapes
        if cu_q is None:
            key, value = (np.broadcast_to(nothing, (B, self.kv_heads, S, D)) for D in (self.head_dim, self.value_dim))
            problem = checks.problem(query, key, value, mask=mask, query_offset=offset, query_lengths=query_lengths,
                                     kv_lengths=lengths, **options)
            if turned is not None:
                problem.query = turned
        else:
            cu_k = np.concatenate(([0], np.cumsum(lengths)))
            shape = int(cu_k[-1]), self.kv_heads
            key, value = (np.broadcast_to(nothing, (*shape, D)) for D in (self.head_dim, self.value_dim))
            problem = checks.problem(query, key, value, mask=mask, query_offset=offset, query_lengths=query_lengths,
                                     packed=(cu_q, cu_k), **options)
            if turned is not None:
                problem.query = np.broadcast_to(turned.swapaxes(0, 1), problem.query.shape)
        problem.pages = pages
        _runtime.forward(problem)
        return problem.result()


class _Plan(NamedTuple):
    """Pages for new tokens that are not entered yet."""

    entries: np.ndarray  # every entry, with its page
    changed: np.ndarray  # which of them are new
    pages: np.ndarray  # those
    left: np.ndarray  # the shared pages that were copied, as often as they were


# --- rows of pages ---

class Pages(NamedTuple):
    """What a problem's keys and values are read from, for batches b."""

    pools: Pools
    tables: np.ndarray  # int32 (rows of state, entries), -1 = no page
    rows: np.ndarray  # int64 (B,): the row of tables of each batch
    hole_begin: np.ndarray  # int64 (B,): tokens that nobody sees
    hole_end: np.ndarray


def dense(problem):
    """A copy of a problem whose keys and values are arrays: float32, the hidden ones masked."""
    pools, tables, rows, begin, end = problem.pages
    one = copy.copy(problem)
    one.pages = None
    packed = problem.cu_q is not None
    lengths = np.diff(problem.cu_k) if packed else problem.kv_lengths
    S = int(lengths.max(initial=0))
    entries = tables[rows, : -(-S // pools.key.shape[2])]
    key = _gather(pools.key, pools.key_scale, entries)[:, :, :S]
    value = _gather(pools.value, pools.value_scale, entries)[:, :, :S]
    if packed:
        present = np.arange(S) < lengths[:, None]
        key, value = (x.swapaxes(1, 2)[present].swapaxes(0, 1) for x in (key, value))  # (Hkv, Tk, D)
        key, value = (np.broadcast_to(x, (len(rows), *x.shape)) for x in (key, value))
    one.key, one.value = key, value
    if (begin < end).any():
        j = np.arange(S)
        seen = ((j < begin[:, None]) | (end[:, None] <= j))[:, None, None]  # (B, 1, 1, S)
        seen = np.broadcast_to(seen, (len(rows), problem.query.shape[-3], problem.L, S))
        one.mask = seen if problem.mask is None else seen & problem.mask
    return one


def _write(pools, slots, counts, begin, key, value, rotary):
    """Store the tokens of key (B, Hkv, L, D) and value (B, Hkv, L, Dv): float32, or the 16-bit floats of the pools.

    slots   int64 (T,): page * page_size + place of each token that counts, sequence by sequence
    counts  None = all L, else int64 (B,): how many tokens of each sequence
    begin   int64 (B,): position of token 0 of each sequence
    rotary  None, or the `positions.Rotary` that turns the keys
    """
    if _runtime.store is not None:
        if rotary is not None and not (rotary.cos.flags.c_contiguous and rotary.sin.flags.c_contiguous):
            rotary = positions.Rotary(*map(np.ascontiguousarray, rotary[:2]), rotary.interleaved)
        _runtime.store(pools, slots, counts, begin, key, value, rotary)
        return
    page, place = np.divmod(slots, pools.key.shape[2])
    B, _, L, _ = key.shape
    sequence, token = np.repeat(np.arange(B), L if counts is None else counts), np.tile(np.arange(L), B)
    if counts is not None:
        token = np.arange(len(slots)) - np.repeat(np.cumsum(counts) - counts, counts)
    key, value = key[sequence, :, token], value[sequence, :, token]  # (T, Hkv, D)
    if rotary is not None:
        position = (begin[sequence] + token)[:, None]
        turned = np.empty(key.shape, np.float32)
        positions.rotate(_widen(key), rotary.cos[position], rotary.sin[position], rotary.interleaved, turned)
        key = turned
    for pool, scales, x in ((pools.key, pools.key_scale, key), (pools.value, pools.value_scale, value)):
        if scales is None:
            pool[page, :, place] = _narrow(x, pool.dtype)
        else:
            pool[page, :, place], scales[page, :, place] = _quantize(x)


def _gather(pool, scales, entries):
    """The pages of tables (B, n) as float32 (B, Hkv, n * page_size, D); zeros where there is none."""
    B, n = entries.shape
    _, heads, size, D = pool.shape
    present = entries >= 0
    pages = entries[present]
    rows = _widen(pool[pages])
    if scales is not None:
        with np.errstate(all="ignore"):
            rows *= scales[pages][..., None]
    dense = np.zeros((B, n, heads, size, D), np.float32)
    dense[present] = rows
    return dense.swapaxes(1, 2).reshape(B, heads, n * size, D)


def _narrow(x, stored):
    """Float32 x, or x of the stored kind already, as it is stored."""
    if x.dtype.itemsize == 2:
        return x.view(stored)
    if stored == np.float32:
        return x
    if stored == np.float16:
        with np.errstate(all="ignore"):
            return x.astype(np.float16)
    bits = np.ascontiguousarray(x).view(np.uint32)
    # Up where the lower half is more than a half, or a half and the upper one odd. A NaN could become Inf, or lose
    # all of its bits: it is made quiet instead.
    rounded = (bits + (0x7FFF + (bits >> 16 & 1))) >> 16
    return np.where((bits & 0x7FFFFFFF) > 0x7F800000, bits >> 16 | 0x40, rounded).astype(np.uint16)


def _widen(x):
    """What is stored, or 16-bit floats, as a new float32 array; codes of int8 as numbers."""
    if x.dtype == np.uint16 or x.dtype.name == "bfloat16":
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def _quantize(x):
    """Codes int8 (..., D) and scales float32 (...)."""
    with np.errstate(all="ignore"):
        largest = abs(x).max(axis=-1)
        scale = np.clip(largest / np.float32(LARGEST_CODE), SMALLEST_SCALE, LARGEST_SCALE)
        scale[np.isinf(largest)] = np.nan
        codes = np.rint(x / scale[..., None])
    codes[np.isnan(scale)] = 0
    return codes.astype(np.int8), scale


def _aligned_zeros(shape, dtype):
    """Zeros that start on a 64-byte boundary, in memory that the system gives when it is first written to."""
    dtype = np.dtype(dtype)
    try:
        memory = np.zeros(math.prod(shape) * dtype.itemsize + 64, np.uint8)
        return np.ndarray(shape, dtype, memory, -memory.ctypes.data % 64)
    except (ValueError, OverflowError, MemoryError):
        raise MemoryError(f"no memory for pages of shape {shape} and dtype {dtype}") from None


# --- arguments ---

def _ids(value, name="sequence_ids"):
    """A new list of Python integers."""
    if isinstance(value, (list, tuple)):
        ids = list(value)
    elif checks._is_integer(value):
        ids = [value]
    else:
        array = checks._array(name, value)
        if array.ndim != 1:
            raise ValueError(f"{name} must be an integer or have one axis, got shape {array.shape}")
        if array.dtype.kind not in "iu" and array.size:
            raise TypeError(f"{name} must be integers, got {array.dtype}")
        return array.astype(np.int64).tolist() if array.dtype.kind == "f" else array.tolist()
    if set(map(type, ids)) - {int}:
        for i in ids:
            if not checks._is_integer(i):
                raise TypeError(f"{name} must be integers, got {type(i).__name__}")
        ids = [int(i) for i in ids]
    return ids


def _first_repeated(ids):
    seen = set()
    return next(i for i in ids if i in seen or seen.add(i))


def _at_least_0(name, value, B):
    """int64 (B,), or one number."""
    if checks._is_integer(value):
        return min(checks._integer(name, value, 0), checks.UNBOUNDED)
    return checks._integers(name, value, (B,), 0, checks.UNBOUNDED)


def _check_positions(rotary, n):
    if n > len(rotary.cos):
        raise ValueError(f"rotary must have the positions 0 to {n - 1}, got a table of {len(rotary.cos)}")
