"""The state algebra: results of attention over parts of the keys put together to the result over all of them."""

import numpy as np

from . import checks


def merge_states(outs, lses):
    """Exact attention over all keys from attention over parts of them.

        lse = log sum_n exp(lses[n])        out = sum_n exp(lses[n] - lse) outs[n]

    For any way to give each key to one part, ``attention`` of the same queries over each part, merged, is
    ``attention`` over all keys, within rounding. Nor does more than rounding depend on the order or on the nesting, so
    parts can be merged as they come: shards of a cache, a shared prefix and its continuations, blocks from elsewhere.

    - Masks, biases, causal and windows of a part are those of its own keys. If a part begins at key k of the whole, its
      ``query_offset`` is that of the whole less k.
    - ``sinks`` go to exactly one part: they are part of the denominator, once.
    - A row that sees no key of a part has lse -inf there, and that part contributes nothing to it.

    Parameters
    ----------
    outs : sequence of arrays (..., L, Dv), or array (N, ..., L, Dv); float32, float64, float16 or bfloat16
        At least one part.
    lses : sequence of arrays (..., L), or array (N, ..., L); float64 with float64 outs, else float32
        As ``attention(..., return_lse=True)`` gives them, in nats.

    Returns
    -------
    out : ndarray (..., L, Dv), outs' dtype, 64-byte aligned
        0 where all parts have lse -inf, whatever their outs hold.
    lse : ndarray (..., L), lses' dtype
        -inf where all parts have -inf.

    Raises
    ------
    TypeError
        Something else than arrays, another dtype than those above, different dtypes.
    ValueError
        No parts, different numbers of outs and lses, shapes that differ or do not fit.
    MemoryError
        No memory for the result.

    Notes
    -----
    All is computed in float64 and rounded once. An lse that was itself rounded to float32 carries an error of up to
    2^-24 |lse| into the weights of its part. One part that is not empty is returned with its own bits.

    NaN and +inf in an lse propagate as IEEE arithmetic has it: NaN, and an lse of +inf beside an out of NaN.

    3 N L Dv floating-point operations and 16 L Dv bytes of scratch, for each row of the leading axes.

    References
    ----------
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "Flash-Decoding for
    long-context inference", 2023.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 2, 5, 8))
    >>> parts = [fa.attention(query, key[:, s], value[:, s], return_lse=True) for s in (slice(0, 2), slice(2, 5))]
    >>> out, lse = fa.merge_states(*zip(*parts))
    >>> bool(np.allclose(out, fa.attention(query, key, value), rtol=0, atol=1e-15))
    True
    """
    outs, lses = parts(outs, lses)
    dtype, shape = outs[0].dtype, outs[0].shape
    with np.errstate(all="ignore"):
        m = np.max(lses, axis=0)
        m = np.where(np.isfinite(m), m, 0).astype(np.float64)  # no inf - inf where all parts are empty or one is +inf
        weights = [np.exp(lse - m) for lse in lses]
        total = np.sum(weights, axis=0)

        out, lse = checks.aligned_empty(shape, dtype), checks.aligned_empty(shape[:-1], lses[0].dtype)
        lse[...] = m + np.log(total)
        running, term = np.zeros(shape), np.empty(shape)
        for part, part_lse, weight in zip(outs, lses, weights, strict=True):
            np.multiply(part, (weight / total)[..., None], out=term)
            term[part_lse == -np.inf] = 0  # not 0 * NaN, nor 0 / 0
            running += term
        out[...] = running
    return out, lse


def parts(outs, lses):
    """Lists of arrays from what `merge_states` takes, checked."""
    outs, lses = _list("outs", outs), _list("lses", lses)
    if not outs:
        raise ValueError("outs must have at least one part, got none")
    if len(lses) != len(outs):
        raise ValueError(f"lses must have one part for each of {len(outs)} outs, got {len(lses)}")
    dtype, shape = outs[0].dtype, outs[0].shape
    if dtype != checks.FLOAT32 and dtype != checks.FLOAT64 and not checks.is_half(dtype):
        raise TypeError(f"outs must be float32, float64, float16 or bfloat16 in native byte order, got {dtype}")
    if len(shape) < 2:
        raise ValueError(f"outs must have axes (..., L, Dv), got shape {shape}")
    inside = checks.compute_dtype(dtype)
    for name, arrays, wanted, expected, of in (("outs", outs, dtype, shape, "the first part's"),
                                               ("lses", lses, inside, shape[:-1], "outs'")):
        for n, array in enumerate(arrays):
            if array.dtype != wanted:
                whose = of if wanted == dtype else "the"
                raise TypeError(f"{name} must have {whose} dtype {wanted}, got {array.dtype} in part {n}")
            if array.shape != expected:
                raise ValueError(f"{name} must have {of} shape {expected}, got {array.shape} in part {n}")
    return outs, lses


def _list(name, value):
    if isinstance(value, (tuple, list)) or hasattr(value, "__next__"):
        return [checks._array(name, part) for part in value]
    array = checks._array(name, value)
    if array.ndim == 0:
        raise TypeError(f"{name} must be a sequence of arrays or an array of parts, got {type(value).__name__}")
    return list(array)
