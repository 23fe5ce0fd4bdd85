"""Sides of an evaluation as a command line writes them."""

import json
import random

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from genkit.cli import app
from genkit.eval.asked import matched
from genkit.eval.command import main, measure_features
from genkit.eval.extractors.base import get_extractor
from genkit.eval.generated import generated_images
from genkit.eval.inputs import drawn, read_images
from genkit.eval.result import Result
from genkit.eval.run import evaluate, measure
from genkit.eval.sides import Generation, open_sides
from genkit.networks.dit import DiT
from genkit.networks.gpt import GPT
from genkit.pipelines import ClassConditionalPipeline
from genkit.pipelines.autoregressive import AutoregressivePipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    path = tmp_path_factory.mktemp("pipes") / "student"
    ClassConditionalPipeline(
        net.eval(), diffusers.FlowMatchEulerDiscreteScheduler(), id2label={"3": "three"}
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    path = tmp_path_factory.mktemp("real")
    digits = read_images("digits")
    for i in range(40):
        (path / str(int(digits.labels[i]))).mkdir(exist_ok=True)
        Image.fromarray(digits.load(torch.tensor([i]))[0, 0].numpy()).save(
            path / str(int(digits.labels[i])) / f"{i}.png"
        )
    return path


def test_a_pipeline_is_asked_for_the_labels_of_the_reference(folder, real, tmp_path):
    done = CliRunner().invoke(
        app,
        ["eval", "run", str(real), f"pipeline:{folder}", "--metrics", "frechet,accuracy", "--n", "30", "--steps", "2",
         "--guider", "cfg:guidance_scale=2", "--json", str(tmp_path / "r.json"), "--html", str(tmp_path / "r.html"),
         "--output", str(tmp_path / "run"), "--intervals", "5", "--quiet"],
    )  # fmt: skip
    assert done.exit_code == 0, done.exception
    found = Result.load(tmp_path / "r.json")
    assert found == Result.load(tmp_path / "run" / "result.json")
    assert found.nfe == 4 and found.protocol.matched == "labels" and found.protocol.n_gen == 30
    assert found.made_with["model"] == "student" and found.made_with["guidance_scale"] == 2
    reference = drawn(read_images(real), 30, 0, "reference")
    pipe = ClassConditionalPipeline.from_pretrained(folder)
    images = generated_images(
        pipe, matched(reference), num_inference_steps=2, guider="cfg:guidance_scale=2", name="student"
    )
    direct = evaluate(reference, images, metrics=["frechet", "accuracy"], quiet=True)
    assert direct.values == found.values and direct.protocol == found.protocol
    assert (tmp_path / "r.html").read_text().count("data:image/png") >= 2


def test_statistics_say_nothing_of_labels_so_all_come_equally_often(folder, tmp_path):
    stats = measure(read_images("digits"), get_extractor("digits"), quiet=True).stats
    stats.save(tmp_path / "ref.npz")
    _, images, left = open_sides(tmp_path / "ref.npz", f"pipeline:{folder}", n=25)
    assert left is None and images.labels.bincount().tolist() == [3, 2, 3, 2, 3, 2, 3, 2, 3, 2]
    found = main(
        str(tmp_path / "ref.npz"), f"pipeline:{folder}", n=25, metrics=["frechet"], generation=Generation(steps=1),
        quiet=True,
    )  # fmt: skip
    assert (found.protocol.n_real, found.protocol.n_gen, found.nfe) == (1797, 25, 1)
    with pytest.raises(ValueError, match="n=None: .*ref.npz does not say what to make"):
        open_sides(tmp_path / "ref.npz", f"pipeline:{folder}")


def test_saved_features_know_the_labels(folder, real, tmp_path):
    measure_features(str(real), tmp_path / "ref.safetensors", quiet=True)
    _, images, _ = open_sides(tmp_path / "ref.safetensors", f"pipeline:{folder}")
    assert torch.equal(images.labels, read_images(real).labels.sort().values)
    done = CliRunner().invoke(app, ["eval", "features", str(real), str(tmp_path / "b.safetensors"), "--quiet"])
    assert done.exit_code == 0
    assert (tmp_path / "b.safetensors").read_bytes() == (tmp_path / "ref.safetensors").read_bytes()
    with pytest.raises(ValueError, match="saved with the suffix"):
        measure_features(str(real), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="absent does not exist"):
        measure_features(str(real), tmp_path / "absent" / "a.safetensors")


def test_inputs_and_settings(folder, real, tmp_path):
    (tmp_path / "labels.txt").write_text("1\nthree\n\n3\n")
    chosen = Generation(
        inputs=tmp_path / "labels.txt", scheduler="exact_denoiser:noise_scale=0.5", steps=2, dtype="float32"
    )
    _, images, _ = open_sides(real, f"pipeline:{folder}", generation=chosen, size=5, crop="squash")
    assert images.labels.tolist() == [1, 3, 3] and images.load(torch.tensor([0])).shape == (1, 1, 5, 5)
    assert images.model.made_with["scheduler"] == "exact_denoiser:noise_scale=0.5"
    for settings, match in (
        (dict(inputs=tmp_path / "labels.txt", template="{}"), "template='{}' is for prompts, and DiT takes none"),
        (dict(class_names=tmp_path), "class_names=.* is for prompts"),
        (dict(inputs=tmp_path / "none.txt"), "no such file"),
        (dict(dtype="float8"), "dtype.*float8"),
        (dict(scheduler="nothing"), "nothing"),
        (dict(guider="nothing"), "nothing"),
        (dict(steps=0), "num_inference_steps=0"),
        (dict(arguments="height"), "arguments"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=match):
            open_sides(real, f"pipeline:{folder}", generation=Generation(**settings))
    with pytest.raises(ValueError, match="n='5' has no effect with inputs"):
        open_sides(real, f"pipeline:{folder}", n=5, generation=Generation(inputs=tmp_path / "labels.txt"))
    with pytest.raises(ValueError, match="steps, guider: for images of 'pipeline:FOLDER', and the generated ones are"):
        open_sides(real, real, generation=Generation(steps=4, guider="cfg"))
    with pytest.raises(FileNotFoundError, match="model_index.json"):
        open_sides(real, f"pipeline:{tmp_path}")


def test_prompts_are_made_of_labels_by_names(tiny_pipeline, real, tmp_path):
    tiny_pipeline("sd15").save_pretrained(tmp_path / "sd")
    (tmp_path / "names.json").write_text(json.dumps({str(i): f"digit {i}" for i in range(10)}))
    _, images, _ = open_sides(
        real, f"pipeline:{tmp_path / 'sd'}", n=4, generation=Generation(class_names=tmp_path / "names.json")
    )
    assert images.prompts == [f"a photo of a digit {i}" for i in images.labels.tolist()]
    with pytest.raises(ValueError, match=f"takes prompts, and reference '{real.name}' has labels without names"):
        open_sides(real, f"pipeline:{tmp_path / 'sd'}")
    (tmp_path / "names.json").write_text("3")
    with pytest.raises(ValueError, match="class_names=.*expected JSON, a list or names by number"):
        open_sides(real, f"pipeline:{tmp_path / 'sd'}", generation=Generation(class_names=tmp_path / "names.json"))
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match="takes prompts, and .*ref.npz has none; inputs is a file of them"):
        open_sides(tmp_path / "ref.npz", f"pipeline:{tmp_path / 'sd'}", n=3)


def test_an_autoregressive_pipeline(real, tmp_path):
    torch.manual_seed(0)
    AutoregressivePipeline(GPT(hidden_size=16, num_layers=1, num_heads=2, sample_size=4)).save_pretrained(tmp_path)
    _, images, _ = open_sides(real, f"pipeline:{tmp_path}", n=3, generation=Generation(arguments="guidance_scale=2"))
    assert images.load(torch.arange(3)).shape == (3, 1, 4, 4) and images.model.network_calls() == 32
    with pytest.raises(ValueError, match="scheduler='pndm': a pipeline of the class AutoregressivePipeline has none"):
        open_sides(real, f"pipeline:{tmp_path}", generation=Generation(scheduler="pndm"))


def test_reconstructions_of_the_reference_or_of_others(tiny_pipeline, tmp_path):
    g = torch.Generator().manual_seed(0)
    for i, image in enumerate(torch.randint(0, 256, (6, 16, 16, 3), generator=g, dtype=torch.uint8)):
        (tmp_path / "val").mkdir(exist_ok=True)
        Image.fromarray(image.numpy()).save(tmp_path / "val" / f"{i}.png")
    tiny_pipeline("sd15").vae.save_pretrained(tmp_path / "vae")
    real, fake, left = open_sides(tmp_path / "val", f"reconstructed:{tmp_path / 'vae'}", n=4)
    assert left is None and fake.n == 4 and fake.model.originals is real
    assert fake.load(torch.arange(4)).shape == (4, 3, 16, 16)
    np.savez(tmp_path / "ref.npz", mu=np.zeros(3), sigma=np.eye(3))
    _, fake, _ = open_sides(tmp_path / "ref.npz", f"reconstructed:{tmp_path / 'vae'},of={tmp_path / 'val'}")
    assert fake.name == "val reconstructed by vae" and fake.n == 6
    with pytest.raises(ValueError, match="statistics cannot be reconstructed; name images, as .*,of=IMAGES"):
        open_sides(tmp_path / "ref.npz", f"reconstructed:{tmp_path / 'vae'}")
    with pytest.raises(ValueError, match="crop='squash' has no effect without size"):
        open_sides(tmp_path / "val", tmp_path / "val", crop="squash")


@pytest.mark.parametrize("kind", ["pipeline", "reconstructed", "folder"])
def test_the_same_call_gives_the_same_bytes_and_touches_no_random_state(kind, folder, tiny_pipeline, tmp_path):
    torch.manual_seed(3)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8)):
        Image.fromarray(image.numpy()).save(tmp_path / "real" / f"{i}.png")
    real, metrics = str(tmp_path / "real"), ["psnr"]
    if kind == "pipeline":
        real, metrics = "digits", ["frechet", "prdc", "straightness:num_samples=4,num_steps=2"]
        sides = real, f"pipeline:{folder}"
    elif kind == "reconstructed":
        tiny_pipeline("sd15").vae.save_pretrained(tmp_path / "vae")
        sides = real, f"reconstructed:{tmp_path / 'vae'}"
    else:
        sides = real, real
    extractor = "none" if kind != "pipeline" else "digits"
    settings = dict(metrics=metrics, extractor=extractor, quiet=True)
    if kind == "pipeline":
        settings |= dict(n=40, generation=Generation(steps=2))
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    for name in ("a", "b"):
        main(*sides, output=tmp_path / name, **settings)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert (np.random.get_state()[1] == states[1]).all()
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == sorted(path.name for path in (tmp_path / "b").iterdir()) and "result.json" in files
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_strict_from_the_command_line(real, tmp_path):
    for i, path in enumerate(sorted(real.rglob("*.png"))):
        (tmp_path / f"{i}.png").write_bytes(path.read_bytes() if i else b"")
    arguments = ["eval", "run", "digits", str(tmp_path), "--metrics", "frechet", "--quiet"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    done = CliRunner().invoke(app, [*arguments, "--strict"])
    assert done.exit_code == 1 and "0.png" in str(done.exception)
