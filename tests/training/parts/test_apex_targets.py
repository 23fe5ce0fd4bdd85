"""The closed forms behind APEX: residual, identities, and where the literal objective ends."""

import itertools
import math

import numpy
import pytest
import torch

from genkit.denoisers import FunctionFlowMap
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.training.objectives.apex import Apex, ApexConfig
from genkit.training.objectives.base import Batch
from genkit.training.parts import apex_targets
from genkit.training.parts.losses import barron

STD = 2.0  # of the data


def variance(t, std=STD):
    return (1 - t) ** 2 * std**2 + t**2


def average_velocity(std):
    """The exact flow map of N(0, std^2), without dividing by t - s."""

    def u(x, t, s):
        root_t, root_s = variance(t, std).sqrt(), variance(s, std).sqrt()
        return ((s + t) - (2 - s - t) * std**2) / (root_t * (root_s + root_t)) * x

    return u


def residual(std, delta, intervals, conditional=False):
    """RMS of r from t = 1 to s = 0; it is linear in noise and data, so that their signs give its mean square."""
    eps, x0 = torch.tensor(list(itertools.product((-1.0, 1.0), (-std, std))), dtype=torch.float64).T
    u, t, s = average_velocity(std), torch.ones_like(eps), torch.zeros_like(eps)
    velocity = eps - x0 if conditional else u(eps, t, t)
    r = apex_targets.consistency_residual(u, u(eps, t, s), eps, t, s, velocity, delta=delta, intervals=intervals)
    return r.square().mean().sqrt().item()


@pytest.mark.parametrize("intervals", [1, 2])
def test_the_residual_vanishes_at_the_exact_map_with_the_marginal_velocity(intervals):
    assert residual(2.0, 1e-2, intervals) == pytest.approx(0.0406, abs=2e-4)
    assert residual(2.0, 1e-3, intervals) == pytest.approx(0.0040, abs=5e-5)


def test_the_residual_keeps_the_variance_of_the_samples_velocity():
    assert residual(2.0, 1e-2, 2, conditional=True) == pytest.approx(4.04, rel=0.01)
    assert residual(1.0, 1e-2, 2, conditional=True) == pytest.approx(1.01, rel=0.01)


def test_short_jumps_are_regressed_plainly():
    u = average_velocity(STD)
    x = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    t = torch.tensor([0.5, 0.005, 0.2], dtype=torch.float64)
    s = torch.tensor([0.495, 0.0, 0.2], dtype=torch.float64)
    average, velocity = u(x, t, s), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    r = apex_targets.consistency_residual(u, average, x, t, s, velocity, delta=0.01, intervals=2)
    assert torch.equal(r, average - velocity)


def test_the_mixed_loss_has_the_gradient_of_two():
    """grad L_mix = grad [(1 - lambda) L_data + lambda L_fake], and L_mix is that on clean samples times 1 / t^2."""
    g = torch.Generator().manual_seed(0)
    x, v, data, fake = (torch.randn(64, 5, generator=g, dtype=torch.float64) for _ in range(4))
    t = torch.rand(64, 1, generator=g, dtype=torch.float64)
    v.requires_grad_()

    def gradient(loss):
        return torch.autograd.grad(loss.sum(), v)[0]

    mixed = gradient((v - apex_targets.mixed_velocity(data, fake, 0.3)).square())
    two = gradient(0.7 * (v - data).square() + 0.3 * (v - fake).square())
    torch.testing.assert_close(mixed, two, rtol=1e-12, atol=1e-12)
    clean = 0.7 * (x - t * data) + 0.3 * (x - t * fake)
    torch.testing.assert_close(gradient(((x - t * v) - clean).square() / t**2), mixed, rtol=1e-9, atol=1e-9)


def test_velocities_differ_as_scores():
    """v1 - v2 = -t / (1 - t) (s1 - s2) on the linear path: along v_fake - v lies the descent of KL(fake || real)."""
    path, g = Linear(), torch.Generator().manual_seed(0)
    x, v1, v2 = (torch.randn(256, generator=g, dtype=torch.float64) for _ in range(3))
    t = 0.02 + 0.96 * torch.rand(256, generator=g, dtype=torch.float64)
    s1, s2 = (-path.convert(v, "flow_prediction", "epsilon", x, t) / t for v in (v1, v2))
    torch.testing.assert_close(v1 - v2, -t / (1 - t) * (s1 - s2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("frozen,rho", [(True, 4.0), (False, 0.8)])
def test_published_guidance_is_scale_five(frozen, rho):
    assert apex_targets.enhancement(5.0, frozen) == pytest.approx(rho)
    assert apex_targets.enhancement(1.0, frozen) == 0


def test_the_taught_guidance_is_a_fixed_point():
    v, null, u = 1.7, 0.4, 0.0
    rho = apex_targets.enhancement(5.0, frozen=False)
    for _ in range(2000):
        u = v + rho * (u - null)
    assert u == pytest.approx(null + 5 * (v - null))


def test_weights_and_decay():
    t, s = torch.tensor([1.0, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.0, 0.5, 0.1], dtype=torch.float64)
    weight = apex_targets.gap_weight(t, s)
    assert weight[0] == 1
    assert weight[1].item() == pytest.approx(4.08, abs=0.005)
    assert weight[2].item() == pytest.approx(1 + math.tan(0.32 * math.pi))
    kappa, seen = torch.zeros((), dtype=torch.float64), []
    for _ in range(600):
        kappa = apex_targets.next_decay(kappa, 0.9)
        seen.append(kappa.item())
    assert seen[0] == pytest.approx(0.45) and seen == sorted(seen) and seen[-1] == pytest.approx(0.9, abs=1e-6)


def test_the_bounded_error_has_a_bounded_gradient():
    u = torch.linspace(-1e3, 1e3, 50, dtype=torch.float64)[:, None].repeat(1, 4).requires_grad_()
    error = barron(u.square().mean(1), 1e-3)
    torch.testing.assert_close(error, u.square().mean(1).sqrt(), rtol=1e-6, atol=1e-6)
    error.sum().backward()
    assert u.grad.norm(dim=1).max() < 2


# -- where the literal objective ends ---------------------------------------------------------------------------------

# Many times: the fixed point has a kink in t where lambda is large.
NODES, WEIGHTS = (torch.from_numpy(v) for v in numpy.polynomial.legendre.leggauss(200))
TIMES = (NODES + 1) / 2
# All signs of (x0, eps, z): the losses are parabolas, so that second moments are all that counts, and these are exact.
SIGNS = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=3)), dtype=torch.float64)


class Slopes(torch.nn.Module):
    """A linear velocity at every time of ``TIMES``, in two branches that the sign of the condition tells apart."""

    def __init__(self):
        super().__init__()
        self.real = torch.nn.Parameter(torch.zeros(len(TIMES), dtype=torch.float64))
        self.fake = torch.nn.Parameter(torch.zeros(len(TIMES), dtype=torch.float64))

    def forward(self, x, t, s, prompt_embeds):
        slope = torch.where(
            prompt_embeds.flatten() > 0, *(k.repeat_interleave(len(SIGNS)) for k in (self.real, self.fake))
        )
        return slope[:, None] * x


class Draws:
    """Those of ``SIGNS`` as what items draw; its noise and its fresh noise, both times the same."""

    def __init__(self):
        self.normals = iter((SIGNS[:, 1:2], SIGNS[:, 2:]))

    def uniform(self):
        return TIMES.repeat_interleave(len(SIGNS))

    def normal(self, shape, dtype):
        return next(self.normals).repeat(len(TIMES), 1)


def sampled_std(mix, reuse):
    """Of what the flow draws whose velocity is the literal loss's fixed point; and the slope of that at ``t -> 1``."""
    student = FunctionFlowMap(Slopes(), Linear())
    loss = dict(form="literal", mix=mix, fake_reuse_noise=reuse)
    objective = Apex(ApexConfig(loss=loss, shift=dict(kind="condition", a=-1), condition_dropout=0), student)
    x0 = STD * SIGNS[:, :1].repeat(len(TIMES), 1)
    batch = Batch(x0, Condition({"prompt_embeds": torch.ones(len(x0), 1, 1)}), torch.arange(len(x0)))
    (phase,) = objective.phases(0)
    for _ in range(2000):
        for branch in (student.network.fake, student.network.real):  # each loss is a parabola in one of them
            value = objective(phase, batch, Draws()).value
            (gradient,) = torch.autograd.grad(value, branch, create_graph=True)
            (curvature,) = torch.autograd.grad(gradient.sum(), branch)
            step = (gradient / curvature).detach()
            with torch.no_grad():
                branch -= step
        if step.abs().max() < 1e-6:
            break
    slopes = student.network.real.detach()
    return torch.exp(-(slopes * WEIGHTS / 2).sum()).item(), slopes


@pytest.mark.parametrize(
    "mix,reuse,std",
    [(0, False, 2.0), (0.25, False, 1.832), (0.5, False, 1.618), (0.75, False, 1.326), (0.9, False, 1.092)]
    + [(0.25, True, 1.883), (0.5, True, 1.739), (0.75, True, 1.543), (0.9, True, 1.358)],
)
def test_the_literal_objective_narrows_the_flow_and_makes_no_one_step_generator(mix, reuse, std):
    got, slopes = sampled_std(mix, reuse)
    assert got == pytest.approx(std, abs=2e-3)
    # The clean sample (1 - t k) x that a single step from t -> 1 gives is the mean, 0.
    assert (1 - TIMES * slopes)[-1].abs() < 1e-3 > (1 - slopes[-1]).abs()
