"""fastattn.integrations.transformers: models of random weights, against "eager" of the same model in float64."""

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
hf = pytest.importorskip("transformers", reason="transformers is not installed")

from fastattn.integrations import transformers as ours  # noqa: E402

hf.logging.set_verbosity_error()
L, IMAGE = 40, 48
SMALL = {"vocab_size": 100, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4}
GROUPED = SMALL | {"num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
VISION = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
          "image_size": IMAGE, "patch_size": 8}


def tokens(batch=2, length=L):
    return torch.randint(5, 100, (batch, length), generator=torch.Generator().manual_seed(1))


def image(side=IMAGE):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(2))


def padded(lengths, left=False):
    keep = torch.arange(L) < torch.tensor(lengths)[:, None]
    return (keep.flip(1) if left else keep).long()


def detr():
    backbone = hf.ResNetConfig(depths=[1, 1], hidden_sizes=[16, 32], embedding_size=16, out_features=["stage2"])
    return hf.DetrModel(hf.DetrConfig(
        use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=backbone, d_model=64,
        encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, num_queries=12))


def whisper():
    return hf.WhisperModel(hf.WhisperConfig(
        vocab_size=100, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, encoder_layers=2,
        decoder_layers=2, d_model=64, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=50, max_target_positions=L, num_mel_bins=20))


def gpt2():
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=64,
                                            bos_token_id=0, eos_token_id=0))


def llama():
    return hf.LlamaForCausalLM(hf.LlamaConfig(**GROUPED))


MODELS = {
    "BERT": (lambda: hf.BertModel(hf.BertConfig(**SMALL)), {"input_ids": tokens()}),
    "BERT, padded": (lambda: hf.BertModel(hf.BertConfig(**SMALL)),
                     {"input_ids": tokens(), "attention_mask": padded([L, 23])}),
    "GPT-2": (gpt2, {"input_ids": tokens()}),
    "GPT-2, padded": (gpt2, {"input_ids": tokens(), "attention_mask": padded([L, 23])}),
    "Llama": (llama, {"input_ids": tokens()}),
    "Llama, padded on the left": (llama, {"input_ids": tokens(), "attention_mask": padded([L, 23], left=True)}),
    "Mistral, window": (lambda: hf.MistralModel(hf.MistralConfig(**GROUPED, sliding_window=9)),
                        {"input_ids": tokens()}),
    "Gemma 2, softcap and window": (
        lambda: hf.Gemma2Model(hf.Gemma2Config(**GROUPED, sliding_window=9, attn_logit_softcapping=0.05)),
        {"input_ids": tokens()}),
    "gpt-oss, sinks": (
        lambda: hf.GptOssModel(hf.GptOssConfig(**GROUPED, sliding_window=9, num_local_experts=2,
                                               num_experts_per_tok=1, experts_implementation="eager")),
        {"input_ids": tokens()}),
    "ViT": (lambda: hf.ViTModel(hf.ViTConfig(**VISION)), {"pixel_values": image()}),
    "CLIP": (lambda: hf.CLIPModel(hf.CLIPConfig(text_config=SMALL | {"max_position_embeddings": L, "eos_token_id": 99},
                                                vision_config=VISION)),
             {"input_ids": tokens(), "pixel_values": image()}),
    "DETR": (detr, {"pixel_values": image(64)}),
    "T5": (lambda: hf.T5Model(hf.T5Config(vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4)),
           {"input_ids": tokens(), "decoder_input_ids": tokens(2, 17), "attention_mask": padded([L, 23])}),
    "Whisper": (whisper, {"input_features": torch.randn(1, 20, 100, generator=torch.Generator().manual_seed(3)),
                          "decoder_input_ids": tokens(1, 17)}),
}


def put(model, implementation):
    """Under the model, but for a backbone of convolutions, which takes none."""
    parts = {"": implementation, "backbone_config": "eager"} if hasattr(model.config, "backbone_config") else None
    model.set_attn_implementation(parts or implementation)


def made(make):
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name or "relative_attention_bias" in name:
                parameter.normal_()
            elif "q_proj.weight" in name or "k_proj.weight" in name:    # scores of some size, that options matter
                parameter.mul_(8)
    return model


def tensors(outputs):
    return [x for x in outputs.to_tuple() if isinstance(x, torch.Tensor)]


def to_double(inputs):
    return {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}


@pytest.fixture
def calls(monkeypatch):
    """How often the operator ran: what a model does without it would prove nothing."""
    from fastattn.integrations import torch as operators
    count = []
    inner = operators.attention
    monkeypatch.setattr(operators, "attention", lambda *args, **options: count.append(1) or inner(*args, **options))
    return count


@pytest.mark.parametrize("name", MODELS)
def test_as_eager(name, calls):
    make, inputs = MODELS[name]
    model = made(make)
    seen = inputs.get("attention_mask", torch.ones(1)).bool()
    with torch.no_grad():
        put(model, "eager")
        theirs = model(**inputs)
        assert not calls
        put(model, "fastattn")
        out = model(**inputs)
        assert len(calls) >= 2
        # eager adds the least float64 to scores of padding, whose rows become NaN and then spread
        put(model, "sdpa" if "left" in name else "eager")
        exact = tensors(model.double()(**to_double(inputs)))
    assert len(exact) > 0
    for mine, eager, right in zip(tensors(out), tensors(theirs), exact):
        if right.shape[:2] == seen.shape:               # what padding attends to has no meaning
            mine, eager, right = mine[seen], eager[seen], right[seen]
        size = right.abs().max()
        assert (eager - right).abs().max() <= 5e-6 * size, "the case is ill-conditioned"
        assert (mine - right).abs().max() <= 5e-6 * size


@pytest.mark.parametrize("make", [gpt2, llama], ids=["GPT-2", "Llama"])
@pytest.mark.parametrize("left", [False, True], ids=["whole", "padded on the left"])
def test_generation(make, left, calls):
    """Prompts, then token by token on a cache: the tokens of eager."""
    model = made(make)
    options = {"max_new_tokens": 20, "do_sample": False, "attention_mask": padded([L, 23 if left else L], left)}
    put(model, "eager")
    expected = model.generate(tokens(), **options)
    put(model, "fastattn")
    assert torch.equal(model.generate(tokens(), **options), expected) and expected.shape == (2, L + 20)
    assert len(calls) == 2 * 20


@pytest.mark.parametrize("name", ["BERT, padded", "GPT-2", "T5", "gpt-oss, sinks", "Gemma 2, softcap and window"])
def test_gradients(name):
    """Of every parameter, those of T5's position table and of the sinks among them."""
    make, inputs = MODELS[name]

    def gradients(model, inputs):
        model.zero_grad()
        out = model(**inputs)[0]
        seen = inputs.get("attention_mask", torch.ones(out.shape[:2])).bool()
        weights = torch.cos(torch.arange(out.numel(), dtype=out.dtype)).view_as(out)
        (out * weights)[seen if seen.shape == out.shape[:2] else ...].sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model = made(make)
    put(model, "fastattn")
    mine = gradients(model, inputs)
    put(model, "eager")
    exact = gradients(model.double(), to_double(inputs))
    assert mine.keys() == exact.keys() and len(exact) > 10
    whole = max(x.abs().max() for x in exact.values())
    for parameter in exact:
        size = max(exact[parameter].abs().max(), 1e-3 * whole)
        assert (mine[parameter] - exact[parameter]).abs().max() <= 1e-4 * size, parameter


def test_dropout():
    model = hf.BertModel(hf.BertConfig(**SMALL, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)).train()
    put(model, "fastattn")
    torch.manual_seed(5)
    first, second = (model(input_ids=tokens())[0] for _ in range(2))
    torch.manual_seed(5)
    assert torch.equal(first, model(input_ids=tokens())[0]) and not torch.equal(first, second)
    model.eval()
    assert torch.equal(model(input_ids=tokens())[0], model(input_ids=tokens())[0])


@pytest.mark.parametrize("name", ["BERT, padded", "Llama", "T5"])
def test_compiled(name):
    """One graph, forward and backward."""
    make, inputs = MODELS[name]
    model = made(make)
    put(model, "fastattn")
    expected = model(**inputs)[0]
    expected.sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    out = torch.compile(model, backend="aot_eager", fullgraph=True)(**inputs)[0]
    out.sum().backward()
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close({name: p.grad for name, p in model.named_parameters() if name in gradients}, gradients)


def test_causal_counts_from_the_first_key():
    """As "sdpa" has it without a mask: with more keys than queries, those behind are not seen."""
    query, key, value = (torch.randn(1, 2, n, 8) for n in (3, 5, 5))
    module = torch.nn.Module()
    out, weights = ours.attention_forward(module, query, key, value, None)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert weights is None and out.is_contiguous()
    torch.testing.assert_close(out, expected.transpose(1, 2))
    out, _ = ours.attention_forward(module, query[:, :, :1], key, value, None)      # one query sees all
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(
        query[:, :, :1], key, value).transpose(1, 2))
    bias = torch.randn(1, 2, 3, 5)
    out, _ = ours.attention_forward(module, query, key, value, bias, position_bias=bias, is_causal=True)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=2 * bias).transpose(1, 2))
