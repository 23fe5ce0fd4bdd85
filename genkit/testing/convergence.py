"""How fast a solver's error falls with its step, measured against the exact flow."""

import math
from collections.abc import Sequence

import torch

from genkit.sampling import trajectory
from genkit.testing.oracles import Gaussian


def interior_error(
    scheduler, steps: int, *, law: Gaussian | None = None, start: float = 0.8, end: float = 0.2, seed: int = 0
) -> float:
    """Root mean square error of 64 samples that ``scheduler`` carries from ``start`` to ``end`` in ``steps`` steps.

    The steps are of equal length in ``t``. A further one, from ``end`` to clean data, is planned and not taken: it is
    of first order in most methods, as long as the others, and would hide their order.

    Args:
        scheduler: a deterministic ``PathScheduler`` of one-time networks; its times are set here.
        law: on the scheduler's path; by default one whose two coordinates differ, so that errors do not cancel.
        start, end: ``0 < end < start < 1``.
        seed: of the samples at ``start``, which follow the law, in float64.

    Raises:
        ValueError: no steps, times out of order, or a scheduler that begins elsewhere.
    """
    if steps < 1 or not 0 < end < start < 1:
        raise ValueError(f"steps={steps}, start={start}, end={end}: must be steps >= 1 and 0 < end < start < 1")
    path = scheduler.interpolant
    if law is None:
        law = Gaussian([1.0, -2.0], [0.3, 1.5], interpolant=path)
    t = torch.linspace(start, end, steps + 1, dtype=torch.float64)
    scheduler.set_timesteps(timesteps=path.timestep(t).tolist())
    begin, wanted = path.time(path.timestep(t[[0, -1]]))
    # Methods of several stages visit times again: the sample has arrived where the last step begins.
    places = (scheduler.times[:-1] == wanted).nonzero()
    if scheduler.times[0] != begin or not len(places):
        raise ValueError(
            f"scheduler={type(scheduler).__name__} walks {scheduler.times.tolist()[:4]}..., not from {start} by {end}"
        )
    generator = torch.Generator().manual_seed(seed)
    eps = torch.randn(64, *law.shape, generator=generator, dtype=torch.float64)
    x = initial = path.interpolate(law.sample(64, generator=generator), eps, begin)
    for state in trajectory(law.denoiser(scheduler.prediction_type), scheduler, initial):
        x = state.x
        if state.i + 1 == int(places[-1]):
            break
    return (x - law.flow_map(initial, begin, wanted)).square().mean().sqrt().item()


def order_of_accuracy(scheduler, steps: Sequence[int] = (40, 80), **kwargs) -> float:
    """``p`` of an error ``~ steps^-p``: the slope between the first and the last of ``steps``.

    Where the path is a table (``DiscreteVP``), the velocity jumps at every trained timestep, which costs methods that
    average it their order.

    ``kwargs`` as in :func:`interior_error`.

    >>> from genkit.schedulers import ExactDenoiserScheduler
    >>> round(order_of_accuracy(ExactDenoiserScheduler()))
    1
    """
    first, last = (interior_error(scheduler, n, **kwargs) for n in (steps[0], steps[-1]))
    return math.log(first / last) / math.log(steps[-1] / steps[0])
