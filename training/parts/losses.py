"""Forms that methods put a residual in; all of them in float32 at least."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def wide(x: Tensor) -> Tensor:
    """``x`` in float32, or as it is where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def sum_of_squares(residual: Tensor) -> Tensor:
    """``|r|^2`` of every item: ``(B, ...)`` to ``(B,)``."""
    return wide(residual).square().flatten(1).sum(1)


def mean_of_squares(residual: Tensor) -> Tensor:
    """``|r|^2 / D`` of every item, ``D`` its number of elements: ``(B, ...)`` to ``(B,)``."""
    return wide(residual).square().flatten(1).mean(1)


def adaptive(r: Tensor, p: float, c: float) -> Tensor:
    """``r / sg(r + c)^p``: the error ``r`` ``(B,)`` with its weight; near 1 whatever happens where ``p = 1``.

    ``p = 0`` leaves ``r``. ``c`` depends on whether ``r`` is a sum or a mean over elements.

    Source: Geng et al., "Mean flows for one-step generative modeling", arXiv 2505.13447, section 4.3.
    """
    return r / (r.detach() + c) ** p


def pseudo_huber(residual: Tensor, c: float) -> Tensor:
    """``sqrt(r^2 + c^2) - c`` of every element."""
    # The difference, without its cancellation at small r.
    square = wide(residual).square()
    return square / ((square + c * c).sqrt() + c)


def barron(m: Tensor, c: float) -> Tensor:
    """``(m / c) sg[(m / c^2 + 1)^(-1/2)]``: about the root of the mean square ``m`` ``(B,)``, its gradient bounded.

    Source: Barron, "A general and adaptive robust loss function", arXiv 1701.03077 (alpha = 1), with the weight frozen.
    """
    return m / c * (m.detach() / c**2 + 1).rsqrt()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Within, no dropout: ``module`` is in eval mode."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
