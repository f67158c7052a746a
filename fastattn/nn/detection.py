"""DETR: a picture's features as a set of objects, by an encoder-decoder whose positions stay beside its rows.

Positions are added to queries and keys, in each layer anew, and never to values:

    encoder layer    q = k = x + pos         v = x
    decoder layer    q = k = y + query_pos   v = y         queries among themselves
                     q = y + query_pos       k = memory + pos       v = memory
"""

import math
from typing import NamedTuple

import numpy as np

from .. import checks, positions
from ._module import Module, check_features, generator
from .layers import Conv2d, Embedding, LayerNorm, Linear
from .transformer import TransformerDecoderLayer, TransformerEncoderLayer, _Stack


class DETREncoderLayer(TransformerEncoderLayer):
    """`TransformerEncoderLayer`, with positions that are added to queries and keys alone.

    Its options and names are the same.
    """

    def __call__(self, src, src_mask=None, src_key_padding_mask=None, pos=None):
        """An array of src's shape; pos broadcasts to it, masks are as in `MultiheadAttention`."""
        def attend(x):
            placed = _placed(x, pos)
            return self.self_attn(placed, placed, x, src_key_padding_mask, False, src_mask)[0]

        return self._through(checks._array("src", src), attend, self._feed_forward)


class DETRDecoderLayer(TransformerDecoderLayer):
    """`TransformerDecoderLayer`, with positions that are added to queries and keys alone.

    Its options and names are the same.
    """

    def __call__(self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
                 memory_key_padding_mask=None, pos=None, query_pos=None, *, need_weights=False):
        """An array of tgt's shape, and with need_weights those of memory's rows, of each head.

        pos broadcasts to memory, query_pos to tgt; masks are as in `MultiheadAttention`.
        """
        weights = None

        def among(x):
            placed = _placed(x, query_pos)
            return self.self_attn(placed, placed, x, tgt_key_padding_mask, False, tgt_mask)[0]

        def across(x):
            nonlocal weights
            out, weights = self.multihead_attn(_placed(x, query_pos), _placed(memory, pos), memory,
                                               memory_key_padding_mask, need_weights, memory_mask, False)
            return out

        memory = checks._array("memory", memory)
        out = self._through(checks._array("tgt", tgt), among, across, self._feed_forward)
        return (out, weights) if need_weights else out


class DETREncoder(_Stack):
    """num_layers copies of a `DETREncoderLayer`, and a norm."""

    def __call__(self, src, mask=None, src_key_padding_mask=None, pos=None):
        """As `DETREncoderLayer`."""
        return self._through(src, None, lambda layer, x, _: layer(x, mask, src_key_padding_mask, pos))


class DETRDecoder(_Stack):
    """num_layers copies of a `DETRDecoderLayer`, and a norm."""

    def __call__(self, tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None,
                 memory_key_padding_mask=None, pos=None, query_pos=None, *, need_weights=False):
        """As `DETRDecoderLayer`; the weights are the last layer's."""
        weights = None

        def call(layer, x, _):
            nonlocal weights
            needed = need_weights and layer is self.layers[-1]
            y = layer(x, memory, tgt_mask, memory_mask, tgt_key_padding_mask, memory_key_padding_mask, pos, query_pos,
                      need_weights=needed)
            if needed:
                y, weights = y
            return y

        out = self._through(tgt, None, call)
        return (out, weights) if need_weights else out


class DETRTransformer(Module):
    """DETR's encoder-decoder: memory of rows with positions, and queries that look into it.

    Parameters
    ----------
    d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward : int
    dropout : float
        Without effect.
    activation : str, or function of arrays
    norm_first : bool
        The encoder then has a norm behind it too; the decoder always has.
    dtype : float32 or float64
    seed : int or Generator, optional

    Attributes
    ----------
    encoder : DETREncoder
    decoder : DETRDecoder
    """

    def __init__(self, d_model=256, nhead=8, num_encoder_layers=6, num_decoder_layers=6, dim_feedforward=2048,
                 dropout=0.1, activation="relu", norm_first=False, dtype="float32", *, seed=None):
        super().__init__()
        options = dict(dropout=dropout, activation=activation, norm_first=norm_first, batch_first=True, dtype=dtype)
        rng, self.d_model = generator(seed), d_model
        encoder, decoder = (kind(d_model, nhead, dim_feedforward, **options, seed=rng)
                            for kind in (DETREncoderLayer, DETRDecoderLayer))
        self.encoder = DETREncoder(encoder, num_encoder_layers, LayerNorm(d_model, dtype=dtype) if norm_first else None)
        self.decoder = DETRDecoder(decoder, num_decoder_layers, LayerNorm(d_model, dtype=dtype))

    def __call__(self, src, query_pos, pos=None, key_padding_mask=None, *, need_weights=False):
        """(rows of the queries (B, Q, d_model), memory (B, S, d_model)) of src (B, S, d_model).

        query_pos (Q, d_model) are the object queries, pos broadcasts to src, key_padding_mask (B, S) is True where src
        is padding. With need_weights also the weights (B, nhead, Q, S) of the last layer.
        """
        src = check_features("src", src, self.d_model)
        query_pos = check_features("query_pos", query_pos, self.d_model)
        memory = self.encoder(src, None, key_padding_mask, pos)
        queries = np.zeros((len(src), len(query_pos), self.d_model), src.dtype)
        result = self.decoder(queries, memory, memory_key_padding_mask=key_padding_mask, pos=pos, query_pos=query_pos,
                              need_weights=need_weights)
        return (result[0], memory, result[1]) if need_weights else (result, memory)


class MLP(Module):
    """Linear layers with ReLU between them, named layers.0, layers.1, ...

    Parameters
    ----------
    input_dim, hidden_dim, output_dim : int
    num_layers : int
        At least 1.
    """

    def __init__(self, input_dim, hidden_dim, output_dim, num_layers, dtype="float32", *, seed=None):
        super().__init__()
        sizes = [input_dim, *[hidden_dim] * (checks._integer("num_layers", num_layers, 1) - 1), output_dim]
        rng = generator(seed)
        self.layers = [Linear(n, k, True, dtype, seed=rng) for n, k in zip(sizes, sizes[1:])]

    def __call__(self, x):
        """(..., output_dim) of x (..., input_dim)."""
        for layer in self.layers[:-1]:
            x = layer(x, "relu")
        return self.layers[-1](x)


class Detections(NamedTuple):
    """What `DETR` finds: for each of its Q queries a class, or none, and a box."""

    logits: np.ndarray  # (B, Q, num_classes + 1), the last for no object
    boxes: np.ndarray  # (B, Q, 4): center x, center y, width, height, as parts of the picture's
    weights: np.ndarray | None  # (B, nhead, Q, H, W): where the last layer's heads look


class DETR(Module):
    """DETR behind its backbone: from a map of features to classes and boxes of objects.

    Parameters
    ----------
    in_channels : int
        Of the features: 2048 of a ResNet-50.
    num_classes, num_queries : int
    d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward
    dropout, activation, norm_first, dtype, seed
        As in `DETRTransformer`; d_model is a multiple of 4.

    Attributes
    ----------
    input_proj : Conv2d
        Of one pixel, from in_channels to d_model.
    transformer : DETRTransformer
    query_embed : Embedding
        The object queries.
    class_embed : Linear
    bbox_embed : MLP
        The names are those of facebookresearch/detr: of its weights all but those of the backbone fit,
        ``load_state_dict(state, strict=False)`` says which.

    References
    ----------
    Carion et al., "End-to-End Object Detection with Transformers", 2020.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import nn
    >>> model = nn.DETR(6, num_classes=3, num_queries=5, d_model=8, nhead=2, num_encoder_layers=1, num_decoder_layers=1,
    ...                 dim_feedforward=16, seed=0)
    >>> found = model(np.ones((1, 6, 4, 7), np.float32), return_weights=True)
    >>> found.logits.shape, found.boxes.shape, found.weights.shape
    ((1, 5, 4), (1, 5, 4), (1, 2, 5, 4, 7))
    """

    def __init__(self, in_channels=2048, num_classes=91, num_queries=100, d_model=256, nhead=8, num_encoder_layers=6,
                 num_decoder_layers=6, dim_feedforward=2048, dropout=0.1, activation="relu", norm_first=False,
                 dtype="float32", *, seed=None):
        super().__init__()
        rng = generator(seed)
        if checks._integer("d_model", d_model, 1) % 4:
            raise ValueError(f"d_model must be a multiple of 4, got {d_model}")
        self.transformer = DETRTransformer(d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward,
                                           dropout, activation, norm_first, dtype, seed=rng)
        self.class_embed = Linear(d_model, num_classes + 1, True, dtype, seed=rng)
        self.bbox_embed = MLP(d_model, d_model, 4, 3, dtype, seed=rng)
        self.query_embed = Embedding(num_queries, d_model, dtype=dtype, seed=rng)
        self.input_proj = Conv2d(in_channels, d_model, 1, dtype=dtype, seed=rng)

    def __call__(self, features, mask=None, *, return_weights=False):
        """`Detections` of features (B, in_channels, H, W).

        Parameters
        ----------
        features : array
        mask : bool array (B, H, W), optional
            True in padding: rows at the bottom and columns at the right, where pictures of a batch differ in size.
        return_weights : bool

        Raises
        ------
        TypeError, ValueError
            Arrays of other shapes or dtypes, a mask that hides anything else.
        """
        rows = self.input_proj.rows(features)
        B, H, W, E = rows.shape
        pos, padding = self._positions(mask, (B, H, W), rows.dtype)
        # Padding in the middle of the rows of pixels is one mask; whole rows of it at the bottom are lengths.
        result = self.transformer(rows.reshape(B, H * W, E), self.query_embed.weight, pos, padding,
                                  need_weights=return_weights)
        hidden = result[0]
        with np.errstate(over="ignore"):
            boxes = 1 / (1 + np.exp(-self.bbox_embed(hidden)))
        weights = result[2].reshape(B, -1, hidden.shape[1], H, W) if return_weights else None
        return Detections(self.class_embed(hidden), boxes, weights)

    def _positions(self, mask, shape, dtype):
        """Position embeddings (B or 1, H W, E) of what is no padding, and the padding (B, H W), or None."""
        B, H, W = shape
        E = self.transformer.d_model
        if mask is None:
            return positions.sinusoidal_2d(H, W, E, dtype=dtype).reshape(1, H * W, E), None
        mask = checks._array("mask", mask)
        if mask.dtype != bool:
            raise TypeError(f"mask must be bool, got {mask.dtype}")
        if mask.shape != shape:
            raise ValueError(f"mask must have shape {shape}, got {mask.shape}")
        heights, widths = (~mask).any(axis=2).sum(axis=1), (~mask).any(axis=1).sum(axis=1)
        seen = (np.arange(H)[:, None] < heights[:, None, None]) & (np.arange(W) < widths[:, None, None])
        if (seen == mask).any():
            raise ValueError("mask must hide rows at the bottom and columns at the right alone, got others")
        pos = np.zeros((B, H, W, E), dtype)  # where it is padding, nothing looks
        for own, h, w in zip(pos, heights, widths):
            own[:h, :w] = positions.sinusoidal_2d(h, w, E, dtype=dtype)
        return pos.reshape(B, H * W, E), mask.reshape(B, math.prod(shape[1:]))


def _placed(x, pos):
    return x if pos is None else x + pos
