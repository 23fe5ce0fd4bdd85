"""Losses that pull preferred and rejected samples apart, in float64, and the watch over both."""

import math

import pytest
import torch

from genkit.interpolants import Linear, VariancePreserving
from genkit.training.objectives.base import DivergedError
from genkit.training.parts.preferences import Watch, clipped, default_times, dpo_loss, group_weights, saturating
from genkit.training.parts.times import LogitNormal, Uniform

F64 = torch.float64


@pytest.mark.parametrize("beta", [0.1, 500.0, 5000.0])
def test_at_the_reference_dpo_is_log_2_with_slope_beta_over_4(beta):
    """Spec, numbers 1 and 2: at beta = 500 the ratio to the gradient of err_w - err_l is 125."""
    rise = torch.zeros(2, 5, dtype=F64, requires_grad=True)
    loss = dpo_loss(rise[0], rise[1], beta)
    assert loss.tolist() == pytest.approx([math.log(2)] * 5, abs=1e-15)
    (gradient,) = torch.autograd.grad(loss.sum(), rise)
    assert gradient.tolist() == [[beta / 4] * 5, [-beta / 4] * 5]


def test_dpo_is_minus_log_sigmoid_of_the_logit():
    rise = torch.randn(2, 50, dtype=F64, generator=torch.Generator().manual_seed(0))
    expected = -torch.log(torch.sigmoid(-0.5 * 3.0 * (rise[0] - rise[1])))
    assert torch.allclose(dpo_loss(rise[0], rise[1], 3.0), expected, atol=1e-14, rtol=0)


def test_dpo_s_optimum_is_the_reference_tilted_by_the_reward():
    """With exact likelihoods, half of rise is minus log p / p_ref: p proportional to p_ref exp(r / beta)."""
    p_ref = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
    reward, beta = torch.tensor([1.0, -0.5, 0.3, 0.0], dtype=F64), 0.7
    preferred = torch.sigmoid(reward[:, None] - reward[None])  # Bradley-Terry: i over j
    draws = p_ref[:, None] * p_ref[None]
    logits = p_ref.log().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=500, tolerance_change=1e-16, tolerance_grad=1e-12)

    def closure():
        optimizer.zero_grad()
        rise = -2 * (logits.log_softmax(0) - p_ref.log())
        loss = (draws * preferred * dpo_loss(rise[:, None], rise[None], beta)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = (p_ref.log() + reward / beta).softmax(0)
    assert torch.allclose(logits.detach().softmax(0), expected, atol=1e-7)


def test_bounded_forms_are_bounded_and_agree_with_the_plain_one_near_the_reference():
    generator = torch.Generator().manual_seed(1)
    before = torch.rand(200, dtype=F64, generator=generator) + 0.1
    weight = 2 * torch.rand(200, dtype=F64, generator=generator) - 1
    far = before * torch.logspace(-3, 9, 200, dtype=F64)
    assert (clipped(weight, far, before, 2.0) >= weight.clamp(max=0) * 2 * before).all()
    assert (saturating(weight, far, before, 3.0) >= 0).all()
    assert (weight * far).min() < -1e6  # the plain form is not
    err = before.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(clipped(weight, err, before, 2.0).sum(), err)
    assert torch.equal(gradient, weight)
    (gradient,) = torch.autograd.grad(saturating(weight, err, before, 3.0).sum(), err)
    assert torch.allclose(gradient, 1.5 * weight, atol=1e-15)
    err = (3 * before).requires_grad_()
    (gradient,) = torch.autograd.grad(clipped(weight, err, before, 2.0).sum(), err)
    assert torch.equal(gradient, weight.clamp(min=0))  # rejected samples are far enough away


def test_group_weights_give_the_means_of_the_groups():
    """Over the data set, and hence in expectation; each item's weight is its own."""
    score = torch.tensor([1, 0, 0, 0, 1, 0, 0, 0, 0, 0], dtype=F64)
    err = torch.arange(1, 11, dtype=F64)
    share = 0.8 - 0.6 * score
    weight = group_weights(score, share, 10.0)
    expected = (1 + 5) / 2 - (2 + 3 + 4 + 6 + 7 + 8 + 9 + 10) / 8
    assert (weight * err).mean().item() == pytest.approx(expected, abs=1e-13)
    assert torch.equal(group_weights(score[3:4], share[3:4], 10.0), weight[3:4])
    assert group_weights(score, share, 2.0)[0] == 2.0  # rare ones are capped
    assert torch.equal(group_weights(score, share, 1.0), 2 * score - 1)
    assert torch.equal(group_weights(score, None, 10.0), 2 * score - 1)
    between = group_weights(torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=F64), None, 10.0)
    assert between.tolist() == [-1, -0.5, 0, 1]


def test_the_published_law_of_times():
    assert default_times(Linear()) == LogitNormal(mean=1.0, std=1.0)
    assert default_times(VariancePreserving()) == Uniform()


def test_the_watch_tells_the_groups_apart():
    watch = Watch()
    logs = watch.add(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 5.0]), torch.tensor([1.0, 10.0]))
    assert {k: v.item() for k, v in logs.items()} == pytest.approx(dict(err_w=2, err_l=5, rise_w=1, rise_l=-0.5))
    logs = watch.add(torch.tensor([-1.0, 0.0]), torch.tensor([7.0, 99.0]), torch.tensor([14.0, 1.0]))
    kept = 1 - 1 / watch.horizon
    assert logs["err_w"].item() == pytest.approx(2) and logs["rise_w"].item() == pytest.approx(1)
    assert logs["err_l"].item() == pytest.approx((5 * kept + 7) / (kept + 1))
    for _ in range(3000):
        logs = watch.add(torch.tensor([1.0]), torch.tensor([3.0]), torch.tensor([3.0]))
    assert logs["err_w"].item() == pytest.approx(3, abs=1e-4)
    assert set(Watch().add(torch.tensor([-1.0]), torch.tensor([1.0]), None)) == {"err_w", "err_l"}
    assert Watch().add(torch.tensor([-1.0]), torch.tensor([1.0]), None)["err_w"] == 0


def test_the_watch_stops_when_preferred_samples_get_worse():
    watch = Watch()
    watch.add(torch.tensor([-1.0]), torch.tensor([9.0]), torch.tensor([1.0]))
    watch.check(0.5)  # rejected ones may
    watch.add(torch.tensor([1.0]), torch.tensor([1.49]), torch.tensor([1.0]))
    watch.check(0.5)
    watch.add(torch.tensor([1.0]), torch.tensor([1.6]), torch.tensor([1.0]))
    watch.check(None)
    with pytest.raises(DivergedError, match=r"preferred samples is 1.55 times .* 1 \+ max_rise=1.5"):
        watch.check(0.5)
