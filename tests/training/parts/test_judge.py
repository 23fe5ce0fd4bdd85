"""The judge: gradients of rewards alone, rows that spoil no other, statistics, and what is said of pictures."""

import math

import pytest
import torch
from torch import nn

from genkit.training.objectives.base import DivergedError
from genkit.training.parts.judge import Component, Judge, diversity
from genkit.training.parts.reward_loss import HingeLoss, LinearLoss, TargetLoss
from tests.training.reward_toys import F64, Decoder, named


def judge(*rewards, held_out=(), loss=None, vae=None, **settings):
    rewards = rewards or (named("parabola"),)
    components = [Component(**r) for r in rewards], [Component(**r) for r in held_out]
    return Judge(*components, loss or LinearLoss(), vae=vae or Decoder(), **settings)


def latents(n=5, seed=0):
    return torch.randn(n, 1, 2, 2, dtype=F64, generator=torch.Generator().manual_seed(seed))


def test_the_gradient_is_that_of_the_loss_through_the_decoder():
    x = latents()
    seen = judge()(x, None)
    torch.testing.assert_close(seen.gradient, x - 3, rtol=1e-12, atol=0)
    torch.testing.assert_close(seen.loss, (x - 3).square().flatten(1).sum(1) / 2, rtol=1e-12, atol=0)
    assert not seen.gradient.requires_grad and not x.requires_grad
    with torch.no_grad():
        assert torch.equal(judge()(x, None).gradient, seen.gradient)


@pytest.mark.parametrize(
    "loss, value, slope",
    [
        (LinearLoss(), lambda r: -r, lambda r: -torch.ones_like(r)),
        (HingeLoss(kind="hinge", threshold=0.0), lambda r: (-r).clamp(min=0), lambda r: -(r < 0).double()),
        (TargetLoss(kind="target", value=1.0), lambda r: (r - 1).abs(), lambda r: (r - 1).sign()),
    ],
)
def test_losses_of_a_reward(loss, value, slope):
    x = latents(9)
    r = x.flatten(1).sum(1)
    assert (r > 0).any() and (r < 0).any()
    seen = judge(named("total"), loss=loss)(x, None)
    torch.testing.assert_close(seen.loss, value(r), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(seen.gradient, slope(r).view(-1, 1, 1, 1).expand_as(x), rtol=1e-12, atol=1e-14)
    if loss.kind == "hinge":
        assert seen.logs["hinge_active"] == (r < 0).double().mean()


@pytest.mark.parametrize("clamp, passes", [("straight_through", True), ("hard", False)])
def test_saturated_pictures(clamp, passes):
    """Rewards see [0, 1]; whether what is cut has a gradient is a choice."""
    x = torch.tensor([20.0, -20.0, 1.0, -1.0], dtype=F64).view(1, 1, 2, 2)
    seen = judge(named("total"), clamp=clamp)(x, None)
    assert seen.logs["reward"] == 16 - 16 + 1 - 1
    wanted = -torch.tensor([passes, passes, 1, 1], dtype=F64).view(1, 1, 2, 2)
    assert torch.equal(seen.gradient, wanted)


def test_a_reward_of_nan_is_dropped_and_counted():
    """Its row has loss and gradient 0; the others have what they have alone, bit for bit."""
    x = latents(8)
    bad = x[:, 0, 0, 0] > 0.5
    assert 0 < bad.sum() < 8
    made = judge(named("spoilt"), held_out=[named("bump")])
    seen, clean = made(x, None), made(x[~bad], None)
    assert not seen.loss[bad].any() and not seen.gradient[bad].any()
    assert torch.equal(seen.loss[~bad], clean.loss) and torch.equal(seen.gradient[~bad], clean.gradient)
    assert seen.logs["dropped"] == bad.sum() and clean.logs["dropped"] == 0
    for key in ("reward", "reward/spoilt", "reward/bump"):
        assert seen.logs[key] == pytest.approx(clean.logs[key].item(), rel=1e-14)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_latents_that_are_not_finite_are_dropped(value):
    x = latents()
    x[2, 0, 1, 1] = value
    seen, clean = judge()(x, None), judge()(latents(), None)
    assert seen.logs["dropped"] == 1 and seen.loss.isfinite().all()
    keep = torch.arange(5) != 2
    assert torch.equal(seen.gradient[keep], clean.gradient[keep]) and not seen.gradient[2].any()


@pytest.mark.parametrize("size", [1, 2, 5, 9])
def test_a_few_at_a_time_are_the_whole(size):
    rewards = (named("parabola"), named("bump", weight=2.0))
    x, prompts = latents(), ["a", "b", "a", "b", "a"]
    whole, parts = judge(*rewards), judge(*rewards, micro_batch=size)
    a, b = whole(x, prompts), parts(x, prompts)
    torch.testing.assert_close(a.gradient, b.gradient, rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(a.loss, b.loss, rtol=1e-14, atol=1e-16)
    assert set(a.logs) == set(b.logs) and "diversity" in a.logs
    for key, value in a.logs.items():
        torch.testing.assert_close(value, b.logs[key], rtol=1e-12, atol=0)


def test_components_are_standardised_by_constants():
    rewards = (named("total", weight=0.5) | dict(mean=2.0, std=4.0), named("bump", weight=-1.0))
    x = latents()
    seen = judge(*rewards)(x, None)
    total, bump = x.flatten(1).sum(1), (-(x - 1).square().flatten(1).mean(1) / 4).exp()
    torch.testing.assert_close(seen.loss, -(0.5 * (total - 2) / 4 - bump), rtol=1e-12, atol=1e-14)
    assert seen.logs["reward/total"].item() == pytest.approx(total.mean().item(), rel=1e-12)


def test_running_statistics_move_at_the_end_of_a_step():
    made = judge(named("total"), normalise="running")
    x = latents(50)
    raw = x.flatten(1).sum(1)
    torch.testing.assert_close(made(x, None).loss, -raw, rtol=1e-12, atol=1e-13)  # nothing is known yet
    made.updated()
    standard = (raw - raw.mean()) / raw.std(correction=0)
    torch.testing.assert_close(made(x, None, watch=False).loss, -standard, rtol=1e-10, atol=1e-12)
    made(latents(50, 1), None)  # noted, but the step is not over
    torch.testing.assert_close(made(x, None, watch=False).loss, -standard, rtol=1e-10, atol=1e-12)


def test_running_statistics_leave_out_what_was_dropped():
    made = judge(named("spoilt"), normalise="running")
    made(latents(20), None)
    made.updated()
    assert made.reward.count == (latents(20)[:, 0, 0, 0] <= 0.5).sum() and made.reward.mean.isfinite()


def test_rewards_that_are_not_finite_for_any_sample_end_the_run():
    made = judge(named("spoilt", above=-100.0))
    assert made(latents(), None).logs["dropped"] == 5
    with pytest.raises(DivergedError, match="not finite for any sample"):
        made.updated()


def test_a_size_is_asked_of_all_rewards():
    made = judge(held_out=[named("bump")])
    made.held_out["bump"].check_size = lambda shape: (_ for _ in ()).throw(ValueError(f"no {shape}"))
    with pytest.raises(ValueError, match=r"no \(3, 8, 8\)"):
        made.check_size((3, 8, 8))


def test_diversity_is_within_a_prompt():
    x = torch.zeros(5, 1, 2, 2)
    x[1] = 1.0
    x[3, 0, 0, 0] = 2.0
    prompts = ["a", "a", "b", "b", "c"]
    got = diversity(x, prompts)
    assert got[:4].tolist() == [1.0, 1.0, 1.0, 1.0] and got[4].isnan()
    assert torch.equal(got[:4], diversity(x, torch.tensor([0, 0, 1, 1, 2]))[:4])
    assert diversity(x[:2], None).tolist() == [1.0, 1.0]
    assert diversity(x[:1], None).isnan().all()


def test_measures_are_the_means_of_all_rewards():
    made = judge(held_out=[named("blind", differentiable=False)], micro_batch=2)
    pictures = (latents() / 16 + 1) / 2
    measured = made.measures(pictures, None)
    x = latents()
    assert measured["reward/parabola"] == pytest.approx(-((x - 3).square().flatten(1).sum(1) / 2).mean().item())
    assert measured["reward/blind"] == pytest.approx(x.mean().item())
    assert measured["diversity"] == pytest.approx(diversity(pictures, None).mean().item())


def test_no_gradient_reaches_the_weights_of_rewards_or_decoder():
    class Learned(Decoder):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones((), dtype=F64))

        def decode(self, z, return_dict):
            return (z * self.scale / 16,)

    vae = Learned()
    assert judge(vae=vae)(latents(), None).gradient.any() and vae.scale.grad is None
