import torch

from genkit.networks.digits_classifier import DigitsClassifier


def test_logits_are_linear_in_the_features():
    model = DigitsClassifier(channels=4, feature_dim=12, num_classes=3).eval()
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    assert model.features(images).shape == (5, 12)
    head = model.head[-1]
    torch.testing.assert_close(model(images), model.features(images) @ head.weight.T + head.bias)


def test_saves_and_loads_as_a_diffusers_model(tmp_path):
    model = DigitsClassifier(channels=4, feature_dim=12).eval()
    model.save_pretrained(tmp_path)
    again = DigitsClassifier.from_pretrained(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    assert not again.training and torch.equal(again(images), model(images))
