import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPModel, Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from genkit.eval.command import main
from genkit.eval.extractors import dinov2
from genkit.eval.extractors.base import extract, get_extractor
from genkit.eval.extractors.clip import CLIPExtractor
from genkit.eval.extractors.dinov2 import DINOv2Extractor, positions
from genkit.eval.run import evaluate
from tests.rewards import tiny

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, patch_size=14)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return tiny.clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dinov2_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dinov2")
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**SMALL, image_size=42, initializer_range=0.3)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=[CLIPExtractor, DINOv2Extractor])
def made(request, clip_folder, dinov2_folder):
    folder = clip_folder if request.param is CLIPExtractor else dinov2_folder
    return request.param, folder


def images(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_batches_grey_images_and_random_state(made):
    cls, folder = made
    before = torch.get_rng_state()
    extractor = cls(folder)
    batch = images(3, 3, 20, 30)
    whole = next(extract(extractor, [batch])).features
    assert whole.shape == (3, extractor.dim) and whole.dtype == torch.float32
    parts = torch.cat([out.features for out in extract(extractor, batch.split(1))])
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)
    grey = next(extract(extractor, [batch[:, :1]])).features
    assert torch.equal(grey, next(extract(extractor, [batch[:, :1].repeat(1, 3, 1, 1)])).features)
    assert (whole[0] - whole[1]).abs().max() > 1e-3
    assert torch.equal(before, torch.get_rng_state())


def test_large_batches_are_seen_in_parts(dinov2_folder):
    extractor, sizes = DINOv2Extractor(dinov2_folder), []
    extractor.network.register_forward_pre_hook(
        lambda _, args, kwargs: sizes.append(len(kwargs["pixel_values"])), with_kwargs=True
    )
    batch = images(70, 3, 8, 8)
    features = next(extract(extractor, [batch])).features
    assert sizes == [64, 6] and features.shape == (70, 16)
    torch.testing.assert_close(features[65:66], next(extract(extractor, [batch[65:66]])).features, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_clip_embeds_as_cmmd_and_transformers_do(clip_folder):
    batch = images(2, 3, 50, 41)
    squares = [row.permute(1, 2, 0).numpy()[4 : 4 + 41] for row in batch]
    resized = [np.asarray(Image.fromarray(square).resize((32, 32), Image.Resampling.BICUBIC)) for square in squares]
    pixels = torch.from_numpy(np.stack(resized)).permute(0, 3, 1, 2) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    model = CLIPModel.from_pretrained(clip_folder)
    tokens = torch.zeros(1, 4, dtype=torch.long)
    wanted = model(pixel_values=(pixels - mean) / std, input_ids=tokens).image_embeds
    features = CLIPExtractor(clip_folder)(batch).features
    torch.testing.assert_close(F.normalize(features, dim=1), wanted, rtol=1e-5, atol=1e-5)
    assert (features.norm(dim=1) - 1).abs().min() > 1e-3  # as the model gives them; CMMD normalises


@torch.no_grad()
def test_dinov2_is_the_class_token_of_the_whole_image(tmp_path):
    # A model of this very size: its positions are used as they are, by us and by transformers.
    model = Dinov2Model(Dinov2Config(**SMALL, image_size=224)).eval()
    model.save_pretrained(tmp_path)
    batch = images(1, 3, 30, 50)
    pixels = F.interpolate(batch.float(), (224, 224), mode="bicubic", antialias=True) / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    wanted = model((pixels - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(DINOv2Extractor(str(tmp_path))(batch).features, wanted)


def test_positions_are_placed_as_by_torch_hub():
    # Bicubic convolution (a = -0.75) written out, sampled at (i + 0.5) / ((side + 0.1) / m) - 0.5.
    m, side, width = 7, 4, 3
    embeddings = torch.randn(1, 1 + m * m, width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def kernel(x, a=-0.75):
        x = abs(x)
        if x <= 1:
            return (a + 2) * x**3 - (a + 3) * x**2 + 1
        return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    rows = torch.zeros(side, m, dtype=torch.float64)
    for i in range(side):
        place = (i + 0.5) * m / (side + 0.1) - 0.5
        for j in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            rows[i, min(max(j, 0), m - 1)] += kernel(place - j)
    wanted = torch.einsum("im,jn,mnd->ijd", rows, rows, embeddings[0, 1:].view(m, m, width))
    made = positions(embeddings, side)
    torch.testing.assert_close(made[0, 1:], wanted.flatten(0, 1))
    assert torch.equal(made[:, :1], embeddings[:, :1])
    assert positions(embeddings, m) is embeddings


def test_names_say_which_model(clip_folder, dinov2_folder, monkeypatch):
    clip, dino = CLIPExtractor(clip_folder), DINOv2Extractor(dinov2_folder)
    assert clip.distance == "fd_clip[32x2/16@32]" and dino.distance == "fd_dinov2[16x2/14]"
    assert dino.id.startswith("dinov2-16x2-14/bicubic/") and clip.id.startswith("clip-32x2-16@32/pil/")
    assert dino.id == DINOv2Extractor(dinov2_folder).id
    assert dino.with_resize("pil").distance == "fd_dinov2[16x2/14][pil]"
    monkeypatch.setattr(dinov2, "LARGE", (16, 2, 14))
    assert DINOv2Extractor(dinov2_folder).distance == "fd_dinov2"


def test_the_id_follows_the_weights_not_the_folder(dinov2_folder, tmp_path):
    copy, other = tmp_path / "copy", tmp_path / "other"
    shutil.copytree(dinov2_folder, copy)
    model = Dinov2Model.from_pretrained(copy)
    with torch.no_grad():
        model.layernorm.bias += 1
    model.save_pretrained(other)
    ids = [DINOv2Extractor(str(folder)).id for folder in (dinov2_folder, copy, other)]
    assert ids[0] == ids[1] != ids[2]


def test_in_an_evaluation(clip_folder):
    result = evaluate(
        images(24, 3, 16, 16),
        images(24, 3, 16, 16, seed=1),
        extractor=f"clip:model={clip_folder}",
        metrics=["frechet", "cmmd"],
        quiet=True,
    )
    assert set(result.values) == {"fd_clip[32x2/16@32]", "frechet_raw", "cmmd"}
    assert result.protocol.extractor == CLIPExtractor(clip_folder).id


def test_the_command_prints_the_rule(clip_folder, tmp_path, capsys):
    for i in range(2):
        np.savez(tmp_path / f"{i}.npz", images=images(20, 3, 16, 16, seed=i).numpy())
    sides = (str(tmp_path / f"{i}.npz") for i in range(2))
    main(*sides, extractor=f"clip:model={clip_folder},resize=clean", metrics=["frechet"])
    assert "fd_clip[32x2/16@32][clean]" in capsys.readouterr().out


def test_absent_models_give_the_command():
    for name in ("clip", "dinov2"):  # before a network is looked for
        with pytest.raises(ValueError, match="resize='bicubik' is not known; did you mean 'bicubic'"):
            get_extractor(f"{name}:resize=bicubik")
    with pytest.raises(ValueError, match="hf download facebook/dinov2-large\nor set download=True"):
        get_extractor("dinov2")
    with pytest.raises(ValueError, match="hf download openai/clip-vit-large-patch14-336\n"):
        get_extractor("clip")


def test_downloads_only_where_asked(monkeypatch, clip_folder):
    with pytest.raises(ValueError, match="download=True, but model=.* is a folder"):
        CLIPExtractor(clip_folder, download=True)
    asked = []

    def from_pretrained(*args, **options):
        asked.append(options["local_files_only"])
        raise OSError("no network")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", from_pretrained)
    for download in (False, True):
        with pytest.raises(ValueError, match="cannot be loaded: no network" if download else "hf download"):
            CLIPExtractor("some/model", download=download)
    assert asked == [True, False]


def test_models_of_another_kind_or_without_weights(clip_folder, dinov2_folder, tmp_path):
    with pytest.raises(ValueError, match="is a model of type 'clip'; accepted is 'dinov2'"):
        DINOv2Extractor(clip_folder)
    Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, image_size=28)).save_pretrained(tmp_path / "registers")
    with pytest.raises(ValueError, match="is a model of type 'dinov2_with_registers'"):
        DINOv2Extractor(str(tmp_path / "registers"))
    shutil.copytree(dinov2_folder, tmp_path / "bare")
    (tmp_path / "bare" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="bare cannot be loaded"):
        DINOv2Extractor(str(tmp_path / "bare"))
    (tmp_path / "bare" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="bare cannot be loaded"):
        DINOv2Extractor(str(tmp_path / "bare"))
    from safetensors.torch import load_file, save_file

    state = load_file(f"{dinov2_folder}/model.safetensors")
    del state["layernorm.bias"]
    save_file(state, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights, 'layernorm.bias' the first"):
        DINOv2Extractor(str(tmp_path / "bare"))
