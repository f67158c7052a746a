"""The layers of "Attention Is All You Need" and their stacks, as torch has them."""

import copy
from typing import NamedTuple

import numpy as np

from .. import checks
from ..cache import KVCache
from ._module import Module, check_activation, generator
from .attention import MultiheadAttention
from .layers import LayerNorm, Linear


class LayerCache(NamedTuple):
    """What a layer remembers of a sequence that is decoded step by step."""

    past: KVCache  # keys and values of the tokens so far
    memory: dict  # keys and values of the encoder's result, from the first step on


class _Layer(Module):
    """What encoder and decoder layers share: self-attention, two products and norms."""

    def __init__(self, d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
                 bias, dtype, seed, attentions):
        super().__init__()
        rng = generator(seed)
        for name in attentions:
            setattr(self, name, MultiheadAttention(d_model, nhead, dropout, bias, batch_first=batch_first, dtype=dtype,
                                                   seed=rng))
        self.linear1 = Linear(d_model, dim_feedforward, bias, dtype, seed=rng)
        self.linear2 = Linear(dim_feedforward, d_model, bias, dtype, seed=rng)
        self.norm_first = checks._boolean("norm_first", norm_first)
        for i in range(len(attentions) + 1):
            setattr(self, f"norm{i + 1}", LayerNorm(d_model, layer_norm_eps, bias=bias, dtype=dtype))
        self.activation = check_activation(activation)

    def _self_attention(self, x, mask, padding, is_causal, cache):
        return self.self_attn(x, x, x, padding, False, mask, is_causal=is_causal,
                              cache=None if cache is None else cache.past)[0]

    def _feed_forward(self, x):
        return self.linear2(self.linear1(x, self.activation))

    def _through(self, x, *blocks):
        """x + block(x) for each block, with its norm before it or behind the sum."""
        y = None
        for i, block in enumerate(blocks):
            norm = getattr(self, f"norm{i + 1}")
            if self.norm_first:
                normal, x = norm.of_sum(x, y)
                y = block(normal)
            else:
                x = norm.of_sum(block(x), x)[0]
        return x if y is None else np.add(x, y, out=y)

    def new_cache(self, batch_size, max_length, dtype="float32", *, page_size=16):
        """A `LayerCache` with room for batch_size sequences of max_length tokens, of the dtypes of `KVCache`."""
        return LayerCache(self.self_attn.new_cache(batch_size, max_length, dtype, page_size=page_size), {})


class TransformerEncoderLayer(_Layer):
    """torch.nn.TransformerEncoderLayer in eval mode, with its options, names and state dict.

    Parameters
    ----------
    d_model, nhead, dim_feedforward : int
    dropout : float
        Without effect.
    activation : str, or function of arrays
        "relu", "gelu", "gelu_tanh", "silu"; the names are computed in the product's store.
    layer_norm_eps : float
    batch_first : bool
        Whether arrays are (B, L, E) instead of (L, B, E); without a batch they are (L, E).
    norm_first : bool
        Whether norms come before attention and products, or behind the sums.
    bias : bool
        Of products and norms.
    dtype : float32 or float64
    seed : int or Generator, optional
        Of the weights.

    Attributes
    ----------
    self_attn : MultiheadAttention
    linear1, linear2 : Linear
    norm1, norm2 : LayerNorm
    """

    def __init__(self, d_model, nhead, dim_feedforward=2048, dropout=0.1, activation="relu", layer_norm_eps=1e-5,
                 batch_first=False, norm_first=False, bias=True, dtype="float32", *, seed=None):
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
                         bias, dtype, seed, ("self_attn",))

    def __call__(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False, *, cache=None):
        """An array of src's shape; masks and is_causal as in `MultiheadAttention`.

        With a cache, of `new_cache`, src are the tokens that follow those of earlier calls, each of which sees itself
        and what came before. There is then no mask but src_key_padding_mask, True at the ends of sequences that have
        fewer new tokens than others.
        """
        src = checks._array("src", src)
        return self._through(src, lambda x: self._self_attention(x, src_mask, src_key_padding_mask, is_causal, cache),
                             self._feed_forward)


class TransformerDecoderLayer(_Layer):
    """torch.nn.TransformerDecoderLayer in eval mode, with its options, names and state dict.

    Parameters are those of `TransformerEncoderLayer`.

    Attributes
    ----------
    self_attn, multihead_attn : MultiheadAttention
    linear1, linear2 : Linear
    norm1, norm2, norm3 : LayerNorm
    """

    def __init__(self, d_model, nhead, dim_feedforward=2048, dropout=0.1, activation="relu", layer_norm_eps=1e-5,
                 batch_first=False, norm_first=False, bias=True, dtype="float32", *, seed=None):
        super().__init__(d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first,
                         bias, dtype, seed, ("self_attn", "multihead_attn"))

    def __call__(self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
                 memory_key_padding_mask=None, tgt_is_causal=False, memory_is_causal=False, *, cache=None):
        """An array of tgt's shape; masks and hints as in `MultiheadAttention`.

        With a cache, of `new_cache`, tgt are the tokens that follow those of earlier calls, each of which sees itself
        and what came before; there is then no mask of tgt but tgt_key_padding_mask, True at the ends of sequences that
        have fewer new tokens. Keys and values of memory are those of the first call.
        """
        tgt = checks._array("tgt", tgt)
        return self._through(
            tgt, lambda x: self._self_attention(x, tgt_mask, tgt_key_padding_mask, tgt_is_causal, cache),
            lambda x: self.multihead_attn(x, memory, memory, memory_key_padding_mask, False, memory_mask,
                                          is_causal=memory_is_causal, cache=None if cache is None else cache.memory)[0],
            self._feed_forward)


class _Stack(Module):
    """num_layers copies of a layer, and a norm."""

    def __init__(self, layer, num_layers, norm):
        super().__init__()
        self.layers = [copy.deepcopy(layer) for _ in range(checks._integer("num_layers", num_layers, 0))]
        self.num_layers, self.norm = len(self.layers), norm

    def new_cache(self, batch_size, max_length, dtype="float32", *, page_size=16):
        """A `LayerCache` for each layer, with room for batch_size sequences of max_length tokens."""
        return [layer.new_cache(batch_size, max_length, dtype, page_size=page_size) for layer in self.layers]

    def _through(self, x, cache, call):
        caches = [None] * self.num_layers if cache is None else cache
        if len(caches) != self.num_layers:
            raise ValueError(f"cache must have one LayerCache for each of {self.num_layers} layers, got {len(caches)}")
        for layer, of_layer in zip(self.layers, caches):
            x = call(layer, x, of_layer)
        return x if self.norm is None else self.norm(x)


class TransformerEncoder(_Stack):
    """torch.nn.TransformerEncoder: a stack of copies of encoder_layer, then norm.

    Parameters
    ----------
    encoder_layer : TransformerEncoderLayer
    num_layers : int
    norm : Module, optional
    enable_nested_tensor, mask_check : bool
        Of torch's own fast path; without effect. Rows of padding are computed, where that path makes them 0.
    """

    def __init__(self, encoder_layer, num_layers, norm=None, enable_nested_tensor=True, mask_check=True):
        super().__init__(encoder_layer, num_layers, norm)

    def __call__(self, src, mask=None, src_key_padding_mask=None, is_causal=None, *, cache=None):
        """As `TransformerEncoderLayer`; is_causal None is False. A cache, of `new_cache`, makes it a causal stack."""
        return self._through(src, cache, lambda layer, x, of_layer: layer(
            x, mask, src_key_padding_mask, bool(is_causal), cache=of_layer))


class TransformerDecoder(_Stack):
    """torch.nn.TransformerDecoder: a stack of copies of decoder_layer, then norm.

    Parameters
    ----------
    decoder_layer : TransformerDecoderLayer
    num_layers : int
    norm : Module, optional
    """

    def __init__(self, decoder_layer, num_layers, norm=None):
        super().__init__(decoder_layer, num_layers, norm)

    def __call__(self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
                 memory_key_padding_mask=None, tgt_is_causal=None, memory_is_causal=False, *, cache=None):
        """As `TransformerDecoderLayer`; tgt_is_causal None is False. A cache comes from `new_cache`."""
        return self._through(tgt, cache, lambda layer, x, of_layer: layer(
            x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, bool(tgt_is_causal),
            memory_is_causal, cache=of_layer))


class Transformer(Module):
    """torch.nn.Transformer in eval mode, with its options, names and state dict.

    Parameters
    ----------
    d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward : int
    dropout, activation, layer_norm_eps, batch_first, norm_first, bias, dtype, seed
        As in `TransformerEncoderLayer`.
    custom_encoder, custom_decoder : optional
        Take the places of the stacks.

    Attributes
    ----------
    encoder : TransformerEncoder
    decoder : TransformerDecoder

    Examples
    --------
    A sentence is encoded once, then decoded a token at a time, each seeing those before:

    >>> import numpy as np
    >>> from fastattn import nn
    >>> model = nn.Transformer(16, 2, 1, 1, 32, batch_first=True, seed=0)
    >>> src, tgt = np.random.default_rng(0).standard_normal((2, 1, 5, 16), np.float32)
    >>> whole = model(src, tgt, tgt_is_causal=True)
    >>> memory, cache = model.encoder(src), model.decoder.new_cache(batch_size=1, max_length=5)
    >>> steps = [model.decoder(tgt[:, i : i + 1], memory, cache=cache) for i in range(5)]
    >>> bool(np.abs(np.concatenate(steps, axis=1) - whole).max() < 1e-5)
    True
    """

    def __init__(self, d_model=512, nhead=8, num_encoder_layers=6, num_decoder_layers=6, dim_feedforward=2048,
                 dropout=0.1, activation="relu", custom_encoder=None, custom_decoder=None, layer_norm_eps=1e-5,
                 batch_first=False, norm_first=False, bias=True, dtype="float32", *, seed=None):
        super().__init__()
        options = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias,
                   dtype)
        rng = generator(seed)
        self.d_model, self.nhead, self.batch_first = d_model, nhead, batch_first

        def norm():
            return LayerNorm(d_model, layer_norm_eps, bias=bias, dtype=dtype)

        self.encoder, self.decoder = custom_encoder, custom_decoder
        if custom_encoder is None:
            self.encoder = TransformerEncoder(TransformerEncoderLayer(*options, seed=rng), num_encoder_layers, norm())
        if custom_decoder is None:
            self.decoder = TransformerDecoder(TransformerDecoderLayer(*options, seed=rng), num_decoder_layers, norm())

    @staticmethod
    def generate_square_subsequent_mask(sz, dtype="float32"):
        """A float mask (sz, sz), -inf above the diagonal and 0 elsewhere; is_causal=True means it and costs less."""
        return np.triu(np.full((sz, sz), -np.inf, dtype), 1)

    def __call__(self, src, tgt, src_mask=None, tgt_mask=None, memory_mask=None, src_key_padding_mask=None,
                 tgt_key_padding_mask=None, memory_key_padding_mask=None, src_is_causal=None, tgt_is_causal=None,
                 memory_is_causal=False):
        """An array of tgt's shape; masks and hints as in `MultiheadAttention`."""
        memory = self.encoder(src, src_mask, src_key_padding_mask, src_is_causal)
        return self.decoder(tgt, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask,
                            tgt_is_causal, memory_is_causal)
