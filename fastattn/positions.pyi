from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from .attention import _Array, _Bool, _Integer, _Integers, _Number, _Real

ANGLES: int

def alibi_slopes(H: int | np.integer[Any]) -> NDArray[np.float64]: ...
def relative_buckets(
    distance: ArrayLike, num_buckets: int | np.integer[Any] = 32, *, bidirectional: bool | np.bool_ = True,
    max_distance: int | np.integer[Any] = 128,
) -> NDArray[np.int64]: ...

def sinusoidal(
    length: _Integer, dim: _Integer, *, base: _Number = 10000.0, dtype: DTypeLike = "float32",
) -> NDArray[Any]: ...
def sinusoidal_2d(
    height: _Integer, width: _Integer, dim: _Integer, *, base: _Number = 10000.0, normalize: _Bool = True,
    dtype: DTypeLike = "float32",
) -> NDArray[Any]: ...

class Rotary(NamedTuple):
    cos: NDArray[np.float32]
    sin: NDArray[np.float32]
    interleaved: _Bool

def rotary(
    length: _Integer, dim: _Integer, *, base: _Number = 10000.0, interleaved: _Bool = False, scaling: _Number = 1.0,
) -> Rotary: ...

# The result has x's dtype: known if x is an array of known dtype.
@overload
def apply_rotary(x: NDArray[_Real], table: Rotary, offset: _Integers = 0) -> NDArray[_Real]: ...
@overload
def apply_rotary(x: _Array, table: Rotary, offset: _Integers = 0) -> NDArray[Any]: ...
def rotate(
    x: NDArray[Any], cos: NDArray[np.float32], sin: NDArray[np.float32], interleaved: _Bool, out: NDArray[Any],
) -> None: ...
def check_table(name: str, table: object) -> None: ...
