"""The backward pass: gradients of `attention` from its saved result, without storing the L x S weights."""

from typing import NamedTuple

import numpy as np

from . import _runtime, checks
from .bias import Bias


class Gradients(NamedTuple):
    """What `attention_backward` returns: arrays of the shape and dtype of the argument they belong to."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    bias: np.ndarray | tuple | None
    sinks: np.ndarray | None


def attention_backward(grad_out, query, key, value, out, lse, *, grad_lse=None, mask=None, bias=None, causal=False,
                       window=None, query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None,
                       score_mod=None, sinks=None, normalizer="softmax", dropout_p=0.0, seed=None, deterministic=None,
                       num_threads=None):
    """Gradients of `attention`: what a small change of each input changes in sum(grad_out * out) + sum(grad_lse * lse).

    The weights are computed again from `lse`, a tile at a time; nothing of L x S is stored.

    Parameters
    ----------
    grad_out : array (..., H, L, Dv) of query's dtype
    query, key, value : arrays
        As they were given to `attention`, like all options.
    out : array (..., H, L, Dv) of query's dtype
    lse : array (..., H, L), float64 for float64 queries, else float32
        What ``attention(..., return_lse=True)`` returned.
    grad_lse : array (..., H, L) of lse's dtype, optional
    mask, bias, causal, window, query_offset, query_lengths, kv_lengths : optional
    scale, softcap, score_mod, sinks, normalizer, dropout_p, seed, deterministic, num_threads : optional
        As in `attention`.

    Returns
    -------
    Gradients
        A named tuple. ``query``, ``key`` and ``value`` have the shapes and dtypes of the arguments, summed over axes
        that were broadcast. ``bias``: None without one; the shape and dtype of an array; for `ALiBi` the gradient of
        its slopes, for `RelativeBias` that of the table it was made of (of `RelativeBias.decomposed`, of both).
        ``sinks``: None without them.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; TypeError and ValueError for grad_out, out, lse or grad_lse of another dtype or shape.

    Notes
    -----
    2 * B * H * L * S * (3 D + 2 Dv) floating-point operations, of which about the visible share is done. Sums are in
    float64 for float64, else in float32; every sum has one order, whatever the number of threads. Besides the results,
    which are in the dtype of the sums until they are rounded, scratch is O(1056 (D + Dv)) numbers a thread.

    Rows that see no key have gradients of 0, but for that of their sink. A masked position never contributes.

    References
    ----------
    Dao et al., "FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness", 2022, appendix B.

    Examples
    --------
    A sum of values whose scores are equal: each gets half of the gradient.

    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> out, lse = fa.attention(query, key, value, return_lse=True)
    >>> fa.attention_backward(np.ones((1, 1)), query, key, value, out, lse).value
    array([[0.5],
           [0.5]])
    """
    return backward(
        None, grad_out, query, key, value, out, lse, grad_lse=grad_lse, mask=mask, bias=bias, causal=causal,
        window=window, query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale,
        softcap=softcap, score_mod=score_mod, sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed,
        deterministic=deterministic, num_threads=num_threads)


def varlen_attention_backward(grad_out, query, key, value, out, lse, cu_seqlens_q, cu_seqlens_k, *, grad_lse=None,
                              mask=None, bias=None, causal=False, window=None, query_offset=None, query_lengths=None,
                              kv_lengths=None, scale=None, softcap=None, score_mod=None, sinks=None,
                              normalizer="softmax", dropout_p=0.0, seed=None, deterministic=None, num_threads=None):
    """Gradients of `varlen_attention`, as `attention_backward` has those of `attention`.

    Parameters
    ----------
    grad_out, out : arrays (Tq, H, Dv) of query's dtype
    lse, grad_lse : arrays (Tq, H), float64 for float64 queries, else float32; grad_lse is optional
    query, key, value, cu_seqlens_q, cu_seqlens_k : arrays
        As they were given to `varlen_attention`, like all options.

    Returns
    -------
    Gradients

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `varlen_attention` and `attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 5, 4, 8), np.float32)
    >>> out, lse = fa.varlen_attention(query, key, value, [0, 3, 5], [0, 3, 5], causal=True, return_lse=True)
    >>> grads = fa.varlen_attention_backward(out, query, key, value, out, lse, [0, 3, 5], [0, 3, 5], causal=True)
    >>> grads.key.shape
    (5, 4, 8)
    """
    return backward(
        (cu_seqlens_q, cu_seqlens_k), grad_out, query, key, value, out, lse, grad_lse=grad_lse, mask=mask, bias=bias,
        causal=causal, window=window, query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths,
        scale=scale, softcap=softcap, score_mod=score_mod, sinks=sinks, normalizer=normalizer, dropout_p=dropout_p,
        seed=seed, deterministic=deterministic, num_threads=num_threads)


def backward(packed, grad_out, query, key, value, out, lse, *, bias, sinks, into=(None, None, None), **options):
    """`attention_backward` by its arguments, `packed` being a pair of cu_seqlens or None.

    With ``of_bias=False`` among the options, the gradient of a bias is left out. `into` holds arrays that receive the
    gradients of query, key and value, each as its argument, or None.
    """
    problem = checks.gradient_problem(grad_out, query, key, value, out, lse, bias=bias, sinks=sinks, packed=packed,
                                      into=into, **options)
    _runtime.backward(problem)
    result = gradients(problem, query, key, value, bias, sinks)
    for given, array in zip(into, result):
        if given is not None and not np.may_share_memory(given, array):
            given[...] = array
    return result


def gradients(problem, query, key, value, bias, sinks):
    """What is left to do with the sums of a problem, for arguments as they were given."""
    sums = problem.returned
    of_bias = of_sinks = None
    if not sums.keys() & {"bias", "rows"}:
        pass
    elif isinstance(bias, Bias):
        of_bias = bias.gradient(sums["bias"].sum(axis=0, dtype=np.float64), sums["distance"])
    else:
        array = checks._array("bias", bias)
        of_bias = _of_rows(problem, sums["rows"]) if "rows" in sums else sums["bias"]
        of_bias = _reduced(of_bias, array.shape).astype(array.dtype, copy=False)
    if sinks is not None:
        # each row's weight of the sink times -delta; heads are the last axis but one, the last of packed rows
        axis = -1 if problem.cu_q is not None else -2
        lse, delta = (np.moveaxis(np.atleast_2d(sums[name]), axis, -1) for name in ("lse", "delta"))
        with np.errstate(over="ignore", invalid="ignore"):
            share = np.where(lse == -np.inf, 0, np.exp(problem.sinks - lse.astype(np.float64)))
            of_sinks = -(share * delta).sum(axis=tuple(range(lse.ndim - 1)))
        of_sinks = of_sinks.astype(checks._array("sinks", sinks).dtype)
    results = (_reduced(sums[name], np.shape(array)).astype(checks._array(name, array).dtype, copy=False)
               for name, array in (("query", query), ("key", key), ("value", value)))
    return Gradients(*results, of_bias, of_sinks)


def _of_rows(problem, rows):
    """Sums (..., H, L) over the keys as a bias (..., H, L, 1); packed rows (T, H) as (B, H, longest L, 1)."""
    if problem.cu_q is None:
        return rows.reshape((*problem.query.shape[:-1], 1))
    result = np.zeros((len(problem.cu_q) - 1, rows.shape[1], problem.L, 1), rows.dtype)
    for b, (begin, end) in enumerate(zip(problem.cu_q, problem.cu_q[1:])):
        result[b, :, : end - begin, 0] = rows[begin:end].T
    return result


def _reduced(array, shape):
    """The sum over the axes along which something of `shape` was broadcast to the array's."""
    extra = array.ndim - len(shape)
    axes = (*range(extra), *(extra + i for i, n in enumerate(shape) if n == 1 and array.shape[extra + i] != 1))
    return array.sum(axis=axes).reshape(shape) if axes else array.reshape(shape)
