"""Every check of the arguments, and the one description of a problem that kernels and reference work from.

`problem` either raises the one error that names the argument, its rule and what came instead, or returns a `Problem`
whose arrays all have their full shape. What is behind it assumes valid input.
"""

import math
import numbers
import sys

import numpy as np

FLOAT32 = np.dtype(np.float32)
FLOAT64 = np.dtype(np.float64)
BOOL = np.dtype(np.bool_)
LIMITS = {dtype: (float(np.finfo(dtype).tiny), float(np.finfo(dtype).max)) for dtype in (FLOAT32, FLOAT64)}

UNBOUNDED = 2**61  # a window bound no position reaches; position - UNBOUNDED still fits in 64 bits
OFFSET_LIMIT = 2**60
MAX_LEADING_AXES = 8
NORMALIZERS_TO_COME = ("softmax1", "sigmoid", "relu", "sparsemax", "entmax15")
OVERLAP_WORK = 10_000  # steps that deciding an overlap exactly may take; about a millisecond


class Problem:
    """One checked call. B = prod(lead); arrays share the memory of the arguments, broadcast axes have stride 0.

    query (*lead, H, L, D), key (*lead, Hkv, S, D), value (*lead, Hkv, S, Dv)
    mask            None or bool (*lead, H, L, S)
    bias            None or query's dtype (*lead, H, L, S)
    sinks           None or contiguous (H,), query's dtype
    left, right     query i, at position p = i + query_offset[b], sees p - left <= j <= p + right; UNBOUNDED = no limit
    query_offset    None without causal and window, else contiguous int64 (B,)
    query_lengths   None or contiguous int64 (B,), in [0, L]
    kv_lengths      None or contiguous int64 (B,), in [0, S]
    scale, softcap  floats; softcap 0.0 = none
    out             (*lead, H, L, Dv), to be filled
    lse             None or (*lead, H, L), to be filled
    num_threads     None or int >= 1
    shape           of the result as the caller sees it: without the head axis that 2-D arguments lack
    returned        the array that `result` returns: the caller's own out=, or `out` in the caller's shape
    """

    __slots__ = ("query", "key", "value", "mask", "bias", "sinks", "left", "right", "query_offset", "query_lengths",
                 "kv_lengths", "scale", "softcap", "out", "lse", "num_threads", "shape", "returned")

    def result(self):
        """What the caller gets: out, or (out, lse)."""
        if self.lse is None:
            return self.returned
        return self.returned, self.lse.reshape(self.shape[:-1])


def problem(query, key, value, *, mask=None, bias=None, causal=False, window=None, query_offset=None,
            query_lengths=None, kv_lengths=None, scale=None, softcap=None, sinks=None, normalizer="softmax",
            dropout_p=0.0, seed=None, out=None, return_lse=False, deterministic=None, num_threads=None):
    """Check the arguments of `attention`, which documents them, and return the `Problem` they describe."""
    p = Problem()

    # --- query, key, value: kind, dtype, layout ---
    query, key, value = _array("query", query), _array("key", key), _array("value", value)
    dtype = query.dtype
    if dtype != FLOAT32 and dtype != FLOAT64:
        _refuse_dtype("query", "be float32 or float64 in native byte order", dtype)
    if key.dtype != dtype:
        _refuse_dtype("key", f"have query's dtype {dtype}", key.dtype)
    if value.dtype != dtype:
        _refuse_dtype("value", f"have query's dtype {dtype}", value.dtype)
    _check_layout("query", query)
    _check_layout("key", key)
    _check_layout("value", value)

    # --- query, key, value: shapes ---
    rank = query.ndim
    if rank < 2 or rank > MAX_LEADING_AXES + 3:
        raise ValueError(f"query must have 2 to {MAX_LEADING_AXES + 3} axes (..., H, L, D), got shape {query.shape}")
    if key.ndim != rank:
        raise ValueError(f"key must have as many axes as query of shape {query.shape}, got shape {key.shape}")
    if value.ndim != rank:
        raise ValueError(f"value must have as many axes as query of shape {query.shape}, got shape {value.shape}")
    inputs = [("query", query), ("key", key), ("value", value)]
    if rank == 2:
        query, key, value = query[None], key[None], value[None]
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
    p.query, p.key, p.value = query, key, value

    # --- mask, bias, sinks ---
    p.mask = p.bias = p.sinks = None
    if mask is not None:
        mask = _array("mask", _dense("mask", mask))
        if mask.dtype != BOOL:
            raise TypeError(f"mask must be boolean (True = attend), got {mask.dtype}")
        p.mask = _broadcast("mask", mask, lead + (H, L, S))
        inputs.append(("mask", mask))
    if bias is not None:
        bias = _array("bias", _dense("bias", bias))
        if bias.dtype != dtype:
            raise TypeError(f"bias must have query's dtype {dtype}, got {bias.dtype}")
        _check_layout("bias", bias)
        p.bias = _broadcast("bias", bias, lead + (H, L, S))
        inputs.append(("bias", bias))
    if sinks is not None:
        sinks = _array("sinks", sinks)
        if sinks.dtype != dtype:
            raise TypeError(f"sinks must have query's dtype {dtype}, got {sinks.dtype}")
        if sinks.shape != (H,):
            raise ValueError(f"sinks must have shape ({H},), one for each head of query, got {sinks.shape}")
        _check_layout("sinks", sinks)
        p.sinks = np.ascontiguousarray(sinks)
        inputs.append(("sinks", sinks))

    # --- positions and lengths ---
    p.left, p.right = _window(window, _boolean("causal", causal))
    p.query_lengths = None if query_lengths is None else _integers("query_lengths", query_lengths, lead, 0, L)
    p.kv_lengths = None if kv_lengths is None else _integers("kv_lengths", kv_lengths, lead, 0, S)
    if query_offset is not None:
        query_offset = _integers("query_offset", query_offset, lead, 1 - OFFSET_LIMIT, OFFSET_LIMIT - 1)
    if p.left == UNBOUNDED and p.right == UNBOUNDED:
        p.query_offset = None
    elif query_offset is not None:
        p.query_offset = query_offset
    elif p.kv_lengths is not None:
        p.query_offset = p.kv_lengths - L
    else:
        p.query_offset = np.full(math.prod(lead), S - L, np.int64)

    # --- numbers ---
    if scale is None:
        p.scale = 1.0 / math.sqrt(D) if D else 1.0
    else:
        p.scale = _real("scale", scale)
        if not abs(p.scale) <= LIMITS[dtype][1]:
            raise ValueError(f"scale must be finite in {dtype}, got {scale}")
    if softcap is None:
        p.softcap = 0.0
    else:
        p.softcap = _real("softcap", softcap)
        smallest, largest = LIMITS[dtype]
        if not smallest <= p.softcap <= largest:  # a denormal cap has no finite reciprocal
            raise ValueError(f"softcap must be positive, normal and finite in {dtype}, got {softcap}")
    # A C int holds it; there are never more tasks than that.
    p.num_threads = None if num_threads is None else min(_integer("num_threads", num_threads, 1), 2**31 - 1)

    # --- options of later versions ---
    if type(normalizer) is not str or normalizer != "softmax":
        _check_normalizer(normalizer)
    if type(dropout_p) is not float or dropout_p != 0.0:
        _check_dropout(dropout_p)
    if seed is not None:
        _integer("seed", seed, 0)
    if deterministic is not None:
        _check_deterministic(deterministic)

    # --- results ---
    shape = lead + (H, L, Dv)
    p.shape = shape if rank > 2 else shape[1:]
    return_lse = _boolean("return_lse", return_lse)
    if out is None:
        p.out = aligned_empty(shape, dtype)
        p.returned = p.out if rank > 2 else p.out[0]
    else:
        plain = _check_out(out, p.shape, dtype, inputs)
        p.out = plain if rank > 2 else plain[None]
        p.returned = out
    p.lse = aligned_empty(shape[:-1], dtype) if return_lse else None
    return p


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


def _refuse_dtype(name, rule, dtype):
    if dtype.name in ("float16", "bfloat16"):
        raise NotImplementedError(f"{name} of dtype {dtype.name} is not implemented yet")
    raise TypeError(f"{name} must {rule}, got {dtype}")


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


def _dense(name, value):
    """Refuse what stands for a mask or a bias without being an array."""
    if type(value) is np.ndarray:
        return value
    sparse = sys.modules.get("scipy.sparse")
    if sparse is not None and sparse.issparse(value):
        raise NotImplementedError(f"{name} as a sparse array is not implemented yet")
    if hasattr(value, "to_dense") and not hasattr(value, "__array__"):
        raise NotImplementedError(f"{name} as an expression ({type(value).__name__}) is not implemented yet")
    return value


def _broadcast(name, array, shape):
    if array.shape == shape:
        return array
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise ValueError(f"{name} must broadcast to (..., H, L, S) = {shape}, got shape {array.shape}") from None


def _check_out(out, shape, dtype, inputs):
    """`out` as a plain ndarray."""
    if not isinstance(out, np.ndarray):
        raise TypeError(f"out must be a NumPy array, got {type(out).__name__}")
    out = _array("out", out)
    if out.dtype != dtype:
        raise ValueError(f"out must have query's dtype {dtype}, got {out.dtype}")
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


def _window(window, causal):
    """(left, right): the keys a query sees on each side of its position, causal included."""
    if window is None:
        return UNBOUNDED, 0 if causal else UNBOUNDED
    pair = window if isinstance(window, (tuple, list)) else (window, window)
    if len(pair) != 2:
        raise ValueError(f"window must be an integer or a pair (left, right), got {len(pair)} values")
    left, right = (UNBOUNDED if n is None else min(_integer("window", n, 0), UNBOUNDED) for n in pair)
    return left, 0 if causal else right


# --- options of later versions ---

def _check_normalizer(normalizer):
    if not isinstance(normalizer, str):
        raise TypeError(f"normalizer must be a string, got {type(normalizer).__name__}")
    if normalizer in NORMALIZERS_TO_COME:
        raise NotImplementedError(f"normalizer={normalizer!r} is not implemented yet")
    if normalizer != "softmax":
        raise ValueError(f"normalizer must be one of {('softmax', *NORMALIZERS_TO_COME)}, got {normalizer!r}")


def _check_dropout(dropout_p):
    number = _real("dropout_p", dropout_p)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if number > 0.0:
        raise NotImplementedError(f"dropout_p={dropout_p} is not implemented yet")


def _check_deterministic(deterministic):
    if isinstance(deterministic, str):
        if deterministic != "row":
            raise ValueError(f"deterministic must be None, a bool or 'row', got {deterministic!r}")
        raise NotImplementedError("deterministic='row' is not implemented yet")
    if not isinstance(deterministic, (bool, np.bool_)):
        raise TypeError(f"deterministic must be None, a bool or 'row', got {type(deterministic).__name__}")
