"""transformers: ``attn_implementation="fastattn"``, for every model that asks the library's AttentionInterface.

    from fastattn.integrations import transformers as fastattn_transformers     # registers it

    model = AutoModel.from_pretrained(name, attn_implementation="fastattn")
    model.set_attn_implementation("fastattn")                                   # or later

Unlike "sdpa" it takes softcap (Gemma 2), sinks (gpt-oss), and a bias beside a mask (T5), none of which is written out
for queries x keys; key heads are not repeated. Training and `torch.compile` work as with `fastattn.integrations.torch`.
"""

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from .torch import new_seed, operator


def attention_forward(module, query, key, value, attention_mask, dropout=0.0, scaling=None, is_causal=None,
                      position_bias=None, softcap=None, s_aux=None, **kwargs):
    """One layer's attention as transformers calls it.

    Parameters
    ----------
    module : torch.nn.Module
        Its ``is_causal`` (default True) holds where the argument is None.
    query : tensor (B, H, L, D)
    key, value : tensors (B, Hkv, S, D) and (B, Hkv, S, Dv)
    attention_mask : tensor that broadcasts to (B, H, L, S), optional
        Boolean, True = attend, or added to the scores. Without it, and with more than one query, causal modules see
        keys j <= i.
    dropout : float
    scaling, softcap : float, optional
    is_causal : bool, optional
    position_bias : tensor that broadcasts to (B, H, L, S), optional
        Added to the scores.
    s_aux : tensor (H,), optional
        Sinks: logits of a key that has no value.

    Returns
    -------
    (tensor (B, L, H, Dv), None)
        Contiguous. Rows that see no key are 0. Weights are not returned: take "eager" for ``output_attentions``.
    """
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    mask, bias = attention_mask, position_bias
    if mask is not None and mask.dtype != torch.bool:
        mask, bias = None, mask if bias is None else mask + bias
    if bias is not None and bias.dtype not in (query.dtype, torch.float32):
        bias = bias.to(query.dtype)
    out, _ = operator(
        query, key, value, bias, mask, s_aux, new_seed() if dropout > 0.0 else None,
        bool(is_causal and attention_mask is None and query.shape[2] > 1), scaling, softcap, dropout)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register("fastattn", attention_forward)
AttentionMaskInterface.register("fastattn", sdpa_mask)
