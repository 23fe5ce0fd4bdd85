"""A loss for decisive vectors that, between them, use every code; and sums of softmaxes that do not fit into memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_NUMBERS = 2**24  # of affinities held at a time


def entropy_loss(z: Tensor, affinity: Callable[[Tensor], Tensor], size: int, *, tau: float, gamma: float) -> Tensor:
    """``E_n H(p_n) - gamma H(E_n p_n)`` with ``p = softmax(affinity(z) / tau)``, natural logarithms.

    Rows are taken some at a time and computed again for the gradient, so that no ``(N, K)`` is kept. The mean is that
    over all processes.

    Args:
        z: ``(N, D)``.
        affinity: ``(M, D) -> (M, K)``.
        size: K.

    Source: Yu et al., "Language model beats diffusion: tokenizer is key to visual generation", arXiv 2310.05737, eq. 6.
    """
    if not tau > 0:
        raise ValueError(f"entropy_tau={tau}: expected above 0")

    def part(rows: Tensor) -> tuple[Tensor, Tensor]:
        log_p = (affinity(rows) / tau).log_softmax(1)
        p = log_p.exp()
        return -(p * log_p).sum(), p.sum(0)

    parts = [by_rows(part, rows) for rows in z.split(max(1, _NUMBERS // size))]
    own = torch.stack([entropy for entropy, _ in parts]).sum() / len(z)
    mean = average_over_processes(torch.stack([p for _, p in parts]).sum(0) / len(z))
    return own + gamma * (mean * (mean + 1e-12).log()).sum()


def entropy_is_read(config: Any) -> Any:
    """``config``, in which settings of the entropy loss are refused where its weight is 0."""
    unread = [n for n in ("entropy_tau", "entropy_gamma", "batch_entropy") if n in config.model_fields_set]
    if unread and not config.entropy_weight:
        raise ValueError(f"{', '.join(unread)} without effect: entropy_weight is 0")
    return config


def by_rows(function: Callable[..., tuple[Tensor, ...]], *rows: Tensor) -> tuple[Tensor, ...]:
    """``function(*rows)``, computed again for the gradient rather than kept."""
    if not torch.is_grad_enabled():
        return function(*rows)
    return checkpoint(function, *rows, use_reentrant=False, preserve_rng_state=False)  # type: ignore[return-value]


def average_over_processes(x: Tensor) -> Tensor:
    """The mean of ``x`` over processes of as many rows; a gradient passes to this process's share."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_reduce

    return all_reduce(x) / dist.get_world_size()
