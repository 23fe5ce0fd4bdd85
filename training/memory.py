"""What a run needs of a device's memory before it computes anything: weights, gradients, optimiser states, averages."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from genkit.training.build import Run
from genkit.training.optimizers import make_optimizer
from genkit.training.sections import Named


@dataclass(frozen=True)
class Footprint:
    """A role's numbers of weights and its memory in bytes."""

    role: str
    parameters: int
    trained: int
    weights: int
    gradients: int
    optimizer: int
    averages: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.averages


def footprints(run: Run) -> list[Footprint]:
    """Of every role of the run's objective, and of the rest of the pipeline (text encoders, VAE), in that order.

    A weight that several roles hold counts with the first. Activations, and the copies that mixed precision makes, are
    not in it: they depend on batch, sizes and kernels.
    """
    config, seen = run.config, set[int]()
    found = []
    for name, role in run.objective.roles.items():
        tensors = _new([*role.module.parameters(), *role.module.buffers()], seen)
        trained = [p for p in tensors if isinstance(p, nn.Parameter) and p.requires_grad] if role.trains else []
        size = _bytes(trained)
        copies = len(config.ema.decays) if role.ema else 0
        settings = {"name": config.optimizer.name, **config.optimizer.settings, **role.optimizer}
        per_weight = optimizer_states(Named(**settings)) if trained else 0.0
        found.append(
            Footprint(
                name,
                sum(p.numel() for p in tensors if isinstance(p, nn.Parameter)),
                sum(p.numel() for p in trained),
                _bytes(tensors),
                size,
                round(per_weight * size),
                copies * size,
            )
        )
    parts = [m for m in (run.pipe.components.values() if run.pipe is not None else ()) if isinstance(m, nn.Module)]
    rest = _new([t for part in parts for t in (*part.parameters(), *part.buffers())], seen)
    if rest:
        found.append(Footprint("other parts", sum(t.numel() for t in rest), 0, _bytes(rest), 0, 0, 0))
    return found


def optimizer_states(settings: Named) -> float:
    """How many numbers the optimiser keeps for each weight of a matrix, found by a step of it on 64 x 64 weights."""
    probe = nn.Parameter(torch.zeros(64, 64))
    optimizer = make_optimizer(settings, [probe])
    probe.grad = torch.ones_like(probe)
    optimizer.step()
    kept = [v for v in optimizer.state[probe].values() if isinstance(v, Tensor) and v.ndim]
    return _bytes(kept) / _bytes([probe])


def _new(tensors: Iterable[Tensor], seen: set[int]) -> list[Tensor]:
    """Those not in ``seen``, which they are added to."""
    found = [t for t in dict.fromkeys(tensors) if id(t) not in seen]
    seen.update(map(id, found))
    return found


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
