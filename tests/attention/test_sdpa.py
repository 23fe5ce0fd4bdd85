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


def test_bad_input():
    q = normal(1, 4, 3, 8)
    with pytest.raises(ValueError, match=r"dropout_p=0.1: .* no dropout; put the network into eval mode"):
        sdpa.scaled_dot_product_attention(q, q, q, dropout_p=0.1)
    with pytest.raises(ValueError, match="query has 4 heads and key 2; expected as many, or enable_gqa=True"):
        sdpa.scaled_dot_product_attention(q, q[:, :2], q[:, :2])
