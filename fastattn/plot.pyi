from collections.abc import Sequence
from os import PathLike
from typing import Any, TypeVar

from numpy.typing import ArrayLike

from .masks import Mask

MOST_LABELS: int
MOST_SMALL_LABELS: int
FLOAT16_MAX: float

_Path = TypeVar("_Path", str, PathLike[str])

# matplotlib's axes and figures are Any: it is optional.
def heatmap(
    weights: ArrayLike, tokens: Sequence[object] | None = None, key_tokens: Sequence[object] | None = None, *,
    ax: Any = None, title: str | None = None, vmax: float | None = None, colorbar: bool = True,
) -> Any: ...
def heads(
    weights: ArrayLike, tokens: Sequence[object] | None = None, key_tokens: Sequence[object] | None = None, *,
    columns: int = 4, titles: Sequence[str] | None = None,
) -> Any: ...
def mask(expression: Mask, L: int, S: int, *, ax: Any = None) -> Any: ...
def masks(expressions: Sequence[Mask], L: int, S: int, *, columns: int = 4) -> Any: ...
def html(
    weights: ArrayLike | Sequence[ArrayLike], tokens: Sequence[object] | None, path: _Path,
    key_tokens: Sequence[object] | None = None, *, title: str = "Attention",
) -> _Path: ...
