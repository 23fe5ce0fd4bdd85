"""What all particle methods promise: equality with plain sampling, groups, refusals, diagnostics."""

import math

import diffusers
import pytest
import torch

from genkit.denoisers import Condition, FunctionFlowMap
from genkit.feynman_kac import FKC, EntropicAnnealing, FeynmanKac, FKSteering
from genkit.guidance import APG, CFG, Experts
from genkit.interpolants import Linear, from_scheduler
from genkit.rng import ItemRNG
from genkit.sampling import sample, trajectory
from genkit.schedulers import ExactDenoiserScheduler, FlowMapScheduler
from genkit.testing.oracles import two_class_mixture
from tests.feynman_kac.ready import FOUND, METHODS
from tests.feynman_kac.targets import F64, UNIT, WIDE, condition, either, grid, run, scheduler_on

LAW = two_class_mixture(3)
FREE = sorted({"systematic", "stratified", "residual", "ssp"})


def labels(*classes, repeat=1):
    y = torch.tensor(classes).repeat_interleave(repeat)
    return Condition({"class_labels": y}, {"class_labels": torch.full_like(y, LAW.num_classes)})


def scheduler(n=12, noise_scale=1.0, exponent_sum=1.0):
    made = ExactDenoiserScheduler(noise_scale=noise_scale, exponent_sum=exponent_sum)
    made.set_timesteps(n)
    return made


def final(particles, given, items, *, guider=None, sched=None, denoiser=None, callback=None):
    x = ItemRNG(0, items).normal((3,), dtype=F64)
    generators = ItemRNG(1, items).generators()
    states = trajectory(
        denoiser or LAW.denoiser(),
        sched or scheduler(),
        x,
        given,
        guider=guider,
        particles=particles,
        generators=generators,
        callback=callback,
    )
    return list(states)[-1]


def reward(x):
    return x[:, 0]


RESAMPLED = {"fkc", "fkc, all given", "fk_steering", "look-ahead", "annealed"}
SETTINGS = [dict(resampler=name) for name in ("systematic", "multinomial", "residual", "ssp")]
SETTINGS.append(
    dict(start=0.1, stop=0.95, weights_outside="drop", increment_clip=0.3, annealing=EntropicAnnealing("base"))
)


# -- equal to plain sampling ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_one_particle_is_plain_sampling_bit_for_bit(name):
    """Unless the method follows other predictions than the guider's, as a reward's gradient does."""
    guider, followed = CFG(guidance_scale=3.0), []
    particles = METHODS[name](1, ess_threshold=1.0)
    weigh = particles.weigh

    def watched(state, memory):
        after, *rest = weigh(state, memory)
        followed.append(after.guided is state.guided)
        return after, *rest

    particles.weigh = watched
    plain = final(None, labels(0, 1, 1), range(3), guider=guider).x
    single = final(particles, labels(0, 1, 1), range(3), guider=guider)
    assert torch.equal(single.x, plain) == all(followed)
    assert followed and single.log_weights.normalised.flatten().tolist() == [1, 1, 1]


def test_what_is_tried():
    assert RESAMPLED | set(FOUND) <= set(METHODS)


@pytest.mark.parametrize("resampler", FREE)
@pytest.mark.parametrize("case", ["w = 1", "beta = 1", "equal models", "equal experts", "no reward", "constant reward"])
def test_equal_weights_are_plain_sampling_bit_for_bit(case, resampler):
    """Resampling at every evaluation changes nothing where every weight is the same."""
    guider, given, sched = None, labels(0, repeat=5), None
    particles = FKC(5, resampler=resampler, ess_threshold=1.0)
    if case == "w = 1":
        guider = CFG(guidance_scale=1.0)
    elif case == "equal models":
        guider, given = CFG(guidance_scale=4.0), Condition(given.values, given.values)
    elif case == "equal experts":
        guider = Experts(exponents={"cond": 1.7, "b": -0.7}).using(experts={"b": LAW.denoiser()})
    elif case == "no reward":
        particles = FKC(5, resampler=resampler, ess_threshold=1.0, reward=lambda x: 0 * x[:, 0])
    elif case == "constant reward":
        particles = FKSteering(5, resampler=resampler, ess_threshold=1.0, reward=lambda x: torch.ones(len(x)))
    plain = final(None, given, range(5), guider=guider, sched=sched).x
    weighed = final(particles, given, range(5), guider=guider, sched=sched)
    assert torch.equal(weighed.x, plain)
    values = weighed.log_weights.values
    assert bool((values == values[:, :1]).all()) and weighed.log_weights.distinct_roots.tolist() == [5]


# -- groups -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: ",".join(s) or "plain")
@pytest.mark.parametrize("name", METHODS)
def test_a_prompt_does_not_depend_on_the_others(name, settings):
    particles = METHODS[name](4, ess_threshold=0.9, **settings)
    guider = CFG(guidance_scale=4.0)
    whole = final(particles, labels(0, 1, 0, repeat=4), range(12), guider=guider)
    if name in RESAMPLED:
        assert bool((particles.stats()["ancestors"] != torch.arange(4)).any())
    alone = final(METHODS[name](4, ess_threshold=0.9, **settings), labels(1, repeat=4), range(4, 8), guider=guider)
    torch.testing.assert_close(alone.x, whole.x[4:8], rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.log_weights.values, whole.log_weights.values[1:2], rtol=0, atol=1e-10)
    torch.testing.assert_close(alone.log_weights.log_z, whole.log_weights.log_z[1:2], rtol=0, atol=1e-10)


def test_without_resampling_particles_can_be_permuted():
    order = torch.tensor([3, 0, 2, 1])
    guider = CFG(guidance_scale=4.0)
    one = final(FKC(4, ess_threshold=0), labels(0, repeat=4), range(4), guider=guider)
    two = final(FKC(4, ess_threshold=0), labels(0, repeat=4), order.tolist(), guider=guider)
    torch.testing.assert_close(two.x, one.x[order], rtol=0, atol=1e-12)
    torch.testing.assert_close(two.log_weights.values, one.log_weights.values[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_particles_can_be_re_indexed_along_the_run(name):
    """What a method remembers of a particle goes with it."""
    order = torch.tensor([2, 0, 3, 1, 5, 4, 7, 6])

    def moved(state):
        return state.gather(order) if state.i == 5 else state

    def ends(callback):
        particles = METHODS[name](4)
        particles.ess_threshold = 0  # nobody is moved but by the test
        return final(particles, labels(0, 1, repeat=4), range(8), guider=CFG(guidance_scale=4.0), callback=callback)

    one, two = ends(None), ends(moved)
    torch.testing.assert_close(two.x, one.x[order], rtol=0, atol=1e-12)
    expected = one.log_weights.values.flatten()[order].view(2, 4)
    torch.testing.assert_close(two.log_weights.values, expected, rtol=0, atol=1e-12)


def test_copies_separate_where_noise_is_injected():
    particles = FKC(8, ess_threshold=1.0)
    state = run(
        either(UNIT, WIDE),
        scheduler_on(grid(steps=40)),
        particles,
        samples=8,
        guider=CFG(guidance_scale=4.0),
        given=condition(8),
    )
    assert state.log_weights.distinct_roots.item() < 8 and len(state.x.unique()) == 8


@pytest.mark.parametrize("name", METHODS)
def test_a_run_can_be_repeated(name):
    particles = METHODS[name](4, ess_threshold=1.0)
    guider = CFG(guidance_scale=4.0)
    one, two = (final(particles, labels(0, 1, repeat=4), range(8), guider=guider) for _ in range(2))
    assert torch.equal(one.x, two.x) and torch.equal(one.log_weights.values, two.log_weights.values)
    assert {len(rows) for rows in particles.stats().values()} == {12}


# -- settings ---------------------------------------------------------------------------------------------------------


def guided(particles, samples=64, steps=60):
    return run(
        either(UNIT, WIDE),
        scheduler_on(grid(steps=steps)),
        particles,
        samples=samples,
        guider=CFG(guidance_scale=4.0),
        given=condition(samples),
    )


def test_window_of_resampling():
    particles = FKC(64, ess_threshold=1.0, start=0.5, stop=0.9)
    guided(particles)
    stats = particles.stats()
    inside = (stats["t"] <= 0.5) & (stats["t"] >= 0.1)
    moved = (stats["ancestors"] != torch.arange(64)).flatten(1).any(1)
    assert not bool(moved[~inside].any()) and moved[inside].sum() > 3
    assert bool(stats["increment_std"][~inside][1:].gt(0).any())
    kept = guided(FKC(64, start=0.5)).log_weights.log_z
    dropped = guided(FKC(64, start=0.5, weights_outside="drop")).log_weights.log_z
    assert dropped.item() < kept.item()  # guided increments are never negative


def test_neither_the_first_nor_the_last_evaluation_resamples():
    particles = FKC(64, ess_threshold=1.0)
    guided(particles)
    moved = (particles.stats()["ancestors"] != torch.arange(64)).flatten(1).any(1)
    assert not moved[0] and not moved[-1] and moved[1:-1].sum() > 3


class AtTheEnd(FeynmanKac):
    """Weighs once: what is larger than 0 there lives."""

    def weighs_at(self):
        return [self.last]

    def weigh(self, state, memory):
        where = self.grouped(state.x[:, 0])
        self.note(where=where)
        return state, torch.zeros_like(where).where(where > 0, -math.inf), memory


def test_a_method_that_weighs_once_is_not_undone_by_settings():
    settings = dict(increment_clip=0.1, ess_threshold=1.0, stop=0.95, weights_outside="drop")
    particles = AtTheEnd(8, **settings, annealing=EntropicAnnealing())
    state = final(particles, labels(0, repeat=8), range(8))
    where = particles.stats()["where"]
    assert bool(where[:-1].isnan().all()) and where.shape == (12, 1, 8)
    alive = where[-1] > 0
    assert 0 < alive.sum() < 8 and torch.equal(state.log_weights.normalised, alive.double() / alive.sum())
    refused(
        r"weights_outside='drop' with start=0.0, stop=0.6: AtTheEnd weighs at t=\[0.0833\], never in that window",
        AtTheEnd(4, stop=0.6, weights_outside="drop"),
        labels(0, repeat=4),
    )


def test_methods_note_what_they_weigh_by():
    steering = FKSteering(4, reward=reward, reward_scale=2.0, reward_interval=4)
    final(steering, labels(0, 1, repeat=4), range(8))
    rewards = steering.stats()["reward"]
    assert rewards.shape == (12, 2, 4)
    assert [i for i in range(12) if bool(rewards[i].isfinite().all())] == [4, 8, 11]
    x, corrected = [], FKC(4, reward=reward, reward_schedule=lambda kappa: 3.0, ess_threshold=0)
    final(corrected, labels(0, 1, repeat=4), range(8), callback=lambda state: (x.append(state.x), state)[1])
    tilt = corrected.stats()["tilt"]  # of the sample that the step before ended at; at pure noise there is none
    assert bool(tilt[0].isnan().all())
    torch.testing.assert_close(tilt[1:].flatten(1), 3 * torch.stack(x[:-1])[..., 0], rtol=0, atol=1e-12)
    assert "tilt" not in FKC(4).stats()


def test_clipping_keeps_the_mean_and_says_how_often():
    particles = FKC(64, increment_clip=0.02, ess_threshold=0)
    clipped = guided(particles).log_weights
    free = guided(FKC(64, ess_threshold=0)).log_weights
    assert clipped.values.std() < free.values.std()
    stats = particles.stats()
    assert 0 < stats["clipped"].mean() < 1
    assert bool((stats["increment_max"] - stats["increment_min"] > 0.04).any())  # what there was before
    guided(unclipped := FKC(64, increment_clip=1e6))
    assert unclipped.stats()["clipped"].sum() == 0


def test_clipping_revives_nobody():
    def some(x):
        return torch.where(torch.arange(len(x)) == 2, -math.inf, x[:, 0])

    particles = FKSteering(4, reward=some, ess_threshold=0, reward_interval=99, increment_clip=0.01)
    state = final(particles, labels(0, repeat=4), range(4))  # the reward is asked once, at the end
    assert state.log_weights.normalised[0, 2] == 0 and bool(state.log_weights.values[0, [0, 1, 3]].isfinite().all())
    assert particles.stats()["clipped"].max() == 0.75  # the dead one is not counted


def test_stats():
    particles = FKC(32, annealing=EntropicAnnealing())
    state = guided(particles)
    stats = particles.stats()
    assert stats["ess"].shape == stats["log_z"].shape == stats["temperature"].shape == (60, 2)
    assert stats["ancestors"].shape == (60, 2, 32)
    roots = torch.arange(32).expand(2, -1)
    for ancestors in stats["ancestors"]:
        roots = roots.gather(1, ancestors)
    assert torch.equal(roots, state.log_weights.roots)
    assert torch.equal(stats["log_z"][-1], state.log_weights.log_z)
    assert torch.equal(stats["distinct_roots"][-1], state.log_weights.distinct_roots)
    assert bool((stats["temperature"] >= 1).all())


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(num_particles=0), "num_particles=0: must be an integer of at least 1"),
        (dict(num_particles=2.5), "num_particles=2.5"),
        (dict(resampler="sorted"), "resampler='sorted' is not known"),
        (dict(ess_threshold=1.5), "ess_threshold=1.5"),
        (dict(start=1.0), "start=1.0"),
        (dict(start=0.5, stop=0.2), "stop=0.2"),
        (dict(weights_outside="zero"), "weights_outside='zero'"),
        (dict(increment_clip=0.0), "increment_clip=0.0"),
        (dict(reward_scale=math.inf), "reward_scale=inf"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        FKC(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(potential="product"), "potential='product'"),
        (dict(reward_interval=0), "reward_interval=0"),
        (dict(lookahead_steps=-1), "lookahead_steps=-1"),
    ],
)
def test_bad_steering(settings, message):
    with pytest.raises(ValueError, match=message):
        FKSteering(4, reward=reward, **settings)


def refused(match, particles, given, *, guider=None, sched=None, samples=4):
    denoiser = LAW.denoiser()
    with pytest.raises(ValueError, match=match):
        sample(
            denoiser,
            sched or scheduler(),
            torch.randn(samples, 3, dtype=F64),
            given,
            guider=guider,
            particles=particles,
        )
    assert denoiser.calls == 0


def test_runs_that_cannot_work_are_refused_before_the_first_call():
    four = labels(0, repeat=4)
    refused("num_particles=3: 4 samples are no whole number of groups", FKC(3), four)
    refused("'class_labels' differs within group 1 of num_particles=2", FKC(2), labels(0, 0, 0, 1))
    refused("guider=APG follows no sum of scores", FKC(4), four, guider=APG(guidance_scale=3.0))
    refused("the density would jump", FKC(4), four, guider=CFG(guidance_scale=3.0, start=0.3))
    refused("the density would jump", FKC(4), four, guider=CFG(guidance_scale=3.0, stop=0.6))
    refused("guidance_rescale=0.7", FKC(4), four, guider=CFG(guidance_scale=3.0, guidance_rescale=0.7))
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    flow.set_timesteps(sigmas=[1.0, 0.5])
    refused("a reward's drift", FKC(4, reward=reward), four, sched=flow)
    product = Experts(exponents={"cond": 1.0, "b": 1.0})
    refused("name the experts", FKC(4), four, guider=product)
    with_b = product.using(experts={"b": LAW.denoiser()})
    refused("sum to 2, the scheduler's exponent_sum is 1", FKC(4), four, guider=with_b)
    mixed = product.using(experts={"b": labels(0, 1, 0, 0)})
    refused(
        r"experts\['b'\]: 'class_labels' differs within group 0",
        FKC(4),
        four,
        guider=mixed,
        sched=scheduler(8, 1.0, 2.0),
    )
    short = product.using(experts={"b": labels(0, 1)})
    refused(r"experts\['b'\] has a condition for 2 samples", FKC(4), four, guider=short, sched=scheduler(8, 1.0, 2.0))


def test_schedulers_that_cannot_be_re_indexed_are_refused():
    for cls in ("DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"):
        made = getattr(diffusers, cls)()
        made.set_timesteps(6)
        law = two_class_mixture(3, interpolant=from_scheduler(made))
        denoiser = law.denoiser("epsilon")
        with pytest.raises(ValueError, match=f"{cls} (remembers earlier steps and cannot|visits a time twice)"):
            sample(denoiser, made, torch.randn(4, 3), labels(0, repeat=4), particles=FKC(4))
        assert denoiser.calls == 0


def test_flow_maps_are_refused():
    made = FlowMapScheduler()
    made.set_timesteps(2)
    network = FunctionFlowMap(lambda x, t, s: x, Linear())
    with pytest.raises(ValueError, match="FlowMapScheduler: particles weigh clean-sample predictions"):
        sample(network, made, torch.randn(4, 3), particles=FKC(4))


def test_weights_that_are_not_finite():
    """One bad particle dies; a group of them is an error that says which."""

    def some(x):
        return torch.where(torch.arange(len(x)) == 2, math.nan, x[:, 0])

    state = final(FKSteering(4, reward=some, ess_threshold=0), labels(0, repeat=4), range(4))
    assert state.log_weights.values[0, 2] == -math.inf and bool(state.log_weights.values[0, [0, 1, 3]].isfinite().all())
    with pytest.raises(ValueError, match="no particle of group 0 has a finite weight"):
        final(FKSteering(4, reward=lambda x: x[:, 0] * math.nan), labels(0, repeat=4), range(4))
    with pytest.raises(ValueError, match=r"reward must return one number a sample, shape \(4,\), got \(4, 3\)"):
        final(FKSteering(4, reward=lambda x: x), labels(0, repeat=4), range(4))


def test_diffusers_schedulers_without_history_will_do():
    """DDIM with ``eta=1`` injects the noise of the DDPM posterior: the guided target, of exponents' sum 1."""
    made = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    made.set_timesteps(100)
    law = two_class_mixture(1, interpolant=from_scheduler(made))
    n = 2000
    y = torch.zeros(n, dtype=torch.int64)
    given = Condition({"class_labels": y}, {"class_labels": torch.full_like(y, law.num_classes)})
    particles, x = FKC(n), torch.randn(n, 1, dtype=F64)
    for state in trajectory(
        law.denoiser("epsilon"), made, x, given, guider=CFG(guidance_scale=3.0), particles=particles, eta=1.0
    ):
        log_weights = state.log_weights
    grid_x = torch.linspace(-4, 6, 20001, dtype=F64)[:, None]
    zero = torch.zeros((), dtype=F64)
    cond = law.log_density(grid_x, zero, torch.zeros(len(grid_x), dtype=torch.int64))
    p = (3 * cond - 2 * law.log_density(grid_x, zero)).exp()
    exact = (p * grid_x[:, 0]).sum() / p.sum()
    got = (log_weights.normalised[0] * state.x[:, 0]).sum()
    assert got.item() == pytest.approx(exact.item(), abs=0.05)
    assert log_weights.log_z.item() == pytest.approx(math.log(p.sum().item() * (10 / 20000)), abs=0.05)
