from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from .attention import _Array, _Bool, _Integer, _Integers

OUTPUT: int
QUERY: int
KEY: int
MAPS: dict[str, int]
LOG2_E: float
ROOM: dict[np.dtype[Any], float]
kernel: ContextVar[Callable[[Call], None]]

_Map = Literal["elu", "relu", "favor+"]

class LinearState(NamedTuple):
    sums: NDArray[Any]
    normalizer: NDArray[Any]

class LinearGradients(NamedTuple):
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]

class Call:
    mode: int
    def __init__(self, **values: Any) -> None: ...
    def __getattr__(self, name: str) -> Any: ...

def orthogonal_features(num_features: int, D: int, seed: int = 0) -> NDArray[np.float64]: ...
@overload
def linear_attention(
    query: _Array, key: _Array, value: _Array, *, feature_map: _Map = "elu", num_features: _Integer | None = None,
    seed: _Integer = 0, projection: _Array | None = None, causal: _Bool = False, kv_lengths: _Integers | None = None,
    state: tuple[_Array, _Array] | None = None, return_state: Literal[False] = False,
    return_normalizer: Literal[False] = False, out: NDArray[Any] | None = None, num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def linear_attention(
    query: _Array, key: _Array, value: _Array, *, feature_map: _Map = "elu", num_features: _Integer | None = None,
    seed: _Integer = 0, projection: _Array | None = None, causal: _Bool = False, kv_lengths: _Integers | None = None,
    state: tuple[_Array, _Array] | None = None, return_state: Literal[True],
    return_normalizer: Literal[False] = False, out: NDArray[Any] | None = None, num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], LinearState]: ...
@overload
def linear_attention(
    query: _Array, key: _Array, value: _Array, *, feature_map: _Map = "elu", num_features: _Integer | None = None,
    seed: _Integer = 0, projection: _Array | None = None, causal: _Bool = False, kv_lengths: _Integers | None = None,
    state: tuple[_Array, _Array] | None = None, return_state: Literal[False] = False,
    return_normalizer: Literal[True], out: NDArray[Any] | None = None, num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
@overload
def linear_attention(
    query: _Array, key: _Array, value: _Array, *, feature_map: _Map = "elu", num_features: _Integer | None = None,
    seed: _Integer = 0, projection: _Array | None = None, causal: _Bool = False, kv_lengths: _Integers | None = None,
    state: tuple[_Array, _Array] | None = None, return_state: Literal[True], return_normalizer: Literal[True],
    out: NDArray[Any] | None = None, num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any], LinearState]: ...
@overload
def linear_attention(
    query: _Array, key: _Array, value: _Array, *, feature_map: _Map = "elu", num_features: _Integer | None = None,
    seed: _Integer = 0, projection: _Array | None = None, causal: _Bool = False, kv_lengths: _Integers | None = None,
    state: tuple[_Array, _Array] | None = None, return_state: _Bool = False, return_normalizer: _Bool = False,
    out: NDArray[Any] | None = None, num_threads: _Integer | None = None,
) -> NDArray[Any] | tuple[Any, ...]: ...
def linear_attention_backward(
    grad_out: _Array, query: _Array, key: _Array, value: _Array, out: _Array, normalizer: _Array, *,
    feature_map: _Map = "elu", num_features: _Integer | None = None, seed: _Integer = 0,
    projection: _Array | None = None, causal: _Bool = False, kv_lengths: _Integers | None = None,
    num_threads: _Integer | None = None,
) -> LinearGradients: ...
