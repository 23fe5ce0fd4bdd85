"""Average-velocity identities against the closed-form map of N((1, -2), 0.25 I) on the linear path, in float64."""

import math

import pytest
import torch

from genkit.denoisers import FunctionDenoiser, FunctionFlowMap
from genkit.denoisers.base import Condition
from genkit.interpolants import PREDICTION_TYPES, Linear, Trigonometric, VariancePreserving
from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian
from genkit.training.parts.mean_velocity import (
    Angle,
    consistency_tangent,
    guided_target,
    mean_flow,
    solution_consistency,
    total_derivative,
)
from genkit.training.parts.residuals import eulerian

F64 = torch.float64
MEAN = torch.tensor([1.0, -2.0], dtype=F64)
LAW = Gaussian(MEAN, 0.5)
N = 4096


def exact(x, t, s):
    return LAW.average_velocity(x, t, s)


def perturbed(x, t, s):
    """The right diagonal, the wrong map."""
    return exact(x, t, s) + 0.1 * (t - s)[:, None] * torch.sin(x)


@pytest.fixture(scope="module")
def draw():
    rng = ItemRNG(0, range(N))
    a, b = rng.uniform(dtype=F64), rng.uniform(dtype=F64)
    t, s = torch.maximum(a, b), torch.minimum(a, b)
    eps, x0 = rng.normal((2,), dtype=F64), MEAN + 0.5 * rng.normal((2,), dtype=F64)
    return (1 - t)[:, None] * x0 + t[:, None] * eps, t, s, eps - x0


def square(r):
    return r.square().sum(1).mean().item()


# -- MeanFlow ------------------------------------------------------------------------------------------------------


def test_mean_flow_vanishes_at_the_exact_map(draw):
    x, t, s, _ = draw
    v = exact(x, t, t)
    assert square(mean_flow(exact, v, v, x, t, s, jvp="func")[0]) < 1e-30


def test_mean_flow_of_the_perturbed_map_is_minus_the_eulerian_residual(draw):
    x, t, s, _ = draw
    v = perturbed(x, t, t)
    r, _ = mean_flow(perturbed, v, v, x, t, s, jvp="func")
    assert square(r) == pytest.approx(8.69e-3, rel=0.15)
    torch.testing.assert_close(r, -eulerian(perturbed, lambda x, t: perturbed(x, t, t), x, t, s), rtol=0, atol=3e-15)


def test_what_is_left_with_the_datas_velocity_is_variance(draw):
    """0.868 with the data's velocity as tangent, 1.187 with the network's own, which is all of E|v - v_c|^2."""
    x, t, s, v_c = draw
    v = exact(x, t, t)
    spread = square(v - v_c)
    assert spread == pytest.approx(1.187, rel=0.05)
    assert square(mean_flow(exact, v_c, v_c, x, t, s, jvp="func")[0]) == pytest.approx(0.868, rel=0.05)
    own = square(mean_flow(exact, v_c, v, x, t, s, jvp="func")[0])
    assert own == pytest.approx(spread, rel=1e-12)


def test_mean_flow_with_the_datas_velocity_is_unbiased():
    """Averaged over data and noise that share ``x_t``, the target is the one of the marginal velocity."""
    n, t, s = 50_000, 0.6, 0.2
    x = torch.tensor([[0.3, -0.9]], dtype=F64)
    # The posterior of x0 given x_t = x is Gaussian too.
    variance = (1 - t) ** 2 * 0.25 + t**2
    centre = MEAN + (1 - t) * 0.25 / variance * (x - (1 - t) * MEAN)
    x0 = centre + 0.5 * t / math.sqrt(variance) * ItemRNG(3, range(n)).normal((2,), dtype=F64)
    v_c = (x - x0) / t  # eps - x0
    times = torch.full((n,), t, dtype=F64), torch.full((n,), s, dtype=F64)
    r, _ = mean_flow(exact, v_c, v_c, x.expand(n, 2), *times, jvp="func")
    error = r.mean(0).abs() / (r.std(0) / math.sqrt(n))
    assert (r.std(0) > 0.1).all() and (error < 4).all()


def test_only_the_value_has_a_gradient(draw):
    x, t, s, v_c = (d[:5] for d in draw)
    a, b = (torch.tensor(0.3, dtype=F64, requires_grad=True) for _ in range(2))

    def u(x_, t_, s_):
        return a * x_ + b * t_[:, None]

    r, derivative = mean_flow(u, v_c, v_c, x, t, s, jvp="func")
    assert not derivative.requires_grad
    torch.testing.assert_close(derivative, a.detach() * v_c + b.detach(), rtol=1e-14, atol=1e-14)
    r.sum().backward()
    torch.testing.assert_close(a.grad, x.sum())
    torch.testing.assert_close(b.grad, t.sum() * 2)


def test_finite_differences_agree_with_forward_mode(draw):
    x, t, s, v_c = draw

    def at(x_, t_):
        return perturbed(x_, t_, s)

    inside = (t - s > 2e-4) & (t < 1 - 1e-4)
    by_func = total_derivative(at, v_c, x, t, jvp="func")
    by_difference = total_derivative(at, v_c, x, t, low=s, jvp="finite_difference", step=1e-4)
    assert ((by_func - by_difference)[inside].norm() / by_func[inside].norm()) < 1e-6


def test_finite_differences_stay_between_the_end_time_and_noise():
    """At an end they are one-sided, and still exact for what is linear along the way."""
    t = torch.tensor([0.3, 0.301, 0.65, 1.0], dtype=F64)
    s = torch.full_like(t, 0.3)
    x = torch.ones(4, 2, dtype=F64)
    asked = []

    def fn(x_, t_):
        asked.append(t_)
        return 3 * x_ + 5 * t_[:, None]

    v = torch.full_like(x, 2.0)
    got = total_derivative(fn, v, x, t, low=s, jvp="finite_difference", step=0.01)
    torch.testing.assert_close(got, torch.full_like(x, 11.0))
    assert torch.cat(asked).min() >= 0.3 - 1e-12 and torch.cat(asked).max() <= 1 + 1e-12
    assert torch.stack(asked)[:, 2].sub(0.65).abs().max() < 0.011  # in the middle it is central


def test_half_precision_autocast_does_not_enter_the_derivative():
    layer = torch.nn.Linear(2, 2)
    x, t = torch.randn(3, 2), torch.full((3,), 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        got = total_derivative(lambda x_, t_: layer(x_), x, x, t, jvp="func")
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, x @ layer.weight.T)


# -- SoFlow --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rho, value", [(0.02, 1.33e-5), (0.002, 1.29e-7)])
def test_solution_consistency_is_of_second_order_at_the_exact_map(rho, value, draw):
    x, t, s, _ = draw
    _, dq = solution_consistency(exact, exact(x, t, t), x, t, s, t + rho * (s - t))
    assert square(dq) == pytest.approx(value, rel=0.15)


def test_solution_consistency_is_the_difference_of_two_solutions(draw):
    x, t, s, v = draw
    middle = t + 0.3 * (s - t)

    def f(x_, t_):
        return x_ + (s - t_)[:, None] * perturbed(x_, t_, s)

    u, dq = solution_consistency(perturbed, v, x, t, s, middle)
    literal = (f(x, t) - f(x + (middle - t)[:, None] * v, middle)) / (t - middle)[:, None]
    wide = t - s > 1e-3  # where the division does not drown it
    torch.testing.assert_close(dq[wide], literal[wide], rtol=0, atol=1e-10)
    assert torch.equal(u, perturbed(x, t, s))


def test_solution_consistency_becomes_mean_flow(draw):
    x, t, s, _ = draw
    v = perturbed(x, t, t)
    _, dq = solution_consistency(perturbed, v, x, t, s, t + 1e-5 * (s - t))
    r, _ = mean_flow(perturbed, v, v, x, t, s, jvp="func")
    assert (dq + r).abs().max() < 1e-4
    assert r.abs().max() > 0.1


# -- guidance ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scale, mix, effective",
    [(0.2 / 0.08, 0.92, 2.5), (1 / 0.5, 0.5, 2.0), (3.0, 0.75, 3.0), (4.0, 0.75, 4.0), (1.0, 0.5, 1.0)],
    ids=["mean_flow_xl", "mean_flow_b", "so_flow", "improved_mean_flow", "none"],
)
def test_the_fixed_point_is_the_guided_velocity(scale, mix, effective):
    """Iterate ``u_c <- target(u_c)`` from anywhere: ``u_n + w (v - u_n)``."""
    v = torch.tensor([[1.0, -2.0]], dtype=F64)
    state = {1: torch.tensor([[9.0, 9.0]], dtype=F64), 0: torch.tensor([[0.25, 0.5]], dtype=F64)}

    def net(x, t, s, label):
        return torch.cat([state[int(i)] for i in label])

    student = FunctionFlowMap(net, Linear())
    condition = Condition({"label": torch.tensor([1])}, {"label": torch.tensor([0])})
    one = torch.ones(1, dtype=F64)
    for _ in range(420):
        state[1] = guided_target(student, v, one / 2, condition, v, scale * one, mix * one)
    torch.testing.assert_close(state[1], state[0] + effective * (v - state[0]), rtol=1e-12, atol=1e-12)


def test_without_guidance_the_target_is_the_datas(draw):
    x, t, _, v = (d[:4] for d in draw)
    student = FunctionFlowMap(lambda x, t, s, label: label[:, None] * x, Linear())
    condition = Condition({"label": torch.ones(4)}, {"label": torch.zeros(4)})
    assert torch.equal(guided_target(student, x, t, condition, v, torch.ones(4), torch.zeros(4)), v)


# -- sCM -----------------------------------------------------------------------------------------------------------


PATHS = [Linear(), Trigonometric(), VariancePreserving()]


def consistency_sample(path, law):
    """The clean sample at the end of the flow from ``(x, t)``."""
    return lambda x, t: law.flow_map(x, t, torch.zeros_like(t))


def tangent(path, law, student, prediction_type, x, t, v, sigma_data, **settings):
    def F(x_, t_):
        return Angle(path, t_, sigma_data).velocity(student(x_, t_), prediction_type, x_)

    return consistency_tangent(F, F(x, t), Angle(path, t, sigma_data), v, x, **settings)


def points(path, law):
    rng = ItemRNG(5, range(256))
    t = 0.02 + 0.96 * rng.uniform(dtype=F64)
    x0, eps = MEAN + 0.5 * rng.normal((2,), dtype=F64), rng.normal((2,), dtype=F64)
    return path.interpolate(x0, eps, t), t, x0, eps


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_the_tangent_vanishes_at_the_exact_consistency_model(path, prediction_type):
    law = Gaussian(MEAN, 0.5, interpolant=path)
    x, t, *_ = points(path, law)
    solution = consistency_sample(path, law)

    def student(x_, t_):
        return path.convert(solution(x_, t_), "sample", prediction_type, x_, t_)

    g = tangent(path, law, student, prediction_type, x, t, law.velocity(x, t), 0.5, jvp="func")
    assert g.abs().max() < 1e-9
    off = tangent(path, law, student, prediction_type, x, t, law.velocity(x, t) + 0.1, 0.5, jvp="func")
    assert off.abs().max() > 1e-3


@pytest.mark.parametrize("sigma_data", [0.5, 1.0])
def test_the_tangent_is_cos_times_the_derivative_of_the_clean_sample(sigma_data):
    """On TrigFlow's own path, with its formulas: x = cos x0 + sin z, z of std sigma_data, f = cos x - sin F."""
    theta = torch.linspace(0.1, 1.4, 64, dtype=F64)
    rng = ItemRNG(2, range(64))
    x0, z = rng.normal((2,), dtype=F64), sigma_data * rng.normal((2,), dtype=F64)
    cos, sin = theta.cos()[:, None], theta.sin()[:, None]
    x, dx = cos * x0 + sin * z, cos * z - sin * x0

    def network(x_, theta_):  # sigma_data F
        return torch.sin(x_ + 2 * theta_[:, None]) * x_.flip(1)

    def f(x_, theta_):
        return theta_.cos()[:, None] * x_ - theta_.sin()[:, None] * network(x_, theta_)

    _, df = torch.func.jvp(f, (x, theta), (dx, torch.ones_like(theta)))
    F, J = torch.func.jvp(network, (x, theta), (cos * sin * dx, theta.cos() * theta.sin()))
    for k in (1.0, 0.3):
        expected = -(cos**2) * (F - dx) - k * (cos * sin * x + J)
        if k == 1:
            torch.testing.assert_close(expected, cos * df, rtol=1e-12, atol=1e-12)
        # The same model on the linear path, as a flow model: t with the same noise-to-signal ratio, x scaled.
        path, ratio = Linear(), theta.tan() * sigma_data
        t = ratio / (1 + ratio)
        scale = Angle(path, t, sigma_data).scale[:, None] / sigma_data

        def student(x_, t_, path=path):
            angle = Angle(path, t_, sigma_data)
            trig = x_ * (sigma_data / angle.scale)[:, None]
            value = network(trig, torch.atan2(angle.sin, angle.cos))
            clean = angle.cos[:, None] * trig - angle.sin[:, None] * value
            return path.convert(clean, "sample", "flow_prediction", x_, t_)

        v = path.velocity(x0, z / sigma_data, t)
        got = tangent(path, None, student, "flow_prediction", scale * x, t, v, sigma_data, warmup=k, jvp="func")
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
def test_the_angle_is_that_of_the_path(path):
    t = torch.linspace(0.05, 0.95, 19, dtype=F64)
    angle = Angle(path, t, 0.5)
    torch.testing.assert_close(angle.sin / angle.cos, path.sigma(t) / (0.5 * path.alpha(t)))
    later, before = (Angle(path, t + h, 0.5) for h in (1e-6, -1e-6))
    rate = (torch.atan2(later.sin, later.cos) - torch.atan2(before.sin, before.cos)) / 2e-6
    torch.testing.assert_close(angle.rate, rate, rtol=1e-6, atol=1e-8)
    # dx'/d theta of the ends themselves
    rng = ItemRNG(4, range(19))
    x0, eps = rng.normal((2,), dtype=F64), rng.normal((2,), dtype=F64)
    got = angle.velocity(path.velocity(x0, eps, t), "flow_prediction", path.interpolate(x0, eps, t))
    expected = angle.cos[:, None] * 0.5 * eps - angle.sin[:, None] * x0
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_denoisers_of_every_prediction_type_give_one_tangent():
    path = Linear()
    law = Gaussian(MEAN, 0.5, interpolant=path)
    x, t, x0, eps = points(path, law)
    v = path.velocity(x0, eps, t)
    got = []
    for prediction_type in PREDICTION_TYPES:
        denoiser: FunctionDenoiser = law.denoiser(prediction_type)
        student = lambda x_, t_, d=denoiser: d(x_, t_).raw  # noqa: E731
        got.append(tangent(path, law, student, prediction_type, x, t, v, 0.5, jvp="func"))
    for g in got[1:]:
        torch.testing.assert_close(g, got[0], rtol=1e-9, atol=1e-9)
