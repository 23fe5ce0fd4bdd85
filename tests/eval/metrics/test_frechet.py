import math
import warnings

import pytest
import torch

from genkit.eval.metrics.base import FeatureSet
from genkit.eval.metrics.frechet import FrechetDistance, frechet_distance, frechet_raw
from genkit.eval.statistics import FeatureStats


def normal(n, d, seed=0):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stats(x):
    return FeatureStats(x.shape[1]).update(x)


def of(mean, covariance, n=10_000):
    s = FeatureStats(len(mean))
    s.n, s.mean, s.scatter = n, mean, covariance * (n - 1)
    return s


def test_constants():
    ones, twos = torch.ones(100, 64), torch.full((100, 64), 2.0)
    assert frechet_distance(stats(ones), stats(twos)) == pytest.approx(64, abs=1e-12)


def test_diagonal_gaussians():
    a, b = normal(1, 20, 1)[0].exp(), normal(1, 20, 2)[0].exp()
    mu, nu = normal(1, 20, 3)[0], normal(1, 20, 4)[0]
    want = (mu - nu).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert frechet_distance(of(mu, a.diag()), of(nu, b.diag())) == pytest.approx(float(want), rel=1e-12)


def test_mean_shift():
    eye, zero = torch.eye(32, dtype=torch.float64), torch.zeros(32, dtype=torch.float64)
    assert frechet_distance(of(zero, eye), of(zero + 0.3, eye)) == pytest.approx(32 * 0.09, rel=1e-12)


def test_sample_size_bias():
    # E FD = (2d + d(d+1)/2) / n + O(1/n^2): n FD is 2208 for d = 64.
    n, d = 10_000, 64
    values = [n * frechet_distance(stats(normal(n, d, 2 * i)), stats(normal(n, d, 2 * i + 1))) for i in range(3)]
    assert sum(values) / 3 == pytest.approx(2 * d + d * (d + 1) / 2, rel=0.02)


def test_symmetric_and_invariant_to_order_and_rotation():
    x, y = normal(300, 24) @ normal(24, 24, 5), normal(300, 24, 1) + 0.5
    want = frechet_distance(stats(x), stats(y))
    assert frechet_distance(stats(y), stats(x)) == pytest.approx(want, rel=1e-11)
    assert frechet_distance(stats(x.flip(0)), stats(y)) == pytest.approx(want, rel=1e-11)
    q = torch.linalg.qr(normal(24, 24, 6)).Q
    assert frechet_distance(stats(x @ q), stats(y @ q)) == pytest.approx(want, rel=1e-11)


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_rank_deficient_trace_keeps_its_digits():
    # Identical sets: the trace of the root is the trace itself, and the raw distance is rounding noise.
    x = normal(100, 256)
    trace = float(stats(x).covariance.trace())
    assert abs(frechet_raw(stats(x), stats(x))) / trace < 1e-13
    assert abs(frechet_raw(x, x)) / trace < 1e-13


@pytest.mark.filterwarnings("ignore:.*rank deficient")
@pytest.mark.parametrize("n, m", [(40, 40), (30, 55)])
def test_few_rows_give_the_same_by_their_nuclear_norm(n, m):
    x, y = normal(n, 80) @ normal(80, 80, 5), normal(m, 80, 1) + 0.2
    assert frechet_raw(x, y) == pytest.approx(frechet_raw(stats(x), stats(y)), rel=1e-12)


@pytest.mark.filterwarnings("ignore:.*rank deficient")
@pytest.mark.parametrize("few", ["reference", "generated"])
def test_few_rows_against_statistics_of_many(few):
    x, y = normal(40, 80) @ normal(80, 80, 5), normal(300, 80, 1) + 0.2
    want = frechet_raw(stats(x), stats(y))
    pair = (x, stats(y)) if few == "reference" else (stats(y), x)
    assert frechet_raw(*pair) == pytest.approx(want, rel=1e-11)


def test_the_product_of_covariances_is_not_symmetric():
    # eigvalsh reads one triangle only, so it may not be given S_x S_y; that would be off by far more than rounding.
    x, y = stats(normal(60, 12) @ normal(12, 12, 5)), stats(normal(60, 12, 1) @ normal(12, 12, 6))
    wrong = torch.linalg.eigvalsh(x.covariance @ y.covariance)
    right = torch.linalg.eigvals(x.covariance @ y.covariance).real
    trace = (x.covariance.trace() + y.covariance.trace() + (x.mean - y.mean).square().sum() - frechet_raw(x, y)) / 2
    assert float(right.clamp(min=0).sqrt().sum()) == pytest.approx(float(trace), rel=1e-10)
    assert wrong.min() < 0


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_rank_deficient_sets_at_the_size_of_the_specification():
    # d 768, n 300, identical sets: rounding without the cut-off leaves -4e-8 of tr S.
    x = normal(300, 768)
    trace = float((x - x.mean(0)).square().sum() / 299)
    assert abs(frechet_raw(x, x)) / trace < 1e-13


@pytest.mark.filterwarnings("ignore:.*rank deficient")
def test_no_epsilon_is_added():
    # Adding one to both covariances, as other code does, lowers the distance of rank-deficient sets: here, d = 256 and
    # n = 100, by 1.7e-5 with 1e-8 and by thousandths with 1e-6.
    x, y = normal(100, 256), normal(100, 256, 1)
    a, b = stats(x), stats(y)

    def change(eps):
        cov_a, cov_b = (s.covariance + eps * torch.eye(256, dtype=torch.float64) for s in (a, b))
        values, vectors = torch.linalg.eigh(cov_a)
        root = (vectors * values.sqrt()) @ vectors.T
        traces = (
            cov_a.trace() + cov_b.trace() - 2 * torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
        )
        return float((a.mean - b.mean).square().sum() + traces) - frechet_raw(a, b)

    assert frechet_raw(a, b) == pytest.approx(frechet_raw(x, y), rel=1e-12)
    assert change(1e-8) == pytest.approx(-1.7e-5, rel=0.05)
    assert -3e-3 < change(1e-6) < -1e-3


def test_large_mean_in_float32_costs_only_the_rounding_of_the_input():
    # Mean 1000, std 0.01: rounding the inputs to float32 is all that may show (4.1927e-5 against 4.1921e-5).
    x, y = 1000 + 0.01 * normal(4000, 16), 1000 + 0.01 * normal(4000, 16, 1)
    exact, rounded = frechet_distance(x, y), frechet_distance(x.float(), y.float())
    assert rounded == pytest.approx(exact, rel=5e-3)
    means = torch.tensor(x.float().numpy().mean(0)), torch.tensor(y.float().numpy().mean(0))  # as elsewhere: float32
    assert abs(float((means[0] - means[1]).square().sum()) / float((x.mean(0) - y.mean(0)).square().sum()) - 1) > 5e-3


@pytest.mark.parametrize("spread", [1, 1e4, 1e8])
def test_against_fifty_digits(spread):
    # Variances from 1 to 1 / spread, as features have them: to rounding, where roots of eigenvalues lose digits.
    mpmath = pytest.importorskip("mpmath")
    d = 12
    scale = torch.logspace(0, -math.log10(spread) / 2, d, dtype=torch.float64)
    x, y = (normal(80, d, s) * scale for s in (0, 1))
    a, b = stats(x @ torch.linalg.qr(normal(d, d, 2)).Q), stats(1.2 * y + 0.1)
    with mpmath.workdps(50):
        lower = mpmath.cholesky(mpmath.matrix(a.covariance.tolist()))
        inner = lower.T * mpmath.matrix(b.covariance.tolist()) * lower
        trace = mpmath.fsum(mpmath.sqrt(v) for v in mpmath.eigsy((inner + inner.T) / 2, eigvals_only=True))
        rest = mpmath.fsum(
            (p - q) ** 2 for p, q in zip(*(map(mpmath.mpf, s.mean.tolist()) for s in (a, b)), strict=True)
        )
        rest += mpmath.fsum(v for s in (a, b) for v in s.covariance.diagonal().tolist())
        want = float(rest - 2 * trace)
    assert frechet_raw(a, b) == pytest.approx(want, rel=1e-13, abs=1e-14)


def test_against_scipy_eigenvalues():
    scipy_linalg = pytest.importorskip("scipy.linalg")
    x, y = normal(400, 40) @ normal(40, 40, 5), normal(500, 40, 1) @ normal(40, 40, 7)
    a, b = stats(x), stats(y)
    root = sum(scipy_linalg.eigvals((a.covariance @ b.covariance).numpy()) ** 0.5).real
    want = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(float(want), rel=1e-11)


def test_against_clean_fid():
    fid = pytest.importorskip("cleanfid.fid")
    x, y = normal(200, 16), normal(220, 16, 1) + 0.3
    try:
        want = fid.fid_from_feats(x.numpy(), y.numpy())
    except TypeError as error:  # it passes disp= to scipy's square root, which has not taken it since 1.18
        pytest.skip(str(error))
    assert frechet_distance(stats(x), stats(y)) == pytest.approx(float(want), rel=1e-10)


def test_against_torchmetrics():
    fid = pytest.importorskip("torchmetrics.image.fid")
    x, y = normal(200, 16), normal(220, 16, 1) + 0.3

    class Flatten(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.flatten(1)

    metric = fid.FrechetInceptionDistance(feature=Flatten(), normalize=True).set_dtype(torch.float64)
    metric.update(x.view(-1, 1, 4, 4), real=True)
    metric.update(y.view(-1, 1, 4, 4), real=False)
    assert float(metric.compute()) == pytest.approx(frechet_distance(stats(x), stats(y)), rel=1e-10)


def test_errors_and_warnings():
    with pytest.raises(ValueError, match="at least 2 samples"), pytest.warns(UserWarning, match="n=1 < d=4"):
        frechet_distance(stats(normal(1, 4)), stats(normal(9, 4)))
    with pytest.raises(ValueError, match="reference set: 1 features, but a covariance needs at least 2"):
        frechet_distance(normal(1, 4), normal(9, 4))
    y = normal(9, 4)
    y[6, 2] = float("nan")
    with pytest.raises(ValueError, match="generated set: feature row 6 is not finite"):
        frechet_distance(normal(9, 4), y)
    with pytest.raises(ValueError, match="4 feature dimensions, the generated set 5"):
        frechet_distance(stats(normal(9, 4)), stats(normal(9, 5)))
    with pytest.warns(UserWarning, match="n=3 < d=4"):
        frechet_distance(stats(normal(3, 4)), stats(normal(9, 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frechet_distance(stats(normal(4, 4)), stats(normal(9, 4)))


def test_metric_keeps_the_raw_value():
    x = normal(50, 8)
    values = FrechetDistance()(FeatureSet(stats(x)), FeatureSet(stats(x)))
    assert set(values) == {"frechet_distance", "frechet_raw"}
    assert values["frechet_distance"] == max(values["frechet_raw"], 0.0) and abs(values["frechet_raw"]) < 1e-12
