"""The toy that the specifications' tables are about: 8 Gaussians in the plane, a small network, 2000 steps."""

import sys
import time

import torch
from torch import nn

from genkit.data.eight_gaussians import EightGaussians
from genkit.denoisers.base import Condition
from genkit.rng import ItemRNG
from genkit.sampling import sample
from genkit.schedulers import FlowMapScheduler
from genkit.testing.distances import sliced_wasserstein
from genkit.testing.oracles import eight_gaussians
from genkit.training.build import Run
from genkit.training.config import TrainConfig
from genkit.training.objectives.base import Batch
from genkit.training.trainer import Trainer

LAW = eight_gaussians()
STEPS = (1, 2, 4, 8)


class MLP(nn.Module):
    """3 x 64 SiLU on ``x / 1.446`` and sines and cosines of {1, 2, 4} times ``t`` and ``t - s``, in radians.

    ``two_times=False``: of ``t`` alone.
    """

    def __init__(self, two_times=True):
        super().__init__()
        self.two_times = two_times
        layers = []
        for width in (14 if two_times else 8, 64, 64):
            layers += [nn.Linear(width, 64), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(64, 2))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, x, t, s=None):
        times = [t]
        if self.two_times:
            times.append(torch.zeros_like(t) if s is None else t - s)
        angles = torch.stack([k * time for k in (1, 2, 4) for time in times], dim=1).to(x.dtype)
        return self.body(torch.cat((x / 1.446, angles.sin(), angles.cos()), dim=1))


class Exact(nn.Module):
    """The velocity of the toy."""

    def forward(self, x, t):
        return LAW.velocity(x, t)


def train(folder, objective, steps=2000, *, source=None, **changes):
    """``(trainer, seconds)`` of ``objective`` trained by the table's recipe; ``changes`` are settings of the run."""
    settings = dict(
        output_dir=folder,
        model=dict(network="dit"),  # the run brings its own network
        objective=dict(name="flow_map"),
        data=dict(name="eight_gaussians"),
        optimizer=dict(name="Adam", lr=3e-3),
        lr_scheduler="cosine",
        lr_warmup_steps=50,
        lr_final_ratio=0.02,
        global_batch_size=256,
        max_train_steps=steps,
        max_grad_norm=10.0,
        ema=dict(decays=[0.995]),
        checkpointing_steps=steps,
    )
    config = TrainConfig(**(settings | changes))

    def inputs(read, device):
        fields = {k: v for k, v in read.items() if isinstance(v, torch.Tensor)}
        return Batch(read["x0"], Condition(), read["index"], fields)

    run = Run(config, None, objective.student, objective, source or EightGaussians(), inputs)
    trainer = Trainer(run, quiet=True)
    began = time.perf_counter()
    trainer.train()
    return trainer, time.perf_counter() - began


def distances(draw, steps=STEPS):
    """SW2 of ``draw(noise, n)`` to 8,000 real samples for every ``n`` of ``steps``, and the noise ``(8000, 2)``."""
    noise = ItemRNG(1, range(8000)).normal((2,))
    real = LAW.sample(8000, generator=torch.Generator().manual_seed(2)).float()
    return [sliced_wasserstein(draw(noise, n), real) for n in steps], noise


def endpoints(noise):
    """Where the exact flow takes ``noise``, by 200 steps of the midpoint rule, float64."""
    x = noise.double()
    for k in range(200):
        t = torch.full((len(x),), 1 - k / 200, dtype=torch.float64)
        middle = x - LAW.velocity(x, t) / 400
        x = x - LAW.velocity(middle, t - 1 / 400) / 200
    return x


def rmse(samples, noise):
    """Root of the mean squared distance, summed over dimensions, to where the exact flow takes ``noise``."""
    return (samples.double() - endpoints(noise)).square().sum(1).mean().sqrt().item()


def jumps(student, scheduler=FlowMapScheduler, **settings):
    """``draw`` for :func:`distances`: a student under a scheduler that has ``settings``."""

    def draw(noise, n):
        made = scheduler(**settings)
        made.set_timesteps(n)
        return sample(student, made, noise, generators=ItemRNG(3, range(len(noise))).generators())

    return draw


def euler(net):
    """``draw`` for :func:`distances`: Euler steps on a velocity ``net(x, t)``."""

    @torch.no_grad()
    def draw(noise, n):
        x = noise
        for k in range(n):
            x = x - net(x, torch.full((len(x),), 1 - k / n)) / n
        return x

    return draw


def show(capsys, name, values, seconds, **more):
    """A line of figures on the terminal."""
    text = " / ".join(f"{v:.3f}" for v in values) + "".join(f", {k} {v:.3f}" for k, v in more.items())
    say(capsys, f"{name}: {text} in {seconds:.0f} s")


def say(capsys, line):
    """``line`` on the terminal; by the error stream, since tests that run in parallel have no other."""
    with capsys.disabled():
        print(f"\n{line}", file=sys.stderr)
