"""Whole models in torch and transformers with random weights: a GPT that is trained, and architectures of the field.

Needs torch, and for `pretrained` transformers; `run.py` skips their rows with a reason where they are absent.
"""

import time
from collections import defaultdict

import numpy as np
import torch
from torch import nn

F = torch.nn.functional


class Clock:
    """An attention function and the seconds that pass in it, forwards and backwards."""

    def __init__(self, attend):
        self.attend, self.seconds = attend, 0.0

    def __call__(self, query, key, value):
        begin = time.perf_counter()
        out = self.attend(query, key, value, is_causal=True)
        self.seconds += time.perf_counter() - begin
        state = {}

        def backward_begins(_):
            state["begin"] = time.perf_counter()

        def backward_ends(_):       # the first of the three gradients to be used; they come at once
            if "begin" in state:
                self.seconds += time.perf_counter() - state.pop("begin")

        if out.requires_grad:
            out.register_hook(backward_begins)
            for x in (query, key, value):
                x.register_hook(backward_ends)
        return out


class Block(nn.Module):
    def __init__(self, width, heads, attend):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        heads = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(self.attend(*heads).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    def __init__(self, vocabulary, length, width, heads, layers, attend):
        super().__init__()
        self.token, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, attend) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens):
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.norm(self.blocks(x)) @ self.token.weight.T


def sequences(vocabulary, batch, length, steps):
    """Batches of a language in which each word has four that may follow it."""
    rng = np.random.default_rng(0)
    follows = rng.integers(0, vocabulary, (vocabulary, 4))
    words = rng.integers(0, vocabulary, (steps, batch))
    result = [words]
    for _ in range(length):
        words = follows[words, rng.integers(0, 4, words.shape)]
        result.append(words)
    return torch.from_numpy(np.stack(result, -1))


def train(attends, *, steps=50, batch=4, length=512, vocabulary=512, width=448, heads=7, layers=4):
    """Losses, seconds in attention and seconds in all by name, of models that take their steps in turns."""
    data = sequences(vocabulary, batch, length, steps)
    runs = {}
    for name, attend in attends.items():
        torch.manual_seed(0)
        clock = Clock(attend)
        model = GPT(vocabulary, length, width, heads, layers, clock)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)
        runs[name] = model, torch.optim.AdamW(model.parameters(), lr=3e-4), clock
    losses, seconds = defaultdict(list), defaultdict(float)
    for tokens in data:
        for name, (model, optimizer, _) in runs.items():
            begin = time.perf_counter()
            logits = model(tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seconds[name] += time.perf_counter() - begin
            losses[name].append(loss.item())
    parameters = sum(p.numel() for p in runs[name][0].parameters())
    return parameters, losses, {name: clock.seconds for name, (_, _, clock) in runs.items()}, seconds


# --- transformers ---

def pretrained(S):
    """(name, model, inputs) of small models of the architectures that most pretrained weights are for, S long."""
    import transformers as hf
    hf.logging.set_verbosity_error()
    torch.manual_seed(0)
    side = 16 * round(S**0.5)
    tokens = {"input_ids": torch.randint(5, 1000, (1, S))}
    text = {"vocab_size": 1000, "num_hidden_layers": 4}
    picture = {"pixel_values": torch.randn(1, 3, side, side)}
    decoder = {"decoder_input_ids": tokens["input_ids"]}
    yield "BERT", hf.BertModel(hf.BertConfig(**text, max_position_embeddings=S)), tokens
    yield "GPT-2", hf.GPT2Model(hf.GPT2Config(vocab_size=1000, n_layer=4, n_positions=S)), tokens
    yield "Llama", hf.LlamaModel(hf.LlamaConfig(
        **text, hidden_size=768, intermediate_size=2048, num_attention_heads=12, num_key_value_heads=4)), tokens
    yield "ViT", hf.ViTModel(hf.ViTConfig(num_hidden_layers=4, image_size=side)), picture
    yield "CLIP", hf.CLIPModel(hf.CLIPConfig(
        text_config=text | {"eos_token_id": 999, "max_position_embeddings": S},
        vision_config={"num_hidden_layers": 4, "image_size": side, "patch_size": 16})), tokens | picture
    backbone = hf.ResNetConfig(depths=[1, 1, 1, 1], hidden_sizes=[64, 64, 64, 128], embedding_size=32,
                               out_features=["stage4"])
    yield "DETR", hf.DetrModel(hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone,
        encoder_layers=4, decoder_layers=2)), {"pixel_values": torch.randn(1, 3, 2 * side, 2 * side)}
    yield "T5", hf.T5Model(hf.T5Config(vocab_size=1000, num_layers=4)), tokens | decoder
    yield "Whisper", hf.WhisperModel(hf.WhisperConfig(
        vocab_size=1000, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, encoder_layers=4,
        decoder_layers=2, d_model=512, encoder_attention_heads=8, decoder_attention_heads=8, max_source_positions=2 * S,
        max_target_positions=S)), {"input_features": torch.randn(1, 80, 4 * S)} | decoder


def attend_by(model, implementation):
    """A backbone of convolutions takes none."""
    parts = {"": implementation, "backbone_config": "eager"} if hasattr(model.config, "backbone_config") else None
    model.set_attn_implementation(parts or implementation)


def largest_error(model, inputs, implementation):
    """Of the first output, over its largest value, against "eager" in float64."""
    attend_by(model, implementation)
    result = model(**inputs)[0]
    attend_by(model, "eager")
    model.double()
    exact = model(**{name: x.double() if x.is_floating_point() else x for name, x in inputs.items()})[0]
    model.float()
    return float((result - exact).abs().max() / exact.abs().max())
