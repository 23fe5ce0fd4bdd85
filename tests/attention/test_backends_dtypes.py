"""The dtype that a backend is tried in is the one that attention computes in."""

import pytest
import torch
from torch import nn

from genkit.attention import backends, probing, use
from tests.attention._networks import build

F8, B16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.fixture
def tried(monkeypatch):
    dtypes = []
    real = backends.problem

    def problem(name, device, dtype, *rest, **kwargs):
        dtypes.append(dtype)
        return real(name, device, dtype, *rest, **kwargs)

    monkeypatch.setattr(backends, "problem", problem)
    return dtypes


@pytest.mark.parametrize("name", ["flux", "sd3"])
def test_layerwise_casting_is_tried_in_what_it_computes_in(tiny_pipeline, tried, name):
    net = build(name, tiny_pipeline)
    net.module.to(B16).enable_layerwise_casting(storage_dtype=F8, compute_dtype=B16)
    with torch.no_grad():
        expected = net.module(**_flux()).sample if name == "flux" else None
        with use(net.module, "genkit"):
            assert tried == [B16]
            if expected is not None:
                torch.testing.assert_close(net.module(**_flux()).sample, expected, rtol=0.1, atol=0.05)
        for backend in ("auto", "native", "_native_math"):
            use(net.module, backend).restore()


def _flux():
    draw = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(B16)  # noqa: E731
    return dict(
        hidden_states=draw(2, 9, 16),
        timestep=torch.full((2,), 0.3, dtype=B16),
        guidance=torch.ones(2, dtype=B16),
        pooled_projections=draw(2, 32),
        encoder_hidden_states=draw(2, 5, 32),
        txt_ids=torch.zeros(5, 3),
        img_ids=torch.arange(27.0).view(9, 3),
    )


def test_float8_weights_without_hooks_are_tried_in_the_first_computing_dtype(tiny_pipeline, tried):
    net = build("dit", tiny_pipeline)
    for block in net.module.transformer_blocks:
        block.attn1.to(F8)
    net.module.pos_embed.to(torch.float64)
    use(net.module, "genkit").restore()
    assert tried == [torch.float64]


def test_an_autocast_is_honoured(tiny_pipeline, tried):
    net = build("dit", tiny_pipeline)
    with torch.autocast("cpu", torch.bfloat16):
        use(net.module, "genkit").restore()
    use(net.module, "genkit").restore()
    net.module.double()
    with torch.autocast("cpu", torch.bfloat16):
        use(net.module, "genkit").restore()
    assert tried == [torch.bfloat16, torch.float32, torch.float64]


def test_native_is_never_refused(tiny_pipeline, monkeypatch):
    monkeypatch.setattr(probing, "_problem", lambda *args: "broken")
    net = build("dit", tiny_pipeline).module
    for backend in ("native", "auto"):
        with use(net, backend) as chosen:
            assert chosen.backend == {"": "native"}
    with pytest.raises(ValueError, match="broken"):
        use(net, "native", tangent=True)
    with use(nn.ModuleDict({"net": net}).to("meta"), "native"):
        pass


def test_what_lies_on_meta_is_named(tiny_pipeline):
    attention = build("dit", tiny_pipeline).module.to("meta").transformer_blocks[0].attn1
    with pytest.raises(ValueError, match="weights of Attention are on 'meta'"):
        use(attention, "genkit")


def test_an_assumed_head_size_is_said_to_be():
    class Attends(nn.Module):
        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    with pytest.raises(ValueError, match=r"with 64 channels a head \(assumed\): "):
        use(Attends(), "_native_cudnn")
