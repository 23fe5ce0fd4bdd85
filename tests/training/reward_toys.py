"""What the tests of reward fine-tuning share: pictures of any numbers, rewards of them, small networks."""

import types

import torch
from diffusers import DDIMScheduler
from torch import nn

from genkit.denoisers import FunctionDenoiser
from genkit.denoisers.base import Condition
from genkit.interpolants import from_scheduler
from genkit.rng import ItemRNG
from genkit.schedulers import ExactDenoiserScheduler
from genkit.testing.oracles import Gaussian
from genkit.training.objectives.base import Batch

F64 = torch.float64
SPAN = 16.0  # a power of two, so that nothing is rounded


class Decoder(nn.Module):
    """Pictures on [-1, 1] of numbers on [-SPAN, SPAN]."""

    config: dict = {}
    dtype = F64

    def decode(self, z, return_dict):
        return (z / SPAN,)


def numbers(images):
    """What :class:`Decoder` was given."""
    return ((2 * images - 1) * SPAN).flatten(1)


def total(images):
    return numbers(images).sum(1)


def parabola(images, centre=3.0, sign=1.0):
    return -sign * (numbers(images) - centre).square().sum(1) / 2


def bump(images, centre=1.0):
    return (-(numbers(images) - centre).square().mean(1) / 4).exp()


def spoilt(images, above=0.5):
    """NaN for samples whose first number is above a bound, and a gradient that is none either."""
    x = numbers(images)
    return x.sum(1) * torch.where(x[:, 0] > above, torch.nan, 1.0)


def blind(images):
    return numbers(images).detach().mean(1)


def named(function, differentiable=True, label=None, weight=1.0, **settings):
    """Settings of an objective's reward."""
    path = f"tests.training.reward_toys:{function}"
    made = dict(name="function", path=path, differentiable=differentiable, settings=settings)
    return made | dict(label=label or function, weight=weight)


class Net(nn.Module):
    """A network on pictures of four pixels that sees all of them, the time, and a number."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 32), nn.SiLU(), nn.Linear(32, 4)).double()

    def forward(self, x, t, number=None):
        number = torch.zeros_like(t) if number is None else number
        given = torch.cat((x.flatten(1), t.to(x)[:, None], number.to(x)[:, None]), 1)
        return self.body(given).view(x.shape)


class As(nn.Module):
    """A velocity network that says what it knows as another prediction."""

    def __init__(self, net, path, prediction_type):
        super().__init__()
        self.net, self.path, self.prediction_type = net, path, prediction_type

    def forward(self, x, t, **condition):
        v = self.net(x, t, **condition)
        return self.path.convert(v, "flow_prediction", self.prediction_type, x, t)


class Offsets(nn.Module):
    """Exact velocity of N(1, 0.5^2), to which a weight of its own is added at each of ``n`` uniform times."""

    def __init__(self, n, shared=False):
        super().__init__()
        self.law = Gaussian(torch.ones(1, 1, 1, dtype=F64), 0.5)
        self.n, self.theta = n, nn.Parameter(torch.zeros(1 if shared else n, dtype=F64))

    def forward(self, x, t):
        i = ((1 - t) * self.n).round().long() % len(self.theta)
        return self.law.velocity(x, t) + self.theta[i].view(-1, 1, 1, 1)


class At:
    """LeapAlign's points, given."""

    def __init__(self, *calls):
        self.calls = calls

    def draw(self, rng, calls, leaps):
        assert leaps == len(self.calls)
        return torch.tensor([self.calls]).expand(len(rng), -1)


class From(ItemRNG):
    """Noise that is one number; other draws are as ever."""

    def __init__(self, value, n=1):
        super().__init__(0, range(n))
        self.value = value

    def normal(self, shape=(), *, dtype=torch.float32):
        return torch.full((len(self), *shape), self.value, dtype=dtype)


def vp(prediction_type="epsilon"):
    """A scheduler of Diffusers on the path of Stable Diffusion."""
    settings = dict(beta_schedule="scaled_linear", timestep_spacing="leading")
    return DDIMScheduler(clip_sample=False, prediction_type=prediction_type, **settings)


def objective(
    cls, *, net=None, kind="flow_prediction", scheduler=None, reward=None, points=None, decoder=None, **settings
):
    """An objective on a network that predicts ``kind`` at the times of ``scheduler``, by default uniform and linear."""
    if net is None:
        torch.manual_seed(0)
        net = Net()
    scheduler = scheduler or ExactDenoiserScheduler()
    path = getattr(scheduler, "interpolant", None) or from_scheduler(scheduler)
    network = net if kind == "flow_prediction" else As(net, path, kind)
    student = FunctionDenoiser(network, path, kind)
    pipe = types.SimpleNamespace(components={"vae": decoder or Decoder()}, scheduler=scheduler)
    settings = dict(rewards=[reward or named("parabola")], num_inference_steps=6) | settings
    made = cls.make(cls.Config(**settings), student, None, pipe)
    if points is not None:
        made.config.points = At(*points)
    return made


def batch(n=3, shape=(1, 2, 2), step=5, condition=None):
    return Batch(torch.zeros(n, *shape, dtype=F64), condition or Condition(), torch.arange(n), {}, None, step, 10)


def losses(made, given=None, rng=None, scale=1.0):
    """Back-propagate every loss of a step; gives them."""
    given = given or batch()
    seen = []
    (phase,) = made.phases(given.step)
    for loss in made.losses(phase, given, rng or ItemRNG(1, given.index)):
        (scale * loss.value).backward()
        seen.append(loss)
    assert len(seen) == phase.backwards
    return seen


def gradient(made, given=None, rng=None, scale=1.0):
    """The gradient of a step, flat."""
    weights = list(made.student.module.parameters())
    for w in weights:
        w.grad = None
    losses(made, given, rng, scale)
    return torch.cat([(torch.zeros_like(w) if w.grad is None else w.grad).flatten() for w in weights]) / scale


def profile(cls, start=0.0, *, n=10, reward=None, **settings):
    """``d r / d theta_i`` of the oracle's offsets, one a call; ``r`` is the sample itself unless given."""
    made = objective(cls, net=Offsets(n), reward=reward or named("total"), num_inference_steps=n, **settings)
    return -gradient(made, batch(1, (1, 1, 1)), From(start))
