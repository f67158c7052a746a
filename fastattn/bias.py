"""Biases computed from positions: `attention` takes them as ``bias=``, and all but those of grids take no L x S memory.

A bias that depends on nothing but the distance of a key from its query is a view of one row of numbers a head. For
L = 3, S = 4 and the table t[0], t[1], ... over p - j, in which entry S - 1 is that of query 0 and key 0::

    key           0  1  2  3
    query 0    t[ 3  2  1  0 ]        one row down is one entry on: queries are contiguous, as the kernel likes them;
    query 1    t[ 4  3  2  1 ]        one key on is one entry back;
    query 2    t[ 5  4  3  2 ]        L + S - 1 entries in all
"""

import math

import numpy as np

from . import positions


class Bias:
    """What `ALiBi` and `RelativeBias` have in common.

    ``heads``: the number of heads it is for, or None if it is the same for all.
    """

    heads = None

    def check(self, H, L, S):
        """Raise ValueError unless it fits H heads, L queries and S keys."""
        if self.heads is not None and self.heads != H:
            raise ValueError(f"bias must be for query's {H} heads, got {self!r}")

    def view(self, lead, H, L, S, dtype, query_offset=None):
        """An array, only to be read, that broadcasts to (*lead, H, L, S), in O((L + S) heads) memory for each offset.

        ``query_offset``: None for S - L, or int64 (B,), as `attention` has it. Values are rounded to ``dtype`` once.
        """
        self.check(H, L, S)
        dtype = np.dtype(dtype)
        if math.prod(lead) * H * L * S == 0:
            return np.broadcast_to(dtype.type(0), (H, L, S))
        offset = _offsets(lead, L, S, query_offset)
        with np.errstate(all="ignore"):
            values = self._values((S - 1 - offset)[..., None] - np.arange(L + S - 1))
            table = np.ascontiguousarray(values, dtype)
        # A single query needs no stride between queries; 0 tells the kernel so.
        strides = (*table.strides[:-1], dtype.itemsize if L > 1 else 0, -dtype.itemsize)
        view = np.ndarray((*table.shape[:-1], L, S), dtype, table, (S - 1) * dtype.itemsize, strides)
        view.flags.writeable = False
        return view

    def index(self):
        """None, or int64 (L,) and (S,): query i and key j read element index[0][i] + index[1][j] of the view."""
        return None

    def diagonals(self, lead, L, S, query_offset=None):
        """What sums of the gradient are kept: ((rows, cols), lead, n, distance).

        Query i and key j add to element rows[i] + cols[j] of the n of their batch and head; lead is 1 where batches
        along an axis share them, and distance (*lead, n) says which j - p each is, or is None where `index` does.
        """
        offset = _offsets(lead, L, S, query_offset)
        n = max(0, L + S - 1)
        return (np.arange(L) + (S - 1), -np.arange(S)), offset.shape, n, (S - 1 - offset)[..., None] - np.arange(n)

    def gradient(self, sums, distance):
        """The gradient of what the object was made of, from float64 sums (..., H, n) over diagonals."""
        raise NotImplementedError

    def _values(self, distance):
        """(..., heads or 1, n) for integers (..., n): distances j - p."""
        raise NotImplementedError


class ALiBi(Bias):
    """Attention with linear biases: keys that are further from the query weigh less, at a slope for each head.

        bias[h, i, j] = slopes[h] * (j - p)       p = i + query_offset, as in `attention`
        bias[h, i, j] = -slopes[h] * |j - p|      if symmetric

    The first form is meant for ``causal=True``: it favours keys ahead of the query, which causal hides. The default
    offset is ``kv_lengths - L``, or S - L without lengths, whether causal or not.

    Parameters
    ----------
    slopes : floats (H,)
        Usually `fastattn.positions.alibi_slopes` (H). Copied.
    symmetric : bool

    Raises
    ------
    TypeError
        Slopes that are no floats, a symmetric that is no bool.
    ValueError
        Slopes of another shape. `attention`: a number of heads other than query's.

    Notes
    -----
    Memory of O((L + S) H) for the duration of a call of `attention`, for each different offset in the batch.

    References
    ----------
    Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
    2022.

    Examples
    --------
    Equal scores, and a bias that lets the weight halve with each step back:

    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 3, 4)), np.zeros((1, 3, 4)), np.eye(3)[None]
    >>> fa.attention(query, key, value, bias=fa.ALiBi([np.log(2)]), causal=True).round(3)
    array([[[1.   , 0.   , 0.   ],
            [0.333, 0.667, 0.   ],
            [0.143, 0.286, 0.571]]])
    """

    def __init__(self, slopes, symmetric=False):
        self.slopes = _floats("slopes", slopes)
        if self.slopes.ndim != 1:
            raise ValueError(f"slopes must have shape (H,), got {self.slopes.shape}")
        if not isinstance(symmetric, (bool, np.bool_)):
            raise TypeError(f"symmetric must be a bool, got {type(symmetric).__name__}")
        self.symmetric = bool(symmetric)
        self.heads = len(self.slopes)

    def _values(self, distance):
        slopes, distance = self.slopes.astype(np.float64)[:, None], distance[..., None, :]
        return -slopes * abs(distance) if self.symmetric else slopes * distance

    def gradient(self, sums, distance):
        of_slope = -abs(distance) if self.symmetric else distance
        result = (sums * of_slope[..., None, :]).sum(axis=-1)
        return result.sum(axis=tuple(range(result.ndim - 1))).astype(self.slopes.dtype)

    def __repr__(self):
        return f"<ALiBi: {self.heads} heads{', symmetric' if self.symmetric else ''}>"


class RelativeBias(Bias):
    """A bias looked up by the distance of a key from its query.

        bias[h, i, j] = table[h, j - p - first]       p = i + query_offset, as in `attention`

    Distances past an end of the table have the entry at that end. The default offset is ``kv_lengths - L``, or S - L
    without lengths, whether causal or not. `t5`, `grid` and `decomposed` make one from the tables of well-known models.

    Parameters
    ----------
    table : floats (H, n) or (n,)
        n >= 1; one axis: the same for all heads. Copied. -inf masks.
    first : int, optional
        Distance j - p of the first entry. Default ``-(n // 2)`` for an odd n: the middle entry is that of distance 0.

    Raises
    ------
    TypeError
        A table that holds no floats, a first that is no integer.
    ValueError
        A table of another shape, an even n without first, a first of 2^60 or more in size. `attention`: a number of
        heads other than query's; for a grid, L or S other than its number of tokens.

    Notes
    -----
    Memory of O((L + S) H) for the duration of a call of `attention`, for each different offset in the batch.

    References
    ----------
    The clamped distance: Shaw, Uszkoreit and Vaswani, "Self-Attention with Relative Position Representations", 2018.

    Examples
    --------
    Only neighbours, the next one twice as much as the one before:

    >>> import numpy as np
    >>> import fastattn as fa
    >>> bias = fa.RelativeBias([-np.inf, 0.0, -np.inf, np.log(2), -np.inf])
    >>> query, key, value = np.zeros((4, 2)), np.zeros((4, 2)), np.eye(4)
    >>> fa.attention(query, key, value, bias=bias).round(3)
    array([[0.   , 1.   , 0.   , 0.   ],
           [0.333, 0.   , 0.667, 0.   ],
           [0.   , 0.333, 0.   , 0.667],
           [0.   , 0.   , 1.   , 0.   ]])
    """

    def __init__(self, table, *, first=None):
        self.table = _floats("table", table)
        if self.table.ndim not in (1, 2) or self.table.shape[-1] == 0:
            raise ValueError(f"table must have shape (H, n) or (n,) with n >= 1, got {self.table.shape}")
        n = self.table.shape[-1]
        if first is None:
            if n % 2 == 0:
                raise ValueError(f"first must be given for a table of an even number of distances, got a table of {n}")
            first = -(n // 2)
        self.shape = self._made_of = None
        self.first = positions._count("first", first, 1 - 2**60)
        if self.first >= 2**60:
            raise ValueError(f"first must be less than 2**60, got {first}")
        self.heads = len(self.table) if self.table.ndim == 2 else None

    @staticmethod
    def t5(table, *, bidirectional=True, max_distance=128):
        """The bias of T5: a number for each of its buckets of distances and each head.

        Parameters
        ----------
        table : floats (num_buckets, H)
            The weight of T5's embedding ``relative_attention_bias``.
        bidirectional : bool
            True in encoders, False in decoders.
        max_distance : int
            From here on all distances share a bucket.

        Returns
        -------
        RelativeBias

        Raises
        ------
        TypeError, ValueError
            A table of another kind or shape, or numbers that `fastattn.positions.relative_buckets` refuses.

        Notes
        -----
        T5 has no scale: call ``attention(query, key, value, bias=bias, scale=1.0)``.

        References
        ----------
        Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.
        """
        table = _floats("table", table)
        if table.ndim != 2:
            raise ValueError(f"table must have shape (num_buckets, H), got {table.shape}")
        how = {"bidirectional": bidirectional, "max_distance": max_distance}
        positions.relative_buckets([], len(table), **how)  # refuses wrong numbers before they become a size
        # Past max_distance on either side, and ahead of a decoder's query, nothing changes: a clamped table.
        distance = np.arange(-max_distance, max_distance + 1 if bidirectional else 1)
        buckets = positions.relative_buckets(distance, len(table), **how)
        bias = RelativeBias(table[buckets].T, first=-max_distance)
        bias._made_of = lambda gradient: np.stack([np.bincount(buckets, row, len(table)) for row in gradient], axis=1)
        return bias

    @staticmethod
    def grid(table, *, shape):
        """The bias of Swin Transformer within a window of h x w tokens, row-major, L = S = h w.

            bias[n, i, j] = table[(yi - yj + h - 1) (2 w - 1) + xi - xj + w - 1, n]

        Positions are those of the grid: `query_offset` does not move them.

        Parameters
        ----------
        table : floats ((2 h - 1) (2 w - 1), H)
            Swin's ``relative_position_bias_table``.
        shape : (h, w)

        Returns
        -------
        RelativeBias

        Raises
        ------
        TypeError, ValueError
            A table or shape of another kind or size.

        References
        ----------
        Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows", 2021.
        """
        h, w = _grid_shape(shape)
        table = _floats("table", table)
        if table.ndim != 2 or len(table) != (2 * h - 1) * (2 * w - 1):
            raise ValueError(f"table must have shape ({(2 * h - 1) * (2 * w - 1)}, H) for a grid of {h} x {w}, "
                             f"got {table.shape}")
        bias = _GridBias(table.T.reshape(-1, 2 * h - 1, 2 * w - 1), (h, w))
        bias._made_of = lambda gradient: gradient.reshape(len(gradient), -1).T
        return bias

    @staticmethod
    def decomposed(rows, columns, *, shape):
        """A bias over a grid of h x w tokens that is a sum of one for rows and one for columns, L = S = h w.

            bias[n, i, j] = rows[n, yi - yj + h - 1] + columns[n, xi - xj + w - 1]

        The static form of MViTv2 and SAM, whose tables do not depend on the query. Else as `grid`.

        Parameters
        ----------
        rows : floats (H, 2 h - 1)
        columns : floats (H, 2 w - 1)
        shape : (h, w)

        Returns
        -------
        RelativeBias

        Raises
        ------
        TypeError, ValueError
            Tables or a shape of another kind or size.

        References
        ----------
        Li et al., "MViTv2: Improved Multiscale Vision Transformers for Classification and Detection", 2022; Kirillov et
        al., "Segment Anything", 2023.
        """
        h, w = _grid_shape(shape)
        rows, columns = _floats("rows", rows), _floats("columns", columns)
        for name, table, n in (("rows", rows, 2 * h - 1), ("columns", columns, 2 * w - 1)):
            if table.ndim != 2 or table.shape[1] != n:
                raise ValueError(f"{name} must have shape (H, {n}) for a grid of {h} x {w}, got {table.shape}")
        if len(columns) != len(rows):
            raise ValueError(f"columns must have the {len(rows)} heads of rows, got {len(columns)}")
        with np.errstate(all="ignore"):
            table = rows[:, :, None].astype(np.float64) + columns[:, None, :]
        bias = _GridBias(table, (h, w))
        bias._made_of = lambda gradient: (gradient.sum(axis=2), gradient.sum(axis=1))
        return bias

    def _values(self, distance):
        index = np.clip(distance - self.first, 0, self.table.shape[-1] - 1)
        if self.heads is None:
            return self.table[index][..., None, :]
        return np.moveaxis(self.table[:, index], 0, -2)

    def gradient(self, sums, distance):
        size = self.table.shape[-1]
        index = np.broadcast_to(np.clip(distance - self.first, 0, size - 1)[..., None, :], sums.shape)
        heads = np.zeros((sums.shape[-2], size))
        for at in np.ndindex(sums.shape[:-1]):
            heads[at[-1]] += np.bincount(index[at], sums[at], size)
        return self._of_argument(heads if self.heads is not None else heads.sum(axis=0))

    def _of_argument(self, gradient):
        # of what the caller gave, where that is not the table
        if self._made_of is not None:
            gradient = self._made_of(gradient)
        if isinstance(gradient, tuple):
            return tuple(part.astype(self.table.dtype) for part in gradient)
        return np.ascontiguousarray(gradient, self.table.dtype)

    def __repr__(self):
        heads = "all heads" if self.heads is None else f"{self.heads} heads"
        return f"<RelativeBias: {heads}, distances {self.first} to {self.first + self.table.shape[-1] - 1}>"


class _GridBias(RelativeBias):
    """table (H, 2 h - 1, 2 w - 1) over yi - yj and xi - xj."""

    def __init__(self, table, shape):
        self.table, self.shape, self.heads, self.first = table, shape, len(table), None
        self._made_of = None

    def check(self, H, L, S):
        super().check(H, L, S)
        h, w = self.shape
        n = h * w
        if n != L or n != S:
            raise ValueError(f"bias over a grid of {h} x {w} must have L = S = {n}, got L = {L} and S = {S}")

    def view(self, lead, H, L, S, dtype, query_offset=None):
        """The tables (H, 1, n), whose elements `index` names; positions are the grid's, whatever the offset is."""
        self.check(H, L, S)
        with np.errstate(all="ignore"):
            return self.table.reshape(len(self.table), 1, -1).astype(dtype, order="C")

    def diagonals(self, lead, L, S, query_offset=None):
        return self.index(), (1,) * len(lead), self.table[0].size, None

    def gradient(self, sums, distance):
        return self._of_argument(sums.sum(axis=tuple(range(sums.ndim - 2))).reshape(self.table.shape))

    def index(self):
        # (yi - yj + h - 1) (2 w - 1) + xi - xj + w - 1 = at[i] - at[j] + at[h w - 1]
        h, w = self.shape
        at = (np.arange(h)[:, None] * (2 * w - 1) + np.arange(w)).ravel()
        return at, at[-1] - at

    def __repr__(self):
        return f"<RelativeBias: {self.heads} heads, grid of {self.shape[0]} x {self.shape[1]}>"


def _offsets(lead, L, S, query_offset):
    """The offset of each batch, with one for all batches along an axis if they agree."""
    offset = np.full((1,) * len(lead), S - L) if query_offset is None else query_offset.reshape(lead)
    for axis in range(len(lead)):
        first = offset.take([0], axis)
        if (offset == first).all():
            offset = first
    return offset


def _floats(name, value):
    """A read-only contiguous copy of an array of floats, in native byte order."""
    from .checks import _array  # checks imports this module

    array = _array(name, value)
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must be float16, float32 or float64, got {array.dtype}")
    array = np.array(array, array.dtype.newbyteorder("="), order="C")
    array.flags.writeable = False
    return array


def _grid_shape(shape):
    if not isinstance(shape, (tuple, list)) or len(shape) != 2:
        raise ValueError(f"shape must be a pair (h, w), got {shape!r}")
    return tuple(positions._count("shape", n, 1) for n in shape)
