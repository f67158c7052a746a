"""A user's own change of the scores: a compiled function that is handed a tile of them."""

import ctypes
import re
from typing import NamedTuple

import numpy as np

_INTEGERS = "(?:long|int64_t|long long|npy_int64|int64|ptrdiff_t|intptr_t|npy_intp|Py_ssize_t|ssize_t)"


class Prepared(NamedTuple):
    """Addresses of the functions and of their data, 0 where there is none, and what must outlive the call."""

    function: int
    gradient: int
    data: int
    kept: object


class ScoreMod:
    """A change of the scores by a compiled function, for ``attention(..., score_mod=...)``.

    The function gets scaled scores, scale * q . k, a tile at a time, and writes what takes their place, before softcap,
    bias and masks. In C, with ``real`` float, or double for float64 queries::

        void function(real *scores, int64_t batch, int64_t head, int64_t query, int64_t key,
                      int64_t n_queries, int64_t n_keys, int64_t stride, void *data);
        void gradient(real *grads, const real *scores, int64_t batch, ... as above);

    ``scores[j * stride + i]`` is that of query ``query + i`` and key ``key + j``, for ``i < n_queries <= stride`` and
    ``j < n_keys``. What lies between rows must be left alone. ``gradient`` gets the gradients of what the function
    returned, and must multiply them by its derivative at ``scores``, which are those that the function got.

    Parameters
    ----------
    function : scipy.LowLevelCallable, numba.cfunc or ctypes function
    gradient : the same, optional
        For `attention_backward`.
    data : ndarray or int, optional
        ``void *data``: the address of an array, or an address. Default: the user_data of a LowLevelCallable, or NULL.

    Raises
    ------
    TypeError
        Something that is no such function, or one with another signature than float32 or float64 queries need.

    Notes
    -----
    It is called once for each tile of up to 96 keys and 64 queries, from several threads at once and without the GIL,
    and also for positions that a mask hides. A pass over a tile costs about what its loop costs in cache; the scores
    are then no longer weighed while the next ones are multiplied, which costs about a tenth at D = 64. A ctypes
    function that is written in Python works too and takes the GIL for each tile: a thousand times slower.

    Examples
    --------
    A score that decays with the distance of key and query, here in Python:

    >>> import ctypes
    >>> import numpy as np
    >>> import fastattn as fa
    >>> int64, real = ctypes.c_int64, ctypes.POINTER(ctypes.c_double)
    >>> @ctypes.CFUNCTYPE(None, real, *[int64] * 7, ctypes.c_void_p)
    ... def decay(scores, batch, head, query, key, n_queries, n_keys, stride, data):
    ...     for i in range(n_queries):
    ...         for j in range(n_keys):
    ...             scores[j * stride + i] -= abs(query + i - key - j)
    >>> zero, value = np.zeros((3, 1)), np.array([[1.0], [0.0], [0.0]])
    >>> fa.attention(zero, zero, value, score_mod=decay).round(3)
    array([[0.665],
           [0.212],
           [0.09 ]])
    """

    def __init__(self, function, gradient=None, data=None):
        self._functions = [_Function("score_mod", function),
                           None if gradient is None else _Function("gradient", gradient)]
        if data is not None and not isinstance(data, (np.ndarray, int)):
            raise TypeError(f"data must be an array or an address, got {type(data).__name__}")
        self._data = data

    def prepare(self, dtype):
        """The `Prepared` for scores of this dtype; TypeError if the functions take others."""
        function, gradient = self._functions
        function.check(dtype, 1)
        if gradient is not None:
            gradient.check(dtype, 2)
        data = self._data
        address = function.data if data is None else data.ctypes.data if isinstance(data, np.ndarray) else data
        return Prepared(function.address, 0 if gradient is None else gradient.address, address, self)


def prepare(score_mod, dtype):
    """The `Prepared` of what was given as score_mod."""
    return (score_mod if isinstance(score_mod, ScoreMod) else ScoreMod(score_mod)).prepare(dtype)


class _Function:
    """Address, data and signature of a function; keeps it alive."""

    def __init__(self, name, function):
        self.name, self.kept, self.data = name, function, 0
        if isinstance(getattr(function, "ctypes", None), ctypes._CFuncPtr):  # numba.cfunc
            function = function.ctypes
        if isinstance(function, ctypes._CFuncPtr):
            self.address = ctypes.cast(function, ctypes.c_void_p).value or 0
            result, arguments = function.restype, function.argtypes
            self.signature = None
            if arguments is not None:
                self.signature = f"{_name(result)} ({', '.join(map(_name, arguments))})"
        elif type(function).__name__ == "LowLevelCallable" and isinstance(function, tuple):
            self.address, self.signature, self.data = _of_capsule(tuple.__getitem__(function, 0))  # it refuses indexing
        else:
            raise TypeError(f"{name} must be a scipy.LowLevelCallable, a numba.cfunc, a ctypes function or a ScoreMod, "
                            f"got {type(function).__name__}")

    def check(self, dtype, arrays):
        """TypeError unless the function takes so many arrays of the dtype, and what follows them."""
        real = "float" if dtype == np.float32 else "double"
        wanted = f"void ({', '.join([real + ' *'] * arrays + ['int64_t'] * 7 + ['void *'])})"
        got = self.signature
        pattern = re.escape(wanted).replace("int64_t", _INTEGERS).replace(r"\ \*", r" ?\*")
        if got is None or not re.fullmatch(pattern, got.replace("const ", "")):
            raise TypeError(f"{self.name} must have the signature '{wanted}' with {dtype} queries, got "
                            f"{'a ctypes function without argtypes' if got is None else repr(got)}")


def _name(kind):
    """The C name of a ctypes type."""
    if kind is None:
        return "void"
    if kind is ctypes.c_void_p:
        return "void *"
    if isinstance(kind, type) and issubclass(kind, ctypes._Pointer):
        return _name(kind._type_) + " *"
    if kind in (ctypes.c_int64, ctypes.c_longlong, ctypes.c_ssize_t):
        return "int64_t"
    return {ctypes.c_float: "float", ctypes.c_double: "double"}.get(kind, getattr(kind, "__name__", str(kind)))


def _of_capsule(capsule):
    """(address, signature, user data) that a LowLevelCallable's capsule holds."""
    api = ctypes.pythonapi
    get_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    get_context = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object)(("PyCapsule_GetContext", api))
    name = get_name(capsule)
    return get_pointer(capsule, name), name.decode(), get_context(capsule) or 0


def apply(prepared, scores, batch, head, rows, gradient=None):
    """The reference's use of it: scores (L, S), of the rows given, changed; or the gradients, which it multiplies."""
    dtype = np.float64 if prepared.kept._functions[0].signature.startswith("void (double") else np.float32
    tile = np.array(scores.T, dtype, order="C")  # a copy: the caller's are left alone
    result = tile if gradient is None else np.array(gradient.T, dtype, order="C")
    n_keys, stride = tile.shape
    real, kinds = ctypes.c_void_p, [ctypes.c_int64] * 7 + [ctypes.c_void_p]
    function = ctypes.CFUNCTYPE(None, *[real] * (1 if gradient is None else 2), *kinds)(
        prepared.function if gradient is None else prepared.gradient)
    size = result.itemsize
    for i, row in enumerate(rows):
        arrays = [result.ctypes.data + i * size] + ([] if gradient is None else [tile.ctypes.data + i * size])
        function(*arrays, batch, head, int(row), 0, 1, n_keys, stride, prepared.data)
    return result.T.astype(scores.dtype)
