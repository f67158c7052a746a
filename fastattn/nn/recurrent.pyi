from typing import Any, Literal, NamedTuple

from numpy.typing import ArrayLike, DTypeLike, NDArray

from ..attention import _Array, _Bool, _Integer, _Integers
from ._module import Module, _Seed
from .layers import Embedding, Linear

class BahdanauAttention(Module):
    Wa: Linear
    Ua: Linear
    Va: Linear
    def __init__(
        self, hidden_size: _Integer, query_size: _Integer | None = None, key_size: _Integer | None = None,
        bias: _Bool = True, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def project(self, keys: _Array) -> NDArray[Any]: ...
    def __call__(
        self, query: _Array, keys: _Array, *, projected: _Array | None = None, mask: _Array | None = None,
        kv_lengths: _Integers | None = None, return_weights: _Bool = False,
    ) -> Any: ...

class LuongAttention(Module):
    method: str
    hidden_size: int
    attn: Linear
    v: NDArray[Any]
    def __init__(
        self, method: Literal["dot", "general", "concat"], hidden_size: _Integer, key_size: _Integer | None = None,
        bias: _Bool = True, dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def project(self, keys: _Array) -> NDArray[Any]: ...
    def __call__(
        self, query: _Array, keys: _Array, *, projected: _Array | None = None, mask: _Array | None = None,
        kv_lengths: _Integers | None = None, return_weights: _Bool = False,
    ) -> Any: ...

class GRU(Module):
    input_size: int
    hidden_size: int
    bidirectional: bool
    weight_ih_l0: NDArray[Any]
    weight_hh_l0: NDArray[Any]
    bias_ih_l0: NDArray[Any] | None
    bias_hh_l0: NDArray[Any] | None
    weight_ih_l0_reverse: NDArray[Any]
    weight_hh_l0_reverse: NDArray[Any]
    bias_ih_l0_reverse: NDArray[Any] | None
    bias_hh_l0_reverse: NDArray[Any] | None
    def __init__(
        self, input_size: _Integer, hidden_size: _Integer, bias: _Bool = True, dtype: DTypeLike = "float32", *,
        bidirectional: _Bool = False, seed: _Seed = None,
    ) -> None: ...
    def __call__(
        self, x: _Array, h: _Array | None = None, lengths: _Integers | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]: ...

class RecurrentState(NamedTuple):
    hidden: NDArray[Any]
    annotations: NDArray[Any]
    projected: NDArray[Any]
    lengths: _Integers | None

class RecurrentEncoderDecoder(Module):
    hidden_size: int
    source_embedding: Embedding
    encoder: GRU
    bridge: Linear
    target_embedding: Embedding
    attention: BahdanauAttention | LuongAttention
    decoder: GRU
    Wc: Linear
    out: Linear
    def __init__(
        self, source_size: _Integer, target_size: _Integer, hidden_size: _Integer,
        attention: Literal["bahdanau", "dot", "general", "concat"] = "bahdanau", bidirectional: _Bool = True,
        dtype: DTypeLike = "float32", *, seed: _Seed = None,
    ) -> None: ...
    def encode(self, source: ArrayLike, lengths: _Integers | None = None) -> RecurrentState: ...
    def step(self, token: ArrayLike, state: RecurrentState) -> tuple[NDArray[Any], NDArray[Any], RecurrentState]: ...
    def __call__(
        self, source: ArrayLike, target: ArrayLike, lengths: _Integers | None = None, *, return_weights: _Bool = False,
    ) -> Any: ...
