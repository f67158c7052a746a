from contextlib import AbstractContextManager
from typing import SupportsIndex

from . import masks as masks
from . import nn as nn
from . import positions as positions
from . import reference as reference
from .additive import additive_attention as additive_attention
from .additive import additive_attention_backward as additive_attention_backward
from .attention import attention as attention
from .attention import attention_weights as attention_weights
from .attention import varlen_attention as varlen_attention
from .bias import ALiBi as ALiBi
from .bias import RelativeBias as RelativeBias
from .cache import KVCache as KVCache
from .gradient import attention_backward as attention_backward
from .gradient import varlen_attention_backward as varlen_attention_backward
from .graph import Graph as Graph
from .graph import gat_attention as gat_attention
from .graph import gat_attention_backward as gat_attention_backward
from .graph import gatv2_attention as gatv2_attention
from .graph import gatv2_attention_backward as gatv2_attention_backward
from .graph import graph_attention as graph_attention
from .graph import graph_attention_backward as graph_attention_backward
from .layer import PackedWeight as PackedWeight
from .layer import linear as linear
from .layer import pack_weight as pack_weight
from .linear_attention import LinearState as LinearState
from .linear_attention import linear_attention as linear_attention
from .linear_attention import linear_attention_backward as linear_attention_backward
from .lowrank import linformer_attention as linformer_attention
from .lowrank import nystrom_attention as nystrom_attention
from .merge import merge_states as merge_states
from .score import ScoreMod as ScoreMod

__all__ = ["ALiBi", "Graph", "KVCache", "LinearState", "PackedWeight", "RelativeBias", "ScoreMod",
           "additive_attention", "additive_attention_backward", "attention", "attention_backward", "attention_weights",
           "gat_attention", "gat_attention_backward", "gatv2_attention", "gatv2_attention_backward", "get_include",
           "get_num_threads", "graph_attention", "graph_attention_backward", "isa", "linear", "linear_attention",
           "linear_attention_backward", "linformer_attention", "masks", "merge_states", "nn", "nystrom_attention",
           "pack_weight", "positions", "reference", "set_num_threads", "show_config", "threads", "varlen_attention",
           "varlen_attention_backward"]

__version__: str

def get_include() -> str: ...
def get_num_threads() -> int: ...
def isa() -> str: ...
def set_num_threads(n: SupportsIndex) -> None: ...
def show_config() -> None: ...
def threads(n: SupportsIndex) -> AbstractContextManager[None]: ...
