"""`fastattn.nn` beside the definitions, written out in NumPy, and what only NumPy arrays need.

Float64 layers are compared: results differ from the definition's by the rounding of sums alone, see `assert_near`.
"""

import copy
import doctest
import itertools
import json
import pickle
import struct

import numpy as np
import pytest

import fastattn as fa
from fastattn import nn

D64 = {"dtype": "float64", "seed": 0}


def assert_near(actual, expected, depth, u=2.0**-53):
    """``depth``: terms of all sums behind an element. Each of two orders of summation is off by at most depth u times
    the sum of magnitudes, which for the normal inputs here is taken as 32 times the largest element."""
    assert actual.shape == expected.shape
    bound = 2 * depth * u * 32 * max(np.abs(expected).max(initial=0), 1)
    worst = np.abs(actual - expected).max(initial=0)
    assert worst <= bound, f"{worst:.3g} apart, bound {bound:.3g}"


def drawn(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def softmax(scores):
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def apply(layer, x):
    y = x @ layer.weight.reshape(len(layer.weight), -1).T
    return y if layer.bias is None else y + layer.bias


def heads(x, n):
    return x.reshape(*x.shape[:2], n, -1).swapaxes(1, 2)


def attend(q, k, v, scale=None, allowed=True):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = softmax(np.where(allowed, scale * q @ k.swapaxes(-1, -2), -np.inf))
    return weights @ v, weights


# --- state dicts and weights ---

MODULES = [
    lambda **o: nn.Linear(4, 3, **o), lambda **o: nn.Conv2d(2, 3, 2, **o), lambda **o: nn.PatchEmbedding(2, 6, 2, **o),
    lambda **o: nn.Embedding(5, 4, **o), lambda **o: nn.MultiheadAttention(4, 2, **o),
    lambda **o: nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True, bias=False, **o),
    lambda **o: nn.SelfAttention(4, **o), lambda **o: nn.CrossAttention(4, 3, bias=True, **o),
    lambda **o: nn.SelfAttention2d(8, **o), lambda **o: nn.LongformerSelfAttention(4, 2, 2, **o),
    lambda **o: nn.BigBirdSelfAttention(4, 2, 2, **o), lambda **o: nn.LinformerSelfAttention(4, 6, 2, 2, **o),
    lambda **o: nn.GATConv(4, 3, 2, edge_dim=2, residual=True, **o), lambda **o: nn.GATv2Conv((4, 3), 3, 2, **o),
    lambda **o: nn.BahdanauAttention(4, **o), lambda **o: nn.LuongAttention("concat", 4, **o),
    lambda **o: nn.GRU(4, 3, **o), lambda **o: nn.GRU(4, 3, bidirectional=True, **o),
    lambda **o: nn.Transformer(4, 2, 2, 1, 6, **o), lambda **o: nn.MultiheadAttention(4, 2, head_dim=3, **o),
    lambda **o: nn.DETR(3, 2, 5, 8, 2, 2, 1, 6, **o), lambda **o: nn.RecurrentEncoderDecoder(5, 6, 4, **o),
    lambda **o: nn.RecurrentEncoderDecoder(5, 6, 4, "concat", False, **o),
]


@pytest.mark.parametrize("make", MODULES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_states(make, dtype):
    module, other = make(dtype=dtype, seed=0), make(dtype=dtype, seed=1)
    state = module.state_dict()
    assert state and all(w.dtype == dtype for w in state.values())
    same = make(dtype=dtype, seed=0).state_dict()
    assert all(np.array_equal(same[name], state[name]) for name in state)
    assert any(not np.array_equal(w, state[name]) for name, w in other.state_dict().items() if w.any()) \
        or isinstance(module, nn.LayerNorm)
    assert other.load_state_dict(state) == ([], [])
    for name, w in other.state_dict().items():
        assert w is not state[name]
        np.testing.assert_array_equal(w, state[name])
    for again in copy.deepcopy(module), pickle.loads(pickle.dumps(module)):
        assert list(again.state_dict()) == list(state)


def test_state_errors_come_together_and_change_nothing():
    layer = nn.TransformerEncoderLayer(4, 2, 6, seed=0)
    before = layer.state_dict()
    state = {name: w + 1 for name, w in before.items()}
    del state["norm1.bias"], state["linear1.weight"]
    state |= {"more": np.zeros(3), "linear2.bias": np.zeros(5), "norm2.bias": np.zeros((1, 4))}
    with pytest.raises(ValueError) as error:
        layer.load_state_dict(state)
    for part in ("state must fit TransformerEncoderLayer", "missing linear1.weight, norm1.bias", "unexpected more",
                 "linear2.bias must have shape (4,), got (5,)", "norm2.bias must have shape (4,), got (1, 4)"):
        assert part in str(error.value)
    assert all(w is before[name] for name, w in layer.state_dict().items())
    with pytest.raises(ValueError, match="linear2.bias must have shape"):
        layer.load_state_dict(state, strict=False)
    del state["linear2.bias"], state["norm2.bias"]
    keys = layer.load_state_dict(state, strict=False)
    assert keys.missing_keys == ["linear1.weight", "linear2.bias", "norm1.bias", "norm2.bias"]
    assert keys.unexpected_keys == ["more"]
    np.testing.assert_array_equal(layer.norm1.weight, state["norm1.weight"])
    with pytest.raises(TypeError, match="weight must be of floats, got int64"):
        nn.Linear(1, 1).load_state_dict({"weight": np.ones((1, 1), int), "bias": np.ones(1)})
    with pytest.raises(TypeError, match="state must be a dict"):
        layer.load_state_dict([1])


def test_prefix():
    state = {"encoder." + name: w for name, w in nn.Linear(2, 2, seed=1).state_dict().items()} | {"x": np.zeros(1)}
    layer = nn.Linear(2, 2, seed=0)
    layer.load_state_dict(state, prefix="encoder.")
    np.testing.assert_array_equal(layer.weight, state["encoder.weight"])


def test_a_file_of_tensors(tmp_path):
    """The format: the size of a header, the header as JSON, the numbers."""
    weight, bias = np.array([[1.5, -2.0]], np.float32), np.array([0.25], np.float16)
    header = {"__metadata__": {"format": "np"}, "ids": {"dtype": "I32", "shape": [1], "data_offsets": [8, 12]},
              "weight": {"dtype": "BF16", "shape": [1, 2], "data_offsets": [0, 4]},
              "bias": {"dtype": "F16", "shape": [1], "data_offsets": [4, 6]}}
    text = json.dumps(header).encode()
    data = (weight.view(np.uint32) >> 16).astype(np.uint16).tobytes() + bias.tobytes() + bytes(6)
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    layer = nn.Linear(2, 1)
    layer.load_state_dict(str(path))
    np.testing.assert_array_equal(layer.weight, weight)
    np.testing.assert_array_equal(layer.bias, bias)
    path.write_bytes(struct.pack("<Q", 10**6) + text)
    with pytest.raises(ValueError, match="must be a .safetensors file"):
        nn.read_safetensors(path)


def test_weights_are_packed_once_and_again_when_replaced(monkeypatch):
    packed = []
    pack = fa.pack_weight
    monkeypatch.setattr("fastattn.nn._module.pack_weight", lambda *args: packed.append(args) or pack(*args))
    layer, x = nn.MultiheadAttention(4, 2, batch_first=True, seed=0), drawn(1, 3, 4).astype(np.float32)
    first = layer(x, x, x)[0]
    assert len(packed) == 2  # Q, K and V are one product; and what is behind attention
    np.testing.assert_array_equal(layer(x, x, x)[0], first)
    assert len(packed) == 2
    layer.in_proj_weight = 2 * layer.in_proj_weight
    assert not np.array_equal(layer(x, x, x)[0], first) and len(packed) == 3
    pair = nn.SelfAttention(4, bias=True, seed=0)
    pair(x)
    assert len(packed) == 4  # W_q, W_k and W_v are one product
    before = pair(x)
    pair.W_k.bias = pair.W_k.bias + 1
    pair.W_v.weight = -pair.W_v.weight
    after = pair(x)
    assert len(packed) == 5 and not np.array_equal(before, after)
    np.testing.assert_array_equal(copy.deepcopy(pair)(x), after)


def test_bfloat16_weights():
    """Half of the memory; results are those of the rounded weights where inputs are not rounded too."""
    layer, x = nn.Linear(6, 5, seed=0), drawn(3, 6).astype(np.float32)
    full = layer(x)
    assert layer.pack("bfloat16") is layer
    rounded = fa.linear(x, fa.pack_weight(layer.weight, "bfloat16"), layer.bias)
    np.testing.assert_array_equal(layer(x), rounded)
    assert not np.array_equal(rounded, full)
    # Each of x and the weights is off by at most 2^-9 of itself where both are rounded.
    bound = (2.0**-8 + 2.0**-18 + 20 * 2.0**-24) * (np.abs(x) @ np.abs(layer.weight).T) + 2.0**-23 * np.abs(full)
    assert (np.abs(rounded - full) <= bound).all()
    np.testing.assert_array_equal(layer.pack()(x), full)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, seed=0)
    y = drawn(2, 4, 8).astype(np.float32)
    before = model(y)
    assert not np.array_equal(model.pack("bfloat16")(y), before)
    np.testing.assert_array_equal(model.pack()(y), before)
    with pytest.raises(ValueError, match="dtype must be None or 'bfloat16'"):
        model.pack("int8")


def test_random_weights_are_spread_as_torchs():
    layer = nn.Linear(100, 400, seed=0)
    assert 0.099 < np.abs(layer.weight).max() <= 0.1 and 0.09 < np.abs(layer.bias).max() <= 0.1
    assert abs(layer.weight.std() - 0.1 / 3**0.5) < 1e-3
    assert not np.array_equal(nn.Linear(3, 3).weight, nn.Linear(3, 3).weight)


# --- attention ---

@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention(batch_first, bias):
    layer = nn.MultiheadAttention(6, 3, bias=bias, batch_first=batch_first, **D64)
    if bias:
        layer.in_proj_bias = drawn(18)
    x, y = drawn(2, 5, 6), drawn(2, 4, 6)
    hidden = np.arange(4) >= np.array([[4], [2]])
    parts = layer.in_proj_weight.reshape(3, 6, 6), (np.zeros((3, 6)) if layer.in_proj_bias is None
                                                    else layer.in_proj_bias.reshape(3, 6))
    q, k, v = (heads(a @ w.T + b, 3) for a, w, b in zip((x, y, y), *parts))
    context, weights = attend(q, k, v, allowed=~hidden[:, None, None])
    expected = apply(layer.out_proj, context.swapaxes(1, 2).reshape(2, 5, 6))
    given = (x, y) if batch_first else (x.swapaxes(0, 1), y.swapaxes(0, 1))
    out, aligned = layer(given[0], given[1], given[1], hidden)
    assert_near(out if batch_first else out.swapaxes(0, 1), expected, 30)
    assert_near(aligned, weights.mean(axis=1), 30)
    assert_near(layer(given[0], given[1], given[1], hidden, average_attn_weights=False)[1], weights, 30)


def test_rows_that_see_no_key():
    layer = nn.MultiheadAttention(4, 2, batch_first=True, seed=0)
    layer.out_proj.bias = np.arange(4, dtype=np.float32)
    x = drawn(2, 3, 4).astype(np.float32)
    out, weights = layer(x, x, x, np.array([[True] * 3, [False] * 3]))
    np.testing.assert_array_equal(out[0], np.broadcast_to(layer.out_proj.bias, (3, 4)))
    assert not weights[0].any() and np.isfinite(out).all()


def test_multihead_attention_errors():
    x = drawn(2, 3, 4).astype(np.float32)
    layer = nn.MultiheadAttention(4, 2, batch_first=True)
    for args, options, error, text in [
            ((x[..., :3], x, x), {}, ValueError, "query must have shape"),
            ((x, x[0], x[0]), {}, ValueError, "query's 3 axes"),
            ((x, x[:1], x[:1]), {}, ValueError, "query's 2 batches"),
            ((x, x, x[:, :2]), {}, ValueError, "value must have key's leading axes"),
            ((x, x, x, np.zeros((2, 4), bool)), {}, ValueError, "key_padding_mask must have shape"),
            ((x, x, x), {"attn_mask": np.zeros((2, 3), bool)}, ValueError, "attn_mask must have shape"),
            ((x, x, x), {"attn_mask": np.zeros((3, 3), int)}, TypeError, "attn_mask must be of bools"),
            ((x, x, x), {"cache": layer.new_cache(2, 4)}, ValueError, "cache must come with"),
            ((x.astype(np.float64),) * 3, {}, TypeError, "float64")]:
        with pytest.raises(error, match=text):
            layer(*args, **options)
    with pytest.raises(ValueError, match="embed_dim must be a multiple of num_heads 3"):
        nn.MultiheadAttention(4, 3)
    with pytest.raises(ValueError, match="activation must be"):
        nn.TransformerEncoderLayer(4, 2, activation="tanh")


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 5])
def test_heads_of_another_size(batch_first, kdim):
    layer = nn.MultiheadAttention(6, 3, kdim=kdim, head_dim=4, batch_first=batch_first, **D64)
    layer.in_proj_bias, layer.out_proj.bias = drawn(36), drawn(6)
    assert layer.out_proj.weight.shape == (6, 12)
    parts = [layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight] if kdim \
        else layer.in_proj_weight.reshape(3, 12, 6)
    x, y, z = drawn(2, 5, 6), drawn(2, 4, kdim or 6), drawn(2, 4, 6, seed=1)
    q, k, v = (heads(a @ w.T + b, 3) for a, w, b in zip((x, y, z), parts, layer.in_proj_bias.reshape(3, 12)))
    context, weights = attend(q, k, v)
    assert q.shape[-1] == 4
    out, aligned = layer(*(a if batch_first else a.swapaxes(0, 1) for a in (x, y, z)))
    assert_near(out if batch_first else out.swapaxes(0, 1), apply(layer.out_proj, context.swapaxes(1, 2)
                                                                  .reshape(2, 5, 12)), 30)
    assert_near(aligned, weights.mean(axis=1), 30)
    with pytest.raises(ValueError, match="head_dim must be"):
        nn.MultiheadAttention(6, 3, head_dim=0)


@pytest.mark.parametrize("same", ["all", "query and key", "key and value", "query and value", "none"])
def test_what_is_one_object_is_one_product(same, monkeypatch):
    """The same numbers, by fewer products."""
    layer, x = nn.MultiheadAttention(6, 3, batch_first=True, **D64), drawn(2, 4, 6)
    layer.in_proj_bias = drawn(18)
    y = x.copy()
    given, products = {"all": ((x, x, x), 1), "query and key": ((x, x, y), 2), "key and value": ((x, y, y), 2),
                       "query and value": ((x, y, x), 3), "none": ((x, y, x.copy()), 3)}[same]
    q, k, v = (heads(x @ w.T + b, 3) for w, b in zip(layer.in_proj_weight.reshape(3, 6, 6),
                                                     layer.in_proj_bias.reshape(3, 6)))
    calls, linear = [], fa.linear
    monkeypatch.setattr("fastattn.nn.attention.linear", lambda *args: calls.append(args) or linear(*args))
    out = layer(*given, need_weights=False)[0]
    assert len(calls) == products
    assert_near(out, apply(layer.out_proj, attend(q, k, v)[0].swapaxes(1, 2).reshape(2, 4, 6)), 30)


def test_options_of_attention():
    """Those of the layer and of a call, beside torch's masks, in the positions of the first query and key."""
    S, x = 7, drawn(2, 7, 6)
    hidden, distance = np.arange(S) >= np.array([[S], [4]]), np.subtract.outer(np.arange(S), np.arange(S))
    table = drawn(3, 5)
    bias = table[:, np.clip(-distance, -2, 2) + 2]
    layer = nn.MultiheadAttention(6, 3, batch_first=True, options={"scale": 1.0}, **D64)
    q, k, v = (heads(x @ w.T, 3) for w in layer.in_proj_weight.reshape(3, 6, 6))

    def expected(allowed, scale=1.0, bias=0.0):
        weights = softmax(np.where(allowed, scale * q @ k.swapaxes(2, 3) + bias, -np.inf))
        return apply(layer.out_proj, (weights @ v).swapaxes(1, 2).reshape(x.shape)), weights

    seen = ~hidden[:, None, None]
    cases = [({}, {}, expected(True)), ({"scale": 0.3}, {}, expected(True, 0.3)),
             ({"bias": fa.RelativeBias(table)}, {"key_padding_mask": hidden}, expected(seen, bias=bias)),
             ({"bias": fa.RelativeBias(table)}, {"is_causal": True}, expected(distance >= 0, bias=bias)),
             ({"window": (1, 0)}, {"key_padding_mask": hidden},
              expected(seen & ((distance <= 1) & (distance >= 0) | (np.arange(S)[:, None] > 4)))),
             ({"mask": fa.masks.window(1)}, {}, expected(abs(distance) <= 1)),
             ({"mask": abs(distance) <= 1}, {"attn_mask": 0.1 * distance}, expected(abs(distance) <= 1,
                                                                                    bias=0.1 * distance))]
    for options, call, (out, weights) in cases:
        rows = slice(0, 5) if "window" in options and "key_padding_mask" in call else slice(None)  # later see none
        found = layer(x, x, x, average_attn_weights=False, **call, **options)
        assert_near(found[0][:, rows], out[:, rows], 40)
        assert_near(found[1][:, :, rows], weights[:, :, rows], 40)
        layer.options = {"scale": 1.0} | options
        np.testing.assert_array_equal(layer(x, x, x, **call)[0], found[0])
        layer.options = {"scale": 1.0}
    with pytest.raises(TypeError, match="options must be among mask, .*, got dropout_p, out"):
        layer(x, x, x, out=x, dropout_p=0.1)
    with pytest.raises(ValueError, match="bias must not come beside float masks"):
        layer(x, x, x, attn_mask=1.0 * distance, bias=fa.RelativeBias(table))
    with pytest.raises(ValueError, match="mask must not come beside bool masks"):
        layer(x, x, x, attn_mask=distance > 1, mask=fa.masks.causal())


def test_options_of_attention_in_decoding():
    """The options of the layer are those of its steps: a window, a bias by distance, a scale."""
    x = drawn(2, 9, 6).astype(np.float32)
    options = {"scale": 0.7, "window": (3, 0), "bias": fa.RelativeBias(drawn(3, 7).astype(np.float32)), "softcap": 5.0}
    layer = nn.MultiheadAttention(6, 3, batch_first=True, head_dim=4, options=options, seed=0)
    whole, cache = layer(x, x, x, is_causal=True)[0], layer.new_cache(2, 9)
    steps = [layer(*(x[:, i : i + 1],) * 3, need_weights=False, cache=cache)[0] for i in range(9)]
    assert_near(np.concatenate(steps, axis=1), whole, 3 * (6 + 9 + 12), 2.0**-24)
    assert np.abs(whole - layer(x, x, x, is_causal=True, bias=None)[0]).max() > 0.01


# --- detection ---

@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_with_positions(norm_first, batch_first):
    """By their parts; without positions they are the layers of torch."""
    options = dict(norm_first=norm_first, batch_first=batch_first, **D64)
    first, last = nn.DETREncoderLayer(8, 2, 12, **options), nn.DETRDecoderLayer(8, 2, 12, **options)
    plain = nn.TransformerEncoderLayer(8, 2, 12, **options), nn.TransformerDecoderLayer(8, 2, 12, **options)
    x, y = drawn(2, 7, 8), drawn(2, 5, 8)
    pos, query_pos = drawn(1, 7, 8), drawn(1, 5, 8)
    hidden = np.arange(7) >= np.array([[7], [4]])
    if not batch_first:
        x, y, pos, query_pos = (a.swapaxes(0, 1) for a in (x, y, pos, query_pos))
    np.testing.assert_array_equal(first(x, None, hidden), plain[0](x, None, hidden))
    np.testing.assert_array_equal(last(y, x, memory_key_padding_mask=hidden),
                                  plain[1](y, x, memory_key_padding_mask=hidden))

    def through(layer, x, *blocks):
        for i, block in enumerate(blocks):
            norm = getattr(layer, f"norm{i + 1}")
            x = x + block(norm(x)) if norm_first else norm(x + block(x))
        return x

    def feed(layer):
        return lambda x: layer.linear2(layer.linear1(x, "relu"))

    expected = through(first, x, lambda a: first.self_attn(a + pos, a + pos, a, hidden)[0], feed(first))
    assert_near(first(x, None, hidden, pos), expected, 3 * 60)
    weights = []

    def across(a):
        out, of_heads = last.multihead_attn(a + query_pos, x + pos, x, hidden, average_attn_weights=False)
        weights.append(of_heads)
        return out

    expected = through(last, y, lambda a: last.self_attn(a + query_pos, a + query_pos, a)[0], across, feed(last))
    out, aligned = last(y, x, memory_key_padding_mask=hidden, pos=pos, query_pos=query_pos, need_weights=True)
    assert_near(out, expected, 3 * 90)
    assert_near(aligned, weights[0], 3 * 90)
    assert aligned.shape == (2, 2, 5, 7)


def test_names_of_detr():
    """Those of facebookresearch/detr, but for the backbone's."""
    attention = ["in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias"]
    pair = ["weight", "bias"]
    expected = {"query_embed.weight", "transformer.decoder.norm.weight", "transformer.decoder.norm.bias"}
    expected |= {f"{name}.{kind}" for kind in pair
                 for name in ("class_embed", "input_proj", *(f"bbox_embed.layers.{i}" for i in range(3)))}
    for stack, attentions, norms in ("encoder", ["self_attn"], 2), ("decoder", ["self_attn", "multihead_attn"], 3):
        for i in range(2):
            layer = f"transformer.{stack}.layers.{i}."
            expected |= {f"{layer}{name}.{kind}" for name in attentions for kind in attention}
            expected |= {f"{layer}{name}.{kind}" for kind in pair
                         for name in ("linear1", "linear2", *(f"norm{i + 1}" for i in range(norms)))}
    state = nn.DETR(3, 2, 5, 8, 2, 2, 2, 6).state_dict()
    assert set(state) == expected
    shapes = {"class_embed.weight": (3, 8), "input_proj.weight": (8, 3, 1, 1), "bbox_embed.layers.2.weight": (4, 8),
              "query_embed.weight": (5, 8), "transformer.encoder.layers.0.linear1.weight": (6, 8)}
    assert all(state[name].shape == shape for name, shape in shapes.items())
    assert "transformer.encoder.norm.weight" in nn.DETR(3, 2, 5, 8, 2, 1, 1, 6, norm_first=True).state_dict()
    backbone = {"backbone.0.body.conv1.weight": np.zeros((4, 3, 7, 7))}
    keys = nn.DETR(3, 2, 5, 8, 2, 2, 2, 6).load_state_dict(state | backbone, strict=False)
    assert keys == ([], list(backbone))


def test_mlp():
    layer, x = nn.MLP(4, 5, 3, 3, **D64), drawn(2, 4)
    expected = x
    for i, part in enumerate(layer.layers):
        expected = apply(part, expected) if i == 2 else np.maximum(apply(part, expected), 0)
    assert_near(layer(x), expected, 14)
    assert [part.weight.shape for part in layer.layers] == [(5, 4), (5, 5), (3, 5)]


def test_detr_by_its_parts():
    model, x = nn.DETR(3, 2, 5, 8, 2, 1, 2, 6, **D64), drawn(2, 3, 3, 4)
    rows = apply(model.input_proj, x.transpose(0, 2, 3, 1)).reshape(2, 12, 8)
    pos = fa.positions.sinusoidal_2d(3, 4, 8, dtype="float64").reshape(12, 8)
    memory = model.transformer.encoder.layers[0](rows, pos=pos)
    y = np.zeros((2, 5, 8))
    for layer in model.transformer.decoder.layers:
        y, weights = layer(y, memory, pos=pos, query_pos=model.query_embed.weight, need_weights=True)
    y = model.transformer.decoder.norm(y)
    found = model(x, return_weights=True)
    assert_near(found.logits, apply(model.class_embed, y), 4 * 3 * 50)
    assert_near(found.boxes, 1 / (1 + np.exp(-model.bbox_embed(y))), 4 * 3 * 50)
    assert_near(found.weights, weights.reshape(2, 2, 5, 3, 4), 4 * 3 * 50)


def test_detr_and_padding():
    """A picture among larger ones is found as it is alone, whatever is in its padding."""
    model = nn.DETR(3, 2, 5, 8, 2, 2, 2, 6, **D64)
    small, large = drawn(1, 3, 4, 5), drawn(1, 3, 6, 7)
    both, mask = np.concatenate([large, large]), np.zeros((2, 6, 7), bool)
    both[1, :, :4, :5] = small[0]
    mask[1, 4:] = mask[1, :, 5:] = True
    found, alone = model(both, mask, return_weights=True), model(small, return_weights=True)
    for x, y in zip(found, alone):
        assert_near(x[1:, ..., :4, :5] if x.ndim == 5 else x[1:], y, 4 * 3 * 100)
    assert not found.weights[1, :, :, 4:].any() and not found.weights[1, :, :, :, 5:].any()
    assert ((found.boxes > 0) & (found.boxes < 1)).all() and model(small).weights is None
    np.testing.assert_array_equal(model(both, np.zeros((2, 6, 7), bool)).logits, model(both).logits)
    both[1][:, mask[1]] = np.nan
    assert_near(model(both, mask).logits, found.logits, 4 * 3 * 100)
    moved = np.roll(mask, 1, axis=1)
    for wrong, error, text in ((moved, ValueError, "mask must hide rows at the bottom"),
                               (mask[:, :5], ValueError, r"mask must have shape \(2, 6, 7\)"),
                               (mask.astype(int), TypeError, "mask must be bool")):
        with pytest.raises(error, match=text):
            model(both, wrong)
    with pytest.raises(ValueError, match="d_model must be a multiple of 4"):
        nn.DETR(3, 2, 5, 6, 2)
    with pytest.raises(ValueError, match="x must have shape"):
        model(small[:, :2])


def test_self_and_cross_attention():
    x, y = drawn(2, 5, 6), drawn(2, 4, 3)
    layer = nn.SelfAttention(6, 4, 3, bias=True, **D64)
    q, k, v = (apply(w, x) for w in (layer.W_q, layer.W_k, layer.W_v))
    assert_near(layer(x), attend(q, k, v)[0], 20)
    assert_near(layer(x, causal=True), attend(q, k, v, allowed=np.tri(5, dtype=bool))[0], 20)
    assert_near(layer(x[0]), attend(q[0], k[0], v[0])[0], 20)
    out, lse = layer(x, return_lse=True)
    assert out.shape == (2, 5, 3) and lse.shape == (2, 5)
    layer = nn.CrossAttention(6, 3, **D64)
    q, k, v = apply(layer.W_q, x), apply(layer.W_k, y), apply(layer.W_v, y)
    assert_near(layer(x, y), attend(q, k, v)[0], 20)


def test_self_attention_2d():
    x, layer = drawn(2, 16, 3, 4), nn.SelfAttention2d(16, **D64)
    np.testing.assert_array_equal(layer(x), x)
    layer.gamma = np.array([0.5])
    rows = x.reshape(2, 16, 12).swapaxes(1, 2)
    q, k, v = (apply(conv, rows) for conv in (layer.query_conv, layer.key_conv, layer.value_conv))
    assert q.shape == (2, 12, 2)
    context, weights = attend(q, k, v, 1.0)
    out, aligned = layer(x, return_weights=True)
    assert_near(out, x + 0.5 * context.swapaxes(1, 2).reshape(x.shape), 32)
    assert_near(aligned, weights, 32)


@pytest.mark.parametrize("tokens", [(), (0,), (3, 17)])
def test_longformer(tokens):
    S, layer, x = 20, nn.LongformerSelfAttention(6, 2, 6, **D64), drawn(2, 20, 6)
    q, k, v, q_all, k_all, v_all = (heads(apply(getattr(layer, name), x), 2) for name in (
        "query", "key", "value", "query_global", "key_global", "value_global"))
    for lengths in (20, 20), (20, 18):
        seen = np.arange(S) < np.array(lengths)[:, None, None, None]
        allowed = np.abs(np.subtract.outer(np.arange(S), np.arange(S))) <= 3
        allowed[:, tokens] = True
        allowed = allowed & seen
        expected = attend(q, k, v, allowed=allowed | ~seen.any(axis=-1, keepdims=True))[0]
        expected[:, :, tokens] = attend(q_all, k_all, v_all, allowed=seen)[0][:, :, tokens]
        out = layer(x, tokens, None if min(lengths) == S else ~seen[:, 0, 0])
        assert_near(out, expected.swapaxes(1, 2).reshape(x.shape), 40)
    with pytest.raises(ValueError, match="attention_window must be even"):
        nn.LongformerSelfAttention(6, 2, 3)
    with pytest.raises(ValueError, match="at the ends"):
        layer(x, (), np.arange(S) == np.array([[0], [1]]))


def test_bigbird():
    layer, x = nn.BigBirdSelfAttention(6, 2, 4, 1, mask_seed=3, **D64), drawn(2, 40, 6)
    allowed = fa.masks.bigbird(4, random=1, seed=3).to_dense(40, 40)
    q, k, v = (heads(apply(getattr(layer, name), x), 2) for name in ("query", "key", "value"))
    assert 0 < allowed.mean() < 1
    assert_near(layer(x), attend(q, k, v, allowed=allowed)[0].swapaxes(1, 2).reshape(x.shape), 50)
    seen = np.arange(40) < np.array([[40], [39]])
    expected = attend(q, k, v, allowed=allowed & seen[:, None, None])[0]
    assert_near(layer(x, ~seen), expected.swapaxes(1, 2).reshape(x.shape), 50)


@pytest.mark.parametrize("one_kv_head, share_kv", list(itertools.product([False, True], repeat=2)))
def test_linformer(one_kv_head, share_kv):
    layer, x = nn.LinformerSelfAttention(6, 10, 4, 2, None, one_kv_head, share_kv, **D64), drawn(2, 8, 6)
    q, k = heads(apply(layer.to_q, x), 2), apply(layer.to_k, x)
    v = k if share_kv else apply(layer.to_v, x)
    k, v = (heads(rows, 1 if one_kv_head else 2) for rows in (k, v))
    k, v = layer.proj_k[:8].T @ k, (layer.proj_k if share_kv else layer.proj_v)[:8].T @ v
    expected = apply(layer.to_out, attend(q, k, v)[0].swapaxes(1, 2).reshape(2, 8, 6))
    assert_near(layer(x), expected, 40)
    assert set(layer.state_dict()) >= {"to_q.weight", "proj_k", "to_out.bias"}


def test_patches_and_convolutions():
    x, layer = drawn(2, 3, 4, 6), nn.PatchEmbedding(3, 5, (2, 3), **D64)
    expected = np.stack([np.einsum("bcij,ncij->bn", x[:, :, i : i + 2, j : j + 3], layer.proj.weight) + layer.proj.bias
                         for i in (0, 2) for j in (0, 3)], axis=1)
    assert_near(layer(x), expected, 20)
    assert list(layer.state_dict()) == ["proj.weight", "proj.bias"]
    with pytest.raises(ValueError, match="x must have shape"):
        layer(x[:, :2])


# --- recurrent ---

@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["bahdanau", "dot", "general", "concat"])
def test_recurrent_attention(kind, masked):
    h, e = drawn(2, 3, 6), drawn(2, 5, 6)
    if kind == "bahdanau":
        layer = nn.BahdanauAttention(4, 6, 6, **D64)
        inner = np.tanh(apply(layer.Wa, h)[:, :, None] + apply(layer.Ua, e)[:, None])
        scores = apply(layer.Va, inner)[..., 0]
    else:
        layer = nn.LuongAttention(kind, 6, **D64)
        both = np.concatenate(np.broadcast_arrays(h[:, :, None], e[:, None]), axis=-1)
        scores = {"dot": lambda: h @ e.swapaxes(1, 2), "general": lambda: h @ apply(layer.attn, e).swapaxes(1, 2),
                  "concat": lambda: np.tanh(apply(layer.attn, both)) @ layer.v}[kind]()
    options = {}
    if masked:
        allowed = np.random.default_rng(0).random((2, 3, 5)) < 0.5
        allowed[..., 0] = True
        options = {"mask": allowed, "kv_lengths": [5, 3]}
        scores = np.where(allowed & (np.arange(5) < np.array([5, 3])[:, None, None]), scores, -np.inf)
    out, weights = layer(h, e, return_weights=True, **options)
    assert_near(weights, softmax(scores), 50)
    assert_near(out, softmax(scores) @ e, 50)
    np.testing.assert_array_equal(layer(h, e, **options), out)
    np.testing.assert_array_equal(layer(h, e, projected=layer.project(e), **options), out)


def gru(x, h, w_x, w_h, b_x, b_h):
    """One step of the definition."""
    n = h.shape[1]
    a, b = x @ w_x.T + b_x, h @ w_h.T + b_h
    r, z = (1 / (1 + np.exp(-(a + b)[:, part])) for part in (slice(0, n), slice(n, 2 * n)))
    return (1 - z) * np.tanh(a[:, 2 * n :] + r * b[:, 2 * n :]) + z * h


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("lengths", [None, [4, 2]])
def test_gru(bidirectional, lengths):
    layer, x = nn.GRU(3, 2, bidirectional=bidirectional, **D64), drawn(2, 4, 3)
    ways = 1 + bidirectional
    h = drawn(ways, 2, 2)
    states, last = layer(x, h if bidirectional else h[0], lengths)
    assert states.shape == (2, 4, 2 * ways) and last.shape == ((2, 2, 2) if bidirectional else (2, 2))
    for way in range(ways):
        end = "_reverse" if way else ""
        weights = [getattr(layer, f"{kind}_{name}_l0{end}") for kind in ("weight", "bias") for name in ("ih", "hh")]
        for b, n in enumerate(lengths or [4, 4]):
            state = h[way, b : b + 1]
            for t in range(n)[::-1 if way else 1]:
                state = gru(x[b : b + 1, t], state, *weights)
                assert_near(states[b : b + 1, t, 2 * way : 2 * way + 2], state, 40)
            assert_near((last[way] if bidirectional else last)[b : b + 1], state, 40)
            assert not states[b, n:].any()
    zeros = np.zeros_like(h if bidirectional else h[0])
    np.testing.assert_array_equal(layer(x)[0], layer(x, zeros)[0])
    if not bidirectional:
        first, state = layer(x[:, :2])
        np.testing.assert_array_equal(np.concatenate([first, layer(x[:, 2:], state)[0]], axis=1), layer(x)[0])
    for wrong, error, text in ((dict(h=h[..., :1]), ValueError, "h must have shape"),
                               (dict(lengths=[4, 5]), ValueError, "lengths must"),
                               (dict(lengths=[1.0, 2.0]), TypeError, "lengths must")):
        with pytest.raises(error, match=text):
            layer(x, **wrong)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("kind", ["bahdanau", "dot", "general", "concat"])
def test_recurrent_encoder_decoder(kind, bidirectional):
    """By its parts, step after step; sentences among longer ones are those alone."""
    model = nn.RecurrentEncoderDecoder(11, 7, 6, kind, bidirectional, **D64)
    rng = np.random.default_rng(0)
    source, written, lengths = rng.integers(0, 11, (2, 5)), rng.integers(0, 7, (2, 4)), np.array([5, 3])
    logits, weights = model(source, written, lengths, return_weights=True)
    assert logits.shape == (2, 4, 7) and weights.shape == (2, 4, 5) and not weights[1, :, 3:].any()
    np.testing.assert_array_equal(model(source, written, lengths), logits)
    decoder = [getattr(model.decoder, f"{k}_{n}_l0") for k in ("weight", "bias") for n in ("ih", "hh")]
    depth = 4 * 4 * (2 * 6 + 6 + 5 + 6)
    for b, n in enumerate(lengths):
        notes, last = model.encoder(model.source_embedding(source[b : b + 1, :n]))
        last = np.concatenate(list(last), axis=1) if bidirectional else last
        h = np.tanh(apply(model.bridge, last))
        state = model.encode(source[b : b + 1, :n])
        for i, token in enumerate(written[b]):
            e = model.target_embedding(written[b : b + 1, i])
            if kind == "bahdanau":
                c, w = model.attention(h[:, None], notes, return_weights=True)
                h = gru(np.concatenate([e, c[:, 0]], axis=1), h, *decoder)
            else:
                h = gru(e, h, *decoder)
                c, w = model.attention(h[:, None], notes, return_weights=True)
            expected = apply(model.out, np.tanh(apply(model.Wc, np.concatenate([c[:, 0], h], axis=1))))
            assert_near(logits[b : b + 1, i], expected, depth)
            assert_near(weights[b : b + 1, i, :n], w[:, 0], depth)
            step, w_step, state = model.step([token], state)
            assert_near(step, expected, depth)
            assert_near(w_step, w[:, 0], depth)
            assert_near(state.hidden, h, depth)
    with pytest.raises(ValueError, match="method must be"):
        nn.RecurrentEncoderDecoder(11, 7, 6, "product")
    with pytest.raises(ValueError, match="hidden_size must be a multiple"):
        nn.RecurrentEncoderDecoder(11, 7, 5)


# --- decoding ---

@pytest.mark.parametrize("batch_first, norm_first, steps", list(itertools.product(
    [True, False], [True, False], [(1,) * 7, (4, 1, 2), (7,)])))
def test_decoding_equals_the_full_pass(batch_first, norm_first, steps):
    """In float32, the dtype of caches: twice as near to the float64 layers as the full pass, or nearer; u of float32
    times the terms of the sums of two layers."""
    options = dict(batch_first=batch_first, norm_first=norm_first, activation="gelu", seed=0)
    model = nn.Transformer(16, 4, 1, 2, 24, **options)
    exact = nn.Transformer(16, 4, 1, 2, 24, dtype="float64", **options)
    exact.load_state_dict(model.state_dict())
    src, tgt = (drawn(2, n, 16).astype(np.float32) for n in (9, 7))
    hidden = np.arange(9) >= np.array([[9], [6]])
    if not batch_first:
        src, tgt = src.swapaxes(0, 1), tgt.swapaxes(0, 1)
    expected = exact(src.astype(np.float64), tgt.astype(np.float64), tgt_is_causal=True, src_key_padding_mask=hidden,
                     memory_key_padding_mask=hidden)
    memory = model.encoder(src, src_key_padding_mask=hidden)
    cache, axis, outs, at = model.decoder.new_cache(2, 7, page_size=4), 1 if batch_first else 0, [], 0
    for n in steps:
        new = tgt[:, at : at + n] if batch_first else tgt[at : at + n]
        outs.append(model.decoder(new, memory, memory_key_padding_mask=hidden, cache=cache))
        at += n
    depth = 3 * 3 * (16 + 9 + 16 + 24 + 16)
    assert_near(np.concatenate(outs, axis=axis), expected, depth, 2.0**-24)
    whole = model.decoder(tgt, memory, tgt_is_causal=True, memory_key_padding_mask=hidden)
    assert_near(np.concatenate(outs, axis=axis), whole, depth, 2.0**-24)


@pytest.mark.parametrize("batch_first", [True, False])
def test_decoding_of_prompts_of_different_lengths(batch_first):
    """Each sequence is what it is alone."""
    model = nn.Transformer(16, 4, 1, 2, 24, batch_first=batch_first, seed=0)
    src, tgt = (drawn(3, n, 16).astype(np.float32) for n in (9, 12))
    swap = (lambda x: x) if batch_first else (lambda x: x.swapaxes(0, 1))
    memory, cache = model.encoder(swap(src)), model.decoder.new_cache(3, 12, page_size=4)
    at, outs = np.zeros(3, int), np.full((3, 12, 16), np.nan, np.float32)
    for counts in np.array([5, 1, 3]), np.array([1, 1, 1]), np.array([0, 4, 2]), np.array([6, 6, 6]):
        n = counts.max()
        new = np.full((3, n, 16), np.nan, np.float32)  # in padding
        for b in range(3):
            new[b, : counts[b]] = tgt[b, at[b] : at[b] + counts[b]]
        padding = np.arange(n) >= counts[:, None]
        out = swap(model.decoder(swap(new), memory, tgt_key_padding_mask=padding if padding.any() else None,
                                 cache=cache))
        for b in range(3):
            outs[b, at[b] : at[b] + counts[b]] = out[b, : counts[b]]
        at += counts
    assert (at == 12).all()
    whole = swap(model.decoder(swap(tgt), memory, tgt_is_causal=True))
    assert_near(outs, whole, 3 * 3 * (16 + 12 + 16 + 24 + 16), 2.0**-24)
    for padding, error, text in ((np.array([[True, False]] * 3), ValueError, "True at the ends"),
                                 (np.zeros((3, 2)), TypeError, "must be bool"),
                                 (np.zeros((3, 3), bool), ValueError, "must have shape")):
        with pytest.raises(error, match=text):
            model.decoder(swap(tgt[:, :2]), memory, tgt_key_padding_mask=padding, cache=cache)


def test_a_stack_of_encoder_layers_decodes_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, seed=0)
    stack, x = nn.TransformerEncoder(layer, 2), drawn(3, 6, 8).astype(np.float32)
    assert stack.layers[0].linear1.weight is not stack.layers[1].linear1.weight
    whole, cache = stack(x, is_causal=True), stack.new_cache(3, 6)
    steps = np.concatenate([stack(x[:, i : i + 1], cache=cache) for i in range(6)], axis=1)
    assert_near(steps, whole, 2 * 3 * (8 + 6 + 8 + 16 + 8), 2.0**-24)
    with pytest.raises(ValueError, match="one LayerCache for each of 2 layers"):
        stack(x, cache=cache[:1])
    with pytest.raises(MemoryError):
        for _ in range(11):
            stack(x[:, :1], cache=cache)


def test_activations():
    """Names and functions, with any of the norms."""
    x = drawn(2, 3, 8)
    for name, function in (("relu", lambda y: np.maximum(y, 0)), ("silu", lambda y: y / (1 + np.exp(-y)))):
        one, two = (nn.TransformerEncoderLayer(8, 2, 16, activation=a, **D64) for a in (name, function))
        assert_near(one(x), two(x), 100)


def test_norms():
    x = drawn(5, 6, 8) * 10 + 3
    layer = nn.LayerNorm((6, 8), 1e-3, dtype="float64")
    layer.weight, layer.bias = drawn(6, 8), drawn(6, 8, seed=1)
    mean, var = x.mean(axis=(1, 2), keepdims=True), x.var(axis=(1, 2), keepdims=True)
    assert_near(layer(x), (x - mean) / np.sqrt(var + 1e-3) * layer.weight + layer.bias, 3 * 48)
    rms = nn.RMSNorm(8, dtype="float64")
    expected = x / np.sqrt(np.square(x).mean(axis=-1, keepdims=True) + 2.0**-52)
    assert_near(rms(x), expected, 3 * 8)
    many = drawn(20_000, 8)
    np.testing.assert_array_equal(rms(many)[::999], rms(many[::999]))
    half = nn.LayerNorm(8)(x.astype(np.float16))
    assert half.dtype == np.float16
    for wrong in x[..., :4], x[0, 0, 0]:
        with pytest.raises(ValueError, match="x must have shape"):
            rms(wrong)
    assert rms(np.zeros((0, 8))).shape == (0, 8)


def test_quick_gelu():
    """Nearly x where x is large, nearly 0 where it is far below 0, in x's dtype."""
    for dtype in np.float32, np.float64:
        x = np.array([-np.inf, -1e4, -3.0, -0.0, 0.5, 3.0, 1e4, np.inf, np.nan], dtype)
        with np.errstate(all="raise", invalid="ignore", under="ignore"):
            out = nn.quick_gelu(x)
        with np.errstate(all="ignore"):
            expected = x[2:6].astype(np.longdouble) / (1 + np.exp(-1.702 * x[2:6].astype(np.longdouble)))
        # The rounding of 1.702 x, times what exp makes of it, and four operations.
        u = np.finfo(dtype).eps / 2
        assert out.dtype == dtype
        assert (abs(out[2:6] - expected) <= (2 * 1.702 * 3 + 4) * u * abs(expected)).all()
        assert out[1] == 0 and out[6] == x[6] and out[7] == np.inf and np.isnan(out[[0, 8]]).all()
    with pytest.raises(ValueError, match="activation must be"):
        nn.Linear(2, 2)(np.zeros((1, 2), np.float32), "quick_gelu")


def test_embedding():
    table = nn.Embedding(4, 3, padding_idx=2, seed=0)
    assert not table.weight[2].any()
    np.testing.assert_array_equal(table([[1, 3]]), table.weight[[[1, 3]]])
    for ids in [-1], [4]:
        with pytest.raises(ValueError, match=r"ids must be in \[0, 4\)"):
            table(ids)
    with pytest.raises(TypeError, match="ids must be integers"):
        table([0.0])


def test_nothing():
    """Empty batches, sequences and graphs."""
    for B, S in (0, 4), (2, 0), (0, 0):
        x, F = drawn(B, S, 4), np.float64
        layers = [nn.Linear(4, 4, **D64), nn.LayerNorm(4, dtype="float64"), nn.SelfAttention(4, **D64),
                  nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, **D64),
                  nn.LongformerSelfAttention(4, 2, 2, **D64), nn.BigBirdSelfAttention(4, 2, 2, 0, 3, 0, **D64),
                  nn.LinformerSelfAttention(4, 4, 2, 2, **D64), lambda x: nn.GRU(4, 4, **D64)(x)[0]]
        for layer in layers:
            assert layer(x).shape == (B, S, 4) and layer(x).dtype == F
        attention = nn.MultiheadAttention(4, 2, batch_first=True, **D64)
        for mask in np.zeros((S, S), bool), np.zeros((B * 2, S, S)):
            out, weights = attention(x, x, x, np.zeros((B, S), bool), attn_mask=mask)
            assert out.shape == x.shape and weights.shape == (B, S, S)
        for layer in nn.BahdanauAttention(4, **D64), nn.LuongAttention("concat", 4, **D64):
            assert layer(x, drawn(B, 2, 4)).shape == x.shape
    assert nn.PatchEmbedding(2, 5, 2, **D64)(drawn(0, 2, 4, 4)).shape == (0, 4, 5)
    assert nn.SelfAttention2d(8, **D64)(drawn(0, 8, 3, 3)).shape == (0, 8, 3, 3)
    for layer in nn.GATConv(3, 2, 2, **D64), nn.GATv2Conv(3, 2, 2, **D64):
        assert layer(drawn(0, 3), np.zeros((2, 0), int)).shape == (0, 4)
        assert layer(drawn(2, 3), np.zeros((2, 0), int)).shape == (2, 4)
    y = drawn(2, 3, 4)
    attention.out_proj.bias = bias = drawn(4)
    np.testing.assert_array_equal(attention(y, y[:, :0], y[:, :0])[0], np.broadcast_to(bias, y.shape))


def test_the_comparison_sees_a_wrong_result():
    expected = drawn(3, 4)
    assert_near(expected * (1 + 2.0**-52), expected, 4)
    for wrong in expected + 1e-12, np.where(expected == expected[1, 1], np.nan, expected), expected[:2]:
        with pytest.raises(AssertionError):
            assert_near(wrong, expected, 4)


def test_inputs_are_not_modified_and_may_be_views():
    x = drawn(5, 2, 8)[:, ::-1].swapaxes(0, 1)[..., ::2]
    before = x.copy()
    x.flags.writeable = False
    layers = [nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, norm_first=first, **D64) for first in (True, False)]
    layers += [nn.Linear(4, 3, **D64), nn.LayerNorm(4, dtype="float64"), nn.RMSNorm(4, dtype="float64"),
               nn.LongformerSelfAttention(4, 2, 2, **D64), nn.LinformerSelfAttention(4, 5, 2, 2, **D64)]
    for layer in layers:
        np.testing.assert_array_equal(layer(x), layer(before))
        np.testing.assert_array_equal(x, before)


def test_docstrings():
    for module in nn.layers, nn.attention, nn.transformer, nn.detection, nn.recurrent:
        failed, attempted = doctest.testmod(module)
        assert attempted and not failed


def test_graph_layer_errors():
    x, edges = drawn(4, 3), np.array([[0, 1], [1, 3]])
    for layer in nn.GATConv(3, 2, **D64), nn.GATv2Conv(3, 2, **D64):
        for wrong in edges + 1, edges - 1, edges[:1], edges.astype(float):
            with pytest.raises(ValueError, match="edge_index must be"):
                layer(x, wrong)
        with pytest.raises(ValueError, match="edge_attr must be None"):
            layer(x, edges, np.ones((2, 1)))
    layer = nn.GATConv(3, 2, edge_dim=1, **D64)
    with pytest.raises(ValueError, match=r"edge_attr must have shape \(2, 1\)"):
        layer(x, edges, np.ones((3, 1)))
    with pytest.raises(ValueError, match="fill_value must be"):
        nn.GATConv(3, 2, fill_value="median")


def test_gat():
    """By the definition, over all pairs of nodes."""
    layer, x = nn.GATConv(3, 2, 2, add_self_loops=False, **D64), drawn(4, 3)
    edges = np.array([[0, 1, 2, 2, 3], [1, 1, 1, 3, 0]])
    rows = apply(layer.lin, x).reshape(4, 2, 2)
    out = np.zeros((4, 2, 2))
    for h in range(2):
        for i in range(4):
            sources = edges[0, edges[1] == i]
            if len(sources):
                scores = rows[sources, h] @ layer.att_src[0, h] + rows[i, h] @ layer.att_dst[0, h]
                out[i, h] = softmax(np.where(scores > 0, scores, 0.2 * scores)) @ rows[sources, h]
    layer.bias = drawn(4)
    assert_near(layer(x, edges), out.reshape(4, 4) + layer.bias, 20)
