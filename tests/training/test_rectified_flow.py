"""Rectified flow: closed forms, couplings, what is refused, and the toy's targets."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from genkit.data.base import Source
from genkit.data.transfer import Transfer
from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.eval.flow import straightness
from genkit.interpolants import Linear, VariancePreserving, expand, from_scheduler
from genkit.rng import ItemRNG
from genkit.sampling import sample
from genkit.schedulers import ExactDenoiserScheduler
from genkit.testing.distances import sliced_wasserstein
from genkit.testing.oracles import Gaussian
from genkit.training.objectives.base import Batch
from genkit.training.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig, Taught, flow_endpoint
from tests.training import planar

F64 = torch.float64
MEAN, STD = torch.tensor([1.0, -2.0], dtype=F64), 0.5
ITEMS = torch.arange(64)
PAIRS = dict(kind="pairs")


def pairs(n=64):
    """``(x0, eps)`` of the exact flow of a Gaussian."""
    eps = ItemRNG(5, range(n)).normal((2,), dtype=F64)
    return MEAN + STD * eps, eps


def straight(x, t):
    """The velocity of those pairs, constant along every path."""
    t = expand(t, x)
    return (1 - STD) * (x - (1 - t) * MEAN) / (t + (1 - t) * STD) - MEAN


class Net(torch.nn.Module):
    """A function with a weight."""

    def __init__(self, fn):
        super().__init__()
        self.fn, self.scale = fn, torch.nn.Parameter(torch.ones((), dtype=F64))

    def forward(self, x, t):
        return self.scale * self.fn(x, t)


def student(fn, kind="flow_prediction", path=None):
    return FunctionDenoiser(Net(fn), path or Linear(), kind)


def loss(objective, x0, eps=None, seed=1):
    fields = {"x0": x0} if eps is None else {"x0": x0, "eps": eps}
    (phase,) = objective.phases(0)
    (found,) = objective.losses(phase, Batch(x0, Condition(), ITEMS, fields), ItemRNG(seed, ITEMS))
    return found.value


# -- closed forms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [dict(law="uniform"), dict(law="u_shaped", low=0.001), dict(law="grid", steps=4)])
def test_exact_pairs_leave_no_error(times):
    objective = RectifiedFlow(RectifiedFlowConfig(coupling=PAIRS, times=times), student(straight))
    assert loss(objective, *pairs()).item() < 1e-28


@pytest.mark.parametrize("kind", ["sample", "epsilon", "v_prediction"])
def test_what_the_student_predicts_does_not_matter(kind):
    """The error is one of the velocity, in whichever form the network gives it."""

    def wrong(x, t):
        return straight(x, t) + torch.sin(x)

    def as_kind(x, t):
        return Linear().convert(wrong(x, t), "flow_prediction", kind, x, t)

    config = RectifiedFlowConfig(coupling=PAIRS, times=dict(law="uniform", low=0.05, high=0.95))
    reference = loss(RectifiedFlow(config, student(wrong)), *pairs()).item()
    assert reference > 0.1
    assert loss(RectifiedFlow(config, student(as_kind, kind)), *pairs()).item() == pytest.approx(reference, abs=1e-10)


def test_one_step_distillation_is_the_error_of_the_endpoint():
    x0, eps = pairs()
    net = planar.MLP(two_times=False).double()
    torch.nn.init.normal_(net.body[-1].weight)
    made = FunctionDenoiser(net, Linear(), "flow_prediction")
    objective = RectifiedFlow(RectifiedFlowConfig(coupling=PAIRS, times=dict(law="grid", steps=1)), made)
    scheduler = objective.scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0))
    scheduler.set_timesteps(1)
    endpoints = sample(made, scheduler, eps)
    assert loss(objective, x0, eps).item() == pytest.approx((endpoints - x0).square().mean().item(), rel=1e-12)


def test_independent_ends_are_flow_matching():
    """Its minimiser is E[eps - x0 | x]: no other velocity near it has a lower loss."""
    law = Gaussian(MEAN, STD)
    config = RectifiedFlowConfig()
    x0 = law.sample(64, generator=torch.Generator().manual_seed(0))
    exact, other = (
        sum(loss(RectifiedFlow(config, student(fn)), x0, seed=k).item() for k in range(40))
        for fn in (law.velocity, lambda x, t: law.velocity(x, t) + 0.3)
    )
    assert exact < other and exact / 40 > 0.1


def test_the_grid_is_what_the_student_is_sampled_on():
    objective = RectifiedFlow(RectifiedFlowConfig(coupling=PAIRS, times=dict(law="grid", steps=4)), student(straight))
    for shifted in (
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        ExactDenoiserScheduler(shift=2.0),
    ):
        scheduler = objective.scheduler(shifted)
        scheduler.set_timesteps(4)
        assert scheduler.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=0.9)  # as Flux's pipeline gives them
        assert scheduler.times.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    plain = RectifiedFlow(RectifiedFlowConfig(coupling=PAIRS), student(straight))
    assert plain.scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)).config.shift == 3.0


# -- a teacher's pairs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2)])
def test_endpoints_converge_to_the_flow_map(solver, order):
    law = Gaussian(MEAN, STD)
    _, eps = pairs()
    exact = law.flow_map(eps, torch.tensor(1.0, dtype=F64), torch.tensor(0.0, dtype=F64))

    def error(n):
        how = Taught(num_steps=n, solver=solver)
        return (flow_endpoint(law.denoiser(), eps, Condition(), how) - exact).abs().max().item()

    assert error(20) < (0.1 if order == 1 else 0.01)
    assert error(40) / error(80) == pytest.approx(2**order, rel=0.25)


def test_guided_endpoints():
    """A teacher whose branches are constant velocities ends at -(n + w (c - n))."""
    teacher = FunctionDenoiser(lambda x, t, v: v[:, None].expand_as(x), Linear(), "flow_prediction")
    one = torch.ones(3, dtype=F64)
    condition = Condition({"v": 2 * one}, {"v": one})
    eps = torch.zeros(3, 2, dtype=F64)
    end = flow_endpoint(teacher, eps, condition, Taught(num_steps=3, guidance_scale=4.0))
    assert torch.allclose(end, torch.full_like(end, -(1 + 4.0 * (2 - 1))))


def test_teachers_of_every_kind_and_path_teach_the_same():
    """Exact eps, v, x0 and flow teachers on a diffusion's path, to 1e-10."""
    path = from_scheduler(DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012))
    law = Gaussian(MEAN, STD, interpolant=path)
    config = RectifiedFlowConfig(coupling=dict(kind="teacher", num_steps=5, solver="heun"))
    values = []
    for kind in ("flow_prediction", "epsilon", "v_prediction", "sample"):
        teacher = FunctionDenoiser(Net(law.denoiser(kind).network), path, kind)
        values.append(loss(RectifiedFlow(config, student(straight), teacher), pairs()[0]).item())
    assert values[0] > 1e-3
    assert values[1:] == pytest.approx([values[0]] * 3, abs=1e-10)


def test_a_teacher_makes_data_unnecessary():
    teacher = FunctionDenoiser(Net(Gaussian(MEAN, STD).velocity), Linear(), "flow_prediction")
    taught = RectifiedFlow(RectifiedFlowConfig(coupling=dict(kind="teacher")), student(straight), teacher)
    assert not taught.needs_samples and RectifiedFlow(RectifiedFlowConfig(), student(straight)).needs_samples
    x0, _ = pairs()
    assert loss(taught, x0) == loss(taught, torch.zeros_like(x0))


# -- what is refused ------------------------------------------------------------------------------------------------


def test_refusals():
    config = RectifiedFlowConfig(coupling=PAIRS)
    with pytest.raises(ValueError, match="path Linear, the student is on VariancePreserving; use"):
        RectifiedFlow(config, student(straight, path=VariancePreserving()))
    with pytest.raises(ValueError, match="coupling.kind='teacher' has no teacher"):
        RectifiedFlow(RectifiedFlowConfig(coupling=dict(kind="teacher")), student(straight))
    with pytest.raises(ValueError, match="coupling.kind='pairs' takes no teacher; set coupling.kind=teacher"):
        RectifiedFlow(config, student(straight), student(straight))
    objective = RectifiedFlow(config, student(straight))
    x0, eps = pairs()
    with pytest.raises(ValueError, match=r"the data gives \['x0'\], and this objective needs pairs of x0 and eps"):
        loss(objective, x0)
    with pytest.raises(ValueError, match=r"pairs x0 of shape \(64, 2\) with eps of shape \(64, 1\)"):
        loss(objective, x0, eps[:, :1])
    for wrong in (dict(kind="teacher", num_steps=0), dict(kind="pairs", num_steps=3), dict(kind="paired")):
        with pytest.raises(ValueError):
            RectifiedFlowConfig(coupling=wrong)


# -- the toy's targets -----------------------------------------------------------------------------------------------


class Made(Source):
    """20,000 pairs of the exact flow of the eight Gaussians."""

    shape = (2,)

    def __init__(self, n=20_000):
        super().__init__()
        self.length = n
        self.eps = ItemRNG(11, range(n)).normal((2,))
        exact = FunctionDenoiser(planar.Exact(), Linear(), "flow_prediction")
        self.x0 = flow_endpoint(exact, self.eps.double(), Condition(), Taught(num_steps=30, solver="heun")).float()

    def read(self, records, items):
        return {"x0": self.x0[records], "eps": self.eps[records]}


def rectify(folder, steps, source, net, **config):
    made = FunctionDenoiser(net, Linear(), "flow_prediction")
    objective = RectifiedFlow(RectifiedFlowConfig(coupling=PAIRS, **config), made)
    return planar.train(folder, objective, steps, source=source)


def seen(trainer, net, steps):
    """SW2 at each of ``steps``, the error at one, and S over S of the data's flow."""
    with trainer.averaged():
        values, noise = planar.distances(planar.euler(net), steps)
        error = planar.rmse(planar.euler(net)(noise, 1), noise)
        found = straightness(FunctionDenoiser(net, Linear(), "flow_prediction"), noise)
    return values, error, found


@pytest.mark.slow
def test_reflow_and_distillation_reach_the_table(tmp_path, capsys):
    torch.manual_seed(0)
    net, source, steps = planar.MLP(two_times=False), Made(), (1, 2, 4, 8, 32)
    trainer, seconds = rectify(tmp_path / "reflow", 2000, source, net)
    values, error, found = seen(trainer, net, steps)
    planar.show(capsys, "2-RF, SW2", values, seconds, RMSE=error, S=found.total)
    for value, published in zip(values, (0.051, 0.044, 0.042, 0.041, 0.041), strict=True):
        assert value <= 1.5 * published
    assert error <= 1.5 * 0.136 and found.total <= 1.5 * 0.003
    # The cost of the exact coupling is not raised.
    assert found.transport_cost <= 1.02 * (source.eps - source.x0).square().sum(1).mean().item()

    with trainer.averaged():
        weights = {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(weights)
    trainer, seconds = rectify(tmp_path / "distilled", 1000, source, net, times=dict(law="grid", steps=1))
    values, error, _ = seen(trainer, net, (1,))
    planar.show(capsys, "2-RF distilled to one step, SW2", values, seconds, RMSE=error)
    assert values[0] <= 1.5 * 0.040 and error <= 1.5 * 0.062


@pytest.mark.slow
def test_direct_distillation_reaches_the_table(tmp_path, capsys):
    torch.manual_seed(0)
    net = planar.MLP(two_times=False)
    trainer, seconds = rectify(tmp_path, 2000, Made(), net, times=dict(law="grid", steps=1))
    values, error, _ = seen(trainer, net, (1,))
    planar.show(capsys, "distilled to one step from scratch, SW2", values, seconds, RMSE=error)
    assert values[0] <= 1.5 * 0.040 and error <= 1.5 * 0.065


@pytest.mark.slow
def test_transfer_between_two_laws(tmp_path, capsys):
    """1-rectification from two moons to eight Gaussians: many steps arrive, and cost less than the coupling did."""
    torch.manual_seed(0)
    net = planar.MLP(two_times=False)
    source = Transfer(x0=dict(name="eight_gaussians"), eps=dict(name="two_moons"))
    trainer, seconds = rectify(tmp_path, 2000, source, net)
    batch = source.__getitems__(range(8000))
    with trainer.averaged():
        end = planar.euler(net)(batch["eps"], 32)
    distance = sliced_wasserstein(end, batch["x0"])
    before, after = ((batch["eps"] - x).square().sum(1).mean().item() for x in (batch["x0"], end))
    planar.show(capsys, "two moons to eight Gaussians, SW2", [distance], seconds, cost=after, independent=before)
    assert distance < 0.2 * sliced_wasserstein(batch["eps"], batch["x0"]) and after < before


def test_reflow_keeps_the_law():
    """The exact coupling's endpoints are distributed as the data: sliced W2 at the floor of two samples."""
    source = Made(4000)
    real = planar.LAW.sample(4000, generator=torch.Generator().manual_seed(0)).float()
    other = planar.LAW.sample(4000, generator=torch.Generator().manual_seed(1)).float()
    assert sliced_wasserstein(source.x0, real) < 1.5 * sliced_wasserstein(other, real)
