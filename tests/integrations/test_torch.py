"""fastattn.integrations.torch: torch's own meanings, gradients of both orders, compilation, and training."""

import numpy as np
import pytest

import fastattn as fa

torch = pytest.importorskip("torch", reason="torch is not installed")
F = torch.nn.functional

from fastattn.integrations import torch as ours  # noqa: E402


def tensors(shape_q, shape_k, Dv, dtype=torch.float64, seed=0, grad=True):
    generator = torch.Generator().manual_seed(seed)
    shapes = shape_q, shape_k, (*shape_k[:-1], Dv)
    return [torch.randn(shape, dtype=dtype, generator=generator).requires_grad_(grad) for shape in shapes]


def cases(dtype):
    mask = torch.rand(20, 30, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[:, 0] = True
    bias = torch.randn(4, 20, 30, dtype=dtype, generator=torch.Generator().manual_seed(2))
    return [({}, (2, 4, 20, 8), (2, 4, 30, 8)), ({"is_causal": True}, (2, 4, 20, 8), (2, 4, 30, 8)),
            ({"scale": 0.3}, (4, 20, 8), (4, 30, 8)), ({"attn_mask": mask}, (2, 4, 20, 8), (2, 4, 30, 8)),
            ({"attn_mask": bias}, (2, 4, 20, 8), (2, 4, 30, 8)), ({}, (20, 8), (30, 8)),
            ({"enable_gqa": True}, (2, 4, 20, 8), (2, 2, 30, 8)), ({}, (2, 3, 4, 20, 8), (2, 3, 4, 30, 8))]


@pytest.mark.parametrize("dtype, tight", [(torch.float64, 1e-12), (torch.float32, 2e-5), (torch.float16, 1e-2),
                                          (torch.bfloat16, 6e-2)], ids=str)
def test_as_torch_has_it(dtype, tight):
    if dtype == torch.bfloat16:
        pytest.importorskip("ml_dtypes")
    for options, q, k in cases(dtype):
        inputs = tensors(q, k, 5, dtype)
        expected = F.scaled_dot_product_attention(*inputs, **options)
        out = ours.scaled_dot_product_attention(*inputs, **options)
        assert out.shape == expected.shape and out.dtype == expected.dtype
        torch.testing.assert_close(out, expected, rtol=tight, atol=tight)
        grad = torch.randn(out.shape, dtype=dtype)
        for x, y in zip(torch.autograd.grad(out, inputs, grad), torch.autograd.grad(expected, inputs, grad)):
            torch.testing.assert_close(x, y, rtol=5 * tight, atol=5 * tight)


def test_no_copy():
    """A transposed view is read where it lies, and nothing is written to it."""
    q, k, v = (x.transpose(1, 2) for x in tensors((2, 20, 4, 8), (2, 30, 4, 8), 8, grad=False))
    before = [x.clone() for x in (q, k, v)]
    ours.scaled_dot_product_attention(q, k, v)
    assert all(torch.equal(x, y) for x, y in zip((q, k, v), before))


def test_layout():
    """Results have their heads where the arguments have them: inside rows, and outside."""
    for swapped in (False, True):
        q, k, v = tensors((2, 20, 4, 8) if swapped else (2, 4, 20, 8), (2, 30, 4, 8) if swapped else (2, 4, 30, 8), 8)
        inputs = [x.transpose(1, 2) if swapped else x for x in (q, k, v)]
        out = ours.scaled_dot_product_attention(*inputs)
        for x in (out, *torch.autograd.grad(out, inputs, torch.ones_like(out))):
            assert x.transpose(1, 2).is_contiguous() == swapped and x.is_contiguous() != swapped


def test_masks_that_are_added_have_a_gradient_when_asked(monkeypatch):
    wanted = []
    inner = ours.gradient.backward
    monkeypatch.setattr(ours.gradient, "backward",
                        lambda *args, of_bias, **rest: wanted.append(of_bias) or inner(*args, of_bias=of_bias, **rest))
    inputs = tensors((2, 4, 20, 8), (2, 4, 30, 8), 8)
    bias = torch.randn(20, 30, dtype=torch.float64)
    ours.scaled_dot_product_attention(*inputs, attn_mask=bias).sum().backward()
    plain = [x.grad.clone() for x in inputs]
    bias.requires_grad_()
    ours.scaled_dot_product_attention(*inputs, attn_mask=bias).sum().backward()
    assert wanted == [False, True] and bias.grad.shape == bias.shape
    assert all(torch.equal(2 * x, y.grad) for x, y in zip(plain, inputs))


SMALL = (2, 2, 3, 2), (2, 2, 4, 2), 2


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": -0.4}, {"mask": True}, {"bias": True},
                                     {"mask": True, "bias": True}, {"gqa": True}, {"dropout_p": 0.4}, {"softcap": 0.8},
                                     {"sinks": True}, {"softcap": 1.5, "sinks": True, "bias": True}], ids=str)
def test_gradcheck(options):
    q, k, dv = SMALL
    inputs = tensors(q, (2, 1, 4, 2) if options.get("gqa") else k, dv)
    mask = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1]], dtype=torch.bool) if options.get("mask") else None
    inputs.append(torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True) if options.get("bias") else None)
    inputs.append(torch.randn(2, dtype=torch.float64, requires_grad=True) if options.get("sinks") else None)
    seed = torch.tensor(5) if "dropout_p" in options else None
    rest = (options.get("is_causal", False), options.get("scale", 0.7), options.get("softcap"),
            options.get("dropout_p", 0.0))

    def call(query, key, value, bias, sinks):
        return ours.operator(query, key, value, bias, mask, sinks, seed, *rest)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"bias": True}, {"dropout_p": 0.3}, {"sinks": True},
                                     {"heads_inside": True}], ids=str)
def test_opcheck(options):
    inputs = tensors(*SMALL)
    if options.get("heads_inside"):
        inputs = [x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for x in inputs]
    bias = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True) if options.get("bias") else None
    seed = torch.tensor(5) if "dropout_p" in options else None
    sinks = torch.randn(2, dtype=torch.float64, requires_grad=True) if options.get("sinks") else None
    rest = bias, None, sinks, seed, options.get("is_causal", False), 0.7, None, options.get("dropout_p", 0.0)
    torch.library.opcheck(ours.operator, (*inputs, *rest))
    out, lse = (x.detach() for x in ours.operator(*inputs, *rest))
    inputs = [x.detach().requires_grad_() for x in inputs]
    rest = torch.ones_like(out), None, *inputs, out, lse, bias is not None, *rest
    torch.library.opcheck(ours.operator_backward, rest)


def test_dropout():
    inputs = tensors((2, 2, 50, 8), (2, 2, 60, 8), 8, grad=False)
    torch.manual_seed(3)
    first = ours.scaled_dot_product_attention(*inputs, dropout_p=0.5)
    assert not torch.equal(first, ours.scaled_dot_product_attention(*inputs, dropout_p=0.5))
    torch.manual_seed(3)
    assert torch.equal(first, ours.scaled_dot_product_attention(*inputs, dropout_p=0.5))


def test_patch(monkeypatch):
    """MultiheadAttention calls it under the name, and only there; what it does not take goes to torch."""
    called = []
    inner = ours.attention
    monkeypatch.setattr(ours, "attention", lambda *args, **options: called.append(1) or inner(*args, **options))
    layer = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    x = torch.randn(2, 10, 16)
    expected = layer(x, x, x, need_weights=False)[0]
    original = F.scaled_dot_product_attention
    with ours.patch():
        assert F.scaled_dot_product_attention is not original and not called
        layer.train()
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected, rtol=1e-5, atol=1e-6)
        assert len(called) == 1
        integers = torch.ones(1, 1, 2, 2, dtype=torch.int32)
        with pytest.raises(RuntimeError):    # torch's own answer to what neither takes
            F.scaled_dot_product_attention(integers, integers, integers)
    layer(x, x, x, need_weights=False)
    assert F.scaled_dot_product_attention is original and len(called) == 1


def test_errors():
    q, k, v = tensors((1, 4, 3, 2), (1, 2, 4, 2), 2)
    with pytest.raises(ValueError, match="key must have query's 4 heads without enable_gqa, got 2"):
        ours.scaled_dot_product_attention(q, k, v)
    with pytest.raises(RuntimeError, match="attn_mask must be None with is_causal=True, got both"):
        ours.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(3, 3, dtype=torch.bool), is_causal=True)
    with pytest.raises(RuntimeError, match="query must be on the CPU, got device meta"):
        ours.scaled_dot_product_attention(q.to("meta"), k, v, enable_gqa=True)


def test_error_at_most_that_of_torch():
    """RMS of the gradients against float64."""
    for shape in ((1, 4, 512, 64), (2, 8, 128, 32)):
        wide = tensors(shape, shape, shape[-1])
        grad = torch.randn(shape, dtype=torch.float64)
        exact = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, grad)
        narrow = [x.detach().float().requires_grad_() for x in wide]
        wide = [x.detach().double().requires_grad_() for x in narrow]
        grad = grad.float()
        exact = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, grad.double())
        errors = [[float((x.double() - y).square().mean().sqrt()) for x, y in
                   zip(torch.autograd.grad(function(*narrow), narrow, grad), exact)]
                  for function in (ours.scaled_dot_product_attention, F.scaled_dot_product_attention)]
        for mine, theirs in zip(*errors):
            assert mine <= 1.05 * theirs, (fa.isa(), shape, errors)


def test_training():
    """A small causal model learns the same by fastattn as by torch."""
    def losses(attend):
        torch.manual_seed(0)
        embed, head = torch.nn.Embedding(50, 32), torch.nn.Linear(32, 50)
        qkv = torch.nn.Linear(32, 96)
        optimizer = torch.optim.SGD([*embed.parameters(), *qkv.parameters(), *head.parameters()], lr=0.5)
        tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (4, 33)))
        result = []
        for _ in range(10):
            x = embed(tokens[:, :-1])
            q, k, v = (y.unflatten(-1, (4, 8)).transpose(1, 2) for y in qkv(x).chunk(3, -1))
            x = x + attend(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            loss = F.cross_entropy(head(x).flatten(0, 1), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            result.append(loss.item())
        return result

    ours_, theirs = losses(ours.scaled_dot_product_attention), losses(F.scaled_dot_product_attention)
    np.testing.assert_allclose(ours_, theirs, rtol=1e-4)
    assert ours_[-1] < ours_[0]
