import torch

from genkit.networks.digits_classifier import DigitsClassifier


def test_features_say_in_which_quarter_of_the_image_something_is():
    model = DigitsClassifier(channels=4, hidden=12, num_classes=3).eval()
    images = torch.rand(5, 1, 8, 8) * 2 - 1
    features = model.features(images)
    assert features.shape == (5, model.feature_dim) == (5, 32) and model(images).shape == (5, 3)
    torch.testing.assert_close(model(images), model.head(features))
    for quarter, (row, column) in enumerate([(1, 1), (1, 6), (6, 1), (6, 6)]):
        touched = images.clone()
        touched[:, :, row, column] = 3
        change = (model.features(touched) - features).view(5, 8, 4).square().sum((0, 1))
        assert change.argmax() == quarter


def test_saves_and_loads_as_a_diffusers_model(tmp_path):
    model = DigitsClassifier(channels=4, hidden=12).eval()
    model.save_pretrained(tmp_path)
    again = DigitsClassifier.from_pretrained(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    assert not again.training and torch.equal(again(images), model(images))
