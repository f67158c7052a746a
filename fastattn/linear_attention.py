"""Linear attention: products of features in the place of the softmax, with a state of fixed size, and its gradients."""

import functools
from contextvars import ContextVar
from typing import NamedTuple

import numpy as np

from . import _runtime, checks, gradient

OUTPUT, QUERY, KEY = range(3)       # modes of a call, as in fastattn.h
MAPS = {"elu": 0, "relu": 1, "favor+": 2}
LOG2_E = 1.4426950408889634074
# e^x of random features is at most e^ROOM, so that sums of a million keys stay in range.
ROOM = {checks.FLOAT32: 64.0, checks.FLOAT64: 512.0}

kernel = ContextVar("kernel", default=_runtime.linear)      # the reference puts its own in this place


class LinearState(NamedTuple):
    """What linear attention keeps of the keys and values it has seen; float64 for float64 queries, else float32.

    ``sums`` (..., Hkv, F, Dv): the sum of features(key) outer value. ``normalizer`` (..., Hkv, F): the sum of
    features(key).
    """

    sums: np.ndarray
    normalizer: np.ndarray


class LinearGradients(NamedTuple):
    """What `linear_attention_backward` returns: arrays of the shape and dtype of the argument they belong to."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray


class Call:
    """One call of the kernel: what fastattn_linear in fastattn.h has, arrays (*lead, H, rows, columns)."""

    __slots__ = ("mode", "map", "causal", "bits", "H", "Hkv", "L", "S", "D", "Dv", "F", "half", "query", "key",
                 "value", "out", "normalizer", "grad_out", "grad_query", "grad_key", "grad_value", "projection",
                 "shift", "kv_lengths", "begin", "end", "num_threads")

    def __init__(self, **values):
        for name in self.__slots__:
            setattr(self, name, values.get(name))


@functools.lru_cache(maxsize=16)
def orthogonal_features(num_features, D, seed=0):
    """Random directions of FAVOR+: rows that are orthogonal in blocks of D, each of the length of a normal vector.

    Every row is distributed as a standard normal vector, so sums over them are unbiased.

    Parameters
    ----------
    num_features, D : int
    seed : int, optional

    Returns
    -------
    array (num_features, D), float64, read-only

    References
    ----------
    Choromanski et al., "Rethinking Attention with Performers", 2021, sections 2.3 and 2.4.

    Examples
    --------
    >>> from fastattn.linear_attention import orthogonal_features
    >>> x = orthogonal_features(6, 4)
    >>> abs(x[:4] @ x[:4].T - (x[:4] ** 2).sum(axis=1) * np.eye(4)).max() < 1e-12
    np.True_
    """
    rng = np.random.default_rng(seed)
    result = np.empty((num_features, D))
    for begin in range(0, num_features if D else 0, max(D, 1)):
        q, r = np.linalg.qr(rng.standard_normal((D, D)))
        # With the signs of r's diagonal, q is uniform among the orthogonal matrices; as LAPACK leaves it, it is not.
        result[begin : begin + D] = (q * np.sign(np.diag(r))).T[: num_features - begin]
    result *= np.sqrt((rng.standard_normal((num_features, D)) ** 2).sum(axis=1))[:, None]
    result.flags.writeable = False
    return result


def _random_map(D, num_features, seed, projection, dtype):
    """(projection, shift, half) of fastattn_linear."""
    if projection is None:
        n = max(1, D, int(D * np.log(max(D, 1)))) if num_features is None else num_features
        projection = orthogonal_features(checks._integer("num_features", n, 1), D, checks._integer("seed", seed, 0))
    else:
        if num_features is not None:
            raise ValueError(f"num_features must be left out where projection is given, got {num_features}")
        projection = checks._array("projection", projection)
        if projection.dtype.kind != "f":
            raise TypeError(f"projection must be of real numbers, got {projection.dtype}")
        if projection.ndim != 2 or projection.shape[1] != D or not len(projection):
            raise ValueError(f"projection must have shape (num_features, {D}), got {projection.shape}")
    # x . y - |y|^2 / 2 is at most |x|^2 / 2, whatever the key y is.
    above = np.maximum(0, (projection.astype(np.float64) ** 2).sum(axis=1) / 2 - ROOM[dtype])
    rows = projection * (LOG2_E * D**-0.25 if D else 1.0)
    return (np.ascontiguousarray(rows, dtype), np.ascontiguousarray(above * LOG2_E, dtype),
            LOG2_E / 2 * D**-0.5 if D else 0.0)


def _call(p, causal, feature_map, num_features, seed, projection):
    """The `Call` of a checked problem, without results."""
    causal = checks._boolean("causal", causal)
    (H, L, D), (Hkv, S, Dv) = p.query.shape[-3:], p.value.shape[-3:]
    if causal and L != S:
        raise ValueError(f"key must have query's length {L} where causal is True, got {S}")
    if not isinstance(feature_map, str):
        raise TypeError(f"feature_map must be a string, got {type(feature_map).__name__}")
    if feature_map not in MAPS:
        raise ValueError(f"feature_map must be one of {tuple(MAPS)}, got {feature_map!r}")
    dtype = checks.compute_dtype(p.query.dtype)
    call = Call(map=MAPS[feature_map], causal=causal, bits=64 if dtype == np.float64 else 32, H=H, Hkv=Hkv, L=L, S=S,
                D=D, Dv=Dv, F=D, half=0.0, query=p.query, key=p.key, value=p.value, kv_lengths=p.kv_lengths,
                num_threads=p.num_threads)
    if feature_map == "favor+":
        call.projection, call.shift, call.half = _random_map(D, num_features, seed, projection, dtype)
        call.F = len(call.projection)
    else:
        for name, value in (("num_features", num_features), ("projection", projection)):
            if value is not None:
                raise ValueError(f"{name} must be left out for feature_map {feature_map!r}, got {type(value).__name__}")
    return call


def _states(call, lead):
    """An uninitialised array of states as the kernel has them: the last column but padding is the normalizer."""
    return checks.aligned_empty((*lead, call.Hkv, call.F, (call.Dv + 16) // 16 * 16),
                                checks.compute_dtype(call.query.dtype))


def _begin(call, state, lead, flat):
    """The kernel's copy of a given state."""
    if not isinstance(state, (tuple, list)) or len(state) != 2:
        raise TypeError(f"state must be a LinearState or a pair (sums, normalizer), got {type(state).__name__}")
    begin = _states(call, lead)
    full = (*lead, call.Hkv, call.F, call.Dv)
    begin[...] = 0
    for name, array, to in zip(LinearState._fields, state, (begin[..., : call.Dv], begin[..., call.Dv])):
        array, shape = checks._array(f"state.{name}", array), full[: to.ndim]
        shape = shape[1:] if flat else shape
        if array.dtype != begin.dtype:
            raise TypeError(f"state.{name} must be {begin.dtype}, got {array.dtype}")
        if array.shape != shape:
            raise ValueError(f"state.{name} must have shape {shape}, got {array.shape}")
        to[...] = array
    return begin


def linear_attention(query, key, value, *, feature_map="elu", num_features=None, seed=0, projection=None,
                     causal=False, kv_lengths=None, state=None, return_state=False, return_normalizer=False, out=None,
                     num_threads=None):
    """Attention whose weights are products of features, in time and memory linear in the number of keys.

    With the features φ, in each head::

        out_i = sum_j (φ(query_i) . φ(key_j)) value_j / sum_j φ(query_i) . φ(key_j)

    over all keys, or over j <= i with `causal`.

    Parameters
    ----------
    query : array (..., H, L, D), float32, float64, float16 or bfloat16
    key, value : arrays (..., Hkv, S, D) and (..., Hkv, S, Dv)
        As in `attention`: H is a multiple of Hkv, leading axes are equal or 1.
    feature_map : {"elu", "relu", "favor+"}, optional
        - "elu": elu(x) + 1, that is x + 1 above 0 and e^x below; D features.
        - "relu": max(x, 0); D features. A row whose features are all 0 has the result 0.
        - "favor+": positive orthogonal random features e^(w . x / D^(1/4) - |x|^2 / (2 sqrt(D))), w a row of a random
          projection. The result approximates that of softmax attention with its default scale.
    num_features : int, optional
        Of "favor+". Default D ln D, rounded down, at least D.
    seed : int, optional
        Of the projection that "favor+" draws, `linear_attention.orthogonal_features`.
    projection : array (num_features, D), optional
        For "favor+", instead of what is drawn.
    causal : bool, optional
        Row i sees keys j <= i; L and S are equal.
    kv_lengths : int or integers that broadcast to the leading axes, optional
        Keys at and past it are padding and never contribute. The default is S.
    state : LinearState, optional
        Of an earlier call with the same features: its keys come before those of this call.
    return_state, return_normalizer : bool, optional
        Also return the state behind the last key; the denominators.
    out : array (..., H, L, Dv) of query's dtype, optional
    num_threads : int, optional
        As in `attention`.

    Returns
    -------
    array (..., H, L, Dv) of query's dtype
        0 for rows whose denominator is 0, such as those that see no key. Behind it in a tuple, where they are asked
        for: the denominators (..., H, L), which gradients need, and a `LinearState`; both in float64 for float64, else
        float32, and for "favor+" up to factors that cancel.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `attention`; ValueError for causal with L != S, an unknown feature_map, options of another one; TypeError
        and ValueError for a state of another dtype or shape.

    Notes
    -----
    With F features, 2 F (Dv + 1) (H L + Hkv S) floating-point operations, and about 96 H L (F + Dv) more for causal;
    "favor+" adds 2 F D (H L + Hkv S). Every sum has one order, whatever the number of threads: keys are summed in
    chunks of 64 (32 in float64) and segments of 2048 from the first key of a call on. So a sequence in several calls
    has the bits of one call if their lengths are multiples of 2048, and else agrees up to rounding.

    References
    ----------
    Katharopoulos et al., "Transformers are RNNs", 2020; Choromanski et al., "Rethinking Attention with Performers",
    2021.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((3, 4)), np.zeros((3, 4)), np.array([[1.0], [3.0], [5.0]])
    >>> fa.linear_attention(query, key, value, causal=True)
    array([[1.],
           [2.],
           [3.]])
    >>> _, state = fa.linear_attention(query[:2], key[:2], value[:2], causal=True, return_state=True)
    >>> fa.linear_attention(query[2:], key[2:], value[2:], causal=True, state=state)
    array([[3.]])
    """
    return_state, wanted = checks._boolean("return_state", return_state), return_normalizer
    p = checks.problem(query, key, value, kv_lengths=kv_lengths, out=out, num_threads=num_threads,
                       return_lse=checks._boolean("return_normalizer", wanted))
    call = _call(p, causal, feature_map, num_features, seed, projection)
    lead, flat = p.query.shape[:-3], p.returned.ndim == 2
    call.mode, call.out, call.normalizer = OUTPUT, p.out, p.lse
    if state is not None:
        call.begin = _begin(call, state, lead, flat)
    if return_state:
        call.end = _states(call, lead)
    kernel.get()(call)
    results = [p.returned]
    if wanted:
        results.append(p.returned_lse)
    if return_state:
        end = call.end[0] if flat else call.end
        results.append(LinearState(end[..., : call.Dv], end[..., call.Dv]))
    return results[0] if len(results) == 1 else tuple(results)


def linear_attention_backward(grad_out, query, key, value, out, normalizer, *, feature_map="elu", num_features=None,
                              seed=0, projection=None, causal=False, kv_lengths=None, num_threads=None):
    """Gradients of `linear_attention`: what a small change of each input changes in sum(grad_out * out).

    Parameters
    ----------
    grad_out : array (..., H, L, Dv) of query's dtype
    query, key, value : arrays
        As they were given to `linear_attention`, like all options. It had no `state`.
    out, normalizer : arrays (..., H, L, Dv) and (..., H, L)
        What ``linear_attention(..., return_normalizer=True)`` returned.

    Returns
    -------
    LinearGradients
        Of query, key and value, of the shapes and dtypes of the arguments, summed over axes that were broadcast. Rows
        whose denominator is 0 bring nothing.

    Raises
    ------
    TypeError, ValueError, MemoryError
        As `linear_attention`; TypeError and ValueError for grad_out, out or normalizer of another dtype or shape.

    Notes
    -----
    Less than three times the operations of `linear_attention`. Nothing is stored that grows with L but the results,
    and the sums of each 2048 rows where a key head is shared by threads. Every sum has one order, whatever their
    number.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> query, key, value = np.zeros((1, 4)), np.zeros((2, 4)), np.array([[1.0], [3.0]])
    >>> out, normalizer = fa.linear_attention(query, key, value, return_normalizer=True)
    >>> fa.linear_attention_backward(np.ones((1, 1)), query, key, value, out, normalizer).value
    array([[0.5],
           [0.5]])
    """
    query, key, value = (checks._array(name, x) for name, x in (("query", query), ("key", key), ("value", value)))
    p = checks.problem(query, key, value, kv_lengths=kv_lengths, num_threads=num_threads, results=False)
    call = _call(p, causal, feature_map, num_features, seed, projection)
    shape, dtype = p.returned, checks.compute_dtype(query.dtype)

    def given(name, array, shape, dtype):
        array = checks._array(name, array)
        if array.dtype != dtype:
            raise TypeError(f"{name} must be {dtype}, got {array.dtype}")
        if array.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
        checks._check_layout(name, array)
        return array[None] if len(p.returned) == 2 else array

    def result(array, full, zeros):
        # a sum over broadcast axes is rounded once
        to = array.dtype if array.size == full.size else dtype
        return np.zeros(full.shape, to) if zeros else checks.aligned_empty(full.shape, to)

    call.grad_out = given("grad_out", grad_out, shape, query.dtype)
    call.out = given("out", out, shape, query.dtype)
    call.normalizer = given("normalizer", normalizer, shape[:-1], dtype)
    call.grad_query = result(query, p.query, False)
    call.grad_key, call.grad_value = (result(x, full, call.kv_lengths is not None)      # no lane goes to padding
                                      for x, full in ((key, p.key), (value, p.value)))
    for call.mode in (QUERY, KEY):
        kernel.get()(call)
    return LinearGradients(*(gradient._reduced(x, given.shape).astype(given.dtype, copy=False) for x, given in (
        (call.grad_query, query), (call.grad_key, key), (call.grad_value, value))))
