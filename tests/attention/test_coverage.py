"""Which attention a choice reaches, and what it leaves out."""

import logging

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from genkit.attention import attention_coverage, use


def test_coverage_names_what_is_left_out(tiny_pipeline, said):
    unet = tiny_pipeline("sd15").unet
    whole = attention_coverage(unet)
    assert len(whole) == 8 and not whole.left_out
    eager = unet.mid_block.attentions[0].transformer_blocks[0].attn2
    eager.set_processor(AttnProcessor())
    both = nn.ModuleDict({"unet": unet, "torch": nn.TransformerEncoderLayer(8, 2)})
    coverage = attention_coverage(both)
    names = [record.name for record in coverage.left_out]
    assert names == ["unet.mid_block.attentions.0.transformer_blocks.0.attn2", "torch.self_attn"]
    table = str(coverage).splitlines()
    assert len(table) == 9 and sum("left out" in line for line in table) == 2
    assert "AttnProcessor " in table[-2] and "within one function" in table[-1]
    for _ in range(2):
        use(both, "genkit").restore()
    warned = [r.getMessage() for r in said.records if r.levelno == logging.WARNING]
    assert len(warned) == 1 and all(name in warned[0] for name in names)
    assert str(attention_coverage(nn.Linear(1, 1))) == "no attention"


def test_processors_for_one_backend_alone_are_left_out():
    class Only(AttnProcessor2_0):
        _attention_backend = "flex"
        _SUPPORTED_BACKENDS = ("flex",)

    m = Attention(16, heads=2, dim_head=8, processor=Only())
    assert [r.way for r in attention_coverage(m)] == [None]
    assert [r.way for r in attention_coverage(m, "flex")] == ["dispatcher"]


class _Asks(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return attention_dispatch.dispatch_attention_fn(x * self.w, x, x)


def test_code_that_asks_the_dispatcher_without_a_setting(ours):
    m, x = _Asks(), torch.randn(1, 5, 2, 8)
    expected = m(x)
    with use(m, "genkit"):
        ours.clear()
        torch.testing.assert_close(m(x), expected, rtol=1e-5, atol=1e-6)
        assert len(ours) == 1
        F.scaled_dot_product_attention(x, x, x)
        attention_dispatch.dispatch_attention_fn(x, x, x)
        assert len(ours) == 1
