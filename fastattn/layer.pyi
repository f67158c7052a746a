from contextvars import ContextVar
from typing import Any, Literal, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .attention import _Array, _Integer

_Real = TypeVar("_Real", np.float32, np.float64)
_Activation: TypeAlias = Literal["relu", "gelu", "gelu_tanh", "silu"] | None

in_numpy: ContextVar[bool]
ACTIVATIONS: dict[str | None, int]

def round_to_bfloat16(array: ArrayLike) -> NDArray[np.uint16]: ...

class PackedWeight:
    shape: tuple[int, int]
    dtype: str
    def __init__(self, shape: tuple[int, int], dtype: str, panels: NDArray[Any], bits: int) -> None: ...
    def unpack(self) -> NDArray[Any]: ...
    def __reduce__(self) -> tuple[Any, ...]: ...

def pack_weight(
    weight: _Array, dtype: Literal["float32", "float64", "bfloat16"] | None = None,
) -> PackedWeight: ...

# The result has x's dtype: known if x is an array of known dtype.
@overload
def linear(
    x: NDArray[_Real], weight: PackedWeight | _Array, bias: _Array | None = None, activation: _Activation = None, *,
    out: NDArray[_Real] | None = None, num_threads: _Integer | None = None,
) -> NDArray[_Real]: ...
@overload
def linear(
    x: _Array, weight: PackedWeight | _Array, bias: _Array | None = None, activation: _Activation = None, *,
    out: NDArray[Any] | None = None, num_threads: _Integer | None = None,
) -> NDArray[Any]: ...

def normalise(
    x: NDArray[Any], weight: NDArray[Any] | None, bias: NDArray[Any] | None, eps: float, centre: bool,
    add: NDArray[Any] | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
