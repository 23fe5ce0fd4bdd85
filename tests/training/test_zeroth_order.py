import math

import pytest
import torch

from genkit.training.parts.zeroth_order import Subspace, estimate

F64 = torch.float64


def estimates(count, *, d=768, n=2, curvature=0.0, step=1e-3, project=None, signs=False, seed=0):
    """Cosines with the gradient, inner products with it and squared norms of estimates at a gradient of length 1."""
    generator = torch.Generator().manual_seed(seed)
    g = torch.zeros(d, dtype=F64)
    if signs:  # of which the square is one along every axis, so not along one
        g[:] = d**-0.5
    else:
        g[0] = 1

    def loss(theta):
        return theta @ g + curvature * theta @ theta / 2

    cosines, products, squares = [], [], []
    for _ in range(count):
        directions = torch.randn(n, d, dtype=F64, generator=generator)
        directions = directions.sign() if signs else directions
        found, _ = estimate(loss, torch.zeros(d, dtype=F64), directions, step)
        found = found if project is None else project(found)
        products.append(found @ g)
        squares.append(found @ found)
        cosines.append(found @ g / found.norm())
    return torch.stack(cosines), torch.stack(products), torch.stack(squares)


def test_estimate_is_unbiased_and_as_long_as_predicted():
    count, d, n = 4000, 768, 2
    cosines, products, squares = estimates(count)
    assert abs(products.mean() - 1) < 4 * products.std() / math.sqrt(count)
    assert products.std() / math.sqrt(count) < 0.03
    expected = (d + n + 1) / n
    assert expected == 385.5
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(count)
    mean = math.sqrt(2 / d) * math.exp(math.lgamma((n + 1) / 2) - math.lgamma(n / 2))
    assert mean == pytest.approx(0.0452, abs=1e-4)
    assert abs(cosines.mean() - mean) < 4 * cosines.std() / math.sqrt(count)
    assert cosines.square().mean().sqrt() == pytest.approx(math.sqrt(n / (n + d)), rel=0.05)


def test_curvature_adds_to_its_length():
    _, _, squares = estimates(4000, curvature=1.0)
    assert abs(squares.mean() - 425) < 4 * squares.std() / math.sqrt(4000)


@pytest.mark.parametrize("n", [1, 2, 8, 32])
def test_variance_falls_with_the_number_of_directions(n):
    d, count = 50, 2000
    _, _, squares = estimates(count, d=d, n=n)
    assert abs(squares.mean() - (d + n + 1) / n) < 4 * squares.std() / math.sqrt(count)


def test_subspace_with_the_gradient_makes_it_more_alike():
    some = 100
    cosines, _, _ = estimates(4000, project=lambda g: torch.cat((g[:some], torch.zeros(len(g) - some, dtype=F64))))
    assert abs(cosines.mean() - 0.125) < 4 * cosines.std() / math.sqrt(4000)
    assert cosines.square().mean().sqrt() == pytest.approx(math.sqrt(2 / (2 + some)), rel=0.05)


def test_central_differences_are_exact_on_a_quadratic():
    generator = torch.Generator().manual_seed(0)
    d = 20
    a = torch.randn(d, d, dtype=F64, generator=generator)
    theta = torch.randn(d, dtype=F64, generator=generator)
    gradient = (a + a.T) @ theta
    basis = torch.eye(d, dtype=F64)
    found, value = estimate(lambda x: x @ a @ x, theta, basis, 1e-2, central=True)
    torch.testing.assert_close(found * d, gradient, rtol=1e-10, atol=1e-10)
    around = theta @ a @ theta + 1e-4 * a.diagonal().mean()  # the mean of all that was asked
    torch.testing.assert_close(value, around, rtol=1e-10, atol=1e-10)
    forward, _ = estimate(lambda x: x @ a @ x, theta, basis, 1e-2)
    torch.testing.assert_close(forward * d - gradient, 1e-2 * a.diagonal(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("n", [1, 2, 8])
def test_signs_are_unbiased_and_as_long_as_predicted(n):
    d, count = 50, 2000
    _, products, squares = estimates(count, d=d, n=n, signs=True)
    assert abs(products.mean() - 1) < 4 * products.std() / math.sqrt(count)
    expected = (d + n - 1) / n
    assert abs(squares.mean() - expected) < 4 * squares.std() / math.sqrt(count)


@pytest.mark.parametrize("central, losses", [(False, 4), (True, 6)])
def test_number_of_losses(central, losses):
    seen = []
    estimate(lambda x: seen.append(1) or x.sum(), torch.zeros(5), torch.randn(3, 5), 1e-3, central=central)
    assert len(seen) == losses


def test_vector_is_not_touched():
    theta = torch.randn(7)
    before, seen = theta.clone(), []
    estimate(lambda x: seen.append(x) or x.square().sum(), theta, torch.randn(3, 7), 1e-3)
    assert torch.equal(theta, before) and all(x is theta or x.data_ptr() != theta.data_ptr() for x in seen)


def walked(projection, noise, d=768, window=128, **settings):
    """A subspace that has seen a random walk with 20 strong directions."""
    generator = torch.Generator().manual_seed(1)
    strong = torch.linalg.qr(torch.randn(d, 20, dtype=F64, generator=generator))[0]
    subspace, value = Subspace(d, window, 1e-3, projection, **settings).double(), torch.zeros(d, dtype=F64)
    for _ in range(window):
        value = value + strong @ torch.randn(20, dtype=F64, generator=generator)
        subspace.push(value + noise * torch.randn(d, dtype=F64, generator=generator))
    return subspace


@pytest.mark.parametrize("noise", [0.02, 0.1])
def test_projector(noise):
    d, window = 768, 128
    top, tail = walked("retain_top", noise), walked("drop_tail", noise)
    eye = torch.eye(d, dtype=F64)
    for subspace in (top, tail):
        p = torch.stack([subspace.project(e) for e in eye])
        torch.testing.assert_close(p, p.T, rtol=0, atol=1e-12)
        torch.testing.assert_close(p @ p, p, rtol=0, atol=1e-12)
        assert round(float(p.trace())) == d - subspace.removed
    # Values less their mean span one dimension less than there are of them.
    assert top.removed - tail.removed == d - (window - 1)
    assert 0 < tail.removed < window and top.removed > 0.8 * d
    g = torch.randn(d, dtype=F64)
    assert top.project(g).norm() < tail.project(g).norm() <= g.norm()


def test_gradients_pass_until_the_window_is_full_and_in_released_windows():
    d, window = 12, 4
    subspace, g = Subspace(d, window, 1e-3, "retain_top", release_every=2), torch.randn(d)
    removed = []
    for _ in range(4 * window):
        removed.append(subspace.removed)
        assert torch.equal(subspace.project(g), g) == (subspace.removed == 0)
        subspace.push(torch.randn(d))
    assert [bool(r) for r in removed] == [False] * 4 + [True] * 4 + [False] * 4 + [True] * 4


def test_values_that_do_not_move_leave_gradients_alone():
    subspace, g = Subspace(5, 3, 1e-3, "retain_top"), torch.randn(5)
    for _ in range(6):
        subspace.push(torch.ones(5))
    assert torch.equal(subspace.project(g), g)


def test_subspace_goes_on_after_a_restart():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(11, 6, generator=generator)
    whole, first = (Subspace(6, 4, 1e-3, "drop_tail", release_every=3) for _ in range(2))
    for value in values:
        whole.push(value)
    for value in values[:6]:
        first.push(value)
    second = Subspace(6, 4, 1e-3, "drop_tail", release_every=3)
    second.load_state_dict(first.state_dict())
    for value in values[6:]:
        second.push(value)
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key])


def test_loss_falls_through_what_has_no_derivative():
    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(16, generator=generator)
    theta = torch.nn.Parameter(torch.zeros(16))
    optimizer = torch.optim.Adam([theta], lr=0.05, eps=1e-3)

    def loss(x):
        return ((x * 500).round() / 500 - wanted).square().mean()

    start = float(loss(theta.detach()))
    for _ in range(400):
        theta.grad, _ = estimate(loss, theta.detach(), torch.randn(4, 16, generator=generator), 0.02)
        optimizer.step()
    assert float(loss(theta.detach())) < 0.05 * start
