"""A user's callable as a reward."""

import re
import sys

import pytest
import torch

from tests.rewards import tiny

IMAGES = tiny.images(3, 3, 8, 8)


@pytest.fixture
def file(settings):
    return settings["function"]["path"].rpartition(":")[0]


def test_a_function_of_a_file_with_settings(reward, file):
    made = reward("function", path=f"{file}:brightness", settings={"power": 2.0})
    images = IMAGES.clone().requires_grad_()
    torch.testing.assert_close(made(images), IMAGES.mean((1, 2, 3)) ** 2)
    assert torch.autograd.grad(made(images).sum(), images)[0].any()


def test_a_function_of_a_module(reward, file, tmp_path, monkeypatch):
    (tmp_path / "own_rewards_package").mkdir()
    (tmp_path / "own_rewards_package" / "good.py").write_text(
        "def red(images):\n    return images[:, 0].mean((1, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    made = reward("function", path="own_rewards_package.good:red", settings={})
    assert torch.equal(made(IMAGES), IMAGES[:, 0].mean((1, 2)))
    sys.modules.pop("own_rewards_package.good")


def test_it_is_given_what_it_takes(reward, file):
    texts = reward("function", path=f"{file}:length", differentiable=False, takes="prompts", settings={})
    assert texts(IMAGES, ["a", "bb", "ccc"]).tolist() == [1.0, 2.0, 3.0]  # a list of numbers will do
    labels = reward("function", path=f"{file}:of_label", takes="labels", settings={"scale": 3.0})
    torch.testing.assert_close(
        labels(IMAGES, torch.tensor([0, 1, 2]))[1:], 3 * IMAGES.mean((1, 2, 3))[1:] * torch.tensor([1, 2])
    )


def test_a_module_is_made_once_frozen_and_moved(reward):
    made = reward("function")
    assert len(list(made.parameters())) == 2 and not any(p.requires_grad for p in made.parameters())
    assert torch.equal(made(IMAGES), made(IMAGES))  # its dropout is off
    assert made.double()(IMAGES.double()).dtype == torch.float64


def test_one_that_is_not_differentiable(reward, file):
    made = reward("function", path=f"{file}:brightness", differentiable=False, settings={})
    assert not made(IMAGES).requires_grad
    with pytest.raises(ValueError, match="not differentiable"):
        made(IMAGES.clone().requires_grad_())


def test_a_gradient_that_was_promised_and_does_not_come_is_an_error(reward, file):
    made = reward("function", path=f"{file}:stuck", settings={})
    with pytest.raises(ValueError, match="no gradient comes out"):
        made(IMAGES.clone().requires_grad_())
    with torch.no_grad():
        assert made(IMAGES).shape == (3,)


def test_one_number_for_all_is_refused(reward, file, tmp_path):
    (tmp_path / "bad.py").write_text("def mean(images):\n    return images.mean()\n")
    with pytest.raises(ValueError, match=re.escape("gives () for 3 images")):
        reward("function", path=f"{tmp_path / 'bad.py'}:mean", settings={})(IMAGES)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("brightness", "package.module:name"),
        ("{file}:", "package.module:name"),
        ("{file}:brightnes", "did you mean '.*:brightness'"),
        ("{file}:number", "is a int"),
        ("nowhere.py:f", "no file nowhere.py"),
        ("no_such_module_at_all:f", "No module named"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(path, message, reward, file):
    with pytest.raises(ValueError, match=message):
        reward("function", path=path.format(file=file), settings={})


def test_whether_it_is_differentiable_must_be_said():
    from genkit.rewards import make

    with pytest.raises(ValueError, match="differentiable"):
        make("function", path="a:b")
