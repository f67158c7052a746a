from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from .attention import (
    _Array,
    _Bias,
    _Bool,
    _Deterministic,
    _Integer,
    _Integers,
    _Mask,
    _Normalizer,
    _Number,
    _ScoreMod,
    _Window,
)
from .checks import Problem

class Gradients(NamedTuple):
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    bias: NDArray[Any] | tuple[NDArray[Any], ...] | None
    sinks: NDArray[Any] | None

def attention_backward(
    grad_out: _Array, query: _Array, key: _Array, value: _Array, out: _Array, lse: _Array, *,
    grad_lse: _Array | None = None, mask: _Mask | None = None, bias: _Bias | None = None, causal: _Bool = False,
    window: _Window | None = None, query_offset: _Integers | None = None, query_lengths: _Integers | None = None,
    kv_lengths: _Integers | None = None, scale: _Number | None = None, softcap: _Number | None = None,
    score_mod: _ScoreMod | None = None,
    sinks: _Array | None = None, normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0,
    seed: _Integer | None = None, deterministic: _Deterministic | None = None, num_threads: _Integer | None = None,
) -> Gradients: ...
def varlen_attention_backward(
    grad_out: _Array, query: _Array, key: _Array, value: _Array, out: _Array, lse: _Array, cu_seqlens_q: _Integers,
    cu_seqlens_k: _Integers, *, grad_lse: _Array | None = None, mask: _Mask | None = None, bias: _Bias | None = None,
    causal: _Bool = False, window: _Window | None = None, query_offset: _Integers | None = None,
    query_lengths: _Integers | None = None, kv_lengths: _Integers | None = None, scale: _Number | None = None,
    softcap: _Number | None = None, score_mod: _ScoreMod | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, deterministic: _Deterministic | None = None,
    num_threads: _Integer | None = None,
) -> Gradients: ...
def backward(
    packed: tuple[_Integers, _Integers] | None, grad_out: _Array, query: _Array, key: _Array, value: _Array,
    out: _Array, lse: _Array, *, bias: _Bias | None, sinks: _Array | None,
    into: Sequence[NDArray[Any] | None] = ..., **options: Any,
) -> Gradients: ...
def gradients(
    problem: Problem, query: _Array, key: _Array, value: _Array, bias: _Bias | None, sinks: _Array | None,
) -> Gradients: ...
