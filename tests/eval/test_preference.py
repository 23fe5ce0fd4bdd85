"""Win rates of two sets of images."""

import json
import math
from dataclasses import replace

import pytest
import torch

from genkit import eval as evaluation
from genkit.eval.inputs import read_images
from genkit.eval.metrics.reward import RewardMetric
from genkit.eval.preference import WinRate, preferences, win_rate
from tests.rewards import tiny


def test_wins_ties_and_losses():
    a, b = torch.tensor([21.0, 20.0, 19.0, 20.0]), torch.tensor([20.0, 20.0, 20.0, 19.9])
    got = preferences(a, b)
    assert got[2:] == (2, 1, 1) and got.rate == 0.625
    points = torch.tensor([1, 0.5, 0, 1.0])
    assert got.standard_error == pytest.approx(float(points.std()) / 2, rel=1e-6)
    assert preferences(b, a).rate == 1 - got.rate


def test_ties_are_by_the_difference_of_probabilities():
    a, b = torch.tensor([0.1, 1.0]), torch.zeros(2)
    first = torch.stack((a, b)).softmax(0)
    lead = (first[0] - first[1]).tolist()
    assert lead == pytest.approx([math.tanh(0.05), math.tanh(0.5)], rel=1e-5)
    assert preferences(a, b, tie=lead[0] + 1e-6)[2:] == (1, 1, 0)
    assert preferences(a, b, tie=lead[0] - 1e-6)[2:] == (2, 0, 0)


def test_of_equal_sets_a_half():
    assert preferences(torch.ones(5), torch.ones(5)) == WinRate(0.5, 0.0, 0, 5, 0)


@pytest.mark.parametrize(
    ("a", "b", "tie", "message"),
    [
        (torch.ones(3), torch.ones(4), 0, r"\(3,\) and \(4,\)"),
        (torch.ones(0), torch.ones(0), 0, "n >= 1"),
        (torch.ones(2), torch.tensor([1, float("nan")]), 0, "not finite"),
        (torch.ones(2), torch.ones(2), 1, "tie=1"),
        (torch.ones(2), torch.ones(2), -0.1, "tie=-0.1"),
    ],
)
def test_bad_scores(a, b, tie, message):
    with pytest.raises(ValueError, match=message):
        preferences(a, b, tie=tie)


def test_of_two_sets_by_pick_score(tmp_path):
    clip = tiny.clip(tmp_path)
    metric = RewardMetric("pick_score", {"model": clip, "tokenizer": clip})
    images = (torch.rand(2, 5, 3, 40, 40) * 255).byte()
    texts = ["a", "cat", "hen", "dog", "x y"]
    a, b = (replace(read_images(x), prompts=texts) for x in images)
    got = win_rate(a, b, score=metric)
    scores = [metric._reward(x / 255, texts) for x in images]
    assert got == preferences(*scores) and 0 < got.wins + got.losses
    assert evaluation.win_rate(a, a, score=metric).ties == 5
    with pytest.raises(ValueError, match="other prompts, or in another order"):
        win_rate(a, replace(b, prompts=texts[::-1]), score=metric)
    with pytest.raises(ValueError, match="'reward:pick_score' needs prompts, and tensor has none"):
        win_rate(a, images[1], score=metric)
    with pytest.raises(ValueError, match="has 5 images, tensor 4"):
        win_rate(a, images[1, :4], score=metric)
    for score in ("kid", "psnr"):
        with pytest.raises(ValueError, match=f"score='{score}': accepted is a metric of each image"):
            win_rate(a, b, score=score)
    assert json.dumps(got._asdict())
