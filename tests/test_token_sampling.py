"""Temperature, top-k and top-p against laws that can be written down."""

import pytest
import torch

from genkit.token_sampling import TokenSampling


def law(p, **settings):
    return TokenSampling(**settings).probabilities(torch.tensor([p], dtype=torch.float64).log())[0]


def kept(p, **settings):
    found = law(p, **settings)
    return (found / found.sum()).tolist()


FIVE = [0.4, 0.3, 0.15, 0.1, 0.05]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 2}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.5}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.69}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 0.71}, [0.4705882352941, 0.3529411764706, 0.1764705882353, 0, 0]),
        ({"top_k": 3, "top_p": 0.6}, [4 / 7, 3 / 7, 0, 0, 0]),
        ({"top_p": 1e-9}, [1, 0, 0, 0, 0]),
        ({"top_k": 9}, FIVE),
        ({"temperature": 0}, [1, 0, 0, 0, 0]),
        ({"temperature": 0.5}, [x * x / sum(y * y for y in FIVE) for x in FIVE]),
    ],
)
def test_what_is_kept(settings, expected):
    assert kept(FIVE, **settings) == pytest.approx(expected, abs=1e-12)


def test_what_comes_before_is_compared_with_the_share_itself():
    """A token is kept that exactly the share comes before; binary fractions are exact."""
    halves = [0.5, 0.25, 0.125, 0.125]
    assert kept(halves, top_p=0.5) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-12)
    assert kept(halves, top_p=0.75) == pytest.approx([4 / 7, 2 / 7, 1 / 7, 0], abs=1e-12)
    assert kept(halves, top_p=0.4999) == [1, 0, 0, 0]


def test_ties_with_the_last_of_the_k_are_kept():
    assert kept([0.4, 0.2, 0.2, 0.2], top_k=2) == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=1e-12)


def test_guidance_squares_the_ratio():
    """softmax(l_n + 2 (l_c - l_n)) of [.7, .2, .1] and [.4, .4, .2]."""
    c, n = (torch.tensor([p], dtype=torch.float64).log() for p in ([0.7, 0.2, 0.1], [0.4, 0.4, 0.2]))
    p = TokenSampling().probabilities(n + 2 * (c - n))[0]
    assert p.tolist() == pytest.approx([0.8909090909, 0.0727272727, 0.0363636364], abs=1e-9)


@pytest.mark.parametrize("settings", [{}, {"top_k": 2}, {"top_p": 0.6}, {"temperature": 2.0}])
def test_draws_follow_the_law(settings):
    sampling, n = TokenSampling(**settings), 20_000
    uniform = (torch.arange(n, dtype=torch.float64)[:, None] + 0.5) / n
    logits = torch.tensor(FIVE, dtype=torch.float64).log().expand(n, 5)
    counts = torch.bincount(sampling.draw(logits, uniform)[:, 0], minlength=5) / n
    assert (counts - torch.tensor(kept(FIVE, **settings), dtype=torch.float64)).abs().max() < 1e-4


def test_no_filtered_token_is_drawn_at_the_ends():
    ends = torch.tensor([[1e-300], [1 - 2**-53]], dtype=torch.float64)
    logits = torch.tensor([[0.05, 0.4, 0.3, 0.15, 0.1]], dtype=torch.float64).log().expand(2, 5)
    assert TokenSampling(top_k=3).draw(logits, ends)[:, 0].tolist() == [1, 3]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temperature": -1.0}, "temperature=-1.0: expected 0 or more"),
        ({"top_k": -1}, "top_k=-1: expected 0, for all, or more"),
        ({"top_p": 0.0}, "top_p=0.0: expected a share above 0"),
        ({"top_p": 1.5}, "top_p=1.5: expected a share above 0"),
        ({"top_p": "0.5"}, "top_p='0.5': must be a finite number"),
        ({"top_k": 2.5}, "top_k=2.5: must be an integer"),
        ({"top_k": True}, "top_k=True: must be an integer"),
        ({"temperature": float("inf")}, "temperature=inf: must be a finite number"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan: must be a finite number"),
        ({"guidance_scale": -1.0}, "guidance_scale=-1.0: expected 0 or more"),
        ({"guidance_end": 1.5}, "guidance_end=1.5: must be an integer"),
        ({"guidance_end": -2}, "guidance_end=-2: expected 0 or more"),
    ],
)
def test_bad_settings(settings, text):
    with pytest.raises(ValueError, match=text):
        TokenSampling(**settings)
