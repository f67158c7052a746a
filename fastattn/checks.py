"""Every check of the arguments, and the one description of a problem that kernels and reference work from.

`problem` either raises the one error that names the argument, its rule and what came instead, or returns a `Problem`
whose arrays all have their full shape. What is behind it assumes valid input.
"""

import copy
import math
import numbers
import os
import sys

import numpy as np

from . import masks, score
from .bias import Bias

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
FLOAT16 = np.dtype(np.float16)
BOOL = np.dtype(np.bool_)
LIMITS = {dtype: (float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)) for dtype in (FLOAT32, FLOAT64)}

UNBOUNDED = 2**61  # a window bound no position reaches; position - UNBOUNDED still fits in 64 bits
OFFSET_LIMIT = 2**60
MAX_LEADING_AXES = 8
SOFTMAX, SIGMOID, RELU, SPARSEMAX, ENTMAX15 = range(5)  # as in fastattn.h
NORMALIZERS = {"softmax": SOFTMAX, "softmax1": SOFTMAX, "sigmoid": SIGMOID, "relu": RELU, "sparsemax": SPARSEMAX,
               "entmax15": ENTMAX15}
OVERLAP_WORK = 10_000  # steps that deciding an overlap exactly may take; about a millisecond


class Problem:
    """One checked call. B = prod(lead); arrays share the memory of the arguments, broadcast axes have stride 0.

    query (*lead, H, L, D), key (*lead, Hkv, S, D), value (*lead, Hkv, S, Dv)
    mask            None or bool (*lead, H, L, S)
    plan            None or a masks.Plan whose lead broadcasts to (*lead, H), instead of a mask
    bias            None or (*lead, H, L, S) of query's dtype, or float32 with 16-bit queries
    bias_index      None, or contiguous int64 (L,) and (S,): then bias is (H, 1, n), and query i and key j read
                    element bias_index[0][i] + bias_index[1][j] of their head's n
    sinks           None or contiguous (H,), float64 with float64 queries, else float32
    left, right     query i, at position p = i + query_offset[b], sees p - left <= j <= p + right; UNBOUNDED = no limit
    query_offset    None without causal and window, else contiguous int64 (B,)
    query_lengths   None or contiguous int64 (B,), in [0, L]
    kv_lengths      None or contiguous int64 (B,), in [0, S]
    scale, softcap  floats; softcap 0.0 = none
    normalizer      SOFTMAX, ...; shift is the sigmoid's, NaN for minus the log of a batch's keys
    dropout         0, or how many of 2**32 numbers drop a weight
    keep, seed      the factor of those that stay; 64 bits
    batch           number of the first batch
    one_path        True: the bits of a row are those of a call with many rows
    out             (*lead, H, L, Dv), to be filled
    lse             None or (*lead, H, L), to be filled
    num_threads     None or int >= 1
    cu_q, cu_k      None, or contiguous int64 (B + 1,): packed sequences. Then query, key, value, out and lse repeat the
                    packed rows for every batch by stride 0, batch b is rows cu[b] to cu[b + 1] - 1, and mask and bias
                    are as long as the longest sequence
    L, S            rows and keys; of the longest sequence where they are packed
    pages           None, or the cache.Pages that hold keys and values; key and value then have but their shapes
    reduce          0 for out, else what of the weights is computed, as in fastattn.h; then value has no columns and
    rows            is None or int64 (L,): the rows that the queries are in positions and query_lengths
    weights         the kernel's result: (*lead, H, L, S), (*lead, H, chunks, S), (*lead, H, L, 1) or (*lead, H, L, k)
    indices         None, or int64 (*lead, H, L, k)
    additive        None, or (w, b) of additive scores: contiguous (H, D) in the dtype of the sums; b may be None
    score_mod       None, or a score.Prepared: what changes the scaled scores
    grad_w          None, or zeros (*lead, H, parts, D) to be filled: the gradient of w is their sum
    bias_offset     of a bias object: None or int64 (B,)
    grad_out, grad_lse                      of a backward pass: as out and lse, the latter or None
    grad_query, grad_key, grad_value        as query, key and value, to be filled, in the dtype of the sums
    means           None, or as out in the dtype of the sums: room for what takes its place in the gradients
    delta           (*lead, H, L), minus grad_lse, to be filled for the rows that see a key: sum of grad_out * out, less
                    grad_lse
    grad_bias       None, or zeros to be filled: (*lead, H, L, S) with stride 0 where it is a sum
    grad_index      None, or as bias_index; then grad_bias is (parts, *lead, H, 1, n), to be summed
    row_grad        None or (*lead, H, L), to be filled: the sums over the keys of the gradient of the final scores
    parts           of grad_bias
    fresh           grad_bias is not zeros yet
    in_turn         how many pairs of key head and batch go one after the other, as their grad_bias is one sum
    returned        what `result` returns: the caller's own out=, or `out` in the caller's shape
    returned_lse    None, or lse in the caller's shape
    """

    __slots__ = ("query", "key", "value", "mask", "plan", "bias", "bias_index", "sinks", "left", "right",
                 "query_offset", "query_lengths", "kv_lengths", "scale", "softcap", "normalizer", "shift", "dropout",
                 "keep", "seed", "additive", "score_mod", "means", "grad_w",
                 "batch", "one_path", "out", "lse",
                 "num_threads", "cu_q", "cu_k", "L", "S", "pages", "reduce", "rows", "weights", "indices", "k",
                 "chunks", "bias_offset", "grad_out", "grad_lse", "grad_query", "grad_key", "grad_value", "delta",
                 "grad_bias", "grad_index", "row_grad", "parts", "fresh", "in_turn", "returned", "returned_lse")

    def result(self):
        """What the caller gets: out, or (out, lse)."""
        if self.returned_lse is None:
            return self.returned
        return self.returned, self.returned_lse

    def bias_of(self, head):
        """The bias (L, S) of the head of index (*lead, h)."""
        if self.bias_index is None:
            return self.bias[head]
        rows, keys = self.bias_index
        return self.bias[head][0, rows[:, None] + keys]

    def sequences(self):
        """The problem of each packed sequence, on the same memory."""
        for b in range(len(self.cu_q) - 1):
            one = copy.copy(self)
            rows, keys = slice(*self.cu_q[b : b + 2]), slice(*self.cu_k[b : b + 2])
            one.cu_q = one.cu_k = None
            one.batch = b
            one.L, one.S = rows.stop - rows.start, keys.stop - keys.start
            one.query, one.out = self.query[b : b + 1, :, rows], self.out[b : b + 1, :, rows]
            one.key, one.value = self.key[b : b + 1, :, keys], self.value[b : b + 1, :, keys]
            one.lse = None if self.lse is None else self.lse[b : b + 1, :, rows]
            one.mask = None if self.mask is None else self.mask[b : b + 1, :, : one.L, : one.S]
            if self.bias is not None:
                one.bias = self.bias[b : b + 1] if self.bias_index else self.bias[b : b + 1, :, : one.L, : one.S]
            one.plan = None if self.plan is None else self.plan.parts[b]
            for name in ("query_offset", "query_lengths", "kv_lengths"):
                values = getattr(self, name)
                setattr(one, name, None if values is None else values[b : b + 1])
            if hasattr(self, "grad_out"):
                for name, part in (("grad_out", rows), ("grad_lse", rows), ("grad_query", rows), ("delta", rows),
                                   ("row_grad", rows), ("grad_key", keys), ("grad_value", keys)):
                    values = getattr(self, name)
                    setattr(one, name, None if values is None else values[b : b + 1, :, part])
                if self.grad_index is not None:
                    one.grad_index = self.grad_index[0][: one.L], self.grad_index[1][: one.S]
                    one.grad_bias = self.grad_bias[:, b : b + 1]
                elif self.grad_bias is not None:
                    one.grad_bias = self.grad_bias[b : b + 1, :, : one.L, : one.S]
            yield one


def problem(query, key, value, *, mask=None, bias=None, causal=False, window=None, query_offset=None,
            query_lengths=None, kv_lengths=None, scale=None, softcap=None, sinks=None, normalizer="softmax",
            dropout_p=0.0, seed=None, out=None, return_lse=False, deterministic=None, num_threads=None, packed=None,
            results=True, score_mod=None, additive=None):
    """Check the arguments of `attention`, which documents them, and return the `Problem` they describe.

    ``packed``: None, or (cu_seqlens_q, cu_seqlens_k) of `varlen_attention`. ``results``: False leaves out to the
    caller, with its shape in `returned`. ``additive``: None, or (weight, bias) of `additive_attention`.
    """
    p = Problem()
    p.reduce = p.k = p.chunks = 0
    p.rows = p.weights = p.indices = p.pages = p.bias_offset = None
    p.batch = 0

    # --- query, key, value: kind, dtype, layout ---
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    dtype = query.dtype
    if dtype != FLOAT32 and dtype != FLOAT64 and not is_half(dtype):
        raise TypeError(f"query must be float32, float64, float16 or bfloat16 in native byte order, got {dtype}")
    if key.dtype != dtype and not (dtype == FLOAT32 and is_half(key.dtype)):
        lower = ", float16 or bfloat16" if dtype == FLOAT32 else ""
        raise TypeError(f"key must have query's dtype {dtype}{lower}, got {key.dtype}")
    if value.dtype != key.dtype:
        raise TypeError(f"value must have key's dtype {key.dtype}, got {value.dtype}")
    inside = compute_dtype(dtype)
    _check_layout("query", query)
    _check_layout("key", key)
    _check_layout("value", value)

    # --- query, key, value: shapes ---
    rank = query.ndim
    if packed is not None and rank != 3:
        raise ValueError(f"query must have 3 axes (T, H, D), got shape {query.shape}")
    if rank < 2 or rank > MAX_LEADING_AXES + 3:
        raise ValueError(f"query must have 2 to {MAX_LEADING_AXES + 3} axes (..., H, L, D), got shape {query.shape}")
    if key.ndim != rank:
        raise ValueError(f"key must have as many axes as query of shape {query.shape}, got shape {key.shape}")
    if value.ndim != rank:
        raise ValueError(f"value must have as many axes as query of shape {query.shape}, got shape {value.shape}")
    inputs = [("query", query), ("key", key), ("value", value)]
    if rank == 2:
        query, key, value = query[None], key[None], value[None]
    if packed is not None:
        query, key, value = (x.swapaxes(0, 1)[None] for x in (query, key, value))
    lead, (H, L, D) = query.shape[:-3], query.shape[-3:]
    Hkv, S, D_key = key.shape[-3:]
    H_value, S_value, Dv = value.shape[-3:]
    if D_key != D:
        raise ValueError(f"key must have query's head size {D}, got {D_key}")
    if S_value != S:
        raise ValueError(f"value must have key's length {S}, got {S_value}")
    if H_value != Hkv:
        raise ValueError(f"value must have key's number of heads {Hkv}, got {H_value}")
    if Hkv != H and (Hkv == 0 or H % Hkv):
        raise ValueError(f"query must have a multiple of key's {Hkv} heads, got {H}")
    if key.shape[:-3] != lead or value.shape[:-3] != lead:
        lead = _leading_axes(lead, key.shape[:-3], value.shape[:-3])
        query = np.broadcast_to(query, lead + query.shape[-3:])
        key = np.broadcast_to(key, lead + key.shape[-3:])
        value = np.broadcast_to(value, lead + value.shape[-3:])
    T, most_q, most_k = L, L, S
    p.cu_q = p.cu_k = None
    if packed is not None:
        p.cu_q = _cumulative("cu_seqlens_q", packed[0], L, "query")
        p.cu_k = _cumulative("cu_seqlens_k", packed[1], S, "key")
        if len(p.cu_q) != len(p.cu_k):
            raise ValueError(f"cu_seqlens_k must have as many sequences as cu_seqlens_q with {len(p.cu_q) - 1}, got "
                             f"{len(p.cu_k) - 1}")
        lead, most_q, most_k = (len(p.cu_q) - 1,), np.diff(p.cu_q), np.diff(p.cu_k)
        query, key, value = (np.broadcast_to(x, lead + x.shape[1:]) for x in (query, key, value))
        L, S = int(most_q.max(initial=0)), int(most_k.max(initial=0))
    p.query, p.key, p.value, p.L, p.S = query, key, value, L, S

    # --- mask, bias, sinks ---
    p.mask = p.plan = p.bias = p.bias_index = p.sinks = None
    if mask is not None and type(mask) is not np.ndarray:
        sequences = None if packed is None else zip(most_q.tolist(), most_k.tolist())
        p.plan = _plan(mask, lead, H, L, S, sequences)
    if mask is not None and p.plan is None:
        mask = _array("mask", mask)
        if mask.dtype != BOOL:
            raise TypeError(f"mask must be boolean (True = attend), got {mask.dtype}")
        p.mask = _broadcast("mask", mask, lead + (H, L, S))
        inputs.append(("mask", mask))
    from_positions = isinstance(bias, Bias)
    if bias is not None and not from_positions:
        bias = _array("bias", bias)
        if bias.dtype != dtype and bias.dtype != inside:
            raise TypeError(f"bias must have query's dtype {_or(dtype, inside)}, got {bias.dtype}")
        _check_layout("bias", bias)
        p.bias = _broadcast("bias", bias, lead + (H, L, S))
        inputs.append(("bias", bias))
    if sinks is not None:
        sinks = _array("sinks", sinks)
        if sinks.dtype != dtype and sinks.dtype != inside:
            raise TypeError(f"sinks must have query's dtype {_or(dtype, inside)}, got {sinks.dtype}")
        if sinks.shape != (H,):
            raise ValueError(f"sinks must have shape ({H},), one for each head of query, got {sinks.shape}")
        _check_layout("sinks", sinks)
        p.sinks = np.ascontiguousarray(sinks, inside)
        inputs.append(("sinks", sinks))

    # --- positions and lengths ---
    p.left, p.right = _window(window, _boolean("causal", causal))
    p.query_lengths = None if query_lengths is None else _integers("query_lengths", query_lengths, lead, 0, L)
    p.kv_lengths = None if kv_lengths is None else _integers("kv_lengths", kv_lengths, lead, 0, S)
    if packed is not None:
        _check_each("query_lengths", p.query_lengths, most_q)
        _check_each("kv_lengths", p.kv_lengths, most_k)
    if query_offset is not None:
        query_offset = _integers("query_offset", query_offset, lead, 1 - OFFSET_LIMIT, OFFSET_LIMIT - 1)
    windowed = p.left != UNBOUNDED or p.right != UNBOUNDED
    if query_offset is None and (windowed or from_positions):
        n_keys = most_k if p.kv_lengths is None else p.kv_lengths
        query_offset = np.full(math.prod(lead), n_keys - most_q, np.int64)
    p.query_offset = query_offset if windowed else None
    if from_positions:
        sequences = () if packed is None else zip(most_q, most_k)
        p.bias, p.bias_index = _bias(bias, lead, H, L, S, inside, query_offset, sequences)
        p.bias_offset = query_offset

    # --- numbers ---
    if scale is None:
        p.scale = 1.0 / math.sqrt(D) if D else 1.0
    else:
        p.scale = _real("scale", scale)
        if not abs(p.scale) <= LIMITS[inside][1]:
            raise ValueError(f"scale must be finite in {inside}, got {scale}")
    if softcap is None:
        p.softcap = 0.0
    else:
        p.softcap = _real("softcap", softcap)
        smallest, largest = LIMITS[inside]
        if not smallest <= p.softcap <= largest:  # a denormal cap has no finite reciprocal
            raise ValueError(f"softcap must be positive, normal and finite in {inside}, got {softcap}")
    # A C int holds it; there are never more tasks than that.
    p.num_threads = None if num_threads is None else min(_integer("num_threads", num_threads, 1), 2**31 - 1)

    p.dropout, p.keep, p.seed = _dropout(dropout_p, seed)

    p.normalizer, p.shift, zero_sink = parse_normalizer(normalizer, sinks)
    if zero_sink:
        p.sinks = np.zeros(H, inside)
    p.one_path = (deterministic is not None and _check_deterministic(deterministic)) or p.normalizer != SOFTMAX

    # --- scores that are no products, or changed ---
    p.additive = None if additive is None else _additive(*additive, H, D, dtype, inside)
    p.score_mod = None if score_mod is None else score.prepare(score_mod, inside)
    p.one_path = p.one_path or p.additive is not None or p.score_mod is not None

    # --- results ---
    shape = (T, H, Dv) if packed is not None else lead + (H, L, Dv) if rank > 2 else (L, Dv)
    if not results:
        p.returned, p.out, p.lse = shape, None, None
        return p
    if out is None:
        p.returned = p.out = aligned_empty(shape, dtype)
    else:
        p.returned, p.out = out, _check_out(out, shape, dtype, inputs)
    p.returned_lse = p.lse = aligned_empty(shape[:-1], inside) if _boolean("return_lse", return_lse) else None
    if packed is not None:
        p.out = _every_batch(p.out, lead)
        p.lse = None if p.lse is None else _every_batch(p.lse, lead)
    elif rank == 2:
        p.out = p.out[None]
        p.lse = None if p.lse is None else p.lse[None]
    return p


GRADIENT_PARTS = 8  # at least, of the sums over diagonals


def gradient_problem(grad_out, query, key, value, out, lse, *, grad_lse=None, bias=None, of_bias=True,
                     into=(None, None, None), **options):
    """Check the arguments of `attention_backward`, which documents them, and return the `Problem` they describe.

    Without `of_bias`, the gradient of a bias is left out. `into` holds arrays for the gradients of query, key and
    value, each as its argument: the sums are made there if they can be, which saves a copy.
    """
    p = problem(query, key, value, bias=bias, results=False, **options)
    if p.dropout and options.get("seed") is None:
        raise ValueError("seed must be that of the forward pass where there is a dropout, got None")
    shape, dtype, inside = p.returned, p.query.dtype, compute_dtype(p.query.dtype)
    packed, flat = p.cu_q is not None, len(shape) == 2
    lead, (H, rows, D), (Hkv, keys, Dv) = p.query.shape[:-3], p.query.shape[-3:], p.value.shape[-3:]

    def as_problem(array):
        """An array of the caller's shape as the problem has it."""
        return _every_batch(array, lead) if packed else array[None] if flat else array

    def given(name, array, shape, dtype):
        array = _array(name, array)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
        _check_layout(name, array)
        return as_problem(array)

    p.grad_out = given("grad_out", grad_out, shape, dtype)
    p.out = given("out", out, shape, dtype)
    p.lse = given("lse", lse, shape[:-1], inside)
    p.grad_lse = None if grad_lse is None else given("grad_lse", grad_lse, shape[:-1], inside)
    if grad_lse is not None and p.normalizer != SOFTMAX:
        raise ValueError("grad_lse must be None where the normalizer is no softmax, got an array")
    p.means = as_problem(aligned_empty(shape, inside)) if p.normalizer in (SPARSEMAX, ENTMAX15) else None

    def of(H, n, *columns):
        return (n, H, *columns) if packed else (n, *columns) if flat else lead + (H, n, *columns)

    # Arguments that were broadcast have the sum over the batches, which `gradients` takes.
    nothing = 0 in (*lead, H, p.L, p.S)
    sums = {name: _place(given, size, inside, nothing) for name, size, given in
            zip(("query", "key", "value"), (of(H, rows, D), of(Hkv, keys, D), of(Hkv, keys, Dv)), into)}
    p.grad_query, p.grad_key, p.grad_value = map(as_problem, sums.values())
    sums["lse"] = lse if isinstance(lse, np.ndarray) else _array("lse", lse)
    sums["delta"] = np.zeros(of(H, rows), inside) if grad_lse is None else np.negative(grad_lse, dtype=inside)
    p.delta = as_problem(sums["delta"])
    p.grad_bias = p.grad_index = p.row_grad = None
    p.parts, p.fresh, p.in_turn, batches = 0, False, 1, max(1, math.prod(lead))
    p.grad_w = None
    blocks = -(-p.S // masks.KEYS)
    if p.score_mod is not None and not p.score_mod.gradient:
        raise ValueError("score_mod must be a ScoreMod with a gradient for attention_backward, got one without")
    if p.additive is not None:
        p.parts = max(1, min(blocks, GRADIENT_PARTS))
        sums["w"] = p.grad_w = np.zeros(lead + (H, p.parts, D), inside)
    if bias is None or not of_bias:
        pass
    elif isinstance(bias, Bias):
        full, offset = ((1,) * len(lead), None) if nothing else (lead, p.bias_offset)
        p.grad_index, own, n, sums["distance"] = bias.diagonals(full, p.L, p.S, offset)
        p.grad_index = tuple(np.ascontiguousarray(index, np.int64) for index in p.grad_index)
        p.parts = max(1, min(blocks, max(GRADIENT_PARTS, blocks // GRADIENT_PARTS)))
        sums["bias"] = np.zeros((p.parts, *own, H, n), inside)
        p.grad_bias = _to_be_summed(sums["bias"][..., None, :], (p.parts, *full, H, 1, n))
        p.in_turn = 1 if own == lead else batches
    else:
        full = lead + (H, p.L, p.S)
        own = (1,) * (len(full) - np.ndim(bias)) + np.shape(bias)
        if own[-1] == 1 and p.S != 1:
            sums["rows"] = np.zeros(of(H, rows), inside)
            p.row_grad = as_problem(sums["rows"])
        else:
            # One of all rows and keys is large: the kernel clears each part where it is used.
            p.fresh = not nothing and own[-3:] == full[-3:] and own[:-3] in (lead, (1,) * len(lead))
            sums["bias"] = (aligned_empty if p.fresh else np.zeros)(own, inside)
            p.grad_bias = _to_be_summed(sums["bias"], full)
            heads = 1 if own[-3] == H or Hkv == 0 else Hkv
            p.in_turn = 1 if own[:-3] == lead and heads == 1 else batches * heads
    p.returned = sums
    return p


def _place(given, shape, dtype, zero):
    """An array to be filled, or zeros: the given one, where sums can be made in it."""
    if given is None or zero or (given.shape, given.dtype) != (shape, dtype) or given.strides[-1] != given.itemsize:
        return (np.zeros if zero else aligned_empty)(shape, dtype)
    return given


REDUCTIONS = {None: 1, "sum": 2, "max": 3, "entropy": 4, "top_k": 5}
CHUNKS = 8  # of a head's rows, which are summed apart: independent tasks, and one order of sums for every thread count


def weights_problem(query, key, *, rows=None, heads=None, reduce=None, **options):
    """Check the arguments of `attention_weights`, which documents them, and return the `Problem` they describe."""
    k = 0
    if isinstance(reduce, (tuple, list)) and len(reduce) == 2 and isinstance(reduce[0], str) and reduce[0] == "top_k":
        reduce, k = "top_k", reduce[1]
    elif reduce is not None and not (isinstance(reduce, str) and reduce in REDUCTIONS and reduce != "top_k"):
        raise ValueError(f"reduce must be None, 'sum', 'max', 'entropy' or ('top_k', k), got {reduce!r}")
    key = _array("key", key)
    p = problem(query, key, key[..., :0] if key.ndim else key, **options)
    lead, (H, L) = p.query.shape[:-3], p.query.shape[-3:-1]
    flat = np.ndim(p.returned) == 2
    p.reduce, p.k = REDUCTIONS[reduce], _integer("k", k, 1) if reduce == "top_k" else 0
    if p.k > p.S:
        raise ValueError(f"k must be at most the {p.S} keys, got {p.k}")

    # The chosen heads and rows: small arrays are copied, the masks of all rows are not.
    if heads is not None:
        if p.score_mod is not None:
            raise ValueError("heads must be None with a score_mod, which gets the numbers of all heads, got some")
        heads = _selection("heads", heads, H)
        group = H // p.key.shape[-3] if p.key.shape[-3] else 1
        p.query = p.query[..., heads, :, :]
        p.key, p.value = (x[..., heads // group, :, :] for x in (p.key, p.value))
        p.sinks = None if p.sinks is None else p.sinks[heads]
        p.mask, p.bias = (x if x is None else _take(x, heads, -3) for x in (p.mask, p.bias))
        H = len(heads)
    if rows is not None:
        p.rows = rows = _selection("rows", rows, L)
        p.query = p.query[..., rows, :]
        p.mask = None if p.mask is None else _take(p.mask, rows, -2)
        if p.bias_index is not None:
            p.bias_index = p.bias_index[0][rows], p.bias_index[1]
        elif p.bias is not None:
            p.bias = _take(p.bias, rows, -2)
        p.L = L = len(rows)
    if p.plan is not None and (rows is not None or heads is not None and p.plan.lead[-1:] not in ((), (1,))):
        p.plan = p.plan.take(rows, heads)
    p.chunks = min(CHUNKS, max(1, -(-L // masks.ROWS))) if reduce in ("sum", "max") else CHUNKS

    shapes = {None: (L, p.S), "sum": (p.chunks, p.S), "max": (p.chunks, p.S), "entropy": (L, 1), "top_k": (L, p.k)}
    p.weights = np.zeros(lead + (H, *shapes[reduce]), compute_dtype(p.query.dtype))
    p.indices = np.full(p.weights.shape, -1, np.int64) if reduce == "top_k" else None
    p.out = p.out[..., :H, :L, :] if rows is None else np.empty(lead + (H, L, 0), p.query.dtype)
    p.returned = (reduce, flat)
    return p


def weights_result(p):
    """What the caller of `attention_weights` gets."""
    reduce, flat = p.returned
    result = p.weights
    if reduce == "sum":
        result = result.sum(axis=-2)
    elif reduce == "max":
        result = result.max(axis=-2, initial=0)
    elif reduce == "entropy":
        result = result[..., 0]
    result, indices = (x[0] if flat and x is not None else x for x in (result, p.indices))
    return (result, indices) if reduce == "top_k" else result


def _selection(name, value, n):
    """Indices of ``n`` rows or heads as int64, from an integer, a slice or integers; negative ones count back."""
    if isinstance(value, slice):
        return np.arange(*value.indices(n), dtype=np.int64)  # not a view: the kernel reads it without strides
    index = np.array([value] if _is_integer(value) else _array(name, value))
    if index.dtype.kind not in "iu" and index.size:
        raise TypeError(f"{name} must be integers or a slice, got {index.dtype}")
    if index.ndim != 1:
        raise ValueError(f"{name} must have one axis, got shape {index.shape}")
    outside = (index < -n) | (index >= n)
    if outside.any():
        raise ValueError(f"{name} must lie in [{-n}, {n - 1}], got {index[outside][0]}")
    index = index.astype(np.int64)
    return np.where(index < 0, index + n, index)


def _take(array, index, axis):
    """array.take, without a copy where the indices are one, in equal steps or of a broadcast axis."""
    step = int(index[1] - index[0]) if len(index) > 1 else 1
    if len(index) and step and (np.diff(index) == step).all():
        stop = int(index[-1]) + (1 if step > 0 else -1)
        return array[(..., slice(int(index[0]), None if stop < 0 else stop, step)) + (slice(None),) * (-axis - 1)]
    if array.strides[axis] == 0:
        shape = list(array.shape)
        shape[axis] = len(index)
        return np.broadcast_to(array[(..., slice(0, 1)) + (slice(None),) * (-axis - 1)], shape)
    return array[(..., index) + (slice(None),) * (-axis - 1)]


def _every_batch(packed, lead):
    """(T, H, ...) as (*lead, H, T, ...) on the same memory, writeable."""
    view = packed.swapaxes(0, 1)
    return np.lib.stride_tricks.as_strided(view, lead + view.shape, (0,) + view.strides)


def _to_be_summed(array, shape):
    """np.broadcast_to, writeable: what is added to an element of the view joins the sum."""
    return np.lib.stride_tricks.as_strided(array, shape, np.broadcast_to(array, shape).strides)


def aligned_empty(shape, dtype):
    """An uninitialised C-contiguous array that starts on a 64-byte boundary.

    >>> aligned_empty((2, 3), np.float32).ctypes.data % 64
    0
    """
    dtype = np.dtype(dtype)
    try:
        memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
        return np.ndarray(shape, dtype, memory, -memory.ctypes.data % 64)
    except (ValueError, OverflowError, MemoryError):  # NumPy raises the first two for sizes past the address space
        raise MemoryError(f"no memory for a result of shape {tuple(shape)} and dtype {dtype}") from None


# --- arrays ---

def _array(name, value):
    """`value` as a plain ndarray on the same memory (lists are converted)."""
    if type(value) is np.ndarray:
        return value
    ma = sys.modules.get("numpy.ma")  # not loaded: there are no masked arrays
    if ma is not None and isinstance(value, ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask of its own, got a masked array")
    if hasattr(value, "__dlpack__") and not isinstance(value, np.ndarray):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError, ValueError):
            pass  # a dtype that DLPack or NumPy's reader lacks, such as bfloat16: __array__ may know it
    try:
        array = np.asarray(value)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise TypeError(f"{name} must be an array that NumPy can read, got {type(value).__name__} ({error})") from None
    if array.dtype.kind == "O" and array.ndim == 0:
        raise TypeError(f"{name} must be an array, got {type(value).__name__}")
    return array


def is_half(dtype):
    """Whether it is float16 or bfloat16 in native byte order; the latter is known by its name alone."""
    return dtype == FLOAT16 or (dtype.name == "bfloat16" and dtype.itemsize == 2)


def compute_dtype(dtype):
    """What sums and softmax of queries of this dtype are computed in: float64 for float64, else float32."""
    return FLOAT64 if dtype == FLOAT64 else FLOAT32


def float_dtype(dtype):
    """The argument ``dtype`` where it is float32 or float64."""
    dtype = np.dtype(dtype)
    if dtype not in (FLOAT32, FLOAT64):
        raise TypeError(f"dtype must be float32 or float64, got {dtype}")
    return dtype


def _or(dtype, other):
    return f"{dtype}" if dtype == other else f"{dtype} or {other}"


def _check_layout(name, array):
    """Kernels count strides in elements, so address and strides are multiples of the item size."""
    dtype = array.dtype
    if array.flags.aligned and dtype.alignment == dtype.itemsize:  # the same thing, but for double on 32-bit x86
        return
    steps = [step for step, size in zip(array.strides, array.shape) if size > 1]
    if not array.flags.aligned or any(step % dtype.itemsize for step in steps):
        raise ValueError(f"{name} must have an address and strides that are multiples of its item size of "
                         f"{dtype.itemsize} bytes, got address {array.ctypes.data:#x} and strides {array.strides}")


def _leading_axes(query, key, value):
    try:
        lead = np.broadcast_shapes(query, key)
    except ValueError:
        raise ValueError(f"key must have query's leading axes {query} or 1 in their place, got {key}") from None
    try:
        return np.broadcast_shapes(lead, value)
    except ValueError:
        raise ValueError(f"value must have the leading axes {lead} of query and key or 1 in their place, "
                         f"got {value}") from None


def _plan(mask, lead, H, L, S, sequences=None):
    """The plan of an expression, a plan or a sparse array; None for what is to be read as an array.

    ``sequences``: None, or pairs of the rows and keys of each packed sequence.
    """
    if isinstance(mask, masks.Mask):
        if sequences is None:
            plan = mask.compile(L, S)
        else:
            plan = masks.Plan.stack([mask.compile(*n) for n in sequences], mask)
    elif sequences is not None:
        if isinstance(mask, masks.Plan) or hasattr(mask, "tocsr"):
            raise TypeError(f"mask must be an expression or an array for packed sequences, got {type(mask).__name__}")
        return None
    elif isinstance(mask, masks.Plan):
        plan = mask
        if (plan.L, plan.S) != (L, S):
            raise ValueError(f"mask must be a plan for L = {L} and S = {S}, got one for L = {plan.L} and S = {plan.S}")
    else:
        sparse = sys.modules.get("scipy.sparse")
        if sparse is None or not sparse.issparse(mask):
            return None
        if mask.shape != (L, S):
            raise ValueError(f"mask must have shape {(L, S)} as a sparse array, got {mask.shape}")
        plan = masks.plan_of_sparse(mask)
    try:
        fits = np.broadcast_shapes(plan.lead, (*lead, H)) == (*lead, H)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"mask must have leading axes that broadcast to (..., H) = {(*lead, H)}, got {plan.lead}")
    return plan


def _bias(bias, lead, H, L, S, dtype, query_offset, sequences):
    """`Problem.bias` and `Problem.bias_index` of a bias object.

    ``sequences``: pairs of the rows and keys of each packed sequence.
    """
    for rows, keys in sequences:
        bias.check(H, int(rows), int(keys))
    view, index = bias.view(lead, H, L, S, dtype, query_offset), bias.index()
    if index is not None:
        return np.broadcast_to(view, lead + view.shape), index
    return _broadcast("bias", view, lead + (H, L, S)), None


def _broadcast(name, array, shape):
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to (..., H, L, S) = {shape}, got shape {array.shape}") from None


def _check_out(out, shape, dtype, inputs, of="query"):
    """`out` as a plain ndarray; `of` is the argument whose dtype it has."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    out = _array("out", out)
    if out.dtype != dtype:
        raise ValueError(f"out must have {of}'s dtype {dtype}, got {out.dtype}")
    if out.shape != shape:
        raise ValueError(f"out must have shape {shape}, got {out.shape}")
    if not out.flags.writeable:
        raise ValueError("out must be writeable, got a read-only array")
    _check_layout("out", out)
    if _overlaps_itself(out):
        raise ValueError(f"out must not overlap itself, got strides {out.strides} for shape {shape}")
    for name, array in inputs:
        if _overlap(out, array):
            raise ValueError(f"out must not overlap the inputs, got memory shared with {name}")
    return out


def _overlap(a, b):
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=OVERLAP_WORK)
    except np.exceptions.TooHardError:
        return True


def _overlaps_itself(array):
    """False if each stride steps over all that the smaller ones reach, as in every slice of an ordinary array."""
    if array.flags.c_contiguous or array.size == 0:
        return False
    reach = array.itemsize
    for step, size in sorted((abs(step), size) for step, size in zip(array.strides, array.shape) if size > 1):
        if step < reach:
            return True
        reach += step * (size - 1)
    return False


# --- numbers ---

def _boolean(name, value):
    if value is True or value is False:
        return value
    if not isinstance(value, np.bool_):
        raise TypeError(f"{name} must be a bool, got {type(value).__name__}")
    return bool(value)


def _real(name, value):
    if type(value) is float:
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a real number, got {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{name} must be finite, got a number past the range of float64") from None


def _is_integer(value):
    return type(value) is int or (isinstance(value, numbers.Integral) and not isinstance(value, bool))


def _integer(name, value, low):
    if not _is_integer(value):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return int(value)


def _integers(name, value, lead, low, high):
    """A new contiguous int64 (B,) from an integer or an array of integers that broadcasts to the leading axes.

    The copy is what is checked: a caller's thread that writes to the array later cannot make a kernel read past an end.
    """
    if _is_integer(value):
        shape, values = (), [int(value)]
    else:
        array = _array(name, value)
        shape, values = array.shape, array.ravel().tolist()
        # Python integers past 64 bits come as objects; the range check below refuses them.
        if array.dtype.kind not in "iu" and not (values and all(type(n) is int for n in values)):
            raise TypeError(f"{name} must be integers, got {array.dtype}")
    if values and not (low <= min(values) and max(values) <= high):
        at = next(at for at, n in enumerate(values) if not low <= n <= high)
        index = f" at index {tuple(int(i) for i in np.unravel_index(at, shape))}" if shape else ""
        raise ValueError(f"{name} must lie in [{low}, {high}], got {values[at]}{index}")
    target = lead or (1,)
    if shape == ():
        return np.full(math.prod(target), values[0], np.int64)
    array = np.array(values, np.int64)
    if shape == target:
        return array
    try:
        return np.array(np.broadcast_to(array.reshape(shape), target), order="C").reshape(-1)
    except ValueError:
        raise ValueError(f"{name} must broadcast to the leading axes {target}, got shape {shape}") from None


def _check_each(name, lengths, most):
    """Lengths of packed sequences are at most those of the sequences."""
    if lengths is not None and (lengths > most).any():
        at = int((lengths > most).argmax())
        raise ValueError(f"{name} must lie in [0, {most[at]}] for sequence {at}, got {lengths[at]}")


def _cumulative(name, value, rows, of):
    """Where packed sequences begin, as a new contiguous int64 (B + 1,)."""
    values = np.array(_array(name, value))  # a copy, as in _integers
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"{name} must have one axis of at least 1 value, got shape {values.shape}")
    if values.dtype.kind not in "iu":
        raise TypeError(f"{name} must be integers, got {values.dtype}")
    if values[0] != 0:
        raise ValueError(f"{name} must start at 0, got {values[0]}")
    if (values[1:] < values[:-1]).any():
        at = int((values[1:] < values[:-1]).argmax())
        raise ValueError(f"{name} must not decrease, got {values[at]} and then {values[at + 1]} at index {at + 1}")
    if values[-1] != rows:
        raise ValueError(f"{name} must end at the {rows} rows of {of}, got {values[-1]}")
    return values.astype(np.int64)


def _dropout(dropout_p, seed):
    """(how many of 2**32 numbers drop a weight, the factor of those that stay, 64 bits of seed)."""
    share = _real("dropout_p", dropout_p)
    if not 0.0 <= share < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if seed is not None and _integer("seed", seed, 0) >= 2**64:
        raise ValueError(f"seed must be less than 2**64, got {seed}")
    if share == 0.0:
        return 0, 1.0, 0
    drawn = int.from_bytes(os.urandom(8), "little") if seed is None else int(seed)  # `secrets` takes 6 ms to import
    return min(round(share * 2**32), 2**32 - 1), 1 / (1 - share), drawn


def _window(window, causal):
    """(left, right): the keys a query sees on each side of its position, causal included."""
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    pair = window if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window must be an integer or a pair (left, right), got {len(pair)} values")
    left, right = (UNBOUNDED if n is None else min(_integer("window", n, 0), UNBOUNDED) for n in pair)
    return left, 0 if causal else right


def _additive(weight, bias, H, D, dtype, inside):
    """Weight and bias of additive scores, (D,) or (H, D), as contiguous (H, D); the latter may be None."""
    result = []
    for name, array in (("weight", weight), ("bias", bias)):
        if array is None and name == "bias":
            result.append(None)
            continue
        array = _array(name, array)
        if array.dtype != dtype and array.dtype != inside:
            raise TypeError(f"{name} must have query's dtype {_or(dtype, inside)}, got {array.dtype}")
        if array.shape not in ((D,), (H, D)):
            raise ValueError(f"{name} must have shape {(D,)} or {(H, D)}, got {array.shape}")
        result.append(np.ascontiguousarray(np.broadcast_to(array, (H, D)), inside))
    return tuple(result)


def parse_normalizer(normalizer, sinks):
    """(its number, the sigmoid's shift or NaN for the default, whether a sink of 0 joins)."""
    shift = math.nan
    if isinstance(normalizer, (tuple, list)) and len(normalizer) == 2 and normalizer[0] == "sigmoid":
        normalizer, shift = "sigmoid", _real("the shift of normalizer", normalizer[1])
        if not abs(shift) <= LIMITS[FLOAT32][1]:
            raise ValueError(f"the shift of normalizer must be finite in float32, got {shift}")
    if not isinstance(normalizer, str):
        raise TypeError(f"normalizer must be a string or ('sigmoid', shift), got {type(normalizer).__name__}")
    if normalizer not in NORMALIZERS:
        raise ValueError(f"normalizer must be one of {tuple(NORMALIZERS)}, got {normalizer!r}")
    if sinks is not None and normalizer != "softmax":
        whose = ", whose sink is 0" if normalizer == "softmax1" else ""
        raise ValueError(f"sinks must be None with normalizer={normalizer!r}{whose}, got an array")
    return NORMALIZERS[normalizer], shift, normalizer == "softmax1"


# --- options ---

def _check_deterministic(deterministic):
    if isinstance(deterministic, str):
        if deterministic != "row":
            raise ValueError(f"deterministic must be None, a bool or 'row', got {deterministic!r}")
        return True
    if not isinstance(deterministic, (bool, np.bool_)):
        raise TypeError(f"deterministic must be None, a bool or 'row', got {type(deterministic).__name__}")
    return False
