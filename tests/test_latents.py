"""Standardised latents, against the formulas of Diffusers' pipelines."""

import pytest
import torch
from diffusers import AutoencoderKL

from genkit.latents import standardise, unstandardise

TINY = dict(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8)
MEAN, STD = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]


@pytest.mark.parametrize("shape", [(2, 4, 3, 3), (2, 4, 2, 3, 3)])
@pytest.mark.parametrize(
    "config",
    [
        {"scaling_factor": 0.18215},
        {"scaling_factor": 1.5, "shift_factor": 0.06},
        {"latents_mean": MEAN, "latents_std": STD},
    ],
    ids=["scale", "shift", "channels"],
)
def test_there_and_back(config, shape):
    vae = AutoencoderKL(**TINY, **config)
    z = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = standardise(vae, z)
    torch.testing.assert_close(unstandardise(vae, seen), z, rtol=0, atol=1e-12)
    scale = vae.config.scaling_factor
    if "latents_mean" in config:
        mean, std = (torch.tensor(v, dtype=torch.float64) for v in (MEAN, STD))
        expected = (z.movedim(1, -1) - mean) * scale / std
        torch.testing.assert_close(seen, expected.movedim(-1, 1))
    else:
        torch.testing.assert_close(seen, (z - (vae.config.shift_factor or 0)) * scale)
    assert seen.dtype == z.dtype
