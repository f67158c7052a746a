"""What positions mean: the numbers that biases computed from positions are made of."""

import functools
import math
import numbers

import numpy as np


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
