import math

import pytest
import torch
from scipy.integrate import quad

from genkit.denoisers.base import Condition
from genkit.interpolants import DiscreteVP, Linear, Trigonometric, VarianceExploding, VariancePreserving
from genkit.testing.distances import sliced_wasserstein
from genkit.testing.oracles import Gaussian, GaussianMixture, eight_gaussians, probability_flow, two_class_mixture

F64 = torch.float64
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=F64) ** 2
PATHS = [
    Linear(),
    Trigonometric(),
    VariancePreserving(),
    VarianceExploding(sigma_max=10.0),
    DiscreteVP(torch.cumprod(1 - BETAS, 0)),
]
ids = lambda value: type(value).__name__  # noqa: E731


def mixture(interpolant=None):
    return GaussianMixture(
        [[[0.5, -1.0]], [[1.5, 0.3]], [[-0.7, 0.8]]],
        [0.2, 0.5, 0.4],
        weights=[1.0, 2.0, 3.0],
        labels=[0, 1, 1],
        interpolant=interpolant,
    )


def points(n=5):
    return torch.randn(n, 1, 2, dtype=F64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("path", PATHS, ids=ids)
@pytest.mark.parametrize("labels", [None, [0, 1, 2, 1, 0]])
def test_score_is_the_gradient_of_the_log_density(path, labels):
    law, x, t = mixture(path), points().requires_grad_(), torch.tensor([0.05, 0.3, 0.5, 0.8, 1.0], dtype=F64)
    labels = None if labels is None else torch.tensor(labels)
    (gradient,) = torch.autograd.grad(law.log_density(x, t, labels).sum(), x)
    score = law.score(x, t, labels)
    torch.testing.assert_close(score, gradient, rtol=1e-11, atol=1e-11)
    sigma = path.sigma(t).view(-1, 1, 1)
    torch.testing.assert_close(law.epsilon(x, t, labels), -sigma * gradient, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_density_obeys_the_continuity_equation(path):
    """``d log p / dt = -(div v + v . score)``: ties the velocity to the density by derivatives alone."""
    law, x, t = mixture(path), points(), torch.tensor([0.11, 0.3, 0.5, 0.7, 0.93], dtype=F64)
    t = t + 0.0003  # off the nodes of DiscreteVP, where its slope jumps
    slope = torch.func.jvp(lambda t: law.log_density(x, t), (t,), (torch.ones_like(t),))[1]
    velocity = law.velocity(x, t)
    divergence = torch.zeros(len(x), dtype=F64)
    for k in range(2):
        direction = torch.zeros_like(x)
        direction[:, 0, k] = 1
        divergence += torch.func.jvp(lambda x: law.velocity(x, t), (x,), (direction,))[1][:, 0, k]
    wanted = -(divergence + (velocity * law.score(x, t)).sum((1, 2)))
    torch.testing.assert_close(slope, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=ids)
@pytest.mark.parametrize("label, components", [(0, [0]), (1, [1, 2]), (2, [0, 1, 2])])
def test_posterior_mean_against_quadrature(path, label, components):
    means, stds, weights = [0.5, 1.5, -0.7], [0.2, 0.5, 0.4], [1.0, 2.0, 3.0]
    law = GaussianMixture([[m] for m in means], stds, weights, labels=[0, 1, 1], interpolant=path)
    normal = lambda x, m, s: math.exp(-0.5 * ((x - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))  # noqa: E731
    mass = sum(weights[k] for k in components)
    prior = lambda x0: sum(weights[k] / mass * normal(x0, means[k], stds[k]) for k in components)  # noqa: E731
    for x, t in [(0.4, 0.3), (-1.2, 0.7)]:
        t = torch.tensor([t], dtype=F64)
        alpha, sigma = path.alpha(t).item(), path.sigma(t).item()

        def moment(power, x=x, alpha=alpha, sigma=sigma):
            peaks = [*means, x / alpha if abs(x / alpha) < 6 else 0.0]
            joint = lambda x0: x0**power * prior(x0) * normal(x, alpha * x0, sigma)  # noqa: E731
            return quad(joint, -6, 6, points=peaks, limit=500, epsabs=1e-13, epsrel=1e-13)[0]

        evidence, mean = moment(0), moment(1) / moment(0)
        at, y = torch.tensor([[x]], dtype=F64), torch.tensor([label])
        assert law.denoise(at, t, y).item() == pytest.approx(mean, abs=1e-8)
        assert law.log_density(at, t, y).item() == pytest.approx(math.log(evidence), abs=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_prediction_types_convert_into_each_other(path):
    law, x, t = mixture(path), points(), torch.tensor([0.1, 0.3, 0.5, 0.8, 0.9], dtype=F64)
    for source in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        for target in ("epsilon", "sample", "v_prediction", "flow_prediction"):
            converted = path.convert(law.predict(source, x, t), source, target, x, t)
            torch.testing.assert_close(converted, law.predict(target, x, t), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_both_ends_are_exact(path):
    law, x = mixture(path), points()
    start, end = torch.zeros(len(x), dtype=F64), torch.ones(len(x), dtype=F64)
    for name in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        for t in (start, end):
            assert law.predict(name, x, t).isfinite().all()
    torch.testing.assert_close(law.denoise(x, start), x, rtol=0, atol=1e-14)
    assert law.epsilon(x, start).abs().max() == 0
    near = law.velocity(x, start + 1e-9)
    torch.testing.assert_close(law.velocity(x, start), near, rtol=1e-4, atol=1e-4)
    if path.alpha(end)[0] == 0:
        mean = torch.einsum("k,kij->ij", law.weights, law.means)
        torch.testing.assert_close(law.denoise(x, end), mean.expand_as(x), rtol=0, atol=1e-15)
        torch.testing.assert_close(law.epsilon(x, end), x, rtol=0, atol=1e-15)


@pytest.mark.parametrize("path", PATHS[:-1], ids=ids)  # the velocity of DiscreteVP jumps a thousand times
def test_gaussian_flow_map_is_the_ode_solution(path):
    law, x = Gaussian([1.0, -2.0], [0.5, 0.8], interpolant=path), points()[:, 0]
    for t, s in [(0.2, 0.9), (0.9, 0.2)]:
        solved = probability_flow(law.velocity, x, t, s, steps=700)
        exact = law.flow_map(x, torch.tensor(t, dtype=F64), torch.tensor(s, dtype=F64))
        torch.testing.assert_close(exact, solved, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", PATHS, ids=ids)
def test_gaussian_flow_map_moves_with_the_velocity(path):
    law, x = Gaussian([1.0, -2.0], [0.5, 0.8], interpolant=path), points()[:, 0]
    t, s = torch.tensor([[0.8, 0.1, 0.3, 0.9, 0.5], [0.1003, 0.8003, 0.2003, 0.4003, 0.5003]], dtype=F64)
    end, slope = torch.func.jvp(lambda s: law.flow_map(x, t, s), (s,), (torch.ones_like(s),))
    torch.testing.assert_close(slope, law.velocity(end, s), rtol=1e-10, atol=1e-10)


def linear_case(n=4096):
    generator = torch.Generator().manual_seed(0)
    law = Gaussian([1.0, -2.0], 0.5)
    t, w, s = torch.rand(3, n, dtype=F64, generator=generator).sort(0, descending=True).values
    x0 = law.sample(n, generator=generator)
    x = law.interpolant.interpolate(x0, torch.randn(n, 2, dtype=F64, generator=generator), t)
    return law, x, t, w, s


def test_flow_map_semigroup_inverse_and_identity():
    law, x, t, w, s = linear_case()
    direct = law.flow_map(x, t, s)
    assert (law.flow_map(law.flow_map(x, t, w), w, s) - direct).abs().max() < 1e-14
    assert (law.flow_map(direct, s, t) - x).abs().max() < 1e-14
    assert (law.flow_map(x, t, t) - x).abs().max() < 1e-15
    ends = torch.zeros(len(x), dtype=F64), torch.ones(len(x), dtype=F64)
    noise = law.flow_map(law.sample(len(x), generator=torch.Generator().manual_seed(2)), *ends)
    assert noise.mean(0).abs().max() < 0.05 and (noise.std(0) - 1).abs().max() < 0.05


def test_average_velocity_is_exact_on_the_diagonal_and_off_it():
    law, x, t, _, s = linear_case()
    jump = (s - t)[:, None] * law.average_velocity(x, t, s)
    assert (x + jump - law.flow_map(x, t, s)).abs().max() < 1e-14
    torch.testing.assert_close(law.average_velocity(x, t, t), law.velocity(x, t), rtol=0, atol=1e-14)
    with pytest.raises(ValueError, match="interpolant=Trigonometric"):
        Gaussian([0.0], 1.0, interpolant=Trigonometric()).average_velocity(x[:, :1], t, s)


def residuals(law, u, x, t, w, s):
    """Squared residuals of LSD, ESD and PSD-M, summed over dimensions, averaged over the batch."""
    jvp, one = torch.func.jvp, torch.ones_like(t)
    jump = lambda x, t, s: x + (s - t)[:, None] * u(x, t, s)  # noqa: E731
    end, d_end = jvp(lambda s: jump(x, t, s), (s,), (one,))
    lsd = d_end - u(end, s, s)
    esd = jvp(lambda x, t: jump(x, t, s), (x, t), (u(x, t, t), one))[1]
    middle = (t + s) / 2
    psd = u(x, t, s) - (u(x, t, middle) + u(jump(x, t, middle), middle, s)) / 2
    return [r.square().sum(1).mean().item() for r in (lsd, esd, psd)]


def test_distillation_residuals_vanish_at_the_exact_map_and_are_known_beside_it():
    law, x, t, w, s = linear_case()
    assert max(residuals(law, law.average_velocity, x, t, w, s)) < 1e-27
    generator = torch.Generator().manual_seed(0)
    pair = torch.rand(2, len(x), dtype=F64, generator=generator)
    t, s = pair.max(0).values, pair.min(0).values
    noise = torch.randn(x.shape, dtype=F64, generator=generator)
    x = law.interpolant.interpolate(law.sample(len(x), generator=generator), noise, t)
    wrong = lambda x, t, s: law.average_velocity(x, t, s) + 0.1 * (t - s)[:, None] * x.sin()  # noqa: E731
    for value, published in zip(residuals(law, wrong, x, t, w, s), (5.13e-3, 8.69e-3, 5.10e-4), strict=True):
        assert value == pytest.approx(published, rel=0.15)


def test_samples_have_the_moments_of_their_class():
    law = two_class_mixture()
    labels = torch.tensor([0, 1, 2]).repeat_interleave(20_000)
    x = law.sample(len(labels), labels, generator=torch.Generator().manual_seed(0)).view(3, 20_000, 16)
    torch.testing.assert_close(x.mean((1, 2)), torch.tensor([0.5, -0.5, 0.0], dtype=F64), rtol=0, atol=0.01)
    within = math.sqrt(0.5**2 + 0.5**2)
    torch.testing.assert_close(x.std((1, 2)), torch.tensor([0.5, 0.5, within], dtype=F64), rtol=0, atol=0.01)


def test_class_restriction_equals_the_law_of_that_class():
    law, x, t = mixture(), points(), torch.tensor(0.4, dtype=F64)
    only = GaussianMixture(law.means[1:], [0.5, 0.4], weights=[2.0, 3.0])
    ones = torch.ones(len(x), dtype=torch.int64)
    torch.testing.assert_close(law.velocity(x, t, ones), only.velocity(x, t), rtol=0, atol=1e-14)
    torch.testing.assert_close(law.log_density(x, t, ones), only.log_density(x, t), rtol=0, atol=1e-13)
    assert torch.equal(law.velocity(x, t, ones + 1), law.velocity(x, t))
    assert (law.velocity(x, t, ones) - law.velocity(x, t)).abs().max() > 0.1


def test_as_a_denoiser_with_classes():
    law, x, t = mixture(), points(), torch.tensor(0.4, dtype=F64)
    labels, null = torch.ones(len(x), dtype=torch.int64), torch.full((len(x),), law.num_classes)
    condition = Condition({"class_labels": labels}, {"class_labels": null})
    for prediction_type in ("epsilon", "sample", "v_prediction", "flow_prediction"):
        conditional, unconditional = law.denoiser(prediction_type).many(x, t, [condition, condition.null()])
        torch.testing.assert_close(conditional.sample, law.denoise(x, t, labels), rtol=0, atol=1e-13)
        torch.testing.assert_close(unconditional.velocity, law.velocity(x, t), rtol=0, atol=1e-13)


def test_batched_times_and_dtypes():
    law, x, t = eight_gaussians(), points()[:, 0], torch.tensor([0.0, 0.2, 0.5, 0.8, 1.0], dtype=F64)
    rows = torch.cat([law.velocity(x[i : i + 1], t[i]) for i in range(len(x))])
    torch.testing.assert_close(law.velocity(x, t), rows, rtol=0, atol=1e-14)
    low = law.velocity(x.bfloat16(), t.float())
    assert low.dtype == torch.bfloat16 and law.log_density(x.bfloat16(), t.float()).dtype == torch.float32
    torch.testing.assert_close(low.double(), law.velocity(x.bfloat16().double(), t), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: GaussianMixture([[0.0], [1.0]], [0.1, 0.0]), "stds must be above 0"),
        (lambda: GaussianMixture([[0.0], [1.0]], 0.1, weights=[1.0, -1.0]), "weights must be 2 numbers above 0"),
        (lambda: GaussianMixture([[0.0], [1.0]], 0.1, labels=[0]), "labels must be 2 classes"),
        (lambda: GaussianMixture([0.0, 1.0], 0.1), "means must have shape"),
        (lambda: eight_gaussians().predict("noise", torch.zeros(1, 2), torch.zeros(1)), "prediction_type='noise'"),
        (lambda: eight_gaussians().denoise(torch.zeros(1, 3), torch.zeros(1)), r"x must have shape \(batch, 2\)"),
        (lambda: eight_gaussians().denoise(torch.zeros(1, 2), torch.zeros(1), torch.tensor([9])), "class_labels=9"),
        (lambda: eight_gaussians().sample(2, torch.tensor([-1, 0])), "class_labels=-1"),
        (lambda: eight_gaussians().sample(2, torch.tensor([1])), r"class_labels must have shape \(2,\)"),
        (lambda: Gaussian([0.0], 1.0).sample(1, torch.tensor([0])), "law without labels"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_sliced_wasserstein():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 3, generator=generator)
    assert sliced_wasserstein(x, x[torch.randperm(2000, generator=generator)]) == 0
    # A shift by d moves every projection by <a, d>, whose mean square over directions is |d|^2 / dimension.
    assert sliced_wasserstein(x, x + torch.tensor([3.0, 0.0, 0.0]), projections=1024) == pytest.approx(3**0.5, rel=0.05)
    assert sliced_wasserstein(x, 2 * x) == pytest.approx(1, rel=0.05)
    assert sliced_wasserstein(x, -x, seed=1) != sliced_wasserstein(x, -x, seed=2)
    with pytest.raises(ValueError, match=r"got \(2000, 3\) and \(5, 3\)"):
        sliced_wasserstein(x, x[:5])


def test_euler_with_the_exact_velocity_reaches_the_published_figures():
    law = eight_gaussians()
    generator = torch.Generator().manual_seed(0)
    data = law.sample(8000, generator=generator)
    noise = torch.randn(8000, 2, dtype=F64, generator=generator)
    for steps, published in [(1, 1.441), (2, 0.471), (4, 0.174), (8, 0.093)]:
        x = noise
        for k in range(steps):
            x = x - law.velocity(x, torch.tensor(1 - k / steps, dtype=F64)) / steps
        assert sliced_wasserstein(x, data) == pytest.approx(published, abs=0.04)
