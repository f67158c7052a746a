"""MiniLM's embeddings of sentences of Python's manual: packed in fastattn, padded in torch and ONNX Runtime.

Tokens are given, so that nobody's tokenizer counts. Peers take batches of 32 sentences of about one length, as
sentence-transformers does, or of 8; the faster counts. `python bench/encode.py FILE` writes the ONNX file: torch's
exporter leaves traces in the process.
"""

import re
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

import numpy as np

PEER_BATCHES = (8, 32)


def texts(n):
    """The first n sentences of the manual, of 4 to 119 words, in their order."""
    from pydoc_data import topics
    manual = re.sub(r"[*`=-]{2,}", " ", " ".join(topics.topics[name] for name in sorted(topics.topics)))
    parts = re.split(r"(?<=[.?!]) ", re.sub(r"\s+", " ", manual))
    return [part.strip() for part in parts if 3 < len(part.split()) < 120][:n]


def padded(tokens, batch):
    """(which, ids, mask) of batches of sentences sorted by length."""
    order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
    for which in (order[i : i + batch] for i in range(0, len(order), batch)):
        lengths = np.array([len(tokens[i]) for i in which])
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = np.zeros_like(mask)
        ids[mask == 1] = np.concatenate([tokens[i] for i in which])
        yield which, ids, mask


def embed(run, tokens, batch):
    """Unit vectors from run(ids, mask), the last hidden states."""
    vectors = np.empty((len(tokens), 384), np.float32)
    for which, ids, mask in padded(tokens, batch):
        hidden, seen = run(ids, mask), mask[..., None].astype(np.float32)
        means = (hidden * seen).sum(axis=1) / seen.sum(axis=1)
        vectors[which] = means / np.linalg.norm(means, axis=1, keepdims=True)
    return vectors


def model():
    import transformers as hf

    from fastattn.demos import sentences
    hf.logging.set_verbosity_error()
    return hf.BertModel.from_pretrained(sentences.model_folder(), add_pooling_layer=False).eval()


def torch_call(threads):
    import torch
    torch.set_num_threads(threads)
    bert = model()

    def run(ids, mask):
        with torch.inference_mode():
            return bert(torch.from_numpy(ids), torch.from_numpy(mask)).last_hidden_state.numpy()
    return run


def export(path):
    import torch
    bert = model().requires_grad_(False)
    bert.set_attn_implementation("eager")

    class Hidden(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = bert

        def forward(self, ids, mask):
            return self.bert(ids, mask, torch.zeros_like(ids)).last_hidden_state

    axes = {0: "sentences", 1: "tokens"}
    ones = torch.ones(2, 8, dtype=torch.long)
    torch.onnx.export(Hidden(), (ones, ones), path, input_names=["ids", "mask"], output_names=["hidden"],
                      dynamic_axes={"ids": axes, "mask": axes, "hidden": axes}, dynamo=False, opset_version=17)


def onnxruntime_call(threads):
    import onnxruntime as ort
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "minilm.onnx")
        done = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            errors = [line for line in done.stderr.splitlines() if "Error" in line]
            raise ImportError(f"no ONNX file: {errors[-1] if errors else done.returncode}")
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"ids": ids, "mask": mask})[0]


def calls(tokens, threads):
    """{(name, batch): a call} of the peers, and {name: why not} of those that are missing."""
    made, missing = {}, {}
    for name, build in ("torch", torch_call), ("onnxruntime", onnxruntime_call):
        try:
            run = build(threads)
        except ImportError as reason:
            missing[name] = str(reason)
            continue
        for batch in PEER_BATCHES:
            made[name, batch] = partial(embed, run, tokens, batch)
    return made, missing


if __name__ == "__main__":
    export(sys.argv[1])
