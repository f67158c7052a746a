from collections.abc import Iterable, Iterator
from typing import Any

from numpy.typing import DTypeLike, NDArray

from .attention import attention as attention
from .attention import attention_weights as attention_weights
from .attention import varlen_attention as varlen_attention
from .bias import Bias
from .checks import Problem
from .gradient import attention_backward as attention_backward
from .gradient import varlen_attention_backward as varlen_attention_backward
from .graph import Call
from .graph import gat_attention as gat_attention
from .graph import gat_attention_backward as gat_attention_backward
from .graph import gatv2_attention as gatv2_attention
from .graph import gatv2_attention_backward as gatv2_attention_backward
from .graph import graph_attention as graph_attention
from .graph import graph_attention_backward as graph_attention_backward
from .merge import merge_states as merge_states

# The steps of the definition: tests put them together in other precisions.
_Index = tuple[int, ...]

def bias(bias: Bias, H: int, L: int, S: int, query_offset: int | None = None) -> NDArray[Any]: ...
def forward(problem: Problem, dtype: DTypeLike | None = None) -> None: ...
def forward_weights(problem: Problem) -> None: ...
def backward(problem: Problem, dtype: DTypeLike | None = None) -> None: ...
def run_graph(call: Call, dtype: DTypeLike | None = None) -> None: ...
def dropout(problem: Problem, batch: int, head: _Index) -> NDArray[Any]: ...
def philox(counter: Iterable[Any], seed: int) -> tuple[NDArray[Any], ...]: ...
def heads(problem: Problem) -> Iterator[tuple[int, _Index, _Index]]: ...
def sink(problem: Problem, head: _Index, dtype: type[Any]) -> Any: ...
def logits(
    problem: Problem, batch: int, head: _Index, kv_head: _Index, dtype: type[Any],
) -> tuple[NDArray[Any], NDArray[Any]]: ...
def softmax(
    scores: NDArray[Any], visible: NDArray[Any], sink: Any = None,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]: ...
def weighted_sum(weights: NDArray[Any], visible: NDArray[Any], v: NDArray[Any]) -> NDArray[Any]: ...
