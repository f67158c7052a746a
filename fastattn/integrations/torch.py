"""torch: `scaled_dot_product_attention` by fastattn, with gradients, on CPU tensors without a copy.

    from fastattn.integrations import torch as fastattn_torch

    out = fastattn_torch.scaled_dot_product_attention(query, key, value, is_causal=True)
    with fastattn_torch.patch():            # whatever calls torch.nn.functional.scaled_dot_product_attention
        model(inputs)

It is two operators of torch.library, which `torch.compile` keeps in its graphs: ``fastattn::attention`` and its
derivative, whose own derivative is torch's, recomputed with L x S weights.
"""

import contextlib

import numpy as np
import torch

from .. import attention, checks, gradient, reference

_BITS = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}
_original = torch.nn.functional.scaled_dot_product_attention


def scaled_dot_product_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
                                 enable_gqa=False):
    """`torch.nn.functional.scaled_dot_product_attention` with its arguments and meanings, by fastattn.

    Parameters
    ----------
    query : tensor (..., H, L, D) on the CPU, float32, float64, float16 or bfloat16
        bfloat16 needs ml_dtypes.
    key, value : tensors (..., Hkv, S, D) and (..., Hkv, S, Dv) of query's dtype
        Hkv is H, or divides it with ``enable_gqa``.
    attn_mask : tensor that broadcasts to (..., H, L, S), optional
        Boolean, True = attend; or of query's dtype or float32, added to the scores and differentiable.
    dropout_p : float
        Applied whenever it is greater than 0, with numbers of torch's generator as seed.
    is_causal : bool
        Query i sees keys j <= i. Not together with attn_mask.
    scale : float, optional
        Default ``1 / sqrt(D)``.
    enable_gqa : bool

    Returns
    -------
    tensor (..., H, L, Dv) of query's dtype
        Rows that see no key are 0. The bits do not depend on the number of threads.

    Raises
    ------
    RuntimeError
        attn_mask together with is_causal; tensors that are not on the CPU.
    TypeError, ValueError
        As `fastattn.attention`.
    """
    if attn_mask is not None and is_causal:
        raise RuntimeError("attn_mask must be None with is_causal=True, got both")
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if tensor is not None and tensor.device.type != "cpu":
            raise RuntimeError(f"{name} must be on the CPU, got device {tensor.device}")
    if query.dim() > 2 and key.dim() > 2 and not enable_gqa and key.shape[-3] not in (1, query.shape[-3]):
        raise ValueError(f"key must have query's {query.shape[-3]} heads without enable_gqa, got {key.shape[-3]}")
    mask = bias = None
    if attn_mask is not None:
        mask, bias = (attn_mask, None) if attn_mask.dtype == torch.bool else (None, attn_mask)
    seed = new_seed() if dropout_p > 0.0 else None
    return operator(query, key, value, bias, mask, None, seed, bool(is_causal), scale, None, float(dropout_p))[0]


@contextlib.contextmanager
def patch():
    """Put `scaled_dot_product_attention` in the place of torch.nn.functional's for a block of code.

    Calls that it does not take, such as those on other devices, of nested tensors or of other dtypes, go to torch as
    before. The name is replaced for all threads, as long as the block runs.
    """
    before = torch.nn.functional.scaled_dot_product_attention
    torch.nn.functional.scaled_dot_product_attention = _ours_or_theirs
    try:
        yield
    finally:
        torch.nn.functional.scaled_dot_product_attention = before


def _ours_or_theirs(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    if _takes(query, key, value, attn_mask, is_causal):
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    return _original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _takes(query, key, value, attn_mask, is_causal):
    tensors = [query, key, value] + [attn_mask] * (attn_mask is not None)
    plain = all(x.device.type == "cpu" and x.layout == torch.strided and not x.is_nested for x in tensors)
    dtypes = query.dtype in _BITS or (query.dtype == torch.bfloat16 and _bfloat16() is not None)
    mask = attn_mask is None or (not is_causal and attn_mask.dtype in (torch.bool, query.dtype, torch.float32))
    return plain and dtypes and mask and key.dtype == value.dtype == query.dtype and 2 <= query.dim() <= 11


# --- tensors as arrays, on the same memory ---

def _bfloat16():
    try:
        import ml_dtypes
    except ImportError:
        return None
    return ml_dtypes.bfloat16


def _array(tensor):
    if tensor is None:
        return None
    tensor = tensor.detach()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    if _bfloat16() is None:
        raise TypeError("bfloat16 tensors need ml_dtypes, which is not installed")
    return tensor.view(torch.uint16).numpy().view(_bfloat16())


def _tensor(array):
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def new_seed():
    """A seed for dropout from torch's generator, as an operator takes it."""
    return torch.randint(2**63 - 1, (), dtype=torch.int64)


def _empty(tensor, shape):
    """A new tensor with heads inside rows where the tensor's are: what joins the heads again need not copy."""
    if tensor.dim() >= 3 and tensor.stride(-3) < tensor.stride(-2):
        return tensor.new_empty((*shape[:-3], shape[-2], shape[-3], shape[-1])).transpose(-3, -2)
    return tensor.new_empty(shape)


def _empty_like(tensor):
    return _empty(tensor, tensor.shape)


def _empty_out(query, key, value):
    lead = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    return _empty(query, (*lead, *query.shape[-3:-1], value.shape[-1]))


def _options(bias, mask, sinks, seed, is_causal, scale, softcap, dropout_p):
    options = {"bias": _array(bias), "mask": _array(mask), "sinks": _array(sinks), "scale": scale, "softcap": softcap,
               "num_threads": torch.get_num_threads()}
    if is_causal:
        options |= {"causal": True, "query_offset": 0}
    if dropout_p > 0.0:
        options |= {"dropout_p": dropout_p, "seed": int(seed)}
    return options


# --- operators ---

@torch.library.custom_op("fastattn::attention", mutates_args=())
def operator(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor | None, mask: torch.Tensor | None,
    sinks: torch.Tensor | None, seed: torch.Tensor | None, is_causal: bool, scale: float | None, softcap: float | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, lse) of `fastattn.attention` with its options as tensors; is_causal counts from the first query and key."""
    out = _empty_out(query, key, value)
    _, lse = attention(_array(query), _array(key), _array(value), out=_array(out), return_lse=True,
                       **_options(bias, mask, sinks, seed, is_causal, scale, softcap, dropout_p))
    return out, _tensor(lse)


@operator.register_fake
def _(query, key, value, bias, mask, sinks, seed, is_causal, scale, softcap, dropout_p):
    out = _empty_out(query, key, value)
    return out, out.new_empty(out.shape[:-1], dtype=torch.float64 if out.dtype == torch.float64 else torch.float32)


@torch.library.custom_op("fastattn::attention_backward", mutates_args=())
def operator_backward(
    grad_out: torch.Tensor, grad_lse: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    out: torch.Tensor, lse: torch.Tensor, of_bias: bool, bias: torch.Tensor | None, mask: torch.Tensor | None,
    sinks: torch.Tensor | None, seed: torch.Tensor | None, is_causal: bool, scale: float | None, softcap: float | None,
    dropout_p: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key, value, bias and sinks; empty tensors where there is none, or without `of_bias`."""
    results = [_empty_like(x) for x in (query, key, value)]
    gradients = gradient.backward(
        None, *map(_array, (grad_out, query, key, value, out, lse)), grad_lse=_array(grad_lse), of_bias=of_bias,
        into=[_array(x) for x in results], **_options(bias, mask, sinks, seed, is_causal, scale, softcap, dropout_p))
    return *results, *(query.new_empty(0) if x is None else _tensor(x) for x in (gradients.bias, gradients.sinks))


@operator_backward.register_fake
def _(grad_out, grad_lse, query, key, value, out, lse, of_bias, bias, mask, sinks, *options):
    return (*map(_empty_like, (query, key, value)),
            *(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias if of_bias else None, sinks)))


def _save(ctx, inputs, output):
    query, key, value, bias, mask, sinks, seed, *ctx.options = inputs
    ctx.save_for_backward(query, key, value, *output, bias, mask, sinks, seed)


def _backward(ctx, grad_out, grad_lse):
    query, key, value, out, lse, bias, mask, sinks, seed = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    of_bias = bias is not None and ctx.needs_input_grad[3]
    dq, dk, dv, d_bias, d_sinks = operator_backward(grad_out, grad_lse, query, key, value, out, lse, of_bias, bias,
                                                    mask, sinks, seed, *ctx.options)
    d_bias, d_sinks = d_bias if of_bias else None, None if sinks is None else d_sinks
    return dq, dk, dv, d_bias, None, d_sinks, None, None, None, None, None


operator.register_autograd(_backward, setup_context=_save)


# --- the second derivative, by torch ---

def _save_all(ctx, inputs, output):
    grad_out, grad_lse, query, key, value, _, _, _, bias, mask, sinks, seed, *ctx.options = inputs
    ctx.save_for_backward(grad_out, grad_lse, query, key, value, bias, mask, sinks, seed)


def _written_out(query, key, value, bias, mask, sinks, seed, is_causal, scale, softcap, dropout_p):
    """(out, lse) in torch's own operations, which differentiate any number of times."""
    group = query.shape[-3] // key.shape[-3] if query.dim() > 2 and key.shape[-3] else 1
    if group > 1:
        key, value = (x.repeat_interleave(group, -3) for x in (key, value))
    scores = (query.shape[-1] ** -0.5 if scale is None else scale) * (query @ key.mT)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    if bias is not None:
        scores = scores + bias
    if is_causal:
        L, S = scores.shape[-2:]
        seen = torch.ones(L, S, dtype=torch.bool).tril()
        mask = seen if mask is None else mask & seen
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    lse = scores.logsumexp(-1)
    if sinks is not None:
        lse = lse.logaddexp(sinks[:, None].to(lse.dtype))
    weights = (scores - lse.where(lse > -torch.inf, 0)[..., None]).exp()
    if dropout_p > 0.0:
        weights = weights * _dropout(weights.detach(), seed, dropout_p)
    return weights @ value, lse


@torch.library.custom_op("fastattn::dropout", mutates_args=())
def _dropout(weights: torch.Tensor, seed: torch.Tensor, dropout_p: float) -> torch.Tensor:
    """What the operators multiply these weights by."""
    shape = tuple(weights.shape)
    rows, keys = (np.zeros((*shape[:-2], n, 1), np.float32) for n in shape[-2:])
    problem = checks.problem(rows, keys, keys, dropout_p=dropout_p, seed=int(seed), results=False)
    factors = [reference.dropout(problem, batch, head) for batch, head, _ in reference.heads(problem)]
    return torch.from_numpy(np.reshape(factors, shape)).to(weights)


@_dropout.register_fake
def _(weights, seed, dropout_p):
    return torch.empty_like(weights)


def _double_backward(ctx, *grads):
    *leaves, mask, seed = (ctx.saved_tensors[i] for i in (0, 1, 2, 3, 4, 5, 7, 6, 8))
    with torch.enable_grad():
        leaves = [None if x is None else x.detach().requires_grad_() for x in leaves]
        grad_out, grad_lse, query, key, value, bias, sinks = leaves
        out, lse = _written_out(query, key, value, bias, mask, sinks, seed, *ctx.options)
        total = (out * grad_out).sum()
        if grad_lse is not None:
            total = total + (lse * grad_lse).where(lse > -torch.inf, 0).sum()
        given = [(x, grad) for x, grad in zip((query, key, value, bias, sinks), grads) if x is not None]
        first = torch.autograd.grad(total, [x for x, _ in given], create_graph=True)
        pairs = [(x, grad) for x, (_, grad) in zip(first, given) if grad is not None and grad.numel() == x.numel()]
        at = [x for x in leaves if x is not None]
        second = iter(torch.autograd.grad([x for x, _ in pairs], at, [g for _, g in pairs], allow_unused=True))
    d_out, d_lse, dq, dk, dv, d_bias, d_sinks = (None if x is None else next(second) for x in leaves)
    return d_out, d_lse, dq, dk, dv, None, None, None, d_bias, None, d_sinks, None, None, None, None, None


operator_backward.register_autograd(_double_backward, setup_context=_save_all)
