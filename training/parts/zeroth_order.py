"""Gradients without back-propagation: random directions, and the subspace in which they are trusted.

Source: "Efficient personalization of quantized diffusion model without backpropagation", arXiv 2503.14868.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

Projection = Literal["retain_top", "drop_tail"]


def estimate(
    loss: Callable[[Tensor], Tensor], theta: Tensor, directions: Tensor, step: float, *, central: bool = False
) -> tuple[Tensor, Tensor]:
    """``(1/n) sum_i (loss(theta + step e_i) - loss(theta)) / step * e_i``, and ``loss(theta)``: ``n + 1`` losses.

    ``E`` of it is the gradient, up to ``O(step)``, if ``E e_i e_i^T = I``. ``E`` of its squared norm is ``(d + n + 1) /
    n`` times the gradient's for standard normal ``e_i``, and ``(d + n - 1) / n`` times for random signs (SPSA).
    ``central`` takes ``(loss(theta + step e_i) - loss(theta - step e_i)) / (2 step)`` instead, of ``2 n`` losses, whose
    mean stands for ``loss(theta)``, from which it differs by ``O(step^2)``.

    Args:
        loss: a scalar of ``theta``; the same noise in every call.
        theta: ``(d,)``, float32 at least; it is not changed, which would lose digits.
        directions: ``(n, d)``.
    """
    with torch.no_grad():
        gradient, losses = torch.zeros_like(theta), []
        start = None if central else loss(theta)
        for e in directions:
            ahead = loss(theta + step * e)
            behind = loss(theta - step * e) if start is None else start
            gradient += ((ahead - behind) / (2 * step if central else step)).to(theta) * e
            losses += [ahead, behind]
        return gradient / len(directions), torch.stack(losses).mean() if start is None else start


class Subspace(nn.Module):
    """Where the last ``window`` values of a vector lay: their principal components, made anew every ``window`` steps.

    The values, ``(window, d)``, are standardised by column; ``V`` are as many components as explain more than ``1 -
    noise`` of the variance, and ``W`` the rest of those that the values span. ``retain_top`` keeps of a gradient what
    lies in ``V``: ``g V V^T``, as the paper has it. ``drop_tail`` takes away what lies in ``W`` and leaves all that the
    values never spanned: ``g - g W W^T``, as the released code has it. Until there are ``window`` values, and every
    ``release_every``-th window, a gradient is left as it is, since under ``retain_top`` the values can hardly leave
    their span.
    """

    history: Tensor
    components: Tensor
    state: Tensor

    def __init__(self, dim: int, window: int, noise: float, projection: Projection, release_every: int | None = None):
        super().__init__()
        self.window, self.noise, self.projection, self.release_every = window, noise, projection, release_every
        self.register_buffer("history", torch.zeros(window, dim))
        # Rows of which some are kept or removed; how many values were seen, the first and last such row, windows.
        self.register_buffer("components", torch.zeros(min(window, dim), dim))
        self.register_buffer("state", torch.zeros(4, dtype=torch.int64))

    @property
    def removed(self) -> int:
        """Of how many dimensions a gradient is rid."""
        if not self._active:
            return 0
        first, last = self.state[1:3].tolist()
        return self.history.shape[1] - (last - first) if self.projection == "retain_top" else last - first

    @property
    def _active(self) -> bool:
        windows = int(self.state[3])
        return windows > 0 and not (self.release_every and windows % self.release_every == 0)

    def project(self, gradient: Tensor) -> Tensor:
        """``gradient`` ``(d,)`` in the subspace."""
        if not self._active:
            return gradient
        first, last = self.state[1:3].tolist()
        some = self.components[first:last].to(gradient)
        within = (gradient @ some.T) @ some
        return within if self.projection == "retain_top" else gradient - within

    @torch.no_grad()
    def push(self, value: Tensor) -> None:
        """Told of ``value`` ``(d,)`` after every step."""
        seen = int(self.state[0])
        self.history[seen % self.window] = value
        self.state[0] = seen + 1
        if (seen + 1) % self.window:
            return
        spread = self.history.std(0)
        if not bool(spread.any()):  # nothing has moved
            return
        centred = (self.history - self.history.mean(0)) / torch.where(spread == 0, 1.0, spread)
        _, s, rows = torch.linalg.svd(centred.double(), full_matrices=False)
        explained = s.square().cumsum(0) / s.square().sum()
        rank = int((s > s[0] * 1e-10).sum())
        top = min(rank, int((explained <= 1 - self.noise).sum()) + 1)
        self.components.copy_(rows)
        first, last = (0, top) if self.projection == "retain_top" else (top, rank)
        self.state[1], self.state[2] = first, last
        self.state[3] += 1
