"""The rounding error beside torch's on the same inputs."""

import math

import numpy as np
import pytest
from cases import exact, inputs

import fastattn as fa

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")

pytestmark = pytest.mark.compiled


def rms(error):
    return math.sqrt(np.mean(np.square(error, dtype=np.float64)))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("B, H, S, D", [(1, 8, 512, 64), (1, 4, 2048, 64), (1, 2, 2048, 128), (4, 12, 128, 64),
                                        (8, 8, 50, 64), (1, 2, 1000, 256), (1, 4, 300, 32)])
def test_rms_error_at_most_that_of_torch(B, H, S, D, size, seed):
    q, k, v = inputs(np.random.default_rng([seed, B, H, S, D]), (B,), H, H, S, S, D, D, np.float32)
    q *= size
    true, _ = exact(q, k, v)
    tensors = [torch.from_numpy(array) for array in (q, k, v)]
    with torch.no_grad():
        theirs = rms(torch.nn.functional.scaled_dot_product_attention(*tensors).numpy() - true)
    ours = rms(fa.attention(q, k, v) - true)
    assert ours <= theirs, (f"isa={fa.isa()}, case={(B, H, S, D)}, logits x {size}, seed={seed}: RMS error {ours:.4g}, "
                            f"torch's {theirs:.4g} (torch {torch.__version__})")
