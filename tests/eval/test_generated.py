"""Images that pipelines make on demand."""

import gc
import random
import re
import shlex

import diffusers
import numpy
import pytest
import torch
from PIL import Image

from genkit.eval.asked import evenly, matched
from genkit.eval.command import _print as show
from genkit.eval.generated import generated_images, name_of
from genkit.eval.inputs import UnreadableImage, read_images
from genkit.eval.page import main as write_page
from genkit.eval.reproduce import run_command
from genkit.eval.run import evaluate
from genkit.eval.runs import read_runs
from genkit.eval.tables import row_of
from genkit.guidance import CFG
from genkit.networks.dit import DiT
from genkit.networks.gpt import GPT
from genkit.networks.mar import MAR
from genkit.pipelines import ClassConditionalPipeline, FewStepPipeline, TextToImagePipeline
from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.pipelines.by_name import parse_settings
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.rng import ItemRNG
from genkit.schedulers import FlowMapScheduler
from genkit.step_annealing import StepAnnealer


@pytest.fixture(scope="module")
def pipe():
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return ClassConditionalPipeline(net.eval(), diffusers.FlowMatchEulerDiscreteScheduler())


@pytest.fixture(scope="module")
def real():
    images = read_images("digits")
    return read_images((images.load(torch.arange(60)), images.labels[:60]))


def everything(images):
    return images.load(torch.arange(images.n))


def test_an_image_is_that_of_its_seed_and_number(pipe):
    images = generated_images(pipe, [5, 6, 7], seed=3, num_inference_steps=2, guider="cfg:guidance_scale=2.0")
    made = everything(images)
    noise = ItemRNG(3, [1]).normal((1, 8, 8))
    expected = pipe([6], 2, latents=noise, guider=CFG(guidance_scale=2.0)).images[0]
    assert numpy.array_equal(made[1, 0].numpy(), numpy.asarray(expected))
    assert images.labels.tolist() == [5, 6, 7] and images.prompts is None and images.kind == "uint8 L 8x8"
    one = generated_images(pipe, [5, 6, 7], seed=3, num_inference_steps=2, guider=CFG(guidance_scale=2.0), batch_size=1)
    assert torch.equal(one.load(torch.tensor([2, 0, 2])), made[[2, 0, 2]])
    other = generated_images(pipe, [5, 6, 7], seed=4, num_inference_steps=2)
    assert not torch.equal(everything(other), made)


def test_images_are_made_once_and_calls_counted(pipe):
    images = generated_images(pipe, [1] * 10, num_inference_steps=3, batch_size=4)
    assert images.model.network_calls() is None
    everything(images)
    first = pipe.transformer.forward

    def never(*args, **kwargs):
        raise AssertionError("generated again")

    pipe.transformer.forward = never
    try:
        everything(images.subset(torch.tensor([9, 0])))
    finally:
        pipe.transformer.forward = first
    assert images.model.network_calls() == 3
    guided = generated_images(pipe, [1] * 2, num_inference_steps=3, guider="cfg:guidance_scale=2.0")
    everything(guided)
    assert guided.model.network_calls() == 6


def test_the_file_goes_with_the_set(pipe, tmp_path):
    images = generated_images(pipe, [1, 2], num_inference_steps=1, folder=tmp_path)
    everything(images)
    assert len(list(tmp_path.rglob("images.bin"))) == 1
    del images
    gc.collect()
    assert list(tmp_path.iterdir()) == []


def test_evaluated_like_any_set(pipe, real):
    def result():
        images = generated_images(pipe, matched(real), num_inference_steps=2, guider="cfg:guidance_scale=2.0")
        return evaluate(real, images, quiet=True)

    before = torch.random.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()
    first = result()
    assert torch.equal(before[0], torch.random.get_rng_state()) and before[2] == random.getstate()
    assert numpy.array_equal(before[1], numpy.random.get_state()[1])
    assert first.model_dump_json() == result().model_dump_json()
    assert first.nfe == 4 and first.protocol.matched == "labels" and first.protocol.generated_images == "uint8 L 8x8"
    assert first.made_with == {
        "model": "ClassConditionalPipeline",
        "steps": 2,
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "seed": 0,
        "guider": "cfg",
        "guidance_scale": 2.0,
    }
    with pytest.raises(ValueError, match="nfe=3.*counted"):
        evaluate(real, generated_images(pipe, matched(real)), nfe=3)


def test_matched_keeps_every_class_its_share(real):
    whole = matched(real)
    assert torch.equal(whole.labels, real.labels.sort().values)
    half = matched(real, 30)
    assert (half.labels.bincount(minlength=10) - real.labels.bincount(minlength=10) / 2).abs().max() < 1
    names = {i: f"digit {i}, numeral" for i in range(10)}
    asked = matched(real, class_names=names)
    assert asked.prompts == [f"a photo of a digit {i}" for i in asked.labels.tolist()]
    assert matched(real, 1, class_names=names, template="{}!").prompts == ["digit 0!"]
    with pytest.raises(ValueError, match="class_names: no name for label 9"):
        matched(real, class_names=list("abcdefghi"))
    with pytest.raises(ValueError, match="template='x': must have one {}"):
        matched(real, template="x")
    with pytest.raises(ValueError, match="n=0: must be at least 1"):
        matched(real, 0)
    assert evenly(10, 25).labels.bincount().tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 3, 2]


def test_bad_requests_are_refused_before_any_image(pipe, real, tiny_pipeline, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("the network was called")

    monkeypatch.setattr(pipe.transformer, "forward", never)
    for asked, settings, match in (
        ([1, 12], {}, "accepted are 0 to 9"),
        (["a cat"], {}, "takes class labels, and what is asked has none"),
        (4, {}, "takes class labels"),
        ([], {}, "asked: expected texts"),
        ([True], {}, "asked: expected texts"),
        ([1], {"num_inference_steps": 0}, "num_inference_steps=0"),
        ([1], {"guider": "nothing"}, "nothing"),
        ([1], {"arguments": {"height": 3}}, "height"),
        ([1], {"batch_size": 0}, "batch_size=0"),
        ([1], {"crop": "squash"}, "crop='squash' has no effect without size"),
        ([1], {"size": 0}, "size=0"),
        ([1], {"size": 4, "crop": "middle"}, "crop"),
        ([1], {"size": 2**21}, "bytes, .* are free"),
    ):
        with pytest.raises(ValueError, match=match):
            generated_images(pipe, asked, **settings)
    text = tiny_pipeline("sd15")
    with pytest.raises(ValueError, match="takes prompts, and reference .* has labels without names"):
        generated_images(text, matched(real))
    with pytest.raises(ValueError, match="accepted are ClassConditionalPipeline"):
        generated_images(diffusers.DDPMPipeline(torch.nn.Identity(), diffusers.DDPMScheduler()), 3)


def test_a_pipeline_of_diffusers_and_a_preparation(tiny_pipeline):
    pipe = tiny_pipeline("sd15")
    prompts = ["a cat", "two dogs"]
    images = generated_images(pipe, prompts, num_inference_steps=2, guider="cfg:guidance_scale=3.0")
    own = TextToImagePipeline.from_pipe(pipe)
    shape = own.sample_shape()
    expected = own(
        prompts[1:], 2, guidance_scale=3.0, latents=ItemRNG(0, [1]).normal(shape),
        generator=ItemRNG(0, [1]).generators(),
    ).images[0]  # fmt: skip
    made = everything(images)
    assert (made[1].permute(1, 2, 0).int() - torch.from_numpy(numpy.array(expected)).int()).abs().max() <= 1
    assert images.prompts == prompts and images.labels is None
    small = generated_images(
        pipe, prompts, num_inference_steps=2, guider="cfg:guidance_scale=3.0", size=5, crop="squash"
    )
    side = made.shape[-1]
    assert small.kind == f"uint8 RGB {side}x{side}, to 5x5 (squashed, bicubic)"
    whole = Image.fromarray(made[0].permute(1, 2, 0).numpy()).resize((5, 5), Image.Resampling.BICUBIC)
    assert numpy.array_equal(everything(small)[0].permute(1, 2, 0).numpy(), numpy.array(whole))


def test_dit_of_diffusers(tiny_pipeline):
    images = generated_images(tiny_pipeline("dit"), [3, 999], num_inference_steps=1)
    assert everything(images).shape[:2] == (2, 3)
    with pytest.raises(ValueError, match="accepted are 0 to 999"):
        generated_images(tiny_pipeline("dit"), [1000])


def test_networks_do_not_drop_out_and_stay_as_they_were(pipe):
    expected = everything(generated_images(pipe, [1, 2], num_inference_steps=1))
    pipe.transformer.train()
    try:
        images = generated_images(pipe, [1, 2], num_inference_steps=1)
        assert torch.equal(everything(images), expected) and pipe.transformer.training
    finally:
        pipe.transformer.eval()
    assert not getattr(pipe, "_progress_bar_config", None)


def test_autoregressive():
    torch.manual_seed(0)
    pipe = AutoregressivePipeline(GPT(hidden_size=16, num_layers=1, num_heads=2, sample_size=4).eval())
    images = generated_images(pipe, [1, 2, 3], arguments={"guidance_scale": 2.0}, batch_size=2)
    made = everything(images)
    assert made.shape == (3, 1, 4, 4) and images.model.network_calls() == 32
    again = generated_images(pipe, [1, 2, 3], arguments={"guidance_scale": 2.0}, batch_size=1)
    assert torch.equal(again.load(torch.tensor([2])), made[2:])
    for asked, settings, match in (
        ([1], {"num_inference_steps": 3}, "num_inference_steps=3"),
        ([1], {"guider": "cfg"}, "guider='cfg': a AutoregressivePipeline takes none"),
        ([1], {"arguments": {"steps": 3}}, "steps"),
        ([10], {}, "10 to 10; accepted are 0 to 9"),
        (["a"], {}, "takes class labels"),
    ):
        with pytest.raises(ValueError, match=match):
            generated_images(pipe, asked, **settings)


def test_tokens_can_be_drawn_again_by_the_command_of_a_report(real, tmp_path):
    torch.manual_seed(0)
    pipe = AutoregressivePipeline(GPT(hidden_size=16, num_layers=1, num_heads=2, sample_size=8).eval())
    drawn = generated_images(pipe, [1, 2, 3], arguments={"guidance_scale": 2.0, "top_k": 5}, name="gpt", seed=4)
    evaluate(real, drawn, metrics=["contrast"], quiet=True, output=tmp_path / "gpt")
    words = shlex.split(run_command(read_runs([tmp_path / "gpt"])[0][0]))
    assert words[4] == "pipeline:gpt" and "--steps" not in words and words[words.index("--seed") + 1] == "4"
    assert parse_settings("", words[words.index("--set") + 1]) == {"guidance_scale": 2, "top_k": 5}


def test_calls_of_a_diffusion_head_are_counted_beside_those_of_the_network(real, tmp_path, capsys):
    """Steps that fall save calls of the head alone: without these, tables would show no difference."""
    torch.manual_seed(0)
    small = dict(hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, buffer_size=2)
    pipe = MaskedAutoregressivePipeline(MAR(**small).eval())
    of_budget = "linear:budget=15,lo=2"
    cases = [("falling", StepAnnealer(6, 2), 6 + 4 + 3 + 2), ("budget", of_budget, 15), ("constant", "6", 4 * 6)]
    for name, steps, calls in cases:
        images = generated_images(
            pipe, [1, 2, 3], num_inference_steps=steps, arguments={"num_ar_steps": 4}, batch_size=2, name="mar"
        )
        assert images.model.head_calls() is None  # of no image
        result = evaluate(real, images, metrics=["contrast"], quiet=True, output=tmp_path / name)
        assert (result.nfe, result.head_calls) == (4, calls)
        assert result.made_with["steps"] == {"falling": "linear:hi=6,lo=2", "budget": of_budget, "constant": 6}[name]
    show(result)
    told = capsys.readouterr().out
    assert re.search(r"network calls \(NFE\)\W+4\W", told) and re.search(r"calls of the diffusion head\W+24\W", told)
    rows = [run.row for run in read_runs([tmp_path / "falling", tmp_path / "constant"])[0]]
    assert [(row["nfe"], row["head_calls"]) for row in rows] == [(4, 15), (4, 24)]
    html = write_page([tmp_path / "falling", tmp_path / "constant"], tmp_path / "page.html", quiet=True).read_text()
    table = [re.sub("<[^>]+>", " ", row.split("</tr>")[0]).split() for row in html.split("<tr>")[1:4]]
    head, falling, constant = table
    assert head[-2:] == ["head", "calls"] and (falling[-1], constant[-1]) == ("15", "24")
    command = run_command(read_runs([tmp_path / "falling"])[0][0])
    assert "pipeline:mar --steps linear:hi=6,lo=2 --set num_ar_steps=4 --n 3" in command
    assert "head_calls" not in row_of(evaluate(real, real, metrics=["contrast"], quiet=True).model_dump())


def test_a_nan_is_left_out_and_named(pipe, real, monkeypatch):
    forward = pipe.transformer.forward

    def broken(x, t, s, class_labels, scalars):
        return forward(x, t, s, class_labels, scalars).masked_fill((class_labels == 7)[:, None, None, None], torch.nan)

    monkeypatch.setattr(pipe.transformer, "forward", broken)
    images = generated_images(pipe, matched(real, 20), num_inference_steps=1)
    with pytest.raises(UnreadableImage, match="is NaN"):
        everything(images)
    sevens = int((images.labels == 7).sum())
    result = evaluate(real, images, quiet=True)
    assert result.protocol.n_gen == 20 - sevens and sevens
    assert any(f"{sevens} of 20 images" in note and "is NaN" in note for note in result.notes)
    with pytest.raises(ValueError, match="is NaN"):
        evaluate(real, generated_images(pipe, matched(real, 20), num_inference_steps=1), strict=True, quiet=True)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux"])
def test_the_size_of_images_is_known_before_they_are_made(name, tiny_pipeline):
    small = dict(height=32, width=48) | (dict(max_sequence_length=8) if name != "sdxl" else {})
    images = generated_images(tiny_pipeline(name), ["a cat"], num_inference_steps=1, arguments=small)
    assert everything(images).shape == (1, 3, 32, 48) and images.kind == "uint8 RGB 48x32"
    assert images.model.made_with["height"] == 32


def flow_map(**settings):
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4, **settings)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return FewStepPipeline(scheduler=FlowMapScheduler(), transformer=net.eval())


def test_a_flow_map_of_few_steps():
    pipe = flow_map(scalars={"guidance_scale": 2.0})
    images = generated_images(pipe, [3, 4, 5], num_inference_steps=2, arguments={"guidance_scale": 3.0}, batch_size=2)
    made = everything(images)
    one = pipe(class_labels=[5], num_inference_steps=2, guidance_scale=3.0, latents=ItemRNG(0, [2]).normal((1, 8, 8)))
    assert numpy.array_equal(made[2, 0].numpy(), numpy.asarray(one.images[0]))
    assert images.model.network_calls() == 2 and images.model.made_with["guidance_scale"] == 3.0
    other = everything(generated_images(pipe, [3, 4, 5], num_inference_steps=2))
    assert not torch.equal(other, made)
    result = evaluate("digits", images, metrics=["frechet", "straightness:num_samples=4,num_steps=2"], quiet=True)
    assert result.nfe == 2 and result.values["straightness"] > 0


def test_a_pipeline_in_a_folder_of_that_name_has_the_name_above():
    assert [name_of(path) for path in ("runs/apple/pipeline", "runs/pear", "owner/plum")] == ["apple", "pear", "plum"]


def test_an_unconditional_network():
    images = generated_images(flow_map(num_classes=0), 3, num_inference_steps=1)
    assert everything(images).shape == (3, 1, 8, 8) and images.labels is None and images.prompts is None
    with pytest.raises(ValueError, match="asked=0: must be at least 1 image"):
        generated_images(flow_map(num_classes=0), 0)
    # A reference may know labels that such a network is not told; the images are then still not of them.
    asked = matched(read_images("digits"), 4)
    assert generated_images(flow_map(num_classes=0), asked, num_inference_steps=1).labels is None
