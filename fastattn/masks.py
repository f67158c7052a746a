"""Masks as expressions: who sees whom, without an array of L x S.

    causal() & documents(ids)        window(128) | global_tokens(4)        ~blocks(layout, 64)

An expression can be asked two things. Its definition says for query i and key j whether i sees j: `to_dense`, and the
NumPy reference. Its runs say for every row which stretches of keys it sees; `&`, `|` and `~` of runs are a sort each,
so compiling costs the number of runs, never L x S. `compile` turns runs into a `Plan`, what the kernels read: for each
group of 64 rows, the tiles of 96 keys that some row sees, and for the tiles that not all rows see in full, 96 words
whose bit i says that row i sees the key.

Positions: where L and S differ, query i stands at position i + offset on the axis of keys; the default offset is S - L,
which aligns the last query with the last key, as in `attention`.
"""

import math
import numbers
from typing import NamedTuple

import numpy as np

ROWS = 64  # of a tile: the bits of a word
KEYS = 96  # of a tile: the kernels' block of keys
KEPT_PLANS = 8  # an expression keeps the plans of the last few sizes
FAR = 2**60  # offsets lie below it and bounds end there: past every key, and their sums fit in 64 bits


class Runs(NamedTuple):
    """The keys that rows see: row r sees lo <= j < hi for each pair of sorted numbers r (S + 1) + lo, r (S + 1) + hi.

    Runs of a row are disjoint and do not touch.
    """

    start: np.ndarray
    end: np.ndarray


def _union(a, b):
    # The k-th start and the (k-1)-th end, both sorted: where the start is larger, every earlier run has ended.
    start, end = np.sort(np.concatenate((a.start, b.start))), np.sort(np.concatenate((a.end, b.end)))
    apart = start[1:] > end[:-1]
    first = np.concatenate((np.ones(min(1, len(start)), bool), apart))
    last = np.concatenate((apart, np.ones(min(1, len(start)), bool)))
    return Runs(start[first], end[last])


def _intersection(a, b):
    # At most two runs overlap anywhere: they do from a start to the end before it.
    start, end = np.sort(np.concatenate((a.start, b.start)))[1:], np.sort(np.concatenate((a.end, b.end)))[:-1]
    both = start < end
    return Runs(start[both], end[both])


def _complement(a, n_rows, S):
    row = np.arange(n_rows, dtype=np.int64) * (S + 1)
    edges = np.sort(np.concatenate((row, a.start, a.end, row + S))).reshape(-1, 2)
    edges = edges[edges[:, 0] < edges[:, 1]]
    return Runs(edges[:, 0], edges[:, 1])


def _runs(row, lo, hi, S):
    """Runs of rows (ascending), clipped to the S keys; empty ones are dropped, those that touch are joined."""
    lo, hi = np.maximum(lo, 0), np.minimum(hi, S)
    row, lo, hi = (x.reshape(-1) for x in np.broadcast_arrays(row, lo, hi))
    some = lo < hi
    base = row[some].astype(np.int64) * (S + 1)
    start, end = base + lo[some], base + hi[some]
    apart = start[1:] != end[:-1]
    edge = np.ones(min(1, len(start)), bool)
    return Runs(start[np.concatenate((edge, apart))], end[np.concatenate((apart, edge))])


def _repeat_lists(runs, lead, target, L, S):
    """Runs of lists of L rows, one list for each index of ``lead``, broadcast to the indices of ``target``."""
    if lead == target:
        return runs
    source = np.broadcast_to(np.arange(math.prod(lead)).reshape(lead), target).ravel()
    size = L * (S + 1)
    cut = np.searchsorted(runs.start, np.arange(math.prod(lead) + 1) * size)
    pieces = [(slice(cut[s], cut[s + 1]), (t - s) * size) for t, s in enumerate(source)]
    return Runs(*(np.concatenate([x[piece] + shift for piece, shift in pieces] or [x[:0]]) for x in runs))


def _ranges(first, count):
    """For ranges first[n], first[n] + 1, ..., count[n] of them: the n of each element, and the element."""
    of = np.repeat(np.arange(len(count)), count)
    return of, np.arange(len(of)) + (first - np.cumsum(count) + count)[of]


# --- plans ---


class Plan:
    """A mask for L queries and S keys, as the kernels read it: pass it as ``mask=`` again and again.

    ``lead`` are the axes of a mask that differs between batches or heads; they broadcast to (..., H). List n of them
    holds G groups of 64 rows, group g the tiles ``first[n G + g] : first[n G + g + 1]``, ascending:
    tile t covers keys 96 ``block[t]`` to 96 ``block[t]`` + 95, and is seen in full where ``word[t]`` is -1, else bit i
    of ``words[word[t], j]`` says whether row 64 g + i sees key 96 ``block[t]`` + j. Equal tiles share their words.
    """

    def __init__(self, runs, L, S, lead=(), mask=None):
        self.L, self.S, self.lead, self.mask = L, S, lead, mask
        self.visible = int((runs.end - runs.start).sum())
        self.first, self.block, self.word, self.words = _tiles(runs, math.prod(lead), L, S)
        for array in (self.first, self.block, self.word, self.words):
            array.flags.writeable = False

    @classmethod
    def stack(cls, plans, mask=None):
        """One plan of the plans of packed sequences, which may differ in L and S; a list each, for all heads.

        ValueError if one has leading axes of its own.
        """
        stacked = cls.__new__(cls)
        if lead := next((plan.lead for plan in plans if plan.lead), None):
            raise ValueError(f"mask must have no leading axes for packed sequences, got {lead}")
        stacked.L, stacked.S = (max((getattr(plan, n) for plan in plans), default=0) for n in "LS")
        stacked.lead, stacked.mask, stacked.parts = (len(plans), 1), mask, plans
        stacked.visible = sum(plan.visible for plan in plans)
        groups = -(-stacked.L // ROWS)
        tiles, words, first = 0, 0, [np.zeros(1, np.int64)]
        word = []
        for plan in plans:
            ends = np.full(groups, len(plan.block), np.int64)  # groups past the last row have no tiles
            ends[: len(plan.first) - 1] = plan.first[1:]
            first.append(tiles + ends)
            word.append(np.where(plan.word < 0, plan.word, plan.word + words))
            tiles, words = tiles + len(plan.block), words + len(plan.words)
        stacked.first = np.concatenate(first)
        empty = [np.zeros(0, np.int32)]
        stacked.block = np.concatenate(empty + [plan.block for plan in plans])
        stacked.word = np.concatenate(empty + word).astype(np.int32)
        stacked.words = np.concatenate([np.zeros((0, KEYS), np.uint64)] + [plan.words for plan in plans])
        return stacked

    def take(self, rows=None, heads=None):
        """The plan of the rows and heads (arrays of indices; None = all) in their order."""
        lists = np.arange(math.prod(self.lead)).reshape(self.lead)
        if heads is not None and self.lead and self.lead[-1] != 1:
            lists = lists[..., heads]
        rows = np.arange(self.L) if rows is None else rows
        if self.mask is not None:
            runs = self.mask._runs(self.L, self.S)
        else:
            at, key = np.divmod(np.flatnonzero(self.to_dense()), max(1, self.S))
            runs = _runs(at, key, key + 1, self.S)
        of = runs.start // (self.S + 1)
        chosen = (lists.reshape(-1, 1) * self.L + rows).ravel()
        first = np.searchsorted(of, chosen)
        row, which = _ranges(first, np.searchsorted(of, chosen, "right") - first)
        lo, hi = (x[which] - of[which] * (self.S + 1) for x in runs)
        return Plan(_runs(row, lo, hi, self.S), len(rows), self.S, lists.shape)

    @property
    def share(self):
        """Visible pairs of all pairs."""
        return self.visible / max(1, math.prod(self.lead) * self.L * self.S)

    @property
    def nbytes(self):
        """Bytes of its arrays."""
        return self.first.nbytes + self.block.nbytes + self.word.nbytes + self.words.nbytes

    def to_dense(self):
        """bool (*lead, L, S)."""
        groups = -(-self.L // ROWS)
        lists = math.prod(self.lead)
        dense = np.zeros((lists * groups, ROWS, -(-self.S // KEYS), KEYS), bool)
        group = np.repeat(np.arange(lists * groups), np.diff(self.first))
        lane = np.arange(ROWS, dtype=np.uint64)[:, None]
        for g, block, word in zip(group, self.block, self.word, strict=True):
            dense[g, :, block] = True if word < 0 else (self.words[word] >> lane) & np.uint64(1)
        dense = dense.reshape(lists, groups * ROWS, dense.shape[2] * KEYS)[:, : self.L, : self.S]
        return dense.reshape(*self.lead, self.L, self.S)

    def definition(self, index):
        """bool (L, S) of the list ``index``, from the expression's definition where there is one."""
        if self.mask is None:
            return self.to_dense()[index]
        return self.mask.to_dense(self.L, self.S)[index]

    def __repr__(self):
        text = "" if self.mask is None else f"{self.mask!r}, "
        return f"<Plan {text}L={self.L}, S={self.S}: {len(self.block)} tiles, {self.share:.3%} visible>"


def _group_starts(of):
    """Where a new value begins in a sorted array."""
    return np.flatnonzero(np.concatenate((np.ones(min(1, len(of)), bool), of[1:] != of[:-1])))


def _tiles(runs, lists, L, S):
    groups, blocks = -(-L // ROWS), S // KEYS + 1  # one block more where S is a multiple: all runs end inside
    width = blocks * KEYS
    ones = ~np.uint64(0)

    # Every run turns its row's bit at its start and at its end. Between two places where bits turn, all keys are alike.
    keys = np.concatenate(runs)
    row, at = np.divmod(keys, S + 1)
    n, row = np.divmod(row, max(L, 1))
    events = np.sort(((n * groups + row // ROWS) * width + at) * ROWS + row % ROWS)
    at, lane = events // ROWS, (events % ROWS).astype(np.uint64)
    first = _group_starts(at)
    at = at[first]
    turn = np.bitwise_xor.reduceat(np.uint64(1) << lane, first) if len(first) else lane
    state = np.bitwise_xor.accumulate(turn)  # the rows that see the keys from here to the next place; 0 between groups

    # Tiles where something turns: 96 words each.
    tile, place = np.divmod(at, KEYS)
    first = _group_starts(tile)
    last = np.append(first[1:], len(tile))[: len(first)] - 1
    words = np.zeros((len(first), KEYS), np.uint64)
    words[np.repeat(np.arange(len(first)), last - first + 1), place] = turn
    words[:, 0] ^= np.concatenate((np.zeros(1, np.uint64), state))[first]
    np.bitwise_xor.accumulate(words, axis=1, out=words)
    tile = tile[first]

    # Tiles between them are alike in all their keys.
    state = state[last]
    count = np.where(state != 0, np.diff(tile, append=0) - 1, 0)
    flat = np.repeat(tile + 1, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    state = np.repeat(state, count)

    # Which of them are full, which empty.
    def rows_of(tile):
        n = np.minimum(ROWS, L - tile // blocks % max(groups, 1) * ROWS)
        return ones >> (ROWS - n).astype(np.uint64)

    every = np.bitwise_and.reduce(words, axis=1)
    cut = tile % blocks == blocks - 1
    every[cut] = np.bitwise_and.reduce(words[cut, : S % KEYS], axis=1)
    some = (words != 0).any(axis=1)
    tile, every, words = tile[some], every[some], words[some]
    partial = every != rows_of(tile)
    partial_flat = state != rows_of(flat)

    # Equal tiles once.
    alike, same_flat = np.unique(state[partial_flat], return_inverse=True)
    words, same = _distinct(np.concatenate((words[partial], np.repeat(alike[:, None], KEYS, axis=1))))
    word = np.full(len(tile) + len(flat), -1, np.int32)
    word[: len(tile)][partial] = same[: partial.sum()]
    word[len(tile) :][partial_flat] = same[partial.sum() :][same_flat]
    tile = np.concatenate((tile, flat))
    order = np.argsort(tile)
    tile = tile[order]
    first = np.searchsorted(tile, np.arange(lists * groups + 1) * blocks)
    return first.astype(np.int64), (tile % blocks).astype(np.int32), word[order], words


def _distinct(words):
    """The different rows of words, and for each row its place among them."""
    # By a hash: powers of an odd number, of words whose high bits (the last rows) count at low places too, where the
    # products differ.
    factor = np.cumprod(np.full(KEYS, 0x9E3779B97F4A7C15, np.uint64))
    _, where, same = np.unique(((words ^ words >> 32) * factor).sum(axis=1), return_index=True, return_inverse=True)
    if not (words == words[where][same]).all():  # a collision
        places = {}
        same = np.array([places.setdefault(row.tobytes(), len(places)) for row in words])
        where = np.unique(same, return_index=True)[1]
    return words[where], same


def plan_of_sparse(array):
    """The plan of a scipy.sparse array (L, S): its nonzero entries are visible."""
    array = array.tocsr()
    if not array.has_canonical_format or (array.data == 0).any():
        array = array.copy()
        array.sum_duplicates()
        array.eliminate_zeros()
    L, S = array.shape
    row = np.repeat(np.arange(L, dtype=np.int64), np.diff(array.indptr))
    return Plan(_runs(row, array.indices.astype(np.int64), array.indices.astype(np.int64) + 1, S), L, S)


# --- expressions ---


class Mask:
    """An expression; combine with ``&``, ``|`` and ``~``. The functions of this module make them."""

    lead: tuple = ()  # axes in which the mask differs, broadcasting to (..., H)
    level = 3  # of the operator in its text: | 0, & 1, ~ 2, a name 3
    __array_ufunc__ = None  # array & mask comes here, not to an array of objects

    def __init__(self, text):
        self._text = text
        self._plans = {}

    def _visible(self, i, j, L, S):
        """The definition: bool (*lead, len(i), len(j)), or what broadcasts to it; i is a column, j a row."""
        raise NotImplementedError

    def _runs(self, L, S):
        """`Runs` of prod(lead) lists of L rows."""
        raise NotImplementedError

    def __and__(self, other):
        return _Combined(self, other, "&")

    def __or__(self, other):
        return _Combined(self, other, "|")

    __rand__, __ror__ = __and__, __or__  # of no mask: an error

    def __invert__(self):
        return _Inverted(self)

    def __bool__(self):
        raise TypeError("a mask has no truth value: combine masks with & | ~, not with and, or, not")

    def __repr__(self):
        return self._text

    def compile(self, L, S):
        """The `Plan` for L queries and S keys; kept, so that the same sizes are compiled once.

        Cost and memory follow the number of runs and tiles. ValueError where the mask does not fit the sizes.
        """
        L, S = _count("L", L), _count("S", S)
        plan = self._plans.get((L, S))
        if plan is None:
            plan = Plan(self._runs(L, S), L, S, self.lead, self)
            # A new dictionary each time, so that threads need no lock: at worst two compile the same plan.
            self._plans = dict([*self._plans.items()][1 - KEPT_PLANS :]) | {(L, S): plan}
        return plan

    def to_dense(self, L, S):
        """bool (*lead, L, S) by the definition, True = attend."""
        L, S = _count("L", L), _count("S", S)
        i, j = np.arange(L)[:, None], np.arange(S)[None, :]
        return np.array(np.broadcast_to(self._visible(i, j, L, S), (*self.lead, L, S)), order="C")

    def plot(self, L, S, ax=None):
        """Draw the first list's mask, queries downwards, and return matplotlib's axes. Needs matplotlib."""
        from . import plot

        return plot.mask(self, L, S, ax=ax)


class _Combined(Mask):
    def __init__(self, a, b, sign):
        if not isinstance(b, Mask):
            raise TypeError(f"a mask combines by {sign} with masks, got {type(b).__name__}; blocks(array, 1) makes one "
                            "of an array")
        self.both = sign == "&"
        self.level = int(self.both)
        super().__init__(f"{_inside(a, self.level)} {sign} {_inside(b, self.level + 1)}")
        try:
            self.lead = np.broadcast_shapes(a.lead, b.lead)
        except ValueError:
            raise ValueError(f"masks must have leading axes that broadcast, got {a.lead} of {a!r} and {b.lead} of "
                             f"{b!r}") from None
        self.a, self.b = a, b

    def _visible(self, i, j, L, S):
        a, b = self.a._visible(i, j, L, S), self.b._visible(i, j, L, S)
        return a & b if self.both else a | b

    def _runs(self, L, S):
        a, b = (_repeat_lists(m._runs(L, S), m.lead, self.lead, L, S) for m in (self.a, self.b))
        return _intersection(a, b) if self.both else _union(a, b)


class _Inverted(Mask):
    level = 2

    def __init__(self, a):
        super().__init__(f"~{_inside(a, 2)}")
        self.a, self.lead = a, a.lead

    def _visible(self, i, j, L, S):
        return ~self.a._visible(i, j, L, S)

    def _runs(self, L, S):
        return _complement(self.a._runs(L, S), math.prod(self.lead) * L, S)


def _inside(mask, level):
    return f"({mask!r})" if mask.level < level else repr(mask)


def _named(mask, text):
    """A combination under the name of the function that made it."""
    mask._text, mask.level = text, 3
    return mask


def _call(name, *args, **options):
    """The text of a call: options only where they are not None."""
    parts = [_text(a) for a in args] + [f"{k}={_text(v)}" for k, v in options.items() if v is not None]
    return f"{name}({', '.join(parts)})"


def _text(value):
    if not isinstance(value, np.ndarray):
        return repr(value.item() if isinstance(value, np.generic) else value)
    with np.printoptions(threshold=12, edgeitems=3):
        return f"{np.array2string(value, separator=', ')}".replace("\n", "")


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def _count(name, value, low=0):
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def _bound(name, value):
    return min(_count(name, value), 2 * FAR)


def _offset(value):
    if value is None:
        return None
    if not _is_integer(value):
        raise TypeError(f"offset must be an integer, got {type(value).__name__}")
    if not -FAR < value < FAR:
        raise ValueError(f"offset must lie in [{1 - FAR}, {FAR - 1}], got {value}")
    return int(value)


def _integer_array(name, value):
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"{name} must be integers, got {array.dtype}")
    return array.astype(np.int64)  # a copy: the mask does not change with the caller's array


def _lead(shape, other, names):
    """(*leading axes, 1 head), or no axes at all, of two arrays that differ between batches."""
    try:
        shape = np.broadcast_shapes(shape, other)
    except ValueError:
        raise ValueError(f"{names[1]} must have leading axes that broadcast with those of {names[0]}, {shape}, got "
                         f"{other}") from None
    return (*shape, 1) if shape else ()


def _rows(lead, L):
    return np.arange(math.prod(lead) * L).reshape(*lead, L)


class _Band(Mask):
    """-left <= (j - p) <= right, p = i + offset; None = no bound."""

    def __init__(self, text, left, right, offset):
        super().__init__(text)
        self.left, self.right, self.offset = left, right, offset

    def _positions(self, i, L, S):
        return i + (S - L if self.offset is None else self.offset)

    def _visible(self, i, j, L, S):
        p = self._positions(i, L, S)
        seen = np.ones(np.broadcast_shapes(np.shape(i), np.shape(j)), bool)
        if self.left is not None:
            seen &= j >= p - self.left
        if self.right is not None:
            seen &= j <= p + self.right
        return seen

    def _runs(self, L, S):
        p = self._positions(np.arange(L), L, S)
        return _runs(np.arange(L), 0 if self.left is None else p - self.left,
                     S if self.right is None else p + self.right + 1, S)


def causal(offset=None):
    """Query i sees the keys j <= i + offset; the default offset is S - L."""
    return _Band(_call("causal", offset=_offset(offset)), None, 0, _offset(offset))


def window(left, right=..., offset=None):
    """With p = i + offset, query i sees p - left <= j <= p + right; None = no bound, the default right is left."""
    text = _call("window", left, *(() if right is ... else (right,)), offset=_offset(offset))
    right = left if right is ... else right
    left, right = (None if n is None else _bound(name, n) for name, n in (("left", left), ("right", right)))
    return _Band(text, left, right, _offset(offset))


class _Dilated(Mask):
    def __init__(self, text, left, right, dilation, offset):
        super().__init__(text)
        self.left, self.right, self.dilation, self.offset = left, right, dilation, offset

    def _visible(self, i, j, L, S):
        step = j - i - (S - L if self.offset is None else self.offset)
        d = self.dilation
        return (step % d == 0) & (step >= -self.left * d) & (step <= self.right * d)

    def _runs(self, L, S):
        first = S - L if self.offset is None else self.offset
        p = first + np.arange(L)[:, None]
        d = self.dilation
        # Steps past both ends of the keys, for every query, are left out.
        step = np.arange(max(-self.left, -((first + L - 1) // d)), min(self.right, (S - 1 - first) // d) + 1)
        key = p + step * d
        return _runs(np.arange(L)[:, None], key, np.where(key < 0, key, key + 1), S)


def dilated(left, right=None, *, dilation=2, offset=None):
    """A window with gaps (Longformer): query i sees the keys i + offset + k dilation, -left <= k <= right.

    ``left`` and ``right`` (default: left) count keys.
    """
    right = left if right is None else right
    text = _call("dilated", left, right, dilation=dilation, offset=offset)
    _count("dilation", dilation, 1)
    return _Dilated(text, _bound("left", left), _bound("right", right), _bound("dilation", dilation), _offset(offset))


class _Lengths(Mask):
    def __init__(self, text, names, keys, queries=None):
        super().__init__(text)
        self.names, self.keys, self.queries = names, keys, queries
        self.lead = _lead(keys.shape, () if queries is None else queries.shape, names)

    def _limits(self, L, S):
        for name, lengths, most in zip(self.names, (self.keys, self.queries), (S, L)):
            if lengths is not None and lengths.size and not (lengths.min() >= 0 and lengths.max() <= most):
                worst = lengths.min() if lengths.min() < 0 else lengths.max()
                raise ValueError(f"{name} of {self!r} must lie in [0, {most}], got {worst}")
        shape = self.lead or ()
        keys = np.broadcast_to(self.keys, shape[:-1]).reshape(*shape, 1, 1)
        queries = L if self.queries is None else np.broadcast_to(self.queries, shape[:-1]).reshape(*shape, 1, 1)
        return keys, queries

    def _visible(self, i, j, L, S):
        keys, queries = self._limits(L, S)
        return (j < keys) & (i < queries)

    def _runs(self, L, S):
        keys, queries = self._limits(L, S)
        i = np.arange(L)[:, None]
        return _runs(_rows(self.lead, L), 0, np.where(i < queries, keys, 0)[..., 0], S)


def lengths(kv_lengths, query_lengths=None):
    """Queries i < query_lengths[b] see keys j < kv_lengths[b]: integers, or arrays of the axes before the heads."""
    keys = _integer_array("kv_lengths", kv_lengths)
    queries = None if query_lengths is None else _integer_array("query_lengths", query_lengths)
    text = _call("lengths", keys.tolist(), *([] if queries is None else [queries.tolist()]))
    return _Lengths(text, ("kv_lengths", "query_lengths"), keys, queries)


def prefix(n):
    """All queries see the first n keys: ``prefix(n) | causal()`` is a prefix LM.

    ``n``: an integer, or an array of the axes before the heads.
    """
    n = _integer_array("n", n)
    return _Lengths(_call("prefix", n.tolist()), ("n",), n)


class _Documents(Mask):
    def __init__(self, ids, key_ids):
        super().__init__(_call("documents", ids, *([] if key_ids is None else [key_ids])))
        self.ids, self.key_ids = ids, ids if key_ids is None else key_ids
        for name, array in (("ids", self.ids), ("key_ids", self.key_ids)):
            if array.ndim == 0:
                raise ValueError(f"{name} must have an axis of positions, got shape {array.shape}")
        self.lead = _lead(self.ids.shape[:-1], self.key_ids.shape[:-1], ("ids", "key_ids"))

    def _lists(self, L, S):
        keys = "ids" if self.key_ids is self.ids else "key_ids"
        for name, ids, n in (("ids", self.ids, L), (keys, self.key_ids, S)):
            if ids.shape[-1] != n:
                raise ValueError(f"{name} of documents must have one id for each of {n} positions, got {ids.shape[-1]}")
        shape = self.lead[:-1]
        return np.broadcast_to(self.ids, (*shape, L)), np.broadcast_to(self.key_ids, (*shape, S))

    def _visible(self, i, j, L, S):
        ids, key_ids = self._lists(L, S)
        seen = ids[..., np.ravel(i)][..., :, None] == key_ids[..., np.ravel(j)][..., None, :]
        return seen[..., None, :, :] if self.lead else seen

    def _runs(self, L, S):
        ids, key_ids = self._lists(L, S)
        lists = math.prod(self.lead)
        parts = [(np.zeros(0, np.int64),) * 3]
        for n, (mine, theirs) in enumerate(zip(ids.reshape(lists, L), key_ids.reshape(lists, S), strict=True)):
            lo = _group_starts(theirs)
            hi = np.append(lo[1:], S)[: len(lo)]
            order = np.argsort(theirs[lo], kind="stable")
            of = theirs[lo][order]
            first, last = np.searchsorted(of, mine), np.searchsorted(of, mine, "right")
            count = last - first
            which = np.repeat(first, count) + np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
            parts.append((np.repeat(n * L + np.arange(L), count), lo[order][which], hi[order][which]))
        return _runs(*(np.concatenate(x) for x in zip(*parts, strict=True)), S)


def documents(ids, key_ids=None):
    """Query i sees the keys of its own document: ids[..., i] == key_ids[..., j] (default: the same ids).

    ``ids``: integers (L,), or (..., L) with the leading axes; equal ids need not be neighbours.
    """
    return _Documents(_integer_array("ids", ids), None if key_ids is None else _integer_array("key_ids", key_ids))


class _Global(Mask):
    def __init__(self, tokens, text):
        super().__init__(text)
        self.tokens = tokens

    def _member(self, S):
        if len(self.tokens) and self.tokens[-1] >= S:
            raise ValueError(f"tokens of {self!r} must lie below the {S} keys, got {self.tokens[-1]}")
        member = np.zeros(S, bool)
        member[self.tokens] = True
        return member

    def _rows_in(self, i, L, S):
        p = i + S - L
        return (p >= 0) & self._member(S)[np.maximum(p, 0)] if S else np.zeros(np.shape(i), bool)

    def _visible(self, i, j, L, S):
        return self._rows_in(i, L, S) | self._member(S)[j]

    def _runs(self, L, S):
        t = self.tokens if len(self._member(S)) else self.tokens[:0]
        lo, hi = t[np.concatenate((np.ones(min(1, len(t)), bool), np.diff(t) > 1))], np.empty(0, np.int64)
        if len(t):
            hi = t[np.concatenate((np.diff(t) > 1, [True]))] + 1
        i = np.arange(L)
        inside = self._rows_in(i, L, S)
        few = _runs(i[~inside, None], lo, hi, S)
        return _union(few, _runs(i[inside], 0, S, S))


def global_tokens(tokens):
    """Tokens that see all and that all see (Longformer): the first ``tokens`` ones, or those at indices ``tokens``.

    Token t is key t, and the query at position t: t = i + S - L.
    """
    if _is_integer(tokens):
        index = np.arange(_count("tokens", tokens))
        return _Global(index, _call("global_tokens", int(tokens)))
    index = _integer_array("tokens", tokens)
    if index.ndim != 1:
        raise ValueError(f"tokens must be a number of tokens or have one axis of indices, got shape {index.shape}")
    if index.size and index.min() < 0:
        raise ValueError(f"tokens must be indices of at least 0, got {index.min()}")
    index = np.unique(index)
    return _Global(index, _call("global_tokens", index.tolist()))


class _Blocks(Mask):
    """Blocks of ``rows`` queries x ``keys`` keys; `_layout` says which are visible."""

    def __init__(self, text, size):
        super().__init__(text)
        self.rows, self.keys = size

    def _layout(self, n_rows, n_keys):
        raise NotImplementedError

    def _grid(self, L, S):
        if L % self.rows or S % self.keys:
            raise ValueError(f"L and S must be multiples of the blocks of {self.rows} x {self.keys} of {self!r}, got "
                             f"L = {L} and S = {S}")
        return self._layout(L // self.rows, S // self.keys)

    def _visible(self, i, j, L, S):
        layout = self._grid(L, S)
        return layout[..., np.ravel(i) // self.rows, :][..., np.ravel(j) // self.keys]

    def _runs(self, L, S):
        layout = self._grid(L, S)
        if layout.size == 0:
            return Runs(np.zeros(0, np.int64), np.zeros(0, np.int64))
        flat = np.zeros((math.prod(layout.shape[:-1]), layout.shape[-1] + 2), np.int8)
        flat[:, 1:-1] = layout.reshape(len(flat), -1)
        edge = np.diff(flat)
        band, lo = np.nonzero(edge == 1)
        hi = np.nonzero(edge == -1)[1]
        # every row of a band has its band's runs
        count = np.bincount(band, minlength=len(flat))
        first = np.cumsum(count) - count
        per_row = np.repeat(count, self.rows)
        which = np.arange(per_row.sum()) - np.repeat(np.cumsum(per_row) - per_row, per_row)
        which += np.repeat(np.repeat(first, self.rows), per_row)
        row = np.repeat(np.arange(len(per_row)), per_row)
        return _runs(row, lo[which] * self.keys, hi[which] * self.keys, S)


class _GivenBlocks(_Blocks):
    def __init__(self, layout, size):
        super().__init__(_call("blocks", layout, size[0] if size[0] == size[1] else size), size)
        self.layout, self.lead = layout, layout.shape[:-2]

    def _layout(self, n_rows, n_keys):
        if self.layout.shape[-2:] != (n_rows, n_keys):
            raise ValueError(f"layout of {self!r} must have {n_rows} x {n_keys} blocks for L = {n_rows * self.rows} "
                             f"and S = {n_keys * self.keys}, got {self.layout.shape[-2]} x {self.layout.shape[-1]}")
        return self.layout


class _RandomBlocks(_Blocks):
    def __init__(self, size, keep, seed):
        super().__init__(_call("random_blocks", size[0] if size[0] == size[1] else size, keep, seed=seed or None), size)
        self.keep, self.seed = keep, seed

    def _layout(self, n_rows, n_keys):
        count = self.keep if _is_integer(self.keep) else round(self.keep * n_keys)
        if count > n_keys:
            raise ValueError(f"keep of {self!r} must be at most the {n_keys} blocks of keys, got {count}")
        order = np.random.default_rng(self.seed).random((n_rows, n_keys)).argsort(axis=1)
        layout = np.zeros((n_rows, n_keys), bool)
        np.put_along_axis(layout, order[:, :count], True, axis=1)
        return layout


class _LocalBlocks(_Blocks):
    """Blocks at most ``radius`` off the diagonal, which ends in the last corner."""

    def __init__(self, text, size, radius):
        super().__init__(text, size)
        self.radius = radius

    def _layout(self, n_rows, n_keys):
        return abs(np.arange(n_rows)[:, None] + n_keys - n_rows - np.arange(n_keys)) <= self.radius


def _size(size):
    pair = size if isinstance(size, (tuple, list)) else (size, size)
    if len(pair) != 2:
        raise ValueError(f"size must be an integer or a pair (queries, keys), got {len(pair)} values")
    return tuple(_count("size", n, 1) for n in pair)


def blocks(layout, size):
    """Blocks of ``size`` (an integer, or queries and keys) that a bool array (..., L / size, S / size) shows or hides.

    Axes in front broadcast to (..., H): a layout for each head, or for each batch and head.
    """
    layout = np.array(layout)
    if layout.dtype != bool:
        raise TypeError(f"layout must be boolean, got {layout.dtype}")
    if layout.ndim < 2:
        raise ValueError(f"layout must have at least 2 axes, got shape {layout.shape}")
    return _GivenBlocks(layout, _size(size))


def random_blocks(size, keep, seed=0):
    """For each block of queries ``keep`` random blocks of keys: a number, or a share in [0, 1].

    Equal seeds give equal blocks.
    """
    if not _is_integer(keep) and not (isinstance(keep, numbers.Real) and not isinstance(keep, bool)):
        raise TypeError(f"keep must be a number, got {type(keep).__name__}")
    if not (keep >= 0 and (_is_integer(keep) or keep <= 1)):
        raise ValueError(f"keep must be a number of blocks or a share in [0, 1], got {keep}")
    return _RandomBlocks(_size(size), keep, _count("seed", seed))


class _Neighborhood(Mask):
    def __init__(self, shape, size, dilation):
        def short(x):
            return x[0] if len(set(x)) == 1 and len(x) == len(shape) else x

        super().__init__(_call("neighborhood", shape if len(shape) > 1 else shape[0], short(size),
                               dilation=None if set(dilation) == {1} else short(dilation)))
        self.shape, self.size, self.dilation = shape, size, dilation

    def _check(self, L, S):
        n = math.prod(self.shape)
        if n != L or n != S:
            raise ValueError(f"L and S must be the {n} tokens of {self!r}, got L = {L} and S = {S}")

    def _first(self, axis):
        """For each coordinate of an axis the first one that it sees; the others follow in steps of the dilation."""
        n, k, d = self.shape[axis], self.size[axis], self.dilation[axis]
        x = np.arange(n)
        rest = x % d
        most = (n - rest + d - 1) // d - k  # of the coordinates of the same rest, how far a neighbourhood can move
        return rest + d * np.clip(x // d - k // 2, 0, most)

    def _visible(self, i, j, L, S):
        self._check(L, S)
        seen = True
        at_i, at_j = np.unravel_index(i, self.shape), np.unravel_index(j, self.shape)
        for axis, (k, d) in enumerate(zip(self.size, self.dilation, strict=True)):
            step = at_j[axis] - self._first(axis)[at_i[axis]]
            seen = seen & (step % d == 0) & (step >= 0) & (step < k * d)
        return seen

    def _runs(self, L, S):
        self._check(L, S)
        row = np.arange(L)
        at = np.unravel_index(row, self.shape)
        start = np.zeros((L, 1), np.int64)
        for axis, (k, d) in enumerate(zip(self.size, self.dilation, strict=True)):
            x = self._first(axis)[at[axis]][:, None]
            start = start * self.shape[axis]
            if axis == len(self.shape) - 1 and d == 1:
                return _runs(row[:, None], start + x, start + x + k, S)
            start = (start[:, :, None] + (x + d * np.arange(k))[:, None, :]).reshape(L, -1)
        return _runs(row[:, None], start, start + 1, S)


def neighborhood(shape, size, dilation=1):
    """Each token of a grid sees the ``size`` nearest ones along each axis (Hassani et al., "Neighborhood Attention
    Transformer", 2023).

    ``shape``: the grid, 1 to 3 axes, row-major; L = S = its number of tokens. ``size`` and ``dilation``: an integer, or
    one for each axis. At the border the neighbourhood moves inwards, so that all tokens see equally many; an even size
    reaches one further to the left. With a dilation d a token sees every d-th one, and size * dilation must fit into
    the axis.
    """
    shape = tuple(_count("shape", n, 1) for n in (shape if isinstance(shape, (tuple, list)) else (shape,)))
    if not 1 <= len(shape) <= 3:
        raise ValueError(f"shape must have 1 to 3 axes, got {len(shape)}")
    each = []
    for name, value in (("size", size), ("dilation", dilation)):
        value = tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(shape)
        if len(value) != len(shape):
            raise ValueError(f"{name} must have one number for each of {len(shape)} axes, got {len(value)}")
        each.append(tuple(_count(name, n, 1) for n in value))
    for n, k, d in zip(shape, *each, strict=True):
        if k * d > n:
            raise ValueError(f"size * dilation must fit into the axis of {n}, got {k} * {d}")
    return _Neighborhood(shape, *each)


def longformer(width, tokens):
    """A window of ``width`` keys around each query, and global tokens (Beltagy et al., "Longformer", 2020)."""
    return _named(window(_count("width", width) // 2) | global_tokens(tokens), _call("longformer", width, tokens))


def bigbird(size=64, *, random=3, width=3, blocks=1, seed=0):
    """Blocks of ``size``: a window of ``width`` blocks, ``random`` random ones for each block of queries, and the first
    ``blocks`` ones global (Zaheer et al., "Big Bird", 2020)."""
    size, blocks = _count("size", size, 1), _count("blocks", blocks)
    text = _call("bigbird", size, random=random, width=width, blocks=blocks, seed=seed or None)
    local = _LocalBlocks(text, (size, size), _count("width", width) // 2)
    return _named(local | global_tokens(blocks * size) | random_blocks(size, _count("random", random), seed), text)
