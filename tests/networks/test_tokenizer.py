"""The tokenizer: size, shapes, round trips, baking, padding, what it takes from and gives to Diffusers."""

import json
import subprocess
import sys

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import load_file, save_file

from genkit.networks.tokenizer import ImageTokenizer
from genkit.quantizers import Quantizer
from genkit.quantizers.simvq import SimVQ

SMALL = dict(
    in_channels=1,
    out_channels=1,
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    latent_channels=8,
    norm_num_groups=4,
)
QUANTIZERS = [
    dict(kind="vq", codebook_size=32, dim=4, init="normal"),
    dict(kind="vq", codebook_size=32, dim=4, rule="ema", measure="cosine", init="normal"),
    dict(kind="fvq", codebook_size=32, dim=4, start="spread"),
    dict(kind="simvq", codebook_size=32, dim=4),
    dict(kind="ibq", codebook_size=32, dim=4),
    dict(kind="fsq", levels=[5, 4, 3], dim=3),
    dict(kind="lfq", dim=5),
    dict(kind="residual", dim=4, depth=2, quantizer=dict(kind="fvq", codebook_size=32, start="spread")),
    dict(kind="grouped", dim=4, groups=2, quantizer=dict(codebook_size=32, init="normal")),
]
every = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=[f"{q['kind']}-{i}" for i, q in enumerate(QUANTIZERS)])


def small(quantizer=QUANTIZERS[0], **changes) -> ImageTokenizer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ImageTokenizer(quantizer, **SMALL | changes).eval().requires_grad_(False)


def pictures(*shape):
    return torch.rand(*(shape or (2, 1, 8, 8)), generator=torch.Generator().manual_seed(1)) * 2 - 1


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_published_size():
    """LlamaGen's, with 16,384 codes of 8 channels; what has no table of codes can be made without memory."""
    quantizer, table = dict(kind="fsq", levels=[3] * 8, dim=8), 16384 * 8
    with torch.device("meta"):
        network = ImageTokenizer(quantizer)
        latents = network.latents(torch.empty(1, 3, 256, 256))
        assert latents.shape == (1, 8, 16, 16) and network.decode(latents).shape == (1, 3, 256, 256)
        eight = ImageTokenizer(quantizer, block_out_channels=(128, 256, 256, 512))
    assert (count(network) + table, network.stride) == (71_883_403, 16)
    assert (count(network.encoder), count(network.decoder)) == (29_298_176, 42_449_795)
    assert eight.stride == 8 and 69e6 < count(eight) + table < 71e6


@every
def test_tokens_decode_to_what_the_latents_do(quantizer):
    network, x = small(quantizer), pictures()
    made = network(x)
    assert made.sample.shape == x.shape and made.quantized.indices.shape[:3] == (2, 4, 4)
    assert len(made.quantized.indices.unique()) > 1
    assert torch.equal(network.decode(made.quantized.z_q), made.sample)
    assert torch.equal(network.decode_tokens(made.quantized.indices), made.sample)
    assert torch.equal(network.decode_tokens(made.quantized.indices.flatten(1, 2)), made.sample)


@every
def test_saved_baked_and_loaded(quantizer, tmp_path):
    network, x = small(quantizer), pictures()
    indices = network.encode(x).indices
    baked = network.bake()
    assert torch.equal(baked.encode(x).indices, indices) and not baked.training
    baked.save_pretrained(tmp_path / "baked")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "baked")
    assert torch.equal(loaded.encode(x).indices, indices)
    torch.testing.assert_close(loaded(x).sample, network(x).sample)
    network.save_pretrained(tmp_path / "whole")
    loaded = ImageTokenizer.from_pretrained(tmp_path / "whole")
    assert loaded.config.quantizer == network.config.quantizer and type(loaded.quantizer) is type(network.quantizer)
    state = network.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    half = ImageTokenizer.from_pretrained(tmp_path / "whole", torch_dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and all(p.dtype == torch.float32 for p in half.quantizer.parameters())
    assert half(x.bfloat16()).sample.dtype == torch.bfloat16


def test_baked_tokens_are_the_same_in_another_process(tmp_path):
    network, x = small(QUANTIZERS[2]), pictures()
    network.bake().save_pretrained(tmp_path / "baked")
    save_file({"x": x}, tmp_path / "x.safetensors")
    code = (
        "import sys, torch; from safetensors.torch import load_file, save_file\n"
        "from genkit.networks.tokenizer import ImageTokenizer\n"
        "folder = sys.argv[1]; network = ImageTokenizer.from_pretrained(folder + '/baked')\n"
        "assert type(network.quantizer).__name__ == 'VQ'\n"
        "x = load_file(folder + '/x.safetensors')['x']\n"
        "save_file({'indices': network.encode(x).indices}, folder + '/indices.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    assert torch.equal(load_file(tmp_path / "indices.safetensors")["indices"], network.encode(x).indices)


def test_weights_are_a_function_of_the_seed():
    one, two = small(QUANTIZERS[2]), small(QUANTIZERS[2])
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.config.quantizer["seed"] == two.config.quantizer["seed"]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        other = ImageTokenizer(QUANTIZERS[2], **SMALL)
        assert not torch.equal(other.quantizer.embedding, one.quantizer.embedding)
        nested = [ImageTokenizer(QUANTIZERS[-1], **SMALL).config.quantizer["quantizer"]["seed"] for _ in range(2)]
        assert nested[0] != nested[1]
    assert small(dict(QUANTIZERS[2], seed=7)).config.quantizer["seed"] == 7


@pytest.mark.parametrize(
    "quantizer",
    [
        dict(kind="simvq", dim=4, codebook_size=8, seed=0),
        dict(kind="residual", dim=4, depth=2, quantizer=dict(kind="simvq", codebook_size=8, seed=0)),
        dict(kind="grouped", dim=4, groups=2, quantizer=dict(kind="simvq", codebook_size=8, seed=3)),
    ],
)
def test_a_quantizer_that_bakes_to_itself_keeps_its_seed(quantizer, monkeypatch):
    """It may be all there is of its codes."""
    monkeypatch.setattr(SimVQ, "bake", Quantizer.bake)
    baked = small(quantizer).bake()
    assert baked.config.quantizer == quantizer


@pytest.mark.parametrize("mode", ["replicate", "reflect"])
def test_padded_and_cut_back(mode):
    network, x = small(pad_mode=mode), pictures(2, 1, 7, 9)
    made = network(x)
    assert made.sample.shape == x.shape and made.quantized.indices.shape == (2, 4, 5)
    padded = torch.nn.functional.pad(x, (0, 1, 0, 1), mode=mode)
    assert torch.equal(made.sample, network(padded).sample[..., :7, :9])
    assert torch.equal(network.decode_tokens(made.quantized.indices, size=(7, 9)), made.sample)


def test_gradient_checkpointing_changes_nothing():
    network, grads = small().requires_grad_(True).train(), []
    for checkpointed in (False, True):
        if checkpointed:
            network.enable_gradient_checkpointing()
        network.zero_grad()
        network(pictures()).sample.square().mean().backward()
        grads.append(network.encoder.conv_in.weight.grad.clone())
    torch.testing.assert_close(*grads)


def test_vq_model_and_back(tmp_path):
    network, x = small(QUANTIZERS[2]), pictures()
    made = network(x)
    network.to_vq_model().save_pretrained(tmp_path)
    stock = VQModel.from_pretrained(tmp_path)
    assert "quantize.embedding.weight" in load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    shape = (2, 4, 4, 4)
    with torch.no_grad():
        there = stock.decode(made.quantized.indices.flatten(), force_not_quantize=True, shape=shape).sample
        torch.testing.assert_close(there, made.sample, rtol=1e-5, atol=1e-5)
        assert torch.equal(stock.quantize(stock.encode(x).latents)[2][2].view(2, 4, 4), made.quantized.indices)
    back = ImageTokenizer.from_autoencoder(stock).eval()
    assert torch.equal(back.encode(x).indices, made.quantized.indices)
    torch.testing.assert_close(back(x).sample, made.sample)
    again = ImageTokenizer.from_autoencoder(stock, dict(kind="fsq", dim=4, levels=[3] * 4)).eval()
    assert torch.equal(again.latents(x), back.latents(x)) and again.quantizer.codebook_size == 81


@pytest.mark.parametrize("convolutions", [True, False])
def test_an_autoencoder_as_host(convolutions):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        use_quant_conv=convolutions,
        use_post_quant_conv=convolutions,
    )
    x = pictures(1, 3, 16, 16)
    network = ImageTokenizer.from_autoencoder(vae, dict(kind="vq", dim=4, codebook_size=16))
    with torch.no_grad():
        mean = vae.encode(x).latent_dist.mean
        torch.testing.assert_close(network.latents(x), mean)
        torch.testing.assert_close(network.decode(mean), vae.decode(mean).sample)
        wider = ImageTokenizer.from_autoencoder(vae, dict(kind="vq", dim=6, codebook_size=16))
        assert torch.equal(wider.encoder(x), vae.encoder(x)) and wider(x).sample.shape == x.shape
    with pytest.raises(ValueError, match="quantizer=None: an AutoencoderKL has no codes"):
        ImageTokenizer.from_autoencoder(vae)
    with pytest.raises(ValueError, match="double_z=True"):
        network.to_vq_model()


@pytest.mark.parametrize(
    "act, text",
    [
        (lambda n: n.encode(pictures(1, 3, 8, 8)), r"shape \(1, 3, 8, 8\), .*; accepted are floats \(B, 1, H, W\)"),
        (lambda n: n.encode(pictures(1, 1, 0, 8)), r"shape \(1, 1, 0, 8\), .*accepted are floats .* at least one"),
        (lambda n: n.encode((255 * pictures()).byte()), "torch.uint8; accepted are floats"),
        (lambda n: small(in_channels=0), "in_channels=0: must be at least 1"),
        (lambda n: small(sample_size=0), "sample_size=0: must be at least 1"),
        (lambda n: small(layers_per_block=0), "layers_per_block=0: must be at least 1"),
        (lambda n: small(latent_channels=-1), "latent_channels=-1: must be at least 1"),
        (lambda n: small(norm_num_groups=0), "norm_num_groups=0: must be at least 1"),
        (lambda n: small(block_out_channels=(0, 8)), "does not divide 0 of block_out_channels"),
        (lambda n: small(pad_mode=None).encode(pictures(1, 1, 7, 8)), "7 x 8 pixels: pad_mode=None accepts multiples"),
        (lambda n: small(pad_mode="reflect").encode(pictures(1, 1, 1, 8)), "too small for pad_mode='reflect'"),
        (lambda n: n.decode(torch.zeros(1, 4, 4, 4), (8, 9)), r"size=\(8, 9\) is of 4 x 5 tokens"),
        (lambda n: n.decode_tokens(torch.full((1, 4, 4), 32)), "indices are 32 to 32; accepted are 0 to 31"),
        (lambda n: n.decode_tokens(torch.full((1, 4, 4), -1)), "indices are -1"),
        (lambda n: n.decode_tokens(torch.zeros(1, 5, dtype=torch.int64)), "5 tokens are no square"),
        (lambda n: n.decode_tokens(torch.zeros(1, 4, 4)), "indices are torch.float32"),
        (lambda n: small(dict(kind="vq", dim=4, codebook_size=0)), "codebook_size"),
        (lambda n: small(dict(kind="vqq", dim=4)), "quantizer.kind='vqq' is not known; did you mean 'vq'"),
        (lambda n: small(dict(codebook_size=32, dim=4)), "kind is missing; accepted are .*fsq, .*vq"),
        (lambda n: small("vq"), "quantizer='vq': expected its settings, such as {'kind': 'fsq'"),
        (lambda n: small(None), "quantizer=None: expected its settings"),
        (lambda n: small(norm_num_groups=7), "norm_num_groups=7 does not divide 8 of block_out_channels="),
        (lambda n: small(block_out_channels=32), "block_out_channels=32: expected a list"),
        (lambda n: small(block_out_channels=()), r"block_out_channels=\(\): expected a list"),
        (lambda n: n.decode(torch.zeros(1, 5, 4, 4)), r"codes of shape \(1, 5, 4, 4\); accepted are \(B, 4, h, w\)"),
        (lambda n: n.quantizer(torch.zeros(0, 4, 2, 2)), "at least one vector"),
        (lambda n: small(dict(kind="lfq", dim=40, batch_entropy="bits")).quantizer.codebook(), "accepted up to 2.24"),
        (lambda n: small(pad_mode="constant"), "pad_mode='constant' is not known"),
        (lambda n: small(up_block_types=["UpDecoderBlock2D"]), "2 down_block_types, 1 up_block_types: one for each"),
        (lambda n: small(QUANTIZERS[5]).to_vq_model(), "VQModel knows one table of codes"),
        (lambda n: small(QUANTIZERS[1]).to_vq_model(), "measure='euclidean'"),
        (lambda n: ImageTokenizer.from_autoencoder(n), "vae=ImageTokenizer: accepted are AutoencoderKL and VQModel"),
    ],
)
def test_bad_input(act, text):
    with pytest.raises(ValueError, match=text):
        act(small())


def test_codes_of_another_codebook_are_not_loaded(tmp_path):
    small().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantizer"]["codebook_size"] = 64
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantizer.embedding"):
        ImageTokenizer.from_pretrained(tmp_path)
