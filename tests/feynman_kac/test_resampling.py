"""Resampling schemes: counts, unbiasedness, order of variance, groups that do not see each other."""

import math

import pytest
import torch

from genkit.feynman_kac.resampling import RESAMPLERS, resample
from genkit.rng import ItemRNG

F64 = torch.float64
W = torch.tensor([0.31, 0.0, 0.24, 0.05, 0.4], dtype=F64)


def counts(index, particles):
    return torch.zeros(len(index), particles, dtype=F64).scatter_add_(1, index, torch.ones_like(index, dtype=F64))


@pytest.mark.parametrize("name", RESAMPLERS)
def test_unbiased_and_of_the_right_number(name):
    groups = 20000
    index = resample(name, W.expand(groups, -1), ItemRNG(0, range(groups)))
    drawn = counts(index, 5)
    assert index.shape == (groups, 5) and bool((index.diff() >= 0).all())
    assert bool((drawn.sum(1) == 5).all()) and bool((drawn[:, 1] == 0).all())
    error = drawn.std(0) / math.sqrt(groups)
    assert bool(((drawn.mean(0) - 5 * W).abs() <= 4 * error + 1e-12).all())
    if name in ("systematic", "ssp"):
        assert bool(((drawn - 5 * W).abs() < 1).all())
    if name == "residual":
        assert bool((drawn >= (5 * W).floor()).all())


def test_variance_of_an_estimate_falls_from_multinomial_on():
    """The known order for any function: multinomial above residual and stratified, and SSP not above residual."""
    groups = 20000
    f = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0], dtype=F64)
    variance = {}
    for name in RESAMPLERS:
        index = resample(name, W.expand(groups, -1), ItemRNG(1, range(groups)))
        variance[name] = f[index].mean(1).var().item()
    exact = ((W * f**2).sum() - (W * f).sum() ** 2).item() / 5
    assert variance["multinomial"] == pytest.approx(exact, rel=0.04)
    assert variance["residual"] < variance["multinomial"] and variance["stratified"] < variance["multinomial"]
    assert variance["ssp"] < variance["residual"]


@pytest.mark.parametrize("particles", [1, 2, 3, 7, 49, 100])
@pytest.mark.parametrize("name", sorted(set(RESAMPLERS) - {"multinomial"}))
def test_equal_weights_change_nothing(name, particles):
    weights = torch.full((50, particles), 0.37, dtype=F64)
    index = resample(name, weights, ItemRNG(0, range(50)))
    assert torch.equal(index, torch.arange(particles).expand(50, -1))


@pytest.mark.parametrize("name", RESAMPLERS)
def test_a_group_does_not_depend_on_its_neighbours(name):
    weights = ItemRNG(3, range(6)).uniform((8,), dtype=F64)
    whole = resample(name, weights, ItemRNG(0, range(6)))
    alone = resample(name, weights[4:5], ItemRNG(0, [4]))
    assert torch.equal(whole[4:5], alone)


@pytest.mark.parametrize("name", RESAMPLERS)
def test_one_particle_with_all_the_weight(name):
    index = resample(name, torch.tensor([[0.0, 0, 1, 0]], dtype=F64), ItemRNG(0, [0]))
    assert index.tolist() == [[2, 2, 2, 2]]


def test_systematic_points_are_the_inverse_cdf():
    """``u = 0.5`` of a group with weights (.7, .2, .05, .05): points .125, .375, .625, .875."""

    class Half:
        def __len__(self):
            return 1

        def uniform(self, shape, dtype):
            return torch.full((1, *shape), 0.5, dtype=dtype)

    weights = torch.tensor([[0.7, 0.2, 0.05, 0.05]], dtype=F64)
    assert resample("systematic", weights, Half()).tolist() == [[0, 0, 0, 1]]


def test_bad_input():
    rng = ItemRNG(0, range(2))
    with pytest.raises(ValueError, match="resampler='sistematic'.*did you mean 'systematic'"):
        resample("sistematic", torch.ones(2, 3), rng)
    for bad in (torch.zeros(2, 3), -torch.ones(2, 3), torch.full((2, 3), math.nan), torch.full((2, 3), math.inf)):
        with pytest.raises(ValueError, match="weights must be"):
            resample("systematic", bad, rng)
    with pytest.raises(ValueError, match="2 groups"):
        resample("systematic", torch.ones(3, 3), rng)
