"""Text to image against the pipelines of Diffusers, and as a Diffusers user calls it."""

import accelerate
import diffusers
import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from transformers import CLIPImageProcessor

from genkit.denoisers import from_pipeline
from genkit.guidance import APG, CFG, Guider, guided
from genkit.pipelines import TextToImagePipeline
from genkit.pipelines.commands import parse_scheduler
from genkit.rng import ItemRNG
from genkit.testing import tiny
from tests.ready import GUIDERS, ready

NAMES = ("sd15", "sdxl", "sd3", "flux")
ALL = pytest.mark.parametrize("name", NAMES)


def own(pipe, **overrides):
    new = TextToImagePipeline.from_pipe(pipe, **overrides)
    new.set_progress_bar_config(disable=True)
    return new


def image(pipe, name, **changes):
    arguments = tiny.call_arguments(name, 3) | dict(negative_prompt="two dogs") | changes
    images = pipe(**arguments).images
    return images if isinstance(images, torch.Tensor) else torch.from_numpy(images)


def distance(a, b):
    return (a - b).abs().max().item()


@ALL
def test_the_image_of_diffusers_at_equal_settings(name, tiny_pipeline, diffusers_image):
    pipe = tiny_pipeline(name)
    theirs = diffusers_image(pipe, name)
    assert distance(image(own(pipe), name, guider=CFG(guidance_scale=3.0)), theirs) < 1e-5
    assert distance(image(own(pipe), name, guider=CFG(guidance_scale=4.0)), theirs) > 1e-5


@ALL
def test_the_image_of_diffusers_without_guidance(name, tiny_pipeline, diffusers_image):
    pipe = tiny_pipeline(name)
    theirs = diffusers_image(pipe, name, scale=1.0, negative_prompt=None)
    assert distance(image(own(pipe), name, negative_prompt=None), theirs) < 1e-5


@ALL
def test_the_image_of_the_classic_hook(name, tiny_pipeline, diffusers_image):
    pipe, guider = tiny_pipeline(name), APG(guidance_scale=9.0, norm_threshold=2.0)
    with guided(pipe, guider):
        hooked = diffusers_image(pipe, name)
    assert distance(image(own(pipe), name, guider=guider), hooked) < 1e-5


@ALL
def test_batches_second_prompts_and_sizes(name, tiny_pipeline, diffusers_image):
    pipe = tiny_pipeline(name)
    generators = lambda: [torch.Generator().manual_seed(i) for i in range(4)]  # noqa: E731
    changes = dict(
        prompt=["a cat", "blue"], negative_prompt=["", "x"], num_images_per_prompt=2, height=16, generator=generators()
    )
    if name != "sd15":
        changes |= dict(prompt_2=["a dog", "red"], negative_prompt_2=["y", ""])
    if name == "sdxl":
        changes |= dict(original_size=(64, 48), crops_coords_top_left=(4, 8), target_size=(16, 32))
    if name == "sd3":
        changes |= dict(clip_skip=1)
    theirs = diffusers_image(pipe, name, **changes)
    assert theirs.shape == (4, 16, 32, 3)
    changes["generator"] = generators()
    guidance = dict(guider=CFG(guidance_scale=3.0)) if name == "flux" else dict(guidance_scale=3.0)
    assert distance(image(own(pipe), name, **guidance, **changes), theirs) < 1e-5


@pytest.mark.parametrize(
    ("name", "scheduler", "changes"),
    [
        ("sd15", "DDIMScheduler", dict(eta=0.7)),
        ("sd15", "DPMSolverMultistepScheduler", {}),
        ("sdxl", "HeunDiscreteScheduler", {}),
        ("sdxl", "EulerAncestralDiscreteScheduler", {}),
        ("sd15", "PNDMScheduler", dict(num_inference_steps=5)),
        ("sdxl", "EulerDiscreteScheduler", dict(timesteps=[900, 400, 20])),
        ("sd3", "FlowMatchHeunDiscreteScheduler", {}),
        ("sd3", "FlowMatchEulerDiscreteScheduler", dict(sigmas=[1.0, 0.6, 0.1])),
        ("flux", "FlowMatchEulerDiscreteScheduler", dict(sigmas=[1.0, 0.6, 0.1])),
        *[(name, "pndm", dict(num_inference_steps=5)) for name in NAMES],
        *[(name, "exact_denoiser", {}) for name in NAMES],
    ],
)
def test_any_scheduler(name, scheduler, changes, tiny_pipeline, diffusers_image):
    pipe = tiny_pipeline(name)
    pipe.scheduler = parse_scheduler(scheduler, pipe.scheduler)
    theirs = diffusers_image(pipe, name, **changes)
    assert distance(image(own(pipe), name, guider=CFG(guidance_scale=3.0), **changes), theirs) < 1e-5


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_shift_by_the_size_of_the_image(name, tiny_pipeline, diffusers_image):
    pipe = tiny_pipeline(name)
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=16)
    theirs = diffusers_image(pipe, name)
    assert distance(image(own(pipe), name, guider=CFG(guidance_scale=3.0)), theirs) < 1e-5


def test_embedded_guidance_scale_of_flux(tiny_pipeline, diffusers_image):
    pipe = tiny_pipeline("flux")
    theirs = diffusers_image(pipe, "flux", scale=1.0)
    assert distance(image(own(pipe), "flux", negative_prompt=None), theirs) < 1e-5
    theirs = torch.from_numpy(pipe(**tiny.call_arguments("flux", 3), guidance_scale=9.0).images)
    assert distance(image(own(pipe), "flux", negative_prompt=None, guidance_scale=9.0), theirs) < 1e-5
    assert distance(image(own(pipe), "flux", negative_prompt=None, guidance_scale=1.0), theirs) > 1e-5


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, tmp_path, fresh_process):
    expected = {}
    for name in NAMES:
        pipe = own(tiny_pipeline(name), guider=APG(guidance_scale=9.0))
        expected[name] = image(pipe, name)
        pipe.save_pretrained(tmp_path / name)
    got = fresh_process(
        "from genkit.pipelines import TextToImagePipeline\n"
        "from genkit.testing import tiny\n"
        "made = {}\n"
        f"for name in {NAMES!r}:\n"
        f"    pipe = TextToImagePipeline.from_pretrained({str(tmp_path)!r} + '/' + name)\n"
        "    images = pipe(**tiny.call_arguments(name, 3), negative_prompt='two dogs').images\n"
        "    made[name] = type(pipe.guider).__name__, images.tolist()\n"
        "print(json.dumps(made))"
    )
    for name, (guider, images) in got.items():
        assert guider == "APG" and distance(torch.tensor(images), expected[name]) < 1e-5


@ALL
def test_takes_the_folders_of_diffusers(name, tiny_pipeline, tmp_path):
    pipe = tiny_pipeline(name)
    pipe.save_pretrained(tmp_path)
    loaded = TextToImagePipeline.from_pretrained(tmp_path, guider=CFG(guidance_scale=2.0), dtype=torch.float32)
    loaded.set_progress_bar_config(disable=True)
    assert distance(image(loaded, name), image(own(pipe), name, guider=CFG(guidance_scale=2.0))) < 1e-5


def test_push_to_hub_sends_what_save_pretrained_writes(tiny_pipeline, monkeypatch):
    sent = {}

    def upload(self, folder, repo_id, **kwargs):
        from pathlib import Path

        sent[repo_id] = {p.relative_to(folder).as_posix() for p in Path(folder).rglob("*.json")}

    monkeypatch.setattr(TextToImagePipeline, "_upload_folder", upload)
    monkeypatch.setattr("diffusers.utils.hub_utils.create_repo", lambda r, **k: type("R", (), {"repo_id": r})())
    monkeypatch.setattr("diffusers.utils.hub_utils.load_or_create_model_card", lambda *a, **k: None)
    monkeypatch.setattr(
        "diffusers.utils.hub_utils.populate_model_card", lambda *a, **k: type("C", (), {"save": print})()
    )
    own(tiny_pipeline("sd15"), guider=CFG()).push_to_hub("me/mine")
    assert {"model_index.json", "guider/guider_config.json", "unet/config.json"} <= sent["me/mine"]


def test_from_pipe_shares_and_converts_only_when_told(tiny_pipeline):
    pipe = tiny_pipeline("sdxl").to(dtype=torch.bfloat16)
    new = own(pipe)
    assert new.unet is pipe.unet and new.unet.dtype is torch.bfloat16
    assert own(new, guider=CFG()).vae is pipe.vae
    assert own(pipe, torch_dtype=torch.float32).unet.dtype is torch.float32
    with pytest.raises(ValueError, match="did you mean 'scheduler'"):
        own(pipe, schedular=None)


def test_half_precision(tiny_pipeline):
    pipe = own(tiny_pipeline("sdxl").to(dtype=torch.float16))
    exact = image(own(tiny_pipeline("sdxl")), "sdxl", output_type="latent")
    half = image(pipe, "sdxl", output_type="latent")
    assert 0 < distance(half.float(), exact) / exact.abs().max() < 0.02
    assert torch.isfinite(image(pipe, "sdxl")).all() and pipe.vae.dtype is torch.float16


def test_output_types_and_tuple(tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    arguments = tiny.call_arguments("sd15", 1)
    pil = pipe(**arguments | dict(output_type="pil")).images
    assert pil[0].size == (32, 32)
    images, calls = pipe(**arguments | dict(output_type="pt"), return_dict=False, guidance_scale=2.0)
    assert images.shape == (1, 3, 32, 32) and calls == 2
    assert pipe(**arguments | dict(output_type="latent")).images.shape == (1, 4, 16, 16)


def test_a_safety_checker_is_asked(tiny_pipeline):
    class Checker(diffusers.ModelMixin):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, images, clip_input):
            images[0] = 0
            return images, [True, False]

    processor = CLIPImageProcessor(size=16, crop_size=16)
    pipe = tiny_pipeline("sd15")
    checked = own(pipe, safety_checker=Checker(), feature_extractor=processor)
    arguments = tiny.call_arguments("sd15", 1) | dict(num_images_per_prompt=2)
    out = checked(**arguments)
    assert out.nsfw_content_detected == [True, False] and not out.images[0].any() and out.images[1].any()


def test_callback_sees_replaces_and_interrupts(tiny_pipeline):
    pipe, seen = own(tiny_pipeline("sd3")), []

    def callback(p, i, timestep, kwargs):
        seen.append((i, float(timestep)))
        p._interrupt = i == 1
        return {"latents": torch.ones_like(kwargs["latents"])}

    got = image(pipe, "sd3", callback_on_step_end=callback, output_type="latent")
    assert [i for i, _ in seen] == [0, 1] and seen[0][1] == 1000 and (got == 1).all() and pipe.interrupt
    from diffusers.callbacks import PipelineCallback

    class Zero(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"latents": callback_kwargs["latents"] * 0}

    zero = Zero(cutoff_step_ratio=None, cutoff_step_index=0)
    assert not image(pipe, "sd3", callback_on_step_end=zero, output_type="latent").any()


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_attention_backends_are_those_of_the_network(name, tiny_pipeline):
    pipe = own(tiny_pipeline(name))
    default = image(pipe, name)
    with attention_backend("native"):  # Diffusers would leave its own choice of the process changed
        pipe.transformer.set_attention_backend("_native_math")
        assert distance(image(pipe, name), default) < 1e-5


@ALL
def test_offload(name, tiny_pipeline):
    """On a CPU the hooks move nothing, but they are called, and the pipeline must find out where it computes."""
    pipe = own(tiny_pipeline(name))
    expected = image(pipe, name)
    pipe.enable_model_cpu_offload(device="cpu")
    assert distance(image(pipe, name), expected) < 1e-6
    pipe.remove_all_hooks()
    accelerate.cpu_offload(pipe.network, execution_device="cpu")
    assert distance(image(pipe, name), expected) < 1e-6


def test_a_condition_in_place_of_prompts(tiny_pipeline):
    pipe = own(tiny_pipeline("sdxl"))
    condition = pipe.encode("a cat", negative_prompt="two dogs", height=32, width=32)
    arguments = tiny.call_arguments("sdxl", 3)
    del arguments["prompt"]
    got = torch.from_numpy(pipe(**arguments, condition=condition, guider=CFG(guidance_scale=3.0)).images)
    assert distance(got, image(pipe, "sdxl", guider=CFG(guidance_scale=3.0))) < 1e-6
    with pytest.raises(ValueError, match="give one"):
        pipe("a cat", condition=condition)


def test_images_do_not_depend_on_their_batch(tiny_pipeline):
    pipe = own(tiny_pipeline("sd15"))
    pipe.scheduler = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    arguments = dict(num_inference_steps=3, height=32, width=32, output_type="latent")
    both = pipe(["a cat", "blue"], generator=ItemRNG(0, [0, 1]).generators(), **arguments).images
    alone = pipe("blue", generator=ItemRNG(0, [1]).generators(), **arguments).images
    assert distance(both[1:], alone) < 1e-5


def test_load_lora_through_the_classic_pipeline(tiny_pipeline, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    donor = tiny_pipeline("sd3")
    donor.transformer.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["to_q"], init_lora_weights=False))
    layers = get_peft_model_state_dict(donor.transformer)
    diffusers.StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)
    pipe = own(tiny_pipeline("sd3"))
    plain = image(pipe, "sd3")
    pipe.classic.load_lora_weights(tmp_path)
    changed = image(pipe, "sd3")
    assert distance(changed, plain) > 1e-4 and distance(changed, image(own(donor), "sd3")) < 1e-5


class Never(Guider):
    """Fails where the network would be called first."""

    def guide(self, point, state):
        raise AssertionError("the loop began")


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("sd3", dict(prompt=None), "takes a prompt"),
        ("sd3", dict(prompt=[]), "at least one prompt"),
        ("sd3", dict(class_labels=[1]), "takes a prompt"),
        ("sd3", dict(negative_promt="x"), "did you mean 'negative_prompt'"),
        ("sd3", dict(negative_prompt=["x", "y"]), "negative_prompt has 2 texts for 1 prompts"),
        ("sd3", dict(height=31), "height=31: must be a positive multiple of 4"),
        ("flux", dict(width=30), "width=30"),
        ("sd15", dict(num_inference_steps=0), "num_inference_steps=0"),
        ("sd15", dict(num_images_per_prompt=0), "num_images_per_prompt=0"),
        ("sd15", dict(output_type="jpg"), "output_type='jpg'"),
        ("sd15", dict(latents=torch.zeros(1, 4, 8, 8)), "latents has shape"),
        ("sd15", dict(generator=ItemRNG(0, [1, 2]).generators()), "2 entries for 1 images"),
        ("sd15", dict(callback_on_step_end_tensor_inputs=["prompt_embeds"]), "accepted are"),
        ("sd15", dict(guidance_scale=2.0), "was given too"),
        ("sd15", dict(guidance_scale=-1.0, guider=None), "guidance_scale=-1.0"),
        ("sd3", dict(eta=1.0), "step takes no"),
        ("sd3", dict(sigmas=[1.0], timesteps=[1.0]), "Only one of"),
        ("flux", dict(negative_prompt=None), "unconditional"),
    ],
)
def test_bad_input_is_refused_before_the_first_call(name, kwargs, message, tiny_pipeline):
    pipe = own(tiny_pipeline(name))
    network = from_pipeline(pipe).network
    network.register_forward_pre_hook(lambda *_: pytest.fail("the network was called"))
    with pytest.raises(ValueError, match=message):
        image(pipe, name, **dict(guider=CFG(guidance_scale=2.0)) | kwargs)


def test_a_network_of_labels_and_a_foreign_scheduler_are_refused(tiny_pipeline):
    dit = tiny_pipeline("dit")
    with pytest.raises(ValueError, match=r"\['prompt'\]: DiTTransformer2DModel takes class_labels alone"):
        own(dit)("a cat", 1)
    pipe = tiny_pipeline("sd15")
    foreign = diffusers.FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match="takes flow_prediction, but its config has"):
        own(pipe, scheduler=foreign)("a cat", 1)
    with pytest.raises(ValueError, match="found 0 among|no network with an adapter"):
        own(tiny_pipeline("sd15"), unet=None)("a cat", 1)


def ready_for(pipe, name, rule):
    """The guider with what it needs, on latents ``(1, 4, 16, 16)``."""
    guider = ready(GUIDERS[rule], (1, 4, 16, 16))
    if rule == "autoguidance":
        weak = tiny.pipeline(name, seed=1)
        return guider.using(weak=weak.unet if hasattr(weak, "unet") else weak.transformer)
    if rule == "gfcg":  # by prompts in place of classes
        size = dict(max_sequence_length=16) if name == "sd3" else dict(height=32, width=32) if name == "sdxl" else {}
        return guider.using(candidates=own(pipe).encode([str(k) for k in range(10)], **size), desired=1)
    return guider


@ALL
@pytest.mark.parametrize("rule", GUIDERS)
def test_every_guider_does_here_what_it_does_in_the_classic_pipeline(name, rule, tiny_pipeline, diffusers_image):
    if name == "flux" and rule in ("readout", "gfcg", "cfg_mp"):
        pytest.skip("looks at channels, decodes or draws noise; the classic pipeline's latents of Flux are packed")
    pipe = tiny_pipeline(name)
    if rule == "cfg_mp":  # its fixed-point iteration magnifies rounding
        pipe.to(dtype=torch.float64)
    guider = ready_for(pipe, name, rule)
    with guided(pipe, guider):
        hooked = diffusers_image(pipe, name)
    mine = image(own(pipe), name, guider=guider)
    assert distance(mine, hooked) < 1e-5
    assert distance(mine, image(own(pipe), name)) > 1e-5
