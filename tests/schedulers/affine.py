"""Exact moments of a solver on a Gaussian law, where every step is affine in the sample and in each of its draws."""

import torch


def moments(scheduler, law, start=None) -> list[tuple[float, float]]:
    """Mean and standard deviation of the sample after every call; ``law`` is one-dimensional.

    ``start`` is the mean and standard deviation of the initial sample, by default the scheduler's.
    """
    calls = len(scheduler.timesteps)
    mean, std = (0.0, scheduler.init_noise_sigma) if start is None else start
    # Row 0 gets no randomness at all, row 1 the initial sample's, every other row one of the draws.
    x = torch.full((calls + 2, 1), mean, dtype=torch.float64)
    x[1] += std
    draws = []

    def one_draw_a_row(like, generator):
        draws.append(torch.zeros_like(like))
        draws[-1][1 + len(draws)] = 1
        return draws[-1]

    scheduler._noise = one_draw_a_row
    out = []
    for i, timestep in enumerate(scheduler.timesteps):
        prediction = law.predict(scheduler.prediction_type, x, scheduler.times[i].expand(len(x)))
        x = scheduler.step(prediction, timestep, x).prev_sample
        out.append((x[0].item(), (x - x[0]).norm().item()))
    return out
