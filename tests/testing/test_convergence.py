"""Orders of accuracy that are known, as the public helper measures them."""

import pytest

from genkit.schedulers import ExactDenoiserScheduler, FlowMapScheduler, InterpolantScheduler, PseudoNumericalScheduler
from genkit.testing.convergence import interior_error, order_of_accuracy
from genkit.testing.oracles import Gaussian

VP = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
ODE = dict(diffusion_form="none")


@pytest.mark.parametrize(
    "scheduler, order",
    [
        (ExactDenoiserScheduler(), 1),
        (ExactDenoiserScheduler(path=VP), 1),
        (InterpolantScheduler(**ODE), 1),
        (InterpolantScheduler(**ODE, integrator="heun"), 2),
        (PseudoNumericalScheduler(solver_order=2), 2),
        (PseudoNumericalScheduler(solver_order=2, path=VP | {"prediction_type": "v_prediction"}), 2),
        (PseudoNumericalScheduler(warmup="prk"), 4),
    ],
)
def test_orders(scheduler, order):
    assert order_of_accuracy(scheduler) == pytest.approx(order, abs=0.2)


def test_a_law_of_ones_own():
    scheduler = ExactDenoiserScheduler()
    point = Gaussian([1.0], 1e-4, interpolant=scheduler.interpolant)  # whose denoiser hardly changes
    assert interior_error(scheduler, 10, law=point) < 1e-3 * interior_error(scheduler, 10)


def test_bad_input():
    with pytest.raises(ValueError, match="start=0.2, end=0.8: must be steps >= 1 and 0 < end < start < 1"):
        interior_error(ExactDenoiserScheduler(), 10, start=0.2, end=0.8)
    with pytest.raises(ValueError, match="jumps between two times"):
        interior_error(FlowMapScheduler(), 10)
