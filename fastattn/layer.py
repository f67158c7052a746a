"""Linear layers: a weight that is packed once, and its product with rows."""

from contextvars import ContextVar

import numpy as np

from . import _runtime, checks

# Whether calls are made in NumPy, with weights as they come: where no kernel was built, and for the reference.
in_numpy = ContextVar("in_numpy", default=_runtime.layer is None)

ACTIVATIONS = {None: 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}  # as in fastattn.h


def round_to_bfloat16(array):
    """The bits of float32 numbers rounded to bfloat16, ties to even, as uint16.

    >>> [hex(x) for x in round_to_bfloat16(np.array([1.0, 1.00390625, np.inf, np.nan], np.float32))]
    ['0x3f80', '0x3f80', '0x7f80', '0x7fc0']
    """
    bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(array), (bits >> 16) | 0x40, rounded).astype(np.uint16)


class PackedWeight:
    """A weight (N, K) in the order in which `linear` reads it; made by `pack_weight`.

    Its layout is that of the instruction set in use; pickles hold the weight as it was.

    Attributes
    ----------
    shape : (N, K)
    dtype : str
        "float32", "float64" or "bfloat16".
    """

    def __init__(self, shape, dtype, panels, bits):
        self.shape, self.dtype, self._panels, self._bits = shape, dtype, panels, bits

    def unpack(self):
        """The weight (N, K): float64 for float64, else float32."""
        N, K = self.shape
        if self._bits == 0:  # the reference's: not packed
            return self._panels.copy()
        panels = self._panels
        if self._bits == 16:  # [.][K/2][lanes][2]
            n, lanes = len(panels), panels.shape[-1]
            panels = panels.reshape(n, K // 2, lanes, 2).swapaxes(2, 3).reshape(n, K, lanes)
        rows = panels.swapaxes(1, 2).reshape(panels.shape[0] * panels.shape[2], K)[:N]
        if self.dtype == "bfloat16":
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.copy()

    def __reduce__(self):
        return pack_weight, (self.unpack(), self.dtype)

    def __repr__(self):
        return f"PackedWeight(shape={self.shape}, dtype={self.dtype!r})"


def pack_weight(weight, dtype=None):
    """Pack the weight of a linear layer, once for many calls of `linear`.

    Parameters
    ----------
    weight : array (N, K), float32, float64, float16 or bfloat16
        As in torch: N outputs, K inputs.
    dtype : str, optional
        How it is kept: "float32" or "float64", by default as it comes (16 bits as float32), or "bfloat16": half the
        memory, and where the CPU multiplies pairs of bfloat16 twice the speed, with inputs rounded to bfloat16 too.

    Returns
    -------
    PackedWeight
        A copy: later changes of `weight` do not show.

    Raises
    ------
    TypeError
        A weight that is no array of these dtypes.
    ValueError
        Another number of axes; an unknown dtype; float64 weights as another dtype, or others as float64.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> w = fa.pack_weight(np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]))
    >>> fa.linear(np.array([[1.0, 1.0]]), w, bias=np.array([0.0, 0.0, -20.0]), activation="relu")
    array([[3., 7., 0.]])
    """
    weight = checks._array("weight", weight)
    given = weight.dtype
    if given not in (checks.FLOAT32, checks.FLOAT64) and not checks.is_half(given):
        raise TypeError(f"weight must be float32, float64, float16 or bfloat16 in native byte order, got {given}")
    if weight.ndim != 2:
        raise ValueError(f"weight must have shape (N, K), got {weight.shape}")
    inside = checks.compute_dtype(given)
    dtype = inside.name if dtype is None else dtype
    kinds = ("float64",) if inside == checks.FLOAT64 else ("float32", "bfloat16")
    if dtype not in kinds:
        raise ValueError(f"dtype must be one of {kinds} for a weight of {given}, got {dtype!r}")
    N, K = weight.shape
    weight = np.require(weight, inside, "CA")
    half = dtype == "bfloat16"
    if in_numpy.get():
        if half:
            weight = (round_to_bfloat16(weight).astype(np.uint32) << 16).view(np.float32)
        return PackedWeight((N, K), dtype, weight.copy(), 0)
    bits = 64 if inside == checks.FLOAT64 else 16 if half and K and K % 2 == 0 and _runtime.has_pairs else 32
    lanes = _runtime.lanes(bits)
    panels = checks.aligned_empty((-(-N // lanes), K, lanes), np.uint16 if half else inside)
    if panels.size:
        _runtime.pack(round_to_bfloat16(weight) if bits == 16 else weight, panels, bits)
    return PackedWeight((N, K), dtype, panels, bits)


def linear(x, weight, bias=None, activation=None, *, out=None, num_threads=None):
    """activation(x weight^T + bias), a linear layer.

    Parameters
    ----------
    x : array (..., K), float32, float64, float16 or bfloat16
    weight : PackedWeight (N, K), or an array that is packed for this call
        float64 with float64 x, else float32 or bfloat16.
    bias : array (N,), optional
        Float32, or float64 with float64 x.
    activation : None, "relu", "gelu", "gelu_tanh" or "silu"
        gelu is x times the normal distribution function; gelu_tanh approximates it; silu is x / (1 + exp(-x)).
    out : ndarray (..., N) of x's dtype, optional
        Filled and returned. It must not overlap an input.
    num_threads : int, optional

    Returns
    -------
    ndarray (..., N), x's dtype

    Raises
    ------
    TypeError, ValueError, MemoryError
        Arguments of another kind, dtype or shape.

    Notes
    -----
    2 M N K floating-point operations for M rows. Sums are in float64 for float64, else in float32, of at
    most 512 products from zero; a row's bits depend on nothing else in the call.

    Examples
    --------
    >>> import numpy as np
    >>> import fastattn as fa
    >>> fa.linear(np.ones((2, 3)), np.eye(2, 3))
    array([[1., 1.],
           [1., 1.]])
    """
    if (out is None and num_threads is None and type(weight) is PackedWeight and weight._bits and not in_numpy.get()
            and (activation is None or type(activation) is str) and activation in ACTIVATIONS):
        y = _runtime.plain_layer(x, weight._panels, *weight.shape, bias, ACTIVATIONS[activation], weight._bits)
        if y is not None:
            return y
    x = checks._array("x", x)
    if x.dtype not in (checks.FLOAT32, checks.FLOAT64) and not checks.is_half(x.dtype):
        raise TypeError(f"x must be float32, float64, float16 or bfloat16 in native byte order, got {x.dtype}")
    if not isinstance(weight, PackedWeight):
        weight = pack_weight(weight)
    inside = checks.compute_dtype(x.dtype)
    if (weight.dtype == "float64") != (inside == checks.FLOAT64):
        raise TypeError(f"weight must be {'float64' if inside == checks.FLOAT64 else 'float32 or bfloat16'} with x of "
                        f"{x.dtype}, got {weight.dtype}")
    N, K = weight.shape
    if x.ndim == 0 or x.shape[-1] != K:
        raise ValueError(f"x must have shape (..., {K}), as weight has {K} inputs, got {x.shape}")
    checks._check_layout("x", x)
    inputs = [("x", x)]
    if bias is not None:
        bias = checks._array("bias", bias)
        if bias.dtype != inside:
            raise TypeError(f"bias must be {inside}, got {bias.dtype}")
        if bias.shape != (N,):
            raise ValueError(f"bias must have shape ({N},), got {bias.shape}")
        inputs.append(("bias", bias))
        bias = np.require(bias, requirements="CA")
    if not (activation is None or isinstance(activation, str)) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {tuple(ACTIVATIONS)}, got {activation!r}")
    threads = 0 if num_threads is None else min(checks._integer("num_threads", num_threads, 1), 2**31 - 1)
    shape = (*x.shape[:-1], N)
    if out is None:
        result = checks.aligned_empty(shape, x.dtype)
    else:
        result = checks._check_out(out, shape, x.dtype, inputs, "x")
    if result.size == 0:
        return result if out is None else out
    rows = x.reshape(result.size // N, K)
    flat = result.reshape(-1, N)
    if np.may_share_memory(flat, result):
        _run(rows, weight, bias, activation, flat, threads)
    else:  # an out whose rows don't follow each other evenly
        flat = checks.aligned_empty(flat.shape, x.dtype)
        _run(rows, weight, bias, activation, flat, threads)
        result[...] = flat.reshape(shape)
    return result if out is None else out


def _run(rows, weight, bias, activation, out, threads):
    if weight._bits == 0 or in_numpy.get():
        from . import reference
        reference.run_layer(rows, weight, bias, activation, out)
    else:
        _runtime.layer(rows, weight._panels, bias, ACTIVATIONS[activation], out, weight._bits, threads)


def normalise(x, weight, bias, eps, centre, add=None):
    """Rows of x + add, of mean 0 and variance 1, times weight, plus bias: what LayerNorm and RMSNorm compute.

    Parameters
    ----------
    x : array (..., N), float32, float64, float16 or bfloat16
    weight, bias : arrays (N,) or None
    eps : float
        Added to the variance.
    centre : bool
        Whether the mean is subtracted; if not, the mean square becomes 1.
    add : array of x's shape and dtype, optional

    Returns
    -------
    out : ndarray (..., N), x's dtype
    total : ndarray (..., N), x's dtype
        x + add; x itself without add.
    """
    inside, N = checks.compute_dtype(x.dtype), x.shape[-1]
    weight, bias = (None if w is None else np.require(w, inside, "CA") for w in (weight, bias))
    out, total = checks.aligned_empty(x.shape, x.dtype), x if add is None else checks.aligned_empty(x.shape, x.dtype)
    if out.size:
        rows, added, totals, flat = (None if a is None else a.reshape(-1, N)
                                     for a in (x, add, None if add is None else total, out))
        if in_numpy.get():
            from . import reference
            reference.run_norm(rows, added, totals, weight, bias, eps, centre, flat)
        else:
            _runtime.norm(rows, added, totals, weight, bias, eps, centre, flat, 0)
    return out, total
