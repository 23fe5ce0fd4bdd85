"""Classifiers of images: what reaches the network inside, and what comes back."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, ViTConfig, ViTForImageClassification

from genkit.networks.image_classifiers import CLIP_MEAN, CLIP_STD, ImageClassifier, PromptClassifier
from genkit.testing import tiny

TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)


class Seen(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3, 5, dtype=torch.bfloat16))

    def forward(self, x):
        self.x = x
        return x.mean((2, 3)) @ self.weight


@pytest.mark.parametrize("channels", [1, 3])
def test_images_reach_the_network_as_values_normalised_over_zero_to_one(channels):
    classifier = ImageClassifier(Seen(), (4, 4), mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 2.0))
    images = torch.full((2, channels, 4, 4), 0.5)
    images[1] = 3.0  # predicted samples exceed the range of images
    assert classifier(images).shape == (2, 5) and classifier(images).dtype == torch.float32
    expected = torch.tensor([[0.5, 0.5, 0.375], [1.0, 0.75, 0.5]]).view(2, 3, 1, 1).expand(2, 3, 4, 4)
    assert classifier.model.x.dtype == torch.bfloat16
    torch.testing.assert_close(classifier.model.x.float(), expected)


def test_images_are_resized_without_aliasing():
    classifier = ImageClassifier(Seen(), (8, 8), mean=(0, 0, 0), std=(1, 1, 1))
    stripes = torch.ones(1, 3, 32, 32)
    stripes[..., ::2] = -1
    classifier(stripes)
    assert classifier.model.x.shape[-2:] == (8, 8) and (classifier.model.x.float() - 0.5).abs().max() < 0.1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (dict(size={"height": 16, "width": 16}), (16, 16)),
        (dict(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), (16, 16)),
        (dict(size=16), (16, 16)),
    ],
)
def test_a_classifier_of_transformers_with_its_preprocessing(tmp_path, size, expected):
    model = ViTForImageClassification(ViTConfig(**TINY, patch_size=8, num_labels=7)).eval()
    model.save_pretrained(tmp_path)
    settings = dict(image_mean=[0.5] * 3, image_std=[0.25] * 3, **size)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    classifier = ImageClassifier.from_pretrained(str(tmp_path))
    assert classifier.size == expected and not classifier.model.training
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        direct = model(pixel_values=((images + 1) / 2 - 0.5) / 0.25).logits
        torch.testing.assert_close(classifier(images), direct)


def clip():
    tokenizer = tiny.clip_tokenizer()
    special = {f"{k}_token_id": getattr(tokenizer, f"{k}_token_id") for k in ("bos", "eos", "pad")}
    text = {k: v for k, v in TINY.items() if k != "image_size"} | dict(vocab_size=len(tokenizer), **special)
    return CLIPModel(
        CLIPConfig(text_config=text, vision_config=TINY | dict(patch_size=8), projection_dim=12)
    ), tokenizer


def test_prompts_are_told_apart_as_clip_does():
    model, tokenizer = clip()
    model.eval()
    prompts = ["a cat", "two dogs on a red lawn", "a car"]
    images = torch.rand(2, 3, 16, 16) * 2 - 1
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        tokens = tokenizer(prompts, padding=True, return_tensors="pt")
        own = model(pixel_values=((images + 1) / 2 - mean) / std, **tokens)
        got = PromptClassifier(model, tokenizer, prompts)(images)
    assert got.shape == (2, 3)
    torch.testing.assert_close(got / 100, own.logits_per_image / model.logit_scale.exp(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got / 100, F.cosine_similarity(own.image_embeds[:, None], own.text_embeds, dim=-1))
    half = PromptClassifier(model, tokenizer, prompts, logit_scale=50.0)
    torch.testing.assert_close(half(images), got / 2)
    assert "embeddings" not in half.state_dict()


@pytest.mark.parametrize("prompts", [[], "a cat"])
def test_no_prompts(prompts):
    with pytest.raises(ValueError, match="accepted is a list of texts"):
        PromptClassifier(*clip(), prompts)
