"""Random weights of the Inception network that keep its activations alive, under the published names."""

import math
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from genkit.networks.inception import Inception2015


def state() -> dict[str, Tensor]:
    return dict(_state())


@cache
def _state() -> dict[str, Tensor]:
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Inception2015().state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            made[name] = torch.zeros((), dtype=torch.long)
        elif kind == "running_var" or name.endswith("bn.weight"):
            made[name] = 0.5 + torch.rand(shape, generator=generator)
        elif len(shape) == 1:
            made[name] = 0.2 * torch.randn(shape, generator=generator)
        else:
            made[name] = torch.randn(shape, generator=generator) * math.sqrt(2 / math.prod(shape[1:]))
    return made


def write(folder: Path) -> Path:
    path = folder / "pt_inception.pth"
    torch.save(state(), path)
    return path
