from collections.abc import Callable, Iterable, Sequence
from typing import Any

from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..attention import _Array, _Bool, _Integer, _Number
from ._module import Module, _Activation, _Pair, _Seed

class Linear(Module):
    in_features: int
    out_features: int
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    def __init__(
        self, in_features: _Integer, out_features: _Integer, bias: _Bool = True, dtype: DTypeLike = "float32", *,
        seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array, activation: _Activation = None) -> NDArray[Any]: ...

class Conv2d(Module):
    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    weight: NDArray[Any]
    bias: NDArray[Any] | None
    def __init__(
        self, in_channels: _Integer, out_channels: _Integer, kernel_size: _Pair, stride: _Pair = 1,
        padding: _Pair = 0, bias: _Bool = True, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def rows(self, x: _Array) -> NDArray[Any]: ...
    def __call__(self, x: _Array) -> NDArray[Any]: ...

class PatchEmbedding(Module):
    proj: Conv2d
    def __init__(
        self, in_channels: _Integer, embed_dim: _Integer, patch_size: _Pair, bias: _Bool = True,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array) -> NDArray[Any]: ...

class Embedding(Module):
    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    weight: NDArray[Any]
    def __init__(
        self, num_embeddings: _Integer, embedding_dim: _Integer, padding_idx: _Integer | None = None,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, ids: ArrayLike) -> NDArray[Any]: ...

class _Norm(Module):
    normalized_shape: tuple[int, ...]
    eps: float | None
    weight: NDArray[Any] | None
    bias: NDArray[Any] | None
    def __init__(
        self, normalized_shape: _Integer | Sequence[int], eps: _Number | None, elementwise_affine: _Bool, bias: _Bool,
        dtype: DTypeLike,
    ) -> None: ...
    def __call__(self, x: _Array) -> NDArray[Any]: ...
    def of_sum(self, x: _Array, add: _Array | None) -> tuple[NDArray[Any], NDArray[Any]]: ...

class LayerNorm(_Norm):
    CENTRE: bool
    def __init__(
        self, normalized_shape: _Integer | Sequence[int], eps: _Number = 1e-05, elementwise_affine: _Bool = True,
        bias: _Bool = True, dtype: DTypeLike = "float32",
    ) -> None: ...

class RMSNorm(_Norm):
    CENTRE: bool
    def __init__(
        self, normalized_shape: _Integer | Sequence[int], eps: _Number | None = None,
        elementwise_affine: _Bool = True, dtype: DTypeLike = "float32",
    ) -> None: ...

class Sequential(Module):
    def __init__(self, *modules: Module | Callable[[NDArray[Any]], NDArray[Any]]) -> None: ...
    def children(self) -> Iterable[tuple[str, Module]]: ...
    def __getitem__(self, index: int) -> Any: ...
    def __len__(self) -> int: ...
    def __call__(self, x: NDArray[Any]) -> NDArray[Any]: ...

def quick_gelu(x: NDArray[Any]) -> NDArray[Any]: ...

def pair(name: str, value: _Pair, low: int) -> tuple[int, int]: ...
