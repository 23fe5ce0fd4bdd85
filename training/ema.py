"""Exponential moving averages of weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from genkit.kernels import fused


class EMA:
    """``a <- a + (1 - d') (w - a)`` after every update, for each decay ``d``, in float32.

    ``d' = min(d, (1 + n) / (10 + n))`` after ``n`` updates, so that the average forgets the initial weights also in
    runs that are short against ``1 / (1 - d)``.

    Args:
        parameters: the trained weights by name, and what else is averaged like them.
        decays: each in [0, 1).
    """

    def __init__(self, parameters: Mapping[str, Tensor], decays: Sequence[float]):
        self.names = list(parameters)
        self._weights = list(parameters.values())
        self.averages = {d: [p.detach().to(torch.float32, copy=True) for p in self._weights] for d in decays}
        self.updates = 0
        self._groups: dict[tuple, Any] = {}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights, none of which is copied as a whole.

        Weights in float32 by one ``foreach`` call a decay; in bfloat16 and float16, on GPUs with Triton (see
        :mod:`genkit.kernels`), by one kernel a decay; all others one by one.
        """
        self.updates += 1
        weights = [p.detach() for p in self._weights]
        kernels = {device: fused(device) for device in {w.device for w in weights if w.dtype != torch.float32}}
        for decay, average in self.averages.items():
            step = 1 - min(decay, (1 + self.updates) / (10 + self.updates))
            ways: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
            for a, w in zip(average, weights, strict=True):
                for tensors, tensor in zip(ways.setdefault(_way(a, w, kernels), ([], [])), (a, w), strict=True):
                    tensors.append(tensor)
            for way, (averages, present) in ways.items():
                if way[0] == "foreach":
                    torch._foreach_lerp_(averages, present, step)
                elif way[0] == "kernel":
                    self._group((decay, *way), averages, present).lerp_(step)
                else:
                    for a, w in zip(averages, present, strict=True):
                        torch._foreach_lerp_([a], [w.float()], step)

    def _group(self, key: tuple, averages: list[Tensor], weights: list[Tensor]):
        """What the kernel works on, kept until a tensor is moved."""
        from genkit.training._triton_ema import Group, addresses

        known = self._groups.get(key)
        if known is None or known.addresses != addresses(averages, weights):
            known = self._groups[key] = Group(averages, weights)
        return known

    @contextmanager
    def swapped(self, decay: float | None = None) -> Iterator[None]:
        """Within, the network has the averaged weights, of the first decay unless told otherwise."""
        average = self.averages[next(iter(self.averages)) if decay is None else decay]
        kept = [p.detach().clone() for p in self._weights]
        with torch.no_grad():
            torch._foreach_copy_([p.detach() for p in self._weights], average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_([p.detach() for p in self._weights], kept)

    def state_dict(self) -> dict[str, Tensor]:
        """Averages as ``decay/name``."""
        return {f"{d}/{n}": a for d, average in self.averages.items() for n, a in zip(self.names, average, strict=True)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Averages from :meth:`state_dict`; names and shapes must be the same."""
        for key, average in self.state_dict().items():
            average.copy_(state[key])


def _way(average: Tensor, weight: Tensor, kernels: Mapping[torch.device, bool]) -> tuple:
    """How a weight is averaged, and what those have in common that are averaged together."""
    if weight.dtype == torch.float32:
        return "foreach", isinstance(weight, DTensor)  # an operation on many tensors takes one kind
    if kernels[weight.device]:
        from genkit.training._triton_ema import takes

        if takes(average, weight):
            return "kernel", weight.dtype, weight.device
    return ("singly",)
