from typing import Any

from numpy.typing import NDArray

from .attention import _Array, _Integer, _Number

def linformer_attention(
    query: _Array, key: _Array, value: _Array, key_projection: _Array, value_projection: _Array | None = None,
    **options: Any,
) -> Any: ...
def nystrom_attention(
    query: _Array, key: _Array, value: _Array, num_landmarks: _Integer = 64, *, iterations: _Integer = 6,
    scale: _Number | None = None, num_threads: _Integer | None = None,
) -> NDArray[Any]: ...
def pseudo_inverse(a: _Array, iterations: int = 6) -> NDArray[Any]: ...
