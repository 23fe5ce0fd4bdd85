"""What an evaluation knows of a folder that ``genkit sample`` wrote: as much as of the pipeline itself."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.command import main
from genkit.eval.sampled import sampled_with
from genkit.eval.sides import Generation
from genkit.networks.gpt import GPT
from genkit.networks.mar import MAR
from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline

_spec = importlib.util.spec_from_file_location("sweeping", Path(__file__).with_name("sweeping.py"))
sweeping = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweeping)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return sweeping.save_model(tmp_path_factory.mktemp("sampled") / "tiny")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("guider", [None, "apg:guidance_scale=2,eta=0.5"])
def test_a_folder_is_recorded_like_its_pipeline(model, guider, tmp_path, capfd):
    call = f"sample {model} --labels 1,2,3 --per-label 2 --steps 2 --seed 3 --output {tmp_path / 's'} --quiet"
    out = CliRunner().invoke(cli.app, [*call.split(), *([] if guider is None else ["--guider", guider])])
    assert out.exit_code == 0, (out.output, out.exception)
    settings = {"metrics": ["contrast"], "n": 6, "device": "cpu", "quiet": True}
    capfd.readouterr()
    of_pipeline = main(
        "digits", f"pipeline:{model}", generation=Generation(steps=2, guider=guider), seed=3, **settings
    ).made_with
    assert capfd.readouterr() == ("", "")  # nor the bars of Diffusers
    of_folder = main("digits", str(tmp_path / "s"), **settings).made_with
    assert of_folder == of_pipeline and of_folder["steps"] == 2 and of_folder["model"] == "tiny"
    if guider is not None:
        assert (of_folder["guider"], of_folder["guidance_scale"], of_folder["eta"]) == ("apg", 2, 0.5)


def token_network(kind: str, folder: Path) -> Path:
    torch.manual_seed(0)
    small = dict(sample_size=8, hidden_size=16, num_layers=1, num_heads=2)
    if kind == "gpt":
        AutoregressivePipeline(GPT(**small)).save_pretrained(folder)
    else:
        network = MAR(**small, head_width=16, head_layers=1, buffer_size=2)
        MaskedAutoregressivePipeline(network).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind, steps, arguments",
    [
        ("gpt", None, "temperature=0.5"),
        ("mar", "two_stage:hi=4,lo=2", "num_ar_steps=4"),
        ("mar", "3", "num_ar_steps=2"),
    ],
)
def test_networks_of_tokens_are_recorded_too(kind, steps, arguments, tmp_path):
    """Steps that fall are named on the command line as guiders are."""
    model = token_network(kind, tmp_path / "model")
    call = f"sample {model} --labels 1,2,3 --per-label 2 --seed 3 --output {tmp_path / 's'} --set {arguments} --quiet"
    out = CliRunner().invoke(cli.app, [*call.split(), *([] if steps is None else ["--steps", steps])])
    assert out.exit_code == 0, (out.output, out.exception)
    options = ["--metrics", "contrast", "--seed", "3", "--device", "cpu", "--quiet", "--json"]
    found = []
    for images, more in (
        (f"pipeline:{model}", ["--n", "6", "--set", arguments, *([] if steps is None else ["--steps", steps])]),
        (str(tmp_path / "s"), ["--n", "6"]),
    ):
        file = tmp_path / "result.json"
        out = CliRunner().invoke(cli.app, ["eval", "run", "digits", images, *more, *options, str(file)])
        assert out.exit_code == 0, (out.output, out.exception)
        found.append(json.loads(file.read_text())["made_with"])
    assert found[0] == found[1] and found[0]["model"] == "model"
    assert found[0].get("steps") == (int(steps) if steps == "3" else steps)


def test_other_files_of_the_name_say_nothing(tmp_path):
    assert sampled_with(tmp_path) == sampled_with("digits") == {}
    for text in ("{", "[1]", json.dumps({"model": "x", "steps": 3})):
        (tmp_path / "settings.json").write_text(text)
        assert sampled_with(tmp_path) == {}
