"""Soft caps, sinks and dropout of attention: what a backend lacks is said when it is chosen."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2Model, GptOssConfig, GptOssModel, LlamaConfig, LlamaModel

from genkit.attention import attention_coverage, backends, use
from tests.attention._networks import settings

SIZES = dict(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1)


def gemma(**changes):
    return Gemma2Model(Gemma2Config(**SIZES, head_dim=16, vocab_size=11, **changes)).eval()


def gpt_oss():
    return GptOssModel(GptOssConfig(**SIZES, head_dim=16, vocab_size=11, num_local_experts=4)).eval()


def llama(dropout=0.1):
    return LlamaModel(LlamaConfig(**SIZES, vocab_size=11, attention_dropout=dropout))


@pytest.mark.parametrize(
    ("make", "what"), [(gemma, "layers.0.self_attn has a soft cap"), (gpt_oss, "layers.0.self_attn has sinks")]
)
def test_caps_and_sinks(make, what):
    m = make()
    before = settings(m)
    ids = torch.arange(5)[None]
    with torch.no_grad():
        expected = m(ids).last_hidden_state
        for backend in ("genkit", "_native_math"):
            with pytest.raises(ValueError, match=f"'{backend}' does not compute attention of .*{what}.*take 'native'"):
                use(m, backend)
            assert all("take 'native'" in record.reason for record in attention_coverage(m, backend))
        assert not any(record.reason for record in attention_coverage(m, "native"))
        for backend in ("native", "auto"):
            with use(m, backend) as chosen:
                torch.testing.assert_close(m(ids).last_hidden_state, expected)
                assert chosen.backend == {"": "native"}
    assert settings(m) == before


def test_no_cap_is_no_obstacle():
    m = gemma(attn_logit_softcapping=None)
    with use(m, "genkit"), torch.no_grad():
        m(torch.arange(5)[None])


def test_auto_leaves_the_fastest_where_the_network_asks_for_more(monkeypatch):
    monkeypatch.setattr(backends, "_fastest", lambda *asked: ("_native_math", "the fastest"))
    with use(gemma()) as chosen:
        assert chosen.backend == {"": "native"}
    with use(llama(0.0)) as chosen:
        assert chosen.backend == {"": "_native_math"}


def test_dropout_in_train_mode():
    m = llama().train()
    with pytest.raises(
        ValueError, match=r"'genkit'.*self_attn is in train mode with dropout=0.1 .*eval mode, set this"
    ):
        use(m, "genkit", tangent=True)
    with pytest.raises(ValueError, match="'flex'.*dropout=0.1"):
        use(llama().train().requires_grad_(False), "flex")
    for backend in ("native", "_native_math"):
        with use(m, backend):
            m(torch.arange(5)[None])
    for quiet in (m.eval(), llama(0.0).train()):
        with use(quiet, "genkit"):
            quiet(torch.arange(5)[None])


class Drops(nn.Module):
    def __init__(self, p):
        super().__init__()
        self.attn_drop, self.w = nn.Dropout(p), nn.Parameter(torch.ones(()))

    def forward(self, x):
        p = self.attn_drop.p if self.training else 0.0
        return F.scaled_dot_product_attention(self.w * x, x, x, dropout_p=p)


def test_dropout_of_modules_that_call_pytorch():
    x = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"Drops is in train mode with dropout=0.2"):
        use(Drops(0.2), "genkit")
    for m in (Drops(0.0), Drops(0.2).eval()):
        with use(m, "genkit"):
            m(x)
