from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple, overload

from numpy.typing import NDArray

from .attention import _Array, _Integer, _Normalizer, _Number

OUTPUT: int
GRADIENT: int
SUM: int
SCORES: int
LEVELS: int
DELTA: int
DOT: int
LEAKY: int
TASK: int
ROW: int
PART: int
kernel: ContextVar[Callable[[Call], None]]

class Graph:
    shape: tuple[int, int]
    begin: NDArray[Any]
    end: NDArray[Any]
    order: NDArray[Any] | None
    source: NDArray[Any]
    def __init__(self, graph: Any) -> None: ...
    @property
    def edges(self) -> int: ...
    def targets(self) -> NDArray[Any]: ...
    def sources(self) -> NDArray[Any]: ...
    def transposed(self) -> Graph: ...

class Call:
    mode: int
    score: int
    def __init__(self, **values: Any) -> None: ...
    def but(self, **values: Any) -> Call: ...
    def __getattr__(self, name: str) -> Any: ...

class GraphGradients(NamedTuple):
    query: NDArray[Any]
    key: NDArray[Any]
    value: NDArray[Any]
    edge_bias: NDArray[Any] | None
    edge_key: NDArray[Any] | None
    edge_value: NDArray[Any] | None
    sinks: NDArray[Any] | None

class GATGradients(NamedTuple):
    source: NDArray[Any]
    target: NDArray[Any]
    value: NDArray[Any]
    edge_logits: NDArray[Any] | None

class GATv2Gradients(NamedTuple):
    source: NDArray[Any]
    target: NDArray[Any]
    weight: NDArray[Any]
    value: NDArray[Any] | None
    edge_features: NDArray[Any] | None

def run(
    call: Call, graph: Graph, results: tuple[str, ...], merge: Callable[[int, dict[str, NDArray[Any]]], None],
) -> NDArray[Any] | None: ...
@overload
def graph_attention(
    query: _Array, key: _Array, value: _Array, graph: Graph | Any, *, edge_bias: _Array | None = None, edge_key:
    _Array | None = None, edge_value: _Array | None = None, scale: _Number | None = None, softcap: _Number | None =
    None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer |
    None = None, out: NDArray[Any] | None = None, return_lse: Literal[False] = False, num_threads: _Integer | None =
    None,
) -> NDArray[Any]: ...
@overload
def graph_attention(
    query: _Array, key: _Array, value: _Array, graph: Graph | Any, *, edge_bias: _Array | None = None, edge_key:
    _Array | None = None, edge_value: _Array | None = None, scale: _Number | None = None, softcap: _Number | None =
    None, sinks: _Array | None = None, normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer |
    None = None, out: NDArray[Any] | None = None, return_lse: Literal[True], num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def graph_attention_backward(
    grad_out: _Array, query: _Array, key: _Array, value: _Array, out: _Array, lse: _Array, graph: Graph | Any, *,
    grad_lse: _Array | None = None, edge_bias: _Array | None = None, edge_key: _Array | None = None, edge_value:
    _Array | None = None, scale: _Number | None = None, softcap: _Number | None = None, sinks: _Array | None = None,
    normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer | None = None, num_threads: _Integer
    | None = None,
) -> GraphGradients: ...
@overload
def gat_attention(
    source: _Array, target: _Array, value: _Array, graph: Graph | Any, *, negative_slope: _Number = 0.2, edge_logits:
    _Array | None = None, normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer | None = None,
    out: NDArray[Any] | None = None, return_lse: Literal[False] = False, num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def gat_attention(
    source: _Array, target: _Array, value: _Array, graph: Graph | Any, *, negative_slope: _Number = 0.2, edge_logits:
    _Array | None = None, normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer | None = None,
    out: NDArray[Any] | None = None, return_lse: Literal[True], num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def gat_attention_backward(
    grad_out: _Array, source: _Array, target: _Array, value: _Array, out: _Array, lse: _Array, graph: Graph | Any, *,
    grad_lse: _Array | None = None, negative_slope: _Number = 0.2, edge_logits: _Array | None = None, normalizer:
    _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer | None = None, num_threads: _Integer | None =
    None,
) -> GATGradients: ...
@overload
def gatv2_attention(
    source: _Array, target: _Array, weight: _Array, graph: Graph | Any, *, value: _Array | None = None,
    negative_slope: _Number = 0.2, edge_features: _Array | None = None, normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None, return_lse:
    Literal[False] = False, num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
@overload
def gatv2_attention(
    source: _Array, target: _Array, weight: _Array, graph: Graph | Any, *, value: _Array | None = None,
    negative_slope: _Number = 0.2, edge_features: _Array | None = None, normalizer: _Normalizer = "softmax",
    dropout_p: _Number = 0.0, seed: _Integer | None = None, out: NDArray[Any] | None = None, return_lse:
    Literal[True], num_threads: _Integer | None = None,
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def gatv2_attention_backward(
    grad_out: _Array, source: _Array, target: _Array, weight: _Array, out: _Array, lse: _Array, graph: Graph | Any, *,
    grad_lse: _Array | None = None, value: _Array | None = None, negative_slope: _Number = 0.2, edge_features: _Array
    | None = None, normalizer: _Normalizer = "softmax", dropout_p: _Number = 0.0, seed: _Integer | None = None,
    num_threads: _Integer | None = None,
) -> GATv2Gradients: ...
