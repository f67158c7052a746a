from ._module import Keys as Keys
from ._module import Module as Module
from ._module import read_safetensors as read_safetensors
from .attention import BigBirdSelfAttention as BigBirdSelfAttention
from .attention import CrossAttention as CrossAttention
from .attention import LinformerSelfAttention as LinformerSelfAttention
from .attention import LongformerSelfAttention as LongformerSelfAttention
from .attention import MultiheadAttention as MultiheadAttention
from .attention import SelfAttention as SelfAttention
from .attention import SelfAttention2d as SelfAttention2d
from .detection import DETR as DETR
from .detection import MLP as MLP
from .detection import Detections as Detections
from .detection import DETRDecoder as DETRDecoder
from .detection import DETRDecoderLayer as DETRDecoderLayer
from .detection import DETREncoder as DETREncoder
from .detection import DETREncoderLayer as DETREncoderLayer
from .detection import DETRTransformer as DETRTransformer
from .graph import GATConv as GATConv
from .graph import GATv2Conv as GATv2Conv
from .layers import Conv2d as Conv2d
from .layers import Embedding as Embedding
from .layers import LayerNorm as LayerNorm
from .layers import Linear as Linear
from .layers import PatchEmbedding as PatchEmbedding
from .layers import RMSNorm as RMSNorm
from .layers import Sequential as Sequential
from .layers import quick_gelu as quick_gelu
from .recurrent import GRU as GRU
from .recurrent import BahdanauAttention as BahdanauAttention
from .recurrent import LuongAttention as LuongAttention
from .recurrent import RecurrentEncoderDecoder as RecurrentEncoderDecoder
from .recurrent import RecurrentState as RecurrentState
from .transformer import LayerCache as LayerCache
from .transformer import Transformer as Transformer
from .transformer import TransformerDecoder as TransformerDecoder
from .transformer import TransformerDecoderLayer as TransformerDecoderLayer
from .transformer import TransformerEncoder as TransformerEncoder
from .transformer import TransformerEncoderLayer as TransformerEncoderLayer

__all__ = ["BahdanauAttention", "BigBirdSelfAttention", "Conv2d", "CrossAttention", "DETR", "DETRDecoder",
           "DETRDecoderLayer", "DETREncoder", "DETREncoderLayer", "DETRTransformer", "Detections", "Embedding",
           "GATConv", "GATv2Conv", "GRU", "Keys", "LayerCache", "LayerNorm", "Linear", "LinformerSelfAttention",
           "LongformerSelfAttention", "LuongAttention", "MLP", "Module", "MultiheadAttention", "PatchEmbedding",
           "RMSNorm", "RecurrentEncoderDecoder", "RecurrentState", "SelfAttention", "SelfAttention2d", "Sequential",
           "Transformer", "TransformerDecoder", "TransformerDecoderLayer", "TransformerEncoder",
           "TransformerEncoderLayer", "quick_gelu", "read_safetensors"]
