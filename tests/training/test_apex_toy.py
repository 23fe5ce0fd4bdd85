"""APEX makes a one-step generator of four modes, as released and not as written: `make test-slow` prints the times."""

import math
import statistics
import time

import pytest
import torch
from torch import nn

from genkit.denoisers import FunctionFlowMap
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.rng import ItemRNG, hash_seed
from genkit.training.objectives.apex import Apex, ApexConfig
from genkit.training.objectives.base import Batch
from tests.training.planar import say

MODES = torch.tensor([[2.0, 2], [2, -2], [-2, 2], [-2, -2]])
FEATURES = torch.randn(8, generator=torch.Generator().manual_seed(7))


class MLP(nn.Module):
    """3 x 128 SiLU on ``x``, sines and cosines of {1, 2, 4} times ``t`` and ``t - s``, and 8 numbers as condition."""

    def __init__(self):
        super().__init__()
        layers = []
        for width in (22, 128, 128):
            layers += [nn.Linear(width, 128), nn.SiLU()]
        self.body = nn.Sequential(*layers, nn.Linear(128, 2))

    def forward(self, x, t, s, prompt_embeds):
        angles = torch.stack([k * time for k in (1, 2, 4) for time in (t, t - s)], dim=1)
        return self.body(torch.cat((x, angles.sin(), angles.cos(), prompt_embeds[:, 0]), dim=1))


def real(rng):
    return MODES[rng.integers(4)] + 0.3 * rng.normal((2,))


def sliced_w1(x, y, projections=256):
    """Mean over directions of the mean distance of sorted projections."""
    angle = torch.arange(projections) * (math.pi / projections)
    directions = torch.stack((angle.cos(), angle.sin()))
    return ((x @ directions).sort(0).values - (y @ directions).sort(0).values).abs().mean().item()


def condition(n):
    return Condition({"prompt_embeds": FEATURES.expand(n, 1, 8)})


def pretrained(seed):
    """2000 steps of flow matching, batch 256."""
    torch.manual_seed(seed)
    student = FunctionFlowMap(MLP(), Linear())
    optimizer = torch.optim.Adam(student.module.parameters(), 1e-3)
    for step in range(2000):
        rng = ItemRNG(hash_seed(seed, 1), torch.arange(256) + 256 * step)
        x0, eps, t = real(rng), rng.normal((2,)), rng.uniform()
        x = student.interpolant.interpolate(x0, eps, t)
        loss = (student.average_velocity(x, t, t, condition(256)) - (eps - x0)).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return student


def trained(student, seed, loss, shift):
    """2000 steps of ``loss``, batch 128."""
    config = ApexConfig(loss=loss, shift=dict(kind="condition") | shift, condition_dropout=0)
    objective = Apex(config, student)
    optimizer = torch.optim.Adam(student.module.parameters(), 1e-3)
    (phase,) = objective.phases(0)
    for step in range(2000):
        index = torch.arange(128) + 128 * step
        batch = Batch(real(ItemRNG(hash_seed(seed, 2), index)), condition(128), index, step=step, total_steps=2000)
        value = objective(phase, batch, ItemRNG(hash_seed(seed, 3), index)).value
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        objective.updated(phase)


@torch.no_grad()
def quality(student, steps=1):
    """Sliced W1 to fresh data, and the share of samples within 0.9 of a mode."""
    n = 4000
    x, c = ItemRNG(11, range(n)).normal((2,)), condition(n)
    for k in range(steps):
        t, s = torch.full((n,), 1 - k / steps), torch.full((n,), 1 - (k + 1) / steps)
        u = student.average_velocity(x, t, s if steps == 1 else t, c)
        x = x - u / steps
    near = torch.cdist(x, MODES).min(1).values < 0.9
    return sliced_w1(x, real(ItemRNG(12, range(n)))), near.float().mean().item()


CASES = {
    "released": (dict(form="released", guidance=None), dict(a=-1, b=0.5), 0.45, 0.65),
    "matching": (dict(form="released", guidance=None, intervals=0, error="mse"), dict(a=-1, b=0.5), 0.45, 0.6),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_one_step_finds_the_modes(name, capsys):
    loss, shift, distance, share = CASES[name]
    began, got = time.perf_counter(), []
    for seed in range(3):
        student = pretrained(seed)
        trained(student, seed, loss, shift)
        got.append(quality(student))
    figures = ", ".join(f"{d:.3f} / {f:.2f}" for d, f in got)
    say(capsys, f"apex, {name}: W1 / share near a mode {figures} in {time.perf_counter() - began:.0f} s")
    assert statistics.median(d for d, _ in got) <= distance
    assert statistics.median(f for _, f in got) >= share


@pytest.mark.slow
@pytest.mark.parametrize("fake_grad", [False, True])
def test_the_literal_objective_makes_no_one_step_generator(fake_grad, capsys):
    began, student = time.perf_counter(), pretrained(0)
    (start, none), (many, _) = quality(student), quality(student, 50)
    trained(student, 0, dict(form="literal", fake_grad=fake_grad), dict(a=-1, b=0.5))
    (end, still_none), (worse, _) = quality(student), quality(student, 50)
    say(
        capsys,
        f"apex, literal, fake_grad={fake_grad}: W1 at one step {start:.2f} -> {end:.2f} (near a mode {none:.2f} -> "
        f"{still_none:.2f}), at 50 {many:.2f} -> {worse:.2f} in {time.perf_counter() - began:.0f} s",
    )
    assert none < 0.02 > still_none and start > 1.5 < end
    assert worse > many
