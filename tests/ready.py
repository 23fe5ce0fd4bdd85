"""Guiders that are ready to run: with what they need and JSON cannot hold (see ``Guider.using``)."""

import inspect
import math
from collections.abc import Callable

import torch

from genkit.denoisers import Condition, FunctionDenoiser
from genkit.guidance.base import Guider
from genkit.guidance.readout import SpatialTarget
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.networks.readout_head import ReadoutHead
from genkit.registry import members

GUIDERS = members("genkit.guidance", Guider)

# By the guider's name: what `using` is given for samples of shape (B, ...), or settings of the constructor.
GIVEN: dict[str, Callable[[tuple[int, ...]], dict]] = {}


def _readout(shape):
    """A head on the predicted sample, which every denoiser has, and a target for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ReadoutHead(["sample"], [shape[1]], out_channels=1, projection_dim=24, norm_num_groups=1).double()
    control = torch.linspace(-0.5, 0.5, math.prod(shape[2:]))
    return {"targets": {"map": SpatialTarget(head=head, control=control.view(1, 1, *(shape[2:] or (1, 1))))}}


GIVEN["readout"] = _readout


def _weak(shape):
    """A network that is worse than those of the tests, which for images is a small DiT."""
    if len(shape) == 2:
        return FunctionDenoiser(lambda x, t, **condition: torch.tanh(0.5 * x), Linear(), "flow_prediction")
    with torch.random.fork_rng():
        torch.manual_seed(1)
        network = DiT(hidden_size=16, num_layers=1, num_heads=2, patch_size=4).eval()
        for p in network.parameters():
            torch.nn.init.normal_(p, std=0.2)
    return network


GIVEN["autoguidance"] = lambda shape: {"weak": _weak(shape)}


def _gfcg(shape):
    """A linear classifier; of as many classes as the tests' models have, which for vectors of 12 take a shift."""
    features = math.prod(shape[1:])
    k = {12: 3, 4: 2}.get(features, 10)
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(features, k, dtype=torch.float64, generator=generator)
    given = {"classifier": lambda x: x.double().flatten(1) @ weight}
    if features == 12:
        shifts = torch.randn(k, 12, dtype=torch.float64, generator=generator)
        given |= {"candidates": Condition({"shift": shifts}), "desired": 1}
    return given


GIVEN["gfcg"] = _gfcg


def _reference(shape):
    """Not where the tests want equal predictions to be kept."""
    return {"reference": torch.linspace(-1, 1, math.prod(shape[1:])).view(1, *shape[1:]), "reference_stop": 0.45}


GIVEN["h_transform"] = _reference


GIVEN["experts"] = lambda shape: {"exponents": {"cond": 2.0, "uncond": -1.0}}


def ready(cls: type[Guider], shape: tuple[int, ...], **settings) -> Guider:
    """``cls(**settings)`` that can run on samples of ``shape``; settings that it does not take are left out."""
    name = cls.__module__.rpartition(".")[2]
    given = GIVEN[name](shape) if name in GIVEN else {}
    accepted = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in given.items() if k not in cls.takes} | settings
    guider = cls(**{k: v for k, v in settings.items() if k in accepted})
    attached = {k: v for k, v in given.items() if k in cls.takes}
    return guider.using(**attached) if attached else guider
