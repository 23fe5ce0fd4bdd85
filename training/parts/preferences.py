"""Errors on preferred and on rejected samples: the losses that pull them apart, and a watch over both."""

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from genkit.interpolants import Interpolant, Linear
from genkit.training.objectives.base import DivergedError
from genkit.training.parts.times import LogitNormal, TimeLaw, Uniform


def dpo_loss(rise_win: Tensor, rise_lose: Tensor, beta: float) -> Tensor:
    """``-log sigmoid(-beta/2 (rise_win - rise_lose))`` of every pair, ``(B,)``.

    Args:
        rise_win, rise_lose: by how much the error exceeds the reference's, ``err - err_ref`` ``(B,)``.
        beta: for errors that are *means* over elements; for sums it is ``D`` times smaller.
    """
    return softplus(beta / 2 * (rise_win - rise_lose))


def clipped(weight: Tensor, err: Tensor, before: Tensor, kappa: float) -> Tensor:
    """``w+ err - w- min(err, kappa err_ref)`` with ``w = w+ - w-``, ``(B,)``: at least ``-w- kappa err_ref``."""
    capped = torch.minimum(err, kappa * before)
    return weight.clamp(min=0) * err + weight.clamp(max=0) * capped


def saturating(weight: Tensor, err: Tensor, before: Tensor, beta: float) -> Tensor:
    """``w+ softplus(beta (err - err_ref)) + w- softplus(-beta (err - err_ref))`` with ``w = w+ - w-``, ``(B,)``: not
    negative."""
    return weight.abs() * softplus(weight.sign() * beta * (err - before))


def group_weights(score: Tensor, share: Tensor | None, max_weight: float) -> Tensor:
    """Signed weights ``(2 o - 1) min(1 / share, max_weight)``, ``(B,)``.

    With ``share`` the mean over the *data* of ``max(2 o - 1, 0)`` for an accepted item and of ``max(1 - 2 o, 0)`` for a
    rejected one, the mean of ``weight * err`` is the mean error of the accepted less that of the rejected, whatever
    their numbers. A weight is its item's own, so that it does not matter how a batch is cut, as it would for means over
    the groups of a micro-batch.

    Args:
        score: ``o`` in [0, 1], 1 for accepted and 0 for rejected, or anything between.
        share: in (0, 1]; ``None`` is 1 everywhere.
    """
    sign = 2 * score - 1
    return sign if share is None else sign * share.reciprocal().clamp(max=max_weight)


def default_times(path: Interpolant) -> TimeLaw:
    """The published law: logit-normal with mean 1 and deviation 1 on the linear path, uniform on others."""
    return LogitNormal(mean=1.0, std=1.0) if isinstance(path, Linear) else Uniform()


class Watch(nn.Module):
    """Running means of the errors of preferred and rejected samples, over the last :attr:`horizon` or so of each.

    A micro-batch may hold none of one kind, and the errors of a few samples at random times say little: hence not the
    means of the batch. Checkpoints hold the state.
    """

    sums: Tensor
    horizon = 256

    def __init__(self):
        super().__init__()
        self.register_buffer("sums", torch.zeros(2, 3, dtype=torch.float64))  # preferred, rejected: count, err, err_ref

    @torch.no_grad()
    def add(self, sign: Tensor, err: Tensor, before: Tensor | None) -> dict[str, Tensor]:
        """Take a batch in, and give what to log; 0 for a kind that was not seen yet.

        ``err_w`` and ``err_l`` are errors of preferred and rejected samples; ``rise_w`` and ``rise_l`` by how much they
        exceed the reference's, relative to it.

        Args:
            sign: ``(B,)``, positive for preferred and negative for rejected.
            err, before: errors of the student and of the reference, ``(B,)``.
        """
        rows = torch.stack((torch.ones_like(err), err, torch.zeros_like(err) if before is None else before), 1)
        for sums, chosen in zip(self.sums, (sign > 0, sign < 0), strict=True):
            new = (rows.double() * chosen[:, None]).sum(0)
            sums.mul_((1 - 1 / self.horizon) ** new[0]).add_(new)
        count, err, before_ = self.sums.unbind(1)
        logs = dict(zip(("err_w", "err_l"), err / count.clamp(min=1e-9), strict=True))
        if before is not None:
            rise = torch.where(before_ > 0, err / before_.clamp(min=1e-300) - 1, 0.0)
            logs |= zip(("rise_w", "rise_l"), rise, strict=True)
        return logs

    def check(self, max_rise: float | None) -> None:
        """Stop training that loses what it should keep.

        Raises:
            DivergedError: the error of preferred samples exceeds the reference's by more than ``max_rise`` of it.
        """
        if max_rise is None:
            return
        _, err, before = self.sums[0].tolist()
        if err > (1 + max_rise) * before:
            raise DivergedError(
                f"the error on preferred samples is {err / before if before else float('inf'):.3g} times the "
                f"reference's, more than 1 + max_rise={1 + max_rise:g}: the student leaves the rejected at the cost "
                "of the preferred. Train for fewer steps or at a lower rate, or allow more"
            )
