"""Layers on NumPy arrays, with torch's names, options and state dicts.

    from fastattn import nn

    layer = nn.TransformerEncoderLayer(512, 8, batch_first=True)
    layer.load_state_dict(torch_layer.state_dict())         # or a dict of arrays, or the path of a .safetensors file
    y = layer(x)                                            # what torch_layer.eval() computes

Layers compute what torch does in eval mode; gradients come through `fastattn.integrations`.
"""

from ._module import Keys, Module, read_safetensors
from .attention import (
    BigBirdSelfAttention,
    CrossAttention,
    LinformerSelfAttention,
    LongformerSelfAttention,
    MultiheadAttention,
    SelfAttention,
    SelfAttention2d,
)
from .detection import (
    DETR,
    MLP,
    Detections,
    DETRDecoder,
    DETRDecoderLayer,
    DETREncoder,
    DETREncoderLayer,
    DETRTransformer,
)
from .graph import GATConv, GATv2Conv
from .layers import Conv2d, Embedding, LayerNorm, Linear, PatchEmbedding, RMSNorm, Sequential, quick_gelu
from .recurrent import GRU, BahdanauAttention, LuongAttention, RecurrentEncoderDecoder, RecurrentState
from .transformer import (
    LayerCache,
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = ["BahdanauAttention", "BigBirdSelfAttention", "Conv2d", "CrossAttention", "DETR", "DETRDecoder",
           "DETRDecoderLayer", "DETREncoder", "DETREncoderLayer", "DETRTransformer", "Detections", "Embedding",
           "GATConv", "GATv2Conv", "GRU", "Keys", "LayerCache", "LayerNorm", "Linear", "LinformerSelfAttention",
           "LongformerSelfAttention", "LuongAttention", "MLP", "Module", "MultiheadAttention", "PatchEmbedding",
           "RMSNorm", "RecurrentEncoderDecoder", "RecurrentState", "SelfAttention", "SelfAttention2d", "Sequential",
           "Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder",
           "TransformerEncoderLayer", "quick_gelu", "read_safetensors"]
