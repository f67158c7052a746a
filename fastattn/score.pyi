from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

class Prepared(NamedTuple):
    function: int
    gradient: int
    data: int
    kept: ScoreMod

class ScoreMod:
    def __init__(self, function: Any, gradient: Any = None, data: NDArray[Any] | int | None = None) -> None: ...
    def prepare(self, dtype: np.dtype[Any]) -> Prepared: ...

def prepare(score_mod: Any, dtype: np.dtype[Any]) -> Prepared: ...
def apply(
    prepared: Prepared, scores: NDArray[Any], batch: int, head: int, rows: Sequence[int] | NDArray[Any],
    gradient: NDArray[Any] | None = None,
) -> NDArray[Any]: ...
