"""Log-probabilities of transformers' classifiers."""

import pytest
import torch
from transformers import ViTForImageClassification

from genkit import rewards
from tests.rewards import tiny

IMAGES = tiny.images(3, 3, 16, 16)


def by_transformers(folder):
    model = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(pixel_values=(IMAGES - 0.5) / 0.25).logits.softmax(1)


def test_a_wanted_class_by_index_and_by_name(settings, reward):
    chances = by_transformers(settings["classifier"]["model"])
    for wanted, index in ((2, 2), ("dog", 1)):
        made = reward("classifier", wanted=wanted)
        assert made.takes is None
        torch.testing.assert_close(made(IMAGES), chances[:, index].log(), rtol=1e-4, atol=1e-5)
        assert torch.equal(made(IMAGES, ["not", "read", "here"]), made(IMAGES))


def test_without_one_the_labels_are_wanted(settings, reward):
    made = reward("classifier", wanted=None)
    labels = torch.tensor([2, 0, 1])
    assert made.takes == "labels"
    chances = by_transformers(settings["classifier"]["model"])
    torch.testing.assert_close(
        made(IMAGES, labels), chances.gather(1, labels[:, None])[:, 0].log(), rtol=1e-4, atol=1e-5
    )


def test_an_unlikely_class_has_a_gradient(reward):
    made = reward("classifier", wanted=0)
    with torch.no_grad():
        made.model.classifier.bias[0] = -500  # a probability of 0 in float32
    images = IMAGES.clone().requires_grad_()
    scores = made(images)
    assert scores.isfinite().all() and (scores < -400).all()
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.norm() > 1e-2


@pytest.mark.parametrize(
    ("wanted", "message"),
    [("cats", "did you mean 'cat'"), (3, "0 to 2"), (-1, "0 to 2")],
)
def test_a_class_that_is_not_there_is_refused(wanted, message, reward):
    with pytest.raises(ValueError, match=message):
        reward("classifier", wanted=wanted)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 3]), "0 to 2"),
        (torch.tensor([0, -1, 2]), "0 to 2"),
        (torch.rand(3), "integers"),
        (None, "class labels"),
        (["cat", "dog", "hen"], "class labels"),
        (torch.tensor([0, 1]), "2 prompts for 3 images"),
    ],
)
def test_labels_of_another_form_are_refused(labels, message, reward):
    with pytest.raises(ValueError, match=message):
        reward("classifier", wanted=None)(IMAGES, labels)


def test_preprocessing_that_is_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resample=0"):
        rewards.make("classifier", model=tiny.classifier(tmp_path, **tiny.PREPROCESSOR | {"resample": 0}), wanted=1)
