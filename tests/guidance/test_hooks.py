"""``guided`` on classic pipelines, against the pipelines' own guidance and against the toolkit's own loop."""

from dataclasses import replace

import accelerate
import diffusers
import pytest
import torch
from peft import LoraConfig, get_peft_model

from genkit.denoisers.network import from_pipeline
from genkit.guidance import APG, CFG, Guided, Guider, guided
from genkit.testing import tiny
from tests.guidance.ways import own_latents

ALL = pytest.mark.parametrize("name", tiny.NAMES)
BOTH = pytest.mark.parametrize("name", ["sd3", "sdxl"])


def network_name(pipe):
    return "unet" if hasattr(pipe, "unet") else "transformer"


def state_of(pipe):
    """What `guided` may touch."""
    network = getattr(pipe, network_name(pipe))
    hooks = [dict(getattr(network, k)) for k in ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks")]
    return hooks, [k for k in vars(pipe.scheduler) if k in ("step", "set_timesteps")], "forward" in vars(network)


@ALL
def test_cfg_is_the_pipelines_own_bit_for_bit(name, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    native = run_pipeline(pipe, name, **{scale: 3.0})
    before = state_of(pipe)
    for own in (1.5, 7.5):  # the pipeline's scale has no effect
        with guided(pipe, CFG(guidance_scale=3.0)):
            assert torch.equal(run_pipeline(pipe, name, **{scale: own}), native)
    assert state_of(pipe) == before
    assert torch.equal(run_pipeline(pipe, name, **{scale: 3.0}), native)


@pytest.mark.parametrize("name", ["sdxl", "flux", "dit"])
@pytest.mark.parametrize("guider", [CFG(), APG(), CFG(stop=0.3)])
def test_guidance_costs_no_call(name, guider, tiny_pipeline, run_pipeline):
    pipe, calls = tiny_pipeline(name), []
    getattr(pipe, network_name(pipe)).register_forward_pre_hook(lambda *_: calls.append(1))
    with guided(pipe, guider):
        run_pipeline(pipe, name)
    assert len(calls) == (6 if name == "flux" else 3)


@ALL
def test_batches_and_repeated_runs(name, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    generators = lambda: [torch.Generator().manual_seed(i) for i in (0, 5)]  # noqa: E731
    prompts = dict(class_labels=[1, 7]) if name == "dit" else dict(prompt=["a cat", "blue"], negative_prompt=["", "x"])
    guider = APG(guidance_scale=9.0, norm_threshold=2.0)
    if name == "dit":
        prompts["generator"] = torch.Generator().manual_seed(0)
    else:
        prompts["generator"] = generators()
    if name == "sd15_controlnet":
        prompts["image"] = tiny.call_arguments(name)["image"].repeat(2, 1, 1, 1)
    with guided(pipe, guider):
        first = run_pipeline(pipe, name, **prompts)
        prompts["generator"] = torch.Generator().manual_seed(0) if name == "dit" else generators()
        assert torch.equal(run_pipeline(pipe, name, **prompts), first)  # momentum starts anew
        if name != "dit":  # which draws the noise of a batch from one generator
            one = {k: v[1:] if isinstance(v, (list, torch.Tensor)) else v for k, v in prompts.items()}
            one["generator"] = generators()[1]
            assert relative(run_pipeline(pipe, name, **one), first[1:]) < 1e-5
    assert (first - run_pipeline(pipe, name, **prompts | dict(generator=prompts["generator"]))).abs().max() > 1e-3


@BOTH
def test_own_loop_makes_the_same_latents(name, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    guider = APG(guidance_scale=9.0, norm_threshold=2.0)
    with guided(pipe, guider):
        hooked = run_pipeline(pipe, name)
    assert relative(own_latents(pipe, name, guider), hooked) < 1e-5


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sd3", "FlowMatchHeunDiscreteScheduler"),
        ("sdxl", "HeunDiscreteScheduler"),
        ("sdxl", "KDPM2DiscreteScheduler"),
        ("sd15", "PNDMScheduler"),
        ("sdxl", "EulerAncestralDiscreteScheduler"),
        ("sd15", "DPMSolverMultistepScheduler"),
    ],
)
def test_guidance_stays_on_whatever_the_solver(name, scheduler, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    native = run_pipeline(pipe, name, guidance_scale=3.0, num_inference_steps=5)
    counted = Counted(guidance_scale=3.0)
    with guided(pipe, counted):
        assert torch.equal(run_pipeline(pipe, name, num_inference_steps=5), native)
    assert counted.combined == len(pipe.scheduler.timesteps)


class Counted(CFG):
    combined = 0

    def combine(self, parts, state):
        vars(self)["combined"] = self.combined + 1
        return super().combine(parts, state)


@pytest.mark.parametrize("window", [dict(stop=0.45), dict(start=0.45)])
@BOTH
def test_window_is_switching_by_hand(name, window, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    with guided(pipe, CFG(guidance_scale=5.0, **window)):
        windowed = run_pipeline(pipe, name, num_inference_steps=4)
    path = from_pipeline(pipe).interpolant
    pipe.scheduler.set_timesteps(4)
    progress = 1 - path.time(pipe.scheduler.timesteps)
    on = (progress <= window["stop"] if "stop" in window else progress >= window["start"]).tolist()
    assert set(on) == {True, False}

    def switch(pipe, i, t, kwargs):
        pipe._guidance_scale = 5.0 if i + 1 < len(on) and on[i + 1] else 1 + 1e-12
        return kwargs

    first = 5.0 if on[0] else 1 + 1e-12
    by_hand = run_pipeline(pipe, name, num_inference_steps=4, guidance_scale=first, callback_on_step_end=switch)
    assert relative(windowed, by_hand) < 1e-5
    assert relative(windowed, run_pipeline(pipe, name, num_inference_steps=4, guidance_scale=5.0)) > 1e-4


class Probe(Guider):
    """Asks the network again for what the pipeline computed, and for a permuted, smaller batch."""

    def guide(self, point, state):
        (cond, uncond) = point.denoiser.many(point.z, point.t, [point.condition, point.condition.null()])
        z = point.z.clone()
        again = point.denoiser(z, point.t, point.condition, timestep=point.timestep)
        null = point.denoiser(z, point.t, point.condition.null(), timestep=point.timestep)
        last = point.denoiser(z[-1:], point.t, point.condition.index([-1]), timestep=point.timestep)
        moved = point.denoiser(z, point.t - 0.01, point.condition)
        scale = cond.raw.abs().max()
        errors = [
            (a - b).abs().max() / scale
            for a, b in ((again.raw, cond.raw), (null.raw, uncond.raw), (last.raw, cond.raw[-1:]))
        ]
        vars(self).setdefault("errors", []).append(max(errors).item())
        vars(self).setdefault("moves", []).append(((moved.raw - cond.raw).abs().max() / scale).item())
        vars(self).setdefault("points", []).append((point, cond, uncond))
        return Guided(cond, {"cond": cond, "uncond": uncond}), state


@ALL
def test_guiders_may_call_the_network_again(name, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    probe = Probe()
    many = dict(class_labels=[1, 7]) if name == "dit" else dict(num_images_per_prompt=2)
    with guided(pipe, probe):
        run_pipeline(pipe, name, **many)
    assert len(probe.errors) == 3 and max(probe.errors) < 1e-5
    assert min(probe.moves) > 1e-6  # another time is another prediction
    for (point, cond, _), t_next in zip(probe.points, [p[0].t for p in probe.points[1:]] + [0.0], strict=True):
        assert float(point.t_next) == pytest.approx(float(t_next), abs=2e-3)
        assert cond.raw.shape == point.z.shape


def test_sdxl_points_are_variance_preserving(tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline("sdxl")
    probe = Probe()
    with guided(pipe, probe):
        run_pipeline(pipe, "sdxl")
    for point, cond, _ in probe.points:
        bar = pipe.scheduler.alphas_cumprod[int(point.timestep)]
        by_hand = (point.z - (1 - bar).sqrt() * cond.raw) / bar.sqrt()
        torch.testing.assert_close(cond.sample, by_hand, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "cls"),
    [
        ("sd15", "StableDiffusionImg2ImgPipeline"),
        ("sd15", "StableDiffusionInpaintPipeline"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline"),
        ("sd3", "StableDiffusion3Img2ImgPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
    ],
)
def test_image_to_image_and_inpainting(name, cls, tiny_pipeline, run_pipeline):
    parts = tiny_pipeline(name).components
    inputs = dict(image=torch.rand(1, 3, 32, 32), strength=0.8)
    if "Inpaint" in cls:  # its network sees the mask and the masked image beside the sample
        parts["unet"] = diffusers.UNet2DConditionModel.from_config(parts["unet"].config, in_channels=9).eval()
        inputs |= dict(mask_image=(torch.rand(1, 1, 32, 32) > 0.5).float())
    optional = dict(requires_safety_checker=False) if name == "sd15" else {}
    pipe = getattr(diffusers, cls)(**parts, **optional)
    pipe.set_progress_bar_config(disable=True)
    if cls in ("StableDiffusionImg2ImgPipeline", "StableDiffusionXLImg2ImgPipeline"):
        inputs |= dict(height=None, width=None)
    scale = "true_cfg_scale" if name == "flux" else "guidance_scale"
    run = lambda **changes: run_pipeline(pipe, name, **(inputs | changes))  # noqa: E731
    native, probe = run(**{scale: 3.0}), Probe()
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert torch.equal(run(), native)
    with guided(pipe, probe):
        run()
    assert max(probe.errors) < 1e-5


# -- wrappers --------------------------------------------------------------------------------------------------


def compiled(pipe, network):
    pipe.register_modules(**{network: torch.compile(getattr(pipe, network), backend="eager")})


def blocks_compiled(pipe, network):
    getattr(pipe, network).compile_repeated_blocks(backend="eager")


def offloaded(pipe, network):
    accelerate.cpu_offload(getattr(pipe, network), execution_device="cpu")


def model_offloaded(pipe, network):
    accelerate.cpu_offload_with_hook(getattr(pipe, network), "cpu")


def lora(pipe, network):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    getattr(pipe, network).add_adapter(config)


def peft_wrapped(pipe, network):
    config = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
    setattr(pipe, network, get_peft_model(getattr(pipe, network), config))


WRAPPERS = [("sd15", lora), ("flux", blocks_compiled)]
WRAPPERS += [(name, w) for name in ("sd3", "flux") for w in (compiled, offloaded, model_offloaded, lora, peft_wrapped)]


@pytest.mark.parametrize(("name", "wrap"), WRAPPERS)
def test_wrapped_networks(name, wrap, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    torch.manual_seed(0)
    wrap(pipe, network_name(pipe))
    scale = dict(true_cfg_scale=3.0) if name == "flux" else dict(guidance_scale=3.0)
    native = run_pipeline(pipe, name, **scale)
    probe = Probe()
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, name), native) < 1e-6
    with guided(pipe, probe):
        run_pipeline(pipe, name)
    assert max(probe.errors) < 1e-5
    assert torch.equal(run_pipeline(pipe, name, **scale), native)


def test_compiled_in_place_is_refused(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    pipe.unet.compile(backend="eager")
    with pytest.raises(ValueError, match="compiled in place.*compile_repeated_blocks"), guided(pipe, CFG()):
        pass


# -- what is refused, and what is left behind ------------------------------------------------------------------


@ALL
def test_a_pipeline_without_guidance_says_so(name, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    off = dict(true_cfg_scale=1.0) if name == "flux" else dict(guidance_scale=1.0)
    before = state_of(pipe)
    with pytest.raises(
        ValueError, match="without (true )?classifier-free guidance.*pass (true_cfg|guidance)_scale > 1"
    ):
        with guided(pipe, CFG()):
            run_pipeline(pipe, name, **off)
    assert state_of(pipe) == before
    with guided(pipe, CFG()):
        run_pipeline(pipe, name)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_interrupted(name, error, tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline(name)
    native, before = run_pipeline(pipe, name), state_of(pipe)

    def stop(pipe, i, t, kwargs):
        raise error

    with pytest.raises(error), guided(pipe, APG()):
        run_pipeline(pipe, name, callback_on_step_end=stop)
    assert state_of(pipe) == before
    assert torch.equal(run_pipeline(pipe, name), native)
    with guided(pipe, APG(norm_threshold=2.0)):  # an interrupted run leaves nothing to the next one in the block
        expected = run_pipeline(pipe, name)
        with pytest.raises(error):
            run_pipeline(pipe, name, callback_on_step_end=stop)
        assert torch.equal(run_pipeline(pipe, name), expected)


def test_nested(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    with guided(pipe, CFG()):
        with pytest.raises(ValueError, match="another `guided` block"), guided(pipe, CFG()):
            pass
    with guided(pipe, CFG()):
        pass


def test_scheduler_that_does_not_fit(tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline("sd3")
    flow, pipe.scheduler = pipe.scheduler, diffusers.DDIMScheduler()
    with pytest.raises(ValueError, match="does not fit SD3Transformer2DModel"), guided(pipe, CFG()):
        pass
    pipe.scheduler = flow
    with pytest.raises(ValueError, match="replaced inside"), guided(pipe, CFG()):
        pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        run_pipeline(pipe, "sd3")


def test_guiders_of_diffusers(tiny_pipeline):
    with pytest.raises(ValueError, match="guider=ClassifierFreeGuidance"):
        with guided(tiny_pipeline("sd15"), diffusers.ClassifierFreeGuidance()):
            pass


def test_three_way_and_unknown_pipelines(tiny_pipeline, modular_pipeline):
    parts = tiny_pipeline("sd15").components
    edit = diffusers.StableDiffusionInstructPix2PixPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="InstructPix2PixPipeline combines three predictions"), guided(edit, CFG()):
        pass
    video = diffusers.StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    with pytest.raises(ValueError, match="order of branches"), guided(video, CFG()):
        pass
    with pytest.raises(ValueError, match="use genkit.attach"), guided(modular_pipeline("sd3")[1], CFG()):
        pass


def test_skip_layer_guidance(tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline("sd3")
    with pytest.raises(ValueError, match="skip_guidance_layers"), guided(pipe, CFG()):
        run_pipeline(
            pipe, "sd3", skip_guidance_layers=[0], skip_layer_guidance_start=-1.0, skip_layer_guidance_stop=1.0
        )


class Moves(CFG):
    """Moves the network's input, then follows CFG from there."""

    moves_sample = True

    def guide(self, point, state):
        z = point.z + 0.1 * torch.tanh(point.z)
        answer, state = super().guide(replace(point, z=z), state)
        return replace(answer, z=z), state


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_a_guider_that_moves_the_sample(name, tiny_pipeline, run_pipeline, relative):
    """Against the toolkit's own loop, from the same noise."""
    pipe = tiny_pipeline(name)
    if name == "sd15":
        pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    guider = Moves(guidance_scale=3.0)
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name)
    assert run.stats()["network_calls"].tolist() == [4, 4, 4]
    with guided(pipe, CFG(guidance_scale=3.0)):
        assert relative(run_pipeline(pipe, name), hooked) > 1e-3
    assert relative(own_latents(pipe, name, guider), hooked) < 1e-5


def test_a_guider_that_moves_the_sample_refuses_a_scheduler_with_memory(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="Moves moves the sample.*DPMSolverMultistepScheduler remembers"):
        with guided(pipe, Moves()):
            pass


def test_equal_branches_warn(tiny_pipeline, run_pipeline, warnings_of_genkit):
    pipe = tiny_pipeline("sd3")
    with guided(pipe, CFG()):
        run_pipeline(pipe, "sd3", negative_prompt="a cat")
    assert [r.message for r in warnings_of_genkit.records if "bit for bit" in r.message].__len__() == 1


def test_probe_of_the_run(tiny_pipeline, run_pipeline):
    pipe = tiny_pipeline("sd3")
    with guided(pipe, APG()) as run:
        run_pipeline(pipe, "sd3")
    stats = run.stats()
    assert stats["norm"].shape == (3, 1) and stats["norm"].min() > 0 and stats["network_calls"].tolist() == [2, 2, 2]
