"""Gradient-free classifier guidance by prompts that CLIP tells apart: three ways to use it, saving, what is refused."""

import subprocess
import sys
import textwrap

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import CLIPConfig, CLIPModel

import genkit
from genkit.denoisers import from_pipeline
from genkit.denoisers.base import Condition
from genkit.guidance import CFG, attach, guided
from genkit.guidance.gfcg import GFCG
from genkit.networks.dit import DiT
from genkit.networks.image_classifiers import PromptClassifier
from genkit.networks.latent_decoder import LatentDecoder
from genkit.pipelines import ClassConditionalPipeline
from genkit.sampling import sample
from genkit.testing import tiny
from tests.guidance.test_autoguidance import weak_network
from tests.guidance.test_gfcg import NEAR, Y, judge, labels, made, points
from tests.guidance.ways import compiled, model_offloaded, offloaded, own_inputs, own_latents

# -- three ways, prompts told apart by CLIP -------------------------------------------------------------------------

PROMPTS = ["a cat", "two dogs on a red lawn", "a car", "the sea at night"]
WAYS = [
    ("sd15", dict(mode="alone")),
    ("sd15", dict(mode="cfg_switch", guidance_scale=3.0, tau=0.4)),
    ("sdxl", dict(mode="cfg_add", guidance_scale=3.0)),
    ("sdxl", dict(mode="autoguidance")),
    ("sd3", dict(mode="alone", classify_start=0.2, guidance_scale=3.0)),
    ("sd3", dict(mode="autoguidance", scale_rule="relative_confusion")),
    ("flux", dict(mode="alone")),
    ("flux", dict(mode="cfg_add", guidance_scale=3.0, scale_rule="constant")),
]


def clip():
    tokenizer = tiny.clip_tokenizer()
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = size | dict(vocab_size=len(tokenizer), **special)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=size | dict(image_size=16, patch_size=8)))
    return model.eval(), tokenizer


def prompted(pipe, name, desired=0, **settings):
    """A guider by the prompts; the classifier's temperature is such that it is neither sure nor without opinion."""
    lengths = dict(max_sequence_length=16) if name in ("sd3", "flux") else {}
    given = dict(
        classifier=PromptClassifier(*clip(), PROMPTS, logit_scale=30.0),
        decode=LatentDecoder(pipe.vae),
        candidates=from_pipeline(pipe).encode(pipe, PROMPTS, negative_prompt="", **lengths),
        desired=desired,
    )
    if settings.get("mode") == "autoguidance":
        given |= dict(weak=weak_network(name))
    return GFCG(**dict(strength=4.0) | settings).using(**given)


@pytest.mark.parametrize(("name", "settings"), WAYS, ids=[f"{n}-{s['mode']}" for n, s in WAYS])
def test_three_ways_make_the_same_latents(name, settings, tiny_pipeline, run_modular, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    guider = prompted(pipe, name, **settings)
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name)
    stats = run.stats()
    assert stats["network_calls"].max() == 3  # the pipeline makes both branches in any case
    assert (stats["reference"] >= 0).any() and (stats["scale"] > 1.05).any()
    with guided(pipe, CFG(guidance_scale=settings.get("guidance_scale", 1.0))):
        assert relative(run_pipeline(pipe, name), hooked) > 1e-3
    assert relative(own_latents(pipe, name, guider), hooked) < 1e-5
    torch.testing.assert_close(guider.stats()["p_desired"], stats["p_desired"], rtol=1e-3, atol=1e-3, equal_nan=True)
    if name in ("sdxl", "sd3"):
        assert relative(run_modular(name, guider), hooked) < 1e-5


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_a_batch_in_which_samples_go_different_ways(name, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline(name)
    settings = dict(mode="cfg_switch", guidance_scale=3.0, desired=[0, 2])
    with guided(pipe, prompted(pipe, name, **settings)) as run:
        run_pipeline(pipe, name, num_images_per_prompt=2)
    tau = run.stats()["p_desired"][0].mean().item()
    guider = prompted(pipe, name, tau=tau, **settings)
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, name, num_images_per_prompt=2)
    assert sorted((run.stats()["reference"][0] < 0).tolist()) == [False, True]
    _, condition = own_inputs(pipe, name)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    denoiser = from_pipeline(pipe)
    x = x * getattr(pipe.scheduler, "init_noise_sigma", 1)
    own = sample(denoiser, pipe.scheduler, x, condition.repeat(2), guider=guider)
    assert relative(own, hooked) < 1e-5
    assert denoiser.calls <= 6


@pytest.mark.parametrize("wrap", [compiled, offloaded, model_offloaded])
def test_wrapped_networks(wrap, tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("sd3")
    guider = prompted(pipe, "sd3")
    with guided(pipe, guider):
        expected = run_pipeline(pipe, "sd3")
    pipe.transformer = wrap(pipe.transformer)
    with guided(pipe, guider):
        assert relative(run_pipeline(pipe, "sd3"), expected) < 1e-5


class Brightness(nn.Module):
    """Tells images apart by how bright their parts are: logits ``(B, K)``."""

    def __init__(self, k):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4 * 4, k, generator=generator))

    def forward(self, images):
        return 3 * nn.functional.adaptive_avg_pool2d(images.mean(1), 4).flatten(1) @ self.weight


def test_classes_of_a_latent_transformer(tiny_pipeline, run_pipeline, relative):
    pipe = tiny_pipeline("dit")
    guider = GFCG(mode="cfg_switch", guidance_scale=3.0, strength=3.0, tau=1e-3)
    guider = guider.using(classifier=Brightness(1000), decode=LatentDecoder(pipe.vae))
    with guided(pipe, guider) as run:
        hooked = run_pipeline(pipe, "dit", class_labels=[1, 7])
    assert set(torch.sign(run.stats()["reference"]).flatten().tolist()) == {-1.0, 1.0}
    own = ClassConditionalPipeline(pipe.transformer, pipe.scheduler, vae=pipe.vae)
    own.set_progress_bar_config(disable=True)
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    images = own([1, 7], 3, latents=x, guider=guider, output_type="np").images
    assert relative(torch.from_numpy(images), hooked) < 1e-4  # of images, behind a decoder


def test_saved_and_loaded_in_a_fresh_process(tiny_pipeline, modular_pipeline, run_pipeline, relative, tmp_path):
    _, pipe = modular_pipeline("sd3")
    settings = dict(mode="cfg_add", guidance_scale=2.0, strength=3.0, scale_rule="relative_confusion")
    guider = prompted(tiny_pipeline("sd3"), "sd3", **settings)
    attach(pipe, guider)
    expected = run_pipeline(pipe, "sd3")
    pipe.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    clip()[0].save_pretrained(tmp_path / "clip")
    code = f"""
    import sys, torch, genkit
    torch.set_num_threads(1)
    from diffusers import ModularPipeline
    from safetensors.torch import save_file
    from transformers import CLIPModel
    from genkit.denoisers import from_pipeline
    from genkit.networks.image_classifiers import PromptClassifier
    from genkit.networks.latent_decoder import LatentDecoder
    from genkit.testing import tiny
    folder = {str(tmp_path)!r}
    modular = ModularPipeline.from_pretrained(folder + "/modular")
    modular.load_components()
    classic = tiny.pipeline("sd3")
    prompts = {PROMPTS!r}
    given = dict(
        classifier=PromptClassifier(
            CLIPModel.from_pretrained(folder + "/clip").eval(), tiny.clip_tokenizer(), prompts, logit_scale=30.0
        ),
        decode=LatentDecoder(modular.vae),
        candidates=from_pipeline(classic).encode(classic, prompts, negative_prompt="", max_sequence_length=16),
        desired=0,
    )
    settings = tiny.call_arguments("sd3", 3) | dict(output_type="latent", negative_prompt="two dogs")
    try:
        modular(**settings, output="images")
    except ValueError as error:
        assert "using(classifier=...)" in str(error), error
    else:
        raise AssertionError("the classifier was not missed")
    guider = modular.guider.using(**given)
    genkit.attach(modular, guider)
    results = {{}}
    settings["generator"].manual_seed(0)
    results["modular"] = modular(**settings, output="images")
    settings["generator"].manual_seed(0)
    with genkit.guided(classic, guider):
        results["classic"] = classic(**settings, guidance_scale=2.0).images
    save_file(results, folder + "/out.safetensors")
    """
    child = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    for images in load_file(tmp_path / "out.safetensors").values():
        assert relative(images, expected) < 1e-5


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(strength=-0.5), "strength=-0.5: accepted is 0 <= strength"),
        (dict(guidance_scale=0.5), "guidance_scale=0.5: accepted is 1 <= guidance_scale"),
        (dict(scale_rule="one_minus"), "scale_rule='one_minus' is not known; did you mean 'one_minus_desired'"),
        (dict(reference="runnerup"), "reference='runnerup' is not known; did you mean 'runner_up'"),
        (dict(mode="cfg"), "mode='cfg' is not known"),
        (dict(classify_every=0), "classify_every=0: accepted is 1 <= classify_every"),
        (dict(classify_start=0.6, classify_stop=0.5), "classify_stop=0.5: accepted is 0.6 <= classify_stop <= 1"),
        (dict(temperature=0.0), "temperature=0.0: accepted is 0 < temperature"),
        (dict(tau=1.5), "tau=1.5: accepted is 0 <= tau <= 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        GFCG(**settings)


IDS = Condition({"class_labels": torch.tensor([0, 1, 2])})
BAD = {
    "more_classes": (dict(classifier=lambda x: x.new_zeros(len(x), 5)), "classifier with 5 classes for a model of 3"),
    "fewer_ids": (dict(candidates=IDS.index([0, 1])), "candidates=2 rows: accepted is a Condition of 3 rows"),
    "no_condition": (dict(candidates=[0, 1, 2]), "candidates=list: accepted is a Condition of 3 rows"),
    "unknown_label": (
        dict(candidates=Condition({"class_labels": torch.tensor([0, 1, 5])})),
        r"class_labels=\[2\]: none of the candidates",
    ),
    "other_names": (dict(candidates=Condition({"shift": torch.zeros(3)})), r"candidates=\['shift'\]: accepted are"),
    "desired": (dict(desired=3), "desired=3: accepted are 0 to 2"),
    "desired_type": (dict(desired=0.5), "desired=0.5: accepted is an int, or 6"),
    "desired_rows": (dict(desired=[0, 1]), r"desired=\[0, 1\]: accepted is an int, or 6, one for each sample"),
    "images": (dict(classifier=nn.Linear(3, 3)), r"cannot take predicted samples of shape \(1, 2\): .*mat1 and mat2"),
    "decode": (dict(decode=lambda x: x[:, :, 0]), "decode and classifier cannot take predicted samples"),
    "logits": (
        dict(classifier=lambda x: x.sum()),
        r"classifier returns \(\) for 1 image: accepted are logits of shape",
    ),
    "output": (dict(classifier=lambda x: {"logits": x}), "classifier returns dict for 1 image"),
    "scale_rule": (dict(scale_rule=lambda p, d, r, t: p), r"scale_rule returned \(6, 3\): accepted is a tensor of sha"),
    "choose": (dict(choose=lambda p, d: d[:1]), r"choose returned \(1,\): accepted is a tensor of shape \(6,\)"),
}


@pytest.mark.parametrize("which", BAD)
def test_bad_things_given(which):
    given, message = BAD[which]
    scheduler, denoiser = diffusers.FlowMatchEulerDiscreteScheduler(), NEAR.denoiser()
    scheduler.set_timesteps(3)
    guider = GFCG().using(**dict(classifier=judge) | given)
    with pytest.raises(ValueError, match=message):
        sample(denoiser, scheduler, points(), labels(Y), guider=guider)
    assert denoiser.calls == (1 if which in ("scale_rule", "choose") else 0)  # whose answers are known only then


def test_pipelines_refuse_before_the_first_call(tiny_pipeline, run_pipeline):
    pipe, calls = tiny_pipeline("sd15"), []
    pipe.unet.register_forward_hook(lambda *_: calls.append(1))
    good = prompted(pipe, "sd15")
    cases = {
        "lacks 'classifier'": good.using(classifier=None),
        "candidates=None, but the model takes no class labels": good.using(candidates=None),
        "desired=None: accepted is the row of candidates": good.using(desired=None),
        "cannot take predicted samples of shape": good.using(decode=lambda x: x[:, :, 0]),
        "candidates=4 rows: accepted is a Condition of 3 rows": good.using(
            classifier=PromptClassifier(*clip(), PROMPTS[:3])
        ),
        "lacks 'weak'": good.new(mode="autoguidance"),
        "weak=SD3Transformer2DModel": good.new(mode="autoguidance").using(weak=weak_network("sd3")),
    }
    for message, guider in cases.items():
        with pytest.raises(ValueError, match=message), guided(pipe, guider):
            run_pipeline(pipe, "sd15")
    with pytest.raises(ValueError, match="without classifier-free guidance"), guided(pipe, good):
        run_pipeline(pipe, "sd15", guidance_scale=1.0)
    dit = tiny_pipeline("dit")
    dit.transformer.register_forward_hook(lambda *_: calls.append(1))
    other = GFCG().using(classifier=Brightness(10), decode=LatentDecoder(dit.vae))
    with pytest.raises(ValueError, match="classifier with 10 classes for a model of 1000"), guided(dit, other):
        run_pipeline(dit, "dit")
    assert not calls


def test_no_unconditional_branch_is_missed_only_where_it_is_asked_for():
    scheduler, denoiser = diffusers.FlowMatchEulerDiscreteScheduler(), NEAR.denoiser()
    scheduler.set_timesteps(3)
    bare = Condition({"class_labels": torch.tensor(Y)})
    assert sample(denoiser, scheduler, points(), bare, guider=made()).isfinite().all()
    denoiser.calls = 0
    for settings in (dict(mode="cfg_add", guidance_scale=2.0), dict(reference="null"), dict(guidance_scale=2.0)):
        with pytest.raises(ValueError, match="null_values=None"):
            sample(denoiser, scheduler, points(), bare, guider=made(**settings))
    assert denoiser.calls == 0


def test_a_class_conditional_pipeline_saves_its_settings_and_takes_the_classifier_again(tmp_path):
    torch.manual_seed(0)
    network = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    for p in network.parameters():
        nn.init.normal_(p, std=0.2)
    pipe = ClassConditionalPipeline(network, diffusers.FlowMatchEulerDiscreteScheduler(), guider=GFCG(strength=2.0))
    pipe.save_pretrained(tmp_path)
    again = ClassConditionalPipeline.from_pretrained(tmp_path)
    assert again.guider.config.strength == 2.0 and isinstance(genkit.load_guider(tmp_path / "guider"), GFCG)
    with pytest.raises(ValueError, match=r"lacks 'classifier' .*using\(classifier=\.\.\.\)"):
        again([1, 2], 2)
