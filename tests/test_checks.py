"""Every bad argument gets its one error before any work; every good form of an argument gets in without a copy."""

import array
import math
import re
import threading

import numpy as np
import pytest
from cases import assert_close, bound, exact

import fastattn as fa
from fastattn import checks, masks

F16, F32, F64 = np.float16, np.float32, np.float64
B, H, Hkv, L, S, D, Dv = 2, 4, 2, 5, 7, 8, 6


def good():
    """The arguments that each case below spoils one of."""
    rng = np.random.default_rng(0)
    return {
        "query": rng.standard_normal((B, H, L, D)).astype(F32),
        "key": rng.standard_normal((B, Hkv, S, D)).astype(F32),
        "value": rng.standard_normal((B, Hkv, S, Dv)).astype(F32),
        "out": np.full((B, H, L, Dv), np.nan, F32),
    }


def zeros(*shape, dtype=F32):
    return np.zeros(shape, dtype)


def strided(array, strides):
    return np.lib.stride_tricks.as_strided(array, strides=strides)


def misaligned(shape):
    """float32 one byte off its alignment."""
    return np.zeros(4 * math.prod(shape) + 1, np.uint8)[1:].view(F32).reshape(shape)


def torn(shape, dtype=F32):
    """A field of packed records of one byte more: strides that are no multiple of its size."""
    return np.zeros(shape, np.dtype([("flag", np.uint8), ("x", dtype)]))["x"]


class Expression:
    def to_dense(self, L, S):
        raise AssertionError("not to be called")


class Dlpack:
    """An array of another library."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


class Convertible:
    """An array of yet another."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


class Unreadable:
    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("it is on another device")


def masked(array):
    return np.ma.masked_array(array, mask=False)


def ml_dtypes():
    return pytest.importorskip("ml_dtypes")


def bfloat16(*shape):
    return np.zeros(shape, ml_dtypes().bfloat16)


def half(a):
    """The arrays of a call in float16."""
    return {name: array.astype(F16) for name, array in a.items()}


def sparse(*shape):
    return pytest.importorskip("scipy.sparse").csr_array(shape, dtype=np.bool_)


def shared_with(name):
    """Make the last 16 bytes of out the first 16 of another argument."""
    def spoil(a):
        a |= {"mask": zeros(L, S, dtype=np.bool_), "bias": zeros(L, S), "sinks": zeros(H)}
        memory = np.zeros(a["out"].nbytes - 16 + a[name].nbytes, np.uint8)
        a[name] = memory[a["out"].nbytes - 16:].view(a[name].dtype).reshape(a[name].shape)
        a["out"] = memory[:a["out"].nbytes].view(F32).reshape(a["out"].shape)
    return spoil


T, V = TypeError, ValueError

# name of the case, what is wrong (options, or a function that spoils them), error, its whole message
BAD = [
    # kinds and dtypes of the arrays
    ("none", {"query": None}, T, "query must be an array, got NoneType"),
    ("object", {"key": object()}, T, "key must be an array, got object"),
    ("dict", {"value": {}}, T, "value must be an array, got dict"),
    ("string", {"query": "abc"}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got <U3"),
    ("ragged", {"query": [[1.0], [1.0, 2.0]]}, T, r"query must be an array that NumPy can read, got list \(.*\)"),
    ("unreadable", {"key": Unreadable()}, T,
     r"key must be an array that NumPy can read, got Unreadable \(it is on another device\)"),
    ("object array", {"query": zeros(B, H, L, D, dtype=object)}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got object"),
    ("int", {"query": zeros(B, H, L, D, dtype=np.int32)}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got int32"),
    ("bool", {"query": zeros(B, H, L, D, dtype=np.bool_)}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got bool"),
    ("complex", {"query": zeros(B, H, L, D, dtype=np.complex64)}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got complex64"),
    ("swapped", {"query": zeros(B, H, L, D).astype(np.dtype(F32).newbyteorder("S"))}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got [<>]f4"),
    ("int key", {"key": zeros(B, Hkv, S, D, dtype=np.int64)}, T,
     "key must have query's dtype float32, float16 or bfloat16, got int64"),
    ("mixed key", {"key": zeros(B, Hkv, S, D, dtype=F64)}, T,
     "key must have query's dtype float32, float16 or bfloat16, got float64"),
    ("mixed value", {"value": zeros(B, Hkv, S, Dv, dtype=F64)}, T,
     "value must have key's dtype float32, got float64"),
    ("swapped value", {"value": zeros(B, Hkv, S, Dv).astype(np.dtype(F32).newbyteorder("S"))}, T,
     "value must have key's dtype float32, got [<>]f4"),
    ("masked query", {"query": masked(zeros(B, H, L, D))}, T,
     "query must be an array without a mask of its own, got a masked array"),
    ("masked value", {"value": masked(zeros(B, Hkv, S, Dv))}, T,
     "value must be an array without a mask of its own, got a masked array"),
    ("float16 query", {"query": zeros(B, H, L, D, dtype=F16)}, T, "key must have query's dtype float16, got float32"),
    ("float16 key", {"key": zeros(B, Hkv, S, D, dtype=F16)}, T, "value must have key's dtype float16, got float32"),
    ("float16 value", {"value": zeros(B, Hkv, S, Dv, dtype=F16)}, T,
     "value must have key's dtype float32, got float16"),
    ("bfloat16 query", lambda a: a.update(query=bfloat16(B, H, L, D)), T,
     "key must have query's dtype bfloat16, got float32"),
    ("bfloat16 key", lambda a: a.update(key=bfloat16(B, Hkv, S, D)), T,
     "value must have key's dtype bfloat16, got float32"),
    ("bfloat16 value", lambda a: a.update(value=bfloat16(B, Hkv, S, Dv)), T,
     "value must have key's dtype float32, got bfloat16"),
    ("two 16-bit dtypes", lambda a: a.update(half(a), value=bfloat16(B, Hkv, S, Dv)), T,
     "value must have key's dtype float16, got bfloat16"),
    ("two others", lambda a: a.update(key=bfloat16(B, Hkv, S, D), value=zeros(B, Hkv, S, Dv, dtype=F16)), T,
     "value must have key's dtype bfloat16, got float16"),
    ("16-bit query and other key", lambda a: a.update(half(a), key=bfloat16(B, Hkv, S, D)), T,
     "key must have query's dtype float16, got bfloat16"),
    ("bfloat16 query and float16 key", lambda a: a.update(half(a), query=bfloat16(B, H, L, D)), T,
     "key must have query's dtype bfloat16, got float16"),
    ("float64 query", {"query": zeros(B, H, L, D, dtype=F64)}, T, "key must have query's dtype float64, got float32"),
    ("float64 query, float16 key", lambda a: a.update(half(a), query=zeros(B, H, L, D, dtype=F64)), T,
     "key must have query's dtype float64, got float16"),
    ("swapped float16", {"query": zeros(B, H, L, D).astype(np.dtype(F16).newbyteorder("S"))}, T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got [<>]f2"),
    ("swapped float16 key", {"key": zeros(B, Hkv, S, D).astype(np.dtype(F16).newbyteorder("S"))}, T,
     "key must have query's dtype float32, float16 or bfloat16, got [<>]f2"),
    ("float8", lambda a: a.update(query=zeros(B, H, L, D, dtype=ml_dtypes().float8_e4m3fn)), T,
     "query must be float32, float64, float16 or bfloat16 in native byte order, got float8_e4m3fn"),
    ("float8 key", lambda a: a.update(key=zeros(B, Hkv, S, D, dtype=ml_dtypes().float8_e5m2)), T,
     "key must have query's dtype float32, float16 or bfloat16, got float8_e5m2"),
    ("int16", {"key": zeros(B, Hkv, S, D, dtype=np.int16)}, T,
     "key must have query's dtype float32, float16 or bfloat16, got int16"),
    ("two-byte void", {"key": zeros(B, Hkv, S, D, dtype="V2")}, T,
     r"key must have query's dtype float32, float16 or bfloat16, got \|V2"),
    # layout
    ("torn float16", lambda a: a.update(half(a), key=torn((B, Hkv, S, D), F16)), V,
     r"key must have an address and strides that are multiples of its item size of 2 bytes, got address 0x\w+ and "
     r"strides \(336, 168, 24, 3\)"),
    ("misaligned", {"query": misaligned((B, H, L, D))}, V,
     r"query must have an address and strides that are multiples of its item size of 4 bytes, got address 0x\w+ and "
     r"strides \(640, 160, 32, 4\)"),
    ("torn", {"value": torn((B, Hkv, S, Dv))}, V,
     r"value must have an address and strides that are multiples of its item size of 4 bytes, got address 0x\w+ and "
     r"strides \(420, 210, 30, 5\)"),
    # shapes
    ("scalar", {"query": F32(1)}, V, r"query must have 2 to 11 axes \(..., H, L, D\), got shape \(\)"),
    ("one axis", {"query": zeros(8)}, V, r"query must have 2 to 11 axes \(..., H, L, D\), got shape \(8,\)"),
    ("12 axes", {"query": zeros(*[1] * 12)}, V, r"query must have 2 to 11 axes \(..., H, L, D\), got shape \(1, .*\)"),
    ("rank of key", {"key": zeros(Hkv, S, D)}, V,
     r"key must have as many axes as query of shape \(2, 4, 5, 8\), got shape \(2, 7, 8\)"),
    ("rank of value", {"value": zeros(1, B, Hkv, S, Dv)}, V,
     r"value must have as many axes as query of shape \(2, 4, 5, 8\), got shape \(1, 2, 2, 7, 6\)"),
    ("head size", {"key": zeros(B, Hkv, S, 9)}, V, "key must have query's head size 8, got 9"),
    ("length", {"value": zeros(B, Hkv, 3, Dv)}, V, "value must have key's length 7, got 3"),
    ("heads of value", {"value": zeros(B, 1, S, Dv)}, V, "value must have key's number of heads 2, got 1"),
    ("heads", {"query": zeros(B, 5, L, D)}, V, "query must have a multiple of key's 2 heads, got 5"),
    ("fewer heads", {"query": zeros(B, 1, L, D)}, V, "query must have a multiple of key's 2 heads, got 1"),
    ("no key heads", {"key": zeros(B, 0, S, D), "value": zeros(B, 0, S, Dv)}, V,
     "query must have a multiple of key's 0 heads, got 4"),
    ("batch of key", {"key": zeros(3, Hkv, S, D)}, V,
     r"key must have query's leading axes \(2,\) or 1 in their place, got \(3,\)"),
    ("batch of value", {"query": zeros(1, H, L, D), "value": zeros(3, Hkv, S, Dv)}, V,
     r"value must have the leading axes \(2,\) of query and key or 1 in their place, got \(3,\)"),
    ("batch of 0", {"value": zeros(0, Hkv, S, Dv)}, V,
     r"value must have the leading axes \(2,\) of query and key or 1 in their place, got \(0,\)"),
    # mask
    ("float mask", {"mask": zeros(L, S)}, T, r"mask must be boolean \(True = attend\), got float32"),
    ("int mask", {"mask": zeros(L, S, dtype=np.uint8)}, T, r"mask must be boolean \(True = attend\), got uint8"),
    ("named mask", {"mask": "causal"}, T, r"mask must be boolean \(True = attend\), got <U6"),
    ("object mask", {"mask": object()}, T, "mask must be an array, got object"),
    ("masked mask", {"mask": masked(zeros(L, S, dtype=bool))}, T,
     "mask must be an array without a mask of its own, got a masked array"),
    ("mask shape", {"mask": zeros(S, L, dtype=bool)}, V,
     r"mask must broadcast to \(..., H, L, S\) = \(2, 4, 5, 7\), got shape \(7, 5\)"),
    ("mask heads", {"mask": zeros(B, Hkv, L, S, dtype=bool)}, V,
     r"mask must broadcast to \(..., H, L, S\) = \(2, 4, 5, 7\), got shape \(2, 2, 5, 7\)"),
    ("mask axes", {"mask": zeros(1, 1, 1, L, S, dtype=bool)}, V,
     r"mask must broadcast to \(..., H, L, S\) = \(2, 4, 5, 7\), got shape \(1, 1, 1, 5, 7\)"),
    ("sparse mask", lambda a: a.update(mask=sparse(S, L)), V,
     r"mask must have shape \(5, 7\) as a sparse array, got \(7, 5\)"),
    ("plan", {"mask": masks.causal().compile(L, 8)}, V,
     "mask must be a plan for L = 5 and S = 7, got one for L = 5 and S = 8"),
    ("expression of lengths", {"mask": masks.lengths([7, 8])}, V,
     r"kv_lengths of lengths\(\[7, 8\]\) must lie in \[0, 7\], got 8"),
    ("expression of batches", {"mask": masks.lengths([7, 6, 5])}, V,
     r"mask must have leading axes that broadcast to \(..., H\) = \(2, 4\), got \(3, 1\)"),
    ("another's expression", {"mask": Expression()}, T, "mask must be an array, got Expression"),
    # bias
    ("bias dtype", {"bias": zeros(L, S, dtype=F64)}, T, "bias must have query's dtype float32, got float64"),
    ("bias float16", {"bias": zeros(L, S, dtype=np.float16)}, T, "bias must have query's dtype float32, got float16"),
    ("bias of other 16 bits", lambda a: a.update(half(a), bias=bfloat16(L, S)), T,
     "bias must have query's dtype float16 or float32, got bfloat16"),
    ("bias float64 with float16", lambda a: a.update(half(a), bias=zeros(L, S, dtype=F64)), T,
     "bias must have query's dtype float16 or float32, got float64"),
    ("bias with 16-bit keys", lambda a: a.update(half(a), query=a["query"], bias=zeros(L, S, dtype=F16)), T,
     "bias must have query's dtype float32, got float16"),
    ("bool bias", {"bias": zeros(L, S, dtype=bool)}, T, "bias must have query's dtype float32, got bool"),
    ("bias shape", {"bias": zeros(L, 6)}, V,
     r"bias must broadcast to \(..., H, L, S\) = \(2, 4, 5, 7\), got shape \(5, 6\)"),
    ("misaligned bias", {"bias": misaligned((L, S))}, V,
     r"bias must have an address and strides that are multiples of its item size of 4 bytes, got .*"),
    ("masked bias", {"bias": masked(zeros(L, S))}, T,
     "bias must be an array without a mask of its own, got a masked array"),
    ("bias object", {"bias": Expression()}, T, "bias must be an array, got Expression"),
    ("mask as bias", {"bias": masks.causal()}, T, "bias must be an array, got _Band"),
    ("sparse bias", lambda a: a.update(bias=sparse(L, S)), T, "bias must be an array, got csr_array"),
    # sinks
    ("sinks dtype", {"sinks": zeros(H, dtype=F64)}, T, "sinks must have query's dtype float32, got float64"),
    ("sinks float16", {"sinks": zeros(H, dtype=F16)}, T, "sinks must have query's dtype float32, got float16"),
    ("sinks of other 16 bits", lambda a: a.update(half(a), sinks=bfloat16(H)), T,
     "sinks must have query's dtype float16 or float32, got bfloat16"),
    ("sinks float64 with float16", lambda a: a.update(half(a), sinks=zeros(H, dtype=F64)), T,
     "sinks must have query's dtype float16 or float32, got float64"),
    ("sinks shape", {"sinks": zeros(Hkv)}, V, r"sinks must have shape \(4,\), one for each head of query, got \(2,\)"),
    ("sinks axes", {"sinks": zeros(1, H)}, V,
     r"sinks must have shape \(4,\), one for each head of query, got \(1, 4\)"),
    ("sinks scalar", {"sinks": F32(0)}, V, r"sinks must have shape \(4,\), one for each head of query, got \(\)"),
    ("misaligned sinks", {"sinks": misaligned((H,))}, V,
     r"sinks must have an address and strides that are multiples of its item size of 4 bytes, got .*"),
    # causal, window
    ("causal int", {"causal": 1}, T, "causal must be a bool, got int"),
    ("causal none", {"causal": None}, T, "causal must be a bool, got NoneType"),
    ("causal array", {"causal": np.array(True)}, T, "causal must be a bool, got ndarray"),
    ("window negative", {"window": -1}, V, "window must be at least 0, got -1"),
    ("window pair negative", {"window": (3, -2)}, V, "window must be at least 0, got -2"),
    ("window float", {"window": 2.0}, T, "window must be an integer, got float"),
    ("window bool", {"window": True}, T, "window must be an integer, got bool"),
    ("window NaN", {"window": (np.nan, 1)}, T, "window must be an integer, got float"),
    ("window string", {"window": "ab"}, T, "window must be an integer, got str"),
    ("window triple", {"window": (1, 2, 3)}, V, r"window must be an integer or a pair \(left, right\), got 3 values"),
    # query_offset
    ("offset float", {"query_offset": 1.0, "causal": True}, T, "query_offset must be integers, got float64"),
    ("offset bool", {"query_offset": True}, T, "query_offset must be integers, got bool"),
    ("offset huge", {"query_offset": 2**60}, V,
     rf"query_offset must lie in \[-{2**60 - 1}, {2**60 - 1}\], got {2**60}"),
    ("offset huger", {"query_offset": -(2**70)}, V,
     rf"query_offset must lie in \[-{2**60 - 1}, {2**60 - 1}\], got -{2**70}"),
    ("offset list", {"query_offset": [0, 2**70]}, V,
     rf"query_offset must lie in \[-{2**60 - 1}, {2**60 - 1}\], got {2**70} at index \(1,\)"),
    ("offset shape", {"query_offset": [1, 2, 3]}, V,
     r"query_offset must broadcast to the leading axes \(2,\), got shape \(3,\)"),
    # lengths
    ("lengths long", {"kv_lengths": [7, 8]}, V, r"kv_lengths must lie in \[0, 7\], got 8 at index \(1,\)"),
    ("lengths negative", {"kv_lengths": np.array([-1, 3])}, V,
     r"kv_lengths must lie in \[0, 7\], got -1 at index \(0,\)"),
    ("lengths scalar", {"kv_lengths": 8}, V, r"kv_lengths must lie in \[0, 7\], got 8"),
    ("lengths unsigned", {"kv_lengths": np.array([1, 2**64 - 1], np.uint64)}, V,
     rf"kv_lengths must lie in \[0, 7\], got {2**64 - 1} at index \(1,\)"),
    ("lengths float", {"kv_lengths": np.array([1.0, 2.0])}, T, "kv_lengths must be integers, got float64"),
    ("lengths NaN", {"kv_lengths": np.array([1.0, np.nan])}, T, "kv_lengths must be integers, got float64"),
    ("lengths bool", {"kv_lengths": np.array([True, False])}, T, "kv_lengths must be integers, got bool"),
    ("lengths objects", {"kv_lengths": np.array([1, None])}, T, "kv_lengths must be integers, got object"),
    ("lengths masked", {"kv_lengths": masked([1, 2])}, T,
     "kv_lengths must be an array without a mask of its own, got a masked array"),
    ("lengths shape", {"kv_lengths": np.ones((2, 1), int)}, V,
     r"kv_lengths must broadcast to the leading axes \(2,\), got shape \(2, 1\)"),
    ("lengths empty", {"kv_lengths": zeros(0, dtype=int)}, V,
     r"kv_lengths must broadcast to the leading axes \(2,\), got shape \(0,\)"),
    ("query lengths", {"query_lengths": [6, 0]}, V, r"query_lengths must lie in \[0, 5\], got 6 at index \(0,\)"),
    ("query lengths float", {"query_lengths": np.nan}, T, "query_lengths must be integers, got float64"),
    # numbers
    ("scale NaN", {"scale": np.nan}, V, "scale must be finite in float32, got nan"),
    ("scale inf", {"scale": -np.inf}, V, "scale must be finite in float32, got -inf"),
    ("scale past float32", {"scale": 1e39}, V, r"scale must be finite in float32, got 1e\+39"),
    ("scale huge", {"scale": 10**400}, V, "scale must be finite, got a number past the range of float64"),
    ("scale bool", {"scale": True}, T, "scale must be a real number, got bool"),
    ("scale string", {"scale": "1"}, T, "scale must be a real number, got str"),
    ("scale array", {"scale": zeros(1)}, T, "scale must be a real number, got ndarray"),
    ("scale complex", {"scale": 1j}, T, "scale must be a real number, got complex"),
    ("softcap zero", {"softcap": 0.0}, V, "softcap must be positive, normal and finite in float32, got 0.0"),
    ("softcap negative", {"softcap": -3}, V, "softcap must be positive, normal and finite in float32, got -3"),
    ("softcap NaN", {"softcap": np.nan}, V, "softcap must be positive, normal and finite in float32, got nan"),
    ("softcap inf", {"softcap": np.inf}, V, "softcap must be positive, normal and finite in float32, got inf"),
    ("softcap denormal", {"softcap": 1e-40}, V, "softcap must be positive, normal and finite in float32, got 1e-40"),
    ("softcap of float16", lambda a: a.update(half(a), softcap=1e-40), V,
     "softcap must be positive, normal and finite in float32, got 1e-40"),
    ("scale of float16", lambda a: a.update(half(a), scale=1e39), V, r"scale must be finite in float32, got 1e\+39"),
    ("softcap bool", {"softcap": True}, T, "softcap must be a real number, got bool"),
    ("threads zero", {"num_threads": 0}, V, "num_threads must be at least 1, got 0"),
    ("threads negative", {"num_threads": -(2**70)}, V, f"num_threads must be at least 1, got -{2**70}"),
    ("threads float", {"num_threads": 2.0}, T, "num_threads must be an integer, got float"),
    ("threads bool", {"num_threads": True}, T, "num_threads must be an integer, got bool"),
    # the rest
    ("normalizer unknown", {"normalizer": "softmin"}, V,
     r"normalizer must be one of \('softmax', 'softmax1', 'sigmoid', 'relu', 'sparsemax', 'entmax15'\), got 'softmin'"),
    ("normalizer none", {"normalizer": None}, T,
     r"normalizer must be a string or \('sigmoid', shift\), got NoneType"),
    ("normalizer array", {"normalizer": np.array(["softmax"] * 2)}, T,
     r"normalizer must be a string or \('sigmoid', shift\), got ndarray"),
    ("shift", {"normalizer": ("sigmoid", np.inf)}, V, "the shift of normalizer must be finite in float32, got inf"),
    ("sinks of sparsemax", {"normalizer": "sparsemax", "sinks": zeros(H)}, V,
     "sinks must be None with normalizer='sparsemax', got an array"),
    ("score_mod", {"score_mod": 5}, T, "score_mod must be a scipy.LowLevelCallable, .* or a ScoreMod, got int"),
    ("dropout one", {"dropout_p": 1}, V, r"dropout_p must lie in \[0, 1\), got 1"),
    ("dropout negative", {"dropout_p": -0.1}, V, r"dropout_p must lie in \[0, 1\), got -0.1"),
    ("dropout NaN", {"dropout_p": np.nan}, V, r"dropout_p must lie in \[0, 1\), got nan"),
    ("dropout bool", {"dropout_p": False}, T, "dropout_p must be a real number, got bool"),
    ("dropout none", {"dropout_p": None}, T, "dropout_p must be a real number, got NoneType"),
    ("seed float", {"seed": 1.5}, T, "seed must be an integer, got float"),
    ("seed negative", {"seed": -1}, V, "seed must be at least 0, got -1"),
    ("deterministic unknown", {"deterministic": "col"}, V, "deterministic must be None, a bool or 'row', got 'col'"),
    ("deterministic int", {"deterministic": 1}, T, "deterministic must be None, a bool or 'row', got int"),
    ("return_lse int", {"return_lse": 1}, T, "return_lse must be a bool, got int"),
    # out
    ("out list", {"out": [[0.0]]}, T, "out must be a NumPy array, got list"),
    ("out masked", {"out": masked(zeros(B, H, L, Dv))}, T,
     "out must be an array without a mask of its own, got a masked array"),
    ("out dtype", {"out": zeros(B, H, L, Dv, dtype=F64)}, V, "out must have query's dtype float32, got float64"),
    ("out float32 of float16", lambda a: a.update(half(a), out=a["out"]), V,
     "out must have query's dtype float16, got float32"),
    ("out float16", {"out": zeros(B, H, L, Dv, dtype=F16)}, V, "out must have query's dtype float32, got float16"),
    ("out int16 of bfloat16", lambda a: a.update({n: bfloat16(*x.shape) for n, x in a.items()},
                                                 out=zeros(B, H, L, Dv, dtype=np.int16)), V,
     "out must have query's dtype bfloat16, got int16"),
    ("out shape", {"out": zeros(B, H, L, D)}, V, r"out must have shape \(2, 4, 5, 6\), got \(2, 4, 5, 8\)"),
    ("out axes", {"out": zeros(1, B, H, L, Dv)}, V, r"out must have shape \(2, 4, 5, 6\), got \(1, 2, 4, 5, 6\)"),
    ("out read-only", lambda a: a["out"].setflags(write=False), V, "out must be writeable, got a read-only array"),
    ("out misaligned", {"out": misaligned((B, H, L, Dv))}, V,
     r"out must have an address and strides that are multiples of its item size of 4 bytes, got .*"),
    ("out stride 0", {"out": strided(zeros(B, H, L, Dv), (0, 120, 24, 4))}, V,
     r"out must not overlap itself, got strides \(0, 120, 24, 4\) for shape \(2, 4, 5, 6\)"),
    ("out sliding", {"out": strided(zeros(B, H, L, Dv), (480, 120, 20, 4))}, V,
     r"out must not overlap itself, got strides \(480, 120, 20, 4\) for shape \(2, 4, 5, 6\)"),
    *[(f"out on {name}", shared_with(name), V, f"out must not overlap the inputs, got memory shared with {name}")
      for name in ("query", "key", "value", "mask", "bias", "sinks")],
    ("out is query", lambda a: a.update(value=zeros(B, Hkv, S, D), out=a["query"]), V,
     "out must not overlap the inputs, got memory shared with query"),
]


@pytest.mark.parametrize("function", [fa.attention, fa.reference.attention], ids=["attention", "reference"])
@pytest.mark.parametrize("spoil, error, message", [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_bad_argument(function, spoil, error, message):
    arguments = good()
    spoil(arguments) if callable(spoil) else arguments.update(spoil)
    arrays = {name: a for name, a in arguments.items() if isinstance(a, np.ndarray)}
    before = {name: a.tobytes() for name, a in arrays.items()}
    with pytest.raises(error) as raised:
        function(**arguments)
    assert type(raised.value) is error
    assert re.fullmatch(message, str(raised.value)), str(raised.value)
    assert {name: a.tobytes() for name, a in arrays.items()} == before


def test_bad_argument_of_a_plain_call():
    """What the quick path is handed, out= left out, fails in the same words."""
    for spoil, error, message in [case[1:] for case in BAD if not callable(case[1]) and "out" not in case[1]]:
        arguments = good() | spoil
        del arguments["out"]
        with pytest.raises(error) as raised:
            fa.attention(**arguments)
        assert re.fullmatch(message, str(raised.value)), str(raised.value)


def test_unknown_and_positional_options():
    a = good()
    with pytest.raises(TypeError, match="unexpected keyword"):
        fa.attention(a["query"], a["key"], a["value"], dropout=0.1)
    with pytest.raises(TypeError, match="positional"):
        fa.attention(a["query"], a["key"], a["value"], None)


def test_result_past_memory():
    """Zero strides make huge shapes of little memory; only the result needs its size."""
    huge = np.broadcast_to(F32(0), (2**50, 1))
    with pytest.raises(MemoryError, match=r"no memory for a result of shape \(\d+, 1\) and dtype float32"):
        fa.attention(huge, zeros(1, 1), zeros(1, 1))
    with pytest.raises(MemoryError, match="no memory for a result of shape"):
        checks.aligned_empty((2**62, 8), F32)


# --- good forms ---

def same(**changed):
    """Assert that the changed arguments are taken and mean the same as the good ones."""
    a = good()
    del a["out"]
    assert_close(fa.attention(**(a | changed)), exact(**a)[0], bound(**a).out, {"case": changed, "seed": 0})


def test_arrays_come_in_without_a_copy():
    a = good()
    q, k, v = a["query"], a["key"][:, :, ::2], a["value"][:, :, ::2]
    for convert in (Dlpack, Convertible, memoryview, lambda x: x.view(np.recarray)):
        mask, bias = zeros(B, H, L, 4, dtype=bool), zeros(B, H, L, 4)
        p = checks.problem(convert(q), convert(k), convert(v), mask=convert(mask), bias=convert(bias))
        for taken, given in (p.query, q), (p.key, k), (p.value, v), (p.mask, mask), (p.bias, bias):
            assert type(taken) is np.ndarray and taken.ctypes.data == given.ctypes.data
            assert taken.strides == given.strides and taken.shape == given.shape
        same(query=convert(q))


def test_other_forms():
    p = checks.problem([[1.0, 2.0]], [[3.0, 4.0]], [[5.0]])
    assert p.query.dtype == F64 and p.query.shape == (1, 1, 2) and p.result().shape == (1, 1)
    assert checks.problem(memoryview(array.array("f", range(8))).cast("B").cast("f", (2, 4)), zeros(3, 4), zeros(3, 1)
                          ).query.shape == (1, 2, 4)
    for options in [{"scale": np.float64(8**-0.5)}, {"scale": None}, {"softcap": None},
                    {"dropout_p": 0.0}, {"dropout_p": 0}, {"seed": 3}, {"deterministic": True},
                    {"deterministic": "row"}, {"deterministic": np.False_}, {"causal": np.False_},
                    {"normalizer": "".join(["soft", "max"])},
                    {"num_threads": 1}, {"num_threads": np.int16(2)}, {"num_threads": 2**80}, {"window": None},
                    {"window": (None, None)}, {"window": 2**80}, {"kv_lengths": S}, {"kv_lengths": np.uint8(S)},
                    {"kv_lengths": [S, S]}, {"kv_lengths": np.full(1, S)}, {"kv_lengths": np.full(B, S, ">i2")},
                    {"query_lengths": np.full(4, L)[::2]}, {"query_offset": -3}, {"mask": True}, {"mask": [[True]]},
                    {"mask": np.ones(S, bool)}, {"mask": np.ones((B, 1, 1, S), bool)}, {"bias": zeros(1)},
                    {"mask": masks.window(None)}, {"mask": masks.lengths([S, S]).compile(L, S)},
                    {"sinks": np.full(2 * H, -np.inf, F32)[::2]}]:
        same(**options)


def test_strides():
    """Read-only, reversed, transposed and broadcast arrays keep their memory and their strides."""
    a = good()
    q, k, v = a["query"], a["key"], a["value"]
    q.setflags(write=False)
    p = checks.problem(q, k[:, :, ::-1], v[..., ::-2])
    assert p.key.strides == k[:, :, ::-1].strides and p.value.strides[-1] == -8 and not p.query.flags.writeable
    same(query=np.asfortranarray(q), key=k.transpose(3, 0, 2, 1).copy().transpose(1, 3, 2, 0))
    p = checks.problem(q, k[:1], v[:1])
    assert p.key.shape == k.shape and p.key.strides[0] == 0 and p.value.strides[0] == 0
    p = checks.problem(q[:1], k, v, mask=np.ones((L, 1), bool), bias=zeros(B, 1, 1, S))
    assert p.out.shape == (B, H, L, Dv) and p.query.strides[0] == 0
    assert p.mask.strides == (0, 0, 1, 0) and p.bias.strides == (4 * S, 0, 0, 4)
    # A length of 1 may carry any stride.
    odd = np.lib.stride_tricks.as_strided(zeros(1, L, D), strides=(3, 4 * D, 4))
    assert checks.problem(odd, zeros(1, S, D), zeros(1, S, Dv)).result().shape == (1, L, Dv)
    checks.problem(zeros(*[1] * 11), zeros(*[1] * 11), zeros(*[1] * 11))


def test_problem_fields():
    a = good()
    q, k, v = a["query"], a["key"], a["value"]
    p = checks.problem(q, k, v)
    assert (p.mask, p.bias, p.sinks, p.lse, p.num_threads, p.query_offset, p.kv_lengths) == (None,) * 7
    assert (p.left, p.right) == (checks.UNBOUNDED,) * 2 and p.scale == 1 / math.sqrt(D) and p.softcap == 0.0
    assert p.out is p.result() and p.out.shape == (B, H, L, Dv) and (p.L, p.S) == (L, S) and p.out.ctypes.data % 64 == 0
    p = checks.problem(q, k, v, causal=True, return_lse=True)
    assert (p.left, p.right, p.query_offset.tolist()) == (checks.UNBOUNDED, 0, [S - L] * B)
    assert p.lse.shape == (B, H, L) and p.lse.dtype == F32 and p.result()[0] is p.out
    p = checks.problem(q, k, v, window=3, kv_lengths=[4, 6], query_lengths=2)
    assert (p.left, p.right, p.query_offset.tolist()) == (3, 3, [-1, 1])
    assert p.kv_lengths.tolist() == [4, 6] and p.query_lengths.tolist() == [2, 2]
    p = checks.problem(q, k, v, window=(3, 4), causal=True, query_offset=np.array([2, 5], np.int8))
    assert (p.left, p.right, p.query_offset.tolist()) == (3, 0, [2, 5])
    lengths = checks.problem(zeros(2, 3, 1, 1, 1), zeros(2, 3, 1, 1, 1), zeros(2, 3, 1, 1, 1), kv_lengths=[[0], [1]],
                             window=2**61 - 1).kv_lengths
    assert lengths.tolist() == [0, 0, 0, 1, 1, 1] and lengths.flags.c_contiguous and lengths.dtype == np.int64
    p = checks.problem(q[0, 0], k[0, 0], v[0, 0], return_lse=True, causal=True, mask=np.ones((L, S), bool))
    assert p.query.shape == (1, L, D) and p.out.shape == (1, L, Dv) and p.query_offset.shape == (1,)
    assert p.mask.shape == (1, L, S) and [x.shape for x in p.result()] == [(L, Dv), (L,)]
    p = checks.problem(q[0], k[0], v[0], kv_lengths=[3], return_lse=True)
    assert p.kv_lengths.tolist() == [3] and [x.shape for x in p.result()] == [(H, L, Dv), (H, L)]


def test_lengths_are_copied():
    lengths = np.array([3, 4])
    a = good()
    p = checks.problem(a["query"], a["key"], a["value"], kv_lengths=lengths, query_offset=lengths, causal=True)
    lengths[:] = 2**40
    assert p.kv_lengths.tolist() == p.query_offset.tolist() == [3, 4]


def test_out_beside_the_inputs():
    """Memory ranges that overlap without a shared element are fine."""
    a = good()
    expected = fa.attention(a["query"], a["key"], a["value"])
    memory = np.zeros((B, H, L, 2 * D), F32)
    memory[..., ::2] = a["query"]
    out = memory[..., 1::2][..., :Dv]
    assert fa.attention(memory[..., ::2], a["key"], a["value"], out=out) is out
    np.testing.assert_array_equal(out, expected)


def test_expressions_plans_and_sparse_arrays_are_plans():
    a = good()
    q, k, v = a["query"], a["key"], a["value"]
    p = checks.problem(q, k, v, mask=np.ones((L, S), bool))
    assert p.mask.shape == (B, H, L, S) and p.plan is None
    mask = masks.documents(np.zeros((B, L), int), np.zeros(S, int))
    for given in mask, mask.compile(L, S):
        p = checks.problem(q, k, v, mask=given)
        assert p.mask is None and p.plan is mask.compile(L, S) and p.plan.lead == (B, 1)
    p = checks.problem(q, k, v, mask=sparse(L, S))
    assert p.mask is None and (p.plan.L, p.plan.S, p.plan.visible) == (L, S, 0)
    assert checks.problem(q[0, 0], k[0, 0], v[0, 0], mask=masks.causal()).plan.lead == ()


def test_many_threads_check_at_once():
    a = good()
    expected, failures = fa.attention(a["query"], a["key"], a["value"], kv_lengths=[3, 4]), []

    def work():
        for _ in range(20):
            if (fa.attention(a["query"], a["key"], a["value"], kv_lengths=[3, 4]) != expected).any():
                failures.append(threading.get_ident())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
