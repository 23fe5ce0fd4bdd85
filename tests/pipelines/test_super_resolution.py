"""Enlarging pictures: one call of any network, tiles, saving without encoders."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image
from torch.nn import functional as F

from genkit.denoisers import Condition, FunctionDenoiser
from genkit.interpolants import DiscreteVP, Linear, Trigonometric, VariancePreserving
from genkit.networks.dit import DiT
from genkit.networks.fixed_condition import FixedCondition
from genkit.pipelines.class_conditional import ClassConditionalPipeline
from genkit.pipelines.super_resolution import SuperResolutionPipeline, restore, tiled, upsampled

F64 = torch.float64


@pytest.fixture
def small(tiny_pipeline):
    """``small(name)``: a pipeline that enlarges four times by a tiny network."""

    def make(name="sd15", **settings):
        pipe = SuperResolutionPipeline.from_pipe(tiny_pipeline(name), **settings)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return make


def pixels(**settings):
    """A pipeline of pixels around an untrained network for pictures of one channel, 8 x 8."""
    torch.manual_seed(0)
    network = DiT(hidden_size=16, num_layers=1, num_heads=2, **settings)
    torch.nn.init.normal_(network.out.weight, std=0.3)
    torch.nn.init.normal_(network.modulation.weight, std=0.3)
    pipe = ClassConditionalPipeline(transformer=network, scheduler=FlowMatchEulerDiscreteScheduler())
    return SuperResolutionPipeline.from_pipe(pipe)


# -- the one evaluation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("path", [Linear(), Trigonometric(), VariancePreserving(), "ddpm"])
def test_the_true_noise_gives_back_the_clean_latents(path, prediction_type):
    """Whatever the network predicts: taken as noisy at ``time``, ``F(z_H, time)`` is restored to ``z_H``."""
    if path == "ddpm":
        path = DiscreteVP(
            DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
        )
    clean, eps = torch.randn(3, 4, 5, 5, dtype=F64), torch.randn(3, 4, 5, 5, dtype=F64)
    time = 0.25
    t = torch.full((3,), time, dtype=F64)
    truth = path.target(prediction_type, clean, eps, t)
    denoiser = FunctionDenoiser(lambda z, t: truth, path, prediction_type)
    found = restore(denoiser, path.interpolate(clean, eps, t), time, FixedCondition.of(Condition()))
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-6)


def test_is_the_published_formula(small):
    """``(z_L - sqrt(1 - abar) eps(z_L)) / sqrt(abar)`` between encoder and decoder, by Diffusers' own parts."""
    pipe, low = small(time=0.25), torch.rand(2, 3, 8, 8)
    got = pipe(low, output_type="pt")
    assert got.network_calls == 1 and got.images.shape == (2, 3, 32, 32)
    scale = pipe.vae.config.scaling_factor
    with torch.no_grad():
        large = F.interpolate(2 * low - 1, scale_factor=4, mode="bicubic", align_corners=False).clamp(-1, 1)
        z = pipe.vae.encode(large).latent_dist.mode() * scale
        embeds = pipe.condition.row["prompt_embeds"].expand(2, -1, -1)
        eps = pipe.unet(z, 249, encoder_hidden_states=embeds).sample  # time 0.25 of 1000 timesteps
        abar = pipe.scheduler.alphas_cumprod[249]
        clean = (z - (1 - abar).sqrt() * eps) / abar.sqrt()
        expected = (pipe.vae.decode(clean / scale).sample / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(got.images, expected, rtol=0, atol=2e-5)


def test_the_condition_is_that_of_the_empty_prompt(tiny_pipeline):
    for name, keys in {"sd15": ["prompt_embeds"], "sdxl": ["prompt_embeds", "text_embeds", "time_ids"]}.items():
        pipe = tiny_pipeline(name)
        row = SuperResolutionPipeline.from_pipe(pipe).condition.row
        assert sorted(row) == keys
        embeds = pipe.encode_prompt("", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)[0]
        assert torch.equal(row["prompt_embeds"], embeds)
    assert pixels().condition.row["class_labels"].tolist() == [10]  # no class
    assert not pixels(num_classes=0).condition.row


# -- what goes in and comes out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "dit"])
def test_any_network_saved_without_its_encoders(name, small, tmp_path):
    pipe, low = small(name, scale=2, time=0.4), torch.rand(1, 3, 12, 10)
    before = pipe(low, output_type="np")
    assert before.images.shape == (1, 24, 20, 3)
    pipe.save_pretrained(tmp_path)
    assert not any("text" in p.name or "token" in p.name for p in tmp_path.iterdir())
    again = SuperResolutionPipeline.from_pretrained(tmp_path)
    assert (again.config.scale, again.config.time) == (2, 0.4)
    again.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(again(low, output_type="np").images, before.images, rtol=0, atol=1e-5)
    half = SuperResolutionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert np.abs(half(low, output_type="np").images - before.images).mean() < 0.05


def test_pictures_of_every_kind_are_the_same(small):
    pipe = small()
    arrays = (np.random.rand(2, 8, 6, 3) * 255).round().astype(np.uint8)
    images = [Image.fromarray(a) for a in arrays]
    tensor = torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255
    expected = pipe(tensor, output_type="pt").images
    assert expected.shape == (2, 3, 32, 24)
    for given in (images, [*tensor], arrays / 255.0, [image.convert("RGBA") for image in images]):
        torch.testing.assert_close(pipe(given, output_type="pt").images, expected, rtol=0, atol=1e-5)
    alone = pipe(images[0])
    assert alone.images[0].size == (24, 32) and alone.images[0].mode == "RGB"
    difference = np.asarray(alone.images[0]) / 255.0 - expected[0].permute(1, 2, 0).numpy()
    assert np.abs(difference).max() < 0.51 / 255
    assert pipe(images[0], return_dict=False)[1] == 1


def test_grey_pictures_of_a_network_of_pixels():
    pipe = pixels()
    grey = Image.fromarray((np.random.rand(2, 2) * 255).astype(np.uint8))
    images = pipe([grey, grey.convert("RGB")]).images
    assert images[0].mode == "L" and images[0].size == (8, 8)
    assert np.array_equal(*map(np.asarray, images))


# -- tiles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tile", "overlap"), [(16, 8), (24, 8), (16, 12), (64, 8), (None, 0)])
def test_tiles_of_a_local_function_are_the_whole(tile, overlap):
    """It sees two pixels far, which is a quarter of the least overlap."""
    kernel = torch.randn(2, 2, 5, 5, dtype=F64)
    x = torch.randn(3, 2, 36, 52, dtype=F64)

    def local(piece):
        assert tile is None or max(piece.shape[-2:]) <= max(tile, 0)
        return F.conv2d(piece, kernel, padding=2)

    torch.testing.assert_close(tiled(local, x, tile, overlap), F.conv2d(x, kernel, padding=2), rtol=0, atol=1e-12)


def test_tiles_without_overlap_are_set_side_by_side():
    x = torch.randn(1, 1, 8, 12)
    seams = tiled(lambda piece: piece - piece.mean(), x, 4, 0)
    blocks = x.view(1, 1, 2, 4, 3, 4)
    torch.testing.assert_close(seams.view(1, 1, 2, 4, 3, 4), blocks - blocks.mean((3, 5), keepdim=True))


def test_blends_between_tiles_are_gradual():
    calls = iter(range(3))
    steps = tiled(lambda piece: torch.full_like(piece, next(calls)), torch.zeros(1, 1, 4, 16), 8, 4)[0, 0, 0]
    assert steps[:5].eq(0).all() and steps[-5:].eq(2).all()
    assert (steps.diff() >= 0).all() and steps.diff().max() <= 0.75 and steps[7:9].eq(1).all()


def test_a_picture_goes_through_in_tiles(small):
    pipe, low = small(), torch.rand(1, 3, 12, 16)
    whole = pipe(low, output_type="pt")
    assert torch.equal(pipe(low, tile_size=64, output_type="pt").images, whole.images)
    parts = pipe(low, tile_size=32, tile_overlap=8, output_type="pt")
    assert parts.network_calls == 6 and parts.images.shape == whole.images.shape  # 48 x 64 pixels
    assert (parts.images - whole.images).abs().mean() < 0.1


def test_a_network_of_one_size_always_sees_that_size():
    pipe = pixels()
    assert pipe.fixed_size == 8
    assert pipe(torch.rand(2, 1, 3, 5), output_type="pt").images.shape == (2, 1, 12, 20)
    tiny = pipe(torch.rand(1, 1, 1, 1), output_type="pt")
    assert tiny.images.shape == (1, 1, 4, 4) and tiny.network_calls == 1


def test_sizes_that_the_autoencoder_does_not_take_are_padded(small):
    pipe = small(scale=3)
    assert pipe.unit == 2
    low = torch.rand(1, 3, 7, 5)
    got = pipe(low, output_type="pt").images
    assert got.shape == (1, 3, 21, 15)
    assert upsampled(2 * low - 1, 3).abs().max() <= 1


# -- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(output_type="latent"), "output_type='latent' is not known"),
        (dict(tile_size=9), "tile_size=9: accepted is a multiple of 2"),
        (dict(tile_overlap=4), "tile_overlap=4 has no effect without tile_size"),
        (dict(tile_size=16, tile_overlap=16), "tile_overlap=16: accepted are multiples of 2 below tile_size=16"),
        (dict(tile_size=16, tile_overlap=3), "tile_overlap=3: accepted are multiples of 2"),
        (dict(image=torch.rand(1, 1, 8, 8)), "accepted are pictures of one size with 3 channels"),
        (dict(image=[torch.rand(3, 8, 8), torch.rand(3, 8, 6)]), "pictures of one size"),
        (dict(image=[]), "pictures of one size"),
    ],
)
def test_bad_calls(arguments, message, small):
    with pytest.raises(ValueError, match=message):
        small()(**{"image": torch.rand(1, 3, 8, 8)} | arguments)


def test_bad_parts(small):
    for settings, message in [
        (dict(scale=0), "scale=0"),
        (dict(time=0.0), r"time=0.0: accepted are numbers in \(0, 1\]"),
        (dict(tme=0.3), "argument='tme' is not known; did you mean 'time'"),
    ]:
        with pytest.raises(ValueError, match=message):
            small(**settings)
    with pytest.raises(ValueError, match="tile_size=16: accepted is 8"):
        pixels()(torch.rand(1, 1, 8, 8), tile_size=16)
    pipe = small("sdxl")
    pipe.vae.half().register_to_config(force_upcast=True)
    with pytest.raises(ValueError, match="float16 with force_upcast overflows"):
        pipe(torch.rand(1, 3, 8, 8))
