import copy

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from torch import nn

from genkit.denoisers import Condition, from_pipeline, network, wrap
from genkit.denoisers.flux import image_ids, pack, unpack
from genkit.interpolants import DiscreteVP, Linear
from genkit.testing import tiny

NAMES = ("sd15", "sdxl", "sd3", "flux", "dit")
INPUTS = {name: dict(prompt=["a cat"]) for name in NAMES} | {
    "dit": dict(class_labels=[1]),
    "sd3": dict(prompt=["a cat"], max_sequence_length=16),
    "flux": dict(prompt=["a cat"], max_sequence_length=16),
}


def backbone(pipe) -> nn.Module:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def record(name, pipe, **changes):
    """Every call of the pipeline's network in a run: ``(positional, keyword, output tensor)``."""
    calls = []

    def keep(_module, args, kwargs, output):
        calls.append((args, kwargs, output[0] if isinstance(output, tuple) else output.sample))

    handle = backbone(pipe).register_forward_hook(keep, with_kwargs=True)
    pipe(**tiny.call_arguments(name) | changes)
    handle.remove()
    return calls


def the_input(args, kwargs):
    z = args[0] if args else kwargs["hidden_states"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return z, timestep


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_equals_what_the_pipeline_feeds_and_gets(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    changes = dict(negative_prompt="dogs", true_cfg_scale=2.0) if name == "flux" else {}
    calls = record(name, pipe, **changes)
    denoiser = from_pipeline(pipe)
    extra = {} if name == "dit" else dict(negative_prompt="dogs" if name == "flux" else None)
    condition = denoiser.encode(pipe, **INPUTS[name], **extra)
    # The orders in which pipelines stack their branches; Flux calls twice a step.
    null = condition.null()
    branches = {"dit": [condition, null], "flux": None}.get(name, [null, condition])
    assert len(calls) == (4 if name == "flux" else 2)
    seen = []
    for i, (args, kwargs, output) in enumerate(calls):
        z, _ = the_input(args, kwargs)
        timestep = pipe.scheduler.timesteps[i // 2 if name == "flux" else i]
        t = denoiser.interpolant.time(timestep)
        if name == "flux":
            prediction = denoiser(unpack(z, 16, 16), t, [condition, null][i % 2], timestep=timestep)
            raw = pack(prediction.raw)
        else:
            raw = torch.cat([p.raw for p in denoiser.many(z[:1], t, branches, timestep=timestep)])
            output = output[:, :4]  # DiT's other four are variances
        assert (raw - output).abs().max() == 0.0
        seen.append(raw)
    assert (seen[0] - seen[-1]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_feeds_the_very_timestep_that_the_scheduler_named(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, **INPUTS[name])
    pipe.scheduler.set_timesteps(7, **(dict(mu=1.0) if name == "flux" else {}))
    fed = []
    handle = backbone(pipe).register_forward_pre_hook(
        lambda _m, args, kwargs: fed.append(the_input(args, kwargs)[1]), with_kwargs=True
    )
    for timestep in pipe.scheduler.timesteps:
        t = denoiser.interpolant.time(timestep)
        z = torch.zeros(1, 4, 16, 16)
        denoiser(z, t, condition, timestep=timestep)
        named, wanted = fed.pop(), timestep.float()
        assert torch.equal(named.float(), (wanted / 1000 if name == "flux" else wanted).reshape(1))
        denoiser(z, t, condition)  # the round trip through t is exact too
        assert torch.equal(fed.pop().float(), named.float())
    handle.remove()


def test_sdxl_under_a_variance_exploding_scheduler_sees_the_scaled_sample(tiny_pipeline):
    pipe = tiny_pipeline("sdxl")
    assert isinstance(pipe.scheduler, EulerDiscreteScheduler)
    denoiser = from_pipeline(pipe)
    pipe.scheduler.set_timesteps(4)
    for sigma, timestep in zip(pipe.scheduler.sigmas, pipe.scheduler.timesteps, strict=False):
        t = denoiser.interpolant.time(timestep)
        # z = x / sqrt(1 + sigma^2) has these coefficients.
        torch.testing.assert_close(denoiser.interpolant.alpha(t).float(), 1 / (1 + sigma**2).sqrt(), rtol=1e-4, atol=0)


@torch.no_grad()
def test_sdxl_sizes_reach_the_network(tiny_pipeline):
    pipe = tiny_pipeline("sdxl")
    denoiser = from_pipeline(pipe)
    sizes = dict(original_size=(64, 48), crops_coords_top_left=(3, 5), target_size=(40, 56))
    condition = denoiser.encode(pipe, prompt="a cat", **sizes)
    assert condition["time_ids"].tolist() == [[64, 48, 3, 5, 40, 56]]
    args, kwargs, output = record("sdxl", pipe, **sizes)[0]
    z, timestep = the_input(args, kwargs)
    t = denoiser.interpolant.time(timestep)
    raw = torch.cat([p.raw for p in denoiser.many(z[:1], t, [condition.null(), condition], timestep=timestep)])
    assert torch.equal(raw, output)
    assert denoiser.encode(pipe, "a cat")["time_ids"].tolist() == [[32, 32, 0, 0, 32, 32]]


@torch.no_grad()
@pytest.mark.parametrize("name", ("sd15", "sdxl", "sd3", "flux"))
def test_one_negative_prompt_serves_a_batch(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, ["a cat", "two dogs"], "fog")
    assert len(condition) == 2
    single = denoiser.encode(pipe, "two dogs", ["fog"])
    for key, value in single.null().values.items():
        torch.testing.assert_close(condition.null()[key][1:], value)
        torch.testing.assert_close(condition[key][1:], single[key])
    other = denoiser.encode(pipe, "two dogs", "rain")
    assert not torch.equal(other.null()["prompt_embeds"], single.null()["prompt_embeds"])


def test_flux_packing_is_the_pipelines():
    from diffusers import FluxPipeline

    z = torch.randn(2, 4, 6, 10)
    assert torch.equal(pack(z), FluxPipeline._pack_latents(z, 2, 4, 6, 10))
    assert torch.equal(unpack(pack(z), 6, 10), z)
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, z.device, z.dtype)
    assert torch.equal(image_ids(6, 10, z), ids)
    with pytest.raises(ValueError, match=r"even height and width, got shape \(2, 4, 5, 10\)"):
        pack(torch.zeros(2, 4, 5, 10))


@torch.no_grad()
def test_flux_guidance_is_embedded_and_the_null_branch_is_asked_for(tiny_pipeline):
    pipe = tiny_pipeline("flux")
    denoiser = from_pipeline(pipe)
    z, t = torch.randn(1, 4, 16, 16), torch.tensor(0.5)
    weak, strong = (
        denoiser(z, t, denoiser.encode(pipe, "a cat", guidance_scale=g, max_sequence_length=16)).raw for g in (1.0, 9.0)
    )
    assert (weak - strong).abs().max() > 1e-4
    with pytest.raises(ValueError, match="no unconditional branch"):
        denoiser.encode(pipe, "a cat").null()


def test_latent_consistency_unet_embeds_its_guidance(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    unet = pipe.unet
    pipe.unet = type(unet).from_config(unet.config, time_cond_proj_dim=8)
    denoiser = from_pipeline(pipe)
    args, kwargs, output = record("sd15", pipe, guidance_scale=4.0)[0]
    z, timestep = the_input(args, kwargs)
    condition = denoiser.encode(pipe, "a cat", guidance_scale=4.0)
    with torch.no_grad():
        raw = denoiser(z, denoiser.interpolant.time(timestep), condition, timestep=timestep).raw
    assert torch.equal(raw, output)


def test_dit_labels(tiny_pipeline):
    pipe = tiny_pipeline("dit")
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, class_labels=[0, 999])
    assert condition.null()["class_labels"].tolist() == [1000, 1000]
    for bad in (1000, -1):
        with pytest.raises(ValueError, match=rf"class_labels=\[{bad}\] out of range; accepted are 0 to 999"):
            denoiser.encode(pipe, class_labels=[3, bad])
    with pytest.raises(ValueError, match="class_labels=None, but the network is class-conditional"):
        denoiser.encode(pipe, class_labels=None)


def test_dit_drops_no_labels_by_itself_in_training_mode(tiny_pipeline):
    pipe = tiny_pipeline("dit")
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, class_labels=list(range(64)))
    z, t = torch.randn(64, 4, 16, 16), torch.tensor(0.5)
    with torch.no_grad():
        calm = denoiser(z, t, condition).raw
        pipe.transformer.train()
        assert torch.equal(denoiser(z, t, condition).raw, calm)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_calls_count_conditions_however_they_are_batched(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    denoiser = from_pipeline(pipe)
    extra = dict(negative_prompt="") if name == "flux" else {}
    condition = denoiser.encode(pipe, **INPUTS[name], **extra)
    z, t = torch.randn(1, 4, 16, 16), torch.tensor(0.5)
    together = denoiser.many(z, t, [condition, condition.null()])
    assert denoiser.calls == 2
    apart = [denoiser(z, t, condition), denoiser(z, t, condition.null())]
    assert denoiser.calls == 4
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.raw, b.raw, rtol=1e-5, atol=1e-5)
    denoiser.features(z, t, condition, [])
    assert denoiser.calls == 5


@torch.no_grad()
@pytest.mark.parametrize("name, at", [("sd15", ["mid_block", "down_blocks.0"]), ("sd3", ["transformer_blocks.1"])])
def test_features_are_the_outputs_of_the_named_modules(name, at, tiny_pipeline):
    pipe = tiny_pipeline(name)
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, **INPUTS[name])
    z, t = torch.randn(1, 4, 16, 16), torch.tensor(0.5)
    prediction, features = denoiser.features(z, t, condition, at)
    assert torch.equal(prediction.raw, denoiser(z, t, condition).raw)
    assert len(features) == len(at)
    if name == "sd15":
        assert features[0].shape == (1, 16, 8, 8) and features[1].shape == (1, 8, 8, 8)

    # A feature is on the way to the output: moving it moves the prediction.
    def move(_module, _inputs, output):
        return output + 1 if torch.is_tensor(output) else tuple(o if o is None else o + 1 for o in output)

    handle = backbone(pipe).get_submodule(at[0]).register_forward_hook(move)
    assert not torch.equal(denoiser(z, t, condition).raw, prediction.raw)
    handle.remove()
    with pytest.raises(ValueError, match=r"at=\['nowhere'\]: no such sub-modules"):
        denoiser.features(z, t, condition, ["nowhere"])


def test_features_say_when_a_module_did_not_run(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    denoiser = from_pipeline(pipe)
    condition = denoiser.encode(pipe, **INPUTS["sd3"])
    with torch.no_grad(), pytest.raises(ValueError, match=r"at=\['transformer_blocks'\] did not run"):
        denoiser.features(torch.zeros(1, 4, 16, 16), torch.tensor(0.5), condition, ["transformer_blocks"])


def wrappers(model: nn.Module) -> dict[str, nn.Module]:
    from peft import LoraConfig, get_peft_model

    class Child(type(model)):
        pass

    child = copy.copy(model)
    child.__class__ = Child
    peft = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["to_q", "to_v"]))
    return {
        "compiled": torch.compile(model),
        "parallel": nn.DataParallel(model),
        "both": torch.compile(nn.DataParallel(model)),
        "peft": peft,
        "compiled peft": torch.compile(peft),
        "subclass": child,
    }


def test_adapter_is_found_under_wrappers(tiny_pipeline):
    pipe = tiny_pipeline("sd3")
    reference = from_pipeline(pipe)
    condition = reference.encode(pipe, **INPUTS["sd3"])
    z, t = torch.randn(1, 4, 16, 16), torch.tensor(0.5)
    for key, wrapped in wrappers(pipe.transformer).items():
        denoiser = wrap(wrapped, Linear(), "flow_prediction")
        assert type(denoiser) is type(reference), key
        assert denoiser.network is wrapped
        assert type(denoiser.inner).__name__ in ("SD3Transformer2DModel", "Child")
        if key in ("peft", "parallel", "subclass"):
            with torch.no_grad():
                assert torch.equal(denoiser(z, t, condition).raw, reference(z, t, condition).raw)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_network_takes_float32_samples(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    full = from_pipeline(pipe)
    z, t = torch.randn(1, 4, 16, 16), torch.tensor(0.5)
    condition = full.encode(pipe, **INPUTS[name])
    reference = full(z, t, condition).raw
    backbone(pipe).to(torch.bfloat16)
    prediction = from_pipeline(pipe)(z, t, condition)
    assert prediction.raw.dtype == torch.bfloat16 and prediction.sample.dtype == torch.float32
    assert (prediction.raw - reference).abs().max() < 0.1 * reference.abs().max()


@pytest.mark.parametrize("name", ("sd3", "flux"))
def test_flow_network_under_a_noise_predicting_scheduler(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(
        ValueError, match=r"'epsilon' on DiscreteVP does not fit .*Transformer2DModel, which predicts flow"
    ):
        from_pipeline(pipe)
    with pytest.raises(ValueError, match="v_prediction"):
        wrap(pipe.transformer, DiscreteVP(pipe.scheduler.alphas_cumprod), "v_prediction")


def test_flow_scheduler_made_from_a_noise_predictors_config(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="takes flow_prediction, but its config has {'beta_schedule': 'scaled_linear'"):
        from_pipeline(pipe)
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon")
    with pytest.raises(ValueError, match="{'prediction_type': 'epsilon'}"):
        from_pipeline(pipe)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()  # a network retrained for a flow
    assert from_pipeline(pipe).prediction_type == "flow_prediction"


def test_edm_schedulers_are_refused_with_the_reason(tiny_pipeline):
    pipe = tiny_pipeline("sdxl")
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="EDMEulerScheduler scales the network's input and output itself"):
        from_pipeline(pipe)


def test_unknown_network_and_missing_condition(tiny_pipeline):
    with pytest.raises(
        ValueError, match="network=Linear has no adapter; there are adapters for .*UNet2DConditionModel"
    ):
        wrap(nn.Linear(2, 2), Linear(), "flow_prediction")
    pipe = tiny_pipeline("sdxl")
    denoiser = from_pipeline(pipe)
    with pytest.raises(ValueError, match=r"condition lacks \['text_embeds', 'time_ids'\], got \['prompt_embeds'\]"):
        denoiser(torch.zeros(1, 4, 16, 16), torch.tensor(0.5), Condition({"prompt_embeds": torch.zeros(1, 8, 64)}))
    del pipe.unet
    pipe.unet = None
    with pytest.raises(ValueError, match="must hold one network with an adapter, found 0 among"):
        from_pipeline(pipe)


def test_an_adapter_defined_elsewhere_is_found():
    class Net(nn.Module):
        pass

    class NetDenoiser(network.NetworkDenoiser):
        network_classes = ("Net",)

        def forward(self, z, t, timestep, condition):
            return z

        def encode(self, pipe, **inputs):
            return Condition()

    assert isinstance(wrap(Net(), Linear(), "sample"), NetDenoiser)
