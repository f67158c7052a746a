"""Layers that everything is made of: products, norms, tables."""

import math

import numpy as np

from .. import checks
from ..layer import linear, normalise
from ._module import Module, check_activation, check_indices, float_dtype, generator, uniform


class Linear(Module):
    """activation(x weight^T + bias), by `fastattn.linear`; the weight is packed at the first call.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
    dtype : float32 or float64
        Of the weights.
    seed : int or Generator, optional
        Weights are drawn as torch does, from a uniform distribution between -1 / sqrt(in_features) and its opposite.

    Attributes
    ----------
    weight : array (out_features, in_features)
    bias : array (out_features,), or None

    Examples
    --------
    >>> import numpy as np
    >>> from fastattn import nn
    >>> layer = nn.Linear(3, 2)
    >>> keys = layer.load_state_dict({"weight": np.ones((2, 3)), "bias": np.array([0.0, -9.0])})
    >>> layer(np.ones((1, 3), np.float32), activation="relu")
    array([[3., 0.]], dtype=float32)
    """

    def __init__(self, in_features, out_features, bias=True, dtype="float32", *, seed=None):
        super().__init__()
        self.in_features = checks._integer("in_features", in_features, 0)
        self.out_features = checks._integer("out_features", out_features, 0)
        rng, limit = generator(seed), 1 / math.sqrt(max(in_features, 1))
        self.weight = uniform(rng, (out_features, in_features), limit, dtype)
        self.bias = uniform(rng, (out_features,), limit, dtype) if bias else None

    def __call__(self, x, activation=None):
        """activation(x weight^T + bias) for x (..., in_features); activation is a name of `linear`, or a function."""
        check_activation(activation)
        name, function = (None, activation) if callable(activation) else (activation, None)
        y = linear(x, self._packed("weight", self.weight), self.bias, name)
        return y if function is None else function(y)


class Conv2d(Module):
    """A convolution (cross-correlation) of images (B, C, H, W), as a product of patches.

    Patches are copied once each: meant for patches that do not overlap and for kernels of one pixel.

    Attributes
    ----------
    weight : array (out_channels, in_channels, kernel height, kernel width)
    bias : array (out_channels,), or None
    """

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, bias=True, dtype="float32", *,
                 seed=None):
        super().__init__()
        self.kernel_size, self.stride = pair("kernel_size", kernel_size, 1), pair("stride", stride, 1)
        self.padding = pair("padding", padding, 0)
        shape = (checks._integer("out_channels", out_channels, 1), checks._integer("in_channels", in_channels, 1),
                 *self.kernel_size)
        rng, limit = generator(seed), 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = uniform(rng, shape, limit, dtype)
        self.bias = uniform(rng, shape[:1], limit, dtype) if bias else None

    def rows(self, x):
        """The result as (B, H', W', out_channels)."""
        x = checks._array("x", x)
        N, C, h, w = self.weight.shape
        if x.ndim != 4 or x.shape[1] != C:
            raise ValueError(f"x must have shape (B, {C}, H, W), got {x.shape}")
        (top, left), (down, right) = self.padding, self.stride
        if top or left:
            x = np.pad(x, ((0, 0), (0, 0), (top, top), (left, left)))
        if x.shape[2] < h or x.shape[3] < w:
            raise ValueError(f"x must have at least the kernel's {h} x {w} pixels, got {x.shape[2]} x {x.shape[3]}")
        patches = np.lib.stride_tricks.sliding_window_view(x, (h, w), axis=(2, 3))[:, :, ::down, ::right]
        patches = patches.transpose(0, 2, 3, 1, 4, 5)
        return linear(patches.reshape(*patches.shape[:3], C * h * w), self._packed("weight", self.weight), self.bias)

    def __call__(self, x):
        """The result (B, out_channels, H', W'), a view in which channels lie next to each other."""
        return self.rows(x).transpose(0, 3, 1, 2)


class PatchEmbedding(Module):
    """Images (B, C, H, W) as rows of patches (B, patches, embed_dim), row after row, as in ViT.

    Parameters
    ----------
    in_channels, embed_dim : int
    patch_size : int or (height, width)
    bias : bool

    Attributes
    ----------
    proj : Conv2d
        Named as in timm, with a weight (embed_dim, in_channels, height, width).
    """

    def __init__(self, in_channels, embed_dim, patch_size, bias=True, dtype="float32", *, seed=None):
        super().__init__()
        self.proj = Conv2d(in_channels, embed_dim, patch_size, patch_size, 0, bias, dtype, seed=seed)

    def __call__(self, x):
        rows = self.proj.rows(x)
        return rows.reshape(len(rows), rows.shape[1] * rows.shape[2], rows.shape[3])


class Embedding(Module):
    """Rows of a table: `weight` (num_embeddings, embedding_dim).

    padding_idx is a row of zeros to begin with.
    """

    def __init__(self, num_embeddings, embedding_dim, padding_idx=None, dtype="float32", *, seed=None):
        super().__init__()
        self.num_embeddings = checks._integer("num_embeddings", num_embeddings, 0)
        self.embedding_dim = checks._integer("embedding_dim", embedding_dim, 0)
        self.weight = generator(seed).standard_normal((num_embeddings, embedding_dim)).astype(float_dtype(dtype))
        self.padding_idx = padding_idx
        if padding_idx is not None:
            self.weight[padding_idx] = 0

    def __call__(self, ids):
        """The rows (..., embedding_dim) of integers (...)."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "iu":
            raise TypeError(f"ids must be integers, got {ids.dtype}")
        check_indices("ids", ids, len(self.weight))
        return self.weight[ids]


class _Norm(Module):
    def __init__(self, normalized_shape, eps, elementwise_affine, bias, dtype):
        super().__init__()
        shape = (normalized_shape,) if checks._is_integer(normalized_shape) else tuple(normalized_shape)
        self.normalized_shape = tuple(checks._integer("normalized_shape", n, 1) for n in shape)
        self.eps = None if eps is None else checks._real("eps", eps)
        dtype = float_dtype(dtype)
        self.weight = np.ones(self.normalized_shape, dtype) if elementwise_affine else None
        self.bias = np.zeros(self.normalized_shape, dtype) if elementwise_affine and bias else None

    def __call__(self, x):
        """The result (..., *normalized_shape), of x's dtype."""
        return self.of_sum(x, None)[0]

    def of_sum(self, x, add):
        """The result for x + add, and x + add itself: one pass over both."""
        x, n = checks._array("x", x), len(self.normalized_shape)
        if x.shape[max(x.ndim - n, 0) :] != self.normalized_shape:
            raise ValueError(f"x must have shape (..., {', '.join(map(str, self.normalized_shape))}), got {x.shape}")
        if x.dtype not in (checks.FLOAT32, checks.FLOAT64) and not checks.is_half(x.dtype):
            raise TypeError(f"x must be float32, float64, float16 or bfloat16, got {x.dtype}")
        checks._check_layout("x", x)
        if add is not None:
            add = checks._array("add", add)
            if add.dtype != x.dtype:
                raise TypeError(f"add must have x's dtype {x.dtype}, got {add.dtype}")
            if add.shape != x.shape:
                raise ValueError(f"add must have x's shape {x.shape}, got {add.shape}")
            checks._check_layout("add", add)
        flat = (*x.shape[: x.ndim - n], math.prod(self.normalized_shape))
        weight, bias = (None if w is None else w.reshape(-1) for w in (self.weight, self.bias))
        eps = float(np.finfo(checks.compute_dtype(x.dtype)).eps) if self.eps is None else self.eps
        out, total = normalise(x.reshape(flat), weight, bias, eps, self.CENTRE,
                               None if add is None else add.reshape(flat))
        return out.reshape(x.shape), total.reshape(x.shape)


class LayerNorm(_Norm):
    """(x - mean) / sqrt(variance + eps) weight + bias, over the last axes.

    Parameters
    ----------
    normalized_shape : int or tuple
    eps : float
    elementwise_affine, bias : bool
        Whether there is a weight, and beside it a bias.
    """

    CENTRE = True

    def __init__(self, normalized_shape, eps=1e-5, elementwise_affine=True, bias=True, dtype="float32"):
        super().__init__(normalized_shape, eps, elementwise_affine, bias, dtype)


class RMSNorm(_Norm):
    """x / sqrt(mean of x^2 + eps) weight, over the last axes.

    Parameters
    ----------
    normalized_shape : int or tuple
    eps : float, optional
        By default the machine epsilon of the dtype, as in torch.
    elementwise_affine : bool
        Whether there is a weight.
    """

    CENTRE = False

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, dtype="float32"):
        super().__init__(normalized_shape, eps, elementwise_affine, False, dtype)


class Sequential(Module):
    """Modules and functions of arrays, one after the other; named "0", "1", ... in state dicts."""

    def __init__(self, *modules):
        super().__init__()
        self._chain = list(modules)

    def children(self):
        return ((str(i), part) for i, part in enumerate(self._chain) if isinstance(part, Module))

    def __getitem__(self, index):
        return self._chain[index]

    def __len__(self):
        return len(self._chain)

    def __call__(self, x):
        for part in self._chain:
            x = part(x)
        return x


def quick_gelu(x):
    """x / (1 + exp(-1.702 x)), for float32 or float64 x: the activation of CLIP, near to GELU.

    >>> quick_gelu(np.array([-1.0, 0.0, 1.0])).round(3)
    array([-0.154,  0.   ,  0.846])

    References
    ----------
    Hendrycks and Gimpel, "Gaussian Error Linear Units (GELUs)", 2016.
    """
    with np.errstate(over="ignore"):  # of exp far below 0, where the result is 0
        y = np.exp(x * x.dtype.type(-1.702))
    y += 1
    return np.divide(x, y, out=y)


def pair(name, value, low):
    """(height, width) of one number or two."""
    values = (value, value) if checks._is_integer(value) else tuple(value)
    if len(values) != 2:
        raise ValueError(f"{name} must be a number or two, got {value!r}")
    return tuple(checks._integer(name, n, low) for n in values)
