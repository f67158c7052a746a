from typing import Any, NamedTuple

from numpy.typing import DTypeLike, NDArray

from ..attention import _Array, _Bool, _Integer, _Number
from ._module import Module, _Activation, _Seed
from .layers import Conv2d, Embedding, Linear
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer, _Stack

class DETREncoderLayer(TransformerEncoderLayer):
    def __call__(  # type: ignore[override]
        self, src: _Array, src_mask: _Array | None = None, src_key_padding_mask: _Array | None = None,
        pos: _Array | None = None,
    ) -> NDArray[Any]: ...

class DETRDecoderLayer(TransformerDecoderLayer):
    def __call__(  # type: ignore[override]
        self, tgt: _Array, memory: _Array, tgt_mask: _Array | None = None, memory_mask: _Array | None = None,
        tgt_key_padding_mask: _Array | None = None, memory_key_padding_mask: _Array | None = None,
        pos: _Array | None = None, query_pos: _Array | None = None, *, need_weights: _Bool = False,
    ) -> Any: ...

class DETREncoder(_Stack):
    def __call__(
        self, src: _Array, mask: _Array | None = None, src_key_padding_mask: _Array | None = None,
        pos: _Array | None = None,
    ) -> NDArray[Any]: ...

class DETRDecoder(_Stack):
    def __call__(
        self, tgt: _Array, memory: _Array, tgt_mask: _Array | None = None, memory_mask: _Array | None = None,
        tgt_key_padding_mask: _Array | None = None, memory_key_padding_mask: _Array | None = None,
        pos: _Array | None = None, query_pos: _Array | None = None, *, need_weights: _Bool = False,
    ) -> Any: ...

class DETRTransformer(Module):
    d_model: int
    encoder: DETREncoder
    decoder: DETRDecoder
    def __init__(
        self, d_model: _Integer = 256, nhead: _Integer = 8, num_encoder_layers: _Integer = 6,
        num_decoder_layers: _Integer = 6, dim_feedforward: _Integer = 2048, dropout: _Number = 0.1,
        activation: _Activation = "relu", norm_first: _Bool = False, dtype: DTypeLike = "float32", *,
        seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, src: _Array, query_pos: _Array, pos: _Array | None = None, key_padding_mask: _Array | None = None, *,
        need_weights: _Bool = False,
    ) -> Any: ...

class MLP(Module):
    layers: list[Linear]
    def __init__(
        self, input_dim: _Integer, hidden_dim: _Integer, output_dim: _Integer, num_layers: _Integer,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def __call__(self, x: _Array) -> NDArray[Any]: ...

class Detections(NamedTuple):
    logits: NDArray[Any]
    boxes: NDArray[Any]
    weights: NDArray[Any] | None

class DETR(Module):
    transformer: DETRTransformer
    class_embed: Linear
    bbox_embed: MLP
    query_embed: Embedding
    input_proj: Conv2d
    def __init__(
        self, in_channels: _Integer = 2048, num_classes: _Integer = 91, num_queries: _Integer = 100,
        d_model: _Integer = 256, nhead: _Integer = 8, num_encoder_layers: _Integer = 6,
        num_decoder_layers: _Integer = 6, dim_feedforward: _Integer = 2048, dropout: _Number = 0.1,
        activation: _Activation = "relu", norm_first: _Bool = False, dtype: DTypeLike = "float32", *,
        seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, features: _Array, mask: _Array | None = None, *, return_weights: _Bool = False,
    ) -> Detections: ...
