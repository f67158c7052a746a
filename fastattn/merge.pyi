from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Real = TypeVar("_Real", np.float32, np.float64)
_Parts: TypeAlias = ArrayLike | Iterable[ArrayLike]

@overload
def merge_states(
    outs: NDArray[_Real] | Sequence[NDArray[_Real]], lses: _Parts,
) -> tuple[NDArray[_Real], NDArray[_Real]]: ...
@overload
def merge_states(outs: _Parts, lses: _Parts) -> tuple[NDArray[Any], NDArray[Any]]: ...
def parts(outs: _Parts, lses: _Parts) -> tuple[list[NDArray[Any]], list[NDArray[Any]]]: ...
