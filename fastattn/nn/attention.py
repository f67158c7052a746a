"""Attention layers: projections around `fastattn.attention`.

Heads are views of the projections: (B, L, E) or (L, B, E) is seen as (B, H, L, D), and the result is written through
such a view too, so that nothing is transposed in memory.
"""

import math

import numpy as np

from .. import checks, masks
from ..attention import attention, attention_weights
from ..cache import KVCache
from ..layer import linear
from ..lowrank import linformer_attention
from ._module import Module, check_features, check_indices, divided, float_dtype, generator, uniform
from .layers import Conv2d, Linear

# What `attention` is told beside the masks and arrays of `MultiheadAttention`.
OPTIONS = ("mask", "bias", "causal", "window", "query_offset", "scale", "softcap", "sinks", "normalizer", "score_mod",
           "deterministic", "num_threads")


class MultiheadAttention(Module):
    """torch.nn.MultiheadAttention in eval mode, with its options, names and state dict.

    Parameters
    ----------
    embed_dim, num_heads : int
        A head has embed_dim / num_heads features.
    dropout : float
        Kept, without effect: layers compute what torch does in eval mode.
    bias : bool
        Of all four projections.
    add_bias_kv, add_zero_attn : bool
        One more key and value: learned ones, or zeros.
    kdim, vdim : int, optional
        Features of keys and values, by default embed_dim.
    batch_first : bool
        Whether arrays are (B, L, E) instead of (L, B, E).
    dtype : float32 or float64
        Of the weights, and of the inputs.
    head_dim : int, optional
        Features of a head, if they are not embed_dim / num_heads: T5 has such.
    options : dict, optional
        Options of `fastattn.attention` for every call, as ``{"scale": 1.0, "bias": fa.RelativeBias.t5(table)}`` or
        ``{"window": 128}``: mask, bias, causal, window, query_offset, scale, softcap, sinks, normalizer, score_mod,
        deterministic and num_threads, with that function's meanings, but that query_offset is 0 by default.
    seed : int or Generator, optional
        Of the weights.

    Attributes
    ----------
    in_proj_weight : array (3 E, embed_dim), E = num_heads head_dim; or with kdim or vdim q_proj_weight, k_proj_weight,
        v_proj_weight
    in_proj_bias : array (3 E,), or None
    out_proj : Linear
        From E features to embed_dim.
    bias_k, bias_v : arrays (1, 1, E), or None
    options : dict

    Notes
    -----
    Arrays that are one object are projected by one product: all three, key and value, or query and key. A row that
    sees no key is out_proj of 0, with weights 0; torch has NaN there where it makes weights.

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import nn
    >>> layer = nn.MultiheadAttention(8, 2, batch_first=True, seed=0)
    >>> x = np.ones((1, 3, 8), np.float32)
    >>> out, weights = layer(x, x, x)
    >>> out.shape, weights.round(3)
    ((1, 3, 8), array([[[0.333, 0.333, 0.333],
            [0.333, 0.333, 0.333],
            [0.333, 0.333, 0.333]]], dtype=float32))
    """

    def __init__(self, embed_dim, num_heads, dropout=0.0, bias=True, add_bias_kv=False, add_zero_attn=False, kdim=None,
                 vdim=None, batch_first=False, dtype="float32", *, head_dim=None, options=None, seed=None):
        super().__init__()
        if head_dim is None:
            self.head_dim = divided("embed_dim", embed_dim, num_heads)
        else:
            self.head_dim = checks._integer("head_dim", head_dim, 1)
        self.embed_dim, self.num_heads = (checks._integer(name, n, 1) for name, n in (("embed_dim", embed_dim),
                                                                                      ("num_heads", num_heads)))
        self.options = {} if options is None else dict(options)
        self.dropout = checks._real("dropout", dropout)
        self.kdim = embed_dim if kdim is None else checks._integer("kdim", kdim, 1)
        self.vdim = embed_dim if vdim is None else checks._integer("vdim", vdim, 1)
        self.batch_first = checks._boolean("batch_first", batch_first)
        self.add_zero_attn = checks._boolean("add_zero_attn", add_zero_attn)
        rng, E, dtype = generator(seed), self.num_heads * self.head_dim, float_dtype(dtype)
        if self._together:
            self.in_proj_weight = uniform(rng, (3 * E, embed_dim), math.sqrt(6 / (3 * E + embed_dim)), dtype)
        else:
            sizes = ("q_proj_weight", embed_dim), ("k_proj_weight", self.kdim), ("v_proj_weight", self.vdim)
            for name, size in sizes:
                setattr(self, name, uniform(rng, (E, size), math.sqrt(6 / (E + size)), dtype))
        self.in_proj_bias = np.zeros(3 * E, dtype) if bias else None
        for name in "bias_k", "bias_v":
            setattr(self, name, rng.standard_normal((1, 1, E)).astype(dtype) / math.sqrt(E) if add_bias_kv else None)
        self.out_proj = Linear(E, embed_dim, bias, dtype, seed=rng)
        if bias:
            self.out_proj.bias[...] = 0

    def __call__(self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                 average_attn_weights=True, is_causal=False, *, cache=None, **options):
        """(out, weights) of queries (L, B, embed_dim), keys (S, B, kdim) and values (S, B, vdim).

        Parameters
        ----------
        query, key, value : arrays
            Batches come first with batch_first; without a batch they are (L, embed_dim), (S, kdim), (S, vdim).
        key_padding_mask : bool or float array (B, S), or (S,) without a batch, optional
            True hides the key (the opposite of `fastattn.attention`); floats are added to the scores.
        need_weights : bool
            Whether weights are returned, which takes memory and time; else None.
        attn_mask : bool or float array (L, S) or (B num_heads, L, S), optional
            As key_padding_mask.
        average_attn_weights : bool
            Whether the weights are the mean over the heads, (B, L, S), or (B, num_heads, L, S).
        is_causal : bool
            Query i sees keys j <= i. Beside attn_mask, it says that this is what the mask means: as in torch, the mask
            is then read only where there is a key_padding_mask or weights are needed, and otherwise keys from
            add_bias_kv and add_zero_attn are hidden from queries before them too.
        cache : KVCache or dict, optional
            A `KVCache`, as from `new_cache`: key and value are new tokens that are added to its sequences 0 to B - 1,
            and each query sees its own token and all before it; need_weights must be False and no mask given but a
            key_padding_mask, True at the ends of sequences with fewer new tokens. A dict: the projected keys and values
            of the first call are kept in it, and used by later ones.
        **options
            As the constructor's, for this call; they come before those. A mask or bias must not come beside masks of
            its kind, bools or floats. Keys of add_bias_kv and add_zero_attn are behind the others.

        Returns
        -------
        out : array of query's shape
        weights : array or None

        Raises
        ------
        TypeError, ValueError, MemoryError
            Arrays of other shapes or dtypes than these and the weights'; a cache beside what does not go with it;
            options that `attention` refuses.
        """
        given = self.options | options if self.options or options else {}
        arrays, batched = self._inputs(query, key, value)
        if isinstance(cache, dict) and cache:
            (q,), (k, v) = self._product(arrays[0], 0, 1), cache["rows"]
        else:
            q, k, v = self._heads(*arrays)
        if isinstance(cache, dict):
            cache["rows"] = k, v
        elif cache is not None:
            if need_weights or attn_mask is not None or self._extra:
                raise ValueError("cache must come with need_weights=False and without attn_mask, add_bias_kv and "
                                 "add_zero_attn")
            ids, new = np.arange(len(q)), self._counts(key_padding_mask, k, batched)
            cache.append(ids, k, v, new)
            return self._out(q, batched, lambda out: cache.attend(q, ids, causal=True, query_lengths=new, out=out,
                                                                  **given)), None
        options = self._options(q, k, key_padding_mask, attn_mask, is_causal, need_weights, batched)
        if given:
            options = _merged(given, options)
        k, v = self._with_extra(k, self.bias_k), self._with_extra(v, self.bias_v)
        out = self._out(q, batched, lambda out: attention(q, k, v, out=out, **options))
        if not need_weights:
            return out, None
        weights = attention_weights(q, k, **options)
        weights = weights.mean(axis=1) if average_attn_weights else weights
        return out, weights if batched else weights[0]

    def new_cache(self, batch_size, max_length, dtype="float32", *, page_size=16):
        """A `KVCache` for this layer, with room for batch_size sequences of max_length tokens."""
        pages = batch_size * -(-max_length // page_size)
        return KVCache(pages, page_size, self.num_heads, self.head_dim, dtype=dtype)

    @property
    def _extra(self):
        return (self.bias_k is not None) + self.add_zero_attn

    def _inputs(self, query, key, value):
        """The arrays with an axis of batches, still one object where they were, and whether they had one."""
        seen = {}

        def one(name, x, size):
            if id(x) not in seen:
                array = check_features(name, x, size)
                if array.ndim not in (2, 3):
                    raise ValueError(f"{name} must have 2 or 3 axes, got shape {array.shape}")
                seen[id(x)] = array if array.ndim == 3 else array[None] if self.batch_first else array[:, None]
                seen[id(x), "ndim"] = array.ndim
            if seen[id(x)].shape[-1] != size:
                raise ValueError(f"{name} must have shape (..., {size}), got {seen[id(x)].shape}")
            return seen[id(x)], seen[id(x), "ndim"]

        named = ("query", query, self.embed_dim), ("key", key, self.kdim), ("value", value, self.vdim)
        (query, *axes), (key, *key_axes), (value, *value_axes) = (one(*given) for given in named)
        if key_axes != axes or value_axes != axes:
            raise ValueError(f"key and value must have query's {axes[0]} axes, got {key_axes[0]} and {value_axes[0]}")
        if key.shape[:2] != value.shape[:2]:
            raise ValueError(f"value must have key's leading axes {key.shape[:2]}, got {value.shape[:2]}")
        batch = 0 if self.batch_first else 1
        if key.shape[batch] != query.shape[batch]:
            raise ValueError(f"key must have query's {query.shape[batch]} batches, got {key.shape[batch]}")
        return (query, key, value), axes == [3]

    @property
    def _together(self):
        """Whether the three projections are one weight."""
        return self.kdim == self.vdim == self.embed_dim

    def _product(self, x, first, last):
        """Queries, keys and values, from number first to last - 1 of the three, of one input: (B, H, L, D) each."""
        E = self.num_heads * self.head_dim
        rows = slice(first * E, last * E)
        if self._together:
            weight = self._packed("in_proj_weight", self.in_proj_weight, rows=rows)
        else:
            name = ("q_proj_weight", "k_proj_weight", "v_proj_weight")[first]
            weight = self._packed(name, getattr(self, name))
        y = linear(x, weight, None if self.in_proj_bias is None else self.in_proj_bias[rows])
        return [self._view(part) for part in np.split(y, last - first, axis=-1)]

    def _heads(self, query, key, value):
        """Queries, keys and values by as few products as can be."""
        if self._together and query is key and key is value:
            return self._product(query, 0, 3)
        if self._together and key is value:
            return self._product(query, 0, 1) + self._product(key, 1, 3)
        if self._together and query is key:
            return self._product(query, 0, 2) + self._product(value, 2, 3)
        return self._product(query, 0, 1) + self._product(key, 1, 2) + self._product(value, 2, 3)

    def _view(self, y):
        """(B, L, E) or (L, B, E) as (B, H, L, D)."""
        y = y.reshape(*y.shape[:2], self.num_heads, self.head_dim)
        return y.transpose(0, 2, 1, 3) if self.batch_first else y.transpose(1, 2, 0, 3)

    def _out(self, q, batched, attend):
        """out_proj of what ``attend`` writes."""
        B, H, L, D = q.shape
        context = checks.aligned_empty((B, L, H * D) if self.batch_first else (L, B, H * D), q.dtype)
        attend(self._view(context))
        out = self.out_proj(context)
        return out if batched else out[0] if self.batch_first else out[:, 0]

    def _with_extra(self, rows, learned):
        """Keys or values with those of add_bias_kv and add_zero_attn behind them."""
        if not self._extra:
            return rows
        B, H, S, D = rows.shape
        longer = np.zeros((B, H, S + self._extra, D), rows.dtype)
        longer[:, :, :S] = rows
        if learned is not None:
            longer[:, :, S] = learned.reshape(H, D)
        return longer

    def _counts(self, padding, k, batched):
        """The tokens (B,) before padding that must be at the ends, or None."""
        if padding is None:
            return None
        B, S = k.shape[0], k.shape[2]
        padding = _mask("key_padding_mask", padding, ((B, S),) if batched else ((S,),)).reshape(B, S)
        return _ends("key_padding_mask", padding)

    def _options(self, q, k, padding, mask, is_causal, need_weights, batched):
        """The masks of torch as options of `attention`. Two of one kind become one array."""
        (B, H, L, _), S, extra = q.shape, k.shape[2], self._extra
        options = {}
        if is_causal and (mask is None or (padding is None and not need_weights)):
            if mask is None and extra:
                mask = ~np.tri(L, S, dtype=bool)
            else:
                mask, options = None, {"causal": True, "query_offset": 0}
        hidden, added = [], []
        if padding is not None:
            padding = _mask("key_padding_mask", padding, ((B, S),) if batched else ((S,),)).reshape(B, 1, 1, S)
            if padding.dtype == bool and not extra:
                counts = S - padding[:, 0, 0].sum(axis=-1)
                if (padding[:, 0, 0] == (np.arange(S) >= counts[:, None])).all():  # at the ends alone
                    options["kv_lengths"], padding = counts, None
        if mask is not None:
            mask = _mask("attn_mask", mask, ((L, S), (B * H, L, S)))
            mask = mask.reshape(*((1, 1) if mask.ndim == 2 else (B, H)), L, S)
        for array in padding, mask:
            if array is not None:
                if extra:
                    array = np.pad(array, ((0, 0),) * 3 + ((0, extra),))
                (hidden if array.dtype == bool else added).append(array)
        if hidden:
            options["mask"] = ~(hidden[0] if len(hidden) == 1 else hidden[0] | hidden[1])
        if added:
            options["bias"] = (added[0] if len(added) == 1 else added[0] + added[1]).astype(q.dtype, copy=False)
        return options


class _OneHead(Module):
    """softmax(Q K^T / sqrt(head_dim)) V of one head."""

    def __init__(self, embed_dim, context_dim, head_dim, value_dim, bias, dtype, seed):
        super().__init__()
        head_dim = embed_dim if head_dim is None else head_dim
        value_dim = head_dim if value_dim is None else value_dim
        rng = generator(seed)
        self.W_q = Linear(embed_dim, head_dim, bias, dtype, seed=rng)
        self.W_k = Linear(context_dim, head_dim, bias, dtype, seed=rng)
        self.W_v = Linear(context_dim, value_dim, bias, dtype, seed=rng)

    def _attend(self, q, k, v, options):
        result = attention(*(a[..., None, :, :] for a in (q, k, v)), **options)
        if isinstance(result, tuple):
            return result[0][..., 0, :, :], result[1][..., 0, :]
        return result[..., 0, :, :]


class SelfAttention(_OneHead):
    """Attention with one head: softmax(Q K^T / sqrt(head_dim)) V, where Q = x W_q^T, K = x W_k^T, V = x W_v^T.

    Parameters
    ----------
    embed_dim : int
        Features of x.
    head_dim, value_dim : int, optional
        Features of queries and keys, and of values; by default embed_dim and head_dim.
    bias : bool
    dtype : float32 or float64
    seed : int or Generator, optional

    Attributes
    ----------
    W_q, W_k, W_v : Linear

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import nn
    >>> layer = nn.SelfAttention(2, dtype="float64")
    >>> keys = layer.load_state_dict({"W_q.weight": np.eye(2), "W_k.weight": np.zeros((2, 2)), "W_v.weight": np.eye(2)})
    >>> layer(np.array([[0.0, 2.0], [4.0, 0.0]]), causal=True)
    array([[0., 2.],
           [2., 1.]])
    """

    def __init__(self, embed_dim, head_dim=None, value_dim=None, bias=False, dtype="float32", *, seed=None):
        super().__init__(embed_dim, embed_dim, head_dim, value_dim, bias, dtype, seed)

    def __call__(self, x, **options):
        """(..., L, value_dim) of x (..., L, embed_dim), with options of `attention`, whose arrays have one head."""
        return self._attend(*self._project(x, "W_q", "W_k", "W_v"), options)


class CrossAttention(_OneHead):
    """`SelfAttention`, but keys and values are those of a context.

    Parameters
    ----------
    embed_dim : int
        Features of x.
    context_dim : int, optional
        Features of the context, by default embed_dim.
    head_dim, value_dim, bias, dtype, seed
        As in `SelfAttention`.

    Attributes
    ----------
    W_q, W_k, W_v : Linear
    """

    def __init__(self, embed_dim, context_dim=None, head_dim=None, value_dim=None, bias=False, dtype="float32", *,
                 seed=None):
        super().__init__(embed_dim, embed_dim if context_dim is None else context_dim, head_dim, value_dim, bias, dtype,
                         seed)

    def __call__(self, x, context, **options):
        """(..., L, value_dim) of x (..., L, embed_dim) and context (..., S, context_dim), with options of `attention`,
        whose arrays have one head."""
        return self._attend(self.W_q(x), *self._project(context, "W_k", "W_v"), options)


class SelfAttention2d(Module):
    """Self-attention between the pixels of images, of SAGAN: x + gamma attention(x), with scores q . k.

    Parameters
    ----------
    channels : int
    key_channels : int, optional
        Of queries and keys, by default channels / 8.

    Attributes
    ----------
    query_conv, key_conv, value_conv : Conv2d
        Of one pixel.
    gamma : array (1,)
        0 to begin with: the layer is then the identity.

    References
    ----------
    Zhang, Goodfellow, Metaxas and Odena, "Self-Attention Generative Adversarial Networks", 2019.
    """

    def __init__(self, channels, key_channels=None, dtype="float32", *, seed=None):
        super().__init__()
        key_channels = max(1, channels // 8) if key_channels is None else key_channels
        rng = generator(seed)
        self.query_conv = Conv2d(channels, key_channels, 1, dtype=dtype, seed=rng)
        self.key_conv = Conv2d(channels, key_channels, 1, dtype=dtype, seed=rng)
        self.value_conv = Conv2d(channels, channels, 1, dtype=dtype, seed=rng)
        self.gamma = np.zeros(1, float_dtype(dtype))

    def __call__(self, x, return_weights=False):
        """The images (B, channels, H, W), and with return_weights the weights (B, H W, H W) of each pixel."""
        x = checks._array("x", x)
        if x.ndim != 4:
            raise ValueError(f"x must have shape (B, C, H, W), got {x.shape}")
        pixels = x.transpose(0, 2, 3, 1)
        pixels = pixels.reshape(len(x), x.shape[2] * x.shape[3], x.shape[1])
        q, k, v = (rows[:, None] for rows in self._project(pixels, "query_conv", "key_conv", "value_conv"))
        out = attention(q, k, v, scale=1.0)[:, 0].swapaxes(1, 2).reshape(x.shape)
        out *= self.gamma
        out += x
        return (out, attention_weights(q, k, scale=1.0)[:, 0]) if return_weights else out


class _HeadedSelfAttention(Module):
    """query, key and value of heads, as in transformers, for masks that are expressions."""

    def __init__(self, embed_dim, num_heads, bias, dtype, seed, names=("query", "key", "value")):
        super().__init__()
        self.head_dim = divided("embed_dim", embed_dim, num_heads)
        self.embed_dim, self.num_heads = int(embed_dim), int(num_heads)
        rng = generator(seed)
        for name in names:
            setattr(self, name, Linear(embed_dim, embed_dim, bias, dtype, seed=rng))

    def _heads(self, x, *names):
        """The named projections of x (B, S, E) as (B, H, S, D)."""
        return [y.reshape(*y.shape[:2], self.num_heads, self.head_dim).swapaxes(1, 2)
                for y in self._project(x, *names)]

    def _rows(self, name, x):
        x = check_features(name, x, self.embed_dim)
        if x.ndim != 3:
            raise ValueError(f"{name} must have shape (B, S, {self.embed_dim}), got {x.shape}")
        return x

    def _masked(self, mask, x, padding):
        """The mask of x's rows, less padding (B, S) where it is True."""
        if padding is None:
            return {"mask": mask}
        shape = x.shape[:2]
        padding = _mask("key_padding_mask", padding, (shape,))
        return {"mask": mask, "kv_lengths": _ends("key_padding_mask", padding)}


class LongformerSelfAttention(_HeadedSelfAttention):
    """Longformer's self-attention: a window, and tokens that see and are seen by all, which have projections of their
    own for what they see.

    Parameters
    ----------
    embed_dim, num_heads : int
    attention_window : int
        Even: each query sees half of it on either side.
    bias : bool

    Attributes
    ----------
    query, key, value, query_global, key_global, value_global : Linear
        Named as in transformers.

    References
    ----------
    Beltagy, Peters and Cohan, "Longformer: The Long-Document Transformer", 2020.
    """

    def __init__(self, embed_dim, num_heads, attention_window, bias=True, dtype="float32", *, seed=None):
        names = ("query", "key", "value", "query_global", "key_global", "value_global")
        super().__init__(embed_dim, num_heads, bias, dtype, seed, names)
        self.attention_window = checks._integer("attention_window", attention_window, 0)
        if attention_window % 2:
            raise ValueError(f"attention_window must be even, got {attention_window}")

    def __call__(self, x, global_tokens=(), key_padding_mask=None):
        """(B, S, embed_dim) of x (B, S, embed_dim).

        Parameters
        ----------
        x : array
        global_tokens : integers
            Positions, the same in all sequences.
        key_padding_mask : bool array (B, S), optional
            True, at the ends of sequences, hides keys.
        """
        x = self._rows("x", x)
        tokens = np.asarray(global_tokens, np.int64).reshape(-1)
        check_indices("global_tokens", tokens, x.shape[1])
        options = self._masked(masks.longformer(self.attention_window, tokens), x, key_padding_mask)
        out = checks.aligned_empty(x.shape, x.dtype)
        view = out.reshape(*x.shape[:2], self.num_heads, self.head_dim).swapaxes(1, 2)
        attention(*self._heads(x, "query", "key", "value"), out=view, **options)
        if tokens.size:
            del options["mask"]
            (q,), (k, v) = self._heads(x[:, tokens], "query_global"), self._heads(x, "key_global", "value_global")
            view[:, :, tokens] = attention(q, k, v, **options)
        return out


class BigBirdSelfAttention(_HeadedSelfAttention):
    """BigBird's self-attention between blocks: a window, random blocks and global ones.

    Parameters
    ----------
    embed_dim, num_heads : int
    block_size : int
    num_random_blocks, window_blocks, num_global_blocks, mask_seed : int
        As random, width, blocks and seed of `masks.bigbird`.
    bias : bool

    Attributes
    ----------
    query, key, value : Linear
        Named as in transformers.
    mask : Mask
        Another may take its place: `masks.blocks` of a layout (num_heads, blocks, blocks) sees random blocks of a model
        that was trained with others for each head.

    References
    ----------
    Zaheer et al., "Big Bird: Transformers for Longer Sequences", 2020.
    """

    def __init__(self, embed_dim, num_heads, block_size=64, num_random_blocks=3, window_blocks=3, num_global_blocks=1,
                 bias=True, dtype="float32", *, mask_seed=0, seed=None):
        super().__init__(embed_dim, num_heads, bias, dtype, seed)
        self.mask = masks.bigbird(block_size, random=num_random_blocks, width=window_blocks, blocks=num_global_blocks,
                                  seed=mask_seed)

    def __call__(self, x, key_padding_mask=None):
        """(B, S, embed_dim) of x (B, S, embed_dim), S a multiple of block_size with at least num_random_blocks blocks.

        key_padding_mask (B, S), True at the ends of sequences, hides keys.
        """
        x = self._rows("x", x)
        out = checks.aligned_empty(x.shape, x.dtype)
        view = out.reshape(*x.shape[:2], self.num_heads, self.head_dim).swapaxes(1, 2)
        attention(*self._heads(x, "query", "key", "value"), out=view, **self._masked(self.mask, x, key_padding_mask))
        return out


class LinformerSelfAttention(Module):
    """Linformer's self-attention: keys and values of up to seq_len rows are combined to k rows.

    Parameters
    ----------
    embed_dim, seq_len : int
    k : int
        Rows that are left.
    num_heads : int
    head_dim : int, optional
        By default embed_dim / num_heads.
    one_kv_head : bool
        Whether the heads share keys and values.
    share_kv : bool
        Whether values are the keys.

    Attributes
    ----------
    to_q, to_k, to_v, to_out : Linear
    proj_k, proj_v : arrays (seq_len, k)
        The names are those of the package linformer. Without to_v and proj_v if share_kv.

    References
    ----------
    Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020.
    """

    def __init__(self, embed_dim, seq_len, k=256, num_heads=8, head_dim=None, one_kv_head=False, share_kv=False,
                 dtype="float32", *, seed=None):
        super().__init__()
        self.head_dim = divided("embed_dim", embed_dim, num_heads) if head_dim is None else head_dim
        self.embed_dim, self.num_heads, self.seq_len = embed_dim, num_heads, checks._integer("seq_len", seq_len, 1)
        checks._integer("k", k, 1)
        rng, inner = generator(seed), self.head_dim * num_heads
        self.to_q = Linear(embed_dim, inner, False, dtype, seed=rng)
        for name in "k", "v":
            if name == "k" or not share_kv:
                size = self.head_dim if one_kv_head else inner
                setattr(self, f"to_{name}", Linear(embed_dim, size, False, dtype, seed=rng))
                setattr(self, f"proj_{name}", uniform(rng, (seq_len, k), 1 / math.sqrt(k), dtype))
        self.to_out = Linear(inner, embed_dim, True, dtype, seed=rng)

    def __call__(self, x):
        """(B, S, embed_dim) of x (B, S, embed_dim), S at most seq_len."""
        x = check_features("x", x, self.embed_dim)
        if x.ndim != 3 or x.shape[1] > self.seq_len:
            raise ValueError(f"x must have shape (B, up to {self.seq_len}, {self.embed_dim}), got {x.shape}")
        shared = not hasattr(self, "to_v")
        parts = self._project(x, "to_q", "to_k", *(() if shared else ("to_v",)))
        q, k, *v = (y.reshape(*y.shape[:2], y.shape[2] // self.head_dim, self.head_dim).swapaxes(1, 2) for y in parts)
        # Transposed copies of S columns, as linformer_attention has them.
        of_key = self.proj_k[: x.shape[1]].T
        of_value = of_key if shared else self.proj_v[: x.shape[1]].T
        context = checks.aligned_empty((*x.shape[:2], self.num_heads * self.head_dim), x.dtype)
        view = context.reshape(*x.shape[:2], self.num_heads, self.head_dim).swapaxes(1, 2)
        linformer_attention(q, k, k if shared else v[0], of_key, of_value, out=view)
        return self.to_out(context)


def _merged(given, of_masks):
    """Options of `attention` and those that torch's masks have become."""
    unknown = given.keys() - OPTIONS
    if unknown:
        raise TypeError(f"options must be among {', '.join(OPTIONS)}, got {', '.join(sorted(unknown))}")
    for name in ("mask", "bias"):
        if name in given and name in of_masks:
            raise ValueError(f"{name} must not come beside {'bool' if name == 'mask' else 'float'} masks, got both")
    return {"query_offset": 0} | of_masks | given


def _ends(name, padding):
    """The lengths (B,) that padding (B, S), True at the ends alone, leaves."""
    if padding.dtype != bool:
        raise TypeError(f"{name} must be bool, got {padding.dtype}")
    counts = padding.shape[1] - padding.sum(axis=1)
    if not (padding == (np.arange(padding.shape[1]) >= counts[:, None])).all():
        raise ValueError(f"{name} must be True at the ends of sequences alone, got others")
    return counts


def _mask(name, mask, shapes):
    """A mask of bools or floats of one of some shapes."""
    mask = checks._array(name, mask)
    if mask.dtype != bool and mask.dtype.kind != "f":
        raise TypeError(f"{name} must be of bools or floats, got {mask.dtype}")
    if mask.shape not in shapes:
        raise ValueError(f"{name} must have shape {' or '.join(map(str, shapes))}, got {mask.shape}")
    return mask
