"""Strategies of reward fine-tuning: closed-form gradients, what equals what, and what they refuse."""

import math

import pytest
import torch
from diffusers import DDIMScheduler
from pydantic import ValidationError
from torch.func import functional_call

from genkit.denoisers import from_pipeline
from genkit.denoisers.base import Condition
from genkit.registry import members
from genkit.rng import ItemRNG
from genkit.testing import tiny
from genkit.training.build import build
from genkit.training.config import TrainConfig
from genkit.training.objectives._reward import RewardObjective
from genkit.training.objectives.align_prop import AlignProp, NormalStart
from genkit.training.objectives.base import shared
from genkit.training.objectives.draft import DRaFT
from genkit.training.objectives.draft_lv import DRaFTLV
from genkit.training.objectives.drtune import DRTune
from genkit.training.objectives.leapalign import LeapAlign
from genkit.training.objectives.refl import ReFL
from genkit.training.parts.rollout import walker
from tests.training.ready import VARIANTS, Variant
from tests.training.reward_toys import F64, From, Offsets, batch, gradient, losses, named, objective, profile, vp

# Every strategy, each in the ways that ready.py names.
WAYS = {
    f"{name}-{i}": (cls, variant)
    for name, cls in members("genkit.training.objectives", RewardObjective).items()
    for i, variant in enumerate(VARIANTS.get(name, [Variant()]))
}
every = pytest.mark.parametrize("cls, settings", [(c, v.settings) for c, v in WAYS.values()], ids=WAYS)
every_variant = pytest.mark.parametrize("cls, variant", WAYS.values(), ids=WAYS)

# d x_0 / d theta_i of the oracle.
TABLE = [-0.047865, -0.053642, -0.060638, -0.069060, -0.078926, -0.089689, -0.099654, -0.105882, -0.105882, -0.100000]


# -- values in closed form ----------------------------------------------------------------------------------------


def closed_form(n=10, s=0.5):
    """The same from the recursion of the exact flow."""
    t = torch.arange(n, 0, -1, dtype=F64) / n
    c = (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)
    after = torch.cat(((1 - c / n).flip(0).cumprod(0).flip(0)[1:], torch.ones(1, dtype=F64)))
    return -after / n


def test_the_gradient_through_all_steps_is_that_of_the_exact_flow():
    got = profile(DRaFT, live_steps=None)
    torch.testing.assert_close(got, closed_form(), rtol=0, atol=1e-14)
    assert got.tolist() == pytest.approx(TABLE, abs=5e-7)
    assert got.sum().item() == pytest.approx(-0.811238, abs=5e-7)


@pytest.mark.parametrize(
    "k, value, share", [(10, -1.622476, 1), (5, -1.002215, 0.6177), (2, -0.411765, 0.2538), (1, -0.2, 0.1233)]
)
def test_draft_k_keeps_the_last_k_terms(k, value, share):
    reward = named("parabola")
    got, whole = profile(DRaFT, live_steps=k, reward=reward), profile(DRaFT, live_steps=None, reward=reward)
    assert got.sum().item() == pytest.approx(value, abs=5e-7)
    assert (got.sum() / whole.sum()).item() == pytest.approx(share, abs=5e-5)
    assert not got[: 10 - k].any()
    torch.testing.assert_close(got[10 - k :], whole[10 - k :], rtol=0, atol=1e-12)


def test_many_steps_approach_the_integral():
    """``-int_0^1 s / sqrt((1 - t)^2 s^2 + t^2) dt``."""
    n = 2000
    got = profile(DRaFT, n=n, live_steps=None, recompute=False)
    torch.testing.assert_close(got, closed_form(n), rtol=0, atol=1e-14)
    t = (torch.arange(100_000, dtype=F64) + 0.5) / 100_000
    limit = -(0.5 / ((1 - t) ** 2 / 4 + t**2).sqrt()).mean().item()
    assert got.sum().item() == pytest.approx(-0.860538, abs=5e-7) and limit == pytest.approx(-0.860818, abs=5e-7)


def test_refl_sees_one_jump():
    got = profile(ReFL, first=6, last=6)
    assert got[6].item() == pytest.approx(-0.4, abs=1e-15) and not got[torch.arange(10) != 6].any()


def test_drtune_sums_steps_without_products():
    """``-(t_i - t_{i+1})`` of trained steps and ``-t`` of the jump: offset and end are as drawn."""
    seen = set()
    for step in range(12):
        once = shared(batch(step=step), ItemRNG(0, [0]))
        stop = 9 - int(once.integers(4))
        apart = (stop + 1) // 3
        offset = int(once.integers(stop + 1 - 2 * apart))
        wanted = torch.zeros(10, dtype=F64)
        for i in (offset, offset + apart, offset + 2 * apart):
            wanted[i] = -(1 - i / 10) if i == stop else -0.1
        seen.add((stop, offset))
        settings = dict(reward=named("total"), num_inference_steps=10, live_steps=3, early_stop=4)
        made = objective(DRTune, net=Offsets(10), **settings)
        got = -gradient(made, batch(1, (1, 1, 1), step=step), From(0.0))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-15)
    assert len({stop for stop, _ in seen}) > 2 and len({offset for _, offset in seen}) > 1


# -- what equals what ---------------------------------------------------------------------------------------------


def test_k_of_n_steps_is_the_whole():
    assert torch.equal(gradient(objective(DRaFT, live_steps=6)), gradient(objective(DRaFT, live_steps=None)))


@every
def test_computing_again_changes_nothing(cls, settings):
    runs = [gradient(objective(cls, recompute=r, **settings)) for r in (True, False)]
    assert torch.equal(*runs) and runs[0].norm() > 0


@pytest.mark.parametrize(
    "cls, settings",
    [
        (DRaFTLV, dict(copies=0)),
        (AlignProp, dict(first_live=dict(law="fixed", call=5))),
        (ReFL, dict(first=5)),
        (DRTune, dict(live_steps=1, early_stop=1, num_inference_steps=1)),
        (LeapAlign, dict(leaps=1, points=(5,), similarity_weight=False)),
    ],
)
def test_one_step_alone_is_draft_1(cls, settings):
    made = objective(cls, **settings)
    plain = objective(DRaFT, live_steps=1, num_inference_steps=settings.get("num_inference_steps", 6))
    assert torch.equal(gradient(made), gradient(plain))


def test_the_last_steps_of_a_random_cut_are_draft_k():
    for step in range(6):
        given = batch(step=step)
        made = objective(AlignProp, first_live=dict(law="uniform"))
        live = int(shared(given, ItemRNG(1, [0])).integers(6))
        assert torch.equal(gradient(made, given), gradient(objective(DRaFT, live_steps=6 - live), given))


@every
def test_the_sign_of_the_reward_is_that_of_the_gradient(cls, settings):
    signs = [gradient(objective(cls, reward=named("parabola", sign=s), **settings)) for s in (1.0, -1.0)]
    assert torch.equal(signs[0], -signs[1])


@every_variant
def test_the_loss_is_that_of_the_sample(cls, variant):
    settings = variant.settings | variant.mean
    first, *_ = losses(objective(cls, loss=dict(kind="hinge", threshold=2.0), **settings))
    assert first.value.item() == pytest.approx(variant.share * (2 - first.logs["reward"].item()), rel=1e-12)
    assert first.logs["dropped"] == 0 and first.logs["distance_from_base"] == 0 and first.logs["hinge_active"] == 1


KINDS = {"linear": ("sample", "v_prediction"), "vp": ("sample", "v_prediction", "epsilon")}


@every
@pytest.mark.parametrize("path", KINDS)
def test_the_gradient_does_not_depend_on_what_the_network_predicts(cls, settings, path):
    """Networks that say the same in other words learn the same."""
    made = {
        kind: gradient(objective(cls, kind=kind, scheduler=vp() if path == "vp" else None, **settings))
        for kind in ("flow_prediction", *KINDS[path])
    }
    wanted = made.pop("flow_prediction")
    for kind, got in made.items():
        assert (got - wanted).norm() <= 1e-11 * wanted.norm(), kind


@every
@pytest.mark.parametrize("detach", [False, True])
def test_a_batch_is_the_mean_of_its_items(cls, settings, detach):
    number = torch.linspace(-1, 1, 4, dtype=F64)
    condition = Condition({"number": number}, {"number": torch.zeros_like(number)})
    made = objective(cls, guidance_scale=2.0, detach_unconditional=detach, **settings)
    given = batch(4, condition=condition)
    whole = gradient(made, given, ItemRNG(1, range(4)))
    parts = []
    for i in range(4):
        part = batch(1, condition=condition.index([i]))
        part.index = torch.tensor([i])
        parts.append(gradient(made, part, ItemRNG(1, [i])))
    torch.testing.assert_close(torch.stack(parts).mean(0), whole, rtol=1e-9, atol=1e-12)


# -- DRaFT-LV -----------------------------------------------------------------------------------------------------


def test_copies_are_renoised_samples():
    """Mean and sum, by hand: one network call at ``alpha x_0 + sigma eps``."""
    mean, total = (gradient(objective(DRaFTLV, copies=2, reduction=r)) for r in ("mean", "sum"))
    torch.testing.assert_close(3 * mean, total, rtol=1e-12, atol=0)
    made, rng = objective(DRaFTLV), ItemRNG(1, range(3))
    x = rng.normal((1, 2, 2), dtype=F64)
    net = made.student.module
    with torch.no_grad():
        for k in range(5):
            x = x - net(x, torch.full((3,), 1 - k / 6, dtype=F64)) / 6
    t = torch.full((3,), 1 / 6, dtype=F64)
    ends = [x - net(x, t) / 6]
    for _ in range(2):
        z = 5 / 6 * ends[0].detach() + rng.normal((1, 2, 2), dtype=F64) / 6
        ends.append(z - net(z, t) / 6)
    loss = sum((end - 3).square().flatten(1).sum(1).mean() / 2 for end in ends)
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(total, wanted, rtol=1e-11, atol=1e-13)


def test_only_the_samples_themselves_are_watched():
    made = objective(DRaFTLV, copies=2, held_out=[named("bump")], normalise="running")
    first, *copies = losses(made)
    assert {"reward/bump", "reward/parabola", "diversity"} <= set(first.logs) and not any(c.logs for c in copies)
    made.updated(made.phases(0)[0])
    assert made.judge.reward.count.item() == 3


def test_the_variance_of_copies_is_between_plus_within_over_n():
    """Two numbers of a sample, so that both parts can be seen: of the samples', and of the copies' noise."""
    made = objective(DRaFTLV, copies=0, num_inference_steps=4, reward=named("bump"))
    net, path = made.student.module, made.student.interpolant
    samples, copies, t = 64, 16, torch.tensor(0.25, dtype=F64)
    grid, weights = made.grid((1, 2, 2)), dict(net.named_parameters())
    x = ItemRNG(3, range(samples)).normal((1, 2, 2), dtype=F64)
    with torch.no_grad():
        for i in range(4):
            v = net(x, grid.times[i].expand(samples))
            x = x + (grid.times[i + 1] - grid.times[i]) * v
    noise = ItemRNG(4, range(samples)).normal((copies, 1, 2, 2), dtype=F64)

    def one(weights, x0, eps):
        z = path.interpolate(x0[None], eps[None], t)
        clean = z - t * functional_call(net, weights, (z, t[None]))
        return (-(clean - 1).square().mean() / 4).exp()

    over_copies = torch.vmap(torch.func.grad(one), (None, None, 0))
    g = torch.vmap(over_copies, (None, 0, 0))(weights, x, noise)
    g = torch.cat([v.flatten(2) for v in g.values()], 2)  # (samples, copies, weights)
    # Unbiased estimates of both parts from half of the copies predict the variance of means over the other half's.
    fitted, held = g[:, : copies // 2], g[:, copies // 2 :]
    within = fitted.var(1).mean(0).sum()
    between = fitted.mean(1).var(0).sum() - within / (copies // 2)
    for n in (1, 2, 4, 8):
        measured = held.view(samples, -1, n, g.shape[2]).mean(2).var(0).sum(1).mean()
        assert measured.item() == pytest.approx((between + within / n).item(), rel=0.05)
    assert within > 0.05 * between


# -- AlignProp ----------------------------------------------------------------------------------------------------


def test_the_first_live_call_is_a_truncated_normal():
    """By default N(42, 5) on 1 to 49 of 50 calls, as released."""
    law, n = NormalStart(), 50
    draws = law.draw(ItemRNG(0, range(200_000)), n)
    assert draws.min() >= 1 and draws.max() == 49
    mass = (-(((torch.arange(1, 50, dtype=F64) - 42) / 5) ** 2) / 2).exp()
    measured = draws.bincount(minlength=50)[1:].double() / len(draws)
    torch.testing.assert_close(measured, mass / mass.sum(), rtol=0, atol=5 * math.sqrt(0.08 / len(draws)))
    assert set(NormalStart(mean=0.5, std=1e-9).draw(ItemRNG(0, range(9)), 6).tolist()) == {3}
    assert NormalStart().draw(ItemRNG(0, range(9)), 2).tolist() == [1] * 9
    assert NormalStart(mean=0, std=1e-3).draw(ItemRNG(0, range(9)), 50).tolist() == [1] * 9


# -- guidance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detach", [False, True])
def test_guidance_weighs_the_branches(detach):
    """The last step's gradient is ``w`` times that of the conditional branch, ``1 - w`` that of the other."""
    w, n = 3.0, 3
    number = torch.ones(n, dtype=F64)
    condition = Condition({"number": number}, {"number": -number})
    made = objective(DRaFT, guidance_scale=w, detach_unconditional=detach, reward=named("total"))
    got = gradient(made, batch(n, condition=condition))
    net, x = made.student.module, ItemRNG(1, range(n)).normal((1, 2, 2), dtype=F64)
    for k in range(6):
        with torch.set_grad_enabled(k == 5):
            t = torch.full((n,), 1 - k / 6, dtype=F64)
            u = net(x, t, -number)
            u = u.detach() if detach else u
            x = x - (u + w * (net(x, t, number) - u)) / 6
    wanted = torch.autograd.grad(-x.flatten(1).sum(1).mean(), list(net.parameters()))
    torch.testing.assert_close(got, torch.cat([g.flatten() for g in wanted]), rtol=1e-11, atol=1e-13)


@every_variant
def test_the_network_is_called_as_often_as_said(cls, variant):
    """Calls with gradient off are not made again; those with it are once more under ``recompute``, uncounted here."""
    made = objective(cls, recompute=False, **variant.settings)
    losses(made)
    assert made.student.calls in (variant.calls or range(1, 100))


# -- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, settings, words",
    [
        (DRaFT, dict(live_steps=7), "live_steps=7.*1 to num_inference_steps=6"),
        (DRTune, dict(live_steps=3, early_stop=5), "live_steps=3, early_stop=5.*shortest rollout has 2"),
        (DRTune, dict(early_stop=7), "early_stop=7"),
        (ReFL, dict(first=4, last=3), "first=4, last=3"),
        (ReFL, dict(last=6), "last=6.*num_inference_steps=6"),
        (AlignProp, dict(first_live=dict(law="fixed", call=6)), "call=6.*= 5"),
        (AlignProp, dict(num_inference_steps=1), "at least 2, got 1"),
        (LeapAlign, dict(num_inference_steps=1), "2 leaps need"),
        (LeapAlign, dict(leaps=1, grad_discount=0.3), "grad_discount=0.3"),
        (LeapAlign, dict(similarity_weight=False, tau=0.2), "tau=0.2"),
        (LeapAlign, dict(form="joint", pairs="sample"), "set pairs='batch'"),
        (DRaFT, dict(detach_unconditional=True), "detach_unconditional=True"),
        (DRaFT, dict(held_out=[named("parabola")]), "parabola.*more than once"),
        (DRaFT, dict(normalise="running", rewards=[named("bump") | dict(std=2.0)]), "normalise='running'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(cls, settings, words):
    with pytest.raises(ValidationError, match=f"(?s){words}"):
        cls.Config(**(dict(rewards=[named("parabola")], num_inference_steps=6) | settings))


def test_a_reward_without_gradient_is_refused_unless_only_watched():
    with pytest.raises(ValueError, match=r"\['blind'\] have no gradient.*held_out.*dro and diffusion_dpo"):
        objective(DRaFT, reward=named("blind", differentiable=False))
    (loss,) = losses(objective(DRaFT, held_out=[named("blind", differentiable=False)]))
    assert loss.logs["reward/blind"].isfinite()
    with pytest.raises(ValueError, match="said to be differentiable, but no gradient"):
        losses(objective(DRaFT, reward=named("blind")))


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_a_scheduler_that_clips_is_refused(setting):
    scheduler = vp()
    scheduler.register_to_config(**{setting: True})
    with pytest.raises(ValueError, match=f"{setting}=True of the pipeline's DDIMScheduler"):
        objective(DRaFT, scheduler=scheduler)


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "PNDMScheduler"])
def test_a_scheduler_that_remembers_steps_is_refused(name):
    with pytest.raises(ValueError, match=f"objective.scheduler='{name}' remembers earlier steps"):
        walker(vp(), name)


def test_an_unknown_scheduler_is_named():
    with pytest.raises(ValueError, match="objective.scheduler='DDIMSchedular'.*DDIMScheduler"):
        walker(vp(), "DDIMSchedular")


def test_a_last_call_without_noise_is_refused_before_training():
    """Where the first of the betas is 0, all copies of a sample would be one."""
    betas = [0.0, *torch.linspace(1e-4, 0.02, 999).tolist()]
    scheduler = DDIMScheduler(clip_sample=False, trained_betas=betas)
    with pytest.raises(ValueError, match=r"alphas_cumprod must lie in \[0, 1\), got \[.*, 1\]"):
        walker(scheduler)
    made = objective(DRaFTLV)
    with pytest.raises(ValueError, match=r"strictly decreasing times in \(0, 1\]"):
        made.walker.set_timesteps(sigmas=[1.0, 0.5, 0.0, 0.0])


def test_epsilon_at_pure_noise_is_refused_before_training():
    scheduler = DDIMScheduler(clip_sample=False, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    with pytest.raises(ValueError, match="epsilon"):
        objective(DRaFT, kind="epsilon", scheduler=scheduler).check_shape((1, 2, 2))


@pytest.mark.parametrize("name, shape, picture", [("sd15", (4, 8, 8), (3, 16, 16)), ("dit", (4, 8, 8), (3, 16, 16))])
def test_the_size_of_decoded_pictures_is_told_before_training(name, shape, picture):
    pipe, told = tiny.pipeline(name), []
    made = DRaFT.make(DRaFT.Config(rewards=[named("parabola")], num_inference_steps=2), from_pipeline(pipe), None, pipe)
    made.judge.reward.components["parabola"].check_size = told.append
    made.check_shape(shape)
    with torch.no_grad():
        decoded = pipe.vae.decode(torch.zeros(1, *shape)).sample
    assert told == [picture] == [tuple(decoded.shape[1:])]


def test_a_size_that_a_reward_cannot_take_is_refused_when_the_run_is_built(toys, tmp_path):
    settings = toys.settings(
        tmp_path,
        model=dict(network="dit", sample_size=16, hidden_size=16, num_layers=1, num_heads=2, num_classes=10),
        objective=dict(name="draft", rewards=[dict(name="digits", wanted=3)]),
        data=dict(name="prompts", num_classes=10),
    )
    with pytest.raises(ValueError, match=r"reward digits: images of shape \(1, 16, 16\); accepted .* \(1, 8, 8\)"):
        build(TrainConfig(**settings))


@every
def test_a_reward_that_is_not_a_number_takes_part_in_nothing(cls, settings):
    """Its sample counts in the batch, with gradient 0."""
    keep = torch.tensor([0, 2, 3])
    made = objective(cls, reward=named("spoilt", above=15.0), **settings)
    whole = gradient(made, batch(4), ItemRNG(1, range(4)))
    far, shown = torch.tensor([0, 1e4, 0, 0], dtype=F64).view(-1, 1, 1, 1), made.judge.forward
    made.judge.forward = lambda x, *args, **kwargs: shown(x + far, *args, **kwargs)
    got = gradient(made, batch(4), ItemRNG(1, range(4)))
    made.judge.forward = shown
    part = batch(3)
    part.index = keep
    others = gradient(made, part, ItemRNG(1, keep))
    torch.testing.assert_close(got, 3 / 4 * others, rtol=1e-10, atol=1e-13)
    assert not torch.equal(got, whole)
