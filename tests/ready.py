"""What the tests over every guider must be told of some: what they need and JSON cannot hold (``Guider.using``)."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace

import torch

from genkit.denoisers import Condition, FunctionDenoiser
from genkit.guidance.base import Guider
from genkit.guidance.readout import SpatialTarget
from genkit.interpolants import Linear
from genkit.networks.dit import DiT
from genkit.networks.readout_head import ReadoutHead
from genkit.registry import members

GUIDERS = members("genkit.guidance", Guider)

# By the guider's name: what `using` is given for samples of shape (B, ...), or settings of the constructor. What can
# differ from sample to sample should: tensors (and conditions) of B rows are re-indexed with the samples.
GIVEN: dict[str, Callable[[tuple[int, ...]], dict]] = {}
# Guiders that act also where conditional and unconditional prediction are equal.
ACTS_ALONE = {"h_transform"}
# By the guider's name: the setting that its push grows with, where that is not guidance_scale; None if there is none.
SCALE: dict[str, str | None] = {"gfcg": "strength", "experts": None}


def _readout(shape):
    """A head on the predicted sample, which every denoiser has, and a target for it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        head = ReadoutHead(["sample"], [shape[1]], out_channels=1, projection_dim=24, norm_num_groups=1).double()
    size = (shape[0], 1, *(shape[2:] or (1, 1)))
    control = torch.linspace(-0.5, 0.5, math.prod(size)).view(size)
    return {"targets": {"map": SpatialTarget(head=head, control=control)}}


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
        given |= {"candidates": Condition({"shift": shifts}), "desired": torch.arange(shape[0]) % k}
    return given


GIVEN["gfcg"] = _gfcg


GIVEN["h_transform"] = lambda shape: {"reference": torch.linspace(-1, 1, math.prod(shape)).view(shape)}


def _experts(shape):
    """Of the tests' model of vectors of 12 under a second condition, too."""
    given: dict = {"exponents": {"cond": 2.0, "uncond": -1.0}}
    if math.prod(shape[1:]) == 12:
        shift = torch.linspace(-1, 1, math.prod(shape), dtype=torch.float64).view(shape)
        given["exponents"]["other"] = 0.5
        given["experts"] = {"other": Condition({"shift": shift})}
    return given


GIVEN["experts"] = _experts


def name_of(cls: type[Guider]) -> str:
    """The name of a guider: its file's."""
    return cls.__module__.rpartition(".")[2]


def ready(cls: type[Guider], shape: tuple[int, ...], *, rows=None, **settings) -> Guider:
    """``cls(**settings)`` that can run on samples of ``shape``; settings that it does not take are left out.

    With ``rows`` it can run on these samples of that batch.
    """
    name = name_of(cls)
    given = GIVEN[name](shape) if name in GIVEN else {}
    if rows is not None:
        given = _rows(given, torch.as_tensor(rows), shape[0])
    accepted = inspect.signature(cls.__init__).parameters
    settings = {k: v for k, v in given.items() if k not in cls.takes} | settings
    guider = cls(**{k: v for k, v in settings.items() if k in accepted})
    attached = {k: v for k, v in given.items() if k in cls.takes}
    return guider.using(**attached) if attached else guider


def _rows(value, index, batch: int):
    """``value`` with all in it that has a row for each of the ``batch`` at ``index``."""
    if isinstance(value, torch.Tensor):
        return value[index] if value.ndim and len(value) == batch else value
    if isinstance(value, Condition):
        return value.index(index) if len(value) == batch else value
    if isinstance(value, Mapping):
        return {name: _rows(v, index, batch) for name, v in value.items()}
    if is_dataclass(value):
        return replace(value, **{f.name: _rows(getattr(value, f.name), index, batch) for f in fields(value)})
    return value
