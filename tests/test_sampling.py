"""The loop against plain integration, re-indexing of its state, and refusals."""

import diffusers
import pytest
import torch

from genkit.denoisers import Condition, FunctionDenoiser, FunctionFlowMap
from genkit.guidance.base import Guided, Guider
from genkit.interpolants import Linear, from_scheduler
from genkit.rng import ItemRNG
from genkit.sampling import sample, trajectory
from genkit.schedulers import FlowMapScheduler
from genkit.testing.oracles import Gaussian, two_class_mixture
from tests.ready import GUIDERS, ready

F64 = torch.float64
LAW = two_class_mixture(4)


def flow(n=8):
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=[1 - k / n for k in range(n)])
    return scheduler


def noise(n=6, dim=4, dtype=torch.float32):
    return ItemRNG(0, range(n)).normal((dim,), dtype=dtype)


def labels(n=6):
    y = torch.arange(n) % 2
    return Condition({"class_labels": y}, {"class_labels": torch.full_like(y, LAW.num_classes)})


def test_equals_plain_euler():
    x = y = noise()
    denoiser, scheduler = LAW.denoiser(), flow()
    got = sample(denoiser, scheduler, x, labels())
    sigmas = scheduler.sigmas
    for k in range(8):
        y = y + (sigmas[k + 1] - sigmas[k]) * LAW.velocity(y, sigmas[k].expand(6), labels()["class_labels"])
    torch.testing.assert_close(got, y, rtol=1e-5, atol=1e-6)
    assert denoiser.calls == 8


@pytest.mark.parametrize("cls", ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_any_prediction_type_under_any_scheduler(cls, kind):
    """The network's type need not be the scheduler's; variance-exploding samples are scaled for the network."""
    config = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing")
    if cls == "DDIMScheduler":
        config |= dict(clip_sample=False, set_alpha_to_one=True)
    scheduler = getattr(diffusers, cls)(**config)
    scheduler.set_timesteps(40)
    law = two_class_mixture(4, interpolant=from_scheduler(scheduler))
    x = noise(512, dtype=F64) * scheduler.init_noise_sigma
    got = sample(law.denoiser(kind), scheduler, x, Condition({"class_labels": torch.zeros(512, dtype=torch.int64)}))
    assert got.mean().item() == pytest.approx(0.5, abs=0.05) and got.std().item() == pytest.approx(0.5, abs=0.05)


def test_a_sample_does_not_depend_on_its_batch():
    for cls in (None, *GUIDERS.values()):
        guider, own = (None, None) if cls is None else (ready(cls, (6, 4)), ready(cls, (6, 4), rows=[2]))
        whole = sample(LAW.denoiser(), flow(), noise(dtype=F64), labels(), guider=guider)
        alone = sample(LAW.denoiser(), flow(), noise(dtype=F64)[2:3], labels().index([2]), guider=own)
        torch.testing.assert_close(alone, whole[2:3], rtol=0, atol=1e-12)


def test_states_name_their_times_and_stop_when_not_asked():
    denoiser = LAW.denoiser()
    states = trajectory(denoiser, flow(4), noise(), labels())
    first, second = next(states), next(states)
    assert (first.i, first.t, first.t_next, second.t) == (0, 1.0, 0.75, 0.75)
    assert denoiser.calls == 2 and torch.is_grad_enabled()
    states.close()
    assert denoiser.calls == 2


def test_chosen_steps_can_be_replayed_with_gradients():
    states = trajectory(LAW.denoiser(), flow(4), noise(dtype=F64), labels())
    state = next(states)
    z = state.guided.prediction.z.clone().requires_grad_()
    LAW.denoiser()(z, state.t, labels()).raw.sum().backward()
    assert z.grad.abs().sum() > 0


class Swap:
    """Particles that reverse the batch between evaluation and step."""

    def start_run(self, denoiser, scheduler, x, condition, guider):
        pass

    def after_evaluation(self, state):
        return state.gather(torch.arange(len(state.x) - 1, -1, -1))


@pytest.mark.parametrize("name", [None, *GUIDERS])
def test_resampling_re_indexes_everything_together(name):
    guider = ready(GUIDERS[name], (6, 4)) if name else None
    condition = Condition({"class_labels": torch.zeros(6, dtype=torch.int64)}, {"class_labels": torch.full((6,), 2)})
    plain = sample(LAW.denoiser(), flow(), noise(dtype=F64), condition, guider=guider)
    swapped = sample(LAW.denoiser(), flow(), noise(dtype=F64), condition, guider=guider, particles=Swap())
    torch.testing.assert_close(swapped, plain, rtol=0, atol=1e-12)  # eight reversals


def test_generators_follow_their_samples():
    scheduler = diffusers.DDPMScheduler()
    scheduler.set_timesteps(4)
    law = two_class_mixture(4, interpolant=from_scheduler(scheduler))
    generators = ItemRNG(0, range(3)).generators()
    states = trajectory(law.denoiser("epsilon"), scheduler, noise(3), labels(3), generators=generators)
    moved = next(states).gather(torch.tensor([2, 0, 0]))
    assert moved.generators == [generators[2], generators[0], generators[0]]
    whole = sample(
        law.denoiser("epsilon"), scheduler, noise(3), labels(3), generators=ItemRNG(0, range(3)).generators()
    )
    one = sample(
        law.denoiser("epsilon"), scheduler, noise(3)[1:2], labels(3).index([1]), generators=ItemRNG(0, [1]).generators()
    )
    torch.testing.assert_close(one, whole[1:2])


def test_a_scheduler_with_history_is_refused_by_gather():
    scheduler = diffusers.DPMSolverMultistepScheduler()
    scheduler.set_timesteps(5)
    law = two_class_mixture(4, interpolant=from_scheduler(scheduler))
    with pytest.raises(ValueError, match="DPMSolverMultistepScheduler remembers earlier steps"):
        sample(law.denoiser("epsilon"), scheduler, noise(), labels(), particles=Swap())


def test_callback_may_replace_the_sample():
    from dataclasses import replace

    got = sample(LAW.denoiser(), flow(), noise(), labels(), callback=lambda s: replace(s, x=torch.zeros_like(s.x)))
    assert not got.any()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_a_network_in_half_precision_leaves_the_samples_dtype(name, half):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(4)
    kind = "flow_prediction" if name.startswith("Flow") else "epsilon"
    law, given = two_class_mixture(4, interpolant=from_scheduler(scheduler)), []

    def network(x, t):
        given.append(x.dtype)
        return law.predict(kind, x, t).to(half)

    denoiser = FunctionDenoiser(network, law.interpolant, kind)
    for state in trajectory(denoiser, scheduler, noise()):
        assert state.x.dtype == torch.float32
        # Not a float32 that holds rounded numbers.
        assert not torch.equal(state.x, state.x.to(half).float())
    low = noise().to(half)
    scheduler.set_timesteps(4)
    assert sample(law.denoiser(kind), scheduler, low).dtype == half
    assert set(given) == {torch.float32}


class Shift(Guider):
    """Moves the network's input by a constant."""

    moves_sample = True

    def guide(self, point, state):
        moved = point.z + 0.1
        prediction = point.denoiser(moved, point.t, point.condition, timestep=point.timestep)
        return Guided(prediction, {"cond": prediction}, z=moved), state


def test_a_moved_point_moves_the_sample_under_it():
    scheduler = diffusers.EulerDiscreteScheduler()
    scheduler.set_timesteps(3)
    law = two_class_mixture(4, interpolant=from_scheduler(scheduler))
    x = noise() * scheduler.init_noise_sigma
    sigma = scheduler.sigmas[0]
    state = next(trajectory(law.denoiser("epsilon"), scheduler, x, labels(), guider=Shift()))
    z = x / (sigma**2 + 1) ** 0.5 + 0.1
    eps = law.predict("epsilon", z, law.interpolant.time(scheduler.timesteps[:1]).expand(6), labels()["class_labels"])
    expected = z * (sigma**2 + 1) ** 0.5 + (scheduler.sigmas[1] - sigma) * eps
    torch.testing.assert_close(state.x, expected.float(), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["HeunDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_a_scheduler_that_remembers_moved_samples_is_refused(name):
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(4)
    denoiser = two_class_mixture(4, interpolant=from_scheduler(scheduler)).denoiser("epsilon")
    with pytest.raises(ValueError, match=f"Shift moves the sample.*{name} remembers"):
        sample(denoiser, scheduler, noise(), labels(), guider=Shift())
    assert denoiser.calls == 0


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "DDIMScheduler"])
def test_a_move_can_be_told_as_a_prediction(name):
    """What a modular pipeline is given, which takes no sample from a guider."""
    config = {} if name.startswith("Flow") else dict(timestep_spacing="trailing")
    if name == "DDIMScheduler":
        config["clip_sample"] = False
    scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(4)
    law = two_class_mixture(4, interpolant=from_scheduler(scheduler))
    kind = "flow_prediction" if name.startswith("Flow") else "epsilon"

    class Told(Shift):
        moves_sample = False

        def guide(self, point, state):
            guided, state = super().guide(point, state)
            return Guided(guided.unmoved(point), guided.parts), state

    x = noise(dtype=F64) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    moved = sample(law.denoiser(kind), scheduler, x, labels(), guider=Shift())
    scheduler.set_timesteps(4)
    told = sample(law.denoiser(kind), scheduler, x, labels(), guider=Told())
    torch.testing.assert_close(told, moved, rtol=1e-5, atol=1e-5)


GAUSS = Gaussian(torch.tensor([1.0, -2.0], dtype=F64), 0.5)


def flow_map():
    return FunctionFlowMap(lambda x, t, s: GAUSS.average_velocity(x, t, s), Linear())


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_an_exact_flow_map_arrives_in_any_number_of_jumps(steps):
    x, scheduler, denoiser = noise(dim=2, dtype=F64), FlowMapScheduler(shift=1.7), flow_map()
    scheduler.set_timesteps(steps)
    expected = GAUSS.flow_map(x, torch.ones(6, dtype=F64), torch.zeros(6, dtype=F64))
    torch.testing.assert_close(sample(denoiser, scheduler, x), expected, rtol=0, atol=1e-13)
    assert denoiser.calls == steps


def test_a_stochastic_flow_map_keeps_the_law():
    scheduler = FlowMapScheduler(stochastic=True)
    scheduler.set_timesteps(3)
    x = noise(20_000, dim=2)
    got = sample(flow_map(), scheduler, x, generators=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(got.mean(0), GAUSS.means[0], rtol=0, atol=0.02)
    torch.testing.assert_close(got.std(0), torch.full((2,), 0.5, dtype=F64), rtol=0, atol=0.02)


def test_parts_that_do_not_fit_are_refused_before_the_first_call():
    denoiser, scheduler = LAW.denoiser(), FlowMapScheduler()
    scheduler.set_timesteps(2)
    with pytest.raises(ValueError, match="jumps between two times"):
        sample(denoiser, scheduler, noise())
    with pytest.raises(ValueError, match="guider=Shift: off its diagonal"):
        sample(flow_map(), scheduler, noise(dim=2), guider=Shift())
    with pytest.raises(ValueError, match="walks the path DiscreteVP, but the denoiser was made for Linear"):
        sample(denoiser, diffusers.DDIMScheduler(), noise())
    with pytest.raises(ValueError, match="step takes no"):
        sample(denoiser, flow(), noise(), labels(), eta=0.5)
    assert denoiser.calls == 0


def test_a_plain_function_has_no_weights():
    with pytest.raises(TypeError, match="no weights to train"):
        _ = FunctionDenoiser(lambda x, t: x, Linear(), "sample").module
