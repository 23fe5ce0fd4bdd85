"""LeapAlign: its gradients in closed form, its two forms, and what it does to the trajectory it is pinned to."""

import itertools

import pytest
import torch
from torch import nn

from genkit.rng import ItemRNG
from genkit.training.objectives.draft import DRaFT
from genkit.training.objectives.leapalign import LeapAlign
from tests.training.reward_toys import (
    F64,
    At,
    From,
    Net,
    Offsets,
    batch,
    gradient,
    losses,
    named,
    objective,
    profile,
    vp,
)
from tests.training.test_reward_strategies import closed_form

PAIRS = list(itertools.combinations(range(10), 2))
FORMS = ("sequential", "joint")


def curve(t, s=0.5):
    """``d v / d x`` of the oracle at time ``t``."""
    return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2)


def leaps(pair, alpha, form="sequential"):
    return profile(LeapAlign, points=pair, grad_discount=alpha, similarity_weight=False, form=form)


@pytest.mark.parametrize(
    "pair, values, last",
    [((2, 6), {0.0: -0.4, 0.3: -0.352, 1.0: -0.24}, -0.4), ((0, 5), {0.0: -0.5, 0.3: -0.41, 1.0: -0.2}, -0.5)],
)
@pytest.mark.parametrize("form", FORMS)
def test_the_table_of_leaps(pair, values, last, form):
    for alpha, value in values.items():
        got = leaps(pair, alpha, form)
        assert got[list(pair)].tolist() == pytest.approx([value, last], abs=1e-14)


@pytest.mark.parametrize(
    "alpha, cosine, scale", [(0.0, 0.834970, 0.903968), (0.3, 0.846940, 0.874339), (1.0, 0.873715, 0.805204)]
)
def test_every_pair_has_two_terms_and_a_nested_one(alpha, cosine, scale):
    """``-(k - j) + alpha j (k - j) c_j`` and ``-j``, and nothing at any other call; the mean over all pairs."""
    mean, true = torch.zeros(10, dtype=F64), closed_form()
    for a, b in PAIRS:
        k, j = 1 - a / 10, 1 - b / 10
        wanted = torch.zeros(10, dtype=F64)
        wanted[a], wanted[b] = -(k - j) + alpha * j * (k - j) * curve(j), -j
        got = leaps((a, b), alpha)
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-14)
        assert not got[[i for i in range(10) if i not in (a, b)]].any()
        mean += got / len(PAIRS)
    assert (mean @ true / (mean.norm() * true.norm())).item() == pytest.approx(cosine, abs=5e-7)
    assert (mean.sum() / true.sum()).item() == pytest.approx(scale, abs=5e-7)


@pytest.mark.parametrize(
    "pair, d_j, d_0, weight",
    [
        ((2, 6), 0.071825, 0.213896, 3.185773),
        ((0, 5), 0.068709, 0.318690, 2.388400),
        ((0, 9), 0.460275, 0.0, 1.784837),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_distances_and_their_weight(pair, d_j, d_0, weight, form):
    made = objective(LeapAlign, net=Offsets(10), reward=named("total"), num_inference_steps=10, points=pair, form=form)
    first, *_ = losses(made, batch(1, (1, 1, 1)), From(1.5))
    assert first.logs["reward"].item() == pytest.approx(1.646174, abs=5e-7)
    assert first.logs["d_j"].item() == pytest.approx(d_j, abs=5e-7)
    assert first.logs["d_0"].item() == pytest.approx(d_0, abs=5e-7)
    assert first.logs["similarity_weight"].item() == pytest.approx(weight, abs=5e-6)
    assert first.value.item() == pytest.approx(-weight * 1.646174, abs=5e-6)


def test_a_straight_trajectory_has_weight_five():
    made = objective(LeapAlign, net=Offsets(10), reward=named("total"), num_inference_steps=10, points=(2, 6))
    first, *_ = losses(made, batch(1, (1, 1, 1)), From(0.0))
    assert first.logs["similarity_weight"].item() == pytest.approx(5, abs=1e-12)
    assert first.logs["d_j"] < 1e-14 and first.logs["d_0"] < 1e-14


# -- two forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.3, 1.0])
def test_both_forms_are_one_gradient(alpha):
    """Bit for bit in float64, for every pair, whether or not the backward is scaled."""
    made = {form: objective(LeapAlign, form=form, grad_discount=alpha, points=(0, 1)) for form in FORMS}
    for weighted, pair in itertools.product((True, False), itertools.combinations(range(6), 2)):
        for form in FORMS:
            made[form].config.points, made[form].config.similarity_weight = At(*pair), weighted
        joint = gradient(made["joint"])
        assert joint.norm() > 0
        assert torch.equal(gradient(made["sequential"], scale=8.0 if weighted else 1.0), joint), pair


@pytest.mark.parametrize(
    "settings", [dict(leaps=1), dict(leaps=3, grad_discount=0.1), dict(leaps=3, grad_discount=1.0)]
)
def test_both_forms_of_one_and_three_leaps(settings):
    for step in range(8):
        sequential, joint = (gradient(objective(LeapAlign, form=f, **settings), batch(step=step)) for f in FORMS)
        assert torch.equal(sequential, joint)


def test_both_forms_under_guidance_on_another_path():
    """Kernels see the same rows in the same order, but a product of more factors."""
    for settings in (dict(kind="epsilon", scheduler=vp()), dict(kind="v_prediction")):
        made = [gradient(objective(LeapAlign, form=f, points=(1, 3), **settings)) for f in FORMS]
        assert (made[0] - made[1]).norm() <= 1e-10 * made[1].norm()


def test_neighbours_at_the_end_are_draft_2():
    settings = dict(points=(4, 5), grad_discount=1.0, similarity_weight=False)
    for form in FORMS:
        assert torch.equal(
            gradient(objective(LeapAlign, form=form, **settings)), gradient(objective(DRaFT, live_steps=2))
        )


def test_alpha_0_is_a_detached_input():
    made = objective(LeapAlign, points=(1, 4), grad_discount=0.0, similarity_weight=False)
    got, (net, grid) = gradient(made), (made.student.module, made.grid((1, 2, 2)))
    x, states, ends = ItemRNG(1, range(3)).normal((1, 2, 2), dtype=F64), [], 0.0
    with torch.no_grad():
        for i in range(6):
            states.append(x)
            x = x + (grid.times[i + 1] - grid.times[i]) * net(x, grid.times[i].expand(3))
    for i, end in ((1, grid.times[4]), (4, grid.times[6])):
        ends = ends + (end - grid.times[i]) * net(states[i], grid.times[i].expand(3))
    loss = (((x - 3) * ends).flatten(1).sum(1)).mean()
    wanted = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-14)


class Staged(nn.Module):
    """Other weights at every call of ``n``."""

    def __init__(self, n):
        super().__init__()
        torch.manual_seed(2)
        self.nets = nn.ModuleList(Net() for _ in range(n))

    def forward(self, x, t):
        (i,) = ((1 - t) * len(self.nets)).round().long().unique().tolist()
        return self.nets[i](x, t)


@pytest.mark.parametrize("form", FORMS)
def test_weights_of_other_calls_get_no_gradient(form):
    made = objective(LeapAlign, net=Staged(6), points=(1, 4), form=form)
    gradient(made)
    for i, net in enumerate(made.student.module.nets):
        moved = [w.grad is not None and bool(w.grad.any()) for w in net.parameters()]
        assert all(moved) if i in (1, 4) else not any(moved)


def test_pairs_of_a_batch_are_one_and_of_samples_many():
    seen = {}
    for pairs in ("batch", "sample"):
        made = objective(LeapAlign, pairs=pairs)
        calls = []
        made._sequential = lambda run, x, points, given, calls=calls: calls.append(points) or iter(())
        for step in range(20):
            given = batch(8, step=step)
            list(made.losses(made.phases(step)[0], given, ItemRNG(1, given.index)))
        seen[pairs] = torch.stack(calls)
    assert (seen["batch"] == seen["batch"][:, :1]).all() and len(seen["batch"][:, 0].unique(dim=0)) > 5
    assert len(seen["sample"][0].unique(dim=0)) > 3


@pytest.mark.parametrize("form", FORMS)
def test_the_reward_sees_the_real_sample(form):
    """Bit for bit what sampling gives, whatever the leaps say."""
    shown = []
    for made in (objective(LeapAlign, form=form), objective(DRaFT)):
        made.judge.register_forward_pre_hook(lambda _, given: shown.append(given[0].detach().clone()))
        losses(made)
    assert torch.equal(*shown)


@pytest.mark.parametrize("form", FORMS)
def test_a_hinge_that_nobody_is_below_leaves_all_weights(form):
    made = objective(LeapAlign, form=form, loss=dict(kind="hinge", threshold=-1e6))
    first, *_ = losses(made)
    assert first.logs["hinge_active"] == 0 and first.value == 0
    assert not any(w.grad is not None and w.grad.any() for w in made.student.module.parameters())


def test_a_trajectory_that_is_lost_spoils_no_other():
    """One sample's network output is infinite: the others learn as without it."""

    class Lost(Net):
        def forward(self, x, t):
            bad = (x[:, :, :1, :1].abs() > 1e3).to(x)
            return super().forward(x, t) + torch.where(bad > 0, torch.inf, 0.0)

    torch.manual_seed(0)
    net = Lost()
    made = objective(LeapAlign, net=net)

    class One(ItemRNG):
        def normal(self, shape=(), *, dtype=torch.float32):
            x = super().normal(shape, dtype=dtype)
            x[1] = 1e4
            return x

    got = gradient(made, batch(3), One(1, range(3)))
    alone = batch(2)
    alone.index = torch.tensor([0, 2])
    others = gradient(made, alone, ItemRNG(1, [0, 2]))
    assert got.isfinite().all()
    torch.testing.assert_close(got, others * 2 / 3, rtol=1e-11, atol=1e-14)
