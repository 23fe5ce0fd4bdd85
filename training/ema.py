"""Exponential moving averages of weights."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


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
        # Shards and whole tensors apart, since an operation on many tensors takes one kind.
        sharded = [isinstance(p, DTensor) for p in self._weights]
        self._groups = [[i for i, s in enumerate(sharded) if s is kind] for kind in set(sharded)]
        self.averages = {d: [p.detach().to(torch.float32, copy=True) for p in self._weights] for d in decays}
        self.updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Move every average towards the present weights."""
        self.updates += 1
        weights = [p.detach().float() for p in self._weights]
        for decay, average in self.averages.items():
            weight = 1 - min(decay, (1 + self.updates) / (10 + self.updates))
            for group in self._groups:
                torch._foreach_lerp_([average[i] for i in group], [weights[i] for i in group], weight)

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
