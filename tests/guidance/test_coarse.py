"""References and masks for coarse guidance, made of pixels."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL

from genkit.guidance.coarse import encode_reference, latent_masks, resize


def test_resizing_keeps_smooth_images_and_frames_apart():
    ramp = torch.linspace(-1, 1, 32, dtype=torch.float64).view(1, 1, 1, 32).expand(2, 3, 24, 32)
    assert resize(ramp, (24, 32)) is ramp
    small = resize(ramp, (12, 16))
    assert small.shape == (2, 3, 12, 16)
    torch.testing.assert_close(small[0, 0, 0, 3:-3], (ramp[0, 0, 0, 6:-6:2] + ramp[0, 0, 0, 7:-5:2]) / 2)
    noise = torch.randn(1, 1, 64, 64)
    assert resize(noise, (16, 16)).std() < 0.4  # averaged, not picked
    video = torch.randn(2, 3, 5, 8, 8)
    large = resize(video, (16, 16))
    torch.testing.assert_close(large[:, :, 3], resize(video[:, :, 3], (16, 16)))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_latents_are_what_the_pipeline_decodes(name, tiny_pipeline):
    vae = tiny_pipeline(name).vae
    images = torch.rand(2, 3, 24, 40) * 2 - 1
    latents = encode_reference(vae, images, (32, 32))
    assert latents.shape == (2, 4, 16, 16) and not latents.requires_grad
    mode = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0)  # as pipelines undo it
    torch.testing.assert_close(mode, vae.encode(resize(images, (32, 32))).latent_dist.mean.detach())


def test_latents_standardised_by_channel():
    vae = AutoencoderKL(latent_channels=2, norm_num_groups=4, block_out_channels=(4,))
    mode = vae.encode(torch.zeros(1, 3, 8, 8)).latent_dist.mean.detach()
    vae.register_to_config(latents_mean=[1.0, -2.0], latents_std=[0.5, 4.0], scaling_factor=2.0)
    mean, std = torch.tensor([1.0, -2.0]).view(1, 2, 1, 1), torch.tensor([0.5, 4.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(encode_reference(vae, torch.zeros(1, 3, 8, 8)), (mode - mean) * 2 / std)


def test_channels_are_checked():
    vae = SimpleNamespace(config={"in_channels": 3})
    with pytest.raises(ValueError, match=r"images have shape \(1, 4, 8, 8\): accepted is \(B, 3, \[T,\] H, W\)"):
        encode_reference(vae, torch.zeros(1, 4, 8, 8))


def test_masks_of_latents_partition_them():
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 1:4, 2:8] = True
    other = torch.zeros(1, 1, 8, 8)
    other[..., 3:8, 0:5] = 1
    first, second, rest = latent_masks([mask, other], (4, 4))
    assert first[0, 0].tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert second[0, 0].tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert torch.equal(first + second + rest, torch.ones(1, 1, 4, 4))
    (whole, rest) = latent_masks([mask], (4, 4), policy="all")
    assert whole[0, 0].tolist() == [[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.equal(whole + rest, torch.ones(1, 1, 4, 4))


@pytest.mark.parametrize(
    ("policy", "causal", "frames", "expected"),
    [
        ("any", True, [1, 3], [0, 1, 0]),
        ("all", True, [1, 2, 3, 4], [0, 1, 0]),
        ("all", True, [0, 1, 2, 3], [1, 0, 0]),
        ("any", True, [0, 8], [1, 0, 1]),
        ("any", False, [3, 4], [0, 1, 0]),
        ("all", False, [3, 4, 5], [0, 1, 0]),
    ],
)
def test_frames_are_pooled_as_video_vaes_do(policy, causal, frames, expected):
    mask = torch.zeros(1, 1, 9, 4, 4)
    mask[:, :, frames] = 1
    found, rest = latent_masks([mask], (3, 2, 2), policy=policy, causal=causal)
    assert found.shape == (1, 1, 3, 2, 2) and found[0, 0, :, 0, 0].tolist() == expected
    assert torch.equal(found + rest, torch.ones(1, 1, 3, 2, 2))


def test_a_still_mask_holds_for_all_frames():
    mask = torch.zeros(1, 1, 1, 4, 4)
    mask[..., :2] = 1
    found, rest = latent_masks([mask], (5, 2, 2))
    assert found.shape == (1, 1, 1, 2, 2) and torch.equal(found[0, 0, 0], torch.tensor([[1.0, 0.0], [1.0, 0.0]]))


@pytest.mark.parametrize(
    ("mask", "size", "settings", "message"),
    [
        (torch.ones(1, 8, 8), (4, 4), {}, r"a mask has shape \(1, 8, 8\): accepted is \(1 or B, 1, H, W\)"),
        (torch.ones(1, 1, 8, 8), (2, 4, 4), {}, r"accepted is \(1 or B, 1, T, H, W\)"),
        (torch.full((1, 1, 8, 8), 0.5), (4, 4), {}, "values other than 0 and 1"),
        (torch.ones(1, 1, 8, 8), (4, 4), dict(policy="most"), "policy='most' is not known"),
        (torch.ones(1, 1, 8, 4, 4), (3, 2, 2), {}, r"has 8 frames, and latents 3 .*accepted are 1, 3 and 1 \+ k \* 2"),
        (torch.ones(1, 1, 8, 4, 4), (3, 2, 2), dict(causal=False), r"accepted are 1, 3 and k \* 3"),
    ],
)
def test_bad_masks(mask, size, settings, message):
    with pytest.raises(ValueError, match=message):
        latent_masks([mask], size, **settings)
