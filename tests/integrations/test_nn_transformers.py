"""Layers of `fastattn.nn` beside those of transformers, with the same weights, in float64; models: test_models.py.

Bounds are those of test_nn_torch.py: twice the terms of all sums behind an element, times u and the largest element,
with room for what cancels.
"""

import numpy as np
import pytest

import fastattn as fa
from fastattn import nn

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


def assert_near(actual, expected, depth):
    assert actual.shape == expected.shape
    bound = 2 * depth * 2.0**-53 * 32 * max(np.abs(expected).max(), 1)
    assert np.abs(actual - expected).max() <= bound


@pytest.mark.parametrize("tokens", [(), (0,), (0, 5, 30)])
@pytest.mark.parametrize("padding", [0, 7])
def test_longformer(tokens, padding):
    from transformers import LongformerConfig
    from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

    torch.manual_seed(0)
    config = LongformerConfig(hidden_size=12, num_attention_heads=3, attention_window=[8], num_hidden_layers=1)
    theirs = LongformerSelfAttention(config, 0).double().eval()
    mine = nn.LongformerSelfAttention(12, 3, 8, dtype="float64")
    mine.load_state_dict(theirs)
    S = 40  # a multiple of the window, as theirs wants
    x = np.random.default_rng(0).standard_normal((2, S, 12))
    hidden = np.arange(S) >= np.array([[S], [S - padding]])
    marks = np.where(hidden, -10000.0, 0.0)
    marks[:, list(tokens)] = 10000.0
    marks = torch.from_numpy(marks)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), attention_mask=marks, is_index_masked=marks < 0,
                          is_index_global_attn=marks > 0, is_global_attn=bool(tokens))[0].numpy()
    out = mine(x, tokens, hidden if padding else None)
    # Their softmax is float32's: a weight is off by u times the terms of its sum, a few, and twice the largest score.
    q, k, v = (np.abs(np.stack([getattr(mine, part + end)(x) for end in ("", "_global")]))
               for part in ("query", "key", "value"))
    largest = (q.max(axis=(0, 1, 2)) * k.max(axis=(0, 1, 2))).reshape(3, 4).sum(axis=1).max() / 2
    bound = 2.0**-24 * (S + 8 + 2 * largest) * v.max()
    assert bound < 1e-4
    worst = np.abs(out - expected)[~hidden].max()  # theirs are 0 in padding
    assert worst <= bound, f"{worst:.3g} apart, bound {bound:.3g}"


def test_patches():
    from transformers import ViTConfig
    from transformers.models.vit.modeling_vit import ViTPatchEmbeddings

    torch.manual_seed(0)
    theirs = ViTPatchEmbeddings(ViTConfig(image_size=12, patch_size=4, hidden_size=10)).double()
    mine = nn.PatchEmbedding(3, 10, 4, dtype="float64")
    mine.proj.load_state_dict(theirs, prefix="projection.")
    x = np.random.default_rng(0).standard_normal((2, 3, 12, 12))
    with torch.no_grad():
        assert_near(mine(x), theirs(torch.from_numpy(x)).numpy(), 48)


def test_positions_of_detr():
    from transformers.models.detr import modeling_detr

    for normalize in True, False:
        embed = modeling_detr.DetrSinePositionEmbedding(8, normalize=normalize)
        theirs = embed((1, 1, 5, 7), "cpu", torch.float64).numpy()[0].transpose(1, 2, 0)
        ours = fa.positions.sinusoidal_2d(5, 7, 16, normalize=normalize)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2.0**-25 + 2.0**-47)  # ours are rounded to float32
        ours = fa.positions.sinusoidal_2d(5, 7, 16, normalize=normalize, dtype="float64")
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2.0**-47)
