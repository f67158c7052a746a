from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, overload

from numpy.typing import NDArray

from .attention import (
    _Array,
    _Bool,
    _Integer,
    _Integers,
    _Mask,
    _Normalizer,
    _Number,
    _Window,
)
from .checks import Problem

kernels: ContextVar[tuple[Callable[[Problem], None], Callable[[Problem], None]]]

class AdditiveGradients(NamedTuple):
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    sinks: NDArray[Any] | None

@overload
def additive_attention(
    query: _Array, key: _Array, value: _Array, weight: _Array, *, bias: _Array | None = None,
    mask: _Mask | None = None, causal: _Bool = False, window: _Window | None = None,
    query_offset: _Integers | None = None, query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None,
    softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: Literal[False] = False, num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def additive_attention(
    query: _Array, key: _Array, value: _Array, weight: _Array, *, bias: _Array | None = None,
    mask: _Mask | None = None, causal: _Bool = False, window: _Window | None = None,
    query_offset: _Integers | None = None, query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None,
    softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: Literal[True], num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def additive_attention(
    query: _Array, key: _Array, value: _Array, weight: _Array, *, bias: _Array | None = None,
    mask: _Mask | None = None, causal: _Bool = False, window: _Window | None = None,
    query_offset: _Integers | None = None, query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None,
    softcap: _Number | None = None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None,
    return_lse: _Bool = False, num_threads: _Integer | None = None,
) -> NDArray[Any] | tuple[NDArray[Any], NDArray[Any]]: ...
def additive_attention_backward(
    grad_out: _Array, query: _Array, key: _Array, value: _Array, weight: _Array, out: _Array, lse: _Array, *,
    grad_lse: _Array | None = None, bias: _Array | None = None, mask: _Mask | None = None, causal: _Bool = False,
    window: _Window | None = None, query_offset: _Integers | None = None, query_lengths: _Integers | None = None,
    kv_lengths: _Integers | None = None, softcap: _Number | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer | None = None,
    num_threads: _Integer | None = None,
) -> AdditiveGradients: ...
