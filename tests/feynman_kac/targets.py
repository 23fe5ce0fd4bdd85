"""Targets with known moments: Gaussian and mixture experts, the run that samples them, and exact answers."""

import math

import torch

from genkit.denoisers import Condition, FunctionDenoiser
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.sampling import trajectory
from genkit.schedulers import ExactDenoiserScheduler
from genkit.testing.oracles import Gaussian, GaussianMixture

F64 = torch.float64
WIDE = Gaussian([0.0], 1.5)  # variance 2.25
UNIT = Gaussian([1.0], 1.0)
NARROW = Gaussian([-0.5], 0.8)  # variance 0.64
MIXED_U = GaussianMixture([[-2.0], [0.5], [2.0]], [0.5, 0.4, 0.3], [0.4, 0.3, 0.3])
MIXED_C = GaussianMixture([[0.5], [2.0]], [0.4, 0.3], [0.5, 0.5])


def either(conditional, unconditional):
    """A denoiser that is exact for one law under its condition and for another without."""

    def predict(x, t, given):
        c, u = (law.velocity(x, t) for law in (conditional, unconditional))
        return torch.where(given.bool()[:, None], c, u)

    return FunctionDenoiser(predict, Linear(), "flow_prediction")


def condition(n):
    return Condition({"given": torch.ones(n, dtype=torch.int64)}, {"given": torch.zeros(n, dtype=torch.int64)})


def grid(kappa_max=20.0, kappa_min=1e-3, steps=200, rho=7):
    """Karras noise levels, as times of the linear path."""
    i = torch.linspace(0, 1, steps, dtype=F64)
    kappa = (kappa_max ** (1 / rho) + i * (kappa_min ** (1 / rho) - kappa_max ** (1 / rho))) ** rho
    return kappa / (1 + kappa)


def scheduler_on(times, noise_scale=1.0, exponent_sum=1.0):
    scheduler = ExactDenoiserScheduler(noise_scale=noise_scale, exponent_sum=exponent_sum)
    scheduler.set_timesteps(sigmas=times.tolist())
    return scheduler


def run(denoiser, scheduler, particles, *, samples, seed=0, guider=None, given=None):
    """The last state of a run in float64 from ``x ~ N(0, sigma^2 / B)``."""
    sigma = float(scheduler.times[0])
    x = ItemRNG(seed, range(samples)).normal((1,), dtype=F64) * sigma * scheduler.init_noise_sigma
    generator = torch.Generator().manual_seed(seed)
    states = trajectory(denoiser, scheduler, x, given, guider=guider, particles=particles, generators=generator)
    for state in states:
        last = state
    return last


def moments(state):
    """Weighted mean, variance and log Z of every group, ``(N, 3)``."""
    log_weights = state.log_weights
    w, x = log_weights.normalised, state.x.view(log_weights.values.shape)
    mean = (w * x).sum(1)
    variance = (w * (x - mean[:, None]) ** 2).sum(1)
    return torch.stack((mean, variance, log_weights.log_z), 1)


def gaussian_product(laws, exponents, kappa=0.0):
    """Mean, variance and ``log`` of the integral of ``prod q_i^b_i`` for 1-D Gaussians blurred by ``kappa``."""
    m = torch.stack([law.means[0, 0] for law in laws])
    v = torch.stack([law.stds[0, 0] ** 2 for law in laws]) + kappa**2
    b = torch.tensor(exponents, dtype=F64)
    precision = (b / v).sum()
    mean = (b * m / v).sum() / precision
    log_z = (
        -(b * (2 * math.pi * v).log()).sum() / 2
        + (2 * math.pi / precision).log() / 2
        - ((b * m**2 / v).sum() - precision * mean**2) / 2
    )
    return mean.item(), (1 / precision).item(), log_z.item()
