"""``genkit sample``: the same images whatever the batch size, and after any interruption."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings

import diffusers
import numpy
import pytest
import torch
from PIL import Image

from genkit.guidance import CFG
from genkit.networks.dit import DiT
from genkit.networks.gpt import GPT
from genkit.networks.mar import MAR
from genkit.pipelines import ClassConditionalPipeline
from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.pipelines.by_name import parse_steps
from genkit.pipelines.commands import load_pipeline, parse_guider, parse_scheduler, parse_settings, sample_to_folder
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.rng import ItemRNG
from genkit.schedulers import FlowMapScheduler
from genkit.schedulers.exact_denoiser import ExactDenoiserScheduler
from genkit.step_annealing import StepAnnealer


def network(**settings):
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4, **settings)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return net.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipe")
    ClassConditionalPipeline(network(), FlowMapScheduler(), id2label={"3": "three, drei"}).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    path = tmp_path_factory.mktemp("plain")
    ClassConditionalPipeline(network(), diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(path)
    return path


def images(output):
    return {p.relative_to(output).as_posix(): p.read_bytes() for p in sorted(output.rglob("*.png")) if p.stem != "grid"}


def call(pipeline, output, **settings):
    return sample_to_folder(pipeline, output, **dict(quiet=True, num_inference_steps=2) | settings)


def test_the_same_whatever_the_batch_size_and_resumes(folder, tmp_path):
    kwargs = dict(labels=["1", "drei"], num_images=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # a user could do nothing about it
        one = images(call(folder, tmp_path / "a", batch_size=1, **kwargs))
    six = images(call(folder, tmp_path / "b", batch_size=6, **kwargs))
    assert list(one) == [f"{c}/{i:06d}.png" for c, rows in ((1, range(3)), (3, range(3, 6))) for i in rows]
    assert len(set(one.values())) == 6 and one == six
    (tmp_path / "a" / "3" / "000004.png").unlink()
    before = (tmp_path / "a" / "1" / "000000.png").stat().st_mtime_ns
    assert images(call(folder, tmp_path / "a", **kwargs)) == one
    assert (tmp_path / "a" / "1" / "000000.png").stat().st_mtime_ns == before
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert rows[4] == {"file_name": "3/000004.png", "label": 3, "item": 4}
    with Image.open(tmp_path / "a" / "3" / "000004.png") as image:
        carried = json.loads(image.text["genkit"])
    assert carried["item"] == 4 and carried["settings"]["seed"] == 0
    assert Image.open(tmp_path / "a" / "grid.png").size == (3 * 50 - 2, 2 * 50 - 2)
    with pytest.raises(ValueError, match="holds images made with {'seed': 0}"):
        call(folder, tmp_path / "a", seed=1, **kwargs)


@pytest.mark.parametrize(
    "scheduler",
    ["DDPMScheduler", "flow_map:stochastic=True", "exact_denoiser:noise_scale=0.5", "EulerAncestralDiscreteScheduler"],
)
def test_noisy_schedulers_do_not_see_the_batch(scheduler, plain, tmp_path):
    pipeline = plain
    if scheduler.endswith("Scheduler"):
        pipeline = tmp_path / "vp"
        ClassConditionalPipeline(network(), diffusers.DDPMScheduler()).save_pretrained(pipeline)
    kwargs = dict(labels=["1", "2", "3"], scheduler=scheduler, num_inference_steps=4)
    one = images(call(pipeline, tmp_path / "a", batch_size=1, **kwargs))
    two = images(call(pipeline, tmp_path / "b", batch_size=2, **kwargs))
    assert one == two and len(set(one.values())) == 3
    assert images(call(pipeline, tmp_path / "c", seed=1, **kwargs)) != one


def test_an_image_is_that_of_its_seed_and_number(plain, tmp_path):
    made = call(plain, tmp_path / "a", labels=["5", "6"], guider="cfg:guidance_scale=2.0")
    pipe = ClassConditionalPipeline.from_pretrained(plain)
    pipe.set_progress_bar_config(disable=True)
    noise = ItemRNG(0, [1]).normal((1, 8, 8))
    expected = pipe([6], 2, latents=noise, guider=CFG(guidance_scale=2.0)).images[0]
    assert numpy.array_equal(numpy.asarray(Image.open(made / "6" / "000001.png")), numpy.asarray(expected))


_KILLED = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from genkit.pipelines import image_folder
from genkit.pipelines.commands import sample_to_folder
save = image_folder.ImageFolder.save
def slow(self, i, image):
    save(self, i, image)
    print(i, flush=True)
    time.sleep(0.2)
image_folder.ImageFolder.save = slow
sample_to_folder(Path(sys.argv[1]), Path(sys.argv[2]), labels=["1"], num_images=50, num_inference_steps=2, batch_size=7)
"""


def test_goes_on_after_being_killed(folder, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", _KILLED, folder, tmp_path / "a"], stdout=subprocess.PIPE)
    try:
        for _ in range(9):  # into the second batch
            process.stdout.readline()
        time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    there = images(tmp_path / "a")
    assert 9 <= len(there) < 50 and not (tmp_path / "a" / "metadata.jsonl").exists()
    again = images(call(folder, tmp_path / "a", labels=["1"], num_images=50))
    assert len(again) == 50 and all(again[name] == data for name, data in there.items())
    assert again == images(call(folder, tmp_path / "b", labels=["1"], num_images=50, batch_size=50))


def test_files_cut_off_by_a_kill_are_made_again(folder, tmp_path):
    made = images(call(folder, tmp_path / "a", labels=["1"]))
    (tmp_path / "a" / "1" / "000000.png").rename(tmp_path / "a" / "1" / "000000.png.part")
    (tmp_path / "a" / "1" / "000000.png.part").write_bytes(b"half")
    assert images(call(folder, tmp_path / "a", labels=["1"])) == made
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "settings.json.part").write_text('{"see')  # killed before the settings were there
    assert images(call(folder, tmp_path / "b", labels=["1"])) == made


def test_settings_without_images_do_not_hold_a_folder(folder, tmp_path):
    call(folder, tmp_path / "a", labels=["1"])
    (tmp_path / "a" / "1" / "000000.png").unlink()
    (tmp_path / "a" / "grid.png").unlink()
    call(folder, tmp_path / "a", labels=["2"])
    assert json.loads((tmp_path / "a" / "settings.json").read_text())["asked"] == [2]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_prompts_for_the_pipelines_of_diffusers(name, tiny_pipeline, tmp_path):
    tiny_pipeline(name).save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("blue, and “green”\n\n")
    size = "max_sequence_length=16," if name in ("sd3", "flux") else ""
    settings = dict(
        prompts=["a cat"],
        inputs=tmp_path / "prompts.txt",
        num_images=2,
        guider="apg:guidance_scale=5.0",
        arguments=size + "negative_prompt='two dogs',height=32,width=32",
    )
    one = images(call(tmp_path / "pipe", tmp_path / "a", batch_size=1, **settings))
    three = images(call(tmp_path / "pipe", tmp_path / "b", batch_size=3, **settings))
    assert list(one) == [f"{i:06d}.png" for i in range(4)] and len(set(one.values())) == 4
    pixels = [numpy.asarray(Image.open(tmp_path / f / "000003.png"), dtype=int) for f in "ab"]
    assert list(three) == list(one) and numpy.abs(pixels[0] - pixels[1]).max() <= 1  # where a half is rounded
    rows = [json.loads(line) for line in (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()]
    assert rows[2] == {"file_name": "000002.png", "item": 2, "text": "blue, and “green”"}


def test_labels_for_a_pipeline_of_diffusers_and_no_input_for_unconditional_ones(tiny_pipeline, tmp_path):
    tiny_pipeline("dit").save_pretrained(tmp_path / "dit")
    made = images(call(tmp_path / "dit", tmp_path / "a", labels=["1", "999"], scheduler="DPMSolverMultistepScheduler"))
    assert list(made) == ["1/000000.png", "999/000001.png"]
    net = network(num_classes=0)
    ClassConditionalPipeline(net, diffusers.FlowMatchEulerDiscreteScheduler()).save_pretrained(tmp_path / "free")
    assert len(images(call(tmp_path / "free", tmp_path / "b", num_images=3, batch_size=2))) == 3
    with pytest.raises(ValueError, match="unconditional"):
        call(tmp_path / "free", tmp_path / "c", labels=["1"])
    with pytest.raises(ValueError, match="unconditional"):
        call(tmp_path / "free", tmp_path / "c", guider="cfg:guidance_scale=2.0")


def test_all_labels_by_default(folder, tmp_path):
    assert [name.split("/")[0] for name in images(call(folder, tmp_path / "a"))] == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (dict(labels=["12"]), ValueError, "accepted are 0 to 9"),
        (dict(labels=["four"]), ValueError, "labels="),
        (dict(prompts=["a cat"]), ValueError, "takes class labels"),
        (dict(batch_size=0), ValueError, "batch_size=0"),
        (dict(num_images=0), ValueError, "num_images=0"),
        (dict(num_inference_steps=0), ValueError, "num_inference_steps=0"),
        (dict(dtype="float31"), ValueError, "did you mean 'float32'"),
        (dict(guider="apgg"), ValueError, "did you mean 'apg'"),
        (dict(guider="apg:eta"), ValueError, "not of the form key=value"),
        (dict(guider="cfg:guidance_scale=2.0"), ValueError, "gives no clean-sample prediction to guide"),
        (dict(scheduler="pndmm"), ValueError, "did you mean 'pndm'"),
        (dict(scheduler="flow_map:shif=3"), ValueError, "did you mean 'shift'"),
        (dict(arguments="etta=1"), ValueError, "did you mean 'eta'"),
        (dict(arguments="latents=1"), ValueError, "'latents' is not known"),
        (dict(arguments="eta"), ValueError, "not of the form key=value"),
        (dict(inputs="nowhere.txt"), FileNotFoundError, "no such file"),
    ],
)
def test_refuses_before_it_writes(settings, error, message, folder, tmp_path):
    if "inputs" in settings:
        settings = dict(inputs=tmp_path / settings["inputs"])
    with pytest.raises(error, match=message):
        call(folder, tmp_path / "out", **dict(labels=["1"]) | settings)
    assert not (tmp_path / "out").exists()


def test_refuses_what_is_no_pipeline_and_folders_of_something_else(folder, tmp_path):
    for place in (tmp_path / "nothing", tmp_path, "nobody/nothing"):
        with pytest.raises(FileNotFoundError, match="no model_index.json|nor found on the Hub"):
            call(place, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        call(folder, tmp_path / "mine", labels=["1"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "KandinskyPipeline"}')
    with pytest.raises(ValueError, match="is a KandinskyPipeline; accepted are"):
        load_pipeline(tmp_path / "other")


def test_settings_are_python_literals_and_bare_words():
    text = "a=1e-3,b=-2,c=gradient,d=[1,2],e={'name':'apg'},f='x, y',g=None,h=True"
    found = dict(a=1e-3, b=-2, c="gradient", d=[1, 2], e={"name": "apg"}, f="x, y", g=None, h=True)
    assert parse_settings("x", text) == found and parse_settings("x", "") == {}
    text = "path=ink.py:ink,differentiable=false,model=openai/clip-vit, file=~/a.b/c_d.py:e,settings={'size': 3}"
    found = dict(path="ink.py:ink", differentiable="false", model="openai/clip-vit", file="~/a.b/c_d.py:e")
    assert parse_settings("x", text) == found | {"settings": {"size": 3}}
    with pytest.raises(ValueError, match="take quotes: key='some text'"):
        parse_settings("x", "a=two words")
    for bad in ("1", "1/2", "a=1/2", "a=b:c d", "a=b.c", "a=f()", "**{}", "a=1)", "a=1)+_(b=2"):
        with pytest.raises(ValueError, match="not of the form"):
            parse_settings("x", bad)


def test_parse_guider():
    guider = parse_guider("apg:guidance_scale=4,eta=0.5")
    assert guider.config.guidance_scale == 4 and guider.config.eta == 0.5
    with pytest.raises(ValueError, match="did you mean 'guidance_scale'"):
        parse_guider("cfg:guidance_scal=4")


@pytest.mark.parametrize("text", ["h_transform", "gfcg:strength=2.0", "cfg_mp:rule={'name': 'gfcg'}"])
def test_a_guider_that_text_cannot_give_what_it_needs(text):
    with pytest.raises(ValueError, match=r"from Python only, as \w+\(\.\.\.\)\.using\((reference|classifier)=\.\.\.\)"):
        parse_guider(text)
    with pytest.raises(ValueError, match="did you mean 'cfg'.*Accepted: ") as found:
        parse_guider("cfgg")
    assert "cfg_mp" in str(found.value) and "h_transform" not in str(found.value)


def test_parse_scheduler_keeps_the_path(tiny_pipeline):
    old = tiny_pipeline("sd15").scheduler
    exact = parse_scheduler("exact_denoiser:noise_scale=0.5", old)
    assert isinstance(exact, ExactDenoiserScheduler) and exact.config.noise_scale == 0.5
    back = parse_scheduler("DPMSolverMultistepScheduler:solver_order=3", exact)
    assert back.config.solver_order == 3
    torch.testing.assert_close(back.alphas_cumprod, old.alphas_cumprod)
    shifted = parse_scheduler("flow_map:shift=2.0", tiny_pipeline("sd3").scheduler)
    assert shifted.config.shift == 2.0


@pytest.fixture(scope="module")
def tokens(tmp_path_factory):
    """A GPT, token after token."""
    path = tmp_path_factory.mktemp("gpt")
    torch.manual_seed(0)
    net = GPT(vocab_size=5, sample_size=4, num_classes=3, hidden_size=16, num_layers=1, num_heads=2)
    torch.nn.init.normal_(net.out.weight, std=0.5)
    AutoregressivePipeline(net).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    """A MAR, a set of tokens after the other."""
    path = tmp_path_factory.mktemp("mar")
    torch.manual_seed(0)
    net = MAR(
        num_classes=3, sample_size=4, hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1,
        buffer_size=2,
    )  # fmt: skip
    for weight in (net.head.out.weight, net.head.modulation.weight):
        torch.nn.init.normal_(weight, std=0.05)
    MaskedAutoregressivePipeline(net).save_pretrained(path)
    return path


def test_token_after_token(tokens, tmp_path):
    settings = dict(labels=["2", "0"], num_images=2, num_inference_steps=None)
    one = images(call(tokens, tmp_path / "a", batch_size=1, **settings))
    assert list(one) == [f"{c}/{i:06d}.png" for c, rows in ((0, (2, 3)), (2, (0, 1))) for i in rows]
    assert one == images(call(tokens, tmp_path / "b", batch_size=4, **settings)) and len(set(one.values())) == 4
    pipe = AutoregressivePipeline.from_pretrained(tokens)
    expected = pipe([0], generator=ItemRNG(0, [2]).generators()).images[0]
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a/0/000002.png")), numpy.asarray(expected))
    greedy = call(tokens, tmp_path / "c", arguments="temperature=0,guidance_scale=2.0", **settings)
    first, second = (numpy.asarray(Image.open(greedy / f"2/00000{i}.png")) for i in (0, 1))
    assert numpy.array_equal(first, second)
    assert len(images(call(tokens, tmp_path / "d", num_inference_steps=None))) == 3  # one of each label
    with pytest.raises(ValueError, match="holds images made with {'arguments': {'temperature': 0"):
        call(tokens, tmp_path / "c", **settings)


def test_a_set_of_tokens_after_the_other(masked, tmp_path):
    settings = dict(labels=["1"], num_images=2, arguments="num_ar_steps=4,guidance_scale=2.0")
    one = images(call(masked, tmp_path / "a", batch_size=1, **settings))
    assert one == images(call(masked, tmp_path / "b", batch_size=2, **settings)) and len(set(one.values())) == 2
    pipe = MaskedAutoregressivePipeline.from_pretrained(masked)
    expected = pipe([1], 2, num_ar_steps=4, guidance_scale=2.0, generator=ItemRNG(0, [1]).generators()).images[0]
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a/1/000001.png")), numpy.asarray(expected))


def test_steps_of_the_head_that_fall(masked, tmp_path):
    settings = dict(labels=["1"], arguments="num_ar_steps=4")
    found = images(call(masked, tmp_path / "a", num_inference_steps="linear:lo=2,hi=6", **settings))
    pipe = MaskedAutoregressivePipeline.from_pretrained(masked)
    out = pipe([1], StepAnnealer(6, 2), num_ar_steps=4, generator=ItemRNG(0, [0]).generators())
    assert numpy.array_equal(numpy.asarray(Image.open(tmp_path / "a/1/000000.png")), numpy.asarray(out.images[0]))
    assert out.head_calls == 6 + 4 + 3 + 2
    told = json.loads((tmp_path / "a" / "settings.json").read_text())
    assert told["num_inference_steps"] == "linear:hi=6,lo=2"
    again = call(masked, tmp_path / "a", num_inference_steps=parse_steps(told["num_inference_steps"]), **settings)
    assert images(again) == found  # the same settings, so that it would go on
    budget = call(masked, tmp_path / "b", num_inference_steps="linear:budget=15,lo=2", **settings)
    of_budget = numpy.asarray(Image.open(budget / "1/000000.png"))  # 6 to 2 is the largest: 6 + 4 + 3 + 2
    assert numpy.array_equal(of_budget, numpy.asarray(out.images[0]))
    assert json.loads((budget / "settings.json").read_text())["num_inference_steps"] == "linear:budget=15,lo=2"
    assert parse_steps(" 25") == 25 and parse_steps("cosine") == StepAnnealer(50, 5, "cosine")


@pytest.mark.parametrize(
    "steps, text",
    [
        (
            "ten",
            "num_inference_steps='ten'.*Accepted: a whole number, constant, cosine, linear, two_stage",
        ),
        ("lineer:hi=4", "did you mean 'linear'.*Accepted: a whole number, constant"),
        ("2.5", "num_inference_steps='2.5' is not known.*a whole number"),
        ("linear:high=4", "num_inference_steps 'linear': setting='high' is not known.*Accepted: budget, hi, lo"),
        ("linear:budget=19", "budget=19: 4 steps of at least lo=5 take 20"),
        (
            "linear:budget=80,hi=9",
            "hi=9, budget=80: the budget decides hi; give one of the two",
        ),
        ("constant:budget=90,lo=5", "lo=5, budget=90: the budget decides lo"),
        ("cosine:budget=20000", "the first of 4 autoregressive steps would take 9995; accepted are 1 to 1000 steps"),
        ("linear:budget=4.5", "budget=4.5: must be an integer"),
        ("linear:hi=4,lo=5", "lo=5, hi=4: accepted are 1 <= lo <= hi"),
        ("linear:hi=2000", "num_inference_steps=linear:hi=2000,lo=5: accepted are 1 to 1000 steps of the head"),
        ("linear:hi=x", "hi='x': must be an integer"),
        ("0", "num_inference_steps=0: accepted are 1 to 1000"),
    ],
)
def test_steps_that_a_command_line_cannot_mean(steps, text, masked, tmp_path):
    with pytest.raises(ValueError, match=text):
        call(masked, tmp_path / "a", num_inference_steps=steps)
    assert not (tmp_path / "a").exists()


def test_steps_that_fall_are_for_a_head(folder, tokens, tmp_path):
    for path, text in (
        (folder, "='linear:hi=4,lo=1': steps that fall.*a ClassConditionalPipeline takes a whole number"),
        (tokens, "=linear:hi=4,lo=1: a pipeline of the class AutoregressivePipeline takes none"),
    ):
        with pytest.raises(ValueError, match=text):
            call(path, tmp_path / "a", num_inference_steps="linear:hi=4,lo=1")
    assert not (tmp_path / "a").exists()


def test_more_steps_than_tokens_are_refused_before_anything_is_written(masked, tmp_path):
    with pytest.raises(ValueError, match="num_ar_steps=5: accepted are 1 to 4, the number of tokens"):
        call(masked, tmp_path / "a", arguments="num_ar_steps=5")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(num_inference_steps=4), "=4: a pipeline of the class AutoregressivePipeline takes none"),
        (dict(guider="cfg"), "guider='cfg': a pipeline of the class AutoregressivePipeline takes none; accepted are"),
        (dict(scheduler="pndm"), "scheduler='pndm'"),
        (dict(adapters=["lora"]), r"adapters=\['lora'\]"),
        (dict(prompts=["a three"]), r"prompts=\['a three'\]"),
        (dict(labels=["three"]), r"labels=\['three'\]: accepted are numbers, 0 to 2"),
        (dict(labels=["3"]), "accepted are 0 to 2"),
        (dict(arguments="temprature=1"), "'temprature'.*did you mean 'temperature'"),
        (dict(arguments="top_p=2"), "top_p=2"),
        (dict(arguments="num_inference_steps=4"), "is a setting of its own, --steps on a command line"),
    ],
)
def test_token_after_token_refuses(settings, text, tokens, tmp_path):
    with pytest.raises(ValueError, match=text):
        sample_to_folder(tokens, tmp_path / "a", **settings)
    assert not (tmp_path / "a").exists()


def test_pipelines_of_no_denoiser_elsewhere(tokens, tmp_path):
    with pytest.raises(ValueError, match="of a network that is no denoiser; accepted here are Class"):
        load_pipeline(tokens)
    (tmp_path / "model_index.json").write_text('{"_class_name": "TokenizerPipeline", "vqvae": [null, null]}')
    with pytest.raises(ValueError, match="is a TokenizerPipeline, which makes images of images.*reconstructed:"):
        sample_to_folder(tmp_path, tmp_path / "a")
