"""The pipeline of a tokenizer: pictures of every kind, their tokens, and back."""

import numpy
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from genkit.networks.tokenizer import ImageTokenizer
from genkit.pipelines.tokenizer import TokenizerPipeline


def pipeline(channels=3, **changes):
    torch.manual_seed(0)
    sizes = dict(in_channels=channels, out_channels=channels, sample_size=8, block_out_channels=(8, 16))
    rest = dict(layers_per_block=1, latent_channels=8, norm_num_groups=4) | changes
    network = ImageTokenizer(dict(kind="vq", codebook_size=32, dim=4, init="normal"), **sizes, **rest)
    return TokenizerPipeline(network.eval())


def photographs(*sizes, mode="RGB"):
    rng = numpy.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=numpy.uint8)).convert(mode) for h, w in sizes]


@pytest.mark.parametrize("channels, mode", [(3, "RGB"), (1, "L")])
def test_pictures_to_tokens_and_back(channels, mode):
    pipe, images = pipeline(channels), photographs((9, 12), (9, 12))
    out = pipe(images)
    assert out.tokens.shape == (2, 5, 6) and out.tokens.dtype == torch.int64
    assert [(i.size, i.mode) for i in out.images] == [((12, 9), mode)] * 2
    assert torch.equal(pipe.encode(images), out.tokens)
    again = pipe.decode(out.tokens, (9, 12))
    assert [i.tobytes() for i in again] == [i.tobytes() for i in out.images]
    alone = pipe(images[1], return_dict=False)
    assert torch.equal(alone[1][0], out.tokens[1])


def test_kinds_of_pictures():
    pipe, (image,) = pipeline(), photographs((8, 8))
    array = numpy.asarray(image, dtype=numpy.float32) / 255
    pixels = torch.from_numpy(array).permute(2, 0, 1)[None]
    tokens = [pipe.encode(given) for given in (image, array[None], pixels)]
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])
    shapes = {kind: pipe(image, output_type=kind).images.shape for kind in ("np", "pt")}
    assert shapes == {"np": (1, 8, 8, 3), "pt": (1, 3, 8, 8)}
    made = pipe.decode(tokens[0].flatten(1), output_type="pt")
    assert 0 <= made.min() and made.max() <= 1


def test_saved_and_loaded(tmp_path):
    pipe, images = pipeline(), photographs((8, 8))
    pipe.save_pretrained(tmp_path)
    loaded = TokenizerPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded, DiffusionPipeline) and torch.equal(loaded.encode(images), pipe.encode(images))
    half = TokenizerPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert half(images, output_type="pt").images.dtype == torch.float32


@pytest.mark.parametrize(
    "act, text",
    [
        (lambda p: p(photographs((8, 8)), output_type="png"), "output_type='png' is not known"),
        (lambda p: p(photographs((8, 8), (8, 10))), r"images of sizes \(10, 8\), \(8, 8\)"),
        (lambda p: p.decode(torch.full((1, 4, 4), 99)), "accepted are 0 to 31"),
        (lambda p: p.decode(torch.zeros(1, 4, 4, dtype=torch.int64), (9, 9)), r"size=\(9, 9\)"),
        (lambda p: p(torch.zeros(1, 1, 8, 8)), r"accepted are floats \(B, 3, H, W\)"),
        (lambda p: pipeline(pad_mode=None)(photographs((7, 8))), "pad_mode=None accepts multiples of 2"),
    ],
)
def test_bad_input(act, text):
    with pytest.raises(ValueError, match=text):
        act(pipeline())
