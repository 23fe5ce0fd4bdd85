"""Reconstructions by autoencoders, and rFID."""

import json

import pytest
import torch
from diffusers import AutoencoderTiny, VQModel
from PIL import Image

from genkit.eval.extractors.base import function_extractor
from genkit.eval.inputs import UnreadableImage, read_images, to_uint8
from genkit.eval.metrics.frechet import frechet_distance
from genkit.eval.reconstructed import load_autoencoder, reconstructed_images
from genkit.eval.run import evaluate, measure
from genkit.networks.tokenizer import ImageTokenizer
from genkit.pipelines.tokenizer import TokenizerPipeline

pytestmark = pytest.mark.filterwarnings("ignore:.*rank deficient")


def everything(images):
    return images.load(torch.arange(images.n))


@pytest.fixture(scope="module")
def digits():
    return read_images("digits").subset(torch.arange(150))


@pytest.fixture
def vae(tiny_pipeline):
    return tiny_pipeline("sd15").vae


def colours(n=6, size=16):
    g = torch.Generator().manual_seed(0)
    return read_images(torch.randint(0, 256, (n, 3, size, size), generator=g, dtype=torch.uint8))


def test_what_gives_back_the_image_changes_nothing(digits):
    same = reconstructed_images(lambda x: x, digits, name="identity")
    assert torch.equal(everything(same), everything(digits))  # x / 127.5 - 1 and back is exact
    assert torch.equal(same.labels, digits.labels) and same.kind == digits.kind
    found = evaluate(digits, same, metrics=["rfid", "psnr"], quiet=True)
    assert found.values["reconstruction_frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert found.values["psnr"] == float("inf")
    assert found.protocol.matched == "images" and found.made_with == {"model": "identity"} and found.nfe is None
    assert any("the reference is the images that were reconstructed" in note for note in found.notes)


def test_paired_metrics_pair_an_image_with_its_reconstruction():
    images = colours()
    darker = reconstructed_images(lambda x: x - 0.1, images, name="dark")
    pixels = function_extractor(lambda images: images.flatten(1).float(), 768, "pixels")
    found = evaluate(images, darker, metrics=["psnr", "ssim", "rfid"], extractor=pixels, quiet=True)
    assert 25 < found.values["psnr"] < 28 and 0.9 < found.values["ssim"] < 1


def test_rounding_not_truncation():
    images = colours()
    shifted = reconstructed_images(lambda x: x + 0.6 / 127.5, images, name="shift")
    assert torch.equal(everything(shifted), (everything(images).int() + 1).clamp(max=255).to(torch.uint8))


def test_rfid_is_the_frechet_distance_under_another_name(digits):
    blurred = reconstructed_images(lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1), digits, name="blur")
    found = evaluate(digits, blurred, metrics=["rfid", "frechet"], quiet=True)
    assert found.values["reconstruction_frechet_distance"] == found.values["frechet_distance"] > 1
    pixels = function_extractor(lambda images: images.flatten(1).float() / 255, 64, "pixels")
    pixels.distance = "fid[some]"
    found = evaluate(digits, blurred, metrics=["rfid"], extractor=pixels, quiet=True)
    x, y = (everything(images).flatten(1).float() / 255 for images in (digits, blurred))
    assert found.values == {"rfid[some]": pytest.approx(frechet_distance(x, y), rel=1e-9)}


def test_another_reference_is_said_so(digits):
    half = digits.subset(torch.arange(75))
    other = digits.subset(torch.arange(75, 150))
    back = reconstructed_images(lambda x: x, half, name="identity")
    found = evaluate(other, back, metrics=["rfid"], quiet=True)
    assert found.protocol.matched is None
    assert any("the reference is not the images that were reconstructed" in note for note in found.notes)
    statistics = measure(half, function_extractor(lambda images: images.flatten(1).float(), 64, "p"), quiet=True).stats
    found = evaluate(
        statistics, back, metrics=["rfid"], quiet=True,
        extractor=function_extractor(lambda images: images.flatten(1).float(), 64, "p"),
    )  # fmt: skip
    assert found.protocol.matched is None and any("is not the images" in note for note in found.notes)


def test_rfid_of_what_is_no_reconstruction_is_refused_before_anything_is_measured(digits):
    def never(images):
        raise AssertionError("measured")

    extractor = function_extractor(never, 64, "never")
    with pytest.raises(ValueError, match="'rfid' needs generated images that a model makes.*reconstructed:FOLDER"):
        evaluate(digits, digits, metrics=["rfid"], extractor=extractor, quiet=True)


def test_an_autoencoder_of_diffusers(vae):
    images = colours()
    vae.train()
    back = reconstructed_images(vae, images, batch_size=4)
    made = everything(back)
    assert vae.training
    vae.eval()
    with torch.no_grad():
        x = everything(images).float() / 127.5 - 1
        expected = to_uint8(vae.decode(vae.encode(x).latent_dist.mode()).sample)
    assert (made.int() - expected.int()).abs().max() <= 1 and (made == expected).float().mean() > 0.999
    one = everything(reconstructed_images(vae, images, batch_size=1))
    assert (one.int() - made.int()).abs().max() <= 1
    again = everything(reconstructed_images(vae, images, batch_size=4))
    assert torch.equal(again, made)


@pytest.mark.parametrize("kind", ["vq", "tiny"])
def test_other_autoencoders(kind):
    torch.manual_seed(0)
    if kind == "vq":
        model = VQModel(block_out_channels=(8,), norm_num_groups=4, num_vq_embeddings=16, latent_channels=3)
    else:
        model = AutoencoderTiny(
            encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )  # fmt: skip
    made = everything(reconstructed_images(model, colours()))
    assert made.shape == (6, 3, 16, 16) and len(made.unique()) > 10


def test_bad_images_are_refused_or_left_out(vae, digits, tmp_path):
    with pytest.raises(ValueError, match="AutoencoderKL takes images of 3 channels, digits has 1"):
        reconstructed_images(vae, digits)
    with pytest.raises(ValueError, match="takes multiples of .* pixels, tensor is 15x15; size and crop"):
        reconstructed_images(vae, colours(size=15))
    with pytest.raises(ValueError, match=r"makes \(6, 3, 8, 8\) of \(6, 3, 16, 16\)"):
        everything(reconstructed_images(lambda x: x[..., ::2, ::2], colours()))
    for i, image in enumerate(everything(digits)[:60]):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:02d}.png")
    content = (tmp_path / "00.png").read_bytes()
    (tmp_path / "00.png").write_bytes(content[:45])
    images = read_images(tmp_path)
    found = evaluate(
        images, reconstructed_images(lambda x: x, images, name="identity"), metrics=["rfid", "psnr"], quiet=True
    )
    assert found.protocol.n_real == found.protocol.n_gen == 59 and found.protocol.matched == "images"
    assert sum("00.png" in note for note in found.notes) == 2

    def broken(x):
        return x.masked_fill((x.flatten(1).sum(1) == x.flatten(1).sum(1).max())[:, None, None, None], torch.nan)

    with pytest.raises(UnreadableImage, match="as reconstructed by broken is NaN"):
        everything(reconstructed_images(broken, digits))


def test_from_folders(vae, tiny_pipeline, tmp_path):
    vae.save_pretrained(tmp_path / "vae_alone")
    tiny_pipeline("sd15").save_pretrained(tmp_path / "pipe")
    first, second = load_autoencoder(tmp_path / "vae_alone"), load_autoencoder(tmp_path / "pipe")
    assert type(first) is type(second) is type(vae)
    back = reconstructed_images(first, colours())
    assert back.name == "tensor reconstructed by vae_alone"
    with pytest.raises(FileNotFoundError, match="no autoencoder"):
        load_autoencoder(tmp_path)
    tiny_pipeline("sd15").unet.save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="is a UNet2DConditionModel, which does not encode and decode"):
        load_autoencoder(tmp_path / "unet")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"_class_name": "Nothing"}))
    with pytest.raises(ValueError, match="odd: not a network of Diffusers"):
        load_autoencoder(tmp_path / "odd")


def test_a_tokenizer(tmp_path):
    torch.manual_seed(0)
    small = dict(block_out_channels=(8, 8), norm_num_groups=4, layers_per_block=1, latent_channels=4)
    tokenizer = ImageTokenizer({"kind": "vq", "dim": 4, "codebook_size": 16}, in_channels=1, out_channels=1, **small)
    folder = tmp_path / "mine" / "pipeline"  # as training leaves it
    TokenizerPipeline(tokenizer.eval()).save_pretrained(folder)
    digits = read_images("digits").subset(torch.arange(5))
    images = read_images((everything(digits)[:, :, :7], digits.labels))  # 8 x 7: it pads, and cuts what it decodes
    back = reconstructed_images(load_autoencoder(folder), images)
    made = everything(back)
    assert back.name.endswith("reconstructed by mine") and back.model.made_with == {"model": "mine"}
    with torch.no_grad():
        assert torch.equal(made, to_uint8(tokenizer(everything(images).float() / 127.5 - 1).sample))
    assert made.shape == (5, 1, 7, 8)
