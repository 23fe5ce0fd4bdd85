"""Two sources in one: the first as it is, with a partner of the second drawn anew at every visit."""

import pytest
import torch

from genkit.data import make


def test_both_ends():
    both = make("transfer", x0=dict(name="digits"), eps=dict(name="synthetic", shape=[1, 8, 8]))
    digits = make("digits")
    assert len(both) == len(digits) and both.num_classes == 10 and both.shape == (1, 8, 8)
    batch, plain = both.__getitems__([3, 1800]), digits.__getitems__([3, 1800])
    assert torch.equal(batch["x0"], plain["x0"]) and torch.equal(batch["class_labels"], plain["class_labels"])
    assert batch["eps"].shape == (2, 1, 8, 8)
    again = both.__getitems__([3 + len(both)])  # the next visit of record 3
    assert torch.equal(again["x0"], batch["x0"][:1]) and not torch.equal(again["eps"], batch["eps"][:1])
    assert torch.equal(both.__getitems__([1800])["eps"], batch["eps"][1:])


def test_partners_are_independent():
    """Also of a source that is endless, or the very same."""
    for name in ("digits", "eight_gaussians"):
        both = make("transfer", x0=dict(name=name), eps=dict(name=name))
        batch = both.__getitems__(range(1500))
        x0, eps = batch["x0"].flatten(1), batch["eps"].flatten(1)
        assert not (x0 == eps).all(1).float().mean() > 0.01
        column = x0.std(0).argmax()
        assert torch.corrcoef(torch.stack((x0[:, column], eps[:, column])))[0, 1].abs() < 0.1
        assert (x0[:, column].mean() - eps[:, column].mean()).abs() < 0.15 * x0[:, column].std()
    other = make("transfer", x0=dict(name="digits"), eps=dict(name="digits"), seed=1).__getitems__(range(50))["eps"]
    first = make("transfer", x0=dict(name="digits"), eps=dict(name="digits")).__getitems__(range(50))["eps"]
    assert not torch.equal(other, first)


@pytest.mark.parametrize(
    "settings, text",
    [
        (dict(x0=dict(name="digit"), eps=dict(name="digits")), "x0.name='digit' is not known; did you mean 'digits'"),
        (dict(x0=dict(name="digits"), eps=dict(name="two_moons")), r"of shape \(1, 8, 8\), eps='two_moons' of \(2,\)"),
        (
            dict(x0=dict(name="prompts", num_classes=3), eps=dict(name="digits")),
            "has samples of shape None",
        ),
        (dict(x0=dict(name="two_moons", nois=1), eps=dict(name="two_moons")), "nois"),
        (dict(x0=dict(name="digits")), "eps"),
    ],
)
def test_what_cannot_be_coupled(settings, text):
    with pytest.raises(ValueError, match=text):
        make("transfer", **settings)
