from typing import Any, NamedTuple

from numpy.typing import DTypeLike, NDArray

from ..attention import _Array, _Bool, _Integer, _Number
from ..cache import KVCache
from ._module import Module, _Activation, _Seed
from .attention import MultiheadAttention
from .layers import LayerNorm, Linear

class LayerCache(NamedTuple):
    past: KVCache
    memory: dict[str, Any]

class _Layer(Module):
    self_attn: MultiheadAttention
    linear1: Linear
    linear2: Linear
    norm1: LayerNorm
    norm2: LayerNorm
    norm_first: bool
    activation: Any
    def __init__(
        self, d_model: _Integer, nhead: _Integer, dim_feedforward: _Integer, dropout: _Number,
        activation: _Activation, layer_norm_eps: _Number, batch_first: _Bool, norm_first: _Bool, bias: _Bool,
        dtype: DTypeLike, seed: _Seed, attentions: tuple[str, ...],
    ) -> None: ...
    def new_cache(
        self, batch_size: int, max_length: int, dtype: str = "float32", *, page_size: int = 16,
    ) -> LayerCache: ...

class TransformerEncoderLayer(_Layer):
    def __init__(
        self, d_model: _Integer, nhead: _Integer, dim_feedforward: _Integer = 2048, dropout: _Number = 0.1,
        activation: _Activation = "relu", layer_norm_eps: _Number = 1e-05, batch_first: _Bool = False,
        norm_first: _Bool = False, bias: _Bool = True, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, src: _Array, src_mask: _Array | None = None, src_key_padding_mask: _Array | None = None,
        is_causal: _Bool = False, *, cache: LayerCache | None = None,
    ) -> NDArray[Any]: ...

class TransformerDecoderLayer(_Layer):
    multihead_attn: MultiheadAttention
    norm3: LayerNorm
    def __init__(
        self, d_model: _Integer, nhead: _Integer, dim_feedforward: _Integer = 2048, dropout: _Number = 0.1,
        activation: _Activation = "relu", layer_norm_eps: _Number = 1e-05, batch_first: _Bool = False,
        norm_first: _Bool = False, bias: _Bool = True, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, tgt: _Array, memory: _Array, tgt_mask: _Array | None = None, memory_mask: _Array | None = None,
        tgt_key_padding_mask: _Array | None = None, memory_key_padding_mask: _Array | None = None,
        tgt_is_causal: _Bool = False, memory_is_causal: _Bool = False, *, cache: LayerCache | None = None,
    ) -> NDArray[Any]: ...

class _Stack(Module):
    layers: list[Any]
    num_layers: int
    norm: Module | None
    def __init__(self, layer: Module, num_layers: _Integer, norm: Module | None) -> None: ...
    def new_cache(
        self, batch_size: int, max_length: int, dtype: str = "float32", *, page_size: int = 16,
    ) -> list[LayerCache]: ...

class TransformerEncoder(_Stack):
    def __init__(
        self, encoder_layer: TransformerEncoderLayer, num_layers: _Integer, norm: Module | None = None,
        enable_nested_tensor: _Bool = True, mask_check: _Bool = True,
    ) -> None: ...
    def __call__(
        self, src: _Array, mask: _Array | None = None, src_key_padding_mask: _Array | None = None,
        is_causal: _Bool | None = None, *, cache: list[LayerCache] | None = None,
    ) -> NDArray[Any]: ...

class TransformerDecoder(_Stack):
    def __init__(
        self, decoder_layer: TransformerDecoderLayer, num_layers: _Integer, norm: Module | None = None,
    ) -> None: ...
    def __call__(
        self, tgt: _Array, memory: _Array, tgt_mask: _Array | None = None, memory_mask: _Array | None = None,
        tgt_key_padding_mask: _Array | None = None, memory_key_padding_mask: _Array | None = None,
        tgt_is_causal: _Bool | None = None, memory_is_causal: _Bool = False, *, cache: list[LayerCache] | None = None,
    ) -> NDArray[Any]: ...

class Transformer(Module):
    encoder: Any
    decoder: Any
    d_model: int
    nhead: int
    batch_first: bool
    def __init__(
        self, d_model: _Integer = 512, nhead: _Integer = 8, num_encoder_layers: _Integer = 6,
        num_decoder_layers: _Integer = 6, dim_feedforward: _Integer = 2048, dropout: _Number = 0.1,
        activation: _Activation = "relu", custom_encoder: Any = None, custom_decoder: Any = None,
        layer_norm_eps: _Number = 1e-05, batch_first: _Bool = False, norm_first: _Bool = False, bias: _Bool = True,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    @staticmethod
    def generate_square_subsequent_mask(sz: int, dtype: DTypeLike = "float32") -> NDArray[Any]: ...
    def __call__(
        self, src: _Array, tgt: _Array, src_mask: _Array | None = None, tgt_mask: _Array | None = None,
        memory_mask: _Array | None = None, src_key_padding_mask: _Array | None = None,
        tgt_key_padding_mask: _Array | None = None, memory_key_padding_mask: _Array | None = None,
        src_is_causal: _Bool | None = None, tgt_is_causal: _Bool | None = None, memory_is_causal: _Bool = False,
    ) -> NDArray[Any]: ...
