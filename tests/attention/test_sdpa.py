"""Attention as networks call it, against PyTorch's."""

import pytest
import torch
from torch.nn import functional as F

from genkit import kernels
from genkit.attention import sdpa

F64 = torch.float64


def normal(*shape):
    return torch.randn(shape, dtype=F64)


def seen(*shape):
    mask = torch.rand(shape) > 0.4
    mask[..., 0] = True
    return mask


CASES = {
    "four axes": ((2, 3, 5, 8), (2, 3, 7, 8), {}),
    "three axes": ((2, 5, 8), (2, 7, 8), {}),
    "three axes, a mask of batch": ((2, 5, 8), (2, 7, 8), dict(attn_mask=seen(2, 5, 7))),
    "two axes": ((5, 8), (7, 8), dict(attn_mask=normal(5, 7))),
    "five axes": ((2, 3, 2, 5, 8), (2, 3, 2, 7, 8), dict(attn_mask=seen(3, 1, 5, 7))),
    "as many queries as items, two axes": ((5, 3, 5, 8), (5, 3, 5, 8), dict(attn_mask=seen(5, 5))),
    "keys of the batch": ((2, 3, 5, 8), (2, 3, 7, 8), dict(attn_mask=seen(2, 1, 1, 7))),
    "a bias of heads": ((2, 3, 5, 8), (2, 3, 7, 8), dict(attn_mask=normal(3, 5, 7))),
    "causal": ((2, 3, 5, 8), (2, 3, 5, 8), dict(is_causal=True)),
    "causal, more keys": ((2, 3, 5, 8), (2, 3, 7, 8), dict(is_causal=True, scale=0.3)),
    "causal, fewer keys": ((2, 3, 7, 8), (2, 3, 5, 8), dict(is_causal=True)),
    "keys of all items": ((2, 3, 5, 8), (1, 3, 7, 8), {}),
    "queries of all items": ((1, 3, 5, 8), (2, 3, 7, 8), dict(attn_mask=seen(2, 1, 5, 7))),
    "keys of all items and heads": ((2, 3, 5, 8), (1, 1, 7, 8), {}),
    "keys of all items, three axes": ((2, 5, 8), (1, 7, 8), {}),
    "keys of all items, five axes": ((2, 3, 2, 5, 8), (2, 1, 2, 7, 8), {}),
    "fewer axes of keys": ((3, 3, 5, 8), (3, 7, 8), {}),
    "groups, keys of all items": ((2, 4, 5, 8), (1, 2, 7, 8), dict(enable_gqa=True)),
    "groups": ((2, 4, 5, 8), (2, 2, 7, 8), dict(enable_gqa=True)),
}


@pytest.mark.parametrize("name", CASES)
def test_shapes_and_masks_mean_what_they_do_there(name):
    of_q, of_k, settings = CASES[name]
    q, k, v = normal(*of_q), normal(*of_k), normal(*of_k)
    expected = F.scaled_dot_product_attention(q, k, v, **settings)
    got = sdpa.scaled_dot_product_attention(q, k, v, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_bias_may_have_another_dtype():
    q, bias = normal(1, 2, 4, 8).bfloat16(), torch.randn(4, 4)
    expected = F.scaled_dot_product_attention(*3 * [q.double()], attn_mask=bias.bfloat16().double())
    got = sdpa.scaled_dot_product_attention(q, q, q, bias)
    assert got.dtype == q.dtype
    torch.testing.assert_close(got.double(), expected, rtol=1e-2, atol=1e-2)


def test_heads_without_a_kernel_are_computed_eagerly(monkeypatch):
    monkeypatch.setattr(kernels, "fused", lambda device: kernels.mode() != "off")  # as on a GPU
    q = torch.randn(1, 2, 4, 12)
    expected = F.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(sdpa.scaled_dot_product_attention(q, q, q), expected)
    with kernels.choose("on"), pytest.raises(ValueError, match="q and k have 12 channels a head"):
        sdpa.scaled_dot_product_attention(q, q, q)


def test_rows_without_keys_are_zero_as_there():
    q, mask = normal(1, 2, 4, 8), seen(4, 4)
    mask[1] = False
    expected = F.scaled_dot_product_attention(q, q, q, mask)
    assert not expected[:, :, 1].any()
    torch.testing.assert_close(sdpa.scaled_dot_product_attention(q, q, q, mask), expected)


def test_values_with_heads_of_their_own():
    q, k, v = normal(2, 3, 5, 8), normal(2, 1, 7, 8), normal(2, 3, 7, 8)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(sdpa.scaled_dot_product_attention(q, k, v), expected)


@pytest.mark.parametrize("channels", [20, 512])
@pytest.mark.parametrize("gpu", [False, True])
def test_heads_without_a_kernel_compile(channels, gpu, monkeypatch):
    if gpu:
        monkeypatch.setattr(kernels, "fused", lambda device: True)
    torch._dynamo.reset()
    q, k, v = (torch.randn(1, 2, 4, channels, requires_grad=True) for _ in range(3))
    results = []
    compiled = torch.compile(sdpa.scaled_dot_product_attention, backend="aot_eager", fullgraph=True)
    for function, x in ((compiled, (q, k, v)), (F.scaled_dot_product_attention, [x.double() for x in (q, k, v)])):
        o = function(*x)
        results.append((o, *torch.autograd.grad(o.square().sum(), x)))
    for got, exact in zip(*results, strict=True):
        assert (got - exact).norm() <= 2e-6 * exact.norm()
    torch._dynamo.reset()


def test_heads_without_a_kernel_in_dual_numbers(monkeypatch):
    from genkit.training.parts.dual import dual_jvp

    q, k, v, *tangents = (normal(1, 2, 4, 20).float() for _ in range(6))
    expected = torch.func.jvp(sdpa.scaled_dot_product_attention, (q, k, v), tuple(tangents))
    monkeypatch.setattr(kernels, "fused", lambda device: True)  # as on a GPU
    torch.testing.assert_close(dual_jvp(sdpa.scaled_dot_product_attention, (q, k, v), tuple(tangents)), expected)


def test_bad_input():
    q = normal(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"dropout_p=0.1: .* no dropout; put the network into eval mode"):
        sdpa.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="query has 4 heads and key 2; expected as many, or enable_gqa=True"):
        sdpa.scaled_dot_product_attention(q, q[:, :2], q[:, :2])
    many = normal(2, 4, 3, 8), normal(3, 4, 3, 8), normal(3, 4, 3, 8)
    with pytest.raises(ValueError, match=r"leading axes \(2,\), \(3,\) and \(3,\); expected axes that broadcast"):
        sdpa.scaled_dot_product_attention(*many)
