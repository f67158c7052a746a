from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..attention import _Array, _Bool, _Integer, _Number
from ._module import Module, _Seed
from .layers import Linear

REDUCTIONS: dict[str, np.ufunc]

class _GraphLayer(Module):
    in_channels: tuple[int, int]
    out_channels: int
    heads: int
    concat: bool
    negative_slope: float
    dropout: float
    add_self_loops: bool
    edge_dim: int | None
    fill_value: float | str
    residual: bool
    res: Linear | None
    bias: NDArray[Any] | None
    lin_edge: Linear
    def __init__(
        self, in_channels: _Integer | tuple[_Integer, _Integer], out_channels: _Integer, heads: _Integer,
        concat: _Bool, negative_slope: _Number, dropout: _Number, add_self_loops: _Bool, edge_dim: _Integer | None,
        fill_value: _Number | str, residual: _Bool,
    ) -> None: ...

class GATConv(_GraphLayer):
    lin: Linear
    lin_src: Linear
    lin_dst: Linear
    att_src: NDArray[Any]
    att_dst: NDArray[Any]
    att_edge: NDArray[Any]
    def __init__(
        self, in_channels: _Integer | tuple[_Integer, _Integer], out_channels: _Integer, heads: _Integer = 1,
        concat: _Bool = True, negative_slope: _Number = 0.2, dropout: _Number = 0.0, add_self_loops: _Bool = True,
        edge_dim: _Integer | None = None, fill_value: _Number | str = "mean", bias: _Bool = True,
        residual: _Bool = False, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, x: _Array | tuple[_Array, _Array | None], edge_index: ArrayLike, edge_attr: _Array | None = None,
        size: tuple[int, int] | None = None, return_attention_weights: _Bool = False,
    ) -> Any: ...

class GATv2Conv(_GraphLayer):
    lin_l: Linear
    lin_r: Linear
    att: NDArray[Any]
    share_weights: bool
    def __init__(
        self, in_channels: _Integer | tuple[_Integer, _Integer], out_channels: _Integer, heads: _Integer = 1,
        concat: _Bool = True, negative_slope: _Number = 0.2, dropout: _Number = 0.0, add_self_loops: _Bool = True,
        edge_dim: _Integer | None = None, fill_value: _Number | str = "mean", bias: _Bool = True,
        share_weights: _Bool = False, residual: _Bool = False, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, x: _Array | tuple[_Array, _Array], edge_index: ArrayLike, edge_attr: _Array | None = None,
        return_attention_weights: _Bool = False,
    ) -> Any: ...
