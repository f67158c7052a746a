"""The same values in other memory, and the comparison of bits."""

import numpy as np

import fastattn as fa


def _stepped(array):
    spread = np.zeros((*array.shape[:-2], 2 * array.shape[-2], 2 * array.shape[-1]), array.dtype)
    spread[..., ::2, ::2] = array
    return spread[..., ::2, ::2]


def _padded_rows(array):
    wide = np.zeros((*array.shape[:-1], array.shape[-1] + 3), array.dtype)
    wide[..., :-3] = array
    return wide[..., :-3]


def _off_by_one(array):
    """One element past a 64-byte boundary."""
    memory = np.zeros(array.nbytes + 64 + array.itemsize, np.uint8)
    begin = -memory.ctypes.data % 64 + array.itemsize
    shifted = memory[begin : begin + array.nbytes].view(array.dtype).reshape(array.shape)
    shifted[...] = array
    return shifted


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


# Each takes an array (..., rows, columns) and returns an equal one that shares no memory with it.
LAYOUTS = {
    "contiguous": lambda array: array.copy(),
    "columns first": lambda array: array.swapaxes(-1, -2).copy().swapaxes(-1, -2),
    "rows first": lambda array: np.moveaxis(np.moveaxis(array, -2, 0).copy(), 0, -2),  # (L, ..., D), from a projection
    "Fortran": lambda array: array.copy(order="F"),
    "reversed rows": lambda array: array[..., ::-1, :].copy()[..., ::-1, :],
    "reversed columns": lambda array: array[..., ::-1].copy()[..., ::-1],
    "reversed all": lambda array: np.flip(np.flip(array).copy()),
    "step 2": _stepped,
    "padded rows": _padded_rows,
    "off by one": _off_by_one,
    "read-only": _read_only,
}

# Each takes an array (..., rows, columns) and repeats a part of it by a stride of 0: other values, the same shape.
BROADCASTS = {
    "one row": lambda array: np.broadcast_to(array[..., :1, :], array.shape),
    "one column": lambda array: np.broadcast_to(array[..., :1], array.shape),
    "one element": lambda array: np.broadcast_to(array[..., :1, :1], array.shape),
    "one matrix": lambda array: np.broadcast_to(array[(0,) * (array.ndim - 2)], array.shape),
}


def assert_same_bits(actual, expected, context):
    """Fail, with the ISA, `context` (a mapping) and the first place, unless all bits agree: -0 is not 0."""
    where = ", ".join(f"{name}={value}" for name, value in {"isa": fa.isa(), **context}.items())
    assert actual.shape == expected.shape, f"{where}: shape {actual.shape}, expected {expected.shape}"
    assert actual.dtype == expected.dtype, f"{where}: dtype {actual.dtype}, expected {expected.dtype}"
    integer = np.dtype(f"u{actual.itemsize}")
    differ = np.ascontiguousarray(actual).view(integer) != np.ascontiguousarray(expected).view(integer)
    if differ.any():
        first = tuple(int(i[0]) for i in np.nonzero(differ))
        raise AssertionError(f"{where}: bits of {int(differ.sum())} of {differ.size} elements differ; first at "
                             f"{first}: {actual[first]!r}, expected {expected[first]!r}")
