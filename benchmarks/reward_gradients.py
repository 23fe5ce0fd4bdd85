"""How near strategies of reward fine-tuning come to the gradient through the whole sampler.

A flow to 8 Gaussians in the plane, 25 Euler steps, and a reward that is high at one of them. Noise, trajectories and
the calls at which LeapAlign's leaps begin are shared by all; means over 192 batches of 64 are compared with that of
full DRaFT over the same. ``noise / signal`` is the root mean square distance of a batch's gradient from the mean one
over the latter's norm. DRaFT-1 is not above DRaFT-5 by more than 0.02; DRaFT-5 is 0.08 and more below LeapAlign with
``grad_discount=0.3``; and what LeapAlign leaves of the nested term counts, 0 < 0.3 < 1 < full.
"""

import types

import torch
from _common import report
from torch import Tensor, nn

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.interpolants import Linear
from genkit.rng import ItemRNG
from genkit.schedulers import ExactDenoiserScheduler
from genkit.testing.oracles import eight_gaussians
from genkit.training.objectives.align_prop import AlignProp
from genkit.training.objectives.base import Batch
from genkit.training.objectives.draft import DRaFT
from genkit.training.objectives.draft_lv import DRaFTLV
from genkit.training.objectives.drtune import DRTune
from genkit.training.objectives.leapalign import LeapAlign
from genkit.training.objectives.refl import ReFL

SPAN, STEPS, BATCH, BATCHES = 8.0, 25, 64, 192
F64 = torch.float64
LAW = eight_gaussians()
CENTRE = LAW.means[0]

STRATEGIES: dict[str, tuple] = {
    "full": (DRaFT, dict(live_steps=None, recompute=False)),
    "DRaFT-5": (DRaFT, dict(live_steps=5)),
    "DRaFT-1": (DRaFT, dict(live_steps=1)),
    "DRaFT-LV 2": (DRaFTLV, dict(copies=2)),
    "AlignProp": (AlignProp, {}),
    "ReFL, last 11": (ReFL, dict(first=14)),
    "DRTune 2, last 11": (DRTune, dict(live_steps=2, early_stop=11)),
    "LeapAlign 0": (LeapAlign, dict(grad_discount=0.0)),
    "LeapAlign 0.1": (LeapAlign, dict(grad_discount=0.1)),
    "LeapAlign 0.3": (LeapAlign, dict(grad_discount=0.3)),
    "LeapAlign 1": (LeapAlign, dict(grad_discount=1.0)),
    "LeapAlign 0.3, unweighted": (LeapAlign, dict(grad_discount=0.3, similarity_weight=False)),
    "LeapAlign 0.3, a pair a sample": (LeapAlign, dict(grad_discount=0.3, pairs="sample")),
}


class Net(nn.Module):
    """3 x 64 SiLU on the point, and sine and cosine of the time."""

    def __init__(self):
        super().__init__()
        widths = (5, 64, 64, 64)
        hidden = [layer for a, b in zip(widths, widths[1:], strict=False) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.body = nn.Sequential(*hidden, nn.Linear(64, 2)).double()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        given = torch.cat((x.flatten(1), torch.stack((t, (2 * t).sin(), (2 * t).cos()), 1)), 1)
        return self.body(given).view(x.shape)


class Decoder(nn.Module):
    """Points as pictures of two pixels on [-1, 1]."""

    config: dict = {}
    dtype = F64

    def decode(self, z: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (z / SPAN,)


def near(images: Tensor) -> Tensor:
    """``exp(-|x - c|^2 / 4.5)``."""
    x = ((2 * images - 1) * SPAN).flatten(1)
    return (-(x - CENTRE).square().sum(1) / 4.5).exp()


def trained() -> Net:
    """Flow matching on the eight Gaussians."""
    torch.manual_seed(0)
    net, generator = Net(), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3000)
    for _ in range(3000):
        x0 = LAW.sample(256, generator=generator)
        eps = torch.randn(x0.shape, generator=generator, dtype=F64)
        t = torch.rand(256, generator=generator, dtype=F64)
        loss = (net(Linear().interpolate(x0, eps, t), t) - (eps - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net


def gradients(cls, settings: dict, net: Net) -> Tensor:
    """One a batch, ``(BATCHES, weights)``."""
    reward = dict(name="function", path=f"{__file__}:near", differentiable=True)
    pipe = types.SimpleNamespace(components={"vae": Decoder()}, scheduler=ExactDenoiserScheduler())
    config = cls.Config(rewards=[reward], num_inference_steps=STEPS, **settings)
    objective = cls.make(config, FunctionDenoiser(net, Linear(), "flow_prediction"), None, pipe)
    rows = []
    for step in range(BATCHES):
        index = torch.arange(step * BATCH, (step + 1) * BATCH)
        batch = Batch(torch.zeros(BATCH, 1, 1, 2, dtype=F64), Condition(), index, step=step, total_steps=BATCHES)
        net.zero_grad()
        for loss in objective.losses(objective.phases(step)[0], batch, ItemRNG(2, index)):
            loss.value.backward()
        objective.judge.updated()
        rows.append(torch.cat([w.grad.flatten() for w in net.parameters() if w.grad is not None]))
    return torch.stack(rows)


def main() -> None:
    net = trained()
    means, rows = {}, []
    for name, (cls, settings) in STRATEGIES.items():
        each = gradients(cls, settings, net)
        mean = means[name] = each.mean(0)
        full = means["full"]
        rows.append(
            {
                "strategy": name,
                "cosine": float(mean @ full / (mean.norm() * full.norm())),
                "noise / signal": float((each - mean).square().sum(1).mean().sqrt() / mean.norm()),
                "norm ratio": float(mean.norm() / full.norm()),
            }
        )
    cosine = {row["strategy"]: row["cosine"] for row in rows}
    ordered = ("LeapAlign 0", "LeapAlign 0.3", "LeapAlign 1", "full")
    bounds = {
        "DRaFT-1 - DRaFT-5": (cosine["DRaFT-1"] - cosine["DRaFT-5"], 0.02),
        "DRaFT-5 - LeapAlign 0.3": (cosine["DRaFT-5"] - cosine["LeapAlign 0.3"], -0.08),
    }
    for a, b in zip(ordered, ordered[1:], strict=False):
        bounds[f"{a} - {b}"] = (cosine[a] - cosine[b], 0.0)
    report("reward_gradients", rows, bounds)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
