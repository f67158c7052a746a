from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

class Bias:
    heads: int | None
    def check(self, H: int, L: int, S: int) -> None: ...
    def view(
        self, lead: tuple[int, ...], H: int, L: int, S: int, dtype: DTypeLike,
        query_offset: NDArray[np.int64] | None = None,
    ) -> NDArray[Any]: ...
    def index(self) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None: ...
    def diagonals(
        self, lead: tuple[int, ...], L: int, S: int, query_offset: NDArray[np.int64] | None = None,
    ) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], tuple[int, ...], int, NDArray[np.int64] | None]: ...
    def gradient(
        self, sums: NDArray[np.float64], distance: NDArray[np.int64] | None,
    ) -> NDArray[Any] | tuple[NDArray[Any], ...]: ...

class ALiBi(Bias):
    slopes: NDArray[np.floating[Any]]
    symmetric: bool
    def __init__(self, slopes: ArrayLike, symmetric: bool | np.bool_ = False) -> None: ...

class RelativeBias(Bias):
    table: NDArray[np.floating[Any]]
    first: int | None
    shape: tuple[int, int] | None
    def __init__(self, table: ArrayLike, *, first: int | np.integer[Any] | None = None) -> None: ...
    @staticmethod
    def t5(
        table: ArrayLike, *, bidirectional: bool | np.bool_ = True, max_distance: int | np.integer[Any] = 128,
    ) -> RelativeBias: ...
    @staticmethod
    def grid(table: ArrayLike, *, shape: tuple[int, int] | list[int]) -> RelativeBias: ...
    @staticmethod
    def decomposed(rows: ArrayLike, columns: ArrayLike, *, shape: tuple[int, int] | list[int]) -> RelativeBias: ...
