"""Jumps to clean data with noise put back."""

import diffusers
import pytest
import torch

from genkit.denoisers import FunctionDenoiser
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.sampling import sample, set_timesteps
from genkit.schedulers import RenoiseScheduler
from genkit.testing.oracles import Gaussian

F64 = torch.float64
VP = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def student(law):
    """The jump of the exact flow to clean data, as what the network of a pipeline of ``law`` predicts."""

    def fn(x, t):
        return law.flow_map(x, t, torch.zeros_like(t))

    return FunctionDenoiser(fn, law.interpolant, "sample")


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_the_exact_jump_keeps_the_law_at_any_number_of_steps(steps):
    law = Gaussian([1.0, -2.0], [0.5, 0.3])
    scheduler = RenoiseScheduler(path={"_class_name": "FlowMatchEulerDiscreteScheduler"})
    scheduler.set_timesteps(steps)
    scheduler.prediction_type = "sample"
    rng = ItemRNG(0, range(20_000))
    x = sample(student(law), scheduler, rng.normal((2,), dtype=F64), generators=rng.generators())
    # Four standard errors of 20,000 samples.
    assert torch.allclose(x.mean(0), torch.tensor([1.0, -2.0], dtype=F64), atol=4 * 0.5 / 141)
    assert torch.allclose(x.std(0), torch.tensor([0.5, 0.3], dtype=F64), rtol=4 / 200)


@pytest.mark.parametrize("path", [None, VP], ids=["linear", "vp"])
def test_without_fresh_noise_it_is_ddim(path):
    scheduler = RenoiseScheduler(eta=0.0, path=path)
    law = Gaussian([1.0, -2.0], [0.5, 0.3], interpolant=scheduler.interpolant)
    scheduler.set_timesteps(4)
    x = torch.randn(5, 2, dtype=F64)
    got = sample(law.denoiser(scheduler.prediction_type), scheduler, x)
    for t, s in zip(scheduler.times[:-1], scheduler.times[1:], strict=True):
        prediction = law.denoiser("sample")(x, t.expand(5))
        x = prediction.sample if s == 0 else scheduler.interpolant.interpolate(prediction.sample, prediction.epsilon, s)
    assert torch.allclose(got, x, rtol=0, atol=1e-12)


def test_share_of_fresh_noise():
    """After one step from pure noise under a network that says 0, the sample has the path's noise whatever ``eta``."""
    for eta in (0.0, 0.3, 1.0):
        scheduler = RenoiseScheduler(eta=eta)
        scheduler.set_timesteps(2)
        eps = ItemRNG(0, range(20_000)).normal((1,), dtype=F64)
        velocity = eps  # says x0 = 0, epsilon = eps
        x = scheduler.step(
            velocity, scheduler.timesteps[0], eps, generator=torch.Generator().manual_seed(0)
        ).prev_sample
        assert x.std().item() == pytest.approx(0.5, rel=0.03)
        assert (x * eps).mean().item() == pytest.approx(0.5 * (1 - eta) ** 0.5, abs=0.02)


def test_trained_times():
    scheduler = RenoiseScheduler(trained_times=[0.999, 0.749, 0.499, 0.249])
    for n, wanted in ((4, [0.999, 0.749, 0.499, 0.249, 0]), (2, [0.999, 0.499, 0]), (1, [0.999, 0])):
        scheduler.set_timesteps(n)
        assert scheduler.times.tolist() == wanted
    with pytest.raises(ValueError, match="num_inference_steps=5: the student knows 4 times, accepted are 1 to that"):
        scheduler.set_timesteps(5)


@pytest.mark.parametrize("eta", [-0.1, 1.1])
def test_eta_has_a_range(eta):
    with pytest.raises(ValueError, match=rf"eta={eta}: must lie in \[0, 1\]"):
        RenoiseScheduler(eta=eta)


def test_trained_times_in_the_loop_and_in_pipelines():
    scheduler = RenoiseScheduler(trained_times=[1.0, 0.25])
    set_timesteps(scheduler, 2)
    assert scheduler.times.tolist() == [1, 0.25, 0]
    with pytest.raises(ValueError, match="num_inference_steps=4: the student knows 2 times"):
        set_timesteps(scheduler, 4)


def test_sigmas_stand_for_their_number_beside_trained_times():
    scheduler = RenoiseScheduler(trained_times=[1.0, 0.25])
    scheduler.set_timesteps(sigmas=[1.0, 0.5])
    assert scheduler.times.tolist() == [1, 0.25, 0]


def test_trained_times_on_a_path_of_a_model():
    """A student's times replace the grid of the model's own scheduler, whatever that was."""
    scheduler = RenoiseScheduler.from_scheduler(diffusers.DDIMScheduler(), trained_times=[0.4])
    scheduler.set_timesteps(1)
    assert scheduler.times.tolist() == [0.4, 0]


def test_saved_and_loaded(tmp_path):
    RenoiseScheduler(eta=0.5, trained_times=[1.0, 0.5], path=VP).save_pretrained(tmp_path)
    loaded = RenoiseScheduler.from_pretrained(tmp_path)
    assert (loaded.config.eta, list(loaded.config.trained_times)) == (0.5, [1.0, 0.5])
    assert loaded.prediction_type == "epsilon" and not isinstance(loaded.interpolant, Linear)
