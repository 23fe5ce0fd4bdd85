"""LeapAlign's parts: connectors, discounts, distances, and the law of the points at which leaps begin."""

import itertools

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from genkit.rng import ItemRNG
from genkit.training.parts.leaps import (
    EvenPoints,
    PointLaw,
    UniformPoints,
    connect,
    discount,
    distance,
    similarity_weight,
)


@pytest.mark.parametrize(
    "dtype, most, share",
    [(torch.float32, 6.0e-8, 0.075), (torch.bfloat16, 7.8e-3, 0.099), (torch.float16, 4.9e-4, 0.098)],
)
def test_the_connector_is_exact_where_the_other_order_is_not(dtype, most, share):
    """1e5 normals and predictions 0.3 off: the published order misses by a rounding, ours never."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(100_000, generator=generator)
    prediction = (real + 0.3 * torch.randn(100_000, generator=generator)).to(dtype)
    real = real.to(dtype)
    assert torch.equal(connect(real, prediction), real)
    error = ((prediction + (real - prediction)).float() - real.float()).abs()
    assert (error > 0).double().mean().item() == pytest.approx(share, rel=0.1)
    assert most / 8 < error.max().item() < most * 8


def test_the_connector_has_the_predictions_gradient():
    real, prediction = (torch.randn(5, requires_grad=True) for _ in range(2))
    connect(real.detach(), prediction).sum().backward()
    assert torch.equal(prediction.grad, torch.ones(5)) and real.grad is None


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_a_discount_changes_the_gradient_alone(alpha):
    x = torch.randn(5, requires_grad=True)
    y = discount(x, alpha)
    assert torch.equal(y, x)
    assert y.requires_grad == (alpha > 0)
    if alpha:
        y.sum().backward()
        torch.testing.assert_close(x.grad, torch.full((5,), alpha))


def test_distances_are_means_in_float32_without_gradient():
    real = torch.zeros(2, 3, 4, dtype=torch.bfloat16)
    prediction = torch.full((2, 3, 4), 0.01, dtype=torch.bfloat16, requires_grad=True)
    prediction = torch.cat((prediction[:1], 3 * prediction[1:]))
    d = distance(real, prediction)
    assert d.dtype == torch.float32 and not d.requires_grad
    assert d.tolist() == pytest.approx([0.01, 0.03], rel=1e-2)
    tau = 0.02
    weights = similarity_weight(torch.stack((d, torch.tensor([0.0, 1.0])), 1), tau)
    assert weights.tolist() == pytest.approx([1 / 0.04, 1 / (d[1].item() + 1)], rel=1e-6)


@pytest.mark.parametrize("leaps", [1, 2, 3])
def test_uniform_points_are_all_choices_alike(leaps):
    law, n = UniformPoints(first=1, last=5), 20_000
    draws = law.draw(ItemRNG(0, range(n)), 8, leaps)
    choices = list(itertools.combinations(range(1, 6), leaps))
    found, counts = draws.unique(dim=0, return_counts=True)
    assert found.tolist() == [list(c) for c in choices]
    expected = n / len(choices)
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_uniform_points_reach_from_the_first_call_to_the_last():
    draws = UniformPoints().draw(ItemRNG(0, range(2000)), 4, 2)
    assert draws.unique(dim=0).tolist() == [list(c) for c in itertools.combinations(range(4), 2)]
    assert UniformPoints().draw(ItemRNG(0, range(3)), 2, 2).tolist() == [[0, 1]] * 3


@pytest.mark.parametrize("calls, distance, apart", [(10, 0.5, 5), (25, 0.5, 12), (4, 0.01, 1)])
def test_even_points_are_a_distance_apart(calls, distance, apart):
    draws = EvenPoints(law="even", distance=distance).draw(ItemRNG(0, range(2000)), calls, 2)
    assert (draws[:, 1] - draws[:, 0] == apart).all()
    assert sorted(draws[:, 0].unique().tolist()) == list(range(calls - apart))


@pytest.mark.parametrize(
    "law, calls, leaps",
    [
        (dict(first=3, last=3), 8, 2),
        (dict(last=8), 8, 1),
        (dict(first=7), 8, 2),
        (dict(law="even", distance=0.5), 6, 3),
        (dict(), 1, 2),
    ],
)
def test_points_that_are_not_there_are_refused(law, calls, leaps):
    with pytest.raises(ValueError, match=f"{leaps} leaps.*{calls}"):
        TypeAdapter(PointLaw).validate_python({"law": "uniform"} | law).check(calls, leaps)


def test_bounds_in_the_wrong_order_are_refused():
    with pytest.raises(ValidationError, match="last=1 is before first=2"):
        UniformPoints(first=2, last=1)
