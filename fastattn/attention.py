"""The public function: a quick path for plain calls, else checks -> Problem -> forward."""

from . import _runtime, checks

# The default objects themselves, so that the quick path can compare by identity.
_SOFTMAX = "softmax"
_NO_DROPOUT = 0.0


def attention(query, key, value, *, mask=None, bias=None, causal=False, window=None, query_offset=None,
              query_lengths=None, kv_lengths=None, scale=None, softcap=None, score_mod=None, sinks=None,
              normalizer=_SOFTMAX, dropout_p=_NO_DROPOUT, seed=None, out=None, return_lse=False, deterministic=None,
              num_threads=None):
    """Exact scaled dot-product attention, softmax(scale * Q K^T + bias) V, without storing the L x S weights.

    The order is fixed: scores = scale * q.k, then softcap, then + bias, then every restriction (mask, causal, window,
    lengths), then softmax over the visible keys, then the sum of values. A key is visible if every given restriction
    allows it. Options combine freely.

    Arrays come in through NumPy, ``__dlpack__``, the buffer protocol or ``__array__`` without a copy and are never
    modified; read-only, strided, reversed and broadcast (zero-stride) arrays are fine.

    Parameters
    ----------
    query : array (..., H, L, D), float32, float64, float16 or bfloat16 (of ``ml_dtypes``)
        Up to 8 leading axes, of product B. 3-D arrays have heads and no batch, 2-D arrays neither.
    key : array (..., Hkv, S, D), query's dtype; with float32 queries also float16 or bfloat16
        Hkv divides H; query head h reads key and value head ``h // (H // Hkv)``. The leading axes of the three arrays
        are equal or 1; those of size 1 are broadcast.
    value : array (..., Hkv, S, Dv), key's dtype
        Dv may differ from D. A view of key is read from memory once.
    mask : bool array, expression of `fastattn.masks`, `masks.Plan` or scipy.sparse array (L, S), optional
        True = attend, or nonzero in a sparse array. Arrays broadcast to (..., H, L, S), the leading axes of expressions
        and plans to (..., H). All but bool arrays become tiles of 64 queries x 96 keys; those nobody sees cost nothing.
    bias : array of query's dtype that broadcasts to (..., H, L, S), `ALiBi` or `RelativeBias`, optional
        With 16-bit queries the array may be float32. Added to the scores. -inf masks the position. The objects are
        computed from positions j and i + query_offset, with or without causal, and take no L x S memory.
    causal : bool
        Query i sees the keys j <= i + query_offset. With the default offset the last query sees the last key::

            L = 2, S = 4    1 1 1 0        L = 4, S = 2    0 0
                            1 1 1 1                        0 0
                                                           1 0
                                                           1 1

        ``query_offset=0`` aligns the first query with the first key instead::

            L = 2, S = 4    1 0 0 0        L = 4, S = 2    1 0
                            1 1 0 0                        1 1
                                                           1 1
                                                           1 1
    window : int or (left, right), optional
        With p = i + query_offset, query i sees p - left <= j <= p + right. None = no bound on that side; an integer w
        means (w, w), or (w, 0) if causal.
    query_offset : int or integers that broadcast to the leading axes, optional
        Position of query 0 on the axis of keys; the length of the past in a cache. Default ``kv_lengths - L``, or
        ``S - L`` without lengths. Negative offsets leave early rows empty. It moves causal, window and bias objects.
    query_lengths, kv_lengths : int or integers that broadcast to the leading axes, optional
        Rows at and past ``query_lengths[b]`` have out 0 and lse -inf; keys at and past ``kv_lengths[b]`` are masked.
        Default L and S.
    scale : float, optional
        Default ``1 / sqrt(D)`` (1 for D = 0).
    softcap : float, optional
        c > 0 replaces each score s by ``c * tanh(s / c)``. Default: none.
    score_mod : `ScoreMod`, scipy.LowLevelCallable, numba.cfunc or ctypes function, optional
        A compiled function that changes each scaled score, before softcap, bias and masks; `ScoreMod` says how.
    sinks : array (H,) of query's dtype, or float32 with 16-bit queries, optional
        Logits that join the denominator of their head's softmax and carry no value.
    normalizer : str, or ("sigmoid", float)
        What makes weights p of a row's final scores s, over the n keys of its sequence (``kv_lengths``, else S)::

            "softmax"       exp(s) / sum exp(s)
            "softmax1"      exp(s) / (1 + sum exp(s)): a sink of 0
            "sigmoid"       1 / (1 + exp(-(s + b))), b = -log n; another b by ("sigmoid", b)
            "relu"          max(s, 0) / n
            "sparsemax"     max(s - t, 0), t such that they add up to 1
            "entmax15"      max(s / 2 - t, 0)^2, t such that they add up to 1

        The last four take no sinks.
    dropout_p : float
        The share of the weights, behind the softmax, that become 0; the others are multiplied by 1 / (1 - dropout_p).
    seed : int, optional
        Of the dropout, 0 to 2**64 - 1: which weights stay depends on it and on batch, head, row and key, on nothing
        else. Default: another one for each call, which no backward pass can repeat.
    out : ndarray of the result's shape and query's dtype, optional
        Filled and returned. It must not overlap an input.
    return_lse : bool
        Return (out, lse).
    deterministic : bool or "row", optional
        The bits of a row never depend on threads, the batch, the heads or the other rows, but for one thing: sequences
        of few rows take a path of their own, bound by memory, whose sums over D have another order. How many are few,
        2 to 32, depends on D, dtype and instruction set. "row" sends all by the path for many rows; a row then has the
        same bits whatever their number. A bool changes nothing.
    num_threads : int, optional
        At most this many threads. Default: what ``get_num_threads()`` says.

    Returns
    -------
    out : ndarray (..., H, L, Dv), query's dtype, 64-byte aligned
        Without the axes that query lacks. A row that sees no key is 0.
    lse : ndarray (..., H, L), float64 for float64 queries, else float32
        Only with ``return_lse``: the natural logarithm (nats) of the sum of the exponentials of the final scores, sink
        included. A row that sees no key has -inf, or its sink. Of sparsemax and entmax15 the threshold t, of sigmoid
        and relu 0.

    Raises
    ------
    TypeError
        An argument of the wrong kind: no array, a masked array, another dtype than those above or not in native byte
        order; key, value, bias or sinks of a dtype that does not go with query's; a mask that is not boolean; lengths,
        offsets or bounds that are not integers; a bool where a number is wanted; out= that is not an ndarray.
    ValueError
        A wrong shape or value: axes, heads or sizes that do not fit each other; more than 8 leading axes; lengths
        outside [0, L] or [0, S]; a query_offset outside (-2**60, 2**60); a negative window; scale or softcap not finite
        in query's dtype; softcap not positive and normal; dropout_p outside [0, 1); a seed outside [0, 2**64);
        num_threads < 1; an unknown normalizer or deterministic; sinks with another normalizer than softmax; an address
        or strides that are no multiple of the item size; out= of the wrong shape or dtype, read-only, overlapping
        itself or an input.
    MemoryError
        No memory for the result or the scratch.

    Notes
    -----
    2 * B * H * L * S * (D + Dv) floating-point operations (4 * B * H * L * S * D if Dv = D), of which about the visible
    share is done. Scratch is O(D + Dv) tiles a thread, independent of L and S; few rows take besides 4 (Dv + 128) bytes
    a row and 2112 keys. Sums and softmax are in float64 for float64, else in float32; 16-bit results are rounded once.
    With AVX-512 BF16 the products of all-bfloat16 calls take pairs of bfloat16, and weights are rounded to it.

    A masked position never contributes: NaN or Inf in its key, value or bias changes nothing. NaN and Inf that are seen
    propagate as IEEE arithmetic has it; a row whose visible scores are all -inf is NaN.

    References
    ----------
    Vaswani et al., "Attention Is All You Need", 2017. The ONNX operator Attention, opset 25. The softmax in one pass:
    Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018; Dao et al., "FlashAttention", 2022. The
    dropout's numbers: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011 (Philox 4x32-10). Normalizers:
    Miller, "Attention Is Off By One", 2023; Ramapuram et al., "Theory, Analysis, and Best Practices for Sigmoid
    Self-Attention", 2024; Wortsman et al., "Replacing softmax with ReLU in Vision Transformers", 2023; Martins and
    Astudillo, "From Softmax to Sparsemax", 2016; Peters, Niculae and Martins, "Sparse Sequence-to-Sequence Models",
    2019.

    Examples
    --------
    Equal scores give the mean of the values:

    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key = np.zeros((3, 4)), np.zeros((3, 4))
    >>> value = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    >>> fa.attention(query, key, value).round(6)
    array([[2., 1.],
           [2., 1.],
           [2., 1.]])

    Each query sees the keys up to its own:

    >>> fa.attention(query, key, value, causal=True).round(6)
    array([[0., 1.],
           [1., 1.],
           [2., 1.]])

    A padded batch, 8 query heads on 2 key heads, and the log of each row's sum:

    >>> rng = np.random.default_rng(0)
    >>> query = rng.standard_normal((2, 8, 5, 16), np.float32)
    >>> key, value = rng.standard_normal((2, 2, 2, 7, 16), np.float32)
    >>> out, lse = fa.attention(query, key, value, kv_lengths=[7, 3], return_lse=True)
    >>> out.shape, lse.shape, out.dtype
    ((2, 8, 5, 16), (2, 8, 5), dtype('float32'))
    """
    plain = _runtime.plain
    if (plain is not None and mask is None and bias is None and (causal is False or causal is True) and window is None
            and query_offset is None and query_lengths is None and kv_lengths is None and softcap is None
            and score_mod is None and sinks is None and normalizer is _SOFTMAX and dropout_p is _NO_DROPOUT
            and seed is None and out is None and return_lse is False and deterministic is None):
        result = plain(query, key, value, causal, scale, num_threads)
        if result is not None:
            return result
    problem = checks.problem(
        query, key, value, mask=mask, bias=bias, causal=causal, window=window, query_offset=query_offset,
        query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale, softcap=softcap, score_mod=score_mod,
        sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed, out=out, return_lse=return_lse,
        deterministic=deterministic, num_threads=num_threads)
    _runtime.forward(problem)
    return problem.result()


def varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, *, mask=None, bias=None, causal=False, window=None,
                     query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None, score_mod=None,
                     sinks=None, normalizer=_SOFTMAX, dropout_p=_NO_DROPOUT, seed=None, out=None, return_lse=False,
                     deterministic=None, num_threads=None):
    """Attention within each of many sequences that lie one behind the other, without padding.

    Sequence b of B is rows ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] - 1`` of query and rows ``cu_seqlens_k[b]`` to
    ``cu_seqlens_k[b + 1] - 1`` of key and value. Its result has the bits of `attention` on it alone, and the work is
    shared out between threads in blocks of rows, whatever the lengths are.

    Parameters
    ----------
    query : array (Tq, H, D), float32, float64, float16 or bfloat16
    key : array (Tk, Hkv, D), query's dtype; with float32 queries also float16 or bfloat16
        Hkv divides H.
    value : array (Tk, Hkv, Dv), key's dtype
    cu_seqlens_q, cu_seqlens_k : integers (B + 1,)
        Start at 0, do not decrease, end at Tq and Tk. Empty sequences are fine.
    mask, bias : optional
        Arrays that broadcast to (B, H, longest L, longest S), of which each sequence uses its first rows and keys; or a
        `fastattn.masks` expression, which holds within each sequence; or a bias object.
    query_offset, query_lengths, kv_lengths : int or integers (B,), optional
        For each sequence; the default offset is its keys less its queries.
    causal, window, scale, softcap, score_mod, sinks, normalizer, dropout_p, seed, deterministic, num_threads : optional
        As in `attention`.
    out : ndarray (Tq, H, Dv) of query's dtype, optional
        Filled and returned.
    return_lse : bool
        Return (out, lse).

    Returns
    -------
    out : ndarray (Tq, H, Dv), query's dtype, 64-byte aligned
    lse : ndarray (Tq, H), float64 for float64 queries, else float32
        Only with ``return_lse``, in nats.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; ValueError where cu_seqlens do not start at 0, decrease, end elsewhere or differ in number;
        TypeError for a compiled plan or a sparse array as mask, which fit one length only.

    Notes
    -----
    The layout is that of the variable-length functions of FlashAttention (Dao et al., 2022).

    Examples
    --------
    Two sequences of 3 and 2 rows:

    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.random.default_rng(0).standard_normal((3, 5, 4, 8), np.float32)
    >>> out = fa.varlen_attention(query, key, value, [0, 3, 5], [0, 3, 5], causal=True)
    >>> last = fa.attention(*(x[3:].swapaxes(0, 1) for x in (query, key, value)), causal=True)
    >>> bool((out[3:].swapaxes(0, 1) == last).all())
    True
    """
    problem = checks.problem(
        query, key, value, mask=mask, bias=bias, causal=causal, window=window, query_offset=query_offset,
        query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale, softcap=softcap, score_mod=score_mod,
        sinks=sinks, normalizer=normalizer, dropout_p=dropout_p, seed=seed, out=out, return_lse=return_lse,
        deterministic=deterministic, num_threads=num_threads, packed=(cu_seqlens_q, cu_seqlens_k))
    _runtime.forward(problem)
    return problem.result()


def attention_weights(query, key, *, rows=None, heads=None, reduce=None, mask=None, bias=None, causal=False,
                      window=None, query_offset=None, query_lengths=None, kv_lengths=None, scale=None, softcap=None,
                      score_mod=None, sinks=None, normalizer=_SOFTMAX, deterministic=None, num_threads=None):
    """The weights of `attention`, softmax(scale * Q K^T + bias): of chosen rows and heads, or reduced.

    Two passes over the keys, the first for the sums of the softmax. Nothing of L x S is stored but what is asked for.

    Parameters
    ----------
    query : array (..., H, L, D), float32, float64, float16 or bfloat16
    key : array (..., Hkv, S, D), query's dtype; with float32 queries also float16 or bfloat16
    rows, heads : int, slice or integers (n,), optional
        Which queries and which query heads, in this order; the default is all. Chosen rows keep their positions, so
        that causal, window and masks mean what they mean in `attention`.
    reduce : optional
        - None: the weights, (..., H, L, S).
        - "sum", "max": over the chosen queries, what each key receives, (..., H, S).
        - "entropy": of each row, -sum p log p in nats, (..., H, L).
        - ("top_k", k): the k largest of each row in descending order and their keys, two arrays (..., H, L, k), the
          second of int64. Of equal scores the earlier keys come first; where a row sees fewer keys, weight 0, key -1.

        H and L are the numbers of chosen heads and rows.
    mask, bias, causal, window, query_offset, query_lengths, kv_lengths : optional
    scale, softcap, score_mod, sinks, normalizer, deterministic, num_threads : optional
        As in `attention`, for all rows and heads of query and key.

    Returns
    -------
    ndarray, float64 for float64 queries, else float32, or a pair of ndarrays for top_k
        Rows that see no key have weights and entropy 0. A row with a NaN score is NaN for the keys it sees,
        and its top k are NaN and -1.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; ValueError for rows or heads outside the axis, an unknown reduce, k < 1 or k > S.

    Notes
    -----
    About 4 B H L S D floating-point operations for all reductions. Sums run over 8 chunks of rows, always in the same
    order: no bit depends on the number of threads.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key = np.zeros((3, 4)), np.zeros((3, 4))
    >>> fa.attention_weights(query, key, causal=True).round(3)
    array([[1.   , 0.   , 0.   ],
           [0.5  , 0.5  , 0.   ],
           [0.333, 0.333, 0.333]])
    >>> fa.attention_weights(query, key, causal=True, reduce="sum").round(3)
    array([1.833, 0.833, 0.333])
    >>> fa.attention_weights(query, key, causal=True, rows=-1, reduce="entropy").round(3)
    array([1.099])
    """
    problem = checks.weights_problem(
        query, key, rows=rows, heads=heads, reduce=reduce, mask=mask, bias=bias, causal=causal, window=window,
        query_offset=query_offset, query_lengths=query_lengths, kv_lengths=kv_lengths, scale=scale, softcap=softcap,
        score_mod=score_mod, sinks=sinks, normalizer=normalizer, deterministic=deterministic, num_threads=num_threads)
    _runtime.forward(problem)
    return checks.weights_result(problem)
