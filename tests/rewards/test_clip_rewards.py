"""CLIP score, PickScore and the aesthetic predictor against what their models give by themselves."""

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, CLIPModel

from genkit import rewards
from genkit.rewards._preprocessing import Preprocessing
from tests.rewards import published, tiny

TEXTS = ["a red cat", "two dogs on grass", "hen"]
IMAGES = tiny.images(3, 3, 40, 56)


def by_transformers(folder, texts=TEXTS):
    """``CLIPModel.forward`` on the same pixels: cosines, and the scale that it multiplies them by."""
    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(texts, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        out = model(pixel_values=Preprocessing(32, (32, 32))(IMAGES), **tokens)
    return (out.image_embeds * out.text_embeds).sum(1), model.logit_scale.exp().detach(), out


def test_clip_score_is_a_hundred_cosines(settings, reward):
    cosines, _, _ = by_transformers(settings["clip_score"]["model"])
    torch.testing.assert_close(reward("clip_score")(IMAGES, TEXTS), 100 * cosines, rtol=1e-4, atol=1e-4)


def test_negative_cosines_are_not_cut_off(reward):
    made = reward("clip_score")
    with torch.no_grad():
        made.model.visual_projection.weight.neg_()
    assert (made(IMAGES, TEXTS) < 0).all()


def test_pick_score_is_the_models_own_logit(settings, reward):
    _, scale, out = by_transformers(settings["pick_score"]["model"])
    logits = out.logits_per_image.diagonal()
    assert scale > 2
    torch.testing.assert_close(reward("pick_score")(IMAGES, TEXTS), logits, rtol=1e-4, atol=1e-4)


def test_pick_score_is_not_scaled_otherwise_in_less_precision(reward):
    assert reward("pick_score", dtype="bfloat16").factor() == reward("pick_score").factor()


def test_long_texts_are_cut_and_still_end(reward):
    made = reward("clip_score")
    long = "x " * 500  # a token a letter
    options = dict(padding="max_length", truncation=True, max_length=77)
    tokens = made.tokenizer(long, **options).input_ids
    assert len(tokens) == 77 and tokens[-1] == made.tokenizer.eos_token_id
    scores = made(IMAGES[:1].expand(3, -1, -1, -1), [long, long[:150], long[:148]])
    assert torch.equal(scores[0], scores[1]) and not torch.isclose(scores[2], scores[0])


def test_the_gradient_ends_with_the_crop_and_the_reach_of_the_filter(reward):
    images = tiny.images(1, 3, 64, 160).requires_grad_()  # to 32 x 80, of which 32 x 32 from 24 on
    reward("clip_score")(images, ["a cat"]).sum().backward()
    columns = images.grad.abs().sum((0, 1, 2))
    assert (columns[48:112] > 0).all() and not columns[:44].any() and not columns[116:].any()


def test_the_aesthetic_head_folded_is_the_head(settings, reward):
    made = reward("aesthetic")
    head = published.head(16)
    _, _, out = by_transformers(settings["aesthetic"]["model"])
    torch.testing.assert_close(made(IMAGES), head(out.image_embeds), rtol=1e-5, atol=1e-5)
    assert made.takes is None and made.model.text_model is None


def test_a_head_for_features_of_another_width_is_refused(settings, tmp_path):
    torch.save(published.head(20).state_dict(), tmp_path / "aesthetic-model.pth")
    with pytest.raises(ValueError, match="reads 20 features; .* has 16"):
        rewards.make("aesthetic", model=settings["aesthetic"]["model"], head=str(tmp_path))


def test_an_embedding_of_zero_has_a_score(reward):
    made = reward("clip_score")
    with torch.no_grad():
        made.model.visual_projection.weight.zero_()
    assert torch.equal(made(IMAGES, TEXTS), torch.zeros(3))


def test_texts_that_differ_give_scores_that_differ(reward):
    made, one = reward("clip_score"), IMAGES[:1].expand(3, -1, -1, -1)
    assert len(set(made(one, TEXTS).tolist())) == 3
    assert F.cosine_similarity(made(one, TEXTS), made(one, TEXTS[::-1]), dim=0) < 1
