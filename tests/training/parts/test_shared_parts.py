"""Laws of times, losses and guided targets, which methods share."""

import math

import numpy as np
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear, VariancePreserving
from genkit.rng import ItemRNG
from genkit.training.parts.losses import adaptive, barron, evaluating, mean_of_squares, pseudo_huber, sum_of_squares
from genkit.training.parts.targets import guided_velocity
from genkit.training.parts.times import Beta, Grid, LogitNormal, TimeLaw, Uniform, UShaped, share

F64 = torch.float64
LAWS = {
    "uniform": (Uniform(low=0.2, high=0.7), lambda t: (t - 0.2) / 0.5),
    "logit_normal": (LogitNormal(mean=-0.4, std=1.3), lambda t: stats.norm.cdf((math.log(t / (1 - t)) + 0.4) / 1.3)),
    "beta": (Beta(a=2, b=0.7), stats.beta(2, 0.7).cdf),
    "u_shaped": (UShaped(sharpness=4), lambda t: (1 + math.sinh(4 * (2 * t - 1)) / math.sinh(4)) / 2),
}


@pytest.mark.parametrize("name", LAWS)
def test_times_follow_their_law(name):
    law, cdf = LAWS[name]
    t = law.draw(ItemRNG(0, range(20_000)))
    assert t.dtype == torch.float32 and ((t >= 0) & (t <= 1)).all()
    assert stats.kstest(t.double().numpy(), np.vectorize(cdf)).pvalue > 0.01
    assert torch.equal(law.draw(ItemRNG(0, [7])), t[7:8])


def test_the_grid_has_all_its_points():
    t = Grid(steps=4).draw(ItemRNG(0, range(4000)))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert (counts - 1000).abs().max() < 4 * math.sqrt(4000 * 3 / 16)


def test_a_law_is_chosen_by_its_name():
    adapter = TypeAdapter(TimeLaw)
    assert adapter.validate_python({"law": "beta", "a": 2}) == Beta(a=2)
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        adapter.validate_python({"law": "uniform", "mean": 1})
    with pytest.raises(ValidationError, match="low=0.5 must be below high=0.5"):
        adapter.validate_python({"law": "uniform", "low": 0.5, "high": 0.5})


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.25, 0.5, 2 / 3, 1.0])
def test_any_run_of_positions_has_its_share(fraction):
    for start in (0, 17, 10_000):
        mask = share(torch.arange(start, start + 60), fraction)
        assert mask.sum().item() == pytest.approx(60 * fraction, abs=1)
    parts = torch.cat([share(torch.arange(i, i + 1), fraction) for i in range(60)])
    assert torch.equal(parts, share(torch.arange(60), fraction))


def test_losses():
    r = torch.randn(3, 2, 4, dtype=F64)
    assert torch.allclose(sum_of_squares(r), (r * r).sum((1, 2))) and torch.allclose(
        mean_of_squares(r) * 8, sum_of_squares(r)
    )
    assert sum_of_squares(r.bfloat16()).dtype == torch.float32
    assert torch.allclose(pseudo_huber(r, 0.1), (r * r + 0.01).sqrt() - 0.1, rtol=1e-12)
    tiny = torch.tensor([1e-6], dtype=torch.float32)
    assert pseudo_huber(tiny, 1.0).item() == pytest.approx(5e-13)  # 0 if it cancelled


def test_weights_are_frozen():
    m = torch.tensor([0.3, 4.0], dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(adaptive(m, 0.75, 0.01).sum(), m)
    assert torch.allclose(gradient, (m.detach() + 0.01) ** -0.75)
    (gradient,) = torch.autograd.grad(barron(m, 1e-3).sum(), m)
    assert torch.allclose(gradient, (m.detach() + 1e-6).rsqrt())
    assert torch.equal(adaptive(m, 0, 0.01), m)


def test_no_dropout_while_evaluating():
    module = torch.nn.Dropout(0.5).train()
    with evaluating(module):
        assert not module.training
    assert module.training
    with pytest.raises(RuntimeError, match="inside"), evaluating(module):
        raise RuntimeError("inside")
    assert module.training


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_guided_velocity(kind):
    """The same for every prediction type, with a scale a batch or a scale an item; one call where nothing is guided."""
    path = Linear() if kind == "flow_prediction" else VariancePreserving()

    def fn(x, t, c):
        return torch.tanh(x) * (1 + c[:, None])

    denoiser = FunctionDenoiser(fn, path, kind)
    x, t = torch.randn(4, 2, dtype=F64), torch.full((4,), 0.6, dtype=F64)
    condition = Condition({"c": torch.arange(4.0, dtype=F64)}, {"c": torch.zeros(4, dtype=F64)})
    scales = torch.tensor([1.0, 2.0, 3.5, 0.0], dtype=F64)
    got = guided_velocity(denoiser, x, t, condition, scales)
    assert denoiser.calls == 2
    raw = fn(x, t, torch.zeros(4, dtype=F64)) + scales[:, None] * (
        fn(x, t, condition["c"]) - fn(x, t, torch.zeros(4, dtype=F64))
    )
    assert torch.allclose(got, path.convert(raw, kind, "flow_prediction", x, t), rtol=0, atol=1e-12)
    assert torch.allclose(guided_velocity(denoiser, x, t, condition, 2.0)[1], got[1], rtol=0, atol=1e-12)
    denoiser.calls = 0
    assert torch.equal(guided_velocity(denoiser, x, t, condition), denoiser(x, t, condition).velocity)
    assert denoiser.calls == 2 and not guided_velocity(denoiser, x, t, condition).requires_grad
