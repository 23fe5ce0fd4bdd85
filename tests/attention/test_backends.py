import copy
import logging

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import (
    Attention,
    AttnAddedKVProcessor2_0,
    AttnProcessor,
    AttnProcessor2_0,
    SpatialNorm,
)
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from genkit import _diffusers, kernels
from genkit.attention import attention_coverage, backends, conventions, probing, sdpa, use
from genkit.attention.rerouting import rerouted_to
from genkit.networks.dit import DiT
from tests.attention._networks import NAMES, build


@pytest.fixture
def ours(monkeypatch):
    """Arguments of every call of our attention."""
    calls = []
    real = sdpa.attention

    def counted(*args, **kwargs):
        calls.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(sdpa, "attention", counted)
    return calls


@pytest.fixture
def said(caplog):
    backends._say.cache_clear()
    caplog.set_level(logging.INFO, logger="genkit.attention")
    return caplog


def settings(module):
    """Everything that ``use`` may change."""
    found = [attention_dispatch._AttentionBackendRegistry._active_backend]
    for part in module.modules():
        found += [type(part), getattr(part, "processor", None)]
        found += [dict(vars(part.processor)) if hasattr(getattr(part, "processor", None), "__dict__") else None]
        found += [getattr(getattr(part, "config", None), "_attn_implementation", None)]
    return found


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


def test_it_is_a_setter(tiny_pipeline, ours):
    net = build("dit", tiny_pipeline)
    before = settings(net.module)
    chosen = use(net.module, "genkit")
    ours.clear()
    net.call(net.x)
    assert len(ours) == 2
    chosen.restore()
    assert settings(net.module) == before
    chosen.restore()
    assert settings(net.module) == before


@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_uses_within_uses(tiny_pipeline, ours, name):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    with use(net.module, "genkit"):
        between = settings(net.module)
        with use(net.module, "native"):
            ours.clear()
            net.call(net.x)
            assert not ours
        assert settings(net.module) == between
        net.call(net.x)
        assert ours
    assert settings(net.module) == before


@pytest.mark.parametrize("name", ["flux", "dit", "llama"])
def test_everything_is_restored_after_an_error(tiny_pipeline, name):
    net = build(name, tiny_pipeline)
    before = settings(net.module)
    with pytest.raises(KeyError, match="mine"), use(net.module, "genkit"):
        raise KeyError("mine")
    assert settings(net.module) == before


def test_what_was_done_is_undone_where_a_later_network_fails(tiny_pipeline, monkeypatch):
    pipe = tiny_pipeline("flux")
    before = settings(pipe.text_encoder), settings(pipe.transformer)
    real = probing._problem
    monkeypatch.setattr(
        probing, "_problem", lambda *args: "it is too wide" if args[4] == 16 and args[7] is False else real(*args)
    )
    with pytest.raises(
        ValueError, match=r"'genkit'.*(vae|transformer), on cpu in torch.float32 with 16 channels.*wide"
    ):
        use(pipe, "genkit")
    assert (settings(pipe.text_encoder), settings(pipe.transformer)) == before


def test_a_class_that_something_else_changed_is_not_lost(tiny_pipeline):
    # As torch.distributed.fsdp.fully_shard does.
    net = build("dit", tiny_pipeline)
    chosen = use(net.module, "genkit")
    attention = net.module.transformer_blocks[0].attn1
    ours = type(attention)
    attention.__class__ = type("Sharded", (ours,), {})
    for change in (chosen.restore, chosen.restore, lambda: use(net.module, "_native_math")):
        with pytest.raises(RuntimeError, match="undo that first"):
            change()
    attention.__class__ = ours
    chosen.restore()
    assert rerouted_to(attention) is None


def test_copies_compute_with_their_own_weights(tiny_pipeline, ours):
    net = build("dit", tiny_pipeline)
    with torch.no_grad(), use(net.module, "genkit"):
        twin = copy.deepcopy(net.module)
        for p in twin.parameters():
            p.mul_(1.5)
        ours.clear()
        given = dict(timestep=torch.tensor([3, 500]), class_labels=torch.tensor([1, 2]))
        moved = twin(net.x, **given).sample
        assert len(ours) == 2 and (moved - net.call(net.x)).abs().max() > 1e-3
        assert list(twin.state_dict()) == list(net.module.state_dict())


def test_the_process_keeps_its_own_backend(tiny_pipeline, ours):
    one, other = build("flux", tiny_pipeline), build("flux", tiny_pipeline)
    with use(one.module, "genkit"):
        ours.clear()
        other.call(other.x)
        assert not ours


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


def test_auto_on_a_cpu(tiny_pipeline, said):
    net = build("dit", tiny_pipeline)
    for tangent, expected in ((False, "native"), (True, "genkit"), (True, "genkit")):
        with use(net.module, tangent=tangent) as chosen:
            assert chosen.backend == {"": expected}
    logged = [record.getMessage() for record in said.records]
    assert logged == [
        "attention of DiTTransformer2DModel: auto takes 'native', where PyTorch chooses among its kernels",
        "attention of DiTTransformer2DModel: auto takes 'genkit', which carries tangents, and is eager here",
    ]


@pytest.mark.parametrize(
    ("faults", "deterministic", "name", "reason"),
    [
        ({}, False, "_native_cudnn", "the fastest"),
        ({}, True, "native", "not known to be deterministic"),
        ({True: "no masks"}, False, "native", "left out (no masks)"),
    ],
)
def test_auto_on_a_hopper(monkeypatch, faults, deterministic, name, reason):
    backends._fastest.cache_clear()
    monkeypatch.setattr(kernels, "obstacle", lambda device: "no GPU is here")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(backends, "problem", lambda *args, masked=False, **kwargs: faults.get(masked))
    sizes = (backends.Size(torch.device("cuda", 0), torch.bfloat16, 64),)
    chosen, why = backends._fastest(sizes, False, False, "auto", deterministic)
    assert chosen == name and reason in why
    assert backends._fastest(sizes, True, False, "auto", deterministic)[0] == "genkit"
    backends._fastest.cache_clear()


def test_eager_attention_on_a_gpu_is_said(monkeypatch, said, tiny_pipeline):
    size = backends.Size(torch.device("cuda", 0), torch.bfloat16, 64)
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 227 * 1024)
    records = attention_coverage(build("dit", tiny_pipeline).module)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: "triton is not installed: pip install triton")
    backends._warn("net", "genkit", (size,), records)
    monkeypatch.setattr(kernels, "obstacle", lambda kind: None)
    backends._warn("net", "genkit", (size,), records)
    for unfit in (dict(channels=12), dict(channels=20, assumed=True), dict(dtype=torch.float64)):
        backends._warn("net", "genkit", (size._replace(**unfit),), records)
    logged = [record.getMessage() for record in said.records if record.name == "genkit.attention"]
    says = ["pip install triton", "12 channels a head in", r"20 channels a head (assumed) in", "in torch.float64"]
    assert len(logged) == 4 and all(part in line for part, line in zip(says, logged, strict=True))


@pytest.mark.parametrize(
    ("unfit", "word"),
    [
        ({}, "fused"),
        (dict(channels=20), "eager"),
        (dict(dtype=torch.float64), "eager"),
        (dict(dtype=torch.float32, channels=160), "fused"),
        (dict(dtype=torch.float32, channels=256), "eager"),
    ],
)
def test_auto_says_fused_only_where_a_kernel_computes(monkeypatch, unfit, word):
    monkeypatch.setattr(kernels, "obstacle", lambda device: None)
    monkeypatch.setattr(kernels, "shared_memory", lambda device: 99 * 1024)
    backends._fastest.cache_clear()
    size = backends.Size(torch.device("cuda", 0), torch.bfloat16, 64)
    for sizes in ((size._replace(**unfit),), (size, size._replace(**unfit))):
        assert backends._fastest(sizes, True, False, "auto", False)[1].endswith(f"and is {word} here")
    backends._fastest.cache_clear()


def test_auto_does_not_take_cudnn_on_consumers_blackwell(monkeypatch):
    monkeypatch.setattr(backends, "problem", lambda *args, **kwargs: None)
    sizes = (backends.Size(torch.device("cuda", 0), torch.bfloat16, 64),)
    for capability, name in (((12, 0), "native"), ((10, 0), "_native_cudnn")):
        backends._fastest.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert backends._fastest(sizes, False, False, "auto", False)[0] == name
    backends._fastest.cache_clear()


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


def test_a_backend_that_loses_tangents_or_gradients_is_refused(monkeypatch):
    cpu = torch.device("cpu")

    class Loses(torch.autograd.Function):
        @staticmethod
        def forward(q, k, v):
            return F.scaled_dot_product_attention(q, k, v)

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, g):
            return g, g, g

        @staticmethod
        def jvp(ctx, *tangents):
            return torch.zeros_like(tangents[0])

    functions = {
        "lost": lambda q, k, v, attn_mask=None: Loses.apply(q, k, v),
        "flat": lambda q, k, v, attn_mask=None: F.scaled_dot_product_attention(q, k, v).detach(),
        "unmasked": lambda q, k, v, attn_mask=None: F.scaled_dot_product_attention(q, k, v),
    }
    monkeypatch.setattr(probing, "compute", functions.__getitem__)
    assert probing.problem("lost", cpu, torch.float32, 16) is None
    assert probing.problem("lost", cpu, torch.float32, 16, tangent=True) == "its tangent is wrong"
    assert probing.problem("lost", cpu, torch.float32, 16, gradient=True) == "its gradient is wrong"
    assert "grad" in probing.problem("flat", cpu, torch.float32, 16, gradient=True)
    assert probing.problem("unmasked", cpu, torch.float32, 16, masked=True) == "its result is wrong"


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
