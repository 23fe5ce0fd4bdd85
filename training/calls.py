"""How often the networks of a method are called in training."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from genkit.denoisers.network import unwrap
from genkit.denoisers.two_time import TwoTimeNetwork
from genkit.training.objectives.base import Objective
from genkit.training.parts.dual import Dual


@contextmanager
def counting(objective: Objective) -> Iterator[Mapping[str, int]]:
    """Within, the mapping counts by role the items that its network was called on, once for every call.

    Of roles that share a network the first counts. A call that also takes a derivative counts as two, about its cost.
    """
    counts: dict[str, int] = {}
    handles, seen = [], set[int]()
    for name, role in objective.roles.items():
        module: Any = role.module.network if isinstance(role.module, TwoTimeNetwork) else role.module
        network = unwrap(module)
        if id(network) not in seen:
            seen.add(id(network))
            handles.append(network.register_forward_pre_hook(_counter(counts, name), with_kwargs=True))
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def _counter(counts: dict[str, int], name: str):
    def count(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        flat = [one for v in (*args, *kwargs.values()) for one in (v if isinstance(v, (list, tuple)) else [v])]
        inputs = [v for v in flat if isinstance(v, (Tensor, Dual)) and v.ndim]
        differentiated = torch._C._functorch.maybe_current_level() is not None or any(
            isinstance(v, Dual) for v in inputs
        )
        counts[name] = counts.get(name, 0) + len(inputs[0]) * (2 if differentiated else 1)

    return count
