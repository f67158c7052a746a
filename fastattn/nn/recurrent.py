"""The attention of recurrent encoder-decoders, and the recurrence."""

import math
from typing import NamedTuple

import numpy as np

from .. import checks
from ..additive import additive_attention
from ..attention import attention, attention_weights
from ..layer import linear
from ._module import Module, check_features, divided, generator, uniform
from .layers import Embedding, Linear


class BahdanauAttention(Module):
    """Attention of a decoder's states to an encoder's, by scores Va tanh(Wa query + Ua key).

    Parameters
    ----------
    hidden_size : int
        Of the scores' space.
    query_size, key_size : int, optional
        Features of the states, by default hidden_size.
    bias : bool

    Attributes
    ----------
    Wa, Ua, Va : Linear
        Va's bias, which all scores share, changes nothing.

    References
    ----------
    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015.
    """

    def __init__(self, hidden_size, query_size=None, key_size=None, bias=True, dtype="float32", *, seed=None):
        super().__init__()
        rng = generator(seed)
        self.Wa = Linear(hidden_size if query_size is None else query_size, hidden_size, bias, dtype, seed=rng)
        self.Ua = Linear(hidden_size if key_size is None else key_size, hidden_size, bias, dtype, seed=rng)
        self.Va = Linear(hidden_size, 1, bias, dtype, seed=rng)

    def project(self, keys):
        """Ua keys, which `__call__` takes as ``projected``: once for all steps of a decoder."""
        return self.Ua(keys)

    def __call__(self, query, keys, *, projected=None, mask=None, kv_lengths=None, return_weights=False):
        """The contexts (B, L, key_size) of queries (B, L, query_size) and keys (B, S, key_size).

        mask (B, L, S), True = attend, and kv_lengths (B,) are those of `additive_attention`. With return_weights also
        the alignments (B, L, S).
        """
        query, keys = _states(query, keys)
        projected = self.project(keys) if projected is None else projected
        q, k, v = (x[:, None] for x in (self.Wa(query), projected, keys))
        options = {"mask": _with_heads(mask), "kv_lengths": kv_lengths}
        out = additive_attention(q, k, v, self.Va.weight[0], **options)[:, 0]
        return (out, _additive_weights(q, k, self.Va.weight[0], **options)) if return_weights else out


class LuongAttention(Module):
    """Attention of a decoder's states h to an encoder's e, by one of three scores.

    Parameters
    ----------
    method : "dot", "general" or "concat"
        h . e; h . (attn e); or v . tanh(attn [h, e]).
    hidden_size : int
        Of h, and of e but for "general".
    key_size : int, optional
        Of e for "general", by default hidden_size.
    bias : bool
        Of attn.

    Attributes
    ----------
    attn : Linear
        Not for "dot". For "concat" from 2 hidden_size features, h first.
    v : array (hidden_size,)
        For "concat".

    References
    ----------
    Luong, Pham and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015.
    """

    def __init__(self, method, hidden_size, key_size=None, bias=True, dtype="float32", *, seed=None):
        super().__init__()
        if method not in ("dot", "general", "concat"):
            raise ValueError(f"method must be 'dot', 'general' or 'concat', got {method!r}")
        key_size = hidden_size if key_size is None else key_size
        if method != "general" and key_size != hidden_size:
            raise ValueError(f"key_size must be hidden_size {hidden_size} for {method!r}, got {key_size}")
        self.method, self.hidden_size = method, hidden_size
        rng = generator(seed)
        if method == "general":
            self.attn = Linear(key_size, hidden_size, bias, dtype, seed=rng)
        elif method == "concat":
            self.attn = Linear(2 * hidden_size, hidden_size, bias, dtype, seed=rng)
            self.v = uniform(rng, (hidden_size,), 1 / math.sqrt(hidden_size), dtype)

    def project(self, keys):
        """What scores are made of keys by, which `__call__` takes as ``projected``: once for all steps of a decoder."""
        if self.method == "concat":
            return linear(keys, self._packed("e", self._half("e", slice(self.hidden_size, None))))
        return self.attn(keys) if self.method == "general" else keys

    def __call__(self, query, keys, *, projected=None, mask=None, kv_lengths=None, return_weights=False):
        """The contexts (B, L, key_size) of queries (B, L, hidden_size) and keys (B, S, key_size).

        mask (B, L, S), True = attend, and kv_lengths (B,) are those of `attention`. With return_weights also the
        alignments (B, L, S).
        """
        query, keys = _states(query, keys)
        k = self.project(keys) if projected is None else projected
        options = {"mask": _with_heads(mask), "kv_lengths": kv_lengths}
        if self.method == "concat":  # attn [h, e] is a sum of two products
            of_h = self._packed("h", self._half("h", slice(0, self.hidden_size)))
            q, k, v = (x[:, None] for x in (linear(query, of_h, self.attn.bias), k, keys))
            out = additive_attention(q, k, v, self.v, **options)[:, 0]
            return (out, _additive_weights(q, k, self.v, **options)) if return_weights else out
        q, k, v = (x[:, None] for x in (query, k, keys))
        out = attention(q, k, v, scale=1.0, **options)[:, 0]
        return (out, attention_weights(q, k, scale=1.0, **options)[:, 0]) if return_weights else out

    def _half(self, key, columns):
        """The part of attn that multiplies h, or e."""
        return self._derive(("attn", key), (self.attn.weight,), lambda: np.array(self.attn.weight[:, columns]))


class GRU(Module):
    """torch.nn.GRU of one layer, batch first.

    Parameters
    ----------
    input_size, hidden_size : int
    bias : bool
    dtype : float32 or float64
    bidirectional : bool
        Whether a second one reads from the end to the beginning.
    seed : int or Generator, optional

    Attributes
    ----------
    weight_ih_l0, weight_hh_l0 : arrays (3 hidden_size, input_size) and (3 hidden_size, hidden_size)
    bias_ih_l0, bias_hh_l0 : arrays (3 hidden_size,), or None
        And with _reverse behind their names those of the way back.

    References
    ----------
    Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder", 2014.
    """

    def __init__(self, input_size, hidden_size, bias=True, dtype="float32", *, bidirectional=False, seed=None):
        super().__init__()
        self.input_size, self.hidden_size = input_size, checks._integer("hidden_size", hidden_size, 1)
        self.bidirectional = checks._boolean("bidirectional", bidirectional)
        rng, limit = generator(seed), 1 / math.sqrt(hidden_size)
        for end in ("", "_reverse")[: 1 + self.bidirectional]:
            for name, columns in ("ih", input_size), ("hh", hidden_size):
                setattr(self, f"weight_{name}_l0{end}", uniform(rng, (3 * hidden_size, columns), limit, dtype))
                values = uniform(rng, (3 * hidden_size,), limit, dtype) if bias else None
                setattr(self, f"bias_{name}_l0{end}", values)

    def __call__(self, x, h=None, lengths=None):
        """(states (B, L, hidden_size), the last of them (B, hidden_size)) of x (B, L, input_size).

        Parameters
        ----------
        x : array
        h : array (B, hidden_size), or (2, B, hidden_size) if bidirectional, optional
            The states before the first step, by default 0.
        lengths : int or integers (B,), optional
            Of sequences that end before L: states behind the end are 0, and the last is that at the end.

        Returns
        -------
        tuple
            If bidirectional, the states of both ways beside each other, (B, L, 2 hidden_size), and (2, B, hidden_size).
        """
        x = check_features("x", x, self.input_size)
        if x.ndim != 3:
            raise ValueError(f"x must have shape (B, L, {self.input_size}), got {x.shape}")
        (B, L, _), n, ways = x.shape, self.hidden_size, 1 + self.bidirectional
        shape = (ways, B, n)[1 - self.bidirectional :]
        h = np.zeros(shape, x.dtype) if h is None else check_features("h", h, n)
        if h.shape != shape:
            raise ValueError(f"h must have shape {shape}, got {h.shape}")
        ends = None if lengths is None else checks._integers("lengths", lengths, (B,), 0, L)
        states, last = checks.aligned_empty((B, L, ways * n), x.dtype), np.empty(shape, x.dtype)
        for way, (first, final) in enumerate(zip(h.reshape(ways, B, n), last.reshape(ways, B, n))):
            self._run(x, first, ("", "_reverse")[way], ends, states[..., way * n : (way + 1) * n], final)
        return states, last

    def _run(self, x, h, end, ends, states, last):
        """Fill states (B, L, n) and last (B, n) from h on, in the direction whose names have this end."""
        n, (weight_x, bias_x, weight_h, bias_h) = self.hidden_size, (
            getattr(self, f"{kind}_{name}_l0{end}") for name in ("ih", "hh") for kind in ("weight", "bias"))
        gates = linear(x, self._packed("ih" + end, weight_x), bias_x)
        weight_h = self._packed("hh" + end, weight_h)
        with np.errstate(over="ignore"):
            for t in range(x.shape[1])[:: -1 if end else 1]:
                now, past = gates[:, t], linear(h, weight_h, bias_h)
                reset, update = np.split(1 / (1 + np.exp(-(now[:, : 2 * n] + past[:, : 2 * n]))), 2, axis=1)
                new = np.tanh(now[:, 2 * n :] + reset * past[:, 2 * n :])
                new += update * (h - new)
                if ends is None:
                    states[:, t] = h = new
                else:
                    inside = (t < ends)[:, None]
                    h = np.where(inside, new, h)
                    states[:, t] = np.where(inside, new, 0)
        last[...] = h


class RecurrentState(NamedTuple):
    """Where a `RecurrentEncoderDecoder` stands between two steps."""

    hidden: np.ndarray  # (B, hidden_size), of the decoder
    annotations: np.ndarray  # (B, S, hidden_size), of the encoder: keys and values
    projected: np.ndarray  # what attention makes of them once
    lengths: np.ndarray | None  # (B,), of the sources


class RecurrentEncoderDecoder(Module):
    """Sequence to sequence by two recurrences, the second of which attends to the states of the first at every step.

    By Bahdanau's attention the last state asks, and what it gets goes into the next one::

        c_i = attention(h_{i-1}, annotations)       h_i = GRU([e(y_i), c_i], h_{i-1})

    By Luong's the new state asks::

        h_i = GRU(e(y_i), h_{i-1})                  c_i = attention(h_i, annotations)

    The logits are out tanh(Wc [c_i, h_i]) by both.

    Parameters
    ----------
    source_size, target_size : int
        Of the vocabularies.
    hidden_size : int
        Of embeddings, annotations and states.
    attention : "bahdanau", "dot", "general" or "concat"
    bidirectional : bool
        Whether the encoder has half of hidden_size for each direction.
    dtype : float32 or float64
    seed : int or Generator, optional

    Attributes
    ----------
    source_embedding, target_embedding : Embedding
    encoder, decoder : GRU
    bridge : Linear
        tanh of it, of the encoder's last states, is the decoder's first one.
    attention : BahdanauAttention or LuongAttention
    Wc, out : Linear

    References
    ----------
    Bahdanau, Cho and Bengio, "Neural Machine Translation by Jointly Learning to Align and Translate", 2015; Luong, Pham
    and Manning, "Effective Approaches to Attention-based Neural Machine Translation", 2015.

    Examples
    --------
    The decoder reads what was written before, here in one call and step by step:

    >>> import numpy as np
    >>> from fastattn import nn
    >>> model = nn.RecurrentEncoderDecoder(20, 10, 8, "general", dtype="float64", seed=0)
    >>> source, written = np.array([[3, 1, 4, 1]]), np.array([[0, 7, 2]])
    >>> logits = model(source, written)
    >>> state = model.encode(source)
    >>> for token, expected in zip(written.T, logits.swapaxes(0, 1)):
    ...     step, weights, state = model.step(token, state)
    ...     assert np.allclose(step, expected)
    >>> weights.shape
    (1, 4)
    """

    def __init__(self, source_size, target_size, hidden_size, attention="bahdanau", bidirectional=True, dtype="float32",
                 *, seed=None):
        super().__init__()
        rng = generator(seed)
        ways = 1 + checks._boolean("bidirectional", bidirectional)
        size = divided("hidden_size", hidden_size, ways)
        self.hidden_size = hidden_size
        self.source_embedding = Embedding(source_size, hidden_size, dtype=dtype, seed=rng)
        self.encoder = GRU(hidden_size, size, dtype=dtype, bidirectional=bidirectional, seed=rng)
        self.bridge = Linear(hidden_size, hidden_size, True, dtype, seed=rng)
        self.target_embedding = Embedding(target_size, hidden_size, dtype=dtype, seed=rng)
        if attention == "bahdanau":
            self.attention = BahdanauAttention(hidden_size, dtype=dtype, seed=rng)
        else:
            self.attention = LuongAttention(attention, hidden_size, dtype=dtype, seed=rng)
        self.decoder = GRU(hidden_size * (2 if attention == "bahdanau" else 1), hidden_size, dtype=dtype, seed=rng)
        self.Wc = Linear(2 * hidden_size, hidden_size, True, dtype, seed=rng)
        self.out = Linear(hidden_size, target_size, True, dtype, seed=rng)

    def encode(self, source, lengths=None):
        """The `RecurrentState` before the first step, of integers (B, S) and the true lengths (B,) of sources."""
        annotations, last = self.encoder(self.source_embedding(source), None, lengths)
        last = np.concatenate(list(last), axis=-1) if self.encoder.bidirectional else last
        return RecurrentState(np.tanh(self.bridge(last)), annotations, self.attention.project(annotations), lengths)

    def step(self, token, state):
        """(logits (B, target_size), weights (B, S), the next state) after integers (B,)."""
        logits, weights, state = self._steps(np.asarray(token)[:, None], state, True)
        return logits[:, 0], weights[:, 0], state

    def __call__(self, source, target, lengths=None, *, return_weights=False):
        """Logits (B, L, target_size) of what follows each of the integers target (B, L), and the alignments (B, L, S).

        source (B, S) are integers, of which lengths (B,) count. The alignments only with return_weights.
        """
        logits, weights, _ = self._steps(np.asarray(target), self.encode(source, lengths), return_weights)
        return (logits, weights) if return_weights else logits

    def _steps(self, tokens, state, return_weights):
        embedded = self.target_embedding(tokens)
        B, L, E = embedded.shape
        S, hidden = state.annotations.shape[1], state.hidden
        weights = np.empty((B, L, S), embedded.dtype) if return_weights else None

        def attend(queries, part):
            result = self.attention(queries, state.annotations, projected=state.projected, kv_lengths=state.lengths,
                                    return_weights=return_weights)
            if return_weights:
                result, weights[:, part] = result
            return result

        if isinstance(self.attention, BahdanauAttention):
            states, contexts = (np.empty((B, L, E), embedded.dtype) for _ in range(2))
            for i in range(L):
                contexts[:, i : i + 1] = attend(hidden[:, None], slice(i, i + 1))
                inputs = np.concatenate([embedded[:, i : i + 1], contexts[:, i : i + 1]], axis=-1)
                states[:, i : i + 1], hidden = self.decoder(inputs, hidden)
        else:
            states, hidden = self.decoder(embedded, hidden)
            contexts = attend(states, slice(None))
        logits = self.out(np.tanh(self.Wc(np.concatenate([contexts, states], axis=-1))))
        return logits, weights, state._replace(hidden=hidden)


def _states(query, keys):
    query, keys = checks._array("query", query), checks._array("keys", keys)
    for name, x in (("query", query), ("keys", keys)):
        if x.ndim != 3:
            raise ValueError(f"{name} must have 3 axes, got shape {x.shape}")
    return query, keys


def _with_heads(mask):
    return None if mask is None else checks._array("mask", mask)[:, None]


def _additive_weights(q, k, w, mask, kv_lengths):
    """The weights (B, L, S) of additive attention: what it returns for values that are unit vectors."""
    S = k.shape[2]
    unit = np.broadcast_to(np.eye(S, dtype=k.dtype), (*k.shape[:2], S, S))
    return additive_attention(q, k, unit, w, mask=mask, kv_lengths=kv_lengths)[:, 0]
