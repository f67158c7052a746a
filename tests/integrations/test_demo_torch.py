"""The demos' models beside the originals: the same weights in torch."""

import numpy as np
import pytest

from fastattn.demos import sentences

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")
MISSING = sentences.missing_packages()


@pytest.fixture(scope="module")
def theirs():
    """Mean-pooled unit vectors of token ids, one sentence at a time: no padding, no mask."""
    from transformers import BertModel

    model = BertModel.from_pretrained(sentences.model_folder(), add_pooling_layer=False).eval()

    def embed(tokens):
        with torch.no_grad():
            means = torch.stack([model(torch.tensor([ids])).last_hidden_state[0].mean(dim=0) for ids in tokens])
        return torch.nn.functional.normalize(means).numpy()
    return embed


@pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)} missing")
def test_minilm(theirs):
    encoder = sentences.Encoder()
    tokens = encoder.tokenize(sentences.SENTENCES)
    expected, mine = theirs(tokens), encoder.embed_tokens(tokens)
    cosines = (expected.astype(np.float64) * mine).sum(axis=1)
    assert cosines.min() >= 0.999999
    # Another model: the comparison notices.
    encoder.layers[3].norm2.weight = encoder.layers[3].norm2.weight * np.float32(1.01)
    assert (expected * encoder.embed_tokens(tokens)).sum(axis=1).min() < 0.999999
