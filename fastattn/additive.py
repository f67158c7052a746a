"""Attention with additive scores, w . tanh(query + key)."""

import math
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from . import _runtime, checks, gradient

# What computes the results; reference.py puts its own in their place.
kernels = ContextVar("kernels", default=(_runtime.forward, _runtime.backward))


class AdditiveGradients(NamedTuple):
    """What `additive_attention_backward` returns: arrays of the shape and dtype of their argument, or None."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    weight: np.ndarray
    bias: np.ndarray | None
    sinks: np.ndarray | None


def additive_attention(query, key, value, weight, *, bias=None, mask=None, causal=False, window=None,
                       query_offset=None, query_lengths=None, kv_lengths=None, softcap=None, sinks=None,
                       normalizer="softmax", dropout_p=0.0, seed=None, out=None, return_lse=False, num_threads=None):
    """Attention with additive scores, weight . tanh(query[i] + key[j] + bias), of Bahdanau, Cho and Bengio.

    Nothing of L x S x D is stored: each tanh is computed where it is used.

    Parameters
    ----------
    query : array (..., H, L, D), float32, float64, float16 or bfloat16
        The projected states of the decoder, W s. Axes and heads are as in `attention`.
    key : array (..., Hkv, S, D), query's dtype; with float32 queries also float16 or bfloat16
        The projected annotations, U h.
    value : array (..., Hkv, S, Dv), key's dtype
    weight : array (D,) or (H, D) of query's dtype, or float32 with 16-bit queries
    bias : array (D,) or (H, D) of the same dtypes, optional
        Added inside the tanh.
    mask, causal, window, query_offset, query_lengths, kv_lengths : optional
    softcap, sinks, normalizer, dropout_p, seed, out, return_lse, num_threads : optional
        As in `attention`.

    Returns
    -------
    out : ndarray (..., H, L, Dv), query's dtype
    lse : ndarray (..., H, L), only with ``return_lse``

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; for weight or bias of another dtype or shape.

    Notes
    -----
    B H L S D tanh, each within 2 ulp, and 2 B H L S (D + Dv) floating-point operations. Scratch is as that of
    `attention`.

    References
    ----------
    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> fa.additive_attention(query, key, value, np.ones(4))
    array([[2.]])
    """
    problem = checks.problem(
        query, key, value, mask=mask, causal=causal, window=window, query_offset=query_offset,
        query_lengths=query_lengths, kv_lengths=kv_lengths, scale=1.0, softcap=softcap, sinks=sinks,
        normalizer=normalizer, dropout_p=dropout_p, seed=seed, out=out, return_lse=return_lse,
        num_threads=num_threads, additive=(weight, bias))
    kernels.get()[0](problem)
    return problem.result()


def additive_attention_backward(grad_out, query, key, value, weight, out, lse, *, grad_lse=None, bias=None, mask=None,
                                causal=False, window=None, query_offset=None, query_lengths=None, kv_lengths=None,
                                softcap=None, sinks=None, normalizer="softmax", dropout_p=0.0, seed=None,
                                num_threads=None):
    """Gradients of `additive_attention`, as `attention_backward` has those of `attention`.

    Parameters
    ----------
    grad_out : array (..., H, L, Dv) of query's dtype
    query, key, value, weight : arrays
        As they were given to `additive_attention`, like all options.
    out, lse : arrays
        What ``additive_attention(..., return_lse=True)`` returned.
    grad_lse : array (..., H, L) of lse's dtype, optional

    Returns
    -------
    AdditiveGradients
        A named tuple of query, key, value, weight, bias and sinks; None for bias and sinks that were not given.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `additive_attention` and `attention_backward`.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 1)), np.array([[0.0], [9.0]]), np.array([[1.0], [3.0]])
    >>> out, lse = fa.additive_attention(query, key, value, np.zeros(1), return_lse=True)
    >>> fa.additive_attention_backward(np.ones((1, 1)), query, key, value, np.zeros(1), out, lse).weight.round(6)
    array([0.5])
    """
    problem = checks.gradient_problem(
        grad_out, query, key, value, out, lse, grad_lse=grad_lse, mask=mask, causal=causal, window=window,
        query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths, scale=1.0, softcap=softcap,
        sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed, num_threads=num_threads,
        additive=(weight, bias))
    kernels.get()[1](problem)
    return _gradients(problem, query, key, value, weight, bias, sinks)


def _gradients(problem, query, key, value, weight, bias, sinks):
    of = gradient.gradients(problem, query, key, value, None, sinks)
    *lead, H, parts, D = problem.grad_w.shape
    batches = math.prod(lead)
    of_weight = problem.grad_w.reshape(batches, H, parts, D).sum(axis=(0, 2), dtype=np.float64)
    of_bias = None
    if bias is not None:  # what the queries get, summed over batches and rows
        of_bias = problem.returned["query"].reshape(batches, *problem.query.shape[-3:])
        of_bias = _of_heads(of_bias.sum(axis=(0, 2), dtype=np.float64), bias)
    return AdditiveGradients(of.query, of.key, of.value, _of_heads(of_weight, weight), of_bias, of.sinks)


def _of_heads(full, given):
    """(H, D) as what was given, (H, D) or (D,)."""
    given = checks._array("weight", given)
    return (full if given.ndim == 2 else full.sum(axis=0)).astype(given.dtype)
