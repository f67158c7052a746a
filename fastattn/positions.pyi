from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

def alibi_slopes(H: int | np.integer[Any]) -> NDArray[np.float64]: ...
def relative_buckets(
    distance: ArrayLike, num_buckets: int | np.integer[Any] = 32, *, bidirectional: bool | np.bool_ = True,
    max_distance: int | np.integer[Any] = 128,
) -> NDArray[np.int64]: ...
