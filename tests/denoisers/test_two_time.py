import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from genkit.denoisers import TwoTime, from_pipeline, wrap
from genkit.denoisers.base import FlowMap
from genkit.denoisers.function import FunctionDenoiser
from genkit.denoisers.two_time import GapEmbedder
from genkit.interpolants import Linear
from genkit.networks.dit import DiT

NAMES = ("sd15", "sdxl", "sd3", "flux", "dit")
B = 2


def make(tiny_pipeline, name, *, dtype=torch.float32, trained=False):
    """A flow map, and an input ``x, t, s, condition`` of batch 2."""
    pipe = tiny_pipeline(name)
    network = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    denoiser = from_pipeline(pipe)
    inputs = dict(class_labels=[1, 7]) if name == "dit" else dict(prompt=["a cat", "two dogs"])
    if name in ("sd3", "flux"):
        inputs["max_sequence_length"] = 8
    condition = denoiser.encode(pipe, **inputs)
    network.to(dtype)
    flow_map = TwoTime(denoiser)
    flow_map.network.to(dtype)
    if trained:
        nn.init.normal_(flow_map.network.gap_embedder.out.weight)
    x = torch.randn(B, 4, 16, 16, dtype=dtype)
    t = torch.tensor([0.9, 0.6], dtype=torch.promote_types(dtype, torch.float32))
    return flow_map, x, t, t * 0.3, condition


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_teacher_bit_for_bit_before_training(name, tiny_pipeline):
    flow_map, x, t, _, condition = make(tiny_pipeline, name)
    teacher = copy.deepcopy(flow_map.denoiser)
    velocity = teacher(x, t, condition).velocity
    for s in (0.0, 0.25, 0.6):
        s = torch.full((B,), s)
        assert (flow_map.average_velocity(x, t, s, condition) - velocity).abs().max() == 0.0
    assert (flow_map(x, t, condition).velocity - velocity).abs().max() == 0.0


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_trained_it_differs_off_the_diagonal_only(name, tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, name, trained=True)
    diagonal = flow_map.denoiser(x, t, condition).velocity
    u = flow_map.average_velocity(x, t, s, condition)
    assert (u - diagonal).abs().amax(dim=(1, 2, 3)).min() > 1e-4
    assert (u - flow_map.average_velocity(x, t, s * 0.5, condition)).abs().max() > 1e-4
    assert torch.equal(flow_map(x, t, condition).raw, diagonal)
    assert torch.equal(flow_map.jump(x, t, t, condition), x)
    # Each item has its own gap.
    torch.testing.assert_close(
        flow_map.average_velocity(x[1:], t[1:], s[1:], condition.index([1])), u[1:], rtol=1e-4, atol=1e-4
    )


@torch.no_grad()
def test_is_given_the_very_timestep_that_the_scheduler_named(tiny_pipeline):
    flow_map, x, _, _, condition = make(tiny_pipeline, "sd15")
    fed = []
    flow_map.denoiser.inner.register_forward_pre_hook(lambda _m, args: fed.append(args[1]))
    flow_map(x, torch.tensor(0.5), condition, timestep=torch.tensor(777))
    assert fed[0].tolist() == [777, 777]


@pytest.mark.parametrize("name", NAMES)
def test_derivative_along_s_equals_central_differences(name, tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, name, dtype=torch.float64, trained=True)

    def u(s):
        return flow_map.average_velocity(x, t, s, condition)

    value, derivative = torch.func.jvp(u, (s,), (torch.ones_like(s),))
    # Diffusers rotates Flux's queries and keys in float32 whatever their dtype, which small differences would amplify.
    h, rtol = (3e-3, 1e-4) if name == "flux" else (1e-5, 1e-6)
    with torch.no_grad():
        torch.testing.assert_close(value, u(s), rtol=1e-10, atol=1e-10)
        differences = (u(s + h) - u(s - h)) / (2 * h)
    assert derivative.abs().max() > 1e-3
    torch.testing.assert_close(derivative, differences, rtol=rtol, atol=rtol * differences.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_the_embedder_and_the_network(name, tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, name)
    module = flow_map.module
    flow_map.average_velocity(x, t, s, condition).square().mean().backward()
    assert module.gap_embedder.out.weight.grad.abs().max() > 0
    assert all(p.grad is not None for p in module.network.parameters()) or name == "sd3"  # its last context is unused
    module.zero_grad()
    nn.init.normal_(module.gap_embedder.out.weight)
    # Through the derivative as well: reverse over forward.
    u, du = torch.func.jvp(lambda s: flow_map.average_velocity(x, t, s, condition), (s,), (torch.ones_like(s),))
    (u + du).square().mean().backward()
    assert module.gap_embedder.hidden.weight.grad.abs().max() > 0


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_keeps_times_in_float32_up_to_the_embedding(autocast, tiny_pipeline):
    flow_map, x, t, _, condition = make(
        tiny_pipeline, "sd3", dtype=torch.float32 if autocast else torch.bfloat16, trained=True
    )
    seen = []
    flow_map.network.gap_embedder.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    s = t - torch.tensor([1e-3, 2e-3])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        flow_map.average_velocity(x, t, s, condition)
        near, far = flow_map.network.gap_embedder(seen[0])
    assert seen[0].dtype == torch.float32
    torch.testing.assert_close(seen[0], torch.tensor([1e-3, 2e-3]), rtol=1e-4, atol=0)
    torch.testing.assert_close(far, 2 * near, rtol=0.05, atol=1e-4)  # linear at the origin: nothing was rounded away


@pytest.mark.parametrize("name", ("sd15", "dit"))
def test_gradient_checkpointing_changes_nothing(name, tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, name, trained=True)
    flow_map.network.train()

    def gradients():
        flow_map.network.zero_grad()
        u = flow_map.average_velocity(x, t, s, condition)
        u.square().mean().backward()
        return [u.detach(), *(p.grad.clone() for p in flow_map.network.parameters())]

    plain = gradients()
    flow_map.network.enable_gradient_checkpointing()
    ran = []
    inner = flow_map.denoiser.inner
    block = inner.down_blocks[1] if name == "sd15" else inner.transformer_blocks[1]
    block = block.resnets[0] if name == "sd15" else block
    block.register_forward_pre_hook(lambda *_: ran.append(0))
    for a, b in zip(gradients(), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert len(ran) == 2  # the block ran again in backward
    with pytest.raises(ValueError, match="jvp cannot go through it; call disable_gradient_checkpointing"):
        torch.func.jvp(lambda s: flow_map.average_velocity(x, t, s, condition), (s,), (torch.ones_like(s),))
    flow_map.network.disable_gradient_checkpointing()
    gradients()
    inner.enable_gradient_checkpointing()
    with pytest.raises(ValueError, match=r"call flow_map.network.enable_gradient_checkpointing\(\)"):
        gradients()
    # One that was on before is taken over.
    flow_map.network.disable_gradient_checkpointing()
    inner.enable_gradient_checkpointing()
    TwoTime(copy.deepcopy(flow_map.denoiser)).average_velocity(x, t, s, condition).mean().backward()


def test_one_module_that_copies_registers_and_saves(tiny_pipeline, tmp_path):
    flow_map, x, t, s, condition = make(tiny_pipeline, "dit", trained=True)
    outer = nn.Module()
    outer.student = flow_map.module
    names = {name.split(".")[1] for name, _ in outer.named_parameters()}
    assert names == {"network", "gap_embedder"}
    save_file(outer.state_dict(), tmp_path / "student.safetensors")

    other = copy.deepcopy(flow_map)
    with torch.no_grad():
        before = flow_map.average_velocity(x, t, s, condition)
        for p in other.module.parameters():
            p.add_(0.1)
        assert torch.equal(flow_map.average_velocity(x, t, s, condition), before)
        assert not torch.equal(other.average_velocity(x, t, s, condition), before)
        outer.student = other.module
        outer.load_state_dict(load_file(tmp_path / "student.safetensors"))
        assert torch.equal(other.average_velocity(x, t, s, condition), before)


@torch.no_grad()
def test_the_network_outside_of_the_flow_map_is_unchanged(tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, "sd15", trained=True)
    before = flow_map.denoiser(x, t, condition).raw
    flow_map.average_velocity(x, t, s, condition)
    assert torch.equal(flow_map.denoiser(x, t, condition).raw, before)
    with pytest.raises(ValueError, match="condition lacks"):
        flow_map.average_velocity(x, t, s)
    assert torch.equal(flow_map.denoiser(x, t, condition).raw, before)  # also after an error inside


@torch.no_grad()
def test_features_and_calls(tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, "sd3")
    prediction, (feature,) = flow_map.features(x, t, condition, ["proj_out"])
    assert feature.shape == (B, 64, 16) and prediction.raw.shape == x.shape
    flow_map.jump(x, t, s, condition)
    assert flow_map.calls == 2


def test_refused_networks(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    pipe.transformer = torch.compile(pipe.transformer)
    with pytest.raises(ValueError, match="denoiser.network is compiled"):
        TwoTime(from_pipeline(pipe))
    with pytest.raises(TypeError, match="FunctionDenoiser is no adapter of a network; use a FunctionFlowMap"):
        TwoTime(FunctionDenoiser(lambda x, t: x, Linear(), "sample"))


def test_embedder_features():
    torch.manual_seed(0)
    embedder = GapEmbedder(8, num_frequencies=4).double()
    gap = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert embedder(gap).abs().max() == 0
    inputs = []
    embedder.hidden.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    embedder(gap)
    frequencies = torch.logspace(0, -4, 4, dtype=torch.float64)
    angle = gap[:, None] * frequencies
    torch.testing.assert_close(inputs[0], torch.cat((1 - angle.cos(), angle.sin()), dim=-1), rtol=1e-6, atol=1e-15)
    nn.init.normal_(embedder.out.weight)
    assert embedder(gap)[0].abs().max() == 0 and embedder(gap)[1:].abs().amax(dim=1).min() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_scalars_change_nothing_before_training_and_act_item_by_item_after(name, tiny_pipeline):
    flow_map, x, t, s, condition = make(tiny_pipeline, name, trained=True)
    before = flow_map.average_velocity(x, t, s, condition)
    flow_map.add_scalars({"guidance_scale": 4.0, "t_low": 0.25})
    scale = {"guidance_scale": torch.tensor([2.0, 5.0]), "t_low": torch.tensor([0.1, 0.4])}
    told = condition.with_values(scale)
    assert torch.equal(flow_map.average_velocity(x, t, s, told), before)
    for embedder in flow_map.network.gap_embedder.scalar_embedders.values():
        nn.init.normal_(embedder.out.weight)
    u = flow_map.average_velocity(x, t, s, told)
    for i in range(B):  # each item has its own, which is repeated and indexed with the rest of the condition
        one = flow_map.average_velocity(x[[i]], t[[i]], s[[i]], told.index([i]))
        torch.testing.assert_close(one, u[[i]], rtol=1e-4, atol=1e-4)
        for key in scale:
            other = told.with_values({key: scale[key] + 1})
            assert (flow_map.average_velocity(x, t, s, other) - u).abs().max() > 1e-4
    # What a condition does not name has its default.
    default = condition.with_values({"guidance_scale": torch.full((B,), 4.0), "t_low": torch.full((B,), 0.25)})
    assert torch.equal(flow_map.average_velocity(x, t, s, condition), flow_map.average_velocity(x, t, s, default))
    # No guidance, and an interval that begins at 0, are embedded as nothing.
    none = condition.with_values({"guidance_scale": torch.ones(B), "t_low": torch.zeros(B)})
    assert torch.equal(flow_map.average_velocity(x, t, s, none), before)


def test_scalars_are_added_once(tiny_pipeline):
    flow_map, *_ = make(tiny_pipeline, "sd3")
    flow_map.add_scalars({"guidance_scale": 4.0})
    weight = flow_map.network.gap_embedder.scalar_embedders["guidance_scale"].out.weight
    flow_map.add_scalars({"guidance_scale": 3.0, "t_low": 0.0})
    assert flow_map.network.gap_embedder.scalar_embedders["guidance_scale"].out.weight is weight
    assert flow_map.scalars == {"guidance_scale": 3.0, "t_low": 0.0}
    assert flow_map.embedders() == [flow_map.network.gap_embedder]
    copied = copy.deepcopy(flow_map)
    assert copied.scalars == flow_map.scalars
    with pytest.raises(TypeError, match="Oracle cannot embed"):
        Oracle(None, Linear(), "flow_prediction").add_scalars({"guidance_scale": 1.0})


class Oracle(FlowMap):
    def average_velocity(self, x, t, s, condition=None):
        return x


@torch.no_grad()
def test_scalars_of_the_network_of_two_times():
    network = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    flow_map = wrap(network, Linear(), "flow_prediction")
    x, t, s = torch.randn(B, 1, 8, 8), torch.tensor([0.9, 0.5]), torch.tensor([0.2, 0.5])
    condition = flow_map.encode(None, class_labels=[1, 2])
    before = flow_map.average_velocity(x, t, s, condition)
    flow_map.add_scalars({"guidance_scale": 2.0})
    told = condition.with_values({"guidance_scale": torch.tensor([3.0, 8.0])})
    assert torch.equal(flow_map.average_velocity(x, t, s, told), before)
    nn.init.normal_(network.scalar_embed["guidance_scale"].weight)
    after = flow_map.average_velocity(x, t, s, told)
    assert (after - before).abs().amax(dim=(1, 2, 3)).min() > 1e-3
    again = DiT.from_config(network.config)  # which names the scalars
    again.load_state_dict(network.state_dict())
    again = wrap(again, Linear(), "flow_prediction")
    assert torch.equal(again.average_velocity(x, t, s, told), after)
    assert torch.equal(again(x, t, told).raw[1], after[1])  # on the diagonal it is told, too
    none = condition.with_values({"guidance_scale": torch.ones(B)})
    assert torch.equal(again.average_velocity(x, t, s, none), before)
