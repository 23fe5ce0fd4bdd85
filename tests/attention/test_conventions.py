"""Each foreign way of calling attention against PyTorch's own, called as that library calls it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from genkit import _diffusers
from genkit.attention import conventions
from genkit.attention.sdpa import scaled_dot_product_attention

B, H, M, N, D = 2, 4, 5, 6, 8


def draw(heads=H, tokens=N):
    return torch.randn(B, heads, tokens, D, dtype=torch.float64)


def additive(mask):
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))


KEYS = torch.tensor([[1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 0, 0]], dtype=torch.bool)
PAIRS = torch.rand(B, H, M, N, generator=torch.Generator().manual_seed(0)) < 0.7


@pytest.mark.parametrize("form", ["bool", "additive"])
@pytest.mark.parametrize("mask", [None, KEYS, KEYS[:, None, None], PAIRS, PAIRS[:, :1]], ids=str)
def test_diffusers_masks(mask, form):
    q, k, v = draw(tokens=M), draw(), draw()
    full = mask if mask is None or mask.ndim == 4 else mask[:, None, None]
    if form == "additive" and mask is not None:
        mask = additive(mask)
    expected = F.scaled_dot_product_attention(q, k, v, full, scale=0.3)
    got = conventions.as_diffusers(*(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask, scale=0.3)
    torch.testing.assert_close(got, expected.transpose(1, 2))


def test_diffusers_groups_and_causality():
    q, k, v = (x.transpose(1, 2) for x in (draw(), draw(2), draw(2)))
    _, native, _ = _diffusers.backend_function("native")
    given = dict(is_causal=True, enable_gqa=True)
    torch.testing.assert_close(conventions.as_diffusers(q, k, v, **given), native(q, k, v, **given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (dict(dropout_p=0.1), "dropout_p=0.1: .*eval mode"),
        (dict(return_lse=True), "return_lse=True"),
        (dict(_parallel_config=object()), "context parallelism"),
        (dict(is_causal=True), "is_causal=True with 5 queries and 6 keys.*give attn_mask"),
        (dict(attn_mask=torch.ones(3, 6, dtype=torch.bool)), "does not broadcast"),
    ],
)
def test_diffusers_refusals(given, says):
    with pytest.raises(ValueError, match=says):
        conventions.as_diffusers(draw(tokens=M).transpose(1, 2), *[draw().transpose(1, 2)] * 2, **given)


def test_diffusers_refuses_fewer_heads_unasked():
    with pytest.raises(ValueError, match="enable_gqa=True"):
        conventions.as_diffusers(draw().transpose(1, 2), *[draw(2).transpose(1, 2)] * 2)


class _Module(nn.Module):
    def __init__(self, is_causal=None):
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal


@pytest.mark.parametrize(
    ("of_module", "given", "mask", "expected"),
    [
        (True, None, None, True),
        (False, True, None, True),  # the text encoder of CLIP
        (True, False, None, False),
        (False, None, None, False),
        (None, None, None, True),
        (True, None, PAIRS[:, :1, :, :M], False),  # the mask holds it
    ],
)
def test_transformers_causality(of_module, given, mask, expected):
    q, k, v = draw(tokens=M), draw(2, M), draw(2, M)
    attend = conventions.from_transformers(scaled_dot_product_attention)
    got, weights = attend(_Module(of_module), q, k, v, mask, scaling=0.3, is_causal=given)
    right = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, is_causal=expected, enable_gqa=True)
    torch.testing.assert_close(got, right.transpose(1, 2))
    assert weights is None and got.is_contiguous()


def test_transformers_one_query_sees_all_keys():
    q, k, v = draw(tokens=1), draw(), draw()
    got, _ = conventions.from_transformers(scaled_dot_product_attention)(_Module(True), q, k, v, None)
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v).transpose(1, 2))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, PAIRS[:, :1], additive(PAIRS[:, :1])], ids=["none", "bool", "additive"])
def test_transformers_position_bias(mask, causal):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v, bias = draw(tokens=M), draw(), draw(), torch.randn(1, H, M, N, dtype=torch.float64)
    module = _Module(causal)
    expected, _ = sdpa_attention_forward(module, q, k, v, mask, position_bias=bias)
    got, _ = conventions.from_transformers(scaled_dot_product_attention)(module, q, k, v, mask, position_bias=bias)
    torch.testing.assert_close(got, expected)


def test_transformers_static_cache_that_is_empty():
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    q, k, v = draw(tokens=M), draw(), draw()
    got, _ = conventions.from_transformers(scaled_dot_product_attention)(_Module(True), q, k, v, None)
    torch.testing.assert_close(got, sdpa_attention_forward(_Module(True), q, k, v, None)[0])


def test_rows_of_which_all_is_masked_are_0():
    q, k, v = draw(tokens=M), draw(), draw()
    mask = PAIRS[:, :1].clone()
    mask[0, 0, 2] = False
    got, _ = conventions.from_transformers(scaled_dot_product_attention)(_Module(), q, k, v, mask)
    assert not got[0, 2].any() and got[1, 2].any()


@pytest.mark.parametrize(
    "given", [dict(softcap=30.0), dict(s_aux=torch.ones(H)), dict(output_attentions=True)], ids=str
)
def test_transformers_refusals(given):
    attend = conventions.from_transformers(scaled_dot_product_attention)
    with pytest.raises(ValueError, match=f"{next(iter(given))} is for attn_implementation='eager'; _Module asks"):
        attend(_Module(), draw(), draw(), draw(), None, **given)
    with pytest.raises(ValueError, match="dropout_p=0.1"):
        attend(_Module(), draw(), draw(), draw(), None, dropout=0.1)
    attend(_Module(), draw(), draw(), draw(), None, output_attentions=False, softcap=None)


def test_backends_of_diffusers_called_as_pytorch():
    _, function, takes = _diffusers.backend_function("_native_math")
    compute = conventions.from_diffusers("_native_math", function, takes)
    q, k, v = draw(tokens=M), draw(2), draw(2)
    expected = F.scaled_dot_product_attention(q, k, v, PAIRS, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(compute(q, k, v, PAIRS, scale=0.3, enable_gqa=True), expected)
    one, mask = draw()[:, 0], PAIRS[:, 0, :1].expand(B, N, N)
    for m in (None, mask, mask[0]):
        torch.testing.assert_close(compute(one, one, one, m), F.scaled_dot_product_attention(one, one, one, m))


def test_what_a_backend_of_diffusers_lacks_is_refused():
    compute = conventions.from_diffusers("bare", lambda q, k, v: q + k + v, {"query", "key", "value"})
    x = draw()
    assert torch.equal(compute(x, x, x, scale=None), 3 * x)
    for given in (dict(attn_mask=KEYS), dict(is_causal=True), dict(dropout_p=0.5), dict(scale=2.0)):
        with pytest.raises(ValueError, match=f"'bare' has no {next(iter(given))}"):
            compute(x, x, x, **given)
