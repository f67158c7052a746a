"""Low-rank approximations of softmax attention, over `attention` and matrix products: Linformer and Nystrom."""

import numpy as np

from . import checks
from .attention import attention


def linformer_attention(query, key, value, key_projection, value_projection=None, **options):
    """Attention to keys and values that a learned matrix has combined to a few rows.

    In each head, with E and F of shape (k, S)::

        out = softmax(scale * query (E key)^T) (F value)

    Parameters
    ----------
    query, key, value : arrays (..., H, L, D), (..., Hkv, S, D) and (..., Hkv, S, Dv), float32 or float64
        As in `attention`.
    key_projection : array (k, S) or (Hkv, k, S) of key's dtype
        The second one has a matrix for each key head.
    value_projection : array of the same kind, optional
        The default is key_projection.
    **options
        Of `attention`, for L queries and k keys. `causal`, `window` and masks count combined rows, which is rarely what
        is meant; set the columns of padding keys in the projections to 0 instead of `kv_lengths`.

    Returns
    -------
    What `attention` returns.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; TypeError and ValueError for a projection of another dtype or shape.

    Notes
    -----
    2 S k (D + Dv) floating-point operations in each key head before those of `attention` with k keys.

    References
    ----------
    Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020, equation 7.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 4)), np.zeros((4, 4)), np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> fa.linformer_attention(query, key, value, np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]))
    array([[4.]])
    """
    key, value = checks._array("key", key), checks._array("value", value)
    of_value = key_projection if value_projection is None else value_projection
    name = "key_projection" if value_projection is None else "value_projection"
    return attention(query, _project("key_projection", key_projection, key), _project(name, of_value, value), **options)


def _project(name, projection, rows):
    projection = checks._array(name, projection)
    if rows.ndim < 2 or rows.dtype not in (checks.FLOAT32, checks.FLOAT64):
        raise TypeError(f"{name} must meet arrays (..., S, columns) of float32 or float64, got {rows.dtype} of shape "
                        f"{rows.shape}")
    if projection.dtype != rows.dtype:
        raise TypeError(f"{name} must be {rows.dtype}, got {projection.dtype}")
    S, heads = rows.shape[-2], rows.shape[-3] if rows.ndim > 2 else 1
    if projection.ndim not in (2, 3) or projection.shape[-1] != S or projection.shape[:-2] not in ((), (heads,)):
        raise ValueError(f"{name} must have shape (k, {S}) or ({heads}, k, {S}), got {projection.shape}")
    if projection.ndim == 3 and rows.ndim == 2:
        projection = projection[0]
    return projection @ rows


def nystrom_attention(query, key, value, num_landmarks=64, *, iterations=6, scale=None, num_threads=None):
    """Softmax attention approximated by way of landmarks, the means of segments of queries and of keys.

    With the landmarks Q' and K', and the softmax over rows, in each head::

        out = softmax(scale Q K'^T) A^+ softmax(scale Q' K^T) V,        A = softmax(scale Q' K'^T)

    where A^+ is an iterated approximation of the pseudo-inverse.

    Parameters
    ----------
    query, key, value : arrays (..., H, L, D), (..., Hkv, S, D) and (..., Hkv, S, Dv), float32 or float64
        As in `attention`. L and S need not be multiples of num_landmarks: segments then differ by one row.
    num_landmarks : int, optional
        At most L and S.
    iterations : int, optional
        Of the pseudo-inverse; the default is the paper's.
    scale : float, optional
        Default 1 / sqrt(D).
    num_threads : int, optional
        As in `attention`.

    Returns
    -------
    array (..., H, L, Dv) of query's dtype

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; ValueError for more landmarks than rows.

    Notes
    -----
    The paper's convolution over the values, a residual beside the attention, is left out. With m landmarks about
    2 m (L + S) (D + Dv) + 8 m^3 iterations floating-point operations in each head; nothing of L x S is made. Two calls
    of `attention` do the large products, and the pseudo-inverse meets the m rows that the landmarks gathered.

    References
    ----------
    Xiong et al., "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention", 2021, equations 11 to 14.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((4, 2)), np.zeros((4, 2)), np.array([[1.0], [3.0], [5.0], [7.0]])
    >>> fa.nystrom_attention(query, key, value, 1)
    array([[4.],
           [4.],
           [4.],
           [4.]])
    """
    query, key, value = (checks._array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    p = checks.problem(query, key, value, scale=scale, num_threads=num_threads, results=False)
    for name, array in (("query", query), ("key", key)):
        if array.dtype not in (checks.FLOAT32, checks.FLOAT64):
            raise TypeError(f"{name} must be float32 or float64, got {array.dtype}")
    m, iterations = checks._integer("num_landmarks", num_landmarks, 1), checks._integer("iterations", iterations, 0)
    if m > min(p.L, p.S):
        raise ValueError(f"num_landmarks must be at most the {p.L} queries and {p.S} keys, got {m}")
    group = p.query.shape[-3] // max(1, p.key.shape[-3])
    of_query, of_key = _landmarks(p.query, m), _landmarks(p.key, m)
    options = {"scale": p.scale, "num_threads": p.num_threads}
    gathered = attention(of_query, p.key, p.value, **options)
    inner = p.scale * (of_query @ np.repeat(of_key, group, axis=-3).swapaxes(-1, -2))
    inner = np.exp(inner - inner.max(axis=-1, keepdims=True))
    inner /= inner.sum(axis=-1, keepdims=True)
    gathered = pseudo_inverse(inner, iterations) @ gathered
    # The gathered rows belong to query heads, so every head has its own keys from here on.
    return attention(p.query, np.repeat(of_key, group, axis=-3), gathered, **options).reshape(p.returned)


def _landmarks(x, m):
    """The means of m segments of the rows, as equal in length as can be."""
    n = x.shape[-2]
    begins = np.arange(m) * n // m
    sums = np.add.reduceat(x, begins, axis=-2)
    return sums / np.diff(begins, append=n)[:, None].astype(x.dtype)


def pseudo_inverse(a, iterations=6):
    """The paper's approximation of the pseudo-inverse of matrices (..., m, m), here of rows that sum to 1.

    Examples
    --------
    >>> from fastattn.lowrank import pseudo_inverse
    >>> pseudo_inverse(np.array([[0.75, 0.25], [0.25, 0.75]]), 10).round(6)
    array([[ 1.5, -0.5],
           [-0.5,  1.5]])
    """
    a = np.asarray(a)
    z = a.swapaxes(-1, -2) / (abs(a).sum(axis=-2).max(axis=-1) * abs(a).sum(axis=-1).max(axis=-1))[..., None, None]
    one = np.eye(a.shape[-1], dtype=a.dtype)
    for _ in range(iterations):
        az = a @ z
        z = z @ (13 * one - az @ (15 * one - az @ (7 * one - az))) / 4
    return z
