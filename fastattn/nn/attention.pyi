from typing import Any

from numpy.typing import DTypeLike, NDArray

from .. import masks
from ..attention import _Array, _Bool, _Integer, _Integers, _Number
from ..cache import KVCache
from ._module import Module, _Seed
from .layers import Conv2d, Linear

OPTIONS: tuple[str, ...]

class MultiheadAttention(Module):
    embed_dim: int
    num_heads: int
    head_dim: int
    kdim: int
    vdim: int
    dropout: float
    batch_first: bool
    add_zero_attn: bool
    options: dict[str, Any]
    in_proj_weight: NDArray[Any]
    q_proj_weight: NDArray[Any]
    k_proj_weight: NDArray[Any]
    v_proj_weight: NDArray[Any]
    in_proj_bias: NDArray[Any] | None
    bias_k: NDArray[Any] | None
    bias_v: NDArray[Any] | None
    out_proj: Linear
    def __init__(
        self, embed_dim: _Integer, num_heads: _Integer, dropout: _Number = 0.0, bias: _Bool = True,
        add_bias_kv: _Bool = False, add_zero_attn: _Bool = False, kdim: _Integer | None = None,
        vdim: _Integer | None = None, batch_first: _Bool = False, dtype: DTypeLike = "float32", *,
        head_dim: _Integer | None = None, options: dict[str, Any] | None = None, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, query: _Array, key: _Array, value: _Array, key_padding_mask: _Array | None = None,
        need_weights: _Bool = True, attn_mask: _Array | None = None, average_attn_weights: _Bool = True,
        is_causal: _Bool = False, *, cache: KVCache | dict[str, Any] | None = None, **options: Any,
    ) -> tuple[NDArray[Any], NDArray[Any] | None]: ...
    def new_cache(
        self, batch_size: int, max_length: int, dtype: str = "float32", *, page_size: int = 16,
    ) -> KVCache: ...

class _OneHead(Module):
    W_q: Linear
    W_k: Linear
    W_v: Linear
    def __init__(
        self, embed_dim: _Integer, context_dim: _Integer, head_dim: _Integer | None, value_dim: _Integer | None,
        bias: _Bool, dtype: DTypeLike, seed: _Seed,
    ) -> None: ...

class SelfAttention(_OneHead):
    def __init__(
        self, embed_dim: _Integer, head_dim: _Integer | None = None, value_dim: _Integer | None = None,
        bias: _Bool = False, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array, **options: Any) -> Any: ...

class CrossAttention(_OneHead):
    def __init__(
        self, embed_dim: _Integer, context_dim: _Integer | None = None, head_dim: _Integer | None = None,
        value_dim: _Integer | None = None, bias: _Bool = False, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array, context: _Array, **options: Any) -> Any: ...

class SelfAttention2d(Module):
    query_conv: Conv2d
    key_conv: Conv2d
    value_conv: Conv2d
    gamma: NDArray[Any]
    def __init__(
        self, channels: int, key_channels: _Integer | None = None, dtype: DTypeLike = "float32", *,
        seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array, return_weights: _Bool = False) -> Any: ...

class _HeadedSelfAttention(Module):
    embed_dim: int
    num_heads: int
    head_dim: int
    query: Linear
    key: Linear
    value: Linear
    def __init__(
        self, embed_dim: _Integer, num_heads: _Integer, bias: _Bool, dtype: DTypeLike, seed: _Seed,
        names: tuple[str, ...] = ("query", "key", "value"),
    ) -> None: ...

class LongformerSelfAttention(_HeadedSelfAttention):
    attention_window: int
    query_global: Linear
    key_global: Linear
    value_global: Linear
    def __init__(
        self, embed_dim: _Integer, num_heads: _Integer, attention_window: _Integer, bias: _Bool = True,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, x: _Array, global_tokens: _Integers = (), key_padding_mask: _Array | None = None,
    ) -> NDArray[Any]: ...

class BigBirdSelfAttention(_HeadedSelfAttention):
    mask: masks.Mask
    def __init__(
        self, embed_dim: _Integer, num_heads: _Integer, block_size: _Integer = 64, num_random_blocks: _Integer = 3,
        window_blocks: _Integer = 3, num_global_blocks: _Integer = 1, bias: _Bool = True,
        dtype: DTypeLike = "float32", *, mask_seed: _Integer = 0, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array, key_padding_mask: _Array | None = None) -> NDArray[Any]: ...

class LinformerSelfAttention(Module):
    embed_dim: int
    num_heads: int
    head_dim: int
    seq_len: int
    to_q: Linear
    to_k: Linear
    to_v: Linear
    to_out: Linear
    proj_k: NDArray[Any]
    proj_v: NDArray[Any]
    def __init__(
        self, embed_dim: _Integer, seq_len: _Integer, k: _Integer = 256, num_heads: _Integer = 8,
        head_dim: _Integer | None = None, one_kv_head: _Bool = False, share_kv: _Bool = False,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array) -> NDArray[Any]: ...
