"""Unmodified networks by another backend: they compute the same."""

import copy

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    SpatialNorm,
)
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from genkit import _diffusers
from genkit.attention import conventions, sdpa, use
from genkit.networks.dit import DiT
from tests.attention._networks import NAMES, build, settings


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["genkit", "_native_math"])
def test_networks_compute_the_same(tiny_pipeline, ours, name, backend):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    with torch.no_grad():
        expected = net.call(net.x)
        assert not ours
        with use(net.module, backend) as chosen:
            ours.clear()
            assert settings(net.module) != before
            got = net.call(net.x)
        assert chosen.backend == {"": backend} and not chosen.coverage.left_out
        assert len(ours) == (net.calls if backend == "genkit" else 0)
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
        assert settings(net.module) == before
        ours.clear()
        assert torch.equal(net.call(net.x), expected) and not ours


@pytest.mark.parametrize("name", ["llama", "clip_text", "unet"])
def test_masks_are_applied(tiny_pipeline, monkeypatch, name):
    net = build(name, tiny_pipeline)
    with torch.no_grad(), use(net.module, "genkit"):
        expected = net.call(net.x)
        real = sdpa.attention
        monkeypatch.setattr(sdpa, "attention", lambda q, k, v, mask, bias, *rest: real(q, k, v, None, None, *rest))
        assert (net.call(net.x) - expected).abs().max() > 1e-3


def test_causality_without_a_mask_is_applied(tiny_pipeline, ours):
    net = build("llama", tiny_pipeline)
    with torch.no_grad():
        expected = net.module(inputs_embeds=net.x).last_hidden_state
        with use(net.module, "genkit"):
            ours.clear()
            got = net.module(inputs_embeds=net.x).last_hidden_state
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert all(arguments[3] is None and arguments[5] for arguments in ours)  # no mask, is_causal


def test_a_cache_of_keys(tiny_pipeline):
    net = build("llama", tiny_pipeline)

    def steps():
        first = net.module(inputs_embeds=net.x[:, :4], use_cache=True)
        more = net.module(inputs_embeds=net.x[:, 4:5], past_key_values=first.past_key_values, use_cache=True)
        last = net.module(inputs_embeds=net.x[:, 4:], past_key_values=more.past_key_values)
        return torch.cat((first[0], more[0], last[0]), dim=1)

    with torch.no_grad():
        expected = steps()
        with use(net.module, "genkit"):
            torch.testing.assert_close(steps(), expected, rtol=1e-5, atol=1e-6)


def test_every_network_of_a_pipeline(tiny_pipeline, ours):
    from genkit.testing import tiny

    pipe = tiny_pipeline("sd3")
    networks = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    before = [settings(network) for network in networks]
    expected = pipe(**tiny.call_arguments("sd3")).images
    with use(pipe, "genkit") as chosen:
        names = {name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
        assert chosen.backend == dict.fromkeys(names, "genkit")
        assert {record.way for record in chosen.coverage} == {"rerouted", "interface"}
        ours.clear()
        got = pipe(**tiny.call_arguments("sd3")).images
    # Three encoders of two layers for two prompts, two steps through two blocks, and the decoder.
    assert abs(got - expected).max() < 1e-5 and len(ours) == 3 * 2 * 2 + 2 * 2 + 1
    assert [settings(network) for network in networks] == before


def test_networks_within_a_module(tiny_pipeline):
    both = nn.ModuleDict({"llama": build("llama", tiny_pipeline).module, "dit": build("dit", tiny_pipeline).module})
    before = settings(both)
    with use(both, "genkit") as chosen:
        assert [r.way for r in chosen.coverage] == ["interface"] * 2 + ["rerouted"] * 2
        assert chosen.coverage[2].name == "dit.transformer_blocks.0.attn1"
    assert settings(both) == before


@pytest.mark.parametrize(
    "settings_",
    [
        dict(norm_num_groups=4, residual_connection=True, rescale_output_factor=2.0),
        dict(cross_attention_dim=12, cross_attention_norm="layer_norm", qk_norm="rms_norm"),
        dict(spatial_norm_dim=4, residual_connection=True),
        dict(added_kv_proj_dim=12, norm_num_groups=4, residual_connection=True, processor=AttnAddedKVProcessor2_0()),
        dict(added_kv_proj_dim=12, norm_num_groups=4, only_cross_attention=True, processor=AttnAddedKVProcessor2_0()),
    ],
    ids=["group_norm", "cross", "spatial", "added", "added_only"],
)
def test_old_attention_in_all_its_forms(ours, settings_):
    m = Attention(32, heads=2, dim_head=16, bias=True, **settings_).eval()
    assert isinstance(m.spatial_norm, SpatialNorm) == ("spatial_norm_dim" in settings_)
    cross = "cross_attention_dim" in settings_
    x = torch.randn(2, 6, 32) if cross else torch.randn(2, 32, 4, 4)
    given = {}
    if cross or "added_kv_proj_dim" in settings_:
        given["encoder_hidden_states"] = torch.randn(2, 5, 12)
    if cross:
        given["attention_mask"] = torch.zeros(2, 1, 5).index_fill(2, torch.tensor([1, 3]), -10000.0)
    if "spatial_norm_dim" in settings_:
        given["temb"] = torch.randn(2, 4, 4, 4)
    expected = m(x, **given)
    with use(m, "genkit"):
        ours.clear()
        got = m(x, **given)
        assert len(ours) == 1 and got.is_contiguous()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_images_out_of_attention_have_contiguous_tangents():
    # Up to PyTorch 2.13 a GroupNorm behind has no forward mode for other strides.
    m = Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True).eval()
    x = torch.randn(2, 16, 4, 4)
    with use(m, "genkit"):
        o, to = torch.func.jvp(lambda x: m(x), (x,), (torch.ones_like(x),))
    assert o.is_contiguous() and to.is_contiguous()


def test_networks_that_call_pytorch_by_themselves(ours):
    m = DiT(hidden_size=32, num_layers=2, num_heads=2, num_classes=3).eval()
    x, t, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.9, 0.5]), torch.tensor([0, 1])
    for p in m.parameters():
        nn.init.normal_(p, std=0.2)
    expected = m(x, t, t / 2, labels)
    with use(m, "genkit") as chosen:
        ours.clear()
        torch.testing.assert_close(m(x, t, t / 2, labels), expected, rtol=1e-5, atol=1e-5)
        assert len(ours) == 2 and [r.way for r in chosen.coverage] == ["rerouted"] * 2


@pytest.mark.parametrize("kind", [FluxAttention, Attention], ids=["dispatcher", "rerouted"])
def test_compiled_modules(kind):
    m = kind(32, heads=2, dim_head=16).eval()
    x = torch.randn(2, 5, 32)
    with torch.no_grad(), use(m, "genkit") as chosen:
        expected = m(x)
        m.compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(m(x), expected, rtol=1e-6, atol=1e-6)
    assert chosen.coverage[0].processor == ("FluxAttnProcessor" if kind is FluxAttention else "AttnProcessor2_0")


def test_bad_input(tiny_pipeline):
    net = build("dit", tiny_pipeline)
    before = settings(net.module)
    with pytest.raises(
        ValueError, match=r"backend='flsh' is not known; did you mean 'flash'\? Accepted: .*auto.*genkit"
    ):
        use(net.module, "flsh")
    with pytest.raises(ValueError, match="backend='flash'.*install `flash-attn"):
        use(net.module, "flash")
    with pytest.raises(ValueError, match="'_native_cudnn' does not compute attention of DiT.*on cpu.*genkit doctor"):
        use(net.module, "_native_cudnn")
    for backend in ("native", "flex"):
        with pytest.raises(ValueError, match=f"'{backend}' does not.*tangents: .*take 'genkit'"):
            use(net.module, backend, tangent=True)
    for backend in ("_native_math", "genkit"):
        use(net.module, backend, tangent=True).restore()
    with pytest.raises(ValueError, match="model is a str; expected a torch.nn.Module or a pipeline"):
        use("model")
    with pytest.raises(ValueError, match="on 'meta'"):
        use(copy.deepcopy(net.module).to("meta"), "genkit")
    with pytest.raises(ValueError, match="no context parallelism"):
        flux = build("flux", tiny_pipeline).module
        flux.transformer_blocks[0].attn.processor._parallel_config = object()
        use(flux, "genkit")
    assert settings(net.module) == before


def test_another_diffusers_is_named(monkeypatch):
    monkeypatch.delattr(attention_dispatch._AttentionBackendRegistry, "_backends")
    with pytest.raises(RuntimeError, match=r"Diffusers \d.*AttentionBackendRegistry._backends is not there"):
        _diffusers.backend_names()


def test_our_member_is_added_once():
    for _ in range(2):
        _diffusers.add_backend("genkit", conventions.as_diffusers)
    assert _diffusers.backend_names().count("genkit") == 1
    member = attention_dispatch.AttentionBackendName("genkit")
    assert copy.deepcopy(member) is member and _diffusers.backend_function("genkit")[0] is member


def test_a_name_gets_its_masks_in_transformers(tiny_pipeline):
    use(build("llama", tiny_pipeline).module, "_native_math").restore()
    assert "diffusers:_native_math" in AttentionInterface() and "diffusers:_native_math" in AttentionMaskInterface()
