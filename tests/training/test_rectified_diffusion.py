"""Rectified diffusion, on pairs and in phases: closed forms, conversions, what is refused, and the toy's targets."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.interpolants import PREDICTION_TYPES, Linear, Trigonometric, expand, from_scheduler
from genkit.rng import ItemRNG
from genkit.sampling import sample, set_timesteps
from genkit.testing.oracles import Gaussian
from genkit.training.objectives.base import Batch
from genkit.training.objectives.rectified_diffusion import RectifiedDiffusion, RectifiedDiffusionConfig
from genkit.training.objectives.rectified_diffusion_phased import PhasedConfig, PhasedRectifiedDiffusion, implied_ends
from genkit.training.objectives.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from genkit.training.parts.first_order import first_order_scheduler
from tests.training import planar
from tests.training.test_rectified_flow import MEAN, STD, Made, Net, pairs, straight

F64 = torch.float64
ITEMS = torch.arange(64)
STABLE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SD = from_scheduler(DDIMScheduler(**STABLE))
ZERO_SNR = from_scheduler(DDIMScheduler(**STABLE, rescale_betas_zero_snr=True))


def matched(kind, path, shift=0.0):
    """The predictor of Gaussian pairs x0 = m + c eps at every time, its noise wrong by ``shift``."""

    def predict(x, t):
        alpha, sigma = expand(path.alpha(t), x), expand(path.sigma(t), x)
        eps = (x - alpha * MEAN) / (alpha * STD + sigma) + shift
        if not shift:
            return path.target(kind, MEAN + STD * eps, eps, t)
        return path.convert(eps, "epsilon", kind, x, t)

    return FunctionDenoiser(Net(predict), path, kind)


def loss(objective, x0, eps=None, condition=None):
    fields = {"x0": x0} if eps is None else {"x0": x0, "eps": eps}
    (phase,) = objective.phases(0)
    (found,) = objective.losses(phase, Batch(x0, condition or Condition(), ITEMS, fields), ItemRNG(1, ITEMS))
    return found.value


# -- matched pairs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SD, Trigonometric(), Linear()], ids=["sd", "trigonometric", "linear"])
def test_the_exact_predictor_returns_the_noise_of_the_pair(path):
    x0, eps = pairs()
    t = torch.linspace(0.02, 0.98, 64, dtype=F64)
    prediction = matched("epsilon", path)(path.interpolate(x0, eps, t), t)
    assert (prediction.raw - eps).abs().max() < 5e-15


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_any_number_of_ddim_steps_ends_at_the_same_point(kind):
    denoiser = matched(kind, SD)
    _, eps = pairs()
    scheduler = first_order_scheduler(DDIMScheduler(**STABLE, clip_sample=False, prediction_type=kind))
    last = torch.ones((), dtype=F64)
    start = SD.interpolate(MEAN + STD * eps, eps, last.expand(64))  # on the trajectory, as in training
    ends = []
    for n in (1, 2, 50):
        scheduler.set_timesteps(n)
        # Diffusers keeps its noise schedule in float32.
        ends.append(sample(denoiser, scheduler, start))
        assert (ends[-1] - (MEAN + STD * eps)).abs().max() < 2e-5
    # By the path's own coefficients, to rounding.
    for n in (1, 2, 50):
        x = start
        for k in range(n):
            now, then = (torch.full((64,), 1 - j / n, dtype=F64) for j in (k, k + 1))
            prediction = denoiser(x, now)
            x = SD.interpolate(prediction.sample, prediction.epsilon, then)
        assert (x - (MEAN + STD * eps)).abs().max() < 1e-12


@pytest.mark.parametrize("space", PREDICTION_TYPES)
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow_prediction"])
def test_the_loss_does_not_depend_on_what_the_network_predicts(kind, space):
    config = RectifiedDiffusionConfig(space=space)
    assert loss(RectifiedDiffusion(config, matched(kind, SD)), *pairs()).item() < 1e-18
    values = [loss(RectifiedDiffusion(config, matched(k, SD, shift=0.2)), *pairs()).item() for k in (kind, "epsilon")]
    assert values[0] > 1e-3 and values[0] == pytest.approx(values[1], abs=1e-10, rel=1e-10)


def test_the_sample_residual_is_sigma_over_alpha_times_the_noise_residual():
    """With noise wrong by 0.2 everywhere, squares in sample space are (0.2 sigma / alpha)^2."""
    times = dict(law="uniform", low=0.1, high=0.9)
    config = RectifiedDiffusionConfig(space="sample", huber_c=None, times=times)
    t = RectifiedDiffusionConfig(times=times).times.draw(_after_dropout(ItemRNG(1, ITEMS))).double()
    expected = (0.2 * SD.sigma(t) / SD.alpha(t)).square().mean().item()
    objective = RectifiedDiffusion(config, matched("epsilon", SD, shift=0.2))
    assert loss(objective, *pairs()).item() == pytest.approx(expected, rel=1e-10)
    noise = RectifiedDiffusion(config.model_copy(update={"space": "epsilon"}), matched("epsilon", SD, shift=0.2))
    assert loss(noise, *pairs()).item() == pytest.approx(0.04, rel=1e-10)


def _after_dropout(rng):
    rng.uniform()
    return rng


def test_pseudo_huber():
    residual = 0.2
    for c in (1e-3, 0.5):
        config = RectifiedDiffusionConfig(space="epsilon", huber_c=c)
        found = loss(RectifiedDiffusion(config, matched("epsilon", SD, shift=residual)), *pairs()).item()
        assert found == pytest.approx(math.sqrt(residual**2 + c**2) - c, rel=1e-10)


def test_on_the_linear_path_it_is_reflow():
    def wrong(x, t):
        return straight(x, t) + torch.sin(x)

    made, times = FunctionDenoiser(Net(wrong), Linear(), "flow_prediction"), dict(law="uniform", low=0.01)
    config = RectifiedDiffusionConfig(space="flow_prediction", huber_c=None, times=times)
    reflow = RectifiedFlow(RectifiedFlowConfig(coupling=dict(kind="pairs"), times=times), made)
    values = [loss(o, *pairs()).item() for o in (RectifiedDiffusion(config, made), reflow)]
    assert values[0] > 0.1 and values[0] == values[1]


def test_sampling_starts_at_pure_noise():
    """One step at the last timestep, which other spacings would take for a nearly clean sample."""
    objective = RectifiedDiffusion(RectifiedDiffusionConfig(), matched("epsilon", SD))
    known = dict(steps_offset=1, timestep_spacing="leading", **STABLE)
    for original in (
        DDIMScheduler(**known, set_alpha_to_one=False, clip_sample=False),
        PNDMScheduler(**known, skip_prk_steps=True),
        EulerDiscreteScheduler(**known),
    ):
        made = objective.scheduler(original)
        made.set_timesteps(1)
        assert isinstance(made, DDIMScheduler) and made.timesteps.tolist() == [999]
        made.set_timesteps(4)
        assert made.timesteps.tolist() == [999, 749, 499, 249]
        assert made.final_alpha_cumprod == 1 and not made.config.clip_sample
        assert from_scheduler(made).same_as(SD)
    for spacing, first in (("leading", 1), ("linspace", 0)):
        other = DDIMScheduler(steps_offset=1, timestep_spacing=spacing, **STABLE)
        other.set_timesteps(1)
        assert other.timesteps.tolist() == [first]
    flow = RectifiedDiffusion(RectifiedDiffusionConfig(), matched("flow_prediction", Linear()))
    assert flow.scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0)).config.shift == 3.0


def test_refusals():
    with pytest.raises(ValueError, match="prediction_type='noise' is not known"):
        RectifiedDiffusionConfig(space="noise")
    with pytest.raises(ValueError, match="needs pairs of x0 and eps"):
        loss(RectifiedDiffusion(RectifiedDiffusionConfig(), matched("epsilon", SD)), pairs()[0])
    grid = dict(times=dict(law="grid", steps=1))
    with pytest.raises(ValueError, match="alpha.t. = 0 there, .*use a v_prediction"):
        loss(RectifiedDiffusion(RectifiedDiffusionConfig(**grid), matched("epsilon", ZERO_SNR)), *pairs())
    for fine in (dict(space="epsilon"), dict()):
        kind = "epsilon" if fine else "v_prediction"
        made = matched(kind, ZERO_SNR)
        assert loss(RectifiedDiffusion(RectifiedDiffusionConfig(**grid, **fine), made), *pairs()).item() < 1e-18


# -- phases ----------------------------------------------------------------------------------------------------------


def phased(student, teacher, **config):
    return PhasedRectifiedDiffusion(PhasedConfig(**config), student, teacher)


@pytest.mark.parametrize("path", [SD, Linear()], ids=["sd", "linear"])
def test_implied_noise(path):
    """(x_e/alpha_e - x_s/alpha_s) / (n_e - n_s), and what carries both ends."""
    start, end = torch.full((8,), 0.75, dtype=F64), torch.full((8,), 0.5, dtype=F64)
    x_start, x_end = (ItemRNG(k, range(8)).normal((2,), dtype=F64) for k in (1, 2))
    clean, noise = implied_ends(path, x_start, start, x_end, end)
    (a_s, a_e), (s_s, s_e) = ([f(t)[:, None] for t in (start, end)] for f in (path.alpha, path.sigma))
    published = (x_end / a_e - x_start / a_s) / (s_e / a_e - s_s / a_s)
    assert (noise - published).abs().max() < 1e-12
    assert (path.interpolate(clean, noise, start) - x_start).abs().max() < 1e-12
    assert (path.interpolate(clean, noise, end) - x_end).abs().max() < 1e-12
    # At pure noise and at clean data nothing is divided by zero.
    whole = implied_ends(Linear(), x_start, torch.ones(8, dtype=F64), x_end, torch.zeros(8, dtype=F64))
    assert torch.equal(whole[0], x_end) and torch.equal(whole[1], x_start)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_a_first_order_teacher_is_its_own_student(kind):
    """eps' is then its eps, and the loss is 0."""
    for phases in (1, 4):
        teacher = matched(kind, SD)
        objective = phased(matched("epsilon", SD), teacher, num_phases=phases, huber_c=None)
        x0, eps = pairs()
        start, end = (torch.full((64,), v, dtype=F64) for v in (1.0, 1 - 1 / phases))
        x_start = SD.interpolate(x0, eps, start)
        x_end = objective._teach(x_start, start, end, Condition())
        assert (implied_ends(SD, x_start, start, x_end, end)[1] - eps).abs().max() < 1e-10
        assert loss(objective, x0).item() < 1e-10


@pytest.mark.parametrize("kind", ["sample", "v_prediction", "flow_prediction"])
def test_teachers_of_every_kind_teach_the_same(kind):
    law = Gaussian(MEAN, STD, interpolant=SD)
    values = []
    for of in (kind, "epsilon"):
        teacher = FunctionDenoiser(Net(law.denoiser(of).network), SD, of)
        values.append(loss(phased(matched("epsilon", SD), teacher), pairs()[0]).item())
    assert values[0] > 1e-3 and values[0] == pytest.approx(values[1], abs=1e-10)


def test_the_teacher_is_guided():
    """Constant velocities of the two branches on the linear path: the phase's end moves by n + w (c - n)."""
    teacher = FunctionDenoiser(lambda x, t, v: v[:, None].expand_as(x), Linear(), "flow_prediction")
    teacher.network = Conditional()
    one = torch.ones(5, dtype=F64)
    condition = Condition({"v": 3 * one}, {"v": one})
    objective = phased(matched("flow_prediction", Linear()), teacher, guidance_scale=3.0)
    x = torch.zeros(5, 2, dtype=F64)
    end = objective._teach(x, 0.75 * one, 0.5 * one, condition)
    assert torch.allclose(end, torch.full_like(end, -0.25 * (1 + 3 * (3 - 1))))
    assert teacher.calls == 2 * 10  # 40 steps over four phases, two branches each
    plain = phased(matched("flow_prediction", Linear()), teacher, guidance_scale=1.0)
    assert torch.allclose(plain._teach(x, 0.75 * one, 0.5 * one, condition), torch.full_like(end, -0.75))


class Conditional(torch.nn.Module):
    def forward(self, x, t, v):
        return v[:, None].expand_as(x)


def test_trained_times_are_those_of_the_scheduler():
    """Timesteps 0 to 999, each phase's upper end among them and its lower end not."""
    seen = []

    class Spy(torch.nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return torch.zeros_like(x)

    student = FunctionDenoiser(Spy(), SD, "epsilon")
    objective = phased(student, matched("epsilon", SD))
    items = torch.arange(4000)
    x0 = torch.zeros(4000, 2, dtype=F64)
    next(objective.losses(objective.phases(0)[0], Batch(x0, Condition(), items), ItemRNG(0, items)))
    timesteps = SD.timestep(seen[0])
    assert (timesteps - timesteps.round()).abs().max() < 1e-3
    assert timesteps.min().round() == 0 and timesteps.max().round() == 999
    sampled = objective.scheduler(DDIMScheduler(**STABLE))
    sampled.set_timesteps(4)
    assert sampled.timesteps.tolist() == [999, 749, 499, 249]


def test_phases_must_divide():
    for name in ("teacher_steps", "num_times"):
        with pytest.raises(ValueError, match=f"{name}=10 must be a multiple of num_phases=4"):
            PhasedConfig(**{name: 10})


# -- the toy's targets -----------------------------------------------------------------------------------------------

STEPS = (1, 2, 4, 8, 32)
LAST = 0.99  # alpha is at least 0.016


class Clamped(Trigonometric):
    """The toy's cosine path, which stays where it is at 0.99 from there on."""

    def alpha(self, t):
        return super().alpha(t.clamp(max=LAST))

    def sigma(self, t):
        return super().sigma(t.clamp(max=LAST))


class ClampedMLP(planar.MLP):
    """Sees no later time either."""

    def __init__(self):
        super().__init__(two_times=False)

    def forward(self, x, t):
        return super().forward(x, t.clamp(max=LAST))


COSINE = Clamped()


def ddim(net):
    """``draw`` for ``planar.distances``: DDIM on the cosine path, from pure noise."""

    @torch.no_grad()
    def draw(noise, n):
        x = noise
        for k in range(n):
            now, then = (torch.full((len(x),), 1 - j / n) for j in (k, k + 1))
            eps = net(x, now)
            clean = COSINE.convert(eps, "epsilon", "sample", x, now)
            x = COSINE.interpolate(clean, eps, then)
        return x

    return draw


class Unmatched(Made):
    """The same samples under noise of their own at every visit: plain training."""

    def read(self, records, items):
        return {"x0": self.x0[records], "eps": ItemRNG(17, items).normal((2,))}


@pytest.mark.slow
def test_matched_pairs_beat_unmatched_ones(tmp_path, capsys):
    """At many steps in either space, and at one in that of samples.

    In the first two steps the error of eps is multiplied by 1/alpha, up to 64, and is mostly chance: a bare loop of the
    same setting gave 2.03, 1.62, 1.73, 2.18 and 0.53, 0.38, 0.43, 0.59 for four seeds, where the table has 1.21 and
    0.32 of one. The bound is 1.5 times their mean there, and 1.5 times the table everywhere else.
    """
    expected = {
        "unmatched, eps": None,
        "matched, eps": (1.89, 0.48, 0.19, 0.13, 0.078),
        "matched, sample": (0.66, 0.31, 0.20, 0.16, 0.13),
    }
    source, found = Made(), {}
    for name in expected:
        torch.manual_seed(0)
        net = ClampedMLP()
        kind = dict(space="sample") if name.endswith("sample") else dict(space="epsilon", huber_c=None)
        config = RectifiedDiffusionConfig(times=dict(law="uniform"), **kind)
        objective = RectifiedDiffusion(config, FunctionDenoiser(net, COSINE, "epsilon"))
        data = Unmatched() if name.startswith("unmatched") else source
        trainer, seconds = planar.train(tmp_path / name.replace(", ", "_"), objective, source=data)
        with trainer.averaged():
            found[name], _ = planar.distances(ddim(net), STEPS)
        planar.show(capsys, f"rectified diffusion, {name}, SW2", found[name], seconds)
    unmatched, eps, clean = found.values()
    assert clean[0] < 0.5 * eps[0] and clean[0] < 0.5 * unmatched[0]
    assert eps[3] < 0.75 * unmatched[3] and eps[4] < 0.85 * unmatched[4]
    for name in ("matched, eps", "matched, sample"):
        for value, bound in zip(found[name], expected[name], strict=True):
            assert value <= 1.5 * bound, name


class PerPhase(torch.nn.Module):
    """A network a phase: what is learned jumps where phases meet, which the toy's slow waves in time cannot follow."""

    def __init__(self, phases):
        super().__init__()
        self.nets = torch.nn.ModuleList(planar.MLP(two_times=False) for _ in range(phases))

    def forward(self, x, t):
        number = (torch.ceil(t * len(self.nets) - 1e-4) - 1).long().clamp(min=0)
        outputs = torch.stack([net(x, t) for net in self.nets])
        return outputs[number, torch.arange(len(x))]


@pytest.mark.slow
def test_phases_on_the_toy(tmp_path, capsys):
    """Four phases of an exact teacher: four steps of the student do better than the teacher's four."""
    path = SD
    law = planar.LAW.__class__(planar.LAW.means, planar.LAW.stds, interpolant=path)
    teacher = FunctionDenoiser(Net(lambda x, t: law.predict("epsilon", x, t)).float(), path, "epsilon")
    torch.manual_seed(0)
    student = FunctionDenoiser(PerPhase(4), path, "v_prediction")
    trainer, seconds = planar.train(tmp_path, phased(student, teacher, teacher_steps=16))

    def draw_by(denoiser):
        def draw(noise, n):
            kind = denoiser.prediction_type
            scheduler = first_order_scheduler(DDIMScheduler(**STABLE, clip_sample=False, prediction_type=kind))
            set_timesteps(scheduler, n)
            return sample(denoiser, scheduler, noise)

        return draw

    with trainer.averaged():
        values, _ = planar.distances(draw_by(student), (4, 8))
    exact, _ = planar.distances(draw_by(teacher), (4, 8))
    planar.show(capsys, "phased rectified diffusion, SW2 at 4 / 8", values, seconds, teacher_4=exact[0])
    assert values[0] < 0.6 * exact[0]
