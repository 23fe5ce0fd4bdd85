"""Flow-map residuals against the closed-form map of Gaussian data: N((1, -2), 0.25 I), linear path."""

import pytest
import torch

from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian
from genkit.training.parts.residuals import directional_derivative, eulerian, flow_map, lagrangian, progressive

F64 = torch.float64
LAW = Gaussian(torch.tensor([1.0, -2.0], dtype=F64), 0.5)
N = 4096


def exact(x, t, s):
    return LAW.average_velocity(x, t, s)


def perturbed(x, t, s):
    """The right diagonal, the wrong map."""
    return exact(x, t, s) + 0.1 * (t - s)[:, None] * torch.sin(x)


def diagonal(u):
    return lambda x, t: u(x, t, t)


@pytest.fixture(scope="module")
def draw():
    rng = ItemRNG(0, range(N))
    a, b = rng.uniform(dtype=F64), rng.uniform(dtype=F64)
    t, s = torch.maximum(a, b), torch.minimum(a, b)
    eps, z = rng.normal((2,), dtype=F64), rng.normal((2,), dtype=F64)
    x0 = torch.tensor([1.0, -2.0], dtype=F64) + 0.5 * z
    x = (1 - t)[:, None] * x0 + t[:, None] * eps
    return x, t, s, rng.uniform(dtype=F64), x0, eps


def residual(name, u, draw):
    x, t, s, gamma, *_ = draw
    if name == "lsd":
        return lagrangian(u, diagonal(u), x, t, s)
    if name == "esd":
        return eulerian(u, diagonal(u), x, t, s)
    return progressive(u, x, t, s, torch.full_like(gamma, 0.5) if name == "psd_m" else gamma)


@pytest.mark.parametrize("name", ["lsd", "esd", "psd_m", "psd_u"])
def test_vanishes_at_the_exact_map(name, draw):
    assert residual(name, exact, draw).square().sum(1).mean() < 1e-27


@pytest.mark.parametrize("name,value", [("lsd", 5.13e-3), ("esd", 8.69e-3), ("psd_m", 5.10e-4), ("psd_u", 2.64e-4)])
def test_mean_residual_of_the_perturbed_map(name, value, draw):
    assert residual(name, perturbed, draw).square().sum(1).mean().item() == pytest.approx(value, rel=0.15)


def test_semigroup_and_inverse(draw):
    x, t, s, gamma, *_ = draw
    w = gamma * t + (1 - gamma) * s
    there = flow_map(exact, x, t, s)
    torch.testing.assert_close(flow_map(exact, flow_map(exact, x, t, w), w, s), there, rtol=0, atol=1e-14)
    torch.testing.assert_close(flow_map(exact, there, s, t), x, rtol=0, atol=1e-13)
    assert torch.equal(flow_map(perturbed, x, t, t), x)


def test_semigroup_is_trivial_at_the_ends_of_gamma(draw):
    x, t, s, gamma, *_ = draw
    for end in (0.0, 1.0):
        r = progressive(perturbed, x, t, s, torch.full_like(gamma, end))
        assert r.abs().max() < 1e-15


def test_eulerian_equals_meanflow_with_the_marginal_velocity(draw):
    """r_ESD = -(u - (v - (t - s) du/dt)), du/dt along the flow."""
    x, t, s, *_ = draw
    v = exact(x, t, t)
    u, du = torch.func.jvp(lambda x_, t_: perturbed(x_, t_, s), (x, t), (v, torch.ones_like(t)))
    meanflow = u - (v - (t - s)[:, None] * du)
    torch.testing.assert_close(eulerian(perturbed, diagonal(perturbed), x, t, s), -meanflow, rtol=0, atol=3e-15)


def test_finite_differences_agree_with_forward_mode(draw):
    x, t, s, *_ = draw

    def f(s_):
        return flow_map(perturbed, x, t, s_)

    _, by_func = directional_derivative(f, (s,), (torch.ones_like(s),), "func", 1e-4)
    _, by_difference = directional_derivative(f, (s,), (torch.ones_like(s),), "finite_difference", 1e-4)
    assert (by_func - by_difference).norm() / by_func.norm() < 1e-6
    for r in (lagrangian, eulerian):
        one = r(perturbed, diagonal(perturbed), x, t, s, jvp="func")
        two = r(perturbed, diagonal(perturbed), x, t, s, jvp="finite_difference", step=1e-4)
        assert (one - two).abs().max() < 1e-6


class Net(torch.nn.Module):
    """u = a x + b t + c s, three separate parameters, so that gradients can be written down."""

    def __init__(self):
        super().__init__()
        self.abc = torch.nn.Parameter(torch.tensor([0.3, -0.2, 0.5], dtype=F64))

    def forward(self, x, t, s):
        a, b, c = self.abc
        return a * x + b * t[:, None] + c * s[:, None]


def gradient(loss, net):
    return torch.autograd.grad(loss, net.abc)[0]


def test_frozen_targets_get_no_gradient(draw):
    """Parameters used in the target alone receive none under the published stop-gradients, and some under ``none``."""
    x, t, s, gamma, *_ = draw
    for name, kinds in (("lsd", ("convex", "full")), ("esd", ("convex", "full"))):
        for kind, frozen in ((kinds[0], True), (kinds[1], True), ("none", False)):
            target_net = Net()
            rule = lagrangian if name == "lsd" else eulerian
            r = rule(perturbed, lambda x_, t_, n=target_net: n(x_, t_, t_), x, t, s, stopgrad=kind)
            if frozen:
                assert not r.requires_grad
            else:
                assert gradient(r.square().sum(), target_net).abs().sum() > 0


def test_full_stopgrad_of_the_eulerian_is_that_of_a_constant(draw):
    x, t, s, *_ = draw
    net = Net()
    r = eulerian(net, diagonal(net), x, t, s, stopgrad="full")
    _, dX = directional_derivative(lambda t_: flow_map(net, x, t_, s), (t,), (torch.ones_like(t),), "func", 0)
    constant = (r - dX).detach()
    expected = gradient((dX + constant).square().sum(), net)
    torch.testing.assert_close(gradient(r.square().sum(), net), expected, rtol=1e-12, atol=1e-9)
    convex = gradient(eulerian(net, diagonal(net), x, t, s, stopgrad="convex").square().sum(), net)
    assert not torch.allclose(convex, expected)


def test_progressive_target_is_frozen_but_for_none(draw):
    x, t, s, gamma, *_ = draw
    net = Net()
    r = progressive(net, x, t, s, gamma)
    target = (net(x, t, s) - r).detach()
    expected = gradient((net(x, t, s) - target).square().sum(), net)
    torch.testing.assert_close(gradient(r.square().sum(), net), expected, rtol=1e-12, atol=1e-9)
    free = gradient(progressive(net, x, t, s, gamma, stopgrad="none").square().sum(), net)
    assert not torch.allclose(free, expected)
