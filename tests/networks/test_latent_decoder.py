"""Decoding of latents, against what Diffusers' pipelines do."""

import diffusers
import pytest
import torch

from genkit.denoisers.flux import pack
from genkit.networks.latent_decoder import LatentDecoder


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_decodes_what_the_pipeline_decodes(name, tiny_pipeline):
    pipe = tiny_pipeline(name)
    z = torch.randn(2, 4, 16, 24)
    with torch.no_grad():
        given = pack(z) if name == "flux" else z
        images = LatentDecoder(pipe.vae, height=32, width=48)(given)
        native = pipe.vae.decode(z / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0)).sample
    assert images.shape == (2, 3, 32, 48)
    torch.testing.assert_close(images, native)


def test_packed_latents_of_a_square_need_no_size_others_do(tiny_pipeline):
    vae = tiny_pipeline("flux").vae
    z = torch.randn(1, 4, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(LatentDecoder(vae)(pack(z)), LatentDecoder(vae)(z))
        with pytest.raises(ValueError, match="height=None, width=None for 96 packed latents"):
            LatentDecoder(vae)(pack(torch.randn(1, 4, 16, 24)))
        with pytest.raises(ValueError, match="height=32, width=32 for 96 packed latents"):
            LatentDecoder(vae, 32, 32)(pack(torch.randn(1, 4, 16, 24)))


def test_a_vae_that_overflows_in_float16_is_refused(tiny_pipeline):
    vae = tiny_pipeline("sdxl").vae
    assert vae.config.force_upcast
    with pytest.raises(ValueError, match="vae=AutoencoderKL in float16 with force_upcast overflows"):
        LatentDecoder(vae.half())
    LatentDecoder(vae.to(torch.bfloat16))


def test_the_tiny_autoencoder():
    channels = dict(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8))
    vae = diffusers.AutoencoderTiny(**channels, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1)).eval()
    with torch.no_grad():
        z = torch.randn(1, 4, 8, 8)
        torch.testing.assert_close(LatentDecoder(vae)(z), vae.decode(z).sample)
