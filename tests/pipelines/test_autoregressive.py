"""The pipeline of an autoregressive network."""

import copy

import pytest
import torch
from diffusers import DiffusionPipeline
from torch import nn

from genkit.autoregressive import Autoregressive
from genkit.networks.gpt import GPT
from genkit.networks.tokenizer import ImageTokenizer
from genkit.pipelines.autoregressive import AutoregressivePipeline, fingerprints


@pytest.fixture
def pipe():
    network = GPT(vocab_size=5, sample_size=4, num_classes=3, hidden_size=16, num_layers=1, num_heads=2)
    nn.init.normal_(network.out.weight, std=0.5)
    return AutoregressivePipeline(network.eval())


def tokenizer(**quantizer) -> ImageTokenizer:
    quantizer = quantizer or {"kind": "vq", "codebook_size": 7, "dim": 4, "init": "normal"}
    return ImageTokenizer(
        quantizer, in_channels=3, out_channels=3, sample_size=8, block_out_channels=(8, 8), layers_per_block=1,
        latent_channels=8, norm_num_groups=4,
    ).eval()  # fmt: skip


@pytest.fixture
def of_tokens():
    torch.manual_seed(0)
    network = GPT(vocab_size=7, sample_size=4, num_classes=3, hidden_size=16, num_layers=1, num_heads=2)
    nn.init.normal_(network.out.weight, std=0.5)
    return AutoregressivePipeline(network.eval(), tokenizer())


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_pictures(pipe):
    out = pipe([0, 2], generator=seeds(1, 2), output_type="pt")
    assert out.images.shape == (2, 1, 4, 4) and out.network_calls == 16
    assert set((out.images * 4).unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    alone = pipe(2, generator=seeds(2), output_type="pt").images
    assert torch.equal(alone[0], out.images[1])
    assert pipe(0, num_images_per_label=3).images[2].size == (4, 4)
    guided = pipe([0, 2], guidance_scale=3.0, generator=seeds(1, 2), output_type="latent", return_dict=False)
    assert guided[1] == 32 and guided[0].min() >= -1


def test_saved_and_loaded(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = AutoregressivePipeline.from_pretrained(tmp_path)
    images = [p([1], generator=seeds(7), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images) and isinstance(loaded, DiffusionPipeline)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(class_labels=[3]), "accepted are 0 to 2"),
        (dict(class_labels=[]), "at least one"),
        (dict(class_labels=0, num_images_per_label=0), "num_images_per_label=0"),
        (dict(class_labels=[0, 1], generator=seeds(1)), "generator has 1 entries for 2 images"),
        (dict(class_labels=0, output_type="png"), "output_type='png'"),
    ],
)
def test_bad_input(arguments, text, pipe):
    with pytest.raises(ValueError, match=text):
        pipe(**arguments)


def test_tokens_of_a_tokenizer(of_tokens, tmp_path):
    """A picture is what the tokenizer makes of the tokens drawn, also after a save and a load."""
    out = of_tokens([0, 2], generator=seeds(1, 2), output_type="pt")
    assert out.images.shape == (2, 3, 8, 8) and out.network_calls == 16
    model = Autoregressive.of_pipeline(of_tokens)
    uniform = torch.stack([torch.rand(16, generator=g, dtype=torch.float64) for g in seeds(1, 2)])
    tokens = model.sample(uniform, model.encode(None, class_labels=[0, 2]))
    decoded = of_tokens.vqvae.decode_tokens(tokens.view(-1, 4, 4)).clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(out.images, decoded, rtol=0, atol=1e-6)
    assert torch.equal(
        model.tokens(model.pictures(tokens)), of_tokens.vqvae.encode(model.pictures(tokens)).indices.flatten(1)
    )
    of_tokens.save_pretrained(tmp_path)
    loaded = AutoregressivePipeline.from_pretrained(tmp_path)
    assert torch.equal(loaded([0, 2], generator=seeds(1, 2), output_type="pt").images, out.images)


def test_settings_of_the_draw(of_tokens):
    greedy = [of_tokens([1], temperature=0, generator=seeds(g), output_type="pt").images for g in (1, 2)]
    assert torch.equal(*greedy)
    assert torch.equal(of_tokens([1], top_k=1, generator=seeds(3), output_type="pt").images, greedy[0])
    assert of_tokens([1], guidance_scale=2.0, guidance_end=4, generator=seeds(3)).network_calls == 20
    with pytest.raises(ValueError, match="top_p=2: expected a share"):
        of_tokens([1], top_p=2)


def test_a_tokenizer_that_does_not_fit(of_tokens):
    with pytest.raises(ValueError, match="the tokenizer has 9 codes; the network takes one of vocab_size=7 a cell"):
        AutoregressivePipeline(of_tokens.transformer, tokenizer(kind="vq", codebook_size=9, dim=4))
    several = tokenizer(kind="grouped", groups=2, dim=4, quantizer={"kind": "vq", "codebook_size": 7})
    with pytest.raises(ValueError, match=r"the tokenizer has 7 codes, \(2,\) a cell"):
        AutoregressivePipeline(of_tokens.transformer, several)


def test_a_tokenizer_of_other_tokens(of_tokens, tmp_path):
    """Other codes, or other weights around the same ones; also where it takes the place of the one that was there."""
    known = of_tokens.config.tokenizer_fingerprints
    other = tokenizer(kind="vq", codebook_size=7, dim=4, init="normal", seed=5)
    text = "was trained on tokens of .* which mean other pictures"
    with pytest.raises(ValueError, match=text):
        AutoregressivePipeline(of_tokens.transformer, other, known)
    with pytest.raises(ValueError, match="vqvae has the fingerprint None"):
        AutoregressivePipeline(of_tokens.transformer, None, known)
    one, two = (tokenizer(kind="lfq", dim=3) for _ in range(2))
    network = GPT(vocab_size=8, sample_size=4, num_classes=3, hidden_size=16, num_layers=1, num_heads=2)
    pipe = AutoregressivePipeline(network.eval(), one)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=text):
        AutoregressivePipeline.from_pretrained(tmp_path, vqvae=two)
    pipe.vqvae = copy.deepcopy(one)
    assert pipe([1], generator=seeds(1), output_type="pt").images.shape == (1, 3, 8, 8)
    for wrong in (two, None):
        pipe.vqvae = wrong
        with pytest.raises(ValueError, match=text):
            pipe([1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_tokenizer_is_known_in_every_type(dtype, of_tokens, tmp_path):
    of_tokens.save_pretrained(tmp_path / "whole")
    half = AutoregressivePipeline.from_pretrained(tmp_path / "whole", torch_dtype=dtype)
    assert half.vqvae.dtype == dtype and half.vqvae.decoder.conv_out.weight.dtype == dtype
    half.save_pretrained(tmp_path / "half")
    for loaded in (torch.float32, dtype):
        AutoregressivePipeline.from_pretrained(tmp_path / "half", torch_dtype=loaded)
    with pytest.raises(ValueError, match="was trained on tokens of"):
        AutoregressivePipeline.from_pretrained(tmp_path / "half", torch_dtype=dtype, vqvae=tokenizer().to(dtype))


def test_a_baked_tokenizer_is_the_same():
    whole = tokenizer(kind="fvq", codebook_size=8, dim=4, start="spread")
    assert fingerprints(whole.bake()) == fingerprints(whole)
