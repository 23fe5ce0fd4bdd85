"""The flow-map objective: what it adds to the residuals (split, targets, guidance, weights)."""

import math

import pytest
import torch
from torch import nn

from genkit.denoisers.base import Condition
from genkit.denoisers.function import FunctionDenoiser, FunctionFlowMap
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.testing.oracles import Gaussian, two_class_mixture
from genkit.training.objectives.base import Batch, DivergedError
from genkit.training.objectives.flow_map import FlowMapConfig, FlowMapObjective, GuidanceLaw
from genkit.training.parts.loss_weight import LossWeight
from genkit.training.parts.times import share

F64 = torch.float64


class MLP(nn.Module):
    def __init__(self, dim=2, classes=0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(dim + 2 + classes, 32), nn.SiLU(), nn.Linear(32, dim)).double()
        self.classes = classes

    def forward(self, x, t, s, class_labels=None):
        extra = [] if class_labels is None else [torch.nn.functional.one_hot(class_labels, self.classes).to(x)]
        return self.body(torch.cat((x, t[:, None].to(x), s[:, None].to(x), *extra), dim=1))


def make(config, net=None, teacher=None):
    torch.manual_seed(0)
    return FlowMapObjective(FlowMapConfig(**config), FunctionFlowMap(net or MLP(), Linear()), teacher)


def batch(n=64, start=0, condition=None):
    index = torch.arange(start, start + n)
    return Batch(ItemRNG(9, index).normal((2,), dtype=F64), condition or Condition(), index), ItemRNG(0, index)


def loss_of(objective, data):
    (phase,) = objective.phases(0)
    return objective(phase, *data)


@pytest.mark.parametrize("fraction", [0.75, 0.5, 1.0, 0.9])
def test_split_is_exact_in_every_run_of_items(fraction):
    off = share(torch.arange(10_000), 1 - fraction)
    assert off.sum().item() == round(10_000 * (1 - fraction))
    for size in (1, 4, 32):
        per_batch = off[: 10_000 // size * size].view(-1, size).sum(1).double()
        assert (per_batch - size * (1 - fraction)).abs().max() <= 1


@pytest.mark.parametrize("name", ["lsd", "esd", "psd_m", "psd_u"])
def test_a_batch_equals_its_micro_batches(name):
    objective = make({"loss": name})
    whole = loss_of(objective, batch(64)).value
    for size in (16, 1):
        parts = [loss_of(objective, batch(size, start)).value for start in range(0, 64, size)]
        torch.testing.assert_close(torch.stack(parts).mean(), whole, rtol=1e-6, atol=0)  # times are float32


@pytest.mark.parametrize("name", ["lsd", "esd", "psd_m", "psd_u"])
def test_loss_at_the_exact_map_is_the_irreducible_variance(name):
    """Off the diagonal the residual is 0; on it E|v - v_c|^2, the same for every form."""
    law = Gaussian(torch.tensor([0.0, 0.0], dtype=F64), 1.0)
    objective = make({"loss": name})
    objective.student = FunctionFlowMap(lambda x, t, s: law.average_velocity(x, t, s), Linear())
    loss = loss_of(objective, batch(4096))
    assert loss.logs["off_diagonal"] < 1e-10  # float32 times
    # Var(eps - x0 | x_t) = 1 / V_t per dimension, E over t ~ U(0, 1) is pi/2; two dimensions.
    assert loss.logs["diagonal"].item() == pytest.approx(math.pi, rel=0.08)


def test_teacher_replaces_the_velocity_of_the_identity():
    law = Gaussian(torch.tensor([1.0, -2.0], dtype=F64), 0.5)
    teacher = FunctionDenoiser(_AsModule(lambda x, t: law.velocity(x, t)), Linear(), "flow_prediction")
    objective = make({"loss": "lsd"}, teacher=teacher)
    objective.student = FunctionFlowMap(lambda x, t, s: law.average_velocity(x, t, s), Linear())
    assert loss_of(objective, batch(256)).logs["off_diagonal"] < 1e-9
    assert not any(p.requires_grad for p in objective.teacher_module.parameters())
    assert objective.roles["teacher"].trains is False


class _AsModule(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args, **kwargs):
        return self.fn(*args, **kwargs)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
@pytest.mark.parametrize("name", ["lsd", "esd", "psd_m"])
def test_the_loss_does_not_depend_on_the_teachers_prediction_type(kind, name):
    law = two_class_mixture()
    losses = []
    for k in ("flow_prediction", kind):
        teacher = FunctionDenoiser(
            _AsModule(lambda x, t, class_labels, k=k: law.predict(k, x, t, class_labels)), Linear(), k
        )
        objective = make({"loss": name, "guidance_scale": 2.0, "t_min": 0.05, "t_max": 0.95}, MLP(16, 3), teacher)
        labels = torch.arange(64) % 2
        index = torch.arange(64)
        condition = Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, law.num_classes)})
        data = Batch(ItemRNG(9, index).normal((16,), dtype=F64), condition, index), ItemRNG(0, index)
        losses.append(loss_of(objective, data).value)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-10, atol=1e-10)


def test_self_guidance_has_the_published_fixed_point():
    """v_c + (1 - 1/w)(c - n) regressed by c gives c = n + w (v - n)."""
    w, v, n = 3.0, 0.7, -0.2
    fixed = n + w * (v - n)

    def u(x, t, s, class_labels):
        return torch.where(class_labels == 1, n, fixed)[:, None].to(x).expand_as(x)

    objective = make({"guidance_scale": w})
    objective.student = FunctionFlowMap(u, Linear())
    labels = torch.zeros(8, dtype=torch.int64)
    condition = Condition({"class_labels": labels}, {"class_labels": labels + 1})
    x, t = torch.zeros(8, 2, dtype=F64), torch.full((8,), 0.5)
    dropped = torch.zeros(8, dtype=torch.bool)
    dropped[0] = True
    target = objective._diagonal_target(x, t, condition, torch.full_like(x, v), dropped, torch.full((8,), w))
    torch.testing.assert_close(target[1:], torch.full_like(x[1:], fixed), rtol=1e-6, atol=0)
    assert torch.equal(target[0], torch.full_like(x[0], v))


def test_learned_weight_has_its_optimum_at_the_log_of_the_loss():
    weight, r = LossWeight(), torch.tensor(4.0)
    t, s = torch.rand(64), torch.zeros(64)
    assert torch.equal(weight(t, s), torch.zeros(64))
    optimiser = torch.optim.Adam(weight.parameters(), lr=0.05)
    for _ in range(300):
        w = weight(t, s)
        loss = (torch.exp(-w) * r + w).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() == pytest.approx(1 + math.log(4), abs=1e-3)
    assert weight(t, s).mean().item() == pytest.approx(math.log(4), abs=1e-2)


def test_a_runaway_learned_weight_stops_the_run():
    objective = make({"learned_weight": True, "weight_ratio_limit": 10})
    assert set(objective.roles) == {"student", "weight"} and objective.phases(0)[0].trains == ("student", "weight")
    logs = loss_of(objective, batch(64)).logs
    assert logs["weight_diagonal"] == 1 and logs["weight_off_diagonal"] == 1
    objective.weight.forward = lambda t, s: torch.where(t == s, 0.0, -3.0)
    with pytest.raises(DivergedError, match="weighted 20.1 times.*weight_ratio_limit=10"):
        loss_of(objective, batch(64))


def test_identity_runs_without_dropout_and_leaves_the_mode_alone():
    net = MLP()
    net.body.append(nn.Dropout(0.5))
    objective = make({"loss": "psd_m", "diagonal_fraction": 0.5}, net)
    objective.train()
    torch.manual_seed(1)
    first = loss_of(objective, batch(64)).logs
    torch.manual_seed(2)
    second = loss_of(objective, batch(64)).logs
    assert first["off_diagonal"] == second["off_diagonal"] and first["diagonal"] != second["diagonal"]
    assert net.training


def test_bad_settings():
    with pytest.raises(ValueError, match="jvp='dual': loss='psd_m' takes no derivatives"):
        FlowMapConfig(loss="psd_m", jvp="dual")
    with pytest.raises(ValueError, match="t_min=0.6 must be below t_max=0.5"):
        FlowMapConfig(t_min=0.6, t_max=0.5)
    with pytest.raises(ValueError, match="stepsize"):
        FlowMapConfig(stepsize=1)


def labelled(n=64):
    index = torch.arange(n)
    labels = index % 2
    condition = Condition({"class_labels": labels}, {"class_labels": torch.full_like(labels, 2)})
    return Batch(ItemRNG(9, index).normal((2,), dtype=F64), condition, index), ItemRNG(0, index)


class Told(nn.Module):
    """Average velocity of a network that is told its scale: remembers what it was given."""

    def __init__(self):
        super().__init__()
        self.net, self.seen = MLP(2, 3), []

    def forward(self, x, t, s, class_labels, guidance_scale):
        self.seen.append((class_labels, guidance_scale))
        return self.net(x, t, s, class_labels) * (1 - 1 / guidance_scale)[:, None].to(x).add(1)


LAW = {"low": 1.0, "high": 8.0, "default": 4.0}


def test_the_law_of_scales():
    rng = ItemRNG(0, range(100_000))
    w = GuidanceLaw(**LAW).draw(rng)
    assert 1 <= w.min() and w.max() <= 8
    assert w.median().item() == pytest.approx(8**0.5, rel=0.02)
    assert w.mean().item() == pytest.approx(7 / math.log(8), rel=0.02)
    flat = GuidanceLaw(**LAW, exponent=0.0).draw(rng)
    assert flat.mean().item() == pytest.approx(4.5, rel=0.02)
    steep = GuidanceLaw(low=2, high=8, default=2, exponent=3.0).draw(rng)  # inverse of 1/4 - 1/w^2
    assert steep.median().item() == pytest.approx((0.5 * (1 / 4 + 1 / 64)) ** -0.5, rel=0.02)
    for bad in (dict(low=3.0), dict(default=9.0), dict(low=2.0, high=2.0, default=2.0)):
        with pytest.raises(ValueError, match="must be in this order"):
            GuidanceLaw(**bad)


@pytest.mark.parametrize("taught", [True, False])
@pytest.mark.parametrize("name", ["lsd", "esd", "psd_m"])
def test_every_item_is_taught_the_scale_that_it_is_told(taught, name):
    """The guided velocity of each scale is the fixed point, from a teacher and from the student itself."""

    class Teacher(nn.Module):
        def forward(self, x, t, class_labels):
            return torch.stack((class_labels.to(x), 2.0 - class_labels), 1)  # constant in x and t: straight flows

    def velocity(labels):
        return Teacher()(torch.zeros((), dtype=F64), None, labels)

    def exact(x, t, s, class_labels, guidance_scale):
        null = velocity(torch.full_like(class_labels, 2))
        return null + guidance_scale[:, None] * (velocity(class_labels) - null) + 0 * (x + (t + s)[:, None])

    teacher = FunctionDenoiser(Teacher(), Linear(), "flow_prediction") if taught else None
    objective = make({"loss": name, "guidance_scale": LAW, "diagonal_fraction": 0.5}, Told(), teacher)
    objective.student = FunctionFlowMap(exact, Linear())
    data, rng = labelled()
    loss = loss_of(objective, (data, rng)).logs
    assert loss["off_diagonal"] < 1e-12
    if taught:
        assert loss["diagonal"] < 1e-12 or name != "psd_m"
    else:
        x, t, w = torch.zeros(8, 2, dtype=F64), torch.full((8,), 0.5), torch.arange(1.0, 9.0)
        at = data.condition.index(slice(8)).with_values({"guidance_scale": w}, {"guidance_scale": torch.ones(8)})
        on, labels = torch.zeros(8, dtype=torch.bool), at["class_labels"]
        target = objective._diagonal_target(x, t, at, velocity(labels), on, w)
        torch.testing.assert_close(target, exact(x, t, t, labels, w))
        kept = objective._diagonal_target(x, t, at, velocity(labels), ~on, w)
        assert torch.equal(kept, velocity(labels))


def test_scales_are_the_items_own_and_dropped_items_are_told_none():
    objective = make({"loss": "psd_m", "guidance_scale": LAW, "condition_dropout": 0.5}, Told())
    loss = loss_of(objective, labelled())
    labels, scales = (torch.cat(part) for part in zip(*objective.student.network.seen, strict=True))
    assert (scales[labels == 2] == 1).all() and (scales[labels != 2] > 1).all()
    assert scales[labels != 2].unique().numel() > 20
    parts = []
    for i in range(0, 64, 16):
        (data, _), items = labelled(), torch.arange(i, i + 16)
        part = Batch(data.x0[items], data.condition.index(items), items)
        parts.append(loss_of(objective, (part, ItemRNG(0, items))).value)
    torch.testing.assert_close(torch.stack(parts).mean(), loss.value, rtol=1e-6, atol=0)


def test_guidance_of_what_cannot_be_guided_is_refused():
    for scale in (2.0, LAW):
        with pytest.raises(ValueError, match="guidance_scale=.*the network is unconditional; accepted is 1"):
            loss_of(make({"guidance_scale": scale}, MLP()), batch())
    with pytest.raises(ValueError, match="greater than 0"):
        FlowMapConfig(guidance_scale=0.0)
    with pytest.raises(ValueError, match="no unconditional branch"):
        data, rng = labelled()
        data.condition = Condition(data.condition.values)
        loss_of(make({"guidance_scale": 2.0, "condition_dropout": 0.0}, MLP(2, 3)), (data, rng))


@pytest.mark.parametrize("stopgrad", ["none", "convex", "full"])
@pytest.mark.parametrize("name", ["lsd", "esd", "psd_u"])
def test_every_stop_gradient_runs_by_every_derivative(name, stopgrad):
    """Values agree whatever is frozen; gradients differ exactly where the specification says so."""
    values, gradients = [], []
    for kind in ("none", stopgrad):
        for jvp in ("dual", "func"):
            derivative = {} if name.startswith("psd") else {"jvp": jvp}
            objective = make({"loss": name, "stopgrad": kind, "diagonal_fraction": 0.5, **derivative})
            values.append(loss_of(objective, batch()).value)
            weights = list(objective.student.module.parameters())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(values[-1], weights)]))
    for value in values[1:]:
        torch.testing.assert_close(value, values[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(gradients[2], gradients[3], rtol=1e-6, atol=1e-9)
    assert torch.allclose(gradients[0], gradients[2], rtol=1e-6) == (stopgrad == "none")
