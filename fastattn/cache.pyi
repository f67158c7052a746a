from typing import Any, Literal, NamedTuple, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from .attention import (
    _Array,
    _Bias,
    _Bool,
    _Deterministic,
    _Integer,
    _Integers,
    _Normalizer,
    _Number,
    _Real,
    _Window,
)
from .positions import Rotary

DTYPES: dict[str, Any]
LARGEST_CODE: int
SMALLEST_SCALE: np.float32
LARGEST_SCALE: np.float32
FIRST_ROWS: int
FIRST_ENTRIES: int
MOST_PAGES: int

_Stored: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]

class Pools(NamedTuple):
    key: NDArray[Any]
    value: NDArray[Any]
    key_scale: NDArray[np.float32] | None
    value_scale: NDArray[np.float32] | None

class Pages(NamedTuple):
    pools: Pools
    tables: NDArray[np.int32]
    rows: NDArray[np.int64]
    hole_begin: NDArray[np.int64]
    hole_end: NDArray[np.int64]

def dense(problem: Any) -> Any: ...

class KVCache:
    num_pages: int
    page_size: int
    kv_heads: int
    head_dim: int
    value_dim: int
    dtype: str
    num_free_pages: int

    def __init__(
        self, num_pages: _Integer, page_size: _Integer, kv_heads: _Integer, head_dim: _Integer, *,
        value_dim: _Integer | None = None, dtype: _Stored = "float32",
    ) -> None: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def __contains__(self, sequence_id: object) -> bool: ...
    def append(
        self, sequence_ids: _Integers, key: _Array, value: _Array, lengths: _Integers | None = None, *,
        rotary: Rotary | None = None,
    ) -> None: ...
    def fork(self, source: _Integer, destinations: _Integers) -> None: ...
    def free(self, sequence_ids: _Integers) -> None: ...
    def truncate(self, sequence_ids: _Integers, lengths: _Integers) -> None: ...
    def evict(self, sequence_ids: _Integers, window: _Integers, *, sinks: _Integers = 0) -> None: ...
    def lengths(self, sequence_ids: _Integers) -> NDArray[np.int64]: ...
    # The results have query's dtype: known if query is an array of known dtype. They are a pair only with return_lse.
    @overload
    def attend(
        self, query: NDArray[_Real], sequence_ids: _Integers, *, cu_seqlens_q: _Integers | None = None,
        query_lengths: _Integers | None = None, rotary: Rotary | None = None, mask: _Array | None = None,
        bias: _Bias | None = None, causal: _Bool = False, window: _Window | None = None, scale: _Number | None = None,
        softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
        out: NDArray[_Real] | None = None,
        return_lse: Literal[False] = False, deterministic: _Deterministic | None = None,
        num_threads: _Integer | None = None,
    ) -> NDArray[_Real]: ...
    @overload
    def attend(
        self, query: NDArray[_Real], sequence_ids: _Integers, *, cu_seqlens_q: _Integers | None = None,
        query_lengths: _Integers | None = None, rotary: Rotary | None = None, mask: _Array | None = None,
        bias: _Bias | None = None, causal: _Bool = False, window: _Window | None = None, scale: _Number | None = None,
        softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
        out: NDArray[_Real] | None = None,
        return_lse: Literal[True], deterministic: _Deterministic | None = None,
        num_threads: _Integer | None = None,
    ) -> tuple[NDArray[_Real], NDArray[_Real]]: ...
    @overload
    def attend(
        self, query: _Array, sequence_ids: _Integers, *, cu_seqlens_q: _Integers | None = None,
        query_lengths: _Integers | None = None, rotary: Rotary | None = None, mask: _Array | None = None,
        bias: _Bias | None = None, causal: _Bool = False, window: _Window | None = None, scale: _Number | None = None,
        softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
        out: NDArray[Any] | None = None,
        return_lse: Literal[False] = False, deterministic: _Deterministic | None = None,
        num_threads: _Integer | None = None,
    ) -> NDArray[Any]: ...
    @overload
    def attend(
        self, query: _Array, sequence_ids: _Integers, *, cu_seqlens_q: _Integers | None = None,
        query_lengths: _Integers | None = None, rotary: Rotary | None = None, mask: _Array | None = None,
        bias: _Bias | None = None, causal: _Bool = False, window: _Window | None = None, scale: _Number | None = None,
        softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
        out: NDArray[Any] | None = None,
        return_lse: Literal[True], deterministic: _Deterministic | None = None,
        num_threads: _Integer | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...
    @overload
    def attend(
        self, query: _Array, sequence_ids: _Integers, *, cu_seqlens_q: _Integers | None = None,
        query_lengths: _Integers | None = None, rotary: Rotary | None = None, mask: _Array | None = None,
        bias: _Bias | None = None, causal: _Bool = False, window: _Window | None = None, scale: _Number | None = None,
        softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
        out: NDArray[Any] | None = None,
        return_lse: _Bool = False, deterministic: _Deterministic | None = None,
        num_threads: _Integer | None = None,
    ) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
