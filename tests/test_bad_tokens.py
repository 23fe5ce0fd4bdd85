"""Bad input about tokens from the command line: one message that says what is wrong, and nothing is written."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from genkit import cli
from genkit.networks.gpt import GPT
from genkit.networks.mar import MAR
from genkit.networks.tokenizer import ImageTokenizer
from genkit.pipelines.autoregressive import AutoregressivePipeline
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.pipelines.tokenizer import TokenizerPipeline

DIGITS = Path(__file__).parents[1] / "configs" / "digits"


def tokenizer(seed=0, codebook_size=16, **changes) -> ImageTokenizer:
    torch.manual_seed(seed)
    settings = dict(
        in_channels=1, out_channels=1, sample_size=8, block_out_channels=(8, 8), layers_per_block=1, latent_channels=8,
        norm_num_groups=4,
    )  # fmt: skip
    quantizer = dict(kind="vq", codebook_size=codebook_size, dim=4, init="normal")
    return ImageTokenizer(quantizer, **settings | changes).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tokenizer, another of as many codes, one of more, one that does not pad; a GPT on the first; a MAR."""
    root = tmp_path_factory.mktemp("models")
    made = dict(one=tokenizer(), other=tokenizer(1), more=tokenizer(codebook_size=32), strict=tokenizer(pad_mode=None))
    for name, network in made.items():
        TokenizerPipeline(network).save_pretrained(root / name)
    gpt = GPT(vocab_size=16, sample_size=4, num_classes=10, hidden_size=16, num_layers=1, num_heads=2)
    AutoregressivePipeline(gpt, made["one"]).save_pretrained(root / "gpt")
    for name in ("other", "more"):
        shutil.copytree(root / "gpt", root / f"gpt_{name}")
        shutil.rmtree(root / f"gpt_{name}" / "vqvae")
        shutil.copytree(root / name / "vqvae", root / f"gpt_{name}" / "vqvae")
    small = dict(hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, buffer_size=2)
    MaskedAutoregressivePipeline(MAR(**small)).save_pretrained(root / "mar")
    return root


def refused(arguments, monkeypatch, capsys) -> str:
    """What the command writes to stderr when it fails, without a trace."""
    monkeypatch.setattr(sys, "argv", ["genkit", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code in (1, 2)
    told = capsys.readouterr().err
    assert "Traceback" not in told
    return " ".join(told.split())


GROUPED = "{kind: grouped, dim: 16, groups: 3, quantizer: {kind: vq, codebook_size: 16}}"


@pytest.mark.parametrize(
    "recipe, overrides, text",
    [
        (
            "tokenizer_fvq",
            ["model.quantizer.codebook_size=0"],
            "codebook_size=0: Input should be greater than or equal",
        ),
        ("tokenizer_fvq", ["model.quantizer.group_size=7"], "group_size=7 does not divide codebook_size=256"),
        ("tokenizer_fvq", [f"model.quantizer={GROUPED}"], "groups=3 does not divide dim=16"),
        ("tokenizer_fvq", ["model.in_channels=3"], "model.in_channels=3, model.out_channels=1: must agree"),
        (
            "tokenizer_fvq",
            ["model.in_channels=3", "model.out_channels=3"],
            "data gives samples of shape (1, 8, 8), the model takes (3, 8, 8)",
        ),
        ("tokenizer_fvq", ["model.quantizer={kind: fsq, levels: [8, 6, 5], dim: 4}"], "are of 3 channels, dim=4"),
        (
            "autoregressive_tokens",
            ["model.components.vqvae={folders}/one", "model.vocab_size=17"],
            "the tokenizer has 16 codes; the network takes one of vocab_size=17 a cell",
        ),
        (
            "autoregressive_tokens",
            ["model.components.vqvae={folders}/one", "model.vocab_size=16", "model.sample_size=5"],
            "data gives samples of shape (1, 8, 8), the model takes (1, 10, 10)",
        ),
        ("mar", ["sampling.num_inference_steps=1001"], "sampling.num_inference_steps=1001: accepted are 1 to 1000"),
    ],
)
def test_training(recipe, overrides, text, folders, tmp_path, monkeypatch, capsys):
    overrides = [override.replace("{folders}", str(folders)) for override in overrides]
    arguments = ["train", DIGITS / f"{recipe}.yaml", f"output_dir={tmp_path / 'run'}", *overrides]
    assert text in refused(arguments, monkeypatch, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "model, options, text",
    [
        ("gpt_other", [], "which mean other pictures; accepted is the tokenizer with those codes and weights"),
        ("gpt_more", [], "the tokenizer has 32 codes; the network takes one of vocab_size=16 a cell"),
        ("mar", ["--set", "num_ar_steps=17"], "num_ar_steps=17: accepted are 1 to 16, the number of tokens"),
        ("mar", ["--set", "num_ar_steps=0"], "num_ar_steps=0: accepted are 1 to 16"),
        ("mar", ["--steps", "falling"], "Accepted: a whole number, constant, cosine, linear, two_stage"),
        ("one", [], "which makes images of images"),
    ],
)
@pytest.mark.parametrize("command", ["sample", "eval"])
def test_drawing(command, model, options, text, folders, tmp_path, monkeypatch, capsys):
    if command == "sample":
        arguments = ["sample", folders / model, "--output", tmp_path / "out", *options]
    else:
        arguments = ["eval", "run", "digits", f"pipeline:{folders / model}", "--output", tmp_path / "out", *options]
    assert text in refused(arguments, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


def test_pictures_that_tokens_do_not_divide(folders, tmp_path, monkeypatch, capsys):
    """Padded, and cut back to what they were, or an error where the tokenizer was told so."""
    torch.manual_seed(0)
    pictures = torch.randint(0, 256, (8, 1, 7, 5), dtype=torch.uint8)
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, picture in enumerate(pictures):
        Image.fromarray(picture[0].numpy()).save(folder / f"{i}.png")
    options = ["--metrics", "psnr", "--output", tmp_path / "out"]
    told = refused(["eval", "run", folder, f"reconstructed:{folders / 'strict'}", *options], monkeypatch, capsys)
    assert "ImageTokenizer takes multiples of 2 pixels, pictures is 5x7" in told and not (tmp_path / "out").exists()
    pipe = TokenizerPipeline.from_pretrained(folders / "one")
    made = pipe(pictures / 255, output_type="pt")
    assert made.images.shape == (8, 1, 7, 5) and made.tokens.shape == (8, 4, 3)
    with pytest.raises(ValueError, match="7 x 5 pixels: pad_mode=None accepts multiples of 2"):
        TokenizerPipeline.from_pretrained(folders / "strict")(pictures / 255)
    with pytest.raises(ValueError, match="indices are 16 to 16; accepted are 0 to 15"):
        pipe.decode(torch.full((1, 4, 3), 16))
