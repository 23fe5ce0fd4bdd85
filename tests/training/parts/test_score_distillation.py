"""The estimator of score distillation against closed forms in one dimension."""

import math

import pytest
import torch

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition, Prediction
from genkit.interpolants import PREDICTION_TYPES, Linear, Trigonometric, VariancePreserving
from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian, GaussianMixture
from genkit.training.parts.annealing import Constant, LinearSchedule, SquareRoot, StepSchedule
from genkit.training.parts.score_distillation import (
    Teacher,
    ask,
    gradient_loss,
    moving_target,
    reconstruction_loss,
    residual,
    safe,
    weights,
)

PATHS = [Linear(), VariancePreserving(), Trigonometric()]
MEAN, STD = 1.0, 0.7


def draws(n, path, low=0.02, high=0.98):
    rng = ItemRNG(0, range(n))
    x, eps = (rng.normal((1,), dtype=torch.float64) for _ in range(2))
    t = low + (high - low) * rng.uniform(dtype=torch.float64)
    return x.requires_grad_(), eps, t, path.interpolate(x, eps, t).detach()


def gradient(loss, x):
    return torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("kind", ["sigma2", "alpha_sigma2", "one", "dmd"])
def test_the_reconstruction_form_is_the_gradient_form(path, kind):
    x, eps, t, x_t = draws(1000, path)
    teacher = Gaussian([MEAN], STD, interpolant=path).denoiser("epsilon")
    r = residual("sds", ask(teacher, x_t, t, Condition(), null=False), eps)
    w = weights(kind, t, path, r)
    target = moving_target(x, r, t, path)
    clean = teacher(x_t, t).sample
    torch.testing.assert_close(target, clean, rtol=0, atol=1e-12)
    g = gradient(gradient_loss(x, r, w), x)
    again = gradient(reconstruction_loss(x, target, w, t, path), x)
    (w, r, alpha, sigma) = (v.view(-1, 1) for v in (w, r, path.alpha(t), path.sigma(t)))
    rounding = 4.5e-16 * ((1 + w * alpha / sigma) * (1 + x.detach().abs()) + 4 * (w * r).abs())
    assert ((g - again).abs() < rounding).all() and ((g - w * r).abs() < rounding).all()
    if kind == "sigma2":
        assert (g - again).abs().max() <= 7e-16


def test_a_velocity_residual_weighs_otherwise():
    path = Linear()
    x, eps, _, _ = draws(10, path)
    t = torch.full((10,), 0.37, dtype=torch.float64)
    x_t = path.interpolate(x, eps, t).detach()
    prediction = Gaussian([MEAN], STD).denoiser("flow_prediction")(x_t, t)
    ratio = (prediction.velocity - (eps - x)) / (prediction.epsilon - eps)
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / (1 - 0.37)), rtol=1e-12, atol=0)
    assert ratio[0].item() == pytest.approx(1.5873, abs=5e-5)


def test_mean_and_variance_at_one_place():
    path, t, x = Linear(), 0.37, 2.0
    n = 2_000_000
    eps = torch.randn(n, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = torch.full((n,), t, dtype=torch.float64)
    x_t = path.interpolate(torch.full_like(eps, x), eps, times)
    r = residual("sds", ask(Gaussian([MEAN], STD).denoiser("epsilon"), x_t, times, Condition(), null=False), eps)
    alpha, sigma = 1 - t, t
    total = alpha**2 * STD**2 + sigma**2
    mean, variance = sigma * alpha * (x - MEAN) / total, (alpha**2 * STD**2 / total) ** 2
    assert mean == pytest.approx(0.70342, abs=5e-6) and variance == pytest.approx(0.3444, abs=5e-5)
    assert r.mean().item() == pytest.approx(mean, abs=4 * (variance / n) ** 0.5)
    assert r.var().item() == pytest.approx(variance, rel=4 * (2 / n) ** 0.5)


SCHEDULES = {
    # mean and spread of the particles in the major mode, and their share; each with what 400 particles allow.
    "uniform": (Constant(), 1.684, 0.049, 1.0),
    "to one half": (LinearSchedule(end=0.5), 1.961, 0.019, 1.0),
    "to one tenth": (LinearSchedule(end=0.1), 1.926, None, 0.99),
    "low": (Constant(high=0.3), None, None, 0.0),
}


@pytest.mark.parametrize(
    "name", ["uniform", "low", *(pytest.param(n, marks=pytest.mark.slow) for n in ("to one half", "to one tenth"))]
)
def test_annealing_decides_which_mode_is_found_and_how_blurred(name):
    """0.8 N(2, .3^2) + 0.2 N(-2, .3^2), 400 particles from -1, weight sigma^2, plain SGD of rate 0.05."""
    schedule, mean, std, share = SCHEDULES[name]
    law = GaussianMixture([[2.0], [-2.0]], 0.3, [0.8, 0.2])
    teacher, path = law.denoiser("epsilon"), law.interpolant
    x = torch.full((400, 1), -1.0, dtype=torch.float64)
    for step in range(1500):
        rng = ItemRNG(step, range(400))
        t = schedule.draw(rng, step / 1500).double()
        eps = rng.normal((1,), dtype=torch.float64)
        x.requires_grad_()
        x_t = path.interpolate(x.detach(), eps, t)
        r = residual("sds", ask(teacher, x_t, t, Condition(), null=False), eps)
        x = (x - 0.05 * gradient(gradient_loss(x, r, weights("sigma2", t, path, r)), x)).detach()
    major = x > 0
    assert major.double().mean().item() == pytest.approx(share, abs=0.011 if 0 < share < 1 else 0)
    if std is not None:
        assert x.mean().item() == pytest.approx(mean, abs=0.01)
        assert x.std().item() == pytest.approx(std, rel=0.2)
    elif mean is not None:
        # The few that are stuck weigh on the mean: about 4 |share|.
        assert x.mean().item() == pytest.approx(mean, abs=0.05)


def test_a_fake_that_is_the_teacher_gives_exactly_nothing():
    for path in PATHS:
        x, eps, t, x_t = draws(50, path)
        for kind in PREDICTION_TYPES:
            teacher = Gaussian([MEAN], STD, interpolant=path).denoiser(kind)
            seen = ask(teacher, x_t, t, Condition(), null=False)
            for method, kind_of_weight in (("vsd", "sigma2"), ("dmd", "dmd")):
                r = residual(method, seen, eps, fake=teacher(x_t, t).epsilon)
                g = gradient(gradient_loss(x, r, weights(kind_of_weight, t, path, seen.epsilon() - eps)), x)
                assert (g == 0).all()


@pytest.mark.parametrize("path", PATHS, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("method", ["sds", "sjc", "csd", "nfsd", "vsd", "dmd"])
def test_any_prediction_type_gives_the_same(method, path):
    x, eps, t, x_t = draws(40, path)
    two = GaussianMixture([[1.0], [-1.0]], 0.5, labels=[0, 1], interpolant=path)
    labels = torch.arange(40) % 2
    condition = Condition({"class_labels": labels}, {"class_labels": torch.full((40,), 2)})
    negative = Condition({"class_labels": 1 - labels}) if method == "nfsd" else None
    seen = {}
    for kind in PREDICTION_TYPES:
        parts = ask(two.denoiser(kind), x_t, t, condition, null=True, negative=negative)
        fake = Gaussian([0.3], 0.4, interpolant=path).denoiser(kind)(x_t, t).epsilon
        r = residual(method, parts, eps, 3.0, fake)
        w = weights("dmd" if method == "dmd" else "sigma2", t, path, parts.epsilon(3.0) - eps)
        seen[kind] = gradient(gradient_loss(x, r, w), x)
    for other in seen.values():
        torch.testing.assert_close(other, seen["epsilon"], rtol=0, atol=1e-10)
    assert seen["epsilon"].abs().max() > 1e-3


def predictions(shape=(2, 3)):
    z = torch.zeros(shape)
    make = [torch.full(shape, v) for v in (1.0, 3.0, 10.0)]
    cond, null, negative = (Prediction(v, "epsilon", Linear(), z, torch.tensor([0.1, 0.6])) for v in make)
    return Teacher(cond, null, negative)


def test_what_each_method_subtracts():
    teacher, eps, fake = predictions(), torch.full((2, 3), 0.5), torch.full((2, 3), 0.25)
    value = {m: residual(m, teacher, eps, 2.0, fake)[:, 0].tolist() for m in ("sds", "sjc", "csd", "nfsd", "vsd")}
    assert value == {
        "sds": [-1.5, -1.5],  # e_T = 3 + 2 (1 - 3) = -1
        "sjc": [-1.0, -1.0],
        "csd": [-2.0, -2.0],
        "nfsd": [3.0 - 4.0, -7.0 - 4.0],  # below t = 0.2 the noise is the unconditional prediction
        "vsd": [-1.25, -1.25],
    }


def test_weights():
    path, t = Linear(), torch.tensor([0.25, 0.5], dtype=torch.float64)
    error = torch.tensor([[1.0, -3.0], [0.0, 0.0]], dtype=torch.float64)
    assert weights("sigma2", t, path, error).tolist() == [0.0625, 0.25]
    assert weights("alpha_sigma2", t, path, error).tolist() == [0.75 * 0.0625, 0.125]
    assert weights("one", t, path, error).tolist() == [1, 1]
    assert weights("dmd", t, path, error).tolist() == [0.5, 1e6]  # not infinite where the teacher agrees


def test_dmd_weighs_as_published():
    """(x_fake - x_T) / mean|x - x_T|, also at alpha = 0, where neither clean sample exists for an epsilon model."""
    path = VariancePreserving()
    x, eps, t, x_t = draws(30, path)
    real = Gaussian([MEAN], STD, interpolant=path).denoiser("epsilon")(x_t, t)
    fake = Gaussian([0.2], 0.4, interpolant=path).denoiser("epsilon")(x_t, t)
    r = residual("dmd", Teacher(real), eps, fake=fake.epsilon)
    g = weights("dmd", t, path, real.epsilon - eps)[:, None] * r
    published = (fake.sample - real.sample) / (x - real.sample).abs()
    torch.testing.assert_close(g, published.detach(), rtol=1e-9, atol=1e-9)
    end = torch.ones(30, dtype=torch.float64)
    assert weights("dmd", end, Trigonometric(), r).isfinite().all()


def test_items_that_are_not_finite_are_dropped_and_large_ones_clipped():
    r = torch.tensor([[3.0, 4.0], [float("nan"), 1.0], [float("inf"), 1.0], [0.3, 0.4]])
    w = torch.tensor([2.0, 1.0, 1.0, 1.0])
    residual_, weight, dropped = safe(r, w, clip=1.0)
    assert dropped.tolist() == [False, True, True, False]
    assert residual_[1:3].eq(0).all() and weight[1:3].eq(0).all()
    size = (weight[:, None] * residual_).square().mean(1).sqrt()
    torch.testing.assert_close(size[0], torch.tensor(1.0))
    assert weight[3] == 1
    assert torch.equal(safe(r[[0, 3]], w[[0, 3]])[1], w[[0, 3]])


def test_reductions_differ_by_the_number_of_elements():
    x, r = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    w, t = torch.rand(3), torch.full((3,), 0.4)
    for loss in (
        lambda how: gradient_loss(x, r, w, how),
        lambda how: reconstruction_loss(x, moving_target(x, r, t, Linear()), w, t, Linear(), how),
    ):
        torch.testing.assert_close(loss("sum"), 20 * loss("mean"))


def test_half_precision_is_combined_in_float32():
    z, t = torch.zeros(1, 1, dtype=torch.float16), torch.tensor([0.5])
    parts = [Prediction(torch.full((1, 1), v, dtype=torch.float16), "epsilon", Linear(), z, t) for v in (1000.0, 1.0)]
    guided = Teacher(*parts).epsilon(100.0)
    assert guided.dtype == torch.float32 and guided.item() == pytest.approx(1 + 100 * 999)


def test_schedules():
    rng = [ItemRNG(0, range(4000)) for _ in range(6)]
    t = Constant().draw(rng[0], 0.7)
    assert 0.02 < t.min() < 0.03 and 0.97 < t.max() < 0.98
    assert [LinearSchedule(end=0.5).top(p) for p in (0, 0.5, 1)] == pytest.approx([0.98, 0.74, 0.5])
    assert [StepSchedule().top(p) for p in (0, 0.19, 0.2, 1)] == [0.98, 0.98, 0.5, 0.5]
    for p in (0.0, 0.25, 1.0):
        assert SquareRoot().draw(rng[1], p) == pytest.approx(torch.full((4000,), 0.98 - 0.96 * math.sqrt(p)))
    for bad in (dict(low=0.5, end=0.4), dict(end=0.99)):
        with pytest.raises(ValueError, match="times end at"):
            LinearSchedule(**bad)
    with pytest.raises(ValueError, match="times end at"):
        Constant(low=0.6, high=0.5)


def test_missing_parts():
    teacher = Teacher(predictions().cond)
    eps = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="method='vsd' needs the prediction of a fake model"):
        residual("vsd", teacher, eps)
    with pytest.raises(ValueError, match="method='csd' needs the unconditional prediction"):
        residual("csd", teacher, eps)
    with pytest.raises(ValueError, match="and that of a negative prompt"):
        residual("nfsd", Teacher(teacher.cond, teacher.cond), eps)
    plain = FunctionDenoiser(lambda x, t: x, Linear(), "epsilon")
    with pytest.raises(ValueError, match="no unconditional branch"):
        ask(plain, eps, torch.full((2,), 0.5), Condition({"a": torch.zeros(2)}), null=True)
