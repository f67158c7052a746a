"""Exact attention for NumPy arrays at the speed of the processor.

    import fastattn as fa
    out = fa.attention(query, key, value, causal=True)
"""
from pkgutil import extend_path

# A checkout on the path (`python -m fastattn` at its root) shadows the installed package but has no compiled modules:
# look for them in the installed one too.
__path__ = extend_path(__path__, __name__)

from . import masks, positions, reference
from ._runtime import config as _config
from ._runtime import (
    get_include,
    get_num_threads,
    isa,
    set_num_threads,
    show_config,
    threads,
)
from .additive import additive_attention, additive_attention_backward
from .attention import attention, attention_weights, varlen_attention
from .bias import ALiBi, RelativeBias
from .cache import KVCache
from .gradient import attention_backward, varlen_attention_backward
from .graph import (
    Graph,
    gat_attention,
    gat_attention_backward,
    gatv2_attention,
    gatv2_attention_backward,
    graph_attention,
    graph_attention_backward,
)
from .layer import PackedWeight, linear, pack_weight
from .linear_attention import LinearState, linear_attention, linear_attention_backward
from .lowrank import linformer_attention, nystrom_attention
from .merge import merge_states
from .score import ScoreMod

from . import nn  # isort: skip - made of the functions above

__version__ = _config()["fastattn"]

__all__ = ["ALiBi", "Graph", "KVCache", "LinearState", "PackedWeight", "RelativeBias", "ScoreMod",
           "additive_attention", "additive_attention_backward", "attention", "attention_backward", "attention_weights",
           "gat_attention", "gat_attention_backward", "gatv2_attention", "gatv2_attention_backward", "get_include",
           "get_num_threads", "graph_attention", "graph_attention_backward", "isa", "linear", "linear_attention",
           "linear_attention_backward", "linformer_attention", "masks", "merge_states", "nn", "nystrom_attention",
           "pack_weight", "positions", "reference", "set_num_threads", "show_config", "threads", "varlen_attention",
           "varlen_attention_backward"]
