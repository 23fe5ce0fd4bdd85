"""Codes that a tokenizer uses over a set, and the plot of them."""

import math

import pytest
import torch
from typer.testing import CliRunner

from genkit import cli
from genkit.eval.inputs import read_images
from genkit.eval.reconstructed import reconstructed_images
from genkit.eval.run import evaluate
from genkit.eval.saved import load_evaluation
from genkit.networks.tokenizer import ImageTokenizer


@pytest.fixture(scope="module")
def tokenizer():
    torch.manual_seed(0)
    quantizer = {"kind": "vq", "codebook_size": 64, "dim": 4, "init": "normal", "measure": "cosine"}
    return ImageTokenizer(
        quantizer, in_channels=1, out_channels=1, sample_size=8, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=8, norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def originals():
    images = read_images("digits")
    return images.subset(torch.arange(0, images.n, 12))


def test_usage_is_that_of_all_tokens_at_once(tokenizer, originals, tmp_path):
    made = reconstructed_images(tokenizer, originals)
    found = evaluate(originals, made, metrics=["code_usage", "psnr"], output=tmp_path / "one", quiet=True).values
    x = originals.load(torch.arange(originals.n)).float() / 127.5 - 1
    with torch.no_grad():
        counts = torch.bincount(tokenizer.encode(x).indices.flatten(), minlength=64)
    p = counts[counts > 0].double() / counts.sum()
    assert counts.sum() == originals.n * 16
    assert found["code_usage"] == (counts > 0).double().mean()
    assert found["code_perplexity"] == pytest.approx(math.exp(-(p * p.log()).sum()), rel=1e-12)
    assert found["code_usage_expected"] == pytest.approx(1 - (1 - 1 / 64) ** (originals.n * 16), rel=1e-12)
    assert torch.equal(load_evaluation(tmp_path / "one").code_counts, counts)

    page = tmp_path / "page.html"
    out = CliRunner().invoke(cli.app, ["eval", "report", str(tmp_path / "one"), "--html", str(page), "--quiet"])
    assert out.exit_code == 0, out.output
    text = page.read_text()
    assert "<h2>Codes</h2>" in text and "occurrences of a code over the mean" in text


def test_what_has_no_codes_is_refused(originals):
    made = reconstructed_images(lambda x: x, originals, name="identity")
    with pytest.raises(ValueError, match="identity is no tokenizer whose codes could be counted"):
        evaluate(originals, made, metrics=["code_usage"], quiet=True)
