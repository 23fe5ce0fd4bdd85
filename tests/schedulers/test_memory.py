"""A scheduler that remembers is refused or re-indexed, under whatever name and in whatever form it remembers."""

from collections import deque
from dataclasses import dataclass

import pytest
import torch
from diffusers.configuration_utils import register_to_config

from genkit.denoisers import Condition
from genkit.guidance.base import Guided, Guider
from genkit.sampling import sample
from genkit.schedulers import ExactDenoiserScheduler, InterpolantScheduler, PseudoNumericalScheduler
from genkit.schedulers.base import PathScheduler, StepOutput
from genkit.testing.oracles import two_class_mixture

F64 = torch.float64
LAW, INDEX = two_class_mixture(4), torch.tensor([2, 0, 0])


@dataclass
class Box:
    content: object


FORMS = {
    "tensor": lambda v: v,
    "pair": lambda v: (3, v),
    "deque": lambda v: deque([v], maxlen=2),
    "dict": lambda v: {"last": v},
    "object": lambda v: Box([v]),
}


class Averaging(PathScheduler):
    """Steps along the mean of this velocity and the last; keeps that in a form of the test's choice."""

    form = "tensor"

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0, path: dict | None = None):
        super().__init__()

    def _set(self, t, device):
        super()._set(t, device)
        self.lengths = self.times.diff()  # as many as a batch may have, and nobody's history
        self.whatever = self.last = None

    def step(self, model_output, timestep, sample, return_dict=True):
        i = self._index(timestep)
        v = model_output if self.last is None else 1.5 * model_output - 0.5 * self.last
        self.last = model_output
        self.whatever = FORMS[self.form](self.last)
        self._step_index = i + 1
        x = sample + self.lengths[i] * v
        return StepOutput(prev_sample=x) if return_dict else (x,)


def made(cls=Averaging, **attributes):
    scheduler = type(cls.__name__, (cls,), {"__module__": __name__, **attributes})()
    scheduler.set_timesteps(3)
    return scheduler


def swap_at(k):
    return lambda state: state.gather(INDEX) if state.i == k else state


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_found_in_any_form(form):
    x = torch.randn(3, 4, dtype=F64)
    scheduler = made(form=form)
    assert scheduler.remembered() == []
    with pytest.raises(ValueError, match=r"remembers earlier steps \(last, whatever\) and cannot re-index"):
        sample(LAW.denoiser(), scheduler, x, callback=swap_at(1))
    scheduler.set_timesteps(3)
    assert scheduler.remembered() == []


def test_tables_of_a_run_are_not_memory():
    scheduler = made(ExactDenoiserScheduler)
    scheduler.table = torch.arange(3.0)
    assert scheduler.remembered() == ["table"]
    scheduler.set_timesteps(3)
    assert scheduler.remembered() == []
    sample(LAW.denoiser(), scheduler, torch.randn(3, 4), callback=swap_at(1))


class Move(Guider):
    moves_sample = True

    def guide(self, point, state):
        z = point.z + 0.1
        prediction = point.denoiser(z, point.t, point.condition, timestep=point.timestep)
        return Guided(prediction, {"cond": prediction}, z=z), state


def run_moved(scheduler):
    y = torch.tensor([0, 1, 0])
    condition = Condition({"class_labels": y}, {"class_labels": torch.full_like(y, 2)})
    return sample(LAW.denoiser(), scheduler, torch.randn(3, 4, dtype=F64), condition, guider=Move())


def gather(self, index):
    self.last = self.last[index]


def test_moves_ask_what_is_remembered():
    for attributes in (dict(), dict(gather=gather), dict(order=2)):
        with pytest.raises(ValueError, match="moves the sample before each step.*Averaging remembers earlier"):
            run_moved(made(**attributes))
        # Predictions alone do no harm.
        assert run_moved(made(remembers_samples=False, **attributes)).isfinite().all()


@pytest.mark.parametrize("warmup, order, kept", [("improved_euler", 4, True), ("ramp", 4, False), ("prk", 1, False)])
def test_moves_with_pseudo_numerical_methods(warmup, order, kept):
    scheduler = PseudoNumericalScheduler(warmup=warmup, solver_order=order)
    scheduler.set_timesteps(5)
    if kept:
        with pytest.raises(ValueError, match="Move moves the sample.*PseudoNumericalScheduler remembers"):
            run_moved(scheduler)
    else:
        assert run_moved(scheduler).isfinite().all()


def test_moves_with_stochastic_interpolants():
    scheduler = InterpolantScheduler(integrator="heun")
    scheduler.set_timesteps(3)
    with pytest.raises(ValueError, match="Move moves the sample.*InterpolantScheduler remembers"):
        run_moved(scheduler)
    euler = InterpolantScheduler()
    euler.set_timesteps(3)
    assert run_moved(euler).isfinite().all()
