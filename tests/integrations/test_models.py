"""Whole models of transformers, of random weights, rebuilt from the parts of `fastattn.nn` with their weights.

In float64 the two may differ by the rounding of sums alone: at most twice the terms of all sums behind an element,
times u and the largest element, with the room for what cancels of test_nn_torch.py. In float32 the RMS error over their
float64 results is at most twice theirs.

The classes show how each model is written with `fastattn.nn`, the lists of rules what its weights are called (in
transformers 5.23).
"""

import math
import re

import numpy as np
import pytest

import fastattn as fa
from fastattn import masks, nn

torch = pytest.importorskip("torch", reason="torch is not installed: nothing to compare with")
hf = pytest.importorskip("transformers", reason="transformers is not installed: nothing to compare with")

hf.logging.set_verbosity_error()
E, H, F, S, LAYERS, WORDS, IMAGE, PATCH = 32, 4, 48, 24, 2, 50, 24, 6
ROOM = 32
SIZES = {"vocab_size": WORDS, "hidden_size": E, "num_hidden_layers": LAYERS, "num_attention_heads": H,
         "intermediate_size": F}
PICTURES = {"hidden_size": E, "num_hidden_layers": LAYERS, "num_attention_heads": H, "intermediate_size": F,
            "image_size": IMAGE, "patch_size": PATCH}
LENGTHS = np.array([S, 17])
HIDDEN = np.arange(S) >= LENGTHS[:, None]


def depth(rows, layers=LAYERS, per_layer=3):
    """The terms of all sums behind an element, as in test_nn_torch.py."""
    return layers * per_layer * (E + rows + E + F + E)


def words(*shape, seed=0, low=2):
    return np.random.default_rng(seed).integers(low, WORDS, shape)


def pictures(dtype, n=2, side=IMAGE):
    return np.random.default_rng(1).standard_normal((n, 3, side, side)).astype(dtype)


# --- weights under other names ---

def translated(state, rules):
    """Their weights under our names; projections of queries, keys and values become one."""
    own = {}
    for name, weight in state.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        own[name] = weight.numpy() if isinstance(weight, torch.Tensor) else weight
    for name in [name for name in own if ".q_proj." in name]:
        parts = [own.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
        own[name.replace(".q_proj.", ".in_proj_")] = np.concatenate(parts)
    return own


OF_BERT = [
    (r"^embeddings\.word_embeddings", "tokens"), (r"^embeddings\.position_embeddings", "positions"),
    (r"^embeddings\.token_type_embeddings", "types"), (r"^embeddings\.LayerNorm", "norm"),
    (r"^pooler\.dense", "pooler"), (r"^encoder\.layer\.", "encoder.layers."),
    (r"\.attention\.self\.query\.", ".self_attn.q_proj."), (r"\.attention\.self\.key\.", ".self_attn.k_proj."),
    (r"\.attention\.self\.value\.", ".self_attn.v_proj."), (r"\.attention\.output\.dense", ".self_attn.out_proj"),
    (r"\.attention\.output\.LayerNorm", ".norm1"), (r"\.intermediate\.dense", ".linear1"),
    (r"\.output\.dense", ".linear2"), (r"\.output\.LayerNorm", ".norm2")]
OF_SPARSE = [(pattern, new) for pattern, new in OF_BERT if "attention" not in pattern]
OF_SPARSE[6:6] = [(r"^encoder\.layers\.", "layers."), (r"\.attention\.self\.", ".attention."),
                  (r"\.attention\.output\.dense", ".dense"), (r"\.attention\.output\.LayerNorm", ".norm1"),
                  (r"^pooler\.(weight|bias)", r"pooler.\1")]
OF_GPT2 = [(r"^transformer\.", ""), (r"^h\.", "stack.layers."), (r"^ln_f\.", "stack.norm."),
           (r"\.attn\.c_attn\.", ".self_attn.in_proj_"), (r"\.attn\.c_proj", ".self_attn.out_proj"),
           (r"\.ln_", ".norm"), (r"\.mlp\.c_fc", ".linear1"), (r"\.mlp\.c_proj", ".linear2")]
OF_VIT = [(r"^embeddings\.patch_embeddings\.projection", "patches.proj"), (r"^embeddings\.", ""),
          (r"^layers\.", "encoder.layers."), (r"^layernorm\.", "encoder.norm."),
          (r"\.attention\.o_proj", ".self_attn.out_proj"), (r"\.attention\.", ".self_attn."),
          (r"\.layernorm_before", ".norm1"), (r"\.layernorm_after", ".norm2"), (r"\.mlp\.fc", ".linear"),
          (r"^pooler\.dense", "pooler")]
OF_CLIP = [(r"_model\.(encoder|embeddings)\.", "."), (r"_model\.", "."),
           (r"^(text|vision)\.layers", r"\1.encoder.layers"),
           (r"^text\.final_layer_norm", "text.encoder.norm"), (r"patch_embedding\.", "patches.proj."),
           (r"\.layer_norm", ".norm"), (r"\.mlp\.fc", ".linear")]
OF_DETR = [(r"^model\.query_position_embeddings", "query_embed"), (r"^model\.input_projection", "input_proj"),
           (r"^model\.(encoder|decoder)\.", r"transformer.\1."), (r"^class_labels_classifier", "class_embed"),
           (r"^bbox_predictor", "bbox_embed"), (r"\.o_proj", ".out_proj"), (r"\.encoder_attn\.", ".multihead_attn."),
           (r"\.mlp\.fc", ".linear"), (r"\.self_attn_layer_norm", ".norm1"), (r"\.encoder_attn_layer_norm", ".norm2"),
           (r"(encoder\.layers\.\d+)\.final_layer_norm", r"\1.norm2"),
           (r"(decoder\.layers\.\d+)\.final_layer_norm", r"\1.norm3"), (r"\.decoder\.layernorm", ".decoder.norm")]
OF_T5 = [(r"^(encoder|decoder)\.embed_tokens", "shared"), (r"\.final_layer_norm", ".norm"), (r"\.block\.", ".blocks."),
         (r"\.blocks\.0\.layer\.0\.SelfAttention\.relative_attention_bias", ".relative"),
         (r"\.SelfAttention\.([qkv])\.", r".self_attn.\1_proj."), (r"\.SelfAttention\.o", ".self_attn.out_proj"),
         (r"\.EncDecAttention\.([qkv])\.", r".cross_attn.\1_proj."), (r"\.EncDecAttention\.o", ".cross_attn.out_proj"),
         (r"\.DenseReluDense\.", "."), (r"\.layer\.0\.layer_norm", ".self_norm"),
         (r"(decoder\.blocks\.\d+)\.layer\.1\.layer_norm", r"\1.cross_norm"), (r"\.layer\.\d\.layer_norm", ".norm"),
         (r"\.layer\.\d", "")]


# --- the models ---

class BERT(nn.Module):
    """Tokens that see each other, norms behind sums; the first is the sequence's."""

    def __init__(self, dtype):
        super().__init__()
        eps = {"layer_norm_eps": 1e-12}
        self.tokens = nn.Embedding(WORDS, E, dtype=dtype)
        self.positions, self.types = nn.Embedding(S, E, dtype=dtype), nn.Embedding(2, E, dtype=dtype)
        self.norm = nn.LayerNorm(E, 1e-12, dtype=dtype)
        layer = nn.TransformerEncoderLayer(E, H, F, activation="gelu", batch_first=True, dtype=dtype, **eps)
        self.encoder, self.pooler = nn.TransformerEncoder(layer, LAYERS), nn.Linear(E, E, dtype=dtype)

    def __call__(self, ids, hidden=None):
        x = self.norm(self.tokens(ids) + self.types.weight[0] + self.positions.weight[: ids.shape[1]])
        x = self.encoder(x, src_key_padding_mask=hidden)
        return x, self.pooler(x[:, 0], np.tanh)


class GPT2(nn.Module):
    """Tokens that see what came before, norms before products."""

    def __init__(self, dtype):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(WORDS, E, dtype=dtype), nn.Embedding(S, E, dtype=dtype)
        layer = nn.TransformerEncoderLayer(E, H, F, activation="gelu_tanh", norm_first=True, batch_first=True,
                                           dtype=dtype)
        self.stack = nn.TransformerEncoder(layer, LAYERS, nn.LayerNorm(E, dtype=dtype))
        self.lm_head = nn.Linear(E, WORDS, False, dtype)

    def __call__(self, ids, cache=None, at=0):
        x = self.wte(ids) + self.wpe(np.arange(at, at + ids.shape[1]))
        return self.lm_head(self.stack(x, is_causal=cache is None, cache=cache))


def vision_encoder(activation, dtype, eps, norm):
    layer = nn.TransformerEncoderLayer(E, H, F, activation=activation, layer_norm_eps=eps, norm_first=True,
                                       batch_first=True, dtype=dtype)
    return nn.TransformerEncoder(layer, LAYERS, norm)


class ViT(nn.Module):
    """Patches of a picture behind a token of its class."""

    def __init__(self, dtype):
        super().__init__()
        self.patches = nn.PatchEmbedding(3, E, PATCH, dtype=dtype)
        self.cls_token = np.zeros((1, 1, E), dtype)
        self.position_embeddings = np.zeros((1, 1 + (IMAGE // PATCH) ** 2, E), dtype)
        self.encoder = vision_encoder("gelu", dtype, 1e-12, nn.LayerNorm(E, 1e-12, dtype=dtype))
        self.pooler = nn.Linear(E, E, dtype=dtype)

    def __call__(self, x):
        patches = self.patches(x)
        first = np.broadcast_to(self.cls_token, (len(x), 1, E))
        x = self.encoder(np.concatenate([first, patches], axis=1) + self.position_embeddings)
        return x, self.pooler(x[:, 0], np.tanh)


class CLIPVision(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.class_embedding = np.zeros(E, dtype)
        self.patches = nn.PatchEmbedding(3, E, PATCH, bias=False, dtype=dtype)
        self.position_embedding = nn.Embedding(1 + (IMAGE // PATCH) ** 2, E, dtype=dtype)
        self.pre_layrnorm, self.post_layernorm = nn.LayerNorm(E, dtype=dtype), nn.LayerNorm(E, dtype=dtype)
        self.encoder = vision_encoder(nn.quick_gelu, dtype, 1e-5, None)

    def __call__(self, x):
        first = np.broadcast_to(self.class_embedding, (len(x), 1, E))
        x = np.concatenate([first, self.patches(x)], axis=1) + self.position_embedding.weight
        return self.post_layernorm(self.encoder(self.pre_layrnorm(x))[:, 0])


class CLIPText(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.token_embedding, self.position_embedding = (nn.Embedding(n, E, dtype=dtype) for n in (WORDS, S))
        self.encoder = vision_encoder(nn.quick_gelu, dtype, 1e-5, nn.LayerNorm(E, dtype=dtype))

    def __call__(self, ids, hidden=None):
        x = self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]
        x = self.encoder(x, src_key_padding_mask=hidden, is_causal=True)
        return x[np.arange(len(ids)), (ids == WORDS - 1).argmax(axis=1)]  # where the sentence ends


class CLIP(nn.Module):
    """A tower for pictures, one for sentences, and how well each fits each."""

    def __init__(self, dtype):
        super().__init__()
        self.text, self.vision = CLIPText(dtype), CLIPVision(dtype)
        self.text_projection, self.visual_projection = (nn.Linear(E, 20, False, dtype) for _ in range(2))
        self.logit_scale = np.zeros((), dtype)

    def __call__(self, ids, hidden, pictures):
        text, image = self.text(ids, hidden), self.vision(pictures)
        text, image = self.text_projection(text), self.visual_projection(image)
        text, image = (x / np.sqrt(np.square(x).sum(axis=-1, keepdims=True)) for x in (text, image))
        return text, image, image @ text.T * np.exp(self.logit_scale)


class T5Block(nn.Module):
    """Unscaled scores, norms without mean, no biases; keys from elsewhere in a decoder."""

    def __init__(self, gated, cross, dtype):
        super().__init__()
        names = ("self", "cross") if cross else ("self",)
        for name in names:
            setattr(self, f"{name}_attn", nn.MultiheadAttention(E, H, bias=False, batch_first=True, dtype=dtype,
                                                                head_dim=6, options={"scale": 1.0}))
        for name in *(f"{name}_norm" for name in names), "norm":
            setattr(self, name, nn.RMSNorm(E, 1e-6, dtype=dtype))
        for name in ("wi_0", "wi_1") if gated else ("wi",):
            setattr(self, name, nn.Linear(E, F, False, dtype))
        self.wo, self.gated = nn.Linear(F, E, False, dtype), gated

    def __call__(self, x, bias, hidden=None, memory=None, cache=None):
        past, of_memory = cache or (None, None)
        y = self.self_norm(x)
        x = x + self.self_attn(y, y, y, hidden, False, is_causal=memory is not None and past is None, cache=past,
                               bias=bias)[0]
        if memory is not None:
            x = x + self.cross_attn(self.cross_norm(x), *memory[:1] * 2, memory[1], False, cache=of_memory)[0]
        y = self.norm(x)
        return x + self.wo(self.wi_0(y, "gelu_tanh") * self.wi_1(y) if self.gated else self.wi(y, "relu"))


class T5Stack(nn.Module):
    def __init__(self, gated, cross, dtype):
        super().__init__()
        self.relative = nn.Embedding(8, H, dtype=dtype)
        self.blocks = [T5Block(gated, cross, dtype) for _ in range(LAYERS)]
        self.norm, self.cross = nn.RMSNorm(E, 1e-6, dtype=dtype), cross

    def __call__(self, x, hidden=None, memory=None, cache=None):
        bias = fa.RelativeBias.t5(self.relative.weight, bidirectional=not self.cross, max_distance=12)
        for i, block in enumerate(self.blocks):
            x = block(x, bias, hidden, memory, cache and cache[i])
        return self.norm(x)


class T5(nn.Module):
    """An encoder-decoder whose positions are a bias, the same in all layers."""

    def __init__(self, dtype, gated=False):
        super().__init__()
        self.shared = nn.Embedding(WORDS, E, dtype=dtype)
        self.encoder, self.decoder = T5Stack(gated, False, dtype), T5Stack(gated, True, dtype)

    def new_cache(self, n, length):
        return [(block.self_attn.new_cache(n, length), {}) for block in self.decoder.blocks]

    def __call__(self, ids, hidden, targets):
        memory = self.encoder(self.shared(ids), hidden)
        return self.decoder(self.shared(targets), None, (memory, hidden)), memory


class SparseLayer(nn.Module):
    def __init__(self, attention, activation, dtype):
        super().__init__()
        self.attention, self.dense = attention, nn.Linear(E, E, dtype=dtype)
        self.linear1, self.linear2 = nn.Linear(E, F, dtype=dtype), nn.Linear(F, E, dtype=dtype)
        self.norm1, self.norm2 = nn.LayerNorm(E, 1e-12, dtype=dtype), nn.LayerNorm(E, 1e-12, dtype=dtype)
        self.activation = activation

    def __call__(self, x, *how):
        x = self.norm1(x + self.dense(self.attention(x, *how)))
        return self.norm2(x + self.linear2(self.linear1(x, self.activation)))


class Longformer(nn.Module):
    """A window around each token, and tokens that see all."""

    length, windows = 48, (8, 16)

    def __init__(self, dtype):
        super().__init__()
        self.tokens, self.types = nn.Embedding(WORDS, E, dtype=dtype), nn.Embedding(2, E, dtype=dtype)
        self.positions, self.norm = nn.Embedding(64, E, dtype=dtype), nn.LayerNorm(E, 1e-12, dtype=dtype)
        self.layers = [SparseLayer(nn.LongformerSelfAttention(E, H, window, dtype=dtype), "gelu", dtype)
                       for window in self.windows]
        self.pooler = nn.Linear(E, E, dtype=dtype)

    def __call__(self, ids, tokens, hidden):
        positions = np.where(ids != 1, np.cumsum(ids != 1, axis=1), 0) + 1  # padding is token 1, and stands there
        x = self.norm(self.tokens(ids) + self.types.weight[0] + self.positions(positions))
        for layer in self.layers:
            x = layer(x, tokens, hidden)
        return x, self.pooler(x[:, 0], np.tanh)


class BigBird(nn.Module):
    """Blocks: the first and the last, those beside a block, and random ones."""

    length, block = 60, 4

    def __init__(self, dtype):
        super().__init__()
        self.tokens, self.types = nn.Embedding(WORDS, E, dtype=dtype), nn.Embedding(2, E, dtype=dtype)
        self.positions, self.norm = nn.Embedding(64, E, dtype=dtype), nn.LayerNorm(E, 1e-12, dtype=dtype)
        self.layers = [SparseLayer(nn.BigBirdSelfAttention(E, H, self.block, dtype=dtype), "gelu_tanh", dtype)
                       for _ in range(LAYERS)]
        self.pooler = nn.Linear(E, E, dtype=dtype)

    def see(self, chosen):
        """Take the random blocks (H, blocks - 2, r) of each layer in the place of those that the layers drew."""
        n = self.length // self.block
        near = np.abs(np.subtract.outer(np.arange(n), np.arange(n))) <= 1
        near[:, [0, -1]] = near[[0, -1]] = True
        for layer, of_heads in zip(self.layers, chosen):
            layout = np.repeat(near[None], H, axis=0)
            np.put_along_axis(layout[:, 1:-1], of_heads, True, axis=2)
            layer.attention.mask = masks.blocks(layout, self.block)

    def __call__(self, ids, hidden):
        x = self.norm(self.tokens(ids) + self.types.weight[0] + self.positions.weight[: ids.shape[1]])
        for layer in self.layers:
            x = layer(x, hidden)
        return x, self.pooler(x[:, 0], np.tanh)


# --- theirs, and what both are given ---

def tensor(x):
    return torch.from_numpy(np.ascontiguousarray(x))


def drawn(model):
    """Their model in eval mode with weights whose scores differ and whose biases are not 0."""
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.ndim > 1:
                p.copy_(noise / math.sqrt(p[0].numel()))
            else:
                p.add_(0.2 * noise)
    return model.eval()


def t5_config(gated):
    return hf.T5Config(vocab_size=WORDS, d_model=E, d_kv=6, d_ff=F, num_layers=LAYERS, num_heads=H,
                       relative_attention_num_buckets=8, relative_attention_max_distance=12,
                       feed_forward_proj="gated-gelu" if gated else "relu")


def detr():
    backbone = hf.ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=16, out_features=["stage2"])
    return hf.DetrForObjectDetection(hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=E,
        encoder_layers=LAYERS, decoder_layers=LAYERS, encoder_attention_heads=H, decoder_attention_heads=H,
        encoder_ffn_dim=F, decoder_ffn_dim=F, num_queries=12, num_labels=7))


def sparse_ids(n, low=2):
    ids, hidden = words(2, n, low=low), np.arange(n) >= np.array([[n], [n - 9]])
    return np.where(hidden, 1, ids), hidden


class BERTCase:
    rules, ours, depth = OF_BERT, BERT, depth(S)

    def theirs(self):
        return hf.BertModel(hf.BertConfig(**SIZES, max_position_embeddings=S))

    def call(self, model, dtype):
        out = model(tensor(words(2, S)), tensor(~HIDDEN).long())
        return out.last_hidden_state[~tensor(HIDDEN)], out.pooler_output

    def call_ours(self, model, dtype):
        x, pooled = model(words(2, S), HIDDEN)
        return x[~HIDDEN], pooled


class GPT2Case:
    rules, ours, depth = OF_GPT2, GPT2, depth(S) + E

    def theirs(self):
        return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=WORDS, n_embd=E, n_layer=LAYERS, n_head=H, n_inner=F,
                                                n_positions=S, tie_word_embeddings=False))

    def state(self, state):
        """Their products have weights (K, N)."""
        return {name: w.T if re.search(r"c_(attn|proj|fc)\.weight", name) else w for name, w in state.items()}

    def call(self, model, dtype):
        return (model(tensor(words(2, S))).logits,)

    def call_ours(self, model, dtype):
        return (model(words(2, S)),)


class ViTCase:
    rules, ours, depth = OF_VIT, ViT, depth(17) + 3 * PATCH**2

    def theirs(self):
        return hf.ViTModel(hf.ViTConfig(**PICTURES))

    def call(self, model, dtype):
        out = model(tensor(pictures(dtype)))
        return out.last_hidden_state, out.pooler_output

    def call_ours(self, model, dtype):
        return model(pictures(dtype))


class CLIPCase:
    rules, ours, depth = OF_CLIP, CLIP, depth(S) + 3 * PATCH**2 + 2 * E

    def __init__(self):
        self.ids = words(2, S)
        self.ids[self.ids == WORDS - 1] = 2
        self.ids[np.arange(2), LENGTHS - 1] = WORDS - 1

    def theirs(self):
        text = SIZES | {"max_position_embeddings": S, "eos_token_id": WORDS - 1}
        return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=PICTURES, projection_dim=20))

    def call(self, model, dtype):
        out = model(tensor(self.ids), tensor(pictures(dtype, 30)), tensor(~HIDDEN).long())
        return out.text_embeds, out.image_embeds, out.logits_per_image

    def call_ours(self, model, dtype):
        return model(self.ids, HIDDEN, pictures(dtype, 30))  # 60 logits: of a few, the error may be any by chance


class DETRCase:
    """Behind a backbone of theirs; the second picture is smaller than the first."""

    rules, depth = OF_DETR, 2 * depth(64) + 32 + 3 * E

    def __init__(self):
        self.mask = np.ones((2, 64, 64), bool)
        self.mask[1, 40:] = self.mask[1, :, 56:] = False

    def ours(self, dtype):
        return nn.DETR(32, 7, 12, E, H, LAYERS, LAYERS, F, dtype=dtype)

    def theirs(self):
        return detr()

    def state(self, state):
        return {name: w for name, w in state.items() if "backbone" not in name}

    def call(self, model, dtype):
        x = tensor(pictures(dtype, side=64))
        features, seen = model.model.backbone(x, tensor(self.mask))[-1]
        self.given = features.numpy(), ~seen.numpy()
        out = model(x, tensor(self.mask))
        return out.logits, out.pred_boxes

    def call_ours(self, model, dtype):
        found = model(*self.given)
        assert self.given[1].any() and not self.given[1].all()
        return found.logits, found.boxes


class T5Case:
    rules, gated = OF_T5, False
    depth = 2 * depth(S)
    targets = words(2, 15, seed=2)

    def ours(self, dtype):
        return T5(dtype, self.gated)

    def theirs(self):
        return hf.T5Model(t5_config(self.gated))

    def call(self, model, dtype):
        out = model(input_ids=tensor(words(2, S)), attention_mask=tensor(~HIDDEN).long(),
                    decoder_input_ids=tensor(self.targets))
        return out.last_hidden_state, out.encoder_last_hidden_state[~tensor(HIDDEN)]

    def call_ours(self, model, dtype):
        out, memory = model(words(2, S), HIDDEN, self.targets)
        return out, memory[~HIDDEN]


class GatedT5Case(T5Case):
    gated = True


class LongformerCase:
    rules, ours, depth = OF_SPARSE, Longformer, depth(Longformer.length)
    tokens = (0, 5)

    def theirs(self):
        return hf.LongformerModel(hf.LongformerConfig(**SIZES, attention_window=list(Longformer.windows),
                                                      pad_token_id=1, max_position_embeddings=64))

    def call(self, model, dtype):
        ids, hidden = sparse_ids(Longformer.length)
        everywhere = np.zeros(ids.shape, int)
        everywhere[:, self.tokens] = 1
        out = model(tensor(ids), tensor(~hidden).long(), tensor(everywhere))
        return out.last_hidden_state[~tensor(hidden)], out.pooler_output

    def call_ours(self, model, dtype):
        ids, hidden = sparse_ids(Longformer.length)
        x, pooled = model(ids, self.tokens, hidden)
        return x[~hidden], pooled


class BigBirdCase:
    """In training mode without dropout: theirs draw random blocks then alone, else take the first one once more."""

    rules, ours, depth = OF_SPARSE, BigBird, depth(BigBird.length)

    def theirs(self):
        return hf.BigBirdModel(hf.BigBirdConfig(
            **SIZES, max_position_embeddings=64, block_size=BigBird.block, num_random_blocks=2, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0))

    def call(self, model, dtype):
        model.train()
        self.chosen = []
        for layer in model.encoder.layer:
            attention = layer.attention.self

            def choose(*args, choose=attention._bigbird_block_rand_mask_with_head, **options):
                chosen = choose(*args, **options)
                self.chosen.append(np.stack(chosen))
                return chosen

            attention._bigbird_block_rand_mask_with_head = choose
        ids, hidden = sparse_ids(BigBird.length)
        state = np.random.get_state()
        out = model(tensor(ids), tensor(~hidden).long())
        np.random.set_state(state)
        return out.last_hidden_state[~tensor(hidden)], out.pooler_output

    def call_ours(self, model, dtype):
        assert len(self.chosen) == LAYERS and (self.chosen[0][0] != self.chosen[0][1]).any()
        model.see(self.chosen)
        ids, hidden = sparse_ids(BigBird.length)
        x, pooled = model(ids, hidden)
        return x[~hidden], pooled


CASES = {"BERT": BERTCase, "GPT-2": GPT2Case, "ViT": ViTCase, "CLIP": CLIPCase, "DETR": DETRCase, "T5": T5Case,
         "T5, gated": GatedT5Case, "Longformer": LongformerCase, "BigBird": BigBirdCase}


def results(case, dtype):
    """(theirs, ours, their model, our model) in one dtype, from the same float32 weights."""
    torch.manual_seed(0)
    theirs = drawn(case.theirs()).to(getattr(torch, dtype))
    with torch.no_grad():
        expected = [x.numpy() for x in case.call(theirs, dtype)]
    mine = case.ours(dtype)
    state = theirs.state_dict()
    state = translated(case.state(state) if hasattr(case, "state") else state, case.rules)
    assert mine.load_state_dict(state) == ([], [])
    return expected, case.call_ours(mine, dtype), theirs, mine


@pytest.fixture
def as_they_come(monkeypatch):
    """Their softmax and norms in the dtype of the input, where they are written for float32."""
    from transformers.models.t5.modeling_t5 import T5LayerNorm

    softmax = torch.nn.functional.softmax
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    monkeypatch.setattr(T5LayerNorm, "forward", lambda self, x: self.weight * (
        x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)))


def bound(case, expected, u=2.0**-53):
    return 2 * case.depth * u * ROOM * max(np.abs(expected).max(), 1)


@pytest.mark.parametrize("name", CASES)
def test_float64(name, as_they_come):
    case = CASES[name]()
    expected, out, _, _ = results(case, "float64")
    assert len(out) == len(expected)
    for x, y in zip(out, expected):
        assert x.shape == y.shape and x.dtype == y.dtype == np.float64
        worst, most = np.abs(x - y).max(), bound(case, y)
        assert worst <= most, f"{worst:.3g} apart, bound {most:.3g}"


def rms(x, exact):
    return np.sqrt(np.mean(np.square(x - exact)))


@pytest.mark.parametrize("name", CASES)
def test_float32(name):
    case = CASES[name]()
    single, out, _, _ = results(case, "float32")
    exact = results(case, "float64")[0]
    for mine, theirs, right in zip(out, single, exact):
        assert mine.dtype == np.float32
        assert 0 < rms(theirs, right) < 1e-4 and rms(mine, right) <= 2 * rms(theirs, right)


@pytest.mark.parametrize("steps", [(1,) * S, (10, 1, 13)])
def test_gpt2_decodes(steps):
    """In float32, the dtype of caches: the full pass, and as near to float64 as theirs on a cache of their own."""
    case = GPT2Case()
    exact = results(case, "float64")[0][0]
    _, (whole,), theirs, mine = results(case, "float32")
    ids, cache, past = words(2, S), mine.stack.new_cache(2, S, page_size=4), None
    logits, their_logits = [], []
    for at, n in zip(np.cumsum((0, *steps)), steps):
        logits.append(mine(ids[:, at : at + n], cache, at))
        with torch.no_grad():
            out = theirs(tensor(ids[:, at : at + n]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        their_logits.append(out.logits.numpy())
    logits, their_logits = (np.concatenate(x, axis=1) for x in (logits, their_logits))
    assert rms(logits, exact) <= 2 * rms(their_logits, exact)
    assert np.abs(logits - whole).max() <= bound(case, exact, 2.0**-24) < 0.1 * np.abs(exact).max()


@pytest.mark.parametrize("case", [T5Case, GatedT5Case])
def test_t5_decodes(case):
    """Token by token, with the bias of each query's own position, on a memory that is projected once."""
    case = case()
    exact = results(case, "float64")[0][0]
    (single, _), _, _, mine = results(case, "float32")
    memory = mine.encoder(mine.shared(words(2, S)), HIDDEN), HIDDEN
    cache = mine.new_cache(2, case.targets.shape[1])
    steps = [mine.decoder(mine.shared(token[:, None]), None, memory, cache) for token in case.targets.T]
    assert rms(np.concatenate(steps, axis=1), exact) <= 2 * rms(single, exact)


def other_weight(model):
    """One of them off by the least that float32 knows, times 8."""
    state = model.state_dict()
    name = next(name for name in state if re.search(r"self_attn\.in_proj_weight|attention\.key\.weight", name))
    model.load_state_dict(state | {name: state[name] * (1 + 2.0**-20)})


def part(name, value):
    def change(model):
        *parts, last = name.split(".")
        for p in parts:
            model = model[int(p)] if p.isdigit() else getattr(model, p)
        setattr(model, last, value)
    return change


CHANGES = [(name, other_weight) for name in CASES] + [
    ("CLIP", lambda model: [part("activation", "gelu")(layer) for layer in model.text.encoder.layers]),
    ("DETR", lambda model: part("_positions", lambda *args, of=model._positions: (None, of(*args)[1]))(model)),
    ("T5", lambda model: part("relative.weight", np.zeros((8, H)))(model.decoder)),
    ("T5", part("encoder.blocks.0.self_attn.options", {})),
    ("Longformer", part("layers.1.attention.attention_window", 14)),
    ("BigBird", lambda model: part("see", lambda chosen, of=model.see: of([blocks[::-1] for blocks in chosen]))(model))]


@pytest.mark.parametrize("name, change", CHANGES)
def test_the_comparison_sees_another_model(name, change, as_they_come):
    case = CASES[name]()
    expected, _, _, mine = results(case, "float64")
    change(mine)
    out = case.call_ours(mine, "float64")
    assert any(np.abs(x - y).max() > bound(case, y) for x, y in zip(out, expected))
