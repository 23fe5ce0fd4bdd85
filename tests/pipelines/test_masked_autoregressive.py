"""The pipeline of a masked autoregressive network."""

import re

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline
from PIL import Image
from torch import nn

from genkit.masked_autoregressive import MARSampling, MaskedAutoregressive
from genkit.networks.mar import MAR
from genkit.pipelines.masked_autoregressive import MaskedAutoregressivePipeline
from genkit.rng import ItemRNG
from genkit.step_annealing import StepAnnealer

SMALL = dict(num_classes=3, hidden_size=16, num_layers=1, num_heads=2, head_width=16, head_layers=1, buffer_size=2)


def network(**changes) -> MAR:
    torch.manual_seed(0)
    net = MAR(**SMALL | dict(sample_size=4) | changes)
    for weight in (net.head.out.weight, net.head.modulation.weight):
        nn.init.normal_(weight, std=0.05)
    return net.eval()


@pytest.fixture
def pipe():
    return MaskedAutoregressivePipeline(network())


@pytest.fixture
def latent():
    """Pictures of 16 x 16 from latents of 8 x 8."""
    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        latent_channels=2,
        norm_num_groups=2,
        sample_size=16,
        scaling_factor=0.2325,
    )
    return MaskedAutoregressivePipeline(network(sample_size=8, in_channels=2), vae.eval())


def seeds(*numbers):
    return [torch.Generator().manual_seed(n) for n in numbers]


def test_pictures(pipe):
    state = torch.get_rng_state()
    out = pipe([0, 2], 3, generator=seeds(1, 2), output_type="pt")
    assert out.images.shape == (2, 1, 4, 4) and 0 <= out.images.min() and out.images.max() <= 1
    assert (out.network_calls, out.head_calls, out.head_evaluations) == (4, 12, 12)
    alone = pipe(2, 3, generator=seeds(2), output_type="pt").images
    torch.testing.assert_close(alone[0], out.images[1])
    assert torch.equal(torch.get_rng_state(), state)
    images = pipe(0, 1, num_images_per_label=3, generator=seeds(1)[0]).images
    assert len(images) == 3 and isinstance(images[0], Image.Image) and images[0].size == (4, 4)
    array = pipe(0, 3, generator=seeds(1), output_type="np").images
    torch.testing.assert_close(torch.from_numpy(array).permute(0, 3, 1, 2), out.images[:1])
    assert pipe([0, 2], 3, generator=seeds(1, 2), output_type="latent", return_dict=False)[1:] == (4, 12, 12)


def test_settings_reach_the_sampler(pipe):
    settings = dict(num_ar_steps=3, guidance_scale=2.0, guidance_schedule="constant", temperature=0.9, max_timestep=950)
    out = pipe([0, 2], StepAnnealer(6, 2), generator=seeds(1, 2), output_type="latent", **settings)
    assert (out.network_calls, out.head_calls) == (6, 6 + 4 + 2)
    model = MaskedAutoregressive(pipe.transformer)
    items = [int(torch.randint(2**62, (1,), generator=g)) for g in seeds(1, 2)]
    condition = model.encode(None, class_labels=[0, 2])
    expected = model.sample(ItemRNG(0, items), condition, MARSampling(StepAnnealer(6, 2), **settings))
    assert torch.equal(out.images, expected)
    for name, value in dict(num_ar_steps=4, guidance_scale=3.0, temperature=0.5, max_timestep=900).items():
        changed = settings | {name: value}
        other = pipe([0, 2], StepAnnealer(6, 2), generator=seeds(1, 2), output_type="latent", **changed)
        assert not torch.equal(other.images, expected), name


def test_one_generator_or_none(pipe):
    a, b = (pipe([0, 1], 2, generator=seeds(5)[0], output_type="pt").images for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(3)
    a, b = (pipe([0, 1], 2, output_type="pt").images for _ in range(2))
    assert not torch.equal(a, b)


def test_latents_are_decoded(latent):
    out = latent([0, 1], 2, generator=seeds(1, 2), output_type="pt")
    assert out.images.shape == (2, 1 if latent.vae.config.out_channels == 1 else 3, 16, 16)
    z = latent([0, 1], 2, generator=seeds(1, 2), output_type="latent").images
    assert z.shape == (2, 2, 8, 8)
    expected = latent.vae.decode(z / 0.2325).sample / 2 + 0.5
    torch.testing.assert_close(out.images, expected.detach().clamp(0, 1))


@pytest.mark.parametrize("name", ["pipe", "latent"])
def test_saved_and_loaded(name, tmp_path, request):
    pipe = request.getfixturevalue(name)
    pipe.save_pretrained(tmp_path)
    loaded = MaskedAutoregressivePipeline.from_pretrained(tmp_path)
    images = [p([1], 2, generator=seeds(7), output_type="pt").images for p in (pipe, loaded)]
    assert torch.equal(*images) and isinstance(loaded, DiffusionPipeline)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (dict(class_labels=[3]), "accepted are 0 to 2"),
        (dict(class_labels=[]), "at least one"),
        (dict(class_labels=0, num_images_per_label=0), "num_images_per_label=0"),
        (dict(class_labels=[0, 1], generator=seeds(1)), "generator has 1 entries for 2 images"),
        (dict(class_labels=0, output_type="png"), "output_type='png'"),
        (dict(class_labels=0, num_ar_steps=5), "num_ar_steps=5: accepted are 1 to 4, the number of tokens"),
        (dict(class_labels=0, num_inference_steps=0), "num_inference_steps=0"),
        (dict(class_labels=0, guidance_scale=-1), "guidance_scale=-1"),
    ],
)
def test_bad_input(arguments, text, pipe):
    with pytest.raises(ValueError, match=re.escape(text)):
        pipe(**arguments)
