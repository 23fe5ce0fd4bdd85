"""MeanFlow, improved MeanFlow, SoFlow and sCM: times, guidance, what is asked of the networks, and bad settings."""

import math
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from genkit.denoisers import FunctionDenoiser, FunctionFlowMap
from genkit.denoisers.base import Condition
from genkit.interpolants import PREDICTION_TYPES, Linear, VariancePreserving
from genkit.rng import ItemRNG
from genkit.schedulers.renoise import RenoiseScheduler
from genkit.testing.oracles import Gaussian, GaussianMixture
from genkit.training.objectives._average_velocity import AverageVelocity, AverageVelocityConfig
from genkit.training.objectives.base import Batch
from genkit.training.objectives.improved_mean_flow import ImprovedMeanFlow, ImprovedMeanFlowConfig, ToldGuidance
from genkit.training.objectives.mean_flow import MeanFlow, MeanFlowConfig
from genkit.training.objectives.scm import Scm, ScmConfig
from genkit.training.objectives.so_flow import GAP, SoFlow, SoFlowConfig, fading
from genkit.training.parts.times import LogitNormal, Uniform
from tests.training.planar import MLP

F64 = torch.float64
LABELS = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0])
OBJECTIVES = {MeanFlow: MeanFlowConfig, ImprovedMeanFlow: ImprovedMeanFlowConfig, SoFlow: SoFlowConfig, Scm: ScmConfig}


class Labelled(nn.Module):
    """A network of two times with classes (2 is none) that adds up all it is told, and remembers it."""

    def __init__(self, two_times=True):
        super().__init__()
        self.net = MLP(two_times)
        nn.init.normal_(self.net.body[-1].weight, std=0.3)
        self.classes = nn.Embedding(3, 2)
        self.told = []

    def forward(self, x, t, s=None, label=None, **scalars):
        self.told.append((t, s, label, scalars))
        out = self.net(x, t, s)
        if label is not None:
            out = out + self.classes(label).to(out.dtype)
        for value in scalars.values():
            out = out + 0.1 * value[:, None].to(out.dtype)
        return out


def made(cls, teacher=None, path=None, dtype=torch.float32, **settings):
    path = path or Linear()
    torch.manual_seed(0)
    net = Labelled(cls.needs_flow_map).to(dtype)
    if cls.needs_flow_map:
        student = FunctionFlowMap(lambda x, t, s, **c: net(x, t, s, **c), path)
    else:
        student = FunctionDenoiser(lambda x, t, **c: net(x, t, **c), path, "flow_prediction")
    student.network = _Module(net, cls.needs_flow_map)
    return cls(cls.Config(**settings), student, teacher), net


class _Module(nn.Module):
    """The network under the arguments of a function flow map, or of a function of one time."""

    def __init__(self, net, two_times):
        super().__init__()
        self.net, self.two_times = net, two_times

    def forward(self, x, t, *s, **condition):
        return self.net(x, t, *s, **condition)


def batch_of(n=8, dtype=torch.float32, conditional=True, **more):
    items = torch.arange(n)
    x0 = ItemRNG(1, items).normal((2,), dtype=dtype)
    labels = LABELS.repeat(-(-n // 8))[:n]
    condition = Condition({"label": labels}, {"label": torch.full_like(labels, 2)}) if conditional else Condition()
    return Batch(x0, condition, items, {}, **more)


def loss_of(objective, batch):
    (phase,) = objective.phases(0)
    (loss,) = objective.losses(phase, batch, ItemRNG(5, batch.index))
    return loss


# -- times ---------------------------------------------------------------------------------------------------------


def times(n, **settings):
    index = torch.arange(n)
    return AverageVelocity._times(SimpleNamespace(config=AverageVelocityConfig(**settings)), index, ItemRNG(0, index))


@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.75, 1.0])
def test_the_first_order_of_times(fraction):
    """Exactly the share that is asked for has s = t; the others are the later and the earlier of two draws."""
    t, s = times(8000, diagonal_fraction=fraction, time=dict(law="uniform"))
    assert (s == t).double().mean().item() == fraction
    assert (s <= t).all()
    assert t.mean().item() == pytest.approx(2 / 3, abs=0.01)  # the maximum of two, on the diagonal too
    if fraction < 1:
        assert s[s < t].mean().item() == pytest.approx(1 / 3, abs=0.02)


def test_the_second_order_of_times_keeps_both_laws():
    laws = dict(time=LogitNormal(mean=-0.6, std=1.6), end_time=LogitNormal(mean=-4.0, std=1.6))
    t, s = times(8000, diagonal_fraction=0.25, order="v1", **laws)
    assert (s <= t).all()
    assert torch.logit(t.double()).mean().item() == pytest.approx(-0.6, abs=0.06)
    # An end drawn later than its start falls on the diagonal as well: P(N(-3.4, 2 * 1.6^2) > 0) of the rest.
    beyond = 0.5 * math.erfc(3.4 / (1.6 * math.sqrt(2)) / math.sqrt(2))
    assert (s == t).double().mean().item() == pytest.approx(0.25 + 0.75 * beyond, abs=0.01)


def test_laws_of_so_flow():
    objective, _ = made(SoFlow)
    index = torch.arange(4000)
    t, s = objective._times(index, ItemRNG(2, index))
    assert (s == t).double().mean().item() == 0.75
    off = s < t
    assert (t[off] - s[off] > 0.99 * GAP).all() and s.min() >= 0
    assert torch.logit(t[off].double()).mean().item() == pytest.approx(0.2, abs=0.08)
    assert torch.logit(t[~off].double()).mean().item() == pytest.approx(-0.2, abs=0.08)


def test_guidance_scales_are_drawn_by_their_law():
    """Density w^-1 on [1, 8]: median sqrt(8), mean 7 / ln 8; the interval holds the middle, and all of it on s = t."""
    on = torch.arange(40_000) < 10_000
    w, low, high = ToldGuidance().draw(ItemRNG(0, range(40_000)), on)
    w = w.double()
    assert w.median().item() == pytest.approx(math.sqrt(8), rel=0.02)
    assert w.mean().item() == pytest.approx(7 / math.log(8), rel=0.02)
    assert 1 <= w.min() and w.max() <= 8
    assert (low[on] == 0).all() and (high[on] == 1).all()
    assert low[~on].mean().item() == pytest.approx(0.25, abs=0.01) and low.max() <= 0.5
    assert high[~on].mean().item() == pytest.approx(0.75, abs=0.01) and high.min() >= 0.5
    w2 = ToldGuidance(exponent=2.0).draw(ItemRNG(0, range(40_000)), on)[0].double()
    assert w2.median().item() == pytest.approx(1 / (1 - 0.5 * 7 / 8), rel=0.02)
    w0 = ToldGuidance(exponent=0.0).draw(ItemRNG(0, range(40_000)), on)[0].double()
    assert w0.mean().item() == pytest.approx(4.5, rel=0.02)


def test_guidance_fades_out_smoothly():
    t = torch.tensor([0.0, 0.5, 0.8, 0.80001, 0.9, 0.99, 1.0], dtype=F64)
    got = fading(t, 0.8)
    z = (1 - 0.9) / 0.2
    assert torch.equal(got[:3], torch.ones(3, dtype=F64)) and got[3] == pytest.approx(1)
    assert got[4].item() == pytest.approx(1 - math.exp(-0.025 * z / (1 - z)))
    assert got[5] < got[4] and got[6] == 0
    assert torch.equal(fading(t, 1.0), torch.ones_like(t))


# -- what is asked of the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [MeanFlow, ImprovedMeanFlow])
def test_items_on_the_diagonal_do_without_a_derivative(cls):
    objective, net = made(cls, jvp="finite_difference", diagonal_fraction=0.75, condition_dropout=0.0)
    loss_of(objective, batch_of(16))
    asked = [len(t) for t, *_ in net.told]
    # 12 items on the diagonal once; 4 off it at two points, once with gradient, and for iMF's tangent.
    assert sorted(asked) == sorted([12, 4, 4, 4] + [4] * (cls is ImprovedMeanFlow))


def test_the_tangent_of_mean_flow_is_the_data_and_that_of_improved_mean_flow_its_own():
    """Equal when the network's diagonal is the target; the two losses differ otherwise."""
    settings = dict(diagonal_fraction=0.0, weight_power=0.0, time=Uniform(), condition_dropout=0.0)
    one, _ = made(MeanFlow, **settings)
    two, _ = made(ImprovedMeanFlow, **settings)
    a, b = (loss_of(o, batch_of()).value.item() for o in (one, two))
    assert abs(a - b) > 1e-3 * a
    flat = [p for o in (one, two) for name, p in o.named_parameters() if "body.4" not in name and "classes" not in name]
    with torch.no_grad():
        for p in flat:
            p.zero_()  # u no longer depends on x and t: du/dt = 0 in every direction
    a, b = (loss_of(o, batch_of()).value.item() for o in (one, two))
    assert a == pytest.approx(b, rel=1e-6)


def test_gradients_are_those_of_the_written_loss():
    """MeanFlow's against autograd of |u - sg target|^2 / sg(...)^p, item by item, in float64."""
    objective, net = made(MeanFlow, dtype=F64, diagonal_fraction=0.0, weight_power=0.75, condition_dropout=0.0)
    batch = batch_of(dtype=F64)
    loss_of(objective, batch).value.backward()
    got = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    rng = ItemRNG(5, batch.index)
    t, s = objective._times(batch.index, rng)
    eps = rng.normal((2,), dtype=F64)
    t, s = t.double(), s.double()
    v, x = eps - batch.x0, (1 - t)[:, None] * batch.x0 + t[:, None] * eps

    def u(x, t):
        return net(x, t, s, label=batch.condition["label"])

    _, derivative = torch.func.jvp(u, (x, t), (v, torch.ones_like(t)))
    r = (u(x, t) - (v - (t - s)[:, None] * derivative).detach()).square().sum(1)
    (r / (r.detach() + 1e-3) ** 0.75).mean().backward()
    for name, grad in got.items():
        torch.testing.assert_close(grad, dict(net.named_parameters())[name].grad, rtol=2e-5, atol=1e-6)


def test_so_flow_reports_an_error_and_follows_half_the_regression():
    settings = dict(diagonal_fraction=0.0, weight_power=0.0, rho_start=0.25, rho_end=0.25, condition_dropout=0.0)
    objective, net = made(SoFlow, dtype=F64, **settings)
    batch = batch_of(dtype=F64)
    loss = loss_of(objective, batch)
    assert loss.value.item() == pytest.approx(loss.logs["consistency"].item(), rel=1e-12) and loss.value > 0
    loss.value.backward()
    got = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    rng = ItemRNG(5, batch.index)
    rng.uniform()  # whose condition is dropped
    t, s = objective._times(batch.index, rng)
    eps = rng.normal((2,), dtype=F64)
    v, x = eps - batch.x0, (1 - t)[:, None] * batch.x0 + t[:, None] * eps
    label = batch.condition["label"]
    middle = t + 0.25 * (s - t)
    middle = torch.minimum(middle, t - GAP)

    def f(x, t):
        return x + (s - t)[:, None] * net(x, t, s, label=label)

    dq = ((f(x, t) - f(x + (middle - t)[:, None] * v, middle)) / (t - middle)[:, None]).detach()
    u = net(x, t, s, label=label)
    (0.5 * (u - (u + dq).detach()).square().mean(1)).mean().backward()
    for a, p in zip(got, (p for p in net.parameters() if p.grad is not None), strict=True):
        torch.testing.assert_close(a, p.grad, rtol=1e-4, atol=1e-6)


def test_rho_goes_down_geometrically():
    objective, _ = made(SoFlow, rho_start=0.1, rho_end=0.001)
    got = [loss_of(objective, batch_of(step=k, total_steps=4)).logs["rho"].item() for k in range(4)]
    assert got == pytest.approx([0.1 * 0.01 ** (k / 4) for k in range(4)], rel=1e-5)


def test_the_tangent_of_scm_is_warmed_up():
    objective, _ = made(Scm, tangent_warmup_steps=100)
    got = [loss_of(objective, batch_of(step=k, total_steps=1000)).logs for k in (0, 50, 500)]
    assert [g["warmup"].item() for g in got] == [0, 0.5, 1]
    assert len({g["tangent"].item() for g in got}) == 3


@pytest.mark.parametrize("norm, dims", [("l2", 1), ("rms", 2)])
def test_tangents_of_scm_are_normalised(norm, dims):
    """The regression's step is g / (|g| + offset): of norm 1, or root mean square 1, where g is large."""
    settings = dict(tangent_norm=norm, tangent_offset=1e-9, tangent_warmup_steps=0, learned_weight=False)
    objective, _ = made(Scm, dtype=F64, time=Uniform(low=0.5 - 1e-7, high=0.5), sigma_data=1.0, **settings)
    value = loss_of(objective, batch_of(dtype=F64)).value.item()
    assert value == pytest.approx(dims / 2, rel=1e-5)  # tan theta = 1; mean over two dimensions


def test_scm_is_sampled_with_fresh_noise():
    from diffusers import FlowMatchEulerDiscreteScheduler

    objective, _ = made(Scm)
    assert isinstance(objective.scheduler(FlowMatchEulerDiscreteScheduler()), RenoiseScheduler)
    assert set(objective.roles) == {"student", "weight"} and objective.phases(0)[0].trains == ("student", "weight")
    objective, _ = made(Scm, learned_weight=False)
    assert set(objective.roles) == {"student"}


@pytest.mark.parametrize("cls", OBJECTIVES, ids=lambda c: c.__name__)
def test_dropout_is_off_between_two_times(cls):
    """Two evaluations that are compared must see the same network."""
    active = []

    class Watching(nn.Module):
        def forward(self, x):
            active.append((self.training, torch.is_grad_enabled(), x.shape[0]))
            return x

    changes = {} if cls is Scm else dict(diagonal_fraction=0.25)
    objective, net = made(cls, condition_dropout=0.0, **changes)
    net.net.body.append(Watching())
    objective.train()
    loss_of(objective, batch_of())
    assert net.training
    for training, grad, n in active:
        assert training == (grad and n == 2 and cls is not Scm)  # the two items on the diagonal alone


# -- guidance ------------------------------------------------------------------------------------------------------


def test_dropped_items_and_those_outside_the_interval_are_not_guided():
    settings = dict(guidance_scale=3.0, guidance_mix=0.5, guidance_interval=(0.0, 0.5), condition_dropout=0.5)
    objective, _ = made(MeanFlow, **settings)
    n = 64
    batch, t = batch_of(n), torch.linspace(0.01, 0.99, n)
    v = torch.ones(n, 2)
    condition, target = objective._target(batch, ItemRNG(5, batch.index), batch.x0, t, t, v)
    dropped = condition["label"] == 2
    plain = dropped | (t > 0.5)
    assert 20 < dropped.sum() < 44
    assert torch.equal(target[plain], v[plain])
    assert ((target - v)[~plain].abs().amax(1) > 1e-4).all()


def test_improved_mean_flow_tells_the_student_what_it_is_taught():
    objective, net = made(
        ImprovedMeanFlow, guidance_scale=dict(high=8.0), condition_dropout=0.25, diagonal_fraction=0.25
    )
    n = 64
    batch = batch_of(n)
    t = torch.linspace(0.01, 0.99, n)
    s = t.where(torch.arange(n) % 4 == 0, t / 2)
    v = torch.ones(n, 2)
    condition, target = objective._target(batch, ItemRNG(5, batch.index), batch.x0, t, s, v)
    w, low, high = (condition[k] for k in ("guidance_scale", "t_low", "t_high"))
    dropped = condition["label"] == 2
    assert 6 < dropped.sum() < 30 and (w[dropped] == 1).all() and (w[~dropped] > 1).all()
    on = t == s
    assert (low[on] == 0).all() and (high[on] == 1).all()
    plain = dropped | (t < low) | (t > high)
    assert torch.equal(target[plain], v[plain]) and 5 < (~plain).sum()
    # v + (1 - 1/w) (u_c - u_n), u_n told w = 1 and the whole interval
    with torch.no_grad():
        null = {k: torch.full((n,), x) for k, x in (("guidance_scale", 1.0), ("t_low", 0.0), ("t_high", 1.0))}
        cond = net(batch.x0, t, t, batch.condition["label"], guidance_scale=w, t_low=low, t_high=high)
        none = net(batch.x0, t, t, torch.full((n,), 2), **null)
    expected = v + (1 - 1 / w)[:, None] * (cond - none)
    torch.testing.assert_close(target[~plain], expected[~plain], rtol=1e-5, atol=1e-6)


def test_the_student_embeds_what_it_is_told():
    class Told(FunctionFlowMap):
        def add_scalars(self, scalars):
            self.names = dict(scalars)

    student = Told(MLP(), Linear())
    ImprovedMeanFlow(ImprovedMeanFlowConfig(guidance_scale=ToldGuidance(interval=False)), student)
    assert student.names == {"guidance_scale": 2.0}
    ImprovedMeanFlow(ImprovedMeanFlowConfig(guidance_scale=ToldGuidance(default_interval=(0.1, 0.9))), student)
    assert student.names == {"guidance_scale": 2.0, "t_low": 0.1, "t_high": 0.9}


GUIDED = {
    MeanFlow: dict(guidance_scale=2.5, guidance_interval=(0.1, 0.8)),
    ImprovedMeanFlow: dict(guidance_scale=dict(high=4.0)),
    SoFlow: dict(guidance_scale=3.0),
    Scm: dict(guidance_scale=2.0, tangent_warmup_steps=0),
}


@pytest.mark.parametrize("cls", GUIDED, ids=lambda c: c.__name__)
@pytest.mark.parametrize("path", [Linear(), VariancePreserving()], ids=lambda p: type(p).__name__)
def test_guided_teachers_of_every_prediction_type_teach_the_same(cls, path):
    """And guidance does something, and costs two calls of the teacher."""
    means = torch.tensor([[1.0, -2.0], [-1.0, 0.5]], dtype=F64)
    law = GaussianMixture(means, 0.5, labels=[0, 1], interpolant=path)

    def teacher(kind):
        return FunctionDenoiser(_Exact(law, kind), path, kind)

    got = []
    kinds = PREDICTION_TYPES if isinstance(path, VariancePreserving) else ("flow_prediction", "sample", "epsilon")
    for kind in kinds:
        denoiser = teacher(kind)
        objective, _ = made(cls, denoiser, path, F64, **GUIDED[cls])
        got.append(loss_of(objective, batch_of(dtype=F64)).value.item())
        assert denoiser.calls == 2
    assert got == pytest.approx([got[0]] * len(got), rel=1e-10)
    objective, _ = made(cls, teacher("sample"), path, F64, **({"tangent_warmup_steps": 0} if cls is Scm else {}))
    assert abs(loss_of(objective, batch_of(dtype=F64)).value.item() - got[0]) > 1e-6


class _Exact(nn.Module):
    def __init__(self, law, kind):
        super().__init__()
        self.denoiser = law.denoiser(kind)

    def forward(self, x, t, label):
        return self.denoiser.network(x, t, class_labels=label)


def test_scm_does_not_depend_on_the_path_its_student_is_on():
    """One consistency model at the same noise-to-signal ratios, as a flow and as a variance-preserving model."""
    law = Gaussian(torch.tensor([1.0, -2.0], dtype=F64), 0.5)
    net = MLP(two_times=False).double()
    nn.init.normal_(net.body[-1].weight, std=0.3)
    settings = dict(learned_weight=False, tangent_warmup_steps=0, jvp="func")
    got = []
    for path in (Linear(), VariancePreserving()):
        fixed = path.time_at(torch.tensor(1.0, dtype=F64), torch.tensor(0.8, dtype=F64)).item()

        def fn(x, t, path=path):  # the clean sample as a function of the sample in units of its ends, and the ratio
            t = t.double()
            scale = (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()[:, None]
            return net(x / scale, torch.atan2(path.sigma(t), path.alpha(t)))

        objective = Scm(ScmConfig(**settings), _Student(fn, net, path))
        objective.config.time = SimpleNamespace(draw=lambda rng, f=fixed: torch.full((8,), f, dtype=F64))
        x0 = law.sample(8, generator=torch.Generator().manual_seed(0)).double()
        got.append(loss_of(objective, Batch(x0, Condition(), torch.arange(8), {})).value.item())
    assert got[0] == pytest.approx(got[1], rel=1e-9)


class _Student(FunctionDenoiser):
    def __init__(self, fn, net, path):
        super().__init__(fn, path, "sample")
        self.net = net

    @property
    def module(self):
        return self.net


# -- bad settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config, settings, text",
    [
        (MeanFlowConfig, dict(guidance_interval=(0.2, 0.8)), "has no effect with guidance_scale=1"),
        (MeanFlowConfig, dict(guidance_scale=2.0, guidance_interval=(0.8, 0.2)), "must be .low, high."),
        (MeanFlowConfig, dict(guidance_mix=1.0), "less than 1"),
        (MeanFlowConfig, dict(order="v2"), "'v0' or 'v1'"),
        (ImprovedMeanFlowConfig, dict(guidance_scale=0.5), "greater than or equal to 1"),
        (ImprovedMeanFlowConfig, dict(guidance_scale=dict(default=9.0)), "above high=8"),
        (
            ImprovedMeanFlowConfig,
            dict(guidance_scale=dict(interval=False, default_interval=(0.1, 0.9))),
            "no effect with int",
        ),
        (ImprovedMeanFlowConfig, dict(guidance_scale=dict(default_interval=(0.9, 0.1))), "must be .low, high."),
        (SoFlowConfig, dict(guidance_fade=0.5), "no effect with guidance_scale=1"),
        (SoFlowConfig, dict(rho_end=0.0), "greater than 0"),
        (ScmConfig, dict(tangent_norm="max"), "'l2' or 'rms'"),
    ],
)
def test_settings_that_contradict_each_other(config, settings, text):
    with pytest.raises(ValidationError, match=text):
        config(**settings)


@pytest.mark.parametrize("cls", [MeanFlow, SoFlow])
def test_a_share_of_its_own_is_refused_beside_a_teacher(cls):
    teacher = FunctionDenoiser(MLP(two_times=False), Linear(), "flow_prediction")
    with pytest.raises(ValueError, match="guidance_mix=0.5 is for targets from data"):
        made(cls, teacher, guidance_mix=0.5)


def test_guidance_of_scm_needs_a_teacher():
    with pytest.raises(ValueError, match="guidance_scale=2 needs a teacher"):
        made(Scm, guidance_scale=2.0)


@pytest.mark.parametrize(
    "cls, scale", [(MeanFlow, 2.0), (ImprovedMeanFlow, 2.0), (ImprovedMeanFlow, {}), (SoFlow, 2.0)]
)
def test_unconditional_data_cannot_be_guided(cls, scale):
    objective, _ = made(cls, guidance_scale=scale)
    with pytest.raises(ValueError, match="nothing to guide by"):
        loss_of(objective, batch_of(conditional=False))
