from typing import Any, Literal, Protocol, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import masks
from .bias import Bias
from .score import ScoreMod

class _SupportsDLPack(Protocol):
    def __dlpack__(self) -> Any: ...

_Real = TypeVar("_Real", np.float32, np.float64)
_Array: TypeAlias = ArrayLike | _SupportsDLPack
_Bool: TypeAlias = bool | np.bool_
_Mask: TypeAlias = _Array | masks.Mask | masks.Plan | masks._SparseArray
_Bias: TypeAlias = _Array | Bias
_Deterministic: TypeAlias = _Bool | Literal["row"]
_Integer: TypeAlias = int | np.integer[Any]
_Integers: TypeAlias = ArrayLike
_NormalizerName: TypeAlias = Literal["softmax", "softmax1", "sigmoid", "relu", "sparsemax", "entmax15"]
_Normalizer: TypeAlias = _NormalizerName | tuple[Literal["sigmoid"], float]
_Number: TypeAlias = float | np.floating[Any] | np.integer[Any]
_ScoreMod: TypeAlias = ScoreMod | Any  # functions of scipy, numba and ctypes
_Window: TypeAlias = _Integer | tuple[_Integer | None, _Integer | None] | list[_Integer | None]
_Selection: TypeAlias = ArrayLike | slice
_TopK: TypeAlias = tuple[Literal["top_k"], _Integer]

# The results have query's dtype: known if query is an array of known dtype. They are a pair only with return_lse.
@overload
def attention(
    query: NDArray[_Real], key: _Array, value: _Array, *, mask: _Mask | None = None, bias: _Array | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[_Real] | None = None,
    return_lse: Literal[False] = False, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[_Real]: ...
@overload
def attention(
    query: NDArray[_Real], key: _Array, value: _Array, *, mask: _Mask | None = None, bias: _Array | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[_Real] | None = None,
    return_lse: Literal[True], deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> tuple[NDArray[_Real], NDArray[_Real]]: ...
@overload
def attention(
    query: _Array, key: _Array, value: _Array, *, mask: _Mask | None = None, bias: _Array | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: Literal[False] = False, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def attention(
    query: _Array, key: _Array, value: _Array, *, mask: _Mask | None = None, bias: _Array | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: Literal[True], deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def attention(
    query: _Array, key: _Array, value: _Array, *, mask: _Mask | None = None, bias: _Array | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: _Bool = False, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...

# As of attention; a plan or a sparse mask is of one length and does not fit.
@overload
def varlen_attention(
    query: NDArray[_Real], key: _Array, value: _Array, cu_seqlens_q: _Integers, cu_seqlens_k: _Integers, *,
    mask: _Array | masks.Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[_Real] | None = None,
    return_lse: Literal[False] = False, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[_Real]: ...
@overload
def varlen_attention(
    query: NDArray[_Real], key: _Array, value: _Array, cu_seqlens_q: _Integers, cu_seqlens_k: _Integers, *,
    mask: _Array | masks.Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[_Real] | None = None,
    return_lse: Literal[True], deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> tuple[NDArray[_Real], NDArray[_Real]]: ...
@overload
def varlen_attention(
    query: _Array, key: _Array, value: _Array, cu_seqlens_q: _Integers, cu_seqlens_k: _Integers, *,
    mask: _Array | masks.Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: Literal[False] = False, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def varlen_attention(
    query: _Array, key: _Array, value: _Array, cu_seqlens_q: _Integers, cu_seqlens_k: _Integers, *,
    mask: _Array | masks.Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: Literal[True], deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def varlen_attention(
    query: _Array, key: _Array, value: _Array, cu_seqlens_q: _Integers, cu_seqlens_k: _Integers, *,
    mask: _Array | masks.Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: _Bool = False, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...

# The pair is of the k largest weights of each row and of their keys.
@overload
def attention_weights(
    query: NDArray[_Real], key: _Array, *, rows: _Selection | None = None, heads: _Selection | None = None,
    reduce: Literal["sum", "max", "entropy"] | None = None, mask: _Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[_Real]: ...
@overload
def attention_weights(
    query: NDArray[_Real], key: _Array, *, rows: _Selection | None = None, heads: _Selection | None = None,
    reduce: _TopK, mask: _Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> tuple[NDArray[_Real], NDArray[np.int64]]: ...
@overload
def attention_weights(
    query: _Array, key: _Array, *, rows: _Selection | None = None, heads: _Selection | None = None,
    reduce: Literal["sum", "max", "entropy"] | None = None, mask: _Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def attention_weights(
    query: _Array, key: _Array, *, rows: _Selection | None = None, heads: _Selection | None = None,
    reduce: _TopK, mask: _Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[np.int64]]: ...
