"""Words and classes that were learned, in genkit's pipelines and on the command line."""

import diffusers
import numpy
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from genkit import textual_inversion
from genkit.cli import app
from genkit.denoisers import from_pipeline
from genkit.networks.dit import DiT
from genkit.pipelines import ClassConditionalPipeline, TextToImagePipeline
from genkit.testing import tiny


def digits():
    torch.manual_seed(0)
    net = DiT(hidden_size=16, num_layers=2, num_heads=2, patch_size=4)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return ClassConditionalPipeline(net.eval(), diffusers.FlowMatchEulerDiscreteScheduler())


def learned(pipe, folder, **names):
    """As training leaves it."""
    embedding = textual_inversion.insert(pipe, from_pipeline(pipe), **names)
    with torch.no_grad():
        for value in embedding.values:
            value += 1
    embedding.save_pretrained(folder)


def test_a_class_is_drawn_anew_by_the_command(tmp_path):
    digits().save_pretrained(tmp_path / "pipeline")
    learned(digits(), tmp_path / "word", token="3")
    drawn = {}
    for name, more in (("plain", []), ("learned", ["--adapter", str(tmp_path / "word")])):
        arguments = [str(tmp_path / "pipeline"), "--output", str(tmp_path / name), "--labels", "2,3", "--steps", "2"]
        done = CliRunner().invoke(app, ["sample", *arguments, *more, "--quiet"])
        assert done.exit_code == 0, done.output
        files = sorted(file for file in (tmp_path / name).rglob("*.png") if file.stem.isdecimal())
        drawn[name] = [numpy.asarray(Image.open(file)) for file in files]
    assert len(drawn["plain"]) == len(drawn["learned"]) == 2
    same = [bool((a == b).all()) for a, b in zip(drawn["plain"], drawn["learned"], strict=True)]
    assert same == [True, False]
    done = CliRunner().invoke(app, ["sample", *arguments[:-2], "--adapter", f"{tmp_path / 'word'}=0.5"])
    assert done.exit_code and "which has no strength; leave it out" in f"{done.output}{done.exception}"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3"])
def test_a_word_is_that_of_diffusers(name, tiny_pipeline, tmp_path):
    learned(tiny_pipeline(name), tmp_path, token="<it>", initializer="a")
    classic, own = tiny_pipeline(name), TextToImagePipeline.from_pipe(tiny_pipeline(name))
    textual_inversion.load(classic, tmp_path)
    own.load_adapter(tmp_path)
    own.set_progress_bar_config(disable=True)
    arguments = tiny.call_arguments(name) | dict(prompt="b <it>", output_type="pt")
    images = []
    for pipe in (classic, own):
        images.append(torch.as_tensor(pipe(**arguments | dict(generator=torch.Generator().manual_seed(0))).images))
    assert images[0].shape == images[1].shape
    prompts = [from_pipeline(pipe).encode(pipe, prompt="b <it>") for pipe in (classic, tiny_pipeline(name))]
    assert not torch.equal(*(p["prompt_embeds"] for p in prompts))
    embeds = own.encode("b <it>")["prompt_embeds"]
    torch.testing.assert_close(embeds, prompts[0]["prompt_embeds"], rtol=0, atol=1e-6)
