"""What positions mean: the numbers that biases computed from positions are made of, and rotary embeddings."""

import functools
import math
import numbers
from typing import NamedTuple

import numpy as np

from . import checks  # which imports this module by way of bias: nothing of it is used before a call

ANGLES = 2**16  # that `rotary` computes at a time


def alibi_slopes(H):
    """The slopes of ALiBi for H heads: a geometric sequence that starts at its own ratio, 2^(-8 / H).

    For a number of heads that is no power of two, the slopes for the largest power n below it, then every second one of
    those for 2 n.

    Parameters
    ----------
    H : int
        At least 1.

    Returns
    -------
    ndarray (H,), float64

    Raises
    ------
    TypeError, ValueError
        H is no integer, or less than 1.

    References
    ----------
    Press, Smith and Lewis, "Train Short, Test Long: Attention with Linear Biases Enables Input Length Extrapolation",
    2022.

    Examples
    --------
    >>> alibi_slopes(4)
    array([0.25      , 0.0625    , 0.015625  , 0.00390625])
    >>> alibi_slopes(3)
    array([0.0625    , 0.00390625, 0.25      ])
    """
    H = _count("H", H, 1)
    n = 1 << (H.bit_length() - 1)
    return np.concatenate((_geometric(n), _geometric(2 * n)[::2][: H - n]))


def relative_buckets(distance, num_buckets=32, *, bidirectional=True, max_distance=128):
    """The bucket of T5 for each distance j - p of a key from its query.

    If ``bidirectional``, half of the buckets (rounded down) are for keys up to the query and half for those ahead; else
    all are for keys up to the query, and keys ahead have bucket 0. Of the N buckets of a side the first E = N // 2 hold
    one distance n each, the others ranges even in log n up to ``max_distance``, and the last one all that is further::

        bucket(n) = n                                                                    for n < E
                    min(N - 1, E + floor(log(n / E) / log(max_distance / E) (N - E)))    else

    The borders are computed in integers, so no rounding of a logarithm moves them.

    Parameters
    ----------
    distance : integers, any shape
    num_buckets : int
        At least 2, or 4 if bidirectional.
    bidirectional : bool
    max_distance : int
        More than E, less than 2^31.

    Returns
    -------
    ndarray of distance's shape, int64

    Raises
    ------
    TypeError
        Distances or numbers that are not integers; a bidirectional that is no bool.
    ValueError
        Too few buckets, or a max_distance out of its range.

    References
    ----------
    Raffel et al., "Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer", 2020.

    Examples
    --------
    >>> relative_buckets([-200, -20, -2, -1, 0, 1, 2, 20, 200])
    array([15, 10,  2,  1,  0, 17, 18, 26, 31])
    >>> relative_buckets([-200, -20, -2, -1, 0, 1, 2, 20, 200], bidirectional=False)
    array([31, 17,  2,  1,  0,  0,  0,  0,  0])
    """
    distance = np.asarray(distance)
    if distance.dtype.kind not in "iu" and distance.size:
        raise TypeError(f"distance must be integers, got {distance.dtype}")
    distance = distance.astype(np.int64)
    if not isinstance(bidirectional, (bool, np.bool_)):
        raise TypeError(f"bidirectional must be a bool, got {type(bidirectional).__name__}")
    num_buckets = _count("num_buckets", num_buckets, 4 if bidirectional else 2)
    side = num_buckets // 2 if bidirectional else num_buckets
    max_distance = _count("max_distance", max_distance)
    if not side // 2 < max_distance < 2**31:
        raise ValueError(f"max_distance must lie above the {side // 2} distances with a bucket each and below 2**31, "
                         f"got {max_distance}")
    n = abs(distance) if bidirectional else np.maximum(-distance, 0)
    bucket = np.searchsorted(_borders(side, max_distance), n, side="right")
    return bucket + side * (distance > 0) if bidirectional else bucket


def sinusoidal(length, dim, *, base=10000.0, dtype="float32"):
    """The position embeddings of the Transformer, added to the first layer's input.

        out[p, 2 i] = sin(p base^(-2 i / dim))        out[p, 2 i + 1] = cos(p base^(-2 i / dim))

    Parameters
    ----------
    length : int
        Positions 0 to length - 1.
    dim : int
        Even.
    base : float
        Positive and finite.
    dtype : float32 or float64

    Returns
    -------
    ndarray (length, dim), dtype

    Raises
    ------
    TypeError, ValueError
        Numbers or a dtype of another kind; a negative length or dim, an odd dim, a base that is not positive and
        finite.

    Notes
    -----
    Angles are computed in float64, sines and cosines rounded once.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017.

    Examples
    --------
    >>> sinusoidal(3, 4, base=100.0).round(3)
    array([[ 0.   ,  1.   ,  0.   ,  1.   ],
           [ 0.841,  0.54 ,  0.1  ,  0.995],
           [ 0.909, -0.416,  0.199,  0.98 ]], dtype=float32)
    """
    length, dim = _count("length", length), _even("dim", dim, 2)
    return _sines(np.arange(length), dim, _positive("base", base), checks.float_dtype(dtype))


def sinusoidal_2d(height, width, dim, *, base=10000.0, normalize=True, dtype="float32"):
    """The position embeddings of DETR: of each pixel, dim / 2 sines and cosines of its row, then of its column.

    Parameters
    ----------
    height, width : int
    dim : int
        A multiple of 4.
    base : float
        Positive and finite.
    normalize : bool
        Whether rows 1 to height are spread up to 2 pi, and columns likewise, or taken as they are.
    dtype : float32 or float64

    Returns
    -------
    ndarray (height, width, dim), dtype

    Raises
    ------
    TypeError, ValueError
        Numbers or a dtype of another kind; negative sizes, a dim that is no multiple of 4, a base that is not positive
        and finite.

    References
    ----------
    Carion et al., "End-to-End Object Detection with Transformers", 2020.

    Examples
    --------
    >>> sinusoidal_2d(2, 1, 4, normalize=False)[:, 0].round(4)
    array([[ 0.8415,  0.5403,  0.8415,  0.5403],
           [ 0.9093, -0.4161,  0.8415,  0.5403]], dtype=float32)
    """
    dim, base = _even("dim", dim, 4), _positive("base", base)
    out = np.empty((_count("height", height), _count("width", width), dim), checks.float_dtype(dtype))
    normalize = checks._boolean("normalize", normalize)
    for axis, part in enumerate((out[..., : dim // 2], out[..., dim // 2 :])):
        n = out.shape[axis]
        p = np.arange(1, n + 1)
        if normalize:
            p = p / (n + 1e-6) * (2 * math.pi)  # DETR's guard against dividing by 0
        part[...] = np.expand_dims(_sines(p, dim // 2, base, out.dtype), 1 - axis)
    return out


class Rotary(NamedTuple):
    """A table for `apply_rotary`: row p has the cosines and sines of the angles by which position p turns its pairs.

    `rotary` makes the usual one. Any other choice of angles is a table too: ``Rotary(cos, sin, interleaved)``.

    Attributes
    ----------
    cos, sin : ndarray (length, n), float32
        For the n pairs of the first 2 n features.
    interleaved : bool
        Whether the pairs are (0, 1), (2, 3), ..., else (0, n), (1, n + 1), ...
    """

    cos: np.ndarray
    sin: np.ndarray
    interleaved: bool


def rotary(length, dim, *, base=10000.0, interleaved=False, scaling=1.0):
    """The table of rotary position embeddings: position p turns pair i by the angle p / scaling * base^(-2 i / dim).

    `apply_rotary` turns arrays by it. The scores of turned queries and keys depend on the distance of their positions,
    not on the positions.

    Parameters
    ----------
    length : int
        Positions 0 to length - 1.
    dim : int
        Features that are turned; even. The head size, or less of it.
    base : float
        Positive and finite. The slowest pair turns about once in 2 pi base positions.
    interleaved : bool
        Pair i is features (2 i, 2 i + 1), as in RoFormer and GPT-J, else (i, i + dim / 2), as in GPT-NeoX and Llama.
    scaling : float
        Positive and finite; above 1 it squeezes positions into the range that a model was trained on.

    Returns
    -------
    Rotary
        cos and sin, float32 (length, dim / 2), 64-byte aligned, and interleaved.

    Raises
    ------
    TypeError
        Numbers of another kind, an interleaved that is no bool.
    ValueError
        A negative length or dim, an odd dim; base or scaling not positive and finite.
    MemoryError
        No memory for the table.

    Notes
    -----
    Angles are computed in float64, with an error of about p 2^-52, and rounded once as cosine and sine: to 2^-24 up to
    millions of positions. 4 length dim bytes.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021. Scaling: Chen et al., "Extending
    Context Window of Large Language Models via Positional Interpolation", 2023.

    Examples
    --------
    >>> table = rotary(3, 4, base=100.0)
    >>> table.cos
    array([[ 1.        ,  1.        ],
           [ 0.5403023 ,  0.9950042 ],
           [-0.41614684,  0.9800666 ]], dtype=float32)
    """
    length, dim = _count("length", length), _count("dim", dim)
    if dim % 2:
        raise ValueError(f"dim must be even, got {dim}")
    base, scaling = _positive("base", base), _positive("scaling", scaling)
    interleaved = checks._boolean("interleaved", interleaved)
    cos, sin = (checks.aligned_empty((length, dim // 2), np.float32) for _ in range(2))
    frequencies = base ** (-2 * np.arange(dim // 2) / max(dim, 1))
    rows = max(1, ANGLES // max(dim, 1))  # at a time: float64 takes little memory beside the table
    for begin in range(0, length, rows):
        p = np.arange(begin, min(begin + rows, length))
        angles = (p / scaling)[:, None] * frequencies
        cos[begin : begin + rows] = np.cos(angles)
        sin[begin : begin + rows] = np.sin(angles)
    return Rotary(cos, sin, interleaved)


def apply_rotary(x, table, offset=0):
    """Turn each pair of features of row i by the angles of position i + offset.

        a' = a cos - b sin        b' = b cos + a sin        for the pairs (a, b) of the first 2 n features

    n is the number of columns of the table; features past 2 n are copied.

    Parameters
    ----------
    x : array (..., L, D), float32 or float64
        Queries or keys; D at least 2 n.
    table : Rotary
        Of at least offset + L positions.
    offset : int or integers that broadcast to x.shape[:-2]
        Position of row 0. Heads are among these axes: for x (B, H, L, D) and one offset for each of B sequences, their
        shape is (B, 1).

    Returns
    -------
    ndarray of x's shape and dtype, 64-byte aligned

    Raises
    ------
    TypeError
        Something else than arrays, a dtype that is not float32 or float64, a table that is no Rotary of two float32
        arrays and a bool, offsets that are not integers.
    ValueError
        Fewer than two axes or than 2 n features; arrays of a table that differ in shape; offsets that do not broadcast,
        or with positions outside the table.
    MemoryError
        No memory for the result.

    Notes
    -----
    Computed in x's dtype: within 2^-22 (|a| + |b|) of the exact turn for float32; for float64 2^-24 (|a| + |b|), the
    rounding of the table. 6 floating-point operations a pair.

    References
    ----------
    Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.

    Examples
    --------
    A continuation has the positions after those of the past:

    >>> x = np.random.default_rng(0).standard_normal((2, 8, 10, 64), np.float32)
    >>> table = rotary(100, 64)
    >>> whole, rest = apply_rotary(x, table), apply_rotary(x[:, :, 7:], table, 7)
    >>> bool((whole[:, :, 7:] == rest).all())
    True

    The scores of turned rows depend on their distance:

    >>> q, k = np.random.default_rng(0).standard_normal((2, 1, 64))
    >>> scores = [float((apply_rotary(q, table, p + 5) @ apply_rotary(k, table, p).T)[0, 0]) for p in (0, 90)]
    >>> round(scores[0] - scores[1], 5)
    0.0
    """
    x = checks._array("x", x)
    if x.dtype != checks.FLOAT32 and x.dtype != checks.FLOAT64:
        raise TypeError(f"x must be float32 or float64 in native byte order, got {x.dtype}")
    if x.ndim < 2:
        raise ValueError(f"x must have axes (..., L, D), got shape {x.shape}")
    check_table("table", table)
    length, n = table.cos.shape
    L, D = x.shape[-2:]
    if 2 * n > D:
        raise ValueError(f"x must have at least the {2 * n} features that table turns, got {D}")
    if length < L:
        raise ValueError(f"table must have at least the {L} rows of x, got {length}")
    if not checks._is_integer(offset):
        offset = np.array(checks._array("offset", offset))  # a copy is what is checked and used
    flat = checks._integers("offset", offset, x.shape[:-2], 0, length - L)
    if np.size(offset) == 1:
        positions = slice(int(flat[0]), int(flat[0]) + L) if flat.size else slice(L)
    else:
        positions = offset.astype(np.int64)[..., None] + np.arange(L)
    out = checks.aligned_empty(x.shape, x.dtype)
    rotate(x, table.cos[positions], table.sin[positions], table.interleaved, out)
    return out


def rotate(x, cos, sin, interleaved, out):
    """`apply_rotary` with the cosines and sines of each row, into ``out``, which shares no memory with ``x``."""
    n = cos.shape[-1]
    first, second = (slice(0, 2 * n, 2), slice(1, 2 * n, 2)) if interleaved else (slice(0, n), slice(n, 2 * n))
    a, b, a_out, b_out = x[..., first], x[..., second], out[..., first], out[..., second]
    with np.errstate(all="ignore"):
        np.multiply(a, cos, out=a_out)
        a_out -= b * sin
        np.multiply(b, cos, out=b_out)
        b_out += a * sin
    out[..., 2 * n :] = x[..., 2 * n :]


def check_table(name, table):
    """Raise unless ``table`` is a Rotary whose parts fit each other."""
    if not isinstance(table, Rotary):
        raise TypeError(f"{name} must be a Rotary, got {type(table).__name__}")
    for part, array in zip(("cos", "sin"), table):
        if type(array) is not np.ndarray or array.dtype != checks.FLOAT32:
            got = array.dtype if isinstance(array, np.ndarray) else type(array).__name__
            raise TypeError(f"{name}.{part} must be a float32 array, got {got}")
    if table.cos.ndim != 2:
        raise ValueError(f"{name}.cos must have two axes (length, n), got shape {table.cos.shape}")
    if table.sin.shape != table.cos.shape:
        raise ValueError(f"{name}.sin must have cos's shape {table.cos.shape}, got {table.sin.shape}")
    checks._boolean(f"{name}.interleaved", table.interleaved)


def _geometric(n):
    return np.exp2(-8 * np.arange(1, n + 1) / n)


@functools.lru_cache(64)
def _borders(side, max_distance):
    """The smallest distance of each bucket but the first."""
    E = side // 2
    steps = side - E
    borders = list(range(1, E + 1))
    for k in range(1, steps):
        # The smallest n with (n / E)^steps >= (max_distance / E)^k. Floats say where to look, off by 1 at most.
        least = E ** (steps - k) * max_distance**k
        n = round(E * math.exp(k / steps * math.log(max_distance / E)))
        while n**steps < least:
            n += 1
        while (n - 1) ** steps >= least:
            n -= 1
        borders.append(n)
    return np.array(borders, np.int64)


def _count(name, value, low=0):
    if not isinstance(value, numbers.Integral) or isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def _even(name, value, factor):
    value = _count(name, value)
    if value % factor:
        raise ValueError(f"{name} must be a multiple of {factor}, got {value}")
    return value


def _sines(positions, dim, base, dtype):
    """sin and cos of each position times each of the dim / 2 frequencies, in turn."""
    angles = positions[:, None] * base ** (-2 * np.arange(dim // 2) / max(dim, 1))
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(len(positions), dim).astype(dtype)


def _positive(name, value):
    number = checks._real(name, value)
    if not 0 < number < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return number
