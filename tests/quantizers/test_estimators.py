import math

import pytest
import torch

from genkit.quantizers.estimators import reste_power, rounded, signs, through


def gradient(function, x, upstream=None):
    x = x.clone().requires_grad_()
    y = function(x)
    (found,) = torch.autograd.grad(y, x, torch.ones_like(y) if upstream is None else upstream)
    return found


def pairs(n=50, d=7):
    return (torch.randn(n, d, dtype=torch.float64) for _ in range(3))


def test_straight_through():
    z, q, g = pairs()
    torch.testing.assert_close(through(z, q), q, rtol=0, atol=1e-15)
    assert torch.equal(gradient(lambda x: through(x, q), z, g), g)


def test_rotation_turns_into_the_code_and_keeps_angles():
    z, q, g = pairs()
    torch.testing.assert_close(through(z, q, "rotation"), q, rtol=0, atol=4e-15)
    found = gradient(lambda x: through(x, q, "rotation"), z, g)
    ratio = q.norm(dim=1) / z.norm(dim=1)
    torch.testing.assert_close(found.norm(dim=1), g.norm(dim=1) * ratio, rtol=1e-13, atol=0)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(found, z), cosine(g, q), rtol=0, atol=1e-13)


def test_rotation_is_the_published_matrix():
    z, q, g = pairs(1, 5)
    u, v = z / z.norm(), q / q.norm()
    w = (u + v) / (u + v).norm()
    matrix = torch.eye(5, dtype=torch.float64) - 2 * w.T @ w + 2 * v.T @ u
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-14)
    found = gradient(lambda x: through(x, q, "rotation"), z, g)
    torch.testing.assert_close(found, q.norm() / z.norm() * g @ matrix, rtol=0, atol=1e-14)


def test_rotation_falls_back_where_there_is_none():
    z, q, g = pairs(4)
    z[0], q[1], q[2] = 0, 0, -2 * z[2]
    torch.testing.assert_close(through(z, q, "rotation"), q, rtol=0, atol=1e-14)
    found = gradient(lambda x: through(x, q, "rotation"), z, g)
    assert torch.equal(found[:3], g[:3]) and not torch.equal(found[3], g[3])


@pytest.mark.parametrize(
    ("power", "slopes"),
    [(3.0, (4.641589, 0.529134, 0.333333, 0.254381, 0.0)), (2.0, (3.162278, 0.707107, 0.5, 0.408248, 0.0))],
)
def test_reste(power, slopes):
    x = torch.tensor([0.05, 0.5, 1.0, 1.5, 1.6], dtype=torch.float64)
    for sign in (1, -1):
        found = gradient(lambda x: signs(x, "reste", power=power), sign * x)
        torch.testing.assert_close(found, torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=5e-7)
    assert gradient(lambda x: signs(x, "reste", power=1.0), x).tolist() == [1, 1, 1, 1, 0]


def test_reste_grows_over_training():
    found = [reste_power(r) for r in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([1, 1.15224, 1.58579, 2.23463, 3], abs=5e-6)
    assert reste_power(1, end=2.0) == pytest.approx(2)


def test_signs():
    x = torch.tensor([-2.0, -0.0, 0.0, 1e-30])
    for estimator in ("ste", "reste"):
        assert signs(x, estimator).tolist() == [-1, 1, 1, 1]
    assert gradient(signs, x).tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(("sharpness", "middle", "end"), [(1.0, 1.0820, 0.8509), (5.0, 2.5339, 0.0674)])
def test_distance_aware_gradient(sharpness, middle, end):
    found = gradient(lambda x: rounded(x, "dgm", sharpness=sharpness), torch.tensor([0.5, 0.0, 3.0, -2.5]).double())
    torch.testing.assert_close(found, torch.tensor([middle, end, end, middle]).double(), rtol=0, atol=5e-5)
    peak = sharpness / (2 * math.tanh(sharpness / 2))
    assert found[0] == pytest.approx(peak) and found[1] == pytest.approx(peak / math.cosh(sharpness / 2) ** 2)


def test_distance_aware_gradient_is_one_in_the_mean_and_straight_through_when_dull():
    x = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    for sharpness in (0.5, 1.0, 5.0):
        assert gradient(lambda x, b=sharpness: rounded(x, "dgm", sharpness=b), x).mean() == pytest.approx(1, abs=1e-7)
    dull = gradient(lambda x: rounded(x, "dgm", sharpness=1e-4), x)
    assert (dull - 1).abs().max() < 1e-6


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 5.0])
def test_distance_aware_gradient_is_that_of_the_smooth_staircase(sharpness):
    """``g(v) = tanh(b (phi - 1/2)) / (2 tanh(b / 2)) + 1/2`` from one integer to the next, ``phi = v - floor(v)``."""

    def staircase(v):
        return torch.tanh(sharpness * (v - v.floor().detach() - 0.5)) / (2 * math.tanh(sharpness / 2)) + 0.5

    x, upstream = (torch.randn(2, 500, dtype=torch.float64) * torch.tensor([[4.0], [1.0]])).unbind()
    ends = staircase(torch.tensor([0.0, 0.5, 1 - 1e-12], dtype=torch.float64))
    assert ends.tolist() == pytest.approx([0, 0.5, 1], abs=1e-10)
    found = gradient(lambda x: rounded(x, "dgm", sharpness=sharpness), x, upstream)
    torch.testing.assert_close(found, gradient(staircase, x, upstream), rtol=1e-12, atol=1e-12)


def test_rounding():
    x = torch.tensor([-1.5, -0.5, 0.4, 0.5, 1.5, 2.5], dtype=torch.float64)
    for estimator in ("ste", "dgm"):
        assert torch.equal(rounded(x, estimator), x.round())
    assert torch.equal(gradient(rounded, x), torch.ones_like(x))


def test_bad_input():
    x = torch.randn(2, 3)
    for function in (lambda name: through(x, x, name), lambda name: rounded(x, name), lambda name: signs(x, name)):
        with pytest.raises(ValueError, match="estimator='strait' is not known.*Accepted: .*ste"):
            function("strait")
    with pytest.raises(ValueError, match="sharpness=0: expected above 0"):
        rounded(x, "dgm", sharpness=0)
    with pytest.raises(ValueError, match="power=0.5: expected at least 1"):
        signs(x, "reste", power=0.5)
